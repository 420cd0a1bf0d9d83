/* The numerics contract (kernels/numerics.h) on the device: the same FP32 operations in the same
 * order as numerics.c, so the same bits. tests/gpu/test_cuda_numerics.c compares them.
 *
 * Where the hardware may differ: .ftz flushes results that are denormal; x86 flushes what is
 * denormal after rounding with unbounded exponent. Whether the two agree on values that round up to
 * 2^-126 has not been tried on a GPU. */
#ifndef TROUPE_CUDA_NUMERICS_CUH
#define TROUPE_CUDA_NUMERICS_CUH

#include "kernels/cuda/device.cuh"

DEVICE uint32_t float_bits(float value) {
    return __float_as_uint(value);
}
DEVICE float float_from_bits(uint32_t bits) {
    return __uint_as_float(bits);
}
DEVICE float widen_bf16(bf16 value) {
    return float_from_bits((uint32_t)value << 16);
}
/* bf16_from_float of numerics.h, denormals and NaN included. */
DEVICE bf16 round_bf16(float value) {
    const uint32_t bits = float_bits(value), magnitude = bits & 0x7fffffff;
    if (magnitude < 0x00800000)
        return (bf16)(bits >> 16 & 0x8000);
    if (magnitude > 0x7f800000)
        return (bf16)(bits >> 16 | 0x0040);
    return (bf16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
/* Two of them in one word, the first in the low half. */
DEVICE uint32_t round_bf16_pair(float first, float second) {
    return (uint32_t)round_bf16(first) | (uint32_t)round_bf16(second) << 16;
}

/* e4m3_from_float of numerics.h: to nearest even, saturating at 448, NaN stays NaN. */
DEVICE uint8_t round_e4m3(float value) {
    const uint32_t bits = float_bits(value), sign = bits >> 24 & 0x80,
                   magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000)
        return (uint8_t)(sign | 0x7f);
    if (magnitude >= 0x43e00000)
        return (uint8_t)(sign | 0x7e);
    if (magnitude < 0x3c800000) {
        const float shifted = float_from_bits(magnitude) + 16384.0f;
        return (uint8_t)(sign | (float_bits(shifted) & 0xf));
    }
    const uint32_t rounded = magnitude + 0x7ffff + (magnitude >> 20 & 1);
    return (uint8_t)(sign | ((rounded >> 20) - (120u << 3)));
}
/* Exact; 0x7f and 0xff are NaN. */
DEVICE float widen_e4m3(uint8_t value) {
    const uint32_t sign = (uint32_t)(value & 0x80) << 24, exponent = value >> 3 & 15,
                   mantissa = value & 7;
    if ((value & 0x7f) == 0x7f)
        return float_from_bits(sign | 0x7fc00000);
    if (exponent == 0) /* mantissa * 2^-9 */
        return float_from_bits(float_bits((float)mantissa * 0x1p-9f) | sign);
    return float_from_bits(sign | (exponent + 120) << 23 | mantissa << 20);
}

#define EXP_INPUT_MAX 89.0f
#define EXP_INPUT_MIN (-87.33654f)
#define EXP_ROUND     12582912.0f
#define EXP_LOG2E     0x1.715476p+0f
#define EXP_LN2_HIGH  0x1.62e4p-1f
#define EXP_LN2_LOW   0x1.7f7d1cp-20f

DEVICE float device_exp(float x) {
    const float bounded = EXP_INPUT_MAX < x ? EXP_INPUT_MAX : x;
    const float rounded = __fmaf_rn(bounded, EXP_LOG2E, EXP_ROUND);
    const uint32_t k = float_bits(rounded) - float_bits(EXP_ROUND);
    const float multiple = rounded - EXP_ROUND;
    float r = __fmaf_rn(multiple, -EXP_LN2_HIGH, bounded);
    r = __fmaf_rn(multiple, -EXP_LN2_LOW, r);
    float p = __fmaf_rn(1.0f / 5040, r, 1.0f / 720);
    p = __fmaf_rn(p, r, 1.0f / 120);
    p = __fmaf_rn(p, r, 1.0f / 24);
    p = __fmaf_rn(p, r, 1.0f / 6);
    p = __fmaf_rn(p, r, 0.5f);
    p = __fmaf_rn(p, r, 1.0f);
    p = __fmaf_rn(p, r, 1.0f);
    const uint32_t half = (uint32_t)((int32_t)k >> 1);
    p = p * float_from_bits((half + 127) << 23);
    p = p * float_from_bits((k - half + 127) << 23);
    return float_from_bits(float_bits(p) & ((uint32_t)(x < EXP_INPUT_MIN) - 1));
}

DEVICE float device_log(float x) {
    const uint32_t bits = float_bits(x) - 0x3f3504f3;
    const int32_t k = (int32_t)bits >> 23;
    const float f = float_from_bits((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;
    const float s = f / (2.0f + f);
    const float z = s * s;
    float r = __fmaf_rn(2.0f / 9, z, 2.0f / 7);
    r = __fmaf_rn(r, z, 2.0f / 5);
    r = __fmaf_rn(r, z, 2.0f / 3);
    r = r * z;
    const float half_square = 0.5f * f * f;
    const float multiple = (float)k;
    const float low = __fmaf_rn(s, half_square + r, multiple * EXP_LN2_LOW);
    return __fmaf_rn(multiple, EXP_LN2_HIGH, f - (half_square - low));
}

DEVICE float device_rsqrt(float x) {
    return 1.0f / __fsqrt_rn(x);
}
DEVICE float device_sigmoid(float x) {
    return 1.0f / (1.0f + device_exp(-x));
}

/* sum_canonical by 16 lanes of one warp: lane i % 16 adds x[i] in ascending order, then the fixed
 * tree. All 32 lanes of the warp must call it; every lane gets the sum. x lies in shared memory. */
DEVICE float device_sum(const float *x, uint32_t n) {
    const uint32_t lane = threadIdx.x % WARP;
    float partial = 0;
    if (lane < 16) {
        uint32_t i = lane;
        for (; i + 48 < n; i += 64) { /* four loads in flight; the additions stay in order */
            const float a = x[i], b = x[i + 16], c = x[i + 32], d = x[i + 48];
            partial = ((partial + a) + b) + c;
            partial = partial + d;
        }
        for (; i < n; i += 16)
            partial = partial + x[i];
    }
    /* (p0+p8) .. (p7+p15), then 4, 2, 1 apart; the lower lane's term always first. */
    partial = partial + __shfl_down_sync(0xffffffff, partial, 8);
    partial = partial + __shfl_down_sync(0xffffffff, partial, 4);
    partial = partial + __shfl_down_sync(0xffffffff, partial, 2);
    partial = partial + __shfl_down_sync(0xffffffff, partial, 1);
    return __shfl_sync(0xffffffff, partial, 0);
}

#endif
