/* What lies between attention and one group of experts on the device: requests (a note and rows)
 * one way, replies (status words and outputs) the other, of fixed capacity, enqueued on a stream.
 * Nothing here waits on the host, and everything may be captured in a graph. Two implementations:
 * both sides in this process on one device (edge_local.c: the same memory, events), and NCCL
 * (actors/host/step_edge_nccl.c). */
#ifndef TROUPE_ENGINE_CUDA_EDGE_H
#define TROUPE_ENGINE_CUDA_EDGE_H

#include <stddef.h>
#include <stdint.h>

/* Device memory of one side, for one micro-batch. Locally both sides have the same. */
struct edge_frame {
    void *note, *rows;
    uint32_t *status;
    float *output;
    size_t note_bytes, rows_bytes, status_bytes, output_bytes; /* what is sent of each */
};

/* All return 0 or an error, and only enqueue. The note comes after its rows and the status after
 * its outputs, so that an edge that is aborted in between never leaves word of what is not there.
 * Between processes each direction is given a stream of its own (step_links.c): on one stream an
 * answer would wait to be heard, and a question to be accepted, for ever. Attention: ask, then
 * hear; the experts: accept, then answer; in turns, for each layer. Enqueued in this order on one
 * thread where both sides are local. */
struct edge_operations {
    int (*ask)(void *edge, const struct edge_frame *frame, void *stream); /* note and rows go */
    int (*hear)(void *edge, const struct edge_frame *frame,
                void *stream); /* status and output are there */
    int (*accept)(void *edge, const struct edge_frame *frame,
                  void *stream); /* note and rows are there */
    int (*answer)(void *edge, const struct edge_frame *frame,
                  void *stream); /* status and output go */
    void (*close)(void *edge);
};

struct edge {
    const struct edge_operations *operations;
    void *state;
};

int edge_local_open(struct edge *ret);
static inline void edge_close(struct edge *self) {
    if (self->operations != NULL)
        self->operations->close(self->state);
    *self = (struct edge){NULL, NULL};
}

#endif
