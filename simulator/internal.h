/* What the files of the simulated world share:
 *   world.c     nodes, what happens next, deliveries
 *   carry.c     effects carried out
 *   network.c   what becomes of messages and frames on their way
 *   outside.c   clients, crashes, pauses */
#ifndef TROUPE_SIMULATOR_INTERNAL_H
#define TROUPE_SIMULATOR_INTERNAL_H

#include "simulator/queue.h"
#include "simulator/random.h"
#include "simulator/world.h"

#define NAME_BYTES 48
#define COMPUTED_MAX (2 * LAYERS_MAX + 64)
#define WOKEN_AT_ONCE_MAX 1000u

struct connection {
    actor_id id;
    uint32_t node;
    uint64_t incarnation;
    bool known;
};

struct node {
    enum role role;
    uint32_t index;
    char name[NAME_BYTES], address[sizeof "sim://" + NAME_BYTES];
    struct actor_identity identity;
    struct actor *actor;
    struct engine *engine;
    struct effects effects;
    bool alive;
    uint64_t busy_until_ns, paused_until_ns;
    uint64_t restart_at_ns; /* while not alive; NEVER: stays so */
    bool for_good;          /* nothing starts it again */
    struct connection peer[ACTORS_MAX]; /* by actor id, modulo the table: ids grow, few are alive */
    struct program_result computed[COMPUTED_MAX];
    uint32_t computed_first, computed_count;
    uint8_t *frame; /* the last one, for as long as programs may read it; NULL: none */
    uint64_t woken_ns; /* by its own deadline, last */
    uint32_t woken;    /* and how often at this one time */
};

struct world {
    struct world_options options;
    struct random random;
    struct queue queue;
    struct node *node;
    uint32_t nodes;
    uint64_t now_ns, hash, last_incarnation;
};

/* world.c */
void world_hash(struct world *self, const void *bytes, size_t size);
void world_hash_word(struct world *self, uint64_t word);
void world_trace(struct world *self, const struct node *node, const char *what);
struct node *world_node(const struct world *self, struct place place); /* NULL: there is none */
static inline struct place node_place(const struct node *node) {
    return (struct place){node->role, node->index};
}
/* When the node can take its next event. */
static inline uint64_t node_free_ns(const struct world *self, const struct node *node) {
    uint64_t free_ns = node->busy_until_ns > node->paused_until_ns ? node->busy_until_ns : node->paused_until_ns;
    return free_ns > self->now_ns ? free_ns : self->now_ns;
}
void node_start(struct world *self, struct node *node);
void node_stop(struct world *self, struct node *node);

/* carry.c: false: the process has ended. */
bool world_carry_out(struct world *self, struct node *node, const struct effect *effect);
uint8_t *world_bytes(size_t size); /* aligned as frames are */

/* network.c: a message or frame sets out at `time_ns`. */
void network_send_message(struct world *self, const struct node *from, uint32_t to, const uint8_t *bytes, size_t size,
                          uint64_t time_ns);
/* Takes `bytes`. `incarnation`: the life of the receiver that it is for. */
void network_send_frame(struct world *self, const struct node *from, uint32_t to, uint64_t incarnation, uint8_t *bytes,
                        size_t size, uint64_t time_ns);
/* How many times as long as usual the node takes for everything now. */
uint64_t network_slowness(const struct world *self, const struct node *node);

/* outside.c */
void outside_tell_end(struct world *self, const struct node *node); /* the supervisor and the peers notice */

#endif
