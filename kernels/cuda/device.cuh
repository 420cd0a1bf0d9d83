/* What every kernel file includes first: the CUDA runtime where nvcc compiles it, or the emulator
 * of the tests (tests/support/cuda_emulator.h) where a plain C++ compiler does. A kernel names
 * nothing else of either world.
 *
 *   LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...)   starts it
 *   DYNAMIC_SHARED(name)                                             its dynamic shared memory
 *
 * Compiled with -fmad=false -ftz=true and correctly rounded division and square root, so that an
 * expression of FP32 operations means on the device what it means on the CPU under
 * numerics_enter(); a fused multiply-add is always written out (__fmaf_rn). */
#ifndef TROUPE_CUDA_DEVICE_CUH
#define TROUPE_CUDA_DEVICE_CUH

#include <stddef.h>
#include <stdint.h>

#if defined(TROUPE_EMULATED)
#include "tests/support/cuda_emulator.h"
#else
#include <cuda_runtime.h>

#define LAUNCH(kernel, grid, block, shared, stream, ...)                                           \
    kernel<<<(grid), (block), (shared), (cudaStream_t)(stream)>>>(__VA_ARGS__)
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) uint8_t name[]

/* Allows a kernel more dynamic shared memory than the 48 KiB that need no asking. */
template <typename Kernel> static inline int shared_allow(Kernel *kernel, size_t bytes) {
    return (int)cudaFuncSetAttribute((const void *)kernel,
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
}
static inline int launch_result(void) {
    return (int)cudaGetLastError();
}
#endif

#define _Noreturn [[noreturn]] /* headers of C */

#include "kernels/cuda/cuda_ops.h"

#define DEVICE static __device__ __forceinline__
#define WARP   32u

#endif
