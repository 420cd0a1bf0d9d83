/* How a step's streams meet the edges. Locally an edge is events, on the stream that computes.
 * Between processes a transfer waits for its other end, so sends and receives run on streams of
 * their own:
 *
 *   computes   ...ready            free            await arrived...
 *   sends           await ready, send, sent
 *   receives                            await free, receive, arrived
 *
 * Attention asks for one micro-batch before it hears of the other, and the experts answer one
 * before they accept the other: on one stream each side would wait for what the other only does
 * afterwards. Buffers are safe: what was sent is overwritten only after the other side's next word
 * about the same micro-batch. */
#include "engine/cuda/step_internal.h"

int step_link_open(struct step_link *self, const struct edge *edge) {
    if (edge == NULL)
        return edge_local_open(&self->edge);
    void **const events[] = {&self->ready, &self->sent, &self->free, &self->arrived};
    self->edge = *edge;
    int error = stream_make_cuda(&self->sends);
    if (error == 0)
        error = stream_make_cuda(&self->receives);
    for (size_t i = 0; i < sizeof events / sizeof *events && error == 0; i++)
        error = event_make_cuda(events[i]);
    return error;
}

void step_link_close(struct step_link *self) {
    void *const events[] = {self->ready, self->sent, self->free, self->arrived};
    for (size_t i = 0; i < sizeof events / sizeof *events; i++)
        if (events[i] != NULL)
            event_free_cuda(events[i]);
    if (self->sends != NULL)
        stream_free_cuda(self->sends);
    if (self->receives != NULL)
        stream_free_cuda(self->receives);
    edge_close(&self->edge);
    *self = (struct step_link){0};
}

void step_link_send(struct step *self, struct step_link *link, edge_operation *operation,
                    const struct edge_frame *frame, void *stream) {
    if (link->sends == NULL) {
        did(self, operation(link->edge.state, frame, stream));
        return;
    }
    did(self, event_record_cuda(link->ready, stream));
    did(self, event_await_cuda(link->sends, link->ready));
    did(self, operation(link->edge.state, frame, link->sends));
    did(self, event_record_cuda(link->sent, link->sends));
}

void step_link_receive(struct step *self, struct step_link *link, edge_operation *operation,
                       const struct edge_frame *frame, void *stream) {
    if (link->receives == NULL) {
        did(self, operation(link->edge.state, frame, stream));
        return;
    }
    did(self, event_record_cuda(link->free, stream));
    did(self, event_await_cuda(link->receives, link->free));
    did(self, operation(link->edge.state, frame, link->receives));
    did(self, event_record_cuda(link->arrived, link->receives));
    did(self, event_await_cuda(stream, link->arrived));
}

void step_link_settle(struct step *self, struct step_link *link, void *stream) {
    if (link->sends != NULL && self->moe_layers > 0)
        did(self, event_await_cuda(stream, link->sent));
}
