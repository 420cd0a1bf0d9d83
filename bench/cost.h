/* What a step must read and compute at least, from the shapes of a model: the denominators of
 * "share of the limit". */
#ifndef TROUPE_BENCH_COST_H
#define TROUPE_BENCH_COST_H

#include "model/weights.h"

struct model_cost {
    double fixed_bytes;  /* weights that every step reads: attention, dense, shared experts, gates,
                            head */
    double expert_bytes; /* all routed experts of all MoE layers */
    double chosen;       /* share of the routed experts that one token takes, k / experts */
    double token_flops;  /* 2 x active parameters without the head: one prompt token; scores and
                            values not counted */
    double head_flops;
};
void cost_of_model(struct model_cost *ret, const struct model *model);
/* Weight bytes read by a decode step of `rows` tokens, as stored, each touched expert once, if
 * tokens chose experts evenly. */
double cost_step_bytes(const struct model_cost *self, double rows);

#endif
