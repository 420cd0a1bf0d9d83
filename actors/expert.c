/* An expert actor: holds weights of (layer, expert) pairs and computes rows for attention actors.
 * No request state at all. Weights come from the host (LOAD) or from another process (expert_fetch.c), no more of
 * them in a second than load_bytes_per_second says.
 *
 * Each pair:
 *   ABSENT -> (ASSIGN) WANTED -> LOADING -> HELD -> (RELEASE) ABSENT
 *                                LOADING -> (RELEASE) DOOMED -> ABSENT once it has loaded
 *                                LOADING -> FAILED -> ABSENT with the next operation
 *
 * Operations of the coordinator are numbered; only the newest counts,
 * older ones that arrive late are ignored, the newest repeated gives READY again.
 *
 * Invariants: 1. at most LOADS_MAX loads are outstanding; 2. rows are computed only for held pairs,
 * otherwise MOVED is answered; 3. every frame is answered to the incarnation that sent it, with its
 * batch, layer, part and attempt; 4. a frame of more than frame_rows items is answered in pieces, each
 * computed and sent before the next one begins, in the order of its items. */
#include "actors/expert.h"

#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static bool in_model(const struct expert *self, uint32_t layer, uint32_t expert) {
    return layer < self->config.layers && expert < self->config.experts &&
           model_layer_is_moe(&self->config, layer);
}

static uint32_t place_of(const struct expert *self, uint32_t layer, uint32_t expert) {
    return layer * self->config.experts + expert;
}

/* ---- operations of the coordinator ---- */

static void send_ready(struct expert *self, struct effects *out) {
    Troupe__Ready ready = TROUPE__READY__INIT;
    ready.operation = self->operation;
    ready.ok = self->state == OPERATION_DONE;
    ready.error = self->error;
    ready.bytes = self->memory_kib * 1024;
    ready.layer = effects_alloc(out, ((size_t)self->failed + 1) * sizeof *ready.layer);
    ready.expert = effects_alloc(out, ((size_t)self->failed + 1) * sizeof *ready.expert);
    for (uint32_t i = 0; self->failed > 0 && i < self->pairs; i++)
        if (self->pair[i] == PAIR_FAILED) {
            ready.layer[ready.n_layer++] = i / self->config.experts;
            ready.expert[ready.n_expert++] = i % self->config.experts;
        }
    message envelope = member_envelope(&self->member);
    envelope.body_case = TROUPE__ENVELOPE__BODY_READY;
    envelope.ready = &ready;
    effects_send(out, ACTOR_COORDINATOR, &envelope);
}

/* None of it is done. */
static void fail_operation(struct expert *self, const char *why, struct effects *out) {
    self->state = OPERATION_FAILED;
    snprintf(self->error, sizeof self->error, "%s", why);
    for (uint32_t i = 0; i < self->pairs; i++)
        if (self->pair[i] == PAIR_WANTED || self->pair[i] == PAIR_FAILED)
            self->pair[i] = PAIR_ABSENT;
    self->wanted = self->failed = 0;
    effects_trace(out, TRACE_ERROR, "operation %llu failed: %s",
                  (unsigned long long)self->operation, why);
    send_ready(self, out);
}

void expert_spend(struct expert *self, uint64_t bytes, uint64_t now_ns) {
    if (self->bytes_per_second == 0)
        return;
    if (self->load_at_ns < now_ns)
        self->load_at_ns = now_ns;
    self->load_at_ns += (uint64_t)((double)bytes / (double)self->bytes_per_second * 1e9);
}

static void load_next(struct expert *self, uint64_t now_ns, struct effects *out) {
    while (self->wanted > 0 && self->loading < LOADS_MAX && now_ns >= self->load_at_ns) {
        while (self->pair[self->next_wanted] != PAIR_WANTED)
            self->next_wanted = (self->next_wanted + 1) % self->pairs;
        uint32_t place = self->next_wanted;
        self->pair[place] = PAIR_LOADING;
        self->wanted--;
        self->loading++;
        if (fetch_is_nearer(self, place)) {
            fetch_begin(self, place, now_ns, out);
            continue;
        }
        struct effect *effect = effects_add(out, EFFECT_LOAD);
        effect->load.layer = place / self->config.experts;
        effect->load.expert = place % self->config.experts;
        effect->load.operation = self->operation;
        effect->load.urgent = !fetch_held_elsewhere(self, place);
        expert_spend(self, self->pair_bytes, now_ns);
    }
}

/* An operation is complete when nothing it asked for is still to come. */
static void check_complete(struct expert *self, struct effects *out) {
    if (self->state != OPERATION_WORKING || self->wanted > 0)
        return;
    for (uint32_t i = 0; self->loading > 0 && i < self->pairs; i++)
        if (self->pair[i] == PAIR_LOADING)
            return;
    self->state = self->failed == 0 ? OPERATION_DONE : OPERATION_FAILED;
    if (self->failed == 0)
        effects_trace(out, TRACE_INFO, "operation %llu done: %u experts held",
                      (unsigned long long)self->operation, self->held);
    else
        effects_trace(out, TRACE_ERROR, "operation %llu failed for %u experts: %s",
                      (unsigned long long)self->operation, self->failed, self->error);
    send_ready(self, out);
}

/* True if the operation is for this process and new; the newest one said again is answered with what came
 * of it. */
static bool begin_operation(struct expert *self, uint64_t operation, uint64_t incarnation,
                            struct effects *out) {
    if (incarnation != 0 && incarnation != self->member.identity.incarnation) {
        effects_trace(out, TRACE_WARNING, "ignored operation %llu for an earlier process at this address",
                      (unsigned long long)operation);
        return false;
    }
    if (operation == self->operation && self->state >= OPERATION_DONE)
        send_ready(self, out);
    if (operation <= self->operation)
        return false;
    self->operation = operation;
    self->state = OPERATION_WORKING;
    self->error[0] = '\0';
    for (uint32_t i = 0; i < self->pairs; i++)
        if (self->pair[i] == PAIR_WANTED || self->pair[i] == PAIR_FAILED)
            self->pair[i] = PAIR_ABSENT;
    self->wanted = self->failed = self->to_load = 0;
    return true;
}

static void want(struct expert *self, uint32_t place) {
    if (self->pair[place] == PAIR_ABSENT) {
        self->pair[place] = PAIR_WANTED;
        self->wanted++;
        self->to_load++;
    } else if (self->pair[place] == PAIR_DOOMED) {
        self->pair[place] = PAIR_LOADING;
        self->to_load++;
    } else if (self->pair[place] == PAIR_LOADING) {
        self->to_load++;
    }
}

static void on_assign(struct expert *self, const Troupe__Assign *assign, uint64_t now_ns,
                      struct effects *out) {
    if (!begin_operation(self, assign->operation, assign->incarnation, out))
        return;
    for (size_t i = 0; i < assign->n_layer; i++) {
        if (!in_model(self, assign->layer[i], assign->expert[i])) {
            char why[128];
            snprintf(why, sizeof why, "layer %u expert %u is not one of the model's %u x %u",
                     assign->layer[i], assign->expert[i], self->config.layers,
                     self->config.experts);
            fail_operation(self, why, out);
            return;
        }
        want(self, place_of(self, assign->layer[i], assign->expert[i]));
    }
    load_next(self, now_ns, out);
    check_complete(self, out);
}

static void drop(struct expert *self, uint32_t place, struct effects *out) {
    struct effect *effect = effects_add(out, EFFECT_UNLOAD);
    effect->load.layer = place / self->config.experts;
    effect->load.expert = place % self->config.experts;
    effect->load.operation = self->operation;
    self->pair[place] = PAIR_ABSENT;
}

static void release_place(struct expert *self, uint32_t place, struct effects *out) {
    if (self->pair[place] == PAIR_LOADING) {
        self->pair[place] = PAIR_DOOMED;
    } else if (self->pair[place] == PAIR_HELD) {
        self->held--;
        self->memory_kib -= self->pair_bytes_kib[place];
        drop(self, place, out);
    }
}

static void on_release(struct expert *self, const Troupe__Release *release, struct effects *out) {
    if (!begin_operation(self, release->operation, release->incarnation, out))
        return;
    for (size_t i = 0; i < release->n_layer; i++)
        if (in_model(self, release->layer[i], release->expert[i]))
            release_place(self, place_of(self, release->layer[i], release->expert[i]), out);
    check_complete(self, out);
}

void expert_take_loaded(struct expert *self, uint32_t place, int error, const char *text,
                        uint64_t bytes, uint64_t now_ns, struct effects *out) {
    if (self->pair[place] != PAIR_LOADING && self->pair[place] != PAIR_DOOMED)
        return;
    bool doomed = self->pair[place] == PAIR_DOOMED;
    self->loading--;
    if (error < 0) {
        self->pair[place] = PAIR_ABSENT;
        if (!doomed && self->state == OPERATION_WORKING) { /* the others are loaded all the same */
            self->pair[place] = PAIR_FAILED;
            self->failed++;
            snprintf(self->error, sizeof self->error, "%s", text != NULL ? text : "loading failed");
        }
    } else if (doomed) {
        drop(self, place, out);
    } else {
        self->pair[place] = PAIR_HELD;
        self->pair_bytes_kib[place] = (uint32_t)((bytes + 1023) / 1024);
        self->memory_kib += self->pair_bytes_kib[place];
        self->held++;
    }
    load_next(self, now_ns, out);
    check_complete(self, out);
}

static void on_loaded(struct expert *self, const struct event *event, uint64_t now_ns,
                      struct effects *out) {
    if (in_model(self, event->loaded.layer, event->loaded.expert))
        expert_take_loaded(self, place_of(self, event->loaded.layer, event->loaded.expert),
                           event->loaded.error, event->loaded.text, event->loaded.bytes, now_ns, out);
}

static void take_placement(struct expert *self, const Troupe__Commit *commit) {
    memset(self->placed, 0, self->pairs);
    for (size_t i = 0; i < commit->n_holder; i++)
        if (commit->holder[i] == self->member.id && in_model(self, commit->layer[i], commit->expert[i]))
            self->placed[place_of(self, commit->layer[i], commit->expert[i])] = 1;
    fetch_take_placement(self, commit);
}

/* For a coordinator that was started again: what is held, that which others know to be here first; then what is
 * being loaded or was to be. */
static void describe_holdings(const struct member *member, Troupe__Hello *hello,
                              struct effects *out) {
    const struct expert *self =
        (const struct expert *)((const char *)member - offsetof(struct expert, member));
    uint32_t *layer = effects_alloc(out, ((size_t)self->pairs + 1) * sizeof *layer);
    uint32_t *expert = effects_alloc(out, ((size_t)self->pairs + 1) * sizeof *expert);
    uint32_t placed = 0, held, others = self->held;
    for (uint32_t place = 0; place < self->pairs; place++)
        placed += self->pair[place] == PAIR_HELD && self->placed[place];
    hello->placed = held = placed;
    placed = 0;
    for (uint32_t place = 0; place < self->pairs; place++) {
        if (self->pair[place] == PAIR_ABSENT || self->pair[place] == PAIR_FAILED)
            continue;
        uint32_t at = self->pair[place] != PAIR_HELD ? others++
                      : self->placed[place]          ? placed++
                                                     : held++;
        layer[at] = place / self->config.experts;
        expert[at] = place % self->config.experts;
    }
    ASSERT(held == self->held && placed == hello->placed);
    hello->held = held;
    hello->operation = self->operation;
    hello->n_layer = hello->n_expert = others;
    hello->layer = layer;
    hello->expert = expert;
}

/* ---- rows ---- */

/* Header of an answer: everything that tells what is answered comes from the question. */
static struct frame_header answer_header(const struct expert *self, enum frame_kind kind,
                                         const struct frame_header *question) {
    return (struct frame_header){
        .kind = (uint16_t)kind,
        .from = self->member.id,
        .to = question->from,
        .from_incarnation = self->member.identity.incarnation,
        .to_incarnation = question->from_incarnation,
        .epoch = question->epoch,
        .batch = question->batch,
        .layer = question->layer,
        .attempt = question->attempt,
        .part = question->part,
    };
}

static void send_moved(struct expert *self, const struct frame_header *question, uint32_t expert,
                       struct effects *out) {
    struct effect *effect = effects_add(out, EFFECT_TRANSFER);
    effect->transfer.header = answer_header(self, FRAME_MOVED, question);
    effect->transfer.header.detail = expert;
    effects_trace(out, TRACE_INFO, "answered MOVED for layer %u expert %u to actor %u",
                  question->layer, expert, question->from);
}

/* Why a frame cannot be computed here, NULL if it can. */
static const char *refuse(const struct expert *self, const struct frame_header *header) {
    if (member_frame_sender(&self->member, header, ROLE_ATTENTION) == NULL)
        return "its sender is unknown or meant another incarnation";
    const bool e4m3 = header->format == FRAME_ROWS_E4M3;
    if (e4m3 && self->e4m3_bytes == 0)
        return "its rows are E4M3, which this profile or model does not take";
    if (header->row_bytes != (e4m3 ? self->e4m3_bytes : self->row_bytes))
        return "its rows have another size than this model's";
    if (header->items == 0 || header->rows == 0)
        return "it is empty";
    if (self->runnings == RUNNING_MAX)
        return "too many frames are in work";
    return NULL;
}

/* Whole experts as long as they fit, so that weights are read once. */
static uint32_t take_groups(const struct expert *self, struct running *running,
                            struct frame_group *ret_group) {
    uint32_t groups = 0;
    running->piece_first += running->piece_items;
    running->piece_items = 0;
    while (running->next_group < running->header.groups) {
        const struct frame_group *group = &running->group[running->next_group];
        uint32_t left = group->count - running->next_taken,
                 room = self->piece_items_max - running->piece_items;
        if (left > room && running->piece_items > 0)
            break;
        uint32_t count = left < room ? left : room;
        ret_group[groups++] = (struct frame_group){group->expert, count};
        running->piece_items += count;
        running->next_taken += count;
        if (running->next_taken < group->count)
            break;
        running->next_taken = 0;
        running->next_group++;
    }
    return groups;
}

static void compute_piece(struct expert *self, struct running *running, struct effects *out) {
    const struct frame_header *header = &running->header;
    struct frame_group *group =
        effects_alloc(out, (header->groups - running->next_group) * sizeof *group);
    uint32_t groups = take_groups(self, running, group);
    struct effect *effect = effects_add(out, EFFECT_COMPUTE);
    running->tag = ++self->last_tag;
    effect->compute = (struct program){
        .kind = PROGRAM_EXPERT,
        .layer = header->layer,
        .rows = header->rows,
        .items = running->piece_items,
        .groups = groups,
        .group = group,
        .item_row = running->item_row + running->piece_first,
        .payload = running->rows,
        .e4m3 = header->format == FRAME_ROWS_E4M3,
        .answer_to = header->from,
        .tag = running->tag,
    };
}

static void on_dispatch(struct expert *self, const struct frame *frame, uint64_t now_ns,
                        struct effects *out) {
    const struct frame_header *header = frame->header;
    const char *why = refuse(self, header);
    if (why != NULL) {
        effects_trace(out, TRACE_WARNING,
                      "dropped a dispatch of actor %u (%u rows of %u bytes): %s", header->from,
                      header->rows, header->row_bytes, why);
        return;
    }
    const struct frame_group *group = frame_groups(frame);
    for (uint32_t i = 0; i < header->groups; i++)
        if (!in_model(self, header->layer, group[i].expert) ||
            self->pair[place_of(self, header->layer, group[i].expert)] != PAIR_HELD) {
            send_moved(self, header, group[i].expert, out);
            return;
        }
    struct running *running =
        &self->running[(self->first_running + self->runnings++) % RUNNING_MAX];
    *running = (struct running){
        .header = *header,
        .group = group,
        .item_row = frame_item_rows(frame),
        .rows = frame_rows(frame),
        .since_ns = now_ns,
    };
    compute_piece(self, running, out);
}

static void end_running(struct expert *self) {
    self->first_running = (self->first_running + 1) % RUNNING_MAX;
    self->runnings--;
}

static void on_computed(struct expert *self, const struct program_result *result, uint64_t now_ns,
                        struct effects *out) {
    if (result->kind == PROGRAM_READ) {
        fetch_on_read(self, result, out);
        return;
    }
    struct running *running = &self->running[self->first_running];
    if (self->runnings == 0 || running->tag != result->tag)
        return;
    if (result->error < 0) { /* the sender asks again, or somebody else */
        effects_trace(out, TRACE_ERROR, "computing layer %u failed: %s", running->header.layer,
                      error_name(result->error));
        end_running(self);
        return;
    }
    self->rows += running->piece_items;
    struct effect *effect = effects_add(out, EFFECT_TRANSFER);
    effect->transfer.header = answer_header(self, FRAME_COMBINE, &running->header);
    effect->transfer.header.items = running->piece_items;
    effect->transfer.header.detail = running->piece_first;
    effect->transfer.region = REGION_EXPERT_OUTPUT;
    effect->transfer.count = running->piece_items;
    effect->transfer.more = running->next_group < running->header.groups;
    if (running->next_group < running->header.groups) {
        compute_piece(self, running, out);
        return;
    }
    self->frames++;
    self->busy_ns += now_ns - running->since_ns;
    end_running(self);
}

/* ---- events ---- */

static void send_heartbeat(struct expert *self, uint64_t now_ns, struct effects *out) {
    Troupe__Heartbeat heartbeat = TROUPE__HEARTBEAT__INIT;
    heartbeat.state = self->member.draining              ? TROUPE__ACTOR_STATE__STATE_DRAINING
                      : self->state == OPERATION_WORKING ? TROUPE__ACTOR_STATE__STATE_LOADING
                                                         : TROUPE__ACTOR_STATE__STATE_READY;
    heartbeat.copies_held = self->held;
    heartbeat.copies_loading = self->loading + self->wanted;
    uint32_t left = self->loading + self->wanted < self->to_load ? self->loading + self->wanted : self->to_load;
    heartbeat.order = self->operation;
    heartbeat.load_bytes = self->to_load * self->pair_bytes;
    heartbeat.load_bytes_done = (self->to_load - left) * self->pair_bytes + fetch_bytes_done(self);
    if (heartbeat.load_bytes_done > heartbeat.load_bytes)
        heartbeat.load_bytes_done = heartbeat.load_bytes;
    heartbeat.fetched_bytes = self->fetched_bytes;
    heartbeat.given_bytes = self->given_bytes;
    heartbeat.memory_bytes = self->memory_kib * 1024;
    heartbeat.frames = self->frames;
    heartbeat.rows = self->rows;
    heartbeat.busy_ns = self->busy_ns;
    member_heartbeat(&self->member, &heartbeat, now_ns, out);
}

static void on_message(struct expert *self, const message *envelope, uint64_t now_ns,
                       struct effects *out) {
    if (envelope->from == ACTOR_COORDINATOR && envelope->body_case == TROUPE__ENVELOPE__BODY_ASSIGN)
        on_assign(self, envelope->assign, now_ns, out);
    else if (envelope->from == ACTOR_COORDINATOR &&
             envelope->body_case == TROUPE__ENVELOPE__BODY_RELEASE)
        on_release(self, envelope->release, out);
    else if (envelope->body_case == TROUPE__ENVELOPE__BODY_FETCH)
        fetch_on_fetch(self, envelope, out);
    else if (envelope->body_case == TROUPE__ENVELOPE__BODY_WEIGHTS)
        fetch_on_weights(self, envelope, now_ns, out);
    else
        effects_trace(out, TRACE_WARNING, "ignored a message of kind %d from actor %u",
                      envelope->body_case, envelope->from);
}

static void expert_step(struct actor *actor, const struct event *event, uint64_t now_ns,
                        struct effects *out) {
    struct expert *self = (struct expert *)actor;
    uint32_t news = member_step(&self->member, event, now_ns, out);
    if ((news & MEMBER_EXIT) != 0)
        return;
    if ((news & MEMBER_COMMITTED) != 0)
        take_placement(self, event->message->commit);
    if ((news & (MEMBER_DONE | MEMBER_COMMITTED)) == 0) {
        if (event->kind == EVENT_MESSAGE)
            on_message(self, event->message, now_ns, out);
        else if (event->kind == EVENT_FRAME && event->frame->header->kind == FRAME_DISPATCH)
            on_dispatch(self, event->frame, now_ns, out);
        else if (event->kind == EVENT_COMPUTED)
            on_computed(self, event->computed, now_ns, out);
        else if (event->kind == EVENT_LOADED)
            on_loaded(self, event, now_ns, out);
    }
    load_next(self, now_ns, out);
    fetch_timer(self, now_ns, out);
    if ((news & MEMBER_HEARTBEAT) != 0)
        send_heartbeat(self, now_ns, out);
}

static uint64_t expert_deadline(const struct actor *actor) {
    const struct expert *self = (const struct expert *)actor;
    uint64_t deadline = member_deadline(&self->member), fetch = fetch_deadline(self);
    if (self->member.exited)
        return NEVER;
    if (self->wanted > 0 && self->loading < LOADS_MAX && self->load_at_ns < deadline)
        deadline = self->load_at_ns;
    return fetch < deadline ? fetch : deadline;
}

static const char *expert_describe(struct actor *actor) {
    struct expert *self = (struct expert *)actor;
    snprintf(self->description, sizeof self->description,
             "held=%u loading=%u wanted=%u running=%u frames=%llu rows=%llu", self->held,
             self->loading, self->wanted, self->runnings, (unsigned long long)self->frames,
             (unsigned long long)self->rows);
    return self->description;
}

static void expert_destroy(struct actor *actor) {
    struct expert *self = (struct expert *)actor;
    free(self->pair);
    free(self->pair_bytes_kib);
    free(self->placed);
    fetch_free(self);
    member_free(&self->member);
    free(self);
}

static const struct actor_class EXPERT_CLASS = {
    .role = ROLE_EXPERT,
    .step = expert_step,
    .deadline = expert_deadline,
    .destroy = expert_destroy,
    .describe = expert_describe,
};

struct actor *expert_create(const struct actor_identity *identity, const struct settings *settings,
                            const struct model_config *config, uint64_t capacity_bytes) {
    struct expert *self = calloc(1, sizeof *self);
    if (self == NULL)
        return NULL;
    self->actor.class = &EXPERT_CLASS;
    self->config = *config;
    self->piece_items_max = settings->frame_rows;
    self->pairs = config->layers * config->experts;
    self->pair = calloc((size_t)self->pairs + 1, sizeof *self->pair);
    self->pair_bytes_kib = calloc((size_t)self->pairs + 1, sizeof *self->pair_bytes_kib);
    self->placed = calloc((size_t)self->pairs + 1, sizeof *self->placed);
    if (self->pair == NULL || self->pair_bytes_kib == NULL || self->placed == NULL ||
        !member_init(&self->member, identity, settings, capacity_bytes, 0,
                     ROLE_BIT(ROLE_ATTENTION))) {
        expert_destroy(&self->actor);
        return NULL;
    }
    self->bytes_per_second = settings->load_bytes_per_second;
    self->pair_bytes = identity_expert_bytes(&self->member.identity, config);
    self->member.describe_holdings = describe_holdings;
    self->row_bytes = config->hidden * identity_activation_bytes(&self->member.identity);
    if (config->fp8 && identity_is_fp8(&self->member.identity))
        self->e4m3_bytes = e4m3_row_bytes(config->hidden);
    return &self->actor;
}

void expert_set_weights(struct actor *actor, enum weights_from weights) {
    ((struct expert *)actor)->weights = weights;
}
