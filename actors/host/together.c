/* The troupe on one thread: each actor has its turn until none has anything left to do, then the thread sleeps on the one doorbell
 * (HTTP and loader threads ring it) or until the earliest deadline.
 *
 *   RUNNING          until SIGINT or SIGTERM, or until an actor exits by itself
 *   GATEWAY_ENDS     the gateway finishes what it has admitted, for at most GATEWAY_GRACE_NS
 *   ALL_END          all others are told to shut down, for at most END_GRACE_NS */
#include "actors/host/together.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "actors/host/clock.h"
#include "actors/host/probe_http.h"
#include "actors/host/process_parts.h"

#define SLEEP_MAX_NS     1000000000u
#define READY_POLL_NS    50000000u
#define GATEWAY_GRACE_NS 5000000000u
#define END_GRACE_NS     3000000000u

enum together_phase { RUNNING, GATEWAY_ENDS, ALL_END };

struct place {
    struct process *process; /* NULL: it has ended */
    struct options options;  /* its own: a name, a socket */
    char name[48];
};

struct together {
    struct place *place;
    unsigned places;
    struct shared_host shared;
    struct bell bell;
    enum together_phase phase;
    uint64_t phase_end_ns;
    int signals, exit_code;
    struct probe_http probe;
    uint64_t asked_ns;
    bool ready;
};

static int open_place(struct together *self, enum role role, unsigned number, const struct options *options,
                      struct failure *failure) {
    struct place *place = &self->place[self->places++];
    bool numbered = role != ROLE_COORDINATOR && role != ROLE_GATEWAY;
    if (numbered)
        snprintf(place->name, sizeof place->name, "%s-%u", role_name(role), number);
    else
        snprintf(place->name, sizeof place->name, "%s", role_name(role));
    place->options = *options;
    place->options.name = place->name;
    place->process = calloc(1, sizeof *place->process);
    if (place->process == NULL)
        return fail(failure, ERR_NO_MEMORY, "no memory for %s", place->name);
    process_prepare(place->process, role, &place->options);
    process_share(place->process, &self->shared);
    return process_open(place->process, failure);
}

static int open_places(struct together *self, const struct options *options, struct failure *failure) {
    const struct {
        enum role role;
        uint64_t count;
    } cast[] = {{ROLE_COORDINATOR, 1},
                {ROLE_GATEWAY, 1},
                {ROLE_ATTENTION, options->attention},
                {ROLE_EXPERT, options->experts},
                {ROLE_SAMPLER, options->samplers}};
    uint64_t all = 2 + options->attention + options->experts + options->samplers;
    self->place = calloc(all, sizeof *self->place);
    if (self->place == NULL)
        return fail(failure, ERR_NO_MEMORY, "no memory for %llu actors", (unsigned long long)all);
    for (size_t i = 0; i < sizeof cast / sizeof cast[0]; i++) {
        for (uint64_t k = 0; k < cast[i].count; k++) {
            int error = open_place(self, cast[i].role, (unsigned)k, options, failure);
            if (error < 0)
                return error;
        }
    }
    return 0;
}

static void close_place(struct place *place) {
    if (place->process == NULL)
        return;
    process_close(place->process);
    free(place->process);
    place->process = NULL;
}

static int together_open(struct together *self, const struct options *options, struct failure *failure) {
    int threads = options->settings.threads > 0 ? (int)options->settings.threads : pool_processors();
    self->shared = (struct shared_host){.neighbours = neighbours_open(), .bell = &self->bell};
    if (self->shared.neighbours == NULL)
        return fail(failure, ERR_NO_MEMORY, "no memory for the actors' queues");
    int error = bell_create(&self->bell, NULL, clock_random(), failure);
    if (error == 0)
        error = pool_open(&self->shared.pool, threads, failure);
    if (error < 0)
        return error;
    process_catch_signals(&self->bell);
    return open_places(self, options, failure);
}

static void together_close(struct together *self) {
    process_catch_signals(NULL);
    probe_http_close(&self->probe);
    for (unsigned i = 0; i < self->places; i++)
        close_place(&self->place[i]);
    free(self->place);
    pool_close(&self->shared.pool);
    neighbours_close(&self->shared.neighbours);
    bell_close(&self->bell);
}

/* Tells actors of this phase to finish. */
static void enter(struct together *self, enum together_phase phase) {
    self->phase = phase;
    self->phase_end_ns = clock_now_ns() + (phase == GATEWAY_ENDS ? GATEWAY_GRACE_NS : END_GRACE_NS);
    for (unsigned i = 0; i < self->places; i++) {
        struct process *process = self->place[i].process;
        if (process != NULL && (phase == ALL_END || process->role == ROLE_GATEWAY))
            process_step(process, &(struct event){.kind = EVENT_SHUTDOWN});
    }
}

/* One turn of each. Returns whether anything was done; who has exited is closed. */
static bool turn_all(struct together *self, uint64_t *ret_until_ns) {
    bool any = false;
    *ret_until_ns = NEVER;
    for (unsigned i = 0; i < self->places; i++) {
        struct place *place = &self->place[i];
        uint64_t until;
        if (place->process == NULL)
            continue;
        any |= process_turn(place->process, &until);
        if (until < *ret_until_ns)
            *ret_until_ns = until;
        if (!place->process->exiting)
            continue;
        if (self->phase == RUNNING && place->process->exit_code != 0) {
            self->exit_code = place->process->exit_code;
            enter(self, ALL_END);
        }
        close_place(place);
        any = true;
    }
    return any;
}

static bool gateway_runs(const struct together *self) {
    for (unsigned i = 0; i < self->places; i++) {
        if (self->place[i].process != NULL && self->place[i].process->role == ROLE_GATEWAY)
            return true;
    }
    return false;
}

static bool anybody_runs(const struct together *self) {
    for (unsigned i = 0; i < self->places; i++) {
        if (self->place[i].process != NULL)
            return true;
    }
    return false;
}

/* False: it is over. */
static bool advance_phase(struct together *self) {
    uint64_t now = clock_now_ns();
    int signals = process_stop_signals();
    if (signals > self->signals) { /* the second one ends at once */
        self->signals = signals;
        if (self->phase != RUNNING)
            return false;
        enter(self, GATEWAY_ENDS);
    }
    if (self->phase == GATEWAY_ENDS && (now >= self->phase_end_ns || !gateway_runs(self)))
        enter(self, ALL_END);
    return anybody_runs(self) && (self->phase != ALL_END || now < self->phase_end_ns);
}

static void watch_ready(struct together *self, int listening, void (*ready)(void *context), void *context) {
    uint64_t now = clock_now_ns();
    if (self->ready || self->phase != RUNNING)
        return;
    if (self->probe.file >= 0 && probe_http_read(&self->probe) == 200) {
        self->ready = true;
        ready(context);
    } else if (now - self->asked_ns >= READY_POLL_NS) {
        probe_http_ask(&self->probe, listening, "/ready");
        self->asked_ns = now;
    }
}

static void loop(struct together *self, int listening, void (*ready)(void *context), void *context) {
    for (unsigned i = 0; i < self->places; i++)
        process_step(self->place[i].process, &(struct event){.kind = EVENT_START});
    while (advance_phase(self)) {
        uint32_t seen = bell_seen(&self->bell);
        uint64_t until;
        watch_ready(self, listening, ready, context);
        if (turn_all(self, &until))
            continue;
        uint64_t now = clock_now_ns();
        if (!self->ready && now + READY_POLL_NS / 10 < until)
            until = now + READY_POLL_NS / 10;
        if (self->phase != RUNNING && self->phase_end_ns < until)
            until = self->phase_end_ns;
        uint64_t sleep_ns = until <= now ? 0 : until - now < SLEEP_MAX_NS ? until - now : SLEEP_MAX_NS;
        bell_wait(&self->bell, seen, 1, sleep_ns, 0);
    }
}

int together_run(const struct options *given, int listening, const char *run_dir, void (*ready)(void *context),
                 void *context) {
    struct options options = *given;
    struct together self = {.probe = {.file = -1}};
    struct failure failure;
    numerics_enter();
    options.run_dir = run_dir;
    options.listen_fd = (uint64_t)dup(listening);
    if (together_open(&self, &options, &failure) < 0) {
        log_line(TRACE_ERROR, "cannot start: %s", failure.text);
        self.exit_code = EXIT_FAILED;
    } else {
        loop(&self, listening, ready, context);
    }
    together_close(&self);
    return self.exit_code;
}
