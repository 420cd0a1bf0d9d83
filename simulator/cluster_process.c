/* The processes of a simulated cluster as the coordinator sees them: HELLO, heartbeats with loads, ASSIGN and RELEASE answered by READY,
 * epochs adopted and acknowledged. Experts load one copy after the other; attention actors adopt an epoch a little later than they
 * hear of it, at a layer boundary. */
#include "simulator/cluster_parts.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/wire.h"

#define START_SPREAD_NS UINT64_C(2000000000)
#define ADOPT_MAX_NS    UINT64_C(20000000) /* one step */
#define NOTICED_NS      UINT64_C(10000000) /* until the end of a process is known */

bool processes_open(struct cluster_sim *self) {
    const struct cluster_task *task = self->task;
    uint32_t index = 0, host = 0;
    self->process = calloc(self->processes, sizeof *self->process);
    if (self->process == NULL)
        return false;
    for (uint32_t g = 0; g < task->groups; host += task->group[g++].hosts)
        for (uint32_t i = 0; i < task->group[g].processes; i++, index++) {
            struct process *process = &self->process[index];
            process->role = ROLE_EXPERT;
            process->group = &task->group[g];
            process->held = calloc(self->pairs, sizeof *process->held);
            process->wanted = calloc(self->pairs, sizeof *process->wanted);
            if (process->held == NULL || process->wanted == NULL)
                return false;
            self->state[index].speed = process->group->speed;
            snprintf(process->name, sizeof process->name, "expert-%u", index);
            snprintf(process->host, sizeof process->host, "host-%u",
                     host + (uint32_t)((uint64_t)i * process->group->hosts / process->group->processes));
        }
    for (uint32_t i = 0; index < self->processes; i++, index++) {
        struct process *process = &self->process[index];
        process->role = i < task->attention    ? ROLE_ATTENTION
                        : i == task->attention ? ROLE_SAMPLER
                                               : ROLE_GATEWAY;
        snprintf(process->name, sizeof process->name, "%s-%u", role_name(process->role), i);
        snprintf(process->host, sizeof process->host, "front-%u", i);
    }
    for (uint32_t i = 0; i < self->processes; i++) {
        snprintf(self->process[i].address, sizeof self->process[i].address, "cluster://%u", i);
        happen(self, (struct happening){.time_ns = random_between(&self->random, 0, START_SPREAD_NS),
                                        .kind = HAPPENS_START,
                                        .process = i});
    }
    return true;
}

void processes_close(struct cluster_sim *self) {
    for (uint32_t i = 0; self->process != NULL && i < self->processes; i++) {
        placement_drop(&self->process[i].placement);
        free(self->process[i].held);
        free(self->process[i].wanted);
    }
    free(self->process);
}

static message envelope_of(const struct process *process) {
    message envelope = TROUPE__ENVELOPE__INIT;
    envelope.protocol_version = WIRE_PROTOCOL_VERSION;
    envelope.from = process->id;
    envelope.from_incarnation = process->incarnation;
    return envelope;
}

/* ---- life ---- */

static void say_hello(struct cluster_sim *self, struct process *process) {
    Troupe__Hello hello = TROUPE__HELLO__INIT;
    message envelope = envelope_of(process);
    hello.role = (Troupe__Role)process->role;
    hello.control_address = hello.data_address = process->address;
    hello.host = process->host;
    hello.name = process->name;
    hello.model_fingerprint = "cluster";
    hello.numerics = "bf16";
    hello.pid = (uint32_t)(process - self->process) + 1;
    if (process->group != NULL)
        hello.capacity_bytes = process->group->copies * self->estimate_bytes;
    envelope.body_case = TROUPE__ENVELOPE__BODY_HELLO;
    envelope.hello = &hello;
    cluster_tell(self, process, &envelope);
}

void process_start(struct cluster_sim *self, uint32_t index) {
    struct process *process = &self->process[index];
    if (!process->alive) {
        measure_change(self);
        process->alive = true;
        process->incarnation = ++self->last_incarnation;
        process->id = 0;
        process->epoch = process->operation = 0;
        if (process->role == ROLE_EXPERT)
            self->state[index].alive = true;
    }
    if (process->id != 0)
        return;
    say_hello(self, process);
    happen(self, (struct happening){.time_ns = (uint64_t)self->task->settings.hello_retry_ms * 1000000u,
                                    .kind = HAPPENS_START,
                                    .process = index,
                                    .incarnation = process->incarnation});
}

void process_stop(struct cluster_sim *self, uint32_t index) {
    struct process *process = &self->process[index];
    if (!process->alive)
        return;
    measure_change(self);
    happen(self, (struct happening){.time_ns = NOTICED_NS,
                                    .kind = HAPPENS_GONE,
                                    .process = index,
                                    .value = process->incarnation});
    process->alive = process->loading = false;
    placement_drop(&process->placement);
    if (process->role != ROLE_EXPERT)
        return;
    self->state[index].alive = self->state[index].loading = false;
    memset(process->held, 0, self->pairs * sizeof *process->held);
    memset(process->wanted, 0, self->pairs * sizeof *process->wanted);
}

/* ---- heartbeats ---- */

/* What it has routed: its share of everything. */
static void fill_loads(struct cluster_sim *self, Troupe__Heartbeat *heartbeat) {
    uint64_t *rows = effects_alloc(&self->effects, self->pairs * sizeof *rows);
    measure_routed(self, 1.0 / self->task->attention, rows);
    heartbeat->n_load_layer = heartbeat->n_load_expert = heartbeat->n_load_rows = self->pairs;
    heartbeat->load_layer = self->layer_of;
    heartbeat->load_expert = self->expert_of;
    heartbeat->load_rows = rows;
}

void process_beat(struct cluster_sim *self, uint32_t index, bool loads) {
    struct process *process = &self->process[index];
    Troupe__Heartbeat heartbeat = TROUPE__HEARTBEAT__INIT;
    message envelope = envelope_of(process);
    heartbeat.epoch = process->epoch;
    heartbeat.state = TROUPE__ACTOR_STATE__STATE_READY;
    heartbeat.coordinator_incarnation = 1;
    heartbeat.control_address = process->address;
    effects_reset(&self->effects);
    if (process->role == ROLE_ATTENTION && loads)
        fill_loads(self, &heartbeat);
    if (process->role == ROLE_EXPERT) {
        double rows = measure_rows(self, index);
        heartbeat.rows = (uint64_t)rows;
        heartbeat.busy_ns = (uint64_t)(rows * self->task->row_ns / self->state[index].speed);
        heartbeat.copies_loading = process->lacking;
    }
    envelope.body_case = TROUPE__ENVELOPE__BODY_HEARTBEAT;
    envelope.heartbeat = &heartbeat;
    cluster_tell(self, process, &envelope);
}

/* ---- copies ---- */

static void set_loading(struct cluster_sim *self, uint32_t index, bool loading) {
    if (self->state[index].loading == loading)
        return;
    measure_advance(self);
    self->state[index].loading = loading;
    measure_loading(self);
}

static void load_next(struct cluster_sim *self, uint32_t index) {
    struct process *process = &self->process[index];
    if (process->loading)
        return;
    set_loading(self, index, process->lacking > 0);
    if (process->lacking == 0) {
        if (process->operation != 0)
            happen(self, (struct happening){.time_ns = cluster_delay(self),
                                            .kind = HAPPENS_READY,
                                            .process = index,
                                            .incarnation = process->incarnation,
                                            .value = process->operation});
        return;
    }
    while (!process->wanted[process->next_pair] || process->held[process->next_pair])
        process->next_pair = (process->next_pair + 1) % self->pairs;
    process->loading = true;
    double seconds = (double)self->task->expert_bytes / process->group->load_bytes_s;
    happen(self, (struct happening){.time_ns = (uint64_t)(seconds * 1e9) + 1,
                                    .kind = HAPPENS_LOADED,
                                    .process = index,
                                    .incarnation = process->incarnation,
                                    .value = process->next_pair});
}

void process_loaded(struct cluster_sim *self, uint32_t index, uint32_t pair) {
    struct process *process = &self->process[index];
    struct cluster_figures *figures = measure_figures(self);
    process->loading = false;
    if (!process->held[pair] && process->wanted[pair])
        process->lacking--;
    process->held[pair] = true;
    if (figures != NULL) {
        figures->copies++;
        figures->bytes += self->task->expert_bytes;
    } else {
        self->report.first_copies++;
    }
    load_next(self, index);
}

static void on_assign(struct cluster_sim *self, uint32_t index, const Troupe__Assign *assign) {
    struct process *process = &self->process[index];
    if (assign->incarnation != process->incarnation || assign->operation < process->operation)
        return;
    bool again = assign->operation == process->operation;
    process->operation = assign->operation;
    if (again && (process->lacking > 0 || process->loading))
        return; /* on its way */
    memset(process->wanted, 0, self->pairs * sizeof *process->wanted);
    process->lacking = 0;
    for (size_t i = 0; i < assign->n_layer; i++) {
        uint32_t pair = assign->layer[i] * self->config.experts + assign->expert[i];
        process->lacking += !process->held[pair] && !process->wanted[pair];
        process->wanted[pair] = true;
    }
    load_next(self, index);
}

static void on_release(struct cluster_sim *self, uint32_t index, const Troupe__Release *release) {
    struct process *process = &self->process[index];
    if (release->incarnation != process->incarnation || release->operation < process->operation)
        return;
    for (size_t i = 0; i < release->n_layer; i++) {
        uint32_t pair = release->layer[i] * self->config.experts + release->expert[i];
        process->lacking += process->wanted[pair] && process->held[pair];
        process->held[pair] = false;
        process->lacking -= process->wanted[pair];
        process->wanted[pair] = false;
    }
    process->operation = release->operation;
    load_next(self, index);
}

void process_ready(struct cluster_sim *self, uint32_t index, uint64_t operation) {
    struct process *process = &self->process[index];
    Troupe__Ready ready = TROUPE__READY__INIT;
    message envelope = envelope_of(process);
    ready.operation = operation;
    ready.ok = true;
    envelope.body_case = TROUPE__ENVELOPE__BODY_READY;
    envelope.ready = &ready;
    cluster_tell(self, process, &envelope);
}

/* ---- epochs ---- */

static uint32_t index_of(const struct cluster_sim *self, const Troupe__Commit *commit,
                         actor_id holder) {
    for (uint32_t low = 0, high = (uint32_t)commit->n_member; low < high;) { /* ascending ids */
        uint32_t middle = low + (high - low) / 2;
        const Troupe__Member *member = commit->member[middle];
        if (member->id == holder)
            return self->seat[holder % ACTORS_MAX];
        if (member->id < holder)
            low = middle + 1;
        else
            high = middle;
    }
    return UINT32_MAX;
}

/* Entries by pair: a counting sort. */
static struct placement *placement_read(const struct cluster_sim *self,
                                        const Troupe__Commit *commit) {
    struct placement *ret = calloc(1, sizeof *ret);
    ASSERT(ret != NULL);
    struct cost_placement *copies = &ret->copies;
    copies->first = calloc((size_t)self->pairs + 2, sizeof *copies->first);
    copies->holder = calloc(commit->n_layer + 1, sizeof *copies->holder);
    ASSERT(copies->first != NULL && copies->holder != NULL);
    ret->refs = 1;
    for (size_t i = 0; i < commit->n_layer; i++)
        copies->first[commit->layer[i] * self->config.experts + commit->expert[i] + 2]++;
    for (uint32_t pair = 0; pair < self->pairs; pair++)
        copies->first[pair + 2] += copies->first[pair + 1];
    for (size_t i = 0; i < commit->n_layer; i++) {
        uint32_t process = index_of(self, commit, commit->holder[i]);
        uint32_t pair = commit->layer[i] * self->config.experts + commit->expert[i];
        ASSERT(process < self->experts);
        copies->holder[copies->first[pair + 1]++] = (uint16_t)process;
    }
    return ret;
}

static void acknowledge(struct cluster_sim *self, uint32_t index) {
    happen(self, (struct happening){.time_ns = cluster_delay(self),
                                    .kind = HAPPENS_ACK,
                                    .process = index,
                                    .incarnation = self->process[index].incarnation});
}

void process_adopt(struct cluster_sim *self, uint32_t index, struct parcel *parcel) {
    struct process *process = &self->process[index];
    const Troupe__Commit *commit = parcel->message->commit;
    if (commit->epoch <= process->epoch)
        return;
    measure_change(self);
    process->epoch = commit->epoch;
    if (parcel->placement == NULL)
        parcel->placement = placement_read(self, commit);
    placement_drop(&process->placement);
    process->placement = parcel->placement;
    process->placement->refs++;
    acknowledge(self, index);
    if (commit->serving && self->serving_epoch == 0)
        self->serving_epoch = commit->epoch;
    bool all = self->serving_epoch != 0;
    for (uint32_t i = 0; i < self->task->attention; i++)
        all = all && self->process[self->experts + i].epoch >= self->serving_epoch;
    if (all && self->begin_ns == NEVER)
        measure_begin(self);
}

static void on_commit(struct cluster_sim *self, uint32_t index, struct parcel *parcel) {
    struct process *process = &self->process[index];
    if (parcel->message->commit->epoch <= process->epoch)
        return;
    if (process->role == ROLE_ATTENTION) {
        parcel->refs++;
        happen(self, (struct happening){.time_ns = random_between(&self->random, 0, ADOPT_MAX_NS),
                                        .kind = HAPPENS_ADOPT,
                                        .process = index,
                                        .incarnation = process->incarnation,
                                        .parcel = parcel});
        return;
    }
    process->epoch = parcel->message->commit->epoch;
    if (process->role == ROLE_GATEWAY)
        feed_commit(self, parcel->message->commit);
    acknowledge(self, index);
}

/* ---- messages ---- */

static void on_welcome(struct cluster_sim *self, uint32_t index, const Troupe__Welcome *welcome) {
    struct process *process = &self->process[index];
    if (welcome->incarnation != process->incarnation || process->id != 0)
        return;
    process->id = welcome->id;
    happen(self, (struct happening){
                     .time_ns = random_between(&self->random, 1, welcome->heartbeat_interval_ns),
                     .kind = HAPPENS_BEAT,
                     .process = index,
                     .incarnation = process->incarnation});
}

void process_take(struct cluster_sim *self, uint32_t index, struct parcel *parcel) {
    const Troupe__Envelope *envelope = parcel->message;
    switch (envelope->body_case) {
    case TROUPE__ENVELOPE__BODY_WELCOME:
        on_welcome(self, index, envelope->welcome);
        break;
    case TROUPE__ENVELOPE__BODY_COMMIT:
        on_commit(self, index, parcel);
        break;
    case TROUPE__ENVELOPE__BODY_STATS:
        feed_stats(self, envelope->stats);
        break;
    case TROUPE__ENVELOPE__BODY_ASSIGN:
        on_assign(self, index, envelope->assign);
        break;
    case TROUPE__ENVELOPE__BODY_RELEASE:
        on_release(self, index, envelope->release);
        break;
    case TROUPE__ENVELOPE__BODY_REFUSED:
        fail(&self->refused, ERR_STATE, "the coordinator refused %s: %s", self->process[index].name,
             envelope->refused->reason);
        break;
    case TROUPE__ENVELOPE__BODY_SHUTDOWN: /* drained */
        process_stop(self, index);
        break;
    default:
        break;
    }
}
