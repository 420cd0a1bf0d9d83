/* The simulated world: every actor of a troupe as a node, one queue of deliveries, one clock that only deliveries move.
 *
 * A node behaves as a process of the process host does: one event at a time; a COMPUTE effect runs at once and keeps the node busy for
 * compute_ns; its COMPUTED event is stepped before any other event of that node. Control messages travel packed and are
 * unpacked and checked on arrival; frames travel as bytes with their CRC.
 *
 * Invariants: 1. the clock never goes back; 2. a dead node receives nothing; 3. nothing but `random` and the faults' own chances decide
 * what is not decided by the actors, so (seed, options, calls) fix the trace hash. */
#include "simulator/world.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/wire.h"
#include "simulator/internal.h"

void world_hash(struct world *self, const void *bytes, size_t size) {
    const uint8_t *at = bytes;
    for (size_t i = 0; i < size; i++)
        self->hash = (self->hash ^ at[i]) * 0x100000001b3u;
}

void world_hash_word(struct world *self, uint64_t word) {
    world_hash(self, &word, sizeof word);
}

void world_trace(struct world *self, const struct node *node, const char *what) {
    world_hash_word(self, self->now_ns);
    world_hash(self, node->name, strlen(node->name));
    world_hash(self, what, strlen(what));
    if (self->options.trace != NULL) {
        char line[768];
        snprintf(line, sizeof line, "%12.6f ms  %-14s %s", (double)self->now_ns / 1e6, node->name, what);
        self->options.trace(self->options.context, line);
    }
}

/* ---- nodes ---- */

static int open_engine(struct world *self, struct node *node, struct failure *failure) {
    const struct settings *settings = &self->options.settings;
    struct engine_options options = {
        .kernels = self->options.kernels,
        .parallel = self->options.parallel,
        .batch_slots = 1,
        .gate_top_p = (float)settings->gate_top_p,
        .latent_fp8 = settings->latent_fp8 != 0,
        .mtp_steps = settings->mtp_steps,
    };
    switch (node->role) {
    case ROLE_ATTENTION:
        options.role = ENGINE_ATTENTION;
        options.batch_rows = settings->batch_tokens;
        options.pages = settings->kv_cache_tokens / PAGE_TOKENS;
        options.resident = settings->resident ? self->options.resident : NULL;
        break;
    case ROLE_EXPERT:
        options.role = ENGINE_EXPERT;
        options.batch_rows = settings->frame_rows;
        break;
    case ROLE_SAMPLER:
        options.role = ENGINE_SAMPLER;
        options.batch_rows = settings->batch_tokens;
        break;
    default:
        return 0;
    }
    return engine_open(&node->engine, self->options.model, &options, failure);
}

static bool has_file(const struct world *self, const struct node *node) {
    return node->role != ROLE_EXPERT || node->index + self->options.fileless < self->options.experts;
}

static struct actor *create_expert(struct world *self, struct node *node) {
    node->identity.model_fingerprint = has_file(self, node) ? model_fingerprint(self->options.model) : "";
    struct actor *actor =
        expert_create(&node->identity, &self->options.settings, model_config(self->options.model), 0);
    if (actor != NULL && !has_file(self, node))
        expert_set_weights(actor, WEIGHTS_PEER);
    return actor;
}

static struct actor *create_actor(struct world *self, struct node *node) {
    const struct settings *settings = &self->options.settings;
    const struct model_config *config = model_config(self->options.model);
    switch (node->role) {
    case ROLE_COORDINATOR:
        return coordinator_create(&node->identity, settings, config);
    case ROLE_ATTENTION:
        return attention_create(&node->identity, settings, config);
    case ROLE_EXPERT:
        return create_expert(self, node);
    case ROLE_SAMPLER:
        return sampler_create(&node->identity, settings, config);
    default:
        if (self->options.gateway.tokenizer != NULL)
            return gateway_create(&node->identity, settings, config, &self->options.gateway);
        return probe_create(&node->identity, settings, config, self->options.probes,
                            self->options.probe_count);
    }
}

static int try_start(struct world *self, struct node *node, struct failure *failure) {
    node->identity.incarnation = ++self->last_incarnation | random_next(&self->random) << 20;
    int result = open_engine(self, node, failure);
    if (result < 0)
        return result;
    node->actor = create_actor(self, node);
    ASSERT(node->actor != NULL);
    node->alive = true;
    node->busy_until_ns = node->paused_until_ns = 0;
    node->restart_at_ns = NEVER;
    node->computed_count = 0;
    memset(node->peer, 0, sizeof node->peer);
    struct delivery *start =
        delivery_new(DELIVER_START, (uint32_t)(node - self->node), self->now_ns);
    start->incarnation = node->identity.incarnation;
    queue_push(&self->queue, start);
    return 0;
}

void node_start(struct world *self, struct node *node) {
    world_trace(self, node, "restarted");
    struct failure failure;
    int result = try_start(self, node, &failure);
    ASSERT(result == 0);
}

static void drop_frame(struct node *node) {
    free(node->frame);
    node->frame = NULL;
}

static void release_node(struct node *node) {
    node->alive = false;
    drop_frame(node);
    if (node->actor != NULL)
        actor_destroy(&node->actor);
    if (node->engine != NULL)
        engine_close(&node->engine);
}

void node_stop(struct world *self, struct node *node) {
    release_node(node);
    const struct world_watch *watch = self->options.watch;
    if (watch != NULL && watch->ended != NULL)
        watch->ended(watch->context, node_place(node));
}

struct node *world_node(const struct world *self, struct place place) {
    for (uint32_t i = 0; i < self->nodes; i++)
        if (self->node[i].role == place.role && self->node[i].index == place.index)
            return &self->node[i];
    return NULL;
}

static void add_nodes(struct world *self, enum role role, uint32_t count) {
    for (uint32_t index = 0; index < count; index++) {
        struct node *node = &self->node[self->nodes++];
        node->role = role;
        node->index = index;
        snprintf(node->name, sizeof node->name, "%s-%u", role_name(role), index);
        snprintf(node->address, sizeof node->address, "sim://%s", node->name);
        effects_init(&node->effects);
        node->identity = (struct actor_identity){
            .role = role,
            .name = node->name,
            .control_address = node->address,
            .data_address = node->address,
            .host = self->options.apart ? node->name : "world",
            .coordinator_address = self->node[0].address,
            .model_fingerprint = model_fingerprint(self->options.model),
            .config_fingerprint = model_config_fingerprint(self->options.model),
            .numerics = profile_name(self->options.kernels->profile),
            .pid = self->nodes,
            .threads = 1,
        };
    }
}

int world_open(struct world **ret, const struct world_options *options, struct failure *failure) {
    struct world *self = calloc(1, sizeof *self);
    uint32_t count = 2 + options->attention + options->experts + options->samplers;
    if (self != NULL)
        self->node = calloc(count, sizeof *self->node);
    if (self == NULL || self->node == NULL) {
        free(self);
        return fail(failure, ERR_NO_MEMORY, "a world of %u actors does not fit in memory", count);
    }
    self->options = *options;
    self->random.state = options->seed;
    self->hash = 0xcbf29ce484222325u;
    if (self->options.settings.expected_experts == 0)
        self->options.settings.expected_experts = options->experts;
    add_nodes(self, ROLE_COORDINATOR, 1);
    add_nodes(self, ROLE_GATEWAY, 1);
    add_nodes(self, ROLE_ATTENTION, options->attention);
    add_nodes(self, ROLE_EXPERT, options->experts);
    add_nodes(self, ROLE_SAMPLER, options->samplers);
    for (uint32_t i = 0; i < self->nodes; i++) {
        int result = try_start(self, &self->node[i], failure);
        if (result < 0) {
            world_close(&self);
            return result;
        }
    }
    *ret = self;
    return 0;
}

void world_close(struct world **world) {
    struct world *self = *world;
    if (self == NULL)
        return;
    for (uint32_t i = 0; i < self->nodes; i++) {
        release_node(&self->node[i]);
        effects_free(&self->node[i].effects);
    }
    queue_free(&self->queue);
    free(self->node);
    free(self);
    *world = NULL;
}

/* ---- deliveries ---- */

static void step_node(struct world *self, struct node *node, const struct event *event) {
    struct effects *effects = &node->effects;
    effects_reset(effects);
    actor_step(node->actor, event, self->now_ns, effects);
    world_hash_word(self, event->kind);
    for (uint32_t i = 0; i < effects->count; i++) {
        world_hash_word(self, effects->list[i].kind);
        if (!world_carry_out(self, node, &effects->list[i])) {
            node_stop(self, node);
            if (self->options.restart_ns > 0) {
                node->restart_at_ns = self->now_ns + self->options.restart_ns;
                outside_tell_end(self, node);
            }
            return;
        }
    }
}

static void trace_message(struct world *self, const struct node *node, const message *envelope) {
    char line[96];
    snprintf(line, sizeof line, "<- %s from %u", wire_name(envelope), envelope->from);
    world_trace(self, node, line);
}

static void step_message(struct world *self, struct node *node, const struct delivery *delivery) {
    Troupe__Envelope *envelope;
    struct failure failure;
    if (wire_unpack(&envelope, delivery->bytes, delivery->size, &failure) < 0) {
        world_trace(self, node, failure.text);
        return;
    }
    trace_message(self, node, envelope);
    const struct world_watch *watch = self->options.watch;
    if (watch != NULL && watch->message != NULL)
        watch->message(watch->context, node_place(node), envelope);
    step_node(self, node, &(struct event){.kind = EVENT_MESSAGE, .message = envelope});
    wire_free(&envelope);
}

/* The frame is kept until the last program that comes of it has been heard of. */
static void step_frame(struct world *self, struct node *node, struct delivery *delivery) {
    struct failure failure;
    if (frame_check(delivery->bytes, delivery->size, 1, &failure) < 0) {
        world_trace(self, node, failure.text);
        return;
    }
    struct frame frame = {(const struct frame_header *)delivery->bytes,
                          delivery->bytes + sizeof(struct frame_header)};
    char line[96];
    snprintf(line, sizeof line, "<- frame kind %u from %u batch %llu layer %u part %u attempt %u",
             frame.header->kind, frame.header->from, (unsigned long long)frame.header->batch,
             frame.header->layer, frame.header->part, frame.header->attempt);
    world_trace(self, node, line);
    node->frame = delivery->bytes;
    delivery->bytes = NULL;
    step_node(self, node, &(struct event){.kind = EVENT_FRAME, .frame = &frame});
    if (node->computed_count == 0)
        drop_frame(node);
}

static void step_loaded(struct world *self, struct node *node, struct delivery *delivery) {
    struct event event = {.kind = EVENT_LOADED};
    event.loaded.layer = delivery->layer;
    event.loaded.expert = delivery->expert;
    event.loaded.operation = delivery->operation;
    if (delivery->weights != NULL) {
        event.loaded.bytes = model_expert_bytes(self->options.model, delivery->layer);
        engine_expert_publish(node->engine, delivery->layer, delivery->expert, &delivery->weights);
    } else {
        event.loaded.error = delivery->failure.code;
        event.loaded.text = delivery->failure.text;
    }
    step_node(self, node, &event);
}

static void deliver(struct world *self, struct node *node, struct delivery *delivery) {
    struct event event = {0};
    switch (delivery->kind) {
    case DELIVER_START:
        event.kind = EVENT_START;
        step_node(self, node, &event);
        break;
    case DELIVER_MESSAGE:
        step_message(self, node, delivery);
        break;
    case DELIVER_FRAME:
        step_frame(self, node, delivery);
        break;
    case DELIVER_COMPUTED:
        break; /* kept in the node, see next_computed */
    case DELIVER_LOADED:
        step_loaded(self, node, delivery);
        break;
    case DELIVER_HTTP:
        event.kind = EVENT_HTTP_REQUEST;
        event.http = delivery->http;
        step_node(self, node, &event);
        break;
    case DELIVER_CLIENT_GONE:
        event.kind = EVENT_CLIENT_GONE;
        event.client = delivery->client;
        step_node(self, node, &event);
        break;
    case DELIVER_PEER_LOST:
        event.kind = EVENT_PEER_LOST;
        event.peer.id = delivery->peer;
        event.peer.incarnation = delivery->peer_incarnation;
        step_node(self, node, &event);
        break;
    }
}

/* When the node's next own event is due: a computed program, else its deadline. NEVER if there is none. */
static uint64_t node_due(const struct world *self, const struct node *node) {
    if (!node->alive)
        return node->restart_at_ns;
    uint64_t free_ns = node_free_ns(self, node);
    if (node->computed_count > 0)
        return free_ns;
    uint64_t due = actor_deadline(node->actor);
    return due > free_ns ? due : free_ns;
}

/* Whoever is woken so often without time passing would take a whole processor in a real process. */
static void step_timer(struct world *self, struct node *node) {
    const struct world_watch *watch = self->options.watch;
    node->woken = node->woken_ns == self->now_ns ? node->woken + 1 : 1;
    node->woken_ns = self->now_ns;
    if (node->woken == WOKEN_AT_ONCE_MAX && watch != NULL && watch->spins != NULL)
        watch->spins(watch->context, node_place(node));
    step_node(self, node, &(struct event){.kind = EVENT_TIMER});
}

static void step_own_event(struct world *self, struct node *node) {
    if (!node->alive) {
        node_start(self, node);
    } else if (node->computed_count > 0) {
        struct program_result result = node->computed[node->computed_first];
        node->computed_first = (node->computed_first + 1) % COMPUTED_MAX;
        node->computed_count--;
        step_node(self, node, &(struct event){.kind = EVENT_COMPUTED, .computed = &result});
        if (node->computed_count == 0)
            drop_frame(node);
    } else {
        step_timer(self, node);
    }
}

/* A delivery that finds its node busy or with a computed program to hear of first waits; it keeps its number, so order is kept. */
static bool put_back(struct world *self, struct delivery *delivery) {
    struct node *node = &self->node[delivery->node];
    uint64_t free_ns = node_free_ns(self, node);
    if (!node->alive || (node->computed_count == 0 && free_ns <= self->now_ns))
        return false;
    delivery->time_ns = free_ns;
    queue_push(&self->queue, delivery);
    return true;
}

/* The node with the earliest own event; NULL: none has any. */
static struct node *next_node(const struct world *self, uint64_t *ret_due_ns) {
    struct node *next = NULL;
    *ret_due_ns = NEVER;
    for (uint32_t i = 0; i < self->nodes; i++) {
        uint64_t at = node_due(self, &self->node[i]);
        if (at < *ret_due_ns) {
            *ret_due_ns = at;
            next = &self->node[i];
        }
    }
    return next;
}

uint64_t world_next_ns(const struct world *self) {
    uint64_t due;
    next_node(self, &due);
    const struct delivery *first = queue_peek(&self->queue);
    uint64_t next = first != NULL && first->time_ns < due ? first->time_ns : due;
    return next == NEVER || next > self->now_ns ? next : self->now_ns;
}

void world_wait(struct world *self, uint64_t now_ns) {
    uint64_t next = world_next_ns(self);
    now_ns = now_ns < next ? now_ns : next;
    if (now_ns > self->now_ns)
        self->now_ns = now_ns;
}

bool world_step(struct world *self) {
    uint64_t due;
    struct node *next = next_node(self, &due);
    const struct delivery *first = queue_peek(&self->queue);
    if (first == NULL && next == NULL)
        return false;
    if (next != NULL && (first == NULL || due <= first->time_ns)) {
        self->now_ns = due > self->now_ns ? due : self->now_ns;
        step_own_event(self, next);
        return true;
    }
    struct delivery *delivery = queue_pop(&self->queue);
    self->now_ns = delivery->time_ns > self->now_ns ? delivery->time_ns : self->now_ns;
    struct node *node = &self->node[delivery->node];
    if (put_back(self, delivery))
        return true;
    if (node->alive &&
        (delivery->incarnation == 0 || delivery->incarnation == node->identity.incarnation))
        deliver(self, node, delivery);
    delivery_free(&delivery);
    return true;
}

uint64_t world_now_ns(const struct world *self) {
    return self->now_ns;
}

uint64_t world_trace_hash(const struct world *self) {
    return self->hash;
}

