/* The data plane's interface, shaped like NCCL's network plugins: post, test, close; nothing ever
 * blocks. Two transports have it: shared memory between processes of one host (transport_shm.c) and
 * ZeroMQ to any host (transport_zmq.c). The actor thread alone calls it.
 *
 * An edge is made by both ends when their actors CONNECT to each other, and belongs to a pair of
 * incarnations: a restarted process gets new edges, whatever still lies in the old ones is never
 * read. */
#ifndef TROUPE_HOST_TRANSPORT_H
#define TROUPE_HOST_TRANSPORT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "actors/actor.h"
#include "actors/host/bell.h"
#include "kernels/parallel.h"

/* A frame to be sent; the transport decides where it is written, so that it is written once. */
struct outgoing {
    struct frame_header header; /* complete but for crc */
    const void *prefix;
    size_t prefix_bytes;
    size_t rows_offset;                            /* from the start of the header */
    size_t bytes;                                  /* of the whole frame */
    void (*gather)(void *context, void *ret_rows); /* writes the rows at rows_offset; NULL: none */
    void *context;
    bool seal; /* fill in the CRC */
    bool more; /* others follow soon: the peer need not be woken unless room gets scarce */
    void *reserved;     /* by `reserve`: the rows are there already; NULL: not */
    bool summed;        /* rows_crc is the CRC32C of the rows */
    uint32_t rows_crc;
    /* Faults on purpose: bit + 1 of the frame that is turned over before or after sealing; 0: none.
     */
    uint64_t flip_before, flip_after;
};
/* Writes the whole frame to memory of `bytes` bytes, 64-byte aligned. */
void outgoing_write(const struct outgoing *self, void *memory);

struct incoming {
    struct frame frame; /* checked; valid until release */
    void *edge;         /* the transport's own */
};

struct transport_counters {
    uint64_t frames_sent, bytes_sent, frames_received, bytes_received;
    uint64_t wakes;    /* peers that the kernel had to wake */
    uint64_t deferred; /* frames that waited for room */
    uint64_t dropped;  /* frames given up: no edge, too many waiting, peer gone */
    uint64_t refused;  /* received, but damaged or for somebody else */
};

struct transport_options {
    const char *name; /* unique stem of this process: troupe-<run>-<pid>-<incarnation> */
    uint64_t incarnation;
    struct bell *bell;   /* the actor's; the transport rings it from other threads, peers from other
                            processes */
    uint64_t ring_bytes; /* shm: first size of a ring */
    const char *bind;    /* zmq: where to listen, "ipc://..." or "tcp://host:*" */
    const char *towards; /* zmq: see mailbox_options */
    void *zmq_context;   /* zmq */
    bool check_crc;
    const struct parallel *parallel; /* shm: sums up large frames; NULL or width 0: the actor thread alone does */
    uint64_t waiting_bytes_max; /* per edge, frames that wait for room; more are dropped */
    /* Kept frames cannot stay: whoever kept them copies what is still needed; when this returns they are gone. NULL if
     * nothing is ever kept. */
    void (*take_in)(void *context);
    void *context;
};

struct transport {
    const struct transport_class *class;
    struct transport_counters counters;
    uint32_t awaited; /* peers that owe an answer to small frames: the actor need not be woken for
                         each of them. 0: not known */
    char address[ADDRESS_BYTES_MAX]; /* its part of the data address in HELLO */
};

struct transport_class {
    const char *name;
    /* Makes the edge to a peer, in both directions; an edge with the same id and another
     * incarnation or address is closed first, the same one is left alone. Errors: the peer is gone;
     * then there is no edge. ERR_NO_MEMORY: no room for the way out; the peer's frames still come
     * in where it has room, `connected` is false, and connecting again tries again. */
    int (*connect)(struct transport *self, actor_id id, uint64_t incarnation, const char *address,
                   struct failure *failure);
    /* Closes the edge; none: nothing. Frames not yet sent are dropped. */
    void (*disconnect)(struct transport *self, actor_id id);
    bool (*connected)(const struct transport *self, actor_id id);
    /* Takes the frame: it is written before this returns (into the edge, or into memory of its own
     * if there is no room now), in the order of the calls of this edge. 0, or ERR_NOT_FOUND (no
     * edge), ERR_BUSY (too much is waiting), ERR_TOO_LARGE: not sent. */
    int (*post_send)(struct transport *self, actor_id to, const struct outgoing *frame);
    /* Room for a frame of `bytes` bytes whose rows are written before it is posted, with its `reserved` set to this: they lie
     * where the receiver reads them. NULL: not now. Void once anything else is posted to that peer or its edge is gone:
     * then the post fails with ERR_STATE. A reservation that is not used costs nothing. NULL slot: never. */
    void *(*reserve)(struct transport *self, actor_id to, size_t bytes);
    /* Wakes the peers that frames were posted to since the last flush. Called once per batch of
     * effects, and before each computation. */
    void (*flush)(struct transport *self);
    /* The next received frame, edges in turn; false: none. At most one frame is out at a time. */
    bool (*receive)(struct transport *self, struct incoming *ret);
    void (*release)(struct transport *self, struct incoming *frame);
    /* The frame that is out stays valid after its release as well, until release_kept or take_in. False: there is no room
     * for that. NULL: there never is. */
    bool (*keep)(struct transport *self, struct incoming *frame);
    void (*release_kept)(struct transport *self);
    /* Moves what waits: deferred frames, edges half made. Called on every turn of the actor's loop.
     * Returns whether anything moved. */
    bool (*progress)(struct transport *self);
    /* The answers did not come together: `awaited` becomes 0. NULL: it is always 0. */
    void (*await_none)(struct transport *self);
    void (*close)(struct transport **self);
};

int transport_shm_open(struct transport **ret, const struct transport_options *options,
                       struct failure *failure);
int transport_zmq_open(struct transport **ret, const struct transport_options *options,
                       struct failure *failure);

/* Removes the shared memory that processes with this stem ("troupe-<run>-" or
 * "troupe-<run>-<pid>-") have left behind. */
void transport_shm_sweep(const char *stem);

#endif
