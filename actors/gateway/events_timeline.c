/* The timeline: what each epoch changed, and for each lost actor how the troupe repaired itself.
 *
 *   LOST     an actor of the epoch before is missing and had not been draining
 *   replaced every pair that ever had a holder has one again
 *   serving  the epoch says so
 *   resumed  the first token of anybody after it has come
 *   back     an actor of the same name and role is READY
 *   OPERATION  of the admin interface: what STATS last said of it
 *   BIAS     requests are admitted with another version of the routing bias
 *
 * Times are this gateway's: when the COMMIT arrived. */
#include "actors/gateway/events.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "actors/gateway/gateway.h"

static struct moment *add_moment(struct event_feed *self, enum moment_kind kind, uint64_t now_ns) {
    struct moment *moment = &self->moment[++self->moments % EVENTS_MOMENTS];
    *moment = (struct moment){.kind = kind,
                              .number = self->moments,
                              .at_ns = now_ns,
                              .epoch = self->epoch,
                              .changed = true,
                              .silent_ns = NEVER,
                              .fenced_ns = NEVER,
                              .resumed_ns = NEVER,
                              .replaced_ns = NEVER,
                              .serving_ns = NEVER,
                              .back_ns = NEVER};
    return moment;
}

static struct moment *add_actor(struct event_feed *self, enum moment_kind kind,
                                const struct event_member *member, uint64_t now_ns) {
    struct moment *moment = add_moment(self, kind, now_ns);
    moment->actor = member->id;
    moment->incarnation = member->incarnation;
    moment->role = member->role;
    moment->copies = member->copies;
    memcpy(moment->name, member->name, sizeof moment->name);
    return moment;
}

static int by_id(const void *a, const void *b) {
    const struct event_member *left = a, *right = b;
    return (left->id > right->id) - (left->id < right->id);
}

static struct event_member *find(struct event_member *list, uint32_t count, actor_id id) {
    struct event_member key = {.id = id};
    return count == 0 ? NULL : bsearch(&key, list, count, sizeof *list, by_id);
}

const char *events_name_of(const struct event_feed *self, actor_id id) {
    const struct event_member *member = find(self->member, self->members, id);
    if (member != NULL)
        return member->name;
    uint64_t oldest = self->moments >= EVENTS_MOMENTS ? self->moments - EVENTS_MOMENTS + 1 : 1;
    for (uint64_t n = self->moments; n >= oldest && n > 0; n--) {
        const struct moment *moment = &self->moment[n % EVENTS_MOMENTS];
        if (moment->kind != MOMENT_EPOCH && moment->actor == id)
            return moment->name;
    }
    return NULL;
}

/* The commit's members without those that only look on. */
static struct event_member *take_members(const Troupe__Commit *commit, uint32_t *ret_count) {
    struct event_member *list = calloc(commit->n_member + 1, sizeof *list);
    uint32_t count = 0;
    ASSERT(list != NULL && "memory for the live view");
    for (size_t i = 0; i < commit->n_member; i++) {
        const Troupe__Member *member = commit->member[i];
        if (member->role == TROUPE__ROLE__ROLE_CONTROL)
            continue;
        struct event_member *taken = &list[count++];
        taken->id = member->id;
        taken->incarnation = member->incarnation;
        taken->role = (enum role)member->role;
        taken->state = member->state;
        snprintf(taken->name, sizeof taken->name, "%s", member->name);
        snprintf(taken->host, sizeof taken->host, "%s", member->host);
    }
    qsort(list, count, sizeof *list, by_id);
    *ret_count = count;
    return list;
}

/* Who of `member` holds each entry of the placement. Returns how many pairs have a holder. */
static uint32_t take_placement(struct event_feed *self, const struct cluster_view *cluster) {
    self->placed = cluster->first[cluster->layers];
    self->holder_of = gateway_grow(self->holder_of, &self->holder_of_capacity, self->placed,
                                   sizeof *self->holder_of);
    for (uint32_t i = 0; i < self->placed; i++) {
        struct event_member *holder =
            find(self->member, self->members, cluster->placement[i].holder);
        self->holder_of[i] = holder == NULL ? UINT32_MAX : (uint32_t)(holder - self->member);
        if (holder != NULL)
            holder->copies++;
    }
    uint32_t covered = 0;
    for (size_t i = 0; i < (size_t)cluster->layers * cluster->experts; i++)
        covered += cluster->replicas[i] > 0;
    return covered;
}

static uint64_t silence(const struct event_feed *self, const struct cluster_view *cluster,
                        const struct event_member *member, uint64_t now_ns) {
    for (size_t i = 0; cluster->stats != NULL && i < cluster->stats->n_actor; i++) {
        const Troupe__ActorStats *actor = cluster->stats->actor[i];
        if (actor->member != NULL && actor->member->id == member->id &&
            actor->member->incarnation == member->incarnation)
            return actor->heartbeat_age_ns + (now_ns - self->stats_ns);
    }
    return NEVER;
}

/* The coordinator knows better than the last STATS. */
static void take_loss(struct moment *moment, const Troupe__Commit *commit) {
    for (size_t i = 0; i < commit->n_lost; i++) {
        const Troupe__Loss *loss = commit->lost[i];
        if (loss->incarnation != moment->incarnation)
            continue;
        moment->silent_ns = loss->silent_ns;
        moment->fenced_ns = loss->fenced_ns;
        snprintf(moment->why, sizeof moment->why, "%s", loss->reason);
    }
}

static void note_departures(struct event_feed *self, const struct cluster_view *cluster,
                            const Troupe__Commit *commit, struct event_member *before,
                            uint32_t count, uint64_t now_ns) {
    for (uint32_t i = 0; i < count; i++) {
        const struct event_member *now = find(self->member, self->members, before[i].id);
        if (now != NULL && now->incarnation == before[i].incarnation)
            continue;
        bool left = before[i].state == TROUPE__ACTOR_STATE__STATE_DRAINING;
        struct moment *moment =
            add_actor(self, left ? MOMENT_LEFT : MOMENT_LOST, &before[i], now_ns);
        moment->silent_ns = silence(self, cluster, &before[i], now_ns);
        take_loss(moment, commit);
        moment->busy = self->busy;
        self->unresumed += !left && self->busy;
        if (!left && self->metrics != NULL)
            self->metrics->counter[METRIC_LOST]++;
    }
}

static void note_arrivals(struct event_feed *self, struct event_member *before, uint32_t count,
                          uint64_t now_ns) {
    for (uint32_t i = 0; i < self->members; i++) {
        const struct event_member *was = find(before, count, self->member[i].id);
        if (was == NULL || was->incarnation != self->member[i].incarnation)
            add_actor(self, MOMENT_JOINED, &self->member[i], now_ns);
    }
}

static bool has_returned(const struct event_feed *self, const struct moment *moment) {
    for (uint32_t i = 0; i < self->members; i++)
        if (self->member[i].role == moment->role &&
            self->member[i].incarnation != moment->incarnation &&
            self->member[i].state == TROUPE__ACTOR_STATE__STATE_READY &&
            strcmp(self->member[i].name, moment->name) == 0)
            return true;
    return false;
}

static void reach(struct moment *moment, uint64_t *when_ns, uint64_t now_ns) {
    if (*when_ns != NEVER)
        return;
    *when_ns = now_ns;
    moment->changed = true;
}

static void note_repairs(struct event_feed *self, bool whole, uint64_t now_ns) {
    uint64_t oldest = self->moments >= EVENTS_MOMENTS ? self->moments - EVENTS_MOMENTS + 1 : 1;
    self->unrepaired_ns = NEVER;
    for (uint64_t n = oldest; n <= self->moments; n++) {
        struct moment *moment = &self->moment[n % EVENTS_MOMENTS];
        if (moment->kind != MOMENT_LOST)
            continue;
        bool good = moment->replaced_ns != NEVER && moment->serving_ns != NEVER;
        if (whole)
            reach(moment, &moment->replaced_ns, now_ns);
        if (self->serving)
            reach(moment, &moment->serving_ns, now_ns);
        if (moment->replaced_ns == NEVER || moment->serving_ns == NEVER)
            self->unrepaired_ns =
                moment->at_ns < self->unrepaired_ns ? moment->at_ns : self->unrepaired_ns;
        else if (!good && self->metrics != NULL)
            metrics_observe(self->metrics, METRIC_RECOVERY,
                            (double)(now_ns - moment->at_ns) * 1e-9);
        if (has_returned(self, moment))
            reach(moment, &moment->back_ns, now_ns);
    }
}

void events_token(struct event_feed *self, uint64_t now_ns) {
    if (self->unresumed == 0)
        return;
    self->unresumed = 0;
    uint64_t oldest = self->moments >= EVENTS_MOMENTS ? self->moments - EVENTS_MOMENTS + 1 : 1;
    for (uint64_t n = oldest; n <= self->moments; n++)
        if (self->moment[n % EVENTS_MOMENTS].kind == MOMENT_LOST &&
            self->moment[n % EVENTS_MOMENTS].busy)
            reach(&self->moment[n % EVENTS_MOMENTS], &self->moment[n % EVENTS_MOMENTS].resumed_ns,
                  now_ns);
}

/* ---- operations ---- */

static bool has_ended(const struct moment *moment) {
    return strcmp(moment->phase, "done") == 0 || strcmp(moment->phase, "aborted") == 0 ||
           strcmp(moment->phase, "unknown") == 0;
}

static void take_operation(struct event_feed *self, const Troupe__OperationStats *told,
                           uint64_t now_ns) {
    struct moment *moment = NULL;
    uint64_t oldest = self->moments >= EVENTS_MOMENTS ? self->moments - EVENTS_MOMENTS + 1 : 1;
    for (uint64_t n = oldest; n <= self->moments && moment == NULL; n++) {
        struct moment *at = &self->moment[n % EVENTS_MOMENTS];
        /* a coordinator that was started again counts from 1 again */
        if (at->kind == MOMENT_OPERATION && at->operation == told->id &&
            strcmp(at->what, told->kind) == 0 && strcmp(at->name, told->about) == 0 &&
            (!has_ended(at) || strcmp(at->phase, told->phase) == 0))
            moment = at;
    }
    if (moment == NULL) {
        moment = add_moment(self, MOMENT_OPERATION, now_ns - told->age_ns);
        moment->operation = told->id;
        snprintf(moment->what, sizeof moment->what, "%s", told->kind);
        snprintf(moment->name, sizeof moment->name, "%s", told->about);
    }
    bool same = moment->done == told->done && moment->total == told->total &&
                strcmp(moment->phase, told->phase) == 0;
    moment->changed = moment->changed || !same;
    moment->done = told->done;
    moment->total = told->total;
    moment->age_ns = told->age_ns;
    snprintf(moment->phase, sizeof moment->phase, "%s", told->phase);
    snprintf(moment->why, sizeof moment->why, "%s", told->reason);
}

void events_stats(struct event_feed *self, const Troupe__Stats *stats, uint64_t now_ns) {
    self->stats_ns = now_ns;
    uint64_t oldest = self->moments >= EVENTS_MOMENTS ? self->moments - EVENTS_MOMENTS + 1 : 1;
    for (uint64_t n = oldest; n <= self->moments; n++) {
        struct moment *moment = &self->moment[n % EVENTS_MOMENTS];
        bool told = moment->kind != MOMENT_OPERATION || has_ended(moment);
        for (size_t i = 0; i < stats->n_operation && !told; i++)
            told = stats->operation[i]->id == moment->operation;
        if (told)
            continue;
        moment->changed = true; /* its coordinator is gone, and it with it */
        snprintf(moment->phase, sizeof moment->phase, "unknown");
    }
    for (size_t i = 0; i < stats->n_operation; i++)
        take_operation(self, stats->operation[i], now_ns);
}

/* ---- epochs ---- */

void events_commit(struct event_feed *self, const struct cluster_view *cluster,
                   const Troupe__Commit *commit, uint64_t now_ns) {
    struct event_member *before = self->member;
    uint32_t count = self->members;
    self->member = take_members(commit, &self->members);
    self->epoch = commit->epoch;
    self->serving = commit->serving;
    uint64_t bias_before = self->bias_version;
    self->bias_version = bias_number(commit->bias_version);
    self->epoch_changed = true;
    uint32_t covered = take_placement(self, cluster);
    if (covered > self->covered)
        self->covered = covered;
    struct moment *epoch = add_moment(self, MOMENT_EPOCH, now_ns);
    epoch->members = self->members;
    epoch->serving = self->serving;
    if (self->bias_version != bias_before && before != NULL) {
        struct moment *bias = add_moment(self, MOMENT_BIAS, now_ns);
        bias->bias_before = bias_before;
        bias->bias_version = self->bias_version;
    }
    note_departures(self, cluster, commit, before, count, now_ns);
    note_arrivals(self, before, count, now_ns);
    note_repairs(self, covered >= self->covered, now_ns);
    free(before);
}
