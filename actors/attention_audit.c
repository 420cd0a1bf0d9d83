/* Answers of experts checked against those of others, before they are combined.
 *
 * The knob audit_share says how many of the groups (batch, layer, expert) are computed by a second
 * process as well; which, follows from these numbers and the actor's id alone. A cell is one (row,
 * slot) of such a group:
 *
 *   FREE -> OPEN     answers are collected, one vote for each process; the first is scattered at
 * once
 *        -> SETTLED  two processes have given the same bits. If they are not those that were
 * scattered, they are scattered now. Whoever has given others is a liar.
 *
 * While the answers to a cell differ, others are asked, and where there are none, the same again:
 * rows are a pure function of their inputs, so whoever contradicts itself is a liar. If nobody
 * gives way, nobody can tell who is right, and all of them are accused (undecided).
 *
 * Where there is no second holder: if the share is 1, cells wait for one, because nothing may pass
 * that was not confirmed; otherwise they pass unchecked, and are counted.
 *
 * Nothing is sent to a liar any more, heartbeats name it, and the coordinator takes it away
 * (coordinator/quarantine.c).
 *
 * Invariants: 1. a layer is combined only when no cell is open; 2. a cell has one vote of each
 * process;
 * 3. with share 1 every cell is settled by two processes; 4. votes of processes that have left the
 * epoch do not count. */
#include "actors/attention.h"

#include <stdlib.h>
#include <string.h>

#define ROUNDS_MAX    3u /* times that a process is asked for a cell that is disputed */
#define NOBODY        UINT32_MAX
#define VOTES_AT_ONCE 256u

enum cell_state { CELL_FREE, CELL_OPEN, CELL_SETTLED };

/* Votes are numbered from 1; 0: none. */
struct audit_cell {
    enum cell_state state;
    uint16_t expert;
    bool asked;     /* somebody beside the first plan has been, and may still answer */
    bool once;      /* somebody has been, ever */
    bool answered;  /* an answer has been scattered */
    bool differs;   /* two votes do */
    actor_id first; /* whom the first plan asked */
    actor_id last;  /* whom the last audit part about it is with; 0: it is over */
    uint32_t votes; /* list */
    uint32_t scattered, accepted;
};

struct audit_vote {
    actor_id from; /* 0: has left */
    uint64_t incarnation;
    uint32_t next, times;
};

/* ---- memory ---- */

bool audit_init(struct attention *self) {
    struct audit *audit = &self->audit;
    audit->share = self->k > 0 ? self->settings.audit_share : 0;
    audit->retry_ns = NEVER;
    if (audit->share == 0)
        return true;
    size_t cells = (size_t)self->settings.batch_tokens * self->k;
    audit->cell = calloc(cells, sizeof *audit->cell);
    audit->listed = calloc(cells, sizeof *audit->listed);
    audit->target = calloc(cells, sizeof *audit->target);
    return audit->cell != NULL && audit->listed != NULL && audit->target != NULL;
}

void audit_free(struct attention *self) {
    struct audit *audit = &self->audit;
    free(audit->cell);
    free(audit->listed);
    free(audit->target);
    free(audit->vote);
    free(audit->bytes);
    free(audit->part);
    free(audit->ask);
}

/* Room for `more` after `used`; what grows stays. */
static void *with_room(void *memory, uint32_t used, uint32_t more, uint32_t *capacity,
                       size_t size) {
    if (used + more <= *capacity)
        return memory;
    *capacity = 2 * (used + more) + VOTES_AT_ONCE;
    void *ret = realloc(memory, *capacity * size);
    ASSERT(ret != NULL && "memory for an audit");
    return ret;
}

static size_t row_bytes(const struct attention *self) {
    return self->config.hidden * sizeof(float);
}

static uint8_t *vote_row(const struct attention *self, uint32_t vote) {
    return self->audit.bytes + (size_t)(vote - 1) * row_bytes(self);
}

static bool same_row(const struct attention *self, const uint8_t *a, const uint8_t *b) {
    return memcmp(a, b, row_bytes(self)) == 0;
}

/* ---- what is checked ---- */

/* Counter-based, so that the same batch is checked in the same places each time. The mixing
 * function is SplitMix64's (Steele, Lea, Flood 2014). */
static bool is_chosen(const struct attention *self, uint32_t expert) {
    uint64_t z = self->batch.number * 0x9e3779b97f4a7c15u + self->member.id;
    z = (z << 20) ^ (z >> 44) ^ ((uint64_t)self->batch.layer << 12) ^ expert;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    return (double)(z >> 11) * 0x1p-53 < self->audit.share;
}

static void choose_cells(struct attention *self) {
    struct audit *audit = &self->audit;
    const struct flight *flight = &self->batch.flight;
    memset(audit->cell, 0, (size_t)self->batch.rows * self->k * sizeof *audit->cell);
    for (uint32_t i = 0; i < flight->items; i++) {
        if (!is_chosen(self, flight->item_expert[i]))
            continue;
        uint32_t number = flight->item_row[i] * self->k + flight->item_slot[i];
        audit->cell[number].state = CELL_OPEN;
        audit->cell[number].expert = flight->item_expert[i];
        audit->listed[audit->cells++] = number;
    }
    audit->pending = audit->cells;
    for (uint32_t p = 0; p < flight->parts; p++) {
        const struct part *part = &flight->part[p];
        for (uint32_t i = part->first; part->state == PART_SENT && i < part->first + part->count;
             i++)
            audit->cell[flight->item_row[i] * self->k + flight->item_slot[i]].first = part->to;
    }
}

static void ask_all(struct attention *self, uint64_t now_ns, struct effects *out);

void audit_start(struct attention *self, uint64_t now_ns, struct effects *out) {
    struct audit *audit = &self->audit;
    audit->cells = audit->pending = audit->votes = audit->parts = audit->asks = 0;
    audit->retry_ns = NEVER;
    if (audit->share == 0)
        return;
    choose_cells(self);
    if (audit->pending > 0)
        ask_all(self, now_ns, out);
}

/* ---- verdicts ---- */

static void accuse(struct attention *self, actor_id id, uint64_t incarnation,
                   const struct audit_cell *cell, bool undecided, struct effects *out) {
    uint32_t index = dispatch_destination(self, id);
    if (index == UINT32_MAX || self->destination[index].incarnation != incarnation ||
        self->destination[index].liar)
        return;
    struct destination *destination = &self->destination[index];
    const struct peer *peer = member_peer(&self->member, id);
    destination->liar = true;
    destination->undecided = undecided;
    destination->lie_layer = self->batch.layer;
    destination->lie_expert = cell->expert;
    self->audit.accused = true;
    self->member.heartbeat_at_ns = 0; /* says so */
    effects_trace(out, TRACE_ERROR,
                  "%s (actor %u) %s layer %u expert %u, batch %llu: nothing is sent to it any more",
                  peer != NULL ? peer->name : "?", id,
                  undecided ? "and another process insist on different rows of"
                            : "gave wrong rows of",
                  self->batch.layer, cell->expert, (unsigned long long)self->batch.number);
}

/* Puts a row in the place of what was scattered. */
static void scatter_again(struct attention *self, uint32_t number, uint32_t vote,
                          struct effects *out) {
    uint32_t row = number / self->k;
    uint16_t slot = (uint16_t)(number % self->k);
    struct program *program = batch_program(self, out, PROGRAM_SCATTER, self->batch.layer);
    program->payload =
        effects_copy(out, vote_row(self, vote), row_bytes(self)); /* votes may move */
    program->item_row = effects_copy(out, &row, sizeof row);
    program->item_slot = effects_copy(out, &slot, sizeof slot);
    program->items = 1;
}

static void settle(struct attention *self, uint32_t number, uint32_t vote, struct effects *out) {
    struct audit *audit = &self->audit;
    struct audit_cell *cell = &audit->cell[number];
    cell->state = CELL_SETTLED;
    cell->accepted = vote;
    audit->pending--;
    if (vote == 0)
        return;
    for (uint32_t v = cell->votes; v != 0; v = audit->vote[v - 1].next)
        if (!same_row(self, vote_row(self, v), vote_row(self, vote)))
            accuse(self, audit->vote[v - 1].from, audit->vote[v - 1].incarnation, cell, false, out);
    if (cell->answered && (cell->scattered == 0 ||
                           !same_row(self, vote_row(self, cell->scattered), vote_row(self, vote))))
        scatter_again(self, number, vote, out);
}

/* Two processes that agree settle it. */
static void judge(struct attention *self, uint32_t number, struct effects *out) {
    struct audit *audit = &self->audit;
    struct audit_cell *cell = &audit->cell[number];
    bool differed = cell->differs;
    for (uint32_t a = cell->votes; a != 0; a = audit->vote[a - 1].next)
        for (uint32_t b = audit->vote[a - 1].next; b != 0; b = audit->vote[b - 1].next) {
            if (same_row(self, vote_row(self, a), vote_row(self, b))) {
                audit->rows++;
                settle(self, number, a, out);
                return;
            }
            cell->differs = true;
        }
    audit->differed += cell->differs && !differed;
}

static uint32_t find_vote(const struct attention *self, const struct audit_cell *cell,
                          actor_id from, uint64_t incarnation) {
    for (uint32_t v = cell->votes; v != 0; v = self->audit.vote[v - 1].next)
        if (self->audit.vote[v - 1].from == from &&
            self->audit.vote[v - 1].incarnation == incarnation)
            return v;
    return 0;
}

static uint32_t add_vote(struct attention *self, struct audit_cell *cell,
                         const struct frame_header *header, const uint8_t *bytes) {
    struct audit *audit = &self->audit;
    uint32_t capacity = audit->votes_capacity;
    audit->vote = with_room(audit->vote, audit->votes, 1, &capacity, sizeof *audit->vote);
    audit->bytes =
        with_room(audit->bytes, audit->votes, 1, &audit->votes_capacity, row_bytes(self));
    uint32_t vote = ++audit->votes;
    audit->vote[vote - 1] =
        (struct audit_vote){header->from, header->from_incarnation, cell->votes, 1};
    cell->votes = vote;
    memcpy(vote_row(self, vote), bytes, row_bytes(self));
    return vote;
}

/* An answer to a cell that is settled already. */
static void check_late(struct attention *self, uint32_t number, const struct frame_header *header,
                       const uint8_t *bytes, bool taken, struct effects *out) {
    struct audit_cell *cell = &self->audit.cell[number];
    cell->answered = cell->answered || taken;
    if (cell->accepted == 0 || same_row(self, vote_row(self, cell->accepted), bytes))
        return;
    self->audit.differed += !cell->differs;
    cell->differs = true;
    accuse(self, header->from, header->from_incarnation, cell, false, out);
    if (taken)
        scatter_again(self, number, cell->accepted, out);
}

void audit_answer(struct attention *self, uint32_t row, uint32_t slot,
                  const struct frame_header *header, const uint8_t *bytes, bool taken,
                  struct effects *out) {
    uint32_t number = row * self->k + slot;
    struct audit_cell *cell = &self->audit.cell[number];
    if (cell->state == CELL_FREE)
        return;
    if (cell->state == CELL_SETTLED) {
        check_late(self, number, header, bytes, taken, out);
        return;
    }
    uint32_t vote = find_vote(self, cell, header->from, header->from_incarnation);
    if (vote == 0) {
        vote = add_vote(self, cell, header, bytes);
    } else if (same_row(self, vote_row(self, vote), bytes)) {
        self->audit.vote[vote - 1].times++;
    } else { /* it contradicts itself; its newest word stands */
        self->audit.differed += !cell->differs;
        cell->differs = true;
        accuse(self, header->from, header->from_incarnation, cell, false, out);
        if (cell->scattered == vote)
            cell->scattered = 0;
        memcpy(vote_row(self, vote), bytes, row_bytes(self));
    }
    if (taken) {
        cell->answered = true;
        cell->scattered = vote;
    }
    judge(self, number, out);
}

/* ---- asking ---- */

/* How good it would be to ask: 0: not at all. */
static uint32_t merit(const struct attention *self, const struct audit_cell *cell,
                      uint32_t destination, uint64_t now_ns) {
    const struct destination *other = &self->destination[destination];
    const struct peer *peer = member_peer(&self->member, other->id);
    bool suspect = other->suspect_until_ns > now_ns;
    if (peer == NULL || peer->lost || other->liar || (!cell->answered && other->id == cell->first))
        return 0;
    uint32_t vote = find_vote(self, cell, other->id, other->incarnation);
    if (vote == 0)
        return !suspect ? 3 : self->audit.share >= 1 || cell->differs ? 1 : 0;
    return cell->differs && self->audit.vote[vote - 1].times < ROUNDS_MAX ? 2 : 0;
}

static uint32_t choose_other(const struct attention *self, const struct audit_cell *cell,
                             uint64_t now_ns) {
    uint32_t entry = self->batch.layer * self->config.experts + cell->expert, best = NOBODY,
             most = 0;
    for (uint32_t i = self->placement.first[entry]; i < self->placement.first[entry + 1]; i++) {
        uint32_t destination = self->placement.holder[i],
                 value = merit(self, cell, destination, now_ns);
        if (value > most ||
            (value > 0 && value == most && self->queued[destination] < self->queued[best])) {
            best = destination;
            most = value;
        }
    }
    return best;
}

/* Everybody who has a say insists, and nobody else can be asked. */
static bool is_deadlocked(const struct attention *self, const struct audit_cell *cell) {
    uint32_t voters = 0;
    for (uint32_t v = cell->votes; v != 0; v = self->audit.vote[v - 1].next) {
        const struct audit_vote *vote = &self->audit.vote[v - 1];
        uint32_t index = dispatch_destination(self, vote->from);
        const struct peer *peer = member_peer(&self->member, vote->from);
        if (vote->from == 0 || index == UINT32_MAX || self->destination[index].liar)
            continue;
        if (vote->times < ROUNDS_MAX || peer == NULL || peer->lost)
            return false;
        voters++;
    }
    return voters >= 2;
}

/* Nobody can be asked about an open cell. False: it stays open. */
static bool do_without(struct attention *self, uint32_t number, struct effects *out) {
    struct audit *audit = &self->audit;
    struct audit_cell *cell = &audit->cell[number];
    if (cell->differs && is_deadlocked(self, cell)) {
        for (uint32_t v = cell->votes; v != 0; v = audit->vote[v - 1].next)
            accuse(self, audit->vote[v - 1].from, audit->vote[v - 1].incarnation, cell, true, out);
        return false;
    }
    if (audit->share >= 1 || cell->differs || !cell->answered)
        return false;
    audit->alone++;
    settle(self, number, cell->votes, out);
    return true;
}

/* One frame's worth of cells to one process. */
static void ask_part(struct attention *self, const struct dispatch_part *planned,
                     uint32_t destination, uint64_t now_ns, struct effects *out) {
    struct audit *audit = &self->audit;
    const struct dispatch_plan *plan = &self->batch.flight.plan;
    audit->part =
        with_room(audit->part, audit->parts, 1, &audit->parts_capacity, sizeof *audit->part);
    audit->ask = with_room(audit->ask, audit->asks, planned->items, &audit->asks_capacity,
                           sizeof *audit->ask);
    struct part *part = &audit->part[audit->parts++];
    *part = (struct part){
        .state = PART_SENT,
        .to = self->destination[destination].id,
        .to_incarnation = self->destination[destination].incarnation,
        .attempt = self->batch.flight.attempt,
        .first = audit->asks,
        .count = planned->items,
        .sent_ns = now_ns,
        .deadline_ns = now_ns + self->row_deadline_ns,
        .hedge_at_ns = self->hedge_ns == NEVER ? NEVER : now_ns + self->hedge_ns,
    };
    for (uint32_t i = 0; i < planned->items; i++) {
        const struct dispatch_item *item = &plan->item[planned->first_item + i];
        uint32_t number = item->row * self->k + item->slot;
        audit->ask[audit->asks++] = number;
        audit->cell[number].asked = audit->cell[number].once = true;
        audit->cell[number].last = part->to;
    }
    dispatch_send_part(self, part, AUDIT_PART + (uint32_t)(part - audit->part), planned, out);
}

static void ask_destination(struct attention *self, uint32_t destination, uint64_t now_ns,
                            struct effects *out) {
    struct audit *audit = &self->audit;
    struct flight *flight = &self->batch.flight;
    uint8_t only[ACTORS_MAX] = {0};
    uint32_t count = 0;
    for (uint32_t i = 0; i < audit->cells; i++) {
        uint32_t number = audit->listed[i];
        if (audit->target[i] == destination)
            flight->planned[count++] = (struct dispatch_item){.row = number / self->k,
                                                              .slot = (uint16_t)(number % self->k),
                                                              .expert = audit->cell[number].expert};
    }
    if (count == 0)
        return;
    ASSERT(destination < ACTORS_MAX);
    only[destination] = 1;
    dispatch_plan_build(&flight->plan, &self->placement, self->batch.layer, flight->planned, count,
                        only, self->queued, self->cost, self->destinations, self->piece_items_max);
    ASSERT(flight->plan.waiting == 0);
    for (uint32_t i = 0; i < flight->plan.parts; i++)
        ask_part(self, &flight->plan.part[i], destination, now_ns, out);
}

/* Whom to ask about an open cell; NOBODY: nobody, or no need to. */
static uint32_t find_target(struct attention *self, uint32_t number, uint64_t now_ns,
                            struct effects *out) {
    struct audit *audit = &self->audit;
    struct audit_cell *cell = &audit->cell[number];
    if (cell->state != CELL_OPEN || cell->asked ||
        (!cell->answered && (cell->once || cell->first == 0)))
        return NOBODY;
    uint32_t destination = choose_other(self, cell, now_ns);
    if (destination == NOBODY) {
        if (!do_without(self, number, out) && cell->answered)
            audit->retry_ns = now_ns + self->row_deadline_ns;
        return NOBODY;
    }
    if (self->destination[destination].id == cell->last) { /* it is still at it */
        cell->asked = true;
        return NOBODY;
    }
    return destination;
}

static void ask_all(struct attention *self, uint64_t now_ns, struct effects *out) {
    struct audit *audit = &self->audit;
    bool some = false;
    audit->retry_ns = NEVER;
    dispatch_survey(self, 0, true, now_ns);
    for (uint32_t i = 0; i < audit->cells; i++) {
        audit->target[i] = find_target(self, audit->listed[i], now_ns, out);
        if (audit->target[i] != NOBODY) {
            self->queued[audit->target[i]] += self->cost[audit->target[i]];
            some = true;
        }
    }
    if (!some)
        return;
    for (uint32_t destination = 0; destination < self->destinations; destination++)
        ask_destination(self, destination, now_ns, out);
}

/* A part is over, whatever came of it. */
static void end_part(struct attention *self, struct part *part) {
    struct audit *audit = &self->audit;
    part->state = PART_FREE;
    for (uint32_t i = part->first; i < part->first + part->count; i++) {
        struct audit_cell *cell = &audit->cell[audit->ask[i]];
        if (cell->last != part->to)
            continue;
        cell->asked = false;
        cell->last = 0;
    }
}

static void leave_liars(struct attention *self, uint64_t now_ns, struct effects *out) {
    struct audit *audit = &self->audit;
    audit->accused = false;
    for (uint32_t i = 0; i < self->destinations; i++) {
        if (!self->destination[i].liar)
            continue;
        dispatch_leave(self, self->destination[i].id, now_ns, out);
        for (uint32_t p = 0; p < audit->parts; p++)
            if (audit->part[p].state != PART_FREE && audit->part[p].to == self->destination[i].id)
                end_part(self, &audit->part[p]);
    }
}

void audit_review(struct attention *self, uint64_t now_ns, struct effects *out) {
    struct audit *audit = &self->audit;
    if (self->batch.phase != BATCH_EXPERTS || (audit->pending == 0 && !audit->accused))
        return;
    do {
        if (audit->accused)
            leave_liars(self, now_ns, out);
        self->batch.flight.attempt++; /* no first sendings any more */
        if (audit->pending > 0)
            ask_all(self, now_ns, out);
    } while (audit->accused);
}

/* ---- answers ---- */

/* The part that a frame is about, judged as all others are. */
static struct part *find_part(struct attention *self, const struct frame_header *header,
                              struct effects *out) {
    struct frame_header unmarked = *header;
    unmarked.part &= ~AUDIT_PART;
    if (self->audit.cells == 0)
        unmarked.part = UINT32_MAX;
    return reply_part(self, &unmarked, ROLE_EXPERT, self->audit.part, self->audit.parts, out);
}

void audit_on_combine(struct attention *self, const struct frame *frame, uint64_t now_ns,
                      struct effects *out) {
    struct audit *audit = &self->audit;
    const struct frame_header *header = frame->header;
    struct part *part = find_part(self, header, out);
    if (part == NULL)
        return;
    bool fits = header->items == part->count && header->detail == 0 &&
                header->row_bytes == row_bytes(self);
    end_part(self, part);
    if (fits) {
        const uint8_t *rows = frame_rows(frame);
        dispatch_trust(self, part, now_ns);
        for (uint32_t i = 0; i < part->count; i++) {
            uint32_t number = audit->ask[part->first + i];
            audit_answer(self, number / self->k, number % self->k, header,
                         rows + i * row_bytes(self), false, out);
        }
    } else {
        effects_trace(out, TRACE_ERROR,
                      "an audited reply of actor %u has %u items of %u bytes, expected %u of %zu",
                      header->from, header->items, header->row_bytes, part->count, row_bytes(self));
    }
    audit_review(self, now_ns, out);
    dispatch_finish(self, out);
}

/* Others may hold it; this one is not asked again before the next epoch, or for a while. */
void audit_on_moved(struct attention *self, const struct frame_header *header, uint64_t now_ns,
                    struct effects *out) {
    struct part *part = find_part(self, header, out);
    if (part == NULL)
        return;
    effects_trace(out, TRACE_WARNING, "actor %u does not hold expert %u of layer %u, to be audited",
                  header->from, header->detail, header->layer);
    part->state = PART_WAITING;
}

/* ---- changes around ---- */

typedef bool part_test(const struct attention *self, const struct part *part, actor_id id);

static bool is_gone(const struct attention *self, const struct part *part, actor_id unused) {
    uint32_t index = dispatch_destination(self, part->to);
    return part->state == PART_WAITING || index == UINT32_MAX ||
           self->destination[index].incarnation != part->to_incarnation;
}

static bool is_at(const struct attention *self, const struct part *part, actor_id id) {
    return part->to == id;
}

static void end_where(struct attention *self, part_test *wanted, actor_id id) {
    for (uint32_t i = 0; i < self->audit.parts; i++) {
        struct part *part = &self->audit.part[i];
        if (part->state != PART_FREE && wanted(self, part, id))
            end_part(self, part);
    }
}

/* A process that was started again may give the same wrong bits: the word of its former life is
 * none. */
static void drop_votes(struct attention *self, struct audit_cell *cell) {
    uint32_t *link = &cell->votes;
    while (*link != 0) {
        struct audit_vote *vote = &self->audit.vote[*link - 1];
        uint32_t index = dispatch_destination(self, vote->from);
        if (index != UINT32_MAX && self->destination[index].incarnation == vote->incarnation) {
            link = &vote->next;
            continue;
        }
        if (cell->scattered == *link)
            cell->scattered = 0;
        *link = vote->next;
    }
}

void audit_adopt(struct attention *self, uint64_t now_ns, struct effects *out) {
    struct audit *audit = &self->audit;
    if (self->batch.phase != BATCH_EXPERTS || audit->cells == 0)
        return;
    end_where(self, is_gone, 0);
    for (uint32_t i = 0; i < audit->cells; i++)
        if (audit->cell[audit->listed[i]].state == CELL_OPEN)
            drop_votes(self, &audit->cell[audit->listed[i]]);
    audit_review(self, now_ns, out);
    dispatch_finish(self, out);
}

void audit_peer_lost(struct attention *self, actor_id id, uint64_t now_ns, struct effects *out) {
    if (self->batch.phase != BATCH_EXPERTS || self->audit.cells == 0)
        return;
    end_where(self, is_at, id);
    audit_review(self, now_ns, out);
    dispatch_finish(self, out);
}

/* It has had its time. While rows of the first plan are missing too, everybody may be slow; after
 * that it alone is waited for, and others are asked beside it. */
static void note_late(struct attention *self, struct part *part, uint64_t now_ns,
                      struct effects *out) {
    if (part->deadline_ns <= now_ns) {
        end_part(self, part);
    } else if (self->batch.flight.missing > 0) {
        part->hedge_at_ns = now_ns + self->hedge_ns;
    } else {
        part->hedge_at_ns = NEVER;
        dispatch_suspect(self, part, now_ns, out);
        for (uint32_t i = part->first; i < part->first + part->count; i++)
            if (self->audit.cell[self->audit.ask[i]].last == part->to)
                self->audit.cell[self->audit.ask[i]].asked = false;
    }
}

uint64_t audit_deadline(const struct attention *self) {
    uint64_t parts =
        parts_deadline(self->audit.part, self->audit.pending > 0 ? self->audit.parts : 0);
    return self->audit.pending > 0 && self->audit.retry_ns < parts ? self->audit.retry_ns : parts;
}

void audit_timer(struct attention *self, uint64_t now_ns, struct effects *out) {
    struct audit *audit = &self->audit;
    if (self->batch.phase != BATCH_EXPERTS || audit->pending == 0 || audit_deadline(self) > now_ns)
        return;
    if (audit->retry_ns <= now_ns)
        dispatch_believe(self);
    for (uint32_t i = 0; i < audit->parts; i++) {
        struct part *part = &audit->part[i];
        if ((part->state == PART_SENT && part->hedge_at_ns <= now_ns) ||
            (part->state != PART_FREE && part->deadline_ns <= now_ns))
            note_late(self, part, now_ns, out);
    }
    audit_review(self, now_ns, out);
    dispatch_finish(self, out);
}

/* ---- what is told ---- */

void audit_fill_heartbeat(const struct attention *self, Troupe__Heartbeat *heartbeat,
                          struct effects *out) {
    heartbeat->rows_audited = self->audit.rows;
    heartbeat->audits_differed = self->audit.differed;
    heartbeat->rows_unaudited = self->audit.alone;
    if (self->audit.share == 0)
        return;
    heartbeat->accusation =
        effects_alloc(out, (self->destinations + 1) * sizeof *heartbeat->accusation);
    for (uint32_t i = 0; i < self->destinations; i++) {
        const struct destination *destination = &self->destination[i];
        const struct peer *peer = member_peer(&self->member, destination->id);
        if (!destination->liar || peer == NULL ||
            peer->state == TROUPE__ACTOR_STATE__STATE_QUARANTINED)
            continue;
        Troupe__Accusation *accusation = effects_alloc(out, sizeof *accusation);
        troupe__accusation__init(accusation);
        accusation->actor = destination->id;
        accusation->incarnation = destination->incarnation;
        accusation->layer = destination->lie_layer;
        accusation->expert = destination->lie_expert;
        accusation->undecided = destination->undecided;
        heartbeat->accusation[heartbeat->n_accusation++] = accusation;
    }
}
