/* What admin requests ask of a process's host: faults, requests passed on to a gateway, and the journal,
 * which listens to the feed as a client would. Every FEED_JOURNAL_KEYFRAME_MS it leaves and comes again,
 * because a new client is told everything: so a reader can begin there. */
#include <stdio.h>
#include <string.h>

#include "actors/host/admin_fault.h"
#include "actors/host/clock.h"
#include "actors/host/process_parts.h"

static void answer(struct process *self, uint64_t client, uint16_t status, const char *text) {
    struct effect effect = {.kind = EFFECT_STREAM};
    effect.stream.client = client;
    effect.stream.status = status;
    effect.stream.content_type = "application/json";
    effect.stream.bytes = (const uint8_t *)text;
    effect.stream.size = strlen(text);
    effect.stream.last = true;
    http_stream(client >= ADMIN_CLIENTS ? self->admin_http : self->http, &effect);
}

static void answer_failure(struct process *self, uint64_t client, const struct failure *failure) {
    char text[FAILURE_TEXT_BYTES + 96], plain[FAILURE_TEXT_BYTES];
    size_t at = 0;
    for (const char *from = failure->text; *from != 0 && at + 1 < sizeof plain; from++)
        plain[at++] = *from == '"' || *from == '\\' || (unsigned char)*from < ' ' ? '\'' : *from;
    plain[at] = 0;
    snprintf(text, sizeof text, "{\"error\":{\"message\":\"%s\",\"type\":\"%s\"}}\n", plain,
             error_name(failure->code));
    answer(self, client, failure->code == ERR_NOT_FOUND ? 404 : failure->code == ERR_STATE ? 409 : 400, text);
}

/* ---- the journal ---- */

int process_journal_open(struct process *self, const char *path, struct failure *failure) {
    uint64_t bytes = (uint64_t)self->options->settings.journal_mib << 20;
    if (self->journal != NULL)
        return fail(failure, ERR_STATE, "a journal is being written already: stop it first");
    int error = feed_journal_open(&self->journal, path, bytes, failure);
    self->journal_due_ns = 0; /* a keyframe at once: whoever still listens for an earlier file leaves */
    if (error == 0)
        log_line(TRACE_INFO, "the feed is recorded in %s", path);
    return error;
}

/* Leaves, and comes again as another client. After a journal has been closed: leaves. */
const struct event *process_journal_event(struct process *self, uint64_t now_ns) {
    struct event *event = &self->journal_event;
    struct http_request *join = &self->journal_join;
    struct failure failure;
    if (self->journal != NULL && feed_journal_failed(self->journal, &failure)) {
        log_line(TRACE_ERROR, "%s; nothing more is recorded", failure.text);
        feed_journal_close(&self->journal);
    }
    if (self->journal_client > JOURNAL_CLIENTS && (self->journal == NULL || now_ns >= self->journal_due_ns)) {
        *event = (struct event){.kind = EVENT_CLIENT_GONE, .client = self->journal_client};
        self->journal_client = 0;
        return event;
    }
    if (self->journal == NULL || self->journal_client != 0 || now_ns < self->journal_due_ns)
        return NULL;
    uint64_t last = join->client < JOURNAL_CLIENTS ? JOURNAL_CLIENTS : join->client;
    *join = (struct http_request){.client = last + 1, .admin = true, .method = "GET", .path = "/troupe/events", .query = "", .body = ""};
    self->journal_client = join->client;
    self->journal_due_ns = now_ns + FEED_JOURNAL_KEYFRAME_MS * UINT64_C(1000000);
    *event = (struct event){.kind = EVENT_HTTP_REQUEST, .http = join};
    return event;
}

void process_journal_take(struct process *self, const struct effect *effect) {
    uint64_t unix_ms = (uint64_t)((int64_t)clock_now_ns() + clock_unix_offset_ns()) / 1000000u;
    bool first = effect->stream.status != 0;
    if (self->journal == NULL || effect->stream.client != self->journal_client || effect->stream.size == 0)
        return;
    if (first && effect->stream.status != 200) { /* too many listen: tried again with the next keyframe */
        self->journal_client = 0;
        return;
    }
    feed_journal_add(self->journal, unix_ms, first, effect->stream.bytes, effect->stream.size);
}

static void on_journal(struct process *self, const struct effect *effect) {
    struct failure failure = {0};
    int error = 0;
    if (effect->admin.text != NULL)
        error = process_journal_open(self, effect->admin.text, &failure);
    else if (self->journal == NULL)
        error = fail(&failure, ERR_STATE, "no journal is being written");
    else
        feed_journal_close(&self->journal);
    if (error < 0)
        answer_failure(self, effect->admin.client, &failure);
    else
        answer(self, effect->admin.client, 200,
               effect->admin.text != NULL ? "{\"message\":\"the feed is being recorded\"}\n"
                                          : "{\"message\":\"the journal is closed\"}\n");
}

/* ---- effects ---- */

void process_carry_admin(struct process *self, const struct effect *effect) {
    struct failure failure = {0};
    if (effect->kind == EFFECT_JOURNAL) {
        on_journal(self, effect);
    } else if (effect->kind == EFFECT_RELAY) {
        if (self->relays != NULL)
            relays_pass(self->relays, self->request);
        else
            answer(self, effect->admin.client, 503,
                   "{\"error\":{\"message\":\"a coordinator without a run directory has no gateway to ask\","
                   "\"type\":\"unavailable\"}}\n");
    } else if (!self->options->allow_faults) {
        answer(self, effect->admin.client, 403,
               "{\"error\":{\"message\":\"faults are not allowed here\",\"type\":\"invalid\"}}\n");
    } else if (admin_fault(self->options->run_dir, effect->admin.text, &failure) < 0) {
        answer_failure(self, effect->admin.client, &failure);
    } else {
        log_line(TRACE_WARNING, "a fault on purpose: %s", effect->admin.text);
        answer(self, effect->admin.client, 200, "{\"message\":\"the fault is inflicted\"}\n");
    }
}
