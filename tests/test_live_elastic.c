/* A troupe of real processes that grows and shrinks under load, and nobody notices: 32 streams run while experts go 4, 8, 2, 5, 4,
 * attention 1, 2, 1 and samplers 1, 2, 1; each stream must equal the same request alone. Also what ctl refuses, and why.
 *   test_live_elastic                a short form of it, in make test
 *   test_live_elastic soak SECONDS   make soak-elastic: holds the longest gap between two tokens; prints the longest ones
 *                                    and what was under way then
 *   test_live_elastic cycles N       make soak-cycles: N times up and down; memory, descriptors, shared memory as before */
#include <dirent.h>
#include <jansson.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "simulator/random.h"
#include "tests/support/cluster.h"
#include "tests/support/http.h"

#define MODEL     "models/demo"
#define STREAMS   32
#define KINDS     16
#define CALLS_MAX 4096
#define SEED      977

static const char *const openings[] = {"And it came to pass", "Enter KING HENRY", "import os",
                                       "river: a natural stream"};

/* ---- ctl ---- */

/* Output of `troupe ctl WORDS`, and its exit code. */
static int ctl(const struct cluster *cluster, const char *words, char *ret, size_t room) {
    char line[512];
    const char *build = getenv("TROUPE_BUILD");
    snprintf(line, sizeof line, "%s/troupe ctl %s --run-dir %s 2>&1", build != NULL ? build : "build",
             words, cluster->run_dir);
    FILE *pipe = popen(line, "r");
    size_t got = pipe != NULL ? fread(ret, 1, room - 1, pipe) : 0;
    ret[got] = 0;
    int status = pipe != NULL ? pclose(pipe) : -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/* What the admin interface says of a path: asked here, because a process for each question would take time from those
 * whose gaps are measured. */
static bool admin(const struct cluster *cluster, const char *path, char *ret, size_t room) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    char line[256];
    size_t got = 0;
    snprintf(address.sun_path, sizeof address.sun_path, "%.80s/admin.sock", cluster->run_dir);
    int size = snprintf(line, sizeof line, "GET %s HTTP/1.1\r\nHost: troupe\r\nConnection: close\r\n\r\n", path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connect(fd, (struct sockaddr *)&address, sizeof address) == 0 && write(fd, line, (size_t)size) == size)
        for (ssize_t more; got < room - 1 && (more = read(fd, ret + got, room - 1 - got)) > 0;)
            got += (size_t)more;
    close(fd);
    ret[got] = 0;
    const char *body = strstr(ret, "\r\n\r\n");
    if (strncmp(ret, "HTTP/1.1 200", 12) != 0 || body == NULL)
        return false;
    memmove(ret, body + 4, strlen(body + 4) + 1);
    return true;
}

/* Waits until no operation is under way; false: one was aborted, or half a minute was not enough. */
static bool settled(const struct cluster *cluster) {
    static char text[1 << 18];
    for (int i = 0; i < 600; i++) {
        bool busy = false;
        if (!admin(cluster, "/operations", text, sizeof text)) {
            fprintf(stderr, "GET /operations: %s\n", text);
            return false;
        }
        json_t *answer = json_loads(text, 0, NULL), *operation;
        size_t index;
        json_array_foreach(json_object_get(answer, "operations"), index, operation) {
            const char *phase = json_string_value(json_object_get(operation, "phase"));
            if (strcmp(phase, "aborted") == 0) {
                fprintf(stderr, "%s\n", text);
                return false;
            }
            busy = busy || strcmp(phase, "done") != 0;
        }
        json_decref(answer);
        if (!busy)
            return true;
        usleep(50000);
    }
    fprintf(stderr, "not settled: %s\n", text);
    return false;
}

static bool change(const struct cluster *cluster, const char *words) {
    char text[4096];
    if (ctl(cluster, words, text, sizeof text) != 0) {
        fprintf(stderr, "ctl %s: %s\n", words, text);
        return false;
    }
    return settled(cluster);
}

/* ---- streams ---- */

static char *make_body(uint32_t kind, bool stream) {
    struct random random = {SEED + kind};
    char prompt[1024] = "";
    uint32_t repeats = 1 + (uint32_t)random_between(&random, 0, 6);
    for (uint32_t i = 0; i < repeats; i++) {
        strcat(prompt, openings[random_between(&random, 0, 3)]);
        strcat(prompt, " ");
    }
    json_t *body = json_pack("{s:s, s:i, s:f, s:i, s:b, s:b}", "prompt", prompt, "max_tokens",
                             (int)random_between(&random, 100, 220), "temperature", 0.8, "seed",
                             (int)kind, "stream", stream, "ignore_eos", 1);
    char *text = json_dumps(body, 0);
    json_decref(body);
    return text;
}

/* Joined text of a streamed completion; NULL unless it ended with [DONE]. */
static char *joined(const char *events) {
    char *text = calloc(1, strlen(events) + 1);
    for (const char *at = events; (at = strstr(at, "data: ")) != NULL;) {
        at += 6;
        const char *end = strstr(at, "\n\n");
        if (end == NULL)
            break;
        if (strncmp(at, "[DONE]", 6) == 0)
            return text;
        json_t *chunk = json_loadb(at, (size_t)(end - at), 0, NULL);
        const char *piece = json_string_value(json_object_get(
            json_array_get(json_object_get(chunk, "choices"), 0), "text"));
        if (piece != NULL)
            strcat(text, piece);
        json_decref(chunk);
    }
    free(text);
    return NULL;
}

static void ask_alone(const struct cluster *cluster, char **expected) {
    for (uint32_t kind = 0; kind < KINDS; kind++) {
        struct http_call call = {.method = "POST", .path = "/v1/completions",
                                 .body = make_body(kind, true)};
        http_run(cluster->port, &call, 1, 1, 60000);
        assert_int_equal(call.status, 200);
        expected[kind] = joined(call.text);
        assert_non_null(expected[kind]);
        free((char *)call.body);
        http_call_free(&call);
    }
}

#define GAPS_SHOWN 8

struct gap {
    double ms, at_s; /* when it began, since the streams did */
};

struct figures {
    uint32_t requests, failed, refused, different;
    size_t gaps;
    double p50_ms, p99_ms;
    struct gap longest[GAPS_SHOWN]; /* in different moments, longest first */
};

/* The limit of "Must show": twice the steady 99th percentile or 100 ms, whichever is larger. */
static double gap_limit_ms(const struct figures *steady) {
    return 2 * steady->p99_ms > 100 ? 2 * steady->p99_ms : 100;
}

static int by_length(const void *a, const void *b) { /* longest first */
    const struct gap *left = a, *right = b;
    return left->ms < right->ms ? 1 : left->ms > right->ms ? -1 : 0;
}

/* All streams wait at once when one thing holds them up: of gaps that overlap, the longest is shown. */
static void take_longest(struct figures *figures, const struct gap *sorted) {
    uint32_t shown = 0;
    for (size_t i = 0; i < figures->gaps && shown < GAPS_SHOWN; i++) {
        bool apart = true;
        for (uint32_t j = 0; j < shown; j++) {
            const struct gap *other = &figures->longest[j];
            apart = apart && (sorted[i].at_s > other->at_s + other->ms / 1e3 ||
                              other->at_s > sorted[i].at_s + sorted[i].ms / 1e3);
        }
        if (apart)
            figures->longest[shown++] = sorted[i];
    }
}

static void measure_gaps(const struct http_call *calls, struct figures *figures) {
    size_t room = 1;
    for (uint32_t i = 0; i < CALLS_MAX; i++)
        room += calls[i].times;
    struct gap *gap = calloc(room, sizeof *gap);
    for (uint32_t i = 0; i < CALLS_MAX; i++)
        for (uint32_t j = 1; j < calls[i].times; j++) {
            const uint64_t *time_ns = calls[i].time_ns + j;
            gap[figures->gaps++] =
                (struct gap){(double)(time_ns[0] - time_ns[-1]) / 1e6, (double)time_ns[-1] / 1e9};
        }
    qsort(gap, figures->gaps, sizeof *gap, by_length);
    if (figures->gaps > 0) {
        figures->p50_ms = gap[figures->gaps / 2].ms;
        figures->p99_ms = gap[figures->gaps / 100].ms;
    }
    take_longest(figures, gap);
    free(gap);
}

static void judge(const struct http_call *call, const char *expected, struct figures *figures) {
    char *text = call->status == 200 && call->text != NULL ? joined(call->text) : NULL;
    figures->requests++;
    figures->refused += call->status == 429 || call->status == 503;
    figures->failed += text == NULL;
    figures->different += text != NULL && strcmp(text, expected) != 0;
    if (text == NULL || strcmp(text, expected) != 0)
        fprintf(stderr, "status %d, complete %d\n  expected %s\n  found    %s\n", call->status,
                call->complete, expected, text != NULL ? text : call->text != NULL ? call->text : "-");
    free(text);
}

/* 32 streams at a time for so long. */
static struct figures run_streams(const struct cluster *cluster, uint32_t seconds, char **expected) {
    struct figures figures = {0};
    struct http_call *calls = calloc(CALLS_MAX, sizeof *calls);
    for (uint32_t i = 0; i < CALLS_MAX; i++)
        calls[i] = (struct http_call){.method = "POST", .path = "/v1/completions",
                                      .body = make_body(i % KINDS, true), .keep_times = true,
                                      .start_before_ms = seconds * 1000};
    http_run(cluster->port, calls, CALLS_MAX, STREAMS, (seconds + 120) * 1000);
    measure_gaps(calls, &figures);
    for (uint32_t i = 0; i < CALLS_MAX; i++) {
        if (!calls[i].skipped)
            judge(&calls[i], expected[i % KINDS], &figures);
        free((char *)calls[i].body);
        http_call_free(&calls[i]);
    }
    free(calls);
    return figures;
}

/* ---- up and down under load ---- */

static const char *const STEPS[] = {"scale experts 8", "scale attention 2", "scale samplers 2",
                                    "scale experts 2", "scale attention 1", "scale samplers 1",
                                    "scale experts 5", "scale experts 4"};
#define STEPS_COUNT   (sizeof STEPS / sizeof STEPS[0])
#define ROUND_SECONDS 20 /* all steps once in about so long */
#define ROUNDS_MAX    64

/* Written by the process that takes the steps, read by the one that measures. */
struct timeline {
    double began_s; /* of the streams, by the clock */
    uint32_t steps;
    struct {
        double from_s, to_s; /* by the clock; 0: not yet */
    } step[STEPS_COUNT * ROUNDS_MAX];
};

static double clock_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static void take_steps(const struct cluster *cluster, uint32_t seconds, struct timeline *timeline) {
    uint32_t rounds = seconds / ROUND_SECONDS;
    rounds = rounds < 1 ? 1 : rounds > ROUNDS_MAX ? ROUNDS_MAX : rounds;
    for (uint32_t i = 0; i < rounds * STEPS_COUNT; i++) {
        usleep(seconds * 1000000u / (rounds * STEPS_COUNT + 1) * 8 / 10);
        timeline->step[i].from_s = clock_s();
        timeline->steps = i + 1;
        if (!change(cluster, STEPS[i % STEPS_COUNT]))
            _exit(1);
        timeline->step[i].to_s = clock_s();
        printf("  %-20s from %5.1f s to %5.1f s\n", STEPS[i % STEPS_COUNT],
               timeline->step[i].from_s - timeline->began_s, timeline->step[i].to_s - timeline->began_s);
        fflush(stdout);
    }
    _exit(0);
}

static void show(const char *what, const struct figures *figures) {
    printf("%s: %u streams, %u failed, %u refused, %u different; gaps between tokens: median %.1f ms, p99 %.1f ms, longest %.1f ms\n",
           what, figures->requests, figures->failed, figures->refused, figures->different, figures->p50_ms,
           figures->p99_ms, figures->longest[0].ms);
    fflush(stdout);
}

/* The longest gaps, and the step that each of them fell into. */
static void show_longest(const struct figures *figures, const struct timeline *timeline) {
    for (uint32_t i = 0; i < GAPS_SHOWN && figures->longest[i].ms > 0; i++) {
        const struct gap *gap = &figures->longest[i];
        double from_s = timeline->began_s + gap->at_s, to_s = from_s + gap->ms / 1e3;
        printf("  gap of %6.1f ms after %6.2f s:", gap->ms, gap->at_s);
        bool any = false;
        for (uint32_t j = 0; j < timeline->steps; j++)
            if (timeline->step[j].from_s <= to_s &&
                (timeline->step[j].to_s == 0 || timeline->step[j].to_s >= from_s)) {
                printf(" in %s, %.2f s after it began", STEPS[j % STEPS_COUNT], from_s - timeline->step[j].from_s);
                any = true;
            }
        printf("%s\n", any ? "" : " between the steps");
    }
    fflush(stdout);
}

static void assert_size(const struct cluster *cluster, const char *role, uint32_t wanted) {
    pid_t pid[64];
    uint32_t count = 0;
    for (int i = 0; i < 100 && (count = cluster_pids(cluster, role, pid, 64)) != wanted; i++)
        usleep(50000);
    assert_int_equal(count, wanted);
}

static void run_elastic(uint32_t steady_seconds, uint32_t seconds, bool hold_gap) {
    struct cluster cluster;
    char *expected[KINDS];
    int status = -1;
    assert_true(cluster_start(&cluster, MODEL, "--experts 4"));
    ask_alone(&cluster, expected);
    struct figures steady = run_streams(&cluster, steady_seconds, expected);
    show("steady", &steady);
    struct timeline *timeline = mmap(NULL, sizeof *timeline, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    assert_true(timeline != MAP_FAILED);
    timeline->began_s = clock_s();
    pid_t steps = fork();
    if (steps == 0)
        take_steps(&cluster, seconds, timeline);
    struct figures elastic = run_streams(&cluster, seconds, expected);
    show("experts 4-8-2-5-4, attention 1-2-1, samplers 1-2-1", &elastic);
    waitpid(steps, &status, 0);
    double limit_ms = gap_limit_ms(&steady);
    printf("steady p99 %.1f ms; limit of the longest gap %.1f ms; longest gap %.1f ms\n", steady.p99_ms, limit_ms,
           elastic.longest[0].ms);
    show_longest(&elastic, timeline);
    munmap(timeline, sizeof *timeline);
    assert_int_equal(status, 0);
    assert_int_equal(steady.failed + steady.refused + steady.different, 0);
    assert_int_equal(elastic.failed + elastic.refused + elastic.different, 0);
    assert_true(elastic.requests >= STREAMS);
    assert_size(&cluster, "expert", 4);
    assert_size(&cluster, "attention", 1);
    assert_size(&cluster, "sampler", 1);
    if (hold_gap)
        assert_true(elastic.longest[0].ms <= limit_ms);
    assert_true(cluster_stop(&cluster));
    for (uint32_t kind = 0; kind < KINDS; kind++)
        free(expected[kind]);
}

static void test_growing_and_shrinking_changes_no_stream(void **state) {
    (void)state;
    run_elastic(2, 9, false);
}

/* ---- what is refused ---- */

static void assert_refused(const struct cluster *cluster, const char *words, const char *why) {
    char text[4096];
    int code = ctl(cluster, words, text, sizeof text);
    if (code == 0 || strstr(text, why) == NULL)
        fail_msg("ctl %s: code %d, \"%s\" is not in \"%s\"", words, code, why, text);
}

/* The coordinator is killed; the next one knows the copy that was asked for, and gives the next operation the next number. */
static void assert_replica_outlives_the_coordinator(struct cluster *cluster, const char *both) {
    static char text[1 << 16];
    pid_t pid[64];
    assert_int_equal(cluster_pids(cluster, "coordinator", pid, 64), 1);
    cluster->faults = true;
    kill(pid[0], SIGKILL);
    bool serving = false;
    for (int i = 0; i < 200 && !serving; i++) {
        usleep(50000);
        serving = ctl(cluster, "status", text, sizeof text) == 0 && strstr(text, ", serving,") != NULL;
    }
    assert_true(serving);
    assert_int_equal(ctl(cluster, "placement --layer 1", text, sizeof text), 0);
    assert_non_null(strstr(text, both));
    assert_true(change(cluster, "replicate 1 1"));
    assert_int_equal(ctl(cluster, "operations", text, sizeof text), 0);
    assert_non_null(strstr(text, "    2  replicate  done"));
}

static void test_what_makes_no_sense_is_refused(void **state) {
    (void)state;
    struct cluster cluster;
    static char text[1 << 16];
    assert_true(cluster_start(&cluster, MODEL, "--experts 2 --memory-mib 12"));
    assert_refused(&cluster, "scale experts 0", "1 to 512 processes expected, found 0");
    assert_refused(&cluster, "scale experts 100000", "found 100000");
    assert_refused(&cluster, "scale experts x", "a whole number expected");
    assert_refused(&cluster, "scale gateways 2", "experts, attention or samplers expected");
    assert_refused(&cluster, "scale experts 1", "not enough slots for all experts");
    assert_refused(&cluster, "drain expert-0", "not enough slots for all experts");
    assert_refused(&cluster, "drain attention-0", "no ready attention process would be left");
    assert_refused(&cluster, "drain gateway", "can be drained");
    assert_refused(&cluster, "drain nobody", "there is no actor nobody");
    assert_refused(&cluster, "move 1 99 expert-0 expert-1", "there is no expert 99 in layer 1");
    assert_refused(&cluster, "move 0 0 expert-0 expert-1", "there is no expert 0 in layer 0");
    assert_int_equal(ctl(&cluster, "placement --layer 1", text, sizeof text), 0);
    bool first = strstr(text, "layer   1 expert   0  expert-0") != NULL; /* whoever joined first has it */
    assert_refused(&cluster, first ? "move 1 0 expert-1 expert-0" : "move 1 0 expert-0 expert-1",
                   first ? "expert-1 does not hold expert 0 of layer 1; expert-0 does"
                         : "expert-0 does not hold expert 0 of layer 1; expert-1 does");
    assert_refused(&cluster, "cancel 77", "there is no operation 77");
    assert_refused(&cluster, "placement --layer 0", "has no routed experts");
    assert_refused(&cluster, "dance", "usage");
    assert_true(change(&cluster, "replicate 1 0"));
    assert_int_equal(ctl(&cluster, "placement --layer 1", text, sizeof text), 0);
    assert_non_null(strstr(text, first ? "layer   1 expert   0  expert-0 expert-1"
                                       : "layer   1 expert   0  expert-1 expert-0"));
    assert_refused(&cluster, "replicate 1 0 expert-1", "holds expert 0 of layer 1 already");
    assert_refused(&cluster, "cancel 1", "has ended already: it is done");
    assert_int_equal(http_one(cluster.port, "GET", "/status", NULL, NULL), 404); /* not on the public port */
    const char *both = first ? "layer   1 expert   0  expert-0 expert-1" : "layer   1 expert   0  expert-1 expert-0";
    assert_replica_outlives_the_coordinator(&cluster, both);
    assert_true(cluster_stop(&cluster));
}

/* ---- a process without weights ---- */

static bool copy_file(const char *from_folder, const char *to_folder, const char *name) {
    char line[512];
    snprintf(line, sizeof line, "cp %s/%s %s/", from_folder, name, to_folder);
    return system(line) == 0;
}

static pid_t start_expert(const struct cluster *cluster, const char *model) {
    pid_t pid = fork();
    if (pid == 0) {
        char binary[256];
        const char *build = getenv("TROUPE_BUILD");
        snprintf(binary, sizeof binary, "%s/troupe", build != NULL ? build : "build");
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        execl(binary, "troupe", "expert", "--run-dir", cluster->run_dir, "--model", model, "--name", "extra",
              "--transport", "zmq", "--weights", "peer", "--log", "/dev/null", (char *)NULL);
        _exit(127);
    }
    return pid;
}

/* Of the actor "extra"; -1: it is not there. */
static long long extra_number(const struct cluster *cluster, const char *key) {
    static char text[1 << 16];
    long long number = -1;
    size_t index;
    json_t *actor;
    if (ctl(cluster, "actors --json", text, sizeof text) != 0)
        return -1;
    json_t *answer = json_loads(text, 0, NULL);
    json_array_foreach(json_object_get(answer, "actors"), index, actor)
        if (strcmp(json_string_value(json_object_get(actor, "name")), "extra") == 0)
            number = json_integer_value(json_object_get(actor, key));
    json_decref(answer);
    return number;
}

/* It has config.json and nothing else, and takes its share from the others, over ZeroMQ; rows are computed with it and
 * without it, and the answer is the same. */
static void test_weights_come_from_other_processes(void **state) {
    (void)state;
    struct cluster cluster;
    char folder[] = "/tmp/troupe-test-weightless-XXXXXX", text[4096];
    char *expected = NULL, *found = NULL;
    const char *body = "{\"prompt\":\"And it came to pass\",\"max_tokens\":40,\"temperature\":0.8,\"seed\":5}";
    assert_non_null(mkdtemp(folder));
    assert_true(copy_file(MODEL, folder, "config.json"));
    assert_true(cluster_start(&cluster, MODEL, "--experts 2"));
    cluster.faults = true;
    assert_int_equal(http_one(cluster.port, "POST", "/v1/completions", body, &expected), 200);
    pid_t extra = start_expert(&cluster, folder);
    long long share = 0;
    for (int i = 0; i < 200 && (share <= 0 || extra_number(&cluster, "copies_held") < share); i++) {
        usleep(50000);
        share = extra_number(&cluster, "copies");
    }
    assert_true(share >= 40); /* about a third of 160 */
    assert_int_equal(extra_number(&cluster, "copies_held"), share);
    assert_true(extra_number(&cluster, "fetched_bytes") > share * 3 * 256 * 128);
    assert_true(settled(&cluster));
    assert_int_equal(http_one(cluster.port, "POST", "/v1/completions", body, &found), 200);
    const char *one = strstr(expected, "\"text\""), *other = strstr(found, "\"text\"");
    assert_true(one != NULL && other != NULL && strncmp(one, other, strcspn(one, "}")) == 0);
    assert_true(change(&cluster, "replicate 1 0") || change(&cluster, "replicate 1 1"));
    kill(extra, SIGKILL);
    waitpid(extra, NULL, 0);
    free(found);
    assert_int_equal(http_one(cluster.port, "POST", "/v1/completions", body, &found), 200);
    other = strstr(found, "\"text\"");
    assert_true(other != NULL && strncmp(one, other, strcspn(one, "}")) == 0);
    free(expected);
    free(found);
    assert_true(cluster_stop(&cluster));
    snprintf(text, sizeof text, "rm -r %s", folder);
    assert_int_equal(system(text), 0);
}

/* ---- many cycles ---- */

/* Its own memory. Rings in shared memory become resident as they are written around, up to their size, and are
 * counted as segments. */
static uint64_t resident_kib(pid_t pid) {
    char path[64], line[256];
    unsigned long long kib = 0;
    snprintf(path, sizeof path, "/proc/%d/status", (int)pid);
    FILE *file = fopen(path, "r");
    while (file != NULL && fgets(line, sizeof line, file) != NULL)
        sscanf(line, "RssAnon: %llu", &kib);
    if (file != NULL)
        fclose(file);
    return kib;
}

static uint32_t entries(const char *path, const char *part) {
    uint32_t count = 0;
    DIR *folder = opendir(path);
    for (struct dirent *entry; folder != NULL && (entry = readdir(folder)) != NULL;)
        count += strstr(entry->d_name, part) != NULL;
    if (folder != NULL)
        closedir(folder);
    return count;
}

static const char *const ROLES[] = {"coordinator", "gateway", "attention", "expert", "sampler"};
#define ROLES_COUNT (sizeof ROLES / sizeof *ROLES)

struct usage {
    uint64_t kib, supervisor_kib, role_kib[ROLES_COUNT];
    uint32_t files, segments, sockets, processes;
};

/* Of the supervisor and everything that it has started. */
static struct usage measure(const struct cluster *cluster) {
    struct usage usage = {.supervisor_kib = resident_kib(cluster->pid)};
    pid_t pid[64];
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/fd", (int)cluster->pid);
    usage.files = entries(path, "");
    usage.kib = usage.supervisor_kib;
    for (size_t i = 0; i < ROLES_COUNT; i++) {
        uint32_t count = cluster_pids(cluster, ROLES[i], pid, 64);
        for (uint32_t j = 0; j < count; j++) {
            snprintf(path, sizeof path, "/proc/%d/fd", (int)pid[j]);
            usage.files += entries(path, "");
            usage.role_kib[i] += resident_kib(pid[j]);
            snprintf(path, sizeof path, "-%d-", (int)pid[j]);
            usage.segments += entries("/dev/shm", path);
        }
        usage.kib += usage.role_kib[i];
        usage.processes += count;
    }
    usage.sockets = entries(cluster->run_dir, ".control") + entries(cluster->run_dir, ".data");
    return usage;
}

/* Actors that still hold an epoch before the newest one; -1: nobody answers. */
static int behind(const struct cluster *cluster, long long *ret_epoch) {
    static char text[1 << 18];
    if (!admin(cluster, "/status", text, sizeof text))
        return -1;
    json_t *status = json_loads(text, 0, NULL), *actor;
    *ret_epoch = json_integer_value(json_object_get(status, "epoch"));
    json_decref(status);
    if (!admin(cluster, "/actors", text, sizeof text))
        return -1;
    json_t *answer = json_loads(text, 0, NULL), *list = json_object_get(answer, "actors");
    int count = json_array_size(list) > 0 ? 0 : -1;
    size_t index;
    json_array_foreach(list, index, actor)
        count += json_integer_value(json_object_get(actor, "epoch")) != *ret_epoch;
    json_decref(answer);
    return count;
}

static void run_cycles(uint32_t cycles) {
    struct cluster cluster;
    char text[4096];
    assert_true(cluster_start(&cluster, MODEL, "--experts 2"));
    for (uint32_t i = 0; i < 5; i++) { /* memory that is kept for good is there by then */
        assert_true(change(&cluster, "scale experts 4"));
        assert_true(change(&cluster, "scale experts 2"));
        assert_int_equal(http_one(cluster.port, "POST", "/v1/completions",
                                  "{\"prompt\":\"once\",\"max_tokens\":8}", NULL), 200);
    }
    sleep(1);
    struct usage before = measure(&cluster);
    for (uint32_t i = 0; i < cycles; i++) {
        assert_true(change(&cluster, "scale experts 4"));
        if (i % 10 == 0)
            assert_true(change(&cluster, "scale attention 2") && change(&cluster, "scale samplers 2"));
        assert_int_equal(http_one(cluster.port, "POST", "/v1/completions",
                                  "{\"prompt\":\"once\",\"max_tokens\":8}", NULL), 200);
        if (i % 10 == 0)
            assert_true(change(&cluster, "scale attention 1") && change(&cluster, "scale samplers 1"));
        assert_true(change(&cluster, "scale experts 2"));
    }
    sleep(1);
    struct usage after = measure(&cluster);
    printf("%u cycles: processes %u -> %u, resident %llu -> %llu KiB, descriptors %u -> %u, shared memory %u -> %u, sockets %u -> %u\n",
           cycles, before.processes, after.processes, (unsigned long long)before.kib,
           (unsigned long long)after.kib, before.files, after.files, before.segments, after.segments, before.sockets, after.sockets);
    long long epoch = 0;
    int left = behind(&cluster, &epoch);
    printf("epoch %lld, held by all but %d\n", epoch, left);
    printf("resident KiB: supervisor %llu -> %llu", (unsigned long long)before.supervisor_kib,
           (unsigned long long)after.supervisor_kib);
    for (size_t i = 0; i < ROLES_COUNT; i++)
        printf(", %s %llu -> %llu", ROLES[i], (unsigned long long)before.role_kib[i],
               (unsigned long long)after.role_kib[i]);
    printf("\n");
    ctl(&cluster, "status", text, sizeof text);
    printf("%s", text);
    assert_int_equal(left, 0);
    assert_int_equal(before.processes, after.processes);
    assert_int_equal(before.segments, after.segments);
    assert_int_equal(before.sockets, after.sockets);
    assert_true(after.files <= before.files + 2);
    assert_true(after.kib <= before.kib + before.kib / 10);
    assert_true(cluster_stop(&cluster));
}

int main(int argc, char **argv) {
    if (argc == 3 && strcmp(argv[1], "soak") == 0) {
        uint32_t seconds = (uint32_t)atoi(argv[2]);
        run_elastic(10, seconds, true);
        return 0;
    }
    if (argc == 3 && strcmp(argv[1], "cycles") == 0) {
        run_cycles((uint32_t)atoi(argv[2]));
        return 0;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_growing_and_shrinking_changes_no_stream),
        cmocka_unit_test(test_what_makes_no_sense_is_refused),
        cmocka_unit_test(test_weights_come_from_other_processes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
