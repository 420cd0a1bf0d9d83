/* The coordinator's rooms share this header; nobody else includes it.
 *   coordinator.c  life, events, timers, shutdown
 *   membership.c   seats: HELLO to loss, readiness, epochs (COMMIT), fencing
 *   copies.c       copies of experts: ASSIGN, READY, RELEASE
 *   placement.c    what should be where
 *   statistics.c   STATS and STATUS */
#ifndef TROUPE_COORDINATOR_H
#define TROUPE_COORDINATOR_H

#include "actors/actors.h"
#include "actors/member.h"
#include "coordinator/placement.h"

enum order_kind { ORDER_NONE, ORDER_ASSIGN, ORDER_RELEASE };

/* What a process was told about a pair. */
enum assigned {
    ASSIGNED_NO,
    ASSIGNED_BEFORE, /* to hold it, by an order that was replaced: it may hold it or not */
    ASSIGNED_NOW,    /* to hold it, by its newest ASSIGN */
    ASSIGNED_RELEASING,
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
    uint64_t heard_ns, commit_sent_ns;
    Troupe__Heartbeat heartbeat; /* the last one, without its lists */
    bool has_heartbeat;
    uint64_t *load; /* [pairs] attention: rows routed, running totals */

    /* expert */
    uint32_t capacity; /* pairs it may hold */
    uint32_t room;     /* as its HELLO said; capacity is less for a while after a load has failed */
    uint32_t failures; /* loads, since one succeeded */
    uint64_t trusted_at_ns; /* when it is given more again; NEVER: it is */
    uint8_t *assigned; /* [pairs] enum assigned */
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

    uint64_t epoch, last_operation;
    bool learnt;             /* it has heard of an earlier coordinator's members */
    uint64_t learn_until_ns; /* it waits for more of them and publishes nothing; NEVER: no */
    uint32_t members_before; /* as many as they know of */
    bool changed; /* a new epoch is due at the end of this step */
    bool serving, placed, complained;
    uint64_t place_at_ns; /* NEVER: nobody to wait for */
    uint64_t statistics_at_ns, last_step_ns;

    uint32_t moe_pairs;
    uint32_t pairs;             /* layers * experts */
    uint8_t *is_moe;            /* [layers] */
    actor_id *active;           /* [pairs] who serves it; 0: nobody */
    actor_id *target;           /* [pairs] who is to serve it; 0: nobody */
    uint32_t *current, *wanted; /* planning: [pairs] */
    uint32_t *scratch;          /* planning: [6 * ACTORS_MAX] */
    uint64_t *load_of_gone;     /* [pairs] totals of attention actors that left */
    char description[160];
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
/* Publishes a new epoch if anything in it has changed. */
void membership_publish(struct coordinator *self, uint64_t now_ns, struct effects *out);
void membership_free(struct coordinator *self);
/* The current epoch as a message, in the effects' arena. */
Troupe__Commit *membership_commit(const struct coordinator *self, struct effects *out);
Troupe__Member *membership_member(const struct seat *seat, struct effects *out);

/* copies.c */
bool seat_serves(const struct coordinator *self, actor_id id); /* a ready expert process */
void copies_plan(struct coordinator *self, uint64_t now_ns, struct effects *out);
void copies_forget(struct coordinator *self, actor_id id);
void copies_on_ready(struct coordinator *self, struct seat *seat, const Troupe__Ready *ready,
                     uint64_t now_ns, struct effects *out);
void copies_timer(struct coordinator *self, uint64_t now_ns, struct effects *out);
uint64_t copies_deadline(const struct coordinator *self);
/* What a member of an earlier coordinator holds. */
void copies_learn(struct coordinator *self, struct seat *seat, const Troupe__Hello *hello);
/* What it holds beside that; orders that it cannot take for new any more are given new numbers. */
void copies_learn_more(struct coordinator *self, struct seat *seat, const Troupe__Hello *hello,
                       uint64_t now_ns, struct effects *out);
void copies_learnt(struct coordinator *self, uint64_t now_ns, struct effects *out);
bool copies_complete(const struct coordinator *self); /* every pair has a ready holder */

/* statistics.c */
void statistics_take_loads(struct coordinator *self, struct seat *seat,
                           const Troupe__Heartbeat *heartbeat);
void statistics_forget(struct coordinator *self, const struct seat *seat);
void statistics_send(struct coordinator *self, uint64_t now_ns, struct effects *out);
void statistics_on_request(struct coordinator *self, const message *envelope, uint64_t now_ns,
                           struct effects *out);

#endif
