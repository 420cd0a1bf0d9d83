/* The memory of the kernel tests on a real card: gpu.h by the CUDA runtime. */
#include "tests/support/gpu.h"

#include <cuda_runtime.h>
#include <stdio.h>
#include <stdlib.h>

static void check(cudaError_t error, const char *what) {
    if (error == cudaSuccess)
        return;
    fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
    exit(1);
}

bool gpu_open(char *ret_name, size_t room) {
    int devices = 0;
    cudaError_t error = cudaGetDeviceCount(&devices);
    cudaDeviceProp properties;
    if (error == cudaSuccess && devices > 0)
        error = cudaGetDeviceProperties(&properties, 0);
    if (error != cudaSuccess || devices == 0) {
        snprintf(ret_name, room, "no CUDA device: %s", cudaGetErrorString(error));
        return false;
    }
    snprintf(ret_name, room, "%s", properties.name);
    return properties.major == 9;
}
bool gpu_is_emulated(void) {
    return false;
}
void *gpu_take(size_t bytes) {
    void *memory = NULL;
    check(cudaMalloc(&memory, bytes > 0 ? bytes : 1), "cudaMalloc");
    return memory;
}
void gpu_give(void *memory) {
    check(cudaFree(memory), "cudaFree");
}
void gpu_put(void *memory, const void *from, size_t bytes) {
    check(cudaMemcpy(memory, from, bytes, cudaMemcpyHostToDevice), "copy to the device");
}
void gpu_get(void *to, const void *memory, size_t bytes) {
    check(cudaMemcpy(to, memory, bytes, cudaMemcpyDeviceToHost), "copy from the device");
}
int gpu_wait(void) {
    return (int)cudaDeviceSynchronize();
}
void gpu_schedule(uint64_t seed) {
    (void)seed;
}
