/* Histograms and counters of one gateway, and how they are written. Names and buckets are vLLM's,
 * so that its dashboards load. */
#include "actors/gateway/metrics.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

static const double TTFT_BUCKETS[] = {0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1,
                                      0.25,  0.5,   0.75, 1,    2.5,  5,    7.5,  10,
                                      20,    40,    80,   160,  640,  2560};
static const double TOKEN_BUCKETS[] = {0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5,
                                       0.75, 1,     2.5,  5,     7.5, 10,   20,  40,  80};
static const double LATENCY_BUCKETS[] = {0.3, 0.5, 0.8, 1,  1.5, 2,   2.5, 5,   10,   15,  20,
                                         30,  40,  50,  60, 120, 240, 480, 960, 1920, 7680};
static const double RECOVERY_BUCKETS[] = {0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1,  2,
                                          5,    10,    20,   30,  60,   120, 300};
static const double CHOICE_BUCKETS[] = {1, 2, 5, 10, 20};

#define SECONDS(list) list, sizeof(list) / sizeof((list)[0])
/* Without a list: 1, 2, 5, 10, ... up to the context. */
static const struct {
    const char *name, *help;
    const double *bound;
    size_t buckets;
} HISTOGRAMS[METRIC_HISTOGRAMS] = {
    [METRIC_TTFT] = {"vllm:time_to_first_token_seconds",
                     "Histogram of time to first token in seconds.", SECONDS(TTFT_BUCKETS)},
    [METRIC_INTER_TOKEN_LATENCY] = {"vllm:inter_token_latency_seconds",
                                    "Histogram of inter-token latency in seconds.",
                                    SECONDS(TOKEN_BUCKETS)},
    [METRIC_TIME_PER_TOKEN] = {"vllm:time_per_output_token_seconds",
                               "Histogram of time per output token in seconds.",
                               SECONDS(TOKEN_BUCKETS)},
    [METRIC_REQUEST_TIME_PER_TOKEN] =
        {"vllm:request_time_per_output_token_seconds",
         "Histogram of time per output token of each sequence in seconds.", SECONDS(TOKEN_BUCKETS)},
    [METRIC_E2E_LATENCY] = {"vllm:e2e_request_latency_seconds",
                            "Histogram of end to end latency in seconds.",
                            SECONDS(LATENCY_BUCKETS)},
    [METRIC_QUEUE_TIME] = {"vllm:request_queue_time_seconds",
                           "Histogram of time spent in WAITING phase for request.",
                           SECONDS(LATENCY_BUCKETS)},
    [METRIC_PREFILL_TIME] = {"vllm:request_prefill_time_seconds",
                             "Histogram of time spent in PREFILL phase for request.",
                             SECONDS(LATENCY_BUCKETS)},
    [METRIC_DECODE_TIME] = {"vllm:request_decode_time_seconds",
                            "Histogram of time spent in DECODE phase for request.",
                            SECONDS(LATENCY_BUCKETS)},
    [METRIC_INFERENCE_TIME] = {"vllm:request_inference_time_seconds",
                               "Histogram of time spent in RUNNING phase for request.",
                               SECONDS(LATENCY_BUCKETS)},
    [METRIC_PROMPT_TOKENS] = {"vllm:request_prompt_tokens",
                              "Number of prompt tokens of each sequence.", NULL, 0},
    [METRIC_GENERATION_TOKENS] = {"vllm:request_generation_tokens",
                                  "Number of generated tokens of each sequence.", NULL, 0},
    [METRIC_MAX_GENERATION_TOKENS] = {"vllm:request_max_num_generation_tokens",
                                      "Most generated tokens of the sequences of a request.", NULL,
                                      0},
    [METRIC_PARAMS_N] = {"vllm:request_params_n", "Histogram of the n request parameter.",
                         SECONDS(CHOICE_BUCKETS)},
    [METRIC_PARAMS_MAX_TOKENS] = {"vllm:request_params_max_tokens",
                                  "Histogram of the max_tokens request parameter.", NULL, 0},
    [METRIC_RECOVERY] = {"troupe_recovery_seconds",
                         "Histogram of seconds from the epoch without a lost actor until every "
                         "expert has a holder and requests are served.",
                         SECONDS(RECOVERY_BUCKETS)},
};

static const struct {
    const char *name, *help;
} COUNTERS[METRIC_COUNTERS] = {
    [METRIC_TOKENS_PROMPT] = {"vllm:prompt_tokens_total", "Number of prefill tokens processed."},
    [METRIC_TOKENS_GENERATED] = {"vllm:generation_tokens_total",
                                 "Number of generation tokens processed."},
    [METRIC_SUBMITTED] = {"troupe_submitted_total",
                          "Sequences handed to attention actors, repetitions included."},
    [METRIC_RESUBMITTED] =
        {"troupe_resubmitted_total",
         "Sequences handed to another attention actor, or again, with their history."},
    [METRIC_POLLED] = {"troupe_polled_total",
                       "Times an attention actor was asked for tokens that did not come."},
    [METRIC_DUPLICATES] = {"troupe_duplicate_tokens_total",
                           "Tokens that came more than once and were dropped."},
    [METRIC_LOST] = {"troupe_actors_lost_total",
                     "Actors that left the epoch without having been drained."},
};

static const char *const FINISHES[METRIC_FINISHES] = {[METRIC_STOP] = "stop",
                                                      [METRIC_LENGTH] = "length",
                                                      [METRIC_ABORT] = "abort",
                                                      [METRIC_ERROR] = "error"};

static void token_buckets(struct histogram *self, uint32_t context) {
    static const double STEPS[] = {1, 2, 5};
    for (double power = 1;; power *= 10)
        for (size_t i = 0; i < 3; i++) {
            if (STEPS[i] * power > context || self->buckets == METRIC_BUCKETS_MAX)
                return;
            self->bound[self->buckets++] = STEPS[i] * power;
        }
}

void metrics_init(struct metrics *self, uint32_t context) {
    memset(self, 0, sizeof *self);
    for (int h = 0; h < METRIC_HISTOGRAMS; h++) {
        struct histogram *histogram = &self->histogram[h];
        for (size_t i = 0; i < HISTOGRAMS[h].buckets; i++)
            histogram->bound[histogram->buckets++] = HISTOGRAMS[h].bound[i];
        if (HISTOGRAMS[h].bound == NULL)
            token_buckets(histogram, context);
    }
}

void metrics_observe(struct metrics *self, enum metric_histogram which, double value) {
    struct histogram *histogram = &self->histogram[which];
    uint32_t bucket = 0;
    while (bucket < histogram->buckets && value > histogram->bound[bucket])
        bucket++;
    histogram->count[bucket]++;
    histogram->sum += value;
}

void metrics_answered(struct metrics *self, uint16_t status) {
    for (int i = 0; i < METRIC_STATUSES; i++)
        if (self->answered[i].status == status || self->answered[i].status == 0) {
            self->answered[i].status = status;
            self->answered[i].count++;
            return;
        }
}

void metric_head(struct text *out, const char *name, const char *type, const char *help) {
    text_format(out, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, type);
}

void metric_label(struct text *out, const char *value) {
    text_puts(out, "\"");
    for (; *value != '\0'; value++) {
        if (*value == '\\' || *value == '"')
            text_format(out, "\\%c", *value);
        else if (*value == '\n')
            text_puts(out, "\\n");
        else
            text_append(out, value, 1);
    }
    text_puts(out, "\"");
}

static void write_histogram(struct text *out, const struct histogram *self, const char *name,
                            const char *help, const char *model) {
    metric_head(out, name, "histogram", help);
    uint64_t below = 0;
    for (uint32_t i = 0; i <= self->buckets; i++) {
        below += self->count[i];
        text_format(out, "%s_bucket{le=\"", name);
        if (i == self->buckets)
            text_puts(out, "+Inf");
        else if (self->bound[i] == floor(self->bound[i]))
            text_format(out, "%.0f.0", self->bound[i]);
        else
            text_format(out, "%g", self->bound[i]);
        text_puts(out, "\",model_name=");
        metric_label(out, model);
        text_format(out, "} %" PRIu64 "\n", below);
    }
    text_format(out, "%s_sum{model_name=", name);
    metric_label(out, model);
    text_format(out, "} %.9g\n%s_count{model_name=", self->sum, name);
    metric_label(out, model);
    text_format(out, "} %" PRIu64 "\n", below);
}

static void write_gauge(struct text *out, const char *name, const char *help, double value) {
    metric_head(out, name, "gauge", help);
    text_format(out, "%s %.15g\n", name, value);
}

static void write_model_gauge(struct text *out, const char *name, const char *help,
                              const char *model, double value) {
    metric_head(out, name, "gauge", help);
    text_format(out, "%s{model_name=", name);
    metric_label(out, model);
    text_format(out, "} %.15g\n", value);
}

static void write_counters(struct text *out, const struct metrics *self, const char *model) {
    for (int c = 0; c < METRIC_COUNTERS; c++) {
        metric_head(out, COUNTERS[c].name, "counter", COUNTERS[c].help);
        text_format(out, "%s{model_name=", COUNTERS[c].name);
        metric_label(out, model);
        text_format(out, "} %" PRIu64 "\n", self->counter[c]);
    }
    metric_head(out, "vllm:request_success_total", "counter",
                "Count of finished sequences by reason.");
    for (int f = 0; f < METRIC_FINISHES; f++) {
        text_format(out,
                    "vllm:request_success_total{finished_reason=\"%s\",model_name=", FINISHES[f]);
        metric_label(out, model);
        text_format(out, "} %" PRIu64 "\n", self->finished[f]);
    }
    metric_head(out, "troupe_http_responses_total", "counter", "Answers by HTTP status.");
    for (int i = 0; i < METRIC_STATUSES && self->answered[i].status != 0; i++)
        text_format(out, "troupe_http_responses_total{code=\"%u\"} %" PRIu64 "\n",
                    self->answered[i].status, self->answered[i].count);
}

/* Requests by the version of the routing bias that they are pinned to. Version 0 is always there and not counted. */
static void write_bias(struct text *out, const struct bias_table *bias) {
    write_gauge(out, "troupe_bias_versions", "Routing bias versions held, the model's own not counted.",
                bias->count);
    metric_head(out, "troupe_bias_requests", "gauge", "Requests pinned to each routing bias version.");
    for (uint32_t i = 0; i < BIAS_VERSIONS_HELD_MAX; i++) {
        char name[BIAS_NAME_BYTES];
        if (bias->version[i].id == 0)
            continue;
        bias_name(name, bias->version[i].id);
        text_format(out, "troupe_bias_requests{version=\"%s\"} %u\n", name, bias->version[i].users);
    }
}

void metrics_write(struct text *out, const struct metrics *self, const struct metrics_now *now,
                   const struct cluster_view *cluster) {
    write_model_gauge(out, "vllm:num_requests_running",
                      "Number of sequences that have begun to answer.", now->model, now->running);
    write_model_gauge(out, "vllm:num_requests_waiting",
                      "Number of sequences that wait for their first token.", now->model,
                      now->waiting);
    write_model_gauge(out, "vllm:kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.",
                      now->model, cluster_view_cache_usage(cluster));
    write_counters(out, self, now->model);
    for (int h = 0; h < METRIC_HISTOGRAMS; h++)
        write_histogram(out, &self->histogram[h], HISTOGRAMS[h].name, HISTOGRAMS[h].help,
                        now->model);
    write_gauge(out, "troupe_gateway_requests", "HTTP requests being answered with tokens.",
                now->requests);
    write_gauge(out, "troupe_epoch", "Placement epoch that this gateway has adopted.",
                (double)now->epoch);
    write_gauge(out, "troupe_bias_version", "Routing bias version of the epoch.",
                (double)now->bias_version);
    write_bias(out, now->bias);
    write_gauge(out, "troupe_serving", "1 if a request would be served.", now->serving);
    write_gauge(out, "troupe_unrepaired_seconds",
                "Time since the oldest loss that has not been made good; 0: there is none.",
                (double)now->unrepaired_ns * 1e-9);
    write_gauge(out, "troupe_replicas_wanted", "Copies of each expert that the troupe aims at.",
                now->replicas);
    cluster_view_write(out, cluster);
}
