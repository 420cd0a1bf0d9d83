/* The product of the bf16 profile as struct matrix defines it, by the scalar canonical dot product.
 */
#include "kernels/internal.h"

#include <string.h>

/* The tile's weights as BF16 in the BF16 tile's order; `scratch` holds them if they are stored as
 * E4M3. */
static const bf16 *tile_bf16(const struct matrix *w, size_t tile, bf16 scratch[TILE_ELEMENTS]) {
    if (w->dtype == DTYPE_BF16)
        return (const bf16 *)w->data + tile * TILE_ELEMENTS;
    const uint8_t *stored = (const uint8_t *)w->data + tile * TILE_ELEMENTS;
    for (uint32_t o = 0; o < PANEL_OUTPUTS; o++)
        for (uint32_t i = 0; i < BLOCK_INPUTS; i++)
            scratch[tile_index_bf16(o, i)] = e4m3_to_bf16(stored[tile_index_e4m3(o, i)]);
    return scratch;
}

/* 32 inputs of one row, those past the end of the segment zero. */
static const bf16 *inputs(const bf16 *x, uint32_t count, bf16 scratch[BLOCK_INPUTS]) {
    if (count >= BLOCK_INPUTS)
        return x;
    memset(scratch, 0, BLOCK_INPUTS * sizeof *scratch);
    memcpy(scratch, x, count * sizeof *scratch);
    return scratch;
}

enum { ROWS_AT_ONCE = 16 };

/* Sums one segment of one panel for up to 16 rows: sums[row][output] += even + odd of each block.
 */
static void segment_sums(const struct matmul_job *job, size_t panel, uint32_t segment, uint32_t row,
                         uint32_t rows, float sums[ROWS_AT_ONCE][PANEL_OUTPUTS]) {
    const struct matrix *w = job->w;
    const uint32_t end = w->segment_k[segment + 1];
    uint32_t k = w->segment_k[segment];
    for (uint32_t b = w->segment_block[segment]; b < w->segment_block[segment + 1];
         b++, k += BLOCK_INPUTS) {
        bf16 weight_scratch[TILE_ELEMENTS], x_scratch[BLOCK_INPUTS];
        const bf16 *tile = tile_bf16(w, panel * matrix_blocks(w) + b, weight_scratch);
        for (uint32_t r = 0; r < rows; r++) {
            const bf16 *x =
                inputs((const bf16 *)job->x + (row + r) * job->x_stride + k, end - k, x_scratch);
            for (int o = 0; o < PANEL_OUTPUTS; o++)
                sums[r][o] = add_canonical(sums[r][o], dot_bf16_block(tile + 2 * o, 32, 1, x));
        }
    }
}

static float both_scales(const struct matmul_job *job, float scale, size_t row, uint32_t segment) {
    if (job->x_scale == NULL)
        return scale;
    return fma_canonical(scale, job->x_scale[row * job->w->segments + segment], 0);
}

static void panel_rows(const struct matmul_job *job, uint32_t panel, uint32_t row, uint32_t rows) {
    const struct matrix *w = job->w;
    float acc[ROWS_AT_ONCE][PANEL_OUTPUTS] = {{0}};
    for (uint32_t s = 0; s < w->segments; s++) {
        if (w->scales == NULL) {
            segment_sums(job, panel, s, row, rows, acc);
            continue;
        }
        float partial[ROWS_AT_ONCE][PANEL_OUTPUTS] = {{0}};
        segment_sums(job, panel, s, row, rows, partial);
        const float *scale = panel_scales(w, panel, s);
        for (uint32_t r = 0; r < rows; r++)
            for (int o = 0; o < PANEL_OUTPUTS; o++)
                acc[r][o] =
                    fma_canonical(partial[r][o], both_scales(job, scale[o], row + r, s), acc[r][o]);
    }
    const uint32_t first = panel * PANEL_OUTPUTS;
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t o = 0; o < PANEL_OUTPUTS && first + o < w->n; o++)
            job->y[(row + r) * job->y_stride + first + o] = acc[r][o];
}

static void part_scalar(const struct matmul_job *job, const struct matmul_part *part) {
    for (uint32_t panel = part->panel_begin; panel < part->panel_end; panel++)
        for (uint32_t row = part->row_begin; row < part->row_end; row += ROWS_AT_ONCE) {
            const uint32_t left = part->row_end - row;
            panel_rows(job, panel, row, left < ROWS_AT_ONCE ? left : ROWS_AT_ONCE);
        }
}

void matmul_job_scalar(const struct matmul_job *job, const struct parallel *parallel) {
    ASSERT(job->w->dtype == DTYPE_BF16 || job->w->dtype == DTYPE_E4M3);
    const struct matmul_cost cost = {.rows_per_load = 1, .part_min = 1280 * 1024};
    matmul_run(job, part_scalar, 1, 1, &cost, parallel);
}

void matmul_bf16_scalar(const struct matrix *w, const void *x, size_t x_stride, uint32_t rows,
                        float *y, size_t y_stride, const struct parallel *parallel) {
    const struct matmul_job job = {w, x, x_stride, rows, y, y_stride, NULL, NULL, NULL};
    matmul_job_scalar(&job, parallel);
}
