/* Copies of experts: who serves each (layer, expert), who is to, and the orders that bring it
 * about.
 *
 * A copy is a pair at a process. It is wanted (COPY_TARGET), in the current epoch (COPY_ACTIVE), both,
 * or neither; `assigned` says what the process was told about it:
 *
 *   target       -> ASSIGN -> READY (held) -> active        with the next epoch
 *   not target   -> inactive once all targets of its pair are active (make before break)
 *                -> RELEASE once every attention actor has adopted an epoch without it
 *
 * An order is an ASSIGN or a RELEASE with a new operation number, said again until READY names that
 * number; a newer order to the same process replaces it. Copies that an operation of
 * operations.c owns become active together, when the last of them is held; all others at once.
 *
 * A process without a file (`fileless`) takes what it is to hold from whoever serves it. So what nobody
 * serves goes to processes that have one, whatever their share; once it is served it is placed anew.
 * If there is none, it waits for one.
 *
 * Invariants: 1. an active copy at a live process goes inactive only when every target of its pair is
 * active; 2. READY counts only for the newest order of a process; 3. everything a process was
 * told to hold is told to be dropped once it is neither active nor target there; 4. `targets`, `actives`
 * and `waiting` count the bits; 5. a pair's home is one of its targets (copies_broken looks
 * at 4 and 5 between steps). */
#include "coordinator/coordinator.h"

#include <string.h>

#define ORDER_WAIT_MAX_NS 2000000000u
#define TRUST_WAIT_MAX_NS 10000000000u

bool seat_serves(const struct coordinator *self, const struct seat *seat) {
    return seat->role == ROLE_EXPERT && seat->ready;
}

bool copies_complete(const struct coordinator *self) {
    uint32_t served = 0, wanted = self->moe_pairs;
    for (uint32_t pair = 0; pair < self->pairs; pair++)
        served += self->actives[pair] >= copies_needed(self); /* only ready processes are made active */
    return served == wanted;
}

/* ---- bits ---- */

static void count_waiting(struct coordinator *self, uint32_t pair, uint8_t before, uint8_t after) {
    self->waiting[pair] += (after & (COPY_TARGET | COPY_ACTIVE)) == COPY_TARGET;
    self->waiting[pair] -= (before & (COPY_TARGET | COPY_ACTIVE)) == COPY_TARGET;
}

void copy_set_target(struct coordinator *self, struct seat *seat, uint32_t pair, bool on) {
    uint8_t before = seat->copy[pair], after = on ? before | COPY_TARGET : before & ~COPY_TARGET;
    if (before == after)
        return;
    seat->copy[pair] = after;
    seat->targets += on ? 1 : -1u;
    self->targets[pair] += on ? 1 : -1;
    count_waiting(self, pair, before, after);
    seat->dirty = true;
}

static void set_active(struct coordinator *self, struct seat *seat, uint32_t pair, bool on) {
    uint8_t before = seat->copy[pair], after = on ? before | COPY_ACTIVE : before & ~COPY_ACTIVE;
    if (before == after)
        return;
    seat->copy[pair] = after;
    self->actives[pair] += on ? 1 : -1;
    count_waiting(self, pair, before, after);
    if (!on)
        seat->shrunk_epoch = self->epoch + 1; /* the one that is published with this step */
    else if (self->source_due)
        self->source_came = true;
    seat->dirty = true;
    self->changed = true;
}

/* Old copies go when all that are wanted have come. */
static void retire(struct coordinator *self, uint32_t pair) {
    if (self->waiting[pair] > 0 || self->targets[pair] == 0 ||
        self->actives[pair] == self->targets[pair])
        return;
    for (uint32_t i = 0; i < self->seats; i++)
        if (self->seat[i].copy != NULL && self->seat[i].copy[pair] == COPY_ACTIVE)
            set_active(self, &self->seat[i], pair, false);
}

void copy_activate(struct coordinator *self, struct seat *seat, uint32_t pair) {
    ASSERT(seat->assigned[pair] == ASSIGNED_HELD && seat->ready);
    set_active(self, seat, pair, true);
    retire(self, pair);
}

static bool holds(const struct seat *seat, uint32_t pair) {
    return seat->copy[pair] != 0;
}

void copies_forget(struct coordinator *self, struct seat *seat) {
    for (uint32_t pair = 0; pair < self->pairs; pair++) {
        copy_set_target(self, seat, pair, false);
        set_active(self, seat, pair, false);
        if (self->home[pair] != seat->id)
            continue;
        self->home[pair] = 0; /* a replica becomes the one that is looked after */
        for (uint32_t i = 0; self->targets[pair] > 0 && i < self->seats; i++)
            if (self->seat[i].copy != NULL && (self->seat[i].copy[pair] & COPY_TARGET) != 0)
                self->home[pair] = self->seat[i].id;
    }
}

bool copies_none(const struct coordinator *self, const struct seat *seat) {
    for (uint32_t pair = 0; pair < self->pairs; pair++)
        if (seat->copy[pair] != 0 || seat->assigned[pair] != ASSIGNED_NO)
            return false;
    return true;
}

/* ---- orders ---- */

static bool listed(const struct seat *seat, uint32_t pair) {
    if (seat->order == ORDER_RELEASE)
        return seat->assigned[pair] == ASSIGNED_RELEASING;
    return seat->assigned[pair] == ASSIGNED_NOW || seat->assigned[pair] == ASSIGNED_HELD;
}

static void send_order(struct coordinator *self, struct seat *seat, uint64_t now_ns,
                       struct effects *out) {
    uint32_t *layer = effects_alloc(out, self->pairs * sizeof *layer);
    uint32_t *expert = effects_alloc(out, self->pairs * sizeof *expert);
    size_t count = 0;
    for (uint32_t pair = 0; pair < self->pairs; pair++)
        if (listed(seat, pair)) {
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
    seat->dirty = true;
    for (uint32_t pair = 0; pair < self->pairs; pair++) {
        uint8_t *assigned = &seat->assigned[pair];
        bool wanted = holds(seat, pair);
        if (kind == ORDER_ASSIGN && wanted && *assigned != ASSIGNED_HELD)
            *assigned = ASSIGNED_NOW;
        else if (kind == ORDER_ASSIGN && !wanted && *assigned != ASSIGNED_NO)
            *assigned = ASSIGNED_BEFORE;
        else if (kind == ORDER_RELEASE && !wanted && *assigned != ASSIGNED_NO)
            *assigned = ASSIGNED_RELEASING;
    }
    send_order(self, seat, now_ns, out);
}

bool copies_drained(const struct coordinator *self, const struct seat *seat) {
    for (uint32_t i = 0; i < self->seats; i++)
        if (self->seat[i].role == ROLE_ATTENTION &&
            self->seat[i].acknowledged_epoch < seat->shrunk_epoch)
            return false;
    return self->epoch >= seat->shrunk_epoch;
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
    uint32_t of_file = 0;
    for (uint32_t pair = 0; self->source_due && homeless > 0 && pair < self->pairs; pair++)
        of_file += self->is_moe[pair / self->config.experts] && self->wanted[pair] == NOBODY &&
                   self->source[pair] == SOURCE_FILE;
    if (of_file > 0 && !self->complained)
        effects_trace(out, TRACE_ERROR,
                      "%u experts have no place: nobody serves them, and no process that has a file of "
                      "the weights has room for them; start one with the model directory",
                      of_file);
    else if (homeless > 0 && !self->complained)
        effects_trace(
            out, TRACE_ERROR,
            "%u experts have no place: %u expert processes have no room for more (about %llu "
            "bytes each); start another one or raise its capacity",
            homeless, holders, (unsigned long long)self->expert_bytes);
    self->complained = homeless > 0;
}

static actor_id active_at(const struct coordinator *self, uint32_t pair) {
    for (uint32_t i = 0; self->actives[pair] > 0 && i < self->seats; i++)
        if (self->seat[i].copy != NULL && (self->seat[i].copy[pair] & COPY_ACTIVE) != 0)
            return self->seat[i].id;
    return 0;
}

static void move_home(struct coordinator *self, uint32_t pair, actor_id wanted, uint64_t now_ns,
                      struct effects *out) {
    if (wanted == self->home[pair])
        return;
    if (self->owner[pair] != 0)
        operation_supersede(self, self->owner[pair], now_ns, out);
    struct seat *old = self->home[pair] != 0 ? seat_find(self, self->home[pair]) : NULL;
    struct seat *new = seat_find(self, wanted);
    self->home[pair] = wanted;
    if (new != NULL)
        copy_set_target(self, new, pair, true);
    if (old != NULL)
        copy_set_target(self, old, pair, false);
}

static struct seat *emptiest_without(struct coordinator *self, uint32_t pair) {
    struct seat *best = NULL;
    for (uint32_t i = 0; i < self->seats; i++) {
        struct seat *seat = &self->seat[i];
        if (seat->copy != NULL && !seat->draining && !seat->quarantined &&
            (seat->copy[pair] & COPY_TARGET) == 0 && !(seat->fileless && self->actives[pair] == 0) &&
            seat->targets < seat->capacity && (best == NULL || seat->targets < best->targets))
            best = seat;
    }
    return best;
}

/* Replicas at processes that are leaving go to the emptiest that has none of the pair yet, if any has
 * room; otherwise there is one less. An operation that waits for the copy there would wait in vain, and keep back the others. */
static void move_replica(struct coordinator *self, struct seat *leaving, uint32_t pair, uint64_t now_ns,
                         struct effects *out) {
    if (self->owner[pair] != 0)
        operation_supersede(self, self->owner[pair], now_ns, out);
    struct seat *best = emptiest_without(self, pair);
    copy_set_target(self, leaving, pair, false);
    if (best != NULL)
        copy_set_target(self, best, pair, true);
}

/* As many copies of each pair as the knob says, where there is room. */
static void add_replicas(struct coordinator *self) {
    uint32_t wanted = copies_wanted(self);
    for (uint32_t pair = 0; wanted > 1 && pair < self->pairs; pair++) {
        struct seat *seat = NULL;
        while (self->is_moe[pair / self->config.experts] && self->owner[pair] == 0 &&
               self->targets[pair] > 0 && self->targets[pair] < wanted &&
               (seat = emptiest_without(self, pair)) != NULL)
            copy_set_target(self, seat, pair, true);
    }
}

/* Where each pair's weights can come from. False: it does not matter, everybody has a file. */
static bool find_sources(struct coordinator *self, uint8_t *source) {
    bool matters = false;
    for (uint32_t i = 0; i < self->seats && !matters; i++)
        matters = self->seat[i].fileless;
    self->source_due = self->source_came = false;
    for (uint32_t pair = 0; matters && pair < self->pairs; pair++) {
        const struct seat *home = self->home[pair] != 0 ? seat_find(self, self->home[pair]) : NULL;
        bool here = home != NULL && home->assigned[pair] == ASSIGNED_HELD;
        source[pair] = self->actives[pair] > 0 ? SOURCE_ANY : here ? SOURCE_STAYS : SOURCE_FILE;
        self->source_due = self->source_due ||
                           (source[pair] != SOURCE_ANY && self->is_moe[pair / self->config.experts]);
    }
    return matters;
}

/* Once all that was unserved and has a home is served, more of it can go to processes without files. */
static bool sources_have_come(const struct coordinator *self) {
    if (!self->source_came)
        return false;
    for (uint32_t pair = 0; pair < self->pairs; pair++)
        if (self->targets[pair] > 0 && self->actives[pair] == 0)
            return false;
    return true;
}

/* Who may be given pairs, and how many each may have as a home. */
static uint32_t list_holders(struct coordinator *self, uint32_t *id, uint32_t *capacity,
                             uint8_t *has_file) {
    uint32_t holders = 0;
    for (uint32_t i = 0; i < self->seats; i++) {
        const struct seat *seat = &self->seat[i];
        if (seat->role != ROLE_EXPERT || seat->draining || seat->quarantined)
            continue;
        uint32_t replicas = seat->targets;
        for (uint32_t pair = 0; pair < self->pairs && replicas > 0; pair++)
            replicas -= self->home[pair] == seat->id;
        id[holders] = seat->id;
        has_file[holders] = !seat->fileless;
        capacity[holders++] = seat->capacity > replicas ? seat->capacity - replicas : 0;
    }
    return holders;
}

/* The replica that is missed least: of the pair with the least load per copy without it, at its fullest holder. */
static bool drop_replica(struct coordinator *self) {
    uint32_t best = NOBODY;
    double lowest = 0;
    for (uint32_t pair = 0; pair < self->pairs; pair++) {
        const struct seat *home = self->targets[pair] > 1 && self->owner[pair] == 0
                                      ? seat_find(self, self->home[pair])
                                      : NULL;
        double load = home != NULL ? self->recent[pair] / (self->targets[pair] - 1) : 0;
        if (home == NULL || home->draining || (best != NOBODY && load >= lowest))
            continue;
        best = pair;
        lowest = load;
    }
    struct seat *fullest = NULL;
    for (uint32_t i = 0; best != NOBODY && i < self->seats; i++) {
        struct seat *seat = &self->seat[i];
        if (seat->copy != NULL && (seat->copy[best] & COPY_TARGET) != 0 &&
            seat->id != self->home[best] && (fullest == NULL || seat->targets > fullest->targets))
            fullest = seat;
    }
    if (fullest != NULL)
        copy_set_target(self, fullest, best, false);
    return fullest != NULL;
}

/* An expert that nobody is to hold comes before replicas of others: they make room for it. */
static void make_room(struct coordinator *self) {
    uint64_t room = 0, homeless = self->moe_pairs;
    for (uint32_t i = 0; i < self->seats; i++)
        if (self->seat[i].copy != NULL && !self->seat[i].draining &&
            self->seat[i].capacity > self->seat[i].targets)
            room += self->seat[i].capacity - self->seat[i].targets;
    for (uint32_t pair = 0; pair < self->pairs; pair++) {
        const struct seat *home = self->home[pair] != 0 ? seat_find(self, self->home[pair]) : NULL;
        homeless -= self->is_moe[pair / self->config.experts] && home != NULL && !home->draining;
    }
    while (homeless > room && drop_replica(self))
        room++;
}

void copies_plan(struct coordinator *self, uint64_t now_ns, struct effects *out) {
    if (!self->placed || self->pairs == 0 || self->learn_until_ns != NEVER)
        return;
    make_room(self);
    uint32_t *id = self->scratch, *capacity = id + ACTORS_MAX;
    uint8_t has_file[ACTORS_MAX];
    uint32_t holders = list_holders(self, id, capacity, has_file);
    bool sources = find_sources(self, self->source);
    for (uint32_t pair = 0; pair < self->pairs; pair++) {
        actor_id held = self->home[pair] != 0 ? self->home[pair] : active_at(self, pair);
        self->current[pair] = index_of(id, holders, held);
    }
    uint32_t homeless =
        placement_even(self->config.layers, self->is_moe, self->config.experts, holders, capacity,
                       has_file, sources ? self->source : NULL, self->current, self->wanted,
                       capacity + ACTORS_MAX);
    complain(self, homeless, holders, out);
    for (uint32_t pair = 0; pair < self->pairs; pair++) {
        actor_id wanted = self->wanted[pair] == NOBODY ? 0 : id[self->wanted[pair]];
        if (wanted == 0) /* no room anywhere: whoever serves it goes on */
            wanted = active_at(self, pair);
        if (wanted != 0 || (sources && self->source[pair] == SOURCE_FILE))
            move_home(self, pair, wanted, now_ns, out);
    }
    for (uint32_t i = 0; i < self->seats; i++) {
        struct seat *seat = &self->seat[i];
        for (uint32_t pair = 0; seat->draining && seat->targets > 0 && pair < self->pairs; pair++)
            if ((seat->copy[pair] & COPY_TARGET) != 0 && self->home[pair] != seat->id)
                move_replica(self, seat, pair, now_ns, out);
    }
    add_replicas(self);
}

/* ---- answers ---- */

/* The process keeps what it serves and is given no more for a while, each time for longer; what it was
 * to load goes to others. Disks and memory recover, so nobody is written off. */
static void give_up(struct coordinator *self, struct seat *seat, const char *error, uint64_t now_ns,
                    struct effects *out) {
    effects_trace(out, TRACE_ERROR, "%s (actor %u) could not load its experts: %s", seat->name,
                  seat->id, error);
    for (uint32_t pair = 0; pair < self->pairs; pair++)
        if (seat->assigned[pair] == ASSIGNED_BEFORE && seat->copy[pair] == COPY_TARGET) {
            copy_set_target(self, seat, pair, false);
            if (self->home[pair] == seat->id)
                self->home[pair] = 0;
        }
    seat->capacity = seat->targets;
    uint64_t wait_ns = self->retry_ns << (seat->failures < 8 ? seat->failures : 8);
    seat->failures++;
    seat->trusted_at_ns = now_ns + (wait_ns < TRUST_WAIT_MAX_NS ? wait_ns : TRUST_WAIT_MAX_NS);
    copies_plan(self, now_ns, out);
}

static bool has_failed(const struct coordinator *self, const Troupe__Ready *ready, uint32_t pair) {
    bool all = !ready->ok && ready->n_layer == 0;
    for (size_t i = 0; i < ready->n_layer && !ready->ok; i++)
        all = all || ready->layer[i] * self->config.experts + ready->expert[i] == pair;
    return all;
}

/* What could be loaded is held; what could not ends the operations that asked for it. True: something
 * failed that no operation asked for. */
static bool take_loaded(struct coordinator *self, struct seat *seat, const Troupe__Ready *ready,
                        uint64_t now_ns, struct effects *out) {
    bool failed = false;
    for (uint32_t pair = 0; pair < self->pairs; pair++) {
        if (seat->assigned[pair] != ASSIGNED_NOW)
            continue;
        if (!has_failed(self, ready, pair)) {
            seat->assigned[pair] = ASSIGNED_HELD;
            continue;
        }
        seat->assigned[pair] = ASSIGNED_BEFORE;
        if (!holds(seat, pair)) /* it has been given to somebody else meanwhile */
            continue;
        if (self->owner[pair] != 0)
            operation_failed(self, self->owner[pair], seat, ready->error, now_ns, out);
        else
            failed = true;
    }
    return failed;
}

void copies_on_ready(struct coordinator *self, struct seat *seat, const Troupe__Ready *ready,
                     uint64_t now_ns, struct effects *out) {
    if (seat->order == ORDER_NONE || ready->operation != seat->operation)
        return;
    enum order_kind order = seat->order;
    seat->order = ORDER_NONE;
    seat->dirty = true;
    if (order == ORDER_ASSIGN) {
        if (take_loaded(self, seat, ready, now_ns, out))
            give_up(self, seat, ready->error, now_ns, out);
        else if (ready->ok)
            seat->failures = 0;
        return;
    }
    for (uint32_t pair = 0; pair < self->pairs; pair++)
        if (seat->assigned[pair] == ASSIGNED_RELEASING)
            seat->assigned[pair] = ASSIGNED_NO;
}

/* ---- what an earlier coordinator had done ---- */

void copies_learn(struct coordinator *self, struct seat *seat, const Troupe__Hello *hello) {
    for (size_t i = 0; i < hello->n_layer; i++) {
        if (hello->layer[i] >= self->config.layers || hello->expert[i] >= self->config.experts ||
            !self->is_moe[hello->layer[i]])
            continue;
        uint32_t pair = hello->layer[i] * self->config.experts + hello->expert[i];
        seat->assigned[pair] = i < hello->held ? ASSIGNED_HELD : ASSIGNED_BEFORE;
        if (i >= hello->held || i >= hello->placed)
            continue;
        if (self->targets[pair] == 0)
            self->home[pair] = seat->id;
        copy_set_target(self, seat, pair, true); /* replicas that were wanted are wanted */
        if (seat->ready)
            set_active(self, seat, pair, true);
    }
    seat->dirty = true;
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
    seat->dirty = true;
    if (seat->order != ORDER_NONE && seat->operation <= hello->operation)
        begin_order(self, seat, seat->order, now_ns, out);
}

/* What is in nobody's epoch, but held, serves all the same. */
static void adopt_orphans(struct coordinator *self) {
    for (uint32_t i = 0; i < self->seats; i++)
        for (uint32_t pair = 0; self->seat[i].copy != NULL && pair < self->pairs; pair++) {
            struct seat *seat = &self->seat[i];
            if (self->targets[pair] > 0 || seat->assigned[pair] != ASSIGNED_HELD)
                continue;
            self->home[pair] = seat->id;
            copy_set_target(self, seat, pair, true);
            if (seat->ready)
                set_active(self, seat, pair, true);
        }
}

/* Epochs that others reported since may be larger; from the next one on the copies learnt of count. */
void copies_learnt(struct coordinator *self, uint64_t now_ns, struct effects *out) {
    bool some = false;
    adopt_orphans(self);
    operations_learnt(self, now_ns, out);
    for (uint32_t pair = 0; pair < self->pairs; pair++)
        some = some || self->actives[pair] > 0;
    for (uint32_t i = 0; i < self->seats; i++)
        if (self->seat[i].role == ROLE_EXPERT)
            self->seat[i].shrunk_epoch = self->epoch + 1;
    self->placed = self->placed || some;
    copies_plan(self, now_ns, out);
}

/* ---- review ---- */

/* What it is to serve and holds goes into the next epoch, but for what an operation keeps back until all
 * of its copies are there. */
static void activate_held(struct coordinator *self, struct seat *seat) {
    for (uint32_t pair = 0; seat->ready && pair < self->pairs; pair++)
        if (seat->copy[pair] == COPY_TARGET && seat->assigned[pair] == ASSIGNED_HELD &&
            (self->owner[pair] == 0 || self->actives[pair] == 0))
            copy_activate(self, seat, pair);
}

static void review_seat(struct coordinator *self, struct seat *seat, uint64_t now_ns,
                        struct effects *out) {
    activate_held(self, seat);
    bool lacks = false;
    seat->surplus = seat->dirty = false;
    for (uint32_t pair = 0; pair < self->pairs; pair++) {
        retire(self, pair);
        uint8_t assigned = seat->assigned[pair];
        lacks = lacks || (holds(seat, pair) && assigned != ASSIGNED_HELD &&
                          (seat->order != ORDER_ASSIGN || assigned != ASSIGNED_NOW));
        seat->surplus = seat->surplus || (!holds(seat, pair) && assigned != ASSIGNED_NO);
    }
    if (lacks)
        begin_order(self, seat, ORDER_ASSIGN, now_ns, out);
}

static bool all_here(const struct coordinator *self) {
    uint32_t experts = 0;
    for (uint32_t i = 0; i < self->seats; i++)
        experts += self->seat[i].role == ROLE_EXPERT;
    return self->settings.expected_experts > 0 && experts >= self->settings.expected_experts;
}

void copies_review(struct coordinator *self, uint64_t now_ns, struct effects *out) {
    if (self->learn_until_ns != NEVER)
        return;
    if (!self->placed && self->place_at_ns != NEVER &&
        (now_ns >= self->place_at_ns || all_here(self))) {
        self->placed = true;
        copies_plan(self, now_ns, out);
    }
    if (self->placed && sources_have_come(self)) {
        copies_plan(self, now_ns, out);
        self->replicas_due = true;
    }
    if (self->placed && self->replicas_due)
        add_replicas(self);
    self->replicas_due = false;
    for (uint32_t i = 0; i < self->seats; i++) {
        struct seat *seat = &self->seat[i];
        if (seat->role != ROLE_EXPERT)
            continue;
        if (now_ns >= seat->trusted_at_ns) {
            seat->trusted_at_ns = NEVER;
            seat->capacity = seat->room;
            copies_plan(self, now_ns, out);
        }
        for (int round = 0; seat->dirty && round < 2; round++)
            review_seat(self, seat, now_ns, out);
        if (seat->order != ORDER_NONE && now_ns >= seat->order_at_ns)
            send_order(self, seat, now_ns, out);
        else if (seat->order == ORDER_NONE && seat->surplus && copies_drained(self, seat))
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

const char *copies_broken(const struct coordinator *self) {
    for (uint32_t pair = 0; pair < self->pairs; pair++) {
        uint32_t targets = 0, actives = 0, waiting = 0;
        bool home = false;
        for (uint32_t i = 0; i < self->seats; i++) {
            uint8_t copy = self->seat[i].copy != NULL ? self->seat[i].copy[pair] : 0;
            targets += (copy & COPY_TARGET) != 0;
            actives += (copy & COPY_ACTIVE) != 0;
            waiting += copy == COPY_TARGET;
            home = home || (self->seat[i].id == self->home[pair] && (copy & COPY_TARGET) != 0);
        }
        if (targets != self->targets[pair] || actives != self->actives[pair] || waiting != self->waiting[pair])
            return "copies are miscounted";
        if (!home && self->home[pair] != 0)
            return "a home is no target";
    }
    return NULL;
}
