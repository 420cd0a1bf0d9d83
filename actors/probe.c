/* A probe joins in a gateway's place, submits given sequences and keeps every answer: golden checks and tests go through the same actors
 * as serving, without HTTP.
 *
 * A sequence:  UNSENT -> SENT (to one attention actor, asked for again after poll_ms of silence) -> DONE
 *              SENT -> UNSENT when its attention actor is lost or does not know it: what was generated so far is submitted again. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "actors/actors.h"
#include "actors/member.h"

#define NS_PER_MS 1000000u

struct probed {
    struct probe_request request; /* token list owned */
    struct probe_answer answer;
    uint64_t sequence;
    actor_id attention; /* 0: unsent */
    uint64_t attention_incarnation;
    uint64_t asked_at_ns;
    uint32_t prompt_rows; /* entries of the prompt received */
};

struct probe {
    struct actor actor;
    struct member member;
    uint64_t poll_ns;
    uint32_t vocabulary;
    struct probed *probed;
    uint32_t count, done;
    uint32_t next_attention;
    char text[96];
};

static const struct peer *choose_attention(struct probe *self) {
    for (uint32_t i = 0; i < self->member.peers; i++) {
        const struct peer *peer = &self->member.peer[(self->next_attention + i) % self->member.peers];
        if (peer->role == ROLE_ATTENTION && !peer->lost && peer->state == TROUPE__ACTOR_STATE__STATE_READY) {
            self->next_attention += i + 1;
            return peer;
        }
    }
    return NULL;
}

static void submit(struct probe *self, struct probed *probed, uint64_t now_ns, struct effects *out) {
    const struct peer *peer = choose_attention(self);
    if (peer == NULL)
        return;
    const struct probe_request *request = &probed->request;
    uint32_t tokens = request->tokens + probed->answer.tokens;
    uint32_t *token = effects_alloc(out, tokens * sizeof *token);
    memcpy(token, request->token, request->tokens * sizeof *token);
    if (probed->answer.tokens > 0)
        memcpy(token + request->tokens, probed->answer.token, probed->answer.tokens * sizeof *token);
    Troupe__Sampling sampling = TROUPE__SAMPLING__INIT;
    sampling.temperature = request->temperature;
    sampling.top_p = request->top_p > 0 ? request->top_p : 1;
    sampling.repetition_penalty = 1;
    sampling.seed = request->seed;
    sampling.logprobs = request->logprobs;
    sampling.top_logprobs = request->top_logprobs;
    Troupe__Submit body = TROUPE__SUBMIT__INIT;
    body.sequence = probed->sequence;
    body.token = token;
    body.n_token = tokens;
    body.prompt_tokens = request->tokens;
    body.attention_incarnation = peer->incarnation;
    body.max_tokens = request->max_tokens;
    body.ignore_eos = true;
    body.sampling = &sampling;
    body.full_logits = request->full_logits && probed->prompt_rows < request->tokens;
    message envelope = member_envelope(&self->member);
    envelope.body_case = TROUPE__ENVELOPE__BODY_SUBMIT;
    envelope.submit = &body;
    effects_send(out, peer->id, &envelope);
    probed->attention = peer->id;
    probed->attention_incarnation = peer->incarnation;
    probed->asked_at_ns = now_ns;
}

static void poll(struct probe *self, struct probed *probed, uint64_t now_ns, struct effects *out) {
    Troupe__Poll body = TROUPE__POLL__INIT;
    body.sequence = probed->sequence;
    body.have = probed->answer.tokens;
    body.have_prompt = probed->prompt_rows;
    message envelope = member_envelope(&self->member);
    envelope.body_case = TROUPE__ENVELOPE__BODY_POLL;
    envelope.poll = &body;
    effects_send(out, probed->attention, &envelope);
    probed->asked_at_ns = now_ns;
}

static void finish(struct probe *self, struct probed *probed, int error, struct effects *out) {
    probed->answer.done = true;
    probed->answer.error = error;
    self->done++;
    Troupe__Cancel body = TROUPE__CANCEL__INIT;
    body.sequence = probed->sequence;
    message envelope = member_envelope(&self->member);
    envelope.body_case = TROUPE__ENVELOPE__BODY_CANCEL;
    envelope.cancel = &body;
    if (probed->attention != 0)
        effects_send(out, probed->attention, &envelope);
}

static struct probed *find(struct probe *self, uint64_t sequence, actor_id from) {
    for (uint32_t i = 0; i < self->count; i++)
        if (self->probed[i].sequence == sequence && !self->probed[i].answer.done &&
            self->probed[i].attention == from)
            return &self->probed[i];
    return NULL;
}

static void take_prompt(struct probe *self, struct probed *probed, const Troupe__Tokens *tokens) {
    for (size_t i = 0; i < tokens->n_prompt; i++) {
        uint64_t position = (uint64_t)tokens->prompt_first + i;
        const Troupe__Token *token = tokens->prompt[i];
        if (position != probed->prompt_rows || position >= probed->request.tokens)
            continue;
        if (probed->request.full_logits) {
            if (token->n_logits != self->vocabulary)
                continue;
            memcpy(probed->answer.logits + position * self->vocabulary, token->logits,
                   self->vocabulary * sizeof(float));
            probed->answer.logits_rows++;
        }
        probed->prompt_rows++;
    }
}

static void take_tokens(struct probe *self, struct probed *probed, const Troupe__Tokens *tokens,
                        uint64_t now_ns, struct effects *out) {
    take_prompt(self, probed, tokens);
    for (size_t i = 0; i < tokens->n_token; i++) {
        if ((uint64_t)tokens->first + i != probed->answer.tokens ||
            probed->answer.tokens == probed->request.max_tokens)
            continue;
        probed->answer.token[probed->answer.tokens] = tokens->token[i]->id;
        probed->answer.logprob[probed->answer.tokens++] = tokens->token[i]->logprob;
    }
    bool gap = (uint64_t)tokens->first > probed->answer.tokens ||
               (tokens->n_prompt > 0 && tokens->prompt_first > probed->prompt_rows);
    bool all_logits = !probed->request.full_logits || probed->prompt_rows == probed->request.tokens;
    if (tokens->finish == TROUPE__FINISH_REASON__FINISH_ERROR)
        finish(self, probed, ERR_STATE, out);
    else if (tokens->finish != TROUPE__FINISH_REASON__FINISH_NONE && !gap && all_logits &&
             probed->answer.tokens == tokens->first + tokens->n_token)
        finish(self, probed, 0, out);
    else if (gap || tokens->finish != TROUPE__FINISH_REASON__FINISH_NONE)
        poll(self, probed, now_ns, out);
    else
        probed->asked_at_ns = now_ns;
}

static void take_message(struct probe *self, const message *envelope, uint64_t now_ns,
                         struct effects *out) {
    if (envelope->body_case == TROUPE__ENVELOPE__BODY_TOKENS) {
        const Troupe__TokensBatch *batch = envelope->tokens;
        for (size_t i = 0; i < batch->n_tokens; i++) {
            struct probed *probed = find(self, batch->tokens[i]->sequence, envelope->from);
            if (probed != NULL)
                take_tokens(self, probed, batch->tokens[i], now_ns, out);
        }
    } else if (envelope->body_case == TROUPE__ENVELOPE__BODY_REJECTED) {
        const Troupe__Rejected *rejected = envelope->rejected;
        struct probed *probed = find(self, rejected->sequence, envelope->from);
        if (probed == NULL)
            return;
        if (rejected->unknown || rejected->code == ERR_BUSY) {
            probed->attention = 0;
            probed->asked_at_ns = now_ns;
        } else {
            effects_trace(out, TRACE_ERROR, "sequence refused: %s", rejected->reason);
            finish(self, probed, rejected->code, out);
        }
    }
}

/* Submits what is unsent and asks again where there was silence. */
static void tend(struct probe *self, uint64_t now_ns, struct effects *out) {
    for (uint32_t i = 0; i < self->count; i++) {
        struct probed *probed = &self->probed[i];
        if (probed->answer.done)
            continue;
        const struct peer *peer =
            probed->attention != 0 ? member_peer(&self->member, probed->attention) : NULL;
        if (probed->attention != 0 &&
            (peer == NULL || peer->lost || peer->incarnation != probed->attention_incarnation))
            probed->attention = 0;
        if (!self->member.serving && probed->attention == 0)
            continue;
        if (probed->attention == 0)
            submit(self, probed, now_ns, out);
        else if (now_ns - probed->asked_at_ns >= self->poll_ns)
            poll(self, probed, now_ns, out);
    }
}

static void probe_step(struct actor *actor, const struct event *event, uint64_t now_ns,
                       struct effects *out) {
    struct probe *self = (struct probe *)actor;
    uint32_t news = member_step(&self->member, event, now_ns, out);
    if (news & MEMBER_EXIT)
        return;
    if (news & MEMBER_HEARTBEAT) {
        Troupe__Heartbeat heartbeat = TROUPE__HEARTBEAT__INIT;
        heartbeat.state = TROUPE__ACTOR_STATE__STATE_READY;
        member_heartbeat(&self->member, &heartbeat, now_ns, out);
    }
    if (!(news & MEMBER_DONE) && event->kind == EVENT_MESSAGE)
        take_message(self, event->message, now_ns, out);
    tend(self, now_ns, out);
}

static uint64_t probe_deadline(const struct actor *actor) {
    const struct probe *self = (const struct probe *)actor;
    uint64_t deadline = member_deadline(&self->member);
    for (uint32_t i = 0; i < self->count; i++) {
        const struct probed *probed = &self->probed[i];
        if (!probed->answer.done && probed->attention != 0 &&
            probed->asked_at_ns + self->poll_ns < deadline)
            deadline = probed->asked_at_ns + self->poll_ns;
    }
    return deadline;
}

static void probe_destroy(struct actor *actor) {
    struct probe *self = (struct probe *)actor;
    for (uint32_t i = 0; i < self->count; i++) {
        free((uint32_t *)self->probed[i].request.token);
        free(self->probed[i].answer.token);
        free(self->probed[i].answer.logprob);
        free(self->probed[i].answer.logits);
    }
    free(self->probed);
    member_free(&self->member);
    free(self);
}

static const char *probe_describe(struct actor *actor) {
    struct probe *self = (struct probe *)actor;
    snprintf(self->text, sizeof self->text, "done=%u/%u", self->done, self->count);
    return self->text;
}

static const struct actor_class probe_class = {ROLE_GATEWAY, probe_step, probe_deadline,
                                               probe_destroy, probe_describe};

static bool copy_request(struct probed *probed, const struct probe_request *request,
                         uint32_t vocabulary) {
    probed->request = *request;
    uint32_t *token = malloc((request->tokens + 1) * sizeof *token);
    probed->request.token = token;
    probed->answer.token = calloc(request->max_tokens + 1, sizeof *probed->answer.token);
    probed->answer.logprob = calloc(request->max_tokens + 1, sizeof *probed->answer.logprob);
    if (request->full_logits)
        probed->answer.logits = calloc((size_t)request->tokens * vocabulary + 1, sizeof(float));
    if (token == NULL || probed->answer.token == NULL || probed->answer.logprob == NULL ||
        (request->full_logits && probed->answer.logits == NULL))
        return false;
    memcpy(token, request->token, request->tokens * sizeof *token);
    return true;
}

struct actor *probe_create(const struct actor_identity *identity, const struct settings *settings,
                           const struct model_config *config, const struct probe_request *requests,
                           uint32_t count) {
    struct probe *self = calloc(1, sizeof *self);
    if (self == NULL)
        return NULL;
    self->actor.class = &probe_class;
    self->poll_ns = (uint64_t)settings->poll_ms * NS_PER_MS;
    self->vocabulary = config->vocabulary;
    self->probed = calloc(count + 1, sizeof *self->probed);
    bool ready = self->probed != NULL &&
                 member_init(&self->member, identity, settings, 0, ROLE_BIT(ROLE_ATTENTION), 0);
    self->count = self->probed != NULL ? count : 0;
    for (uint32_t i = 0; ready && i < count; i++) {
        self->probed[i].sequence = identity->incarnation + i;
        ready = copy_request(&self->probed[i], &requests[i], config->vocabulary);
    }
    if (!ready) {
        probe_destroy(&self->actor);
        return NULL;
    }
    return &self->actor;
}

bool probe_done(const struct actor *actor) {
    const struct probe *self = (const struct probe *)actor;
    return self->done == self->count;
}

const struct probe_answer *probe_answer(const struct actor *actor, uint32_t index) {
    const struct probe *self = (const struct probe *)actor;
    ASSERT(index < self->count);
    return &self->probed[index].answer;
}
