/* What the scalar forms of multi-head latent attention share: one block of the online softmax, and
 * how work is cut. */
#include "kernels/rows.h"

float softmax_block(struct softmax *self, const float *score, uint32_t visible,
                    float p[PAGE_TOKENS]) {
    float maximum = self->maximum;
    for (uint32_t j = 0; j < visible; j++)
        maximum = score[j] > maximum ? score[j] : maximum;
    for (uint32_t j = 0; j < PAGE_TOKENS; j++)
        p[j] = j < visible ? exp_canonical(score[j] - maximum) : 0.0f;
    float factor = exp_canonical(self->maximum - maximum); /* 0 at the first block */
    self->sum = __builtin_fmaf(self->sum, factor, sum_canonical(p, PAGE_TOKENS));
    self->maximum = maximum;
    return factor;
}

void run_parts(const struct parallel *parallel, void (*task)(void *argument, int part, int parts),
               void *argument, size_t items) {
    size_t parts = (size_t)parallel->width < items ? (size_t)parallel->width : items;
    if (parts == 1)
        task(argument, 0, 1);
    else if (parts > 1)
        parallel->run(parallel->pool, task, argument, (int)parts);
}

uint32_t mla_expanded_group(size_t row_floats) {
    const size_t accumulators_bytes = 32u << 20;
    size_t rows = accumulators_bytes / (sizeof(float) * (row_floats + 1));
    return rows < 16 ? 16 : rows > BATCH_ROWS_MAX ? BATCH_ROWS_MAX : (uint32_t)rows;
}
