/* Inside the gateway: requests, their sequences and the attention actors that run them. Only
 * actors/gateway includes this.
 *
 * A request (one HTTP body) has prompts; each prompt has n choices, and each choice is one sequence
 * of an attention actor.
 *
 *   choice     WAITING   nobody runs it: no attention actor is READY, all are busy, or the one that
 * ran it is gone PLACED    SUBMIT has been sent to `actor`; tokens come, POLL after silence
 *              FINISHED  stop, length or abort; the attention actor has been told to forget it (see
 * struct closing)
 */
#ifndef TROUPE_GATEWAY_H
#define TROUPE_GATEWAY_H

#include "actors/actors.h"
#include "actors/bias_table.h"
#include "actors/gateway/events.h"
#include "actors/gateway/metrics.h"
#include "actors/gateway/openai_request.h"
#include "actors/gateway/reasoning.h"
#include "actors/gateway/request_trace.h"
#include "actors/gateway/stop.h"
#include "actors/member.h"

#define NS_PER_MS        1000000ull
#define CHOICE_SLOT_BITS 20
#define AFFINITY_PAIRS   16384

/* Tokens with their log-probabilities; the alternatives of all lie in one array. */
struct alternative {
    uint32_t token;
    float logprob;
};
struct scored_list {
    struct scored {
        uint32_t token;
        float logprob;
        uint32_t first, alternatives; /* in `alternative`, best first */
        uint64_t offset;              /* characters of text before this token */
    } * entry;
    uint32_t count, capacity;
    struct alternative *alternative;
    uint32_t alternatives, alternatives_capacity;
};
void scored_list_add(struct scored_list *self, const Troupe__Token *token,
                     uint32_t most_alternatives, uint64_t offset);
void scored_list_clear(struct scored_list *self);
void scored_list_free(struct scored_list *self);

struct prompt {
    uint32_t *token; /* [tokens] */
    uint32_t tokens;
    uint32_t max_tokens; /* generated tokens of each of its sequences */
    struct text echo;    /* echo: the prompt as text */
    uint64_t echo_characters;
    uint64_t *offset;         /* echo with logprobs: characters before each token [tokens] */
    struct scored_list score; /* entry i: token i + 1; filled by the prompt's first sequence */
    bool scored;              /* entries are asked for */
};
static inline bool prompt_complete(const struct prompt *self) {
    return !self->scored || self->score.count + 1 >= self->tokens;
}

enum choice_state { CHOICE_WAITING, CHOICE_PLACED, CHOICE_FINISHED };
enum finish { FINISH_NOT, FINISH_AT_STOP, FINISH_AT_LENGTH };

struct choice {
    uint64_t id;
    struct request *request;
    struct prompt *prompt;
    uint32_t index; /* of the choice in the answer: prompt x n + choice */
    bool scorer;    /* asks for the prompt's scores */
    uint64_t seed;
    enum choice_state state;
    actor_id actor;
    uint64_t incarnation;
    uint64_t waiting_since_ns, deadline_ns;
    bool gap_polled; /* a gap has been asked for */
    uint32_t load;   /* what it adds to its actor's outstanding tokens */
    uint64_t accepted_drafts, rejected_drafts; /* guessed tokens, of actors that it has left */
    uint32_t accepted_now, rejected_now;       /* of the one that runs it */
    bool cached_known;      /* the first answer has come */
    uint32_t cached_tokens; /* of the prompt: its first attention actor had them in its prefix cache */

    uint32_t *token; /* generated [tokens] */
    uint32_t tokens, tokens_capacity;
    struct scored_list score; /* of generated tokens; streaming: those not yet sent */
    struct detokenizer detokenizer;
    struct stop_filter stop;
    struct reasoning reasoning;
    struct text thought, answer; /* streaming: what is not yet sent */
    uint64_t characters;         /* decoded so far */
    enum finish finish;
    int64_t stop_token; /* FINISH_AT_STOP by one of stop_token_ids: which; -1 */
    uint32_t sent_tokens;
    bool begun, ended; /* its first, its last chunk has been sent */
    uint32_t seen_before; /* tokens whose text the client has from an earlier connection */
    bool told_end;        /* it has also been told how the choice ended */
    bool sent;            /* a chunk has been sent over this connection */
    uint64_t first_token_ns, last_token_ns;
    uint64_t placed_ns;          /* first, at anybody; 0: not yet */
    uint64_t queue_ns;           /* from the request's arrival to the first step */
    struct server_list served;   /* traced: who computed what is not yet sent */
};

struct request {
    uint64_t client;
    struct generation_request input;
    char id[80];
    int64_t created_s;
    uint64_t arrived_ns;
    struct prompt *prompt; /* [prompts] */
    uint32_t prompts;
    struct choice **choice; /* [choices] */
    uint32_t choices, ended;
    uint32_t tokens; /* of all prompts */
    uint32_t place;  /* in gateway.request */
    bool begun;      /* the HTTP status has been sent */
    bool admitted; /* an attention actor has answered one of its choices: it is not refused any more
                    */
    bool starts_in_reasoning;
    bool resumable; /* events carry ids */
    bool named;     /* by the client, in X-Request-Id */
    bool names_version; /* it goes on with bias_version, that its stream began with */
    bool pinned;        /* bias_version is fixed, and kept in gateway.bias until the request ends */
    uint64_t bias_version;
    struct request_trace *trace; /* NULL: its entry has been given to a newer one */
};

/* An attention actor as this gateway uses it. */
struct upstream {
    actor_id id;
    uint64_t incarnation;
    uint64_t outstanding; /* tokens of the sequences placed there */
    uint64_t busy_until_ns;
};

/* A sequence that its attention actor was told to forget. CANCEL may be lost: after poll_ms the
 * actor is asked with POLL, and only REJECTED(unknown), or the actor's end, closes it. */
struct closing {
    uint64_t sequence;
    actor_id actor;
    uint64_t incarnation;
    uint64_t deadline_ns;
};

struct gateway {
    struct actor actor;
    struct member member;
    struct settings settings;
    struct model_config config;
    const struct tokenizer *tokenizer;
    enum chat_format chat;
    char *served_model, *api_key, *version;
    char chat_error[FAILURE_TEXT_BYTES];
    int64_t unix_offset_ns;
    uint32_t context; /* positions that a request may use */
    size_t longest_token_bytes;
    struct request_limits limits;
    uint64_t poll_ns, retry_ns, submit_timeout_ns;

    struct bias_table bias; /* versions of the routing bias: the whole of what pinned requests can be run with again */
    struct request **request; /* [requests] */
    uint32_t requests, requests_capacity;
    uint64_t prompt_tokens; /* held by all requests; at most HISTORY_TOKENS_MAX */
    struct choice **slot;   /* by the low bits of a sequence's id; NULL: free */
    uint32_t slots;
    uint32_t *free_slot; /* [free_slots] */
    uint32_t free_slots;
    uint64_t counter;      /* of sequences and requests made */
    uint64_t sequence_key; /* makes ids differ between gateways */
    struct upstream *upstream;
    uint32_t upstreams, upstreams_capacity;
    uint64_t affinity[AFFINITY_PAIRS]; /* names of (block of a prompt, attention actor); 0: none */
    uint64_t *affinity_block;          /* [affinity_blocks] of the choice that is being placed */
    uint32_t affinity_blocks, affinity_blocks_capacity;
    struct closing *closing;
    uint32_t closings, closings_capacity;
    uint64_t wake_ns; /* no deadline of a sequence or closing is earlier */

    struct metrics metrics;
    struct request_traces traces;
    struct cluster_view cluster;
    bool view;         /* the live view may be looked at */
    bool allow_faults; /* the admin address takes them */
    struct event_feed feed;
    struct text line; /* scratch for what is being sent */
    char description[160];
};

/* Grows an array to hold `needed` elements; the new ones are zero. */
void *gateway_grow(void *array, uint32_t *capacity, uint32_t needed, size_t element);
uint64_t gateway_mix(uint64_t a, uint64_t b); /* two numbers into one, well spread */

/* request_life.c: from a body to the last byte of its answer. */
void request_begin(struct gateway *self, enum endpoint endpoint, const struct http_request *http,
                   uint64_t now_ns, struct effects *out);
/* Ends the request with an error, as HTTP status or, if the answer has begun, as an event. Frees
 * it. */
void request_fail(struct gateway *self, struct request *request, const struct http_error *error,
                  uint64_t now_ns, struct effects *out);
/* The client is gone: everything is cancelled and freed. */
void request_abort(struct gateway *self, struct request *request, uint64_t now_ns,
                   struct effects *out);
/* Sends what a choice has to show. May complete the request and free it: then true. */
bool request_emit(struct gateway *self, struct choice *choice, uint64_t now_ns,
                  struct effects *out);

/* request_prompt.c: prompts -> tokens. */
int request_tokenize(const struct gateway *self, const struct generation_request *input,
                     uint32_t which, struct token_list *ret, struct http_error *error);
/* Fills request->prompt, checked against the context. */
int request_take_prompts(struct gateway *self, struct request *request, struct http_error *error);

/* choice.c: one choice's tokens and text. */
struct choice *choice_create(struct gateway *self, struct request *request, struct prompt *prompt,
                             uint32_t index);
void choice_free(struct gateway *self, struct choice **choice);
struct choice *choice_find(const struct gateway *self, uint64_t id);
/* Takes the next token: history, logprobs, text, and whether it ends here. */
void choice_accept(struct gateway *self, struct choice *choice, const Troupe__Token *token);
/* No more tokens: what was held back is text. */
void choice_finish(struct gateway *self, struct choice *choice, enum finish finish);
/* Nothing more is wanted of its attention actor. */
bool choice_complete(const struct choice *choice);

/* upstream.c: which attention actor runs a choice. */
/* Submits a WAITING choice if somebody can take it. False: the request has been refused and freed.
 */
bool upstream_place(struct gateway *self, struct choice *choice, uint64_t now_ns,
                    struct effects *out);
/* A PLACED choice leaves its actor and becomes WAITING. `tell`: the actor is told to forget it,
 * until it has. */
void upstream_leave(struct gateway *self, struct choice *choice, bool tell, uint64_t now_ns,
                    struct effects *out);
/* The actor wants the bias version of the request: it is sent, and SUBMIT again. */
void upstream_send_bias(struct gateway *self, struct choice *choice, uint64_t now_ns,
                        struct effects *out);
void upstream_unpin(struct gateway *self, struct request *request);
void upstream_poll(struct gateway *self, struct choice *choice, uint64_t now_ns,
                   struct effects *out);
/* The actor is told to forget the sequence, until it has. */
void upstream_cancel(struct gateway *self, uint64_t sequence, actor_id actor, uint64_t incarnation,
                     uint64_t now_ns, struct effects *out);
/* This actor has no room now. */
void upstream_busy(struct gateway *self, actor_id actor, uint64_t incarnation, uint64_t now_ns);
/* A new epoch, or a lost peer: choices whose actor is gone, and those that wait, are placed. */
void upstream_review(struct gateway *self, uint64_t now_ns, struct effects *out);
/* The actor does not know the sequence (any more). */
void upstream_closed(struct gateway *self, uint64_t sequence, actor_id actor);
/* What is due of choices and closings. */
void upstream_timer(struct gateway *self, uint64_t now_ns, struct effects *out);

/* affinity.c: who has seen a prompt's beginning before. */
void affinity_look(struct gateway *self, const struct choice *choice); /* the two below are about it */
uint32_t affinity_tokens(const struct gateway *self, const struct upstream *upstream);
void affinity_note(struct gateway *self, const struct upstream *upstream); /* it is placed there */

/* tokens.c: what attention actors answer. */
void tokens_take(struct gateway *self, const message *envelope, uint64_t now_ns,
                 struct effects *out);
void tokens_rejected(struct gateway *self, const message *envelope, uint64_t now_ns,
                     struct effects *out);

/* gateway_routes.c: paths, methods, keys, and the endpoints that answer at once. */
void gateway_route(struct gateway *self, const struct http_request *http, uint64_t now_ns,
                   struct effects *out);
void gateway_answer(struct gateway *self, uint64_t client, uint16_t status,
                    const char *content_type, const char *extra_header, const struct text *body,
                    struct effects *out);
void gateway_answer_error(struct gateway *self, uint64_t client, const struct http_error *error,
                          struct effects *out);
/* What the live view's feed is about, as it is now. */
struct event_source gateway_event_source(const struct gateway *self);
void gateway_count(const struct gateway *self, uint32_t *ret_running, uint32_t *ret_waiting);

/* openai_completion.c, openai_chat.c: the bodies. A chunk shows what the choice has not yet sent.
 */
void completion_write(struct text *out, const struct gateway *self, const struct request *request);
void completion_write_chunk(struct text *out, const struct gateway *self, struct choice *choice);
void chat_write(struct text *out, const struct gateway *self, const struct request *request);
void chat_write_chunk(struct text *out, const struct gateway *self, struct choice *choice);

/* resume.c: streams that go on over another connection. */
void resume_write_id(struct text *out, const struct request *request);
/* Takes a Last-Event-ID; NULL or empty: nothing has been seen. */
int resume_take_id(struct request *request, const char *id, struct http_error *error);
void resume_leave_out(struct choice *choice); /* what the client has already */
uint64_t resume_seed(const struct request *request, uint32_t choice);

/* openai_answer.c: what both share. */
void answer_write_head(struct text *out, const struct gateway *self, const struct request *request,
                       const char *object);
void answer_write_usage(struct text *out,
                        const struct request *request); /* {"prompt_tokens": ...} */
void answer_write_usage_chunk(struct text *out, const struct gateway *self,
                              const struct request *request);
void answer_write_finish(struct text *out,
                         const struct choice *choice); /* ,"finish_reason":..,"stop_reason":.. */
void answer_write_tokens(struct text *out, const uint32_t *token, uint32_t count);
/* A token as a JSON string that names it unambiguously, for completions: its text, or "bytes:\\x.."
 * where it is no whole UTF-8. */
void answer_write_token_name(struct text *out, const struct gateway *self,
                             const struct request *request, uint32_t token);
const char *answer_object(const struct request *request, bool chunk);

#endif
