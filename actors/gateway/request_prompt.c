/* Prompts: text, token ids or messages become tokens, measured against the context. */
#include <stdlib.h>
#include <string.h>

#include "actors/gateway/gateway.h"

#define DEFAULT_MAX_TOKENS                                                                         \
    16 /* of /v1/completions, as OpenAI's and vLLM's; chat answers may fill the context */

int request_tokenize(const struct gateway *self, const struct generation_request *input,
                     uint32_t which, struct token_list *ret, struct http_error *error) {
    struct failure failure = {0};
    int code;
    if (input->messages > 0) {
        if (self->chat == CHAT_NONE)
            return http_fail(error, 400, "messages",
                             "this model has no chat format that is known here: %s",
                             self->chat_error);
        struct chat_options options = {.add_generation_prompt = input->add_generation_prompt,
                                       .thinking = input->thinking};
        code = chat_encode(self->chat, self->tokenizer, input->message, input->messages, &options,
                           ret, &failure);
        return code < 0 ? http_fail(error, 400, "messages", "%s", failure.text) : 0;
    }
    const struct prompt_input *prompt = &input->prompt[which];
    if (prompt->text != NULL) {
        code = tokenizer_encode(self->tokenizer, prompt->text, prompt->text_bytes,
                                input->add_special_tokens, true, ret, &failure);
        return code < 0 ? http_fail(error, 400, "prompt", "%s", failure.text) : 0;
    }
    uint32_t needed = prompt->tokens + 1;
    ret->token = realloc(ret->token, needed * sizeof *ret->token);
    ASSERT(ret->token != NULL && "memory for a prompt");
    if (prompt->tokens > 0)
        memcpy(ret->token, prompt->token, prompt->tokens * sizeof *ret->token);
    ret->count = prompt->tokens;
    ret->capacity = needed;
    return 0;
}

/* The first token is a bos that the tokenizer added to the client's text. */
static bool bos_was_added(const struct gateway *self, const struct prompt_input *input,
                          const struct prompt *prompt) {
    int32_t bos = tokenizer_bos(self->tokenizer);
    size_t size = 0;
    const char *bytes = bos < 0 ? NULL : tokenizer_bytes(self->tokenizer, (uint32_t)bos, &size);
    bool in_text =
        bytes != NULL && input->text_bytes >= size && memcmp(input->text, bytes, size) == 0;
    return bos >= 0 && prompt->token[0] == (uint32_t)bos && !in_text;
}

/* The prompt's text, and where each token begins in it, counted in characters. A text prompt comes
 * back as it was sent; token ids are decoded as generated ones are. */
static void decode_echo(const struct gateway *self, const struct request *request,
                        const struct prompt_input *input, struct prompt *prompt) {
    struct detokenizer detokenizer;
    detokenizer_init(&detokenizer, input->text == NULL && request->input.skip_special_tokens);
    struct text decoded = {0};
    char *bytes = NULL;
    size_t capacity = 0;
    prompt->offset = calloc(prompt->tokens, sizeof *prompt->offset);
    ASSERT(prompt->offset != NULL && "memory for an echo");
    bool skip_first = input->text != NULL && bos_was_added(self, input, prompt);
    for (uint32_t i = 0; i <= prompt->tokens; i++) {
        uint32_t token = i < prompt->tokens ? prompt->token[i] : UINT32_MAX;
        if (i < prompt->tokens)
            prompt->offset[i] = prompt->echo_characters;
        if (i == 0 && skip_first)
            continue;
        size_t room = detokenizer_room(self->tokenizer, token);
        if (room > capacity) {
            bytes = realloc(bytes, room);
            ASSERT(bytes != NULL && "memory for an echo");
            capacity = room;
        }
        size_t size = detokenizer_push(&detokenizer, self->tokenizer, token, bytes, capacity);
        prompt->echo_characters += utf8_characters(bytes, size);
        text_append(&decoded, bytes, size);
    }
    free(bytes);
    if (input->text != NULL) {
        text_clear(&decoded);
        text_append(&decoded, input->text, input->text_bytes);
    }
    prompt->echo = decoded;
}

/* Text that is too long however it is cut into tokens is refused before a tokenizer spends a second
 * on it. */
static int check_bytes(const struct gateway *self, const struct generation_request *input,
                       uint32_t which, struct http_error *error) {
    bool chat = input->messages > 0;
    size_t bytes = chat || input->prompt[which].text == NULL ? 0 : input->prompt[which].text_bytes;
    for (uint32_t i = 0; chat && i < input->messages; i++)
        bytes += strlen(input->message[i].content);
    size_t least = bytes / self->longest_token_bytes;
    if (least <= self->context)
        return 0;
    return http_fail(
        error, 400, chat ? "messages" : "prompt",
        "This model's maximum context length is %u tokens. However, the %s have %zu bytes, "
        "which is at least %zu tokens. Please reduce their length.",
        self->context, chat ? "messages" : "prompts", bytes, least);
}

static int check_length(const struct gateway *self, const struct generation_request *input,
                        struct prompt *prompt, struct http_error *error) {
    bool chat = input->endpoint == ENDPOINT_CHAT;
    const char *what = chat ? "messages" : "prompt";
    uint64_t wanted = input->max_tokens == ABSENT ? 0 : (uint64_t)input->max_tokens;
    if (prompt->tokens == 0)
        return http_fail(error, 400, what, "%s must have at least one token, found none", what);
    if (prompt->tokens >= self->context)
        return http_fail(
            error, 400, what,
            "This model's maximum context length is %u tokens. However, the %s %s %u tokens, which "
            "leaves no room for an answer: at most %u were expected. Please reduce the length.",
            self->context, what, chat ? "have" : "has", prompt->tokens, self->context - 1);
    if (prompt->tokens + wanted > self->context)
        return http_fail(
            error, 400, "max_tokens",
            "This model's maximum context length is %u tokens. However, you requested %llu tokens "
            "(%u in the %s, %llu in the completion). Please reduce the length of the %s or "
            "completion.",
            self->context, (unsigned long long)(prompt->tokens + wanted), prompt->tokens, what,
            (unsigned long long)wanted, what);
    uint32_t rest = self->context - prompt->tokens;
    if (wanted > 0)
        prompt->max_tokens = (uint32_t)wanted;
    else if (input->max_tokens == 0)
        prompt->max_tokens =
            1; /* echo only; one token is drawn so that logprobs has prompt + 1 entries */
    else
        prompt->max_tokens = chat || rest < DEFAULT_MAX_TOKENS ? rest : DEFAULT_MAX_TOKENS;
    if (input->min_tokens > (int64_t)prompt->max_tokens)
        return http_fail(error, 400, "min_tokens",
                         "min_tokens must be at most max_tokens = %u, found %lld",
                         prompt->max_tokens, (long long)input->min_tokens);
    return 0;
}

int request_take_prompts(struct gateway *self, struct request *request, struct http_error *error) {
    const struct generation_request *input = &request->input;
    request->prompts = input->messages > 0 ? 1 : input->prompts;
    request->prompt = calloc(request->prompts, sizeof *request->prompt);
    ASSERT(request->prompt != NULL && "memory for prompts");
    for (uint32_t i = 0; i < request->prompts; i++) {
        struct prompt *prompt = &request->prompt[i];
        struct token_list list = {0};
        int code = check_bytes(self, input, i, error);
        if (code == 0)
            code = request_tokenize(self, input, i, &list, error);
        prompt->token = list.token; /* the list's memory becomes the prompt's */
        prompt->tokens = list.count;
        if (code == 0)
            code = check_length(self, input, prompt, error);
        if (code < 0)
            return code;
        request->tokens += prompt->tokens;
        if (self->prompt_tokens + request->tokens > HISTORY_TOKENS_MAX) {
            http_fail(error, 503, NULL,
                      "this gateway holds %llu prompt tokens, no room for %u more",
                      (unsigned long long)self->prompt_tokens, request->tokens);
            error->retry_after_s = 1;
            return ERR_BUSY;
        }
        if (input->echo) {
            decode_echo(self, request, &input->prompt[i], prompt);
            prompt->scored = input->logprobs != ABSENT;
        }
    }
    return 0;
}
