/* The operations of a DeepSeek model on a GPU of compute capability 9.0 (Hopper), launched from C.
 * Names and meaning are those of kernels/ops.h, router/ and engine/; rows are independent of each
 * other in the same way.
 *
 * All pointers are device memory (in the emulated tests: host memory). `stream` is a cudaStream_t.
 * Every function only enqueues; it returns 0 or a CUDA error number (cuda_error_text() of the
 * host). Rows and items may be 0: nothing is launched then. Activations are BF16: rows lie `stride`
 * elements apart and producers write zeros up to activation_stride(n), as on the CPU.
 *
 * Bits: "same bits" below means the bits of the CPU's scalar form of the bf16 profile. "Own bits":
 * the sums are the tensor cores' or another fixed order; equal for equal rows whatever the batch,
 * not equal to the CPU's. */
#ifndef TROUPE_CUDA_OPS_H
#define TROUPE_CUDA_OPS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/numerics.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Rows: same bits ---- */

/* ret[r] = BF16(x[r] * rsqrt(mean(x[r]^2) + eps) * weight). x: [rows, x_stride], ret: [rows,
 * ret_stride]. n at most CUDA_ROW_MAX. */
int rms_norm_cuda(void *stream, const float *x, size_t x_stride, const float *weight, float eps,
                  uint32_t rows, uint32_t n, bf16 *ret, size_t ret_stride);
/* x[r] += y[r], then the norm of the sum as above: the two steps between attention and gate in one
 * pass. */
int add_rms_norm_cuda(void *stream, float *x, size_t x_stride, const float *y, size_t y_stride,
                      const float *weight, float eps, uint32_t rows, uint32_t n, bf16 *ret,
                      size_t ret_stride);
int convert_cuda(void *stream, const float *x, size_t x_stride, uint32_t rows, uint32_t n,
                 bf16 *ret, size_t ret_stride);
int silu_mul_cuda(void *stream, const float *gate, const float *up, size_t stride, uint32_t rows,
                  uint32_t n, bf16 *ret, size_t ret_stride);
int add_cuda(void *stream, float *x, size_t x_stride, const float *y, size_t y_stride,
             uint32_t rows, uint32_t n);
int widen_cuda(void *stream, const bf16 *x, size_t x_stride, uint32_t rows, uint32_t n, float *ret,
               size_t ret_stride);
/* ret[r] = float(table[token[r]]): embedding. table: [vocabulary, table_stride]. A token that is
 * not below `vocabulary` gives zeros. */
int embed_cuda(void *stream, const bf16 *table, size_t table_stride, uint32_t vocabulary,
               const uint32_t *token, uint32_t rows, uint32_t n, float *ret, size_t ret_stride);
/* Rotates pairs (2i, 2i+1) of `heads` vectors of each row, `head_stride` floats apart, by the
 * angles of the row's position. cos_sin: [positions, rope/2, 2] from rope_table() (YaRN included).
 * x: [rows, x_stride]. */
int rope_cuda(void *stream, float *x, size_t x_stride, size_t head_stride, uint32_t heads,
              uint32_t rope, const uint32_t *position, const float *cos_sin, uint32_t rows);
#define CUDA_ROW_MAX 16384 /* floats of one row that lie in shared memory */

#ifdef __cplusplus
}
#endif

#endif
