/* silu(gate) * up, rounded to BF16: between the two products of a feed-forward network. Grouped:
 * only the rows that count. */
#include "kernels/cuda/elementwise.cuh"

static __global__ void silu_mul_kernel(const float *gate, const float *up, size_t stride,
                                       const uint32_t *count, uint32_t rows, uint32_t n,
                                       uint32_t padded, bf16 *ret, size_t ret_stride) {
    const uint32_t i = element_index();
    if (i >= padded)
        return;
    const uint32_t there = count != NULL ? count[blockIdx.z] : rows;
    gate += (size_t)blockIdx.z * rows * stride;
    up += (size_t)blockIdx.z * rows * stride;
    ret += (size_t)blockIdx.z * rows * ret_stride;
    ROW_LOOP(r, there) {
        bf16 value = 0;
        if (i < n) {
            const float g = gate[r * stride + i];
            value = round_bf16(g * device_sigmoid(g) * up[r * stride + i]);
        }
        ret[r * ret_stride + i] = value;
    }
}

static int launch(void *stream, const float *gate, const float *up, size_t stride,
                  const uint32_t *count, uint32_t groups, uint32_t rows, uint32_t n, bf16 *ret,
                  size_t ret_stride) {
    const uint32_t padded = (n + 31) / 32 * 32;
    if (rows == 0 || n == 0 || groups == 0)
        return 0;
    dim3 grid = element_grid(rows, padded);
    grid.z = groups;
    LAUNCH(silu_mul_kernel, grid, ELEMENT_THREADS, 0, stream, gate, up, stride, count, rows, n,
           padded, ret, ret_stride);
    return launch_result();
}

int silu_mul_cuda(void *stream, const float *gate, const float *up, size_t stride, uint32_t rows,
                  uint32_t n, bf16 *ret, size_t ret_stride) {
    return launch(stream, gate, up, stride, NULL, 1, rows, n, ret, ret_stride);
}

int silu_mul_grouped_cuda(void *stream, const float *gate, const float *up, size_t stride,
                          const uint32_t *count, uint32_t groups, uint32_t capacity, uint32_t n,
                          bf16 *ret, size_t ret_stride) {
    return launch(stream, gate, up, stride, count, groups, capacity, n, ret, ret_stride);
}
