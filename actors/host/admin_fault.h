/* Faults asked for at the admin address: EFFECT_FAULT of the coordinator. */
#ifndef TROUPE_HOST_ADMIN_FAULT_H
#define TROUPE_HOST_ADMIN_FAULT_H

#include "actors/actor.h"

/* "kill expert 1", "stop attention 0 for 2s", "slow expert 3 by 20ms for 5s": as in docs/faults.md, without
 * the time. Only in a process that was itself started with --allow-faults. */
int admin_fault(const char *run_dir, const char *text, struct failure *failure);

#endif
