/* Faults between an actor and the world, for tests on real processes. Only in processes started with --allow-faults; others
 * have no injector and pay one comparison with NULL.
 *
 * Rules come as datagrams to a socket in the run directory, "<name>.faults":
 *   KIND share X for MS by MS layer N seed N
 * Whether a rule strikes is drawn from its seed. A rule ends after its time, 0: never. */
#ifndef TROUPE_HOST_INJECT_H
#define TROUPE_HOST_INJECT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "actors/actor.h"
#include "actors/host/bell.h"
#include "actors/host/chaos_plan.h"
#include "actors/host/transport.h"

struct inject;

int inject_open(struct inject **ret, const char *run_dir, const char *name, struct bell *bell,
                struct failure *failure);
void inject_close(struct inject **self);
/* From outside: false if nobody took the rule. */
bool inject_tell(const char *run_dir, const char *name, const char *rule);

/* The actor's thread asks before it does something. */
enum injected {
    INJECT_NOTHING,
    INJECT_DROP,
    INJECT_TWICE,
    INJECT_LATER, /* inject_hold it */
};
enum injected inject_message(struct inject *self); /* a control message goes out */
/* A frame goes out; may ask for damage to it. */
enum injected inject_frame(struct inject *self, struct outgoing *frame);
bool inject_deaf(struct inject *self); /* what comes in is not heard */
/* Before a computation: may sleep, or end or stop the process. */
void inject_compute(struct inject *self, const struct program *program);
/* 0, or the error with which loading fails. */
int inject_load(struct inject *self);

/* Things that go out later: `frame` is written now. */
void inject_hold_message(struct inject *self, actor_id to, void *bytes, size_t size);
void inject_hold_frame(struct inject *self, actor_id to, const struct outgoing *frame);
struct held {
    struct held *next;
    uint64_t due_ns;
    actor_id to;
    bool is_frame;
    size_t size;
    void *bytes; /* owned */
    struct outgoing frame;
};
/* The next that is due, to be freed with held_free. NULL: none; `ret_due_ns` is then when. */
struct held *inject_due(struct inject *self, uint64_t now_ns, uint64_t *ret_due_ns);
void held_free(struct held **self);

#endif
