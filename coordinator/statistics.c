/* What the coordinator tells about the troupe: STATS to gateways and control clients each heartbeat
 * interval, STATUS when asked. */
#include "coordinator/coordinator.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define WINDOWS_BYTES_MAX (256u << 20) /* of one recording */
#define LOADS_MAX 32768u /* entries of one STATS */
#define ENDED_TOLD_NS 10000000000u /* operations that ended so long ago are still told of */

void statistics_take_loads(struct coordinator *self, struct seat *seat,
                           const Troupe__Heartbeat *heartbeat) {
    if (seat->load == NULL)
        return;
    for (size_t i = 0; i < heartbeat->n_load_rows; i++) {
        uint32_t layer = heartbeat->load_layer[i], expert = heartbeat->load_expert[i];
        if (layer >= self->config.layers || expert >= self->config.experts)
            continue;
        uint64_t *total = &seat->load[layer * self->config.experts + expert];
        if (heartbeat->load_rows[i] > *total) /* a late heartbeat does not turn the total back */
            *total = heartbeat->load_rows[i];
    }
}

void statistics_take_answers(struct seat *seat, const Troupe__Heartbeat *heartbeat) {
    if (seat->role != ROLE_ATTENTION)
        return;
    free(seat->answers);
    seat->answering = 0;
    seat->answers = calloc(heartbeat->n_peer + 1, sizeof *seat->answers);
    for (size_t i = 0; seat->answers != NULL && i < heartbeat->n_peer; i++)
        seat->answers[seat->answering++] =
            (struct answers){heartbeat->peer[i], heartbeat->peer_queue[i], heartbeat->peer_p50_us[i],
                             heartbeat->peer_p99_us[i]};
}

static uint32_t larger(uint32_t a, uint32_t b) {
    return a > b ? a : b;
}

struct answers statistics_answers(const struct coordinator *self, actor_id from) {
    struct answers all = {.from = from};
    for (uint32_t i = 0; i < self->seats; i++)
        for (uint32_t j = 0; j < self->seat[i].answering; j++) {
            const struct answers *its = &self->seat[i].answers[j];
            if (its->from != from)
                continue;
            all.queue += its->queue;
            all.p50_us = larger(all.p50_us, its->p50_us);
            all.p99_us = larger(all.p99_us, its->p99_us);
        }
    return all;
}

void statistics_forget(struct coordinator *self, const struct seat *seat) {
    for (uint32_t i = 0; seat->load != NULL && i < self->pairs; i++)
        self->load_of_gone[i] += seat->load[i];
}

uint64_t statistics_load(const struct coordinator *self, uint32_t pair) {
    uint64_t total = self->load_of_gone[pair];
    for (uint32_t i = 0; i < self->seats; i++)
        if (self->seat[i].load != NULL)
            total += self->seat[i].load[pair];
    return total;
}

/* ---- recording ---- */

int recording_start(struct coordinator *self, uint64_t window_ms, uint64_t now_ns,
                    struct failure *failure) {
    struct recording *recording = &self->recording;
    if (window_ms < 10 || window_ms > 86400000)
        return fail(failure, ERR_INVALID, "window_ms: 10 to 86400000 expected, found %llu",
                    (unsigned long long)window_ms);
    if (self->moe_pairs == 0)
        return fail(failure, ERR_UNSUPPORTED, "the model has no routed experts");
    if (recording->before == NULL)
        recording->before = calloc((size_t)self->pairs + 1, sizeof *recording->before);
    if (recording->before == NULL)
        return fail(failure, ERR_NO_MEMORY, "no memory for a recording of %u loads", self->pairs);
    for (uint32_t pair = 0; pair < self->pairs; pair++)
        recording->before[pair] = statistics_load(self, pair);
    recording->windows = 0;
    recording->window_ns = window_ms * 1000000u;
    recording->next_ns = now_ns + recording->window_ns;
    recording->on = true;
    return 0;
}

void recording_stop(struct coordinator *self) {
    self->recording.on = false;
}

static bool grow(struct coordinator *self) {
    struct recording *recording = &self->recording;
    if (recording->windows < recording->capacity)
        return true;
    uint32_t capacity = recording->capacity == 0 ? 16 : recording->capacity * 2;
    size_t bytes = (size_t)capacity * self->pairs * sizeof *recording->rows;
    uint32_t *rows = bytes <= WINDOWS_BYTES_MAX ? realloc(recording->rows, bytes) : NULL;
    if (rows == NULL)
        return false;
    recording->rows = rows;
    recording->capacity = capacity;
    return true;
}

void recording_timer(struct coordinator *self, uint64_t now_ns) {
    struct recording *recording = &self->recording;
    while (recording->on && now_ns >= recording->next_ns) {
        if (!grow(self)) { /* what there is can still be dumped */
            recording->on = false;
            return;
        }
        uint32_t *row = recording->rows + (size_t)recording->windows++ * self->pairs;
        for (uint32_t pair = 0; pair < self->pairs; pair++) {
            uint64_t total = statistics_load(self, pair), rows = total - recording->before[pair];
            row[pair] = rows < INT32_MAX ? (uint32_t)rows : INT32_MAX;
            recording->before[pair] = total;
        }
        recording->next_ns += recording->window_ns;
    }
}

/* Layers without experts are left out: the trace has the MoE layers only, in order. */
uint8_t *recording_file(const struct coordinator *self, size_t *ret_size, struct effects *out) {
    const struct recording *recording = &self->recording;
    uint32_t experts = self->config.experts, layers = experts > 0 ? self->moe_pairs / experts : 0;
    size_t data = (size_t)recording->windows * self->moe_pairs * sizeof(int32_t);
    char header[512];
    int length = snprintf(header, sizeof header,
                          "{\"__metadata__\":{\"window_ms\":\"%llu\",\"model\":\"%.64s\"},"
                          "\"expert_load\":{\"dtype\":\"I32\",\"shape\":[%u,%u,%u],"
                          "\"data_offsets\":[0,%zu]}}",
                          (unsigned long long)(recording->window_ns / 1000000u),
                          self->identity.model_fingerprint, recording->windows, layers, experts,
                          data);
    while (length % 8 != 0)
        header[length++] = ' ';
    uint64_t header_bytes = (uint64_t)length;
    uint8_t *file = effects_alloc(out, 8 + (size_t)length + data), *at = file + 8 + length;
    memcpy(file, &header_bytes, 8);
    memcpy(file + 8, header, (size_t)length);
    for (uint32_t window = 0; window < recording->windows; window++)
        for (uint32_t pair = 0; pair < self->pairs; pair++)
            if (self->is_moe[pair / experts]) {
                memcpy(at, &recording->rows[(size_t)window * self->pairs + pair], sizeof(int32_t));
                at += sizeof(int32_t);
            }
    *ret_size = 8 + (size_t)length + data;
    return file;
}

/* ---- what is told ---- */

static void fill_loads(const struct coordinator *self, Troupe__Stats *stats, struct effects *out) {
    uint32_t limit = self->pairs < LOADS_MAX ? self->pairs : LOADS_MAX, count = 0;
    stats->load_layer = effects_alloc(out, limit * sizeof(uint32_t));
    stats->load_expert = effects_alloc(out, limit * sizeof(uint32_t));
    stats->load_rows = effects_alloc(out, limit * sizeof(uint64_t));
    for (uint32_t pair = 0; pair < self->pairs && count < limit; pair++) {
        uint64_t total = statistics_load(self, pair);
        if (total == 0)
            continue;
        stats->load_layer[count] = pair / self->config.experts;
        stats->load_expert[count] = pair % self->config.experts;
        stats->load_rows[count++] = total;
    }
    stats->n_load_layer = stats->n_load_expert = stats->n_load_rows = count;
}

static Troupe__ActorStats **actor_stats(const struct coordinator *self, uint64_t now_ns,
                                        struct effects *out) {
    Troupe__ActorStats **list = effects_alloc(out, self->seats * sizeof *list);
    for (uint32_t i = 0; i < self->seats; i++) {
        const struct seat *seat = &self->seat[i];
        list[i] = effects_alloc(out, sizeof *list[i]);
        troupe__actor_stats__init(list[i]);
        list[i]->member = membership_member(seat, out);
        list[i]->heartbeat = seat->has_heartbeat ? (Troupe__Heartbeat *)&seat->heartbeat : NULL;
        list[i]->heartbeat_age_ns = now_ns > seat->heard_ns ? now_ns - seat->heard_ns : 0;
    }
    return list;
}

static const char *const SCALED_ROLE[] = {[ROLE_ATTENTION] = "attention",
                                          [ROLE_EXPERT] = "experts",
                                          [ROLE_SAMPLER] = "samplers"};

static void describe_operation(const struct coordinator *self, const struct operation *operation,
                               char *ret, size_t room) {
    const struct change *change = operation->change;
    if (operation->kind == OPERATION_SCALE)
        snprintf(ret, room, "%s to %u", SCALED_ROLE[operation->role], operation->count);
    else if (operation->kind == OPERATION_DRAIN)
        snprintf(ret, room, "%.48s", operation->parties > 0 ? operation->party[0].name : "");
    else if (operation->changes == 1)
        snprintf(ret, room, "expert %u of layer %u", change->pair % self->config.experts,
                 change->pair / self->config.experts);
    else
        snprintf(ret, room, "%u copies", operation->changes);
}

/* Copies that have come (or, where none comes, left) and processes that are where they should be. */
static uint32_t count_done(const struct coordinator *self, const struct operation *operation) {
    uint32_t done = 0;
    for (uint32_t i = 0; i < operation->changes; i++) {
        const struct change *change = &operation->change[i];
        const struct seat *seat = seat_find(self, change->to != 0 ? change->to : change->from);
        bool active = seat != NULL && seat->copy != NULL &&
                      (seat->copy[change->pair] & COPY_ACTIVE) != 0;
        bool held = seat != NULL && seat->assigned != NULL &&
                    seat->assigned[change->pair] == ASSIGNED_HELD;
        done += change->to != 0 ? active || held : !active;
    }
    for (uint32_t i = 0; i < operation->parties; i++) {
        const struct party *party = &operation->party[i];
        const struct seat *seat = party->id != 0 ? seat_find(self, party->id) : NULL;
        done += operation->starting ? seat != NULL && seat->ready : party->gone;
    }
    return done;
}

static void fill_operations(const struct coordinator *self, Troupe__Stats *stats, uint64_t now_ns,
                            struct effects *out) {
    stats->operation = effects_alloc(out, OPERATIONS_MAX * sizeof *stats->operation);
    for (uint32_t i = 0; i < OPERATIONS_MAX; i++) {
        const struct operation *operation = &self->operation[i];
        bool ended = operation_ended(operation);
        if (operation->id == 0 || (ended && now_ns > operation->ended_ns + ENDED_TOLD_NS))
            continue;
        char about[64];
        describe_operation(self, operation, about, sizeof about);
        Troupe__OperationStats *told = effects_alloc(out, sizeof *told);
        troupe__operation_stats__init(told);
        told->id = operation->id;
        told->kind = (char *)operation_kind_name(operation->kind);
        told->phase = (char *)operation_phase_name(operation->phase);
        told->total = operation->changes + operation->parties;
        told->done = operation->phase == PHASE_DONE ? told->total : count_done(self, operation);
        told->age_ns = (ended ? operation->ended_ns : now_ns) - operation->began_ns;
        told->about = effects_copy(out, about, strlen(about) + 1);
        told->reason = (char *)operation->reason;
        stats->operation[stats->n_operation++] = told;
    }
}

static bool watches(const struct seat *seat) {
    return seat->role == ROLE_GATEWAY || seat->role == ROLE_CONTROL;
}

void statistics_send(struct coordinator *self, uint64_t now_ns, struct effects *out) {
    Troupe__Stats stats = TROUPE__STATS__INIT;
    bool filled = false;
    for (uint32_t i = 0; i < self->seats; i++) {
        if (!watches(&self->seat[i]))
            continue;
        if (!filled) {
            filled = true;
            stats.epoch = self->epoch;
            stats.n_actor = self->seats;
            stats.actor = actor_stats(self, now_ns, out);
            fill_loads(self, &stats, out);
            quarantine_fill(self, &stats, out);
            fill_operations(self, &stats, now_ns, out);
        }
        message envelope = coordinator_envelope(self);
        envelope.body_case = TROUPE__ENVELOPE__BODY_STATS;
        envelope.stats = &stats;
        effects_send(out, self->seat[i].id, &envelope);
    }
}

void statistics_on_request(struct coordinator *self, const message *envelope, uint64_t now_ns,
                           struct effects *out) {
    Troupe__Status status = TROUPE__STATUS__INIT;
    status.commit = membership_commit(self, out);
    status.n_actor = self->seats;
    status.actor = actor_stats(self, now_ns, out);
    status.token = envelope->status_request->token;
    message answer = coordinator_envelope(self);
    answer.body_case = TROUPE__ENVELOPE__BODY_STATUS;
    answer.status = &status;
    effects_send(out, envelope->from, &answer);
}
