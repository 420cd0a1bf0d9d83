/* Fault schedules: drawn, printed, read. See faults.h for the lines. */
#include "simulator/faults.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define US 1000u
#define MS UINT64_C(1000000)

enum about { ABOUT_PROCESS, ABOUT_LINK, ABOUT_CLIENT, ABOUT_PAIR, ABOUT_ALL };

static const struct kind {
    const char *name;
    enum about about;
    bool lasts, share;
} KINDS[FAULT_KINDS] = {
    [FAULT_CRASH] = {"crash", ABOUT_PROCESS, true, false},
    [FAULT_PAUSE] = {"pause", ABOUT_PROCESS, true, false},
    [FAULT_SLOW] = {"slow", ABOUT_PROCESS, true, false},
    [FAULT_DELAY] = {"delay", ABOUT_LINK, true, false},
    [FAULT_DROP] = {"drop", ABOUT_LINK, true, true},
    [FAULT_DUPLICATE] = {"duplicate", ABOUT_LINK, true, true},
    [FAULT_CORRUPT] = {"corrupt", ABOUT_LINK, true, true},
    [FAULT_PARTITION] = {"partition", ABOUT_LINK, true, false},
    [FAULT_CLOG] = {"clog", ABOUT_LINK, true, false},
    [FAULT_DISK_ERROR] = {"disk-error", ABOUT_PROCESS, true, false},
    [FAULT_SHORT_READ] = {"short-read", ABOUT_PROCESS, true, false},
    [FAULT_NO_MEMORY] = {"no-memory", ABOUT_PROCESS, true, false},
    [FAULT_HANG_UP] = {"hang-up", ABOUT_CLIENT, false, false},
    [FAULT_LIE] = {"lie", ABOUT_PROCESS, true, true},
    [FAULT_DRAIN] = {"drain", ABOUT_PROCESS, false, false},
    [FAULT_REBALANCE] = {"rebalance", ABOUT_ALL, false, false},
    [FAULT_REPLICATE] = {"replicate", ABOUT_PAIR, false, false},
    [FAULT_MOVE] = {"move", ABOUT_PAIR, false, false},
};

const char *fault_name(enum fault_kind kind) {
    return KINDS[kind].name;
}

uint32_t faults_count(const struct faults *self, uint32_t ret_kind[FAULT_KINDS]) {
    uint32_t faults = 0;
    memset(ret_kind, 0, FAULT_KINDS * sizeof *ret_kind);
    for (uint32_t i = 0; i < self->count; i++) {
        ret_kind[self->list[i].kind]++;
        faults += self->list[i].kind < FAULT_DRAIN;
    }
    return faults;
}

bool place_matches(struct place wanted, struct place is) {
    return wanted.role == ROLE_NONE || (wanted.role == is.role && wanted.index == is.index);
}

bool fault_is_on_link(const struct fault *fault, struct place from, struct place to, bool data) {
    return KINDS[fault->kind].about == ABOUT_LINK && place_matches(fault->from, from) &&
           place_matches(fault->to, to) &&
           (fault->traffic == TRAFFIC_ALL || (fault->traffic == TRAFFIC_DATA) == data);
}

/* ---- printing ---- */

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

/* In the largest unit that shows it exactly. */
static void put_time(struct writer *self, uint64_t ns) {
    if (ns % MS == 0)
        put(self, "%llums", (unsigned long long)(ns / MS));
    else if (ns % US == 0)
        put(self, "%lluus", (unsigned long long)(ns / US));
    else
        put(self, "%lluns", (unsigned long long)ns);
}

static void put_place(struct writer *self, const char *word, struct place place) {
    if (place.role != ROLE_NONE)
        put(self, "%s %s %u", word, role_name(place.role), place.index);
}

void fault_print(const struct fault *fault, char ret[FAULT_LINE_BYTES]) {
    const struct kind *kind = &KINDS[fault->kind];
    struct writer writer = {ret, FAULT_LINE_BYTES};
    put(&writer, "at ");
    put_time(&writer, fault->at_ns);
    put(&writer, " %s", kind->name);
    if (kind->about == ABOUT_PROCESS)
        put_place(&writer, "", fault->from);
    if (kind->about == ABOUT_CLIENT)
        put(&writer, " client %u", fault->client);
    if (kind->about == ABOUT_PAIR)
        put(&writer, " pair %u %u", fault->layer, fault->expert);
    if (kind->about == ABOUT_LINK && fault->traffic != TRAFFIC_ALL)
        put(&writer, " %s", fault->traffic == TRAFFIC_DATA ? "data" : "control");
    if (kind->about == ABOUT_LINK || kind->about == ABOUT_PAIR) {
        put_place(&writer, " from", fault->from);
        put_place(&writer, " to", fault->to);
    }
    if (kind->lasts && fault->for_ns == FOR_GOOD) {
        put(&writer, " for good");
    } else if (kind->lasts) {
        put(&writer, " for ");
        put_time(&writer, fault->for_ns);
    }
    if (kind->share)
        put(&writer, " share %u.%03u", fault->share_permille / 1000, fault->share_permille % 1000);
    if (fault->kind == FAULT_SLOW)
        put(&writer, " by %llu", (unsigned long long)fault->amount);
    if (fault->kind == FAULT_DELAY) {
        put(&writer, " by ");
        put_time(&writer, fault->amount);
    }
    if (fault->silent)
        put(&writer, " silent");
    if (fault->steady)
        put(&writer, " steady");
}

/* ---- reading ---- */

#define WORDS_MAX 24

struct reader {
    char text[FAULT_LINE_BYTES];
    char *word[WORDS_MAX];
    uint32_t words, next;
    struct failure *failure;
};

static int split(struct reader *self, const char *line) {
    if (strlen(line) >= sizeof self->text)
        return fail(self->failure, ERR_INVALID, "a fault has at most %u characters, found %zu",
                    FAULT_LINE_BYTES - 1, strlen(line));
    strcpy(self->text, line);
    char *rest = NULL;
    for (char *word = strtok_r(self->text, " \t", &rest); word != NULL;
         word = strtok_r(NULL, " \t", &rest)) {
        if (self->words == WORDS_MAX)
            return fail(self->failure, ERR_INVALID, "a fault has at most %d words", WORDS_MAX);
        self->word[self->words++] = word;
    }
    return 0;
}

static const char *take(struct reader *self) {
    return self->next < self->words ? self->word[self->next++] : "";
}

static bool take_if(struct reader *self, const char *word) {
    if (self->next >= self->words || strcmp(self->word[self->next], word) != 0)
        return false;
    self->next++;
    return true;
}

static int take_number(struct reader *self, const char *what, double max, double *ret) {
    const char *word = take(self);
    char *end;
    double value = strtod(word, &end);
    if (end == word || *end != '\0' || !(value >= 0 && value <= max))
        return fail(self->failure, ERR_INVALID, "%s: expected a number from 0 to %g, found '%s'", what,
                    max, word);
    *ret = value;
    return 0;
}

static int take_time(struct reader *self, const char *what, uint64_t *ret_ns) {
    static const struct {
        const char *name;
        double ns;
    } UNITS[] = {{"ns", 1}, {"us", 1e3}, {"ms", 1e6}, {"s", 1e9}};
    const char *word = take(self);
    char *end;
    double value = strtod(word, &end);
    for (size_t i = 0; end != word && i < sizeof UNITS / sizeof *UNITS; i++)
        if (strcmp(end, UNITS[i].name) == 0 && value >= 0 && value * UNITS[i].ns < 1e15) {
            *ret_ns = (uint64_t)(value * UNITS[i].ns + 0.5);
            return 0;
        }
    return fail(self->failure, ERR_INVALID, "%s: expected a time such as 12.5ms, found '%s'", what,
                word);
}

static int take_place(struct reader *self, struct place *ret) {
    const char *name = take(self);
    double index = 0;
    for (enum role role = ROLE_COORDINATOR; role <= ROLE_SAMPLER; role++)
        if (strcmp(role_name(role), name) == 0) {
            int result = take_number(self, name, ACTORS_MAX, &index);
            *ret = (struct place){role, (uint32_t)index};
            return result;
        }
    return fail(self->failure, ERR_INVALID,
                "expected coordinator, gateway, attention, expert or sampler, found '%s'", name);
}

static int take_option(struct reader *self, struct fault *ret) {
    double number = 0;
    int result = 0;
    if (take_if(self, "for")) {
        if (ret->kind != FAULT_CRASH || !take_if(self, "good"))
            return take_time(self, "for", &ret->for_ns);
        ret->for_ns = FOR_GOOD;
        return 0;
    }
    if (take_if(self, "from"))
        return take_place(self, &ret->from);
    if (take_if(self, "to"))
        return take_place(self, &ret->to);
    if (take_if(self, "control") || take_if(self, "data")) {
        ret->traffic = strcmp(self->word[self->next - 1], "data") == 0 ? TRAFFIC_DATA : TRAFFIC_CONTROL;
        return 0;
    }
    if (take_if(self, "silent")) {
        ret->silent = true;
        return 0;
    }
    if (ret->kind == FAULT_LIE && take_if(self, "steady")) {
        ret->steady = true;
        return 0;
    }
    if (take_if(self, "share")) {
        result = take_number(self, "share", 1, &number);
        ret->share_permille = (uint32_t)(number * 1000 + 0.5);
        return result;
    }
    if (take_if(self, "by")) {
        if (ret->kind == FAULT_DELAY)
            return take_time(self, "by", &ret->amount);
        result = take_number(self, "by", 1e6, &number);
        ret->amount = (uint64_t)number;
        return result;
    }
    return fail(self->failure, ERR_INVALID, "did not expect '%s'", take(self));
}

static int read_words(struct reader *self, struct fault *ret) {
    if (!take_if(self, "at"))
        return fail(self->failure, ERR_INVALID, "expected 'at TIME ...', found '%s'", take(self));
    int result = take_time(self, "at", &ret->at_ns);
    if (result < 0)
        return result;
    const char *name = take(self);
    while (ret->kind < FAULT_KINDS && strcmp(KINDS[ret->kind].name, name) != 0)
        ret->kind++;
    if (ret->kind == FAULT_KINDS)
        return fail(self->failure, ERR_INVALID, "expected a fault such as crash or drop, found '%s'",
                    name);
    const struct kind *kind = &KINDS[ret->kind];
    double client = 0;
    if (kind->about == ABOUT_PROCESS)
        result = take_place(self, &ret->from);
    else if (kind->about == ABOUT_CLIENT)
        result = take_if(self, "client") ? take_number(self, "client", 1e6, &client)
                                         : fail(self->failure, ERR_INVALID, "expected 'client N'");
    ret->client = (uint32_t)client;
    double layer = 0, expert = 0;
    if (kind->about == ABOUT_PAIR) {
        result = take_if(self, "pair") ? take_number(self, "layer", LAYERS_MAX, &layer)
                                       : fail(self->failure, ERR_INVALID, "expected 'pair LAYER EXPERT'");
        if (result == 0)
            result = take_number(self, "expert", EXPERTS_MAX, &expert);
    }
    ret->layer = (uint32_t)layer;
    ret->expert = (uint32_t)expert;
    while (result == 0 && self->next < self->words)
        result = take_option(self, ret);
    if (result == 0 && kind->lasts && ret->for_ns == 0)
        return fail(self->failure, ERR_INVALID, "%s: expected 'for TIME'", name);
    if (result == 0 && kind->share && ret->share_permille == 0)
        return fail(self->failure, ERR_INVALID, "%s: expected 'share X' above 0", name);
    return result;
}

int fault_parse(struct fault *ret, const char *line, struct failure *failure) {
    struct reader reader = {.failure = failure};
    struct fault fault = {.amount = 10};
    int result = split(&reader, line);
    if (result == 0)
        result = read_words(&reader, &fault);
    if (result == 0)
        *ret = fault;
    return result;
}

/* ---- drawing ---- */

static struct place draw_place(const struct fault_field *field, struct random *random) {
    uint32_t all = field->attention + 2 * field->experts + field->samplers + 2;
    uint32_t at = (uint32_t)random_between(random, 0, all - 1);
    if (at < field->attention)
        return (struct place){ROLE_ATTENTION, at};
    at -= field->attention;
    if (at < 2 * field->experts) /* what is most of a troupe fails most */
        return (struct place){ROLE_EXPERT, at / 2};
    at -= 2 * field->experts;
    if (at < field->samplers)
        return (struct place){ROLE_SAMPLER, at};
    return (struct place){at == field->samplers ? ROLE_COORDINATOR : ROLE_GATEWAY, 0};
}

static uint64_t draw_time(struct random *random, uint64_t low_ns, uint64_t high_ns) {
    return random_between(random, low_ns / US, high_ns / US) * US;
}

static struct fault *add(struct faults *self, enum fault_kind kind, uint64_t at_ns) {
    ASSERT(self->count < FAULTS_MAX);
    struct fault *fault = &self->list[self->count++];
    *fault = (struct fault){.kind = kind, .at_ns = at_ns};
    return fault;
}

static void draw_link(struct fault *fault, const struct fault_field *field, struct random *random) {
    fault->traffic = (enum traffic)random_between(random, TRAFFIC_ALL, TRAFFIC_DATA);
    if (random_chance(random, 0.7))
        fault->from = draw_place(field, random);
    if (random_chance(random, 0.7))
        fault->to = draw_place(field, random);
    fault->share_permille = (uint32_t)random_between(random, 10, 400);
    if (fault->kind == FAULT_CORRUPT)
        fault->traffic = TRAFFIC_DATA;
    if (fault->kind == FAULT_DELAY)
        fault->amount = draw_time(random, 100 * US, 50 * MS);
}

static void draw_group(struct faults *self, const struct fault_field *field, uint64_t at_ns,
                       struct random *random) {
    uint32_t crashes = (uint32_t)random_between(random, 2, 3);
    bool loading = random_chance(random, 0.5); /* the others fall while the first one's work is given to them */
    for (uint32_t i = 0; i < crashes; i++) {
        struct fault *crash = add(self, FAULT_CRASH, at_ns);
        crash->from = draw_place(field, random);
        if (loading)
            crash->from = (struct place){ROLE_EXPERT, (uint32_t)random_between(random, 0, field->experts - 1)};
        crash->for_ns = draw_time(random, 1 * MS, 200 * MS);
        crash->silent = random_chance(random, 0.4);
        at_ns += loading ? draw_time(random, 1 * MS, 60 * MS) : draw_time(random, 0, 1 * MS);
    }
}

void faults_draw_operations(struct faults *ret, const struct fault_field *field, struct random *random) {
    for (uint64_t asked = random_between(random, 1, 5); asked > 0 && ret->count < FAULTS_MAX; asked--) {
        enum fault_kind kind = (enum fault_kind)random_between(random, FAULT_DRAIN, FAULT_MOVE);
        struct fault *fault = add(ret, kind, draw_time(random, 0, field->until_ns));
        fault->layer = (uint32_t)random_between(random, 0, 3);
        fault->expert = (uint32_t)random_between(random, 0, 7);
        if (kind == FAULT_DRAIN)
            fault->from = draw_place(field, random);
        if (kind == FAULT_MOVE)
            fault->from = (struct place){ROLE_EXPERT, (uint32_t)random_between(random, 0, field->experts - 1)};
        if (kind == FAULT_MOVE || kind == FAULT_REPLICATE)
            fault->to = (struct place){ROLE_EXPERT, (uint32_t)random_between(random, 0, field->experts - 1)};
    }
}

bool fault_request(const struct fault *fault, const char **ret_path, char ret_body[FAULT_BODY_BYTES]) {
    static const char *const PATHS[] = {"/drain", "/rebalance", "/replicate", "/move"};
    if (fault->kind < FAULT_DRAIN || fault->kind > FAULT_MOVE)
        return false;
    *ret_path = PATHS[fault->kind - FAULT_DRAIN];
    struct writer body = {ret_body, FAULT_BODY_BYTES};
    put(&body, "{");
    if (fault->kind == FAULT_DRAIN)
        put(&body, "\"actor\":\"%s-%u\"", role_name(fault->from.role), fault->from.index);
    if (fault->kind == FAULT_REPLICATE || fault->kind == FAULT_MOVE)
        put(&body, "\"layer\":%u,\"expert\":%u,\"to\":\"expert-%u\"", fault->layer, fault->expert, fault->to.index);
    if (fault->kind == FAULT_MOVE)
        put(&body, ",\"from\":\"expert-%u\"", fault->from.index);
    put(&body, "}");
    return true;
}

static void draw_one(struct faults *self, const struct fault_field *field, struct random *random) {
    static const enum fault_kind OFTEN[] = {FAULT_CRASH, FAULT_CRASH, FAULT_CRASH, FAULT_PAUSE};
    uint64_t at_ns = draw_time(random, 0, field->until_ns);
    uint32_t which = (uint32_t)random_between(random, 0, FAULT_LIE + 3);
    struct fault *fault = add(self, which < FAULT_LIE ? (enum fault_kind)which : OFTEN[which - FAULT_LIE], at_ns);
    fault->for_ns = draw_time(random, 1 * MS, random_chance(random, 0.2) ? 1500 * MS : 250 * MS);
    switch (KINDS[fault->kind].about) {
    case ABOUT_LINK:
        draw_link(fault, field, random);
        break;
    case ABOUT_CLIENT:
        fault->client = (uint32_t)random_between(random, 0, field->clients - 1);
        fault->for_ns = 0;
        break;
    case ABOUT_PAIR:
    case ABOUT_ALL:
        break; /* drawn apart */
    case ABOUT_PROCESS:
        fault->from = draw_place(field, random);
        if (fault->kind >= FAULT_DISK_ERROR && fault->kind <= FAULT_NO_MEMORY)
            fault->from = (struct place){ROLE_EXPERT, (uint32_t)random_between(random, 0, field->experts - 1)};
        break;
    }
    if (fault->kind == FAULT_SLOW)
        fault->amount = random_between(random, 2, 60);
    fault->silent = fault->kind == FAULT_CRASH && random_chance(random, 0.4);
}

/* One process of the role falls for good. */
static void draw_loss(struct faults *self, enum role role, uint32_t count, uint64_t until_ns,
                      struct random *random) {
    if (count < 2 || !random_chance(random, 0.1))
        return;
    struct fault *loss = add(self, FAULT_CRASH, draw_time(random, 0, until_ns));
    loss->from = (struct place){role, (uint32_t)random_between(random, 0, count - 1)};
    loss->for_ns = FOR_GOOD;
    loss->silent = random_chance(random, 0.4);
}

void faults_draw(struct faults *ret, const struct fault_field *field, struct random *random) {
    ret->count = 0;
    uint32_t wanted = (uint32_t)random_between(random, FAULTS_DRAWN_MIN, 14);
    if (field->experts > 1 && random_chance(random, 0.25)) {
        struct fault *late = add(ret, FAULT_CRASH, 0);
        late->from = (struct place){ROLE_EXPERT, (uint32_t)random_between(random, 0, field->experts - 1)};
        late->for_ns = draw_time(random, 1 * MS, field->until_ns);
    }
    draw_loss(ret, ROLE_EXPERT, field->experts, field->until_ns, random);
    draw_loss(ret, ROLE_ATTENTION, field->attention, field->until_ns, random);
    draw_loss(ret, ROLE_SAMPLER, field->samplers, field->until_ns, random);
    while (ret->count < wanted) {
        if (random_chance(random, 0.08))
            draw_group(ret, field, draw_time(random, 0, field->until_ns), random);
        else
            draw_one(ret, field, random);
    }
}

static void roll(struct faults *ret, enum role role, uint32_t count, uint64_t *at_ns, uint64_t pause_ns,
                 struct random *random) {
    for (uint32_t i = 0; i < count && ret->count < FAULTS_MAX; i++, *at_ns += pause_ns) {
        struct fault *end = add(ret, FAULT_CRASH, *at_ns);
        end->from = (struct place){role, i};
        end->for_ns = draw_time(random, 1 * MS, 50 * MS);
    }
}

void faults_draw_rolling(struct faults *ret, const struct fault_field *field, struct random *random) {
    const struct {
        enum role role;
        uint32_t count;
    } ROLES[] = {{ROLE_EXPERT, field->experts},  {ROLE_ATTENTION, field->attention}, {ROLE_SAMPLER, field->samplers},
                 {ROLE_GATEWAY, 1},              {ROLE_COORDINATOR, 1}};
    const uint32_t roles = sizeof ROLES / sizeof *ROLES;
    uint64_t at_ns = draw_time(random, 0, field->until_ns / 2);
    uint64_t pause_ns = draw_time(random, 5 * MS, 120 * MS); /* some end before the one before is back */
    uint32_t only = (uint32_t)random_between(random, 0, roles);
    for (uint32_t i = 0; i < roles; i++)
        if (only == roles || only == i)
            roll(ret, ROLES[i].role, ROLES[i].count, &at_ns, pause_ns, random);
}

void faults_draw_lies(struct faults *ret, const struct fault_field *field, struct random *random) {
    uint32_t liar = (uint32_t)random_between(random, 0, field->experts - 1);
    for (uint64_t lies = random_between(random, 1, 3); lies > 0 && ret->count < FAULTS_MAX; lies--) {
        struct fault *lie = add(ret, FAULT_LIE, draw_time(random, 0, field->until_ns));
        lie->from = (struct place){ROLE_EXPERT, liar};
        lie->for_ns = draw_time(random, 10 * MS, 600 * MS);
        lie->share_permille = (uint32_t)(random_chance(random, 0.5) ? random_between(random, 1, 20) : random_between(random, 100, 1000));
        lie->steady = random_chance(random, 0.4);
    }
}

void faults_prepare(struct faults *self, uint64_t seed) {
    for (uint32_t i = 1; i < self->count; i++) { /* stable: equal times keep their order */
        struct fault moved = self->list[i];
        uint32_t at = i;
        for (; at > 0 && self->list[at - 1].at_ns > moved.at_ns; at--)
            self->list[at] = self->list[at - 1];
        self->list[at] = moved;
    }
    for (uint32_t i = 0; i < self->count; i++) {
        struct fault *fault = &self->list[i];
        fault->random.state = seed ^ fault->at_ns * 31 ^ (uint64_t)fault->kind << 56;
    }
}
