/* What both transports share: how a frame is written. */
#include "actors/host/transport.h"

#include <string.h>

static void flip(uint8_t *bytes, uint64_t bit) {
    if (bit > 0)
        bytes[(bit - 1) / 8] ^= (uint8_t)(1u << (bit - 1) % 8);
}

void outgoing_write(const struct outgoing *self, void *memory) {
    uint8_t *bytes = memory;
    size_t rows = self->gather != NULL ? self->rows_offset : self->bytes;
    size_t written = sizeof self->header + self->prefix_bytes;
    ASSERT(written <= rows && rows <= self->bytes);
    memcpy(bytes, &self->header, sizeof self->header);
    if (self->prefix_bytes > 0)
        memcpy(bytes + sizeof self->header, self->prefix, self->prefix_bytes);
    memset(bytes + written, 0, rows - written);
    if (self->gather != NULL && memory != self->reserved)
        self->gather(self->context, bytes + rows);
    struct frame_header *header = memory;
    header->crc = 0;
    flip(bytes, self->flip_before);
    if (self->seal && self->summed && self->flip_before == 0)
        frame_seal_rows(header, self->rows_offset, self->rows_crc);
    else if (self->seal)
        frame_seal(header);
    flip(bytes, self->flip_after);
}
