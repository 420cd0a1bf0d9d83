/* A doorbell: the one word that an actor thread sleeps on. Whoever has something for the actor (its
 * I/O threads, peers on the same host through shared memory) publishes it first and rings then; the
 * sleeper is woken only if it really sleeps. */
#ifndef TROUPE_HOST_BELL_H
#define TROUPE_HOST_BELL_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "actors/errors.h"

#define BELL_NAME_BYTES 128

/* Lies in shared memory. Peers may scribble over it: the worst that follows is a wake-up too many
 * or one sleep to its timeout, never more. */
struct bell_page {
    uint32_t magic;
    uint64_t incarnation;               /* of the owner */
    _Alignas(64) _Atomic uint32_t rung; /* the futex: how often it was rung */
    _Atomic uint32_t sleeping;
    _Atomic uint32_t wake_at; /* peers wake the sleeper once `rung` has come so far */
    _Atomic uint32_t gone;    /* the owner has closed it */
    _Atomic uint32_t
        rings_made; /* how often a peer made a new ring for the owner (transport_shm.c) */
};

struct bell {
    struct bell_page *page;
    bool owner;
    char name[BELL_NAME_BYTES]; /* "" for a private one */
};

/* Makes a bell; name NULL: private to this process. */
int bell_create(struct bell *ret, const char *name, uint64_t incarnation, struct failure *failure);
/* Opens a peer's bell. ERR_NOT_FOUND if there is none (the peer is gone). */
int bell_open(struct bell *ret, const char *name, uint64_t incarnation, struct failure *failure);
void bell_close(struct bell *self); /* the owner also removes the name; closed already: nothing */

/* True if a sleeper had to be woken by the kernel. Safe in signal handlers. */
bool bell_ring(struct bell *self);
/* The same, but leaves a sleeper alone that waits for more rings than have come. */
bool bell_ring_gently(struct bell *self);
/* Take before looking for work; bell_wait returns at once if it was rung since. */
uint32_t bell_seen(const struct bell *self);
/* `rings`: how many gentle rings since `seen` it takes to be woken, 0 as 1. One that comes before
 * it really sleeps ends the wait whatever `rings` says, so who needs several looks again. */
void bell_wait(struct bell *self, uint32_t seen, uint32_t rings, uint64_t timeout_ns,
               uint64_t spin_ns);

#endif
