/* Matrix products on the device: FP8 block-scaled and BF16; dense, masked and contiguous groups.
 * Against sums in double precision: exactly where every partial sum is a small integer, within the
 * rounding of FP32 sums else. Rows alone against rows in a batch: bit for bit. */
#include <math.h>

#include "tests/gpu/compare.h"

static uint64_t random_state = 20260104;

enum mode { DENSE, MASKED, CONTIGUOUS };

struct problem {
    bool fp8, exact;
    enum mode mode;
    uint32_t rows, n, k, groups;
    uint32_t x_rows;
    struct array x, w, y, count, block_group, a_scale, b_scale;
};

static uint32_t k_blocks(const struct problem *p) {
    return (p->k + 127) / 128;
}
static uint32_t stride(const struct problem *p) { /* elements, 16 bytes at least */
    return (p->k + 15) / 16 * 16 + 16;
}

static float value_of(const struct problem *p, const struct array *a, size_t at) {
    return p->fp8 ? e4m3_to_float(a->host[at]) : bf16_to_float(((bf16 *)a->host)[at]);
}

static void fill(struct problem *p, struct array *a, size_t elements) {
    for (size_t i = 0; i < elements; i++) {
        float value = p->exact ? (float)random_below(&random_state, 7) - 3
                               : random_float(&random_state, -2, 2);
        if (p->fp8)
            a->host[i] = e4m3_from_float(value);
        else
            ((bf16 *)a->host)[i] = bf16_from_float(value);
    }
}

static void make(struct problem *p) {
    const uint32_t element = p->fp8 ? 1 : 2;
    p->x_rows = p->mode == MASKED ? p->rows * p->groups : p->rows;
    const size_t x_elements = (size_t)p->x_rows * stride(p),
                 w_elements = (size_t)p->groups * p->n * stride(p);
    p->x = array_make(x_elements * element + 16);
    p->w = array_make(w_elements * element);
    p->y = array_make(((size_t)p->x_rows * (p->n + 3) + 1) * 4);
    p->count = array_make(p->groups * 4);
    p->block_group = array_make(((p->rows + 127) / 128 + 1) * 4);
    p->a_scale = array_make(((size_t)p->x_rows * k_blocks(p) + 1) * 4);
    p->b_scale = array_make((size_t)p->groups * ((p->n + 127) / 128) * k_blocks(p) * 4);
    fill(p, &p->x, x_elements), fill(p, &p->w, w_elements);
    for (size_t i = 0; i < p->a_scale.bytes / 4; i++)
        ((float *)p->a_scale.host)[i] = p->exact ? (float)(1 + random_below(&random_state, 2))
                                                 : random_float(&random_state, 0.001f, 0.02f);
    for (size_t i = 0; i < p->b_scale.bytes / 4; i++)
        ((float *)p->b_scale.host)[i] = p->exact ? (float)(1 + random_below(&random_state, 2))
                                                 : random_float(&random_state, 0.001f, 0.02f);
    for (uint32_t g = 0; g < p->groups; g++) /* the first expert has nothing, the last all it may */
        ((uint32_t *)p->count.host)[g] = g == 0 ? 0
                                         : g + 1 == p->groups
                                             ? p->rows
                                             : random_below(&random_state, p->rows + 1);
    for (uint32_t b = 0; b < (p->rows + 127) / 128; b++)
        ((int32_t *)p->block_group.host)[b] = random_below(&random_state, 4) == 0
                                                  ? -1
                                                  : (int32_t)random_below(&random_state, p->groups);
    fill_bytes(&p->y, 0x77);
}

static void drop(struct problem *p) {
    array_free(&p->x), array_free(&p->w), array_free(&p->y), array_free(&p->count);
    array_free(&p->block_group), array_free(&p->a_scale), array_free(&p->b_scale);
}

static void run(struct problem *p) {
    const uint32_t element = p->fp8 ? 1 : 2;
    const struct gemm_args args = {
        .rows = p->rows,
        .n = p->n,
        .k = p->k,
        .groups = p->groups,
        .y = array_device(&p->y),
        .y_stride = p->n + 3,
        .count = p->mode == MASKED ? array_device(&p->count) : NULL,
        .block_group = p->mode == CONTIGUOUS ? array_device(&p->block_group) : NULL,
        .a_scale = p->fp8 ? array_device(&p->a_scale) : NULL,
        .b_scale = p->fp8 ? array_device(&p->b_scale) : NULL,
        .a_scale_row_step = 1,
        .a_scale_group_step = p->x_rows,
    };
    struct gemm_cuda plan;
    gpu_schedule(random_next(&random_state));
    array_put(&p->x), array_put(&p->w), array_put(&p->y), array_put(&p->count);
    array_put(&p->block_group), array_put(&p->a_scale), array_put(&p->b_scale);
    assert_int_equal(gemm_plan_cuda(&plan, p->fp8, array_device(&p->x), stride(p) * element,
                                    array_device(&p->w), stride(p) * element, &args),
                     0);
    assert_int_equal(gemm_run_cuda(NULL, &plan), 0);
    array_get(&p->y);
}

/* Which group's weights a row meets; -1: it is not computed. */
static int group_of(const struct problem *p, uint32_t row) {
    if (p->mode == MASKED)
        return row % p->rows < ((uint32_t *)p->count.host)[row / p->rows] ? (int)(row / p->rows)
                                                                          : -1;
    return p->mode == CONTIGUOUS ? ((int32_t *)p->block_group.host)[row / 128] : 0;
}

static void check_element(const struct problem *p, uint32_t row, uint32_t n, int group) {
    double sum = 0, size = 0;
    for (uint32_t k = 0; k < p->k; k++) {
        double term = (double)value_of(p, &p->x, (size_t)row * stride(p) + k) *
                      (double)value_of(p, &p->w, ((size_t)group * p->n + n) * stride(p) + k);
        if (p->fp8) {
            const size_t b =
                ((size_t)group * ((p->n + 127) / 128) + n / 128) * k_blocks(p) + k / 128;
            term *= (double)((float *)p->a_scale.host)[(size_t)k / 128 * p->x_rows + row] *
                    (double)((float *)p->b_scale.host)[b];
        }
        sum += term;
        size += fabs(term);
    }
    const double got = (double)((float *)p->y.host)[(size_t)row * (p->n + 3) + n];
    const double allowed = p->exact ? 0 : size * 1e-5;
    if (!(fabs(got - sum) <= allowed))
        fail_msg("row %u output %u: expected %.9g, found %.9g", row, n, sum, got);
}

static void check(const struct problem *p) {
    const uint8_t untouched[4] = {0x77, 0x77, 0x77, 0x77};
    for (uint32_t r = 0; r < p->x_rows; r++) {
        const int group = group_of(p, r);
        for (uint32_t n = 0; n < p->n + 3; n++) {
            if (group >= 0 && n < p->n)
                check_element(p, r, n, group);
            else
                assert_memory_equal(p->y.host + ((size_t)r * (p->n + 3) + n) * 4, untouched, 4);
        }
    }
}

static void one(bool fp8, enum mode mode, uint32_t rows, uint32_t n, uint32_t k, uint32_t groups) {
    for (int exact = 0; exact < 2; exact++) {
        struct problem p = {.fp8 = fp8,
                            .exact = exact,
                            .mode = mode,
                            .rows = rows,
                            .n = n,
                            .k = k,
                            .groups = groups};
        make(&p);
        run(&p);
        check(&p);
        drop(&p);
    }
}

static void test_dense(void **state) {
    for (int fp8 = 0; fp8 < 2; fp8++) {
        one(fp8, DENSE, 0, 128, 128, 1);
        one(fp8, DENSE, 1, 128, 128, 1);
        one(fp8, DENSE, 64, 1, 16, 1);
        one(fp8, DENSE, 7, 130, 144, 1);
        one(fp8, DENSE, 65, 40, 1200, 1); /* two warpgroups; more blocks of K than stages */
        one(fp8, DENSE, 130, 129, 256, 1);
    }
}

static void test_masked(void **state) {
    for (int fp8 = 0; fp8 < 2; fp8++) {
        one(fp8, MASKED, 5, 128, 256, 3);
        one(fp8, MASKED, 70, 96, 128, 3);
    }
}

static void test_contiguous(void **state) {
    for (int fp8 = 0; fp8 < 2; fp8++) {
        one(fp8, CONTIGUOUS, 384, 128, 128, 3);
        one(fp8, CONTIGUOUS, 40, 128, 128, 2);
    }
}

/* A row's bits are the same alone, in a batch, in a large tile and as one of an expert's rows. */
static void test_rows_are_independent(void **state) {
    for (int fp8 = 0; fp8 < 2; fp8++) {
        struct problem p = {
            .fp8 = fp8, .mode = DENSE, .rows = 100, .n = 128, .k = 400, .groups = 1};
        make(&p);
        run(&p);
        const uint32_t element = fp8 ? 1 : 2;
        for (uint32_t r = 0; r < p.rows; r += 33) {
            struct problem alone = p;
            alone.rows = 1;
            alone.mode = r == 33 ? MASKED : DENSE;
            make(&alone);
            memcpy(alone.x.host, p.x.host + (size_t)r * stride(&p) * element, stride(&p) * element);
            memcpy(alone.w.host, p.w.host, p.w.bytes);
            memcpy(alone.b_scale.host, p.b_scale.host, p.b_scale.bytes);
            for (uint32_t b = 0; b < k_blocks(&p); b++)
                ((float *)alone.a_scale.host)[b] = ((float *)p.a_scale.host)[b * p.rows + r];
            ((uint32_t *)alone.count.host)[0] = 1;
            run(&alone);
            assert_memory_equal(alone.y.host, p.y.host + (size_t)r * (p.n + 3) * 4, p.n * 4);
            drop(&alone);
        }
        drop(&p);
    }
}

int main(void) {
    printf("seed %llu\n", (unsigned long long)random_state);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_dense),
        cmocka_unit_test(test_masked),
        cmocka_unit_test(test_contiguous),
        cmocka_unit_test(test_rows_are_independent),
    };
    return cmocka_run_group_tests_name("cuda gemm", tests, device_name, NULL);
}
