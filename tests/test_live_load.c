/* Many clients on real processes: 200 streams of mixed lengths at once, each equal to the same request alone; 100 clients that hang up
 * at random leave no sequence and no page behind; experts, attention and samplers killed under load cost no request a token. */
#include <jansson.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "simulator/random.h"
#include "tests/support/cluster.h"
#include "tests/support/http.h"

#define MODEL     "models/demo"
#define STREAMS   200
#define KINDS     20 /* different requests among the streams */
#define HANG_UPS  100
#define SEED      4217

static const char *const openings[] = {"And it came to pass", "Enter KING HENRY", "import os",
                                       "river: a natural stream", "NAME\n       ls - list"};

/* The k-th request: seeded sampling, mixed prompt and answer lengths. */
static char *make_body(uint32_t kind, bool stream) {
    struct random random = {SEED + kind};
    char prompt[4096] = "";
    uint32_t repeats = 1 + (uint32_t)random_between(&random, 0, 12);
    for (uint32_t i = 0; i < repeats; i++) {
        strcat(prompt, openings[random_between(&random, 0, 4)]);
        strcat(prompt, " ");
    }
    json_t *body = json_pack("{s:s, s:i, s:f, s:i, s:b, s:b}", "prompt", prompt, "max_tokens",
                             (int)random_between(&random, 1, 48), "temperature", 0.8, "seed",
                             (int)kind, "stream", stream, "ignore_eos", 1);
    char *text = json_dumps(body, 0);
    json_decref(body);
    return text;
}

/* Joined text of a streamed completion; NULL unless it ended with [DONE]. */
static char *joined(const char *events) {
    char *text = calloc(1, strlen(events) + 1);
    bool done = false;
    for (const char *at = events; (at = strstr(at, "data: ")) != NULL;) {
        at += 6;
        const char *end = strstr(at, "\n\n");
        if (end == NULL)
            break;
        if (strncmp(at, "[DONE]", 6) == 0) {
            done = true;
            break;
        }
        json_t *chunk = json_loadb(at, (size_t)(end - at), 0, NULL);
        json_t *choice = json_array_get(json_object_get(chunk, "choices"), 0);
        const char *piece = json_string_value(json_object_get(choice, "text"));
        if (piece != NULL)
            strcat(text, piece);
        json_decref(chunk);
    }
    if (done)
        return text;
    free(text);
    return NULL;
}

static char *whole(const char *answer) {
    json_t *root = json_loads(answer, 0, NULL);
    const char *text = json_string_value(
        json_object_get(json_array_get(json_object_get(root, "choices"), 0), "text"));
    char *copy = text != NULL ? strdup(text) : NULL;
    json_decref(root);
    return copy;
}

static void ask_alone(const struct cluster *cluster, char **expected) {
    for (uint32_t kind = 0; kind < KINDS; kind++) {
        char *body = make_body(kind, false), *answer = NULL;
        assert_int_equal(http_one(cluster->port, "POST", "/v1/completions", body, &answer), 200);
        expected[kind] = whole(answer);
        assert_non_null(expected[kind]);
        free(answer);
        free(body);
    }
}

static uint32_t run_streams(const struct cluster *cluster, uint32_t count, char **expected) {
    struct http_call *calls = calloc(count, sizeof *calls);
    for (uint32_t i = 0; i < count; i++)
        calls[i] = (struct http_call){.method = "POST", .path = "/v1/completions",
                                      .body = make_body(i % KINDS, true)};
    http_run(cluster->port, calls, count, count, 240000);
    uint32_t right = 0;
    for (uint32_t i = 0; i < count; i++) {
        char *text = calls[i].status == 200 && calls[i].text != NULL ? joined(calls[i].text) : NULL;
        bool same = text != NULL && strcmp(text, expected[i % KINDS]) == 0;
        right += same;
        if (!same)
            fprintf(stderr, "stream %u: status %d, complete %d\n  expected %s\n  found    %s\n", i,
                    calls[i].status, calls[i].complete, expected[i % KINDS],
                    text != NULL ? text : calls[i].text != NULL ? calls[i].text : "-");
        free(text);
        free((char *)calls[i].body);
        http_call_free(&calls[i]);
    }
    free(calls);
    return right;
}

/* Metrics come with the next heartbeats: wait for them to say zero. */
static void assert_idle(const struct cluster *cluster) {
    double running = -1, waiting = -1, usage = -1;
    for (int i = 0; i < 100; i++) {
        running = cluster_metric(cluster, "vllm:num_requests_running");
        waiting = cluster_metric(cluster, "vllm:num_requests_waiting");
        usage = cluster_metric(cluster, "vllm:kv_cache_usage_perc");
        if (running == 0 && waiting == 0 && usage == 0)
            return;
        usleep(100000);
    }
    fail_msg("not idle: running %g, waiting %g, cache usage %g", running, waiting, usage);
}

static void test_200_streams(void **state) {
    (void)state;
    struct cluster cluster;
    char *expected[KINDS];
    assert_true(cluster_start(&cluster, MODEL, "--experts 4"));
    ask_alone(&cluster, expected);
    assert_int_equal(run_streams(&cluster, STREAMS, expected), STREAMS);
    assert_idle(&cluster);
    assert_true(cluster_stop(&cluster));
    for (uint32_t kind = 0; kind < KINDS; kind++)
        free(expected[kind]);
}

static void test_hang_ups(void **state) {
    (void)state;
    struct cluster cluster;
    struct random random = {SEED};
    struct http_call *calls = calloc(HANG_UPS, sizeof *calls);
    printf("seed %d\n", SEED);
    assert_true(cluster_start(&cluster, MODEL, "--experts 2 --attention 2"));
    for (uint32_t i = 0; i < HANG_UPS; i++) {
        bool stream = i % 4 != 0;
        json_t *body = json_pack("{s:s, s:i, s:b, s:b}", "prompt", openings[i % 5], "max_tokens", 1500,
                                 "stream", stream, "ignore_eos", 1);
        calls[i] = (struct http_call){.method = "POST", .path = "/v1/completions",
                                      .body = json_dumps(body, 0),
                                      .start_after_ms = (uint32_t)random_between(&random, 0, 1000)};
        if (stream)
            calls[i].hang_up_after = (size_t)random_between(&random, 1, 4000);
        json_decref(body);
    }
    http_run(cluster.port, calls, HANG_UPS, HANG_UPS, 4000); /* those still open are hung up at the end */
    for (uint32_t i = 0; i < HANG_UPS; i++) {
        free((char *)calls[i].body);
        http_call_free(&calls[i]);
    }
    free(calls);
    assert_idle(&cluster);
    assert_int_equal(http_one(cluster.port, "POST", "/v1/completions",
                              "{\"prompt\":\"after\",\"max_tokens\":2}", NULL), 200);
    assert_true(cluster_stop(&cluster));
}

/* One process of the role is killed while 60 streams run. */
static void kill_under_load(const struct cluster *cluster, const char *role, char **expected) {
    pid_t pid;
    pid_t killer = fork();
    if (killer == 0) {
        usleep(150000);
        if (cluster_pids(cluster, role, &pid, 1) == 1)
            _exit(kill(pid, SIGKILL) == 0 ? 0 : 1);
        _exit(1);
    }
    uint32_t right = run_streams(cluster, 60, expected);
    int status = -1;
    waitpid(killer, &status, 0);
    printf("killed one %s under 60 streams: %u of 60 as if nothing had happened\n", role, right);
    assert_int_equal(status, 0);
    assert_int_equal(right, 60);
    for (int i = 0; i < 100 && http_one(cluster->port, "GET", "/ready", NULL, NULL) != 200; i++)
        usleep(100000);
}

static void test_kills(void **state) {
    (void)state;
    struct cluster cluster;
    char *expected[KINDS];
    assert_true(cluster_start(&cluster, MODEL, "--experts 4 --restart-limit 20"));
    cluster.faults = true;
    ask_alone(&cluster, expected);
    kill_under_load(&cluster, "expert", expected);
    kill_under_load(&cluster, "attention", expected);
    kill_under_load(&cluster, "sampler", expected);
    assert_idle(&cluster);
    assert_true(cluster_stop(&cluster));
    for (uint32_t kind = 0; kind < KINDS; kind++)
        free(expected[kind]);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_200_streams),
                                       cmocka_unit_test(test_hang_ups), cmocka_unit_test(test_kills)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
