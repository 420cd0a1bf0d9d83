/* The last rows of a batch to the samplers and their answers back.
 *
 * Questions are split over the live samplers by sequence, and into parts of bounded size; a row
 * that asks for all its logits goes alone, and only a few of those are out at a time. A part
 * without an answer is asked again, of another sampler if there is one: samplers keep no state, so
 * the answer is the same. One that takes much longer than is usual is put to a second sampler as well
 * (part.also); the first answer is taken.
 *
 * Invariants: 1. parts are disjoint ranges of batch.order that cover the questions; 2. a part's
 * answer is taken once; 3. the batch ends when every part is answered. */
#include "actors/attention.h"

#include <stdio.h>
#include <string.h>

#define PART_WORDS_MAX         65536u /* variable words in one frame of several rows */
#define HEAVY_PARTS_MAX        4u     /* parts with whole rows of logits that are out at once */
#define HEDGE_QUANTILE         0.95
#define HEDGE_AGAIN            3u
#define NEGATIVE_INFINITY_BITS 0xff800000u

/* ---- what is asked ---- */

static uint32_t forbidden_count(const struct attention *self, const struct sequence *sequence,
                                uint32_t drafts) {
    if (sequence->tokens + drafts - sequence->prompt_tokens >= sequence->min_tokens)
        return 0;
    return sequence->stop_tokens + (sequence->ignore_eos ? 0 : self->config.eos_count);
}

/* Counts as they are once these guesses are tokens; undone by forget_drafts. */
static void assume_drafts(struct sequence *sequence, uint32_t drafts) {
    for (uint32_t i = 0; i < drafts && sequence_counts_output(sequence); i++) {
        bool counted = token_counts_add(&sequence->output_counts, sequence->draft[i]);
        ASSERT(counted && "memory for token counts");
    }
}

static void forget_drafts(struct sequence *sequence, uint32_t drafts) {
    for (uint32_t i = drafts; i-- > 0 && sequence_counts_output(sequence);)
        token_counts_pop(&sequence->output_counts, sequence->draft[i]);
}

uint32_t sample_words(const struct attention *self, struct sequence *sequence, uint32_t drafts) {
    assume_drafts(sequence, drafts);
    uint32_t words = 2 * (sequence->biases + forbidden_count(self, sequence, drafts)) +
                     sequence->prompt_counts.count + 2 * sequence->output_counts.count;
    forget_drafts(sequence, drafts);
    return words;
}

static bool draws(const struct question *question) {
    return (question->flags & SAMPLE_DRAW) != 0;
}

static bool is_heavy(const struct question *question) {
    return (question->flags & SAMPLE_FULL_LOGITS) != 0;
}

static uint32_t question_words(const struct attention *self, const struct question *question) {
    return draws(question) ? sample_words(self, question->sequence, question->drafts) : 0;
}

static uint32_t *put_forbidden(uint32_t *word, uint32_t token) {
    *word++ = token;
    *word++ = NEGATIVE_INFINITY_BITS;
    return word;
}

static uint32_t *put_counts(const struct sequence *sequence, struct sample_spec *spec,
                            uint32_t *word) {
    spec->prompt_count = sequence->prompt_counts.count;
    spec->output_count = sequence->output_counts.count;
    for (uint32_t i = 0; i < sequence->prompt_counts.count; i++)
        *word++ = sequence->prompt_counts.token[i];
    for (uint32_t i = 0; i < sequence->output_counts.count; i++) {
        *word++ = sequence->output_counts.token[i];
        *word++ = sequence->output_counts.times[i];
    }
    return word;
}

uint32_t *sample_put_words(const struct attention *self, struct sequence *sequence, uint32_t drafts,
                           struct sample_spec *spec, uint32_t *word) {
    uint32_t forbidden = forbidden_count(self, sequence, drafts);
    spec->bias_count = sequence->biases + forbidden;
    memcpy(word, sequence->bias, 2 * (size_t)sequence->biases * sizeof *word);
    word += 2 * sequence->biases;
    if (forbidden > 0) {
        for (uint32_t i = 0; !sequence->ignore_eos && i < self->config.eos_count; i++)
            word = put_forbidden(word, (uint32_t)self->config.eos[i]);
        for (uint32_t i = 0; i < sequence->stop_tokens; i++)
            word = put_forbidden(word, sequence->stop_token[i]);
    }
    assume_drafts(sequence, drafts);
    word = put_counts(sequence, spec, word);
    forget_drafts(sequence, drafts);
    return word;
}

static uint32_t *put_question(const struct attention *self, const struct question *question,
                              struct sample_spec *spec, const uint32_t *words, uint32_t *word) {
    struct sequence *sequence = question->sequence;
    *spec = sequence->sampling;
    spec->flags = question->flags;
    spec->target = question->target;
    spec->counter = question->position + 1;
    spec->top = (question->flags & SAMPLE_LOGPROBS) != 0 ? sequence->top_logprobs : 0;
    spec->first_word = (uint32_t)(word - words);
    return draws(question) ? sample_put_words(self, sequence, question->drafts, spec, word) : word;
}

/* ---- parts ---- */

static bool usable(const struct peer *peer, actor_id excluded) {
    return peer->role == ROLE_SAMPLER && peer->id != excluded && peer->state == TROUPE__ACTOR_STATE__STATE_READY &&
           !peer->lost;
}

static uint32_t samplers(const struct attention *self, actor_id excluded) {
    uint32_t count = 0;
    for (uint32_t i = 0; i < self->member.peers; i++)
        count += usable(&self->member.peer[i], excluded);
    return count;
}

/* The next sampler in turn for each attempt. NULL: there is none. */
static const struct peer *choose_sampler(const struct attention *self, const struct part *part,
                                         actor_id excluded) {
    uint32_t count = samplers(self, excluded);
    if (count == 0)
        return NULL;
    const struct batch *batch = &self->batch;
    const struct sequence *sequence = batch->question[batch->order[part->first]].sequence;
    uint32_t wanted = (sequence->number + part->attempt) % count;
    for (uint32_t i = 0; i < self->member.peers; i++)
        if (usable(&self->member.peer[i], excluded) && wanted-- == 0)
            return &self->member.peer[i];
    return NULL;
}

static void send_sample(struct attention *self, const struct part *part, const struct peer *to,
                        struct effects *out) {
    const struct batch *batch = &self->batch;
    const uint32_t *order = batch->order + part->first;
    uint32_t words = 0;
    for (uint32_t i = 0; i < part->count; i++)
        words += question_words(self, &batch->question[order[i]]);
    size_t spec_bytes = part->count * sizeof(struct sample_spec);
    uint8_t *prefix = effects_alloc(out, spec_bytes + (size_t)words * sizeof(uint32_t));
    struct sample_spec *spec = (struct sample_spec *)prefix;
    uint32_t *first = (uint32_t *)(prefix + spec_bytes), *word = first;
    for (uint32_t i = 0; i < part->count; i++)
        word = put_question(self, &batch->question[order[i]], &spec[i], first, word);
    ASSERT((size_t)(word - first) == words);
    struct effect *effect = effects_add(out, EFFECT_TRANSFER);
    effect->transfer.header = (struct frame_header){
        .kind = FRAME_SAMPLE,
        .from = self->member.id,
        .to = to->id,
        .from_incarnation = self->member.identity.incarnation,
        .to_incarnation = to->incarnation,
        .epoch = self->member.epoch,
        .batch = batch->number,
        .attempt = part->attempt,
        .part = (uint32_t)(part - batch->sample_part),
        .rows = part->count,
        .items = words,
    };
    effect->transfer.prefix = prefix;
    effect->transfer.prefix_bytes = spec_bytes + (size_t)words * sizeof(uint32_t);
    effect->transfer.region = REGION_FINAL;
    effect->transfer.slot = batch->slot;
    effect->transfer.index = effects_copy(out, order, part->count * sizeof *order);
    effect->transfer.count = part->count;
    self->frames++;
    self->rows += part->count;
}

static bool part_heavy(const struct batch *batch, const struct part *part) {
    return is_heavy(&batch->question[batch->order[part->first]]);
}

/* Sends every part that waits and may go now. */
static void pump(struct attention *self, uint64_t now_ns, struct effects *out) {
    struct batch *batch = &self->batch;
    uint64_t hedge_ns =
        hedge_after_ns(self, latency_quantile_ns(&self->sampler_latency, HEDGE_QUANTILE));
    uint32_t heavy = 0;
    for (uint32_t i = 0; i < batch->sample_parts; i++)
        heavy +=
            batch->sample_part[i].state == PART_SENT && part_heavy(batch, &batch->sample_part[i]);
    for (uint32_t i = 0; i < batch->sample_parts; i++) {
        struct part *part = &batch->sample_part[i];
        if (part->state != PART_WAITING)
            continue;
        bool is_heavy_part = part_heavy(batch, part);
        if (is_heavy_part && heavy >= HEAVY_PARTS_MAX)
            continue;
        const struct peer *peer = choose_sampler(self, part, 0);
        if (peer == NULL)
            return; /* the next epoch may bring one */
        part->to = peer->id;
        part->to_incarnation = peer->incarnation;
        part->state = PART_SENT;
        part->sent_ns = now_ns;
        part->deadline_ns = now_ns + self->row_deadline_ns;
        part->hedge_at_ns = hedge_ns == NEVER || is_heavy_part ? NEVER : now_ns + hedge_ns;
        send_sample(self, part, peer, out);
        heavy += is_heavy_part;
    }
}

/* A sequence whose penalties name more tokens than a frame can carry ends here rather than stop
 * everybody. */
static bool askable(struct attention *self, const struct question *question) {
    struct sequence *sequence = question->sequence;
    if (question_words(self, question) <= FRAME_ITEMS_MAX)
        return true;
    if (question->drafts > 0)
        return false; /* its turn may never come */
    sequence_finish(sequence, TROUPE__FINISH_REASON__FINISH_ERROR, 0);
    snprintf(sequence->error, sizeof sequence->error,
             "penalties over %u tokens, a frame holds %u words",
             sequence->prompt_counts.count + sequence->output_counts.count, FRAME_ITEMS_MAX);
    return false;
}

static void cut_parts(struct attention *self, uint32_t turn, uint32_t turns, uint64_t now_ns) {
    struct batch *batch = &self->batch;
    uint32_t words = 0;
    struct part *open = NULL;
    for (uint32_t i = 0; i < batch->questions; i++) {
        const struct question *question = &batch->question[i];
        if (question->sequence->number % turns != turn || !askable(self, question))
            continue;
        uint32_t more = question_words(self, question);
        if (open == NULL || open->count == self->sample_rows_max || is_heavy(question) ||
            part_heavy(batch, open) || words + more > PART_WORDS_MAX) {
            open = &batch->sample_part[batch->sample_parts++];
            *open = (struct part){.state = PART_WAITING,
                                  .first = batch->sample_missing,
                                  .hedge_at_ns = NEVER,
                                  .deadline_ns = now_ns + self->row_deadline_ns};
            words = 0;
        }
        batch->order[batch->sample_missing++] = i;
        open->count++;
        words += more;
    }
}

void sample_start(struct attention *self, uint64_t now_ns, struct effects *out) {
    struct batch *batch = &self->batch;
    batch->phase = BATCH_SAMPLERS;
    step_trace_sampling(self);
    batch->sample_parts = batch->sample_missing = 0;
    uint32_t turns = samplers(self, 0);
    if (turns == 0) {
        effects_trace(out, TRACE_WARNING, "%u rows wait for a sampler", batch->questions);
        turns = 1;
    }
    for (uint32_t turn = 0; turn < turns; turn++)
        cut_parts(self, turn, turns, now_ns);
    if (batch->sample_missing == 0)
        batch_end(self, now_ns, out);
    else
        pump(self, now_ns, out);
}

/* ---- answers ---- */

static bool answer_fits(const struct attention *self, const struct question *question,
                        const struct sample_result *result, uint32_t words) {
    uint64_t end = (uint64_t)result->first_word + 2 * (uint64_t)result->top + result->logits;
    uint32_t logits = is_heavy(question) ? self->config.vocabulary : 0;
    uint32_t top = (question->flags & SAMPLE_LOGPROBS) != 0 ? question->sequence->top_logprobs : 0;
    return result->token < self->config.vocabulary && result->top <= top &&
           result->logits == logits && end <= words;
}

static bool answers_fit(const struct attention *self, const struct part *part,
                        const struct sample_result *result, uint32_t words) {
    const struct batch *batch = &self->batch;
    for (uint32_t i = 0; i < part->count; i++)
        if (!answer_fits(self, &batch->question[batch->order[part->first + i]], &result[i], words))
            return false;
    return true;
}

static void keep_entry(const struct sequence *sequence, struct entry *entry,
                       struct top_entry *entry_top, uint32_t place,
                       const struct sample_result *result, const uint32_t *words) {
    entry[place] = (struct entry){result->token, result->logprob, result->rank, result->top};
    memcpy(entry_top + (size_t)place * sequence->top_logprobs, words + result->first_word,
           2 * (size_t)result->top * sizeof *words);
}

_Static_assert(sizeof(struct top_entry) == 2 * sizeof(uint32_t), "copied as words");

static void take_answer(struct attention *self, struct question *question,
                        const struct sample_result *result, const uint32_t *words) {
    struct sequence *sequence = question->sequence;
    if (sequence->cancelled)
        return;
    if (question->position < sequence->prompt_entries) {
        keep_entry(sequence, sequence->prompt_entry, sequence->prompt_top, question->position,
                   result, words);
        if (is_heavy(question))
            memcpy(sequence->prompt_logits + (size_t)question->position * self->config.vocabulary,
                   words + result->first_word + 2 * (size_t)result->top,
                   result->logits * sizeof(float));
    }
    if (!draws(question))
        return;
    if (sequence->entry != NULL)
        keep_entry(sequence, sequence->entry, sequence->entry_top,
                   question->position + 1 - sequence->given_tokens, result, words);
    question->drawn = result->token;
}

static void ask_again(struct attention *self, struct part *part) {
    part->state = PART_WAITING;
    part->also = 0;
    part->again = false;
    part->attempt++;
    self->frames_resent++;
}

/* One that others have overtaken is not asked any more until it speaks, or until nobody else is left. */
static void note_answer(struct attention *self, const struct part *part, actor_id from,
                        uint64_t now_ns) {
    struct peer *late = from != part->to ? member_peer(&self->member, part->to) : NULL;
    if (late != NULL)
        late->lost = true;
    else if (!part_heavy(&self->batch, part))
        latency_add(&self->sampler_latency, now_ns - part->sent_ns);
}

static void note_life(struct attention *self, const struct frame_header *header) {
    struct peer *peer = member_peer(&self->member, header->from);
    if (peer != NULL && peer->role == ROLE_SAMPLER && peer->incarnation == header->from_incarnation)
        peer->lost = false;
}

void sample_on_sampled(struct attention *self, const struct frame *frame, uint64_t now_ns,
                       struct effects *out) {
    struct batch *batch = &self->batch;
    const struct frame_header *header = frame->header;
    note_life(self, header);
    struct part *part =
        reply_part(self, header, ROLE_SAMPLER, batch->sample_part, batch->sample_parts, out);
    if (part == NULL)
        return;
    const struct sample_result *result = (const struct sample_result *)frame->payload;
    const uint32_t *words = (const uint32_t *)(result + header->rows);
    if (header->rows != part->count || !answers_fit(self, part, result, header->items)) {
        effects_trace(out, TRACE_ERROR,
                      "the reply of actor %u to %u rows does not fit; asking again", header->from,
                      part->count);
        ask_again(self, part);
        part->deadline_ns = now_ns + self->row_deadline_ns;
        pump(self, now_ns, out);
        return;
    }
    for (uint32_t i = 0; i < part->count; i++) {
        struct question *question = &batch->question[batch->order[part->first + i]];
        take_answer(self, question, &result[i], words);
        step_trace_sampled(self, header->from, question->sequence);
    }
    part->state = PART_FREE;
    note_answer(self, part, header->from, now_ns);
    batch->sample_missing -= part->count;
    if (batch->sample_missing == 0)
        batch_end(self, now_ns, out);
    else
        pump(self, now_ns, out);
}

/* ---- changes around ---- */

/* The other one that was asked goes on alone, if there is one. */
static void lose_asked(struct attention *self, struct part *part, actor_id id) {
    bool also = part->also != 0 && part->also != id;
    if (part->also == id)
        part->also = 0;
    if (part->to == id && also) {
        part->to = part->also;
        part->to_incarnation = part->also_incarnation;
        part->also = 0;
    } else if (part->to == id) {
        ask_again(self, part);
    }
}

static void hedge(struct attention *self, struct part *part, uint64_t now_ns, struct effects *out) {
    const struct peer *peer = choose_sampler(self, part, part->again ? 0 : part->to);
    /* frames may have been lost: later anybody is asked, more seldom each time */
    part->hedge_at_ns = now_ns + HEDGE_AGAIN * (now_ns - part->sent_ns);
    part->again = true;
    if (peer == NULL)
        return;
    part->also = peer->id;
    part->also_incarnation = peer->incarnation;
    self->frames_hedged++;
    send_sample(self, part, peer, out);
}

void sample_adopt(struct attention *self, uint64_t now_ns, struct effects *out) {
    struct batch *batch = &self->batch;
    if (batch->phase != BATCH_SAMPLERS)
        return;
    for (uint32_t i = 0; i < batch->sample_parts; i++) {
        struct part *part = &batch->sample_part[i];
        const struct peer *peer = member_peer(&self->member, part->to);
        if (part->state == PART_SENT && (peer == NULL || peer->incarnation != part->to_incarnation))
            lose_asked(self, part, part->to);
        peer = member_peer(&self->member, part->also);
        if (part->state == PART_SENT && part->also != 0 &&
            (peer == NULL || peer->incarnation != part->also_incarnation))
            part->also = 0;
    }
    pump(self, now_ns, out);
}

void sample_peer_lost(struct attention *self, actor_id id, uint64_t now_ns, struct effects *out) {
    struct batch *batch = &self->batch;
    if (batch->phase != BATCH_SAMPLERS)
        return;
    for (uint32_t i = 0; i < batch->sample_parts; i++)
        if (batch->sample_part[i].state == PART_SENT)
            lose_asked(self, &batch->sample_part[i], id);
    pump(self, now_ns, out);
}

void sample_timer(struct attention *self, uint64_t now_ns, struct effects *out) {
    struct batch *batch = &self->batch;
    if (batch->phase != BATCH_SAMPLERS ||
        parts_deadline(batch->sample_part, batch->sample_parts) > now_ns)
        return;
    bool late = false;
    for (uint32_t i = 0; i < batch->sample_parts; i++) {
        struct part *part = &batch->sample_part[i];
        if (part->state == PART_SENT && part->hedge_at_ns <= now_ns)
            hedge(self, part, now_ns, out);
        late = late || (part->state != PART_FREE && part->deadline_ns <= now_ns);
    }
    if (!late)
        return;
    for (uint32_t i = 0; i < self->member.peers; i++)
        if (self->member.peer[i].role == ROLE_SAMPLER)
            self->member.peer[i].lost = false; /* believe in it again rather than wait for ever */
    for (uint32_t i = 0; i < batch->sample_parts; i++) {
        struct part *part = &batch->sample_part[i];
        if (part->state == PART_FREE || part->deadline_ns > now_ns)
            continue;
        if (part->state == PART_SENT)
            ask_again(self, part);
        part->deadline_ns = now_ns + self->row_deadline_ns;
    }
    pump(self, now_ns, out);
}
