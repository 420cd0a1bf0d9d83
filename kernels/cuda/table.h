/* The device as struct kernels. Linked where CUDA is (or, in tests, the emulator). */
#ifndef TROUPE_CUDA_TABLE_H
#define TROUPE_CUDA_TABLE_H

#include "kernels/ops.h"

/* The table on the device of device_use_cuda(): the bf16 profile with own bits; with `fp8` weights
 * that are stored as E4M3 stay so and meet quantised activations. A troupe must not mix either with
 * other profiles (options.c: the numerics bf16-sm90 and fp8-sm90). One for the process, one thread
 * at a time; asked for again it becomes what was asked for last. `name` is kept. */
const struct kernels *kernels_cuda(const char *name, bool fp8, struct failure *failure);
/* What `data` of a matrix of this table points to. */
struct device_matrix {
    void *weights;   /* [n, stride] BF16, or E4M3 */
    float *scales;   /* E4M3: [n / 128 rounded up, k / 128 rounded up], on the device; else NULL */
    uint32_t stride; /* elements */
};
const struct device_matrix *kernels_cuda_matrix(const struct matrix *matrix);
/* Whether a model's attention has kernels; else ERR_UNSUPPORTED with the widths. */
bool kernels_cuda_offer(const struct mla_shape *shape, struct failure *failure);

#endif
