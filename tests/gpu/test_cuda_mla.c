/* Multi-head latent attention on the device, absorbed and expanded, against sums in double
 * precision: within the rounding of probabilities and results to BF16. Rows alone, in another
 * batch, with pages elsewhere, with more splits than needed: bit for bit the same. */
#include <math.h>

#include "tests/gpu/compare.h"

static uint64_t random_state = 20260105;

/* ---- Absorbed ---- */

struct absorbed {
    uint32_t heads, kv_lora, rope, rows, splits, pages_stride, cache_pages, q_stride, cache_stride;
    struct array q, cache, position, pages, work, ret;
};

static uint32_t pages_of(uint32_t position) {
    return position / PAGE_TOKENS + 1;
}

static void absorbed_make(struct absorbed *a, const uint32_t *position) {
    a->q_stride = a->cache_stride = (uint32_t)cache_stride(a->kv_lora, a->rope);
    a->pages_stride = 0;
    a->cache_pages = 3;
    for (uint32_t r = 0; r < a->rows; r++) {
        a->cache_pages += pages_of(position[r]);
        if (pages_of(position[r]) > a->pages_stride)
            a->pages_stride = pages_of(position[r]);
    }
    if (a->splits == 0)
        a->splits = (a->pages_stride + MLA_SPLIT_CUDA - 1) / MLA_SPLIT_CUDA;
    a->q = array_make((size_t)a->rows * a->heads * a->q_stride * 2);
    a->cache = array_make((size_t)a->cache_pages * PAGE_TOKENS * a->cache_stride * 2);
    a->position = array_make(a->rows * 4);
    a->pages = array_make(a->rows * a->pages_stride * 4);
    a->work = array_make(mla_absorbed_work_bytes_cuda(a->kv_lora, a->heads, a->rows, a->splits));
    a->ret = array_make((size_t)a->rows * a->heads * (a->kv_lora + 32) * 2);
    fill_bf16(&a->q, &random_state, -1, 1);
    fill_bf16(&a->cache, &random_state, -1, 1);
    memcpy(a->position.host, position, a->rows * 4);
    uint32_t next = a->cache_pages; /* from the end, so that nothing is in order */
    for (uint32_t r = 0; r < a->rows; r++)
        for (uint32_t b = 0; b < pages_of(position[r]); b++)
            ((uint32_t *)a->pages.host)[r * a->pages_stride + b] = --next;
    fill_bytes(&a->ret, 0x22);
}

static void absorbed_drop(struct absorbed *a) {
    array_free(&a->q), array_free(&a->cache), array_free(&a->position), array_free(&a->pages);
    array_free(&a->work), array_free(&a->ret);
}

static float absorbed_scale(const struct absorbed *a) {
    return 3.0f / sqrtf((float)(a->kv_lora + a->rope));
}

static void absorbed_run(struct absorbed *a) {
    struct mla_absorbed_cuda plan;
    const struct mla_absorbed_args args = {
        .heads = a->heads,
        .kv_lora = a->kv_lora,
        .rope = a->rope,
        .scale = absorbed_scale(a),
        .position = array_device(&a->position),
        .pages = array_device(&a->pages),
        .pages_stride = a->pages_stride,
        .splits = a->splits,
        .work = array_device(&a->work),
    };
    gpu_schedule(random_next(&random_state));
    array_put(&a->q), array_put(&a->cache), array_put(&a->position), array_put(&a->pages);
    array_put(&a->work), array_put(&a->ret);
    assert_int_equal(mla_absorbed_plan_cuda(&plan, array_device(&a->q), a->q_stride, a->rows,
                                            array_device(&a->cache), a->cache_stride,
                                            a->cache_pages, &args),
                     0);
    assert_int_equal(
        mla_absorbed_cuda(NULL, &plan, a->rows, array_device(&a->ret), a->kv_lora + 32), 0);
    array_get(&a->ret), array_get(&a->work);
}

static const bf16 *cached(const struct absorbed *a, uint32_t r, uint32_t t) {
    const uint32_t page = ((uint32_t *)a->pages.host)[r * a->pages_stride + t / PAGE_TOKENS];
    return (const bf16 *)a->cache.host +
           ((size_t)page * PAGE_TOKENS + t % PAGE_TOKENS) * a->cache_stride;
}

static void expect_near(double got, double expected, double size, const char *what, uint32_t r,
                        uint32_t h, uint32_t i) {
    /* probabilities are rounded to 8 bits, and so is the result */
    const double allowed = size * 0x1p-8 + fabs(expected) * 0x1p-8 + 1e-6;
    if (!(fabs(got - expected) <= allowed))
        fail_msg("%s: row %u head %u element %u (size %g): expected %g, found %g", what, r, h, i,
                 size, expected, got);
}

static void absorbed_check(const struct absorbed *a) {
    for (uint32_t r = 0; r < a->rows; r++) {
        const uint32_t seen = ((uint32_t *)a->position.host)[r] + 1;
        double *p = malloc(seen * sizeof *p);
        for (uint32_t h = 0; h < a->heads; h++) {
            const bf16 *q = (const bf16 *)a->q.host + ((size_t)r * a->heads + h) * a->q_stride;
            double max = -1e300, sum = 0;
            for (uint32_t t = 0; t < seen; t++) {
                const bf16 *k = cached(a, r, t);
                double dot = 0;
                for (uint32_t i = 0; i < a->q_stride; i++)
                    dot += (double)bf16_to_float(q[i]) * (double)bf16_to_float(k[i]);
                p[t] = dot * (double)absorbed_scale(a);
                max = p[t] > max ? p[t] : max;
            }
            for (uint32_t t = 0; t < seen; t++)
                sum += p[t] = exp(p[t] - max);
            const bf16 *got =
                (const bf16 *)a->ret.host + ((size_t)r * a->heads + h) * (a->kv_lora + 32);
            for (uint32_t i = 0; i < a->kv_lora; i += 1 + random_below(&random_state, 40)) {
                double value = 0, size = 0;
                for (uint32_t t = 0; t < seen; t++) {
                    const double term = p[t] / sum * (double)bf16_to_float(cached(a, r, t)[i]);
                    value += term;
                    size += fabs(term);
                }
                expect_near((double)bf16_to_float(got[i]), value, size, "absorbed", r, h, i);
            }
            for (uint32_t i = a->kv_lora; i < a->kv_lora + 32; i++)
                assert_int_equal(got[i], 0x2222); /* beyond the row's width */
        }
        free(p);
    }
}

static void test_absorbed(void **state) {
    static const uint32_t positions[] = {0, 63, 64, 130, 5};
    struct absorbed narrow = {.heads = 8, .kv_lora = 128, .rope = 32, .rows = 5};
    absorbed_make(&narrow, positions);
    absorbed_run(&narrow);
    absorbed_check(&narrow);
    absorbed_drop(&narrow);
    static const uint32_t wide_positions[] = {70, 1};
    struct absorbed wide = {.heads = 16, .kv_lora = 512, .rope = 64, .rows = 2};
    absorbed_make(&wide, wide_positions);
    absorbed_run(&wide);
    absorbed_check(&wide);
    absorbed_drop(&wide);
    struct absorbed many = {.heads = 128, .kv_lora = 512, .rope = 64, .rows = 1}; /* two blocks */
    absorbed_make(&many, wide_positions + 1);
    absorbed_run(&many);
    absorbed_check(&many);
    absorbed_drop(&many);
    /* Over several splits: 16 pages, exactly and one position more. */
    static const uint32_t long_positions[] = {16 * 64 - 1, 16 * 64, 40 * 64 + 7};
    struct absorbed longer = {.heads = 3, .kv_lora = 128, .rope = 32, .rows = 3};
    absorbed_make(&longer, long_positions);
    absorbed_run(&longer);
    absorbed_check(&longer);
    absorbed_drop(&longer);
}

static void test_absorbed_rows_are_independent(void **state) {
    static const uint32_t positions[] = {3, 200, 16 * 64 + 5};
    struct absorbed batch = {.heads = 8, .kv_lora = 128, .rope = 32, .rows = 3};
    absorbed_make(&batch, positions);
    absorbed_run(&batch);
    for (uint32_t r = 0; r < 3; r++) {
        struct absorbed alone = batch;
        alone.rows = 1;
        alone.splits = 3; /* more than there are */
        absorbed_make(&alone, positions + r);
        memcpy(alone.q.host, batch.q.host + (size_t)r * 8 * batch.q_stride * 2, alone.q.bytes);
        for (uint32_t b = 0; b < pages_of(positions[r]); b++) {
            const uint32_t page = ((uint32_t *)alone.pages.host)[b];
            memcpy(alone.cache.host + (size_t)page * PAGE_TOKENS * alone.cache_stride * 2,
                   cached(&batch, r, b * PAGE_TOKENS), PAGE_TOKENS * alone.cache_stride * 2);
        }
        absorbed_run(&alone);
        assert_memory_equal(alone.ret.host, batch.ret.host + r * alone.ret.bytes, alone.ret.bytes);
        absorbed_drop(&alone);
    }
    absorbed_drop(&batch);
}

/* ---- Expanded ---- */

struct expanded {
    uint32_t heads, nope, rope, v, kv_lora, rows, positions, q_stride, cache_stride;
    struct array q, kv, cache, pages, position, key, value, ret;
};

static struct mla_expanded_args expanded_args(const struct expanded *e) {
    return (struct mla_expanded_args){.rows = e->rows,
                                      .heads = e->heads,
                                      .nope = e->nope,
                                      .rope = e->rope,
                                      .v = e->v,
                                      .q_stride = e->q_stride,
                                      .scale = 3.0f / sqrtf((float)(e->nope + e->rope)),
                                      .position = array_device(&e->position)};
}

/* `rows` queries at the end of `positions` positions. */
static void expanded_make(struct expanded *e) {
    e->q_stride = (uint32_t)cache_stride(e->nope, e->rope);
    e->cache_stride = (uint32_t)cache_stride(e->kv_lora, e->rope);
    const uint32_t pages = pages_of(e->positions - 1);
    e->q = array_make(((size_t)e->rows * e->heads * e->q_stride + 1) * 2);
    e->kv = array_make((size_t)e->positions * e->heads * (e->nope + e->v) * 4);
    e->cache = array_make((size_t)(pages + 1) * PAGE_TOKENS * e->cache_stride * 2);
    e->pages = array_make(pages * 4);
    e->position = array_make((e->rows + 1) * 4);
    const struct mla_expanded_args args = expanded_args(e);
    e->key = array_make(mla_expanded_key_bytes_cuda(&args, e->positions));
    e->value = array_make(mla_expanded_value_bytes_cuda(&args, e->positions));
    e->ret = array_make(((size_t)e->rows * (e->heads * e->v + 4) + 1) * 2);
    fill_bf16(&e->q, &random_state, -1, 1);
    fill_floats(&e->kv, &random_state, -1, 1);
    fill_bf16(&e->cache, &random_state, -1, 1);
    for (uint32_t b = 0; b < pages; b++)
        ((uint32_t *)e->pages.host)[b] = pages - b;
    for (uint32_t r = 0; r < e->rows; r++)
        ((uint32_t *)e->position.host)[r] = e->positions - e->rows + r;
    fill_bytes(&e->ret, 0x22);
}

static void expanded_drop(struct expanded *e) {
    array_free(&e->q), array_free(&e->kv), array_free(&e->cache), array_free(&e->pages);
    array_free(&e->position), array_free(&e->key), array_free(&e->value), array_free(&e->ret);
}

static void expanded_run(struct expanded *e) {
    const struct mla_expanded_args args = expanded_args(e);
    gpu_schedule(random_next(&random_state));
    array_put(&e->q), array_put(&e->kv), array_put(&e->cache), array_put(&e->pages);
    array_put(&e->position), array_put(&e->key), array_put(&e->value), array_put(&e->ret);
    assert_int_equal(mla_expand_cuda(NULL, &args, array_device(&e->kv), e->heads * (e->nope + e->v),
                                     array_device(&e->cache), e->cache_stride,
                                     (uint32_t)activation_stride(e->kv_lora),
                                     array_device(&e->pages), e->positions, array_device(&e->key),
                                     array_device(&e->value)),
                     0);
    assert_int_equal(mla_expanded_cuda(NULL, &args, array_device(&e->q), array_device(&e->key),
                                       array_device(&e->value), e->positions, array_device(&e->ret),
                                       e->heads * e->v + 4),
                     0);
    array_get(&e->ret);
}

static double expanded_score(const struct expanded *e, uint32_t r, uint32_t h, uint32_t t) {
    const bf16 *q = (const bf16 *)e->q.host + ((size_t)r * e->heads + h) * e->q_stride;
    const float *kv = (const float *)e->kv.host + ((size_t)t * e->heads + h) * (e->nope + e->v);
    const uint32_t page = ((uint32_t *)e->pages.host)[t / PAGE_TOKENS];
    const bf16 *rope = (const bf16 *)e->cache.host +
                       ((size_t)page * PAGE_TOKENS + t % PAGE_TOKENS) * e->cache_stride +
                       activation_stride(e->kv_lora);
    double dot = 0;
    for (uint32_t i = 0; i < e->nope; i++)
        dot += (double)bf16_to_float(q[i]) * (double)bf16_to_float(bf16_from_float(kv[i]));
    for (uint32_t i = 0; i < e->rope; i++)
        dot += (double)bf16_to_float(q[activation_stride(e->nope) + i]) *
               (double)bf16_to_float(rope[i]);
    return dot * (double)expanded_args(e).scale;
}

static void expanded_check(const struct expanded *e) {
    double *p = malloc(e->positions * sizeof *p);
    for (uint32_t r = 0; r<e->rows; r += e->rows> 20 ? 7 : 1)
        for (uint32_t h = 0; h < e->heads; h++) {
            const uint32_t seen = ((uint32_t *)e->position.host)[r] + 1;
            double max = -1e300, sum = 0;
            for (uint32_t t = 0; t < seen; t++) {
                p[t] = expanded_score(e, r, h, t);
                max = p[t] > max ? p[t] : max;
            }
            for (uint32_t t = 0; t < seen; t++)
                sum += p[t] = exp(p[t] - max);
            const bf16 *got =
                (const bf16 *)e->ret.host + (size_t)r * (e->heads * e->v + 4) + h * e->v;
            for (uint32_t i = 0; i < e->v; i++) {
                double value = 0, size = 0;
                for (uint32_t t = 0; t < seen; t++) {
                    const float *kv =
                        (const float *)e->kv.host + ((size_t)t * e->heads + h) * (e->nope + e->v);
                    const double term =
                        p[t] / sum * (double)bf16_to_float(bf16_from_float(kv[e->nope + i]));
                    value += term;
                    size += fabs(term);
                }
                expect_near((double)bf16_to_float(got[i]), value, size, "expanded", r, h, i);
            }
        }
    free(p);
}

static void test_expanded(void **state) {
    static const struct expanded cases[] = {
        {.heads = 2, .nope = 32, .rope = 32, .v = 32, .kv_lora = 128, .rows = 1, .positions = 1},
        {.heads = 2, .nope = 32, .rope = 32, .v = 32, .kv_lora = 128, .rows = 65, .positions = 65},
        {.heads = 1,
         .nope = 32,
         .rope = 32,
         .v = 32,
         .kv_lora = 128,
         .rows = 140,
         .positions = 330},
        {.heads = 2,
         .nope = 128,
         .rope = 64,
         .v = 128,
         .kv_lora = 512,
         .rows = 3,
         .positions = 130},
    };
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        struct expanded e = cases[c];
        expanded_make(&e);
        expanded_run(&e);
        expanded_check(&e);
        expanded_drop(&e);
    }
}

/* A row in a chunk of its own, and at the end of a longer one. */
static void test_expanded_rows_are_independent(void **state) {
    struct expanded whole = {
        .heads = 2, .nope = 32, .rope = 32, .v = 32, .kv_lora = 128, .rows = 150, .positions = 200};
    expanded_make(&whole);
    expanded_run(&whole);
    static const uint32_t cuts[][2] = {{0, 1}, {60, 5}, {149, 1}, {20, 100}}; /* first row, rows */
    for (size_t c = 0; c < sizeof cuts / sizeof *cuts; c++) {
        const uint32_t first = cuts[c][0], rows = cuts[c][1];
        struct expanded part = whole;
        part.rows = rows;
        expanded_make(&part);
        memcpy(part.q.host, whole.q.host + (size_t)first * 2 * part.q_stride * 2,
               (size_t)rows * 2 * part.q_stride * 2);
        memcpy(part.kv.host, whole.kv.host, part.kv.bytes);
        memcpy(part.cache.host, whole.cache.host, part.cache.bytes);
        memcpy(part.position.host, whole.position.host + first * 4, rows * 4);
        expanded_run(&part);
        for (uint32_t r = 0; r < rows; r++)
            assert_memory_equal(part.ret.host + (size_t)r * 68 * 2,
                                whole.ret.host + (size_t)(first + r) * 68 * 2, 64 * 2);
        expanded_drop(&part);
    }
    expanded_drop(&whole);
}

static void test_nothing_and_other_widths(void **state) {
    struct mla_expanded_args none = {.rows = 0};
    assert_int_equal(mla_expanded_cuda(NULL, &none, NULL, NULL, NULL, 0, NULL, 0), 0);
    assert_int_equal(mla_absorbed_cuda(NULL, NULL, 0, NULL, 0), 0);
    struct mla_expanded_args odd = {.rows = 1, .heads = 1, .nope = 256, .rope = 64, .v = 128};
    assert_int_equal(mla_expanded_cuda(NULL, &odd, NULL, NULL, NULL, 1, NULL, 0), CUDA_UNSUPPORTED);
    struct mla_absorbed_cuda plan;
    const struct mla_absorbed_args args = {.heads = 1, .kv_lora = 256, .rope = 64};
    assert_int_equal(mla_absorbed_plan_cuda(&plan, NULL, 320, 1, NULL, 320, 1, &args),
                     CUDA_UNSUPPORTED);
}

int main(void) {
    printf("seed %llu\n", (unsigned long long)random_state);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_absorbed),
        cmocka_unit_test(test_absorbed_rows_are_independent),
        cmocka_unit_test(test_expanded),
        cmocka_unit_test(test_expanded_rows_are_independent),
        cmocka_unit_test(test_nothing_and_other_widths),
    };
    return cmocka_run_group_tests_name("cuda mla", tests, device_name, NULL);
}
