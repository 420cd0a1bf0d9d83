/* The device of --gpu as CUDA sees it. */
#include "actors/host/gpu_device.h"

#include <cuda_runtime_api.h>
#include <stdio.h>
#include <string.h>

#include "engine/cuda/resident.h"
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/table.h"

int gpu_device_open(struct gpu_device *ret, uint32_t index, struct failure *failure) {
    int devices = 0;
    cudaError_t error = cudaGetDeviceCount(&devices);
    if (error != cudaSuccess || devices == 0)
        return fail(failure, ERR_UNSUPPORTED,
                    "--gpu %u: CUDA finds no device here (%s): leave out --gpu to run on the CPU",
                    index, cudaGetErrorString(error != cudaSuccess ? error : cudaErrorNoDevice));
    if (index >= (uint32_t)devices)
        return fail(failure, ERR_INVALID, "--gpu: expected 0 to %d, found %u", devices - 1, index);
    struct cudaDeviceProp properties;
    size_t free_bytes = 0, total_bytes = 0;
    error = cudaGetDeviceProperties(&properties, (int)index);
    if (error == cudaSuccess)
        error = cudaSetDevice((int)index);
    if (error == cudaSuccess)
        error = cudaMemGetInfo(&free_bytes, &total_bytes);
    if (error != cudaSuccess)
        return fail(failure, ERR_UNSUPPORTED, "--gpu %u cannot be used: %s", index,
                    cudaGetErrorString(error));
    struct gpu_device found = {
        .index = index,
        .major = (uint32_t)properties.major,
        .minor = (uint32_t)properties.minor,
        .total_bytes = total_bytes,
        .free_bytes = free_bytes,
        .pci_domain = (uint32_t)properties.pciDomainID,
        .pci_bus = (uint32_t)properties.pciBusID,
        .pci_device = (uint32_t)properties.pciDeviceID,
    };
    snprintf(found.name, sizeof found.name, "%s", properties.name);
    int code = gpu_device_check(&found, failure);
    if (code == 0)
        *ret = found;
    return code;
}

const struct kernels *gpu_device_kernels(const struct gpu_device *self, const char *numerics,
                                         struct failure *failure) {
    device_use_cuda((int)self->index);
    return kernels_cuda(numerics, strncmp(numerics, "fp8", 3) == 0, failure);
}

const struct resident_operations *gpu_device_resident(void) {
    return &RESIDENT_CUDA;
}

int gpu_device_offers(const struct mla_shape *shape, struct failure *failure) {
    return kernels_cuda_offer(shape, failure) ? 0 : failure->code;
}
