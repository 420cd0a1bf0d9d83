/* Work that must not hold up rows: opening an engine, packing experts, taking a process down. The kernel lets
 * everybody else on the machine go first (knob background_nice). */
#ifndef TROUPE_HOST_BACKGROUND_H
#define TROUPE_HOST_BACKGROUND_H

#include <stdint.h>

#include "actors/errors.h"

/* The calling thread, for good: going back would take privileges. */
void background_enter(uint32_t nice);
/* Runs the task in a thread of its own and waits for it; returns what it returns. */
int background_run(uint32_t nice, int (*task)(void *argument, struct failure *failure),
                   void *argument, struct failure *failure);

#endif
