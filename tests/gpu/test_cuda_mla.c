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
    struct array packed; /* the cache in its E4M3 form, whose values `cache` then has */
    bool e4m3;
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
    a->packed =
        array_make((size_t)a->cache_pages * PAGE_TOKENS * latent_row_bytes(a->kv_lora, a->rope));
}

/* cache to packed by the CPU's definition, and back what it holds. Magnitudes differ by row and
 * group; some groups are zero. */
static void absorbed_quantise(struct absorbed *a) {
    const uint32_t scale_at = latent_scale_at(a->kv_lora), rope_at = latent_rope_at(a->kv_lora);
    a->e4m3 = true;
    fill_bytes(&a->packed, 0);
    for (size_t row = 0; row < (size_t)a->cache_pages * PAGE_TOKENS; row++) {
        bf16 *from = (bf16 *)a->cache.host + row * a->cache_stride;
        uint8_t *to = a->packed.host + row * latent_row_bytes(a->kv_lora, a->rope);
        for (uint32_t i = 0; i < a->kv_lora; i++) {
            const float factor = (row + i / 128) % 7 == 3 ? 0 : ldexpf(1, (int)(row % 9) - 5);
            from[i] = bf16_from_float(bf16_to_float(from[i]) * factor);
        }
        latent_quantise(from, a->kv_lora, to, (float *)(to + scale_at));
        memcpy(to + rope_at, from + activation_stride(a->kv_lora),
               activation_stride(a->rope) * sizeof(bf16));
        latent_widen(to, (float *)(to + scale_at), a->kv_lora, from);
    }
}

static void absorbed_drop(struct absorbed *a) {
    array_free(&a->q), array_free(&a->cache), array_free(&a->position), array_free(&a->pages);
    array_free(&a->work), array_free(&a->ret), array_free(&a->packed);
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
    array_put(&a->work), array_put(&a->ret), array_put(&a->packed);
    const int error =
        a->e4m3 ? mla_absorbed_plan_e4m3_cuda(&plan, array_device(&a->q), a->q_stride, a->rows,
                                              array_device(&a->packed), a->cache_pages, &args)
                : mla_absorbed_plan_cuda(&plan, array_device(&a->q), a->q_stride, a->rows,
                                         array_device(&a->cache), a->cache_stride, a->cache_pages,
                                         &args);
    assert_int_equal(error, 0);
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

/* Over an E4M3 cache: the bits of the BF16 kernel over the values read back, and near the sums in
 * double precision over them. */
static void test_absorbed_e4m3(void **state) {
    static const uint32_t narrow[] = {0, 63, 64, 130, 5, 16 * 64}, wide[] = {200, 1};
    static const struct {
        struct absorbed shape;
        const uint32_t *position;
    } cases[] = {
        {{.heads = 8, .kv_lora = 128, .rope = 32, .rows = 6}, narrow},
        {{.heads = 3, .kv_lora = 128, .rope = 18, .rows = 2}, narrow},
        {{.heads = 16, .kv_lora = 512, .rope = 64, .rows = 2}, wide},
        {{.heads = 70, .kv_lora = 512, .rope = 64, .rows = 1}, wide + 1},
        {{.heads = 5, .kv_lora = 512, .rope = 32, .rows = 1}, wide},
    };
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        struct absorbed a = cases[c].shape;
        absorbed_make(&a, cases[c].position);
        absorbed_quantise(&a);
        absorbed_run(&a);
        absorbed_check(&a);
        uint8_t *packed = malloc(a.ret.bytes);
        memcpy(packed, a.ret.host, a.ret.bytes);
        fill_bytes(&a.ret, 0x22);
        a.e4m3 = false;
        absorbed_run(&a);
        assert_same(&a.ret, packed, "BF16 kernel over the values of the E4M3 cache");
        free(packed);
        absorbed_drop(&a);
    }
}

/* Rows appended to the cache, in both forms: the bytes of the CPU's definition, and no others. */
static void test_append(void **state) {
    static const uint32_t shapes[][2] = {{512, 64}, {128, 32}, {40, 10}, {130, 2}};
    static const uint32_t position[] = {0, 63, 64, 130, 5};
    enum { ROWS = 5, PAGES = 9, TABLE = 3 };
    for (uint32_t c = 0; c < 8; c++) {
        const bool e4m3 = c % 2 == 0;
        const uint32_t kv_lora = shapes[c / 2][0], rope = shapes[c / 2][1];
        const uint32_t latent_padded = (uint32_t)activation_stride(kv_lora);
        const size_t row_bytes =
            e4m3 ? latent_row_bytes(kv_lora, rope) : cache_stride(kv_lora, rope) * sizeof(bf16);
        const uint32_t latent_stride = kv_lora + 3, key_stride = rope + 5;
        struct array latent = array_make((size_t)ROWS * latent_stride * 2),
                     wide = array_make((size_t)ROWS * latent_stride * 4),
                     key = array_make((size_t)ROWS * key_stride * 4), at = array_make(ROWS * 4),
                     pages = array_make(ROWS * TABLE * 4),
                     cache = array_make(PAGES * PAGE_TOKENS * row_bytes);
        fill_bf16(&latent, &random_state, -3, 3);
        fill_floats(&key, &random_state, -3, 3);
        for (uint32_t i = 0; i < kv_lora; i++) { /* zeros; tiny, huge, infinite, NaN */
            static const float odd[] = {0x1p-126f, -0x1p-101f, 0x1.cp-100f, 0x1p127f,
                                        -INFINITY, NAN,        1,           448};
            ((bf16 *)latent.host)[latent_stride + i] = 0;
            ((bf16 *)latent.host)[2 * latent_stride + i] =
                bf16_from_float(odd[i % 128 < 64 ? i % 3 : i % 8]);
            ((bf16 *)latent.host)[3 * latent_stride + i] = bf16_from_float(odd[i % 3]);
        }
        memcpy(at.host, position, sizeof position);
        for (uint32_t i = 0; i < ROWS * TABLE; i++) /* each row its own pages, none in order */
            ((uint32_t *)pages.host)[i] = i / TABLE == 0 ? 8 - i : (i * 4 + 1) % 6;
        fill_bytes(&cache, 0x33);
        uint8_t *expected = malloc(cache.bytes);
        memset(expected, 0x33, cache.bytes);
        for (uint32_t r = 0; r < ROWS; r++) {
            const uint32_t page = ((uint32_t *)pages.host)[r * TABLE + position[r] / PAGE_TOKENS];
            uint8_t *to = expected + ((size_t)page * PAGE_TOKENS + position[r] % 64) * row_bytes;
            const bf16 *from = (bf16 *)latent.host + r * latent_stride;
            memset(to, 0, row_bytes);
            if (e4m3)
                latent_quantise(from, kv_lora, to, (float *)(to + latent_scale_at(kv_lora)));
            else
                memcpy(to, from, kv_lora * sizeof(bf16));
            bf16 *keys = (bf16 *)(to + (e4m3 ? latent_rope_at(kv_lora) : latent_padded * 2));
            for (uint32_t i = 0; i < rope; i++)
                keys[i] = bf16_from_float(((float *)key.host)[r * key_stride + i]);
        }
        for (uint32_t i = 0; i < ROWS * latent_stride; i++)
            ((float *)wide.host)[i] = bf16_to_float(((bf16 *)latent.host)[i]);
        gpu_schedule(random_next(&random_state));
        array_put(&wide), array_put(&key), array_put(&at), array_put(&pages), array_put(&cache);
        const struct latent_append_cuda args = {.rows = ROWS,
                                                .kv_lora = kv_lora,
                                                .rope = rope,
                                                .latent = array_device(&wide),
                                                .latent_stride = latent_stride,
                                                .key = array_device(&key),
                                                .key_stride = key_stride,
                                                .position = array_device(&at),
                                                .pages = array_device(&pages),
                                                .pages_stride = TABLE,
                                                .cache = array_device(&cache)};
        assert_int_equal(latent_append_cuda(NULL, e4m3, &args), 0);
        array_get(&cache);
        assert_same(&cache, expected, e4m3 ? "rows of an E4M3 cache" : "rows of a BF16 cache");
        free(expected);
        array_free(&latent), array_free(&wide), array_free(&key), array_free(&at);
        array_free(&pages), array_free(&cache);
    }
}

/* Latents read back in the order of a sequence's pages. */
static void test_widen_latents(void **state) {
    static const uint32_t widths[] = {512, 128, 40};
    enum { POSITIONS = 130, PAGES = 5 };
    for (size_t c = 0; c < sizeof widths / sizeof *widths; c++) {
        const uint32_t n = widths[c], padded = (uint32_t)activation_stride(n), stride = padded + 32;
        const uint32_t row_bytes = latent_row_bytes(n, 32);
        struct array cache = array_make((size_t)PAGES * PAGE_TOKENS * row_bytes),
                     pages = array_make(3 * 4), ret = array_make((size_t)POSITIONS * stride * 2);
        for (size_t i = 0; i < cache.bytes; i++)
            cache.host[i] = (uint8_t)random_next(&random_state);
        for (size_t row = 0; row < PAGES * PAGE_TOKENS; row++)
            for (uint32_t g = 0; g * 128 < n; g++)
                ((float *)(cache.host + row * row_bytes + latent_scale_at(n)))[g] =
                    ldexpf(1, (int)random_below(&random_state, 40) - 20);
        memcpy(pages.host, (uint32_t[]){4, 0, 2}, 12);
        fill_bytes(&ret, 0x22);
        bf16 *expected = malloc(ret.bytes);
        memset(expected, 0x22, ret.bytes);
        for (uint32_t p = 0; p < POSITIONS; p++) {
            const uint8_t *from =
                cache.host + ((size_t)((uint32_t *)pages.host)[p / 64] * 64 + p % 64) * row_bytes;
            memset(expected + (size_t)p * stride, 0, padded * 2);
            latent_widen(from, (const float *)(from + latent_scale_at(n)), n,
                         expected + (size_t)p * stride);
        }
        array_put(&cache), array_put(&pages), array_put(&ret);
        assert_int_equal(latent_widen_cuda(NULL, array_device(&cache), n, 32, array_device(&pages),
                                           POSITIONS, array_device(&ret), stride),
                         0);
        array_get(&ret);
        assert_same(&ret, expected, "latents read back");
        free(expected);
        array_free(&cache), array_free(&pages), array_free(&ret);
    }
}

static void rows_are_independent(bool e4m3) {
    static const uint32_t positions[] = {3, 200, 16 * 64 + 5};
    struct absorbed batch = {.heads = 8, .kv_lora = 128, .rope = 32, .rows = 3};
    absorbed_make(&batch, positions);
    if (e4m3)
        absorbed_quantise(&batch);
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
            const size_t packed = PAGE_TOKENS * (size_t)latent_row_bytes(128, 32);
            memcpy(alone.packed.host + page * packed,
                   batch.packed.host +
                       ((uint32_t *)batch.pages.host)[r * batch.pages_stride + b] * packed,
                   packed);
        }
        absorbed_run(&alone);
        assert_memory_equal(alone.ret.host, batch.ret.host + r * alone.ret.bytes, alone.ret.bytes);
        absorbed_drop(&alone);
    }
    absorbed_drop(&batch);
}

static void test_absorbed_rows_are_independent(void **state) {
    rows_are_independent(false);
    rows_are_independent(true);
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
        cmocka_unit_test(test_absorbed_e4m3),
        cmocka_unit_test(test_append),
        cmocka_unit_test(test_widen_latents),
        cmocka_unit_test(test_absorbed_rows_are_independent),
        cmocka_unit_test(test_expanded),
        cmocka_unit_test(test_expanded_rows_are_independent),
        cmocka_unit_test(test_nothing_and_other_widths),
    };
    return cmocka_run_group_tests_name("cuda mla", tests, device_name, NULL);
}
