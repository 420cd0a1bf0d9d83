/* Seeded random numbers for tests (SplitMix64, Steele et al. 2014). */
#ifndef TROUPE_TESTS_RANDOM_H
#define TROUPE_TESTS_RANDOM_H

#include <stdint.h>

static inline uint64_t random_next(uint64_t *state) {
    uint64_t z = (*state += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

/* 0..bound-1; bound at least 1. */
static inline uint32_t random_below(uint64_t *state, uint32_t bound) {
    return (uint32_t)(random_next(state) % bound);
}

/* Uniform in [low, high). */
static inline float random_float(uint64_t *state, float low, float high) {
    return low + (high - low) * ((float)(random_next(state) >> 40) * 0x1p-24f);
}

#endif
