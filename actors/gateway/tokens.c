/* TOKENS and REJECTED from attention actors. Of tokens only the next one in order is taken: what
 * was here already is dropped, a gap is asked for. So the stream is the same whatever is lost,
 * doubled or overtaken on the way. */
#include "actors/gateway/gateway.h"

/* The choice that this actor, in this incarnation, has been given; NULL if it has no business with
 * the sequence. */
static struct choice *placed(const struct gateway *self, const message *envelope,
                             uint64_t sequence) {
    struct choice *choice = choice_find(self, sequence);
    if (choice == NULL || choice->state != CHOICE_PLACED || choice->actor != envelope->from ||
        choice->incarnation != envelope->from_incarnation)
        return NULL;
    return choice;
}

/* Returns the number of new entries; `gap` is set if some before them are missing. */
static uint32_t take_prompt(struct choice *choice, const Troupe__Tokens *tokens, bool *gap) {
    struct prompt *prompt = choice->prompt;
    uint32_t taken = 0;
    if (!choice->scorer)
        return 0;
    for (size_t i = 0; i < tokens->n_prompt && !prompt_complete(prompt); i++) {
        uint64_t position = (uint64_t)tokens->prompt_first + i;
        if (position > prompt->score.count)
            *gap = true;
        if (position != prompt->score.count)
            continue;
        scored_list_add(&prompt->score, tokens->prompt[i],
                        (uint32_t)choice->request->input.logprobs, 0);
        taken++;
    }
    return taken;
}

static uint32_t take_tokens(struct gateway *self, struct choice *choice,
                            const Troupe__Tokens *tokens, bool *gap) {
    uint32_t taken = 0;
    for (size_t i = 0; i < tokens->n_token && choice->finish == FINISH_NOT; i++) {
        uint64_t index = (uint64_t)tokens->first + i;
        if (index > choice->tokens)
            *gap = true;
        else if (index < choice->tokens)
            self->metrics.counter[METRIC_DUPLICATES]++;
        else {
            choice_accept(self, choice, tokens->token[i]);
            taken++;
        }
    }
    /* An end that the tokens themselves do not show, such as a full cache. */
    if (choice->finish == FINISH_NOT &&
        (uint64_t)tokens->first + tokens->n_token == choice->tokens) {
        if (tokens->finish == TROUPE__FINISH_REASON__FINISH_STOP)
            choice_finish(self, choice, FINISH_AT_STOP);
        else if (tokens->finish == TROUPE__FINISH_REASON__FINISH_LENGTH)
            choice_finish(self, choice, FINISH_AT_LENGTH);
    } else if (choice->finish == FINISH_NOT &&
               tokens->finish != TROUPE__FINISH_REASON__FINISH_NONE) {
        *gap = *gap || (uint64_t)tokens->first + tokens->n_token > choice->tokens;
    }
    return taken;
}

static void count_tokens(struct gateway *self, struct choice *choice, uint32_t taken,
                         uint64_t now_ns) {
    struct metrics *metrics = &self->metrics;
    if (taken == 0)
        return;
    events_token(&self->feed, now_ns);
    metrics->counter[METRIC_TOKENS_GENERATED] += taken;
    if (choice->tokens == taken) {
        metrics->counter[METRIC_TOKENS_PROMPT] += choice->prompt->tokens;
        double ttft_ns = (double)(now_ns - choice->request->arrived_ns);
        metrics_observe(metrics, METRIC_TTFT, ttft_ns * 1e-9);
        events_latency(&self->feed, &self->feed.ttft, ttft_ns * 1e-6);
        choice->first_token_ns = now_ns;
        taken--; /* tokens that came with the first one count as following at once */
        choice->last_token_ns = now_ns;
    }
    double each = taken == 0 ? 0 : (double)(now_ns - choice->last_token_ns) * 1e-9 / taken;
    for (uint32_t i = 0; i < taken; i++) {
        metrics_observe(metrics, METRIC_INTER_TOKEN_LATENCY, each);
        metrics_observe(metrics, METRIC_TIME_PER_TOKEN, each);
        events_latency(&self->feed, &self->feed.tpot, each * 1e3);
    }
    choice->last_token_ns = now_ns;
}

/* Everybody who waited for the prompt's scores shows what there is. True: the request is complete
 * and gone. */
static bool emit_siblings(struct gateway *self, struct choice *choice, uint64_t now_ns,
                          struct effects *out) {
    struct request *request = choice->request;
    uint32_t choices = request->choices;
    for (uint32_t i = 0; i < choices; i++)
        if (request->choice[i] != choice && request->choice[i]->prompt == choice->prompt &&
            request_emit(self, request->choice[i], now_ns, out))
            return true;
    return false;
}

static void take_one(struct gateway *self, const message *envelope, const Troupe__Tokens *tokens,
                     uint64_t now_ns, struct effects *out) {
    struct choice *choice = placed(self, envelope, tokens->sequence);
    if (choice == NULL) {
        upstream_cancel(self, tokens->sequence, envelope->from,
                        envelope->from_incarnation, now_ns, out); /* an earlier CANCEL was lost, or overtaken */
        return;
    }
    choice->request->admitted = true;
    if (tokens->accepted_drafts >= choice->accepted_now &&
        tokens->rejected_drafts >= choice->rejected_now) { /* not an older message */
        choice->accepted_now = tokens->accepted_drafts;
        choice->rejected_now = tokens->rejected_drafts;
    }
    if (!choice->cached_known) { /* what a later one saves after a failure is not the client's */
        uint32_t most = choice->prompt->tokens;
        choice->cached_tokens = tokens->cached_tokens < most ? tokens->cached_tokens : most;
        choice->cached_known = true;
    }
    if (tokens->finish == TROUPE__FINISH_REASON__FINISH_ERROR) {
        struct http_error error;
        http_fail(&error, 500, NULL, "the sequence failed: %s", tokens->error);
        request_fail(self, choice->request, &error, now_ns, out);
        return;
    }
    bool gap = false;
    uint32_t scored = take_prompt(choice, tokens, &gap);
    uint32_t taken = take_tokens(self, choice, tokens, &gap);
    count_tokens(self, choice, taken, now_ns);
    trace_tokens(self, choice, tokens, taken, now_ns);
    if (tokens->finish == TROUPE__FINISH_REASON__FINISH_CANCELLED && choice->finish == FINISH_NOT) {
        upstream_leave(self, choice, true, now_ns,
                       out); /* not by us: its actor gives up, somebody else goes on */
        self->metrics.counter[METRIC_RESUBMITTED]++;
        upstream_place(self, choice, now_ns, out);
        return;
    }
    if (taken > 0 || scored > 0) {
        choice->gap_polled = false;
        choice->deadline_ns = now_ns + self->poll_ns;
    }
    if (choice_complete(choice)) {
        upstream_leave(self, choice, true, now_ns, out);
        choice->state = CHOICE_FINISHED;
    } else if (gap && !choice->gap_polled) {
        upstream_poll(self, choice, now_ns, out);
        choice->gap_polled = true; /* asked once; the answer or the timer comes next */
    }
    bool prompt_done = scored > 0 && prompt_complete(choice->prompt);
    if (prompt_done && emit_siblings(self, choice, now_ns, out))
        return;
    request_emit(self, choice, now_ns, out);
}

void tokens_take(struct gateway *self, const message *envelope, uint64_t now_ns,
                 struct effects *out) {
    const Troupe__TokensBatch *batch = envelope->tokens;
    for (size_t i = 0; i < batch->n_tokens; i++)
        take_one(self, envelope, batch->tokens[i], now_ns, out);
}

static uint16_t status_of(int32_t code) {
    switch (code) {
    case ERR_INVALID:
    case ERR_TOO_LARGE:
    case ERR_UNSUPPORTED:
        return 400;
    case ERR_NO_MEMORY:
        return 503;
    default:
        return 500;
    }
}

void tokens_rejected(struct gateway *self, const message *envelope, uint64_t now_ns,
                     struct effects *out) {
    const Troupe__Rejected *rejected = envelope->rejected;
    struct choice *choice = placed(self, envelope, rejected->sequence);
    if (choice == NULL) {
        upstream_closed(self, rejected->sequence, envelope->from);
        return;
    }
    if (rejected->bias_wanted != 0 && rejected->bias_wanted == choice->request->bias_version) {
        upstream_send_bias(self, choice, now_ns, out);
        return;
    }
    bool busy = rejected->code == ERR_BUSY || rejected->code == ERR_STATE;
    if (!rejected->unknown && !busy) {
        struct http_error error;
        http_fail(&error, status_of(rejected->code), NULL, "%s", rejected->reason);
        error.retry_after_s = error.status == 503 ? 1 : 0;
        request_fail(self, choice->request, &error, now_ns, out);
        return;
    }
    if (busy)
        upstream_busy(self, envelope->from, envelope->from_incarnation, now_ns);
    else
        self->metrics.counter[METRIC_RESUBMITTED]++;
    upstream_leave(self, choice, false, now_ns, out);
    upstream_place(self, choice, now_ns, out);
}
