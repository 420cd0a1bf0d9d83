/* The state of one layer: who holds what, and the times that follow, see planner_layer.h.
 * Invariants: holder, slot, flag, on_host, copies, used, total and moved tell the same story; unit
 * and time are computed from them anew for whoever a change touches, never by adding differences,
 * so that they do not depend on the way there. */
#include "coordinator/planner_layer.h"

#include <string.h>

void layer_clear(struct layer *self) {
    memset(self->copies, 0, self->experts * sizeof *self->copies);
    memset(self->speeds, 0, self->experts * sizeof *self->speeds);
    memset(self->unit, 0, self->experts * sizeof *self->unit);
    memset(self->used, 0, self->processes * sizeof *self->used);
    memset(self->sum, 0, self->processes * sizeof *self->sum);
    memset(self->square, 0, self->processes * sizeof *self->square);
    memset(self->time, 0, self->processes * sizeof *self->time);
    memset(self->flag, 0, (size_t)self->processes * self->experts);
    memset(self->on_host, 0, (size_t)self->experts * self->hosts);
    self->total = self->moved = 0;
}

static void refresh_process(struct layer *self, uint32_t process) {
    const uint16_t *slot = self->slot + (size_t)process * self->experts;
    double sum = 0, square = 0;
    for (uint32_t i = 0; i < self->used[process]; i++) {
        double unit = self->unit[slot[i]];
        sum += unit;
        square += unit * unit;
    }
    self->sum[process] = sum;
    self->square[process] = square;
    self->time[process] = layer_time(self, sum, square);
}

static void refresh_expert(struct layer *self, uint32_t expert) {
    const uint16_t *holder = self->holder + (size_t)expert * REPLICAS_MAX;
    double speeds = 0;
    for (uint32_t i = 0; i < self->copies[expert]; i++)
        speeds += self->speed[holder[i]];
    self->speeds[expert] = speeds;
    self->unit[expert] = speeds > 0 ? self->weight[expert] / speeds : 0;
}

static void refresh_holders(struct layer *self, uint32_t expert) {
    const uint16_t *holder = self->holder + (size_t)expert * REPLICAS_MAX;
    for (uint32_t i = 0; i < self->copies[expert]; i++)
        refresh_process(self, holder[i]);
}

static void link_copy(struct layer *self, uint32_t process, uint32_t expert) {
    uint8_t *flag = layer_flag(self, process, expert);
    ASSERT((*flag & HELD) == 0 && self->copies[expert] < REPLICAS_MAX &&
           self->used[process] < self->experts);
    *flag |= HELD;
    self->holder[(size_t)expert * REPLICAS_MAX + self->copies[expert]++] = (uint16_t)process;
    self->slot[(size_t)process * self->experts + self->used[process]++] = (uint16_t)expert;
    self->on_host[(size_t)expert * self->hosts + self->host[process]]++;
    self->total++;
    self->moved += (*flag & HELD_BEFORE) == 0;
}

/* The last takes the place of the one that leaves. */
static void list_remove(uint16_t *list, uint32_t *count, uint32_t value) {
    uint32_t i = 0;
    while (list[i] != value) {
        i++;
        ASSERT(i < *count);
    }
    list[i] = list[--*count];
}

static void unlink_copy(struct layer *self, uint32_t process, uint32_t expert) {
    uint8_t *flag = layer_flag(self, process, expert);
    ASSERT((*flag & HELD) != 0);
    *flag &= (uint8_t)~HELD;
    list_remove(self->holder + (size_t)expert * REPLICAS_MAX, &self->copies[expert], process);
    list_remove(self->slot + (size_t)process * self->experts, &self->used[process], expert);
    self->on_host[(size_t)expert * self->hosts + self->host[process]]--;
    self->total--;
    self->moved -= (*flag & HELD_BEFORE) == 0;
}

void layer_add(struct layer *self, uint32_t process, uint32_t expert) {
    link_copy(self, process, expert);
    refresh_expert(self, expert);
    refresh_holders(self, expert);
}

void layer_remove(struct layer *self, uint32_t process, uint32_t expert) {
    unlink_copy(self, process, expert);
    refresh_expert(self, expert);
    refresh_holders(self, expert);
    refresh_process(self, process);
}

void layer_apply(struct layer *self, const struct step *step) {
    if (step->y != NONE) {
        unlink_copy(self, step->q, step->y);
        if (step->y_to_p)
            link_copy(self, step->p, step->y);
        refresh_expert(self, step->y);
        refresh_holders(self, step->y);
    }
    if (!step->keep)
        unlink_copy(self, step->p, step->x);
    if (step->q != NONE)
        link_copy(self, step->q, step->x);
    refresh_expert(self, step->x);
    refresh_holders(self, step->x);
    refresh_process(self, step->p);
    if (step->q != NONE)
        refresh_process(self, step->q);
}

uint32_t layer_hottest(const struct layer *self) {
    uint32_t hottest = 0;
    for (uint32_t p = 1; p < self->processes; p++)
        if (self->time[p] > self->time[hottest])
            hottest = p;
    return hottest;
}

bool layer_may_add(const struct layer *self, uint32_t x, uint32_t q, uint32_t p) {
    const uint8_t *on_host = self->on_host + (size_t)x * self->hosts;
    uint32_t copies = self->copies[x] + 1, there = on_host[self->host[q]] + 1u;
    if (p != NONE) {
        copies--;
        there -= self->host[p] == self->host[q];
    }
    return copies <= REPLICAS_MAX && there <= layer_host_limit(self, copies);
}

bool layer_may_remove(const struct layer *self, uint32_t x, uint32_t q) {
    const uint8_t *on_host = self->on_host + (size_t)x * self->hosts;
    const uint16_t *holder = self->holder + (size_t)x * REPLICAS_MAX;
    uint32_t limit = layer_host_limit(self, self->copies[x] - 1);
    if (self->copies[x] < 2)
        return false;
    for (uint32_t i = 0; i < self->copies[x]; i++) {
        uint32_t h = self->host[holder[i]];
        if (on_host[h] > limit + (h == self->host[q]))
            return false;
    }
    return layer_may_leave(self, x, q, NONE);
}

bool layer_may_leave(const struct layer *self, uint32_t x, uint32_t p, uint32_t q) {
    uint32_t home = self->home[x];
    if (home == NONE || self->host[p] != home || (q != NONE && self->host[q] == home))
        return true;
    return self->on_host[(size_t)x * self->hosts + home] > 1;
}
