/* One simulated run from a scenario: the cluster lives through its faults, then injection stops, everything that fell is started again,
 * and all requests must be answered, each exactly as without faults, within a bound of virtual time; nothing may be left over. */
#ifndef TROUPE_SIMULATOR_SIM_H
#define TROUPE_SIMULATOR_SIM_H

#include "simulator/scenario.h"
#include "simulator/tiny_model.h"

enum outcome {
    OUTCOME_GOOD,
    OUTCOME_SAFETY,          /* an invariant was violated */
    OUTCOME_LIVENESS,        /* not everything finished within the bound */
    OUTCOME_NONDETERMINISM,  /* two runs of one scenario differ */
    OUTCOME_CRASH,           /* an assertion failed, or worse: told by the process that ran it */
    OUTCOMES,
};
const char *outcome_name(enum outcome outcome);

struct report {
    enum outcome outcome;
    char text[1024];       /* what was violated, when */
    uint64_t hash;         /* of everything that happened */
    uint64_t steps, end_ns, calm_ns, bound_ns; /* virtual times: end of the run, end of injection, latest end allowed */
    uint64_t refused, finished, hung_up;
    uint64_t preemptions, prefix_hits, accepted_drafts; /* the latter in tokens; of the attention actors that lived to the end */
};

/* The models that scenarios name, opened once. */
struct sim {
    struct tiny_model model[TINY_MODELS];
    const struct kernels *kernels[2]; /* bf16, f32 */
};
int sim_open(struct sim *ret, struct failure *failure);
void sim_close(struct sim *self);

/* `trace`: a line per step, or NULL. */
void sim_run(const struct sim *self, const struct scenario *scenario, void (*trace)(void *context, const char *line),
             void *context, struct report *ret);
/* Runs it twice; if the hashes differ that is the outcome. */
void sim_run_twice(const struct sim *self, const struct scenario *scenario, struct report *ret);

#endif
