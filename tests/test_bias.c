/* The routing bias: the rule, names of versions, and what an actor keeps of them. */
#include "actors/bias_table.h"
#include "coordinator/bias.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define EXPERTS 4

/* ---- the rule ---- */

static void the_crowded_sink_and_the_idle_rise(void **state) {
    (void)state;
    float delta[EXPERTS] = {0};
    const uint64_t rows[EXPERTS] = {10, 30, 20, 20}; /* mean 20 */
    const struct bias_rule rule = {0.01, 1};
    assert_int_equal(bias_step(delta, rows, EXPERTS, &rule), 2);
    assert_true(delta[0] == 0.01f && delta[1] == -0.01f && delta[2] == 0 && delta[3] == 0);
    assert_int_equal(bias_step(delta, rows, EXPERTS, &rule), 2);
    assert_true(fabsf(delta[0] - 0.02f) < 1e-7f && fabsf(delta[1] + 0.02f) < 1e-7f);
}

static void a_mean_that_is_no_whole_number_is_exact(void **state) {
    (void)state;
    float delta[EXPERTS] = {0};
    const uint64_t rows[EXPERTS] = {1, 1, 1, 0}; /* mean 0.75 */
    assert_int_equal(bias_step(delta, rows, EXPERTS, &(struct bias_rule){0.5, 1}), 4);
    assert_true(delta[0] == -0.5f && delta[2] == -0.5f && delta[3] == 0.5f);
}

static void nothing_goes_beyond_the_clamp(void **state) {
    (void)state;
    float delta[EXPERTS] = {0};
    const uint64_t rows[EXPERTS] = {0, 40, 0, 0}, none[EXPERTS] = {0};
    struct bias_rule rule = {0.03, 0.05};
    for (int i = 0; i < 5; i++)
        bias_step(delta, rows, EXPERTS, &rule);
    for (int e = 0; e < EXPERTS; e++)
        assert_true(fabsf(delta[e]) == 0.05f);
    assert_int_equal(bias_step(delta, rows, EXPERTS, &rule), 0); /* no new version is needed */
    assert_int_equal(bias_step(delta, none, EXPERTS, &rule), 0); /* nor without any load */
    rule.clamp = 0.01; /* a narrower one pulls back, load or not */
    assert_int_equal(bias_step(delta, none, EXPERTS, &rule), 4);
    assert_true(delta[0] == 0.01f && delta[1] == -0.01f);
    rule.clamp = 0;
    assert_int_equal(bias_step(delta, rows, EXPERTS, &rule), 4);
    const float zero[EXPERTS] = {0};
    assert_memory_equal(delta, zero,
                        sizeof zero); /* no minus zero either: equal deltas have equal names */
}

static void imbalance_is_what_the_most_loaded_has_too_much(void **state) {
    (void)state;
    const uint64_t even[EXPERTS] = {7, 7, 7, 7}, one[EXPERTS] = {0, 0, 9, 0}, none[EXPERTS] = {0};
    assert_true(bias_imbalance(even, EXPERTS) == 0);
    assert_true(bias_imbalance(one, EXPERTS) == 3);
    assert_true(bias_imbalance(none, EXPERTS) == 0);
}

/* ---- names ---- */

static void a_name_is_read_as_written_and_nothing_else_is(void **state) {
    (void)state;
    const float a[2] = {0.5f, 0}, b[2] = {0, 0.5f};
    const uint64_t ids[] = {0, bias_id(1, a, 2), bias_id(4294967295u, b, 2), 0x0000000700000000u,
                            0x00000007000000ffu};
    static const char *const bad[] = {"",
                                      "x",
                                      "-1",
                                      "1",
                                      "1.",
                                      "01.00000001",
                                      "1.1",
                                      "1.0000000g",
                                      "1.ABCDEF00",
                                      "0.0",
                                      "1.00000001x",
                                      "4294967296.00000001",
                                      "1.100000000",
                                      " 1.00000001",
                                      "1.+0000001"};
    char text[BIAS_NAME_BYTES + 4];
    uint64_t id;
    for (size_t i = 0; i < sizeof ids / sizeof *ids; i++) {
        bias_name(text, ids[i]);
        const char *end = bias_name_read(text, 0, &id);
        assert_true(end != NULL && *end == 0 && id == ids[i]);
        strcat(text, ":12");
        end = bias_name_read(text, ':', &id);
        assert_true(end != NULL && strcmp(end, ":12") == 0 && id == ids[i]);
    }
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        if (bias_name_read(bad[i], ':', &id) != NULL)
            fail_msg("'%s' is taken for a name", bad[i]);
}

static void equal_numbers_of_unequal_deltas_are_two_versions(void **state) {
    (void)state;
    const float a[2] = {0.5f, 0}, b[2] = {0, 0.5f};
    assert_true(bias_id(3, a, 2) != bias_id(3, b, 2));
    assert_int_equal(bias_number(bias_id(3, a, 2)), 3);
    assert_true(bias_id(3, a, 2) == bias_id(3, a, 2));
}

/* ---- the table ---- */

static Troupe__Bias version(uint32_t number, float *delta) {
    Troupe__Bias bias = TROUPE__BIAS__INIT;
    delta[0] = (float)number / 1024;
    delta[1] = 0;
    bias.version = bias_id(number, delta, 2);
    bias.delta = delta;
    bias.n_delta = 2;
    return bias;
}

static void a_version_is_held_until_nobody_uses_it(void **state) {
    (void)state;
    struct bias_table table;
    float delta[2];
    bias_table_init(&table, 2);
    Troupe__Bias first = version(1, delta);
    assert_true(bias_table_holds(&table, 0));
    assert_null(bias_table_find(&table, 0));
    assert_false(bias_table_holds(&table, first.version));
    assert_int_equal(bias_table_take(&table, &first, NULL), 0);
    assert_int_equal(bias_table_take(&table, &first, NULL), 0); /* said again */
    assert_int_equal(table.count, 1);
    struct bias_version *held = bias_table_find(&table, first.version);
    assert_true(held->delta != delta && held->delta[0] == delta[0]);
    held->users = 1;
    assert_false(bias_table_release(&table, first.version));
    held->users = 0;
    assert_true(bias_table_release(&table, first.version));
    assert_false(bias_table_release(&table, first.version));
    assert_int_equal(table.count, 0);
    bias_table_free(&table);
}

static void what_is_no_version_is_not_taken(void **state) {
    (void)state;
    struct bias_table table;
    float delta[2];
    struct failure failure = {0};
    bias_table_init(&table, 2);
    Troupe__Bias bias = version(1, delta);
    bias.n_delta = 1;
    assert_int_equal(bias_table_take(&table, &bias, &failure), ERR_CORRUPT);
    assert_non_null(strstr(failure.text, "2 deltas expected, found 1"));
    bias = version(1, delta);
    delta[1] = 0.25f; /* another than its name says */
    assert_int_equal(bias_table_take(&table, &bias, &failure), ERR_CORRUPT);
    assert_int_equal(table.count, 0);
    bias_table_free(&table);
}

static void a_full_table_gives_up_the_oldest_without_users(void **state) {
    (void)state;
    struct bias_table table;
    float delta[2];
    struct failure failure = {0};
    bias_table_init(&table, 2);
    uint64_t id[BIAS_VERSIONS_HELD_MAX + 2];
    for (uint32_t i = 0; i < BIAS_VERSIONS_HELD_MAX; i++) {
        Troupe__Bias bias = version(i + 1, delta);
        id[i] = bias.version;
        assert_int_equal(bias_table_take(&table, &bias, NULL), 0);
        bias_table_find(&table, id[i])->users = i != 2 && i != 4;
    }
    Troupe__Bias more = version(100, delta);
    assert_true(bias_table_has_room(&table));
    assert_int_equal(bias_table_take(&table, &more, NULL), 0);
    assert_false(bias_table_holds(&table, id[2]));
    bias_table_find(&table, more.version)->users = bias_table_find(&table, id[4])->users = 1;
    assert_false(bias_table_has_room(&table));
    Troupe__Bias last = version(101, delta);
    assert_int_equal(bias_table_take(&table, &last, &failure), ERR_BUSY);
    for (uint32_t i = 0; i < BIAS_VERSIONS_HELD_MAX; i++)
        assert_true(bias_table_holds(&table, id[i]) == (i != 2)); /* what is in use stays */
    bias_table_free(&table);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_crowded_sink_and_the_idle_rise),
        cmocka_unit_test(a_mean_that_is_no_whole_number_is_exact),
        cmocka_unit_test(nothing_goes_beyond_the_clamp),
        cmocka_unit_test(imbalance_is_what_the_most_loaded_has_too_much),
        cmocka_unit_test(a_name_is_read_as_written_and_nothing_else_is),
        cmocka_unit_test(equal_numbers_of_unequal_deltas_are_two_versions),
        cmocka_unit_test(a_version_is_held_until_nobody_uses_it),
        cmocka_unit_test(what_is_no_version_is_not_taken),
        cmocka_unit_test(a_full_table_gives_up_the_oldest_without_users),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
