/* troupe plan: a placement from recorded loads, with its figures, without a running troupe. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "actors/host/clock.h"
#include "actors/host/commands.h"
#include "actors/host/files.h"
#include "coordinator/eplb.h"
#include "coordinator/planner.h"
#include "coordinator/trace.h"

#define TRACE_BYTES_MAX ((size_t)4 << 30)
#define GROUPS          8u /* of DeepSeek-V3 */
#define LOADING_BYTES_S 1e10
#define SLOWDOWN        0.1
#define ROW_NS          200.0
#define FIGURES_BYTES   1024

struct job {
    const struct options *options;
    struct load_trace trace;
    struct expert_plan previous, plan;
    bool has_previous;
    uint32_t windows; /* planned from */
    double *forecast;
    uint32_t capacity[ACTORS_MAX];
    double speed[ACTORS_MAX];
    struct planner_task task;
    struct planner_figures figures;
    double planning_ms;
};

/* "1,2.5,1" or one number for all; whole: whole numbers only. */
static int read_list(const char *option, const char *text, uint64_t count, bool whole, double *ret,
                     struct failure *failure) {
    uint64_t found = 0;
    for (const char *at = text; found < count; found++) {
        char *end;
        errno = 0;
        double number = whole ? (double)strtoul(at, &end, 10) : strtod(at, &end);
        if (end == at || errno != 0 || *at == '-' || (*end != 0 && *end != ',') ||
            !(number <= UINT32_MAX))
            return fail(failure, ERR_INVALID,
                        "--%s: expected numbers with commas between, found '%s'", option, at);
        ret[found] = number;
        if (*end == 0) {
            found++;
            break;
        }
        at = end + 1;
        if (found + 1 == count)
            found = count; /* one too many */
    }
    for (; found == 1 && count > 1; count--)
        ret[count - 1] = ret[0];
    if (found != count)
        return fail(failure, ERR_INVALID,
                    "--%s: expected one number for each of %llu processes, or one for all", option,
                    (unsigned long long)count);
    return 0;
}

static int read_lists(struct job *job, struct failure *failure) {
    const struct options *options = job->options;
    double list[ACTORS_MAX];
    int code = 0;
    if (options->capacity != NULL) {
        code = read_list("capacity", options->capacity, options->processes, true, list, failure);
        for (uint64_t p = 0; code == 0 && p < options->processes; p++)
            job->capacity[p] = (uint32_t)list[p];
        job->task.capacity = job->capacity;
    }
    if (code == 0 && options->speed != NULL) {
        code = read_list("speed", options->speed, options->processes, false, job->speed, failure);
        job->task.speed = job->speed;
    }
    return code;
}

static int read_files(struct job *job, struct failure *failure) {
    const struct options *options = job->options;
    struct mapped file;
    int code = mapped_open_path(&file, options->load, TRACE_BYTES_MAX, failure);
    if (code < 0)
        return code;
    code = trace_read(&job->trace, file.bytes, file.size, options->load, failure);
    mapped_close(&file);
    if (code < 0 || options->previous == NULL)
        return code;
    code = mapped_open_path(&file, options->previous, JSON_FILE_MAX, failure);
    if (code < 0)
        return code;
    code = plan_from_json(&job->previous, file.bytes, file.size, options->previous, failure);
    mapped_close(&file);
    job->has_previous = code == 0;
    return code;
}

static int forecast(struct job *job, struct failure *failure) {
    const struct load_trace *trace = &job->trace;
    uint64_t window = job->options->window;
    if (window > trace->windows)
        return fail(failure, ERR_INVALID,
                    "--window: expected 1 to %u, the windows of %s, found %llu", trace->windows,
                    job->options->load, (unsigned long long)window);
    job->windows = window > 0 ? (uint32_t)window : trace->windows;
    job->forecast = calloc((size_t)trace->layers * trace->experts, sizeof *job->forecast);
    if (job->forecast == NULL)
        return fail(failure, ERR_NO_MEMORY, "no memory for the forecast");
    for (uint32_t w = 0; w < job->windows; w++)
        forecast_observe(job->forecast, trace_window(trace, w), trace->layers, trace->experts);
    return 0;
}

/* The baseline fills the same figures as the planner, as far as it knows them. */
static int plan_by_eplb(struct job *job, struct failure *failure) {
    const struct planner_task *task = &job->task;
    if (task->capacity != NULL || task->speed != NULL)
        return fail(failure, ERR_UNSUPPORTED, "--policy eplb knows neither --capacity nor --speed");
    struct eplb_task eplb = {task->layers,
                             task->experts,
                             task->groups,
                             task->processes,
                             task->hosts,
                             task->experts + task->spare,
                             trace_window(&job->trace, job->windows - 1)};
    if (task->previous != NULL &&
        (task->previous->layers != task->layers || task->previous->experts != task->experts))
        return fail(failure, ERR_INVALID, "%s: expected a plan for %u layers x %u experts",
                    job->options->previous, task->layers, task->experts);
    int code = eplb_plan(&job->plan, &eplb, failure);
    if (code < 0)
        return code;
    job->figures.copies = plan_copies(&job->plan);
    job->figures.moved = plan_moved(task->previous, &job->plan);
    job->figures.bytes = job->figures.moved * task->price.expert_bytes;
    job->figures.proposed = true;
    return 0;
}

static int make_plan(struct job *job, struct failure *failure) {
    const struct options *options = job->options;
    struct planner_task *task = &job->task;
    task->layers = job->trace.layers;
    task->experts = job->trace.experts;
    task->groups = options->groups > 0 ? (uint32_t)options->groups
                                       : (task->experts % GROUPS == 0 ? GROUPS : 1);
    task->load = job->forecast;
    task->processes = (uint32_t)options->processes;
    task->hosts = (uint32_t)options->hosts;
    task->spare = (uint32_t)options->spare;
    task->hierarchical = options->hierarchical;
    task->previous = job->has_previous ? &job->previous : NULL;
    task->price = (struct planner_price){options->expert_bytes, LOADING_BYTES_S, SLOWDOWN, ROW_NS,
                                         (double)options->horizon};
    uint64_t start_ns = clock_now_ns();
    int code = strcmp(options->policy, "eplb") == 0
                   ? plan_by_eplb(job, failure)
                   : planner_plan(&job->plan, &job->figures, task, failure);
    job->planning_ms = (double)(clock_now_ns() - start_ns) / 1e6;
    return code;
}

static int score(const struct job *job, const struct expert_plan *plan, const double *load,
                 struct plan_summary *ret, struct failure *failure) {
    double *value = malloc((plan->layers + (size_t)plan->processes) * sizeof *value);
    if (value == NULL)
        return fail(failure, ERR_NO_MEMORY, "no memory for the figures");
    for (uint32_t l = 0; l < plan->layers; l++)
        value[l] = plan_balancedness(plan, l, load + (size_t)l * plan->experts, job->task.speed,
                                     value + plan->layers);
    *ret = plan_summarise(value, plan->layers);
    free(value);
    return 0;
}

static void print_placement(const struct expert_plan *plan) {
    for (uint32_t l = 0; l < plan->layers; l++) {
        printf("layer %u\n", l);
        for (uint32_t p = 0; p < plan->processes; p++) {
            printf("  process %-4u", p);
            for (uint32_t e = 0; e < plan->experts; e++) {
                size_t pair = (size_t)l * plan->experts + e;
                for (uint32_t i = plan->first[pair]; i < plan->first[pair + 1]; i++)
                    if (plan->holder[i] == p)
                        printf(" %u", e);
            }
            printf("\n");
        }
    }
}

static void print_summary(const char *name, const struct plan_summary *summary) {
    printf("%-28s worst %.4f  median %.4f  mean %.4f\n", name, summary->worst, summary->median,
           summary->mean);
}

static void print_text(const struct job *job, const struct plan_summary *expected,
                       const struct plan_summary *next) {
    const struct planner_figures *figures = &job->figures;
    print_placement(&job->plan);
    printf("\npolicy                       %s, from %u of %u windows\n", job->options->policy,
           job->windows, job->trace.windows);
    if (!figures->proposed)
        printf("proposal                     none: nothing that could be moved pays\n");
    if (job->has_previous && figures->before.mean > 0)
        print_summary("balancedness before", &figures->before);
    print_summary("balancedness, forecast", expected);
    if (next != NULL)
        print_summary("balancedness, next window", next);
    printf("copies                       %u, %u of them to load\n", figures->copies,
           figures->moved);
    printf("bytes moved                  %llu\n", (unsigned long long)figures->bytes);
    printf("loading                      %.3f s, stall %.3f ms, gain %.3f ms over %llu windows\n",
           figures->load_s, figures->stall_ns / 1e6, figures->gain_ns / 1e6,
           (unsigned long long)job->options->horizon);
    if (job->task.hierarchical)
        printf("rows served at home          %.1f %%\n", 100 * figures->home_share);
    printf("planning time                %.2f ms\n", job->planning_ms);
}

static int append_summary(char *text, size_t size, const char *name,
                          const struct plan_summary *summary) {
    return snprintf(text, size, "\"%s\":{\"worst\":%.9g,\"median\":%.9g,\"mean\":%.9g},", name,
                    summary->worst, summary->median, summary->mean);
}

static int print_json(const struct job *job, const struct plan_summary *expected,
                      const struct plan_summary *next, struct failure *failure) {
    const struct planner_figures *figures = &job->figures;
    char text[FIGURES_BYTES] = "{";
    size_t used = 1;
    used += (size_t)append_summary(text + used, sizeof text - used, "balancedness", expected);
    if (job->has_previous && figures->before.mean > 0)
        used += (size_t)append_summary(text + used, sizeof text - used, "balancedness_before",
                                       &figures->before);
    if (next != NULL)
        used += (size_t)append_summary(text + used, sizeof text - used, "balancedness_next", next);
    int rest = snprintf(
        text + used, sizeof text - used,
        "\"policy\":\"%s\",\"windows\":%u,\"proposed\":%s,\"copies\":%u,\"moved\":%u,"
        "\"bytes_moved\":%llu,\"load_s\":%.9g,\"stall_ms\":%.9g,\"gain_ms\":%.9g,"
        "\"home_share\":%.9g,\"planning_ms\":%.9g}",
        job->options->policy, job->windows, figures->proposed ? "true" : "false", figures->copies,
        figures->moved, (unsigned long long)figures->bytes, figures->load_s,
        figures->stall_ns / 1e6, figures->gain_ns / 1e6, figures->home_share, job->planning_ms);
    ASSERT(rest > 0 && used + (size_t)rest < sizeof text);
    char *json = plan_to_json(&job->plan, text);
    if (json == NULL)
        return fail(failure, ERR_NO_MEMORY, "no memory for the JSON text");
    printf("%s\n", json);
    free(json);
    return 0;
}

static int print(struct job *job, struct failure *failure) {
    struct plan_summary expected, next;
    bool has_next = job->windows < job->trace.windows;
    int code = score(job, &job->plan, job->forecast, &expected, failure);
    if (code == 0 && has_next)
        code = score(job, &job->plan, trace_window(&job->trace, job->windows), &next, failure);
    if (code == 0 && job->options->as_json)
        code = print_json(job, &expected, has_next ? &next : NULL, failure);
    else if (code == 0)
        print_text(job, &expected, has_next ? &next : NULL);
    return code;
}

int command_plan(const struct options *options) {
    struct failure failure;
    if (options->load == NULL || options->processes == 0) {
        fprintf(stderr,
                "troupe plan: expected --load FILE and --processes P; see troupe plan --help\n");
        return 2;
    }
    if (strcmp(options->policy, "none") == 0) {
        fprintf(stderr, "troupe plan: --policy: expected troupe or eplb, found 'none'\n");
        return 2;
    }
    static struct job job;
    job = (struct job){.options = options};
    int code = read_lists(&job, &failure);
    if (code == 0)
        code = read_files(&job, &failure);
    if (code == 0)
        code = forecast(&job, &failure);
    if (code == 0)
        code = make_plan(&job, &failure);
    if (code == 0)
        code = print(&job, &failure);
    plan_free(&job.plan);
    plan_free(&job.previous);
    trace_free(&job.trace);
    free(job.forecast);
    if (code < 0) {
        fprintf(stderr, "troupe plan: %s\n", failure.text);
        return 1;
    }
    return 0;
}
