/* The cluster as /metrics shows it: actors from the coordinator's STATS, placement from COMMIT,
 * rows per expert from both. */
#include "actors/gateway/metrics.h"

#include <inttypes.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

void cluster_view_init(struct cluster_view *self, uint32_t layers, uint32_t experts) {
    ASSERT(layers <= LAYERS_MAX && experts <= EXPERTS_MAX);
    memset(self, 0, sizeof *self);
    self->layers = layers;
    self->experts = experts;
    size_t cells = (size_t)layers * experts + 1;
    self->rows = calloc(cells, sizeof *self->rows);
    self->replicas = calloc(cells, sizeof *self->replicas);
    self->first = calloc((size_t)layers + 2, sizeof *self->first);
    self->recent = calloc(cells, sizeof *self->recent);
    ASSERT(self->recent != NULL && self->rows != NULL && self->replicas != NULL && self->first != NULL &&
           "memory for metrics");
}

void cluster_view_free(struct cluster_view *self) {
    free(self->rows);
    free(self->recent);
    free(self->replicas);
    free(self->first);
    free(self->placement);
    if (self->stats != NULL)
        troupe__stats__free_unpacked(self->stats, NULL);
    memset(self, 0, sizeof *self);
}

void cluster_view_commit(struct cluster_view *self, const Troupe__Commit *commit) {
    ASSERT(commit->n_layer == commit->n_expert && commit->n_layer == commit->n_holder);
    memset(self->replicas, 0, ((size_t)self->layers * self->experts + 1) * sizeof *self->replicas);
    memset(self->first, 0, ((size_t)self->layers + 2) * sizeof *self->first);
    free(self->placement);
    self->placement = calloc(commit->n_layer + 1, sizeof *self->placement);
    ASSERT(self->placement != NULL && "memory for metrics");
    /* A counting sort by layer: first[l + 1] counts layer l, then starts it, and after filling ends
     * it, which is first[l + 1]. */
    for (size_t i = 0; i < commit->n_layer; i++)
        if (commit->layer[i] < self->layers && commit->expert[i] < self->experts)
            self->first[commit->layer[i] + 2]++;
    for (uint32_t l = 0; l < self->layers; l++)
        self->first[l + 2] += self->first[l + 1];
    for (size_t i = 0; i < commit->n_layer; i++) {
        uint32_t layer = commit->layer[i], expert = commit->expert[i];
        if (layer >= self->layers || expert >= self->experts)
            continue;
        self->placement[self->first[layer + 1]++] = (struct cluster_placement){
            .layer = layer, .expert = expert, .holder = commit->holder[i]};
        self->replicas[(size_t)layer * self->experts + expert]++;
    }
}

void cluster_view_stats(struct cluster_view *self, const Troupe__Stats *stats) {
    for (size_t cell = 0; cell < (size_t)self->layers * self->experts; cell++)
        self->recent[cell] *= self->fade;
    for (size_t i = 0;
         i < stats->n_load_layer && i < stats->n_load_expert && i < stats->n_load_rows; i++) {
        if (stats->load_layer[i] >= self->layers || stats->load_expert[i] >= self->experts)
            continue;
        size_t cell = (size_t)stats->load_layer[i] * self->experts + stats->load_expert[i];
        if (stats->load_rows[i] > self->rows[cell])
            self->recent[cell] += (double)(stats->load_rows[i] - self->rows[cell]);
        self->rows[cell] = stats->load_rows[i];
    }
    /* A copy by way of its bytes: the message is only lent. */
    size_t size = troupe__stats__get_packed_size(stats);
    uint8_t *bytes = malloc(size + 1);
    ASSERT(bytes != NULL && "memory for metrics");
    troupe__stats__pack(stats, bytes);
    Troupe__Stats *copy = troupe__stats__unpack(NULL, size, bytes);
    free(bytes);
    ASSERT(copy != NULL && "memory for metrics");
    if (self->stats != NULL)
        troupe__stats__free_unpacked(self->stats, NULL);
    self->stats = copy;
}

double cluster_view_cache_usage(const struct cluster_view *self) {
    uint64_t used = 0, total = 0;
    for (size_t i = 0; self->stats != NULL && i < self->stats->n_actor; i++) {
        const Troupe__Heartbeat *heartbeat = self->stats->actor[i]->heartbeat;
        if (heartbeat == NULL)
            continue;
        used += heartbeat->pages_used;
        total += heartbeat->pages_total;
    }
    return total == 0 ? 0 : (double)used / (double)total;
}

static double balancedness(const struct cluster_view *self, uint32_t layer, bool recent) {
    static const double NOTHING_ROUTED = -1;
    struct {
        uint32_t holder;
        double rows;
    } load[ACTORS_MAX];
    uint32_t holders = 0;
    for (uint32_t i = self->first[layer]; i < self->first[layer + 1]; i++) {
        const struct cluster_placement *entry = &self->placement[i];
        size_t cell = (size_t)layer * self->experts + entry->expert;
        uint32_t h = 0;
        while (h < holders && load[h].holder != entry->holder)
            h++;
        if (h == sizeof load / sizeof load[0])
            continue;
        if (h == holders) {
            load[holders].holder = entry->holder;
            load[holders++].rows = 0;
        }
        load[h].rows += (recent ? self->recent[cell] : (double)self->rows[cell]) /
                        self->replicas[cell];
    }
    double sum = 0, most = 0;
    for (uint32_t h = 0; h < holders; h++) {
        sum += load[h].rows;
        most = load[h].rows > most ? load[h].rows : most;
    }
    return most == 0 ? NOTHING_ROUTED : sum / holders / most;
}

double cluster_view_balancedness(const struct cluster_view *self, uint32_t layer) {
    return balancedness(self, layer, false);
}

double cluster_view_recent_balancedness(const struct cluster_view *self, uint32_t layer) {
    return balancedness(self, layer, true);
}

static const char *state_name(Troupe__ActorState state) {
    static const char *const NAMES[] = {"joining", "loading", "ready", "draining", "gone", "quarantined"};
    return state <= TROUPE__ACTOR_STATE__STATE_QUARANTINED ? NAMES[state] : "unknown";
}

#define ATTENTION         ROLE_BIT_OF(ROLE_ATTENTION)
#define WORKERS           (ROLE_BIT_OF(ROLE_EXPERT) | ROLE_BIT_OF(ROLE_SAMPLER))
#define DATA_PLANE        (ATTENTION | WORKERS)
#define EVERYBODY         UINT32_MAX
#define ROLE_BIT_OF(role) (1u << (role))
#define AT(member)        offsetof(Troupe__Heartbeat, member)

/* One row per number of a heartbeat: who reports it, where it lies, how wide it is, and its unit.
 */
static const struct {
    const char *name, *type, *help;
    uint32_t roles;
    size_t offset;
    bool wide; /* uint64_t, else uint32_t */
    double scale;
} ACTOR_METRICS[] = {
    {"troupe_actor_memory_bytes", "gauge",
     "Memory held: weights, work space, latent cache, as the actor reports it.", EVERYBODY,
     AT(memory_bytes), true, 1},
    {"troupe_actor_epoch", "gauge", "Newest epoch adopted.", EVERYBODY, AT(epoch), true, 1},
    {"troupe_sequences_running", "gauge", "Sequences in the running batch.", ATTENTION,
     AT(sequences_running), false, 1},
    {"troupe_sequences_waiting", "gauge", "Sequences not yet admitted.", ATTENTION,
     AT(sequences_waiting), false, 1},
    {"troupe_kv_pages_used", "gauge", "Pages of the latent cache in use.", ATTENTION,
     AT(pages_used), false, 1},
    {"troupe_kv_pages", "gauge", "Pages of the latent cache.", ATTENTION, AT(pages_total), false,
     1},
    {"troupe_prompt_tokens_total", "counter", "Prompt tokens computed.", ATTENTION,
     AT(prompt_tokens), true, 1},
    {"troupe_generated_tokens_total", "counter", "Tokens generated.", ATTENTION,
     AT(generated_tokens), true, 1},
    {"vllm:prefix_cache_queries_total", "counter",
     "Tokens looked for in the prefix cache when their sequence was admitted.", ATTENTION,
     AT(prefix_cache_queries), true, 1},
    {"vllm:prefix_cache_hits_total", "counter", "Tokens of these that were found there.", ATTENTION,
     AT(prefix_cache_hits), true, 1},
    {"vllm:num_preemptions_total", "counter", "Sequences put back, to be computed again later.",
     ATTENTION, AT(preemptions), true, 1},
    {"vllm:spec_decode_num_drafts_total", "counter", "Verifications of guessed tokens.", ATTENTION,
     AT(spec_drafts), true, 1},
    {"vllm:spec_decode_num_draft_tokens_total", "counter", "Tokens guessed and verified.", ATTENTION,
     AT(spec_draft_tokens), true, 1},
    {"vllm:spec_decode_num_accepted_tokens_total", "counter", "Guessed tokens that were true.",
     ATTENTION, AT(spec_accepted_tokens), true, 1},
    {"troupe_steps_total", "counter", "Batches computed.", ATTENTION, AT(steps), true, 1},
    {"troupe_frames_total", "counter", "Data frames handled.", DATA_PLANE, AT(frames), true, 1},
    {"troupe_rows_total", "counter", "Rows computed.", WORKERS, AT(rows), true, 1},
    {"troupe_busy_seconds_total", "counter", "Time spent computing.", WORKERS, AT(busy_ns), true,
     1e-9},
    {"troupe_frames_resent_total", "counter", "Data frames sent again.", DATA_PLANE,
     AT(frames_resent), true, 1},
    {"troupe_frames_stale_total", "counter", "Data frames dropped as stale.", DATA_PLANE,
     AT(frames_stale), true, 1},
    {"troupe_rows_audited_total", "counter", "Rows of experts confirmed by a second process.",
     ATTENTION, AT(rows_audited), true, 1},
    {"troupe_rows_unaudited_total", "counter",
     "Rows chosen for an audit that had no second holder.", ATTENTION, AT(rows_unaudited), true, 1},
    {"troupe_audits_differed_total", "counter",
     "Rows for which two processes gave different bits.", ATTENTION, AT(audits_differed), true, 1},
};

static void write_actor_labels(struct text *out, const char *metric, const Troupe__Member *member) {
    text_format(out, "%s{actor=", metric);
    metric_label(out, member->name);
    text_format(out, ",role=\"%s\"", role_name((enum role)member->role));
}

static void write_actors(struct text *out, const Troupe__Stats *stats) {
    metric_head(out, "troupe_actor_state", "gauge", "1 for the state that an actor is in.");
    for (size_t i = 0; i < stats->n_actor; i++) {
        const Troupe__Member *member = stats->actor[i]->member;
        if (member == NULL)
            continue;
        write_actor_labels(out, "troupe_actor_state", member);
        text_format(out, ",state=\"%s\"} 1\n", state_name(member->state));
    }
    metric_head(out, "troupe_heartbeat_age_seconds", "gauge",
                "Time since the coordinator heard of an actor.");
    for (size_t i = 0; i < stats->n_actor; i++) {
        if (stats->actor[i]->member == NULL)
            continue;
        write_actor_labels(out, "troupe_heartbeat_age_seconds", stats->actor[i]->member);
        text_format(out, "} %.9g\n", (double)stats->actor[i]->heartbeat_age_ns * 1e-9);
    }
    for (size_t m = 0; m < sizeof ACTOR_METRICS / sizeof ACTOR_METRICS[0]; m++) {
        metric_head(out, ACTOR_METRICS[m].name, ACTOR_METRICS[m].type, ACTOR_METRICS[m].help);
        for (size_t i = 0; i < stats->n_actor; i++) {
            const Troupe__Member *member = stats->actor[i]->member;
            const Troupe__Heartbeat *heartbeat = stats->actor[i]->heartbeat;
            if (member == NULL || heartbeat == NULL ||
                (ROLE_BIT_OF(member->role) & ACTOR_METRICS[m].roles) == 0)
                continue;
            const char *place = (const char *)heartbeat + ACTOR_METRICS[m].offset;
            double value =
                ACTOR_METRICS[m].wide ? (double)*(const uint64_t *)place : *(const uint32_t *)place;
            write_actor_labels(out, ACTOR_METRICS[m].name, member);
            text_format(out, "} %.15g\n", value * ACTOR_METRICS[m].scale);
        }
    }
}

static void write_quarantines(struct text *out, const Troupe__Stats *stats) {
    metric_head(out, "troupe_quarantines_total", "counter",
                "Times that a process was taken out of service because its rows were wrong.");
    for (size_t i = 0; i < stats->n_quarantine; i++) {
        text_format(out, "troupe_quarantines_total{actor=");
        metric_label(out, stats->quarantine[i]->name);
        text_format(out, "} %u\n", stats->quarantine[i]->times);
    }
}

/* Layers without routed experts have copies of nothing and are left out. */
static void write_copies(struct text *out, const struct cluster_view *self) {
    uint32_t with[3] = {0}; /* none, one, more */
    uint64_t copies = 0;
    for (uint32_t l = 0; l < self->layers; l++)
        for (uint32_t e = 0; self->routed[l] && e < self->experts; e++) {
            uint32_t replicas = self->replicas[(size_t)l * self->experts + e];
            with[replicas < 2 ? replicas : 2]++;
            copies += replicas;
        }
    metric_head(out, "troupe_expert_copies", "gauge", "Copies of experts in the adopted epoch.");
    text_format(out, "troupe_expert_copies %" PRIu64 "\n", copies);
    metric_head(out, "troupe_experts_without_holder", "gauge",
                "Experts (of all layers) that nobody holds in the adopted epoch.");
    text_format(out, "troupe_experts_without_holder %u\n", with[0]);
    metric_head(out, "troupe_experts_without_replica", "gauge",
                "Experts (of all layers) that one process alone holds.");
    text_format(out, "troupe_experts_without_replica %u\n", with[1]);
}

void cluster_view_write(struct text *out, const struct cluster_view *self) {
    write_copies(out, self);
    if (self->stats != NULL) {
        write_actors(out, self->stats);
        write_quarantines(out, self->stats);
    }
    metric_head(out, "troupe_expert_tokens_total", "counter", "Rows routed to each expert.");
    for (uint32_t l = 0; l < self->layers; l++)
        for (uint32_t e = 0; e < self->experts; e++)
            if (self->replicas[(size_t)l * self->experts + e] > 0)
                text_format(out,
                            "troupe_expert_tokens_total{layer=\"%u\",expert=\"%u\"} %" PRIu64 "\n",
                            l, e, self->rows[(size_t)l * self->experts + e]);
    metric_head(out, "troupe_layer_balancedness", "gauge",
                "Mean over max of the rows of a layer per holder, since start; 1 is perfect.");
    for (uint32_t l = 0; l < self->layers; l++) {
        double value = cluster_view_balancedness(self, l);
        if (value >= 0)
            text_format(out, "troupe_layer_balancedness{layer=\"%u\"} %.9g\n", l, value);
    }
    metric_head(out, "troupe_layer_balancedness_recent", "gauge",
                "The same of the last while (half-life 30 s).");
    for (uint32_t l = 0; l < self->layers; l++) {
        double value = cluster_view_recent_balancedness(self, l);
        if (value >= 0)
            text_format(out, "troupe_layer_balancedness_recent{layer=\"%u\"} %.9g\n", l, value);
    }
}
