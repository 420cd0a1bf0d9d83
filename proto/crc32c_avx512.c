/* CRC32C by carry-less multiplication, 64 bytes at a time (Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ
 * Instruction", Intel, 2009).
 *
 * 16 bytes A B (8 each), read as a polynomial whose highest power is the first byte's lowest bit, weigh A x^64 + B. Moving them forward by
 * D bits multiplies them by x^D; modulo P that is A (x^(D+64) mod P) + B (x^D mod P), which has 96 bits and is added to the 16 bytes
 * that stand there. So all bytes are folded into the last 64, whose register is that of all bytes. A product of two reflected numbers
 * comes out one power too low, hence the 1 less in the exponents of fill(). */
#include "proto/crc32c.h"

#if defined(__x86_64__)
#pragma GCC target("pclmul,vpclmulqdq,sse4.2")

#include <immintrin.h>

#define BLOCK  64u
#define LANES  4u
#define STRIDE (LANES * BLOCK)
#define LEAST  (2 * BLOCK)

/* x^(8 bytes + 63) and x^(8 bytes - 1) mod P, for the first and the second half of 16 bytes. */
struct fold {
    uint64_t first, second;
};
static struct fold FOLD[LANES + 1]; /* by so many blocks */

/* After the table of crc32c.c, which crc32c_shift() needs. */
__attribute__((constructor(102))) static void fill(void) {
    const uint32_t x7 = (uint32_t)1 << 24; /* the register of x^7: its highest bit is x^0 */
    for (uint32_t blocks = 1; blocks <= LANES; blocks++) {
        FOLD[blocks].first = (uint64_t)crc32c_shift(x7, blocks * BLOCK + 7) << 32;
        FOLD[blocks].second = (uint64_t)crc32c_shift(x7, blocks * BLOCK - 1) << 32;
    }
}

static inline __m512i factors(uint32_t blocks) {
    return _mm512_broadcast_i32x4(_mm_set_epi64x((long long)FOLD[blocks].second, (long long)FOLD[blocks].first));
}

static inline __m512i fold(__m512i far, __m512i factor, __m512i near) {
    __m512i first = _mm512_clmulepi64_epi128(far, factor, 0x00);
    __m512i second = _mm512_clmulepi64_epi128(far, factor, 0x11);
    return _mm512_ternarylogic_epi64(first, second, near, 0x96); /* the sum of three */
}

/* Whole blocks, 2 at least; the register after them. */
static uint32_t blocks(uint32_t reg, const uint8_t *at, size_t size) {
    __m512i begin = _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)reg));
    __m512i sum = _mm512_xor_si512(_mm512_loadu_si512(at), begin);
    const uint8_t *end = at + size;
    at += BLOCK;
    if (size >= 2 * STRIDE) { /* four sums, so that none waits for its own product */
        __m512i lane[LANES], factor = factors(LANES);
        lane[0] = sum;
        for (uint32_t i = 1; i < LANES; i++, at += BLOCK)
            lane[i] = _mm512_loadu_si512(at);
        for (; (size_t)(end - at) >= STRIDE; at += STRIDE)
            for (uint32_t i = 0; i < LANES; i++)
                lane[i] = fold(lane[i], factor, _mm512_loadu_si512(at + i * BLOCK));
        sum = lane[LANES - 1];
        for (uint32_t i = 0; i < LANES - 1; i++)
            sum = fold(lane[i], factors(LANES - 1 - i), sum);
    }
    for (; at < end; at += BLOCK)
        sum = fold(sum, factors(1), _mm512_loadu_si512(at));
    uint64_t word[BLOCK / 8], last = 0;
    _mm512_storeu_si512(word, sum);
    for (size_t i = 0; i < BLOCK / 8; i++)
        last = _mm_crc32_u64(last, word[i]);
    return (uint32_t)last;
}

bool crc32c_avx512_runs(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("vpclmulqdq") && __builtin_cpu_supports("sse4.2");
}

uint32_t crc32c_avx512(uint32_t crc, const void *bytes, size_t size) {
    size_t whole = size / BLOCK * BLOCK;
    if (whole < LEAST)
        return crc32c_sse42(crc, bytes, size);
    uint32_t reg = blocks(~crc, bytes, whole);
    return crc32c_sse42(~reg, (const uint8_t *)bytes + whole, size - whole);
}

#endif
