/* The data plane between GPUs: frames as transport_shm.c and transport_zmq.c carry them, moved by
 * NCCL from device memory to device memory. What an edge does next is decided in nccl_edge.c; what
 * may take long is done in nccl_keeper.c; this file carries out the rest and asks the device how
 * far it is.
 *
 * A frame's way: post_send writes it into a page-locked slot and announces it to the peer over
 * ZeroMQ; flush copies the slot to the device and launches ncclSend on the lane's stream. The peer
 * posts ncclRecv of the announced size into its slot of the same number, a copy to page-locked
 * memory behind it, and a mark; when the mark has passed the frame is checked and given out; its
 * release gives the slot back (credit). Every lane has a stream of its own, so a peer that does not
 * answer holds up nobody else's frames.
 *
 * `connected` is true only while the way out is ready: until then, and after a failure, the process
 * sends over another transport (process.c). */
#include "actors/host/transport_nccl.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "actors/host/log.h"
#include "actors/host/nccl_keeper.h"

struct waiting_frame {
    struct waiting_frame *next;
    size_t bytes;
    _Alignas(64) uint8_t data[];
};

/* How far the device is with a lane's frames: completed <= marked <= launched <= posted. */
struct progress {
    uint64_t launched; /* given to NCCL */
    uint64_t marked;   /* an event stands behind them */
};

struct nccl_wire {
    struct nccl_edge machine;
    struct nccl_port port[2];
    struct progress progress[2];
    bool unmake_later[2]; /* a frame of the slot memory is being read */
    actor_id id;
    uint64_t incarnation;
    char address[ADDRESS_BYTES_MAX];
    uint64_t delivered; /* incoming frames given out */
    struct waiting_frame *first, **last;
    size_t waiting_bytes;
    bool closing; /* disconnected: only its ports are still being taken down */
};

/* What is remembered of an edge that is gone. */
struct past {
    uint64_t incarnation;
    uint32_t generation;
};

struct nccl {
    struct transport base;
    struct transport_options options;
    struct nccl_options nccl;
    struct nccl_keeper *keeper;
    struct nccl_wire **wire;
    size_t wires, capacity, cursor;
    struct nccl_wire *held; /* of the frame that is out */
    bool held_stale;        /* its lane has failed meanwhile */
    uint32_t generation;    /* above those of all edges that are gone */
    struct past past[ACTORS_MAX];
    size_t pasts;
    struct log_limit limit;
    char description[128];
};

static struct nccl_wire *find(const struct nccl *self, actor_id id) {
    for (size_t i = 0; i < self->wires; i++) {
        if (self->wire[i]->id == id && !self->wire[i]->closing)
            return self->wire[i];
    }
    return NULL;
}

static uint8_t *slot(const struct nccl_port *port, void *memory, uint64_t sequence) {
    return (uint8_t *)memory + (size_t)(sequence % port->slots) * port->slot_bytes;
}

static void ring(void *bell) {
    bell_ring(bell);
}

/* ---- Frames on the device ---- */

static void fail_lane(struct nccl *self, struct nccl_wire *wire, enum nccl_direction lane,
                      int error);

/* Gives the posted frames of a lane to NCCL, in one group, unless it has not taken the last yet. */
static int launch(struct nccl *self, struct nccl_wire *wire, enum nccl_direction direction) {
    const struct nccl_api *api = self->nccl.api;
    struct nccl_port *port = &wire->port[direction];
    struct progress *progress = &wire->progress[direction];
    const struct nccl_lane *lane = &wire->machine.lane[direction];
    if (lane->state != LANE_READY || progress->launched == lane->posted ||
        progress->marked < progress->launched)
        return 0;
    int error = 0;
    for (uint64_t n = progress->launched; error == 0 && direction == NCCL_OUT && n < lane->posted;
         n++)
        error = api->copy_in(api->context, slot(port, port->buffer->device, n),
                             slot(port, port->buffer->pinned, n), lane->bytes[n % NCCL_SLOTS_MAX],
                             port->stream);
    if (error == 0)
        error = api->group_start(api->context);
    if (error != 0)
        return error;
    for (; error >= 0 && progress->launched < lane->posted; progress->launched++) {
        uint8_t *memory = slot(port, port->buffer->device, progress->launched);
        const size_t bytes = lane->bytes[progress->launched % NCCL_SLOTS_MAX];
        error = direction == NCCL_OUT
                    ? api->send(api->context, port->comm, memory, bytes, port->stream)
                    : api->receive(api->context, port->comm, memory, bytes, port->stream);
    }
    const int ended = api->group_end(api->context);
    return error < 0 ? error : ended < 0 ? ended : 0;
}

/* Once NCCL has put the group on the stream: marks behind it. */
static int mark(struct nccl *self, struct nccl_wire *wire, enum nccl_direction direction) {
    const struct nccl_api *api = self->nccl.api;
    struct nccl_port *port = &wire->port[direction];
    struct progress *progress = &wire->progress[direction];
    const struct nccl_lane *lane = &wire->machine.lane[direction];
    int error = api->comm_state(api->context, port->comm);
    if (error != 0)
        return error == NCCL_PENDING ? 0 : error;
    if (progress->marked == progress->launched)
        return 0;
    for (; error == 0 && progress->marked < progress->launched; progress->marked++) {
        const uint64_t n = progress->marked;
        if (direction == NCCL_IN)
            error = api->copy_out(api->context, slot(port, port->buffer->pinned, n),
                                  slot(port, port->buffer->device, n),
                                  lane->bytes[n % NCCL_SLOTS_MAX], port->stream);
        if (error == 0)
            error = api->event_record(api->context, port->event[n % port->slots], port->stream);
    }
    return error == 0 ? api->ring(api->context, ring, self->options.bell, port->stream) : error;
}

/* True if something moved. */
static bool advance(struct nccl *self, struct nccl_wire *wire, enum nccl_direction direction) {
    const struct nccl_api *api = self->nccl.api;
    struct nccl_lane *lane = &wire->machine.lane[direction];
    struct progress *progress = &wire->progress[direction];
    bool moved = false;
    if (lane->state != LANE_READY)
        return false;
    int error = launch(self, wire, direction);
    if (error == 0)
        error = mark(self, wire, direction);
    while (error == 0 && lane->completed < progress->marked) {
        const uint32_t index = (uint32_t)(lane->completed % wire->port[direction].slots);
        error = api->event_query(api->context, wire->port[direction].event[index]);
        if (error == 0) {
            nccl_edge_completed(&wire->machine, direction);
            moved = true;
        }
    }
    if (error < 0)
        fail_lane(self, wire, direction, error);
    return moved;
}

/* ---- Carrying out what the edge wants ---- */

static void unmake(struct nccl *self, struct nccl_wire *wire, enum nccl_direction lane,
                   bool orderly) {
    wire->port[lane].orderly = orderly;
    if (lane == NCCL_IN && self->held == wire) {
        self->held_stale = true;
        wire->unmake_later[lane] = true; /* at release */
        return;
    }
    nccl_keeper_ask(self->keeper, &wire->port[lane], KEEPER_UNMAKE);
}

static void carry_out(struct nccl *self, struct nccl_wire *wire,
                      const struct nccl_actions *actions) {
    for (uint32_t i = 0; i < actions->count; i++) {
        const struct nccl_action *action = &actions->list[i];
        struct nccl_port *port = &wire->port[action->lane];
        const struct nccl_lane *lane = &wire->machine.lane[action->lane];
        switch (action->kind) {
        case NCCL_DO_NAME:
            nccl_keeper_ask(self->keeper, port, KEEPER_NAME);
            break;
        case NCCL_DO_MAKE:
            port->id = lane->id;
            port->slots = lane->slots;
            port->slot_bytes = lane->slot_bytes;
            wire->progress[action->lane] = (struct progress){0, 0};
            if (action->lane == NCCL_IN)
                wire->delivered = 0;
            nccl_keeper_ask(self->keeper, port, KEEPER_MAKE);
            break;
        case NCCL_DO_UNMAKE:
            unmake(self, wire, action->lane, action->orderly);
            break;
        case NCCL_DO_MESSAGE:
            self->nccl.post.send(self->nccl.post.context, wire->id, &action->message);
            break;
        case NCCL_DO_RECEIVE:
            break; /* launched by advance, all that are posted together */
        }
    }
}

static void fail_lane(struct nccl *self, struct nccl_wire *wire, enum nccl_direction lane,
                      int error) {
    log_limited(&self->limit, TRACE_WARNING, "edge to actor %u: %s", wire->id,
                self->nccl.api->text(self->nccl.api->context, error));
    struct nccl_actions actions = {.count = 0};
    nccl_edge_failed(&wire->machine, lane, self->nccl.now_ns(), &actions);
    carry_out(self, wire, &actions);
}

/* ---- The way out ---- */

static void drop_waiting(struct nccl *self, struct nccl_wire *wire) {
    while (wire->first != NULL) {
        struct waiting_frame *frame = wire->first;
        wire->first = frame->next;
        free(frame);
        self->base.counters.dropped++;
    }
    wire->last = &wire->first;
    wire->waiting_bytes = 0;
}

static uint8_t *post(struct nccl *self, struct nccl_wire *wire, size_t bytes) {
    struct nccl_actions actions = {.count = 0};
    const uint64_t sequence =
        nccl_edge_post(&wire->machine, (uint32_t)bytes, self->nccl.now_ns(), &actions);
    carry_out(self, wire, &actions);
    self->base.counters.frames_sent++;
    self->base.counters.bytes_sent += bytes;
    return slot(&wire->port[NCCL_OUT], wire->port[NCCL_OUT].buffer->pinned, sequence);
}

static bool post_waiting(struct nccl *self, struct nccl_wire *wire) {
    bool moved = false;
    while (wire->first != NULL && nccl_edge_room(&wire->machine)) {
        struct waiting_frame *frame = wire->first;
        memcpy(post(self, wire, frame->bytes), frame->data, frame->bytes);
        wire->waiting_bytes -= frame->bytes;
        wire->first = frame->next;
        if (wire->first == NULL)
            wire->last = &wire->first;
        free(frame);
        moved = true;
    }
    return moved;
}

static int defer(struct nccl *self, struct nccl_wire *wire, const struct outgoing *outgoing) {
    const size_t size = sizeof(struct waiting_frame) + outgoing->bytes;
    struct waiting_frame *frame = NULL;
    int error = ERR_BUSY;
    if (wire->waiting_bytes + outgoing->bytes <= self->options.waiting_bytes_max) {
        frame = aligned_alloc(64, (size + 63) & ~(size_t)63);
        error = ERR_NO_MEMORY;
    }
    if (frame == NULL) {
        self->base.counters.dropped++;
        return error;
    }
    frame->next = NULL;
    frame->bytes = outgoing->bytes;
    outgoing_write(outgoing, frame->data);
    *wire->last = frame;
    wire->last = &frame->next;
    wire->waiting_bytes += frame->bytes;
    self->base.counters.deferred++;
    return 0;
}

static int nccl_post_send(struct transport *base, actor_id to, const struct outgoing *frame) {
    struct nccl *self = (struct nccl *)base;
    struct nccl_wire *wire = find(self, to);
    if (wire == NULL || !nccl_edge_ready(&wire->machine)) {
        base->counters.dropped++;
        return ERR_NOT_FOUND;
    }
    if (frame->bytes > wire->machine.lane[NCCL_OUT].slot_bytes) {
        base->counters.dropped++;
        return ERR_TOO_LARGE;
    }
    if (wire->first != NULL || !nccl_edge_room(&wire->machine))
        return defer(self, wire, frame);
    outgoing_write(frame, post(self, wire, frame->bytes));
    return 0;
}

static void nccl_flush(struct transport *base) {
    struct nccl *self = (struct nccl *)base;
    for (size_t i = 0; i < self->wires; i++)
        advance(self, self->wire[i], NCCL_OUT);
}

/* ---- The way in ---- */

static bool give_out(struct nccl *self, struct nccl_wire *wire, struct incoming *ret) {
    struct nccl_port *port = &wire->port[NCCL_IN];
    const struct nccl_lane *lane = &wire->machine.lane[NCCL_IN];
    while (lane->state == LANE_READY && wire->delivered < lane->completed) {
        const uint64_t n = wire->delivered++;
        const uint8_t *bytes = slot(port, port->buffer->pinned, n);
        const struct frame_header *header = (const struct frame_header *)bytes;
        struct failure failure;
        if (frame_check(bytes, lane->bytes[n % NCCL_SLOTS_MAX], self->options.check_crc,
                        &failure) == 0 &&
            header->to_incarnation == self->options.incarnation) {
            self->held = wire;
            self->held_stale = false;
            self->base.counters.frames_received++;
            self->base.counters.bytes_received += sizeof *header + header->payload_bytes;
            *ret = (struct incoming){{header, bytes + sizeof *header}, wire};
            return true;
        }
        self->base.counters.refused++;
        log_limited(&self->limit, TRACE_WARNING, "frame from actor %u refused", wire->id);
        struct nccl_actions actions = {.count = 0};
        nccl_edge_returned(&wire->machine, &actions);
        carry_out(self, wire, &actions);
    }
    return false;
}

static bool nccl_receive(struct transport *base, struct incoming *ret) {
    struct nccl *self = (struct nccl *)base;
    ASSERT(self->held == NULL);
    for (size_t i = 0; i < self->wires; i++) {
        if (give_out(self, self->wire[(self->cursor + i) % self->wires], ret)) {
            self->cursor = (self->cursor + i + 1) % self->wires;
            return true;
        }
    }
    return false;
}

static void nccl_release(struct transport *base, struct incoming *frame) {
    struct nccl *self = (struct nccl *)base;
    struct nccl_wire *wire = frame->edge;
    ASSERT(wire == self->held);
    self->held = NULL;
    if (wire->unmake_later[NCCL_IN]) {
        wire->unmake_later[NCCL_IN] = false;
        nccl_keeper_ask(self->keeper, &wire->port[NCCL_IN], KEEPER_UNMAKE);
    }
    if (self->held_stale)
        return;
    struct nccl_actions actions = {.count = 0};
    nccl_edge_returned(&wire->machine, &actions);
    carry_out(self, wire, &actions);
}

/* ---- Edges ---- */

static void wire_remove(struct nccl *self, size_t index) {
    free(self->wire[index]);
    self->wire[index] = self->wire[--self->wires];
}

/* Both ends may meet again under the same incarnations: generations go on. */
static void remember(struct nccl *self, const struct nccl_wire *wire) {
    const uint32_t out = wire->machine.lane[NCCL_OUT].generation;
    self->generation = out > self->generation ? out : self->generation;
    self->past[self->pasts++ % ACTORS_MAX] =
        (struct past){wire->incarnation, wire->machine.lane[NCCL_IN].generation};
}

static uint32_t peer_generation(const struct nccl *self, uint64_t incarnation) {
    uint32_t ret = 0;
    for (size_t i = 0; i < self->pasts && i < ACTORS_MAX; i++) {
        if (self->past[i].incarnation == incarnation && self->past[i].generation > ret)
            ret = self->past[i].generation;
    }
    return ret;
}

static void nccl_disconnect(struct transport *base, actor_id id) {
    struct nccl *self = (struct nccl *)base;
    struct nccl_wire *wire = find(self, id);
    if (wire == NULL)
        return;
    struct nccl_actions actions = {.count = 0};
    drop_waiting(self, wire);
    nccl_edge_close(&wire->machine, &actions);
    carry_out(self, wire, &actions);
    wire->closing = true;
    remember(self, wire);
    self->nccl.post.disconnect(self->nccl.post.context, id);
}

static bool nccl_connected(const struct transport *base, actor_id id) {
    const struct nccl_wire *wire = find((const struct nccl *)base, id);
    return wire != NULL && nccl_edge_ready(&wire->machine);
}

static int nccl_connect(struct transport *base, actor_id id, uint64_t incarnation,
                        const char *address, struct failure *failure) {
    struct nccl *self = (struct nccl *)base;
    struct nccl_wire *wire = find(self, id);
    if (strlen(address) >= sizeof wire->address)
        return fail(failure, ERR_TOO_LARGE, "a data address of over %zu bytes",
                    sizeof wire->address - 1);
    if (wire != NULL && wire->incarnation == incarnation && strcmp(wire->address, address) == 0)
        return 0;
    if (wire != NULL)
        nccl_disconnect(base, id);
    if (self->wires == self->capacity) {
        size_t capacity = self->capacity > 0 ? 2 * self->capacity : 16;
        struct nccl_wire **larger = realloc(self->wire, capacity * sizeof(*larger));
        if (larger == NULL)
            return fail(failure, ERR_NO_MEMORY, "no memory for an edge");
        self->wire = larger;
        self->capacity = capacity;
    }
    wire = calloc(1, sizeof *wire);
    if (wire == NULL)
        return fail(failure, ERR_NO_MEMORY, "no memory for an edge");
    wire->id = id;
    wire->incarnation = incarnation;
    wire->last = &wire->first;
    snprintf(wire->address, sizeof wire->address, "%s", address);
    for (int lane = NCCL_OUT; lane <= NCCL_IN; lane++) {
        wire->port[lane].owner = wire;
        wire->port[lane].lane = (enum nccl_direction)lane;
    }
    struct nccl_edge_options options = self->nccl.edge;
    options.generation = self->generation;
    options.peer_generation = peer_generation(self, incarnation);
    nccl_edge_open(&wire->machine, &options, self->options.incarnation, incarnation,
                   self->nccl.now_ns());
    self->wire[self->wires++] = wire;
    self->nccl.post.connect(self->nccl.post.context, id, address);
    return 0;
}

/* ---- Turns ---- */

static bool take_answers(struct nccl *self) {
    bool moved = false;
    for (struct nccl_port *port; (port = nccl_keeper_answer(self->keeper)) != NULL;) {
        struct nccl_wire *wire = port->owner;
        struct nccl_actions actions = {.count = 0};
        const uint64_t now = self->nccl.now_ns();
        if (port->answered == KEEPER_NAME)
            nccl_edge_named(&wire->machine, port->error, &port->id, now, &actions);
        else if (port->answered == KEEPER_MAKE)
            nccl_edge_made(&wire->machine, port->lane, port->error, now, &actions);
        else
            nccl_edge_unmade(&wire->machine, port->lane, now, &actions);
        carry_out(self, wire, &actions);
        moved = true;
    }
    return moved;
}

static bool take_messages(struct nccl *self) {
    bool moved = false;
    for (struct nccl_message note; self->nccl.post.receive(self->nccl.post.context, &note);) {
        for (size_t i = 0; i < self->wires; i++) {
            struct nccl_wire *wire = self->wire[i];
            if (wire->closing || wire->incarnation != note.from_incarnation)
                continue;
            struct nccl_actions actions = {.count = 0};
            nccl_edge_message(&wire->machine, &note, self->nccl.now_ns(), &actions);
            carry_out(self, wire, &actions);
            moved = true;
            break;
        }
    }
    return moved;
}

static bool nccl_progress(struct transport *base) {
    struct nccl *self = (struct nccl *)base;
    if (self->nccl.inline_keeper)
        nccl_keeper_turn(self->keeper);
    bool moved = take_messages(self);
    moved |= take_answers(self);
    for (size_t i = 0; i < self->wires;) {
        struct nccl_wire *wire = self->wire[i];
        if (wire->closing && nccl_edge_closed(&wire->machine) && wire != self->held) {
            wire_remove(self, i);
            continue;
        }
        moved |= advance(self, wire, NCCL_IN);
        moved |= advance(self, wire, NCCL_OUT);
        if (!nccl_edge_ready(&wire->machine))
            drop_waiting(self, wire);
        if (post_waiting(self, wire))
            moved |= advance(self, wire, NCCL_OUT) || true;
        const uint64_t now = self->nccl.now_ns();
        if (now >= nccl_edge_deadline(&wire->machine)) {
            struct nccl_actions actions = {.count = 0};
            nccl_edge_timer(&wire->machine, now, &actions);
            carry_out(self, wire, &actions);
        }
        i++;
    }
    return moved;
}

bool transport_nccl_lost(struct transport *base, actor_id *ret_id, uint64_t *ret_incarnation) {
    struct nccl *self = (struct nccl *)base;
    for (size_t i = 0; i < self->wires; i++) {
        struct nccl_wire *wire = self->wire[i];
        if (!wire->closing && nccl_edge_take_loss(&wire->machine)) {
            *ret_id = wire->id;
            *ret_incarnation = wire->incarnation;
            return true;
        }
    }
    return false;
}

uint64_t transport_nccl_incarnation(const struct transport *base, actor_id id) {
    const struct nccl_wire *wire = find((const struct nccl *)base, id);
    return wire != NULL ? wire->incarnation : 0;
}

uint64_t transport_nccl_deadline(const struct transport *base) {
    const struct nccl *self = (const struct nccl *)base;
    uint64_t due = UINT64_MAX;
    for (size_t i = 0; i < self->wires; i++) {
        const uint64_t edge = nccl_edge_deadline(&self->wire[i]->machine);
        due = edge < due ? edge : due;
    }
    return due;
}

const char *transport_nccl_describe(struct transport *base) {
    struct nccl *self = (struct nccl *)base;
    size_t used = 0;
    self->description[0] = 0;
    for (int state = LANE_IDLE; state <= LANE_CLOSED; state++) {
        unsigned count = 0;
        for (size_t i = 0; i < self->wires; i++)
            for (int lane = NCCL_OUT; lane <= NCCL_IN; lane++)
                count += (int)self->wire[i]->machine.lane[lane].state == state;
        if (count > 0)
            used += (size_t)snprintf(self->description + used, sizeof self->description - used,
                                     "%s%u %s", used > 0 ? ", " : "", count,
                                     nccl_lane_state_name((enum nccl_lane_state)state));
    }
    return self->description;
}

uint32_t transport_nccl_ports(const struct transport *base) {
    const struct nccl *self = (const struct nccl *)base;
    uint32_t ports = 0;
    for (size_t i = 0; i < self->wires; i++)
        for (int lane = NCCL_OUT; lane <= NCCL_IN; lane++)
            ports += self->wire[i]->machine.lane[lane].held;
    return ports;
}

static void nccl_close(struct transport **transport) {
    struct nccl *self = (struct nccl *)*transport;
    if (self == NULL)
        return;
    ASSERT(self->held == NULL);
    for (size_t i = 0; i < self->wires; i++) {
        if (!self->wire[i]->closing)
            nccl_disconnect(&self->base, self->wire[i]->id);
    }
    nccl_keeper_close(&self->keeper);
    for (size_t i = 0; i < self->wires; i++)
        free(self->wire[i]);
    self->nccl.post.close(self->nccl.post.context);
    free(self->wire);
    free(self);
    *transport = NULL;
}

static const struct transport_class nccl_class = {
    .name = "nccl",
    .connect = nccl_connect,
    .disconnect = nccl_disconnect,
    .connected = nccl_connected,
    .post_send = nccl_post_send,
    .flush = nccl_flush,
    .receive = nccl_receive,
    .release = nccl_release,
    .progress = nccl_progress,
    .close = nccl_close,
};

int transport_nccl_open(struct transport **ret, const struct transport_options *options,
                        const struct nccl_options *nccl, struct failure *failure) {
    struct nccl *self = calloc(1, sizeof *self);
    if (self == NULL)
        return fail(failure, ERR_NO_MEMORY, "no memory for the NCCL transport");
    self->base.class = &nccl_class;
    self->options = *options;
    self->nccl = *nccl;
    self->nccl.edge.slot_bytes = (nccl->edge.slot_bytes + 63) & ~63u; /* frames are aligned */
    int error = nccl_keeper_open(&self->keeper, nccl->api, nccl->channels_max,
                                 nccl->inline_keeper ? NULL : options->bell, failure);
    if (error < 0) {
        free(self);
        return error;
    }
    snprintf(self->base.address, sizeof self->base.address, "%s", nccl->post.address);
    *ret = &self->base;
    return 0;
}
