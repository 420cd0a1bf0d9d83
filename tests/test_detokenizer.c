/* Streaming decode: whole characters only, and in sum what Python's bytes.decode("utf-8",
 * errors="replace") makes of the bytes. */
#include "model/tokenizer.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "tests/support/random.h"
#include "tests/support/tokenizer_files.h"

static struct tokenizer *demo;

static int open_demo(void **state) {
    demo = open_tokenizer_files("models/demo/tokenizer.json", NULL);
    return 0;
}

static int close_demo(void **state) {
    tokenizer_close(&demo);
    return 0;
}

/* Length of the well-formed character at `text` by the Unicode Standard's table 3-7; 0 and the
 * length of the longest well-formed beginning (at least 1) if there is none. */
static size_t character_at(const uint8_t *text, size_t length, size_t *ret_beginning) {
    static const uint8_t table[][9] = {
        {0x00, 0x7f, 0},
        {0xc2, 0xdf, 1, 0x80, 0xbf},
        {0xe0, 0xe0, 2, 0xa0, 0xbf, 0x80, 0xbf},
        {0xe1, 0xec, 2, 0x80, 0xbf, 0x80, 0xbf},
        {0xed, 0xed, 2, 0x80, 0x9f, 0x80, 0xbf},
        {0xee, 0xef, 2, 0x80, 0xbf, 0x80, 0xbf},
        {0xf0, 0xf0, 3, 0x90, 0xbf, 0x80, 0xbf, 0x80, 0xbf},
        {0xf1, 0xf3, 3, 0x80, 0xbf, 0x80, 0xbf, 0x80, 0xbf},
        {0xf4, 0xf4, 3, 0x80, 0x8f, 0x80, 0xbf, 0x80, 0xbf},
    };
    *ret_beginning = 1;
    for (size_t row = 0; row < sizeof table / sizeof table[0]; row++) {
        if (text[0] < table[row][0] || text[0] > table[row][1])
            continue;
        size_t more = table[row][2];
        for (size_t i = 1; i <= more; i++) {
            if (i == length || text[i] < table[row][1 + 2 * i] || text[i] > table[row][2 + 2 * i])
                return 0;
            *ret_beginning = i + 1;
        }
        return 1 + more;
    }
    return 0;
}

static size_t replace_invalid(const uint8_t *text, size_t length, char *ret) {
    size_t written = 0, beginning;
    for (size_t at = 0; at < length; at += beginning) {
        size_t whole = character_at(text + at, length - at, &beginning);
        if (whole > 0)
            memcpy(ret + written, text + at, whole);
        else
            memcpy(ret + written, "\xef\xbf\xbd", 3);
        written += whole > 0 ? whole : 3;
    }
    return written;
}

static bool is_whole(const char *text, size_t length) {
    size_t beginning;
    for (size_t at = 0; at < length; at += beginning)
        if (character_at((const uint8_t *)text + at, length - at, &beginning) == 0)
            return false;
    return true;
}

/* Pushes all and flushes, each push into a buffer of exactly the room asked for. */
static size_t decode(const uint32_t *tokens, size_t count, bool skip_special, char *ret) {
    struct detokenizer detokenizer;
    detokenizer_init(&detokenizer, skip_special);
    size_t written = 0;
    for (size_t i = 0; i <= count; i++) {
        uint32_t token = i < count ? tokens[i] : UINT32_MAX;
        size_t room = detokenizer_room(demo, token);
        char *text = malloc(room);
        assert_non_null(text);
        size_t bytes = detokenizer_push(&detokenizer, demo, token, text, room);
        assert_true(bytes <= room);
        assert_true(is_whole(text, bytes));
        memcpy(ret + written, text, bytes);
        written += bytes;
        free(text);
    }
    return written;
}

static void agrees_with_python(void **state) {
    json_t *cases = read_json_file("tests/data/detokenizer-demo.json"), *row;
    size_t i, replaced = 0;
    json_array_foreach(cases, i, row) {
        const json_t *tokens = json_object_get(row, "tokens"), *text = json_object_get(row, "text");
        uint32_t list[64];
        size_t count = json_array_size(tokens);
        assert_true(count <= 64);
        for (size_t k = 0; k < count; k++)
            list[k] = (uint32_t)json_integer_value(json_array_get(tokens, k));
        char decoded[8192];
        size_t bytes = decode(list, count, false, decoded);
        if (bytes != json_string_length(text) ||
            memcmp(decoded, json_string_value(text), bytes) != 0)
            fail_msg("case %zu: expected \"%s\", found \"%.*s\"", i, json_string_value(text),
                     (int)bytes, decoded);
        replaced += strstr(json_string_value(text), "\xef\xbf\xbd") != NULL;
    }
    assert_true(i >= 200 && replaced > 50);
    json_decref(cases);
}

static void random_tokens_decode_like_their_bytes(void **state) {
    uint64_t seed = 21;
    print_message("seed %llu\n", (unsigned long long)seed);
    uint32_t single[256];
    for (uint32_t token = 0; token < 4096; token++) {
        size_t bytes;
        const char *text = tokenizer_bytes(demo, token, &bytes);
        if (bytes == 1)
            single[(uint8_t)text[0]] = token;
    }
    for (int round = 0; round < 20000; round++) {
        uint32_t tokens[20], count = random_below(&seed, 20);
        uint8_t bytes[2048];
        char expected[6144], found[6144];
        size_t length = 0;
        for (uint32_t i = 0; i < count; i++) {
            static const uint8_t interesting[] = {0xc2, 0xe0, 0xe1, 0xed, 0xef, 0xf0, 0xf1, 0xf4,
                                                  0xf5, 0x80, 0x8f, 0x90, 0x9f, 0xa0, 0xbf, 0x41};
            uint32_t kind = random_below(&seed, 8);
            tokens[i] = kind == 0   ? random_below(&seed, 4096)
                        : kind == 1 ? single[random_below(&seed, 256)]
                                    : single[interesting[random_below(&seed, sizeof interesting)]];
            size_t part;
            const char *text = tokenizer_bytes(demo, tokens[i], &part);
            memcpy(bytes + length, text, part);
            length += part;
        }
        size_t expected_length = replace_invalid(bytes, length, expected);
        assert_int_equal(decode(tokens, count, false, found), expected_length);
        assert_memory_equal(found, expected, expected_length);
    }
}

static void characters_come_when_they_are_whole(void **state) {
    struct detokenizer detokenizer;
    detokenizer_init(&detokenizer, true);
    static const char *const bytes[] = {"\xf0", "\x9f", "\x98", "\x80"};
    char text[64];
    for (int i = 0; i < 4; i++) {
        int64_t token = tokenizer_find(demo, bytes[i]);
        assert_true(token >= 0);
        size_t written = detokenizer_push(&detokenizer, demo, (uint32_t)token, text, sizeof text);
        assert_int_equal(written, i < 3 ? 0 : 4);
    }
    assert_memory_equal(text, "\xf0\x9f\x98\x80", 4);
    assert_int_equal(detokenizer_push(&detokenizer, demo, UINT32_MAX, text, sizeof text), 0);
    /* a special token that is skipped does not come between; one that is shown does */
    uint32_t cut[] = {(uint32_t)tokenizer_find(demo, "\xc3"), 1,
                      (uint32_t)tokenizer_find(demo, "\xa9")};
    assert_int_equal(decode(cut, 3, true, text), 2);
    assert_memory_equal(text, "é", 2);
    char shown[64];
    size_t length = decode(cut, 3, false, shown);
    assert_int_equal(length, strlen("\xef\xbf\xbd<｜end▁of▁sentence｜>\xef\xbf\xbd"));
    assert_memory_equal(shown, "\xef\xbf\xbd<｜end▁of▁sentence｜>\xef\xbf\xbd", length);
    uint32_t unknown[] = {4096, 100000}; /* an id that the vocabulary lacks says nothing */
    assert_int_equal(decode(unknown, 2, false, text), 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(agrees_with_python),
        cmocka_unit_test(random_tokens_decode_like_their_bytes),
        cmocka_unit_test(characters_come_when_they_are_whole),
    };
    return cmocka_run_group_tests(tests, open_demo, close_demo);
}
