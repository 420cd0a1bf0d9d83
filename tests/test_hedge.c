/* Rows that are late are sent to a replica as well, and the first answer wins: the attention actor by hand. Experts 30, 31, 32 and
 * samplers 40, 41 are played by the test. */
#include "actors/latency.h"
#include "tests/support/step.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <cmocka.h>

#define MS      1000000u
#define FLOOR   (50 * (uint64_t)MS)
#define UNKNOWN (5 * FLOOR) /* while the usual time of an answer is not known */

static const actor_id EVERYBODY[] = {20, 30, 31, 32, 40, 41};

static void open_stage(struct stage *stage, const actor_id *holder, uint32_t holders, uint32_t replicas) {
    stage_init(stage, ROLE_ATTENTION);
    stage->replicas = replicas;
    stage->actor = attention_create(&stage->identity, &stage->settings, &stage->config);
    assert_non_null(stage->actor);
    stage_join(stage, 50);
    stage_commit(stage, EVERYBODY, 6, holder, holders);
    stage_clear(stage);
}

static void submit(struct stage *stage, uint64_t sequence, uint32_t max_tokens) {
    Troupe__Submit request = TROUPE__SUBMIT__INIT;
    Troupe__Sampling sampling = TROUPE__SAMPLING__INIT;
    uint32_t token[3] = {4, 5, 6};
    sampling.top_p = sampling.repetition_penalty = 1;
    request.sequence = sequence;
    request.n_token = request.prompt_tokens = 3;
    request.token = token;
    request.max_tokens = max_tokens;
    request.sampling = &sampling;
    message envelope = stage_envelope(20);
    envelope.body_case = TROUPE__ENVELOPE__BODY_SUBMIT;
    envelope.submit = &request;
    stage_message(stage, &envelope);
}

static struct effect next_frame(struct stage *stage, enum frame_kind kind) {
    const struct effect *effect = stage_take(stage, EFFECT_TRANSFER);
    assert_non_null(effect);
    assert_int_equal(effect->transfer.header.kind, kind);
    return *effect;
}

static void assert_no_frame(struct stage *stage) {
    assert_null(stage_take(stage, EFFECT_TRANSFER));
}

static void assert_described(struct stage *stage, const char *text) {
    const char *described = stage->actor->class->describe(stage->actor);
    if (strstr(described, text) == NULL)
        fail_msg("\"%s\" is not in \"%s\"", text, described);
}

/* Rows scattered since the last stage_clear. */
static uint32_t scattered(struct stage *stage) {
    uint32_t items = 0;
    for (uint32_t i = 0; i < stage->log.count; i++)
        if (stage->log.list[i].kind == EFFECT_COMPUTE &&
            stage->log.list[i].compute.kind == PROGRAM_SCATTER)
            items += stage->log.list[i].compute.items;
    return items;
}

static void assert_to(const struct effect *frame, actor_id to, uint32_t items) {
    assert_int_equal(frame->transfer.header.to, to);
    assert_int_equal(frame->transfer.header.items, items);
}

/* Everything is at 30 and 31: the 6 items of 3 tokens are shared evenly. */
static void open_pair(struct stage *stage, struct effect *first, struct effect *second) {
    open_stage(stage, (actor_id[]){30, 31}, 2, 1);
    submit(stage, 1, 2);
    *first = next_frame(stage, FRAME_DISPATCH);
    *second = next_frame(stage, FRAME_DISPATCH);
    assert_to(first, 30, 3);
    assert_to(second, 31, 3);
}

/* Runs what is asked for to its end; 31 takes `slow_ms` for each of its answers, 30 one. Returns the items that each was given in the
 * last layer. */
static void run_with_a_slow_one(struct stage *stage, uint32_t slow_ms, uint32_t ret_items[2]) {
    for (const struct effect *found; (found = stage_take(stage, EFFECT_TRANSFER)) != NULL;) {
        struct effect frame = *found, other = {0};
        if (frame.transfer.header.kind == FRAME_SAMPLE) {
            stage_sampled(stage, &frame, 5);
            continue;
        }
        found = stage_take(stage, EFFECT_TRANSFER);
        if (found != NULL)
            other = *found;
        ret_items[0] = ret_items[1] = 0;
        ret_items[frame.transfer.header.to - 30] = frame.transfer.header.items;
        if (found != NULL)
            ret_items[other.transfer.header.to - 30] = other.transfer.header.items;
        for (int i = 0; i < 2; i++) { /* the quick one first */
            const struct effect *answered = frame.transfer.header.to == 30u + (uint32_t)i ? &frame : &other;
            if (answered->kind != EFFECT_TRANSFER || answered->transfer.header.to != 30u + (uint32_t)i)
                continue;
            stage->now_ns += (i == 0 ? 1 : slow_ms) * (uint64_t)MS;
            stage_combine(stage, answered);
        }
    }
}

static void test_shares_follow_speeds_and_come_back(void **state) {
    struct stage stage;
    uint32_t items[2] = {0};
    open_stage(&stage, (actor_id[]){30, 31}, 2, 1);
    for (uint64_t sequence = 1; sequence < 20; sequence++) {
        submit(&stage, sequence, 1);
        run_with_a_slow_one(&stage, 4, items);
        stage_clear(&stage);
    }
    assert_int_equal(items[0] + items[1], 6);
    assert_true(items[0] > items[1]);
    for (uint64_t sequence = 20; sequence < 2500; sequence++) { /* as quick as the other again, and tried again in the end */
        submit(&stage, sequence, 1);
        run_with_a_slow_one(&stage, 0, items);
        stage_clear(&stage);
    }
    assert_int_equal(items[0], items[1]);
    stage_free(&stage);
}

static void test_the_first_answer_wins(void **state) {
    struct stage stage;
    struct effect first, second;
    open_pair(&stage, &first, &second);
    stage_combine(&stage, &second);
    uint64_t at = stage.now_ns + UNKNOWN;
    assert_true(actor_deadline(stage.actor) <= at);
    stage_timer(&stage, at - 1);
    assert_no_frame(&stage);
    stage_timer(&stage, at);
    struct effect hedge = next_frame(&stage, FRAME_DISPATCH);
    assert_to(&hedge, 31, 3);
    assert_no_frame(&stage);
    assert_memory_equal(hedge.transfer.prefix, first.transfer.prefix, first.transfer.prefix_bytes);
    stage_combine(&stage, &hedge);
    assert_int_equal(scattered(&stage), 6);
    assert_described(&stage, "hedged=1");
    assert_described(&stage, "resent=0");
    /* the next layer asks the other one only, until the late one speaks */
    struct effect next = next_frame(&stage, FRAME_DISPATCH);
    assert_to(&next, 31, 6);
    assert_no_frame(&stage);
    stage_combine(&stage, &first);
    assert_described(&stage, "stale=1");
    assert_int_equal(scattered(&stage), 6);
    stage_free(&stage);
}

static void test_the_late_one_may_win(void **state) {
    struct stage stage;
    struct effect first, second;
    open_pair(&stage, &first, &second);
    stage_combine(&stage, &second);
    stage_timer(&stage, stage.now_ns + UNKNOWN);
    struct effect hedge = next_frame(&stage, FRAME_DISPATCH);
    stage_clear(&stage);
    stage_combine(&stage, &first);
    assert_int_equal(scattered(&stage), 3);
    assert_to(&(struct effect){.transfer = next_frame(&stage, FRAME_DISPATCH).transfer}, 30, 3);
    stage_combine(&stage, &hedge);
    assert_described(&stage, "stale=1");
    assert_int_equal(scattered(&stage), 3);
    stage_free(&stage);
}

static void test_a_suspect_is_asked_again_after_it_has_spoken(void **state) {
    struct stage stage;
    struct effect first, second;
    open_pair(&stage, &first, &second);
    stage_combine(&stage, &second);
    stage_timer(&stage, stage.now_ns + UNKNOWN);
    struct effect hedge = next_frame(&stage, FRAME_DISPATCH);
    stage_combine(&stage, &hedge);
    stage_combine(&stage, &first); /* it lives */
    stage.now_ns += 101 * (uint64_t)MS;
    struct effect next = next_frame(&stage, FRAME_DISPATCH);
    assert_to(&next, 31, 6);
    stage_combine(&stage, &next);
    struct effect sample = next_frame(&stage, FRAME_SAMPLE);
    stage_sampled(&stage, &sample, 9);
    assert_to(&(struct effect){.transfer = next_frame(&stage, FRAME_DISPATCH).transfer}, 30, 1);
    assert_to(&(struct effect){.transfer = next_frame(&stage, FRAME_DISPATCH).transfer}, 31, 1);
    stage_free(&stage);
}

static void test_suspects_are_asked_if_there_is_nobody_else(void **state) {
    struct stage stage;
    struct effect first, second;
    open_pair(&stage, &first, &second);
    stage_combine(&stage, &second);
    stage_timer(&stage, stage.now_ns + UNKNOWN);
    struct effect hedge = next_frame(&stage, FRAME_DISPATCH);
    stage_combine(&stage, &hedge);
    assert_to(&(struct effect){.transfer = next_frame(&stage, FRAME_DISPATCH).transfer}, 31, 6);
    stage_peer_lost(&stage, 31);
    assert_to(&(struct effect){.transfer = next_frame(&stage, FRAME_DISPATCH).transfer}, 30, 6);
    stage_free(&stage);
}

static void test_who_is_lost_is_covered_by_the_other(void **state) {
    struct stage stage;
    for (int lost = 0; lost < 2; lost++) {
        struct effect first, second;
        open_pair(&stage, &first, &second);
        stage_combine(&stage, &second);
        stage_timer(&stage, stage.now_ns + UNKNOWN);
        struct effect hedge = next_frame(&stage, FRAME_DISPATCH);
        stage_clear(&stage);
        stage_peer_lost(&stage, lost == 0 ? 30 : 31);
        assert_no_frame(&stage); /* nothing is sent again: an answer is on its way */
        stage_combine(&stage, lost == 0 ? &hedge : &first);
        assert_int_equal(scattered(&stage), 3);
        stage_free(&stage);
    }
}

static void test_both_lost_rows_go_on_with_the_next_epoch(void **state) {
    struct stage stage;
    struct effect first, second;
    open_pair(&stage, &first, &second);
    stage_combine(&stage, &second);
    stage_timer(&stage, stage.now_ns + UNKNOWN);
    struct effect hedge = next_frame(&stage, FRAME_DISPATCH);
    stage_peer_lost(&stage, 30);
    stage_peer_lost(&stage, 31);
    assert_no_frame(&stage);
    stage_clear(&stage);
    stage_commit(&stage, (actor_id[]){20, 32, 40}, 3, (actor_id[]){32}, 1);
    struct effect again = next_frame(&stage, FRAME_DISPATCH);
    assert_to(&again, 32, 3);
    stage_combine(&stage, &first);
    stage_combine(&stage, &hedge);
    assert_int_equal(scattered(&stage), 0);
    stage_combine(&stage, &again);
    assert_int_equal(scattered(&stage), 3);
    stage_free(&stage);
}

/* Experts 0..3 at 30+31, 31+32, 32+30, 30+31. A part of 30 has others' help from two sides; what the first brings is not taken from the
 * late one again. */
static void test_hedges_may_go_to_several(void **state) {
    struct stage stage;
    open_stage(&stage, (actor_id[]){30, 31, 30, 32}, 4, 1); /* experts 0 and 3, at 30, have replicas at 31 and 32 */
    submit(&stage, 1, 1);
    struct effect frame[3], late = {0};
    uint32_t frames = 0;
    for (const struct effect *effect; (effect = stage_take(&stage, EFFECT_TRANSFER)) != NULL;)
        frame[frames++] = *effect;
    for (uint32_t i = 0; i < frames; i++)
        if (frame[i].transfer.header.to == 30)
            late = frame[i];
        else
            stage_combine(&stage, &frame[i]);
    assert_true(late.transfer.header.items > 1);
    stage_clear(&stage);
    stage_timer(&stage, stage.now_ns + UNKNOWN);
    uint32_t hedged = 0, hedges = 0;
    struct effect hedge[3];
    for (const struct effect *effect; (effect = stage_take(&stage, EFFECT_TRANSFER)) != NULL; hedges++) {
        hedge[hedges] = *effect;
        hedged += effect->transfer.header.items;
        assert_int_not_equal(effect->transfer.header.to, 30);
    }
    assert_int_equal(hedged, late.transfer.header.items);
    assert_int_equal(hedges, 2);
    uint32_t brought = hedge[1].transfer.header.items;
    stage_combine(&stage, &hedge[1]);
    assert_int_equal(scattered(&stage), brought);
    stage_combine(&stage, &late);
    assert_int_equal(scattered(&stage), late.transfer.header.items);
    stage_combine(&stage, &hedge[0]);
    assert_int_equal(scattered(&stage), late.transfer.header.items);
    assert_described(&stage, "stale=1");
    stage_free(&stage);
}

static void test_the_usual_time_sets_the_measure(void **state) {
    struct stage stage;
    open_stage(&stage, (actor_id[]){30, 31}, 2, 1);
    for (uint64_t sequence = 1; sequence <= 12; sequence++) { /* 48 dispatches of 1 ms each */
        submit(&stage, sequence, 1);
        for (const struct effect *effect; (effect = stage_take(&stage, EFFECT_TRANSFER)) != NULL;) {
            struct effect question = *effect;
            stage.now_ns += MS;
            if (question.transfer.header.kind == FRAME_DISPATCH)
                stage_combine(&stage, &question);
            else
                stage_sampled(&stage, &question, 9);
        }
    }
    submit(&stage, 20, 1);
    struct effect frame[2] = {next_frame(&stage, FRAME_DISPATCH)};
    frame[1] = next_frame(&stage, FRAME_DISPATCH);
    stage_timer(&stage, stage.now_ns + FLOOR - 1);
    assert_no_frame(&stage);
    stage_timer(&stage, stage.now_ns + 1);
    next_frame(&stage, FRAME_DISPATCH);
    /* the next heartbeat tells of it */
    stage_clear(&stage);
    stage_timer(&stage, stage.now_ns + (uint64_t)stage.settings.heartbeat_ms * MS);
    const message *sent = stage_sent(&stage, TROUPE__ENVELOPE__BODY_HEARTBEAT);
    assert_non_null(sent);
    assert_int_equal(sent->heartbeat->n_peer, 3); /* nothing was sent to 32 */
    assert_int_equal(sent->heartbeat->peer_queue[2] + sent->heartbeat->peer_p99_us[2], 0);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(sent->heartbeat->peer[i], 30 + i);
        assert_in_range(sent->heartbeat->peer_p50_us[i], 1000, 2500);
        assert_in_range(sent->heartbeat->peer_p99_us[i], 1000, 2500);
        assert_true(sent->heartbeat->peer_queue[i] >= frame[i].transfer.header.items);
    }
    stage_free(&stage);
}

static void test_a_lost_frame_is_sent_again_where_there_is_no_replica(void **state) {
    struct stage stage;
    open_stage(&stage, (actor_id[]){30}, 1, 0);
    submit(&stage, 1, 1);
    struct effect first = next_frame(&stage, FRAME_DISPATCH);
    stage_timer(&stage, stage.now_ns + UNKNOWN);
    assert_no_frame(&stage);
    stage_timer(&stage, stage.now_ns + 3 * UNKNOWN);
    struct effect again = next_frame(&stage, FRAME_DISPATCH);
    assert_to(&again, 30, 6);
    stage_combine(&stage, &first);
    struct effect next = next_frame(&stage, FRAME_DISPATCH);
    assert_to(&next, 30, 6); /* the other layer: nobody is suspected of anything */
    assert_no_frame(&stage);
    stage_combine(&stage, &again);
    assert_described(&stage, "stale=1");
    assert_int_equal(scattered(&stage), 6);
    stage_free(&stage);
}

static void test_a_hedge_may_be_lost_as_well(void **state) {
    struct stage stage;
    struct effect first, second;
    open_pair(&stage, &first, &second);
    stage_combine(&stage, &second);
    stage_timer(&stage, stage.now_ns + UNKNOWN);
    struct effect hedge = next_frame(&stage, FRAME_DISPATCH);
    stage_timer(&stage, stage.now_ns + 3 * UNKNOWN - 1);
    assert_no_frame(&stage);
    stage_timer(&stage, stage.now_ns + 1);
    struct effect again = next_frame(&stage, FRAME_DISPATCH);
    assert_int_equal(again.transfer.header.items, 3);
    assert_no_frame(&stage);
    stage_combine(&stage, &hedge); /* given up */
    assert_described(&stage, "stale=1");
    assert_int_equal(scattered(&stage), 3);
    stage_combine(&stage, &again);
    assert_int_equal(scattered(&stage), 6);
    stage_free(&stage);
}

static void test_suspects_are_asked_too_rather_than_wait(void **state) {
    struct stage stage;
    struct effect first, second;
    open_pair(&stage, &first, &second);
    stage_combine(&stage, &second);
    stage_timer(&stage, stage.now_ns + UNKNOWN);
    struct effect hedge = next_frame(&stage, FRAME_DISPATCH);
    stage_combine(&stage, &hedge); /* 30 is a suspect now */
    struct effect next = next_frame(&stage, FRAME_DISPATCH);
    assert_to(&next, 31, 6);
    stage_timer(&stage, stage.now_ns + UNKNOWN);
    assert_to(&(struct effect){.transfer = next_frame(&stage, FRAME_DISPATCH).transfer}, 30, 6);
    stage_free(&stage);
}

static void test_it_can_be_switched_off(void **state) {
    struct stage stage;
    stage_init(&stage, ROLE_ATTENTION);
    stage.settings.hedge_factor = 0;
    stage.replicas = 1;
    stage.actor = attention_create(&stage.identity, &stage.settings, &stage.config);
    stage_join(&stage, 50);
    stage_commit(&stage, EVERYBODY, 6, (actor_id[]){30, 31}, 2);
    stage_clear(&stage);
    submit(&stage, 1, 1);
    next_frame(&stage, FRAME_DISPATCH);
    next_frame(&stage, FRAME_DISPATCH);
    stage_timer(&stage, stage.now_ns + (stage.settings.row_deadline_ms - 1) * (uint64_t)MS);
    assert_no_frame(&stage);
    stage_free(&stage);
}

static struct effect sample_out(struct stage *stage) {
    open_stage(stage, (actor_id[]){30}, 1, 0);
    submit(stage, 1, 1);
    for (int layer = 0; layer < 2; layer++) {
        struct effect dispatch = next_frame(stage, FRAME_DISPATCH);
        stage_combine(stage, &dispatch);
    }
    return next_frame(stage, FRAME_SAMPLE);
}

static void test_a_late_sampler_is_hedged_too(void **state) {
    struct stage stage;
    for (int winner = 0; winner < 2; winner++) {
        struct effect sample = sample_out(&stage);
        stage_timer(&stage, stage.now_ns + UNKNOWN);
        struct effect hedge = next_frame(&stage, FRAME_SAMPLE);
        assert_int_not_equal(hedge.transfer.header.to, sample.transfer.header.to);
        assert_memory_equal(hedge.transfer.prefix, sample.transfer.prefix, sample.transfer.prefix_bytes);
        assert_no_frame(&stage);
        stage_sampled(&stage, winner == 0 ? &sample : &hedge, 9);
        assert_int_equal(stage_sent_count(&stage, TROUPE__ENVELOPE__BODY_TOKENS), 1);
        stage_sampled(&stage, winner == 0 ? &hedge : &sample, 9);
        assert_int_equal(stage_sent_count(&stage, TROUPE__ENVELOPE__BODY_TOKENS), 1);
        assert_described(&stage, "stale=1");
        stage_free(&stage);
    }
}

static void test_a_lost_sampler_is_covered_by_the_other(void **state) {
    struct stage stage;
    for (int lost = 0; lost < 2; lost++) {
        struct effect sample = sample_out(&stage);
        stage_timer(&stage, stage.now_ns + UNKNOWN);
        struct effect hedge = next_frame(&stage, FRAME_SAMPLE);
        stage_peer_lost(&stage, lost == 0 ? sample.transfer.header.to : hedge.transfer.header.to);
        assert_no_frame(&stage);
        stage_sampled(&stage, lost == 0 ? &sample : &hedge, 9); /* of the lost one */
        assert_int_equal(stage_sent_count(&stage, TROUPE__ENVELOPE__BODY_TOKENS), 0);
        stage_sampled(&stage, lost == 0 ? &hedge : &sample, 9);
        assert_int_equal(stage_sent_count(&stage, TROUPE__ENVELOPE__BODY_TOKENS), 1);
        stage_free(&stage);
    }
}

static void test_latency_quantiles(void **state) {
    struct latency latency = {0};
    for (uint32_t i = 0; i < LATENCY_KNOWN - 1; i++)
        latency_add(&latency, MS);
    assert_int_equal(latency_quantile_ns(&latency, 0.5), 0);
    latency_add(&latency, MS);
    uint64_t quantile = latency_quantile_ns(&latency, 0.5);
    assert_true(quantile >= MS && quantile <= MS + MS / 4);
    for (int i = 0; i < 1000; i++) /* what was is forgotten */
        latency_add(&latency, 10 * MS);
    quantile = latency_quantile_ns(&latency, 0.05);
    assert_true(quantile >= 10 * MS && quantile <= 13 * MS);
    latency_add(&latency, 0);
    latency_add(&latency, UINT64_MAX);
    assert_true(latency_quantile_ns(&latency, 1.0) >= 1000u * MS);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_the_first_answer_wins),
        cmocka_unit_test(test_shares_follow_speeds_and_come_back),
        cmocka_unit_test(test_the_late_one_may_win),
        cmocka_unit_test(test_a_suspect_is_asked_again_after_it_has_spoken),
        cmocka_unit_test(test_suspects_are_asked_if_there_is_nobody_else),
        cmocka_unit_test(test_who_is_lost_is_covered_by_the_other),
        cmocka_unit_test(test_both_lost_rows_go_on_with_the_next_epoch),
        cmocka_unit_test(test_hedges_may_go_to_several),
        cmocka_unit_test(test_the_usual_time_sets_the_measure),
        cmocka_unit_test(test_a_lost_frame_is_sent_again_where_there_is_no_replica),
        cmocka_unit_test(test_a_hedge_may_be_lost_as_well),
        cmocka_unit_test(test_suspects_are_asked_too_rather_than_wait),
        cmocka_unit_test(test_it_can_be_switched_off),
        cmocka_unit_test(test_a_late_sampler_is_hedged_too),
        cmocka_unit_test(test_a_lost_sampler_is_covered_by_the_other),
        cmocka_unit_test(test_latency_quantiles),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
