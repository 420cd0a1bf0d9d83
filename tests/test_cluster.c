/* The simulator of large clusters: a day is the same each time, rebalancing by the planner wins what EPLB wins with fewer copies loaded,
 * what is lost comes back, and what is wrong in a file is said. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "simulator/cluster.h"
#include "tests/support/model_files.h"
#include "tests/support/random.h"

#include <cmocka.h>

#define LAYERS  4u
#define EXPERTS 16u
#define WINDOWS 6u
#define PAIRS   (LAYERS * EXPERTS)

static double load[WINDOWS * PAIRS];
static const struct load_trace trace = {WINDOWS, LAYERS, EXPERTS, load};

static const char SMALL[] = "span 30m\n"
                            "processes 8 hosts 4 copies 12 load_mib_s 100  # 12 = 4 x (16 + 8) / 8\n"
                            "attention 2\n"
                            "expert_mib 10\n"
                            "tokens_per_second 5000\n"
                            "experts_per_token 4\n"
                            "row_us 20\n"
                            "knob heartbeat_ms 1000\n"
                            "knob rebalance_interval_ms 20000\n"
                            "knob rebalance_spare 8\n"
                            "knob rebalance_threshold 0.95\n"
                            "knob load_half_life_ms 10000\n";

/* A few experts take most; others do in each window. */
static void make_trace(void) {
    uint64_t random = 7;
    for (uint32_t w = 0; w < WINDOWS; w++)
        for (uint32_t i = 0; i < PAIRS; i++) {
            load[w * PAIRS + i] = 10 + 40 * random_float(&random, 0, 1);
            if ((i * 5 + w * 3 + i / EXPERTS) % 7 == 0)
                load[w * PAIRS + i] += 150;
        }
}

static void run(struct cluster_report *ret, const char *more, enum cluster_policy policy,
                uint64_t seed) {
    char text[2048];
    struct cluster_task task;
    struct failure failure = {0};
    snprintf(text, sizeof text, "%s%s", SMALL, more);
    if (cluster_parse(&task, text, strlen(text), &failure) < 0)
        fail_msg("%s", failure.text);
    task.trace = &trace;
    task.policy = policy;
    task.seed = seed;
    if (cluster_run(ret, &task, &failure) < 0)
        fail_msg("%s", failure.text);
    printf("%d: mean %.4f worst %.4f copies %llu stall %.5f unserved %.3f s epochs %llu operations %llu\n",
           (int)policy, ret->total.mean, ret->total.worst, (unsigned long long)ret->total.copies,
           ret->total.stall, ret->total.unserved_s, (unsigned long long)ret->total.epochs,
           (unsigned long long)ret->total.operations);
}

static void test_the_same_seed_is_the_same_day(void **state) {
    (void)state;
    struct cluster_report first, second, other;
    run(&first, "at 7m lose 3 for 1m\n", CLUSTER_TROUPE, 1);
    run(&second, "at 7m lose 3 for 1m\n", CLUSTER_TROUPE, 1);
    run(&other, "at 7m lose 3 for 1m\n", CLUSTER_TROUPE, 2);
    assert_int_equal(first.hash, second.hash);
    assert_int_equal(first.events, second.events);
    assert_memory_equal(first.window, second.window, WINDOWS * sizeof *first.window);
    assert_int_not_equal(first.hash, other.hash);
    cluster_report_free(&first);
    cluster_report_free(&second);
    cluster_report_free(&other);
}

static void test_policies(void **state) {
    (void)state;
    struct cluster_report none, troupe, eplb;
    run(&none, "", CLUSTER_NONE, 1);
    run(&troupe, "", CLUSTER_TROUPE, 1);
    run(&eplb, "", CLUSTER_EPLB, 1);
    assert_int_equal(none.total.copies, 0);
    assert_int_equal(none.total.operations, 0);
    assert_int_equal(none.first_copies, PAIRS);
    assert_int_equal(none.total.placed, PAIRS);
    assert_true(none.total.stall == 0);
    assert_true(troupe.total.mean > none.total.mean + 0.15);
    assert_true(troupe.total.mean > eplb.total.mean + 0.05);
    assert_true(troupe.total.copies * 3 < eplb.total.copies * 2);
    assert_true(troupe.total.stall > 0 && troupe.total.stall < eplb.total.stall);
    assert_in_range(troupe.total.placed, PAIRS + 20, LAYERS * (EXPERTS + 8));
    assert_int_equal(troupe.total.bytes, troupe.total.copies * (UINT64_C(10) << 20));
    for (uint32_t w = 0; w < WINDOWS; w++) /* make before break: everything has a live holder */
        assert_true(troupe.window[w].unserved_s == 0);
    assert_int_equal(troupe.total.aborted, 0);
    cluster_report_free(&none);
    cluster_report_free(&troupe);
    cluster_report_free(&eplb);
}

/* Without replicas, what a process held waits until others have loaded it: 8 copies of 10 MiB, shared out. */
static void test_losses(void **state) {
    (void)state;
    struct cluster_report alone, drained, slow, fast, full;
    run(&alone, "at 7m lose 3\n", CLUSTER_NONE, 1);
    assert_true(alone.total.unserved_s > 0.01 && alone.total.unserved_s < 1);
    assert_int_equal(alone.total.copies, 8);
    assert_int_equal(alone.total.placed, PAIRS);
    run(&drained, "at 7m drain 3\n", CLUSTER_NONE, 1);
    assert_true(drained.total.unserved_s == 0);
    assert_int_equal(drained.total.copies, 8);
    assert_int_equal(drained.total.operations, 1);
    /* With every slot taken by replicas, those make room: nobody waits longer than for the loads. */
    run(&full, "at 7m lose 3\nat 9m lose 5\nat 11m drain 6\n", CLUSTER_TROUPE, 1);
    assert_true(full.total.unserved_s < 1);
    assert_int_equal(full.total.aborted, 0);
    cluster_report_free(&full);
    run(&slow, "at 0s slow 3 to 0.25\n", CLUSTER_NONE, 1);
    run(&fast, "", CLUSTER_NONE, 1);
    assert_true(slow.total.mean < fast.total.mean);
    cluster_report_free(&alone);
    cluster_report_free(&drained);
    cluster_report_free(&slow);
    cluster_report_free(&fast);
}

static void refuse(const char *line, const char *text) {
    struct cluster_task task;
    struct failure failure = {0};
    char file[512];
    snprintf(file, sizeof file, "processes 4\n%s\n", line);
    if (cluster_parse(&task, file, strlen(file), &failure) == 0)
        fail_msg("'%s' was taken", line);
    if (strstr(failure.text, text) == NULL)
        fail_msg("expected '%s' in '%s'", text, failure.text);
}

static void test_what_is_wrong_in_a_file_is_said(void **state) {
    (void)state;
    struct cluster_task task;
    struct failure failure = {0};
    assert_int_equal(cluster_parse(&task, "", 0, &failure), ERR_INVALID);
    assert_non_null(strstr(failure.text, "expected a line such as 'processes 320"));
    refuse("colour red", "line 2: expected processes, at, knob");
    refuse("span", "span: expected one value, found 0");
    refuse("span 24", "expected a time such as");
    refuse("span -3h", "expected a time such as");
    refuse("span nan", "expected a time such as");
    refuse("span 0s", "span: expected more than 0");
    refuse("processes 0", "expected a number from 1 to 512, found '0'");
    refuse("processes 3 hosts 4", "expected a number from 1 to 3, found '4'");
    refuse("processes 3 hosts", "expected a number, then words with one value each");
    refuse("processes 3 width 4", "expected hosts, copies, speed or load_mib_s, found 'width'");
    refuse("processes 3 speed nan", "expected a number from 0.01 to 100, found 'nan'");
    refuse("processes 2.5", "expected a whole number");
    refuse("processes 512", "at most 512 expert processes, found 516");
    refuse("slowdown 1", "0.99");
    refuse("tokens_per_second many", "found 'many'");
    refuse("knob colour 1", "colour");
    refuse("knob heartbeat_ms", "expected 'knob NAME VALUE'");
    refuse("at 1h lose", "expected 'at TIME lose|drain PROCESS'");
    refuse("at 1h paint 3", "expected 'at TIME lose|drain PROCESS'");
    refuse("at 1h lose 4", "there is no process 4, only 0 to 3");
    refuse("at 1h lose 2 for", "unexpected 'for'");
    refuse("at 1h drain 2 for 3m", "unexpected 'for'");
    refuse("at 1h slow 2", "expected 'at TIME slow PROCESS to SPEED'");
    refuse("at soon lose 2", "expected a time such as");
    char longest[300];
    memset(longest, 'x', sizeof longest - 1);
    longest[sizeof longest - 1] = '\0';
    refuse(longest, "line 2 is longer than 255 characters");
}

static void cannot(const char *text, const char *why) {
    struct cluster_task task;
    struct cluster_report report;
    struct failure failure = {0};
    if (cluster_parse(&task, text, strlen(text), &failure) < 0)
        fail_msg("%s", failure.text);
    task.trace = &trace;
    assert_true(cluster_run(&report, &task, &failure) < 0);
    if (strstr(failure.text, why) == NULL)
        fail_msg("expected '%s' in '%s'", why, failure.text);
}

static void test_what_does_not_fit_is_said(void **state) {
    (void)state;
    cannot("processes 7 copies 9\n", "4 layers x 16 experts = 64, the processes hold 63 copies");
    cannot("processes 7\nexperts_per_token 17\n", "expected at most 16, found 17");
    cannot("processes 7\nspan 0.000001ms\n", "too short for 6 windows");
}

static void test_shipped_clusters_are_read(void **state) {
    (void)state;
    static const char *const names[] = {"config/clusters/v3-ep320.cluster",
                                        "config/clusters/unequal.cluster"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        struct cluster_task task;
        struct failure failure = {0};
        size_t size;
        char *text = read_whole_file(names[i], &size);
        assert_non_null(text);
        if (cluster_parse(&task, text, size, &failure) < 0)
            fail_msg("%s: %s", names[i], failure.text);
        free(text);
    }
}

/* ---- the live view's feed ---- */

struct heard {
    uint32_t sets, keyframes, loads, repaired;
    uint64_t last_ns, bytes;
    bool loses;
};

static void hear(void *context, uint64_t now_ns, bool keyframe, const void *events, size_t size) {
    struct heard *heard = context;
    char *text = malloc(size + 1);
    assert_non_null(text);
    memcpy(text, events, size);
    text[size] = 0;
    assert_true(now_ns >= heard->last_ns); /* a keyframe comes with a set */
    assert_int_equal(strncmp(text, "event: hello\n", 13) == 0, keyframe);
    assert_true(size > 2 && strcmp(text + size - 2, "\n\n") == 0);
    heard->last_ns = now_ns;
    heard->bytes += size;
    heard->keyframes += keyframe;
    heard->sets += !keyframe;
    heard->loads += !keyframe && strstr(text, "event: load\n") != NULL;
    const char *lost = strstr(text, "\"kind\":\"lost\"");
    heard->loses = heard->loses || (lost != NULL && strstr(lost, "\"name\":\"expert-3\"") != NULL);
    heard->repaired += !keyframe && lost != NULL && strstr(lost, "\"replaced_ms\":null") == NULL &&
                       strstr(lost, "\"back_ms\":null") == NULL;
    free(text);
}

static void test_the_feed_tells_the_day(void **state) {
    (void)state;
    char text[2048];
    struct cluster_task task;
    struct cluster_report report[2];
    struct failure failure = {0};
    struct heard heard[2] = {{0}, {0}};
    snprintf(text, sizeof text, "%s%s", SMALL, "at 7m lose 3 for 10s\n");
    for (int i = 0; i < 2; i++) {
        if (cluster_parse(&task, text, strlen(text), &failure) < 0)
            fail_msg("%s", failure.text);
        task.trace = &trace;
        task.policy = CLUSTER_TROUPE;
        task.seed = 1;
        task.feed = hear;
        task.feed_ns = UINT64_C(1000000000);
        task.context = &heard[i];
        if (cluster_run(&report[i], &task, &failure) < 0)
            fail_msg("%s", failure.text);
        cluster_report_free(&report[i]);
    }
    assert_in_range(heard[0].sets, 30 * 60, 31 * 60);
    assert_in_range(heard[0].keyframes, heard[0].sets / 20, heard[0].sets / 20 + 1);
    assert_in_range(heard[0].loads, heard[0].sets * 2 / 5, heard[0].sets / 2 + 1);
    assert_true(heard[0].loses);
    assert_int_equal(heard[0].repaired, 1);
    assert_int_equal(report[0].hash, report[1].hash); /* the same day, told in the same words */
    assert_int_equal(heard[0].bytes, heard[1].bytes);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_the_same_seed_is_the_same_day),
        cmocka_unit_test(test_policies),
        cmocka_unit_test(test_losses),
        cmocka_unit_test(test_the_feed_tells_the_day),
        cmocka_unit_test(test_what_is_wrong_in_a_file_is_said),
        cmocka_unit_test(test_what_does_not_fit_is_said),
        cmocka_unit_test(test_shipped_clusters_are_read),
    };
    make_trace();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
