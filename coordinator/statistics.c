/* What the coordinator tells about the troupe: STATS to gateways and control clients each heartbeat
 * interval, STATUS when asked. */
#include "coordinator/coordinator.h"

#include <string.h>

#define LOADS_MAX 32768u /* entries of one STATS */

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

void statistics_forget(struct coordinator *self, const struct seat *seat) {
    for (uint32_t i = 0; seat->load != NULL && i < self->pairs; i++)
        self->load_of_gone[i] += seat->load[i];
}

static uint64_t total_load(const struct coordinator *self, uint32_t pair) {
    uint64_t total = self->load_of_gone[pair];
    for (uint32_t i = 0; i < self->seats; i++)
        if (self->seat[i].load != NULL)
            total += self->seat[i].load[pair];
    return total;
}

static void fill_loads(const struct coordinator *self, Troupe__Stats *stats, struct effects *out) {
    uint32_t limit = self->pairs < LOADS_MAX ? self->pairs : LOADS_MAX, count = 0;
    stats->load_layer = effects_alloc(out, limit * sizeof(uint32_t));
    stats->load_expert = effects_alloc(out, limit * sizeof(uint32_t));
    stats->load_rows = effects_alloc(out, limit * sizeof(uint64_t));
    for (uint32_t pair = 0; pair < self->pairs && count < limit; pair++) {
        uint64_t total = total_load(self, pair);
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
