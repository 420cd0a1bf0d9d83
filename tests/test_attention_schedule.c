/* What an attention actor plans: pages that are shared, kept and taken back, and which rows go into a
 * step. Experts, samplers and gateways are played by the test. */
#include "tests/support/step.h"

#include "actors/bias_table.h"

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

struct begun {
    uint32_t rows, position; /* of the first EMBED */
};

/* Runs a request to its end on a cleared log. */
static struct begun run_request(struct stage *stage, struct request *request) {
    stage_clear(stage);
    submit(stage, GATEWAY, request);
    const struct program *embed = next_embed(stage);
    struct begun begun = {embed->rows, embed->row[0].position};
    stage_answer_all(stage, 9);
    return begun;
}

static void test_a_known_beginning_is_not_computed_again(void **state) {
    struct stage stage;
    open_stage(&stage);
    struct begun begun = run_request(&stage, make_request(1, 130, 2));
    assert_int_equal(begun.rows, 130);
    assert_described(&stage, "done=1 pages=0/");
    assert_described(&stage, "cached=2 hits=0");
    begun = run_request(&stage, make_request(2, 130, 2));
    assert_int_equal(begun.rows, 2);
    assert_int_equal(begun.position, 128);
    assert_int_equal(next_tokens(&stage)->cached_tokens, 128);
    assert_described(&stage, "cached=2 hits=128");
    /* the last prompt token is computed in any case: its row draws */
    begun = run_request(&stage, make_request(3, 128, 2));
    assert_int_equal(begun.rows, 64);
    struct request *other = make_request(4, 130, 2);
    other->token[70] = 3; /* only the first page is the same */
    begun = run_request(&stage, other);
    assert_int_equal(begun.position, 64);
    other = make_request(5, 130, 2);
    other->token[0] = 3;
    assert_int_equal(run_request(&stage, other).rows, 130);
    stage_free(&stage);
}

/* Hands over a version of the routing bias; its id. */
static uint64_t give_bias(struct stage *stage) {
    const uint32_t pairs = stage->config.layers * stage->config.experts;
    float *delta = calloc(pairs, sizeof *delta);
    Troupe__Bias bias = TROUPE__BIAS__INIT;
    assert_non_null(delta);
    delta[pairs - 1] = 0.25f;
    bias.version = bias_id(7, delta, pairs);
    bias.delta = delta;
    bias.n_delta = pairs;
    message envelope = stage_envelope(ACTOR_COORDINATOR);
    envelope.body_case = TROUPE__ENVELOPE__BODY_BIAS;
    envelope.bias = &bias;
    stage_message(stage, &envelope);
    free(delta);
    return bias.version;
}

/* Bits that recomputing would not give are never shared. */
static void test_pages_of_other_bits_are_not_shared(void **state) {
    struct stage stage;
    open_stage(&stage);
    run_request(&stage, make_request(1, 140, 2));
    struct request *replay = make_request(2, 140, 80); /* the same tokens, from 100 on generated */
    replay->submit.prompt_tokens = 100;
    assert_int_equal(run_request(&stage, replay).position, 64);
    replay = make_request(3, 140, 80); /* now they are known in that form, too */
    replay->submit.prompt_tokens = 100;
    assert_int_equal(run_request(&stage, replay).position, 128);
    struct request *biased = make_request(4, 140, 2);
    biased->submit.bias_version = give_bias(&stage);
    assert_int_equal(run_request(&stage, biased).rows, 140);
    struct request *scored = make_request(5, 140, 2); /* asks for every position */
    scored->submit.prompt_logprobs = true;
    assert_int_equal(run_request(&stage, scored).rows, 140);
    stage_free(&stage);
}

static void test_the_prefix_cache_can_be_switched_off(void **state) {
    struct stage stage;
    stage_init(&stage, ROLE_ATTENTION);
    stage.settings.prefix_cache = 0;
    create(&stage);
    run_request(&stage, make_request(1, 130, 2));
    assert_int_equal(run_request(&stage, make_request(2, 130, 2)).rows, 130);
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
    uint32_t samples = 0;
    do { /* to the end of the twins' first batch: each asks another sampler */
        frame = *stage_take(&stage, EFFECT_TRANSFER);
        if (frame.transfer.header.kind == FRAME_DISPATCH)
            stage_combine(&stage, &frame);
        else
            stage_sampled(&stage, &frame, 9);
        samples += frame.transfer.header.kind == FRAME_SAMPLE;
    } while (samples < 3);
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
    assert_int_equal(run_request(&stage, make_request(3, 65, 1)).rows, 1); /* used again */
    struct request *third = make_request(4, 65, 1); /* wants 2, 1 is free */
    third->token[0] = 5;
    run_request(&stage, third);
    assert_int_equal(run_request(&stage, make_request(5, 65, 1)).rows, 1); /* the newer one is there */
    other = make_request(6, 130, 1);
    other->token[0] = 3;
    assert_int_equal(run_request(&stage, other).position, 64); /* of the older its beginning */
    assert_described(&stage, "pages=0/4 ");
    assert_null(strstr(described(&stage), "broken"));
    stage_free(&stage);
}

/* ---- guesses ---- */

static void open_guessing(struct stage *stage, uint32_t steps) {
    stage_init(stage, ROLE_ATTENTION);
    stage->config.mtp_layers = 1;
    stage->settings.mtp_steps = steps;
    stage->settings.mtp_acceptance = 0;
    stage->guessed_token = 20;
    create(stage);
}

/* A SAMPLE frame is answered with a token for each of its rows. */
static void answer_rows(struct stage *stage, const struct effect *sample, const uint32_t *token) {
    struct frame_header header = answer_to(sample, FRAME_SAMPLED);
    struct sample_result result[8] = {0};
    header.rows = sample->transfer.header.rows;
    assert_in_range(header.rows, 1, 8);
    for (uint32_t i = 0; i < header.rows; i++)
        result[i].token = token[i];
    stage_frame(stage, &header, result, header.rows * sizeof *result);
}

/* Answers experts up to the step's SAMPLE frame. */
static struct effect next_sample(struct stage *stage) {
    for (;;) {
        const struct effect *effect = stage_take(stage, EFFECT_TRANSFER);
        assert_non_null(effect);
        struct effect frame = *effect;
        if (frame.transfer.header.kind == FRAME_SAMPLE)
            return frame;
        stage_combine(stage, &frame);
    }
}

static const struct program *next_of(struct stage *stage, enum program_kind kind) {
    const struct effect *effect;
    do
        effect = stage_take(stage, EFFECT_COMPUTE);
    while (effect != NULL && effect->compute.kind != kind);
    assert_non_null(effect);
    return &effect->compute;
}

static void assert_told(struct stage *stage, uint32_t first, const uint32_t *token, uint32_t count) {
    const Troupe__Tokens *tokens = next_tokens(stage);
    assert_int_equal(tokens->first, first);
    assert_int_equal(tokens->n_token, count);
    for (uint32_t i = 0; i < count; i++)
        assert_int_equal(tokens->token[i]->id, token[i]);
}

static void test_guesses_are_verified_together(void **state) {
    struct stage stage;
    open_guessing(&stage, 2);
    submit(&stage, GATEWAY, make_request(1, 3, 8));
    struct effect sample = next_sample(&stage);
    assert_int_equal(sample.transfer.header.rows, 1);
    stage.hold_programs = true; /* so that the batch's rows stay as they are while they are looked at */
    answer_rows(&stage, &sample, (uint32_t[]){9});
    assert_told(&stage, 0, (uint32_t[]){9}, 1); /* at once, before the next ones are guessed */
    const struct program *draft = next_of(&stage, PROGRAM_DRAFT);
    assert_int_equal(draft->items, 3); /* the prompt's rows, the last one with guesses */
    for (uint32_t i = 0; i < 3; i++) {
        assert_int_equal(draft->draft[i].row, i);
        assert_int_equal(draft->draft[i].next, i < 2 ? 5 + i : 9);
        assert_int_equal(draft->draft[i].steps, i < 2 ? 0 : 2);
    }
    assert_true(draft->spec[0].counter == 4);
    stage.hold_programs = false;
    stage_compute(&stage);
    const struct program *embed = next_of(&stage, PROGRAM_EMBED);
    assert_int_equal(embed->rows, 3); /* 9 and the guesses 20, 21 */
    for (uint32_t i = 0; i < 3; i++) {
        assert_int_equal(embed->row[i].token, i == 0 ? 9 : 19 + i);
        assert_int_equal(embed->row[i].position, 3 + i);
        assert_int_equal(embed->row[i].form, MLA_ABSORBED);
    }
    sample = next_sample(&stage);
    assert_int_equal(sample.transfer.header.rows, 3);
    const struct sample_spec *spec = sample.transfer.prefix;
    for (uint32_t i = 0; i < 3; i++)
        assert_true(spec[i].counter == 4 + i);
    answer_rows(&stage, &sample, (uint32_t[]){20, 21, 22}); /* both are true: three tokens */
    assert_told(&stage, 1, (uint32_t[]){20, 21, 22}, 3);
    assert_described(&stage, "drafted=2 accepted=2");
    embed = next_of(&stage, PROGRAM_EMBED);
    assert_int_equal(embed->row[0].token, 22);
    assert_int_equal(embed->row[0].position, 6);
    sample = next_sample(&stage);
    answer_rows(&stage, &sample, (uint32_t[]){20, 30, 31}); /* the second guess, 21, is wrong */
    assert_told(&stage, 4, (uint32_t[]){20, 30}, 2);
    embed = next_of(&stage, PROGRAM_EMBED);
    assert_int_equal(embed->row[0].token, 30); /* in the place of the wrong guess */
    assert_int_equal(embed->row[0].position, 8);
    assert_int_equal(embed->rows, 2); /* two more tokens are wanted: one guess */
    sample = next_sample(&stage);
    answer_rows(&stage, &sample, (uint32_t[]){9, 10}); /* wrong at once */
    assert_told(&stage, 6, (uint32_t[]){9}, 1);
    sample = next_sample(&stage);
    assert_int_equal(sample.transfer.header.rows, 1); /* the last one: nothing to guess */
    answer_rows(&stage, &sample, (uint32_t[]){11});
    const Troupe__Tokens *last = next_tokens(&stage);
    assert_int_equal(last->finish, TROUPE__FINISH_REASON__FINISH_LENGTH);
    assert_int_equal(last->accepted_drafts, 3);
    assert_int_equal(last->rejected_drafts, 2);
    assert_described(&stage, "done=1 pages=0/");
    stage_free(&stage);
}

/* What a draw at a later row is told is what it would be told a step later. */
static void test_penalties_count_the_guesses_before(void **state) {
    struct stage stage;
    open_guessing(&stage, 2);
    struct request *request = make_request(1, 3, 8);
    request->sampling.frequency_penalty = 0.5f;
    request->submit.min_tokens = 3;
    request->submit.n_stop_token = 1;
    request->submit.stop_token = (uint32_t[]){30};
    submit(&stage, GATEWAY, request);
    struct effect sample = next_sample(&stage);
    answer_rows(&stage, &sample, (uint32_t[]){20}); /* the same as the first guess will be */
    for (int attempt = 0; attempt < 2; attempt++) {
        sample = next_sample(&stage);
        const struct sample_spec *spec = sample.transfer.prefix;
        const uint32_t *words = (const uint32_t *)(spec + 3);
        assert_int_equal(sample.transfer.header.rows, 3);
        for (uint32_t i = 0; i < 3; i++) {
            const uint32_t *output = words + spec[i].first_word + 2 * spec[i].bias_count;
            assert_int_equal(spec[i].bias_count, i < 2 ? 2 : 0); /* 3 tokens: stops are allowed */
            assert_int_equal(spec[i].output_count, i < 2 ? 1 : 2);
            assert_int_equal(output[0], 20);
            assert_int_equal(output[1], i == 0 ? 1 : 2);
            if (i == 2) {
                assert_int_equal(output[2], 21);
                assert_int_equal(output[3], 1);
            }
        }
        if (attempt == 0) /* the sampler dies: the same is asked of the other one */
            stage_peer_lost(&stage, sample.transfer.header.to);
    }
    answer_rows(&stage, &sample, (uint32_t[]){20, 21, 30}); /* ends at the stop token */
    stage_answer_all(&stage, 9);
    assert_described(&stage, "done=1 pages=0/");
    assert_described(&stage, "drafted=2 accepted=2");
    stage_free(&stage);
}

static void test_nothing_follows_an_end(void **state) {
    struct stage stage;
    open_guessing(&stage, 2);
    submit(&stage, GATEWAY, make_request(1, 3, 8));
    struct effect sample = next_sample(&stage);
    answer_rows(&stage, &sample, (uint32_t[]){9});
    sample = next_sample(&stage);
    stage_clear(&stage);
    answer_rows(&stage, &sample, (uint32_t[]){1, 21, 22}); /* 1 ends it, true guess or not */
    const Troupe__Tokens *tokens = next_tokens(&stage);
    assert_int_equal(tokens->n_token, 1);
    assert_int_equal(tokens->finish, TROUPE__FINISH_REASON__FINISH_STOP);
    assert_described(&stage, "done=1 pages=0/");
    stage_free(&stage);
}

/* Guesses that do not come true are not made for a while, then tried again. */
static void test_guessing_stops_where_it_does_not_pay(void **state) {
    struct stage stage;
    stage_init(&stage, ROLE_ATTENTION);
    stage.config.mtp_layers = 1;
    stage.settings.mtp_steps = 1;
    stage.settings.mtp_acceptance = 0.5;
    stage.guessed_token = 20;
    create(&stage);
    submit(&stage, GATEWAY, make_request(1, 3, 100));
    stage_answer_all(&stage, 9); /* every guess is wrong */
    const char *drafted = strstr(described(&stage), "drafted=") + 8;
    assert_in_range(atoi(drafted), 6, 24); /* of 98: a few, and now and then a few again */
    assert_described(&stage, "accepted=0");
    stage_free(&stage);
    stage_init(&stage, ROLE_ATTENTION); /* many sequences: none */
    stage.config.mtp_layers = 1;
    stage.settings.mtp_sequences = 1;
    create(&stage);
    submit(&stage, GATEWAY, make_request(1, 3, 9));
    submit(&stage, GATEWAY, make_request(2, 4, 9));
    stage_answer_all(&stage, 9);
    drafted = strstr(described(&stage), "drafted=") + 8;
    assert_in_range(atoi(drafted), 0, 2); /* while the first was alone */
    stage_free(&stage);
}

/* Cancelled while the next tokens are guessed: gone when they are. */
static void test_cancel_while_guessing(void **state) {
    struct stage stage;
    open_guessing(&stage, 2);
    submit(&stage, GATEWAY, make_request(1, 3, 8));
    struct effect sample = next_sample(&stage);
    stage.hold_programs = true;
    answer_rows(&stage, &sample, (uint32_t[]){9});
    Troupe__Cancel cancel = TROUPE__CANCEL__INIT;
    cancel.sequence = 1;
    message envelope = stage_envelope(GATEWAY);
    envelope.body_case = TROUPE__ENVELOPE__BODY_CANCEL;
    envelope.cancel = &cancel;
    stage_message(&stage, &envelope);
    assert_described(&stage, "running=1");
    stage_compute(&stage);
    assert_described(&stage, "sequences=0 waiting=0 running=0 done=0 pages=0/");
    assert_described(&stage, "phase=0");
    stage_free(&stage);
}

/* ---- who runs ---- */

/* Reads all TOKENS of the log: each sequence's in order, without gap or repetition. Returns how many
 * tokens the sequences 1..8 were told in all; ret_end[i]: which one ended i-th. */
static uint32_t check_streams(struct stage *stage, uint64_t *ret_end) {
    uint32_t next[9] = {0}, ends = 0, count = 0;
    const message *envelope;
    while ((envelope = stage_sent(stage, TROUPE__ENVELOPE__BODY_TOKENS)) != NULL)
        for (size_t i = 0; i < envelope->tokens->n_tokens; i++) {
            const Troupe__Tokens *tokens = envelope->tokens->tokens[i];
            assert_in_range(tokens->sequence, 1, 8);
            assert_int_equal(tokens->first, next[tokens->sequence]);
            next[tokens->sequence] += (uint32_t)tokens->n_token;
            count += (uint32_t)tokens->n_token;
            if (tokens->finish != TROUPE__FINISH_REASON__FINISH_NONE)
                ret_end[ends++] = tokens->sequence;
        }
    return count;
}

static void test_the_youngest_is_put_back_when_pages_run_out(void **state) {
    for (uint32_t prefix_cache = 0; prefix_cache < 2; prefix_cache++) {
        struct stage stage;
        stage_init(&stage, ROLE_ATTENTION);
        stage.settings.kv_cache_tokens = 4 * PAGE_TOKENS;
        stage.settings.prefix_cache = prefix_cache;
        create(&stage);
        for (uint64_t i = 1; i <= 3; i++) { /* each grows to 3 pages */
            struct request *request = make_request(i, 60, 100);
            request->token[0] = 3 + (uint32_t)i;
            submit(&stage, GATEWAY, request);
        }
        stage_answer_all(&stage, 9);
        uint64_t end[3] = {0};
        assert_int_equal(check_streams(&stage, end), 300);
        for (uint64_t i = 1; i <= 3; i++)
            assert_true(end[i - 1] == i); /* the older one first */
        assert_null(strstr(described(&stage), "preempted=0"));
        assert_described(&stage, "done=3 pages=0/4 ");
        assert_null(strstr(described(&stage), "broken"));
        stage_free(&stage);
    }
}

/* What is computed again takes the forms that it took the first time. */
static void test_put_back_tokens_keep_their_form(void **state) {
    struct stage stage;
    stage_init(&stage, ROLE_ATTENTION);
    stage.settings.max_sequences = 1;
    stage.settings.prefix_cache = 0;
    create(&stage);
    struct request *request = make_request(1, 5, 10);
    request->submit.priority = 1;
    submit(&stage, GATEWAY, request);
    for (uint32_t i = 0; i < 3; i++) { /* three tokens, the fourth on its way */
        struct effect sample = next_sample(&stage);
        stage_sampled(&stage, &sample, 20 + i);
    }
    struct effect sample = next_sample(&stage);
    submit(&stage, GATEWAY, make_request(2, 7, 1)); /* of a better priority: at once */
    stage_sampled(&stage, &sample, 23);
    assert_described(&stage, "waiting=1 running=1");
    assert_described(&stage, "preempted=1");
    sample = next_sample(&stage);
    stage.hold_programs = true;
    stage_sampled(&stage, &sample, 9);
    const struct effect *effect;
    const struct program *embed = NULL;
    while ((effect = stage_take(&stage, EFFECT_COMPUTE)) != NULL)
        if (effect->compute.kind == PROGRAM_EMBED)
            embed = &effect->compute; /* the last one */
    assert_int_equal(embed->rows, 9); /* 5 and 4 */
    for (uint32_t i = 0; i < 9; i++) {
        assert_int_equal(embed->row[i].position, i);
        assert_int_equal(embed->row[i].token, i < 5 ? 4 + i : 15 + i);
        assert_int_equal(embed->row[i].form, i < 5 ? MLA_EXPANDED : MLA_ABSORBED);
    }
    stage.hold_programs = false;
    stage_compute(&stage);
    stage_answer_all(&stage, 9);
    uint64_t end[2] = {0};
    assert_int_equal(check_streams(&stage, end), 11);
    assert_true(end[0] == 2 && end[1] == 1);
    stage_free(&stage);
}

static void test_priorities_decide_who_waits(void **state) {
    static const int32_t PRIORITY[] = {0, 3, -1, 3, 0};
    static const uint64_t EXPECTED[] = {3, 1, 5, 2, 4}; /* by priority, then by arrival */
    struct stage stage;
    stage_init(&stage, ROLE_ATTENTION);
    stage.settings.max_sequences = 1;
    create(&stage);
    for (uint64_t i = 1; i <= 5; i++) {
        struct request *request = make_request(i, 4, 3);
        request->submit.priority = PRIORITY[i - 1];
        submit(&stage, GATEWAY, request);
    }
    stage_answer_all(&stage, 9);
    uint64_t end[5] = {0};
    assert_int_equal(check_streams(&stage, end), 15);
    for (uint32_t i = 0; i < 5; i++)
        assert_true(end[i] == EXPECTED[i]);
    stage_free(&stage);
}

/* A prompt that is scored is put back and told once. */
static void test_scores_are_told_once(void **state) {
    struct stage stage;
    stage_init(&stage, ROLE_ATTENTION);
    stage.settings.max_sequences = 1;
    stage.settings.prefill_chunk = 4;
    create(&stage);
    struct request *request = make_request(1, 10, 2);
    request->submit.prompt_logprobs = true;
    request->submit.priority = 1;
    submit(&stage, GATEWAY, request);
    struct effect sample = next_sample(&stage);
    stage_sampled(&stage, &sample, 9); /* the scores of the first 4 */
    sample = next_sample(&stage);
    submit(&stage, GATEWAY, make_request(2, 3, 1));
    stage_sampled(&stage, &sample, 9);
    assert_described(&stage, "preempted=1");
    stage_answer_all(&stage, 9);
    uint32_t prompt = 0;
    const message *envelope;
    while ((envelope = stage_sent(&stage, TROUPE__ENVELOPE__BODY_TOKENS)) != NULL)
        if (envelope->tokens->tokens[0]->n_prompt > 0) {
            assert_int_equal(envelope->tokens->tokens[0]->prompt_first, prompt);
            prompt += (uint32_t)envelope->tokens->tokens[0]->n_prompt;
        }
    assert_int_equal(prompt, 9);
    assert_described(&stage, "done=2 pages=0/");
    stage_free(&stage);
}

#define US 1000u

/* Ends the step under way so long after it began. */
static void end_step(struct stage *stage, uint64_t ns) {
    struct effect sample = next_sample(stage);
    stage->now_ns += ns;
    stage_sampled(stage, &sample, 9);
}

static uint32_t last_rows(struct stage *stage) {
    const struct effect *effect;
    uint32_t rows = 0;
    while ((effect = stage_take(stage, EFFECT_COMPUTE)) != NULL)
        if (effect->compute.kind == PROGRAM_EMBED)
            rows = effect->compute.rows;
    return rows;
}

static void test_prompts_join_within_the_step_budget(void **state) {
    struct stage stage;
    stage_init(&stage, ROLE_ATTENTION);
    stage.settings.step_budget_us = 1000;
    create(&stage);
    submit(&stage, GATEWAY, make_request(1, 100, 60));
    end_step(&stage, 1000 * US); /* its prompt: 10 us a row */
    for (int i = 0; i < 8; i++)
        end_step(&stage, 400 * US); /* steps that only decode */
    submit(&stage, GATEWAY, make_request(2, 200, 1));
    assert_int_equal(last_rows(&stage), 1);
    end_step(&stage, 400 * US);
    assert_int_equal(last_rows(&stage), 1 + 60);  /* (1000 - 400) / 10 */
    end_step(&stage, (400 + 60 * 18) * US);       /* they took 18 us each */
    assert_int_equal(last_rows(&stage), 1 + 54);  /* believed by an eighth: 11 */
    end_step(&stage, 100000 * US);
    assert_int_equal(last_rows(&stage), 1 + 16);  /* at least */
    stage_answer_all(&stage, 9);
    assert_described(&stage, "done=2 pages=0/");
    stage_free(&stage);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_known_beginning_is_not_computed_again),
        cmocka_unit_test(test_pages_of_other_bits_are_not_shared),
        cmocka_unit_test(test_the_prefix_cache_can_be_switched_off),
        cmocka_unit_test(test_twins_end_up_with_one_copy),
        cmocka_unit_test(test_pages_are_evicted_by_least_recent_use),
        cmocka_unit_test(test_guesses_are_verified_together),
        cmocka_unit_test(test_penalties_count_the_guesses_before),
        cmocka_unit_test(test_nothing_follows_an_end),
        cmocka_unit_test(test_guessing_stops_where_it_does_not_pay),
        cmocka_unit_test(test_cancel_while_guessing),
        cmocka_unit_test(test_the_youngest_is_put_back_when_pages_run_out),
        cmocka_unit_test(test_put_back_tokens_keep_their_form),
        cmocka_unit_test(test_priorities_decide_who_waits),
        cmocka_unit_test(test_scores_are_told_once),
        cmocka_unit_test(test_prompts_join_within_the_step_budget),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
