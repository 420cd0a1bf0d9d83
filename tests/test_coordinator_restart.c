/* A coordinator that is started again: what was wanted is wanted, what was under way goes on or is aborted with a reason. A first
 * coordinator begins something, its members then tell a second one what they know. */
#include "tests/support/players.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define HELD_MAX 12

/* What an expert process of the test holds when the coordinator ends; pair: layer * 4 + expert. */
struct holdings {
    uint32_t count, pair[HELD_MAX];
};

static bool placed(const Troupe__Commit *commit, actor_id id, uint32_t pair) {
    for (size_t i = 0; i < commit->n_layer; i++)
        if (commit->holder[i] == id && commit->layer[i] * 4 + commit->expert[i] == pair)
            return true;
    return false;
}

/* HELLO after REJOIN, as actors/expert.c and actors/member.c say it. */
static void come_back(struct stage *stage, const struct player *player, const Troupe__Commit *commit,
                      const struct holdings *holdings) {
    Troupe__Hello hello = TROUPE__HELLO__INIT;
    uint32_t layer[HELD_MAX], expert[HELD_MAX];
    hello.role = (Troupe__Role)player->role;
    hello.control_address = hello.data_address = "test://player";
    hello.host = "here";
    hello.name = (char *)player->name;
    hello.model_fingerprint = "fingerprint";
    hello.numerics = "f32";
    hello.pid = (uint32_t)player->incarnation;
    hello.id = player->id;
    hello.epoch = commit->epoch;
    hello.members = (uint32_t)commit->n_member;
    hello.ready = listed(commit, player->id)->state != TROUPE__ACTOR_STATE__STATE_JOINING;
    hello.draining = listed(commit, player->id)->state == TROUPE__ACTOR_STATE__STATE_DRAINING;
    hello.operation = 50;
    hello.operations = commit->operations;
    for (int pass = 0; holdings != NULL && pass < 2; pass++)
        for (uint32_t i = 0; i < holdings->count; i++)
            if (placed(commit, player->id, holdings->pair[i]) == (pass == 0)) {
                layer[hello.n_layer++] = holdings->pair[i] / 4;
                expert[hello.n_expert++] = holdings->pair[i] % 4;
                hello.placed += pass == 0;
            }
    hello.held = (uint32_t)hello.n_layer;
    hello.layer = layer;
    hello.expert = expert;
    message envelope = envelope_of(player);
    envelope.body_case = TROUPE__ENVELOPE__BODY_HELLO;
    envelope.hello = &hello;
    stage_message(stage, &envelope);
}

static message *copy_of_last_commit(struct stage *stage) {
    message envelope = TROUPE__ENVELOPE__INIT, *ret = NULL;
    envelope.protocol_version = WIRE_PROTOCOL_VERSION;
    envelope.from_incarnation = 1;
    envelope.body_case = TROUPE__ENVELOPE__BODY_COMMIT;
    envelope.commit = (Troupe__Commit *)last_commit(stage);
    size_t size = wire_packed_bytes(&envelope);
    uint8_t *bytes = malloc(size);
    wire_pack(&envelope, bytes);
    assert_int_equal(wire_unpack(&ret, bytes, size, NULL), 0);
    free(bytes);
    return ret;
}

/* Ends the coordinator of `stage` without a word and starts another one, to which all come back but `lost`. */
static void start_again(struct stage *stage, const struct player *player, uint32_t count,
                        const struct holdings *holdings, const struct player *lost) {
    message *commit = copy_of_last_commit(stage);
    stage_free(stage);
    open_stage(stage);
    stage->identity.incarnation += 7;
    create(stage);
    for (uint32_t i = 0; i < count; i++)
        if (&player[i] != lost)
            come_back(stage, &player[i], commit->commit,
                      player[i].role == ROLE_EXPERT ? &holdings[i] : NULL);
    stage_timer(stage, stage->now_ns + 10 * (uint64_t)stage->settings.heartbeat_ms * MS);
    settle(stage, player, count);
    wire_free(&commit);
}

/* open_troupe places experts 0 and 1 at expert-0 (player 2), 2 and 3 at expert-1 (player 3), in layers 1 and 2. */
static const struct holdings AS_OPENED[5] = {
    [2] = {4, {4, 5, 8, 9}},
    [3] = {4, {6, 7, 10, 11}},
};

static void test_replicas_that_were_asked_for_stay(void **state) {
    struct stage stage;
    struct player player[5];
    struct holdings holdings[5];
    open_troupe(&stage, player);
    post(&stage, "/replicate", "{\"layer\":1,\"expert\":0}");
    go_on(&stage, player, 5);
    assert_phase(&stage, 1, "done");
    memcpy(holdings, AS_OPENED, sizeof holdings);
    holdings[3].pair[holdings[3].count++] = 4;
    start_again(&stage, player, 5, holdings, NULL);
    const Troupe__Commit *commit = last_commit(&stage);
    assert_int_equal(commit->n_layer, 9);
    assert_true(placed(commit, player[2].id, 4) && placed(commit, player[3].id, 4));
    assert_true(commit->serving);
    assert_int_equal(last_order(&stage, &player[3]).operation, 0); /* nothing is to be loaded or dropped */
    post(&stage, "/replicate", "{\"layer\":1,\"expert\":1}");
    assert_phase(&stage, 2, "prepare"); /* numbers go on */
    stage_free(&stage);
}

/* Held, but in no epoch: a copy that was being dropped, or one that nobody waits for any more. */
static void test_what_no_epoch_has_is_dropped(void **state) {
    struct stage stage;
    struct player player[5];
    struct holdings holdings[5];
    open_troupe(&stage, player);
    join(&stage, ROLE_CONTROL, "ctl", 900); /* makes an epoch to look at */
    memcpy(holdings, AS_OPENED, sizeof holdings);
    holdings[3].pair[holdings[3].count++] = 4;
    start_again(&stage, player, 5, holdings, NULL);
    assert_int_equal(last_commit(&stage)->n_layer, 8);
    struct order order = last_order(&stage, &player[3]);
    assert_true(order.release);
    assert_int_equal(order.count, 1);
    assert_int_equal(order.pair[0], 4);
    stage_free(&stage);
}

#define MOVE "{\"layer\":1,\"expert\":0,\"from\":\"expert-0\",\"to\":\"expert-1\"}"

static void test_a_move_goes_on_in_each_phase(void **state) {
    for (int loaded = 0; loaded < 3; loaded++) { /* 0: not loaded, 1: loaded but not READY, 2: committed */
        struct stage stage;
        struct player player[5];
        struct holdings holdings[5];
        open_troupe(&stage, player);
        post(&stage, "/move", MOVE);
        if (loaded == 2)
            answer_order(&stage, &player[3], true);
        memcpy(holdings, AS_OPENED, sizeof holdings);
        if (loaded >= 1)
            holdings[3].pair[holdings[3].count++] = 4;
        start_again(&stage, player, 5, holdings, NULL);
        if (loaded == 0)
            assert_phase(&stage, 1, "prepare");
        go_on(&stage, player, 5);
        assert_phase(&stage, 1, "done");
        const Troupe__Commit *commit = last_commit(&stage);
        assert_int_equal(commit->n_layer, 8);
        assert_true(placed(commit, player[3].id, 4));
        assert_true(commit->serving);
        assert_described(&stage, "orders=0 serving=1");
        stage_free(&stage);
    }
}

static void test_an_operation_whose_taker_is_gone_is_aborted(void **state) {
    struct stage stage;
    struct player player[5];
    open_troupe(&stage, player);
    post(&stage, "/move", MOVE);
    start_again(&stage, player, 5, AS_OPENED, &player[3]);
    assert_phase(&stage, 1, "aborted");
    assert_says(request(&stage, "GET", "/operations", NULL, 200),
                "which was to take a copy, is gone");
    go_on(&stage, player, 5); /* its experts are loaded by the other */
    const Troupe__Commit *commit = last_commit(&stage);
    assert_int_equal(placed_at(commit, player[2].id), 8);
    stage_free(&stage);
}

static void test_an_aborted_operation_does_not_come_back(void **state) {
    struct stage stage;
    struct player player[5];
    open_troupe(&stage, player);
    post(&stage, "/move", MOVE);
    post(&stage, "/cancel", "{\"operation\":1}");
    start_again(&stage, player, 5, AS_OPENED, NULL);
    assert_says(request(&stage, "GET", "/operations", NULL, 200), "\"operations\":[]");
    go_on(&stage, player, 5);
    assert_true(placed(last_commit(&stage), player[2].id, 4));
    stage_free(&stage);
}

static void test_a_drain_goes_on(void **state) {
    struct stage stage;
    struct player player[5];
    open_troupe(&stage, player);
    post(&stage, "/drain", "{\"actor\":\"expert-0\"}");
    start_again(&stage, player, 5, AS_OPENED, NULL);
    assert_phase(&stage, 1, "prepare");
    go_on(&stage, player, 5);
    assert_int_equal(placed_at(last_commit(&stage), player[3].id), 8);
    assert_phase(&stage, 1, "release"); /* all is given away; its end is waited for */
    stage_free(&stage);
}

static const Troupe__Scale *last_scale(struct stage *stage) {
    const Troupe__Scale *scale = NULL;
    stage->next[EFFECT_SEND] = 0;
    for (uint32_t left = stage_sent_count(stage, TROUPE__ENVELOPE__BODY_SCALE); left > 0; left--)
        scale = stage_sent(stage, TROUPE__ENVELOPE__BODY_SCALE)->scale;
    return scale;
}

/* The supervisor did not answer the first one: the second asks in its name, so that nothing is started twice. */
static void test_scaling_up_is_asked_for_in_the_name_of_who_began_it(void **state) {
    struct stage stage;
    struct player player[6];
    struct holdings holdings[6] = {{0}};
    open_troupe(&stage, player);
    player[5] = join(&stage, ROLE_CONTROL, "supervisor", 300);
    settle(&stage, player, 6);
    post(&stage, "/scale", "{\"role\":\"experts\",\"count\":3}");
    uint64_t begun_by = stage.identity.incarnation;
    memcpy(holdings, AS_OPENED, sizeof AS_OPENED);
    start_again(&stage, player, 6, holdings, NULL);
    assert_phase(&stage, 1, "prepare");
    const Troupe__Scale *scale = last_scale(&stage);
    assert_non_null(scale);
    assert_true(scale->operation == 1 && scale->begun_by == begun_by);
    assert_int_equal(scale->start, 1);
    stage_free(&stage);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_replicas_that_were_asked_for_stay),
        cmocka_unit_test(test_what_no_epoch_has_is_dropped),
        cmocka_unit_test(test_a_move_goes_on_in_each_phase),
        cmocka_unit_test(test_an_operation_whose_taker_is_gone_is_aborted),
        cmocka_unit_test(test_an_aborted_operation_does_not_come_back),
        cmocka_unit_test(test_a_drain_goes_on),
        cmocka_unit_test(test_scaling_up_is_asked_for_in_the_name_of_who_began_it),
    };
    return cmocka_run_group_tests_name("restart", tests, NULL, NULL);
}
