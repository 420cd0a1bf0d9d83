/* Membership as every actor but the coordinator lives it: HELLO until WELCOME, heartbeats, adoption
 * of epochs, and the table of peers with their incarnations. A role's struct holds a `struct
 * member` and hands it every event first. */
#ifndef TROUPE_MEMBER_H
#define TROUPE_MEMBER_H

#include "actors/actor.h"
#include "config/settings.h"
#include "model/config.h"

#define PEER_NAME_BYTES 64

/* Another member of the adopted epoch. */
struct peer {
    actor_id id;
    uint64_t incarnation;
    enum role role;
    Troupe__ActorState
        state;      /* READY: everybody who must know this peer has adopted an epoch with it */
    bool connected; /* this role talks to it */
    bool lost;      /* the host saw it end, and no newer epoch has been adopted since */
    bool near;      /* on the same host */
    bool marked;    /* scratch of the adoption of an epoch */
    char name[PEER_NAME_BYTES];
    char control_address[ADDRESS_BYTES_MAX + 1];
    char data_address[ADDRESS_BYTES_MAX + 1]; /* of an expert process, kept by expert processes */
};

struct member {
    struct actor_identity identity; /* owned copy */
    char *strings;                  /* memory behind the identity */
    uint64_t capacity_bytes;
    uint64_t hello_retry_ns, heartbeat_interval_ns;
    uint32_t control_roles,
        data_roles; /* bit sets of roles to connect: control only, control and data */

    actor_id id; /* 0 until WELCOME */
    uint64_t coordinator_incarnation; /* whom it follows */
    uint64_t rejoining;               /* a new coordinator that asked for HELLO; 0: none */
    /* What a HELLO to a new coordinator says about this role; NULL: nothing. */
    void (*describe_holdings)(const struct member *self, Troupe__Hello *hello, struct effects *out);
    uint64_t hello_at_ns, heartbeat_at_ns; /* NEVER: not now */
    uint64_t epoch;                        /* adopted */
    char model_fingerprint[40]; /* of the troupe; empty before WELCOME */
    uint8_t *operations; /* packed, of the adopted epoch: only a coordinator can read them; NULL: none */
    size_t operations_bytes;
    uint64_t bias_version; /* current in the adopted epoch, see actors/bias_table.h */
    bool bias_on;
    bool ready;   /* as the adopted epoch lists it */
    bool quarantined; /* likewise: it gave wrong rows and serves nothing */
    bool draining; /* likewise: give away what there is; the coordinator says when to end */
    bool serving; /* requests may be submitted: the epoch serves, and all who must know this actor
                     do */
    bool exited;
    struct peer *peer; /* everybody of the epoch but this actor and the coordinator, ascending id */
    uint32_t peers, peers_capacity;
};

#define ROLE_BIT(role) (1u << (role))

/* What an event meant; bits. */
enum member_news {
    MEMBER_JOINED = 1,    /* WELCOME: the actor has an id */
    MEMBER_COMMITTED = 2, /* a newer epoch has been adopted; event->message->commit is it */
    MEMBER_HEARTBEAT = 4, /* a heartbeat is due: the role fills one in and calls member_heartbeat */
    MEMBER_LOST = 8,      /* event->peer is a known peer and now marked lost */
    MEMBER_DONE = 16,     /* the event has been dealt with wholly, or must be ignored */
    MEMBER_EXIT = 32,     /* EXIT has been emitted; nothing more is to be done */
    MEMBER_RENAMED = 64,  /* a restarted coordinator has given another id: to its peers the actor is a new one */
};

/* Copies the identity. False: out of memory. */
bool member_init(struct member *self, const struct actor_identity *identity,
                 const struct settings *settings, uint64_t capacity_bytes, uint32_t control_roles,
                 uint32_t data_roles);
void member_free(struct member *self);

/* To be called with every event, before the role looks at it. Returns bits of enum member_news.
 * Messages whose sender is not the coordinator or a peer of the adopted epoch, in the incarnation
 * named there, are traced and come back as MEMBER_DONE. */
uint32_t member_step(struct member *self, const struct event *event, uint64_t now_ns,
                     struct effects *out);
uint64_t member_deadline(const struct member *self);

/* Sends the heartbeat with the adopted epoch filled in and sets the time of the next one. */
void member_heartbeat(struct member *self, Troupe__Heartbeat *heartbeat, uint64_t now_ns,
                      struct effects *out);

/* An envelope from this actor, without a body. */
message member_envelope(const struct member *self);

/* NULL if `id` is no peer of the adopted epoch. */
struct peer *member_peer(const struct member *self, actor_id id);
/* Makes sure that control messages reach a peer that this role does not talk to usually. */
void member_reach(struct member *self, struct peer *peer, struct effects *out);
/* The peer that sent this frame, if it is known in that incarnation, has that role, and meant this
 * incarnation of us. */
const struct peer *member_frame_sender(const struct member *self, const struct frame_header *header,
                                       enum role role);

/* Copies an identity with its strings into one piece of memory, returned for free(); NULL: out of
 * memory. */
char *identity_copy(struct actor_identity *ret, const struct actor_identity *identity);
/* About how many bytes the weights of one expert take. */
uint64_t identity_expert_bytes(const struct actor_identity *identity, const struct model_config *config);
/* The fp8 profile, whatever the device: products quantise their rows. */
bool identity_is_fp8(const struct actor_identity *identity);
/* Bytes of one activation of the numerics profile, as it travels in frames. */
uint32_t identity_activation_bytes(const struct actor_identity *identity);

#endif
