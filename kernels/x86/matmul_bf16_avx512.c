/* The product of the bf16 profile with AVX-512: the same sums as the scalar definition, sixteen
 * outputs in a vector. This file walks rows and panels; the arithmetic is in
 * kernel_bf16_template.h.
 *
 * Weights are streamed from memory once: a few panels stay in the cache while all rows pass over
 * them. E4M3 weights that serve many rows are expanded once per segment and group of panels. */
#include "kernels/x86/kernel_bf16.h"

/* Segments of scaled E4M3 weights are 128 wide. Below EXPAND_ROWS_MIN rows it is faster to expand
 * in registers, again for every group of rows (measured on Zen 4). */
enum { SCRATCH_BLOCKS = 4, SCRATCH_PANELS = 2, EXPAND_ROWS_MIN = 9 };

static uint32_t smaller(uint32_t a, uint32_t b) {
    return a < b ? a : b;
}

/* Rows that go through a kernel together: 4 while there are more than that, the rest as evenly as
 * it gets. */
static uint32_t kernel_rows(uint32_t left) {
    if (left > KERNEL_ROWS_MAX && left < 2 * KERNEL_ROWS_MAX)
        return (left + 1) / 2;
    return smaller(left, KERNEL_ROWS_MAX);
}

/* log2 of the panels to take: as many as there are kernels for. */
static uint32_t kernel_size(kernel_function *const (*kernels)[KERNEL_SIZES], uint32_t rows,
                            uint32_t left) {
    uint32_t size = KERNEL_SIZES - 1;
    while (1u << size > left || kernels[rows - 1][size] == NULL)
        size--;
    return size;
}

static void run_rows(struct kernel_job job, kernel_function *const (*kernels)[KERNEL_SIZES],
                     uint32_t size, uint32_t rows) {
    while (rows > 0) {
        const uint32_t now = kernel_rows(rows);
        /* The first inputs of the next rows: far apart, so that the processor does not guess them.
         */
        for (uint32_t r = now; r < rows && r < now + KERNEL_ROWS_MAX; r++)
            for (uint32_t i = 0; i < SCRATCH_BLOCKS; i++)
                _mm_prefetch(job.x + r * job.x_stride + job.segment_k[0] + i * BLOCK_INPUTS,
                             _MM_HINT_T0);
        kernels[now - 1][size](&job);
        job.x += now * job.x_stride;
        job.y += now * job.y_stride;
        if (job.x_scale != NULL)
            job.x_scale += now * job.x_scale_stride;
        rows -= now;
    }
}

static void run_expanded(struct kernel_job job, const struct matrix *w, uint32_t size,
                         uint32_t rows) {
    _Alignas(64) bf16 scratch[SCRATCH_PANELS][SCRATCH_BLOCKS * TILE_ELEMENTS];
    expand_function *expand = expand_tiles_best();
    const uint8_t *packed = job.tiles;
    const size_t packed_panel_bytes = job.panel_bytes;
    job.tiles = (const uint8_t *)scratch;
    job.panel_bytes = sizeof scratch[0];
    job.segments = 1;
    for (uint32_t s = 0; s < w->segments; s++) {
        const uint32_t blocks = w->segment_block[s + 1] - w->segment_block[s];
        for (uint32_t p = 0; p < 1u << size; p++)
            expand(packed + p * packed_panel_bytes, scratch[p], blocks);
        run_rows(job, kernels_bf16, size, rows);
        packed += (size_t)blocks * TILE_ELEMENTS;
        job.scales += PANEL_OUTPUTS;
        if (job.x_scale != NULL)
            job.x_scale++;
        job.segment_k++;
        job.continues = true;
    }
}

static bool worth_expanding(const struct matrix *w, uint32_t rows) {
    if (w->dtype != DTYPE_E4M3 || w->scales == NULL || rows < EXPAND_ROWS_MIN)
        return false;
    for (uint32_t s = 0; s < w->segments; s++)
        if (w->segment_block[s + 1] - w->segment_block[s] > SCRATCH_BLOCKS)
            return false;
    return true;
}

static void part_avx512(const struct matmul_job *job, const struct matmul_part *part) {
    numerics_enter();
    const struct matrix *w = job->w;
    kernel_function *const(*kernels)[KERNEL_SIZES] = kernels_bf16;
    if (w->dtype == DTYPE_E4M3)
        kernels = __builtin_cpu_supports("avx512vbmi") ? kernels_e4m3_vbmi : kernels_e4m3;
    const size_t tile_bytes = TILE_ELEMENTS * (w->dtype == DTYPE_E4M3 ? 1 : sizeof(bf16));
    const size_t panel_bytes = tile_bytes * matrix_blocks(w);
    const uint32_t panels = matrix_panels(w), rows = part->row_end - part->row_begin;
    const bool expanded = worth_expanding(w, rows);
    for (uint32_t panel = part->panel_begin; panel < part->panel_end;) {
        const uint32_t size =
            kernel_size(kernels, smaller(rows, KERNEL_ROWS_MAX), part->panel_end - panel);
        const uint32_t next = panel + (1u << size);
        const uint32_t missing = next == panels ? panels * PANEL_OUTPUTS - w->n : 0;
        const struct kernel_job todo = {
            .tiles = (const uint8_t *)w->data + panel * panel_bytes,
            .panel_bytes = panel_bytes,
            .x = (const bf16 *)job->x + part->row_begin * job->x_stride,
            .x_stride = job->x_stride,
            .y = job->y + part->row_begin * job->y_stride + (size_t)panel * PANEL_OUTPUTS,
            .y_stride = job->y_stride,
            .scales = w->scales == NULL ? NULL : panel_scales(w, panel, 0),
            .scale_stride = (size_t)w->segments * PANEL_OUTPUTS,
            .x_scale =
                job->x_scale == NULL ? NULL : job->x_scale + (size_t)part->row_begin * w->segments,
            .x_scale_stride = w->segments,
            .segment_k = w->segment_k,
            .segments = w->segments,
            .last_outputs = (__mmask16)(0xffff >> missing),
        };
        if (expanded)
            run_expanded(todo, w, size, rows);
        else
            run_rows(todo, kernels, size, rows);
        panel = next;
    }
}

void matmul_job_avx512(const struct matmul_job *job, const struct parallel *parallel) {
    ASSERT(job->w->dtype == DTYPE_BF16 || job->w->dtype == DTYPE_E4M3);
    const struct matmul_cost cost = {.rows_per_load = 1, .part_min = 1280 * 1024};
    matmul_run(job, part_avx512, job->rows <= 2 ? 4 : 2, KERNEL_ROWS_MAX, &cost, parallel);
}

void matmul_bf16_avx512(const struct matrix *w, const void *x, size_t x_stride, uint32_t rows,
                        float *y, size_t y_stride, const struct parallel *parallel) {
    const struct matmul_job job = {w, x, x_stride, rows, y, y_stride, NULL, NULL, NULL};
    matmul_job_avx512(&job, parallel);
}
