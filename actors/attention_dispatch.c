/* Rows of one MoE layer to the experts and back.
 *
 * The gate's choices become items (row, slot, expert); router/dispatch.h cuts them into parts, one
 * frame each. A part is answered by one COMBINE frame, which is scattered to (row, slot). A part
 * that is not answered - MOVED, holder lost, deadline passed, holder gone from the epoch - is
 * planned anew over its own range of items, with a new attempt number; items nobody alive holds
 * wait for the next epoch.
 *
 * Invariants: 1. the parts not free are disjoint ranges that cover exactly the missing items; 2. an
 * answer counts only if it matches an outstanding part in sender, incarnation, batch, layer, part,
 * attempt and sizes; each item is therefore scattered once; 3. the first plan of a layer uses one
 * epoch. */
#include "actors/attention.h"

#include <stdlib.h>
#include <string.h>

/* ---- memory ---- */

bool flight_init(struct attention *self) {
    struct flight *flight = &self->batch.flight;
    size_t items = (size_t)self->settings.batch_tokens * self->k;
    if (items == 0)
        items = 1;
    flight->item_row = calloc(items, sizeof *flight->item_row);
    flight->item_slot = calloc(items, sizeof *flight->item_slot);
    flight->item_expert = calloc(items, sizeof *flight->item_expert);
    flight->part = calloc(items, sizeof *flight->part);
    flight->free_part = calloc(items, sizeof *flight->free_part);
    flight->planned = calloc(items, sizeof *flight->planned);
    return flight->item_row != NULL && flight->item_slot != NULL && flight->item_expert != NULL &&
           flight->part != NULL && flight->free_part != NULL && flight->planned != NULL &&
           dispatch_plan_init(&flight->plan, (uint32_t)items, ACTORS_MAX) == 0;
}

void flight_free(struct attention *self) {
    struct flight *flight = &self->batch.flight;
    free(flight->item_row);
    free(flight->item_slot);
    free(flight->item_expert);
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
        self->alive = grown(self->alive, count, sizeof *self->alive);
        self->queued = grown(self->queued, count, sizeof *self->queued);
        self->destinations_capacity = count;
    }
    self->destinations = 0;
    for (uint32_t i = 0; i < self->member.peers && self->destinations < ACTORS_MAX; i++) {
        const struct peer *peer = &self->member.peer[i];
        if (peer->role == ROLE_EXPERT)
            self->destination[self->destinations++] =
                (struct destination){peer->id, peer->incarnation};
    }
}

static uint32_t find_destination(const struct attention *self, actor_id id) {
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
    *ret_destination = find_destination(self, commit->holder[i]);
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
    for (uint32_t i = 0; i < parts; i++)
        if (part[i].state != PART_FREE && part[i].deadline_ns < deadline)
            deadline = part[i].deadline_ns;
    return deadline;
}

static struct part *part_new(struct flight *flight) {
    if (flight->free_parts > 0)
        return &flight->part[flight->free_part[--flight->free_parts]];
    return &flight->part[flight->parts++];
}

static void part_free(struct flight *flight, struct part *part) {
    part->state = PART_FREE;
    flight->free_part[flight->free_parts++] = (uint32_t)(part - flight->part);
}

/* How many items each destination still has to answer, and who can be given more. */
static void survey(struct attention *self, actor_id excluded) {
    const struct flight *flight = &self->batch.flight;
    for (uint32_t i = 0; i < self->destinations; i++) {
        const struct peer *peer = member_peer(&self->member, self->destination[i].id);
        self->alive[i] = peer != NULL && !peer->lost && peer->id != excluded;
        self->queued[i] = 0;
    }
    for (uint32_t i = 0; i < flight->parts; i++)
        if (flight->part[i].state == PART_SENT) {
            uint32_t destination = find_destination(self, flight->part[i].to);
            if (destination != UINT32_MAX)
                self->queued[destination] += flight->part[i].count;
        }
}

static void send_part(struct attention *self, const struct part *part,
                      const struct dispatch_part *planned, struct effects *out) {
    const struct flight *flight = &self->batch.flight;
    const struct dispatch_plan *plan = &flight->plan;
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
        .part = (uint32_t)(part - flight->part),
        .rows = planned->rows,
        .items = planned->items,
        .groups = planned->groups,
    };
    effect->transfer.prefix = prefix;
    effect->transfer.prefix_bytes = group_bytes + item_bytes;
    effect->transfer.region = REGION_NORMED;
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
                          .deadline_ns = now_ns + self->row_deadline_ns};
}

/* Plans the items of a range, reorders them in place part by part, and sends the parts. Returns how
 * many at the range's end wait. */
static uint32_t plan_range(struct attention *self, uint32_t first, uint32_t count,
                           actor_id excluded, uint64_t now_ns, struct effects *out) {
    struct flight *flight = &self->batch.flight;
    struct dispatch_plan *plan = &flight->plan;
    for (uint32_t i = 0; i < count; i++)
        flight->planned[i] = (struct dispatch_item){.row = flight->item_row[first + i],
                                                    .slot = flight->item_slot[first + i],
                                                    .expert = flight->item_expert[first + i]};
    survey(self, excluded);
    dispatch_plan_build(plan, &self->placement, self->batch.layer, flight->planned, count,
                        self->alive, self->queued, self->destinations, self->part_items_max);
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
            .deadline_ns = now_ns + self->row_deadline_ns,
        };
        send_part(self, part, planned, out);
    }
    return plan->waiting;
}

enum replan_why { REPLAN_MOVED, REPLAN_LATE, REPLAN_LOST };

/* The part is given up; its items go to others. A holder that is only late may be asked again if
 * there is no other. */
static void replan(struct attention *self, struct part *part, enum replan_why why, uint64_t now_ns,
                   struct effects *out) {
    struct flight *flight = &self->batch.flight;
    uint32_t first = part->first, count = part->count;
    actor_id late = part->state == PART_SENT && why != REPLAN_LOST ? part->to : 0;
    if (part->state == PART_SENT)
        self->frames_resent++;
    part_free(flight, part);
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
    self->load[(size_t)self->batch.layer * self->config.experts + expert]++;
}

void dispatch_start(struct attention *self, const uint16_t *choice, uint64_t now_ns,
                    struct effects *out) {
    struct batch *batch = &self->batch;
    struct flight *flight = &batch->flight;
    batch->phase = BATCH_EXPERTS;
    flight->items = flight->parts = flight->free_parts = flight->attempt = 0;
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
    uint32_t waiting = plan_range(self, 0, flight->items, 0, now_ns, out);
    if (waiting > 0) {
        effects_trace(out, TRACE_WARNING,
                      "%u rows of layer %u wait: nobody alive holds their experts", waiting,
                      batch->layer);
        wait_part(self, flight->items - waiting, waiting, now_ns);
    }
    /* after the transfers, so that the experts work meanwhile */
    if (self->config.shared_experts > 0)
        batch_program(self, out, PROGRAM_SHARED, batch->layer);
    if (flight->missing == 0)
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
             part[header->part].to != header->from ||
             part[header->part].to_incarnation != header->from_incarnation)
        why = "the part has been sent elsewhere";
    if (why != NULL) {
        stale(self, header, why, out);
        return NULL;
    }
    return &part[header->part];
}

void dispatch_on_combine(struct attention *self, const struct frame *frame, uint64_t now_ns,
                         struct effects *out) {
    struct flight *flight = &self->batch.flight;
    const struct frame_header *header = frame->header;
    struct part *part = reply_part(self, header, ROLE_EXPERT, flight->part, flight->parts, out);
    if (part == NULL)
        return;
    if (header->items != part->count || header->row_bytes != self->config.hidden * sizeof(float)) {
        effects_trace(
            out, TRACE_ERROR,
            "a reply of actor %u has %u items of %u bytes, expected %u of %zu; asking again",
            header->from, header->items, header->row_bytes, part->count,
            self->config.hidden * sizeof(float));
        replan(self, part, REPLAN_LATE, now_ns, out);
        return;
    }
    struct program *program = batch_program(self, out, PROGRAM_SCATTER, self->batch.layer);
    program->payload = frame_rows(frame);
    program->item_row = flight->item_row + part->first;
    program->item_slot = flight->item_slot + part->first;
    program->items = part->count;
    flight->missing -= part->count;
    part_free(flight, part);
    if (flight->missing == 0)
        batch_combine(self, out);
}

void dispatch_on_moved(struct attention *self, const struct frame_header *header, uint64_t now_ns,
                       struct effects *out) {
    struct flight *flight = &self->batch.flight;
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
    uint32_t destination = find_destination(self, part->to);
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
    take_placement(self, commit);
    replan_where(self, is_gone, 0, REPLAN_LOST, now_ns, out);
}

void dispatch_peer_lost(struct attention *self, actor_id id, uint64_t now_ns, struct effects *out) {
    replan_where(self, is_at, id, REPLAN_LOST, now_ns, out);
}

void dispatch_timer(struct attention *self, uint64_t now_ns, struct effects *out) {
    struct flight *flight = &self->batch.flight;
    if (self->batch.phase != BATCH_EXPERTS || parts_deadline(flight->part, flight->parts) > now_ns)
        return;
    /* Items may wait for a holder that was only believed lost: believe in it again rather than wait
     * for ever. */
    for (uint32_t i = 0; i < self->destinations; i++) {
        struct peer *peer = member_peer(&self->member, self->destination[i].id);
        if (peer != NULL)
            peer->lost = false;
    }
    replan_where(self, is_late, now_ns, REPLAN_LATE, now_ns, out);
}
