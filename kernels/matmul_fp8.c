/* The product of the fp8 profile (W8A8): activations are quantised, then multiplied by the products
 * of the bf16 profile, which are exact for E4M3 values of both sides; the scale of a segment is the
 * product of both scales. Weights that are not E4M3 with scales multiply as in the bf16 profile. */
#include <string.h>

#include "kernels/internal.h"
#include "kernels/rows.h"

/* Elements that are worth another thread. */
enum { QUANTISE_PART_MIN = 64 * 1024 };

/* Rows on their way into a product: quantised here, or widened if that was done before they came.
 */
struct prepare_job {
    const struct matmul_job *job;
    quantise_function *quantise;
    e4m3_widen_function *widen; /* where x is rows of kernels/e4m3_row.h, x_stride bytes apart */
    bf16 *values;               /* [rows, stride] */
    size_t stride;
    float *scale; /* [rows, segments] */
};

static void prepare_part(void *argument, int part, int parts) {
    numerics_enter();
    const struct prepare_job *it = argument;
    const struct matrix *w = it->job->w;
    const size_t begin = part_begin(it->job->rows, part, parts);
    const size_t end = part_begin(it->job->rows, part + 1, parts);
    if (it->widen == NULL) {
        it->quantise(w, (const bf16 *)it->job->x + begin * it->job->x_stride, it->job->x_stride,
                     (uint32_t)(end - begin), it->values + begin * it->stride, it->stride,
                     it->scale + begin * w->segments);
        return;
    }
    for (size_t r = begin; r < end; r++) {
        const uint8_t *row = (const uint8_t *)it->job->x + r * it->job->x_stride;
        it->widen(row, w->k, it->values + r * it->stride);
        memcpy(it->scale + r * w->segments, row + e4m3_row_scales_at(w->k),
               w->segments * sizeof(float));
    }
}

static void matmul_prepared(const struct matmul_job *from, quantise_function *quantise,
                            e4m3_widen_function *widen, matmul_job_function *product,
                            const struct parallel *parallel) {
    const struct matrix *w = from->w;
    const size_t stride = activation_stride(w->k);
    const struct scratch_mark mark = scratch_mark();
    struct prepare_job it = {from,   quantise,
                             widen,  scratch_take(from->rows * stride, sizeof(bf16)),
                             stride, scratch_take((size_t)from->rows * w->segments, sizeof(float))};
    struct parallel narrow = *parallel;
    if ((size_t)from->rows * w->k < 2 * (size_t)QUANTISE_PART_MIN)
        narrow.width = 1;
    run_parts(&narrow, prepare_part, &it, from->rows);
    struct matmul_job job = *from;
    job.x = it.values;
    job.x_stride = stride;
    job.x_scale = it.scale;
    product(&job, parallel);
    scratch_release(mark);
}

static void matmul_quantised(const struct matmul_job *plain, quantise_function *quantise,
                             matmul_job_function *product, const struct parallel *parallel) {
    if (plain->w->dtype != DTYPE_E4M3 || plain->w->scales == NULL)
        product(plain, parallel);
    else
        matmul_prepared(plain, quantise, NULL, product, parallel);
}

#if defined(__x86_64__)
void matmul_job_fp8_amx(const struct matmul_job *job, const struct parallel *parallel) {
    matmul_quantised(job, quantise_avx512, matmul_job_amx, parallel);
}
#endif

/* ---- Rows that were quantised before they came here ---- */

row_to_e4m3_function *row_to_e4m3_best(void) {
#if defined(__x86_64__)
    if (isa_available(ISA_AVX512))
        return row_to_e4m3_avx512;
#endif
    return row_to_e4m3_scalar;
}

bool takes_e4m3(const struct matrix *w) {
    if (w->dtype != DTYPE_E4M3 || w->scales == NULL)
        return false;
    for (uint32_t s = 0; s < w->segments; s++)
        if (w->segment_k[s] != s * E4M3_ROW_GROUP)
            return false;
    return w->segments == e4m3_row_groups(w->k);
}

#define MATMUL_E4M3(name, widen, product)                                                          \
    void name(const struct matrix *w, const uint8_t *x, size_t x_stride, uint32_t rows, float *y,  \
              size_t y_stride, const struct parallel *parallel) {                                  \
        ASSERT(takes_e4m3(w));                                                                     \
        const struct matmul_job job = {w, x, x_stride, rows, y, y_stride, NULL, NULL, NULL};       \
        matmul_prepared(&job, NULL, widen, product, parallel);                                     \
    }
MATMUL_E4M3(matmul_e4m3_scalar, e4m3_widen_scalar, matmul_job_scalar)
#if defined(__x86_64__)
MATMUL_E4M3(matmul_e4m3_avx512, e4m3_widen_avx512, matmul_job_avx512)
MATMUL_E4M3(matmul_e4m3_amx, e4m3_widen_avx512, matmul_job_amx)
#endif

#define MATMUL_FP8(name, quantise, product)                                                        \
    void name(const struct matrix *w, const void *x, size_t x_stride, uint32_t rows, float *y,     \
              size_t y_stride, const struct parallel *parallel) {                                  \
        const struct matmul_job job = {w, x, x_stride, rows, y, y_stride, NULL, NULL, NULL};       \
        matmul_quantised(&job, quantise, product, parallel);                                       \
    }
MATMUL_FP8(matmul_fp8_scalar, quantise_scalar, matmul_job_scalar)
#if defined(__x86_64__)
MATMUL_FP8(matmul_fp8_avx512, quantise_avx512, matmul_job_avx512)
MATMUL_FP8(matmul_fp8_amx, quantise_avx512, matmul_job_amx)
#endif
