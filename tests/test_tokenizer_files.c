/* What tokenizer.json and tokenizer_config.json may not say: each thing is refused by name, damage
 * of any kind does no harm. */
#include "model/tokenizer.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "actors/limits.h"
#include "tests/support/random.h"
#include "tests/support/tokenizer_files.h"

#define SMALL "tests/data/tokenizer-small.json"

/* Each row breaks one thing of the small tokenizer. */
static void unknown_and_inconsistent_parts_are_refused(void **state) {
#define SPLIT(regex)                                                                               \
    "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"" regex                                          \
    "\"},\"behavior\":\"Isolated\",\"invert\":false}"
#define FIRST "pre_tokenizer.pretokenizers.0"
#define ADDED(id, content, more)                                                                   \
    "{\"id\":" id ",\"content\":" content "," more "\"normalized\":false,\"special\":true}"
    static const struct {
        const char *path, *value;
        int code;
        const char *says;
    } cases[] = {
        {"normalizer", "{\"type\":\"NFC\"}", ERR_UNSUPPORTED,
         "normalizer: expected none, found \"NFC\""},
        {"normalizer", "{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"Lowercase\"}]}",
         ERR_UNSUPPORTED, "Lowercase"},
        {"normalizer", "7", ERR_INVALID, "normalizer"},
        {"pre_tokenizer", "null", ERR_UNSUPPORTED, "pre_tokenizer"},
        {"pre_tokenizer", "{\"type\":\"Metaspace\"}", ERR_UNSUPPORTED, "\"Metaspace\""},
        {"pre_tokenizer", SPLIT("x"), ERR_UNSUPPORTED, "expected a ByteLevel"},
        {"pre_tokenizer", "[]", ERR_INVALID, "pre_tokenizer"},
        {FIRST, "{\"type\":\"Whitespace\"}", ERR_UNSUPPORTED, "\"Whitespace\""},
        {FIRST, "{\"type\":\"ByteLevel\",\"add_prefix_space\":true}", ERR_UNSUPPORTED,
         "add_prefix_space"},
        {FIRST, "{\"type\":\"ByteLevel\"}", ERR_UNSUPPORTED, "nothing after ByteLevel"},
        {FIRST, "{\"type\":\"Split\",\"pattern\":{\"String\":\"x\"},\"behavior\":\"Isolated\"}",
         ERR_UNSUPPORTED, "Regex"},
        {FIRST, "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"x\"},\"behavior\":\"Removed\"}",
         ERR_UNSUPPORTED, "\"Removed\""},
        {FIRST, "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"x\"}}", ERR_UNSUPPORTED, "behavior"},
        {FIRST,
         "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"x\"},\"behavior\":\"Isolated\",\"invert\":"
         "true}",
         ERR_UNSUPPORTED, "invert"},
        {FIRST, SPLIT("a(b"), ERR_INVALID, "regex: missing closing parenthesis"},
        {FIRST, SPLIT("*"), ERR_INVALID, "regex: quantifier does not follow"},
        {FIRST, SPLIT(""), ERR_INVALID, "regex"},
        {FIRST, SPLIT("a[b"), ERR_INVALID, "regex: a '[' has no ']'"},
        {FIRST, SPLIT("é\\\\w+"), ERR_UNSUPPORTED, "regex: \"\\w+\" is not supported"},
        {FIRST, SPLIT("[a[b]]"), ERR_UNSUPPORTED, "\"[b]]\""},
        {FIRST, SPLIT("[]a]"), ERR_UNSUPPORTED, "\"[]a]\""},
        {FIRST, SPLIT("[a-z&&b]"), ERR_UNSUPPORTED, "\"&&b]\""},
        {FIRST, SPLIT("\\\\p{Han}"), ERR_UNSUPPORTED, "\\p{Han}"},
        {FIRST, SPLIT("\\\\p{C}"), ERR_UNSUPPORTED, "\\p{C}"},
        {FIRST, SPLIT("\\\\pL"), ERR_UNSUPPORTED, "\\pL"},
        {FIRST, SPLIT("[\\\\P{L}]"), ERR_UNSUPPORTED, "\\P{L}"},
        {FIRST, SPLIT("(?<x>a)"), ERR_UNSUPPORTED, "(?<x>a)"},
        {FIRST, SPLIT("(?m:a)"), ERR_UNSUPPORTED, "(?m:a)"},
        {FIRST, SPLIT("(*UTF)a"), ERR_UNSUPPORTED, "(*UTF"},
        {FIRST, SPLIT("(a)\\\\1"), ERR_UNSUPPORTED, "\\1"},
        {FIRST, SPLIT("a{2}+"), ERR_UNSUPPORTED, "{2}+"},
        {FIRST, SPLIT("a{,2}"), ERR_UNSUPPORTED, "{,2}"},
        {FIRST, SPLIT("\\\\xff"), ERR_UNSUPPORTED, "\\xff"},
        {FIRST, SPLIT("\\\\Q"), ERR_UNSUPPORTED, "\\Q"},
        {FIRST, SPLIT("a\\\\"), ERR_UNSUPPORTED, "regex"},
        {"post_processor", "{\"type\":\"BertProcessing\"}", ERR_UNSUPPORTED, "BertProcessing"},
        {"decoder", "null", ERR_UNSUPPORTED, "decoder: expected \"ByteLevel\""},
        {"decoder", "{\"type\":\"WordPiece\"}", ERR_UNSUPPORTED, "WordPiece"},
        {"model.type", "\"Unigram\"", ERR_UNSUPPORTED,
         "model: expected \"BPE\", found \"Unigram\""},
        {"model.type", "null", ERR_INVALID, "model"},
        {"model", "null", ERR_UNSUPPORTED, "model: expected \"BPE\""},
        {"model.dropout", "0.1", ERR_UNSUPPORTED, "dropout"},
        {"model.unk_token", "\"<unk>\"", ERR_UNSUPPORTED, "unk_token"},
        {"model.byte_fallback", "true", ERR_UNSUPPORTED, "byte_fallback"},
        {"model.continuing_subword_prefix", "\"##\"", ERR_UNSUPPORTED, "continuing_subword_prefix"},
        {"model.end_of_word_suffix", "\"</w>\"", ERR_UNSUPPORTED, "end_of_word_suffix"},
        {"model.vocab", "{}", ERR_INVALID, "byte 0x00"},
        {"model.vocab", "[]", ERR_INVALID, "vocab"},
        {"model.vocab.ab", "255", ERR_CORRUPT, "id 255 is given twice, to \"ab\" too"},
        {"model.vocab.ab", "1048576", ERR_INVALID,
         "\"ab\": expected an id from 0 to 1048575, found 1048576"},
        {"model.vocab.ab", "-1", ERR_INVALID, "\"ab\": expected an id"},
        {"model.vocab.ab", "1.5", ERR_INVALID, "\"ab\": expected an id"},
        {"model.vocab.ab", "\"x\"", ERR_INVALID, "\"ab\": expected an id"},
        {"model.vocab.", "300", ERR_CORRUPT, "token 300"},
        {"model.merges", "{}", ERR_INVALID, "merges"},
        {"model.merges.0", "\"a qq\"", ERR_CORRUPT, "merge 0: \"qq\" is not in the vocabulary"},
        {"model.merges.1", "[\"qq\",\"a\"]", ERR_CORRUPT,
         "merge 1: \"qq\" is not in the vocabulary"},
        {"model.merges.1", "[\"b\",\"a\"]", ERR_CORRUPT, "merge 1: its result \"b\" + \"a\""},
        {"model.merges.1", "\"a b\"", ERR_CORRUPT, "merge 1: \"a\" + \"b\" is given twice"},
        {"model.merges.1", "\"ab\"", ERR_INVALID, "merge 1: expected"},
        {"model.merges.1", "\" b\"", ERR_CORRUPT, "merge 1"},
        {"model.merges.1", "[\"a\"]", ERR_INVALID, "merge 1: expected"},
        {"model.merges.1", "[\"a\",5]", ERR_INVALID, "merge 1: expected"},
        {"model.merges.1", "5", ERR_INVALID, "merge 1: expected"},
        {"added_tokens", "{}", ERR_INVALID, "added_tokens"},
        {"added_tokens.0", "7", ERR_INVALID, "added token 0"},
        {"added_tokens.0", ADDED("259", "\"\"", ""), ERR_INVALID, "added token 0"},
        {"added_tokens.0", ADDED("1048576", "\"<x>\"", ""), ERR_INVALID, "\"<x>\": expected an id"},
        {"added_tokens.0", ADDED("256", "\"<x>\"", ""), ERR_CORRUPT,
         "id 256 is given twice, to \"<x>\" too"},
        {"added_tokens.0", ADDED("260", "\"ab\"", ""), ERR_CORRUPT,
         "\"ab\" has id 260, but 256 in"},
        {"added_tokens.1", ADDED("260", "\"<eos>\"", ""), ERR_CORRUPT, "\"<eos>\" is given twice"},
        {"added_tokens.1", ADDED("259", "\"<x>\"", ""), ERR_CORRUPT, "id 259 is given twice"},
        {"added_tokens.0", ADDED("259", "\"<x>\"", "\"lstrip\":true,"), ERR_UNSUPPORTED,
         "<x>: \"lstrip\""},
        {"added_tokens.0", ADDED("259", "\"<x>\"", "\"rstrip\":true,"), ERR_UNSUPPORTED,
         "<x>: \"rstrip\""},
        {"added_tokens.0", ADDED("259", "\"<x>\"", "\"single_word\":true,"), ERR_UNSUPPORTED,
         "<x>: \"single_word\""},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        json_t *root = read_json_file(SMALL);
        json_error_t error;
        json_t *value = json_loads(cases[i].value, JSON_DECODE_ANY, &error);
        if (value == NULL)
            fail_msg("case %zu: %s", i, error.text);
        json_set_path(root, cases[i].path, value);
        struct tokenizer *tokenizer = NULL;
        struct failure failure = {0};
        int code = open_tokenizer_json(&tokenizer, root, &failure);
        if (code != cases[i].code || strstr(failure.text, cases[i].says) == NULL ||
            tokenizer != NULL)
            fail_msg("case %zu, %s = %s: expected %d \"%s\", found %d \"%s\"", i, cases[i].path,
                     cases[i].value, cases[i].code, cases[i].says, code, failure.text);
        json_decref(root);
    }
}

static void too_many_or_too_long_parts_are_refused(void **state) {
    struct tokenizer *tokenizer = NULL;
    struct failure failure = {0};
    json_t *root = read_json_file(SMALL), *stages = json_array();
    for (int i = 0; i < 17; i++)
        json_array_append_new(stages, json_loads(SPLIT("x"), 0, NULL));
    json_set_path(root, "pre_tokenizer.pretokenizers", stages);
    assert_int_equal(open_tokenizer_json(&tokenizer, root, &failure), ERR_TOO_LARGE);
    assert_non_null(strstr(failure.text, "at most 16 splits"));
    json_decref(root);

    root = read_json_file(SMALL);
    char *text = malloc(20001);
    assert_non_null(text);
    memset(text, 'x', 20000);
    text[20000] = 0;
    json_t *split = json_loads(SPLIT("x"), 0, NULL);
    json_set_path(split, "pattern.Regex", json_string(text));
    json_set_path(root, FIRST, split);
    assert_int_equal(open_tokenizer_json(&tokenizer, root, &failure), ERR_TOO_LARGE);
    json_decref(root);

    root = read_json_file(SMALL);
    json_set_path(root, "added_tokens.0.content", json_string(text));
    assert_int_equal(open_tokenizer_json(&tokenizer, root, &failure), ERR_INVALID);
    json_decref(root);
    free(text);
    assert_null(tokenizer);
}

static void files_that_are_no_json_are_refused(void **state) {
    struct tokenizer *tokenizer = NULL;
    struct failure failure = {0};
    assert_int_equal(tokenizer_open(&tokenizer, "", 0, NULL, 0, &failure), ERR_INVALID);
    assert_int_equal(tokenizer_open(&tokenizer, "hello", 5, NULL, 0, &failure), ERR_INVALID);
    assert_non_null(strstr(failure.text, "tokenizer.json: not JSON"));
    assert_int_equal(tokenizer_open(&tokenizer, "[1]", 3, NULL, 0, &failure), ERR_INVALID);
    assert_int_equal(tokenizer_open(&tokenizer, "{}", 2, NULL, 0, &failure), ERR_UNSUPPORTED);
    assert_int_equal(tokenizer_open(&tokenizer, "{\"a\":1,\"a\":2}", 13, NULL, 0, &failure),
                     ERR_INVALID);
    assert_int_equal(tokenizer_open(&tokenizer, "{}", (size_t)JSON_FILE_MAX + 1, NULL, 0, &failure),
                     ERR_TOO_LARGE);
    size_t depth = 1000000;
    char *deep = malloc(depth);
    assert_non_null(deep);
    memset(deep, '[', depth);
    assert_int_equal(tokenizer_open(&tokenizer, deep, depth, NULL, 0, &failure), ERR_TOO_LARGE);
    assert_non_null(strstr(failure.text, "nested deeper"));
    free(deep);
    assert_null(tokenizer);
}

/* Cut anywhere or with bytes changed, a file is refused or opens; never anything worse. */
static void damaged_files_do_no_harm(void **state) {
    uint64_t seed = 11;
    print_message("seed %llu\n", (unsigned long long)seed);
    json_t *root = read_json_file(SMALL);
    char *text = json_dumps(root, JSON_COMPACT);
    size_t bytes = strlen(text);
    for (size_t cut = 0; cut < bytes; cut++) {
        char *part = malloc(cut + 1);
        memcpy(part, text, cut);
        struct tokenizer *tokenizer = NULL;
        assert_true(tokenizer_open(&tokenizer, part, cut, NULL, 0, NULL) < 0);
        free(part);
    }
    uint32_t opened = 0;
    for (int round = 0; round < 4000; round++) {
        char *changed = malloc(bytes);
        memcpy(changed, text, bytes);
        for (uint32_t count = 1 + random_below(&seed, 3); count > 0;
             count--) /* mostly where the structure is */
            changed[random_below(&seed, random_below(&seed, 2) ? 900 : (uint32_t)bytes)] =
                "\"{}[],:0129abN\\ "[random_below(&seed, 16)];
        struct tokenizer *tokenizer = NULL;
        if (tokenizer_open(&tokenizer, changed, bytes, NULL, 0, NULL) == 0) {
            struct token_list list = {0};
            assert_int_equal(
                tokenizer_encode(tokenizer, "abcabX<eos> \n", 13, false, true, &list, NULL), 0);
            token_list_free(&list);
            opened++;
        }
        tokenizer_close(&tokenizer);
        free(changed);
    }
    assert_true(opened > 0 && opened < 4000);
    free(text);
    json_decref(root);
}

static void configs_are_checked(void **state) {
    static const struct {
        const char *config;
        int code;
        const char *says;
    } cases[] = {
        {"{\"bos_token\":\"<eos>\",\"eos_token\":{\"content\":\"<eos>\"},\"add_bos_token\":true}",
         0, ""},
        {"{}", 0, ""},
        {"{\"bos_token\":null,\"chat_template\":[{\"name\":\"default\",\"template\":\"T\"}]}", 0,
         ""},
        {"{\"bos_token\":\"<bos>\"}", ERR_INVALID, "bos_token: \"<bos>\" is not in tokenizer.json"},
        {"{\"eos_token\":{\"content\":\"<x>\"}}", ERR_INVALID, "eos_token: \"<x>\""},
        {"{\"eos_token\":5}", ERR_INVALID, "eos_token: expected a token"},
        {"{\"add_bos_token\":true}", ERR_INVALID, "there is no bos_token"},
        {"[]", ERR_INVALID, "tokenizer_config.json: expected a JSON object"},
        {"{", ERR_INVALID, "tokenizer_config.json: not JSON"},
    };
    json_t *root = read_json_file(SMALL);
    char *text = json_dumps(root, JSON_COMPACT);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct tokenizer *tokenizer = NULL;
        struct failure failure = {0};
        int code = tokenizer_open(&tokenizer, text, strlen(text), cases[i].config,
                                  strlen(cases[i].config), &failure);
        if (code != cases[i].code || strstr(failure.text, cases[i].says) == NULL)
            fail_msg("case %zu: %d %s", i, code, failure.text);
        if (i == 0)
            assert_true(tokenizer_bos(tokenizer) == 259 && tokenizer_eos(tokenizer) == 259 &&
                        tokenizer_adds_bos(tokenizer));
        if (i == 2)
            assert_string_equal(tokenizer_chat_template(tokenizer), "T");
        tokenizer_close(&tokenizer);
    }
    free(text);
    json_decref(root);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(unknown_and_inconsistent_parts_are_refused),
        cmocka_unit_test(too_many_or_too_long_parts_are_refused),
        cmocka_unit_test(files_that_are_no_json_are_refused),
        cmocka_unit_test(damaged_files_do_no_harm),
        cmocka_unit_test(configs_are_checked),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
