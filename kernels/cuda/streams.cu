/* Streams, events and graphs by the CUDA runtime (streams.h). In the tests the emulator has its
 * own. */
#include "kernels/cuda/streams.h"

#include "kernels/cuda/device.cuh"

#if !defined(TROUPE_EMULATED)
struct graph {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    size_t nodes;
};

/* Not ordered with the default stream, which would be a synchronisation with everything. */
int stream_make_cuda(void **ret) {
    return (int)cudaStreamCreateWithFlags((cudaStream_t *)ret, cudaStreamNonBlocking);
}
void stream_free_cuda(void *stream) {
    cudaStreamDestroy((cudaStream_t)stream);
}
int stream_wait_cuda(void *stream) {
    return (int)cudaStreamSynchronize((cudaStream_t)stream);
}
int stream_done_cuda(void *stream) {
    return (int)cudaStreamQuery((cudaStream_t)stream);
}

int event_make_cuda(void **ret) {
    return (int)cudaEventCreateWithFlags((cudaEvent_t *)ret, cudaEventDisableTiming);
}
void event_free_cuda(void *event) {
    cudaEventDestroy((cudaEvent_t)event);
}
int event_record_cuda(void *event, void *stream) {
    return (int)cudaEventRecord((cudaEvent_t)event, (cudaStream_t)stream);
}
int event_await_cuda(void *stream, void *event) {
    return (int)cudaStreamWaitEvent((cudaStream_t)stream, (cudaEvent_t)event, 0);
}

int pinned_take_cuda(size_t bytes, void **ret) {
    return (int)cudaHostAlloc(ret, bytes > 0 ? bytes : 1, cudaHostAllocDefault);
}
void pinned_give_cuda(void *memory) {
    cudaFreeHost(memory);
}
int stream_put_cuda(void *stream, void *device, const void *host, size_t bytes) {
    return (int)cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, (cudaStream_t)stream);
}
int stream_get_cuda(void *stream, void *host, const void *device, size_t bytes) {
    return (int)cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, (cudaStream_t)stream);
}
int stream_copy_cuda(void *stream, void *to, const void *from, size_t bytes) {
    return (int)cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, (cudaStream_t)stream);
}
int stream_clear_cuda(void *stream, void *memory, size_t pitch, size_t bytes, size_t rows) {
    if (rows > 1 && pitch <= INT32_MAX)
        return (int)cudaMemset2DAsync(memory, pitch, 0, bytes, rows, (cudaStream_t)stream);
    cudaError_t error = cudaSuccess; /* one run, or too far apart for the other form */
    for (size_t i = 0; i < rows && error == cudaSuccess; i++)
        error = cudaMemsetAsync((uint8_t *)memory + i * pitch, 0, bytes, (cudaStream_t)stream);
    return (int)error;
}

int graph_begin_cuda(void *stream) {
    return (int)cudaStreamBeginCapture((cudaStream_t)stream, cudaStreamCaptureModeThreadLocal);
}
int graph_end_cuda(void *stream, void **ret) {
    struct graph *self = new graph();
    cudaError_t error = cudaStreamEndCapture((cudaStream_t)stream, &self->graph);
    if (error == cudaSuccess)
        error = cudaGraphGetNodes(self->graph, NULL, &self->nodes);
    if (error == cudaSuccess)
        error = cudaGraphInstantiate(&self->exec, self->graph, 0);
    *ret = self;
    if (error != cudaSuccess) {
        graph_free_cuda(self);
        *ret = NULL;
    }
    return (int)error;
}
int graph_run_cuda(void *graph, void *stream) {
    return (int)cudaGraphLaunch(((struct graph *)graph)->exec, (cudaStream_t)stream);
}
uint32_t graph_nodes_cuda(const void *graph) {
    return (uint32_t)((const struct graph *)graph)->nodes;
}
void graph_free_cuda(void *graph) {
    struct graph *self = (struct graph *)graph;
    if (self == NULL)
        return;
    if (self->exec != NULL)
        cudaGraphExecDestroy(self->exec);
    if (self->graph != NULL)
        cudaGraphDestroy(self->graph);
    delete self;
}
#endif
