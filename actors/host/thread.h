/* Threads of the process host. Signals belong to the first thread: all others block them. */
#ifndef TROUPE_HOST_THREAD_H
#define TROUPE_HOST_THREAD_H

#include <pthread.h>
#include <signal.h>
#include <string.h>

#include "actors/errors.h"

static inline int thread_start(pthread_t *ret, const char *name, void *(*run)(void *argument),
                               void *argument, struct failure *failure) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(ret, NULL, run, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error != 0)
        return fail(failure, ERR_NO_MEMORY, "cannot start the thread '%s': %s", name,
                    strerror(error));
    pthread_setname_np(*ret, name);
    return 0;
}

#endif
