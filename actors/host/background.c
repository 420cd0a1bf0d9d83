/* See background.h. On Linux niceness belongs to a thread, and one without privileges can only be made nicer.
 * So what is to end and leave the process at its usual priority gets a thread to do it in; threads that it
 * starts would inherit, so it must start none. */
#include "actors/host/background.h"

#include <sys/resource.h>
#include <unistd.h>

#include "actors/host/thread.h"
#include "kernels/numerics.h"
#include "kernels/ops.h"

struct work {
    uint32_t nice;
    int (*task)(void *argument, struct failure *failure);
    void *argument;
    struct failure *failure;
    int result;
};

void background_enter(uint32_t nice) {
    int now = getpriority(PRIO_PROCESS, (id_t)gettid());
    if (now < (int)nice) /* refused: it works on as it did */
        setpriority(PRIO_PROCESS, (id_t)gettid(), (int)nice);
}

static void *run(void *argument) {
    struct work *work = argument;
    background_enter(work->nice);
    numerics_enter();
    work->result = work->task(work->argument, work->failure);
    scratch_free();
    return NULL;
}

int background_run(uint32_t nice, int (*task)(void *argument, struct failure *failure),
                   void *argument, struct failure *failure) {
    struct work work = {nice, task, argument, failure, 0};
    pthread_t thread;
    int error = thread_start(&thread, "background", run, &work, failure);
    if (error < 0)
        return error;
    pthread_join(thread, NULL);
    return work.result;
}
