/* Identity: a sequence's logits have the same bits however it is cut into steps, whatever shares
 * its batches, however work is cut over threads and frames, on every instruction set, fresh or
 * replayed. */
#include <malloc.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/support/one_process.h"

#include <cmocka.h> /* last: its macro fail() hides the function of actors/errors.h */

#define LENGTH    80 /* beyond one page */
#define PROMPT    70
#define ROWS      160
#define POSITIONS 128

struct variant {
    const char *name;
    uint32_t chunk;      /* prompt rows of one step */
    uint32_t generated;  /* generated rows of one step; 1: as they are first made, more: a replay */
    uint32_t other;      /* rows of another sequence that share each step */
    uint32_t part_items; /* largest EXPERT program; 0: everything in one */
    bool together;       /* the last of the prompt and the first generated rows share a step */
};

static const struct variant VARIANTS[] = {
    {"whole", LENGTH, 1, 0, 0, false},
    {"chunks of 1", 1, 1, 0, 0, false},
    {"chunks of 7", 7, 1, 0, 0, false},
    {"replay in one step", LENGTH, LENGTH, 0, 0, true},
    {"batched with another, chunks of 7", 7, 2, 40, 0, true},
    {"chunks of 64", 64, 1, 0, 0, false},
    {"replay in chunks", 33, 4, 0, 0, true},
    {"batched with another", LENGTH, 1, 17, 0, false},
    {"frames of 1 item", 64, 1, 3, 1, false},
    {"frames of 23 items", LENGTH, LENGTH, 30, 23, true},
};

static uint32_t tokens[2][LENGTH]; /* of the sequence and of the other */

/* Tokens from the oracle's input. */
static void load_tokens(const char *directory) {
    char path[512];
    size_t size;
    snprintf(path, sizeof path, "%s/golden.safetensors", directory);
    void *bytes = read_whole_file(path, &size);
    assert_non_null(bytes);
    struct safetensors *file;
    struct failure failure;
    assert_int_equal(safetensors_open(&file, bytes, size, path, &failure), 0);
    const struct tensor *ids = safetensors_find(file, "input_ids");
    assert_true(ids != NULL && ids->bytes >= sizeof tokens);
    memcpy(tokens, ids->data, sizeof tokens);
    safetensors_close(&file);
    free(bytes);
}

static enum mla_form form_of(uint32_t position) {
    return position < PROMPT ? MLA_EXPANDED : MLA_ABSORBED;
}

/* Sequence 2 from its start to its end, sequence 5 beside it, before or after it in the batch by
 * turns. All logits of sequence 2 to ret [LENGTH, vocabulary]. */
static void run_variant(struct one_process *m, const struct variant *v, float *ret) {
    static struct batch_row row[ROWS];
    static uint32_t select[ROWS];
    const uint32_t vocabulary = m->config->vocabulary;
    uint32_t other_done = 0, step = 0;
    m->part_items_max = v->part_items != 0 ? v->part_items : ROWS * m->config->gate.k;
    for (uint32_t done = 0; done < LENGTH; step++) {
        uint32_t end = done < PROMPT ? done + v->chunk : done + v->generated;
        if (done < PROMPT && end >= PROMPT)
            end = v->together ? PROMPT + v->generated : PROMPT;
        end = end < LENGTH ? end : LENGTH;
        uint32_t others = v->other < LENGTH - other_done ? v->other : LENGTH - other_done;
        uint32_t count = end - done, n = 0, mine = step % 2 == 0 ? 0 : others;
        for (uint32_t p = done; p < end; p++)
            row[mine + p - done] = one_process_row(m, 2, p, tokens[0][p], form_of(p));
        for (uint32_t i = 0; i < others; i++)
            row[(mine == 0 ? count : 0) + i] = one_process_row(
                m, 5, other_done + i, tokens[1][other_done + i], form_of(other_done + i));
        for (n = 0; n < count; n++)
            select[n] = mine + n;
        one_process_step(m, row, count + others, select, count, ret + (size_t)done * vocabulary);
        other_done += others;
        done = end;
    }
    one_process_forget(m, 2);
    one_process_forget(m, 5);
}

/* Every variant on one engine against `expected`, which the first engine makes. */
static void run_variants(const char *directory, const struct kernels *kernels,
                         const struct parallel *parallel, size_t variants, float **expected) {
    struct one_process m;
    assert_true(one_process_open(&m, directory, kernels, parallel, ROWS, POSITIONS));
    size_t bytes = (size_t)LENGTH * m.config->vocabulary * sizeof(float);
    float *found = malloc(bytes);
    for (size_t i = 0; i < variants; i++) {
        memset(found, 0xff, bytes);
        run_variant(&m, &VARIANTS[i], found);
        if (*expected == NULL) {
            *expected = malloc(bytes);
            memcpy(*expected, found, bytes);
        }
        if (memcmp(found, *expected, bytes) != 0)
            printf("%s, %s, %d threads: \"%s\" differs\n", directory, kernels->name,
                   parallel->width, VARIANTS[i].name);
        assert_memory_equal(found, *expected, bytes);
    }
    printf("identity: %s, %s, %d part(s): %zu ways to run a sequence, the same bits\n", directory,
           kernels->name, parallel->width, variants);
    free(found);
    one_process_close(&m);
}

static void check_model(const char *directory, size_t variants) {
    load_tokens(directory);
    float *expected = NULL;
    struct failure failure;
    for (int isa = ISA_SCALAR; isa <= ISA_AMX; isa++) {
        const struct kernels *kernels = isa_available((enum isa)isa)
                                            ? kernels_select(PROFILE_BF16, (enum isa)isa, &failure)
                                            : NULL;
        if (kernels == NULL)
            continue;
        run_variants(directory, kernels, &PARALLEL_SERIAL, variants, &expected);
        run_variants(directory, kernels, &PARALLEL_REVERSED, variants, &expected);
    }
    free(expected);
    expected = NULL;
    const struct kernels *f32 = kernels_select(PROFILE_F32, ISA_BEST, &failure);
    run_variants(directory, f32, &PARALLEL_SERIAL, variants, &expected);
    run_variants(directory, f32, &PARALLEL_REVERSED, variants, &expected);
    free(expected);
}

/* NULL: this processor has them not. */
static const struct kernels *fp8_kernels(enum isa isa) {
    struct failure failure;
    return isa_available(isa) ? kernels_select(PROFILE_FP8, isa, &failure) : NULL;
}

/* Rows quantised before they are sent: the bits of rows that experts quantise. */
static void rows_may_travel_in_e4m3(void **state) {
    (void)state;
    static const char directory[] = "tests/golden/v3-fp8";
    float *expected = NULL;
    load_tokens(directory);
    for (int isa = ISA_SCALAR; isa <= ISA_AMX; isa++) {
        const struct kernels *kernels = fp8_kernels((enum isa)isa);
        if (kernels == NULL)
            continue;
        run_variants(directory, kernels, &PARALLEL_SERIAL, 1, &expected);
        one_process_use_e4m3_rows(true);
        run_variants(directory, kernels, &PARALLEL_SERIAL, 2, &expected);
        run_variants(directory, kernels, &PARALLEL_REVERSED, 2, &expected);
        one_process_use_e4m3_rows(false);
    }
    free(expected);
}

/* Latents in FP8: other bits than without, the same whatever runs them. */
static void latents_in_fp8_are_as_identical(void **state) {
    (void)state;
    static const char directory[] = "tests/golden/v3-fp8";
    float *plain = NULL, *expected = NULL;
    size_t bytes = 0;
    load_tokens(directory);
    for (int isa = ISA_SCALAR; isa <= ISA_AMX; isa++) {
        const struct kernels *kernels = fp8_kernels((enum isa)isa);
        if (kernels == NULL)
            continue;
        run_variants(directory, kernels, &PARALLEL_SERIAL, 1, &plain);
        one_process_use_latent_fp8(true);
        run_variants(directory, kernels, &PARALLEL_REVERSED, 6, &expected);
        struct one_process m;
        assert_true(one_process_open(&m, directory, kernels, &PARALLEL_SERIAL, ROWS, POSITIONS));
        bytes = (size_t)LENGTH * m.config->vocabulary * sizeof(float);
        one_process_close(&m);
        one_process_use_latent_fp8(false);
    }
    assert_memory_not_equal(plain, expected, bytes);
    free(plain), free(expected);
}

static void no_way_of_running_changes_a_bit(void **state) {
    (void)state;
    const size_t all = sizeof VARIANTS / sizeof *VARIANTS;
    check_model("tests/golden/v3-fp8", all);
    check_model("tests/golden/v2-lite", 5);
}

/* A batch large enough that every piece of work is cut over the threads. */
static void large_batches_are_cut_without_a_trace(void **state) {
    (void)state;
    enum { LARGE = 256, LARGE_PROMPT = 192 };
    static const struct parallel *const WAYS[2] = {&PARALLEL_SERIAL, &PARALLEL_REVERSED};
    struct failure failure;
    const struct kernels *kernels = kernels_select(PROFILE_BF16, ISA_BEST, &failure);
    float *logits[2];
    size_t bytes = 0;
    for (int way = 0; way < 2; way++) {
        static struct batch_row row[LARGE];
        static uint32_t select[LARGE];
        struct one_process m;
        assert_true(one_process_open(&m, "models/demo", kernels, WAYS[way], LARGE, LARGE));
        for (uint32_t p = 0; p < LARGE; p++) {
            row[p] = one_process_row(&m, 1, p, 3 + p * 7919 % (m.config->vocabulary - 3),
                                     p < LARGE_PROMPT ? MLA_EXPANDED : MLA_ABSORBED);
            select[p] = p;
        }
        bytes = (size_t)LARGE * m.config->vocabulary * sizeof(float);
        logits[way] = malloc(bytes);
        one_process_step(&m, row, LARGE, select, LARGE, logits[way]);
        one_process_close(&m);
    }
    assert_memory_equal(logits[0], logits[1], bytes);
    free(logits[0]), free(logits[1]);
}

/* Forgotten pages are zero again: what was in them cannot be seen by the next sequence, and a page
 * of NaN would be. */
static void cleared_pages_leave_no_trace(void **state) {
    (void)state;
    struct failure failure;
    const struct kernels *kernels = kernels_select(PROFILE_BF16, ISA_BEST, &failure);
    struct one_process m;
    load_tokens("tests/golden/v3-fp8");
    assert_true(
        one_process_open(&m, "tests/golden/v3-fp8", kernels, &PARALLEL_SERIAL, ROWS, POSITIONS));
    size_t n = (size_t)LENGTH * m.config->vocabulary;
    float *first = malloc(n * sizeof *first), *second = malloc(n * sizeof *second);
    run_variant(&m, &VARIANTS[0], first);
    struct batch_row row[LENGTH];
    for (uint32_t p = 0; p < LENGTH; p++)
        row[p] = one_process_row(&m, 2, p, tokens[1][p], MLA_ABSORBED);
    one_process_step(&m, row, LENGTH, NULL, 0, NULL);
    one_process_forget(&m, 2);
    run_variant(&m, &VARIANTS[2], second);
    assert_memory_equal(first, second, n * sizeof *first);
    free(first), free(second);
    one_process_close(&m);
}

/* Rows behind a guess that was wrong leave nothing: each generated row is computed beside two wrong
 * ones, whose places in the cache the next rows take. */
static void wrong_guesses_leave_no_trace(void **state) {
    (void)state;
    struct failure failure;
    for (int isa = ISA_SCALAR; isa <= ISA_AMX; isa++) {
        const struct kernels *kernels = isa_available((enum isa)isa)
                                            ? kernels_select(PROFILE_BF16, (enum isa)isa, &failure)
                                            : NULL;
        struct one_process m;
        if (kernels == NULL)
            continue;
        load_tokens("tests/golden/v3-fp8");
        assert_true(one_process_open(&m, "tests/golden/v3-fp8", kernels, &PARALLEL_SERIAL, ROWS,
                                     POSITIONS));
        const uint32_t vocabulary = m.config->vocabulary;
        float *expected = malloc((size_t)LENGTH * vocabulary * sizeof *expected);
        float *found = malloc((size_t)vocabulary * sizeof *found);
        struct batch_row row[LENGTH];
        run_variant(&m, &VARIANTS[0], expected);
        for (uint32_t p = 0; p < PROMPT; p++)
            row[p] = one_process_row(&m, 2, p, tokens[0][p], MLA_EXPANDED);
        one_process_step(&m, row, PROMPT, NULL, 0, NULL);
        for (uint32_t p = PROMPT; p < LENGTH; p++) {
            row[0] = one_process_row(&m, 2, p, tokens[0][p], MLA_ABSORBED);
            row[1] = one_process_row(&m, 2, p + 1, (tokens[0][p] + 7) % vocabulary, MLA_ABSORBED);
            row[2] = one_process_row(&m, 2, p + 2, (tokens[0][p] + 9) % vocabulary, MLA_ABSORBED);
            one_process_step(&m, row, 3, (uint32_t[]){0}, 1, found);
            assert_memory_equal(found, expected + (size_t)p * vocabulary, vocabulary * sizeof *found);
        }
        free(expected), free(found);
        one_process_close(&m);
    }
}

/* Versions of the routing bias: a sequence's rows have the same bits whichever versions share their batches, as alone; zero deltas
 * are the model's own; another version gives other bits, so that it could be seen. */
static void other_versions_of_the_bias_leave_no_trace(void **state) {
    (void)state;
    static const char *const models[] = {"tests/golden/v3-fp8", "tests/golden/v2-lite"};
    struct failure failure;
    for (size_t i = 0; i < sizeof models / sizeof *models; i++) {
        struct one_process m;
        const struct kernels *kernels = kernels_select(PROFILE_BF16, ISA_BEST, &failure);
        load_tokens(models[i]);
        assert_true(one_process_open(&m, models[i], kernels, &PARALLEL_REVERSED, ROWS, POSITIONS));
        size_t n = (size_t)LENGTH * m.config->vocabulary, entries = (size_t)m.config->layers * m.config->experts;
        float *alone = malloc(n * sizeof *alone), *found = malloc(n * sizeof *found);
        float *bias[3];
        for (uint32_t v = 0; v < 3; v++) {
            bias[v] = calloc(entries, sizeof **bias);
            for (size_t e = 0; v > 0 && e < entries; e++)
                bias[v][e] = (float)((e * 7 + v * 3) % 11) / 64 - 0.08f;
        }
        run_variant(&m, &VARIANTS[0], alone);
        m.bias[2] = bias[0];
        run_variant(&m, &VARIANTS[0], found);
        assert_memory_equal(found, alone, n * sizeof *found);
        m.bias[2] = bias[1];
        run_variant(&m, &VARIANTS[0], found);
        assert_memory_not_equal(found, alone, n * sizeof *found);
        memcpy(alone, found, n * sizeof *found);
        const float *beside[] = {NULL, bias[2], bias[1]};
        for (size_t b = 0; b < sizeof beside / sizeof *beside; b++)
            for (size_t v = 3; v < sizeof VARIANTS / sizeof *VARIANTS; v++) {
                m.bias[5] = beside[b];
                run_variant(&m, &VARIANTS[v], found);
                assert_memory_equal(found, alone, n * sizeof *found);
            }
        for (uint32_t v = 0; v < 3; v++)
            free(bias[v]);
        free(alone), free(found);
        one_process_close(&m);
    }
}

/* After the first steps an engine takes no more memory. (Where the allocator is replaced, as by
 * sanitizers, it reports nothing.) */
static void steady_state_takes_no_memory(void **state) {
    (void)state;
    struct failure failure;
    const struct kernels *kernels = kernels_select(PROFILE_BF16, ISA_BEST, &failure);
    struct one_process m;
    load_tokens("tests/golden/v3-fp8");
    assert_true(
        one_process_open(&m, "tests/golden/v3-fp8", kernels, &PARALLEL_SERIAL, ROWS, POSITIONS));
    float *logits = malloc((size_t)LENGTH * m.config->vocabulary * sizeof *logits);
    for (size_t i = 4; i < 10; i++)
        run_variant(&m, &VARIANTS[i], logits);
    struct mallinfo2 before = mallinfo2();
    uint64_t held = engine_memory_bytes(m.attention) + engine_memory_bytes(m.expert) +
                    engine_memory_bytes(m.sampler);
    for (size_t i = 4; i < 10; i++)
        run_variant(&m, &VARIANTS[i], logits);
    struct mallinfo2 after = mallinfo2();
    assert_int_equal(engine_memory_bytes(m.attention) + engine_memory_bytes(m.expert) +
                         engine_memory_bytes(m.sampler),
                     held);
    assert_true(after.uordblks == before.uordblks && after.hblkhd == before.hblkhd);
    free(logits);
    one_process_close(&m);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(no_way_of_running_changes_a_bit),
        cmocka_unit_test(rows_may_travel_in_e4m3),
        cmocka_unit_test(latents_in_fp8_are_as_identical),
        cmocka_unit_test(large_batches_are_cut_without_a_trace),
        cmocka_unit_test(cleared_pages_leave_no_trace),
        cmocka_unit_test(wrong_guesses_leave_no_trace),
        cmocka_unit_test(other_versions_of_the_bias_leave_no_trace),
        cmocka_unit_test(steady_state_takes_no_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
