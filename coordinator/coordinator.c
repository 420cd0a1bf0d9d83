/* The coordinator: who is there, who holds which expert, and what everybody must know about it. It
 * stands beside a token's way, never on it: while it is gone, serving goes on with the last epoch. One
 * that is started again learns from the members: a heartbeat of somebody unknown is answered with REJOIN,
 * the HELLO that follows tells id, epoch and what is held; nothing is published until all that are known
 * of have come, or had time to.
 *
 * Every event is taken in, then time is looked at, then a new epoch is published if anything in it
 * has changed. */
#include "coordinator/coordinator.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/wire.h"

message coordinator_envelope(const struct coordinator *self) {
    message envelope = TROUPE__ENVELOPE__INIT;
    envelope.protocol_version = WIRE_PROTOCOL_VERSION;
    envelope.from = ACTOR_COORDINATOR;
    envelope.from_incarnation = self->identity.incarnation;
    return envelope;
}

/* ---- the end ---- */

static void shut_down(struct coordinator *self, const char *reason, struct effects *out) {
    Troupe__Shutdown shutdown = TROUPE__SHUTDOWN__INIT;
    shutdown.reason = (char *)reason;
    for (uint32_t i = 0; i < self->seats; i++) {
        message envelope = coordinator_envelope(self);
        envelope.body_case = TROUPE__ENVELOPE__BODY_SHUTDOWN;
        envelope.shutdown = &shutdown;
        effects_send(out, self->seat[i].id, &envelope);
    }
    struct effect *effect = effects_add(out, EFFECT_EXIT);
    effect->exit.reason = effects_copy(out, reason, strlen(reason) + 1);
    self->exited = true;
}

/* ---- messages ---- */

static void on_peer_exited(struct coordinator *self, const Troupe__PeerExited *exited,
                           uint64_t now_ns, struct effects *out) {
    for (uint32_t i = 0; i < self->seats; i++) {
        struct seat *seat = &self->seat[i];
        bool same = exited->incarnation != 0
                        ? seat->incarnation == exited->incarnation
                        : seat->pid == exited->pid && strcmp(seat->host, exited->host) == 0;
        if (same) {
            membership_remove(self, seat, "its process has ended", now_ns, out);
            return;
        }
    }
}

static void on_member(struct coordinator *self, struct seat *seat, const message *envelope,
                      uint64_t now_ns, struct effects *out) {
    switch (envelope->body_case) {
    case TROUPE__ENVELOPE__BODY_HEARTBEAT:
        membership_on_heartbeat(self, seat, envelope->heartbeat, now_ns, out);
        break;
    case TROUPE__ENVELOPE__BODY_READY:
        copies_on_ready(self, seat, envelope->ready, now_ns, out);
        break;
    case TROUPE__ENVELOPE__BODY_SCALED:
        if (seat->role == ROLE_CONTROL)
            operations_on_scaled(self, envelope->scaled, now_ns, out);
        break;
    case TROUPE__ENVELOPE__BODY_STATUS_REQUEST:
        statistics_on_request(self, envelope, now_ns, out);
        break;
    default:
        effects_trace(out, TRACE_WARNING, "ignored %s of %s (actor %u)", wire_name(envelope),
                      seat->name, seat->id);
        break;
    }
}

static void on_message(struct coordinator *self, const message *envelope, uint64_t now_ns,
                       struct effects *out) {
    struct seat *seat = seat_find(self, envelope->from);
    bool known = seat != NULL && seat->incarnation == envelope->from_incarnation;
    switch (envelope->body_case) {
    case TROUPE__ENVELOPE__BODY_HELLO:
        membership_on_hello(self, envelope, now_ns, out);
        break;
    case TROUPE__ENVELOPE__BODY_PEER_EXITED: /* of a supervisor, which is no member */
        on_peer_exited(self, envelope->peer_exited, now_ns, out);
        break;
    case TROUPE__ENVELOPE__BODY_SHUTDOWN:
        if (envelope->from == 0 || (known && seat->role == ROLE_CONTROL))
            shut_down(self, envelope->shutdown->reason, out);
        break;
    default:
        if (known && envelope->body_case == TROUPE__ENVELOPE__BODY_HEARTBEAT &&
            envelope->heartbeat->coordinator_incarnation != self->identity.incarnation)
            membership_rejoin(self, seat, envelope, now_ns, out);
        else if (known)
            on_member(self, seat, envelope, now_ns, out);
        else
            membership_on_stranger(self, envelope, now_ns, out);
        break;
    }
}

/* ---- events ---- */

/* A coordinator that was stopped for a while has not listened: what it did not hear then is
 * nobody's fault but its own. */
static void forgive_own_absence(struct coordinator *self, uint64_t now_ns) {
    uint64_t gap = now_ns - self->last_step_ns;
    if (self->last_step_ns != 0 && gap > 2 * self->heartbeat_ns)
        for (uint32_t i = 0; i < self->seats; i++)
            self->seat[i].heard_ns += gap;
    self->last_step_ns = now_ns;
}

static void on_timer(struct coordinator *self, uint64_t now_ns, struct effects *out) {
    membership_timer(self, now_ns, out);
    recording_timer(self, now_ns);
    recent_timer(self, now_ns);
    membership_review(self, now_ns, out);
    bias_review(self, now_ns, out);
    copies_review(self, now_ns, out);
    operations_step(self, now_ns, out);
    policy_timer(self, now_ns, out);
    if (now_ns >= self->statistics_at_ns) {
        statistics_send(self, now_ns, out);
        self->statistics_at_ns = now_ns + self->heartbeat_ns;
    }
}

static void coordinator_step(struct actor *actor, const struct event *event, uint64_t now_ns,
                             struct effects *out) {
    struct coordinator *self = (struct coordinator *)actor;
    if (self->exited)
        return;
    forgive_own_absence(self, now_ns);
    switch (event->kind) {
    case EVENT_START:
        self->statistics_at_ns = now_ns + self->heartbeat_ns;
        break;
    case EVENT_MESSAGE:
        on_message(self, event->message, now_ns, out);
        break;
    case EVENT_PEER_LOST: {
        struct seat *seat = seat_find(self, event->peer.id);
        if (seat != NULL && seat->incarnation == event->peer.incarnation)
            membership_remove(self, seat, "its connection has ended", now_ns, out);
        break;
    }
    case EVENT_HTTP_REQUEST:
        admin_on_request(self, event->http, now_ns, out);
        break;
    case EVENT_SHUTDOWN:
        shut_down(self, "asked to shut down", out);
        break;
    default:
        break;
    }
    if (self->exited)
        return;
    on_timer(self, now_ns, out);
    membership_publish(self, now_ns, out);
}

static uint64_t smaller(uint64_t a, uint64_t b) {
    return a < b ? a : b;
}

static uint64_t coordinator_deadline(const struct actor *actor) {
    const struct coordinator *self = (const struct coordinator *)actor;
    if (self->exited)
        return NEVER;
    uint64_t own = smaller(self->statistics_at_ns, self->learn_until_ns);
    own = smaller(own, bias_deadline(self));
    if (self->recording.on)
        own = smaller(own, self->recording.next_ns);
    own = smaller(own, policy_deadline(self));
    return smaller(smaller(own, operations_deadline(self)),
                   smaller(membership_deadline(self), copies_deadline(self)));
}

static const char *coordinator_describe(struct actor *actor) {
    struct coordinator *self = (struct coordinator *)actor;
    uint32_t ready = 0, orders = 0;
    for (uint32_t i = 0; i < self->seats; i++) {
        ready += self->seat[i].ready;
        orders += self->seat[i].order != ORDER_NONE;
    }
    const char *broken = copies_broken(self);
    snprintf(self->description, sizeof self->description,
             "epoch=%llu members=%u ready=%u orders=%u serving=%d bias=%u bias_left=%u%s%s",
             (unsigned long long)self->epoch, self->seats, ready, orders, self->serving,
             bias_number(self->bias.current), bias_left(self), broken != NULL ? " broken: " : "",
             broken != NULL ? broken : "");
    return self->description;
}

/* ---- life ---- */

static void coordinator_destroy(struct actor *actor) {
    struct coordinator *self = (struct coordinator *)actor;
    membership_free(self);
    operations_free(self);
    bias_close(self);
    free(self->recording.before);
    free(self->recording.rows);
    free(self->admin_token);
    free(self->seat);
    free(self->ghost);
    free(self->is_moe);
    free(self->home);
    free(self->targets);
    free(self->actives);
    free(self->waiting);
    free(self->owner);
    free(self->current);
    free(self->wanted);
    free(self->scratch);
    free(self->load_of_gone);
    free(self->recent);
    free(self->past);
    free(self->counted);
    free(self->source);
    free(self->strings);
    free(self);
}

void coordinator_set_admin_token(struct actor *actor, const char *token) {
    struct coordinator *self = (struct coordinator *)actor;
    free(self->admin_token);
    self->admin_token = token != NULL ? strdup(token) : NULL;
    ASSERT(token == NULL || self->admin_token != NULL);
}

void coordinator_allow_faults(struct actor *actor) {
    ((struct coordinator *)actor)->allow_faults = true;
}

static const struct actor_class COORDINATOR_CLASS = {
    .role = ROLE_COORDINATOR,
    .step = coordinator_step,
    .deadline = coordinator_deadline,
    .destroy = coordinator_destroy,
    .describe = coordinator_describe,
};

static bool allocate(struct coordinator *self) {
    size_t pairs = (size_t)self->pairs + 1;
    self->seat = calloc(ACTORS_MAX, sizeof *self->seat);
    self->ghost = calloc(GHOSTS_MAX, sizeof *self->ghost);
    self->is_moe = calloc(self->config.layers, sizeof *self->is_moe);
    self->home = calloc(pairs, sizeof *self->home);
    self->targets = calloc(pairs, sizeof *self->targets);
    self->actives = calloc(pairs, sizeof *self->actives);
    self->waiting = calloc(pairs, sizeof *self->waiting);
    self->owner = calloc(pairs, sizeof *self->owner);
    self->current = calloc(pairs, sizeof *self->current);
    self->wanted = calloc(pairs, sizeof *self->wanted);
    self->scratch = calloc((size_t)6 * ACTORS_MAX, sizeof *self->scratch);
    self->load_of_gone = calloc(pairs, sizeof *self->load_of_gone);
    self->recent = calloc(pairs, sizeof *self->recent);
    self->counted = calloc(pairs, sizeof *self->counted);
    self->source = calloc(pairs, sizeof *self->source);
    return self->seat != NULL && self->ghost != NULL && self->is_moe != NULL &&
           self->home != NULL && self->targets != NULL && self->actives != NULL &&
           self->waiting != NULL && self->owner != NULL && self->current != NULL &&
           self->wanted != NULL && self->scratch != NULL && self->load_of_gone != NULL &&
           self->recent != NULL && self->counted != NULL && self->source != NULL;
}

struct actor *coordinator_create(const struct actor_identity *identity,
                                 const struct settings *settings,
                                 const struct model_config *config) {
    struct coordinator *self = calloc(1, sizeof *self);
    if (self == NULL)
        return NULL;
    self->actor.class = &COORDINATOR_CLASS;
    self->settings = *settings;
    self->config = *config;
    self->heartbeat_ns = (uint64_t)settings->heartbeat_ms * 1000000u;
    self->retry_ns = (uint64_t)settings->hello_retry_ms * 1000000u;
    self->lost_after_ns = self->heartbeat_ns * settings->heartbeat_misses;
    self->last_id = ACTOR_COORDINATOR;
    self->place_at_ns = NEVER;
    self->learn_until_ns = NEVER;
    self->statistics_at_ns = NEVER;
    self->strings = identity_copy(&self->identity, identity);
    if (config->experts > 0)
        self->pairs = config->layers * config->experts;
    if (self->strings == NULL || !allocate(self)) {
        coordinator_destroy(&self->actor);
        return NULL;
    }
    for (uint32_t l = 0; l < config->layers; l++)
        self->is_moe[l] = model_layer_is_moe(config, l);
    for (uint32_t pair = 0; pair < self->pairs; pair++)
        self->moe_pairs += self->is_moe[pair / config->experts];
    self->expert_bytes = identity_expert_bytes(&self->identity, &self->config);
    if (!bias_open(self)) {
        coordinator_destroy(&self->actor);
        return NULL;
    }
    return &self->actor;
}
