/* The planner, see planner.h: checks the task, shares the processes' room out among the layers,
 * lets each layer be searched by itself (planner_start.c, planner_search.c) and keeps of each
 * layer's steps as many as pay. */
#include "coordinator/planner.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/planner_layer.h"

#define STEPS_PER_SLOT 4u   /* bounds the search of one layer */
#define RISK           0.2 /* how far loads stray from their forecast, see docs/planner.md */

struct work {
    const struct planner_task *task;
    struct layer layer;
    struct path path;
    uint32_t *host, *limit, *home, *arrived,
        *offset;               /* [processes]; home: [experts]; offset: [processes] */
    uint32_t *host_room;       /* [hosts] */
    double *speed, *host_time; /* [processes], [hosts] */
    struct share *group;       /* [experts] */
    double *before, *after;    /* [layers] */
    double copy_rows;          /* what one moved copy costs, in rows of a process of speed 1 */
};

/* ---- the task ---- */

static int check_numbers(const struct planner_task *task, struct failure *failure) {
    for (size_t i = 0; i < (size_t)task->layers * task->experts; i++)
        if (!isfinite(task->load[i]) || task->load[i] < 0)
            return fail(failure, ERR_INVALID,
                        "planner: load of layer %zu expert %zu: expected a number of rows, 0 or "
                        "more, found %g",
                        i / task->experts, i % task->experts, task->load[i]);
    for (uint32_t p = 0; p < task->processes; p++) {
        if (task->speed != NULL && !(isfinite(task->speed[p]) && task->speed[p] > 0))
            return fail(failure, ERR_INVALID,
                        "planner: speed of process %u: expected a number above 0, found %g", p,
                        task->speed[p]);
        if (task->host != NULL && task->host[p] >= task->hosts)
            return fail(failure, ERR_INVALID,
                        "planner: host of process %u: expected 0 to %u, found %u", p,
                        task->hosts - 1, task->host[p]);
    }
    const struct planner_price *price = &task->price;
    const double number[] = {price->bytes_per_second, price->slowdown, price->row_ns,
                             price->horizon};
    for (size_t i = 0; i < sizeof number / sizeof *number; i++)
        if (!isfinite(number[i]) || number[i] < 0)
            return fail(failure, ERR_INVALID,
                        "planner: price: expected numbers of 0 and more, found %g", number[i]);
    return 0;
}

static int check_room(const struct planner_task *task, struct failure *failure) {
    uint64_t need = (uint64_t)task->layers * task->experts, room = 0;
    if (task->capacity == NULL)
        return 0;
    for (uint32_t p = 0; p < task->processes; p++)
        room += task->capacity[p] < need ? task->capacity[p] : need;
    if (room < need)
        return fail(failure, ERR_INVALID,
                    "planner: not enough slots: %u layers x %u experts = %llu copies at least, %u "
                    "processes have room for %llu (%llu short); add processes or memory",
                    task->layers, task->experts, (unsigned long long)need, task->processes,
                    (unsigned long long)room, (unsigned long long)(need - room));
    return 0;
}

static int check(const struct planner_task *task, struct failure *failure) {
    if (task->layers < 1 || task->layers > LAYERS_MAX || task->experts < 1 ||
        task->experts > EXPERTS_MAX)
        return fail(failure, ERR_INVALID,
                    "planner: expected 1 to %d layers and 1 to %d experts, found %u and %u",
                    LAYERS_MAX, EXPERTS_MAX, task->layers, task->experts);
    if (task->processes < 1 || task->processes > ACTORS_MAX)
        return fail(failure, ERR_INVALID, "planner: expected 1 to %d processes, found %u",
                    ACTORS_MAX, task->processes);
    if (task->hosts < 1 || task->hosts > task->processes)
        return fail(failure, ERR_INVALID,
                    "planner: expected 1 to %u hosts, one process on each at least, found %u",
                    task->processes, task->hosts);
    if (task->spare > EXPERTS_MAX * REPLICAS_MAX)
        return fail(failure, ERR_TOO_LARGE, "planner: expected at most %d spare slots, found %u",
                    EXPERTS_MAX * REPLICAS_MAX, task->spare);
    if (task->hierarchical && (task->groups < 1 || task->experts % task->groups != 0))
        return fail(failure, ERR_INVALID,
                    "planner: expected groups that divide %u experts, found %u", task->experts,
                    task->groups);
    const struct expert_plan *previous = task->previous;
    if (previous != NULL &&
        (previous->layers != task->layers || previous->experts != task->experts))
        return fail(failure, ERR_INVALID,
                    "planner: previous plan: expected %u layers x %u experts, found %u x %u",
                    task->layers, task->experts, previous->layers, previous->experts);
    int code = check_numbers(task, failure);
    return code < 0 ? code : check_room(task, failure);
}

static uint32_t slots_per_layer(const struct planner_task *task) {
    uint32_t most = task->processes < REPLICAS_MAX ? task->processes : REPLICAS_MAX;
    uint32_t slots = task->experts + task->spare;
    return slots < task->experts * most ? slots : task->experts * most;
}

/* ---- room ---- */

/* A process's room is spread evenly over the layers; what does not divide goes to layers in turn,
 * beginning where the process before it ended, so that the layers' totals differ by one at most. */
static void set_offsets(struct work *self) {
    const struct planner_task *task = self->task;
    uint32_t offset = 0;
    for (uint32_t p = 0; task->capacity != NULL && p < task->processes; p++) {
        uint32_t most = task->layers * task->experts;
        uint32_t room = task->capacity[p] < most ? task->capacity[p] : most;
        self->offset[p] = offset;
        offset = (offset + room % task->layers) % task->layers;
    }
}

static uint32_t room_in_layer(const struct work *self, uint32_t process, uint32_t layer) {
    const struct planner_task *task = self->task;
    if (task->capacity == NULL) {
        uint32_t slots = self->layer.slots, extra = slots % task->processes;
        uint32_t turn =
            (process + task->processes - (uint32_t)((uint64_t)layer * extra % task->processes)) %
            task->processes;
        uint32_t room = slots / task->processes + (turn < extra);
        return room < task->experts ? room : task->experts;
    }
    uint32_t most = task->layers * task->experts;
    uint32_t room = task->capacity[process] < most ? task->capacity[process] : most;
    uint32_t turn = (layer + task->layers - self->offset[process]) % task->layers;
    return room / task->layers + (turn < room % task->layers);
}

static void set_limits(struct work *self, uint32_t layer) {
    struct layer *state = &self->layer;
    memset(self->host_room, 0, state->hosts * sizeof *self->host_room);
    for (uint32_t p = 0; p < state->processes; p++) {
        self->limit[p] = room_in_layer(self, p, layer);
        self->host_room[self->host[p]] += self->limit[p];
    }
    state->open_hosts = 0;
    for (uint32_t h = 0; h < state->hosts; h++)
        state->open_hosts += self->host_room[h] > 0;
}

/* ---- homes of groups ---- */

/* Copies of a group's experts that a host holds already. */
static uint32_t held_in_host(const struct work *self, uint32_t layer, uint32_t group, uint32_t h) {
    const struct expert_plan *previous = self->task->previous;
    uint32_t size = self->task->experts / self->task->groups, held = 0;
    if (previous == NULL)
        return 0;
    size_t pair = (size_t)layer * self->task->experts + (size_t)group * size;
    for (uint32_t i = previous->first[pair]; i < previous->first[pair + size]; i++)
        held += previous->holder[i] < self->task->processes && self->host[previous->holder[i]] == h;
    return held;
}

static int heavier(const void *left, const void *right) {
    const struct share *a = left, *b = right;
    if (a->time != b->time)
        return a->time > b->time ? -1 : 1;
    return a->expert < b->expert ? -1 : a->expert > b->expert;
}

/* Each group, heaviest first, stays where most of it is, else goes to the host with the least time;
 * hosts without room for a whole group are passed over. */
static void set_homes(struct work *self, uint32_t layer) {
    const struct planner_task *task = self->task;
    uint32_t groups = task->hierarchical ? task->groups : 0;
    uint32_t size = groups > 0 ? task->experts / groups : 1;
    for (uint32_t e = 0; e < task->experts; e++)
        self->home[e] = NONE;
    for (uint32_t h = 0; h < task->hosts; h++)
        self->host_time[h] = 0;
    for (uint32_t g = 0; g < groups; g++) {
        self->group[g] = (struct share){0, g};
        for (uint32_t e = g * size; e < (g + 1) * size; e++)
            self->group[g].time += self->layer.weight[e];
    }
    qsort(self->group, groups, sizeof *self->group, heavier);
    for (uint32_t i = 0; i < groups; i++) {
        uint32_t g = self->group[i].expert, best = NONE, best_held = 0;
        for (uint32_t h = 0; h < task->hosts; h++) {
            uint32_t held = held_in_host(self, layer, g, h);
            if (self->host_room[h] < size)
                continue;
            if (best == NONE || held > best_held ||
                (held == best_held && self->host_time[h] < self->host_time[best])) {
                best = h;
                best_held = held;
            }
        }
        if (best == NONE)
            continue;
        self->host_room[best] -= size;
        self->host_time[best] += self->group[i].time;
        for (uint32_t e = g * size; e < (g + 1) * size; e++)
            self->home[e] = best;
    }
}

/* ---- one layer ---- */

/* Searches, then keeps as many of the steps as pay best. */
static void search_layer(struct work *self, uint32_t layer) {
    struct layer *state = &self->layer;
    const struct expert_plan *previous = self->task->previous;
    double copy_cost = 0;
    if (previous != NULL && self->copy_rows > 0)
        copy_cost =
            self->task->price.horizon > 0 ? self->copy_rows / self->task->price.horizon : INFINITY;
    layer_search(state, copy_cost, &self->path);
    if (self->path.best_steps == self->path.steps)
        return;
    layer_start(state, previous, layer);
    for (uint32_t i = 0; i < self->path.best_steps; i++)
        layer_apply(state, &self->path.step[i]);
}

static double balancedness(const struct layer *state) {
    double total = 0, speeds = 0, hottest = 0;
    for (uint32_t e = 0; e < state->experts; e++)
        total += state->weight[e];
    for (uint32_t p = 0; p < state->processes; p++) {
        speeds += state->limit[p] > 0 ? state->speed[p] : 0;
        hottest = state->sum[p] > hottest ? state->sum[p] : hottest;
    }
    return hottest > 0 ? total / speeds / hottest : 1;
}

static double home_rows(const struct layer *state) {
    double rows = 0;
    for (uint32_t p = 0; p < state->processes; p++)
        for (uint32_t i = 0; i < state->used[p]; i++) {
            uint32_t e = state->slot[(size_t)p * state->experts + i];
            if (state->home[e] == state->host[p])
                rows += state->unit[e] * state->speed[p];
        }
    return rows;
}

static void store_layer(struct work *self, struct expert_plan *plan, uint32_t layer) {
    const struct layer *state = &self->layer;
    uint32_t *first = plan->first + (size_t)layer * plan->experts;
    for (uint32_t e = 0; e < plan->experts; e++) {
        const uint16_t *holder = state->holder + (size_t)e * REPLICAS_MAX;
        ASSERT(state->copies[e] > 0);
        first[e + 1] = first[e];
        for (uint32_t i = 0; i < state->copies[e]; i++) {
            uint32_t at = first[e + 1]++;
            for (; at > first[e] && plan->holder[at - 1] > holder[i]; at--)
                plan->holder[at] = plan->holder[at - 1];
            plan->holder[at] = holder[i];
            self->arrived[holder[i]] += (*layer_flag(state, holder[i], e) & HELD_BEFORE) == 0;
        }
    }
}

static void plan_layer(struct work *self, struct expert_plan *plan, struct planner_figures *figures,
                       uint32_t layer) {
    struct layer *state = &self->layer;
    state->weight = self->task->load + (size_t)layer * state->experts;
    set_limits(self, layer);
    set_homes(self, layer);
    layer_start(state, self->task->previous, layer);
    double before = state->time[layer_hottest(state)];
    self->before[layer] = balancedness(state);
    search_layer(self, layer);
    self->after[layer] = balancedness(state);
    store_layer(self, plan, layer);
    figures->moved += state->moved;
    figures->home_share += home_rows(state);
    figures->gain_ns += (before - state->time[layer_hottest(state)]) * self->task->price.horizon *
                        self->task->price.row_ns;
}

/* ---- all of it ---- */

static void work_free(struct work *self) {
    struct layer *state = &self->layer;
    void *const owned[] = {state->holder, state->copies,  state->speeds, state->slot,
                           state->flag,   state->on_host, state->share,  state->bound,
                           self->path.step, self->host,   self->speed};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++)
        free(owned[i]);
}

static bool alloc_layer(struct layer *state) {
    size_t experts = state->experts, processes = state->processes;
    size_t shares = state->slots > experts ? state->slots : experts;
    state->holder = malloc(experts * REPLICAS_MAX * sizeof *state->holder);
    state->copies = malloc((2 * experts + processes) * sizeof *state->copies);
    state->speeds = malloc((2 * experts + 4 * processes) * sizeof *state->speeds);
    state->slot = malloc(processes * experts * sizeof *state->slot);
    state->flag = malloc(processes * experts);
    state->on_host = malloc(experts * state->hosts);
    state->share = malloc(shares * sizeof *state->share);
    state->bound = malloc(processes * sizeof *state->bound);
    if (state->holder == NULL || state->copies == NULL || state->speeds == NULL ||
        state->slot == NULL || state->flag == NULL || state->on_host == NULL ||
        state->share == NULL || state->bound == NULL)
        return false;
    state->wanted = state->copies + experts;
    state->used = state->wanted + experts;
    state->unit = state->speeds + experts;
    state->time = state->unit + experts;
    state->planned = state->time + processes;
    state->sum = state->planned + processes;
    state->square = state->sum + processes;
    return true;
}

static bool alloc_rest(struct work *self) {
    const struct planner_task *task = self->task;
    size_t processes = task->processes, experts = task->experts;
    struct path *path = &self->path;
    path->room = self->layer.slots * STEPS_PER_SLOT;
    path->step = malloc(path->room * sizeof *path->step);
    self->host = malloc((4 * processes + experts + task->hosts) * sizeof *self->host);
    self->speed =
        malloc((processes + task->hosts + 2 * (size_t)task->layers) * sizeof *self->speed);
    if (path->step == NULL || self->host == NULL || self->speed == NULL)
        return false;
    self->limit = self->host + processes;
    self->arrived = self->limit + processes;
    self->offset = self->arrived + processes;
    self->home = self->offset + processes;
    self->host_room = self->home + experts;
    self->host_time = self->speed + processes;
    self->before = self->host_time + task->hosts;
    self->after = self->before + task->layers;
    self->group = self->layer.share;
    return true;
}

static int work_open(struct work *self, const struct planner_task *task, struct failure *failure) {
    const struct planner_price *price = &task->price;
    *self = (struct work){.task = task};
    struct layer *state = &self->layer;
    state->experts = task->experts;
    state->processes = task->processes;
    state->hosts = task->hosts;
    state->slots = slots_per_layer(task);
    state->risk = task->spare > 0 ? RISK : 0; /* without spares there is little to hedge with */
    if (!alloc_layer(state) || !alloc_rest(self)) {
        work_free(self);
        return fail(failure, ERR_NO_MEMORY, "planner: no memory for %u processes x %u experts",
                    task->processes, task->experts);
    }
    for (uint32_t p = 0; p < task->processes; p++) {
        self->host[p] = task->host != NULL
                            ? task->host[p]
                            : (uint32_t)((uint64_t)p * task->hosts / task->processes);
        self->speed[p] = task->speed != NULL ? task->speed[p] : 1;
        self->arrived[p] = 0;
    }
    state->host = self->host;
    state->speed = self->speed;
    state->limit = self->limit;
    state->home = self->home;
    set_offsets(self);
    if (price->bytes_per_second > 0 && price->row_ns > 0)
        self->copy_rows = (double)price->expert_bytes / price->bytes_per_second * price->slowdown *
                          1e9 / price->row_ns;
    return 0;
}

static bool same(const struct expert_plan *a, const struct expert_plan *b) {
    size_t pairs = (size_t)a->layers * a->experts;
    return a->processes == b->processes &&
           memcmp(a->first, b->first, (pairs + 1) * sizeof *a->first) == 0 &&
           memcmp(a->holder, b->holder, plan_copies(a) * sizeof *a->holder) == 0;
}

static void finish_figures(struct work *self, const struct expert_plan *plan,
                           struct planner_figures *figures) {
    const struct planner_task *task = self->task;
    const struct planner_price *price = &task->price;
    double rows = 0;
    uint32_t most = 0;
    for (size_t i = 0; i < (size_t)task->layers * task->experts; i++)
        rows += task->load[i];
    for (uint32_t p = 0; p < task->processes; p++)
        most = self->arrived[p] > most ? self->arrived[p] : most;
    figures->copies = plan_copies(plan);
    figures->bytes = figures->moved * price->expert_bytes;
    if (price->bytes_per_second > 0)
        figures->load_s = (double)most * (double)price->expert_bytes / price->bytes_per_second;
    figures->stall_ns = figures->moved * self->copy_rows * price->row_ns;
    figures->home_share = task->hierarchical && rows > 0 ? figures->home_share / rows : 0;
    figures->after = plan_summarise(self->after, task->layers);
    if (task->previous != NULL)
        figures->before = plan_summarise(self->before, task->layers);
    figures->proposed = task->previous == NULL || !same(plan, task->previous);
}

int planner_plan(struct expert_plan *ret, struct planner_figures *ret_figures,
                 const struct planner_task *task, struct failure *failure) {
    struct expert_plan plan;
    struct work work;
    int code = check(task, failure);
    if (code == 0)
        code = plan_alloc(&plan, task->layers, task->experts, task->processes,
                          (uint64_t)task->layers * slots_per_layer(task), failure);
    if (code < 0)
        return code;
    code = work_open(&work, task, failure);
    if (code < 0) {
        plan_free(&plan);
        return code;
    }
    struct planner_figures figures = {0};
    for (uint32_t l = 0; l < task->layers; l++)
        plan_layer(&work, &plan, &figures, l);
    finish_figures(&work, &plan, &figures);
    work_free(&work);
    *ret = plan;
    *ret_figures = figures;
    return 0;
}
