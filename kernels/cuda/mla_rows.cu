/* Rows before the absorbed form of attention: latents and rotated keys into the paged cache, and
 * queries cut into the part that w_uk takes and the part that is rotated. Same bits as the steps of
 * engine/attention_mla.c, where each is an operation of its own. */
#include "kernels/cuda/elementwise.cuh"

enum { STORE_THREADS = 256 };

DEVICE void rotate_pair(const float *from, const float *angle, float (&to)[2]) {
    const float first = from[0], second = from[1], c = angle[0], s = angle[1];
    to[0] = first * c - second * s;
    to[1] = first * s + second * c;
}

/* One block for each row. */
static __global__ void mla_store_kernel(const mla_rows_cuda args, const float *kv, size_t kv_stride,
                                        const float *weight, float eps, bf16 *cache) {
    DYNAMIC_SHARED(memory);
    float *square = (float *)memory; /* [kv_lora] */
    float *factor_at = square + args.kv_lora;
    const size_t r = blockIdx.x;
    const uint32_t position = args.position[r], n = args.kv_lora;
    const uint32_t page = args.pages[r * args.pages_stride + position / 64];
    const float *latent = kv + r * kv_stride, *key = latent + n;
    bf16 *to = cache + ((size_t)page * 64 + position % 64) * args.cache_stride;
    for (uint32_t i = threadIdx.x; i < n; i += STORE_THREADS)
        square[i] = latent[i] * latent[i];
    __syncthreads();
    if (threadIdx.x < WARP) {
        const float sum = device_sum(square, n);
        if (threadIdx.x == 0)
            *factor_at = device_rsqrt(sum / (float)n + eps);
    }
    __syncthreads();
    const float factor = *factor_at;
    const uint32_t wide = (n + 31) / 32 * 32;
    for (uint32_t i = threadIdx.x; i < wide; i += STORE_THREADS)
        to[i] = i < n ? round_bf16(latent[i] * factor * weight[i]) : (bf16)0;
    const uint32_t pairs = args.rope / 2, pairs_wide = (args.rope + 31) / 32 * 16;
    for (uint32_t p = threadIdx.x; p < pairs_wide; p += STORE_THREADS) {
        float rotated[2] = {0, 0};
        if (p < pairs)
            rotate_pair(key + 2 * p, args.cos_sin + ((size_t)position * pairs + p) * 2, rotated);
        to[wide + 2 * p] = p < pairs ? round_bf16(rotated[0]) : (bf16)0;
        to[wide + 2 * p + 1] = p < pairs ? round_bf16(rotated[1]) : (bf16)0;
    }
}

int mla_store_cuda(void *stream, const struct mla_rows_cuda *parameters, const float *kv,
                   size_t kv_stride, const float *weight, float eps, uint32_t rows, bf16 *cache) {
    if (rows == 0)
        return 0;
    const mla_rows_cuda args = *parameters;
    const size_t shared = ((size_t)args.kv_lora + 1) * sizeof(float);
    LAUNCH(mla_store_kernel, rows, STORE_THREADS, shared, stream, args, kv, kv_stride, weight, eps,
           cache);
    return launch_result();
}

/* A thread for each element of a head's two parts, padded. */
static __global__ void mla_query_kernel(const mla_rows_cuda args, const float *q, size_t q_stride,
                                        uint32_t rows, bf16 *ret_nope, size_t nope_stride,
                                        bf16 *ret_rope, size_t rope_stride) {
    const uint32_t nope_wide = (args.nope + 31) / 32 * 32, rope_wide = (args.rope + 31) / 32 * 32;
    const uint32_t i = element_index(), width = nope_wide + rope_wide, head = i / width;
    const uint32_t at = i % width;
    if (head >= args.heads)
        return;
    ROW_LOOP(r, rows) {
        const float *from = q + r * q_stride + (size_t)head * (args.nope + args.rope);
        if (at < nope_wide) {
            ret_nope[(r * args.heads + head) * nope_stride + at] =
                at < args.nope ? round_bf16(from[at]) : (bf16)0;
            continue;
        }
        const uint32_t j = at - nope_wide;
        bf16 value = 0;
        if (j < args.rope) {
            float rotated[2];
            rotate_pair(from + args.nope + j / 2 * 2,
                        args.cos_sin + ((size_t)args.position[r] * (args.rope / 2) + j / 2) * 2,
                        rotated);
            value = round_bf16(rotated[j % 2]);
        }
        ret_rope[(r * args.heads + head) * rope_stride + j] = value;
    }
}

int mla_query_cuda(void *stream, const struct mla_rows_cuda *parameters, const float *q,
                   size_t q_stride, uint32_t rows, bf16 *ret_nope, size_t nope_stride,
                   bf16 *ret_rope, size_t rope_stride) {
    const mla_rows_cuda args = *parameters;
    const uint32_t width = (args.nope + 31) / 32 * 32 + (args.rope + 31) / 32 * 32;
    if (rows == 0 || args.heads == 0)
        return 0;
    LAUNCH(mla_query_kernel, element_grid(rows, args.heads * width), ELEMENT_THREADS, 0, stream,
           args, q, q_stride, rows, ret_nope, nope_stride, ret_rope, rope_stride);
    return launch_result();
}
