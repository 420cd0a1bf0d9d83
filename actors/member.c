/* Joining, heartbeats and epochs, for every role but the coordinator.
 *
 *   JOINING   HELLO every hello_retry until WELCOME (or REFUSED: EXIT 1)
 *   JOINED    heartbeats; COMMITs with a larger epoch are adopted, all others ignored
 *   REJOINING a coordinator that was started again did not know the heartbeat (REJOIN): HELLO
 * again, with all that it must learn, until its WELCOME; work goes on with the adopted epoch, the
 * old coordinator is not listened to any more
 *
 * Invariants: 1. the adopted epoch only grows; 2. a peer is known by (id, incarnation) of the
 * adopted epoch, anything from anybody else is ignored; 3. an actor does not adopt an epoch that
 * does not list it. */
#include "actors/member.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/wire.h"

#define NS_PER_MS 1000000u

/* ---- identity ---- */

static size_t string_bytes(const char *text) {
    return text == NULL ? 1 : strlen(text) + 1;
}

static const char *copy_string(char **at, const char *text) {
    char *ret = *at;
    size_t size = string_bytes(text);
    memcpy(ret, text == NULL ? "" : text, size);
    *at += size;
    return ret;
}

char *identity_copy(struct actor_identity *ret, const struct actor_identity *identity) {
    char *memory =
        malloc(string_bytes(identity->name) + string_bytes(identity->control_address) +
               string_bytes(identity->data_address) + string_bytes(identity->host) +
               string_bytes(identity->coordinator_address) +
               string_bytes(identity->model_fingerprint) +
               string_bytes(identity->config_fingerprint) + string_bytes(identity->numerics));
    if (memory == NULL)
        return NULL;
    char *at = memory;
    *ret = *identity;
    ret->name = copy_string(&at, identity->name);
    ret->control_address = copy_string(&at, identity->control_address);
    ret->data_address = copy_string(&at, identity->data_address);
    ret->host = copy_string(&at, identity->host);
    ret->coordinator_address = copy_string(&at, identity->coordinator_address);
    ret->model_fingerprint = copy_string(&at, identity->model_fingerprint);
    ret->config_fingerprint = copy_string(&at, identity->config_fingerprint);
    ret->numerics = copy_string(&at, identity->numerics);
    return memory;
}

uint64_t identity_expert_bytes(const struct actor_identity *identity, const struct model_config *config) {
    uint64_t elements = 3 * (uint64_t)config->hidden * config->expert_width;
    if (strncmp(identity->numerics, "f32", 3) == 0)
        return elements * 4 + 1;
    return elements * (config->fp8 ? 1 : 2) + 1;
}

bool identity_is_fp8(const struct actor_identity *identity) {
    return strncmp(identity->numerics, "fp8", 3) == 0; /* "fp8-sm90-kv8" too */
}

uint32_t identity_activation_bytes(const struct actor_identity *identity) {
    return strncmp(identity->numerics, "f32", 3) == 0 ? 4 : 2; /* "f32-p0.6" too */
}

/* ---- life ---- */

bool member_init(struct member *self, const struct actor_identity *identity,
                 const struct settings *settings, uint64_t capacity_bytes, uint32_t control_roles,
                 uint32_t data_roles) {
    ASSERT(identity->incarnation != 0);
    memset(self, 0, sizeof *self);
    self->strings = identity_copy(&self->identity, identity);
    if (self->strings == NULL)
        return false;
    self->capacity_bytes = capacity_bytes;
    self->hello_retry_ns = (uint64_t)settings->hello_retry_ms * NS_PER_MS;
    self->heartbeat_interval_ns = (uint64_t)settings->heartbeat_ms * NS_PER_MS;
    self->control_roles = control_roles;
    self->data_roles = data_roles;
    self->hello_at_ns = NEVER;
    self->heartbeat_at_ns = NEVER;
    return true;
}

void member_free(struct member *self) {
    free(self->strings);
    free(self->operations);
    free(self->peer);
    memset(self, 0, sizeof *self);
}

uint64_t member_deadline(const struct member *self) {
    if (self->exited)
        return NEVER;
    return self->hello_at_ns < self->heartbeat_at_ns ? self->hello_at_ns : self->heartbeat_at_ns;
}

message member_envelope(const struct member *self) {
    message envelope = TROUPE__ENVELOPE__INIT;
    envelope.protocol_version = WIRE_PROTOCOL_VERSION;
    envelope.from = self->id;
    envelope.from_incarnation = self->identity.incarnation;
    return envelope;
}

static uint32_t leave(struct member *self, int code, const char *reason, struct effects *out) {
    struct effect *effect = effects_add(out, EFFECT_EXIT);
    effect->exit.code = code;
    effect->exit.reason = effects_copy(out, reason, strlen(reason) + 1);
    self->exited = true;
    return MEMBER_EXIT | MEMBER_DONE;
}

/* ---- joining ---- */

static void connect_coordinator(const struct member *self, struct effects *out) {
    struct effect *effect = effects_add(out, EFFECT_CONNECT);
    effect->connect.id = ACTOR_COORDINATOR;
    effect->connect.role = ROLE_COORDINATOR;
    effect->connect.control_address = self->identity.coordinator_address;
    effect->connect.data_address = "";
    effect->connect.host = "";
}

static void send_hello(struct member *self, uint64_t now_ns, struct effects *out) {
    const struct actor_identity *identity = &self->identity;
    Troupe__Hello hello = TROUPE__HELLO__INIT;
    hello.role = (Troupe__Role)identity->role;
    hello.control_address = (char *)identity->control_address;
    hello.data_address = (char *)identity->data_address;
    hello.host = (char *)identity->host;
    hello.model_fingerprint = (char *)identity->model_fingerprint;
    hello.config_fingerprint = (char *)identity->config_fingerprint;
    hello.numerics = (char *)identity->numerics;
    hello.capacity_bytes = self->capacity_bytes;
    hello.pid = identity->pid;
    hello.name = (char *)identity->name;
    hello.threads = identity->threads;
    Troupe__Operations *operations = NULL;
    if (self->rejoining != 0) {
        if (self->operations != NULL)
            operations = troupe__operations__unpack(NULL, self->operations_bytes, self->operations);
        hello.operations = operations;
        hello.id = self->id;
        hello.epoch = self->epoch;
        hello.members = self->epoch > 0 ? self->peers + 1 : 0;
        hello.ready = self->ready;
        hello.draining = self->draining;
        hello.quarantined = self->quarantined;
        hello.bias_version = self->bias_version;
        hello.bias_on = self->bias_on;
        if (self->describe_holdings != NULL)
            self->describe_holdings(self, &hello, out);
    }
    message envelope = member_envelope(self);
    envelope.body_case = TROUPE__ENVELOPE__BODY_HELLO;
    envelope.hello = &hello;
    effects_send(out, ACTOR_COORDINATOR, &envelope);
    if (operations != NULL)
        troupe__operations__free_unpacked(operations, NULL);
    self->hello_at_ns = now_ns + self->hello_retry_ns;
}

static uint32_t on_welcome(struct member *self, const message *envelope, uint64_t now_ns,
                           struct effects *out) {
    const Troupe__Welcome *welcome = envelope->welcome;
    if (welcome->incarnation != self->identity.incarnation || welcome->id <= ACTOR_COORDINATOR)
        return MEMBER_DONE;
    self->rejoining = 0; /* also if it was the one followed all along: the REJOIN was an old one */
    if (self->id != 0 && envelope->from_incarnation == self->coordinator_incarnation) {
        self->hello_at_ns = NEVER;
        return MEMBER_DONE;
    }
    snprintf(self->model_fingerprint, sizeof self->model_fingerprint, "%.39s", welcome->model_fingerprint);
    bool renamed = self->id != 0 && self->id != welcome->id;
    self->id = welcome->id;
    self->coordinator_incarnation = envelope->from_incarnation;
    if (welcome->heartbeat_interval_ns > 0)
        self->heartbeat_interval_ns = welcome->heartbeat_interval_ns;
    self->hello_at_ns = NEVER;
    self->heartbeat_at_ns = now_ns;
    effects_trace(out, TRACE_INFO, "%s joined as actor %u", self->identity.name, self->id);
    return MEMBER_DONE | MEMBER_JOINED | (renamed ? MEMBER_RENAMED : 0);
}

/* A coordinator that was started again. Until its WELCOME nothing of the old one is taken any more,
 * so that what HELLO tells remains true. */
static uint32_t on_rejoin(struct member *self, const message *envelope, uint64_t now_ns,
                          struct effects *out) {
    if (self->id == 0 || envelope->rejoin->incarnation != self->identity.incarnation ||
        envelope->from_incarnation == self->coordinator_incarnation ||
        envelope->from_incarnation == self->rejoining)
        return MEMBER_DONE;
    effects_trace(out, TRACE_WARNING, "another coordinator is there; telling it what is here");
    self->rejoining = envelope->from_incarnation;
    self->hello_at_ns = now_ns;
    return MEMBER_DONE;
}

static uint32_t on_refused(struct member *self, const Troupe__Refused *refused,
                           struct effects *out) {
    if (refused->incarnation != self->identity.incarnation)
        return MEMBER_DONE;
    effects_trace(out, TRACE_ERROR, "the coordinator refused %s: %s", self->identity.name,
                  refused->reason);
    return leave(self, 1, refused->reason, out);
}

/* ---- epochs ---- */

struct peer *member_peer(const struct member *self, actor_id id) {
    uint32_t low = 0, high = self->peers;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (self->peer[middle].id < id)
            low = middle + 1;
        else
            high = middle;
    }
    return low < self->peers && self->peer[low].id == id ? &self->peer[low] : NULL;
}

static void disconnect(const struct peer *peer, struct effects *out) {
    struct effect *effect = effects_add(out, EFFECT_DISCONNECT);
    effect->connect.id = peer->id;
    effect->connect.role = peer->role;
    effect->connect.incarnation = peer->incarnation;
}

static void connect(const struct member *self, const struct peer *peer, const Troupe__Member *entry,
                    struct effects *out) {
    struct effect *effect = effects_add(out, EFFECT_CONNECT);
    effect->connect.id = peer->id;
    effect->connect.role = peer->role;
    effect->connect.incarnation = peer->incarnation;
    /* copied: the message does not outlive the step */
    effect->connect.control_address =
        effects_copy(out, entry->control_address, strlen(entry->control_address) + 1);
    effect->connect.data_address =
        effects_copy(out, entry->data_address, strlen(entry->data_address) + 1);
    effect->connect.host = effects_copy(out, entry->host, strlen(entry->host) + 1);
    effect->connect.data = (self->data_roles & ROLE_BIT(peer->role)) != 0;
}

void member_reach(struct member *self, struct peer *peer, struct effects *out) {
    if (peer->connected)
        return;
    peer->connected = true;
    struct effect *effect = effects_add(out, EFFECT_CONNECT);
    effect->connect.id = peer->id;
    effect->connect.role = peer->role;
    effect->connect.incarnation = peer->incarnation;
    effect->connect.control_address =
        effects_copy(out, peer->control_address, strlen(peer->control_address) + 1);
    /* not for rows: the host may bring weights over an edge between GPUs */
    effect->connect.data_address =
        effects_copy(out, peer->data_address, strlen(peer->data_address) + 1);
    effect->connect.host = "";
}

static const Troupe__Member *find_self(const struct member *self, const Troupe__Commit *commit) {
    for (size_t i = 0; i < commit->n_member; i++)
        if (commit->member[i]->id == self->id &&
            commit->member[i]->incarnation == self->identity.incarnation)
            return commit->member[i];
    return NULL;
}

static int compare_peers(const void *a, const void *b) {
    const struct peer *left = a, *right = b;
    return left->id < right->id ? -1 : left->id > right->id;
}

static void take_member(struct member *self, const Troupe__Member *entry, uint32_t known,
                        struct effects *out) {
    uint32_t all = self->peers;
    self->peers = known; /* search among the old ones, which are sorted */
    struct peer *peer = member_peer(self, entry->id);
    self->peers = all;
    if (peer == NULL) {
        peer = &self->peer[self->peers++];
        memset(peer, 0, sizeof *peer);
        peer->id = entry->id;
        peer->incarnation = entry->incarnation;
        peer->role = (enum role)entry->role;
        strncpy(peer->name, entry->name, sizeof peer->name - 1);
        snprintf(peer->control_address, sizeof peer->control_address, "%s", entry->control_address);
        if (peer->role == ROLE_EXPERT && self->identity.role == ROLE_EXPERT)
            snprintf(peer->data_address, sizeof peer->data_address, "%s", entry->data_address);
        peer->near = strcmp(entry->host, self->identity.host) == 0;
        peer->connected = ((self->control_roles | self->data_roles) & ROLE_BIT(peer->role)) != 0;
        if (peer->connected)
            connect(self, peer, entry, out);
    }
    peer->state = entry->state;
    peer->lost = false;
}

/* Before anybody is connected: a process that a restarted coordinator has given another id is one that
 * leaves and one that comes, and what is closed for the former must not be the latter's. */
static void drop_departed(struct member *self, const Troupe__Commit *commit, struct effects *out) {
    uint32_t kept = 0;
    for (uint32_t i = 0; i < self->peers; i++)
        self->peer[i].marked = false;
    for (size_t i = 0; i < commit->n_member; i++) {
        struct peer *peer = member_peer(self, commit->member[i]->id);
        if (peer != NULL && peer->incarnation == commit->member[i]->incarnation)
            peer->marked = true;
    }
    for (uint32_t i = 0; i < self->peers; i++) {
        if (self->peer[i].marked)
            self->peer[kept++] = self->peer[i];
        else if (self->peer[i].connected)
            disconnect(&self->peer[i], out);
    }
    self->peers = kept;
}

static void take_members(struct member *self, const Troupe__Commit *commit, struct effects *out) {
    uint32_t wanted = self->peers + (uint32_t)commit->n_member;
    if (wanted > self->peers_capacity) {
        struct peer *grown = realloc(self->peer, wanted * sizeof *grown);
        ASSERT(grown != NULL && "memory for peers");
        self->peer = grown;
        self->peers_capacity = wanted;
    }
    drop_departed(self, commit, out);
    uint32_t known = self->peers;
    for (size_t i = 0; i < commit->n_member; i++)
        if (commit->member[i]->id != self->id && commit->member[i]->id > ACTOR_COORDINATOR)
            take_member(self, commit->member[i], known, out);
    qsort(self->peer, self->peers, sizeof *self->peer, compare_peers);
}

/* Kept for whoever coordinates next. */
static void keep_operations(struct member *self, const Troupe__Operations *operations) {
    free(self->operations);
    self->operations = NULL;
    if (operations == NULL)
        return;
    self->operations_bytes = troupe__operations__get_packed_size(operations);
    self->operations = malloc(self->operations_bytes + 1);
    ASSERT(self->operations != NULL && "memory for operations");
    troupe__operations__pack(operations, self->operations);
}

static uint32_t on_commit(struct member *self, const Troupe__Commit *commit, uint64_t now_ns,
                          struct effects *out) {
    if (self->id == 0 || commit->epoch <= self->epoch)
        return MEMBER_DONE;
    const Troupe__Member *own = find_self(self, commit);
    if (own == NULL) {
        effects_trace(out, TRACE_WARNING, "epoch %llu does not list actor %u, not adopted",
                      (unsigned long long)commit->epoch, self->id);
        return MEMBER_DONE;
    }
    take_members(self, commit, out);
    self->epoch = commit->epoch;
    self->bias_version = commit->bias_version;
    keep_operations(self, commit->operations);
    self->bias_on = commit->bias_on;
    self->draining = own->state == TROUPE__ACTOR_STATE__STATE_DRAINING;
    self->quarantined = own->state == TROUPE__ACTOR_STATE__STATE_QUARANTINED;
    self->ready = self->draining || self->quarantined || own->state == TROUPE__ACTOR_STATE__STATE_READY;
    self->serving = commit->serving && self->ready;
    self->heartbeat_at_ns = now_ns; /* the acknowledgement; others wait for it */
    effects_trace(out, TRACE_DEBUG, "adopted epoch %llu: %u peers, %zu placements%s",
                  (unsigned long long)commit->epoch, self->peers, commit->n_layer,
                  self->serving ? ", serving" : "");
    return MEMBER_COMMITTED;
}

/* ---- events ---- */

static uint32_t on_coordinator(struct member *self, const message *envelope, uint64_t now_ns,
                               struct effects *out) {
    if (envelope->body_case == TROUPE__ENVELOPE__BODY_REJOIN)
        return on_rejoin(self, envelope, now_ns, out);
    bool answers_hello = envelope->body_case == TROUPE__ENVELOPE__BODY_WELCOME ||
                         envelope->body_case == TROUPE__ENVELOPE__BODY_REFUSED;
    bool followed = self->id == 0 || envelope->from_incarnation == self->coordinator_incarnation;
    if (self->rejoining != 0 && !answers_hello)
        followed = false;
    else if (self->rejoining != 0 && envelope->from_incarnation == self->rejoining)
        followed = true;
    if (!followed) {
        effects_trace(out, TRACE_WARNING, "ignored %s of another incarnation of the coordinator",
                      wire_name(envelope));
        return MEMBER_DONE;
    }
    switch (envelope->body_case) {
    case TROUPE__ENVELOPE__BODY_WELCOME:
        return on_welcome(self, envelope, now_ns, out);
    case TROUPE__ENVELOPE__BODY_REFUSED:
        return on_refused(self, envelope->refused, out);
    case TROUPE__ENVELOPE__BODY_COMMIT:
        return on_commit(self, envelope->commit, now_ns, out);
    case TROUPE__ENVELOPE__BODY_SHUTDOWN:
        return leave(self, 0, envelope->shutdown->reason, out);
    default:
        return self->id == 0 ? MEMBER_DONE : 0;
    }
}

static uint32_t on_message(struct member *self, const message *envelope, uint64_t now_ns,
                           struct effects *out) {
    if (envelope->from == ACTOR_COORDINATOR)
        return on_coordinator(self, envelope, now_ns, out);
    const struct peer *peer = member_peer(self, envelope->from);
    if (peer == NULL || peer->incarnation != envelope->from_incarnation) {
        effects_trace(out, TRACE_WARNING, "ignored %s of unknown actor %u (incarnation %llx)",
                      wire_name(envelope), envelope->from,
                      (unsigned long long)envelope->from_incarnation);
        return MEMBER_DONE;
    }
    return 0;
}

static uint32_t on_peer_lost(struct member *self, const struct event *event, struct effects *out) {
    if (event->peer.id == ACTOR_COORDINATOR) {
        effects_trace(out, TRACE_WARNING, "the coordinator is gone; going on with epoch %llu",
                      (unsigned long long)self->epoch);
        return MEMBER_DONE;
    }
    struct peer *peer = member_peer(self, event->peer.id);
    if (peer == NULL || peer->incarnation != event->peer.incarnation || peer->lost)
        return MEMBER_DONE;
    peer->lost = true;
    effects_trace(out, TRACE_WARNING, "lost %s (actor %u)", peer->name, peer->id);
    return MEMBER_LOST;
}

uint32_t member_step(struct member *self, const struct event *event, uint64_t now_ns,
                     struct effects *out) {
    if (self->exited)
        return MEMBER_EXIT | MEMBER_DONE;
    uint32_t news = 0;
    switch (event->kind) {
    case EVENT_START:
        connect_coordinator(self, out);
        self->hello_at_ns = now_ns;
        news = MEMBER_DONE;
        break;
    case EVENT_MESSAGE:
        news = on_message(self, event->message, now_ns, out);
        break;
    case EVENT_PEER_LOST:
        news = on_peer_lost(self, event, out);
        break;
    case EVENT_SHUTDOWN:
        news = leave(self, 0, "asked to shut down", out);
        break;
    default:
        break;
    }
    if ((news & MEMBER_EXIT) != 0)
        return news;
    if (now_ns >= self->hello_at_ns)
        send_hello(self, now_ns, out);
    if (now_ns >= self->heartbeat_at_ns)
        news |= MEMBER_HEARTBEAT;
    return news;
}

void member_heartbeat(struct member *self, Troupe__Heartbeat *heartbeat, uint64_t now_ns,
                      struct effects *out) {
    heartbeat->epoch = self->epoch;
    heartbeat->memory_bytes += self->identity.memory_bytes;
    heartbeat->control_address = (char *)self->identity.control_address;
    heartbeat->coordinator_incarnation = self->coordinator_incarnation;
    message envelope = member_envelope(self);
    envelope.body_case = TROUPE__ENVELOPE__BODY_HEARTBEAT;
    envelope.heartbeat = heartbeat;
    effects_send(out, ACTOR_COORDINATOR, &envelope);
    self->heartbeat_at_ns = now_ns + self->heartbeat_interval_ns;
}

const struct peer *member_frame_sender(const struct member *self, const struct frame_header *header,
                                       enum role role) {
    const struct peer *peer = member_peer(self, header->from);
    if (peer == NULL || peer->role != role || peer->incarnation != header->from_incarnation ||
        header->to != self->id || header->to_incarnation != self->identity.incarnation)
        return NULL;
    return peer;
}
