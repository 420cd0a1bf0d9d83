/* The coordinator by hand, its members played by the test; and the even placement of experts. */
#include "coordinator/placement.h"
#include "tests/support/players.h"
#include "tests/support/random.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

/* ---- placement ---- */

#define LAYERS_TESTED  7
#define EXPERTS_TESTED 16
#define PAIRS_TESTED   (LAYERS_TESTED * EXPERTS_TESTED)

struct even {
    uint8_t is_moe[LAYERS_TESTED];
    uint32_t holders, capacity[40], current[PAIRS_TESTED], ret[PAIRS_TESTED], scratch[4 * 40];
};

static uint32_t place(struct even *even) {
    return placement_even(LAYERS_TESTED, even->is_moe, EXPERTS_TESTED, even->holders,
                          even->capacity, NULL, NULL, even->current, even->ret, even->scratch);
}

static void start_even(struct even *even, uint32_t holders) {
    memset(even, 0, sizeof *even);
    even->holders = holders;
    for (uint32_t l = 1; l < LAYERS_TESTED; l++)
        even->is_moe[l] = 1;
    for (uint32_t h = 0; h < holders; h++)
        even->capacity[h] = PAIRS_TESTED;
    for (uint32_t i = 0; i < PAIRS_TESTED; i++)
        even->current[i] = NOBODY;
}

static uint32_t moves(const struct even *even) {
    uint32_t count = 0;
    for (uint32_t i = 0; i < PAIRS_TESTED; i++)
        count += even->current[i] != NOBODY && even->ret[i] != even->current[i];
    return count;
}

static void assert_even(const struct even *even) {
    uint32_t total[40] = {0};
    for (uint32_t l = 0; l < LAYERS_TESTED; l++) {
        uint32_t held[40] = {0};
        for (uint32_t e = 0; e < EXPERTS_TESTED; e++) {
            uint32_t holder = even->ret[l * EXPERTS_TESTED + e];
            if (!even->is_moe[l]) {
                assert_int_equal(holder, NOBODY);
                continue;
            }
            assert_true(holder < even->holders);
            held[holder]++;
            total[holder]++;
        }
        uint32_t base = EXPERTS_TESTED / even->holders;
        for (uint32_t h = 0; even->is_moe[l] && h < even->holders; h++)
            assert_in_range(held[h], base, base + (EXPERTS_TESTED % even->holders != 0));
    }
    uint32_t pairs = (LAYERS_TESTED - 1) * EXPERTS_TESTED, base = pairs / even->holders;
    for (uint32_t h = 0; h < even->holders; h++)
        assert_in_range(total[h], base, base + 1);
}

static void test_placement_is_even_for_any_number_of_processes(void **state) {
    for (uint32_t holders = 1; holders <= 40; holders++) {
        struct even even;
        start_even(&even, holders);
        assert_int_equal(place(&even), 0);
        assert_even(&even);
        uint32_t first = even.ret[EXPERTS_TESTED]; /* layer 1: contiguous runs */
        for (uint32_t e = 1; e < EXPERTS_TESTED; e++) {
            assert_true(even.ret[EXPERTS_TESTED + e] >= first);
            first = even.ret[EXPERTS_TESTED + e];
        }
        memcpy(even.current, even.ret, sizeof even.ret);
        assert_int_equal(place(&even), 0);
        assert_int_equal(moves(&even), 0); /* nothing to do, nothing done */
    }
}

static void test_a_lost_holder_moves_only_its_experts(void **state) {
    struct even even;
    start_even(&even, 4);
    place(&even);
    memcpy(even.current, even.ret, sizeof even.ret);
    for (uint32_t i = 0; i < PAIRS_TESTED; i++)
        if (even.current[i] == 3)
            even.current[i] = NOBODY;
    even.holders = 3;
    assert_int_equal(place(&even), 0);
    assert_even(&even);
    assert_int_equal(moves(&even), 0);
}

static void test_a_new_holder_takes_its_share_and_no_more(void **state) {
    struct even even;
    start_even(&even, 3);
    place(&even);
    memcpy(even.current, even.ret, sizeof even.ret);
    even.holders = 4;
    even.capacity[3] = PAIRS_TESTED;
    assert_int_equal(place(&even), 0);
    assert_even(&even);
    assert_int_equal(moves(&even), (LAYERS_TESTED - 1) * EXPERTS_TESTED / 4);
}

static void test_capacities_are_kept(void **state) {
    struct even even;
    start_even(&even, 3);
    even.capacity[0] = 5;
    even.capacity[1] = 40;
    assert_int_equal(place(&even), 0);
    uint32_t total[3] = {0};
    for (uint32_t i = EXPERTS_TESTED; i < PAIRS_TESTED; i++)
        total[even.ret[i]]++;
    assert_int_equal(total[0], 5);
    assert_true(total[1] <= 40);
    even.capacity[2] = 20;
    assert_int_equal(place(&even), 96 - 65); /* so many have no place */
    even.holders = 0;
    assert_int_equal(place(&even), 96);
}

/* What a full process holds in later layers takes room too: it is given nothing in earlier ones. */
static void test_a_full_process_keeps_what_it_has(void **state) {
    struct even even;
    start_even(&even, 1);
    even.capacity[0] = 20;
    for (uint32_t i = PAIRS_TESTED - 20; i < PAIRS_TESTED; i++)
        even.current[i] = 0;
    assert_int_equal(place(&even), 96 - 20);
    for (uint32_t i = 0; i < PAIRS_TESTED; i++)
        assert_true(even.ret[i] == even.current[i]);
    even.holders = 2; /* somebody with room takes the rest */
    even.capacity[1] = 76;
    assert_int_equal(place(&even), 0);
    assert_int_equal(moves(&even), 0);
}

/* ---- joining ---- */

static void test_hello_is_answered_once_and_for_all(void **state) {
    struct stage stage;
    open_stage(&stage);
    create(&stage);
    struct player player = join(&stage, ROLE_SAMPLER, "sampler-0", 100);
    assert_int_equal(player.id, 2);
    const struct effect *connect = stage_take(&stage, EFFECT_CONNECT);
    assert_int_equal(connect->connect.id, 2);
    assert_string_equal(connect->connect.control_address, "test://player");
    struct player again = join(&stage, ROLE_SAMPLER, "sampler-0", 100);
    assert_int_equal(again.id, 2); /* said again: the same answer, no new member */
    assert_described(&stage, "epoch=1 members=1");
    assert_int_equal(join(&stage, ROLE_SAMPLER, "sampler-1", 101).id, 3);
    stage_free(&stage);
}

static void assert_refused(struct stage *stage, const struct player *player,
                           const char *fingerprint, const char *numerics, const char *why) {
    stage_clear(stage);
    say_hello(stage, player, fingerprint, numerics, 0);
    const message *refused = stage_sent(stage, TROUPE__ENVELOPE__BODY_REFUSED);
    assert_non_null(refused);
    assert_true(refused->refused->incarnation == player->incarnation);
    if (strstr(refused->refused->reason, why) == NULL)
        fail_msg("\"%s\" is not in \"%s\"", why, refused->refused->reason);
    assert_int_equal(stage_count(stage, EFFECT_CONNECT), 1);
    assert_int_equal(stage_count(stage, EFFECT_DISCONNECT), 1);
}

static void test_who_does_not_fit_is_refused(void **state) {
    struct stage stage;
    open_stage(&stage);
    create(&stage);
    struct player player = {.role = ROLE_EXPERT, .incarnation = 9, .name = "expert-0"};
    assert_refused(&stage, &player, "another", "f32", "fingerprint fingerprint, found another");
    assert_refused(&stage, &player, "fingerprint", "bf16", "computes in f32, found bf16");
    player.role = ROLE_COORDINATOR;
    assert_refused(&stage, &player, "fingerprint", "f32", "role 1");
    assert_described(&stage, "members=0");
    player.role = ROLE_CONTROL; /* a control client need not know the model */
    stage_clear(&stage);
    say_hello(&stage, &player, "", "", 0);
    assert_non_null(stage_sent(&stage, TROUPE__ENVELOPE__BODY_WELCOME));
    stage_free(&stage);
}

static void test_experts_are_placed_when_all_are_here(void **state) {
    struct stage stage;
    open_stage(&stage);
    create(&stage);
    struct player first = join(&stage, ROLE_EXPERT, "expert-0", 100);
    assert_int_equal(last_order(&stage, &first).operation, 0);
    struct player second = join(&stage, ROLE_EXPERT, "expert-1", 101);
    struct order order = last_order(&stage, &first);
    assert_int_equal(order.count, 4); /* two of the four experts of both MoE layers */
    assert_int_equal(order.pair[0], 4);
    assert_int_equal(order.pair[1], 5);
    assert_int_equal(last_order(&stage, &second).count, 4);
    stage_free(&stage);
}

static void test_experts_are_placed_when_the_wait_is_over(void **state) {
    struct stage stage;
    open_stage(&stage);
    stage.settings.heartbeat_ms = 3000;
    create(&stage);
    struct player only = join(&stage, ROLE_EXPERT, "expert-0", 100);
    assert_true(actor_deadline(stage.actor) ==
                stage.now_ns + (uint64_t)stage.settings.join_wait_ms * MS);
    stage_timer(&stage, stage.now_ns + (uint64_t)stage.settings.join_wait_ms * MS);
    assert_int_equal(last_order(&stage, &only).count, 8);
    /* said again until it is done */
    stage_clear(&stage);
    stage_timer(&stage, stage.now_ns + (uint64_t)stage.settings.hello_retry_ms * MS);
    struct order again = last_order(&stage, &only);
    assert_int_equal(again.count, 8);
    ready(&stage, &only, again.operation, true);
    stage_clear(&stage);
    stage_timer(&stage, stage.now_ns + 1000 * (uint64_t)MS);
    assert_int_equal(last_order(&stage, &only).operation, 0);
    stage_free(&stage);
}

static void test_serving_waits_for_everybody(void **state) {
    struct stage stage;
    open_stage(&stage);
    create(&stage);
    struct player player[5];
    player[0] = join(&stage, ROLE_GATEWAY, "gateway-0", 100);
    player[1] = join(&stage, ROLE_EXPERT, "expert-0", 101);
    player[2] = join(&stage, ROLE_EXPERT, "expert-1", 102);
    struct order order[2] = {last_order(&stage, &player[1]), last_order(&stage, &player[2])};
    player[3] = join(&stage, ROLE_SAMPLER, "sampler-0", 103);
    player[4] = join(&stage, ROLE_ATTENTION, "attention-0", 104);
    settle(&stage, player, 5);
    assert_described(&stage, "ready=5 orders=2 serving=0");
    ready(&stage, &player[1], order[0].operation, true);
    assert_described(&stage, "serving=0");
    stage_clear(&stage);
    ready(&stage, &player[2], order[1].operation, true);
    assert_described(&stage, "serving=1");
    const Troupe__Commit *commit = last_commit(&stage);
    assert_true(commit->serving);
    assert_int_equal(commit->n_layer, 8);
    assert_int_equal(placed_at(commit, player[1].id), 4);
    stage_free(&stage);
}

static void test_a_new_attention_actor_waits_until_experts_know_it(void **state) {
    struct stage stage;
    struct player player[6];
    open_troupe(&stage, player);
    player[5] = join(&stage, ROLE_ATTENTION, "attention-1", 105);
    assert_int_equal(listed(last_commit(&stage), player[5].id)->state,
                     TROUPE__ACTOR_STATE__STATE_JOINING);
    uint64_t epoch = epoch_of(&stage);
    heartbeat(&stage, &player[5], epoch);
    heartbeat(&stage, &player[0], epoch);
    heartbeat(&stage, &player[2], epoch);
    heartbeat(&stage, &player[4], epoch);
    assert_true(epoch_of(&stage) == epoch); /* expert-1 does not know it yet */
    stage_clear(&stage);
    heartbeat(&stage, &player[3], epoch);
    assert_int_equal(listed(last_commit(&stage), player[5].id)->state,
                     TROUPE__ACTOR_STATE__STATE_READY);
    stage_free(&stage);
}

/* ---- epochs ---- */

static void test_who_missed_an_epoch_is_told_again(void **state) {
    struct stage stage;
    struct player player[5];
    open_troupe(&stage, player);
    stage.now_ns += 150 * (uint64_t)MS;
    heartbeat(&stage, &player[1], epoch_of(&stage) - 1);
    assert_int_equal(stage_sent_count(&stage, TROUPE__ENVELOPE__BODY_COMMIT), 1);
    assert_int_equal(stage_take(&stage, EFFECT_SEND)->send.to, player[1].id);
    stage_clear(&stage);
    heartbeat(&stage, &player[1], epoch_of(&stage) - 1); /* but not with every message */
    heartbeat(&stage, &player[1], epoch_of(&stage));
    assert_int_equal(stage_sent_count(&stage, TROUPE__ENVELOPE__BODY_COMMIT), 0);
    stage_free(&stage);
}

/* ---- loss ---- */

static void lose(struct stage *stage, const struct player *player, uint32_t how) {
    struct event event = {.kind = EVENT_PEER_LOST};
    Troupe__PeerExited exited = TROUPE__PEER_EXITED__INIT;
    message envelope = TROUPE__ENVELOPE__INIT;
    envelope.protocol_version = WIRE_PROTOCOL_VERSION;
    envelope.from_incarnation = 1; /* a supervisor */
    envelope.body_case = TROUPE__ENVELOPE__BODY_PEER_EXITED;
    envelope.peer_exited = &exited;
    exited.host = "here";
    switch (how) {
    case 0:
        event.peer.id = player->id;
        event.peer.incarnation = player->incarnation;
        stage_step(stage, &event);
        break;
    case 1:
        exited.incarnation = player->incarnation;
        stage_message(stage, &envelope);
        break;
    default:
        exited.pid = (uint32_t)player->incarnation;
        stage_message(stage, &envelope);
        break;
    }
}

static void test_a_lost_expert_is_replaced_by_the_others(void **state) {
    for (uint32_t how = 0; how < 3; how++) {
        struct stage stage;
        struct player player[5];
        open_troupe(&stage, player);
        lose(&stage, &player[2], how);
        const Troupe__Commit *commit = last_commit(&stage);
        assert_false(commit->serving);
        assert_null(listed(commit, player[2].id));
        assert_int_equal(commit->n_layer, 4);
        assert_int_equal(stage_take(&stage, EFFECT_DISCONNECT)->connect.id, player[2].id);
        struct order order = last_order(&stage, &player[3]);
        assert_int_equal(order.count, 8);
        stage_clear(&stage);
        ready(&stage, &player[3], order.operation, true);
        commit = last_commit(&stage);
        assert_true(commit->serving);
        assert_int_equal(placed_at(commit, player[3].id), 8);
        stage_free(&stage);
    }
}

static void test_missed_heartbeats_count_as_loss(void **state) {
    struct stage stage;
    struct player player[5];
    open_troupe(&stage, player);
    uint64_t interval = (uint64_t)stage.settings.heartbeat_ms * MS;
    uint64_t end = stage.now_ns + interval * stage.settings.heartbeat_misses;
    while (stage.now_ns + interval < end) {
        stage_timer(&stage, stage.now_ns + interval);
        for (int i = 1; i < 5; i++)
            heartbeat(&stage, &player[i], epoch_of(&stage));
    }
    assert_described(&stage, "members=5");
    stage_timer(&stage, end);
    assert_described(&stage, "members=4");
    assert_true(stage_traced(&stage, "removed gateway-0"));
    stage_clear(&stage); /* it was only stopped: it is told to end, and never comes back */
    heartbeat(&stage, &player[0], epoch_of(&stage));
    assert_non_null(stage_sent(&stage, TROUPE__ENVELOPE__BODY_REFUSED));
    say_hello(&stage, &player[0], "fingerprint", "f32", 0);
    assert_described(&stage, "members=4");
    stage_free(&stage);
}

/* It was welcomed by an earlier coordinator when this one had given it up already: it would not hear a refusal of somebody whom it does not
 * follow, so it is asked for a HELLO first, and that is refused. */
static void test_who_follows_an_earlier_coordinator_too_late_hears_that_it_is_removed(void **state) {
    struct stage stage;
    struct player player[5];
    open_troupe(&stage, player);
    struct event event = {.kind = EVENT_PEER_LOST};
    event.peer.id = player[2].id;
    event.peer.incarnation = player[2].incarnation;
    stage_step(&stage, &event);
    stage_clear(&stage);
    Troupe__Heartbeat beat = TROUPE__HEARTBEAT__INIT;
    beat.coordinator_incarnation = stage.identity.incarnation + 1;
    beat.control_address = "there";
    message envelope = envelope_of(&player[2]);
    envelope.body_case = TROUPE__ENVELOPE__BODY_HEARTBEAT;
    envelope.heartbeat = &beat;
    stage_message(&stage, &envelope);
    assert_non_null(stage_sent(&stage, TROUPE__ENVELOPE__BODY_REJOIN));
    stage_clear(&stage);
    say_hello(&stage, &player[2], "fingerprint", "f32", 0);
    assert_non_null(stage_sent(&stage, TROUPE__ENVELOPE__BODY_REFUSED));
    assert_described(&stage, "members=4");
    stage_free(&stage);
}

static void test_a_coordinator_that_was_stopped_blames_nobody(void **state) {
    struct stage stage;
    struct player player[5];
    open_troupe(&stage, player);
    stage_timer(&stage, stage.now_ns + 3600000 * (uint64_t)MS);
    assert_described(&stage, "members=5");
    stage_free(&stage);
}

static void test_a_restarted_process_replaces_its_former_self(void **state) {
    struct stage stage;
    struct player player[6];
    open_troupe(&stage, player);
    player[5] = join(&stage, ROLE_EXPERT, "expert-1", 203);
    assert_true(player[5].id > player[4].id);
    assert_described(&stage, "members=5");
    assert_true(stage_traced(&stage, "started again"));
    assert_int_equal(last_order(&stage, &player[5]).count, 4);
    stage_free(&stage);
}

/* ---- make before break ---- */

static void test_a_new_process_takes_over_without_a_gap(void **state) {
    struct stage stage;
    struct player player[6];
    open_troupe(&stage, player);
    player[5] = join(&stage, ROLE_EXPERT, "expert-2", 105);
    struct order order = last_order(&stage, &player[5]);
    assert_in_range(order.count, 2, 3);
    settle(&stage, player, 6);
    const Troupe__Commit *commit = last_commit(&stage);
    assert_true(commit->serving);
    assert_int_equal(placed_at(commit, player[5].id), 0); /* still loading */
    stage_clear(&stage);
    ready(&stage, &player[5], order.operation, true);
    commit = last_commit(&stage);
    assert_true(commit->serving);
    assert_int_equal(commit->n_layer, 8);
    assert_int_equal(placed_at(commit, player[5].id), order.count);
    /* the old copies stay until the attention actor has adopted the epoch */
    assert_false(last_order(&stage, &player[2]).release);
    assert_false(last_order(&stage, &player[3]).release);
    heartbeat(&stage, &player[1], epoch_of(&stage));
    uint32_t released = 0;
    for (int i = 2; i <= 3; i++) {
        struct order release = last_order(&stage, &player[i]);
        released += release.release ? release.count : 0;
        for (uint32_t j = 0; release.release && j < release.count; j++) {
            bool taken = false;
            for (uint32_t k = 0; k < order.count; k++)
                taken = taken || order.pair[k] == release.pair[j];
            assert_true(taken);
        }
        if (release.release)
            ready(&stage, &player[i], release.operation, true);
    }
    assert_int_equal(released, order.count);
    assert_described(&stage, "orders=0");
    stage_free(&stage);
}

static void test_a_process_that_cannot_load_keeps_what_it_has(void **state) {
    struct stage stage;
    struct player player[6];
    open_troupe(&stage, player);
    lose(&stage, &player[2], 0);
    struct order order = last_order(&stage, &player[3]);
    stage_clear(&stage);
    ready(&stage, &player[3], order.operation, false);
    assert_true(stage_traced(&stage, "could not load"));
    assert_true(stage_traced(&stage, "have no place"));
    assert_described(&stage, "serving=0");
    player[5] = join(&stage, ROLE_EXPERT, "expert-0", 202); /* somebody with room comes */
    order = last_order(&stage, &player[5]);
    assert_true(order.count >= 4);
    heartbeat(&stage, &player[5], epoch_of(&stage));
    ready(&stage, &player[5], order.operation, true);
    assert_described(&stage, "serving=1");
    stage_free(&stage);
}

static void test_late_and_foreign_ready_messages_do_not_count(void **state) {
    struct stage stage;
    open_stage(&stage);
    create(&stage);
    struct player player[3];
    player[0] = join(&stage, ROLE_EXPERT, "expert-0", 100);
    player[1] = join(&stage, ROLE_EXPERT, "expert-1", 101);
    struct order before = last_order(&stage, &player[1]);
    lose(&stage, &player[0], 0);
    struct order after = last_order(&stage, &player[1]);
    assert_true(after.operation > before.operation);
    assert_int_equal(after.count, 8);
    heartbeat(&stage, &player[1], epoch_of(&stage));
    stage_clear(&stage);
    ready(&stage, &player[1], before.operation, true); /* of the order that was replaced */
    ready(&stage, &player[0], after.operation, true);  /* of nobody */
    assert_int_equal(stage_sent_count(&stage, TROUPE__ENVELOPE__BODY_COMMIT), 0);
    ready(&stage, &player[1], after.operation, true);
    assert_int_equal(placed_at(last_commit(&stage), player[1].id), 8);
    stage_free(&stage);
}

/* ---- what it tells ---- */

static void test_statistics_are_summed(void **state) {
    struct stage stage;
    struct player player[6];
    open_troupe(&stage, player);
    player[5] = join(&stage, ROLE_ATTENTION, "attention-1", 105);
    for (int who = 1; who <= 5; who += 4)
        for (uint64_t rows = 20; rows >= 10;
             rows -= 10) { /* the second one is late: a smaller total */
            Troupe__Heartbeat body = TROUPE__HEARTBEAT__INIT;
            uint32_t layer[] = {1, 200}, expert[] = {3, 0};
            uint64_t totals[] = {rows, 5};
            body.epoch = epoch_of(&stage);
            body.coordinator_incarnation = stage.identity.incarnation;
            body.sequences_running = 3;
            body.n_load_layer = body.n_load_expert = body.n_load_rows = 2;
            body.load_layer = layer;
            body.load_expert = expert;
            body.load_rows = totals;
            message envelope = envelope_of(&player[who]);
            envelope.body_case = TROUPE__ENVELOPE__BODY_HEARTBEAT;
            envelope.heartbeat = &body;
            stage_message(&stage, &envelope);
        }
    lose(&stage, &player[5], 0); /* what it had routed still counts */
    stage_clear(&stage);
    stage_timer(&stage, stage.now_ns + (uint64_t)stage.settings.heartbeat_ms * MS);
    const message *envelope = stage_sent(&stage, TROUPE__ENVELOPE__BODY_STATS);
    const Troupe__Stats *stats = envelope->stats;
    assert_int_equal(stats->n_actor, 5);
    assert_int_equal(stats->n_load_rows, 1);
    assert_int_equal(stats->load_layer[0], 1);
    assert_int_equal(stats->load_expert[0], 3);
    assert_true(stats->load_rows[0] == 40);
    assert_int_equal(stats->actor[1]->heartbeat->sequences_running, 3);
    assert_true(stats->actor[1]->heartbeat_age_ns == (uint64_t)stage.settings.heartbeat_ms * MS);
    assert_null(stage_sent(&stage, TROUPE__ENVELOPE__BODY_STATS)); /* only to the gateway */
    stage_free(&stage);
}

static void test_status_is_told_to_members_who_ask(void **state) {
    struct stage stage;
    struct player player[6];
    open_troupe(&stage, player);
    player[5] = join(&stage, ROLE_CONTROL, "ctl", 300);
    assert_described(&stage, "serving=1"); /* a client does not hold anybody up */
    stage_clear(&stage);
    Troupe__StatusRequest request = TROUPE__STATUS_REQUEST__INIT;
    request.token = 77;
    message envelope = envelope_of(&player[5]);
    envelope.body_case = TROUPE__ENVELOPE__BODY_STATUS_REQUEST;
    envelope.status_request = &request;
    stage_message(&stage, &envelope);
    const message *status = stage_sent(&stage, TROUPE__ENVELOPE__BODY_STATUS);
    assert_true(status->status->token == 77);
    assert_int_equal(status->status->n_actor, 6);
    assert_int_equal(status->status->commit->n_layer, 8);
    stage_free(&stage);
}

static void test_shutdown_is_passed_on(void **state) {
    for (uint32_t how = 0; how < 3; how++) {
        struct stage stage;
        struct player player[6];
        open_troupe(&stage, player);
        player[5] = join(&stage, ROLE_CONTROL, "ctl", 300);
        stage_clear(&stage);
        Troupe__Shutdown shutdown = TROUPE__SHUTDOWN__INIT;
        shutdown.reason = "enough";
        message envelope = envelope_of(&player[how == 0 ? 2 : 5]);
        envelope.body_case = TROUPE__ENVELOPE__BODY_SHUTDOWN;
        envelope.shutdown = &shutdown;
        if (how == 2)
            stage_step(&stage, &(struct event){.kind = EVENT_SHUTDOWN});
        else
            stage_message(&stage, &envelope);
        /* an expert may not end everybody; a control client and the host may */
        assert_int_equal(stage_count(&stage, EFFECT_EXIT), how == 0 ? 0 : 1);
        assert_int_equal(stage_sent_count(&stage, TROUPE__ENVELOPE__BODY_SHUTDOWN),
                         how == 0 ? 0 : 6);
        stage_free(&stage);
    }
}

/* ---- any order ---- */

/* Experts come, go, fail to load and answer late, in any order; once that stops, everything is
 * placed, on live processes, and nothing is held that is not served. */
static void run_chaos(uint64_t seed) {
    struct stage stage;
    struct player player[PLAYERS];
    uint64_t random = seed, incarnation = 1000;
    uint32_t count = 5;
    open_troupe(&stage, player);
    for (int i = 0; i < 120; i++) {
        uint32_t what = random_below(&random, 10), who = 2 + random_below(&random, count - 2);
        if (what == 0 && count < PLAYERS) {
            char name[16];
            snprintf(name, sizeof name, "expert-%u", 100 + (uint32_t)incarnation);
            player[count] = join(&stage, ROLE_EXPERT, name, ++incarnation);
            count++;
        } else if (what == 1 && who >= 5) {
            lose(&stage, &player[who], random_below(&random, 3));
            player[who] = player[--count];
        } else if (what < 6) {
            struct order order = last_order(&stage, &player[who]);
            if (order.operation != 0)
                ready(&stage, &player[who], order.operation,
                      who < 5 || random_below(&random, 6) != 0);
        } else {
            heartbeat(&stage, &player[random_below(&random, count)], epoch_of(&stage));
        }
        stage_clear(&stage);
        stage_timer(&stage, stage.now_ns + 20 * (uint64_t)MS);
    }
    for (int round = 0; round < 40; round++) {
        settle(&stage, player, count);
        for (uint32_t i = 0; i < count; i++) {
            struct order order = last_order(&stage, &player[i]);
            if (order.operation != 0)
                ready(&stage, &player[i], order.operation, true);
        }
        stage_clear(&stage);
        stage_timer(&stage, stage.now_ns + 200 * (uint64_t)MS);
    }
    if (strstr(described(&stage), "orders=0 serving=1") == NULL)
        fail_msg("seed %llu: %s", (unsigned long long)seed, described(&stage));
    stage_free(&stage);
}

static void test_placement_recovers_from_anything(void **state) {
    for (uint64_t seed = 1; seed <= 60; seed++)
        run_chaos(seed);
    print_message("seeds 1 to 60\n");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_placement_is_even_for_any_number_of_processes),
        cmocka_unit_test(test_a_lost_holder_moves_only_its_experts),
        cmocka_unit_test(test_a_new_holder_takes_its_share_and_no_more),
        cmocka_unit_test(test_capacities_are_kept),
        cmocka_unit_test(test_a_full_process_keeps_what_it_has),
        cmocka_unit_test(test_hello_is_answered_once_and_for_all),
        cmocka_unit_test(test_who_does_not_fit_is_refused),
        cmocka_unit_test(test_experts_are_placed_when_all_are_here),
        cmocka_unit_test(test_experts_are_placed_when_the_wait_is_over),
        cmocka_unit_test(test_serving_waits_for_everybody),
        cmocka_unit_test(test_a_new_attention_actor_waits_until_experts_know_it),
        cmocka_unit_test(test_who_missed_an_epoch_is_told_again),
        cmocka_unit_test(test_a_lost_expert_is_replaced_by_the_others),
        cmocka_unit_test(test_missed_heartbeats_count_as_loss),
        cmocka_unit_test(test_who_follows_an_earlier_coordinator_too_late_hears_that_it_is_removed),
        cmocka_unit_test(test_a_coordinator_that_was_stopped_blames_nobody),
        cmocka_unit_test(test_a_restarted_process_replaces_its_former_self),
        cmocka_unit_test(test_a_new_process_takes_over_without_a_gap),
        cmocka_unit_test(test_a_process_that_cannot_load_keeps_what_it_has),
        cmocka_unit_test(test_late_and_foreign_ready_messages_do_not_count),
        cmocka_unit_test(test_statistics_are_summed),
        cmocka_unit_test(test_status_is_told_to_members_who_ask),
        cmocka_unit_test(test_shutdown_is_passed_on),
        cmocka_unit_test(test_placement_recovers_from_anything),
    };
    return cmocka_run_group_tests_name("coordinator", tests, NULL, NULL);
}
