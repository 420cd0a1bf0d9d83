/* The device of `--gpu N`: found and judged before anything is loaded. gpu_device_with_cuda.c asks
 * CUDA, gpu_device_without_cuda.c says that this build has none. */
#ifndef TROUPE_HOST_GPU_DEVICE_H
#define TROUPE_HOST_GPU_DEVICE_H

#include <stdint.h>

#include "actors/errors.h"
#include "engine/resident.h"
#include "kernels/ops.h"

struct gpu_device {
    uint32_t index;
    char name[256];
    uint32_t major, minor; /* compute capability */
    uint64_t total_bytes, free_bytes;
    uint32_t pci_domain, pci_bus, pci_device;
};

/* ERR_UNSUPPORTED, ERR_INVALID: no CUDA, no such device, or one that is not of capability 9.0. */
int gpu_device_open(struct gpu_device *ret, uint32_t index, struct failure *failure);
/* Would `bytes` of `what` fit, with a reserve for the runtime's own? ERR_NO_MEMORY says what is
 * missing and what to do. */
int gpu_device_fits(const struct gpu_device *self, uint64_t bytes, const char *what,
                    struct failure *failure);
/* Judges the capability: the kernels are compiled for sm_90a only. */
int gpu_device_check(const struct gpu_device *self, struct failure *failure);
/* Binds this process to the processors next to the device. A topology that does not know the device
 * (containers hide it) is no error: false, and nothing is bound. */
int gpu_device_pin(const struct gpu_device *self, struct failure *failure);

/* The kernels of a numerics profile of the GPU (bf16-sm90, fp8-sm90), on this device from now on;
 * NULL: as above. One for the process, one thread at a time. */
const struct kernels *gpu_device_kernels(const struct gpu_device *self, const char *numerics,
                                         struct failure *failure);

/* Whole steps on it (engine/resident.h); NULL: this build has no CUDA. */
const struct resident_operations *gpu_device_resident(void);

/* Whether it has kernels for a model's attention; ERR_UNSUPPORTED names the widths. */
int gpu_device_offers(const struct mla_shape *shape, struct failure *failure);

#define GPU_RESERVE_BYTES (512u << 20) /* for the CUDA context, NCCL and fragments */

#endif
