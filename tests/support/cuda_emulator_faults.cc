/* Kernels with a fault in each that the emulator must show, and the same without it; for
 * tests/gpu/test_cuda_emulator.c. */
#include "kernels/cuda/tensor_map.cuh"

#include "tests/support/cuda_emulator_faults.h"

enum { THREADS = 128 };

/* Every thread gives its number to the next one. */
static __global__ void pass_kernel(bool with_barrier, uint32_t *ret) {
    DYNAMIC_SHARED(memory);
    uint32_t *at = (uint32_t *)memory;
    at[threadIdx.x] = threadIdx.x;
    if (with_barrier)
        __syncthreads();
    ret[threadIdx.x] = at[(threadIdx.x + 1) % THREADS];
}

void faulty_pass(bool with_barrier, uint32_t ret[128]) {
    LAUNCH(pass_kernel, 1, THREADS, THREADS * 4, NULL, with_barrier, ret);
}

/* One thread brings two tiles into the same place, one after the other; a warpgroup adds both
 * products. fault 1: does not wait for the product before the place is free; 2: does not wait for
 * the copy; 3: reads the result before the product is done. */
static __global__ void tiles_kernel(const CUtensorMap map, int fault, float *ret) {
    DYNAMIC_SHARED(memory);
    uint64_t *full = (uint64_t *)(memory + 128 * TILE_ROW_BYTES), *empty = full + 1;
    if (threadIdx.x == 0) {
        mbarrier_init(full, 1);
        mbarrier_init(empty, 4);
        mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x >= THREADS) {
        if (threadIdx.x == THREADS)
            for (uint32_t i = 0; i < 2; i++) {
                mbarrier_wait(empty, (i & 1) ^ 1);
                mbarrier_expect(full, 128 * TILE_ROW_BYTES);
                tma_load(memory, &map, full, i * 64, 0);
            }
        return;
    }
    float d[64], before[64];
    for (int i = 0; i < 64; i++)
        d[i] = before[i] = 0;
    const uint32_t tile = shared_address(memory);
    for (uint32_t i = 0; i < 2; i++) {
        if (fault != 2)
            mbarrier_wait(full, i & 1);
        wgmma_fence();
        for (uint32_t step = 0; step < 4; step++)
            wgmma_bf16_n128(d, tile_descriptor(tile + step * 32, 16, 1024),
                            tile_descriptor(tile + step * 32, 16, 1024), true);
        wgmma_commit();
        if (fault == 3)
            for (int j = 0; j < 64; j++)
                before[j] = d[j];
        if (fault != 1)
            wgmma_wait<0>();
        if (threadIdx.x % WARP == 0)
            mbarrier_arrive(empty);
    }
    wgmma_wait<0>();
    for (int j = 0; j < 64; j++)
        ret[threadIdx.x * 64 + j] = fault == 3 ? before[j] : d[j];
}

void faulty_tiles(int fault, const uint16_t *matrix, float *ret) {
    struct tensor_map_cuda room;
    if (tensor_map_make(&room, matrix, 128, 128, 2, 256, 128) != 0)
        return;
    const CUtensorMap map = tensor_map(room);
    LAUNCH(tiles_kernel, 1, 2 * THREADS, 128 * TILE_ROW_BYTES + 16, NULL, map, fault, ret);
}

static __global__ void stuck_kernel(uint32_t *ret) {
    if (threadIdx.x > 0)
        __syncthreads(); /* the first thread never comes */
    ret[threadIdx.x] = 1;
}
void faulty_barrier(uint32_t ret[128]) {
    LAUNCH(stuck_kernel, 1, THREADS, 0, NULL, ret);
}
