/* Activations to FP8 (E4M3): a scale for each token and 128 channels. One warp for each group. */
#include "kernels/cuda/quantise.cuh"

enum { THREADS = 128, GROUP = E4M3_ROW_GROUP };

static __device__ float activation(const float *x) {
    return *x;
}
static __device__ float activation(const bf16 *x) {
    return widen_bf16(*x);
}

/* count NULL: all rows; else of each `capacity` rows the first count[]. */
template <typename T>
static __global__ void quantise_kernel(const T *x, size_t x_stride, const uint32_t *count,
                                       uint32_t capacity, uint32_t n, uint8_t *ret,
                                       size_t ret_stride, float *ret_scale, size_t scale_row_step,
                                       size_t scale_group_step) {
    const uint32_t lane = threadIdx.x % WARP;
    const uint32_t group = blockIdx.y * (THREADS / WARP) + threadIdx.x / WARP;
    const size_t r = blockIdx.x;
    if (group * GROUP >= n || (count != NULL && r % capacity >= count[r / capacity]))
        return;
    float value[4], scale;
    for (int j = 0; j < 4; j++) {
        const uint32_t i = group * GROUP + lane * 4 + j;
        value[j] = i < n ? activation(x + r * x_stride + i) : 0.0f;
    }
    const uint32_t packed = quantise_group(value, scale);
    *(uint32_t *)(ret + r * ret_stride + group * GROUP + lane * 4) = packed;
    if (lane == 0)
        ret_scale[r * scale_row_step + group * scale_group_step] = scale;
}

/* ret rows hold whole groups: ret_stride at least n rounded up to 128, zeros beyond n. */
template <typename T>
static int launch(void *stream, const T *x, size_t x_stride, const uint32_t *count,
                  uint32_t capacity, uint32_t rows, uint32_t n, uint8_t *ret, size_t ret_stride,
                  float *ret_scale, size_t scale_row_step, size_t scale_group_step) {
    if (rows == 0 || n == 0)
        return 0;
    const uint32_t groups = (n + GROUP - 1) / GROUP, at_once = THREADS / WARP;
    auto *kernel = quantise_kernel<T>;
    LAUNCH(kernel, dim3(rows, (groups + at_once - 1) / at_once), THREADS, 0, stream, x, x_stride,
           count, capacity, n, ret, ret_stride, ret_scale, scale_row_step, scale_group_step);
    return launch_result();
}

int quantise_f32_cuda(void *stream, const float *x, size_t x_stride, uint32_t rows, uint32_t n,
                      uint8_t *ret, size_t ret_stride, float *ret_scale, size_t scale_row_step,
                      size_t scale_group_step) {
    return launch(stream, x, x_stride, NULL, 1, rows, n, ret, ret_stride, ret_scale, scale_row_step,
                  scale_group_step);
}

int quantise_bf16_cuda(void *stream, const bf16 *x, size_t x_stride, uint32_t rows, uint32_t n,
                       uint8_t *ret, size_t ret_stride, float *ret_scale, size_t scale_row_step,
                       size_t scale_group_step) {
    return launch(stream, x, x_stride, NULL, 1, rows, n, ret, ret_stride, ret_scale, scale_row_step,
                  scale_group_step);
}

int quantise_grouped_cuda(void *stream, const bf16 *x, size_t x_stride, const uint32_t *count,
                          uint32_t groups, uint32_t capacity, uint32_t n, uint8_t *ret,
                          size_t ret_stride, float *ret_scale, size_t scale_row_step,
                          size_t scale_group_step) {
    return launch(stream, x, x_stride, count, capacity, groups * capacity, n, ret, ret_stride,
                  ret_scale, scale_row_step, scale_group_step);
}
