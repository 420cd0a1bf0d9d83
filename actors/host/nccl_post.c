/* The NCCL transport's own messages over a ZeroMQ mailbox. */
#include <stdlib.h>
#include <string.h>

#include "actors/host/mailbox.h"
#include "actors/host/transport_nccl.h"

#define WAITING_BYTES (1u << 20) /* for a peer that does not take its messages */

static void *accept_message(const void *bytes, size_t size, struct failure *failure) {
    if (nccl_message_check(bytes, size, failure) < 0)
        return NULL;
    struct nccl_message *copy = malloc(sizeof *copy);
    if (copy != NULL)
        memcpy(copy, bytes, sizeof *copy);
    return copy;
}

static void post_connect(void *context, actor_id id, const char *address) {
    mailbox_connect(context, id, address);
}

static void post_disconnect(void *context, actor_id id) {
    mailbox_disconnect(context, id);
}

static void post_send(void *context, actor_id to, const struct nccl_message *note) {
    struct nccl_message *copy = malloc(sizeof *copy);
    if (copy == NULL)
        return; /* as one that is lost */
    *copy = *note;
    mailbox_send(context, to, copy, sizeof *copy);
}

static bool post_receive(void *context, struct nccl_message *ret) {
    struct nccl_message *note = mailbox_receive(context);
    if (note == NULL)
        return false;
    *ret = *note;
    free(note);
    return true;
}

static void post_close(void *context) {
    struct mailbox *mailbox = context;
    mailbox_close(&mailbox, 50); /* the CLOSE of each edge should go out */
}

int nccl_post_open(struct nccl_post *ret, const struct transport_options *options,
                   struct failure *failure) {
    struct mailbox_options mailbox = {
        .name = "nccl",
        .context = options->zmq_context,
        .bind = options->bind,
        .towards = options->towards,
        .bell = options->bell,
        .message_max = sizeof(struct nccl_message),
        .waiting_bytes_max = WAITING_BYTES,
        .accept = accept_message,
        .discard = free,
    };
    struct mailbox *self = NULL;
    int error = mailbox_open(&self, &mailbox, failure);
    if (error < 0)
        return error;
    *ret = (struct nccl_post){self,         post_connect, post_disconnect,      post_send,
                              post_receive, post_close,   mailbox_address(self)};
    return 0;
}
