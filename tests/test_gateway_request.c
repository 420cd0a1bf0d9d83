/* Bodies of requests: every field's type and range, every bad input with the status and the words
 * that the client gets. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "actors/gateway/openai_request.h"
#include "tests/support/random.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

static const struct request_limits LIMITS = {
    .served_model = "demo",
    .vocabulary = 4096,
    .max_choices = 8,
    .max_logprobs = 5,
    .max_sequences = 16,
    .default_temperature = 0.6,
    .default_top_p = 0.95,
    .default_top_k = 0,
};

static struct generation_request good(enum endpoint endpoint, const char *body) {
    struct generation_request request;
    struct http_error error;
    if (request_parse(&request, endpoint, body, strlen(body), &LIMITS, &error) < 0)
        fail_msg("%s: %s", body, error.message);
    return request;
}

static void bad_bytes(enum endpoint endpoint, const char *body, size_t size, unsigned status,
                      const char *param, const char *words) {
    struct generation_request request;
    struct http_error error;
    if (request_parse(&request, endpoint, body, size, &LIMITS, &error) == 0)
        fail_msg("accepted: %.100s", body);
    if (error.status != status || (param == NULL) != (error.param == NULL) ||
        (param != NULL && strcmp(param, error.param) != 0) || strstr(error.message, words) == NULL)
        fail_msg("%.100s: status %u, param %s, \"%s\"; expected %u, %s, \"%s\"", body, error.status,
                 error.param == NULL ? "none" : error.param, error.message, status,
                 param == NULL ? "none" : param, words);
}

static void bad(enum endpoint endpoint, const char *body, unsigned status, const char *param,
                const char *words) {
    bad_bytes(endpoint, body, strlen(body), status, param, words);
}

static void defaults_come_from_the_model(void **state) {
    (void)state;
    struct generation_request r = good(ENDPOINT_COMPLETIONS, "{\"prompt\":\"hi\"}");
    assert_int_equal(r.prompts, 1);
    assert_string_equal(r.prompt[0].text, "hi");
    assert_true(r.temperature == 0.6 && r.top_p == 0.95 && r.min_p == 0 &&
                r.repetition_penalty == 1);
    assert_true(r.n == 1 && r.max_tokens == ABSENT && r.seed == ABSENT && r.logprobs == ABSENT);
    assert_true(r.skip_special_tokens && r.add_special_tokens && !r.stream && !r.echo);
    request_free(&r);
}

static void null_is_absent_and_unknown_fields_are_ignored(void **state) {
    (void)state;
    struct generation_request r =
        good(ENDPOINT_COMPLETIONS, "{\"prompt\":\"hi\",\"model\":null,\"max_tokens\":null,\"stop\":"
                                   "null,\"stop_token_ids\":null,"
                                   "\"logit_bias\":null,\"stream_options\":null,\"seed\":null,"
                                   "\"temperature\":null,\"logprobs\":null,"
                                   "\"user\":\"me\",\"suffix\":null,\"nonsense\":{\"a\":[1,2]}}");
    assert_true(r.max_tokens == ABSENT && r.temperature == 0.6 && r.stop.count == 0);
    request_free(&r);
}

static void every_field_is_read(void **state) {
    (void)state;
    struct generation_request r = good(
        ENDPOINT_COMPLETIONS,
        "{\"model\":\"demo\",\"prompt\":[[1,2,3],[4]],\"max_tokens\":7,\"min_tokens\":2,\"stream\":"
        "true,"
        "\"stream_options\":{\"include_usage\":true,\"continuous_usage_stats\":true},"
        "\"temperature\":0,"
        "\"top_p\":0.5,\"top_k\":-1,\"min_p\":0.1,\"presence_penalty\":-2,\"frequency_penalty\":2,"
        "\"repetition_penalty\":1.1,\"stop\":[\"a\",\"bc\"],\"stop_token_ids\":[9],\"seed\":-5,"
        "\"n\":2,"
        "\"ignore_eos\":true,\"echo\":true,\"logprobs\":5,\"logit_bias\":{\"17\":-200,\"3\":1.5},"
        "\"return_token_ids\":true,\"include_stop_str_in_output\":true,\"skip_special_tokens\":"
        "false}");
    assert_true(r.prompts == 2 && r.prompt[0].tokens == 3 && r.prompt[0].token[2] == 3);
    assert_true(r.prompt[1].tokens == 1 && r.prompt[1].token[0] == 4);
    assert_true(r.max_tokens == 7 && r.min_tokens == 2 && r.n == 2 && r.seed == -5 &&
                r.logprobs == 5);
    assert_true(r.temperature == 0 && r.top_p == 0.5 && r.top_k == -1 && r.min_p == 0.1);
    assert_true(r.presence_penalty == -2 && r.frequency_penalty == 2 &&
                r.repetition_penalty == 1.1);
    assert_true(r.stream && r.include_usage && r.continuous_usage_stats && r.echo && r.ignore_eos);
    assert_true(r.return_token_ids && r.include_stop && !r.skip_special_tokens);
    assert_true(r.stop.count == 2 && r.stop.string[1].size == 2 && r.stop_tokens == 1 &&
                r.stop_token[0] == 9);
    assert_true(r.biases == 2 && r.bias_token[0] == 17 && r.bias_value[0] == -100 &&
                r.bias_value[1] == 1.5f);
    request_free(&r);
}

static void prompts_come_in_four_kinds(void **state) {
    (void)state;
    struct generation_request r = good(ENDPOINT_COMPLETIONS, "{\"prompt\":[\"a\",\"\\u0000b\"]}");
    assert_true(r.prompts == 2 && r.prompt[1].text_bytes == 2 && r.prompt[1].text[1] == 'b');
    request_free(&r);
    r = good(ENDPOINT_COMPLETIONS, "{\"prompt\":[1,2]}");
    assert_true(r.prompts == 1 && r.prompt[0].text == NULL && r.prompt[0].tokens == 2);
    request_free(&r);
    bad(ENDPOINT_COMPLETIONS, "{}", 400, "prompt", "found nothing");
    bad(ENDPOINT_COMPLETIONS, "{\"prompt\":null}", 400, "prompt", "found nothing");
    bad(ENDPOINT_COMPLETIONS, "{\"prompt\":3}", 400, "prompt", "found an integer");
    bad(ENDPOINT_COMPLETIONS, "{\"prompt\":[]}", 400, "prompt", "empty list");
    bad(ENDPOINT_COMPLETIONS, "{\"prompt\":[[]]}", 400, "prompt", "empty list");
    bad(ENDPOINT_COMPLETIONS, "{\"prompt\":[1,\"a\"]}", 400, "prompt", "found a string");
    bad(ENDPOINT_COMPLETIONS, "{\"prompt\":[\"a\",[1]]}", 400, "prompt", "a list beside a string");
    bad(ENDPOINT_COMPLETIONS, "{\"prompt\":[{}]}", 400, "prompt", "found an object");
    bad(ENDPOINT_COMPLETIONS, "{\"prompt\":[-1]}", 400, "prompt",
        "Token id -1 of prompt is out of vocabulary");
    bad(ENDPOINT_COMPLETIONS, "{\"prompt\":[4096]}", 400, "prompt", "expected 0 to 4095");
    bad(ENDPOINT_COMPLETIONS, "{\"prompt\":[[1.5]]}", 400, "prompt",
        "found a number with a fraction");
}

static void wrong_types_and_ranges_are_refused(void **state) {
    (void)state;
    static const struct {
        const char *fields, *param, *words;
    } cases[] = {
        {"\"max_tokens\":\"16\"", "max_tokens", "must be an integer, found a string"},
        {"\"max_tokens\":-1", "max_tokens", "at least 0 and at most 2147483647, found -1"},
        {"\"max_tokens\":0", "max_tokens", "at least 1, found 0"},
        {"\"max_tokens\":1e300", "max_tokens", "must be an integer"},
        {"\"max_tokens\":99999999999", "max_tokens", "found 99999999999"},
        {"\"max_tokens\":1.5", "max_tokens", "must be an integer, found 1.5"},
        {"\"max_tokens\":true", "max_tokens", "found a boolean"},
        {"\"min_tokens\":5,\"max_tokens\":4", "min_tokens", "at most max_tokens = 4, found 5"},
        {"\"n\":0", "n", "at least 1 and at most 128, found 0"},
        {"\"n\":9", "n", "at most 8, found 9"},
        {"\"n\":1000000", "n", "found 1000000"},
        {"\"temperature\":-0.1", "temperature", "at least 0"},
        {"\"temperature\":\"hot\"", "temperature", "must be a number, found a string"},
        {"\"temperature\":1000", "temperature", "at most 100, found 1000"},
        {"\"top_p\":0", "top_p", "more than 0 and at most 1, found 0"},
        {"\"top_p\":1.01", "top_p", "at most 1"},
        {"\"top_k\":-2", "top_k", "at least -1"},
        {"\"min_p\":2", "min_p", "at most 1, found 2"},
        {"\"repetition_penalty\":0", "repetition_penalty", "more than 0"},
        {"\"presence_penalty\":3", "presence_penalty", "at most 2, found 3"},
        {"\"frequency_penalty\":-3", "frequency_penalty", "at least -2"},
        {"\"stream\":1", "stream", "must be true or false, found an integer"},
        {"\"stream\":\"true\"", "stream", "found a string"},
        {"\"echo\":\"yes\"", "echo", "found a string"},
        {"\"logprobs\":6", "logprobs", "at most 5 logprobs"},
        {"\"logprobs\":true", "logprobs", "must be an integer, found a boolean"},
        {"\"seed\":1.5", "seed", "must be an integer, found 1.5"},
        {"\"user\":5", "user", "must be a string"},
        {"\"model\":5", "model", "must be a string, found an integer"},
        {"\"stop\":\"\"", "stop", "1 to 1024 bytes, found 0"},
        {"\"stop\":[3]", "stop", "found an integer"},
        {"\"stop\":{}", "stop", "found an object"},
        {"\"stop\":[\"1\",\"2\",\"3\",\"4\",\"5\",\"6\",\"7\",\"8\",\"9\",\"a\",\"b\",\"c\",\"d\","
         "\"e\",\"f\",\"g\","
         "\"h\"]",
         "stop", "at most 16 strings, found 17"},
        {"\"stop_token_ids\":[-4]", "stop_token_ids", "out of vocabulary"},
        {"\"stop_token_ids\":7", "stop_token_ids", "must be a list"},
        {"\"logit_bias\":[1]", "logit_bias", "found a list"},
        {"\"logit_bias\":{\"x\":1}", "logit_bias", "found \"x\""},
        {"\"logit_bias\":{\"4096\":1}", "logit_bias", "0 to 4095"},
        {"\"logit_bias\":{\"-1\":1}", "logit_bias", "found \"-1\""},
        {"\"logit_bias\":{\"1\":\"a\"}", "logit_bias", "must be a number"},
        {"\"logit_bias\":{\"1\":1,\"01\":2}", "logit_bias", "twice"},
        {"\"stream_options\":{\"include_usage\":true}", "stream_options", "stream: true"},
        {"\"stream\":true,\"stream_options\":{\"include_usage\":3}", "stream_options",
         "include_usage must be"},
        {"\"stream\":true,\"stream_options\":7", "stream_options", "must be an object"},
        {"\"suffix\":\"end\"", "suffix", "not supported"},
        {"\"best_of\":3", "best_of", "unless it equals n (1)"},
        {"\"max_tokens\":1,\"max_tokens\":2", NULL, "duplicate"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char body[512];
        snprintf(body, sizeof body, "{\"prompt\":\"hi\",%s}", cases[i].fields);
        bad(ENDPOINT_COMPLETIONS, body, 400, cases[i].param, cases[i].words);
    }
    bad(ENDPOINT_COMPLETIONS, "{\"prompt\":\"hi\",\"model\":\"gpt-4\"}", 404, "model",
        "`gpt-4` does not exist");
    bad(ENDPOINT_COMPLETIONS, "{\"prompt\":[\"a\",\"b\",\"c\"],\"n\":8}", 400, "n",
        "at most 16, found 3 times 8");
}

static void malformed_and_oversized_json_is_refused(void **state) {
    (void)state;
    bad(ENDPOINT_COMPLETIONS, "", 400, NULL, "invalid JSON");
    bad(ENDPOINT_COMPLETIONS, "{\"prompt\":", 400, NULL, "invalid JSON");
    bad(ENDPOINT_COMPLETIONS, "{\"prompt\":\"a\"} trailing", 400, NULL, "invalid JSON");
    bad(ENDPOINT_COMPLETIONS, "[1]", 400, NULL, "expected, found a list");
    bad(ENDPOINT_COMPLETIONS, "{\"prompt\":\"\xff\xfe\"}", 400, NULL, "invalid JSON");
    bad(ENDPOINT_COMPLETIONS, "{\"prompt\":\"\xed\xa0\x80\"}", 400, NULL, "invalid JSON");
    bad(ENDPOINT_COMPLETIONS, "{\"prompt\":\"\\ud800\"}", 400, NULL, "invalid JSON");
    bad(ENDPOINT_COMPLETIONS, "{\"max_tokens\":123456789012345678901234567890}", 400, NULL,
        "too big integer");
    char deep[4096];
    memset(deep, '[', sizeof deep);
    bad_bytes(ENDPOINT_COMPLETIONS, deep, sizeof deep, 400, NULL, "nested at most 64 deep");
    size_t huge = HTTP_BODY_MAX + 1;
    char *large = malloc(huge);
    memset(large, ' ', huge);
    bad_bytes(ENDPOINT_COMPLETIONS, large, huge, 413, NULL, "at most 8388608");
    memset(large, ',', HTTP_BODY_MAX);
    bad_bytes(ENDPOINT_COMPLETIONS, large, HTTP_BODY_MAX, 400, NULL, "at most 4194304 values");
    for (size_t i = 0; i + 1 < HTTP_BODY_MAX; i += 2)
        memcpy(large + i, "[]", 2);
    bad_bytes(ENDPOINT_COMPLETIONS, large, HTTP_BODY_MAX, 400, NULL, "65536 lists");
    free(large);
}

static void chat_messages_take_strings_and_parts(void **state) {
    (void)state;
    struct generation_request r = good(
        ENDPOINT_CHAT, "{\"messages\":[{\"role\":\"developer\",\"content\":\"be brief\"},"
                       "{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"a\"},{"
                       "\"type\":\"text\",\"text\":\"b\"}]},"
                       "{\"role\":\"assistant\",\"content\":null}],\"logprobs\":true,\"top_"
                       "logprobs\":3,\"max_tokens\":9,"
                       "\"max_completion_tokens\":4,\"chat_template_kwargs\":{\"thinking\":true}}");
    assert_int_equal(r.messages, 3);
    assert_string_equal(r.message[0].role, "system");
    assert_string_equal(r.message[1].content, "ab");
    assert_string_equal(r.message[2].content, "");
    assert_true(r.logprobs == 3 && r.max_tokens == 4 && r.thinking && r.add_generation_prompt);
    request_free(&r);
    r = good(ENDPOINT_CHAT,
             "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"logprobs\":true}");
    assert_true(r.logprobs == 0);
    request_free(&r);
    r = good(ENDPOINT_CHAT,
             "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"logprobs\":false}");
    assert_true(r.logprobs == ABSENT);
    request_free(&r);
#define WITH(fields) "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]," fields "}"
    bad(ENDPOINT_CHAT, "{}", 400, "messages", "found nothing");
    bad(ENDPOINT_CHAT, "{\"messages\":\"x\"}", 400, "messages", "found a string");
    bad(ENDPOINT_CHAT, "{\"messages\":[]}", 400, "messages", "1 to 4096 messages, found 0");
    bad(ENDPOINT_CHAT, "{\"messages\":[3]}", 400, "messages", "messages[0] must be an object");
    bad(ENDPOINT_CHAT, "{\"messages\":[{\"content\":\"x\"}]}", 400, "messages", "no such role");
    bad(ENDPOINT_CHAT, "{\"messages\":[{\"role\":\"user\",\"content\":4}]}", 400, "messages",
        "found an integer");
    bad(ENDPOINT_CHAT, "{\"messages\":[{\"role\":\"user\",\"content\":\"a\\u0000\"}]}", 400,
        "messages", "U+0000");
    bad(ENDPOINT_CHAT,
        "{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image_url\"}]}]}", 400,
        "messages", "found type image_url");
    bad(ENDPOINT_CHAT, "{\"messages\":[{\"role\":\"user\",\"content\":[3]}]}", 400, "messages",
        "content[0] must be");
    bad(ENDPOINT_CHAT, WITH("\"top_logprobs\":2"), 400, "top_logprobs", "needs logprobs: true");
    bad(ENDPOINT_CHAT, WITH("\"logprobs\":true,\"top_logprobs\":6"), 400, "top_logprobs",
        "at most 5");
    bad(ENDPOINT_CHAT, WITH("\"logprobs\":5"), 400, "logprobs", "must be true or false");
    bad(ENDPOINT_CHAT, WITH("\"max_completion_tokens\":0"), 400, "max_completion_tokens",
        "at least 1");
    bad(ENDPOINT_CHAT, WITH("\"chat_template_kwargs\":{\"thinking\":1}"), 400,
        "chat_template_kwargs", "thinking");
    bad(ENDPOINT_CHAT, WITH("\"continue_final_message\":true"), 400, "continue_final_message",
        "not supported");
}

static void tokenize_bodies(void **state) {
    (void)state;
    struct generation_request r =
        good(ENDPOINT_TOKENIZE,
             "{\"prompt\":\"hi\",\"add_special_tokens\":false,\"return_token_strs\":true}");
    assert_true(!r.add_special_tokens && r.return_token_strs && r.prompts == 1);
    request_free(&r);
    r = good(
        ENDPOINT_TOKENIZE,
        "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"add_generation_prompt\":false}");
    assert_true(r.messages == 1 && r.prompts == 0 && !r.add_generation_prompt);
    request_free(&r);
    r = good(ENDPOINT_DETOKENIZE, "{\"tokens\":[5,6]}");
    assert_true(r.prompt[0].tokens == 2);
    request_free(&r);
    r = good(ENDPOINT_DETOKENIZE, "{\"tokens\":[]}");
    assert_true(r.prompt[0].tokens == 0);
    request_free(&r);
    bad(ENDPOINT_TOKENIZE, "{}", 400, "prompt", "found nothing");
    bad(ENDPOINT_TOKENIZE, "{\"prompt\":[1]}", 400, "prompt", "must be a string, found a list");
    bad(ENDPOINT_DETOKENIZE, "{\"tokens\":\"a\"}", 400, "tokens", "found a string");
    bad(ENDPOINT_DETOKENIZE, "{\"tokens\":[99999]}", 400, "tokens", "out of vocabulary");
}

/* Mutated bodies: never a crash, and a refusal always says why. */
static void random_damage_is_survived(void **state) {
    (void)state;
    static const char BODY[] =
        "{\"prompt\":[[1,2],[3]],\"n\":2,\"stop\":[\"ab\"],\"logit_bias\":{\"3\":1.5},\"stop_token_"
        "ids\":[4],"
        "\"stream\":true,\"stream_options\":{\"include_usage\":true},\"messages\":[{\"role\":"
        "\"user\",\"content\":"
        "[{\"type\":\"text\",\"text\":\"x\"}]}],\"tokens\":[7],\"seed\":12,\"temperature\":0.5}";
    uint64_t seed = 20240607;
    uint32_t accepted = 0;
    for (int round = 0; round < 20000; round++) {
        char body[sizeof BODY];
        memcpy(body, BODY, sizeof BODY);
        for (uint32_t i = random_below(&seed, 3); i > 0; i--)
            body[random_below(&seed, sizeof BODY - 1)] =
                "{}[]\",:0-1e.x\\\xff"[random_below(&seed, 15)];
        struct generation_request request;
        struct http_error error;
        enum endpoint endpoint = (enum endpoint)(1u << random_below(&seed, 4));
        if (request_parse(&request, endpoint, body, sizeof BODY - 1, &LIMITS, &error) == 0) {
            accepted++;
            request_free(&request);
        } else {
            assert_true(error.status >= 400 && error.message[0] != '\0');
        }
    }
    assert_true(accepted > 1000 && accepted < 19000);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(defaults_come_from_the_model),
        cmocka_unit_test(null_is_absent_and_unknown_fields_are_ignored),
        cmocka_unit_test(every_field_is_read),
        cmocka_unit_test(prompts_come_in_four_kinds),
        cmocka_unit_test(wrong_types_and_ranges_are_refused),
        cmocka_unit_test(malformed_and_oversized_json_is_refused),
        cmocka_unit_test(chat_messages_take_strings_and_parts),
        cmocka_unit_test(tokenize_bodies),
        cmocka_unit_test(random_damage_is_survived),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
