/* What became of the newest requests, and when: GET /troupe/requests and /troupe/requests/ID.
 *
 * Every request has an entry in a ring: its phases and which attention actors ran it. One that asks for
 * it (X-Troupe-Trace, X-Request-Id, or a traceparent whose sampled flag is set) is traced: attention
 * actors then say where its steps spent their time, layer by layer, and who computed its rows. Memory is
 * bounded: the ring, TRACE_LEGS_MAX runs of each entry, and the arrays of those that are traced. */
#ifndef TROUPE_REQUEST_TRACE_H
#define TROUPE_REQUEST_TRACE_H

#include "actors/actor.h"
#include "actors/gateway/json_text.h"
#include "actors/gateway/metrics.h"

#define REQUEST_TRACES       256u
#define TRACE_LEGS_MAX       8u
#define TRACE_SERVERS_MAX    512u
#define TRACE_STAGES         4u /* of a layer: attention, dispatch, experts, combine */
#define TRACE_ID_BYTES       80u

struct server {
    actor_id id;
    uint64_t rows;
};
struct server_list {
    struct server *server; /* [servers] */
    uint32_t servers, capacity;
    actor_id sampler;
};
/* At most TRACE_SERVERS_MAX different ones are told apart. */
void server_list_add(struct server_list *self, const Troupe__Trace *trace);
void server_list_free(struct server_list *self);

/* A run of one of its sequences at one attention actor. */
struct trace_leg {
    uint32_t choice, tokens;
    actor_id actor;
    uint64_t placed_ns, queue_ns, first_ns, last_ns; /* NEVER: not yet */
    uint64_t steps, step_ns, prefill_ns, sample_ns, resent, hedged;
    uint64_t *layer_ns; /* [layers * TRACE_STAGES], NULL: nothing has been told */
};

struct request;
struct request_trace {
    struct request *request; /* NULL: it has ended */
    char id[TRACE_ID_BYTES];
    char trace[33], parent[17], span[17]; /* W3C Trace Context, hexadecimal; "": none */
    bool detailed, show;                  /* traced; chunks say who served them */
    uint64_t arrived_ns, first_ns, last_ns, ended_ns, queue_ns;
    uint32_t prompt_tokens, tokens, choices;
    enum metric_finish finish;
    struct trace_leg leg[TRACE_LEGS_MAX];
    uint32_t legs; /* in all; of more than TRACE_LEGS_MAX the last place holds the newest */
    struct server_list served;
};

struct request_traces {
    struct request_trace *ring; /* [REQUEST_TRACES], NULL: none yet */
    uint64_t count;             /* number n is at n % REQUEST_TRACES */
};

struct gateway;
struct choice;

void request_traces_free(struct request_traces *self);
/* A request with its id has begun; takes the oldest entry's place. */
void trace_request(struct gateway *self, struct request *request, const struct http_request *http,
                   uint64_t now_ns);
void trace_placed(struct choice *choice, uint64_t now_ns);
void trace_tokens(struct gateway *self, struct choice *choice, const Troupe__Tokens *tokens,
                  uint32_t taken, uint64_t now_ns);
void trace_ended(struct request *request, enum metric_finish finish, uint64_t now_ns);
/* ,"troupe":{...}: who computed what the chunk shows. Forgets it. */
void trace_write_served(struct text *out, const struct gateway *self, struct choice *choice);
/* "Name: value" for the answer; in the effects' arena. */
const char *trace_header(const struct request *request, struct effects *out);
void trace_write_list(struct text *out, const struct gateway *self);
bool trace_write(struct text *out, const struct gateway *self, const char *id);

#endif
