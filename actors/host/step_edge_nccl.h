/* The device's edge between attention and a group of experts (engine/cuda/edge.h) over NCCL: sends
 * and receives of fixed size, grouped, on the stream of whoever asks; so they are recorded in its
 * graph. An edge has two communicators of two ranks, one for each direction, as a lane of
 * transport_nccl.h has: rank 0 sends. They are made, registered and aborted by whoever owns them
 * (nccl_keeper.h), off a step's way; after comm_abort() the edge must be closed, and graphs that
 * name it dropped. */
#ifndef TROUPE_HOST_STEP_EDGE_NCCL_H
#define TROUPE_HOST_STEP_EDGE_NCCL_H

#include "actors/host/nccl_api.h"
#include "engine/cuda/edge.h"

/* requests: attention is rank 0; replies: the experts are. Both sides open one with the same two.
 * All memory of the frames is registered with its communicator. */
int step_edge_nccl_open(struct edge *ret, const struct nccl_api *api, void *requests,
                        void *replies);

#endif
