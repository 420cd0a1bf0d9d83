/* One thread, one PULL socket, one PUSH socket per peer.
 *
 * Back-pressure: while the queue to the actor is full the inbox is not read, so that ZeroMQ's
 * high-water marks hold the senders. A peer that does not take its messages gets them later, in
 * order, up to a bound; beyond it they are dropped and counted: every control message is repeated
 * by its sender's actor until answered, and rows are sent again after their deadline. */
#include "actors/host/mailbox.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>
#include <zmq.h>

#include "actors/host/clock.h"
#include "actors/host/endpoint.h"
#include "actors/host/log.h"
#include "actors/host/queue.h"
#include "actors/host/thread.h"

#define INBOX_MESSAGES  4096  /* accepted, not yet taken by the actor */
#define OUTBOX_COMMANDS 16384 /* given by the actor, not yet taken by the thread */
#define HIGH_WATER      1000  /* messages in each ZeroMQ socket */
#define READ_BATCH      256
#define SHORT_POLL_MS   2
#define LINGER_MS                                                                                  \
    1000 /* a message sent just before DISCONNECT (REFUSED) still goes out in the background */

struct command {
    enum { COMMAND_SEND, COMMAND_CONNECT, COMMAND_DISCONNECT, COMMAND_STOP } kind;
    actor_id id;
    size_t size; /* SEND */
    struct command *next;
    zmq_msg_t message; /* SEND; empty otherwise */
    char address[];    /* CONNECT */
};

struct outbox {
    actor_id id;
    void *socket;
    struct command *first, **last; /* waiting for the socket to take them */
    size_t waiting_bytes;
};

struct mailbox {
    struct mailbox_options options;
    char address[ADDRESS_BYTES_MAX];
    void *inbox;
    int wake;               /* eventfd: there are commands */
    _Atomic uint32_t awake; /* the thread will look at the commands anyway */
    struct queue arrived, commands;
    struct mailbox_counters counters;
    pthread_t thread;
    bool started;
    uint32_t drain_ms;
    /* the thread's own */
    struct outbox **outbox;
    size_t outboxes, capacity;
    zmq_pollitem_t *item;
    bool stop;
    struct log_limit limit;
};

static void command_free(struct command *command) {
    zmq_msg_close(&command->message);
    free(command);
}

static struct outbox *find(struct mailbox *self, actor_id id, size_t *ret_index) {
    for (size_t i = 0; i < self->outboxes; i++) {
        if (self->outbox[i]->id == id) {
            if (ret_index != NULL)
                *ret_index = i;
            return self->outbox[i];
        }
    }
    return NULL;
}

static void outbox_close(struct mailbox *self, size_t index) {
    struct outbox *outbox = self->outbox[index];
    self->outbox[index] = self->outbox[--self->outboxes];
    while (outbox->first != NULL) {
        struct command *command = outbox->first;
        outbox->first = command->next;
        command_free(command);
        atomic_fetch_add(&self->counters.dropped, 1);
    }
    zmq_close(outbox->socket);
    free(outbox);
}

static void outbox_open(struct mailbox *self, actor_id id, const char *address) {
    size_t index;
    if (find(self, id, &index) != NULL)
        outbox_close(self, index);
    if (self->outboxes == self->capacity) {
        self->capacity = self->capacity > 0 ? 2 * self->capacity : 16;
        self->outbox = realloc(self->outbox, self->capacity * sizeof *self->outbox);
        self->item = realloc(self->item, (self->capacity + 2) * sizeof *self->item);
        ASSERT(self->outbox != NULL && self->item != NULL);
    }
    struct outbox *outbox = calloc(1, sizeof *outbox);
    ASSERT(outbox != NULL);
    outbox->id = id;
    outbox->last = &outbox->first;
    outbox->socket = zmq_socket(self->options.context, ZMQ_PUSH);
    int linger = LINGER_MS, high_water = HIGH_WATER, longest_retry_ms = 1000;
    if (outbox->socket != NULL) {
        zmq_setsockopt(outbox->socket, ZMQ_LINGER, &linger, sizeof linger);
        zmq_setsockopt(outbox->socket, ZMQ_SNDHWM, &high_water, sizeof high_water);
        zmq_setsockopt(outbox->socket, ZMQ_RECONNECT_IVL_MAX, &longest_retry_ms,
                       sizeof longest_retry_ms);
    }
    if (outbox->socket == NULL || zmq_connect(outbox->socket, address) != 0) {
        log_limited(&self->limit, TRACE_WARNING, "cannot connect to actor %u at %s: %s", id,
                    address, zmq_strerror(errno));
        if (outbox->socket != NULL)
            zmq_close(outbox->socket);
        free(outbox);
        return;
    }
    self->outbox[self->outboxes++] = outbox;
}

/* Hands a message to ZeroMQ. False: it cannot take it now, the command keeps it. */
static bool hand_over(struct mailbox *self, struct outbox *outbox, struct command *command) {
    if (zmq_msg_send(&command->message, outbox->socket, ZMQ_DONTWAIT) >= 0)
        atomic_fetch_add(&self->counters.sent, 1);
    else if (errno == EAGAIN)
        return false;
    else
        atomic_fetch_add(&self->counters.dropped, 1);
    return true;
}

static void send_waiting(struct mailbox *self, struct outbox *outbox) {
    while (outbox->first != NULL) {
        struct command *command = outbox->first;
        if (!hand_over(self, outbox, command))
            return;
        outbox->waiting_bytes -= command->size;
        outbox->first = command->next;
        if (outbox->first == NULL)
            outbox->last = &outbox->first;
        command_free(command);
    }
}

static void send_command(struct mailbox *self, struct command *command) {
    struct outbox *outbox = find(self, command->id, NULL);
    if (outbox != NULL && outbox->first == NULL && hand_over(self, outbox, command)) {
        command_free(command);
        return;
    }
    if (outbox == NULL || command->size > self->options.waiting_bytes_max - outbox->waiting_bytes) {
        atomic_fetch_add(&self->counters.dropped, 1);
        if (outbox != NULL)
            log_limited(
                &self->limit, TRACE_WARNING,
                "actor %u does not take its messages: %zu bytes are waiting, more are dropped",
                command->id, outbox->waiting_bytes);
        command_free(command);
        return;
    }
    command->next = NULL;
    *outbox->last = command;
    outbox->last = &command->next;
    outbox->waiting_bytes += command->size;
}

static void carry_out_commands(struct mailbox *self) {
    for (struct command *command; (command = queue_pop(&self->commands)) != NULL;) {
        size_t index;
        switch (command->kind) {
        case COMMAND_SEND:
            send_command(self, command);
            continue;
        case COMMAND_CONNECT:
            outbox_open(self, command->id, command->address);
            break;
        case COMMAND_DISCONNECT:
            if (find(self, command->id, &index) != NULL)
                outbox_close(self, index);
            break;
        case COMMAND_STOP:
            self->stop = true;
            break;
        }
        command_free(command);
    }
}

/* One message with all its parts; only single-part messages are any of ours. */
static void *read_message(struct mailbox *self, zmq_msg_t *received, struct failure *failure) {
    void *item = NULL;
    if (zmq_msg_more(received)) {
        zmq_msg_t rest;
        zmq_msg_init(&rest);
        while (zmq_msg_recv(&rest, self->inbox, ZMQ_DONTWAIT) >= 0 && zmq_msg_more(&rest))
            continue;
        zmq_msg_close(&rest);
        fail(failure, ERR_CORRUPT, "expected a message of one part, found several");
    } else if (zmq_msg_size(received) > self->options.message_max) {
        fail(failure, ERR_TOO_LARGE, "expected a message of at most %zu bytes, found %zu",
             self->options.message_max, zmq_msg_size(received));
    } else {
        item = self->options.accept(zmq_msg_data(received), zmq_msg_size(received), failure);
    }
    return item;
}

static void read_inbox(struct mailbox *self) {
    bool any = false;
    for (int i = 0; i < READ_BATCH && !queue_full(&self->arrived); i++) {
        zmq_msg_t received;
        struct failure failure;
        zmq_msg_init(&received);
        if (zmq_msg_recv(&received, self->inbox, ZMQ_DONTWAIT) < 0) {
            zmq_msg_close(&received);
            break;
        }
        void *item = read_message(self, &received, &failure);
        zmq_msg_close(&received);
        if (item == NULL) {
            atomic_fetch_add(&self->counters.refused, 1);
            log_limited(&self->limit, TRACE_WARNING, "%s: message refused: %s", self->options.name,
                        failure.text);
            continue;
        }
        atomic_fetch_add(&self->counters.received, 1);
        ASSERT(queue_push(&self->arrived, item));
        any = true;
    }
    if (any)
        bell_ring(self->options.bell);
}

static bool anything_waits(const struct mailbox *self) {
    for (size_t i = 0; i < self->outboxes; i++) {
        if (self->outbox[i]->first != NULL)
            return true;
    }
    return false;
}

static void wait_for_work(struct mailbox *self) {
    bool full = queue_full(&self->arrived);
    int items = 0;
    self->item[items++] = (zmq_pollitem_t){.fd = self->wake, .events = ZMQ_POLLIN};
    self->item[items++] = (zmq_pollitem_t){.socket = self->inbox, .events = full ? 0 : ZMQ_POLLIN};
    for (size_t i = 0; i < self->outboxes; i++) {
        if (self->outbox[i]->first != NULL)
            self->item[items++] =
                (zmq_pollitem_t){.socket = self->outbox[i]->socket, .events = ZMQ_POLLOUT};
    }
    atomic_store(&self->awake, 0);
    bool pending = atomic_load(&self->commands.head) != atomic_load(&self->commands.tail);
    zmq_poll(self->item, items, pending ? 0 : full ? SHORT_POLL_MS : -1);
    atomic_store(&self->awake, 1);
    if (self->item[0].revents != 0) {
        uint64_t count;
        if (read(self->wake, &count, sizeof count) < 0 && errno != EAGAIN)
            log_limited(&self->limit, TRACE_ERROR, "eventfd: %s", strerror(errno));
    }
}

void remove_ipc_socket(const char *address) {
    if (strncmp(address, "ipc://", 6) == 0)
        unlink(address + 6);
}

/* ZeroMQ's own thread sends in the background what it was handed; closing at once would throw that
 * away. */
static void close_sockets(struct mailbox *self) {
    uint64_t until = clock_now_ns() + (uint64_t)self->drain_ms * 1000000u;
    while (anything_waits(self) && clock_now_ns() < until) {
        for (size_t i = 0; i < self->outboxes; i++)
            send_waiting(self, self->outbox[i]);
        usleep(1000);
    }
    int linger = (int)self->drain_ms;
    while (self->outboxes > 0) {
        zmq_setsockopt(self->outbox[0]->socket, ZMQ_LINGER, &linger, sizeof linger);
        outbox_close(self, 0);
    }
    zmq_close(self->inbox);
    remove_ipc_socket(self->address); /* ZeroMQ leaves it */
}

static void *run(void *argument) {
    struct mailbox *self = argument;
    while (!self->stop) {
        wait_for_work(self);
        carry_out_commands(self);
        for (size_t i = 0; i < self->outboxes; i++)
            send_waiting(self, self->outbox[i]);
        read_inbox(self);
    }
    close_sockets(self);
    return NULL;
}

static void advertise(struct mailbox *self) {
    char bound[ADDRESS_BYTES_MAX];
    size_t size = sizeof bound;
    if (zmq_getsockopt(self->inbox, ZMQ_LAST_ENDPOINT, bound, &size) != 0)
        snprintf(bound, sizeof bound, "%s", self->options.bind);
    endpoint_advertised(bound, self->options.towards, self->address);
}

static int bind_inbox(struct mailbox *self, struct failure *failure) {
    int64_t message_max =
        (int64_t)self->options.message_max + 65536; /* a little more is refused with a reason */
    int high_water = HIGH_WATER, zero = 0;
    self->inbox = zmq_socket(self->options.context, ZMQ_PULL);
    if (self->inbox == NULL)
        return fail(failure, ERR_NO_MEMORY, "no socket for the inbox: %s", zmq_strerror(errno));
    zmq_setsockopt(self->inbox, ZMQ_MAXMSGSIZE, &message_max, sizeof message_max);
    zmq_setsockopt(self->inbox, ZMQ_RCVHWM, &high_water, sizeof high_water);
    zmq_setsockopt(self->inbox, ZMQ_LINGER, &zero, sizeof zero);
    if (zmq_bind(self->inbox, self->options.bind) != 0) {
        int error = errno;
        zmq_close(self->inbox);
        self->inbox = NULL;
        return fail(failure, error == EADDRINUSE ? ERR_EXISTS : ERR_INVALID,
                    "cannot listen at %s: %s%s", self->options.bind, zmq_strerror(error),
                    error == ENAMETOOLONG ? " (choose a shorter --run-dir)" : "");
    }
    advertise(self);
    return 0;
}

static void mailbox_free(struct mailbox *self) {
    for (struct command *command; (command = queue_pop(&self->commands)) != NULL;)
        command_free(command);
    for (void *item; (item = queue_pop(&self->arrived)) != NULL;)
        self->options.discard(item);
    queue_free(&self->commands);
    queue_free(&self->arrived);
    if (self->wake >= 0)
        close(self->wake);
    free(self->outbox);
    free(self->item);
    free(self);
}

int mailbox_open(struct mailbox **ret, const struct mailbox_options *options,
                 struct failure *failure) {
    struct mailbox *self = aligned_alloc(64, (sizeof *self + 63) & ~(size_t)63);
    if (self == NULL)
        return fail(failure, ERR_NO_MEMORY, "no memory for a mailbox");
    memset(self, 0, sizeof *self);
    self->options = *options;
    self->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    self->item = calloc(2, sizeof *self->item);
    bool memory = queue_init(&self->arrived, INBOX_MESSAGES) &&
                  queue_init(&self->commands, OUTBOX_COMMANDS) && self->item != NULL;
    int error = self->wake < 0 || !memory
                    ? fail(failure, ERR_NO_MEMORY, "no memory or no descriptor for a mailbox")
                    : bind_inbox(self, failure);
    if (error == 0)
        error = thread_start(&self->thread, options->name, run, self, failure);
    if (error < 0) {
        if (self->inbox != NULL)
            zmq_close(self->inbox);
        mailbox_free(self);
        return error;
    }
    *ret = self;
    return 0;
}

static struct command *command_new(int kind, actor_id id, const char *address) {
    size_t room = address != NULL ? strlen(address) + 1 : 0;
    struct command *command = calloc(1, sizeof *command + room);
    ASSERT(command != NULL);
    command->kind = kind;
    command->id = id;
    zmq_msg_init(&command->message);
    if (address != NULL)
        memcpy(command->address, address, room);
    return command;
}

static int give(struct mailbox *self, struct command *command) {
    if (!queue_push(&self->commands, command)) {
        atomic_fetch_add(&self->counters.dropped, 1);
        command_free(command);
        return ERR_BUSY;
    }
    if (atomic_exchange(&self->awake, 1) == 0) {
        uint64_t one = 1;
        if (write(self->wake, &one, sizeof one) < 0)
            return 0; /* the counter is at its limit: the thread is being woken */
    }
    return 0;
}

void mailbox_close(struct mailbox **mailbox, uint32_t drain_ms) {
    struct mailbox *self = *mailbox;
    if (self == NULL)
        return;
    self->drain_ms = drain_ms;
    while (give(self, command_new(COMMAND_STOP, 0, NULL)) != 0)
        usleep(1000);
    pthread_join(self->thread, NULL);
    mailbox_free(self);
    *mailbox = NULL;
}

const char *mailbox_address(const struct mailbox *self) {
    return self->address;
}

const struct mailbox_counters *mailbox_counters(const struct mailbox *self) {
    return &self->counters;
}

void mailbox_connect(struct mailbox *self, actor_id id, const char *address) {
    give(self, command_new(COMMAND_CONNECT, id, address));
}

void mailbox_disconnect(struct mailbox *self, actor_id id) {
    give(self, command_new(COMMAND_DISCONNECT, id, NULL));
}

static void free_bytes(void *bytes, void *hint) {
    (void)hint;
    free(bytes);
}

int mailbox_send(struct mailbox *self, actor_id to, void *bytes, size_t size) {
    struct command *command = command_new(COMMAND_SEND, to, NULL);
    command->size = size;
    int error = zmq_msg_init_data(&command->message, bytes, size, free_bytes, NULL);
    ASSERT(error == 0);
    return give(self, command);
}

void *mailbox_receive(struct mailbox *self) {
    return queue_pop(&self->arrived);
}
