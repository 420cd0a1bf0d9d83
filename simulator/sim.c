/* See sim.h. A run has two worlds: the quiet one, whose answers are the expected ones, and the one with the faults. A request that is
 * pinned to a version of the routing bias which the second one has made is expected to be answered as in a quiet world that begins with
 * that version (references.h). The second has these phases:
 *
 *   FAULTS  until the last fault is over
 *   CALM    the network is quick, nobody falls any more; until all clients have their answers
 *   REST    nothing more is asked; until nothing is left over */
#include "simulator/sim.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "simulator/checkers.h"
#include "simulator/clients.h"
#include "simulator/references.h"

#define MS UINT64_C(1000000)
#define ADMIN_CLIENT (UINT64_C(1) << 63) /* from here on, no client of the gateway has such a number */
#define STEPS_MAX 20000000u
#define LEAKS_LOOKED_AT_NS (20 * MS)

static const char *const NAMES[OUTCOMES] = {"good", "safety", "liveness", "non-determinism", "crash"};

const char *outcome_name(enum outcome outcome) {
    return NAMES[outcome];
}

int sim_open(struct sim *ret, struct failure *failure) {
    struct sim self = {0};
    int result = 0;
    for (uint32_t i = 0; result == 0 && i < TINY_MODELS; i++)
        result = tiny_model_open(&self.model[i], i, failure);
    self.kernels[0] = result == 0 ? kernels_select(PROFILE_BF16, ISA_BEST, failure) : NULL;
    self.kernels[1] = result == 0 ? kernels_select(PROFILE_F32, ISA_BEST, failure) : NULL;
    if (self.kernels[0] == NULL || self.kernels[1] == NULL) {
        sim_close(&self);
        return result < 0 ? result : ERR_UNSUPPORTED;
    }
    *ret = self;
    return 0;
}

void sim_close(struct sim *self) {
    for (uint32_t i = 0; i < TINY_MODELS; i++)
        tiny_model_close(&self->model[i]);
}

/* ---- a run ---- */

struct run {
    const struct sim *sim;
    const struct scenario *scenario;
    struct faults faults; /* a copy: its chances are used up */
    struct world *world;
    struct checkers *checkers;
    struct clients clients;
    const struct scenario *quiet; /* the same requests without faults */
    const struct clients *plain;  /* answers with the model's own routing bias; NULL: this run is to find them */
    struct references references; /* and with others */
    const float *bias;            /* that the world begins with; NULL: the model's own */
    uint32_t next_fault;
    void (*trace)(void *context, const char *line);
    void *context;
    struct report *report;
};

static void on_stream(void *context, const struct effect *effect) {
    clients_on_stream(&((struct run *)context)->clients, effect);
}

static void on_trace(void *context, const char *line) {
    struct run *run = context;
    run->trace(run->context, line);
}

static void on_end(void *context, struct place who) {
    if (who.role == ROLE_GATEWAY)
        clients_on_gateway_end(&((struct run *)context)->clients);
}

static void on_bias(void *context, const Troupe__Bias *bias) {
    references_note(&((struct run *)context)->references, bias);
}

static uint64_t lost_after_ns(const struct scenario *scenario) {
    return (uint64_t)scenario->settings.heartbeat_ms * scenario->settings.heartbeat_misses * MS;
}

/* How long everything may take once nothing goes wrong any more: a few rounds of every timeout, and time to compute each token afresh. */
static uint64_t bound_ns(const struct scenario *scenario) {
    const struct settings *settings = &scenario->settings;
    uint64_t timeouts_ms = settings->row_deadline_ms + settings->poll_ms + 4 * settings->hello_retry_ms +
                           settings->join_wait_ms + settings->heartbeat_ms;
    uint64_t work_ns = 2000 * (scenario->compute_ns + MS) + 64 * scenario->load_ns;
    return 4 * lost_after_ns(scenario) + 8 * timeouts_ms * MS + scenario->restart_ns + 4 * work_ns;
}

static int open_world(struct run *self, struct failure *failure) {
    const struct scenario *scenario = self->scenario;
    const struct tiny_model *model = &self->sim->model[scenario->model];
    struct world_options options = {
        .seed = scenario->seed,
        .settings = scenario->settings,
        .model = model->model,
        .kernels = self->sim->kernels[scenario->f32],
        .parallel = PARALLEL_SERIAL,
        .attention = scenario->attention,
        .experts = scenario->experts,
        .samplers = scenario->samplers,
        .fileless = scenario->fileless < scenario->experts ? scenario->fileless : scenario->experts - 1,
        .apart = scenario->apart,
        .gateway = {.served_model = "tiny", .version = "sim", .tokenizer = model->tokenizer},
        .delay_min_ns = scenario->delay_min_ns,
        .delay_max_ns = scenario->delay_max_ns,
        .loss = scenario->loss,
        .duplicate = scenario->duplicate,
        .frame_delay_min_ns = scenario->frame_delay_min_ns,
        .frame_delay_max_ns = scenario->frame_delay_max_ns,
        .frame_loss = scenario->frame_loss,
        .frames_find_any_life = scenario->frames_find_any_life,
        .compute_ns = scenario->compute_ns,
        .load_ns = scenario->load_ns,
        .faults = &self->faults,
        .restart_ns = scenario->restart_ns,
        .stream = on_stream,
        .context = self,
        .trace = self->trace != NULL ? on_trace : NULL,
    };
    int result = checkers_open(&self->checkers, model_config(model->model), failure);
    if (result < 0)
        return result;
    options.watch = checkers_watch(self->checkers);
    result = world_open(&self->world, &options, failure);
    if (result < 0)
        return result;
    if (self->bias != NULL)
        coordinator_set_bias(world_actor(self->world, ROLE_COORDINATOR, 0), self->bias);
    checkers_tell_bias(self->checkers, on_bias);
    self->clients.world = self->world;
    checkers_begin(self->checkers, self->world, 2 * lost_after_ns(scenario) + 2000 * MS, on_end, self);
    return 0;
}

static void end(struct run *self, enum outcome outcome, const char *text) {
    struct report *report = self->report;
    if (report->outcome != OUTCOME_GOOD)
        return;
    report->outcome = outcome;
    snprintf(report->text, sizeof report->text, "at %.3f ms: %.960s", (double)world_now_ns(self->world) / 1e6,
             text);
}

static void ask_coordinator(struct run *self, const struct fault *fault) {
    char body[FAULT_BODY_BYTES];
    const char *path;
    if (fault_request(fault, &path, body))
        world_admin(self->world, &(struct http_request){.client = ADMIN_CLIENT + self->next_fault,
                                                        .method = "POST",
                                                        .path = path,
                                                        .query = "",
                                                        .body = body,
                                                        .body_bytes = strlen(body)});
}

/* Crashes, pauses, hang-ups and operations whose time has come. */
static void begin_faults(struct run *self) {
    for (; self->next_fault < self->faults.count; self->next_fault++) {
        const struct fault *fault = &self->faults.list[self->next_fault];
        if (fault->at_ns > world_now_ns(self->world))
            return;
        if (self->trace != NULL) {
            char line[FAULT_LINE_BYTES + 16] = "=== ";
            fault_print(fault, line + 4);
            self->trace(self->context, line);
        }
        if (fault->kind == FAULT_CRASH)
            world_crash(self->world, fault->from, fault->for_ns, fault->silent);
        else if (fault->kind == FAULT_PAUSE)
            world_pause(self->world, fault->from, fault->at_ns + fault->for_ns);
        else if (fault->kind == FAULT_HANG_UP)
            clients_hang_up(&self->clients, fault->client);
        ask_coordinator(self, fault);
    }
}

static uint64_t smaller(uint64_t a, uint64_t b) {
    return a < b ? a : b;
}

/* One event of the whole: of the world, of a client or of the schedule. False: something is violated, or nothing is left to happen. */
static bool step(struct run *self) {
    uint64_t fault_ns =
        self->next_fault < self->faults.count ? self->faults.list[self->next_fault].at_ns : NEVER;
    uint64_t outside_ns = smaller(clients_due_ns(&self->clients), fault_ns);
    uint64_t world_ns = world_next_ns(self->world);
    if (outside_ns != NEVER && outside_ns <= world_ns) {
        world_wait(self->world, outside_ns);
        begin_faults(self);
        clients_act(&self->clients);
    } else if (!world_step(self->world)) {
        end(self, OUTCOME_LIVENESS, "nothing is left to happen, and not everything is done");
        return false;
    }
    self->report->steps++;
    if (self->clients.violation.code != 0)
        end(self, OUTCOME_SAFETY, self->clients.violation.text);
    if (checkers_violation(self->checkers)->code != 0)
        end(self, OUTCOME_SAFETY, checkers_violation(self->checkers)->text);
    return self->report->outcome == OUTCOME_GOOD;
}

static void tell_who_waits(struct run *self) {
    char text[sizeof self->report->text];
    size_t used = (size_t)snprintf(text, sizeof text, "not finished in time:");
    for (uint32_t i = 0; i < self->scenario->requests && used < sizeof text; i++)
        if (self->clients.client[i].state < CLIENT_DONE)
            used += (size_t)snprintf(text + used, sizeof text - used, " request %u (%s, attempt %u)", i,
                                     self->clients.client[i].state == CLIENT_OPEN ? "open" : "refused",
                                     self->clients.client[i].attempts);
    for (enum role role = ROLE_COORDINATOR; role <= ROLE_SAMPLER; role++)
        for (uint32_t i = 0; world_has(self->world, (struct place){role, i}) && used < sizeof text; i++) {
            struct actor *actor = world_actor(self->world, role, i);
            used += (size_t)snprintf(text + used, sizeof text - used, "; %s-%u: %s", role_name(role), i,
                                     actor != NULL ? actor->class->describe(actor) : "not alive");
        }
    end(self, OUTCOME_LIVENESS, text);
}

static void rest(struct run *self) {
    struct failure failure = {0};
    uint64_t until_ns = world_now_ns(self->world) + self->report->bound_ns - self->report->calm_ns;
    uint64_t look_ns = 0;
    for (;;) {
        if (world_now_ns(self->world) >= look_ns) {
            if (checkers_leaks(self->checkers, &failure) == 0)
                return;
            look_ns = world_now_ns(self->world) + LEAKS_LOOKED_AT_NS;
        }
        if (world_now_ns(self->world) > until_ns) {
            end(self, OUTCOME_SAFETY, failure.text);
            return;
        }
        if (!step(self))
            return;
    }
}

static void live(struct run *self) {
    struct report *report = self->report;
    while (!clients_done(&self->clients) || world_now_ns(self->world) < report->calm_ns) {
        if (!step(self))
            return;
        if (self->next_fault == self->faults.count && world_now_ns(self->world) >= report->calm_ns)
            world_calm(self->world);
        if (world_now_ns(self->world) > report->bound_ns || report->steps > STEPS_MAX) {
            tell_who_waits(self);
            return;
        }
    }
    report->end_ns = world_now_ns(self->world);
    if (self->plain != NULL) {
        clients_compare_all(&self->clients);
        if (self->clients.violation.code != 0)
            end(self, OUTCOME_SAFETY, self->clients.violation.text);
        else
            rest(self);
    }
}

static uint64_t number_after(const char *text, const char *name) {
    const char *at = strstr(text, name);
    return at != NULL ? strtoull(at + strlen(name), NULL, 10) : 0;
}

/* What sharing and guessing came to: tests see that they are not idle. */
static void count_savings(struct run *self) {
    for (uint32_t i = 0; self->world != NULL && world_has(self->world, (struct place){ROLE_ATTENTION, i}); i++) {
        struct actor *actor = world_actor(self->world, ROLE_ATTENTION, i);
        const char *text = actor != NULL ? actor->class->describe(actor) : "";
        self->report->prefix_hits += number_after(text, "hits=");
        self->report->preemptions += number_after(text, "preempted=");
        self->report->accepted_drafts += number_after(text, "accepted=");
    }
}

static const struct client *expected_answer(void *context, uint32_t request, uint64_t version);

static void run_world(struct run *self) {
    struct failure failure = {0};
    struct report *report = self->report;
    self->faults = self->scenario->faults;
    clients_open(&self->clients, self->scenario);
    if (self->plain != NULL)
        self->clients.expected = expected_answer;
    self->clients.context = self;
    if (open_world(self, &failure) < 0) {
        report->outcome = OUTCOME_SAFETY;
        snprintf(report->text, sizeof report->text, "the world does not open: %.400s", failure.text);
    } else {
        uint64_t last_ns = 0;
        for (uint32_t i = 0; i < self->scenario->requests; i++)
            if (self->scenario->request[i].arrives_ns > last_ns)
                last_ns = self->scenario->request[i].arrives_ns;
        uint64_t faults_ns = scenario_calm_ns(self->scenario);
        report->calm_ns = faults_ns > last_ns ? faults_ns : last_ns;
        report->bound_ns = report->calm_ns + bound_ns(self->scenario);
        live(self);
        report->hash = world_trace_hash(self->world);
        count_savings(self);
    }
    world_close(&self->world);
    checkers_free(&self->checkers);
    report->refused = self->clients.refused;
    for (uint32_t i = 0; i < self->scenario->requests; i++) {
        report->finished += self->clients.client[i].state == CLIENT_DONE;
        report->hung_up += self->clients.client[i].state == CLIENT_GONE;
    }
}

/* The one request alone, in a quiet world that begins with the version. */
static const struct client *run_alone(struct run *self, uint32_t request, uint64_t version, const float *bias) {
    struct scenario *quiet = malloc(sizeof *quiet);
    struct clients *clients = malloc(sizeof *clients);
    ASSERT(quiet != NULL && clients != NULL);
    *quiet = *self->quiet;
    quiet->request[0] = self->quiet->request[request];
    quiet->request[0].arrives_ns = 0;
    quiet->requests = 1;
    struct report report = {0};
    struct run run = {.sim = self->sim, .scenario = quiet, .bias = bias, .report = &report};
    run_world(&run);
    ASSERT(report.outcome == OUTCOME_GOOD && "a quiet world answers");
    *clients = run.clients;
    clients->scenario = NULL; /* only the answer is kept */
    clients->world = NULL;
    references_free(&run.references);
    free(quiet);
    return references_add(&self->references, request, version, clients);
}

static const struct client *expected_answer(void *context, uint32_t request, uint64_t version) {
    struct run *self = context;
    if (version == 0)
        return &self->plain->client[request];
    const struct client *known = references_find(&self->references, request, version);
    const float *bias = references_delta(&self->references, version);
    if (known != NULL || bias == NULL)
        return known;
    return run_alone(self, request, version, bias);
}

void sim_run(const struct sim *self, const struct scenario *scenario,
             void (*trace)(void *context, const char *line), void *context, struct report *ret) {
    struct scenario *quiet = malloc(sizeof *quiet); /* large for a stack */
    ASSERT(quiet != NULL);
    *quiet = *scenario;
    scenario_make_quiet(quiet);
    struct report first = {0};
    struct run expected = {.sim = self, .scenario = quiet, .report = &first};
    run_world(&expected);
    memset(ret, 0, sizeof *ret);
    if (first.outcome != OUTCOME_GOOD) {
        *ret = first;
        snprintf(ret->text, sizeof ret->text, "without faults: %.900s", first.text);
    } else {
        struct run run = {.sim = self,
                          .scenario = scenario,
                          .quiet = quiet,
                          .plain = &expected.clients,
                          .trace = trace,
                          .context = context,
                          .report = ret};
        run_world(&run);
        clients_free(&run.clients);
        references_free(&run.references);
    }
    clients_free(&expected.clients);
    references_free(&expected.references);
    free(quiet);
}

void sim_run_twice(const struct sim *self, const struct scenario *scenario, struct report *ret) {
    struct report again;
    sim_run(self, scenario, NULL, NULL, &again);
    sim_run(self, scenario, NULL, NULL, ret);
    if (again.hash == ret->hash && again.outcome == ret->outcome)
        return;
    ret->outcome = OUTCOME_NONDETERMINISM;
    snprintf(ret->text, sizeof ret->text, "two runs have the trace hashes %016llx and %016llx",
             (unsigned long long)again.hash, (unsigned long long)ret->hash);
}
