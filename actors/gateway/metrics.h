/* What /metrics shows, in Prometheus' text format: vLLM's names and buckets for what a gateway sees
 * of its requests, troupe_* for what the coordinator's STATS and COMMIT tell of the cluster. */
#ifndef TROUPE_METRICS_H
#define TROUPE_METRICS_H

#include "actors/actor.h"
#include "actors/bias_table.h"
#include "actors/gateway/json_text.h"

enum metric_histogram {
    METRIC_TTFT,                   /* seconds from a request's arrival to its first token */
    METRIC_INTER_TOKEN_LATENCY,    /* seconds between tokens of a sequence */
    METRIC_TIME_PER_TOKEN,         /* the same under the name of older dashboards */
    METRIC_REQUEST_TIME_PER_TOKEN, /* mean of a sequence, first token excluded */
    METRIC_E2E_LATENCY,
    METRIC_QUEUE_TIME,     /* seconds from a request's arrival until a step takes its rows */
    METRIC_PREFILL_TIME,   /* from then to its first token */
    METRIC_DECODE_TIME,    /* from its first token to its last */
    METRIC_INFERENCE_TIME, /* both together */
    METRIC_PROMPT_TOKENS,
    METRIC_GENERATION_TOKENS,
    METRIC_MAX_GENERATION_TOKENS,
    METRIC_PARAMS_N,
    METRIC_PARAMS_MAX_TOKENS,
    METRIC_RECOVERY, /* seconds until what a lost actor held has a holder and requests are served */
    METRIC_HISTOGRAMS
};
enum metric_finish { METRIC_STOP, METRIC_LENGTH, METRIC_ABORT, METRIC_ERROR, METRIC_FINISHES };
enum metric_counter {
    METRIC_TOKENS_PROMPT,
    METRIC_TOKENS_GENERATED,
    METRIC_SUBMITTED,   /* SUBMIT messages */
    METRIC_RESUBMITTED, /* of these, with a history from an earlier one */
    METRIC_POLLED,
    METRIC_DUPLICATES, /* tokens that were here already */
    METRIC_LOST,       /* actors that left the epoch without having been drained */
    METRIC_COUNTERS
};

#define METRIC_BUCKETS_MAX 32
struct histogram {
    uint32_t buckets;
    double bound[METRIC_BUCKETS_MAX];
    uint64_t count[METRIC_BUCKETS_MAX + 1]; /* the last: above every bound */
    double sum;
};
#define METRIC_STATUSES 12
struct metrics {
    struct histogram histogram[METRIC_HISTOGRAMS];
    uint64_t finished[METRIC_FINISHES];
    uint64_t counter[METRIC_COUNTERS];
    struct {
        uint16_t status;
        uint64_t count;
    } answered[METRIC_STATUSES];
};

void metrics_init(struct metrics *self, uint32_t context);
void metrics_observe(struct metrics *self, enum metric_histogram which, double value);
void metrics_answered(struct metrics *self, uint16_t status);

/* What the coordinator last told of the cluster. */
struct cluster_view {
    uint32_t layers, experts;
    uint64_t *rows; /* [layers, experts] routed rows since start */
    struct cluster_placement {
        uint32_t layer, expert, holder;
    } * placement;        /* by layer */
    uint32_t *first;      /* [layers + 1] in `placement` */
    uint16_t *replicas;   /* [layers, experts] */
    bool routed[LAYERS_MAX]; /* layers that have routed experts */
    Troupe__Stats *stats; /* own copy of the newest, NULL before */
    double *recent;       /* [layers, experts] rows, each STATS fading those before by `fade` */
    double fade;
};
void cluster_view_init(struct cluster_view *self, uint32_t layers, uint32_t experts);
void cluster_view_free(struct cluster_view *self);
void cluster_view_commit(struct cluster_view *self, const Troupe__Commit *commit);
void cluster_view_stats(struct cluster_view *self, const Troupe__Stats *stats);
/* Share of the latent cache's pages in use, over all attention actors. */
double cluster_view_cache_usage(const struct cluster_view *self);
/* Mean over max of the rows per holder of a layer: 1 is perfect. Negative if nothing has been
 * routed there. */
double cluster_view_balancedness(const struct cluster_view *self, uint32_t layer);
/* The same of the last while: half of it is younger than BALANCE_HALF_LIFE_S. */
#define BALANCE_HALF_LIFE_S 30
double cluster_view_recent_balancedness(const struct cluster_view *self, uint32_t layer);

struct metrics_now {
    const char *model;
    uint32_t running, waiting, requests;
    uint64_t epoch, bias_version, unrepaired_ns;
    uint32_t replicas; /* wanted */
    bool serving;
    const struct bias_table *bias;
};
void metrics_write(struct text *out, const struct metrics *self, const struct metrics_now *now,
                   const struct cluster_view *cluster);
void cluster_view_write(struct text *out, const struct cluster_view *self);

/* `# HELP` and `# TYPE`; type is counter, gauge or histogram. */
void metric_head(struct text *out, const char *name, const char *type, const char *help);
/* A label's value with its quotes, escaped. */
void metric_label(struct text *out, const char *value);

#endif
