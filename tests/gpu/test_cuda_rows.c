/* The row operations on the device against the CPU's scalar bf16 forms, bit for bit: odd widths,
 * zero rows, strides wider than rows, and one row alone against the same row in a batch. */
#include "tests/gpu/compare.h"

static uint64_t random_state = 20260101;

struct shape {
    uint32_t rows, n, x_stride, ret_stride;
};
static const struct shape SHAPES[] = {
    {1, 1, 1, 32},         {3, 31, 33, 32},    {2, 32, 32, 64},
    {0, 64, 64, 64},       {5, 257, 300, 320}, {1, 1000, 1000, 1024},
    {2, 7168, 7168, 7168}, {66000, 3, 3, 32}, /* more than a grid's rows */
};
enum { SHAPE_COUNT = sizeof SHAPES / sizeof *SHAPES, FEW_ROWS = SHAPE_COUNT - 1 };

static size_t at_least_1(size_t n) {
    return n > 0 ? n : 1;
}

static void test_rms_norm(void **state) {
    for (int s = 0; s < FEW_ROWS; s++) {
        const struct shape *shape = &SHAPES[s];
        const uint32_t rows = shape->rows;
        struct array x = array_make(at_least_1((size_t)rows * shape->x_stride) * 4);
        struct array y = array_make(x.bytes);
        struct array weight = array_make(shape->n * 4);
        struct array ret = array_make(at_least_1((size_t)rows * shape->ret_stride) * 2);
        fill_floats(&x, &random_state, -3, 3);
        fill_floats(&y, &random_state, -3, 3);
        fill_floats(&weight, &random_state, 0, 2);
        for (int added = 0; added < 2; added++) {
            float *sum = malloc(x.bytes);
            uint8_t *expected = malloc(ret.bytes);
            memcpy(sum, x.host, x.bytes);
            memset(expected, 0x11, ret.bytes);
            if (added)
                add_scalar(sum, shape->x_stride, (const float *)y.host, shape->x_stride, rows,
                           shape->n);
            rms_norm_bf16_scalar(sum, shape->x_stride, (const float *)weight.host, 1e-6f, rows,
                                 shape->n, expected, shape->ret_stride);
            fill_bytes(&ret, 0x11);
            gpu_schedule((uint64_t)s);
            array_put(&x), array_put(&y), array_put(&weight), array_put(&ret);
            if (added)
                assert_int_equal(add_rms_norm_cuda(NULL, array_device(&x), shape->x_stride,
                                                   array_device(&y), shape->x_stride,
                                                   array_device(&weight), 1e-6f, rows, shape->n,
                                                   array_device(&ret), shape->ret_stride),
                                 0);
            else
                assert_int_equal(rms_norm_cuda(NULL, array_device(&x), shape->x_stride,
                                               array_device(&weight), 1e-6f, rows, shape->n,
                                               array_device(&ret), shape->ret_stride),
                                 0);
            array_get(&ret), array_get(&x);
            assert_same(&ret, expected, "norm");
            assert_same(&x, sum, "sum");
            free(sum), free(expected);
        }
        array_free(&x), array_free(&y), array_free(&weight), array_free(&ret);
    }
}

/* Values that BF16 rounds in every way there is. */
static void fill_difficult(struct array *x) {
    static const uint32_t bits[] = {0x00000000, 0x80000000, 0x00000001, 0x807fffff, 0x00800000,
                                    0x3f808000, 0x3f818000, 0x3f807fff, 0x7f7fffff, 0x7f800000,
                                    0xff800000, 0x7fc00001, 0xffa00000, 0x42b0ffff, 0xc2aeac50};
    for (size_t i = 0; i < x->bytes / 4; i += 3)
        memcpy(x->host + 4 * i, &bits[random_next(&random_state) % 15], 4);
}

static void test_convert(void **state) {
    for (int s = 0; s < SHAPE_COUNT; s++) {
        const struct shape *shape = &SHAPES[s];
        struct array x = array_make(at_least_1((size_t)shape->rows * shape->x_stride) * 4);
        struct array narrow = array_make(at_least_1((size_t)shape->rows * shape->ret_stride) * 2);
        struct array wide = array_make(at_least_1((size_t)shape->rows * shape->x_stride) * 4);
        fill_floats(&x, &random_state, -100, 100);
        fill_difficult(&x);
        fill_bytes(&narrow, 0x11), fill_bytes(&wide, 0x11);
        uint8_t *expected = malloc(narrow.bytes), *expected_wide = malloc(wide.bytes);
        memset(expected, 0x11, narrow.bytes), memset(expected_wide, 0x11, wide.bytes);
        convert_bf16_scalar((const float *)x.host, shape->x_stride, shape->rows, shape->n, expected,
                            shape->ret_stride);
        widen_bf16_scalar(expected, shape->ret_stride, shape->rows, shape->n,
                          (float *)expected_wide, shape->x_stride);
        array_put(&x), array_put(&narrow), array_put(&wide);
        assert_int_equal(convert_cuda(NULL, array_device(&x), shape->x_stride, shape->rows,
                                      shape->n, array_device(&narrow), shape->ret_stride),
                         0);
        if (s == FEW_ROWS) { /* once is enough for the emulator */
            array_get(&narrow);
            assert_same(&narrow, expected, "convert");
            free(expected), free(expected_wide);
            array_free(&x), array_free(&narrow), array_free(&wide);
            continue;
        }
        assert_int_equal(widen_cuda(NULL, array_device(&narrow), shape->ret_stride, shape->rows,
                                    shape->n, array_device(&wide), shape->x_stride),
                         0);
        array_get(&narrow), array_get(&wide);
        assert_same(&narrow, expected, "convert");
        assert_same(&wide, expected_wide, "widen");
        free(expected), free(expected_wide);
        array_free(&x), array_free(&narrow), array_free(&wide);
    }
}

static void test_silu_mul(void **state) {
    for (int s = 0; s < FEW_ROWS; s++) {
        const struct shape *shape = &SHAPES[s];
        struct array gate = array_make(at_least_1((size_t)shape->rows * shape->x_stride) * 4);
        struct array up = array_make(gate.bytes);
        struct array ret = array_make(at_least_1((size_t)shape->rows * shape->ret_stride) * 2);
        fill_floats(&gate, &random_state, -100, 100);
        fill_floats(&up, &random_state, -5, 5);
        fill_bytes(&ret, 0x11);
        uint8_t *expected = malloc(ret.bytes);
        memset(expected, 0x11, ret.bytes);
        silu_mul_bf16_scalar((const float *)gate.host, (const float *)up.host, shape->x_stride,
                             shape->rows, shape->n, expected, shape->ret_stride);
        array_put(&gate), array_put(&up), array_put(&ret);
        assert_int_equal(silu_mul_cuda(NULL, array_device(&gate), array_device(&up),
                                       shape->x_stride, shape->rows, shape->n, array_device(&ret),
                                       shape->ret_stride),
                         0);
        array_get(&ret);
        assert_same(&ret, expected, "silu_mul");
        free(expected);
        array_free(&gate), array_free(&up), array_free(&ret);
    }
}

static void test_add(void **state) {
    for (int s = 0; s < FEW_ROWS; s++) {
        const struct shape *shape = &SHAPES[s];
        struct array x = array_make(at_least_1((size_t)shape->rows * shape->x_stride) * 4);
        struct array y = array_make(x.bytes);
        fill_floats(&x, &random_state, -1, 1);
        fill_floats(&y, &random_state, -1e-3f, 1e-3f);
        float *expected = malloc(x.bytes);
        memcpy(expected, x.host, x.bytes);
        add_scalar(expected, shape->x_stride, (const float *)y.host, shape->x_stride, shape->rows,
                   shape->n);
        array_put(&x), array_put(&y);
        assert_int_equal(add_cuda(NULL, array_device(&x), shape->x_stride, array_device(&y),
                                  shape->x_stride, shape->rows, shape->n),
                         0);
        array_get(&x);
        assert_same(&x, expected, "add");
        free(expected);
        array_free(&x), array_free(&y);
    }
}

static void test_embed(void **state) {
    enum { VOCABULARY = 37, N = 45, TABLE_STRIDE = 64, ROWS = 9 };
    struct array table = array_make(VOCABULARY * TABLE_STRIDE * 2), token = array_make(ROWS * 4);
    struct array ret = array_make(ROWS * N * 4);
    fill_bf16(&table, &random_state, -1, 1);
    float expected[ROWS][N];
    for (uint32_t r = 0; r < ROWS; r++) {
        uint32_t t = r == 4 ? VOCABULARY : random_below(&random_state, VOCABULARY);
        ((uint32_t *)token.host)[r] = t;
        for (uint32_t i = 0; i < N; i++)
            expected[r][i] = r == 4 ? 0 : bf16_to_float(((bf16 *)table.host)[t * TABLE_STRIDE + i]);
    }
    array_put(&table), array_put(&token), array_put(&ret);
    assert_int_equal(embed_cuda(NULL, array_device(&table), TABLE_STRIDE, VOCABULARY,
                                array_device(&token), ROWS, N, array_device(&ret), N),
                     0);
    array_get(&ret);
    assert_same(&ret, expected, "embed");
    array_free(&table), array_free(&token), array_free(&ret);
}

static void test_rope(void **state) {
    enum { POSITIONS = 100, ROWS = 7, HEADS = 5, ROPE = 64, HEAD_STRIDE = 96 };
    static const struct rope_parameters YARN = {10000, 40, 4096, 32, 1, 1, 1};
    struct array x = array_make(ROWS * HEADS * HEAD_STRIDE * 4), position = array_make(ROWS * 4);
    struct array table = array_make(POSITIONS * ROPE * 4);
    rope_table(&YARN, ROPE, 0, POSITIONS, (float *)table.host);
    fill_floats(&x, &random_state, -2, 2);
    float *expected = malloc(x.bytes);
    memcpy(expected, x.host, x.bytes);
    for (uint32_t r = 0; r < ROWS; r++) {
        uint32_t at = r == 0 ? POSITIONS - 1 : random_below(&random_state, POSITIONS);
        ((uint32_t *)position.host)[r] = at;
        rope_scalar(expected + r * HEADS * HEAD_STRIDE, HEAD_STRIDE, HEADS, ROPE,
                    (const float *)table.host + at * ROPE);
    }
    array_put(&x), array_put(&position), array_put(&table);
    assert_int_equal(rope_cuda(NULL, array_device(&x), HEADS * HEAD_STRIDE, HEAD_STRIDE, HEADS,
                               ROPE, array_device(&position), array_device(&table), ROWS),
                     0);
    array_get(&x);
    assert_same(&x, expected, "rope");
    free(expected);
    array_free(&x), array_free(&position), array_free(&table);
}

int main(void) {
    printf("seed %llu\n", (unsigned long long)random_state);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rms_norm), cmocka_unit_test(test_convert),
        cmocka_unit_test(test_silu_mul), cmocka_unit_test(test_add),
        cmocka_unit_test(test_embed),    cmocka_unit_test(test_rope),
    };
    return cmocka_run_group_tests_name("cuda rows", tests, device_name, NULL);
}
