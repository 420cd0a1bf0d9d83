/* The tile instructions of AMX, written out: GCC 12's intrinsics do not tell the compiler that they
 * read memory. Tile numbers are literals. For *_amx.c only. */
#ifndef TROUPE_KERNELS_X86_TILE_AMX_H
#define TROUPE_KERNELS_X86_TILE_AMX_H

#include <stdint.h>

enum { TILE_ROWS = 16 };

#define TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile::: "memory")
#define TILE_LOAD(tile, base, stride_bytes)                                                        \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(base), "r"((size_t)(stride_bytes))   \
                     : "memory")
/* The same for what is not wanted again soon: from the second-level cache past the first one. */
#define TILE_LOAD_ONCE(tile, base, stride_bytes)                                                   \
    __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm" #tile ::"r"(base), "r"((size_t)(stride_bytes)) \
                     : "memory")
#define TILE_STORE(tile, base, stride_bytes)                                                       \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(base),                           \
                     "r"((size_t)(stride_bytes))                                                   \
                     : "memory")
#define TILE_PRODUCT(sums, inputs, weights)                                                        \
    __asm__ volatile("tdpbf16ps %%tmm" #weights ", %%tmm" #inputs ", %%tmm" #sums::: "memory")
/* Asks for a cache line, into the first or the second level; never faults. GCC takes a loop of nothing but
 * _mm_prefetch for an empty one and drops it. */
#define ASK_L1(line) __asm__ volatile("prefetcht0 %0" ::"m"(*(const char *)(line)))
#define ASK_L2(line) __asm__ volatile("prefetcht1 %0" ::"m"(*(const char *)(line)))
#define TILES_RELEASE() __asm__ volatile("tilerelease" ::: "memory")

/* The operand of LDTILECFG (Intel SDM volume 1, section 18.2). */
struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

/* Rows of each tile; all are 64 bytes wide. Clears every tile. */
static inline void tiles_configure(const uint8_t rows_of[8]) {
    _Alignas(64) struct tile_config config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.row_bytes[i] = 64;
        config.rows[i] = rows_of[i];
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory");
}

#endif
