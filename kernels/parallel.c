/* The serial form of fork and join. */
#include "kernels/parallel.h"

#include <stddef.h>

static void run_serially(void *pool, void (*task)(void *argument, int part, int parts),
                         void *argument, int parts) {
    (void)pool;
    for (int part = 0; part < parts; part++)
        task(argument, part, parts);
}

const struct parallel PARALLEL_SERIAL = {run_serially, NULL, 1};
