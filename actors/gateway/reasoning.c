/* Reasoning text of R1 and V3.1. States: OFF (everything is answer), BEGIN (a model may repeat the
 * opening tag that its prompt already ended with), INSIDE (until </think>), DONE. A tag that is cut
 * by token borders is held back like a stop string. */
#include "actors/gateway/reasoning.h"

#include "actors/errors.h"

static const char OPEN_TAG[] = "<think>";
#define OPEN_TAG_BYTES (sizeof OPEN_TAG - 1)

static char close_tag[] = "</think>";
static uint16_t close_border[8]; /* "</think>" repeats no prefix of itself: all zero */
static const struct stop_strings CLOSE = {
    .count = 1,
    .string = {{.bytes = close_tag, .size = 8, .border = close_border}},
};

void reasoning_init(struct reasoning *self, bool inside) {
    self->state = inside ? REASONING_BEGIN : REASONING_OFF;
    self->opened = 0;
    stop_filter_init(&self->filter, &CLOSE);
}

void reasoning_free(struct reasoning *self) {
    stop_filter_free(&self->filter);
}

/* Bytes of `bytes` that belong to a repeated opening tag, or that prove that there is none. */
static size_t begin(struct reasoning *self, const char *bytes, size_t size, struct text *thought) {
    size_t used = 0;
    while (used < size && self->opened < OPEN_TAG_BYTES && bytes[used] == OPEN_TAG[self->opened]) {
        used++;
        self->opened++;
    }
    if (self->opened == OPEN_TAG_BYTES) {
        self->state = REASONING_INSIDE;
    } else if (used < size) {
        self->state = REASONING_INSIDE;
        /* No tag after all: what looked like one is text, and may even begin the closing tag ("<").
         */
        bool closed = stop_filter_push(&self->filter, OPEN_TAG, self->opened, true, false, thought);
        ASSERT(!closed);
    }
    return used;
}

void reasoning_push(struct reasoning *self, const char *bytes, size_t size, struct text *thought,
                    struct text *answer) {
    if (self->state == REASONING_BEGIN) {
        size_t used = begin(self, bytes, size, thought);
        bytes += used;
        size -= used;
    }
    /* Byte by byte while inside, because what follows the tag in the same piece is answer. */
    while (self->state == REASONING_INSIDE && size > 0) {
        if (stop_filter_push(&self->filter, bytes, 1, true, false, thought))
            self->state = REASONING_DONE;
        bytes++;
        size--;
    }
    if (self->state == REASONING_OFF || self->state == REASONING_DONE)
        text_append(answer, bytes, size);
}

void reasoning_flush(struct reasoning *self, struct text *thought) {
    if (self->state == REASONING_BEGIN)
        text_append(thought, OPEN_TAG, self->opened);
    if (self->state == REASONING_INSIDE)
        stop_filter_flush(&self->filter, thought);
}
