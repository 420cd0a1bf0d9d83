/* Settings: defaults, single values, YAML, random values within the simulation's ranges, help, and
 * the example file. */
#include "config/settings.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static int parse(struct settings *settings, const char *yaml, struct failure *failure) {
    return settings_parse_yaml(settings, yaml, strlen(yaml), failure);
}

static bool within(double value, double min, double max) {
    return value >= min && value <= max;
}

static void defaults_are_the_tables(void **state) {
    struct settings settings;
    settings_default(&settings);
#define K(name, type, def, min, max, sim_min, sim_max, why)                                        \
    assert_true(settings.name == (def));                                                           \
    assert_true(within(def, min, max));                                                            \
    assert_true(within(sim_min, min, sim_max) && within(sim_max, sim_min, max));
#include "config/knobs.def"
#undef K
}

static void set_takes_both_spellings(void **state) {
    struct settings settings;
    struct failure failure;
    settings_default(&settings);
    assert_int_equal(settings_set(&settings, "prefill-chunk", "7", &failure), 0);
    assert_int_equal(settings.prefill_chunk, 7);
    assert_int_equal(settings_set(&settings, "prefill_chunk", "8192", &failure), 0);
    assert_int_equal(settings.prefill_chunk, 8192);
    assert_int_equal(settings_set(&settings, "gate_top_p", "0.875", &failure), 0);
    assert_true(settings.gate_top_p == 0.875);
    assert_int_equal(settings_set(&settings, "gate_top_p", "9e-1", NULL), 0);
    assert_true(settings.gate_top_p == 0.9);
}

static void set_refuses(void **state) {
    static const struct {
        const char *name, *value;
        int code;
        const char *says;
    } cases[] = {
        {"prefill_chunk", "0", ERR_INVALID,
         "prefill_chunk: expected a whole number from 1 to 8192, found \"0\""},
        {"prefill_chunk", "8193", ERR_INVALID, "found \"8193\""},
        {"prefill_chunk", "-1", ERR_INVALID, "found \"-1\""},
        {"prefill_chunk", "", ERR_INVALID, "found \"\""},
        {"prefill_chunk", "1.5", ERR_INVALID, "found \"1.5\""},
        {"prefill_chunk", " 7", ERR_INVALID, "found \" 7\""},
        {"prefill_chunk", "7x", ERR_INVALID, "found \"7x\""},
        {"prefill_chunk", "4294967297", ERR_INVALID, "found \"4294967297\""},
        {"prefill_chunk", "18446744073709551617", ERR_INVALID, "found \"18446744073709551617\""},
        {"gate_top_p", "nan", ERR_INVALID,
         "gate_top_p: expected a number from 0 to 1, found \"nan\""},
        {"gate_top_p", "1.01", ERR_INVALID, "found \"1.01\""},
        {"gate_top_p", "-0.1", ERR_INVALID, "found \"-0.1\""},
        {"gate_top_p", "1e999", ERR_INVALID, "found \"1e999\""},
        {"gate_top_p", "", ERR_INVALID, "found \"\""},
        {"gate_top_p", "0x1", ERR_INVALID, "found \"0x1\""},
        {"prefil_chunks", "1", ERR_NOT_FOUND, "closest name is \"prefill_chunk\""},
        {"max-waitin", "1", ERR_NOT_FOUND, "closest name is \"max_waiting\""},
        {"", "1", ERR_NOT_FOUND, "unknown setting \"\""},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct settings settings, before;
        struct failure failure = {0};
        settings_default(&settings);
        before = settings;
        assert_int_equal(settings_set(&settings, cases[i].name, cases[i].value, &failure),
                         cases[i].code);
        assert_int_equal(failure.code, cases[i].code);
        if (strstr(failure.text, cases[i].says) == NULL)
            fail_msg("expected \"%s\" in \"%s\"", cases[i].says, failure.text);
        assert_memory_equal(&settings, &before, sizeof settings);
    }
}

static void yaml_changes_what_it_names(void **state) {
    struct settings settings, expected;
    struct failure failure;
    settings_default(&settings);
    expected = settings;
    expected.prefill_chunk = 64;
    expected.max_requests = 17;
    expected.gate_top_p = 0.5;
    assert_int_equal(
        parse(&settings,
              "# comment\nprefill_chunk: 64\nmax-requests: \"17\" # x\n\ngate_top_p: .5\n",
              &failure),
        0);
    assert_memory_equal(&settings, &expected, sizeof settings);
    static const char *const nothing[] = {"", "# only a comment\n", "---\n", "{}", "---\n...\n"};
    for (size_t i = 0; i < sizeof nothing / sizeof nothing[0]; i++) {
        assert_int_equal(parse(&settings, nothing[i], &failure), 0);
        assert_memory_equal(&settings, &expected, sizeof settings);
    }
}

static void yaml_refuses(void **state) {
    static const struct {
        const char *yaml;
        int code;
        const char *says;
    } cases[] = {
        {"prefill_chunk: 64\nprefill_chnk: 1\n", ERR_NOT_FOUND, "prefill_chnk"},
        {"prefill_chunk: 64\nprefill-chunk: 65\n", ERR_INVALID,
         "line 2: prefill_chunk is given twice"},
        {"prefill_chunk: many\n", ERR_INVALID, "found \"many\""},
        {"prefill_chunk:\n", ERR_INVALID, "found \"\""},
        {"prefill_chunk: [1]\n", ERR_INVALID, "line 1: expected a number"},
        {"prefill_chunk: {a: 1}\n", ERR_INVALID, "expected a number"},
        {"prefill_chunk: &a 1\n", ERR_INVALID, "expected a number"},
        {"prefill_chunk: *a\n", ERR_INVALID, "expected a number"},
        {"prefill_chunk: \"6\\0004\"\n", ERR_INVALID, "expected a number"},
        {"[1]: 2\n", ERR_INVALID, "expected the name of a setting"},
        {"- prefill_chunk\n", ERR_INVALID, "expected a mapping"},
        {"42\n", ERR_INVALID, "expected a mapping"},
        {"prefill_chunk: 64\n---\nprefill_chunk: 65\n", ERR_INVALID, "a second one"},
        {"prefill_chunk: 'unclosed\n", ERR_INVALID, "not YAML"},
        {"prefill_chunk: 64\n\tmax_requests: 1\n", ERR_INVALID, "not YAML"},
        {"\xff\xfe\xff", ERR_INVALID, "not YAML"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct settings settings, before;
        struct failure failure = {0};
        settings_default(&settings);
        before = settings;
        assert_int_equal(parse(&settings, cases[i].yaml, &failure), cases[i].code);
        if (strstr(failure.text, cases[i].says) == NULL)
            fail_msg("expected \"%s\" in \"%s\"", cases[i].says, failure.text);
        assert_memory_equal(&settings, &before, sizeof settings);
    }
    struct settings settings;
    struct failure failure;
    settings_default(&settings);
    size_t size = (1u << 20) + 1;
    char *large = malloc(size);
    assert_non_null(large);
    memset(large, '[', size);
    assert_int_equal(settings_parse_yaml(&settings, large, size, &failure), ERR_TOO_LARGE);
    assert_true(settings_parse_yaml(&settings, large, size - 1, &failure) < 0);
    free(large);
}

static void random_values_stay_in_range_and_repeat(void **state) {
    struct settings first, settings;
    settings_default(&first);
    settings_randomise(&first, 1);
    bool low = false, high = false, differs = false;
    for (uint64_t seed = 1; seed <= 2000; seed++) {
        settings_default(&settings);
        settings_randomise(&settings, seed);
#define K(name, type, def, min, max, sim_min, sim_max, why)                                        \
    assert_true(within((double)settings.name, sim_min, sim_max));
#include "config/knobs.def"
#undef K
        low = low || settings.prefill_chunk == 1;
        high = high || settings.prefill_chunk == 64;
        differs = differs || settings.prefill_chunk != first.prefill_chunk;
    }
    assert_true(low && high && differs);
    settings_default(&settings);
    settings_randomise(&settings, 1);
    assert_memory_equal(&settings, &first, sizeof first);
}

static void help_has_a_line_for_each_knob(void **state) {
    char *help = settings_help();
    assert_non_null(help);
    size_t lines = 0, knobs = 0;
    for (const char *letter = help; *letter != 0; letter++)
        lines += *letter == '\n';
#define K(name, type, def, min, max, sim_min, sim_max, why)                                        \
    knobs++;                                                                                       \
    assert_non_null(strstr(help, why));
#include "config/knobs.def"
#undef K
    assert_int_equal(lines, knobs);
    assert_non_null(strstr(help, "  --prefill-chunk N "));
    assert_non_null(strstr(help, "(default 256, 1 to 8192)"));
    free(help);
}

/* The example says what every knob is by default; with each '#' before a name removed it changes
 * nothing. */
static void example_file_shows_the_defaults(void **state) {
    FILE *file = fopen("config/troupe.yaml", "r");
    assert_non_null(file);
    char line[1024], yaml[16384] = "";
    while (fgets(line, sizeof line, file) != NULL) {
        char name[64];
        double value;
        if (sscanf(line, "# %63[a-z_0-9]: %lf", name, &value) == 2) {
            assert_true(strlen(yaml) + strlen(line) < sizeof yaml);
            strcat(yaml, line + 2);
        }
    }
    fclose(file);
#define K(name, type, def, min, max, sim_min, sim_max, why)                                        \
    if (strstr(yaml, #name ": ") == NULL)                                                          \
        fail_msg("config/troupe.yaml lacks " #name);
#include "config/knobs.def"
#undef K
    struct settings settings, expected;
    struct failure failure;
    settings_default(&expected);
    settings = expected;
    if (parse(&settings, yaml, &failure) < 0)
        fail_msg("%s", failure.text);
    assert_memory_equal(&settings, &expected, sizeof settings);
}

static void profile_names_tell_apart_what_changes_bits(void **state) {
    struct settings settings;
    char name[PROFILE_NAME_BYTES];
    settings_default(&settings);
    settings_profile_name(&settings, "bf16", name);
    assert_string_equal(name, "bf16");
    settings.prefill_chunk = 7;
    settings.threads = 3;
    settings_profile_name(&settings, "f32", name);
    assert_string_equal(name, "f32");
    settings.gate_top_p = 0.6;
    settings_profile_name(&settings, "bf16", name);
    assert_string_equal(name, "bf16-p0.6");
    char other[PROFILE_NAME_BYTES];
    settings.gate_top_p = 0.6000001;
    settings_profile_name(&settings, "bf16", other);
    assert_string_not_equal(name, other);
    settings.gate_top_p = 0;
    settings.latent_fp8 = 1;
    settings_profile_name(&settings, "fp8-sm90", name);
    assert_string_equal(name, "fp8-sm90-kv8");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(defaults_are_the_tables),
        cmocka_unit_test(set_takes_both_spellings),
        cmocka_unit_test(set_refuses),
        cmocka_unit_test(yaml_changes_what_it_names),
        cmocka_unit_test(yaml_refuses),
        cmocka_unit_test(random_values_stay_in_range_and_repeat),
        cmocka_unit_test(help_has_a_line_for_each_knob),
        cmocka_unit_test(example_file_shows_the_defaults),
        cmocka_unit_test(profile_names_tell_apart_what_changes_bits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
