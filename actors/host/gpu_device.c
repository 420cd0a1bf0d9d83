/* What can be judged of a GPU without CUDA, and the processors next to it. */
#include "actors/host/gpu_device.h"

#include <hwloc.h>

int gpu_device_check(const struct gpu_device *self, struct failure *failure) {
    if (self->major == 9 && self->minor == 0)
        return 0;
    return fail(failure, ERR_UNSUPPORTED,
                "GPU %u (%s) has compute capability %u.%u: the kernels need 9.0 (Hopper: H100, "
                "H200)",
                self->index, self->name, self->major, self->minor);
}

int gpu_device_fits(const struct gpu_device *self, uint64_t bytes, const char *what,
                    struct failure *failure) {
    const uint64_t room =
        self->free_bytes > GPU_RESERVE_BYTES ? self->free_bytes - GPU_RESERVE_BYTES : 0;
    if (bytes <= room)
        return 0;
    return fail(failure, ERR_NO_MEMORY,
                "%s need %llu MiB, GPU %u (%s) has %llu of %llu MiB free, %u of which are kept "
                "back: use more GPUs, or give this process less to hold",
                what, (unsigned long long)(bytes >> 20), self->index, self->name,
                (unsigned long long)(self->free_bytes >> 20),
                (unsigned long long)(self->total_bytes >> 20), GPU_RESERVE_BYTES >> 20);
}

int gpu_device_pin(const struct gpu_device *self, struct failure *failure) {
    hwloc_topology_t topology;
    int error = 0, bound = 0;
    if (hwloc_topology_init(&topology) != 0)
        return fail(failure, ERR_NO_MEMORY, "no memory for the topology");
    hwloc_topology_set_io_types_filter(topology, HWLOC_TYPE_FILTER_KEEP_IMPORTANT);
    hwloc_topology_load(topology);
    hwloc_obj_t device =
        hwloc_get_pcidev_by_busid(topology, self->pci_domain, self->pci_bus, self->pci_device, 0);
    hwloc_obj_t near = device != NULL ? hwloc_get_non_io_ancestor_obj(topology, device) : NULL;
    if (near != NULL && near->cpuset != NULL && !hwloc_bitmap_iszero(near->cpuset)) {
        bound = hwloc_set_cpubind(topology, near->cpuset, HWLOC_CPUBIND_PROCESS) == 0;
        if (!bound)
            error = fail(failure, ERR_INVALID,
                         "this process may not run on the processors next to GPU %u: give --cpus",
                         self->index);
    }
    hwloc_topology_destroy(topology);
    return error < 0 ? error : bound;
}
