/* The one source of chance in the simulator: everything follows from a 64-bit seed. SplitMix64 (Steele, Lea, Flood 2014). */
#ifndef TROUPE_RANDOM_H
#define TROUPE_RANDOM_H

#include <stdbool.h>
#include <stdint.h>

struct random {
    uint64_t state;
};

static inline uint64_t random_next(struct random *self) {
    uint64_t z = (self->state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* Uniform in [low, high]; high >= low. The bias of the modulus is below 2^-32 for the ranges used here. */
static inline uint64_t random_between(struct random *self, uint64_t low, uint64_t high) {
    uint64_t range = high - low;
    return range == UINT64_MAX ? random_next(self) : low + random_next(self) % (range + 1);
}

static inline bool random_chance(struct random *self, double share) {
    return (double)(random_next(self) >> 11) * 0x1p-53 < share;
}

#endif
