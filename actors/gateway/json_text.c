/* Writing answers. Requests are read with jansson; answers are written straight into a reused
 * buffer, because a chunk per token is the hottest thing that a gateway does and its keys never
 * change. */
#include "actors/gateway/json_text.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "actors/errors.h"

#define TEXT_FIRST_BYTES 1024

void text_free(struct text *self) {
    free(self->bytes);
    memset(self, 0, sizeof *self);
}

void text_clear(struct text *self) {
    self->size = 0;
}

static void reserve(struct text *self, size_t more) {
    ASSERT(more <= SIZE_MAX / 4 && self->size <= SIZE_MAX / 4);
    if (self->size + more <= self->capacity)
        return;
    size_t capacity = self->capacity == 0 ? TEXT_FIRST_BYTES : self->capacity;
    while (capacity < self->size + more)
        capacity *= 2;
    self->bytes = realloc(self->bytes, capacity);
    ASSERT(self->bytes != NULL && "memory for an answer");
    self->capacity = capacity;
}

void text_append(struct text *self, const void *bytes, size_t size) {
    if (size == 0)
        return;
    reserve(self, size);
    memcpy(self->bytes + self->size, bytes, size);
    self->size += size;
}

void text_puts(struct text *self, const char *string) {
    text_append(self, string, strlen(string));
}

void text_format(struct text *self, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    va_list again;
    va_copy(again, arguments);
    int length = vsnprintf(NULL, 0, format, arguments);
    ASSERT(length >= 0);
    reserve(self, (size_t)length + 1);
    vsnprintf(self->bytes + self->size, (size_t)length + 1, format, again);
    self->size += (size_t)length;
    va_end(again);
    va_end(arguments);
}

size_t utf8_character(const char *bytes, size_t size) {
    const uint8_t *byte = (const uint8_t *)bytes;
    if (size == 0)
        return 0;
    if (byte[0] < 0x80)
        return 1;
    if (byte[0] < 0xc2 || byte[0] > 0xf4)
        return 0;
    size_t length = byte[0] < 0xe0 ? 2 : byte[0] < 0xf0 ? 3 : 4;
    if (size < length)
        return 0;
    /* The second byte excludes overlong forms, surrogates and what lies beyond U+10FFFF. */
    uint8_t low = byte[0] == 0xe0 ? 0xa0 : byte[0] == 0xf0 ? 0x90 : 0x80;
    uint8_t high = byte[0] == 0xed ? 0x9f : byte[0] == 0xf4 ? 0x8f : 0xbf;
    if (byte[1] < low || byte[1] > high)
        return 0;
    for (size_t i = 2; i < length; i++)
        if ((byte[i] & 0xc0) != 0x80)
            return 0;
    return length;
}

size_t utf8_characters(const char *bytes, size_t size) {
    size_t count = 0;
    for (size_t at = 0; at < size; count++) {
        size_t length = utf8_character(bytes + at, size - at);
        at += length == 0 ? 1 : length;
    }
    return count;
}

void text_json(struct text *self, const char *bytes, size_t size) {
    text_append(self, "\"", 1);
    size_t plain = 0; /* bytes before `at` that are still to be copied as they are */
    size_t at = 0;
    while (at < size) {
        uint8_t c = (uint8_t)bytes[at];
        size_t length = utf8_character(bytes + at, size - at);
        if (length > 0 && c >= 0x20 && c != '"' && c != '\\' && c != 0x7f) {
            at += length;
            continue;
        }
        text_append(self, bytes + plain, at - plain);
        if (length == 0)
            text_puts(self, "\xef\xbf\xbd");
        else if (c == '"' || c == '\\')
            text_format(self, "\\%c", c);
        else if (c == '\n')
            text_puts(self, "\\n");
        else if (c == '\t')
            text_puts(self, "\\t");
        else if (c == '\r')
            text_puts(self, "\\r");
        else
            text_format(self, "\\u%04x", c);
        at += 1;
        plain = at;
    }
    text_append(self, bytes + plain, at - plain);
    text_append(self, "\"", 1);
}

void text_json_string(struct text *self, const char *string) {
    text_json(self, string, strlen(string));
}

void text_float(struct text *self, float value) {
    if (!isfinite(value)) {
        text_puts(self, "-9999.0");
        return;
    }
    char digits[32];
    for (int precision = 6; precision <= 9; precision++) {
        snprintf(digits, sizeof digits, "%.*g", precision, (double)value);
        if (strtof(digits, NULL) == value)
            break; /* nine significant digits tell any two floats apart */
    }
    text_puts(self, digits);
    if (strpbrk(digits, ".e") == NULL)
        text_puts(self, ".0"); /* a float for every reader */
}
