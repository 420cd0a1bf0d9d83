/* Many streaming completions at once over loopback, and when each piece of each answer came. For
 * `troupe bench`. */
#ifndef TROUPE_HOST_BENCH_CLIENT_H
#define TROUPE_HOST_BENCH_CLIENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "actors/errors.h"

/* One request and its answer. Set the first group; the rest is filled in. */
struct bench_call {
    uint64_t start_after_ns;
    uint32_t prompt_tokens, max_tokens;
    uint64_t seed; /* of the prompt's tokens */
    uint32_t shared_tokens; /* of these the first ones, from a seed of their own */
    uint64_t shared_seed;

    bool done;
    int status;         /* HTTP; 0: no answer */
    uint64_t start_ns;  /* when it was sent */
    uint64_t *event_ns; /* [events]: when each piece of text came; malloc'd */
    uint32_t events, events_room;
};

struct bench_target {
    const char *host; /* numeric IPv4 or IPv6 address, or a name */
    uint16_t port;
    const char *api_key; /* NULL: none */
    uint32_t vocabulary;
};

/* Runs all calls to their ends, or until `timeout_ns`: what is not done then stays so. Prompts are
 * random tokens; answers are greedy and have exactly max_tokens tokens. */
int bench_calls_run(const struct bench_target *target, struct bench_call *calls, uint32_t count,
                    uint64_t timeout_ns, struct failure *failure);
void bench_calls_free(struct bench_call *calls, uint32_t count);
/* Status of GET path, 0: no answer. Waits at most a second. */
int bench_get(const struct bench_target *target, const char *path);

#endif
