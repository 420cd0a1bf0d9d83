/* See players.h. */
#include "tests/support/players.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

void open_stage(struct stage *stage) {
    stage_init(stage, ROLE_COORDINATOR);
    stage->settings.expected_experts = 2;
}

void create(struct stage *stage) {
    stage->actor = coordinator_create(&stage->identity, &stage->settings, &stage->config);
    assert_non_null(stage->actor);
    stage_step(stage, &(struct event){.kind = EVENT_START});
}

const char *described(struct stage *stage) {
    return stage->actor->class->describe(stage->actor);
}

void assert_described(struct stage *stage, const char *text) {
    if (strstr(described(stage), text) == NULL)
        fail_msg("\"%s\" is not in \"%s\"", text, described(stage));
}

message envelope_of(const struct player *player) {
    message envelope = TROUPE__ENVELOPE__INIT;
    envelope.protocol_version = WIRE_PROTOCOL_VERSION;
    envelope.from = player->id;
    envelope.from_incarnation = player->incarnation;
    return envelope;
}

void say_hello(struct stage *stage, const struct player *player, const char *fingerprint,
                      const char *numerics, uint64_t capacity_bytes) {
    Troupe__Hello hello = TROUPE__HELLO__INIT;
    hello.role = (Troupe__Role)player->role;
    hello.control_address = "test://player";
    hello.data_address = "test://player-data";
    hello.host = "here";
    hello.name = (char *)player->name;
    hello.model_fingerprint = (char *)fingerprint;
    hello.numerics = (char *)numerics;
    hello.capacity_bytes = capacity_bytes;
    hello.pid = (uint32_t)player->incarnation;
    message envelope = envelope_of(player);
    envelope.from = 0;
    envelope.body_case = TROUPE__ENVELOPE__BODY_HELLO;
    envelope.hello = &hello;
    stage_message(stage, &envelope);
}

/* HELLO, and the id out of WELCOME. */
struct player join(struct stage *stage, enum role role, const char *name,
                          uint64_t incarnation) {
    struct player player = {.role = role, .incarnation = incarnation};
    snprintf(player.name, sizeof player.name, "%s", name);
    stage_clear(stage);
    say_hello(stage, &player, "fingerprint", "f32", 0);
    const message *welcome = stage_sent(stage, TROUPE__ENVELOPE__BODY_WELCOME);
    assert_non_null(welcome);
    assert_true(welcome->welcome->incarnation == incarnation);
    player.id = welcome->welcome->id;
    return player;
}

void heartbeat(struct stage *stage, const struct player *player, uint64_t epoch) {
    Troupe__Heartbeat heartbeat = TROUPE__HEARTBEAT__INIT;
    heartbeat.epoch = epoch;
    heartbeat.coordinator_incarnation = stage->identity.incarnation;
    message envelope = envelope_of(player);
    envelope.body_case = TROUPE__ENVELOPE__BODY_HEARTBEAT;
    envelope.heartbeat = &heartbeat;
    stage_message(stage, &envelope);
}

uint64_t epoch_of(struct stage *stage) {
    return strtoull(strstr(described(stage), "epoch=") + 6, NULL, 10);
}

/* All adopt the newest epoch, until nothing new comes of it. */
void settle(struct stage *stage, const struct player *players, uint32_t count) {
    for (int round = 0; round < 6; round++)
        for (uint32_t i = 0; i < count; i++)
            heartbeat(stage, &players[i], epoch_of(stage));
}

void ready(struct stage *stage, const struct player *player, uint64_t operation, bool ok) {
    Troupe__Ready ready = TROUPE__READY__INIT;
    ready.operation = operation;
    ready.ok = ok;
    ready.error = "no memory";
    message envelope = envelope_of(player);
    envelope.body_case = TROUPE__ENVELOPE__BODY_READY;
    envelope.ready = &ready;
    stage_message(stage, &envelope);
}

struct order last_order(struct stage *stage, const struct player *player) {
    struct order order = {0};
    for (uint32_t i = 0; i < stage->log.count; i++) {
        const struct effect *effect = &stage->log.list[i];
        if (effect->kind != EFFECT_SEND || effect->send.to != player->id)
            continue;
        Troupe__Envelope *envelope;
        assert_int_equal(wire_unpack(&envelope, effect->send.bytes, effect->send.size, NULL), 0);
        const uint32_t *layer = NULL, *expert = NULL;
        size_t count = 0;
        if (envelope->body_case == TROUPE__ENVELOPE__BODY_ASSIGN) {
            order = (struct order){.operation = envelope->assign->operation};
            layer = envelope->assign->layer;
            expert = envelope->assign->expert;
            count = envelope->assign->n_layer;
        } else if (envelope->body_case == TROUPE__ENVELOPE__BODY_RELEASE) {
            order = (struct order){.operation = envelope->release->operation, .release = true};
            layer = envelope->release->layer;
            expert = envelope->release->expert;
            count = envelope->release->n_layer;
        }
        for (size_t j = 0; j < count; j++)
            order.pair[order.count++] = layer[j] * 4 + expert[j];
        wire_free(&envelope);
    }
    return order;
}

/* The newest epoch in the log; valid until the next stage_sent. */
const Troupe__Commit *last_commit(struct stage *stage) {
    stage->next[EFFECT_SEND] = 0;
    const Troupe__Commit *commit = NULL;
    for (uint32_t left = stage_sent_count(stage, TROUPE__ENVELOPE__BODY_COMMIT); left > 0; left--)
        commit = stage_sent(stage, TROUPE__ENVELOPE__BODY_COMMIT)->commit;
    assert_non_null(commit);
    return commit;
}

const Troupe__Member *listed(const Troupe__Commit *commit, actor_id id) {
    for (size_t i = 0; i < commit->n_member; i++)
        if (commit->member[i]->id == id)
            return commit->member[i];
    return NULL;
}

uint32_t placed_at(const Troupe__Commit *commit, actor_id id) {
    uint32_t count = 0;
    for (size_t i = 0; i < commit->n_holder; i++)
        count += commit->holder[i] == id;
    return count;
}

/* gateway, attention, expert-0, expert-1, sampler; all ready, experts loaded. */
void open_troupe(struct stage *stage, struct player *player) {
    open_stage(stage);
    fill_troupe(stage, player);
}

void fill_troupe(struct stage *stage, struct player *player) {
    create(stage);
    player[0] = join(stage, ROLE_GATEWAY, "gateway-0", 100);
    player[1] = join(stage, ROLE_ATTENTION, "attention-0", 101);
    player[2] = join(stage, ROLE_EXPERT, "expert-0", 102);
    player[3] =
        join(stage, ROLE_EXPERT, "expert-1", 103); /* the last one expected: orders go out */
    struct order first = last_order(stage, &player[2]), second = last_order(stage, &player[3]);
    player[4] = join(stage, ROLE_SAMPLER, "sampler-0", 104);
    ready(stage, &player[2], first.operation, true);
    ready(stage, &player[3], second.operation, true);
    settle(stage, player, 5);
    assert_described(stage, "members=5 ready=5 orders=0 serving=1");
    stage_clear(stage);
}

/* ---- the admin interface ---- */

/* The answer's body; valid until the next request. */
const char *request(struct stage *stage, const char *method, const char *path, const char *body,
                           uint16_t wanted_status) {
    static char text[65536];
    static uint64_t client;
    struct http_request http = {.client = ++client,
                                .method = method,
                                .path = path,
                                .query = "",
                                .body = body,
                                .body_bytes = body != NULL ? strlen(body) : 0};
    stage->next[EFFECT_STREAM] = 0;
    uint32_t before = stage_count(stage, EFFECT_STREAM);
    stage_step(stage, &(struct event){.kind = EVENT_HTTP_REQUEST, .http = &http});
    const struct effect *effect = NULL;
    for (uint32_t i = 0; i <= before; i++)
        effect = stage_take(stage, EFFECT_STREAM);
    assert_non_null(effect);
    assert_true(effect->stream.last);
    snprintf(text, sizeof text, "%.*s", (int)effect->stream.size, (const char *)effect->stream.bytes);
    if (effect->stream.status != wanted_status)
        fail_msg("%s %s: status %u, wanted %u: %s", path, body, effect->stream.status, wanted_status, text);
    return text;
}

void post(struct stage *stage, const char *path, const char *body) {
    request(stage, "POST", path, body, 202);
}

void assert_says(const char *text, const char *wanted) {
    if (strstr(text, wanted) == NULL)
        fail_msg("\"%s\" is not in %s", wanted, text);
}

void assert_phase(struct stage *stage, uint32_t id, const char *phase) {
    char wanted[64];
    const char *text = request(stage, "GET", "/operations", NULL, 200);
    snprintf(wanted, sizeof wanted, "{\"id\":%u,", id);
    const char *at = strstr(text, wanted);
    assert_non_null(at);
    snprintf(wanted, sizeof wanted, "\"phase\":\"%s\"", phase);
    const char *found = strstr(at, "\"phase\":");
    if (strncmp(found, wanted, strlen(wanted)) != 0)
        fail_msg("operation %u: phase %s expected, found %.30s", id, phase, found);
}

void answer_order(struct stage *stage, const struct player *player, bool ok) {
    struct order order = last_order(stage, player);
    assert_true(order.operation != 0);
    ready(stage, player, order.operation, ok);
}

void route(struct stage *stage, const struct player *player, uint32_t layer, uint32_t expert, uint64_t rows) {
    Troupe__Heartbeat body = TROUPE__HEARTBEAT__INIT;
    body.epoch = epoch_of(stage);
    body.coordinator_incarnation = stage->identity.incarnation;
    body.n_load_layer = body.n_load_expert = body.n_load_rows = 1;
    body.load_layer = &layer;
    body.load_expert = &expert;
    body.load_rows = &rows;
    message envelope = envelope_of(player);
    envelope.body_case = TROUPE__ENVELOPE__BODY_HEARTBEAT;
    envelope.heartbeat = &body;
    stage_message(stage, &envelope);
}

void work(struct stage *stage, const struct player *player, uint64_t rows, uint64_t busy_ns) {
    Troupe__Heartbeat body = TROUPE__HEARTBEAT__INIT;
    body.epoch = epoch_of(stage);
    body.coordinator_incarnation = stage->identity.incarnation;
    body.rows = rows;
    body.busy_ns = busy_ns;
    message envelope = envelope_of(player);
    envelope.body_case = TROUPE__ENVELOPE__BODY_HEARTBEAT;
    envelope.heartbeat = &body;
    stage_message(stage, &envelope);
}

void go_on(struct stage *stage, const struct player *player, uint32_t count) {
    for (int round = 0; round < 6; round++) {
        for (uint32_t i = 0; i < count; i++) {
            struct order order = {0};
            if (player[i].role == ROLE_EXPERT)
                order = last_order(stage, &player[i]);
            if (order.operation != 0)
                ready(stage, &player[i], order.operation, true);
        }
        settle(stage, player, count);
    }
}
