/* Operations on rows in the bf16 profile, scalar form: the f32 operations, and a rounding to BF16
 * at the end. */
#include "kernels/rows.h"

static void pad(bf16 *row, uint32_t n) {
    for (size_t i = n; i < activation_stride(n); i++)
        row[i] = 0;
}

void rms_norm_bf16_scalar(const float *x, size_t x_stride, const float *weight, float eps,
                          uint32_t rows, uint32_t n, void *ret, size_t ret_stride) {
    for (uint32_t r = 0; r < rows; r++) {
        const float *from = x + r * x_stride;
        bf16 *to = (bf16 *)ret + r * ret_stride;
        float factor = rms_factor(from, n, eps);
        for (uint32_t i = 0; i < n; i++)
            to[i] = round_bf16(from[i] * factor * weight[i]);
        pad(to, n);
    }
}

void convert_bf16_scalar(const float *x, size_t x_stride, uint32_t rows, uint32_t n, void *ret,
                         size_t ret_stride) {
    for (uint32_t r = 0; r < rows; r++) {
        bf16 *to = (bf16 *)ret + r * ret_stride;
        for (uint32_t i = 0; i < n; i++)
            to[i] = round_bf16(x[r * x_stride + i]);
        pad(to, n);
    }
}

void silu_mul_bf16_scalar(const float *gate, const float *up, size_t stride, uint32_t rows,
                          uint32_t n, void *ret, size_t ret_stride) {
    for (uint32_t r = 0; r < rows; r++) {
        const float *g = gate + r * stride, *u = up + r * stride;
        bf16 *to = (bf16 *)ret + r * ret_stride;
        for (uint32_t i = 0; i < n; i++)
            to[i] = round_bf16(g[i] * sigmoid_canonical(g[i]) * u[i]);
        pad(to, n);
    }
}

void widen_bf16_scalar(const void *x, size_t x_stride, uint32_t rows, uint32_t n, float *ret,
                       size_t ret_stride) {
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t i = 0; i < n; i++)
            ret[r * ret_stride + i] = widen_bf16(((const bf16 *)x)[r * x_stride + i]);
}
