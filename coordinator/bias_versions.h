/* Versions of the routing bias as the coordinator keeps them; the rooms of the coordinator share it through coordinator.h. */
#ifndef TROUPE_BIAS_VERSIONS_H
#define TROUPE_BIAS_VERSIONS_H

#include "actors/bias_table.h"
#include "coordinator/bias.h"

/* A version that exists. */
struct bias_live {
    uint64_t id;  /* 0: this place is free */
    float *delta; /* [pairs], owned */
    uint64_t retired_epoch; /* from this epoch on no gateway pins it anew */
    uint64_t idle_since_ns; /* nobody uses it; NEVER: somebody does, or it is current */
};

/* What a gateway or an attention actor has said that it holds. */
struct bias_held {
    uint64_t id[BIAS_VERSIONS_HELD_MAX];
    uint32_t users[BIAS_VERSIONS_HELD_MAX];
    uint32_t count;
    uint64_t sent_ns; /* when it was last told about versions */
};

struct bias_versions {
    struct bias_live version[BIAS_VERSIONS_MAX];
    uint64_t current; /* named by the newest epoch; 0: the model's own */
    uint64_t coming;  /* is being handed out; 0: none */
    uint32_t last_number;
    bool on; /* the biases follow the load */
    struct bias_rule rule;
    uint64_t interval_ns, next_ns;
    uint64_t *before, *rows; /* [pairs] totals at the start of the interval; scratch */
    double mean, worst;      /* imbalance of the layers in the last whole interval; negative: none yet */
    uint64_t learnt_epoch;
};

#endif
