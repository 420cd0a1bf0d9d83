/* Cuts one matrix product into parts for threads. Every output is computed whole by one part in one
 * order, so the cut shows in no result. */
#include "kernels/internal.h"

struct run {
    const struct matmul_job *job;
    matmul_part_function *function;
    uint32_t panel_step, row_step;
    uint32_t panel_parts, row_parts; /* product: parts */
};

static uint32_t steps(uint32_t count, uint32_t step) {
    return count / step + (count % step != 0);
}

/* Border `index` of `parts` parts of `count` things taken `step` at a time. */
static uint32_t border(uint32_t count, uint32_t step, uint32_t index, uint32_t parts) {
    const uint64_t at = (uint64_t)steps(count, step) * index / parts * step;
    return at < count ? (uint32_t)at : count;
}

static void run_part(void *argument, int part, int parts) {
    const struct run *run = argument;
    const uint32_t panel_part = (uint32_t)part % run->panel_parts;
    const uint32_t row_part = (uint32_t)part / run->panel_parts;
    const uint32_t panels = matrix_panels(run->job->w), rows = run->job->rows;
    const struct matmul_part todo = {
        border(panels, run->panel_step, panel_part, run->panel_parts),
        border(panels, run->panel_step, panel_part + 1, run->panel_parts),
        border(rows, run->row_step, row_part, run->row_parts),
        border(rows, run->row_step, row_part + 1, run->row_parts),
    };
    if (todo.panel_begin < todo.panel_end && todo.row_begin < todo.row_end)
        run->function(run->job, &todo);
}

void matmul_run(const struct matmul_job *job, matmul_part_function *function, uint32_t panel_step,
                uint32_t row_step, const struct matmul_cost *cost,
                const struct parallel *parallel) {
    if (job->rows == 0 || job->w->n == 0)
        return;
    const uint64_t work = (uint64_t)job->w->n * job->w->k / 64 *
                          ((uint64_t)job->rows + cost->rows_per_load) / cost->rows_per_load;
    const uint64_t worth = work / (cost->part_min / 64), useful = worth > 0 ? worth : 1;
    const uint32_t parts =
        useful < (uint64_t)parallel->width ? (uint32_t)useful : (uint32_t)parallel->width;
    struct run run = {job, function, panel_step, row_step, parts, 1};
    const uint32_t panel_steps = steps(matrix_panels(job->w), panel_step);
    const uint32_t row_steps = steps(job->rows, row_step);
    if (panel_steps < parts) {
        run.panel_parts = panel_steps;
        run.row_parts = parts / panel_steps < row_steps ? parts / panel_steps : row_steps;
    }
    if (run.panel_parts * run.row_parts == 1)
        run_part(&run, 0, 1);
    else
        parallel->run(parallel->pool, run_part, &run, (int)(run.panel_parts * run.row_parts));
}
