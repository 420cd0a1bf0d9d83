/* A whole troupe in one process on virtual time: the same actors as in the process host, real kernels, every delay, loss, reordering and
 * crash decided by one 64-bit seed. With delays of zero it is also the in-process host of `troupe generate` and `troupe check`. */
#ifndef TROUPE_WORLD_H
#define TROUPE_WORLD_H

#include "actors/actors.h"
#include "model/weights.h"
#include "simulator/faults.h"

/* Somebody who looks on and changes nothing; each may be NULL. */
struct world_watch {
    void *context;
    void (*effect)(void *context, struct place who, const struct effect *effect); /* before it is carried out */
    void (*message)(void *context, struct place to, const message *envelope);     /* before it is stepped */
    void (*ended)(void *context, struct place who); /* a process has crashed or left */
    void (*lied)(void *context, struct place who);  /* a fault has falsified one of its rows */
    void (*spins)(void *context, struct place who); /* its deadline stays in the past: it is woken again and again */
};

struct world_options {
    uint64_t seed;
    struct settings settings;
    const struct model *model;
    const struct kernels *kernels;
    const struct resident_operations *resident; /* used if settings.resident */
    struct parallel parallel;
    uint32_t attention, experts, samplers; /* processes of each role; one coordinator */
    uint32_t fileless; /* so many expert processes, the last ones, have no file of weights */
    bool apart;        /* every process has a host of its own */
    struct gateway_options gateway;        /* used if gateway.tokenizer is set: one gateway */
    const struct probe_request *probes;    /* or, instead of a gateway, one probe */
    uint32_t probe_count;
    /* Network, always there. Control messages: */
    uint64_t delay_min_ns, delay_max_ns; /* uniform; unequal: messages overtake each other */
    double loss, duplicate;              /* share of control messages */
    /* Data frames: */
    uint64_t frame_delay_min_ns, frame_delay_max_ns;
    double frame_loss;
    bool frames_find_any_life; /* a frame reaches whoever lives at the address now, not only the life it was meant for */
    uint64_t compute_ns;       /* virtual duration of every program */
    uint64_t load_ns;          /* of loading one expert; 0: compute_ns */
    struct faults *faults;     /* of links, loads and speed (crashes and pauses are the caller's to begin); NULL: none */
    uint64_t restart_ns;       /* a process that exits is started again after this long; 0: never */
    void (*stream)(void *context, const struct effect *effect); /* STREAM effects of the gateway */
    void *context;
    void (*trace)(void *context, const char *line); /* every step, for people; NULL: none */
    const struct world_watch *watch;                /* NULL: nobody */
};

struct world;
int world_open(struct world **ret, const struct world_options *options, struct failure *failure);
void world_close(struct world **self);
/* Delivers the next event of the whole world; false if nothing is left to happen. */
bool world_step(struct world *self);
/* When that will be; NEVER: nothing is left. */
uint64_t world_next_ns(const struct world *self);
/* Lets time pass up to `now_ns`, at most to world_next_ns(). */
void world_wait(struct world *self, uint64_t now_ns);
uint64_t world_now_ns(const struct world *self);
/* Hash of everything that happened so far: same seed and options, same hash. */
uint64_t world_trace_hash(const struct world *self);
/* From now on the network loses and doubles nothing and is quick. */
void world_calm(struct world *self);
/* Hands an HTTP request to the gateway, now; it is lost if that is not alive. Strings are copied. */
void world_http(struct world *self, const struct http_request *request);
/* The same to the coordinator's admin interface. */
void world_admin(struct world *self, const struct http_request *request);
void world_client_gone(struct world *self, uint64_t client);
struct actor *world_actor(struct world *self, enum role role, uint32_t index); /* probe: ROLE_GATEWAY 0; NULL: not alive */
/* The process of this role and number: there is one, alive or not. */
bool world_has(const struct world *self, struct place place);
bool world_lost_for_good(const struct world *self, struct place place);
bool world_holds(const struct world *self, uint32_t expert_process, uint32_t layer, uint32_t expert);
/* Crash (memory gone) and restart under a new incarnation. */
void world_kill(struct world *self, enum role role, uint32_t index);
void world_restart(struct world *self, enum role role, uint32_t index);
/* As world_kill, started again after `for_ns`, unless that is FOR_GOOD. `silent`: nobody is told. */
void world_crash(struct world *self, struct place place, uint64_t for_ns, bool silent);
/* SIGSTOP, and SIGCONT at `until_ns`. */
void world_pause(struct world *self, struct place place, uint64_t until_ns);

#endif
