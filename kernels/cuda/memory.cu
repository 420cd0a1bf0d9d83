/* Device memory for C code that runs kernels: taken, filled, read. Blocking, for tables and tests;
 * nothing here belongs on a token's way. */
#include "kernels/cuda/device.cuh"

#if defined(TROUPE_EMULATED)
#include <stdlib.h>

void device_use_cuda(int index) {
    (void)index;
}

int device_enter_cuda(void) {
    return 0;
}

int device_take_cuda(size_t bytes, void **ret) {
    *ret = aligned_alloc(1024, (bytes + 1024) / 1024 * 1024);
    return *ret != NULL ? 0 : 2; /* cudaErrorMemoryAllocation */
}
void device_give_cuda(void *memory) {
    free(memory);
}
int device_put_cuda(void *memory, const void *from, size_t bytes) {
    memcpy(memory, from, bytes);
    return 0;
}
int device_get_cuda(void *to, const void *memory, size_t bytes) {
    memcpy(to, memory, bytes);
    return 0;
}
#else
static int device_index;

void device_use_cuda(int index) {
    device_index = index;
}
/* Threads begin with device 0. */
static int use(void) {
    return (int)cudaSetDevice(device_index);
}

int device_enter_cuda(void) {
    return use();
}

int device_take_cuda(size_t bytes, void **ret) {
    const int error = use();
    return error != 0 ? error : (int)cudaMalloc(ret, bytes > 0 ? bytes : 1);
}
void device_give_cuda(void *memory) {
    if (use() == 0)
        cudaFree(memory);
}
int device_put_cuda(void *memory, const void *from, size_t bytes) {
    const int error = use();
    return error != 0 ? error : (int)cudaMemcpy(memory, from, bytes, cudaMemcpyHostToDevice);
}
int device_get_cuda(void *to, const void *memory, size_t bytes) {
    const int error = use();
    return error != 0 ? error : (int)cudaMemcpy(to, memory, bytes, cudaMemcpyDeviceToHost);
}
#endif
