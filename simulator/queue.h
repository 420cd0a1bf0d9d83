/* What is under way in the simulated world: a heap of deliveries ordered by (time, number), so that equal times keep their order. */
#ifndef TROUPE_SIMULATOR_QUEUE_H
#define TROUPE_SIMULATOR_QUEUE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "actors/actor.h"

enum delivery_kind {
    DELIVER_START,
    DELIVER_MESSAGE,     /* bytes: packed control message */
    DELIVER_FRAME,       /* bytes: whole frame, for one incarnation */
    DELIVER_COMPUTED,    /* result */
    DELIVER_LOADED,      /* weights, layer, expert, operation */
    DELIVER_HTTP,        /* http */
    DELIVER_CLIENT_GONE, /* client */
    DELIVER_PEER_LOST,   /* peer, peer_incarnation */
};

struct delivery {
    uint64_t time_ns, number;
    enum delivery_kind kind;
    uint32_t node;
    uint64_t incarnation; /* of the receiver it is for; 0: whoever is there */
    uint8_t *bytes;       /* owned, 64-byte aligned */
    size_t size;
    struct program_result result;
    struct expert_weights *weights; /* owned */
    uint32_t layer, expert;
    uint64_t operation;
    struct failure failure;
    struct http_request *http; /* owned, with its strings in one block */
    uint64_t client;
    actor_id peer;
    uint64_t peer_incarnation;
};

struct queue {
    struct delivery **heap; /* owned */
    uint32_t count, capacity;
    uint64_t next_number;
};

/* Takes `delivery`; numbers it unless it already has a number (put back). */
void queue_push(struct queue *self, struct delivery *delivery);
const struct delivery *queue_peek(const struct queue *self); /* NULL if empty */
struct delivery *queue_pop(struct queue *self);
struct delivery *delivery_new(enum delivery_kind kind, uint32_t node, uint64_t time_ns);
void delivery_free(struct delivery **delivery);
void queue_free(struct queue *self);

#endif
