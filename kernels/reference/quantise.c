/* Activations of the fp8 profile: E4M3 with a scale for each row and segment of K (128 channels
 * wherever the weights' scale blocks are), as DeepSeek-V3 trains and serves (2412.19437, section
 * 3.3.2). The values are kept as BF16, which holds every E4M3 value exactly, so that the products
 * of the bf16 profile multiply them exactly. */
#include "kernels/internal.h"
#include "kernels/rows.h"

static float group_scale(const bf16 *x, uint32_t count) {
    const float most = largest_magnitude(x, count);
    return (most > QUANTISE_LEAST ? most : QUANTISE_LEAST) / 448.0f;
}

void quantise_scalar(const struct matrix *w, const bf16 *x, size_t x_stride, uint32_t rows,
                     bf16 *ret, size_t ret_stride, float *ret_scale) {
    for (uint32_t r = 0; r < rows; r++, x += x_stride, ret += ret_stride)
        for (uint32_t s = 0; s < w->segments; s++) {
            const uint32_t begin = w->segment_k[s], end = w->segment_k[s + 1];
            const float scale = group_scale(x + begin, end - begin);
            for (uint32_t k = begin; k < end; k++)
                ret[k] = e4m3_to_bf16(e4m3_from_float(widen_bf16(x[k]) / scale));
            *ret_scale++ = scale;
        }
}

void row_to_e4m3_scalar(const void *row, uint32_t n, uint8_t *ret) {
    const bf16 *x = row;
    float *ret_scale = (float *)(void *)(ret + e4m3_row_scales_at(n));
    memset(ret + n, 0, e4m3_row_scales_at(n) - n);
    for (uint32_t first = 0; first < n; first += E4M3_ROW_GROUP) {
        const uint32_t end = n - first < E4M3_ROW_GROUP ? n : first + E4M3_ROW_GROUP;
        const float scale = group_scale(x + first, end - first);
        for (uint32_t k = first; k < end; k++)
            ret[k] = e4m3_from_float(widen_bf16(x[k]) / scale);
        *ret_scale++ = scale;
    }
}

void e4m3_widen_scalar(const uint8_t *x, uint32_t n, bf16 *ret) {
    for (uint32_t k = 0; k < n; k++)
        ret[k] = e4m3_to_bf16(x[k]);
}
