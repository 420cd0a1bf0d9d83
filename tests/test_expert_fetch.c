/* Weights from other expert processes, by hand: who is asked, what counts of the answers, when others are asked or the file is
 * read; and the limit on how fast. */
#include "tests/support/step.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#define PIECE WEIGHTS_BYTES_MAX
#define TOTAL (PIECE + 1000u) /* two pieces */
#define MS    1000000u

static uint8_t image[TOTAL];

/* The actor under test is 30; 31 and 32 hold every expert. */
static void open_stage(struct stage *stage, enum weights_from weights, bool far) {
    stage_init(stage, ROLE_EXPERT);
    stage->config.hidden = stage->config.expert_width = 256; /* so that an image may be so long */
    stage->far = far;
    stage->actor = expert_create(&stage->identity, &stage->settings, &stage->config, 0);
    assert_non_null(stage->actor);
    expert_set_weights(stage->actor, weights);
    stage_join(stage, 30);
    stage->replicas = 1;
    stage_commit(stage, (actor_id[]){31, 32, 50}, 3, (actor_id[]){31, 32}, 2);
    stage_clear(stage);
    for (uint32_t i = 0; i < TOTAL; i++)
        image[i] = (uint8_t)(i * 7 + i / 251);
}

static void assign(struct stage *stage, uint64_t operation, uint32_t count) {
    uint32_t layer[4] = {1, 1, 1, 1}, expert[4] = {0, 1, 2, 3};
    Troupe__Assign assign = TROUPE__ASSIGN__INIT;
    assign.operation = operation;
    assign.n_layer = assign.n_expert = count;
    assign.layer = layer;
    assign.expert = expert;
    message envelope = stage_envelope(ACTOR_COORDINATOR);
    envelope.body_case = TROUPE__ENVELOPE__BODY_ASSIGN;
    envelope.assign = &assign;
    stage_message(stage, &envelope);
}

struct question {
    actor_id to;
    uint64_t transfer, offset;
    uint32_t layer, expert;
};

/* The next FETCH in the log; to 0: there is none. */
static struct question next_question(struct stage *stage) {
    for (const struct effect *effect; (effect = stage_take(stage, EFFECT_SEND)) != NULL;) {
        Troupe__Envelope *envelope;
        assert_int_equal(wire_unpack(&envelope, effect->send.bytes, effect->send.size, NULL), 0);
        struct question question = {0};
        if (envelope->body_case == TROUPE__ENVELOPE__BODY_FETCH)
            question = (struct question){effect->send.to, envelope->fetch->transfer, envelope->fetch->offset,
                                         envelope->fetch->layer, envelope->fetch->expert};
        wire_free(&envelope);
        if (question.to != 0)
            return question;
    }
    return (struct question){0};
}

static Troupe__Weights piece_for(const struct question *question) {
    Troupe__Weights weights = TROUPE__WEIGHTS__INIT;
    weights.transfer = question->transfer;
    weights.offset = question->offset;
    weights.total = TOTAL;
    weights.image_crc = crc32c(0, image, TOTAL);
    weights.data.data = image + question->offset;
    weights.data.len = TOTAL - question->offset < PIECE ? TOTAL - question->offset : PIECE;
    weights.data_crc = crc32c(0, weights.data.data, weights.data.len);
    weights.model_fingerprint = "fingerprint";
    return weights;
}

static void give(struct stage *stage, actor_id from, Troupe__Weights *weights) {
    message envelope = stage_envelope(from);
    envelope.body_case = TROUPE__ENVELOPE__BODY_WEIGHTS;
    envelope.weights = weights;
    stage_message(stage, &envelope);
}

static void answer(struct stage *stage, const struct question *question) {
    Troupe__Weights weights = piece_for(question);
    give(stage, question->to, &weights);
}

static struct effect take_load(struct stage *stage) {
    const struct effect *effect = stage_take(stage, EFFECT_LOAD);
    assert_non_null(effect);
    return *effect;
}

static void assert_whole(struct stage *stage) {
    struct effect load = take_load(stage);
    assert_non_null(load.load.image);
    assert_int_equal(load.load.image_bytes, TOTAL);
    assert_memory_equal(load.load.image, image, TOTAL);
    free(load.load.image);
}

static void test_pieces_come_from_a_holder(void **state) {
    struct stage stage;
    open_stage(&stage, WEIGHTS_PEER, false);
    assign(&stage, 1, 1);
    struct question first = next_question(&stage);
    assert_true(first.to == 31 || first.to == 32);
    assert_true(first.layer == 1 && first.expert == 0 && first.offset == 0);
    assert_int_equal(stage_count(&stage, EFFECT_CONNECT), 1);
    answer(&stage, &first);
    struct question second = next_question(&stage);
    assert_true(second.to == first.to && second.offset == PIECE);
    answer(&stage, &first); /* doubled on its way: does not count */
    assert_int_equal(next_question(&stage).to, 0);
    answer(&stage, &second);
    assert_whole(&stage);
    assert_int_equal(stage_count(&stage, EFFECT_CONNECT), 1);
    stage_free(&stage);
}

static void test_another_holder_goes_on_where_the_first_ended(void **state) {
    for (int how = 0; how < 3; how++) {
        struct stage stage;
        open_stage(&stage, WEIGHTS_PEER, false);
        assign(&stage, 1, 1);
        struct question first = next_question(&stage);
        answer(&stage, &first);
        struct question second = next_question(&stage), other = {0};
        if (how == 0) { /* its process has ended */
            stage_peer_lost(&stage, second.to);
            other = next_question(&stage);
        } else if (how == 1) { /* it holds it no more */
            Troupe__Weights weights = TROUPE__WEIGHTS__INIT;
            weights.transfer = second.transfer;
            weights.error = "it does not hold it";
            give(&stage, second.to, &weights);
            other = next_question(&stage);
        } else { /* it says nothing */
            for (int i = 0; i < 40 && (other.to == 0 || other.to == second.to); i++) {
                stage_timer(&stage, stage.now_ns + 100 * (uint64_t)MS);
                struct question next = next_question(&stage);
                other = next.to != 0 ? next : other;
            }
        }
        assert_true(other.to != 0 && other.to != second.to);
        assert_int_equal(other.offset, PIECE);
        answer(&stage, &other);
        assert_whole(&stage);
        stage_free(&stage);
    }
}

static void test_wrong_pieces_do_not_count(void **state) {
    for (int how = 0; how < 5; how++) {
        struct stage stage;
        open_stage(&stage, WEIGHTS_PEER, false);
        assign(&stage, 1, 1);
        struct question first = next_question(&stage);
        Troupe__Weights weights = piece_for(&first);
        if (how == 0)
            weights.data_crc ^= 1;
        else if (how == 1)
            weights.model_fingerprint = "another";
        else if (how == 2)
            weights.total = UINT64_C(1) << 40;
        else if (how == 3)
            weights.data.len -= 1;
        else
            weights.total = 0;
        give(&stage, first.to, &weights);
        struct question other = next_question(&stage);
        assert_true(other.to != 0 && other.to != first.to);
        assert_int_equal(other.offset, 0);
        stage_free(&stage);
    }
}

/* Every piece is right, the whole is not: from the beginning, from another holder. So it is if the other holder's weights
 * are not the first one's. */
static void test_a_wrong_whole_is_fetched_anew(void **state) {
    for (int changed = 0; changed < 2; changed++) {
        struct stage stage;
        open_stage(&stage, WEIGHTS_PEER, false);
        assign(&stage, 1, 1);
        struct question first = next_question(&stage);
        Troupe__Weights weights = piece_for(&first);
        weights.image_crc ^= 1;
        give(&stage, first.to, &weights);
        struct question second = next_question(&stage);
        weights = piece_for(&second);
        weights.image_crc ^= changed ? 2 : 1;
        give(&stage, second.to, &weights);
        struct question again = next_question(&stage);
        assert_true(again.to != first.to);
        assert_int_equal(again.offset, 0);
        answer(&stage, &again);
        struct question last = next_question(&stage);
        answer(&stage, &last);
        assert_whole(&stage);
        stage_free(&stage);
    }
}

static void refuse(struct stage *stage, const struct question *question) {
    Troupe__Weights weights = TROUPE__WEIGHTS__INIT;
    weights.transfer = question->transfer;
    weights.error = "it does not hold it";
    give(stage, question->to, &weights);
}

static void test_what_nobody_gives_is_read_from_the_file_if_there_is_one(void **state) {
    struct stage stage;
    open_stage(&stage, WEIGHTS_AUTO, true);
    assign(&stage, 1, 1);
    struct question question;
    for (int i = 0; i < 20 && (question = next_question(&stage)).to != 0; i++)
        refuse(&stage, &question);
    assert_null(take_load(&stage).load.image);
    stage_free(&stage);

    open_stage(&stage, WEIGHTS_PEER, true);
    assign(&stage, 1, 1);
    for (int i = 0; i < 20 && (question = next_question(&stage)).to != 0; i++)
        refuse(&stage, &question);
    assert_int_equal(stage_count(&stage, EFFECT_LOAD), 0);
    stage.next[EFFECT_SEND] = 0;
    const message *ready = stage_sent(&stage, TROUPE__ENVELOPE__BODY_READY);
    assert_non_null(ready);
    assert_false(ready->ready->ok);
    assert_non_null(strstr(ready->ready->error, "this one has no file of it"));
    stage_free(&stage);
}

static void test_the_nearer_is_chosen(void **state) {
    struct stage stage;
    open_stage(&stage, WEIGHTS_AUTO, false); /* the same host has the file in memory */
    assign(&stage, 1, 2);
    assert_int_equal(stage_count(&stage, EFFECT_LOAD), 2);
    assert_int_equal(next_question(&stage).to, 0);
    stage_free(&stage);
    open_stage(&stage, WEIGHTS_AUTO, true);
    assign(&stage, 1, 2);
    assert_int_equal(stage_count(&stage, EFFECT_LOAD), 0);
    assert_true(next_question(&stage).to != 0);
    stage_free(&stage);
    open_stage(&stage, WEIGHTS_FILE, true);
    assign(&stage, 1, 2);
    assert_int_equal(stage_count(&stage, EFFECT_LOAD), 2);
    stage_free(&stage);
}

static uint64_t bytes_done(struct stage *stage) {
    stage_clear(stage);
    stage_timer(stage, stage->now_ns + (uint64_t)stage->settings.heartbeat_ms * MS);
    const message *beat = stage_sent(stage, TROUPE__ENVELOPE__BODY_HEARTBEAT);
    assert_non_null(beat);
    assert_int_equal(beat->heartbeat->order, 1);
    assert_true(beat->heartbeat->load_bytes_done <= beat->heartbeat->load_bytes);
    return beat->heartbeat->load_bytes_done;
}

/* One expert has 786433 bytes by the estimate: four of them take three seconds at a million a second. */
static void test_the_limit_is_kept_and_progress_is_told(void **state) {
    struct stage stage;
    stage_init(&stage, ROLE_EXPERT);
    stage.config.hidden = stage.config.expert_width = 256;
    stage.settings.load_bytes_per_second = 1000000;
    stage.actor = expert_create(&stage.identity, &stage.settings, &stage.config, 0);
    stage_join(&stage, 30);
    stage_commit(&stage, (actor_id[]){31, 50}, 2, (actor_id[]){31}, 1);
    stage_clear(&stage);
    uint64_t began_ns = stage.now_ns;
    assign(&stage, 1, 4);
    assert_int_equal(stage_count(&stage, EFFECT_LOAD), 1);
    uint32_t loads = 1;
    uint64_t done = 0;
    for (int i = 0; i < 40 && loads < 4; i++) {
        struct effect load;
        const struct effect *found = stage_take(&stage, EFFECT_LOAD);
        if (found != NULL) {
            load = *found;
            struct event event = {.kind = EVENT_LOADED};
            event.loaded.layer = load.load.layer;
            event.loaded.expert = load.load.expert;
            event.loaded.bytes = 2048;
            stage_step(&stage, &event);
        }
        uint64_t now_done = bytes_done(&stage);
        assert_true(now_done >= done);
        done = now_done;
        loads += stage_count(&stage, EFFECT_LOAD);
        assert_true((stage.now_ns - began_ns) / 786 / MS + 1 >= loads);
    }
    assert_int_equal(loads, 4);
    assert_int_equal(done, 3 * 786433u);
    stage_free(&stage);
}

/* ---- giving ---- */

static void test_what_is_held_is_given(void **state) {
    struct stage stage;
    open_stage(&stage, WEIGHTS_FILE, false);
    Troupe__Fetch fetch = TROUPE__FETCH__INIT;
    fetch.transfer = 9;
    fetch.layer = 1;
    fetch.bytes = PIECE;
    message envelope = stage_envelope(31);
    envelope.body_case = TROUPE__ENVELOPE__BODY_FETCH;
    envelope.fetch = &fetch;
    stage_message(&stage, &envelope);
    const message *weights = stage_sent(&stage, TROUPE__ENVELOPE__BODY_WEIGHTS);
    assert_non_null(weights);
    assert_true(weights->weights->transfer == 9);
    assert_string_equal(weights->weights->error, "it does not hold it");
    assign(&stage, 1, 1);
    struct effect load = take_load(&stage);
    struct event event = {.kind = EVENT_LOADED};
    event.loaded.layer = load.load.layer;
    event.loaded.bytes = 2048;
    stage_step(&stage, &event);
    stage.hold_programs = true;
    fetch.offset = 100;
    fetch.bytes = UINT32_MAX; /* is cut */
    stage_message(&stage, &envelope);
    assert_int_equal(stage.programs, 1);
    const struct program *program = &stage.program[stage.first_program];
    assert_int_equal(program->kind, PROGRAM_READ);
    assert_true(program->layer == 1 && program->items == 0 && program->offset == 100 && program->bytes == PIECE);
    for (int i = 0; i < 40; i++) /* no more than so many at a time, the others ask again */
        stage_message(&stage, &envelope);
    assert_int_equal(stage.programs, 16);
    stage_free(&stage);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_pieces_come_from_a_holder),
        cmocka_unit_test(test_another_holder_goes_on_where_the_first_ended),
        cmocka_unit_test(test_wrong_pieces_do_not_count),
        cmocka_unit_test(test_a_wrong_whole_is_fetched_anew),
        cmocka_unit_test(test_what_nobody_gives_is_read_from_the_file_if_there_is_one),
        cmocka_unit_test(test_the_nearer_is_chosen),
        cmocka_unit_test(test_the_limit_is_kept_and_progress_is_told),
        cmocka_unit_test(test_what_is_held_is_given),
    };
    return cmocka_run_group_tests_name("fetch", tests, NULL, NULL);
}
