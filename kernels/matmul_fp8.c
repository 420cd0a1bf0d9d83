/* The product of the fp8 profile (W8A8): activations are quantised, then multiplied by the products
 * of the bf16 profile, which are exact for E4M3 values of both sides; the scale of a segment is the
 * product of both scales. Weights that are not E4M3 with scales multiply as in the bf16 profile. */
#include <string.h>

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

struct widen_job {
    const struct matrix *w;
    e4m3_widen_function *widen;
    const uint8_t *x;
    size_t x_stride;
    uint32_t rows;
    bf16 *values; /* [rows, stride] */
    size_t stride;
    float *scale; /* [rows, segments] */
};

static void widen_part(void *argument, int part, int parts) {
    const struct widen_job *it = argument;
    const uint32_t n = it->w->k, segments = it->w->segments;
    for (size_t r = part_begin(it->rows, part, parts); r < part_begin(it->rows, part + 1, parts);
         r++) {
        const uint8_t *row = it->x + r * it->x_stride;
        it->widen(row, n, it->values + r * it->stride);
        memcpy(it->scale + r * segments, row + e4m3_row_scales_at(n), segments * sizeof(float));
    }
}

static void matmul_widened(const struct matrix *w, const uint8_t *x, size_t x_stride, uint32_t rows,
                           float *y, size_t y_stride, e4m3_widen_function *widen,
                           matmul_job_function *product, const struct parallel *parallel) {
    ASSERT(takes_e4m3(w));
    const size_t stride = activation_stride(w->k);
    const struct scratch_mark mark = scratch_mark();
    struct widen_job it = {w,      widen,
                           x,      x_stride,
                           rows,   scratch_take(rows * stride, sizeof(bf16)),
                           stride, scratch_take((size_t)rows * w->segments, sizeof(float))};
    struct parallel narrow = *parallel;
    if ((size_t)rows * w->k < 2 * (size_t)QUANTISE_PART_MIN)
        narrow.width = 1;
    run_parts(&narrow, widen_part, &it, rows);
    const struct matmul_job job = {w, it.values, stride, rows, y, y_stride, it.scale, NULL, NULL};
    product(&job, parallel);
    scratch_release(mark);
}

#define MATMUL_E4M3(name, widen, product)                                                          \
    void name(const struct matrix *w, const uint8_t *x, size_t x_stride, uint32_t rows, float *y,  \
              size_t y_stride, const struct parallel *parallel) {                                  \
        matmul_widened(w, x, x_stride, rows, y, y_stride, widen, product, parallel);               \
    }
MATMUL_E4M3(matmul_e4m3_scalar, e4m3_widen_scalar, matmul_job_scalar)
#if defined(__x86_64__)
MATMUL_E4M3(matmul_e4m3_avx512, e4m3_widen_avx512, matmul_job_avx512)
MATMUL_E4M3(matmul_e4m3_amx, e4m3_widen_avx512, matmul_job_amx)
#endif

#define MATMUL_FP8(name, quantise, product)                                                        \
    void name(const struct matrix *w, const void *x, size_t x_stride, uint32_t rows, float *y,     \
              size_t y_stride, const struct parallel *parallel) {                                  \
        const struct matmul_job job = {w, x, x_stride, rows, y, y_stride, NULL, NULL, NULL};                   \
        matmul_quantised(&job, quantise, product, parallel);                                       \
    }
MATMUL_FP8(matmul_fp8_scalar, quantise_scalar, matmul_job_scalar)
#if defined(__x86_64__)
MATMUL_FP8(matmul_fp8_avx512, quantise_avx512, matmul_job_avx512)
MATMUL_FP8(matmul_fp8_amx, quantise_avx512, matmul_job_amx)
#endif
