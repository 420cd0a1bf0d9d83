/* See inject.h. A thread takes the rules and puts them into a table; the actor's thread looks at a count first, so that no rule
 * costs nothing but that. */
#include "actors/host/inject.h"

#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "actors/host/clock.h"
#include "actors/host/log.h"
#include "actors/host/thread.h"
#include "simulator/random.h"

#define RULES_MAX 32
#define RULE_BYTES 512
#define DELAY_DEFAULT_MS 20

struct rule {
    enum fault_kind kind;
    double share;
    uint64_t end_ns, by_ns;
    uint32_t layer;
    struct random random;
};

struct inject {
    struct bell *bell;
    pthread_t thread;
    int file;
    struct sockaddr_un address;
    atomic_uint rules; /* in use */
    pthread_mutex_t mutex; /* of the table */
    struct rule rule[RULES_MAX];
    struct held *held;
    uint64_t damaged, falsified; /* frames */
};

/* ---- rules ---- */

static bool parse_rule(struct rule *ret, const char *text) {
    char kind[32];
    double share;
    unsigned long long for_ms, by_ms, seed;
    unsigned layer;
    if (sscanf(text, "%31s share %lf for %llu by %llu layer %u seed %llu", kind, &share, &for_ms, &by_ms, &layer,
               &seed) != 6 ||
        !(share >= 0 && share <= 1) || for_ms > 86400000u || by_ms > 86400000u)
        return false;
    *ret = (struct rule){.share = share, .by_ns = by_ms * 1000000u, .layer = layer, .random = {seed}};
    ret->end_ns = for_ms == 0 ? NEVER : clock_now_ns() + for_ms * 1000000u;
    for (ret->kind = 0; ret->kind < FAULT_KINDS; ret->kind++)
        if (strcmp(fault_kind_name(ret->kind), kind) == 0)
            return true;
    return false;
}

static void drop_over(struct inject *self) {
    uint64_t now = clock_now_ns();
    for (unsigned i = 0; i < self->rules;)
        if (self->rule[i].end_ns <= now)
            self->rule[i] = self->rule[--self->rules];
        else
            i++;
}

static void *take_rules(void *argument) {
    struct inject *self = argument;
    char text[RULE_BYTES];
    for (ssize_t got; (got = recv(self->file, text, sizeof text - 1, 0)) > 0 || errno == EINTR;) {
        struct rule rule;
        text[got > 0 ? got : 0] = 0;
        if (strcmp(text, "end") == 0)
            break;
        if (!parse_rule(&rule, text)) {
            log_line(TRACE_ERROR, "not a fault: '%s'", text);
            continue;
        }
        pthread_mutex_lock(&self->mutex);
        drop_over(self);
        if (self->rules < RULES_MAX)
            self->rule[self->rules++] = rule;
        pthread_mutex_unlock(&self->mutex);
        log_line(TRACE_WARNING, "injected fault: %s", text);
        bell_ring(self->bell);
    }
    return NULL;
}

static bool make_address(struct sockaddr_un *ret, const char *run_dir, const char *name) {
    *ret = (struct sockaddr_un){.sun_family = AF_UNIX};
    int size = snprintf(ret->sun_path, sizeof ret->sun_path, "%s/%s.faults", run_dir, name);
    return size > 0 && (size_t)size < sizeof ret->sun_path;
}

int inject_open(struct inject **ret, const char *run_dir, const char *name, struct bell *bell,
                struct failure *failure) {
    struct inject *self = calloc(1, sizeof *self);
    if (self == NULL)
        return fail(failure, ERR_NO_MEMORY, "no memory for the fault injector");
    self->bell = bell;
    pthread_mutex_init(&self->mutex, NULL);
    self->file = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    int error = 0;
    if (run_dir == NULL || !make_address(&self->address, run_dir, name))
        error = fail(failure, ERR_INVALID, "--allow-faults needs --run-dir, with a path that a socket can have");
    if (error == 0) {
        unlink(self->address.sun_path); /* of a forerunner that was killed */
        if (bind(self->file, (struct sockaddr *)&self->address, sizeof self->address) != 0)
            error = fail(failure, ERR_IO, "cannot listen at %s: %s", self->address.sun_path, strerror(errno));
    }
    if (error == 0)
        error = thread_start(&self->thread, "faults", take_rules, self, failure);
    if (error < 0) {
        close(self->file);
        free(self);
        return error;
    }
    *ret = self;
    return 0;
}

void inject_close(struct inject **inject) {
    struct inject *self = *inject;
    if (self == NULL)
        return;
    sendto(self->file, "end", 3, 0, (struct sockaddr *)&self->address, sizeof self->address);
    pthread_join(self->thread, NULL);
    close(self->file);
    unlink(self->address.sun_path);
    pthread_mutex_destroy(&self->mutex);
    if (self->damaged + self->falsified > 0)
        log_line(TRACE_INFO, "injected: %llu frames damaged, %llu with a wrong row", (unsigned long long)self->damaged,
                 (unsigned long long)self->falsified);
    for (struct held *held; (held = self->held) != NULL;) {
        self->held = held->next;
        held_free(&held);
    }
    free(self);
    *inject = NULL;
}

bool inject_tell(const char *run_dir, const char *name, const char *rule) {
    struct sockaddr_un address;
    int file = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    bool told = make_address(&address, run_dir, name) &&
                sendto(file, rule, strlen(rule), MSG_NOSIGNAL | MSG_DONTWAIT, (struct sockaddr *)&address,
                       sizeof address) == (ssize_t)strlen(rule);
    close(file);
    return told;
}

/* ---- striking ---- */

/* Does a rule of the kind strike now? `ret` gets a copy of it. */
static bool strikes(struct inject *self, enum fault_kind kind, struct rule *ret) {
    if (atomic_load_explicit(&self->rules, memory_order_relaxed) == 0)
        return false;
    bool found = false;
    pthread_mutex_lock(&self->mutex);
    drop_over(self);
    for (unsigned i = 0; i < self->rules && !found; i++)
        if (self->rule[i].kind == kind && random_chance(&self->rule[i].random, self->rule[i].share)) {
            *ret = self->rule[i];
            found = true;
            random_next(&self->rule[i].random);
        }
    pthread_mutex_unlock(&self->mutex);
    return found;
}

/* Each of `count` rows is hit or not: the first that is, else `count`. */
static uint32_t strikes_row(struct inject *self, enum fault_kind kind, uint32_t count, struct rule *ret) {
    if (atomic_load_explicit(&self->rules, memory_order_relaxed) == 0)
        return count;
    for (uint32_t row = 0; row < count; row++)
        if (strikes(self, kind, ret))
            return row;
    return count;
}

static enum injected fate(struct inject *self) {
    struct rule rule;
    if (strikes(self, FAULT_PARTITION, &rule) || strikes(self, FAULT_DROP, &rule))
        return INJECT_DROP;
    if (strikes(self, FAULT_DELAY, &rule))
        return INJECT_LATER;
    return strikes(self, FAULT_DUPLICATE, &rule) ? INJECT_TWICE : INJECT_NOTHING;
}

enum injected inject_message(struct inject *self) {
    return fate(self);
}

enum injected inject_frame(struct inject *self, struct outgoing *frame) {
    struct rule rule;
    if (strikes(self, FAULT_CORRUPT, &rule)) {
        frame->flip_after = 1 + random_next(&rule.random) % (8 * frame->bytes);
        self->damaged++;
    }
    if (frame->header.kind == FRAME_COMBINE) { /* one bit of one row */
        uint64_t row_bits = 8 * (uint64_t)frame->header.row_bytes;
        uint32_t row = strikes_row(self, FAULT_LIE, frame->header.items, &rule);
        if (row < frame->header.items) {
            frame->flip_before = 1 + 8 * frame->rows_offset + row * row_bits + random_next(&rule.random) % row_bits;
            self->falsified++;
        }
    }
    return fate(self);
}

bool inject_deaf(struct inject *self) {
    struct rule rule;
    return strikes(self, FAULT_PARTITION, &rule);
}

void inject_compute(struct inject *self, const struct program *program) {
    struct rule rule;
    if (program->kind != PROGRAM_EXPERT && program->kind != PROGRAM_LAYER && program->kind != PROGRAM_SAMPLE)
        return;
    if (strikes(self, FAULT_SLOW, &rule))
        usleep((useconds_t)((rule.by_ns > 0 ? rule.by_ns : DELAY_DEFAULT_MS * 1000000u) / 1000));
    if (strikes(self, FAULT_KILL, &rule) && rule.layer == program->layer)
        raise(SIGKILL);
    if (strikes(self, FAULT_STOP, &rule) && rule.layer == program->layer)
        raise(SIGSTOP);
}

int inject_load(struct inject *self) {
    struct rule rule;
    if (strikes(self, FAULT_DISK_ERROR, &rule))
        return ERR_IO;
    return strikes(self, FAULT_OOM, &rule) ? ERR_NO_MEMORY : 0;
}

/* ---- later ---- */

static void hold(struct inject *self, struct held *held) {
    struct rule rule;
    uint64_t by_ns = DELAY_DEFAULT_MS * 1000000u;
    if (strikes(self, FAULT_DELAY, &rule) && rule.by_ns > 0) /* up to that, so that messages overtake each other */
        by_ns = random_between(&rule.random, 0, rule.by_ns);
    held->due_ns = clock_now_ns() + by_ns;
    struct held **at = &self->held;
    while (*at != NULL && (*at)->due_ns <= held->due_ns)
        at = &(*at)->next;
    held->next = *at;
    *at = held;
}

void inject_hold_message(struct inject *self, actor_id to, void *bytes, size_t size) {
    struct held *held = calloc(1, sizeof *held);
    ASSERT(held != NULL);
    held->to = to;
    held->bytes = bytes;
    held->size = size;
    hold(self, held);
}

void inject_hold_frame(struct inject *self, actor_id to, const struct outgoing *frame) {
    struct held *held = calloc(1, sizeof *held);
    ASSERT(held != NULL);
    held->to = to;
    held->is_frame = true;
    held->size = frame->bytes;
    held->bytes = aligned_alloc(FRAME_ALIGN, (frame->bytes + FRAME_ALIGN - 1) / FRAME_ALIGN * FRAME_ALIGN);
    ASSERT(held->bytes != NULL);
    outgoing_write(frame, held->bytes);
    held->frame = *frame;
    held->frame.prefix = (uint8_t *)held->bytes + sizeof frame->header;
    held->frame.prefix_bytes = frame->bytes - sizeof frame->header;
    held->frame.gather = NULL;
    held->frame.reserved = NULL; /* it is copied */
    held->frame.summed = false;
    held->frame.context = NULL;
    held->frame.flip_before = 0; /* is done */
    hold(self, held);
}

struct held *inject_due(struct inject *self, uint64_t now_ns, uint64_t *ret_due_ns) {
    struct held *held = self->held;
    *ret_due_ns = held != NULL ? held->due_ns : NEVER;
    if (held == NULL || held->due_ns > now_ns)
        return NULL;
    self->held = held->next;
    return held;
}

void held_free(struct held **held) {
    free((*held)->bytes);
    free(*held);
    *held = NULL;
}
