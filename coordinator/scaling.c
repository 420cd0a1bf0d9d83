/* Operations on processes: drain, scale. How they go through their phases: operations.c. A process that leaves gives
 * away what it has, waits until everybody who used it knows, is told to end, and ends; one that is wanted is
 * asked of the supervisor and waited for until it serves its share. */
#include "coordinator/operations.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- asking for processes ---- */

static bool counts(const struct seat *seat, enum role role) {
    return seat->role == role && !seat->draining;
}

static uint32_t count_seats(const struct coordinator *self, enum role role) {
    uint32_t count = 0;
    for (uint32_t i = 0; i < self->seats; i++)
        count += counts(&self->seat[i], role);
    return count;
}

/* The one that came last: an earlier one may still be waited for. */
struct seat *seat_supervisor(const struct coordinator *self) {
    for (uint32_t i = self->seats; i-- > 0;)
        if (self->seat[i].role == ROLE_CONTROL && strcmp(self->seat[i].name, "supervisor") == 0)
            return &self->seat[i];
    return NULL;
}

/* Would everything still have a place without the processes marked in `leaves` (by seat)? */
static int check_room(const struct coordinator *self, const bool *leaves, struct failure *failure) {
    uint64_t room = 0;
    uint32_t left = 0, with_file = 0, with_file_now = 0;
    for (uint32_t i = 0; i < self->seats; i++)
        if (counts(&self->seat[i], ROLE_EXPERT) && !leaves[i]) {
            room += self->seat[i].capacity;
            left++;
            with_file += !self->seat[i].fileless;
        }
    for (uint32_t i = 0; i < self->seats; i++)
        with_file_now += counts(&self->seat[i], ROLE_EXPERT) && !self->seat[i].fileless;
    if (left == 0 && self->moe_pairs > 0)
        return fail(failure, ERR_STATE,
                    "nobody would be left to hold the %u experts: start another expert process first",
                    self->moe_pairs);
    if (room < self->moe_pairs)
        return fail(failure, ERR_TOO_LARGE,
                    "not enough slots for all experts: the %u expert processes that would be left "
                    "have room for %llu experts (of about %llu bytes), the model has %u",
                    left, (unsigned long long)room, (unsigned long long)self->expert_bytes,
                    self->moe_pairs);
    if (with_file == 0 && with_file_now > 0 && self->moe_pairs > 0)
        return fail(failure, ERR_STATE,
                    "none of the %u expert processes that would be left has a file of weights: an "
                    "expert that is lost could not be had again; start one with the model directory first",
                    left);
    return 0;
}

static int check_leaving(const struct coordinator *self, enum role role, const bool *leaves,
                         struct failure *failure) {
    uint32_t left = 0, going = 0;
    if (role == ROLE_EXPERT)
        return check_room(self, leaves, failure);
    for (uint32_t i = 0; i < self->seats; i++) {
        going += counts(&self->seat[i], role) && leaves[i];
        left += counts(&self->seat[i], role) && !leaves[i] && self->seat[i].ready;
    }
    if (left == 0)
        return fail(failure, ERR_STATE,
                    "no ready %s process would be left of %u: start another one first",
                    role_name(role), going);
    return 0;
}

/* Marks the processes as draining; from the next epoch on everybody knows. */
static void begin_leaving(struct coordinator *self, struct operation *operation, const bool *leaves,
                          uint64_t now_ns, struct effects *out) {
    operation->party = operation_allocate(self->seats, sizeof *operation->party);
    for (uint32_t i = 0; i < self->seats; i++) {
        struct seat *seat = &self->seat[i];
        if (!leaves[i])
            continue;
        struct party *party = &operation->party[operation->parties++];
        party->id = seat->id;
        snprintf(party->name, sizeof party->name, "%s", seat->name);
        seat->draining = seat->dirty = true;
        seat->draining_epoch = self->epoch + 1;
        seat->drained_ns = seat->leave_sent_ns = 0;
    }
    operation->epoch = self->epoch + 1;
    operation->told = false;
    operation->tell_at_ns = now_ns;
    self->changed = true;
    copies_plan(self, now_ns, out);
}

int operation_drain(struct coordinator *self, actor_id id, uint64_t now_ns, struct effects *out,
                    uint64_t *ret_id, struct failure *failure) {
    const struct seat *seat = seat_find(self, id);
    bool leaves[ACTORS_MAX] = {false};
    if (seat == NULL)
        return fail(failure, ERR_NOT_FOUND, "there is no actor %u", id);
    if (seat->role != ROLE_EXPERT && seat->role != ROLE_ATTENTION && seat->role != ROLE_SAMPLER)
        return fail(failure, ERR_UNSUPPORTED,
                    "%s is a %s: experts, attention and samplers can be drained", seat->name,
                    role_name(seat->role));
    if (seat->draining)
        return fail(failure, ERR_EXISTS, "%s is being drained already", seat->name);
    leaves[seat - self->seat] = true;
    int error = check_leaving(self, seat->role, leaves, failure);
    if (error == 0)
        error = policy_check_leaving(self, seat->role, count_seats(self, seat->role), 1, failure);
    if (error < 0)
        return error;
    struct operation *operation = operation_add(self, OPERATION_DRAIN, now_ns, failure);
    if (operation == NULL)
        return ERR_BUSY;
    operation->role = seat->role;
    *ret_id = operation->id;
    begin_leaving(self, operation, leaves, now_ns, out);
    return 0;
}

/* Of expert processes: somebody must be able to load what is lost. */
static uint32_t oldest_with_file(const struct coordinator *self) {
    uint32_t i = 0;
    while (i < self->seats && !(counts(&self->seat[i], ROLE_EXPERT) && !self->seat[i].fileless))
        i++;
    return i;
}

static int scale_down(struct coordinator *self, enum role role, uint32_t count, uint64_t now_ns,
                      struct effects *out, uint64_t *ret_id, struct failure *failure) {
    bool leaves[ACTORS_MAX] = {false};
    uint32_t excess = count_seats(self, role) - count;
    for (uint32_t i = self->seats; i-- > 0 && excess > 0;) /* the youngest first */
        if (counts(&self->seat[i], role) && (self->seat[i].fileless || i != oldest_with_file(self))) {
            leaves[i] = true;
            excess--;
        }
    int error = check_leaving(self, role, leaves, failure);
    if (error < 0)
        return error;
    struct operation *operation = operation_add(self, OPERATION_SCALE, now_ns, failure);
    if (operation == NULL)
        return ERR_BUSY;
    operation->role = role;
    operation->count = count;
    *ret_id = operation->id;
    begin_leaving(self, operation, leaves, now_ns, out);
    return 0;
}

static int scale_up(struct coordinator *self, enum role role, uint32_t count, uint64_t now_ns,
                    uint64_t *ret_id, struct failure *failure) {
    uint32_t here = count_seats(self, role);
    if (seat_supervisor(self) == NULL && count > here)
        return fail(failure, ERR_UNSUPPORTED,
                    "no supervisor (troupe serve) is here to start %u more: start them by hand, "
                    "troupe %s joins by itself",
                    count - here, role_name(role));
    struct operation *operation = operation_add(self, OPERATION_SCALE, now_ns, failure);
    if (operation == NULL)
        return ERR_BUSY;
    operation->role = role;
    operation->count = count;
    operation->starting = true;
    operation->told = count == here;
    operation->tell_at_ns = now_ns;
    self->changed = true; /* the next epoch tells of it, should this coordinator end */
    *ret_id = operation->id;
    return 0;
}

int operation_scale(struct coordinator *self, enum role role, uint32_t count, uint64_t now_ns,
                    struct effects *out, uint64_t *ret_id, struct failure *failure) {
    if (role != ROLE_EXPERT && role != ROLE_ATTENTION && role != ROLE_SAMPLER)
        return fail(failure, ERR_UNSUPPORTED, "experts, attention and samplers can be scaled");
    int error = policy_check_scale(self, role, count_seats(self, role), count, failure);
    if (error < 0)
        return error;
    for (uint32_t i = 0; i < OPERATIONS_MAX; i++) {
        const struct operation *other = &self->operation[i];
        if (!operation_ended(other) && other->kind == OPERATION_SCALE && other->role == role &&
            other->starting)
            return fail(failure, ERR_BUSY,
                        "operation %llu is scaling %s to %u; wait for it or cancel it",
                        (unsigned long long)other->id, role_name(role), other->count);
    }
    if (self->learn_until_ns != NEVER)
        return fail(failure, ERR_STATE, "the coordinator is still learning who is there");
    return count < count_seats(self, role)
               ? scale_down(self, role, count, now_ns, out, ret_id, failure)
               : scale_up(self, role, count, now_ns, ret_id, failure);
}

void operations_joined(struct coordinator *self, struct seat *seat, uint64_t now_ns) {
    for (uint32_t i = 0; i < OPERATIONS_MAX; i++) {
        struct operation *operation = &self->operation[i];
        for (uint32_t j = 0; operation->starting && j < operation->parties; j++) {
            struct party *party = &operation->party[j];
            if (strcmp(party->name, seat->name) != 0 || party->gone)
                continue;
            party->id = seat->id;
            if (operation->phase == PHASE_ABORTED) /* nobody waits for it any more */
                seat->draining = true;
        }
    }
}

void operations_on_scaled(struct coordinator *self, const Troupe__Scaled *scaled, uint64_t now_ns,
                          struct effects *out) {
    struct operation *operation = operation_find(self, scaled->operation);
    if (operation == NULL || operation->told)
        return;
    operation->told = self->changed = true;
    operation->tell_at_ns = NEVER;
    if (!operation->starting || operation_ended(operation))
        return;
    if (scaled->error[0] != '\0') {
        snprintf(operation->reason, sizeof operation->reason, "%.400s", scaled->error);
        operation_abort(self, operation, now_ns, out);
        return;
    }
    operation->party = operation_allocate(scaled->n_started, sizeof *operation->party);
    operation->parties = (uint32_t)scaled->n_started;
    for (uint32_t i = 0; i < operation->parties; i++) {
        struct party *party = &operation->party[i];
        snprintf(party->name, sizeof party->name, "%.63s", scaled->started[i]->name);
        for (uint32_t j = 0; j < self->seats; j++) /* faster than this answer */
            if (strcmp(self->seat[j].name, party->name) == 0 && counts(&self->seat[j], operation->role))
                party->id = self->seat[j].id;
    }
}

/* Those that have not been told to end stay after all. */
void operation_stay(struct coordinator *self, struct operation *operation, uint64_t now_ns,
                 struct effects *out) {
    for (uint32_t i = 0; i < operation->parties; i++) {
        struct seat *seat = seat_find(self, operation->party[i].id);
        if (seat == NULL || seat->leave_sent_ns != 0)
            continue;
        seat->draining = false;
        seat->dirty = self->changed = true;
    }
    copies_plan(self, now_ns, out);
}

/* Those that it has started leave again, also those that have not joined yet (operations_joined). */
void operation_send_away(struct coordinator *self, struct operation *operation, uint64_t now_ns,
                      struct effects *out) {
    actor_id id[ACTORS_MAX];
    uint32_t count = 0;
    for (uint32_t i = 0; i < operation->parties && count < ACTORS_MAX; i++)
        id[count++] = operation->party[i].id;
    for (uint32_t i = 0; i < count; i++) { /* each may take the place of `operation` in the list */
        const struct seat *seat = seat_find(self, id[i]);
        uint64_t drain;
        struct failure failure;
        if (seat != NULL && !seat->draining &&
            operation_drain(self, seat->id, now_ns, out, &drain, &failure) < 0)
            effects_trace(out, TRACE_WARNING, "%s stays: %s", seat->name, failure.text);
    }
}

void operation_tell_supervisor(struct coordinator *self, struct operation *operation, uint64_t now_ns,
                            struct effects *out) {
    if (operation->told || now_ns < operation->tell_at_ns)
        return;
    const struct seat *seat = seat_supervisor(self);
    operation->tell_at_ns = now_ns + 2 * self->retry_ns;
    if (seat == NULL)
        return;
    Troupe__Scale scale = TROUPE__SCALE__INIT;
    scale.operation = operation->id;
    scale.role = (Troupe__Role)operation->role;
    scale.begun_by = operation->begun_by;
    if (operation->starting) {
        uint32_t here = count_seats(self, operation->role);
        scale.start = operation->count > here ? operation->count - here : 0;
    } else {
        scale.n_leaving = operation->parties;
        scale.leaving = effects_alloc(out, operation->parties * sizeof *scale.leaving);
        for (uint32_t i = 0; i < operation->parties; i++) {
            scale.leaving[i] = effects_alloc(out, sizeof *scale.leaving[i]);
            troupe__process__init(scale.leaving[i]);
            scale.leaving[i]->name = operation->party[i].name;
        }
    }
    message envelope = coordinator_envelope(self);
    envelope.body_case = TROUPE__ENVELOPE__BODY_SCALE;
    envelope.scale = &scale;
    effects_send(out, seat->id, &envelope);
}

bool epoch_adopted(const struct coordinator *self, uint64_t epoch, enum role role) {
    for (uint32_t i = 0; i < self->seats; i++)
        if (self->seat[i].role == role && self->seat[i].acknowledged_epoch < epoch)
            return false;
    return self->epoch >= epoch;
}

/* Nothing is placed at it, and nobody who used it does so any more. */
static bool unused(const struct coordinator *self, const struct seat *seat, uint64_t epoch) {
    if (seat->acknowledged_epoch < epoch)
        return false;
    switch (seat->role) {
    case ROLE_EXPERT:
        return copies_none(self, seat);
    case ROLE_SAMPLER:
        return epoch_adopted(self, epoch, ROLE_ATTENTION);
    default:
        return epoch_adopted(self, epoch, ROLE_GATEWAY) && seat->heartbeat.epoch >= epoch &&
               seat->heartbeat.sequences_running == 0 && seat->heartbeat.sequences_waiting == 0;
    }
}

static void dismiss(struct coordinator *self, struct seat *seat, uint64_t now_ns,
                    struct effects *out) {
    if (seat->leave_sent_ns != 0 && now_ns < seat->leave_sent_ns + 2 * self->retry_ns)
        return;
    seat->leave_sent_ns = now_ns;
    Troupe__Shutdown shutdown = TROUPE__SHUTDOWN__INIT;
    shutdown.reason = "drained";
    message envelope = coordinator_envelope(self);
    envelope.body_case = TROUPE__ENVELOPE__BODY_SHUTDOWN;
    envelope.shutdown = &shutdown;
    effects_send(out, seat->id, &envelope);
}

/* Also for processes that an earlier coordinator was draining. */
void operation_step_leaving(struct coordinator *self, struct seat *seat, uint64_t now_ns,
                         struct effects *out) {
    uint64_t epoch = seat->draining_epoch > seat->introduced_epoch ? seat->draining_epoch
                                                                  : seat->introduced_epoch;
    if (!unused(self, seat, epoch))
        seat->drained_ns = 0;
    else if (seat->drained_ns == 0)
        seat->drained_ns = now_ns;
    if (seat->drained_ns != 0 &&
        now_ns >= seat->drained_ns + (uint64_t)self->settings.drain_linger_ms * 1000000u)
        dismiss(self, seat, now_ns, out);
}

static enum operation_phase leaving_phase(const struct coordinator *self, const struct seat *seat,
                                          const struct operation *operation) {
    if (seat->drained_ns != 0)
        return PHASE_RELEASE;
    for (uint32_t pair = 0; seat->role == ROLE_EXPERT && pair < self->pairs; pair++)
        if (seat->copy[pair] != 0)
            return PHASE_PREPARE;
    return seat->role == ROLE_EXPERT && copies_drained(self, seat) &&
                   self->epoch >= operation->epoch
               ? PHASE_RELEASE
               : PHASE_DRAIN;
}

void operation_step_parties(struct coordinator *self, struct operation *operation, uint64_t now_ns,
                         struct effects *out) {
    enum operation_phase phase = PHASE_DONE;
    for (uint32_t i = 0; i < operation->parties; i++) {
        struct seat *seat = seat_find(self, operation->party[i].id);
        if (operation->party[i].gone || seat == NULL)
            continue;
        enum operation_phase its = leaving_phase(self, seat, operation);
        phase = its < phase ? its : phase;
    }
    while (operation->phase < phase) /* every phase is seen */
        operation_enter(operation, operation->phase + 1, now_ns, out);
}

void operation_step_starting(struct coordinator *self, struct operation *operation, uint64_t now_ns,
                          struct effects *out) {
    bool all = operation->told;
    for (uint32_t i = 0; i < operation->parties; i++) {
        const struct seat *seat = seat_find(self, operation->party[i].id);
        all = all && seat != NULL && seat->ready;
        for (uint32_t pair = 0; all && seat->role == ROLE_EXPERT && pair < self->pairs; pair++)
            all = seat->copy[pair] != COPY_TARGET;
    }
    while (all && operation->phase < PHASE_DONE)
        operation_enter(operation, operation->phase + 1, now_ns, out);
}
