/* A request's way: what an attention actor measures of a traced sequence on a clock that the test turns,
 * what the gateway keeps of it and shows at /troupe/requests, whose ids are honoured, and that the ring
 * forgets. */
#include "tests/support/gateway_rig.h"
#include "tests/support/step.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#define MS      1000000u
#define GATEWAY 20

/* ---- the attention actor ---- */

static const actor_id EVERYBODY[] = {20, 21, 30, 31, 40, 41};
static const actor_id TWO_EXPERTS[] = {30, 31};

static void open_stage(struct stage *stage) {
    stage_init(stage, ROLE_ATTENTION);
    stage->actor = attention_create(&stage->identity, &stage->settings, &stage->config);
    stage_join(stage, 50);
    stage_commit(stage, EVERYBODY, 6, TWO_EXPERTS, 2);
    stage_clear(stage);
}

static void submit(struct stage *stage, uint64_t sequence, uint32_t max_tokens, bool trace) {
    uint32_t token[] = {4, 5, 6};
    Troupe__Submit body = TROUPE__SUBMIT__INIT;
    Troupe__Sampling sampling = TROUPE__SAMPLING__INIT;
    sampling.top_p = sampling.repetition_penalty = 1;
    body.sequence = sequence;
    body.token = token;
    body.n_token = body.prompt_tokens = 3;
    body.max_tokens = max_tokens;
    body.sampling = &sampling;
    body.trace = trace;
    message envelope = stage_envelope(GATEWAY);
    envelope.body_case = TROUPE__ENVELOPE__BODY_SUBMIT;
    envelope.submit = &body;
    stage_message(stage, &envelope);
}

static struct effect next_frame(struct stage *stage, enum frame_kind kind) {
    const struct effect *effect = stage_take(stage, EFFECT_TRANSFER);
    assert_non_null(effect);
    assert_int_equal(effect->transfer.header.kind, kind);
    return *effect;
}

/* Experts of each of the two layers answer after 3 and 5 ms, the sampler after 2 more. */
static void one_step(struct stage *stage, uint32_t token) {
    struct effect first, second;
    for (int layer = 0; layer < 2; layer++) {
        first = next_frame(stage, FRAME_DISPATCH);
        second = next_frame(stage, FRAME_DISPATCH);
        stage->now_ns += 3 * MS;
        stage_combine(stage, &second);
        stage->now_ns += 2 * MS;
        stage_combine(stage, &first);
    }
    struct effect sample = next_frame(stage, FRAME_SAMPLE);
    stage->now_ns += 2 * MS;
    stage_sampled(stage, &sample, token);
}

static const Troupe__Tokens *next_tokens(struct stage *stage) {
    const message *envelope = stage_sent(stage, TROUPE__ENVELOPE__BODY_TOKENS);
    assert_non_null(envelope);
    return envelope->tokens->tokens[0];
}

static void steps_are_measured_layer_by_layer(void **state) {
    (void)state;
    struct stage stage;
    open_stage(&stage);
    submit(&stage, 77, 2, true);
    one_step(&stage, 9);
    const Troupe__Tokens *tokens = next_tokens(&stage);
    const Troupe__Trace *trace = tokens->trace;
    assert_non_null(trace);
    assert_true(trace->steps == 1);
    assert_true(trace->step_ns == 12 * MS && trace->prefill_ns == 12 * MS);
    assert_true(trace->sample_ns == 2 * MS);
    assert_int_equal(trace->n_layer_ns, 4 * stage.config.layers);
    assert_true(trace->layer_ns[4 * 1 + 2] == 5 * MS); /* experts of layer 1 */
    assert_true(trace->layer_ns[4 * 2 + 2] == 5 * MS);
    assert_true(trace->layer_ns[4 * 1 + 0] == 0); /* programs take no time here */
    assert_int_equal(trace->n_actor, 2);
    uint32_t rows = 0;
    for (size_t i = 0; i < trace->n_actor; i++) {
        assert_true(trace->actor[i] == 30 || trace->actor[i] == 31);
        rows += trace->rows[i];
    }
    assert_int_equal(rows, 2 * 3 * 2); /* layers, rows of the prompt, experts of each */
    assert_true(trace->sampler == 40 || trace->sampler == 41);
    one_step(&stage, 10);
    trace = next_tokens(&stage)->trace;
    assert_true(trace->steps == 2); /* totals ... */
    assert_true(trace->step_ns == 24 * MS && trace->prefill_ns == 12 * MS);
    assert_true(trace->layer_ns[4 * 1 + 2] == 10 * MS);
    rows = 0;
    for (size_t i = 0; i < trace->n_actor; i++)
        rows += trace->rows[i];
    assert_int_equal(rows, 2 * 1 * 2); /* ... but for who computed it */
    stage_free(&stage);
}

static void nothing_is_said_of_others(void **state) {
    (void)state;
    struct stage stage;
    open_stage(&stage);
    submit(&stage, 77, 1, false);
    one_step(&stage, 9);
    assert_null(next_tokens(&stage)->trace);
    stage_free(&stage);
}

static void the_time_in_the_queue_is_told(void **state) {
    (void)state;
    struct stage stage;
    open_stage(&stage);
    submit(&stage, 1, 1, false);
    stage.now_ns += 4 * MS; /* the first one's step is in flight */
    submit(&stage, 2, 1, false);
    one_step(&stage, 9);
    assert_true(next_tokens(&stage)->queue_ns == 0);
    one_step(&stage, 9);
    assert_true(next_tokens(&stage)->queue_ns == 12 * MS);
    stage_free(&stage);
}

/* ---- the gateway ---- */

struct headers {
    const char *request_id, *traceparent, *trace;
};

static uint64_t ask(struct rig *rig, struct headers headers, const char *body) {
    struct http_request http = {.client = ++rig->last_client,
                                .method = "POST",
                                .path = "/v1/completions",
                                .query = "",
                                .request_id = headers.request_id,
                                .traceparent = headers.traceparent,
                                .trace = headers.trace,
                                .body = body,
                                .body_bytes = strlen(body)};
    struct event event = {.kind = EVENT_HTTP_REQUEST, .http = &http};
    rig_deliver(rig, &event);
    return http.client;
}

static json_t *way(struct rig *rig, const char *id, unsigned status) {
    char path[160];
    snprintf(path, sizeof path, "/troupe/requests/%s", id);
    return rig_get(rig, path, status);
}

static const char *text_of(const json_t *json, const char *key) {
    return json_string_value(json_object_get(json, key));
}
static double number_of(const json_t *json, const char *key) {
    const json_t *value = json_object_get(json, key);
    if (!json_is_number(value))
        fail_msg("%s is no number", key);
    return json_number_value(value);
}

#define BODY "{\"prompt\":[5,6,7],\"max_tokens\":4,\"stream\":true}"

static void a_request_says_its_phases(void **state) {
    (void)state;
    struct rig *rig = rig_open(&(struct rig_options){.chat = CHAT_DEMO, .view = true}, NULL);
    uint64_t client = ask(rig, (struct headers){.request_id = "mine-7"}, BODY);
    assert_true(rig_wait(rig, client, 100));
    assert_string_equal(rig_answer(rig, client)->header, "X-Request-Id: mine-7");
    json_t *json = way(rig, "mine-7", 200); /* by the client's id, and by the answer's */
    json_t *same = way(rig, "cmpl-mine-7", 200);
    assert_true(json_equal(json, same));
    assert_string_equal(text_of(json, "state"), "length");
    assert_true(number_of(json, "tokens") == 4 && number_of(json, "prompt_tokens") == 3);
    assert_true(number_of(json, "queue_ms") == 0);
    assert_true(number_of(json, "decode_ms") == 3); /* a token each millisecond */
    assert_true(number_of(json, "total_ms") ==
                number_of(json, "queue_ms") + number_of(json, "prefill_ms") + 3);
    assert_int_equal(strlen(text_of(json, "trace_id")), 32);
    assert_true(json_is_true(json_object_get(json, "traced")));
    json_decref(json);
    json_decref(same);
    json_decref(way(rig, "cmpl-another", 404));
    rig_close(rig);
}

static void a_callers_trace_is_gone_on_with(void **state) {
    (void)state;
    static const struct {
        const char *header, *trace, *parent;
        bool traced;
    } CASES[] = {
        {"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
         "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", true},
        {"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00",
         "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", false},
        {"cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
         "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", true},
        {"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more", NULL, NULL, false},
        {"ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", NULL, NULL, false},
        {"00-00000000000000000000000000000000-b7ad6b7169203331-01", NULL, NULL, false},
        {"00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01", NULL, NULL, false},
        {"00-0AF7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", NULL, NULL, false},
        {"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-0", NULL, NULL, false},
        {"", NULL, NULL, false},
    };
    struct rig *rig = rig_open(&(struct rig_options){.chat = CHAT_DEMO, .view = true}, NULL);
    for (size_t i = 0; i < sizeof CASES / sizeof CASES[0]; i++) {
        uint64_t client = ask(rig, (struct headers){.traceparent = CASES[i].header}, BODY);
        assert_true(rig_wait(rig, client, 100));
        json_t *list = rig_get(rig, "/troupe/requests", 200);
        const json_t *newest = json_array_get(json_object_get(list, "requests"), 0);
        json_t *json = way(rig, text_of(newest, "id"), 200);
        if (CASES[i].trace != NULL) {
            assert_string_equal(text_of(json, "trace_id"), CASES[i].trace);
            assert_string_equal(text_of(json, "parent_span_id"), CASES[i].parent);
            assert_string_not_equal(text_of(json, "span_id"), CASES[i].parent);
        } else {
            assert_true(json_is_null(json_object_get(json, "parent_span_id")));
            assert_int_equal(strlen(text_of(json, "trace_id")), 32);
        }
        assert_int_equal(json_is_true(json_object_get(json, "traced")), CASES[i].traced);
        json_decref(json);
        json_decref(list);
    }
    rig_close(rig);
}

/* What an attention actor says of the sequence that it runs. */
static void tell(struct rig *rig, uint64_t steps, uint64_t ms, uint32_t expert) {
    uint32_t layers = rig->config.layers, actor[] = {expert}, rows[] = {6};
    uint64_t layer[4 * LAYERS_MAX] = {0};
    layer[4 * 1 + 2] = ms * MS;
    Troupe__Trace trace = TROUPE__TRACE__INIT;
    trace.steps = steps;
    trace.step_ns = ms * MS;
    trace.n_layer_ns = 4 * layers;
    trace.layer_ns = layer;
    trace.n_actor = trace.n_rows = 1;
    trace.actor = actor;
    trace.rows = rows;
    trace.sampler = 60;
    trace.resent = 2;
    struct rig_attention *attention = &rig->attention[0];
    Troupe__Tokens tokens = TROUPE__TOKENS__INIT, *list[] = {&tokens};
    tokens.sequence = attention->sequence[0].id;
    tokens.trace = &trace;
    Troupe__TokensBatch batch = TROUPE__TOKENS_BATCH__INIT;
    batch.n_tokens = 1;
    batch.tokens = list;
    message envelope = TROUPE__ENVELOPE__INIT;
    envelope.body_case = TROUPE__ENVELOPE__BODY_TOKENS;
    envelope.tokens = &batch;
    rig_message(rig, attention->id, attention->incarnation, &envelope);
}

static void who_served_is_in_the_chunks_and_in_the_way(void **state) {
    (void)state;
    struct rig *rig = rig_open(&(struct rig_options){.chat = CHAT_DEMO, .view = true}, NULL);
    uint64_t client = ask(rig, (struct headers){.trace = "1"}, BODY);
    rig_tick(rig);
    tell(rig, 2, 9, 50);
    tell(rig, 1, 4, 51); /* overtaken: its totals are older, its rows are new */
    assert_true(rig_wait(rig, client, 100));
    json_t *events = rig_events(rig_answer(rig, client));
    bool seen = false;
    for (size_t i = 0; i < json_array_size(events); i++) {
        const json_t *troupe = json_object_get(json_array_get(events, i), "troupe");
        const json_t *first = json_array_get(json_object_get(troupe, "experts"), 0);
        if (first == NULL)
            continue;
        assert_false(seen); /* told once */
        seen = true;
        assert_string_equal(json_string_value(json_array_get(first, 0)), "expert-0");
        assert_int_equal(json_integer_value(json_array_get(first, 1)), 6);
        assert_string_equal(text_of(troupe, "sampler"), "actor 60");
    }
    assert_true(seen);
    json_t *list = rig_get(rig, "/troupe/requests", 200);
    json_t *json = way(
        rig, text_of(json_array_get(json_object_get(list, "requests"), 0), "id"), 200);
    const json_t *layer = json_array_get(json_object_get(json, "layers"), 1);
    assert_true(number_of(layer, "experts_ms") == 9);
    assert_int_equal(json_array_size(json_object_get(json, "experts")), 2);
    const json_t *run = json_array_get(json_object_get(json, "run"), 0);
    assert_true(number_of(run, "steps") == 2 && number_of(run, "resent") == 2);
    json_decref(json);
    json_decref(list);
    json_decref(events);
    rig_close(rig);
}

static void untraced_answers_have_no_more_in_them(void **state) {
    (void)state;
    struct rig *rig = rig_open(&(struct rig_options){.chat = CHAT_DEMO, .view = true}, NULL);
    uint64_t client = ask(rig, (struct headers){0}, BODY);
    rig_tick(rig);
    tell(rig, 2, 9, 50); /* not asked for: ignored */
    assert_true(rig_wait(rig, client, 100));
    assert_null(strstr(rig_answer(rig, client)->text, "troupe\":{"));
    json_t *list = rig_get(rig, "/troupe/requests", 200);
    json_t *json = way(
        rig, text_of(json_array_get(json_object_get(list, "requests"), 0), "id"), 200);
    assert_null(json_object_get(json, "layers"));
    json_decref(json);
    json_decref(list);
    rig_close(rig);
}

static void a_second_run_is_seen_after_a_loss(void **state) {
    (void)state;
    struct rig *rig = rig_open(
        &(struct rig_options){.chat = CHAT_DEMO, .view = true, .attentions = 2}, NULL);
    uint64_t client = ask(rig, (struct headers){.request_id = "moved"}, BODY);
    rig_tick(rig);
    rig_tick(rig);
    rig_kill(rig, rig->attention[0].submits > 0 ? 0 : 1);
    rig_commit(rig);
    assert_true(rig_wait(rig, client, 200));
    json_t *json = way(rig, "moved", 200);
    assert_true(number_of(json, "runs") == 2);
    const json_t *runs = json_object_get(json, "run");
    assert_true(number_of(json_array_get(runs, 0), "tokens") +
                    number_of(json_array_get(runs, 1), "tokens") ==
                4);
    json_decref(json);
    rig_close(rig);
}

static void the_ring_forgets_the_oldest(void **state) {
    (void)state;
    struct rig *rig = rig_open(&(struct rig_options){.chat = CHAT_DEMO, .view = true}, NULL);
    uint64_t slow = ask(rig, (struct headers){.request_id = "slow"},
                        "{\"prompt\":[5],\"max_tokens\":500,\"ignore_eos\":true}");
    char id[16];
    for (int round = 0; round < 3; round++) { /* as many at a time as the rig has room for */
        for (int i = 0; i < 100; i++) {
            snprintf(id, sizeof id, "r%d-%d", round, i);
            struct event gone = {.kind = EVENT_CLIENT_GONE};
            gone.client = ask(rig, (struct headers){.request_id = id}, BODY);
            rig_deliver(rig, &gone);
        }
        if (round == 0)
            json_decref(way(rig, "slow", 200));
        rig->last_client = slow + 10;
    }
    json_decref(way(rig, "slow", 404));
    json_decref(way(rig, "r0-10", 404));
    json_t *last = way(rig, "r2-99", 200);
    assert_string_equal(text_of(last, "state"), "abort");
    json_decref(last);
    json_t *list = rig_get(rig, "/troupe/requests", 200);
    assert_int_equal(json_array_size(json_object_get(list, "requests")), 256);
    json_decref(list);
    assert_true(rig_wait(rig, slow, 1000)); /* it goes on without an entry */
    rig_close(rig);
}

static void the_view_is_needed(void **state) {
    (void)state;
    struct rig *rig = rig_open(&(struct rig_options){.chat = CHAT_DEMO}, NULL);
    json_decref(rig_get(rig, "/troupe/requests", 404));
    json_decref(way(rig, "any", 404));
    rig_close(rig);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(steps_are_measured_layer_by_layer),
        cmocka_unit_test(nothing_is_said_of_others),
        cmocka_unit_test(the_time_in_the_queue_is_told),
        cmocka_unit_test(a_request_says_its_phases),
        cmocka_unit_test(a_callers_trace_is_gone_on_with),
        cmocka_unit_test(who_served_is_in_the_chunks_and_in_the_way),
        cmocka_unit_test(untraced_answers_have_no_more_in_them),
        cmocka_unit_test(a_second_run_is_seen_after_a_loss),
        cmocka_unit_test(the_ring_forgets_the_oldest),
        cmocka_unit_test(the_view_is_needed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
