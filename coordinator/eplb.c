/* The published EPLB algorithm, see eplb.h. A layer is a list of hosts (global: one), each with its
 * own experts, slots and processes; inside a host: replicate, then pack. */
#include "coordinator/eplb.h"

#include <stdlib.h>
#include <string.h>

#include "actors/limits.h"

struct weighted {
    double weight;
    uint32_t index;
};

/* One host's part of a layer. */
struct room {
    uint32_t experts, slots, processes, first_process;
    const uint32_t *expert; /* [experts] */
};

struct work {
    struct weighted *sorted; /* [slots or groups] */
    double *sum;             /* [processes or hosts] */
    uint32_t *filled;        /* [processes or hosts] */
    uint32_t *pack;          /* [slots or groups] what pack_evenly decides */
    uint32_t *member;        /* [experts] of one host */
    uint32_t *copies;        /* [experts] of one host */
    uint32_t *slot_expert;   /* [slots] of one host: position in `member` */
    uint32_t *group_host;    /* [groups] */
    uint32_t *expert_of;     /* [slots] of the layer */
    uint32_t *process_of;    /* [slots] of the layer */
    uint32_t placed;         /* slots of the layer decided so far */
};

static void work_free(struct work *self) {
    free(self->sorted);
    free(self->sum);
    free(self->filled);
}

static int work_alloc(struct work *ret, const struct eplb_task *task, struct failure *failure) {
    size_t items = task->slots > task->groups ? task->slots : task->groups;
    size_t packs = task->processes > task->hosts ? task->processes : task->hosts;
    struct work self = {
        .sorted = malloc(items * sizeof *self.sorted),
        .sum = malloc(packs * sizeof *self.sum),
        .filled = malloc((packs + 2 * items + 2 * (size_t)task->experts + 3 * (size_t)task->slots) *
                         sizeof *self.filled),
    };
    if (self.sorted == NULL || self.sum == NULL || self.filled == NULL) {
        work_free(&self);
        return fail(failure, ERR_NO_MEMORY, "EPLB: no memory for %u slots", task->slots);
    }
    self.pack = self.filled + packs;
    self.group_host = self.pack + items;
    self.member = self.group_host + items;
    self.copies = self.member + task->experts;
    self.slot_expert = self.copies + task->experts;
    self.expert_of = self.slot_expert + task->slots;
    self.process_of = self.expert_of + task->slots;
    *ret = self;
    return 0;
}

static int heavier(const void *left, const void *right) {
    const struct weighted *a = left, *b = right;
    if (a->weight != b->weight)
        return a->weight > b->weight ? -1 : 1;
    return a->index < b->index ? -1 : 1;
}

/* Puts `count` weights (in work->sorted) into packs of equal size: heaviest first, each into the
 * lightest pack with room. */
static void pack_evenly(struct work *work, uint32_t count, uint32_t packs) {
    uint32_t each = count / packs;
    qsort(work->sorted, count, sizeof *work->sorted, heavier);
    for (uint32_t p = 0; p < packs; p++) {
        work->sum[p] = 0;
        work->filled[p] = 0;
    }
    for (uint32_t i = 0; i < count; i++) {
        uint32_t best = packs;
        for (uint32_t p = 0; p < packs; p++)
            if (work->filled[p] < each && (best == packs || work->sum[p] < work->sum[best]))
                best = p;
        work->pack[work->sorted[i].index] = best;
        work->sum[best] += work->sorted[i].weight;
        work->filled[best]++;
    }
}

/* Every expert one slot, every further slot to the expert with the most load per copy. */
static void replicate(struct work *work, const struct room *room, const double *load) {
    for (uint32_t i = 0; i < room->experts; i++) {
        work->copies[i] = 1;
        work->slot_expert[i] = i;
    }
    for (uint32_t slot = room->experts; slot < room->slots; slot++) {
        uint32_t best = 0;
        double most = -1;
        for (uint32_t i = 0; i < room->experts; i++) {
            double each = load[room->expert[i]] / work->copies[i];
            if (each > most && work->copies[i] < REPLICAS_MAX) {
                most = each;
                best = i;
            }
        }
        work->slot_expert[slot] = best;
        work->copies[best]++;
    }
}

static void balance_room(struct work *work, const struct room *room, const double *load) {
    replicate(work, room, load);
    for (uint32_t slot = 0; slot < room->slots; slot++) {
        uint32_t i = work->slot_expert[slot];
        work->sorted[slot] = (struct weighted){load[room->expert[i]] / work->copies[i], slot};
    }
    pack_evenly(work, room->slots, room->processes);
    for (uint32_t slot = 0; slot < room->slots; slot++) {
        work->expert_of[work->placed] = room->expert[work->slot_expert[slot]];
        work->process_of[work->placed++] = room->first_process + work->pack[slot];
    }
}

static void balance_layer(struct work *work, const struct eplb_task *task, uint32_t groups,
                          uint32_t hosts, const double *load) {
    uint32_t group_experts = task->experts / groups;
    for (uint32_t g = 0; g < groups; g++) {
        work->sorted[g] = (struct weighted){0, g};
        for (uint32_t e = g * group_experts; e < (g + 1) * group_experts; e++)
            work->sorted[g].weight += load[e];
    }
    pack_evenly(work, groups, hosts);
    memcpy(work->group_host, work->pack, groups * sizeof *work->pack);
    work->placed = 0;
    for (uint32_t h = 0; h < hosts; h++) {
        struct room room = {0, task->slots / hosts, task->processes / hosts,
                            h * (task->processes / hosts), work->member};
        for (uint32_t e = 0; e < task->experts; e++)
            if (work->group_host[e / group_experts] == h)
                work->member[room.experts++] = e;
        balance_room(work, &room, load);
    }
}

/* Slots sorted by (expert, process) into the plan: count, then fill, processes ascending. */
static void store_layer(struct expert_plan *plan, uint32_t layer, const struct work *work,
                        uint32_t *next) {
    uint32_t *first = plan->first + (size_t)layer * plan->experts;
    for (uint32_t i = 0; i < work->placed; i++)
        first[work->expert_of[i] + 1]++;
    for (uint32_t e = 0; e < plan->experts; e++) {
        first[e + 1] += first[e];
        next[e] = first[e];
    }
    for (uint32_t i = 0; i < work->placed; i++) {
        uint32_t e = work->expert_of[i], at = next[e]++;
        for (; at > first[e] && plan->holder[at - 1] > work->process_of[i]; at--)
            plan->holder[at] = plan->holder[at - 1];
        plan->holder[at] = work->process_of[i];
    }
}

static int check(const struct eplb_task *task, struct failure *failure) {
    if (task->layers == 0 || task->experts == 0 || task->processes == 0 || task->hosts == 0 ||
        task->groups == 0)
        return fail(failure, ERR_INVALID,
                    "EPLB: expected at least one layer, expert, group, process and host, found %u, "
                    "%u, %u, %u, %u",
                    task->layers, task->experts, task->groups, task->processes, task->hosts);
    if (task->slots < task->experts)
        return fail(failure, ERR_INVALID,
                    "EPLB: not enough slots: %u experts need %u slots in each layer, found %u (%u "
                    "short)",
                    task->experts, task->experts, task->slots, task->experts - task->slots);
    if (task->slots % task->processes != 0)
        return fail(failure, ERR_INVALID,
                    "EPLB: expected slots that the processes divide, found %u slots / %u processes "
                    "= %u, remainder %u",
                    task->slots, task->processes, task->slots / task->processes,
                    task->slots % task->processes);
    if ((uint64_t)task->experts * REPLICAS_MAX < task->slots)
        return fail(failure, ERR_TOO_LARGE,
                    "EPLB: expected at most %d copies of %u experts, found %u slots", REPLICAS_MAX,
                    task->experts, task->slots);
    return 0;
}

int eplb_plan(struct expert_plan *ret, const struct eplb_task *task, struct failure *failure) {
    int code = check(task, failure);
    if (code < 0)
        return code;
    bool hierarchical = task->groups % task->hosts == 0 && task->experts % task->groups == 0 &&
                        task->processes % task->hosts == 0;
    uint32_t groups = hierarchical ? task->groups : 1, hosts = hierarchical ? task->hosts : 1;
    struct expert_plan plan;
    struct work work;
    code = plan_alloc(&plan, task->layers, task->experts, task->processes,
                      (uint64_t)task->layers * task->slots, failure);
    if (code < 0)
        return code;
    code = work_alloc(&work, task, failure);
    if (code < 0) {
        plan_free(&plan);
        return code;
    }
    for (uint32_t l = 0; l < task->layers; l++) {
        balance_layer(&work, task, groups, hosts, task->load + (size_t)l * task->experts);
        store_layer(&plan, l, &work, work.copies);
    }
    work_free(&work);
    *ret = plan;
    return 0;
}
