/* The AVX-512 kernels for E4M3 weights on processors that have VBMI too (Ice Lake, Zen 4 and
 * later). */
#pragma GCC target("avx512vbmi")
#include "kernels/x86/kernel_bf16_template.h"

KERNELS(e4m3, true)

kernel_function *const kernels_e4m3_vbmi[KERNEL_ROWS_MAX][KERNEL_SIZES] = KERNEL_TABLE(e4m3);

void expand_tiles_vbmi(const uint8_t *packed, bf16 *ret, uint32_t tiles) {
    expand_tiles(packed, ret, tiles);
}
