/* A simulated cluster, see cluster.h: virtual time, what happens next in it, and the coordinator, whose effects are carried out here. One
 * seed decides all delays; everything that happens goes into one hash.
 *
 * The day begins when all attention actors serve for the first time; before it, processes start, join and load what they are given. */
#include "simulator/cluster_parts.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/wire.h"

#define DELAY_MIN_NS   UINT64_C(100000)
#define DELAY_MAX_NS   UINT64_C(500000)
#define SERVING_MAX_NS UINT64_C(86400000000000) /* it must serve within a day */

/* ---- what happens next ---- */

static bool before(const struct happening *a, const struct happening *b) {
    return a->time_ns != b->time_ns ? a->time_ns < b->time_ns : a->number < b->number;
}

void happen(struct cluster_sim *self, struct happening what) {
    if (self->count == self->capacity) {
        self->capacity = self->capacity > 0 ? 2 * self->capacity : 1024;
        self->heap = realloc(self->heap, self->capacity * sizeof *self->heap);
        ASSERT(self->heap != NULL);
    }
    what.time_ns += self->now_ns;
    what.number = ++self->last_number;
    uint32_t at = self->count++;
    for (; at > 0 && before(&what, &self->heap[(at - 1) / 2]); at = (at - 1) / 2)
        self->heap[at] = self->heap[(at - 1) / 2];
    self->heap[at] = what;
}

static struct happening take_next(struct cluster_sim *self) {
    struct happening first = self->heap[0], last = self->heap[--self->count];
    uint32_t at = 0;
    for (;;) {
        uint32_t child = 2 * at + 1;
        if (child >= self->count)
            break;
        child += child + 1 < self->count && before(&self->heap[child + 1], &self->heap[child]);
        if (!before(&self->heap[child], &last))
            break;
        self->heap[at] = self->heap[child];
        at = child;
    }
    self->heap[at] = last;
    return first;
}

uint64_t cluster_delay(struct cluster_sim *self) {
    return random_between(&self->random, DELAY_MIN_NS, DELAY_MAX_NS);
}

/* FNV-1a over words. */
void cluster_hash(struct cluster_sim *self, uint64_t word) {
    self->report.hash = (self->report.hash ^ word) * UINT64_C(0x100000001b3);
    self->report.hash ^= self->report.hash >> 29;
}

void placement_drop(struct placement **placement) {
    struct placement *self = *placement;
    *placement = NULL;
    if (self == NULL || --self->refs > 0)
        return;
    free(self->copies.first);
    free(self->copies.holder);
    free(self);
}

void parcel_drop(struct parcel **parcel) {
    struct parcel *self = *parcel;
    *parcel = NULL;
    if (self == NULL || --self->refs > 0)
        return;
    placement_drop(&self->placement);
    wire_free(&self->message);
    free(self);
}

/* ---- what the coordinator wants done ---- */

static void hash_bytes(struct cluster_sim *self, const uint8_t *bytes, size_t size) {
    cluster_hash(self, size);
    for (uint64_t word; size >= sizeof word; bytes += sizeof word, size -= sizeof word) {
        memcpy(&word, bytes, sizeof word);
        cluster_hash(self, word);
    }
}

static struct parcel *parcel_read(struct cluster_sim *self, const uint8_t *bytes, size_t size) {
    struct parcel *ret = calloc(1, sizeof *ret);
    ASSERT(ret != NULL);
    ret->refs = 1;
    ASSERT(wire_unpack(&ret->message, bytes, size, NULL) == 0 && "a message that all can read");
    hash_bytes(self, bytes, size);
    struct cluster_figures *figures = measure_figures(self);
    if (ret->message->body_case == TROUPE__ENVELOPE__BODY_COMMIT)
        self->placed = ret->message->commit->n_layer;
    if (figures != NULL)
        figures->placed = self->placed;
    return ret;
}

/* The coordinator's log is also how operations and epochs are counted. */
static void on_trace(struct cluster_sim *self, const char *text) {
    struct cluster_figures *figures = measure_figures(self);
    unsigned long long id;
    char kind[32], phase[32] = "";
    if (self->task->log != NULL)
        self->task->log(self->task->context, self->now_ns, text);
    if (figures == NULL)
        return;
    figures->epochs += strncmp(text, "epoch ", 6) == 0;
    if (sscanf(text, "operation %llu (%31[^)]) %31[a-z]", &id, kind, phase) == 3) {
        figures->operations += strcmp(phase, "done") == 0;
        figures->aborted += strcmp(phase, "aborted") == 0;
    }
}

static void connect_seat(struct cluster_sim *self, const struct effect *effect) {
    unsigned process;
    if (sscanf(effect->connect.control_address, "cluster://%u", &process) == 1 &&
        process < self->processes)
        self->seat[effect->connect.id % ACTORS_MAX] = process;
}

static void carry_out(struct cluster_sim *self) {
    struct parcel *parcel = NULL;
    const uint8_t *bytes = NULL; /* of `parcel` */
    for (uint32_t i = 0; i < self->effects.count; i++) {
        const struct effect *effect = &self->effects.list[i];
        switch (effect->kind) {
        case EFFECT_CONNECT:
            connect_seat(self, effect);
            break;
        case EFFECT_TRACE:
            on_trace(self, effect->trace.text);
            break;
        case EFFECT_SEND: {
            if (bytes != effect->send.bytes) {
                parcel_drop(&parcel);
                parcel = parcel_read(self, effect->send.bytes, effect->send.size);
                bytes = effect->send.bytes;
            }
            uint32_t process = self->seat[effect->send.to % ACTORS_MAX];
            if (process == UINT32_MAX)
                break;
            parcel->refs++;
            self->report.messages++;
            happen(self, (struct happening){.time_ns = cluster_delay(self),
                                            .kind = HAPPENS_PARCEL,
                                            .process = process,
                                            .incarnation = self->process[process].incarnation,
                                            .parcel = parcel});
            break;
        }
        default:
            break;
        }
    }
    parcel_drop(&parcel);
}

static void step_coordinator(struct cluster_sim *self, const struct event *event) {
    actor_step(self->coordinator, event, self->now_ns, &self->effects);
    self->coordinator_at_ns = actor_deadline(self->coordinator);
    carry_out(self);
    effects_reset(&self->effects);
}

void cluster_tell(struct cluster_sim *self, const struct process *from, message *envelope) {
    self->report.messages++;
    cluster_hash(self, (uint64_t)envelope->body_case << 32 | (uint64_t)(from - self->process));
    step_coordinator(self, &(struct event){.kind = EVENT_MESSAGE, .message = envelope});
}

/* ---- what happens ---- */

static void begin_change(struct cluster_sim *self, uint32_t index) {
    const struct cluster_change *change = &self->task->change[index];
    struct process *process = &self->process[change->process];
    if (change->kind == CLUSTER_LOSE) {
        process_stop(self, change->process);
    } else if (change->kind == CLUSTER_SLOW) {
        measure_change(self);
        self->state[change->process].speed = change->speed;
    } else {
        char body[64];
        snprintf(body, sizeof body, "{\"actor\": \"%s\"}", process->name);
        struct http_request request = {.client = ++self->last_number,
                                       .method = "POST",
                                       .path = "/drain",
                                       .query = "",
                                       .body = body,
                                       .body_bytes = strlen(body)};
        step_coordinator(self, &(struct event){.kind = EVENT_HTTP_REQUEST, .http = &request});
    }
    if (change->for_ns > 0)
        happen(self, (struct happening){
                         .time_ns = change->for_ns, .kind = HAPPENS_UNCHANGE, .value = index});
}

static void end_change(struct cluster_sim *self, uint32_t index) {
    const struct cluster_change *change = &self->task->change[index];
    if (change->kind == CLUSTER_LOSE) {
        process_start(self, change->process);
    } else {
        measure_change(self);
        self->state[change->process].speed = self->process[change->process].group->speed;
    }
}

/* Once the troupe serves: all that is to happen in the day. */
static void begin_day(struct cluster_sim *self) {
    const struct cluster_task *task = self->task;
    measure_window(self, 0);
    for (uint32_t w = 1; w < self->report.windows; w++)
        happen(self, (struct happening){
                         .time_ns = w * self->window_ns, .kind = HAPPENS_WINDOW, .value = w});
    for (uint32_t i = 0; i < task->changes; i++)
        happen(self, (struct happening){
                         .time_ns = task->change[i].at_ns, .kind = HAPPENS_CHANGE, .value = i});
    happen(self, (struct happening){.time_ns = self->window_ns * self->report.windows,
                                    .kind = HAPPENS_END});
}

static void on_happening(struct cluster_sim *self, const struct happening *what) {
    uint32_t index = what->process;
    switch (what->kind) {
    case HAPPENS_START:
        process_start(self, index);
        break;
    case HAPPENS_BEAT:
        process_beat(self, index, true);
        happen(self, (struct happening){
                         .time_ns = (uint64_t)self->task->settings.heartbeat_ms * 1000000u,
                         .kind = HAPPENS_BEAT,
                         .process = index,
                         .incarnation = what->incarnation});
        break;
    case HAPPENS_ACK:
        process_beat(self, index, false);
        break;
    case HAPPENS_READY:
        process_ready(self, index, what->value);
        break;
    case HAPPENS_LOADED:
        process_loaded(self, index, (uint32_t)what->value);
        break;
    case HAPPENS_PARCEL:
        process_take(self, index, what->parcel);
        break;
    case HAPPENS_ADOPT: {
        bool began = self->begin_ns != NEVER;
        process_adopt(self, index, what->parcel);
        if (!began && self->begin_ns != NEVER)
            begin_day(self);
        break;
    }
    case HAPPENS_GONE:
        step_coordinator(self, &(struct event){.kind = EVENT_PEER_LOST,
                                               .peer = {self->process[index].id, what->value}});
        break;
    case HAPPENS_CHANGE:
        begin_change(self, (uint32_t)what->value);
        break;
    case HAPPENS_UNCHANGE:
        end_change(self, (uint32_t)what->value);
        break;
    case HAPPENS_WINDOW:
        measure_window(self, (uint32_t)what->value);
        break;
    case HAPPENS_FEED:
        feed_tick(self);
        break;
    case HAPPENS_END:
        self->ended = true;
        break;
    }
}

static bool concerns(const struct cluster_sim *self, const struct happening *what) {
    const struct process *process = &self->process[what->process];
    return what->incarnation == 0 || (process->alive && process->incarnation == what->incarnation);
}

static void run(struct cluster_sim *self) {
    while (!self->ended && self->refused.code == 0) {
        uint64_t next_ns = self->count > 0 ? self->heap[0].time_ns : NEVER;
        if (self->begin_ns == NEVER && self->now_ns > SERVING_MAX_NS)
            return;
        self->report.events++;
        if (self->coordinator_at_ns < next_ns) {
            if (self->coordinator_at_ns > self->now_ns)
                self->now_ns = self->coordinator_at_ns;
            step_coordinator(self, &(struct event){.kind = EVENT_TIMER});
            continue;
        }
        struct happening what = take_next(self);
        self->now_ns = what.time_ns;
        cluster_hash(self, what.time_ns ^ (uint64_t)what.kind << 56);
        if (concerns(self, &what))
            on_happening(self, &what);
        parcel_drop(&what.parcel);
    }
}

/* ---- a whole run ---- */

static int check(const struct cluster_task *task, struct failure *failure) {
    const struct load_trace *trace = task->trace;
    uint64_t need = (uint64_t)trace->layers * trace->experts, room = 0;
    for (uint32_t g = 0; g < task->groups; g++)
        room += task->group[g].processes *
                (task->group[g].copies > 0 ? (uint64_t)task->group[g].copies : need);
    if (room < need)
        return fail(failure, ERR_INVALID,
                    "not enough room: the trace has %u layers x %u experts = %llu, the processes "
                    "hold %llu copies at most",
                    trace->layers, trace->experts, (unsigned long long)need,
                    (unsigned long long)room);
    if (task->experts_per_token > trace->experts)
        return fail(failure, ERR_INVALID, "experts_per_token: expected at most %u, found %u",
                    trace->experts, task->experts_per_token);
    if (task->processes + task->attention + 2 > ACTORS_MAX - 2)
        return fail(failure, ERR_INVALID, "expected at most %u processes in all, found %u",
                    ACTORS_MAX - 4, task->processes + task->attention);
    if (task->span_ns / trace->windows == 0)
        return fail(failure, ERR_INVALID, "span: too short for %u windows", trace->windows);
    return 0;
}

static bool open_coordinator(struct cluster_sim *self) {
    struct actor_identity identity = {.role = ROLE_COORDINATOR,
                                      .incarnation = 1,
                                      .name = "coordinator",
                                      .control_address = "cluster://coordinator",
                                      .data_address = "",
                                      .host = "front",
                                      .coordinator_address = "",
                                      .model_fingerprint = "cluster",
                                      .numerics = "bf16"};
    struct settings settings = self->task->settings;
    settings.expected_experts = self->task->processes;
    settings.rebalance_eplb = self->task->policy == CLUSTER_EPLB;
    if (self->task->policy == CLUSTER_NONE)
        settings.rebalance_interval_ms = 0;
    self->coordinator = coordinator_create(&identity, &settings, &self->config);
    return self->coordinator != NULL;
}

static bool open_sim(struct cluster_sim *self) {
    const struct load_trace *trace = self->task->trace;
    self->begin_ns = NEVER;
    self->now_ns = 1; /* 0 means never to some */
    self->last_incarnation = 1;
    self->random.state = self->task->seed;
    self->experts = self->task->processes;
    self->processes = self->experts + self->task->attention + 1 + (self->task->feed != NULL);
    self->pairs = trace->layers * trace->experts;
    self->config = (struct model_config){.layers = trace->layers,
                                         .experts = trace->experts,
                                         .moe_layer_freq = 1,
                                         .hidden = 1,
                                         .expert_width = (uint32_t)(self->task->expert_bytes / 3),
                                         .gate.k = self->task->experts_per_token,
                                         .fp8 = true};
    self->estimate_bytes = 3 * (uint64_t)self->config.expert_width + 1;
    memset(self->seat, 0xff, sizeof self->seat);
    effects_init(&self->effects);
    return measure_open(self) && open_coordinator(self) && processes_open(self) && feed_open(self);
}

static void close_sim(struct cluster_sim *self) {
    for (uint32_t i = 0; i < self->count; i++)
        parcel_drop(&self->heap[i].parcel);
    free(self->heap);
    feed_close(self);
    processes_close(self);
    measure_close(self);
    actor_destroy(&self->coordinator);
    effects_free(&self->effects);
}

int cluster_run(struct cluster_report *ret, const struct cluster_task *task,
                struct failure *failure) {
    struct cluster_sim self = {.task = task};
    int error = check(task, failure);
    if (error < 0)
        return error;
    if (!open_sim(&self))
        error = fail(failure, ERR_NO_MEMORY, "no memory for %u processes", task->processes);
    if (error == 0) {
        step_coordinator(&self, &(struct event){.kind = EVENT_START});
        run(&self);
        if (self.refused.code != 0)
            error = fail(failure, self.refused.code, "%s", self.refused.text);
        else if (!self.ended)
            error = fail(failure, ERR_STATE, "the troupe did not serve within a day");
    }
    if (error == 0) {
        measure_end(&self);
        *ret = self.report;
        self.report.window = NULL; /* the caller's now */
    }
    close_sim(&self);
    return error;
}

void cluster_report_free(struct cluster_report *self) {
    free(self->window);
    self->window = NULL;
}
