/* See latency.h. */
#include "actors/latency.h"

#define FIRST_OCTAVE 14u /* 2^14 ns */

static uint32_t bucket_of(uint64_t ns) {
    if (ns < (UINT64_C(1) << FIRST_OCTAVE))
        return 0;
    uint32_t octave = 63u - (uint32_t)__builtin_clzll(ns);
    uint32_t quarter = (uint32_t)(ns >> (octave - 2)) & 3u;
    uint32_t bucket = (octave - FIRST_OCTAVE) * 4 + quarter;
    return bucket < LATENCY_BUCKETS ? bucket : LATENCY_BUCKETS - 1;
}

static uint64_t bucket_end_ns(uint32_t bucket) {
    uint32_t octave = FIRST_OCTAVE + bucket / 4;
    return (UINT64_C(5) + bucket % 4) << (octave - 2);
}

void latency_add(struct latency *self, uint64_t ns) {
    if (self->total == LATENCY_ANSWERS_MAX) {
        self->total = 0;
        for (uint32_t i = 0; i < LATENCY_BUCKETS; i++)
            self->total += self->count[i] /= 2;
    }
    self->count[bucket_of(ns)]++;
    self->total++;
}

uint64_t latency_quantile_ns(const struct latency *self, double share) {
    if (self->total < LATENCY_KNOWN)
        return 0;
    uint32_t wanted = (uint32_t)(share * self->total), below = 0;
    for (uint32_t i = 0; i < LATENCY_BUCKETS; i++) {
        below += self->count[i];
        if (below > wanted)
            return bucket_end_ns(i);
    }
    return bucket_end_ns(LATENCY_BUCKETS - 1);
}
