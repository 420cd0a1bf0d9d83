/* Checked reading of JSON objects: every field has a type and a range, the first thing that is
 * wrong is kept and named. Private to model/. */
#ifndef TROUPE_MODEL_FIELDS_H
#define TROUPE_MODEL_FIELDS_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "actors/errors.h"

/* Parses a whole file: size bounded by JSON_FILE_MAX, duplicate keys refused, the top must be an
 * object. NULL on failure. */
json_t *fields_parse(const char *text, size_t size, const char *file, struct failure *failure);

/* Reads fields of one object. After the first failure `code` is negative and every further read
 * returns its fallback (required fields: the minimum), so that a run of reads needs one check at
 * its end. */
struct fields {
    const json_t *object;
    const char *file; /* "config.json", for messages */
    struct failure *failure;
    int code;
};

/* Absent or null: the field is missing, an error. */
uint32_t fields_u32(struct fields *self, const char *key, uint32_t min, uint32_t max);
/* Absent or null: the fallback. */
uint32_t fields_u32_or(struct fields *self, const char *key, uint32_t min, uint32_t max,
                       uint32_t fallback);
int32_t fields_i32_or(struct fields *self, const char *key, int32_t min, int32_t max,
                      int32_t fallback);
double fields_number_or(struct fields *self, const char *key, double min, double max,
                        double fallback);
double fields_number(struct fields *self, const char *key, double min, double max);
bool fields_bool_or(struct fields *self, const char *key, bool fallback);
/* Borrowed from the object. */
const char *fields_string_or(struct fields *self, const char *key, const char *fallback);
const json_t *fields_get(const struct fields *self, const char *key); /* NULL: absent or null */

/* Records a failure unless there is one already; the text is prefixed with the file's name. */
void fields_fail(struct fields *self, int code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* The value as short text, for messages. Writes at most `size` bytes and returns ret. */
const char *fields_show(const json_t *value, char *ret, size_t size);

#endif
