/* The gateway actor: HTTP requests in, answers out as STREAM effects, sequences in the hands of
 * attention actors in between. It alone holds each request's whole history, so any other process
 * may die without a request being lost.
 *
 *   gateway.c          life, events           request_prompt.c   prompts -> tokens
 *   gateway_routes.c   paths                  request_life.c     from body to last byte
 *   openai_*.c         bodies in and out      choice.c           tokens -> text of one choice
 *   affinity.c         who has seen a prompt before
 *   upstream.c         who runs a choice      tokens.c           what comes back
 *   metrics*.c         /metrics               events*.c          the live view's feed
 *   request_trace.c    a request's way */
#include "actors/gateway/gateway.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void *gateway_grow(void *array, uint32_t *capacity, uint32_t needed, size_t element) {
    if (needed <= *capacity)
        return array;
    uint32_t grown = *capacity == 0 ? 16 : *capacity;
    while (grown < needed) {
        ASSERT(grown <= UINT32_MAX / 2);
        grown *= 2;
    }
    ASSERT(element <= SIZE_MAX / grown);
    char *memory = realloc(array, grown * element);
    ASSERT(memory != NULL && "memory for requests");
    memset(memory + *capacity * element, 0, (grown - *capacity) * element);
    *capacity = grown;
    return memory;
}

uint64_t gateway_mix(uint64_t a, uint64_t b) {
    uint64_t z = a * 0x9e3779b97f4a7c15u + b * 0xd1342543de82ef95u + 0x2545f4914f6cdd1du;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u; /* the finisher of SplitMix64 (Steele et al. 2014) */
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static void heartbeat(struct gateway *self, uint64_t now_ns, struct effects *out) {
    Troupe__Heartbeat heartbeat = TROUPE__HEARTBEAT__INIT;
    heartbeat.state = TROUPE__ACTOR_STATE__STATE_READY;
    gateway_count(self, &heartbeat.sequences_running, &heartbeat.sequences_waiting);
    heartbeat.prompt_tokens = self->metrics.counter[METRIC_TOKENS_PROMPT];
    heartbeat.generated_tokens = self->metrics.counter[METRIC_TOKENS_GENERATED];
    bias_table_beat(&self->bias, &heartbeat, out);
    member_heartbeat(&self->member, &heartbeat, now_ns, out);
}

static void end_all(struct gateway *self, uint64_t now_ns, struct effects *out) {
    struct http_error error;
    http_fail(&error, 503, NULL, "the server is shutting down");
    error.retry_after_s = 1;
    while (self->requests > 0)
        request_fail(self, self->request[0], &error, now_ns, out);
    events_end(&self->feed, out);
}

/* Versions of the routing bias, of the coordinator; what is held is told at once, as others wait for it. */
static void on_bias(struct gateway *self, const message *envelope, uint64_t now_ns,
                    struct effects *out) {
    if (envelope->from != ACTOR_COORDINATOR || !bias_table_on_message(&self->bias, envelope, out))
        return;
    heartbeat(self, now_ns, out);
    upstream_review(self, now_ns, out);
}

static void on_message(struct gateway *self, const message *envelope, uint64_t now_ns,
                       struct effects *out) {
    switch (envelope->body_case) {
    case TROUPE__ENVELOPE__BODY_BIAS:
    case TROUPE__ENVELOPE__BODY_BIAS_RELEASE:
        on_bias(self, envelope, now_ns, out);
        break;
    case TROUPE__ENVELOPE__BODY_TOKENS:
        tokens_take(self, envelope, now_ns, out);
        break;
    case TROUPE__ENVELOPE__BODY_REJECTED:
        tokens_rejected(self, envelope, now_ns, out);
        break;
    case TROUPE__ENVELOPE__BODY_STATS:
        if (envelope->from == ACTOR_COORDINATOR) {
            cluster_view_stats(&self->cluster, envelope->stats);
            events_stats(&self->feed, envelope->stats, now_ns);
        }
        break;
    default:
        effects_trace(out, TRACE_WARNING, "gateway: unexpected message of kind %d from actor %u",
                      (int)envelope->body_case, envelope->from);
    }
}

static void client_gone(struct gateway *self, uint64_t client, uint64_t now_ns,
                        struct effects *out) {
    if (events_leave(&self->feed, client))
        return;
    for (uint32_t i = 0; i < self->requests; i++)
        if (self->request[i]->client == client) {
            request_abort(self, self->request[i], now_ns, out);
            return;
        }
}

/* The coordinator, or the host, wants this process to end: clients are told while there is still
 * somebody to tell them. */
static bool is_shutdown(const struct gateway *self, const struct event *event) {
    if (event->kind == EVENT_SHUTDOWN)
        return true;
    return event->kind == EVENT_MESSAGE &&
           event->message->body_case == TROUPE__ENVELOPE__BODY_SHUTDOWN &&
           event->message->from == ACTOR_COORDINATOR &&
           (self->member.id == 0 ||
            event->message->from_incarnation == self->member.coordinator_incarnation);
}

static void step(struct actor *actor, const struct event *event, uint64_t now_ns,
                 struct effects *out) {
    struct gateway *self = (struct gateway *)actor;
    if (self->member.exited)
        return;
    if (is_shutdown(self, event))
        end_all(self, now_ns, out);
    uint32_t news = member_step(&self->member, event, now_ns, out);
    if ((news & MEMBER_EXIT) != 0)
        return;
    if ((news & MEMBER_COMMITTED) != 0) {
        cluster_view_commit(&self->cluster, event->message->commit);
        uint32_t running, waiting;
        gateway_count(self, &running, &waiting);
        self->feed.busy = running > 0;
        events_commit(&self->feed, &self->cluster, event->message->commit, now_ns);
        upstream_review(self, now_ns, out);
    }
    if ((news & MEMBER_LOST) != 0)
        upstream_review(self, now_ns, out);
    if ((news & (MEMBER_DONE | MEMBER_COMMITTED | MEMBER_LOST)) == 0) {
        if (event->kind == EVENT_MESSAGE)
            on_message(self, event->message, now_ns, out);
        else if (event->kind == EVENT_HTTP_REQUEST)
            gateway_route(self, event->http, now_ns, out);
        else if (event->kind == EVENT_CLIENT_GONE)
            client_gone(self, event->client, now_ns, out);
    }
    upstream_timer(self, now_ns, out);
    if (now_ns >= self->feed.next_ns) {
        struct event_source source = gateway_event_source(self);
        events_timer(&self->feed, &source, now_ns, out);
    }
    if ((news & MEMBER_HEARTBEAT) != 0)
        heartbeat(self, now_ns, out);
}

static uint64_t deadline(const struct actor *actor) {
    const struct gateway *self = (const struct gateway *)actor;
    uint64_t first_ns = member_deadline(&self->member);
    if (self->member.exited)
        return NEVER;
    first_ns = self->wake_ns < first_ns ? self->wake_ns : first_ns;
    return self->feed.next_ns < first_ns ? self->feed.next_ns : first_ns;
}

static void destroy(struct actor *actor) {
    struct gateway *self = (struct gateway *)actor;
    struct effects nowhere;
    effects_init(&nowhere);
    while (self->requests > 0)
        request_abort(self, self->request[0], 0, &nowhere);
    effects_free(&nowhere);
    bias_table_free(&self->bias);
    member_free(&self->member);
    cluster_view_free(&self->cluster);
    events_free(&self->feed);
    request_traces_free(&self->traces);
    text_free(&self->line);
    free(self->request);
    free(self->slot);
    free(self->free_slot);
    free(self->upstream);
    free(self->affinity_block);
    free(self->closing);
    free(self->served_model);
    free(self->api_key);
    free(self->version);
    free(self);
}

static const char *describe(struct actor *actor) {
    struct gateway *self = (struct gateway *)actor;
    uint32_t choices = self->slots - self->free_slots;
    uint64_t outstanding = 0;
    for (uint32_t i = 0; i < self->upstreams; i++)
        outstanding += self->upstream[i].outstanding;
    snprintf(self->description, sizeof self->description,
             "requests=%u sequences=%u closing=%u prompt_tokens=%llu outstanding=%llu bias_users=%u bias=%u",
             self->requests, choices, self->closings, (unsigned long long)self->prompt_tokens,
             (unsigned long long)outstanding, bias_table_users(&self->bias), self->bias.count);
    return self->description;
}

static const struct actor_class GATEWAY_CLASS = {
    .role = ROLE_GATEWAY,
    .step = step,
    .deadline = deadline,
    .destroy = destroy,
    .describe = describe,
};

static char *copy(const char *text) {
    char *ret = text == NULL ? NULL : strdup(text);
    ASSERT(text == NULL || (ret != NULL && "memory for a gateway"));
    return ret;
}

/* What a request may use: the model's context, the operator's bound on it, and what fits into one
 * actor's latent cache. */
static uint32_t usable_context(const struct settings *settings, const struct model_config *config) {
    uint32_t context = config->context;
    if (settings->context_tokens > 0 && settings->context_tokens < context)
        context = settings->context_tokens;
    uint32_t cache = settings->kv_cache_tokens / PAGE_TOKENS * PAGE_TOKENS;
    return cache < context ? cache : context;
}

static size_t longest_token(const struct tokenizer *tokenizer) {
    size_t longest = 1;
    for (uint32_t token = 0; token < tokenizer_vocabulary(tokenizer); token++) {
        size_t size = 0;
        if (tokenizer_bytes(tokenizer, token, &size) != NULL && size > longest)
            longest = size;
    }
    return longest;
}

static void set_limits(struct gateway *self) {
    self->longest_token_bytes = longest_token(self->tokenizer);
    self->context = usable_context(&self->settings, &self->config);
    self->limits = (struct request_limits){
        .served_model = self->served_model,
        .vocabulary = self->config.vocabulary,
        .max_choices = self->settings.max_choices,
        .max_logprobs = self->settings.max_logprobs,
        .max_sequences = self->settings.max_sequences,
        .default_temperature = self->config.default_temperature,
        .default_top_p = self->config.default_top_p,
        .default_top_k = self->config.default_top_k,
    };
    self->poll_ns = self->settings.poll_ms * NS_PER_MS;
    self->retry_ns = self->settings.hello_retry_ms * NS_PER_MS;
    self->submit_timeout_ns = self->settings.submit_timeout_ms * NS_PER_MS;
}

static void describe_holdings(const struct member *member, Troupe__Hello *hello,
                              struct effects *out) {
    const struct gateway *self =
        (const struct gateway *)((const char *)member - offsetof(struct gateway, member));
    bias_table_hello(&self->bias, hello, out);
}

struct actor *gateway_create(const struct actor_identity *identity, const struct settings *settings,
                             const struct model_config *config,
                             const struct gateway_options *options) {
    struct gateway *self = calloc(1, sizeof *self);
    ASSERT(self != NULL && options->tokenizer != NULL);
    self->actor.class = &GATEWAY_CLASS;
    bool joined = member_init(&self->member, identity, settings, 0, ROLE_BIT(ROLE_ATTENTION), 0);
    ASSERT(joined && "memory for a gateway");
    self->member.describe_holdings = describe_holdings;
    bias_table_init(&self->bias, config->layers * config->experts);
    self->settings = *settings;
    self->config = *config;
    self->tokenizer = options->tokenizer;
    self->chat = options->chat;
    memcpy(self->chat_error, options->chat_error, sizeof self->chat_error);
    self->chat_error[sizeof self->chat_error - 1] = '\0';
    self->served_model = copy(options->served_model);
    self->api_key = copy(options->api_key);
    self->version = copy(options->version);
    self->unix_offset_ns = options->unix_offset_ns;
    self->sequence_key = gateway_mix(identity->incarnation, 0);
    self->wake_ns = NEVER;
    set_limits(self);
    metrics_init(&self->metrics, self->context);
    cluster_view_init(&self->cluster, config->layers, config->experts);
    self->cluster.fade = exp2(-(double)settings->heartbeat_ms / (1000.0 * BALANCE_HALF_LIFE_S));
    for (uint32_t l = 0; l < config->layers; l++)
        self->cluster.routed[l] = model_layer_is_moe(config, l);
    self->view = options->view;
    self->allow_faults = options->allow_faults;
    events_init(&self->feed);
    self->feed.metrics = &self->metrics;
    return &self->actor;
}
