/* What tests ask the emulated streams, beyond kernels/cuda/streams.h. Emulator only. */
#ifndef TROUPE_TESTS_CUDA_EMULATOR_STREAMS_H
#define TROUPE_TESTS_CUDA_EMULATOR_STREAMS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* How often the host has waited for a stream so far. */
uint64_t emulated_host_waits(void);
/* Kernels and copies that have run after something that was enqueued later, in another stream. */
uint64_t emulated_overtakings(void);
/* A stand-in for a communicator of two: what is sent in one stream waits for its receive in
 * another, also where both were captured in graphs of their own. One thing is under way at a time.
 */
void *emulated_channel_make(void);
void emulated_channel_free(void *channel);
int emulated_channel_send(void *channel, void *stream, const void *from, size_t bytes);
int emulated_channel_receive(void *channel, void *stream, void *to, size_t bytes);
/* After `count` more things it is aborted: whoever waits goes on, and nothing moves any more.
 * UINT64_MAX: never; it is as new. */
void emulated_channel_abort_after(void *channel, uint64_t count);

/* The nth event_await_cuda() from now on (1: the next one) is forgotten; 0: none. */
void emulated_forget_await(uint32_t nth);

#ifdef __cplusplus
}
#endif

#endif
