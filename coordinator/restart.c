/* Operations across a restart of the coordinator. What is under way goes out with every epoch (COMMIT); every member
 * keeps it with the epoch it has adopted and tells a new coordinator (HELLO), which goes on with what the newest
 * of these epochs says once it has learnt who is there:
 *
 *   changes    wanted again as before; what is loaded by now is kept, what is not is loaded; if the process that was
 *              to take a copy is gone, the operation is aborted with that reason
 *   processes  drained or waited for as before; the supervisor knows the operation by who began it and starts
 *              nothing twice
 *
 * An operation keeps its number. Phases are gone through from PREPARE again: each is over at once if what it waits
 * for is so already. What had ended is forgotten. */
#include "coordinator/operations.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- telling ---- */

static void tell_changes(const struct coordinator *self, const struct operation *operation,
                         Troupe__Operation *told, struct effects *out) {
    size_t bytes = (operation->changes + 1) * sizeof(uint32_t);
    told->layer = effects_alloc(out, bytes);
    told->expert = effects_alloc(out, bytes);
    told->from = effects_alloc(out, bytes);
    told->to = effects_alloc(out, bytes);
    for (uint32_t i = 0; i < operation->changes; i++) {
        const struct change *change = &operation->change[i];
        told->layer[i] = change->pair / self->config.experts;
        told->expert[i] = change->pair % self->config.experts;
        told->from[i] = change->from;
        told->to[i] = change->to;
    }
    told->n_layer = told->n_expert = told->n_from = told->n_to = operation->changes;
}

static void tell_parties(const struct operation *operation, Troupe__Operation *told,
                         struct effects *out) {
    told->party = effects_alloc(out, (operation->parties + 1) * sizeof *told->party);
    for (uint32_t i = 0; i < operation->parties; i++) {
        told->party[i] = effects_alloc(out, sizeof *told->party[i]);
        troupe__process__init(told->party[i]);
        told->party[i]->name = effects_copy(out, operation->party[i].name,
                                            strlen(operation->party[i].name) + 1);
    }
    told->n_party = operation->parties;
}

Troupe__Operations *operations_message(const struct coordinator *self, struct effects *out) {
    Troupe__Operations *list = effects_alloc(out, sizeof *list);
    troupe__operations__init(list);
    list->last_id = self->last_operation_id;
    list->operation = effects_alloc(out, OPERATIONS_MAX * sizeof *list->operation);
    for (uint32_t i = 0; i < OPERATIONS_MAX; i++) {
        const struct operation *operation = &self->operation[i];
        if (operation_ended(operation))
            continue;
        Troupe__Operation *told = effects_alloc(out, sizeof *told);
        troupe__operation__init(told);
        told->id = operation->id;
        told->kind = operation->kind;
        told->role = operation->role;
        told->count = operation->count;
        told->starting = operation->starting;
        told->told = operation->told;
        told->automatic = operation->automatic;
        told->begun_by = operation->begun_by;
        tell_changes(self, operation, told, out);
        tell_parties(operation, told, out);
        list->operation[list->n_operation++] = told;
    }
    return list;
}

/* ---- learning ---- */

void operations_learn(struct coordinator *self, const Troupe__Hello *hello) {
    const Troupe__Operations *list = hello->operations;
    if (list == NULL || (self->past != NULL && hello->epoch <= self->past_epoch))
        return;
    uint8_t *bytes = malloc(troupe__operations__get_packed_size(list) + 1);
    ASSERT(bytes != NULL && "memory for operations");
    free(self->past);
    self->past = bytes;
    self->past_bytes = troupe__operations__pack(list, bytes);
    self->past_epoch = hello->epoch;
}

static struct seat *find_party(struct coordinator *self, const char *name, enum role role) {
    for (uint32_t i = 0; i < self->seats; i++)
        if (strcmp(self->seat[i].name, name) == 0 && self->seat[i].role == role)
            return &self->seat[i];
    return NULL;
}

/* False: the list says something that this model or these processes do not have; `why` tells. */
static bool take_changes(struct coordinator *self, struct operation *operation,
                         const Troupe__Operation *told) {
    operation->change = operation_allocate(told->n_layer, sizeof *operation->change);
    for (size_t i = 0; i < told->n_layer; i++) {
        uint32_t pair = told->layer[i] * self->config.experts + told->expert[i];
        if (told->layer[i] >= self->config.layers || told->expert[i] >= self->config.experts ||
            !self->is_moe[told->layer[i]] || self->owner[pair] != 0) {
            snprintf(operation->reason, sizeof operation->reason,
                     "the coordinator was started again, and expert %u of layer %u cannot be changed",
                     told->expert[i], told->layer[i]);
            return false;
        }
        const struct seat *to = seat_find(self, told->to[i]);
        if (told->to[i] != 0 && (to == NULL || to->role != ROLE_EXPERT || to->draining)) {
            snprintf(operation->reason, sizeof operation->reason,
                     "the coordinator was started again, and actor %u, which was to take a copy, is gone",
                     told->to[i]);
            return false;
        }
        operation->change[operation->changes++] = (struct change){pair, told->from[i], told->to[i]};
    }
    return true;
}

static void take_parties(struct coordinator *self, struct operation *operation,
                         const Troupe__Operation *told) {
    operation->party = operation_allocate(told->n_party, sizeof *operation->party);
    operation->parties = (uint32_t)told->n_party;
    for (uint32_t i = 0; i < operation->parties; i++) {
        struct party *party = &operation->party[i];
        struct seat *seat = find_party(self, told->party[i]->name, operation->role);
        snprintf(party->name, sizeof party->name, "%.63s", told->party[i]->name);
        party->id = seat != NULL ? seat->id : 0;
        party->gone = seat == NULL && !operation->starting;
        if (seat != NULL && !operation->starting && !seat->draining) { /* it had not heard of it */
            seat->draining = seat->dirty = true;
            seat->draining_epoch = self->epoch + 1;
        }
    }
}

static void restore(struct coordinator *self, const Troupe__Operation *told, uint64_t now_ns,
                    struct effects *out) {
    struct failure failure;
    uint64_t last = self->last_operation_id;
    if (told->kind > OPERATION_REBALANCE || operation_find(self, told->id) != NULL)
        return;
    struct operation *operation =
        operation_add(self, (enum operation_kind)told->kind, now_ns, &failure);
    if (operation == NULL)
        return;
    self->last_operation_id = last;
    operation->id = told->id;
    operation->begun_by = told->begun_by;
    operation->role = (enum role)told->role;
    operation->count = told->count;
    operation->starting = told->starting;
    operation->automatic = told->automatic;
    operation->told = told->told;
    operation->tell_at_ns = told->told ? NEVER : now_ns;
    operation->epoch = self->epoch + 1;
    take_parties(self, operation, told);
    if (!take_changes(self, operation, told)) {
        operation->changes = 0; /* nothing of it was wanted yet */
        operation_enter(operation, PHASE_ABORTED, now_ns, out);
        return;
    }
    operation_apply(self, operation);
    effects_trace(out, TRACE_INFO, "operation %llu (%s) goes on",
                  (unsigned long long)operation->id, operation_kind_name(operation->kind));
}

void operations_learnt(struct coordinator *self, uint64_t now_ns, struct effects *out) {
    if (self->past == NULL)
        return;
    Troupe__Operations *list = troupe__operations__unpack(NULL, self->past_bytes, self->past);
    ASSERT(list != NULL && "memory for operations"); /* it was checked when it came */
    if (list->last_id > self->last_operation_id)
        self->last_operation_id = list->last_id;
    for (size_t i = 0; i < list->n_operation; i++)
        restore(self, list->operation[i], now_ns, out);
    troupe__operations__free_unpacked(list, NULL);
    free(self->past);
    self->past = NULL;
    self->changed = true;
}
