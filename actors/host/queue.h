/* A bounded queue of pointers between two threads of one process: one pushes, the other pops,
 * neither ever waits. */
#ifndef TROUPE_HOST_QUEUE_H
#define TROUPE_HOST_QUEUE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

struct queue {
    void **item;
    uint32_t capacity;                  /* a power of two */
    _Alignas(64) _Atomic uint32_t head; /* pushed */
    _Alignas(64) _Atomic uint32_t tail; /* popped */
};

static inline bool queue_init(struct queue *self, uint32_t capacity) {
    self->item = calloc(capacity, sizeof *self->item);
    self->capacity = capacity;
    atomic_store(&self->head, 0);
    atomic_store(&self->tail, 0);
    return self->item != NULL;
}

static inline bool queue_full(struct queue *self) {
    return atomic_load(&self->head) - atomic_load(&self->tail) == self->capacity;
}

/* False: full, the item is still the caller's. */
static inline bool queue_push(struct queue *self, void *item) {
    if (queue_full(self))
        return false;
    uint32_t head = atomic_load_explicit(&self->head, memory_order_relaxed);
    self->item[head & (self->capacity - 1)] = item;
    atomic_store(&self->head, head + 1);
    return true;
}

/* NULL: empty. */
static inline void *queue_pop(struct queue *self) {
    uint32_t tail = atomic_load_explicit(&self->tail, memory_order_relaxed);
    if (atomic_load(&self->head) == tail)
        return NULL;
    void *item = self->item[tail & (self->capacity - 1)];
    atomic_store(&self->tail, tail + 1);
    return item;
}

/* Frees the queue; whoever calls has emptied it. */
static inline void queue_free(struct queue *self) {
    free(self->item);
    self->item = NULL;
}

#endif
