/* Knobs: one row per line of knobs.def, from which defaults, checks, YAML, help and the simulator's
 * random values all come. */
#include "config/settings.h"

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <yaml.h>

#define YAML_BYTES_MAX  (1u << 20)
#define NAME_BYTES_MAX  64
#define VALUE_BYTES_MAX 64

enum knob_type { KNOB_u32, KNOB_u64, KNOB_f64 };

/* Each number in both readings: whole numbers beyond 2^53 are not exact as doubles. */
struct number {
    uint64_t whole;
    double real;
};

struct knob {
    const char *name;
    enum knob_type type;
    size_t offset;
    struct number initial, min, max, sim_min, sim_max;
    const char *why;
};

#define NUMBER(value)                                                                              \
    { (uint64_t)(value), (double)(value) }
static const struct knob knobs[] = {
#define K(name, type, def, min, max, sim_min, sim_max, why)                                        \
    {#name,           KNOB_##type,     offsetof(struct settings, name),                            \
     NUMBER(def),     NUMBER(min),     NUMBER(max),                                                \
     NUMBER(sim_min), NUMBER(sim_max), why},
#include "config/knobs.def"
#undef K
};
#define KNOBS (sizeof knobs / sizeof knobs[0])

static void store(struct settings *self, const struct knob *knob, struct number value) {
    char *field = (char *)self + knob->offset;
    switch (knob->type) {
    case KNOB_u32: {
        uint32_t whole = (uint32_t)value.whole;
        memcpy(field, &whole, sizeof whole);
        break;
    }
    case KNOB_u64:
        memcpy(field, &value.whole, sizeof value.whole);
        break;
    case KNOB_f64:
        memcpy(field, &value.real, sizeof value.real);
        break;
    }
}

void settings_default(struct settings *ret) {
    memset(ret, 0, sizeof *ret);
    for (size_t k = 0; k < KNOBS; k++)
        store(ret, &knobs[k], knobs[k].initial);
}

/* Same letters, '-' and '_' being one. */
static bool same_name(const char *a, const char *b) {
    for (; *a != 0 && *b != 0; a++, b++)
        if ((*a == '-' ? '_' : *a) != (*b == '-' ? '_' : *b))
            return false;
    return *a == *b;
}

/* Edit distance of two names; what is longer than any knob's name counts as far away. */
static size_t name_distance(const char *a, const char *b) {
    size_t a_bytes = strlen(a), b_bytes = strlen(b);
    if (a_bytes > NAME_BYTES_MAX || b_bytes > NAME_BYTES_MAX)
        return SIZE_MAX;
    size_t row[NAME_BYTES_MAX + 1];
    for (size_t j = 0; j <= b_bytes; j++)
        row[j] = j;
    for (size_t i = 1; i <= a_bytes; i++) {
        size_t diagonal = row[0];
        row[0] = i;
        for (size_t j = 1; j <= b_bytes; j++) {
            char from = a[i - 1] == '-' ? '_' : a[i - 1];
            size_t best = diagonal + (from != b[j - 1]);
            if (row[j] + 1 < best)
                best = row[j] + 1;
            if (row[j - 1] + 1 < best)
                best = row[j - 1] + 1;
            diagonal = row[j];
            row[j] = best;
        }
    }
    return row[b_bytes];
}

static const struct knob *find_knob(const char *name, struct failure *failure, int *ret_code) {
    const struct knob *closest = &knobs[0];
    size_t closest_distance = SIZE_MAX;
    for (size_t k = 0; k < KNOBS; k++) {
        if (same_name(name, knobs[k].name))
            return &knobs[k];
        size_t distance = name_distance(name, knobs[k].name);
        if (distance < closest_distance) {
            closest = &knobs[k];
            closest_distance = distance;
        }
    }
    *ret_code = fail(failure, ERR_NOT_FOUND,
                     "unknown setting \"%.64s\"; the closest name is \"%s\"", name, closest->name);
    return NULL;
}

static bool parse_whole(const char *text, uint64_t *ret) {
    uint64_t value = 0;
    if (*text == 0)
        return false;
    for (; *text != 0; text++) {
        if (*text < '0' || *text > '9' || __builtin_mul_overflow(value, 10, &value) ||
            __builtin_add_overflow(value, (uint64_t)(*text - '0'), &value))
            return false;
    }
    *ret = value;
    return true;
}

/* Decimal only: strtod alone would also take "nan", "0x1p3" and leading spaces. */
static bool parse_real(const char *text, double *ret) {
    if (*text == 0 || strspn(text, "0123456789.eE+-") != strlen(text))
        return false;
    char *end;
    *ret = strtod(text, &end);
    return *end == 0 && isfinite(*ret);
}

int settings_set(struct settings *self, const char *name, const char *value,
                 struct failure *failure) {
    int code = 0;
    const struct knob *knob = find_knob(name, failure, &code);
    if (knob == NULL)
        return code;
    struct number number = {0};
    if (knob->type == KNOB_f64) {
        if (!parse_real(value, &number.real) || number.real < knob->min.real ||
            number.real > knob->max.real)
            return fail(failure, ERR_INVALID,
                        "%s: expected a number from %g to %g, found \"%.64s\"", knob->name,
                        knob->min.real, knob->max.real, value);
    } else {
        if (!parse_whole(value, &number.whole) || number.whole < knob->min.whole ||
            number.whole > knob->max.whole)
            return fail(failure, ERR_INVALID,
                        "%s: expected a whole number from %llu to %llu, found \"%.64s\"",
                        knob->name, (unsigned long long)knob->min.whole,
                        (unsigned long long)knob->max.whole, value);
    }
    store(self, knob, number);
    return 0;
}

struct yaml_reader {
    yaml_parser_t parser;
    yaml_event_t event;
    struct failure *failure;
};

/* Replaces the current event by the next one. */
static int next_event(struct yaml_reader *reader) {
    yaml_event_delete(&reader->event);
    if (yaml_parser_parse(&reader->parser, &reader->event))
        return 0;
    return fail(reader->failure, ERR_INVALID, "not YAML: %s at line %zu",
                reader->parser.problem != NULL ? reader->parser.problem : "out of memory",
                reader->parser.problem_mark.line + 1);
}

static int unexpected(struct yaml_reader *reader, const char *expected) {
    return fail(reader->failure, ERR_INVALID, "settings, line %zu: expected %s",
                reader->event.start_mark.line + 1, expected);
}

/* Copies a scalar event; anything else, an anchor or an embedded NUL is refused. */
static int take_scalar(struct yaml_reader *reader, const char *expected, char *ret,
                       size_t capacity) {
    if (reader->event.type != YAML_SCALAR_EVENT || reader->event.data.scalar.anchor != NULL)
        return unexpected(reader, expected);
    const char *text = (const char *)reader->event.data.scalar.value;
    size_t bytes = reader->event.data.scalar.length;
    if (bytes >= capacity || memchr(text, 0, bytes) != NULL)
        return unexpected(reader, expected);
    memcpy(ret, text, bytes);
    ret[bytes] = 0;
    return 0;
}

static int read_mapping(struct yaml_reader *reader, struct settings *settings) {
    bool seen[KNOBS] = {false};
    for (;;) {
        int code = next_event(reader);
        if (code < 0)
            return code;
        if (reader->event.type == YAML_MAPPING_END_EVENT)
            return 0;
        char name[NAME_BYTES_MAX + 1], value[VALUE_BYTES_MAX + 1];
        size_t line = reader->event.start_mark.line + 1;
        code = take_scalar(reader, "the name of a setting", name, sizeof name);
        if (code < 0)
            return code;
        const struct knob *knob = find_knob(name, reader->failure, &code);
        if (knob == NULL)
            return code;
        if (seen[knob - knobs])
            return fail(reader->failure, ERR_INVALID, "settings, line %zu: %s is given twice", line,
                        knob->name);
        seen[knob - knobs] = true;
        code = next_event(reader);
        if (code < 0)
            return code;
        code = take_scalar(reader, "a number after the name of a setting", value, sizeof value);
        if (code < 0)
            return code;
        code = settings_set(settings, name, value, reader->failure);
        if (code < 0)
            return code;
    }
}

static int read_stream(struct yaml_reader *reader, struct settings *settings) {
    int code = next_event(reader);
    if (code < 0)
        return code;
    ASSERT(reader->event.type == YAML_STREAM_START_EVENT);
    code = next_event(reader);
    if (code < 0)
        return code;
    if (reader->event.type == YAML_STREAM_END_EVENT) /* empty, or comments only */
        return 0;
    code = next_event(reader);
    if (code < 0)
        return code;
    if (reader->event.type == YAML_MAPPING_START_EVENT) {
        code = read_mapping(reader, settings);
        if (code < 0)
            return code;
    } else if (reader->event.type != YAML_SCALAR_EVENT || reader->event.data.scalar.length != 0)
        return unexpected(reader, "a mapping of setting names to numbers");
    code = next_event(reader); /* the document's end */
    if (code == 0)
        code = next_event(reader);
    if (code < 0)
        return code;
    if (reader->event.type != YAML_STREAM_END_EVENT)
        return unexpected(reader, "one YAML document, found a second one");
    return 0;
}

int settings_parse_yaml(struct settings *self, const char *text, size_t size,
                        struct failure *failure) {
    if (size > YAML_BYTES_MAX)
        return fail(failure, ERR_TOO_LARGE,
                    "settings: expected at most %u bytes of YAML, found %zu", YAML_BYTES_MAX, size);
    struct yaml_reader reader = {.failure = failure};
    if (!yaml_parser_initialize(&reader.parser))
        return fail(failure, ERR_NO_MEMORY, "settings: no memory for a YAML parser");
    yaml_parser_set_input_string(&reader.parser, (const unsigned char *)text, size);
    struct settings changed = *self; /* all or nothing */
    int code = read_stream(&reader, &changed);
    yaml_event_delete(&reader.event);
    yaml_parser_delete(&reader.parser);
    if (code == 0)
        *self = changed;
    return code;
}

static uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

/* Keyed by the knob's name, so that a new knob does not change what an old seed gives the others.
 */
void settings_randomise(struct settings *self, uint64_t seed) {
    for (size_t k = 0; k < KNOBS; k++) {
        const struct knob *knob = &knobs[k];
        uint64_t hash = 0xcbf29ce484222325u;
        for (const char *letter = knob->name; *letter != 0; letter++)
            hash = (hash ^ (unsigned char)*letter) * 0x100000001b3u;
        uint64_t draw = mix(mix(seed) ^ hash);
        uint64_t span = knob->sim_max.whole - knob->sim_min.whole;
        struct number value;
        value.whole = span == UINT64_MAX ? draw : knob->sim_min.whole + draw % (span + 1);
        value.real = knob->sim_min.real +
                     (double)(draw >> 11) * 0x1p-53 * (knob->sim_max.real - knob->sim_min.real);
        store(self, knob, value);
    }
}

/* One line of help; the number of bytes as snprintf counts them. */
static size_t help_line(const struct knob *knob, char *ret, size_t capacity) {
    char option[NAME_BYTES_MAX + 8];
    snprintf(option, sizeof option, "--%s %s", knob->name, knob->type == KNOB_f64 ? "X" : "N");
    for (char *letter = option; *letter != 0; letter++)
        if (*letter == '_')
            *letter = '-';
    int bytes;
    if (knob->type == KNOB_f64)
        bytes = snprintf(ret, capacity, "  %-24s %s (default %g, %g to %g)\n", option, knob->why,
                         knob->initial.real, knob->min.real, knob->max.real);
    else
        bytes = snprintf(ret, capacity, "  %-24s %s (default %llu, %llu to %llu)\n", option,
                         knob->why, (unsigned long long)knob->initial.whole,
                         (unsigned long long)knob->min.whole, (unsigned long long)knob->max.whole);
    ASSERT(bytes > 0);
    return (size_t)bytes;
}

char *settings_help(void) {
    size_t bytes = 1;
    for (size_t k = 0; k < KNOBS; k++)
        bytes += help_line(&knobs[k], NULL, 0);
    char *text = malloc(bytes);
    if (text == NULL)
        return NULL;
    size_t at = 0;
    for (size_t k = 0; k < KNOBS; k++)
        at += help_line(&knobs[k], text + at, bytes - at);
    return text;
}

void settings_profile_name(const struct settings *self, const char *numerics,
                           char ret[PROFILE_NAME_BYTES]) {
    float gate_top_p = (float)self->gate_top_p; /* as the engines take it */
    int used = snprintf(ret, PROFILE_NAME_BYTES, "%.12s%s", numerics,
                        self->latent_fp8 != 0 ? "-kv8" : "");
    if (gate_top_p == 0)
        return;
    for (int digits = 1; digits <= 9;
         digits++) { /* the shortest that tells it from its neighbours */
        snprintf(ret + used, PROFILE_NAME_BYTES - (size_t)used, "-p%.*g", digits,
                 (double)gate_top_p);
        if (strtof(ret + used + 2, NULL) == gate_top_p)
            return;
    }
}
