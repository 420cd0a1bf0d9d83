/* One edge of the NCCL transport as a state machine; see the header for states and invariants. */
#include "actors/host/nccl_edge.h"

#include <string.h>

#define NEVER UINT64_MAX

const char *nccl_lane_state_name(enum nccl_lane_state state) {
    static const char *const names[] = {"idle",  "naming",  "offered", "making",
                                        "ready", "failing", "closed"};
    return names[state];
}

int nccl_message_check(const void *bytes, size_t size, struct failure *failure) {
    struct nccl_message message;
    if (size != sizeof message)
        return fail(failure, ERR_CORRUPT, "nccl message: expected %zu bytes, found %zu",
                    sizeof message, size);
    memcpy(&message, bytes, sizeof message);
    if (message.magic != NCCL_MESSAGE_MAGIC)
        return fail(failure, ERR_CORRUPT, "nccl message: magic: expected %08x, found %08x",
                    NCCL_MESSAGE_MAGIC, message.magic);
    if (message.version != NCCL_MESSAGE_VERSION)
        return fail(failure, ERR_VERSION,
                    "nccl message: version: expected %u, found %u (run the same version "
                    "everywhere)",
                    NCCL_MESSAGE_VERSION, message.version);
    bool offer = message.kind == NCCL_OFFER || message.kind == NCCL_ACCEPT;
    if (message.kind < NCCL_OFFER || message.kind > NCCL_CLOSE || message.sender > 1)
        return fail(failure, ERR_CORRUPT, "nccl message: kind %u of sender %u", message.kind,
                    message.sender);
    if (offer && (message.slots == 0 || message.slots > NCCL_SLOTS_MAX || message.slot_bytes == 0 ||
                  message.slot_bytes % 64 != 0))
        return fail(
            failure, ERR_CORRUPT,
            "nccl message: expected 1 to %d slots of a multiple of 64 bytes, found %u of %u",
            NCCL_SLOTS_MAX, message.slots, message.slot_bytes);
    /* Who may say what. */
    bool by_sender =
        message.kind == NCCL_OFFER || message.kind == NCCL_FRAME || message.kind == NCCL_QUERY;
    bool by_receiver = message.kind == NCCL_ACCEPT || message.kind == NCCL_CREDIT;
    if ((by_sender && message.sender != 1) || (by_receiver && message.sender != 0))
        return fail(failure, ERR_CORRUPT, "nccl message: kind %u by the wrong end", message.kind);
    return 0;
}

/* ---- Actions ---- */

static struct nccl_action *act(struct nccl_actions *out, enum nccl_action_kind kind,
                               enum nccl_direction lane) {
    ASSERT(out->count < NCCL_ACTIONS_MAX);
    struct nccl_action *action = &out->list[out->count++];
    *action = (struct nccl_action){.kind = kind, .lane = lane};
    return action;
}

static struct nccl_message *tell(struct nccl_edge *self, struct nccl_actions *out,
                                 enum nccl_message_kind kind, enum nccl_direction lane) {
    struct nccl_message *message = &act(out, NCCL_DO_MESSAGE, lane)->message;
    *message = (struct nccl_message){
        .magic = NCCL_MESSAGE_MAGIC,
        .version = NCCL_MESSAGE_VERSION,
        .kind = (uint16_t)kind,
        .from_incarnation = self->self_incarnation,
        .to_incarnation = self->peer_incarnation,
        .sender = lane == NCCL_OUT,
        .generation = self->lane[lane].generation,
    };
    return message;
}

static void tell_offer(struct nccl_edge *self, struct nccl_actions *out) {
    const struct nccl_lane *lane = &self->lane[NCCL_OUT];
    struct nccl_message *message = tell(self, out, NCCL_OFFER, NCCL_OUT);
    message->slots = self->options.slots;
    message->slot_bytes = self->options.slot_bytes;
    message->id = lane->id;
}

static void tell_accept(struct nccl_edge *self, struct nccl_actions *out) {
    const struct nccl_lane *lane = &self->lane[NCCL_IN];
    struct nccl_message *message = tell(self, out, NCCL_ACCEPT, NCCL_IN);
    message->slots = lane->slots;
    message->slot_bytes = lane->slot_bytes;
}

static void tell_credit(struct nccl_edge *self, struct nccl_actions *out) {
    struct nccl_lane *lane = &self->lane[NCCL_IN];
    lane->told = lane->returned;
    tell(self, out, NCCL_CREDIT, NCCL_IN)->sequence = lane->returned;
}

/* ---- Lanes ---- */

static bool keeper_has(const struct nccl_lane *lane) {
    return lane->state == LANE_NAMING || lane->state == LANE_MAKING || lane->state == LANE_FAILING;
}

static void lane_forget_frames(struct nccl_lane *lane) {
    lane->posted = lane->completed = lane->returned = lane->told = 0;
}

static uint64_t pause_of(const struct nccl_edge *self, uint32_t failures) {
    uint32_t doublings = failures > 1 ? failures - 1 : 0;
    return self->options.pause_ns << (doublings < 6 ? doublings : 6);
}

/* Nothing is left of the lane. */
static void lane_rest(struct nccl_edge *self, enum nccl_direction direction, uint64_t now_ns) {
    struct nccl_lane *lane = &self->lane[direction];
    lane->held = false;
    lane_forget_frames(lane);
    lane->state = lane->closing ? LANE_CLOSED : LANE_IDLE;
    lane->due_ns = NEVER;
    if (lane->state == LANE_IDLE && direction == NCCL_OUT &&
        lane->failures <= self->options.failures_max)
        lane->due_ns = now_ns + pause_of(self, lane->failures);
}

/* To FAILING, or at once to rest where there is nothing to take down. A lane that the keeper is
 * still at work on (NAMING, MAKING) is taken down as well: the executor tells the keeper to stop.
 */
static void lane_down(struct nccl_edge *self, enum nccl_direction direction, bool orderly,
                      uint64_t now_ns, struct nccl_actions *out) {
    struct nccl_lane *lane = &self->lane[direction];
    if (lane->state == LANE_FAILING || lane->state == LANE_CLOSED)
        return;
    if (!keeper_has(lane) && !lane->held) {
        lane_rest(self, direction, now_ns);
        return;
    }
    act(out, NCCL_DO_UNMAKE, direction)->orderly = orderly;
    lane->state = LANE_FAILING;
    lane->due_ns = NEVER;
}

/* A failure: tells the peer, and when frames could be lost takes the other lane with it. */
static void lane_fail(struct nccl_edge *self, enum nccl_direction direction, bool tell_peer,
                      uint64_t now_ns, struct nccl_actions *out) {
    struct nccl_lane *lane = &self->lane[direction];
    if (lane->state == LANE_FAILING || lane->state == LANE_CLOSED)
        return;
    const bool was_ready = lane->state == LANE_READY;
    lane->failures++;
    if (tell_peer && lane->state != LANE_IDLE)
        tell(self, out, NCCL_CLOSE, direction);
    lane_down(self, direction, false, now_ns, out);
    if (!was_ready)
        return;
    self->lost = true;
    const enum nccl_direction other = direction == NCCL_OUT ? NCCL_IN : NCCL_OUT;
    if (self->lane[other].state == LANE_READY || self->lane[other].state == LANE_MAKING) {
        self->lane[other].failures++;
        tell(self, out, NCCL_CLOSE, other);
        lane_down(self, other, false, now_ns, out);
    }
}

static void out_begin(struct nccl_edge *self, struct nccl_actions *out) {
    struct nccl_lane *lane = &self->lane[NCCL_OUT];
    lane->generation++;
    lane->state = LANE_NAMING;
    lane->due_ns = NEVER;
    act(out, NCCL_DO_NAME, NCCL_OUT);
}

static void lane_make(struct nccl_edge *self, enum nccl_direction direction, uint64_t now_ns,
                      struct nccl_actions *out) {
    struct nccl_lane *lane = &self->lane[direction];
    lane->state = LANE_MAKING;
    lane->held = true;
    lane->due_ns = now_ns + self->options.make_ns;
    lane_forget_frames(lane);
    act(out, NCCL_DO_MAKE, direction);
}

static void in_begin(struct nccl_edge *self, const struct nccl_message *offer, uint64_t now_ns,
                     struct nccl_actions *out) {
    struct nccl_lane *lane = &self->lane[NCCL_IN];
    const struct nccl_edge_options *options = &self->options;
    lane->generation = offer->generation;
    lane->id = offer->id;
    lane->slots = offer->slots < options->slots ? offer->slots : options->slots;
    lane->slot_bytes =
        offer->slot_bytes < options->slot_bytes ? offer->slot_bytes : options->slot_bytes;
    lane->offered = false;
    lane_make(self, NCCL_IN, now_ns, out);
    tell_accept(self, out);
}

/* ---- The edge ---- */

void nccl_edge_open(struct nccl_edge *self, const struct nccl_edge_options *options,
                    uint64_t own_incarnation, uint64_t peer_incarnation, uint64_t now_ns) {
    ASSERT(options->slots >= 1 && options->slots <= NCCL_SLOTS_MAX && options->slot_bytes > 0);
    *self = (struct nccl_edge){
        .options = *options,
        .self_incarnation = own_incarnation,
        .peer_incarnation = peer_incarnation,
    };
    self->lane[NCCL_OUT].due_ns = now_ns;
    self->lane[NCCL_OUT].generation = options->generation;
    self->lane[NCCL_IN].due_ns = NEVER;
    self->lane[NCCL_IN].generation = options->peer_generation;
}

void nccl_edge_close(struct nccl_edge *self, struct nccl_actions *out) {
    for (int i = NCCL_OUT; i <= NCCL_IN; i++) {
        struct nccl_lane *lane = &self->lane[i];
        lane->closing = true;
        lane->offered = false;
        if (lane->state == LANE_OFFERED || lane->state == LANE_MAKING || lane->state == LANE_READY)
            tell(self, out, NCCL_CLOSE, (enum nccl_direction)i)->bytes = 1;
        /* The peer may still be sending, or gone: only an end without frames under way is
         * orderly. */
        const bool quiet = lane->state == LANE_READY && lane->posted == lane->completed;
        lane_down(self, (enum nccl_direction)i, quiet, 0, out);
    }
}

bool nccl_edge_closed(const struct nccl_edge *self) {
    return self->lane[NCCL_OUT].state == LANE_CLOSED && self->lane[NCCL_IN].state == LANE_CLOSED;
}

bool nccl_edge_ready(const struct nccl_edge *self) {
    return self->lane[NCCL_OUT].state == LANE_READY;
}

/* Both the receiver's slot and the own one must be free again. */
bool nccl_edge_room(const struct nccl_edge *self) {
    const struct nccl_lane *lane = &self->lane[NCCL_OUT];
    const uint64_t done = lane->returned < lane->completed ? lane->returned : lane->completed;
    return lane->state == LANE_READY && lane->posted - done < lane->slots;
}

bool nccl_edge_take_loss(struct nccl_edge *self) {
    const bool lost = self->lost;
    self->lost = false;
    return lost;
}

/* ---- Messages ---- */

static void on_offer(struct nccl_edge *self, const struct nccl_message *message, uint64_t now_ns,
                     struct nccl_actions *out) {
    struct nccl_lane *lane = &self->lane[NCCL_IN];
    if (lane->closing || message->generation < lane->generation)
        return;
    if (message->generation == lane->generation) { /* the answer was lost, or it is the one kept */
        if (lane->state == LANE_MAKING || lane->state == LANE_READY)
            tell_accept(self, out);
        else /* it has failed here already, and the CLOSE that said so was lost */
            tell(self, out, NCCL_CLOSE, NCCL_IN);
        return;
    }
    if (lane->state == LANE_IDLE) {
        in_begin(self, message, now_ns, out);
        return;
    }
    /* The peer has given the old one up. */
    lane->offered = true;
    lane->offer = *message;
    lane_fail(self, NCCL_IN, false, now_ns, out);
}

static void on_accept(struct nccl_edge *self, const struct nccl_message *message, uint64_t now_ns,
                      struct nccl_actions *out) {
    struct nccl_lane *lane = &self->lane[NCCL_OUT];
    if (lane->state != LANE_OFFERED || message->generation != lane->generation)
        return;
    if (message->slots > self->options.slots || message->slot_bytes > self->options.slot_bytes) {
        lane_fail(self, NCCL_OUT, true, now_ns, out); /* more than was offered */
        return;
    }
    lane->slots = message->slots;
    lane->slot_bytes = message->slot_bytes;
    lane_make(self, NCCL_OUT, now_ns, out);
}

/* A frame is on its way: its receive is posted, in order. An end that is still making its
 * communicator keeps nothing: the other one cannot be ready before this one has joined, but may be
 * sooner through, so what is announced then is posted when it is made. */
static void on_frame(struct nccl_edge *self, const struct nccl_message *message, uint64_t now_ns,
                     struct nccl_actions *out) {
    struct nccl_lane *lane = &self->lane[NCCL_IN];
    if (message->generation == lane->generation && lane->state == LANE_IDLE)
        tell(self, out, NCCL_CLOSE, NCCL_IN); /* the one that said so was lost */
    if (message->generation != lane->generation ||
        (lane->state != LANE_READY && lane->state != LANE_MAKING) ||
        message->sequence < lane->posted)
        return;
    if (message->sequence > lane->posted || message->bytes == 0 ||
        message->bytes > lane->slot_bytes || lane->posted - lane->returned >= lane->slots) {
        lane_fail(self, NCCL_IN, true, now_ns, out);
        return;
    }
    lane->bytes[lane->posted % NCCL_SLOTS_MAX] = (uint32_t)message->bytes;
    lane->posted_ns[lane->posted % NCCL_SLOTS_MAX] = now_ns;
    if (lane->state == LANE_READY) {
        struct nccl_action *action = act(out, NCCL_DO_RECEIVE, NCCL_IN);
        action->sequence = lane->posted;
        action->bytes = (uint32_t)message->bytes;
    }
    lane->posted++;
}

static void on_credit(struct nccl_edge *self, const struct nccl_message *message, uint64_t now_ns,
                      struct nccl_actions *out) {
    struct nccl_lane *lane = &self->lane[NCCL_OUT];
    if (lane->state != LANE_READY || message->generation != lane->generation)
        return;
    if (message->sequence > lane->posted)
        lane_fail(self, NCCL_OUT, true, now_ns, out);
    else if (message->sequence > lane->returned)
        lane->returned = message->sequence;
}

static void on_close(struct nccl_edge *self, const struct nccl_message *message,
                     enum nccl_direction direction, uint64_t now_ns, struct nccl_actions *out) {
    struct nccl_lane *lane = &self->lane[direction];
    if (message->generation != lane->generation || lane->state == LANE_IDLE)
        return;
    if (message->bytes == 1) { /* the peer has no more to do with this process: no loss */
        const bool quiet = lane->state == LANE_READY && lane->posted == lane->completed;
        lane_down(self, direction, quiet, now_ns, out);
    } else {
        lane_fail(self, direction, false, now_ns, out);
    }
}

void nccl_edge_message(struct nccl_edge *self, const struct nccl_message *message, uint64_t now_ns,
                       struct nccl_actions *out) {
    if (message->from_incarnation != self->peer_incarnation ||
        message->to_incarnation != self->self_incarnation)
        return;
    /* The sender of a lane is at its OUT, so its messages are about the receiver's IN. */
    const enum nccl_direction direction = message->sender ? NCCL_IN : NCCL_OUT;
    switch (message->kind) {
    case NCCL_OFFER:
        on_offer(self, message, now_ns, out);
        break;
    case NCCL_ACCEPT:
        on_accept(self, message, now_ns, out);
        break;
    case NCCL_FRAME:
        on_frame(self, message, now_ns, out);
        break;
    case NCCL_CREDIT:
        on_credit(self, message, now_ns, out);
        break;
    case NCCL_QUERY:
        if (self->lane[NCCL_IN].state == LANE_READY &&
            message->generation == self->lane[NCCL_IN].generation)
            tell_credit(self, out);
        break;
    default:
        on_close(self, message, direction, now_ns, out);
    }
}

/* ---- The keeper's answers ---- */

void nccl_edge_named(struct nccl_edge *self, int error, const struct nccl_id *id, uint64_t now_ns,
                     struct nccl_actions *out) {
    struct nccl_lane *lane = &self->lane[NCCL_OUT];
    if (lane->state != LANE_NAMING) /* given up meanwhile: FAILING waits for its own answer */
        return;
    if (error < 0) {
        lane->failures++;
        lane_rest(self, NCCL_OUT, now_ns);
        return;
    }
    lane->id = *id;
    lane->state = LANE_OFFERED;
    lane->due_ns = now_ns + self->options.offer_retry_ns;
    tell_offer(self, out);
}

static void post_announced(struct nccl_edge *self, uint64_t now_ns, struct nccl_actions *out) {
    struct nccl_lane *lane = &self->lane[NCCL_IN];
    for (uint64_t n = 0; n < lane->posted; n++) {
        struct nccl_action *action = act(out, NCCL_DO_RECEIVE, NCCL_IN);
        action->sequence = n;
        action->bytes = lane->bytes[n % NCCL_SLOTS_MAX];
        lane->posted_ns[n % NCCL_SLOTS_MAX] = now_ns;
    }
}

void nccl_edge_made(struct nccl_edge *self, enum nccl_direction direction, int error,
                    uint64_t now_ns, struct nccl_actions *out) {
    struct nccl_lane *lane = &self->lane[direction];
    if (lane->state != LANE_MAKING)
        return;
    if (error < 0) {
        lane_fail(self, direction, true, now_ns, out);
        return;
    }
    lane->state = LANE_READY;
    lane->due_ns = NEVER;
    if (direction == NCCL_IN)
        post_announced(self, now_ns, out);
}

void nccl_edge_unmade(struct nccl_edge *self, enum nccl_direction direction, uint64_t now_ns,
                      struct nccl_actions *out) {
    struct nccl_lane *lane = &self->lane[direction];
    ASSERT(lane->state == LANE_FAILING);
    lane_rest(self, direction, now_ns);
    if (direction == NCCL_IN && lane->state == LANE_IDLE && lane->offered) {
        struct nccl_message offer = lane->offer;
        in_begin(self, &offer, now_ns, out);
    }
}

/* ---- Frames ---- */

uint64_t nccl_edge_post(struct nccl_edge *self, uint32_t bytes, uint64_t now_ns,
                        struct nccl_actions *out) {
    struct nccl_lane *lane = &self->lane[NCCL_OUT];
    ASSERT(nccl_edge_room(self) && bytes > 0 && bytes <= lane->slot_bytes);
    const uint64_t sequence = lane->posted++;
    lane->bytes[sequence % NCCL_SLOTS_MAX] = bytes;
    lane->posted_ns[sequence % NCCL_SLOTS_MAX] = now_ns;
    struct nccl_message *message = tell(self, out, NCCL_FRAME, NCCL_OUT);
    message->sequence = sequence;
    message->bytes = bytes;
    if (lane->posted - lane->returned == lane->slots)
        lane->due_ns = now_ns + self->options.offer_retry_ns;
    return sequence;
}

void nccl_edge_completed(struct nccl_edge *self, enum nccl_direction direction) {
    struct nccl_lane *lane = &self->lane[direction];
    ASSERT(lane->state == LANE_READY && lane->completed < lane->posted);
    lane->completed++;
    lane->failures = 0; /* it works */
}

void nccl_edge_returned(struct nccl_edge *self, struct nccl_actions *out) {
    struct nccl_lane *lane = &self->lane[NCCL_IN];
    if (lane->state != LANE_READY) /* it was being read when the lane failed */
        return;
    ASSERT(lane->returned < lane->completed);
    lane->returned++;
    /* Credits in halves of the slots: fewer messages, and the sender never runs dry for long. */
    if (lane->returned - lane->told < (lane->slots + 1) / 2)
        return;
    tell_credit(self, out);
}

void nccl_edge_failed(struct nccl_edge *self, enum nccl_direction direction, uint64_t now_ns,
                      struct nccl_actions *out) {
    lane_fail(self, direction, true, now_ns, out);
}

/* ---- Time ---- */

/* When the oldest frame under way counts as stuck. */
static uint64_t frame_due(const struct nccl_edge *self, const struct nccl_lane *lane) {
    if (lane->state != LANE_READY || lane->completed == lane->posted)
        return NEVER;
    return lane->posted_ns[lane->completed % NCCL_SLOTS_MAX] + self->options.frame_ns;
}

uint64_t nccl_edge_deadline(const struct nccl_edge *self) {
    uint64_t due = NEVER;
    for (int i = NCCL_OUT; i <= NCCL_IN; i++) {
        const struct nccl_lane *lane = &self->lane[i];
        const uint64_t frame = frame_due(self, lane);
        due = lane->due_ns < due ? lane->due_ns : due;
        due = frame < due ? frame : due;
    }
    return due;
}

static void query_credit(struct nccl_edge *self, uint64_t now_ns, struct nccl_actions *out) {
    struct nccl_lane *lane = &self->lane[NCCL_OUT];
    lane->due_ns = NEVER;
    if (lane->posted - lane->returned < lane->slots)
        return;
    lane->due_ns = now_ns + self->options.offer_retry_ns;
    tell(self, out, NCCL_QUERY, NCCL_OUT)->sequence = lane->posted;
}

void nccl_edge_timer(struct nccl_edge *self, uint64_t now_ns, struct nccl_actions *out) {
    for (int i = NCCL_OUT; i <= NCCL_IN; i++) {
        struct nccl_lane *lane = &self->lane[i];
        const enum nccl_direction direction = (enum nccl_direction)i;
        if (now_ns >= frame_due(self, lane)) {
            lane_fail(self, direction, true, now_ns, out);
        } else if (now_ns < lane->due_ns) {
            continue;
        } else if (lane->state == LANE_IDLE) {
            out_begin(self, out);
        } else if (lane->state == LANE_OFFERED) {
            lane->due_ns = now_ns + self->options.offer_retry_ns;
            tell_offer(self, out);
        } else if (lane->state == LANE_MAKING) {
            lane_fail(self, direction, true, now_ns, out);
        } else { /* READY */
            query_credit(self, now_ns, out);
        }
    }
}
