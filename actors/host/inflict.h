/* Carries a fault of a plan out on one process of a troupe that was started with --allow-faults. */
#ifndef TROUPE_HOST_INFLICT_H
#define TROUPE_HOST_INFLICT_H

#include <sys/types.h>

#include "actors/host/chaos_plan.h"

/* 0: not running. */
pid_t inflict_process(const char *run_dir, enum role role, uint32_t rank);
/* `ret_stopped`: the process that must be sent SIGCONT after the fault's time; 0: none. */
int inflict(const char *run_dir, const struct fault *fault, uint32_t rank, uint64_t seed, pid_t *ret_stopped,
            struct failure *failure);

#endif
