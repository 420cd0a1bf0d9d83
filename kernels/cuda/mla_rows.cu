/* Queries before attention, cut into the part that w_uk takes and the part that is rotated. Same
 * bits as the steps of engine/attention_mla.c, where each is an operation of its own. */
#include "kernels/cuda/elementwise.cuh"

DEVICE void rotate_pair(const float *from, const float *angle, float (&to)[2]) {
    const float first = from[0], second = from[1], c = angle[0], s = angle[1];
    to[0] = first * c - second * s;
    to[1] = first * s + second * c;
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
