/* Sampling: from a row of raw logits to a token, its log-probability and the best alternatives.
 * Scalar and in fixed order, so the same on every machine; a row's answer depends on its logits and
 * its spec only. engine/sample.h defines each step. */
#include "engine/sample.h"

#include <math.h>
#include <string.h>

#include "actors/limits.h"
#include "engine/internal.h"

#define TEMPERATURE_MIN 1e-5f /* below: greedy, as in vLLM */

/* --- random numbers --- */

/* Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC'11), section 3.3. */
void philox_4x32_10(const uint32_t counter[4], const uint32_t key[2], uint32_t ret[4]) {
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = UINT64_C(0xd2511f53) * c0, p1 = UINT64_C(0xcd9e8d57) * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)p0;
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    ret[0] = c0;
    ret[1] = c1;
    ret[2] = c2;
    ret[3] = c3;
}

float sample_random(uint64_t seed, uint64_t counter) {
    const uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    const uint32_t from[4] = {(uint32_t)counter, (uint32_t)(counter >> 32), 0, 0};
    uint32_t words[4];
    philox_4x32_10(from, key, words);
    return (float)(words[0] >> 8) * 0x1p-24f;
}

/* --- check --- */

static float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static int check_range(uint32_t row, const char *name, float value, float low, float high,
                       struct failure *failure) {
    if (value >= low && value <= high) /* false for NaN */
        return 0;
    return fail(failure, ERR_INVALID, "sample row %u: expected %s from %g to %g, found %g", row,
                name, (double)low, (double)high, (double)value);
}

static int check_parameters(const struct sample_spec *s, uint32_t row, uint32_t vocabulary,
                            struct failure *failure) {
    const uint32_t known = SAMPLE_DRAW | SAMPLE_SCORE | SAMPLE_LOGPROBS | SAMPLE_FULL_LOGITS;
    if ((s->flags & ~known) != 0 || ((s->flags & SAMPLE_DRAW) && (s->flags & SAMPLE_SCORE)))
        return fail(
            failure, ERR_INVALID,
            "sample row %u: expected known flags, at most one of draw and score, found 0x%x", row,
            s->flags);
    if ((s->flags & SAMPLE_SCORE) && s->target >= vocabulary)
        return fail(failure, ERR_INVALID, "sample row %u: expected a target below %u, found %u",
                    row, vocabulary, s->target);
    if (s->top > TOP_LOGPROBS_MAX)
        return fail(failure, ERR_INVALID,
                    "sample row %u: expected at most %d best tokens, found %u", row,
                    TOP_LOGPROBS_MAX, s->top);
    const float most = 3e38f;
    int error = check_range(row, "temperature", s->temperature, 0, most, failure);
    if (error == 0)
        error = check_range(row, "top_p", s->top_p, 0, 1, failure);
    if (error == 0)
        error = check_range(row, "min_p", s->min_p, 0, 1, failure);
    if (error == 0)
        error = check_range(row, "repetition_penalty", s->repetition_penalty, 1e-6f, 1e6f, failure);
    if (error == 0)
        error = check_range(row, "presence_penalty", s->presence_penalty, -1e6f, 1e6f, failure);
    if (error == 0)
        error = check_range(row, "frequency_penalty", s->frequency_penalty, -1e6f, 1e6f, failure);
    return error;
}

static int check_words(const struct sample_spec *s, uint32_t row, const uint32_t *words,
                       uint32_t words_count, uint32_t vocabulary, struct failure *failure) {
    uint64_t end = (uint64_t)s->first_word + 2 * (uint64_t)s->bias_count + s->prompt_count +
                   2 * (uint64_t)s->output_count;
    if (end > words_count)
        return fail(failure, ERR_INVALID,
                    "sample row %u: expected its words within %u, found an end at %llu", row,
                    words_count, (unsigned long long)end);
    const uint32_t *word = words + s->first_word;
    for (uint32_t i = 0; i < s->bias_count; i++, word += 2) {
        float bias = float_of(word[1]);
        if (word[0] >= vocabulary || isnan(bias) || bias == INFINITY)
            return fail(
                failure, ERR_INVALID,
                "sample row %u: expected a bias below infinity on a token below %u, found %g on %u",
                row, vocabulary, (double)bias, word[0]);
    }
    for (uint32_t i = 0; i < s->prompt_count; i++, word++)
        if (*word >= vocabulary)
            return fail(failure, ERR_INVALID,
                        "sample row %u: expected prompt tokens below %u, found %u", row, vocabulary,
                        *word);
    for (uint32_t i = 0; i < s->output_count; i++, word += 2)
        if (word[0] >= vocabulary)
            return fail(failure, ERR_INVALID,
                        "sample row %u: expected output tokens below %u, found %u", row, vocabulary,
                        word[0]);
    return 0;
}

int sample_check(const struct sample_spec *spec, uint32_t rows, const uint32_t *words,
                 uint32_t words_count, uint32_t vocabulary, struct failure *failure) {
    for (uint32_t r = 0; r < rows; r++) {
        int error = check_parameters(&spec[r], r, vocabulary, failure);
        if (error == 0)
            error = check_words(&spec[r], r, words, words_count, vocabulary, failure);
        if (error != 0)
            return error;
    }
    return 0;
}

/* The largest of a run, by lanes that the compiler can keep in vectors. No NaN. */
static float run_max(const float *x, uint32_t n) {
    enum { LANES = 16 };
    float lane[LANES], max = -INFINITY;
    for (int j = 0; j < LANES; j++)
        lane[j] = -INFINITY;
    uint32_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++)
            lane[j] = x[i + (uint32_t)j] > lane[j] ? x[i + (uint32_t)j] : lane[j];
    for (; i < n; i++)
        max = x[i] > max ? x[i] : max;
    for (int j = 0; j < LANES; j++)
        max = lane[j] > max ? lane[j] : max;
    return max;
}

/* The token of the largest logit, the lower of equals. */
static uint32_t largest(const float *logits, uint32_t vocabulary) {
    const float max = run_max(logits, vocabulary);
    uint32_t t = 0;
    while (logits[t] != max)
        t++;
    return t;
}

/* --- log-probabilities --- */

struct logprobs {
    float max, log_sum; /* logprob(x) = (x - max) - log_sum */
};

static struct logprobs measure(const float *logits, uint32_t vocabulary, float *scratch) {
    struct logprobs ret = {-INFINITY, 0};
    ret.max = logits[largest(logits, vocabulary)];
    if (ret.max == -INFINITY)
        return ret;
    for (uint32_t t = 0; t < vocabulary; t++)
        scratch[t] = logits[t] - ret.max;
    exp_canonical_row(scratch, vocabulary, scratch);
    ret.log_sum = log_canonical(sum_canonical(scratch, vocabulary));
    return ret;
}

static float logprob(const struct logprobs *measured, float logit) {
    return logit == -INFINITY ? -INFINITY : (logit - measured->max) - measured->log_sum;
}

static uint32_t rank(const float *logits, uint32_t vocabulary, float logit) {
    uint32_t larger = 0;
    for (uint32_t t = 0; t < vocabulary; t++)
        larger += logits[t] > logit;
    return 1 + larger;
}

/* The `top` largest in descending order, ties to the lower token; returns how many there are. */
static uint32_t list_top(const float *logits, uint32_t vocabulary, uint32_t top, uint32_t *ret) {
    uint32_t length = 0;
    for (uint32_t t = 0; top > 0 && t < vocabulary; t++) {
        if (length == top && !(logits[t] > logits[ret[top - 1]]))
            continue;
        uint32_t place = length < top ? length++ : top - 1;
        for (; place > 0 && logits[t] > logits[ret[place - 1]]; place--)
            ret[place] = ret[place - 1];
        ret[place] = t;
    }
    return length;
}

/* --- what the request changes --- */

static void penalise_repetition(float *logit, float penalty) {
    *logit = *logit > 0 ? *logit / penalty : *logit * penalty;
}

/* Bias, then repetition over prompt and output (once per token), presence and frequency over
 * output. Order and rules of vLLM. */
static void modify(const struct sample_spec *spec, const uint32_t *words, float *logits,
                   uint8_t *touched) {
    const uint32_t *bias = words + spec->first_word;
    const uint32_t *prompt = bias + 2 * (size_t)spec->bias_count;
    const uint32_t *output = prompt + spec->prompt_count;
    for (uint32_t i = 0; i < spec->bias_count; i++)
        logits[bias[2 * i]] += float_of(bias[2 * i + 1]);
    if (spec->repetition_penalty != 1.0f) {
        for (uint32_t i = 0; i < spec->prompt_count; i++)
            if (!touched[prompt[i]]) {
                touched[prompt[i]] = 1;
                penalise_repetition(&logits[prompt[i]], spec->repetition_penalty);
            }
        for (uint32_t i = 0; i < spec->output_count; i++)
            if (!touched[output[2 * i]]) {
                touched[output[2 * i]] = 1;
                penalise_repetition(&logits[output[2 * i]], spec->repetition_penalty);
            }
        for (uint32_t i = 0; i < spec->prompt_count; i++)
            touched[prompt[i]] = 0;
        for (uint32_t i = 0; i < spec->output_count; i++)
            touched[output[2 * i]] = 0;
    }
    for (uint32_t i = 0; i < spec->output_count; i++) {
        float *logit = &logits[output[2 * i]];
        *logit = *logit - spec->frequency_penalty * (float)output[2 * i + 1];
        *logit = *logit - spec->presence_penalty;
    }
}

/* --- the draw --- */

/* Order of the heap: larger weight first, then the lower token. */
static bool goes_before(const float *weights, uint32_t a, uint32_t b) {
    return weights[a] > weights[b] || (weights[a] == weights[b] && a < b);
}

static void sift_down(const float *weights, uint32_t *heap, uint32_t length, uint32_t at) {
    uint32_t token = heap[at];
    for (;;) {
        uint32_t child = 2 * at + 1;
        if (child >= length)
            break;
        if (child + 1 < length && goes_before(weights, heap[child + 1], heap[child]))
            child++;
        if (!goes_before(weights, heap[child], token))
            break;
        heap[at] = heap[child];
        at = child;
    }
    heap[at] = token;
}

static uint32_t heap_pop(const float *weights, uint32_t *heap, uint32_t *length) {
    uint32_t token = heap[0];
    heap[0] = heap[--*length];
    if (*length > 0)
        sift_down(weights, heap, *length, 0);
    return token;
}

static void heap_make(const float *weights, uint32_t *heap, uint32_t length) {
    for (uint32_t at = length / 2; at-- > 0;)
        sift_down(weights, heap, length, at);
}

/* At most the weight of the k-th largest: k different runs of tokens each have one at least as
 * large. 0 where there are fewer runs. */
static float top_k_bound(const float *weights, uint32_t vocabulary, uint32_t k, float *maxima,
                         uint32_t *heap) {
    enum { RUN = 64 };
    uint32_t runs = (vocabulary + RUN - 1) / RUN, token = 0;
    if (k > runs)
        return 0;
    for (uint32_t r = 0; r < runs; r++) {
        uint32_t first = r * RUN, rest = vocabulary - first;
        maxima[r] = run_max(weights + first, rest < RUN ? rest : RUN);
        heap[r] = r;
    }
    heap_make(maxima, heap, runs);
    for (uint32_t i = 0, length = runs; i < k; i++)
        token = heap_pop(maxima, heap, &length);
    return maxima[token];
}

/* The last token, in descending order, that top_k and top_p keep: everything not before it or equal
 * to it is dropped. A heap gives the best ones one by one, so that only as many are sorted as are
 * kept, and only tokens that may be kept enter it. */
static uint32_t last_kept(const struct sample_spec *spec, const float *weights, uint32_t vocabulary,
                          double sum, const struct sample_work *work) {
    uint32_t *heap = work->heap, length = 0;
    bool limited = spec->top_k > 0 && (uint32_t)spec->top_k < vocabulary;
    uint32_t most = limited ? (uint32_t)spec->top_k : vocabulary;
    /* All tokens below this weight together have half of what top_p leaves out, so the kept run
     * ends before them. */
    float bound = (float)((1.0 - (double)spec->top_p) * sum / (2.0 * vocabulary));
    if (limited)
        bound = top_k_bound(weights, vocabulary, most, work->sum, heap);
    for (uint32_t t = 0; t < vocabulary; t++)
        if (weights[t] > 0 && weights[t] >= bound)
            heap[length++] = t;
    heap_make(weights, heap, length);
    const uint32_t count = length;
    uint32_t popped = 0;
    if (limited) { /* top_p takes its share of what top_k leaves */
        sum = 0;
        for (; popped < count && popped < most; popped++) {
            uint32_t token = heap_pop(weights, heap, &length);
            heap[length] = token; /* stands behind the heap, the first at the end */
            sum += (double)weights[token];
        }
    }
    double wanted = (double)spec->top_p * sum, mass = 0;
    uint32_t token = 0;
    for (uint32_t i = 0; i < (limited ? popped : count); i++) {
        token = limited ? heap[count - 1 - i] : heap_pop(weights, heap, &length);
        mass += (double)weights[token];
        if (spec->top_p < 1.0f && mass >= wanted)
            break;
    }
    return token;
}

static uint32_t draw(const struct sample_spec *spec, float *logits, uint32_t vocabulary,
                     const struct sample_work *work) {
    float *weights = logits, max = run_max(logits, vocabulary);
    if (max == -INFINITY)
        return 0;
    for (uint32_t t = 0; t < vocabulary; t++)
        weights[t] = (logits[t] - max) / spec->temperature;
    exp_canonical_row(weights, vocabulary, weights);
    double sum = 0;
    for (uint32_t t = 0; t < vocabulary; t++) {
        weights[t] = weights[t] < spec->min_p ? 0 : weights[t];
        sum += (double)weights[t];
    }
    if ((spec->top_k > 0 && (uint32_t)spec->top_k < vocabulary) || spec->top_p < 1.0f) {
        uint32_t last = last_kept(spec, weights, vocabulary, sum, work);
        const float least = weights[last];
        sum = 0;
        for (uint32_t t = 0; t < vocabulary; t++) {
            if (weights[t] < least || (weights[t] == least && t > last))
                weights[t] = 0;
            sum += (double)weights[t];
        }
    }
    double wanted = (double)sample_random(spec->seed, spec->counter) * sum, mass = 0;
    uint32_t token = 0;
    for (uint32_t t = 0; t < vocabulary; t++) {
        if (weights[t] == 0)
            continue;
        token = t;
        mass += (double)weights[t];
        if (mass > wanted)
            break;
    }
    return token;
}

static uint32_t choose(const struct sample_spec *spec, const uint32_t *words, const float *logits,
                       uint32_t vocabulary, const struct sample_work *work) {
    bool modified = spec->bias_count != 0 || spec->prompt_count != 0 || spec->output_count != 0;
    bool greedy = spec->temperature < TEMPERATURE_MIN;
    if (greedy && !modified)
        return largest(logits, vocabulary);
    memcpy(work->logits, logits, vocabulary * sizeof *logits);
    if (modified)
        modify(spec, words, work->logits, work->touched);
    return greedy ? largest(work->logits, vocabulary) : draw(spec, work->logits, vocabulary, work);
}

void sample_row(const struct sample_spec *spec, const uint32_t *words, const float *logits,
                uint32_t vocabulary, const struct sample_work *work, struct sample_result *ret,
                uint32_t *ret_words) {
    bool wants_logprobs = (spec->flags & (SAMPLE_LOGPROBS | SAMPLE_SCORE)) != 0;
    if (spec->flags & SAMPLE_DRAW)
        ret->token = choose(spec, words, logits, vocabulary, work);
    else
        ret->token = spec->flags & SAMPLE_SCORE ? spec->target : 0;
    if (wants_logprobs) {
        struct logprobs measured = measure(logits, vocabulary, work->sum);
        if (spec->flags & (SAMPLE_DRAW | SAMPLE_SCORE)) {
            ret->logprob = logprob(&measured, logits[ret->token]);
            ret->rank = rank(logits, vocabulary, logits[ret->token]);
        }
        if (spec->flags & SAMPLE_LOGPROBS) {
            uint32_t top[TOP_LOGPROBS_MAX];
            ret->top = list_top(logits, vocabulary, spec->top, top);
            for (uint32_t i = 0; i < ret->top; i++) {
                *ret_words++ = top[i];
                *ret_words++ = bits_of(logprob(&measured, logits[top[i]]));
            }
        }
    }
    if (spec->flags & SAMPLE_FULL_LOGITS) {
        ret->logits = vocabulary;
        memcpy(ret_words, logits, vocabulary * sizeof *logits);
    }
}
