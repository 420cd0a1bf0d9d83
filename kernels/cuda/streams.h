/* What host code needs of the CUDA runtime to enqueue work and never wait inside a layer: streams,
 * events, copies in stream order, graphs. The functions are streams.cu's, or the emulator's
 * (tests/support/cuda_emulator_streams.cc), which runs whatever events do not order in an order of
 * its own. All return 0 or a CUDA error number. A stream of these is not ordered with the default
 * stream (NULL), so what it made may be read by device_get_cuda() only after stream_wait_cuda(). */
#ifndef TROUPE_CUDA_STREAMS_H
#define TROUPE_CUDA_STREAMS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define CUDA_NOT_READY 600 /* cudaErrorNotReady */

int stream_make_cuda(void **ret);
void stream_free_cuda(void *stream);
int stream_wait_cuda(void *stream); /* blocking: until all that it was given is done */
int stream_done_cuda(void *stream); /* 0, or CUDA_NOT_READY */

/* A mark in one stream that others can be made to wait for. Waiting for an event that was never
 * recorded is no wait. */
int event_make_cuda(void **ret);
void event_free_cuda(void *event);
int event_record_cuda(void *event, void *stream);
int event_await_cuda(void *stream, void *event); /* the stream, not the host */

/* Page-locked host memory, which copies in stream order need. It must not change, or be read,
 * before they are done. */
int pinned_take_cuda(size_t bytes, void **ret);
void pinned_give_cuda(void *memory);
int stream_put_cuda(void *stream, void *device, const void *host, size_t bytes);
int stream_get_cuda(void *stream, void *host, const void *device, size_t bytes);
int stream_copy_cuda(void *stream, void *to, const void *from, size_t bytes); /* on the device */
/* Zeroes `rows` runs of `bytes`, `pitch` apart. */
int stream_clear_cuda(void *stream, void *memory, size_t pitch, size_t bytes, size_t rows);

/* What `stream` and the streams that wait for events of it are given between begin and end is not
 * done but kept; all of them must have been waited for by `stream` at the end. Nothing that blocks
 * may be called in between. A graph may be run again and again, on any stream. */
int graph_begin_cuda(void *stream);
int graph_end_cuda(void *stream, void **ret);
int graph_run_cuda(void *graph, void *stream);
uint32_t graph_nodes_cuda(const void *graph);
void graph_free_cuda(void *graph);

#ifdef __cplusplus
}
#endif

#endif
