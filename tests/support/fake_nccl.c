/* The fake NCCL: see the header. */
#include "tests/support/fake_nccl.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/support/random.h"

enum { THINGS_MAX = 4096, OPS_MAX = 256, PROCESSES_MAX = 64 };
enum { FAKE_ERROR = -1, FAKE_REMOTE = -2 };

enum op_kind { OP_COPY, OP_RECORD, OP_RING, OP_SEND, OP_RECEIVE };
struct op {
    enum op_kind kind;
    struct fake_comm *comm;
    void *to;
    const void *from;
    size_t bytes;
    struct fake_event *event;
    void (*function)(void *argument);
    void *argument;
};
struct fake_stream {
    struct fake_process *process;
    struct op op[OPS_MAX];
    uint32_t first, count;
    bool gone;
};
struct fake_event {
    struct fake_process *process;
    uint64_t recorded, passed;
    bool gone;
};
struct fake_comm {
    struct fake_process *process;
    struct nccl_id id;
    int rank;
    struct fake_comm *peer;
    bool made, hangs, gone;
    uint32_t pending; /* turns until what was called is through */
    int error;
    bool in_group, registered;
    uint8_t *memory;
    size_t bytes;
};
struct fake_memory {
    struct fake_process *process;
    uint8_t *memory;
    size_t bytes;
    bool pinned, gone;
};
struct fake_process {
    struct fake_nccl *world;
    struct nccl_api api;
    bool dead, hangs, in_group;
    struct fake_comm *grouped[OPS_MAX]; /* launched at the end of the group */
    struct fake_stream *grouped_stream[OPS_MAX];
    struct op grouped_op[OPS_MAX];
    uint32_t grouped_count;
};
struct fake_nccl {
    uint64_t random, ids, moved;
    struct fake_faults faults;
    struct fake_process *process[PROCESSES_MAX];
    struct fake_stream *stream[THINGS_MAX];
    struct fake_event *event[THINGS_MAX];
    struct fake_comm *comm[THINGS_MAX];
    struct fake_memory *memory[THINGS_MAX];
    uint32_t processes, streams, events, comms, memories;
};

#define RULE(condition, ...)                                                                       \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "fake nccl: " __VA_ARGS__);                                            \
            fprintf(stderr, "\n");                                                                 \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

static bool happens(struct fake_nccl *self, uint32_t per_mille) {
    return per_mille > 0 && random_below(&self->random, 1000) < per_mille;
}

static void *make(size_t bytes) {
    void *memory = calloc(1, bytes);
    RULE(memory != NULL, "no memory");
    return memory;
}

/* ---- Streams, events, memory ---- */

static int use_device(void *context) {
    (void)context;
    return 0;
}

static int stream_make(void *context, void **ret) {
    struct fake_process *process = context;
    struct fake_nccl *self = process->world;
    RULE(self->streams < THINGS_MAX, "too many streams");
    struct fake_stream *stream = make(sizeof *stream);
    stream->process = process;
    self->stream[self->streams++] = stream;
    *ret = stream;
    return 0;
}

static void stream_free(void *context, void *handle) {
    struct fake_stream *stream = handle;
    RULE(stream->process == context && !stream->gone, "a stream that is not there is freed");
    stream->gone = true; /* the work on it is left to end; ours is aborted or done by then */
    for (uint32_t i = 0; i < stream->count && !stream->process->dead; i++)
        RULE(stream->op[(stream->first + i) % OPS_MAX].kind != OP_SEND &&
                 stream->op[(stream->first + i) % OPS_MAX].kind != OP_RECEIVE,
             "a stream is freed with a transfer on it");
    stream->count = 0;
}

static void push(struct fake_stream *stream, const struct op *op) {
    RULE(!stream->gone && stream->count < OPS_MAX, "a stream that is gone or full is used");
    stream->op[(stream->first + stream->count++) % OPS_MAX] = *op;
}

static int memory_make(void *context, size_t bytes, void **ret, bool pinned) {
    struct fake_process *process = context;
    struct fake_nccl *self = process->world;
    if (happens(self, self->faults.memory_fails))
        return FAKE_ERROR;
    RULE(self->memories < THINGS_MAX, "too much memory");
    struct fake_memory *memory = make(sizeof *memory);
    *memory = (struct fake_memory){process, aligned_alloc(64, (bytes + 63) & ~(size_t)63), bytes,
                                   pinned, false};
    memset(memory->memory, 0xa5, bytes);
    self->memory[self->memories++] = memory;
    *ret = memory->memory;
    return 0;
}
static int memory_take(void *context, size_t bytes, void **ret) {
    return memory_make(context, bytes, ret, false);
}
static int pinned_take(void *context, size_t bytes, void **ret) {
    return memory_make(context, bytes, ret, true);
}

static bool touches(const struct op *op, const struct fake_memory *memory) {
    const uint8_t *begin = memory->memory, *end = begin + memory->bytes;
    return ((const uint8_t *)op->to >= begin && (const uint8_t *)op->to < end) ||
           ((const uint8_t *)op->from >= begin && (const uint8_t *)op->from < end);
}

static void memory_give(void *context, void *handle) {
    struct fake_process *process = context;
    struct fake_nccl *self = process->world;
    for (uint32_t i = 0; i < self->memories; i++) {
        struct fake_memory *memory = self->memory[i];
        if (memory->memory != handle || memory->gone)
            continue;
        for (uint32_t s = 0; s < self->streams && !process->dead; s++)
            for (uint32_t o = 0; o < self->stream[s]->count; o++)
                RULE(!touches(&self->stream[s]->op[(self->stream[s]->first + o) % OPS_MAX], memory),
                     "memory is freed while work on it is under way");
        memory->gone = true;
        free(memory->memory);
        memory->memory = NULL;
        return;
    }
    RULE(false, "memory that is not there is freed");
}

static int event_make(void *context, void **ret) {
    struct fake_process *process = context;
    struct fake_nccl *self = process->world;
    RULE(self->events < THINGS_MAX, "too many events");
    struct fake_event *event = make(sizeof *event);
    event->process = process;
    self->event[self->events++] = event;
    *ret = event;
    return 0;
}
static void event_free(void *context, void *handle) {
    struct fake_event *event = handle;
    RULE(event->process == context && !event->gone, "an event that is not there is freed");
    event->gone = true;
}
static int event_record(void *context, void *handle, void *stream) {
    struct fake_event *event = handle;
    (void)context;
    RULE(!event->gone, "an event that is gone is recorded");
    event->recorded++;
    push(stream, &(struct op){.kind = OP_RECORD, .event = event});
    return 0;
}
static int event_query(void *context, void *handle) {
    struct fake_event *event = handle;
    (void)context;
    RULE(!event->gone && event->recorded > 0, "an event that was not recorded is asked");
    return event->passed == event->recorded ? 0 : NCCL_PENDING;
}

static int copy(void *context, void *to, const void *from, size_t bytes, void *stream) {
    (void)context;
    push(stream, &(struct op){.kind = OP_COPY, .to = to, .from = from, .bytes = bytes});
    return 0;
}
static int ring(void *context, void (*function)(void *argument), void *argument, void *stream) {
    (void)context;
    push(stream, &(struct op){.kind = OP_RING, .function = function, .argument = argument});
    return 0;
}

/* ---- Communicators ---- */

static int unique_id(void *context, struct nccl_id *ret) {
    struct fake_process *process = context;
    struct fake_nccl *self = process->world;
    if (happens(self, self->faults.id_fails))
        return FAKE_ERROR;
    memset(ret, 0, sizeof *ret);
    self->ids++;
    memcpy(ret->bytes, &self->ids, sizeof self->ids);
    return 0;
}

static int comm_init(void *context, void **ret, const struct nccl_id *id, int rank,
                     const struct nccl_comm_options *options) {
    struct fake_process *process = context;
    struct fake_nccl *self = process->world;
    RULE(options->channels_max >= 1, "a communicator without channels");
    if (happens(self, self->faults.init_fails))
        return FAKE_ERROR;
    RULE(self->comms < THINGS_MAX, "too many communicators");
    struct fake_comm *comm = make(sizeof *comm);
    comm->process = process;
    comm->id = *id;
    comm->rank = rank;
    comm->hangs = happens(self, self->faults.init_hangs);
    for (uint32_t i = 0; i < self->comms; i++) {
        struct fake_comm *other = self->comm[i];
        if (memcmp(&other->id, id, sizeof *id) != 0)
            continue;
        RULE(other->rank != rank, "a unique id is used twice for rank %d", rank);
        comm->peer = other;
        other->peer = comm;
    }
    self->comm[self->comms++] = comm;
    *ret = comm;
    return NCCL_PENDING;
}

static struct fake_comm *usable(void *context, void *handle, const char *what) {
    struct fake_comm *comm = handle;
    RULE(comm->process == context, "%s: the communicator of another process", what);
    RULE(!comm->gone, "%s: a communicator that is gone", what);
    return comm;
}

static int comm_state(void *context, void *handle) {
    struct fake_comm *comm = usable(context, handle, "comm_state");
    if (comm->error != 0)
        return comm->error;
    return comm->made && comm->pending == 0 ? 0 : NCCL_PENDING;
}

static void well(struct fake_comm *comm, const char *what) {
    RULE((comm->made && comm->pending == 0) || comm->process->dead,
         "%s: the communicator is still pending", what);
}

static int comm_register(void *context, void *handle, void *memory, size_t bytes, void **ret) {
    struct fake_comm *comm = usable(context, handle, "comm_register");
    well(comm, "comm_register");
    RULE(!comm->registered, "registered twice");
    if (happens(comm->process->world, comm->process->world->faults.register_fails))
        return FAKE_ERROR;
    comm->registered = true;
    comm->memory = memory;
    comm->bytes = bytes;
    *ret = comm;
    return 0;
}
static void comm_deregister(void *context, void *handle, void *registration) {
    struct fake_comm *comm = usable(context, handle, "comm_deregister");
    RULE(comm->registered && registration == comm, "what is not registered is deregistered");
    comm->registered = false;
}

static int group_start(void *context) {
    struct fake_process *process = context;
    RULE(!process->in_group, "a group in a group");
    process->in_group = true;
    process->grouped_count = 0;
    return 0;
}

static int transfer(void *context, void *handle, uint8_t *memory, size_t bytes, void *stream,
                    enum op_kind kind) {
    struct fake_process *process = context;
    struct fake_comm *comm = usable(context, handle, "transfer");
    well(comm, "transfer");
    RULE(process->in_group, "a transfer outside a group");
    RULE(comm->registered && memory >= comm->memory && memory + bytes <= comm->memory + comm->bytes,
         "a transfer of memory that is not registered");
    RULE((kind == OP_SEND) == (comm->rank == 0), "rank %d transfers the wrong way", comm->rank);
    RULE(process->grouped_count < OPS_MAX, "too large a group");
    const uint32_t n = process->grouped_count++;
    process->grouped[n] = comm;
    process->grouped_stream[n] = stream;
    process->grouped_op[n] =
        (struct op){.kind = kind, .comm = comm, .to = memory, .from = memory, .bytes = bytes};
    return 0;
}
static int send_bytes(void *context, void *comm, const void *memory, size_t bytes, void *stream) {
    return transfer(context, comm, (uint8_t *)(uintptr_t)memory, bytes, stream, OP_SEND);
}
static int receive_bytes(void *context, void *comm, void *memory, size_t bytes, void *stream) {
    return transfer(context, comm, memory, bytes, stream, OP_RECEIVE);
}

static int group_end(void *context) {
    struct fake_process *process = context;
    struct fake_nccl *self = process->world;
    RULE(process->in_group, "the end of no group");
    process->in_group = false;
    if (happens(self, self->faults.group_fails))
        return FAKE_ERROR;
    bool pends = happens(self, self->faults.launch_pends);
    for (uint32_t i = 0; i < process->grouped_count; i++) {
        push(process->grouped_stream[i], &process->grouped_op[i]);
        if (pends)
            process->grouped[i]->pending = 1 + random_below(&self->random, 8);
    }
    return pends ? NCCL_PENDING : 0;
}

/* Ends it: its transfers leave the streams, and its peer's can never be met. */
static void comm_end(struct fake_comm *comm) {
    struct fake_nccl *self = comm->process->world;
    comm->gone = true;
    comm->registered = false;
    for (uint32_t s = 0; s < self->streams; s++) {
        struct fake_stream *stream = self->stream[s];
        uint32_t kept = 0;
        for (uint32_t i = 0; i < stream->count; i++) {
            struct op op = stream->op[(stream->first + i) % OPS_MAX];
            if (op.comm != comm)
                stream->op[(stream->first + kept++) % OPS_MAX] = op;
        }
        stream->count = kept;
    }
}
static int comm_finish(void *context, void *handle) {
    struct fake_comm *comm = usable(context, handle, "comm_finish");
    well(comm, "comm_finish");
    RULE(!comm->registered, "a communicator is finished with memory registered");
    comm_end(comm);
    return 0;
}
static int comm_abort(void *context, void *handle) {
    comm_end(usable(context, handle, "comm_abort"));
    return 0;
}

static const char *text(void *context, int error) {
    (void)context;
    return error == FAKE_REMOTE ? "remote process exited" : error_name(error);
}

/* ---- Turns ---- */

static void comm_turn(struct fake_nccl *self, struct fake_comm *comm) {
    if (comm->gone || comm->error != 0 || comm->process->dead)
        return;
    if (!comm->made && comm->peer != NULL && !comm->peer->gone && !comm->hangs &&
        !comm->peer->hangs && !comm->peer->process->dead && random_below(&self->random, 3) == 0)
        comm->made = true;
    if (comm->pending > 0)
        comm->pending--;
    if (comm->made && comm->registered && happens(self, self->faults.async_error))
        comm->error = FAKE_ERROR;
}

/* The receive that a send meets: at the head of its stream, on the other end. */
static struct fake_stream *other_end(struct fake_nccl *self, const struct fake_comm *peer) {
    for (uint32_t i = 0; i < self->streams; i++) {
        struct fake_stream *stream = self->stream[i];
        if (stream->count > 0 && stream->op[stream->first].comm == peer)
            return stream;
    }
    return NULL;
}

static void pop(struct fake_stream *stream) {
    stream->first = (stream->first + 1) % OPS_MAX;
    stream->count--;
}

static void meet(struct fake_nccl *self, struct fake_stream *stream) {
    struct op *op = &stream->op[stream->first];
    const struct fake_comm *peer = op->comm->peer;
    if (peer == NULL || peer->gone || peer->process->dead || peer->process->hangs ||
        op->comm->error != 0 || peer->error != 0)
        return;
    struct fake_stream *other = other_end(self, peer);
    if (other == NULL)
        return;
    struct op *received = &other->op[other->first];
    RULE(received->kind == OP_RECEIVE && received->bytes == op->bytes,
         "a send of %zu bytes meets a receive of %zu", op->bytes, received->bytes);
    memcpy(received->to, op->from, op->bytes);
    self->moved++;
    pop(stream);
    pop(other);
}

static void stream_turn(struct fake_nccl *self, struct fake_stream *stream) {
    if (stream->count == 0 || stream->process->dead || stream->process->hangs || stream->gone)
        return;
    struct op *op = &stream->op[stream->first];
    switch (op->kind) {
    case OP_COPY:
        memcpy(op->to, op->from, op->bytes);
        break;
    case OP_RECORD:
        op->event->passed++;
        break;
    case OP_RING:
        op->function(op->argument);
        break;
    case OP_SEND:
        meet(self, stream);
        return;
    case OP_RECEIVE:
        return; /* its send does the work */
    }
    pop(stream);
}

void fake_nccl_turn(struct fake_nccl *self) {
    for (uint32_t i = 0; i < self->comms; i++)
        comm_turn(self, self->comm[i]);
    for (uint32_t n = 0; n < 2 * self->streams; n++)
        stream_turn(self, self->stream[random_below(&self->random, self->streams)]);
}

/* ---- The world ---- */

struct fake_nccl *fake_nccl_make(uint64_t seed) {
    struct fake_nccl *self = make(sizeof *self);
    self->random = seed;
    return self;
}

void fake_nccl_faults(struct fake_nccl *self, const struct fake_faults *faults) {
    self->faults = *faults;
}

struct fake_process *fake_process_make(struct fake_nccl *self) {
    RULE(self->processes < PROCESSES_MAX, "too many processes");
    struct fake_process *process = make(sizeof *process);
    process->world = self;
    process->api = (struct nccl_api){
        process,       use_device,      stream_make, stream_free, memory_take, memory_give,
        pinned_take,   memory_give,     event_make,  event_free,  copy,        copy,
        event_record,  event_query,     ring,        unique_id,   comm_init,   comm_state,
        comm_register, comm_deregister, group_start, group_end,   send_bytes,  receive_bytes,
        comm_finish,   comm_abort,      text};
    self->process[self->processes++] = process;
    return process;
}

const struct nccl_api *fake_process_api(struct fake_process *self) {
    return &self->api;
}

void fake_process_kill(struct fake_process *self, bool told) {
    self->dead = true;
    for (uint32_t i = 0; i < self->world->comms; i++) {
        struct fake_comm *comm = self->world->comm[i];
        if (comm->process == self && told && comm->peer != NULL && !comm->gone)
            comm->peer->error = FAKE_REMOTE;
    }
}

void fake_process_hang(struct fake_process *self, bool hangs) {
    self->hangs = hangs;
}

struct fake_counts fake_nccl_counts(const struct fake_nccl *self) {
    struct fake_counts ret = {0};
    for (uint32_t i = 0; i < self->comms; i++)
        if (!self->comm[i]->process->dead) {
            ret.comms += !self->comm[i]->gone;
            ret.registrations += self->comm[i]->registered;
        }
    for (uint32_t i = 0; i < self->streams; i++)
        ret.streams += !self->stream[i]->gone && !self->stream[i]->process->dead;
    for (uint32_t i = 0; i < self->events; i++)
        ret.events += !self->event[i]->gone && !self->event[i]->process->dead;
    for (uint32_t i = 0; i < self->memories; i++) {
        ret.memory +=
            !self->memory[i]->gone && !self->memory[i]->pinned && !self->memory[i]->process->dead;
        ret.pinned +=
            !self->memory[i]->gone && self->memory[i]->pinned && !self->memory[i]->process->dead;
    }
    return ret;
}

uint64_t fake_nccl_moved(const struct fake_nccl *self) {
    return self->moved;
}

void fake_nccl_free(struct fake_nccl *self) {
    for (uint32_t i = 0; i < self->memories; i++) {
        free(self->memory[i]->memory);
        free(self->memory[i]);
    }
    for (uint32_t i = 0; i < self->streams; i++)
        free(self->stream[i]);
    for (uint32_t i = 0; i < self->events; i++)
        free(self->event[i]);
    for (uint32_t i = 0; i < self->comms; i++)
        free(self->comm[i]);
    for (uint32_t i = 0; i < self->processes; i++)
        free(self->process[i]);
    free(self);
}
