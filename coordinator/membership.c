/* Who is there: from HELLO to loss, and the epochs that say so to everybody.
 *
 *   (HELLO, checked) -> JOINING -> READY -> removed
 *
 * READY: itself and all who must know it have adopted an epoch that lists it. Removed: its process
 * has ended, its heartbeats stay away, or the same name said HELLO in a new incarnation.
 *
 * Who must know whom: an attention actor's rows go to experts and samplers, which answer only those
 * they know; a gateway's requests go to attention actors. So an attention actor becomes READY after
 * the ready experts and samplers have adopted it, a gateway after the ready attention actors have;
 * nobody waits for anybody else.
 *
 * Invariants: 1. ids are never given twice; 2. an epoch is never changed once published, its number
 * only grows; 3. an incarnation that this coordinator removed never becomes a member again (it
 * is told to end); 4. `serving` is true only if every (layer, expert) has a ready holder and a
 * ready attention actor and sampler exist. */
#include "coordinator/operations.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/wire.h"

#define LOSS_TOLD_NS 10000000000u

/* ---- seats ---- */

struct seat *seat_find(const struct coordinator *self, actor_id id) {
    uint32_t low = 0, high = self->seats;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (self->seat[middle].id < id)
            low = middle + 1;
        else
            high = middle;
    }
    return low < self->seats && self->seat[low].id == id ? &self->seat[low] : NULL;
}

static struct seat *find_incarnation(const struct coordinator *self, uint64_t incarnation) {
    for (uint32_t i = 0; i < self->seats; i++)
        if (self->seat[i].incarnation == incarnation)
            return &self->seat[i];
    return NULL;
}

static const struct ghost *find_ghost(const struct coordinator *self, uint64_t incarnation) {
    for (uint32_t i = 0; i < GHOSTS_MAX; i++)
        if (self->ghost[i].incarnation == incarnation)
            return &self->ghost[i];
    return NULL;
}

static void seat_free(struct seat *seat) {
    free(seat->name);
    free(seat->load);
    free(seat->assigned);
    free(seat->copy);
    free(seat->answers);
}

void membership_free(struct coordinator *self) {
    for (uint32_t i = 0; i < self->seats; i++)
        seat_free(&self->seat[i]);
    self->seats = 0;
}

static char *put_string(char **at, const char *text) {
    char *ret = *at;
    size_t size = strlen(text) + 1;
    memcpy(ret, text, size);
    *at += size;
    return ret;
}

/* Everything that a seat owns; false: no memory, and nothing is owned. */
static bool seat_fill(const struct coordinator *self, struct seat *seat,
                      const Troupe__Hello *hello) {
    memset(seat, 0, sizeof *seat);
    char *at = malloc(strlen(hello->name) + strlen(hello->control_address) +
                      strlen(hello->data_address) + strlen(hello->host) + 4);
    seat->role = (enum role)hello->role;
    if (seat->role == ROLE_ATTENTION)
        seat->load = calloc((size_t)self->pairs + 1, sizeof *seat->load);
    if (seat->role == ROLE_EXPERT) {
        seat->assigned = calloc((size_t)self->pairs + 1, sizeof *seat->assigned);
        seat->copy = calloc((size_t)self->pairs + 1, sizeof *seat->copy);
    }
    if (at == NULL || (seat->role == ROLE_ATTENTION && seat->load == NULL) ||
        (seat->role == ROLE_EXPERT && (seat->assigned == NULL || seat->copy == NULL))) {
        free(at);
        free(seat->load);
        free(seat->assigned);
        free(seat->copy);
        return false;
    }
    seat->name = put_string(&at, hello->name);
    seat->control_address = put_string(&at, hello->control_address);
    seat->data_address = put_string(&at, hello->data_address);
    seat->host = put_string(&at, hello->host);
    seat->pid = hello->pid;
    seat->draining = hello->draining;
    seat->quarantined = hello->quarantined;
    seat->capacity = self->pairs;
    if (hello->capacity_bytes > 0 && hello->capacity_bytes / self->expert_bytes < self->pairs)
        seat->capacity = (uint32_t)(hello->capacity_bytes / self->expert_bytes);
    seat->room = seat->capacity;
    seat->trusted_at_ns = NEVER;
    seat->fileless = seat->role == ROLE_EXPERT && hello->model_fingerprint[0] == '\0';
    return true;
}

/* ---- messages about membership ---- */

static void connect_to(actor_id id, enum role role, uint64_t incarnation,
                       const char *control_address, const char *data_address, const char *host,
                       struct effects *out) {
    struct effect *effect = effects_add(out, EFFECT_CONNECT);
    effect->connect.id = id;
    effect->connect.role = role;
    effect->connect.incarnation = incarnation;
    effect->connect.control_address =
        effects_copy(out, control_address, strlen(control_address) + 1);
    effect->connect.data_address = effects_copy(out, data_address, strlen(data_address) + 1);
    effect->connect.host = effects_copy(out, host, strlen(host) + 1);
}

static void disconnect_from(actor_id id, enum role role, uint64_t incarnation,
                            struct effects *out) {
    struct effect *effect = effects_add(out, EFFECT_DISCONNECT);
    effect->connect.id = id;
    effect->connect.role = role;
    effect->connect.incarnation = incarnation;
}

static void send_welcome(const struct coordinator *self, const struct seat *seat,
                         struct effects *out) {
    Troupe__Welcome welcome = TROUPE__WELCOME__INIT;
    welcome.id = seat->id;
    welcome.heartbeat_interval_ns = self->heartbeat_ns;
    welcome.incarnation = seat->incarnation;
    welcome.model_fingerprint = (char *)self->identity.model_fingerprint;
    message envelope = coordinator_envelope(self);
    envelope.body_case = TROUPE__ENVELOPE__BODY_WELCOME;
    envelope.welcome = &welcome;
    effects_send(out, seat->id, &envelope);
}

/* To somebody who is no member: the connection lasts for this one message. */
static void send_refused(const struct coordinator *self, actor_id id, uint64_t incarnation,
                         const char *control_address, const char *reason, struct effects *out) {
    Troupe__Refused refused = TROUPE__REFUSED__INIT;
    refused.reason = (char *)reason;
    refused.incarnation = incarnation;
    message envelope = coordinator_envelope(self);
    envelope.body_case = TROUPE__ENVELOPE__BODY_REFUSED;
    envelope.refused = &refused;
    connect_to(id, ROLE_NONE, incarnation, control_address, "", "", out);
    effects_send(out, id, &envelope);
    disconnect_from(id, ROLE_NONE, incarnation, out);
}

/* ---- learning from an earlier coordinator's members ---- */

static void learn(struct coordinator *self, uint64_t now_ns, struct effects *out) {
    if (self->learnt)
        return;
    self->learnt = true;
    self->learn_until_ns = now_ns + 2 * self->heartbeat_ns + 3 * self->retry_ns;
    effects_trace(out, TRACE_WARNING, "there was a coordinator before; learning from its members");
}

static void send_rejoin(const struct coordinator *self, const message *envelope,
                        struct effects *out) {
    const char *address = envelope->heartbeat->control_address;
    if (address[0] == '\0')
        return;
    Troupe__Rejoin rejoin = TROUPE__REJOIN__INIT;
    rejoin.incarnation = envelope->from_incarnation;
    message answer = coordinator_envelope(self);
    answer.body_case = TROUPE__ENVELOPE__BODY_REJOIN;
    answer.rejoin = &rejoin;
    actor_id id = self->last_id + 1; /* nobody's; the connection lasts for this one message */
    connect_to(id, ROLE_NONE, envelope->from_incarnation, address, "", "", out);
    effects_send(out, id, &answer);
    disconnect_from(id, ROLE_NONE, envelope->from_incarnation, out);
}

void membership_rejoin(struct coordinator *self, struct seat *seat, const message *envelope,
                       uint64_t now_ns, struct effects *out) {
    seat->heard_ns = now_ns;
    learn(self, now_ns, out);
    send_rejoin(self, envelope, out);
}

/* The seat of somebody who has been a member before. */
static void take_past(struct coordinator *self, struct seat *seat, const Troupe__Hello *hello,
                      uint64_t now_ns, struct effects *out) {
    learn(self, now_ns, out);
    if (hello->members > self->members_before)
        self->members_before = hello->members;
    if (hello->epoch > self->epoch)
        self->epoch = hello->epoch;
    if (hello->operation > self->last_operation)
        self->last_operation = hello->operation;
    self->returned++;
    seat->foreign_epoch = hello->epoch;
    /* Who comes after an epoch without it has been published is somebody new to its peers, which have
     * given it up; so is who finds its id taken. */
    bool in_time = self->learn_until_ns != NEVER;
    if (in_time && hello->id > ACTOR_COORDINATOR && seat_find(self, hello->id) == NULL) {
        seat->id = hello->id;
        seat->ready = hello->ready;
    } else {
        if (hello->id > self->last_id)
            self->last_id = hello->id;
        seat->id = self->last_id + 1;
    }
    operations_learn(self, hello);
    if (seat->role == ROLE_EXPERT)
        copies_learn(self, seat, hello);
    bias_learn(self, seat, hello, out);
}

/* A member that came as a new process, then took a late WELCOME of the earlier coordinator and
 * followed that one for a while. */
static void take_more_past(struct coordinator *self, struct seat *seat, const Troupe__Hello *hello,
                           uint64_t now_ns, struct effects *out) {
    if (hello->epoch > self->epoch) {
        self->epoch = hello->epoch;
        self->changed = true;
    }
    if (hello->epoch > seat->acknowledged_epoch && hello->epoch > seat->foreign_epoch)
        seat->foreign_epoch = hello->epoch;
    if (hello->operation > self->last_operation)
        self->last_operation = hello->operation;
    if (seat->role == ROLE_EXPERT)
        copies_learn_more(self, seat, hello, now_ns, out);
    bias_learn(self, seat, hello, out);
}

/* Everybody has come, or has had time to. */
static void end_learning(struct coordinator *self, uint64_t now_ns, struct effects *out) {
    bool complete = self->members_before > 0 && self->returned >= self->members_before;
    if (self->learn_until_ns == NEVER || (!complete && now_ns < self->learn_until_ns))
        return;
    self->learn_until_ns = NEVER;
    effects_trace(out, TRACE_INFO, "learnt of %u members, %u were known of", self->returned,
                  self->members_before);
    copies_learnt(self, now_ns, out);
    bias_learnt(self, now_ns, out);
}

void membership_on_stranger(struct coordinator *self, const message *envelope, uint64_t now_ns,
                            struct effects *out) {
    const struct ghost *ghost = find_ghost(self, envelope->from_incarnation);
    effects_trace(out, TRACE_WARNING, "ignored %s of actor %u, %s", wire_name(envelope),
                  envelope->from, ghost != NULL ? "which was removed" : "which is no member");
    bool beats = envelope->body_case == TROUPE__ENVELOPE__BODY_HEARTBEAT;
    bool follows_another =
        beats && envelope->heartbeat->coordinator_incarnation != self->identity.incarnation;
    if (beats && (ghost == NULL || follows_another)) {
        /* a ghost that follows another coordinator hears no refusal of this one before it has said HELLO to it */
        if (ghost == NULL)
            learn(self, now_ns, out);
        send_rejoin(self, envelope, out);
    } else if (ghost != NULL && (beats || envelope->body_case == TROUPE__ENVELOPE__BODY_HELLO)) {
        /* not under its own id: that may be somebody else's by now, and the connection ends at once */
        send_refused(self, self->last_id + 1, ghost->incarnation, ghost->control_address,
                     "removed from the troupe after missed heartbeats; start again to join", out);
    }
}

/* ---- HELLO ---- */

static int check_hello(const struct coordinator *self, const message *envelope,
                       struct failure *failure) {
    const Troupe__Hello *hello = envelope->hello;
    if (hello->role < TROUPE__ROLE__ROLE_GATEWAY || hello->role > TROUPE__ROLE__ROLE_CONTROL)
        return fail(failure, ERR_INVALID, "role %d can not join a troupe", hello->role);
    if (envelope->protocol_version != WIRE_PROTOCOL_VERSION)
        return fail(failure, ERR_VERSION, "protocol version %u expected, found %u",
                    WIRE_PROTOCOL_VERSION, envelope->protocol_version);
    bool serves = hello->role != TROUPE__ROLE__ROLE_CONTROL;
    if (hello->role == TROUPE__ROLE__ROLE_EXPERT && hello->model_fingerprint[0] == '\0') {
        serves = false; /* it has no weights of its own */
        if (strcmp(hello->config_fingerprint, self->identity.config_fingerprint) != 0)
            return fail(failure, ERR_VERSION,
                        "the troupe serves a model whose config.json has the hash %s, found %s: give "
                        "every actor the same one",
                        self->identity.config_fingerprint, hello->config_fingerprint);
    }
    if ((serves || hello->model_fingerprint[0] != '\0') &&
        strcmp(hello->model_fingerprint, self->identity.model_fingerprint) != 0)
        return fail(
            failure, ERR_VERSION,
            "the troupe serves the model with fingerprint %s, found %s: start every actor with "
            "the same model directory",
            self->identity.model_fingerprint, hello->model_fingerprint);
    serves = hello->role != TROUPE__ROLE__ROLE_CONTROL;
    if ((serves || hello->numerics[0] != '\0') &&
        strcmp(hello->numerics, self->identity.numerics) != 0)
        return fail(failure, ERR_VERSION,
                    "the troupe computes in %s, found %s: start every actor with "
                    "the same --numerics and --gate-top-p",
                    self->identity.numerics, hello->numerics);
    if (self->seats == ACTORS_MAX - 2)
        return fail(failure, ERR_BUSY, "the troupe has %u members already", self->seats);
    return 0;
}

/* Two of one name: the one that was started later stays. A process that says HELLO for the first
 * time is the later one; among those that had ids before, the larger id is. Returns 0 or why
 * `hello` loses. */
static int replace_namesake(struct coordinator *self, const Troupe__Hello *hello, uint64_t now_ns,
                            struct effects *out, struct failure *failure) {
    if (hello->name[0] == '\0' || hello->role == TROUPE__ROLE__ROLE_CONTROL)
        return 0;
    for (uint32_t i = 0; i < self->seats; i++)
        if (strcmp(self->seat[i].name, hello->name) == 0 &&
            self->seat[i].role == (enum role)hello->role) {
            if (hello->id != 0 && hello->id < self->seat[i].id)
                return fail(failure, ERR_STATE, "%s has been started again since", hello->name);
            membership_remove(self, &self->seat[i], "it has been started again", now_ns, out);
            return 0;
        }
    return 0;
}

static void insert_seat(struct coordinator *self, const struct seat *seat) {
    uint32_t place = self->seats++;
    for (; place > 0 && self->seat[place - 1].id > seat->id; place--)
        self->seat[place] = self->seat[place - 1];
    self->seat[place] = *seat;
    if (seat->id > self->last_id)
        self->last_id = seat->id;
}

void membership_on_hello(struct coordinator *self, const message *envelope, uint64_t now_ns,
                         struct effects *out) {
    const Troupe__Hello *hello = envelope->hello;
    struct seat *known = find_incarnation(self, envelope->from_incarnation);
    if (known != NULL) {
        known->heard_ns = now_ns;
        if (hello->id != 0)
            take_more_past(self, known, hello, now_ns, out);
        send_welcome(self, known, out);
        return;
    }
    if (find_ghost(self, envelope->from_incarnation) != NULL) {
        membership_on_stranger(self, envelope, now_ns, out);
        return;
    }
    struct failure failure = {0};
    struct seat seat;
    if (check_hello(self, envelope, &failure) == 0 &&
        replace_namesake(self, hello, now_ns, out, &failure) == 0 && !seat_fill(self, &seat, hello))
        fail(&failure, ERR_NO_MEMORY, "the coordinator has no memory for another member");
    if (failure.code < 0) {
        effects_trace(out, TRACE_ERROR, "refused %s: %s", hello->name, failure.text);
        send_refused(self, self->last_id + 1, envelope->from_incarnation, hello->control_address,
                     failure.text, out);
        return;
    }
    seat.id = self->last_id + 1;
    seat.incarnation = envelope->from_incarnation;
    seat.heard_ns = now_ns;
    if (hello->id != 0)
        take_past(self, &seat, hello, now_ns, out);
    insert_seat(self, &seat);
    self->changed = true;
    effects_trace(out, TRACE_INFO, "%s joined as actor %u", seat.name, seat.id);
    connect_to(seat.id, seat.role, seat.incarnation, seat.control_address, seat.data_address,
               seat.host, out);
    send_welcome(self, &seat, out);
    bias_joined(self, seat_find(self, seat.id), now_ns, out);
    if (seat.role == ROLE_EXPERT && self->place_at_ns == NEVER)
        self->place_at_ns = now_ns + (uint64_t)self->settings.join_wait_ms * 1000000u;
    operations_joined(self, seat_find(self, seat.id), now_ns);
    if (seat.role == ROLE_EXPERT)
        copies_plan(self, now_ns, out);
}

/* ---- loss ---- */

void membership_remove(struct coordinator *self, struct seat *seat, const char *why,
                       uint64_t now_ns, struct effects *out) {
    effects_trace(out, seat->leave_sent_ns != 0 ? TRACE_INFO : TRACE_WARNING,
                  "removed %s (actor %u): %s", seat->name, seat->id, why);
    struct ghost *ghost = &self->ghost[self->next_ghost++ % GHOSTS_MAX];
    ghost->id = seat->id;
    ghost->incarnation = seat->incarnation;
    snprintf(ghost->control_address, sizeof ghost->control_address, "%s", seat->control_address);
    struct loss *loss = &self->loss[self->losses++ % LOSSES_MAX];
    loss->incarnation = seat->incarnation;
    loss->at_ns = now_ns;
    loss->silent_ns = now_ns > seat->heard_ns ? now_ns - seat->heard_ns : 0;
    snprintf(loss->reason, sizeof loss->reason, "%s", why);
    disconnect_from(seat->id, seat->role, seat->incarnation, out);
    statistics_forget(self, seat);
    enum role role = seat->role;
    actor_id id = seat->id;
    if (role == ROLE_EXPERT)
        copies_forget(self, seat);
    seat_free(seat);
    uint32_t place = (uint32_t)(seat - self->seat);
    self->seats--;
    memmove(seat, seat + 1, (self->seats - place) * sizeof *seat);
    self->changed = true;
    operations_lost(self, id, now_ns, out);
    if (role == ROLE_EXPERT)
        copies_plan(self, now_ns, out);
}

void membership_timer(struct coordinator *self, uint64_t now_ns, struct effects *out) {
    for (uint32_t i = self->seats; i-- > 0;)
        if (now_ns >= self->seat[i].heard_ns + self->lost_after_ns)
            membership_remove(self, &self->seat[i], "its heartbeats stay away", now_ns, out);
}

uint64_t membership_deadline(const struct coordinator *self) {
    uint64_t deadline = NEVER;
    for (uint32_t i = 0; i < self->seats; i++)
        if (self->seat[i].heard_ns + self->lost_after_ns < deadline)
            deadline = self->seat[i].heard_ns + self->lost_after_ns;
    return deadline;
}

/* ---- epochs ---- */

/* Those of the last while: a gateway that missed the epoch learns of them from the next one. */
static void list_losses(const struct coordinator *self, Troupe__Commit *commit,
                        struct effects *out) {
    commit->lost = effects_alloc(out, LOSSES_MAX * sizeof *commit->lost);
    for (uint32_t i = 0; i < LOSSES_MAX; i++) {
        const struct loss *loss = &self->loss[i];
        if (loss->incarnation == 0 || self->last_step_ns > loss->at_ns + LOSS_TOLD_NS)
            continue;
        Troupe__Loss *told = effects_alloc(out, sizeof *told);
        troupe__loss__init(told);
        told->incarnation = loss->incarnation;
        told->reason = (char *)loss->reason;
        told->silent_ns = loss->silent_ns;
        told->fenced_ns = self->last_step_ns - loss->at_ns;
        commit->lost[commit->n_lost++] = told;
    }
}

Troupe__Member *membership_member(const struct seat *seat, struct effects *out) {
    Troupe__Member *member = effects_alloc(out, sizeof *member);
    troupe__member__init(member);
    member->id = seat->id;
    member->incarnation = seat->incarnation;
    member->role = (Troupe__Role)seat->role;
    member->control_address = seat->control_address;
    member->data_address = seat->data_address;
    member->host = seat->host;
    member->name = seat->name;
    member->state = seat->quarantined && seat->ready ? TROUPE__ACTOR_STATE__STATE_QUARANTINED
                    : seat->draining ? TROUPE__ACTOR_STATE__STATE_DRAINING
                    : seat->ready  ? TROUPE__ACTOR_STATE__STATE_READY
                                   : TROUPE__ACTOR_STATE__STATE_JOINING;
    return member;
}

Troupe__Commit *membership_commit(const struct coordinator *self, struct effects *out) {
    Troupe__Commit *commit = effects_alloc(out, sizeof *commit);
    troupe__commit__init(commit);
    commit->epoch = self->epoch;
    commit->serving = self->serving;
    commit->operations = operations_message(self, out);
    commit->bias_version = self->bias.current;
    commit->bias_on = self->bias.on;
    commit->n_member = self->seats;
    commit->member = effects_alloc(out, self->seats * sizeof *commit->member);
    for (uint32_t i = 0; i < self->seats; i++)
        commit->member[i] = membership_member(&self->seat[i], out);
    size_t copies = 0, count = 0;
    for (uint32_t pair = 0; pair < self->pairs; pair++)
        copies += self->actives[pair];
    commit->layer = effects_alloc(out, copies * sizeof *commit->layer);
    commit->expert = effects_alloc(out, copies * sizeof *commit->expert);
    commit->holder = effects_alloc(out, copies * sizeof *commit->holder);
    for (uint32_t i = 0; i < self->seats && copies > 0; i++) {
        const struct seat *seat = &self->seat[i];
        for (uint32_t pair = 0; seat_serves(self, seat) && pair < self->pairs; pair++) {
            uint64_t eight = 0; /* most of hundreds of processes hold few of thousands of pairs */
            if (pair + sizeof eight <= self->pairs)
                memcpy(&eight, &seat->copy[pair], sizeof eight);
            if (pair + sizeof eight <= self->pairs && eight == 0)
                pair += sizeof eight - 1;
            if ((seat->copy[pair] & COPY_ACTIVE) == 0)
                continue;
            commit->layer[count] = pair / self->config.experts;
            commit->expert[count] = pair % self->config.experts;
            commit->holder[count++] = seat->id;
        }
    }
    ASSERT(count <= copies);
    commit->n_layer = commit->n_expert = commit->n_holder = count;
    list_losses(self, commit, out);
    return commit;
}

/* A COMMIT is the largest message there is and goes to many: it is packed once. */
static const uint8_t *pack_commit(const struct coordinator *self, Troupe__Commit *commit,
                                  size_t *ret_size, struct effects *out) {
    message envelope = coordinator_envelope(self);
    envelope.body_case = TROUPE__ENVELOPE__BODY_COMMIT;
    envelope.commit = commit;
    return effects_pack(out, &envelope, ret_size);
}

/* All ready members of the role have adopted an epoch that lists `seat`. */
static bool known_to(const struct coordinator *self, const struct seat *seat, enum role role) {
    for (uint32_t i = 0; i < self->seats; i++)
        if (self->seat[i].role == role && self->seat[i].ready &&
            self->seat[i].acknowledged_epoch < seat->introduced_epoch)
            return false;
    return true;
}

static bool may_be_ready(const struct coordinator *self, const struct seat *seat) {
    if (seat->introduced_epoch == 0 || seat->acknowledged_epoch < seat->introduced_epoch ||
        !bias_is_held(self, seat))
        return false;
    switch (seat->role) {
    case ROLE_ATTENTION:
        return known_to(self, seat, ROLE_EXPERT) && known_to(self, seat, ROLE_SAMPLER);
    case ROLE_GATEWAY:
    case ROLE_CONTROL:
        return known_to(self, seat, ROLE_ATTENTION);
    default:
        return true;
    }
}

static bool has_ready(const struct coordinator *self, enum role role) {
    for (uint32_t i = 0; i < self->seats; i++)
        if (self->seat[i].role == role && self->seat[i].ready && !self->seat[i].draining)
            return true;
    return false;
}

void membership_review(struct coordinator *self, uint64_t now_ns, struct effects *out) {
    end_learning(self, now_ns, out);
    for (uint32_t i = 0; i < self->seats; i++) {
        struct seat *seat = &self->seat[i];
        if (!seat->ready && may_be_ready(self, seat))
            seat->ready = seat->dirty = self->changed = true;
    }
}

void membership_publish(struct coordinator *self, uint64_t now_ns, struct effects *out) {
    if (!self->changed || self->learn_until_ns != NEVER)
        return;
    self->changed = false;
    self->epoch++;
    bool serving =
        has_ready(self, ROLE_ATTENTION) && has_ready(self, ROLE_SAMPLER) && copies_complete(self);
    if (serving != self->serving)
        effects_trace(out, TRACE_INFO, serving ? "serving" : "not serving");
    self->serving = serving;
    for (uint32_t i = 0; i < self->seats; i++)
        if (self->seat[i].introduced_epoch == 0)
            self->seat[i].introduced_epoch = self->epoch;
    Troupe__Commit *commit = membership_commit(self, out);
    effects_trace(out, TRACE_INFO, "epoch %llu: %u members, %zu of %u experts placed",
                  (unsigned long long)self->epoch, self->seats, commit->n_layer, self->moe_pairs);
    size_t size;
    const uint8_t *bytes = pack_commit(self, commit, &size, out);
    for (uint32_t i = 0; i < self->seats; i++) {
        effects_send_packed(out, self->seat[i].id, bytes, size);
        self->seat[i].commit_sent_ns = now_ns;
    }
}

void membership_on_heartbeat(struct coordinator *self, struct seat *seat,
                             const Troupe__Heartbeat *heartbeat, uint64_t now_ns,
                             struct effects *out) {
    seat->heard_ns = now_ns;
    if (heartbeat->epoch <= self->epoch && heartbeat->epoch > seat->acknowledged_epoch &&
        heartbeat->epoch > seat->foreign_epoch)
        seat->acknowledged_epoch = heartbeat->epoch;
    statistics_take_loads(self, seat, heartbeat);
    statistics_take_answers(seat, heartbeat);
    recent_take(seat, heartbeat);
    bias_on_heartbeat(self, seat, heartbeat, now_ns, out);
    seat->has_heartbeat = true;
    seat->heartbeat = *heartbeat;
    seat->heartbeat.n_load_layer = seat->heartbeat.n_load_expert = seat->heartbeat.n_load_rows = 0;
    seat->heartbeat.load_layer = seat->heartbeat.load_expert = NULL;
    seat->heartbeat.load_rows = NULL;
    seat->heartbeat.n_peer = seat->heartbeat.n_peer_queue = 0;
    seat->heartbeat.n_peer_p50_us = seat->heartbeat.n_peer_p99_us = 0;
    seat->heartbeat.peer = seat->heartbeat.peer_queue = NULL;
    seat->heartbeat.peer_p50_us = seat->heartbeat.peer_p99_us = NULL;
    seat->heartbeat.n_accusation = 0;
    seat->heartbeat.accusation = NULL;
    seat->heartbeat.n_bias_version = seat->heartbeat.n_bias_users = 0;
    seat->heartbeat.bias_version = NULL;
    seat->heartbeat.bias_users = NULL;
    seat->heartbeat.control_address = (char *)protobuf_c_empty_string;
    seat->heartbeat.base.n_unknown_fields = 0;
    seat->heartbeat.base.unknown_fields = NULL;
    if (self->learn_until_ns == NEVER && heartbeat->epoch < self->epoch &&
        now_ns - seat->commit_sent_ns >= self->retry_ns) {
        size_t size;
        const uint8_t *bytes = pack_commit(self, membership_commit(self, out), &size, out);
        effects_send_packed(out, seat->id, bytes, size);
        seat->commit_sent_ns = now_ns;
    }
    quarantine_take(self, seat, heartbeat, now_ns, out);
}
