/* Multi-token prediction: guesses of tokens, and what becomes of them.
 *
 *   a batch's draws are settled -> DRAFT: the rows whose next token is known now are remembered in
 * the MTP module's cache, and sequences that decode get guesses of what follows (engine/draft.c)
 *   next batch: the last token and the guesses are rows of one sequence, in the absorbed form; each
 * asks for a draw, as if the guesses before it were true -> settled: draws count as long as they
 * are true
 *
 * A draw depends on its row and on (seed, position), and a row on the tokens before it: where the
 * guesses are true, the draws are those that would have been made one step after the other; where
 * one is not, nothing of the rows behind it is kept. Their latent entries lie behind the computed
 * positions, where nobody looks before they are written again. So guesses change when tokens come,
 * never which.
 *
 * They are made only where they pay: for sequences whose guesses come true often enough, and while
 * few sequences decode, because a row that is computed for nothing costs little then. */
#include "actors/attention.h"

#include <string.h>

#define TRUST_ONE   1024u /* a share of guesses that come true, as an integer: deterministic */
#define TRUST_FIRST 700u
#define TRUST_SPEED 8u /* of the moving average */
#define PAUSE_STEPS 24u

bool drafts_on(const struct attention *self) {
    return self->settings.mtp_steps > 0 && self->config.mtp_layers > 0;
}

void draft_begin(struct sequence *sequence) {
    sequence->drafts = sequence->verifying = 0;
    sequence->trust = TRUST_FIRST;
    sequence->pause = 0;
}

/* ---- settling ---- */

/* The draw follows from the tokens as they are by now. */
static bool holds(const struct question *question) {
    const struct sequence *sequence = question->sequence;
    return question->position + 1 == sequence->tokens &&
           (question->drafts == 0 ||
            sequence->token[question->position] == sequence->draft[question->drafts - 1]);
}

static void learn(struct attention *self, struct sequence *sequence) {
    uint32_t hits = sequence->drew > 0 ? sequence->drew - 1 : 0;
    self->drafts_total++;
    self->draft_tokens_total += sequence->verifying;
    self->accepted_total += hits;
    sequence->accepted_drafts += hits;
    sequence->rejected_drafts += sequence->verifying - hits;
    /* of the first guess; the later ones are given trust^n */
    sequence->trust =
        sequence->trust - sequence->trust / TRUST_SPEED + (hits > 0 ? TRUST_ONE / TRUST_SPEED : 0);
    if (sequence->trust < (uint32_t)(self->settings.mtp_acceptance * TRUST_ONE))
        sequence->pause = PAUSE_STEPS;
}

void draft_settle(struct attention *self) {
    struct batch *batch = &self->batch;
    for (uint32_t i = 0; i < batch->sequences; i++)
        batch->sequence[i]->drew = 0;
    for (uint32_t i = 0; i < batch->questions; i++) {
        const struct question *question = &batch->question[i];
        struct sequence *sequence = question->sequence;
        if ((question->flags & SAMPLE_DRAW) == 0 || sequence->cancelled ||
            sequence->finish != TROUPE__FINISH_REASON__FINISH_NONE || !holds(question))
            continue;
        attention_append(self, sequence, question->drawn);
        sequence->drew++;
    }
    for (uint32_t i = 0; i < batch->sequences; i++) {
        struct sequence *sequence = batch->sequence[i];
        if (sequence->verifying > 0)
            learn(self, sequence);
        if (sequence->drew > 0)
            sequence->drafts = 0;
        sequence->verifying = 0;
    }
}

/* ---- asking for guesses ---- */

/* Guesses worth a row each: as many as together are likely enough. */
static uint32_t wanted(const struct attention *self, struct sequence *sequence) {
    if (sequence->drew == 0 || !sequence_draws(sequence))
        return 0;
    if (sequence->pause > 0) {
        if (--sequence->pause > 0)
            return 0;
        sequence->trust = TRUST_FIRST; /* once more */
    }
    uint32_t most = self->settings.mtp_steps, steps = 1, chance = sequence->trust;
    uint32_t least = (uint32_t)(self->settings.mtp_acceptance * TRUST_ONE);
    if (most > DRAFTS_MAX)
        most = DRAFTS_MAX;
    if (most > sequence->tokens_max - sequence->tokens - 1) /* each is a row that draws */
        most = sequence->tokens_max - sequence->tokens - 1;
    uint32_t places = sequence->held * PAGE_TOKENS - sequence->computed + 1; /* in its pages */
    if (most > places)
        most = places;
    while (steps < most && (chance = chance * sequence->trust / TRUST_ONE) >= least)
        steps++;
    return steps < most ? steps : most;
}

static uint32_t decoding(const struct attention *self) {
    uint32_t count = 0;
    for (uint32_t i = 0; i < self->settings.max_sequences; i++)
        count +=
            self->running[i] != NULL && self->running[i]->tokens - self->running[i]->computed == 1;
    return count;
}

/* The specs and words of those that want guesses. */
static void put_specs(struct attention *self, struct program *program, uint32_t count,
                      struct effects *out) {
    struct batch *batch = &self->batch;
    struct sample_spec *spec = effects_alloc(out, (count + 1) * sizeof *spec);
    uint32_t words = 0;
    for (uint32_t i = 0; i < count; i++)
        words += sample_words(self, batch->drafting[i], 0);
    uint32_t *first = effects_alloc(out, (words + 1) * sizeof *first), *word = first;
    for (uint32_t i = 0; i < count; i++) {
        struct sequence *sequence = batch->drafting[i];
        spec[i] = sequence->sampling;
        spec[i].counter = sequence->tokens;
        spec[i].first_word = (uint32_t)(word - first);
        word = sample_put_words(self, sequence, 0, &spec[i], word);
    }
    ASSERT((size_t)(word - first) == words);
    program->spec = spec;
    program->words = first;
    program->words_count = words;
}

bool draft_start(struct attention *self, struct effects *out) {
    struct batch *batch = &self->batch;
    if (!drafts_on(self) || batch->sequences == 0)
        return false;
    bool few = decoding(self) <= self->settings.mtp_sequences;
    uint32_t drafting = 0, count = 0;
    struct draft_row *row = effects_alloc(out, batch->rows * sizeof *row), last[DRAFT_ROWS_MAX];
    for (uint32_t i = 0; i < batch->sequences; i++) {
        struct sequence *sequence = batch->sequence[i];
        uint32_t first = sequence->computed_before, at = batch->sequence_first[i];
        uint32_t steps = few && drafting < DRAFT_ROWS_MAX ? wanted(self, sequence) : 0;
        for (uint32_t p = first; p < sequence->computed && p + 1 < sequence->tokens; p++) {
            struct draft_row known = {at + p - first, sequence->token[p + 1], 0};
            if (steps > 0 && p + 1 == sequence->computed) {
                known.steps = steps;
                batch->drafting[drafting] = sequence;
                last[drafting++] = known;
            } else {
                row[count++] = known;
            }
        }
    }
    if (count + drafting == 0)
        return false;
    memcpy(row + count, last, drafting * sizeof *row);
    struct program *program = batch_program(self, out, PROGRAM_DRAFT, 0);
    program->draft = row;
    program->items = count + drafting;
    put_specs(self, program, drafting, out);
    for (uint32_t i = 0; i < drafting; i++)
        batch->drafting[i]->drafts = last[i].steps;
    batch->draftings = drafting;
    batch->phase = BATCH_DRAFTS;
    batch->wait_tag = self->last_tag;
    return true;
}

void draft_computed(struct attention *self, const struct program_result *result) {
    struct batch *batch = &self->batch;
    ASSERT(batch->draftings == 0 || result->words_count % batch->draftings == 0);
    for (uint32_t i = 0; i < batch->draftings; i++) {
        struct sequence *sequence = batch->drafting[i];
        const uint32_t *guess =
            result->words + (size_t)i * (result->words_count / batch->draftings);
        memcpy(sequence->draft, guess, sequence->drafts * sizeof *guess);
    }
    batch->draftings = 0;
}
