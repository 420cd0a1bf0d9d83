/* The steps of an attention actor: which rows make up the next batch, and the programs that take
 * them through the layers.
 *
 *   IDLE -> LAYERS (to the gate of an MoE layer) -> EXPERTS
 *        -> LAYERS (combine, on to the next gate) -> EXPERTS -> ...
 *        -> LAYERS (to the end, final rows) -> SAMPLERS -> DRAFTS (attention_draft.c) -> IDLE
 *
 * Continuous batching: a running sequence with one known token not computed yet (decode) gives that
 * row, and one for each guess of what follows; one with more (prefill, or a resumed sequence that
 * catches up) gives a chunk. Both kinds are taken in turn from where the last batch stopped, and
 * while both kinds exist each is left room, so neither can starve the other; prompt rows are few
 * enough that a step stays within step_budget_us. How rows are cut into batches changes no bit of
 * any result. */
#include "actors/attention.h"

#include <stdlib.h>
#include <string.h>

#define PROMPT_ROWS_MIN 16u /* beside rows that decode, however long they take */

/* ---- memory ---- */

bool batch_init(struct attention *self) {
    struct batch *batch = &self->batch;
    size_t rows = self->settings.batch_tokens, sequences = self->settings.max_sequences;
    batch->row = calloc(rows, sizeof *batch->row);
    batch->sequence = calloc(sequences, sizeof *batch->sequence);
    batch->sequence_rows = calloc(sequences, sizeof *batch->sequence_rows);
    batch->sequence_first = calloc(sequences, sizeof *batch->sequence_first);
    batch->clear = calloc(self->pages.total, sizeof *batch->clear);
    batch->question = calloc(rows, sizeof *batch->question);
    batch->select = calloc(rows, sizeof *batch->select);
    batch->order = calloc(rows, sizeof *batch->order);
    batch->sample_part = calloc(rows, sizeof *batch->sample_part);
    return batch->row != NULL && batch->sequence != NULL && batch->sequence_rows != NULL &&
           batch->sequence_first != NULL && batch->clear != NULL && batch->question != NULL &&
           batch->select != NULL && batch->order != NULL && batch->sample_part != NULL &&
           flight_init(self);
}

void batch_free(struct attention *self) {
    struct batch *batch = &self->batch;
    flight_free(self);
    free(batch->row);
    free(batch->sequence);
    free(batch->sequence_rows);
    free(batch->sequence_first);
    free(batch->clear);
    free(batch->question);
    free(batch->select);
    free(batch->order);
    free(batch->sample_part);
}

/* ---- which rows ---- */

static uint32_t remaining(const struct sequence *sequence) {
    return sequence->tokens - sequence->computed;
}

static void add_question(struct batch *batch, struct sequence *sequence, uint32_t row,
                         uint32_t position) {
    struct question question = {.sequence = sequence, .row = row, .position = position};
    if (sequence->score_prompt && position < sequence->prompt_tokens &&
        position >= sequence->prompt_complete) { /* computed again: it has been asked */
        if (position + 1 < sequence->prompt_tokens) {
            question.flags |= SAMPLE_SCORE;
            question.target = sequence->token[position + 1];
        }
        if (sequence->full_logits)
            question.flags |= SAMPLE_FULL_LOGITS;
    }
    if (position + 1 >= sequence->tokens && sequence_draws(sequence)) {
        question.flags |= SAMPLE_DRAW;
        question.drafts = position + 1 - sequence->tokens;
    }
    if (question.flags == 0)
        return;
    if (sequence->logprobs)
        question.flags |= SAMPLE_LOGPROBS;
    batch->select[batch->questions] = row;
    batch->question[batch->questions++] = question;
}

static void add_rows(struct batch *batch, struct sequence *sequence, uint32_t count) {
    batch->sequence[batch->sequences] = sequence;
    batch->sequence_first[batch->sequences] = batch->rows;
    batch->sequence_rows[batch->sequences++] = count;
    sequence->in_batch = true;
    sequence->verifying = count > remaining(sequence) ? count - remaining(sequence) : 0;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t position = sequence->computed + i, row = batch->rows++;
        batch->row[row] = (struct batch_row){
            .token = position < sequence->tokens ? sequence->token[position]
                                                 : sequence->draft[position - sequence->tokens],
            .position = position,
            .sequence = sequence->number,
            .form = position < sequence->prompt_tokens ? MLA_EXPANDED : MLA_ABSORBED,
            .pages = sequence->page,
            .bias = sequence->routing != NULL ? sequence->routing->delta : NULL,
        };
        add_question(batch, sequence, row, position);
    }
}

/* Rows of a sequence that decodes: the last token and its guesses, as far as there are pages;
 * nobody is put back for a guess. */
static uint32_t decode_rows(struct attention *self, struct sequence *sequence) {
    uint32_t end = sequence->computed + 1 + sequence->drafts;
    while (sequence->held * PAGE_TOKENS < end && pages_available(&self->pages) > 0)
        pages_take(self, sequence, 1);
    if (end > sequence->held * PAGE_TOKENS)
        end = sequence->held * PAGE_TOKENS;
    return end - sequence->computed;
}

/* One round over the running sequences, starting at the cursor; at most `budget` rows. The cursor
 * stays at the first sequence that got nothing. */
static void take_turns(struct attention *self, uint32_t *cursor, bool decode, uint32_t budget) {
    struct batch *batch = &self->batch;
    uint32_t numbers = self->settings.max_sequences, start = *cursor;
    for (uint32_t i = 0; i < numbers; i++) {
        uint32_t number = (start + i) % numbers;
        struct sequence *sequence = self->running[number];
        if (sequence == NULL || sequence->in_batch || (remaining(sequence) == 1) != decode)
            continue;
        if (budget == 0) {
            *cursor = number;
            return;
        }
        uint32_t count = decode ? decode_rows(self, sequence) : remaining(sequence);
        if (!decode && count > self->settings.prefill_chunk)
            count = self->settings.prefill_chunk;
        if (count > budget)
            count = budget;
        add_rows(batch, sequence, count);
        budget -= count;
        *cursor = (number + 1) % numbers;
    }
}

/* Prompt rows that may join those that decode, so that a step takes about step_budget_us. */
static uint32_t prompt_rows_in_time(const struct attention *self) {
    uint64_t budget_ns = (uint64_t)self->settings.step_budget_us * 1000;
    if (budget_ns == 0)
        return UINT32_MAX;
    if (self->prompt_row_ns == 0 || budget_ns <= self->decode_ns)
        return PROMPT_ROWS_MIN;
    uint64_t rows = (budget_ns - self->decode_ns) / self->prompt_row_ns;
    return rows < PROMPT_ROWS_MIN ? PROMPT_ROWS_MIN
           : rows < UINT32_MAX    ? (uint32_t)rows
                                  : UINT32_MAX;
}

static void average(uint64_t *average_ns, uint64_t ns) {
    *average_ns = *average_ns == 0 ? ns : (7 * *average_ns + ns) / 8;
}

/* What the batch has taken. Times decide how many rows go together, which no bit depends on. */
static void note_time(struct attention *self, uint64_t now_ns) {
    const struct batch *batch = &self->batch;
    uint64_t ns = now_ns - batch->started_ns;
    if (batch->prompt_rows == 0)
        average(&self->decode_ns, ns);
    else
        average(&self->prompt_row_ns,
                (ns > self->decode_ns ? ns - self->decode_ns : 0) / batch->prompt_rows);
}

static void choose_rows(struct attention *self) {
    uint32_t decoding = 0, filling = 0, budget = self->settings.batch_tokens;
    for (uint32_t i = 0; i < self->settings.max_sequences; i++)
        if (self->running[i] != NULL) {
            if (remaining(self->running[i]) == 1)
                decoding++;
            else
                filling++;
        }
    uint32_t kept = 0; /* for prefill */
    if (filling > 0 && decoding > 0) {
        kept = budget / 4;
        if (kept == 0) /* too small to share: take turns by batch */
            kept = budget > 1 || self->last_batch % 2 == 0 ? 1 : 0;
    }
    take_turns(self, &self->decode_cursor, true, budget - kept);
    uint32_t before = self->batch.rows, most = budget - before;
    if (decoding > 0 && most > prompt_rows_in_time(self))
        most = prompt_rows_in_time(self);
    take_turns(self, &self->prefill_cursor, false, most);
    self->batch.prompt_rows = self->batch.rows - before;
    if (self->batch.rows < budget && decoding > budget - kept)
        take_turns(self, &self->decode_cursor, true, budget - self->batch.rows);
}

/* ---- programs ---- */

struct program *batch_program(struct attention *self, struct effects *out, enum program_kind kind,
                              uint32_t layer) {
    struct effect *effect = effects_add(out, EFFECT_COMPUTE);
    effect->compute.kind = kind;
    effect->compute.slot = self->batch.slot;
    effect->compute.layer = layer;
    effect->compute.rows = self->batch.rows;
    effect->compute.tag = ++self->last_tag;
    return &effect->compute;
}

/* Layers from `layer` on, up to the gate of the next MoE layer or to the end: that at once where the device
 * holds the experts as well. */
static void run_layers(struct attention *self, uint32_t layer, struct effects *out) {
    struct batch *batch = &self->batch;
    batch->phase = BATCH_LAYERS;
    for (; layer < self->config.layers; layer++) {
        batch_program(self, out, PROGRAM_LAYER, layer);
        if (model_layer_is_moe(&self->config, layer) && !self->settings.resident)
            break;
    }
    batch->layer = layer;
    if (layer == self->config.layers && batch->questions > 0) {
        struct program *program = batch_program(self, out, PROGRAM_FINISH, 0);
        program->select = batch->select;
        program->items = batch->questions;
    }
    batch->wait_tag = self->last_tag;
}

void batch_start(struct attention *self, uint64_t now_ns, struct effects *out) {
    struct batch *batch = &self->batch;
    if (batch->phase != BATCH_IDLE)
        return;
    batch->rows = batch->sequences = batch->questions = batch->clears = 0;
    attention_grow(self);
    attention_admit(self);
    choose_rows(self);
    if (batch->rows == 0) {
        ASSERT(batch->clears == 0);
        return;
    }
    batch->number = ++self->last_batch;
    batch->started_ns = now_ns;
    step_trace_begin(self);
    if (batch->clears > 0) {
        struct program *program = batch_program(self, out, PROGRAM_CLEAR_PAGES, 0);
        program->select = batch->clear;
        program->items = batch->clears;
    }
    struct program *program = batch_program(self, out, PROGRAM_EMBED, 0);
    program->row = batch->row;
    run_layers(self, 0, out);
}

void batch_combine(struct attention *self, struct effects *out) {
    step_trace_answered(self);
    batch_program(self, out, PROGRAM_COMBINE, self->batch.layer);
    run_layers(self, self->batch.layer + 1, out);
}

/* ---- the end of a step ---- */

static void advance(struct attention *self, struct sequence *sequence, uint32_t rows) {
    uint32_t from = sequence->computed;
    sequence->computed_before = from;
    sequence->computed += rows;
    if (sequence->drew > 0) /* without rows of guesses that were wrong */
        sequence->computed = sequence->tokens - 1;
    else if (sequence->computed > sequence->tokens)
        sequence->computed = sequence->tokens;
    pages_learn(self, sequence);
    if (from < sequence->prompt_tokens) {
        uint32_t to = sequence->computed < sequence->prompt_tokens ? sequence->computed
                                                                   : sequence->prompt_tokens;
        self->prompt_total += to - from;
        if (to > sequence->prompt_entries)
            to = sequence->prompt_entries;
        if (to > sequence->prompt_complete) /* not if it is computed again */
            sequence->prompt_complete = to;
    }
    if (sequence->finish == TROUPE__FINISH_REASON__FINISH_NONE &&
        sequence->computed == sequence->tokens && !sequence_draws(sequence))
        sequence_finish(sequence, TROUPE__FINISH_REASON__FINISH_LENGTH, 0);
}

/* Those that are finished or not wanted any more leave; the others are left in the batch. */
static void retire_some(struct attention *self) {
    struct batch *batch = &self->batch;
    uint32_t kept = 0;
    for (uint32_t i = 0; i < batch->sequences; i++) {
        struct sequence *sequence = batch->sequence[i];
        if (sequence->cancelled || sequence->finish != TROUPE__FINISH_REASON__FINISH_NONE) {
            sequence->in_batch = false;
            attention_retire(self, sequence);
            continue;
        }
        batch->sequence[kept] = sequence;
        batch->sequence_first[kept++] = batch->sequence_first[i];
    }
    batch->sequences = kept;
}

static void become_idle(struct attention *self) {
    struct batch *batch = &self->batch;
    batch->phase = BATCH_IDLE;
    retire_some(self); /* some may have been cancelled meanwhile */
    for (uint32_t i = 0; i < batch->sequences; i++)
        batch->sequence[i]->in_batch = false;
    batch->sequences = 0;
}

void batch_end(struct attention *self, uint64_t now_ns, struct effects *out) {
    struct batch *batch = &self->batch;
    self->steps++;
    note_time(self, now_ns);
    step_trace_end(self);
    draft_settle(self);
    for (uint32_t i = 0; i < batch->sequences; i++)
        advance(self, batch->sequence[i], batch->sequence_rows[i]);
    report_batch(self, out);
    retire_some(self);
    if (!draft_start(self, out))
        become_idle(self);
}

void batch_computed(struct attention *self, const struct program_result *result, uint64_t now_ns,
                    struct effects *out) {
    struct batch *batch = &self->batch;
    if (batch->phase == BATCH_DRAFTS && result->tag == batch->wait_tag) {
        draft_computed(self, result);
        become_idle(self);
    }
    if (batch->phase != BATCH_LAYERS || result->tag != batch->wait_tag)
        return;
    if (batch->layer < self->config.layers)
        dispatch_start(self, result->choice, now_ns, out);
    else if (batch->questions > 0)
        sample_start(self, now_ns, out);
    else
        batch_end(self, now_ns, out);
}
