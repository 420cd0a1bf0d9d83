/* What the step on the device adds to the kernels: routes, replies and their check against a plain
 * form, batched products and grouped rows against the single ones, latents and queries against the
 * CPU's steps. */
#include "kernels/latent.h"
#include "tests/gpu/compare.h"

enum { UNUSED = 0xffff };

/* ---- Exchange ---- */

struct routes {
    struct exchange_cuda x;
    uint32_t experts;
    struct array ticket, expert, destination_of, note, count, row, place;
};

static void routes_make(struct routes *self, uint64_t *random, uint32_t rows, uint32_t k,
                        uint32_t destinations, uint32_t rows_max, uint32_t items_max) {
    self->experts = 16;
    self->ticket = array_make(4);
    self->expert = array_make((size_t)rows * k * 2 + 2);
    self->destination_of = array_make(self->experts * 4);
    self->note = array_make(exchange_note_bytes(rows_max, k) * destinations);
    self->count = array_make(destinations * 4);
    self->row = array_make((size_t)destinations * rows_max * 4);
    self->place = array_make((size_t)rows * k * 4 + 4);
    *(uint32_t *)self->ticket.host = 4096;
    for (uint32_t e = 0; e < self->experts; e++)
        ((int32_t *)self->destination_of.host)[e] =
            (int32_t)random_below(random, destinations + 1) - 1;
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t s = 0; s < k; s++) {
            uint16_t *e = (uint16_t *)self->expert.host + r * k;
            bool again;
            do {
                e[s] = (uint16_t)random_below(random, self->experts);
                again = false;
                for (uint32_t o = 0; o < s; o++)
                    again |= e[o] == e[s];
            } while (again);
            if (random_below(random, 9) == 0)
                e[s] = UNUSED;
        }
    array_put(&self->ticket), array_put(&self->expert), array_put(&self->destination_of);
    array_put(&self->note), array_put(&self->count), array_put(&self->row), array_put(&self->place);
    self->x = (struct exchange_cuda){.rows = rows,
                                     .k = k,
                                     .destinations = destinations,
                                     .rows_max = rows_max,
                                     .items_max = items_max,
                                     .ticket = array_device(&self->ticket),
                                     .layer = 3};
}
static void routes_free(struct routes *self) {
    array_free(&self->ticket), array_free(&self->expert), array_free(&self->destination_of);
    array_free(&self->note), array_free(&self->count), array_free(&self->row);
    array_free(&self->place);
}

/* The plain form: each destination by itself, rows one after the other. */
static void routes_compare(struct routes *self) {
    const struct exchange_cuda *x = &self->x;
    const uint16_t *expert = (const uint16_t *)self->expert.host;
    const int32_t *to = (const int32_t *)self->destination_of.host;
    const uint32_t *place = (const uint32_t *)self->place.host;
    const size_t note_bytes = exchange_note_bytes(x->rows_max, x->k);
    for (uint32_t i = 0; i < x->rows * x->k; i++)
        if (expert[i] == UNUSED || to[expert[i]] < 0)
            assert_int_equal(place[i], UINT32_MAX);
    for (uint32_t d = 0; d < x->destinations; d++) {
        const uint32_t *head = (const uint32_t *)(self->note.host + d * note_bytes);
        const uint16_t *list = exchange_list(head), *number = list + x->rows_max * x->k;
        uint32_t rows = 0, items = 0;
        for (uint32_t r = 0; r < x->rows; r++) {
            uint32_t mine = 0;
            for (uint32_t s = 0; s < x->k; s++) {
                const uint16_t e = expert[r * x->k + s];
                mine += e != UNUSED && to[e] == (int32_t)d;
            }
            const bool fits = rows < x->rows_max && items + mine <= x->items_max;
            if (mine > 0 && rows < x->rows_max)
                assert_int_equal(((uint32_t *)self->row.host)[d * x->rows_max + rows], r);
            for (uint32_t s = 0; mine > 0 && s < x->k; s++) {
                const uint16_t e = expert[r * x->k + s];
                const bool here = e != UNUSED && to[e] == (int32_t)d;
                if (rows < x->rows_max)
                    assert_int_equal(list[rows * x->k + s], here && fits ? e : UNUSED);
                if (here && fits)
                    assert_int_equal(number[rows * x->k + s], items);
                if (here)
                    assert_int_equal(place[r * x->k + s],
                                     fits ? d * x->items_max + items : UINT32_MAX);
                items += here;
            }
            rows += mine > 0;
        }
        rows = rows < x->rows_max ? rows : x->rows_max;
        for (uint32_t i = rows * x->k; i < x->rows_max * x->k; i++)
            assert_int_equal(list[i], UNUSED);
        assert_int_equal(head[0], 4096 + 3);
        assert_int_equal(head[1], rows);
        assert_int_equal(((uint32_t *)self->count.host)[d], rows);
    }
}

static void test_routes(void **state) {
    (void)state;
    const struct {
        uint32_t rows, k, destinations, rows_max, items_max;
    } cases[] = {{1, 1, 1, 1, 1},    {5, 4, 1, 5, 20}, {33, 4, 3, 33, 132}, {64, 2, 2, 10, 128},
                 {70, 4, 2, 70, 40}, {0, 4, 2, 4, 16}, {40, 8, 5, 7, 11}};
    uint64_t random = 21;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (uint64_t seed = 1; seed <= SCHEDULES; seed++) {
            struct routes routes;
            routes_make(&routes, &random, cases[i].rows, cases[i].k, cases[i].destinations,
                        cases[i].rows_max, cases[i].items_max);
            gpu_schedule(seed);
            assert_int_equal(
                exchange_route_cuda(NULL, &routes.x, array_device(&routes.expert),
                                    array_device(&routes.destination_of), routes.experts,
                                    array_device(&routes.note), array_device(&routes.count),
                                    array_device(&routes.row), array_device(&routes.place)),
                0);
            array_get(&routes.note), array_get(&routes.count), array_get(&routes.row);
            array_get(&routes.place);
            routes_compare(&routes);
            routes_free(&routes);
        }
}

/* A row whose items are all answered keeps its list; one that lacks an item (no place, an old
 * status) loses that and becomes void, at the first layer where it happens. */
static void test_check(void **state) {
    (void)state;
    enum { ROWS = 5, K = 2, ITEMS = 6 };
    const uint16_t expert[ROWS * K] = {1, 2, 3, UNUSED, 4, 5, 6, 7, UNUSED, UNUSED};
    const uint32_t place[ROWS * K] = {0, 1, 2, UINT32_MAX, 3, UINT32_MAX, 4, 6, 0, 0};
    const uint32_t status[ITEMS] = {12, 12, 12, 12, 11, 12};
    const uint16_t expected[ROWS * K] = {1,      2,      3,      UNUSED, 4,
                                         UNUSED, UNUSED, UNUSED, UNUSED, UNUSED};
    const uint32_t voids[ROWS] = {0, 0, 2, 3, 0}; /* row 2 was void before */
    struct array ticket = array_make(4), e = array_make(sizeof expert),
                 p = array_make(sizeof place), s = array_make(sizeof status),
                 to = array_make(sizeof expert), v = array_make(sizeof voids);
    *(uint32_t *)ticket.host = 10;
    memcpy(e.host, expert, sizeof expert);
    memcpy(p.host, place, sizeof place);
    memcpy(s.host, status, sizeof status);
    ((uint32_t *)v.host)[2] = 2;
    array_put(&ticket), array_put(&e), array_put(&p), array_put(&s), array_put(&to), array_put(&v);
    const struct exchange_cuda x = {.rows = ROWS,
                                    .k = K,
                                    .destinations = 1,
                                    .rows_max = ROWS,
                                    .items_max = ITEMS,
                                    .ticket = array_device(&ticket),
                                    .layer = 2};
    assert_int_equal(exchange_check_cuda(NULL, &x, array_device(&e), array_device(&p),
                                         array_device(&s), array_device(&to), array_device(&v)),
                     0);
    array_get(&to), array_get(&v);
    assert_same(&to, expected, "lists");
    assert_same(&v, voids, "void rows");
    array_free(&ticket), array_free(&e), array_free(&p), array_free(&s), array_free(&to),
        array_free(&v);
}

static void test_reply(void **state) {
    (void)state;
    enum { ROWS_MAX = 3, K = 2, ITEMS = 4, HIDDEN = 300, STRIDE = 301, PLACES = 9 };
    const uint32_t head[EXCHANGE_HEAD] = {77, 2, 4, 0};
    /* number 9 is a lie: there is no such item */
    const uint16_t list[ROWS_MAX * K] = {5, UNUSED, 6, 7, 8, UNUSED},
                                   number[ROWS_MAX * K] = {0, 0, 1, 2, 9, 3};
    const uint32_t place[ROWS_MAX * K] = {8, UINT32_MAX, 0, UINT32_MAX, 2, 1};
    uint64_t random = 5;
    struct array note = array_make(exchange_note_bytes(ROWS_MAX, K)), p = array_make(sizeof place),
                 y = array_make(PLACES * STRIDE * 4), status = array_make(ITEMS * 4),
                 output = array_make(ITEMS * HIDDEN * 4);
    memcpy(note.host, head, sizeof head);
    memcpy(note.host + sizeof head, list, sizeof list);
    memcpy(note.host + sizeof head + sizeof list, number, sizeof number);
    memcpy(p.host, place, sizeof place);
    fill_floats(&y, &random, -1, 1);
    array_put(&note), array_put(&p), array_put(&y), array_put(&status), array_put(&output);
    assert_int_equal(exchange_reply_cuda(NULL, array_device(&note), ROWS_MAX, K, ITEMS,
                                         array_device(&p), array_device(&y), STRIDE, HIDDEN,
                                         array_device(&status), array_device(&output)),
                     0);
    array_get(&status), array_get(&output);
    const uint32_t *s = (uint32_t *)status.host;
    assert_int_equal(s[0], 77);
    assert_int_equal(s[1], 77);
    assert_int_equal(s[2], 0); /* not held */
    assert_memory_equal(output.host, y.host + 8 * STRIDE * 4, HIDDEN * 4);
    assert_memory_equal(output.host + HIDDEN * 4, y.host, HIDDEN * 4);
    array_free(&note), array_free(&p), array_free(&y), array_free(&status), array_free(&output);
}

/* ---- Grouped and batched forms against the single ones ---- */

static void test_grouped_rows(void **state) {
    (void)state;
    enum { GROUPS = 3, CAPACITY = 4, N = 200, STRIDE = 256, BLOCKS = 2, ROWS = GROUPS * CAPACITY };
    const uint32_t counts[GROUPS] = {2, 0, 4};
    uint64_t random = 9;
    struct array gate = array_make(ROWS * STRIDE * 4), up = array_make(ROWS * STRIDE * 4),
                 count = array_make(sizeof counts), all = array_make(ROWS * STRIDE * 2),
                 some = array_make(ROWS * STRIDE * 2), q_all = array_make(ROWS * STRIDE),
                 q_some = array_make(ROWS * STRIDE), s_all = array_make(ROWS * BLOCKS * 4),
                 s_some = array_make(ROWS * BLOCKS * 4);
    fill_floats(&gate, &random, -3, 3);
    fill_floats(&up, &random, -3, 3);
    memcpy(count.host, counts, sizeof counts);
    array_put(&gate), array_put(&up), array_put(&count), array_put(&all), array_put(&some);
    array_put(&q_all), array_put(&q_some), array_put(&s_all), array_put(&s_some);
    silu_mul_cuda(NULL, array_device(&gate), array_device(&up), STRIDE, ROWS, N, array_device(&all),
                  STRIDE);
    silu_mul_grouped_cuda(NULL, array_device(&gate), array_device(&up), STRIDE,
                          array_device(&count), GROUPS, CAPACITY, N, array_device(&some), STRIDE);
    quantise_bf16_cuda(NULL, array_device(&all), STRIDE, ROWS, N, array_device(&q_all), STRIDE,
                       array_device(&s_all), 1, ROWS);
    quantise_grouped_cuda(NULL, array_device(&all), STRIDE, array_device(&count), GROUPS, CAPACITY,
                          N, array_device(&q_some), STRIDE, array_device(&s_some), 1, ROWS);
    array_get(&all), array_get(&some), array_get(&q_all), array_get(&q_some), array_get(&s_all),
        array_get(&s_some);
    for (uint32_t r = 0; r < ROWS; r++) {
        const bool counts_here = r % CAPACITY < counts[r / CAPACITY];
        const bool same = memcmp(all.host + r * STRIDE * 2, some.host + r * STRIDE * 2, N * 2) == 0;
        const bool q_same = memcmp(q_all.host + r * STRIDE, q_some.host + r * STRIDE, STRIDE) == 0;
        assert_true(same == counts_here && q_same == counts_here);
        assert_true((((float *)s_all.host)[r] == ((float *)s_some.host)[r]) == counts_here);
    }
    array_free(&gate), array_free(&up), array_free(&count), array_free(&all), array_free(&some);
    array_free(&q_all), array_free(&q_some), array_free(&s_all), array_free(&s_some);
}

/* Heads as groups: the slices of x lie closer than a tile is wide. */
static void test_batched_products(void **state) {
    (void)state;
    const struct {
        uint32_t rows, groups, n, k, x_step, y_step;
    } cases[] = {{1, 3, 16, 32, 32, 16}, {5, 4, 128, 32, 32, 160}, {70, 2, 130, 128, 128, 130}};
    uint64_t random = 4;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const uint32_t rows = cases[i].rows, groups = cases[i].groups, n = cases[i].n,
                       k = cases[i].k, xs = cases[i].x_step, ys = cases[i].y_step;
        struct array x = array_make((size_t)rows * groups * xs * 2),
                     w = array_make((size_t)groups * n * k * 2),
                     together = array_make((size_t)rows * groups * ys * 4),
                     alone = array_make((size_t)rows * groups * ys * 4);
        fill_bf16(&x, &random, -1, 1);
        fill_bf16(&w, &random, -1, 1);
        array_put(&x), array_put(&w), array_put(&together), array_put(&alone);
        struct gemm_args args = {.rows = rows,
                                 .n = n,
                                 .k = k,
                                 .groups = groups,
                                 .x_group_step = xs,
                                 .y_group_step = ys,
                                 .y = array_device(&together),
                                 .y_stride = groups * ys};
        struct gemm_cuda plan;
        assert_int_equal(gemm_plan_cuda(&plan, false, array_device(&x), groups * xs * 2,
                                        array_device(&w), k * 2, &args),
                         0);
        assert_int_equal(gemm_run_cuda(NULL, &plan), 0);
        args.groups = 1;
        args.x_group_step = args.y_group_step = 0;
        for (uint32_t g = 0; g < groups; g++) {
            args.y = (float *)array_device(&alone) + g * ys;
            gemm_plan_cuda(&plan, false, (bf16 *)array_device(&x) + g * xs, groups * xs * 2,
                           (bf16 *)array_device(&w) + (size_t)g * n * k, k * 2, &args);
            assert_int_equal(gemm_run_cuda(NULL, &plan), 0);
        }
        array_get(&together), array_get(&alone);
        assert_same(&together, alone.host, "batched product");
        array_free(&x), array_free(&w), array_free(&together), array_free(&alone);
    }
}

/* ---- Gate by row ---- */

static void test_gate_rows(void **state) {
    (void)state;
    enum { ROWS = 5, LIVE = 4, EXPERTS = 16, K = 3 };
    const uint32_t delta_of[ROWS] = {UINT32_MAX, 0, 1, UINT32_MAX, 0}, live = LIVE;
    const struct gate_cuda gate = {.normalise = true,
                                   .experts = EXPERTS,
                                   .groups = 4,
                                   .groups_chosen = 2,
                                   .k = K,
                                   .scaling = 2};
    uint64_t random = 3;
    struct array logits = array_make(ROWS * EXPERTS * 4), own = array_make(EXPERTS * 4),
                 delta = array_make(2 * EXPERTS * 4), of = array_make(sizeof delta_of),
                 count = array_make(4), expert = array_make(ROWS * K * 2),
                 weight = array_make(ROWS * K * 4), sum = array_make(EXPERTS * 4),
                 one = array_make(K * 2), one_weight = array_make(K * 4);
    fill_floats(&logits, &random, -2, 2);
    fill_floats(&own, &random, -1, 1);
    fill_floats(&delta, &random, -1, 1);
    memcpy(of.host, delta_of, sizeof delta_of);
    memcpy(count.host, &live, 4);
    array_put(&logits), array_put(&own), array_put(&delta), array_put(&of), array_put(&count);
    array_put(&expert), array_put(&weight), array_put(&one), array_put(&one_weight);
    const struct gate_rows_cuda rows = {.live = array_device(&count),
                                        .delta = array_device(&delta),
                                        .delta_stride = EXPERTS,
                                        .delta_of = array_device(&of)};
    assert_int_equal(gate_rows_cuda(NULL, &gate, &rows, array_device(&logits), EXPERTS,
                                    array_device(&own), ROWS, array_device(&expert),
                                    array_device(&weight)),
                     0);
    array_get(&expert), array_get(&weight);
    for (uint32_t r = 0; r < ROWS; r++) {
        if (r >= LIVE) {
            for (uint32_t s = 0; s < K; s++)
                assert_int_equal(((uint16_t *)expert.host)[r * K + s], UNUSED);
            continue;
        }
        for (uint32_t e = 0; e < EXPERTS; e++)
            ((float *)sum.host)[e] =
                ((float *)own.host)[e] +
                (delta_of[r] == UINT32_MAX ? 0 : ((float *)delta.host)[delta_of[r] * EXPERTS + e]);
        array_put(&sum);
        gate_cuda(NULL, &gate, (float *)array_device(&logits) + r * EXPERTS, EXPERTS,
                  array_device(&sum), 1, array_device(&one), array_device(&one_weight));
        array_get(&one), array_get(&one_weight);
        assert_memory_equal(expert.host + r * K * 2, one.host, K * 2);
        assert_memory_equal(weight.host + r * K * 4, one_weight.host, K * 4);
    }
    array_free(&logits), array_free(&own), array_free(&delta), array_free(&of), array_free(&count);
    array_free(&expert), array_free(&weight), array_free(&sum), array_free(&one),
        array_free(&one_weight);
}

/* ---- Latents and queries ---- */

enum { MLA_ROWS = 3, ROPE = 24, CONTEXT = 200 };
static const uint32_t mla_position[MLA_ROWS] = {5, 70, 130};
static float cos_sin[CONTEXT * ROPE];

/* ret: [activation_stride(ROPE)] */
static void rotated(const struct kernels *cpu, const float *from, uint32_t position, bf16 *ret) {
    const size_t wide = activation_stride(ROPE);
    float part[64] = {0};
    memcpy(part, from, ROPE * sizeof *part);
    cpu->rope(part, wide, 1, ROPE, cos_sin + position * ROPE);
    cpu->convert(part, wide, 1, (uint32_t)wide, ret, wide);
}

static const struct kernels *mla_cpu(void) {
    struct failure failure;
    const struct rope_parameters parameters = {.theta = 10000};
    rope_table(&parameters, ROPE, 0, CONTEXT, cos_sin);
    return kernels_select(PROFILE_BF16, ISA_SCALAR, &failure);
}

/* Normed, rotated and stored in one go: in either form what the steps give one by one. */
static void test_latents(void **state) {
    (void)state;
    enum { LORA = 72, PAGES = 4 };
    const uint32_t table[MLA_ROWS * 3] = {2, 9, 9, 9, 0, 9, 9, 9, 3}, kv_width = LORA + ROPE;
    const size_t lora_wide = activation_stride(LORA), stride = cache_stride(LORA, ROPE);
    const struct kernels *cpu = mla_cpu();
    uint64_t random = 8;
    struct array kv = array_make(MLA_ROWS * kv_width * 4), weight = array_make(LORA * 4),
                 angles = array_make(sizeof cos_sin), at = array_make(sizeof mla_position),
                 pages = array_make(sizeof table);
    fill_floats(&kv, &random, -2, 2);
    fill_floats(&weight, &random, 0, 2);
    memcpy(angles.host, cos_sin, sizeof cos_sin);
    memcpy(at.host, mla_position, sizeof mla_position);
    memcpy(pages.host, table, sizeof table);
    array_put(&kv), array_put(&weight), array_put(&angles), array_put(&at), array_put(&pages);
    for (int e4m3 = 0; e4m3 < 2; e4m3++) {
        const size_t row_bytes = e4m3 ? latent_row_bytes(LORA, ROPE) : stride * sizeof(bf16);
        struct array cache = array_make(PAGES * 64 * row_bytes);
        fill_bytes(&cache, 0x44);
        array_put(&cache);
        const struct latent_append_cuda args = {.rows = MLA_ROWS,
                                                .kv_lora = LORA,
                                                .rope = ROPE,
                                                .latent = array_device(&kv),
                                                .latent_stride = kv_width,
                                                .norm = array_device(&weight),
                                                .eps = 1e-6f,
                                                .key = (float *)array_device(&kv) + LORA,
                                                .key_stride = kv_width,
                                                .cos_sin = array_device(&angles),
                                                .position = array_device(&at),
                                                .pages = array_device(&pages),
                                                .pages_stride = 3,
                                                .cache = array_device(&cache)};
        assert_int_equal(latent_append_cuda(NULL, e4m3 != 0, &args), 0);
        array_get(&cache);
        for (uint32_t r = 0; r < MLA_ROWS; r++) {
            bf16 normed[256] = {0};
            uint8_t expected[512] = {0};
            const float *from = (const float *)kv.host + r * kv_width;
            cpu->rms_norm(from, LORA, (const float *)weight.host, 1e-6f, 1, LORA, normed,
                          lora_wide);
            if (e4m3)
                latent_quantise(normed, LORA, expected,
                                (float *)(expected + latent_scale_at(LORA)));
            else
                memcpy(expected, normed, LORA * sizeof(bf16));
            rotated(cpu, from + LORA, mla_position[r],
                    (bf16 *)(expected + (e4m3 ? latent_rope_at(LORA) : lora_wide * sizeof(bf16))));
            const size_t entry = table[r * 3 + mla_position[r] / 64] * 64u + mla_position[r] % 64;
            assert_memory_equal(cache.host + entry * row_bytes, expected, row_bytes);
        }
        array_free(&cache);
    }
    array_free(&kv), array_free(&weight), array_free(&angles), array_free(&at), array_free(&pages);
}

static void test_queries(void **state) {
    (void)state;
    enum { HEADS = 2, NOPE = 40, LORA_WIDE = 96 };
    const size_t nope_wide = activation_stride(NOPE), rope_wide = activation_stride(ROPE),
                 stride = LORA_WIDE + rope_wide, q_width = HEADS * (NOPE + ROPE);
    const struct kernels *cpu = mla_cpu();
    uint64_t random = 9;
    struct array q = array_make(MLA_ROWS * q_width * 4), angles = array_make(sizeof cos_sin),
                 at = array_make(sizeof mla_position),
                 nope = array_make(MLA_ROWS * HEADS * nope_wide * 2),
                 query = array_make(MLA_ROWS * HEADS * stride * 2);
    fill_floats(&q, &random, -2, 2);
    memcpy(angles.host, cos_sin, sizeof cos_sin);
    memcpy(at.host, mla_position, sizeof mla_position);
    array_put(&q), array_put(&angles), array_put(&at), array_put(&nope), array_put(&query);
    const struct mla_rows_cuda args = {.heads = HEADS,
                                       .nope = NOPE,
                                       .rope = ROPE,
                                       .cos_sin = array_device(&angles),
                                       .position = array_device(&at)};
    assert_int_equal(mla_query_cuda(NULL, &args, array_device(&q), q_width, MLA_ROWS,
                                    array_device(&nope), nope_wide,
                                    (bf16 *)array_device(&query) + LORA_WIDE, stride),
                     0);
    array_get(&nope), array_get(&query);
    for (uint32_t i = 0; i < MLA_ROWS * HEADS; i++) {
        bf16 expected[64];
        float part[64] = {0};
        const float *head = (const float *)q.host + i * (NOPE + ROPE);
        memcpy(part, head, NOPE * 4);
        cpu->convert(part, nope_wide, 1, (uint32_t)nope_wide, expected, nope_wide);
        assert_memory_equal(nope.host + i * nope_wide * 2, expected, nope_wide * 2);
        rotated(cpu, head + NOPE, mla_position[i / HEADS], expected);
        assert_memory_equal(query.host + (i * stride + LORA_WIDE) * 2, expected, rope_wide * 2);
    }
    array_free(&q), array_free(&angles), array_free(&at), array_free(&nope), array_free(&query);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_routes),
        cmocka_unit_test(test_check),
        cmocka_unit_test(test_reply),
        cmocka_unit_test(test_grouped_rows),
        cmocka_unit_test(test_batched_products),
        cmocka_unit_test(test_gate_rows),
        cmocka_unit_test(test_latents),
        cmocka_unit_test(test_queries),
    };
    return cmocka_run_group_tests_name("cuda exchange", tests, device_name, NULL);
}
