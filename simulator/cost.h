/* What things take in a cluster that is not there: the time of layers from who holds what. Pure arithmetic, no events.
 *
 * The rows of an expert are shared among its live copies in proportion to the speeds of their holders, as the dispatch's water-filling
 * does in the long run. A process's time in a layer is its rows divided by its speed; a layer takes as long as its slowest process;
 * balancedness is the time if all rows were shared by all processes in proportion to speed, divided by that. A process that
 * loads weights is slower by a given share meanwhile. */
#ifndef TROUPE_SIMULATOR_COST_H
#define TROUPE_SIMULATOR_COST_H

#include <stdbool.h>
#include <stdint.h>

/* Who holds what, as an epoch says. */
struct cost_placement {
    uint32_t *first;   /* [pairs + 1] */
    uint16_t *holder;  /* [first[pairs]] processes */
};

struct cost_process {
    bool alive, loading;
    double speed;
};

struct cost_model {
    uint32_t layers, experts, processes;
    double slowdown;
    double *rows;    /* [layers * processes] rows per second at each, of the load last given */
    double unserved; /* rows per second without a live holder */
    double total;    /* rows per second of all layers */
};

struct cost_balance {
    double mean, worst; /* balancedness over layers */
    double stall;       /* time of all layers with loading / without, less 1 */
};

bool cost_open(struct cost_model *self, uint32_t layers, uint32_t experts, uint32_t processes,
               double slowdown);
void cost_close(struct cost_model *self);
/* Forgets the load; then each call adds `share` of it as one placement routes it. load: [layers * experts] rows per second. */
void cost_clear(struct cost_model *self);
void cost_add(struct cost_model *self, const struct cost_placement *placement, const double *load,
              double share, const struct cost_process *process);
struct cost_balance cost_balance(const struct cost_model *self, const struct cost_process *process);
/* Rows per second of a process, all layers. */
double cost_rows(const struct cost_model *self, uint32_t process);

#endif
