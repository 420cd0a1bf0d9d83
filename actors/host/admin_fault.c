/* See admin_fault.h. A stopped process is continued by a thread after its time; killing this very process
 * waits until the answer is on its way. */
#include "actors/host/admin_fault.h"

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "actors/host/clock.h"
#include "actors/host/inflict.h"
#include "actors/host/thread.h"

#define ANSWER_US 100000u

struct later {
    pid_t pid;
    int number;
    useconds_t us;
};

static void *signal_later(void *argument) {
    struct later later = *(struct later *)argument;
    free(argument);
    usleep(later.us);
    kill(later.pid, later.number);
    return NULL;
}

static int start_later(pid_t pid, int number, uint64_t us, struct failure *failure) {
    pthread_t thread;
    struct later *later = malloc(sizeof *later);
    ASSERT(later != NULL);
    *later = (struct later){pid, number, (useconds_t)us};
    int error = thread_start(&thread, "fault", signal_later, later, failure);
    if (error < 0)
        free(later);
    else
        pthread_detach(thread);
    return error;
}

static int carry_out(const char *run_dir, const struct fault *fault, struct failure *failure) {
    pid_t stopped = 0, self = getpid();
    if (fault->rank >= RANK_ALL && fault->role >= ROLE_ATTENTION)
        return fail(failure, ERR_INVALID, "say which %s, by its number", role_name(fault->role));
    bool mine = inflict_process(run_dir, fault->role, fault->role >= ROLE_ATTENTION ? fault->rank : 0) == self;
    if (mine && fault->kind == FAULT_STOP)
        return fail(failure, ERR_UNSUPPORTED, "a stopped coordinator could not be continued from here: troupe ctl fault can");
    if (mine && fault->kind <= FAULT_RESTART)
        return start_later(self, fault->kind == FAULT_KILL ? SIGKILL : SIGTERM, ANSWER_US, failure);
    int error = inflict(run_dir, fault, fault->rank, clock_random(), &stopped, failure);
    if (error < 0 || stopped == 0)
        return error;
    uint64_t us = (fault->for_ns > 0 ? fault->for_ns : 1000000000u) / 1000u;
    return start_later(stopped, SIGCONT, us < 60000000u ? us : 60000000u, failure);
}

int admin_fault(const char *run_dir, const char *text, struct failure *failure) {
    struct chaos_plan *plan = calloc(1, sizeof *plan);
    char line[256];
    ASSERT(plan != NULL);
    int error = 0;
    if (run_dir == NULL)
        error = fail(failure, ERR_STATE, "faults need a run directory");
    else if (strlen(text) > 200 || strpbrk(text, "\r\n#|") != NULL)
        error = fail(failure, ERR_INVALID, "fault: one statement of at most 200 characters expected");
    snprintf(line, sizeof line, "at 0ms %.200s", text);
    if (error == 0)
        error = chaos_plan_parse(plan, line, strlen(line), failure);
    if (error == 0)
        error = carry_out(run_dir, &plan->fault[0], failure);
    free(plan);
    return error;
}
