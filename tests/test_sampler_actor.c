/* The sampler actor by hand: what it computes, what it drops. The draws themselves are tested with
 * the engine. */
#include "tests/support/step.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#define ATTENTION 50

static void open_stage(struct stage *stage) {
    stage_init(stage, ROLE_SAMPLER);
    stage->settings.batch_tokens = 4;
    stage->actor = sampler_create(&stage->identity, &stage->settings, &stage->config);
    assert_non_null(stage->actor);
    stage_join(stage, 40);
    stage_commit(stage, (actor_id[]){20, 30, 50}, 3, NULL, 0);
    stage_clear(stage);
}

struct question {
    struct frame_header header;
    struct sample_spec spec[8];
    uint32_t word[4];
};

static struct question make_question(uint32_t rows) {
    struct question ret = {
        .header = {.kind = FRAME_SAMPLE,
                   .from = ATTENTION,
                   .to = 40,
                   .from_incarnation = life_of(ATTENTION),
                   .to_incarnation = OWN_LIFE,
                   .batch = 5,
                   .attempt = 1,
                   .part = 2,
                   .rows = rows,
                   .items = 2,
                   .row_bytes = 32},
        .word = {7, 0},
    };
    for (uint32_t i = 0; i < rows; i++)
        ret.spec[i] = (struct sample_spec){
            .flags = SAMPLE_DRAW, .top_p = 1, .repetition_penalty = 1, .bias_count = i == 0};
    return ret;
}

static void ask(struct stage *stage, const struct question *question) {
    const struct frame_header *header = &question->header;
    size_t rows = frame_rows_offset(FRAME_SAMPLE, header->rows, header->items, 0) - sizeof *header;
    size_t size = rows + (size_t)header->rows * header->row_bytes;
    uint8_t *payload = calloc(1, size);
    assert_non_null(payload);
    size_t specs = header->rows * sizeof(struct sample_spec);
    memcpy(payload, question->spec, specs);
    memcpy(payload + specs, question->word, header->items * sizeof(uint32_t));
    stage_frame(stage, header, payload, size);
    free(payload);
}

static void test_rows_are_sampled_and_answered(void **state) {
    struct stage stage;
    open_stage(&stage);
    struct question question = make_question(3);
    ask(&stage, &question);
    const struct effect *compute = stage_take(&stage, EFFECT_COMPUTE);
    assert_int_equal(compute->compute.kind, PROGRAM_SAMPLE);
    assert_int_equal(compute->compute.rows, 3);
    assert_int_equal(compute->compute.words_count, 2);
    const struct effect *transfer = stage_take(&stage, EFFECT_TRANSFER);
    const struct frame_header *header = &transfer->transfer.header;
    assert_int_equal(header->kind, FRAME_SAMPLED);
    assert_int_equal(header->from, 40);
    assert_int_equal(header->to, ATTENTION);
    assert_true(header->to_incarnation == life_of(ATTENTION));
    assert_true(header->batch == 5);
    assert_int_equal(header->attempt, 1);
    assert_int_equal(header->part, 2);
    assert_int_equal(header->rows, 3);
    assert_int_equal(transfer->transfer.region, REGION_NONE);
    assert_int_equal(transfer->transfer.prefix_bytes, 3 * sizeof(struct sample_result));
    const struct sample_result *result = transfer->transfer.prefix;
    assert_int_equal(result[2].token, stage.sampled_token);
    stage_free(&stage);
}

static void assert_dropped(const struct question *question, const char *why) {
    struct stage stage;
    open_stage(&stage);
    ask(&stage, question);
    assert_int_equal(stage_count(&stage, EFFECT_COMPUTE), 0);
    assert_int_equal(stage_count(&stage, EFFECT_TRANSFER), 0);
    assert_true(stage_traced(&stage, why));
    stage_free(&stage);
}

static void test_questions_that_do_not_fit_are_dropped(void **state) {
    struct question question = make_question(5);
    assert_dropped(&question, "1 to 4 rows");
    question = make_question(1);
    question.header.row_bytes = 16;
    assert_dropped(&question, "rows of 32 bytes");
    question = make_question(1);
    question.header.from_incarnation++;
    assert_dropped(&question, "unknown");
    question = make_question(1);
    question.header.to_incarnation++;
    assert_dropped(&question, "unknown");
    question = make_question(1);
    question.header.from = 30;
    question.header.from_incarnation = life_of(30);
    assert_dropped(&question, "unknown");
    question = make_question(2);
    question.spec[1].first_word = 1; /* its words end behind the frame */
    question.spec[1].bias_count = 1;
    assert_dropped(&question, "row 1");
    question = make_question(1);
    question.word[0] = 32; /* no such token */
    assert_dropped(&question, "row 0");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rows_are_sampled_and_answered),
        cmocka_unit_test(test_questions_that_do_not_fit_are_dropped),
    };
    return cmocka_run_group_tests_name("sampler actor", tests, NULL, NULL);
}
