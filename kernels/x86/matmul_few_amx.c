/* Products of up to 64 rows with AMX, which wait for memory: one panel after the other, so that a
 * thread reads its weights in the order in which they lie. One stream is what the processor's own
 * prefetching follows best (four panels at a time took a fifth longer), and one chain of products
 * for each 16 rows is fast enough for what memory gives. E4M3 and coded weights are expanded two
 * tiles ahead of the tile loads, which cannot take what a store has not yet brought to the cache,
 * and wait. */
#include <string.h>

#include "kernels/x86/matmul_amx.h"

enum {
    PAGE_BYTES = 4096, /* prefetching by the processor ends at its borders: */
    PAGE_LINES = 8,    /* so many lines of the next one are asked for */
    EXPANDED = 4,      /* tiles in the ring of expanded ones, a power of two */
    EXPAND_AHEAD = 2,
    AHEAD_BF16 = 512,      /* bytes; how far weights are asked for before they are used: little, */
    AHEAD_EXPANDED = 2048, /* to lead the processor's own prefetching; beyond what is expanded */
};

enum form { FORM_BF16, FORM_E4M3, FORM_CODED };

/* Weights of a part: tiles that lie one after the other, panel by panel. */
struct few {
    uint32_t rows;
    size_t tile, tiles; /* the next one, and the number of all, counted from the matrix's first */
    size_t exception; /* coded weights: the next one */
    _Alignas(64) float acc[FEW_ROWS * PANEL_OUTPUTS];
    float sums[2][FEW_ROWS * PANEL_OUTPUTS]; /* a segment is scaled while the next one is summed */
    bf16 rest[FEW_ROWS][BLOCK_INPUTS];
    bf16 expanded[EXPANDED][TILE_ELEMENTS];
};

/* Sums of rows 16g .. are in tile g. Tile 4 takes inputs of the last, perhaps smaller, group of
 * rows, tiles 5 and 7 those of the others, tile 6 weights. */
/* Everything below is made for each type of weights and number of groups. */
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

INLINE void expand(const struct walk *walk, struct few *few, size_t tile, const enum form form) {
    bf16 *to = few->expanded[tile % EXPANDED];
    if (tile >= few->tiles)
        return;
    if (form == FORM_E4M3) {
        tile_weights(walk, 0, (uint32_t)tile, to);
        return;
    }
    expand_coded(walk->w->codes, (const uint8_t *)walk->w->data + tile * CODED_TILE_BYTES, to);
    few->exception = exceptions_put(walk->w->codes, few->exception, tile, to);
}

INLINE size_t form_tile_bytes(const enum form form) {
    return form == FORM_E4M3   ? TILE_ELEMENTS
           : form == FORM_BF16 ? TILE_ELEMENTS * sizeof(bf16)
                               : (size_t)CODED_TILE_BYTES;
}

/* Sums += x times the next tile of weights. */
INLINE void few_block(const struct walk *walk, struct few *few, const bf16 *x,
                      size_t x_stride_bytes, const enum form form, const int groups) {
    const size_t tile_bytes = form_tile_bytes(form), row_bytes = 64;
    const size_t tile = few->tile++, group_bytes = TILE_ROWS * x_stride_bytes;
    const uint8_t *packed = (const uint8_t *)walk->w->data + tile * tile_bytes;
    const uint8_t *inputs = (const uint8_t *)x;
    ask_ahead(packed, tile_bytes, form == FORM_BF16 ? AHEAD_BF16 : AHEAD_EXPANDED);
    if (form != FORM_BF16)
        expand(walk, few, tile + EXPAND_AHEAD, form);
    const void *weights = form != FORM_BF16 ? (const void *)few->expanded[tile % EXPANDED] : packed;
    TILE_LOAD(6, weights, row_bytes);
    if (groups > 1) {
        TILE_LOAD(5, inputs, x_stride_bytes);
        TILE_PRODUCT(0, 5, 6);
    }
    if (groups > 2) {
        TILE_LOAD(7, inputs + group_bytes, x_stride_bytes);
        TILE_PRODUCT(1, 7, 6);
    }
    if (groups > 3) {
        TILE_LOAD(5, inputs + 2 * group_bytes, x_stride_bytes);
        TILE_PRODUCT(2, 5, 6);
    }
    TILE_LOAD(4, inputs + (size_t)(groups - 1) * group_bytes, x_stride_bytes);
    if (groups == 1)
        TILE_PRODUCT(0, 4, 6);
    else if (groups == 2)
        TILE_PRODUCT(1, 4, 6);
    else if (groups == 3)
        TILE_PRODUCT(2, 4, 6);
    else
        TILE_PRODUCT(3, 4, 6);
}

INLINE void few_zero(const int groups) {
    TILE_ZERO(0);
    if (groups > 1)
        TILE_ZERO(1);
    if (groups > 2)
        TILE_ZERO(2);
    if (groups > 3)
        TILE_ZERO(3);
}

INLINE void few_store(float *sums, const int groups) {
    const size_t row_bytes = 64, group = TILE_ROWS * PANEL_OUTPUTS;
    TILE_STORE(0, sums, row_bytes);
    if (groups > 1)
        TILE_STORE(1, sums + group, row_bytes);
    if (groups > 2)
        TILE_STORE(2, sums + 2 * group, row_bytes);
    if (groups > 3)
        TILE_STORE(3, sums + 3 * group, row_bytes);
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

/* Sums of one segment, into the tiles. */
INLINE void few_segment(const struct walk *walk, struct few *few, uint32_t segment,
                        const enum form form, const int groups) {
    const struct matrix *w = walk->w;
    const size_t x_stride = walk->job->x_stride, x_stride_bytes = x_stride * sizeof(bf16);
    const uint32_t begin = w->segment_k[segment], end = w->segment_k[segment + 1];
    const bf16 *x = (const bf16 *)walk->job->x + walk->row_begin * x_stride + begin;
    few_zero(groups);
    for (uint32_t blocks = (end - begin) / BLOCK_INPUTS; blocks > 0; blocks--, x += BLOCK_INPUTS)
        few_block(walk, few, x, x_stride_bytes, form, groups);
    const uint32_t left = (end - begin) % BLOCK_INPUTS;
    if (left > 0)
        few_block(walk, few, few_rest(few, x, x_stride, left), sizeof few->rest[0], form, groups);
}

/* Scales of the panel after this one, and which of its tiles are plain. */
INLINE void ask_next(const struct walk *walk, const struct few *few, uint32_t panel) {
    if (walk->w->scales != NULL)
        for (uint32_t s = 0; s < walk->w->segments; s++)
            ASK_L1(panel_scales(walk->w, panel + 1, s));
    ASK_L1(walk->plain + (few->tile + matrix_blocks(walk->w)) / 32);
}

INLINE void few_panel(const struct walk *walk, struct few *few, uint32_t panel,
                      const enum form form, const int groups) {
    const struct matrix *w = walk->w;
    const struct matmul_job *job = walk->job;
    const bool scaled = form == FORM_E4M3 && w->scales != NULL;
    if (w->segments == 0)
        memset(few->acc, 0, sizeof few->acc);
    if (form == FORM_E4M3)
        ask_next(walk, few, panel);
    for (uint32_t s = 0; s < w->segments; s++) {
        few_segment(walk, few, s, form, groups);
        few_store(scaled ? few->sums[s % 2] : few->acc, groups);
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

INLINE void few_panels(const struct walk *walk, struct few *few, uint32_t begin, uint32_t end,
                       const enum form form, const int groups) {
    if (form == FORM_CODED)
        few->exception = exception_find(walk->w->codes, few->tile);
    for (size_t ahead = 0; form != FORM_BF16 && ahead < EXPAND_AHEAD; ahead++)
        expand(walk, few, few->tile + ahead, form);
    for (uint32_t panel = begin; panel < end; panel++)
        few_panel(walk, few, panel, form, groups);
}

typedef void few_function(const struct walk *walk, struct few *few, uint32_t begin, uint32_t end);

#define FEW(type, form, groups)                                                                    \
    static void few_##type##_##groups(const struct walk *walk, struct few *few, uint32_t begin,    \
                                      uint32_t end) {                                              \
        few_panels(walk, few, begin, end, form, groups);                                           \
    }
FEW(bf16, FORM_BF16, 1)
FEW(bf16, FORM_BF16, 2)
FEW(bf16, FORM_BF16, 3)
FEW(bf16, FORM_BF16, 4)
FEW(e4m3, FORM_E4M3, 1)
FEW(e4m3, FORM_E4M3, 2)
FEW(e4m3, FORM_E4M3, 3)
FEW(e4m3, FORM_E4M3, 4)
FEW(coded, FORM_CODED, 1)
FEW(coded, FORM_CODED, 2)
FEW(coded, FORM_CODED, 3)
FEW(coded, FORM_CODED, 4)

void matmul_amx_few(const struct walk *walk, uint32_t panel_begin, uint32_t panel_end) {
    static few_function *const functions[3][FEW_ROWS / TILE_ROWS] = {
        {few_bf16_1, few_bf16_2, few_bf16_3, few_bf16_4},
        {few_e4m3_1, few_e4m3_2, few_e4m3_3, few_e4m3_4},
        {few_coded_1, few_coded_2, few_coded_3, few_coded_4},
    };
    const enum form form = walk->w->codes != NULL ? FORM_CODED : walk->e4m3 ? FORM_E4M3 : FORM_BF16;
    const size_t blocks = matrix_blocks(walk->w);
    struct few few; /* nothing of it is read before it is written */
    few.rows = walk->row_end - walk->row_begin;
    few.tile = panel_begin * blocks;
    few.tiles = panel_end * blocks;
    ASSERT(few.rows > 0 && few.rows <= FEW_ROWS);
    const uint32_t groups = (few.rows + TILE_ROWS - 1) / TILE_ROWS;
    const uint8_t full = TILE_ROWS, last = (uint8_t)(few.rows - (groups - 1) * TILE_ROWS);
    uint8_t rows_of[8] = {full, full, full, full, last, full, full, full};
    rows_of[groups - 1] = last;
    tiles_configure(rows_of);
    functions[form][groups - 1](walk, &few, panel_begin, panel_end);
}

void tiles_decode_amx(const struct matrix *w, size_t first, size_t count, bf16 *ret) {
    const struct matrix_codes *codes = w->codes;
    size_t next = exception_find(codes, first);
    for (size_t i = 0; i < count; i++, ret += TILE_ELEMENTS) {
        const uint8_t *packed = (const uint8_t *)w->data + (first + i) * CODED_TILE_BYTES;
        ask_ahead(packed, CODED_TILE_BYTES, AHEAD_EXPANDED);
        expand_coded(codes, packed, ret);
        next = exceptions_put(codes, next, first + i, ret);
    }
}
