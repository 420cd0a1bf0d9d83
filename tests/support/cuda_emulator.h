/* A GPU for tests: runs the functions of kernels/cuda on the CPU, so that they can be compared with
 * the reference where there is no card. C++ only, included by kernels/cuda/device.cuh.
 *
 * One block runs at a time; each of its threads is a fiber that runs until it must wait (a barrier,
 * a shuffle, an asynchronous copy). Which fiber goes on is drawn from a seed, and so is when
 * asynchronous work (bulk copies, matrix products of a warpgroup) happens between its start and the
 * point where the program waits for it: a missing barrier or an early release shows as a wrong
 * result under some seed. Shared memory holds NaN patterns at the start of each block. A kernel in
 * which no thread can go on is reported as a deadlock.
 *
 * Streams, events and graphs: cuda_emulator_streams.cc.
 *
 * Not modelled: memory ordering between threads that touch global memory, banks, speed, register
 * limits, and the rounding inside the tensor cores (products of a step are added in double
 * precision, then rounded once). */
#ifndef TROUPE_CUDA_EMULATOR_H
#define TROUPE_CUDA_EMULATOR_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__    __attribute__((noinline))
#define __restrict__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {
    }
};
struct uint2 {
    uint32_t x, y;
};
struct uint4 {
    uint32_t x, y, z, w;
};
struct float2 {
    float x, y;
};
struct float4 {
    float x, y, z, w;
};
static inline uint2 make_uint2(uint32_t x, uint32_t y) {
    return uint2{x, y};
}
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
    return uint4{x, y, z, w};
}
static inline float2 make_float2(float x, float y) {
    return float2{x, y};
}
static inline float4 make_float4(float x, float y, float z, float w) {
    return float4{x, y, z, w};
}

/* ---- Threads ---- */

struct emulated_thread {
    dim3 index;
    unsigned linear; /* within the block */
};
extern emulated_thread *emulated_now; /* the thread that runs */
extern dim3 emulated_block_index, emulated_block_size, emulated_grid_size;
#define threadIdx (emulated_now->index)
#define blockIdx  emulated_block_index
#define blockDim  emulated_block_size
#define gridDim   emulated_grid_size

uint8_t *emulated_shared(void); /* the block's dynamic shared memory, 1024-byte aligned */
#define DYNAMIC_SHARED(name) uint8_t *name = emulated_shared()

/* Stream NULL: runs at once. Others: joins the stream (cuda_emulator_streams.cc), with the arguments
 * as they are now. */
void emulated_launch(const char *kernel, dim3 grid, dim3 block, size_t shared, void *stream,
                     const std::function<void()> &body);
void emulated_enqueue(void *stream, const char *what, const std::function<void()> &work);
#define LAUNCH(kernel, grid, block, shared, stream, ...)                                           \
    emulated_launch(#kernel, (grid), (block), (shared), (void *)(stream),                          \
                    [=] { kernel(__VA_ARGS__); })

extern size_t emulated_shared_allowed; /* what the last shared_allow() asked for */
template <typename Kernel> static inline int shared_allow(Kernel *, size_t bytes) {
    emulated_shared_allowed = bytes;
    return bytes <= 232448 ? 0 : 1; /* 227 KiB, cudaErrorInvalidValue */
}
static inline int launch_result(void) {
    return 0;
}

/* Waits until `condition` holds, letting others run. `what` is for the report of a deadlock. */
void emulated_wait(const char *what, const std::function<bool()> &condition);
/* Something happened that others may wait for. */
void emulated_progress(void);
/* Asynchronous work: done at once, at some later wait of any thread, or by emulated_settle(). */
void emulated_later(const std::function<void()> &work);
/* From the seed: 0..bound-1. */
uint32_t emulated_draw(uint32_t bound);

void emulated_barrier(unsigned id, unsigned threads); /* bar.sync */
static inline void __syncthreads(void) {
    emulated_barrier(0, emulated_block_size.x * emulated_block_size.y * emulated_block_size.z);
}
int __syncthreads_or(int predicate);

/* ---- Warps: all 32 lanes take part ---- */

/* Gives `value` to the warp, waits for all its lanes, returns their values by lane. */
const uint64_t *emulated_exchange(uint32_t mask, uint64_t value);
static inline unsigned emulated_lane(void) {
    return emulated_now->linear % 32;
}
static inline void __syncwarp(uint32_t mask = 0xffffffff) {
    emulated_exchange(mask, 0);
}
template <typename T> static inline T emulated_shuffle(uint32_t mask, T value, unsigned from) {
    uint64_t bits = 0;
    static_assert(sizeof(T) <= sizeof bits, "shuffles move 8 bytes at most");
    memcpy(&bits, &value, sizeof value);
    const uint64_t *all = emulated_exchange(mask, bits);
    T ret;
    memcpy(&ret, &all[from], sizeof ret);
    return ret;
}
template <typename T> static inline T __shfl_sync(uint32_t mask, T value, int lane) {
    return emulated_shuffle(mask, value, (unsigned)lane % 32);
}
template <typename T> static inline T __shfl_xor_sync(uint32_t mask, T value, int bits) {
    return emulated_shuffle(mask, value, emulated_lane() ^ (unsigned)bits);
}
template <typename T> static inline T __shfl_down_sync(uint32_t mask, T value, unsigned by) {
    const unsigned lane = emulated_lane();
    return emulated_shuffle(mask, value, lane + by < 32 ? lane + by : lane);
}
template <typename T> static inline T __shfl_up_sync(uint32_t mask, T value, unsigned by) {
    const unsigned lane = emulated_lane();
    return emulated_shuffle(mask, value, lane >= by ? lane - by : lane);
}
uint32_t __ballot_sync(uint32_t mask, int predicate);
static inline int __any_sync(uint32_t mask, int predicate) {
    return __ballot_sync(mask, predicate) != 0;
}

/* ---- Atomics: fibers change only where they wait ---- */

template <typename T> static inline T atomicAdd(T *at, T value) {
    T old = *at;
    *at = old + value;
    return old;
}

/* ---- Arithmetic ---- */

static inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
static inline float __uint_as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
static inline float __fmaf_rn(float a, float b, float c) {
    return __builtin_fmaf(a, b, c);
}
static inline float __fsqrt_rn(float x) {
    return sqrtf(x);
}
static inline int __popc(uint32_t x) {
    return __builtin_popcount(x);
}
static inline int __ffs(int x) {
    return __builtin_ffs(x);
}
static inline int __clz(int x) {
    return x == 0 ? 32 : __builtin_clz((unsigned)x);
}
static inline uint32_t __umulhi(uint32_t a, uint32_t b) {
    return (uint32_t)((uint64_t)a * b >> 32);
}

#endif
