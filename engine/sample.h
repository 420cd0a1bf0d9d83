/* One row's question to a sampler and its answer, as they lie in SAMPLE and SAMPLED frames and as the sampler engine takes them.
 * Samplers keep no state: everything a draw depends on is here, so a row can be sent again to another sampler and gives the same
 * token. */
#ifndef TROUPE_SAMPLE_H
#define TROUPE_SAMPLE_H

#include <stdint.h>

enum sample_flags {
    SAMPLE_DRAW = 1,        /* choose a token */
    SAMPLE_SCORE = 2,       /* give the log-probability of `target` (prompt tokens) */
    SAMPLE_LOGPROBS = 4,    /* with DRAW: log-probability of the chosen token; with either: `top` best tokens */
    SAMPLE_FULL_LOGITS = 8, /* the whole row of raw logits */
};

/* Order of operations (vLLM's): logprobs come from the raw logits; then logit bias, repetition, presence and frequency penalties;
 * temperature 0: the largest logit, ties to the lowest token; else temperature, min_p, top_k, top_p, then one draw with
 * sample_random(seed, counter). */
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
    float logprob;     /* of `token`, from the raw logits */
    uint32_t rank;     /* 1 + number of tokens with larger raw logit */
    uint32_t top;      /* entries that follow */
    uint32_t first_word; /* top x (token, float bits), then `logits` x float bits */
    uint32_t logits;
};

/* Uniform in [0, 1) with 24 bits from (seed, counter): Philox-4x32-10 (Salmon et al., SC'11), first word. */
float sample_random(uint64_t seed, uint64_t counter);

#endif
