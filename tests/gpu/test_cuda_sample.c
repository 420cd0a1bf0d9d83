/* Sampling on the device against engine/sample.c: the same tokens, log-probabilities and ranks. */
#include <math.h>

#include "engine/internal.h"
#include "engine/sample.h"
#include "tests/gpu/compare.h"

static uint64_t random_state = 20260103;

enum { ROWS = 6, WORDS = 4000, TOP_WORDS = 40 };

static float pick(const float *values, uint32_t count) {
    return values[random_below(&random_state, count)];
}

static uint32_t random_spec(struct sample_spec *spec, uint32_t *words, uint32_t at,
                            uint32_t vocabulary) {
    memset(spec, 0, sizeof *spec);
    static const uint32_t flags[] = {SAMPLE_DRAW,
                                     SAMPLE_DRAW,
                                     SAMPLE_DRAW | SAMPLE_LOGPROBS,
                                     SAMPLE_SCORE,
                                     SAMPLE_SCORE | SAMPLE_LOGPROBS,
                                     SAMPLE_LOGPROBS};
    spec->seed = random_next(&random_state);
    spec->counter = random_next(&random_state) >> random_below(&random_state, 60);
    spec->flags = flags[random_below(&random_state, 6)];
    spec->target = random_below(&random_state, vocabulary);
    spec->top = spec->flags & SAMPLE_LOGPROBS ? random_below(&random_state, 21) : 0;
    spec->temperature = pick((float[]){0, 0.3f, 1, 1, 2}, 5);
    spec->top_p = pick((float[]){1, 1, 0.9f, 0.5f, 1e-3f}, 5);
    spec->min_p = pick((float[]){0, 0, 0.05f, 1}, 4);
    spec->top_k = (int32_t)pick((float[]){0, 0, 1, 5, 40, 1e6f}, 6);
    spec->repetition_penalty = pick((float[]){1, 1, 1.3f}, 3);
    spec->presence_penalty = pick((float[]){0, 0.5f}, 2);
    spec->frequency_penalty = pick((float[]){0, 0.25f}, 2);
    spec->first_word = at;
    if (random_below(&random_state, 2) == 0)
        return at;
    spec->bias_count = random_below(&random_state, 4);
    spec->prompt_count = random_below(&random_state, 6);
    spec->output_count = random_below(&random_state, 6);
    for (uint32_t i = 0; i < spec->bias_count; i++) {
        float bias =
            random_below(&random_state, 3) == 0 ? -INFINITY : random_float(&random_state, -2, 2);
        words[at++] = random_below(&random_state, vocabulary);
        memcpy(&words[at++], &bias, 4);
    }
    const uint32_t first = random_below(&random_state, vocabulary);
    for (uint32_t i = 0; i < spec->prompt_count; i++)
        words[at++] = (first + i) % vocabulary;
    for (uint32_t i = 0; i < spec->output_count; i++) {
        words[at++] = (first + 2 * i) % vocabulary;
        words[at++] = 1 + random_below(&random_state, 5);
    }
    return at;
}

static void one_case(uint32_t vocabulary, int kind) {
    const uint32_t stride = vocabulary + 5;
    struct array specs = array_make(ROWS * sizeof(struct sample_spec)),
                 words = array_make(WORDS * 4);
    struct array logits = array_make(ROWS * stride * 4);
    struct array work = array_make(ROWS * sample_work_bytes_cuda(vocabulary));
    struct array results = array_make(ROWS * sizeof(struct sample_result));
    struct array top = array_make(ROWS * TOP_WORDS * 4);
    struct sample_spec *spec = (struct sample_spec *)specs.host;
    uint32_t at = 0;
    for (uint32_t r = 0; r < ROWS; r++)
        at = random_spec(&spec[r], (uint32_t *)words.host, at, vocabulary);
    float *logit = (float *)logits.host;
    for (uint32_t i = 0; i < ROWS * stride; i++)
        logit[i] = kind == 0   ? random_float(&random_state, -8, 8)
                   : kind == 1 ? (float)random_below(&random_state, 4) /* ties */
                   : kind == 2 ? (random_below(&random_state, 5) == 0 ? 3.0f : -INFINITY)
                               : -INFINITY;
    struct failure failure;
    if (sample_check(spec, ROWS, (uint32_t *)words.host, WORDS, vocabulary, &failure) < 0)
        fail_msg("%s", failure.text);
    struct sample_work cpu = {malloc(vocabulary * 4), malloc(vocabulary * 4 + 64),
                              malloc(vocabulary * 4 + 64), calloc(vocabulary, 1)};
    struct sample_result expected[ROWS];
    uint32_t expected_top[ROWS][TOP_WORDS];
    memset(expected, 0, sizeof expected);
    memset(expected_top, 0x66, sizeof expected_top);
    fill_bytes(&top, 0x66);
    for (uint32_t r = 0; r < ROWS; r++)
        sample_row(&spec[r], (uint32_t *)words.host, logit + r * stride, vocabulary, &cpu,
                   &expected[r], expected_top[r]);
    gpu_schedule(random_next(&random_state));
    array_put(&specs), array_put(&words), array_put(&logits), array_put(&work);
    array_put(&results), array_put(&top);
    assert_int_equal(sample_cuda(NULL, array_device(&specs), array_device(&words),
                                 array_device(&logits), stride, vocabulary, ROWS,
                                 array_device(&work), array_device(&results), array_device(&top)),
                     0);
    array_get(&results), array_get(&top), array_get(&work);
    const struct sample_result *got = (const struct sample_result *)results.host;
    for (uint32_t r = 0; r < ROWS; r++)
        if (memcmp(&got[r], &expected[r], sizeof got[r]) != 0)
            fail_msg("vocabulary %u kind %d row %u flags %u top_k %d top_p %g: expected token %u "
                     "logprob %a rank %u top %u, found %u %a %u %u",
                     vocabulary, kind, r, spec[r].flags, spec[r].top_k, (double)spec[r].top_p,
                     expected[r].token, (double)expected[r].logprob, expected[r].rank,
                     expected[r].top, got[r].token, (double)got[r].logprob, got[r].rank,
                     got[r].top);
    assert_same(&top, expected_top, "best tokens");
    free(cpu.logits), free(cpu.sum), free(cpu.heap), free(cpu.touched);
    array_free(&specs), array_free(&words), array_free(&logits), array_free(&work);
    array_free(&results), array_free(&top);
}

static void test_sample(void **state) {
    static const uint32_t vocabularies[] = {1, 2, 33, 517, 2048, 4096, 5000};
    for (size_t v = 0; v < sizeof vocabularies / sizeof *vocabularies; v++)
        for (int kind = 0; kind < 4; kind++)
            for (int again = 0; again < (vocabularies[v] < 1000 ? 6 : 1); again++)
                one_case(vocabularies[v], kind);
}

static void test_no_rows(void **state) {
    assert_int_equal(sample_cuda(NULL, NULL, NULL, NULL, 0, 100, 0, NULL, NULL, NULL), 0);
}

int main(void) {
    printf("seed %llu\n", (unsigned long long)random_state);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sample),
        cmocka_unit_test(test_no_rows),
    };
    return cmocka_run_group_tests_name("cuda sample", tests, device_name, NULL);
}
