/* What the row operations and the attention of kernels/ share and nobody else sees: scratch memory,
 * the scalar steps that more than one form uses, and the forms that kernels_select() puts into its
 * tables. */
#ifndef TROUPE_KERNELS_ROWS_H
#define TROUPE_KERNELS_ROWS_H

#include <string.h>

#include "kernels/ops.h"

static inline uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}
static inline float float_from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}
static inline float widen_bf16(bf16 value) {
    return float_from_bits((uint32_t)value << 16);
}
/* The largest magnitude; a NaN is not larger. */
static inline float largest_magnitude(const bf16 *x, uint32_t count) {
    float most = 0;
    for (uint32_t i = 0; i < count; i++) {
        const float magnitude = __builtin_fabsf(widen_bf16(x[i]));
        most = magnitude > most ? magnitude : most;
    }
    return most;
}
/* bf16_from_float for inner loops. */
static inline bf16 round_bf16(float value) {
    uint32_t bits = float_bits(value), magnitude = bits & 0x7fffffff;
    if (magnitude < 0x00800000)
        return (bf16)(bits >> 16 & 0x8000);
    if (magnitude > 0x7f800000)
        return (bf16)(bits >> 16 | 0x0040);
    return (bf16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Code that calls fmaf in its inner loop: with the processor's own instruction where there is one,
 * by libm's otherwise. Both round once, so the bits are the same. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FUSED __attribute__((target_clones("fma", "default")))
#else
#define FUSED
#endif

/* The constants of exp_canonical, for the vector forms (the order of operations is in numerics.c).
 */
#define EXP_INPUT_MAX 89.0f
#define EXP_INPUT_MIN (-87.33654f) /* below: 0; the smallest float whose exp is a normal number */
#define EXP_ROUND     12582912.0f  /* 1.5 * 2^23: adding it rounds to an integer */
#define EXP_LOG2E     0x1.715476p+0f
#define EXP_LN2_HIGH  0x1.62e4p-1f /* 15 bits: its products with small integers are exact */
#define EXP_LN2_LOW   0x1.7f7d1cp-20f
#define EXP_C7        (1.0f / 5040)
#define EXP_C6        (1.0f / 720)
#define EXP_C5        (1.0f / 120)
#define EXP_C4        (1.0f / 24)
#define EXP_C3        (1.0f / 6)
#define EXP_C2        0.5f

/* The fixed tree of sum_canonical over its 16 partial sums. */
float sum_tree(const float partial[16]);
/* rsqrt(mean(x^2) + eps), the mean by 16 interleaved partial sums as in sum_canonical. */
float rms_factor(const float *x, uint32_t n, float eps);

/* ---- Scratch (scratch.c): a stack of blocks per thread. Memory taken stays where it is until it
 * is given back. ---- */
struct scratch_mark {
    uint32_t chunk;
    size_t used;
};
struct scratch_mark scratch_mark(void);
void *
scratch_take(size_t count,
             size_t size); /* 64-byte aligned, not cleared; count * size is checked for overflow */
void scratch_release(struct scratch_mark mark);

/* ---- Attention: shared by its scalar forms (reference/mla.c) ---- */

/* The online softmax of one query and head. */
struct softmax {
    float maximum, sum;
};
static inline struct softmax softmax_start(void) {
    return (struct softmax){-__builtin_inff(), 0.0f};
}
/* Takes in a block: p[j] = exp(score[j] - new maximum) for j < visible, 0 beyond. Returns the
 * factor on what was accumulated. */
float softmax_block(struct softmax *self, const float *score, uint32_t visible,
                    float p[PAGE_TOKENS]);

/* Positions of block b that a query at `position` sees; block <= position / PAGE_TOKENS. */
static inline uint32_t mla_visible(uint32_t position, uint32_t block) {
    uint32_t beyond = position + 1 - block * PAGE_TOKENS;
    return beyond < PAGE_TOKENS ? beyond : PAGE_TOKENS;
}

/* Items [begin, end) of `items` that part `part` of `parts` does. */
static inline size_t part_begin(size_t items, int part, int parts) {
    return items / (size_t)parts * (size_t)part +
           (items % (size_t)parts < (size_t)part ? items % (size_t)parts : (size_t)part);
}
/* Runs `task` over `items` equal pieces of work in at most parallel->width parts. */
void run_parts(const struct parallel *parallel, void (*task)(void *argument, int part, int parts),
               void *argument, size_t items);

/* How many rows of an expanded call are walked together: bounds the memory of accumulators,
 * `row_floats` for each row. */
uint32_t mla_expanded_group(size_t row_floats);

/* ---- Forms ---- */
typedef void rms_norm_function(const float *x, size_t x_stride, const float *weight, float eps,
                               uint32_t rows, uint32_t n, void *ret, size_t ret_stride);
typedef void convert_function(const float *x, size_t x_stride, uint32_t rows, uint32_t n, void *ret,
                              size_t ret_stride);
typedef void silu_mul_function(const float *gate, const float *up, size_t stride, uint32_t rows,
                               uint32_t n, void *ret, size_t ret_stride);
typedef void add_function(float *x, size_t x_stride, const float *y, size_t y_stride, uint32_t rows,
                          uint32_t n);
typedef void widen_function(const void *x, size_t x_stride, uint32_t rows, uint32_t n, float *ret,
                            size_t ret_stride);
typedef void rope_function(float *x, size_t stride, uint32_t count, uint32_t rope,
                           const float *cos_sin);
typedef void mla_absorbed_function(const struct mla_shape *shape, const struct mla_rows *rows,
                                   const void *q, size_t q_stride, void *ret, size_t ret_stride,
                                   const struct parallel *parallel);
typedef void mla_expanded_function(const struct mla_shape *shape, const struct mla_rows *rows,
                                   const struct matrix *kv_b, const void *q, size_t q_stride,
                                   void *ret, size_t ret_stride, const struct parallel *parallel);

typedef void matmul_add_function(const struct matrix *w, const void *x, size_t x_stride,
                                 uint32_t rows, float *y, size_t y_stride,
                                 const struct parallel *parallel);
typedef void mla_queries_function(const struct mla_shape *shape, const struct matrix *w,
                                  const void *x, size_t x_stride, uint32_t rows,
                                  const float *const *cos_sin, float *y, size_t y_stride, void *ret,
                                  size_t ret_stride, const struct parallel *parallel);

rms_norm_function rms_norm_f32, rms_norm_bf16_scalar;
convert_function convert_f32, convert_bf16_scalar;
silu_mul_function silu_mul_f32, silu_mul_bf16_scalar;
widen_function widen_f32, widen_bf16_scalar;
add_function add_scalar;
rope_function rope_scalar;
mla_absorbed_function mla_absorbed_f32, mla_absorbed_bf16_scalar;
mla_expanded_function mla_expanded_f32, mla_expanded_bf16_scalar;
#if defined(__x86_64__)
rms_norm_function rms_norm_bf16_avx512;
convert_function convert_bf16_avx512;
silu_mul_function silu_mul_bf16_avx512;
widen_function widen_bf16_avx512;
add_function add_avx512;
rope_function rope_avx512;
mla_absorbed_function mla_absorbed_bf16_avx512, mla_absorbed_bf16_amx;
mla_expanded_function mla_expanded_bf16_avx512, mla_expanded_bf16_amx;
matmul_add_function matmul_add_bf16_amx, matmul_add_fp8_amx;
mla_queries_function mla_queries_bf16_amx, mla_queries_fp8_amx;
#endif

#endif
