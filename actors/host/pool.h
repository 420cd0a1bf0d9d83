/* The thread pool behind struct parallel: fork and join over futexes. A thread that has nothing to do
 * looks for more for some tens of microseconds, then sleeps. */
#ifndef TROUPE_HOST_POOL_H
#define TROUPE_HOST_POOL_H

#include "actors/errors.h"
#include "kernels/parallel.h"

struct pool;

/* `width` threads in all: the one that calls run, and width - 1 of its own. Width 1 starts none. */
int pool_open(struct pool **ret, int width, struct failure *failure);
void pool_close(struct pool **self);
struct parallel pool_parallel(struct pool *self);

/* Between these two calls jobs follow each other: threads look for the next one instead of going to sleep, and those
 * that sleep are woken at once if jobs came in the last such time. */
void pool_begin(struct pool *self);
void pool_end(struct pool *self);

/* Processors that this process may run on, 1 to 1024. */
int pool_processors(void);

#endif
