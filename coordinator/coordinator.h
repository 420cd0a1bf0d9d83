/* The coordinator's rooms share this header; nobody else includes it.
 *   coordinator.c  life, events, timers, shutdown
 *   membership.c   seats: HELLO to loss, readiness, epochs (COMMIT), fencing
 *   copies.c       copies of experts: ASSIGN, READY, RELEASE
 *   placement.c    what should be where
 *   operations.c   what people ask for: replicate, move, cancel; phases
 *   scaling.c      drain, scale
 *   restart.c      operations of an earlier coordinator
 *   rebalance.c    the planner's view of the troupe, and what its plan changes
 *   policy.c       what it does by itself, and limits
 *   quarantine.c   processes that gave wrong rows
 *   bias_versions.c  versions of the routing bias: made, handed out, freed
 *   admin.c        the same over HTTP
 *   statistics.c   STATS and STATUS
 *   recent.c       loads and speeds of late */
#ifndef TROUPE_COORDINATOR_H
#define TROUPE_COORDINATOR_H

#include "actors/actors.h"
#include "actors/member.h"
#include "coordinator/bias_versions.h"
#include "coordinator/placement.h"

enum order_kind { ORDER_NONE, ORDER_ASSIGN, ORDER_RELEASE };

/* What a process was told about a pair. */
enum assigned {
    ASSIGNED_NO,
    ASSIGNED_BEFORE, /* to hold it, by an order that was replaced: it may hold it or not */
    ASSIGNED_NOW,    /* to hold it, by its newest ASSIGN */
    ASSIGNED_HELD,   /* to hold it, and it has said that it does */
    ASSIGNED_RELEASING,
};

/* What a process is for a pair; bits. */
enum copy_bits {
    COPY_TARGET = 1, /* is to serve it */
    COPY_ACTIVE = 2, /* serves it in the current epoch */
};

/* A running total, and how much of it is of late (recent.c). */
struct rolling {
    uint64_t total, counted;
    double recent;
};

/* Of an expert process, as attention actors see it: items not answered yet, and how long answers took of late (a histogram that
 * forgets, actors/latency.h; 0: not known). */
struct answers {
    actor_id from;
    uint32_t queue, p50_us, p99_us;
};

/* A member as the coordinator knows it. */
struct seat {
    actor_id id;
    uint64_t incarnation;
    enum role role;
    char *name, *control_address, *data_address, *host; /* owned, in one piece at `name` */
    uint32_t pid;
    uint64_t introduced_epoch; /* the first that lists it; 0: none yet */
    uint64_t acknowledged_epoch;
    uint64_t foreign_epoch; /* adopted from an earlier coordinator when it came here: acknowledges
                               nothing */
    bool ready; /* all who must know it have adopted an epoch that lists it */
    bool draining;          /* it gives everything away and then ends */
    bool quarantined;       /* it gave wrong rows: it serves nothing and is given nothing */
    uint64_t draining_epoch; /* the first that says so; 0: an earlier coordinator's */
    uint64_t drained_ns;    /* since when it has nothing left; 0: it has */
    uint64_t leave_sent_ns; /* told to end; 0: not yet */
    uint64_t heard_ns, commit_sent_ns;
    Troupe__Heartbeat heartbeat; /* the last one, without its lists */
    bool has_heartbeat;
    uint64_t *load; /* [pairs] attention: rows routed, running totals */
    struct answers *answers; /* [answering] attention: of those it sends rows to; owned */
    uint32_t answering;
    struct bias_held bias; /* gateway, attention */

    /* expert */
    struct rolling rows, busy_ns; /* computed, and how long that took */
    uint32_t capacity; /* pairs it may hold */
    uint32_t room;     /* as its HELLO said; capacity is less for a while after a load has failed */
    bool fileless;     /* it can only take from others what they serve */
    uint32_t failures; /* loads, since one succeeded */
    uint64_t trusted_at_ns; /* when it is given more again; NEVER: it is */
    uint32_t targets;  /* pairs with COPY_TARGET */
    uint8_t *copy;     /* [pairs] bits of enum copy_bits */
    uint8_t *assigned; /* [pairs] enum assigned */
    bool dirty;        /* either has changed since copies_review looked at it */
    bool surplus;      /* it was told to hold something that it is nothing for */
    enum order_kind order;
    uint64_t operation, shrunk_epoch;
    uint64_t order_at_ns, order_wait_ns; /* when it is said again */
};

/* A member that was removed: its incarnation never comes back. */
struct ghost {
    actor_id id;
    uint64_t incarnation;
    char control_address[ADDRESS_BYTES_MAX + 1];
};
#define GHOSTS_MAX 256u

/* ---- operations ---- */

enum operation_kind {
    OPERATION_REPLICATE,
    OPERATION_MOVE,
    OPERATION_DRAIN,
    OPERATION_SCALE,
    OPERATION_REBALANCE,
};
enum operation_phase {
    PHASE_PREPARE, /* copies are loading, processes are starting or emptying */
    PHASE_READY,   /* everything is there */
    PHASE_COMMIT,  /* the epoch that says so is being published */
    PHASE_DRAIN,   /* attention actors are adopting it */
    PHASE_RELEASE, /* old copies are dropped, drained processes end */
    PHASE_DONE,
    PHASE_ABORTED,
};

/* A copy of a pair comes to `to` (0: none comes) and leaves `from` (0: none leaves). */
struct change {
    uint32_t pair;
    actor_id from, to;
};

/* A process that an operation starts or drains. */
struct party {
    actor_id id; /* 0: has not joined yet */
    bool gone;
    char name[64];
};

struct operation {
    uint64_t id;
    enum operation_kind kind;
    enum operation_phase phase, reached; /* reached: before it was aborted */
    enum role role;                      /* scale */
    uint32_t count;                      /* scale: wanted */
    bool starting;                       /* scale: up */
    bool told;                           /* the supervisor knows all that it must */
    bool automatic;                      /* nobody asked for it (policy.c) */
    uint64_t begun_by; /* incarnation of the coordinator */
    uint64_t began_ns, ended_ns, epoch, tell_at_ns;
    struct change *change; /* owned */
    uint32_t changes;
    struct party *party; /* owned */
    uint32_t parties;
    char reason[FAILURE_TEXT_BYTES]; /* why it was aborted */
};

/* Whoever gave wrong rows, by name; kept after it has ended. */
struct lie {
    char name[64], accuser[64];
    uint32_t times, layer, expert;
    bool undecided, stays; /* of the last time */
};
#define LIES_MAX 64u

/* Loads per window, recorded on request. */
struct recording {
    bool on;
    uint64_t window_ns, next_ns;
    uint64_t *before; /* [pairs] totals at the start of the window */
    uint32_t *rows;   /* [windows, pairs] */
    uint32_t windows, capacity;
};

/* A member removed lately, for the timelines of gateways. */
struct loss {
    uint64_t incarnation, at_ns, silent_ns;
    char reason[64];
};
#define LOSSES_MAX 32u

struct coordinator {
    struct actor actor;
    struct actor_identity identity;
    char *strings;
    struct settings settings;
    struct model_config config;
    uint64_t heartbeat_ns, retry_ns, lost_after_ns;
    uint64_t expert_bytes; /* estimate for one pair, for capacities */
    bool exited;

    struct seat *seat; /* [ACTORS_MAX] ascending id */
    uint32_t seats;
    actor_id last_id;
    struct ghost *ghost; /* [GHOSTS_MAX] */
    uint32_t next_ghost;
    struct loss loss[LOSSES_MAX]; /* a ring; incarnation 0: never used */
    uint32_t losses;

    uint64_t epoch, last_operation;
    bool learnt;             /* it has heard of an earlier coordinator's members */
    uint64_t learn_until_ns; /* it waits for more of them and publishes nothing; NEVER: no */
    uint32_t members_before; /* as many as they know of */
    uint32_t returned;       /* of them, so many have come */
    uint8_t *past; /* packed operations of an earlier coordinator, of the newest epoch heard of; NULL: none */
    size_t past_bytes;
    uint64_t past_epoch;
    bool changed; /* a new epoch is due at the end of this step */
    bool serving, placed, complained;
    uint64_t place_at_ns; /* NEVER: nobody to wait for */
    uint64_t statistics_at_ns, last_step_ns;

    uint32_t moe_pairs;
    uint32_t pairs;             /* layers * experts */
    uint8_t *is_moe;            /* [layers] */
    actor_id *home;             /* [pairs] the target that placement looks after; 0: nobody */
    uint16_t *targets, *actives, *waiting; /* [pairs] copies with COPY_TARGET, with COPY_ACTIVE, with
                                              the first but not the second */
    bool replicas_due; /* pairs that operations had kept to themselves may lack copies */
    bool source_due;   /* processes without files were given less because nobody served it yet, */
    bool source_came;  /* and something of it has come since */
    uint8_t *source;   /* planning: [pairs] enum pair_source */
    uint64_t *owner; /* [pairs] the operation that is at work on it; 0: none */
    struct operation operation[OPERATIONS_MAX]; /* a ring; id 0: never used */
    uint64_t last_operation_id;
    struct recording recording;
    struct lie lie[LIES_MAX]; /* the oldest name makes room */
    uint32_t lies;
    struct bias_versions bias;
    char *admin_token; /* NULL: none asked for */
    bool allow_faults;
    uint32_t *current, *wanted; /* planning: [pairs] */
    uint32_t *scratch;          /* planning: [6 * ACTORS_MAX] */
    uint64_t *load_of_gone;     /* [pairs] totals of attention actors that left */
    double *recent;             /* [pairs] rows of late, up to the end of the last window */
    uint64_t *counted;          /* [pairs] totals then */
    uint64_t recent_at_ns;      /* end of the next window; 0: none has begun */
    uint64_t rebalance_at_ns;   /* by itself; 0: not set yet */
    char description[200];
};

message coordinator_envelope(const struct coordinator *self);

/* membership.c */
struct seat *seat_find(const struct coordinator *self, actor_id id);
void membership_on_hello(struct coordinator *self, const message *envelope, uint64_t now_ns,
                         struct effects *out);
void membership_on_heartbeat(struct coordinator *self, struct seat *seat,
                             const Troupe__Heartbeat *heartbeat, uint64_t now_ns,
                             struct effects *out);
/* A message of somebody who is no member: told so if it was one once. */
void membership_on_stranger(struct coordinator *self, const message *envelope, uint64_t now_ns,
                            struct effects *out);
/* A heartbeat of a member that follows another coordinator. */
void membership_rejoin(struct coordinator *self, struct seat *seat, const message *envelope,
                       uint64_t now_ns, struct effects *out);
void membership_remove(struct coordinator *self, struct seat *seat, const char *why,
                       uint64_t now_ns, struct effects *out);
void membership_timer(struct coordinator *self, uint64_t now_ns, struct effects *out);
uint64_t membership_deadline(const struct coordinator *self);
/* Finds out who has become READY. */
void membership_review(struct coordinator *self, uint64_t now_ns, struct effects *out);
/* Publishes a new epoch if anything in it has changed. */
void membership_publish(struct coordinator *self, uint64_t now_ns, struct effects *out);
void membership_free(struct coordinator *self);
/* The current epoch as a message, in the effects' arena. */
Troupe__Commit *membership_commit(const struct coordinator *self, struct effects *out);
Troupe__Member *membership_member(const struct seat *seat, struct effects *out);

/* copies.c */
bool seat_serves(const struct coordinator *self, const struct seat *seat); /* a ready expert process */
void copies_plan(struct coordinator *self, uint64_t now_ns, struct effects *out);
/* The process is gone, or about to be forgotten. */
void copies_forget(struct coordinator *self, struct seat *seat);
void copies_on_ready(struct coordinator *self, struct seat *seat, const Troupe__Ready *ready,
                     uint64_t now_ns, struct effects *out);
/* Activates what is loaded, retires what has a successor, gives and repeats orders. */
void copies_review(struct coordinator *self, uint64_t now_ns, struct effects *out);
uint64_t copies_deadline(const struct coordinator *self);
/* What a member of an earlier coordinator holds. */
void copies_learn(struct coordinator *self, struct seat *seat, const Troupe__Hello *hello);
/* What it holds beside that; orders that it cannot take for new any more are given new numbers. */
void copies_learn_more(struct coordinator *self, struct seat *seat, const Troupe__Hello *hello,
                       uint64_t now_ns, struct effects *out);
void copies_learnt(struct coordinator *self, uint64_t now_ns, struct effects *out);
const char *copies_broken(const struct coordinator *self); /* what is wrong in them; NULL: nothing */
bool copies_complete(const struct coordinator *self); /* every pair has a ready holder */
void copy_set_target(struct coordinator *self, struct seat *seat, uint32_t pair, bool on);
void copy_activate(struct coordinator *self, struct seat *seat, uint32_t pair);
/* No attention actor uses an epoch any more in which the process held what it has lost since. */
bool copies_drained(const struct coordinator *self, const struct seat *seat);
/* The process is nothing for any pair and was told to hold none. */
bool copies_none(const struct coordinator *self, const struct seat *seat);

/* operations.c: each returns 0 with the operation's id, or why not. */
int operation_replicate(struct coordinator *self, uint32_t layer, uint32_t expert, actor_id to,
                        uint64_t now_ns, uint64_t *ret_id, struct failure *failure);
int operation_move(struct coordinator *self, uint32_t layer, uint32_t expert, actor_id from,
                   actor_id to, uint64_t now_ns, uint64_t *ret_id, struct failure *failure);
int operation_drain(struct coordinator *self, actor_id id, uint64_t now_ns, struct effects *out,
                    uint64_t *ret_id, struct failure *failure);
int operation_scale(struct coordinator *self, enum role role, uint32_t count, uint64_t now_ns,
                    struct effects *out, uint64_t *ret_id, struct failure *failure);
/* Every change belongs to one pair or another; takes the list, which malloc made. */
int operation_rebalance(struct coordinator *self, struct change **changes, uint32_t count,
                        bool automatic, uint64_t now_ns, uint64_t *ret_id, struct failure *failure);
int operation_cancel(struct coordinator *self, uint64_t id, uint64_t now_ns, struct effects *out,
                     struct failure *failure);
void operation_supersede(struct coordinator *self, uint64_t id, uint64_t now_ns,
                         struct effects *out);
/* A copy that it needs could not be loaded. */
void operation_failed(struct coordinator *self, uint64_t id, const struct seat *seat,
                      const char *error, uint64_t now_ns, struct effects *out);
void operations_step(struct coordinator *self, uint64_t now_ns, struct effects *out);
uint64_t operations_deadline(const struct coordinator *self);
void operations_joined(struct coordinator *self, struct seat *seat, uint64_t now_ns);
void operations_lost(struct coordinator *self, actor_id id, uint64_t now_ns, struct effects *out);
void operations_on_scaled(struct coordinator *self, const Troupe__Scaled *scaled, uint64_t now_ns,
                          struct effects *out);
void operations_free(struct coordinator *self);
/* About how many bytes of weights it has to load, and how many of them are. */
uint64_t operation_bytes(const struct coordinator *self, const struct operation *operation, uint64_t *ret_done);
const char *operation_kind_name(enum operation_kind kind);
const char *operation_phase_name(enum operation_phase phase);
bool operation_ended(const struct operation *operation);

/* restart.c */
void operations_learn(struct coordinator *self, const Troupe__Hello *hello);
void operations_learnt(struct coordinator *self, uint64_t now_ns, struct effects *out);
/* quarantine.c: what an attention actor's heartbeat says about expert processes. Removes seats: no pointer
 * to one is good after it. */
void quarantine_take(struct coordinator *self, const struct seat *accuser,
                     const Troupe__Heartbeat *heartbeat, uint64_t now_ns, struct effects *out);
void quarantine_fill(const struct coordinator *self, Troupe__Stats *stats, struct effects *out);
/* Copies of each pair that there should be, and that it takes to serve. */
uint32_t copies_wanted(const struct coordinator *self);
uint32_t copies_needed(const struct coordinator *self);

/* rebalance.c */
struct rebalance {
    uint32_t moves; /* copies that somebody must load */
    double before, after; /* mean balancedness of the layers */
    bool proposed;        /* false: nothing pays */
    uint64_t id;          /* of the operation; 0: none was begun */
};
struct rebalance_wish {
    uint32_t spare;   /* copies per layer beyond one of each expert */
    double threshold; /* nothing is planned at this mean balancedness or above; 0: always */
    bool dry_run, automatic;
};
int rebalance(struct coordinator *self, const struct rebalance_wish *wish, uint64_t now_ns,
              struct rebalance *ret, struct failure *failure);

/* policy.c */
struct policy_limits {
    uint32_t least, most; /* processes of a role */
    const char *least_name, *most_name; /* knobs */
};
struct policy_limits policy_limits(const struct coordinator *self, enum role role);
/* `here`: processes of the role that stay so far. */
int policy_check_scale(const struct coordinator *self, enum role role, uint32_t here, uint32_t count,
                       struct failure *failure);
int policy_check_leaving(const struct coordinator *self, enum role role, uint32_t here,
                         uint32_t going, struct failure *failure);
void policy_timer(struct coordinator *self, uint64_t now_ns, struct effects *out);
uint64_t policy_deadline(const struct coordinator *self);
/* bias_versions.c */
bool bias_open(struct coordinator *self); /* false: no memory */
void bias_close(struct coordinator *self);
/* It holds every version that exists, or need not. */
bool bias_is_held(const struct coordinator *self, const struct seat *seat);
void bias_joined(struct coordinator *self, struct seat *seat, uint64_t now_ns, struct effects *out);
void bias_on_heartbeat(struct coordinator *self, struct seat *seat,
                       const Troupe__Heartbeat *heartbeat, uint64_t now_ns, struct effects *out);
/* Makes a version when it is time to; makes one current that all hold; frees those that nobody uses. */
void bias_review(struct coordinator *self, uint64_t now_ns, struct effects *out);
uint64_t bias_deadline(const struct coordinator *self);
/* From the HELLO of somebody who knew an earlier coordinator; when all have come. */
void bias_learn(struct coordinator *self, struct seat *seat, const Troupe__Hello *hello,
                struct effects *out);
void bias_learnt(struct coordinator *self, uint64_t now_ns, struct effects *out);
/* The biases follow the load from now on by this rule, or stay as they are. */
int bias_switch(struct coordinator *self, bool on, const struct bias_rule *rule, uint64_t interval_ms,
                uint64_t now_ns, struct failure *failure);
/* Back to the model's own. */
void bias_reset(struct coordinator *self, uint64_t now_ns, struct effects *out);
/* Versions that exist and are neither current nor on their way, here and at members. */
uint32_t bias_left(const struct coordinator *self);

/* admin_view.c: true if the request was one of its own. */
bool admin_view(const struct coordinator *self, const struct http_request *request, bool allowed,
                struct effects *out);
/* admin.c */
void admin_on_request(struct coordinator *self, const struct http_request *request,
                      uint64_t now_ns, struct effects *out);

/* statistics.c */
uint64_t statistics_load(const struct coordinator *self, uint32_t pair); /* rows since start */
void statistics_take_loads(struct coordinator *self, struct seat *seat,
                           const Troupe__Heartbeat *heartbeat);
void statistics_take_answers(struct seat *seat, const Troupe__Heartbeat *heartbeat);
/* By all attention actors: the sum of the queues, the slowest of the quantiles. */
struct answers statistics_answers(const struct coordinator *self, actor_id from);
void statistics_forget(struct coordinator *self, const struct seat *seat);
void statistics_send(struct coordinator *self, uint64_t now_ns, struct effects *out);
/* recent.c */
void recent_timer(struct coordinator *self, uint64_t now_ns);
void recent_take(struct seat *seat, const Troupe__Heartbeat *heartbeat);
double recent_load(const struct coordinator *self, uint32_t pair); /* rows, as if all were of late */
double recent_row_ns(const struct seat *seat); /* what a row takes there; 0: not known */
/* Windows of loads, from start to stop; kept until the next start. */
int recording_start(struct coordinator *self, uint64_t window_ms, uint64_t now_ns,
                    struct failure *failure);
void recording_stop(struct coordinator *self);
void recording_timer(struct coordinator *self, uint64_t now_ns);
/* As a safetensors file with the tensor expert_load, int32 [window, layer, expert]. */
uint8_t *recording_file(const struct coordinator *self, size_t *ret_size, struct effects *out);
void statistics_on_request(struct coordinator *self, const message *envelope, uint64_t now_ns,
                           struct effects *out);

#endif
