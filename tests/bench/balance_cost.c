/* make bench-balance: what statistics and automatic rebalancing cost. Two troupes of the same model stay up, one with both, one with neither (no row is
 * counted, nothing is planned); rounds of streams go to one and to the other in turn, so that what disturbs the machine falls on both. Each
 * pair of rounds gives a ratio of tokens/s; their median is the figure, with the quartiles beside it. Processor time per token says the same
 * with less noise where the machine has other work. Spare slots are not part of it: what replicas cost on a machine where all
 * processes share few cores, and gain where they do not, is another question; ARGUMENTS can ask it.
 *
 * usage: balance_cost MODEL [PAIRS [STREAMS [ARGUMENTS]]], the last: of the troupe with both, in place of its usual ones */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tests/support/cluster.h"
#include "tests/support/http.h"

#define PAIRS_MAX   200u
#define STREAMS_MAX 64u
#define TOKENS      96u
#define PROMPT      24u /* tokens */

static const char *arguments[] = {
    "--experts 4 --threads 1 --load-statistics 0",
    "--experts 4 --threads 1 --rebalance-interval-ms 1000 --rebalance-threshold 0.9",
};

static void die(const char *what) {
    fprintf(stderr, "bench-balance: %s\n", what);
    exit(1);
}

/* Random tokens, the same for both troupes in one pair. */
static char *make_body(uint32_t seed) {
    char *text = NULL;
    size_t size;
    FILE *out = open_memstream(&text, &size);
    uint32_t state = seed * 2654435761u + 1;
    fprintf(out, "{\"prompt\":[");
    for (uint32_t i = 0; i < PROMPT; i++) {
        state = state * 1664525u + 1013904223u;
        fprintf(out, "%s%u", i > 0 ? "," : "", 300 + (state >> 8) % 3000);
    }
    fprintf(out, "],\"max_tokens\":%u,\"ignore_eos\":true,\"temperature\":0}", TOKENS);
    fclose(out);
    return text;
}

/* Tokens per second of one round. */
static double run_round(uint16_t port, uint32_t streams, uint32_t round) {
    struct http_call calls[STREAMS_MAX] = {0};
    char *body[STREAMS_MAX];
    uint64_t end_ns = 0;
    for (uint32_t i = 0; i < streams; i++) {
        body[i] = make_body(round * STREAMS_MAX + i);
        calls[i].method = "POST";
        calls[i].path = "/v1/completions";
        calls[i].body = body[i];
    }
    http_run(port, calls, streams, streams, 60000);
    for (uint32_t i = 0; i < streams; i++) {
        if (calls[i].status != 200)
            die("a request was not answered with 200");
        end_ns = calls[i].end_ns > end_ns ? calls[i].end_ns : end_ns;
        http_call_free(&calls[i]);
        free(body[i]);
    }
    return streams * TOKENS / ((double)end_ns / 1e9);
}

/* Processor time of all its processes so far, in seconds. */
static double processor_s(const struct cluster *cluster) {
    static const char *const roles[] = {"coordinator", "gateway", "attention", "expert", "sampler"};
    double ticks = 0;
    for (size_t r = 0; r < sizeof roles / sizeof roles[0]; r++) {
        pid_t pid[64];
        uint32_t count = cluster_pids(cluster, roles[r], pid, 64);
        for (uint32_t i = 0; i < count; i++) {
            char path[64];
            unsigned long user = 0, system = 0;
            snprintf(path, sizeof path, "/proc/%d/stat", (int)pid[i]);
            FILE *file = fopen(path, "r");
            if (file == NULL || fscanf(file, "%*d (%*[^)]) %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu",
                                       &user, &system) != 2)
                die("a process has ended");
            ticks += (double)(user + system);
            fclose(file);
        }
    }
    return ticks / (double)sysconf(_SC_CLK_TCK);
}

static int compare(const void *a, const void *b) {
    double left = *(const double *)a, right = *(const double *)b;
    return left < right ? -1 : left > right;
}

int main(int argc, char **argv) {
    static double ratio[PAIRS_MAX], rate[2][PAIRS_MAX], cpu[2];
    struct cluster cluster[2];
    uint32_t pairs = argc > 2 ? (uint32_t)strtoul(argv[2], NULL, 10) : 20;
    uint32_t streams = argc > 3 ? (uint32_t)strtoul(argv[3], NULL, 10) : 32;
    if (argc > 4)
        arguments[1] = argv[4];
    if (argc < 2 || pairs < 4 || pairs > PAIRS_MAX || streams < 1 || streams > STREAMS_MAX)
        die("usage: balance_cost MODEL [PAIRS [STREAMS]]");
    for (int i = 0; i < 2; i++) {
        if (!cluster_start(&cluster[i], argv[1], arguments[i]))
            die("a troupe did not start");
        run_round(cluster[i].port, streams, 0); /* warm, and rebalanced once */
    }
    for (uint32_t p = 0; p < pairs; p++) {
        for (uint32_t turn = 0; turn < 2; turn++) {
            uint32_t which = (turn + p) % 2; /* neither is always first */
            double before = processor_s(&cluster[which]);
            rate[which][p] = run_round(cluster[which].port, streams, p + 1);
            cpu[which] += processor_s(&cluster[which]) - before;
        }
        ratio[p] = rate[1][p] / rate[0][p];
    }
    double epoch = cluster_metric(&cluster[1], "troupe_actor_epoch");
    for (int i = 0; i < 2; i++)
        if (!cluster_stop(&cluster[i]))
            die("a troupe did not stop as it should");
    for (int i = 0; i < 2; i++)
        qsort(rate[i], pairs, sizeof rate[i][0], compare);
    qsort(ratio, pairs, sizeof *ratio, compare);
    printf("%u streams x %u tokens, %u pairs of rounds in turn\n", streams, TOKENS, pairs);
    printf("tokens/s, median: %.0f without, %.0f with statistics and automatic rebalancing (epoch %.0f)\n",
           rate[0][pairs / 2], rate[1][pairs / 2], epoch);
    printf("with / without, of each pair: median %.4f, quartiles %.4f to %.4f\n", ratio[pairs / 2],
           ratio[pairs / 4], ratio[3 * pairs / 4]);
    double tokens = (double)pairs * streams * TOKENS;
    printf("processor time per token: %.1f us without, %.1f us with: %.4f times as much\n",
           1e6 * cpu[0] / tokens, 1e6 * cpu[1] / tokens, cpu[1] / cpu[0]);
    return 0;
}
