/* The residual stream's addition. */
#include "kernels/cuda/elementwise.cuh"

static __global__ void add_kernel(float *x, size_t x_stride, const float *y, size_t y_stride,
                                  uint32_t rows, uint32_t n) {
    const uint32_t i = element_index();
    if (i >= n)
        return;
    ROW_LOOP(r, rows)
    x[r * x_stride + i] = x[r * x_stride + i] + y[r * y_stride + i];
}

int add_cuda(void *stream, float *x, size_t x_stride, const float *y, size_t y_stride,
             uint32_t rows, uint32_t n) {
    if (rows == 0 || n == 0)
        return 0;
    LAUNCH(add_kernel, element_grid(rows, n), ELEMENT_THREADS, 0, stream, x, x_stride, y, y_stride,
           rows, n);
    return launch_result();
}
