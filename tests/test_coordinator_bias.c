/* Versions of the routing bias at the coordinator, its members played by the test: made from loads,
 * handed out, current only when all hold them, freed when nobody uses them, bounded in number,
 * learnt by the next coordinator. */
#include "tests/support/players.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "actors/bias_table.h"

#include <cmocka.h>

#define PAIRS 12 /* 3 layers, 4 experts */

/* What a member holds, and with how many users. */
struct holding {
    uint64_t id[4];
    uint32_t users[4];
    uint32_t count;
};

static const char *ask(struct stage *stage, const char *method, const char *body, uint16_t wanted) {
    return request(stage, method, "/bias", body, wanted);
}

/* A heartbeat in which layer 1 has routed `rows` (of experts 0..3) in all. */
static void beat(struct stage *stage, const struct player *player, const struct holding *holding,
                 const uint64_t rows[4]) {
    Troupe__Heartbeat body = TROUPE__HEARTBEAT__INIT;
    uint32_t layer[4] = {1, 1, 1, 1}, expert[4] = {0, 1, 2, 3};
    body.epoch = epoch_of(stage);
    body.coordinator_incarnation = stage->identity.incarnation;
    if (holding != NULL) {
        body.bias_version = (uint64_t *)holding->id;
        body.bias_users = (uint32_t *)holding->users;
        body.n_bias_version = body.n_bias_users = holding->count;
    }
    if (rows != NULL) {
        body.load_layer = layer;
        body.load_expert = expert;
        body.load_rows = (uint64_t *)rows;
        body.n_load_layer = body.n_load_expert = body.n_load_rows = 4;
    }
    message envelope = envelope_of(player);
    envelope.body_case = TROUPE__ENVELOPE__BODY_HEARTBEAT;
    envelope.heartbeat = &body;
    stage_message(stage, &envelope);
}

static void pass_ms(struct stage *stage, uint64_t ms) {
    stage_timer(stage, stage->now_ns + ms * MS);
}

/* The last BIAS that was sent to the member, by id; deltas to `ret`. */
static uint64_t handed_out(struct stage *stage, const struct player *player, float ret[PAIRS]) {
    uint64_t id = 0;
    for (uint32_t i = 0; i < stage->log.count; i++) {
        const struct effect *effect = &stage->log.list[i];
        if (effect->kind != EFFECT_SEND || effect->send.to != player->id)
            continue;
        Troupe__Envelope *envelope;
        assert_int_equal(wire_unpack(&envelope, effect->send.bytes, effect->send.size, NULL), 0);
        if (envelope->body_case == TROUPE__ENVELOPE__BODY_BIAS) {
            assert_int_equal(envelope->bias->n_delta, PAIRS);
            id = envelope->bias->version;
            if (ret != NULL)
                memcpy(ret, envelope->bias->delta, PAIRS * sizeof *ret);
        }
        wire_free(&envelope);
    }
    return id;
}

static uint32_t releases(struct stage *stage, uint64_t id) {
    uint32_t count = 0;
    stage->next[EFFECT_SEND] = 0;
    for (const message *sent;
         (sent = stage_sent(stage, TROUPE__ENVELOPE__BODY_BIAS_RELEASE)) != NULL;)
        count += sent->bias_release->version == id;
    return count;
}

#define ON "{\"action\":\"on\",\"gamma\":0.125,\"clamp\":0.25,\"interval_ms\":100}"

static const uint64_t ROWS[4] = {6000, 2000, 0, 0}; /* mean 2000, in layer 1; layer 2 has none */

/* A troupe whose biases follow the load; the first interval has begun. */
static void open_following(struct stage *stage, struct player *player) {
    open_troupe(stage, player);
    ask(stage, "POST", ON, 200);
    settle(stage, player, 5);
    stage_clear(stage);
}

/* Everybody is heard of so often that nobody is lost. */
static void live_ms(struct stage *stage, const struct player *player, const struct holding *gateway,
                    const struct holding *attention, uint64_t ms) {
    for (uint64_t gone = 0; gone < ms; gone += 1000) {
        pass_ms(stage, ms - gone < 1000 ? ms - gone : 1000);
        beat(stage, &player[0], gateway, NULL);
        beat(stage, &player[1], attention, NULL);
        for (int i = 2; i < 5; i++)
            beat(stage, &player[i], NULL, NULL);
    }
}

static struct holding one(uint64_t id, uint32_t users) {
    return (struct holding){{id}, {users}, 1};
}

/* Loads so different from the last ones that a further version is made; all say that they hold it
 * and `held`. */
static uint64_t make_version(struct stage *stage, const struct player *player,
                             struct holding *held) {
    static uint64_t total[4];
    for (int e = 0; e < 4; e++)
        total[e] = stage->now_ns / MS * 1000 * (e == 0 ? 9u : 1u);
    stage_clear(stage);
    pass_ms(stage, 200);
    beat(stage, &player[1], held, total);
    pass_ms(stage, 200);
    uint64_t id = handed_out(stage, &player[0], NULL);
    if (id == 0)
        return 0;
    held->id[held->count] = id;
    held->users[held->count++] = 0;
    beat(stage, &player[0], held, NULL);
    beat(stage, &player[1], held, NULL);
    settle(stage, player + 2, 3);
    beat(stage, &player[0], held, NULL);
    beat(stage, &player[1], held, NULL);
    return id;
}

static void test_a_version_is_current_when_all_hold_it(void **state) {
    struct stage stage;
    struct player player[5];
    float delta[PAIRS];
    static const float EXPECTED[PAIRS] = {[4] = -0.125f, [6] = 0.125f, [7] = 0.125f};
    open_following(&stage, player);
    uint64_t epoch = epoch_of(&stage);
    beat(&stage, &player[1], NULL, ROWS);
    pass_ms(&stage, 50); /* not yet */
    assert_true(handed_out(&stage, &player[1], NULL) == 0);
    pass_ms(&stage, 60);
    uint64_t id = handed_out(&stage, &player[1], delta);
    assert_int_equal(bias_number(id), 1);
    assert_memory_equal(delta, EXPECTED, sizeof delta);
    assert_true(handed_out(&stage, &player[0], NULL) == id);
    assert_true(handed_out(&stage, &player[2], NULL) == 0); /* experts and samplers do without */
    assert_true(handed_out(&stage, &player[4], NULL) == 0);
    struct holding held = one(id, 0);
    beat(&stage, &player[1], &held, NULL);
    assert_true(epoch_of(&stage) == epoch); /* the gateway has not said so */
    assert_says(ask(&stage, "GET", NULL, 200), "\"state\":\"coming\",\"holders\":1");
    beat(&stage, &player[0], &held, NULL);
    assert_true(epoch_of(&stage) > epoch);
    assert_true(last_commit(&stage)->bias_version == id);
    assert_true(last_commit(&stage)->bias_on);
    stage_free(&stage);
}

static void test_a_lost_version_is_sent_again(void **state) {
    struct stage stage;
    struct player player[5];
    open_following(&stage, player);
    beat(&stage, &player[1], NULL, ROWS);
    pass_ms(&stage, 110);
    uint64_t id = handed_out(&stage, &player[1], NULL);
    stage_clear(&stage);
    beat(&stage, &player[1], NULL, NULL); /* it may be on its way still */
    assert_true(handed_out(&stage, &player[1], NULL) == 0);
    pass_ms(&stage, stage.settings.hello_retry_ms);
    beat(&stage, &player[1], NULL, NULL);
    assert_true(handed_out(&stage, &player[1], NULL) == id);
    stage_free(&stage);
}

static void test_who_joins_is_ready_when_it_holds_what_there_is(void **state) {
    struct stage stage;
    struct player player[5];
    struct holding held = {.count = 0};
    open_following(&stage, player);
    uint64_t id = make_version(&stage, player, &held);
    struct player late = join(&stage, ROLE_ATTENTION, "attention-1", 300);
    assert_true(handed_out(&stage, &late, NULL) == id);
    for (int round = 0; round < 4; round++) {
        beat(&stage, &player[0], &held, NULL);
        beat(&stage, &player[1], &held, NULL);
        settle(&stage, player + 2, 3);
        beat(&stage, &late, NULL, NULL);
    }
    assert_int_equal(listed(last_commit(&stage), late.id)->state,
                     TROUPE__ACTOR_STATE__STATE_JOINING);
    beat(&stage, &late, &held, NULL);
    assert_int_equal(listed(last_commit(&stage), late.id)->state, TROUPE__ACTOR_STATE__STATE_READY);
    stage_free(&stage);
}

static void test_a_version_is_freed_when_nobody_uses_it(void **state) {
    struct stage stage;
    struct player player[5];
    struct holding held = {.count = 0};
    open_following(&stage, player);
    uint64_t first = make_version(&stage, player, &held);
    held.users[0] = 1;
    uint64_t second = make_version(&stage, player, &held);
    assert_true(first != 0 && second != 0 && first != second);
    assert_true(last_commit(&stage)->bias_version == second);
    ask(&stage, "POST", "{\"action\":\"off\"}", 200);
    stage_clear(&stage);
    live_ms(&stage, player, &held, &held, 2 * stage.settings.bias_linger_ms);
    assert_int_equal(releases(&stage, first), 0); /* a request is pinned to it */
    assert_says(ask(&stage, "GET", NULL, 200), "\"state\":\"in use\"");
    held.users[0] = 0;
    live_ms(&stage, player, &held, &held, stage.settings.bias_linger_ms);
    assert_int_equal(releases(&stage, first), 0); /* and may be gone on with for a while */
    assert_says(ask(&stage, "GET", NULL, 200), "\"state\":\"idle\"");
    live_ms(&stage, player, &held, &held, 3000);
    assert_true(releases(&stage, first) >= 2); /* to both */
    assert_int_equal(releases(&stage, second), 0);
    held.users[0] = 1; /* somebody has come back to it just now: whoever uses it keeps it */
    live_ms(&stage, player, &held, &held, 1000);
    stage_clear(&stage);
    live_ms(&stage, player, &held, &held, 3000);
    assert_int_equal(releases(&stage, first), 0);
    stage_free(&stage);
}

static void test_versions_are_bounded(void **state) {
    struct stage stage;
    struct player player[5];
    struct holding held = {.count = 0};
    open_stage(&stage);
    stage.settings.bias_versions = 2;
    create(&stage);
    player[0] = join(&stage, ROLE_GATEWAY, "gateway-0", 100);
    player[1] = join(&stage, ROLE_ATTENTION, "attention-0", 101);
    player[2] = join(&stage, ROLE_EXPERT, "expert-0", 102);
    player[3] = join(&stage, ROLE_EXPERT, "expert-1", 103);
    player[4] = join(&stage, ROLE_SAMPLER, "sampler-0", 104);
    settle(&stage, player, 5);
    ask(&stage, "POST", "{\"action\":\"on\",\"gamma\":0.03125,\"clamp\":1,\"interval_ms\":100}",
        200);
    for (uint32_t i = 0; i < 2; i++) {
        assert_true(make_version(&stage, player, &held) != 0);
        held.users[i] = 1;
    }
    assert_true(make_version(&stage, player, &held) == 0);
    assert_true(make_version(&stage, player, &held) == 0);
    held.users[0] = 0;
    beat(&stage, &player[0], &held, NULL);
    beat(&stage, &player[1], &held, NULL);
    live_ms(&stage, player, &held, &held, stage.settings.bias_linger_ms + 2000);
    assert_says(ask(&stage, "GET", NULL, 200),
                "\"version\":3,"); /* what it counted meanwhile was not lost */
    assert_null(strstr(ask(&stage, "GET", NULL, 200), "\"version\":1,"));
    stage_free(&stage);
}

static void test_reset_is_at_once(void **state) {
    struct stage stage;
    struct player player[5];
    struct holding held = {.count = 0};
    open_following(&stage, player);
    uint64_t id = make_version(&stage, player, &held);
    assert_true(last_commit(&stage)->bias_version == id);
    stage_clear(&stage);
    assert_says(ask(&stage, "POST", "{\"action\":\"reset\"}", 200),
                "\"on\":true,\"version\":0,\"name\":\"0\"");
    assert_true(last_commit(&stage)->bias_version == 0);
    stage_clear(&stage);
    ask(&stage, "POST", "{\"action\":\"off\"}", 200);
    assert_false(last_commit(&stage)->bias_on);
    assert_true(make_version(&stage, player, &held) == 0);
    stage_free(&stage);
}

static void test_few_rows_tell_nothing(void **state) {
    struct stage stage;
    struct player player[5];
    const uint64_t few[4] = {1900, 0, 0, 0},
                   enough[4] = {2000, 0, 0, 0}; /* 1000 a layer: bias_rows */
    open_following(&stage, player);
    beat(&stage, &player[1], NULL, few);
    pass_ms(&stage, 110);
    assert_true(handed_out(&stage, &player[1], NULL) == 0);
    beat(&stage, &player[1], NULL, enough); /* it has gone on counting */
    pass_ms(&stage, 110);
    assert_true(handed_out(&stage, &player[1], NULL) != 0);
    stage_free(&stage);
}

/* ---- a coordinator that is started again ---- */

static void rejoin(struct stage *stage, struct player *player, uint64_t epoch, uint64_t current,
                   float *delta, const uint64_t *ids, uint32_t count) {
    Troupe__Hello hello = TROUPE__HELLO__INIT;
    Troupe__Bias bias[2], *list[2];
    for (uint32_t i = 0; i < count; i++) {
        troupe__bias__init(&bias[i]);
        bias[i].version = ids[i];
        bias[i].delta = delta + i * PAIRS;
        bias[i].n_delta = PAIRS;
        list[i] = &bias[i];
    }
    hello.role = (Troupe__Role)player->role;
    hello.name = player->name;
    hello.control_address = hello.data_address = "test://player";
    hello.host = "here";
    hello.model_fingerprint = "fingerprint";
    hello.numerics = "f32";
    hello.id = player->id;
    hello.epoch = epoch;
    hello.members = 3;
    hello.ready = true;
    hello.bias = list;
    hello.n_bias = count;
    hello.bias_version = current;
    hello.bias_on = true;
    message envelope = envelope_of(player);
    envelope.body_case = TROUPE__ENVELOPE__BODY_HELLO;
    envelope.hello = &hello;
    stage_message(stage, &envelope);
}

static void test_the_next_coordinator_learns_the_versions(void **state) {
    struct stage stage;
    float delta[2 * PAIRS] = {[4] = 0.5f, [PAIRS + 5] = -0.25f};
    const uint64_t ids[2] = {bias_id(6, delta, PAIRS), bias_id(7, delta + PAIRS, PAIRS)};
    struct player gateway = {ROLE_GATEWAY, 400, "gateway-0", 10},
                  attention = {ROLE_ATTENTION, 401, "attention-0", 11},
                  sampler = {ROLE_SAMPLER, 402, "sampler-0", 12};
    open_stage(&stage);
    create(&stage);
    rejoin(&stage, &gateway, 20, ids[0], delta, ids, 1); /* has not adopted the newest epoch yet */
    rejoin(&stage, &attention, 21, ids[1], delta, ids, 2);
    stage_clear(&stage);
    rejoin(&stage, &sampler, 21, ids[1], delta, ids, 0); /* the last one that is known of */
    const Troupe__Commit *commit = last_commit(&stage);
    assert_true(commit->epoch > 21 && commit->bias_version == ids[1] && commit->bias_on);
    struct holding both = {{ids[0], ids[1]}, {1, 0}, 2}, first = one(ids[0], 1);
    stage_clear(&stage);
    pass_ms(&stage, stage.settings.hello_retry_ms);
    beat(&stage, &gateway, &first, NULL);
    float found[PAIRS];
    assert_true(handed_out(&stage, &gateway, found) == ids[1]); /* the one that it lacks */
    assert_memory_equal(found, delta + PAIRS, sizeof found);
    beat(&stage, &attention, &both, NULL);
    assert_true(handed_out(&stage, &attention, NULL) == 0);
    assert_int_equal(releases(&stage, ids[0]), 0);
    assert_says(ask(&stage, "GET", NULL, 200), "\"version\":6,");
    stage_free(&stage);
}

static void test_what_is_not_its_name_is_not_learnt(void **state) {
    struct stage stage;
    float delta[PAIRS] = {[4] = 0.5f};
    const uint64_t wrong = bias_id(6, delta, PAIRS) + 1;
    struct player attention = {ROLE_ATTENTION, 401, "attention-0", 11};
    open_stage(&stage);
    create(&stage);
    rejoin(&stage, &attention, 21, wrong, delta, &wrong, 1);
    stage_clear(&stage);
    pass_ms(&stage, 5000);
    assert_true(last_commit(&stage)->bias_version == 0);
    stage_free(&stage);
}

static void test_nonsense_is_refused(void **state) {
    static const struct {
        const char *body, *why;
    } cases[] = {
        {"{}", "action: on, off or reset expected, found nothing"},
        {"{\"action\":\"up\"}", "found up"},
        {"{\"action\":\"on\",\"gamma\":0}", "gamma: above 0"},
        {"{\"action\":\"on\",\"gamma\":-1}", "gamma: above 0"},
        {"{\"action\":\"on\",\"gamma\":1.5}", "gamma: above 0 and at most 1 expected, found 1.5"},
        {"{\"action\":\"on\",\"gamma\":\"x\"}", "gamma: a number expected"},
        {"{\"action\":\"on\",\"clamp\":-0.1}", "clamp: 0 to 1 expected"},
        {"{\"action\":\"on\",\"interval_ms\":1}", "interval_ms: 10 to 86400000 expected, found 1"},
        {"{\"action\":\"on\",\"interval_ms\":1.5}", "interval_ms: a whole number expected"},
    };
    struct stage stage;
    struct player player[5];
    open_troupe(&stage, player);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        assert_says(ask(&stage, "POST", cases[i].body, 400), cases[i].why);
    assert_says(ask(&stage, "GET", NULL, 200), "\"on\":false,\"version\":0");
    stage_free(&stage);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_version_is_current_when_all_hold_it),
        cmocka_unit_test(test_a_lost_version_is_sent_again),
        cmocka_unit_test(test_who_joins_is_ready_when_it_holds_what_there_is),
        cmocka_unit_test(test_a_version_is_freed_when_nobody_uses_it),
        cmocka_unit_test(test_versions_are_bounded),
        cmocka_unit_test(test_reset_is_at_once),
        cmocka_unit_test(test_few_rows_tell_nothing),
        cmocka_unit_test(test_the_next_coordinator_learns_the_versions),
        cmocka_unit_test(test_what_is_not_its_name_is_not_learnt),
        cmocka_unit_test(test_nonsense_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
