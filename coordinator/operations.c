/* Operations: changes that somebody asked for, each with an id and a phase.
 *
 *   PREPARE -> READY -> COMMIT -> DRAIN -> RELEASE -> DONE
 *   any of them -> ABORTED, with the reason
 *
 * replicate, move, rebalance: a list of changes. PREPARE: new copies load. READY: all are held. COMMIT: they
 * go into the next epoch together, what they replace leaves it. DRAIN: attention actors adopt it. RELEASE: what
 * was replaced is dropped. Aborting puts the wanted places back as they were; copies.c sees to
 * the rest, make before break, so that it is allowed in every phase.
 * drain, scale down: a list of processes. PREPARE: they give away what they serve. DRAIN: attention actors (for
 * attention actors: gateways) adopt that. RELEASE: they are told to end, until they have.
 * scale up: PREPARE until the supervisor has started the processes and each has joined and serves its share.
 *
 * Operations on different copies run side by side. One on a copy that another is at work on is refused.
 * What the troupe itself must do (a process joined or died) never waits: it supersedes.
 *
 * Invariants: 1. owner[pair] names an operation that has not ended, or none; 2. what an operation does is
 * decided once, here; messages that carry it out may be repeated; 3. a process is told to end only when
 * nothing is placed at it and everybody who used it knows. */
#include "coordinator/operations.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const KINDS[] = {"replicate", "move", "drain", "scale", "rebalance"};
static const char *const PHASES[] = {"prepare", "ready", "commit", "drain", "release", "done",
                                     "aborted"};

const char *operation_kind_name(enum operation_kind kind) {
    return KINDS[kind];
}

const char *operation_phase_name(enum operation_phase phase) {
    return PHASES[phase];
}

bool operation_ended(const struct operation *operation) {
    return operation->id == 0 || operation->phase >= PHASE_DONE;
}

/* ---- progress ---- */

/* Share of its present order that an expert process has loaded, as it told. */
static double loaded_share(const struct seat *seat) {
    const Troupe__Heartbeat *beat = &seat->heartbeat;
    bool told = seat->order == ORDER_ASSIGN && beat->order == seat->operation && beat->load_bytes > 0;
    return told ? (double)beat->load_bytes_done / (double)beat->load_bytes : 0;
}

uint64_t operation_bytes(const struct coordinator *self, const struct operation *operation, uint64_t *ret_done) {
    uint64_t bytes = 0;
    double done = 0;
    for (uint32_t i = 0; i < operation->changes; i++) {
        const struct change *change = &operation->change[i];
        const struct seat *to = seat_find(self, change->to);
        if (change->to == 0)
            continue;
        bytes += self->expert_bytes;
        if (operation->phase == PHASE_DONE || (to != NULL && to->assigned[change->pair] == ASSIGNED_HELD))
            done += (double)self->expert_bytes;
        else if (to != NULL)
            done += (double)self->expert_bytes * loaded_share(to);
    }
    /* processes that come or go: what is on its way to anybody */
    for (uint32_t i = 0; i < self->seats && operation->parties > 0 && !operation_ended(operation); i++) {
        const struct seat *seat = &self->seat[i];
        if (seat->role != ROLE_EXPERT || operation->role != ROLE_EXPERT || seat->order != ORDER_ASSIGN ||
            seat->heartbeat.order != seat->operation)
            continue;
        bytes += seat->heartbeat.load_bytes;
        done += (double)seat->heartbeat.load_bytes_done;
    }
    *ret_done = (uint64_t)done;
    return bytes;
}

/* ---- the list ---- */

static void clear(struct operation *operation) {
    free(operation->change);
    free(operation->party);
    memset(operation, 0, sizeof *operation);
}

void operations_free(struct coordinator *self) {
    for (uint32_t i = 0; i < OPERATIONS_MAX; i++)
        clear(&self->operation[i]);
}

struct operation *operation_find(struct coordinator *self, uint64_t id) {
    for (uint32_t i = 0; i < OPERATIONS_MAX; i++)
        if (id != 0 && self->operation[i].id == id)
            return &self->operation[i];
    return NULL;
}

/* In place of the oldest that has ended. NULL: all are under way. */
struct operation *operation_add(struct coordinator *self, enum operation_kind kind, uint64_t now_ns,
                             struct failure *failure) {
    struct operation *place = NULL;
    for (uint32_t i = 0; i < OPERATIONS_MAX; i++)
        if (operation_ended(&self->operation[i]) &&
            (place == NULL || self->operation[i].id < place->id))
            place = &self->operation[i];
    if (place == NULL) {
        fail(failure, ERR_BUSY, "%u operations are under way already", OPERATIONS_MAX);
        return NULL;
    }
    clear(place);
    place->id = ++self->last_operation_id;
    place->kind = kind;
    place->begun_by = self->identity.incarnation;
    place->began_ns = now_ns;
    place->tell_at_ns = NEVER;
    place->told = true;
    return place;
}

void *operation_allocate(size_t count, size_t size) {
    void *ret = calloc(count + 1, size);
    ASSERT(ret != NULL && "memory for an operation");
    return ret;
}

void operation_enter(struct operation *operation, enum operation_phase phase, uint64_t now_ns,
                  struct effects *out) {
    operation->reached = operation->phase;
    operation->phase = phase;
    if (phase >= PHASE_DONE)
        operation->ended_ns = now_ns;
    effects_trace(out, phase == PHASE_ABORTED ? TRACE_WARNING : TRACE_INFO, "operation %llu (%s) %s%s%s",
                  (unsigned long long)operation->id, KINDS[operation->kind], PHASES[phase],
                  operation->reason[0] != '\0' ? ": " : "", operation->reason);
}

/* Copies of its pairs that others wanted meanwhile were kept back until now. */
static void disown(struct coordinator *self, const struct operation *operation) {
    for (uint32_t i = 0; i < operation->changes; i++) {
        uint32_t pair = operation->change[i].pair;
        if (self->owner[pair] != operation->id)
            continue;
        self->owner[pair] = 0;
        self->replicas_due = true;
        for (uint32_t j = 0; j < self->seats && self->waiting[pair] > 0; j++)
            if (self->seat[j].copy != NULL && self->seat[j].copy[pair] == COPY_TARGET)
                self->seat[j].dirty = true;
    }
}

/* ---- asking for copies ---- */

static int check_pair(const struct coordinator *self, uint32_t layer, uint32_t expert,
                      uint32_t *ret_pair, struct failure *failure) {
    if (layer >= self->config.layers || expert >= self->config.experts || !self->is_moe[layer])
        return fail(failure, ERR_NOT_FOUND,
                    "there is no expert %u in layer %u: the model has %u layers, %u of them with "
                    "experts 0 to %u",
                    expert, layer, self->config.layers,
                    self->config.experts > 0 ? self->moe_pairs / self->config.experts : 0,
                    self->config.experts > 0 ? self->config.experts - 1 : 0);
    uint32_t pair = layer * self->config.experts + expert;
    if (!self->placed)
        return fail(failure, ERR_STATE, "experts have not been placed yet");
    if (self->owner[pair] != 0)
        return fail(failure, ERR_BUSY,
                    "operation %llu is at work on expert %u of layer %u; wait for it or cancel it",
                    (unsigned long long)self->owner[pair], expert, layer);
    *ret_pair = pair;
    return 0;
}

static int check_taker(const struct coordinator *self, actor_id id, uint32_t pair,
                       struct failure *failure) {
    const struct seat *seat = seat_find(self, id);
    if (seat == NULL || seat->role != ROLE_EXPERT)
        return fail(failure, ERR_NOT_FOUND, "actor %u is no expert process", id);
    if (seat->draining)
        return fail(failure, ERR_STATE, "%s is being drained", seat->name);
    if (seat->quarantined)
        return fail(failure, ERR_STATE, "%s gave wrong rows and is quarantined; restart it first", seat->name);
    if ((seat->copy[pair] & COPY_TARGET) != 0)
        return fail(failure, ERR_EXISTS, "%s holds expert %u of layer %u already", seat->name,
                    pair % self->config.experts, pair / self->config.experts);
    if (seat->fileless && self->actives[pair] == 0)
        return fail(failure, ERR_STATE,
                    "%s has no file of weights, and nobody serves expert %u of layer %u now: name a "
                    "process with a file, or wait until it is served",
                    seat->name, pair % self->config.experts, pair / self->config.experts);
    if (seat->targets >= seat->capacity)
        return fail(failure, ERR_TOO_LARGE,
                    "%s has no room: it holds %u experts of about %llu bytes and may hold %u",
                    seat->name, seat->targets, (unsigned long long)self->expert_bytes,
                    seat->capacity);
    return 0;
}

/* The emptiest expert process that may take a copy; 0: none. */
static actor_id emptiest(const struct coordinator *self, uint32_t pair) {
    const struct seat *best = NULL;
    for (uint32_t i = 0; i < self->seats; i++)
        if (self->seat[i].copy != NULL && check_taker(self, self->seat[i].id, pair, NULL) == 0 &&
            (best == NULL || self->seat[i].targets < best->targets))
            best = &self->seat[i];
    return best != NULL ? best->id : 0;
}

/* A home that is no target any more is another one's. */
static void settle_home(struct coordinator *self, uint32_t pair) {
    const struct seat *home = seat_find(self, self->home[pair]);
    if (home != NULL && (home->copy[pair] & COPY_TARGET) != 0)
        return;
    for (uint32_t i = 0; i < self->seats; i++)
        if (self->seat[i].copy != NULL && (self->seat[i].copy[pair] & COPY_TARGET) != 0) {
            self->home[pair] = self->seat[i].id;
            return;
        }
    self->home[pair] = 0;
}

void operation_apply(struct coordinator *self, const struct operation *operation) {
    for (uint32_t i = 0; i < operation->changes; i++) {
        const struct change *change = &operation->change[i];
        struct seat *to = seat_find(self, change->to), *from = seat_find(self, change->from);
        self->owner[change->pair] = operation->id;
        if (to != NULL)
            copy_set_target(self, to, change->pair, true);
        if (from == NULL || from->copy == NULL)
            continue;
        copy_set_target(self, from, change->pair, false);
        if (self->home[change->pair] == from->id && to != NULL)
            self->home[change->pair] = to->id;
    }
    for (uint32_t i = 0; i < operation->changes; i++)
        settle_home(self, operation->change[i].pair);
    self->changed = true; /* the next epoch tells of it, should this coordinator end */
}

static int begin_change(struct coordinator *self, enum operation_kind kind, uint32_t pair,
                        actor_id from, actor_id to, uint64_t now_ns, uint64_t *ret_id,
                        struct failure *failure) {
    struct operation *operation = operation_add(self, kind, now_ns, failure);
    if (operation == NULL)
        return ERR_BUSY;
    operation->change = operation_allocate(1, sizeof *operation->change);
    operation->change[0] = (struct change){pair, from, to};
    operation->changes = 1;
    operation_apply(self, operation);
    *ret_id = operation->id;
    return 0;
}

int operation_replicate(struct coordinator *self, uint32_t layer, uint32_t expert, actor_id to,
                        uint64_t now_ns, uint64_t *ret_id, struct failure *failure) {
    uint32_t pair;
    int error = check_pair(self, layer, expert, &pair, failure);
    if (error < 0)
        return error;
    if (self->targets[pair] >= REPLICAS_MAX)
        return fail(failure, ERR_TOO_LARGE, "expert %u of layer %u has %u copies already", expert,
                    layer, self->targets[pair]);
    if (to == 0)
        to = emptiest(self, pair);
    if (to == 0)
        return fail(failure, ERR_TOO_LARGE,
                    "no other expert process has room for a copy of about %llu bytes",
                    (unsigned long long)self->expert_bytes);
    error = check_taker(self, to, pair, failure);
    return error < 0 ? error
                     : begin_change(self, OPERATION_REPLICATE, pair, 0, to, now_ns, ret_id, failure);
}

int operation_move(struct coordinator *self, uint32_t layer, uint32_t expert, actor_id from,
                   actor_id to, uint64_t now_ns, uint64_t *ret_id, struct failure *failure) {
    uint32_t pair;
    int error = check_pair(self, layer, expert, &pair, failure);
    if (error < 0)
        return error;
    const struct seat *seat = seat_find(self, from);
    if (seat == NULL || seat->role != ROLE_EXPERT || (seat->copy[pair] & COPY_TARGET) == 0) {
        const struct seat *home = seat_find(self, self->home[pair]);
        return fail(failure, ERR_NOT_FOUND, "%s does not hold expert %u of layer %u; %s does",
                    seat != NULL ? seat->name : "that process", expert, layer,
                    home != NULL ? home->name : "nobody");
    }
    error = check_taker(self, to, pair, failure);
    return error < 0 ? error
                     : begin_change(self, OPERATION_MOVE, pair, from, to, now_ns, ret_id, failure);
}

int operation_rebalance(struct coordinator *self, struct change **changes, uint32_t count,
                        bool automatic, uint64_t now_ns, uint64_t *ret_id, struct failure *failure) {
    for (uint32_t i = 0; i < count; i++) {
        uint32_t pair = (*changes)[i].pair;
        if (self->owner[pair] != 0)
            return fail(failure, ERR_BUSY,
                        "operation %llu is at work on expert %u of layer %u; wait for it or cancel it",
                        (unsigned long long)self->owner[pair], pair % self->config.experts,
                        pair / self->config.experts);
    }
    struct operation *operation = operation_add(self, OPERATION_REBALANCE, now_ns, failure);
    if (operation == NULL)
        return ERR_BUSY;
    operation->automatic = automatic;
    operation->change = *changes;
    operation->changes = count;
    *changes = NULL;
    operation_apply(self, operation);
    *ret_id = operation->id;
    return 0;
}

/* ---- ending early ---- */

/* What was to come is wanted no more, what was to go is wanted again. */
static void revert(struct coordinator *self, const struct operation *operation) {
    for (uint32_t i = 0; i < operation->changes; i++) {
        const struct change *change = &operation->change[i];
        struct seat *to = seat_find(self, change->to), *from = seat_find(self, change->from);
        if (self->owner[change->pair] != operation->id)
            continue;
        if (from != NULL && !from->draining) {
            copy_set_target(self, from, change->pair, true);
            if (self->home[change->pair] == 0)
                self->home[change->pair] = from->id;
        }
        bool other = self->targets[change->pair] >
                     (to != NULL && (to->copy[change->pair] & COPY_TARGET) != 0);
        if (to == NULL || !other) /* the last one stays */
            continue;
        copy_set_target(self, to, change->pair, false);
        if (self->home[change->pair] == change->to && from != NULL)
            self->home[change->pair] = from->id;
    }
    for (uint32_t i = 0; i < operation->changes; i++) /* whom it came from may be gone */
        settle_home(self, operation->change[i].pair);
}

void operation_abort(struct coordinator *self, struct operation *operation, uint64_t now_ns,
                            struct effects *out) {
    revert(self, operation);
    disown(self, operation);
    self->changed = true; /* who coordinates next must not go on with it */
    operation_enter(operation, PHASE_ABORTED, now_ns, out);
}

void operation_supersede(struct coordinator *self, uint64_t id, uint64_t now_ns,
                         struct effects *out) {
    struct operation *operation = operation_find(self, id);
    ASSERT(operation != NULL && !operation_ended(operation));
    snprintf(operation->reason, sizeof operation->reason,
             "superseded: processes came or went, and experts are placed anew");
    disown(self, operation);
    self->changed = true;
    operation_enter(operation, PHASE_ABORTED, now_ns, out);
}

void operation_failed(struct coordinator *self, uint64_t id, const struct seat *seat,
                      const char *error, uint64_t now_ns, struct effects *out) {
    struct operation *operation = operation_find(self, id);
    ASSERT(operation != NULL && !operation_ended(operation));
    snprintf(operation->reason, sizeof operation->reason, "%s could not load it: %.200s",
             seat->name, error);
    operation_abort(self, operation, now_ns, out);
}

int operation_cancel(struct coordinator *self, uint64_t id, uint64_t now_ns, struct effects *out,
                     struct failure *failure) {
    struct operation *operation = operation_find(self, id);
    if (operation == NULL)
        return fail(failure, ERR_NOT_FOUND, "there is no operation %llu", (unsigned long long)id);
    if (operation_ended(operation))
        return fail(failure, ERR_STATE, "operation %llu has ended already: it is %s",
                    (unsigned long long)id, PHASES[operation->phase]);
    bool leaving = operation->parties > 0 && !operation->starting, all_told = leaving;
    for (uint32_t i = 0; i < operation->parties && leaving; i++) {
        const struct seat *seat = seat_find(self, operation->party[i].id);
        all_told = all_told && (seat == NULL || seat->leave_sent_ns != 0);
    }
    if (all_told)
        return fail(failure, ERR_STATE, "operation %llu cannot be cancelled any more: %s",
                    (unsigned long long)id, "its processes are ending");
    snprintf(operation->reason, sizeof operation->reason, "cancelled");
    operation_abort(self, operation, now_ns, out);
    if (leaving)
        operation_stay(self, operation, now_ns, out);
    else if (operation->starting)
        operation_send_away(self, operation, now_ns, out);
    return 0;
}

/* ---- what others do meanwhile ---- */

void operations_lost(struct coordinator *self, actor_id id, uint64_t now_ns, struct effects *out) {
    for (uint32_t i = 0; i < OPERATIONS_MAX; i++) {
        struct operation *operation = &self->operation[i];
        bool needed = false;
        for (uint32_t j = 0; j < operation->parties; j++)
            if (operation->party[j].id == id) {
                operation->party[j].gone = !operation->starting;
                operation->party[j].id = operation->starting ? 0 : id;
            }
        for (uint32_t j = 0; j < operation->changes && !operation_ended(operation); j++)
            needed = needed || (operation->change[j].to == id && operation->phase < PHASE_RELEASE);
        if (!needed)
            continue;
        snprintf(operation->reason, sizeof operation->reason,
                 "actor %u, which was to take a copy, is gone", id);
        operation_abort(self, operation, now_ns, out);
    }
}

/* ---- time ---- */

static bool all_held(const struct coordinator *self, const struct operation *operation) {
    for (uint32_t i = 0; i < operation->changes; i++) {
        const struct change *change = &operation->change[i];
        const struct seat *to = seat_find(self, change->to);
        if (change->to != 0 &&
            (to == NULL || !to->ready || to->assigned[change->pair] != ASSIGNED_HELD))
            return false;
    }
    return true;
}

static void commit_changes(struct coordinator *self, struct operation *operation) {
    for (uint32_t i = 0; i < operation->changes; i++) {
        struct seat *to = seat_find(self, operation->change[i].to);
        if (to != NULL)
            copy_activate(self, to, operation->change[i].pair);
    }
    operation->epoch = self->epoch + 1;
    self->changed = true;
}

static bool dropped(const struct coordinator *self, const struct operation *operation) {
    for (uint32_t i = 0; i < operation->changes; i++) {
        const struct seat *from = seat_find(self, operation->change[i].from);
        if (from != NULL && from->copy[operation->change[i].pair] == 0 &&
            from->assigned[operation->change[i].pair] != ASSIGNED_NO)
            return false;
    }
    return true;
}

static void step_changes(struct coordinator *self, struct operation *operation, uint64_t now_ns,
                         struct effects *out) {
    if (operation->phase == PHASE_PREPARE && all_held(self, operation)) {
        operation_enter(operation, PHASE_READY, now_ns, out);
        commit_changes(self, operation);
        operation_enter(operation, PHASE_COMMIT, now_ns, out);
    }
    if (operation->phase == PHASE_COMMIT && self->epoch >= operation->epoch)
        operation_enter(operation, PHASE_DRAIN, now_ns, out);
    if (operation->phase == PHASE_DRAIN && epoch_adopted(self, operation->epoch, ROLE_ATTENTION))
        operation_enter(operation, PHASE_RELEASE, now_ns, out);
    if (operation->phase == PHASE_RELEASE && dropped(self, operation)) {
        disown(self, operation);
        operation_enter(operation, PHASE_DONE, now_ns, out);
    }
}

static void check_time(struct coordinator *self, struct operation *operation, uint64_t now_ns,
                       struct effects *out) {
    uint64_t limit_ns = (uint64_t)self->settings.operation_timeout_ms * 1000000u;
    uint32_t here = 0;
    if (operation->phase != PHASE_PREPARE || now_ns < operation->began_ns + limit_ns)
        return;
    for (uint32_t i = 0; i < operation->parties; i++) {
        const struct seat *seat = seat_find(self, operation->party[i].id);
        here += seat != NULL && seat->ready;
    }
    if (operation->starting)
        snprintf(operation->reason, sizeof operation->reason,
                 "%u of %u new processes are ready after %u ms", here,
                 operation->parties > 0 ? operation->parties : operation->count,
                 self->settings.operation_timeout_ms);
    else
        snprintf(operation->reason, sizeof operation->reason,
                 "copies are not loaded after %u ms", self->settings.operation_timeout_ms);
    operation_abort(self, operation, now_ns, out);
    if (operation->starting)
        operation_send_away(self, operation, now_ns, out);
    else if (operation->parties > 0)
        operation_stay(self, operation, now_ns, out);
}

static bool leaves(const struct seat *seat) {
    return seat->draining && seat->ready && seat->introduced_epoch > 0;
}

void operations_step(struct coordinator *self, uint64_t now_ns, struct effects *out) {
    if (self->learn_until_ns != NEVER)
        return;
    for (uint32_t i = 0; i < OPERATIONS_MAX; i++) {
        struct operation *operation = &self->operation[i];
        if (operation->id == 0)
            continue;
        operation_tell_supervisor(self, operation, now_ns, out);
        if (operation_ended(operation)) {
            operation->told = operation->told || seat_supervisor(self) == NULL;
            continue;
        }
        if (operation->starting)
            operation_step_starting(self, operation, now_ns, out);
        else if (operation->changes > 0)
            step_changes(self, operation, now_ns, out);
        else
            operation_step_parties(self, operation, now_ns, out);
        check_time(self, operation, now_ns, out);
    }
    for (uint32_t i = 0; i < self->seats; i++)
        if (leaves(&self->seat[i]))
            operation_step_leaving(self, &self->seat[i], now_ns, out);
}

/* When it is told to end, or told again. What was told may be lost, and a new gateway may then use it once more before it is drained
 * again: both times must be over. */
static uint64_t leaving_deadline(const struct coordinator *self, const struct seat *seat) {
    if (seat->drained_ns == 0)
        return NEVER;
    uint64_t lingered_ns = seat->drained_ns + (uint64_t)self->settings.drain_linger_ms * 1000000u;
    uint64_t again_ns = seat->leave_sent_ns != 0 ? seat->leave_sent_ns + 2 * self->retry_ns : 0;
    return lingered_ns > again_ns ? lingered_ns : again_ns;
}

uint64_t operations_deadline(const struct coordinator *self) {
    uint64_t deadline = NEVER;
    if (self->learn_until_ns != NEVER) /* as operations_step does */
        return NEVER;
    for (uint32_t i = 0; i < OPERATIONS_MAX; i++) {
        const struct operation *operation = &self->operation[i];
        if (operation->id != 0 && !operation->told && operation->tell_at_ns < deadline)
            deadline = operation->tell_at_ns;
        uint64_t limit_ns =
            operation->began_ns + (uint64_t)self->settings.operation_timeout_ms * 1000000u;
        if (!operation_ended(operation) && operation->phase == PHASE_PREPARE && limit_ns < deadline)
            deadline = limit_ns;
    }
    for (uint32_t i = 0; i < self->seats; i++)
        if (leaves(&self->seat[i]) && leaving_deadline(self, &self->seat[i]) < deadline)
            deadline = leaving_deadline(self, &self->seat[i]);
    return deadline;
}
