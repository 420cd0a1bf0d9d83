/* Activations of the fp8 profile with AVX-512; the bits of reference/quantise.c. */
#include "kernels/internal.h"
#include "kernels/x86/vector_avx512.h"

/* E4M3 to nearest even, saturating, as the bits of a float: e4m3_to_float(e4m3_from_float(x)), with
 * the NaN of e4m3_to_bf16. */
static inline __m512i round_to_e4m3(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i sign = _mm512_and_si512(bits, _mm512_set1_epi32((int)0x80000000));
    const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(magnitude, 20), _mm512_set1_epi32(1));
    __m512i value = _mm512_add_epi32(_mm512_add_epi32(magnitude, _mm512_set1_epi32(0x7ffff)), odd);
    value = _mm512_and_si512(value, _mm512_set1_epi32((int)0xfff00000));
    /* Below 2^-6: a multiple of 2^-9, rounded by the addition. */
    const __mmask16 small = _mm512_cmplt_epu32_mask(magnitude, _mm512_set1_epi32(0x3c800000));
    const __m512 unit = _mm512_set1_ps(16384.0f);
    const __m512 shifted = _mm512_add_ps(_mm512_castsi512_ps(magnitude), unit);
    value = _mm512_mask_mov_epi32(value, small, _mm512_castps_si512(_mm512_sub_ps(shifted, unit)));
    value = _mm512_min_epu32(value, _mm512_set1_epi32(0x43e00000)); /* 448 */
    const __mmask16 nan = _mm512_cmpgt_epu32_mask(magnitude, _mm512_set1_epi32(0x7f800000));
    value = _mm512_mask_mov_epi32(value, nan, _mm512_set1_epi32(0x7fc00000));
    return _mm512_or_si512(value, sign);
}

static inline __m512 load(const bf16 *x, __mmask16 lanes) {
    return widen_avx512(_mm256_maskz_loadu_epi16(lanes, x));
}

static float group_scale(const bf16 *x, uint32_t count) {
    const __m512i magnitudes = _mm512_set1_epi32(0x7fffffff);
    __m512 largest = _mm512_setzero_ps();
    for (uint32_t k = 0; k < count; k += 16) {
        const __m512 value = _mm512_castsi512_ps(
            _mm512_and_si512(_mm512_castps_si512(load(x + k, first_lanes(count - k))), magnitudes));
        /* A NaN is not greater. */
        const __mmask16 greater = _mm512_cmp_ps_mask(value, largest, _CMP_GT_OQ);
        largest = _mm512_mask_mov_ps(largest, greater, value);
    }
    const float most = _mm512_reduce_max_ps(largest);
    return (most > QUANTISE_LEAST ? most : QUANTISE_LEAST) / 448.0f;
}

void quantise_avx512(const struct matrix *w, const bf16 *x, size_t x_stride, uint32_t rows,
                     bf16 *ret, size_t ret_stride, float *ret_scale) {
    for (uint32_t r = 0; r < rows; r++, x += x_stride, ret += ret_stride)
        for (uint32_t s = 0; s < w->segments; s++) {
            const uint32_t begin = w->segment_k[s], end = w->segment_k[s + 1];
            const float scale = group_scale(x + begin, end - begin);
            const __m512 scales = _mm512_set1_ps(scale);
            for (uint32_t k = begin; k < end; k += 16) {
                const __mmask16 lanes = first_lanes(end - k);
                const __m512i value = round_to_e4m3(_mm512_div_ps(load(x + k, lanes), scales));
                _mm256_mask_storeu_epi16(ret + k, lanes,
                                         _mm512_cvtepi32_epi16(_mm512_srli_epi32(value, 16)));
            }
            *ret_scale++ = scale;
        }
}

/* The code of a value that E4M3 has: exponent and mantissa, or a multiple of 2^-9. */
static inline __m128i e4m3_code(__m512i value) {
    const __m512i magnitude = _mm512_and_si512(value, _mm512_set1_epi32(0x7fffffff));
    const __mmask16 small = _mm512_cmplt_epu32_mask(magnitude, _mm512_set1_epi32(0x3c800000));
    const __mmask16 nan = _mm512_cmpgt_epu32_mask(magnitude, _mm512_set1_epi32(0x7f800000));
    __m512i code = _mm512_sub_epi32(_mm512_srli_epi32(magnitude, 20), _mm512_set1_epi32(120 << 3));
    const __m512i multiple =
        _mm512_cvttps_epi32(_mm512_mul_ps(_mm512_castsi512_ps(magnitude), _mm512_set1_ps(512.0f)));
    code = _mm512_mask_mov_epi32(code, small, multiple);
    code = _mm512_mask_mov_epi32(code, nan, _mm512_set1_epi32(0x7f));
    const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(value, 24), _mm512_set1_epi32(0x80));
    return _mm512_cvtepi32_epi8(_mm512_or_si512(code, sign));
}

void row_to_e4m3_avx512(const void *row, uint32_t n, uint8_t *ret) {
    const bf16 *x = row;
    float *ret_scale = (float *)(void *)(ret + e4m3_row_scales_at(n));
    for (uint32_t first = 0; first < n; first += E4M3_ROW_GROUP) {
        const uint32_t count = n - first < E4M3_ROW_GROUP ? n - first : E4M3_ROW_GROUP;
        const float scale = group_scale(x + first, count);
        const __m512 scales = _mm512_set1_ps(scale);
        for (uint32_t k = 0; k < E4M3_ROW_GROUP; k += 16) { /* zeros beyond the row */
            const __mmask16 lanes = k < count ? first_lanes(count - k) : 0;
            const __m512 value = _mm512_div_ps(load(x + first + k, lanes), scales);
            _mm_storeu_si128((__m128i *)(void *)(ret + first + k), e4m3_code(round_to_e4m3(value)));
        }
        *ret_scale++ = scale;
    }
}

void e4m3_widen_avx512(const uint8_t *x, uint32_t n, bf16 *ret) {
    for (uint32_t k = 0; k < n; k += 16) {
        const __mmask16 lanes = first_lanes(n - k);
        const __m512i code = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes, x + k));
        const __m512i magnitude = _mm512_and_si512(code, _mm512_set1_epi32(0x7f));
        const __mmask16 small = _mm512_cmplt_epu32_mask(magnitude, _mm512_set1_epi32(8));
        const __mmask16 nan = _mm512_cmpeq_epu32_mask(magnitude, _mm512_set1_epi32(0x7f));
        __m512i value =
            _mm512_slli_epi32(_mm512_add_epi32(magnitude, _mm512_set1_epi32(120 << 3)), 20);
        const __m512 multiple =
            _mm512_mul_ps(_mm512_cvtepi32_ps(magnitude), _mm512_set1_ps(0x1p-9f));
        value = _mm512_mask_mov_epi32(value, small, _mm512_castps_si512(multiple));
        value = _mm512_mask_mov_epi32(value, nan, _mm512_set1_epi32(0x7fc00000));
        const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(code, _mm512_set1_epi32(0x80)), 24);
        value = _mm512_or_si512(value, sign);
        _mm256_mask_storeu_epi16(ret + k, lanes,
                                 _mm512_cvtepi32_epi16(_mm512_srli_epi32(value, 16)));
    }
}
