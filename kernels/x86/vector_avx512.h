/* Steps of the numerics contract on 16 floats at a time, operation for operation those of
 * kernels/numerics.c and kernels/rows.h. For files compiled for AVX-512 only. They count on
 * numerics_enter(). */
#ifndef TROUPE_KERNELS_VECTOR_AVX512_H
#define TROUPE_KERNELS_VECTOR_AVX512_H

#include <immintrin.h>

#include "kernels/rows.h"

static inline __mmask16 first_lanes(size_t n) {
    return n >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << n) - 1);
}

/* 16 BF16 values as floats. */
static inline __m512 widen_avx512(__m256i values) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
}

/* round_bf16, the results as floats. */
static inline __m512 round_to_bf16_avx512(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x), high = _mm512_set1_epi32((int)0xffff0000);
    const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 tiny = _mm512_cmplt_epu32_mask(magnitude, _mm512_set1_epi32(0x00800000));
    const __mmask16 nan = _mm512_cmpgt_epu32_mask(magnitude, _mm512_set1_epi32(0x7f800000));
    rounded = _mm512_mask_and_epi32(rounded, tiny, bits, _mm512_set1_epi32((int)0x80000000));
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x00400000));
    return _mm512_castsi512_ps(_mm512_and_si512(rounded, high));
}

static inline __m256i narrow_to_bf16_avx512(__m512 x) {
    return _mm512_cvtepi32_epi16(
        _mm512_srli_epi32(_mm512_castps_si512(round_to_bf16_avx512(x)), 16));
}

/* exp(r) of exp_canonical, and the k of its 2^k. */
static inline __m512 exp_reduced_avx512(__m512 x, __m512i *ret_k) {
    const __m512 round = _mm512_set1_ps(EXP_ROUND);
    const __m512 rounded = _mm512_fmadd_ps(x, _mm512_set1_ps(EXP_LOG2E), round);
    const __m512 multiple = _mm512_sub_ps(rounded, round);
    __m512 r = _mm512_fmadd_ps(multiple, _mm512_set1_ps(-EXP_LN2_HIGH), x);
    r = _mm512_fmadd_ps(multiple, _mm512_set1_ps(-EXP_LN2_LOW), r);
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(EXP_C7), r, _mm512_set1_ps(EXP_C6));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(EXP_C5));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(EXP_C4));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(EXP_C3));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(EXP_C2));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    *ret_k = _mm512_sub_epi32(_mm512_castps_si512(rounded), _mm512_castps_si512(round));
    return p;
}

/* exp_canonical. */
static inline __m512 exp_avx512(__m512 x) {
    __m512i k;
    __m512 p = exp_reduced_avx512(_mm512_min_ps(_mm512_set1_ps(EXP_INPUT_MAX), x), &k);
    const __m512i half = _mm512_srai_epi32(k, 1), bias = _mm512_set1_epi32(127);
    const __m512i first = _mm512_slli_epi32(_mm512_add_epi32(half, bias), 23);
    const __m512i second = _mm512_slli_epi32(_mm512_add_epi32(_mm512_sub_epi32(k, half), bias), 23);
    p = _mm512_mul_ps(p, _mm512_castsi512_ps(first));
    p = _mm512_mul_ps(p, _mm512_castsi512_ps(second));
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(EXP_INPUT_MIN), _CMP_NLT_UQ),
                               p);
}

/* exp_canonical where x is not above 0: the product with 2^k is normal, so adding to the exponent
 * is exact. */
static inline __m512 exp_nonpositive_avx512(__m512 x) {
    __m512i k;
    const __m512i p = _mm512_castps_si512(exp_reduced_avx512(x, &k));
    const __mmask16 stays = _mm512_cmp_ps_mask(x, _mm512_set1_ps(EXP_INPUT_MIN), _CMP_NLT_UQ);
    return _mm512_castsi512_ps(_mm512_maskz_add_epi32(stays, p, _mm512_slli_epi32(k, 23)));
}

/* round_bf16 of normal numbers and zeros, the results as floats. */
static inline __m512 round_normal_to_bf16_avx512(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    return _mm512_castsi512_ps(_mm512_and_si512(rounded, _mm512_set1_epi32((int)0xffff0000)));
}

/* sum_tree. */
static inline float sum_tree_avx512(__m512 partial) {
    const __m256 eight =
        _mm256_add_ps(_mm512_castps512_ps256(partial), _mm512_extractf32x8_ps(partial, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

#endif
