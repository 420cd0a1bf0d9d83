/* The inner loops of multi-head latent attention with AVX-512 (mla_tile_avx512.c), as its driver
 * (mla_avx512.c) calls them. */
#ifndef TROUPE_KERNELS_MLA_AVX512_H
#define TROUPE_KERNELS_MLA_AVX512_H

#include "kernels/internal.h"
#include "kernels/rows.h"

/* Queries (of one head and several rows, or several heads) that meet the same keys and values. */
enum { TILE_QUERIES = 8, POSITION_GROUPS = PAGE_TOKENS / 16 };

struct tile {
    uint32_t count; /* queries, at most TILE_QUERIES */
    uint32_t position[TILE_QUERIES];
    float maximum[TILE_QUERIES], sum[TILE_QUERIES]; /* of the online softmax */
    const float *q;                                 /* [32 * key_blocks][TILE_QUERIES] */
    float *acc;                                     /* [count, acc_stride] */
    size_t acc_stride;
};

/* Keys and values of one block of 64 positions. */
struct key_block {
    uint32_t index;      /* positions 64 * index .. */
    uint32_t key_blocks; /* width of a key: blocks of 32 */
    /* [POSITION_GROUPS][key_blocks][16 pairs][16 positions][2]: zeros beyond what any query sees,
     * in groups that any query sees */
    const bf16 *keys;
    const bf16
        *values; /* [64, value_stride], finite everywhere, readable up to 16 * value_chunks */
    size_t value_stride;
    uint32_t value_chunks; /* of 16 */
    float scale;
};

/* BF16 elements of packed keys. */
static inline size_t packed_keys(uint32_t key_blocks) {
    return (size_t)PAGE_TOKENS * key_blocks * BLOCK_INPUTS;
}

void tile_start(struct tile *self);
/* ret [n][TILE_QUERIES]: element i of each query as a float. n is a multiple of 32. */
void tile_pack_queries(float *ret, const bf16 *const *queries, uint32_t count, uint32_t n);
/* Takes a block in: scores, softmax, values. */
void tile_attend(struct tile *self, const struct key_block *block);
/* ret[0..n) = BF16(acc / sum) of one query; nothing beyond n is written. */
void tile_finish(const struct tile *self, uint32_t query, uint32_t n, bf16 *ret);

/* Keys [count, stride], blocks of 32 wide, into blocks [first, first + blocks) of packed keys that
 * are key_blocks wide. */
void keys_pack(bf16 *ret, uint32_t key_blocks, uint32_t first, const bf16 *rows, size_t stride,
               uint32_t count, uint32_t blocks);
/* The same from floats, rounded to BF16, `width` wide, padded with zeros to blocks of 32. */
void keys_pack_float(bf16 *ret, uint32_t key_blocks, const float *rows, size_t stride,
                     uint32_t count, uint32_t width);
/* ret [64, 16 * chunks] = BF16(rows [count, stride]), `width` wide; zeros elsewhere. */
void values_pack_float(bf16 *ret, uint32_t chunks, const float *rows, size_t stride, uint32_t count,
                       uint32_t width);

#endif
