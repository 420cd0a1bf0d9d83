/* Products of the resident step: the same kernels with the same operands as kernels/cuda/table.c
 * has, so the same bits. What the copy engine needs to know is planned when a recording is enqueued
 * for the first time and kept. */
#include <stdlib.h>
#include <string.h>

#include "engine/cuda/step_internal.h"

enum { BLOCK = 128 };

/* The next plan of the recording: made now, or as it was made. */
static struct gemm_cuda *plan(struct step *self, bool fp8, const void *x, size_t x_stride_bytes,
                              const struct step_matrix *w, const struct gemm_args *args) {
    struct step_recording *now = self->now;
    const uint32_t index = self->next_product++;
    if (index < now->products)
        return &now->product[index];
    if (index == now->products_room) {
        const uint32_t room = now->products_room * 2 + 64;
        struct gemm_cuda *more = aligned_alloc(64, room * sizeof *more);
        ASSERT(more != NULL);
        if (now->products > 0)
            memcpy(more, now->product, now->products * sizeof *more);
        free(now->product);
        now->product = more;
        now->products_room = room;
    }
    const size_t element = fp8 ? 1 : sizeof(bf16);
    did(self, gemm_plan_cuda(&now->product[index], fp8, x, x_stride_bytes, w->data,
                             w->stride * element, args));
    now->products++;
    return &now->product[index];
}

void step_product(struct step *self, const struct step_matrix *w, const bf16 *x, size_t x_stride,
                  uint32_t rows, float *y, size_t y_stride) {
    struct step_attention *work = &self->work;
    struct gemm_args args = {
        .rows = rows, .n = w->n, .k = w->k, .groups = 1, .y = y, .y_stride = y_stride};
    if (w->scales == NULL) {
        did(self,
            gemm_run_cuda(self->stream, plan(self, false, x, x_stride * sizeof(bf16), w, &args)));
        return;
    }
    const uint32_t width = up_to(w->k, BLOCK), blocks = width / BLOCK;
    if (work->quantised_of != x)
        did(self, quantise_bf16_cuda(self->stream, x, x_stride, rows, w->k, work->quantised, width,
                                     work->scales, blocks, 1));
    work->quantised_of = x;
    args.a_scale = work->scales;
    args.b_scale = w->scales;
    args.a_scale_row_step = blocks;
    args.a_scale_group_step = 1;
    did(self, gemm_run_cuda(self->stream, plan(self, true, work->quantised, width, w, &args)));
}

/* Each head its own weights: x_step and y_step elements from one head's part of a row to the next.
 */
void step_product_heads(struct step *self, const struct step_matrix *w, const bf16 *x,
                        uint32_t x_step, uint32_t rows, float *y, uint32_t y_step) {
    const uint32_t heads = self->model->heads;
    const struct gemm_args args = {.rows = rows,
                                   .n = w->n,
                                   .k = w->k,
                                   .groups = heads,
                                   .x_group_step = x_step,
                                   .y_group_step = y_step,
                                   .y = y,
                                   .y_stride = (size_t)heads * y_step};
    did(self, gemm_run_cuda(self->stream,
                            plan(self, false, x, (size_t)heads * x_step * sizeof(bf16), w, &args)));
}

void step_product_masked(struct step *self, const struct step_matrix *w, const void *x,
                         size_t x_stride, const float *x_scale, uint32_t slots, uint32_t rows,
                         const uint32_t *count, void *stream, float *y) {
    const bool fp8 = w->scales != NULL;
    const struct gemm_args args = {.rows = rows,
                                   .n = w->n,
                                   .k = w->k,
                                   .groups = slots,
                                   .y = y,
                                   .y_stride = w->n,
                                   .count = count,
                                   .a_scale = x_scale,
                                   .b_scale = w->scales,
                                   .a_scale_row_step = up_to(w->k, BLOCK) / BLOCK,
                                   .a_scale_group_step = 1};
    did(self,
        gemm_run_cuda(stream, plan(self, fp8, x, x_stride * (fp8 ? 1 : sizeof(bf16)), w, &args)));
}

void step_mlp(struct step *self, const struct step_layer *layer, uint32_t rows, float *y) {
    struct step_attention *work = &self->work;
    const uint32_t width = layer->mlp_gate.n;
    const size_t padded = activation_stride(width);
    step_product(self, &layer->mlp_gate, work->normed, self->hidden_stride, rows, work->mlp_gate,
                 width);
    step_product(self, &layer->mlp_up, work->normed, self->hidden_stride, rows, work->mlp_up,
                 width);
    did(self, silu_mul_cuda(self->stream, work->mlp_gate, work->mlp_up, width, rows, width,
                            work->mlp_inner, padded));
    work->quantised_of = NULL;
    step_product(self, &layer->mlp_down, work->mlp_inner, padded, rows, y, self->model->hidden);
}
