/* Products of many rows whose outputs are taken up while they lie in the first-level cache: queries
 * of the expanded form, rotated and rounded, and sums that join the residual stream. Outputs in
 * FP32 would go to memory and come back: for queries of 512 rows that took longer than the product.
 */
#include "actors/errors.h"
#include "kernels/internal.h"
#include "kernels/x86/vector_avx512.h"

/* ---- Queries of the expanded form ---- */

struct queries {
    const struct mla_shape *shape;
    const float *const *cos_sin; /* [rows] */
    float *y;
    size_t y_stride;
    bf16 *ret; /* [rows, heads, ret_stride] */
    size_t ret_stride;
};

static bf16 *query_at(const struct queries *job, uint32_t row, uint32_t output) {
    const struct mla_shape *shape = job->shape;
    const uint32_t width = shape->nope + shape->rope;
    return job->ret + ((size_t)row * shape->heads + output / width) * job->ret_stride +
           output % width;
}

static void queries_ask(void *argument, uint32_t row, uint32_t rows, uint32_t output) {
    const struct queries *job = argument;
    for (uint32_t r = row; output % 32 == 0 && r < row + rows; r++)
        if (job->cos_sin[r] != NULL)
            __builtin_prefetch(query_at(job, r, output), 1);
}

/* The 16 outputs lie in one part of one head. */
static void queries_take(void *argument, uint32_t row, uint32_t rows, uint32_t output,
                         uint32_t outputs, const float *sums) {
    const struct queries *job = argument;
    const uint32_t nope = job->shape->nope, at = output % (nope + job->shape->rope);
    ASSERT(outputs == PANEL_OUTPUTS);
    for (uint32_t r = row; r < row + rows; r++, sums += PANEL_OUTPUTS) {
        __m512 values = _mm512_load_ps(sums);
        const float *angles = job->cos_sin[r];
        if (angles == NULL) {
            _mm512_storeu_ps(job->y + r * job->y_stride + output, values);
            continue;
        }
        if (at >= nope) { /* rope_avx512 */
            const __m512 table = _mm512_loadu_ps(angles + (at - nope));
            const __m512 straight = _mm512_mul_ps(values, _mm512_moveldup_ps(table));
            const __m512 crossed =
                _mm512_mul_ps(_mm512_permute_ps(values, 0xb1), _mm512_movehdup_ps(table));
            values =
                _mm512_mask_sub_ps(_mm512_add_ps(straight, crossed), 0x5555, straight, crossed);
        }
        _mm256_storeu_si256((__m256i *)(void *)query_at(job, r, output),
                            narrow_to_bf16_avx512(values));
    }
}

static void run_queries(const struct mla_shape *shape, const struct matrix *w, const void *x,
                        size_t x_stride, uint32_t rows, const float *const *cos_sin, float *y,
                        size_t y_stride, void *ret, size_t ret_stride, matmul_job_function *product,
                        const struct parallel *parallel) {
    ASSERT(w->n == shape->heads * (shape->nope + shape->rope));
    ASSERT(shape->nope % BLOCK_INPUTS == 0 && shape->rope % BLOCK_INPUTS == 0);
    struct queries queries = {shape, cos_sin, y, y_stride, ret, ret_stride};
    const struct matmul_sink sink = {queries_take, queries_ask, &queries};
    const struct matmul_job job = {
        .w = w, .x = x, .x_stride = x_stride, .rows = rows, .sink = &sink};
    product(&job, parallel);
}

void mla_queries_bf16_amx(const struct mla_shape *shape, const struct matrix *w, const void *x,
                          size_t x_stride, uint32_t rows, const float *const *cos_sin, float *y,
                          size_t y_stride, void *ret, size_t ret_stride,
                          const struct parallel *parallel) {
    run_queries(shape, w, x, x_stride, rows, cos_sin, y, y_stride, ret, ret_stride, matmul_job_amx,
                parallel);
}

void mla_queries_fp8_amx(const struct mla_shape *shape, const struct matrix *w, const void *x,
                         size_t x_stride, uint32_t rows, const float *const *cos_sin, float *y,
                         size_t y_stride, void *ret, size_t ret_stride,
                         const struct parallel *parallel) {
    run_queries(shape, w, x, x_stride, rows, cos_sin, y, y_stride, ret, ret_stride,
                matmul_job_fp8_amx, parallel);
}

/* ---- Sums that are added ---- */

struct addition {
    float *y;
    size_t y_stride;
};

static void addition_ask(void *argument, uint32_t row, uint32_t rows, uint32_t output) {
    const struct addition *job = argument;
    for (uint32_t r = row; r < row + rows; r++)
        __builtin_prefetch(job->y + r * job->y_stride + output, 1);
}

static void addition_take(void *argument, uint32_t row, uint32_t rows, uint32_t output,
                          uint32_t outputs, const float *sums) {
    const struct addition *job = argument;
    const __mmask16 lanes = first_lanes(outputs);
    float *y = job->y + row * job->y_stride + output;
    for (uint32_t r = 0; r < rows; r++, y += job->y_stride)
        _mm512_mask_storeu_ps(y, lanes,
                              _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, y),
                                            _mm512_load_ps(sums + r * PANEL_OUTPUTS)));
}

static void run_addition(const struct matrix *w, const void *x, size_t x_stride, uint32_t rows,
                         float *y, size_t y_stride, matmul_job_function *product,
                         const struct parallel *parallel) {
    struct addition addition = {y, y_stride};
    const struct matmul_sink sink = {addition_take, addition_ask, &addition};
    const struct matmul_job job = {
        .w = w, .x = x, .x_stride = x_stride, .rows = rows, .sink = &sink};
    product(&job, parallel);
}

void matmul_add_bf16_amx(const struct matrix *w, const void *x, size_t x_stride, uint32_t rows,
                         float *y, size_t y_stride, const struct parallel *parallel) {
    run_addition(w, x, x_stride, rows, y, y_stride, matmul_job_amx, parallel);
}

void matmul_add_fp8_amx(const struct matrix *w, const void *x, size_t x_stride, uint32_t rows,
                        float *y, size_t y_stride, const struct parallel *parallel) {
    run_addition(w, x, x_stride, rows, y, y_stride, matmul_job_fp8_amx, parallel);
}
