/* A large troupe on virtual time with a cost model in the place of kernels: the coordinator is the same code as in the process host (members,
 * copies, operations, epochs, rebalancing); attention actors are generators that route the rows of a recorded trace and report them in
 * heartbeats; expert processes load copies at a given rate and compute nothing. So a policy can be judged before it is deployed. The token-
 * checking simulator is simulator/world.h. docs/simulator.md tells the file format and what is modelled. */
#ifndef TROUPE_SIMULATOR_CLUSTER_H
#define TROUPE_SIMULATOR_CLUSTER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "actors/limits.h"
#include "config/settings.h"
#include "coordinator/trace.h"

#define CLUSTER_GROUPS_MAX  64u
#define CLUSTER_CHANGES_MAX 256u
#define CLUSTER_EXPERTS_MAX 512u /* expert processes */

/* Expert processes of one kind, on hosts of their own. */
struct cluster_group {
    uint32_t processes, hosts;
    uint32_t copies;     /* room of one process, all layers together; 0: as much as is placed */
    double speed;        /* relative */
    double load_bytes_s; /* at which one process takes weights in */
};

enum cluster_change_kind { CLUSTER_LOSE, CLUSTER_SLOW, CLUSTER_DRAIN };
struct cluster_change {
    enum cluster_change_kind kind;
    uint64_t at_ns, for_ns; /* for_ns 0: for good */
    uint32_t process;
    double speed; /* slow */
};

enum cluster_policy { CLUSTER_NONE, CLUSTER_TROUPE, CLUSTER_EPLB };

struct cluster_task {
    struct cluster_group group[CLUSTER_GROUPS_MAX];
    uint32_t groups, processes, hosts; /* processes, hosts: of all groups */
    struct cluster_change change[CLUSTER_CHANGES_MAX];
    uint32_t changes;
    uint32_t attention, experts_per_token;
    uint64_t span_ns, expert_bytes;
    double row_ns;    /* what a row of one expert takes at speed 1 */
    double slowdown;  /* share of its speed that a process loses while it loads */
    double tokens_s;  /* of all attention actors together */
    struct settings settings; /* rebalance_interval_ms, rebalance_spare and others are the policy's */
    /* Not in the file: */
    uint64_t seed;
    enum cluster_policy policy;
    const struct load_trace *trace; /* borrowed */
    void (*log)(void *context, uint64_t now_ns, const char *line); /* the coordinator's log; NULL: none */
    /* The live view's feed every `feed_ns`, which is at least the interval of a gateway's; NULL: none. keyframe: a reader can begin there. */
    void (*feed)(void *context, uint64_t now_ns, bool keyframe, const void *events, size_t size);
    uint64_t feed_ns;
    void *context;
};

/* What happened while one window of the trace lasted, or in the whole run. Shares and means are over time. */
struct cluster_figures {
    double mean, worst;   /* balancedness: mean of the layers, worst layer; mean over time */
    double lowest;        /* worst layer at any time */
    double stall;         /* time that layers took longer because processes loaded, of all time */
    double unserved_s;    /* rows found no live holder for so long, in seconds of the whole load */
    uint64_t copies, bytes; /* loaded */
    uint64_t placed;        /* copies in the newest epoch, at the end */
    uint64_t epochs, operations, aborted;
};

struct cluster_report {
    struct cluster_figures total, *window; /* [windows], owned */
    uint32_t windows;
    uint64_t first_copies; /* loaded before all experts had a place for the first time */
    double serving_after_s;
    uint64_t events, messages, hash;
};

/* Fills everything that a file may say. ERR_INVALID names the line, what was expected and what was found. */
int cluster_parse(struct cluster_task *ret, const char *text, size_t size, struct failure *failure);
/* ERR_INVALID: task and trace do not fit: with the arithmetic. ERR_STATE: the troupe refused somebody or never served. */
int cluster_run(struct cluster_report *ret, const struct cluster_task *task, struct failure *failure);
void cluster_report_free(struct cluster_report *self);

#endif
