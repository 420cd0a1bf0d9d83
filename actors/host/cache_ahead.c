/* See cache_ahead.h. Fresh memory costs whoever touches it first, half a second for a gigabyte and
 * several where the machine is a virtual one whose host has to find it as well: a prompt of 512
 * tokens waited 18 of 420 ms for it.
 *
 * A page is asked for by comparing a byte with 0 and, if it is, exchanging it for 0: a write to the
 * system, and nothing to rows that are written meanwhile. (MADV_POPULATE_WRITE would hold the lock
 * of the whole address space while a thread of low priority clears two megabytes.) */
#include "actors/host/cache_ahead.h"

#include <stdatomic.h>
#include <stdlib.h>

#include "actors/host/background.h"
#include "actors/host/thread.h"

#define AHEAD_BYTES ((size_t)128 << 20)
#define STEP_BYTES  4096
#define NICEST      19

struct cache_ahead {
    struct engine *engine;
    pthread_t thread;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    bool wanted;
    _Atomic bool stop;
    _Atomic bool asleep;
};

static void touch(uint8_t *memory, size_t bytes) {
    for (size_t at = 0; at < bytes; at += STEP_BYTES) {
        uint8_t zero = 0;
        __atomic_compare_exchange_n(memory + at, &zero, 0, false, __ATOMIC_RELAXED,
                                    __ATOMIC_RELAXED);
    }
}

static void *run(void *argument) {
    struct cache_ahead *self = argument;
    background_enter(NICEST); /* whoever loads weights goes first */
    for (;;) {
        void *memory;
        size_t bytes;
        while (!atomic_load(&self->stop) &&
               (bytes = engine_cache_ahead(self->engine, AHEAD_BYTES, &memory)) > 0)
            touch(memory, bytes);
        pthread_mutex_lock(&self->mutex);
        atomic_store(&self->asleep, true);
        while (!self->wanted && !atomic_load(&self->stop))
            pthread_cond_wait(&self->changed, &self->mutex);
        self->wanted = false;
        atomic_store(&self->asleep, false);
        pthread_mutex_unlock(&self->mutex);
        if (atomic_load(&self->stop))
            return NULL;
    }
}

int cache_ahead_open(struct cache_ahead **ret, struct engine *engine, struct failure *failure) {
    struct cache_ahead *self = calloc(1, sizeof *self);
    if (self == NULL)
        return fail(failure, ERR_NO_MEMORY, "no memory for the thread that clears memory");
    self->engine = engine;
    pthread_mutex_init(&self->mutex, NULL);
    pthread_cond_init(&self->changed, NULL);
    int error = thread_start(&self->thread, "cache", run, self, failure);
    if (error < 0) {
        pthread_cond_destroy(&self->changed);
        pthread_mutex_destroy(&self->mutex);
        free(self);
        return error;
    }
    *ret = self;
    return 0;
}

static void wake(struct cache_ahead *self) {
    pthread_mutex_lock(&self->mutex);
    self->wanted = true;
    pthread_cond_signal(&self->changed);
    pthread_mutex_unlock(&self->mutex);
}

/* A sixteenth has been used up: seldom enough. */
void cache_ahead_look(struct cache_ahead *self) {
    if (self != NULL && atomic_load_explicit(&self->asleep, memory_order_relaxed) &&
        engine_cache_wants(self->engine, AHEAD_BYTES - AHEAD_BYTES / 16))
        wake(self);
}

void cache_ahead_close(struct cache_ahead **self) {
    struct cache_ahead *it = *self;
    if (it == NULL)
        return;
    atomic_store(&it->stop, true);
    wake(it);
    pthread_join(it->thread, NULL);
    pthread_cond_destroy(&it->changed);
    pthread_mutex_destroy(&it->mutex);
    free(it);
    *self = NULL;
}
