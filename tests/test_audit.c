/* Rows of experts that a second process computes as well: the attention actor by hand. Experts 30,
 * 31, 32 are played by the test, which gives wrong rows where it wants to. Each batch has 3 rows
 * with 2 experts each in its first layer. */
#include "tests/support/step.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#define MS    1000000u
#define ITEMS 6u

static const actor_id EVERYBODY[] = {20, 30, 31, 32, 40, 41};

static void submit(struct stage *stage) {
    Troupe__Submit request = TROUPE__SUBMIT__INIT;
    Troupe__Sampling sampling = TROUPE__SAMPLING__INIT;
    uint32_t token[3] = {4, 5, 6};
    sampling.top_p = sampling.repetition_penalty = 1;
    request.sequence = 1;
    request.n_token = request.prompt_tokens = 3;
    request.token = token;
    request.max_tokens = 40;
    request.sampling = &sampling;
    message envelope = stage_envelope(20);
    envelope.body_case = TROUPE__ENVELOPE__BODY_SUBMIT;
    envelope.submit = &request;
    stage_message(stage, &envelope);
}

/* The experts are spread over the holders, each at `copies` of them. */
static void open_stage(struct stage *stage, double share, const actor_id *holder, uint32_t holders,
                       uint32_t copies) {
    stage_init(stage, ROLE_ATTENTION);
    stage->settings.audit_share = share;
    stage->replicas = copies - 1;
    stage->actor = attention_create(&stage->identity, &stage->settings, &stage->config);
    assert_non_null(stage->actor);
    stage_join(stage, 50);
    stage_commit(stage, EVERYBODY, 6, holder, holders);
    stage_clear(stage);
    submit(stage);
}

/* Answers a dispatch with rows full of `value`; the last row's last element is `last`. */
static void answer(struct stage *stage, const struct effect *dispatch, float value, float last) {
    struct frame_header header = answer_to(dispatch, FRAME_COMBINE);
    header.items = dispatch->transfer.header.items;
    header.row_bytes = stage->config.hidden * (uint32_t)sizeof(float);
    size_t before = frame_rows_offset(FRAME_COMBINE, 0, header.items, 0) - sizeof header;
    size_t values = (size_t)header.items * stage->config.hidden;
    uint8_t *payload = calloc(1, before + values * sizeof(float));
    for (size_t i = 0; i < values; i++)
        memcpy(payload + before + i * sizeof(float), i + 1 == values ? &last : &value,
               sizeof(float));
    stage_frame(stage, &header, payload, before + values * sizeof(float));
    free(payload);
}

static void answer_right(struct stage *stage, const struct effect *dispatch) {
    answer(stage, dispatch, 1, 1);
}

/* The dispatches that have not been taken yet; returns how many rows of experts they ask for. */
static uint32_t take_all(struct stage *stage, struct effect *ret, uint32_t *ret_count) {
    uint32_t items = 0;
    *ret_count = 0;
    for (const struct effect *effect; (effect = stage_take(stage, EFFECT_TRANSFER)) != NULL;) {
        assert_int_equal(effect->transfer.header.kind, FRAME_DISPATCH);
        items += effect->transfer.header.items;
        ret[(*ret_count)++] = *effect;
    }
    return items;
}

static bool combined(const struct stage *stage) {
    for (uint32_t i = 0; i < stage->log.count; i++)
        if (stage->log.list[i].kind == EFFECT_COMPUTE &&
            stage->log.list[i].compute.kind == PROGRAM_COMBINE)
            return true;
    return false;
}

/* Rows scattered since the last stage_clear. */
static uint32_t scatters(const struct stage *stage) {
    uint32_t count = 0;
    for (uint32_t i = 0; i < stage->log.count; i++) {
        const struct program *program = &stage->log.list[i].compute;
        if (stage->log.list[i].kind == EFFECT_COMPUTE && program->kind == PROGRAM_SCATTER)
            count += program->items;
    }
    return count;
}

static void assert_described(struct stage *stage, const char *text) {
    const char *described = stage->actor->class->describe(stage->actor);
    if (strstr(described, text) == NULL)
        fail_msg("\"%s\" is not in \"%s\"", text, described);
}

/* Accusations in the newest heartbeat of the log. */
static uint32_t accused(struct stage *stage, actor_id *ret, bool *ret_undecided) {
    uint32_t count = 0;
    stage_timer(stage, stage->now_ns); /* one is due at once */
    stage->next[EFFECT_SEND] = 0;
    for (const message *sent;
         (sent = stage_sent(stage, TROUPE__ENVELOPE__BODY_HEARTBEAT)) != NULL;) {
        count = (uint32_t)sent->heartbeat->n_accusation;
        for (uint32_t i = 0; i < count; i++) {
            ret[i] = sent->heartbeat->accusation[i]->actor;
            *ret_undecided = sent->heartbeat->accusation[i]->undecided;
        }
    }
    return count;
}

static void test_two_must_agree(void **state) {
    struct stage stage;
    struct effect frame[16];
    uint32_t frames;
    open_stage(&stage, 1, (actor_id[]){30, 31}, 2, 2);
    assert_int_equal(take_all(&stage, frame, &frames), 2 * ITEMS); /* everything twice */
    uint32_t to[2] = {0};
    for (uint32_t i = 0; i < frames; i++)
        to[frame[i].transfer.header.to - 30] += frame[i].transfer.header.items;
    assert_int_equal(to[0], ITEMS);
    assert_int_equal(to[1], ITEMS);
    for (uint32_t i = 0; i < frames; i++) {
        assert_false(combined(&stage));
        answer_right(&stage, &frame[i]);
    }
    assert_true(combined(&stage));
    assert_int_equal(scatters(&stage), ITEMS); /* once each */
    assert_described(&stage, "audited=6 differed=0 alone=0");
    stage_free(&stage);
}

/* Of three holders, whoever differs from the other two has lied, whichever answer was scattered
 * first. */
static void test_the_third_decides(void **state) {
    for (uint32_t liar = 30; liar <= 32; liar++) {
        struct stage stage;
        struct effect frame[16];
        uint32_t frames, asked_liar = 0;
        actor_id named[4];
        bool undecided = true;
        open_stage(&stage, 1, (actor_id[]){30, 31, 32}, 3, 3);
        for (int round = 0; round < 8 && !combined(&stage); round++) {
            take_all(&stage, frame, &frames);
            for (uint32_t i = 0; i < frames && !combined(&stage); i++) {
                bool lies = frame[i].transfer.header.to == liar;
                asked_liar += lies;
                answer(&stage, &frame[i], 1, lies ? 7 : 1);
            }
        }
        assert_true(asked_liar > 0 && combined(&stage));
        assert_int_equal(accused(&stage, named, &undecided), 1);
        assert_int_equal(named[0], liar);
        assert_false(undecided);
        assert_true(stage_traced(&stage, "gave wrong rows of layer 1"));
        assert_described(&stage, "audited=6");
        /* nothing is sent to it any more */
        for (uint32_t layer = 0; layer < 3; layer++) {
            take_all(&stage, frame, &frames);
            for (uint32_t i = 0; i < frames; i++)
                assert_int_not_equal(frame[i].transfer.header.to, liar);
            if (frames == 0 || stage_count(&stage, EFFECT_TRANSFER) > 60)
                break;
            for (uint32_t i = 0; i < frames; i++)
                answer_right(&stage, &frame[i]);
            if (stage.log.count > 0 && frame[frames - 1].transfer.header.layer == 2)
                break; /* samplers are next */
        }
        stage_free(&stage);
    }
}

/* Right bits replace wrong ones that were scattered before. */
static void test_wrong_rows_are_replaced(void **state) {
    struct stage stage;
    struct effect frame[16], more[16];
    uint32_t frames, mores;
    open_stage(&stage, 1, (actor_id[]){30, 31, 32}, 3, 3);
    take_all(&stage, frame, &frames);
    answer(&stage, &frame[0], 1, 7); /* the first plan's: it is scattered */
    for (uint32_t i = 1; i < frames; i++)
        answer_right(&stage, &frame[i]);
    assert_false(combined(&stage));
    assert_int_equal(scatters(&stage), ITEMS);
    assert_int_equal(take_all(&stage, more, &mores), 1); /* the one row that differs */
    assert_int_not_equal(more[0].transfer.header.to, frame[0].transfer.header.to);
    answer_right(&stage, &more[0]);
    assert_true(combined(&stage));
    assert_int_equal(scatters(&stage), ITEMS + 1);
    stage_free(&stage);
}

/* With two holders both are asked again: who contradicts itself has lied. The other's word alone is
 * not enough. */
static void test_who_contradicts_itself(void **state) {
    struct stage stage;
    struct effect frame[16];
    uint32_t frames;
    actor_id named[4];
    bool undecided = true;
    open_stage(&stage, 1, (actor_id[]){30, 31}, 2, 2);
    take_all(&stage, frame, &frames);
    for (uint32_t i = 0; i < frames; i++)
        answer(&stage, &frame[i], 1, i == 0 ? 7 : 1); /* 30 lies once */
    assert_int_equal(frame[0].transfer.header.to, 30);
    assert_false(combined(&stage));
    for (int round = 0; round < 6 && !combined(&stage); round++) {
        take_all(&stage, frame, &frames);
        for (uint32_t i = 0; i < frames && !combined(&stage); i++)
            answer_right(&stage, &frame[i]);
    }
    assert_true(combined(&stage));
    assert_int_equal(accused(&stage, named, &undecided), 1);
    assert_int_equal(named[0], 30);
    assert_false(undecided);
    stage_free(&stage);
}

/* Two insist: nobody can tell who is right, nothing passes, both are named; with the next epoch
 * others decide. */
static void test_two_insist(void **state) {
    struct stage stage;
    struct effect frame[16];
    uint32_t frames = 1;
    actor_id named[4];
    bool undecided = false;
    open_stage(&stage, 1, (actor_id[]){30, 31}, 2, 2);
    for (int round = 0; round < 20 && frames > 0; round++) {
        take_all(&stage, frame, &frames);
        for (uint32_t i = 0; i < frames; i++)
            answer(&stage, &frame[i], 1, frame[i].transfer.header.to == 30 ? 7 : 1);
    }
    assert_false(combined(&stage));
    assert_int_equal(accused(&stage, named, &undecided), 2);
    assert_true(undecided);
    actor_id now[] = {20, 32, 33, 40, 41};
    stage_commit(&stage, now, 5, (actor_id[]){32, 33}, 2);
    for (int round = 0; round < 6 && !combined(&stage); round++) {
        take_all(&stage, frame, &frames);
        for (uint32_t i = 0; i < frames && !combined(&stage); i++)
            answer_right(&stage, &frame[i]);
    }
    assert_true(combined(&stage));
    stage_free(&stage);
}

/* A share of 1 waits for a second holder; a smaller one does not. */
static void test_only_one_holder(void **state) {
    for (int all = 0; all < 2; all++) {
        struct stage stage;
        struct effect frame[16];
        uint32_t frames;
        open_stage(&stage, all ? 1 : 0.999999, (actor_id[]){30, 31}, 2, 1);
        assert_int_equal(take_all(&stage, frame, &frames), ITEMS);
        for (uint32_t i = 0; i < frames; i++)
            answer_right(&stage, &frame[i]);
        assert_int_equal(combined(&stage), !all);
        if (all) {
            stage.replicas = 1;
            stage_commit(&stage, EVERYBODY, 6, (actor_id[]){30, 31}, 2);
            assert_int_equal(take_all(&stage, frame, &frames), ITEMS);
            for (uint32_t i = 0; i < frames; i++)
                answer_right(&stage, &frame[i]);
            assert_true(combined(&stage));
            assert_described(&stage, "audited=6 differed=0 alone=0");
        } else {
            assert_described(&stage, "audited=0 differed=0 alone=6");
        }
        stage_free(&stage);
    }
}

/* The word of somebody who has been started again since does not count: it might lie in the same
 * way. */
static void test_former_lives_have_no_vote(void **state) {
    struct stage stage;
    struct effect frame[16];
    uint32_t frames;
    open_stage(&stage, 1, (actor_id[]){30, 31}, 2, 1);
    take_all(&stage, frame, &frames);
    for (uint32_t i = 0; i < frames; i++)
        answer(&stage, &frame[i], 7, 7);
    actor_id now[] = {20, 32, 33, 40, 41};
    stage.replicas = 1;
    stage_commit(&stage, now, 5, (actor_id[]){32, 33}, 2);
    for (int round = 0; round < 6 && !combined(&stage); round++) {
        take_all(&stage, frame, &frames);
        for (uint32_t i = 0; i < frames && !combined(&stage); i++)
            answer_right(&stage, &frame[i]);
    }
    assert_true(combined(&stage));
    assert_int_equal(scatters(&stage), 2 * ITEMS); /* the wrong ones were replaced */
    actor_id named[4];
    bool undecided;
    assert_int_equal(accused(&stage, named, &undecided), 0);
    stage_free(&stage);
}

/* Somebody who does not answer an audit: others are asked beside it, and it is left alone for a
 * while. */
static void test_a_silent_second(void **state) {
    struct stage stage;
    struct effect frame[16], more[16];
    uint32_t frames, mores, silent = 0;
    open_stage(&stage, 1, (actor_id[]){30, 31, 32}, 3, 3);
    take_all(&stage, frame, &frames);
    for (uint32_t i = 0; i < frames; i++)
        if (frame[i].transfer.header.part >= 0x80000000u && silent == 0)
            silent = frame[i].transfer.header.to; /* does not answer audits */
    for (uint32_t i = 0; i < frames; i++)
        if (frame[i].transfer.header.part < 0x80000000u || frame[i].transfer.header.to != silent)
            answer_right(&stage, &frame[i]);
    assert_false(combined(&stage));
    stage_timer(&stage, stage.now_ns + 250 * (uint64_t)MS);
    assert_true(take_all(&stage, more, &mores) > 0);
    for (uint32_t i = 0; i < mores; i++) {
        assert_int_not_equal(more[i].transfer.header.to, silent);
        answer_right(&stage, &more[i]);
    }
    assert_true(combined(&stage));
    stage_free(&stage);
}

static void test_off_costs_no_frame(void **state) {
    struct stage stage;
    struct effect frame[16];
    uint32_t frames;
    open_stage(&stage, 0, (actor_id[]){30, 31}, 2, 2);
    assert_int_equal(take_all(&stage, frame, &frames), ITEMS);
    stage_free(&stage);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_two_must_agree),
        cmocka_unit_test(test_the_third_decides),
        cmocka_unit_test(test_wrong_rows_are_replaced),
        cmocka_unit_test(test_who_contradicts_itself),
        cmocka_unit_test(test_two_insist),
        cmocka_unit_test(test_only_one_holder),
        cmocka_unit_test(test_former_lives_have_no_vote),
        cmocka_unit_test(test_a_silent_second),
        cmocka_unit_test(test_off_costs_no_frame),
    };
    return cmocka_run_group_tests_name("audit", tests, NULL, NULL);
}
