/* AMX for processors without it, so that tests run the very instructions of the AMX kernels: a
 * handler for SIGILL decodes LDTILECFG, STTILECFG, TILERELEASE, TILEZERO, TILELOADD, TILELOADDT1,
 * TILESTORED and TDPBF16PS and does what Intel's manual (SDM volume 2) says. Arithmetic is done in
 * integers, independent of the kernels' own definition. x86-64 Linux only. */
#ifndef TROUPE_TESTS_AMX_EMULATOR_H
#define TROUPE_TESTS_AMX_EMULATOR_H

#include <stdbool.h>
#include <stdint.h>

/* From here on AMX instructions that the processor refuses are emulated. Returns false on other
 * systems. */
bool amx_emulator_install(void);
/* Instructions emulated so far, by all threads. */
uint64_t amx_emulator_count(void);

/* Bits of a * b + c in FP32: one rounding to nearest even, denormal operands and results zero
 * (tininess after rounding). */
uint32_t soft_fma(uint32_t a, uint32_t b, uint32_t c);

struct amx_tile {
    uint8_t row[16][64];
};
/* What TDPBF16PS does: sums [rows][columns] += inputs [rows][2 pairs] x weights [pairs][2 columns].
 */
void soft_tdpbf16ps(struct amx_tile *sums, const struct amx_tile *inputs,
                    const struct amx_tile *weights, int rows, int pairs, int columns);

#endif
