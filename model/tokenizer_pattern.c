/* Split patterns are written for Oniguruma (Ruby syntax), which Hugging Face uses; here they run in
 * PCRE2. This translates what the two read differently and refuses, by name, what has no equal, so
 * that a pattern either means the same or is not accepted. */
#include "model/tokenizer_parts.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define UNICODE_VERSION 16

struct translation {
    const char *from, *end;
    char *to;
    size_t length, capacity;
    bool old_unicode; /* PCRE2 knows fewer characters than Hugging Face's engine */
    struct failure *failure;
};

static bool is_digit(char c) {
    return c >= '0' && c <= '9';
}

static bool is_hex(char c) {
    return is_digit(c) || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F');
}

static int refuse(const struct translation *self, const char *at, size_t length) {
    size_t left = (size_t)(self->end - at);
    return fail(self->failure, ERR_UNSUPPORTED, "regex: \"%.*s\" is not supported here",
                clip(at, left, length + 3), at);
}

static int put(struct translation *self, const char *text, size_t length) {
    if (self->capacity - self->length < length) {
        size_t capacity = 2 * self->capacity + length;
        char *grown = realloc(self->to, capacity);
        if (grown == NULL)
            return fail(self->failure, ERR_NO_MEMORY, "no memory for a regex");
        self->to = grown;
        self->capacity = capacity;
    }
    memcpy(self->to + self->length, text, length);
    self->length += length;
    return 0;
}

/* Copies `length` characters of the pattern. */
static int copy(struct translation *self, size_t length) {
    int code = put(self, self->from, length);
    self->from += length;
    return code;
}

/* The characters of a category, as ranges, that PCRE2's Unicode does not have yet. */
static int put_additions(struct translation *self, const char *category, size_t letters) {
    static const struct {
        const char *range, *category;
    } additions[] = {
#define A(first, last, category) {"\\x{" #first "}-\\x{" #last "}", #category},
#include "model/unicode.def"
#undef A
    };
    int code = 0;
    for (size_t i = 0; code == 0 && i < sizeof additions / sizeof additions[0]; i++)
        if (strncmp(additions[i].category, category, letters) == 0)
            code = put(self, additions[i].range, strlen(additions[i].range));
    return code;
}

/* A general category of one or two letters, or its complement. */
static int put_category(struct translation *self, const char *category, size_t letters,
                        bool complement, bool in_class) {
    char text[8];
    int length = snprintf(text, sizeof text, "\\p{%.*s}", (int)letters, category);
    int code = in_class ? 0 : put(self, complement ? "[^" : "[", complement ? 2 : 1);
    if (code == 0)
        code = put(self, text, (size_t)length);
    if (code == 0 && self->old_unicode)
        code = put_additions(self, category, letters);
    if (code == 0 && !in_class)
        code = put(self, "]", 1);
    return code;
}

/* \p{L}, \p{Lu}, \P{N}, \p{^N}: general categories only, for names of scripts mean different sets;
 * without C, which shrinks from one Unicode to the next. A complement inside of a set could not be
 * extended. */
static int property(struct translation *self, bool in_class) {
    const char *start = self->from, *at = start + 2;
    bool complement = start[1] == 'P';
    if (at < self->end && *at == '{')
        at++;
    else
        return refuse(self, start, 3);
    if (at < self->end && *at == '^') {
        complement = !complement;
        at++;
    }
    const char *category = at;
    while (at < self->end && *at != '}' && at - category < 3)
        at++;
    size_t letters = (size_t)(at - category);
    if (at == self->end || *at != '}' || letters < 1 || letters > 2 ||
        strchr("LMNPSZ", category[0]) == NULL || category[0] == 0 ||
        (letters == 2 && (category[1] < 'a' || category[1] > 'z')) || (complement && in_class))
        return refuse(self, start, 12);
    self->from = at + 1;
    return put_category(self, category, letters, complement, in_class);
}

static int hexadecimal(struct translation *self) {
    char kind = self->from[1];
    const char *digits = self->from + 2;
    bool braces = kind == 'x' && digits < self->end && *digits == '{';
    digits += braces;
    size_t count = 0;
    while (digits + count < self->end && is_hex(digits[count]) && count < 8)
        count++;
    char text[16];
    if (braces) {
        if (count == 0 || digits + count == self->end || digits[count] != '}')
            return refuse(self, self->from, 4);
        return copy(self, count + 4);
    }
    size_t wanted = kind == 'u' ? 4 : 2;
    if (count < wanted || (kind == 'x' && digits[0] >= '8')) /* beyond ASCII \x is a byte there */
        return refuse(self, self->from, 2 + wanted);
    int length = snprintf(text, sizeof text, "\\x{%.*s}", (int)wanted, digits);
    self->from += 2 + wanted;
    return put(self, text, (size_t)length);
}

static int escape(struct translation *self, bool in_class) {
    if (self->from + 1 == self->end)
        return refuse(self, self->from, 1);
    char c = self->from[1];
    const char *text = NULL;
    switch (c) {
    case 'p':
    case 'P':
        return property(self, in_class);
    case 'x':
    case 'u':
        return hexadecimal(self);
    case 's': /* PCRE2 counts U+180E among them */
        text = "\\p{White_Space}";
        break;
    case 'S':
        text = "\\P{White_Space}";
        break;
    case 'd':
    case 'D':
        if (c == 'D' && in_class)
            break;
        self->from += 2;
        return put_category(self, "Nd", 2, c == 'D', in_class);
    case 'v': /* all vertical space in PCRE2 */
        text = "\\x0b";
        break;
    case 'r':
    case 'n':
    case 't':
    case 'f':
    case 'a':
    case 'e':
        return copy(self, 2);
    case 'A':
    case 'z':
        if (!in_class)
            return copy(self, 2);
        break;
    default:
        if (c > 0x20 && c < 0x7f && !is_digit(c) && !(c >= 'a' && c <= 'z') &&
            !(c >= 'A' && c <= 'Z'))
            return copy(self, 2);
        break;
    }
    if (text == NULL)
        return refuse(self, self->from, 2);
    self->from += 2;
    return put(self, text, strlen(text));
}

/* From '[' to ']'. Sets within sets and && are Oniguruma's own. */
static int set(struct translation *self) {
    const char *start = self->from;
    int code = copy(self, 1);
    if (code == 0 && self->from < self->end && *self->from == '^')
        code = copy(self, 1);
    if (self->from < self->end && *self->from == ']')
        return refuse(self, start, 3);
    while (code == 0 && self->from < self->end) {
        if (*self->from == ']')
            return copy(self, 1);
        if (*self->from == '\\')
            code = escape(self, true);
        else if (*self->from == '[')
            return refuse(self, self->from, 2);
        else if (*self->from == '&' && self->from + 1 < self->end && self->from[1] == '&')
            return refuse(self, self->from, 2);
        else
            code = copy(self, 1);
    }
    return code < 0 ? code : fail(self->failure, ERR_INVALID, "regex: a '[' has no ']'");
}

static int group(struct translation *self) {
    static const char *const known[] = {"(?:", "(?=", "(?!", "(?>", "(?<=", "(?<!", "(?i:"};
    size_t left = (size_t)(self->end - self->from);
    if (left > 1 && self->from[1] == '?') {
        for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
            size_t length = strlen(known[i]);
            if (left >= length && memcmp(self->from, known[i], length) == 0)
                return copy(self, length);
        }
        return refuse(self, self->from, 4);
    }
    if (left > 1 && self->from[1] == '*')
        return refuse(self, self->from, 2);
    return copy(self, 1);
}

/* {n} {n,} {n,m}, lazy with '?' where Oniguruma too reads it so. */
static int repetition(struct translation *self) {
    const char *at = self->from + 1, *digits = at;
    while (at < self->end && is_digit(*at))
        at++;
    bool comma = at < self->end && *at == ',';
    if (at == digits)
        return refuse(self, self->from, 2);
    at += comma;
    while (at < self->end && is_digit(*at))
        at++;
    if (at == self->end || *at != '}')
        return refuse(self, self->from, 6);
    at++;
    if (at < self->end && (*at == '+' || (*at == '?' && !comma)))
        return refuse(self, self->from, (size_t)(at + 1 - self->from));
    return copy(self, (size_t)(at - self->from));
}

int pattern_translate(const char *pattern, size_t length, char **ret, size_t *ret_length,
                      struct failure *failure) {
    char version[32] = "";
    if (pcre2_config(PCRE2_CONFIG_UNICODE_VERSION, NULL) <= (int)sizeof version)
        pcre2_config(PCRE2_CONFIG_UNICODE_VERSION, version);
    struct translation self = {.from = pattern,
                               .end = pattern + length,
                               .old_unicode = strtol(version, NULL, 10) < UNICODE_VERSION,
                               .failure = failure};
    int code =
        length > 0 ? 0 : fail(failure, ERR_INVALID, "regex: expected one, found an empty text");
    while (code == 0 && self.from < self.end) {
        switch (*self.from) {
        case '\\':
            code = escape(&self, false);
            break;
        case '[':
            code = set(&self);
            break;
        case '(':
            code = group(&self);
            break;
        case '{':
            code = repetition(&self);
            break;
        default:
            code = copy(&self, 1);
            break;
        }
    }
    if (code < 0) {
        free(self.to);
        return code;
    }
    *ret = self.to;
    *ret_length = self.length;
    return 0;
}
