/* Routing biases that follow the load, on real processes: streams that began before are not
 * touched, later ones say which version they are made with, and equal fingerprints mean equal
 * tokens, although processes are killed and drained meanwhile. */
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

#include "tests/support/cluster.h"
#include "tests/support/http.h"

#define MODEL "models/demo"
#define KINDS 3
#define CALLS 36 /* of the versions' time */
#define TRIES 200

static const char *const bodies[KINDS] = {
    "{\"prompt\":\"And the king said "
    "unto\",\"max_tokens\":%u,\"temperature\":0,\"ignore_eos\":true}",
    "{\"prompt\":\"def "
    "main(args):\\n\",\"max_tokens\":%u,\"temperature\":0.8,\"seed\":11,\"ignore_eos\":true}",
    "{\"prompt\":\"KING HENRY. My "
    "lord,\",\"max_tokens\":%u,\"temperature\":0.7,\"seed\":5,\"ignore_eos\":true}",
};

/* What an answer says, and with which version. */
struct answer {
    char *text, *fingerprint;
};

static int ctl(const struct cluster *cluster, const char *words, char *ret, size_t room) {
    const char *build = getenv("TROUPE_BUILD");
    char command[512];
    snprintf(command, sizeof command, "%s/troupe ctl %s --json --run-dir %s 2>&1",
             build != NULL ? build : "build", words, cluster->run_dir);
    FILE *pipe = popen(command, "r");
    assert_non_null(pipe);
    size_t got = fread(ret, 1, room - 1, pipe);
    ret[got] = 0;
    return pclose(pipe);
}

static long long number_in(const char *text, const char *key) {
    json_t *json = json_loads(text, 0, NULL);
    long long number = (long long)json_integer_value(json_object_get(json, key));
    json_decref(json);
    return number;
}

static char *body_of(uint32_t kind, uint32_t tokens) {
    char *body = malloc(256);
    snprintf(body, 256, bodies[kind], tokens);
    return body;
}

static struct answer take(const struct http_call *call) {
    if (call->status != 200)
        fail_msg("status %d: %s", call->status, call->text != NULL ? call->text : "");
    json_t *json = json_loads(call->text, 0, NULL);
    struct answer answer = {strdup(json_string_value(json_object_get(
                                json_array_get(json_object_get(json, "choices"), 0), "text"))),
                            strdup(json_string_value(json_object_get(json, "system_fingerprint")))};
    json_decref(json);
    return answer;
}

static void answer_free(struct answer *answer) {
    free(answer->text);
    free(answer->fingerprint);
}

static struct answer ask_one(const struct cluster *cluster, uint32_t kind, uint32_t tokens) {
    struct http_call call = {
        .method = "POST", .path = "/v1/completions", .body = body_of(kind, tokens)};
    http_run(cluster->port, &call, 1, 1, 60000);
    struct answer answer = take(&call);
    free((char *)call.body);
    http_call_free(&call);
    return answer;
}

/* Another process changes the troupe while this one reads streams. */
static pid_t meanwhile(const struct cluster *cluster, void (*act)(const struct cluster *cluster)) {
    fflush(NULL);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        act(cluster);
        _exit(0);
    }
    return pid;
}

static void switch_on(const struct cluster *cluster) {
    char text[8192];
    usleep(150000);
    ctl(cluster, "bias on --gamma 0.02 --clamp 0.2", text, sizeof text);
}

static void kill_and_drain(const struct cluster *cluster) {
    char text[8192];
    pid_t pid[8];
    usleep(400000);
    if (cluster_pids(cluster, "attention", pid, 8) > 0)
        kill(pid[0], SIGKILL);
    usleep(1500000);
    if (cluster_pids(cluster, "coordinator", pid, 8) > 0)
        kill(pid[0], SIGKILL);
    usleep(1000000);
    ctl(cluster, "scale attention 1", text, sizeof text);
}

static long long version_now(const struct cluster *cluster) {
    char text[8192];
    assert_int_equal(ctl(cluster, "bias show", text, sizeof text), 0);
    return number_in(text, "version");
}

static void test_streams_keep_their_version(void **state) {
    (void)state;
    struct cluster cluster;
    struct answer plain[KINDS], answer[CALLS];
    struct http_call call[CALLS] = {0};
    char text[8192];
    int status;
    assert_true(cluster_start(&cluster, MODEL,
                              "--experts 2 --attention 2 --bias-interval-ms 150 --bias-rows 30 "
                              "--bias-linger-ms 500"));
    cluster.faults = true;
    for (uint32_t kind = 0; kind < KINDS; kind++)
        plain[kind] = ask_one(&cluster, kind, 160);

    /* Streams that run when the biases begin to move are what they were. */
    for (uint32_t i = 0; i < KINDS; i++)
        call[i] = (struct http_call){
            .method = "POST", .path = "/v1/completions", .body = body_of(i, 160)};
    pid_t other = meanwhile(&cluster, switch_on);
    http_run(cluster.port, call, KINDS, KINDS, 60000);
    waitpid(other, &status, 0);
    for (uint32_t kind = 0; kind < KINDS; kind++) {
        struct answer found = take(&call[kind]);
        assert_string_equal(found.text, plain[kind].text);
        assert_string_equal(found.fingerprint, plain[kind].fingerprint);
        assert_non_null(strstr(found.fingerprint, "-b0"));
        answer_free(&found);
        free((char *)call[kind].body);
        http_call_free(&call[kind]);
    }

    /* Later ones: many versions, an attention actor and the coordinator killed, one drained. */
    for (uint32_t i = 0; i < CALLS; i++)
        call[i] = (struct http_call){.method = "POST",
                                     .path = "/v1/completions",
                                     .body = body_of(i % KINDS, 60),
                                     .start_after_ms = i * 90};
    other = meanwhile(&cluster, kill_and_drain);
    http_run(cluster.port, call, CALLS, 6, 120000);
    waitpid(other, &status, 0);
    uint32_t versions = 0, compared = 0;
    for (uint32_t i = 0; i < CALLS; i++) {
        answer[i] = take(&call[i]);
        bool fresh = true;
        for (uint32_t j = 0; j < i; j++) {
            bool same = strcmp(answer[i].fingerprint, answer[j].fingerprint) == 0;
            fresh = fresh && !same;
            if (!same || i % KINDS != j % KINDS)
                continue;
            assert_string_equal(answer[i].text,
                                answer[j].text); /* equal fingerprint and request: equal tokens */
            compared++;
        }
        versions += fresh;
    }
    printf("%d answers with %u versions of the routing bias, %u of them compared; version %lld is "
           "current\n",
           CALLS, versions, compared, version_now(&cluster));
    assert_true(versions >= 3 && compared >= 3);
    for (uint32_t i = 0; i < CALLS; i++) {
        answer_free(&answer[i]);
        free((char *)call[i].body);
        http_call_free(&call[i]);
    }

    /* Back to the model's own: as before, and what nobody uses is freed. */
    assert_int_equal(ctl(&cluster, "bias off", text, sizeof text), 0);
    assert_int_equal(ctl(&cluster, "bias reset", text, sizeof text), 0);
    for (int i = 0; i < TRIES && version_now(&cluster) != 0; i++)
        usleep(50000);
    for (uint32_t kind = 0; kind < KINDS; kind++) {
        struct answer found = ask_one(&cluster, kind, 160);
        for (int i = 0; i < TRIES && strstr(found.fingerprint, "-b0") == NULL;
             i++) { /* the epoch is on its way */
            answer_free(&found);
            usleep(50000);
            found = ask_one(&cluster, kind, 160);
        }
        assert_string_equal(found.text, plain[kind].text);
        answer_free(&found);
        answer_free(&plain[kind]);
    }
    for (int i = 0; i < TRIES && cluster_metric(&cluster, "troupe_bias_versions") != 0; i++)
        usleep(50000);
    assert_true(cluster_metric(&cluster, "troupe_bias_versions") == 0);
    assert_true(cluster_stop(&cluster));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_streams_keep_their_version),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
