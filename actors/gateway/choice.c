/* One choice of an answer: the history of its tokens (all that is needed to go on elsewhere when
 * its attention actor dies) and the text that they become. A token's text passes the detokenizer
 * (whole characters), the stop filter (nothing that may belong to a stop string) and, for reasoning
 * models, the split at </think>. Everything depends on the tokens alone, never on how messages cut
 * them. */
#include <stdlib.h>
#include <string.h>

#include "actors/gateway/gateway.h"

void scored_list_add(struct scored_list *self, const Troupe__Token *token,
                     uint32_t most_alternatives, uint64_t offset) {
    uint32_t alternatives =
        token->n_top < most_alternatives ? (uint32_t)token->n_top : most_alternatives;
    self->entry = gateway_grow(self->entry, &self->capacity, self->count + 1, sizeof *self->entry);
    self->alternative = gateway_grow(self->alternative, &self->alternatives_capacity,
                                     self->alternatives + alternatives, sizeof *self->alternative);
    self->entry[self->count++] = (struct scored){
        .token = token->id,
        .logprob = token->logprob,
        .first = self->alternatives,
        .alternatives = alternatives,
        .offset = offset,
    };
    for (uint32_t i = 0; i < alternatives; i++)
        self->alternative[self->alternatives++] =
            (struct alternative){.token = token->top[i]->token, .logprob = token->top[i]->logprob};
}

void scored_list_clear(struct scored_list *self) {
    self->count = 0;
    self->alternatives = 0;
}

void scored_list_free(struct scored_list *self) {
    free(self->entry);
    free(self->alternative);
    memset(self, 0, sizeof *self);
}

/* Choice 0 of an explicit seed draws as the request with n = 1 would; the others differ from it and
 * from each other, reproducibly. */
static uint64_t choice_seed(const struct gateway *self, const struct request *request,
                            uint32_t choice) {
    if (request->input.seed == ABSENT && request->resumable && request->named)
        return resume_seed(request, choice);
    if (request->input.seed == ABSENT)
        return gateway_mix(self->member.identity.incarnation, self->counter);
    uint64_t seed = (uint64_t)request->input.seed;
    return choice == 0 ? seed : gateway_mix(seed, choice);
}

struct choice *choice_create(struct gateway *self, struct request *request, struct prompt *prompt,
                             uint32_t index) {
    struct choice *choice = calloc(1, sizeof *choice);
    ASSERT(choice != NULL && "memory for a choice");
    uint32_t slot = self->free_slots > 0 ? self->free_slot[--self->free_slots] : self->slots;
    if (slot == self->slots) {
        uint32_t capacity = self->slots;
        self->slot = gateway_grow(self->slot, &capacity, slot + 1, sizeof(struct choice *));
        self->free_slot = realloc(self->free_slot, capacity * sizeof *self->free_slot);
        ASSERT(self->free_slot != NULL && capacity <= 1u << CHOICE_SLOT_BITS &&
               "slots for choices");
        for (uint32_t i = capacity; i > slot + 1; i--)
            self->free_slot[self->free_slots++] = i - 1;
        self->slots = capacity;
    }
    self->slot[slot] = choice;
    self->counter++;
    choice->id = ((self->counter << CHOICE_SLOT_BITS) | slot) ^ self->sequence_key;
    choice->request = request;
    choice->prompt = prompt;
    choice->index = index;
    choice->scorer = prompt->scored && index % (uint32_t)request->input.n == 0;
    choice->seed = choice_seed(self, request, index % (uint32_t)request->input.n);
    choice->stop_token = -1;
    detokenizer_init(&choice->detokenizer, request->input.skip_special_tokens);
    stop_filter_init(&choice->stop, &request->input.stop);
    reasoning_init(&choice->reasoning, request->starts_in_reasoning);
    return choice;
}

void choice_free(struct gateway *self, struct choice **choice) {
    struct choice *gone = *choice;
    uint32_t slot = (uint32_t)(gone->id ^ self->sequence_key) & ((1u << CHOICE_SLOT_BITS) - 1);
    ASSERT(self->slot[slot] == gone && gone->state == CHOICE_FINISHED);
    self->slot[slot] = NULL;
    self->free_slot[self->free_slots++] = slot;
    free(gone->token);
    scored_list_free(&gone->score);
    stop_filter_free(&gone->stop);
    reasoning_free(&gone->reasoning);
    text_free(&gone->thought);
    text_free(&gone->answer);
    server_list_free(&gone->served);
    free(gone);
    *choice = NULL;
}

struct choice *choice_find(const struct gateway *self, uint64_t id) {
    uint32_t slot = (uint32_t)(id ^ self->sequence_key) & ((1u << CHOICE_SLOT_BITS) - 1);
    struct choice *choice = slot < self->slots ? self->slot[slot] : NULL;
    return choice != NULL && choice->id == id ? choice : NULL;
}

/* Text that a client will see, unless a stop string begins in it. */
static void show(struct choice *choice, const char *bytes, size_t size, struct text *visible) {
    const struct generation_request *input = &choice->request->input;
    choice->characters += utf8_characters(bytes, size);
    bool watch = choice->tokens > (uint64_t)input->min_tokens;
    text_clear(visible);
    if (stop_filter_push(&choice->stop, bytes, size, watch, input->include_stop, visible))
        choice->finish = FINISH_AT_STOP;
    reasoning_push(&choice->reasoning, visible->bytes, visible->size, &choice->thought,
                   &choice->answer);
}

static void decode(struct gateway *self, struct choice *choice, uint32_t token) {
    char small[512];
    size_t room = detokenizer_room(self->tokenizer, token);
    char *bytes = room <= sizeof small ? small : malloc(room);
    ASSERT(bytes != NULL && "memory for a token's text");
    size_t size = detokenizer_push(&choice->detokenizer, self->tokenizer, token, bytes, room);
    show(choice, bytes, size, &self->line);
    if (bytes != small)
        free(bytes);
}

/* Does generation end with this token? The same rule as the attention actor's, so that nothing
 * hangs on a lost `finish`. */
static bool stops(const struct gateway *self, struct choice *choice, uint32_t token) {
    const struct generation_request *input = &choice->request->input;
    if ((int64_t)choice->tokens <= input->min_tokens)
        return false; /* `token` is counted already */
    if (!input->ignore_eos) {
        for (uint32_t i = 0; i < self->config.eos_count; i++)
            if (self->config.eos[i] == (int32_t)token)
                return true;
        if (tokenizer_eos(self->tokenizer) == (int32_t)token)
            return true;
    }
    for (uint32_t i = 0; i < input->stop_tokens; i++)
        if (input->stop_token[i] == token) {
            choice->stop_token = token;
            return true;
        }
    return false;
}

void choice_accept(struct gateway *self, struct choice *choice, const Troupe__Token *token) {
    ASSERT(choice->finish == FINISH_NOT && choice->tokens < choice->prompt->max_tokens);
    const struct generation_request *input = &choice->request->input;
    choice->token = gateway_grow(choice->token, &choice->tokens_capacity, choice->tokens + 1,
                                 sizeof *choice->token);
    choice->token[choice->tokens++] = token->id;
    if (input->logprobs != ABSENT)
        scored_list_add(&choice->score, token, (uint32_t)input->logprobs,
                        choice->prompt->echo_characters + choice->characters);
    bool ends = stops(self, choice, token->id);
    bool hidden = ends && !(choice->stop_token >= 0 && input->include_stop);
    if (!hidden &&
        input->max_tokens != 0) /* 0: echo only; the one token drawn is not part of the text */
        decode(self, choice, token->id);
    if (choice->finish == FINISH_NOT && ends)
        choice_finish(self, choice, FINISH_AT_STOP);
    else if (choice->finish == FINISH_NOT && choice->tokens == choice->prompt->max_tokens)
        choice_finish(self, choice, FINISH_AT_LENGTH);
    else if (choice->finish != FINISH_NOT) /* by a stop string */
        reasoning_flush(&choice->reasoning, &choice->thought);
    if (choice->seen_before > 0 || choice->told_end)
        resume_leave_out(choice);
}

void choice_finish(struct gateway *self, struct choice *choice, enum finish finish) {
    ASSERT(choice->finish == FINISH_NOT);
    decode(self, choice, UINT32_MAX);
    if (choice->finish == FINISH_NOT) {
        text_clear(&self->line);
        stop_filter_flush(&choice->stop, &self->line);
        reasoning_push(&choice->reasoning, self->line.bytes, self->line.size, &choice->thought,
                       &choice->answer);
        choice->finish = finish;
    }
    reasoning_flush(&choice->reasoning, &choice->thought);
}

bool choice_complete(const struct choice *choice) {
    return choice->finish != FINISH_NOT && (!choice->scorer || prompt_complete(choice->prompt));
}
