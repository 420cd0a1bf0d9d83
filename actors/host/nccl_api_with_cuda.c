/* NCCL and the CUDA runtime behind the table of nccl_api.h. NCCL is loaded when the first --gpu
 * asks for it, so the program starts where there is none. None of this has run on a card yet
 * (docs/gpu.md). */
#include "actors/host/nccl_api.h"

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <nccl.h>
#include <string.h>
#include <time.h>

#define NCCL_BASE 100  /* errors of NCCL are -(100 + ncclResult_t) */
#define CUDA_BASE 1000 /* errors of CUDA are -(1000 + cudaError_t) */

/* name, as in nccl.h */
#define NCCL_FUNCTIONS(X)                                                                          \
    X(GetVersion)                                                                                  \
    X(GetUniqueId)                                                                                 \
    X(CommInitRankConfig)                                                                          \
    X(CommGetAsyncError)                                                                           \
    X(CommRegister)                                                                                \
    X(CommDeregister)                                                                              \
    X(CommFinalize)                                                                                \
    X(CommDestroy)                                                                                 \
    X(CommAbort)                                                                                   \
    X(GroupStart)                                                                                  \
    X(GroupEnd)                                                                                    \
    X(Send)                                                                                        \
    X(Recv)                                                                                        \
    X(MemAlloc)                                                                                    \
    X(MemFree)                                                                                     \
    X(GetErrorString)

static struct {
    void *library;
    int device;
#define X(name) __typeof__(nccl##name) *name;
    NCCL_FUNCTIONS(X)
#undef X
} nccl;

static int of_nccl(ncclResult_t result) {
    return result == ncclSuccess      ? 0
           : result == ncclInProgress ? NCCL_PENDING
                                      : -(NCCL_BASE + (int)result);
}
static int of_cuda(cudaError_t error) {
    return error == cudaSuccess ? 0 : -(CUDA_BASE + (int)error);
}

static int use_device(void *context) {
    (void)context;
    return of_cuda(cudaSetDevice(nccl.device));
}

/* Not ordered with the default stream, which would be a synchronisation with everything. */
static int stream_make(void *context, void **ret) {
    (void)context;
    return of_cuda(cudaStreamCreateWithFlags((cudaStream_t *)ret, cudaStreamNonBlocking));
}
static void stream_free(void *context, void *stream) {
    (void)context;
    cudaStreamDestroy(stream);
}

static int memory_take(void *context, size_t bytes, void **ret) {
    (void)context;
    return of_nccl(nccl.MemAlloc(ret, bytes));
}
static void memory_give(void *context, void *memory) {
    (void)context;
    nccl.MemFree(memory);
}
static int pinned_take(void *context, size_t bytes, void **ret) {
    (void)context;
    return of_cuda(cudaHostAlloc(ret, bytes, cudaHostAllocDefault));
}
static void pinned_give(void *context, void *memory) {
    (void)context;
    cudaFreeHost(memory);
}

static int event_make(void *context, void **ret) {
    (void)context;
    return of_cuda(cudaEventCreateWithFlags((cudaEvent_t *)ret, cudaEventDisableTiming));
}
static void event_free(void *context, void *event) {
    (void)context;
    cudaEventDestroy(event);
}
static int event_record(void *context, void *event, void *stream) {
    (void)context;
    return of_cuda(cudaEventRecord(event, stream));
}
static int event_query(void *context, void *event) {
    (void)context;
    cudaError_t error = cudaEventQuery(event);
    return error == cudaErrorNotReady ? NCCL_PENDING : of_cuda(error);
}

static int copy_in(void *context, void *device, const void *host, size_t bytes, void *stream) {
    (void)context;
    return of_cuda(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream));
}
static int copy_out(void *context, void *host, const void *device, size_t bytes, void *stream) {
    (void)context;
    return of_cuda(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream));
}
static int ring(void *context, void (*function)(void *argument), void *argument, void *stream) {
    (void)context;
    return of_cuda(cudaLaunchHostFunc(stream, function, argument));
}

static int unique_id(void *context, struct nccl_id *ret) {
    (void)context;
    _Static_assert(sizeof *ret == sizeof(ncclUniqueId), "a unique id is carried whole");
    return of_nccl(nccl.GetUniqueId((ncclUniqueId *)ret));
}

static int comm_init(void *context, void **ret, const struct nccl_id *id, int rank,
                     const struct nccl_comm_options *options) {
    (void)context;
    ncclUniqueId unique;
    memcpy(&unique, id, sizeof unique);
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    config.minCTAs = 1;
    config.maxCTAs = options->channels_max;
    config.commName = options->name;
    return of_nccl(nccl.CommInitRankConfig((ncclComm_t *)ret, 2, unique, rank, &config));
}
static int comm_state(void *context, void *comm) {
    (void)context;
    ncclResult_t state = ncclSuccess;
    ncclResult_t asked = nccl.CommGetAsyncError(comm, &state);
    return of_nccl(asked != ncclSuccess ? asked : state);
}
static int comm_register(void *context, void *comm, void *memory, size_t bytes, void **ret) {
    (void)context;
    return of_nccl(nccl.CommRegister(comm, memory, bytes, ret));
}
static void comm_deregister(void *context, void *comm, void *handle) {
    (void)context;
    nccl.CommDeregister(comm, handle);
}

static int group_start(void *context) {
    (void)context;
    return of_nccl(nccl.GroupStart());
}
static int group_end(void *context) {
    (void)context;
    return of_nccl(nccl.GroupEnd());
}
static int send_bytes(void *context, void *comm, const void *memory, size_t bytes, void *stream) {
    (void)context;
    return of_nccl(nccl.Send(memory, bytes, ncclUint8, 1, comm, stream));
}
static int receive_bytes(void *context, void *comm, void *memory, size_t bytes, void *stream) {
    (void)context;
    return of_nccl(nccl.Recv(memory, bytes, ncclUint8, 0, comm, stream));
}

/* The keeper's thread may wait here; a finish that does not end is the end of the peer, so it is
 * bounded by falling back to the abort. */
static int comm_finish(void *context, void *comm) {
    enum { TURNS = 200 };
    int error = of_nccl(nccl.CommFinalize(comm));
    for (int i = 0; i < TURNS && error >= 0; i++) {
        error = comm_state(context, comm);
        if (error == 0)
            return of_nccl(nccl.CommDestroy(comm));
        struct timespec pause = {.tv_nsec = 5000000};
        nanosleep(&pause, NULL);
    }
    return of_nccl(nccl.CommAbort(comm));
}
static int comm_abort(void *context, void *comm) {
    (void)context;
    return of_nccl(nccl.CommAbort(comm));
}

static const char *text(void *context, int error) {
    (void)context;
    if (error <= -CUDA_BASE)
        return cudaGetErrorString((cudaError_t)(-error - CUDA_BASE));
    if (error <= -NCCL_BASE)
        return nccl.GetErrorString((ncclResult_t)(-error - NCCL_BASE));
    return error_name(error);
}

static const struct nccl_api API = {
    .use_device = use_device,
    .stream_make = stream_make,
    .stream_free = stream_free,
    .memory_take = memory_take,
    .memory_give = memory_give,
    .pinned_take = pinned_take,
    .pinned_give = pinned_give,
    .event_make = event_make,
    .event_free = event_free,
    .copy_in = copy_in,
    .copy_out = copy_out,
    .event_record = event_record,
    .event_query = event_query,
    .ring = ring,
    .unique_id = unique_id,
    .comm_init = comm_init,
    .comm_state = comm_state,
    .comm_register = comm_register,
    .comm_deregister = comm_deregister,
    .group_start = group_start,
    .group_end = group_end,
    .send = send_bytes,
    .receive = receive_bytes,
    .comm_finish = comm_finish,
    .comm_abort = comm_abort,
    .text = text,
};

static int load(struct failure *failure) {
    if (nccl.library != NULL)
        return 0;
    void *library = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
    if (library == NULL)
        return fail(failure, ERR_UNSUPPORTED,
                    "--gpu needs NCCL (libnccl.so.2): %s; install it or name its folder in "
                    "LD_LIBRARY_PATH",
                    dlerror());
#define X(name)                                                                                    \
    nccl.name = (__typeof__(nccl.name))dlsym(library, "nccl" #name);                               \
    if (nccl.name == NULL)                                                                         \
        return fail(failure, ERR_UNSUPPORTED,                                                      \
                    "this NCCL has no nccl" #name ": version 2.28 or newer is needed");
    NCCL_FUNCTIONS(X)
#undef X
    int version = 0;
    if (nccl.GetVersion(&version) != ncclSuccess || version < NCCL_VERSION(2, 28, 0))
        return fail(failure, ERR_UNSUPPORTED, "NCCL 2.28 or newer is needed, found version code %d",
                    version);
    nccl.library = library;
    return 0;
}

int nccl_api_open(const struct nccl_api **ret, uint32_t gpu, struct failure *failure) {
    int devices = 0;
    cudaError_t error = cudaGetDeviceCount(&devices);
    if (error != cudaSuccess || devices == 0)
        return fail(failure, ERR_UNSUPPORTED,
                    "GPU %u was asked for, but CUDA finds no device here: %s; leave out --gpu to "
                    "run on the CPU",
                    gpu, cudaGetErrorString(error != cudaSuccess ? error : cudaErrorNoDevice));
    if (gpu >= (uint32_t)devices)
        return fail(failure, ERR_INVALID, "--gpu: expected 0 to %d, found %u", devices - 1, gpu);
    int code = load(failure);
    if (code < 0)
        return code;
    nccl.device = (int)gpu;
    error = cudaSetDevice(nccl.device);
    if (error != cudaSuccess)
        return fail(failure, ERR_UNSUPPORTED, "GPU %u cannot be used: %s", gpu,
                    cudaGetErrorString(error));
    *ret = &API;
    return 0;
}
