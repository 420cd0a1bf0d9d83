/* Built where no CUDA was found. */
#include "actors/host/gpu_device.h"

int gpu_device_open(struct gpu_device *ret, uint32_t index, struct failure *failure) {
    (void)ret;
    return fail(failure, ERR_UNSUPPORTED,
                "--gpu %u: this troupe was built without CUDA: install CUDA 13 and NCCL, set "
                "CUDA_HOME and build again, or leave out --gpu",
                index);
}

const struct kernels *gpu_device_kernels(const struct gpu_device *self, const char *numerics,
                                         struct failure *failure) {
    (void)self, (void)numerics;
    fail(failure, ERR_UNSUPPORTED, "this troupe was built without CUDA");
    return NULL;
}

const struct resident_operations *gpu_device_resident(void) {
    return NULL;
}

int gpu_device_offers(const struct mla_shape *shape, struct failure *failure) {
    (void)shape;
    return fail(failure, ERR_UNSUPPORTED, "this troupe was built without CUDA");
}
