/* Combine (router/combine.c): a row's expert outputs in the order of its own list, then the shared
 * expert, join the residual stream. Each element is its own chain. Same bits. */
#include "kernels/cuda/elementwise.cuh"

static __global__ void combine_kernel(uint32_t rows, uint32_t k, uint32_t hidden,
                                      const float *outputs, size_t stride, const uint32_t *place,
                                      const float *weights, const uint16_t *experts,
                                      const float *shared, size_t shared_stride, float *residual,
                                      size_t residual_stride) {
    const uint32_t i = element_index();
    if (i >= hidden)
        return;
    ROW_LOOP(r, rows) {
        float sum = 0.0f;
        for (uint32_t slot = 0; slot < k; slot++) {
            const size_t entry = r * k + slot;
            if (experts[entry] == 0xffff) /* GATE_UNUSED */
                continue;
            const size_t at = place != NULL ? place[entry] : entry;
            sum = __fmaf_rn(weights[entry], outputs[at * stride + i], sum);
        }
        if (shared != NULL)
            sum = sum + shared[r * shared_stride + i];
        residual[r * residual_stride + i] = residual[r * residual_stride + i] + sum;
    }
}

int combine_cuda(void *stream, uint32_t rows, uint32_t k, uint32_t hidden, const float *outputs,
                 size_t stride, const uint32_t *place, const float *weights,
                 const uint16_t *experts, const float *shared, size_t shared_stride,
                 float *residual, size_t residual_stride) {
    if (rows == 0 || hidden == 0)
        return 0;
    LAUNCH(combine_kernel, element_grid(rows, hidden), ELEMENT_THREADS, 0, stream, rows, k, hidden,
           outputs, stride, place, weights, experts, shared, shared_stride, residual,
           residual_stride);
    return launch_result();
}
