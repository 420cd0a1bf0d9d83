/* Products of up to 16 rows with AMX: one panel after the other, so that a thread reads its weights
 * from memory in the order in which they lie: one stream is what the processor's own prefetching
 * follows best (four panels at a time took a fifth longer), and the one chain of products is fast
 * enough for what memory gives. E4M3 weights are expanded two tiles ahead of the tile loads, which
 * cannot take what a store has not yet brought to the cache, and wait. */
#include <string.h>

#include "kernels/x86/matmul_amx.h"

enum {
    PAGE_BYTES = 4096, /* prefetching by the processor ends at its borders: */
    PAGE_LINES = 8,    /* so many lines of the next one are asked for */
    EXPANDED = 4,      /* tiles in the ring of expanded ones, a power of two */
    EXPAND_AHEAD = 2,
    AHEAD_BF16 = 512,  /* bytes; how far weights are asked for before they are used: little, */
    AHEAD_E4M3 = 2048, /* to lead the processor's own prefetching; beyond what is expanded */
};

/* Weights of a part: tiles that lie one after the other, panel by panel. */
struct few {
    uint32_t rows;
    size_t tile, tiles; /* the next one, and the number of all, counted from the matrix's first */
    _Alignas(64) float acc[TILE_ROWS * PANEL_OUTPUTS];
    float sums[2][TILE_ROWS * PANEL_OUTPUTS]; /* a segment is scaled while the next one is summed */
    bf16 rest[TILE_ROWS][BLOCK_INPUTS];
    bf16 expanded[EXPANDED][TILE_ELEMENTS];
};

/* Everything below is made twice, for BF16 and for E4M3. */
#define INLINE static inline __attribute__((always_inline))

/* Asks for what follows; never faults, not even beyond the end. */
INLINE void ask_ahead(const uint8_t *tile, const size_t bytes, const size_t ahead) {
#pragma GCC unroll 16
    for (size_t line = 0; line < bytes; line += 64)
        ASK_L1(tile + ahead + line);
    const size_t in_page = (uintptr_t)tile % PAGE_BYTES;
    if (in_page < bytes)
        for (size_t line = 0; line < PAGE_LINES; line++)
            ASK_L2(tile - in_page + PAGE_BYTES + 64 * line);
}

INLINE void expand(const struct walk *walk, struct few *few, size_t tile) {
    if (tile < few->tiles)
        tile_weights(walk, 0, (uint32_t)tile, few->expanded[tile % EXPANDED]);
}

/* Tile 0 += x times the next tile of weights. */
INLINE void few_block(const struct walk *walk, struct few *few, const bf16 *x,
                      size_t x_stride_bytes, const bool e4m3) {
    const size_t tile_bytes = TILE_ELEMENTS * (e4m3 ? 1 : sizeof(bf16)), row_bytes = 64;
    const size_t tile = few->tile++;
    const uint8_t *packed = (const uint8_t *)walk->w->data + tile * tile_bytes;
    ask_ahead(packed, tile_bytes, e4m3 ? AHEAD_E4M3 : AHEAD_BF16);
    if (e4m3)
        expand(walk, few, tile + EXPAND_AHEAD);
    const void *weights = e4m3 ? (const void *)few->expanded[tile % EXPANDED] : packed;
    TILE_LOAD(1, x, x_stride_bytes);
    TILE_LOAD(2, weights, row_bytes);
    TILE_PRODUCT(0, 1, 2);
}

/* acc += sums * scale. */
INLINE void few_scale(const struct walk *walk, struct few *few, uint32_t panel, uint32_t segment) {
    const float *sums = few->sums[segment % 2];
    const __m512 scale = _mm512_loadu_ps(panel_scales(walk->w, panel, segment));
    for (uint32_t r = 0; r < few->rows; r++) {
        float *acc = few->acc + r * PANEL_OUTPUTS;
        const __m512 before = segment == 0 ? _mm512_setzero_ps() : _mm512_load_ps(acc);
        const __m512 by = both_scales(walk, scale, walk->row_begin + r, segment);
        _mm512_store_ps(acc, _mm512_fmadd_ps(_mm512_load_ps(sums + r * PANEL_OUTPUTS), by, before));
    }
}

/* What lies in x after the end of a segment belongs to the next one, or to nobody. */
static const bf16 *few_rest(struct few *few, const bf16 *x, size_t x_stride, uint32_t count) {
    memset(few->rest, 0, sizeof few->rest);
    for (uint32_t r = 0; r < few->rows; r++)
        memcpy(few->rest[r], x + r * x_stride, count * sizeof *x);
    return few->rest[0];
}

/* Sums of one segment, into tile 0. */
INLINE void few_segment(const struct walk *walk, struct few *few, uint32_t segment,
                        const bool e4m3) {
    const struct matrix *w = walk->w;
    const size_t x_stride = walk->job->x_stride, x_stride_bytes = x_stride * sizeof(bf16);
    const uint32_t begin = w->segment_k[segment], end = w->segment_k[segment + 1];
    const bf16 *x = (const bf16 *)walk->job->x + walk->row_begin * x_stride + begin;
    TILE_ZERO(0);
    for (uint32_t blocks = (end - begin) / BLOCK_INPUTS; blocks > 0; blocks--, x += BLOCK_INPUTS)
        few_block(walk, few, x, x_stride_bytes, e4m3);
    const uint32_t left = (end - begin) % BLOCK_INPUTS;
    if (left > 0)
        few_block(walk, few, few_rest(few, x, x_stride, left), sizeof few->rest[0], e4m3);
}

/* Scales of the panel after this one, and which of its tiles are plain. */
INLINE void ask_next(const struct walk *walk, const struct few *few, uint32_t panel) {
    if (walk->w->scales != NULL)
        for (uint32_t s = 0; s < walk->w->segments; s++)
            ASK_L1(panel_scales(walk->w, panel + 1, s));
    ASK_L1(walk->plain + (few->tile + matrix_blocks(walk->w)) / 32);
}

INLINE void few_panel(const struct walk *walk, struct few *few, uint32_t panel, const bool e4m3) {
    const struct matrix *w = walk->w;
    const struct matmul_job *job = walk->job;
    const size_t row_bytes = 64;
    const bool scaled = e4m3 && w->scales != NULL;
    if (w->segments == 0)
        memset(few->acc, 0, sizeof few->acc);
    if (e4m3)
        ask_next(walk, few, panel);
    for (uint32_t s = 0; s < w->segments; s++) {
        few_segment(walk, few, s, e4m3);
        TILE_STORE(0, scaled ? few->sums[s % 2] : few->acc, row_bytes);
        if (scaled && s > 0)
            few_scale(walk, few, panel, s - 1);
    }
    if (scaled && w->segments > 0)
        few_scale(walk, few, panel, w->segments - 1);
    for (uint32_t r = 0; r < few->rows; r++)
        _mm512_mask_storeu_ps(
            job->y + (walk->row_begin + r) * job->y_stride + (size_t)panel * PANEL_OUTPUTS,
            panel_outputs(w, panel), _mm512_load_ps(few->acc + r * PANEL_OUTPUTS));
}

static void few_bf16(const struct walk *walk, struct few *few, uint32_t begin, uint32_t end) {
    for (uint32_t panel = begin; panel < end; panel++)
        few_panel(walk, few, panel, false);
}

static void few_e4m3(const struct walk *walk, struct few *few, uint32_t begin, uint32_t end) {
    for (size_t ahead = 0; ahead < EXPAND_AHEAD; ahead++)
        expand(walk, few, few->tile + ahead);
    for (uint32_t panel = begin; panel < end; panel++)
        few_panel(walk, few, panel, true);
}

void matmul_amx_few(const struct walk *walk, uint32_t panel_begin, uint32_t panel_end) {
    const size_t blocks = matrix_blocks(walk->w);
    struct few few; /* nothing of it is read before it is written */
    few.rows = walk->row_end - walk->row_begin;
    few.tile = panel_begin * blocks;
    few.tiles = panel_end * blocks;
    ASSERT(few.rows <= TILE_ROWS);
    const uint8_t rows = (uint8_t)few.rows, full = TILE_ROWS;
    const uint8_t rows_of[8] = {rows, rows, full, full, full, full, full, full};
    tiles_configure(rows_of);
    (walk->e4m3 ? few_e4m3 : few_bf16)(walk, &few, panel_begin, panel_end);
}
