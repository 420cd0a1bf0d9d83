/* One row's question to a sampler and its answer, as they lie in SAMPLE and SAMPLED frames and as the sampler engine takes them.
 * Samplers keep no state: everything a draw depends on is here, so a row can be sent again to another sampler and gives the same
 * token. */
#ifndef TROUPE_SAMPLE_H
#define TROUPE_SAMPLE_H

#include <stdint.h>

#include "actors/errors.h"

enum sample_flags {
    SAMPLE_DRAW = 1,        /* choose a token */
    SAMPLE_SCORE = 2,       /* give the log-probability of `target` (prompt tokens) */
    SAMPLE_LOGPROBS = 4,    /* with DRAW: log-probability of the chosen token; with either: `top` best tokens */
    SAMPLE_FULL_LOGITS = 8, /* the whole row of raw logits */
};

/* Order of operations (vLLM's): logprobs come from the raw logits; then logit bias, repetition, presence and frequency penalties;
 * temperature 0 (below 1e-5, as in vLLM): the largest logit, ties to the lowest token; else temperature, min_p, top_k, top_p, then
 * one draw with sample_random(seed, counter).
 *
 * The draw: weights w = exp((logit - largest) / temperature). min_p keeps w >= min_p (the largest weight is 1). top_k keeps the first k
 * in order of descending weight, ties to the lower token; top_p, in the same order, the shortest run whose sum reaches top_p times
 * the sum of what is left by then, at least one token. The token drawn is the first of the kept, in ascending order of token, at
 * which the running sum of weights exceeds random x their sum. Sums in double precision, one term after the other.
 *
 * A NaN logit counts as -infinity. If every token is forbidden, token 0 is drawn. */
struct sample_spec {
    uint64_t seed;
    uint64_t counter;     /* position of the token to be drawn in its sequence: prompt tokens + generated so far */
    uint32_t flags;
    uint32_t target;
    uint32_t top;         /* number of best tokens wanted, at most TOP_LOGPROBS_MAX */
    float temperature, top_p, min_p;
    int32_t top_k;        /* <= 0: off */
    float repetition_penalty, presence_penalty, frequency_penalty;
    /* Variable part: words at `first_word` of the frame's words:
     * biases: bias_count x (token, float bits); -infinity forbids. prompt: prompt_count x token (distinct prompt tokens, for the repetition
     * penalty); output: output_count x (token, times) (distinct generated tokens). */
    uint32_t first_word, bias_count, prompt_count, output_count;
    uint32_t reserved;
};

struct sample_result {
    uint32_t token;    /* DRAW: the token; SCORE: the target */
    float logprob;     /* of `token`, from the raw logits; 0 unless SCORE or LOGPROBS asked for it */
    uint32_t rank;     /* 1 + number of tokens with larger raw logit; 0 unless asked for */
    uint32_t top;      /* entries that follow: min(spec.top, vocabulary) with LOGPROBS, else 0 */
    uint32_t first_word; /* top x (token, float bits of the log-probability), then `logits` x float bits */
    uint32_t logits;     /* vocabulary with FULL_LOGITS, else 0 */
};

/* Checks what came from outside: flags, ranges of the parameters, counts within words_count, tokens below `vocabulary`. 0 or
 * ERR_INVALID naming the row, what was expected and what was found. A sampler engine takes only what passes. */
int sample_check(const struct sample_spec *spec, uint32_t rows, const uint32_t *words,
                 uint32_t words_count, uint32_t vocabulary, struct failure *failure);

/* Uniform in [0, 1) with 24 bits from (seed, counter): Philox-4x32-10 (Salmon et al., SC'11), first word; the key is the seed, the
 * low words of the generator's counter are `counter`, its high words zero, low word first. */
float sample_random(uint64_t seed, uint64_t counter);
void philox_4x32_10(const uint32_t counter[4], const uint32_t key[2], uint32_t ret[4]);

#endif
