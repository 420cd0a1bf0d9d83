/* Combine against its definition, element by element, on odd widths, unused slots and padded
 * strides. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "router/combine.h"
#include "router/gate.h"
#include "tests/support/random.h"

#include <cmocka.h> /* last: its macro fail() hides the function of actors/errors.h */

struct shape {
    uint32_t rows, k, hidden;
    size_t stride;
    int with_shared;
};

static void check_shape(const struct shape *s, uint64_t seed) {
    uint64_t random = seed;
    size_t n = (size_t)s->rows * s->k;
    float *outputs = calloc(n * s->stride + 1, sizeof *outputs);
    float *shared = calloc(s->rows * s->stride + 1, sizeof *shared);
    float *residual = calloc(s->rows * s->stride + 1, sizeof *residual);
    float *expected = calloc(s->rows * s->stride + 1, sizeof *expected);
    float *weights = calloc(n + 1, sizeof *weights);
    uint16_t *experts = calloc(n + 1, sizeof *experts);
    for (size_t i = 0; i < n * s->stride; i++)
        outputs[i] = random_float(&random, -3, 3);
    for (size_t i = 0; i < s->rows * s->stride; i++) {
        shared[i] = random_float(&random, -3, 3);
        expected[i] = residual[i] = random_float(&random, -9, 9);
    }
    for (size_t i = 0; i < n; i++) {
        weights[i] = random_float(&random, 0, 1);
        experts[i] = random_below(&random, 4) == 0 ? GATE_UNUSED : (uint16_t)i;
        if (experts[i] == GATE_UNUSED) /* must not be read */
            for (uint32_t j = 0; j < s->hidden; j++)
                outputs[i * s->stride + j] = NAN;
    }
    for (uint32_t r = 0; r < s->rows; r++)
        for (uint32_t j = 0; j < s->hidden; j++) {
            float sum = 0;
            for (uint32_t slot = 0; slot < s->k; slot++) {
                size_t entry = (size_t)r * s->k + slot;
                if (experts[entry] != GATE_UNUSED)
                    sum = fmaf(weights[entry], outputs[entry * s->stride + j], sum);
            }
            if (s->with_shared)
                sum = sum + shared[r * s->stride + j];
            expected[r * s->stride + j] += sum;
        }
    combine_rows(s->rows, s->k, s->hidden, outputs, s->stride, weights, experts,
                 s->with_shared ? shared : NULL, residual, s->stride);
    assert_memory_equal(residual, expected, s->rows * s->stride * sizeof *residual);
    free(outputs), free(shared), free(residual), free(expected), free(weights), free(experts);
}

static void combine_equals_its_definition(void **state) {
    (void)state;
    static const struct shape SHAPES[] = {
        {0, 4, 64, 64, 1},    {1, 1, 1, 1, 0},       {3, 4, 63, 64, 1},
        {5, 8, 64, 96, 0},    {2, 6, 65, 96, 1},     {7, 8, 200, 224, 1},
        {4, 32, 129, 160, 0}, {2, 2, 7168, 7168, 1}, {9, 3, 31, 32, 1},
    };
    for (size_t i = 0; i < sizeof SHAPES / sizeof *SHAPES; i++) {
        printf("shape %zu, seed %zu\n", i, 100 + i);
        check_shape(&SHAPES[i], 100 + i);
    }
}

/* (1 + 2^-12)^2 - 1 needs the low bit of the product: lost unless multiply and add are one
 * operation. */
static void combine_fuses_multiply_and_add(void **state) {
    (void)state;
    float outputs[2 * 64], weights[2] = {1.0f, 1.0f + 0x1p-12f}, residual[64] = {0};
    uint16_t experts[2] = {0, 1};
    for (int j = 0; j < 64; j++) {
        outputs[j] = -1.0f;
        outputs[64 + j] = 1.0f + 0x1p-12f;
    }
    combine_rows(1, 2, 64, outputs, 64, weights, experts, NULL, residual, 64);
    for (int j = 0; j < 64; j++)
        assert_true(residual[j] == 0x1p-11f + 0x1p-24f);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(combine_equals_its_definition),
        cmocka_unit_test(combine_fuses_multiply_and_add),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
