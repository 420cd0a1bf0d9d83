/* CRC32C (Castagnoli, reflected polynomial 0x82f63b78, as in iSCSI: RFC 3720) for machines without
 * an instruction for it, the choice between that and the hardware forms, and sums by many threads.
 */
#include "proto/crc32c.h"

#include "kernels/parallel.h"
#include "proto/frame.h"

#define POLYNOMIAL 0x82f63b78u

/* TABLE[b][v]: what byte v contributes after b further bytes. Filled at load, before main, so that
 * no call pays for it and no thread can see it half done. */
static uint32_t TABLE[8][256];

/* SHIFT[b]: the linear map of 2^b zero bytes. */
#define SHIFTS 48
static uint32_t SHIFT[SHIFTS][32];

/* matrix x vector over GF(2): column i of the matrix is what bit i becomes. */
static uint32_t apply(const uint32_t matrix[32], uint32_t vector) {
    uint32_t sum = 0;
    for (int i = 0; vector != 0; i++, vector >>= 1)
        if (vector & 1)
            sum ^= matrix[i];
    return sum;
}

static void fill_shifts(void) {
    for (int i = 0; i < 32; i++) {
        uint32_t bit = (uint32_t)1 << i;
        SHIFT[0][i] = bit >> 8 ^ TABLE[0][bit & 0xff];
    }
    for (int b = 1; b < SHIFTS; b++)
        for (int i = 0; i < 32; i++)
            SHIFT[b][i] = apply(SHIFT[b - 1], SHIFT[b - 1][i]);
}

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
    fill_shifts();
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

uint32_t crc32c_shift(uint32_t reg, size_t size) {
    ASSERT(size >> (SHIFTS - 1) == 0);
    for (int b = 0; size > 0; size >>= 1, b++)
        if (size & 1)
            reg = apply(SHIFT[b], reg);
    return reg;
}

/* Inversions before and after cancel out: crc(A B) = shift(crc(A), bytes of B) ^ crc(B). */
uint32_t crc32c_join(uint32_t first, uint32_t second, size_t second_bytes) {
    return crc32c_shift(first, second_bytes) ^ second;
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

enum { PARTS_MAX = 16, PART_BYTES = 128 * 1024 };

struct sum {
    const uint8_t *bytes;
    size_t size;
    uint32_t crc[PARTS_MAX];
};

static size_t sum_border(const struct sum *sum, int part, int parts) {
    return sum->size / (size_t)parts * (size_t)part +
           (part == parts ? sum->size % (size_t)parts : 0);
}

static void sum_part(void *argument, int part, int parts) {
    struct sum *sum = argument;
    const size_t first = sum_border(sum, part, parts);
    sum->crc[part] = crc32c(0, sum->bytes + first, sum_border(sum, part + 1, parts) - first);
}

uint32_t crc32c_parallel(const struct parallel *parallel, uint32_t crc, const void *bytes,
                         size_t size) {
    struct sum sum = {.bytes = bytes, .size = size};
    int parts = parallel->width < PARTS_MAX ? parallel->width : PARTS_MAX;
    if (size / PART_BYTES < (size_t)parts)
        parts = (int)(size / PART_BYTES);
    if (parts <= 1)
        return crc32c(crc, bytes, size);
    parallel->run(parallel->pool, sum_part, &sum, parts);
    for (int part = 0; part < parts; part++)
        crc = crc32c_join(crc, sum.crc[part],
                          sum_border(&sum, part + 1, parts) - sum_border(&sum, part, parts));
    return crc;
}
