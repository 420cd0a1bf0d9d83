/* The simulated world: every actor of a troupe as a node, one queue of deliveries, one clock that only deliveries move.
 *
 * A node behaves as a process of the process host does: one event at a time; a COMPUTE effect runs at once and keeps the node busy for
 * compute_ns; its COMPUTED event is stepped before any other event of that node. Control messages travel packed and are
 * unpacked and checked on arrival; frames travel as bytes with their CRC, for one incarnation of the receiver only.
 *
 * Invariants: 1. the clock never goes back; 2. a dead node receives nothing; 3. nothing but `random` decides what is not decided by the
 * actors, so (seed, options, calls) fix the trace hash. */
#include "simulator/world.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/wire.h"
#include "simulator/queue.h"
#include "simulator/random.h"

#define NAME_BYTES 48
#define COMPUTED_MAX (2 * LAYERS_MAX + 64)

struct peer {
    uint32_t node;
    uint64_t incarnation;
    bool known;
};

struct node {
    enum role role;
    uint32_t index;
    char name[NAME_BYTES], address[sizeof "sim://" + NAME_BYTES];
    struct actor_identity identity;
    struct actor *actor;
    struct engine *engine;
    struct effects effects;
    bool alive;
    uint64_t busy_until_ns;
    struct peer peer[ACTORS_MAX]; /* by actor id, modulo the table: ids grow, few are alive */
    struct program_result computed[COMPUTED_MAX];
    uint32_t computed_first, computed_count;
};

struct world {
    struct world_options options;
    struct random random;
    struct queue queue;
    struct node *node;
    uint32_t nodes;
    uint64_t now_ns, hash, last_incarnation;
};

static void hash_bytes(struct world *self, const void *bytes, size_t size) {
    const uint8_t *at = bytes;
    for (size_t i = 0; i < size; i++)
        self->hash = (self->hash ^ at[i]) * 0x100000001b3u;
}

static void hash_word(struct world *self, uint64_t word) {
    hash_bytes(self, &word, sizeof word);
}

static void trace(struct world *self, const struct node *node, const char *what) {
    hash_word(self, self->now_ns);
    hash_bytes(self, node->name, strlen(node->name));
    hash_bytes(self, what, strlen(what));
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
    };
    switch (node->role) {
    case ROLE_ATTENTION:
        options.role = ENGINE_ATTENTION;
        options.batch_rows = settings->batch_tokens;
        options.pages = settings->kv_cache_tokens / PAGE_TOKENS;
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

static struct actor *create_actor(struct world *self, struct node *node) {
    const struct settings *settings = &self->options.settings;
    const struct model_config *config = model_config(self->options.model);
    switch (node->role) {
    case ROLE_COORDINATOR:
        return coordinator_create(&node->identity, settings, config);
    case ROLE_ATTENTION:
        return attention_create(&node->identity, settings, config);
    case ROLE_EXPERT:
        return expert_create(&node->identity, settings, config, 0);
    case ROLE_SAMPLER:
        return sampler_create(&node->identity, settings, config);
    default:
        if (self->options.gateway.tokenizer != NULL)
            return gateway_create(&node->identity, settings, config, &self->options.gateway);
        return probe_create(&node->identity, settings, config, self->options.probes,
                            self->options.probe_count);
    }
}

static int start_node(struct world *self, struct node *node, struct failure *failure) {
    node->identity.incarnation = ++self->last_incarnation | random_next(&self->random) << 20;
    int result = open_engine(self, node, failure);
    if (result < 0)
        return result;
    node->actor = create_actor(self, node);
    ASSERT(node->actor != NULL);
    node->alive = true;
    node->busy_until_ns = 0;
    node->computed_count = 0;
    memset(node->peer, 0, sizeof node->peer);
    struct delivery *start =
        delivery_new(DELIVER_START, (uint32_t)(node - self->node), self->now_ns);
    start->incarnation = node->identity.incarnation;
    queue_push(&self->queue, start);
    return 0;
}

static void stop_node(struct node *node) {
    node->alive = false;
    if (node->actor != NULL)
        actor_destroy(&node->actor);
    if (node->engine != NULL)
        engine_close(&node->engine);
}

static struct node *find_node(struct world *self, enum role role, uint32_t index) {
    for (uint32_t i = 0; i < self->nodes; i++)
        if (self->node[i].role == role && self->node[i].index == index)
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
            .host = "world",
            .coordinator_address = self->node[0].address,
            .model_fingerprint = model_fingerprint(self->options.model),
            .numerics = self->options.kernels->profile == PROFILE_F32 ? "f32" : "bf16",
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
        int result = start_node(self, &self->node[i], failure);
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
        stop_node(&self->node[i]);
        effects_free(&self->node[i].effects);
    }
    queue_free(&self->queue);
    free(self->node);
    free(self);
    *world = NULL;
}

/* ---- effects ---- */

static uint8_t *aligned_bytes(size_t size) {
    uint8_t *bytes = aligned_alloc(FRAME_ALIGN, (size + FRAME_ALIGN - 1) / FRAME_ALIGN * FRAME_ALIGN);
    ASSERT(bytes != NULL);
    return bytes;
}

static const struct peer *find_peer(const struct node *node, actor_id id) {
    const struct peer *peer = &node->peer[id % ACTORS_MAX];
    return peer->known ? peer : NULL;
}

static void deliver_message(struct world *self, uint32_t to, const uint8_t *bytes, size_t size,
                            uint64_t time_ns) {
    uint64_t delay =
        random_between(&self->random, self->options.delay_min_ns, self->options.delay_max_ns);
    if (random_chance(&self->random, self->options.loss))
        return;
    struct delivery *delivery = delivery_new(DELIVER_MESSAGE, to, time_ns + delay);
    delivery->bytes = aligned_bytes(size);
    memcpy(delivery->bytes, bytes, size);
    delivery->size = size;
    queue_push(&self->queue, delivery);
}

static void carry_send(struct world *self, struct node *node, const struct effect *effect,
                       uint64_t time_ns) {
    const struct peer *peer = find_peer(node, effect->send.to);
    hash_bytes(self, effect->send.bytes, effect->send.size);
    if (peer == NULL)
        return;
    deliver_message(self, peer->node, effect->send.bytes, effect->send.size, time_ns);
    if (random_chance(&self->random, self->options.duplicate))
        deliver_message(self, peer->node, effect->send.bytes, effect->send.size, time_ns);
}

/* Writes the frame as the process host does: header, prefix, padding, gathered rows, checksum. */
static uint8_t *build_frame(const struct node *node, const struct effect *effect, size_t *ret_size) {
    struct frame_header header = effect->transfer.header;
    if (effect->transfer.region != REGION_NONE)
        header.row_bytes = engine_row_bytes(node->engine, effect->transfer.region);
    size_t size = frame_bytes(header.kind, header.rows, header.items, header.groups, header.row_bytes);
    ASSERT(size >= sizeof header);
    uint8_t *bytes = aligned_bytes(size);
    memset(bytes, 0, size);
    header.magic = FRAME_MAGIC;
    header.version = FRAME_VERSION;
    header.payload_bytes = (uint32_t)(size - sizeof header);
    memcpy(bytes, &header, sizeof header);
    if (effect->transfer.prefix_bytes > 0)
        memcpy(bytes + sizeof header, effect->transfer.prefix, effect->transfer.prefix_bytes);
    if (effect->transfer.region != REGION_NONE) {
        size_t offset = frame_rows_offset(header.kind, header.rows, header.items, header.groups);
        engine_gather(node->engine, effect->transfer.region, effect->transfer.slot,
                      effect->transfer.index, effect->transfer.count, bytes + offset);
    }
    *ret_size = size;
    return bytes;
}

static void carry_transfer(struct world *self, struct node *node, const struct effect *effect,
                           uint64_t time_ns) {
    const struct peer *peer = find_peer(node, effect->transfer.header.to);
    if (peer == NULL)
        return;
    size_t size;
    uint8_t *bytes = build_frame(node, effect, &size);
    struct frame_header *header = (struct frame_header *)bytes;
    header->from_incarnation = node->identity.incarnation;
    frame_seal(header);
    hash_word(self, header->crc);
    uint64_t delay = random_between(&self->random, self->options.frame_delay_min_ns,
                                    self->options.frame_delay_max_ns);
    if (random_chance(&self->random, self->options.frame_loss)) {
        free(bytes);
        return;
    }
    struct delivery *frame = delivery_new(DELIVER_FRAME, peer->node, time_ns + delay);
    frame->incarnation = peer->incarnation;
    frame->bytes = bytes;
    frame->size = size;
    queue_push(&self->queue, frame);
}

static void carry_compute(struct world *self, struct node *node, const struct effect *effect) {
    ASSERT(node->computed_count < COMPUTED_MAX && node->engine != NULL);
    uint32_t at = (node->computed_first + node->computed_count++) % COMPUTED_MAX;
    engine_run(node->engine, &effect->compute, &node->computed[at]);
    uint64_t from = node->busy_until_ns > self->now_ns ? node->busy_until_ns : self->now_ns;
    node->busy_until_ns = from + self->options.compute_ns;
}

static void carry_load(struct world *self, struct node *node, const struct effect *effect) {
    struct delivery *loaded = delivery_new(DELIVER_LOADED, (uint32_t)(node - self->node),
                                           self->now_ns + self->options.compute_ns);
    loaded->incarnation = node->identity.incarnation;
    loaded->layer = effect->load.layer;
    loaded->expert = effect->load.expert;
    loaded->operation = effect->load.operation;
    engine_expert_pack(self->options.model, self->options.kernels, loaded->layer, loaded->expert,
                       &loaded->weights, &loaded->failure);
    queue_push(&self->queue, loaded);
}

static void carry_connect(struct world *self, struct node *node, const struct effect *effect) {
    struct peer *peer = &node->peer[effect->connect.id % ACTORS_MAX];
    *peer = (struct peer){0};
    for (uint32_t i = 0; i < self->nodes; i++)
        if (strcmp(self->node[i].address, effect->connect.control_address) == 0)
            *peer = (struct peer){i, effect->connect.incarnation, true};
}

static void carry_stream(struct world *self, const struct effect *effect) {
    hash_word(self, effect->stream.client);
    hash_bytes(self, effect->stream.bytes, effect->stream.size);
    if (self->options.stream != NULL)
        self->options.stream(self->options.context, effect);
}

static bool carry_out(struct world *self, struct node *node, const struct effect *effect) {
    uint64_t time_ns = node->busy_until_ns > self->now_ns ? node->busy_until_ns : self->now_ns;
    switch (effect->kind) {
    case EFFECT_SEND:
        carry_send(self, node, effect, time_ns);
        break;
    case EFFECT_TRANSFER:
        carry_transfer(self, node, effect, time_ns);
        break;
    case EFFECT_COMPUTE:
        carry_compute(self, node, effect);
        break;
    case EFFECT_STREAM:
        carry_stream(self, effect);
        break;
    case EFFECT_LOAD:
        carry_load(self, node, effect);
        break;
    case EFFECT_UNLOAD:
        engine_expert_drop(node->engine, effect->load.layer, effect->load.expert);
        break;
    case EFFECT_CONNECT:
        carry_connect(self, node, effect);
        break;
    case EFFECT_DISCONNECT:
        node->peer[effect->connect.id % ACTORS_MAX].known = false;
        break;
    case EFFECT_TRACE:
        trace(self, node, effect->trace.text);
        break;
    case EFFECT_EXIT:
        trace(self, node, "exits");
        return false;
    }
    return true;
}

/* ---- deliveries ---- */

static void step_node(struct world *self, struct node *node, const struct event *event) {
    struct effects *effects = &node->effects;
    effects_reset(effects);
    actor_step(node->actor, event, self->now_ns, effects);
    hash_word(self, event->kind);
    for (uint32_t i = 0; i < effects->count; i++) {
        hash_word(self, effects->list[i].kind);
        if (!carry_out(self, node, &effects->list[i])) {
            stop_node(node);
            return;
        }
    }
}

static void trace_message(struct world *self, const struct node *node, const message *envelope) {
    char line[96];
    snprintf(line, sizeof line, "<- %s from %u", wire_name(envelope), envelope->from);
    trace(self, node, line);
}

static void step_message(struct world *self, struct node *node, const struct delivery *delivery) {
    Troupe__Envelope *envelope;
    struct failure failure;
    if (wire_unpack(&envelope, delivery->bytes, delivery->size, &failure) < 0) {
        trace(self, node, failure.text);
        return;
    }
    trace_message(self, node, envelope);
    step_node(self, node, &(struct event){.kind = EVENT_MESSAGE, .message = envelope});
    wire_free(&envelope);
}

static void step_frame(struct world *self, struct node *node, const struct delivery *delivery) {
    struct failure failure;
    if (frame_check(delivery->bytes, delivery->size, 1, &failure) < 0) {
        trace(self, node, failure.text);
        return;
    }
    struct frame frame = {(const struct frame_header *)delivery->bytes,
                          delivery->bytes + sizeof(struct frame_header)};
    char line[96];
    snprintf(line, sizeof line, "<- frame kind %u from %u batch %llu layer %u part %u attempt %u",
             frame.header->kind, frame.header->from, (unsigned long long)frame.header->batch,
             frame.header->layer, frame.header->part, frame.header->attempt);
    trace(self, node, line);
    step_node(self, node, &(struct event){.kind = EVENT_FRAME, .frame = &frame});
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
        return NEVER;
    if (node->computed_count > 0)
        return node->busy_until_ns > self->now_ns ? node->busy_until_ns : self->now_ns;
    uint64_t due = actor_deadline(node->actor);
    return due == NEVER || due > node->busy_until_ns ? due : node->busy_until_ns;
}

static void step_own_event(struct world *self, struct node *node) {
    if (node->computed_count > 0) {
        struct program_result result = node->computed[node->computed_first];
        node->computed_first = (node->computed_first + 1) % COMPUTED_MAX;
        node->computed_count--;
        step_node(self, node, &(struct event){.kind = EVENT_COMPUTED, .computed = &result});
    } else {
        step_node(self, node, &(struct event){.kind = EVENT_TIMER});
    }
}

/* A delivery that finds its node busy or with a computed program to hear of first waits; it keeps its number, so order is kept. */
static bool put_back(struct world *self, struct delivery *delivery) {
    struct node *node = &self->node[delivery->node];
    if (!node->alive || (node->computed_count == 0 && node->busy_until_ns <= self->now_ns))
        return false;
    delivery->time_ns = node->busy_until_ns > self->now_ns ? node->busy_until_ns : self->now_ns;
    queue_push(&self->queue, delivery);
    return true;
}

bool world_step(struct world *self) {
    struct node *next = NULL;
    uint64_t due = NEVER;
    for (uint32_t i = 0; i < self->nodes; i++) {
        uint64_t at = node_due(self, &self->node[i]);
        if (at < due) {
            due = at;
            next = &self->node[i];
        }
    }
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

/* ---- what the outside does ---- */

static const char *copy_string(char **at, const char *text) {
    if (text == NULL)
        return NULL;
    size_t size = strlen(text) + 1;
    char *copy = memcpy(*at, text, size);
    *at += size;
    return copy;
}

static size_t string_bytes(const char *text) {
    return text == NULL ? 0 : strlen(text) + 1;
}

void world_http(struct world *self, const struct http_request *request) {
    size_t size = sizeof *request + string_bytes(request->method) + string_bytes(request->path) +
                  string_bytes(request->query) + string_bytes(request->authorization) +
                  string_bytes(request->request_id) + request->body_bytes + 1;
    struct http_request *copy = calloc(1, size);
    ASSERT(copy != NULL);
    char *at = (char *)(copy + 1);
    copy->client = request->client;
    copy->method = copy_string(&at, request->method);
    copy->path = copy_string(&at, request->path);
    copy->query = copy_string(&at, request->query);
    copy->authorization = copy_string(&at, request->authorization);
    copy->request_id = copy_string(&at, request->request_id);
    copy->body = at;
    copy->body_bytes = request->body_bytes;
    if (request->body_bytes > 0)
        memcpy(at, request->body, request->body_bytes);
    struct delivery *delivery = delivery_new(DELIVER_HTTP, 1, self->now_ns);
    delivery->http = copy;
    queue_push(&self->queue, delivery);
}

void world_client_gone(struct world *self, uint64_t client) {
    struct delivery *delivery = delivery_new(DELIVER_CLIENT_GONE, 1, self->now_ns);
    delivery->client = client;
    queue_push(&self->queue, delivery);
}

struct actor *world_actor(struct world *self, enum role role, uint32_t index) {
    struct node *node = find_node(self, role, index);
    return node != NULL && node->alive ? node->actor : NULL;
}

/* The supervisor of the process host sees an exit at once and tells the coordinator; so does the world. */
static void report_exit(struct world *self, const struct node *node) {
    struct node *coordinator = &self->node[0];
    if (node == coordinator || !coordinator->alive)
        return;
    Troupe__Envelope envelope = TROUPE__ENVELOPE__INIT;
    Troupe__PeerExited exited = TROUPE__PEER_EXITED__INIT;
    exited.pid = node->identity.pid;
    exited.host = (char *)node->identity.host;
    exited.incarnation = node->identity.incarnation;
    envelope.protocol_version = WIRE_PROTOCOL_VERSION;
    envelope.from_incarnation = 1;
    envelope.body_case = TROUPE__ENVELOPE__BODY_PEER_EXITED;
    envelope.peer_exited = &exited;
    struct delivery *delivery = delivery_new(DELIVER_MESSAGE, 0, self->now_ns);
    delivery->size = wire_packed_bytes(&envelope);
    delivery->bytes = aligned_bytes(delivery->size);
    wire_pack(&envelope, delivery->bytes);
    queue_push(&self->queue, delivery);
}

void world_kill(struct world *self, enum role role, uint32_t index) {
    struct node *node = find_node(self, role, index);
    ASSERT(node != NULL);
    if (!node->alive)
        return;
    trace(self, node, "killed");
    stop_node(node);
    report_exit(self, node);
}

void world_restart(struct world *self, enum role role, uint32_t index) {
    struct node *node = find_node(self, role, index);
    ASSERT(node != NULL);
    stop_node(node);
    trace(self, node, "restarted");
    struct failure failure;
    ASSERT(start_node(self, node, &failure) == 0);
}
