/* Data frames: sizes, checks and checksum. frame_check() is the only gate between bytes that came
 * from another process and code that indexes with what they say: after it, every count is within
 * its limit, every item names a row that is there, and the payload has exactly the size that the
 * counts ask for. What only the receiver can know (the model's width, the experts held) is left to
 * it. */
#include "proto/frame.h"

#include <stdbool.h>

#include "actors/limits.h"
#include "engine/sample.h"
#include "kernels/e4m3_row.h"

#define WORDS_MAX (FRAME_PAYLOAD_MAX / sizeof(uint32_t))

/* What each kind holds. A payload is: groups, then one `entry_bytes` per row, then 4 bytes per item
 * if `words`, then the rows. */
static const struct layout {
    const char *name;
    uint32_t groups_min, groups_max;
    uint32_t rows_min, items_min;
    uint32_t items_max;
    uint32_t entry_bytes;
    bool words;             /* 4 bytes per item */
    bool carries_rows;      /* rows of row_bytes each follow at the aligned offset */
    bool one_row_per_item;  /* `items` rows rather than `rows` */
    uint32_t element_bytes; /* row_bytes is a multiple of this */
    uint32_t detail_max;
} LAYOUTS[] = {
    [FRAME_DISPATCH] = {.name = "DISPATCH",
                        .groups_min = 1,
                        .groups_max = EXPERTS_MAX,
                        .rows_min = 1,
                        .items_min = 1,
                        .items_max = FRAME_ITEMS_MAX,
                        .words = true,
                        .carries_rows = true,
                        .element_bytes = 2},
    [FRAME_COMBINE] = {.name = "COMBINE",
                       .groups_max = EXPERTS_MAX,
                       .items_min = 1,
                       .items_max = FRAME_ITEMS_MAX,
                       .carries_rows = true,
                       .one_row_per_item = true,
                       .element_bytes = 4,
                       .detail_max = FRAME_ITEMS_MAX - 1},
    [FRAME_MOVED] = {.name = "MOVED",
                     .groups_max = EXPERTS_MAX,
                     .items_max = FRAME_ITEMS_MAX,
                     .detail_max = EXPERTS_MAX - 1},
    [FRAME_SAMPLE] = {.name = "SAMPLE",
                      .rows_min = 1,
                      .items_max = WORDS_MAX,
                      .entry_bytes = sizeof(struct sample_spec),
                      .words = true,
                      .carries_rows = true,
                      .element_bytes = 2},
    [FRAME_SAMPLED] = {.name = "SAMPLED",
                       .rows_min = 1,
                       .items_max = WORDS_MAX,
                       .entry_bytes = sizeof(struct sample_result),
                       .words = true},
    [FRAME_MESSAGE] = {.name = "MESSAGE",
                       .items_min = 1,
                       .items_max = WEIGHTS_BYTES_MAX / sizeof(uint32_t) + 1024,
                       .words = true},
};

static const struct layout *layout_of(uint32_t kind) {
    return kind >= FRAME_DISPATCH && kind <= FRAME_MESSAGE ? &LAYOUTS[kind] : NULL;
}

/* End of what precedes the rows, unaligned. Counts are within their limits, so nothing overflows 64
 * bits. */
static uint64_t prefix_end(const struct layout *layout, uint32_t rows, uint32_t items,
                           uint32_t groups) {
    uint64_t end = sizeof(struct frame_header) + (uint64_t)rows * layout->entry_bytes;
    if (layout->words)
        end += (uint64_t)items * sizeof(uint32_t);
    if (layout->groups_min > 0)
        end += (uint64_t)groups * sizeof(struct frame_group);
    return end;
}

static bool within_limits(const struct layout *layout, uint32_t rows, uint32_t items,
                          uint32_t groups) {
    return layout != NULL && rows <= FRAME_ROWS_MAX && items <= layout->items_max &&
           groups <= layout->groups_max;
}

size_t frame_rows_offset(enum frame_kind kind, uint32_t rows, uint32_t items, uint32_t groups) {
    const struct layout *layout = layout_of(kind);
    if (!within_limits(layout, rows, items, groups))
        return 0;
    uint64_t end = prefix_end(layout, rows, items, groups);
    return (size_t)((end + FRAME_ALIGN - 1) / FRAME_ALIGN * FRAME_ALIGN);
}

size_t frame_bytes(enum frame_kind kind, uint32_t rows, uint32_t items, uint32_t groups,
                   uint32_t row_bytes) {
    const struct layout *layout = layout_of(kind);
    if (!within_limits(layout, rows, items, groups))
        return 0;
    uint64_t bytes = prefix_end(layout, rows, items, groups);
    if (layout->carries_rows)
        bytes = frame_rows_offset(kind, rows, items, groups) +
                (uint64_t)(layout->one_row_per_item ? items : rows) * row_bytes;
    else if (row_bytes != 0)
        return 0;
    return bytes <= sizeof(struct frame_header) + (uint64_t)FRAME_PAYLOAD_MAX ? (size_t)bytes : 0;
}

/* The fields that are the same for every kind. */
static int check_start(const struct frame_header *header, struct failure *failure) {
    if (header->magic != FRAME_MAGIC)
        return fail(failure, ERR_CORRUPT, "frame: magic: expected %08x, found %08x", FRAME_MAGIC,
                    header->magic);
    if (header->version != FRAME_VERSION)
        return fail(failure, ERR_VERSION,
                    "frame: version: expected %u, found %u (run the same version everywhere)",
                    FRAME_VERSION, header->version);
    if (layout_of(header->kind) == NULL)
        return fail(failure, ERR_CORRUPT, "frame: kind: expected %d to %d, found %u",
                    FRAME_DISPATCH, FRAME_MESSAGE, header->kind);
    if (header->payload_bytes > FRAME_PAYLOAD_MAX)
        return fail(failure, ERR_TOO_LARGE, "frame: payload: expected at most %u bytes, found %u",
                    FRAME_PAYLOAD_MAX, header->payload_bytes);
    return 0;
}

static int check_range(const struct layout *layout, const char *field, uint32_t value, uint32_t min,
                       uint32_t max, struct failure *failure) {
    if (value >= min && value <= max)
        return 0;
    return fail(failure, value > max ? ERR_TOO_LARGE : ERR_CORRUPT,
                "frame %s: %s: expected %u to %u, found %u", layout->name, field, min, max, value);
}

static int check_counts(const struct frame_header *header, struct failure *failure) {
    const struct layout *layout = layout_of(header->kind);
    const bool message = header->kind == FRAME_MESSAGE;
    const uint32_t detail_max = message ? header->items * 4 : layout->detail_max;
    const struct {
        const char *field;
        uint32_t value, min, max;
    } RANGES[] = {
        {"rows", header->rows, layout->rows_min, message ? 0 : FRAME_ROWS_MAX},
        {"items", header->items, layout->items_min, layout->items_max},
        {"groups", header->groups, layout->groups_min, layout->groups_max},
        {"layer", header->layer, 0, LAYERS_MAX - 1},
        {"row bytes", header->row_bytes, layout->carries_rows ? 1 : 0,
         layout->carries_rows ? HIDDEN_MAX * (uint32_t)sizeof(float) : 0},
        {"detail", header->detail, message ? detail_max - 3 : 0, detail_max},
        {"format", header->format, 0, header->kind == FRAME_DISPATCH ? FRAME_ROWS_E4M3 : 0},
        {"reserved", header->reserved, 0, 0},
    };
    for (size_t i = 0; i < sizeof RANGES / sizeof *RANGES; i++) {
        int code = check_range(layout, RANGES[i].field, RANGES[i].value, RANGES[i].min,
                               RANGES[i].max, failure);
        if (code < 0)
            return code;
    }
    const uint32_t element = header->kind == FRAME_DISPATCH && header->format == FRAME_ROWS_E4M3
                                 ? E4M3_ROW_GROUP_BYTES
                                 : layout->element_bytes;
    if (layout->carries_rows && header->row_bytes % element != 0)
        return fail(failure, ERR_CORRUPT,
                    "frame %s: row bytes: expected a multiple of %u, found %u", layout->name,
                    element, header->row_bytes);
    size_t bytes =
        frame_bytes(header->kind, header->rows, header->items, header->groups, header->row_bytes);
    if (bytes == 0)
        return fail(failure, ERR_TOO_LARGE,
                    "frame %s: expected at most %u bytes of payload, found %u rows and %u items "
                    "with %u bytes a row",
                    layout->name, FRAME_PAYLOAD_MAX, header->rows, header->items,
                    header->row_bytes);
    if (header->payload_bytes != bytes - sizeof *header)
        return fail(failure, ERR_CORRUPT,
                    "frame %s: payload: expected %zu bytes as the counts say, found %u",
                    layout->name, bytes - sizeof *header, header->payload_bytes);
    return 0;
}

/* DISPATCH: groups add up to the items, items name rows that are there. */
static int check_dispatch(const struct frame *frame, struct failure *failure) {
    const struct frame_header *header = frame->header;
    const struct frame_group *group = frame_groups(frame);
    uint64_t items = 0;
    for (uint32_t i = 0; i < header->groups; i++) {
        if (group[i].expert >= EXPERTS_MAX || group[i].count == 0)
            return fail(failure, ERR_CORRUPT,
                        "frame DISPATCH: group %u: expected an expert below %d with at least 1 "
                        "item, found expert %u with %u",
                        i, EXPERTS_MAX, group[i].expert, group[i].count);
        items += group[i].count;
    }
    if (items != header->items)
        return fail(failure, ERR_CORRUPT,
                    "frame DISPATCH: groups: expected %u items in all, found %llu", header->items,
                    (unsigned long long)items);
    const uint32_t *row = frame_item_rows(frame);
    for (uint32_t i = 0; i < header->items; i++)
        if (row[i] >= header->rows)
            return fail(failure, ERR_CORRUPT,
                        "frame DISPATCH: item %u: expected a row below %u, found %u", i,
                        header->rows, row[i]);
    return 0;
}

static uint32_t header_checksum(const struct frame_header *header) {
    struct frame_header blank = *header;
    blank.crc = 0;
    return crc32c(0, &blank, sizeof blank);
}

static uint32_t checksum(const struct frame_header *header) {
    return crc32c(header_checksum(header), header + 1, header->payload_bytes);
}

/* known: the CRC32C of what is available behind the header. */
static int check(const void *bytes, size_t available, bool check_crc, const uint32_t *known,
                 struct failure *failure) {
    ASSERT((uintptr_t)bytes % _Alignof(struct frame_header) == 0);
    if (available < sizeof(struct frame_header))
        return fail(failure, ERR_CORRUPT, "frame: expected a header of %zu bytes, found %zu",
                    sizeof(struct frame_header), available);
    const struct frame_header *header = bytes;
    int code = check_start(header, failure);
    if (code < 0)
        return code;
    if (header->payload_bytes > available - sizeof *header)
        return fail(failure, ERR_CORRUPT, "frame: payload: expected %u bytes, found %zu",
                    header->payload_bytes, available - sizeof *header);
    /* The checksum before what it protects: damage is then called damage, whichever field it hit.
     */
    if (check_crc) {
        uint32_t crc = known != NULL && header->payload_bytes == available - sizeof *header
                           ? crc32c_join(header_checksum(header), *known, header->payload_bytes)
                           : checksum(header);
        if (crc != header->crc)
            return fail(failure, ERR_CORRUPT, "frame: CRC32C: expected %08x, found %08x",
                        header->crc, crc);
    }
    code = check_counts(header, failure);
    if (code == 0 && header->kind == FRAME_DISPATCH)
        code = check_dispatch(&(struct frame){header, (const uint8_t *)(header + 1)}, failure);
    return code;
}

int frame_check(const void *bytes, size_t available, int check_crc, struct failure *failure) {
    return check(bytes, available, check_crc != 0, NULL, failure);
}

int frame_check_summed(const void *bytes, size_t available, uint32_t payload_crc,
                       struct failure *failure) {
    return check(bytes, available, true, &payload_crc, failure);
}

void frame_seal(struct frame_header *header) {
    header->crc = checksum(header);
}

void frame_seal_rows(struct frame_header *header, size_t rows_offset, uint32_t rows_crc) {
    size_t bytes = sizeof *header + header->payload_bytes;
    ASSERT(rows_offset >= sizeof *header && rows_offset <= bytes);
    header->crc = 0;
    header->crc = crc32c_join(crc32c(0, header, rows_offset), rows_crc, bytes - rows_offset);
}

const struct frame_group *frame_groups(const struct frame *frame) {
    return frame->header->kind == FRAME_DISPATCH ? (const struct frame_group *)frame->payload
                                                 : NULL;
}

const uint32_t *frame_item_rows(const struct frame *frame) {
    if (frame->header->kind != FRAME_DISPATCH)
        return NULL;
    return (const uint32_t *)(frame->payload +
                              (size_t)frame->header->groups * sizeof(struct frame_group));
}

const void *frame_rows(const struct frame *frame) {
    const struct frame_header *header = frame->header;
    const struct layout *layout = layout_of(header->kind);
    if (layout == NULL || !layout->carries_rows)
        return NULL;
    size_t offset = frame_rows_offset(header->kind, header->rows, header->items, header->groups);
    return frame->payload + (offset - sizeof *header);
}
