/* Device memory for C code that runs kernels: taken, filled, read. Blocking, for tables and tests;
 * nothing here belongs on a token's way. */
#include "kernels/cuda/device.cuh"
#include "kernels/staging.h"

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
static uint64_t pretended_free = (uint64_t)1 << 40;
int device_room_cuda(uint64_t *ret_free, uint64_t *ret_total) {
    *ret_free = pretended_free;
    *ret_total = (uint64_t)1 << 40;
    return 0;
}
void device_pretend_cuda(uint64_t free_bytes) {
    pretended_free = free_bytes;
}
int device_put_cuda(void *memory, const void *from, size_t bytes) {
    memcpy(memory, from, bytes);
    return 0;
}
int device_get_cuda(void *to, const void *memory, size_t bytes) {
    memcpy(to, memory, bytes);
    return 0;
}

/* Copies at once: what may happen between is tests/test_staging.c's. */
static int pinned_take(void *, size_t bytes, void **ret) {
    return device_take_cuda(bytes, ret);
}
static void pinned_give(void *, void *memory) {
    free(memory);
}
static int staging_copy(void *, void *to, const void *from, size_t bytes) {
    return device_put_cuda(to, from, bytes);
}
static int staging_mark(void *, uint32_t) {
    return 0;
}
static int staging_settle(void *) {
    return 0;
}
int staging_api_cuda(struct staging_api *ret) {
    *ret = {pinned_take, pinned_give, staging_copy, staging_mark, staging_mark, staging_settle, NULL};
    return 0;
}
void staging_api_drop_cuda(struct staging_api *) {
}
#else
#include <stdlib.h>

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
int device_room_cuda(uint64_t *ret_free, uint64_t *ret_total) {
    size_t free_bytes = 0, total_bytes = 0;
    int error = use();
    if (error == 0)
        error = (int)cudaMemGetInfo(&free_bytes, &total_bytes);
    *ret_free = free_bytes;
    *ret_total = total_bytes;
    return error;
}
void device_pretend_cuda(uint64_t free_bytes) {
    (void)free_bytes;
}
int device_put_cuda(void *memory, const void *from, size_t bytes) {
    const int error = use();
    if (error != 0)
        return error;
    /* From memory that is not page-locked it returns before the last bytes have arrived, and other
     * streams do not wait for them. */
    const cudaError_t copied = cudaMemcpy(memory, from, bytes, cudaMemcpyHostToDevice);
    return (int)(copied != cudaSuccess ? copied : cudaStreamSynchronize(NULL));
}
int device_get_cuda(void *to, const void *memory, size_t bytes) {
    const int error = use();
    return error != 0 ? error : (int)cudaMemcpy(to, memory, bytes, cudaMemcpyDeviceToHost);
}

/* ---- Staging: a stream and an event for each buffer ---- */

struct staging_device {
    cudaStream_t stream;
    cudaEvent_t event[STAGING_BUFFERS];
};

static int pinned_take(void *, size_t bytes, void **ret) {
    const int error = use();
    return error != 0 ? error : (int)cudaHostAlloc(ret, bytes, cudaHostAllocPortable);
}
static void pinned_give(void *, void *memory) {
    if (use() == 0)
        cudaFreeHost(memory);
}
static int staging_copy(void *context, void *to, const void *from, size_t bytes) {
    const int error = use();
    return error != 0 ? error
                      : (int)cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice,
                                             ((struct staging_device *)context)->stream);
}
static int staging_record(void *context, uint32_t buffer) {
    struct staging_device *device = (struct staging_device *)context;
    return (int)cudaEventRecord(device->event[buffer], device->stream);
}
static int staging_wait(void *context, uint32_t buffer) {
    return (int)cudaEventSynchronize(((struct staging_device *)context)->event[buffer]);
}
static int staging_settle(void *context) {
    return (int)cudaStreamSynchronize(((struct staging_device *)context)->stream);
}

void staging_api_drop_cuda(struct staging_api *api) {
    struct staging_device *device = (struct staging_device *)api->context;
    if (device == NULL || use() != 0)
        return;
    for (uint32_t b = 0; b < STAGING_BUFFERS; b++)
        if (device->event[b] != NULL)
            cudaEventDestroy(device->event[b]);
    if (device->stream != NULL)
        cudaStreamDestroy(device->stream);
    free(device);
    api->context = NULL;
}

int staging_api_cuda(struct staging_api *ret) {
    struct staging_device *device = (struct staging_device *)calloc(1, sizeof *device);
    *ret = {pinned_take,  pinned_give,    staging_copy, staging_record,
            staging_wait, staging_settle, device};
    int error = device == NULL ? (int)cudaErrorMemoryAllocation : use();
    if (error == 0) /* beside what computes, not behind it */
        error = (int)cudaStreamCreateWithFlags(&device->stream, cudaStreamNonBlocking);
    for (uint32_t b = 0; b < STAGING_BUFFERS && error == 0; b++)
        error = (int)cudaEventCreateWithFlags(&device->event[b], cudaEventDisableTiming |
                                                                     cudaEventBlockingSync);
    if (error != 0)
        staging_api_drop_cuda(ret);
    return error;
}
#endif
