/* JSON objects read field by field, with a range for each. config.json and its companions come from
 * outside: whatever they say is checked here before any size is computed from it. */
#include "model/fields.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "actors/limits.h"

#define SHOWN_BYTES 64

json_t *fields_parse(const char *text, size_t size, const char *file, struct failure *failure) {
    if (size > JSON_FILE_MAX) {
        fail(failure, ERR_TOO_LARGE, "%s: expected at most %u bytes, found %zu", file,
             JSON_FILE_MAX, size);
        return NULL;
    }
    json_error_t error;
    json_t *root = json_loadb(text, size, JSON_REJECT_DUPLICATES, &error);
    if (root == NULL) {
        fail(failure, ERR_CORRUPT, "%s: invalid JSON at line %d, column %d: %s", file, error.line,
             error.column, error.text);
        return NULL;
    }
    if (!json_is_object(root)) {
        char shown[SHOWN_BYTES];
        fail(failure, ERR_CORRUPT, "%s: expected a JSON object, found %s", file,
             fields_show(root, shown, sizeof shown));
        json_decref(root);
        return NULL;
    }
    return root;
}

const char *fields_show(const json_t *value, char *ret, size_t size) {
    ASSERT(size >= 8);
    if (value == NULL) {
        snprintf(ret, size, "nothing");
        return ret;
    }
    size_t need = json_dumpb(value, ret, size, JSON_ENCODE_ANY | JSON_COMPACT | JSON_ENSURE_ASCII);
    if (need == 0) {
        snprintf(ret, size, "?");
    } else if (need < size) {
        ret[need] = '\0';
    } else {
        /* jansson writes nothing past `size` but need not fill it; strings and lists are cut with
         * dots. */
        char *whole = json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT | JSON_ENSURE_ASCII);
        snprintf(ret, size, "%.*s...", (int)(size - 4), whole != NULL ? whole : "?");
        free(whole);
    }
    return ret;
}

void fields_fail(struct fields *self, int code, const char *format, ...) {
    if (self->code < 0)
        return;
    char text[FAILURE_TEXT_BYTES];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    self->code = fail(self->failure, code, "%s: %s", self->file, text);
}

const json_t *fields_get(const struct fields *self, const char *key) {
    const json_t *value = json_object_get(self->object, key);
    return value == NULL || json_is_null(value) ? NULL : value;
}

static bool read_integer(struct fields *self, const char *key, json_int_t min, json_int_t max,
                         json_int_t *ret) {
    const json_t *value = fields_get(self, key);
    if (self->code < 0 || value == NULL)
        return false;
    if (!json_is_integer(value) || json_integer_value(value) < min ||
        json_integer_value(value) > max) {
        char shown[SHOWN_BYTES];
        fields_fail(self, ERR_INVALID, "%s: expected an integer from %lld to %lld, found %s", key,
                    (long long)min, (long long)max, fields_show(value, shown, sizeof shown));
        return false;
    }
    *ret = json_integer_value(value);
    return true;
}

static void require(struct fields *self, const char *key) {
    if (fields_get(self, key) == NULL)
        fields_fail(self, ERR_INVALID, "%s: missing", key);
}

uint32_t fields_u32(struct fields *self, const char *key, uint32_t min, uint32_t max) {
    require(self, key);
    return fields_u32_or(self, key, min, max, min);
}

uint32_t fields_u32_or(struct fields *self, const char *key, uint32_t min, uint32_t max,
                       uint32_t fallback) {
    json_int_t value = fallback;
    read_integer(self, key, min, max, &value);
    return (uint32_t)value;
}

int32_t fields_i32_or(struct fields *self, const char *key, int32_t min, int32_t max,
                      int32_t fallback) {
    json_int_t value = fallback;
    read_integer(self, key, min, max, &value);
    return (int32_t)value;
}

double fields_number_or(struct fields *self, const char *key, double min, double max,
                        double fallback) {
    const json_t *value = fields_get(self, key);
    if (self->code < 0 || value == NULL)
        return fallback;
    double number = json_is_number(value) ? json_number_value(value) : NAN;
    if (!(number >= min && number <= max)) {
        char shown[SHOWN_BYTES];
        fields_fail(self, ERR_INVALID, "%s: expected a number from %g to %g, found %s", key, min,
                    max, fields_show(value, shown, sizeof shown));
        return fallback;
    }
    return number;
}

double fields_number(struct fields *self, const char *key, double min, double max) {
    require(self, key);
    return fields_number_or(self, key, min, max, min);
}

bool fields_bool_or(struct fields *self, const char *key, bool fallback) {
    const json_t *value = fields_get(self, key);
    if (self->code < 0 || value == NULL)
        return fallback;
    if (!json_is_boolean(value)) {
        char shown[SHOWN_BYTES];
        fields_fail(self, ERR_INVALID, "%s: expected true or false, found %s", key,
                    fields_show(value, shown, sizeof shown));
        return fallback;
    }
    return json_is_true(value);
}

const char *fields_string_or(struct fields *self, const char *key, const char *fallback) {
    const json_t *value = fields_get(self, key);
    if (self->code < 0 || value == NULL)
        return fallback;
    if (!json_is_string(value)) {
        char shown[SHOWN_BYTES];
        fields_fail(self, ERR_INVALID, "%s: expected a string, found %s", key,
                    fields_show(value, shown, sizeof shown));
        return fallback;
    }
    return json_string_value(value);
}
