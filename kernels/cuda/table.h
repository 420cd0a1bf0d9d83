/* The device as struct kernels. Linked where CUDA is (or, in tests, the emulator). */
#ifndef TROUPE_CUDA_TABLE_H
#define TROUPE_CUDA_TABLE_H

#include "kernels/ops.h"

/* The table on the calling thread's current device: the bf16 profile with own bits, so a troupe
 * must not mix it with others (process_open.c names its numerics "bf16-sm90"). One for the process,
 * one thread at a time. `name` is kept. */
const struct kernels *kernels_cuda(const char *name, struct failure *failure);
/* Whether a model's attention has kernels; else ERR_UNSUPPORTED with the widths. */
bool kernels_cuda_offer(const struct mla_shape *shape, struct failure *failure);

#endif
