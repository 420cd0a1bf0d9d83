/* CRC32C by the processor's instruction. It takes 8 bytes with a latency of 3 cycles and can begin
 * one each cycle, so three neighbouring pieces are summed at once and joined by shifting the
 * earlier registers over the later pieces (Gopal et al., "Fast CRC Computation for iSCSI Polynomial
 * Using CRC32 Instruction", Intel, 2011). */
#include "proto/crc32c.h"

#if defined(__x86_64__)

#include <nmmintrin.h>
#include <stdbool.h>
#include <string.h>

/* Two sizes of piece: the shift over each is one table of 4 x 256 words, so a join is four
 * look-ups. */
#define LONG_PIECE  4096
#define SHORT_PIECE 256

static uint32_t SHIFT_LONG[4][256], SHIFT_SHORT[4][256];

static void fill(uint32_t table[4][256], size_t size) {
    uint32_t bit[32];
    for (int i = 0; i < 32; i++)
        bit[i] = crc32c_shift((uint32_t)1 << i, size);
    for (int byte = 0; byte < 4; byte++)
        for (uint32_t v = 0; v < 256; v++) {
            uint32_t sum = 0;
            for (int i = 0; i < 8; i++)
                sum ^= v >> i & 1 ? bit[8 * byte + i] : 0;
            table[byte][v] = sum;
        }
}

/* After the table of crc32c.c, which crc32c_shift() needs (lower priorities run first). */
__attribute__((constructor(102))) static void fill_tables(void) {
    fill(SHIFT_LONG, LONG_PIECE);
    fill(SHIFT_SHORT, SHORT_PIECE);
}

static inline uint32_t shift(const uint32_t table[4][256], uint32_t reg) {
    return table[0][reg & 0xff] ^ table[1][reg >> 8 & 0xff] ^ table[2][reg >> 16 & 0xff] ^
           table[3][reg >> 24];
}

static inline uint64_t load(const uint8_t *at) {
    uint64_t word;
    memcpy(&word, at, sizeof word);
    return word;
}

static inline uint32_t three_pieces(uint32_t reg, const uint8_t *at, size_t piece,
                                    const uint32_t table[4][256]) {
    uint64_t a = reg, b = 0, c = 0;
    for (size_t i = 0; i < piece; i += 8) {
        a = _mm_crc32_u64(a, load(at + i));
        b = _mm_crc32_u64(b, load(at + piece + i));
        c = _mm_crc32_u64(c, load(at + 2 * piece + i));
    }
    return shift(table, shift(table, (uint32_t)a) ^ (uint32_t)b) ^ (uint32_t)c;
}

uint32_t crc32c_sse42(uint32_t crc, const void *bytes, size_t size) {
    const uint8_t *at = bytes;
    uint64_t reg = ~crc;
    for (; size >= 3 * LONG_PIECE; size -= 3 * LONG_PIECE, at += 3 * LONG_PIECE)
        reg = three_pieces((uint32_t)reg, at, LONG_PIECE, SHIFT_LONG);
    for (; size >= 3 * SHORT_PIECE; size -= 3 * SHORT_PIECE, at += 3 * SHORT_PIECE)
        reg = three_pieces((uint32_t)reg, at, SHORT_PIECE, SHIFT_SHORT);
    for (; size >= 8; size -= 8, at += 8)
        reg = _mm_crc32_u64(reg, load(at));
    for (; size > 0; size--)
        reg = _mm_crc32_u8((uint32_t)reg, *at++);
    return ~(uint32_t)reg;
}

#endif
