/* The actor core: pure state machines. Events in, effects out; two hosts run them (actors/host: processes; simulator: virtual time).
 *
 * An actor never blocks and never reads a clock, socket, file or random device. Same state + same event + same now => same effects.
 * What an event points to is borrowed for the call; what an effect points to is borrowed by the host until it has carried the effect
 * out (for COMPUTE: until the COMPUTED event has been delivered), unless it was copied into the effects' arena by effects_copy(). */
#ifndef TROUPE_ACTOR_H
#define TROUPE_ACTOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "actors/errors.h"
#include "actors/limits.h"
#include "engine/engine.h"
#include "proto/frame.h"
#include "troupe.pb-c.h"

typedef Troupe__Envelope message; /* a decoded control message */
typedef uint32_t actor_id;        /* given by the coordinator in WELCOME; 0: none */
#define ACTOR_COORDINATOR ((actor_id)1)
#define NEVER UINT64_MAX

enum role {
    ROLE_NONE = 0,
    ROLE_COORDINATOR = 1,
    ROLE_GATEWAY = 2,
    ROLE_ATTENTION = 3,
    ROLE_EXPERT = 4,
    ROLE_SAMPLER = 5,
    ROLE_CONTROL = 6, /* troupe ctl, generate, check: talk to the others without serving */
};
const char *role_name(enum role role);

enum event_kind {
    EVENT_START,        /* first event of every actor */
    EVENT_TIMER,        /* actor_deadline() has passed */
    EVENT_MESSAGE,      /* a control message that passed wire_unpack */
    EVENT_FRAME,        /* a data frame that passed frame_check */
    EVENT_COMPUTED,     /* a program has completed */
    EVENT_LOADED,       /* a LOAD effect has completed or failed */
    EVENT_PEER_LOST,    /* the host saw a peer's connection or process end */
    EVENT_HTTP_REQUEST, /* gateway: a whole request has arrived */
    EVENT_CLIENT_GONE,  /* gateway: the client of a connection has hung up */
    EVENT_SHUTDOWN,     /* finish what is admitted, then EXIT */
};

struct http_request {
    uint64_t client; /* names the connection + request; never used again */
    bool admin;                /* it came over a socket that only the operator reaches */
    const char *method, *path; /* path without query */
    const char *query;         /* after '?', "" if none */
    const char *authorization; /* header values, NULL if absent */
    const char *request_id;    /* X-Request-Id */
    const char *stream_resume; /* X-Stream-Resume: events are wanted with ids */
    const char *last_event_id; /* Last-Event-ID: what has been seen of the request, by such an id */
    const char *traceparent;   /* of W3C Trace Context */
    const char *trace;         /* X-Troupe-Trace: the answer is to say who computed it */
    const char *body;
    size_t body_bytes;
};

struct event {
    enum event_kind kind;
    union {
        const message *message;
        struct {
            const struct frame *frame;
        };
        const struct program_result *computed;
        struct {
            uint32_t layer, expert;
            int error; /* 0 or negative */
            const char *text;
            uint64_t operation, bytes;
        } loaded;
        struct {
            actor_id id;
            uint64_t incarnation;
        } peer;
        const struct http_request *http;
        uint64_t client;
    };
};

enum effect_kind {
    EFFECT_SEND,       /* packed control message to an actor */
    EFFECT_TRANSFER,   /* data frame to an actor */
    EFFECT_COMPUTE,    /* program on the actor's engine, answered by COMPUTED, in order */
    EFFECT_STREAM,     /* bytes to an HTTP client */
    EFFECT_LOAD,       /* load weights of (layer, expert) in the background, answered by LOADED */
    EFFECT_UNLOAD,     /* drop them */
    EFFECT_CONNECT,    /* learn where an actor lives; a new incarnation or address replaces the old connection */
    EFFECT_DISCONNECT, /* forget an actor */
    EFFECT_TRACE,      /* a line for the log; also hashed by the simulator */
    EFFECT_RELAY,      /* pass the HTTP request being handled on to a gateway of this host, and its answer back */
    EFFECT_FAULT,      /* inflict a fault on a process of this host; the host answers the HTTP client */
    EFFECT_JOURNAL,    /* record the live view's feed in a file, or stop; the host answers the HTTP client */
    EFFECT_EXIT,       /* the process may end (drained, or refused: code != 0) */
};

enum trace_level { TRACE_DEBUG, TRACE_INFO, TRACE_WARNING, TRACE_ERROR };

struct effect {
    enum effect_kind kind;
    union {
        struct {
            actor_id to;
            const uint8_t *bytes;
            size_t size;
        } send;
        struct {
            /* Header complete but for magic, version, crc, payload_bytes, row_bytes (if region != NONE) and from*: the host fills
             * those in. Payload: `prefix` as is (groups and item rows, or specs and words; padded by the host to the rows'
             * offset), then `count` rows gathered from `region` of `slot` by index (NULL: 0..count-1). */
            struct frame_header header;
            const void *prefix;
            size_t prefix_bytes;
            enum region region;
            uint32_t slot;
            const uint32_t *index;
            uint32_t count;
            bool more; /* further frames to the same actor follow soon: it need not be woken for this one */
        } transfer;
        struct program compute;
        struct {
            uint64_t client;
            uint16_t status;          /* first STREAM of a client: HTTP status; later ones: 0 */
            const char *content_type; /* first one only; static string */
            const char *extra_header; /* first one only, "Name: value" or NULL */
            const uint8_t *bytes;
            size_t size;
            bool last; /* the response is complete */
        } stream;
        struct {
            uint32_t layer, expert;
            uint64_t operation;
            bool urgent; /* LOAD: nobody else serves it, rows may wait for it */
            uint8_t *image; /* LOAD: not from the file but from this, malloc'd; the host frees it. NULL: from the file */
            uint64_t image_bytes;
        } load;
        struct {
            actor_id id;
            enum role role;
            uint64_t incarnation;
            const char *control_address, *data_address, *host;
            bool data; /* a data-plane edge is wanted as well; else data_address, between expert processes, is for weights */
        } connect;
        struct {
            enum trace_level level;
            const char *text;
        } trace;
        struct {
            uint64_t client;
            const char *text; /* FAULT: which; JOURNAL: the file, NULL: stop */
        } admin;
        struct {
            int code;
            const char *reason;
        } exit;
    };
};

/* Effects of one step, in the order in which they are carried out, and the arena that owns what they point to. Reused from step to
 * step: memory grows to a high-water mark and stays. */
struct effects {
    struct effect *list;
    uint32_t count, capacity;
    struct arena_block *arena; /* private to effects.c */
};
void effects_init(struct effects *self);
void effects_free(struct effects *self);
void effects_reset(struct effects *self); /* forgets all; memory is kept */
void *effects_alloc(struct effects *self, size_t size); /* 64-byte aligned, valid until reset */
void *effects_copy(struct effects *self, const void *bytes, size_t size);
struct effect *effects_add(struct effects *self, enum effect_kind kind); /* zeroed but for kind */
/* Packs the message (from and incarnation are set by the caller in the envelope) and appends a SEND. */
void effects_send(struct effects *self, actor_id to, const message *envelope);
/* The same in two parts, for one message to many: packed once, each SEND points to the same bytes. */
const uint8_t *effects_pack(struct effects *self, const message *envelope, size_t *ret_size);
void effects_send_packed(struct effects *self, actor_id to, const uint8_t *bytes, size_t size);
void effects_trace(struct effects *self, enum trace_level level, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* Hosts deliver one event, then carry out all effects in order, then reset. A COMPUTE effect may complete later; its pointers into the
 * arena must then stay valid: hosts that compute later keep the arena (process host: computes at once, so nothing to keep). The frame of
 * an EVENT_FRAME stays valid until the COMPUTEs of that step have completed, and those that their COMPUTED events ask for.
 *
 * Programs of one actor run in the order in which they were asked for. The COMPUTED events of a step's programs are delivered in that
 * order, each with its effects carried out, before any other event of that actor: so a result that is valid until the engine's next
 * program (EXPERT output, SAMPLE results) is still there when the TRANSFER that its COMPUTED event asks for is carried out, as long as
 * the step asked for one such program only. */
struct actor; /* each role's own struct begins with this */
struct actor_class {
    enum role role;
    void (*step)(struct actor *self, const struct event *event, uint64_t now_ns, struct effects *out);
    uint64_t (*deadline)(const struct actor *self); /* NEVER: nothing to wait for */
    void (*destroy)(struct actor *self);
    /* One line of state for people and assertions on leaks, e.g. "sequences=0 pages=0/128". Static buffer in the actor. */
    const char *(*describe)(struct actor *self);
};
struct actor {
    const struct actor_class *class;
};

static inline void actor_step(struct actor *self, const struct event *event, uint64_t now_ns,
                              struct effects *out) {
    self->class->step(self, event, now_ns, out);
}
static inline uint64_t actor_deadline(const struct actor *self) {
    return self->class->deadline(self);
}
void actor_destroy(struct actor **self);

/* What every actor is told at birth. Strings are copied. */
struct actor_identity {
    enum role role;
    uint64_t incarnation; /* random, never 0 */
    const char *name;     /* "expert-2" */
    const char *control_address, *data_address, *host;
    const char *coordinator_address; /* where HELLO goes; the actor emits CONNECT for ACTOR_COORDINATOR with it */
    const char *model_fingerprint; /* "": it has no weights; experts get theirs from others */
    const char *config_fingerprint;
    const char *numerics; /* profile, and what else changes bits: settings_profile_name */
    uint32_t pid, threads;
    uint64_t memory_bytes; /* held from birth to death; roles that load and unload add what they hold to it in heartbeats */
};

#endif
