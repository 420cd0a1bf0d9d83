/* Products of up to 16 rows with AMX: four panels at a time, so that four chains of products hide
 * each other's latency while weights stream from memory. E4M3 weights are expanded one block ahead
 * of the tile loads, which cannot take what a store has not yet brought to the cache, and wait. */
#include <string.h>

#include "kernels/x86/matmul_amx.h"

enum {
    FEW_PANELS = 4,
    AHEAD_BYTES = 8192, /* how far weights are asked for before they are used */
};

/* Asks for what these panels' block will be AHEAD_BYTES later, in the panels after them where these
 * end. */
static inline void ask_ahead(const struct walk *walk, uint32_t panel, uint32_t count,
                             uint32_t block) {
    size_t at = block * walk->tile_bytes + AHEAD_BYTES;
    if (at >= walk->panel_bytes) {
        at -= walk->panel_bytes;
        panel += count;
        if (at >= walk->panel_bytes || panel + count > matrix_panels(walk->w))
            return;
    }
    for (uint32_t p = 0; p < count; p++) {
        const uint8_t *tile = panel_at(walk, panel + p) + at;
        for (size_t line = 0; line < walk->tile_bytes; line += 64)
            _mm_prefetch(tile + line, _MM_HINT_T1);
    }
}

/* Weights of one block of up to four panels: those of the next block are expanded while this one's
 * are loaded. */
struct few {
    uint32_t panel, rows;
    _Alignas(64) bf16 scratch[2][FEW_PANELS][TILE_ELEMENTS];
};

static inline const bf16 *few_weights(const struct walk *walk, struct few *few, uint32_t p,
                                      uint32_t block) {
    if (!walk->e4m3)
        return tile_weights(walk, few->panel + p, block, NULL);
    if (block + 1 < matrix_blocks(walk->w))
        tile_weights(walk, few->panel + p, block + 1, few->scratch[(block + 1) % 2][p]);
    return few->scratch[block % 2][p];
}

static inline void few_block(const struct walk *walk, struct few *few, const bf16 *x,
                             size_t x_stride_bytes, uint32_t block, const uint32_t count) {
    const size_t row_bytes = 64;
    ask_ahead(walk, few->panel, count, block);
    const bf16 *w0 = few_weights(walk, few, 0, block);
    TILE_LOAD(4, x, x_stride_bytes);
    TILE_LOAD(5, w0, row_bytes);
    TILE_PRODUCT(0, 4, 5);
    if (count > 1) {
        const bf16 *w1 = few_weights(walk, few, 1, block);
        TILE_LOAD(6, w1, row_bytes);
        TILE_PRODUCT(1, 4, 6);
    }
    if (count > 2) {
        const bf16 *w2 = few_weights(walk, few, 2, block);
        TILE_LOAD(7, w2, row_bytes);
        TILE_PRODUCT(2, 4, 7);
        const bf16 *w3 = few_weights(walk, few, 3, block);
        TILE_LOAD(5, w3, row_bytes);
        TILE_PRODUCT(3, 4, 5);
    }
}

/* The scales of a segment's weights, which lie far from those of the next one. */
static inline void ask_scales(const struct walk *walk, uint32_t panel, uint32_t count,
                              uint32_t segment) {
    const struct matrix *w = walk->w;
    for (uint32_t p = 0; w->scales != NULL && p < count; p++)
        _mm_prefetch(w->scales + ((size_t)segment * matrix_panels(w) + panel + p) * PANEL_OUTPUTS,
                     _MM_HINT_T0);
}

/* Which tiles of the next panels are plain. */
static inline void ask_plain(const struct walk *walk, uint32_t panel) {
    if (walk->e4m3 && panel < matrix_panels(walk->w))
        _mm_prefetch(walk->plain + (size_t)panel * matrix_blocks(walk->w) / 32, _MM_HINT_T0);
}

typedef float few_sums[FEW_PANELS][TILE_ROWS * PANEL_OUTPUTS];

static inline void few_store(few_sums sums, const uint32_t count) {
    const size_t row_bytes = 64;
    TILE_STORE(0, sums[0], row_bytes);
    if (count > 1)
        TILE_STORE(1, sums[1], row_bytes);
    if (count > 2) {
        TILE_STORE(2, sums[2], row_bytes);
        TILE_STORE(3, sums[3], row_bytes);
    }
}

/* acc += sums * scale. */
static inline void few_scale(const struct walk *walk, const struct few *few, const uint32_t count,
                             uint32_t segment, few_sums sums, few_sums acc) {
    const struct matrix *w = walk->w;
    const uint32_t panel = few->panel;
    const float *scales = w->scales + ((size_t)segment * matrix_panels(w) + panel) * PANEL_OUTPUTS;
    for (uint32_t p = 0; p < count; p++) {
        const __m512 scale = _mm512_loadu_ps(scales + p * PANEL_OUTPUTS);
        for (uint32_t r = 0; r < few->rows; r++) {
            const uint32_t i = r * PANEL_OUTPUTS;
            const __m512 before = segment == 0 ? _mm512_setzero_ps() : _mm512_load_ps(&acc[p][i]);
            const __m512 by = both_scales(walk, scale, walk->row_begin + r, segment);
            _mm512_store_ps(&acc[p][i], _mm512_fmadd_ps(_mm512_load_ps(&sums[p][i]), by, before));
        }
    }
}

/* 1, 2 or 4 panels over all of K, up to 16 rows. */
static inline void few_panels(const struct walk *walk, struct few *few, const uint32_t count) {
    const struct matrix *w = walk->w;
    const struct matmul_job *job = walk->job;
    const uint32_t rows = few->rows, panel = few->panel;
    const bf16 *x = (const bf16 *)job->x + walk->row_begin * job->x_stride;
    _Alignas(64) few_sums sums[2], acc; /* a segment is scaled while the next one is summed */
    _Alignas(64) bf16 rest[TILE_ROWS][BLOCK_INPUTS];
    for (uint32_t p = 0; walk->e4m3 && matrix_blocks(w) > 0 && p < count; p++)
        tile_weights(walk, panel + p, 0, few->scratch[0][p]);
    if (w->segments == 0)
        memset(acc, 0, sizeof acc);
    ask_plain(walk, panel + count);
    for (uint32_t s = 0; s < w->segments; s++) {
        uint32_t k = w->segment_k[s];
        ask_scales(walk, panel, count, s);
        TILE_ZERO(0);
        TILE_ZERO(1);
        TILE_ZERO(2);
        TILE_ZERO(3);
        for (uint32_t b = w->segment_block[s]; b < w->segment_block[s + 1]; b++) {
            const uint32_t left = w->segment_k[s + 1] - k;
            if (left >= BLOCK_INPUTS) {
                few_block(walk, few, x + k, job->x_stride * sizeof *x, b, count);
                k += BLOCK_INPUTS;
                continue;
            }
            /* What follows in x belongs to the next segment, or to nobody. */
            memset(rest, 0, sizeof rest);
            for (uint32_t r = 0; r < rows; r++)
                memcpy(rest[r], x + r * job->x_stride + k, left * sizeof *x);
            few_block(walk, few, rest[0], sizeof rest[0], b, count);
        }
        few_store(w->scales == NULL ? acc : sums[s % 2], count);
        if (w->scales != NULL && s > 0)
            few_scale(walk, few, count, s - 1, sums[(s - 1) % 2], acc);
    }
    if (w->scales != NULL && w->segments > 0)
        few_scale(walk, few, count, w->segments - 1, sums[(w->segments - 1) % 2], acc);
    for (uint32_t p = 0; p < count; p++)
        for (uint32_t r = 0; r < rows; r++)
            _mm512_mask_storeu_ps(job->y + (walk->row_begin + r) * job->y_stride +
                                      (size_t)(panel + p) * PANEL_OUTPUTS,
                                  panel_outputs(w, panel + p),
                                  _mm512_load_ps(&acc[p][r * PANEL_OUTPUTS]));
}

void matmul_amx_few(const struct walk *walk, uint32_t panel_begin, uint32_t panel_end) {
    struct few few; /* scratch is written before it is read */
    few.rows = walk->row_end - walk->row_begin;
    ASSERT(few.rows <= TILE_ROWS);
    const uint8_t rows = (uint8_t)few.rows;
    const uint8_t rows_of[8] = {rows, rows, rows, rows, rows, 16, 16, 16};
    tiles_configure(rows_of);
    for (few.panel = panel_begin; few.panel + FEW_PANELS <= panel_end; few.panel += FEW_PANELS)
        few_panels(walk, &few, FEW_PANELS);
    for (; few.panel + 2 <= panel_end; few.panel += 2)
        few_panels(walk, &few, 2);
    if (few.panel < panel_end)
        few_panels(walk, &few, 1);
}
