/* The data plane: activations between attention, experts and samplers. One header, then the payload; never protobuf.
 * Everything is little-endian and laid out as declared here; the payload of rows starts at a multiple of FRAME_ALIGN
 * counted from the start of the header.
 *
 *   DISPATCH  attention -> expert   struct frame_group[groups], uint32_t item_row[items], padding,
 *                                   rows x row_bytes (activations of the numerics profile: BF16 or F32, [rows, hidden];
 *                                   format FRAME_ROWS_E4M3: kernels/e4m3_row.h)
 *             items are grouped by expert in the order of the groups; item i is row item_row[i] for its group's expert
 *   COMBINE   expert -> attention   items x row_bytes (F32, [items, hidden]), items of the dispatch in its order, from
 *                                   item `detail` on: a dispatch is answered in one piece or in several
 *   MOVED     expert -> attention   no payload: the expert named by `layer` and `detail` (expert) is not held here
 *   SAMPLE    attention -> sampler  struct sample_spec[rows], uint32_t words[items] (variable parts, see
 *                                   engine/sample.h), padding, rows x row_bytes (hidden rows after the final norm)
 *   MESSAGE   between hosts         detail bytes of a control message, padded to items x 4 (actors/host/weights_frame.h)
 *   SAMPLED   sampler -> attention  struct sample_result[rows], uint32_t words[items]; row_bytes 0
 *
 * A reply copies batch, layer, attempt, part and epoch from its request, so that anything stale is told by its header. */
#ifndef TROUPE_FRAME_H
#define TROUPE_FRAME_H

#include <stddef.h>
#include <stdint.h>

#include "actors/errors.h"

#define FRAME_MAGIC   0x50555254u /* "TRUP" */
#define FRAME_VERSION 1
#define FRAME_ALIGN   64

enum frame_kind {
    FRAME_DISPATCH = 1,
    FRAME_COMBINE = 2,
    FRAME_MOVED = 3,
    FRAME_SAMPLE = 4,
    FRAME_SAMPLED = 5,
    FRAME_MESSAGE = 6,
};

struct frame_header {
    uint32_t magic;
    uint16_t version;
    uint16_t kind;          /* enum frame_kind */
    uint32_t crc;           /* CRC32C over the header with crc = 0, then the payload */
    uint32_t payload_bytes; /* bytes after the header */
    uint32_t from;          /* actor id of the sender */
    uint32_t to;            /* actor id of the receiver */
    uint64_t from_incarnation;
    uint64_t to_incarnation; /* whom the sender believes to talk to; a restarted process drops what was not for it */
    uint64_t epoch;          /* placement epoch that the sender used */
    uint64_t batch;          /* number of the sender's batch, counted from 1 */
    uint32_t layer;
    uint32_t attempt; /* 0 for the first sending of this part */
    uint32_t part;    /* which frame of this (batch, layer) */
    uint32_t rows;
    uint32_t items;
    uint32_t groups;
    uint32_t row_bytes;
    uint32_t detail; /* MOVED: the expert; COMBINE: the first item; MESSAGE: its bytes; otherwise 0 */
    uint32_t format; /* DISPATCH: enum frame_rows; otherwise 0 */
    uint32_t reserved;
};

enum frame_rows {
    FRAME_ROWS_PLAIN,
    FRAME_ROWS_E4M3, /* only the fp8 profile sends and takes these, for models whose experts are E4M3 */
};

_Static_assert(sizeof(struct frame_header) == 96, "the frame header is 96 bytes on every machine");

struct frame_group {
    uint32_t expert;
    uint32_t count; /* items of this expert, at least 1 */
};

/* A received frame: header and payload lie in one piece of memory that the host owns. `payload` is aligned so that
 * (payload - sizeof(struct frame_header)) is a multiple of FRAME_ALIGN. */
struct frame {
    const struct frame_header *header;
    const uint8_t *payload;
};

/* Byte offset, from the start of the header, at which the rows begin, given what precedes them. 0 on overflow. */
size_t frame_rows_offset(enum frame_kind kind, uint32_t rows, uint32_t items, uint32_t groups);

/* Total bytes of a frame, header included; 0 if any count is over its limit or the sum overflows. */
size_t frame_bytes(enum frame_kind kind, uint32_t rows, uint32_t items, uint32_t groups,
                   uint32_t row_bytes);

/* Checks everything that can be checked without knowing the receiver: `available` bytes hold a whole frame, magic,
 * version, kind, counts within limits and consistent with payload_bytes, groups adding up to items, item rows in range,
 * CRC. Returns 0 or ERR_CORRUPT / ERR_VERSION / ERR_TOO_LARGE with a text naming what was expected and found.
 * `check_crc` 0 leaves the CRC out (used where memory is shared and the knob `frame_crc` is off). */
int frame_check(const void *bytes, size_t available, int check_crc, struct failure *failure);

/* The same for who has the CRC32C of the available bytes behind the header. */
int frame_check_summed(const void *bytes, size_t available, uint32_t payload_crc,
                       struct failure *failure);

/* CRC32C (Castagnoli) of `size` bytes continuing from `crc` (start with 0); hardware instruction where there is one. */
uint32_t crc32c(uint32_t crc, const void *bytes, size_t size);
/* The CRC32C of two pieces one after the other, each given by its own. */
uint32_t crc32c_join(uint32_t first, uint32_t second, size_t second_bytes);
/* crc32c with the threads of `parallel` (at most 16), where a part of 128 KiB is left for each. */
struct parallel;
uint32_t crc32c_parallel(const struct parallel *parallel, uint32_t crc, const void *bytes,
                         size_t size);
/* Fills header->crc. header and payload are contiguous. */
void frame_seal(struct frame_header *header);
/* The same where the rows, from rows_offset (counted from the header's start) to the end, have that CRC32C. */
void frame_seal_rows(struct frame_header *header, size_t rows_offset, uint32_t rows_crc);

/* Parts of a checked frame; NULL where the kind has none. */
const struct frame_group *frame_groups(const struct frame *frame); /* DISPATCH: [groups] */
const uint32_t *frame_item_rows(const struct frame *frame);        /* DISPATCH: [items] */
const void *frame_rows(const struct frame *frame);                 /* [rows or items, row_bytes] */

#endif
