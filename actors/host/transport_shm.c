/* The data plane between processes of one host: a ring in shared memory for each direction of each
 * edge (ring.h), and the receiver's doorbell.
 *
 * Names follow from the two ends: the ring from A to B is "<stem of A>.<incarnation of B>", made by
 * A when its actor CONNECTs to B. B opens it when its own actor CONNECTs to A, or, if it was not
 * there yet, when A counts `rings_made` up on B's doorbell. Once open, the name is removed, so that
 * a crash leaves at most unopened rings, which the supervisor sweeps.
 *
 * States of the incoming ring: absent -> open -> (producer closed it and it is empty, or it is
 * broken) -> absent. States of the outgoing ring: open -> (consumer closed it, or a frame needs a
 * larger one) -> made anew, REMAKES_MAX times at most.
 *
 * Received frames that are kept (answers of experts, until they are combined) stay in their ring, and so does what comes
 * behind them, up to KEPT_PART of it; whatever would unmap or exhaust the ring asks first that they be taken in, and so does a
 * producer that waits for room when there is nothing else to read. */
#include "actors/host/transport.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "actors/host/log.h"
#include "actors/host/ring.h"

#define REMAKES_MAX    16 /* a peer that breaks rings again and again gets no more of them */
#define RING_BYTES_MIN (64u << 10) /* a smaller one is not worth having */
#define STEM_BYTES     100
#define FRAME_NEED     4     /* a ring made for a large frame holds this many of them */
#define AWAITED_BYTES  32768 /* frames so small that their answers are awaited together */
#define SUM_TOGETHER   (512u << 10) /* bytes of a frame that are worth a second thread */
#define KEPT_PART      3 / 4 /* of a ring, at most, holds frames that are kept */
#define WAKE_PART      1 / 4 /* of a ring is free: whoever could be left asleep must be woken */

struct waiting_frame {
    struct waiting_frame *next;
    size_t bytes;
    _Alignas(64) uint8_t data[];
};

struct shm_edge {
    actor_id id;
    uint64_t incarnation;
    char stem[STEM_BYTES]; /* the peer's */
    struct bell bell;      /* the peer's */
    struct ring out, in;
    uint32_t rings_seen; /* own bell's rings_made when `in` was last looked for */
    bool looked;
    bool dirty;    /* has frames that the peer was not yet woken for */
    bool detached; /* disconnected while one of its frames was out */
    bool keep;     /* the frame that is out is to be kept */
    bool kept;     /* frames that have been read lie in `in` still */
    unsigned remakes;
    uint32_t awaited; /* answers to small frames sent to the peer */
    void *reserved;   /* in `out`, by shm_reserve; NULL: nothing */
    struct waiting_frame *first, **last;
    size_t waiting_bytes;
};

struct shm {
    struct transport base;
    struct transport_options options;
    char stem[STEM_BYTES];
    struct shm_edge **edge;
    size_t edges, capacity;
    size_t cursor;         /* whose turn it is to be received from */
    struct shm_edge *held; /* edge of the frame that is out */
    struct log_limit limit;
};

static struct shm_edge *find(const struct shm *self, actor_id id) {
    for (size_t i = 0; i < self->edges; i++) {
        if (self->edge[i]->id == id)
            return self->edge[i];
    }
    return NULL;
}

static void edge_free(struct shm_edge *edge) {
    while (edge->first != NULL) {
        struct waiting_frame *frame = edge->first;
        edge->first = frame->next;
        free(frame);
    }
    ring_close(&edge->out);
    ring_close(&edge->in);
    if (edge->bell.page != NULL)
        bell_ring(&edge->bell); /* so that the peer sees the closed rings */
    bell_close(&edge->bell);
    free(edge);
}

static int make_out(struct shm *self, struct shm_edge *edge, uint64_t capacity,
                    struct failure *failure) {
    char name[RING_NAME_BYTES];
    snprintf(name, sizeof name, "%s.%016llx", self->stem, (unsigned long long)edge->incarnation);
    int error = ring_create(&edge->out, name, capacity, failure);
    while (error == ERR_NO_MEMORY && capacity / 2 >= RING_BYTES_MIN) { /* a small /dev/shm */
        capacity = capacity / 2 & ~(uint64_t)63;
        error = ring_create(&edge->out, name, capacity, failure);
    }
    if (error < 0)
        return error;
    atomic_fetch_add(&edge->bell.page->rings_made, 1);
    edge->dirty = true;
    return 0;
}

static bool open_in(struct shm *self, struct shm_edge *edge) {
    uint32_t made = atomic_load(&self->options.bell->page->rings_made);
    if (edge->looked && made == edge->rings_seen)
        return false;
    edge->looked = true;
    edge->rings_seen = made;
    char name[RING_NAME_BYTES];
    struct failure failure;
    snprintf(name, sizeof name, "%s.%016llx", edge->stem,
             (unsigned long long)self->options.incarnation);
    int error = ring_open(&edge->in, name, &failure);
    if (error < 0) {
        if (error != ERR_NOT_FOUND)
            log_limited(&self->limit, TRACE_WARNING, "edge from actor %u: %s", edge->id,
                        failure.text);
        return false;
    }
    edge->dirty = true; /* the producer may wait for this */
    return true;
}

static void shm_release_kept(struct transport *base) {
    struct shm *self = (struct shm *)base;
    for (size_t i = 0; i < self->edges; i++) {
        struct shm_edge *edge = self->edge[i];
        if (edge->kept && ring_release_passed(&edge->in))
            bell_ring(&edge->bell);
        edge->kept = edge->keep = false;
    }
}

static void give_up_kept(struct shm *self) {
    self->options.take_in(self->options.context);
    shm_release_kept(&self->base);
}

/* Is done with the record being read. */
static void leave_record(struct shm *self, struct shm_edge *edge) {
    if (edge->kept && ring_kept(&edge->in) > edge->in.capacity * KEPT_PART)
        give_up_kept(self);
    if (edge->keep || edge->kept) {
        ring_pass(&edge->in);
        edge->kept = true;
    } else if (ring_release(&edge->in)) {
        bell_ring(&edge->bell);
    }
    edge->keep = false;
}

static void remove_edge(struct shm *self, size_t index) {
    struct shm_edge *edge = self->edge[index];
    if (edge->kept || edge->keep)
        give_up_kept(self);
    self->base.awaited -= edge->awaited > 0;
    for (struct waiting_frame *frame = edge->first; frame != NULL; frame = frame->next)
        self->base.counters.dropped++;
    self->edge[index] = self->edge[--self->edges];
    if (edge == self->held)
        edge->detached = true; /* its frame is being read: freed at release */
    else
        edge_free(edge);
}

static void shm_disconnect(struct transport *base, actor_id id) {
    struct shm *self = (struct shm *)base;
    for (size_t i = 0; i < self->edges; i++) {
        if (self->edge[i]->id == id) {
            remove_edge(self, i);
            return;
        }
    }
}

static bool shm_connected(const struct transport *base, actor_id id) {
    const struct shm_edge *edge = find((const struct shm *)base, id);
    return edge != NULL && edge->out.page != NULL;
}

static int shm_connect(struct transport *base, actor_id id, uint64_t incarnation,
                       const char *address, struct failure *failure) {
    struct shm *self = (struct shm *)base;
    struct shm_edge *edge = find(self, id);
    if (edge != NULL && edge->incarnation == incarnation && strcmp(edge->stem, address) == 0)
        return edge->out.page != NULL ? 0 : make_out(self, edge, self->options.ring_bytes, failure);
    if (edge != NULL)
        shm_disconnect(base, id);
    if (strlen(address) >= STEM_BYTES || strchr(address, '/') != NULL || address[0] == 0)
        return fail(failure, ERR_INVALID, "'%s' is not the shared-memory address of an actor",
                    address);
    if (self->edges == self->capacity) {
        size_t capacity = self->capacity > 0 ? 2 * self->capacity : 16;
        struct shm_edge **larger = realloc(self->edge, capacity * sizeof *larger);
        if (larger == NULL)
            return fail(failure, ERR_NO_MEMORY, "no memory for an edge");
        self->edge = larger;
        self->capacity = capacity;
    }
    edge = calloc(1, sizeof *edge);
    if (edge == NULL)
        return fail(failure, ERR_NO_MEMORY, "no memory for an edge");
    edge->id = id;
    edge->incarnation = incarnation;
    edge->last = &edge->first;
    snprintf(edge->stem, sizeof edge->stem, "%s", address);
    char bell[BELL_NAME_BYTES];
    snprintf(bell, sizeof bell, "%s.bell", address);
    int error = bell_open(&edge->bell, bell, incarnation, failure);
    if (error == 0)
        error = make_out(self, edge, self->options.ring_bytes, failure);
    if (error < 0 && error != ERR_NO_MEMORY) {
        edge_free(edge);
        return error;
    }
    self->edge[self->edges++] = edge; /* without room for its own ring it still reads the peer's */
    open_in(self, edge);
    bell_ring(&edge->bell);
    edge->dirty = false;
    return error;
}

/* Replaces the outgoing ring. False: no more rings for this edge, or no memory. */
static bool remake_out(struct shm *self, struct shm_edge *edge, uint64_t capacity) {
    struct failure failure;
    if (edge->remakes >= REMAKES_MAX)
        return false;
    edge->remakes++;
    ring_close(&edge->out);
    if (make_out(self, edge, capacity, &failure) < 0) {
        log_limited(&self->limit, TRACE_WARNING, "edge to actor %u: %s", edge->id, failure.text);
        edge->remakes = REMAKES_MAX;
        return false;
    }
    return true;
}

/* Room for a frame in the outgoing ring. ERR_BUSY: later; ERR_STATE: never, the edge is dead. */
static int reserve(struct shm *self, struct shm_edge *edge, size_t bytes, void **ret) {
    if (edge->out.page == NULL || atomic_load(&edge->bell.page->gone))
        return ERR_STATE;
    if (ring_peer_closed(&edge->out) && !remake_out(self, edge, edge->out.capacity))
        return ERR_STATE;
    int error = ring_reserve(&edge->out, bytes, ret);
    if (error == ERR_CORRUPT) {
        log_limited(&self->limit, TRACE_WARNING,
                    "actor %u has broken the ring to it; a new one is made", edge->id);
        if (!remake_out(self, edge, edge->out.capacity))
            return ERR_STATE;
        error = ring_reserve(&edge->out, bytes, ret);
    }
    if (error == ERR_TOO_LARGE) {
        if (!ring_peer_opened(&edge->out))
            return ERR_BUSY; /* what lies in the present ring could not be found any more */
        if (!remake_out(self, edge, FRAME_NEED * ring_record_bytes(bytes)))
            return ERR_STATE;
        error = ring_reserve(&edge->out, bytes, ret);
    }
    return error;
}

static void count_sent(struct shm *self, struct shm_edge *edge, size_t bytes, bool more) {
    edge->dirty = edge->dirty || !more || ring_room(&edge->out) < edge->out.capacity * WAKE_PART;
    self->base.counters.frames_sent++;
    self->base.counters.bytes_sent += bytes;
}

/* An actor that sends rows to several peers goes on when all have answered. Large frames are left
 * out: it pays to take their answers one by one, while the others still work. */
static void await_answer(struct shm *self, struct shm_edge *edge, const struct outgoing *frame) {
    if ((frame->header.kind == FRAME_DISPATCH || frame->header.kind == FRAME_SAMPLE) &&
        frame->bytes <= AWAITED_BYTES && edge->awaited++ == 0)
        self->base.awaited++;
}

static void take_answer(struct shm *self, struct shm_edge *edge,
                        const struct frame_header *header) {
    if ((header->kind == FRAME_COMBINE || header->kind == FRAME_MOVED ||
         header->kind == FRAME_SAMPLED) &&
        edge->awaited > 0 && --edge->awaited == 0)
        self->base.awaited--;
}

static void shm_await_none(struct transport *base) {
    struct shm *self = (struct shm *)base;
    for (size_t i = 0; i < self->edges; i++)
        self->edge[i]->awaited = 0;
    base->awaited = 0;
}

static void *shm_reserve(struct transport *base, actor_id to, size_t bytes) {
    struct shm *self = (struct shm *)base;
    struct shm_edge *edge = find(self, to);
    void *memory;
    if (edge == NULL || edge->first != NULL)
        return NULL;
    edge->reserved = NULL; /* an earlier one: the ring may be made anew */
    if (reserve(self, edge, bytes, &memory) == 0)
        edge->reserved = memory;
    return edge->reserved;
}

static int shm_post_send(struct transport *base, actor_id to, const struct outgoing *frame) {
    struct shm *self = (struct shm *)base;
    struct shm_edge *edge = find(self, to);
    if (edge == NULL) {
        base->counters.dropped++;
        return ERR_NOT_FOUND;
    }
    void *memory = edge->reserved;
    int error = 0;
    edge->reserved = NULL;
    if (frame->reserved != NULL && frame->reserved != memory)
        error = ERR_STATE;
    else if (frame->reserved == NULL)
        error = edge->first != NULL ? ERR_BUSY : reserve(self, edge, frame->bytes, &memory);
    if (error == 0) {
        outgoing_write(frame, memory);
        ring_commit(&edge->out);
        count_sent(self, edge, frame->bytes, frame->more);
        await_answer(self, edge, frame);
        return 0;
    }
    if (error != ERR_BUSY || frame->bytes > self->options.waiting_bytes_max - edge->waiting_bytes) {
        base->counters.dropped++;
        return error;
    }
    size_t size = (sizeof(struct waiting_frame) + frame->bytes + 63) & ~(size_t)63;
    struct waiting_frame *waiting = aligned_alloc(64, size);
    if (waiting == NULL) {
        base->counters.dropped++;
        return ERR_NO_MEMORY;
    }
    waiting->next = NULL;
    waiting->bytes = frame->bytes;
    outgoing_write(frame, waiting->data);
    *edge->last = waiting;
    edge->last = &waiting->next;
    edge->waiting_bytes += frame->bytes;
    edge->dirty = true; /* it may have been left asleep, and must make room */
    base->counters.deferred++;
    return 0;
}

/* Writes waiting frames as far as there is room. */
static bool send_waiting(struct shm *self, struct shm_edge *edge) {
    bool moved = false;
    while (edge->first != NULL) {
        struct waiting_frame *frame = edge->first;
        void *memory;
        int error = reserve(self, edge, frame->bytes, &memory);
        if (error == ERR_BUSY)
            break;
        if (error == 0) {
            memcpy(memory, frame->data, frame->bytes);
            ring_commit(&edge->out);
            count_sent(self, edge, frame->bytes, false);
        } else {
            self->base.counters.dropped++;
        }
        edge->waiting_bytes -= frame->bytes;
        edge->first = frame->next;
        if (edge->first == NULL)
            edge->last = &edge->first;
        free(frame);
        moved = true;
    }
    return moved;
}

static void shm_flush(struct transport *base) {
    struct shm *self = (struct shm *)base;
    for (size_t i = 0; i < self->edges; i++) {
        struct shm_edge *edge = self->edge[i];
        if (edge->dirty && bell_ring_gently(&edge->bell))
            base->counters.wakes++;
        edge->dirty = false;
    }
}

static bool shm_progress(struct transport *base) {
    struct shm *self = (struct shm *)base;
    bool moved = false;
    for (size_t i = 0; i < self->edges; i++) {
        struct shm_edge *edge = self->edge[i];
        if (edge->in.page == NULL)
            moved |= open_in(self, edge);
        if (edge->first != NULL)
            moved |= send_waiting(self, edge);
    }
    shm_flush(base);
    return moved;
}

/* A record from the ring; false: none, or the ring is gone. */
static bool next_record(struct shm *self, struct shm_edge *edge, const void **bytes, size_t *size) {
    while (edge->in.page != NULL) {
        bool closed = ring_peer_closed(
            &edge->in); /* before the look: what was published before closing is read */
        int found = ring_peek(&edge->in, bytes, size);
        if (found == 1)
            return true;
        if (found == 0 && !closed) {
            if (edge->kept && ring_wanted(&edge->in)) /* what is awaited may wait for this room */
                give_up_kept(self);
            return false;
        }
        if (found < 0) {
            log_limited(&self->limit, TRACE_WARNING,
                        "the ring from actor %u is malformed and was dropped", edge->id);
            self->base.counters.refused++;
        }
        if (edge->kept)
            give_up_kept(self);
        ring_close(&edge->in);
        edge->dirty = true; /* the producer is told */
        edge->looked = false;
        open_in(self, edge);
    }
    return false;
}

/* The gate for everything that has come: large frames are summed up by several threads. */
static int check_frame(const struct shm *self, const void *bytes, size_t size,
                       struct failure *failure) {
    const struct parallel *parallel = self->options.parallel;
    if (!self->options.check_crc || size < SUM_TOGETHER || parallel == NULL || parallel->width <= 1)
        return frame_check(bytes, size, self->options.check_crc, failure);
    const size_t header = sizeof(struct frame_header);
    const uint32_t crc =
        crc32c_parallel(parallel, 0, (const uint8_t *)bytes + header, size - header);
    return frame_check_summed(bytes, size, crc, failure);
}

static bool shm_receive(struct transport *base, struct incoming *ret) {
    struct shm *self = (struct shm *)base;
    ASSERT(self->held == NULL);
    for (size_t i = 0; i < self->edges; i++) {
        struct shm_edge *edge = self->edge[(self->cursor + i) % self->edges];
        const void *bytes;
        size_t size;
        while (next_record(self, edge, &bytes, &size)) {
            struct failure failure;
            const struct frame_header *header = bytes;
            int error = check_frame(self, bytes, size, &failure);
            if (error == 0 && (header->from_incarnation != edge->incarnation ||
                               header->to_incarnation != self->options.incarnation))
                error = fail(&failure, ERR_CORRUPT, "a frame between other incarnations");
            if (error == 0) {
                self->cursor = (self->cursor + i + 1) % self->edges;
                self->held = edge;
                base->counters.frames_received++;
                take_answer(self, edge, header);
                base->counters.bytes_received += size;
                *ret = (struct incoming){{header, (const uint8_t *)bytes + sizeof *header}, edge};
                return true;
            }
            log_limited(&self->limit, TRACE_WARNING, "frame from actor %u refused: %s", edge->id,
                        failure.text);
            base->counters.refused++;
            leave_record(self, edge);
        }
    }
    return false;
}

static void shm_release(struct transport *base, struct incoming *frame) {
    struct shm *self = (struct shm *)base;
    struct shm_edge *edge = frame->edge;
    ASSERT(edge == self->held);
    self->held = NULL;
    leave_record(self, edge);
    if (edge->detached)
        edge_free(edge);
}

static bool shm_keep(struct transport *base, struct incoming *frame) {
    struct shm *self = (struct shm *)base;
    struct shm_edge *edge = frame->edge;
    ASSERT(edge == self->held);
    if (self->options.take_in == NULL || edge->detached ||
        ring_kept(&edge->in) > edge->in.capacity * KEPT_PART)
        return false;
    return edge->keep = true;
}

static void shm_close(struct transport **transport) {
    struct shm *self = (struct shm *)*transport;
    if (self == NULL)
        return;
    ASSERT(self->held == NULL);
    while (self->edges > 0)
        remove_edge(self, self->edges - 1);
    free(self->edge);
    free(self);
    *transport = NULL;
}

static const struct transport_class shm_class = {
    .name = "shm",
    .connect = shm_connect,
    .disconnect = shm_disconnect,
    .connected = shm_connected,
    .post_send = shm_post_send,
    .reserve = shm_reserve,
    .flush = shm_flush,
    .receive = shm_receive,
    .release = shm_release,
    .keep = shm_keep,
    .release_kept = shm_release_kept,
    .progress = shm_progress,
    .await_none = shm_await_none,
    .close = shm_close,
};

int transport_shm_open(struct transport **ret, const struct transport_options *options,
                       struct failure *failure) {
    ASSERT(strlen(options->name) < STEM_BYTES);
    struct shm *self = calloc(1, sizeof *self);
    if (self == NULL)
        return fail(failure, ERR_NO_MEMORY, "no memory for the shared-memory transport");
    self->base.class = &shm_class;
    self->options = *options;
    self->options.ring_bytes = (options->ring_bytes + 4095) & ~(uint64_t)4095;
    snprintf(self->stem, sizeof self->stem, "%s", options->name);
    snprintf(self->base.address, sizeof self->base.address, "%s", options->name);
    *ret = &self->base;
    return 0;
}

void transport_shm_sweep(const char *stem) {
    DIR *directory = opendir("/dev/shm");
    if (directory == NULL)
        return;
    size_t length = strlen(stem);
    for (struct dirent *entry; (entry = readdir(directory)) != NULL;) {
        char name[sizeof entry->d_name + 1];
        if (strncmp(entry->d_name, stem, length) != 0)
            continue;
        snprintf(name, sizeof name, "/%s", entry->d_name);
        shm_unlink(name);
    }
    closedir(directory);
}
