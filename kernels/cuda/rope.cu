/* Rotary position embedding: pairs (2i, 2i+1) of each head's rotated part. */
#include "kernels/cuda/elementwise.cuh"

static __global__ void rope_kernel(float *x, size_t x_stride, size_t head_stride, uint32_t heads,
                                   uint32_t pairs, const uint32_t *position, const float *cos_sin,
                                   uint32_t rows) {
    const uint32_t i = element_index();
    if (i >= heads * pairs)
        return;
    const uint32_t head = i / pairs, p = i % pairs;
    ROW_LOOP(r, rows) {
        const float *angle = cos_sin + ((size_t)position[r] * pairs + p) * 2;
        float *pair = x + r * x_stride + head * head_stride + 2 * p;
        const float first = pair[0], second = pair[1], c = angle[0], s = angle[1];
        pair[0] = first * c - second * s;
        pair[1] = first * s + second * c;
    }
}

int rope_cuda(void *stream, float *x, size_t x_stride, size_t head_stride, uint32_t heads,
              uint32_t rope, const uint32_t *position, const float *cos_sin, uint32_t rows) {
    const uint32_t pairs = rope / 2;
    if (rows == 0 || heads == 0 || pairs == 0)
        return 0;
    LAUNCH(rope_kernel, element_grid(rows, heads * pairs), ELEMENT_THREADS, 0, stream, x, x_stride,
           head_stride, heads, pairs, position, cos_sin, rows);
    return launch_result();
}
