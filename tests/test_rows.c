/* Operations on rows: the f32 form against double precision, every bf16 form against the f32
 * operations and a rounding, bit for bit, on odd widths; what lies beside the rows stays as it is.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/ops.h"
#include "tests/support/random.h"

#include <cmocka.h> /* after errors.h: it defines a macro named fail */

enum { SEED = 11, ROWS = 3, WIDTH_MAX = 300, STRIDE = 384, RUBBISH = 0x5a };

/* Room for ROWS rows and a margin, in floats or BF16. */
struct buffer {
    _Alignas(64) unsigned char bytes[(ROWS + 1) * STRIDE * sizeof(float)];
};

static float x[(ROWS + 1) * STRIDE], y[(ROWS + 1) * STRIDE], weight[STRIDE];
static struct buffer f32_result, result, expected;

static const struct kernels *forms[3];
static size_t form_count;

static const struct kernels *f32(void) {
    struct failure failure;
    return kernels_select(PROFILE_F32, ISA_SCALAR, &failure);
}

static int find_forms(void **state) {
    struct failure failure;
    for (enum isa isa = ISA_SCALAR; isa <= ISA_AMX; isa++) {
        forms[form_count] = kernels_select(PROFILE_BF16, isa, &failure);
        form_count += forms[form_count] != NULL;
    }
    return form_count == 0;
}

static void fill(uint64_t *random, float *values, size_t n, float scale) {
    for (size_t i = 0; i < n; i++)
        values[i] = random_float(random, -scale, scale);
}

/* What a producer of activations must leave: the f32 result rounded, zeros to the next multiple of
 * 32, rubbish beyond. */
static void expect_rounded(uint32_t n) {
    memset(expected.bytes, RUBBISH, sizeof expected.bytes);
    for (uint32_t r = 0; r < ROWS; r++) {
        bf16 *to = (bf16 *)expected.bytes + r * STRIDE;
        for (uint32_t i = 0; i < activation_stride(n); i++)
            to[i] = i < n ? bf16_from_float(((float *)f32_result.bytes)[r * STRIDE + i]) : 0;
    }
}

static void check(const struct kernels *k, const char *operation, uint32_t n) {
    if (memcmp(expected.bytes, result.bytes, sizeof expected.bytes) != 0)
        fail_msg("%s %s differs at width %u, seed %d", k->name, operation, n, SEED);
    memset(result.bytes, RUBBISH, sizeof result.bytes);
}

typedef void produce_function(const struct kernels *k, uint32_t n, void *ret);

static void produce_norm(const struct kernels *k, uint32_t n, void *ret) {
    k->rms_norm(x, STRIDE, weight, 1e-6f, ROWS, n, ret, STRIDE);
}
static void produce_converted(const struct kernels *k, uint32_t n, void *ret) {
    k->convert(x, STRIDE, ROWS, n, ret, STRIDE);
}
static void produce_silu(const struct kernels *k, uint32_t n, void *ret) {
    k->silu_mul(x, y, STRIDE, ROWS, n, ret, STRIDE);
}

static void test_producers_of_activations(void **state) {
    static const struct {
        const char *name;
        produce_function *run;
        float scale;
    } producers[] = {{"rms_norm", produce_norm, 2},
                     {"rms_norm", produce_norm, 1e-4f},
                     {"convert", produce_converted, 9},
                     {"silu_mul", produce_silu, 8},
                     {"silu_mul", produce_silu, 120}};
    uint64_t random = SEED;
    memset(result.bytes, RUBBISH, sizeof result.bytes);
    for (size_t p = 0; p < sizeof producers / sizeof producers[0]; p++) {
        for (uint32_t n = 1; n <= WIDTH_MAX; n += n < 70 ? 1 : 23) {
            fill(&random, x, STRIDE * ROWS, producers[p].scale);
            fill(&random, y, STRIDE * ROWS, 3);
            fill(&random, weight, STRIDE, 2);
            producers[p].run(f32(), n, f32_result.bytes);
            expect_rounded(n);
            for (size_t f = 0; f < form_count; f++) {
                producers[p].run(forms[f], n, result.bytes);
                check(forms[f], producers[p].name, n);
            }
        }
    }
}

static void test_special_values(void **state) {
    static const float specials[] = {0.0f,      -0.0f,     1e-40f,     -1e-40f,        INFINITY,
                                     -INFINITY, 3.4e38f,   -3.4e38f,   1.1754942e-38f, 1.18e-38f,
                                     -88.9f,    -87.3365f, 1.0039063f, 1.01171875f};
    for (uint32_t i = 0; i < ROWS * STRIDE; i++) {
        x[i] = specials[i % 14];
        y[i] = specials[i / 14 % 4 + 10];
    }
    produce_function *const producers[] = {produce_converted, produce_silu};
    memset(result.bytes, RUBBISH, sizeof result.bytes);
    for (size_t p = 0; p < 2; p++) {
        producers[p](f32(), 200, f32_result.bytes);
        expect_rounded(200);
        for (size_t f = 0; f < form_count; f++) {
            producers[p](forms[f], 200, result.bytes);
            for (uint32_t i = 0; i < ROWS * STRIDE; i++) { /* NaN: any */
                bf16 *got = (bf16 *)result.bytes + i, *want = (bf16 *)expected.bytes + i;
                if (isnan(bf16_to_float(*got)) && isnan(bf16_to_float(*want)))
                    *got = *want;
            }
            check(forms[f], p ? "silu_mul" : "convert", 200);
        }
    }
}

static void test_f32_against_double(void **state) {
    uint64_t random = SEED;
    for (uint32_t n = 1; n <= WIDTH_MAX; n += 13) {
        fill(&random, x, STRIDE * ROWS, 4);
        fill(&random, y, STRIDE * ROWS, 3);
        fill(&random, weight, STRIDE, 2);
        const float *got = (const float *)f32_result.bytes;
        f32()->rms_norm(x, STRIDE, weight, 1e-6f, ROWS, n, f32_result.bytes, STRIDE);
        for (uint32_t r = 0; r < ROWS; r++) {
            double square = 0;
            for (uint32_t i = 0; i < n; i++)
                square += (double)x[r * STRIDE + i] * x[r * STRIDE + i];
            for (uint32_t i = 0; i < activation_stride(n); i++) {
                double want = i < n ? x[r * STRIDE + i] / sqrt(square / n + 1e-6) * weight[i] : 0;
                assert_true(fabs(got[r * STRIDE + i] - want) <= 1e-6 * fabs(want));
            }
        }
        f32()->silu_mul(x, y, STRIDE, ROWS, n, f32_result.bytes, STRIDE);
        for (uint32_t i = 0; i < n; i++) {
            double want = x[i] / (1 + exp(-(double)x[i])) * y[i];
            assert_true(fabs(got[i] - want) <= 1e-6 * fabs(want));
        }
    }
}

/* add, widen and rope keep floats: the same bits in every table. */
static void test_operations_on_floats(void **state) {
    uint64_t random = SEED;
    static float before[(ROWS + 1) * STRIDE], angles[STRIDE];
    for (uint32_t n = 2; n <= 130; n += 2) {
        fill(&random, before, STRIDE * (ROWS + 1), 4);
        fill(&random, y, STRIDE * (ROWS + 1), 3);
        fill(&random, angles, STRIDE, 1);
        for (size_t f = 0; f < form_count; f++) {
            memcpy(x, before, sizeof x);
            forms[f]->add(x, STRIDE, y, STRIDE, ROWS, n - 1);
            for (uint32_t i = 0; i < STRIDE * (ROWS + 1); i++) {
                bool inside = i / STRIDE < ROWS && i % STRIDE < n - 1;
                assert_true(x[i] == (inside ? before[i] + y[i] : before[i]));
            }
            memcpy(x, before, sizeof x);
            forms[f]->rope(x, STRIDE, ROWS, n, angles);
            for (uint32_t i = 0; i < STRIDE * (ROWS + 1); i++) {
                const uint32_t at = i % STRIDE;
                volatile float first = before[i] * angles[at - at % 2];
                volatile float second = before[i ^ 1] * angles[at - at % 2 + 1];
                float want = at % 2 ? first + second : first - second;
                bool inside = i / STRIDE < ROWS && at < n;
                assert_true(x[i] == (inside ? want : before[i]));
            }
            const bf16 *from = (const bf16 *)y; /* any bits */
            memcpy(x, before, sizeof x);
            forms[f]->widen(from, STRIDE, ROWS, n - 1, x, STRIDE);
            for (uint32_t i = 0; i < STRIDE * (ROWS + 1); i++) {
                bool inside = i / STRIDE < ROWS && i % STRIDE < n - 1;
                float want = inside ? bf16_to_float(from[i]) : before[i];
                assert_memory_equal(&x[i], &want, sizeof want);
            }
        }
    }
}

static void test_selection(void **state) {
    struct failure failure = {0};
    const struct kernels *best = kernels_select(PROFILE_BF16, ISA_BEST, &failure);
    assert_ptr_equal(best, forms[form_count - 1]);
    assert_string_equal(f32()->name, "f32 scalar");
    for (enum isa isa = ISA_SCALAR; isa <= ISA_AMX; isa++) {
        const struct kernels *k = kernels_select(PROFILE_BF16, isa, &failure);
        if (isa_available(isa))
            assert_true(k->isa == isa && k->activation_bytes == 2);
        else {
            assert_null(k);
            assert_int_equal(failure.code, ERR_UNSUPPORTED);
            assert_non_null(strstr(failure.text, isa_name(isa)));
        }
    }
    assert_int_equal(activation_stride(33), 64);
    assert_int_equal(cache_stride(40, 10), 96);
}

int main(void) {
    numerics_enter();
    printf("seed %d\n", SEED);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_producers_of_activations),
        cmocka_unit_test(test_special_values),
        cmocka_unit_test(test_f32_against_double),
        cmocka_unit_test(test_operations_on_floats),
        cmocka_unit_test(test_selection),
    };
    return cmocka_run_group_tests(tests, find_forms, NULL);
}
