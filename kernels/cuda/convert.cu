/* FP32 to BF16 activations and back: convert and widen. */
#include "kernels/cuda/elementwise.cuh"

static __global__ void convert_kernel(const float *x, size_t x_stride, uint32_t rows, uint32_t n,
                                      uint32_t padded, bf16 *ret, size_t ret_stride) {
    const uint32_t i = element_index();
    if (i >= padded)
        return;
    ROW_LOOP(r, rows)
    ret[r * ret_stride + i] = i < n ? round_bf16(x[r * x_stride + i]) : (bf16)0;
}

static __global__ void widen_kernel(const bf16 *x, size_t x_stride, uint32_t rows, uint32_t n,
                                    float *ret, size_t ret_stride) {
    const uint32_t i = element_index();
    if (i >= n)
        return;
    ROW_LOOP(r, rows)
    ret[r * ret_stride + i] = widen_bf16(x[r * x_stride + i]);
}

int convert_cuda(void *stream, const float *x, size_t x_stride, uint32_t rows, uint32_t n,
                 bf16 *ret, size_t ret_stride) {
    const uint32_t padded = (n + 31) / 32 * 32;
    if (rows == 0 || n == 0)
        return 0;
    LAUNCH(convert_kernel, element_grid(rows, padded), ELEMENT_THREADS, 0, stream, x, x_stride,
           rows, n, padded, ret, ret_stride);
    return launch_result();
}

int widen_cuda(void *stream, const bf16 *x, size_t x_stride, uint32_t rows, uint32_t n, float *ret,
               size_t ret_stride) {
    if (rows == 0 || n == 0)
        return 0;
    LAUNCH(widen_kernel, element_grid(rows, n), ELEMENT_THREADS, 0, stream, x, x_stride, rows, n,
           ret, ret_stride);
    return launch_result();
}
