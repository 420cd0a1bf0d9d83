/* Copies of experts: who serves each (layer, expert), who is to, and the orders that bring it
 * about.
 *
 * A pair whose target is not its active holder is on its way: the target has been told to load it
 * (ASSIGN); when it says READY, it becomes the active one. The old one serves until then (make
 * before break) and drops it (RELEASE) once every attention actor has adopted an epoch without it.
 *
 * An order is an ASSIGN or a RELEASE with a new operation number, said again until READY names that
 * number; a newer order to the same process replaces it.
 *
 * Invariants: 1. a live active holder is never told to drop before its successor is ready; 2. READY
 * counts only for the newest operation of a process; 3. everything a process was told to hold is
 * told to be dropped once it is neither active nor target there. */
#include "coordinator/coordinator.h"

#include <string.h>

#define ORDER_WAIT_MAX_NS 2000000000u
#define TRUST_WAIT_MAX_NS 10000000000u

bool seat_serves(const struct coordinator *self, actor_id id) {
    const struct seat *seat = id != 0 ? seat_find(self, id) : NULL;
    return seat != NULL && seat->role == ROLE_EXPERT && seat->ready;
}

bool copies_complete(const struct coordinator *self) {
    for (uint32_t pair = 0; pair < self->pairs; pair++)
        if (self->is_moe[pair / self->config.experts] && !seat_serves(self, self->active[pair]))
            return false;
    return true;
}

/* The process serves the pair or is to serve it. */
static bool holds(const struct coordinator *self, const struct seat *seat, uint32_t pair) {
    return self->target[pair] == seat->id || self->active[pair] == seat->id;
}

/* ---- orders ---- */

static void send_order(struct coordinator *self, struct seat *seat, uint64_t now_ns,
                       struct effects *out) {
    uint32_t *layer = effects_alloc(out, self->pairs * sizeof *layer);
    uint32_t *expert = effects_alloc(out, self->pairs * sizeof *expert);
    enum assigned listed = seat->order == ORDER_ASSIGN ? ASSIGNED_NOW : ASSIGNED_RELEASING;
    size_t count = 0;
    for (uint32_t pair = 0; pair < self->pairs; pair++)
        if (seat->assigned[pair] == listed) {
            layer[count] = pair / self->config.experts;
            expert[count++] = pair % self->config.experts;
        }
    Troupe__Assign assign = TROUPE__ASSIGN__INIT;
    Troupe__Release release = TROUPE__RELEASE__INIT;
    message envelope = coordinator_envelope(self);
    if (seat->order == ORDER_ASSIGN) {
        assign.operation = seat->operation;
        assign.incarnation = seat->incarnation;
        assign.n_layer = assign.n_expert = count;
        assign.layer = layer;
        assign.expert = expert;
        envelope.body_case = TROUPE__ENVELOPE__BODY_ASSIGN;
        envelope.assign = &assign;
    } else {
        release.operation = seat->operation;
        release.incarnation = seat->incarnation;
        release.n_layer = release.n_expert = count;
        release.layer = layer;
        release.expert = expert;
        envelope.body_case = TROUPE__ENVELOPE__BODY_RELEASE;
        envelope.release = &release;
    }
    effects_send(out, seat->id, &envelope);
    seat->order_at_ns = now_ns + seat->order_wait_ns;
    seat->order_wait_ns *= 2;
    if (seat->order_wait_ns > ORDER_WAIT_MAX_NS)
        seat->order_wait_ns = ORDER_WAIT_MAX_NS;
}

static void begin_order(struct coordinator *self, struct seat *seat, enum order_kind kind,
                        uint64_t now_ns, struct effects *out) {
    seat->order = kind;
    seat->operation = ++self->last_operation;
    seat->order_wait_ns = self->retry_ns;
    for (uint32_t pair = 0; pair < self->pairs; pair++) {
        uint8_t *assigned = &seat->assigned[pair];
        bool wanted = holds(self, seat, pair);
        if (kind == ORDER_ASSIGN && wanted)
            *assigned = ASSIGNED_NOW;
        else if (kind == ORDER_ASSIGN && *assigned != ASSIGNED_NO)
            *assigned = ASSIGNED_BEFORE;
        else if (kind == ORDER_RELEASE && !wanted && *assigned != ASSIGNED_NO)
            *assigned = ASSIGNED_RELEASING;
    }
    send_order(self, seat, now_ns, out);
}

static bool has_surplus(const struct coordinator *self, const struct seat *seat) {
    for (uint32_t pair = 0; pair < self->pairs; pair++)
        if (seat->assigned[pair] != ASSIGNED_NO && !holds(self, seat, pair))
            return true;
    return false;
}

/* No attention actor uses an epoch any more in which the process held what it has lost since. */
static bool drained(const struct coordinator *self, const struct seat *seat) {
    for (uint32_t i = 0; i < self->seats; i++)
        if (self->seat[i].role == ROLE_ATTENTION &&
            self->seat[i].acknowledged_epoch < seat->shrunk_epoch)
            return false;
    return self->epoch >= seat->shrunk_epoch;
}

/* Something it is to serve is not in the order that it works on. */
static bool needs_order(const struct coordinator *self, const struct seat *seat) {
    for (uint32_t pair = 0; seat->role == ROLE_EXPERT && pair < self->pairs; pair++)
        if (self->target[pair] == seat->id && self->active[pair] != seat->id &&
            (seat->order != ORDER_ASSIGN || seat->assigned[pair] != ASSIGNED_NOW))
            return true;
    return false;
}

/* ---- planning ---- */

static uint32_t index_of(const uint32_t *id, uint32_t count, actor_id wanted) {
    for (uint32_t i = 0; wanted != 0 && i < count; i++)
        if (id[i] == wanted)
            return i;
    return NOBODY;
}

static void complain(struct coordinator *self, uint32_t homeless, uint32_t holders,
                     struct effects *out) {
    if (homeless > 0 && !self->complained)
        effects_trace(
            out, TRACE_ERROR,
            "%u experts have no place: %u expert processes have no room for more (about %llu "
            "bytes each); start another one or raise its capacity",
            homeless, holders, (unsigned long long)self->expert_bytes);
    self->complained = homeless > 0;
}

static void retarget(struct coordinator *self, const uint32_t *id) {
    for (uint32_t pair = 0; pair < self->pairs; pair++) {
        actor_id wanted = self->wanted[pair] == NOBODY ? 0 : id[self->wanted[pair]];
        if (wanted == 0) /* no room anywhere: whoever serves it goes on */
            wanted = self->active[pair];
        self->target[pair] = wanted;
    }
}

void copies_plan(struct coordinator *self, uint64_t now_ns, struct effects *out) {
    if (!self->placed || self->pairs == 0 || self->learn_until_ns != NEVER)
        return;
    uint32_t *id = self->scratch, *capacity = id + ACTORS_MAX, holders = 0;
    for (uint32_t i = 0; i < self->seats; i++)
        if (self->seat[i].role == ROLE_EXPERT) {
            id[holders] = self->seat[i].id;
            capacity[holders++] = self->seat[i].capacity;
        }
    for (uint32_t pair = 0; pair < self->pairs; pair++) {
        actor_id held = self->target[pair] != 0 ? self->target[pair] : self->active[pair];
        self->current[pair] = index_of(id, holders, held);
    }
    uint32_t homeless =
        placement_even(self->config.layers, self->is_moe, self->config.experts, holders, capacity,
                       self->current, self->wanted, capacity + ACTORS_MAX);
    complain(self, homeless, holders, out);
    retarget(self, id);
    for (uint32_t i = 0; i < self->seats; i++)
        if (needs_order(self, &self->seat[i]))
            begin_order(self, &self->seat[i], ORDER_ASSIGN, now_ns, out);
}

void copies_forget(struct coordinator *self, actor_id id) {
    for (uint32_t pair = 0; pair < self->pairs; pair++) {
        if (self->active[pair] == id)
            self->active[pair] = 0;
        if (self->target[pair] == id)
            self->target[pair] = 0;
    }
}

/* ---- answers ---- */

static void activate(struct coordinator *self, struct seat *seat) {
    for (uint32_t pair = 0; pair < self->pairs; pair++) {
        if (self->target[pair] != seat->id || self->active[pair] == seat->id)
            continue;
        ASSERT(seat->assigned[pair] == ASSIGNED_NOW);
        struct seat *old = self->active[pair] != 0 ? seat_find(self, self->active[pair]) : NULL;
        if (old != NULL)
            old->shrunk_epoch = self->epoch + 1; /* the one that is published with this step */
        self->active[pair] = seat->id;
        self->changed = true;
    }
}

/* The process keeps what it serves and is given no more for a while, each time for longer; what it was
 * to load goes to others. Disks and memory recover, so nobody is written off. */
static void give_up(struct coordinator *self, struct seat *seat, const char *error, uint64_t now_ns,
                    struct effects *out) {
    effects_trace(out, TRACE_ERROR, "%s (actor %u) could not load its experts: %s", seat->name,
                  seat->id, error);
    uint32_t serves = 0;
    for (uint32_t pair = 0; pair < self->pairs; pair++) {
        serves += self->active[pair] == seat->id;
        if (self->target[pair] == seat->id && self->active[pair] != seat->id)
            self->target[pair] = 0;
    }
    seat->capacity = serves;
    uint64_t wait_ns = self->retry_ns << (seat->failures < 8 ? seat->failures : 8);
    seat->failures++;
    seat->trusted_at_ns = now_ns + (wait_ns < TRUST_WAIT_MAX_NS ? wait_ns : TRUST_WAIT_MAX_NS);
    copies_plan(self, now_ns, out);
}

void copies_on_ready(struct coordinator *self, struct seat *seat, const Troupe__Ready *ready,
                     uint64_t now_ns, struct effects *out) {
    if (seat->order == ORDER_NONE || ready->operation != seat->operation)
        return;
    enum order_kind order = seat->order;
    seat->order = ORDER_NONE;
    if (order == ORDER_ASSIGN && ready->ok) {
        seat->failures = 0;
        activate(self, seat);
    } else if (order == ORDER_ASSIGN) {
        give_up(self, seat, ready->error, now_ns, out);
    } else {
        for (uint32_t pair = 0; pair < self->pairs; pair++)
            if (seat->assigned[pair] == ASSIGNED_RELEASING)
                seat->assigned[pair] = ASSIGNED_NO;
    }
}

/* ---- what an earlier coordinator had done ---- */

void copies_learn(struct coordinator *self, struct seat *seat, const Troupe__Hello *hello) {
    for (size_t i = 0; i < hello->n_layer; i++) {
        if (hello->layer[i] >= self->config.layers || hello->expert[i] >= self->config.experts ||
            !self->is_moe[hello->layer[i]])
            continue;
        uint32_t pair = hello->layer[i] * self->config.experts + hello->expert[i];
        seat->assigned[pair] = ASSIGNED_BEFORE;
        if (i >= hello->held || self->active[pair] != 0)
            continue;
        self->active[pair] = seat->id;
        if (self->target[pair] == 0)
            self->target[pair] = seat->id;
    }
    seat->shrunk_epoch = self->epoch + 1; /* what is nobody's target here is used until then */
}

void copies_learn_more(struct coordinator *self, struct seat *seat, const Troupe__Hello *hello,
                       uint64_t now_ns, struct effects *out) {
    for (size_t i = 0; i < hello->n_layer; i++) {
        if (hello->layer[i] >= self->config.layers || hello->expert[i] >= self->config.experts)
            continue;
        uint8_t *assigned = &seat->assigned[hello->layer[i] * self->config.experts + hello->expert[i]];
        if (*assigned == ASSIGNED_NO)
            *assigned = ASSIGNED_BEFORE;
    }
    if (seat->order != ORDER_NONE && seat->operation <= hello->operation)
        begin_order(self, seat, seat->order, now_ns, out);
}

/* Epochs that others reported since may be larger; from the next one on the copies learnt of count. */
void copies_learnt(struct coordinator *self, uint64_t now_ns, struct effects *out) {
    bool some = false;
    for (uint32_t pair = 0; pair < self->pairs; pair++)
        some = some || self->active[pair] != 0;
    for (uint32_t i = 0; i < self->seats; i++)
        if (self->seat[i].role == ROLE_EXPERT)
            self->seat[i].shrunk_epoch = self->epoch + 1;
    self->placed = self->placed || some;
    copies_plan(self, now_ns, out);
}

/* ---- time ---- */

static bool all_here(const struct coordinator *self) {
    uint32_t experts = 0;
    for (uint32_t i = 0; i < self->seats; i++)
        experts += self->seat[i].role == ROLE_EXPERT;
    return self->settings.expected_experts > 0 && experts >= self->settings.expected_experts;
}

void copies_timer(struct coordinator *self, uint64_t now_ns, struct effects *out) {
    if (self->learn_until_ns != NEVER)
        return;
    if (!self->placed && self->place_at_ns != NEVER &&
        (now_ns >= self->place_at_ns || all_here(self))) {
        self->placed = true;
        copies_plan(self, now_ns, out);
    }
    for (uint32_t i = 0; i < self->seats; i++) {
        struct seat *seat = &self->seat[i];
        if (seat->role != ROLE_EXPERT)
            continue;
        if (now_ns >= seat->trusted_at_ns) {
            seat->trusted_at_ns = NEVER;
            seat->capacity = seat->room;
            copies_plan(self, now_ns, out);
        }
        if (seat->order != ORDER_NONE && now_ns >= seat->order_at_ns)
            send_order(self, seat, now_ns, out);
        else if (seat->order == ORDER_NONE && drained(self, seat) && has_surplus(self, seat))
            begin_order(self, seat, ORDER_RELEASE, now_ns, out);
    }
}

uint64_t copies_deadline(const struct coordinator *self) {
    uint64_t deadline = self->placed ? NEVER : self->place_at_ns;
    if (self->learn_until_ns != NEVER)
        return NEVER;
    for (uint32_t i = 0; i < self->seats; i++)
        if (self->seat[i].order != ORDER_NONE && self->seat[i].order_at_ns < deadline)
            deadline = self->seat[i].order_at_ns;
    for (uint32_t i = 0; i < self->seats; i++)
        if (self->seat[i].role == ROLE_EXPERT && self->seat[i].trusted_at_ns < deadline)
            deadline = self->seat[i].trusted_at_ns;
    return deadline;
}
