/* The AVX-512 kernels for processors with F, BW, VL and DQ. */
#include "kernels/x86/kernel_bf16_template.h"

KERNELS(bf16, false)
KERNELS(e4m3, true)

kernel_function *const kernels_bf16[KERNEL_ROWS_MAX][KERNEL_SIZES] = KERNEL_TABLE(bf16);
kernel_function *const kernels_e4m3[KERNEL_ROWS_MAX][KERNEL_SIZES] = KERNEL_TABLE(e4m3);

void expand_tiles_avx512(const uint8_t *packed, bf16 *ret, uint32_t tiles) {
    expand_tiles(packed, ret, tiles);
}

expand_function *expand_tiles_best(void) {
    return __builtin_cpu_supports("avx512vbmi") ? expand_tiles_vbmi : expand_tiles_avx512;
}
