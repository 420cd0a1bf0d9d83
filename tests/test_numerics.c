/* The numerics contract: conversions against their definition, functions against libm in double
 * precision over their whole range, scalar against vector form bit for bit, and the rotary tables.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "kernels/ops.h"
#include "tests/support/exp_avx512.h"
#include "tests/support/random.h"

#include <cmocka.h> /* after errors.h: it defines a macro named fail */

enum { SEED = 7 };

static float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* Of the BF16 numbers on both sides of x, the nearer, in a tie the even one. */
static uint32_t bf16_nearest(float x) {
    const uint32_t sign = to_bits(x) >> 16 & 0x8000, below = to_bits(x) >> 16 & 0x7fff;
    if (isinf(x))
        return sign | below;
    /* Above the largest comes 2^128. */
    const double low = from_bits(below << 16);
    const double high = below == 0x7f7f ? 0x1p128 : from_bits((below + 1) << 16);
    const double down = fabs((double)x) - low, up = high - fabs((double)x);
    return sign | (below + (up < down || (up == down && below % 2 == 1)));
}

static void test_bf16(void **state) {
    for (uint32_t i = 0; i < 0x10000; i++) {
        assert_int_equal(to_bits(bf16_to_float((bf16)i)), i << 16);
        const uint32_t exponent = i >> 7 & 0xff, mantissa = i & 0x7f;
        uint32_t expected = i;
        if (exponent == 0)
            expected = i & 0x8000;
        if (exponent == 0xff && mantissa != 0)
            expected = i | 0x40;
        assert_int_equal(bf16_from_float(from_bits(i << 16)), expected);
    }
    uint64_t random = SEED;
    for (uint32_t i = 0; i < 2000000; i++) {
        uint32_t bits = (uint32_t)random_next(&random);
        if (i % 4 == 0)
            bits = (bits & 0xffff0000) | 0x8000; /* ties */
        const float x = from_bits(bits);
        if (!isnan(x) && (bits & 0x7f800000) != 0)
            assert_int_equal(bf16_from_float(x), bf16_nearest(x));
    }
    assert_int_equal(bf16_from_float(from_bits(0x7f800001)), 0x7fc0); /* not infinity */
    assert_int_equal(bf16_from_float(from_bits(0x807fffff)), 0x8000);
}

static double e4m3_value(uint32_t code) {
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    const double value = exponent ? ldexp(8 + mantissa, exponent - 10) : ldexp(mantissa, -9);
    return code & 0x80 ? -value : value;
}

static void test_e4m3(void **state) {
    for (uint32_t code = 0; code < 256; code++) {
        if ((code & 0x7f) == 0x7f) {
            assert_true(isnan(e4m3_to_float((uint8_t)code)));
            assert_true(isnan(bf16_to_float(e4m3_to_bf16((uint8_t)code))));
            continue;
        }
        assert_true(e4m3_to_float((uint8_t)code) == (float)e4m3_value(code));
        assert_int_equal(signbit(e4m3_to_float((uint8_t)code)) != 0, code >> 7);
        assert_true(bf16_to_float(e4m3_to_bf16((uint8_t)code)) == (float)e4m3_value(code));
        assert_int_equal(e4m3_from_float((float)e4m3_value(code)), code);
        if ((code & 0x7f) < 0x7e) { /* between neighbours: the nearer; in the middle: the even */
            const float low = (float)e4m3_value(code), high = (float)e4m3_value(code + 1);
            const float middle = 0.5f * (low + high);
            assert_int_equal(e4m3_from_float(middle), code + code % 2);
            assert_int_equal(e4m3_from_float(nextafterf(middle, low)), code);
            assert_int_equal(e4m3_from_float(nextafterf(middle, high)), code + 1);
        }
    }
    assert_int_equal(e4m3_from_float(1e30f), 0x7e);
    assert_int_equal(e4m3_from_float(-INFINITY), 0xfe);
    assert_int_equal(e4m3_from_float(NAN) & 0x7f, 0x7f);
}

/* |got - want| in units of the last place of want, 24 bits. */
static double ulps(float got, double want) {
    int exponent;
    frexp(want, &exponent);
    return fabs(got - want) / ldexp(1, exponent - 24);
}

/* A row at a time gives the bits of one at a time, whole runs and the rest alike. */
static void test_exp_row(void **state) {
    (void)state;
    enum { COUNT = 3 * 32 + 5 };
    float x[COUNT], got[COUNT];
    for (uint64_t first = 0; first < UINT64_C(1) << 32; first += COUNT * UINT64_C(40009)) {
        for (uint32_t i = 0; i < COUNT; i++)
            x[i] = from_bits((uint32_t)(first + i * UINT64_C(40009)));
        exp_canonical_row(x, COUNT, got);
        for (uint32_t i = 0; i < COUNT; i++) {
            const float want = exp_canonical(x[i]);
            assert_true(memcmp(&got[i], &want, sizeof want) == 0 || (isnan(got[i]) && isnan(want)));
        }
    }
}

static void test_exp(void **state) {
    double worst = 0;
    for (uint32_t sign = 0; sign < 2; sign++) {
        for (uint32_t bits = 0; bits < 0x42d00000; bits += 499) { /* to 104 */
            const float x = from_bits(bits | sign << 31), got = exp_canonical(x);
            const double want = exp((double)x);
            if (want > 0x1.fffffep127)
                assert_true(got > 0x1.fffff0p127f);
            else if (want < 0x1.00001p-126)
                assert_true(got <= 0x1.00001p-126f);
            else
                worst = fmax(worst, ulps(got, want));
        }
    }
    printf("exp: largest error %.3f ulp\n", worst);
    assert_true(worst <= 1.0);
    assert_true(exp_canonical(-INFINITY) == 0 && exp_canonical(INFINITY) == INFINITY);
    assert_true(exp_canonical(0) == 1 && exp_canonical(-0.0f) == 1);
    assert_true(exp_canonical(-87.4f) == 0 && exp_canonical(88.8f) == INFINITY);
    assert_true(isnan(exp_canonical(NAN)));
    /* Results are normal or zero. */
    assert_true(exp_canonical(-87.33654f) >= 0x1p-126f);
    assert_true(exp_canonical(nextafterf(-87.33654f, -INFINITY)) == 0);
}

static void test_exp_vector_has_the_same_bits(void **state) {
#if defined(__x86_64__)
    if (!isa_available(ISA_AVX512))
        skip();
    for (uint64_t bits = 0; bits < UINT64_C(0x100000000); bits += 16 * 251) {
        float x[16], got[16], nonpositive[16];
        for (uint32_t i = 0; i < 16; i++)
            x[i] = from_bits((uint32_t)bits + 251 * i);
        exp_vector_avx512(x, got);
        exp_nonpositive_vector_avx512(x, nonpositive);
        for (uint32_t i = 0; i < 16; i++) {
            if (isnan(x[i]))
                continue;
            const uint32_t expected = to_bits(exp_canonical(x[i]));
            assert_int_equal(expected, to_bits(got[i]));
            if (x[i] <= 0)
                assert_int_equal(expected, to_bits(nonpositive[i]));
        }
    }
#else
    skip();
#endif
}

static void test_log(void **state) {
    double worst = 0;
    for (uint32_t bits = 0x00800000; bits < 0x7f800000; bits += 499) {
        const float x = from_bits(bits);
        worst = fmax(worst, ulps(log_canonical(x), log((double)x)));
    }
    for (uint32_t bits = 0x3f700000; bits < 0x3f880000; bits++) /* around 1 */
        if (bits != 0x3f800000)
            worst = fmax(worst, ulps(log_canonical(from_bits(bits)), log(from_bits(bits))));
    printf("log: largest error %.3f ulp\n", worst);
    assert_true(worst <= 0.9);
    assert_true(log_canonical(1) == 0);
}

static void test_rsqrt_and_sigmoid(void **state) {
    double worst_rsqrt = 0, worst_sigmoid = 0;
    uint64_t random = SEED;
    for (int i = 0; i < 1000000; i++) {
        const float x = from_bits(0x00800000 + random_below(&random, 0x7f000000));
        worst_rsqrt = fmax(worst_rsqrt, ulps(rsqrt_canonical(x), 1 / sqrt((double)x)));
        const float y = random_float(&random, -80, 80);
        worst_sigmoid = fmax(worst_sigmoid, ulps(sigmoid_canonical(y), 1 / (1 + exp(-(double)y))));
    }
    printf("rsqrt: largest error %.3f ulp, sigmoid: %.3f ulp\n", worst_rsqrt, worst_sigmoid);
    assert_true(worst_rsqrt <= 1.5 && worst_sigmoid <= 3);
    assert_true(sigmoid_canonical(-1000) == 0 && sigmoid_canonical(1000) == 1);
}

static void test_sum_is_16_partials_and_a_tree(void **state) {
    uint64_t random = SEED;
    float x[131];
    for (uint32_t n = 0; n <= 131; n++) {
        volatile float partial[16] = {0}; /* volatile: one addition after the other */
        for (uint32_t i = 0; i < n; i++) {
            x[i] = random_float(&random, -1, 1);
            partial[i % 16] = partial[i % 16] + x[i];
        }
        for (int apart = 8; apart > 0; apart /= 2)
            for (int i = 0; i < apart; i++)
                partial[i] = partial[i] + partial[i + apart];
        assert_int_equal(to_bits(sum_canonical(x, n)), to_bits(partial[0]));
    }
}

static void test_double_functions(void **state) {
    uint64_t random = SEED;
    double worst = 0;
    for (int i = 0; i < 200000; i++) {
        const double unit = (double)(random_next(&random) >> 11) * 0x1p-53;
        const double angle = unit * (i % 2 ? 1048576 : 10) * (i % 3 ? 1 : -1);
        worst = fmax(worst, fabs(sin_table(angle) - sin(angle)));
        worst = fmax(worst, fabs(cos_table(angle) - cos(angle)));
        const double x = ldexp(unit + 0x1p-53, i % 100 - 50);
        assert_true(fabs(log_table(x) - log(x)) <= 4e-16 * fmax(1, fabs(log(x))));
        const double base = 1 + unit * 1e6, exponent = unit * 2 - 1;
        assert_true(fabs(pow_table(base, exponent) / pow(base, exponent) - 1) < 8e-15);
    }
    printf("sin, cos: largest error %.2g\n", worst);
    assert_true(worst <= 5e-16);
    assert_true(sin_table(0) == 0 && cos_table(0) == 1 && log_table(1) == 0);
}

/* Frequencies and factors as _compute_yarn_parameters of Hugging Face transformers gives them. */
static void test_rope_tables(void **state) {
    static const struct {
        struct rope_parameters parameters;
        uint32_t rope;
        double factor, softmax;
        struct {
            uint32_t pair;
            double frequency;
        } expected[4];
    } cases[] = {
        /* DeepSeek-V3; a small V2; mscale_all_dim absent; both set and different, betas absent;
           plain. */
        {{10000, 40, 4096, 32, 1, 1, 1},
         64,
         1,
         1.8738542070926265,
         {{0, 1},
          {12, 0.026879360111431223},
          {17, 0.0035619974943291656},
          {31, 3.3338035804083101e-06}}},
        {{10000, 40, 32, 32, 1, 0.707, 0.707},
         16,
         1,
         1.5896261651208736,
         {{0, 1},
          {2, 0.0025000000000000001},
          {5, 7.9056941504209485e-05},
          {7, 7.9056941504209471e-06}}},
        {{50000, 32, 4096, 32, 1, 1, 0},
         64,
         1.3465735902799727,
         1,
         {{0, 1},
          {12, 0.01170923094929969},
          {17, 0.00087202765856265096},
          {31, 8.764412911589875e-07}}},
        {{10000, 40, 4096, 0, 0, 0.707, 1},
         64,
         0.92104235531633993,
         1.8738542070926265,
         {{0, 1},
          {12, 0.026879360111431223},
          {17, 0.0035619974943291656},
          {31, 3.3338035804083101e-06}}},
        {{50000, 0, 0, 0, 0, 0, 0},
         32,
         1,
         1,
         {{0, 1}, {2, 0.25860013630631018}, {5, 0.0340072781554661}, {15, 3.9329246046639764e-05}}},
    };
    float table[3 * 64];
    for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++) {
        const uint32_t first[] = {0, 163837}, pairs = cases[c].rope / 2;
        for (size_t f = 0; f < 2; f++) {
            rope_table(&cases[c].parameters, cases[c].rope, first[f], 3, table);
            for (uint32_t i = 0; i < 12; i++) {
                const double frequency = cases[c].expected[i % 4].frequency;
                const double angle = frequency * (first[f] + i / 4);
                const float *entry = table + (i / 4 * pairs + cases[c].expected[i % 4].pair) * 2;
                assert_true(fabs(entry[0] - cases[c].factor * cos(angle)) < 1.5e-7);
                assert_true(fabs(entry[1] - cases[c].factor * sin(angle)) < 1.5e-7);
            }
        }
        assert_true(fabs(rope_softmax_factor(&cases[c].parameters) - cases[c].softmax) < 1e-14);
    }
}

/* The E4M3 form of a latent: every magnitude that BF16 has gets the smallest power of two that keeps
 * it at 448 or below, values come back to the nearest E4M3 exactly, and again from what came back. */
static void test_latent(void **state) {
    for (uint32_t bits = 0; bits < 0x7f80; bits++) {
        const float most = bf16_to_float((bf16)bits), scale = latent_scale(most);
        int exponent;
        assert_true(frexpf(scale, &exponent) == 0.5f);
        exponent--;
        assert_in_range(exponent + 108, 0, 108 + 119);
        assert_true((double)most / ldexp(1, exponent) <= 448 || exponent == 119);
        assert_true(exponent == -108 || (double)most / ldexp(1, exponent - 1) > 448);
    }
    assert_true(latent_scale(INFINITY) == 0x1p119f);
    uint64_t random = SEED;
    for (int trial = 0; trial < 300; trial++) {
        enum { N = 300 };
        bf16 latent[N], back[N];
        uint8_t quantised[384];
        float scale[3];
        const float size = ldexpf(1, (int)random_below(&random, 60) - 30);
        for (int i = 0; i < N; i++)
            latent[i] = bf16_from_float(random_float(&random, -size, size));
        if (trial % 3 == 0)
            memset(latent + 128, 0, 128 * sizeof *latent);
        latent_quantise(latent, N, quantised, scale);
        latent_widen(quantised, scale, N, back);
        for (int i = 0; i < N; i++) {
            const double x = (double)bf16_to_float(latent[i]), s = (double)scale[i / 128];
            const double step = fmax(ldexp(1, ilogb(fabs(x) + 1e-300) - 3), s * 0x1p-9);
            assert_true((double)bf16_to_float(back[i]) == e4m3_value(quantised[i]) * s);
            assert_true(fabs((double)bf16_to_float(back[i]) - x) <= step / 2);
        }
        for (int i = N; i < 384; i++)
            assert_int_equal(quantised[i], 0);
        memcpy(latent, back, sizeof back);
        latent_round(latent, N);
        assert_memory_equal(latent, back, sizeof back);
    }
    assert_int_equal(latent_row_bytes(512, 64), 656); /* FlashMLA's */
    assert_int_equal(latent_rope_at(512), 528);
    assert_int_equal(latent_row_bytes(128, 32), 208);
    assert_int_equal(latent_row_bytes(40, 10), 208);
}

int main(void) {
    numerics_enter();
    numerics_enter();
    printf("seed %d\n", SEED);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bf16),
        cmocka_unit_test(test_e4m3),
        cmocka_unit_test(test_latent),
        cmocka_unit_test(test_exp),
        cmocka_unit_test(test_exp_row),
        cmocka_unit_test(test_exp_vector_has_the_same_bits),
        cmocka_unit_test(test_log),
        cmocka_unit_test(test_rsqrt_and_sigmoid),
        cmocka_unit_test(test_sum_is_16_partials_and_a_tree),
        cmocka_unit_test(test_double_functions),
        cmocka_unit_test(test_rope_tables),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
