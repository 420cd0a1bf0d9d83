/* The canonical BF16 dot product, one operation after the other: the readable definition of what
 * the AVX-512 and AMX forms compute, and the form for processors that have neither. Depends on no
 * processor mode. */
#include "kernels/internal.h"

#include <float.h>
#include <string.h>

#if defined(__x86_64__)
#define WITH_FMA __attribute__((target("fma")))
#endif
#define INLINE static inline __attribute__((always_inline))

/* Where fma(a, b, c) is at most 2^-126 in magnitude: decides in double precision what is left of
 * it. The product of two floats is exact in double, and the error of the sum is found exactly
 * (Knuth's TwoSum; Handbook of Floating-Point Arithmetic, section 4.3.2). */
static __attribute__((noinline)) float fma_tiny(float a, float b, float c) {
    const double product = (double)a * b;
    const double sum = product + c;
    const double c_part = sum - product;
    const double error = (product - (sum - c_part)) + (c - c_part);
    /* Values from here on round up to 2^-126 with 24 bits and unbounded exponent (the tie goes to
     * even, which is 2^-126). */
    const double smallest = 0x1p-126 - 0x1p-151;
    const double magnitude = __builtin_fabs(sum);
    const bool below =
        magnitude < smallest || (magnitude == smallest && error != 0 && (error < 0) == (sum > 0));
    return (float)__builtin_copysign(below ? 0.0 : (double)FLT_MIN, sum);
}

/* Operands are normal or zero. The exact case of a sum that cancels to zero keeps IEEE's sign
 * through fma_tiny. */
INLINE float fma_flushed(float a, float b, float c) {
    const float result = __builtin_fmaf(a, b, c);
    if (__builtin_fabsf(result) <= FLT_MIN)
        return fma_tiny(a, b, c);
    return result;
}

/* Below 2^-126 the sum of two floats is exact, so rounding does not matter here. */
INLINE float add_flushed(float a, float b) {
    const float result = a + b;
    return __builtin_fabsf(result) < FLT_MIN ? __builtin_copysignf(0, result) : result;
}

INLINE float flushed(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7f800000) == 0)
        bits &= 0x80000000;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE float flushed_bf16(bf16 value) {
    uint32_t bits = (uint32_t)value << 16;
    if ((bits & 0x7f800000) == 0)
        bits &= 0x80000000;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

INLINE float block(const bf16 *w, size_t pair_step, size_t odd_step, const bf16 *x) {
    float even = 0, odd = 0;
    for (size_t i = 0; i < BLOCK_INPUTS / 2; i++) {
        even = fma_flushed(flushed_bf16(w[i * pair_step]), flushed_bf16(x[2 * i]), even);
        odd =
            fma_flushed(flushed_bf16(w[i * pair_step + odd_step]), flushed_bf16(x[2 * i + 1]), odd);
    }
    return add_flushed(even, odd);
}

#if defined(WITH_FMA)
static WITH_FMA float block_fma(const bf16 *w, size_t pair_step, size_t odd_step, const bf16 *x) {
    return block(w, pair_step, odd_step, x);
}
#endif

float dot_bf16_block(const bf16 *w, size_t pair_step, size_t odd_step, const bf16 *x) {
#if defined(WITH_FMA)
    if (__builtin_cpu_supports("fma"))
        return block_fma(w, pair_step, odd_step, x);
#endif
    return block(w, pair_step, odd_step, x);
}

float dot_bf16(const bf16 *w, const bf16 *x, uint32_t blocks) {
    float acc = 0;
    for (size_t b = 0; b < blocks; b++)
        acc = add_flushed(acc, dot_bf16_block(w + b * BLOCK_INPUTS, 2, 1, x + b * BLOCK_INPUTS));
    return acc;
}

float fma_canonical(float a, float b, float c) {
    return fma_flushed(flushed(a), flushed(b), flushed(c));
}

float add_canonical(float a, float b) {
    return add_flushed(flushed(a), flushed(b));
}
