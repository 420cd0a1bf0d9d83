/* Sampling against plain restatements in double precision and full sorts, and the sampler engine
 * against rows sampled alone. */
#include <float.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/internal.h"
#include "tests/support/one_process.h"
#include "tests/support/random.h"

#include <cmocka.h> /* last: its macro fail() hides the function of actors/errors.h */

#define VOCABULARY 1000

static const struct sample_spec PLAIN = {
    .flags = SAMPLE_DRAW, .temperature = 1, .top_p = 1, .repetition_penalty = 1};

static struct sample_work WORK;

static int make_work(void **state) {
    (void)state;
    WORK.logits = calloc(VOCABULARY, sizeof *WORK.logits);
    WORK.sum = calloc(VOCABULARY, sizeof *WORK.sum);
    WORK.heap = calloc(VOCABULARY, sizeof *WORK.heap);
    WORK.touched = calloc(VOCABULARY, sizeof *WORK.touched);
    return 0;
}

static int free_work(void **state) {
    (void)state;
    free(WORK.logits), free(WORK.sum), free(WORK.heap), free(WORK.touched);
    return 0;
}

static uint32_t bits(float value) {
    uint32_t word;
    memcpy(&word, &value, sizeof word);
    return word;
}

static uint32_t token_of(const struct sample_spec *spec, const uint32_t *words, const float *logits,
                         uint32_t vocabulary) {
    struct sample_result result = {0};
    sample_row(spec, words, logits, vocabulary, &WORK, &result, NULL);
    return result.token;
}

/* Known answers of Random123 (kat_vectors, philox4x32 10). */
static void philox_gives_the_published_answers(void **state) {
    (void)state;
    static const uint32_t CASES[][10] = {
        {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
        {0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0x408f276d,
         0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
        {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09,
         0x94fdcceb, 0x5001e420, 0x24126ea1},
    };
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        uint32_t found[4];
        philox_4x32_10(CASES[i], CASES[i] + 4, found);
        assert_memory_equal(found, CASES[i] + 6, sizeof found);
    }
    assert_true(sample_random(0, 0) == (float)(0x6627e8d5 >> 8) * 0x1p-24f);
    assert_true(sample_random(1, 0) != sample_random(0, 1));
    assert_true(sample_random(UINT64_C(1) << 32, 0) != sample_random(0, 0));
    assert_true(sample_random(0, UINT64_C(1) << 32) != sample_random(0, 0));
}

static void greedy_takes_the_largest_and_the_lower_of_equals(void **state) {
    (void)state;
    struct sample_spec spec = PLAIN;
    spec.temperature = 0;
    const float logits[5] = {1, 3, 3, -INFINITY, 2};
    assert_int_equal(token_of(&spec, NULL, logits, 5), 1);
    const uint32_t words[] = {1, bits(-INFINITY), 2, bits(-0.5f), 4, bits(0.25f)};
    spec.bias_count = 1;
    assert_int_equal(token_of(&spec, words, logits, 5), 2);
    spec.first_word = 2, spec.bias_count = 1;
    assert_int_equal(token_of(&spec, words, logits, 5), 1);
    spec.first_word = 0, spec.bias_count = 3; /* - , -inf, 2.5, -inf, 2.25 */
    assert_int_equal(token_of(&spec, words, logits, 5), 2);
    const float forbidden[3] = {-INFINITY, -INFINITY, -INFINITY};
    assert_int_equal(token_of(&PLAIN, NULL, forbidden, 3), 0);
}

/* vLLM: repetition once per token that is in prompt or output, dividing positive and multiplying
 * negative logits; then count x frequency and presence over the output. */
static void penalties_follow_vllm(void **state) {
    (void)state;
    const float logits[6] = {4, -1, 2, 1, 0.5f, 3};
    /* bias: token 3 +1; prompt: 0 and 1; output: 0 twice, 2 once */
    const uint32_t words[] = {3, bits(1), 0, 1, 0, 2, 2, 1};
    struct sample_spec spec = PLAIN;
    spec.bias_count = 1, spec.prompt_count = 2, spec.output_count = 2;
    spec.repetition_penalty = 2, spec.frequency_penalty = 0.25f, spec.presence_penalty = 0.5f;
    /* 0: 4/2 - 2*0.25 - 0.5 = 1; 1: -1*2 = -2; 2: 2/2 - 0.25 - 0.5 = 0.25; 3: 1+1 = 2 */
    const double expected[6] = {1, -2, 0.25, 2, 0.5, 3};
    double sum = 0;
    for (int t = 0; t < 6; t++)
        sum += exp(expected[t]);
    unsigned counts[6] = {0};
    const unsigned draws = 40000;
    for (unsigned i = 0; i < draws; i++) {
        spec.counter = i;
        counts[token_of(&spec, words, logits, 6)]++;
    }
    for (int t = 0; t < 6; t++) {
        double p = exp(expected[t]) / sum, deviation = sqrt(p * (1 - p) / draws);
        printf("token %d: expected %.4f, found %.4f\n", t, p, counts[t] / (double)draws);
        assert_true(fabs(counts[t] / (double)draws - p) < 4 * deviation);
    }
    spec.temperature = 0;
    assert_int_equal(token_of(&spec, words, logits, 6), 5);
    for (int t = 0; t < VOCABULARY; t++)
        assert_int_equal(WORK.touched[t], 0);
}

/* The definition in engine/sample.h by a full sort. */
static const float *sort_weights;
static int descending(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    if (sort_weights[x] != sort_weights[y])
        return sort_weights[x] > sort_weights[y] ? -1 : 1;
    return x < y ? -1 : 1;
}

static uint32_t plain_draw(const struct sample_spec *spec, const float *logits, uint32_t vocabulary,
                           uint32_t *ret_kept) {
    float weights[VOCABULARY], max = -INFINITY;
    uint32_t order[VOCABULARY], count = 0;
    bool kept[VOCABULARY] = {false};
    for (uint32_t t = 0; t < vocabulary; t++)
        max = logits[t] > max ? logits[t] : max;
    for (uint32_t t = 0; t < vocabulary; t++) {
        weights[t] = exp_canonical((logits[t] - max) / spec->temperature);
        if (weights[t] >= spec->min_p && weights[t] > 0)
            order[count++] = t;
    }
    sort_weights = weights;
    double sum = 0, mass = 0;
    for (uint32_t i = 0; i < count; i++) /* what top_k does not cut, in order of token */
        sum += (double)weights[order[i]];
    qsort(order, count, sizeof *order, descending);
    if (spec->top_k > 0 && (uint32_t)spec->top_k < vocabulary) {
        count = (uint32_t)spec->top_k < count ? (uint32_t)spec->top_k : count;
        sum = 0;
        for (uint32_t i = 0; i < count; i++)
            sum += (double)weights[order[i]];
    }
    *ret_kept = 0;
    for (uint32_t i = 0; i < count; i++) {
        kept[order[i]] = true;
        ++*ret_kept;
        mass += (double)weights[order[i]];
        if (spec->top_p < 1 && mass >= (double)spec->top_p * sum)
            break;
    }
    sum = 0;
    for (uint32_t t = 0; t < vocabulary; t++)
        sum += kept[t] ? (double)weights[t] : 0;
    double wanted = (double)sample_random(spec->seed, spec->counter) * sum;
    uint32_t token = 0;
    mass = 0;
    for (uint32_t t = 0; t < vocabulary && !(mass > wanted); t++)
        if (kept[t]) {
            mass += (double)weights[t];
            token = t;
        }
    return token;
}

static void draws_follow_the_definition(void **state) {
    (void)state;
    uint64_t random = 77;
    printf("seed 77\n");
    unsigned cut = 0;
    for (int i = 0; i < 3000; i++) {
        uint32_t vocabulary = 1 + random_below(&random, VOCABULARY);
        float logits[VOCABULARY], spread = random_float(&random, 0, 12);
        for (uint32_t t = 0; t < vocabulary; t++) {
            logits[t] = random_float(&random, -spread, spread);
            if (i % 3 == 0) /* many ties */
                logits[t] = floorf(logits[t]);
        }
        struct sample_spec spec = PLAIN;
        spec.seed = random_next(&random);
        spec.counter = random_below(&random, 100000);
        spec.temperature = random_float(&random, 0.1f, 2);
        if (random_below(&random, 2))
            spec.top_p = random_float(&random, 0, 1);
        if (random_below(&random, 2))
            spec.top_k = (int32_t)random_below(&random, 60) - 1;
        if (random_below(&random, 3) == 0)
            spec.min_p = random_float(&random, 0, 0.2f);
        uint32_t kept, expected = plain_draw(&spec, logits, vocabulary, &kept);
        assert_int_equal(token_of(&spec, NULL, logits, vocabulary), expected);
        cut += kept < vocabulary;
    }
    assert_true(cut > 2000);
}

/* Weights 8 4 2 2 1: each filter alone, by what can be drawn. */
static void filters_keep_what_they_say(void **state) {
    (void)state;
    const float logits[5] = {logf(2), logf(8), logf(1), logf(4), logf(2)};
    static const struct {
        float top_p, min_p;
        int32_t top_k;
        unsigned kept; /* bit per token */
    } CASES[] = {
        {1, 0, 0, 0x1f},    {1, 0, -1, 0x1f},   {1, 0, 1, 0x02},       {1, 0, 3, 0x0b},
        {1, 0, 100, 0x1f},  {0, 0, 0, 0x02},    {0.4f, 0, 0, 0x02},    {0.6f, 0, 0, 0x0a},
        {0.8f, 0, 0, 0x0b}, {0.9f, 0, 0, 0x1b}, {1, 0.3f, 0, 0x0a},    {1, 0.2f, 0, 0x1b},
        {0.7f, 0, 2, 0x0a}, {0.6f, 0, 2, 0x02}, {0.5f, 0.3f, 0, 0x02}, {1, 1, 0, 0x02},
    };
    for (size_t c = 0; c < sizeof CASES / sizeof *CASES; c++) {
        struct sample_spec spec = PLAIN;
        spec.top_p = CASES[c].top_p, spec.min_p = CASES[c].min_p, spec.top_k = CASES[c].top_k;
        unsigned seen = 0;
        for (spec.counter = 0; spec.counter < 400; spec.counter++)
            seen |= 1u << token_of(&spec, NULL, logits, 5);
        if (seen != CASES[c].kept)
            printf("case %zu: expected %x, found %x\n", c, CASES[c].kept, seen);
        assert_int_equal(seen, CASES[c].kept);
    }
}

static void tiny_temperatures_do_not_overflow(void **state) {
    (void)state;
    const float logits[3] = {-3e38f, 3e38f, 2.9e38f};
    struct sample_spec spec = PLAIN;
    spec.temperature = 2e-5f;
    for (spec.counter = 0; spec.counter < 50; spec.counter++)
        assert_int_equal(token_of(&spec, NULL, logits, 3), 1);
}

static void logprobs_come_from_the_raw_logits(void **state) {
    (void)state;
    uint64_t random = 5;
    float logits[VOCABULARY];
    double sum = 0;
    for (int t = 0; t < VOCABULARY; t++)
        logits[t] = floorf(random_float(&random, -8, 8) * 4) / 4; /* with ties */
    logits[17] = -INFINITY;
    for (int t = 0; t < VOCABULARY; t++)
        sum += exp((double)logits[t]);
    struct sample_spec spec = PLAIN;
    spec.flags = SAMPLE_SCORE | SAMPLE_LOGPROBS;
    spec.top = TOP_LOGPROBS_MAX;
    spec.target = 300;
    const uint32_t bias[2] = {300, bits(50)}; /* changes the choice, never the log-probability */
    spec.bias_count = 1;
    uint32_t words[2 * TOP_LOGPROBS_MAX];
    struct sample_result result = {0};
    sample_row(&spec, bias, logits, VOCABULARY, &WORK, &result, words);
    assert_int_equal(result.token, 300);
    assert_true(fabs((double)result.logprob - ((double)logits[300] - log(sum))) < 1e-5);
    uint32_t larger = 0;
    for (int t = 0; t < VOCABULARY; t++)
        larger += logits[t] > logits[300];
    assert_int_equal(result.rank, 1 + larger);
    assert_int_equal(result.top, TOP_LOGPROBS_MAX);
    for (int i = 0; i < TOP_LOGPROBS_MAX; i++) {
        uint32_t token = words[2 * i], before = i > 0 ? words[2 * i - 2] : 0;
        float found;
        memcpy(&found, &words[2 * i + 1], sizeof found);
        assert_true(fabs((double)found - ((double)logits[token] - log(sum))) < 1e-5);
        assert_true(i == 0 || logits[token] < logits[before] ||
                    (logits[token] == logits[before] && token > before));
    }
    uint32_t above = 0; /* nothing outside the list is larger than its last */
    for (int t = 0; t < VOCABULARY; t++)
        above += logits[t] > logits[words[2 * TOP_LOGPROBS_MAX - 2]];
    assert_true(above < TOP_LOGPROBS_MAX);
    spec.flags = SAMPLE_DRAW | SAMPLE_LOGPROBS;
    spec.temperature = 0, spec.top = 0;
    result = (struct sample_result){0};
    sample_row(&spec, bias, logits, VOCABULARY, &WORK, &result, words);
    assert_int_equal(result.token, 300);
    assert_int_equal(result.top, 0);
    assert_true(fabs((double)result.logprob - ((double)logits[300] - log(sum))) < 1e-5);
    spec.flags = SAMPLE_SCORE;
    spec.target = 17;
    sample_row(&spec, bias, logits, VOCABULARY, &WORK, &result, words);
    assert_true(result.logprob == -INFINITY);
}

static void what_comes_from_outside_is_checked(void **state) {
    (void)state;
    const uint32_t words[] = {3, bits(1), 4, 9, 5, 2};
    struct sample_spec good = PLAIN;
    good.bias_count = 1, good.prompt_count = 1, good.output_count = 1;
    const uint32_t vocabulary = 10;
    struct failure failure;
    assert_int_equal(sample_check(&good, 1, words, 6, vocabulary, &failure), 0);
    struct sample_spec bad[24];
    size_t n = 0;
#define BAD(change)                                                                                \
    do {                                                                                           \
        bad[n] = good;                                                                             \
        bad[n++].change;                                                                           \
    } while (0)
    BAD(flags = 64);
    BAD(flags = SAMPLE_DRAW | SAMPLE_SCORE);
    BAD(top = TOP_LOGPROBS_MAX + 1);
    BAD(temperature = -1);
    BAD(temperature = NAN);
    BAD(temperature = INFINITY);
    BAD(top_p = 1.5f);
    BAD(top_p = NAN);
    BAD(min_p = -0.1f);
    BAD(repetition_penalty = 0);
    BAD(repetition_penalty = NAN);
    BAD(presence_penalty = INFINITY);
    BAD(frequency_penalty = -INFINITY);
    BAD(first_word = 2);
    BAD(first_word = UINT32_MAX);
    BAD(bias_count = 2);
    BAD(bias_count = UINT32_MAX);
    BAD(prompt_count = UINT32_MAX);
    BAD(output_count = UINT32_MAX);
#undef BAD
    for (size_t i = 0; i < n; i++) {
        struct sample_spec both[2] = {good, bad[i]};
        failure = (struct failure){0};
        assert_int_equal(sample_check(both, 2, words, 6, vocabulary, &failure), ERR_INVALID);
        assert_non_null(strstr(failure.text, "row 1"));
    }
    struct sample_spec score = good;
    score.flags = SAMPLE_SCORE, score.target = vocabulary;
    assert_int_equal(sample_check(&score, 1, words, 6, vocabulary, &failure), ERR_INVALID);
    /* each word out of its range */
    static const struct {
        int at;
        float value;
    } NUMBERS[] = {{1, NAN}, {1, INFINITY}};
    for (size_t i = 0; i < 2; i++) {
        uint32_t changed[6];
        memcpy(changed, words, sizeof changed);
        changed[NUMBERS[i].at] = bits(NUMBERS[i].value);
        assert_int_equal(sample_check(&good, 1, changed, 6, vocabulary, &failure), ERR_INVALID);
    }
    const int tokens[] = {0, 2, 3};
    for (size_t i = 0; i < 3; i++) {
        uint32_t changed[6];
        memcpy(changed, words, sizeof changed);
        changed[tokens[i]] = vocabulary;
        assert_int_equal(sample_check(&good, 1, changed, 6, vocabulary, &failure), ERR_INVALID);
    }
}

/* Rows of every kind in one program, serial and cut in three, equal each row alone; broken hidden
 * rows still give a token. */
static void a_row_does_not_see_its_neighbours(void **state) {
    (void)state;
    enum { COUNT = 13 };
    struct one_process m[2];
    struct failure failure;
    const struct kernels *kernels = kernels_select(PROFILE_BF16, ISA_BEST, &failure);
    assert_true(one_process_open(&m[0], "tests/golden/v2-lite", kernels, &PARALLEL_SERIAL, 16, 64));
    assert_true(
        one_process_open(&m[1], "tests/golden/v2-lite", kernels, &PARALLEL_REVERSED, 16, 64));
    const uint32_t hidden = m[0].config->hidden, vocabulary = m[0].config->vocabulary;
    bf16 *rows = calloc((size_t)COUNT * hidden, sizeof *rows);
    uint64_t random = 9;
    for (size_t i = 0; i < (size_t)COUNT * hidden; i++)
        rows[i] = bf16_from_float(random_float(&random, -2, 2));
    rows[3] = bf16_from_float(NAN); /* row 0 */
    const uint32_t words[] = {7, bits(2), 5, 7, 5, 3};
    struct sample_spec spec[COUNT];
    for (uint32_t r = 0; r < COUNT; r++) {
        spec[r] = PLAIN;
        spec[r].seed = r, spec[r].counter = 40;
        spec[r].flags = r % 4 == 1 ? SAMPLE_SCORE : SAMPLE_DRAW;
        spec[r].flags |= r % 3 == 0 ? SAMPLE_LOGPROBS : 0;
        spec[r].flags |= r % 5 == 2 ? SAMPLE_FULL_LOGITS : 0;
        spec[r].top = r, spec[r].target = 11 * r;
        spec[r].top_p = r % 2 ? 0.9f : 1, spec[r].temperature = r % 6 == 5 ? 0 : 0.8f;
        spec[r].bias_count = r % 2, spec[r].prompt_count = r % 2 ? 2 : 0;
        spec[r].output_count = r % 2, spec[r].repetition_penalty = 1.25f;
    }
    assert_int_equal(sample_check(spec, COUNT, words, 6, vocabulary, &failure), 0);
    struct program program = {.kind = PROGRAM_SAMPLE,
                              .spec = spec,
                              .rows = COUNT,
                              .words = words,
                              .words_count = 6,
                              .payload = rows};
    struct program_result all, alone;
    for (int which = 0; which < 2; which++) {
        engine_run(m[which].sampler, &program, &all);
        for (uint32_t r = 0; r < COUNT; r++) {
            struct program one = program;
            one.spec = &spec[r], one.rows = 1, one.payload = rows + (size_t)r * hidden;
            engine_run(m[1 - which].sampler, &one, &alone);
            struct sample_result a = all.sampled[r], b = alone.sampled[0];
            uint32_t count = 2 * a.top + a.logits;
            assert_int_equal(b.first_word, 0);
            assert_memory_equal(all.words + a.first_word, alone.words, count * sizeof(uint32_t));
            a.first_word = 0;
            assert_memory_equal(&a, &b, sizeof a);
            assert_true(a.token < vocabulary);
            assert_int_equal(a.logits, r % 5 == 2 ? vocabulary : 0);
            assert_int_equal(a.top, r % 3 == 0 ? r : 0);
        }
    }
    free(rows);
    one_process_close(&m[0]);
    one_process_close(&m[1]);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(philox_gives_the_published_answers),
        cmocka_unit_test(greedy_takes_the_largest_and_the_lower_of_equals),
        cmocka_unit_test(penalties_follow_vllm),
        cmocka_unit_test(draws_follow_the_definition),
        cmocka_unit_test(filters_keep_what_they_say),
        cmocka_unit_test(tiny_temperatures_do_not_overflow),
        cmocka_unit_test(logprobs_come_from_the_raw_logits),
        cmocka_unit_test(what_comes_from_outside_is_checked),
        cmocka_unit_test(a_row_does_not_see_its_neighbours),
    };
    return cmocka_run_group_tests(tests, make_work, free_work);
}
