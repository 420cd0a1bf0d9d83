/* Embedding: the table's rows of the given tokens, as FP32. */
#include "kernels/cuda/elementwise.cuh"

static __global__ void embed_kernel(const bf16 *table, size_t table_stride, uint32_t vocabulary,
                                    const uint32_t *token, uint32_t rows, uint32_t n, float *ret,
                                    size_t ret_stride) {
    const uint32_t i = element_index();
    if (i >= n)
        return;
    ROW_LOOP(r, rows) {
        const uint32_t t = token[r];
        ret[r * ret_stride + i] = t < vocabulary ? widen_bf16(table[t * table_stride + i]) : 0.0f;
    }
}

int embed_cuda(void *stream, const bf16 *table, size_t table_stride, uint32_t vocabulary,
               const uint32_t *token, uint32_t rows, uint32_t n, float *ret, size_t ret_stride) {
    if (rows == 0 || n == 0)
        return 0;
    LAUNCH(embed_kernel, element_grid(rows, n), ELEMENT_THREADS, 0, stream, table, table_stride,
           vocabulary, token, rows, n, ret, ret_stride);
    return launch_result();
}
