/* troupe bench: how fast is it, on this machine, with this model, through HTTP as a client sees it?
 *
 *   decode-N     N streams at once, each its own random prompt; tokens/s of all together while all
 * of them generate prefill-N    one prompt of N tokens and one token of answer; prompt tokens/s
 * until that token arrives prefix-N     two prompts one after the other that begin with the same N
 * tokens; N / TTFT of the second, and both TTFTs load         requests of mixed lengths arriving at
 * random (Poisson); TTFT, TPOT and goodput
 *
 * Figures take turns, run by run, so that what disturbs the machine meanwhile falls on all of them;
 * medians are shown, beside the machine's own limits and the processor time, sleeps and preemptions
 * that the troupe's processes counted meanwhile. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "actors/host/bench_client.h"
#include "actors/host/bench_report.h"
#include "actors/host/clock.h"
#include "actors/host/commands.h"
#include "actors/host/files.h"
#include "actors/host/huge_pages.h"
#include "actors/host/pool.h"

#define FIGURES_MAX 32
#define DEFAULT_PLAN                                                                               \
    "decode-1,decode-2,decode-4,decode-8,decode-16,decode-32,prefill-128,prefill-512,prefill-"     \
    "2048,prefix-512,load"
#define DECODE_PROMPT   32
#define DECODE_TOKENS   128
#define PREFIX_TAIL     16 /* own tokens behind a shared prefix */
#define CALL_TIMEOUT_NS 300000000000u
#define LOAD_REQUESTS   60 /* of one run */
#define GOOD_TTFT_S     0.5
#define GOOD_TPOT_S     0.05

struct bench {
    const struct options *options;
    struct bench_server server;
    struct bench_target target;
    char host[128];
    uint32_t context;
    uint64_t seed;
    struct bench_report report;
    struct bench_figure figure[FIGURES_MAX];
    uint32_t figures;
    double load_base_rate;       /* tokens/s of 8 streams: what the load is scaled by */
    double *ttft, *tpot, *total; /* of all load requests */
    uint32_t load_requests;
    double load_seconds;
};

/* ---- the plan ---- */

static int add_figure(struct bench *self, const char *name, struct failure *failure) {
    struct bench_figure figure = {.kind = FIGURE_LOAD};
    unsigned size = 0;
    char rest;
    if (sscanf(name, "decode-%u%c", &size, &rest) == 1)
        figure.kind = FIGURE_DECODE;
    else if (sscanf(name, "prefill-%u%c", &size, &rest) == 1)
        figure.kind = FIGURE_PREFILL;
    else if (sscanf(name, "prefix-%u%c", &size, &rest) == 1)
        figure.kind = FIGURE_PREFIX;
    else if (strcmp(name, "load") != 0)
        return fail(failure, ERR_INVALID,
                    "--figures: expected decode-N, prefill-N, prefix-N or load, found '%s'", name);
    if (figure.kind != FIGURE_LOAD && (size == 0 || size > CONTEXT_MAX))
        return fail(failure, ERR_INVALID, "--figures: '%s' is out of range", name);
    if (self->figures == FIGURES_MAX)
        return fail(failure, ERR_TOO_LARGE, "--figures: over %d figures", FIGURES_MAX);
    snprintf(figure.name, sizeof figure.name, "%s", name);
    figure.size = figure.clipped = size;
    if (figure.kind == FIGURE_PREFILL && size > self->context - 1)
        figure.clipped = self->context - 1;
    if (figure.kind == FIGURE_PREFIX && size > self->context - 1 - PREFIX_TAIL)
        figure.clipped = self->context - 1 - PREFIX_TAIL;
    self->figure[self->figures++] = figure;
    return 0;
}

static int make_plan(struct bench *self, const char *list, struct failure *failure) {
    char *copy = strdup(list), *save = NULL;
    int error = 0;
    for (char *name = strtok_r(copy, ",", &save); name != NULL && error == 0;
         name = strtok_r(NULL, ",", &save))
        error = add_figure(self, name, failure);
    free(copy);
    return error;
}

/* ---- one run ---- */

static void usage_difference(const struct bench_usage *from, const struct bench_usage *to,
                             struct bench_usage *ret) {
    *ret = *to;
    for (int role = 0; role <= ROLE_CONTROL; role++) {
        ret->role[role].cpu_s -= from->role[role].cpu_s;
        ret->role[role].queued_s -= from->role[role].queued_s;
        ret->role[role].sleeps -= from->role[role].sleeps;
        ret->role[role].preempted -= from->role[role].preempted;
    }
    ret->client_cpu_s -= from->client_cpu_s;
    ret->machine_busy_s -= from->machine_busy_s;
    ret->machine_idle_s -= from->machine_idle_s;
}

static int run_calls(struct bench *self, struct bench_call *calls, uint32_t count,
                     struct bench_sample *ret, struct failure *failure) {
    struct bench_usage before, after;
    bench_usage_read(&self->server, &before);
    int error = bench_calls_run(&self->target, calls, count, CALL_TIMEOUT_NS, failure);
    bench_usage_read(&self->server, &after);
    usage_difference(&before, &after, &ret->used);
    ret->seconds = (double)(after.now_ns - before.now_ns) / 1e9;
    return error;
}

static int check_call(const struct bench_call *call, struct failure *failure) {
    if (call->done && call->status == 200 && call->events > 0)
        return 0;
    return fail(failure, ERR_STATE, "a request was answered with status %d%s", call->status,
                call->done ? "" : " and did not end");
}

/* Tokens/s in the window in which every stream generates. Pieces of text stand for tokens / pieces
 * tokens each. */
static double window_rate(const struct bench_call *calls, uint32_t count) {
    uint64_t begin = 0, end = UINT64_MAX;
    for (uint32_t i = 0; i < count; i++) {
        uint64_t first = calls[i].event_ns[0], last = calls[i].event_ns[calls[i].events - 1];
        begin = first > begin ? first : begin;
        end = last < end ? last : end;
    }
    double tokens = 0;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t inside = 0;
        for (uint32_t e = 0; e < calls[i].events; e++)
            inside += calls[i].event_ns[e] > begin && calls[i].event_ns[e] <= end;
        tokens += (double)inside * calls[i].max_tokens / calls[i].events;
    }
    return end > begin ? tokens / ((double)(end - begin) / 1e9) : 0;
}

static int run_decode(struct bench *self, uint32_t streams, struct bench_sample *ret,
                      struct failure *failure) {
    struct bench_call *calls = calloc(streams, sizeof *calls);
    ASSERT(calls != NULL);
    uint32_t prompt = self->context / 4 < DECODE_PROMPT ? self->context / 4 : DECODE_PROMPT;
    uint32_t tokens =
        self->context - prompt < DECODE_TOKENS ? self->context - prompt : DECODE_TOKENS;
    for (uint32_t i = 0; i < streams; i++)
        calls[i] = (struct bench_call){
            .prompt_tokens = prompt, .max_tokens = tokens, .seed = ++self->seed};
    int error = run_calls(self, calls, streams, ret, failure);
    for (uint32_t i = 0; i < streams && error == 0; i++)
        error = check_call(&calls[i], failure);
    if (error == 0) {
        ret->rate = window_rate(calls, streams);
        ret->tokens = (double)streams * tokens;
    }
    bench_calls_free(calls, streams);
    free(calls);
    return error;
}

static int run_prefill(struct bench *self, uint32_t tokens, struct bench_sample *ret,
                       struct failure *failure) {
    struct bench_call call = {.prompt_tokens = tokens, .max_tokens = 1, .seed = ++self->seed};
    int error = run_calls(self, &call, 1, ret, failure);
    if (error == 0)
        error = check_call(&call, failure);
    if (error == 0) {
        ret->rate = tokens / ((double)(call.event_ns[0] - call.start_ns) / 1e9);
        ret->tokens = tokens;
    }
    bench_calls_free(&call, 1);
    return error;
}

static int run_prefix(struct bench *self, uint32_t tokens, struct bench_sample *ret,
                      struct failure *failure) {
    uint64_t prefix = ++self->seed;
    double ttft[2] = {0};
    int error = 0;
    for (int i = 0; i < 2 && error == 0; i++) {
        struct bench_call call = {.prompt_tokens = tokens + PREFIX_TAIL,
                                  .max_tokens = 1,
                                  .seed = ++self->seed,
                                  .shared_tokens = tokens,
                                  .shared_seed = prefix};
        error = run_calls(self, &call, 1, ret, failure);
        if (error == 0)
            error = check_call(&call, failure);
        if (error == 0)
            ttft[i] = (double)(call.event_ns[0] - call.start_ns) / 1e9;
        bench_calls_free(&call, 1);
    }
    if (error < 0)
        return error;
    ret->tokens = tokens + PREFIX_TAIL;
    ret->rate = ret->tokens / ttft[1];
    ret->first_s = ttft[0];
    ret->second_s = ttft[1];
    return 0;
}

/* ---- load ---- */

/* Uniform in [0, 1), from a seed: xorshift64*. */
static double next_uniform(uint64_t *state) {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return (double)((*state * 0x2545f4914f6cdd1du) >> 11) / 9007199254740992.0;
}

/* Mean of the answers' lengths below: how many requests/s a rate of tokens/s is. */
static const uint32_t load_prompt[] = {16, 64, 256}, load_answer[] = {16, 64, 128};
#define LOAD_ANSWER_MEAN ((16 + 64 + 128) / 3.0)

static void take_load(struct bench *self, struct bench_figure *figure,
                      const struct bench_call *call, uint64_t begin_ns) {
    figure->requests++;
    if (!call->done || call->status != 200 || call->events == 0) {
        figure->failed++;
        return;
    }
    uint64_t due =
        begin_ns + call->start_after_ns; /* a late client counts against the server too */
    double ttft = (double)(call->event_ns[0] - due) / 1e9;
    double total = (double)(call->event_ns[call->events - 1] - due) / 1e9;
    double tpot = (total - ttft) / (call->max_tokens - 1);
    figure->good += ttft <= GOOD_TTFT_S && tpot <= GOOD_TPOT_S;
    self->ttft[self->load_requests] = ttft;
    self->tpot[self->load_requests] = tpot;
    self->total[self->load_requests++] = total;
}

static int run_load(struct bench *self, struct bench_figure *figure, struct bench_sample *ret,
                    struct failure *failure) {
    struct bench_call *calls = calloc(LOAD_REQUESTS, sizeof *calls);
    ASSERT(calls != NULL);
    double rate = self->options->rate > 0 ? self->options->rate
                                          : 0.5 * self->load_base_rate / LOAD_ANSWER_MEAN;
    uint64_t random = 0x9e3779b97f4a7c15u + self->seed, tokens = 0;
    double at = 0;
    for (uint32_t i = 0; i < LOAD_REQUESTS; i++) {
        uint32_t prompt = load_prompt[(int)(3 * next_uniform(&random))];
        uint32_t answer = load_answer[(int)(3 * next_uniform(&random))];
        prompt = prompt < self->context / 2 ? prompt : self->context / 2;
        answer = answer < self->context / 2 ? answer : self->context / 2;
        at += -log(1 - next_uniform(&random)) / rate;
        calls[i] = (struct bench_call){.start_after_ns = (uint64_t)(at * 1e9),
                                       .prompt_tokens = prompt,
                                       .max_tokens = answer,
                                       .seed = ++self->seed};
        tokens += answer;
    }
    uint64_t begin = clock_now_ns();
    int error = run_calls(self, calls, LOAD_REQUESTS, ret, failure);
    for (uint32_t i = 0; i < LOAD_REQUESTS && error == 0; i++)
        take_load(self, figure, &calls[i], begin);
    ret->tokens = (double)tokens;
    ret->rate = ret->tokens / ret->seconds;
    figure->offered_per_s = rate;
    self->load_seconds += ret->seconds;
    figure->good_per_s = figure->good / self->load_seconds;
    bench_calls_free(calls, LOAD_REQUESTS);
    free(calls);
    return error;
}

static struct bench_spread spread_of(double *values, uint32_t count) {
    if (count == 0)
        return (struct bench_spread){0};
    qsort(values, count, sizeof *values, bench_compare_doubles);
    return (struct bench_spread){values[(size_t)(0.5 * (count - 1))],
                                 values[(size_t)(0.9 * (count - 1))],
                                 values[(size_t)(0.99 * (count - 1))]};
}

/* ---- all runs ---- */

static int run_figure(struct bench *self, struct bench_figure *figure, struct bench_sample *ret,
                      struct failure *failure) {
    if (figure->kind == FIGURE_DECODE)
        return run_decode(self, figure->clipped, ret, failure);
    if (figure->kind == FIGURE_PREFILL)
        return run_prefill(self, figure->clipped, ret, failure);
    if (figure->kind == FIGURE_PREFIX)
        return run_prefix(self, figure->clipped, ret, failure);
    return run_load(self, figure, ret, failure);
}

static int run_all(struct bench *self, struct failure *failure) {
    struct bench_sample warm;
    int error = 0;
    bool load = false;
    for (uint32_t i = 0; i < self->figures; i++)
        load |= self->figure[i].kind == FIGURE_LOAD;
    if (load || self->options->url == NULL) {
        error = run_decode(self, 8, &warm, failure); /* touches all memory, and scales the load */
        self->load_base_rate = warm.rate;
    }
    /* A prompt is over in tens of milliseconds, most of which memory that was never touched, or
     * caches that somebody else has filled since, would cost; llama-bench does the same. */
    for (uint32_t i = 0; i < self->figures && error == 0; i++)
        if (self->figure[i].kind == FIGURE_PREFILL)
            error = run_figure(self, &self->figure[i], &warm, failure);
    for (uint64_t run = 0; run < self->options->runs && error == 0; run++) {
        for (uint32_t i = 0; i < self->figures && error == 0; i++) {
            struct bench_figure *figure = &self->figure[i];
            struct failure why;
            error = run_figure(self, figure, &figure->sample[figure->samples], &why);
            if (error == 0)
                figure->samples++;
            else
                fail(failure, error, "%s: %s", figure->name, why.text);
        }
    }
    for (uint32_t i = 0; i < self->figures; i++) {
        if (self->figure[i].kind != FIGURE_LOAD)
            continue;
        self->figure[i].ttft = spread_of(self->ttft, self->load_requests);
        self->figure[i].tpot = spread_of(self->tpot, self->load_requests);
        self->figure[i].total = spread_of(self->total, self->load_requests);
    }
    return error;
}

/* ---- opening ---- */

static int measure_limits(struct bench *self, struct failure *failure) {
    static const char *const names[] = {"scalar", "avx512", "amx"};
    enum isa isa = ISA_BEST;
    for (int i = 0; i < 3; i++) {
        if (strcmp(self->options->isa, names[i]) == 0)
            isa = (enum isa)i;
    }
    struct pool *pool;
    int error = pool_open(&pool, pool_processors(), failure);
    if (error < 0)
        return error;
    struct parallel parallel = pool_parallel(pool);
    limits_measure(&self->report.limits, isa, &parallel, clock_now_ns, ask_for_huge_pages);
    pool_close(&pool);
    return 0;
}

static int open_model(struct bench *self, struct failure *failure) {
    struct model_directory directory;
    int error = model_directory_open(&directory, self->options->model, failure);
    if (error < 0)
        return error;
    const struct model_config *config = model_config(directory.model);
    uint32_t limit = self->options->settings.context_tokens;
    self->context = limit > 0 && limit < config->context ? limit : config->context;
    self->target.vocabulary = config->vocabulary;
    cost_of_model(&self->report.cost, directory.model);
    if (config->vocabulary <= 16 || self->context < 64)
        error =
            fail(failure, ERR_UNSUPPORTED, "a vocabulary of %u and a context of %u are too small",
                 config->vocabulary, self->context);
    model_directory_close(&directory);
    return error;
}

static int open_target(struct bench *self, struct failure *failure) {
    unsigned port = 0;
    char end = 0;
    self->target.api_key = self->options->api_key;
    self->target.host = self->host;
    if (self->options->url != NULL)
        self->seed = clock_now_ns(); /* it may have been measured before: no prompt is sent twice */
    if (self->options->url == NULL) {
        uint64_t start = clock_now_ns();
        int error = bench_server_start(&self->server, self->options, failure);
        self->report.ready_s = (double)(clock_now_ns() - start) / 1e9;
        snprintf(self->host, sizeof self->host, "127.0.0.1");
        self->target.port = self->server.port;
        return error;
    }
    if (sscanf(self->options->url, "http://%127[^:/]:%u%c", self->host, &port, &end) < 2 ||
        port > 65535 || (end != 0 && end != '/'))
        return fail(failure, ERR_INVALID, "--url: expected http://HOST:PORT, found '%s'",
                    self->options->url);
    self->target.port = (uint16_t)port;
    return bench_get(&self->target, "/ready") == 200
               ? 0
               : fail(failure, ERR_STATE, "nothing at %s is ready", self->options->url);
}

static int bench(struct bench *self, struct failure *failure) {
    const struct options *options = self->options;
    int error = open_model(self, failure);
    if (error == 0)
        error =
            make_plan(self, options->figures != NULL ? options->figures : DEFAULT_PLAN, failure);
    if (error == 0)
        error = measure_limits(self, failure);
    if (error == 0)
        error = open_target(self, failure);
    if (error == 0)
        error = run_all(self, failure);
    struct bench_usage usage;
    bench_usage_read(&self->server, &usage);
    self->report.resident_bytes = usage.role[ROLE_NONE].resident_bytes;
    bench_server_stop(&self->server);
    if (error < 0)
        return error;
    self->report.options = options;
    self->report.figure = self->figure;
    self->report.figures = self->figures;
    bool only_json = options->json != NULL && strcmp(options->json, "-") == 0;
    if (!only_json)
        bench_print(&self->report);
    return options->json != NULL ? bench_write_json(&self->report, options->json, failure) : 0;
}

int command_bench(const struct options *options) {
    struct failure failure;
    struct bench *self = calloc(1, sizeof *self);
    size_t room = options->runs * LOAD_REQUESTS * FIGURES_MAX;
    ASSERT(self != NULL);
    self->options = options;
    self->ttft = calloc(room, sizeof(double));
    self->tpot = calloc(room, sizeof(double));
    self->total = calloc(room, sizeof(double));
    ASSERT(self->ttft != NULL && self->tpot != NULL && self->total != NULL);
    int error = bench(self, &failure);
    if (error < 0)
        fprintf(stderr, "troupe bench: %s\n", failure.text);
    free(self->ttft);
    free(self->tpot);
    free(self->total);
    free(self);
    return error < 0 ? 1 : 0;
}
