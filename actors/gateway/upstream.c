/* Choices and the attention actors that run them: who is chosen, SUBMIT, POLL, CANCEL, and what
 * happens when an actor is gone.
 *
 * Any control message may be lost, late or doubled. SUBMIT carries the whole history and is
 * idempotent; a silence of poll_ms is answered with POLL; an actor that does not know the sequence
 * says so and gets the SUBMIT again. CANCEL has no answer of its own: the sequence is kept as
 * `closing` until a POLL is answered by "unknown". So whatever is lost, a sequence is run until it
 * is complete and forgotten afterwards. */
#include <float.h>
#include <string.h>

#include "actors/gateway/gateway.h"

static void wake(struct gateway *self, uint64_t deadline_ns) {
    if (deadline_ns < self->wake_ns)
        self->wake_ns = deadline_ns;
}

static void set_deadline(struct gateway *self, struct choice *choice, uint64_t deadline_ns) {
    choice->deadline_ns = deadline_ns;
    wake(self, deadline_ns);
}

static struct upstream *find(struct gateway *self, actor_id id, uint64_t incarnation) {
    for (uint32_t i = 0; i < self->upstreams; i++)
        if (self->upstream[i].id == id && self->upstream[i].incarnation == incarnation)
            return &self->upstream[i];
    return NULL;
}

static struct upstream *find_or_add(struct gateway *self, actor_id id, uint64_t incarnation) {
    struct upstream *known = find(self, id, incarnation);
    if (known != NULL)
        return known;
    self->upstream = gateway_grow(self->upstream, &self->upstreams_capacity, self->upstreams + 1,
                                  sizeof *self->upstream);
    struct upstream *added = &self->upstream[self->upstreams++];
    *added = (struct upstream){.id = id, .incarnation = incarnation};
    return added;
}

void upstream_busy(struct gateway *self, actor_id actor, uint64_t incarnation, uint64_t now_ns) {
    find_or_add(self, actor, incarnation)->busy_until_ns = now_ns + self->retry_ns;
}

/* What a choice would wait for there: the tokens placed there, less those of its own prompt that are
 * likely to be in the prefix cache. */
static int64_t cost(const struct gateway *self, const struct upstream *use) {
    return (int64_t)use->outstanding - (int64_t)affinity_tokens(self, use);
}

/* Is `a` the better choice? Not lost before lost, not busy before busy, then the lower cost, then the
 * lowest id. */
static bool better(const struct gateway *self, const struct peer *a, const struct upstream *a_use,
                   const struct peer *b, const struct upstream *b_use, uint64_t now_ns) {
    if (a->lost != b->lost)
        return b->lost;
    bool a_busy = a_use->busy_until_ns > now_ns, b_busy = b_use->busy_until_ns > now_ns;
    if (a_busy != b_busy)
        return b_busy;
    return cost(self, a_use) < cost(self, b_use);
}

static struct upstream *choose(struct gateway *self, const struct choice *choice, uint64_t now_ns) {
    const struct peer *best = NULL;
    affinity_look(self, choice);
    for (uint32_t i = 0; i < self->member.peers; i++) {
        const struct peer *peer = &self->member.peer[i];
        if (peer->role != ROLE_ATTENTION || peer->state != TROUPE__ACTOR_STATE__STATE_READY)
            continue;
        struct upstream *use = find_or_add(self, peer->id, peer->incarnation);
        if (best == NULL ||
            better(self, peer, use, best, find(self, best->id, best->incarnation), now_ns))
            best = peer;
    }
    return best == NULL ? NULL : find(self, best->id, best->incarnation);
}

static float positive(double value) {
    float ret = (float)value;
    return ret > 0 ? ret : FLT_MIN; /* a tiny number must not become the zero that means "off" */
}

static void fill_sampling(Troupe__Sampling *sampling, const struct choice *choice) {
    const struct generation_request *input = &choice->request->input;
    sampling->temperature = (float)input->temperature;
    sampling->top_p = positive(input->top_p);
    sampling->top_k = (int32_t)input->top_k;
    sampling->min_p = (float)input->min_p;
    sampling->repetition_penalty = positive(input->repetition_penalty);
    sampling->presence_penalty = (float)input->presence_penalty;
    sampling->frequency_penalty = (float)input->frequency_penalty;
    sampling->seed = choice->seed;
    sampling->n_bias_token = sampling->n_bias_value = input->biases;
    sampling->bias_token = input->bias_token;
    sampling->bias_value = input->bias_value;
    sampling->logprobs = input->logprobs != ABSENT;
    sampling->top_logprobs = input->logprobs == ABSENT ? 0 : (uint32_t)input->logprobs;
}

static void send_submit(struct gateway *self, const struct choice *choice, struct effects *out) {
    const struct generation_request *input = &choice->request->input;
    const struct prompt *prompt = choice->prompt;
    size_t tokens = (size_t)prompt->tokens + choice->tokens;
    Troupe__Sampling sampling = TROUPE__SAMPLING__INIT;
    fill_sampling(&sampling, choice);
    Troupe__Submit submit = TROUPE__SUBMIT__INIT;
    submit.sequence = choice->id;
    submit.n_token = tokens;
    submit.token = effects_alloc(out, tokens * sizeof *submit.token);
    memcpy(submit.token, prompt->token, prompt->tokens * sizeof *submit.token);
    if (choice->tokens > 0)
        memcpy(submit.token + prompt->tokens, choice->token, choice->tokens * sizeof *submit.token);
    submit.prompt_tokens = prompt->tokens;
    submit.attention_incarnation = choice->incarnation;
    submit.max_tokens = prompt->max_tokens;
    submit.min_tokens = (uint32_t)input->min_tokens;
    submit.ignore_eos = input->ignore_eos;
    uint32_t stop_token[STOP_TOKENS_MAX];
    memcpy(stop_token, input->stop_token, sizeof stop_token);
    submit.n_stop_token = input->stop_tokens;
    submit.stop_token = stop_token;
    /* The tokenizer's eos need not be among those of the model's config, which the attention actor
     * knows. */
    if (!input->ignore_eos && tokenizer_eos(self->tokenizer) >= 0 &&
        submit.n_stop_token < STOP_TOKENS_MAX)
        stop_token[submit.n_stop_token++] = (uint32_t)tokenizer_eos(self->tokenizer);
    submit.sampling = &sampling;
    submit.prompt_logprobs = choice->scorer && !prompt_complete(prompt);
    submit.bias_version = choice->request->bias_version;
    submit.priority = (int32_t)input->priority;
    submit.trace = choice->request->trace != NULL && choice->request->trace->detailed;
    message envelope = member_envelope(&self->member);
    envelope.body_case = TROUPE__ENVELOPE__BODY_SUBMIT;
    envelope.submit = &submit;
    effects_send(out, choice->actor, &envelope);
    self->metrics.counter[METRIC_SUBMITTED]++;
}

static bool wait_longer(struct gateway *self, struct choice *choice, uint64_t now_ns,
                        uint64_t until_ns, struct effects *out) {
    uint64_t last_ns = choice->waiting_since_ns + self->submit_timeout_ns;
    bool admitted = choice->request->admitted || choice->request->begun;
    if (admitted) /* is answered, however long it takes */
        last_ns = NEVER;
    if (now_ns >= last_ns) {
        struct http_error error;
        http_fail(&error, 503, NULL, "no attention actor could take the request within %u ms%s",
                  self->settings.submit_timeout_ms,
                  self->member.serving ? "" : ": the cluster is not serving");
        error.retry_after_s = 1;
        request_fail(self, choice->request, &error, now_ns, out);
        return false;
    }
    set_deadline(self, choice, until_ns < last_ns ? until_ns : last_ns);
    return true;
}

/* ---- versions of the routing bias ---- */

/* The first time that somebody could run it, a request is pinned to the version of that time, or to the one that it goes on with: its
 * tokens follow from it, whoever computes them how often. False: this gateway does not hold that version. */
static bool pin(struct gateway *self, struct request *request) {
    if (request->pinned)
        return true;
    uint64_t id = request->names_version ? request->bias_version : self->member.bias_version;
    struct bias_version *version = bias_table_find(&self->bias, id);
    if (version == NULL && id != 0)
        return false;
    if (version != NULL)
        version->users++;
    request->bias_version = id;
    request->pinned = true;
    return true;
}

void upstream_unpin(struct gateway *self, struct request *request) {
    struct bias_version *version = bias_table_find(&self->bias, request->bias_version);
    if (request->pinned && version != NULL)
        version->users--;
    request->pinned = false;
}

/* A gateway that serves holds every version that still exists. */
static void refuse_to_go_on(struct gateway *self, struct request *request, uint64_t now_ns,
                            struct effects *out) {
    struct http_error error;
    char name[BIAS_NAME_BYTES];
    bias_name(name, request->bias_version);
    http_fail(&error, 410, NULL,
              "the routing bias that this stream began with (version %s) does not exist any more: send the request "
              "without Last-Event-ID", name);
    request_fail(self, request, &error, now_ns, out);
}

void upstream_send_bias(struct gateway *self, struct choice *choice, uint64_t now_ns,
                        struct effects *out) {
    const struct bias_version *version = bias_table_find(&self->bias, choice->request->bias_version);
    ASSERT(choice->state == CHOICE_PLACED && version != NULL);
    Troupe__Bias bias;
    bias_fill(&bias, version, self->bias.entries);
    message envelope = member_envelope(&self->member);
    envelope.body_case = TROUPE__ENVELOPE__BODY_BIAS;
    envelope.bias = &bias;
    effects_send(out, choice->actor, &envelope);
    send_submit(self, choice, out);
    set_deadline(self, choice, now_ns + self->poll_ns);
}

static void forget_closing(struct gateway *self, uint32_t index) {
    self->closing[index] = self->closing[--self->closings];
}

void upstream_closed(struct gateway *self, uint64_t sequence, actor_id actor) {
    for (uint32_t i = 0; i < self->closings; i++)
        if (self->closing[i].sequence == sequence && self->closing[i].actor == actor) {
            forget_closing(self, i);
            return;
        }
}

bool upstream_place(struct gateway *self, struct choice *choice, uint64_t now_ns,
                    struct effects *out) {
    ASSERT(choice->state == CHOICE_WAITING);
    struct upstream *upstream = self->member.serving ? choose(self, choice, now_ns) : NULL;
    if (upstream == NULL)
        return wait_longer(self, choice, now_ns, NEVER, out);
    struct request *request = choice->request;
    if (upstream->busy_until_ns > now_ns) {
        if (request->admitted || request->begun) /* what has been admitted is never refused */
            return wait_longer(self, choice, now_ns, upstream->busy_until_ns, out);
        struct http_error error;
        http_fail(&error, 429, NULL, "all attention actors are full; try again later");
        error.retry_after_s = 1;
        request_fail(self, request, &error, now_ns, out);
        return false;
    }
    if (!pin(self, request)) {
        if (!request->names_version) /* the coordinator sends it */
            return wait_longer(self, choice, now_ns, now_ns + self->retry_ns, out);
        refuse_to_go_on(self, request, now_ns, out);
        return false;
    }
    choice->state = CHOICE_PLACED;
    choice->actor = upstream->id;
    choice->incarnation = upstream->incarnation;
    choice->gap_polled = false;
    choice->load = choice->prompt->tokens + choice->tokens;
    upstream->outstanding += choice->load;
    affinity_note(self, upstream);
    upstream_closed(self, choice->id, choice->actor); /* it is wanted there again */
    trace_placed(choice, now_ns);
    send_submit(self, choice, out);
    set_deadline(self, choice, now_ns + self->poll_ns);
    return true;
}

static void send_cancel(const struct gateway *self, uint64_t sequence, actor_id actor,
                        struct effects *out) {
    Troupe__Cancel cancel = TROUPE__CANCEL__INIT;
    cancel.sequence = sequence;
    message envelope = member_envelope(&self->member);
    envelope.body_case = TROUPE__ENVELOPE__BODY_CANCEL;
    envelope.cancel = &cancel;
    effects_send(out, actor, &envelope);
}

static bool is_peer(const struct gateway *self, actor_id actor, uint64_t incarnation) {
    const struct peer *peer = member_peer(&self->member, actor);
    return peer != NULL && peer->incarnation == incarnation;
}

void upstream_cancel(struct gateway *self, uint64_t sequence, actor_id actor, uint64_t incarnation,
                     uint64_t now_ns, struct effects *out) {
    send_cancel(self, sequence, actor, out);
    for (uint32_t i = 0; i < self->closings; i++)
        if (self->closing[i].sequence == sequence && self->closing[i].actor == actor)
            return;
    self->closing = gateway_grow(self->closing, &self->closings_capacity, self->closings + 1,
                                 sizeof *self->closing);
    self->closing[self->closings++] = (struct closing){
        .sequence = sequence,
        .actor = actor,
        .incarnation = incarnation,
        .deadline_ns = now_ns + self->poll_ns,
    };
    wake(self, now_ns + self->poll_ns);
}

void upstream_leave(struct gateway *self, struct choice *choice, bool tell, uint64_t now_ns,
                    struct effects *out) {
    ASSERT(choice->state == CHOICE_PLACED);
    struct upstream *upstream = find(self, choice->actor, choice->incarnation);
    if (upstream != NULL) {
        ASSERT(upstream->outstanding >= choice->load);
        upstream->outstanding -= choice->load;
    }
    choice->accepted_drafts += choice->accepted_now;
    choice->rejected_drafts += choice->rejected_now;
    choice->accepted_now = choice->rejected_now = 0;
    choice->state = CHOICE_WAITING;
    if (!tell)
        return; /* refused: the time that it has waited goes on counting */
    choice->waiting_since_ns = now_ns;
    if (!is_peer(self, choice->actor, choice->incarnation))
        return;
    upstream_cancel(self, choice->id, choice->actor, choice->incarnation, now_ns, out);
}

static void send_poll(struct gateway *self, uint64_t sequence, actor_id actor, uint32_t have,
                      uint32_t have_prompt, struct effects *out) {
    Troupe__Poll poll = TROUPE__POLL__INIT;
    poll.sequence = sequence;
    poll.have = have;
    poll.have_prompt = have_prompt;
    message envelope = member_envelope(&self->member);
    envelope.body_case = TROUPE__ENVELOPE__BODY_POLL;
    envelope.poll = &poll;
    effects_send(out, actor, &envelope);
    self->metrics.counter[METRIC_POLLED]++;
}

void upstream_poll(struct gateway *self, struct choice *choice, uint64_t now_ns,
                   struct effects *out) {
    send_poll(self, choice->id, choice->actor, choice->tokens,
              choice->scorer ? choice->prompt->score.count : 0, out);
    set_deadline(self, choice, now_ns + self->poll_ns);
}

void upstream_review(struct gateway *self, uint64_t now_ns, struct effects *out) {
    for (uint32_t i = 0; i < self->closings;)
        if (is_peer(self, self->closing[i].actor, self->closing[i].incarnation))
            i++;
        else
            forget_closing(self, i);
    for (uint32_t i = 0; i < self->slots; i++) {
        struct choice *choice = self->slot[i];
        if (choice != NULL && choice->state == CHOICE_PLACED) {
            const struct peer *peer = member_peer(&self->member, choice->actor);
            if (peer != NULL && peer->incarnation == choice->incarnation && !peer->lost)
                continue;
            upstream_leave(self, choice, true, now_ns, out);
            self->metrics.counter[METRIC_RESUBMITTED]++;
        }
        if (choice != NULL && choice->state == CHOICE_WAITING)
            upstream_place(self, choice, now_ns, out);
    }
    for (uint32_t i = 0; i < self->upstreams;)
        if (is_peer(self, self->upstream[i].id, self->upstream[i].incarnation))
            i++;
        else
            self->upstream[i] = self->upstream[--self->upstreams];
}

static void choice_timer(struct gateway *self, struct choice *choice, uint64_t now_ns,
                         struct effects *out) {
    choice->gap_polled = false;
    if (choice->state == CHOICE_PLACED)
        upstream_poll(self, choice, now_ns, out);
    else
        upstream_place(self, choice, now_ns, out);
}

void upstream_timer(struct gateway *self, uint64_t now_ns, struct effects *out) {
    if (now_ns < self->wake_ns)
        return;
    self->wake_ns = NEVER;
    for (uint32_t i = 0; i < self->slots; i++) {
        struct choice *choice = self->slot[i];
        if (choice == NULL || choice->state == CHOICE_FINISHED)
            continue;
        if (choice->deadline_ns > now_ns)
            wake(self, choice->deadline_ns);
        else
            choice_timer(self, choice, now_ns, out); /* may free this choice and its siblings */
    }
    for (uint32_t i = 0; i < self->closings; i++) {
        struct closing *closing = &self->closing[i];
        if (closing->deadline_ns <= now_ns) {
            send_poll(self, closing->sequence, closing->actor, 0, 0, out);
            closing->deadline_ns = now_ns + self->poll_ns;
        }
        wake(self, closing->deadline_ns);
    }
}
