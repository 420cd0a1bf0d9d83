/* Built where no CUDA was found. */
#include "actors/host/gpu_device.h"

int gpu_device_open(struct gpu_device *ret, uint32_t index, struct failure *failure) {
    (void)ret;
    return fail(failure, ERR_UNSUPPORTED,
                "--gpu %u: this troupe was built without CUDA: install CUDA 13 and NCCL, set "
                "CUDA_HOME and build again, or leave out --gpu",
                index);
}
