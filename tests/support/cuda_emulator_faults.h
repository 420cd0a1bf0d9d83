/* Kernels with faults on purpose; see the .cc. Emulator only. */
#ifndef TROUPE_TESTS_CUDA_EMULATOR_FAULTS_H
#define TROUPE_TESTS_CUDA_EMULATOR_FAULTS_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

void faulty_pass(bool with_barrier, uint32_t ret[128]);
/* matrix: [128, 128] BF16; ret: [128 threads, 64]. fault 0: none. */
void faulty_tiles(int fault, const uint16_t *matrix, float *ret);
void faulty_barrier(uint32_t ret[128]);

#ifdef __cplusplus
}
#endif

#endif
