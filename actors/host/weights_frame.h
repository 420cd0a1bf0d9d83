/* Weights between two expert processes with a GPU each: the control message that brings a piece of
 * them travels as one frame of their NCCL edge, while that is up. Only the way is another: pieces,
 * questions, sums and repetitions are those of actors/expert_fetch.c, which knows nothing of it.
 * What is lost with an edge is asked for again, and comes over the control plane. */
#ifndef TROUPE_HOST_WEIGHTS_FRAME_H
#define TROUPE_HOST_WEIGHTS_FRAME_H

#include "actors/host/transport.h"

/* Smaller messages are not worth it, and all but weights are smaller between expert processes. */
#define WEIGHTS_FRAME_LEAST (16u << 10)

/* Bytes of the largest such frame. */
size_t weights_frame_bytes(void);
/* Takes a packed message of `size` bytes if it should go this way and can; false: send it as ever.
 */
bool weights_frame_post(struct transport *nccl, actor_id from, uint64_t from_incarnation,
                        actor_id to, const void *bytes, size_t size, bool seal);
/* The message of a FRAME_MESSAGE, the caller's to wire_free; NULL with the reason: it is none of
 * WEIGHTS, or not from whom the frame says. */
message *weights_frame_take(const struct frame *frame, struct failure *failure);

#endif
