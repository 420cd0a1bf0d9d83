/* What tests ask the emulated streams, beyond kernels/cuda/streams.h. Emulator only. */
#ifndef TROUPE_TESTS_CUDA_EMULATOR_STREAMS_H
#define TROUPE_TESTS_CUDA_EMULATOR_STREAMS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* How often the host has waited for a stream so far. */
uint64_t emulated_host_waits(void);
/* Kernels and copies that have run after something that was enqueued later, in another stream. */
uint64_t emulated_overtakings(void);
/* The nth event_await_cuda() from now on (1: the next one) is forgotten; 0: none. */
void emulated_forget_await(uint32_t nth);

#ifdef __cplusplus
}
#endif

#endif
