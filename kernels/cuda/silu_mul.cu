/* silu(gate) * up, rounded to BF16: between the two products of a feed-forward network. */
#include "kernels/cuda/elementwise.cuh"

static __global__ void silu_mul_kernel(const float *gate, const float *up, size_t stride,
                                       uint32_t rows, uint32_t n, uint32_t padded, bf16 *ret,
                                       size_t ret_stride) {
    const uint32_t i = element_index();
    if (i >= padded)
        return;
    ROW_LOOP(r, rows) {
        bf16 value = 0;
        if (i < n) {
            const float g = gate[r * stride + i];
            value = round_bf16(g * device_sigmoid(g) * up[r * stride + i]);
        }
        ret[r * ret_stride + i] = value;
    }
}

int silu_mul_cuda(void *stream, const float *gate, const float *up, size_t stride, uint32_t rows,
                  uint32_t n, bf16 *ret, size_t ret_stride) {
    const uint32_t padded = (n + 31) / 32 * 32;
    if (rows == 0 || n == 0)
        return 0;
    LAUNCH(silu_mul_kernel, element_grid(rows, padded), ELEMENT_THREADS, 0, stream, gate, up,
           stride, rows, n, padded, ret, ret_stride);
    return launch_result();
}
