/* Fork and join for kernels.
 *
 * A job's parts are handed out by one 64-bit ticket: upper half the number of parts, lower half the
 * next part. Whoever takes a part below the number of parts owns it, and the job cannot end before
 * that part has, so `task` and `argument` can be read after the ticket. A thread that comes late
 * finds the ticket used up, or the ticket of the next job, which it may join as well.
 *
 * The products of a layer follow each other within microseconds, and waking a thread takes tens of
 * them: a product of a megabyte of weights would be over before help arrives. So whoever waits
 * looks again for a moment before it sleeps, giving its processor away at every look to whoever can
 * use it; while a program runs (pool_begin) it looks until the program ends, and if the last one
 * had jobs, sleepers are woken when the next one begins, not when its first job comes. */
#include "actors/host/pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "actors/host/clock.h"
#include "actors/host/futex.h"
#include "kernels/ops.h"

struct pool {
    int width;
    pthread_t *thread; /* [width - 1] */
    int threads;       /* started */
    void (*task)(void *argument, int part, int parts);
    void *argument;
    _Alignas(64) _Atomic uint64_t ticket;
    _Alignas(64) _Atomic uint32_t jobs; /* workers sleep on this */
    _Atomic uint32_t sleepers;
    _Atomic uint32_t stop;
    _Atomic uint32_t busy;                   /* between pool_begin and pool_end */
    uint32_t jobs_before;                    /* when that began */
    bool worth;                              /* there were jobs the last time */
    _Alignas(64) _Atomic uint32_t remaining; /* parts not yet done; the caller sleeps on this */
    _Atomic uint32_t caller_sleeps;
};

#define LOOK_NS 40000u /* about what a sleep and a wake-up cost */

/* Waits until *word is no longer `value`, but no longer than LOOK_NS after *busy has become 0. */
static void look_for_a_while(_Atomic uint32_t *word, uint32_t value, _Atomic uint32_t *busy) {
    uint64_t start = clock_now_ns();
    do {
        for (int i = 0; i < 16; i++) {
            if (atomic_load_explicit(word, memory_order_relaxed) != value)
                return;
            __builtin_ia32_pause();
        }
        sched_yield();
        if (atomic_load_explicit(busy, memory_order_relaxed))
            start = clock_now_ns();
    } while (clock_now_ns() - start < LOOK_NS);
}

/* Runs parts until none is left. */
static void take_parts(struct pool *self) {
    for (;;) {
        uint64_t ticket = atomic_load(&self->ticket);
        if ((uint32_t)ticket >= ticket >> 32)
            return; /* without the addition: the lower half must not grow for ever */
        ticket = atomic_fetch_add(&self->ticket, 1);
        uint32_t part = (uint32_t)ticket, parts = (uint32_t)(ticket >> 32);
        if (part >= parts)
            return;
        self->task(self->argument, (int)part, (int)parts);
        if (atomic_fetch_sub(&self->remaining, 1) == 1 && atomic_load(&self->caller_sleeps))
            futex_wake(&self->remaining, 1, 0);
    }
}

static void *worker(void *argument) {
    struct pool *self = argument;
    numerics_enter();
    for (;;) {
        uint32_t seen = atomic_load(&self->jobs);
        if (atomic_load(&self->stop)) {
            scratch_free();
            return NULL;
        }
        take_parts(self);
        look_for_a_while(&self->jobs, seen, &self->busy);
        atomic_fetch_add(&self->sleepers, 1);
        futex_wait(&self->jobs, seen, UINT64_MAX, 0);
        atomic_fetch_sub(&self->sleepers, 1);
    }
}

static void run(void *pool, void (*task)(void *argument, int part, int parts), void *argument,
                int parts) {
    struct pool *self = pool;
    if (parts <= 1 || self->threads == 0) {
        for (int part = 0; part < parts; part++)
            task(argument, part, parts);
        return;
    }
    self->task = task;
    self->argument = argument;
    atomic_store(&self->remaining, (uint32_t)parts);
    atomic_store(&self->ticket, (uint64_t)(uint32_t)parts << 32);
    atomic_fetch_add(&self->jobs, 1);
    if (atomic_load(&self->sleepers) > 0)
        futex_wake(&self->jobs, parts - 1 < self->threads ? parts - 1 : self->threads, 0);
    take_parts(self);
    uint32_t left;
    for (int looks = 0; looks < parts && (left = atomic_load(&self->remaining)) != 0; looks++)
        look_for_a_while(&self->remaining, left, &self->busy);
    if (atomic_load(&self->remaining) == 0)
        return;
    atomic_store(&self->caller_sleeps, 1);
    while ((left = atomic_load(&self->remaining)) != 0)
        futex_wait(&self->remaining, left, UINT64_MAX, 0);
    atomic_store(&self->caller_sleeps, 0);
}

void pool_begin(struct pool *self) {
    if (self->threads == 0)
        return;
    self->jobs_before = atomic_load_explicit(&self->jobs, memory_order_relaxed);
    if (!self->worth)
        return;
    atomic_store(&self->busy, 1);
    if (atomic_load(&self->sleepers) > 0)
        futex_wake(&self->jobs, self->threads, 0);
}

void pool_end(struct pool *self) {
    if (self->threads == 0)
        return;
    self->worth = atomic_load_explicit(&self->jobs, memory_order_relaxed) != self->jobs_before;
    atomic_store(&self->busy, 0);
}

int pool_open(struct pool **ret, int width, struct failure *failure) {
    ASSERT(width >= 1);
    struct pool *self = aligned_alloc(64, (sizeof *self + 63) & ~(size_t)63);
    if (self == NULL)
        return fail(failure, ERR_NO_MEMORY, "no memory for a thread pool");
    memset(self, 0, sizeof *self);
    self->width = width;
    self->thread = calloc((size_t)width, sizeof *self->thread);
    if (self->thread == NULL) {
        free(self);
        return fail(failure, ERR_NO_MEMORY, "no memory for %d threads", width);
    }
    sigset_t all, before; /* signals belong to the actor thread */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = 0;
    while (self->threads < width - 1 && error == 0) {
        error = pthread_create(&self->thread[self->threads], NULL, worker, self);
        if (error == 0)
            self->threads++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error != 0) {
        int started = self->threads;
        pool_close(&self);
        return fail(failure, ERR_NO_MEMORY, "cannot start compute thread %d of %d: %s", started + 2,
                    width, strerror(error));
    }
    *ret = self;
    return 0;
}

void pool_close(struct pool **pool) {
    struct pool *self = *pool;
    if (self == NULL)
        return;
    atomic_store(&self->stop, 1);
    atomic_fetch_add(&self->jobs, 1);
    futex_wake(&self->jobs, INT32_MAX, 0);
    for (int i = 0; i < self->threads; i++)
        pthread_join(self->thread[i], NULL);
    free(self->thread);
    free(self);
    *pool = NULL;
}

struct parallel pool_parallel(struct pool *self) {
    return (struct parallel){run, self, self->width};
}

int pool_processors(void) {
    cpu_set_t set;
    int count = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
    return count < 1 ? 1 : count;
}
