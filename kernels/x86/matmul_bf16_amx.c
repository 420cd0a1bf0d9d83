/* The product of the bf16 profile with AMX: TDPBF16PS multiplies 16 rows by a tile of weights and
 * computes exactly the canonical sums (an even and an odd chain of 16 FMAs, then their sum joins
 * the accumulator; denormals are zero).
 *
 * Tiles 0..3 hold the sums of up to 32 rows x 2 panels, 4 and 5 the inputs, 6 and 7 the weights.
 * E4M3 weights are expanded to BF16 first, once per segment where segments are short (scaled
 * weights). The sums of a scaled segment leave the tiles to be multiplied by its scales in FP32.
 *
 * Instructions are written out because GCC 12's intrinsics do not tell the compiler that they read
 * memory. */
#include <string.h>

#include "kernels/x86/kernel_bf16.h"

enum { TILE_ROWS = 16, GROUP_ROWS = 32, GROUP_PANELS = 2, SCRATCH_BLOCKS = 4 };

#define TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile::: "memory")
#define TILE_LOAD(tile, base, stride_bytes)                                                        \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(base), "r"(stride_bytes) : "memory")
#define TILE_STORE(tile, base, stride_bytes)                                                       \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(base), "r"(stride_bytes)         \
                     : "memory")
#define TILE_PRODUCT(sums, inputs, weights)                                                        \
    __asm__ volatile("tdpbf16ps %%tmm" #weights ", %%tmm" #inputs ", %%tmm" #sums::: "memory")

/* The operand of LDTILECFG (Intel SDM volume 1, section 18.2). */
struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

static void configure(uint32_t rows) {
    const uint8_t rows_low = (uint8_t)(rows < TILE_ROWS ? rows : TILE_ROWS);
    const uint8_t rows_high = (uint8_t)(rows > TILE_ROWS ? rows - TILE_ROWS : 1);
    _Alignas(64) struct tile_config config = {.palette = 1};
    const uint8_t rows_of[8] = {rows_low, rows_low,  rows_high, rows_high,
                                rows_low, rows_high, 16,        16};
    for (int i = 0; i < 8; i++) {
        config.row_bytes[i] = 64;
        config.rows[i] = rows_of[i];
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory");
}

/* Up to two panels of weights. */
struct panels {
    const struct matmul_job *job;
    uint32_t panel, count;
    const uint8_t *tiles[GROUP_PANELS]; /* as packed */
    expand_function *expand;            /* NULL: packed as BF16 */
    bf16 *scratch;                      /* [panel][SCRATCH_BLOCKS] tiles */
};

/* One block of 32 inputs: adds to the sums in tiles 0..3. */
static void add_block(const bf16 *x, size_t x_stride_bytes, uint32_t rows,
                      const bf16 *const *weights, uint32_t panels) {
    const size_t row_bytes = 64;
    const bf16 *x_high = (const bf16 *)((const uint8_t *)x + TILE_ROWS * x_stride_bytes);
    TILE_LOAD(4, x, x_stride_bytes);
    TILE_LOAD(6, weights[0], row_bytes);
    TILE_PRODUCT(0, 4, 6);
    if (panels > 1) {
        TILE_LOAD(7, weights[1], row_bytes);
        TILE_PRODUCT(1, 4, 7);
    }
    if (rows <= TILE_ROWS)
        return;
    TILE_LOAD(5, x_high, x_stride_bytes);
    TILE_PRODUCT(2, 5, 6);
    if (panels > 1)
        TILE_PRODUCT(3, 5, 7);
}

/* The weights of block b of a segment that starts at `first`, as BF16 tiles. */
static void block_weights(const struct panels *panels, uint32_t first, uint32_t b, bool expanded,
                          const bf16 *weights[GROUP_PANELS]) {
    for (uint32_t p = 0; p < panels->count; p++) {
        if (panels->expand == NULL) {
            weights[p] =
                (const bf16 *)(const void *)panels->tiles[p] + (size_t)(first + b) * TILE_ELEMENTS;
            continue;
        }
        bf16 *scratch = panels->scratch + (size_t)p * SCRATCH_BLOCKS * TILE_ELEMENTS;
        if (expanded)
            scratch += (size_t)b * TILE_ELEMENTS;
        else
            panels->expand(panels->tiles[p] + (size_t)(first + b) * TILE_ELEMENTS, scratch, 1);
        weights[p] = scratch;
    }
}

/* The sums of one segment over rows [row, row + rows), rows <= 32, into `sums`. */
static void segment_sums(const struct panels *panels, uint32_t segment, bool expanded, uint32_t row,
                         uint32_t rows, float sums[GROUP_ROWS][GROUP_PANELS * PANEL_OUTPUTS]) {
    const struct matmul_job *job = panels->job;
    const uint32_t first = job->w->segment_block[segment];
    const bf16 *x = (const bf16 *)job->x + row * job->x_stride + job->w->segment_k[segment];
    uint32_t left = job->w->segment_k[segment + 1] - job->w->segment_k[segment];
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
    const bf16 *weights[GROUP_PANELS];
    uint32_t b = 0;
    for (; left >= BLOCK_INPUTS; left -= BLOCK_INPUTS, b++, x += BLOCK_INPUTS) {
        block_weights(panels, first, b, expanded, weights);
        add_block(x, job->x_stride * sizeof *x, rows, weights, panels->count);
    }
    if (left > 0) {
        /* What follows in x belongs to the next segment, or to nobody. */
        bf16 rest[GROUP_ROWS][BLOCK_INPUTS] = {{0}};
        for (uint32_t r = 0; r < rows; r++)
            memcpy(rest[r], x + r * job->x_stride, left * sizeof *x);
        block_weights(panels, first, b, expanded, weights);
        add_block(rest[0], sizeof rest[0], rows, weights, panels->count);
    }
    const size_t stride_bytes = sizeof sums[0];
    TILE_STORE(0, &sums[0][0], stride_bytes);
    TILE_STORE(1, &sums[0][PANEL_OUTPUTS], stride_bytes);
    if (rows > TILE_ROWS) {
        TILE_STORE(2, &sums[TILE_ROWS][0], stride_bytes);
        TILE_STORE(3, &sums[TILE_ROWS][PANEL_OUTPUTS], stride_bytes);
    }
}

/* y = sums, or y += sums * scale where weights are scaled; y counts as 0 before the first segment.
 */
static void finish_segment(const struct panels *panels, uint32_t segment, uint32_t row,
                           uint32_t rows, float sums[GROUP_ROWS][GROUP_PANELS * PANEL_OUTPUTS]) {
    const struct matrix *w = panels->job->w;
    for (uint32_t p = 0; p < panels->count; p++) {
        const uint32_t panel = panels->panel + p, n = panel * PANEL_OUTPUTS;
        const __mmask16 outputs =
            w->n - n < PANEL_OUTPUTS ? (__mmask16)((1u << (w->n - n)) - 1) : 0xffff;
        __m512 scale = _mm512_setzero_ps();
        if (w->scales != NULL)
            scale = _mm512_loadu_ps(w->scales +
                                    ((size_t)segment * matrix_panels(w) + panel) * PANEL_OUTPUTS);
        for (uint32_t r = 0; r < rows; r++) {
            float *y = panels->job->y + (row + r) * panels->job->y_stride + n;
            __m512 value = _mm512_loadu_ps(&sums[r][p * PANEL_OUTPUTS]);
            if (w->scales != NULL)
                value = _mm512_fmadd_ps(value, scale,
                                        _mm512_maskz_loadu_ps(segment > 0 ? outputs : 0, y));
            _mm512_mask_storeu_ps(y, outputs, value);
        }
    }
}

static void run_panels(const struct panels *panels, const struct matmul_part *part) {
    const struct matrix *w = panels->job->w;
    float sums[GROUP_ROWS][GROUP_PANELS * PANEL_OUTPUTS];
    uint32_t configured = 0;
    for (uint32_t s = 0; s < w->segments; s++) {
        const uint32_t first = w->segment_block[s], blocks = w->segment_block[s + 1] - first;
        const bool expanded = panels->expand != NULL && blocks <= SCRATCH_BLOCKS;
        for (uint32_t p = 0; expanded && p < panels->count; p++)
            panels->expand(panels->tiles[p] + (size_t)first * TILE_ELEMENTS,
                           panels->scratch + (size_t)p * SCRATCH_BLOCKS * TILE_ELEMENTS, blocks);
        for (uint32_t row = part->row_begin; row < part->row_end; row += GROUP_ROWS) {
            const uint32_t left = part->row_end - row, rows = left < GROUP_ROWS ? left : GROUP_ROWS;
            if (rows != configured)
                configure(rows);
            configured = rows;
            segment_sums(panels, s, expanded, row, rows, sums);
            finish_segment(panels, s, row, rows, sums);
        }
    }
}

static void part_amx(const struct matmul_job *job, const struct matmul_part *part) {
    numerics_enter();
    const struct matrix *w = job->w;
    _Alignas(64) bf16 scratch[GROUP_PANELS * SCRATCH_BLOCKS * TILE_ELEMENTS];
    struct panels panels = {.job = job, .scratch = scratch};
    if (w->dtype == DTYPE_E4M3)
        panels.expand = expand_tiles_best();
    const size_t tile_bytes = TILE_ELEMENTS * (w->dtype == DTYPE_E4M3 ? 1 : sizeof(bf16));
    for (uint32_t panel = part->panel_begin; panel < part->panel_end; panel += GROUP_PANELS) {
        panels.panel = panel;
        panels.count =
            part->panel_end - panel < GROUP_PANELS ? part->panel_end - panel : GROUP_PANELS;
        for (uint32_t p = 0; p < panels.count; p++)
            panels.tiles[p] =
                (const uint8_t *)w->data + (panel + p) * matrix_blocks(w) * tile_bytes;
        run_panels(&panels, part);
    }
    __asm__ volatile("tilerelease" ::: "memory");
}

void matmul_bf16_amx(const struct matrix *w, const void *x, size_t x_stride, uint32_t rows,
                     float *y, size_t y_stride, const struct parallel *parallel) {
    ASSERT(w->dtype == DTYPE_BF16 || w->dtype == DTYPE_E4M3);
    const struct matmul_job job = {w, x, x_stride, rows, y, y_stride};
    matmul_run(&job, part_amx, GROUP_PANELS, GROUP_ROWS, parallel);
}
