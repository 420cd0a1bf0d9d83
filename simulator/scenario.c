/* Scenarios: drawn, read, printed. See scenario.h. */
#include "simulator/scenario.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define US UINT64_C(1000)
#define MS UINT64_C(1000000)

/* ---- drawing ---- */

struct writer {
    char *at;
    size_t room;
};

__attribute__((format(printf, 2, 3))) static void put(struct writer *self, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    int size = vsnprintf(self->at, self->room, format, arguments);
    va_end(arguments);
    ASSERT(size >= 0 && (size_t)size < self->room);
    self->at += size;
    self->room -= (size_t)size;
}

static void draw_sampling(struct writer *body, struct random *random) {
    if (random_chance(random, 0.7)) {
        put(body, ",\"temperature\":0.%llu,\"seed\":%llu",
            (unsigned long long)random_between(random, 5, 9),
            (unsigned long long)random_between(random, 1, 1000000));
        if (random_chance(random, 0.5))
            put(body, ",\"top_p\":0.9");
        if (random_chance(random, 0.3))
            put(body, ",\"top_k\":40");
    } else {
        put(body, ",\"temperature\":0");
    }
    if (random_chance(random, 0.3))
        put(body, ",\"frequency_penalty\":0.5,\"presence_penalty\":0.25");
    if (random_chance(random, 0.2))
        put(body, ",\"repetition_penalty\":1.1");
}

/* Some requests begin alike, so that their pages are shared. From a sequence of its own: the rest of a
 * scenario stays what it is. */
static void draw_beginning(struct writer *body, uint64_t seed, bool tight, struct random *random) {
    if (!random_chance(random, tight ? 0.9 : 0.4))
        return;
    uint32_t tokens = (uint32_t)random_between(random, 60, 140);
    struct random same = {seed ^ 0x626567696eu};
    for (uint32_t i = 0; i < tokens; i++)
        put(body, "%llu,", (unsigned long long)random_between(&same, 5, 319));
}

static void draw_request(struct scenario_request *ret, uint64_t until_ns, uint64_t seed, bool tight,
                         struct random *beginning, struct random *random) {
    struct writer body = {ret->body, sizeof ret->body};
    uint32_t prompt = (uint32_t)random_between(random, 1, random_chance(random, 0.3) ? 90 : 12);
    ret->arrives_ns = random_between(random, 0, until_ns);
    ret->choices = random_chance(random, 0.15) ? 2 : 1;
    ret->stream = random_chance(random, 0.8);
    put(&body, "{\"model\":\"tiny\",\"prompt\":[");
    bool some_priority = random_chance(beginning, 0.3);
    draw_beginning(&body, seed, tight, beginning);
    for (uint32_t i = 0; i < prompt; i++)
        put(&body, "%s%llu", i > 0 ? "," : "", (unsigned long long)random_between(random, 5, 319));
    put(&body, "],\"max_tokens\":%llu,\"n\":%u,\"stream\":%s,\"return_token_ids\":true",
        (unsigned long long)random_between(random, 1, 16), ret->choices,
        ret->stream ? "true" : "false");
    if (random_chance(random, 0.8))
        put(&body, ",\"ignore_eos\":true");
    if (random_chance(random, 0.6)) {
        put(&body, ",\"logprobs\":%llu", (unsigned long long)random_between(random, 0, 3));
        if (random_chance(random, 0.3))
            put(&body, ",\"echo\":true");
    }
    draw_sampling(&body, random);
    if (some_priority)
        put(&body, ",\"priority\":%d", (int)random_between(beginning, 0, 4) - 2);
    put(&body, "}");
}

static void draw_network(struct scenario *ret, struct random *random) {
    ret->delay_min_ns = random_between(random, 0, 500) * US;
    ret->delay_max_ns =
        ret->delay_min_ns + random_between(random, 0, random_chance(random, 0.3) ? 20000 : 1000) * US;
    ret->frame_delay_min_ns = random_between(random, 0, 50) * US;
    ret->frame_delay_max_ns =
        ret->frame_delay_min_ns + random_between(random, 0, random_chance(random, 0.3) ? 2000 : 50) * US;
    if (random_chance(random, 0.4)) {
        ret->loss = (double)random_between(random, 0, 50) / 1000;
        ret->duplicate = (double)random_between(random, 0, 50) / 1000;
    }
    if (random_chance(random, 0.3))
        ret->frame_loss = (double)random_between(random, 0, 20) / 1000;
    ret->frames_find_any_life = random_chance(random, 0.5);
}

/* Apart from all other draws. Whoever lies must be outvoted: two others stay, even if one is lost for good. */
static void draw_audit(struct scenario *ret, const struct fault_field *field) {
    struct random mixed = {ret->seed ^ 0x6175646974u};
    struct random drawn = {random_next(&mixed)}, *random = &drawn;
    if (!random_chance(random, 0.35))
        return;
    ret->settings.audit_share = (double)random_between(random, 1, 99) / 100;
    if (ret->experts < 4 || random_chance(random, 0.2))
        return;
    ret->settings.audit_share = 1;
    faults_draw_lies(&ret->faults, field, random);
}

/* Apart from all other draws, too. */
static void draw_operations(struct scenario *ret, const struct fault_field *field) {
    struct random mixed = {ret->seed ^ 0x6f7065726174u};
    struct random drawn = {random_next(&mixed)};
    if (random_chance(&drawn, 0.4))
        faults_draw_operations(&ret->faults, field, &drawn);
}

/* Where weights come from: most often from files that all have; else every process has a host of its own, so that
 * others that hold an expert are nearer than the file; or the last processes have no file at all. */
static void draw_weights(struct scenario *ret, uint64_t seed) {
    struct random mixed = {seed ^ 0x7765696768747375u}, drawn = {random_next(&mixed)}, *random = &drawn;
    ret->apart = random_chance(random, 0.3);
    if (ret->experts > 1 && random_chance(random, 0.3))
        ret->fileless = (uint32_t)random_between(random, 1, ret->experts / 2);
    for (uint32_t i = 0; i < ret->faults.count; i++)
        if (ret->faults.list[i].for_ns == FOR_GOOD) /* who is lost may be the last to have a file */
            ret->fileless = 0;
    if (random_chance(random, 0.3))
        ret->settings.load_bytes_per_second = random_between(random, 300000, 10000000);
}

/* Likewise. */
static void draw_rolling(struct scenario *ret, const struct fault_field *field) {
    struct random mixed = {ret->seed ^ 0x726f6c6c696eu};
    struct random drawn = {random_next(&mixed)};
    if (random_chance(&drawn, 0.15))
        faults_draw_rolling(&ret->faults, field, &drawn);
}

void scenario_draw(struct scenario *ret, uint64_t seed) {
    struct random mixed = {seed ^ 0x74726f757065u}; /* neighbouring states would give one shifted sequence */
    struct random drawn = {random_next(&mixed)}, *random = &drawn;
    memset(ret, 0, sizeof *ret);
    ret->seed = seed;
    ret->model = (uint32_t)random_between(random, 0, 1);
    ret->f32 = random_chance(random, 0.1);
    ret->attention = (uint32_t)random_between(random, 1, 3);
    ret->experts = (uint32_t)random_between(random, 1, 6);
    ret->samplers = (uint32_t)random_between(random, 1, 3);
    settings_default(&ret->settings);
    settings_randomise(&ret->settings, random_next(random));
    ret->settings.max_logprobs = 20; /* what a request may ask for is not what is looked at here */
    ret->settings.max_choices = 8;
    if (ret->settings.max_sequences < 2)
        ret->settings.max_sequences = 2;
    draw_network(ret, random);
    ret->compute_ns = random_between(random, 2, 300) * US;
    ret->load_ns = random_between(random, 100, random_chance(random, 0.5) ? 2000 : 40000) * US;
    ret->restart_ns = random_between(random, 1, 100) * MS;
    uint64_t span_ns = random_between(random, 100, 1200) * MS;
    ret->requests = (uint32_t)random_between(random, 2, REQUESTS_DRAWN_MAX);
    struct random beginning = {seed ^ 0x707265666978u};
    bool tight = random_chance(&beginning, 0.3); /* pages run out */
    if (tight)
        ret->settings.kv_cache_tokens = (uint32_t)random_between(&beginning, 4, 6) * PAGE_TOKENS;
    for (uint32_t i = 0; i < ret->requests; i++)
        draw_request(&ret->request[i], tight ? span_ns / 16 : span_ns, seed, tight, &beginning, random);
    struct fault_field field = {ret->attention, ret->experts, ret->samplers, ret->requests, span_ns + 200 * MS};
    faults_draw(&ret->faults, &field, random);
    draw_audit(ret, &field);
    draw_operations(ret, &field);
    draw_rolling(ret, &field);
    faults_prepare(&ret->faults, seed);
    draw_weights(ret, seed);
}

void scenario_make_quiet(struct scenario *self) {
    self->attention = self->experts = self->samplers = 1;
    settings_default(&self->settings);
    self->settings.kv_cache_tokens = 4096;
    self->settings.prefix_cache = 0;
    self->settings.mtp_steps = 0;
    self->settings.batch_tokens = 128;
    self->settings.max_sequences = 32;
    self->settings.join_wait_ms = 100;
    self->settings.heartbeat_ms = 500;
    self->apart = false;
    self->fileless = 0;
    self->delay_min_ns = self->delay_max_ns = self->frame_delay_min_ns = self->frame_delay_max_ns = 0;
    self->loss = self->duplicate = self->frame_loss = 0;
    self->compute_ns = self->load_ns = 1000;
    self->faults.count = 0;
}

uint64_t scenario_calm_ns(const struct scenario *self) {
    uint64_t calm_ns = 0;
    for (uint32_t i = 0; i < self->faults.count; i++) {
        const struct fault *fault = &self->faults.list[i];
        uint64_t end_ns = fault->at_ns + (fault->for_ns == FOR_GOOD ? 0 : fault->for_ns);
        calm_ns = end_ns > calm_ns ? end_ns : calm_ns;
    }
    return calm_ns;
}

/* ---- reading ---- */

static int read_count(const char *value, uint32_t max, uint32_t *ret, struct failure *failure) {
    char *end;
    unsigned long number = strtoul(value, &end, 10);
    if (end == value || *end != '\0' || number < 1 || number > max)
        return fail(failure, ERR_INVALID, "expected a number from 1 to %u, found '%s'", max, value);
    *ret = (uint32_t)number;
    return 0;
}

static int read_knob(struct scenario *ret, const char *value, struct failure *failure) {
    char name[64], number[64];
    if (sscanf(value, "%63s %63s", name, number) != 2)
        return fail(failure, ERR_INVALID, "expected 'knob NAME NUMBER', found 'knob %s'", value);
    return settings_set(&ret->settings, name, number, failure);
}

static int read_fault(struct scenario *ret, const char *line, bool *faults_given, struct failure *failure) {
    if (!*faults_given)
        ret->faults.count = 0;
    *faults_given = true;
    if (ret->faults.count == FAULTS_MAX)
        return fail(failure, ERR_INVALID, "at most %u faults", FAULTS_MAX);
    return fault_parse(&ret->faults.list[ret->faults.count++], line, failure);
}

/* What is not printed from what it came to is printed as it was said. */
static int keep_line(struct scenario *ret, const char *line, struct failure *failure) {
    size_t used = strlen(ret->given), length = strlen(line);
    if (used + length + 2 > sizeof ret->given)
        return fail(failure, ERR_INVALID, "expected at most %zu characters of knobs, found more", sizeof ret->given - 1);
    memcpy(ret->given + used, line, length);
    memcpy(ret->given + used + length, "\n", 2);
    return 0;
}

static int read_line(struct scenario *ret, char *line, bool *faults_given, struct failure *failure) {
    char word[16] = "";
    int length = 0;
    sscanf(line, "%15s %n", word, &length);
    const char *value = line + length;
    if (strcmp(word, "seed") == 0) {
        char *end;
        unsigned long long seed = strtoull(value, &end, 10);
        if (end == value || *end != '\0')
            return fail(failure, ERR_INVALID, "expected 'seed NUMBER', found 'seed %s'", value);
        scenario_draw(ret, seed);
        return 0;
    }
    if (strcmp(word, "attention") == 0)
        return read_count(value, 16, &ret->attention, failure);
    if (strcmp(word, "experts") == 0)
        return read_count(value, 64, &ret->experts, failure);
    if (strcmp(word, "samplers") == 0)
        return read_count(value, 16, &ret->samplers, failure);
    if (strcmp(word, "fileless") == 0)
        return read_count(value, 63, &ret->fileless, failure);
    if (strcmp(line, "all files") == 0) {
        ret->fileless = 0;
        ret->apart = false;
        return 0;
    }
    if (strcmp(line, "apart") == 0) {
        ret->apart = true;
        return 0;
    }
    if (strcmp(word, "requests") == 0) {
        int result = read_count(value, ret->requests, &ret->requests, failure);
        return result < 0 ? result : keep_line(ret, line, failure);
    }
    if (strcmp(word, "knob") == 0) {
        int result = read_knob(ret, value, failure);
        return result < 0 ? result : keep_line(ret, line, failure);
    }
    if (strcmp(word, "at") == 0)
        return read_fault(ret, line, faults_given, failure);
    if (strcmp(line, "no faults") == 0) {
        *faults_given = true;
        ret->faults.count = 0;
        return 0;
    }
    if (strcmp(line, "network quiet") == 0) {
        ret->delay_min_ns = ret->delay_max_ns = 100 * US;
        ret->frame_delay_min_ns = ret->frame_delay_max_ns = 20 * US;
        ret->loss = ret->duplicate = ret->frame_loss = 0;
        return keep_line(ret, line, failure);
    }
    return fail(failure, ERR_INVALID,
                "expected seed, attention, experts, samplers, fileless, apart, 'all files', requests, "
                "knob, 'network quiet', 'no faults' or at, found '%s'",
                line);
}

int scenario_parse(struct scenario *ret, const char *text, size_t size, struct failure *failure) {
    bool faults_given = false;
    uint32_t number = 0;
    scenario_draw(ret, 1);
    for (size_t at = 0; at < size;) {
        const char *newline = memchr(text + at, '\n', size - at);
        size_t length = newline != NULL ? (size_t)(newline - text) - at : size - at;
        char line[2 * FAULT_LINE_BYTES];
        number++;
        if (length >= sizeof line)
            return fail(failure, ERR_INVALID, "line %u is longer than %zu characters", number,
                        sizeof line - 1);
        memcpy(line, text + at, length);
        line[length] = '\0';
        line[strcspn(line, "#\r")] = '\0';
        size_t end = strlen(line), begin = strspn(line, " \t");
        while (end > begin && (line[end - 1] == ' ' || line[end - 1] == '\t'))
            line[--end] = '\0';
        struct failure why = {0};
        if (begin < end && read_line(ret, line + begin, &faults_given, &why) < 0)
            return fail(failure, why.code, "line %u: %s", number, why.text);
        at += length + 1;
    }
    faults_prepare(&ret->faults, ret->seed);
    return 0;
}

/* ---- printing ---- */

void scenario_print(const struct scenario *self, char ret[SCENARIO_TEXT_BYTES]) {
    struct writer out = {ret, SCENARIO_TEXT_BYTES};
    put(&out, "seed %llu\n", (unsigned long long)self->seed);
    put(&out, "attention %u\nexperts %u\nsamplers %u\n", self->attention, self->experts, self->samplers);
    put(&out, self->fileless > 0 || self->apart ? "" : "all files\n");
    if (self->fileless > 0)
        put(&out, "fileless %u\n", self->fileless);
    if (self->apart)
        put(&out, "apart\n");
    put(&out, "%s", self->given);
    put(&out, "# model %u in %s, %u requests, heartbeat %u ms x %u, row deadline %u ms, poll %u ms\n",
        self->model, self->f32 ? "f32" : "bf16", self->requests, self->settings.heartbeat_ms,
        self->settings.heartbeat_misses, self->settings.row_deadline_ms, self->settings.poll_ms);
    put(&out, "# replicas %u, audit share %g\n", self->settings.replicas, self->settings.audit_share);
    put(&out, "# messages %llu to %llu us, lost %g, doubled %g; frames %llu to %llu us, lost %g\n",
        (unsigned long long)(self->delay_min_ns / US), (unsigned long long)(self->delay_max_ns / US),
        self->loss, self->duplicate, (unsigned long long)(self->frame_delay_min_ns / US),
        (unsigned long long)(self->frame_delay_max_ns / US), self->frame_loss);
    if (self->faults.count == 0)
        put(&out, "no faults\n");
    for (uint32_t i = 0; i < self->faults.count; i++) {
        char line[FAULT_LINE_BYTES];
        fault_print(&self->faults.list[i], line);
        put(&out, "%s\n", line);
    }
}
