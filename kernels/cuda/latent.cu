/* The latent cache on the device: rows appended in either form, E4M3 rows read back for prompts.
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

/* One warp for each 128 channels, four a lane; the last groups of a row copy the rotated key. */
static __global__ void append_e4m3_kernel(const struct latent_append_cuda a, uint32_t rope_padded,
                                          uint32_t scale_at, uint32_t rope_at, size_t row_bytes) {
    const uint32_t lane = threadIdx.x % WARP;
    const uint32_t group = blockIdx.y * (THREADS / WARP) + threadIdx.x / WARP;
    const size_t r = blockIdx.x;
    const uint32_t at = a.position[r];
    const uint32_t page = a.pages[r * a.pages_stride + at / MLA_BLOCK];
    uint8_t *to = (uint8_t *)a.cache + ((size_t)page * MLA_BLOCK + at % MLA_BLOCK) * row_bytes;
    if (group * LATENT_GROUP >= scale_at) { /* as many more warps as the key takes */
        const uint32_t i = group * LATENT_GROUP - scale_at + lane * 4;
        bf16 *key = (bf16 *)(to + rope_at);
        for (uint32_t j = i; j < i + 4 && j < rope_padded; j++)
            key[j] = j < a.rope ? round_bf16(a.key[r * a.key_stride + j]) : (bf16)0;
        return;
    }
    float value[4], most = 0;
    for (int j = 0; j < 4; j++) {
        const uint32_t i = group * LATENT_GROUP + lane * 4 + j;
        value[j] = i < a.kv_lora ? widen_bf16(a.latent[r * a.latent_stride + i]) : 0.0f;
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
        *(float *)(to + scale_at + group * sizeof(float)) = scale;
    const uint32_t groups = scale_at / LATENT_GROUP, scales = (rope_at - scale_at) / 4;
    if (group == 0 && groups + lane < scales) /* the padding behind the scales */
        *(float *)(to + scale_at + (groups + lane) * sizeof(float)) = 0;
}

static __global__ void append_bf16_kernel(const struct latent_append_cuda a, uint32_t latent_padded,
                                          uint32_t width) {
    const uint32_t i = element_index();
    if (i >= width)
        return;
    ROW_LOOP(r, a.rows) {
        const uint32_t at = a.position[r];
        const uint32_t page = a.pages[r * a.pages_stride + at / MLA_BLOCK];
        bf16 *to = (bf16 *)a.cache + ((size_t)page * MLA_BLOCK + at % MLA_BLOCK) * width;
        bf16 element = 0;
        if (i < a.kv_lora)
            element = a.latent[r * a.latent_stride + i];
        else if (i >= latent_padded && i - latent_padded < a.rope)
            element = round_bf16(a.key[r * a.key_stride + i - latent_padded]);
        to[i] = element;
    }
}

int latent_append_cuda(void *stream, bool e4m3, const struct latent_append_cuda *args) {
    const struct latent_append_cuda a = *args;
    if (a.rows == 0)
        return 0;
    const uint32_t rope_padded = padded_32(a.rope);
    if (!e4m3) {
        const uint32_t latent_padded = padded_32(a.kv_lora), width = latent_padded + rope_padded;
        LAUNCH(append_bf16_kernel, element_grid(a.rows, width), ELEMENT_THREADS, 0, stream, a,
               latent_padded, width);
        return launch_result();
    }
    const uint32_t scale_at = latent_scale_at(a.kv_lora), rope_at = latent_rope_at(a.kv_lora);
    const uint32_t groups = (scale_at + rope_padded + LATENT_GROUP - 1) / LATENT_GROUP;
    const uint32_t at_once = THREADS / WARP;
    LAUNCH(append_e4m3_kernel, dim3(a.rows, (groups + at_once - 1) / at_once), THREADS, 0, stream,
           a, rope_padded, scale_at, rope_at, (size_t)latent_row_bytes(a.kv_lora, a.rope));
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
