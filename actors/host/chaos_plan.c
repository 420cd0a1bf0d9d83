/* See chaos_plan.h. */
#include "actors/host/chaos_plan.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "simulator/random.h"

#define WORDS_MAX 16
#define TEN_MINUTES_NS 600000000000u

static const char *const kinds[FAULT_KINDS] = {
    "kill",    "restart",   "stop",       "slow", "delay", "drop", "duplicate",
    "corrupt", "partition", "disk-error", "oom",  "lie",
};

const char *fault_kind_name(enum fault_kind kind) {
    return kinds[kind];
}

static bool read_time(const char *word, uint64_t *ret) {
    char *end;
    double value = strtod(word, &end);
    double unit = strcmp(end, "ms") == 0 ? 1e6 : strcmp(end, "s") == 0 ? 1e9 : 0;
    if (end == word || unit == 0 || !(value >= 0 && value * unit <= 1e15))
        return false;
    *ret = (uint64_t)(value * unit);
    return true;
}

static bool read_number(const char *word, uint64_t max, uint64_t *ret) {
    char *end;
    unsigned long long value = strtoull(word, &end, 10);
    if (end == word || *end != 0 || word[0] == '-' || value > max)
        return false;
    *ret = value;
    return true;
}

static bool read_role(const char *word, enum role *ret) {
    for (int role = ROLE_COORDINATOR; role <= ROLE_SAMPLER; role++)
        if (strcmp(word, role_name((enum role)role)) == 0) {
            *ret = (enum role)role;
            return true;
        }
    return false;
}

/* KIND ROLE [RANK|all] and pairs of words. */
static bool read_fault(struct fault *ret, char **word, int words) {
    uint64_t number;
    if (words < 2 || !read_role(word[1], &ret->role))
        return false;
    for (ret->kind = 0; strcmp(kinds[ret->kind], word[0]) != 0;)
        if (++ret->kind == FAULT_KINDS)
            return false;
    int at = 2;
    ret->rank = RANK_ANY;
    if (at < words && strcmp(word[at], "all") == 0) {
        ret->rank = RANK_ALL;
        at++;
    } else if (at < words && read_number(word[at], 511, &number)) {
        ret->rank = (uint32_t)number;
        at++;
    }
    for (; at < words; at += 2) {
        bool known = at + 1 < words;
        if (known && strcmp(word[at], "for") == 0)
            known = read_time(word[at + 1], &ret->for_ns);
        else if (known && strcmp(word[at], "by") == 0)
            known = read_time(word[at + 1], &ret->by_ns);
        else if (known && strcmp(word[at], "layer") == 0 && read_number(word[at + 1], 1024, &number))
            ret->layer = (uint32_t)number;
        else if (known && strcmp(word[at], "share") == 0)
            known = sscanf(word[at + 1], "%lf", &ret->share) == 1 && ret->share >= 0 && ret->share <= 1;
        else
            known = false;
        if (!known)
            return false;
    }
    return true;
}

static bool read_every(struct chaos_plan *self, char **word, int words) {
    enum role role;
    if (words < 3 || !read_time(word[1], &self->every_ns) || self->every_ns < 10000000u ||
        strcmp(word[2], "random") != 0)
        return false;
    for (int i = 3; i < words; i++) {
        if (!read_role(word[i], &role))
            return false;
        self->random_roles |= 1u << role;
    }
    return true;
}

static bool read_statement(struct chaos_plan *self, char **word, int words) {
    uint64_t number = 0;
    bool one = words == 2 && read_number(word[1], 100000, &number) && number > 0;
    if (strcmp(word[0], "streams") == 0 && one && number <= 1024)
        self->streams = (uint32_t)number;
    else if (strcmp(word[0], "tokens") == 0 && one)
        self->tokens = (uint32_t)number;
    else if (strcmp(word[0], "experts") == 0 && one && number <= 64)
        self->experts = number;
    else if (strcmp(word[0], "attention") == 0 && one && number <= 64)
        self->attention = number;
    else if (strcmp(word[0], "samplers") == 0 && one && number <= 64)
        self->samplers = number;
    else if (strcmp(word[0], "for") == 0 && words == 2)
        return read_time(word[1], &self->for_ns);
    else if (strcmp(word[0], "window") == 0 && words == 2)
        return read_time(word[1], &self->window_ns);
    else if (strcmp(word[0], "every") == 0)
        return read_every(self, word, words);
    else if (strcmp(word[0], "knob") == 0 && words == 3 && self->knobs < PLAN_KNOBS_MAX &&
             strlen(word[1]) < 64 && strlen(word[2]) < 64) {
        strcpy(self->knob[self->knobs][0], word[1]);
        strcpy(self->knob[self->knobs++][1], word[2]);
    } else if (strcmp(word[0], "at") == 0 && words >= 4 && self->faults < PLAN_FAULTS_MAX) {
        struct fault *fault = &self->fault[self->faults];
        *fault = (struct fault){.layer = UINT32_MAX, .share = 1};
        if (!read_time(word[1], &fault->at_ns) || !read_fault(fault, word + 2, words - 2))
            return false;
        self->faults++;
    } else {
        return false;
    }
    return true;
}

int chaos_plan_parse(struct chaos_plan *ret, const char *text, size_t size, struct failure *failure) {
    char *copy = strndup(text, size), *lines = NULL;
    int error = 0, number = 0;
    memset(ret, 0, sizeof *ret);
    ret->streams = 16;
    ret->tokens = 96;
    ret->experts = 4;
    ret->attention = ret->samplers = 1;
    ret->for_ns = 10000000000u;
    ret->window_ns = 2000000000u;
    for (char *next = copy, *line; error == 0 && (line = strsep(&next, "\n")) != NULL;) {
        char *word[WORDS_MAX], shown[80];
        int words = 0;
        number++;
        snprintf(shown, sizeof shown, "%s", line);
        line[strcspn(line, "#")] = 0;
        for (char *at = strtok_r(line, " \t\r", &lines); at != NULL && words < WORDS_MAX;
             at = strtok_r(NULL, " \t\r", &lines))
            word[words++] = at;
        if (words > 0 && !read_statement(ret, word, words))
            error = fail(failure, ERR_INVALID, "line %d of the plan: '%s' is no statement (see docs/faults.md)",
                         number, shown);
    }
    free(copy);
    if (error == 0 && ret->for_ns > 10 * (uint64_t)TEN_MINUTES_NS)
        error = fail(failure, ERR_INVALID, "a plan lasts at most 100 minutes");
    return error;
}

static int by_time(const void *a, const void *b) {
    const struct fault *left = a, *right = b;
    return left->at_ns < right->at_ns ? -1 : left->at_ns > right->at_ns;
}

static void draw_random(struct chaos_plan *self, struct random *random) {
    static const enum fault_kind choice[] = {FAULT_KILL, FAULT_KILL, FAULT_KILL, FAULT_STOP, FAULT_RESTART};
    uint64_t last = self->for_ns > self->window_ns ? self->for_ns - self->window_ns : 0;
    for (uint64_t at = self->every_ns; at <= last && self->faults < PLAN_FAULTS_MAX;
         at += random_between(random, self->every_ns / 2, self->every_ns * 3 / 2)) {
        struct fault *fault = &self->fault[self->faults++];
        *fault = (struct fault){.at_ns = at, .rank = RANK_ANY, .layer = UINT32_MAX, .share = 1};
        do
            fault->role = (enum role)random_between(random, ROLE_COORDINATOR, ROLE_SAMPLER);
        while (self->random_roles != 0 && (self->random_roles & (1u << fault->role)) == 0);
        fault->kind = choice[random_between(random, 0, sizeof choice / sizeof *choice - 1)];
        if (fault->role == ROLE_COORDINATOR && fault->kind == FAULT_RESTART)
            fault->kind = FAULT_KILL; /* in order, it would end the troupe */
        fault->for_ns = fault->kind == FAULT_STOP ? random_between(random, 50, 1500) * 1000000u : 0;
    }
}

void chaos_plan_draw(struct chaos_plan *self, uint64_t seed) {
    struct random random = {seed};
    if (self->every_ns > 0)
        draw_random(self, &random);
    for (uint32_t i = 0; i < self->faults; i++) {
        struct fault *fault = &self->fault[i];
        uint64_t count = fault->role == ROLE_EXPERT      ? self->experts
                         : fault->role == ROLE_ATTENTION ? self->attention
                         : fault->role == ROLE_SAMPLER   ? self->samplers
                                                         : 1;
        if (fault->rank == RANK_ANY)
            fault->rank = (uint32_t)random_between(&random, 0, count - 1);
    }
    qsort(self->fault, self->faults, sizeof *self->fault, by_time);
}

const char *fault_text(const struct fault *fault) {
    static char text[96];
    bool numbered = fault->role >= ROLE_ATTENTION;
    int used = snprintf(text, sizeof text, "%s %s", kinds[fault->kind], role_name(fault->role));
    if (numbered && fault->rank == RANK_ALL)
        used += snprintf(text + used, sizeof text - (size_t)used, " all");
    else if (numbered)
        used += snprintf(text + used, sizeof text - (size_t)used, " %u", fault->rank);
    if (fault->for_ns > 0)
        used += snprintf(text + used, sizeof text - (size_t)used, " for %g s", (double)fault->for_ns / 1e9);
    if (fault->kind >= FAULT_DELAY && fault->share < 1)
        snprintf(text + used, sizeof text - (size_t)used, " share %g", fault->share);
    return text;
}
