/* What kernels/cuda/ptx.cuh wraps, in the emulator. Copies and products are asynchronous here too:
 * they happen at some time between their start and the wait that the program makes for them. */
#ifndef TROUPE_CUDA_EMULATOR_PTX_H
#define TROUPE_CUDA_EMULATOR_PTX_H

#include "tests/support/cuda_emulator.h"

struct alignas(64) CUtensorMap {
    const uint8_t *base;
    uint64_t inner_bytes, rows, row_bytes;
    uint32_t box_bytes, box_rows; /* box_bytes: 128, swizzled */
    uint32_t element_bytes;
};

/* An address as descriptors have it: an offset into shared memory. */
static inline uint32_t shared_address(const void *memory) {
    return (uint32_t)((const uint8_t *)memory - emulated_shared());
}

void mbarrier_init(uint64_t *barrier, uint32_t arrivals);
static inline void mbarrier_init_fence(void) {
}
void mbarrier_arrive(uint64_t *barrier);
void mbarrier_expect(uint64_t *barrier, uint32_t bytes);
void mbarrier_wait(uint64_t *barrier, uint32_t parity);

void tma_load(void *shared, const CUtensorMap *map, uint64_t *barrier, uint32_t x, uint32_t y);
static inline void tma_prefetch(const CUtensorMap *) {
}
static inline void async_fence(void) {
}
uint32_t widen_e4m3_pair(uint16_t two, float scale);

template <uint32_t N> static inline void registers_more(void) {
}
template <uint32_t N> static inline void registers_less(void) {
}
static inline void named_barrier(uint32_t id, uint32_t threads) {
    emulated_barrier(id, threads);
}

static inline void wgmma_fence(void) {
}
void wgmma_commit(void);
void emulated_wgmma_wait(unsigned left);
template <uint32_t N> static inline void wgmma_wait(void) {
    emulated_wgmma_wait(N);
}

/* a: 4 registers, or NULL for a descriptor in a_tile. */
struct emulated_product {
    float *d;
    unsigned n, k;
    bool e4m3, transposed, accumulate, a_in_registers;
    uint64_t a_tile, b_tile;
    uint32_t a[4];
};
void emulated_wgmma(const emulated_product &product);

static inline void wgmma_e4m3_n128(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
    emulated_wgmma({d, 128, 32, true, false, accumulate, false, a, b, {}});
}
static inline void wgmma_bf16_n128(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
    emulated_wgmma({d, 128, 16, false, false, accumulate, false, a, b, {}});
}
static inline void wgmma_bf16_n64(float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
    emulated_wgmma({d, 64, 16, false, false, accumulate, false, a, b, {}});
}
static inline void wgmma_bf16_n256_transposed(float (&d)[128], const uint32_t (&a)[4], uint64_t b,
                                              bool accumulate) {
    emulated_wgmma({d, 256, 16, false, true, accumulate, true, 0, b, {a[0], a[1], a[2], a[3]}});
}
static inline void wgmma_bf16_n64_transposed(float (&d)[32], const uint32_t (&a)[4], uint64_t b,
                                             bool accumulate) {
    emulated_wgmma({d, 64, 16, false, true, accumulate, true, 0, b, {a[0], a[1], a[2], a[3]}});
}
static inline void wgmma_bf16_n128_transposed(float (&d)[64], const uint32_t (&a)[4], uint64_t b,
                                              bool accumulate) {
    emulated_wgmma({d, 128, 16, false, true, accumulate, true, 0, b, {a[0], a[1], a[2], a[3]}});
}

#endif
