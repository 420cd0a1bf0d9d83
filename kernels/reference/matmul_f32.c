/* The product of the f32 profile: every output is one sum in ascending k, multiplied and added
 * separately. Sixteen outputs go side by side, which changes no sum and lets the compiler use
 * vectors. */
#include "kernels/internal.h"

static void part_f32(const struct matmul_job *job, const struct matmul_part *part) {
    const struct matrix *w = job->w;
    for (uint32_t panel = part->panel_begin; panel < part->panel_end; panel++) {
        const float *weights =
            (const float *)w->data + (size_t)panel * w->k * PANEL_OUTPUTS; /* [k][16] */
        const uint32_t first = panel * PANEL_OUTPUTS;
        for (uint32_t row = part->row_begin; row < part->row_end; row++) {
            const float *x = (const float *)job->x + row * job->x_stride;
            float *y = job->y + row * job->y_stride;
            float acc[PANEL_OUTPUTS] = {0};
            for (size_t k = 0; k < w->k; k++)
                for (int o = 0; o < PANEL_OUTPUTS; o++)
                    acc[o] += weights[k * PANEL_OUTPUTS + o] * x[k];
            for (uint32_t o = 0; o < PANEL_OUTPUTS && first + o < w->n; o++)
                y[first + o] = acc[o];
        }
    }
}

void matmul_f32(const struct matrix *w, const void *x, size_t x_stride, uint32_t rows, float *y,
                size_t y_stride, const struct parallel *parallel) {
    ASSERT(w->dtype == DTYPE_F32);
    const struct matmul_job job = {w, x, x_stride, rows, y, y_stride, NULL, NULL, NULL};
    const struct matmul_cost cost = {.rows_per_load = 1, .part_min = 1280 * 1024};
    matmul_run(&job, part_f32, 1, 1, &cost, parallel);
}
