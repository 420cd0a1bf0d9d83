/* troupe ctl status: joins as a control member, asks the coordinator once, prints, leaves. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <zmq.h>

#include "actors/actor.h"
#include "actors/host/clock.h"
#include "actors/host/commands.h"
#include "actors/host/endpoint.h"
#include "actors/host/mailbox.h"
#include "actors/host/process.h"
#include "proto/wire.h"

#define ANSWER_TIMEOUT_NS 5000000000u
#define RETRY_MS          200

struct ctl {
    void *zmq, *in, *out;
    char coordinator[ADDRESS_BYTES_MAX], inbox[ADDRESS_BYTES_MAX], host[ADDRESS_BYTES_MAX];
    uint64_t incarnation;
    actor_id id;
};

static void send_envelope(struct ctl *self, message *envelope) {
    envelope->protocol_version = WIRE_PROTOCOL_VERSION;
    envelope->from = self->id;
    envelope->from_incarnation = self->incarnation;
    size_t size = wire_packed_bytes(envelope);
    uint8_t *bytes = malloc(size);
    ASSERT(bytes != NULL);
    wire_pack(envelope, bytes);
    zmq_send(self->out, bytes, size, ZMQ_DONTWAIT); /* repeated until answered */
    free(bytes);
}

static void send_hello(struct ctl *self) {
    message envelope = TROUPE__ENVELOPE__INIT;
    Troupe__Hello hello = TROUPE__HELLO__INIT;
    hello.role = TROUPE__ROLE__ROLE_CONTROL;
    hello.control_address = self->inbox;
    hello.host = self->host;
    hello.pid = (uint32_t)getpid();
    hello.name = "ctl";
    envelope.body_case = TROUPE__ENVELOPE__BODY_HELLO;
    envelope.hello = &hello;
    send_envelope(self, &envelope);
}

static void send_request(struct ctl *self) {
    message envelope = TROUPE__ENVELOPE__INIT;
    Troupe__StatusRequest request = TROUPE__STATUS_REQUEST__INIT;
    request.token = self->incarnation;
    request.reply_address = self->inbox;
    envelope.body_case = TROUPE__ENVELOPE__BODY_STATUS_REQUEST;
    envelope.status_request = &request;
    send_envelope(self, &envelope);
}

/* The coordinator would otherwise wait for heartbeats that never come. */
static void send_leave(struct ctl *self) {
    message envelope = TROUPE__ENVELOPE__INIT;
    Troupe__PeerExited exited = TROUPE__PEER_EXITED__INIT;
    exited.pid = (uint32_t)getpid();
    exited.host = self->host;
    exited.incarnation = self->incarnation;
    envelope.body_case = TROUPE__ENVELOPE__BODY_PEER_EXITED;
    envelope.peer_exited = &exited;
    send_envelope(self, &envelope);
}

static const char *state_name(int state) {
    static const char *const names[] = {"joining", "loading", "ready", "draining", "gone"};
    return state >= 0 && state < 5 ? names[state] : "?";
}

static void print_status(const Troupe__Status *status) {
    const Troupe__Commit *commit = status->commit;
    printf("epoch %llu, %s, %zu expert copies placed\n",
           commit != NULL ? (unsigned long long)commit->epoch : 0,
           commit != NULL && commit->serving ? "serving" : "not serving",
           commit != NULL ? commit->n_layer : 0);
    printf("%5s  %-14s %-12s %-9s %12s %8s %10s  %s\n", "actor", "name", "role", "state",
           "heartbeat", "epoch", "memory", "address");
    for (size_t i = 0; i < status->n_actor; i++) {
        const Troupe__ActorStats *actor = status->actor[i];
        const Troupe__Member *member = actor->member;
        const Troupe__Heartbeat *heartbeat = actor->heartbeat;
        if (member == NULL || member->role == TROUPE__ROLE__ROLE_CONTROL)
            continue;
        printf("%5u  %-14s %-12s %-9s %9.0f ms %8llu %7.0f MB  %s\n", member->id, member->name,
               role_name((enum role)member->role), state_name((int)member->state),
               (double)actor->heartbeat_age_ns / 1e6,
               heartbeat != NULL ? (unsigned long long)heartbeat->epoch : 0,
               heartbeat != NULL ? (double)heartbeat->memory_bytes / 1e6 : 0.0,
               member->control_address);
    }
}

/* True once the status has been printed, or the coordinator has refused. */
static bool take_message(struct ctl *self, int *ret_code) {
    zmq_msg_t received;
    struct failure failure;
    message *envelope = NULL;
    bool done = false;
    zmq_msg_init(&received);
    if (zmq_msg_recv(&received, self->in, ZMQ_DONTWAIT) >= 0 &&
        wire_unpack(&envelope, zmq_msg_data(&received), zmq_msg_size(&received), &failure) == 0) {
        if (envelope->body_case == TROUPE__ENVELOPE__BODY_WELCOME) {
            self->id = envelope->welcome->id;
            send_request(self);
        } else if (envelope->body_case == TROUPE__ENVELOPE__BODY_REFUSED) {
            fprintf(stderr, "troupe ctl: refused: %s\n", envelope->refused->reason);
            done = true;
        } else if (envelope->body_case == TROUPE__ENVELOPE__BODY_STATUS) {
            print_status(envelope->status);
            *ret_code = 0;
            done = true;
        }
        wire_free(&envelope);
    }
    zmq_msg_close(&received);
    return done;
}

static int ask(struct ctl *self) {
    int code = 1, retry_ms = RETRY_MS;
    uint64_t until = clock_now_ns() + ANSWER_TIMEOUT_NS;
    while (clock_now_ns() < until) {
        if (self->id == 0)
            send_hello(self);
        else
            send_request(self);
        zmq_pollitem_t item = {.socket = self->in, .events = ZMQ_POLLIN};
        while (zmq_poll(&item, 1, retry_ms) > 0) {
            if (take_message(self, &code)) {
                send_leave(self);
                return code;
            }
        }
    }
    fprintf(stderr,
            "troupe ctl: no answer from the coordinator at %s in %d s: is the troupe running?\n",
            self->coordinator, (int)(ANSWER_TIMEOUT_NS / 1000000000u));
    return 1;
}

static int ctl_open(struct ctl *self, const struct options *options, struct failure *failure) {
    char directory[ADDRESS_BYTES_MAX] = "";
    if (options->run_dir != NULL) {
        int error = coordinator_address_in(options->run_dir, self->coordinator,
                                           sizeof self->coordinator, failure);
        if (error < 0)
            return error;
        snprintf(directory, sizeof directory, "%.*s",
                 (int)(strlen(self->coordinator) - strlen("/coordinator.control")),
                 self->coordinator);
    }
    if (options->coordinator != NULL)
        snprintf(self->coordinator, sizeof self->coordinator, "%s", options->coordinator);
    if (self->coordinator[0] == 0)
        return fail(failure, ERR_INVALID, "expected --run-dir DIR or --coordinator ADDRESS");
    self->incarnation = clock_random();
    clock_host_name(self->host);
    char bind[ADDRESS_BYTES_MAX + 32];
    if (directory[0] != 0)
        snprintf(bind, sizeof bind, "%s/%d.control", directory, (int)getpid());
    else
        snprintf(bind, sizeof bind, "tcp://*:*");
    int64_t limit = CONTROL_MESSAGE_MAX;
    int linger_ms = 200;
    char bound[ADDRESS_BYTES_MAX];
    size_t size = sizeof bound;
    self->zmq = zmq_ctx_new();
    self->in = zmq_socket(self->zmq, ZMQ_PULL);
    self->out = zmq_socket(self->zmq, ZMQ_PUSH);
    zmq_setsockopt(self->in, ZMQ_MAXMSGSIZE, &limit, sizeof limit);
    zmq_setsockopt(self->out, ZMQ_LINGER, &linger_ms, sizeof linger_ms);
    if (zmq_bind(self->in, bind) != 0 || zmq_connect(self->out, self->coordinator) != 0 ||
        zmq_getsockopt(self->in, ZMQ_LAST_ENDPOINT, bound, &size) != 0)
        return fail(failure, ERR_IO, "cannot reach %s from %s: %s", self->coordinator, bind,
                    zmq_strerror(zmq_errno()));
    endpoint_advertised(bound, self->coordinator, self->inbox);
    return 0;
}

int command_ctl(const struct options *options) {
    struct ctl self = {0};
    struct failure failure;
    if (options->positionals != 1 || strcmp(options->positional[0], "status") != 0) {
        fprintf(stderr, "troupe ctl: expected 'status'; see troupe ctl --help\n");
        return 2;
    }
    int code = 1;
    if (ctl_open(&self, options, &failure) < 0)
        fprintf(stderr, "troupe ctl: %s\n", failure.text);
    else
        code = ask(&self);
    if (self.in != NULL) {
        zmq_close(self.in);
        remove_ipc_socket(self.inbox);
    }
    if (self.out != NULL)
        zmq_close(self.out);
    if (self.zmq != NULL)
        zmq_ctx_term(self.zmq);
    return code;
}
