/* A sampler actor: LM head and draws. Keeps no state of requests: a question carries everything its
 * answer depends on.
 *
 *   SAMPLE frame -> checked -> SAMPLE program -> SAMPLED frame
 *
 * Invariants: 1. nothing unchecked reaches the engine; 2. every answer goes to the incarnation that
 * asked, with its batch, part and attempt. */
#include "actors/actors.h"
#include "actors/member.h"
#include "engine/sample.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define RUNNING_MAX 64u /* frames whose programs have not completed */

struct running {
    struct frame_header header;
    uint64_t tag, since_ns;
};

struct sampler {
    struct actor actor;
    struct member member;
    uint32_t vocabulary, rows_max, row_bytes;
    struct running running[RUNNING_MAX];
    uint32_t first_running, runnings;
    uint64_t last_tag, frames, rows, busy_ns;
    char description[96];
};

/* 0, or why the frame cannot be computed here. */
static int check(const struct sampler *self, const struct frame *frame, struct failure *failure) {
    const struct frame_header *header = frame->header;
    if (member_frame_sender(&self->member, header, ROLE_ATTENTION) == NULL)
        return fail(failure, ERR_STATE, "its sender is unknown or meant another incarnation");
    if (header->row_bytes != self->row_bytes)
        return fail(failure, ERR_INVALID, "rows of %u bytes expected, found %u", self->row_bytes,
                    header->row_bytes);
    if (header->rows < 1 || header->rows > self->rows_max)
        return fail(failure, ERR_TOO_LARGE, "1 to %u rows expected, found %u", self->rows_max,
                    header->rows);
    if (self->runnings == RUNNING_MAX)
        return fail(failure, ERR_BUSY, "%u frames are in work", self->runnings);
    const struct sample_spec *spec = (const struct sample_spec *)frame->payload;
    return sample_check(spec, header->rows, (const uint32_t *)(spec + header->rows), header->items,
                        self->vocabulary, failure);
}

static void on_sample(struct sampler *self, const struct frame *frame, uint64_t now_ns,
                      struct effects *out) {
    const struct frame_header *header = frame->header;
    struct failure failure;
    if (check(self, frame, &failure) < 0) {
        effects_trace(out, TRACE_WARNING, "dropped a sample frame of actor %u: %s", header->from,
                      failure.text);
        return;
    }
    struct running *running =
        &self->running[(self->first_running + self->runnings++) % RUNNING_MAX];
    *running = (struct running){*header, ++self->last_tag, now_ns};
    const struct sample_spec *spec = (const struct sample_spec *)frame->payload;
    struct effect *effect = effects_add(out, EFFECT_COMPUTE);
    effect->compute = (struct program){
        .kind = PROGRAM_SAMPLE,
        .rows = header->rows,
        .spec = spec,
        .words = (const uint32_t *)(spec + header->rows),
        .words_count = header->items,
        .payload = frame_rows(frame),
        .tag = running->tag,
    };
}

static void on_computed(struct sampler *self, const struct program_result *result, uint64_t now_ns,
                        struct effects *out) {
    struct running *running = &self->running[self->first_running];
    if (self->runnings == 0 || running->tag != result->tag)
        return;
    self->first_running = (self->first_running + 1) % RUNNING_MAX;
    self->runnings--;
    if (result->error < 0) { /* the sender asks again, or another sampler */
        effects_trace(out, TRACE_ERROR, "sampling %u rows failed: %s", running->header.rows,
                      error_name(result->error));
        return;
    }
    self->frames++;
    self->rows += running->header.rows;
    self->busy_ns += now_ns - running->since_ns;
    const struct frame_header *question = &running->header;
    size_t result_bytes = question->rows * sizeof *result->sampled;
    size_t word_bytes = result->words_count * sizeof *result->words;
    uint8_t *prefix = effects_alloc(out, result_bytes + word_bytes);
    memcpy(prefix, result->sampled, result_bytes);
    if (word_bytes > 0)
        memcpy(prefix + result_bytes, result->words, word_bytes);
    struct effect *effect = effects_add(out, EFFECT_TRANSFER);
    effect->transfer.header = (struct frame_header){
        .kind = FRAME_SAMPLED,
        .from = self->member.id,
        .to = question->from,
        .from_incarnation = self->member.identity.incarnation,
        .to_incarnation = question->from_incarnation,
        .epoch = question->epoch,
        .batch = question->batch,
        .layer = question->layer,
        .attempt = question->attempt,
        .part = question->part,
        .rows = question->rows,
        .items = result->words_count,
    };
    effect->transfer.prefix = prefix;
    effect->transfer.prefix_bytes = result_bytes + word_bytes;
}

/* ---- events ---- */

static void send_heartbeat(struct sampler *self, uint64_t now_ns, struct effects *out) {
    Troupe__Heartbeat heartbeat = TROUPE__HEARTBEAT__INIT;
    heartbeat.state = self->member.draining ? TROUPE__ACTOR_STATE__STATE_DRAINING
                                            : TROUPE__ACTOR_STATE__STATE_READY;
    heartbeat.frames = self->frames;
    heartbeat.rows = self->rows;
    heartbeat.busy_ns = self->busy_ns;
    member_heartbeat(&self->member, &heartbeat, now_ns, out);
}

static void sampler_step(struct actor *actor, const struct event *event, uint64_t now_ns,
                         struct effects *out) {
    struct sampler *self = (struct sampler *)actor;
    uint32_t news = member_step(&self->member, event, now_ns, out);
    if ((news & MEMBER_EXIT) != 0)
        return;
    if ((news & (MEMBER_DONE | MEMBER_COMMITTED)) == 0) {
        if (event->kind == EVENT_MESSAGE)
            effects_trace(out, TRACE_WARNING, "ignored a message of kind %d from actor %u",
                          event->message->body_case, event->message->from);
        else if (event->kind == EVENT_FRAME && event->frame->header->kind == FRAME_SAMPLE)
            on_sample(self, event->frame, now_ns, out);
        else if (event->kind == EVENT_COMPUTED)
            on_computed(self, event->computed, now_ns, out);
    }
    if ((news & MEMBER_HEARTBEAT) != 0)
        send_heartbeat(self, now_ns, out);
}

static uint64_t sampler_deadline(const struct actor *actor) {
    return member_deadline(&((const struct sampler *)actor)->member);
}

static const char *sampler_describe(struct actor *actor) {
    struct sampler *self = (struct sampler *)actor;
    snprintf(self->description, sizeof self->description, "running=%u frames=%llu rows=%llu",
             self->runnings, (unsigned long long)self->frames, (unsigned long long)self->rows);
    return self->description;
}

static void sampler_destroy(struct actor *actor) {
    struct sampler *self = (struct sampler *)actor;
    member_free(&self->member);
    free(self);
}

static const struct actor_class SAMPLER_CLASS = {
    .role = ROLE_SAMPLER,
    .step = sampler_step,
    .deadline = sampler_deadline,
    .destroy = sampler_destroy,
    .describe = sampler_describe,
};

struct actor *sampler_create(const struct actor_identity *identity, const struct settings *settings,
                             const struct model_config *config) {
    struct sampler *self = calloc(1, sizeof *self);
    if (self == NULL)
        return NULL;
    self->actor.class = &SAMPLER_CLASS;
    self->vocabulary = config->vocabulary;
    self->rows_max = settings->batch_tokens;
    if (!member_init(&self->member, identity, settings, 0, 0, ROLE_BIT(ROLE_ATTENTION))) {
        sampler_destroy(&self->actor);
        return NULL;
    }
    self->row_bytes = config->hidden * identity_activation_bytes(&self->member.identity);
    return &self->actor;
}
