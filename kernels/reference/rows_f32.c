/* Operations on rows in the f32 profile, in plain C: the documentation of the model between its
 * matrix products. Activations are floats here. add and rope work on floats in every profile. */
#include "kernels/rows.h"

/* Producers of activations write the zeros up to the next multiple of 32. */
static void pad(float *row, uint32_t n) {
    for (size_t i = n; i < activation_stride(n); i++)
        row[i] = 0;
}

float rms_factor(const float *x, uint32_t n, float eps) {
    float partial[16] = {0};
    for (uint32_t i = 0; i < n; i++)
        partial[i % 16] += x[i] * x[i];
    return rsqrt_canonical(sum_tree(partial) / (float)n + eps);
}

void rms_norm_f32(const float *x, size_t x_stride, const float *weight, float eps, uint32_t rows,
                  uint32_t n, void *ret, size_t ret_stride) {
    for (uint32_t r = 0; r < rows; r++) {
        const float *from = x + r * x_stride;
        float *to = (float *)ret + r * ret_stride;
        float factor = rms_factor(from, n, eps);
        for (uint32_t i = 0; i < n; i++)
            to[i] = from[i] * factor * weight[i];
        pad(to, n);
    }
}

void convert_f32(const float *x, size_t x_stride, uint32_t rows, uint32_t n, void *ret,
                 size_t ret_stride) {
    for (uint32_t r = 0; r < rows; r++) {
        float *to = (float *)ret + r * ret_stride;
        memcpy(to, x + r * x_stride, n * sizeof(float));
        pad(to, n);
    }
}

void silu_mul_f32(const float *gate, const float *up, size_t stride, uint32_t rows, uint32_t n,
                  void *ret, size_t ret_stride) {
    for (uint32_t r = 0; r < rows; r++) {
        const float *g = gate + r * stride, *u = up + r * stride;
        float *to = (float *)ret + r * ret_stride;
        for (uint32_t i = 0; i < n; i++)
            to[i] = g[i] * sigmoid_canonical(g[i]) * u[i];
        pad(to, n);
    }
}

void widen_f32(const void *x, size_t x_stride, uint32_t rows, uint32_t n, float *ret,
               size_t ret_stride) {
    for (uint32_t r = 0; r < rows; r++)
        memcpy(ret + r * ret_stride, (const float *)x + r * x_stride, n * sizeof(float));
}

void add_scalar(float *x, size_t x_stride, const float *y, size_t y_stride, uint32_t rows,
                uint32_t n) {
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t i = 0; i < n; i++)
            x[r * x_stride + i] += y[r * y_stride + i];
}

void rope_scalar(float *x, size_t stride, uint32_t count, uint32_t rope, const float *cos_sin) {
    for (uint32_t v = 0; v < count; v++) {
        for (uint32_t i = 0; i < rope; i += 2) {
            float *pair = x + v * stride + i;
            float first = pair[0], second = pair[1], c = cos_sin[i], s = cos_sin[i + 1];
            pair[0] = first * c - second * s;
            pair[1] = first * s + second * c;
        }
    }
}
