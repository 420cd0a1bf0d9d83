/* One layer of a plan in the making; private to the planner.
 *   planner.c        checks the task, shares out slots, prices, figures
 *   planner_layer.c  copies of one layer: adding, removing, the loads that follow
 *   planner_start.c  a layer's first placement: from the previous plan, or from nothing
 *   planner_search.c steps that lower the hottest process
 *
 * Rows of an expert are shared among its copies in proportion to the speeds of their holders. So
 * every holder of expert x spends the same time on it, unit[x] = load[x] / (sum of its holders'
 * speeds), and a process's time is the sum of the units of what it holds. */
#ifndef TROUPE_PLANNER_LAYER_H
#define TROUPE_PLANNER_LAYER_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>

#include "actors/limits.h"
#include "coordinator/planner.h"

#define NONE UINT32_MAX

enum { HELD = 1, HELD_BEFORE = 2 };

/* One copy that waits for a place, when a layer is placed from nothing. */
struct share {
    double time;
    uint32_t expert;
};

struct layer {
    /* given, the same for all layers */
    uint32_t experts, processes, hosts, slots; /* slots: most copies in the layer */
    const uint32_t *host;                      /* [processes] */
    const double *speed;                       /* [processes] */
    uint32_t open_hosts;                       /* hosts whose processes may hold anything */
    /* given for this layer */
    const double *weight;  /* [experts] forecast */
    const uint32_t *limit; /* [processes] most copies */
    const uint32_t *home;  /* [experts] home host or NONE */

    /* state */
    uint16_t *holder;      /* [experts * REPLICAS_MAX] */
    uint32_t *copies;      /* [experts] */
    double *speeds, *unit; /* [experts] */
    uint16_t *slot;        /* [processes * experts] experts held */
    uint32_t *used;        /* [processes] */
    double *sum, *square;  /* [processes] of the units held: sum, sum of squares */
    double *time;          /* [processes] sum + risk * sqrt(square) */
    double risk;
    uint8_t *flag;         /* [processes * experts] */
    uint8_t *on_host;      /* [experts * hosts] copies */
    uint32_t total, moved; /* copies; those not HELD_BEFORE */
    struct share *share;   /* [slots] scratch */
    uint32_t *wanted;      /* [experts] scratch */
    double *planned;       /* [processes] scratch */
    bool *bound;           /* [processes] scratch: nothing can lower it */
};

/* A step: expert x goes from process p to q (or is copied: p keeps it; or only leaves p: q NONE),
 * and expert y (or NONE) leaves q, for p if y_to_p. */
struct step {
    uint32_t x, p, q, y;
    bool keep, y_to_p;
};

static inline uint8_t *layer_flag(const struct layer *self, uint32_t process, uint32_t expert) {
    return &self->flag[(size_t)process * self->experts + expert];
}
static inline bool layer_holds(const struct layer *self, uint32_t process, uint32_t expert) {
    return (*layer_flag(self, process, expert) & HELD) != 0;
}
/* How many of an expert's copies one host may hold: half of them, so that most experts outlive a
 * host and the rest of the rows have somewhere to go; of two copies one. */
static inline uint32_t layer_host_limit(const struct layer *self, uint32_t copies) {
    return self->open_hosts > 1 ? (copies + 1) / 2 : copies;
}
static inline double layer_time(const struct layer *self, double sum, double square) {
    return self->risk > 0 && square > 0 ? sum + self->risk * sqrt(square) : sum;
}

/* planner_layer.c */
void layer_clear(struct layer *self);
void layer_add(struct layer *self, uint32_t process, uint32_t expert);
void layer_remove(struct layer *self, uint32_t process, uint32_t expert);
void layer_apply(struct layer *self, const struct step *step);
uint32_t layer_hottest(const struct layer *self);
/* May expert x get a copy on q (leaving p unless NONE), as far as failure domains go? */
bool layer_may_add(const struct layer *self, uint32_t x, uint32_t q, uint32_t p);
/* May it lose its copy on q, which is not its last? */
bool layer_may_remove(const struct layer *self, uint32_t x, uint32_t q);
/* May its copy leave p for q, as far as its home goes? q NONE: for nowhere. */
bool layer_may_leave(const struct layer *self, uint32_t x, uint32_t p, uint32_t q);

/* planner_start.c. The layer is cleared. previous: NULL or a plan; layer: its number there. */
void layer_start(struct layer *self, const struct expert_plan *previous, uint32_t layer);

/* planner_search.c */
/* The way of a search, and how far along it is worth going. */
struct path {
    struct step *step; /* [room] */
    uint32_t room, steps, best_steps;
    double best_value; /* time won less copy_cost per moved copy, after best_steps; not below 0 */
    double copy_cost;
    double level_time;  /* of the process to be lowered, when the search turned to it */
    double won, weight; /* at earlier levels; what this one counts for */
    uint32_t start_moved, levels;
};
/* Applies steps: first copies go to the experts that need them most, then the hottest process is
 * lowered, best gain per copy first, until nothing is left that could pay. copy_cost: what one
 * moved copy costs, in time for the same span as the weights. */
void layer_search(struct layer *self, double copy_cost, struct path *path);
/* The step that takes x from p to host h with the lowest highest time; false: there is none. */
bool layer_bring_home(struct layer *self, uint32_t x, uint32_t p, uint32_t h, struct step *ret);

#endif
