/* The attention actor and versions of the routing bias: rows carry their sequence's own version,
 * whatever shares the batch; a version that is not here is asked for and never replaced by another;
 * heartbeats tell what is held and used; what is released is freed. */
#include "actors/bias_table.h"
#include "tests/support/step.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#define GATEWAY 20
#define PAIRS   12 /* 3 layers, 4 experts */

static const actor_id EVERYBODY[] = {20, 21, 30, 31, 40, 41};
static const actor_id TWO_EXPERTS[] = {30, 31};

static void open_stage(struct stage *stage) {
    stage_init(stage, ROLE_ATTENTION);
    stage->actor = attention_create(&stage->identity, &stage->settings, &stage->config);
    assert_non_null(stage->actor);
    stage_join(stage, 50);
    stage_commit(stage, EVERYBODY, 6, TWO_EXPERTS, 2);
    stage_clear(stage);
}

static const float *delta_of(uint32_t number) {
    static float delta[4][PAIRS];
    assert_true(number < 4);
    for (uint32_t i = 0; i < PAIRS; i++)
        delta[number][i] = (float)(number * 16 + i) / 256;
    return delta[number];
}

static uint64_t id_of(uint32_t number) {
    return number == 0 ? 0 : bias_id(number, delta_of(number), PAIRS);
}

static void hand_over(struct stage *stage, actor_id from, uint32_t number) {
    Troupe__Bias bias = TROUPE__BIAS__INIT;
    bias.version = id_of(number);
    bias.delta = (float *)delta_of(number);
    bias.n_delta = PAIRS;
    message envelope = stage_envelope(from);
    envelope.body_case = TROUPE__ENVELOPE__BODY_BIAS;
    envelope.bias = &bias;
    stage_message(stage, &envelope);
}

static void release(struct stage *stage, actor_id from, uint32_t number) {
    Troupe__BiasRelease body = TROUPE__BIAS_RELEASE__INIT;
    body.version = id_of(number);
    message envelope = stage_envelope(from);
    envelope.body_case = TROUPE__ENVELOPE__BODY_BIAS_RELEASE;
    envelope.bias_release = &body;
    stage_message(stage, &envelope);
}

static void submit(struct stage *stage, uint64_t sequence, uint32_t tokens, uint32_t max_tokens,
                   uint64_t version) {
    static uint32_t token[64];
    Troupe__Sampling sampling = TROUPE__SAMPLING__INIT;
    Troupe__Submit body = TROUPE__SUBMIT__INIT;
    for (uint32_t i = 0; i < 64; i++)
        token[i] = 4 + i % 26;
    sampling.top_p = sampling.repetition_penalty = 1;
    body.sequence = sequence;
    body.token = token;
    body.n_token = body.prompt_tokens = tokens;
    body.max_tokens = max_tokens;
    body.sampling = &sampling;
    body.bias_version = version;
    message envelope = stage_envelope(GATEWAY);
    envelope.body_case = TROUPE__ENVELOPE__BODY_SUBMIT;
    envelope.submit = &body;
    stage_message(stage, &envelope);
}

static void cancel(struct stage *stage, uint64_t sequence) {
    Troupe__Cancel body = TROUPE__CANCEL__INIT;
    body.sequence = sequence;
    message envelope = stage_envelope(GATEWAY);
    envelope.body_case = TROUPE__ENVELOPE__BODY_CANCEL;
    envelope.cancel = &body;
    stage_message(stage, &envelope);
}

static void assert_described(struct stage *stage, const char *text) {
    const char *found = stage->actor->class->describe(stage->actor);
    if (strstr(found, text) == NULL)
        fail_msg("\"%s\" is not in \"%s\"", text, found);
}

static void assert_rejected_for(struct stage *stage, uint64_t sequence, uint64_t version) {
    const message *sent = stage_sent(stage, TROUPE__ENVELOPE__BODY_REJECTED);
    assert_non_null(sent);
    assert_true(sent->rejected->sequence == sequence && sent->rejected->bias_wanted == version);
    assert_false(sent->rejected->unknown);
}

static uint32_t embeds(const struct stage *stage) {
    uint32_t count = 0;
    for (uint32_t i = 0; i < stage->log.count; i++)
        count += stage->log.list[i].kind == EFFECT_COMPUTE &&
                 stage->log.list[i].compute.kind == PROGRAM_EMBED;
    return count;
}

/* The rows of the batch in flight: those of the last EMBED. */
static const struct program *rows_now(const struct stage *stage) {
    for (uint32_t i = stage->log.count; i-- > 0;)
        if (stage->log.list[i].kind == EFFECT_COMPUTE &&
            stage->log.list[i].compute.kind == PROGRAM_EMBED)
            return &stage->log.list[i].compute;
    fail_msg("no batch has begun");
    return NULL;
}

/* Answers experts and samplers until the next batch begins, or nothing is asked any more. */
static void end_batch(struct stage *stage) {
    uint32_t before = embeds(stage);
    for (const struct effect *effect;
         embeds(stage) == before && (effect = stage_take(stage, EFFECT_TRANSFER)) != NULL;) {
        struct effect frame = *effect;
        if (frame.transfer.header.kind == FRAME_DISPATCH)
            stage_combine(stage, &frame);
        else
            stage_sampled(stage, &frame, 9);
    }
}

static void test_rows_carry_the_version_of_their_sequence(void **state) {
    static const uint32_t version[4] = {0, 1, 2, 1}; /* by the number of the sequence */
    struct stage stage;
    open_stage(&stage);
    hand_over(&stage, ACTOR_COORDINATOR, 1);
    hand_over(&stage, ACTOR_COORDINATOR, 2);
    submit(&stage, 1, 1, 8, 0); /* its first batch begins; the others wait for the second */
    for (uint64_t i = 1; i < 4; i++)
        submit(&stage, 1 + i, (uint32_t)i, 8, id_of(version[i]));
    assert_int_equal(rows_now(&stage)->rows, 1);
    end_batch(&stage);
    const struct program *embed = rows_now(&stage);
    assert_int_equal(embed->rows, 1 + 1 + 2 + 3);
    for (uint32_t i = 0; i < embed->rows; i++) {
        uint32_t wanted = version[embed->row[i].sequence];
        if (wanted == 0)
            assert_null(embed->row[i].bias);
        else
            assert_memory_equal(embed->row[i].bias, delta_of(wanted), PAIRS * sizeof(float));
    }
    assert_described(&stage, "bias=2 bias_users=3");
    stage_free(&stage);
}

static void test_a_version_that_is_not_here_is_asked_for(void **state) {
    struct stage stage;
    open_stage(&stage);
    hand_over(&stage, ACTOR_COORDINATOR, 1);
    submit(&stage, 7, 3, 2, id_of(2));
    assert_rejected_for(&stage, 7, id_of(2));
    assert_described(&stage, "sequences=0");
    assert_null(stage_take(&stage, EFFECT_COMPUTE)); /* nothing is run with another one */
    submit(&stage, 7, 3, 2, id_of(2) + 1);           /* the same number, other deltas */
    assert_rejected_for(&stage, 7, id_of(2) + 1);
    hand_over(&stage, GATEWAY, 2);
    submit(&stage, 7, 3, 2, id_of(2));
    assert_described(&stage, "sequences=1");
    const struct program *embed = rows_now(&stage);
    for (uint32_t i = 0; i < embed->rows; i++)
        assert_memory_equal(embed->row[i].bias, delta_of(2), PAIRS * sizeof(float));
    stage_free(&stage);
}

static void test_the_version_is_kept_from_token_to_token(void **state) {
    struct stage stage;
    open_stage(&stage);
    hand_over(&stage, ACTOR_COORDINATOR, 1);
    submit(&stage, 7, 3, 4, id_of(1));
    for (uint32_t step = 0; step < 4; step++) {
        const struct program *embed = rows_now(&stage);
        assert_int_equal(embed->row[0].position, step == 0 ? 0 : 2 + step);
        for (uint32_t i = 0; i < embed->rows; i++)
            assert_memory_equal(embed->row[i].bias, delta_of(1), PAIRS * sizeof(float));
        hand_over(&stage, ACTOR_COORDINATOR, 2); /* there is a newer one meanwhile */
        release(&stage, ACTOR_COORDINATOR, 1);
        end_batch(&stage);
    }
    assert_described(&stage, "done=1");
    assert_described(&stage, "bias=2 bias_users=0"); /* what is done needs it no more */
    release(&stage, ACTOR_COORDINATOR, 1);
    assert_described(&stage, "bias=1 bias_users=0");
    stage_free(&stage);
}

static void test_whoever_ends_gives_its_version_back(void **state) {
    struct stage stage;
    open_stage(&stage);
    hand_over(&stage, ACTOR_COORDINATOR, 1);
    submit(&stage, 7, 3, 4, id_of(1));
    submit(&stage, 8, 3, 4, id_of(1));
    assert_described(&stage, "bias=1 bias_users=2");
    cancel(&stage, 8); /* waits */
    cancel(&stage, 7); /* in a batch */
    stage_answer_all(&stage, 9);
    assert_described(&stage, "bias=1 bias_users=0");
    submit(&stage, 9, 3, 4, id_of(1));
    stage_peer_lost(&stage, GATEWAY);
    stage_answer_all(&stage, 9);
    assert_described(&stage, "bias=1 bias_users=0");
    stage_free(&stage);
}

static void test_heartbeats_tell_what_is_held(void **state) {
    struct stage stage;
    open_stage(&stage);
    hand_over(&stage, ACTOR_COORDINATOR, 1); /* told at once: others wait for it */
    const message *sent = stage_sent(&stage, TROUPE__ENVELOPE__BODY_HEARTBEAT);
    assert_non_null(sent);
    assert_int_equal(sent->heartbeat->n_bias_version, 1);
    assert_true(sent->heartbeat->bias_version[0] == id_of(1) &&
                sent->heartbeat->bias_users[0] == 0);
    hand_over(&stage, ACTOR_COORDINATOR, 1);
    assert_null(stage_sent(&stage, TROUPE__ENVELOPE__BODY_HEARTBEAT));
    submit(&stage, 7, 3, 4, id_of(1));
    stage_timer(&stage, stage.now_ns + 1000000000u);
    sent = stage_sent(&stage, TROUPE__ENVELOPE__BODY_HEARTBEAT);
    assert_non_null(sent);
    assert_true(sent->heartbeat->bias_users[0] == 1);
    stage_free(&stage);
}

/* Only the coordinator releases; only it and gateways hand over; nobody changes a version. */
static void test_who_may_say_what(void **state) {
    struct stage stage;
    open_stage(&stage);
    hand_over(&stage, 30, 1); /* an expert */
    assert_described(&stage, "bias=0");
    hand_over(&stage, GATEWAY, 1);
    assert_described(&stage, "bias=1");
    release(&stage, GATEWAY, 1);
    assert_described(&stage, "bias=1");
    Troupe__Bias bias = TROUPE__BIAS__INIT; /* other deltas under the same name */
    bias.version = id_of(2);
    bias.delta = (float *)delta_of(3);
    bias.n_delta = PAIRS;
    message envelope = stage_envelope(ACTOR_COORDINATOR);
    envelope.body_case = TROUPE__ENVELOPE__BODY_BIAS;
    envelope.bias = &bias;
    stage_message(&stage, &envelope);
    assert_described(&stage, "bias=1");
    assert_true(stage_traced(&stage, "its deltas are not those of its name"));
    bias.delta = (float *)delta_of(2);
    bias.n_delta = PAIRS - 1;
    stage_message(&stage, &envelope);
    assert_described(&stage, "bias=1");
    stage_free(&stage);
}

static void test_a_new_coordinator_is_told_the_versions(void **state) {
    struct stage stage;
    open_stage(&stage);
    hand_over(&stage, ACTOR_COORDINATOR, 1);
    hand_over(&stage, ACTOR_COORDINATOR, 2);
    Troupe__Rejoin rejoin = TROUPE__REJOIN__INIT;
    rejoin.incarnation = OWN_LIFE;
    message envelope = stage_envelope(ACTOR_COORDINATOR);
    envelope.from_incarnation = COORDINATOR_LIFE + 1;
    envelope.body_case = TROUPE__ENVELOPE__BODY_REJOIN;
    envelope.rejoin = &rejoin;
    stage_clear(&stage);
    stage_message(&stage, &envelope);
    const message *sent = stage_sent(&stage, TROUPE__ENVELOPE__BODY_HELLO);
    assert_non_null(sent);
    assert_int_equal(sent->hello->n_bias, 2);
    assert_true(sent->hello->bias[0]->version == id_of(1));
    assert_memory_equal(sent->hello->bias[1]->delta, delta_of(2), PAIRS * sizeof(float));
    stage_free(&stage);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rows_carry_the_version_of_their_sequence),
        cmocka_unit_test(test_a_version_that_is_not_here_is_asked_for),
        cmocka_unit_test(test_the_version_is_kept_from_token_to_token),
        cmocka_unit_test(test_whoever_ends_gives_its_version_back),
        cmocka_unit_test(test_heartbeats_tell_what_is_held),
        cmocka_unit_test(test_who_may_say_what),
        cmocka_unit_test(test_a_new_coordinator_is_told_the_versions),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
