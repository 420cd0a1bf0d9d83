/* A plan of faults for `troupe chaos`: what runs, and what is done to it when. One statement a line, '#' begins a comment:
 *
 *   streams 16 | tokens 96 | experts 4 | attention 1 | samplers 1 | for 20s | window 2s | knob NAME VALUE
 *   at TIME KIND ROLE [RANK|all] [for TIME] [share X] [by TIME] [layer N]
 *   every TIME random [ROLE]...
 *
 * TIME: 500ms or 2s. Without a rank one is drawn from the seed. docs/faults.md lists the kinds. */
#ifndef TROUPE_HOST_CHAOS_PLAN_H
#define TROUPE_HOST_CHAOS_PLAN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "actors/actor.h"

#define PLAN_FAULTS_MAX 4096
#define PLAN_KNOBS_MAX  32
#define RANK_ANY        UINT32_MAX
#define RANK_ALL        (UINT32_MAX - 1)

enum fault_kind {
    FAULT_KILL,    /* SIGKILL; the supervisor starts it again */
    FAULT_RESTART, /* SIGTERM; it ends in order and is started again */
    FAULT_STOP,    /* SIGSTOP, SIGCONT after the time given */
    /* the rest is carried out inside the process, which must have been started with --allow-faults */
    FAULT_SLOW,
    FAULT_DELAY,
    FAULT_DROP,
    FAULT_DUPLICATE,
    FAULT_CORRUPT,
    FAULT_PARTITION,
    FAULT_DISK_ERROR,
    FAULT_OOM,
    FAULT_LIE,
    FAULT_KINDS,
};
const char *fault_kind_name(enum fault_kind kind);

struct fault {
    enum fault_kind kind;
    enum role role;
    uint32_t rank;
    uint64_t at_ns, for_ns, by_ns;
    double share;
    uint32_t layer; /* UINT32_MAX: any; kill, stop: when it works on this layer */
};

struct chaos_plan {
    char name[64];
    uint32_t streams, tokens;
    uint64_t experts, attention, samplers;
    uint64_t for_ns;    /* length of the load under faults */
    uint64_t window_ns; /* what follows a fault within this time is put down to it */
    uint64_t every_ns;  /* 0: nothing at random */
    uint32_t random_roles; /* bits */
    struct fault fault[PLAN_FAULTS_MAX];
    uint32_t faults;
    char knob[PLAN_KNOBS_MAX][2][64];
    uint32_t knobs;
};

int chaos_plan_parse(struct chaos_plan *ret, const char *text, size_t size, struct failure *failure);
/* Draws what the plan leaves to chance. */
void chaos_plan_draw(struct chaos_plan *self, uint64_t seed);
/* "kill expert 2"; static buffer. */
const char *fault_text(const struct fault *fault);

#endif
