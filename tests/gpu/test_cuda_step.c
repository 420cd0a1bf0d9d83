/* The step that stays on the device against the device's table, byte for byte: whatever the number
 * of micro-batches and groups, recorded or not, while placements, pages and biases change under a
 * graph; and what becomes of rows whose experts do not answer. */
#include "tests/gpu/step_rig.h"

/* Sequences join and leave from position to position; each row is what it is in the plain form. */
static void compare(const char *directory, bool fp8, struct step_options options,
                    uint32_t sequences, uint32_t positions, bool mixed) {
    struct rig rig;
    rig_open(&rig, directory, fp8, options);
    float *expected = calloc((size_t)RIG_SEQUENCES * rig.vocabulary, sizeof *expected);
    for (uint32_t p = 0; p < positions; p++) {
        gpu_schedule(p + 1);
        rig_plain(&rig, 0, sequences, p, expected);
        const uint32_t alone = mixed && p % 2; /* one by itself, then the others */
        if (alone == 1) {
            rig_step(&rig, 0, 1, p);
            assert_true(rig_same(&rig, 0, expected));
        }
        const struct step_result result = rig_step(&rig, alone, sequences - alone, p);
        for (uint32_t r = 0; r < result.rows; r++) {
            assert_int_equal(result.lost[r], 0);
            if (!rig_same(&rig, r, expected + (size_t)(r + alone) * rig.vocabulary))
                fail_msg("position %u, row %u: other bits than in the plain form", p, r);
        }
    }
    assert_true(options.graphs == (step_graphs(rig.step) > 0));
    free(expected);
    rig_close(&rig);
}

static void test_same_bits_bf16(void **state) {
    (void)state;
    compare(NULL, false, (struct step_options){.rows = 5, .micro = 1, .groups = 1, .graphs = false},
            5, 2, false);
    compare(NULL, false, (struct step_options){.rows = 3, .micro = 2, .groups = 3, .graphs = true},
            5, 4, true);
}
/* Rows to the experts as they are, and in E4M3. */
static void test_same_bits_fp8(void **state) {
    (void)state;
    compare(NULL, true,
            (struct step_options){
                .dispatch = DISPATCH_E4M3, .rows = 3, .micro = 2, .groups = 2, .graphs = true},
            5, 3, true);
    compare(NULL, true, (struct step_options){.rows = 3, .micro = 2, .groups = 2, .graphs = true},
            5, 2, false);
}
/* Latents in E4M3: the bits are those of the table's form of the same profile, which differ from
 * those without. */
static void test_same_bits_fp8_cache(void **state) {
    (void)state;
    compare(NULL, true,
            (struct step_options){
                .cache = CACHE_E4M3, .rows = 3, .micro = 2, .groups = 2, .graphs = true},
            4, 3, true);
}

static void test_fp8_cache_differs_and_is_smaller(void **state) {
    (void)state;
    float *logits[2];
    uint64_t bytes[2];
    struct rig rig;
    for (int e4m3 = 0; e4m3 < 2; e4m3++) {
        rig_open(&rig, NULL, true,
                 (struct step_options){
                     .cache = e4m3 ? CACHE_E4M3 : CACHE_BF16, .rows = 1, .micro = 1, .groups = 1});
        for (uint32_t p = 0; p < 2; p++)
            rig_step(&rig, 0, 1, p);
        logits[e4m3] = malloc(rig.vocabulary * sizeof(float));
        memcpy(logits[e4m3], rig.logits, rig.vocabulary * sizeof(float));
        bytes[e4m3] = step_memory_bytes(rig.step);
        const size_t row = e4m3 ? 0 : 2 * (128 + 32) - (128 + 16 + 2 * 32);
        bytes[e4m3] -= row * PAGE_TOKENS * (RIG_PAGES + 1) * rig.plain.config->layers;
        rig_close(&rig);
    }
    assert_memory_not_equal(logits[0], logits[1], 264 * sizeof(float));
    assert_int_equal(bytes[0], bytes[1]);
    free(logits[0]);
    free(logits[1]);
}

static void test_same_bits_demo(void **state) {
    (void)state;
    compare("models/demo", true,
            (struct step_options){.rows = 5, .micro = 1, .groups = 1, .graphs = true}, 2, 2, false);
}

/* Prompts in pieces of any length, then a generated token, over the end of a page; in the second
 * turn FP8, in the third with an FP8 cache. */
static void test_prompts(void **state) {
    (void)state;
    const uint32_t first[] = {62, 64, 65}, rows[] = {2, 1, 3};
    for (int turn = 0; turn < 3; turn++) {
        struct rig rig;
        rig_open(&rig, NULL, turn > 0,
                 (struct step_options){.cache = turn == 2 ? CACHE_E4M3 : CACHE_BF16,
                                       .rows = 5,
                                       .micro = 1,
                                       .groups = 2,
                                       .prompts = true,
                                       .graphs = true});
        float *expected = calloc((size_t)8 * rig.vocabulary, sizeof *expected);
        struct batch_row plain[6];
        uint32_t select[6];
        for (uint32_t i = 0; i < 6; i++) {
            plain[i] =
                one_process_row(&rig.plain, 0, 62 + i, rig_token(&rig, 0, 62 + i), MLA_EXPANDED);
            select[i] = i;
        }
        one_process_step(&rig.plain, plain, 6, select, 6, expected);
        for (int piece = 0; piece < 3; piece++) {
            struct step_row row[3];
            struct step_result result;
            for (uint32_t i = 0; i < rows[piece]; i++)
                row[i] = (struct step_row){rig_token(&rig, 0, first[piece] + i), first[piece] + i,
                                           rig.pages[0], STEP_NO_BIAS};
            gpu_schedule((uint64_t)piece + 1);
            assert_int_equal(step_prompt(rig.step, row, rows[piece]), 0);
            result = rig_end(&rig);
            for (uint32_t i = 0; i < result.rows; i++)
                assert_true(
                    rig_same(&rig, i, expected + (size_t)(first[piece] - 62 + i) * rig.vocabulary));
        }
        rig_plain(&rig, 0, 1, 68, expected);
        rig_step(&rig, 0, 1, 68);
        assert_true(rig_same(&rig, 0, expected));
        /* rows of two sequences, or out of order, are no prompt */
        struct step_row wrong[2] = {{0, 1, rig.pages[0], STEP_NO_BIAS},
                                    {0, 2, rig.pages[1], STEP_NO_BIAS}};
        assert_int_equal(step_prompt(rig.step, wrong, 2), ERR_INVALID);
        wrong[1] = wrong[0];
        assert_int_equal(step_prompt(rig.step, wrong, 2), ERR_INVALID);
        free(expected);
        rig_close(&rig);
    }
}

/* Positions of two pages: the first page's rows are read through the table. */
static void test_pages_are_data(void **state) {
    (void)state;
    struct rig rig;
    rig_open(&rig, NULL, false,
             (struct step_options){.rows = 5, .micro = 1, .groups = 1, .graphs = true});
    float *first = calloc((size_t)RIG_SEQUENCES * rig.vocabulary, sizeof *first);
    for (uint32_t p = 63; p < 66; p++)
        rig_step(&rig, 0, 2, p);
    memcpy(first, rig.logits, 2 * rig.vocabulary * sizeof *first);
    const uint32_t graphs = step_graphs(rig.step);
    uint32_t all[RIG_PAGES];
    for (uint32_t i = 0; i < RIG_PAGES; i++)
        all[i] = i;
    assert_int_equal(step_clear_pages(rig.step, all, RIG_PAGES), 0);
    for (uint32_t i = 0; i < 2; i++) { /* the same sequences elsewhere */
        const uint32_t page = rig.pages[0][i];
        rig.pages[0][i] = rig.pages[1][1 - i];
        rig.pages[1][1 - i] = page;
    }
    for (uint32_t p = 63; p < 66; p++)
        rig_step(&rig, 0, 2, p);
    assert_int_equal(step_graphs(rig.step), graphs);
    assert_memory_equal(first, rig.logits, 2 * rig.vocabulary * sizeof *first);
    free(first);
    rig_close(&rig);
}

/* A new placement between two replays of one graph: experts in other groups and slots. */
static void test_placement_is_data(void **state) {
    (void)state;
    struct rig rig;
    rig_open(&rig, NULL, false,
             (struct step_options){.rows = 5, .micro = 1, .groups = 2, .slots = 8, .graphs = true});
    const struct model_config *c = rig.plain.config;
    float *expected = calloc((size_t)RIG_SEQUENCES * rig.vocabulary, sizeof *expected);
    for (uint32_t p = 0; p < 3; p++) {
        rig_plain(&rig, 0, RIG_SEQUENCES, p, expected);
        for (uint32_t l = 0; p >= 1 && l < c->layers; l++) /* every step another one */
            for (uint32_t e = 0; model_layer_is_moe(c, l) && e < c->experts; e++) {
                struct expert_weights *weights = NULL;
                struct failure failure;
                const uint32_t group = (e + p + l) / 3 % 2, slot = (e + 3 * p) % 8;
                assert_int_equal(
                    engine_expert_pack(rig.plain.model, rig.kernels, l, e, &weights, &failure), 0);
                assert_int_equal(step_expert_put(rig.step, group, l, slot, weights), 0);
                engine_expert_free(&weights);
                step_hold(rig.step, l, e, 1 - group, STEP_NOWHERE);
                step_place(rig.step, l, e, group, slot);
            }
        rig_step(&rig, 0, RIG_SEQUENCES, p);
        for (uint32_t r = 0; r < RIG_SEQUENCES; r++)
            assert_true(rig_same(&rig, r, expected + (size_t)r * rig.vocabulary));
    }
    assert_int_equal(step_graphs(rig.step), 1);
    free(expected);
    rig_close(&rig);
}

/* Each row has the version of the bias that its request is pinned to. */
static void test_biases_are_data(void **state) {
    (void)state;
    struct rig rig;
    rig_open(
        &rig, NULL, false,
        (struct step_options){.rows = 5, .micro = 1, .groups = 1, .biases = 2, .graphs = true});
    const struct model_config *c = rig.plain.config;
    float *delta = calloc((size_t)c->layers * c->experts, sizeof *delta);
    float *expected = calloc((size_t)RIG_SEQUENCES * rig.vocabulary, sizeof *expected);
    float *without = calloc((size_t)RIG_SEQUENCES * rig.vocabulary, sizeof *without);
    for (uint32_t i = 0; i < c->layers * c->experts; i++)
        delta[i] = i % 3 == 0 ? 0.5f : -0.25f;
    assert_int_equal(step_bias(rig.step, 1, delta), 0);
    rig_plain(&rig, 0, 4, 0, without);
    for (uint32_t s = 0; s < 2; s++)
        one_process_forget(&rig.plain, s);
    rig.plain.bias[0] = rig.plain.bias[1] = delta;
    rig_plain(&rig, 0, 4, 0, expected);
    assert_memory_not_equal(expected, without, 2 * rig.vocabulary * sizeof(float));
    for (uint32_t turn = 0; turn < 3; turn++) {
        struct step_row row[4];
        for (uint32_t i = 0; i < 4; i++)
            row[i] = (struct step_row){rig_token(&rig, i, 0), 0, rig.pages[i],
                                       i < 2 && turn != 1 ? 1 : STEP_NO_BIAS};
        assert_int_equal(step_begin(rig.step, row, 4), 0);
        rig_end(&rig);
        for (uint32_t i = 0; i < 4; i++)
            assert_true(
                rig_same(&rig, i, (turn == 1 ? without : expected) + (size_t)i * rig.vocabulary));
    }
    free(delta), free(expected), free(without);
    rig_close(&rig);
}

/* An expert that its group no longer has: the rows that chose it are lost, in the layer where they
 * did; the others are what they always are. Computed again with a holder, so are the lost ones. */
static void test_lost_rows(void **state) {
    (void)state;
    struct rig rig;
    rig_open(&rig, NULL, false,
             (struct step_options){.rows = 5, .micro = 2, .groups = 2, .graphs = true});
    const struct model_config *c = rig.plain.config;
    float *expected = calloc((size_t)RIG_SEQUENCES * rig.vocabulary, sizeof *expected);
    uint32_t lost = 0, kept = 0;
    for (uint32_t p = 0; p < 4; p++) {
        const uint32_t l = p % 2, e = (5 * p + 3) % c->experts;
        const uint32_t group = e % 2, slot = e / 2;
        rig_plain(&rig, 0, RIG_SEQUENCES, p, expected);
        if (p % 3 == 0)
            step_place(rig.step, l, e, STEP_NOWHERE, 0); /* nobody is asked */
        else
            step_hold(rig.step, l, e, group, STEP_NOWHERE); /* asked, and not held */
        const struct step_result result = rig_step(&rig, 0, RIG_SEQUENCES, p);
        for (uint32_t r = 0; r < RIG_SEQUENCES; r++) {
            bool chose = false;
            for (uint32_t s = 0; s < c->gate.k; s++)
                chose |= result.choice[(l * RIG_SEQUENCES + r) * c->gate.k + s] == e;
            assert_int_equal(result.lost[r], chose ? l + 1 : 0);
            assert_true(chose || rig_same(&rig, r, expected + (size_t)r * rig.vocabulary));
            lost += chose;
            kept += !chose;
        }
        step_place(rig.step, l, e, group, slot);
        const struct step_result again = rig_step(&rig, 0, RIG_SEQUENCES, p);
        for (uint32_t r = 0; r < RIG_SEQUENCES; r++) {
            assert_int_equal(again.lost[r], 0);
            assert_true(rig_same(&rig, r, expected + (size_t)r * rig.vocabulary));
        }
    }
    assert_true(lost > 1 && kept > 1);
    free(expected);
    rig_close(&rig);
}

static void test_refuses_what_is_not_there(void **state) {
    (void)state;
    struct rig rig;
    rig_open(&rig, NULL, false,
             (struct step_options){.rows = 2, .micro = 1, .groups = 1, .graphs = true});
    const uint32_t wrong_page[2] = {RIG_PAGES, 0};
    struct step_row row[3] = {{0, 0, rig.pages[0], STEP_NO_BIAS},
                              {0, 0, rig.pages[1], STEP_NO_BIAS},
                              {0, 0, rig.pages[2], STEP_NO_BIAS}};
    assert_int_equal(step_begin(rig.step, row, 3), ERR_INVALID);
    assert_int_equal(step_begin(rig.step, row, 0), ERR_INVALID);
    row[1].token = rig.vocabulary;
    assert_int_equal(step_begin(rig.step, row, 2), ERR_INVALID);
    row[1] = (struct step_row){0, RIG_POSITIONS, rig.pages[1], STEP_NO_BIAS};
    assert_int_equal(step_begin(rig.step, row, 2), ERR_INVALID);
    row[1] = (struct step_row){0, 0, wrong_page, STEP_NO_BIAS};
    assert_int_equal(step_begin(rig.step, row, 2), ERR_INVALID);
    row[1] = (struct step_row){0, 0, rig.pages[1], 0};
    assert_int_equal(step_begin(rig.step, row, 2), ERR_INVALID);
    row[1].bias = STEP_NO_BIAS;
    assert_int_equal(step_begin(rig.step, row, 2), 0);
    rig_end(&rig);
    struct step *step = NULL;
    struct failure failure = {0};
    rig.options.dispatch = DISPATCH_E4M3; /* to experts in BF16 */
    assert_int_equal(step_open(&step, &rig.weights.model, &rig.options, &failure), ERR_UNSUPPORTED);
    assert_non_null(strstr(failure.text, "E4M3"));
    assert_null(step);
    rig_close(&rig);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_same_bits_bf16),
        cmocka_unit_test(test_same_bits_fp8),
        cmocka_unit_test(test_same_bits_fp8_cache),
        cmocka_unit_test(test_fp8_cache_differs_and_is_smaller),
        cmocka_unit_test(test_same_bits_demo),
        cmocka_unit_test(test_prompts),
        cmocka_unit_test(test_pages_are_data),
        cmocka_unit_test(test_placement_is_data),
        cmocka_unit_test(test_biases_are_data),
        cmocka_unit_test(test_lost_rows),
        cmocka_unit_test(test_refuses_what_is_not_there),
    };
    return cmocka_run_group_tests_name("cuda step", tests, device_name, NULL);
}
