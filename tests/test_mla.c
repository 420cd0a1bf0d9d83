/* Multi-head latent attention: every form against double precision, the two forms against each
 * other, and the promise that the bits of a row depend on its own position and the cache only. */
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

enum { SEED = 20 };

/* What is attended to, as floats that BF16 holds exactly. */
struct scene {
    struct mla_shape shape;
    uint32_t context, rows; /* the rows are the last positions */
    float *w;               /* [heads * (nope + v)][kv_lora] */
    float *latent;          /* [context][kv_lora] */
    float *key;             /* [context][rope] */
    float *q;               /* [rows][heads][nope + rope] */
};

/* The same, laid out for one table of kernels. */
struct laid {
    const struct kernels *k;
    const struct scene *scene;
    struct matrix kv_b;
    void *kv_b_memory;
    bf16 *w;
    uint32_t pages;
    void **page;
    uint32_t *position;
    const void *const **tables; /* [rows], all of them `page` */
    size_t q_stride, absorbed_stride, ret_stride, absorbed_ret_stride; /* elements */
    char *q_expanded, *q_absorbed;
};

static float gaussian(uint64_t *random) {
    float sum = 0;
    for (int i = 0; i < 12; i++)
        sum += random_float(random, -0.5f, 0.5f);
    return sum;
}

static float *random_floats(uint64_t *random, size_t n, float scale) {
    float *ret = malloc(n * sizeof(float));
    for (size_t i = 0; i < n; i++)
        ret[i] = bf16_to_float(bf16_from_float(gaussian(random) * scale));
    return ret;
}

static void *zeroed(size_t bytes) {
    bytes = (bytes + 64) / 64 * 64;
    void *ret = aligned_alloc(64, bytes);
    memset(ret, 0, bytes);
    return ret;
}

static struct scene scene_make(struct mla_shape shape, uint32_t context, uint32_t rows,
                               float q_scale) {
    uint64_t random = SEED + context * 1000 + shape.kv_lora * 7 + shape.rope;
    struct scene s = {.shape = shape, .context = context, .rows = rows < context ? rows : context};
    s.shape.scale = 1.0f / sqrtf((float)(shape.nope + shape.rope));
    s.w = random_floats(&random, (size_t)shape.heads * (shape.nope + shape.v) * shape.kv_lora,
                        1.0f / sqrtf((float)shape.kv_lora));
    s.latent = random_floats(&random, (size_t)context * shape.kv_lora, 1);
    s.key = random_floats(&random, (size_t)context * shape.rope, 1);
    s.q = random_floats(&random, (size_t)s.rows * shape.heads * (shape.nope + shape.rope), q_scale);
    return s;
}

static void scene_free(struct scene *s) {
    free(s->w), free(s->latent), free(s->key), free(s->q);
}

/* q_nope W_UK in double precision: [rows][heads][kv_lora]. */
static float *absorb(const struct scene *s) {
    const struct mla_shape *shape = &s->shape;
    float *ret = malloc((size_t)s->rows * shape->heads * shape->kv_lora * sizeof(float));
    for (uint32_t i = 0; i < s->rows * shape->heads; i++) {
        const float *w =
            s->w + (size_t)(i % shape->heads) * (shape->nope + shape->v) * shape->kv_lora;
        for (uint32_t c = 0; c < shape->kv_lora; c++) {
            double sum = 0;
            for (uint32_t n = 0; n < shape->nope; n++)
                sum += (double)s->q[(size_t)i * (shape->nope + shape->rope) + n] *
                       w[(size_t)n * shape->kv_lora + c];
            ret[(size_t)i * shape->kv_lora + c] = (float)sum;
        }
    }
    return ret;
}

static struct laid lay(const struct scene *s, const struct kernels *k) {
    const struct mla_shape *shape = &s->shape;
    const uint32_t heads = shape->heads, nope = shape->nope, rope = shape->rope;
    struct laid l = {.k = k, .scene = s};
    const size_t unit = k->activation_bytes, stride = cache_stride(shape->kv_lora, rope);

    const uint32_t n = heads * (nope + shape->v);
    l.w = malloc((size_t)n * shape->kv_lora * sizeof(bf16));
    for (size_t i = 0; i < (size_t)n * shape->kv_lora; i++)
        l.w[i] = bf16_from_float(s->w[i]);
    struct weight_view view = {DTYPE_BF16, l.w, n, shape->kv_lora, shape->kv_lora, .block = 128};
    l.kv_b_memory = zeroed(k->matrix_bytes(&view));
    k->matrix_pack(&l.kv_b, &view, l.kv_b_memory);

    l.pages = (s->context + PAGE_TOKENS - 1) / PAGE_TOKENS;
    l.page = malloc(l.pages * sizeof(*l.page));
    for (uint32_t p = 0; p < l.pages; p++)
        l.page[p] = zeroed(PAGE_TOKENS * stride * unit);
    for (uint32_t i = 0; i < s->context; i++) {
        char *row = (char *)l.page[i / PAGE_TOKENS] + i % PAGE_TOKENS * stride * unit;
        k->convert(s->latent + (size_t)i * shape->kv_lora, 0, 1, shape->kv_lora, row, 0);
        k->convert(s->key + (size_t)i * rope, 0, 1, rope,
                   row + activation_stride(shape->kv_lora) * unit, 0);
    }

    l.position = malloc(s->rows * sizeof(*l.position));
    l.tables = malloc(s->rows * sizeof(*l.tables));
    for (uint32_t r = 0; r < s->rows; r++) {
        l.position[r] = s->context - s->rows + r;
        l.tables[r] = (const void *const *)l.page;
    }

    const size_t vectors = (size_t)s->rows * heads;
    l.q_stride = cache_stride(nope, rope);
    l.absorbed_stride = stride;
    l.ret_stride = activation_stride((size_t)heads * shape->v);
    l.absorbed_ret_stride = activation_stride(shape->kv_lora);
    l.q_expanded = zeroed(vectors * l.q_stride * unit);
    k->convert(s->q, nope + rope, (uint32_t)vectors, nope, l.q_expanded, l.q_stride);
    k->convert(s->q + nope, nope + rope, (uint32_t)vectors, rope,
               l.q_expanded + activation_stride(nope) * unit, l.q_stride);
    float *absorbed = absorb(s);
    l.q_absorbed = zeroed(vectors * l.absorbed_stride * unit);
    k->convert(absorbed, shape->kv_lora, (uint32_t)vectors, shape->kv_lora, l.q_absorbed,
               l.absorbed_stride);
    k->convert(s->q + nope, nope + rope, (uint32_t)vectors, rope,
               l.q_absorbed + activation_stride(shape->kv_lora) * unit, l.absorbed_stride);
    free(absorbed);
    return l;
}

static void laid_free(struct laid *l) {
    for (uint32_t p = 0; p < l->pages; p++)
        free(l->page[p]);
    free(l->page), free(l->w), free(l->kv_b_memory), free(l->position), free(l->tables);
    free(l->q_expanded), free(l->q_absorbed);
}

/* Results of rows [first, first + count), at their places in `ret`. */
static void run_expanded(const struct laid *l, uint32_t first, uint32_t count, char *ret,
                         const struct parallel *parallel) {
    const struct mla_shape *shape = &l->scene->shape;
    const size_t unit = l->k->activation_bytes;
    struct mla_rows rows = {count, l->position + first, l->tables + first};
    l->k->mla_expanded(shape, &rows, &l->kv_b,
                       l->q_expanded + (size_t)first * shape->heads * l->q_stride * unit,
                       l->q_stride, ret + first * l->ret_stride * unit, l->ret_stride, parallel);
}

static void run_absorbed(const struct laid *l, uint32_t first, uint32_t count, char *ret,
                         const struct parallel *parallel) {
    const struct mla_shape *shape = &l->scene->shape;
    const size_t unit = l->k->activation_bytes, before = (size_t)first * shape->heads;
    struct mla_rows rows = {count, l->position + first, l->tables + first};
    l->k->mla_absorbed(shape, &rows, l->q_absorbed + before * l->absorbed_stride * unit,
                       l->absorbed_stride, ret + before * l->absorbed_ret_stride * unit,
                       l->absorbed_ret_stride, parallel);
}

typedef void form_function(const struct laid *l, uint32_t first, uint32_t count, char *ret,
                           const struct parallel *parallel);
static const struct form {
    const char *name;
    form_function *run;
} FORMS[] = {{"expanded", run_expanded}, {"absorbed", run_absorbed}};

static size_t result_bytes(const struct laid *l, form_function *form) {
    const size_t expanded = l->scene->rows * l->ret_stride;
    const size_t absorbed = (size_t)l->scene->rows * l->scene->shape.heads * l->absorbed_ret_stride;
    return (form == run_expanded ? expanded : absorbed) * l->k->activation_bytes;
}

/* The whole call at once. Filled with rubbish before, so that padding that is not written shows. */
static char *result(const struct laid *l, form_function *form) {
    const size_t bytes = result_bytes(l, form);
    char *ret = malloc(bytes);
    memset(ret, 0x5a, bytes);
    form(l, 0, l->scene->rows, ret, &PARALLEL_SERIAL);
    return ret;
}

/* [rows][heads][v] in double precision, no blocks, no running maximum. */
static double *attention_double(const struct scene *s) {
    const struct mla_shape *shape = &s->shape;
    const uint32_t kv_lora = shape->kv_lora, width = shape->nope + shape->v;
    double *ret = calloc((size_t)s->rows * shape->heads * shape->v, sizeof(double));
    double *weight = malloc(s->context * sizeof(double));
    double *kv = malloc((size_t)s->context * width * sizeof(double));
    for (uint32_t h = 0; h < shape->heads; h++) {
        for (uint32_t i = 0; i < s->context * width; i++) {
            kv[i] = 0;
            for (uint32_t c = 0; c < kv_lora; c++)
                kv[i] += (double)s->w[((size_t)h * width + i % width) * kv_lora + c] *
                         s->latent[(size_t)(i / width) * kv_lora + c];
        }
        for (uint32_t r = 0; r < s->rows; r++) {
            const float *q = s->q + ((size_t)r * shape->heads + h) * (shape->nope + shape->rope);
            const uint32_t seen = s->context - s->rows + r + 1;
            double maximum = -INFINITY, sum = 0;
            for (uint32_t i = 0; i < seen; i++) {
                weight[i] = 0;
                for (uint32_t n = 0; n < shape->nope; n++)
                    weight[i] += q[n] * kv[(size_t)i * width + n];
                for (uint32_t n = 0; n < shape->rope; n++)
                    weight[i] += (double)q[shape->nope + n] * s->key[(size_t)i * shape->rope + n];
                weight[i] *= shape->scale;
                maximum = fmax(maximum, weight[i]);
            }
            for (uint32_t i = 0; i < seen; i++)
                sum += weight[i] = exp(weight[i] - maximum);
            for (uint32_t i = 0; i < seen; i++)
                for (uint32_t d = 0; d < shape->v; d++)
                    ret[((size_t)r * shape->heads + h) * shape->v + d] +=
                        weight[i] / sum * kv[(size_t)i * width + shape->nope + d];
        }
    }
    free(weight), free(kv);
    return ret;
}

static double element(const struct kernels *k, const char *data, size_t i) {
    return k->activation_bytes == 4 ? ((const float *)data)[i]
                                    : bf16_to_float(((const bf16 *)data)[i]);
}

static double expanded_error(const struct laid *l, const char *ret, const double *expected) {
    const struct mla_shape *shape = &l->scene->shape;
    const uint32_t width = shape->heads * shape->v;
    double worst = 0;
    for (uint32_t r = 0; r < l->scene->rows; r++) {
        for (uint32_t i = 0; i < l->ret_stride; i++) {
            double want = i < width ? expected[(size_t)r * width + i] : 0;
            double error = fabs(element(l->k, ret, r * l->ret_stride + i) - want);
            worst = error > worst || error != error ? error : worst;
        }
    }
    return worst;
}

/* Multiplies by the value half of kv_b, in double precision, first. */
static double absorbed_error(const struct laid *l, const char *ret, const double *expected) {
    const struct mla_shape *shape = &l->scene->shape;
    double worst = 0;
    for (uint32_t i = 0; i < l->scene->rows * shape->heads; i++) {
        const uint32_t h = i % shape->heads;
        for (uint32_t c = shape->kv_lora; c < l->absorbed_ret_stride; c++)
            if (element(l->k, ret, i * l->absorbed_ret_stride + c) != 0)
                return INFINITY;
        for (uint32_t d = 0; d < shape->v; d++) {
            const float *w =
                l->scene->w +
                ((size_t)h * (shape->nope + shape->v) + shape->nope + d) * shape->kv_lora;
            double sum = 0;
            for (uint32_t c = 0; c < shape->kv_lora; c++)
                sum += w[c] * element(l->k, ret, i * l->absorbed_ret_stride + c);
            double error = fabs(sum - expected[(size_t)i * shape->v + d]);
            worst = error > worst || error != error ? error : worst;
        }
    }
    return worst;
}

static const struct kernels *table(enum profile profile, enum isa isa) {
    struct failure failure;
    return kernels_select(profile, isa, &failure);
}

static const struct mla_shape ODD = {.heads = 3, .nope = 17, .rope = 10, .v = 24, .kv_lora = 40};

static void test_close_to_double(void **state) {
    static const struct mla_shape shapes[] = {
        {.heads = 1, .nope = 32, .rope = 2, .v = 1, .kv_lora = 64},
        {.heads = 3, .nope = 17, .rope = 10, .v = 24, .kv_lora = 40},
        {.heads = 4, .nope = 128, .rope = 64, .v = 128, .kv_lora = 512},
    };
    static const uint32_t contexts[] = {1, 64, 200};
    const struct kernels *tables[] = {table(PROFILE_F32, ISA_SCALAR),
                                      table(PROFILE_BF16, ISA_BEST)};
    const double tolerance[] = {4e-6, 2.5e-2};
    for (size_t i = 0; i < 9; i++) {
        struct scene s = scene_make(shapes[i / 3], contexts[i % 3], 5, 1);
        double *expected = attention_double(&s);
        for (size_t t = 0; t < 2; t++) {
            struct laid l = lay(&s, tables[t]);
            char *expanded = result(&l, run_expanded), *absorbed = result(&l, run_absorbed);
            double expanded_worst = expanded_error(&l, expanded, expected);
            double absorbed_worst = absorbed_error(&l, absorbed, expected);
            printf("%-12s heads %u kv_lora %3u context %3u: error expanded %.2g, absorbed %.2g\n",
                   tables[t]->name, s.shape.heads, s.shape.kv_lora, s.context, expanded_worst,
                   absorbed_worst);
            assert_true(expanded_worst <= tolerance[t]);
            assert_true(absorbed_worst <= tolerance[t]);
            free(expanded), free(absorbed);
            laid_free(&l);
        }
        free(expected);
        scene_free(&s);
    }
}

static void test_forms_of_bf16_agree_bit_for_bit(void **state) {
    static const uint32_t heads[] = {1, 3, 9}, ropes[] = {2, 10, 64}, loras[] = {40, 64, 512},
                          contexts[] = {1, 63, 64, 65, 200};
    const struct kernels *scalar = table(PROFILE_BF16, ISA_SCALAR);
    int compared = 0;
    for (enum isa isa = ISA_AVX512; isa <= ISA_AMX; isa++) {
        const struct kernels *fast = table(PROFILE_BF16, isa);
        for (uint32_t i = 0; fast && i < 135; i++) {
            struct mla_shape shape = {.heads = heads[i % 3],
                                      .nope = i % 2 ? 17 : 70,
                                      .rope = ropes[i / 3 % 3],
                                      .v = i % 7 ? 24 : 67,
                                      .kv_lora = loras[i / 9 % 3]};
            struct scene s = scene_make(shape, contexts[i / 27], 1 + i % 19, i % 5 ? 1 : 100);
            struct laid a = lay(&s, scalar), b = lay(&s, fast);
            for (size_t f = 0; f < 2; f++) {
                char *x = result(&a, FORMS[f].run), *y = result(&b, FORMS[f].run);
                if (memcmp(x, y, result_bytes(&a, FORMS[f].run)) != 0)
                    fail_msg("%s, %s and %s differ: case %u, seed %d", FORMS[f].name, scalar->name,
                             fast->name, i, SEED);
                compared++;
                free(x), free(y);
            }
            laid_free(&a), laid_free(&b);
            scene_free(&s);
        }
    }
    if (compared == 0)
        skip();
}

/* Runs parts last to first and tells a width of its own. */
static void run_backwards(void *pool, void (*task)(void *argument, int part, int parts),
                          void *argument, int parts) {
    for (int part = parts - 1; part >= 0; part--)
        task(argument, part, parts);
}

static void test_rows_do_not_depend_on_chunks_or_threads(void **state) {
    const struct kernels *tables[] = {table(PROFILE_F32, ISA_SCALAR),
                                      table(PROFILE_BF16, ISA_SCALAR),
                                      table(PROFILE_BF16, ISA_BEST)};
    static const uint32_t chunks[] = {1, 7, 64, 1000};
    static const int widths[] = {1, 2, 3, 7};
    struct scene s = scene_make(ODD, 140, 140, 1);
    for (size_t t = 0; t < 3; t++) {
        struct laid l = lay(&s, tables[t]);
        for (size_t i = 0; i < 8; i++) {
            const struct form *form = &FORMS[i / 4];
            const struct parallel parallel = {run_backwards, NULL, widths[i % 4]};
            const size_t bytes = result_bytes(&l, form->run);
            char *whole = result(&l, form->run), *chunked = malloc(bytes);
            memset(chunked, 0x5a, bytes);
            for (uint32_t first = 0; first < s.rows; first += chunks[i % 4]) {
                uint32_t left = s.rows - first, chunk = chunks[i % 4];
                form->run(&l, first, left < chunk ? left : chunk, chunked, &parallel);
            }
            if (memcmp(whole, chunked, bytes) != 0)
                fail_msg("%s %s: chunks of %u, width %d", tables[t]->name, form->name,
                         chunks[i % 4], widths[i % 4]);
            free(whole), free(chunked);
        }
        laid_free(&l);
    }
    scene_free(&s);
}

/* What lies beyond a row's position, its own chunk's later rows or an earlier tenant of the page,
 * has no effect. */
static void test_hidden_positions_have_no_effect(void **state) {
    const struct kernels *tables[] = {table(PROFILE_F32, ISA_SCALAR),
                                      table(PROFILE_BF16, ISA_SCALAR),
                                      table(PROFILE_BF16, ISA_BEST)};
    struct scene s = scene_make(ODD, 75, 4, 1);
    const size_t stride = cache_stride(ODD.kv_lora, ODD.rope);
    for (size_t t = 0; t < 3; t++) {
        struct laid l = lay(&s, tables[t]);
        const size_t unit = tables[t]->activation_bytes;
        for (size_t f = 0; f < 2; f++) {
            char *clean = result(&l, FORMS[f].run);
            for (uint32_t j = 75 % PAGE_TOKENS; j < PAGE_TOKENS; j++)
                for (size_t i = 0; i < stride * unit; i++) /* 1e10 and the like */
                    ((char *)l.page[1])[j * stride * unit + i] = i % unit == unit - 1 ? 0x50 : 0x15;
            char *dirty = result(&l, FORMS[f].run);
            assert_memory_equal(clean, dirty, result_bytes(&l, FORMS[f].run));
            memset((char *)l.page[1] + 75 % PAGE_TOKENS * stride * unit, 0,
                   (PAGE_TOKENS - 75 % PAGE_TOKENS) * stride * unit);
            free(clean), free(dirty);
        }
        laid_free(&l);
    }
    scene_free(&s);
}

/* Absorbed rows of a call may belong to different sequences. */
static void test_absorbed_rows_of_two_sequences(void **state) {
    const struct kernels *tables[] = {table(PROFILE_F32, ISA_SCALAR),
                                      table(PROFILE_BF16, ISA_SCALAR),
                                      table(PROFILE_BF16, ISA_BEST)};
    for (size_t t = 0; t < 3; t++) {
        struct scene s[2] = {scene_make(ODD, 70, 1, 1), scene_make(ODD, 131, 1, 1)};
        struct laid l[2] = {lay(&s[0], tables[t]), lay(&s[1], tables[t])};
        const size_t unit = tables[t]->activation_bytes;
        const size_t q_bytes = ODD.heads * l[0].absorbed_stride * unit;
        const size_t ret_bytes = result_bytes(&l[0], run_absorbed);
        char *alone[2] = {result(&l[0], run_absorbed), result(&l[1], run_absorbed)};
        char *q = zeroed(2 * q_bytes), *together = malloc(2 * ret_bytes);
        memcpy(q, l[0].q_absorbed, q_bytes);
        memcpy(q + q_bytes, l[1].q_absorbed, q_bytes);
        uint32_t position[] = {69, 130};
        const void *const *pages[] = {(const void *const *)l[0].page,
                                      (const void *const *)l[1].page};
        struct mla_rows rows = {2, position, pages};
        tables[t]->mla_absorbed(&s[0].shape, &rows, q, l[0].absorbed_stride, together,
                                l[0].absorbed_ret_stride, &PARALLEL_SERIAL);
        assert_memory_equal(together, alone[0], ret_bytes);
        assert_memory_equal(together + ret_bytes, alone[1], ret_bytes);
        free(q), free(together);
        for (int i = 0; i < 2; i++) {
            free(alone[i]);
            laid_free(&l[i]);
            scene_free(&s[i]);
        }
    }
}

/* More rows than fit the accumulators' memory are walked in groups; scores so far apart that all
 * but one position vanish. */
static void test_groups_of_rows_and_sharp_scores(void **state) {
    struct mla_shape wide = {.heads = 256, .nope = 2, .rope = 2, .v = 1024, .kv_lora = 2};
    struct scene s = scene_make(wide, 40, 40, 1000);
    double *expected = attention_double(&s);
    struct laid l = lay(&s, table(PROFILE_F32, ISA_SCALAR));
    char *ret = result(&l, run_expanded);
    assert_true(expanded_error(&l, ret, expected) <= 1e-2);
    free(ret);
    laid_free(&l);
    l = lay(&s, table(PROFILE_BF16, ISA_BEST));
    ret = result(&l, run_expanded);
    char *alone = malloc(result_bytes(&l, run_expanded));
    for (uint32_t r = 0; r < s.rows; r += 13)
        run_expanded(&l, r, 1, alone, &PARALLEL_SERIAL);
    for (uint32_t r = 0; r < s.rows; r += 13)
        assert_memory_equal(ret + r * l.ret_stride * 2, alone + r * l.ret_stride * 2,
                            l.ret_stride * 2);
    free(ret), free(alone), free(expected);
    laid_free(&l);
    scene_free(&s);
}

static void test_no_rows(void **state) {
    struct scene s = scene_make(ODD, 3, 1, 1);
    struct laid l = lay(&s, table(PROFILE_BF16, ISA_BEST));
    run_expanded(&l, 0, 0, NULL, &PARALLEL_SERIAL);
    run_absorbed(&l, 0, 0, NULL, &PARALLEL_SERIAL);
    laid_free(&l);
    scene_free(&s);
}

int main(void) {
    numerics_enter();
    printf("seed %d\n", SEED);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_close_to_double),
        cmocka_unit_test(test_forms_of_bf16_agree_bit_for_bit),
        cmocka_unit_test(test_rows_do_not_depend_on_chunks_or_threads),
        cmocka_unit_test(test_hidden_positions_have_no_effect),
        cmocka_unit_test(test_absorbed_rows_of_two_sequences),
        cmocka_unit_test(test_groups_of_rows_and_sharp_scores),
        cmocka_unit_test(test_no_rows),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    scratch_free();
    return failed;
}
