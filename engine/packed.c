/* Weights as the kernels want them, and the MLP that dense layers, shared experts and routed
 * experts have in common. */
#include "engine/internal.h"

/* What is read in turn and is smaller than this stays in the cache, where expanding would only
 * cost; in small matrices beginning and end weigh more than what is saved. */
#define CODE_TOGETHER_MIN ((size_t)4 << 20)
#define CODE_BYTES_MIN    ((size_t)32 << 10)

int packed_open(struct packed *ret, const struct kernels *kernels, const struct weight_view *view,
                const char *what, uint64_t *total, struct failure *failure) {
    const size_t bytes = kernels->matrix_bytes(view);
    void *memory = weight_memory_take(bytes, what, total, failure);
    if (memory == NULL)
        return ERR_NO_MEMORY;
    kernels->matrix_pack(&ret->matrix, view, memory);
    *total += ret->matrix.device_bytes;
    ret->memory = memory;
    ret->bytes = bytes;
    return 0;
}

int packed_code(struct packed *self, const struct kernels *kernels, size_t count, const char *what,
                uint64_t *total, struct failure *failure) {
    struct matrix_coding coding;
    if (kernels->matrix_code == NULL || self->bytes < CODE_BYTES_MIN ||
        self->bytes < CODE_TOGETHER_MIN / (count > 0 ? count : 1))
        return 0;
    kernels->matrix_code(&self->matrix, &coding);
    if (coding.bytes == 0)
        return 0;
    void *memory = weight_memory_take(coding.bytes, what, total, failure);
    if (memory != NULL) {
        struct packed plain = *self;
        matrix_place_coded(&self->matrix, &plain.matrix, &coding, memory);
        self->memory = memory;
        self->bytes = coding.bytes;
        *total -= plain.bytes;
        packed_close(&plain);
    }
    matrix_coding_free(&coding);
    return memory != NULL ? 0 : ERR_NO_MEMORY;
}

int packed_open_coded(struct packed *ret, const struct kernels *kernels,
                      const struct weight_view *view, size_t count, const char *what,
                      uint64_t *total, struct failure *failure) {
    const int error = packed_open(ret, kernels, view, what, total, failure);
    return error == 0 ? packed_code(ret, kernels, count, what, total, failure) : error;
}

void packed_close(struct packed *self) {
    if (self->matrix.release != NULL)
        self->matrix.release(&self->matrix);
    weight_memory_free(self->memory, self->bytes);
    *self = (struct packed){0};
}

int floats_open(float **ret, const struct weight_view *view, uint32_t n, const char *what,
                uint64_t *total, struct failure *failure) {
    float *values = memory_take(n, sizeof *values, what, total, failure);
    if (values == NULL)
        return ERR_NO_MEMORY;
    weight_to_float(view, values);
    *ret = values;
    return 0;
}

int mlp_open(struct mlp *ret, const struct kernels *kernels, const struct weight_view view[3],
             const char *what, uint64_t *total, struct failure *failure) {
    int error = packed_open(&ret->gate, kernels, &view[0], what, total, failure);
    if (error == 0)
        error = packed_open(&ret->up, kernels, &view[1], what, total, failure);
    if (error == 0)
        error = packed_open(&ret->down, kernels, &view[2], what, total, failure);
    if (error != 0)
        mlp_close(ret);
    return error;
}

int mlp_code(struct mlp *self, const struct kernels *kernels, size_t count, const char *what,
             uint64_t *total, struct failure *failure) {
    int error = packed_code(&self->gate, kernels, 3 * count, what, total, failure);
    if (error == 0)
        error = packed_code(&self->up, kernels, 3 * count, what, total, failure);
    return error == 0 ? packed_code(&self->down, kernels, 3 * count, what, total, failure) : error;
}

void mlp_close(struct mlp *self) {
    packed_close(&self->gate);
    packed_close(&self->up);
    packed_close(&self->down);
}

void mlp_work_layout(struct mlp_work *ret, struct layout *layout, const struct kernels *kernels,
                     uint32_t rows, uint32_t width) {
    ret->gate = layout_take(layout, rows * sums_stride(width), sizeof(float));
    ret->up = layout_take(layout, rows * sums_stride(width), sizeof(float));
    ret->inner = layout_take(layout, rows * row_stride(width), kernels->activation_bytes);
}

struct silu_job {
    const struct kernels *kernels;
    const struct mlp_work *work;
    uint32_t width;
};

static void silu_rows(void *argument, uint32_t first, uint32_t end, int part) {
    const struct silu_job *job = argument;
    const size_t stride = sums_stride(job->width), inner_stride = row_stride(job->width);
    (void)part;
    job->kernels->silu_mul(job->work->gate + first * stride, job->work->up + first * stride, stride,
                           end - first, job->width,
                           activation_at(job->kernels, job->work->inner, first * inner_stride),
                           inner_stride);
}

/* What follows gate and up. */
static void mlp_finish(const struct mlp *self, const struct kernels *kernels, uint32_t rows,
                       const struct mlp_work *work, float *y, size_t y_stride,
                       const struct parallel *parallel) {
    uint32_t width = self->gate.matrix.n;
    struct silu_job job = {kernels, work, width};
    rows_run(parallel, rows, 2 * (size_t)width, silu_rows, &job);
    kernels->matmul(&self->down.matrix, work->inner, row_stride(width), rows, y, y_stride,
                    parallel);
}

void mlp_run(const struct mlp *self, const struct kernels *kernels, const void *x, size_t x_stride,
             uint32_t rows, const struct mlp_work *work, float *y, size_t y_stride,
             const struct parallel *parallel) {
    const size_t stride = sums_stride(self->gate.matrix.n);
    kernels->matmul(&self->gate.matrix, x, x_stride, rows, work->gate, stride, parallel);
    kernels->matmul(&self->up.matrix, x, x_stride, rows, work->up, stride, parallel);
    mlp_finish(self, kernels, rows, work, y, y_stride, parallel);
}

void mlp_run_e4m3(const struct mlp *self, const struct kernels *kernels, const void *x,
                  size_t x_stride, uint32_t rows, const struct mlp_work *work, float *y,
                  size_t y_stride, const struct parallel *parallel) {
    const size_t stride = sums_stride(self->gate.matrix.n);
    kernels->matmul_e4m3(&self->gate.matrix, x, x_stride, rows, work->gate, stride, parallel);
    kernels->matmul_e4m3(&self->up.matrix, x, x_stride, rows, work->up, stride, parallel);
    mlp_finish(self, kernels, rows, work, y, y_stride, parallel);
}
