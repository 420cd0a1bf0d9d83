/* The device's edge over NCCL; see the header. What says that something is there (the note, the
 * status) goes in a group of its own after what it speaks of, so that an abort in between cannot
 * leave it alone. A communicator that is still launching what it was given last (non-blocking) is
 * waited for, with a bound: between captures that is the first connection, in steady state nothing.
 * It has not run on a card yet (docs/gpu.md). */
#include "actors/host/step_edge_nccl.h"

#include <stdbool.h>
#include <stdlib.h>
#include <time.h>

/* One transfer of two that follow each other. */
struct part {
    void *memory;
    size_t bytes;
};

struct nccl_state {
    const struct nccl_api *api;
    void *requests, *replies;
};

/* Until the last group is launched. */
static int settle(const struct nccl_api *api, void *comm) {
    enum { TURNS = 10000 };
    int state = api->comm_state(api->context, comm);
    for (int i = 0; i < TURNS && state == NCCL_PENDING; i++) {
        const struct timespec pause = {.tv_nsec = 10000};
        nanosleep(&pause, NULL);
        state = api->comm_state(api->context, comm);
    }
    return state == NCCL_PENDING ? ERR_TIMEOUT : state;
}

static int transfer(const struct nccl_api *api, void *comm, const struct part part[2], bool sends,
                    void *stream) {
    int error = settle(api, comm);
    for (int i = 0; i < 2 && error == 0; i++) {
        error = api->group_start(api->context);
        if (error != 0)
            return error;
        error = sends ? api->send(api->context, comm, part[i].memory, part[i].bytes, stream)
                      : api->receive(api->context, comm, part[i].memory, part[i].bytes, stream);
        const int ended = api->group_end(api->context);
        if (error == 0 && ended != NCCL_PENDING)
            error = ended;
        if (error == 0)
            error = settle(api, comm);
    }
    return error;
}

static int requests(const struct nccl_state *self, const struct edge_frame *frame, bool sends,
                    void *stream) {
    const struct part part[2] = {{frame->rows, frame->rows_bytes},
                                 {frame->note, frame->note_bytes}};
    return transfer(self->api, self->requests, part, sends, stream);
}
static int replies(const struct nccl_state *self, const struct edge_frame *frame, bool sends,
                   void *stream) {
    const struct part part[2] = {{frame->output, frame->output_bytes},
                                 {frame->status, frame->status_bytes}};
    return transfer(self->api, self->replies, part, sends, stream);
}

static int ask(void *edge, const struct edge_frame *frame, void *stream) {
    return requests(edge, frame, true, stream);
}
static int accept(void *edge, const struct edge_frame *frame, void *stream) {
    return requests(edge, frame, false, stream);
}
static int answer(void *edge, const struct edge_frame *frame, void *stream) {
    return replies(edge, frame, true, stream);
}
static int hear(void *edge, const struct edge_frame *frame, void *stream) {
    return replies(edge, frame, false, stream);
}

static const struct edge_operations OVER_NCCL = {ask, hear, accept, answer, free};

int step_edge_nccl_open(struct edge *ret, const struct nccl_api *api, void *requests_comm,
                        void *replies_comm) {
    struct nccl_state *self = calloc(1, sizeof *self);
    if (self == NULL)
        return ERR_NO_MEMORY;
    *self = (struct nccl_state){api, requests_comm, replies_comm};
    *ret = (struct edge){&OVER_NCCL, self};
    return 0;
}
