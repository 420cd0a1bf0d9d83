/* The device of the kernel tests: the emulator, or a real card where the same tests are linked with
 * what nvcc made (make test-gpu). */
#ifndef TROUPE_TESTS_GPU_H
#define TROUPE_TESTS_GPU_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* False: there is no usable card; ret_name says why. */
bool gpu_open(char *ret_name, size_t room);
bool gpu_is_emulated(void);
void *gpu_take(size_t bytes); /* device memory, 1024-byte aligned */
void gpu_give(void *memory);
void gpu_put(void *memory, const void *from, size_t bytes);
void gpu_get(void *to, const void *memory, size_t bytes);
int gpu_wait(void);               /* until all is done; 0 or the CUDA error */
void gpu_schedule(uint64_t seed); /* the emulator's order of threads; a card has its own */

#ifdef __cplusplus
}
#endif

#endif
