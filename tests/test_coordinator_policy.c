/* What the coordinator does by itself, and the limits that it keeps: automatic rebalancing by loads of late, capacity and speed
 * in plans, fewest and most processes. Members are played by the test. */
#include "tests/support/players.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define HOT 50000000u /* rows that make any move pay */

/* Time goes on in small steps, everybody alive. */
static void wait_ms(struct stage *stage, const struct player *player, uint32_t count, uint64_t ms) {
    uint64_t end_ns = stage->now_ns + ms * MS;
    while (stage->now_ns < end_ns) {
        stage_timer(stage, stage->now_ns + 100 * (uint64_t)MS);
        go_on(stage, player, count);
    }
}

static actor_id holder_of(struct stage *stage, uint32_t layer, uint32_t expert) {
    const Troupe__Commit *commit = last_commit(stage);
    for (size_t i = 0; i < commit->n_layer; i++)
        if (commit->layer[i] == layer && commit->expert[i] == expert)
            return commit->holder[i];
    return 0;
}

/* Experts 0 and 1 of layer 1, both hot, are at the same process until the interval has passed. */
static void test_uneven_loads_are_rebalanced_at_the_interval(void **state) {
    struct stage stage;
    struct player player[5];
    open_stage(&stage);
    stage.settings.rebalance_interval_ms = 3000;
    stage.settings.rebalance_threshold = 0.9;
    fill_troupe(&stage, player);
    uint64_t epoch = epoch_of(&stage);
    route(&stage, &player[1], 1, 0, HOT);
    route(&stage, &player[1], 1, 1, HOT);
    wait_ms(&stage, player, 5, 1000);
    assert_true(epoch_of(&stage) == epoch); /* not yet */
    wait_ms(&stage, player, 5, 3000);
    assert_true(epoch_of(&stage) > epoch);
    assert_true(holder_of(&stage, 1, 0) != holder_of(&stage, 1, 1));
    const char *text = request(&stage, "GET", "/operations", NULL, 200);
    assert_says(text, "\"kind\":\"rebalance\"");
    assert_says(text, "\"automatic\":true");
    stage_free(&stage);
}

static void test_even_loads_and_no_interval_are_left_alone(void **state) {
    for (int off = 0; off < 2; off++) {
        struct stage stage;
        struct player player[5];
        open_stage(&stage);
        stage.settings.rebalance_interval_ms = off ? 0 : 1000;
        stage.settings.rebalance_threshold = 0.4; /* two processes: all at one of them is 0.5 */
        fill_troupe(&stage, player);
        uint64_t epoch = epoch_of(&stage);
        route(&stage, &player[1], 1, 0, HOT);
        route(&stage, &player[1], 1, 1, HOT);
        wait_ms(&stage, player, 5, 4000);
        assert_true(epoch_of(&stage) == epoch);
        assert_says(request(&stage, "GET", "/operations", NULL, 200), "\"operations\":[]");
        stage_free(&stage);
    }
}

/* What was hot long ago does not count any more: the pair that is hot now is parted, though the other has more rows in all. */
static void test_loads_of_late_decide(void **state) {
    struct stage stage;
    struct player player[5];
    open_stage(&stage);
    stage.settings.load_half_life_ms = 1000;
    fill_troupe(&stage, player);
    for (uint32_t expert = 0; expert < 4; expert++) /* an even past, ten times as much */
        route(&stage, &player[1], 1, expert, 10 * (uint64_t)HOT);
    wait_ms(&stage, player, 5, 30000);
    assert_says(request(&stage, "POST", "/rebalance", "{\"dry_run\":true}", 200), "\"proposed\":false");
    route(&stage, &player[1], 1, 2, 11 * (uint64_t)HOT);
    route(&stage, &player[1], 1, 3, 11 * (uint64_t)HOT);
    const char *text = request(&stage, "POST", "/rebalance", "{\"dry_run\":true}", 200);
    assert_says(text, "\"proposed\":true");
    const char *before = strstr(text, "\"balancedness_before\":");
    assert_non_null(before);
    assert_true(strtod(before + 22, NULL) < 0.8); /* layer 2 has no load: 1; layer 1: 0.5. By the totals: 0.98 */
    stage_free(&stage);
}

static double balancedness_before(struct stage *stage) {
    const char *before = strstr(request(stage, "POST", "/rebalance", "{\"dry_run\":true}", 200),
                                "\"balancedness_before\":");
    assert_non_null(before);
    return strtod(before + 22, NULL);
}

/* Another kind of traffic is not averaged with the one before: a window of it decides. A few rows are not taken for that. */
static void test_another_kind_of_traffic_is_noticed_at_once(void **state) {
    for (int few = 0; few < 2; few++) {
        struct stage stage;
        struct player player[5];
        open_stage(&stage);
        stage.settings.load_half_life_ms = 80000; /* windows of 10 s */
        fill_troupe(&stage, player);
        for (uint32_t expert = 0; expert < 4; expert++)
            route(&stage, &player[1], 1, expert, 10 * (uint64_t)HOT);
        wait_ms(&stage, player, 5, 10100);
        assert_true(balancedness_before(&stage) > 0.99);
        uint64_t more = few ? 10 : HOT; /* a tenth of what went before */
        route(&stage, &player[1], 1, 2, 10 * (uint64_t)HOT + more);
        route(&stage, &player[1], 1, 3, 10 * (uint64_t)HOT + more);
        wait_ms(&stage, player, 5, 10000);
        if (few)
            assert_true(balancedness_before(&stage) > 0.99);
        else
            assert_true(balancedness_before(&stage) < 0.76); /* layer 1: 0.5, layer 2: 1; averaged: 0.97 */
        stage_free(&stage);
    }
}

/* Three equally hot experts at one process; the other computes a row in a fourth of the time. */
static void test_a_fast_process_is_given_more(void **state) {
    struct stage stage;
    struct player player[5];
    open_troupe(&stage, player);
    for (uint32_t expert = 0; expert < 4; expert++)
        route(&stage, &player[1], 1, expert, HOT);
    work(&stage, &player[2], 1000000, 4000000000u);
    work(&stage, &player[3], 1000000, 1000000000u);
    post(&stage, "/rebalance", "{}");
    go_on(&stage, player, 5);
    assert_phase(&stage, 1, "done");
    uint32_t at_fast = 0;
    for (uint32_t expert = 0; expert < 4; expert++)
        at_fast += holder_of(&stage, 1, expert) == player[3].id;
    assert_int_equal(at_fast, 3);
    stage_free(&stage);
}

/* Nobody is given more than its memory holds, whatever its load: the fast one has room for five experts in all. */
static void test_capacity_bounds_what_a_fast_process_is_given(void **state) {
    struct stage stage;
    struct player player[5];
    open_stage(&stage);
    create(&stage);
    uint64_t bytes = 3 * (uint64_t)stage.config.hidden * stage.config.expert_width * 4 + 1;
    player[0] = join(&stage, ROLE_GATEWAY, "gateway-0", 100);
    player[1] = join(&stage, ROLE_ATTENTION, "attention-0", 101);
    for (uint32_t i = 2; i < 4; i++) {
        player[i] = (struct player){.role = ROLE_EXPERT, .incarnation = 100 + i};
        snprintf(player[i].name, sizeof player[i].name, "expert-%u", i - 2);
        stage_clear(&stage);
        say_hello(&stage, &player[i], "fingerprint", "f32", i == 2 ? 0 : 5 * bytes);
        player[i].id = stage_sent(&stage, TROUPE__ENVELOPE__BODY_WELCOME)->welcome->id;
        stage.next[EFFECT_SEND] = 0;
    }
    struct order first = last_order(&stage, &player[3]);
    ready(&stage, &player[3], first.operation, true);
    stage_timer(&stage, stage.now_ns + (uint64_t)stage.settings.hello_retry_ms * MS); /* said again */
    first = last_order(&stage, &player[2]);
    ready(&stage, &player[2], first.operation, true);
    player[4] = join(&stage, ROLE_SAMPLER, "sampler-0", 104);
    go_on(&stage, player, 5);
    for (uint32_t expert = 0; expert < 4; expert++)
        route(&stage, &player[1], 1, expert, HOT);
    work(&stage, &player[2], 1000000, 4000000000u);
    work(&stage, &player[3], 1000000, 1000000000u);
    post(&stage, "/rebalance", "{\"spare\":4}");
    go_on(&stage, player, 5);
    assert_int_equal(placed_at(last_commit(&stage), player[3].id), 5);
    stage_free(&stage);
}

/* The planner thinks in single copies and spares; the copies that `replicas` asks for are none of its business. */
static void test_rebalancing_keeps_replicas(void **state) {
    struct stage stage;
    struct player player[5];
    open_stage(&stage);
    stage.settings.replicas = 2;
    fill_troupe(&stage, player);
    wait_ms(&stage, player, 5, 500);
    assert_says(request(&stage, "GET", "/status", NULL, 200), "\"copies\":16");
    for (uint32_t expert = 0; expert < 4; expert++)
        route(&stage, &player[1], 1, expert, HOT);
    work(&stage, &player[2], 1000000, 4000000000u); /* unequal, so that fewer copies would pay */
    work(&stage, &player[3], 1000000, 1000000000u);
    assert_says(request(&stage, "POST", "/rebalance", "{\"dry_run\":true}", 200), "\"proposed\":false");
    stage_free(&stage);
}

/* ---- limits ---- */

static void test_scaling_keeps_to_its_limits(void **state) {
    static const struct {
        const char *path, *body, *why;
    } cases[] = {
        {"/scale", "{\"role\":\"experts\",\"count\":4}",
         "2 to 3 processes expected, found 4 (min_experts 2, max_experts 3; 2 are here)"},
        {"/scale", "{\"role\":\"experts\",\"count\":1}", "2 to 3 processes expected, found 1"},
        {"/scale_elastic_ep", "{\"new_data_parallel_size\":9}", "max_experts 3; 2 are here"},
        {"/scale_elastic_ep", "{\"new_ep_size\":1}", "min_experts 2"},
        {"/scale", "{\"role\":\"attention\",\"count\":3}", "max_attention 2"},
        {"/scale", "{\"role\":\"samplers\",\"count\":0}", "min_samplers 1"},
    };
    struct stage stage;
    struct player player[6];
    open_stage(&stage);
    stage.settings.min_experts = 2;
    stage.settings.max_experts = 3;
    stage.settings.max_attention = 2;
    fill_troupe(&stage, player);
    player[5] = join(&stage, ROLE_CONTROL, "supervisor", 300);
    settle(&stage, player, 6);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        assert_says(request(&stage, "POST", cases[i].path, cases[i].body, 400), cases[i].why);
    assert_says(request(&stage, "POST", "/drain", "{\"actor\":\"expert-0\"}", 409),
                "2 - 1 = 1 expert processes would be left, at least 2 expected (min_experts 2)");
    post(&stage, "/scale", "{\"role\":\"experts\",\"count\":3}"); /* within them */
    stage_free(&stage);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_uneven_loads_are_rebalanced_at_the_interval),
        cmocka_unit_test(test_rebalancing_keeps_replicas),
        cmocka_unit_test(test_even_loads_and_no_interval_are_left_alone),
        cmocka_unit_test(test_loads_of_late_decide),
        cmocka_unit_test(test_another_kind_of_traffic_is_noticed_at_once),
        cmocka_unit_test(test_a_fast_process_is_given_more),
        cmocka_unit_test(test_capacity_bounds_what_a_fast_process_is_given),
        cmocka_unit_test(test_scaling_keeps_to_its_limits),
    };
    return cmocka_run_group_tests_name("policy", tests, NULL, NULL);
}
