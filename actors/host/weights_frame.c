/* See weights_frame.h. */
#include "actors/host/weights_frame.h"

#include "actors/host/transport_nccl.h"
#include "proto/wire.h"

#define ENVELOPE_ROOM                                                                              \
    4096 /* what is around the bytes of a piece: names, sums, and the frame's own */

static uint32_t words(size_t size) {
    return (uint32_t)((size + sizeof(uint32_t) - 1) / sizeof(uint32_t));
}

size_t weights_frame_bytes(void) {
    return frame_bytes(FRAME_MESSAGE, 0, words(WEIGHTS_BYTES_MAX + ENVELOPE_ROOM), 0, 0);
}

bool weights_frame_post(struct transport *nccl, actor_id from, uint64_t from_incarnation,
                        actor_id to, const void *bytes, size_t size, bool seal) {
    if (nccl == NULL || size < WEIGHTS_FRAME_LEAST || size > WEIGHTS_BYTES_MAX + ENVELOPE_ROOM ||
        !nccl->class->connected(nccl, to))
        return false;
    struct outgoing frame = {
        .header = {.magic = FRAME_MAGIC,
                   .version = FRAME_VERSION,
                   .kind = FRAME_MESSAGE,
                   .from = from,
                   .to = to,
                   .from_incarnation = from_incarnation,
                   .to_incarnation = transport_nccl_incarnation(nccl, to),
                   .items = words(size),
                   .detail = (uint32_t)size},
        .prefix = bytes,
        .prefix_bytes = size,
        .bytes = frame_bytes(FRAME_MESSAGE, 0, words(size), 0, 0),
        .seal = seal,
    };
    frame.rows_offset = frame.bytes;
    frame.header.payload_bytes = (uint32_t)(frame.bytes - sizeof frame.header);
    return nccl->class->post_send(nccl, to, &frame) == 0;
}

message *weights_frame_take(const struct frame *frame, struct failure *failure) {
    Troupe__Envelope *envelope = NULL;
    if (wire_unpack(&envelope, frame->payload, frame->header->detail, failure) < 0)
        return NULL;
    if (envelope->body_case == TROUPE__ENVELOPE__BODY_WEIGHTS &&
        envelope->from == frame->header->from &&
        envelope->from_incarnation == frame->header->from_incarnation)
        return envelope;
    fail(failure, ERR_CORRUPT, "frame MESSAGE: expected WEIGHTS of actor %u, found %s of %u",
         frame->header->from, wire_name(envelope), envelope->from);
    wire_free(&envelope);
    return NULL;
}
