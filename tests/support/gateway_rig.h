/* A gateway actor between hand-made clients, a hand-made coordinator and hand-made attention
 * actors, over a network that may lose, double and reorder control messages. The "model" is a hash
 * of (seed, position, last token), or a script. */
#ifndef TROUPE_TESTS_GATEWAY_RIG_H
#define TROUPE_TESTS_GATEWAY_RIG_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "actors/actors.h"

#define RIG_ATTENTIONS 3
#define RIG_CLIENTS    256
#define RIG_MODEL      "models/demo"

struct rig_sequence {
    uint64_t id, seed;
    uint32_t *token;
    uint32_t tokens, prompt_tokens, given, max_tokens, min_tokens;
    uint32_t told_prompt; /* entries sent unasked: a few with each token */
    bool prompt_logprobs, logprobs, ignore_eos, done;
    uint32_t top;
    float temperature;
    uint32_t stop_token[64], stop_tokens;
    uint64_t bias_version;
};

struct rig_attention {
    actor_id id;
    uint64_t incarnation;
    bool alive;
    int refuse; /* 0, or the code of a REJECTED to every SUBMIT */
    bool lacks_bias; /* it holds those versions only that the gateway has handed it */
    uint64_t bias[8];
    uint32_t biases, bias_asked;
    struct rig_sequence sequence[512];
    uint32_t sequences, submits, cancels;
    uint64_t largest_index; /* tokens generated in all */
};

struct rig_answer {
    uint16_t status;
    char content_type[64], header[64];
    char *text;
    size_t size;
    uint32_t pieces;
    bool last;
};

struct rig_message {
    actor_id to; /* 0: the gateway */
    uint8_t *bytes;
    size_t size;
};

struct rig {
    struct actor *gateway;
    struct effects effects;
    struct settings settings;
    struct model_config config;
    struct tokenizer *tokenizer;
    uint64_t now_ns, epoch, seed;
    uint64_t last_client;
    double loss, duplicate;
    bool reorder;
    bool serving;
    uint32_t bias_number; /* of the version that an epoch names, 0: the model's own; default 4 */
    uint32_t tokens_per_message; /* several at once, default 1 */
    const uint32_t *script;      /* what every sequence generates; then eos */
    uint32_t script_tokens;
    struct rig_attention attention[RIG_ATTENTIONS];
    struct rig_answer answer[RIG_CLIENTS];
    struct rig_message *message;
    uint32_t messages, capacity;
    int exit_code; /* -1: has not left */
};

struct rig_options {
    enum chat_format chat;
    const char *api_key;
    uint32_t attentions; /* READY from the start; default 1 */
    bool apart;          /* do not let it join yet */
    bool view;           /* the live view */
};
struct rig *rig_open(const struct rig_options *options, const struct settings *settings);
void rig_close(struct rig *rig);
void rig_join(struct rig *rig);
/* Publishes an epoch with the attention actors that are alive. */
void rig_commit(struct rig *rig);
/* The coordinator hands over the version of that number, or takes it back. */
uint64_t rig_bias_id(const struct rig *rig, uint32_t number);
void rig_bias(struct rig *rig, uint32_t number);
void rig_bias_release(struct rig *rig, uint32_t number);
void rig_kill(struct rig *rig, uint32_t attention);
void rig_deliver(struct rig *rig, const struct event *event);
void rig_message(struct rig *rig, actor_id from, uint64_t incarnation, message *envelope);

uint64_t rig_http(struct rig *rig, const char *method, const char *path, const char *authorization,
                  const char *body);
/* One tick of a millisecond: messages, one token of every sequence, timers. */
void rig_tick(struct rig *rig);
/* Ticks until the client's answer is complete; false after `ticks`. */
bool rig_wait(struct rig *rig, uint64_t client, uint32_t ticks);
const struct rig_answer *rig_answer(const struct rig *rig, uint64_t client);
/* Until nothing is held any more, in the gateway and in the attention actors. */
bool rig_settles(struct rig *rig, uint32_t ticks);

/* POST, wait, parse. Asserts the status. Caller owns the JSON. */
json_t *rig_post(struct rig *rig, const char *path, const char *body, unsigned status);
json_t *rig_get(struct rig *rig, const char *path, unsigned status);
/* The events of a streamed answer as a list, without [DONE], which must be there. */
json_t *rig_events(const struct rig_answer *answer);
/* All text of one choice of a streamed answer: completions, or delta.content. */
char *rig_stream_text(const json_t *events, uint32_t choice, const char *delta_key);

/* The token that the fake model gives. */
uint32_t rig_next(const struct rig *rig, const struct rig_sequence *sequence);
float rig_logprob(uint32_t token, uint32_t position);

#endif
