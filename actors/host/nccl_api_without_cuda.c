/* Built where no CUDA was found: there is no NCCL transport. */
#include "actors/host/nccl_api.h"

int nccl_api_open(const struct nccl_api **ret, uint32_t gpu, struct failure *failure) {
    (void)ret;
    return fail(failure, ERR_UNSUPPORTED,
                "GPU %u was asked for, but this troupe was built without CUDA: install CUDA 13 and "
                "NCCL, set CUDA_HOME and build again, or leave out --gpu",
                gpu);
}
