/* Weights from other expert processes that hold them, for a process that has no file of them or is nearer to
 * another process than to a disk that has read it lately.
 *
 *   (chosen) -> ASKING: FETCH (offset) to one holder -> WEIGHTS (a piece) -> FETCH (next offset) -> ... -> whole
 *   ASKING -> another holder, at the same offset: no answer after a few questions, an answer that refuses, the
 *             holder is lost or holds it no more
 *   whole  -> CRC is right: LOAD with the image; wrong: from the beginning, from another holder
 *   nobody has it in the adopted epoch -> asked for again a few times, or as soon as the next epoch comes
 *   nobody left to ask -> LOAD from the file, if there is one; else the load fails with the reason
 *
 * All holders' images of a pair have the same bytes, so a transfer goes on at any of them; one that says another
 * length or sum makes it begin again. The asker sets the pace (load_bytes_per_second) and bounds what it takes: one
 * piece of each transfer is outstanding, LOADS_MAX transfers at most, no image larger than the model's shapes allow.
 * Givers keep no state beyond the pieces being read.
 *
 * Invariants: 1. a piece counts only if it is the one asked for, from whom it was asked, and its CRC is right;
 * 2. image != NULL iff total > 0; 3. every transfer ends in expert_take_loaded or in a LOAD. */
#include "actors/expert.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define REPEATS_MAX     4u          /* questions to one holder for one piece */
#define ROUNDS_MAX      3u          /* times all holders are tried in vain */
#define WAIT_MAX_NS     1000000000u

/* ---- who has it ---- */

void fetch_take_placement(struct expert *self, const Troupe__Commit *commit) {
    self->holders = 0;
    if (commit->n_holder > self->holders_capacity) {
        self->holder_place = realloc(self->holder_place, commit->n_holder * sizeof *self->holder_place);
        self->holder_id = realloc(self->holder_id, commit->n_holder * sizeof *self->holder_id);
        ASSERT(self->holder_place != NULL && self->holder_id != NULL && "memory for a placement");
        self->holders_capacity = (uint32_t)commit->n_holder;
    }
    for (size_t i = 0; i < commit->n_holder; i++) {
        if (commit->holder[i] == self->member.id || commit->layer[i] >= self->config.layers ||
            commit->expert[i] >= self->config.experts)
            continue;
        self->holder_place[self->holders] = commit->layer[i] * self->config.experts + commit->expert[i];
        self->holder_id[self->holders++] = commit->holder[i];
    }
    for (uint32_t i = 0; i < LOADS_MAX; i++)
        if (self->fetch[i].used && self->fetch[i].from == 0)
            self->fetch[i].ask_at_ns = 0; /* somebody may have it now */
}

static bool can_give(const struct peer *peer) {
    return peer != NULL && peer->role == ROLE_EXPERT && !peer->lost;
}

/* The holder whose turn it is; how many there are. */
static struct peer *choose(const struct expert *self, uint32_t place, uint32_t turn, uint32_t *ret_count) {
    struct peer *found = NULL;
    uint32_t count = 0;
    for (uint32_t i = 0; i < self->holders; i++)
        count += self->holder_place[i] == place && can_give(member_peer(&self->member, self->holder_id[i]));
    *ret_count = count;
    for (uint32_t i = 0, at = 0; i < self->holders && found == NULL && count > 0; i++) {
        struct peer *peer = self->holder_place[i] == place ? member_peer(&self->member, self->holder_id[i]) : NULL;
        if (can_give(peer) && at++ == turn % count)
            found = peer;
    }
    return found;
}

bool fetch_held_elsewhere(const struct expert *self, uint32_t place) {
    uint32_t count;
    choose(self, place, 0, &count);
    return count > 0;
}

bool fetch_is_nearer(const struct expert *self, uint32_t place) {
    uint32_t count;
    if (self->weights != WEIGHTS_AUTO)
        return self->weights == WEIGHTS_PEER;
    choose(self, place, 0, &count);
    if (count == 0)
        return false;
    for (uint32_t i = 0; i < self->holders; i++) {
        const struct peer *peer =
            self->holder_place[i] == place ? member_peer(&self->member, self->holder_id[i]) : NULL;
        if (can_give(peer) && peer->near) /* it has read the same file: the pages are in memory */
            return false;
    }
    return true;
}

/* ---- asking ---- */

static void drop(struct fetch *fetch) {
    free(fetch->image);
    memset(fetch, 0, sizeof *fetch);
}

static void forget_image(struct fetch *fetch) {
    free(fetch->image);
    fetch->image = NULL;
    fetch->total = fetch->got = 0;
}

static void give_up(struct expert *self, struct fetch *fetch, uint64_t now_ns, struct effects *out) {
    uint32_t place = fetch->place, layer = place / self->config.experts, expert = place % self->config.experts;
    drop(fetch);
    if (self->weights != WEIGHTS_PEER) {
        effects_trace(out, TRACE_WARNING, "nobody gives layer %u expert %u: it is read from the file", layer,
                      expert);
        struct effect *effect = effects_add(out, EFFECT_LOAD);
        effect->load.layer = layer;
        effect->load.expert = expert;
        effect->load.operation = self->operation;
        effect->load.urgent = !fetch_held_elsewhere(self, place);
        expert_spend(self, self->pair_bytes, now_ns);
        return;
    }
    char why[160];
    snprintf(why, sizeof why,
             "no other process gives layer %u expert %u, and this one has no file of it", layer, expert);
    expert_take_loaded(self, place, ERR_NOT_FOUND, why, 0, now_ns, out);
}

static void ask(struct expert *self, struct fetch *fetch, uint64_t now_ns, struct effects *out) {
    uint32_t count;
    struct peer *peer = fetch->from != 0 ? member_peer(&self->member, fetch->from) : NULL;
    if (!can_give(peer) || peer->incarnation != fetch->from_incarnation)
        peer = choose(self, fetch->place, fetch->turn, &count);
    if (peer == NULL && fetch->tries < ROUNDS_MAX) { /* the epoch that says who has it may be on its way */
        fetch->tries++;
        fetch->repeats = 0;
        fetch->ask_at_ns = now_ns + fetch->wait_ns;
        fetch->wait_ns *= 2;
        return;
    }
    if (peer == NULL) {
        give_up(self, fetch, now_ns, out);
        return;
    }
    if (fetch->from != peer->id || fetch->from_incarnation != peer->incarnation) {
        fetch->from = peer->id;
        fetch->from_incarnation = peer->incarnation;
        fetch->repeats = 0;
        fetch->wait_ns = self->member.hello_retry_ns;
    }
    member_reach(&self->member, peer, out);
    Troupe__Fetch body = TROUPE__FETCH__INIT;
    body.transfer = fetch->transfer;
    body.layer = fetch->place / self->config.experts;
    body.expert = fetch->place % self->config.experts;
    body.offset = fetch->got;
    body.bytes = WEIGHTS_CHUNK_MAX;
    message envelope = member_envelope(&self->member);
    envelope.body_case = TROUPE__ENVELOPE__BODY_FETCH;
    envelope.fetch = &body;
    effects_send(out, peer->id, &envelope);
    fetch->repeats++;
    fetch->ask_at_ns = now_ns + fetch->wait_ns;
    fetch->wait_ns = fetch->wait_ns * 2 < WAIT_MAX_NS ? fetch->wait_ns * 2 : WAIT_MAX_NS;
}

/* As soon as the limit allows. */
static void ask_later(struct expert *self, struct fetch *fetch, uint64_t now_ns, struct effects *out) {
    fetch->repeats = 0;
    fetch->wait_ns = self->member.hello_retry_ns;
    if (self->bytes_per_second > 0 && self->load_at_ns > now_ns)
        fetch->ask_at_ns = self->load_at_ns;
    else
        ask(self, fetch, now_ns, out);
}

static void ask_another(struct expert *self, struct fetch *fetch, const char *why, uint64_t now_ns,
                        struct effects *out) {
    uint32_t count;
    effects_trace(out, TRACE_INFO, "layer %u expert %u: actor %u gives none of it (%s)",
                  fetch->place / self->config.experts, fetch->place % self->config.experts, fetch->from, why);
    fetch->from = 0;
    fetch->turn++;
    fetch->tries++;
    choose(self, fetch->place, fetch->turn, &count);
    if (count > 0 && fetch->tries >= ROUNDS_MAX * count)
        give_up(self, fetch, now_ns, out);
    else
        ask(self, fetch, now_ns, out);
}

void fetch_begin(struct expert *self, uint32_t place, uint64_t now_ns, struct effects *out) {
    struct fetch *fetch = self->fetch;
    while (fetch < self->fetch + LOADS_MAX && fetch->used)
        fetch++;
    ASSERT(fetch < self->fetch + LOADS_MAX); /* no more than LOADS_MAX loads are outstanding */
    *fetch = (struct fetch){.used = true, .place = place, .transfer = ++self->last_transfer};
    fetch->turn = self->member.id; /* not all of the same one */
    fetch->wait_ns = self->member.hello_retry_ns;
    ask(self, fetch, now_ns, out);
}

void fetch_timer(struct expert *self, uint64_t now_ns, struct effects *out) {
    for (uint32_t i = 0; i < LOADS_MAX; i++) {
        struct fetch *fetch = &self->fetch[i];
        if (!fetch->used)
            continue;
        const struct peer *peer = member_peer(&self->member, fetch->from);
        bool gone = !can_give(peer) || peer->incarnation != fetch->from_incarnation;
        if (fetch->from != 0 && gone)
            ask_another(self, fetch, "it is gone", now_ns, out);
        else if (now_ns >= fetch->ask_at_ns && fetch->repeats >= REPEATS_MAX)
            ask_another(self, fetch, "it does not answer", now_ns, out);
        else if (now_ns >= fetch->ask_at_ns)
            ask(self, fetch, now_ns, out);
    }
}

uint64_t fetch_deadline(const struct expert *self) {
    uint64_t deadline = NEVER;
    for (uint32_t i = 0; i < LOADS_MAX; i++)
        if (self->fetch[i].used && self->fetch[i].ask_at_ns < deadline)
            deadline = self->fetch[i].ask_at_ns;
    return deadline;
}

/* ---- what comes ---- */

/* NULL: the piece counts. */
static const char *refuse_piece(const struct expert *self, const struct fetch *fetch,
                                const Troupe__Weights *weights) {
    const char *fingerprint = self->member.model_fingerprint;
    if (weights->error[0] != '\0')
        return weights->error;
    if (fingerprint[0] == '\0' || strcmp(weights->model_fingerprint, fingerprint) != 0)
        return "its model is another one";
    if (weights->total == 0 || weights->total > engine_expert_image_limit(&self->config))
        return "its length cannot be";
    uint64_t left = weights->offset < weights->total ? weights->total - weights->offset : 0;
    if (weights->data.len != (left < WEIGHTS_CHUNK_MAX ? left : WEIGHTS_CHUNK_MAX) || left == 0)
        return "the piece is not as long as was asked for";
    if (crc32c(0, weights->data.data, weights->data.len) != weights->data_crc)
        return "the piece has a wrong sum";
    if (fetch->image != NULL && (weights->total != fetch->total || weights->image_crc != fetch->crc))
        return "it has other weights than who was asked before";
    return NULL;
}

static void complete(struct expert *self, struct fetch *fetch, uint64_t now_ns, struct effects *out) {
    if (crc32c(0, fetch->image, fetch->total) != fetch->crc) {
        forget_image(fetch);
        ask_another(self, fetch, "the whole has a wrong sum", now_ns, out);
        return;
    }
    struct effect *effect = effects_add(out, EFFECT_LOAD);
    effect->load.layer = fetch->place / self->config.experts;
    effect->load.expert = fetch->place % self->config.experts;
    effect->load.operation = self->operation;
    effect->load.image = fetch->image; /* the host frees it */
    effect->load.image_bytes = fetch->total;
    fetch->image = NULL;
    drop(fetch);
}

void fetch_on_weights(struct expert *self, const message *envelope, uint64_t now_ns,
                      struct effects *out) {
    const Troupe__Weights *weights = envelope->weights;
    struct fetch *fetch = NULL;
    for (uint32_t i = 0; i < LOADS_MAX; i++)
        if (self->fetch[i].used && self->fetch[i].transfer == weights->transfer)
            fetch = &self->fetch[i];
    if (fetch == NULL || fetch->from != envelope->from ||
        (weights->error[0] == '\0' && weights->offset != fetch->got))
        return; /* late, or said twice */
    const char *why = refuse_piece(self, fetch, weights);
    if (why != NULL) {
        if (fetch->image != NULL && weights->error[0] == '\0' &&
            (weights->total != fetch->total || weights->image_crc != fetch->crc))
            forget_image(fetch);
        char text[128];
        snprintf(text, sizeof text, "%.120s", why);
        ask_another(self, fetch, text, now_ns, out);
        return;
    }
    if (fetch->image == NULL) {
        fetch->image = malloc(weights->total);
        if (fetch->image == NULL) {
            uint32_t place = fetch->place;
            drop(fetch);
            expert_take_loaded(self, place, ERR_NO_MEMORY, "no memory for weights", 0, now_ns, out);
            return;
        }
        fetch->total = weights->total;
        fetch->crc = weights->image_crc;
    }
    memcpy(fetch->image + fetch->got, weights->data.data, weights->data.len);
    fetch->got += weights->data.len;
    fetch->tries = 0;
    self->fetched_bytes += weights->data.len;
    expert_spend(self, weights->data.len, now_ns);
    if (fetch->got == fetch->total)
        complete(self, fetch, now_ns, out);
    else
        ask_later(self, fetch, now_ns, out);
}

uint64_t fetch_bytes_done(const struct expert *self) {
    uint64_t done = 0;
    for (uint32_t i = 0; i < LOADS_MAX; i++)
        if (self->fetch[i].used && self->fetch[i].total > 0)
            done += (uint64_t)((double)self->fetch[i].got / (double)self->fetch[i].total *
                               (double)self->pair_bytes);
    return done;
}

void fetch_free(struct expert *self) {
    for (uint32_t i = 0; i < LOADS_MAX; i++)
        drop(&self->fetch[i]);
    free(self->holder_place);
    free(self->holder_id);
}

/* ---- giving ---- */

static void send_weights(struct expert *self, const struct reading *reading, Troupe__Weights *body,
                         struct effects *out) {
    struct peer *peer = member_peer(&self->member, reading->to);
    if (peer == NULL)
        return;
    body->transfer = reading->transfer;
    body->offset = reading->offset;
    body->model_fingerprint = self->member.model_fingerprint;
    message envelope = member_envelope(&self->member);
    envelope.body_case = TROUPE__ENVELOPE__BODY_WEIGHTS;
    envelope.weights = body;
    member_reach(&self->member, peer, out);
    effects_send(out, reading->to, &envelope);
}

void fetch_on_fetch(struct expert *self, const message *envelope, struct effects *out) {
    const Troupe__Fetch *fetch = envelope->fetch;
    struct reading reading = {.to = envelope->from,
                              .transfer = fetch->transfer,
                              .offset = fetch->offset,
                              .layer = fetch->layer,
                              .expert = fetch->expert};
    bool held = fetch->layer < self->config.layers && fetch->expert < self->config.experts &&
                self->pair[fetch->layer * self->config.experts + fetch->expert] == PAIR_HELD;
    if (!held) {
        Troupe__Weights body = TROUPE__WEIGHTS__INIT;
        body.error = "it does not hold it";
        send_weights(self, &reading, &body, out);
        return;
    }
    if (self->readings == READING_MAX) /* asked again later */
        return;
    reading.tag = ++self->last_tag;
    self->reading[(self->first_reading + self->readings++) % READING_MAX] = reading;
    struct effect *effect = effects_add(out, EFFECT_COMPUTE);
    effect->compute = (struct program){
        .kind = PROGRAM_READ,
        .layer = fetch->layer,
        .items = fetch->expert,
        .offset = fetch->offset,
        .bytes = fetch->bytes < WEIGHTS_CHUNK_MAX ? fetch->bytes : WEIGHTS_CHUNK_MAX,
        .tag = reading.tag,
    };
}

void fetch_on_read(struct expert *self, const struct program_result *result, struct effects *out) {
    const struct reading *reading = &self->reading[self->first_reading];
    if (self->readings == 0 || reading->tag != result->tag)
        return;
    self->first_reading = (self->first_reading + 1) % READING_MAX;
    self->readings--;
    Troupe__Weights body = TROUPE__WEIGHTS__INIT;
    if (result->total == 0) {
        body.error = "it cannot be read";
    } else {
        body.total = result->total;
        body.image_crc = result->crc;
        body.data.data = (uint8_t *)result->piece;
        body.data.len = result->piece_bytes;
        body.data_crc = crc32c(0, result->piece, result->piece_bytes);
        self->given_bytes += result->piece_bytes;
    }
    send_weights(self, reading, &body, out);
}
