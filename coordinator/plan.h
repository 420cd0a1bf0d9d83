/* A plan: which process holds which (layer, expert), as an immutable value, with its figures and
 * its JSON form. Pure. */
#ifndef TROUPE_PLAN_H
#define TROUPE_PLAN_H

#include <stddef.h>
#include <stdbool.h>
#include <stdint.h>

#include "actors/errors.h"

/* Pair = layer * experts + expert. Every pair has at least one copy and at most REPLICAS_MAX. A
 * process that is named twice for a pair takes two shares of its rows, but needs the weights once
 * (EPLB does that; the planner does not). */
struct expert_plan {
    uint32_t layers, experts, processes;
    uint32_t *first;  /* [layers * experts + 1] where a pair's copies begin in `holder` */
    uint32_t *holder; /* [first[layers * experts]] processes, ascending within a pair */
};

/* Room for `copies` in all; first and holder are zero. ERR_NO_MEMORY, ERR_TOO_LARGE. */
int plan_alloc(struct expert_plan *ret, uint32_t layers, uint32_t experts, uint32_t processes,
               uint64_t copies, struct failure *failure);
void plan_free(struct expert_plan *self);
uint32_t plan_copies(const struct expert_plan *self);
/* Distinct (pair, process) held in `next` and not in `previous` (NULL: none was held): what has to
 * be loaded. Layers and experts are equal; a process of a higher number than `previous` knows held
 * nothing. */
uint32_t plan_moved(const struct expert_plan *previous, const struct expert_plan *next);

/* Mean / max of the processes' loads in one layer, each load divided by the process's speed (NULL:
 * all 1); 1 for a layer without load. The rows of an expert are shared among its copies in
 * proportion to the speeds of their holders. load: [experts]; scratch: [processes]. */
double plan_balancedness(const struct expert_plan *self, uint32_t layer, const double *load,
                         const double *speed, double *scratch);

/* Over layers, or over anything else. */
struct plan_summary {
    double worst, median, mean;
};
struct plan_summary plan_summarise(double *value, uint32_t count); /* sorts `value` */

/* {"layers": L, "experts": E, "processes": P, "placement": [[[process, ...], ...], ...]}:
 * [layer][expert]. `figures` (NULL: none) is the text of a JSON object that goes in as "figures".
 * malloc'd; NULL: out of memory. */
char *plan_to_json(const struct expert_plan *self, const char *figures);
/* ERR_INVALID, ERR_TOO_LARGE, ERR_NO_MEMORY; other keys are ignored. `file` names it in messages.
 */
int plan_from_json(struct expert_plan *ret, const char *text, size_t size, const char *file,
                   struct failure *failure);

#endif
