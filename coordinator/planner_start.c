/* A layer's first placement. From a previous plan: what is held and may stay, stays; what breaks a
 * rule (a process that is gone or has less room, two copies in one failure domain, a group without
 * its home) is put right with as little as possible. From nothing: copies go to the experts with
 * the most load per copy, then each copy, heaviest first, to the process with the least time. */
#include "coordinator/planner_layer.h"

#include <stdlib.h>

/* ---- from nothing ---- */

static uint32_t room_in_all(const struct layer *self) {
    uint32_t room = 0;
    for (uint32_t p = 0; p < self->processes; p++)
        room += self->limit[p];
    return room;
}

/* How many copies each expert should have. Without load, copies go round. */
static void replicate(const struct layer *self, uint32_t *copies, uint32_t room) {
    uint32_t most = self->processes < REPLICAS_MAX ? self->processes : REPLICAS_MAX;
    for (uint32_t e = 0; e < self->experts; e++)
        copies[e] = 1;
    for (uint32_t given = self->experts; given < room; given++) {
        uint32_t best = NONE;
        double best_load = -1;
        for (uint32_t e = 0; e < self->experts; e++) {
            double load = self->weight[e] / copies[e];
            if (copies[e] < most &&
                (load > best_load || (load == best_load && copies[e] < copies[best]))) {
                best = e;
                best_load = load;
            }
        }
        if (best == NONE)
            return;
        copies[best]++;
    }
}

static int longer(const void *left, const void *right) {
    const struct share *a = left, *b = right;
    if (a->time != b->time)
        return a->time > b->time ? -1 : 1;
    return a->expert < b->expert ? -1 : a->expert > b->expert;
}

/* The process with the least time that has room for a copy of the expert; strict: and keeps failure
 * domains and homes. */
static uint32_t coolest(const struct layer *self, uint32_t expert, const double *time,
                        bool strict) {
    uint32_t best = NONE, home = self->home[expert];
    bool at_home =
        strict && home != NONE && self->on_host[(size_t)expert * self->hosts + home] == 0;
    for (uint32_t p = 0; p < self->processes; p++) {
        if (self->used[p] >= self->limit[p] || layer_holds(self, p, expert))
            continue;
        if (at_home ? self->host[p] != home : strict && !layer_may_add(self, expert, p, NONE))
            continue;
        if (best == NONE || time[p] < time[best] ||
            (time[p] == time[best] && self->used[p] < self->used[best]))
            best = p;
    }
    return best;
}

static void place_from_nothing(struct layer *self) {
    uint32_t *copies = self->wanted, shares = 0, room = room_in_all(self);
    double mean_speed = 0, *time = self->planned;
    room = room < self->slots ? room : self->slots;
    replicate(self, copies, room);
    for (uint32_t p = 0; p < self->processes; p++) {
        mean_speed += self->speed[p] / self->processes;
        time[p] = 0;
    }
    for (uint32_t e = 0; e < self->experts; e++)
        for (uint32_t i = 0; i < copies[e]; i++)
            self->share[shares++] = (struct share){self->weight[e] / copies[e] / mean_speed, e};
    qsort(self->share, shares, sizeof *self->share, longer);
    for (uint32_t i = 0; i < shares; i++) {
        uint32_t expert = self->share[i].expert, p = coolest(self, expert, time, true);
        if (p == NONE && self->copies[expert] == 0)
            p = coolest(self, expert, time, false);
        if (p == NONE)
            continue; /* one copy less: rules leave no place */
        time[p] += self->share[i].time;
        layer_add(self, p, expert);
    }
}

/* ---- from what is held ---- */

static void take_over(struct layer *self, const struct expert_plan *previous, uint32_t layer) {
    const uint32_t *first = previous->first + (size_t)layer * self->experts;
    for (uint32_t e = 0; e < self->experts; e++)
        for (uint32_t i = first[e]; i < first[e + 1]; i++) {
            uint32_t p = previous->holder[i];
            if (p >= self->processes || layer_holds(self, p, e))
                continue;
            *layer_flag(self, p, e) |= HELD_BEFORE;
            layer_add(self, p, e);
        }
}

/* The copy on process p whose loss costs least: of an expert with others, the one with the smallest
 * time per copy afterwards; else, if `any`, the lightest. NONE: there is none. */
static uint32_t least_missed(const struct layer *self, uint32_t p, bool any) {
    const uint16_t *slot = self->slot + (size_t)p * self->experts;
    uint32_t best = NONE;
    double best_time = 0;
    for (int pass = 0; pass < (any ? 2 : 1) && best == NONE; pass++)
        for (uint32_t i = 0; i < self->used[p]; i++) {
            uint32_t e = slot[i];
            if (pass == 0 && self->copies[e] < 2)
                continue;
            double rest = pass == 0 ? self->speeds[e] - self->speed[p] : 1;
            double time = self->weight[e] / rest;
            if (best == NONE || time < best_time || (time == best_time && e < best)) {
                best = e;
                best_time = time;
            }
        }
    return best;
}

/* The copy in the whole layer whose loss costs least; false: one copy of each is left. */
static bool remove_least_missed(struct layer *self) {
    uint32_t best = NONE, best_process = 0;
    double best_time = 0;
    for (uint32_t p = 0; p < self->processes; p++) {
        uint32_t e = least_missed(self, p, false);
        if (e == NONE)
            continue;
        double time = self->weight[e] / (self->speeds[e] - self->speed[p]);
        if (best == NONE || time < best_time) {
            best = e;
            best_process = p;
            best_time = time;
        }
    }
    if (best != NONE)
        layer_remove(self, best_process, best);
    return best != NONE;
}

/* Down to what processes have room for, and to what the layer may have when those that nobody holds
 * have got their place. */
static void shed(struct layer *self) {
    uint32_t homeless = 0;
    for (uint32_t p = 0; p < self->processes; p++)
        while (self->used[p] > self->limit[p])
            layer_remove(self, p, least_missed(self, p, true));
    for (uint32_t e = 0; e < self->experts; e++)
        homeless += self->copies[e] == 0;
    while (self->total + homeless > self->slots && remove_least_missed(self))
        continue;
}

/* Copies beyond what one failure domain should hold are given up, on the process with the most
 * time. */
static void spread(struct layer *self) {
    for (uint32_t e = 0; e < self->experts; e++) {
        const uint16_t *holder = self->holder + (size_t)e * REPLICAS_MAX;
        for (bool again = true; again;) {
            uint32_t worst = NONE, limit = layer_host_limit(self, self->copies[e]);
            for (uint32_t i = 0; i < self->copies[e]; i++) {
                uint32_t p = holder[i];
                if (self->on_host[(size_t)e * self->hosts + self->host[p]] > limit &&
                    (worst == NONE || self->time[p] > self->time[worst]))
                    worst = p;
            }
            again = worst != NONE;
            if (again)
                layer_remove(self, worst, e);
        }
    }
}

/* A place for an expert that nobody holds; where all are full, a copy of an expert with others
 * makes room. */
static void house(struct layer *self, uint32_t expert) {
    uint32_t p = coolest(self, expert, self->time, true);
    if (p == NONE)
        p = coolest(self, expert, self->time, false);
    if (p == NONE) {
        for (uint32_t q = 0; q < self->processes; q++)
            if (least_missed(self, q, false) != NONE &&
                (p == NONE || self->time[q] < self->time[p]))
                p = q;
    }
    ASSERT(p != NONE); /* there is room for all: checked before */
    if (self->used[p] >= self->limit[p])
        layer_remove(self, p, least_missed(self, p, false));
    layer_add(self, p, expert);
}

static void house_all(struct layer *self) {
    for (;;) {
        uint32_t heaviest = NONE;
        for (uint32_t e = 0; e < self->experts; e++)
            if (self->copies[e] == 0 &&
                (heaviest == NONE || self->weight[e] > self->weight[heaviest]))
                heaviest = e;
        if (heaviest == NONE)
            return;
        house(self, heaviest);
    }
}

static void bring_home(struct layer *self) {
    for (uint32_t e = 0; e < self->experts; e++) {
        uint32_t home = self->home[e];
        if (home == NONE || self->on_host[(size_t)e * self->hosts + home] > 0)
            continue;
        struct step step;
        if (layer_bring_home(self, e, self->holder[(size_t)e * REPLICAS_MAX], home, &step))
            layer_apply(self, &step);
    }
}

void layer_start(struct layer *self, const struct expert_plan *previous, uint32_t layer) {
    layer_clear(self);
    if (previous == NULL) {
        place_from_nothing(self);
    } else {
        take_over(self, previous, layer);
        shed(self);
        spread(self);
        house_all(self);
    }
    bring_home(self);
}
