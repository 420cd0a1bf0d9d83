/* troupe sim --cluster: a day of a large troupe in seconds, with the coordinator that would run it. Exit status: 0; 1: it could not be
 * simulated, or the troupe did not serve; 2: wrong usage. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "actors/host/clock.h"
#include "actors/host/commands.h"
#include "actors/host/feed_journal.h"
#include "actors/host/files.h"
#include "simulator/cluster.h"

#define TRACE_BYTES_MAX   ((size_t)4 << 30)
#define CLUSTER_FILE_MAX  ((size_t)1 << 20)
#define FEED_MIN_NS       UINT64_C(250000000) /* as a gateway tells it */
#define FEED_SETS         2000u               /* of a longer run */

static const char *const POLICIES[] = {"none", "troupe", "eplb"};

static void log_line(void *context, uint64_t now_ns, const char *line) {
    fprintf(stderr, "%12.3f s  %s\n", (double)now_ns / 1e9, line);
}

static void record(void *context, uint64_t now_ns, bool keyframe, const void *events, size_t size) {
    struct feed_journal *journal = context;
    feed_journal_add(journal, now_ns / 1000000u, keyframe, events, size);
    feed_journal_settle(journal);
}

static int open_journal(struct cluster_task *task, struct feed_journal **ret,
                        const struct options *options, struct failure *failure) {
    if (options->journal == NULL)
        return 0;
    if (access(options->journal, F_OK) == 0)
        return fail(failure, ERR_STATE, "%s is there already: a simulated day goes into a new file",
                    options->journal);
    uint64_t bytes = (uint64_t)options->settings.journal_mib << 20;
    int error = feed_journal_open(ret, options->journal, bytes, failure);
    task->feed = record;
    task->feed_ns = task->span_ns / FEED_SETS > FEED_MIN_NS ? task->span_ns / FEED_SETS : FEED_MIN_NS;
    task->context = *ret;
    return error;
}

static void print_line(const char *name, const struct cluster_figures *its) {
    printf("%-8s  %.4f  %.4f  %.4f  %8" PRIu64 "  %9.1f  %6.3f %%  %9.3f  %6" PRIu64 "  %5" PRIu64
           "  %7" PRIu64 "\n",
           name, its->mean, its->worst, its->lowest, its->copies, (double)its->bytes / (1 << 30),
           100 * its->stall, its->unserved_s, its->epochs, its->operations, its->aborted);
}

static void print_text(const struct cluster_task *task, const struct cluster_report *report,
                       double seconds) {
    double window_h = (double)task->span_ns / 3600e9 / report->windows;
    printf("%u expert processes on %u hosts, %u attention; %u layers x %u experts; policy %s, "
           "rebalancing every %.0f s, %u spare slots per layer\n",
           task->processes, task->hosts, task->attention, task->trace->layers, task->trace->experts,
           POLICIES[task->policy],
           task->policy == CLUSTER_NONE ? 0 : task->settings.rebalance_interval_ms / 1e3,
           task->settings.rebalance_spare);
    printf("serving after %.1f s, %" PRIu64 " copies loaded until then\n\n", report->serving_after_s,
           report->first_copies);
    printf("          balancedness            copies loaded        stall     unserved\n"
           "from h    mean    worst   lowest     count        GiB   of time          s  epochs  "
           "oper.  aborted\n");
    for (uint32_t w = 0; w < report->windows; w++) {
        char name[16];
        snprintf(name, sizeof name, "%.2f", w * window_h);
        print_line(name, &report->window[w]);
    }
    print_line("all", &report->total);
    printf("\n%" PRIu64 " copies placed at the end; mean, worst: balancedness over layers and of the "
           "worst layer, mean over time; lowest: of any layer at any time\n"
           "%" PRIu64 " events, %" PRIu64 " messages, hash %016" PRIx64 ", %.1f s\n",
           report->total.placed, report->events, report->messages, report->hash, seconds);
}

static void print_json_figures(const struct cluster_figures *its) {
    printf("{\"mean\":%.9g,\"worst\":%.9g,\"lowest\":%.9g,\"copies\":%" PRIu64 ",\"bytes\":%" PRIu64
           ",\"stall\":%.9g,\"unserved_s\":%.9g,\"epochs\":%" PRIu64 ",\"operations\":%" PRIu64
           ",\"aborted\":%" PRIu64 ",\"placed\":%" PRIu64 "}",
           its->mean, its->worst, its->lowest, its->copies, its->bytes, its->stall, its->unserved_s,
           its->epochs, its->operations, its->aborted, its->placed);
}

static void print_json(const struct cluster_task *task, const struct cluster_report *report,
                       double seconds) {
    printf("{\"policy\":\"%s\",\"processes\":%u,\"hosts\":%u,\"span_s\":%.9g,\"seed\":%" PRIu64
           ",\"serving_after_s\":%.9g,\"first_copies\":%" PRIu64 ",\"events\":%" PRIu64
           ",\"messages\":%" PRIu64 ",\"hash\":\"%016" PRIx64 "\",\"seconds\":%.3f,\"total\":",
           POLICIES[task->policy], task->processes, task->hosts, (double)task->span_ns / 1e9,
           task->seed, report->serving_after_s, report->first_copies, report->events,
           report->messages, report->hash, seconds);
    print_json_figures(&report->total);
    printf(",\"windows\":[");
    for (uint32_t w = 0; w < report->windows; w++) {
        printf("%s", w > 0 ? "," : "");
        print_json_figures(&report->window[w]);
    }
    printf("]}\n");
}

static int read_files(const struct options *options, struct cluster_task *task,
                      struct load_trace *trace, struct failure *failure) {
    struct mapped file;
    struct failure why;
    int error = mapped_open_path(&file, options->cluster, CLUSTER_FILE_MAX, failure);
    if (error < 0)
        return error;
    error = cluster_parse(task, file.bytes, file.size, &why);
    mapped_close(&file);
    if (error < 0)
        return fail(failure, error, "%s: %s", options->cluster, why.text);
    error = mapped_open_path(&file, options->trace, TRACE_BYTES_MAX, failure);
    if (error < 0)
        return error;
    error = trace_read(trace, file.bytes, file.size, options->trace, failure);
    mapped_close(&file);
    return error;
}

int command_cluster(const struct options *options) {
    static struct cluster_task task;
    struct load_trace trace;
    struct cluster_report report;
    struct failure failure;
    if (options->trace == NULL) {
        fprintf(stderr, "troupe sim --cluster: expected --trace FILE, the loads\n");
        return 2;
    }
    int error = read_files(options, &task, &trace, &failure);
    if (error == 0) {
        task.trace = &trace;
        task.seed = options->seed;
        for (uint32_t i = 0; i < 3; i++)
            if (strcmp(options->policy, POLICIES[i]) == 0)
                task.policy = (enum cluster_policy)i;
        task.log = options->verbose ? log_line : NULL;
        struct feed_journal *journal = NULL;
        uint64_t start_ns = clock_now_ns();
        error = open_journal(&task, &journal, options, &failure);
        if (error == 0)
            error = cluster_run(&report, &task, &failure);
        if (journal != NULL && feed_journal_failed(journal, &failure))
            error = failure.code;
        feed_journal_close(&journal);
        double seconds = (double)(clock_now_ns() - start_ns) / 1e9;
        if (error == 0) {
            if (options->as_json)
                print_json(&task, &report, seconds);
            else
                print_text(&task, &report, seconds);
            cluster_report_free(&report);
        }
        trace_free(&trace);
    }
    if (error < 0) {
        fprintf(stderr, "troupe sim: %s\n", failure.text);
        return 1;
    }
    return 0;
}
