/* Binary heap of deliveries; see queue.h. */
#include "simulator/queue.h"

#include <stdlib.h>

static bool before(const struct delivery *a, const struct delivery *b) {
    return a->time_ns != b->time_ns ? a->time_ns < b->time_ns : a->number < b->number;
}

static void swap(struct queue *self, uint32_t a, uint32_t b) {
    struct delivery *kept = self->heap[a];
    self->heap[a] = self->heap[b];
    self->heap[b] = kept;
}

void queue_push(struct queue *self, struct delivery *delivery) {
    if (self->count == self->capacity) {
        self->capacity = self->capacity ? self->capacity * 2 : 64;
        self->heap = realloc(self->heap, self->capacity * sizeof *self->heap);
        ASSERT(self->heap != NULL);
    }
    if (delivery->number == 0)
        delivery->number = ++self->next_number;
    uint32_t at = self->count++;
    self->heap[at] = delivery;
    while (at > 0 && before(self->heap[at], self->heap[(at - 1) / 2])) {
        swap(self, at, (at - 1) / 2);
        at = (at - 1) / 2;
    }
}

const struct delivery *queue_peek(const struct queue *self) {
    return self->count > 0 ? self->heap[0] : NULL;
}

struct delivery *queue_pop(struct queue *self) {
    ASSERT(self->count > 0);
    struct delivery *first = self->heap[0];
    self->heap[0] = self->heap[--self->count];
    for (uint32_t at = 0;;) {
        uint32_t least = at;
        for (uint32_t child = 2 * at + 1; child <= 2 * at + 2 && child < self->count; child++)
            if (before(self->heap[child], self->heap[least]))
                least = child;
        if (least == at)
            break;
        swap(self, at, least);
        at = least;
    }
    return first;
}

struct delivery *delivery_new(enum delivery_kind kind, uint32_t node, uint64_t time_ns) {
    struct delivery *self = calloc(1, sizeof *self);
    ASSERT(self != NULL);
    self->kind = kind;
    self->node = node;
    self->time_ns = time_ns;
    return self;
}

void delivery_free(struct delivery **delivery) {
    struct delivery *self = *delivery;
    if (self == NULL)
        return;
    free(self->bytes);
    if (self->weights != NULL)
        engine_expert_free(&self->weights);
    free(self->http);
    free(self);
    *delivery = NULL;
}

void queue_free(struct queue *self) {
    for (uint32_t i = 0; i < self->count; i++)
        delivery_free(&self->heap[i]);
    free(self->heap);
    *self = (struct queue){0};
}
