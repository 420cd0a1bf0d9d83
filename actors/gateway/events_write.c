/* The events of the live view's feed as text: "event: NAME\ndata: {...}\n\n". docs/live-view.md
 * describes them; what is there may only be added to without a new EVENTS_VERSION. */
#include "actors/gateway/events.h"

#include <inttypes.h>
#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "actors/gateway/gateway.h"

static struct text *begin(struct event_feed *self, const char *name) {
    text_format(&self->line, "event: %s\ndata: {\"v\":%d", name, EVENTS_VERSION);
    return &self->line;
}

static void end(struct event_feed *self) {
    text_puts(&self->line, "}\n\n");
}

/* Loads are long lists of numbers; printf would take most of the time that the feed may cost. */
static void put_number(struct text *line, uint64_t number) {
    char digits[20];
    size_t at = sizeof digits;
    do {
        digits[--at] = (char)('0' + number % 10);
        number /= 10;
    } while (number > 0);
    text_append(line, digits + at, sizeof digits - at);
}

static void put_comma(struct text *line) {
    if (line->bytes[line->size - 1] != '[')
        text_append(line, ",", 1);
}

static uint64_t unix_ms(const struct event_source *source, uint64_t ns) {
    return (uint64_t)((int64_t)ns + source->unix_offset_ns) / NS_PER_MS;
}

static const char *state_name(Troupe__ActorState state) {
    static const char *const NAMES[] = {"joining", "loading", "ready", "draining", "gone", "quarantined"};
    return state <= TROUPE__ACTOR_STATE__STATE_QUARANTINED ? NAMES[state] : "unknown";
}

void events_write_hello(struct event_feed *self, const struct event_source *source,
                        uint64_t now_ns) {
    struct text *line = begin(self, "hello");
    text_puts(line, ",\"version\":");
    text_json_string(line, source->version);
    text_puts(line, ",\"model\":");
    text_json_string(line, source->model);
    text_format(line,
                ",\"gateway\":\"%016" PRIx64 "\",\"t\":%" PRIu64
                ",\"interval_ms\":%d,\"heartbeat_ms\":%u,\"layers\":%u,\"experts\":%u,"
                "\"experts_per_token\":%u,\"admin\":%s,\"faults\":%s,\"routed\":[",
                source->incarnation, unix_ms(source, now_ns), EVENTS_INTERVAL_MS,
                source->heartbeat_ms, source->cluster->layers, source->cluster->experts,
                source->config->gate.k, source->admin ? "true" : "false",
                source->faults ? "true" : "false");
    for (uint32_t l = 0; l < source->cluster->layers; l++)
        if (model_layer_is_moe(source->config, l)) {
            put_comma(line);
            put_number(line, l);
        }
    text_puts(line, "]");
    end(self);
}

/* Holders of each routed layer's experts: an id, a list of ids where there are several copies, 0
 * for none. */
static void write_layer(struct event_feed *self, const struct cluster_view *cluster,
                        uint32_t layer) {
    struct text *line = &self->line;
    uint32_t from = cluster->first[layer], to = cluster->first[layer + 1];
    uint32_t *copies = calloc((size_t)cluster->experts + 2, sizeof *copies);
    uint32_t *holder = malloc((size_t)(to - from + 1) * sizeof *holder);
    ASSERT(copies != NULL && holder != NULL && "memory for the live view");
    for (uint32_t i = from; i < to; i++)
        copies[cluster->placement[i].expert + 2]++;
    for (uint32_t e = 0; e < cluster->experts; e++)
        copies[e + 2] += copies[e + 1];
    for (uint32_t i = from; i < to; i++)
        holder[copies[cluster->placement[i].expert + 1]++] = cluster->placement[i].holder;
    for (uint32_t e = 0; e < cluster->experts; e++) {
        uint32_t first = copies[e], last = copies[e + 1];
        text_puts(line, e == 0 ? "" : ",");
        if (last - first > 1)
            text_puts(line, "[");
        for (uint32_t i = first; i < last; i++) {
            text_puts(line, i == first ? "" : ",");
            put_number(line, holder[i]);
        }
        text_puts(line, last - first > 1 ? "]" : first == last ? "0" : "");
    }
    free(copies);
    free(holder);
}

void events_write_epoch(struct event_feed *self, const struct event_source *source) {
    struct text *line = begin(self, "epoch");
    text_format(line,
                ",\"epoch\":%" PRIu64 ",\"serving\":%s,\"bias_version\":%" PRIu64 ",\"members\":[",
                self->epoch, self->serving ? "true" : "false", self->bias_version);
    for (uint32_t i = 0; i < self->members; i++) {
        const struct event_member *member = &self->member[i];
        text_format(line, "%s[%u,\"%s\",", i == 0 ? "" : ",", member->id, role_name(member->role));
        text_json_string(line, member->name);
        text_format(line, ",\"%s\",\"%016" PRIx64 "\",%u,", state_name(member->state),
                    member->incarnation, member->copies);
        text_json_string(line, member->host);
        text_puts(line, "]");
    }
    text_puts(line, "],\"placement\":[");
    for (uint32_t l = 0; l < source->cluster->layers; l++) {
        if (!model_layer_is_moe(source->config, l))
            continue;
        put_comma(line);
        text_format(line, "[%u,[", l);
        write_layer(self, source->cluster, l);
        text_puts(line, "]]");
    }
    text_puts(line, "]");
    end(self);
}

/* What attention actors do besides: found in the prefix cache, guessed, put back, audited; totals of
 * those that are there. */
static void write_sums(struct text *line, const Troupe__Stats *stats) {
#define SUM(key, field)                                                                            \
    { key, offsetof(Troupe__Heartbeat, field) }
    static const struct {
        const char *key;
        size_t offset;
    } SUMS[] = {SUM("cache_queries", prefix_cache_queries), SUM("cache_hits", prefix_cache_hits),
                SUM("guessed", spec_draft_tokens),          SUM("accepted", spec_accepted_tokens),
                SUM("put_back", preemptions),               SUM("sent_again", frames_resent),
                SUM("audited", rows_audited),               SUM("differed", audits_differed),
                SUM("unaudited", rows_unaudited)};
#undef SUM
    uint64_t quarantines = 0;
    for (size_t s = 0; s < sizeof SUMS / sizeof SUMS[0]; s++) {
        uint64_t sum = 0;
        for (size_t i = 0; i < stats->n_actor; i++)
            if (stats->actor[i]->heartbeat != NULL)
                sum += *(const uint64_t *)((const char *)stats->actor[i]->heartbeat + SUMS[s].offset);
        text_format(line, "%s\"%s\":", s == 0 ? ",\"sums\":{" : ",", SUMS[s].key);
        put_number(line, sum);
    }
    for (size_t i = 0; i < stats->n_quarantine; i++)
        quarantines += stats->quarantine[i]->times;
    text_format(line, ",\"quarantines\":%" PRIu64 "}", quarantines);
}

void events_write_actors(struct event_feed *self, const struct event_source *source,
                         uint64_t now_ns) {
    const Troupe__Stats *stats = source->cluster->stats;
    if (stats == NULL)
        return;
    struct text *line = begin(self, "actors");
    text_format(line, ",\"stats_age_ms\":%" PRIu64 ",\"actors\":[",
                (uint64_t)((now_ns - self->stats_ns) / NS_PER_MS));
    for (size_t i = 0; i < stats->n_actor; i++) {
        static const Troupe__Heartbeat NOTHING;
        const Troupe__Member *member = stats->actor[i]->member;
        const Troupe__Heartbeat *heartbeat = stats->actor[i]->heartbeat;
        if (member == NULL || member->role == TROUPE__ROLE__ROLE_CONTROL)
            continue;
        if (heartbeat == NULL)
            heartbeat = &NOTHING;
        const uint64_t numbers[] = {
            member->id,
            stats->actor[i]->heartbeat_age_ns / NS_PER_MS,
            member->state,
            heartbeat->memory_bytes,
            heartbeat->epoch,
            heartbeat->sequences_running,
            heartbeat->sequences_waiting,
            heartbeat->pages_used,
            heartbeat->pages_total,
            heartbeat->rows,
            heartbeat->busy_ns / NS_PER_MS,
            heartbeat->generated_tokens,
            heartbeat->frames_resent,
        };
        put_comma(line);
        for (size_t n = 0; n < sizeof numbers / sizeof numbers[0]; n++) {
            text_append(line, n == 0 ? "[" : ",", 1);
            put_number(line, numbers[n]);
        }
        text_append(line, "]", 1);
    }
    text_puts(line, "]");
    write_sums(line, stats);
    end(self);
}

/* ---- loads ---- */

/* "cells": pairs of (cells left out since the one before, rows). */
static void put_cell(struct text *line, size_t cell, size_t *next, uint64_t rows) {
    put_comma(line);
    put_number(line, cell - *next);
    text_append(line, ",", 1);
    put_number(line, rows);
    *next = cell + 1;
}

void events_write_totals(struct event_feed *self, const struct event_source *source) {
    struct text *line = begin(self, "load");
    size_t cells = (size_t)source->cluster->layers * source->cluster->experts, next = 0;
    text_puts(line, ",\"base\":true,\"cells\":[");
    for (size_t cell = 0; cell < cells; cell++)
        if (self->sent[cell] > 0)
            put_cell(line, cell, &next, self->sent[cell]);
    text_puts(line, "]");
    end(self);
}

/* Mean over max of the rows that the holders of a layer have got since the last time, the rows of
 * an expert shared evenly among its copies. Negative: none. */
static double layer_balancedness(struct event_feed *self, const struct cluster_view *cluster,
                                 uint32_t layer) {
    double sum = 0, most = 0;
    uint32_t holders = 0;
    for (uint32_t m = 0; m < self->members; m++)
        self->holder_rows[m] = -1;
    for (uint32_t i = cluster->first[layer]; i < cluster->first[layer + 1]; i++) {
        if (self->holder_of[i] == UINT32_MAX)
            continue;
        size_t cell = (size_t)layer * cluster->experts + cluster->placement[i].expert;
        double *rows = &self->holder_rows[self->holder_of[i]];
        holders += *rows < 0;
        *rows = (*rows < 0 ? 0 : *rows) + (double)(cluster->rows[cell] - self->sent[cell]) /
                                              cluster->replicas[cell];
    }
    for (uint32_t m = 0; m < self->members; m++) {
        sum += self->holder_rows[m] > 0 ? self->holder_rows[m] : 0;
        most = self->holder_rows[m] > most ? self->holder_rows[m] : most;
    }
    return most == 0 ? -1 : sum / holders / most;
}

void events_write_loads(struct event_feed *self, const struct event_source *source) {
    const struct cluster_view *cluster = source->cluster;
    size_t cells = (size_t)cluster->layers * cluster->experts, next = 0;
    if (memcmp(self->sent, cluster->rows, cells * sizeof *self->sent) == 0)
        return;
    /* A coordinator that was started again counts anew until all attention actors have reported. */
    for (size_t cell = 0; cell < cells; cell++)
        if (cluster->rows[cell] < self->sent[cell])
            self->sent[cell] = cluster->rows[cell];
    self->holder_rows = gateway_grow(self->holder_rows, &self->holder_capacity, self->members,
                                     sizeof *self->holder_rows);
    struct text *line = begin(self, "load");
    text_puts(line, ",\"cells\":[");
    for (size_t cell = 0; cell < cells; cell++)
        if (cluster->rows[cell] > self->sent[cell])
            put_cell(line, cell, &next, cluster->rows[cell] - self->sent[cell]);
    text_puts(line, "],\"balancedness\":[");
    for (uint32_t l = 0; l < cluster->layers; l++) {
        double balancedness =
            cluster->first[l] == cluster->first[l + 1] ? -1 : layer_balancedness(self, cluster, l);
        if (balancedness < 0)
            continue;
        put_comma(line);
        text_format(line, "%u,%.4g", l, balancedness);
    }
    text_puts(line, "]");
    end(self);
    memcpy(self->sent, cluster->rows, cells * sizeof *self->sent);
}

/* ---- rates ---- */

static int by_size(const void *a, const void *b) {
    float left = *(const float *)a, right = *(const float *)b;
    return (left > right) - (left < right);
}

static void write_latency(struct text *line, const char *name, struct event_samples *samples) {
    double sum = 0;
    text_format(line, ",\"%s\":", name);
    if (samples->count == 0) {
        text_puts(line, "null");
        return;
    }
    qsort(samples->ms, samples->count, sizeof *samples->ms, by_size);
    for (uint32_t i = 0; i < samples->count; i++)
        sum += (double)samples->ms[i];
    text_format(line, "{\"count\":%" PRIu64 ",\"mean\":%.4g,\"p50\":%.4g,\"p95\":%.4g}",
                samples->seen, sum / samples->count, (double)samples->ms[samples->count / 2],
                (double)samples->ms[samples->count * 95 / 100]);
}

void events_write_rates(struct event_feed *self, const struct event_source *source,
                        uint64_t now_ns) {
    const struct metrics *now = source->metrics, *before = &self->before;
    double seconds = (double)(now_ns - self->last_ns) * 1e-9;
    uint64_t finished = 0, failed = now->finished[METRIC_ERROR] - before->finished[METRIC_ERROR];
    for (int f = 0; f < METRIC_FINISHES; f++)
        finished += now->finished[f] - before->finished[f];
    struct text *line = begin(self, "rates");
    text_format(
        line,
        ",\"t\":%" PRIu64 ",\"window_ms\":%.0f,\"running\":%u,\"waiting\":%u"
        ",\"finished\":%" PRIu64 ",\"failed\":%" PRIu64 ",\"resubmitted\":%" PRIu64
        ",\"tokens_per_s\":%.5g,\"prompt_tokens_per_s\":%.5g,\"cache\":%.4g",
        unix_ms(source, now_ns), seconds * 1e3, source->running, source->waiting, finished, failed,
        now->counter[METRIC_RESUBMITTED] - before->counter[METRIC_RESUBMITTED],
        (double)(now->counter[METRIC_TOKENS_GENERATED] - before->counter[METRIC_TOKENS_GENERATED]) /
            seconds,
        (double)(now->counter[METRIC_TOKENS_PROMPT] - before->counter[METRIC_TOKENS_PROMPT]) /
            seconds,
        cluster_view_cache_usage(source->cluster));
    write_latency(line, "ttft_ms", &self->ttft);
    write_latency(line, "tpot_ms", &self->tpot);
    end(self);
}

/* ---- the timeline ---- */

static void write_after(struct text *line, const char *name, const struct moment *moment,
                        uint64_t when_ns) {
    if (when_ns == NEVER)
        text_format(line, ",\"%s\":null", name);
    else
        text_format(line, ",\"%s\":%.3f", name, (double)(when_ns - moment->at_ns) * 1e-6);
}

static void write_moment(struct event_feed *self, const struct event_source *source,
                         const struct moment *moment) {
    static const char *const KINDS[] = {"epoch", "joined", "left", "lost", "operation", "bias"};
    struct text *line = begin(self, "moment");
    text_format(line, ",\"number\":%" PRIu64 ",\"kind\":\"%s\",\"t\":%" PRIu64
                      ",\"epoch\":%" PRIu64,
                moment->number, KINDS[moment->kind], unix_ms(source, moment->at_ns),
                moment->epoch);
    if (moment->kind == MOMENT_EPOCH) {
        text_format(line, ",\"members\":%u,\"serving\":%s", moment->members,
                    moment->serving ? "true" : "false");
    } else if (moment->kind == MOMENT_OPERATION) {
        text_format(line, ",\"operation\":%" PRIu64 ",\"what\":\"%s\",\"about\":",
                    moment->operation, moment->what);
        text_json_string(line, moment->name);
        text_format(line, ",\"phase\":\"%s\",\"done\":%u,\"total\":%u,\"ms\":%.3f,\"reason\":",
                    moment->phase, moment->done, moment->total, (double)moment->age_ns * 1e-6);
        text_json_string(line, moment->why);
    } else if (moment->kind == MOMENT_BIAS) {
        text_format(line, ",\"before\":%" PRIu64 ",\"bias_version\":%" PRIu64,
                    moment->bias_before, moment->bias_version);
    } else {
        text_format(line, ",\"actor\":%u,\"role\":\"%s\",\"incarnation\":\"%016" PRIx64
                          "\",\"name\":",
                    moment->actor, role_name(moment->role), moment->incarnation);
        text_json_string(line, moment->name);
    }
    if (moment->kind == MOMENT_LOST) {
        text_format(line, ",\"copies\":%u", moment->copies);
        if (moment->silent_ns != NEVER)
            text_format(line, ",\"silent_ms\":%.3f", (double)moment->silent_ns * 1e-6);
        if (moment->fenced_ns != NEVER)
            text_format(line, ",\"fenced_ms\":%.3f", (double)moment->fenced_ns * 1e-6);
        text_puts(line, ",\"why\":");
        text_json_string(line, moment->why);
        write_after(line, "replaced_ms", moment, moment->replaced_ns);
        write_after(line, "serving_ms", moment, moment->serving_ns);
        if (moment->busy)
            write_after(line, "resumed_ms", moment, moment->resumed_ns);
        write_after(line, "back_ms", moment, moment->back_ns);
    }
    end(self);
}

void events_write_moments(struct event_feed *self, const struct event_source *source, bool all) {
    uint64_t oldest = self->moments >= EVENTS_MOMENTS ? self->moments - EVENTS_MOMENTS + 1 : 1;
    for (uint64_t n = oldest; n <= self->moments; n++) {
        struct moment *moment = &self->moment[n % EVENTS_MOMENTS];
        if (!all && !moment->changed)
            continue;
        if (!all || self->listeners <= 1) /* else those before would never hear of it */
            moment->changed = false;
        write_moment(self, source, moment);
    }
}
