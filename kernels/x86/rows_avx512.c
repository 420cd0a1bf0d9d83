/* Operations on rows in the bf16 profile, 16 elements at a time; the bits of reference/rows_*.c. */
#include "kernels/x86/vector_avx512.h"

/* Writes 16 activations from element i of a row of n; zeros from n on. */
static void store(bf16 *row, size_t i, uint32_t n, __m512 values) {
    const __mmask16 lanes = i < n ? first_lanes(n - i) : 0;
    _mm256_storeu_si256((__m256i *)(row + i),
                        _mm256_maskz_mov_epi16(lanes, narrow_to_bf16_avx512(values)));
}

/* 16 floats from element i of a row of n; zeros from n on. */
static __m512 load(const float *row, size_t i, uint32_t n) {
    return _mm512_maskz_loadu_ps(i < n ? first_lanes(n - i) : 0, row + i);
}

void rms_norm_bf16_avx512(const float *x, size_t x_stride, const float *weight, float eps,
                          uint32_t rows, uint32_t n, void *ret, size_t ret_stride) {
    for (size_t r = 0; r < rows; r++) {
        const float *from = x + r * x_stride;
        bf16 *to = (bf16 *)ret + r * ret_stride;
        __m512 partial = _mm512_setzero_ps();
        for (size_t i = 0; i < n; i += 16) {
            const __m512 value = load(from, i, n);
            partial = _mm512_add_ps(partial, _mm512_mul_ps(value, value));
        }
        const __m512 factor =
            _mm512_set1_ps(rsqrt_canonical(sum_tree_avx512(partial) / (float)n + eps));
        for (size_t i = 0; i < activation_stride(n); i += 16)
            store(to, i, n,
                  _mm512_mul_ps(_mm512_mul_ps(load(from, i, n), factor), load(weight, i, n)));
    }
}

void convert_bf16_avx512(const float *x, size_t x_stride, uint32_t rows, uint32_t n, void *ret,
                         size_t ret_stride) {
    for (size_t r = 0; r < rows; r++)
        for (size_t i = 0; i < activation_stride(n); i += 16)
            store((bf16 *)ret + r * ret_stride, i, n, load(x + r * x_stride, i, n));
}

void silu_mul_bf16_avx512(const float *gate, const float *up, size_t stride, uint32_t rows,
                          uint32_t n, void *ret, size_t ret_stride) {
    const __m512 one = _mm512_set1_ps(1.0f), sign = _mm512_set1_ps(-0.0f);
    for (size_t r = 0; r < rows; r++) {
        for (size_t i = 0; i < activation_stride(n); i += 16) {
            const __m512 g = load(gate + r * stride, i, n);
            const __m512 sigmoid =
                _mm512_div_ps(one, _mm512_add_ps(one, exp_avx512(_mm512_xor_ps(g, sign))));
            store((bf16 *)ret + r * ret_stride, i, n,
                  _mm512_mul_ps(_mm512_mul_ps(g, sigmoid), load(up + r * stride, i, n)));
        }
    }
}

void widen_bf16_avx512(const void *x, size_t x_stride, uint32_t rows, uint32_t n, float *ret,
                       size_t ret_stride) {
    for (size_t r = 0; r < rows; r++) {
        const bf16 *from = (const bf16 *)x + r * x_stride;
        for (size_t i = 0; i < n; i += 16) {
            const __mmask16 lanes = first_lanes(n - i);
            _mm512_mask_storeu_ps(ret + r * ret_stride + i, lanes,
                                  widen_avx512(_mm256_maskz_loadu_epi16(lanes, from + i)));
        }
    }
}

void add_avx512(float *x, size_t x_stride, const float *y, size_t y_stride, uint32_t rows,
                uint32_t n) {
    for (size_t r = 0; r < rows; r++) {
        float *to = x + r * x_stride;
        for (size_t i = 0; i < n; i += 16)
            _mm512_mask_storeu_ps(to + i, first_lanes(n - i),
                                  _mm512_add_ps(load(to, i, n), load(y + r * y_stride, i, n)));
    }
}

void rope_avx512(float *x, size_t stride, uint32_t count, uint32_t rope, const float *cos_sin) {
    for (uint32_t i = 0; i < rope; i += 16) {
        const __m512 table = load(cos_sin, i, rope);
        const __m512 cosines = _mm512_moveldup_ps(table), sines = _mm512_movehdup_ps(table);
        for (size_t v = 0; v < count; v++) {
            float *vector = x + v * stride;
            const __m512 pairs = load(vector, i, rope);
            const __m512 straight = _mm512_mul_ps(pairs, cosines);
            const __m512 crossed = _mm512_mul_ps(_mm512_permute_ps(pairs, 0xb1), sines);
            const __m512 sum = _mm512_add_ps(straight, crossed);
            _mm512_mask_storeu_ps(vector + i, first_lanes(rope - i),
                                  _mm512_mask_sub_ps(sum, 0x5555, straight, crossed));
        }
    }
}
