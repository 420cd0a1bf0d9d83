/* Membership is actors/member.c's, fed by hand here: the supervisor has no other use for an actor. */
#include "actors/host/supervisor_link.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <zmq.h>

#include "actors/host/clock.h"
#include "actors/host/log.h"
#include "actors/host/mailbox.h"
#include "proto/wire.h"

static void carry_out(struct supervisor_link *self) {
    for (uint32_t i = 0; i < self->effects.count; i++) {
        const struct effect *effect = &self->effects.list[i];
        if (effect->kind == EFFECT_SEND && effect->send.to == ACTOR_COORDINATOR)
            zmq_send(self->out, effect->send.bytes, effect->send.size, ZMQ_DONTWAIT); /* all is repeated */
        else if (effect->kind == EFFECT_TRACE)
            log_line(effect->trace.level > TRACE_WARNING ? effect->trace.level : TRACE_DEBUG, "%s",
                     effect->trace.text);
    }
    effects_reset(&self->effects);
}

static void join(struct supervisor_link *self) {
    struct actor_identity identity = {
        .role = ROLE_CONTROL,
        .incarnation = clock_random(),
        .name = "supervisor",
        .control_address = self->address,
        .data_address = "",
        .host = self->host,
        .coordinator_address = self->coordinator,
        .model_fingerprint = "",
        .numerics = "",
        .pid = (uint32_t)getpid(),
    };
    bool made = member_init(&self->member, &identity, &self->settings, 0, 0, 0);
    ASSERT(made && "memory for membership");
    member_step(&self->member, &(struct event){.kind = EVENT_START}, clock_now_ns(), &self->effects);
    carry_out(self);
}

static uint32_t step(struct supervisor_link *self, const struct event *event) {
    uint64_t now = clock_now_ns();
    uint32_t news = member_step(&self->member, event, now, &self->effects);
    if ((news & (MEMBER_HEARTBEAT | MEMBER_EXIT)) == MEMBER_HEARTBEAT) {
        Troupe__Heartbeat heartbeat = TROUPE__HEARTBEAT__INIT;
        heartbeat.state = TROUPE__ACTOR_STATE__STATE_READY;
        member_heartbeat(&self->member, &heartbeat, now, &self->effects);
    }
    carry_out(self);
    if ((news & MEMBER_EXIT) != 0) { /* the coordinator ends, or took us for dead: the next one may know us */
        member_free(&self->member);
        join(self);
    }
    return news;
}

int supervisor_link_open(struct supervisor_link *self, void *zmq, void *out, const char *run_dir,
                         const char *coordinator, const struct settings *settings, struct failure *failure) {
    char *real = realpath(run_dir, NULL);
    if (real == NULL)
        return fail(failure, ERR_NOT_FOUND, "there is no run directory %s", run_dir);
    int64_t limit = CONTROL_MESSAGE_MAX;
    snprintf(self->address, sizeof self->address, "ipc://%s/%d.control", real, (int)getpid());
    free(real);
    snprintf(self->coordinator, sizeof self->coordinator, "%s", coordinator);
    clock_host_name(self->host);
    self->settings = *settings;
    self->out = out;
    self->in = zmq_socket(zmq, ZMQ_PULL);
    zmq_setsockopt(self->in, ZMQ_MAXMSGSIZE, &limit, sizeof limit);
    if (zmq_bind(self->in, self->address) != 0)
        return fail(failure, ERR_IO, "cannot listen at %s: %s", self->address, zmq_strerror(zmq_errno()));
    effects_init(&self->effects);
    self->open = true;
    join(self);
    return 0;
}

void supervisor_link_close(struct supervisor_link *self) {
    if (self->in != NULL) {
        zmq_close(self->in);
        remove_ipc_socket(self->address);
    }
    if (self->open) {
        member_free(&self->member);
        effects_free(&self->effects);
    }
    self->in = NULL;
    self->open = false;
}

uint64_t supervisor_link_deadline(const struct supervisor_link *self) {
    return self->open ? member_deadline(&self->member) : NEVER;
}

void supervisor_link_timer(struct supervisor_link *self) {
    if (self->open && member_deadline(&self->member) <= clock_now_ns())
        step(self, &(struct event){.kind = EVENT_TIMER});
}

message *supervisor_link_receive(struct supervisor_link *self) {
    zmq_msg_t received;
    message *ret = NULL;
    zmq_msg_init(&received);
    while (ret == NULL && self->open && zmq_msg_recv(&received, self->in, ZMQ_DONTWAIT) >= 0) {
        struct failure failure;
        if (wire_unpack(&ret, zmq_msg_data(&received), zmq_msg_size(&received), &failure) < 0) {
            log_line(TRACE_WARNING, "dropped a message: %s", failure.text);
            continue;
        }
        uint32_t news = step(self, &(struct event){.kind = EVENT_MESSAGE, .message = ret});
        if ((news & (MEMBER_DONE | MEMBER_EXIT | MEMBER_COMMITTED)) != 0 || ret->from != ACTOR_COORDINATOR)
            wire_free(&ret);
    }
    zmq_msg_close(&received);
    return ret;
}

void supervisor_link_send(struct supervisor_link *self, message *envelope) {
    envelope->protocol_version = WIRE_PROTOCOL_VERSION;
    envelope->from = self->member.id;
    envelope->from_incarnation = self->member.identity.incarnation;
    size_t size = wire_packed_bytes(envelope);
    uint8_t *bytes = malloc(size);
    ASSERT(bytes != NULL);
    wire_pack(envelope, bytes);
    zmq_send(self->out, bytes, size, ZMQ_DONTWAIT);
    free(bytes);
}
