/* What `troupe bench` has measured, as a table for people and as JSON. */
#ifndef TROUPE_HOST_BENCH_REPORT_H
#define TROUPE_HOST_BENCH_REPORT_H

#include "actors/host/bench_server.h"
#include "bench/cost.h"
#include "bench/limits.h"

#define BENCH_RUNS_MAX 101

enum figure_kind { FIGURE_DECODE, FIGURE_PREFILL, FIGURE_PREFIX, FIGURE_LOAD };

/* One run of one figure. */
struct bench_sample {
    double rate; /* tokens/s */
    double tokens;
    double seconds;
    double first_s, second_s; /* FIGURE_PREFIX: TTFT of the first request with a prefix, and of the next */
    struct bench_usage used; /* differences over the run */
};

/* A distribution, in seconds. */
struct bench_spread {
    double p50, p90, p99;
};

struct bench_figure {
    char name[32];
    enum figure_kind kind;
    uint32_t size;    /* streams or prompt tokens */
    uint32_t clipped; /* what the context allows of it */
    struct bench_sample sample[BENCH_RUNS_MAX];
    uint32_t samples;
    /* FIGURE_LOAD, all runs together */
    uint32_t requests, failed, good;
    double offered_per_s, good_per_s;
    struct bench_spread ttft, tpot, total;
};

struct bench_report {
    const struct options *options;
    struct machine_limits limits;
    struct model_cost cost;
    uint64_t resident_bytes; /* of all processes, at the end */
    double ready_s;          /* from start to /ready */
    const struct bench_figure *figure;
    uint32_t figures;
};

double bench_median_rate(const struct bench_figure *figure);
int bench_compare_doubles(const void *a, const void *b);
void bench_print(const struct bench_report *report);
int bench_write_json(const struct bench_report *report, const char *path, struct failure *failure);

#endif
