/* Effects carried out: see internal.h. */
#include <stdlib.h>
#include <string.h>

#include "simulator/internal.h"

/* ---- effects ---- */

uint8_t *world_bytes(size_t size) {
    uint8_t *bytes = aligned_alloc(FRAME_ALIGN, (size + FRAME_ALIGN - 1) / FRAME_ALIGN * FRAME_ALIGN);
    ASSERT(bytes != NULL);
    return bytes;
}

static const struct connection *find_peer(const struct node *node, actor_id id) {
    const struct connection *peer = &node->peer[id % ACTORS_MAX];
    return peer->known ? peer : NULL;
}

static void carry_send(struct world *self, struct node *node, const struct effect *effect,
                       uint64_t time_ns) {
    const struct connection *peer = find_peer(node, effect->send.to);
    world_hash(self, effect->send.bytes, effect->send.size);
    if (peer != NULL)
        network_send_message(self, node, peer->node, effect->send.bytes, effect->send.size, time_ns);
}

/* Writes the frame as the process host does: header, prefix, padding, gathered rows, checksum. */
static uint8_t *build_frame(const struct node *node, const struct effect *effect, size_t *ret_size) {
    struct frame_header header = effect->transfer.header;
    if (effect->transfer.region != REGION_NONE)
        header.row_bytes = engine_row_bytes(node->engine, effect->transfer.region);
    size_t size = frame_bytes(header.kind, header.rows, header.items, header.groups, header.row_bytes);
    ASSERT(size >= sizeof header);
    uint8_t *bytes = world_bytes(size);
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

/* Lies of an expert process: wrong rows under a right checksum. */
static void lie(struct world *self, const struct node *node, uint8_t *bytes) {
    struct frame_header *header = (struct frame_header *)bytes;
    struct faults *faults = self->options.faults;
    for (uint32_t i = 0; faults != NULL && header->kind == FRAME_COMBINE && i < faults->count; i++) {
        struct fault *fault = &faults->list[i];
        if (fault->kind != FAULT_LIE || !fault_is_active(fault, self->now_ns) ||
            !place_matches(fault->from, node_place(node)))
            continue;
        uint8_t *rows = bytes + frame_rows_offset(header->kind, header->rows, header->items, header->groups);
        for (uint32_t item = 0; item < header->items; item++) {
            if (random_between(&fault->random, 0, 999) >= fault->share_permille)
                continue;
            uint64_t place = fault->steady ? 0 : random_between(&fault->random, 0, header->row_bytes / 4 - 1);
            uint32_t mask = fault->steady ? 0x10000u : (uint32_t)random_between(&fault->random, 1, UINT32_MAX);
            uint32_t *word = (uint32_t *)(rows + (size_t)item * header->row_bytes) + place;
            *word ^= mask;
            if (self->options.watch != NULL && self->options.watch->lied != NULL)
                self->options.watch->lied(self->options.watch->context, node_place(node));
        }
    }
}

static void carry_transfer(struct world *self, struct node *node, const struct effect *effect,
                           uint64_t time_ns) {
    const struct connection *peer = find_peer(node, effect->transfer.header.to);
    if (peer == NULL)
        return;
    size_t size;
    uint8_t *bytes = build_frame(node, effect, &size);
    struct frame_header *header = (struct frame_header *)bytes;
    header->from_incarnation = node->identity.incarnation;
    lie(self, node, bytes);
    frame_seal(header);
    world_hash_word(self, header->crc);
    network_send_frame(self, node, peer->node, peer->incarnation, bytes, size, time_ns);
}

static void carry_compute(struct world *self, struct node *node, const struct effect *effect) {
    ASSERT(node->computed_count < COMPUTED_MAX && node->engine != NULL);
    uint32_t at = (node->computed_first + node->computed_count++) % COMPUTED_MAX;
    engine_run(node->engine, &effect->compute, &node->computed[at]);
    uint64_t from = node->busy_until_ns > self->now_ns ? node->busy_until_ns : self->now_ns;
    node->busy_until_ns = from + self->options.compute_ns * network_slowness(self, node);
}

static bool load_fails(const struct world *self, const struct node *node, struct failure *failure) {
    const struct faults *faults = self->options.faults;
    for (uint32_t i = 0; faults != NULL && i < faults->count; i++) {
        const struct fault *fault = &faults->list[i];
        if (!fault_is_active(fault, self->now_ns) || !place_matches(fault->from, node_place(node)))
            continue;
        if (fault->kind == FAULT_DISK_ERROR)
            return fail(failure, ERR_IO, "the disk does not read") < 0;
        if (fault->kind == FAULT_SHORT_READ)
            return fail(failure, ERR_CORRUPT, "the file ends early") < 0;
        if (fault->kind == FAULT_NO_MEMORY)
            return fail(failure, ERR_NO_MEMORY, "no memory for weights") < 0;
    }
    return false;
}

static void carry_load(struct world *self, struct node *node, const struct effect *effect) {
    uint64_t takes_ns = self->options.load_ns > 0 ? self->options.load_ns : self->options.compute_ns;
    takes_ns *= network_slowness(self, node);
    struct delivery *loaded =
        delivery_new(DELIVER_LOADED, (uint32_t)(node - self->node), self->now_ns + takes_ns);
    loaded->incarnation = node->identity.incarnation;
    loaded->layer = effect->load.layer;
    loaded->expert = effect->load.expert;
    loaded->operation = effect->load.operation;
    if (effect->load.image != NULL) {
        engine_expert_unpack(model_config(self->options.model), self->options.kernels, loaded->layer,
                             loaded->expert, effect->load.image, effect->load.image_bytes,
                             &loaded->weights, &loaded->failure);
        free(effect->load.image);
    } else if (!load_fails(self, node, &loaded->failure))
        engine_expert_pack(self->options.model, self->options.kernels, loaded->layer, loaded->expert,
                           &loaded->weights, &loaded->failure);
    queue_push(&self->queue, loaded);
}

static void carry_connect(struct world *self, struct node *node, const struct effect *effect) {
    struct connection *peer = &node->peer[effect->connect.id % ACTORS_MAX];
    *peer = (struct connection){0};
    for (uint32_t i = 0; i < self->nodes; i++)
        if (strcmp(self->node[i].address, effect->connect.control_address) == 0)
            *peer = (struct connection){effect->connect.id, i, effect->connect.incarnation, true};
}

static void carry_stream(struct world *self, const struct effect *effect) {
    world_hash_word(self, effect->stream.client);
    world_hash(self, effect->stream.bytes, effect->stream.size);
    if (self->options.stream != NULL)
        self->options.stream(self->options.context, effect);
}

bool world_carry_out(struct world *self, struct node *node, const struct effect *effect) {
    uint64_t time_ns = node->busy_until_ns > self->now_ns ? node->busy_until_ns : self->now_ns;
    const struct world_watch *watch = self->options.watch;
    if (watch != NULL && watch->effect != NULL)
        watch->effect(watch->context, node_place(node), effect);
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
        world_trace(self, node, effect->trace.text);
        break;
    case EFFECT_RELAY: /* nobody asks for them here */
    case EFFECT_FAULT:
    case EFFECT_JOURNAL:
        break;
    case EFFECT_EXIT:
        world_trace(self, node, "exits");
        return false;
    }
    return true;
}

