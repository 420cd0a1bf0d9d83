/* The gateway actor by hand-made events: what clients send, what attention actors answer, what
 * clients get. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "actors/bias_table.h"
#include "tests/support/gateway_rig.h"
#include "tests/support/random.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

static struct rig *open_rig(void) {
    return rig_open(&(struct rig_options){.chat = CHAT_DEMO}, NULL);
}

static const json_t *choice_at(const json_t *answer, size_t index) {
    return json_array_get(json_object_get(answer, "choices"), index);
}

static const char *string_at(const json_t *object, const char *key) {
    const char *value = json_string_value(json_object_get(object, key));
    if (value == NULL)
        fail_msg("no string %s", key);
    return value;
}

static json_int_t integer_at(const json_t *object, const char *key) {
    assert_true(json_is_integer(json_object_get(object, key)));
    return json_integer_value(json_object_get(object, key));
}

static void expect_error(struct rig *rig, const char *path, const char *body, unsigned status,
                         const char *type, const char *words) {
    json_t *answer = rig_post(rig, path, body, status);
    const json_t *error = json_object_get(answer, "error");
    assert_string_equal(string_at(error, "type"), type);
    assert_int_equal(integer_at(error, "code"), status);
    if (strstr(string_at(error, "message"), words) == NULL)
        fail_msg("%s does not say %s", string_at(error, "message"), words);
    assert_non_null(json_object_get(error, "param"));
    json_decref(answer);
}

static char *decode(const struct rig *rig, const uint32_t *token, uint32_t tokens) {
    struct detokenizer detokenizer;
    detokenizer_init(&detokenizer, true);
    char *text = calloc(1, 65536);
    size_t size = 0;
    for (uint32_t i = 0; i < tokens; i++)
        size += detokenizer_push(&detokenizer, rig->tokenizer, token[i], text + size, 65536 - size);
    detokenizer_push(&detokenizer, rig->tokenizer, UINT32_MAX, text + size, 65536 - size);
    return text;
}

static struct token_list encode(const struct rig *rig, const char *text) {
    struct token_list list = {0};
    struct failure failure;
    assert_int_equal(
        tokenizer_encode(rig->tokenizer, text, strlen(text), false, false, &list, &failure), 0);
    return list;
}

/* ---- routes ---- */

static void routes_answer_before_and_after_joining(void **state) {
    (void)state;
    struct rig *rig = rig_open(&(struct rig_options){.chat = CHAT_DEMO, .apart = true}, NULL);
    json_decref(rig_get(rig, "/live", 200));
    json_decref(rig_get(rig, "/ready", 503));
    json_decref(rig_get(rig, "/health", 503));
    rig->serving = false;
    rig_join(rig);
    json_decref(rig_get(rig, "/health", 503));
    rig->serving = true;
    rig_commit(rig);
    json_decref(rig_get(rig, "/health", 200));
    json_decref(rig_get(rig, "/ready", 200));
    rig_kill(rig, 0);
    rig_commit(rig);
    json_decref(rig_get(rig, "/ready", 503));
    rig_close(rig);
}

static void routes_know_paths_methods_and_models(void **state) {
    (void)state;
    struct rig *rig = open_rig();
    json_t *answer = rig_get(rig, "/version", 200);
    assert_string_equal(string_at(answer, "version"), "1.2.3");
    json_decref(answer);
    answer = rig_get(rig, "/v1/models", 200);
    assert_string_equal(string_at(answer, "object"), "list");
    const json_t *model = json_array_get(json_object_get(answer, "data"), 0);
    assert_string_equal(string_at(model, "id"), "demo");
    assert_string_equal(string_at(model, "object"), "model");
    assert_int_equal(integer_at(model, "max_model_len"), 2048);
    json_decref(answer);
    json_decref(rig_get(rig, "/v1/models/demo", 200));
    json_decref(rig_get(rig, "/v1/models/other", 404));
    json_decref(rig_get(rig, "/v1/nothing", 404));
    json_decref(rig_get(rig, "/v1/completions", 405));
    assert_string_equal(rig_answer(rig, rig->last_client)->header, "Allow: POST");
    expect_error(rig, "/v1/models", "", 405, "MethodNotAllowedError", "takes GET, found POST");
    expect_error(rig, "/v1/completions", "{\"model\":\"x\",\"prompt\":\"a\"}", 404, "NotFoundError",
                 "`x` does not exist");
    expect_error(rig, "/v1/completions", "{", 400, "BadRequestError", "invalid JSON");
    rig_close(rig);
}

static void an_api_key_is_asked_for(void **state) {
    (void)state;
    struct rig *rig = rig_open(&(struct rig_options){.chat = CHAT_DEMO, .api_key = "sesame"}, NULL);
    static const struct {
        const char *path, *authorization;
        unsigned status;
    } cases[] = {{"/v1/models", NULL, 401},
                 {"/v1/models", "Bearer sesam", 401},
                 {"/v1/models", "Bearer sesames", 401},
                 {"/v1/models", "sesame", 401},
                 {"/v1/models", "Bearer sesame", 200},
                 {"/v1/models", "bearer sesame", 200},
                 {"/tokenizer_info", NULL, 401},
                 {"/health", NULL, 200},
                 {"/live", NULL, 200}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        uint64_t client = rig_http(rig, "GET", cases[i].path, cases[i].authorization, NULL);
        assert_int_equal(rig_answer(rig, client)->status, cases[i].status);
    }
    rig_close(rig);
}

static void text_and_tokens_turn_into_each_other(void **state) {
    (void)state;
    struct rig *rig = open_rig();
    json_t *answer = rig_post(rig, "/tokenize", "{\"prompt\":\"In the beginning \xc3\xa9\"}", 200);
    json_t *tokens = json_object_get(answer, "tokens");
    assert_int_equal(integer_at(answer, "count"), json_array_size(tokens));
    assert_int_equal(integer_at(answer, "max_model_len"), 2048);
    assert_int_equal(json_integer_value(json_array_get(tokens, 0)), tokenizer_bos(rig->tokenizer));
    json_array_remove(tokens, 0);
    char *list = json_dumps(tokens, 0);
    char body[512];
    snprintf(body, sizeof body, "{\"tokens\":%s}", list);
    json_t *back = rig_post(rig, "/detokenize", body, 200);
    assert_string_equal(string_at(back, "prompt"), "In the beginning \xc3\xa9");
    json_decref(back);
    json_t *bare =
        rig_post(rig, "/tokenize",
                 "{\"prompt\":\"In the beginning \xc3\xa9\",\"add_special_tokens\":false,"
                 "\"return_token_strs\":true}",
                 200);
    assert_true(json_equal(json_object_get(bare, "tokens"), tokens));
    assert_int_equal(json_array_size(json_object_get(bare, "token_strs")), json_array_size(tokens));
    json_decref(bare);
    json_t *chat =
        rig_post(rig, "/tokenize", "{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]}", 200);
    assert_true(integer_at(chat, "count") > 3);
    json_decref(chat);
    json_t *info = rig_get(rig, "/tokenizer_info", 200);
    assert_string_equal(string_at(info, "eos_token"),
                        "<\xef\xbd\x9c"
                        "end\xe2\x96\x81of\xe2\x96\x81sentence\xef\xbd\x9c>");
    assert_non_null(strstr(string_at(info, "chat_template"), "add_generation_prompt"));
    json_decref(info);
    free(list);
    json_decref(answer);
    rig_close(rig);
}

/* ---- completions ---- */

static void a_completion_is_the_decoded_tokens(void **state) {
    (void)state;
    struct rig *rig = open_rig();
    json_t *answer =
        rig_post(rig, "/v1/completions",
                 "{\"prompt\":\"Hello\",\"seed\":3,\"return_token_ids\":true,\"user\":\"u\"}", 200);
    assert_string_equal(string_at(answer, "object"), "text_completion");
    assert_string_equal(string_at(answer, "model"), "demo");
    assert_memory_equal(string_at(answer, "id"), "cmpl-", 5);
    char name[BIAS_NAME_BYTES], fingerprint[96];
    bias_name(name, rig_bias_id(rig, 4));
    snprintf(fingerprint, sizeof fingerprint, "troupe-0123456789abcdef-bf16-b%s", name);
    assert_memory_equal(name, "4.", 2);
    assert_string_equal(string_at(answer, "system_fingerprint"), fingerprint);
    assert_int_equal(integer_at(answer, "created"), 1700000001);
    const json_t *choice = choice_at(answer, 0);
    const json_t *ids = json_object_get(choice, "token_ids");
    assert_int_equal(json_array_size(ids), 16);
    assert_int_equal(integer_at(json_object_get(answer, "usage"), "completion_tokens"), 16);
    size_t prompt_tokens = json_array_size(json_object_get(choice, "prompt_token_ids"));
    assert_int_equal(integer_at(json_object_get(answer, "usage"), "prompt_tokens"), prompt_tokens);
    assert_int_equal(integer_at(json_object_get(answer, "usage"), "total_tokens"),
                     prompt_tokens + 16);
    uint32_t token[16];
    for (size_t i = 0; i < 16; i++)
        token[i] = (uint32_t)json_integer_value(json_array_get(ids, i));
    char *text = decode(rig, token, 16);
    assert_string_equal(string_at(choice, "text"), text);
    assert_string_equal(string_at(choice, "finish_reason"), "length");
    assert_true(json_is_null(json_object_get(choice, "logprobs")));
    free(text);
    json_decref(answer);
    assert_true(rig_settles(rig, 3000));
    rig_close(rig);
}

static void a_stream_is_the_same_answer_in_pieces(void **state) {
    (void)state;
    struct rig *rig = open_rig();
#define BODY                                                                                       \
    "{\"prompt\":[\"Hello\",\"Bye\"],\"n\":2,\"seed\":9,\"max_tokens\":40,\"temperature\":1"
    json_t *whole = rig_post(rig, "/v1/completions", BODY "}", 200);
    uint64_t client =
        rig_http(rig, "POST", "/v1/completions", NULL,
                 BODY ",\"stream\":true,\"stream_options\":{\"include_usage\":true}}");
    assert_true(rig_wait(rig, client, 10000));
    json_t *events = rig_events(rig_answer(rig, client));
    for (uint32_t i = 0; i < 4; i++) {
        char *text = rig_stream_text(events, i, NULL);
        assert_string_equal(text, string_at(choice_at(whole, i), "text"));
        free(text);
    }
    assert_true(json_array_size(events) > 100); /* token by token, not at the end */
    const json_t *usage = json_array_get(events, json_array_size(events) - 1);
    assert_int_equal(json_array_size(json_object_get(usage, "choices")), 0);
    assert_int_equal(integer_at(json_object_get(usage, "usage"), "completion_tokens"), 160);
    assert_true(json_equal(json_object_get(usage, "usage"), json_object_get(whole, "usage")));
    assert_null(json_object_get(json_array_get(events, 0), "usage"));
    json_decref(events);
    client =
        rig_http(rig, "POST", "/v1/completions", NULL,
                 BODY ",\"stream\":true,\"stream_options\":{\"continuous_usage_stats\":true}}");
    assert_true(rig_wait(rig, client, 10000));
    events = rig_events(rig_answer(rig, client));
    assert_non_null(json_object_get(json_array_get(events, 0), "usage"));
    assert_int_equal(json_array_size(json_object_get(
                         json_array_get(events, json_array_size(events) - 1), "choices")),
                     1);
    json_decref(events);
    json_decref(whole);
    assert_true(rig_settles(rig, 3000));
    rig_close(rig);
#undef BODY
}

static void choices_differ_and_repeat_with_their_seed(void **state) {
    (void)state;
    struct rig *rig = open_rig();
#define BODY(n) "{\"prompt\":\"Hello\",\"n\":" n ",\"seed\":4,\"temperature\":1}"
    json_t *one = rig_post(rig, "/v1/completions", BODY("1"), 200);
    json_t *three = rig_post(rig, "/v1/completions", BODY("3"), 200);
    json_t *again = rig_post(rig, "/v1/completions", BODY("3"), 200);
    assert_true(json_equal(json_object_get(three, "choices"), json_object_get(again, "choices")));
    assert_string_equal(string_at(choice_at(one, 0), "text"),
                        string_at(choice_at(three, 0), "text"));
    assert_string_not_equal(string_at(choice_at(three, 0), "text"),
                            string_at(choice_at(three, 1), "text"));
    assert_string_not_equal(string_at(choice_at(three, 1), "text"),
                            string_at(choice_at(three, 2), "text"));
    json_t *free_one =
        rig_post(rig, "/v1/completions", "{\"prompt\":\"Hello\",\"temperature\":1}", 200);
    json_t *free_two =
        rig_post(rig, "/v1/completions", "{\"prompt\":\"Hello\",\"temperature\":1}", 200);
    assert_string_not_equal(string_at(choice_at(free_one, 0), "text"),
                            string_at(choice_at(free_two, 0), "text"));
    json_decref(one);
    json_decref(three);
    json_decref(again);
    json_decref(free_one);
    json_decref(free_two);
    rig_close(rig);
#undef BODY
}

/* The script's text, cut by every kind of end; whole and streamed, one or several tokens per
 * message. */
static void answers_end_where_they_should(void **state) {
    (void)state;
    struct rig *rig = open_rig();
    static const char SCRIPT[] =
        "The caf\xc3\xa9 was open.\n\nQuestion: \xe4\xbd\xa0\xe5\xa5\xbd?\nAnswer: yes";
    struct token_list script = encode(rig, SCRIPT);
    rig->script = script.token;
    rig->script_tokens = script.count;
    static const struct {
        const char *fields, *text, *finish, *reason;
    } cases[] = {
        {"\"max_tokens\":300", SCRIPT, "stop", NULL},
        {"\"max_tokens\":300,\"stop\":\"Question:\"", "The caf\xc3\xa9 was open.\n\n", "stop",
         "Question:"},
        {"\"max_tokens\":300,\"stop\":[\"zzz\",\"\\n\\nQ\"]", "The caf\xc3\xa9 was open.", "stop",
         "\n\nQ"},
        {"\"max_tokens\":300,\"stop\":\"\xc3\xa9 w\"", "The caf", "stop", "\xc3\xa9 w"},
        {"\"max_tokens\":300,\"stop\":\"\xe4\xbd\xa0\xe5\xa5\xbd\"",
         "The caf\xc3\xa9 was open.\n\nQuestion: ", "stop", "\xe4\xbd\xa0\xe5\xa5\xbd"},
        {"\"max_tokens\":300,\"stop\":\"op\",\"include_stop_str_in_output\":true",
         "The caf\xc3\xa9 was op", "stop", "op"},
        {"\"max_tokens\":300,\"stop\":\"yes!\"", SCRIPT, "stop", NULL},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        for (rig->tokens_per_message = 1; rig->tokens_per_message < 8;
             rig->tokens_per_message += 3) {
            char body[512];
            snprintf(body, sizeof body, "{\"prompt\":\"x\",%s}", cases[i].fields);
            json_t *answer = rig_post(rig, "/v1/completions", body, 200);
            assert_string_equal(string_at(choice_at(answer, 0), "text"), cases[i].text);
            assert_string_equal(string_at(choice_at(answer, 0), "finish_reason"), cases[i].finish);
            const json_t *reason = json_object_get(choice_at(answer, 0), "stop_reason");
            if (cases[i].reason == NULL)
                assert_true(json_is_null(reason));
            else
                assert_string_equal(json_string_value(reason), cases[i].reason);
            snprintf(body, sizeof body, "{\"prompt\":\"x\",\"stream\":true,%s}", cases[i].fields);
            uint64_t client = rig_http(rig, "POST", "/v1/completions", NULL, body);
            assert_true(rig_wait(rig, client, 1000));
            json_t *events = rig_events(rig_answer(rig, client));
            char *text = rig_stream_text(events, 0, NULL);
            assert_string_equal(text, cases[i].text);
            free(text);
            json_decref(events);
            json_decref(answer);
        }
    assert_true(rig_settles(rig, 3000));
    token_list_free(&script);
    rig_close(rig);
}

static void stop_tokens_end_without_their_text(void **state) {
    (void)state;
    struct rig *rig = open_rig();
    struct token_list script = encode(rig, "one two three four five six");
    assert_true(script.count >= 6);
    rig->script = script.token;
    rig->script_tokens = script.count;
    char body[256];
    snprintf(body, sizeof body,
             "{\"prompt\":\"x\",\"stop_token_ids\":[%u],\"return_token_ids\":true}",
             script.token[2]);
    json_t *answer = rig_post(rig, "/v1/completions", body, 200);
    char *text = decode(rig, script.token, 2);
    assert_string_equal(string_at(choice_at(answer, 0), "text"), text);
    assert_int_equal(integer_at(choice_at(answer, 0), "stop_reason"), script.token[2]);
    assert_int_equal(json_array_size(json_object_get(choice_at(answer, 0), "token_ids")), 3);
    free(text);
    json_decref(answer);
    /* Not before min_tokens: by token or by string. */
    snprintf(body, sizeof body,
             "{\"prompt\":\"x\",\"stop_token_ids\":[%u],\"min_tokens\":4,\"stop\":\"one\"}",
             script.token[2]);
    answer = rig_post(rig, "/v1/completions", body, 200);
    assert_string_equal(string_at(choice_at(answer, 0), "text"), "one two three four five six");
    json_decref(answer);
    snprintf(body, sizeof body, "{\"prompt\":\"x\",\"ignore_eos\":true,\"max_tokens\":%u}",
             script.count + 3);
    answer = rig_post(rig, "/v1/completions", body, 200);
    assert_string_equal(string_at(choice_at(answer, 0), "finish_reason"), "length");
    assert_string_equal(string_at(choice_at(answer, 0), "text"), "one two three four five six");
    json_decref(answer);
    token_list_free(&script);
    rig_close(rig);
}

/* ---- logprobs ---- */

static void check_logprobs(const json_t *choice, uint32_t prompt, uint32_t generated,
                           uint32_t top) {
    static const char *const LISTS[] = {"tokens", "token_logprobs", "top_logprobs", "text_offset"};
    const json_t *logprobs = json_object_get(choice, "logprobs");
    for (size_t i = 0; i < 4; i++)
        assert_int_equal(json_array_size(json_object_get(logprobs, LISTS[i])), prompt + generated);
    for (uint32_t i = 0; i < prompt + generated; i++) {
        const json_t *value = json_array_get(json_object_get(logprobs, "token_logprobs"), i);
        const json_t *best = json_array_get(json_object_get(logprobs, "top_logprobs"), i);
        if (i == 0 && prompt > 0) {
            assert_true(json_is_null(value) && json_is_null(best));
            continue;
        }
        assert_true(json_is_real(value));
        assert_true(json_object_size(best) >= 1 && json_object_size(best) <= top + 1);
        if (top == 0)
            assert_true(
                json_equal(json_object_get(best, json_string_value(json_array_get(
                                                     json_object_get(logprobs, "tokens"), i))),
                           value));
    }
}

static void echo_with_logprobs_has_an_entry_more_than_the_prompt(void **state) {
    (void)state;
    struct rig *rig = open_rig();
    static const char *const MAX[] = {"0", "1"};
    for (int m = 0; m < 2; m++) {
        char body[256];
        snprintf(body, sizeof body,
                 "{\"prompt\":[[50,51,52,53,54],[60,61,62]],\"echo\":true,\"max_tokens\":%s,"
                 "\"logprobs\":1,"
                 "\"temperature\":0,\"seed\":1234}",
                 MAX[m]);
        json_t *answer = rig_post(rig, "/v1/completions", body, 200);
        check_logprobs(choice_at(answer, 0), 5, 1, 1);
        check_logprobs(choice_at(answer, 1), 3, 1, 1);
        const json_t *values =
            json_object_get(json_object_get(choice_at(answer, 0), "logprobs"), "token_logprobs");
        for (uint32_t i = 1; i < 5; i++)
            assert_true((float)json_real_value(json_array_get(values, i)) ==
                        rig_logprob(50 + i, i));
        /* The text of max_tokens 0 is the prompt alone. */
        uint32_t prompt[] = {50, 51, 52, 53, 54};
        char *echo = decode(rig, prompt, 5);
        assert_memory_equal(string_at(choice_at(answer, 0), "text"), echo, strlen(echo));
        assert_true((strlen(string_at(choice_at(answer, 0), "text")) == strlen(echo)) == (m == 0));
        free(echo);
        json_decref(answer);
    }
    json_t *text = rig_post(
        rig, "/v1/completions",
        "{\"prompt\":\"In the beginning\",\"echo\":true,\"max_tokens\":3,\"logprobs\":0}", 200);
    assert_memory_equal(string_at(choice_at(text, 0), "text"), "In the beginning", 16);
    const json_t *offsets =
        json_object_get(json_object_get(choice_at(text, 0), "logprobs"), "text_offset");
    uint32_t entries = (uint32_t)json_array_size(offsets);
    check_logprobs(choice_at(text, 0), entries - 3, 3, 0);
    assert_int_equal(json_integer_value(json_array_get(offsets, entries - 3)), 16);
    assert_int_equal(json_integer_value(json_array_get(offsets, 1)), 0); /* bos has no text */
    json_decref(text);
    assert_true(rig_settles(rig, 3000));
    rig_close(rig);
}

static void streamed_logprobs_add_up_to_the_whole(void **state) {
    (void)state;
    struct rig *rig = open_rig();
#define BODY                                                                                       \
    "{\"prompt\":\"In the "                                                                        \
    "beginning\",\"echo\":true,\"max_tokens\":9,\"logprobs\":3,\"n\":2,\"seed\":1"
    json_t *whole = rig_post(rig, "/v1/completions", BODY "}", 200);
    uint64_t client = rig_http(rig, "POST", "/v1/completions", NULL, BODY ",\"stream\":true}");
    assert_true(rig_wait(rig, client, 1000));
    json_t *events = rig_events(rig_answer(rig, client));
    static const char *const LISTS[] = {"tokens", "token_logprobs", "top_logprobs", "text_offset"};
    for (uint32_t c = 0; c < 2; c++)
        for (size_t l = 0; l < 4; l++) {
            json_t *joined = json_array(), *event;
            size_t i;
            json_array_foreach(events, i, event) if (integer_at(choice_at(event, 0), "index") == c)
                json_array_extend(
                    joined,
                    json_object_get(json_object_get(choice_at(event, 0), "logprobs"), LISTS[l]));
            assert_true(
                json_equal(joined, json_object_get(json_object_get(choice_at(whole, c), "logprobs"),
                                                   LISTS[l])));
            json_decref(joined);
        }
    json_decref(events);
    json_decref(whole);
    rig_close(rig);
#undef BODY
}

/* ---- chat ---- */

static void chat_answers_whole_and_streamed(void **state) {
    (void)state;
    struct rig *rig = open_rig();
    struct token_list script = encode(rig, "Hi \xe4\xbd\xa0!");
    rig->script = script.token;
    rig->script_tokens = script.count;
#define BODY                                                                                       \
    "{\"messages\":[{\"role\":\"user\",\"content\":\"Hello\"}],\"logprobs\":true,\"top_"           \
    "logprobs\":2"
    json_t *answer = rig_post(rig, "/v1/chat/completions", BODY "}", 200);
    assert_string_equal(string_at(answer, "object"), "chat.completion");
    assert_memory_equal(string_at(answer, "id"), "chatcmpl-", 9);
    const json_t *said = json_object_get(choice_at(answer, 0), "message");
    assert_string_equal(string_at(said, "role"), "assistant");
    assert_string_equal(string_at(said, "content"), "Hi \xe4\xbd\xa0!");
    assert_string_equal(string_at(choice_at(answer, 0), "finish_reason"), "stop");
    const json_t *content =
        json_object_get(json_object_get(choice_at(answer, 0), "logprobs"), "content");
    assert_int_equal(json_array_size(content), script.count + 1); /* eos has an entry too */
    assert_int_equal(json_array_size(json_object_get(json_array_get(content, 0), "top_logprobs")),
                     2);
    assert_true(json_array_size(json_object_get(json_array_get(content, 0), "bytes")) > 0);
    uint64_t client = rig_http(rig, "POST", "/v1/chat/completions", NULL, BODY ",\"stream\":true}");
    assert_true(rig_wait(rig, client, 1000));
    json_t *events = rig_events(rig_answer(rig, client)), *event;
    size_t i;
    json_array_foreach(events, i, event) {
        const json_t *delta = json_object_get(choice_at(event, 0), "delta");
        assert_string_equal(string_at(event, "object"), "chat.completion.chunk");
        assert_true((json_object_get(delta, "role") != NULL) == (i == 0));
        const char *key;
        json_t *value;
        json_object_foreach((json_t *)delta, key, value) assert_true(json_is_string(value));
        if (i == 0)
            assert_true(strlen(string_at(delta, "content")) > 0);
    }
    char *text = rig_stream_text(events, 0, "content");
    assert_string_equal(text, "Hi \xe4\xbd\xa0!");
    free(text);
    json_decref(events);
    json_decref(answer);
    token_list_free(&script);
    assert_true(rig_settles(rig, 3000));
    rig_close(rig);
#undef BODY
}

static void chat_may_fill_the_context_and_no_more(void **state) {
    (void)state;
    struct settings settings;
    settings_default(&settings);
    settings.context_tokens = 64;
    struct rig *rig = rig_open(&(struct rig_options){.chat = CHAT_DEMO}, &settings);
    json_t *answer = rig_post(rig, "/v1/chat/completions",
                              "{\"messages\":[{\"role\":\"user\",\"content\":\"Hello\"}]}", 200);
    assert_int_equal(integer_at(json_object_get(answer, "usage"), "total_tokens"), 64);
    json_decref(answer);
    answer = rig_post(rig, "/v1/completions", "{\"prompt\":\"Hello\"}", 200);
    assert_int_equal(integer_at(json_object_get(answer, "usage"), "completion_tokens"), 16);
    json_decref(answer);
    expect_error(rig, "/v1/completions", "{\"prompt\":\"Hello\",\"max_tokens\":64}", 400,
                 "BadRequestError",
                 "This model's maximum context length is 64 tokens. However, you requested");
    char body[4096] = "{\"prompt\":[1";
    for (int i = 0; i < 70; i++)
        strcat(body, ",1");
    strcat(body, "]}");
    expect_error(rig, "/v1/completions", body, 400, "BadRequestError",
                 "the prompt has 71 tokens, which leaves no room for an answer: at most 63");
    strcpy(body, "{\"prompt\":[1");
    for (int i = 0; i < 63; i++)
        strcat(body, ",1");
    strcat(body, "],\"max_tokens\":1}"); /* exactly as many as the context holds */
    expect_error(rig, "/v1/completions", body, 400, "BadRequestError", "the prompt has 64 tokens");
    expect_error(rig, "/v1/completions", "{\"prompt\":\"Hello\",\"min_tokens\":17}", 400,
                 "BadRequestError", "min_tokens must be at most max_tokens = 16");
    rig_close(rig);
}

static void text_that_cannot_fit_is_refused_before_it_is_tokenised(void **state) {
    (void)state;
    struct rig *rig = open_rig();
    size_t size = 4 << 20;
    char *body = malloc(size + 64);
    for (int chat = 0; chat < 2; chat++) {
        const char *head =
            chat ? "{\"messages\":[{\"role\":\"user\",\"content\":\"" : "{\"prompt\":\"";
        strcpy(body, head);
        memset(body + strlen(head), 'a', size);
        strcpy(body + strlen(head) + size, chat ? "\"}]}" : "\"}");
        expect_error(rig, chat ? "/v1/chat/completions" : "/v1/completions", body, 400,
                     "BadRequestError", "have 4194304 bytes, which is at least");
    }
    free(body);
    rig_close(rig);
}

static void an_unknown_chat_format_leaves_completions_working(void **state) {
    (void)state;
    struct rig *rig = rig_open(&(struct rig_options){.chat = CHAT_NONE}, NULL);
    expect_error(rig, "/v1/chat/completions",
                 "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]}", 400, "BadRequestError",
                 "no chat_template");
    json_decref(rig_post(rig, "/v1/completions", "{\"prompt\":\"Hello\"}", 200));
    rig_close(rig);
}

static void reasoning_has_both_names(void **state) {
    (void)state;
    struct rig *rig = rig_open(&(struct rig_options){.chat = CHAT_R1}, NULL);
    struct token_list script = encode(rig, "let me see\n</think>\n\n42");
    rig->script = script.token;
    rig->script_tokens = script.count;
#define BODY "{\"messages\":[{\"role\":\"user\",\"content\":\"Hello\"}]"
    json_t *answer = rig_post(rig, "/v1/chat/completions", BODY "}", 200);
    const json_t *said = json_object_get(choice_at(answer, 0), "message");
    assert_string_equal(string_at(said, "reasoning"), "let me see\n");
    assert_string_equal(string_at(said, "reasoning_content"), "let me see\n");
    assert_string_equal(string_at(said, "content"), "\n\n42");
    json_decref(answer);
    uint64_t client = rig_http(rig, "POST", "/v1/chat/completions", NULL, BODY ",\"stream\":true}");
    assert_true(rig_wait(rig, client, 1000));
    json_t *events = rig_events(rig_answer(rig, client));
    static const struct {
        const char *key, *text;
    } keys[] = {{"reasoning", "let me see\n"},
                {"reasoning_content", "let me see\n"},
                {"content", "\n\n42"}};
    for (size_t i = 0; i < 3; i++) {
        char *text = rig_stream_text(events, 0, keys[i].key);
        assert_string_equal(text, keys[i].text);
        free(text);
    }
    json_decref(events);
    token_list_free(&script);
    rig_close(rig);
#undef BODY
}

/* ---- what goes wrong ---- */

/* All that a streamed answer of two choices says: the text, and the logprobs to the last digit. */
static char *said_by(struct rig *rig, uint64_t client) {
    static const char *const LISTS[] = {"token_logprobs", "top_logprobs"};
    json_t *events = rig_events(rig_answer(rig, client)), *event, *said = json_array();
    size_t i;
    for (uint32_t c = 0; c < 2; c++) {
        char *text = rig_stream_text(events, c, NULL);
        json_array_append_new(said, json_string(text));
        free(text);
        for (size_t l = 0; l < 2; l++) {
            json_t *list = json_array();
            json_array_foreach(events, i, event) {
                const json_t *choice = choice_at(event, 0);
                if (integer_at(choice, "index") == c)
                    json_array_extend(
                        list, json_object_get(json_object_get(choice, "logprobs"), LISTS[l]));
            }
            json_array_append_new(said, list);
        }
    }
    char *ret = json_dumps(said, 0);
    json_decref(said);
    json_decref(events);
    return ret;
}

static char *stream_of(struct rig *rig, const char *body) {
    uint64_t client = rig_http(rig, "POST", "/v1/completions", NULL, body);
    assert_true(rig_wait(rig, client, 200000));
    return said_by(rig, client);
}

static const char FAULT_BODY[] = "{\"prompt\":\"In the beginning God created the heaven and the "
                                 "earth\",\"n\":2,\"seed\":8,\"temperature\":1,\"max_tokens\":60,"
                                 "\"stream\":true,\"echo\":true,\"logprobs\":2}";

static void a_bad_network_never_changes_the_stream(void **state) {
    (void)state;
    struct settings settings;
    settings_default(&settings);
    settings.poll_ms = 20;
    struct rig *rig =
        rig_open(&(struct rig_options){.chat = CHAT_DEMO, .attentions = 2}, &settings);
    char *expected = stream_of(rig, FAULT_BODY);
    for (uint64_t seed = 1; seed <= 60; seed++) {
        rig->seed = seed;
        rig->loss = 0.05 * (double)(seed % 8);
        rig->duplicate = 0.05 * (double)(seed % 5);
        rig->reorder = seed % 2 == 0;
        rig->tokens_per_message = 1 + (uint32_t)seed % 3;
        char *text = stream_of(rig, FAULT_BODY);
        if (strcmp(text, expected) != 0)
            fail_msg("seed %llu: %s\ninstead of %s", (unsigned long long)seed, text, expected);
        free(text);
        if (!rig_settles(rig, 20000))
            fail_msg("seed %llu", (unsigned long long)seed);
    }
    free(expected);
    rig_close(rig);
}

static void a_gap_is_asked_for_at_once(void **state) {
    (void)state;
    struct rig *rig = open_rig(); /* poll_ms is a second: a thousand ticks */
    char *expected = stream_of(rig, FAULT_BODY);
    for (int round = 0; round < 30; round++) {
        rig->seed = (uint64_t)round;
        rig_http(rig, "POST", "/v1/completions", NULL, FAULT_BODY);
        uint64_t client = rig->last_client;
        for (int i = 0; i < 5; i++)
            rig_tick(rig);
        rig->loss = 1; /* one tick's tokens are lost */
        rig_tick(rig);
        rig->loss = 0;
        assert_true(rig_wait(rig, client, 80));
        assert_true(rig_settles(rig, 3000));
    }
    free(expected);
    rig_close(rig);
}

static void a_dead_attention_actor_never_changes_the_stream(void **state) {
    (void)state;
    for (uint32_t ticks = 1; ticks < 70; ticks += 3) {
        struct rig *rig = rig_open(&(struct rig_options){.chat = CHAT_DEMO, .attentions = 2}, NULL);
        char *expected = stream_of(rig, FAULT_BODY);
        uint64_t client = rig_http(rig, "POST", "/v1/completions", NULL, FAULT_BODY);
        for (uint32_t i = 0; i < ticks; i++)
            rig_tick(rig);
        rig_kill(rig, 0); /* both choices went to different actors: one dies, the other goes on */
        if (ticks % 2 == 0) {
            struct event lost = {.kind = EVENT_PEER_LOST, .peer = {.id = 20, .incarnation = 200}};
            rig_deliver(rig, &lost);
        } else {
            rig_commit(rig);
        }
        rig->attention[0].alive = true; /* a new process in its place, under a new incarnation */
        rig->attention[0].incarnation = 999;
        rig_commit(rig);
        assert_true(rig_wait(rig, client, 20000));
        char *found = said_by(rig, client);
        assert_string_equal(found, expected);
        free(found);
        free(expected);
        assert_true(rig_settles(rig, 5000));
        rig_close(rig);
    }
}

static void sequences_go_where_there_is_least_to_do(void **state) {
    (void)state;
    struct rig *rig = rig_open(&(struct rig_options){.chat = CHAT_DEMO, .attentions = 3}, NULL);
    for (int i = 0; i < 6; i++)
        rig_http(rig, "POST", "/v1/completions", NULL, "{\"prompt\":[5,6,7],\"max_tokens\":100}");
    rig_tick(rig);
    for (int i = 0; i < 3; i++)
        assert_int_equal(rig->attention[i].submits, 2);
    rig_close(rig);
}

/* A prompt of 70 tokens of which `first` is the first one. */
static uint64_t ask_long(struct rig *rig, uint32_t first) {
    char body[512];
    int used = snprintf(body, sizeof body, "{\"prompt\":[%u", first);
    for (uint32_t i = 1; i < 70; i++)
        used += snprintf(body + used, sizeof body - (size_t)used, ",%u", 20 + i);
    snprintf(body + used, sizeof body - (size_t)used, "],\"max_tokens\":3}");
    return rig_http(rig, "POST", "/v1/completions", NULL, body);
}

/* Who has seen a beginning is asked again, unless others have less to do by more than it saves. */
static void a_known_beginning_goes_where_it_is_known(void **state) {
    (void)state;
    for (uint32_t on = 0; on < 2; on++) {
        struct settings settings;
        settings_default(&settings);
        settings.prefix_cache = on;
        struct rig *rig = rig_open(&(struct rig_options){.chat = CHAT_DEMO, .attentions = 2}, &settings);
        ask_long(rig, 7); /* the first two go to the first two */
        assert_true(rig_wait(rig, ask_long(rig, 8), 100));
        assert_true(rig_settles(rig, 5000));
        assert_int_equal(rig->attention[0].submits, 1);
        assert_int_equal(rig->attention[1].submits, 1);
        assert_true(rig_wait(rig, ask_long(rig, 8), 100));
        assert_int_equal(rig->attention[1].submits, 1 + on);
        assert_true(rig_settles(rig, 5000));
        uint32_t before = rig->attention[0].submits;
        ask_long(rig, 8);
        ask_long(rig, 8); /* 70 + 3 tokens are placed there by now, 64 would be saved */
        rig_tick(rig);
        assert_int_equal(rig->attention[0].submits, before + 1);
        assert_int_equal(rig->attention[1].submits, 2 + on);
        rig_close(rig);
    }
}

static void overload_is_said_with_429(void **state) {
    (void)state;
    struct rig *rig = rig_open(&(struct rig_options){.chat = CHAT_DEMO, .attentions = 2}, NULL);
    rig->attention[0].refuse = ERR_BUSY;
    json_decref(
        rig_post(rig, "/v1/completions", "{\"prompt\":\"Hello\"}", 200)); /* the other takes it */
    rig->attention[1].refuse = ERR_BUSY;
    expect_error(rig, "/v1/completions", "{\"prompt\":\"Hello\"}", 429, "RateLimitError",
                 "full; try again");
    assert_string_equal(rig_answer(rig, rig->last_client)->header, "Retry-After: 1");
    for (int i = 0; i < 200; i++)
        rig_tick(rig);
    rig->attention[0].refuse = ERR_INVALID;
    rig->attention[1].refuse = ERR_INVALID;
    expect_error(rig, "/v1/completions", "{\"prompt\":\"Hello\"}", 400, "BadRequestError",
                 "the fake refuses");
    assert_true(rig_settles(rig, 5000));
    rig_close(rig);
}

static void nobody_there_is_said_with_503(void **state) {
    (void)state;
    struct settings settings;
    settings_default(&settings);
    settings.submit_timeout_ms = 500;
    settings.max_requests = 2;
    struct rig *rig = rig_open(&(struct rig_options){.chat = CHAT_DEMO}, &settings);
    rig_kill(rig, 0);
    rig_commit(rig);
    uint64_t client = rig_http(rig, "POST", "/v1/completions", NULL, "{\"prompt\":\"Hello\"}");
    assert_false(rig_wait(rig, client, 400));
    assert_true(rig_wait(rig, client, 200));
    assert_int_equal(rig_answer(rig, client)->status, 503);
    assert_string_equal(rig_answer(rig, client)->header, "Retry-After: 1");
    /* One that waits is taken as soon as somebody comes. */
    client = rig_http(rig, "POST", "/v1/completions", NULL, "{\"prompt\":\"Hello\"}");
    rig_http(rig, "POST", "/v1/completions", NULL, "{\"prompt\":\"Hello\"}");
    expect_error(rig, "/v1/completions", "{\"prompt\":\"Hello\"}", 503, "ServiceUnavailableError",
                 "at most 2");
    rig->attention[0].alive = true;
    rig_commit(rig);
    assert_true(rig_wait(rig, client, 400));
    assert_int_equal(rig_answer(rig, client)->status, 200);
    assert_true(rig_settles(rig, 5000));
    rig_close(rig);
}

static void a_client_that_goes_leaves_nothing(void **state) {
    (void)state;
    struct rig *rig = rig_open(&(struct rig_options){.chat = CHAT_DEMO, .attentions = 2}, NULL);
    uint64_t seed = 12;
    for (int round = 0; round < 100; round++) {
        char body[160];
        snprintf(body, sizeof body,
                 "{\"prompt\":[\"a\",\"bb\"],\"n\":2,\"max_tokens\":%u,\"stream\":%s}",
                 1 + random_below(&seed, 60), round % 2 == 0 ? "true" : "false");
        uint64_t client = rig_http(rig, "POST", "/v1/completions", NULL, body);
        for (uint32_t i = random_below(&seed, 50); i > 0; i--)
            rig_tick(rig);
        if (rig_answer(rig, client)->last)
            continue;
        struct event gone = {.kind = EVENT_CLIENT_GONE, .client = client};
        uint32_t pieces = rig_answer(rig, client)->pieces;
        rig_deliver(rig, &gone);
        rig_tick(rig);
        rig_tick(rig);
        assert_int_equal(rig_answer(rig, client)->pieces, pieces);
        assert_int_equal(rig->attention[0].sequences + rig->attention[1].sequences,
                         0); /* at once */
    }
    assert_true(rig_settles(rig, 3000));
    uint64_t client = rig_http(rig, "GET", "/metrics", NULL, NULL);
    assert_non_null(strstr(rig_answer(rig, client)->text,
                           "vllm:num_requests_running{model_name=\"demo\"} 0\n"));
    assert_non_null(strstr(rig_answer(rig, client)->text,
                           "vllm:num_requests_waiting{model_name=\"demo\"} 0\n"));
    rig_close(rig);
}

static void errors_in_a_stream_are_events(void **state) {
    (void)state;
    struct rig *rig = open_rig();
    uint64_t client = rig_http(rig, "POST", "/v1/completions", NULL,
                               "{\"prompt\":\"a\",\"max_tokens\":100,\"stream\":true}");
    for (int i = 0; i < 20; i++)
        rig_tick(rig);
    Troupe__Tokens tokens = TROUPE__TOKENS__INIT;
    tokens.sequence = rig->attention[0].sequence[0].id;
    tokens.finish = TROUPE__FINISH_REASON__FINISH_ERROR;
    tokens.error = "the cache burned";
    Troupe__Tokens *list[] = {&tokens};
    Troupe__TokensBatch batch = TROUPE__TOKENS_BATCH__INIT;
    batch.n_tokens = 1;
    batch.tokens = list;
    message envelope = TROUPE__ENVELOPE__INIT;
    envelope.body_case = TROUPE__ENVELOPE__BODY_TOKENS;
    envelope.tokens = &batch;
    rig_message(rig, 20, 200, &envelope);
    assert_true(rig_answer(rig, client)->last);
    json_t *events = rig_events(rig_answer(rig, client));
    const json_t *error =
        json_object_get(json_array_get(events, json_array_size(events) - 1), "error");
    assert_non_null(strstr(string_at(error, "message"), "the cache burned"));
    json_decref(events);
    assert_true(rig_settles(rig, 5000));
    rig_close(rig);
}

static void shutting_down_tells_the_clients(void **state) {
    (void)state;
    struct rig *rig = open_rig();
    uint64_t one =
        rig_http(rig, "POST", "/v1/completions", NULL, "{\"prompt\":\"a\",\"max_tokens\":100}");
    uint64_t two = rig_http(rig, "POST", "/v1/completions", NULL,
                            "{\"prompt\":\"a\",\"max_tokens\":100,\"stream\":true}");
    for (int i = 0; i < 9; i++)
        rig_tick(rig);
    struct event shutdown = {.kind = EVENT_SHUTDOWN};
    rig_deliver(rig, &shutdown);
    assert_int_equal(rig->exit_code, 0);
    assert_int_equal(rig_answer(rig, one)->status, 503);
    assert_true(rig_answer(rig, two)->last &&
                strstr(rig_answer(rig, two)->text, "shutting down") != NULL);
    assert_true(actor_deadline(rig->gateway) == NEVER);
    rig_close(rig);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(routes_answer_before_and_after_joining),
        cmocka_unit_test(routes_know_paths_methods_and_models),
        cmocka_unit_test(an_api_key_is_asked_for),
        cmocka_unit_test(text_and_tokens_turn_into_each_other),
        cmocka_unit_test(a_completion_is_the_decoded_tokens),
        cmocka_unit_test(a_stream_is_the_same_answer_in_pieces),
        cmocka_unit_test(choices_differ_and_repeat_with_their_seed),
        cmocka_unit_test(answers_end_where_they_should),
        cmocka_unit_test(stop_tokens_end_without_their_text),
        cmocka_unit_test(echo_with_logprobs_has_an_entry_more_than_the_prompt),
        cmocka_unit_test(streamed_logprobs_add_up_to_the_whole),
        cmocka_unit_test(chat_answers_whole_and_streamed),
        cmocka_unit_test(chat_may_fill_the_context_and_no_more),
        cmocka_unit_test(text_that_cannot_fit_is_refused_before_it_is_tokenised),
        cmocka_unit_test(an_unknown_chat_format_leaves_completions_working),
        cmocka_unit_test(reasoning_has_both_names),
        cmocka_unit_test(a_bad_network_never_changes_the_stream),
        cmocka_unit_test(a_gap_is_asked_for_at_once),
        cmocka_unit_test(a_dead_attention_actor_never_changes_the_stream),
        cmocka_unit_test(sequences_go_where_there_is_least_to_do),
        cmocka_unit_test(a_known_beginning_goes_where_it_is_known),
        cmocka_unit_test(overload_is_said_with_429),
        cmocka_unit_test(nobody_there_is_said_with_503),
        cmocka_unit_test(a_client_that_goes_leaves_nothing),
        cmocka_unit_test(errors_in_a_stream_are_events),
        cmocka_unit_test(shutting_down_tells_the_clients),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
