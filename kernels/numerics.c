/* The numerics contract: conversions and the few functions of one variable, each one fixed sequence
 * of correctly rounded FP32 operations. kernels/x86/vector_avx512.h repeats exp operation by
 * operation; a test compares them bit for bit. */
#include "kernels/numerics.h"

#include "kernels/rows.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#else
#include <math.h>
#endif

void numerics_enter(void) {
#if defined(__x86_64__)
    enum { DENORMALS_ARE_ZERO = 0x0040, ROUNDING = 0x6000, FLUSH_TO_ZERO = 0x8000 };
    unsigned int mode = _mm_getcsr();
    unsigned int wanted = (mode & ~(unsigned int)ROUNDING) | DENORMALS_ARE_ZERO | FLUSH_TO_ZERO;
    if (mode != wanted)
        _mm_setcsr(wanted);
#elif defined(__aarch64__)
    enum { FLUSH_TO_ZERO = 1 << 24, ROUNDING = 3 << 22 };
    uint64_t mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    mode = (mode & ~(uint64_t)ROUNDING) | FLUSH_TO_ZERO;
    __asm__ volatile("msr fpcr, %0" : : "r"(mode));
#endif
}

float bf16_to_float(bf16 value) {
    return widen_bf16(value);
}

bf16 bf16_from_float(float value) {
    return round_bf16(value);
}

bf16 e4m3_to_bf16(uint8_t value) {
    uint32_t sign = (uint32_t)(value & 0x80) << 8, exponent = value >> 3 & 15, mantissa = value & 7;
    if ((value & 0x7f) == 0x7f)
        return (bf16)(sign | 0x7fc0);
    if (exponent == 0) {
        if (mantissa == 0)
            return (bf16)sign;
        /* mantissa * 2^-9: shift the leading one to its place. */
        exponent = 1;
        while (!(mantissa & 8)) {
            mantissa <<= 1;
            exponent--;
        }
        mantissa &= 7;
    }
    /* Exponent bias 7 becomes 127 (exponent wraps below zero and comes back). */
    return (bf16)(sign | (exponent + 120) << 7 | mantissa << 4);
}

float e4m3_to_float(uint8_t value) {
    return widen_bf16(e4m3_to_bf16(value));
}

uint8_t e4m3_from_float(float value) {
    uint32_t bits = float_bits(value), sign = bits >> 24 & 0x80, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000)
        return (uint8_t)(sign | 0x7f);
    if (magnitude >= 0x43e00000) /* 448 and above */
        return (uint8_t)(sign | 0x7e);
    if (magnitude < 0x3c800000) { /* below 2^-6: a multiple of 2^-9, rounded by the addition */
        float shifted = float_from_bits(magnitude) + 16384.0f; /* unit in the last place: 2^-9 */
        return (uint8_t)(sign | (float_bits(shifted) & 0xf));
    }
    uint32_t rounded = magnitude + 0x7ffff + (magnitude >> 20 & 1);
    return (uint8_t)(sign | ((rounded >> 20) - (120u << 3)));
}

/* exp(x) = 2^k exp(r), k = round(x / ln 2), |r| <= 0.35, exp(r) by its Taylor polynomial of
 * degree 7. Largest error over all floats with a normal result: 1.0 units in the last place. */
static inline __attribute__((always_inline)) float exp_steps(float x) {
    float bounded = EXP_INPUT_MAX < x ? EXP_INPUT_MAX : x;
    float rounded = __builtin_fmaf(bounded, EXP_LOG2E, EXP_ROUND);
    uint32_t k = float_bits(rounded) - float_bits(EXP_ROUND);
    float multiple = rounded - EXP_ROUND;
    float r = __builtin_fmaf(multiple, -EXP_LN2_HIGH, bounded);
    r = __builtin_fmaf(multiple, -EXP_LN2_LOW, r);
    float p = __builtin_fmaf(EXP_C7, r, EXP_C6);
    p = __builtin_fmaf(p, r, EXP_C5);
    p = __builtin_fmaf(p, r, EXP_C4);
    p = __builtin_fmaf(p, r, EXP_C3);
    p = __builtin_fmaf(p, r, EXP_C2);
    p = __builtin_fmaf(p, r, 1.0f);
    p = __builtin_fmaf(p, r, 1.0f);
    /* 2^k in two factors, because k = 128 has no exponent of its own. */
    uint32_t half = (uint32_t)((int32_t)k >> 1);
    p = p * float_from_bits((half + 127) << 23);
    p = p * float_from_bits((k - half + 127) << 23);
    /* 0 below EXP_INPUT_MIN, by a mask: a branch would keep the compiler from making vectors. */
    return float_from_bits(float_bits(p) & ((uint32_t)(x < EXP_INPUT_MIN) - 1));
}

FUSED float exp_canonical(float x) {
    return exp_steps(x);
}

/* Runs of constant length, so that the compiler makes vectors of the same steps; wider ones where
 * AVX-512 is. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target_clones("avx512f", "fma", "default")))
#endif
void exp_canonical_row(const float *x, uint32_t n, float *ret) {
    enum { RUN = 32 };
    uint32_t i = 0;
    for (; i + RUN <= n; i += RUN) {
        float in[RUN], out[RUN];
        memcpy(in, x + i, sizeof in);
        for (int j = 0; j < RUN; j++)
            out[j] = exp_steps(in[j]);
        memcpy(ret + i, out, sizeof out);
    }
    for (; i < n; i++)
        ret[i] = exp_steps(x[i]);
}

/* log(x) = k ln 2 + log(1 + f), 1 + f in [sqrt(1/2), sqrt(2)). With s = f / (2 + f), log(1 + f) = 2
 * atanh(s) = f - (f^2/2 - s (f^2/2 + R)), R = 2/3 s^2 + 2/5 s^4 + 2/7 s^6 + 2/9 s^8. Largest error:
 * 0.9 units in the last place. */
FUSED float log_canonical(float x) {
    uint32_t bits = float_bits(x) - 0x3f3504f3; /* sqrt(1/2) */
    int32_t k = (int32_t)bits >> 23;
    float f = float_from_bits((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;
    float s = f / (2.0f + f);
    float z = s * s;
    float r = __builtin_fmaf(2.0f / 9, z, 2.0f / 7);
    r = __builtin_fmaf(r, z, 2.0f / 5);
    r = __builtin_fmaf(r, z, 2.0f / 3);
    r = r * z;
    float half_square = 0.5f * f * f;
    float multiple = (float)k;
    float low = __builtin_fmaf(s, half_square + r, multiple * EXP_LN2_LOW);
    return __builtin_fmaf(multiple, EXP_LN2_HIGH, f - (half_square - low));
}

float rsqrt_canonical(float x) {
#if defined(__x86_64__)
    return 1.0f / _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x)));
#elif defined(__aarch64__)
    return 1.0f / vget_lane_f32(vsqrt_f32(vdup_n_f32(x)), 0);
#else
    return 1.0f / sqrtf(x);
#endif
}

float sigmoid_canonical(float x) {
    return 1.0f / (1.0f + exp_canonical(-x));
}

float sum_tree(const float partial[16]) {
    float eight[8], four[4];
    for (int i = 0; i < 8; i++)
        eight[i] = partial[i] + partial[i + 8];
    for (int i = 0; i < 4; i++)
        four[i] = eight[i] + eight[i + 4];
    return (four[0] + four[2]) + (four[1] + four[3]);
}

float sum_canonical(const float *x, uint32_t n) {
    float partial[16] = {0};
    for (uint32_t i = 0; i < n; i++)
        partial[i % 16] += x[i];
    return sum_tree(partial);
}
