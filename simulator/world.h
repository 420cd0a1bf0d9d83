/* A whole troupe in one process on virtual time: the same actors as in the process host, real kernels, every delay, loss and
 * reordering decided by one 64-bit seed. With delays of zero it is also the in-process host of `troupe generate` and `troupe check`. */
#ifndef TROUPE_WORLD_H
#define TROUPE_WORLD_H

#include "actors/actors.h"
#include "model/weights.h"

struct world_options {
    uint64_t seed;
    struct settings settings;
    const struct model *model;
    const struct kernels *kernels;
    struct parallel parallel;
    uint32_t attention, experts, samplers; /* processes of each role; one coordinator */
    struct gateway_options gateway;        /* used if gateway.tokenizer is set: one gateway */
    const struct probe_request *probes;    /* or, instead of a gateway, one probe */
    uint32_t probe_count;
    /* Network, control messages: */
    uint64_t delay_min_ns, delay_max_ns; /* uniform; unequal: messages overtake each other */
    double loss, duplicate;              /* share of control messages */
    /* Data frames: delay only (loss of frames comes with the fault work, and uses the same hooks) */
    uint64_t frame_delay_min_ns, frame_delay_max_ns;
    double frame_loss;
    uint64_t compute_ns; /* virtual duration of every program */
    void (*stream)(void *context, const struct effect *effect); /* STREAM effects of the gateway */
    void *context;
    void (*trace)(void *context, const char *line); /* every step, for people; NULL: none */
};

struct world;
int world_open(struct world **ret, const struct world_options *options, struct failure *failure);
void world_close(struct world **self);
/* Delivers the next event of the whole world; false if nothing is left to happen. */
bool world_step(struct world *self);
uint64_t world_now_ns(const struct world *self);
/* Hash of everything that happened so far: same seed and options, same hash. */
uint64_t world_trace_hash(const struct world *self);
/* Hands an HTTP request to the gateway, now. Strings are copied. */
void world_http(struct world *self, const struct http_request *request);
void world_client_gone(struct world *self, uint64_t client);
struct actor *world_actor(struct world *self, enum role role, uint32_t index); /* probe: ROLE_GATEWAY 0 */
/* Crash (memory gone) and restart under a new incarnation; for the first fault tests. */
void world_kill(struct world *self, enum role role, uint32_t index);
void world_restart(struct world *self, enum role role, uint32_t index);

#endif
