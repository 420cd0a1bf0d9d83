/* What answers are made of: JSON text, floats, stop strings and reasoning tags, whatever the token
 * borders. */
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "actors/errors.h"
#include "actors/gateway/http_error.h"
#include "actors/gateway/json_text.h"
#include "actors/gateway/reasoning.h"
#include "actors/gateway/stop.h"
#include "tests/support/random.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

static void expect_text(const struct text *text, const char *expected) {
    char *copy = calloc(text->size + 1, 1);
    memcpy(copy, text->bytes == NULL ? "" : text->bytes, text->size);
    assert_string_equal(copy, expected);
    free(copy);
}

static void json_strings_are_valid_for_any_bytes(void **state) {
    (void)state;
    struct text text = {0};
    text_json(&text, "a\"\\\n\x01\x7f\xc3\xa9\xff\xed\xa0\x80\xf0\x9f\x98\x80\xe2\x82", 18);
    expect_text(
        &text,
        "\"a\\\"\\\\\\n\\u0001\\u007f\xc3\xa9\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"
        "\xf0\x9f\x98\x80\xef\xbf\xbd\xef\xbf\xbd\"");
    uint64_t seed = 7;
    for (int round = 0; round < 2000; round++) {
        char bytes[40];
        for (size_t i = 0; i < sizeof bytes; i++)
            bytes[i] = (char)(random_below(&seed, 3) == 0 ? 0x80 | random_next(&seed)
                                                          : random_next(&seed));
        text_clear(&text);
        text_json(&text, bytes, sizeof bytes);
        json_t *value = json_loadb(text.bytes, text.size, JSON_DECODE_ANY | JSON_ALLOW_NUL, NULL);
        assert_non_null(value);
        json_decref(value);
    }
    text_free(&text);
}

static void floats_keep_every_bit(void **state) {
    (void)state;
    struct text text = {0};
    const struct {
        float value;
        const char *digits;
    } cases[] = {{0.1f, "0.1"},
                 {-1.5f, "-1.5"},
                 {0, "0.0"},
                 {-0.0f, "-0.0"},
                 {-INFINITY, "-9999.0"},
                 {NAN, "-9999.0"},
                 {16777216, "16777216.0"},
                 {-3.4028235e38f, "-3.4028235e+38"}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        text_clear(&text);
        text_float(&text, cases[i].value);
        expect_text(&text, cases[i].digits);
    }
    uint64_t seed = 11;
    for (int round = 0; round < 20000; round++) {
        union {
            uint32_t bits;
            float value;
        } x = {.bits = (uint32_t)random_next(&seed)};
        if (!isfinite(x.value))
            continue;
        text_clear(&text);
        text_float(&text, x.value);
        text_append(&text, "", 1);
        assert_true(strtof(text.bytes, NULL) == x.value);
    }
    text_free(&text);
}

static void errors_have_the_documented_form(void **state) {
    (void)state;
    struct http_error error;
    assert_int_equal(http_fail(&error, 400, "n", "n must be at most %d", 3), ERR_INVALID);
    struct text text = {0};
    http_error_write(&text, &error);
    expect_text(&text,
                "{\"error\":{\"message\":\"n must be at most 3\",\"type\":\"BadRequestError\","
                "\"param\":\"n\",\"code\":400}}");
    text_free(&text);
}

/* The whole text and what comes out, with `step` bytes per token. */
struct stop_case {
    const char *stops[4];
    const char *text, *expected;
    int found;
    bool include;
};

static const struct stop_case STOP_CASES[] = {
    {{NULL}, "plain", "plain", -1, false},
    {{"END"}, "the END.", "the ", 0, false},
    {{"END"}, "the END.", "the END", 0, true},
    {{"END"}, "the EN", "the EN", -1, false},
    {{"aab"}, "aaaab!", "aa", 0, false},
    {{"aabaaac"}, "aabaabaaac", "aab", 0, false},
    {{"xyz", "y"}, "wxyz", "wx", 1, false},
    {{"yz", "xyz"}, "wxyz", "wx", 0, false},
    {{"\xc3\xa9t\xc3\xa9"}, "un \xc3\xa9t\xc3\xa9 chaud", "un ", 0, false},
    {{"\n\n", "Q:"}, "A\nQ\nQ: x", "A\nQ\n", 1, false},
};

static void stop_strings_do_not_depend_on_token_borders(void **state) {
    (void)state;
    for (size_t c = 0; c < sizeof STOP_CASES / sizeof STOP_CASES[0]; c++) {
        const struct stop_case *test = &STOP_CASES[c];
        struct stop_strings strings = {0};
        for (int i = 0; test->stops[i] != NULL; i++)
            stop_strings_add(&strings, test->stops[i], strlen(test->stops[i]));
        size_t size = strlen(test->text);
        for (size_t step = 1; step <= size; step++) {
            struct stop_filter filter;
            struct text out = {0};
            stop_filter_init(&filter, &strings);
            bool stopped = false;
            for (size_t at = 0; at < size && !stopped; at += step)
                stopped =
                    stop_filter_push(&filter, test->text + at, size - at < step ? size - at : step,
                                     true, test->include, &out);
            stop_filter_flush(&filter, &out);
            expect_text(&out, test->expected);
            assert_int_equal(filter.found, test->found);
            stop_filter_free(&filter);
            text_free(&out);
        }
        stop_strings_free(&strings);
    }
}

/* Against the plain definition, on random texts over two letters, where borders are everywhere. */
static void stop_strings_match_a_plain_search(void **state) {
    (void)state;
    uint64_t seed = 3;
    for (int round = 0; round < 5000; round++) {
        struct stop_strings strings = {0};
        char stop[2][6] = {{0}};
        for (int i = 0; i < 2; i++) {
            int size = 1 + (int)random_below(&seed, 5);
            for (int j = 0; j < size; j++)
                stop[i][j] = (char)('a' + random_below(&seed, 2));
            stop_strings_add(&strings, stop[i], (size_t)size);
        }
        char text[31] = {0};
        for (int i = 0; i < 30; i++)
            text[i] = (char)('a' + random_below(&seed, 2));
        size_t end = SIZE_MAX, cut = 30;
        for (int i = 0; i < 2; i++) {
            const char *at = strstr(text, stop[i]);
            if (at != NULL && (size_t)(at - text) + strlen(stop[i]) < end) {
                end = (size_t)(at - text) + strlen(stop[i]);
                cut = (size_t)(at - text);
            }
        }
        struct stop_filter filter;
        struct text out = {0};
        stop_filter_init(&filter, &strings);
        bool stopped = false;
        for (size_t at = 0; at < 30 && !stopped;) {
            size_t piece = 1 + random_below(&seed, 4);
            piece = piece > 30 - at ? 30 - at : piece;
            stopped = stop_filter_push(&filter, text + at, piece, true, false, &out);
            at += piece;
        }
        stop_filter_flush(&filter, &out);
        assert_int_equal(stopped, end != SIZE_MAX);
        text[cut] = '\0';
        expect_text(&out, text);
        stop_filter_free(&filter);
        text_free(&out);
        stop_strings_free(&strings);
    }
}

static void held_back_text_is_no_longer_than_needed(void **state) {
    (void)state;
    struct stop_strings strings = {0};
    stop_strings_add(&strings, "abcd", 4);
    struct stop_filter filter;
    struct text out = {0};
    stop_filter_init(&filter, &strings);
    stop_filter_push(&filter, "xxabc", 5, true, false, &out);
    expect_text(&out, "xx");
    stop_filter_push(&filter, "ab", 2, true, false, &out);
    expect_text(&out, "xxabc");
    /* Not watched: the first min_tokens tokens cannot hold a stop string, nor its beginning. */
    struct stop_filter early;
    struct text free_text = {0};
    stop_filter_init(&early, &strings);
    assert_false(stop_filter_push(&early, "abcdab", 6, false, false, &free_text));
    assert_false(stop_filter_push(&early, "cd", 2, true, false, &free_text));
    expect_text(&free_text, "abcdabcd");
    stop_filter_free(&filter);
    stop_filter_free(&early);
    text_free(&out);
    text_free(&free_text);
    stop_strings_free(&strings);
}

static void reasoning_is_split_at_its_tag(void **state) {
    (void)state;
    const struct {
        bool inside;
        const char *text, *thought, *answer;
    } cases[] = {
        {false, "a</think>b", "", "a</think>b"},
        {true, "hm\n</think>\n\n42", "hm\n", "\n\n42"},
        {true, "<think>hm</think>42", "hm", "42"},
        {true, "<thin</think>42", "<thin", "42"},
        {true, "<</think>", "<", ""},
        {true, "</think>42", "", "42"},
        {true, "never ends </thi", "never ends </thi", ""},
        {true, "<thi", "<thi", ""},
        {true, "a</think>b</think>c", "a", "b</think>c"},
    };
    for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++) {
        size_t size = strlen(cases[c].text);
        for (size_t step = 1; step <= size; step++) {
            struct reasoning reasoning;
            struct text thought = {0}, answer = {0};
            reasoning_init(&reasoning, cases[c].inside);
            for (size_t at = 0; at < size; at += step)
                reasoning_push(&reasoning, cases[c].text + at, size - at < step ? size - at : step,
                               &thought, &answer);
            reasoning_flush(&reasoning, &thought);
            expect_text(&thought, cases[c].thought);
            expect_text(&answer, cases[c].answer);
            reasoning_free(&reasoning);
            text_free(&thought);
            text_free(&answer);
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(json_strings_are_valid_for_any_bytes),
        cmocka_unit_test(floats_keep_every_bit),
        cmocka_unit_test(errors_have_the_documented_form),
        cmocka_unit_test(stop_strings_do_not_depend_on_token_borders),
        cmocka_unit_test(stop_strings_match_a_plain_search),
        cmocka_unit_test(held_back_text_is_no_longer_than_needed),
        cmocka_unit_test(reasoning_is_split_at_its_tag),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
