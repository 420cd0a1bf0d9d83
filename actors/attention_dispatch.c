/* Rows of one MoE layer to the experts and back.
 *
 * The gate's choices become items (row, slot, expert); router/dispatch.h cuts them into parts, one
 * frame each. A part is answered by COMBINE frames, which are scattered to (row, slot): a long one in
 * pieces, which come one by one and may be lost one by one. A part that is not answered whole - MOVED, holder lost, deadline passed, holder gone from the epoch - is
 * planned anew over its own range of items, with a new attempt number; items nobody alive holds
 * wait for the next epoch.
 *
 * A part that takes much longer than is usual is hedged: its items are sent to other replicas as
 * well, in parts of their own, cut from its range without changing the order. Whoever answers an
 * item first is believed; both answers would have the same bits. A part and its hedges are a
 * family; it is over when all of its items are done.
 *
 * Invariants: 1. parts of different families are disjoint; every missing item is in at least one part that
 * is not free, and in at most one that is no hedge and one that is; 2. an answer counts only if it
 * matches an outstanding part in sender, incarnation, batch, layer, part, attempt and sizes; 3. an item
 * is scattered once (item_done), by the first answer that counts; 4. items are reordered only
 * while no outstanding part covers them; 5. the first plan of a layer uses one epoch. */
#include "actors/attention.h"

#include <stdlib.h>
#include <string.h>

#define HEDGE_QUANTILE       0.95
#define HEDGE_UNKNOWN_FLOORS 5u /* floors to wait while the usual time is not known */
#define HEDGE_AGAIN          3u /* times the hedging time until the same process is asked again */
#define SUSPICION_MIN_NS     100000000u
#define ANSWERS_KEPT         0.95 /* of what is remembered of answers, with each further one */
#define ANSWER_ITEMS         8.0  /* an answer costs about as much beside its items, so that small ones do not look slow */
#define FORGIVENESS          0.9995 /* of its slowness, with each layer */
#define SPEED_NOISE          1.5  /* processes within this factor of the fastest are taken to be as fast */

/* ---- memory ---- */

bool flight_init(struct attention *self) {
    struct flight *flight = &self->batch.flight;
    size_t items = (size_t)self->settings.batch_tokens * self->k;
    if (items == 0)
        items = 1;
    flight->item_row = calloc(items, sizeof *flight->item_row);
    flight->item_slot = calloc(items, sizeof *flight->item_slot);
    flight->item_expert = calloc(items, sizeof *flight->item_expert);
    flight->item_done = calloc(items, sizeof *flight->item_done);
    flight->part = calloc(2 * items, sizeof *flight->part);
    flight->free_part = calloc(2 * items, sizeof *flight->free_part);
    flight->planned = calloc(items, sizeof *flight->planned);
    return flight->item_row != NULL && flight->item_slot != NULL && flight->item_expert != NULL &&
           flight->item_done != NULL && flight->part != NULL && flight->free_part != NULL && flight->planned != NULL &&
           dispatch_plan_init(&flight->plan, (uint32_t)items, ACTORS_MAX) == 0;
}

void flight_free(struct attention *self) {
    struct flight *flight = &self->batch.flight;
    free(flight->item_row);
    free(flight->item_slot);
    free(flight->item_expert);
    free(flight->item_done);
    free(flight->part);
    free(flight->free_part);
    free(flight->planned);
    if (flight->plan.scratch != NULL)
        dispatch_plan_free(&flight->plan);
}

/* ---- placement of the adopted epoch ---- */

static void *grown(void *memory, size_t count, size_t size) {
    void *ret = realloc(memory, (count > 0 ? count : 1) * size);
    ASSERT(ret != NULL && "memory for a placement");
    return ret;
}

static void take_destinations(struct attention *self) {
    uint32_t count = 0;
    for (uint32_t i = 0; i < self->member.peers; i++)
        count += self->member.peer[i].role == ROLE_EXPERT;
    if (count > self->destinations_capacity) {
        self->destination = grown(self->destination, count, sizeof *self->destination);
        self->former = grown(self->former, count, sizeof *self->former);
        self->alive = grown(self->alive, count, sizeof *self->alive);
        self->queued = grown(self->queued, count, sizeof *self->queued);
        self->cost = grown(self->cost, count, sizeof *self->cost);
        self->destinations_capacity = count;
    }
    uint32_t former = self->destinations, at = 0;
    if (former > 0)
        memcpy(self->former, self->destination, former * sizeof *self->former);
    self->destinations = 0;
    for (uint32_t i = 0; i < self->member.peers && self->destinations < ACTORS_MAX; i++) {
        const struct peer *peer = &self->member.peer[i];
        if (peer->role != ROLE_EXPERT)
            continue;
        struct destination *destination = &self->destination[self->destinations++];
        *destination = (struct destination){.id = peer->id, .incarnation = peer->incarnation};
        while (at < former && self->former[at].id < peer->id)
            at++;
        if (at < former && self->former[at].id == peer->id &&
            self->former[at].incarnation == peer->incarnation)
            *destination = self->former[at];
    }
}

uint32_t dispatch_destination(const struct attention *self, actor_id id) {
    for (uint32_t i = 0; i < self->destinations; i++)
        if (self->destination[i].id == id)
            return i;
    return UINT32_MAX;
}

/* Entry of `first`, or UINT32_MAX for what this model does not have or nobody known holds. */
static uint32_t placement_entry(const struct attention *self, const Troupe__Commit *commit,
                                size_t i, uint32_t *ret_destination) {
    if (commit->layer[i] >= self->config.layers || commit->expert[i] >= self->config.experts)
        return UINT32_MAX;
    *ret_destination = dispatch_destination(self, commit->holder[i]);
    if (*ret_destination == UINT32_MAX)
        return UINT32_MAX;
    return commit->layer[i] * self->config.experts + commit->expert[i];
}

static int compare_u32(const void *a, const void *b) {
    uint32_t left = *(const uint32_t *)a, right = *(const uint32_t *)b;
    return left < right ? -1 : left > right;
}

static void take_placement(struct attention *self, const Troupe__Commit *commit) {
    uint32_t entries = self->config.layers * self->config.experts, destination;
    size_t count = commit->n_layer;
    if (count > self->holders_capacity) {
        self->placement_holder =
            grown(self->placement_holder, count, sizeof *self->placement_holder);
        self->holders_capacity = (uint32_t)count;
    }
    uint32_t *first = self->placement_first;
    memset(first, 0, ((size_t)entries + 1) * sizeof *first);
    for (size_t i = 0; i < count; i++) {
        uint32_t entry = placement_entry(self, commit, i, &destination);
        if (entry != UINT32_MAX)
            first[entry + 1]++;
    }
    for (uint32_t i = 0; i < entries; i++)
        first[i + 1] += first[i];
    for (size_t i = count; i-- > 0;) {
        uint32_t entry = placement_entry(self, commit, i, &destination);
        if (entry != UINT32_MAX)
            self->placement_holder[--first[entry + 1]] = destination;
    }
    /* filling from the back moved every range's end to its start: shift them into place again */
    uint32_t total = 0;
    for (size_t i = 0; i < count; i++)
        total += placement_entry(self, commit, i, &destination) != UINT32_MAX;
    memmove(first, first + 1, entries * sizeof *first);
    first[entries] = total;
    for (uint32_t i = 0; i < entries; i++)
        if (first[i + 1] - first[i] > 1)
            qsort(self->placement_holder + first[i], first[i + 1] - first[i], sizeof *first,
                  compare_u32);
    self->placement = (struct placement){self->config.layers, self->config.experts, first,
                                         self->placement_holder};
}

/* ---- parts ---- */

uint64_t parts_deadline(const struct part *part, uint32_t parts) {
    uint64_t deadline = NEVER;
    for (uint32_t i = 0; i < parts; i++) {
        if (part[i].state != PART_FREE && part[i].deadline_ns < deadline)
            deadline = part[i].deadline_ns;
        if (part[i].state == PART_SENT && part[i].hedge_at_ns < deadline)
            deadline = part[i].hedge_at_ns;
    }
    return deadline;
}

static struct part *part_new(struct flight *flight) {
    if (flight->free_parts > 0)
        return &flight->part[flight->free_part[--flight->free_parts]];
    return &flight->part[flight->parts++];
}

static void part_free(struct flight *flight, struct part *part) {
    flight->hedges -= part->hedge;
    part->state = PART_FREE;
    part->hedge = false;
    flight->free_part[flight->free_parts++] = (uint32_t)(part - flight->part);
}

/* How many items each destination still has to answer, and who can be given more: suspects only if
 * `desperate`. Returns whether any was left out for being one. */
bool dispatch_survey(struct attention *self, actor_id excluded, bool desperate, uint64_t now_ns) {
    const struct flight *flight = &self->batch.flight;
    bool left_out = false;
    for (uint32_t i = 0; i < self->destinations; i++) {
        const struct peer *peer = member_peer(&self->member, self->destination[i].id);
        bool suspect = !desperate && self->destination[i].suspect_until_ns > now_ns;
        bool usable = peer != NULL && !peer->lost && peer->id != excluded && !self->destination[i].liar;
        self->alive[i] = usable && !suspect;
        left_out = left_out || (usable && suspect);
        self->queued[i] = 0;
    }
    for (uint32_t i = 0; i < flight->parts; i++)
        if (flight->part[i].state == PART_SENT) {
            uint32_t destination = dispatch_destination(self, flight->part[i].to);
            if (destination != UINT32_MAX)
                self->queued[destination] += flight->part[i].count * self->cost[destination];
        }
    return left_out;
}

void dispatch_send_part(struct attention *self, const struct part *part, uint32_t number,
                        const struct dispatch_part *planned, struct effects *out) {
    const struct dispatch_plan *plan = &self->batch.flight.plan;
    size_t group_bytes = planned->groups * sizeof(struct frame_group);
    size_t item_bytes = planned->items * sizeof(uint32_t);
    uint8_t *prefix = effects_alloc(out, group_bytes + item_bytes);
    memcpy(prefix, plan->group + planned->first_group, group_bytes);
    memcpy(prefix + group_bytes, plan->item_row + planned->first_item, item_bytes);
    struct effect *effect = effects_add(out, EFFECT_TRANSFER);
    effect->transfer.header = (struct frame_header){
        .kind = FRAME_DISPATCH,
        .from = self->member.id,
        .to = part->to,
        .from_incarnation = self->member.identity.incarnation,
        .to_incarnation = part->to_incarnation,
        .epoch = self->member.epoch,
        .batch = self->batch.number,
        .layer = self->batch.layer,
        .attempt = part->attempt,
        .part = number,
        .rows = planned->rows,
        .items = planned->items,
        .groups = planned->groups,
        .format = self->rows_e4m3 ? FRAME_ROWS_E4M3 : FRAME_ROWS_PLAIN,
    };
    effect->transfer.prefix = prefix;
    effect->transfer.prefix_bytes = group_bytes + item_bytes;
    effect->transfer.region = self->rows_e4m3 ? REGION_NORMED_E4M3 : REGION_NORMED;
    effect->transfer.slot = self->batch.slot;
    effect->transfer.index =
        effects_copy(out, plan->row + planned->first_row, planned->rows * sizeof(uint32_t));
    effect->transfer.count = planned->rows;
    self->frames++;
    self->rows += planned->items;
}

static void wait_part(struct attention *self, uint32_t first, uint32_t count, uint64_t now_ns) {
    struct part *part = part_new(&self->batch.flight);
    *part = (struct part){.state = PART_WAITING,
                          .attempt = self->batch.flight.attempt,
                          .first = first,
                          .count = count,
                          .family_first = first,
                          .family_count = count,
                          .deadline_ns = now_ns + self->row_deadline_ns,
                          .hedge_at_ns = NEVER};
}

static void list_items(struct flight *flight, uint32_t first, uint32_t count) {
    for (uint32_t i = 0; i < count; i++)
        flight->planned[i] = (struct dispatch_item){.row = flight->item_row[first + i],
                                                    .slot = flight->item_slot[first + i],
                                                    .expert = flight->item_expert[first + i]};
}

/* Plans the items of a range over those that the survey has left alive, reorders them in place part
 * by part, and sends the parts. Returns how many at the range's end wait. */
static uint32_t plan_alive(struct attention *self, uint32_t first, uint32_t count, uint64_t now_ns,
                           struct effects *out) {
    struct flight *flight = &self->batch.flight;
    struct dispatch_plan *plan = &flight->plan;
    list_items(flight, first, count);
    dispatch_plan_build(plan, &self->placement, self->batch.layer, flight->planned, count,
                        self->alive, self->queued, self->cost, self->destinations,
                        self->part_items_max);
    for (uint32_t i = 0; i < count; i++) {
        flight->item_row[first + i] = plan->item[i].row;
        flight->item_slot[first + i] = plan->item[i].slot;
        flight->item_expert[first + i] = plan->item[i].expert;
    }
    for (uint32_t i = 0; i < plan->parts; i++) {
        const struct dispatch_part *planned = &plan->part[i];
        struct part *part = part_new(flight);
        *part = (struct part){
            .state = PART_SENT,
            .to = self->destination[planned->destination].id,
            .to_incarnation = self->destination[planned->destination].incarnation,
            .attempt = flight->attempt,
            .first = first + planned->first_item,
            .count = planned->items,
            .sent_ns = now_ns,
            .deadline_ns = now_ns + self->row_deadline_ns,
            .hedge_at_ns = self->hedge_ns == NEVER ? NEVER : now_ns + self->hedge_ns,
            .family_first = first + planned->first_item,
            .family_count = planned->items,
        };
        dispatch_send_part(self, part, (uint32_t)(part - flight->part), planned, out);
    }
    return plan->waiting;
}

/* The same over everybody but `excluded`, with suspects only where there is nobody else. */
static uint32_t plan_range(struct attention *self, uint32_t first, uint32_t count,
                           actor_id excluded, uint64_t now_ns, struct effects *out) {
    bool left_out = dispatch_survey(self, excluded, false, now_ns);
    uint32_t waiting = plan_alive(self, first, count, now_ns, out);
    if (waiting == 0 || !left_out)
        return waiting;
    dispatch_survey(self, excluded, true, now_ns);
    return plan_alive(self, first + count - waiting, waiting, now_ns, out);
}

/* ---- hedges ---- */

static bool same_family(const struct part *a, const struct part *b) {
    return a->state == PART_SENT && b->state == PART_SENT && a->family_first == b->family_first &&
           a->family_count == b->family_count;
}

/* The item is done, or somebody else of the family is asked for it. */
static bool covered(const struct flight *flight, const struct part *lost, uint32_t item) {
    if (flight->item_done[item])
        return true;
    for (uint32_t i = 0; i < flight->parts; i++) {
        const struct part *part = &flight->part[i];
        if (part != lost && same_family(part, lost) && part->first <= item &&
            item - part->first < part->count)
            return true;
    }
    return false;
}

static void hedge_range(struct attention *self, const struct part *late, uint32_t destination,
                        uint32_t first, uint32_t count, uint64_t now_ns, struct effects *out) {
    struct flight *flight = &self->batch.flight;
    struct dispatch_plan *plan = &flight->plan;
    uint8_t only[ACTORS_MAX] = {0};
    ASSERT(destination < ACTORS_MAX);
    only[destination] = 1;
    list_items(flight, first, count);
    dispatch_plan_build(plan, &self->placement, self->batch.layer, flight->planned, count, only,
                        self->queued, self->cost, self->destinations, self->part_items_max);
    ASSERT(plan->parts == 1 && plan->waiting == 0);
    struct part *part = part_new(flight);
    *part = (struct part){
        .state = PART_SENT,
        .to = self->destination[destination].id,
        .to_incarnation = self->destination[destination].incarnation,
        .attempt = flight->attempt,
        .first = first,
        .count = count,
        .sent_ns = now_ns,
        .deadline_ns = now_ns + self->row_deadline_ns,
        .hedge_at_ns = NEVER,
        .family_first = late->family_first,
        .family_count = late->family_count,
        .hedge = true,
    };
    flight->hedges++;
    self->frames_hedged++;
    dispatch_send_part(self, part, (uint32_t)(part - flight->part), &plan->part[0], out);
}

static bool holds(const struct attention *self, uint32_t destination, uint32_t expert) {
    uint32_t entry = self->batch.layer * self->config.experts + expert;
    for (uint32_t i = self->placement.first[entry]; i < self->placement.first[entry + 1]; i++)
        if (self->placement.holder[i] == destination)
            return true;
    return false;
}

/* Who is asked for an expert as well: the trusted first, then suspects; the late one itself only the
 * second time, because its frame may have been lost. */
static uint32_t hedge_destination(struct attention *self, const struct part *late, uint32_t expert,
                                  uint64_t now_ns) {
    for (int desperate = 0; desperate < 2; desperate++) {
        dispatch_survey(self, late->again ? 0 : late->to, desperate, now_ns);
        uint32_t destination =
            replica_choose(&self->placement, self->batch.layer, expert, self->alive, self->queued,
                           self->cost);
        if (destination != UINT32_MAX)
            return destination;
    }
    return UINT32_MAX;
}

/* Asks others for what is late, more seldom each time, in as few frames as the order of the items allows: items of one expert
 * lie together, so a run of items ends where its destination does not hold the next expert. */
static void hedge(struct attention *self, struct part *late, uint64_t now_ns, struct effects *out) {
    struct flight *flight = &self->batch.flight;
    uint32_t end = late->first + late->count, asked = 0;
    /* hedges made before have had their time: what was lost may have been their frames */
    for (uint32_t i = 0; i < flight->parts && late->again; i++)
        if (flight->part[i].hedge && same_family(&flight->part[i], late))
            part_free(flight, &flight->part[i]);
    flight->attempt++;
    for (uint32_t first = late->first, next; first < end; first = next) {
        uint32_t destination = UINT32_MAX;
        next = first + 1;
        if (covered(flight, late, first))
            continue;
        destination = hedge_destination(self, late, flight->item_expert[first], now_ns);
        while (next < end && !covered(flight, late, next) &&
               (flight->item_expert[next] == flight->item_expert[next - 1] ||
                (destination != UINT32_MAX && holds(self, destination, flight->item_expert[next]))))
            next++;
        if (destination == UINT32_MAX)
            continue;
        hedge_range(self, late, destination, first, next - first, now_ns, out);
        asked += next - first;
    }
    late->hedge_at_ns = now_ns + HEDGE_AGAIN * (now_ns - late->sent_ns); /* each time later */
    late->again = true;
    if (asked > 0)
        effects_trace(out, TRACE_DEBUG, "actor %u is late with %u rows of layer %u, asked for %u again",
                      late->to, late->count, self->batch.layer, asked);
}

uint64_t hedge_after_ns(const struct attention *self, uint64_t usual_ns) {
    uint64_t floor_ns = (uint64_t)self->settings.hedge_floor_ms * 1000000u;
    if (self->settings.hedge_factor == 0)
        return NEVER;
    if (usual_ns == 0)
        return HEDGE_UNKNOWN_FLOORS * floor_ns;
    double after = self->settings.hedge_factor * (double)usual_ns;
    return after > (double)floor_ns ? (uint64_t)after : floor_ns;
}

/* The usual time is that of the fastest, so that a slow one does not set its own measure. */
static void set_hedge_time(struct attention *self) {
    uint64_t usual = 0;
    for (uint32_t i = 0; i < self->destinations; i++) {
        uint64_t ns = latency_quantile_ns(&self->destination[i].latency, HEDGE_QUANTILE);
        if (ns != 0 && (usual == 0 || ns < usual))
            usual = ns;
    }
    self->hedge_ns = hedge_after_ns(self, usual);
}

/* What an item takes at a process, overhead shared out; 0: not known. */
static double item_ns(const struct destination *destination) {
    return destination->answers_items > 0 ? destination->answers_ns / destination->answers_items : 0;
}

/* Costs of items, from how long answers have taken of late; the fastest process has the least. */
static void set_costs(struct attention *self) {
    double fastest = 0;
    for (uint32_t i = 0; i < self->destinations; i++) {
        double ns = item_ns(&self->destination[i]);
        if (ns > 0 && (fastest == 0 || ns < fastest))
            fastest = ns;
    }
    for (uint32_t i = 0; i < self->destinations; i++) {
        double ns = item_ns(&self->destination[i]), times = ns > 0 ? ns / fastest : 1;
        double cost = times < SPEED_NOISE ? REPLICA_COST : times * REPLICA_COST;
        if (times >= SPEED_NOISE) /* who is given little is heard little of: it is tried again in the end */
            self->destination[i].answers_ns *= FORGIVENESS;
        self->cost[i] = cost < REPLICA_COST_MAX ? (uint32_t)cost : REPLICA_COST_MAX;
    }
}

static void note_speed(struct destination *destination, const struct part *part, uint64_t now_ns) {
    destination->answers_ns = destination->answers_ns * ANSWERS_KEPT + (double)(now_ns - part->sent_ns);
    destination->answers_items = destination->answers_items * ANSWERS_KEPT + part->count + ANSWER_ITEMS;
}

/* It has answered in time. */
void dispatch_trust(struct attention *self, const struct part *part, uint64_t now_ns) {
    uint32_t destination = dispatch_destination(self, part->to);
    if (destination == UINT32_MAX)
        return;
    latency_add(&self->destination[destination].latency, now_ns - part->sent_ns);
    note_speed(&self->destination[destination], part, now_ns);
    self->destination[destination].suspicion_ns /= 2;
}

/* Others have answered before it. */
void dispatch_suspect(struct attention *self, const struct part *part, uint64_t now_ns,
                      struct effects *out) {
    uint32_t index = dispatch_destination(self, part->to);
    if (index == UINT32_MAX || self->destination[index].incarnation != part->to_incarnation)
        return;
    struct destination *destination = &self->destination[index];
    latency_add(&destination->latency, now_ns - part->sent_ns);
    if (destination->suspect_until_ns > now_ns)
        return;
    effects_trace(out, TRACE_INFO, "actor %u is slow: others are asked instead for a while", part->to);
    destination->suspicion_ns =
        destination->suspicion_ns < SUSPICION_MIN_NS ? SUSPICION_MIN_NS : 2 * destination->suspicion_ns;
    if (destination->suspicion_ns > self->row_deadline_ns)
        destination->suspicion_ns = self->row_deadline_ns;
    destination->suspect_until_ns = now_ns + self->row_deadline_ns;
}

/* It speaks, if late. */
static void note_life(struct attention *self, const struct frame_header *header, uint64_t now_ns) {
    uint32_t index = dispatch_destination(self, header->from);
    if (index == UINT32_MAX || self->destination[index].incarnation != header->from_incarnation)
        return;
    struct destination *destination = &self->destination[index];
    if (destination->suspect_until_ns > now_ns + destination->suspicion_ns)
        destination->suspect_until_ns = now_ns + destination->suspicion_ns;
}

static bool all_done(const struct flight *flight, const struct part *part) {
    for (uint32_t i = 0; i < part->count; i++)
        if (!flight->item_done[part->first + i])
            return false;
    return true;
}

/* Members of the family whose items others have brought by now are waited for no more. */
static void settle_family(struct attention *self, const struct part *answered, uint64_t now_ns,
                          struct effects *out) {
    struct flight *flight = &self->batch.flight;
    for (uint32_t i = 0; i < flight->parts && flight->hedges > 0; i++) {
        struct part *part = &flight->part[i];
        if (part == answered || !same_family(part, answered) || !all_done(flight, part))
            continue;
        if (!part->hedge && part->to != answered->to)
            dispatch_suspect(self, part, now_ns, out);
        part_free(flight, part);
    }
}

static void swap_items(struct flight *flight, uint32_t a, uint32_t b) {
    uint32_t row = flight->item_row[a];
    uint16_t slot = flight->item_slot[a], expert = flight->item_expert[a];
    uint8_t done = flight->item_done[a];
    flight->item_row[a] = flight->item_row[b];
    flight->item_slot[a] = flight->item_slot[b];
    flight->item_expert[a] = flight->item_expert[b];
    flight->item_done[a] = flight->item_done[b];
    flight->item_row[b] = row;
    flight->item_slot[b] = slot;
    flight->item_expert[b] = expert;
    flight->item_done[b] = done;
}

/* Gives up a part. Returns how many items must be planned anew, in a range that no part covers any more: none
 * if others of its family will bring them all. */
static uint32_t give_up(struct attention *self, struct part *lost, uint32_t *ret_first) {
    struct flight *flight = &self->batch.flight;
    uint32_t first = lost->family_first, end = first + lost->family_count;
    bool needed = false;
    for (uint32_t i = 0; i < lost->count; i++)
        needed = needed || !covered(flight, lost, lost->first + i);
    if (needed)
        for (uint32_t i = 0; i < flight->parts && flight->hedges > 0; i++)
            if (&flight->part[i] != lost && same_family(&flight->part[i], lost))
                part_free(flight, &flight->part[i]);
    part_free(flight, lost);
    for (uint32_t i = first; needed && i < end; i++)
        if (flight->item_done[i])
            swap_items(flight, i, first++);
    *ret_first = first;
    return needed ? end - first : 0;
}

enum replan_why { REPLAN_MOVED, REPLAN_LATE, REPLAN_LOST };

/* The part is given up; its items go to others. A holder that is only late may be asked again if
 * there is no other. */
static void replan(struct attention *self, struct part *part, enum replan_why why, uint64_t now_ns,
                   struct effects *out) {
    struct flight *flight = &self->batch.flight;
    actor_id late = part->state == PART_SENT && why != REPLAN_LOST ? part->to : 0;
    if (part->state == PART_SENT)
        self->frames_resent++;
    uint32_t first, count = give_up(self, part, &first);
    if (count == 0)
        return;
    flight->attempt++;
    uint32_t waiting = plan_range(self, first, count, late, now_ns, out);
    if (waiting > 0 && why == REPLAN_LATE) {
        first += count - waiting;
        count = waiting;
        waiting = plan_range(self, first, count, 0, now_ns, out);
    }
    if (waiting > 0)
        wait_part(self, first + count - waiting, waiting, now_ns);
}

/* ---- a layer ---- */

static void count_load(struct attention *self, uint32_t expert) {
    if (self->settings.load_statistics)
        self->load[(size_t)self->batch.layer * self->config.experts + expert]++;
}

void dispatch_start(struct attention *self, const uint16_t *choice, uint64_t now_ns,
                    struct effects *out) {
    struct batch *batch = &self->batch;
    struct flight *flight = &batch->flight;
    batch->phase = BATCH_EXPERTS;
    flight->items = flight->parts = flight->free_parts = flight->attempt = flight->hedges = 0;
    set_hedge_time(self);
    set_costs(self);
    for (uint32_t row = 0; row < batch->rows; row++)
        for (uint32_t slot = 0; slot < self->k; slot++) {
            uint16_t expert = choice[(size_t)row * self->k + slot];
            if (expert == GATE_UNUSED)
                continue;
            ASSERT(expert < self->config.experts);
            flight->item_row[flight->items] = row;
            flight->item_slot[flight->items] = (uint16_t)slot;
            flight->item_expert[flight->items++] = expert;
            count_load(self, expert);
        }
    self->load_heartbeats = UINT32_MAX;
    flight->missing = flight->items;
    memset(flight->item_done, 0, flight->items * sizeof *flight->item_done);
    uint32_t waiting = plan_range(self, 0, flight->items, 0, now_ns, out);
    if (waiting > 0) {
        effects_trace(out, TRACE_WARNING,
                      "%u rows of layer %u wait: nobody alive holds their experts", waiting,
                      batch->layer);
        wait_part(self, flight->items - waiting, waiting, now_ns);
    }
    audit_start(self, now_ns, out);
    /* after the transfers, so that the experts work meanwhile */
    if (self->config.shared_experts > 0)
        batch_program(self, out, PROGRAM_SHARED, batch->layer);
    dispatch_finish(self, out);
}

void dispatch_finish(struct attention *self, struct effects *out) {
    if (self->batch.phase == BATCH_EXPERTS && self->batch.flight.missing == 0 && self->audit.pending == 0)
        batch_combine(self, out);
}

static void stale(struct attention *self, const struct frame_header *header, const char *why,
                  struct effects *out) {
    self->frames_stale++;
    effects_trace(out, TRACE_DEBUG,
                  "stale frame kind %u of %u (batch %llu layer %u part %u attempt %u): %s",
                  header->kind, header->from, (unsigned long long)header->batch, header->layer,
                  header->part, header->attempt, why);
}

static bool asked(const struct part *part, actor_id id, uint64_t incarnation) {
    return (part->to == id && part->to_incarnation == incarnation) ||
           (part->also == id && id != 0 && part->also_incarnation == incarnation);
}

struct part *reply_part(struct attention *self, const struct frame_header *header, enum role role,
                        struct part *part, uint32_t parts, struct effects *out) {
    const struct batch *batch = &self->batch;
    const char *why = NULL;
    if (member_frame_sender(&self->member, header, role) == NULL)
        why = "unknown sender or incarnation";
    else if (header->batch != batch->number ||
             batch->phase != (role == ROLE_EXPERT ? BATCH_EXPERTS : BATCH_SAMPLERS))
        why = "not of the batch in flight";
    else if (header->layer != (role == ROLE_EXPERT ? batch->layer : 0))
        why = "another layer";
    else if (header->part >= parts || part[header->part].state != PART_SENT)
        why = "no such part is outstanding";
    else if (part[header->part].attempt != header->attempt ||
             !asked(&part[header->part], header->from, header->from_incarnation))
        why = "the part has been sent elsewhere";
    if (why != NULL) {
        stale(self, header, why, out);
        return NULL;
    }
    return &part[header->part];
}

/* A range of the answer's items that nobody has brought before. */
static void take_items(struct attention *self, uint32_t first, uint32_t count, const uint8_t *rows,
                       struct effects *out) {
    struct flight *flight = &self->batch.flight;
    struct program *program = batch_program(self, out, PROGRAM_SCATTER, self->batch.layer);
    program->payload = rows;
    program->item_row = flight->item_row + first;
    program->item_slot = flight->item_slot + first;
    program->items = count;
    if (self->audit.cells > 0) { /* what comes of an audit may reorder items in this very step */
        program->item_row = effects_copy(out, program->item_row, count * sizeof *program->item_row);
        program->item_slot = effects_copy(out, program->item_slot, count * sizeof *program->item_slot);
    }
    flight->missing -= count;
    memset(flight->item_done + first, 1, count);
}

/* Scatters what is new in the answer, whose first item is `first`, and hands all of it to the audit. */
static void scatter(struct attention *self, uint32_t first, const struct frame *frame,
                    struct effects *out) {
    struct flight *flight = &self->batch.flight;
    size_t row_bytes = frame->header->row_bytes;
    const uint32_t items = frame->header->items;
    const uint8_t *rows = frame_rows(frame);
    for (uint32_t i = 0, next; i < items; i = next) {
        const uint8_t *done = flight->item_done + first;
        for (next = i + 1; next < items && done[next] == done[i];)
            next++;
        bool taken = !done[i];
        if (taken) {
            step_trace_scatter(self, frame->header->from, flight->item_row + first + i, next - i);
            take_items(self, first + i, next - i, rows + i * row_bytes, out);
        }
        for (uint32_t item = i; self->audit.cells > 0 && item < next; item++)
            audit_answer(self, flight->item_row[first + item], flight->item_slot[first + item],
                         frame->header, rows + item * row_bytes, taken, out);
    }
}

void dispatch_on_combine(struct attention *self, const struct frame *frame, uint64_t now_ns,
                         struct effects *out) {
    struct flight *flight = &self->batch.flight;
    const struct frame_header *header = frame->header;
    note_life(self, header, now_ns);
    if ((header->part & AUDIT_PART) != 0) {
        audit_on_combine(self, frame, now_ns, out);
        return;
    }
    struct part *part = reply_part(self, header, ROLE_EXPERT, flight->part, flight->parts, out);
    if (part == NULL)
        return;
    if (header->detail > part->count || header->items > part->count - header->detail ||
        header->row_bytes != self->config.hidden * sizeof(float)) {
        effects_trace(out, TRACE_ERROR,
                      "a reply of actor %u has items %u to %u of %u bytes, expected at most %u of %zu; "
                      "asking again",
                      header->from, header->detail, header->detail + header->items,
                      header->row_bytes, part->count, self->config.hidden * sizeof(float));
        replan(self, part, REPLAN_LATE, now_ns, out);
        return;
    }
    scatter(self, part->first + header->detail, frame, out);
    if (flight->hedges > 0)
        settle_family(self, part, now_ns, out);
    if (all_done(flight, part)) {
        dispatch_trust(self, part, now_ns);
        part_free(flight, part);
    } else {
        part->deadline_ns = now_ns + self->row_deadline_ns;
    }
    audit_review(self, now_ns, out);
    dispatch_finish(self, out);
}

void dispatch_on_moved(struct attention *self, const struct frame_header *header, uint64_t now_ns,
                       struct effects *out) {
    struct flight *flight = &self->batch.flight;
    if ((header->part & AUDIT_PART) != 0) {
        audit_on_moved(self, header, now_ns, out);
        return;
    }
    struct part *part = reply_part(self, header, ROLE_EXPERT, flight->part, flight->parts, out);
    if (part == NULL)
        return;
    effects_trace(out, TRACE_WARNING, "actor %u does not hold expert %u of layer %u", header->from,
                  header->detail, header->layer);
    replan(self, part, REPLAN_MOVED, now_ns, out);
}

typedef bool part_test(const struct attention *self, const struct part *part, uint64_t argument);

/* Plans anew every part that `wanted` names, but not those that come of it: they carry a newer
 * attempt. */
static void replan_where(struct attention *self, part_test *wanted, uint64_t argument,
                         enum replan_why why, uint64_t now_ns, struct effects *out) {
    struct flight *flight = &self->batch.flight;
    if (self->batch.phase != BATCH_EXPERTS)
        return;
    uint32_t attempt = flight->attempt, parts = flight->parts;
    for (uint32_t i = 0; i < parts; i++) {
        struct part *part = &flight->part[i];
        if (part->state != PART_FREE && part->attempt <= attempt && wanted(self, part, argument))
            replan(self, part, why, now_ns, out);
    }
}

static bool is_gone(const struct attention *self, const struct part *part, uint64_t unused) {
    if (part->state == PART_WAITING)
        return true;
    uint32_t destination = dispatch_destination(self, part->to);
    return destination == UINT32_MAX ||
           self->destination[destination].incarnation != part->to_incarnation;
}

static bool is_at(const struct attention *self, const struct part *part, uint64_t id) {
    return part->state == PART_SENT && part->to == id;
}

static bool is_late(const struct attention *self, const struct part *part, uint64_t now_ns) {
    return part->deadline_ns <= now_ns;
}

void dispatch_adopt(struct attention *self, const Troupe__Commit *commit, uint64_t now_ns,
                    struct effects *out) {
    take_destinations(self);
    set_costs(self);
    take_placement(self, commit);
    replan_where(self, is_gone, 0, REPLAN_LOST, now_ns, out);
    audit_adopt(self, now_ns, out);
}

void dispatch_peer_lost(struct attention *self, actor_id id, uint64_t now_ns, struct effects *out) {
    replan_where(self, is_at, id, REPLAN_LOST, now_ns, out);
    audit_peer_lost(self, id, now_ns, out);
}

void dispatch_leave(struct attention *self, actor_id id, uint64_t now_ns, struct effects *out) {
    replan_where(self, is_at, id, REPLAN_LOST, now_ns, out);
}

static bool any_late(const struct flight *flight, uint64_t now_ns) {
    for (uint32_t i = 0; i < flight->parts; i++)
        if (flight->part[i].state != PART_FREE && flight->part[i].deadline_ns <= now_ns)
            return true;
    return false;
}

void dispatch_believe(struct attention *self) {
    for (uint32_t i = 0; i < self->destinations; i++) {
        struct peer *peer = member_peer(&self->member, self->destination[i].id);
        if (peer != NULL)
            peer->lost = false;
    }
}

void dispatch_timer(struct attention *self, uint64_t now_ns, struct effects *out) {
    struct flight *flight = &self->batch.flight;
    audit_timer(self, now_ns, out);
    if (self->batch.phase != BATCH_EXPERTS || parts_deadline(flight->part, flight->parts) > now_ns)
        return;
    uint32_t parts = flight->parts; /* not those that come of it */
    for (uint32_t i = 0; i < parts; i++)
        if (flight->part[i].state == PART_SENT && flight->part[i].hedge_at_ns <= now_ns)
            hedge(self, &flight->part[i], now_ns, out);
    if (!any_late(flight, now_ns))
        return;
    dispatch_believe(self);
    replan_where(self, is_late, now_ns, REPLAN_LATE, now_ns, out);
}
