/* A growing piece of text and what is written into it: JSON strings and numbers, formatted lines.
 * Memory is kept from use to use. */
#ifndef TROUPE_JSON_TEXT_H
#define TROUPE_JSON_TEXT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct text {
    char *bytes; /* not NUL-terminated */
    size_t size, capacity;
};

void text_free(struct text *self);
void text_clear(struct text *self); /* memory is kept */
void text_append(struct text *self, const void *bytes, size_t size);
void text_puts(struct text *self, const char *string);
void text_format(struct text *self, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* A JSON string with its quotes. Bytes that are not UTF-8 become U+FFFD, so the result is always
 * valid JSON. */
void text_json(struct text *self, const char *bytes, size_t size);
void text_json_string(struct text *self, const char *string);

/* The shortest decimal that reads back as the same float: equal bits give equal digits, different
 * floats differ. What JSON cannot say (a forbidden token's -infinity, NaN) becomes -9999.0, as in
 * vLLM. */
void text_float(struct text *self, float value);

/* Length of the well-formed UTF-8 character at `bytes`, 0 if there is none (Unicode 15, table 3-7).
 */
size_t utf8_character(const char *bytes, size_t size);
size_t utf8_characters(const char *bytes,
                       size_t size); /* how many there are; each stray byte counts as one */

#endif
