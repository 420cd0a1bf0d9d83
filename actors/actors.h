/* How each role's actor is made. All are pure state machines behind actors/actor.h; each file opens with its states and invariants. */
#ifndef TROUPE_ACTORS_H
#define TROUPE_ACTORS_H

#include "actors/actor.h"
#include "config/settings.h"
#include "model/chat.h"
#include "model/config.h"
#include "model/tokenizer.h"

/* Everything given is copied, but for `tokenizer`, which must outlive the gateway. */
struct actor *attention_create(const struct actor_identity *identity, const struct settings *settings,
                               const struct model_config *config);
struct actor *expert_create(const struct actor_identity *identity, const struct settings *settings,
                            const struct model_config *config, uint64_t capacity_bytes);
/* Where an expert's weights come from. AUTO: from another process that holds them if none of those is on the same host (which has the
 * file in memory), else from the file; FILE, PEER: always. What nobody gives is read from the file, except with PEER. */
enum weights_from { WEIGHTS_AUTO, WEIGHTS_FILE, WEIGHTS_PEER };
void expert_set_weights(struct actor *expert, enum weights_from weights); /* right after expert_create; AUTO without it */
struct actor *sampler_create(const struct actor_identity *identity, const struct settings *settings,
                             const struct model_config *config);
struct actor *coordinator_create(const struct actor_identity *identity,
                                 const struct settings *settings, const struct model_config *config);
/* Admin requests (EVENT_HTTP_REQUEST) must then carry it as a bearer token. Copied; NULL: none asked for. */
void coordinator_set_admin_token(struct actor *coordinator, const char *token);
/* Before anybody joins: the version of the routing bias that it begins with, deltas [layers, experts]. Copied. */
void coordinator_set_bias(struct actor *coordinator, const float *delta);

/* POST /fault is then taken. */
void coordinator_allow_faults(struct actor *coordinator);

struct gateway_options {
    const char *served_model; /* name in /v1/models */
    const char *api_key;      /* NULL: none asked for */
    const char *version;      /* of troupe */
    const struct tokenizer *tokenizer;
    enum chat_format chat;
    char chat_error[FAILURE_TEXT_BYTES]; /* why chat is CHAT_NONE */
    int64_t unix_offset_ns; /* unix time in ns = now_ns + this */
    bool view;              /* serve the live view: / and /troupe/events */
    bool allow_faults;      /* the live view says that the admin address takes them */
};
struct actor *gateway_create(const struct actor_identity *identity, const struct settings *settings,
                             const struct model_config *config, const struct gateway_options *options);

/* A probe sits in a gateway's place (it joins with ROLE_GATEWAY), submits given sequences and keeps every answer: for
 * `troupe check --golden` and tests. `answers` is owned by the probe. */
struct probe_request {
    const uint32_t *token;
    uint32_t tokens;        /* prompt */
    uint32_t max_tokens;    /* 0: only score the prompt */
    bool full_logits;       /* of every prompt position */
    bool logprobs;
    uint32_t top_logprobs;
    float temperature, top_p;
    uint64_t seed;
};
struct probe_answer {
    bool done;
    int error; /* 0 or negative */
    uint32_t *token; /* generated */
    float *logprob;
    uint32_t tokens;
    float *logits; /* [prompt tokens, vocabulary], full_logits only */
    uint32_t logits_rows;
};
struct actor *probe_create(const struct actor_identity *identity, const struct settings *settings,
                           const struct model_config *config, const struct probe_request *requests,
                           uint32_t count);
bool probe_done(const struct actor *probe);
const struct probe_answer *probe_answer(const struct actor *probe, uint32_t index);

#endif
