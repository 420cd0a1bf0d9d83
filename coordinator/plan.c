/* Plans as values: figures and JSON, see plan.h. */
#include "coordinator/plan.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "actors/limits.h"

int plan_alloc(struct expert_plan *ret, uint32_t layers, uint32_t experts, uint32_t processes,
               uint64_t copies, struct failure *failure) {
    size_t pairs = (size_t)layers * experts;
    if (layers > LAYERS_MAX || experts > EXPERTS_MAX || processes > ACTORS_MAX ||
        copies > (uint64_t)pairs * REPLICAS_MAX)
        return fail(failure, ERR_TOO_LARGE,
                    "plan: expected at most %d layers, %d experts, %d processes and %d copies of "
                    "each expert, found %u, %u, %u and %llu copies in all",
                    LAYERS_MAX, EXPERTS_MAX, ACTORS_MAX, REPLICAS_MAX, layers, experts, processes,
                    (unsigned long long)copies);
    struct expert_plan self = {layers, experts, processes, NULL, NULL};
    self.first = calloc(pairs + 1, sizeof *self.first);
    self.holder = calloc(copies > 0 ? copies : 1, sizeof *self.holder);
    if (self.first == NULL || self.holder == NULL) {
        plan_free(&self);
        return fail(failure, ERR_NO_MEMORY, "plan: no memory for %llu copies",
                    (unsigned long long)copies);
    }
    *ret = self;
    return 0;
}

void plan_free(struct expert_plan *self) {
    free(self->first);
    free(self->holder);
    memset(self, 0, sizeof *self);
}

uint32_t plan_copies(const struct expert_plan *self) {
    return self->first[(size_t)self->layers * self->experts];
}

uint32_t plan_moved(const struct expert_plan *previous, const struct expert_plan *next) {
    uint32_t moved = 0;
    ASSERT(previous == NULL ||
           (previous->layers == next->layers && previous->experts == next->experts));
    for (size_t pair = 0; pair < (size_t)next->layers * next->experts; pair++) {
        uint32_t old = previous != NULL ? previous->first[pair] : 0;
        uint32_t old_end = previous != NULL ? previous->first[pair + 1] : 0;
        for (uint32_t i = next->first[pair]; i < next->first[pair + 1]; i++) {
            if (i > next->first[pair] && next->holder[i] == next->holder[i - 1])
                continue;
            while (old < old_end && previous->holder[old] < next->holder[i])
                old++;
            moved += old == old_end || previous->holder[old] != next->holder[i];
        }
    }
    return moved;
}

double plan_balancedness(const struct expert_plan *self, uint32_t layer, const double *load,
                         const double *speed, double *scratch) {
    const uint32_t *first = self->first + (size_t)layer * self->experts;
    double total = 0, speeds = 0, max = 0;
    for (uint32_t p = 0; p < self->processes; p++) {
        scratch[p] = 0;
        speeds += speed != NULL ? speed[p] : 1;
    }
    for (uint32_t e = 0; e < self->experts; e++) {
        double of_holders = 0;
        for (uint32_t i = first[e]; i < first[e + 1]; i++)
            of_holders += speed != NULL ? speed[self->holder[i]] : 1;
        for (uint32_t i = first[e]; i < first[e + 1]; i++)
            scratch[self->holder[i]] += load[e] / of_holders;
        total += load[e];
    }
    for (uint32_t p = 0; p < self->processes; p++)
        max = scratch[p] > max ? scratch[p] : max;
    return max > 0 ? total / speeds / max : 1;
}

static int compare_double(const void *left, const void *right) {
    double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}

struct plan_summary plan_summarise(double *value, uint32_t count) {
    struct plan_summary summary = {0, 0, 0};
    if (count == 0)
        return summary;
    qsort(value, count, sizeof *value, compare_double);
    for (uint32_t i = 0; i < count; i++)
        summary.mean += value[i] / count;
    summary.worst = value[0];
    summary.median = (value[(count - 1) / 2] + value[count / 2]) / 2;
    return summary;
}

/* ---- JSON ---- */

static json_t *pair_to_json(const struct expert_plan *self, size_t pair) {
    json_t *list = json_array();
    for (uint32_t i = self->first[pair]; list != NULL && i < self->first[pair + 1]; i++) {
        if (json_array_append_new(list, json_integer(self->holder[i])) != 0) {
            json_decref(list);
            return NULL;
        }
    }
    return list;
}

static json_t *placement_to_json(const struct expert_plan *self) {
    json_t *placement = json_array();
    for (uint32_t l = 0; l < self->layers; l++) {
        json_t *layer = json_array();
        for (uint32_t e = 0; e < self->experts; e++)
            if (json_array_append_new(layer, pair_to_json(self, (size_t)l * self->experts + e)) !=
                0) {
                json_decref(layer);
                json_decref(placement);
                return NULL;
            }
        if (json_array_append_new(placement, layer) != 0) {
            json_decref(placement);
            return NULL;
        }
    }
    return placement;
}

char *plan_to_json(const struct expert_plan *self, const char *figures) {
    json_t *object = json_object();
    bool good = json_object_set_new(object, "layers", json_integer(self->layers)) == 0 &&
                json_object_set_new(object, "experts", json_integer(self->experts)) == 0 &&
                json_object_set_new(object, "processes", json_integer(self->processes)) == 0;
    if (good && figures != NULL)
        good = json_object_set_new(object, "figures", json_loads(figures, 0, NULL)) == 0;
    good = good && json_object_set_new(object, "placement", placement_to_json(self)) == 0;
    char *text = good ? json_dumps(object, JSON_COMPACT | JSON_REAL_PRECISION(9)) : NULL;
    json_decref(object);
    return text;
}

static int read_number(const json_t *object, const char *key, uint32_t max, uint32_t *ret,
                       const char *file, struct failure *failure) {
    const json_t *value = json_object_get(object, key);
    json_int_t number = json_integer_value(value);
    if (!json_is_integer(value) || number < 1 || number > (json_int_t)max)
        return fail(failure, ERR_INVALID, "%s: %s: expected a whole number from 1 to %u", file, key,
                    max);
    *ret = (uint32_t)number;
    return 0;
}

static int compare_u32(const void *left, const void *right) {
    uint32_t a = *(const uint32_t *)left, b = *(const uint32_t *)right;
    return (a > b) - (a < b);
}

static int read_pair(struct expert_plan *plan, size_t pair, const json_t *list, const char *file,
                     struct failure *failure) {
    size_t count = json_array_size(list);
    uint32_t *holder = plan->holder + plan->first[pair];
    if (count < 1 || count > REPLICAS_MAX)
        return fail(failure, ERR_INVALID,
                    "%s: placement: layer %zu expert %zu: expected a list of 1 to %d processes",
                    file, pair / plan->experts, pair % plan->experts, REPLICAS_MAX);
    for (size_t i = 0; i < count; i++) {
        const json_t *value = json_array_get(list, i);
        json_int_t process = json_integer_value(value);
        if (!json_is_integer(value) || process < 0 || process >= (json_int_t)plan->processes)
            return fail(failure, ERR_INVALID,
                        "%s: placement: layer %zu expert %zu: expected processes from 0 to %u",
                        file, pair / plan->experts, pair % plan->experts, plan->processes - 1);
        holder[i] = (uint32_t)process;
    }
    qsort(holder, count, sizeof *holder, compare_u32);
    plan->first[pair + 1] = plan->first[pair] + (uint32_t)count;
    return 0;
}

/* Checks the outer shape of "placement" and counts the copies. */
static int count_copies(const json_t *placement, uint32_t layers, uint32_t experts, uint64_t *ret,
                        const char *file, struct failure *failure) {
    uint64_t copies = 0;
    if (json_array_size(placement) != layers)
        return fail(failure, ERR_INVALID, "%s: placement: expected %u layers, found %zu", file,
                    layers, json_array_size(placement));
    for (uint32_t l = 0; l < layers; l++) {
        const json_t *layer = json_array_get(placement, l);
        if (json_array_size(layer) != experts)
            return fail(failure, ERR_INVALID,
                        "%s: placement: layer %u: expected %u experts, found %zu", file, l, experts,
                        json_array_size(layer));
        for (uint32_t e = 0; e < experts; e++) {
            size_t count = json_array_size(json_array_get(layer, e));
            if (count > REPLICAS_MAX)
                return fail(failure, ERR_TOO_LARGE,
                            "%s: placement: layer %u expert %u: expected at most %d copies, found "
                            "%zu",
                            file, l, e, REPLICAS_MAX, count);
            copies += count;
        }
    }
    *ret = copies;
    return 0;
}

static int read_object(struct expert_plan *ret, const json_t *object, const char *file,
                       struct failure *failure) {
    uint32_t layers = 0, experts = 0, processes = 0;
    uint64_t copies = 0;
    const json_t *placement = json_object_get(object, "placement");
    int code = read_number(object, "layers", LAYERS_MAX, &layers, file, failure);
    if (code == 0)
        code = read_number(object, "experts", EXPERTS_MAX, &experts, file, failure);
    if (code == 0)
        code = read_number(object, "processes", ACTORS_MAX, &processes, file, failure);
    if (code == 0)
        code = count_copies(placement, layers, experts, &copies, file, failure);
    struct expert_plan plan = {0};
    if (code == 0)
        code = plan_alloc(&plan, layers, experts, processes, copies, failure);
    for (size_t pair = 0; code == 0 && pair < (size_t)layers * experts; pair++)
        code = read_pair(&plan, pair,
                         json_array_get(json_array_get(placement, pair / experts), pair % experts),
                         file, failure);
    if (code < 0) {
        plan_free(&plan);
        return code;
    }
    *ret = plan;
    return 0;
}

int plan_from_json(struct expert_plan *ret, const char *text, size_t size, const char *file,
                   struct failure *failure) {
    if (size > JSON_FILE_MAX)
        return fail(failure, ERR_TOO_LARGE, "%s: expected at most %u bytes, found %zu", file,
                    JSON_FILE_MAX, size);
    json_error_t error;
    json_t *object = json_loadb(text, size, JSON_REJECT_DUPLICATES, &error);
    if (object == NULL)
        return fail(failure, ERR_INVALID, "%s: line %d: %s", file, error.line, error.text);
    int code = read_object(ret, object, file, failure);
    json_decref(object);
    return code;
}
