/* What comes from outside: clients, crashes, pauses. */
#include <stdlib.h>
#include <string.h>

#include "proto/wire.h"
#include "simulator/internal.h"

#define GATEWAY_NODE 1u

/* ---- clients ---- */

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

/* A client talks to the process that lives now, and to no later one. */
static void deliver_to_gateway(struct world *self, struct delivery *delivery) {
    delivery->incarnation = self->node[GATEWAY_NODE].identity.incarnation;
    queue_push(&self->queue, delivery);
}

static struct http_request *copy_request(const struct http_request *request) {
    size_t size = sizeof *request + string_bytes(request->method) + string_bytes(request->path) +
                  string_bytes(request->query) + string_bytes(request->authorization) +
                  string_bytes(request->request_id) + string_bytes(request->stream_resume) +
                  string_bytes(request->last_event_id) + request->body_bytes + 1;
    struct http_request *copy = calloc(1, size);
    ASSERT(copy != NULL);
    char *at = (char *)(copy + 1);
    copy->client = request->client;
    copy->method = copy_string(&at, request->method);
    copy->path = copy_string(&at, request->path);
    copy->query = copy_string(&at, request->query);
    copy->authorization = copy_string(&at, request->authorization);
    copy->request_id = copy_string(&at, request->request_id);
    copy->stream_resume = copy_string(&at, request->stream_resume);
    copy->last_event_id = copy_string(&at, request->last_event_id);
    copy->body = at;
    copy->body_bytes = request->body_bytes;
    if (request->body_bytes > 0)
        memcpy(at, request->body, request->body_bytes);
    return copy;
}

void world_http(struct world *self, const struct http_request *request) {
    struct delivery *delivery = delivery_new(DELIVER_HTTP, GATEWAY_NODE, self->now_ns);
    delivery->http = copy_request(request);
    deliver_to_gateway(self, delivery);
}

void world_admin(struct world *self, const struct http_request *request) {
    const struct node *node = &self->node[0];
    struct delivery *delivery = delivery_new(DELIVER_HTTP, 0, self->now_ns);
    delivery->http = copy_request(request);
    delivery->incarnation = node->identity.incarnation;
    if (node->alive)
        queue_push(&self->queue, delivery);
    else
        delivery_free(&delivery);
}

void world_client_gone(struct world *self, uint64_t client) {
    struct delivery *delivery = delivery_new(DELIVER_CLIENT_GONE, GATEWAY_NODE, self->now_ns);
    delivery->client = client;
    deliver_to_gateway(self, delivery);
}

/* ---- questions ---- */

struct actor *world_actor(struct world *self, enum role role, uint32_t index) {
    struct node *node = world_node(self, (struct place){role, index});
    return node != NULL && node->alive ? node->actor : NULL;
}

bool world_has(const struct world *self, struct place place) {
    return world_node(self, place) != NULL;
}

bool world_lost_for_good(const struct world *self, struct place place) {
    const struct node *node = world_node(self, place);
    return node != NULL && node->for_good && !node->alive;
}

bool world_holds(const struct world *self, uint32_t expert_process, uint32_t layer, uint32_t expert) {
    const struct node *node = world_node(self, (struct place){ROLE_EXPERT, expert_process});
    return node != NULL && node->alive && engine_expert_held(node->engine, layer, expert);
}

/* ---- the end of a process ---- */

/* The supervisor of the process host sees an exit at once and tells the coordinator; so does the world. */
static void tell_coordinator(struct world *self, const struct node *node) {
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
    delivery->bytes = world_bytes(delivery->size);
    wire_pack(&envelope, delivery->bytes);
    queue_push(&self->queue, delivery);
}

static void tell_peer(struct world *self, const struct node *lost, uint32_t to) {
    const struct node *peer = &self->node[to];
    for (uint32_t i = 0; peer->alive && i < ACTORS_MAX; i++)
        if (peer->peer[i].known && &self->node[peer->peer[i].node] == lost &&
            peer->peer[i].incarnation == lost->identity.incarnation) {
            struct delivery *delivery = delivery_new(DELIVER_PEER_LOST, to, self->now_ns);
            delivery->incarnation = peer->identity.incarnation;
            delivery->peer = peer->peer[i].id;
            delivery->peer_incarnation = lost->identity.incarnation;
            queue_push(&self->queue, delivery);
        }
}

void outside_tell_end(struct world *self, const struct node *node) {
    if (node != &self->node[0] && self->node[0].alive)
        tell_coordinator(self, node);
}

static void end(struct world *self, struct node *node, const char *what) {
    world_trace(self, node, what);
    node_stop(self, node);
}

void world_kill(struct world *self, enum role role, uint32_t index) {
    struct node *node = world_node(self, (struct place){role, index});
    ASSERT(node != NULL);
    if (!node->alive)
        return;
    end(self, node, "killed");
    node->restart_at_ns = NEVER;
    outside_tell_end(self, node);
}

void world_restart(struct world *self, enum role role, uint32_t index) {
    struct node *node = world_node(self, (struct place){role, index});
    ASSERT(node != NULL);
    if (node->alive)
        node_stop(self, node);
    node_start(self, node);
}

void world_crash(struct world *self, struct place place, uint64_t for_ns, bool silent) {
    struct node *node = world_node(self, place);
    if (node == NULL)
        return;
    if (for_ns == FOR_GOOD)
        node->for_good = true;
    if (node->for_good)
        node->restart_at_ns = NEVER;
    if (!node->alive)
        return;
    end(self, node, silent ? "crashes, and nobody is told" : "crashes");
    node->restart_at_ns = node->for_good ? NEVER : self->now_ns + for_ns;
    if (silent)
        return;
    outside_tell_end(self, node);
    for (uint32_t i = 0; i < self->nodes; i++)
        tell_peer(self, node, i);
}

void world_pause(struct world *self, struct place place, uint64_t until_ns) {
    struct node *node = world_node(self, place);
    if (node == NULL || !node->alive)
        return;
    world_trace(self, node, "is stopped");
    if (until_ns > node->paused_until_ns)
        node->paused_until_ns = until_ns;
}

void world_calm(struct world *self) {
    struct world_options *options = &self->options;
    options->loss = options->duplicate = options->frame_loss = 0;
    if (options->delay_max_ns > 1000000)
        options->delay_max_ns = 1000000;
    if (options->delay_min_ns > options->delay_max_ns)
        options->delay_min_ns = options->delay_max_ns;
    if (options->frame_delay_max_ns > 100000)
        options->frame_delay_max_ns = 100000;
    if (options->frame_delay_min_ns > options->frame_delay_max_ns)
        options->frame_delay_min_ns = options->frame_delay_max_ns;
}
