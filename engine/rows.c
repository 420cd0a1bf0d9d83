/* Work on independent rows, cut over the threads. How it is cut never changes a row. */
#include "engine/internal.h"

/* Vector operations that are worth a thread: ten microseconds or so, as long as waking it takes. */
#define PART_WORK 16384

struct rows_job {
    void (*task)(void *argument, uint32_t first, uint32_t end, int part);
    void *argument;
    uint32_t rows;
};

static void run_part(void *argument, int part, int parts) {
    const struct rows_job *job = argument;
    uint32_t first = (uint32_t)((uint64_t)job->rows * (uint32_t)part / (uint32_t)parts);
    uint32_t end = (uint32_t)((uint64_t)job->rows * ((uint32_t)part + 1) / (uint32_t)parts);
    if (first < end)
        job->task(job->argument, first, end, part);
}

void rows_run(const struct parallel *parallel, uint32_t rows, size_t row_work,
              void (*task)(void *argument, uint32_t first, uint32_t end, int part),
              void *argument) {
    if (rows == 0)
        return;
    uint64_t parts = (uint64_t)rows * row_work / PART_WORK;
    if (parts > rows)
        parts = rows;
    if (parts > (uint64_t)parallel->width)
        parts = (uint64_t)parallel->width;
    if (parts <= 1) {
        task(argument, 0, rows, 0);
        return;
    }
    struct rows_job job = {task, argument, rows};
    parallel->run(parallel->pool, run_part, &job, (int)parts);
}

struct norm_job {
    const struct engine *engine;
    const float *x, *weight;
    void *ret;
    size_t x_stride, ret_stride;
    uint32_t n;
};

static void norm_rows(void *argument, uint32_t first, uint32_t end, int part) {
    const struct norm_job *job = argument;
    const struct kernels *kernels = job->engine->kernels;
    (void)part;
    kernels->rms_norm(job->x + first * job->x_stride, job->x_stride, job->weight,
                      job->engine->config->norm_eps, end - first, job->n,
                      activation_at(kernels, job->ret, first * job->ret_stride), job->ret_stride);
}

void rows_norm(const struct engine *self, const float *x, size_t x_stride, const float *weight,
               uint32_t rows, uint32_t n, void *ret, size_t ret_stride) {
    struct norm_job job = {self, x, weight, ret, x_stride, ret_stride, n};
    rows_run(&self->parallel, rows, n / 4, norm_rows, &job);
}

struct add_job {
    const struct kernels *kernels;
    float *x;
    const float *y;
    size_t x_stride, y_stride;
    uint32_t n;
};

static void add_rows(void *argument, uint32_t first, uint32_t end, int part) {
    const struct add_job *job = argument;
    (void)part;
    job->kernels->add(job->x + first * job->x_stride, job->x_stride, job->y + first * job->y_stride,
                      job->y_stride, end - first, job->n);
}

void rows_add(const struct engine *self, float *x, size_t x_stride, const float *y, size_t y_stride,
              uint32_t rows, uint32_t n) {
    struct add_job job = {self->kernels, x, y, x_stride, y_stride, n};
    rows_run(&self->parallel, rows, n / 8, add_rows, &job);
}
