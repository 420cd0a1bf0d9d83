/* The MTP module: its logits against the oracle's, its guesses against its logits, and that making them
 * changes nothing of what the main layers compute. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/support/one_process.h"

#include <cmocka.h> /* last: its macro fail() hides the function of actors/errors.h */

#define MODEL      "models/demo"
#define ROWS       128
#define POSITIONS  128
#define DIFFERENCE 2e-3
#define KL_MEAN    2e-3 /* bf16; the main model is held to 1.4e-3 */

struct golden {
    void *bytes;
    struct safetensors *file;
    const int32_t *input;
    const float *mtp_logits;
    uint32_t sequences, tokens, vocabulary;
};

static void open_golden(struct golden *self) {
    size_t size;
    struct failure failure;
    self->bytes = read_whole_file(MODEL "/golden.safetensors", &size);
    assert_non_null(self->bytes);
    assert_int_equal(safetensors_open(&self->file, self->bytes, size, "golden", &failure), 0);
    const struct tensor *ids = safetensors_find(self->file, "input_ids");
    const struct tensor *logits = safetensors_find(self->file, "mtp_logits");
    assert_true(ids != NULL && logits != NULL && logits->shape[1] + 1 == ids->shape[1]);
    self->input = ids->data;
    self->mtp_logits = logits->data;
    self->sequences = (uint32_t)ids->shape[0];
    self->tokens = (uint32_t)ids->shape[1];
    self->vocabulary = (uint32_t)logits->shape[2];
}

static void close_golden(struct golden *self) {
    safetensors_close(&self->file);
    free(self->bytes);
}

static struct program_result draft(struct one_process *m, const struct draft_row *row, uint32_t rows,
                                   const struct sample_spec *spec) {
    struct program program = {.kind = PROGRAM_DRAFT, .draft = row, .items = rows, .spec = spec};
    struct program_result result;
    engine_run(m->attention, &program, &result);
    assert_int_equal(result.error, 0);
    return result;
}

static const struct sample_spec GREEDY = {.top_p = 1, .repetition_penalty = 1};

static uint32_t largest(const float *x, uint32_t n) {
    uint32_t best = 0;
    for (uint32_t i = 1; i < n; i++)
        best = x[i] > x[best] ? i : best;
    return best;
}

static double divergence(const float *oracle, const float *ours, uint32_t n) {
    double most[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0}, kl = 0;
    for (uint32_t i = 0; i < n; i++) {
        most[0] = fmax(most[0], (double)oracle[i]);
        most[1] = fmax(most[1], (double)ours[i]);
    }
    for (uint32_t i = 0; i < n; i++) {
        sum[0] += exp((double)oracle[i] - most[0]);
        sum[1] += exp((double)ours[i] - most[1]);
    }
    for (uint32_t i = 0; i < n; i++) {
        double log_p = (double)oracle[i] - most[0] - log(sum[0]);
        kl += exp(log_p) * (log_p - ((double)ours[i] - most[1] - log(sum[1])));
    }
    return kl;
}

/* The sequence through the main layers in `chunks`, each followed by the module on its rows. */
static void run_sequence(struct one_process *m, const struct golden *golden, uint32_t b, uint32_t chunk,
                         double *ret_difference, double *ret_kl) {
    const uint32_t n = golden->vocabulary;
    const int32_t *token = golden->input + (size_t)b * golden->tokens;
    for (uint32_t done = 0; done < golden->tokens; done += chunk) {
        struct batch_row row[ROWS];
        uint32_t rows = golden->tokens - done < chunk ? golden->tokens - done : chunk;
        for (uint32_t i = 0; i < rows; i++)
            row[i] = one_process_row(m, 1, done + i, (uint32_t)token[done + i], MLA_EXPANDED);
        one_process_step(m, row, rows, NULL, 0, NULL);
        for (uint32_t i = 0; i < rows && done + i + 1 < golden->tokens; i++) {
            struct draft_row known = {i, (uint32_t)token[done + i + 1], 1};
            struct program_result result = draft(m, &known, 1, &GREEDY);
            const float *oracle =
                golden->mtp_logits + ((size_t)b * (golden->tokens - 1) + done + i) * n;
            for (uint32_t v = 0; v < n; v++)
                *ret_difference = fmax(*ret_difference, fabs((double)oracle[v] - (double)result.output[v]));
            *ret_kl += divergence(oracle, result.output, n);
            assert_int_equal(result.words[0], largest(result.output, n));
        }
    }
    one_process_forget(m, 1);
}

static void logits_are_the_oracle_s(void **state) {
    (void)state;
    struct golden golden;
    open_golden(&golden);
    for (int profile = 0; profile < 2; profile++) {
        struct failure failure;
        struct one_process m;
        const struct kernels *kernels =
            kernels_select(profile == 0 ? PROFILE_F32 : PROFILE_BF16, ISA_BEST, &failure);
        double difference = 0, kl = 0;
        assert_true(one_process_open(&m, MODEL, kernels, &PARALLEL_SERIAL, ROWS, POSITIONS));
        for (uint32_t b = 0; b < golden.sequences; b++)
            run_sequence(&m, &golden, b, b % 2 == 0 ? golden.tokens : 7, &difference, &kl);
        kl /= (double)golden.sequences * (golden.tokens - 1);
        printf("mtp: %s: largest difference %.3g, mean KL %.3g\n", kernels->name, difference, kl);
        if (profile == 0)
            assert_true(difference <= DIFFERENCE);
        else
            assert_true(kl <= KL_MEAN);
        one_process_close(&m);
    }
    close_golden(&golden);
}

/* The second guess is the first one taken for true; sequences beside it and rows that only remember
 * change nothing; and the main layers go on as if nobody had guessed. */
static void guesses_depend_on_nothing_else(void **state) {
    (void)state;
    struct golden golden;
    struct failure failure;
    struct one_process m;
    open_golden(&golden);
    const uint32_t n = golden.vocabulary, length = golden.tokens - 2;
    assert_true(one_process_open(&m, MODEL, kernels_select(PROFILE_BF16, ISA_BEST, &failure),
                                 &PARALLEL_SERIAL, ROWS, POSITIONS));
    uint32_t guess[2][2];
    float *logits[2] = {malloc(n * sizeof(float)), malloc(n * sizeof(float))};
    for (int beside = 0; beside < 2; beside++) {
        struct batch_row row[ROWS];
        struct draft_row known[ROWS];
        uint32_t rows = 0, count = 0;
        for (uint32_t s = 0; s < 1u + (uint32_t)beside; s++)
            for (uint32_t p = 0; p < length; p++)
                row[rows++] = one_process_row(&m, 1 + s, p, (uint32_t)golden.input[s * golden.tokens + p],
                                              MLA_EXPANDED);
        one_process_step(&m, row, rows, NULL, 0, NULL);
        for (uint32_t r = 0; r < rows; r++)
            if ((r + 1) % length != 0)
                known[count++] = (struct draft_row){r, row[r + 1].token, 0};
        for (uint32_t s = 0; s < 1u + (uint32_t)beside; s++)
            known[count++] = (struct draft_row){(s + 1) * length - 1,
                                                (uint32_t)golden.input[s * golden.tokens + length], 2};
        struct sample_spec spec[2] = {GREEDY, GREEDY};
        struct program_result result = draft(&m, known, count, spec);
        assert_int_equal(result.words_count, 2u * (1u + (uint32_t)beside));
        memcpy(guess[beside], result.words, sizeof guess[beside]);
        struct batch_row next =
            one_process_row(&m, 1, length, (uint32_t)golden.input[length], MLA_EXPANDED);
        one_process_step(&m, &next, 1, (uint32_t[]){0}, 1, logits[beside]);
        one_process_forget(&m, 1);
        one_process_forget(&m, 2);
    }
    assert_memory_equal(guess[0], guess[1], sizeof guess[0]);
    assert_memory_equal(logits[0], logits[1], n * sizeof(float));
    struct batch_row row[ROWS];
    for (uint32_t p = 0; p <= length; p++)
        row[p] = one_process_row(&m, 1, p, (uint32_t)golden.input[p], MLA_EXPANDED);
    float *whole = malloc(n * sizeof *whole);
    one_process_step(&m, row, length + 1, (uint32_t[]){length}, 1, whole);
    assert_memory_equal(whole, logits[0], n * sizeof(float));
    free(whole), free(logits[0]), free(logits[1]);
    one_process_close(&m);
    close_golden(&golden);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(logits_are_the_oracle_s),
        cmocka_unit_test(guesses_depend_on_nothing_else),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
