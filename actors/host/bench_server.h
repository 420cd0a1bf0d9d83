/* The troupe that `troupe bench` starts for itself, and what its processes have used: processor
 * time, sleeps, memory. */
#ifndef TROUPE_HOST_BENCH_SERVER_H
#define TROUPE_HOST_BENCH_SERVER_H

#include <sys/types.h>

#include "actors/actor.h"
#include "actors/host/options.h"

struct bench_server {
    pid_t pid;
    uint16_t port;
    char run_dir[64];
};

/* Starts `troupe serve` with the model, numbers of processes and knobs of `options`; returns once
 * it is ready. */
int bench_server_start(struct bench_server *ret, const struct options *options,
                       struct failure *failure);
void bench_server_stop(struct bench_server *self); /* none running: nothing */

/* Totals since the processes began, by role (ROLE_NONE: all of them together). */
struct bench_usage {
    struct {
        double cpu_s;       /* on a processor */
        double queued_s;    /* could have run, but others did */
        uint64_t sleeps;    /* voluntary context switches: each is a wake-up later */
        uint64_t preempted; /* involuntary ones */
        uint64_t resident_bytes;
    } role[ROLE_CONTROL + 1];
    double client_cpu_s;   /* of the calling process */
    double machine_busy_s; /* of all processors together, by anybody */
    double machine_idle_s;
    uint64_t now_ns;
};
void bench_usage_read(const struct bench_server *self, struct bench_usage *ret);

#endif
