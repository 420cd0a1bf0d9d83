/* The edge between attention and experts of one process on one device: nothing moves, events say
 * when the other side may read. */
#include "engine/cuda/edge.h"

#include <stdlib.h>

#include "actors/errors.h"
#include "kernels/cuda/streams.h"

struct local {
    void *asked, *answered; /* events */
};

static int ask(void *edge, const struct edge_frame *frame, void *stream) {
    (void)frame;
    return event_record_cuda(((struct local *)edge)->asked, stream);
}
static int accept(void *edge, const struct edge_frame *frame, void *stream) {
    (void)frame;
    return event_await_cuda(stream, ((struct local *)edge)->asked);
}
static int answer(void *edge, const struct edge_frame *frame, void *stream) {
    (void)frame;
    return event_record_cuda(((struct local *)edge)->answered, stream);
}
static int hear(void *edge, const struct edge_frame *frame, void *stream) {
    (void)frame;
    return event_await_cuda(stream, ((struct local *)edge)->answered);
}

static void close_local(void *edge) {
    struct local *self = edge;
    if (self->asked != NULL)
        event_free_cuda(self->asked);
    if (self->answered != NULL)
        event_free_cuda(self->answered);
    free(self);
}

static const struct edge_operations LOCAL = {ask, hear, accept, answer, close_local};

int edge_local_open(struct edge *ret) {
    struct local *self = calloc(1, sizeof *self);
    if (self == NULL)
        return ERR_NO_MEMORY;
    *ret = (struct edge){&LOCAL, self};
    const int error = event_make_cuda(&self->asked);
    return error != 0 ? error : event_make_cuda(&self->answered);
}
