/* The product of the bf16 profile with AMX: TDPBF16PS multiplies up to 16 rows by a tile of weights
 * and computes exactly the canonical sums (an even and an odd chain of 16 FMAs, then their sum
 * joins the accumulator; denormals are zero). */
#include "kernels/x86/matmul_amx.h"

enum {
    FEW_PANELS = 1,
    FEW_BF16 =
        2 * TILE_ROWS, /* rows up to which few is at least as fast as many; others: FEW_ROWS */
    MANY_PANELS = 2,
    ROW_STEP = 2 * TILE_ROWS,
    DECODED_BYTES = 512 * 1024,
    BLOCK_ROWS_MIN = 64,
    BLOCK_ROWS_MAX = 512,      /* rows that pass over a chunk of weights one after the other: */
    BLOCK_BYTES = 1024 * 1024, /* their inputs, half of a second-level cache */
};

/* Rows that pass over the weights together, about as many each time. */
static uint32_t block_rows(const struct matrix *w, uint32_t rows) {
    const uint32_t row_bytes = (matrix_blocks(w) > 0 ? matrix_blocks(w) : 1) * 64;
    uint32_t most = BLOCK_BYTES / row_bytes / ROW_STEP * ROW_STEP;
    most = most < BLOCK_ROWS_MIN ? BLOCK_ROWS_MIN : most;
    most = most < BLOCK_ROWS_MAX ? most : BLOCK_ROWS_MAX;
    const uint32_t times = (rows + most - 1) / most;
    return ((rows + times - 1) / times + ROW_STEP - 1) / ROW_STEP * ROW_STEP;
}

/* Products that wait for memory; a job with a sink or with pages of inputs is for the other kernel.
 */
static bool is_few(const struct matmul_job *job, uint32_t rows) {
    const bool expands = job->w->dtype == DTYPE_E4M3 || job->w->codes != NULL;
    const uint32_t most = expands ? (uint32_t)FEW_ROWS : (uint32_t)FEW_BF16;
    return rows <= most && job->sink == NULL && job->x_pages == NULL;
}

/* Many rows of coded weights: some panels at a time as plain BF16, in the second-level cache. */
static void part_coded(const struct matmul_job *job, const struct matmul_part *part) {
    const struct matrix *w = job->w;
    ASSERT(job->sink == NULL && job->x_pages == NULL);
    const uint32_t blocks = matrix_blocks(w), fit = DECODED_BYTES / (blocks * 1024);
    const uint32_t most = fit < MANY_PANELS ? MANY_PANELS : fit / MANY_PANELS * MANY_PANELS;
    const struct scratch_mark mark = scratch_mark();
    bf16 *tiles = scratch_take((size_t)most * blocks * TILE_ELEMENTS, sizeof(bf16));
    for (uint32_t panel = part->panel_begin, count; panel < part->panel_end; panel += count) {
        const uint32_t left = part->panel_end - panel, first = panel * PANEL_OUTPUTS;
        count = left < most ? left : most;
        tiles_decode_amx(w, panel * blocks, count * blocks, tiles);
        struct matrix some = *w;
        some.codes = NULL;
        some.data = tiles;
        some.n = w->n - first < count * PANEL_OUTPUTS ? w->n - first : count * PANEL_OUTPUTS;
        struct matmul_job some_job = *job;
        some_job.w = &some;
        some_job.y = job->y + first;
        matmul_part_amx(&some_job, &(struct matmul_part){0, count, part->row_begin, part->row_end});
    }
    scratch_release(mark);
}

void matmul_part_amx(const struct matmul_job *job, const struct matmul_part *part) {
    numerics_enter();
    if (job->w->codes != NULL && !is_few(job, part->row_end - part->row_begin)) {
        part_coded(job, part);
        return;
    }
    const struct matrix *w = job->w;
    struct walk walk = {.job = job,
                        .w = w,
                        .e4m3 = w->dtype == DTYPE_E4M3,
                        .plain = w->plain,
                        .row_begin = part->row_begin,
                        .row_end = part->row_end};
    walk.tile_bytes = TILE_ELEMENTS * (walk.e4m3 ? 1 : sizeof(bf16)); /* coded weights: unused */
    walk.panel_bytes = walk.tile_bytes * matrix_blocks(w);
    if (is_few(job, part->row_end - part->row_begin))
        matmul_amx_few(&walk, part->panel_begin, part->panel_end);
    else
        for (uint32_t row = part->row_begin; row < part->row_end; row = walk.row_end) {
            const uint32_t left = part->row_end - row, most = block_rows(w, left);
            walk.row_begin = row;
            walk.row_end = row + (left < most ? left : most);
            matmul_amx_many(&walk, part->panel_begin, part->panel_end);
        }
    TILES_RELEASE();
}

void matmul_job_amx(const struct matmul_job *job, const struct parallel *parallel) {
    ASSERT(job->w->dtype == DTYPE_BF16 || job->w->dtype == DTYPE_E4M3);
    const struct matmul_cost cost = {.rows_per_load = 32, .part_min = 256 * 1024};
    matmul_run(job, matmul_part_amx, is_few(job, job->rows) ? FEW_PANELS : MANY_PANELS, ROW_STEP,
               &cost, parallel);
}

void matmul_bf16_amx(const struct matrix *w, const void *x, size_t x_stride, uint32_t rows,
                     float *y, size_t y_stride, const struct parallel *parallel) {
    const struct matmul_job job = {w, x, x_stride, rows, y, y_stride, NULL, NULL, NULL};
    matmul_job_amx(&job, parallel);
}
