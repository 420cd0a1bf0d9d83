/* The data plane between hosts (and, when asked for, on one host): whole frames as ZeroMQ messages
 * through a mailbox of their own. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "actors/host/log.h"
#include "actors/host/mailbox.h"
#include "actors/host/transport.h"

struct zmq_edge {
    actor_id id;
    uint64_t incarnation;
    char address[ADDRESS_BYTES_MAX];
};

struct zmq {
    struct transport base;
    struct transport_options options;
    struct mailbox *mailbox;
    struct zmq_edge *edge;
    size_t edges, capacity;
    void *held;
    struct log_limit limit;
};

static struct zmq_edge *find(const struct zmq *self, actor_id id) {
    for (size_t i = 0; i < self->edges; i++) {
        if (self->edge[i].id == id)
            return &self->edge[i];
    }
    return NULL;
}

static bool zmq_connected(const struct transport *base, actor_id id) {
    return find((const struct zmq *)base, id) != NULL;
}

static void zmq_disconnect_edge(struct transport *base, actor_id id) {
    struct zmq *self = (struct zmq *)base;
    struct zmq_edge *edge = find(self, id);
    if (edge == NULL)
        return;
    mailbox_disconnect(self->mailbox, id);
    *edge = self->edge[--self->edges];
}

static int zmq_connect_edge(struct transport *base, actor_id id, uint64_t incarnation,
                            const char *address, struct failure *failure) {
    struct zmq *self = (struct zmq *)base;
    struct zmq_edge *edge = find(self, id);
    if (strlen(address) >= sizeof edge->address)
        return fail(failure, ERR_TOO_LARGE, "a data address of over %zu bytes",
                    sizeof edge->address - 1);
    if (edge != NULL && edge->incarnation == incarnation && strcmp(edge->address, address) == 0)
        return 0;
    if (edge == NULL) {
        if (self->edges == self->capacity) {
            size_t capacity = self->capacity > 0 ? 2 * self->capacity : 16;
            struct zmq_edge *larger = realloc(self->edge, capacity * sizeof *larger);
            if (larger == NULL)
                return fail(failure, ERR_NO_MEMORY, "no memory for an edge");
            self->edge = larger;
            self->capacity = capacity;
        }
        edge = &self->edge[self->edges++];
    }
    edge->id = id;
    edge->incarnation = incarnation;
    snprintf(edge->address, sizeof edge->address, "%s", address);
    mailbox_connect(self->mailbox, id, address);
    return 0;
}

static int zmq_post_send(struct transport *base, actor_id to, const struct outgoing *frame) {
    struct zmq *self = (struct zmq *)base;
    if (find(self, to) == NULL) {
        base->counters.dropped++;
        return ERR_NOT_FOUND;
    }
    void *memory = aligned_alloc(64, (frame->bytes + 63) & ~(size_t)63);
    if (memory == NULL) {
        base->counters.dropped++;
        return ERR_NO_MEMORY;
    }
    outgoing_write(frame, memory);
    int error = mailbox_send(self->mailbox, to, memory, frame->bytes);
    if (error < 0) {
        base->counters.dropped++;
        return error;
    }
    base->counters.frames_sent++;
    base->counters.bytes_sent += frame->bytes;
    return 0;
}

static void zmq_flush(struct transport *base) {
    (void)base; /* the mailbox's thread was woken when the frame was posted */
}

static bool zmq_progress(struct transport *base) {
    (void)base;
    return false;
}

/* In the mailbox's thread. Everything is checked, the CRC included: these bytes may come from
 * anywhere. */
static void *accept_frame(const void *bytes, size_t size, struct failure *failure) {
    uint8_t *copy = aligned_alloc(64, (size + 63) & ~(size_t)63);
    if (copy == NULL) {
        fail(failure, ERR_NO_MEMORY, "no memory for a frame of %zu bytes", size);
        return NULL;
    }
    memcpy(copy, bytes, size);
    if (frame_check(copy, size, 1, failure) < 0) {
        free(copy);
        return NULL;
    }
    return copy;
}

static bool zmq_receive(struct transport *base, struct incoming *ret) {
    struct zmq *self = (struct zmq *)base;
    ASSERT(self->held == NULL);
    for (void *bytes; (bytes = mailbox_receive(self->mailbox)) != NULL;) {
        const struct frame_header *header = bytes;
        if (header->to_incarnation == self->options.incarnation) {
            self->held = bytes;
            base->counters.frames_received++;
            base->counters.bytes_received += sizeof *header + header->payload_bytes;
            *ret = (struct incoming){{header, (const uint8_t *)bytes + sizeof *header}, bytes};
            return true;
        }
        base->counters.refused++;
        log_limited(&self->limit, TRACE_INFO, "frame from actor %u was for another incarnation",
                    header->from);
        free(bytes);
    }
    return false;
}

static void zmq_release(struct transport *base, struct incoming *frame) {
    struct zmq *self = (struct zmq *)base;
    ASSERT(frame->edge == self->held);
    free(self->held);
    self->held = NULL;
}

static void zmq_close_transport(struct transport **transport) {
    struct zmq *self = (struct zmq *)*transport;
    if (self == NULL)
        return;
    mailbox_close(&self->mailbox, 0);
    free(self->edge);
    free(self);
    *transport = NULL;
}

static const struct transport_class zmq_class = {
    .name = "zmq",
    .connect = zmq_connect_edge,
    .disconnect = zmq_disconnect_edge,
    .connected = zmq_connected,
    .post_send = zmq_post_send,
    .flush = zmq_flush,
    .receive = zmq_receive,
    .release = zmq_release,
    .progress = zmq_progress,
    .close = zmq_close_transport,
};

int transport_zmq_open(struct transport **ret, const struct transport_options *options,
                       struct failure *failure) {
    struct zmq *self = calloc(1, sizeof *self);
    if (self == NULL)
        return fail(failure, ERR_NO_MEMORY, "no memory for the ZeroMQ transport");
    self->base.class = &zmq_class;
    self->options = *options;
    struct mailbox_options mailbox = {
        .name = "data",
        .context = options->zmq_context,
        .bind = options->bind,
        .towards = options->towards,
        .bell = options->bell,
        .message_max = sizeof(struct frame_header) + FRAME_PAYLOAD_MAX,
        .waiting_bytes_max = options->waiting_bytes_max,
        .accept = accept_frame,
        .discard = free,
    };
    int error = mailbox_open(&self->mailbox, &mailbox, failure);
    if (error < 0) {
        free(self);
        return error;
    }
    snprintf(self->base.address, sizeof self->base.address, "%s", mailbox_address(self->mailbox));
    *ret = &self->base;
    return 0;
}
