/* An attention actor: holds sequences and their latent cache, takes them through the layers step by
 * step, sends rows to experts and samplers, and tells gateways the tokens.
 *
 *   joins (actors/member.c); then
 *   SUBMIT -> sequences (attention_sequence.c) -> batches (attention_batch.c)
 *          -> experts (attention_dispatch.c) -> samplers (attention_sample.c)
 *          -> gateways (attention_report.c)
 *
 * When it is drained, it takes no new sequences and gives those that it has back to their gateways, a few
 * between two batches, so that whoever goes on with them is not flooded; the coordinator ends it when
 * it is empty.
 *
 * Invariants: 1. at most one batch is in flight; 2. after every event, if no batch is in flight,
 * none could be started; 3. sequences of a gateway that is gone are dropped. */
#include "actors/attention.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define HEARTBEAT_LOADS_MAX 4096u

/* ---- what heartbeats carry ---- */

/* Running totals, in turn; the number of heartbeats after the last change is bounded so that an
 * idle actor falls silent. */
static void fill_loads(struct attention *self, Troupe__Heartbeat *heartbeat, struct effects *out) {
    uint32_t entries = self->config.layers * self->config.experts;
    if (self->load_heartbeats == 0 || entries == 0 || !self->settings.load_statistics)
        return;
    uint32_t rounds = 4 * (entries / HEARTBEAT_LOADS_MAX + 1);
    self->load_heartbeats = self->load_heartbeats > rounds ? rounds : self->load_heartbeats - 1;
    uint32_t limit = entries < HEARTBEAT_LOADS_MAX ? entries : HEARTBEAT_LOADS_MAX, count = 0;
    heartbeat->load_layer = effects_alloc(out, limit * sizeof(uint32_t));
    heartbeat->load_expert = effects_alloc(out, limit * sizeof(uint32_t));
    heartbeat->load_rows = effects_alloc(out, limit * sizeof(uint64_t));
    for (uint32_t i = 0; i < entries && count < limit; i++) {
        uint32_t entry = self->load_cursor;
        self->load_cursor = (entry + 1) % entries;
        if (self->load[entry] == 0)
            continue;
        heartbeat->load_layer[count] = entry / self->config.experts;
        heartbeat->load_expert[count] = entry % self->config.experts;
        heartbeat->load_rows[count++] = self->load[entry];
    }
    heartbeat->n_load_layer = heartbeat->n_load_expert = heartbeat->n_load_rows = count;
}

/* What each expert process has still to answer, and how long its answers take. */
static void fill_answers(const struct attention *self, Troupe__Heartbeat *heartbeat, struct effects *out) {
    const struct flight *flight = &self->batch.flight;
    const uint32_t count = self->settings.load_statistics ? self->destinations : 0;
    uint32_t *list = effects_alloc(out, 4 * ((size_t)count + 1) * sizeof *list);
    heartbeat->peer = list;
    heartbeat->peer_queue = list + count;
    heartbeat->peer_p50_us = list + 2 * (size_t)count;
    heartbeat->peer_p99_us = list + 3 * (size_t)count;
    for (uint32_t i = 0; i < count; i++) {
        const struct latency *latency = &self->destination[i].latency;
        heartbeat->peer[i] = self->destination[i].id;
        heartbeat->peer_queue[i] = 0;
        heartbeat->peer_p50_us[i] = (uint32_t)(latency_quantile_ns(latency, 0.5) / 1000);
        heartbeat->peer_p99_us[i] = (uint32_t)(latency_quantile_ns(latency, 0.99) / 1000);
    }
    for (uint32_t i = 0; i < flight->parts && count > 0; i++) {
        const struct part *part = &flight->part[i];
        uint32_t at = part->state == PART_SENT ? dispatch_destination(self, part->to) : UINT32_MAX;
        if (at != UINT32_MAX)
            heartbeat->peer_queue[at] += part->count;
    }
    heartbeat->n_peer = heartbeat->n_peer_queue = count;
    heartbeat->n_peer_p50_us = heartbeat->n_peer_p99_us = count;
}

static void send_heartbeat(struct attention *self, uint64_t now_ns, struct effects *out) {
    Troupe__Heartbeat heartbeat = TROUPE__HEARTBEAT__INIT;
    heartbeat.state = self->member.draining ? TROUPE__ACTOR_STATE__STATE_DRAINING
                                            : TROUPE__ACTOR_STATE__STATE_READY;
    heartbeat.sequences_running = self->runnings;
    heartbeat.sequences_waiting = self->waiting.count;
    heartbeat.pages_used = self->pages.total - pages_available(&self->pages);
    heartbeat.pages_total = self->pages.total;
    heartbeat.prefix_cache_queries = self->prefix_queries;
    heartbeat.prefix_cache_hits = self->prefix_hits;
    heartbeat.preemptions = self->preemptions;
    heartbeat.spec_drafts = self->drafts_total;
    heartbeat.spec_draft_tokens = self->draft_tokens_total;
    heartbeat.spec_accepted_tokens = self->accepted_total;
    heartbeat.prompt_tokens = self->prompt_total;
    heartbeat.generated_tokens = self->generated_total;
    heartbeat.steps = self->steps;
    heartbeat.frames = self->frames;
    heartbeat.rows = self->rows;
    heartbeat.frames_resent = self->frames_resent;
    heartbeat.frames_stale = self->frames_stale;
    bias_table_beat(&self->bias, &heartbeat, out);
    fill_loads(self, &heartbeat, out);
    fill_answers(self, &heartbeat, out);
    audit_fill_heartbeat(self, &heartbeat, out);
    member_heartbeat(&self->member, &heartbeat, now_ns, out);
}

/* ---- events ---- */

static bool is_gateway(const struct attention *self, actor_id id) {
    const struct peer *peer = member_peer(&self->member, id);
    return peer != NULL && (peer->role == ROLE_GATEWAY || peer->role == ROLE_CONTROL);
}

/* A restarted coordinator may give an id again that it never learnt of: the life counts as well. */
static bool is_orphan(const struct attention *self, const struct sequence *sequence) {
    const struct peer *peer = member_peer(&self->member, sequence->gateway);
    return !is_gateway(self, sequence->gateway) ||
           peer->incarnation != sequence->gateway_incarnation;
}

static void drop_orphans_of(struct attention *self, const struct sequence *sequence) {
    if (is_orphan(self, sequence))
        attention_cancel_gateway(self, sequence->gateway);
}

/* Sequences whose gateway has left the epoch. Cancelling changes the lists, so each is looked
 * through from the start again; every round removes at least one gateway. */
static void drop_orphans(struct attention *self) {
    struct sequence_list *lists[] = {&self->waiting, &self->done};
    for (size_t i = 0; i < sizeof lists / sizeof *lists; i++) {
        struct sequence *sequence = lists[i]->first;
        while (sequence != NULL) {
            bool orphan = is_orphan(self, sequence);
            drop_orphans_of(self, sequence);
            sequence = orphan ? lists[i]->first : sequence->next;
        }
    }
    for (uint32_t i = 0; i < self->settings.max_sequences; i++)
        if (self->running[i] != NULL && !self->running[i]->cancelled)
            drop_orphans_of(self, self->running[i]);
}

/* Versions of the routing bias; what is held is told at once, as others wait for it. */
static void on_bias(struct attention *self, const message *envelope, uint64_t now_ns,
                    struct effects *out) {
    if (bias_table_on_message(&self->bias, envelope, out) && envelope->from == ACTOR_COORDINATOR)
        send_heartbeat(self, now_ns, out);
}

static bool is_bias(const struct attention *self, const message *envelope) {
    bool coordinator = envelope->from == ACTOR_COORDINATOR;
    return (envelope->body_case == TROUPE__ENVELOPE__BODY_BIAS &&
            (coordinator || is_gateway(self, envelope->from))) ||
           (envelope->body_case == TROUPE__ENVELOPE__BODY_BIAS_RELEASE && coordinator);
}

static void on_message(struct attention *self, const message *envelope, uint64_t now_ns,
                       struct effects *out) {
    if (is_bias(self, envelope)) {
        on_bias(self, envelope, now_ns, out);
        return;
    }
    if (!is_gateway(self, envelope->from)) {
        effects_trace(out, TRACE_WARNING, "ignored a request of actor %u, which is no gateway",
                      envelope->from);
        return;
    }
    switch (envelope->body_case) {
    case TROUPE__ENVELOPE__BODY_SUBMIT:
        attention_on_submit(self, envelope, out);
        break;
    case TROUPE__ENVELOPE__BODY_POLL:
        attention_on_poll(self, envelope, out);
        break;
    case TROUPE__ENVELOPE__BODY_CANCEL:
        attention_on_cancel(self, envelope);
        break;
    default:
        effects_trace(out, TRACE_WARNING, "ignored a message of kind %d from actor %u",
                      envelope->body_case, envelope->from);
        break;
    }
}

static void on_frame(struct attention *self, const struct frame *frame, uint64_t now_ns,
                     struct effects *out) {
    switch (frame->header->kind) {
    case FRAME_COMBINE:
        dispatch_on_combine(self, frame, now_ns, out);
        break;
    case FRAME_MOVED:
        dispatch_on_moved(self, frame->header, now_ns, out);
        break;
    case FRAME_SAMPLED:
        sample_on_sampled(self, frame, now_ns, out);
        break;
    default:
        effects_trace(out, TRACE_WARNING, "ignored a frame of kind %u from actor %u",
                      frame->header->kind, frame->header->from);
        break;
    }
}

static void on_computed(struct attention *self, const struct program_result *result,
                        uint64_t now_ns, struct effects *out) {
    if (result->error < 0) {
        effects_trace(out, TRACE_ERROR, "a program of kind %d failed: %s", result->kind,
                      error_name(result->error));
        struct effect *effect = effects_add(out, EFFECT_EXIT);
        effect->exit.code = 1;
        effect->exit.reason = "a program failed";
        self->failed = true;
        return;
    }
    step_trace_computed(self, result);
    batch_computed(self, result, now_ns, out);
}

/* Gateways look for the sequences of somebody who is gone elsewhere, and tell nobody to forget them. */
static void drop_everybody(struct attention *self) {
    while (self->waiting.first != NULL)
        attention_cancel_gateway(self, self->waiting.first->gateway);
    while (self->done.first != NULL)
        attention_cancel_gateway(self, self->done.first->gateway);
    for (uint32_t i = 0; i < self->settings.max_sequences; i++)
        if (self->running[i] != NULL && !self->running[i]->cancelled)
            attention_cancel_gateway(self, self->running[i]->gateway);
}

static void on_news(struct attention *self, uint32_t news, const struct event *event,
                    uint64_t now_ns, struct effects *out) {
    if ((news & MEMBER_RENAMED) != 0)
        drop_everybody(self);
    if ((news & MEMBER_COMMITTED) != 0) {
        drop_orphans(self);
        dispatch_adopt(self, event->message->commit, now_ns, out);
        sample_adopt(self, now_ns, out);
    }
    if ((news & MEMBER_LOST) != 0) {
        if (is_gateway(self, event->peer.id))
            attention_cancel_gateway(self, event->peer.id);
        dispatch_peer_lost(self, event->peer.id, now_ns, out);
        sample_peer_lost(self, event->peer.id, now_ns, out);
    }
}

static void attention_step(struct actor *actor, const struct event *event, uint64_t now_ns,
                           struct effects *out) {
    struct attention *self = (struct attention *)actor;
    if (self->failed)
        return;
    self->now_ns = now_ns;
    uint32_t news = member_step(&self->member, event, now_ns, out);
    if ((news & MEMBER_EXIT) != 0)
        return;
    on_news(self, news, event, now_ns, out);
    if ((news & (MEMBER_DONE | MEMBER_COMMITTED)) == 0) {
        if (event->kind == EVENT_MESSAGE)
            on_message(self, event->message, now_ns, out);
        else if (event->kind == EVENT_FRAME)
            on_frame(self, event->frame, now_ns, out);
        else if (event->kind == EVENT_COMPUTED)
            on_computed(self, event->computed, now_ns, out);
    }
    if (self->failed)
        return;
    dispatch_timer(self, now_ns, out);
    sample_timer(self, now_ns, out);
    if (self->member.draining && self->batch.phase == BATCH_IDLE)
        attention_hand_over(self, now_ns, out);
    batch_start(self, now_ns, out);
    if ((news & MEMBER_HEARTBEAT) != 0)
        send_heartbeat(self, now_ns, out);
}

static uint64_t attention_deadline(const struct actor *actor) {
    const struct attention *self = (const struct attention *)actor;
    const struct batch *batch = &self->batch;
    if (self->failed)
        return NEVER;
    uint64_t deadline = member_deadline(&self->member), parts = NEVER;
    if (batch->phase == BATCH_EXPERTS) {
        uint64_t audit = audit_deadline(self);
        parts = parts_deadline(batch->flight.part, batch->flight.parts);
        parts = audit < parts ? audit : parts;
    } else if (batch->phase == BATCH_SAMPLERS) {
        parts = parts_deadline(batch->sample_part, batch->sample_parts);
    }
    return self->member.exited || deadline < parts ? deadline : parts;
}

static const char *describe_most(struct actor *actor) {
    struct attention *self = (struct attention *)actor;
    const char *broken = pages_broken(self);
    snprintf(
        self->description, sizeof self->description,
        "sequences=%u waiting=%u running=%u done=%u pages=%u/%u batch=%llu phase=%d resent=%llu "
        "stale=%llu hedged=%llu cached=%u hits=%llu drafted=%llu accepted=%llu audited=%llu "
        "differed=%llu alone=%llu bias=%u bias_users=%u%s%s",
        self->waiting.count + self->runnings + self->done.count, self->waiting.count,
        self->runnings, self->done.count, self->pages.total - pages_available(&self->pages),
        self->pages.total,
        (unsigned long long)self->last_batch, self->batch.phase,
        (unsigned long long)self->frames_resent, (unsigned long long)self->frames_stale,
        (unsigned long long)self->frames_hedged, self->pages.idle,
        (unsigned long long)self->prefix_hits, (unsigned long long)self->draft_tokens_total,
        (unsigned long long)self->accepted_total, (unsigned long long)self->audit.rows,
        (unsigned long long)self->audit.differed, (unsigned long long)self->audit.alone,
        self->bias.count, bias_table_users(&self->bias),
        broken != NULL ? " broken: " : "", broken != NULL ? broken : "");
    return self->description;
}

static const char *attention_describe(struct actor *actor) {
    struct attention *self = (struct attention *)actor;
    size_t used = strlen(describe_most(actor));
    snprintf(self->description + used, sizeof self->description - used, " preempted=%llu",
             (unsigned long long)self->preemptions);
    return self->description;
}

/* ---- life ---- */

static void attention_destroy(struct actor *actor) {
    struct attention *self = (struct attention *)actor;
    if (self->hash != NULL)
        attention_drop_all(self);
    bias_table_free(&self->bias);
    batch_free(self);
    pages_free(self);
    audit_free(self);
    free(self->hash);
    free(self->running);
    free(self->placement_first);
    free(self->placement_holder);
    free(self->destination);
    free(self->former);
    free(self->alive);
    free(self->queued);
    free(self->cost);
    free(self->load);
    step_trace_free(self);
    member_free(&self->member);
    free(self);
}

static const struct actor_class ATTENTION_CLASS = {
    .role = ROLE_ATTENTION,
    .step = attention_step,
    .deadline = attention_deadline,
    .destroy = attention_destroy,
    .describe = attention_describe,
};

static uint32_t smaller(uint64_t a, uint64_t b) {
    return (uint32_t)(a < b ? a : b);
}

static void describe_holdings(const struct member *member, Troupe__Hello *hello,
                              struct effects *out) {
    const struct attention *self =
        (const struct attention *)((const char *)member - offsetof(struct attention, member));
    bias_table_hello(&self->bias, hello, out);
}

/* A frame must fit into half a ring and into its own limit, in both directions. */
static uint32_t rows_per_frame(const struct attention *self, uint32_t row_bytes) {
    uint64_t bytes = (uint64_t)self->settings.ring_kib * 1024 / 2;
    if (bytes > FRAME_PAYLOAD_MAX)
        bytes = FRAME_PAYLOAD_MAX;
    uint64_t rows = bytes / (row_bytes + 64);
    rows = rows < self->settings.frame_rows ? rows : self->settings.frame_rows;
    return rows < 1 ? 1 : smaller(rows, FRAME_ROWS_MAX);
}

/* Each row of a batch goes to a process once, with all the experts that it holds: experts answer in
 * pieces. */
static uint32_t dispatch_items_max(const struct attention *self) {
    uint64_t bytes = (uint64_t)self->settings.ring_kib * 1024 / 2;
    const uint64_t row = self->config.hidden * self->activation_bytes,
                   item = sizeof(uint32_t) + sizeof(struct frame_group);
    if (bytes > FRAME_PAYLOAD_MAX)
        bytes = FRAME_PAYLOAD_MAX;
    bytes = bytes > 1024 ? bytes - 1024 : 0;
    const uint64_t rows = self->settings.batch_tokens;
    uint64_t items = rows * row < bytes ? (bytes - rows * row) / item : 0;
    if (items < rows) /* not all rows of a batch fit into a frame */
        items = bytes / (row + item);
    items = items > self->piece_items_max ? items : self->piece_items_max;
    return smaller(items, FRAME_ITEMS_MAX);
}

static bool allocate(struct attention *self) {
    const struct settings *settings = &self->settings;
    size_t entries = (size_t)self->config.layers * self->config.experts;
    uint32_t known = settings->max_sequences + settings->max_waiting + self->done_max;
    self->hash_size = 1;
    while (self->hash_size < known)
        self->hash_size *= 2;
    self->hash = calloc(self->hash_size, sizeof(*self->hash));
    self->running = calloc(settings->max_sequences, sizeof(*self->running));
    self->placement_first = calloc(entries + 1, sizeof *self->placement_first);
    self->load = calloc(entries + 1, sizeof *self->load);
    return self->hash != NULL && self->running != NULL &&
           self->placement_first != NULL && self->load != NULL && pages_init(self) &&
           step_trace_init(self) && batch_init(self) && audit_init(self);
}

struct actor *attention_create(const struct actor_identity *identity,
                               const struct settings *settings, const struct model_config *config) {
    struct attention *self = calloc(1, sizeof *self);
    if (self == NULL)
        return NULL;
    self->actor.class = &ATTENTION_CLASS;
    self->settings = *settings;
    self->config = *config;
    self->config.eos_count = 0; /* only those that can be drawn */
    for (uint32_t i = 0; i < config->eos_count; i++)
        if (config->eos[i] >= 0 && (uint32_t)config->eos[i] < config->vocabulary)
            self->config.eos[self->config.eos_count++] = config->eos[i];
    self->context = config->context;
    if (settings->context_tokens > 0)
        self->context = smaller(settings->context_tokens, config->context);
    self->k = config->experts > 0 ? config->gate.k : 0;
    self->done_max = settings->max_sequences + settings->max_waiting;
    self->row_deadline_ns = (uint64_t)settings->row_deadline_ms * 1000000u;
    bool made = member_init(&self->member, identity, settings, 0,
                            ROLE_BIT(ROLE_GATEWAY) | ROLE_BIT(ROLE_CONTROL),
                            ROLE_BIT(ROLE_EXPERT) | ROLE_BIT(ROLE_SAMPLER)) &&
                allocate(self);
    if (!made) {
        attention_destroy(&self->actor);
        return NULL;
    }
    self->member.describe_holdings = describe_holdings;
    bias_table_init(&self->bias, config->layers * config->experts);
    self->activation_bytes = identity_activation_bytes(&self->member.identity);
    self->rows_e4m3 = settings->dispatch_fp8 != 0 && config->experts_e4m3 &&
                      identity_is_fp8(&self->member.identity);
    self->piece_items_max = rows_per_frame(self, config->hidden * (uint32_t)sizeof(float));
    self->part_items_max = dispatch_items_max(self);
    self->sample_rows_max = rows_per_frame(self, config->hidden * self->activation_bytes);
    self->placement =
        (struct placement){config->layers, config->experts, self->placement_first, NULL};
    return &self->actor;
}
