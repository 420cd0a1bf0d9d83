/* The attention actor by hand: what it asks for, what it believes, what it gives back. Experts,
 * samplers and gateways are played by the test. */
#include "tests/support/random.h"
#include "tests/support/step.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#define MS      1000000u
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

static void cancel(struct stage *stage, actor_id gateway, uint64_t sequence) {
    Troupe__Cancel cancel = TROUPE__CANCEL__INIT;
    cancel.sequence = sequence;
    message envelope = stage_envelope(gateway);
    envelope.body_case = TROUPE__ENVELOPE__BODY_CANCEL;
    envelope.cancel = &cancel;
    stage_message(stage, &envelope);
}

static void poll(struct stage *stage, uint64_t sequence, uint32_t have, uint32_t have_prompt) {
    Troupe__Poll poll = TROUPE__POLL__INIT;
    poll.sequence = sequence;
    poll.have = have;
    poll.have_prompt = have_prompt;
    message envelope = stage_envelope(GATEWAY);
    envelope.body_case = TROUPE__ENVELOPE__BODY_POLL;
    envelope.poll = &poll;
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

static const struct program *next_program(struct stage *stage, enum program_kind kind) {
    const struct effect *effect = stage_take(stage, EFFECT_COMPUTE);
    assert_non_null(effect);
    assert_int_equal(effect->compute.kind, kind);
    return &effect->compute;
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

/* ---- the form of rows ---- */

/* E4M3 where profile, files and settings agree to it. */
static void test_rows_travel_in_e4m3_in_the_fp8_profile(void **state) {
    static const struct {
        const char *numerics;
        bool experts_e4m3;
        uint32_t dispatch_fp8;
        bool e4m3;
    } cases[] = {
        {"fp8", true, 1, true},   {"fp8-sm90-kv8", true, 1, true}, {"bf16", true, 1, false},
        {"fp8", false, 1, false}, {"fp8", true, 0, false},         {"f32", true, 1, false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct stage stage;
        stage_init(&stage, ROLE_ATTENTION);
        stage.identity.numerics = cases[i].numerics;
        stage.config.experts_e4m3 = cases[i].experts_e4m3;
        stage.settings.dispatch_fp8 = cases[i].dispatch_fp8;
        create(&stage);
        submit(&stage, GATEWAY, make_request(77, 3, 2));
        struct effect sent = next_frame(&stage, FRAME_DISPATCH);
        assert_int_equal(sent.transfer.region, cases[i].e4m3 ? REGION_NORMED_E4M3 : REGION_NORMED);
        assert_int_equal(sent.transfer.header.format,
                         cases[i].e4m3 ? FRAME_ROWS_E4M3 : FRAME_ROWS_PLAIN);
        stage_free(&stage);
    }
}

/* ---- one sequence ---- */

static void test_a_sequence_step_by_step(void **state) {
    struct stage stage;
    open_stage(&stage);
    submit(&stage, GATEWAY, make_request(77, 3, 2));
    const struct program *clear = next_program(&stage, PROGRAM_CLEAR_PAGES);
    assert_int_equal(clear->items, 1);
    const struct program *embed = next_program(&stage, PROGRAM_EMBED);
    assert_int_equal(embed->rows, 3);
    for (uint32_t i = 0; i < 3; i++) {
        assert_int_equal(embed->row[i].token, 4 + i);
        assert_int_equal(embed->row[i].position, i);
        assert_int_equal(embed->row[i].form, MLA_EXPANDED);
        assert_int_equal(embed->row[i].pages[0], clear->select[0]);
    }
    assert_int_equal(next_program(&stage, PROGRAM_LAYER)->layer, 0);
    assert_int_equal(next_program(&stage, PROGRAM_LAYER)->layer, 1);
    /* row r chose experts r and r + 1; even ones are at 30, odd ones at 31 */
    struct effect first = next_frame(&stage, FRAME_DISPATCH);
    assert_int_equal(first.transfer.header.to, 30);
    assert_int_equal(first.transfer.header.items, 3);
    assert_int_equal(first.transfer.header.groups, 2);
    assert_int_equal(first.transfer.header.layer, 1);
    assert_true(first.transfer.header.to_incarnation == life_of(30));
    assert_int_equal(first.transfer.region, REGION_NORMED);
    struct effect second = next_frame(&stage, FRAME_DISPATCH);
    assert_int_equal(second.transfer.header.to, 31);
    assert_int_equal(next_program(&stage, PROGRAM_SHARED)->layer, 1);
    assert_null(stage_take(&stage, EFFECT_COMPUTE)); /* nothing more until the experts answer */
    stage_combine(&stage, &second);
    assert_int_equal(next_program(&stage, PROGRAM_SCATTER)->items, 3);
    assert_null(stage_take(&stage, EFFECT_COMPUTE));
    stage_combine(&stage, &first);
    next_program(&stage, PROGRAM_SCATTER);
    assert_int_equal(next_program(&stage, PROGRAM_COMBINE)->layer, 1);
    assert_int_equal(next_program(&stage, PROGRAM_LAYER)->layer, 2);
    next_program(&stage, PROGRAM_SHARED);
    first = next_frame(&stage, FRAME_DISPATCH);
    second = next_frame(&stage, FRAME_DISPATCH);
    stage_combine(&stage, &first);
    stage_combine(&stage, &second);
    next_program(&stage, PROGRAM_SCATTER);
    next_program(&stage, PROGRAM_SCATTER);
    next_program(&stage, PROGRAM_COMBINE);
    const struct program *finish = next_program(&stage, PROGRAM_FINISH);
    assert_int_equal(finish->items, 1);
    assert_int_equal(finish->select[0], 2);
    struct effect sample = next_frame(&stage, FRAME_SAMPLE);
    const struct sample_spec *spec = sample.transfer.prefix;
    assert_int_equal(spec->flags, SAMPLE_DRAW);
    assert_true(spec->counter == 3);
    stage_sampled(&stage, &sample, 9);
    const Troupe__Tokens *tokens = next_tokens(&stage);
    assert_true(tokens->sequence == 77);
    assert_int_equal(tokens->first, 0);
    assert_int_equal(tokens->n_token, 1);
    assert_int_equal(tokens->token[0]->id, 9);
    assert_int_equal(tokens->finish, TROUPE__FINISH_REASON__FINISH_NONE);
    embed = next_program(&stage, PROGRAM_EMBED); /* the next step: the drawn token, no page */
    assert_int_equal(embed->rows, 1);
    assert_int_equal(embed->row[0].token, 9);
    assert_int_equal(embed->row[0].position, 3);
    assert_int_equal(embed->row[0].form, MLA_ABSORBED);
    stage_answer_all(&stage, 10);
    tokens = next_tokens(&stage);
    assert_int_equal(tokens->first, 1);
    assert_int_equal(tokens->token[0]->id, 10);
    assert_int_equal(tokens->finish, TROUPE__FINISH_REASON__FINISH_LENGTH);
    assert_described(&stage, "sequences=1 waiting=0 running=0 done=1 pages=0/");
    cancel(&stage, GATEWAY, 77);
    assert_described(&stage, "sequences=0");
    stage_free(&stage);
}

static void test_a_dense_model_needs_no_expert(void **state) {
    struct stage stage;
    stage_init(&stage, ROLE_ATTENTION);
    stage.config.experts = 0;
    stage.config.dense_layers = 3;
    stage.config.gate.k = 0;
    stage.actor = attention_create(&stage.identity, &stage.settings, &stage.config);
    stage_join(&stage, 50);
    stage_commit(&stage, EVERYBODY, 6, NULL, 0);
    stage_clear(&stage);
    submit(&stage, GATEWAY, make_request(1, 2, 3));
    stage_answer_all(&stage, 7);
    assert_described(&stage, "done=1 pages=0/");
    assert_int_equal(stage_sent_count(&stage, TROUPE__ENVELOPE__BODY_TOKENS), 3);
    stage_free(&stage);
}

static void test_a_second_submit_is_ignored(void **state) {
    struct stage stage;
    open_stage(&stage);
    stage.hold_programs = true;
    submit(&stage, GATEWAY, make_request(1, 3, 2));
    submit(&stage, GATEWAY, make_request(1, 3, 2));
    assert_described(&stage, "sequences=1 ");
    submit(&stage, 21, make_request(1, 3, 2)); /* another gateway's sequence of that number */
    assert_described(&stage, "sequences=2 ");
    stage_free(&stage);
}

/* ---- what is refused ---- */

static void assert_rejected(struct stage *stage, struct request *request, int code,
                            const char *text) {
    stage_clear(stage);
    submit(stage, GATEWAY, request);
    const message *envelope = stage_sent(stage, TROUPE__ENVELOPE__BODY_REJECTED);
    assert_non_null(envelope);
    assert_int_equal(envelope->rejected->code, code);
    assert_false(envelope->rejected->unknown);
    if (strstr(envelope->rejected->reason, text) == NULL)
        fail_msg("\"%s\" is not in \"%s\"", text, envelope->rejected->reason);
    assert_described(stage, "sequences=0 ");
}

static void test_bad_submissions_are_refused(void **state) {
    struct stage stage;
    open_stage(&stage);
    assert_rejected(&stage, make_request(1, 0, 2), ERR_INVALID, "found 0");
    assert_rejected(&stage, make_request(1, 257, 2), ERR_INVALID, "1 to 256 tokens");
    struct request *request = make_request(1, 3, 2);
    request->token[1] = 32;
    assert_rejected(&stage, request, ERR_INVALID, "token 32 at position 1");
    request = make_request(1, 3, 2);
    request->submit.prompt_tokens = 4;
    assert_rejected(&stage, request, ERR_INVALID, "found 4");
    request->submit.prompt_tokens = 0;
    assert_rejected(&stage, request, ERR_INVALID, "found 0");
    request = make_request(1, 3, 2);
    request->submit.n_stop_token = 1;
    request->submit.stop_token = (uint32_t[]){40};
    assert_rejected(&stage, request, ERR_INVALID, "stop token 40");
    request = make_request(1, 3, 2);
    request->sampling.temperature = -1;
    assert_rejected(&stage, request, ERR_INVALID, "temperature");
    request = make_request(1, 3, 2);
    request->sampling.top_p = 1.5f;
    assert_rejected(&stage, request, ERR_INVALID, "top_p");
    request = make_request(1, 3, 2);
    request->sampling.min_p = -0.5f;
    assert_rejected(&stage, request, ERR_INVALID, "min_p");
    request = make_request(1, 3, 2);
    request->sampling.repetition_penalty = -2;
    assert_rejected(&stage, request, ERR_INVALID, "repetition_penalty");
    request = make_request(1, 3, 2);
    request->sampling.presence_penalty = 2e6f;
    assert_rejected(&stage, request, ERR_INVALID, "penalties");
    request = make_request(1, 3, 2);
    request->sampling.n_bias_token = request->sampling.n_bias_value = 1;
    request->sampling.bias_token = (uint32_t[]){32};
    request->sampling.bias_value = (float[]){1};
    assert_rejected(&stage, request, ERR_INVALID, "biased token 32");
    stage_free(&stage);
}

static void test_room_is_checked_at_submission(void **state) {
    struct stage stage;
    stage_init(&stage, ROLE_ATTENTION);
    stage.settings.kv_cache_tokens = 128; /* 2 pages */
    stage.settings.max_sequences = 1;
    stage.settings.max_waiting = 2;
    create(&stage);
    assert_rejected(&stage, make_request(1, 100, 100), ERR_TOO_LARGE, "needs 4 pages");
    stage_clear(&stage);
    stage.hold_programs = true;
    for (uint64_t i = 1; i <= 3; i++)
        submit(&stage, GATEWAY, make_request(i, 4, 4));
    assert_described(&stage, "sequences=3 waiting=2 running=1");
    submit(&stage, GATEWAY, make_request(4, 4, 4));
    const message *envelope = stage_sent(&stage, TROUPE__ENVELOPE__BODY_REJECTED);
    assert_int_equal(envelope->rejected->code, ERR_BUSY);
    stage_free(&stage);
}

static void test_the_context_bounds_the_answer(void **state) {
    struct stage stage;
    stage_init(&stage, ROLE_ATTENTION);
    stage.settings.context_tokens = 6;
    create(&stage);
    submit(&stage, GATEWAY, make_request(1, 4, 100));
    stage_answer_all(&stage, 9);
    next_tokens(&stage);
    assert_int_equal(next_tokens(&stage)->finish, TROUPE__FINISH_REASON__FINISH_LENGTH);
    assert_described(&stage, "done=1 pages=0/");
    stage_free(&stage);
}

/* ---- replies that do not count ---- */

/* A sequence whose first dispatch is out; returns the frame to actor 30. */
static struct effect dispatched(struct stage *stage) {
    submit(stage, GATEWAY, make_request(1, 3, 2));
    struct effect first = next_frame(stage, FRAME_DISPATCH);
    next_frame(stage, FRAME_DISPATCH);
    stage_clear(stage);
    return first;
}

static void combine_with(struct stage *stage, const struct effect *dispatch,
                         const struct frame_header *changes) {
    struct effect changed = *dispatch;
    struct frame_header *header = &changed.transfer.header;
    header->to = changes->from;
    header->to_incarnation = changes->from_incarnation;
    header->from = changes->to;
    header->from_incarnation = changes->to_incarnation;
    header->batch = changes->batch;
    header->layer = changes->layer;
    header->part = changes->part;
    header->attempt = changes->attempt;
    stage_combine(stage, &changed);
}

static void test_each_kind_of_stale_reply_is_dropped(void **state) {
    struct stage stage;
    open_stage(&stage);
    struct effect dispatch = dispatched(&stage);
    const struct frame_header right = answer_to(&dispatch, FRAME_COMBINE);
    struct frame_header wrong[9];
    for (size_t i = 0; i < 9; i++)
        wrong[i] = right;
    wrong[0].from = 31; /* holds something else */
    wrong[0].from_incarnation = life_of(31);
    wrong[1].from_incarnation++;
    wrong[2].to_incarnation++; /* meant for the process that was here before */
    wrong[3].batch++;
    wrong[4].layer++;
    wrong[5].part = 7;
    wrong[6].attempt++;
    wrong[7].from = 40; /* a sampler */
    wrong[7].from_incarnation = life_of(40);
    wrong[8].to++;
    for (size_t i = 0; i < 9; i++) {
        combine_with(&stage, &dispatch, &wrong[i]);
        assert_int_equal(stage_count(&stage, EFFECT_COMPUTE), 0);
        char stale[16];
        snprintf(stale, sizeof stale, "stale=%zu", i + 1);
        assert_described(&stage, stale);
    }
    stage_combine(&stage, &dispatch);
    assert_int_equal(stage_count(&stage, EFFECT_COMPUTE), 1); /* scattered */
    stage_combine(&stage, &dispatch);                         /* said twice */
    assert_int_equal(stage_count(&stage, EFFECT_COMPUTE), 1);
    assert_described(&stage, "stale=10");
    stage_free(&stage);
}

static void test_a_reply_of_the_wrong_size_is_asked_for_again(void **state) {
    struct stage stage;
    open_stage(&stage);
    struct effect dispatch = dispatched(&stage);
    struct effect longer = dispatch;
    longer.transfer.header.items++;
    stage_combine(&stage, &longer);
    assert_int_equal(stage_count(&stage, EFFECT_COMPUTE), 0);
    struct effect again = next_frame(&stage, FRAME_DISPATCH);
    assert_int_equal(again.transfer.header.attempt, 1);
    assert_int_equal(again.transfer.header.items, dispatch.transfer.header.items);
    stage_combine(&stage, &dispatch); /* the first attempt no longer counts */
    assert_int_equal(stage_count(&stage, EFFECT_COMPUTE), 0);
    stage_combine(&stage, &again);
    assert_int_equal(stage_count(&stage, EFFECT_COMPUTE), 1);
    stage_free(&stage);
}

/* A piece of an answer counts once, in any order; what is missing when the deadline has passed, or when its
 * holder is lost, is asked for again, and nothing else. */
static void test_an_answer_comes_in_pieces(void **state) {
    for (int lost = 0; lost < 3; lost++) {
        struct stage stage;
        open_stage(&stage);
        struct effect dispatch = dispatched(&stage);
        const uint32_t items = dispatch.transfer.header.items;
        assert_true(items >= 3);
        stage_combine_piece(&stage, &dispatch, 1, items - 2);
        assert_int_equal(next_program(&stage, PROGRAM_SCATTER)->items, items - 2);
        stage_combine_piece(&stage, &dispatch, 1, items - 2); /* said twice */
        assert_null(stage_take(&stage, EFFECT_COMPUTE));
        assert_described(&stage, "stale=0");
        stage_combine_piece(&stage, &dispatch, 0, 2); /* the second is there already */
        assert_int_equal(next_program(&stage, PROGRAM_SCATTER)->items, 1);
        if (lost == 0) {
            stage_combine_piece(&stage, &dispatch, items - 1, 1);
            assert_int_equal(next_program(&stage, PROGRAM_SCATTER)->items, 1);
            stage_combine_piece(&stage, &dispatch, items - 1, 1);
            assert_described(&stage, "stale=1");
            stage_free(&stage);
            continue;
        }
        if (lost == 1)
            stage_timer(&stage, stage.now_ns + (uint64_t)stage.settings.row_deadline_ms * MS);
        else
            stage_commit(&stage, (actor_id[]){20, 31, 40}, 3, (actor_id[]){31}, 1);
        struct effect again = next_frame(&stage, FRAME_DISPATCH);
        if (again.transfer.header.items != 1) /* the other process's part was late as well */
            again = next_frame(&stage, FRAME_DISPATCH);
        assert_int_equal(again.transfer.header.items, 1);
        stage_clear(&stage);
        stage_combine_piece(&stage, &dispatch, items - 1, 1); /* of the first attempt */
        assert_described(&stage, "stale=1");
        stage_combine(&stage, &again);
        assert_int_equal(next_program(&stage, PROGRAM_SCATTER)->items, 1);
        stage_free(&stage);
    }
}

static void test_a_piece_outside_of_its_part_is_refused(void **state) {
    struct stage stage;
    open_stage(&stage);
    struct effect dispatch = dispatched(&stage);
    const uint32_t items = dispatch.transfer.header.items;
    stage_combine_piece(&stage, &dispatch, items, 1);
    assert_int_equal(stage_count(&stage, EFFECT_COMPUTE), 0);
    struct effect again = next_frame(&stage, FRAME_DISPATCH);
    stage_combine_piece(&stage, &again, 1, items);
    assert_int_equal(stage_count(&stage, EFFECT_COMPUTE), 0);
    again = next_frame(&stage, FRAME_DISPATCH);
    stage_combine_piece(&stage, &again, FRAME_ITEMS_MAX - 1, items); /* the sum is large */
    assert_int_equal(stage_count(&stage, EFFECT_COMPUTE), 0);
    again = next_frame(&stage, FRAME_DISPATCH);
    assert_int_equal(again.transfer.header.attempt, 3);
    stage_combine(&stage, &again);
    assert_int_equal(stage_count(&stage, EFFECT_COMPUTE), 1);
    stage_free(&stage);
}

/* A row goes to a process once, whatever frame_rows says of answers. */
static void test_a_row_goes_to_a_process_once(void **state) {
    struct stage stage;
    stage_init(&stage, ROLE_ATTENTION);
    stage.settings.frame_rows = 2;
    create(&stage);
    submit(&stage, GATEWAY, make_request(1, 40, 2));
    uint32_t frames = 0, rows = 0;
    const struct effect *effect;
    while ((effect = stage_take(&stage, EFFECT_TRANSFER)) != NULL) {
        frames++;
        rows += effect->transfer.header.rows;
        assert_true(effect->transfer.header.items > 2);
    }
    assert_int_equal(frames, 2);
    assert_true(rows <= 2 * 40);
    stage_free(&stage);
}

static void test_a_stale_sample_reply_is_dropped(void **state) {
    struct stage stage;
    open_stage(&stage);
    submit(&stage, GATEWAY, make_request(1, 3, 1));
    for (int i = 0; i < 4; i++) {
        struct effect dispatch = next_frame(&stage, FRAME_DISPATCH);
        stage_combine(&stage, &dispatch);
    }
    struct effect sample = next_frame(&stage, FRAME_SAMPLE), wrong = sample;
    wrong.transfer.header.attempt++;
    stage_sampled(&stage, &wrong, 9);
    wrong = sample;
    wrong.transfer.header.batch--;
    stage_sampled(&stage, &wrong, 9);
    wrong = sample;
    wrong.transfer.header.to = sample.transfer.header.to == 40 ? 41 : 40;
    wrong.transfer.header.to_incarnation = life_of(wrong.transfer.header.to);
    stage_sampled(&stage, &wrong, 9);
    assert_described(&stage, "stale=3");
    assert_int_equal(stage_sent_count(&stage, TROUPE__ENVELOPE__BODY_TOKENS), 0);
    stage_sampled(&stage, &sample, 99); /* no such token: asked again */
    struct effect again = next_frame(&stage, FRAME_SAMPLE);
    assert_int_equal(again.transfer.header.attempt, 1);
    stage_sampled(&stage, &again, 9);
    assert_int_equal(next_tokens(&stage)->token[0]->id, 9);
    stage_sampled(&stage, &again, 9);
    assert_described(&stage, "stale=4");
    stage_free(&stage);
}

/* ---- experts that move, fall silent, or are lost ---- */

static void moved(struct stage *stage, const struct effect *dispatch) {
    struct frame_header header = answer_to(dispatch, FRAME_MOVED);
    header.detail = 0;
    stage_frame(stage, &header, NULL, 0);
}

static void test_moved_rows_wait_for_the_next_epoch(void **state) {
    struct stage stage;
    open_stage(&stage);
    struct effect dispatch = dispatched(&stage);
    moved(&stage, &dispatch);
    assert_no_frame(&stage); /* nobody else holds them */
    moved(&stage, &dispatch);
    assert_described(&stage, "stale=1");
    stage_commit(&stage, EVERYBODY, 6, (actor_id[]){31}, 1);
    struct effect again = next_frame(&stage, FRAME_DISPATCH);
    assert_int_equal(again.transfer.header.to, 31);
    assert_true(again.transfer.header.attempt > 0);
    assert_true(again.transfer.header.epoch == stage.epoch);
    assert_int_equal(again.transfer.header.items, dispatch.transfer.header.items);
    assert_no_frame(&stage); /* what 31 has got already is not sent again */
    stage_free(&stage);
}

static void test_late_rows_go_to_the_same_holder_if_there_is_no_other(void **state) {
    struct stage stage;
    open_stage(&stage);
    struct effect dispatch = dispatched(&stage);
    uint64_t deadline = stage.now_ns + (uint64_t)stage.settings.row_deadline_ms * MS;
    assert_true(actor_deadline(stage.actor) <= deadline);
    stage_timer(&stage, deadline - 1);
    assert_no_frame(&stage);
    stage_timer(&stage, deadline);
    struct effect again = next_frame(&stage, FRAME_DISPATCH);
    assert_int_equal(again.transfer.header.to, 30);
    assert_true(again.transfer.header.attempt > 0);
    assert_int_equal(next_frame(&stage, FRAME_DISPATCH).transfer.header.to, 31);
    assert_no_frame(&stage);
    stage_combine(&stage, &dispatch);
    assert_described(&stage, "stale=1");
    assert_described(&stage, "resent=2");
    stage_free(&stage);
}

static void test_late_rows_go_to_a_replica(void **state) {
    struct stage stage;
    open_stage(&stage);
    /* every expert at 30 and 31, said in a disorderly way */
    Troupe__Commit commit = TROUPE__COMMIT__INIT;
    Troupe__Member member[4], *members[4];
    const actor_id id[] = {20, 30, 31, 50};
    for (int i = 0; i < 4; i++) {
        troupe__member__init(&member[i]);
        member[i].id = id[i];
        member[i].incarnation = id[i] == 50 ? OWN_LIFE : life_of(id[i]);
        member[i].role = (Troupe__Role)role_of(id[i]);
        members[i] = &member[i];
    }
    uint32_t layer[20], expert[20], holder[20];
    for (uint32_t i = 0; i < 16; i++) {
        layer[i] = 1 + i % 2;
        expert[i] = i / 4;
        holder[i] = i % 4 < 2 ? 31 : 30;
    }
    for (uint32_t i = 16; i < 20; i++) { /* and some that this model does not have */
        layer[i] = i == 16 ? 200 : 1;
        expert[i] = i == 17 ? 1000 : 0;
        holder[i] = i >= 18 ? 39 : 30;
    }
    commit.epoch = ++stage.epoch;
    commit.n_member = 4;
    commit.member = members;
    commit.n_layer = commit.n_expert = commit.n_holder = 20;
    commit.layer = layer;
    commit.expert = expert;
    commit.holder = holder;
    message envelope = stage_envelope(ACTOR_COORDINATOR);
    envelope.body_case = TROUPE__ENVELOPE__BODY_COMMIT;
    envelope.commit = &commit;
    stage_message(&stage, &envelope);
    stage_clear(&stage);
    submit(&stage, GATEWAY, make_request(1, 3, 1));
    struct effect to_first = next_frame(&stage, FRAME_DISPATCH);
    struct effect to_second = next_frame(&stage, FRAME_DISPATCH);
    assert_int_equal(to_first.transfer.header.to, 30);
    assert_int_equal(to_first.transfer.header.items, 3); /* shared evenly */
    assert_int_equal(to_second.transfer.header.to, 31);
    stage_combine(&stage, &to_first);
    stage_timer(&stage, stage.now_ns + (uint64_t)stage.settings.row_deadline_ms * MS);
    struct effect again = next_frame(&stage, FRAME_DISPATCH);
    assert_int_equal(again.transfer.header.to, 30);
    assert_int_equal(again.transfer.header.items, 3);
    stage_peer_lost(&stage, 30);
    assert_int_equal(next_frame(&stage, FRAME_DISPATCH).transfer.header.to, 31);
    stage_free(&stage);
}

static void test_a_lost_holder_s_rows_go_to_others(void **state) {
    struct stage stage;
    open_stage(&stage);
    struct effect dispatch = dispatched(&stage);
    stage_peer_lost(&stage, 30);
    assert_no_frame(&stage); /* the only holder: the rows wait */
    stage_commit(&stage, (actor_id[]){20, 31, 32, 40}, 4, (actor_id[]){32, 31}, 2);
    struct effect again = next_frame(&stage, FRAME_DISPATCH);
    assert_int_equal(again.transfer.header.to, 32);
    assert_int_equal(again.transfer.header.items, dispatch.transfer.header.items);
    assert_no_frame(&stage);
    stage_combine(&stage, &dispatch); /* of the lost one */
    assert_described(&stage, "stale=1");
    stage_free(&stage);
}

static void test_a_holder_wrongly_believed_lost_is_asked_again(void **state) {
    struct stage stage;
    open_stage(&stage);
    dispatched(&stage);
    stage_peer_lost(&stage, 30);
    assert_no_frame(&stage);
    stage_timer(&stage, stage.now_ns + (uint64_t)stage.settings.row_deadline_ms * MS);
    assert_int_equal(next_frame(&stage, FRAME_DISPATCH).transfer.header.to, 30);
    stage_free(&stage);
}

static void test_rows_wait_while_nothing_is_placed(void **state) {
    struct stage stage;
    open_stage(&stage);
    stage_commit(&stage, EVERYBODY, 6, NULL, 0);
    submit(&stage, GATEWAY, make_request(1, 3, 2));
    assert_no_frame(&stage);
    assert_true(stage_traced(&stage, "nobody alive holds"));
    everybody(&stage);
    stage_answer_all(&stage, 9);
    assert_described(&stage, "done=1 pages=0/");
    stage_free(&stage);
}

static void test_a_lost_sampler_s_rows_go_to_another(void **state) {
    struct stage stage;
    open_stage(&stage);
    submit(&stage, GATEWAY, make_request(1, 3, 2));
    for (int i = 0; i < 4; i++) {
        struct effect dispatch = next_frame(&stage, FRAME_DISPATCH);
        stage_combine(&stage, &dispatch);
    }
    struct effect sample = next_frame(&stage, FRAME_SAMPLE);
    actor_id lost = sample.transfer.header.to, other = lost == 40 ? 41 : 40;
    stage_peer_lost(&stage, lost);
    struct effect again = next_frame(&stage, FRAME_SAMPLE);
    assert_int_equal(again.transfer.header.to, other);
    assert_int_equal(again.transfer.header.attempt, 1);
    stage_peer_lost(&stage, other);
    assert_no_frame(&stage);
    stage_commit(&stage, (actor_id[]){20, 30, 31, 42}, 4, TWO_EXPERTS, 2);
    again = next_frame(&stage, FRAME_SAMPLE);
    assert_int_equal(again.transfer.header.to, 42);
    stage_sampled(&stage, &again, 9);
    assert_int_equal(next_tokens(&stage)->token[0]->id, 9);
    stage_free(&stage);
}

static void test_a_silent_sampler_s_rows_go_to_another(void **state) {
    struct stage stage;
    open_stage(&stage);
    submit(&stage, GATEWAY, make_request(1, 3, 2));
    for (int i = 0; i < 4; i++) {
        struct effect dispatch = next_frame(&stage, FRAME_DISPATCH);
        stage_combine(&stage, &dispatch);
    }
    struct effect sample = next_frame(&stage, FRAME_SAMPLE);
    stage_timer(&stage, stage.now_ns + (uint64_t)stage.settings.row_deadline_ms * MS);
    struct effect again = next_frame(&stage, FRAME_SAMPLE);
    assert_int_not_equal(again.transfer.header.to, sample.transfer.header.to);
    stage_free(&stage);
}

/* ---- leaving ---- */

static void assert_nothing_left(struct stage *stage) {
    assert_described(stage, "sequences=0 waiting=0 running=0 done=0 pages=0/");
    assert_described(stage, "phase=0");
}

static void test_cancel_while_waiting(void **state) {
    struct stage stage;
    stage_init(&stage, ROLE_ATTENTION);
    stage.settings.max_sequences = 1;
    create(&stage);
    submit(&stage, GATEWAY, make_request(1, 3, 1));
    submit(&stage, GATEWAY, make_request(2, 3, 1));
    assert_described(&stage, "waiting=1 running=1");
    cancel(&stage, GATEWAY, 2);
    assert_described(&stage, "waiting=0 running=1");
    stage_answer_all(&stage, 9);
    cancel(&stage, GATEWAY, 1);
    assert_nothing_left(&stage);
    stage_free(&stage);
}

/* Cancels after `frames` answered frames, once with the programs still running. */
static void cancel_in_flight(uint32_t frames, bool hold) {
    struct stage stage;
    open_stage(&stage);
    stage.hold_programs = hold;
    submit(&stage, GATEWAY, make_request(1, 3, 5));
    for (uint32_t i = 0; i < frames; i++) {
        struct effect *frame = &(struct effect){0};
        *frame = *stage_take(&stage, EFFECT_TRANSFER);
        if (frame->transfer.header.kind == FRAME_DISPATCH)
            stage_combine(&stage, frame);
        else
            stage_sampled(&stage, frame, 9);
    }
    uint32_t told = stage_sent_count(&stage, TROUPE__ENVELOPE__BODY_TOKENS);
    cancel(&stage, GATEWAY, 1);
    poll(&stage, 1, 0, 0); /* forgotten at once, as seen from outside */
    assert_true(stage_sent(&stage, TROUPE__ENVELOPE__BODY_REJECTED)->rejected->unknown);
    stage_compute(&stage);
    stage.hold_programs = false;
    stage_answer_all(&stage, 9);
    assert_int_equal(stage_sent_count(&stage, TROUPE__ENVELOPE__BODY_TOKENS), told);
    assert_nothing_left(&stage);
    stage_free(&stage);
}

static void test_cancel_in_every_phase(void **state) {
    cancel_in_flight(0, true); /* layers */
    for (uint32_t frames = 0; frames < 12; frames++)
        cancel_in_flight(frames, false); /* experts of both layers, samplers, second step */
}

static void test_a_gateway_that_is_gone_takes_its_sequences_along(void **state) {
    struct stage stage;
    stage_init(&stage, ROLE_ATTENTION);
    stage.settings.max_sequences = 2;
    create(&stage);
    submit(&stage, 21, make_request(9, 3, 1));
    stage_answer_all(&stage, 9); /* done */
    for (uint64_t i = 1; i <= 4; i++)
        submit(&stage, i % 2 == 0 ? 21 : 20, make_request(i, 3, 2));
    assert_described(&stage, "sequences=5 waiting=3 running=1 done=1");
    stage_commit(&stage, (actor_id[]){20, 30, 31, 40}, 4, TWO_EXPERTS, 2);
    stage_answer_all(&stage, 9);
    assert_described(&stage, "sequences=2 waiting=0 running=0 done=2 pages=0/");
    stage_peer_lost(&stage, 20);
    assert_nothing_left(&stage);
    stage_free(&stage);
}

static void test_messages_of_other_actors_are_no_requests(void **state) {
    struct stage stage;
    open_stage(&stage);
    submit(&stage, 30, make_request(1, 3, 2)); /* an expert */
    submit(&stage, 22, make_request(1, 3, 2)); /* not in the epoch */
    assert_described(&stage, "sequences=0 ");
    stage_free(&stage);
}

/* ---- batches ---- */

static void test_prompts_are_cut_into_chunks(void **state) {
    struct stage stage;
    stage_init(&stage, ROLE_ATTENTION);
    stage.settings.prefill_chunk = 4;
    stage.settings.batch_tokens = 6;
    create(&stage);
    submit(&stage, GATEWAY, make_request(1, 10, 2));
    const uint32_t expected[] = {4, 4, 2, 1}; /* prompt 10, then the one generated token */
    uint32_t position = 0;
    for (size_t step = 0; step < 4; step++) {
        const struct effect *effect;
        do
            effect = stage_take(&stage, EFFECT_COMPUTE);
        while (effect->compute.kind != PROGRAM_EMBED);
        assert_int_equal(effect->compute.rows, expected[step]);
        for (uint32_t i = 0; i < expected[step]; i++) {
            assert_int_equal(effect->compute.row[i].position, position + i);
            assert_int_equal(effect->compute.row[i].form,
                             position + i < 10 ? MLA_EXPANDED : MLA_ABSORBED);
        }
        position += expected[step];
        struct effect frame; /* to the end of this step and no further */
        do {
            frame = *stage_take(&stage, EFFECT_TRANSFER);
            if (frame.transfer.header.kind == FRAME_DISPATCH)
                stage_combine(&stage, &frame);
            else
                stage_sampled(&stage, &frame, 9);
        } while (frame.transfer.header.kind != FRAME_SAMPLE &&
                 frame.transfer.header.batch == step + 1 &&
                 strstr(described(&stage), "batch=") != NULL &&
                 (unsigned)atoi(strstr(described(&stage), "batch=") + 6) == step + 1);
    }
    assert_described(&stage, "done=1 pages=0/");
    stage_free(&stage);
}

static void test_nobody_starves(void **state) {
    for (uint32_t budget = 1; budget <= 5; budget++) {
        struct stage stage;
        stage_init(&stage, ROLE_ATTENTION);
        stage.settings.prefill_chunk = 3;
        stage.settings.batch_tokens = budget;
        stage.settings.max_sequences = 12;
        create(&stage);
        /* six that generate for long, then six with long prompts: within a bounded number of steps
         * everybody is done, although a batch holds few of them */
        for (uint64_t i = 1; i <= 12; i++)
            submit(&stage, GATEWAY, make_request(i, i <= 6 ? 1 : 20, i <= 6 ? 20 : 1));
        stage_answer_all(&stage, 9);
        assert_described(&stage, "running=0 done=12 pages=0/");
        uint32_t rows = 6 * 20 + 6 * 20,
                 steps = (uint32_t)atoi(strstr(described(&stage), "batch=") + 6);
        /* generated tokens of one sequence need one step each, so full batches only while all run
         */
        assert_in_range(steps, rows / budget / 2, rows + 20);
        stage_free(&stage);
    }
}

/* Neither may a full house of generating sequences keep a prompt waiting, nor long prompts keep
 * generating sequences waiting. */
static void test_prefill_and_decode_share_a_batch(void **state) {
    for (uint32_t budget = 1; budget <= 6; budget++) {
        struct stage stage;
        stage_init(&stage, ROLE_ATTENTION);
        stage.settings.batch_tokens = budget;
        create(&stage);
        for (uint64_t i = 1; i <= 6; i++)
            submit(&stage, GATEWAY, make_request(i, 1, 60));
        submit(&stage, GATEWAY, make_request(7, 20, 1));
        submit(&stage, GATEWAY, make_request(8, 200, 1));
        stage_answer_all(&stage, 9);
        uint32_t told = 0, told_before_7 = 0, told_before_8 = 0;
        const message *envelope;
        while ((envelope = stage_sent(&stage, TROUPE__ENVELOPE__BODY_TOKENS)) != NULL)
            for (size_t i = 0; i < envelope->tokens->n_tokens; i++) {
                told++;
                if (envelope->tokens->tokens[i]->sequence == 7)
                    told_before_7 = told;
                if (envelope->tokens->tokens[i]->sequence == 8)
                    told_before_8 = told;
            }
        assert_true(told_before_7 < 6 * 60 * 3 / 4); /* of 360 tokens of the others */
        assert_true(told_before_8 > 6 * 60 / 8);
        stage_free(&stage);
    }
}

/* Every token told must be of a sequence in turn: no sequence gets far ahead of another. */
static void test_decode_takes_turns(void **state) {
    struct stage stage;
    stage_init(&stage, ROLE_ATTENTION);
    stage.settings.batch_tokens = 2;
    create(&stage);
    for (uint64_t i = 1; i <= 5; i++)
        submit(&stage, GATEWAY, make_request(i, 1, 10));
    stage_answer_all(&stage, 9);
    uint32_t have[6] = {0};
    const message *envelope;
    while ((envelope = stage_sent(&stage, TROUPE__ENVELOPE__BODY_TOKENS)) != NULL)
        for (size_t i = 0; i < envelope->tokens->n_tokens; i++) {
            uint32_t least = 10, *mine = &have[envelope->tokens->tokens[i]->sequence];
            *mine += (uint32_t)envelope->tokens->tokens[i]->n_token;
            for (uint32_t s = 1; s <= 5; s++)
                least = have[s] < least ? have[s] : least;
            assert_true(*mine <= least + 3);
        }
    for (uint32_t s = 1; s <= 5; s++)
        assert_int_equal(have[s], 10);
    stage_free(&stage);
}

static void test_pages_bound_what_runs(void **state) {
    struct stage stage;
    stage_init(&stage, ROLE_ATTENTION);
    stage.settings.kv_cache_tokens = 192; /* 3 pages */
    create(&stage);
    stage.hold_programs = true;
    submit(&stage, GATEWAY, make_request(1, 100, 10)); /* 2 pages */
    submit(&stage, GATEWAY, make_request(2, 100, 10)); /* 2 pages: waits */
    submit(&stage, GATEWAY, make_request(3, 4, 10));   /* 1 page, but not before its turn */
    assert_described(&stage, "waiting=2 running=1 done=0 pages=2/3");
    stage.hold_programs = false;
    stage_compute(&stage);
    stage_answer_all(&stage, 9);
    assert_described(&stage, "waiting=0 running=0 done=3 pages=0/3");
    stage_free(&stage);
}

static void test_a_resumed_sequence_replays_in_the_right_forms(void **state) {
    struct stage stage;
    open_stage(&stage);
    struct request *request = make_request(1, 5, 4);
    request->submit.prompt_tokens = 3;
    submit(&stage, GATEWAY, request);
    next_program(&stage, PROGRAM_CLEAR_PAGES);
    const struct program *embed = next_program(&stage, PROGRAM_EMBED);
    assert_int_equal(embed->rows, 5); /* all at once */
    for (uint32_t i = 0; i < 5; i++)
        assert_int_equal(embed->row[i].form, i < 3 ? MLA_EXPANDED : MLA_ABSORBED);
    for (int i = 0; i < 4; i++) {
        struct effect dispatch = next_frame(&stage, FRAME_DISPATCH);
        stage_combine(&stage, &dispatch);
    }
    struct effect sample = next_frame(&stage, FRAME_SAMPLE);
    assert_int_equal(sample.transfer.header.rows, 1);
    assert_true(((const struct sample_spec *)sample.transfer.prefix)->counter == 5);
    stage_sampled(&stage, &sample, 9);
    const Troupe__Tokens *tokens = next_tokens(&stage);
    assert_int_equal(tokens->first, 2);
    assert_int_equal(tokens->n_token, 1);
    stage_answer_all(&stage, 10); /* the fourth generated token is the last */
    tokens = next_tokens(&stage);
    assert_int_equal(tokens->first, 3);
    assert_int_equal(tokens->finish, TROUPE__FINISH_REASON__FINISH_LENGTH);

    stage_clear(&stage); /* resumed when nothing was missing but the end */
    request = make_request(2, 5, 2);
    request->submit.prompt_tokens = 3;
    submit(&stage, GATEWAY, request);
    tokens = next_tokens(&stage);
    assert_int_equal(tokens->n_token, 0);
    assert_int_equal(tokens->finish, TROUPE__FINISH_REASON__FINISH_LENGTH);
    assert_int_equal(stage_count(&stage, EFFECT_COMPUTE), 0);
    stage_free(&stage);
}

/* ---- scores ---- */

static void test_a_prompt_is_scored_without_generating(void **state) {
    struct stage stage;
    stage_init(&stage, ROLE_ATTENTION);
    stage.settings.prefill_chunk = 4;
    create(&stage);
    struct request *request = make_request(1, 6, 0);
    request->submit.prompt_logprobs = true;
    request->sampling.logprobs = true;
    submit(&stage, GATEWAY, request);
    stage_answer_all(&stage, 9);
    const Troupe__Tokens *tokens = next_tokens(&stage);
    assert_int_equal(tokens->prompt_first, 0);
    assert_int_equal(tokens->n_prompt, 4);
    for (uint32_t i = 0; i < 4; i++)
        assert_int_equal(tokens->prompt[i]->id, 4 + i + 1);
    assert_int_equal(tokens->finish, TROUPE__FINISH_REASON__FINISH_NONE);
    tokens = next_tokens(&stage);
    assert_int_equal(tokens->prompt_first, 4);
    assert_int_equal(tokens->n_prompt, 1);
    assert_int_equal(tokens->n_token, 0);
    assert_int_equal(tokens->finish, TROUPE__FINISH_REASON__FINISH_LENGTH);
    stage_clear(&stage);
    poll(&stage, 1, 0, 3);
    tokens = next_tokens(&stage);
    assert_int_equal(tokens->prompt_first, 3);
    assert_int_equal(tokens->n_prompt, 2);
    assert_int_equal(tokens->finish, TROUPE__FINISH_REASON__FINISH_LENGTH);
    stage_free(&stage);
}

static void test_full_logits_of_every_position(void **state) {
    struct stage stage;
    open_stage(&stage);
    struct request *request = make_request(1, 7, 1);
    request->submit.full_logits = true;
    submit(&stage, GATEWAY, request);
    for (int i = 0; i < 4; i++) {
        struct effect dispatch = next_frame(&stage, FRAME_DISPATCH);
        stage_combine(&stage, &dispatch);
    }
    uint32_t out = 0; /* whole rows of logits travel alone, and few at a time */
    struct effect sample[8];
    const struct effect *effect;
    while ((effect = stage_take(&stage, EFFECT_TRANSFER)) != NULL) {
        assert_int_equal(effect->transfer.header.rows, 1);
        sample[out++] = *effect;
    }
    assert_int_equal(out, 4);
    for (uint32_t i = 0; i < out; i++)
        stage_sampled(&stage, &sample[i], 9);
    stage_answer_all(&stage, 9);
    const Troupe__Tokens *tokens = next_tokens(&stage);
    assert_int_equal(tokens->n_prompt, 7);
    for (uint32_t i = 0; i < 7; i++)
        assert_int_equal(tokens->prompt[i]->n_logits, 32);
    assert_int_equal(tokens->n_token, 1);
    assert_int_equal(tokens->finish, TROUPE__FINISH_REASON__FINISH_LENGTH);
    stage_free(&stage);
}

static void test_much_is_told_in_several_messages(void **state) {
    struct stage stage;
    stage_init(&stage, ROLE_ATTENTION);
    stage.config.vocabulary = 8192;
    create(&stage);
    struct request *request = make_request(1, 250, 1); /* 8 MB of logits */
    request->submit.full_logits = true;
    submit(&stage, GATEWAY, request);
    stage_answer_all(&stage, 9);
    uint32_t prompt = 0, messages = 0;
    const message *envelope;
    while ((envelope = stage_sent(&stage, TROUPE__ENVELOPE__BODY_TOKENS)) != NULL) {
        const Troupe__Tokens *tokens = envelope->tokens->tokens[0];
        messages++;
        assert_int_equal(envelope->tokens->n_tokens, 1);
        assert_int_equal(tokens->prompt_first, prompt);
        prompt += (uint32_t)tokens->n_prompt;
        assert_int_equal(tokens->finish != TROUPE__FINISH_REASON__FINISH_NONE, prompt == 250);
    }
    assert_int_equal(prompt, 250);
    assert_true(messages > 1);
    stage_free(&stage);
}

static void test_logprobs_travel_with_their_alternatives(void **state) {
    struct stage stage;
    open_stage(&stage);
    struct request *request = make_request(1, 2, 1);
    request->sampling.logprobs = true;
    request->sampling.top_logprobs = 2;
    submit(&stage, GATEWAY, request);
    for (int i = 0; i < 4; i++) {
        struct effect dispatch = next_frame(&stage, FRAME_DISPATCH);
        stage_combine(&stage, &dispatch);
    }
    struct effect sample = next_frame(&stage, FRAME_SAMPLE);
    const struct sample_spec *spec = sample.transfer.prefix;
    assert_int_equal(spec->flags, SAMPLE_DRAW | SAMPLE_LOGPROBS);
    assert_int_equal(spec->top, 2);
    struct {
        struct sample_result result;
        uint32_t word[4];
    } answer = {{.token = 9, .logprob = -0.5f, .rank = 2, .top = 2}, {8, 0, 9, 0}};
    float best = -0.25f;
    memcpy(&answer.word[1], &best, sizeof best);
    struct frame_header header = answer_to(&sample, FRAME_SAMPLED);
    header.rows = 1;
    header.items = 4;
    answer.result.first_word = 1; /* its words would end behind the frame: asked again */
    stage_frame(&stage, &header, &answer, sizeof answer);
    sample = next_frame(&stage, FRAME_SAMPLE);
    answer.result.first_word = 0;
    header = answer_to(&sample, FRAME_SAMPLED);
    header.rows = 1;
    header.items = 4;
    stage_frame(&stage, &header, &answer, sizeof answer);
    const Troupe__Token *token = next_tokens(&stage)->token[0];
    assert_true(token->logprob == -0.5f);
    assert_int_equal(token->rank, 2);
    assert_int_equal(token->n_top, 2);
    assert_int_equal(token->top[0]->token, 8);
    assert_true(token->top[0]->logprob == -0.25f);
    assert_int_equal(token->top[1]->token, 9);
    stage_free(&stage);
}

/* The last row draws the only token before the other rows have been scored: nothing may be lost. */
static void test_scores_that_come_after_the_last_draw_count(void **state) {
    struct stage stage;
    open_stage(&stage);
    struct request *request = make_request(1, 3, 1);
    request->submit.full_logits = true;
    submit(&stage, GATEWAY, request);
    for (int i = 0; i < 4; i++) {
        struct effect dispatch = next_frame(&stage, FRAME_DISPATCH);
        stage_combine(&stage, &dispatch);
    }
    struct effect sample[3];
    for (int i = 0; i < 3; i++)
        sample[i] = next_frame(&stage, FRAME_SAMPLE);
    for (int i = 3; i-- > 0;)
        stage_sampled(&stage, &sample[i], 9);
    const Troupe__Tokens *tokens = next_tokens(&stage);
    assert_int_equal(tokens->n_prompt, 3);
    assert_int_equal(tokens->prompt[0]->id, 5);
    assert_true(tokens->prompt[0]->logprob == -1.0f);
    stage_free(&stage);
}

/* ---- the end of a sequence, and what samplers are told ---- */

static struct effect first_sample(struct stage *stage, struct request *request) {
    submit(stage, GATEWAY, request);
    for (int i = 0; i < 4; i++) {
        struct effect dispatch = next_frame(stage, FRAME_DISPATCH);
        stage_combine(stage, &dispatch);
    }
    return next_frame(stage, FRAME_SAMPLE);
}

static void test_tokens_that_stop(void **state) {
    struct stage stage;
    open_stage(&stage);
    struct effect sample = first_sample(&stage, make_request(1, 2, 9));
    stage_sampled(&stage, &sample, 1); /* the end-of-sequence token */
    const Troupe__Tokens *tokens = next_tokens(&stage);
    assert_int_equal(tokens->finish, TROUPE__FINISH_REASON__FINISH_STOP);
    assert_int_equal(tokens->stop_token, 1);
    assert_int_equal(tokens->n_token, 1);

    stage_clear(&stage);
    struct request *request = make_request(2, 2, 9);
    request->submit.ignore_eos = true;
    request->submit.n_stop_token = 1;
    request->submit.stop_token = (uint32_t[]){13};
    sample = first_sample(&stage, request);
    stage_sampled(&stage, &sample, 1);
    assert_int_equal(next_tokens(&stage)->finish, TROUPE__FINISH_REASON__FINISH_NONE);
    stage_answer_all(&stage, 13);
    tokens = next_tokens(&stage);
    assert_int_equal(tokens->finish, TROUPE__FINISH_REASON__FINISH_STOP);
    assert_int_equal(tokens->stop_token, 13);
    stage_free(&stage);
}

static float word_float(uint32_t word) {
    float ret;
    memcpy(&ret, &word, sizeof ret);
    return ret;
}

static void test_min_tokens_forbids_what_would_stop(void **state) {
    struct stage stage;
    open_stage(&stage);
    struct request *request = make_request(1, 2, 9);
    request->submit.min_tokens = 1;
    request->submit.n_stop_token = 1;
    request->submit.stop_token = (uint32_t[]){13};
    request->sampling.n_bias_token = request->sampling.n_bias_value = 1;
    request->sampling.bias_token = (uint32_t[]){8};
    request->sampling.bias_value = (float[]){2.5f};
    struct effect sample = first_sample(&stage, request);
    const struct sample_spec *spec = sample.transfer.prefix;
    const uint32_t *word = (const uint32_t *)(spec + 1) + spec->first_word;
    assert_int_equal(spec->bias_count, 3);
    assert_int_equal(word[0], 8);
    assert_true(word_float(word[1]) == 2.5f);
    assert_int_equal(word[2], 1);
    assert_true(isinf(word_float(word[3])) && word_float(word[3]) < 0);
    assert_int_equal(word[4], 13);
    stage_sampled(&stage, &sample, 9);
    for (int i = 0; i < 4; i++) {
        struct effect dispatch = next_frame(&stage, FRAME_DISPATCH);
        stage_combine(&stage, &dispatch);
    }
    sample = next_frame(&stage, FRAME_SAMPLE); /* one token exists: nothing is forbidden any more */
    assert_int_equal(((const struct sample_spec *)sample.transfer.prefix)->bias_count, 1);
    stage_free(&stage);
}

static void test_penalties_name_distinct_tokens(void **state) {
    struct stage stage;
    open_stage(&stage);
    struct request *request = make_request(1, 4, 9);
    request->token[2] = 4; /* prompt 4 5 4 7 */
    request->token[3] = 7;
    request->sampling.repetition_penalty = 1.5f;
    struct effect sample = first_sample(&stage, request);
    const struct sample_spec *spec = sample.transfer.prefix;
    const uint32_t *word = (const uint32_t *)(spec + 1) + spec->first_word;
    assert_int_equal(spec->prompt_count, 3);
    assert_int_equal(word[0], 4);
    assert_int_equal(word[1], 5);
    assert_int_equal(word[2], 7);
    assert_int_equal(spec->output_count, 0);
    for (uint32_t step = 1; step <= 3; step++) {
        stage_sampled(&stage, &sample, step == 2 ? 21 : 20);
        for (int i = 0; i < 4; i++) {
            struct effect dispatch = next_frame(&stage, FRAME_DISPATCH);
            stage_combine(&stage, &dispatch);
        }
        sample = next_frame(&stage, FRAME_SAMPLE);
    }
    spec = sample.transfer.prefix; /* generated 20 21 20 */
    word = (const uint32_t *)(spec + 1) + spec->first_word + spec->prompt_count;
    assert_int_equal(spec->output_count, 2);
    assert_int_equal(word[0], 20);
    assert_int_equal(word[1], 2);
    assert_int_equal(word[2], 21);
    assert_int_equal(word[3], 1);
    stage_free(&stage);
}

/* ---- told again ---- */

static void test_poll_tells_what_follows(void **state) {
    struct stage stage;
    open_stage(&stage);
    submit(&stage, GATEWAY, make_request(1, 2, 5));
    stage_answer_all(&stage, 9);
    stage_clear(&stage);
    poll(&stage, 1, 2, 0);
    const Troupe__Tokens *tokens = next_tokens(&stage);
    assert_int_equal(tokens->first, 2);
    assert_int_equal(tokens->n_token, 3);
    assert_int_equal(tokens->finish, TROUPE__FINISH_REASON__FINISH_LENGTH);
    poll(&stage, 1, 99, 0);
    assert_int_equal(next_tokens(&stage)->n_token, 0);
    poll(&stage, 2, 0, 0);
    const message *envelope = stage_sent(&stage, TROUPE__ENVELOPE__BODY_REJECTED);
    assert_true(envelope->rejected->unknown);
    assert_true(envelope->rejected->sequence == 2);
    stage_free(&stage);
}

static void test_one_message_per_gateway_and_step(void **state) {
    struct stage stage;
    open_stage(&stage);
    stage.hold_programs = true; /* all in one batch after the first one */
    for (uint64_t i = 0; i < 8; i++)
        submit(&stage, i % 2 == 0 ? 20 : 21, make_request(i + 1, 2, 1));
    stage.hold_programs = false;
    stage_compute(&stage);
    stage_answer_all(&stage, 9);
    uint32_t told[2] = {0}, messages = 0;
    const message *envelope;
    while ((envelope = stage_sent(&stage, TROUPE__ENVELOPE__BODY_TOKENS)) != NULL) {
        messages++;
        for (size_t i = 0; i < envelope->tokens->n_tokens; i++)
            told[envelope->tokens->tokens[i]->sequence % 2]++;
    }
    assert_int_equal(told[0], 4);
    assert_int_equal(told[1], 4);
    assert_int_equal(messages, 3); /* the first sequence alone, then the others of both gateways */
    stage_free(&stage);
}

static void test_heartbeats_carry_loads(void **state) {
    struct stage stage;
    open_stage(&stage);
    submit(&stage, GATEWAY, make_request(1, 4, 1));
    stage_answer_all(&stage, 9);
    stage_clear(&stage);
    stage_timer(&stage, stage.now_ns + (uint64_t)stage.settings.heartbeat_ms * MS);
    const Troupe__Heartbeat *heartbeat =
        stage_sent(&stage, TROUPE__ENVELOPE__BODY_HEARTBEAT)->heartbeat;
    uint64_t rows = 0;
    for (size_t i = 0; i < heartbeat->n_load_rows; i++)
        rows += heartbeat->load_rows[i];
    assert_true(rows == 4 * 2 * 2); /* rows x slots x MoE layers */
    assert_int_equal(heartbeat->prompt_tokens, 4);
    assert_int_equal(heartbeat->generated_tokens, 1);
    assert_int_equal(heartbeat->steps, 1);
    stage_free(&stage);
}

static void test_loads_can_be_left_out(void **state) {
    struct stage stage;
    stage_init(&stage, ROLE_ATTENTION);
    stage.settings.load_statistics = 0;
    create(&stage);
    submit(&stage, GATEWAY, make_request(1, 4, 1));
    stage_answer_all(&stage, 9);
    stage_clear(&stage);
    stage_timer(&stage, stage.now_ns + (uint64_t)stage.settings.heartbeat_ms * MS);
    const Troupe__Heartbeat *heartbeat =
        stage_sent(&stage, TROUPE__ENVELOPE__BODY_HEARTBEAT)->heartbeat;
    assert_int_equal(heartbeat->n_load_rows, 0);
    assert_int_equal(heartbeat->generated_tokens, 1);
    stage_free(&stage);
}

/* ---- anything, in any order ---- */

/* No page belongs to two sequences of a batch, and rows obey the engine's rules. */
static void check_rows(const struct program *embed) {
    static uint8_t owner[4096];
    memset(owner, 0, sizeof owner);
    for (uint32_t i = 0; i < embed->rows; i++) {
        const struct batch_row *row = &embed->row[i];
        uint32_t page = row->pages[row->position / PAGE_TOKENS];
        assert_true(page < sizeof owner);
        assert_true(owner[page] == 0 || owner[page] == row->sequence + 1);
        owner[page] = (uint8_t)(row->sequence + 1);
        if (i > 0 && row[-1].sequence == row->sequence) {
            assert_int_equal(row->position, row[-1].position + 1);
            assert_true(row[-1].form <= row->form);
        }
    }
}

struct chaos {
    struct stage stage;
    uint32_t batch_rows, scattered;
    uint64_t random;
    struct effect pending[256]; /* frames that have not been answered */
    uint32_t pendings;
    uint64_t last_sequence;
};

static void collect(struct chaos *chaos) {
    const struct effect *effect;
    while ((effect = stage_take(&chaos->stage, EFFECT_COMPUTE)) != NULL) {
        if (effect->compute.kind == PROGRAM_EMBED) {
            check_rows(&effect->compute);
            chaos->batch_rows = effect->compute.rows;
        } else if (effect->compute.kind == PROGRAM_SCATTER) {
            chaos->scattered += effect->compute.items;
        } else if (effect->compute.kind == PROGRAM_COMBINE) { /* each item has come once */
            assert_int_equal(chaos->scattered, chaos->batch_rows * chaos->stage.config.gate.k);
            chaos->scattered = 0;
        }
    }
    while ((effect = stage_take(&chaos->stage, EFFECT_TRANSFER)) != NULL) {
        bool full = chaos->pendings == 256;
        uint32_t place = full ? random_below(&chaos->random, 256) : chaos->pendings++;
        struct effect kept = *effect;
        kept.transfer.prefix = malloc(effect->transfer.prefix_bytes);
        memcpy((void *)kept.transfer.prefix, effect->transfer.prefix,
               effect->transfer.prefix_bytes);
        if (full)
            free((void *)chaos->pending[place].transfer.prefix);
        chaos->pending[place] = kept;
    }
    stage_clear(&chaos->stage);
}

static void answer_some(struct chaos *chaos) {
    if (chaos->pendings == 0)
        return;
    uint32_t place = random_below(&chaos->random, chaos->pendings);
    struct effect *frame = &chaos->pending[place];
    if (frame->transfer.header.kind == FRAME_SAMPLE)
        stage_sampled(&chaos->stage, frame, 2 + random_below(&chaos->random, 30));
    else if (random_below(&chaos->random, 10) == 0)
        moved(&chaos->stage, frame);
    else if (random_below(&chaos->random, 3) == 0) { /* a piece; the rest comes later, or never */
        uint32_t first = random_below(&chaos->random, frame->transfer.header.items);
        stage_combine_piece(&chaos->stage, frame, first,
                            1 + random_below(&chaos->random, frame->transfer.header.items - first));
        if (random_below(&chaos->random, 4) != 0)
            return;
    } else
        stage_combine(&chaos->stage, frame);
    if (random_below(&chaos->random, 8) != 0) { /* else it will be answered again */
        free((void *)frame->transfer.prefix);
        *frame = chaos->pending[--chaos->pendings];
    }
}

static void commit_some(struct chaos *chaos) {
    actor_id members[8] = {20}, holder[3];
    uint32_t count = 1, holders = 0;
    if (random_below(&chaos->random, 4) != 0)
        members[count++] = 21;
    for (actor_id id = 30; id < 33; id++)
        if (random_below(&chaos->random, 3) != 0)
            members[count++] = holder[holders++] = id;
    for (actor_id id = 40; id < 42; id++)
        if (random_below(&chaos->random, 3) != 0)
            members[count++] = id;
    stage_commit(&chaos->stage, members, count, holder, holders);
}

static void submit_some(struct chaos *chaos) {
    uint32_t tokens = 1 + random_below(&chaos->random, 150);
    struct request *request =
        make_request(++chaos->last_sequence, tokens, random_below(&chaos->random, 8));
    request->submit.prompt_tokens = 1 + random_below(&chaos->random, tokens);
    request->submit.prompt_logprobs = random_below(&chaos->random, 5) == 0;
    request->submit.full_logits = random_below(&chaos->random, 9) == 0;
    request->sampling.logprobs = random_below(&chaos->random, 2) == 0;
    request->sampling.frequency_penalty = random_below(&chaos->random, 3) == 0 ? 0.5f : 0;
    submit(&chaos->stage, random_below(&chaos->random, 3) == 0 ? 21 : 20, request);
}

static void act(struct chaos *chaos) {
    struct stage *stage = &chaos->stage;
    uint32_t what = random_below(&chaos->random, 100);
    stage->hold_programs = random_below(&chaos->random, 4) == 0;
    if (what < 12)
        submit_some(chaos);
    else if (what < 22)
        cancel(stage, random_below(&chaos->random, 2) == 0 ? 20 : 21,
               1 + random_below(&chaos->random, (uint32_t)chaos->last_sequence + 1));
    else if (what < 25)
        commit_some(chaos);
    else if (what < 28)
        stage_peer_lost(stage, 30 + random_below(&chaos->random, 12));
    else if (what < 32)
        stage_timer(stage, stage->now_ns + random_below(&chaos->random, 3000) * (uint64_t)MS);
    else if (what < 40) /* late, but not too late */
        stage_timer(stage, stage->now_ns + random_below(&chaos->random, 300) * (uint64_t)MS);
    else if (what < 44)
        poll(stage, 1 + random_below(&chaos->random, (uint32_t)chaos->last_sequence + 1),
             random_below(&chaos->random, 5), random_below(&chaos->random, 50));
    else
        answer_some(chaos);
}

static void run_chaos(uint64_t seed) {
    struct chaos *chaos = calloc(1, sizeof *chaos);
    struct stage *stage = &chaos->stage;
    chaos->random = seed;
    stage_init(stage, ROLE_ATTENTION);
    settings_randomise(&stage->settings, seed);
    stage->settings.context_tokens = 0;
    stage->replicas = (uint32_t)seed % 3;
    create(stage);
    for (int i = 0; i < 1500; i++) {
        act(chaos);
        collect(chaos);
    }
    /* peace: everybody is there, every frame is answered, all is cancelled */
    everybody(stage);
    stage->hold_programs = false;
    stage_compute(stage);
    collect(chaos);
    for (uint64_t i = 1; i <= chaos->last_sequence; i++)
        for (actor_id gateway = 20; gateway <= 21; gateway++)
            cancel(stage, gateway, i);
    collect(chaos);
    for (int i = 0; i < 2000 && strstr(described(stage), "phase=0") == NULL; i++) {
        while (chaos->pendings > 0)
            answer_some(chaos);
        stage_timer(stage, stage->now_ns + (uint64_t)stage->settings.row_deadline_ms * MS);
        collect(chaos);
    }
    if (strstr(described(stage), "sequences=0 waiting=0 running=0 done=0 pages=0/") == NULL ||
        strstr(described(stage), "phase=0") == NULL)
        fail_msg("seed %llu: %s", (unsigned long long)seed, described(stage));
    while (chaos->pendings > 0)
        free((void *)chaos->pending[--chaos->pendings].transfer.prefix);
    stage_free(stage);
    free(chaos);
}

static void test_nothing_is_left_whatever_happens(void **state) {
    for (uint64_t seed = 1; seed <= 40; seed++)
        run_chaos(seed);
    print_message("seeds 1 to 40\n");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rows_travel_in_e4m3_in_the_fp8_profile),
        cmocka_unit_test(test_a_sequence_step_by_step),
        cmocka_unit_test(test_a_dense_model_needs_no_expert),
        cmocka_unit_test(test_a_second_submit_is_ignored),
        cmocka_unit_test(test_bad_submissions_are_refused),
        cmocka_unit_test(test_room_is_checked_at_submission),
        cmocka_unit_test(test_the_context_bounds_the_answer),
        cmocka_unit_test(test_each_kind_of_stale_reply_is_dropped),
        cmocka_unit_test(test_a_reply_of_the_wrong_size_is_asked_for_again),
        cmocka_unit_test(test_an_answer_comes_in_pieces),
        cmocka_unit_test(test_a_piece_outside_of_its_part_is_refused),
        cmocka_unit_test(test_a_row_goes_to_a_process_once),
        cmocka_unit_test(test_a_stale_sample_reply_is_dropped),
        cmocka_unit_test(test_moved_rows_wait_for_the_next_epoch),
        cmocka_unit_test(test_late_rows_go_to_the_same_holder_if_there_is_no_other),
        cmocka_unit_test(test_late_rows_go_to_a_replica),
        cmocka_unit_test(test_a_lost_holder_s_rows_go_to_others),
        cmocka_unit_test(test_a_holder_wrongly_believed_lost_is_asked_again),
        cmocka_unit_test(test_rows_wait_while_nothing_is_placed),
        cmocka_unit_test(test_a_lost_sampler_s_rows_go_to_another),
        cmocka_unit_test(test_a_silent_sampler_s_rows_go_to_another),
        cmocka_unit_test(test_cancel_while_waiting),
        cmocka_unit_test(test_cancel_in_every_phase),
        cmocka_unit_test(test_a_gateway_that_is_gone_takes_its_sequences_along),
        cmocka_unit_test(test_messages_of_other_actors_are_no_requests),
        cmocka_unit_test(test_prompts_are_cut_into_chunks),
        cmocka_unit_test(test_nobody_starves),
        cmocka_unit_test(test_prefill_and_decode_share_a_batch),
        cmocka_unit_test(test_decode_takes_turns),
        cmocka_unit_test(test_pages_bound_what_runs),
        cmocka_unit_test(test_a_resumed_sequence_replays_in_the_right_forms),
        cmocka_unit_test(test_a_prompt_is_scored_without_generating),
        cmocka_unit_test(test_full_logits_of_every_position),
        cmocka_unit_test(test_much_is_told_in_several_messages),
        cmocka_unit_test(test_logprobs_travel_with_their_alternatives),
        cmocka_unit_test(test_scores_that_come_after_the_last_draw_count),
        cmocka_unit_test(test_tokens_that_stop),
        cmocka_unit_test(test_min_tokens_forbids_what_would_stop),
        cmocka_unit_test(test_penalties_name_distinct_tokens),
        cmocka_unit_test(test_poll_tells_what_follows),
        cmocka_unit_test(test_one_message_per_gateway_and_step),
        cmocka_unit_test(test_heartbeats_carry_loads),
        cmocka_unit_test(test_loads_can_be_left_out),
        cmocka_unit_test(test_nothing_is_left_whatever_happens),
    };
    return cmocka_run_group_tests_name("attention", tests, NULL, NULL);
}
