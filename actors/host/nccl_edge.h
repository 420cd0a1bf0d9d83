/* The pure part of the NCCL transport: one edge between two actors, as a state machine. Inputs are
 * the peer's messages, what became of the keeper's work, completed sends and receives, errors and
 * the clock; what it wants done it appends to a list of actions. No call of NCCL is made here.
 *
 * An edge is two lanes, one for each direction, each with a communicator of its own: sends of one
 * and receives of the other end can then be issued in any order without waiting for each other. The
 * sender of a lane is its rank 0, and leads: it names the communicator (a unique id), offers it,
 * and gives it a higher generation each time it is made anew.
 *
 * A lane:
 *   IDLE ----offer due (sender)----> NAMING --id--> OFFERED --ACCEPT--> MAKING --made--> READY
 *   IDLE --OFFER (receiver), answered by ACCEPT --------------------> MAKING --made--> READY
 *   any of them --failure, CLOSE, newer OFFER--> FAILING --taken down--> IDLE, after a pause
 *   any of them --edge_close--> FAILING --taken down--> CLOSED
 * Invariants (checked):
 *  1. While the keeper has a lane (NAMING, MAKING, FAILING) nothing is posted on it.
 *  2. The sender has at most `slots` frames out that the receiver has not given back.
 *  3. Frames of a lane are received in the order in which they were sent; a gap ends the lane.
 *  4. When a READY lane fails, both lanes of the edge are taken down and the loss is told once. */
#ifndef TROUPE_HOST_NCCL_EDGE_H
#define TROUPE_HOST_NCCL_EDGE_H

#include <stdbool.h>
#include <stdint.h>

#include "actors/host/nccl_api.h"

#define NCCL_SLOTS_MAX 16

enum nccl_lane_state {
    LANE_IDLE,
    LANE_NAMING,
    LANE_OFFERED,
    LANE_MAKING,
    LANE_READY,
    LANE_FAILING,
    LANE_CLOSED,
};
const char *nccl_lane_state_name(enum nccl_lane_state state);

enum nccl_direction { NCCL_OUT, NCCL_IN };

/* What ends tell each other over the control plane (a ZeroMQ mailbox of the transport's own). */
enum nccl_message_kind {
    NCCL_OFFER = 1, /* by the sender of a lane: id, slots, slot_bytes */
    NCCL_ACCEPT,    /* by its receiver: slots and slot_bytes, at most as offered */
    NCCL_FRAME,     /* by the sender: frame `sequence` of `bytes` bytes is on its way */
    NCCL_CREDIT,    /* by the receiver: all frames below `sequence` have been given back */
    NCCL_QUERY,     /* by the sender: which have been? Its CREDIT may have been lost */
    NCCL_CLOSE,     /* by either: this generation of the lane is over; bytes 1: on purpose */
};
struct nccl_message {
    uint32_t magic;
    uint16_t version, kind;
    uint64_t from_incarnation, to_incarnation;
    uint32_t sender; /* 1: by the sender of the lane that it is about, 0: by its receiver */
    uint32_t generation;
    uint64_t sequence, bytes;
    uint32_t slots, slot_bytes;
    struct nccl_id id;
};
#define NCCL_MESSAGE_MAGIC   0x4c43434eu /* "NCCL" */
#define NCCL_MESSAGE_VERSION 1
/* Everything that can be checked without knowing the edge. 0 or ERR_CORRUPT, ERR_VERSION. */
int nccl_message_check(const void *bytes, size_t size, struct failure *failure);

struct nccl_edge_options {
    uint32_t slots;           /* frames of a lane under way; 1 to NCCL_SLOTS_MAX */
    uint32_t slot_bytes;      /* the largest frame */
    uint64_t offer_retry_ns;  /* an OFFER not answered is repeated after this long */
    uint64_t make_ns;         /* longest time for making a communicator */
    uint64_t frame_ns;        /* longest time for one frame: then the peer counts as lost */
    uint64_t pause_ns;        /* before a lane is made anew; doubles with each failure */
    uint32_t failures_max;    /* failures in a row after which a lane is not tried again */
    uint32_t generation;      /* of the last lane of this process, whoever its peer was */
    uint32_t peer_generation; /* of the peer's last lane that was accepted: no id is used twice */
};

struct nccl_lane {
    enum nccl_lane_state state;
    uint32_t generation;
    /* IDLE, sender: offers; OFFERED: repeats; MAKING: gives up; READY, sender without room: asks.
     * UINT64_MAX: never. */
    uint64_t due_ns;
    uint32_t failures;
    bool closing;               /* CLOSED comes after FAILING */
    bool held;                  /* there is something to take down: an id or a communicator */
    struct nccl_id id;          /* of `generation` */
    uint32_t slots, slot_bytes; /* as agreed */
    /* Frames are numbered from 0. OUT: posted, completed (locally), returned (by the receiver). IN:
     * announced and posted, completed, returned. returned <= completed <= posted (IN); OUT:
     * completed <= posted, returned <= posted, posted - returned <= slots. */
    uint64_t posted, completed, returned;
    uint64_t told;                      /* IN: `returned` as the sender knows it */
    uint32_t bytes[NCCL_SLOTS_MAX];     /* of frame n at n % NCCL_SLOTS_MAX */
    uint64_t posted_ns[NCCL_SLOTS_MAX]; /* likewise: when it was posted */
    /* A newer OFFER that waits until the old communicator is gone. */
    bool offered;
    struct nccl_message offer;
};

struct nccl_edge {
    struct nccl_edge_options options;
    uint64_t self_incarnation, peer_incarnation;
    struct nccl_lane lane[2]; /* by enum nccl_direction */
    bool lost;                /* to be told */
};

enum nccl_action_kind {
    NCCL_DO_NAME,    /* keeper: a unique id, answered by nccl_edge_named */
    NCCL_DO_MAKE,    /* keeper: the communicator and its buffers, answered by nccl_edge_made */
    NCCL_DO_UNMAKE,  /* keeper: take down whatever there is, answered by nccl_edge_unmade.
                        `orderly`: both ends are well */
    NCCL_DO_MESSAGE, /* send `message` */
    NCCL_DO_RECEIVE, /* post the receive of frame `sequence` of `bytes` bytes */
};
struct nccl_action {
    enum nccl_action_kind kind;
    enum nccl_direction lane;
    bool orderly;
    uint64_t sequence;
    uint32_t bytes;
    struct nccl_message message;
};
#define NCCL_ACTIONS_MAX (NCCL_SLOTS_MAX + 8) /* of one step */
struct nccl_actions {
    struct nccl_action list[NCCL_ACTIONS_MAX];
    uint32_t count;
};

void nccl_edge_open(struct nccl_edge *self, const struct nccl_edge_options *options,
                    uint64_t own_incarnation, uint64_t peer_incarnation, uint64_t now_ns);
/* The peer is forgotten: takes both lanes down, and tells it so. */
void nccl_edge_close(struct nccl_edge *self, struct nccl_actions *out);
bool nccl_edge_closed(const struct nccl_edge *self);
/* Frames can be posted. */
bool nccl_edge_ready(const struct nccl_edge *self);
/* There is room for one more now. */
bool nccl_edge_room(const struct nccl_edge *self);
/* True once for each loss. */
bool nccl_edge_take_loss(struct nccl_edge *self);

/* A message of the peer that nccl_message_check has passed. Those of other incarnations and
 * generations are dropped. */
void nccl_edge_message(struct nccl_edge *self, const struct nccl_message *message, uint64_t now_ns,
                       struct nccl_actions *out);
void nccl_edge_timer(struct nccl_edge *self, uint64_t now_ns, struct nccl_actions *out);
uint64_t nccl_edge_deadline(const struct nccl_edge *self);

/* The keeper's answers. error: 0 or negative. */
void nccl_edge_named(struct nccl_edge *self, int error, const struct nccl_id *id, uint64_t now_ns,
                     struct nccl_actions *out);
void nccl_edge_made(struct nccl_edge *self, enum nccl_direction lane, int error, uint64_t now_ns,
                    struct nccl_actions *out);
void nccl_edge_unmade(struct nccl_edge *self, enum nccl_direction lane, uint64_t now_ns,
                      struct nccl_actions *out);

/* A frame of `bytes` bytes is posted on the way out; there must be room. Returns its sequence and
 * announces it. */
uint64_t nccl_edge_post(struct nccl_edge *self, uint32_t bytes, uint64_t now_ns,
                        struct nccl_actions *out);
/* The oldest frame of the lane that was not complete is. */
void nccl_edge_completed(struct nccl_edge *self, enum nccl_direction lane);
/* The oldest received frame that was not given back is. */
void nccl_edge_returned(struct nccl_edge *self, struct nccl_actions *out);
/* Something failed on the lane. */
void nccl_edge_failed(struct nccl_edge *self, enum nccl_direction lane, uint64_t now_ns,
                      struct nccl_actions *out);

#endif
