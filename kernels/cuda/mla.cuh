/* What both forms of multi-head latent attention share: 64 queries of a warpgroup against a block
 * of 64 positions, and the online softmax between the two products. Own bits: sums inside a product
 * are the tensor cores'; everything else is fixed, so a query's result depends on its own position
 * and the cache only.
 *
 * Thread t of the warpgroup has query rows t/32 * 16 + t%32 / 4 (first) and that + 8 (second); of
 * the scores of a block columns 8j + t%4 * 2 and the next, j = 0..7. The four threads of a row
 * share its maximum and its sum by two shuffles each, always in the same order. */
#ifndef TROUPE_CUDA_MLA_CUH
#define TROUPE_CUDA_MLA_CUH

#include "kernels/cuda/numerics.cuh"
#include "kernels/cuda/tensor_map.cuh"

#define MLA_BLOCK     64u                          /* PAGE_TOKENS */
#define MLA_ROWS      64u                          /* queries of a warpgroup */
#define CHUNK         64u                          /* BF16 elements in 128 bytes */
#define CHUNK_BYTES   (MLA_BLOCK * TILE_ROW_BYTES) /* 64 rows of one chunk: 8 KiB */
#define GROUP_THREADS 128u

struct softmax_rows {
    float maximum[2], sum[2];
};

DEVICE void softmax_begin(softmax_rows &self) {
    self.maximum[0] = self.maximum[1] = -INFINITY;
    self.sum[0] = self.sum[1] = 0;
}

/* Scores (raw dot products) of a block to probabilities in BF16, as the first operand of the second
 * product wants them; returns in `factor` what the accumulated values are to be multiplied by.
 * visible[half]: positions of the block that the row sees, 64 and more: all, 0: none. */
DEVICE void softmax_block(softmax_rows &self, float (&score)[32], float scale,
                          const uint32_t (&visible)[2], uint32_t (&p)[16], float (&factor)[2]) {
    const uint32_t column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float maximum = self.maximum[half];
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
                float &s = score[4 * j + 2 * half + c];
                s = column + 8 * j + c < visible[half] ? s * scale : -INFINITY;
                maximum = s > maximum ? s : maximum;
            }
        for (int bit = 1; bit < 4; bit *= 2) {
            const float other = __shfl_xor_sync(0xffffffff, maximum, bit);
            maximum = other > maximum ? other : maximum;
        }
        float sum = 0;
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
                float &s = score[4 * j + 2 * half + c];
                s = device_exp(s - maximum);
                sum = sum + s;
            }
        /* Both threads of a pair add the same two numbers; addition commutes. */
        for (int bit = 1; bit < 4; bit *= 2)
            sum = sum + __shfl_xor_sync(0xffffffff, sum, bit);
        factor[half] = device_exp(self.maximum[half] - maximum);
        self.sum[half] = __fmaf_rn(self.sum[half], factor[half], sum);
        self.maximum[half] = maximum;
    }
#pragma unroll
    for (int i = 0; i < 16; i++) /* register i of the scores' pairs: rows alternate */
        p[i] = round_bf16_pair(score[2 * i], score[2 * i + 1]);
}

/* scores (64 x 64) = q k^T over KC chunks of 64. q, k: addresses of the first chunk's tile. */
template <int KC> DEVICE void mla_scores(float (&score)[32], uint32_t q, uint32_t k) {
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < KC; c++)
#pragma unroll
        for (int step = 0; step < 4; step++)
            wgmma_bf16_n64(score, tile_descriptor(q + c * CHUNK_BYTES + step * 32, 16, 1024),
                           tile_descriptor(k + c * CHUNK_BYTES + step * 32, 16, 1024),
                           c > 0 || step > 0);
    wgmma_commit();
    wgmma_wait<0>();
}

/* How many registers VC chunks of values take, and the product that adds p (64 x 64) times values
 * (64 positions x 64 VC) to them. */
template <int VC> struct values;
template <> struct values<1> {
    enum { REGISTERS = 32 };
    static __device__ __forceinline__ void product(float (&d)[32], const uint32_t (&a)[4],
                                                   uint64_t b) {
        wgmma_bf16_n64_transposed(d, a, b, true);
    }
};
template <> struct values<2> {
    enum { REGISTERS = 64 };
    static __device__ __forceinline__ void product(float (&d)[64], const uint32_t (&a)[4],
                                                   uint64_t b) {
        wgmma_bf16_n128_transposed(d, a, b, true);
    }
};
template <> struct values<4> {
    enum { REGISTERS = 128 };
    static __device__ __forceinline__ void product(float (&d)[128], const uint32_t (&a)[4],
                                                   uint64_t b) {
        wgmma_bf16_n256_transposed(d, a, b, true);
    }
};

template <int VC>
DEVICE void mla_accumulate(float (&acc)[values<VC>::REGISTERS], const float (&factor)[2],
                           const uint32_t (&p)[16], uint32_t v) {
#pragma unroll
    for (int i = 0; i < values<VC>::REGISTERS; i++)
        acc[i] = acc[i] * factor[i / 2 % 2];
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; step++) { /* 16 positions each */
        const uint32_t a[4] = {p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3]};
        values<VC>::product(acc, a,
                            tile_descriptor(v + step * 16 * TILE_ROW_BYTES, CHUNK_BYTES, 1024));
    }
    wgmma_commit();
    wgmma_wait<0>();
}

#endif
