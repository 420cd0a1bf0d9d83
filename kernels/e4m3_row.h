/* A row of activations in E4M3 as it travels to experts whose weights are E4M3 with scales: what
 * the fp8 profile would make of it there (kernels/reference/quantise.c), made before it is sent.
 *
 *   [E4M3, padded with zeros to whole groups of 128 | a float scale for each group]
 *   scale = max(largest |x| of the group, 2^-100) / 448; e4m3(x / scale), to nearest even
 *
 * 33/64 of the bytes of BF16, and the same bits in the end, because products quantise by the same
 * groups: those of the weights' scale blocks. */
#ifndef TROUPE_E4M3_ROW_H
#define TROUPE_E4M3_ROW_H

#include <stdint.h>

#define E4M3_ROW_GROUP       128u
#define E4M3_ROW_GROUP_BYTES (E4M3_ROW_GROUP + 4u)

static inline uint32_t e4m3_row_groups(uint32_t n) {
    return n / E4M3_ROW_GROUP + (n % E4M3_ROW_GROUP != 0);
}
static inline uint32_t e4m3_row_bytes(uint32_t n) {
    return e4m3_row_groups(n) * E4M3_ROW_GROUP_BYTES;
}
static inline uint32_t e4m3_row_scales_at(uint32_t n) {
    return e4m3_row_groups(n) * E4M3_ROW_GROUP;
}

#endif
