/* See bench_report.h. Of the runs of a figure the one with the median rate speaks for it, with its
 * own counters. */
#include "actors/host/bench_report.h"

#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const enum role roles[] = {ROLE_ATTENTION, ROLE_EXPERT, ROLE_SAMPLER, ROLE_GATEWAY,
                                  ROLE_COORDINATOR};
#define ROLES (sizeof roles / sizeof roles[0])

int bench_compare_doubles(const void *a, const void *b) {
    double left = *(const double *)a, right = *(const double *)b;
    return left < right ? -1 : left > right;
}

static int compare_samples(const void *a, const void *b) {
    const struct bench_sample *left = *(const struct bench_sample *const *)a,
                              *right = *(const struct bench_sample *const *)b;
    return left->rate < right->rate ? -1 : left->rate > right->rate;
}

/* Of an even number of runs the lower middle one. NULL: no run. */
static const struct bench_sample *sample_at(const struct bench_figure *figure, double quantile) {
    const struct bench_sample *sorted[BENCH_RUNS_MAX];
    for (uint32_t i = 0; i < figure->samples; i++)
        sorted[i] = &figure->sample[i];
    qsort(sorted, figure->samples, sizeof(void *), compare_samples);
    return figure->samples > 0 ? sorted[(size_t)(quantile * (figure->samples - 1))] : NULL;
}

double bench_median_rate(const struct bench_figure *figure) {
    const struct bench_sample *sample = sample_at(figure, 0.5);
    return sample != NULL ? sample->rate : 0;
}

/* The share of what binds this kind of work: bytes of weights for decode, operations for prefill.
 */
static double limit_share(const struct bench_report *report, const struct bench_figure *figure,
                          double rate) {
    if (figure->kind == FIGURE_DECODE && report->limits.stream_bytes_per_s > 0)
        return rate / figure->clipped * cost_step_bytes(&report->cost, figure->clipped) /
               report->limits.stream_bytes_per_s;
    if (figure->kind == FIGURE_PREFILL && report->limits.peak_flops > 0)
        return rate * report->cost.token_flops / report->limits.peak_flops;
    return 0;
}

/* Share of the machine's processor time that went to neither the troupe nor this client. */
static double others_share(const struct bench_sample *sample) {
    const struct bench_usage *used = &sample->used;
    double all = used->machine_busy_s + used->machine_idle_s;
    double others = used->machine_busy_s - used->role[ROLE_NONE].cpu_s - used->client_cpu_s;
    return all > 0 && others > 0 ? others / all : 0;
}

/* ---- the table ---- */

static void print_figure(const struct bench_report *report, const struct bench_figure *figure) {
    const struct bench_sample *sample = sample_at(figure, 0.5);
    if (sample == NULL) {
        printf("%-13s no run ended\n", figure->name);
        return;
    }
    char range[32];
    snprintf(range, sizeof range, "%.0f-%.0f", sample_at(figure, 0)->rate,
             sample_at(figure, 1)->rate);
    double share = limit_share(report, figure, sample->rate);
    printf("%-13s %9.1f %13s %6.1f%% |", figure->name, sample->rate, range, 100 * share);
    for (size_t r = 0; r < ROLES; r++)
        printf(" %6.0f", 1e6 * sample->used.role[roles[r]].cpu_s / sample->tokens);
    printf(" %6.0f | %7.2f %7.2f %6.0f%%\n", 1e6 * sample->used.client_cpu_s / sample->tokens,
           (double)sample->used.role[ROLE_NONE].sleeps / sample->tokens,
           (double)sample->used.role[ROLE_NONE].preempted / sample->tokens,
           100 * others_share(sample));
}

static void print_prefix(const struct bench_figure *figure) {
    const struct bench_sample *sample = sample_at(figure, 0.5);
    if (sample != NULL)
        printf("  TTFT of the first request %.2f ms, of one with the same prefix %.2f ms: %.1f times shorter\n",
               1e3 * sample->first_s, 1e3 * sample->second_s, sample->first_s / sample->second_s);
}

static void print_spread(const char *name, const struct bench_spread *spread) {
    printf("  %-6s p50 %8.1f ms   p90 %8.1f ms   p99 %8.1f ms\n", name, 1e3 * spread->p50,
           1e3 * spread->p90, 1e3 * spread->p99);
}

void bench_print(const struct bench_report *report) {
    const struct options *options = report->options;
    printf("model %s, %s, %llu attention, %llu expert, %llu sampler processes; ready after %.2f s, "
           "%.0f MB resident\n",
           options->model, options->numerics, (unsigned long long)options->attention,
           (unsigned long long)options->experts, (unsigned long long)options->samplers,
           report->ready_s, (double)report->resident_bytes / 1e6);
    printf("machine: %d processors, memory %.1f GB/s, %s %.0f GFLOP/s\n", report->limits.threads,
           report->limits.stream_bytes_per_s / 1e9, report->limits.peak_name,
           report->limits.peak_flops / 1e9);
    printf("%-13s %9s %13s %7s | %s | %s\n", "", "tokens/s", "of all runs", "limit",
           "processor us a token: att, exp, samp, gw, coord, bench",
           "sleeps, preempted a token, others");
    for (uint32_t i = 0; i < report->figures; i++) {
        const struct bench_figure *figure = &report->figure[i];
        print_figure(report, figure);
        if (figure->kind == FIGURE_PREFIX)
            print_prefix(figure);
        if (figure->kind != FIGURE_LOAD)
            continue;
        printf("  %u requests offered at %.1f/s, %u failed; goodput %.1f/s\n", figure->requests,
               figure->offered_per_s, figure->failed, figure->good_per_s);
        print_spread("TTFT", &figure->ttft);
        print_spread("TPOT", &figure->tpot);
        print_spread("total", &figure->total);
    }
}

/* ---- JSON ---- */

static void put_usage(json_t *out, const struct bench_sample *sample) {
    json_t *cpu = json_object();
    for (size_t r = 0; r < ROLES; r++)
        json_object_set_new(cpu, role_name(roles[r]),
                            json_real(1e6 * sample->used.role[roles[r]].cpu_s / sample->tokens));
    json_object_set_new(cpu, "client", json_real(1e6 * sample->used.client_cpu_s / sample->tokens));
    json_object_set_new(out, "cpu_us_per_token", cpu);
    const struct bench_usage *used = &sample->used;
    json_object_set_new(out, "sleeps_per_token",
                        json_real((double)used->role[ROLE_NONE].sleeps / sample->tokens));
    json_object_set_new(out, "preempted_per_token",
                        json_real((double)used->role[ROLE_NONE].preempted / sample->tokens));
    json_object_set_new(out, "queued_us_per_token",
                        json_real(1e6 * used->role[ROLE_NONE].queued_s / sample->tokens));
    json_object_set_new(out, "others_share", json_real(others_share(sample)));
}

static json_t *spread_json(const struct bench_spread *spread) {
    return json_pack("{s:f,s:f,s:f}", "p50", spread->p50, "p90", spread->p90, "p99", spread->p99);
}

static json_t *figure_json(const struct bench_report *report, const struct bench_figure *figure) {
    json_t *out = json_object(), *runs = json_array();
    for (uint32_t i = 0; i < figure->samples; i++)
        json_array_append_new(runs, json_real(figure->sample[i].rate));
    json_object_set_new(out, "size", json_integer(figure->clipped));
    json_object_set_new(out, "runs", runs);
    const struct bench_sample *sample = sample_at(figure, 0.5);
    if (sample != NULL) {
        json_object_set_new(out, "tokens_per_s", json_real(sample->rate));
        json_object_set_new(out, "limit_share",
                            json_real(limit_share(report, figure, sample->rate)));
        put_usage(out, sample);
    }
    if (figure->kind == FIGURE_PREFIX && sample != NULL) {
        json_object_set_new(out, "ttft_first_s", json_real(sample->first_s));
        json_object_set_new(out, "ttft_second_s", json_real(sample->second_s));
    }
    if (figure->kind == FIGURE_LOAD) {
        json_object_set_new(out, "requests", json_integer(figure->requests));
        json_object_set_new(out, "failed", json_integer(figure->failed));
        json_object_set_new(out, "offered_per_s", json_real(figure->offered_per_s));
        json_object_set_new(out, "goodput_per_s", json_real(figure->good_per_s));
        json_object_set_new(out, "ttft_s", spread_json(&figure->ttft));
        json_object_set_new(out, "tpot_s", spread_json(&figure->tpot));
        json_object_set_new(out, "total_s", spread_json(&figure->total));
    }
    return out;
}

int bench_write_json(const struct bench_report *report, const char *path, struct failure *failure) {
    const struct options *options = report->options;
    json_t *figures = json_object();
    for (uint32_t i = 0; i < report->figures; i++)
        json_object_set_new(figures, report->figure[i].name,
                            figure_json(report, &report->figure[i]));
    json_t *out = json_pack(
        "{s:s,s:s,s:{s:I,s:I,s:I},s:{s:i,s:f,s:f,s:s},s:f,s:I,s:o}", "model", options->model,
        "numerics", options->numerics, "processes", "attention", (json_int_t)options->attention,
        "experts", (json_int_t)options->experts, "samplers", (json_int_t)options->samplers,
        "machine", "processors", report->limits.threads, "stream_bytes_per_s",
        report->limits.stream_bytes_per_s, "peak_flops", report->limits.peak_flops, "peak_of",
        report->limits.peak_name, "ready_s", report->ready_s, "resident_bytes",
        (json_int_t)report->resident_bytes, "figures", figures);
    ASSERT(out != NULL);
    bool to_stdout = strcmp(path, "-") == 0;
    FILE *file = to_stdout ? stdout : fopen(path, "we");
    int error =
        file == NULL ? fail(failure, ERR_IO, "cannot write %s: %s", path, strerror(errno)) : 0;
    if (error == 0 && (json_dumpf(out, file, JSON_INDENT(1)) != 0 || fputc('\n', file) == EOF))
        error = fail(failure, ERR_IO, "cannot write %s", path);
    if (file != NULL && !to_stdout && fclose(file) != 0 && error == 0)
        error = fail(failure, ERR_IO, "cannot write %s: %s", path, strerror(errno));
    json_decref(out);
    return error;
}
