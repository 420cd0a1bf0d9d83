/* The latent cache on the device: rows appended in either form, normed and rotated on the way (the
 * bits are those of the steps of engine/attention_mla.c), E4M3 rows read back for prompts.
 * The E4M3 form is that of kernels/latent.h, operation by operation, so the bytes are the CPU's
 * (kernels/reference/latent.c). */
#include "kernels/cuda/elementwise.cuh"
#include "kernels/latent.h"

enum { THREADS = 128 };
#define MLA_BLOCK 64u /* PAGE_TOKENS */

static uint32_t padded_32(uint32_t n) {
    return (n + 31) / 32 * 32;
}

/* latent_scale() of kernels/reference/latent.c. */
DEVICE float scale_of(float most) {
    const uint32_t bits = float_bits(most);
    if (bits < LATENT_MOST_LEAST)
        return LATENT_SCALE_LEAST;
    const uint32_t exponent = (bits >> 23) - 8 + ((bits & 0x7fffff) > 0x600000);
    return float_from_bits((exponent < LATENT_EXPONENT_MAX ? exponent : LATENT_EXPONENT_MAX) << 23);
}

struct row_layout {
    uint32_t latent;            /* elements that the latent takes */
    uint32_t scale_at, rope_at; /* bytes */
    size_t row_bytes;
};

/* RMSNorm's factor of a row, for all threads; 1 where there is no norm. */
static __device__ float norm_factor(const struct latent_append_cuda &a, const float *latent) {
    DYNAMIC_SHARED(memory);
    float *square = (float *)memory; /* [kv_lora] */
    float *factor_at = square + a.kv_lora;
    if (a.norm == NULL)
        return 1;
    for (uint32_t i = threadIdx.x; i < a.kv_lora; i += THREADS)
        square[i] = latent[i] * latent[i];
    __syncthreads();
    if (threadIdx.x < WARP) {
        const float sum = device_sum(square, a.kv_lora);
        if (threadIdx.x == 0)
            *factor_at = device_rsqrt(sum / (float)a.kv_lora + a.eps);
    }
    __syncthreads();
    return *factor_at;
}

DEVICE bf16 element(const struct latent_append_cuda &a, const float *latent, float factor,
                    uint32_t i) {
    if (i >= a.kv_lora)
        return 0;
    return round_bf16(a.norm != NULL ? latent[i] * factor * a.norm[i] : latent[i]);
}

/* 128 channels by one warp, four a lane. */
static __device__ void append_group(const struct latent_append_cuda &a, const row_layout &layout,
                                    const float *latent, float factor, uint32_t group,
                                    uint8_t *to) {
    const uint32_t lane = threadIdx.x % WARP;
    float value[4], most = 0;
    for (int j = 0; j < 4; j++) {
        value[j] = widen_bf16(element(a, latent, factor, group * LATENT_GROUP + lane * 4 + j));
        const float magnitude = value[j] < 0 ? -value[j] : value[j];
        most = magnitude > most ? magnitude : most;
    }
    for (int bit = 16; bit > 0; bit /= 2) {
        const float other = __shfl_xor_sync(0xffffffff, most, bit);
        most = other > most ? other : most;
    }
    const float scale = scale_of(most);
    uint32_t packed = 0;
    for (int j = 0; j < 4; j++)
        packed |= (uint32_t)round_e4m3(value[j] / scale) << 8 * j;
    *(uint32_t *)(to + group * LATENT_GROUP + lane * 4) = packed;
    if (lane == 0)
        *(float *)(to + layout.scale_at + group * sizeof(float)) = scale;
}

static __device__ void append_key(const struct latent_append_cuda &a, const float *key,
                                  uint32_t position, bf16 *to) {
    const uint32_t pairs = a.rope / 2, pairs_wide = (a.rope + 31) / 32 * 16;
    for (uint32_t p = threadIdx.x; p < pairs_wide; p += THREADS) {
        float first = p < pairs ? key[2 * p] : 0, second = p < pairs ? key[2 * p + 1] : 0;
        if (a.cos_sin != NULL && p < pairs) {
            const float *angle = a.cos_sin + ((size_t)position * pairs + p) * 2;
            const float x = first, y = second, c = angle[0], s = angle[1];
            first = x * c - y * s;
            second = x * s + y * c;
        }
        to[2 * p] = round_bf16(first);
        to[2 * p + 1] = round_bf16(second);
    }
}

/* One block for each row. */
template <bool E4M3>
static __global__ void append_kernel(const struct latent_append_cuda a, const row_layout layout) {
    const size_t r = blockIdx.x;
    const uint32_t at = a.position[r];
    const uint32_t page = a.pages[r * a.pages_stride + at / MLA_BLOCK];
    const float *latent = a.latent + r * a.latent_stride;
    uint8_t *to =
        (uint8_t *)a.cache + ((size_t)page * MLA_BLOCK + at % MLA_BLOCK) * layout.row_bytes;
    const float factor = norm_factor(a, latent);
    if (E4M3) {
        const uint32_t groups = layout.latent / LATENT_GROUP,
                       scales = (layout.rope_at - layout.scale_at) / sizeof(float);
        for (uint32_t g = threadIdx.x / WARP; g < groups; g += THREADS / WARP)
            append_group(a, layout, latent, factor, g, to);
        for (uint32_t g = groups + threadIdx.x; g < scales; g += THREADS) /* padding behind them */
            *(float *)(to + layout.scale_at + g * sizeof(float)) = 0;
    } else {
        for (uint32_t i = threadIdx.x; i < layout.latent; i += THREADS)
            ((bf16 *)to)[i] = element(a, latent, factor, i);
    }
    append_key(a, a.key + r * a.key_stride, at, (bf16 *)(to + layout.rope_at));
}

int latent_append_cuda(void *stream, bool e4m3, const struct latent_append_cuda *args) {
    const struct latent_append_cuda a = *args;
    if (a.rows == 0)
        return 0;
    const size_t shared = a.norm != NULL ? ((size_t)a.kv_lora + 1) * sizeof(float) : 0;
    if (e4m3) {
        const row_layout layout = {latent_scale_at(a.kv_lora), latent_scale_at(a.kv_lora),
                                   latent_rope_at(a.kv_lora), latent_row_bytes(a.kv_lora, a.rope)};
        LAUNCH(append_kernel<true>, a.rows, THREADS, shared, stream, a, layout);
    } else {
        const uint32_t latent = padded_32(a.kv_lora), key_at = latent * (uint32_t)sizeof(bf16);
        const row_layout layout = {latent, 0, key_at, key_at + padded_32(a.rope) * sizeof(bf16)};
        LAUNCH(append_kernel<false>, a.rows, THREADS, shared, stream, a, layout);
    }
    return launch_result();
}

static __global__ void widen_kernel(const uint8_t *cache, size_t row_bytes, uint32_t scale_at,
                                    const uint32_t *pages, uint32_t positions, uint32_t n,
                                    uint32_t padded, bf16 *ret, size_t ret_stride) {
    const uint32_t i = element_index();
    if (i >= padded)
        return;
    ROW_LOOP(r, positions) {
        const uint8_t *from =
            cache + ((size_t)pages[r / MLA_BLOCK] * MLA_BLOCK + r % MLA_BLOCK) * row_bytes;
        const float *scale = (const float *)(from + scale_at);
        ret[r * ret_stride + i] =
            i < n ? round_bf16(widen_e4m3(from[i]) * scale[i / LATENT_GROUP]) : (bf16)0;
    }
}

int latent_widen_cuda(void *stream, const void *cache, uint32_t kv_lora, uint32_t rope,
                      const uint32_t *pages, uint32_t positions, bf16 *ret, size_t ret_stride) {
    if (positions == 0)
        return 0;
    LAUNCH(widen_kernel, element_grid(positions, padded_32(kv_lora)), ELEMENT_THREADS, 0, stream,
           (const uint8_t *)cache, (size_t)latent_row_bytes(kv_lora, rope),
           latent_scale_at(kv_lora), pages, positions, kv_lora, padded_32(kv_lora), ret,
           ret_stride);
    return launch_result();
}
