/* A troupe of real processes for a live test: started on a free port with its own run directory, stopped, and looked at afterwards
 * for anything that it left behind. */
#ifndef TROUPE_TEST_CLUSTER_H
#define TROUPE_TEST_CLUSTER_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

struct cluster {
    pid_t pid; /* supervisor */
    uint16_t port;
    char run_dir[128];
    char log[160];
    bool faults; /* processes are killed on purpose: restarts are no failure */
};

uint16_t free_port(void);
/* `arguments`: further options of `troupe serve`, separated by spaces. Returns false (with the log printed) if /ready does not answer 200
 * within a minute. */
bool cluster_start(struct cluster *self, const char *model, const char *arguments);
/* SIGTERM, waits; true if it ended with status 0 within 20 s, left no run directory, and (unless `faults`) no process died before. */
bool cluster_stop(struct cluster *self);
/* Value of a metric summed over its labels, or -1 if absent. */
double cluster_metric(const struct cluster *self, const char *name);
/* Process ids of the role's processes ("expert"), children of the supervisor. */
uint32_t cluster_pids(const struct cluster *self, const char *role, pid_t *ret, uint32_t capacity);

#endif
