/* POST /v1/completions, /v1/chat/completions, /tokenize and /detokenize: JSON -> a checked request.
 * Pure. */
#ifndef TROUPE_OPENAI_REQUEST_H
#define TROUPE_OPENAI_REQUEST_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "actors/gateway/http_error.h"
#include "actors/gateway/stop.h"
#include "actors/limits.h"
#include "model/chat.h"

enum endpoint {
    ENDPOINT_COMPLETIONS = 1,
    ENDPOINT_CHAT = 2,
    ENDPOINT_TOKENIZE = 4,
    ENDPOINT_DETOKENIZE = 8,
};

/* What requests are measured against, and the model's own defaults. */
struct request_limits {
    const char *served_model;
    uint32_t vocabulary, max_choices, max_logprobs, max_sequences;
    double default_temperature, default_top_p;
    int64_t default_top_k;
};

#define ABSENT INT64_MIN /* an optional integer that was not given */

/* A prompt as the client wrote it: text, or token ids. */
struct prompt_input {
    const char *text; /* NULL: `token` holds ids */
    size_t text_bytes;
    uint32_t *token;
    uint32_t tokens;
};

struct generation_request {
    enum endpoint endpoint;
    struct prompt_input *prompt; /* [prompts]; chat: none, see message */
    uint32_t prompts;
    struct chat_message *message; /* [messages] */
    uint32_t messages;
    bool add_generation_prompt, thinking, add_special_tokens, return_token_strs;

    bool stream, include_usage, continuous_usage_stats;
    bool echo, ignore_eos, return_token_ids, tokens_as_ids;
    bool skip_special_tokens, include_stop;
    int64_t n, max_tokens, max_completion_tokens, min_tokens, top_k,
        seed;         /* ABSENT where optional */
    int64_t priority; /* the smaller, the earlier; 0 by default */
    int64_t logprobs; /* number of alternatives per token; ABSENT: no logprobs at all */
    double temperature, top_p, min_p;
    double repetition_penalty, presence_penalty, frequency_penalty;
    struct stop_strings stop;
    uint32_t stop_token[STOP_TOKENS_MAX], stop_tokens;
    uint32_t *bias_token; /* [biases] */
    float *bias_value;
    uint32_t biases;

    bool chat_logprobs;   /* the boolean of the chat endpoint; folded into `logprobs` */
    int64_t top_logprobs; /* likewise */
    json_t *root;         /* owns the strings above */
};

/* 0, or ERR_INVALID with status, field and text in `error`; then nothing has to be freed. */
int request_parse(struct generation_request *ret, enum endpoint endpoint, const char *body,
                  size_t body_bytes, const struct request_limits *limits, struct http_error *error);
void request_free(struct generation_request *self);

/* Bytes -> JSON object, with limits on size, nesting and number of values, without duplicate keys.
 */
int request_parse_json(json_t **ret, const char *body, size_t body_bytes, struct http_error *error);

#endif
