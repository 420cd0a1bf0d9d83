/* Expert processes without a file of weights, which take what they hold from whoever serves it: what the
 * coordinator gives them, and when; its members played by the test. */
#include "coordinator/placement.h"
#include "tests/support/players.h"
#include "tests/support/random.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define PAIRS 8u /* layers 1 and 2, four experts each */

static struct player join_fileless(struct stage *stage, const char *name, uint64_t incarnation) {
    struct player player = {.role = ROLE_EXPERT, .incarnation = incarnation};
    snprintf(player.name, sizeof player.name, "%s", name);
    stage_clear(stage);
    say_hello(stage, &player, "", "f32", 0);
    const message *welcome = stage_sent(stage, TROUPE__ENVELOPE__BODY_WELCOME);
    assert_non_null(welcome);
    player.id = welcome->welcome->id;
    return player;
}

static void lose(struct stage *stage, const struct player *player) {
    struct event event = {.kind = EVENT_PEER_LOST};
    event.peer.id = player->id;
    event.peer.incarnation = player->incarnation;
    stage_step(stage, &event);
}

static void test_another_configuration_is_refused(void **state) {
    struct stage stage;
    struct player player = {.role = ROLE_EXPERT, .incarnation = 9, .name = "expert-0"};
    open_stage(&stage);
    stage.identity.config_fingerprint = "hash";
    create(&stage);
    say_hello(&stage, &player, "", "f32", 0); /* without weights, and of another config.json */
    const message *refused = stage_sent(&stage, TROUPE__ENVELOPE__BODY_REFUSED);
    assert_non_null(refused);
    assert_says(refused->refused->reason, "config.json has the hash hash");
    assert_described(&stage, "members=0");
    stage_free(&stage);
}

/* ---- placement ---- */

static void test_what_needs_a_file_goes_where_one_is(void **state) {
    enum { EXPERTS = 6 };
    static const uint8_t is_moe[2] = {1, 1}, has_file[3] = {0, 1, 0};
    uint32_t capacity[3] = {12, 12, 12}, current[12], ret[12], scratch[12];
    uint8_t source[12];
    for (int i = 0; i < 12; i++) {
        current[i] = i < 6 ? 0 : NOBODY; /* layer 0 is to be at 0, which has no file */
        source[i] = SOURCE_FILE;
    }
    source[0] = SOURCE_STAYS;
    assert_int_equal(placement_even(2, is_moe, EXPERTS, 3, capacity, has_file, source, current, ret, scratch), 0);
    for (int i = 0; i < 12; i++)
        assert_int_equal(ret[i], i == 0 ? 0 : 1);
    capacity[1] = 7; /* it fills up, the others wait */
    assert_int_equal(placement_even(2, is_moe, EXPERTS, 3, capacity, has_file, source, current, ret, scratch), 4);
    /* what is served makes room for it */
    for (int i = 0; i < 12; i++) {
        current[i] = i < 7 ? 1 : NOBODY;
        source[i] = i < 7 ? SOURCE_ANY : SOURCE_FILE;
    }
    assert_int_equal(placement_even(2, is_moe, EXPERTS, 3, capacity, has_file, source, current, ret, scratch), 0);
    for (int i = 7; i < 12; i++)
        assert_int_equal(ret[i], 1);
    uint32_t at_file = 0;
    for (int i = 0; i < 7; i++)
        at_file += ret[i] == 1;
    assert_int_equal(at_file, 2);
}

/* ---- from nothing ---- */

static bool served(struct stage *stage, uint32_t pair) {
    const Troupe__Commit *commit = last_commit(stage);
    for (size_t i = 0; i < commit->n_holder; i++)
        if (commit->layer[i] * 4 + commit->expert[i] == pair)
            return true;
    return false;
}

static void test_first_the_file_then_the_others(void **state) {
    struct stage stage;
    struct player player[2];
    open_stage(&stage);
    create(&stage);
    player[0] = join_fileless(&stage, "expert-0", 100);
    player[1] = join(&stage, ROLE_EXPERT, "expert-1", 101);
    assert_int_equal(last_order(&stage, &player[0]).operation, 0); /* nobody could give it anything */
    assert_int_equal(last_order(&stage, &player[1]).count, PAIRS);
    answer_order(&stage, &player[1], true);
    settle(&stage, player, 2);
    struct order order = last_order(&stage, &player[0]);
    assert_int_equal(order.count, PAIRS / 2); /* its even share, now that somebody serves it */
    for (uint32_t i = 0; i < order.count; i++)
        assert_true(served(&stage, order.pair[i]));
    go_on(&stage, player, 2);
    const Troupe__Commit *commit = last_commit(&stage);
    assert_int_equal(placed_at(commit, player[0].id), PAIRS / 2);
    assert_int_equal(placed_at(commit, player[1].id), PAIRS / 2);
    assert_described(&stage, "orders=0");
    stage_free(&stage);
}

/* Too little room for all at first: two thirds of it are elsewhere in the end. */
static void test_a_small_process_with_a_file_feeds_the_others(void **state) {
    struct stage stage;
    struct player player[3];
    open_stage(&stage);
    stage.settings.expected_experts = 3;
    create(&stage);
    uint64_t bytes = 3 * (uint64_t)stage.config.hidden * stage.config.expert_width * 4 + 1;
    player[0] = (struct player){.role = ROLE_EXPERT, .incarnation = 100, .name = "expert-0", .id = 2};
    say_hello(&stage, &player[0], "fingerprint", "f32", 3 * bytes);
    assert_int_equal(stage_sent(&stage, TROUPE__ENVELOPE__BODY_WELCOME)->welcome->id, 2);
    player[1] = join_fileless(&stage, "expert-1", 101);
    player[2] = join_fileless(&stage, "expert-2", 102);
    assert_int_equal(last_order(&stage, &player[0]).count, 3);
    assert_true(stage_traced(&stage, "no process that has a file"));
    for (int i = 0; i < 4; i++)
        go_on(&stage, player, 3);
    const Troupe__Commit *commit = last_commit(&stage);
    assert_int_equal(commit->n_holder, PAIRS);
    assert_in_range(placed_at(commit, player[0].id), 2, 3);
    stage_free(&stage);
}

static void test_without_any_file_one_is_waited_for(void **state) {
    struct stage stage;
    struct player player[3];
    open_stage(&stage);
    create(&stage);
    player[0] = join_fileless(&stage, "expert-0", 100);
    player[1] = join_fileless(&stage, "expert-1", 101);
    assert_true(stage_traced(&stage, "8 experts have no place: nobody serves them"));
    stage_clear(&stage);
    for (int i = 0; i < 50; i++) {
        settle(&stage, player, 2);
        stage_timer(&stage, stage.now_ns + 100 * (uint64_t)MS);
    }
    assert_int_equal(last_order(&stage, &player[0]).operation, 0); /* no order that must fail */
    assert_int_equal(last_order(&stage, &player[1]).operation, 0);
    player[2] = join(&stage, ROLE_EXPERT, "expert-2", 102);
    assert_int_equal(last_order(&stage, &player[2]).count, PAIRS);
    go_on(&stage, player, 3);
    go_on(&stage, player, 3);
    const Troupe__Commit *commit = last_commit(&stage);
    for (int i = 0; i < 3; i++)
        assert_in_range(placed_at(commit, player[i].id), 2, 4);
    stage_free(&stage);
}

/* ---- loss ---- */

/* gateway, attention, expert-0 without a file, expert-1 with one, sampler, expert-2 with one. */
static void open_mixed(struct stage *stage, struct player *player) {
    open_stage(stage);
    stage->settings.expected_experts = 3;
    create(stage);
    player[0] = join(stage, ROLE_GATEWAY, "gateway-0", 100);
    player[1] = join(stage, ROLE_ATTENTION, "attention-0", 101);
    player[2] = join_fileless(stage, "expert-0", 102);
    player[3] = join(stage, ROLE_EXPERT, "expert-1", 103);
    player[4] = join(stage, ROLE_SAMPLER, "sampler-0", 104);
    player[5] = join(stage, ROLE_EXPERT, "expert-2", 105);
    go_on(stage, player, 6);
    go_on(stage, player, 6);
    assert_described(stage, "orders=0 serving=1");
    assert_true(placed_at(last_commit(stage), player[2].id) >= 2);
    stage_clear(stage);
}

static void test_what_a_lost_process_held_comes_from_a_file(void **state) {
    struct stage stage;
    struct player player[6];
    open_mixed(&stage, player);
    lose(&stage, &player[3]);
    struct order fileless = last_order(&stage, &player[2]), file = last_order(&stage, &player[5]);
    for (uint32_t i = 0; i < fileless.count; i++)
        assert_true(served(&stage, fileless.pair[i]));
    assert_true(file.count >= 5); /* what it held and all of what was lost */
    player[3] = player[5];
    go_on(&stage, player, 5);
    go_on(&stage, player, 5);
    assert_described(&stage, "orders=0 serving=1");
    assert_int_equal(placed_at(last_commit(&stage), player[2].id), PAIRS / 2); /* and even again */
    stage_free(&stage);
}

/* It was to take them from the one that is lost. */
static void test_who_can_take_it_from_nobody_any_more_need_not(void **state) {
    struct stage stage;
    struct player player[6];
    open_mixed(&stage, player);
    player[2] = join_fileless(&stage, "expert-3", 107); /* takes its share from the others */
    struct order order = last_order(&stage, &player[2]);
    assert_true(order.count > 0);
    lose(&stage, &player[3]);
    lose(&stage, &player[5]);
    player[3] = join(&stage, ROLE_EXPERT, "expert-1", 108);
    for (uint32_t i = 0; i < order.count; i++)
        if (!served(&stage, order.pair[i])) /* its own load fails, which is nobody's fault */
            order.release = true;
    assert_true(order.release);
    stage_clear(&stage);
    heartbeat(&stage, &player[3], epoch_of(&stage));
    assert_false(stage_traced(&stage, "have no place"));
    ready(&stage, &player[2], order.operation, false);
    assert_false(stage_traced(&stage, "could not load"));
    stage_free(&stage);
}

/* ---- what is asked for ---- */

static void test_the_last_process_with_a_file_stays(void **state) {
    struct stage stage;
    struct player player[6];
    open_mixed(&stage, player);
    lose(&stage, &player[5]);
    go_on(&stage, player, 5);
    player[5] = join_fileless(&stage, "expert-2", 106);
    go_on(&stage, player, 6);
    go_on(&stage, player, 6);
    assert_described(&stage, "orders=0 serving=1");
    assert_says(request(&stage, "POST", "/drain", "{\"actor\":\"expert-1\"}", 409),
                "none of the 2 expert processes that would be left has a file of weights");
    post(&stage, "/scale", "{\"role\":\"experts\",\"count\":1}"); /* the one with the file is not the oldest */
    go_on(&stage, player, 6);
    assert_int_equal(placed_at(last_commit(&stage), player[3].id), PAIRS);
    stage_free(&stage);
}

static void test_nobody_is_asked_to_take_what_nobody_serves(void **state) {
    struct stage stage;
    struct player player[6];
    open_mixed(&stage, player);
    lose(&stage, &player[3]);
    uint32_t lost = 0;
    while (served(&stage, 4 + lost)) /* an expert of layer 1 or 2 */
        lost++;
    char body[128];
    snprintf(body, sizeof body, "{\"layer\":%u,\"expert\":%u,\"to\":\"expert-0\"}", 1 + lost / 4, lost % 4);
    assert_says(request(&stage, "POST", "/replicate", body, 409), "expert-0 has no file of weights");
    snprintf(body, sizeof body, "{\"layer\":%u,\"expert\":%u}", 1 + lost / 4, lost % 4);
    assert_says(request(&stage, "POST", "/replicate", body, 409), "no other expert process");
    stage_free(&stage);
}

/* ---- any order ---- */

struct crowd {
    struct player player[PLAYERS];
    bool fileless[PLAYERS];
    uint8_t held[PLAYERS][4 + PAIRS]; /* as the process has it */
    uint32_t count;
    uint64_t incarnation;
};

static void crowd_join(struct stage *stage, struct crowd *crowd, bool fileless) {
    char name[16];
    snprintf(name, sizeof name, "expert-%u", 100 + (uint32_t)crowd->incarnation);
    uint32_t i = crowd->count++;
    crowd->fileless[i] = fileless;
    memset(crowd->held[i], 0, sizeof crowd->held[i]);
    crowd->player[i] = fileless ? join_fileless(stage, name, ++crowd->incarnation)
                                : join(stage, ROLE_EXPERT, name, ++crowd->incarnation);
}

static void crowd_lose(struct stage *stage, struct crowd *crowd, uint32_t i) {
    lose(stage, &crowd->player[i]);
    uint32_t last = --crowd->count;
    crowd->player[i] = crowd->player[last];
    crowd->fileless[i] = crowd->fileless[last];
    memcpy(crowd->held[i], crowd->held[last], sizeof crowd->held[i]);
}

/* As a process would: one without a file can load only what another has. */
static void crowd_answer(struct stage *stage, struct crowd *crowd, uint32_t i) {
    struct order order = last_order(stage, &crowd->player[i]);
    if (order.operation == 0)
        return;
    bool ok = true;
    for (uint32_t j = 0; j < order.count; j++) {
        uint8_t *held = &crowd->held[i][order.pair[j]];
        bool given = !crowd->fileless[i];
        for (uint32_t k = 2; k < crowd->count; k++)
            given = given || (k != i && crowd->held[k][order.pair[j]]);
        if (order.release)
            *held = 0;
        else if (!*held && given)
            *held = 1;
        ok = ok && (order.release || *held);
    }
    ready(stage, &crowd->player[i], order.operation, ok);
}

static void run_chaos(uint64_t seed) {
    struct stage stage;
    struct crowd crowd = {.incarnation = 1000};
    uint64_t random = seed;
    open_stage(&stage);
    create(&stage);
    crowd.player[0] = join(&stage, ROLE_ATTENTION, "attention-0", 101);
    crowd.player[1] = join(&stage, ROLE_SAMPLER, "sampler-0", 102);
    crowd.count = 2;
    crowd_join(&stage, &crowd, true);
    crowd_join(&stage, &crowd, false);
    for (int i = 0; i < 150; i++) {
        uint32_t what = random_below(&random, 10);
        if (what == 0 && crowd.count + 1 < PLAYERS)
            crowd_join(&stage, &crowd, random_below(&random, 3) != 0);
        else if (what == 1 && crowd.count > 4)
            crowd_lose(&stage, &crowd, 2 + random_below(&random, crowd.count - 2));
        else if (what < 6)
            crowd_answer(&stage, &crowd, 2 + random_below(&random, crowd.count - 2));
        else
            heartbeat(&stage, &crowd.player[random_below(&random, crowd.count)], epoch_of(&stage));
        stage_timer(&stage, stage.now_ns + 20 * (uint64_t)MS);
    }
    crowd_join(&stage, &crowd, false); /* somebody has a file */
    for (int round = 0; round < 40; round++) {
        settle(&stage, crowd.player, crowd.count);
        for (uint32_t i = 2; i < crowd.count; i++)
            crowd_answer(&stage, &crowd, i);
        stage_timer(&stage, stage.now_ns + 500 * (uint64_t)MS);
    }
    if (strstr(described(&stage), "orders=0 serving=1") == NULL)
        fail_msg("seed %llu: %s", (unsigned long long)seed, described(&stage));
    stage_free(&stage);
}

static void test_everything_is_served_as_long_as_somebody_has_a_file(void **state) {
    for (uint64_t seed = 1; seed <= 100; seed++)
        run_chaos(seed);
    print_message("seeds 1 to 100\n");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_another_configuration_is_refused),
        cmocka_unit_test(test_what_needs_a_file_goes_where_one_is),
        cmocka_unit_test(test_first_the_file_then_the_others),
        cmocka_unit_test(test_a_small_process_with_a_file_feeds_the_others),
        cmocka_unit_test(test_without_any_file_one_is_waited_for),
        cmocka_unit_test(test_what_a_lost_process_held_comes_from_a_file),
        cmocka_unit_test(test_who_can_take_it_from_nobody_any_more_need_not),
        cmocka_unit_test(test_the_last_process_with_a_file_stays),
        cmocka_unit_test(test_nobody_is_asked_to_take_what_nobody_serves),
        cmocka_unit_test(test_everything_is_served_as_long_as_somebody_has_a_file),
    };
    return cmocka_run_group_tests_name("coordinator, files", tests, NULL, NULL);
}
