/* The supervisor as a member of its troupe: it joins with the role control, so that the coordinator can ask it to start processes. */
#ifndef TROUPE_HOST_SUPERVISOR_LINK_H
#define TROUPE_HOST_SUPERVISOR_LINK_H

#include "actors/member.h"

struct supervisor_link {
    void *in; /* ZeroMQ socket to wait on */
    void *out; /* borrowed */
    char address[ADDRESS_BYTES_MAX], coordinator[ADDRESS_BYTES_MAX], host[ADDRESS_BYTES_MAX];
    struct settings settings;
    struct member member;
    struct effects effects;
    bool open;
};

/* `out` is connected to the coordinator. */
int supervisor_link_open(struct supervisor_link *self, void *zmq, void *out, const char *run_dir,
                         const char *coordinator, const struct settings *settings, struct failure *failure);
void supervisor_link_close(struct supervisor_link *self);
uint64_t supervisor_link_deadline(const struct supervisor_link *self);
void supervisor_link_timer(struct supervisor_link *self);
/* The next message that is not about membership; wire_free it. NULL: none. */
message *supervisor_link_receive(struct supervisor_link *self);
/* Fills in who sends it. */
void supervisor_link_send(struct supervisor_link *self, message *envelope);

#endif
