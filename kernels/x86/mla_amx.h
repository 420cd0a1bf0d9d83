/* The inner loops of multi-head latent attention with AMX (mla_tile_amx.c), as its driver
 * (mla_amx.c) calls them. Scores are computed as keys x queries: keys are read row by row where
 * they lie, queries are packed once as the second operand, and 16 queries in the lanes of a
 * register need no reduction across lanes in the softmax. */
#ifndef TROUPE_KERNELS_MLA_AMX_H
#define TROUPE_KERNELS_MLA_AMX_H

#include "kernels/internal.h"
#include "kernels/rows.h"

/* Queries (of one head and several rows, or several heads) that meet the same keys and values. */
enum { QUERIES = 16, BLOCK_HALVES = PAGE_TOKENS / BLOCK_INPUTS };

struct amx_queries {
    uint32_t count;
    uint32_t position[QUERIES];
    _Alignas(64) float maximum[QUERIES], sum[QUERIES]; /* of the online softmax */
    const bf16 *q; /* [key blocks][16 pairs][16 queries][2]; queries beyond count zero */
    float *acc;    /* [value chunks][16 queries][16] */
};

/* Keys and values of one block of 64 positions. */
struct amx_block {
    uint32_t index; /* positions 64 * index .. */
    /* A key is two runs of blocks of 32: rows `stride` elements apart, 64 of them readable and
     * finite. */
    const bf16 *key[2];
    size_t key_stride[2];
    uint32_t key_blocks[2];
    const bf16 *values; /* [halves][chunks][16 pairs of positions][16 value elements][2], finite */
    uint32_t value_chunks;
    float scale;
};

/* BF16 elements of packed values. */
static inline size_t amx_values(uint32_t chunks) {
    return (size_t)PAGE_TOKENS * chunks * 16;
}

void amx_queries_start(struct amx_queries *self, uint32_t count, uint32_t chunks);
/* Sets the tile registers up; before amx_attend, and after anything else used them. */
void amx_attend_enter(void);
/* Takes a block in: scores, softmax, values. */
void amx_attend(struct amx_queries *self, const struct amx_block *block);
void amx_attend_leave(void);
/* ret[0..n) = BF16(acc / sum) of one query; nothing beyond n is written. */
void amx_queries_finish(const struct amx_queries *self, uint32_t query, uint32_t n, bf16 *ret);

/* Values [64, stride] into ret; rows from `count` on are taken as zero, columns from `width` too.
 * Meanwhile asks for the 64 rows at `next` (NULL: none), which will be wanted next. */
void amx_values_pack(bf16 *ret, uint32_t chunks, const bf16 *rows, size_t stride, uint32_t count,
                     uint32_t width, const bf16 *next);
/* Sums [rows][16] of positions `first` .. of a block, rounded to BF16: 16 elements of keys [64,
 * stride] that begin at `element`, or chunk `chunk` of packed values. first is even; at most 16
 * rows; of values an odd last position is joined by a zero. */
void amx_keys_take(bf16 *keys, size_t stride, uint32_t first, uint32_t element, const float *sums,
                   uint32_t rows);
void amx_values_take(bf16 *values, uint32_t chunks, uint32_t first, uint32_t chunk,
                     const float *sums, uint32_t rows);
/* One element of packed values. */
void amx_value_set(bf16 *values, uint32_t chunks, uint32_t position, uint32_t element, float value);

#endif
