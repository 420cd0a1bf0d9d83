/* Stop strings. Each string is an automaton that is fed byte by byte, so the work is linear in the
 * text whatever the strings are, and the longest suffix that may still become a stop string is
 * simply the longest of the automata's states. */
#include "actors/gateway/stop.h"

#include <stdlib.h>
#include <string.h>

#include "actors/errors.h"

void stop_strings_add(struct stop_strings *self, const char *bytes, size_t size) {
    ASSERT(self->count < STOP_STRINGS_MAX && size > 0 && size <= STOP_STRING_BYTES_MAX);
    struct stop_string *string = &self->string[self->count++];
    string->bytes = malloc(size);
    string->border = calloc(size, sizeof *string->border);
    ASSERT(string->bytes != NULL && string->border != NULL && "memory for a stop string");
    memcpy(string->bytes, bytes, size);
    string->size = (uint32_t)size;
    uint16_t length = 0;
    for (size_t i = 1; i < size; i++) {
        while (length > 0 && bytes[i] != bytes[length])
            length = string->border[length - 1];
        if (bytes[i] == bytes[length])
            length++;
        string->border[i] = length;
    }
}

void stop_strings_free(struct stop_strings *self) {
    for (uint32_t i = 0; i < self->count; i++) {
        free(self->string[i].bytes);
        free(self->string[i].border);
    }
    memset(self, 0, sizeof *self);
}

void stop_filter_init(struct stop_filter *self, const struct stop_strings *strings) {
    memset(self, 0, sizeof *self);
    self->strings = strings;
    self->found = -1;
}

void stop_filter_free(struct stop_filter *self) {
    text_free(&self->held);
}

/* Feeds one byte to string i; true if the string is complete. */
static bool feed(struct stop_filter *self, uint32_t i, char byte) {
    const struct stop_string *string = &self->strings->string[i];
    uint16_t length = self->matched[i];
    while (length > 0 && string->bytes[length] != byte)
        length = string->border[length - 1];
    if (string->bytes[length] == byte)
        length++;
    self->matched[i] = length;
    return length == string->size;
}

bool stop_filter_push(struct stop_filter *self, const char *bytes, size_t size, bool watch,
                      bool include, struct text *out) {
    ASSERT(self->found < 0);
    if (self->strings->count == 0 || !watch) {
        text_append(out, bytes, size);
        return false;
    }
    for (size_t at = 0; at < size; at++) {
        text_append(&self->held, bytes + at, 1);
        size_t longest = 0;
        for (uint32_t i = 0; i < self->strings->count; i++) {
            if (feed(self, i, bytes[at]) && self->found < 0)
                self->found = (int32_t)i;
            if (self->matched[i] > longest)
                longest = self->matched[i];
        }
        if (self->found >= 0) {
            size_t tail = include ? 0 : self->strings->string[self->found].size;
            ASSERT(self->held.size >= tail);
            text_append(out, self->held.bytes, self->held.size - tail);
            text_clear(&self->held);
            return true;
        }
        size_t certain = self->held.size - longest;
        if (certain > 0) {
            text_append(out, self->held.bytes, certain);
            memmove(self->held.bytes, self->held.bytes + certain, longest);
            self->held.size = longest;
        }
    }
    return false;
}

void stop_filter_flush(struct stop_filter *self, struct text *out) {
    text_append(out, self->held.bytes, self->held.size);
    text_clear(&self->held);
}
