/* The file that describes a cluster for simulator/cluster.h: one thing a line, in any order. */
#include "simulator/cluster.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LINE_BYTES 256
#define WORDS_MAX  24

#define SECOND UINT64_C(1000000000)

struct line {
    char *word[WORDS_MAX];
    uint32_t words;
};

static int read_number(const char *text, double low, double high, double *ret,
                       struct failure *failure) {
    char *end;
    double number = strtod(text, &end);
    if (end == text || *end != '\0' || !(number >= low && number <= high))
        return fail(failure, ERR_INVALID, "expected a number from %g to %g, found '%s'", low, high,
                    text);
    *ret = number;
    return 0;
}

static int read_count(const char *text, uint32_t low, uint32_t high, uint32_t *ret,
                      struct failure *failure) {
    double number = 0;
    int error = read_number(text, low, high, &number, failure);
    if (error == 0 && number != floor(number))
        error = fail(failure, ERR_INVALID, "expected a whole number, found '%s'", text);
    if (error == 0)
        *ret = (uint32_t)number;
    return error;
}

/* "90s", "1.5h"; units ms, s, m, h. */
static int read_time(const char *text, uint64_t *ret, struct failure *failure) {
    static const struct {
        const char *name;
        double ns;
    } units[] = {{"ms", 1e6}, {"s", 1e9}, {"m", 60e9}, {"h", 3600e9}};
    char *end;
    double number = strtod(text, &end);
    for (size_t i = 0; i < sizeof units / sizeof units[0]; i++)
        if (end != text && strcmp(end, units[i].name) == 0 && number >= 0 &&
            number * units[i].ns <= 1e17) {
            *ret = (uint64_t)(number * units[i].ns);
            return 0;
        }
    return fail(failure, ERR_INVALID, "expected a time such as 500ms, 30s, 10m or 24h, found '%s'",
                text);
}

/* processes N [hosts N] [copies N] [speed X] [load_mib_s X] */
static int read_group(struct cluster_task *ret, const struct line *line, struct failure *failure) {
    struct cluster_group group = {.hosts = 1, .speed = 1, .load_bytes_s = 1e9};
    if (ret->groups == CLUSTER_GROUPS_MAX)
        return fail(failure, ERR_INVALID, "at most %u lines of processes", CLUSTER_GROUPS_MAX);
    int error = line->words % 2 == 0
                    ? read_count(line->word[1], 1, CLUSTER_EXPERTS_MAX, &group.processes, failure)
                    : fail(failure, ERR_INVALID, "processes: expected a number, then words with "
                                                 "one value each");
    for (uint32_t i = 2; error == 0 && i + 1 < line->words; i += 2) {
        const char *name = line->word[i], *value = line->word[i + 1];
        double mib_s = 0;
        if (strcmp(name, "hosts") == 0)
            error = read_count(value, 1, group.processes, &group.hosts, failure);
        else if (strcmp(name, "copies") == 0)
            error = read_count(value, 1, LAYERS_MAX * EXPERTS_MAX, &group.copies, failure);
        else if (strcmp(name, "speed") == 0)
            error = read_number(value, 0.01, 100, &group.speed, failure);
        else if (strcmp(name, "load_mib_s") == 0)
            error = read_number(value, 0.001, 1e6, &mib_s, failure);
        else
            error = fail(failure, ERR_INVALID,
                         "processes: expected hosts, copies, speed or load_mib_s, found '%s'", name);
        if (mib_s > 0)
            group.load_bytes_s = mib_s * (1 << 20);
    }
    if (error == 0 && ret->processes + group.processes > CLUSTER_EXPERTS_MAX)
        error = fail(failure, ERR_INVALID, "expected at most %u expert processes, found %u",
                     CLUSTER_EXPERTS_MAX, ret->processes + group.processes);
    if (error < 0)
        return error;
    ret->group[ret->groups++] = group;
    ret->processes += group.processes;
    ret->hosts += group.hosts;
    return 0;
}

/* at TIME lose N [for TIME] | drain N | slow N to X [for TIME] */
static int read_change(struct cluster_task *ret, const struct line *line, struct failure *failure) {
    static const char *const names[] = {"lose", "slow", "drain"};
    struct cluster_change change = {.kind = CLUSTER_LOSE};
    uint32_t words = 4, kind = 0;
    int error = 0;
    if (ret->changes == CLUSTER_CHANGES_MAX)
        return fail(failure, ERR_INVALID, "at most %u lines beginning with at", CLUSTER_CHANGES_MAX);
    while (line->words >= 4 && kind < 3 && strcmp(line->word[2], names[kind]) != 0)
        kind++;
    if (line->words < 4 || kind == 3)
        return fail(failure, ERR_INVALID,
                    "expected 'at TIME lose|drain PROCESS' or 'at TIME slow PROCESS to SPEED'");
    change.kind = (enum cluster_change_kind)kind;
    error = read_time(line->word[1], &change.at_ns, failure);
    if (error == 0)
        error = read_count(line->word[3], 0, CLUSTER_EXPERTS_MAX - 1, &change.process, failure);
    if (error == 0 && change.kind == CLUSTER_SLOW) {
        words = 6;
        error = line->words >= 6 && strcmp(line->word[4], "to") == 0
                    ? read_number(line->word[5], 0.01, 100, &change.speed, failure)
                    : fail(failure, ERR_INVALID, "expected 'at TIME slow PROCESS to SPEED'");
    }
    if (error == 0 && line->words == words + 2 && strcmp(line->word[words], "for") == 0 &&
        change.kind != CLUSTER_DRAIN)
        error = read_time(line->word[words + 1], &change.for_ns, failure);
    else if (error == 0 && line->words != words)
        error = fail(failure, ERR_INVALID, "unexpected '%s'", line->word[words]);
    if (error == 0)
        ret->change[ret->changes++] = change;
    return error;
}

static int read_value(struct cluster_task *ret, const char *name, const char *value,
                      struct failure *failure) {
    double number = 0;
    int error;
    if (strcmp(name, "span") == 0)
        return read_time(value, &ret->span_ns, failure);
    if (strcmp(name, "attention") == 0)
        return read_count(value, 1, 256, &ret->attention, failure);
    if (strcmp(name, "experts_per_token") == 0)
        return read_count(value, 1, EXPERTS_PER_TOKEN_MAX, &ret->experts_per_token, failure);
    if (strcmp(name, "tokens_per_second") == 0)
        return read_number(value, 1, 1e12, &ret->tokens_s, failure);
    if (strcmp(name, "slowdown") == 0)
        return read_number(value, 0, 0.99, &ret->slowdown, failure);
    if (strcmp(name, "row_us") == 0) {
        error = read_number(value, 1e-6, 1e6, &number, failure);
        ret->row_ns = number * 1e3;
        return error;
    }
    if (strcmp(name, "expert_mib") == 0) {
        error = read_number(value, 0.001, 65536, &number, failure);
        ret->expert_bytes = (uint64_t)(number * (1 << 20));
        return error;
    }
    return fail(failure, ERR_INVALID,
                "expected processes, at, knob, span, attention, experts_per_token, "
                "tokens_per_second, slowdown, row_us or expert_mib, found '%s'",
                name);
}

static int read_line(struct cluster_task *ret, char *text, struct failure *failure) {
    struct line line = {.words = 0};
    char *rest = NULL;
    for (char *word = strtok_r(text, " \t\r", &rest); word != NULL;
         word = strtok_r(NULL, " \t\r", &rest)) {
        if (line.words == WORDS_MAX)
            return fail(failure, ERR_INVALID, "more than %u words", WORDS_MAX);
        line.word[line.words++] = word;
    }
    if (line.words == 0)
        return 0;
    if (strcmp(line.word[0], "processes") == 0)
        return read_group(ret, &line, failure);
    if (strcmp(line.word[0], "at") == 0)
        return read_change(ret, &line, failure);
    if (strcmp(line.word[0], "knob") == 0)
        return line.words == 3
                   ? settings_set(&ret->settings, line.word[1], line.word[2], failure)
                   : fail(failure, ERR_INVALID, "expected 'knob NAME VALUE'");
    if (line.words != 2)
        return fail(failure, ERR_INVALID, "%s: expected one value, found %u", line.word[0],
                    line.words - 1);
    return read_value(ret, line.word[0], line.word[1], failure);
}

static void set_defaults(struct cluster_task *ret) {
    memset(ret, 0, sizeof *ret);
    ret->attention = 1;
    ret->experts_per_token = 8;
    ret->span_ns = 24 * 3600 * SECOND;
    ret->expert_bytes = UINT64_C(42) << 20;
    ret->row_ns = 1000;
    ret->slowdown = 0.1;
    ret->tokens_s = 10000;
    settings_default(&ret->settings);
    ret->settings.heartbeat_ms = 10000; /* a day at a heartbeat each 200 ms would be looked at for long */
    ret->settings.heartbeat_misses = 3;
}

int cluster_parse(struct cluster_task *ret, const char *text, size_t size, struct failure *failure) {
    struct cluster_task task;
    uint32_t number = 0;
    set_defaults(&task);
    for (size_t at = 0; at < size;) {
        const char *newline = memchr(text + at, '\n', size - at);
        size_t length = newline != NULL ? (size_t)(newline - text) - at : size - at;
        char line[LINE_BYTES];
        struct failure why = {0};
        number++;
        if (length >= sizeof line)
            return fail(failure, ERR_INVALID, "line %u is longer than %zu characters", number,
                        sizeof line - 1);
        memcpy(line, text + at, length);
        line[length] = '\0';
        line[strcspn(line, "#")] = '\0';
        if (read_line(&task, line, &why) < 0)
            return fail(failure, why.code, "line %u: %s", number, why.text);
        at += length + 1;
    }
    if (task.processes == 0)
        return fail(failure, ERR_INVALID, "expected a line such as 'processes 320 hosts 40'");
    if (task.span_ns == 0)
        return fail(failure, ERR_INVALID, "span: expected more than 0");
    for (uint32_t i = 0; i < task.changes; i++)
        if (task.change[i].process >= task.processes)
            return fail(failure, ERR_INVALID, "at: there is no process %u, only 0 to %u",
                        task.change[i].process, task.processes - 1);
    *ret = task;
    return 0;
}
