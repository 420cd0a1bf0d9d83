/* What this machine can do at best, so that a figure can be read as a share of it. Pure: threads
 * and the clock are handed in. */
#ifndef TROUPE_BENCH_LIMITS_H
#define TROUPE_BENCH_LIMITS_H

#include <stdint.h>

#include "kernels/ops.h"

struct machine_limits {
    double stream_bytes_per_s; /* memory read in order by all threads; the best of several passes */
    double peak_flops; /* multiplications and additions of the instruction that products are made
                          of, registers only */
    const char *peak_name; /* which instruction */
    int threads;
};

/* Takes a second or two. stream 0: no memory for the buffer. peak 0: only scalar code runs
 * here. */
void limits_measure(struct machine_limits *ret, enum isa isa, const struct parallel *parallel,
                    uint64_t (*now_ns)(void), void (*ask_huge)(void *memory, size_t bytes));

/* `loops` times 2 x PEAK_FLOPS_PER_LOOP operations that cannot be left out; the result only keeps
 * the compiler honest. */
float peak_avx512(uint32_t loops); /* 16 chains of FP32 FMA, 16 wide: 512 operations a loop */
float peak_amx(uint32_t loops);    /* 4 tiles of TDPBF16PS: 4 x 16384 operations a loop; only where
                                      isa_available(ISA_AMX) */
#define PEAK_AVX512_FLOPS 512.0
#define PEAK_AMX_FLOPS    65536.0

#endif
