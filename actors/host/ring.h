/* One direction of one shared-memory edge: a ring of variable-size records, one producer, one
 * consumer, each in its own process. Records lie in one piece and at multiples of 64 bytes; a
 * record that does not fit before the end starts again at the beginning, behind a wrap marker. The
 * memory is shared, so each side trusts only its own counters: what the other writes is checked
 * before use and whatever does not add up breaks the ring (ERR_CORRUPT), never the process. */
#ifndef TROUPE_HOST_RING_H
#define TROUPE_HOST_RING_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "actors/errors.h"

#define RING_NAME_BYTES   200
#define RING_CAPACITY_MAX ((uint64_t)1 << 32)

/* Both counters only grow; a position in the data is counter % capacity. */
struct ring_page {
    uint32_t magic, version;
    uint64_t capacity;
    _Alignas(64) _Atomic uint64_t head; /* bytes published by the producer */
    _Alignas(64) _Atomic uint64_t tail; /* bytes released by the consumer */
    _Alignas(64) _Atomic uint32_t producer_closed;
    _Atomic uint32_t consumer_closed;
    _Atomic uint32_t consumer_opened;
    _Atomic uint32_t producer_waits; /* found it full: ring its doorbell after the next release */
    _Alignas(64) uint8_t data[];
};

struct ring {
    struct ring_page *page; /* NULL: not open */
    uint64_t capacity;      /* as checked when it was opened */
    uint64_t position;      /* own counter: the producer's head, what the consumer has read */
    uint64_t released;      /* consumer: its tail */
    uint64_t reserved; /* producer: where head will be after commit; consumer: where tail will be
                          after release */
    bool producer;
    char name[RING_NAME_BYTES];
};

/* Bytes that a record of `bytes` takes in the ring; a ring holds any record of at most
 * ring_record_bytes <= capacity / 2. */
uint64_t ring_record_bytes(size_t bytes);

/* The producer makes the ring (an older one of that name is removed). capacity: multiple of 64, all
 * of it reserved in /dev/shm. ERR_NO_MEMORY if there is no room. */
int ring_create(struct ring *ret, const char *name, uint64_t capacity, struct failure *failure);
/* The consumer opens it and removes the name. ERR_NOT_FOUND if it does not exist (yet). */
int ring_open(struct ring *ret, const char *name, struct failure *failure);
/* Unmaps and tells the other side. Not open: nothing. */
void ring_close(struct ring *self);
/* The other side has closed. For the consumer: look at it only when ring_peek finds nothing. */
bool ring_peer_closed(const struct ring *self);
/* For the producer: the consumer has mapped it, so what is published will be found whatever happens
 * to the name. */
bool ring_peer_opened(const struct ring *self);

/* Producer. Free bytes as the consumer's counter claims; UINT64_MAX if the claim is absurd. */
uint64_t ring_room(const struct ring *self);
/* Producer. ret_bytes: room for `bytes`, 64-byte aligned. ERR_BUSY: full now (the consumer will
 * ring), ERR_TOO_LARGE: never fits. Without a commit nothing has happened. */
int ring_reserve(struct ring *self, size_t bytes, void **ret_bytes);
void ring_commit(struct ring *self);

/* Consumer. 1: a record, read in place until ring_release; 0: none; ERR_CORRUPT: broken. */
int ring_peek(struct ring *self, const void **ret_bytes, size_t *ret_size);
/* Goes on behind the record; it stays valid until a release. */
void ring_pass(struct ring *self);
/* Releases all that were passed, but not the one being read. True if the producer waits for room and must be rung. */
bool ring_release_passed(struct ring *self);
/* Consumer: the producer waits for room. */
bool ring_wanted(const struct ring *self);
/* Bytes that were passed or are being read. */
uint64_t ring_kept(const struct ring *self);
/* Goes on behind the record and releases it with all that were passed. True: as above. */
bool ring_release(struct ring *self);

#endif
