/* RMSNorm, and with the residual addition before it: one block for each row. The row is read once
 * and stays in shared memory; the mean is sum_canonical's, by 16 lanes of the first warp. */
#include "kernels/cuda/numerics.cuh"

enum { THREADS = 256 };

static __device__ float rms_mean_factor(const float *square, uint32_t n, float eps, float *shared) {
    if (threadIdx.x < WARP) {
        const float sum = device_sum(square, n);
        if (threadIdx.x == 0)
            *shared = device_rsqrt(sum / (float)n + eps);
    }
    __syncthreads();
    return *shared;
}

/* y NULL: the norm alone; else x[r] += y[r] first. */
static __global__ void rms_norm_kernel(const float *x, size_t x_stride, float *x_out,
                                       const float *y, size_t y_stride, const float *weight,
                                       float eps, uint32_t n, uint32_t padded, bf16 *ret,
                                       size_t ret_stride) {
    DYNAMIC_SHARED(memory);
    float *row = (float *)memory;  /* [n] */
    float *square = row + n;       /* [n] */
    float *factor_at = square + n; /* [1] */
    const size_t r = blockIdx.x;
    for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
        float value = x[r * x_stride + i];
        if (y != NULL) {
            value = value + y[r * y_stride + i];
            x_out[r * x_stride + i] = value;
        }
        row[i] = value;
        square[i] = value * value;
    }
    __syncthreads();
    const float factor = rms_mean_factor(square, n, eps, factor_at);
    for (uint32_t i = threadIdx.x; i < padded; i += blockDim.x)
        ret[r * ret_stride + i] = i < n ? round_bf16(row[i] * factor * weight[i]) : (bf16)0;
}

static int launch(void *stream, const float *x, size_t x_stride, float *x_out, const float *y,
                  size_t y_stride, const float *weight, float eps, uint32_t rows, uint32_t n,
                  bf16 *ret, size_t ret_stride) {
    if (rows == 0)
        return 0;
    const size_t shared = (2 * (size_t)n + 1) * sizeof(float);
    const int error = shared_allow(rms_norm_kernel, shared);
    if (error != 0)
        return error;
    LAUNCH(rms_norm_kernel, rows, THREADS, shared, stream, x, x_stride, x_out, y, y_stride, weight,
           eps, n, (n + 31) / 32 * 32, ret, ret_stride);
    return launch_result();
}

int rms_norm_cuda(void *stream, const float *x, size_t x_stride, const float *weight, float eps,
                  uint32_t rows, uint32_t n, bf16 *ret, size_t ret_stride) {
    return launch(stream, x, x_stride, NULL, NULL, 0, weight, eps, rows, n, ret, ret_stride);
}

int add_rms_norm_cuda(void *stream, float *x, size_t x_stride, const float *y, size_t y_stride,
                      const float *weight, float eps, uint32_t rows, uint32_t n, bf16 *ret,
                      size_t ret_stride) {
    return launch(stream, x, x_stride, x, y, y_stride, weight, eps, rows, n, ret, ret_stride);
}
