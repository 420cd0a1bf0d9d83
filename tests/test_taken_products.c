/* Products whose outputs are taken up as they are made (queries of the expanded form, sums that are
 * added) give the bits of the operations that they stand for, whatever the rows, threads and
 * weights. AMX runs on the processor if it has it, else through the emulator. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/internal.h"
#include "kernels/rows.h"
#include "tests/support/amx_emulator.h"
#include "tests/support/random.h"

#include <cmocka.h> /* after errors.h: it defines a macro named fail */

#define SEED 20251125u

/* Parts one after the other, from the last. */
static void run_backwards(void *pool, void (*task)(void *argument, int part, int parts),
                          void *argument, int parts) {
    (void)pool;
    for (int part = parts - 1; part >= 0; part--)
        task(argument, part, parts);
}
static const struct parallel THREE = {run_backwards, NULL, 3};

static uint64_t random_state;

static void *zeroed(size_t bytes) {
    void *ret = aligned_alloc(64, (bytes + 127) / 64 * 64);
    memset(ret, 0, bytes);
    return ret;
}

#if defined(__x86_64__)

static bool can_run(void) {
    if (!isa_available(ISA_AVX512))
        return false;
    return isa_available(ISA_AMX) || (__builtin_cpu_supports("gfni") && amx_emulator_install());
}

struct weights {
    struct weight_view view;
    struct matrix matrix;
    void *data;
    float *scale;
};

static struct weights weights_make(enum dtype dtype, uint32_t n, uint32_t k) {
    struct weights w = {.data = zeroed((size_t)n * k * dtype_bytes(dtype))};
    const uint32_t columns = k / 128 + 1, scales = (n / 128 + 1) * columns;
    w.scale = malloc(scales * sizeof *w.scale);
    for (uint32_t i = 0; i < scales; i++)
        w.scale[i] = random_float(&random_state, 0.5f, 2);
    for (size_t i = 0; i < (size_t)n * k; i++)
        if (dtype == DTYPE_BF16)
            ((bf16 *)w.data)[i] = bf16_from_float(random_float(&random_state, -1, 1));
        else
            ((uint8_t *)w.data)[i] =
                (uint8_t)(random_below(&random_state, 0x70) | random_below(&random_state, 2) << 7);
    w.view = (struct weight_view){.dtype = dtype,
                                  .data = w.data,
                                  .n = n,
                                  .k = k,
                                  .stride = k,
                                  .scale = dtype == DTYPE_E4M3 ? w.scale : NULL,
                                  .scale_stride = columns,
                                  .block = 128};
    matrix_pack_bf16(&w.matrix, &w.view, zeroed(matrix_bytes_bf16(&w.view)));
    return w;
}

static void weights_free(struct weights *w) {
    free(w->data);
    free(w->scale);
    free(w->matrix.data);
}

static bf16 *inputs_make(uint32_t rows, size_t stride, uint32_t k) {
    bf16 *x = zeroed(rows * stride * sizeof *x);
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t i = 0; i < k; i++)
            x[r * stride + i] = bf16_from_float(random_float(&random_state, -1, 1));
    return x;
}

static void check_addition(matmul_add_function *add, matmul_function *matmul, enum dtype dtype,
                           uint32_t rows, uint32_t n, uint32_t k, const struct parallel *parallel) {
    struct weights w = weights_make(dtype, n, k);
    const size_t x_stride = row_stride(k), y_stride = n + 5;
    bf16 *x = inputs_make(rows, x_stride, k);
    float *y = zeroed(rows * y_stride * sizeof *y), *expected = zeroed(rows * y_stride * sizeof *y);
    float *product = zeroed((size_t)rows * n * sizeof *product);
    for (size_t i = 0; i < rows * y_stride; i++)
        y[i] = expected[i] = random_float(&random_state, -3, 3);
    matmul(&w.matrix, x, x_stride, rows, product, n, &PARALLEL_SERIAL);
    add_scalar(expected, y_stride, product, n, rows, n);
    add(&w.matrix, x, x_stride, rows, y, y_stride, parallel);
    assert_memory_equal(y, expected, rows * y_stride * sizeof *y);
    free(product);
    free(expected);
    free(y);
    free(x);
    weights_free(&w);
}

static void check_queries(mla_queries_function *queries, matmul_function *matmul, enum dtype dtype,
                          uint32_t rows, const struct mla_shape *shape, uint32_t k,
                          const struct parallel *parallel) {
    const uint32_t width = shape->nope + shape->rope, n = shape->heads * width;
    struct weights w = weights_make(dtype, n, k);
    const size_t x_stride = row_stride(k), count = (size_t)rows * n;
    bf16 *x = inputs_make(rows, x_stride, k);
    float *angles = malloc((size_t)rows * shape->rope * sizeof *angles);
    const float **cos_sin = calloc(rows, sizeof *cos_sin);
    for (size_t i = 0; i < (size_t)rows * shape->rope; i++)
        angles[i] = random_float(&random_state, -1, 1);
    for (uint32_t r = 0; r < rows; r++)
        cos_sin[r] = r % 5 == 2 ? NULL : angles + (size_t)r * shape->rope;
    float *sums = zeroed(count * sizeof *sums), *y = zeroed(count * sizeof *y);
    bf16 *ret = zeroed(count * sizeof *ret), *expected = zeroed(count * sizeof *expected);
    matmul(&w.matrix, x, x_stride, rows, sums, n, &PARALLEL_SERIAL);
    queries(shape, &w.matrix, x, x_stride, rows, cos_sin, y, n, ret, width, parallel);
    for (uint32_t r = 0; r < rows; r++) {
        float *row = sums + (size_t)r * n;
        if (cos_sin[r] == NULL) {
            assert_memory_equal(y + (size_t)r * n, row, n * sizeof *row);
            memset(row, 0, n * sizeof *row);
            continue;
        }
        rope_scalar(row + shape->nope, width, shape->heads, shape->rope, cos_sin[r]);
    }
    convert_bf16_scalar(sums, n, rows, n, expected, n);
    assert_memory_equal(ret, expected, count * sizeof *ret);
    free(expected);
    free(ret);
    free(y);
    free(sums);
    free(cos_sin);
    free(angles);
    free(x);
    weights_free(&w);
}
#endif

static void sums_are_added(void **unused) {
    (void)unused;
#if defined(__x86_64__)
    static const uint32_t rows[] = {1, 33, 64, 100, 300};
    if (!can_run())
        skip();
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        check_addition(matmul_add_bf16_amx, matmul_bf16_scalar, DTYPE_BF16, rows[i], 48, 70,
                       &THREE);
        check_addition(matmul_add_bf16_amx, matmul_bf16_scalar, DTYPE_BF16, rows[i], 101, 600,
                       &PARALLEL_SERIAL);
        check_addition(matmul_add_bf16_amx, matmul_bf16_scalar, DTYPE_E4M3, rows[i], 70, 300,
                       &THREE);
        check_addition(matmul_add_fp8_amx, matmul_fp8_scalar, DTYPE_E4M3, rows[i], 70, 300, &THREE);
    }
#endif
}

static void queries_are_rotated_and_rounded(void **unused) {
    (void)unused;
#if defined(__x86_64__)
    static const uint32_t rows[] = {3, 33, 65, 270};
    const struct mla_shape shape = {.heads = 3, .nope = 64, .rope = 32};
    if (!can_run())
        skip();
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        check_queries(mla_queries_bf16_amx, matmul_bf16_scalar, DTYPE_BF16, rows[i], &shape, 544,
                      &THREE);
        check_queries(mla_queries_bf16_amx, matmul_bf16_scalar, DTYPE_E4M3, rows[i], &shape, 160,
                      &PARALLEL_SERIAL);
        check_queries(mla_queries_fp8_amx, matmul_fp8_scalar, DTYPE_E4M3, rows[i], &shape, 160,
                      &THREE);
    }
#endif
}

int main(void) {
    random_state = SEED;
    numerics_enter();
    printf("seed %u\n", SEED);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sums_are_added),
        cmocka_unit_test(queries_are_rotated_and_rounded),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
