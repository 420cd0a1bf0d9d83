/* Sequences of an attention actor: SUBMIT is checked here, memory and pages are given and taken
 * back here.
 *
 *   (Submit) -> WAITING -> RUNNING -> DONE -> (Cancel) gone
 *   pages run out, or a better priority waits: RUNNING -> WAITING (attention_admit.c)
 *   drained: WAITING, RUNNING -> DONE, finish CANCELLED: the gateway submits the history elsewhere
 *
 * Cancel takes a sequence from any state, once no batch uses it.
 *
 * Invariants: 1. a sequence that runs holds the pages of its known tokens; 2. a page is cleared before
 * its first use, and shared only once it is complete (attention_pages.c); 3. what waits, runs or is done
 * is in the hash, and nothing else. */
#include "actors/attention.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FULL_LOGITS_BYTES_MAX ((uint64_t)1 << 30)

/* ---- tables ---- */

static uint32_t hash_place(const struct attention *self, actor_id gateway, uint64_t id) {
    uint64_t mixed = (id ^ ((uint64_t)gateway << 40)) * 0x9e3779b97f4a7c15u;
    return (uint32_t)(mixed >> 32) & (self->hash_size - 1);
}

static struct sequence *find(const struct attention *self, actor_id gateway, uint64_t id) {
    struct sequence *sequence = self->hash[hash_place(self, gateway, id)];
    while (sequence != NULL && (sequence->id != id || sequence->gateway != gateway))
        sequence = sequence->hash_next;
    return sequence;
}

static void hash_add(struct attention *self, struct sequence *sequence) {
    struct sequence **place = &self->hash[hash_place(self, sequence->gateway, sequence->id)];
    sequence->hash_next = *place;
    *place = sequence;
}

static void hash_remove(struct attention *self, const struct sequence *sequence) {
    struct sequence **place = &self->hash[hash_place(self, sequence->gateway, sequence->id)];
    while (*place != sequence)
        place = &(*place)->hash_next;
    *place = sequence->hash_next;
}

static void list_append(struct sequence_list *list, struct sequence *sequence) {
    sequence->previous = list->last;
    sequence->next = NULL;
    if (list->last != NULL)
        list->last->next = sequence;
    else
        list->first = sequence;
    list->last = sequence;
    list->count++;
}

static void list_remove(struct sequence_list *list, struct sequence *sequence) {
    if (sequence->previous != NULL)
        sequence->previous->next = sequence->next;
    else
        list->first = sequence->next;
    if (sequence->next != NULL)
        sequence->next->previous = sequence->previous;
    else
        list->last = sequence->previous;
    list->count--;
}

/* ---- token counts ---- */

static uint32_t count_place(const struct token_counts *self, uint32_t token) {
    uint32_t place = (token * 0x9e3779b1u) & (self->index_size - 1);
    while (self->index[place] != 0 && self->token[self->index[place] - 1] != token)
        place = (place + 1) & (self->index_size - 1);
    return place;
}

static bool token_counts_grow(struct token_counts *self) {
    uint32_t capacity = self->capacity == 0 ? 64 : self->capacity * 2;
    uint32_t *token = realloc(self->token, capacity * sizeof *token);
    if (token != NULL)
        self->token = token;
    uint32_t *times = realloc(self->times, capacity * sizeof *times);
    if (times != NULL)
        self->times = times;
    uint32_t *index = calloc((size_t)capacity * 2, sizeof *index);
    if (token == NULL || times == NULL || index == NULL) {
        free(index);
        return false;
    }
    free(self->index);
    self->index = index;
    self->capacity = capacity;
    self->index_size = capacity * 2;
    for (uint32_t i = 0; i < self->count; i++)
        self->index[count_place(self, self->token[i])] = i + 1;
    return true;
}

bool token_counts_add(struct token_counts *self, uint32_t token) {
    if (self->count == self->capacity && !token_counts_grow(self))
        return false;
    uint32_t place = count_place(self, token);
    if (self->index[place] == 0) {
        self->token[self->count] = token;
        self->times[self->count] = 0;
        self->index[place] = ++self->count;
    }
    self->times[self->index[place] - 1]++;
    return true;
}

/* The last one added has no other behind it in its run of the index: taking it out breaks none. */
void token_counts_pop(struct token_counts *self, uint32_t token) {
    uint32_t place = count_place(self, token), at = self->index[place] - 1;
    ASSERT(self->index[place] != 0);
    if (--self->times[at] > 0)
        return;
    ASSERT(at + 1 == self->count);
    self->index[place] = 0;
    self->count--;
}

static void token_counts_free(struct token_counts *self) {
    free(self->token);
    free(self->times);
    free(self->index);
    memset(self, 0, sizeof *self);
}

/* ---- memory ---- */

/* Nothing of it will be computed any more. */
static void release_routing(struct sequence *sequence) {
    if (sequence->routing != NULL)
        sequence->routing->users--;
    sequence->routing = NULL;
}

static void sequence_free(struct sequence *sequence) {
    release_routing(sequence);
    free(sequence->token);
    free(sequence->page);
    free(sequence->bias);
    free(sequence->stop_token);
    token_counts_free(&sequence->prompt_counts);
    token_counts_free(&sequence->output_counts);
    free(sequence->entry);
    free(sequence->entry_top);
    free(sequence->prompt_entry);
    free(sequence->prompt_top);
    free(sequence->prompt_logits);
    sequence_trace_free(sequence);
    free(sequence);
}

static bool wants_prompt_counts(const struct sequence *sequence) {
    return sequence->sampling.repetition_penalty != 1.0f;
}

bool sequence_counts_output(const struct sequence *sequence) {
    return wants_prompt_counts(sequence) || sequence->sampling.presence_penalty != 0.0f ||
           sequence->sampling.frequency_penalty != 0.0f;
}

static bool fill_counts(struct sequence *sequence) {
    if (wants_prompt_counts(sequence))
        for (uint32_t i = 0; i < sequence->prompt_tokens; i++)
            if (!token_counts_add(&sequence->prompt_counts, sequence->token[i]))
                return false;
    if (sequence_counts_output(sequence))
        for (uint32_t i = sequence->prompt_tokens; i < sequence->tokens; i++)
            if (!token_counts_add(&sequence->output_counts, sequence->token[i]))
                return false;
    return true;
}

static bool allocate_entries(const struct attention *self, struct sequence *sequence) {
    size_t draws = sequence->tokens_max - sequence->given_tokens, top = sequence->top_logprobs;
    if (sequence->logprobs && draws > 0) {
        sequence->entry = calloc(draws, sizeof *sequence->entry);
        sequence->entry_top = calloc(draws * top + 1, sizeof *sequence->entry_top);
        if (sequence->entry == NULL || sequence->entry_top == NULL)
            return false;
    }
    size_t scores = sequence->prompt_entries;
    if (scores > 0) {
        sequence->prompt_entry = calloc(scores, sizeof *sequence->prompt_entry);
        sequence->prompt_top = calloc(scores * top + 1, sizeof *sequence->prompt_top);
        if (sequence->prompt_entry == NULL || sequence->prompt_top == NULL)
            return false;
    }
    if (sequence->full_logits) {
        sequence->prompt_logits = calloc(scores * self->config.vocabulary, sizeof(float));
        return sequence->prompt_logits != NULL;
    }
    return true;
}

/* ---- SUBMIT ---- */

/* proto/wire.h has seen to it that there are sampling parameters and as many biases as biased
 * tokens. */
static int check_sampling(const Troupe__Sampling *sampling, uint32_t vocabulary,
                          struct failure *failure) {
    if (!(sampling->temperature >= 0 && sampling->temperature <= 3e38f))
        return fail(failure, ERR_INVALID, "temperature must be 0 or larger, found %g",
                    (double)sampling->temperature);
    if (!(sampling->top_p >= 0 && sampling->top_p <= 1))
        return fail(failure, ERR_INVALID, "top_p must be within 0 and 1, found %g",
                    (double)sampling->top_p);
    if (!(sampling->min_p >= 0 && sampling->min_p <= 1))
        return fail(failure, ERR_INVALID, "min_p must be within 0 and 1, found %g",
                    (double)sampling->min_p);
    float repetition = sampling->repetition_penalty; /* 0: not given */
    if (repetition != 0 && !(repetition >= 1e-6f && repetition <= 1e6f))
        return fail(failure, ERR_INVALID,
                    "repetition_penalty must be within 1e-6 and 1e6, found %g", (double)repetition);
    if (!(fabsf(sampling->presence_penalty) <= 1e6f) ||
        !(fabsf(sampling->frequency_penalty) <= 1e6f))
        return fail(failure, ERR_INVALID,
                    "presence and frequency penalties must be within -1e6 and 1e6, found %g and %g",
                    (double)sampling->presence_penalty, (double)sampling->frequency_penalty);
    if (sampling->top_logprobs > TOP_LOGPROBS_MAX)
        return fail(failure, ERR_INVALID, "at most %d top_logprobs, found %u", TOP_LOGPROBS_MAX,
                    sampling->top_logprobs);
    if (sampling->n_bias_token > LOGIT_BIAS_MAX)
        return fail(failure, ERR_INVALID, "at most %d biased tokens, found %zu", LOGIT_BIAS_MAX,
                    sampling->n_bias_token);
    for (size_t i = 0; i < sampling->n_bias_token; i++) {
        if (sampling->bias_token[i] >= vocabulary)
            return fail(failure, ERR_INVALID, "biased token %u is not below the vocabulary of %u",
                        sampling->bias_token[i], vocabulary);
        if (isnan(sampling->bias_value[i]) || sampling->bias_value[i] == INFINITY)
            return fail(failure, ERR_INVALID, "the bias of token %u is not a number below infinity",
                        sampling->bias_token[i]);
    }
    return 0;
}

static int check_tokens(const struct attention *self, const Troupe__Submit *submit,
                        struct failure *failure) {
    uint32_t vocabulary = self->config.vocabulary;
    if (submit->n_token < 1 || submit->n_token > self->context)
        return fail(failure, ERR_INVALID, "a sequence has 1 to %u tokens here, found %zu",
                    self->context, submit->n_token);
    if (submit->prompt_tokens < 1 || submit->prompt_tokens > submit->n_token)
        return fail(failure, ERR_INVALID,
                    "prompt_tokens must be within 1 and the %zu given, found %u", submit->n_token,
                    submit->prompt_tokens);
    for (size_t i = 0; i < submit->n_token; i++)
        if (submit->token[i] >= vocabulary)
            return fail(failure, ERR_INVALID,
                        "token %u at position %zu is not below the vocabulary of %u",
                        submit->token[i], i, vocabulary);
    if (submit->n_stop_token > STOP_TOKENS_MAX)
        return fail(failure, ERR_INVALID, "at most %d stop tokens, found %zu", STOP_TOKENS_MAX,
                    submit->n_stop_token);
    for (size_t i = 0; i < submit->n_stop_token; i++)
        if (submit->stop_token[i] >= vocabulary)
            return fail(failure, ERR_INVALID, "stop token %u is not below the vocabulary of %u",
                        submit->stop_token[i], vocabulary);
    return 0;
}

static uint32_t tokens_limit(const struct attention *self, const Troupe__Submit *submit) {
    uint64_t limit = (uint64_t)submit->prompt_tokens + submit->max_tokens;
    if (limit > self->context)
        limit = self->context;
    return limit < submit->n_token ? (uint32_t)submit->n_token : (uint32_t)limit;
}

/* Every known token but the last one drawn has latent entries. */
static uint32_t pages_needed(uint32_t tokens_max, uint32_t given) {
    uint32_t positions = tokens_max > given ? tokens_max - 1 : given;
    return (positions + PAGE_TOKENS - 1) / PAGE_TOKENS;
}

static int check_room(const struct attention *self, const Troupe__Submit *submit,
                      struct failure *failure) {
    uint32_t limit = tokens_limit(self, submit);
    uint32_t pages = pages_needed(limit, (uint32_t)submit->n_token);
    if (pages > self->pages.total)
        return fail(
            failure, ERR_TOO_LARGE,
            "a sequence of up to %u tokens needs %u pages of %d positions, the cache has %u "
            "(kv_cache_tokens %u)",
            limit, pages, PAGE_TOKENS, self->pages.total, self->settings.kv_cache_tokens);
    uint64_t logits = (uint64_t)submit->prompt_tokens * self->config.vocabulary * sizeof(float);
    if (submit->full_logits && logits > FULL_LOGITS_BYTES_MAX)
        return fail(failure, ERR_TOO_LARGE,
                    "full logits of %u positions take %llu bytes, at most %llu",
                    submit->prompt_tokens, (unsigned long long)logits,
                    (unsigned long long)FULL_LOGITS_BYTES_MAX);
    if (self->waiting.count >= self->settings.max_waiting)
        return fail(failure, ERR_BUSY, "%u sequences are waiting already, at most %u",
                    self->waiting.count, self->settings.max_waiting);
    return 0;
}

static void take_sampling(struct sequence *sequence, const Troupe__Sampling *sampling) {
    sequence->sampling = (struct sample_spec){
        .seed = sampling->seed,
        .temperature = sampling->temperature,
        .top_p = sampling->top_p > 0 ? sampling->top_p : 1.0f,
        .min_p = sampling->min_p,
        .top_k = sampling->top_k,
        .repetition_penalty =
            sampling->repetition_penalty > 0 ? sampling->repetition_penalty : 1.0f,
        .presence_penalty = sampling->presence_penalty,
        .frequency_penalty = sampling->frequency_penalty,
    };
    sequence->logprobs = sampling->logprobs;
    sequence->top_logprobs = sampling->top_logprobs;
}

static bool take_lists(struct sequence *sequence, const Troupe__Submit *submit) {
    const Troupe__Sampling *sampling = submit->sampling;
    sequence->token = calloc(sequence->tokens_max, sizeof *sequence->token);
    sequence->page = calloc(sequence->pages, sizeof *sequence->page);
    sequence->bias = calloc(2 * sampling->n_bias_token + 1, sizeof *sequence->bias);
    sequence->stop_token = calloc(submit->n_stop_token + 1, sizeof *sequence->stop_token);
    if (sequence->token == NULL || sequence->page == NULL || sequence->bias == NULL ||
        sequence->stop_token == NULL)
        return false;
    memcpy(sequence->token, submit->token, submit->n_token * sizeof *sequence->token);
    for (size_t i = 0; i < submit->n_stop_token; i++)
        sequence->stop_token[i] = submit->stop_token[i];
    sequence->stop_tokens = (uint32_t)submit->n_stop_token;
    for (size_t i = 0; i < sampling->n_bias_token; i++) {
        sequence->bias[2 * i] = sampling->bias_token[i];
        memcpy(&sequence->bias[2 * i + 1], &sampling->bias_value[i], sizeof(float));
    }
    sequence->biases = (uint32_t)sampling->n_bias_token;
    return true;
}

static struct sequence *sequence_create(struct attention *self, actor_id gateway,
                                        const Troupe__Submit *submit) {
    struct sequence *sequence = calloc(1, sizeof *sequence);
    if (sequence == NULL)
        return NULL;
    sequence->id = submit->sequence;
    sequence->submitted_ns = self->now_ns;
    sequence->gateway = gateway;
    sequence->prompt_tokens = submit->prompt_tokens;
    sequence->given_tokens = sequence->tokens = (uint32_t)submit->n_token;
    sequence->tokens_max = tokens_limit(self, submit);
    sequence->pages = pages_needed(sequence->tokens_max, sequence->given_tokens);
    sequence->min_tokens = submit->min_tokens;
    sequence->max_tokens = submit->max_tokens;
    sequence->ignore_eos = submit->ignore_eos;
    sequence->full_logits = submit->full_logits;
    sequence->bias_version = submit->bias_version;
    sequence->priority = submit->priority;
    sequence->score_prompt = submit->prompt_logprobs || submit->full_logits;
    if (sequence->score_prompt)
        sequence->prompt_entries = submit->prompt_tokens - (submit->full_logits ? 0 : 1);
    sequence->told_tokens = sequence->given_tokens - sequence->prompt_tokens;
    take_sampling(sequence, submit->sampling);
    if (!take_lists(sequence, submit) || !fill_counts(sequence) ||
        !allocate_entries(self, sequence) ||
        (submit->trace && !sequence_trace_create(self, sequence))) {
        sequence_free(sequence);
        return NULL;
    }
    sequence->routing = bias_table_find(&self->bias, submit->bias_version);
    if (sequence->routing != NULL)
        sequence->routing->users++;
    return sequence;
}

static void keep_done(struct attention *self, struct sequence *sequence) {
    sequence->state = SEQUENCE_DONE;
    release_routing(sequence);
    list_append(&self->done, sequence);
    if (self->done.count >
        self->done_max) { /* a gateway that never cancels must not fill the memory */
        struct sequence *oldest = self->done.first;
        list_remove(&self->done, oldest);
        hash_remove(self, oldest);
        sequence_free(oldest);
    }
}

void attention_on_submit(struct attention *self, const message *envelope, struct effects *out) {
    const Troupe__Submit *submit = envelope->submit;
    if (submit->attention_incarnation != 0 &&
        submit->attention_incarnation != self->member.identity.incarnation) {
        effects_trace(out, TRACE_WARNING, "ignored a SUBMIT for an earlier process at this address");
        return;
    }
    if (find(self, envelope->from, submit->sequence) != NULL)
        return; /* said again */
    struct failure failure = {0};
    struct sequence *sequence = NULL;
    if (self->member.draining)
        fail(&failure, ERR_STATE, "this attention actor is being drained");
    else if (!bias_table_holds(&self->bias, submit->bias_version) && bias_table_has_room(&self->bias)) {
        report_bias_wanted(self, envelope->from, submit, out); /* never run with another one */
        return;
    } else if (!bias_table_holds(&self->bias, submit->bias_version))
        fail(&failure, ERR_BUSY, "%d versions of the routing bias are in use here already",
             BIAS_VERSIONS_HELD_MAX);
    else if (check_tokens(self, submit, &failure) == 0 &&
        check_sampling(submit->sampling, self->config.vocabulary, &failure) == 0 &&
        check_room(self, submit, &failure) == 0) {
        sequence = sequence_create(self, envelope->from, submit);
        if (sequence != NULL)
            sequence->gateway_incarnation = envelope->from_incarnation;
        else
            fail(&failure, ERR_NO_MEMORY, "no memory for a sequence of %zu tokens",
                 submit->n_token);
    }
    if (sequence == NULL) {
        report_rejected(self, envelope->from, submit->sequence, failure.code, false, failure.text,
                        out);
        return;
    }
    hash_add(self, sequence);
    if (!sequence_draws(sequence) && !sequence->score_prompt) {
        sequence_finish(sequence, TROUPE__FINISH_REASON__FINISH_LENGTH, 0);
        keep_done(self, sequence);
        report_sequence(self, sequence, sequence->told_tokens, 0, out);
        return;
    }
    sequence->arrival = ++self->arrivals;
    attention_wait(self, sequence);
}

/* ---- running ---- */

void attention_stop_waiting(struct attention *self, struct sequence *sequence) {
    list_remove(&self->waiting, sequence);
}

void attention_leave(struct attention *self, struct sequence *sequence) {
    ASSERT(self->running[sequence->number] == sequence && !sequence->in_batch);
    self->running[sequence->number] = NULL;
    self->runnings--;
    pages_drop(self, sequence);
}

void attention_retire(struct attention *self, struct sequence *sequence) {
    attention_leave(self, sequence);
    if (sequence->cancelled) {
        hash_remove(self, sequence);
        sequence_free(sequence);
    } else {
        keep_done(self, sequence);
    }
}

bool sequence_draws(const struct sequence *sequence) {
    return sequence->tokens < sequence->tokens_max;
}

void sequence_finish(struct sequence *sequence, Troupe__FinishReason reason, uint32_t stopped_by) {
    sequence->finish = reason;
    sequence->stopped_by = stopped_by;
}

static bool stops(const struct attention *self, const struct sequence *sequence, uint32_t token) {
    if (!sequence->ignore_eos)
        for (uint32_t i = 0; i < self->config.eos_count; i++)
            if (self->config.eos[i] == (int32_t)token)
                return true;
    for (uint32_t i = 0; i < sequence->stop_tokens; i++)
        if (sequence->stop_token[i] == token)
            return true;
    return false;
}

void attention_append(struct attention *self, struct sequence *sequence, uint32_t token) {
    ASSERT(sequence->tokens < sequence->tokens_max);
    bool counted =
        !sequence_counts_output(sequence) || token_counts_add(&sequence->output_counts, token);
    ASSERT(counted && "memory for token counts");
    uint32_t generated = sequence->tokens - sequence->prompt_tokens;
    sequence->token[sequence->tokens++] = token;
    self->generated_total++;
    if (generated >= sequence->min_tokens && stops(self, sequence, token))
        sequence_finish(sequence, TROUPE__FINISH_REASON__FINISH_STOP, token);
    else if (!sequence_draws(sequence))
        sequence_finish(sequence, TROUPE__FINISH_REASON__FINISH_LENGTH, 0);
}

/* ---- leaving ---- */

static void cancel(struct attention *self, struct sequence *sequence) {
    switch (sequence->state) {
    case SEQUENCE_WAITING:
        list_remove(&self->waiting, sequence);
        break;
    case SEQUENCE_RUNNING:
        sequence->cancelled = true;
        if (!sequence->in_batch)
            attention_retire(self, sequence);
        return;
    case SEQUENCE_DONE:
        list_remove(&self->done, sequence);
        break;
    }
    hash_remove(self, sequence);
    sequence_free(sequence);
}

void attention_on_cancel(struct attention *self, const message *envelope) {
    struct sequence *sequence = find(self, envelope->from, envelope->cancel->sequence);
    if (sequence != NULL && !sequence->cancelled)
        cancel(self, sequence);
}

static void cancel_list(struct attention *self, struct sequence *first, actor_id gateway) {
    for (struct sequence *sequence = first, *next; sequence != NULL; sequence = next) {
        next = sequence->next;
        if (sequence->gateway == gateway)
            cancel(self, sequence);
    }
}

void attention_cancel_gateway(struct attention *self, actor_id gateway) {
    cancel_list(self, self->waiting.first, gateway);
    cancel_list(self, self->done.first, gateway);
    for (uint32_t i = 0; i < self->settings.max_sequences; i++)
        if (self->running[i] != NULL && self->running[i]->gateway == gateway &&
            !self->running[i]->cancelled)
            cancel(self, self->running[i]);
}

/* One running sequence at a time, so that whoever takes it has computed its history before the next comes
 * and its own streams are not held up. */
void attention_hand_over(struct attention *self, uint64_t now_ns, struct effects *out) {
    while (self->waiting.first != NULL) { /* nothing has been computed for them */
        struct sequence *sequence = self->waiting.first;
        list_remove(&self->waiting, sequence);
        sequence_finish(sequence, TROUPE__FINISH_REASON__FINISH_CANCELLED, 0);
        report_sequence(self, sequence, sequence->told_tokens, sequence->told_prompt, out);
        keep_done(self, sequence);
    }
    for (uint32_t i = 0; i < self->settings.max_sequences && now_ns >= self->hand_over_at_ns; i++) {
        struct sequence *sequence = self->running[i];
        if (sequence == NULL)
            continue;
        sequence_finish(sequence, TROUPE__FINISH_REASON__FINISH_CANCELLED, 0);
        report_sequence(self, sequence, sequence->told_tokens, sequence->told_prompt, out);
        attention_retire(self, sequence);
        self->hand_over_at_ns = now_ns + (uint64_t)self->settings.hand_over_ms * 1000000u;
        return;
    }
}

void attention_drop_all(struct attention *self) {
    for (uint32_t i = 0; i < self->hash_size; i++)
        while (self->hash[i] != NULL) {
            struct sequence *sequence = self->hash[i];
            self->hash[i] = sequence->hash_next;
            sequence_free(sequence);
        }
}

void attention_on_poll(struct attention *self, const message *envelope, struct effects *out) {
    const Troupe__Poll *poll = envelope->poll;
    struct sequence *sequence = find(self, envelope->from, poll->sequence);
    if (sequence == NULL || sequence->cancelled) {
        report_rejected(self, envelope->from, poll->sequence, ERR_NOT_FOUND, true,
                        "this attention actor does not know the sequence", out);
        return;
    }
    uint32_t given = sequence->given_tokens - sequence->prompt_tokens;
    report_sequence(self, sequence, poll->have < given ? given : poll->have, poll->have_prompt,
                    out);
}
