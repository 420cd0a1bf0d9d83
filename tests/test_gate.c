/* The gate against a plain restatement of the papers in double precision, and the cases that decide
 * between readings: ties, negative biased scores under group masks, NaN, top-p. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "actors/limits.h"
#include "router/gate.h"
#include "tests/support/random.h"

#include <cmocka.h> /* last: its macro fail() hides the function of actors/errors.h */

static const struct gate_parameters V3 = {
    .scoring = GATE_SIGMOID,
    .experts = 8,
    .groups = 4,
    .groups_chosen = 2,
    .group_score = GATE_GROUP_TOP2_SUM,
    .k = 3,
    .normalise = true,
    .scaling = 2.5f,
};
static const struct gate_parameters V2_LITE = {
    .scoring = GATE_SOFTMAX,
    .experts = 4,
    .groups = 1,
    .groups_chosen = 1,
    .k = 2,
    .scaling = 1.0f,
};

static void close_to(float found, double expected) {
    if (!(fabs((double)found - expected) <= 2e-6 * (1 + fabs(expected)))) {
        printf("expected %.9g, found %.9g\n", expected, (double)found);
        assert_true(0);
    }
}

static double sigmoid(double x) {
    return 1 / (1 + exp(-x));
}

/* Picks n of `count` by descending score, ties to the lower number, among those with allowed[i]. */
static void pick(const double *score, const int *allowed, uint32_t count, uint32_t n,
                 uint32_t *ret) {
    int *taken = calloc(count, sizeof *taken);
    for (uint32_t i = 0; i < n; i++) {
        uint32_t best = UINT32_MAX;
        for (uint32_t j = 0; j < count; j++)
            if (allowed[j] && !taken[j] && (best == UINT32_MAX || score[j] > score[best]))
                best = j;
        taken[best] = 1;
        ret[i] = best;
    }
    free(taken);
}

/* DeepSeek-V2 eq. 20-22, DeepSeek-V3 eq. 12-16. Returns how close the closest decision was. */
static double plain_gate(const struct gate_parameters *p, const float *logits, const float *bias,
                         uint32_t *ret_expert, double *ret_weight) {
    double score[EXPERTS_MAX], biased[EXPERTS_MAX], sum = 0;
    int allowed[EXPERTS_MAX];
    for (uint32_t e = 0; e < p->experts; e++)
        sum += exp((double)logits[e]);
    for (uint32_t e = 0; e < p->experts; e++) {
        score[e] =
            p->scoring == GATE_SOFTMAX ? exp((double)logits[e]) / sum : sigmoid((double)logits[e]);
        biased[e] = score[e] + (bias ? (double)bias[e] : 0);
        allowed[e] = p->groups == 1;
    }
    double margin = 1;
    if (p->groups > 1) {
        uint32_t size = p->experts / p->groups, chosen[EXPERT_GROUPS_MAX];
        double group[EXPERT_GROUPS_MAX];
        int all[EXPERTS_MAX];
        for (uint32_t e = 0; e < p->experts; e++)
            all[e] = 1;
        for (uint32_t g = 0; g < p->groups; g++) {
            uint32_t two[2];
            pick(biased + g * size, all, size, 2, two);
            group[g] = biased[g * size + two[0]];
            if (p->group_score == GATE_GROUP_TOP2_SUM)
                group[g] += biased[g * size + two[1]];
        }
        pick(group, all, p->groups, p->groups_chosen, chosen);
        for (uint32_t i = 0; i < p->groups_chosen; i++)
            for (uint32_t e = 0; e < size; e++)
                allowed[chosen[i] * size + e] = 1;
        for (uint32_t g = 0; g < p->groups; g++)
            if (!allowed[g * size])
                margin = fmin(margin, group[chosen[p->groups_chosen - 1]] - group[g]);
    }
    pick(biased, allowed, p->experts, p->k, ret_expert);
    double total = 0;
    for (uint32_t i = 0; i < p->k; i++) {
        total += score[ret_expert[i]];
        for (uint32_t e = 0; e < p->experts; e++)
            if (allowed[e] && e != ret_expert[i])
                margin = fmin(margin, fabs(biased[ret_expert[i]] - biased[e]));
    }
    for (uint32_t i = 0; i < p->k; i++)
        ret_weight[i] = score[ret_expert[i]] / (p->normalise ? total : 1) * (double)p->scaling;
    return margin;
}

static void random_rows_follow_the_papers(void **state) {
    (void)state;
    static const struct gate_parameters SHAPES[] = {
        {GATE_SIGMOID, 256, 8, 4, GATE_GROUP_TOP2_SUM, 8, true, 2.5f, 0},   /* V3 */
        {GATE_SIGMOID, 384, 1, 1, GATE_GROUP_TOP2_SUM, 8, true, 2.827f, 0}, /* Kimi-K2 */
        {GATE_SIGMOID, 64, 1, 1, GATE_GROUP_TOP2_SUM, 6, true, 2.446f, 0},  /* Moonlight */
        {GATE_SOFTMAX, 160, 8, 3, GATE_GROUP_MAX, 6, false, 16.0f, 0},      /* V2 */
        {GATE_SOFTMAX, 64, 1, 1, GATE_GROUP_MAX, 6, false, 1.0f, 0},        /* V2-Lite */
        {GATE_SIGMOID, 6, 3, 3, GATE_GROUP_TOP2_SUM, 6, true, 1.0f, 0},     /* everything chosen */
    };
    unsigned compared = 0;
    for (size_t s = 0; s < sizeof SHAPES / sizeof *SHAPES; s++) {
        const struct gate_parameters *p = &SHAPES[s];
        uint64_t random = 20 + s;
        printf("shape %zu, seed %zu\n", s, 20 + s);
        for (int row = 0; row < 200; row++) {
            float logits[EXPERTS_MAX], bias[EXPERTS_MAX], weight[EXPERTS_PER_TOKEN_MAX];
            uint16_t expert[EXPERTS_PER_TOKEN_MAX];
            uint32_t expected[EXPERTS_PER_TOKEN_MAX];
            double expected_weight[EXPERTS_PER_TOKEN_MAX];
            for (uint32_t e = 0; e < p->experts; e++) {
                logits[e] = random_float(&random, -4, 4);
                bias[e] = random_float(&random, -0.9f, 0.3f); /* often negative when added */
            }
            const float *b = p->scoring == GATE_SIGMOID ? bias : NULL;
            if (plain_gate(p, logits, b, expected, expected_weight) < 1e-6)
                continue; /* too close to call in single precision */
            gate_choose(p, logits, b, expert, weight);
            for (uint32_t i = 0; i < p->k; i++) {
                assert_int_equal(expert[i], expected[i]);
                close_to(weight[i], expected_weight[i]);
            }
            compared++;
        }
    }
    printf("%u rows compared\n", compared);
    assert_true(compared > 900);
}

/* Groups 0, 1 and 2 tie behind group 3. */
static void ties_go_to_the_lower_number(void **state) {
    (void)state;
    const float logits[8] = {0, 0, 0, 0, 0, 0, 0.5f, 0.5f};
    uint16_t expert[3];
    float weight[3];
    gate_choose(&V3, logits, NULL, expert, weight);
    assert_int_equal(expert[0], 6);
    assert_int_equal(expert[1], 7);
    assert_int_equal(expert[2], 0); /* group 0 before 1 and 2, expert 0 before 1 */
    double s = sigmoid(0.5), total = 2 * s + 0.5;
    close_to(weight[0], 2.5 * s / total);
    close_to(weight[2], 2.5 * 0.5 / total);
}

/* With every biased score negative a mask of 0.0 would choose experts of groups that lost. */
static void negative_scores_stay_inside_the_chosen_groups(void **state) {
    (void)state;
    const float logits[8] = {0, 0, 1, 1, 2, 2, 3, 3};
    const float bias[8] = {-5, -5, -5, -5, -5, -5, -5, -5};
    uint16_t expert[3];
    float weight[3];
    gate_choose(&V3, logits, bias, expert, weight);
    assert_int_equal(expert[0], 6);
    assert_int_equal(expert[1], 7);
    assert_int_equal(expert[2], 4);
    double total = 2 * sigmoid(3) + sigmoid(2); /* weights do not see the bias */
    close_to(weight[2], 2.5 * sigmoid(2) / total);
}

static void the_bias_decides_the_choice_and_its_order(void **state) {
    (void)state;
    struct gate_parameters p = V2_LITE;
    p.scoring = GATE_SIGMOID;
    const float logits[4] = {3, 2, 1, 0}, bias[4] = {0, 0, 0.5f, 0.6f};
    uint16_t expert[2];
    float weight[2];
    gate_choose(&p, logits, bias, expert, weight);
    assert_int_equal(expert[0], 2); /* 0.731 + 0.5 */
    assert_int_equal(expert[1], 3); /* 0.5 + 0.6 */
    close_to(weight[0], sigmoid(1));
    close_to(weight[1], 0.5);
}

static void broken_logits_still_give_distinct_experts(void **state) {
    (void)state;
    static const float ROWS[][4] = {
        {NAN, NAN, NAN, NAN},
        {-INFINITY, -INFINITY, -INFINITY, -INFINITY},
        {INFINITY, INFINITY, INFINITY, 0},
        {NAN, -INFINITY, INFINITY, 1},
        {3.4e38f, -3.4e38f, 0, NAN},
    };
    static const uint16_t EXPECTED[][2] = {{0, 1}, {0, 1}, {0, 1}, {2, 3}, {0, 1}};
    for (int scoring = GATE_SOFTMAX; scoring <= GATE_SIGMOID; scoring++)
        for (size_t row = 0; row < sizeof ROWS / sizeof *ROWS; row++) {
            struct gate_parameters p = V2_LITE;
            p.scoring = (enum gate_scoring)scoring;
            p.normalise = true;
            uint16_t expert[2];
            float weight[2];
            gate_choose(&p, ROWS[row], NULL, expert, weight);
            assert_int_equal(expert[0], EXPECTED[row][0]);
            assert_true(isfinite(weight[0]) && isfinite(weight[1]) && expert[1] < 4);
            assert_true(expert[0] != expert[1]);
        }
    /* a NaN bias shuts its expert out as well */
    const float logits[4] = {9, 0, 0, 0}, bias[4] = {NAN, 0, 0, 0};
    uint16_t expert[2];
    float weight[2];
    gate_choose(&V2_LITE, logits, bias, expert, weight);
    assert_int_equal(expert[0], 1);
    assert_int_equal(expert[1], 2);
}

static void top_p_keeps_experts_until_their_mass_is_reached(void **state) {
    (void)state;
    struct gate_parameters p = V2_LITE;
    p.k = 3;
    /* probabilities 0.1, 0.5, 0.15, 0.25 */
    float logits[4] = {logf(0.1f), logf(0.5f), logf(0.15f), logf(0.25f)};
    static const struct {
        float top_p;
        uint32_t kept;
    } CASES[] = {{0, 3},     {0.4f, 1}, {0.49f, 1}, {0.6f, 2},
                 {0.74f, 2}, {0.8f, 3}, {0.99f, 3}, {1, 3}};
    static const uint16_t ORDER[] = {1, 3, 2};
    static const double PROBABILITY[] = {0.5, 0.25, 0.15};
    for (int normalise = 0; normalise < 2; normalise++)
        for (size_t c = 0; c < sizeof CASES / sizeof *CASES; c++) {
            p.top_p = CASES[c].top_p;
            p.normalise = normalise;
            uint16_t expert[3];
            float weight[3];
            gate_choose(&p, logits, NULL, expert, weight);
            double total = 0;
            for (uint32_t i = 0; i < CASES[c].kept; i++)
                total += PROBABILITY[i];
            for (uint32_t i = 0; i < 3; i++) {
                int used = i < CASES[c].kept;
                assert_int_equal(expert[i], used ? ORDER[i] : GATE_UNUSED);
                close_to(weight[i], used ? PROBABILITY[i] / (normalise ? total : 1) : 0);
            }
        }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(random_rows_follow_the_papers),
        cmocka_unit_test(ties_go_to_the_lower_number),
        cmocka_unit_test(negative_scores_stay_inside_the_chosen_groups),
        cmocka_unit_test(the_bias_decides_the_choice_and_its_order),
        cmocka_unit_test(broken_logits_still_give_distinct_experts),
        cmocka_unit_test(top_p_keeps_experts_until_their_mass_is_reached),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
