/* Coding of BF16 weights (kernels/coded.c) 64 at a time, so that loading them does not take longer.
 */
#pragma GCC target("avx512vbmi")
#include <immintrin.h>

#include "kernels/internal.h"

/* Codes of 64 exponents, from a table of 256. */
static __m512i look_up(const __m512i table[4], __m512i exponents) {
    const __m512i low = _mm512_permutex2var_epi8(table[0], exponents, table[1]);
    const __m512i high = _mm512_permutex2var_epi8(table[2], exponents, table[3]);
    return _mm512_mask_mov_epi8(low, _mm512_movepi8_mask(exponents), high);
}

size_t code_tile_vbmi(const bf16 tile[TILE_ELEMENTS], size_t index, const uint8_t code_of[256],
                      uint8_t ret[CODED_TILE_BYTES], struct exception *exception, size_t room) {
    const __m512i fraction = _mm512_set1_epi16(0x7f), sign = _mm512_set1_epi16(0x80);
    const __m512i byte = _mm512_set1_epi16(0xff), nibble = _mm512_set1_epi8(15);
    __m512i table[4], code[TILE_ELEMENTS / 64];
    size_t exceptions = 0;
    for (int i = 0; i < 4; i++)
        table[i] = _mm512_loadu_si512(code_of + 64 * i);
    for (uint32_t i = 0; i < TILE_ELEMENTS / 64; i++) {
        __m512i rest[2], exponent[2];
        for (uint32_t h = 0; h < 2; h++) {
            const __m512i x = _mm512_loadu_si512(tile + 64 * i + 32 * h);
            rest[h] = _mm512_or_si512(_mm512_and_si512(x, fraction),
                                      _mm512_and_si512(_mm512_srli_epi16(x, 8), sign));
            exponent[h] = _mm512_and_si512(_mm512_srli_epi16(x, 7), byte);
        }
        /* the inverse of unpacking low and high halves of lanes */
        _mm512_storeu_si512(ret + 64 * i, _mm512_packus_epi16(rest[0], rest[1]));
        code[i] = look_up(table, _mm512_packus_epi16(exponent[0], exponent[1]));
        __mmask64 others = _mm512_movepi8_mask(code[i]); /* NO_CODE */
        code[i] = _mm512_and_si512(code[i], nibble);
        uint64_t places = 0; /* of the others, in the tile's order */
        for (; others != 0; others &= others - 1) {
            const uint32_t at = (uint32_t)__builtin_ctzll(others);
            places |= (uint64_t)1 << (at / 8 % 2 * 32 + at / 16 * 8 + at % 8);
        }
        for (; places != 0; places &= places - 1) {
            const uint32_t e = 64 * i + (uint32_t)__builtin_ctzll(places);
            if (exceptions++ < room)
                exception[exceptions - 1] =
                    (struct exception){(uint32_t)(index * TILE_ELEMENTS + e), tile[e], 0};
        }
    }
    for (uint32_t i = 0; i < TILE_ELEMENTS / 128; i++)
        _mm512_storeu_si512(ret + TILE_ELEMENTS + 64 * i,
                            _mm512_or_si512(code[2 * i], _mm512_slli_epi16(code[2 * i + 1], 4)));
    return exceptions;
}
