/* What the NCCL transport is made of besides its transport_class: the way of its own small messages
 * and the clock, both exchangeable for tests. */
#ifndef TROUPE_HOST_TRANSPORT_NCCL_H
#define TROUPE_HOST_TRANSPORT_NCCL_H

#include "actors/host/nccl_edge.h"
#include "actors/host/transport.h"

/* The control plane of edges. Nothing blocks; messages may be lost. */
struct nccl_post {
    void *context;
    void (*connect)(void *context, actor_id id, const char *address); /* replaces */
    void (*disconnect)(void *context, actor_id id);
    void (*send)(void *context, actor_id to, const struct nccl_message *note);
    /* The next one that passed nccl_message_check; false: none. */
    bool (*receive)(void *context, struct nccl_message *ret);
    void (*close)(void *context);
    const char *address; /* where peers reach it */
};

struct nccl_options {
    const struct nccl_api *api;
    struct nccl_post post; /* closed with the transport */
    uint64_t (*now_ns)(void);
    bool inline_keeper; /* no thread: progress does its work */
    struct nccl_edge_options edge;
    int channels_max;
};

/* options: name, incarnation, bell, check_crc and waiting_bytes_max are used. */
int transport_nccl_open(struct transport **ret, const struct transport_options *options,
                        const struct nccl_options *nccl, struct failure *failure);

/* A post over ZeroMQ: a mailbox of its own at options->bind. */
int nccl_post_open(struct nccl_post *ret, const struct transport_options *options,
                   struct failure *failure);

/* True: an edge whose frames moved has broken down, and its peer must be taken for lost; once for
 * each loss. */
bool transport_nccl_lost(struct transport *self, actor_id *ret_id, uint64_t *ret_incarnation);
/* Whom the edge to an actor leads to; 0: there is none. */
uint64_t transport_nccl_incarnation(const struct transport *self, actor_id id);
/* When `progress` must be called at the latest. */
uint64_t transport_nccl_deadline(const struct transport *self);
/* Lanes by state, for logs and tests: "2 ready, 1 making". Static buffer in the transport. */
const char *transport_nccl_describe(struct transport *self);
/* Ports that are not yet taken down, those of closed edges included. */
uint32_t transport_nccl_ports(const struct transport *self);

#endif
