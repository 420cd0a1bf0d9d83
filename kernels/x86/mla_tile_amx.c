/* Inner loops of multi-head latent attention with AMX; the bits of reference/mla_bf16.c. TDPBF16PS
 * computes the canonical dot product whichever operand is which, since a product does not depend on
 * the order of its factors. The softmax has queries in its lanes: the 16 interleaved partial sums
 * of sum_canonical are 16 registers, and their tree is additions of registers. */
#include "kernels/x86/mla_amx.h"

#include "actors/errors.h"
#include "kernels/x86/tile_amx.h"
#include "kernels/x86/vector_avx512.h"

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

enum { GROUPS = PAGE_TOKENS / 16, CHUNKS_AT_ONCE = 4, TILE_FLOATS = 16 * 16 };

void amx_queries_start(struct amx_queries *self, uint32_t count, uint32_t chunks) {
    self->count = count;
    for (uint32_t m = 0; m < QUERIES; m++) {
        self->maximum[m] = -__builtin_inff();
        self->sum[m] = 0;
    }
    memset(self->acc, 0, (size_t)chunks * TILE_FLOATS * sizeof *self->acc);
}

void amx_attend_enter(void) {
    const uint8_t rows_of[8] = {16, 16, 16, 16, 16, 16, 16, 16};
    tiles_configure(rows_of);
}

void amx_attend_leave(void) {
    TILES_RELEASE();
}

/* ---- Packing ---- */

/* Pairs of 16 values each: a in the lower, b in the upper halves. */
INLINE __m512i interleave(__m512i a, __m512i b) {
    return _mm512_or_si512(a, _mm512_slli_epi32(b, 16));
}

static bf16 *values_at(bf16 *values, uint32_t chunks, uint32_t pair, uint32_t chunk) {
    return values + (((size_t)pair / 16 * chunks + chunk) * 16 + pair % 16) * 32;
}

void amx_values_pack(bf16 *ret, uint32_t chunks, const bf16 *rows, size_t stride, uint32_t count,
                     uint32_t width, const bf16 *next) {
    const size_t pair_bytes = 2 * stride * sizeof *rows;
    for (uint32_t pair = 0; pair < PAGE_TOKENS / 2; pair++) {
        const bf16 *first = rows + 2 * pair * stride, *second = first + stride;
        for (size_t line = 0; next != NULL && line < pair_bytes; line += 64)
            _mm_prefetch((const uint8_t *)next + pair * pair_bytes + line, _MM_HINT_T1);
        const bool has_first = 2 * pair < count, has_second = 2 * pair + 1 < count;
        for (uint32_t c = 0; c < chunks; c++) {
            const __mmask16 lanes = first_lanes(width - 16 * c);
            const __m512i a = _mm512_cvtepu16_epi32(
                _mm256_maskz_loadu_epi16(has_first ? lanes : 0, first + 16 * c));
            const __m512i b = _mm512_cvtepu16_epi32(
                _mm256_maskz_loadu_epi16(has_second ? lanes : 0, second + 16 * c));
            _mm512_store_si512(values_at(ret, chunks, pair, c), interleave(a, b));
        }
    }
}

void amx_keys_take(bf16 *keys, size_t stride, uint32_t first, uint32_t element, const float *sums,
                   uint32_t rows) {
    bf16 *to = keys + first * stride + element;
    for (uint32_t r = 0; r < rows; r++, to += stride)
        _mm256_storeu_si256((__m256i *)(void *)to,
                            narrow_to_bf16_avx512(_mm512_load_ps(sums + r * 16)));
}

void amx_values_take(bf16 *values, uint32_t chunks, uint32_t first, uint32_t chunk,
                     const float *sums, uint32_t rows) {
    for (uint32_t r = 0; r < rows; r += 2) {
        const __m512i a = _mm512_castps_si512(round_to_bf16_avx512(_mm512_load_ps(sums + r * 16)));
        __m512i b = _mm512_setzero_si512();
        if (r + 1 < rows)
            b = _mm512_castps_si512(round_to_bf16_avx512(_mm512_load_ps(sums + (r + 1) * 16)));
        _mm512_store_si512(values_at(values, chunks, (first + r) / 2, chunk),
                           _mm512_or_si512(_mm512_srli_epi32(a, 16), b));
    }
}

void amx_value_set(bf16 *values, uint32_t chunks, uint32_t position, uint32_t element,
                   float value) {
    values_at(values, chunks, position / 2, element / 16)[element % 16 * 2 + position % 2] =
        round_bf16(value);
}

/* ---- Scores ---- */

/* score[position][query], positions of `groups` groups of 16. */
static void scores(float *score, const struct amx_queries *self, const struct amx_block *block,
                   uint32_t groups) {
    const size_t row_bytes = 64;
    const bf16 *q = self->q;
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
    for (int part = 0; part < 2; part++) {
        const size_t stride_bytes = block->key_stride[part] * sizeof(bf16);
        const size_t group = 16 * block->key_stride[part];
        const bf16 *key = block->key[part];
        for (uint32_t b = 0; b < block->key_blocks[part]; b++, key += BLOCK_INPUTS, q += 512) {
            TILE_LOAD(7, q, row_bytes);
            TILE_LOAD(4, key, stride_bytes);
            TILE_PRODUCT(0, 4, 7);
            if (groups > 1) {
                TILE_LOAD(5, key + group, stride_bytes);
                TILE_PRODUCT(1, 5, 7);
            }
            if (groups > 2) {
                TILE_LOAD(6, key + 2 * group, stride_bytes);
                TILE_PRODUCT(2, 6, 7);
                TILE_LOAD(4, key + 3 * group, stride_bytes);
                TILE_PRODUCT(3, 4, 7);
            }
        }
    }
    TILE_STORE(0, score, row_bytes);
    TILE_STORE(1, score + TILE_FLOATS, row_bytes);
    TILE_STORE(2, score + 2 * TILE_FLOATS, row_bytes);
    TILE_STORE(3, score + 3 * TILE_FLOATS, row_bytes);
}

/* ---- Softmax ---- */

/* row[i] lane j <-> row[j] lane i. */
INLINE void transpose(__m512i row[16]) {
    __m512i t[16];
    UNROLL for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4) {
        row[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        row[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        row[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        row[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    UNROLL for (int c = 0; c < 4; c++) {
        const __m512i even_low = _mm512_shuffle_i32x4(row[c], row[4 + c], 0x88);
        const __m512i even_high = _mm512_shuffle_i32x4(row[8 + c], row[12 + c], 0x88);
        const __m512i odd_low = _mm512_shuffle_i32x4(row[c], row[4 + c], 0xdd);
        const __m512i odd_high = _mm512_shuffle_i32x4(row[8 + c], row[12 + c], 0xdd);
        t[c] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
        t[4 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
        t[8 + c] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
        t[12 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
    }
    UNROLL for (int i = 0; i < 16; i++) row[i] = t[i];
}

/* The tree of sum_canonical, over registers. */
static __m512 tree(const __m512 partial[16]) {
    __m512 eight[8], four[4];
    for (int i = 0; i < 8; i++)
        eight[i] = _mm512_add_ps(partial[i], partial[i + 8]);
    for (int i = 0; i < 4; i++)
        four[i] = _mm512_add_ps(eight[i], eight[i + 4]);
    return _mm512_add_ps(_mm512_add_ps(four[0], four[2]), _mm512_add_ps(four[1], four[3]));
}

/* softmax_block of all queries. p: [halves][16 queries][16 pairs of positions][2], as BF16. Where a
 * query does not see the block at all, nothing of it changes and its p are zero. */
static void softmax(struct amx_queries *self, const float *score, const uint32_t *visible,
                    uint32_t most, float scale, bf16 *p, float *factor) {
    const __m512i seen = _mm512_loadu_si512(visible);
    const __m512 scales = _mm512_set1_ps(scale);
    const __m512 before = _mm512_load_ps(self->maximum);
    __m512 largest = _mm512_set1_ps(-__builtin_inff());
    for (uint32_t j = 0; j < most; j++) {
        const __mmask16 sees = _mm512_cmpgt_epu32_mask(seen, _mm512_set1_epi32((int)j));
        const __m512 s = _mm512_mul_ps(scales, _mm512_load_ps(score + 16 * j));
        largest = _mm512_mask_max_ps(largest, sees, largest, s);
    }
    const __mmask16 greater = _mm512_cmp_ps_mask(largest, before, _CMP_GT_OQ);
    const __m512 maximum = _mm512_mask_mov_ps(before, greater, largest);
    __m512 partial[16];
    __m512i pairs[BLOCK_HALVES][16];
    for (uint32_t j = 0; j < 16; j += 2) {
        __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        UNROLL for (uint32_t g = 0; g < GROUPS; g++) {
            __m512i rounded[2];
            UNROLL for (uint32_t i = 0; i < 2; i++) {
                const uint32_t at = 16 * g + j + i;
                const __mmask16 sees = _mm512_cmpgt_epu32_mask(seen, _mm512_set1_epi32((int)at));
                const __m512 s = _mm512_mul_ps(scales, _mm512_load_ps(score + 16 * at));
                const __m512 value =
                    _mm512_maskz_mov_ps(sees, exp_nonpositive_avx512(_mm512_sub_ps(s, maximum)));
                sums[i] = _mm512_add_ps(sums[i], value);
                rounded[i] = _mm512_castps_si512(round_normal_to_bf16_avx512(value));
            }
            pairs[g / 2][g % 2 * 8 + j / 2] =
                _mm512_or_si512(_mm512_srli_epi32(rounded[0], 16), rounded[1]);
        }
        partial[j] = sums[0];
        partial[j + 1] = sums[1];
    }
    const __m512 factors = exp_avx512(_mm512_sub_ps(before, maximum));
    const __mmask16 any = _mm512_test_epi32_mask(seen, seen);
    _mm512_store_ps(factor, factors);
    const __m512 sum = _mm512_load_ps(self->sum);
    _mm512_mask_store_ps(self->sum, any, _mm512_fmadd_ps(sum, factors, tree(partial)));
    _mm512_mask_store_ps(self->maximum, any, maximum);
    for (uint32_t half = 0; half < BLOCK_HALVES; half++) {
        transpose(pairs[half]);
        UNROLL for (uint32_t m = 0; m < 16; m++)
            _mm512_store_si512(p + (half * 16 + m) * (size_t)32, pairs[half][m]);
    }
}

/* ---- Values ---- */

/* sums[chunk] = P V for up to 4 chunks of 16 value elements. */
static void value_products(float *sums, const bf16 *p, const bf16 *values, uint32_t chunks,
                           uint32_t count) {
    const size_t row_bytes = 64;
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
    for (uint32_t half = 0; half < BLOCK_HALVES; half++, values += (size_t)chunks * 512) {
        TILE_LOAD(7, p + half * 512, row_bytes);
        TILE_LOAD(4, values, row_bytes);
        TILE_PRODUCT(0, 7, 4);
        if (count > 1) {
            TILE_LOAD(5, values + 512, row_bytes);
            TILE_PRODUCT(1, 7, 5);
        }
        if (count > 2) {
            TILE_LOAD(6, values + 1024, row_bytes);
            TILE_PRODUCT(2, 7, 6);
        }
        if (count > 3) {
            TILE_LOAD(4, values + 1536, row_bytes);
            TILE_PRODUCT(3, 7, 4);
        }
    }
    TILE_STORE(0, sums, row_bytes);
    TILE_STORE(1, sums + TILE_FLOATS, row_bytes);
    TILE_STORE(2, sums + 2 * TILE_FLOATS, row_bytes);
    TILE_STORE(3, sums + 3 * TILE_FLOATS, row_bytes);
}

/* acc = fma(acc, factor, sums) for queries that see the block. */
static void value_add(struct amx_queries *self, const float *sums, uint32_t chunk, uint32_t count,
                      const float *factor, const uint32_t *visible) {
    for (uint32_t m = 0; m < self->count; m++) {
        if (visible[m] == 0)
            continue;
        const __m512 by = _mm512_set1_ps(factor[m]);
        float *acc = self->acc + (size_t)chunk * TILE_FLOATS + m * 16;
        for (uint32_t c = 0; c < count; c++, acc += TILE_FLOATS)
            _mm512_store_ps(acc, _mm512_fmadd_ps(_mm512_load_ps(acc), by,
                                                 _mm512_load_ps(sums + c * TILE_FLOATS + m * 16)));
    }
}

void amx_attend(struct amx_queries *self, const struct amx_block *block) {
    _Alignas(64) float score[PAGE_TOKENS * QUERIES];
    _Alignas(64) bf16 p[PAGE_TOKENS * QUERIES];
    _Alignas(64) float sums[2][CHUNKS_AT_ONCE * TILE_FLOATS], factor[QUERIES];
    uint32_t visible[QUERIES] = {0}, most = 0;
    for (uint32_t m = 0; m < self->count; m++) {
        if (self->position[m] / PAGE_TOKENS >= block->index)
            visible[m] = mla_visible(self->position[m], block->index);
        most = visible[m] > most ? visible[m] : most;
    }
    if (most == 0)
        return;
    scores(score, self, block, (most + 15) / 16);
    softmax(self, score, visible, most, block->scale, p, factor);
    /* While the sums of one group of chunks are on their way to the cache, the ones before are
     * added. */
    uint32_t done = 0, last = 0, turn = 0;
    for (uint32_t c = 0; c < block->value_chunks; c += CHUNKS_AT_ONCE, turn ^= 1) {
        const uint32_t left = block->value_chunks - c;
        const uint32_t count = left < CHUNKS_AT_ONCE ? left : CHUNKS_AT_ONCE;
        value_products(sums[turn], p, block->values + (size_t)c * 512, block->value_chunks, count);
        if (last > 0)
            value_add(self, sums[turn ^ 1], done, last, factor, visible);
        done = c;
        last = count;
    }
    value_add(self, sums[turn ^ 1], done, last, factor, visible);
}

void amx_queries_finish(const struct amx_queries *self, uint32_t query, uint32_t n, bf16 *ret) {
    const __m512 sum = _mm512_set1_ps(self->sum[query]);
    for (uint32_t i = 0; i < n; i += 16) {
        const float *acc = self->acc + (size_t)(i / 16) * TILE_FLOATS + query * 16;
        const __m512 quotient = _mm512_div_ps(_mm512_load_ps(acc), sum);
        _mm256_mask_storeu_epi16(ret + i, first_lanes(n - i), narrow_to_bf16_avx512(quotient));
    }
}
