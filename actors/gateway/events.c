/* Who listens to the live view's feed, and when something is sent to them. One set of events is
 * written per interval, whatever the number of listeners; without any, nothing is. */
#include "actors/gateway/events.h"

#include <stdlib.h>
#include <string.h>

#include "actors/gateway/gateway.h"

void events_init(struct event_feed *self) {
    memset(self, 0, sizeof *self);
    self->next_ns = NEVER;
    self->unrepaired_ns = NEVER;
}

void events_free(struct event_feed *self) {
    free(self->sent);
    free(self->holder_rows);
    free(self->member);
    free(self->holder_of);
    text_free(&self->line);
    memset(self, 0, sizeof *self);
}

static void send(const struct event_feed *self, uint64_t client, bool first, struct effects *out) {
    struct effect *effect = effects_add(out, EFFECT_STREAM);
    effect->stream.client = client;
    if (first) {
        effect->stream.status = 200;
        effect->stream.content_type = "text/event-stream";
        effect->stream.extra_header = "Cache-Control: no-store";
    }
    effect->stream.bytes = effects_copy(out, self->line.bytes, self->line.size);
    effect->stream.size = self->line.size;
}

static void start_interval(struct event_feed *self, const struct event_source *source,
                           uint64_t now_ns) {
    self->before = *source->metrics;
    self->ttft.count = self->tpot.count = 0;
    self->ttft.seen = self->tpot.seen = 0;
    self->last_ns = now_ns;
    self->next_ns = now_ns + EVENTS_INTERVAL_MS * NS_PER_MS;
}

bool events_join(struct event_feed *self, const struct event_source *source, uint64_t client,
                 uint64_t now_ns, struct effects *out) {
    if (self->listeners == EVENTS_LISTENERS_MAX)
        return false;
    size_t cells = (size_t)source->cluster->layers * source->cluster->experts;
    if (self->listeners == 0) {
        if (self->sent == NULL)
            self->sent = malloc((cells + 1) * sizeof *self->sent);
        ASSERT(self->sent != NULL && "memory for the live view");
        memcpy(self->sent, source->cluster->rows, cells * sizeof *self->sent);
        start_interval(self, source, now_ns);
    }
    self->listener[self->listeners++] = client;
    text_clear(&self->line);
    events_write_hello(self, source, now_ns);
    events_write_epoch(self, source);
    events_write_totals(self, source);
    events_write_actors(self, source, now_ns);
    events_write_moments(self, source, true);
    send(self, client, true, out);
    return true;
}

bool events_leave(struct event_feed *self, uint64_t client) {
    for (uint32_t i = 0; i < self->listeners; i++)
        if (self->listener[i] == client) {
            self->listener[i] = self->listener[--self->listeners];
            if (self->listeners == 0)
                self->next_ns = NEVER;
            return true;
        }
    return false;
}

void events_end(struct event_feed *self, struct effects *out) {
    while (self->listeners > 0) {
        struct effect *effect = effects_add(out, EFFECT_STREAM);
        effect->stream.client = self->listener[0];
        effect->stream.bytes = (const uint8_t *)"";
        effect->stream.last = true;
        events_leave(self, self->listener[0]);
    }
}

void events_latency(struct event_feed *self, struct event_samples *samples, double ms) {
    if (self->listeners == 0)
        return;
    samples->seen++;
    if (samples->count < EVENTS_SAMPLES)
        samples->ms[samples->count++] = (float)ms;
}

/* Epochs may follow each other faster than anybody can look: only the newest of an interval is
 * told. Loads and actors, the bulk, are told every second time. */
void events_timer(struct event_feed *self, const struct event_source *source, uint64_t now_ns,
                  struct effects *out) {
    if (now_ns < self->next_ns)
        return;
    text_clear(&self->line);
    if (self->epoch_changed)
        events_write_epoch(self, source);
    self->epoch_changed = false;
    events_write_moments(self, source, false);
    self->even = !self->even;
    if (self->even) {
        events_write_loads(self, source);
        events_write_actors(self, source, now_ns);
    }
    events_write_rates(self, source, now_ns);
    start_interval(self, source, now_ns);
    for (uint32_t i = 0; i < self->listeners; i++)
        send(self, self->listener[i], false, out);
}
