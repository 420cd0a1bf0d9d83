/* The command line: what is accepted, what is refused and with which words, and that knobs reach
 * the children as they were given. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "actors/host/options.h"

/* last: cmocka has a macro fail() */
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <cmocka.h>

static struct options parsed;
static struct failure failure;

static int parse(unsigned command, const char *line) {
    static char words[1024];
    static char *list[32];
    int count = 0;
    snprintf(words, sizeof words, "%s", line);
    for (char *word = strtok(words, " "); word != NULL; word = strtok(NULL, " "))
        list[count++] = word;
    memset(&failure, 0, sizeof failure);
    return options_parse(&parsed, count, list, command, &failure);
}

static void test_accepted(void **state) {
    assert_int_equal(parse(FOR_SERVE,
                           "serve --model m --experts 8 --port=0 --numerics f32 --verbose "
                           "--prefill-chunk 7 --gate_top_p 0.5"),
                     0);
    assert_string_equal(parsed.model, "m");
    assert_int_equal(parsed.experts, 8);
    assert_int_equal(parsed.port, 0);
    assert_true(parsed.port_set && parsed.verbose);
    assert_string_equal(parsed.numerics, "f32");
    assert_int_equal(parsed.settings.prefill_chunk, 7);
    assert_true(parsed.settings.gate_top_p == 0.5);
    assert_int_equal(parse(FOR_SERVE, "serve"), 0);
    assert_int_equal(parsed.experts, 4);
    assert_int_equal(parsed.port, 8000);
    assert_int_equal(parse(FOR_INSPECT, "inspect DIR"), 0);
    assert_int_equal(parsed.positionals, 1);
}

static void test_refused(void **state) {
    static const struct {
        unsigned command;
        const char *line, *names; /* must be in the message */
    } cases[] = {
        {FOR_SERVE, "serve --nonsense 3", "--nonsense"},
        {FOR_SERVE, "serve --prompt x", "--prompt"}, /* of another command */
        {FOR_SERVE, "serve stray", "stray"},
        {FOR_SERVE, "serve --experts", "--experts expects"},
        {FOR_SERVE, "serve --experts 0", "from 1 to 512, found '0'"},
        {FOR_SERVE, "serve --experts -3", "found '-3'"},
        {FOR_SERVE, "serve --experts 99999999999999999999", "found '9999"},
        {FOR_SERVE, "serve --port 65536", "65535"},
        {FOR_SERVE, "serve --port 80x", "80x"},
        {FOR_SERVE, "serve --verbose=1", "takes no value"},
        {FOR_SERVE, "serve --numerics fp64", "f32, bf16, fp8, bf16-sm90 or fp8-sm90, found 'fp64'"},
        {FOR_SERVE, "serve --isa sse", "found 'sse'"},
        {FOR_SERVE, "serve --transport pigeon", "found 'pigeon'"},
        {FOR_SERVE, "serve --prefill-chunk 0", "prefill_chunk"},
        {FOR_SERVE, "serve --config /does/not/exist.yaml", "/does/not/exist.yaml"},
        {FOR_SERVE, "serve --config /not-there.yaml", "cannot open /not-there.yaml"},
        {FOR_SERVE, "serve --api-key-file /dev/null", "/dev/null"},
        {FOR_GENERATE, "generate --temperature nan", "found 'nan'"},
        {FOR_GENERATE, "generate --temperature 3", "from 0 to 2"},
        {FOR_INSPECT, "inspect a b c d e f g h i j k l m n o p", "unexpected argument 'p'"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        if (parse(cases[i].command, cases[i].line) >= 0 ||
            strstr(failure.text, cases[i].names) == NULL)
            fail_msg("'%s': expected an error with \"%s\", found \"%s\"", cases[i].line,
                     cases[i].names, failure.text);
    }
}

static char *write_file(const char *text) {
    static char path[64];
    snprintf(path, sizeof path, "/tmp/troupe-test-%d", (int)getpid());
    FILE *file = fopen(path, "w");
    fputs(text, file);
    fclose(file);
    return path;
}

/* The command line wins over the file, wherever --config stands. */
static void test_config_and_key_files(void **state) {
    char line[256], *path = write_file("prefill_chunk: 33\nheartbeat_ms: 77\n");
    snprintf(line, sizeof line, "serve --heartbeat-ms 88 --config %s", path);
    assert_int_equal(parse(FOR_SERVE, line), 0);
    assert_int_equal(parsed.settings.prefill_chunk, 33);
    assert_int_equal(parsed.settings.heartbeat_ms, 88);
    write_file("no_such_knob: 1\n");
    assert_true(parse(FOR_SERVE, line) < 0);
    assert_non_null(strstr(failure.text, "no_such_knob"));
    assert_non_null(strstr(failure.text, path));
    write_file("secret\nsecond line\n");
    snprintf(line, sizeof line, "serve --api-key-file %s", path);
    assert_int_equal(parse(FOR_SERVE, line), 0);
    assert_string_equal(parsed.api_key, "secret");
    unlink(path);
}

/* What serve hands to its children gives them the same settings. */
static void test_knobs_travel(void **state) {
    char *list[64];
    assert_int_equal(
        parse(FOR_SERVE, "serve --gate-top-p 0.1 --kv-cache-tokens 16777216 --spin-us 3"), 0);
    struct options given = parsed;
    int count = options_changed_knobs(&given, list + 1, 62);
    assert_int_equal(count, 6);
    list[0] = "expert";
    assert_int_equal(options_parse(&parsed, count + 1, list, FOR_WORKER, &failure), 0);
    assert_memory_equal(&parsed.settings, &given.settings, sizeof given.settings);
    for (int i = 1; i <= count; i++)
        free(list[i]);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_accepted),
        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_config_and_key_files),
        cmocka_unit_test(test_knobs_travel),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
