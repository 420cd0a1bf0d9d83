/* Stop strings that may begin in one token and end in another. */
#ifndef TROUPE_STOP_H
#define TROUPE_STOP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "actors/gateway/json_text.h"
#include "actors/limits.h"

/* The strings of one request with their failure tables (Knuth, Morris, Pratt 1977): border[i] is
 * the length of the longest proper prefix of the string that is also a suffix of its first i + 1
 * bytes. */
struct stop_strings {
    uint32_t count;
    struct stop_string {
        char *bytes;
        uint32_t size;
        uint16_t *border; /* [size] */
    } string[STOP_STRINGS_MAX];
};
void stop_strings_add(struct stop_strings *self, const char *bytes,
                      size_t size); /* 1..STOP_STRING_BYTES_MAX bytes */
void stop_strings_free(struct stop_strings *self);

/* One stream of text. What might be the beginning of a stop string is held back until it is
 * certain. */
struct stop_filter {
    const struct stop_strings *strings;
    uint16_t matched[STOP_STRINGS_MAX]; /* longest suffix of the text so far that begins string i */
    struct text held;                   /* as long as the largest of `matched` */
    int32_t found;                      /* which string ended the stream; -1: none */
};
void stop_filter_init(struct stop_filter *self, const struct stop_strings *strings);
void stop_filter_free(struct stop_filter *self);

/* Appends to `out` what is certain to lie before any stop string. `watch` false: the text is passed
 * through and no string may begin in it (the first min_tokens tokens). Returns true once a stop
 * string is complete: everything from its first byte on is dropped, or, with `include`, everything
 * after its last byte. The string whose last byte comes first wins; of several with the same last
 * byte the first in the list. So the result depends on the text alone, never on how it was cut into
 * tokens. */
bool stop_filter_push(struct stop_filter *self, const char *bytes, size_t size, bool watch,
                      bool include, struct text *out);
/* The stream ends here: what was held back is text after all. */
void stop_filter_flush(struct stop_filter *self, struct text *out);

#endif
