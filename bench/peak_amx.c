/* TDPBF16PS into four tiles of sums, nothing loaded in between. */
#include <string.h>

#include "bench/limits.h"

float peak_amx(uint32_t loops) {
    /* palette 1, sums in tiles 0..3, operands in 4..7, all 16 rows of 64 bytes */
    _Alignas(64) uint8_t config[64] = {1};
    for (int i = 0; i < 8; i++) {
        config[16 + 2 * i] = 64;
        config[48 + i] = 16;
    }
    _Alignas(64) float sums[16 * 16];
    memset(sums, 0, sizeof sums);
    __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory");
    __asm__ volatile("tilezero %%tmm0\n tilezero %%tmm1\n tilezero %%tmm2\n tilezero %%tmm3\n"
                     "tilezero %%tmm4\n tilezero %%tmm5\n tilezero %%tmm6\n tilezero %%tmm7" ::
                         : "memory");
    for (uint32_t loop = 0; loop < loops; loop++)
        __asm__ volatile("tdpbf16ps %%tmm6, %%tmm4, %%tmm0\n tdpbf16ps %%tmm7, %%tmm4, %%tmm1\n"
                         "tdpbf16ps %%tmm6, %%tmm5, %%tmm2\n tdpbf16ps %%tmm7, %%tmm5, %%tmm3" ::
                             : "memory");
    __asm__ volatile("tilestored %%tmm0, (%0,%1,1)" ::"r"(sums), "r"((uint64_t)64) : "memory");
    __asm__ volatile("tilerelease" ::: "memory");
    return sums[0];
}
