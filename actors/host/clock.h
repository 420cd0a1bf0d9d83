/* Time, randomness and the machine's name: what the process host knows and actors must be told. */
#ifndef TROUPE_HOST_CLOCK_H
#define TROUPE_HOST_CLOCK_H

#include <stdint.h>

#include "actors/limits.h"

uint64_t clock_now_ns(void);        /* monotonic; the `now` of every actor_step */
int64_t clock_unix_offset_ns(void); /* unix time in ns = clock_now_ns() + this */
uint64_t clock_random(void);        /* from the kernel, never 0 */

/* Names everything that can share memory with this process: boot, /dev/shm mount (containers have
 * their own) and user. */
void clock_host_name(char ret[static ADDRESS_BYTES_MAX]);

#endif
