/* One actor's process from the inside: shared by process_open.c, which makes it, and process.c,
 * which runs it. */
#ifndef TROUPE_HOST_PROCESS_PARTS_H
#define TROUPE_HOST_PROCESS_PARTS_H

#include "actors/actors.h"
#include "actors/host/bell.h"
#include "actors/host/feed_journal.h"
#include "actors/host/files.h"
#include "actors/host/http.h"
#include "actors/host/inject.h"
#include "actors/host/cache_ahead.h"
#include "actors/host/loader.h"
#include "actors/host/log.h"
#include "actors/host/mailbox.h"
#include "actors/host/neighbours.h"
#include "actors/host/pool.h"
#include "actors/host/process.h"
#include "actors/host/relay.h"
#include "actors/host/gpu_device.h"
#include "actors/host/transport.h"

#define COMPUTED_MAX 256 /* programs of one step that have not been delivered */
#define STEM_BYTES   100

/* HTTP clients have numbers: of the public address from 1 on, of the admin socket, and of the journal,
 * which listens to the feed like a client. */
#define ADMIN_CLIENTS   (UINT64_C(1) << 61)
#define JOURNAL_CLIENTS (UINT64_C(1) << 62)

struct process {
    enum role role;
    const struct options *options;
    struct actor_identity identity;
    char name[64], host[ADDRESS_BYTES_MAX], stem[STEM_BYTES], coordinator[ADDRESS_BYTES_MAX],
        data_address[ADDRESS_BYTES_MAX], control_bind[ADDRESS_BYTES_MAX],
        data_bind[ADDRESS_BYTES_MAX], nccl_bind[ADDRESS_BYTES_MAX], profile[PROFILE_NAME_BYTES];
    void *zmq;
    struct bell bell;
    struct model_directory directory;
    struct tokenizer *tokenizer;
    const struct kernels *kernels;
    struct pool *pool;
    struct parallel parallel; /* of the pool */
    struct engine *engine;
    struct loader *loader;
    struct cache_ahead *cache_ahead; /* attention on processors; else NULL */
    struct mailbox *control;
    struct neighbours *together; /* in one process with others: instead of sockets, pool and bell of its own */
    struct neighbour *neighbour;
    struct inject *inject; /* NULL: no faults on purpose */
    struct transport *shm, *data_zmq, *nccl; /* NULL: not used */
    struct gpu_device gpu;                  /* where there is one */
    struct http *http, *admin_http; /* admin: of a gateway, beside the public one */
    struct relays *relays;          /* coordinator: to the gateway of its run directory */
    const struct http_request *request; /* being handled */
    struct feed_journal *journal;
    uint64_t journal_client, journal_due_ns; /* 0: not listening yet; when the next keyframe is */
    struct http_request journal_join;
    struct event journal_event;
    struct actor *actor;
    struct effects effects;
    actor_id id; /* from WELCOME */
    struct program_result computed[COMPUTED_MAX];
    uint32_t computed_first, computed_count;
    struct {            /* the last EXPERT program's output, written where its receiver reads it */
        actor_id to;
        void *memory; /* NULL: it lies in the engine */
        bool lost;    /* it has gone, with the edge or under another frame */
        bool summed;
        uint32_t crc;
    } placed;
    struct incoming *incoming; /* being handled; NULL: none */
    struct transport *incoming_by;
    bool keeps; /* frames that have been handled stay where they are: the engine needs them */
    bool exiting;
    bool for_weights[ACTORS_MAX]; /* by actor: its edge between GPUs carries weights only */
    int exit_code;
    struct log_limit limit;
};

/* Of a host that runs several actors: their shared things; set before process_open. */
struct shared_host {
    struct neighbours *neighbours;
    struct bell *bell;
    struct pool *pool;
};
/* Name, profile and effects of a process that is to be opened. */
void process_prepare(struct process *self, enum role role, const struct options *options);
void process_share(struct process *self, const struct shared_host *shared);

/* Delivers one event, with all that follows from it. */
void process_step(struct process *self, const struct event *event);
/* Kept frames cannot stay: the engine copies what it needs of them. */
void process_take_in(void *process);
/* One turn: whatever has come, then what is due by the clock. True: something was done, more may be there. Else *ret_until_ns says when
 * the actor wants to be woken if nothing comes. */
bool process_turn(struct process *self, uint64_t *ret_until_ns);
/* SIGTERM and SIGINT so far. */
int process_stop_signals(void);

/* Everything up to the created actor. On failure: what was opened is in `self`, process_close
 * closes it. */
int process_open(struct process *self, struct failure *failure);
void process_close(struct process *self);

/* process_admin.c: what admin requests ask of the host. */
void process_carry_admin(struct process *self, const struct effect *effect);
/* The next event that the journal needs, NULL: none. */
const struct event *process_journal_event(struct process *self, uint64_t now_ns);
void process_journal_take(struct process *self, const struct effect *effect);
int process_journal_open(struct process *self, const char *path, struct failure *failure);

/* SIGTERM and SIGINT are counted and ring the bell from now on. NULL: no more rings. */
void process_catch_signals(struct bell *bell);

#endif
