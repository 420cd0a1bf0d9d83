/* Steps of the local search. The layer's time is that of its hottest process p, so every step takes
 * something from p: an expert moves to a cooler process, is exchanged for a lighter one, gets one
 * more copy elsewhere, or its copy on p is given up. Where a process is full, a copy of an expert
 * that has others makes room. Each step is judged by the highest time among the processes that it
 * touches. */
#include "coordinator/planner_layer.h"

#include <string.h>

#define FREE_STEP_COPIES                                                                           \
    0.25 /* what a step without loading counts for when gains per copy are compared */
#define HYSTERESIS                                                                                 \
    1.2 /* an expert gets a copy of another one if its copies have that many times the load */
#define PATIENCE      16   /* steps beyond the best state found, plus a quarter of the processes */
#define SMALLEST_GAIN 1e-9 /* of the hottest time; below is rounding */
#define HEDGE                                                                                      \
    0.25 /* what time won below a bound process counts for: as if in one window of four another one  \
            became the hottest */
#define LEVELS 5 /* the hottest process, and this many less one below bound ones */

/* The best step found so far. */
struct search {
    struct layer *layer;
    uint32_t p;
    bool priced; /* copies count */
    double best_value;
    struct step best;
};

static int moved_by(const struct layer *layer, uint32_t process, uint32_t expert) {
    return (*layer_flag(layer, process, expert) & HELD_BEFORE) == 0;
}

static double step_copies(const struct layer *layer, const struct step *step) {
    int moved = 0;
    if (step->q != NONE)
        moved += moved_by(layer, step->q, step->x);
    if (!step->keep)
        moved -= moved_by(layer, step->p, step->x);
    if (step->y != NONE)
        moved -= moved_by(layer, step->q, step->y);
    if (step->y_to_p)
        moved += moved_by(layer, step->p, step->y);
    return moved > 0 ? moved : FREE_STEP_COPIES;
}

/* Time per copy of an expert if the speeds of its holders changed. */
static double unit_with(const struct layer *layer, uint32_t expert, double added) {
    return layer->weight[expert] / (layer->speeds[expert] + added);
}

/* What a process holds, while a step is tried on it. */
struct burden {
    double sum, square;
};

static struct burden burden_of(const struct layer *layer, uint32_t process) {
    return (struct burden){layer->sum[process], layer->square[process]};
}
/* A unit changes; 0: it comes or goes. */
static void burden_change(struct burden *self, double from, double to) {
    self->sum += to - from;
    self->square += to * to - from * from;
}
static double burden_time(const struct layer *layer, const struct burden *self) {
    return layer_time(layer, self->sum, self->square);
}

/* The units of the two experts of a step, before and after it. */
struct units {
    double x, new_x, y, new_y;
};

/* The highest time among holders of `expert` other than p and q, after the step. */
static double highest_holder(const struct layer *layer, uint32_t expert, const struct step *step,
                             const struct units *units) {
    const uint16_t *holder = layer->holder + (size_t)expert * REPLICAS_MAX;
    double highest = 0;
    for (uint32_t i = 0; i < layer->copies[expert]; i++) {
        uint32_t o = holder[i];
        if (o == step->p || o == step->q)
            continue;
        struct burden burden = burden_of(layer, o);
        if (layer_holds(layer, o, step->x))
            burden_change(&burden, units->x, units->new_x);
        if (step->y != NONE && layer_holds(layer, o, step->y))
            burden_change(&burden, units->y, units->new_y);
        double time = burden_time(layer, &burden);
        highest = time > highest ? time : highest;
    }
    return highest;
}

/* The highest time among the processes that a step touches, after it. */
static double time_after(const struct layer *layer, const struct step *step) {
    double speed_p = layer->speed[step->p], speed_q = step->q != NONE ? layer->speed[step->q] : 0;
    struct burden p = burden_of(layer, step->p), q = {0, 0};
    struct units units = {.x = layer->unit[step->x]};
    units.new_x = unit_with(layer, step->x, speed_q - (step->keep ? 0 : speed_p));
    burden_change(&p, units.x, step->keep ? units.new_x : 0);
    if (step->q != NONE) {
        q = burden_of(layer, step->q);
        burden_change(&q, 0, units.new_x);
    }
    if (step->y != NONE) {
        units.y = layer->unit[step->y];
        units.new_y = unit_with(layer, step->y, (step->y_to_p ? speed_p : 0) - speed_q);
        burden_change(&q, units.y, 0);
        if (step->y_to_p)
            burden_change(&p, 0, units.new_y);
        else if (layer_holds(layer, step->p, step->y))
            burden_change(&p, units.y, units.new_y);
    }
    double highest = burden_time(layer, &p), time = burden_time(layer, &q);
    highest = time > highest ? time : highest;
    if (units.new_x > units.x) {
        time = highest_holder(layer, step->x, step, &units);
        highest = time > highest ? time : highest;
    }
    if (units.new_y > units.y) {
        time = highest_holder(layer, step->y, step, &units);
        highest = time > highest ? time : highest;
    }
    return highest;
}

/* `most`: a cheap bound on what the step can gain. */
static void consider(struct search *search, const struct step *step, double most) {
    const struct layer *layer = search->layer;
    double now = layer->time[search->p];
    double copies = search->priced ? step_copies(layer, step) : 1;
    if (most <= now * SMALLEST_GAIN || most <= search->best_value * copies)
        return;
    double gain = now - time_after(layer, step);
    if (gain > now * SMALLEST_GAIN && gain > search->best_value * copies) {
        search->best_value = gain / copies;
        search->best = *step;
    }
}

static double smaller(double a, double b) {
    return a < b ? a : b;
}

/* Everything that can be done with x between p and q. */
static void consider_target(struct search *search, uint32_t x, uint32_t q) {
    struct layer *layer = search->layer;
    uint32_t p = search->p;
    struct step step = {x, p, q, NONE, false, false};
    bool may_move = layer_may_add(layer, x, q, p) && layer_may_leave(layer, x, p, q);
    bool may_copy = layer_may_add(layer, x, q, NONE);
    if (!may_move && !may_copy)
        return;
    double unit = layer->unit[x], slack = layer->time[p] - layer->sum[q];
    double moved = unit_with(layer, x, layer->speed[q] - layer->speed[p]);
    double copied = unit_with(layer, x, layer->speed[q]);
    double by_move = (1 + layer->risk) * unit, by_copy = (1 + layer->risk) * (unit - copied);
    if (layer->used[q] < layer->limit[q]) {
        if (may_move)
            consider(search, &step, smaller(by_move, slack - moved));
        step.keep = true;
        if (may_copy && layer->total < layer->slots)
            consider(search, &step, smaller(by_copy, slack - copied));
    }
    const uint16_t *slot = layer->slot + (size_t)q * layer->experts;
    double floor = search->best_value * (search->priced ? FREE_STEP_COPIES : 1);
    for (uint32_t i = 0; i < layer->used[q]; i++) {
        uint32_t y = slot[i];
        double room = slack + layer->unit[y];
        if (smaller(by_move, room - copied) <= floor)
            continue;
        step = (struct step){x, p, q, y, false, true};
        if (may_move && (1 + layer->risk) * (unit - layer->unit[y]) > floor &&
            !layer_holds(layer, p, y) && layer_may_add(layer, y, p, q) &&
            layer_may_leave(layer, y, q, p))
            consider(search, &step,
                     smaller((1 + layer->risk) * (unit - layer->unit[y]), room - moved));
        if (layer->copies[y] < 2 || !layer_may_remove(layer, y, q))
            continue;
        step.y_to_p = false;
        if (may_move)
            consider(search, &step, smaller(by_move, room - moved));
        step.keep = true;
        if (may_copy)
            consider(search, &step, smaller(by_copy, room - copied));
    }
}

static bool best_step(struct search *search) {
    struct layer *layer = search->layer;
    const uint16_t *slot = layer->slot + (size_t)search->p * layer->experts;
    search->best_value = 0;
    for (uint32_t i = 0; i < layer->used[search->p]; i++) {
        uint32_t x = slot[i];
        if (layer_may_remove(layer, x, search->p)) {
            struct step step = {x, search->p, NONE, NONE, false, false};
            consider(search, &step, (1 + layer->risk) * layer->unit[x]);
        }
        for (uint32_t q = 0; q < layer->processes; q++)
            if (layer->time[q] < layer->time[search->p] && !layer_holds(layer, q, x))
                consider_target(search, x, q);
    }
    return search->best_value > 0;
}

/* The expert with the most time per copy that may have another one. */
static uint32_t neediest(const struct layer *layer) {
    uint32_t best = NONE;
    for (uint32_t e = 0; e < layer->experts; e++)
        if (layer->copies[e] < REPLICAS_MAX && layer->copies[e] < layer->processes &&
            (best == NONE || layer->unit[e] > layer->unit[best]))
            best = e;
    return best;
}

/* The best process for one more copy of x. Where no slot is free, a copy of an expert makes room
 * whose time per copy stays below `limit` without it; NONE: nowhere. */
static bool best_transfer(struct layer *layer, uint32_t x, double limit, struct step *ret) {
    double lowest = INFINITY;
    for (uint32_t q = 0; q < layer->processes; q++) {
        if (layer_holds(layer, q, x) || !layer_may_add(layer, x, q, NONE))
            continue;
        struct step step = {x, layer->holder[(size_t)x * REPLICAS_MAX], q, NONE, true, false};
        if (layer->used[q] < layer->limit[q] && layer->total < layer->slots) {
            double time = time_after(layer, &step);
            if (time < lowest) {
                lowest = time;
                *ret = step;
            }
            continue;
        }
        const uint16_t *slot = layer->slot + (size_t)q * layer->experts;
        for (uint32_t i = 0; i < layer->used[q]; i++) {
            uint32_t y = slot[i];
            if (layer->copies[y] < 2 || unit_with(layer, y, -layer->speed[q]) > limit ||
                !layer_may_remove(layer, y, q))
                continue;
            step.y = y;
            double time = unit_with(layer, y, -layer->speed[q]);
            if (time < lowest) {
                lowest = time;
                *ret = step;
            }
        }
    }
    return lowest < INFINITY;
}

/* The process with the most time among those that can still be lowered; NONE: all are bound. */
static uint32_t hottest_open(const struct layer *self) {
    uint32_t hottest = NONE;
    for (uint32_t p = 0; p < self->processes; p++)
        if (!self->bound[p] && (hottest == NONE || self->time[p] > self->time[hottest]))
            hottest = p;
    return hottest;
}

static void take_step(struct layer *self, struct path *path, const struct step *step) {
    ASSERT(path->steps < path->room);
    layer_apply(self, step);
    path->step[path->steps++] = *step;
    double time = self->time[hottest_open(self)];
    double value = path->won + path->weight * (path->level_time - time) -
                   ((double)self->moved - path->start_moved) * path->copy_cost;
    if (value > path->best_value) {
        path->best_value = value;
        path->best_steps = path->steps;
    }
}

/* Copies go from experts that need them least to those that need them most, while it makes a
 * difference. */
static void even_copies(struct layer *self, struct path *path) {
    struct step step;
    while (path->steps < path->room) {
        uint32_t x = neediest(self);
        if (x == NONE || !(self->unit[x] > 0) ||
            !best_transfer(self, x, self->unit[x] / HYSTERESIS, &step))
            return;
        take_step(self, path, &step);
    }
}

/* Nothing lowers p any more and one expert alone keeps it above the mean. */
static bool is_bound(const struct layer *self, uint32_t p, double mean) {
    const uint16_t *slot = self->slot + (size_t)p * self->experts;
    for (uint32_t i = 0; i < self->used[p]; i++)
        if (self->unit[slot[i]] > mean)
            return true;
    return false;
}

/* The layer takes as long as the bound process p; but its expert may cool down, or another one become
 * hotter than forecast. So the search goes on with the next hottest: above all, what lies beside
 * other heavy experts becomes lighter. False: nobody is left, or it has gone deep enough. */
static bool next_level(struct layer *self, struct path *path, uint32_t p) {
    if (path->levels == LEVELS)
        return false;
    path->levels++;
    path->won += path->weight * (path->level_time - self->time[p]);
    path->weight = HEDGE;
    self->bound[p] = true;
    uint32_t hottest = hottest_open(self);
    if (hottest == NONE)
        return false;
    path->level_time = self->time[hottest];
    return true;
}

static void path_begin(struct layer *self, double copy_cost, struct path *path) {
    path->copy_cost = copy_cost;
    path->level_time = self->time[layer_hottest(self)];
    path->start_moved = self->moved;
    path->best_value = path->won = 0;
    path->weight = 1;
    path->levels = 1;
    path->steps = path->best_steps = 0;
    memset(self->bound, 0, self->processes * sizeof *self->bound);
}

void layer_search(struct layer *self, double copy_cost, struct path *path) {
    struct search search = {.layer = self, .priced = copy_cost > 0};
    double total = 0, speeds = 0;
    for (uint32_t e = 0; e < self->experts; e++)
        total += self->weight[e];
    for (uint32_t p = 0; p < self->processes; p++)
        speeds += self->limit[p] > 0 ? self->speed[p] : 0;
    double mean = total / speeds;
    path_begin(self, copy_cost, path);
    /* Even perfect balance would not pay for one copy. */
    if (path->level_time - mean <= copy_cost)
        return;
    even_copies(self, path);
    uint32_t patience = PATIENCE + self->processes / 4, last = path->steps + patience;
    while (path->steps < path->room && path->steps < last) {
        search.p = hottest_open(self);
        if (path->weight * (self->time[search.p] - mean) <= copy_cost)
            break;
        if (!best_step(&search)) {
            if (!is_bound(self, search.p, mean) || !next_level(self, path, search.p))
                break;
            last = path->steps + patience;
            continue;
        }
        uint32_t best_before = path->best_steps;
        take_step(self, path, &search.best);
        if (path->best_steps != best_before)
            last = path->steps + patience;
    }
}

bool layer_bring_home(struct layer *self, uint32_t x, uint32_t p, uint32_t h, struct step *ret) {
    double lowest = INFINITY;
    for (uint32_t q = 0; q < self->processes; q++) {
        if (self->host[q] != h || self->limit[q] == 0)
            continue;
        const uint16_t *slot = self->slot + (size_t)q * self->experts;
        struct step step = {x, p, q, NONE, false, false};
        if (self->used[q] < self->limit[q] && time_after(self, &step) < lowest) {
            lowest = time_after(self, &step);
            *ret = step;
        }
        for (uint32_t i = 0; i < self->used[q]; i++) {
            step.y = slot[i];
            step.y_to_p = self->copies[step.y] == 1;
            bool may = step.y_to_p ? self->home[step.y] != h && !layer_holds(self, p, step.y)
                                   : layer_may_remove(self, step.y, q);
            if (may && time_after(self, &step) < lowest) {
                lowest = time_after(self, &step);
                *ret = step;
            }
        }
    }
    return lowest < INFINITY;
}
