/* Operations of the coordinator, asked for over its admin interface, its members played by the test: every phase, every
 * way to end early, and what is refused. */
#include "tests/support/players.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

/* open_troupe places experts 0 and 1 at expert-0 (player 2), 2 and 3 at expert-1 (player 3). */
#define MOVE "{\"layer\":1,\"expert\":0,\"from\":\"expert-0\",\"to\":\"expert-1\"}"

static void test_a_move_goes_through_its_phases(void **state) {
    struct stage stage;
    struct player player[5];
    open_troupe(&stage, player);
    post(&stage, "/move", MOVE);
    assert_phase(&stage, 1, "prepare");
    struct order order = last_order(&stage, &player[3]);
    assert_int_equal(order.count, 5); /* what it has and the new one */
    assert_int_equal(placed_at(last_commit(&stage), player[3].id), 4); /* nobody uses it before it is loaded */
    ready(&stage, &player[3], order.operation, true);
    assert_phase(&stage, 1, "commit");
    assert_phase(&stage, 1, "drain");
    const Troupe__Commit *commit = last_commit(&stage);
    assert_int_equal(placed_at(commit, player[2].id), 3);
    assert_int_equal(placed_at(commit, player[3].id), 5);
    assert_true(commit->serving);
    assert_false(last_order(&stage, &player[2]).release); /* attention has not adopted it yet */
    heartbeat(&stage, &player[1], epoch_of(&stage));
    assert_phase(&stage, 1, "release");
    struct order release = last_order(&stage, &player[2]);
    assert_true(release.release);
    assert_int_equal(release.count, 1);
    assert_int_equal(release.pair[0], 4);
    ready(&stage, &player[2], release.operation, true);
    assert_phase(&stage, 1, "done");
    stage_free(&stage);
}

static void test_a_replica_is_one_copy_more(void **state) {
    struct stage stage;
    struct player player[5];
    open_troupe(&stage, player);
    post(&stage, "/replicate", "{\"layer\":1,\"expert\":0}");
    answer_order(&stage, &player[3], true);
    const Troupe__Commit *commit = last_commit(&stage);
    assert_int_equal(commit->n_layer, 9);
    settle(&stage, player, 5);
    assert_phase(&stage, 1, "done");
    assert_says(request(&stage, "POST", "/replicate", "{\"layer\":1,\"expert\":0}", 409),
                "no other expert process has room");
    stage_free(&stage);
}

/* Each goes at its own pace: the second is done while the first still loads. */
static void test_operations_do_not_wait_for_each_other(void **state) {
    struct stage stage;
    struct player player[5];
    open_troupe(&stage, player);
    post(&stage, "/move", MOVE); /* to expert-1 */
    post(&stage, "/move", "{\"layer\":1,\"expert\":2,\"from\":\"expert-1\",\"to\":\"expert-0\"}");
    assert_phase(&stage, 1, "prepare");
    assert_phase(&stage, 2, "prepare");
    for (int round = 0; round < 4; round++) { /* expert-0 does what it is told, expert-1 loads for long */
        struct order order = last_order(&stage, &player[2]);
        ready(&stage, &player[2], order.operation, true);
        order = last_order(&stage, &player[3]);
        if (order.release)
            ready(&stage, &player[3], order.operation, true);
        settle(&stage, player, 5);
    }
    assert_phase(&stage, 1, "prepare");
    assert_int_equal(placed_at(last_commit(&stage), player[2].id), 5);
    go_on(&stage, player, 5);
    go_on(&stage, player, 5);
    assert_phase(&stage, 1, "done");
    assert_phase(&stage, 2, "done");
    stage_free(&stage);
}

static void test_progress_is_told(void **state) {
    struct stage stage;
    struct player player[5];
    char text[96];
    open_troupe(&stage, player);
    uint32_t bytes = 3 * stage.config.hidden * stage.config.expert_width * 4 + 1;
    post(&stage, "/move", MOVE);
    snprintf(text, sizeof text, "\"bytes\":%u,\"bytes_done\":0", bytes);
    assert_says(request(&stage, "GET", "/operations", NULL, 200), text);
    Troupe__Heartbeat body = TROUPE__HEARTBEAT__INIT;
    body.epoch = epoch_of(&stage);
    body.coordinator_incarnation = stage.identity.incarnation;
    body.order = last_order(&stage, &player[3]).operation;
    body.load_bytes = 1000;
    body.load_bytes_done = 400;
    message envelope = envelope_of(&player[3]);
    envelope.body_case = TROUPE__ENVELOPE__BODY_HEARTBEAT;
    envelope.heartbeat = &body;
    stage_message(&stage, &envelope);
    snprintf(text, sizeof text, "\"bytes_done\":%u", (uint32_t)(bytes * 0.4));
    assert_says(request(&stage, "GET", "/operations", NULL, 200), text);
    go_on(&stage, player, 5);
    snprintf(text, sizeof text, "\"bytes_done\":%u", bytes);
    assert_says(request(&stage, "GET", "/operations", NULL, 200), text);
    stage_free(&stage);
}

static void test_a_failed_load_leaves_everything_as_it_was(void **state) {
    struct stage stage;
    struct player player[5];
    open_troupe(&stage, player);
    post(&stage, "/move", MOVE);
    answer_order(&stage, &player[3], false);
    assert_phase(&stage, 1, "aborted");
    assert_says(request(&stage, "GET", "/operations", NULL, 200), "expert-1 could not load it: no memory");
    settle(&stage, player, 5);
    assert_int_equal(placed_at(last_commit(&stage), player[2].id), 4);
    assert_int_equal(placed_at(last_commit(&stage), player[3].id), 4);
    post(&stage, "/move", MOVE); /* it may be tried again */
    assert_phase(&stage, 2, "prepare");
    stage_free(&stage);
}

/* Wherever a move is cancelled, in the end everything is where it was and nothing else is held. */
static void test_cancelling_in_each_phase(void **state) {
    static const char *const phases[] = {"prepare", "commit", "drain", "release"};
    for (int phase = 0; phase < 4; phase++) {
        struct stage stage;
        struct player player[5];
        open_troupe(&stage, player);
        post(&stage, "/move", MOVE);
        if (phase >= 1)
            answer_order(&stage, &player[3], true);
        if (phase == 2)
            heartbeat(&stage, &player[0], epoch_of(&stage)); /* time goes on */
        if (phase == 3)
            heartbeat(&stage, &player[1], epoch_of(&stage));
        assert_phase(&stage, 1, phases[phase]);
        post(&stage, "/cancel", "{\"operation\":1}");
        assert_phase(&stage, 1, "aborted");
        for (int round = 0; round < 6; round++) {
            settle(&stage, player, 5);
            for (int i = 2; i <= 3; i++) {
                struct order order = last_order(&stage, &player[i]);
                if (order.operation != 0)
                    ready(&stage, &player[i], order.operation, true);
            }
        }
        assert_described(&stage, "orders=0 serving=1");
        stage_clear(&stage);
        struct player client = join(&stage, ROLE_CONTROL, "ctl", 900); /* makes an epoch to look at */
        const Troupe__Commit *commit = last_commit(&stage);
        assert_int_equal(placed_at(commit, player[2].id), 4);
        assert_int_equal(placed_at(commit, player[3].id), 4);
        assert_says(request(&stage, "POST", "/cancel", "{\"operation\":1}", 409), "has ended already");
        (void)client;
        stage_free(&stage);
    }
}

static void test_conflicts_and_nonsense_are_refused(void **state) {
    static const struct {
        const char *path, *body;
        uint16_t status;
        const char *why;
    } cases[] = {
        {"/move", MOVE, 409, "operation 1 is at work on expert 0 of layer 1"},
        {"/replicate", "{\"layer\":1,\"expert\":0}", 409, "operation 1 is at work"},
        {"/move", "{\"layer\":0,\"expert\":0,\"from\":\"expert-0\",\"to\":\"expert-1\"}", 404, "no expert 0 in layer 0"},
        {"/move", "{\"layer\":1,\"expert\":4,\"from\":\"expert-0\",\"to\":\"expert-1\"}", 404, "no expert 4 in layer 1"},
        {"/move", "{\"layer\":2,\"expert\":3,\"from\":\"expert-0\",\"to\":\"expert-1\"}", 404, "expert-1 does"},
        {"/move", "{\"layer\":2,\"expert\":3,\"from\":\"expert-1\",\"to\":\"sampler-0\"}", 404, "is no expert process"},
        {"/move", "{\"layer\":\"x\"}", 400, "layer: a whole number expected"},
        {"/move", "[1,", 400, "a JSON object expected"},
        {"/drain", "{\"actor\":\"attention-0\"}", 409, "no ready attention process would be left"},
        {"/drain", "{\"actor\":\"gateway-0\"}", 400, "can be drained"},
        {"/drain", "{}", 400, "name or number expected"},
        {"/scale", "{\"role\":\"experts\",\"count\":0}", 400, "1 to 512 processes expected, found 0"},
        {"/scale", "{\"role\":\"experts\",\"count\":3}", 400, "no supervisor"},
        {"/cancel", "{\"operation\":9}", 404, "no operation 9"},
        {"/nothing", "{}", 404, "there is no /nothing here"},
    };
    struct stage stage;
    struct player player[5];
    open_troupe(&stage, player);
    post(&stage, "/move", MOVE);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        assert_says(request(&stage, "POST", cases[i].path, cases[i].body, cases[i].status), cases[i].why);
    request(&stage, "GET", "/move", NULL, 405);
    coordinator_set_admin_token(stage.actor, "secret");
    request(&stage, "GET", "/status", NULL, 401);
    stage_free(&stage);
}

static void test_capacity_is_honoured_with_the_arithmetic(void **state) {
    struct stage stage;
    struct player player[5];
    open_stage(&stage);
    create(&stage);
    uint64_t bytes = 3 * (uint64_t)stage.config.hidden * stage.config.expert_width * 4 + 1;
    player[0] = (struct player){.role = ROLE_EXPERT, .incarnation = 100, .name = "expert-0"};
    player[1] = (struct player){.role = ROLE_EXPERT, .incarnation = 101, .name = "expert-1"};
    say_hello(&stage, &player[0], "fingerprint", "f32", 5 * bytes);
    say_hello(&stage, &player[1], "fingerprint", "f32", 5 * bytes);
    assert_says(request(&stage, "POST", "/drain", "{\"actor\":\"expert-1\"}", 409),
                "the 1 expert processes that would be left have room for 5 experts");
    assert_says(request(&stage, "POST", "/scale", "{\"role\":\"experts\",\"count\":1}", 409), "the model has 8");
    stage_free(&stage);
}

/* ---- processes ---- */

static void beat(struct stage *stage, const struct player *player, uint64_t epoch, uint32_t running) {
    Troupe__Heartbeat body = TROUPE__HEARTBEAT__INIT;
    body.epoch = epoch;
    body.coordinator_incarnation = stage->identity.incarnation;
    body.sequences_running = running;
    message envelope = envelope_of(player);
    envelope.body_case = TROUPE__ENVELOPE__BODY_HEARTBEAT;
    envelope.heartbeat = &body;
    stage_message(stage, &envelope);
}

static void linger(struct stage *stage) {
    stage_timer(stage, stage->now_ns + (uint64_t)stage->settings.drain_linger_ms * MS);
}

static void test_a_drained_expert_gives_everything_away_and_ends(void **state) {
    struct stage stage;
    struct player player[5];
    open_troupe(&stage, player);
    post(&stage, "/drain", "{\"actor\":\"expert-0\"}");
    const Troupe__Commit *commit = last_commit(&stage);
    assert_int_equal(listed(commit, player[2].id)->state, TROUPE__ACTOR_STATE__STATE_DRAINING);
    assert_int_equal(placed_at(commit, player[2].id), 4); /* until others have them */
    assert_true(commit->serving);
    assert_says(request(&stage, "POST", "/drain", "{\"actor\":\"expert-0\"}", 409), "being drained already");
    assert_says(request(&stage, "POST", "/drain", "{\"actor\":\"expert-1\"}", 409), "nobody would be left");
    answer_order(&stage, &player[3], true);
    assert_int_equal(placed_at(last_commit(&stage), player[3].id), 8);
    settle(&stage, player, 5);
    linger(&stage);
    assert_null(stage_sent(&stage, TROUPE__ENVELOPE__BODY_SHUTDOWN)); /* it still holds the old copies */
    answer_order(&stage, &player[2], true);
    settle(&stage, player, 5);
    linger(&stage);
    assert_phase(&stage, 1, "release");
    stage.next[EFFECT_SEND] = 0;
    assert_non_null(stage_sent(&stage, TROUPE__ENVELOPE__BODY_SHUTDOWN));
    assert_says(request(&stage, "POST", "/cancel", "{\"operation\":1}", 409), "its processes are ending");
    struct event event = {.kind = EVENT_PEER_LOST};
    event.peer.id = player[2].id;
    event.peer.incarnation = player[2].incarnation;
    stage_step(&stage, &event);
    assert_phase(&stage, 1, "done");
    assert_described(&stage, "members=4");
    stage_free(&stage);
}

static void test_a_cancelled_drain_gives_the_share_back(void **state) {
    struct stage stage;
    struct player player[5];
    open_troupe(&stage, player);
    post(&stage, "/drain", "{\"actor\":\"expert-0\"}");
    answer_order(&stage, &player[3], true);
    post(&stage, "/cancel", "{\"operation\":1}");
    for (int round = 0; round < 6; round++) {
        settle(&stage, player, 5);
        for (int i = 2; i <= 3; i++) {
            struct order order = last_order(&stage, &player[i]);
            if (order.operation != 0)
                ready(&stage, &player[i], order.operation, true);
        }
    }
    const Troupe__Commit *commit = last_commit(&stage);
    assert_int_equal(listed(commit, player[2].id)->state, TROUPE__ACTOR_STATE__STATE_READY);
    assert_int_equal(placed_at(commit, player[2].id), 4);
    stage_free(&stage);
}

static void test_a_drained_attention_actor_ends_when_it_is_empty(void **state) {
    struct stage stage;
    struct player player[6];
    open_troupe(&stage, player);
    player[5] = join(&stage, ROLE_ATTENTION, "attention-1", 105);
    settle(&stage, player, 6);
    post(&stage, "/drain", "{\"actor\":\"attention-0\"}");
    for (int i = 0; i < 6; i++)
        beat(&stage, &player[i], epoch_of(&stage), i == 1 ? 3 : 0);
    linger(&stage);
    linger(&stage);
    assert_phase(&stage, 1, "drain"); /* it still has three sequences */
    beat(&stage, &player[1], epoch_of(&stage), 0);
    stage_clear(&stage);
    linger(&stage);
    const struct effect *send = stage_take(&stage, EFFECT_SEND);
    while (send != NULL && send->send.to != player[1].id)
        send = stage_take(&stage, EFFECT_SEND);
    assert_non_null(send);
    stage.next[EFFECT_SEND] = 0;
    assert_non_null(stage_sent(&stage, TROUPE__ENVELOPE__BODY_SHUTDOWN));
    stage_free(&stage);
}

/* It was told to end and has not heard it; a gateway that joins then may use it, so it lingers once more. The coordinator must not look at
 * a time that is over for that long: it would do nothing else. */
static void test_told_in_vain_it_lingers_again_without_haste(void **state) {
    struct stage stage;
    struct player player[7];
    open_troupe(&stage, player);
    player[5] = join(&stage, ROLE_ATTENTION, "attention-1", 105);
    settle(&stage, player, 6);
    post(&stage, "/drain", "{\"actor\":\"attention-0\"}");
    for (int i = 0; i < 6; i++)
        beat(&stage, &player[i], epoch_of(&stage), 0);
    linger(&stage);
    assert_phase(&stage, 1, "release");
    player[6] = join(&stage, ROLE_GATEWAY, "gateway-1", 106);
    stage_timer(&stage, stage.now_ns + 1000 * MS); /* the newcomer has adopted nothing yet */
    for (int i = 0; i < 7; i++)
        beat(&stage, &player[i], epoch_of(&stage), 0);
    uint64_t woken_ns = actor_deadline(stage.actor);
    assert_true(woken_ns > stage.now_ns);
    stage_clear(&stage);
    linger(&stage);
    stage.next[EFFECT_SEND] = 0;
    assert_non_null(stage_sent(&stage, TROUPE__ENVELOPE__BODY_SHUTDOWN));
    stage_free(&stage);
}

static void open_with_three_experts(struct stage *stage, struct player *player) {
    open_troupe(stage, player);
    player[5] = join(stage, ROLE_EXPERT, "expert-2", 105);
    go_on(stage, player, 6);
    stage_clear(stage);
}

/* Whoever is to take a copy is drained: another one takes it, and the operation does not wait for what never comes. */
static void test_draining_the_taker_of_a_copy(void **state) {
    struct stage stage;
    struct player player[6];
    open_with_three_experts(&stage, player);
    post(&stage, "/replicate", "{\"layer\":1,\"expert\":0,\"to\":\"expert-1\"}");
    post(&stage, "/drain", "{\"actor\":\"expert-1\"}");
    assert_phase(&stage, 1, "aborted");
    assert_says(request(&stage, "GET", "/operations", NULL, 200), "superseded");
    stage_free(&stage);
}

/* Of two copies one moves; whom it comes from ends, and whom it goes to cannot load it. The other copy is what placement looks after then,
 * not the process that holds none. */
static void test_a_move_between_two_that_fail_leaves_the_third(void **state) {
    struct stage stage;
    struct player player[6];
    open_with_three_experts(&stage, player);
    post(&stage, "/replicate", "{\"layer\":1,\"expert\":0,\"to\":\"expert-1\"}");
    go_on(&stage, player, 6);
    assert_phase(&stage, 1, "done");
    stage_clear(&stage);
    post(&stage, "/move", "{\"layer\":1,\"expert\":0,\"from\":\"expert-0\",\"to\":\"expert-2\"}");
    struct event event = {.kind = EVENT_PEER_LOST};
    event.peer.id = player[2].id;
    event.peer.incarnation = player[2].incarnation;
    stage_step(&stage, &event);
    answer_order(&stage, &player[5], false);
    assert_phase(&stage, 2, "aborted");
    assert_null(strstr(described(&stage), "broken"));
    stage_free(&stage);
}

static void scaled(struct stage *stage, const struct player *supervisor, uint64_t operation, const char *name) {
    Troupe__Scaled body = TROUPE__SCALED__INIT;
    Troupe__Process process = TROUPE__PROCESS__INIT, *list[] = {&process};
    process.name = (char *)name;
    body.operation = operation;
    body.n_started = 1;
    body.started = list;
    message envelope = envelope_of(supervisor);
    envelope.body_case = TROUPE__ENVELOPE__BODY_SCALED;
    envelope.scaled = &body;
    stage_message(stage, &envelope);
}

static void test_scaling_up_waits_until_the_new_process_serves(void **state) {
    struct stage stage;
    struct player player[7];
    open_troupe(&stage, player);
    player[5] = join(&stage, ROLE_CONTROL, "supervisor", 300);
    settle(&stage, player, 6);
    stage_clear(&stage);
    request(&stage, "POST", "/scale_elastic_ep", "{\"new_data_parallel_size\":3,\"drain_timeout\":60}", 200);
    assert_says(request(&stage, "POST", "/is_scaling_elastic_ep", NULL, 200), "\"is_scaling_elastic_ep\":true");
    assert_says(request(&stage, "POST", "/scale_elastic_ep", "{\"new_ep_size\":4}", 409), "is scaling expert to 3");
    const message *scale = stage_sent(&stage, TROUPE__ENVELOPE__BODY_SCALE);
    assert_non_null(scale);
    assert_int_equal(scale->scale->start, 1);
    stage_clear(&stage); /* said again until it is answered */
    stage_timer(&stage, stage.now_ns + 2 * (uint64_t)stage.settings.hello_retry_ms * MS);
    assert_non_null(stage_sent(&stage, TROUPE__ENVELOPE__BODY_SCALE));
    scaled(&stage, &player[5], 1, "expert-2");
    player[6] = join(&stage, ROLE_EXPERT, "expert-2", 106);
    struct order order = last_order(&stage, &player[6]);
    settle(&stage, player, 7);
    assert_phase(&stage, 1, "prepare"); /* it is here, but serves nothing yet */
    ready(&stage, &player[6], order.operation, true);
    assert_phase(&stage, 1, "done");
    assert_says(request(&stage, "GET", "/is_scaling_elastic_ep", NULL, 200), "false,\"ep_size\":3");
    stage_free(&stage);
}

static void test_a_process_that_never_becomes_ready_ends_the_scaling(void **state) {
    struct stage stage;
    struct player player[7];
    open_troupe(&stage, player);
    player[5] = join(&stage, ROLE_CONTROL, "supervisor", 300);
    settle(&stage, player, 6);
    request(&stage, "POST", "/scale", "{\"role\":\"samplers\",\"count\":2}", 202);
    scaled(&stage, &player[5], 1, "sampler-1");
    uint64_t end_ns = stage.now_ns + (uint64_t)stage.settings.operation_timeout_ms * MS;
    while (stage.now_ns < end_ns) {
        stage_timer(&stage, stage.now_ns + 200 * (uint64_t)MS);
        for (int i = 0; i < 6; i++)
            heartbeat(&stage, &player[i], epoch_of(&stage));
    }
    assert_phase(&stage, 1, "aborted");
    assert_says(request(&stage, "GET", "/operations", NULL, 200), "0 of 1 new processes are ready");
    player[6] = join(&stage, ROLE_SAMPLER, "sampler-1", 106); /* too late: it is sent away again */
    assert_int_equal(listed(last_commit(&stage), player[6].id)->state, TROUPE__ACTOR_STATE__STATE_DRAINING);
    stage_free(&stage);
}

static void test_a_cancelled_scaling_up_sends_away_what_it_started(void **state) {
    struct stage stage;
    struct player player[7];
    open_troupe(&stage, player);
    player[5] = join(&stage, ROLE_CONTROL, "supervisor", 300);
    settle(&stage, player, 6);
    post(&stage, "/scale", "{\"role\":\"experts\",\"count\":4}");
    Troupe__Scaled body = TROUPE__SCALED__INIT;
    Troupe__Process process[2] = {TROUPE__PROCESS__INIT, TROUPE__PROCESS__INIT}, *list[] = {&process[0], &process[1]};
    process[0].name = "expert-2";
    process[1].name = "expert-3";
    body.operation = 1;
    body.n_started = 2;
    body.started = list;
    message envelope = envelope_of(&player[5]);
    envelope.body_case = TROUPE__ENVELOPE__BODY_SCALED;
    envelope.scaled = &body;
    stage_message(&stage, &envelope);
    player[6] = join(&stage, ROLE_EXPERT, "expert-2", 106);
    settle(&stage, player, 7);
    post(&stage, "/cancel", "{\"operation\":1}");
    assert_phase(&stage, 1, "aborted");
    assert_int_equal(listed(last_commit(&stage), player[6].id)->state, TROUPE__ACTOR_STATE__STATE_DRAINING);
    struct player late = join(&stage, ROLE_EXPERT, "expert-3", 107); /* it comes after that */
    assert_int_equal(listed(last_commit(&stage), late.id)->state, TROUPE__ACTOR_STATE__STATE_DRAINING);
    assert_int_equal(placed_at(last_commit(&stage), late.id), 0);
    stage_free(&stage);
}

/* It joins and says no more: others go on as soon as it counts as lost. */
static void test_a_process_that_joins_and_falls_silent_holds_nothing_up_for_long(void **state) {
    struct stage stage;
    struct player player[5];
    open_troupe(&stage, player);
    join(&stage, ROLE_ATTENTION, "attention-1", 105);
    post(&stage, "/move", MOVE);
    answer_order(&stage, &player[3], true);
    settle(&stage, player, 5);
    assert_phase(&stage, 1, "drain"); /* it might use the old copy */
    uint64_t lost_ns = (uint64_t)stage.settings.heartbeat_ms * stage.settings.heartbeat_misses * MS;
    for (uint64_t end_ns = stage.now_ns + lost_ns + 500 * (uint64_t)MS; stage.now_ns < end_ns;) {
        stage_timer(&stage, stage.now_ns + 100 * (uint64_t)MS);
        settle(&stage, player, 5);
    }
    go_on(&stage, player, 5);
    assert_phase(&stage, 1, "done");
    stage_free(&stage);
}

/* ---- rebalancing ---- */

/* Experts 0 and 1 of layer 1, both hot, are at the same process. */
static void test_rebalancing_parts_hot_experts(void **state) {
    struct stage stage;
    struct player player[5];
    open_troupe(&stage, player);
    assert_says(request(&stage, "POST", "/rebalance", "{}", 200), "\"proposed\":false");
    route(&stage, &player[1], 1, 0, 50000000);
    route(&stage, &player[1], 1, 1, 50000000);
    uint64_t epoch = epoch_of(&stage);
    assert_says(request(&stage, "POST", "/rebalance", "{\"dry_run\":true}", 200), "\"proposed\":true");
    assert_says(request(&stage, "GET", "/operations", NULL, 200), "\"operations\":[]");
    post(&stage, "/rebalance", "{}");
    assert_says(request(&stage, "POST", "/rebalance", "{}", 200), "\"proposed\":false"); /* on its way */
    for (int round = 0; round < 4; round++) {
        for (int i = 2; i <= 3; i++) {
            struct order order = last_order(&stage, &player[i]);
            if (order.operation != 0)
                ready(&stage, &player[i], order.operation, true);
        }
        settle(&stage, player, 5);
    }
    assert_phase(&stage, 1, "done");
    assert_true(epoch_of(&stage) > epoch);
    const Troupe__Commit *commit = last_commit(&stage);
    actor_id holder[2] = {0};
    for (size_t i = 0; i < commit->n_layer; i++)
        if (commit->layer[i] == 1 && commit->expert[i] < 2)
            holder[commit->expert[i]] = commit->holder[i];
    assert_true(holder[0] != 0 && holder[1] != 0 && holder[0] != holder[1]);
    assert_int_equal(commit->n_layer, 8);
    stage_free(&stage);
}

/* Wherever it is cancelled, everything is where it was. */
static void test_cancelling_a_rebalance(void **state) {
    for (int loaded = 0; loaded < 2; loaded++) {
        struct stage stage;
        struct player player[5];
        open_troupe(&stage, player);
        route(&stage, &player[1], 1, 0, 50000000);
        route(&stage, &player[1], 1, 1, 50000000);
        post(&stage, "/rebalance", "{}");
        for (int i = 2; i <= 3 && loaded; i++)
            if (last_order(&stage, &player[i]).operation != 0)
                answer_order(&stage, &player[i], true);
        assert_phase(&stage, 1, loaded ? "commit" : "prepare");
        post(&stage, "/cancel", "{\"operation\":1}");
        go_on(&stage, player, 5);
        assert_phase(&stage, 1, "aborted");
        assert_described(&stage, "orders=0 serving=1");
        const Troupe__Commit *commit = last_commit(&stage);
        assert_int_equal(commit->n_layer, 8);
        assert_int_equal(placed_at(commit, player[2].id), 4);
        for (size_t i = 0; i < commit->n_layer; i++)
            assert_true(commit->holder[i] == player[commit->expert[i] < 2 ? 2 : 3].id);
        stage_free(&stage);
    }
}

/* ---- recording ---- */

/* Queues and quantiles of each expert process, by what attention actors say. */
static void test_how_long_answers_take_is_told(void **state) {
    struct stage stage;
    struct player player[6];
    open_troupe(&stage, player);
    player[5] = join(&stage, ROLE_ATTENTION, "attention-1", 105);
    for (uint32_t i = 0; i < 2; i++) {
        Troupe__Heartbeat body = TROUPE__HEARTBEAT__INIT;
        uint32_t peer[2] = {player[2].id, 77}, queue[2] = {3 + i, 9}, p50[2] = {900 - i, 1}, p99[2] = {2000 + i, 1};
        body.epoch = epoch_of(&stage);
        body.coordinator_incarnation = stage.identity.incarnation;
        body.n_peer = body.n_peer_queue = body.n_peer_p50_us = body.n_peer_p99_us = 2;
        body.peer = peer;
        body.peer_queue = queue;
        body.peer_p50_us = p50;
        body.peer_p99_us = p99;
        message envelope = envelope_of(&player[i == 0 ? 1 : 5]);
        envelope.body_case = TROUPE__ENVELOPE__BODY_HEARTBEAT;
        envelope.heartbeat = &body;
        stage_message(&stage, &envelope);
        stage_message(&stage, &envelope); /* the newest counts, not the sum of all */
    }
    const char *text = request(&stage, "GET", "/actors", NULL, 200);
    assert_says(text, "\"queue\":7,\"answer_p50_us\":900,\"answer_p99_us\":2001");
    assert_says(text, "\"queue\":0,\"answer_p50_us\":0,\"answer_p99_us\":0"); /* expert-1 */
    stage_free(&stage);
}

static void test_loads_are_recorded_in_windows(void **state) {
    struct stage stage;
    struct player player[5];
    open_troupe(&stage, player);
    assert_says(request(&stage, "POST", "/dump_expert_distribution_record", NULL, 409), "nothing has been recorded");
    request(&stage, "POST", "/start_expert_distribution_record", "{\"window_ms\":1}", 400);
    request(&stage, "POST", "/start_expert_distribution_record", "{\"window_ms\":100}", 200);
    Troupe__Heartbeat body = TROUPE__HEARTBEAT__INIT;
    uint32_t layer[] = {2}, expert[] = {3};
    uint64_t rows[] = {7};
    body.epoch = epoch_of(&stage);
    body.coordinator_incarnation = stage.identity.incarnation;
    body.n_load_layer = body.n_load_expert = body.n_load_rows = 1;
    body.load_layer = layer;
    body.load_expert = expert;
    body.load_rows = rows;
    message envelope = envelope_of(&player[1]);
    envelope.body_case = TROUPE__ENVELOPE__BODY_HEARTBEAT;
    envelope.heartbeat = &body;
    stage_message(&stage, &envelope);
    stage_timer(&stage, stage.now_ns + 250 * (uint64_t)MS);
    assert_says(request(&stage, "POST", "/stop_expert_distribution_record", NULL, 200), "\"windows\":2");
    stage_clear(&stage);
    struct http_request http = {.client = 1, .method = "GET", .path = "/dump_expert_distribution_record", .query = ""};
    stage_step(&stage, &(struct event){.kind = EVENT_HTTP_REQUEST, .http = &http});
    const struct effect *effect = stage_take(&stage, EFFECT_STREAM);
    uint64_t header_bytes;
    memcpy(&header_bytes, effect->stream.bytes, 8);
    assert_int_equal(effect->stream.size, 8 + header_bytes + 2 * 2 * 4 * 4);
    assert_non_null(memmem(effect->stream.bytes + 8, header_bytes, "\"shape\":[2,2,4]", 15));
    int32_t load[16];
    memcpy(load, effect->stream.bytes + 8 + header_bytes, sizeof load);
    for (int i = 0; i < 16; i++)
        assert_int_equal(load[i], i == 7 ? 7 : 0); /* window 0, the second MoE layer, expert 3 */
    stage_free(&stage);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_move_goes_through_its_phases),
        cmocka_unit_test(test_a_replica_is_one_copy_more),
        cmocka_unit_test(test_operations_do_not_wait_for_each_other),
        cmocka_unit_test(test_progress_is_told),
        cmocka_unit_test(test_a_failed_load_leaves_everything_as_it_was),
        cmocka_unit_test(test_cancelling_in_each_phase),
        cmocka_unit_test(test_conflicts_and_nonsense_are_refused),
        cmocka_unit_test(test_capacity_is_honoured_with_the_arithmetic),
        cmocka_unit_test(test_a_drained_expert_gives_everything_away_and_ends),
        cmocka_unit_test(test_a_cancelled_drain_gives_the_share_back),
        cmocka_unit_test(test_a_drained_attention_actor_ends_when_it_is_empty),
        cmocka_unit_test(test_told_in_vain_it_lingers_again_without_haste),
        cmocka_unit_test(test_draining_the_taker_of_a_copy),
        cmocka_unit_test(test_a_move_between_two_that_fail_leaves_the_third),
        cmocka_unit_test(test_scaling_up_waits_until_the_new_process_serves),
        cmocka_unit_test(test_a_process_that_never_becomes_ready_ends_the_scaling),
        cmocka_unit_test(test_a_cancelled_scaling_up_sends_away_what_it_started),
        cmocka_unit_test(test_a_process_that_joins_and_falls_silent_holds_nothing_up_for_long),
        cmocka_unit_test(test_rebalancing_parts_hot_experts),
        cmocka_unit_test(test_cancelling_a_rebalance),
        cmocka_unit_test(test_how_long_answers_take_is_told),
        cmocka_unit_test(test_loads_are_recorded_in_windows),
    };
    return cmocka_run_group_tests_name("operations", tests, NULL, NULL);
}
