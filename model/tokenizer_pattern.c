/* Split patterns are written for Oniguruma (Ruby syntax), which Hugging Face uses; here they run in
 * PCRE2. This translates what the two read differently and refuses, by name, what has no equal, so
 * that a pattern either means the same or is not accepted. */
#include "model/tokenizer_parts.h"

#include <stdio.h>
#include <string.h>

struct translation {
    const char *from, *end;
    char *to, *to_end;
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
    if ((size_t)(self->to_end - self->to) < length)
        return fail(self->failure, ERR_TOO_LARGE, "regex: too long");
    memcpy(self->to, text, length);
    self->to += length;
    return 0;
}

/* Copies `length` characters of the pattern. */
static int copy(struct translation *self, size_t length) {
    int code = put(self, self->from, length);
    self->from += length;
    return code;
}

/* \p{L}, \P{Lu}, \p{^N}: general categories only; names of scripts mean different sets. */
static int property(struct translation *self) {
    const char *at = self->from + 2;
    if (at == self->end || *at != '{')
        return refuse(self, self->from, 3);
    at++;
    if (at != self->end && *at == '^')
        at++;
    if (at == self->end || strchr("LMNPSZC", *at) == NULL || *at == 0)
        return refuse(self, self->from, 12);
    at++;
    if (at != self->end && *at >= 'a' && *at <= 'z')
        at++;
    if (at == self->end || *at != '}')
        return refuse(self, self->from, 12);
    return copy(self, (size_t)(at + 1 - self->from));
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
        return property(self);
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
        text = "\\p{Nd}";
        break;
    case 'D':
        text = "\\P{Nd}";
        break;
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

int pattern_translate(const char *pattern, size_t length, char *ret, size_t capacity,
                      size_t *ret_length, struct failure *failure) {
    struct translation self = {pattern, pattern + length, ret, ret + capacity, failure};
    int code = 0;
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
    *ret_length = (size_t)(self.to - ret);
    return code;
}
