/* One thread for each element of a matrix of rows; rows along y, so that no division is needed. */
#ifndef TROUPE_CUDA_ELEMENTWISE_CUH
#define TROUPE_CUDA_ELEMENTWISE_CUH

#include "kernels/cuda/numerics.cuh"

#define ELEMENT_THREADS 256u
/* More rows than a grid may have along y are walked by a loop: ROW_LOOP(r, rows). */
#define GRID_ROWS_MAX     65535u
#define ROW_LOOP(r, rows) for (size_t r = blockIdx.y; r < (rows); r += gridDim.y)

static inline dim3 element_grid(uint32_t rows, uint32_t n) {
    return dim3((n + ELEMENT_THREADS - 1) / ELEMENT_THREADS,
                rows < GRID_ROWS_MAX ? rows : GRID_ROWS_MAX);
}
DEVICE uint32_t element_index(void) {
    return blockIdx.x * ELEMENT_THREADS + threadIdx.x;
}

#endif
