/* DeepSeek's published expert-parallel load balancer, the baseline of the planner: replicate the
 * expert with the most load per copy until all slots are taken, then pack greedily, heaviest first.
 * Hierarchical: groups are packed onto hosts first, and each host is balanced by itself; global: as
 * if there were one host. Written from its description (README of github.com/deepseek-ai/EPLB and
 * the DeepSeek-V3 report, section 3.4). Pure. */
#ifndef TROUPE_EPLB_H
#define TROUPE_EPLB_H

#include "coordinator/plan.h"

struct eplb_task {
    uint32_t layers, experts, groups, processes, hosts;
    uint32_t slots;     /* per layer, all processes together */
    const double *load; /* [layers * experts] */
};

/* Hierarchical when the hosts divide groups and the rest, as published, else global (ask with hosts
 * = 1). ERR_INVALID, with the arithmetic: slots are fewer than experts, or processes do not divide
 * slots; too large: a plan's limits. */
int eplb_plan(struct expert_plan *ret, const struct eplb_task *task, struct failure *failure);

#endif
