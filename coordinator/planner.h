/* Which process should hold copies of which experts, from a forecast of their loads: as balanced as
 * it pays to be. Pure and deterministic. docs/planner.md has the objective, the algorithm and what
 * was measured. */
#ifndef TROUPE_PLANNER_H
#define TROUPE_PLANNER_H

#include <stdbool.h>

#include "coordinator/plan.h"

/* What a move costs and what balance gains. All zero: moves are free. */
struct planner_price {
    uint64_t expert_bytes; /* weights of one copy */
    double
        bytes_per_second; /* at which one process takes weights in, in the background; 0: at once */
    double slowdown;      /* share of its speed that a process loses meanwhile, 0..1 */
    double row_ns;        /* what one row of one expert takes on a process of speed 1 */
    double horizon; /* windows (of the length of the loads') that a plan is expected to last */
};

struct planner_task {
    uint32_t layers, experts;
    uint32_t groups;    /* of consecutive experts, for hierarchical plans; divides experts */
    const double *load; /* [layers * experts] rows expected in a window */
    uint32_t processes, hosts;
    const uint32_t *host;     /* [processes] failure domain; NULL: equal runs of processes */
    const double *speed;      /* [processes] rows per time, relative; NULL: all 1 */
    const uint32_t *capacity; /* [processes] copies, all layers together; NULL: layers * (experts +
                                 spare) in equal parts */
    uint32_t spare;           /* copies per layer beyond one of each expert */
    bool hierarchical;        /* a group has a home host that holds a copy of each of its experts */
    const struct expert_plan *previous; /* NULL: nothing is held yet */
    struct planner_price price;
};

struct planner_figures {
    struct plan_summary before, after; /* balancedness on the forecast; before: with what stays of
                                          `previous` (0: there is none) */
    uint32_t copies, moved;
    uint64_t bytes; /* to load */
    double load_s;  /* until the process with most to load has it */
    double stall_ns,
        gain_ns; /* over the horizon, all layers: time lost to loading, time won by balance */
    double
        home_share; /* hierarchical: rows served in the home host of their expert's group; else 0 */
    bool proposed;  /* false: `previous` stays as it is, because nothing pays */
};

/* ERR_INVALID: what the task asks for cannot be (not enough slots: with the arithmetic), loads or
 * speeds that are no numbers; ERR_TOO_LARGE; ERR_NO_MEMORY. If nothing that could be changed pays,
 * ret is a copy of `previous`. */
int planner_plan(struct expert_plan *ret, struct planner_figures *ret_figures,
                 const struct planner_task *task, struct failure *failure);

#endif
