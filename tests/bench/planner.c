/* make bench-planner: the planner against EPLB on recorded loads. Each plan is made from the
 * windows up to t and scored on window t + 1, which it has not seen, with the rows of an expert
 * shared evenly among its copies. Under each shape stands whether what is promised is met: at
 * least EPLB's balancedness in the mean and in the worst layer, at most a quarter of the copies
 * moved, the largest shape planned in time. usage: planner TRACE...; status 1: a promise is not
 * kept. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "actors/host/files.h"
#include "coordinator/eplb.h"
#include "coordinator/planner.h"
#include "coordinator/trace.h"

#define TRACE_BYTES_MAX ((size_t)1 << 30)
#define GROUPS          8

#define MOVED_MAX      0.25
#define LARGE          320u /* processes: planned within LARGE_MS */
#define LARGE_MS       20.0

/* What one copy costs: this share of the rows of its layer in a window, paid once a window. */
#define COPY_SHARE 1e-5

static const struct shape {
    uint32_t processes, slots, hosts;
} shapes[] = {{32, 288, 4}, {64, 320, 8}, {32, 256, 4}, {320, 320, 40}};

enum policy { TROUPE, EPLB_GLOBAL, EPLB_HIERARCHICAL };
static const char *const policy_name[] = {"troupe", "EPLB global", "EPLB hierarchical"};

struct score {
    double mean, worst_layer,
        worst;    /* of layers and windows; mean over windows of the worst layer; of all */
    double moved; /* copies per window, of the copies held */
    double median_ms, least_ms;
};

static int make_plan(struct expert_plan *ret, enum policy policy, const struct shape *shape,
                     const struct load_trace *trace, const double *forecast, uint32_t window,
                     const struct expert_plan *previous, struct failure *failure) {
    uint32_t groups = trace->experts % GROUPS == 0 ? GROUPS : 1;
    if (policy != TROUPE) {
        struct eplb_task task = {trace->layers,
                                 trace->experts,
                                 groups,
                                 shape->processes,
                                 policy == EPLB_GLOBAL ? 1 : shape->hosts,
                                 shape->slots,
                                 trace_window(trace, window)};
        return eplb_plan(ret, &task, failure);
    }
    double rows = 0;
    for (uint32_t e = 0; e < trace->experts; e++)
        rows += forecast[e];
    struct planner_task task = {
        .layers = trace->layers,
        .experts = trace->experts,
        .load = forecast,
        .processes = shape->processes,
        .hosts = shape->hosts,
        .spare = shape->slots - trace->experts,
        .previous = previous,
        /* A copy costs one row, and a plan lasts as long as it takes to make that COPY_SHARE of a
           window's. */
        .price = {.expert_bytes = 1,
                  .bytes_per_second = 1,
                  .slowdown = 1,
                  .row_ns = 1e9,
                  .horizon = rows > 0 ? 1 / (COPY_SHARE * rows) : 0},
    };
    struct planner_figures figures;
    return planner_plan(ret, &figures, &task, failure);
}

static void score_window(struct score *score, const struct expert_plan *plan,
                         const struct load_trace *trace, uint32_t window, double *scratch) {
    const double *load = trace_window(trace, window);
    double worst = 1, windows = trace->windows - 1;
    for (uint32_t l = 0; l < trace->layers; l++) {
        double balance =
            plan_balancedness(plan, l, load + (size_t)l * trace->experts, NULL, scratch);
        score->mean += balance / trace->layers / windows;
        worst = balance < worst ? balance : worst;
    }
    score->worst_layer += worst / windows;
    score->worst = worst < score->worst ? worst : score->worst;
}

static int run(struct score *ret, enum policy policy, const struct shape *shape,
               const struct load_trace *trace, struct failure *failure) {
    size_t pairs = (size_t)trace->layers * trace->experts;
    double *forecast = calloc(pairs, sizeof *forecast);
    double *scratch = malloc(shape->processes * sizeof *scratch);
    double *ms = malloc(trace->windows * sizeof *ms);
    struct expert_plan previous = {0};
    struct score score = {.worst = 1};
    int code = forecast == NULL || scratch == NULL || ms == NULL
                   ? fail(failure, ERR_NO_MEMORY, "no memory for %zu loads", pairs)
                   : 0;
    for (uint32_t t = 0; code == 0 && t + 1 < trace->windows; t++) {
        struct expert_plan plan;
        clock_t start = clock(); /* processor time: other work on the machine does not count */
        forecast_observe(forecast, trace_window(trace, t), trace->layers, trace->experts);
        code =
            make_plan(&plan, policy, shape, trace, forecast, t, t > 0 ? &previous : NULL, failure);
        if (code < 0)
            break;
        ms[t] = (double)(clock() - start) * 1e3 / CLOCKS_PER_SEC;
        if (t > 0)
            score.moved +=
                (double)plan_moved(&previous, &plan) / plan_copies(&plan) / (trace->windows - 2);
        score_window(&score, &plan, trace, t + 1, scratch);
        plan_free(&previous);
        previous = plan;
    }
    if (code == 0) {
        struct plan_summary times = plan_summarise(ms, trace->windows - 1);
        score.median_ms = times.median;
        score.least_ms = times.worst; /* the smallest */
        *ret = score;
    }
    plan_free(&previous);
    free(forecast);
    free(scratch);
    free(ms);
    return code;
}

static bool promise(bool kept, const char *what, double ours, double bound) {
    printf("  %s: %s %.5g, bound %.5g\n", kept ? "kept    " : "NOT KEPT", what, ours, bound);
    return kept;
}

/* Ours against both baselines; false: something is not as promised. */
static bool judge(const struct shape *shape, const struct score *ours, const struct score *eplb) {
    double mean = eplb[0].mean > eplb[1].mean ? eplb[0].mean : eplb[1].mean;
    double worst = eplb[0].worst_layer > eplb[1].worst_layer ? eplb[0].worst_layer
                                                              : eplb[1].worst_layer;
    bool kept = promise(ours->mean >= mean, "mean at least EPLB's", ours->mean, mean);
    kept &= promise(ours->worst_layer >= worst, "worst layer at least EPLB's", ours->worst_layer,
                    worst);
    kept &= promise(ours->moved <= MOVED_MAX, "copies moved at most", ours->moved, MOVED_MAX);
    if (shape->processes >= LARGE)
        kept &= promise(ours->median_ms <= LARGE_MS, "median planning ms at most",
                        ours->median_ms, LARGE_MS);
    return kept;
}

static int compare_on_shape(const struct shape *shape, const struct load_trace *trace, bool *kept,
                            struct failure *failure) {
    struct score score[EPLB_HIERARCHICAL + 1] = {0};
    for (enum policy policy = TROUPE; policy <= EPLB_HIERARCHICAL; policy++) {
        struct score *its = &score[policy];
        int code = run(its, policy, shape, trace, failure);
        if (code < 0)
            return code;
        printf("  %9u %5u %5u  %-17s  %.4f  %.5f      %.4f  %5.1f %%  %13.2f  %5.2f\n",
               shape->processes, shape->slots, shape->hosts, policy_name[policy], its->mean,
               its->worst_layer, its->worst, 100 * its->moved, its->median_ms, its->least_ms);
    }
    *kept &= judge(shape, &score[TROUPE], &score[EPLB_GLOBAL]);
    return 0;
}

static int compare_on_trace(const char *path, const struct load_trace *trace, bool *kept,
                            struct failure *failure) {
    printf("%s: %u windows, %u layers x %u experts\n", path, trace->windows, trace->layers,
           trace->experts);
    printf("  processes slots hosts  policy             mean   worst layer  worst    moved   "
           "CPU ms: median  least\n");
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        if (shapes[i].processes > trace->experts * 4)
            continue; /* a small model on a large cluster says nothing */
        int code = compare_on_shape(&shapes[i], trace, kept, failure);
        if (code < 0)
            return code;
    }
    return 0;
}

int main(int argc, char **argv) {
    bool kept = true;
    for (int i = 1; i < argc; i++) {
        struct failure failure;
        struct mapped file;
        struct load_trace trace;
        int code = mapped_open_path(&file, argv[i], TRACE_BYTES_MAX, &failure);
        if (code == 0) {
            code = trace_read(&trace, file.bytes, file.size, argv[i], &failure);
            mapped_close(&file);
        }
        if (code == 0) {
            code = compare_on_trace(argv[i], &trace, &kept, &failure);
            trace_free(&trace);
        }
        if (code < 0) {
            fprintf(stderr, "bench-planner: %s\n", failure.text);
            return 1;
        }
    }
    printf(kept ? "all promises kept\n" : "NOT all promises kept\n");
    return kept ? 0 : 1;
}
