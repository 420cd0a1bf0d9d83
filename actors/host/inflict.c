/* See inflict.h, and inject.h for what happens inside of the process. */
#include "actors/host/inflict.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "actors/host/inject.h"

static void name_of(enum role role, uint32_t rank, char ret[static 48]) {
    if (role >= ROLE_ATTENTION)
        snprintf(ret, 48, "%s-%u", role_name(role), rank);
    else
        snprintf(ret, 48, "%s", role_name(role));
}

pid_t inflict_process(const char *run_dir, enum role role, uint32_t rank) {
    char path[400], name[48];
    int pid = 0;
    name_of(role, rank, name);
    snprintf(path, sizeof path, "%.300s/%s.pid", run_dir, name);
    FILE *file = fopen(path, "r");
    if (file == NULL)
        return 0;
    if (fscanf(file, "%d", &pid) != 1)
        pid = 0;
    fclose(file);
    return pid;
}

int inflict(const char *run_dir, const struct fault *fault, uint32_t rank, uint64_t seed, pid_t *ret_stopped,
            struct failure *failure) {
    char name[48], socket[400], rule[200];
    pid_t pid = inflict_process(run_dir, fault->role, rank);
    *ret_stopped = 0;
    name_of(fault->role, rank, name);
    if (pid <= 0)
        return fail(failure, ERR_NOT_FOUND, "there is no process %s in %s now", name, run_dir);
    snprintf(socket, sizeof socket, "%.300s/%s.faults", run_dir, name);
    if (access(socket, W_OK) != 0)
        return fail(failure, ERR_STATE, "%s takes no faults: start the troupe with --allow-faults", name);
    if (fault->kind <= FAULT_STOP && fault->layer == UINT32_MAX) {
        int number = fault->kind == FAULT_KILL ? SIGKILL : fault->kind == FAULT_STOP ? SIGSTOP : SIGTERM;
        if (kill(pid, number) != 0)
            return fail(failure, ERR_STATE, "signal %d to %s: %s", number, name, strerror(errno));
        *ret_stopped = number == SIGSTOP ? pid : 0;
        return 0;
    }
    snprintf(rule, sizeof rule, "%s share %.9g for %llu by %llu layer %u seed %llu", fault_kind_name(fault->kind),
             fault->share, (unsigned long long)(fault->for_ns / 1000000u),
             (unsigned long long)(fault->by_ns / 1000000u), fault->layer, (unsigned long long)(seed + rank + 1));
    if (!inject_tell(run_dir, name, rule))
        return fail(failure, ERR_STATE, "%s did not take the fault '%s'", name, rule);
    return 0;
}
