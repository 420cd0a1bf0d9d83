/* What the AMX products of few and of many rows share. For matmul_*_amx.c only. */
#ifndef TROUPE_KERNELS_X86_MATMUL_AMX_H
#define TROUPE_KERNELS_X86_MATMUL_AMX_H

#include "kernels/rows.h"
#include "kernels/x86/kernel_bf16.h"
#include "kernels/x86/tile_amx.h"

/* What a part's loops share. */
struct walk {
    const struct matmul_job *job;
    const struct matrix *w;
    bool e4m3;
    size_t tile_bytes, panel_bytes;
    const uint32_t *plain;
    uint32_t row_begin, row_end;
    uint32_t packed_from; /* groups of rows before it are read where they lie; the others: */
    const bf16 *packed;   /* inputs as tiles [group][block][2] */
};

/* Inputs of a row. */
static inline const bf16 *job_row(const struct matmul_job *job, size_t row) {
    if (job->x_pages != NULL)
        return (const bf16 *)job->x_pages[row / PAGE_TOKENS] + row % PAGE_TOKENS * job->x_stride;
    return (const bf16 *)job->x + row * job->x_stride;
}

static inline const uint8_t *panel_at(const struct walk *walk, uint32_t panel) {
    return (const uint8_t *)walk->w->data + panel * walk->panel_bytes;
}

/* The scales of weights, times that of the row's activations in the fp8 profile. */
static inline __m512 both_scales(const struct walk *walk, __m512 scale, uint32_t row,
                                 uint32_t segment) {
    const float *x_scale = walk->job->x_scale;
    if (x_scale == NULL)
        return scale;
    return _mm512_mul_ps(scale, _mm512_set1_ps(x_scale[(size_t)row * walk->w->segments + segment]));
}

static inline __mmask16 panel_outputs(const struct matrix *w, uint32_t panel) {
    const uint32_t left = w->n - panel * PANEL_OUTPUTS;
    return left < PANEL_OUTPUTS ? (__mmask16)((1u << left) - 1) : 0xffff;
}

/* E4M3 (sign, 4 bits of exponent with bias 7, 3 of fraction) to BF16. Where all weights are normal
 * numbers both bytes of the BF16 value are affine functions of the bits, one instruction for 64
 * weights each: with the exponent's highest bit h the BF16 exponent is h ~h ~h ~h ~h and the three
 * lower bits. (Row i of a matrix, from the most significant byte down, makes bit i.) Others, where
 * there are any, are put right: multiples of 2^-9 by a table, NaN by its bits. */
static inline __attribute__((always_inline)) void expand_tile(const uint8_t *packed, bf16 *ret,
                                                              const bool plain) {
    const __m512i high_rows = _mm512_set1_epi64(0x1020404040404080);
    const __m512i low_rows = _mm512_set1_epi64(0x0000000001020408);
    const __m512i sign = _mm512_set1_epi8((char)0x80);
    const __m512i subnormal_high = _mm512_set1_epi64(0x3c3c3c3c3b3b3b00);
    const __m512i subnormal_low = _mm512_set1_epi64(0x60402000c0800000);
#pragma GCC unroll 8
    for (uint32_t i = 0; i < TILE_ELEMENTS; i += 64) {
        const __m512i bytes = _mm512_loadu_si512(packed + i);
        __m512i high = _mm512_gf2p8affine_epi64_epi8(bytes, high_rows, 0x3c);
        __m512i low = _mm512_gf2p8affine_epi64_epi8(bytes, low_rows, 0);
        if (!plain) {
            const __m512i magnitude = _mm512_andnot_si512(sign, bytes);
            const __mmask64 small = _mm512_testn_epi8_mask(bytes, _mm512_set1_epi8(0x78));
            const __mmask64 nan = _mm512_cmpeq_epi8_mask(magnitude, _mm512_set1_epi8(0x7f));
            const __m512i small_high = _mm512_or_si512(
                _mm512_shuffle_epi8(subnormal_high, magnitude), _mm512_and_si512(bytes, sign));
            high = _mm512_mask_mov_epi8(high, small, small_high);
            low = _mm512_mask_shuffle_epi8(low, small, subnormal_low, magnitude);
            high = _mm512_mask_mov_epi8(high, nan, bytes);
            low = _mm512_mask_mov_epi8(low, nan, _mm512_set1_epi8((char)0xc0));
        }
        _mm512_store_si512(ret + i, _mm512_unpacklo_epi8(low, high));
        _mm512_store_si512(ret + i + 32, _mm512_unpackhi_epi8(low, high));
    }
}

static inline void expand_plain(const uint8_t *packed, bf16 *ret) {
    expand_tile(packed, ret, true);
}
/* Seldom: out of the way of the others. */
static __attribute__((noinline, unused)) void expand_mixed(const uint8_t *packed, bf16 *ret) {
    expand_tile(packed, ret, false);
}

/* A tile of coded weights but for its exceptions. */
static inline __attribute__((always_inline)) void expand_coded(const struct matrix_codes *codes,
                                                               const uint8_t *packed, bf16 *ret) {
    const __m512i nibble = _mm512_set1_epi8(15), sign = _mm512_set1_epi8((char)0x80);
    const __m512i high_of = _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)codes->high));
    const __m512i low_of = _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)codes->low));
    enum { OR_AND = 0xf8, OR_ANDNOT = 0xf4 }; /* ternary logic: a | (b & c), a | (b & ~c) */
#pragma GCC unroll 4
    for (uint32_t i = 0; i < TILE_ELEMENTS; i += 128) {
        const __m512i both = _mm512_loadu_si512(packed + TILE_ELEMENTS + i / 2);
        const __m512i code[2] = {_mm512_and_si512(both, nibble),
                                 _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble)};
#pragma GCC unroll 2
        for (uint32_t j = 0; j < 2; j++) {
            const __m512i bytes = _mm512_loadu_si512(packed + i + 64 * j);
            __m512i high = _mm512_shuffle_epi8(high_of, code[j]);
            __m512i low = _mm512_shuffle_epi8(low_of, code[j]);
            high = _mm512_ternarylogic_epi32(high, bytes, sign, OR_AND);
            low = _mm512_ternarylogic_epi32(low, bytes, sign, OR_ANDNOT);
            bf16 *to = ret + i + (size_t)64 * j;
            _mm512_store_si512(to, _mm512_unpacklo_epi8(low, high));
            _mm512_store_si512(to + 32, _mm512_unpackhi_epi8(low, high));
        }
    }
}

/* The weights of one tile as BF16: where they lie, or expanded into `scratch`. */
static inline const bf16 *tile_weights(const struct walk *walk, uint32_t panel, uint32_t block,
                                       bf16 *scratch) {
    const uint8_t *tile = panel_at(walk, panel) + block * walk->tile_bytes;
    if (!walk->e4m3)
        return (const bf16 *)(const void *)tile;
    const size_t index = (size_t)panel * matrix_blocks(walk->w) + block;
    if (__builtin_expect(walk->plain[index / 32] >> index % 32 & 1, 1))
        expand_plain(tile, scratch);
    else
        expand_mixed(tile, scratch);
    return scratch;
}

/* Outputs of panels [panel_begin, panel_end), rows of `walk`: up to FEW_ROWS of them, or any number,
 * whose inputs should fit into a part of the second-level cache. A job with a sink or with pages of
 * inputs takes the second. */
enum { FEW_ROWS = 4 * TILE_ROWS };
/* Tiles of coded weights as BF16. */
void tiles_decode_amx(const struct matrix *w, size_t first, size_t count, bf16 *ret);
void matmul_amx_few(const struct walk *walk, uint32_t panel_begin, uint32_t panel_end);
void matmul_amx_many(struct walk *walk, uint32_t panel_begin, uint32_t panel_end);

#endif
