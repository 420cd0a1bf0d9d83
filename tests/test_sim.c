/* The simulator itself: schedules are printed and read without loss, a seed is the same run each time, the shipped scenarios and the
 * first seeds are good, and what is wrong in a scenario file is said. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "simulator/sim.h"

#include <cmocka.h>

#define SEEDS 240

static struct sim sim;
static struct scenario scenario, again;

static void test_faults_are_read_as_printed(void **state) {
    (void)state;
    for (uint64_t seed = 1; seed <= 300; seed++) {
        scenario_draw(&scenario, seed);
        assert_in_range(scenario.faults.count, FAULTS_DRAWN_MIN, FAULTS_MAX);
        for (uint32_t i = 0; i < scenario.faults.count; i++) {
            char first[FAULT_LINE_BYTES], second[FAULT_LINE_BYTES];
            struct fault fault;
            struct failure failure = {0};
            fault_print(&scenario.faults.list[i], first);
            if (fault_parse(&fault, first, &failure) < 0)
                fail_msg("seed %llu: %s: %s", (unsigned long long)seed, first, failure.text);
            fault_print(&fault, second);
            assert_string_equal(first, second);
        }
    }
}

/* A printed scenario, read again, is the very run, so that a shrunk schedule can be kept in a file. */
static void test_a_printed_scenario_is_the_same_run(void **state) {
    (void)state;
    char *text = malloc(SCENARIO_TEXT_BYTES);
    for (uint64_t seed = 1; seed <= 8; seed++) {
        struct report first, second;
        struct failure failure = {0};
        scenario_draw(&scenario, seed);
        scenario_print(&scenario, text);
        if (scenario_parse(&again, text, strlen(text), &failure) < 0)
            fail_msg("seed %llu: %s", (unsigned long long)seed, failure.text);
        sim_run(&sim, &scenario, NULL, NULL, &first);
        sim_run(&sim, &again, NULL, NULL, &second);
        assert_true(first.hash == second.hash);
    }
    static const char OTHER[] = "seed 3\nrequests 2\nknob heartbeat_ms 77\nnetwork quiet\nat 90ms crash sampler 0 for 30ms\n";
    struct report first, second;
    struct failure failure = {0};
    assert_int_equal(scenario_parse(&scenario, OTHER, strlen(OTHER), &failure), 0);
    scenario_print(&scenario, text);
    assert_int_equal(scenario_parse(&again, text, strlen(text), &failure), 0);
    sim_run(&sim, &scenario, NULL, NULL, &first);
    sim_run(&sim, &again, NULL, NULL, &second);
    assert_true(first.hash == second.hash);
    assert_int_equal(again.settings.heartbeat_ms, 77);
    assert_int_equal(again.requests, 2);
    free(text);
}

static void test_a_seed_is_the_same_run_each_time(void **state) {
    (void)state;
    uint64_t last = 0;
    for (uint64_t seed = 1; seed <= 12; seed++) {
        struct report first, second;
        scenario_draw(&scenario, seed);
        sim_run(&sim, &scenario, NULL, NULL, &first);
        sim_run(&sim, &scenario, NULL, NULL, &second);
        assert_true(first.hash == second.hash);
        assert_true(first.steps == second.steps);
        assert_true(first.hash != last);
        last = first.hash;
    }
}

static void test_seeds_are_good(void **state) {
    (void)state;
    uint64_t faults = 0, answered = 0, hits = 0, accepted = 0, preemptions = 0;
    uint32_t of_kind[FAULT_KINDS], in_all[FAULT_KINDS] = {0};
    for (uint64_t seed = 1; seed <= SEEDS; seed++) {
        struct report report;
        scenario_draw(&scenario, seed);
        sim_run(&sim, &scenario, NULL, NULL, &report);
        assert_in_range(faults_count(&scenario.faults, of_kind), 5, FAULTS_MAX);
        for (int kind = 0; kind < FAULT_KINDS; kind++)
            in_all[kind] += of_kind[kind];
        faults += scenario.faults.count;
        answered += report.finished;
        hits += report.prefix_hits;
        preemptions += report.preemptions;
        accepted += report.accepted_drafts;
        if (report.outcome != OUTCOME_GOOD)
            fail_msg("troupe sim --seed %llu --shrink: %s: %s", (unsigned long long)seed,
                     outcome_name(report.outcome), report.text);
    }
    printf("%d seeds, %llu faults, %llu requests answered as without faults\n", SEEDS,
           (unsigned long long)faults, (unsigned long long)answered);
    printf("%llu tokens from prefix caches, %llu guessed tokens that were true, %llu times somebody was put back\n",
           (unsigned long long)hits, (unsigned long long)accepted, (unsigned long long)preemptions);
    for (int kind = 0; kind < FAULT_KINDS; kind++)
        if (in_all[kind] == 0)
            fail_msg("no seed has a %s", fault_name((enum fault_kind)kind));
    assert_true(answered > SEEDS * 3);
    assert_true(hits > SEEDS * 10); /* sharing and guessing were not idle */
    assert_true(accepted > SEEDS / 2);
    assert_true(preemptions > SEEDS / 8);
}

static char *read_file(const char *path, size_t *ret_size) {
    FILE *file = fopen(path, "r");
    assert_non_null(file);
    char *text = malloc(65536);
    *ret_size = fread(text, 1, 65536, file);
    fclose(file);
    return text;
}

static void test_shipped_scenarios(void **state) {
    (void)state;
    static const char *const FILES[] = {"expert-lost-while-others-load", "coordinator-restart", "one-way-partition",
                                        "corrupted-frames", "disk-error-while-repairing", "rolling-restart",
                                        "gateway-and-coordinator-at-once",
                                        "coordinator-gives-another-id",
                                        "member-missing-in-one-epoch",
                                        "submit-for-an-earlier-life",
                                        "refusal-under-a-taken-id",
                                        "drain-while-learning",
                                        "told-to-end-in-vain",
                                        "mover-and-taker-lost",
                                        "taker-is-drained",
                                        "welcome-of-a-dead-coordinator",
                                        "liar",
                                        "liar-steady"};
    for (size_t i = 0; i < sizeof FILES / sizeof *FILES; i++) {
        char path[128];
        size_t size;
        struct report report;
        struct failure failure = {0};
        snprintf(path, sizeof path, "config/faults/%s.scenario", FILES[i]);
        char *text = read_file(path, &size);
        if (scenario_parse(&scenario, text, size, &failure) < 0)
            fail_msg("%s: %s", path, failure.text);
        free(text);
        sim_run(&sim, &scenario, NULL, NULL, &report);
        if (report.outcome != OUTCOME_GOOD)
            fail_msg("%s: %s: %s", path, outcome_name(report.outcome), report.text);
    }
}

static void count_quarantines(void *context, const char *line) {
    uint32_t *count = context;
    count[0] += strstr(line, "quarantined expert-1") != NULL;
    count[1] += strstr(line, "quarantined expert") != NULL && strstr(line, "quarantined expert-1") == NULL;
    count[2] += strstr(line, "it stays, without experts") != NULL;
}

/* A process that lies in one row of a hundred and more is named, and nobody else. */
static void test_a_liar_is_named(void **state) {
    (void)state;
    size_t size;
    uint32_t count[3] = {0};
    struct report report;
    struct failure failure = {0};
    char *text = read_file("config/faults/liar.scenario", &size);
    assert_int_equal(scenario_parse(&scenario, text, size, &failure), 0);
    free(text);
    sim_run(&sim, &scenario, count_quarantines, count, &report);
    assert_int_equal(report.outcome, OUTCOME_GOOD);
    assert_int_equal(count[0], 2);
    assert_int_equal(count[1], 0);
    assert_int_equal(count[2], 1);
}

static void test_wrong_scenarios_are_told(void **state) {
    (void)state;
    static const struct {
        const char *text, *said;
    } WRONG[] = {
        {"seed x\n", "line 1: expected 'seed NUMBER'"},
        {"seed 1\nexperts 0\n", "line 2: expected a number from 1 to 64"},
        {"knob no_such_knob 1\n", "line 1: unknown setting"},
        {"knob heartbeat_ms\n", "expected 'knob NAME NUMBER'"},
        {"# fine\n\nat 5ms melt expert 0\n", "line 3: expected a fault such as crash or drop, found 'melt'"},
        {"at soon crash expert 0 for 1ms\n", "expected a time such as 12.5ms, found 'soon'"},
        {"at 1ms crash cook 0 for 1ms\n", "found 'cook'"},
        {"at 1ms crash expert 0\n", "expected 'for TIME'"},
        {"at 1ms drop for 1ms\n", "expected 'share X'"},
        {"at 1ms drop for 1ms share 2\n", "expected a number from 0 to 1"},
        {"at 1ms hang-up\n", "expected 'client N'"},
        {"at 1ms move 1 2 to expert 0\n", "expected 'pair LAYER EXPERT'"},
        {"at 1ms replicate pair 1 x to expert 0\n", "expert: expected a number"},
        {"at 1ms pause expert 0 for 1ms quickly\n", "did not expect 'quickly'"},
        {"lunch\n", "found 'lunch'"},
    };
    for (size_t i = 0; i < sizeof WRONG / sizeof *WRONG; i++) {
        struct failure failure = {0};
        assert_true(scenario_parse(&scenario, WRONG[i].text, strlen(WRONG[i].text), &failure) < 0);
        if (strstr(failure.text, WRONG[i].said) == NULL)
            fail_msg("%s: said: %s", WRONG[i].text, failure.text);
    }
}

static void keep_last(void *context, const char *line) {
    char **last = context;
    free(*last);
    *last = strdup(line);
}

/* What is injected shows: a run with faults takes another way than one without, and traces say so. */
static void test_faults_take_effect(void **state) {
    (void)state;
    static const char *const KINDS[] = {
        "at 50ms crash expert 0 for 100ms", "at 50ms pause attention 0 for 100ms", "at 1ms slow expert 0 for 1s by 30",
        "at 1ms delay for 1s by 5ms",       "at 1ms drop for 1s share 0.3",        "at 1ms duplicate for 1s share 0.5",
        "at 1ms corrupt data for 1s share 0.3", "at 1ms partition from expert 0 for 500ms",
        "at 1ms clog from attention 0 for 500ms", "at 0ms disk-error expert 0 for 300ms",
        "at 0ms short-read expert 0 for 300ms", "at 0ms no-memory expert 0 for 300ms", "at 0ms hang-up client 0",
        "at 200ms drain attention 0",        "at 200ms drain expert 0",             "at 200ms rebalance",
        "at 200ms replicate pair 1 1 to expert 0", "at 200ms move pair 1 1 from expert 0 to expert 0"};
    static const char HEAD[] = "seed 4\nattention 1\nexperts 1\nsamplers 1\nnetwork quiet\n";
    struct report calm, faulty;
    struct failure failure = {0};
    char text[512], *last = NULL;
    snprintf(text, sizeof text, "%sno faults\n", HEAD);
    assert_int_equal(scenario_parse(&scenario, text, strlen(text), &failure), 0);
    sim_run(&sim, &scenario, keep_last, &last, &calm);
    assert_int_equal(calm.outcome, OUTCOME_GOOD);
    assert_non_null(last);
    free(last);
    for (size_t i = 0; i < sizeof KINDS / sizeof *KINDS; i++) {
        snprintf(text, sizeof text, "%s%s\n", HEAD, KINDS[i]);
        assert_int_equal(scenario_parse(&scenario, text, strlen(text), &failure), 0);
        sim_run(&sim, &scenario, NULL, NULL, &faulty);
        if (faulty.outcome != OUTCOME_GOOD || faulty.hash == calm.hash)
            fail_msg("%s: %s, %s", KINDS[i], outcome_name(faulty.outcome),
                     faulty.hash == calm.hash ? "nothing has happened" : faulty.text);
    }
}

static int open_sim(void **state) {
    (void)state;
    struct failure failure = {0};
    numerics_enter();
    if (sim_open(&sim, &failure) == 0)
        return 0;
    fprintf(stderr, "%s\n", failure.text);
    return -1;
}

static int close_sim(void **state) {
    (void)state;
    sim_close(&sim);
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_faults_are_read_as_printed),
        cmocka_unit_test(test_a_printed_scenario_is_the_same_run),
        cmocka_unit_test(test_a_seed_is_the_same_run_each_time),
        cmocka_unit_test(test_seeds_are_good),
        cmocka_unit_test(test_shipped_scenarios),
        cmocka_unit_test(test_a_liar_is_named),
        cmocka_unit_test(test_wrong_scenarios_are_told),
        cmocka_unit_test(test_faults_take_effect),
    };
    return cmocka_run_group_tests(tests, open_sim, close_sim);
}
