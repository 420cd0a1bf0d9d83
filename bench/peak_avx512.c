/* The canonical product is chains of FP32 FMA on BF16 values widened in registers (kernels/ops.h):
 * this is their limit. */
#include <immintrin.h>

#include "bench/limits.h"

float peak_avx512(uint32_t loops) {
    __m512 sum[16];
    const __m512 a = _mm512_set1_ps(0.999f), b = _mm512_set1_ps(0.001f);
    for (int i = 0; i < 16; i++)
        sum[i] = _mm512_set1_ps((float)i);
    for (uint32_t loop = 0; loop < loops; loop++) {
        _Pragma("GCC unroll 16") for (int i = 0; i < 16; i++) sum[i] =
            _mm512_fmadd_ps(sum[i], a, b);
    }
    for (int i = 1; i < 16; i++)
        sum[0] = _mm512_add_ps(sum[0], sum[i]);
    return _mm512_reduce_add_ps(sum[0]);
}
