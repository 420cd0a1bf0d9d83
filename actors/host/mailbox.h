/* A ZeroMQ inbox and the outboxes to all peers, in a thread of their own. Used twice: for control
 * messages, and as the data plane between hosts. The actor thread gives and takes through bounded
 * queues and never waits. */
#ifndef TROUPE_HOST_MAILBOX_H
#define TROUPE_HOST_MAILBOX_H

#include <stddef.h>
#include <stdint.h>

#include "actors/actor.h"
#include "actors/host/bell.h"

struct mailbox_options {
    const char *name;         /* of the thread, at most 15 characters */
    void *context;            /* ZeroMQ */
    const char *bind;         /* ipc://path or tcp://host:port, port * for any */
    const char *towards;      /* says which of this machine's addresses peers are told; or NULL */
    struct bell *bell;        /* rung when something has arrived */
    size_t message_max;       /* larger ones are refused */
    size_t waiting_bytes_max; /* per peer, when the peer does not take them; more are dropped */
    /* In the mailbox's thread: checks the bytes of one message and makes of them what
     * mailbox_receive gives out; NULL: refused, with the reason in `failure`. `discard` frees such
     * a thing. */
    void *(*accept)(const void *bytes, size_t size, struct failure *failure);
    void (*discard)(void *item);
};

struct mailbox_counters {
    _Atomic uint64_t received, refused, sent, dropped;
};

struct mailbox;
/* ERR_EXISTS if the address is in use, ERR_INVALID if it is none. */
int mailbox_open(struct mailbox **ret, const struct mailbox_options *options,
                 struct failure *failure);
/* Sends what was given before (for at most `drain_ms`), then closes everything. */
void mailbox_close(struct mailbox **self, uint32_t drain_ms);
/* Where peers reach it: the bound address with the port and a host name filled in. */
const char *mailbox_address(const struct mailbox *self);
const struct mailbox_counters *mailbox_counters(const struct mailbox *self);

void mailbox_connect(struct mailbox *self, actor_id id, const char *address); /* replaces */
void mailbox_disconnect(struct mailbox *self, actor_id id);
/* Takes `bytes` (malloc). ERR_BUSY: the queue to the thread is full, the message is dropped. To
 * unknown peers: dropped. */
int mailbox_send(struct mailbox *self, actor_id to, void *bytes, size_t size);
/* The next thing that arrived, NULL: none. The caller's from now on. */
void *mailbox_receive(struct mailbox *self);

/* Removes the file of an address "ipc://path" that this process has bound; other addresses:
 * nothing. */
void remove_ipc_socket(const char *address);

#endif
