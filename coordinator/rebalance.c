/* Rebalancing: the troupe as the planner sees it (coordinator/planner.h), and the plan as a list of changes. Only ready
 * processes that stay take part; layers without routed experts are left out. */
#include "coordinator/coordinator.h"

#include <stdlib.h>
#include <string.h>

#include "coordinator/eplb.h"
#include "coordinator/planner.h"

#define LOAD_BYTES_PER_SECOND 1e9 /* one process packs experts at about this rate */
#define SLOWDOWN              0.2 /* of a process that loads meanwhile */
#define ROW_NS                1000.0 /* until experts have said how long rows take */
#define HORIZON               1.0 /* the next stretch of time is taken to be like the one measured */
#define SPEED_NOISE           1.5 /* speeds are taken to be equal within this factor: small frames take longer per row */
#define SPEED_MOST            16.0

struct view {
    struct coordinator *self;
    struct seat **seat; /* [processes] */
    uint32_t *host, *capacity;
    double *load;  /* [layers * experts] */
    double *speed; /* [processes] of the middle one's; 1 where it is not known */
    uint32_t *layer; /* [layers] of the model */
    double row_ns; /* at the middle process */
    uint32_t processes, hosts, layers, experts;
};

static void view_free(struct view *view) {
    free(view->seat);
    free(view->host);
    free(view->capacity);
    free(view->load);
    free(view->speed);
    free(view->layer);
}

static uint32_t host_of(const struct view *view, const struct seat *seat) {
    for (uint32_t i = 0; i < view->processes; i++)
        if (strcmp(view->seat[i]->host, seat->host) == 0)
            return view->host[i];
    return view->hosts;
}

static int compare(const void *a, const void *b) {
    double left = *(const double *)a, right = *(const double *)b;
    return left < right ? -1 : left > right;
}

/* Speeds from what rows have taken of late. ret: of the middle process; 0: not known. */
static double take_speeds(struct view *view) {
    double known[ACTORS_MAX];
    uint32_t count = 0;
    for (uint32_t i = 0; i < view->processes; i++) {
        double row_ns = recent_row_ns(view->seat[i]);
        view->speed[i] = 1;
        if (row_ns > 0)
            known[count++] = row_ns;
    }
    if (count == 0)
        return 0;
    qsort(known, count, sizeof *known, compare);
    double middle = known[count / 2];
    for (uint32_t i = 0; i < view->processes; i++) {
        double row_ns = recent_row_ns(view->seat[i]), speed = row_ns > 0 ? middle / row_ns : 1;
        speed = speed < 1 / SPEED_MOST ? 1 / SPEED_MOST : speed > SPEED_MOST ? SPEED_MOST : speed;
        if (speed > SPEED_NOISE || speed < 1 / SPEED_NOISE)
            view->speed[i] = speed;
    }
    return middle;
}

static int view_open(struct view *view, struct coordinator *self, struct failure *failure) {
    view->self = self;
    view->experts = self->config.experts;
    view->seat = calloc(ACTORS_MAX, sizeof *view->seat);
    view->host = calloc(ACTORS_MAX, sizeof *view->host);
    view->capacity = calloc(ACTORS_MAX, sizeof *view->capacity);
    view->load = calloc((size_t)self->pairs + 1, sizeof *view->load);
    view->layer = calloc((size_t)self->config.layers + 1, sizeof *view->layer);
    view->speed = calloc(ACTORS_MAX, sizeof *view->speed);
    if (view->seat == NULL || view->host == NULL || view->capacity == NULL || view->load == NULL ||
        view->layer == NULL || view->speed == NULL)
        return fail(failure, ERR_NO_MEMORY, "no memory for a plan of %u experts", self->pairs);
    for (uint32_t i = 0; i < self->seats; i++) {
        struct seat *seat = &self->seat[i];
        if (!seat_serves(self, seat) || seat->draining || seat->quarantined)
            continue;
        uint32_t host = host_of(view, seat);
        view->hosts += host == view->hosts;
        view->host[view->processes] = host;
        view->capacity[view->processes] = seat->capacity;
        view->seat[view->processes++] = seat;
    }
    for (uint32_t layer = 0; layer < self->config.layers; layer++)
        if (self->is_moe[layer])
            view->layer[view->layers++] = layer;
    for (uint32_t pair = 0; pair < view->layers * view->experts; pair++)
        view->load[pair] = recent_load(
            self, view->layer[pair / view->experts] * view->experts + pair % view->experts);
    double row_ns = take_speeds(view);
    view->row_ns = row_ns > 0 ? row_ns : ROW_NS;
    return 0;
}

static uint32_t model_pair(const struct view *view, uint32_t pair) {
    return view->layer[pair / view->experts] * view->experts + pair % view->experts;
}

static bool is_target(const struct view *view, uint32_t process, uint32_t pair) {
    return (view->seat[process]->copy[pair] & COPY_TARGET) != 0;
}

/* What is wanted now. ERR_STATE: some experts have no copy at a process that takes part. */
static int current_plan(const struct view *view, struct expert_plan *ret, struct failure *failure) {
    uint32_t pairs = view->layers * view->experts, at = 0;
    uint64_t copies = 0;
    for (uint32_t i = 0; i < view->processes; i++)
        copies += view->seat[i]->targets;
    int error = plan_alloc(ret, view->layers, view->experts, view->processes, copies, failure);
    for (uint32_t pair = 0; error == 0 && pair < pairs; pair++) {
        ret->first[pair] = at;
        for (uint32_t i = 0; i < view->processes; i++)
            if (is_target(view, i, model_pair(view, pair)))
                ret->holder[at++] = i;
        if (ret->first[pair] == at) {
            plan_free(ret);
            return fail(failure, ERR_STATE,
                        "expert %u of layer %u is not placed at a ready process yet; try again later",
                        pair % view->experts, view->layer[pair / view->experts]);
        }
    }
    if (error == 0)
        ret->first[pairs] = at;
    return error;
}

/* Mean over the layers of mean / largest load. */
static double balancedness(const struct view *view, const struct expert_plan *plan) {
    double scratch[ACTORS_MAX], sum = 0;
    for (uint32_t layer = 0; layer < view->layers; layer++)
        sum += plan_balancedness(plan, layer, view->load + (size_t)layer * view->experts,
                                 view->speed, scratch);
    return view->layers > 0 ? sum / view->layers : 1;
}

static bool in_plan(const struct expert_plan *plan, uint32_t pair, uint32_t process) {
    for (uint32_t i = plan->first[pair]; i < plan->first[pair + 1]; i++)
        if (plan->holder[i] == process)
            return true;
    return false;
}

/* Copies that come and copies that go, in twos as far as they reach. The planner knows nothing of the copies
 * that there are to be of each pair at least: those stay. */
static struct change *list_changes(const struct view *view, const struct expert_plan *plan,
                                   uint32_t *ret_count) {
    uint32_t pairs = view->layers * view->experts;
    struct change *list = calloc((size_t)plan_copies(plan) + (size_t)pairs * REPLICAS_MAX + 1, sizeof *list);
    ASSERT(list != NULL && "memory for changes");
    *ret_count = 0;
    for (uint32_t pair = 0; pair < pairs; pair++) {
        uint32_t model = model_pair(view, pair), come = *ret_count, go = *ret_count;
        for (uint32_t i = 0; i < view->processes; i++) {
            bool before = is_target(view, i, model), after = in_plan(plan, pair, i);
            if (after && !before)
                list[come++].to = view->seat[i]->id;
            if (before && !after)
                list[go++].from = view->seat[i]->id;
        }
        uint32_t least = copies_wanted(view->self) < view->processes ? copies_wanted(view->self)
                                                                      : view->processes;
        uint32_t all = view->self->targets[model] + (come - *ret_count);
        for (; go > *ret_count && all - (go - *ret_count) < least; go--)
            list[go - 1].from = 0;
        for (; *ret_count < come || *ret_count < go; (*ret_count)++)
            list[*ret_count].pair = model;
    }
    return list;
}

/* The baseline: what anything costs is nothing to it. */
static int plan_by_eplb(const struct view *view, struct expert_plan *ret,
                        struct planner_figures *figures, const struct planner_task *task,
                        struct failure *failure) {
    struct eplb_task eplb = {task->layers,    task->experts, 1,         task->processes, 1,
                             task->experts + task->spare, task->load};
    int error = eplb_plan(ret, &eplb, failure);
    if (error < 0)
        return error;
    uint32_t most = eplb.slots / task->processes * task->layers;
    for (uint32_t i = 0; i < task->processes; i++)
        if (task->capacity[i] < most) {
            plan_free(ret);
            return fail(failure, ERR_TOO_LARGE, "EPLB would place %u copies at %s, which holds %u",
                        most, view->seat[i]->name, task->capacity[i]);
        }
    figures->before.mean = balancedness(view, task->previous);
    figures->after.mean = balancedness(view, ret);
    figures->proposed = true;
    return 0;
}

static int plan(struct view *view, const struct expert_plan *previous,
                const struct rebalance_wish *wish, uint64_t now_ns, struct rebalance *ret,
                struct failure *failure) {
    struct coordinator *self = view->self;
    struct planner_figures figures = {0};
    struct expert_plan next;
    struct planner_task task = {
        .layers = view->layers,
        .experts = view->experts,
        .groups = 1,
        .load = view->load,
        .processes = view->processes,
        .hosts = view->hosts,
        .host = view->host,
        .speed = view->speed,
        .capacity = view->capacity,
        .spare = wish->spare,
        .previous = previous,
        .price = {.expert_bytes = self->expert_bytes,
                  .bytes_per_second = LOAD_BYTES_PER_SECOND,
                  .slowdown = SLOWDOWN,
                  .row_ns = view->row_ns,
                  .horizon = HORIZON},
    };
    int error = self->settings.rebalance_eplb
                    ? plan_by_eplb(view, &next, &figures, &task, failure)
                    : planner_plan(&next, &figures, &task, failure);
    if (error < 0)
        return error;
    uint32_t count = 0;
    struct change *changes = list_changes(view, &next, &count);
    *ret = (struct rebalance){.moves = plan_moved(previous, &next),
                              .before = figures.before.mean,
                              .after = figures.after.mean,
                              .proposed = figures.proposed && count > 0};
    if (ret->proposed && !wish->dry_run)
        error = operation_rebalance(self, &changes, count, wish->automatic, now_ns, &ret->id, failure);
    free(changes);
    plan_free(&next);
    return error;
}

int rebalance(struct coordinator *self, const struct rebalance_wish *wish, uint64_t now_ns,
              struct rebalance *ret, struct failure *failure) {
    struct view view = {0};
    struct expert_plan previous;
    if (self->moe_pairs == 0)
        return fail(failure, ERR_UNSUPPORTED, "the model has no routed experts");
    int error = view_open(&view, self, failure);
    if (error == 0)
        error = current_plan(&view, &previous, failure);
    if (error == 0) {
        double now = wish->threshold > 0 ? balancedness(&view, &previous) : 0;
        if (wish->threshold > 0 && now >= wish->threshold)
            *ret = (struct rebalance){.before = now, .after = now};
        else
            error = plan(&view, &previous, wish, now_ns, ret, failure);
        plan_free(&previous);
    }
    view_free(&view);
    return error;
}
