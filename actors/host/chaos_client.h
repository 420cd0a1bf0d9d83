/* The load of `troupe chaos`: streams that ask one request after the other, compare each answer, and come back when they are cut
 * off. One thread, one poll. */
#ifndef TROUPE_HOST_CHAOS_CLIENT_H
#define TROUPE_HOST_CHAOS_CLIENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "actors/errors.h"

/* A piece of an answer has come, `gap_ns` after the one before (or after the request). */
struct chaos_piece {
    uint64_t at_ns, gap_ns;
    uint32_t stream;
};

struct chaos_stream {
    char *expected; /* of its request; NULL: not yet known, the first answer becomes it */
    uint32_t pieces_expected;
    uint32_t answers, different, duplicated, lost, refused, resumed;
    bool stopping; /* asks no more */
};

struct chaos_load {
    uint16_t port;
    uint32_t streams, tokens;
    struct chaos_stream *stream; /* [streams] */
    struct chaos_piece *piece;   /* [pieces], in the order of time */
    size_t pieces, pieces_room;
    /* Called at least every 20 ms. */
    void (*tick)(void *context, uint64_t now_ns);
    void *context;
};

int chaos_load_init(struct chaos_load *ret, uint16_t port, uint32_t streams, uint32_t tokens);
void chaos_load_free(struct chaos_load *self);
/* One answer of every stream, which become the expected ones; false: some did not come. */
bool chaos_load_learn(struct chaos_load *self, uint64_t timeout_ns);
/* Request after request until `until_ns`; what then runs is finished, within `grace_ns` (else it counts as lost). */
void chaos_load_run(struct chaos_load *self, uint64_t until_ns, uint64_t grace_ns);

#endif
