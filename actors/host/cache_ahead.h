/* Has the system clear memory for the latent cache before a request needs it, in a thread that
 * everybody else goes before. How far it goes ahead of what is used is bounded, so that a large
 * cache on a small machine takes memory only as it is used. */
#ifndef TROUPE_HOST_CACHE_AHEAD_H
#define TROUPE_HOST_CACHE_AHEAD_H

#include "engine/engine.h"

struct cache_ahead;

/* `engine` must outlive it. */
int cache_ahead_open(struct cache_ahead **ret, struct engine *engine, struct failure *failure);
/* After a program: wakes the thread if there is something to do. Costs nothing else. */
void cache_ahead_look(struct cache_ahead *self);
void cache_ahead_close(struct cache_ahead **self);

#endif
