/* What gateways are told: one TokensBatch per gateway and step, cut only where a message would grow
 * too large; answers to Poll; refusals. Everything told is kept until Cancel, so it can be told
 * again. */
#include "actors/attention.h"

#include <string.h>

#define MESSAGE_BYTES_SOFT                                                                         \
    ((size_t)4 << 20) /* a batch message is sent once it has reached this                          \
                       */
#define LIST_MAX 512u

/* A message being filled; everything in it lies in the effects' arena. */
struct report {
    struct attention *self;
    struct effects *out;
    actor_id to;
    Troupe__Tokens **list; /* [LIST_MAX] */
    uint32_t count;
    size_t bytes;
};

static void flush(struct report *report) {
    if (report->count == 0)
        return;
    Troupe__TokensBatch batch = TROUPE__TOKENS_BATCH__INIT;
    batch.n_tokens = report->count;
    batch.tokens = report->list;
    message envelope = member_envelope(&report->self->member);
    envelope.body_case = TROUPE__ENVELOPE__BODY_TOKENS;
    envelope.tokens = &batch;
    effects_send(report->out, report->to, &envelope);
    report->count = 0;
    report->bytes = 0;
}

static Troupe__Tokens *add(struct report *report, const struct sequence *sequence) {
    if (report->count == LIST_MAX || report->bytes >= MESSAGE_BYTES_SOFT)
        flush(report);
    Troupe__Tokens *tokens = effects_alloc(report->out, sizeof *tokens);
    troupe__tokens__init(tokens);
    tokens->sequence = sequence->id;
    tokens->cached_tokens = sequence->cached_tokens;
    tokens->accepted_drafts = sequence->accepted_drafts;
    tokens->rejected_drafts = sequence->rejected_drafts;
    report->list[report->count++] = tokens;
    report->bytes += 32;
    return tokens;
}

static Troupe__Token *make_token(struct report *report, uint32_t id, const struct entry *entry,
                                 const struct top_entry *top) {
    Troupe__Token *token = effects_alloc(report->out, sizeof *token);
    troupe__token__init(token);
    token->id = id;
    report->bytes += 16;
    if (entry == NULL)
        return token;
    token->logprob = entry->logprob;
    token->rank = entry->rank;
    token->n_top = entry->top;
    token->top = effects_alloc(report->out, entry->top * sizeof *token->top);
    Troupe__TopLogprob *tops = effects_alloc(report->out, entry->top * sizeof *tops);
    for (uint32_t i = 0; i < entry->top; i++) {
        troupe__top_logprob__init(&tops[i]);
        tops[i].token = top[i].token;
        tops[i].logprob = top[i].logprob;
        token->top[i] = &tops[i];
    }
    report->bytes += entry->top * (size_t)12;
    return token;
}

/* Prompt entries from `first`, as many as one message takes; returns where to go on. */
static uint32_t add_prompt(struct report *report, const struct sequence *sequence,
                           Troupe__Tokens *tokens, uint32_t first) {
    const struct attention *self = report->self;
    uint32_t at = first, end = sequence->prompt_complete;
    tokens->prompt = effects_alloc(report->out, (end - first) * sizeof *tokens->prompt);
    for (; at < end && report->bytes < MESSAGE_BYTES_SOFT; at++) {
        const struct entry *entry = &sequence->prompt_entry[at];
        Troupe__Token *token = make_token(
            report, entry->id, entry, sequence->prompt_top + (size_t)at * sequence->top_logprobs);
        if (sequence->full_logits) {
            token->n_logits = self->config.vocabulary;
            token->logits = sequence->prompt_logits + (size_t)at * self->config.vocabulary;
            report->bytes += token->n_logits * sizeof(float);
        }
        tokens->prompt[at - first] = token;
    }
    tokens->prompt_first = first;
    tokens->n_prompt = at - first;
    return at;
}

static uint32_t generated(const struct sequence *sequence) {
    return sequence->tokens - sequence->prompt_tokens;
}

static uint32_t add_tokens(struct report *report, const struct sequence *sequence,
                           Troupe__Tokens *tokens, uint32_t first) {
    uint32_t given = sequence->given_tokens - sequence->prompt_tokens;
    uint32_t at = first, end = generated(sequence);
    tokens->token = effects_alloc(report->out, (end - first) * sizeof *tokens->token);
    for (; at < end && report->bytes < MESSAGE_BYTES_SOFT; at++) {
        bool known = sequence->entry != NULL && at >= given;
        tokens->token[at - first] = make_token(
            report, sequence->token[sequence->prompt_tokens + at],
            known ? &sequence->entry[at - given] : NULL,
            known ? sequence->entry_top + (size_t)(at - given) * sequence->top_logprobs : NULL);
    }
    tokens->first = first;
    tokens->n_token = at - first;
    return at;
}

/* All that follows `first_token` and `first_prompt`, in as many messages as it takes; at least one
 * entry. The end of the sequence is told with its last tokens, after all its prompt entries. */
static void add_sequence(struct report *report, struct sequence *sequence, uint32_t first_token,
                         uint32_t first_prompt, bool again) {
    if (first_token > generated(sequence))
        first_token = generated(sequence);
    if (first_prompt > sequence->prompt_complete)
        first_prompt = sequence->prompt_complete;
    bool finished = sequence->finish != TROUPE__FINISH_REASON__FINISH_NONE;
    for (;;) {
        Troupe__Tokens *tokens = add(report, sequence);
        first_prompt = add_prompt(report, sequence, tokens, first_prompt);
        first_token = add_tokens(report, sequence, tokens, first_token);
        if (tokens->n_token > 0 &&
            tokens->first + sequence->prompt_tokens == sequence->given_tokens)
            tokens->queue_ns = sequence->begun_ns - sequence->submitted_ns;
        if (first_prompt < sequence->prompt_complete || first_token < generated(sequence))
            continue;
        if (sequence->trace != NULL && !again)
            tokens->trace = step_trace_tell(report->self, sequence, report->out);
        if (finished) {
            tokens->finish = sequence->finish;
            tokens->stop_token = sequence->stopped_by;
            tokens->error = (char *)sequence->error;
        }
        return;
    }
}

static void begin(struct report *report, struct attention *self, actor_id to, struct effects *out) {
    *report = (struct report){.self = self, .out = out, .to = to};
    report->list = effects_alloc(out, LIST_MAX * sizeof *report->list);
}

void report_sequence(struct attention *self, struct sequence *sequence, uint32_t first_token,
                     uint32_t first_prompt, struct effects *out) {
    struct report report;
    begin(&report, self, sequence->gateway, out);
    add_sequence(&report, sequence, first_token, first_prompt, true);
    flush(&report);
}

static bool has_news(const struct sequence *sequence) {
    return !sequence->cancelled && (generated(sequence) > sequence->told_tokens ||
                                    sequence->prompt_complete > sequence->told_prompt ||
                                    sequence->finish != TROUPE__FINISH_REASON__FINISH_NONE);
}

void report_batch(struct attention *self, struct effects *out) {
    struct batch *batch = &self->batch;
    for (uint32_t i = 0; i < batch->sequences; i++)
        batch->sequence[i]->reported = !has_news(batch->sequence[i]);
    for (uint32_t i = 0; i < batch->sequences; i++) {
        if (batch->sequence[i]->reported)
            continue;
        struct report report;
        begin(&report, self, batch->sequence[i]->gateway, out);
        for (uint32_t j = i; j < batch->sequences; j++) {
            struct sequence *sequence = batch->sequence[j];
            if (sequence->reported || sequence->gateway != report.to)
                continue;
            add_sequence(&report, sequence, sequence->told_tokens, sequence->told_prompt, false);
            sequence->told_tokens = generated(sequence);
            sequence->told_prompt = sequence->prompt_complete;
            sequence->reported = true;
        }
        flush(&report);
    }
}

static void send_rejected(struct attention *self, actor_id gateway, Troupe__Rejected *rejected,
                          struct effects *out) {
    message envelope = member_envelope(&self->member);
    envelope.body_case = TROUPE__ENVELOPE__BODY_REJECTED;
    envelope.rejected = rejected;
    effects_send(out, gateway, &envelope);
}

void report_rejected(struct attention *self, actor_id gateway, uint64_t sequence, int code,
                     bool unknown, const char *reason, struct effects *out) {
    Troupe__Rejected rejected = TROUPE__REJECTED__INIT;
    rejected.sequence = sequence;
    rejected.code = code;
    rejected.unknown = unknown;
    rejected.reason = (char *)reason;
    send_rejected(self, gateway, &rejected, out);
}

void report_bias_wanted(struct attention *self, actor_id gateway, const Troupe__Submit *submit,
                        struct effects *out) {
    Troupe__Rejected rejected = TROUPE__REJECTED__INIT;
    rejected.sequence = submit->sequence;
    rejected.code = ERR_NOT_FOUND;
    rejected.bias_wanted = submit->bias_version;
    rejected.reason = "the bias version that the request is pinned to is not here";
    send_rejected(self, gateway, &rejected, out);
}
