/* The feed of a run in a file, to be looked at later: SQLite, so that other tools can read it too.
 *   chunk(t, keyframe, events): Unix milliseconds; 1 if `events` tells a new listener everything;
 *                               server-sent events as the feed had them
 * `PRAGMA application_id` is FEED_JOURNAL_ID, `user_version` FEED_JOURNAL_VERSION.
 *
 * Written in a thread of its own, never waited for: what the disk cannot take in time is left out, up to
 * the next keyframe. When the file has reached its size, the oldest quarter is dropped. */
#ifndef TROUPE_HOST_FEED_JOURNAL_H
#define TROUPE_HOST_FEED_JOURNAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "actors/errors.h"

#define FEED_JOURNAL_ID          0x54524a31 /* "TRJ1" */
#define FEED_JOURNAL_VERSION     1
#define FEED_JOURNAL_KEYFRAME_MS 10000
#define FEED_CHUNK_BYTES_MAX     (64u << 20)

struct feed_journal;
/* A new file, or one that feed_journal_open has made: it is gone on with. */
int feed_journal_open(struct feed_journal **ret, const char *path, uint64_t bytes_max,
                      struct failure *failure);
void feed_journal_add(struct feed_journal *self, uint64_t unix_ms, bool keyframe, const void *events,
                      size_t size);
/* Waits until all that was added is written: for who is faster than any disk. */
void feed_journal_settle(struct feed_journal *self);
bool feed_journal_failed(struct feed_journal *self, struct failure *failure);
void feed_journal_close(struct feed_journal **self); /* writes what there is */

struct feed_reader;
/* ERR_CORRUPT, ERR_UNSUPPORTED: what the file is instead, and what to do. */
int feed_reader_open(struct feed_reader **ret, const char *path, struct failure *failure);
void feed_reader_close(struct feed_reader **self);
struct feed_range {
    uint64_t from_ms, to_ms, chunks, bytes;
};
struct feed_range feed_reader_range(const struct feed_reader *self);
struct feed_chunk {
    uint64_t id, t_ms;
    bool keyframe;
    const char *events; /* valid until the next read */
    size_t size;
};
/* The keyframe to begin with so that a listener knows `back_ms` before `t_ms` as well, if that takes no more
 * than `bytes_max`; else a later one. 0: there is none. */
uint64_t feed_reader_start(struct feed_reader *self, uint64_t t_ms, uint64_t back_ms, uint64_t bytes_max);
/* The first chunk whose id is `id` or later. 1: there is one; 0: no more; negative: the file cannot be read. */
int feed_reader_next(struct feed_reader *self, uint64_t id, struct feed_chunk *ret, struct failure *failure);

#endif
