/* How long answers take: a small histogram that forgets. Pure.
 *
 * Four buckets per octave from 16 us to 1 s; counts are halved when they reach a limit, so that the last few hundred answers decide. */
#ifndef TROUPE_LATENCY_H
#define TROUPE_LATENCY_H

#include <stdint.h>

#define LATENCY_BUCKETS     64u
#define LATENCY_KNOWN       16u  /* fewer answers say nothing */
#define LATENCY_ANSWERS_MAX 512u /* weights are halved here */

struct latency {
    uint16_t count[LATENCY_BUCKETS];
    uint32_t total;
};

void latency_add(struct latency *self, uint64_t ns);
/* Upper bound of the bucket in which the share of the answers ends; 0: too few are known. */
uint64_t latency_quantile_ns(const struct latency *self, double share);

#endif
