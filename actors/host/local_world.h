/* The in-process troupe behind `generate` and `check --golden`: the same actors as in serving, with
 * delays of zero. */
#ifndef TROUPE_HOST_LOCAL_WORLD_H
#define TROUPE_HOST_LOCAL_WORLD_H

#include "actors/host/files.h"
#include "actors/host/options.h"
#include "actors/host/pool.h"
#include "simulator/world.h"

struct local_world {
    struct model_directory directory;
    const struct kernels *kernels;
    struct pool *pool;
    struct world *world;
};

/* Opens the model; a world follows with local_world_start. */
int local_world_open(struct local_world *ret, const char *model, const struct options *options,
                     struct failure *failure);
int local_world_start(struct local_world *self, const struct options *options,
                      const struct probe_request *requests, uint32_t count,
                      struct failure *failure);
void local_world_close(struct local_world *self);

#endif
