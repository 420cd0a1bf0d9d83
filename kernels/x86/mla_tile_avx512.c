/* Inner loops of multi-head latent attention with AVX-512. Scores: 16 positions in the lanes of a
 * register, a pair of a key's elements in each lane, queries broadcast. Values: 16 value elements
 * in the lanes, probabilities broadcast. Each lane runs the canonical dot product as it is defined:
 * an even and an odd chain of fused operations per 32 inputs, their sum added to the accumulator.
 * The bits of reference/mla_bf16.c. Positions that a query does not see have probability zero there
 * and add exact zeros, so they may be left out. */
#include "kernels/x86/mla_avx512.h"

#include "actors/errors.h"
#include "kernels/x86/vector_avx512.h"

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

enum { PAIRS = BLOCK_INPUTS / 2, HALVES = PAGE_TOKENS / BLOCK_INPUTS };

void tile_start(struct tile *self) {
    for (uint32_t m = 0; m < TILE_QUERIES; m++) {
        self->maximum[m] = -__builtin_inff();
        self->sum[m] = 0;
    }
}

/* ---- Packing ---- */

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
    /* row[4g + c] holds in its 128-bit lane L column 4L + c of rows 4g .. 4g + 3. */
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

/* Where the pairs of block b of 16 positions lie. */
static __m512i *packed_at(bf16 *keys, uint32_t key_blocks, uint32_t group, uint32_t b) {
    return (__m512i *)(keys + ((size_t)group * key_blocks + b) * 16 * BLOCK_INPUTS);
}

void keys_pack(bf16 *ret, uint32_t key_blocks, uint32_t first, const bf16 *rows, size_t stride,
               uint32_t count, uint32_t blocks) {
    for (uint32_t j = 0; j < count; j += 16) {
        for (uint32_t b = 0; b < blocks; b++) {
            const bf16 *from = rows + j * stride + b * BLOCK_INPUTS;
            __m512i row[16], *to = packed_at(ret, key_blocks, j / 16, first + b);
            UNROLL for (uint32_t i = 0; i < 16; i++) row[i] =
                j + i < count ? _mm512_loadu_si512(from + i * stride) : _mm512_setzero_si512();
            transpose(row);
            UNROLL for (uint32_t i = 0; i < 16; i++) _mm512_store_si512(to + i, row[i]);
        }
    }
}

/* 32 floats from `from`, those below `left` of them, as BF16. */
INLINE __m512i narrow_32(const float *from, uint32_t left) {
    const __m512 low = _mm512_maskz_loadu_ps(first_lanes(left), from);
    const __m512 high = _mm512_maskz_loadu_ps(left > 16 ? first_lanes(left - 16) : 0, from + 16);
    return _mm512_inserti64x4(_mm512_castsi256_si512(narrow_to_bf16_avx512(low)),
                              narrow_to_bf16_avx512(high), 1);
}

void keys_pack_float(bf16 *ret, uint32_t key_blocks, const float *rows, size_t stride,
                     uint32_t count, uint32_t width) {
    for (uint32_t j = 0; j < count; j += 16) {
        for (uint32_t k = 0; k < width; k += BLOCK_INPUTS) {
            const float *from = rows + j * stride + k;
            __m512i row[16], *to = packed_at(ret, key_blocks, j / 16, k / BLOCK_INPUTS);
            UNROLL for (uint32_t i = 0; i < 16; i++) row[i] =
                j + i < count ? narrow_32(from + i * stride, width - k) : _mm512_setzero_si512();
            transpose(row);
            UNROLL for (uint32_t i = 0; i < 16; i++) _mm512_store_si512(to + i, row[i]);
        }
    }
}

void values_pack_float(bf16 *ret, uint32_t chunks, const float *rows, size_t stride, uint32_t count,
                       uint32_t width) {
    for (uint32_t j = 0; j < PAGE_TOKENS; j++) {
        for (uint32_t c = 0; c < chunks; c++) {
            const __mmask16 lanes = j < count ? first_lanes(width - 16 * c) : 0;
            const __m512 values = _mm512_maskz_loadu_ps(lanes, rows + j * stride + 16 * c);
            _mm256_store_si256((__m256i *)(ret + ((size_t)j * chunks + c) * 16),
                               narrow_to_bf16_avx512(values));
        }
    }
}

void tile_pack_queries(float *ret, const bf16 *const *queries, uint32_t count, uint32_t n) {
    for (uint32_t i = 0; i < n; i += 16) {
        __m512i row[16];
        UNROLL for (uint32_t m = 0; m < 16; m++) row[m] =
            m < count
                ? _mm512_slli_epi32(
                      _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(queries[m] + i))),
                      16)
                : _mm512_setzero_si512();
        transpose(row);
        UNROLL for (uint32_t k = 0; k < 16; k++) _mm256_store_si256(
            (__m256i *)(ret + (i + k) * TILE_QUERIES), _mm512_castsi512_si256(row[k]));
    }
}

/* ---- Scores ---- */

/* score[m][16g ..] = canonical dot of query m with 16 keys, m < queries, g < groups; queries *
 * groups <= 8. */
INLINE void score_groups(float *score, const bf16 *keys, uint32_t key_blocks, const float *q,
                         const uint32_t queries, const uint32_t groups) {
    const __m512i high = _mm512_set1_epi32((int)0xffff0000);
    const size_t group_bytes = (size_t)key_blocks * PAIRS * sizeof(__m512i);
    const char *pair = (const char *)keys;
    __m512 acc[8], even[8], odd[8];
    UNROLL for (uint32_t i = 0; i < queries * groups; i++) acc[i] = _mm512_setzero_ps();
    for (uint32_t b = 0; b < key_blocks; b++) {
        UNROLL for (uint32_t i = 0; i < queries * groups; i++) even[i] = odd[i] =
            _mm512_setzero_ps();
        for (uint32_t k = 0; k < PAIRS; k++) {
            UNROLL for (uint32_t g = 0; g < groups; g++) {
                const __m512i both = _mm512_load_si512(pair + g * group_bytes);
                const __m512 key_even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
                const __m512 key_odd = _mm512_castsi512_ps(_mm512_and_si512(both, high));
                UNROLL for (uint32_t m = 0; m < queries; m++) {
                    const uint32_t i = m * groups + g;
                    even[i] = _mm512_fmadd_ps(key_even, _mm512_set1_ps(q[m]), even[i]);
                    odd[i] = _mm512_fmadd_ps(key_odd, _mm512_set1_ps(q[TILE_QUERIES + m]), odd[i]);
                }
            }
            pair += sizeof(__m512i);
            q += 2 * TILE_QUERIES;
        }
        UNROLL for (uint32_t i = 0; i < queries * groups; i++) acc[i] =
            _mm512_add_ps(acc[i], _mm512_add_ps(even[i], odd[i]));
    }
    UNROLL for (uint32_t m = 0; m < queries; m++) UNROLL for (uint32_t g = 0; g < groups; g++)
        _mm512_store_ps(score + m * PAGE_TOKENS + g * 16, acc[m * groups + g]);
}

/* Enough chains at once to hide the latency of an addition, whatever the number of queries. */
static void score_tile(float score[TILE_QUERIES][PAGE_TOKENS], const struct key_block *block,
                       const float *q, uint32_t queries, uint32_t groups) {
    const size_t group_keys = (size_t)block->key_blocks * 16 * BLOCK_INPUTS;
    for (uint32_t g = 0; g < groups;) {
        const bf16 *keys = block->keys + g * group_keys;
        float *to = score[0] + g * 16;
        uint32_t done = 1;
        if (queries > 4)
            score_groups(to, keys, block->key_blocks, q, 8, 1);
        else if (queries > 2 && groups - g >= 2)
            score_groups(to, keys, block->key_blocks, q, 4, 2), done = 2;
        else if (queries > 2)
            score_groups(to, keys, block->key_blocks, q, 4, 1);
        else if (groups - g == 4)
            score_groups(to, keys, block->key_blocks, q, 2, 4), done = 4;
        else
            score_groups(to, keys, block->key_blocks, q, 2, 1);
        g += done;
    }
}

/* ---- Softmax ---- */

/* softmax_block of one query: score becomes p rounded to BF16. Returns the new maximum; the sum of
 * the unrounded p goes to ret_sum. */
INLINE float softmax_query(float score[PAGE_TOKENS], uint32_t visible, float scale, float maximum,
                           float *ret_sum) {
    const __m512 least = _mm512_set1_ps(-__builtin_inff());
    __m512 s[POSITION_GROUPS], largest = least, partial = _mm512_setzero_ps();
    __mmask16 lanes[POSITION_GROUPS];
    UNROLL for (uint32_t g = 0; g < POSITION_GROUPS; g++) {
        lanes[g] = visible > 16 * g ? first_lanes(visible - 16 * g) : 0;
        s[g] = _mm512_mul_ps(_mm512_set1_ps(scale), _mm512_maskz_load_ps(lanes[g], score + 16 * g));
        largest = _mm512_mask_max_ps(largest, lanes[g], largest, s[g]);
    }
    const float block_maximum = _mm512_reduce_max_ps(largest);
    maximum = block_maximum > maximum ? block_maximum : maximum;
    UNROLL for (uint32_t g = 0; g < POSITION_GROUPS; g++) {
        const __m512 p = _mm512_maskz_mov_ps(
            lanes[g], exp_nonpositive_avx512(_mm512_sub_ps(s[g], _mm512_set1_ps(maximum))));
        partial = _mm512_add_ps(partial, p);
        _mm512_store_ps(score + 16 * g, round_normal_to_bf16_avx512(p));
    }
    *ret_sum = sum_tree_avx512(partial);
    return maximum;
}

/* ---- Values ---- */

/* acc[m] = fma(acc[m], factor[m], P V) for queries that see the block, m < queries, over `chunks`
 * chunks of 16 value elements; queries * chunks <= 8. pairs: of positions that any query sees, in
 * each half of the block. */
INLINE void value_chunks(const struct tile *tile, const float *p, const float *factor,
                         const __mmask16 *sees, const bf16 *values, size_t stride,
                         const uint32_t pairs[HALVES], size_t at, const uint32_t queries,
                         const uint32_t chunks) {
    __m512 sum[8], even[8], odd[8];
    UNROLL for (uint32_t i = 0; i < queries * chunks; i++) sum[i] = _mm512_setzero_ps();
    for (uint32_t half = 0; half < HALVES; half++) {
        const bf16 *pair = values + half * BLOCK_INPUTS * stride + at;
        const float *p_pair = p + half * BLOCK_INPUTS;
        UNROLL for (uint32_t i = 0; i < queries * chunks; i++) even[i] = odd[i] =
            _mm512_setzero_ps();
        for (uint32_t j = 0; j < pairs[half]; j++) {
            UNROLL for (uint32_t c = 0; c < chunks; c++) {
                const __m512 value_even =
                    widen_avx512(_mm256_loadu_si256((const __m256i *)(pair + 16 * c)));
                const __m512 value_odd =
                    widen_avx512(_mm256_loadu_si256((const __m256i *)(pair + stride + 16 * c)));
                UNROLL for (uint32_t m = 0; m < queries; m++) {
                    const uint32_t i = m * chunks + c;
                    const float *p_m = p_pair + m * PAGE_TOKENS;
                    even[i] = _mm512_fmadd_ps(value_even, _mm512_set1_ps(p_m[0]), even[i]);
                    odd[i] = _mm512_fmadd_ps(value_odd, _mm512_set1_ps(p_m[1]), odd[i]);
                }
            }
            pair += 2 * stride;
            p_pair += 2;
        }
        UNROLL for (uint32_t i = 0; i < queries * chunks; i++) sum[i] =
            _mm512_add_ps(sum[i], _mm512_add_ps(even[i], odd[i]));
    }
    UNROLL for (uint32_t m = 0; m < queries; m++) {
        UNROLL for (uint32_t c = 0; c < chunks; c++) {
            float *acc = tile->acc + m * tile->acc_stride + at + 16 * c;
            const __m512 before = _mm512_maskz_loadu_ps(sees[m], acc);
            _mm512_mask_storeu_ps(
                acc, sees[m],
                _mm512_fmadd_ps(before, _mm512_set1_ps(factor[m]), sum[m * chunks + c]));
        }
    }
}

static void value_tile(const struct tile *tile, const struct key_block *block, const float *p,
                       const float *factor, const __mmask16 *sees, uint32_t visible) {
    const uint32_t first = visible < BLOCK_INPUTS ? visible : BLOCK_INPUTS;
    const uint32_t pairs[HALVES] = {(first + 1) / 2, (visible - first + 1) / 2};
    const bf16 *values = block->values;
    const size_t stride = block->value_stride;
    for (uint32_t c = 0; c < block->value_chunks;) {
        const uint32_t left = block->value_chunks - c;
        uint32_t done = 1;
        if (tile->count > 4)
            value_chunks(tile, p, factor, sees, values, stride, pairs, 16 * c, 8, 1);
        else if (tile->count > 2 && left >= 2)
            value_chunks(tile, p, factor, sees, values, stride, pairs, 16 * c, 4, 2), done = 2;
        else if (tile->count > 2)
            value_chunks(tile, p, factor, sees, values, stride, pairs, 16 * c, 4, 1);
        else if (left >= 4)
            value_chunks(tile, p, factor, sees, values, stride, pairs, 16 * c, 2, 4), done = 4;
        else
            value_chunks(tile, p, factor, sees, values, stride, pairs, 16 * c, 2, 1);
        c += done;
    }
}

void tile_attend(struct tile *self, const struct key_block *block) {
    _Alignas(64) float p[TILE_QUERIES][PAGE_TOKENS];
    _Alignas(64) float maximum[16] = {0}, sum[16] = {0}, before[16] = {0}, block_sum[16] = {0};
    float factor[16];
    __mmask16 sees[TILE_QUERIES] = {0};
    uint32_t visible[TILE_QUERIES], most = 0;
    for (uint32_t m = 0; m < self->count; m++) {
        const bool any = self->position[m] / PAGE_TOKENS >= block->index;
        visible[m] = any ? mla_visible(self->position[m], block->index) : 0;
        sees[m] = any ? 0xffff : 0;
        most = visible[m] > most ? visible[m] : most;
    }
    if (most == 0)
        return;
    score_tile(p, block, self->q, self->count, (most + 15) / 16);
    for (uint32_t m = 0; m < self->count; m++) {
        before[m] = maximum[m] = self->maximum[m];
        sum[m] = self->sum[m];
        if (sees[m])
            maximum[m] = softmax_query(p[m], visible[m], block->scale, before[m], &block_sum[m]);
    }
    const __m512 factors =
        exp_avx512(_mm512_sub_ps(_mm512_load_ps(before), _mm512_load_ps(maximum)));
    _mm512_storeu_ps(factor, factors);
    _mm512_store_ps(sum, _mm512_fmadd_ps(_mm512_load_ps(sum), factors, _mm512_load_ps(block_sum)));
    for (uint32_t m = 0; m < self->count; m++) {
        if (sees[m]) {
            self->maximum[m] = maximum[m];
            self->sum[m] = sum[m];
        }
    }
    value_tile(self, block, p[0], factor, sees, most);
}

void tile_finish(const struct tile *self, uint32_t query, uint32_t n, bf16 *ret) {
    const __m512 sum = _mm512_set1_ps(self->sum[query]);
    const float *acc = self->acc + query * self->acc_stride;
    for (uint32_t i = 0; i < n; i += 16) {
        const __m512 quotient = _mm512_div_ps(_mm512_loadu_ps(acc + i), sum);
        _mm256_mask_storeu_epi16(ret + i, first_lanes(n - i), narrow_to_bf16_avx512(quotient));
    }
}
