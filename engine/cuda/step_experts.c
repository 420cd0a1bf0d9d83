/* The experts' part of the resident step, enqueued on a group's stream: what was asked in a frame,
 * for all experts of the group together, and the answer. Row by row the operations are those of
 * engine/expert_engine.c. */
#include "engine/cuda/step_internal.h"

enum { BLOCK = 128 };

/* Rows of the frame, by slot: [slots, R]. FP8: as they came, or quantised first, so that a row is
 * quantised once. */
static void pack(struct step *self, struct step_group *group, const struct edge_frame *frame,
                 uint32_t rows, size_t width) {
    const struct step_model *m = self->model;
    const uint32_t k = m->gate.k, slots = self->options.slots;
    const size_t row_bytes = self->hidden_stride * sizeof(bf16);
    if (!m->expert_fp8) {
        did(self, pack_cuda(group->stream, frame->rows, row_bytes, (uint32_t)row_bytes, k,
                            group->count, group->item, slots, rows, group->x, row_bytes));
        return;
    }
    const uint32_t blocks = (uint32_t)(width / BLOCK), scale_bytes = blocks * sizeof(float);
    if (self->options.dispatch == DISPATCH_E4M3) {
        did(self, unpack_e4m3_cuda(group->stream, frame->rows, step_row_bytes(self), m->hidden, k,
                                   group->count, group->item, slots, rows, group->x, width,
                                   group->x_scale, blocks, 1));
        return;
    }
    did(self, quantise_bf16_cuda(group->stream, frame->rows, self->hidden_stride, rows, m->hidden,
                                 group->x_row, width, group->x_row_scale, blocks, 1));
    did(self, pack_cuda(group->stream, group->x_row, width, (uint32_t)width, k, group->count,
                        group->item, slots, rows, group->x, width));
    did(self, pack_cuda(group->stream, group->x_row_scale, scale_bytes, scale_bytes, k,
                        group->count, group->item, slots, rows, group->x_scale, scale_bytes));
}

void step_experts(struct step *self, uint32_t g, uint32_t l, uint32_t micro) {
    struct step_group *group = &self->group[g];
    const struct step_model *m = self->model;
    const struct step_stack *stack = &group->stack[l];
    struct step_link *link = &self->micro[micro].link[g];
    const struct edge_frame frame = step_frame(self, micro, g);
    const uint32_t rows = self->now->rows, k = m->gate.k, slots = self->options.slots;
    const uint32_t width = m->expert_width, items = rows * k;
    const size_t hidden_width =
        m->expert_fp8 ? up_to(m->hidden, BLOCK) : self->hidden_stride; /* elements of a row */
    const size_t inner_stride = activation_stride(width),
                 inner_blocks = up_to(width, BLOCK) / BLOCK;
    step_link_receive(self, link, link->edge.operations->accept, &frame, group->stream);
    did(self, dispatch_cuda(group->stream, exchange_list(frame.note), items,
                            group->slot_of + (size_t)l * m->gate.experts, m->gate.experts, slots,
                            rows, group->count, group->item, group->place));
    pack(self, group, &frame, rows, hidden_width);
    step_product_masked(self, &stack->gate_up, group->x, hidden_width, group->x_scale, slots, rows,
                        group->count, group->stream, group->gate_up);
    did(self, silu_mul_grouped_cuda(group->stream, group->gate_up, group->gate_up + width,
                                    2 * (size_t)width, group->count, slots, rows, width,
                                    group->inner, inner_stride));
    const void *inner = group->inner;
    size_t inner_width = inner_stride;
    if (m->expert_fp8) {
        inner = group->inner_fp8;
        inner_width = inner_blocks * BLOCK;
        did(self, quantise_grouped_cuda(group->stream, group->inner, inner_stride, group->count,
                                        slots, rows, width, group->inner_fp8, inner_width,
                                        group->inner_scale, inner_blocks, 1));
    }
    step_product_masked(self, &stack->down, inner, inner_width, group->inner_scale, slots, rows,
                        group->count, group->stream, group->y);
    did(self, exchange_reply_cuda(group->stream, frame.note, rows, k, items, group->place, group->y,
                                  m->hidden, m->hidden, frame.status, frame.output));
    step_link_send(self, link, link->edge.operations->answer, &frame, group->stream);
}
