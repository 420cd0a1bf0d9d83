/* Real processes under short plans of faults: no stream is lost, doubled or different, and the report says what was done. Plans that are
 * none are refused. */
#include <jansson.h>
#include <setjmp.h>
#include <sqlite3.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "actors/host/chaos_plan.h"

#include <cmocka.h>

/* Runs troupe chaos with the plan; returns its exit status and prints its report. */
static int run_plan_with(const char *text, const char *seed, const char *options, char *ret, size_t room) {
    char plan[64], command[1024];
    const char *build = getenv("TROUPE_BUILD");
    snprintf(plan, sizeof plan, "/tmp/troupe-test-plan-%d", (int)getpid());
    FILE *file = fopen(plan, "w");
    assert_non_null(file);
    fputs(text, file);
    fclose(file);
    snprintf(command, sizeof command, "%s/troupe chaos --plan %s --seed %s %s 2>&1", build != NULL ? build : "build",
             plan, seed, options);
    FILE *pipe = popen(command, "r");
    assert_non_null(pipe);
    size_t got = fread(ret, 1, room - 1, pipe);
    ret[got] = 0;
    int status = pclose(pipe);
    unlink(plan);
    printf("%s", ret);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static int run_plan(const char *text, const char *seed, char *ret, size_t room) {
    return run_plan_with(text, seed, "", ret, room);
}

static void assert_says(const char *report, const char *text) {
    if (strstr(report, text) == NULL)
        fail_msg("\"%s\" is not in the report", text);
}

static void test_every_role_is_killed(void **state) {
    static char report[16384];
    (void)state;
    assert_int_equal(run_plan("streams 8\ntokens 64\nexperts 3\nsamplers 2\nattention 2\nknob replicas 2\nfor 9s\nwindow 1s\n"
                              "at 500ms kill expert 1\nat 2s kill attention 0\nat 3500ms kill sampler 1\n"
                              "at 5s kill coordinator\nat 7s kill gateway\n",
                              "1", report, sizeof report),
                     0);
    assert_says(report, "kill gateway");
    assert_says(report, "lost 0, duplicated 0, different 0");
}

/* The whole file, to be freed. */
static char *read_whole(const char *path) {
    FILE *file = fopen(path, "r");
    if (file == NULL)
        fail_msg("there is no %s", path);
    char *text = calloc(1, 1 << 20);
    assert_non_null(text);
    assert_true(fread(text, 1, (1 << 20) - 1, file) > 0);
    fclose(file);
    unlink(path);
    return text;
}

static void count_faults(const char *path) {
    sqlite3 *database;
    sqlite3_stmt *statement;
    assert_int_equal(sqlite3_open(path, &database), SQLITE_OK);
    static const char SQL[] = "SELECT count(*), (SELECT count(*) FROM stream), (SELECT streams FROM run) FROM fault "
                              "WHERE text LIKE 'corrupt %' AND gap_ms > 0";
    assert_int_equal(sqlite3_prepare_v2(database, SQL, -1, &statement, NULL), SQLITE_OK);
    assert_int_equal(sqlite3_step(statement), SQLITE_ROW);
    assert_int_equal(sqlite3_column_int(statement, 0), 3);
    assert_int_equal(sqlite3_column_int(statement, 1), 8);
    assert_int_equal(sqlite3_column_int(statement, 2), 8);
    sqlite3_finalize(statement);
    sqlite3_close(database);
    unlink(path);
}

/* All of them, and the report says so in each of its forms. */
static void test_damaged_frames_are_caught(void **state) {
    static char report[16384];
    char stem[64], options[512], path[80];
    unsigned long long damaged, refused;
    (void)state;
    snprintf(stem, sizeof stem, "/tmp/troupe-test-chaos-%d", (int)getpid());
    snprintf(options, sizeof options, "--json %s.json --html %s.html --journal %s.db", stem, stem, stem);
    assert_int_equal(
        run_plan_with("streams 8\ntokens 64\nexperts 3\nknob replicas 2\nfor 4s\nwindow 3s\n"
                      "at 0ms corrupt attention 0 share 0.01 for 3s\nat 0ms corrupt expert all share 0.01 for 3s\n"
                      "at 0ms corrupt sampler 0 share 0.01 for 3s\n",
                      "2", options, report, sizeof report),
        0);
    assert_says(report, "corrupt expert all");
    const char *frames = strstr(report, "frames: ");
    assert_non_null(frames);
    assert_int_equal(sscanf(frames, "frames: %llu damaged on the way, %llu refused", &damaged, &refused), 2);
    assert_true(damaged > 0);
    assert_int_equal(refused, damaged);
    snprintf(path, sizeof path, "%s.json", stem);
    char *text = read_whole(path);
    json_t *root = json_loads(text, 0, NULL);
    assert_non_null(root);
    assert_int_equal(json_array_size(json_object_get(root, "faults")), 3);
    assert_int_equal(json_integer_value(json_object_get(root, "frames_refused")), damaged);
    assert_int_equal(json_integer_value(json_object_get(root, "different")), 0);
    json_decref(root);
    free(text);
    snprintf(path, sizeof path, "%s.html", stem);
    text = read_whole(path);
    assert_says(text, "<!doctype html>");
    assert_says(text, "corrupt expert all");
    free(text);
    snprintf(path, sizeof path, "%s.db", stem);
    count_faults(path);
}

/* More than a troupe takes: it says 429 or 503 with Retry-After, which the clients insist on, and whatever it took is answered. */
static void test_refusals_are_in_order(void **state) {
    static char report[16384];
    unsigned refused = 0;
    (void)state;
    assert_int_equal(run_plan("streams 8\ntokens 32\nexperts 2\nknob max_waiting 1\nknob max_sequences 2\nfor 2s\nwindow 1s\n"
                              "at 500ms kill attention 0\n",
                              "6", report, sizeof report),
                     0);
    const char *answers = strstr(report, "refused in order ");
    assert_non_null(answers);
    assert_int_equal(sscanf(answers, "refused in order %u", &refused), 1);
    assert_true(refused > 0);
}

static void test_short_storm(void **state) {
    static char report[32768];
    (void)state;
    assert_int_equal(run_plan("streams 32\nexperts 4\nattention 2\nsamplers 2\nknob replicas 2\nfor 20s\nevery 2s random\n",
                              "3", report, sizeof report),
                     0);
}

/* The comparison itself must be able to fail: nobody finds damage in a frame that is sealed after it. */
static void test_a_lie_is_seen(void **state) {
    static char report[16384];
    (void)state;
    assert_int_equal(run_plan("streams 8\ntokens 64\nexperts 2\nfor 3s\nat 0ms lie expert all share 0.5 for 3s\n", "4", report,
                              sizeof report),
                     1);
}

/* The same lies, but every row is computed twice: none passes, and the process is found out. */
static void test_an_audit_lets_no_lie_pass(void **state) {
    static char report[16384];
    (void)state;
    assert_int_equal(run_plan("streams 8\ntokens 64\nexperts 4\nknob audit_share 1\nfor 4s\nwindow 2s\n"
                              "at 500ms lie expert 1 share 0.001 for 3s\n",
                              "5", report, sizeof report),
                     0);
    assert_says(report, "lost 0, duplicated 0, different 0");
    const char *line = strstr(report, "lie expert 1");
    assert_non_null(line);
    if (strstr(line, " - ") != NULL && strstr(line, " - ") < strchr(line, '\n'))
        fail_msg("the liar was not found");
}

static void test_plans_are_checked(void **state) {
    static struct chaos_plan plan;
    static const char *const bad[] = {"streams 0",
                                      "streams 9999",
                                      "at soon kill expert",
                                      "at 1s kill nobody",
                                      "at 1s annoy expert",
                                      "at 1s kill expert 1 for",
                                      "at 1s drop expert share 2",
                                      "every 1ms random",
                                      "every 2s kill",
                                      "knob x",
                                      "for ever"};
    (void)state;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct failure failure;
        assert_true(chaos_plan_parse(&plan, bad[i], strlen(bad[i]), &failure) < 0);
        assert_non_null(strstr(failure.text, "line 1"));
    }
    struct failure failure;
    const char *good = "# words\n\nstreams 3\nfor 30s\nevery 2s random expert sampler\nat 1.5s stop expert for 200ms\n";
    assert_int_equal(chaos_plan_parse(&plan, good, strlen(good), &failure), 0);
    chaos_plan_draw(&plan, 5);
    assert_int_equal(plan.streams, 3);
    assert_true(plan.faults > 8);
    for (uint32_t i = 0; i < plan.faults; i++) {
        assert_true(plan.fault[i].role == ROLE_EXPERT || plan.fault[i].role == ROLE_SAMPLER);
        assert_true(plan.fault[i].rank < 4);
        assert_true(i == 0 || plan.fault[i].at_ns >= plan.fault[i - 1].at_ns);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_plans_are_checked),     cmocka_unit_test(test_every_role_is_killed),
        cmocka_unit_test(test_damaged_frames_are_caught), cmocka_unit_test(test_short_storm),
        cmocka_unit_test(test_refusals_are_in_order),
        cmocka_unit_test(test_a_lie_is_seen),         cmocka_unit_test(test_an_audit_lets_no_lie_pass),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
