/* 128 channels of a row to E4M3 by one warp, four a lane; the same bits as the CPU's
 * (kernels/reference/quantise.c):
 *   most = largest |x| of the group, at least QUANTISE_LEAST; scale = most / 448
 *   q = e4m3(x / scale), to nearest even */
#ifndef TROUPE_CUDA_QUANTISE_CUH
#define TROUPE_CUDA_QUANTISE_CUH

#include "kernels/cuda/numerics.cuh"
#include "kernels/e4m3_row.h"

#define QUANTISE_LEAST 0x1p-100f /* the scale of a row of zeros: not zero, not denormal */

/* All lanes of a warp call it, each with its four channels; returns them, the first in the low
 * byte, and the group's scale. */
DEVICE uint32_t quantise_group(const float (&value)[4], float &scale) {
    float most = 0;
    for (int j = 0; j < 4; j++) {
        const float magnitude = value[j] < 0 ? -value[j] : value[j];
        most = magnitude > most ? magnitude : most;
    }
    for (int bit = 16; bit > 0; bit /= 2) {
        const float other = __shfl_xor_sync(0xffffffff, most, bit);
        most = other > most ? other : most;
    }
    most = most > QUANTISE_LEAST ? most : QUANTISE_LEAST;
    scale = most / 448.0f;
    uint32_t packed = 0;
    for (int j = 0; j < 4; j++)
        packed |= (uint32_t)round_e4m3(value[j] / scale) << 8 * j;
    return packed;
}

#endif
