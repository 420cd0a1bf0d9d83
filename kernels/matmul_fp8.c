/* The product of the fp8 profile (W8A8): activations are quantised, then multiplied by the products
 * of the bf16 profile, which are exact for E4M3 values of both sides; the scale of a segment is the
 * product of both scales. Weights that are not E4M3 with scales multiply as in the bf16 profile. */
#include "kernels/internal.h"
#include "kernels/rows.h"

/* Elements that are worth another thread. */
enum { QUANTISE_PART_MIN = 64 * 1024 };

struct quantise_job {
    const struct matmul_job *job;
    quantise_function *quantise;
    bf16 *values; /* [rows, stride] */
    size_t stride;
    float *scale; /* [rows, segments] */
};

static void quantise_part(void *argument, int part, int parts) {
    numerics_enter();
    const struct quantise_job *it = argument;
    const struct matrix *w = it->job->w;
    const size_t begin = part_begin(it->job->rows, part, parts);
    const size_t end = part_begin(it->job->rows, part + 1, parts);
    it->quantise(w, (const bf16 *)it->job->x + begin * it->job->x_stride, it->job->x_stride,
                 (uint32_t)(end - begin), it->values + begin * it->stride, it->stride,
                 it->scale + begin * w->segments);
}

static void matmul_quantised(const struct matmul_job *plain, quantise_function *quantise,
                             matmul_job_function *product, const struct parallel *parallel) {
    const struct matrix *w = plain->w;
    if (w->dtype != DTYPE_E4M3 || w->scales == NULL) {
        product(plain, parallel);
        return;
    }
    const size_t stride = activation_stride(w->k);
    const struct scratch_mark mark = scratch_mark();
    struct quantise_job it = {plain, quantise, scratch_take(plain->rows * stride, sizeof(bf16)),
                              stride,
                              scratch_take((size_t)plain->rows * w->segments, sizeof(float))};
    struct parallel narrow = *parallel;
    if ((size_t)plain->rows * w->k < 2 * (size_t)QUANTISE_PART_MIN)
        narrow.width = 1;
    run_parts(&narrow, quantise_part, &it, plain->rows);
    struct matmul_job job = *plain;
    job.x = it.values;
    job.x_stride = stride;
    job.x_scale = it.scale;
    product(&job, parallel);
    scratch_release(mark);
}

#define MATMUL_FP8(name, quantise, product)                                                        \
    void name(const struct matrix *w, const void *x, size_t x_stride, uint32_t rows, float *y,     \
              size_t y_stride, const struct parallel *parallel) {                                  \
        const struct matmul_job job = {w, x, x_stride, rows, y, y_stride, NULL};                   \
        matmul_quantised(&job, quantise, product, parallel);                                       \
    }
MATMUL_FP8(matmul_fp8_scalar, quantise_scalar, matmul_job_scalar)
#if defined(__x86_64__)
MATMUL_FP8(matmul_fp8_avx512, quantise_avx512, matmul_job_avx512)
MATMUL_FP8(matmul_fp8_amx, quantise_avx512, matmul_job_amx)
#endif
