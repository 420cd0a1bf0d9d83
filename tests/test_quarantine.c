/* Processes that gave wrong rows, as the coordinator deals with them; attention actors and expert
 * processes are played by the test. */
#include "tests/support/players.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <cmocka.h>

static void accuse_of(struct stage *stage, const struct player *accuser, const struct player *liar,
                      uint64_t incarnation, bool undecided) {
    Troupe__Accusation accusation = TROUPE__ACCUSATION__INIT, *list[] = {&accusation};
    Troupe__Heartbeat heartbeat = TROUPE__HEARTBEAT__INIT;
    accusation.actor = liar->id;
    accusation.incarnation = incarnation;
    accusation.layer = 1;
    accusation.expert = 2;
    accusation.undecided = undecided;
    heartbeat.epoch = epoch_of(stage);
    heartbeat.coordinator_incarnation = stage->identity.incarnation;
    heartbeat.n_accusation = 1;
    heartbeat.accusation = list;
    message envelope = envelope_of(accuser);
    envelope.body_case = TROUPE__ENVELOPE__BODY_HEARTBEAT;
    envelope.heartbeat = &heartbeat;
    stage_message(stage, &envelope);
}

/* Who was told to end since the last stage_clear; 0: nobody. */
static actor_id told_to_end(struct stage *stage) {
    for (uint32_t i = 0; i < stage->log.count; i++) {
        const struct effect *effect = &stage->log.list[i];
        Troupe__Envelope *envelope;
        if (effect->kind != EFFECT_SEND ||
            wire_unpack(&envelope, effect->send.bytes, effect->send.size, NULL) < 0)
            continue;
        bool ends = envelope->body_case == TROUPE__ENVELOPE__BODY_SHUTDOWN;
        wire_free(&envelope);
        if (ends)
            return effect->send.to;
    }
    return 0;
}

static const Troupe__Stats *last_stats(struct stage *stage) {
    stage_clear(stage);
    stage_timer(stage, stage->now_ns + 300000000u);
    const message *sent = stage_sent(stage, TROUPE__ENVELOPE__BODY_STATS);
    assert_non_null(sent);
    return sent->stats;
}

/* The first time it is out of the epoch at once and told to end; the second time it stays, for
 * somebody to look at. */
static void test_a_liar_is_taken_out(void **state) {
    struct stage stage;
    struct player player[6];
    open_troupe(&stage, player);
    accuse_of(&stage, &player[1], &player[2], player[2].incarnation, false);
    assert_int_equal(told_to_end(&stage), player[2].id);
    assert_true(stage_traced(&stage, "quarantined expert-0"));
    assert_true(stage_traced(&stage, "wrong rows of layer 1 expert 2, says attention-0"));
    const Troupe__Commit *commit = last_commit(&stage);
    assert_null(listed(commit, player[2].id));
    assert_int_equal(placed_at(commit, player[2].id), 0);
    struct order order = last_order(&stage, &player[3]);
    assert_int_equal(order.count, 8); /* the other one takes over everything */
    ready(&stage, &player[3], order.operation, true);

    player[2] = join(&stage, ROLE_EXPERT, "expert-0", 202);
    settle(&stage, player, 5);
    order = last_order(&stage, &player[2]);
    if (order.count > 0)
        ready(&stage, &player[2], order.operation, true);
    settle(&stage, player, 5);
    stage_clear(&stage);
    accuse_of(&stage, &player[1], &player[2], 202, false);
    assert_int_equal(told_to_end(&stage), 0);
    commit = last_commit(&stage);
    assert_int_equal(listed(commit, player[2].id)->state, TROUPE__ACTOR_STATE__STATE_QUARANTINED);
    assert_int_equal(placed_at(commit, player[2].id), 0);
    stage_clear(&stage);
    accuse_of(&stage, &player[1], &player[2], 202, false); /* said again */
    settle(&stage, player, 5);
    order = last_order(&stage, &player[2]);
    assert_true(order.count == 0 || order.release);

    const Troupe__Stats *stats = last_stats(&stage);
    assert_int_equal(stats->n_quarantine, 1);
    assert_string_equal(stats->quarantine[0]->name, "expert-0");
    assert_string_equal(stats->quarantine[0]->accuser, "attention-0");
    assert_int_equal(stats->quarantine[0]->times, 2);
    assert_true(stats->quarantine[0]->stays);
    stage_free(&stage);
}

/* Two that insist on different rows are both ended, whatever they have done before. */
static void test_two_insist(void **state) {
    struct stage stage;
    struct player player[6];
    open_troupe(&stage, player);
    stage.settings.quarantine_restarts = 0;
    accuse_of(&stage, &player[1], &player[2], player[2].incarnation, true);
    assert_int_equal(told_to_end(&stage), player[2].id);
    stage_clear(&stage);
    accuse_of(&stage, &player[1], &player[3], player[3].incarnation, true);
    assert_int_equal(told_to_end(&stage), player[3].id);
    assert_true(stage_traced(&stage, "insist on different rows"));
    stage_free(&stage);
}

/* Only attention actors accuse, only expert processes are accused, and only in the life that they
 * have now. */
static void test_who_may_be_accused(void **state) {
    struct stage stage;
    struct player player[6];
    open_troupe(&stage, player);
    accuse_of(&stage, &player[1], &player[2], player[2].incarnation + 1, false);
    accuse_of(&stage, &player[1], &player[4], player[4].incarnation, false);
    accuse_of(&stage, &player[3], &player[2], player[2].incarnation, false);
    accuse_of(&stage, &player[1], &(struct player){.id = 999}, 1, false);
    assert_int_equal(told_to_end(&stage), 0);
    assert_described(&stage, "members=5 ready=5 orders=0 serving=1");
    stage_free(&stage);
}

/* Audits need somebody to compare with, and where everything is audited nothing is served without.
 */
static void test_an_audit_implies_replicas(void **state) {
    for (int all = 0; all < 2; all++) {
        struct stage stage;
        struct player player[6];
        open_stage(&stage);
        stage.settings.audit_share = all ? 1 : 0.5;
        create(&stage);
        player[0] = join(&stage, ROLE_GATEWAY, "gateway-0", 100);
        player[1] = join(&stage, ROLE_ATTENTION, "attention-0", 101);
        player[2] = join(&stage, ROLE_EXPERT, "expert-0", 102);
        player[3] = join(&stage, ROLE_EXPERT, "expert-1", 103);
        struct order first = last_order(&stage, &player[2]),
                     second = last_order(&stage, &player[3]);
        assert_int_equal(first.count, 8);
        assert_int_equal(second.count, 8);
        player[4] = join(&stage, ROLE_SAMPLER, "sampler-0", 104);
        ready(&stage, &player[2], first.operation, true);
        settle(&stage, player, 5);
        assert_described(&stage, all ? "serving=0" : "serving=1");
        ready(&stage, &player[3], second.operation, true);
        settle(&stage, player, 5);
        assert_described(&stage, "serving=1");
        stage_free(&stage);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_liar_is_taken_out),
        cmocka_unit_test(test_two_insist),
        cmocka_unit_test(test_who_may_be_accused),
        cmocka_unit_test(test_an_audit_implies_replicas),
    };
    return cmocka_run_group_tests_name("quarantine", tests, NULL, NULL);
}
