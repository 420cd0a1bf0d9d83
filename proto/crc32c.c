/* CRC32C (Castagnoli, reflected polynomial 0x82f63b78, as in iSCSI: RFC 3720) for machines without
 * an instruction for it, and the choice between that and the hardware forms. */
#include "proto/crc32c.h"

#include <string.h>

#include "proto/frame.h"

#define POLYNOMIAL 0x82f63b78u

/* TABLE[b][v]: what byte v contributes after b further bytes. Filled at load, before main, so that
 * no call pays for it and no thread can see it half done. */
static uint32_t TABLE[8][256];

__attribute__((constructor(101))) static void fill_table(void) {
    for (uint32_t v = 0; v < 256; v++) {
        uint32_t crc = v;
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? POLYNOMIAL : 0);
        TABLE[0][v] = crc;
    }
    for (int b = 1; b < 8; b++)
        for (uint32_t v = 0; v < 256; v++)
            TABLE[b][v] = TABLE[b - 1][v] >> 8 ^ TABLE[0][TABLE[b - 1][v] & 0xff];
}

/* Eight bytes at a time (Kounavis and Berry, "slicing by 8", 2005). */
uint32_t crc32c_portable(uint32_t crc, const void *bytes, size_t size) {
    const uint8_t *at = bytes;
    crc = ~crc;
    for (; size >= 8; size -= 8, at += 8) {
        crc ^=
            (uint32_t)at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
        crc = TABLE[7][crc & 0xff] ^ TABLE[6][crc >> 8 & 0xff] ^ TABLE[5][crc >> 16 & 0xff] ^
              TABLE[4][crc >> 24] ^ TABLE[3][at[4]] ^ TABLE[2][at[5]] ^ TABLE[1][at[6]] ^
              TABLE[0][at[7]];
    }
    for (; size > 0; size--)
        crc = crc >> 8 ^ TABLE[0][(crc ^ *at++) & 0xff];
    return ~crc;
}

/* matrix x vector over GF(2): column i of the matrix is what bit i becomes. */
static uint32_t apply(const uint32_t matrix[32], uint32_t vector) {
    uint32_t sum = 0;
    for (int i = 0; vector != 0; i++, vector >>= 1)
        if (vector & 1)
            sum ^= matrix[i];
    return sum;
}

/* The map of one zero byte, squared as often as the size has bits. */
uint32_t crc32c_shift(uint32_t reg, size_t size) {
    uint32_t matrix[32], square[32];
    for (int i = 0; i < 32; i++) {
        uint32_t bit = (uint32_t)1 << i;
        matrix[i] = bit >> 8 ^ TABLE[0][bit & 0xff];
    }
    for (; size > 0; size >>= 1) {
        if (size & 1)
            reg = apply(matrix, reg);
        for (int i = 0; i < 32; i++)
            square[i] = apply(matrix, matrix[i]);
        memcpy(matrix, square, sizeof matrix);
    }
    return reg;
}

static uint32_t (*form)(uint32_t crc, const void *bytes, size_t size) = crc32c_portable;

/* Once: three questions to the processor cost as much as a short frame. */
__attribute__((constructor(103))) static void choose(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("sse4.2"))
        form = crc32c_avx512_runs() ? crc32c_avx512 : crc32c_sse42;
#endif
}

uint32_t crc32c(uint32_t crc, const void *bytes, size_t size) {
    return form(crc, bytes, size);
}
