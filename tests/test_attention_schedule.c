/* What an attention actor plans: pages that are shared, kept and taken back, and which rows go into a
 * step. Experts, samplers and gateways are played by the test. */
#include "tests/support/step.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#define GATEWAY 20

static const actor_id EVERYBODY[] = {20, 21, 30, 31, 40, 41};
static const actor_id TWO_EXPERTS[] = {30, 31};

static void everybody(struct stage *stage) {
    stage_commit(stage, EVERYBODY, 6, TWO_EXPERTS, 2);
}

static void create(struct stage *stage) {
    stage->actor = attention_create(&stage->identity, &stage->settings, &stage->config);
    assert_non_null(stage->actor);
    stage_join(stage, 50);
    everybody(stage);
    stage_clear(stage);
}

static void open_stage(struct stage *stage) {
    stage_init(stage, ROLE_ATTENTION);
    create(stage);
}

/* ---- requests ---- */

struct request {
    Troupe__Submit submit;
    Troupe__Sampling sampling;
    uint32_t token[600];
};

/* `tokens` known tokens (4, 5, 6, ... below 30), all of them prompt. */
static struct request *make_request(uint64_t sequence, uint32_t tokens, uint32_t max_tokens) {
    static struct request request;
    troupe__submit__init(&request.submit);
    troupe__sampling__init(&request.sampling);
    for (uint32_t i = 0; i < tokens; i++)
        request.token[i] = 4 + i % 26;
    request.sampling.top_p = 1;
    request.sampling.repetition_penalty = 1;
    request.submit.sequence = sequence;
    request.submit.n_token = tokens;
    request.submit.token = request.token;
    request.submit.prompt_tokens = tokens;
    request.submit.max_tokens = max_tokens;
    request.submit.sampling = &request.sampling;
    return &request;
}

static void submit(struct stage *stage, actor_id gateway, struct request *request) {
    message envelope = stage_envelope(gateway);
    envelope.body_case = TROUPE__ENVELOPE__BODY_SUBMIT;
    envelope.submit = &request->submit;
    stage_message(stage, &envelope);
}

static const char *described(struct stage *stage) {
    return stage->actor->class->describe(stage->actor);
}

static void assert_described(struct stage *stage, const char *text) {
    if (strstr(described(stage), text) == NULL)
        fail_msg("\"%s\" is not in \"%s\"", text, described(stage));
}

static const Troupe__Tokens *next_tokens(struct stage *stage) {
    const message *envelope = stage_sent(stage, TROUPE__ENVELOPE__BODY_TOKENS);
    assert_non_null(envelope);
    assert_int_equal(envelope->tokens->n_tokens, 1);
    return envelope->tokens->tokens[0];
}

/* ---- pages ---- */

/* Rows and first position of the next EMBED. */
static const struct program *next_embed(struct stage *stage) {
    const struct effect *effect;
    do
        effect = stage_take(stage, EFFECT_COMPUTE);
    while (effect != NULL && effect->compute.kind != PROGRAM_EMBED);
    assert_non_null(effect);
    return &effect->compute;
}

/* Runs a request to its end on a cleared log; returns its first EMBED. */
static const struct program *run_request(struct stage *stage, struct request *request) {
    stage_clear(stage);
    submit(stage, GATEWAY, request);
    const struct program *embed = next_embed(stage);
    stage_answer_all(stage, 9);
    return embed;
}

static void test_a_known_beginning_is_not_computed_again(void **state) {
    struct stage stage;
    open_stage(&stage);
    const struct program *embed = run_request(&stage, make_request(1, 130, 2));
    assert_int_equal(embed->rows, 130);
    assert_described(&stage, "done=1 pages=0/");
    assert_described(&stage, "cached=2 hits=0");
    embed = run_request(&stage, make_request(2, 130, 2));
    assert_int_equal(embed->rows, 2);
    assert_int_equal(embed->row[0].position, 128);
    assert_int_equal(next_tokens(&stage)->cached_tokens, 128);
    assert_described(&stage, "cached=2 hits=128");
    /* the last prompt token is computed in any case: its row draws */
    embed = run_request(&stage, make_request(3, 128, 2));
    assert_int_equal(embed->rows, 64);
    struct request *other = make_request(4, 130, 2);
    other->token[70] = 3; /* only the first page is the same */
    embed = run_request(&stage, other);
    assert_int_equal(embed->row[0].position, 64);
    other = make_request(5, 130, 2);
    other->token[0] = 3;
    assert_int_equal(run_request(&stage, other)->rows, 130);
    stage_free(&stage);
}

/* Bits that recomputing would not give are never shared. */
static void test_pages_of_other_bits_are_not_shared(void **state) {
    struct stage stage;
    open_stage(&stage);
    run_request(&stage, make_request(1, 140, 2));
    struct request *replay = make_request(2, 140, 80); /* the same tokens, from 100 on generated */
    replay->submit.prompt_tokens = 100;
    assert_int_equal(run_request(&stage, replay)->row[0].position, 64);
    replay = make_request(3, 140, 80); /* now they are known in that form, too */
    replay->submit.prompt_tokens = 100;
    assert_int_equal(run_request(&stage, replay)->row[0].position, 128);
    struct request *biased = make_request(4, 140, 2);
    biased->submit.bias_version = 7;
    assert_int_equal(run_request(&stage, biased)->rows, 140);
    struct request *scored = make_request(5, 140, 2); /* asks for every position */
    scored->submit.prompt_logprobs = true;
    assert_int_equal(run_request(&stage, scored)->rows, 140);
    stage_free(&stage);
}

static void test_the_prefix_cache_can_be_switched_off(void **state) {
    struct stage stage;
    stage_init(&stage, ROLE_ATTENTION);
    stage.settings.prefix_cache = 0;
    create(&stage);
    run_request(&stage, make_request(1, 130, 2));
    assert_int_equal(run_request(&stage, make_request(2, 130, 2))->rows, 130);
    assert_described(&stage, "cached=0 hits=0");
    stage_free(&stage);
}

/* Both compute the same pages at the same time; afterwards they hold them together. */
static void test_twins_end_up_with_one_copy(void **state) {
    struct stage stage;
    stage_init(&stage, ROLE_ATTENTION);
    stage.settings.batch_tokens = 300;
    stage.settings.prefill_chunk = 300;
    create(&stage);
    stage.hold_programs = true;
    submit(&stage, GATEWAY, make_request(1, 3, 1)); /* the twins come while it is computed */
    submit(&stage, GATEWAY, make_request(2, 130, 60));
    submit(&stage, GATEWAY, make_request(3, 130, 60));
    stage.hold_programs = false;
    stage_compute(&stage);
    struct effect frame;
    do { /* to the end of the twins' first batch */
        frame = *stage_take(&stage, EFFECT_TRANSFER);
        if (frame.transfer.header.kind == FRAME_DISPATCH)
            stage_combine(&stage, &frame);
        else
            stage_sampled(&stage, &frame, 9);
    } while (frame.transfer.header.kind != FRAME_SAMPLE || frame.transfer.header.rows < 2);
    assert_described(&stage, "running=2 done=1 pages=4/"); /* 2 together, 1 each */
    stage_answer_all(&stage, 9);
    assert_described(&stage, "pages=0/");
    assert_described(&stage, "cached=2 hits=0");
    stage_free(&stage);
}

/* Four pages: what was used least recently makes room, the end of a prefix before its beginning. */
static void test_pages_are_evicted_by_least_recent_use(void **state) {
    struct stage stage;
    stage_init(&stage, ROLE_ATTENTION);
    stage.settings.kv_cache_tokens = 4 * PAGE_TOKENS;
    create(&stage);
    struct request *other = make_request(1, 130, 1);
    other->token[0] = 3;
    run_request(&stage, other); /* 2 known, 1 free again */
    run_request(&stage, make_request(2, 65, 1));
    assert_described(&stage, "cached=3 ");
    assert_int_equal(run_request(&stage, make_request(3, 65, 1))->rows, 1); /* used again */
    struct request *third = make_request(4, 65, 1); /* wants 2, 1 is free */
    third->token[0] = 5;
    run_request(&stage, third);
    assert_int_equal(run_request(&stage, make_request(5, 65, 1))->rows, 1); /* the newer one is there */
    other = make_request(6, 130, 1);
    other->token[0] = 3;
    assert_int_equal(run_request(&stage, other)->row[0].position, 64); /* of the older its beginning */
    assert_described(&stage, "pages=0/4 ");
    assert_null(strstr(described(&stage), "broken"));
    stage_free(&stage);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_known_beginning_is_not_computed_again),
        cmocka_unit_test(test_pages_of_other_bits_are_not_shared),
        cmocka_unit_test(test_the_prefix_cache_can_be_switched_off),
        cmocka_unit_test(test_twins_end_up_with_one_copy),
        cmocka_unit_test(test_pages_are_evicted_by_least_recent_use),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
