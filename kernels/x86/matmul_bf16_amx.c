/* The product of the bf16 profile with AMX: TDPBF16PS multiplies up to 16 rows by a tile of weights
 * and computes exactly the canonical sums (an even and an odd chain of 16 FMAs, then their sum
 * joins the accumulator; denormals are zero).
 *
 * Up to 64 rows: four panels at a time, so that four chains of products hide each other's latency
 * while weights stream from memory; 16 rows at a time, the further ones from the cache. More rows:
 * 32 rows x 2 panels at a time, each tile used twice, over all of K; inputs are packed into tiles
 * first where many panels read them. E4M3 weights are expanded to BF16, for few rows one block
 * ahead of the tile loads (which cannot take what a store has not yet brought to the cache, and
 * wait), for many rows once for all of them. The sums of a scaled segment leave the tiles to be
 * multiplied by its scales in FP32.
 *
 * Instructions are written out because GCC 12's intrinsics do not tell the compiler that they read
 * memory. */
#include <string.h>

#include "kernels/rows.h"
#include "kernels/x86/kernel_bf16.h"
#include "kernels/x86/tile_amx.h"

enum {
    FEW_ROWS = 64,
    FEW_PANELS = 4,
    GROUP_ROWS = 2 * TILE_ROWS,
    GROUP_PANELS = 2,
    STRIP_PANELS = 8,
    BLOCK_ROWS = 256,   /* whose inputs stay in the second-level cache while all weights pass */
    CHUNK_BLOCKS = 8,   /* of 32 rows: 16 KiB of inputs, a third of a first-level cache */
    EXPAND_BLOCKS = 64, /* K that is expanded at once: 512 KiB of a strip */
    AHEAD_BYTES = 8192, /* how far weights are asked for before they are used */
    PACK_PANELS_MIN = 4,
};

/* What a part's loops share. */
struct walk {
    const struct matmul_job *job;
    const struct matrix *w;
    bool e4m3;
    size_t tile_bytes, panel_bytes;
    const uint32_t *plain;
    uint32_t row_begin, row_end;
    const bf16 *packed; /* inputs as tiles [16 rows][block]; NULL: read where they lie */
};

static const uint8_t *panel_at(const struct walk *walk, uint32_t panel) {
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

static __mmask16 panel_outputs(const struct matrix *w, uint32_t panel) {
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
static __attribute__((noinline)) void expand_mixed(const uint8_t *packed, bf16 *ret) {
    expand_tile(packed, ret, false);
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

/* ---- Up to 64 rows, 16 at a time ---- */

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
    uint32_t panel, row, rows;
    uint32_t configured; /* rows that the tiles are set up for */
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
    if (few->row == walk->row_begin)
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
            const __m512 by = both_scales(walk, scale, few->row + r, segment);
            _mm512_store_ps(&acc[p][i], _mm512_fmadd_ps(_mm512_load_ps(&sums[p][i]), by, before));
        }
    }
}

/* 1, 2 or 4 panels over all of K, up to 16 rows. */
static inline void few_panels(const struct walk *walk, struct few *few, const uint32_t count) {
    const struct matrix *w = walk->w;
    const struct matmul_job *job = walk->job;
    const uint32_t rows = few->rows, panel = few->panel;
    const bf16 *x = (const bf16 *)job->x + few->row * job->x_stride;
    _Alignas(64) few_sums sums[2], acc; /* a segment is scaled while the next one is summed */
    _Alignas(64) bf16 rest[TILE_ROWS][BLOCK_INPUTS];
    for (uint32_t p = 0; walk->e4m3 && matrix_blocks(w) > 0 && p < count; p++)
        tile_weights(walk, panel + p, 0, few->scratch[0][p]);
    if (w->segments == 0)
        memset(acc, 0, sizeof acc);
    for (uint32_t s = 0; s < w->segments; s++) {
        uint32_t k = w->segment_k[s];
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
            _mm512_mask_storeu_ps(
                job->y + (few->row + r) * job->y_stride + (size_t)(panel + p) * PANEL_OUTPUTS,
                panel_outputs(w, panel + p), _mm512_load_ps(&acc[p][r * PANEL_OUTPUTS]));
}

static inline void few_groups(const struct walk *walk, struct few *few, const uint32_t count) {
    for (few->row = walk->row_begin; few->row < walk->row_end; few->row += TILE_ROWS) {
        const uint32_t left = walk->row_end - few->row;
        few->rows = left < TILE_ROWS ? left : TILE_ROWS;
        if (few->rows != few->configured) {
            const uint8_t rows = (uint8_t)few->rows;
            const uint8_t rows_of[8] = {rows, rows, rows, rows, rows, 16, 16, 16};
            tiles_configure(rows_of);
            few->configured = few->rows;
        }
        few_panels(walk, few, count);
    }
}

static void few_rows(const struct walk *walk, uint32_t panel_begin, uint32_t panel_end) {
    struct few few = {.configured = 0};
    for (few.panel = panel_begin; few.panel + FEW_PANELS <= panel_end; few.panel += FEW_PANELS)
        few_groups(walk, &few, FEW_PANELS);
    for (; few.panel + 2 <= panel_end; few.panel += 2)
        few_groups(walk, &few, 2);
    if (few.panel < panel_end)
        few_groups(walk, &few, 1);
}

/* ---- More rows ---- */

/* Up to 8 panels over blocks [block_begin, block_end) of K, which are whole segments, or a part of
 * the only one. */
struct strip {
    uint32_t panel, panels;
    uint32_t block_begin, block_end;
    const bf16 *weights[STRIP_PANELS]; /* tiles of those blocks */
};

/* Up to 32 rows, and where their sums lie. */
enum { GROUP_SUMS = GROUP_ROWS * GROUP_PANELS * PANEL_OUTPUTS };
struct group {
    uint32_t row, rows;
    bool first; /* of the part: the one that asks for the next panels' weights */
    /* Sums of each pair of panels, [32][2 x 16]. */
    _Alignas(64) float acc[STRIP_PANELS / GROUP_PANELS][GROUP_SUMS];
    _Alignas(64) float partial[2][GROUP_SUMS];
};

/* Tiles 0..3: sums of 32 rows x 2 panels; 4, 5: inputs; 6, 7: weights. */
static void group_configure(uint32_t rows) {
    const uint8_t low = (uint8_t)(rows < TILE_ROWS ? rows : TILE_ROWS);
    const uint8_t high = (uint8_t)(rows > TILE_ROWS ? rows - TILE_ROWS : 1);
    const uint8_t rows_of[8] = {low, low, high, high, low, high, 16, 16};
    tiles_configure(rows_of);
}

/* One block of 32 inputs: adds to the sums in tiles 0..3. */
static inline void group_block(const bf16 *low, const bf16 *high, size_t x_stride_bytes,
                               const bf16 *w0, const bf16 *w1) {
    const size_t row_bytes = 64;
    TILE_LOAD(4, low, x_stride_bytes);
    TILE_LOAD(6, w0, row_bytes);
    TILE_PRODUCT(0, 4, 6);
    if (w1 != NULL) {
        TILE_LOAD(7, w1, row_bytes);
        TILE_PRODUCT(1, 4, 7);
    }
    if (high == NULL)
        return;
    TILE_LOAD(5, high, x_stride_bytes);
    TILE_PRODUCT(2, 5, 6);
    if (w1 != NULL)
        TILE_PRODUCT(3, 5, 7);
}

static inline void group_zero(void) {
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
}

static inline void group_store(float *sums) {
    const size_t stride_bytes = GROUP_PANELS * PANEL_OUTPUTS * sizeof *sums;
    TILE_STORE(0, sums, stride_bytes);
    TILE_STORE(1, sums + PANEL_OUTPUTS, stride_bytes);
    TILE_STORE(2, sums + GROUP_SUMS / 2, stride_bytes);
    TILE_STORE(3, sums + GROUP_SUMS / 2 + PANEL_OUTPUTS, stride_bytes);
}
static inline void group_load(const float *sums) {
    const size_t stride_bytes = GROUP_PANELS * PANEL_OUTPUTS * sizeof *sums;
    TILE_LOAD(0, sums, stride_bytes);
    TILE_LOAD(1, sums + PANEL_OUTPUTS, stride_bytes);
    TILE_LOAD(2, sums + GROUP_SUMS / 2, stride_bytes);
    TILE_LOAD(3, sums + GROUP_SUMS / 2 + PANEL_OUTPUTS, stride_bytes);
}

/* The weights of the next strip, a block of two panels at a time. */
static inline void ask_next(const struct walk *walk, uint32_t panel, uint32_t block) {
    for (uint32_t p = panel; p < panel + GROUP_PANELS && p < matrix_panels(walk->w); p++) {
        const uint8_t *tile = panel_at(walk, p) + block * walk->tile_bytes;
        for (size_t line = 0; line < walk->tile_bytes; line += 64)
            _mm_prefetch(tile + line, _MM_HINT_T1);
    }
}

/* Blocks [begin, end) of one segment, the pair's two panels (or one, at the end). */
static void group_products(const struct walk *walk, const struct strip *strip,
                           const struct group *group, uint32_t pair, uint32_t segment,
                           uint32_t begin, uint32_t end) {
    const struct matmul_job *job = walk->job;
    const struct matrix *w = walk->w;
    const bool both = group->rows > TILE_ROWS;
    const size_t first = (size_t)(begin - strip->block_begin) * TILE_ELEMENTS;
    const bf16 *w0 = strip->weights[GROUP_PANELS * pair] + first, *w1 = NULL;
    if (GROUP_PANELS * pair + 1 < strip->panels)
        w1 = strip->weights[GROUP_PANELS * pair + 1] + first;
    _Alignas(64) bf16 rest[GROUP_ROWS][BLOCK_INPUTS];
    for (uint32_t b = begin; b < end; b++) {
        if (group->first)
            ask_next(walk, strip->panel + STRIP_PANELS + GROUP_PANELS * pair, b);
        if (walk->packed != NULL) {
            const uint32_t blocks = matrix_blocks(w);
            const size_t index = (size_t)(group->row - walk->row_begin) / TILE_ROWS * blocks + b;
            const bf16 *low = walk->packed + index * TILE_ELEMENTS;
            group_block(low, both ? low + (size_t)blocks * TILE_ELEMENTS : NULL, 64, w0, w1);
        } else {
            const uint32_t k =
                w->segment_k[segment] + (b - w->segment_block[segment]) * BLOCK_INPUTS;
            const uint32_t left = w->segment_k[segment + 1] - k;
            const bf16 *x = (const bf16 *)job->x + group->row * job->x_stride + k;
            size_t stride = job->x_stride;
            if (left < BLOCK_INPUTS) {
                memset(rest, 0, sizeof rest);
                for (uint32_t r = 0; r < group->rows; r++)
                    memcpy(rest[r], x + r * job->x_stride, left * sizeof *x);
                x = rest[0];
                stride = BLOCK_INPUTS;
            }
            group_block(x, both ? x + TILE_ROWS * stride : NULL, stride * sizeof *x, w0, w1);
        }
        w0 += TILE_ELEMENTS;
        w1 = w1 == NULL ? NULL : w1 + TILE_ELEMENTS;
    }
}

/* acc += partial * scale; acc counts as 0 before the first segment. */
static void group_scale(const struct walk *walk, const struct strip *strip, struct group *group,
                        uint32_t pair, uint32_t segment, const float *partial) {
    const struct matrix *w = walk->w;
    const uint32_t panel = strip->panel + GROUP_PANELS * pair;
    const float *scales = w->scales + ((size_t)segment * matrix_panels(w) + panel) * PANEL_OUTPUTS;
    const __m512 first = _mm512_loadu_ps(scales);
    const __m512 second =
        panel + 1 < matrix_panels(w) ? _mm512_loadu_ps(scales + PANEL_OUTPUTS) : first;
    float *acc = group->acc[pair];
    for (uint32_t r = 0; r < group->rows; r++, partial += 32, acc += 32) {
        const __m512 low = segment > 0 ? _mm512_load_ps(acc) : _mm512_setzero_ps();
        const __m512 high = segment > 0 ? _mm512_load_ps(acc + 16) : _mm512_setzero_ps();
        const __m512 by_low = both_scales(walk, first, group->row + r, segment);
        const __m512 by_high = both_scales(walk, second, group->row + r, segment);
        _mm512_store_ps(acc, _mm512_fmadd_ps(_mm512_load_ps(partial), by_low, low));
        _mm512_store_ps(acc + 16, _mm512_fmadd_ps(_mm512_load_ps(partial + 16), by_high, high));
    }
}

static float *group_y(const struct walk *walk, const struct strip *strip, const struct group *group,
                      uint32_t pair) {
    return walk->job->y + group->row * walk->job->y_stride +
           ((size_t)strip->panel + GROUP_PANELS * pair) * PANEL_OUTPUTS;
}

/* What is not in the first-level cache when it is stored holds up the stores behind it. */
static void group_ask_y(const struct walk *walk, const struct strip *strip,
                        const struct group *group, uint32_t pair) {
    const float *y = group_y(walk, strip, group, pair);
    for (uint32_t r = 0; r < group->rows; r++, y += walk->job->y_stride) {
        __builtin_prefetch(y, 1);
        __builtin_prefetch(y + PANEL_OUTPUTS, 1);
    }
}

/* acc from y or to y. */
static void group_move(const struct walk *walk, const struct strip *strip, struct group *group,
                       uint32_t pair, bool to_y) {
    const uint32_t panel = GROUP_PANELS * pair, left = strip->panels - panel;
    const __mmask16 low = panel_outputs(walk->w, strip->panel + panel);
    const __mmask16 high = left > 1 ? panel_outputs(walk->w, strip->panel + panel + 1) : 0;
    float *y = group_y(walk, strip, group, pair);
    float *acc = group->acc[pair];
    for (uint32_t r = 0; r < group->rows; r++, y += walk->job->y_stride, acc += 32) {
        if (to_y) {
            _mm512_mask_storeu_ps(y, low, _mm512_load_ps(acc));
            _mm512_mask_storeu_ps(y + 16, high, _mm512_load_ps(acc + 16));
        } else {
            _mm512_store_ps(acc, _mm512_maskz_loadu_ps(low, y));
            _mm512_store_ps(acc + 16, _mm512_maskz_loadu_ps(high, y + 16));
        }
    }
}

/* K in chunks whose inputs stay in the first-level cache while the strip's pairs pass over them;
 * sums wait in acc: FP32 all along, so that where they wait does not show. */
static void group_plain(const struct walk *walk, const struct strip *strip, struct group *group,
                        uint32_t pairs) {
    for (uint32_t b = strip->block_begin; b < strip->block_end; b += CHUNK_BLOCKS) {
        const uint32_t left = strip->block_end - b;
        const uint32_t end = b + (left < CHUNK_BLOCKS ? left : CHUNK_BLOCKS);
        for (uint32_t p = 0; p < pairs; p++) {
            if (b > 0)
                group_load(group->acc[p]);
            else
                group_zero();
            if (end == strip->block_end)
                group_ask_y(walk, strip, group, p);
            group_products(walk, strip, group, p, 0, b, end);
            group_store(group->acc[p]);
        }
    }
}

/* The sums of one pair are scaled while the tiles work on the next one. */
static void group_scaled(const struct walk *walk, const struct strip *strip, struct group *group,
                         uint32_t pairs) {
    const struct matrix *w = walk->w;
    uint32_t turn = 0, waiting_pair = 0, waiting_segment = 0;
    bool waiting = false;
    for (uint32_t s = 0; s < w->segments; s++) {
        if (w->segment_block[s] < strip->block_begin || w->segment_block[s] >= strip->block_end)
            continue;
        for (uint32_t p = 0; p < pairs; p++, turn ^= 1) {
            group_zero();
            if (w->segment_block[s + 1] == strip->block_end)
                group_ask_y(walk, strip, group, p);
            group_products(walk, strip, group, p, s, w->segment_block[s], w->segment_block[s + 1]);
            group_store(group->partial[turn]);
            if (waiting)
                group_scale(walk, strip, group, waiting_pair, waiting_segment,
                            group->partial[turn ^ 1]);
            waiting = true;
            waiting_pair = p;
            waiting_segment = s;
        }
    }
    if (waiting)
        group_scale(walk, strip, group, waiting_pair, waiting_segment, group->partial[turn ^ 1]);
}

/* All rows of the part. scratch: room for the strip's tiles where weights are E4M3. */
static void strip_run(const struct walk *walk, struct strip *strip, bf16 *scratch) {
    const uint32_t blocks = strip->block_end - strip->block_begin;
    const uint32_t pairs = (strip->panels + 1) / GROUP_PANELS;
    for (uint32_t p = 0; p < strip->panels; p++) {
        strip->weights[p] = (const bf16 *)(const void *)panel_at(walk, strip->panel + p) +
                            (size_t)strip->block_begin * TILE_ELEMENTS;
        if (!walk->e4m3)
            continue;
        bf16 *to = scratch + (size_t)p * blocks * TILE_ELEMENTS;
        strip->weights[p] = to;
        for (uint32_t b = 0; b < blocks; b++)
            tile_weights(walk, strip->panel + p, strip->block_begin + b,
                         to + (size_t)b * TILE_ELEMENTS);
    }
    struct group group;
    uint32_t configured = 0;
    for (group.row = walk->row_begin; group.row < walk->row_end; group.row += GROUP_ROWS) {
        const uint32_t left = walk->row_end - group.row;
        group.rows = left < GROUP_ROWS ? left : GROUP_ROWS;
        group.first = group.row == walk->row_begin;
        if (group.rows != configured)
            group_configure(group.rows);
        configured = group.rows;
        for (uint32_t p = 0; strip->block_begin > 0 && p < pairs; p++)
            group_move(walk, strip, &group, p, false);
        if (blocks == 0)
            memset(group.acc, 0, sizeof group.acc);
        else if (walk->w->scales == NULL)
            group_plain(walk, strip, &group, pairs);
        else
            group_scaled(walk, strip, &group, pairs);
        for (uint32_t p = 0; p < pairs; p++)
            group_move(walk, strip, &group, p, true);
    }
}

/* Where the blocks end that are expanded together with block `begin`. */
static uint32_t strip_end(const struct walk *walk, uint32_t begin) {
    const struct matrix *w = walk->w;
    const uint32_t blocks = matrix_blocks(w);
    if (!walk->e4m3 || blocks - begin <= EXPAND_BLOCKS)
        return blocks;
    if (w->scales == NULL)
        return begin + EXPAND_BLOCKS;
    uint32_t end = begin;
    for (uint32_t s = 0; s < w->segments; s++)
        if (w->segment_block[s + 1] <= begin + EXPAND_BLOCKS)
            end = w->segment_block[s + 1];
    ASSERT(end > begin);
    return end;
}

/* Inputs as tiles, zeros where a segment ends inside a block: what 16 rows have in one block lies
 * together, instead of a row's length apart, where it would fight for a few places of the cache. */
static void pack_inputs(struct walk *walk, bf16 *to) {
    const struct matmul_job *job = walk->job;
    const struct matrix *w = walk->w;
    const uint32_t rows = walk->row_end - walk->row_begin;
    walk->packed = to;
    const uint32_t blocks = matrix_blocks(w);
    const bf16 *row = (const bf16 *)job->x + walk->row_begin * job->x_stride;
    for (uint32_t r = 0; r < rows; r++, row += job->x_stride) {
        bf16 *tiles = to + (size_t)(r / TILE_ROWS) * blocks * TILE_ELEMENTS +
                      (size_t)(r % TILE_ROWS) * BLOCK_INPUTS;
        for (uint32_t s = 0; s < w->segments; s++)
            for (uint32_t b = w->segment_block[s]; b < w->segment_block[s + 1]; b++) {
                const uint32_t k = w->segment_k[s] + (b - w->segment_block[s]) * BLOCK_INPUTS;
                const uint32_t left = w->segment_k[s + 1] - k;
                const __mmask32 lanes = left < BLOCK_INPUTS ? (1u << left) - 1 : 0xffffffff;
                _mm512_store_si512(tiles + (size_t)b * TILE_ELEMENTS,
                                   _mm512_maskz_loadu_epi16(lanes, row + k));
            }
    }
}

static void many_rows(struct walk *walk, uint32_t panel_begin, uint32_t panel_end) {
    const struct matrix *w = walk->w;
    const uint32_t rows = walk->row_end - walk->row_begin, blocks = matrix_blocks(w);
    const uint32_t expanded = blocks < EXPAND_BLOCKS ? blocks : EXPAND_BLOCKS;
    const struct scratch_mark mark = scratch_mark();
    if (panel_end - panel_begin >= PACK_PANELS_MIN)
        pack_inputs(walk,
                    scratch_take((size_t)(rows + TILE_ROWS) * blocks * BLOCK_INPUTS, sizeof(bf16)));
    bf16 *scratch = NULL;
    if (walk->e4m3)
        scratch = scratch_take((size_t)STRIP_PANELS * expanded * TILE_ELEMENTS, sizeof(bf16));
    struct strip strip;
    for (strip.panel = panel_begin; strip.panel < panel_end; strip.panel += STRIP_PANELS) {
        const uint32_t left = panel_end - strip.panel;
        strip.panels = left < STRIP_PANELS ? left : STRIP_PANELS;
        strip.block_begin = 0;
        do {
            strip.block_end = strip_end(walk, strip.block_begin);
            strip_run(walk, &strip, scratch);
            strip.block_begin = strip.block_end;
        } while (strip.block_begin < blocks);
    }
    scratch_release(mark);
}

static void part_amx(const struct matmul_job *job, const struct matmul_part *part) {
    numerics_enter();
    const struct matrix *w = job->w;
    struct walk walk = {.job = job,
                        .w = w,
                        .e4m3 = w->dtype == DTYPE_E4M3,
                        .plain = w->plain,
                        .row_begin = part->row_begin,
                        .row_end = part->row_end};
    walk.tile_bytes = TILE_ELEMENTS * (walk.e4m3 ? 1 : sizeof(bf16));
    walk.panel_bytes = walk.tile_bytes * matrix_blocks(w);
    if (part->row_end - part->row_begin <= FEW_ROWS)
        few_rows(&walk, part->panel_begin, part->panel_end);
    else
        for (uint32_t row = part->row_begin; row < part->row_end; row = walk.row_end) {
            const uint32_t left = part->row_end - row;
            walk.row_begin = row;
            walk.row_end = row + (left < BLOCK_ROWS ? left : BLOCK_ROWS);
            many_rows(&walk, part->panel_begin, part->panel_end);
        }
    TILES_RELEASE();
}

void matmul_job_amx(const struct matmul_job *job, const struct parallel *parallel) {
    ASSERT(job->w->dtype == DTYPE_BF16 || job->w->dtype == DTYPE_E4M3);
    const struct matmul_cost cost = {.rows_per_load = 32, .part_min = 256 * 1024};
    matmul_run(job, part_amx, job->rows <= FEW_ROWS ? FEW_PANELS : GROUP_PANELS, GROUP_ROWS, &cost,
               parallel);
}

void matmul_bf16_amx(const struct matrix *w, const void *x, size_t x_stride, uint32_t rows,
                     float *y, size_t y_stride, const struct parallel *parallel) {
    const struct matmul_job job = {w, x, x_stride, rows, y, y_stride, NULL};
    matmul_job_amx(&job, parallel);
}
