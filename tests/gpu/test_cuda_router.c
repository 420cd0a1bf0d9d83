/* Gate, dispatch, combine and FP8 quantisation on the device against router/ and plain definitions,
 * bit for bit. */
#include <math.h>

#include "router/combine.h"
#include "router/gate.h"
#include "kernels/internal.h"
#include "tests/gpu/compare.h"

static uint64_t random_state = 20260102;

static void gate_case(const struct gate_parameters *p, uint32_t rows, int kind) {
    const uint32_t stride = p->experts + 3;
    struct array logits = array_make((rows + 1) * stride * 4), bias = array_make(p->experts * 4);
    struct array expert = array_make((rows + 1) * p->k * 2),
                 weight = array_make((rows + 1) * p->k * 4);
    fill_floats(&logits, &random_state, -4, 4);
    fill_floats(&bias, &random_state, -0.5f, 0.5f);
    float *logit = (float *)logits.host;
    static const float odd[] = {NAN, INFINITY, -INFINITY, 0.0f, -0.0f, 200.0f, -200.0f};
    for (uint32_t i = 0; i < rows * stride; i++) {
        if (kind == 1) /* ties everywhere */
            logit[i] = (float)random_below(&random_state, 3);
        if (kind == 2 && random_below(&random_state, 3) == 0)
            logit[i] = odd[random_below(&random_state, 7)];
        if (kind == 3)
            logit[i] = -INFINITY;
    }
    const bool biased = kind % 2 == 0;
    fill_bytes(&expert, 0x22), fill_bytes(&weight, 0x22);
    uint8_t *expected_expert = malloc(expert.bytes), *expected_weight = malloc(weight.bytes);
    memcpy(expected_expert, expert.host, expert.bytes);
    memcpy(expected_weight, weight.host, weight.bytes);
    for (uint32_t r = 0; r < rows; r++)
        gate_choose(p, logit + r * stride, biased ? (const float *)bias.host : NULL,
                    (uint16_t *)expected_expert + r * p->k, (float *)expected_weight + r * p->k);
    const struct gate_cuda parameters = {.softmax = p->scoring == GATE_SOFTMAX,
                                         .group_max = p->group_score == GATE_GROUP_MAX,
                                         .normalise = p->normalise,
                                         .experts = p->experts,
                                         .groups = p->groups,
                                         .groups_chosen = p->groups_chosen,
                                         .k = p->k,
                                         .scaling = p->scaling,
                                         .top_p = p->top_p};
    gpu_schedule(random_next(&random_state));
    array_put(&logits), array_put(&bias), array_put(&expert), array_put(&weight);
    assert_int_equal(gate_cuda(NULL, &parameters, array_device(&logits), stride,
                               biased ? array_device(&bias) : NULL, rows, array_device(&expert),
                               array_device(&weight)),
                     0);
    array_get(&expert), array_get(&weight);
    assert_same(&expert, expected_expert, "experts");
    assert_same(&weight, expected_weight, "weights");
    free(expected_expert), free(expected_weight);
    array_free(&logits), array_free(&bias), array_free(&expert), array_free(&weight);
}

static void test_gate(void **state) {
    static const struct gate_parameters cases[] = {
        {GATE_SIGMOID, 256, 8, 4, GATE_GROUP_TOP2_SUM, 8, true, 2.5f, 0},   /* V3 */
        {GATE_SIGMOID, 384, 1, 1, GATE_GROUP_TOP2_SUM, 8, true, 2.827f, 0}, /* Kimi K2 */
        {GATE_SOFTMAX, 160, 8, 3, GATE_GROUP_MAX, 6, false, 16, 0},         /* V2 */
        {GATE_SOFTMAX, 64, 1, 1, GATE_GROUP_MAX, 6, false, 1, 0},           /* V2-Lite */
        {GATE_SIGMOID, 32, 8, 4, GATE_GROUP_TOP2_SUM, 4, true, 1, 0.3f},    /* top-p */
        {GATE_SOFTMAX, 6, 3, 1, GATE_GROUP_TOP2_SUM, 2, true, 1, 0.9f},
        {GATE_SIGMOID, 1, 1, 1, GATE_GROUP_MAX, 1, false, 1, 0},
        {GATE_SOFTMAX, 1024, 64, 32, GATE_GROUP_TOP2_SUM, 32, true, 1, 0.5f},
    };
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++)
        for (int kind = 0; kind < 4; kind++)
            gate_case(&cases[c], kind == 3 ? 0 : 5, kind);
    for (int kind = 0; kind < 4; kind++)
        gate_case(&cases[0], 1, kind);
}

/* Every item lies where its order says, none twice; rows are packed and combined through the places
 * as without them. */
static void dispatch_case(uint32_t rows, uint32_t k, uint32_t experts, uint32_t slots,
                          uint32_t capacity) {
    enum { WIDTH = 36 };
    const uint32_t items = rows * k;
    struct array expert = array_make(items * 2 + 2), slot_of = array_make(experts * 4);
    struct array count = array_make(slots * 4), item = array_make(slots * capacity * 4);
    struct array place = array_make(items * 4 + 4);
    uint16_t *e = (uint16_t *)expert.host;
    for (uint32_t i = 0; i < items; i++) /* the last slot's expert gets nothing */
        e[i] = random_below(&random_state, 8) == 0
                   ? GATE_UNUSED
                   : (uint16_t)random_below(&random_state, experts > 1 ? experts - 1 : 1);
    for (uint32_t i = 0; i < experts; i++)
        ((int32_t *)slot_of.host)[i] = -1;
    for (uint32_t s = 0; s < slots; s++)
        ((int32_t *)slot_of.host)[experts - 1 - s] = (int32_t)s;
    fill_bytes(&item, 0x33), fill_bytes(&place, 0x33), fill_bytes(&count, 0x33);
    uint32_t *expected_count = calloc(slots, 4), *expected_item = malloc(item.bytes),
             *expected_place = malloc(place.bytes);
    memset(expected_item, 0x33, item.bytes);
    memset(expected_place, 0x33, place.bytes);
    for (uint32_t i = 0; i < items; i++) {
        expected_place[i] = UINT32_MAX;
        const int32_t s = e[i] < experts ? ((int32_t *)slot_of.host)[e[i]] : -1;
        if (s < 0 || expected_count[s] == capacity)
            continue;
        expected_place[i] = (uint32_t)s * capacity + expected_count[s];
        expected_item[(uint32_t)s * capacity + expected_count[s]++] = i;
    }
    gpu_schedule(random_next(&random_state));
    array_put(&expert), array_put(&slot_of), array_put(&count), array_put(&item), array_put(&place);
    assert_int_equal(dispatch_cuda(NULL, array_device(&expert), items, array_device(&slot_of),
                                   experts, slots, capacity, array_device(&count),
                                   array_device(&item), array_device(&place)),
                     0);
    struct array x = array_make((rows + 1) * WIDTH * 2);
    struct array packed = array_make(slots * capacity * 40 * 2);
    fill_bf16(&x, &random_state, -1, 1);
    fill_bytes(&packed, 0x44);
    array_put(&x), array_put(&packed);
    assert_int_equal(pack_cuda(NULL, array_device(&x), WIDTH * 2, WIDTH * 2, k,
                               array_device(&count), array_device(&item), slots, capacity,
                               array_device(&packed), 40 * 2),
                     0);
    array_get(&count), array_get(&item), array_get(&place), array_get(&packed);
    assert_same(&count, expected_count, "count");
    assert_same(&item, expected_item, "item");
    assert_same(&place, expected_place, "place");
    for (uint32_t at = 0; at < slots * capacity; at++) {
        const uint8_t *row = packed.host + at * 80;
        if (at % capacity < expected_count[at / capacity])
            assert_memory_equal(row, x.host + expected_item[at] / k * WIDTH * 2, WIDTH * 2);
        else
            assert_int_equal(row[0], 0x44);
        assert_int_equal(row[WIDTH * 2], 0x44);
    }
    free(expected_count), free(expected_item), free(expected_place);
    array_free(&expert), array_free(&slot_of), array_free(&count), array_free(&item);
    array_free(&place), array_free(&x), array_free(&packed);
}

static void test_dispatch(void **state) {
    dispatch_case(1, 1, 1, 1, 1);
    dispatch_case(0, 4, 8, 4, 3); /* no rows */
    dispatch_case(100, 8, 32, 8, 64);
    dispatch_case(100, 8, 4, 4, 16); /* over capacity */
    dispatch_case(33, 3, 40, 1, 128);
}

/* Rows packed in E4M3 are those that the CPU would send; unpacked, what a product reads. */
static void test_e4m3_rows(void **state) {
    static const struct {
        uint32_t n, k, rows, slots, capacity;
    } cases[] = {{128, 1, 1, 1, 1},
                 {512, 3, 9, 4, 8},
                 {300, 2, 5, 3, 7},
                 {7, 1, 4, 2, 3},
                 {1300, 8, 3, 5, 2}};
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        const uint32_t n = cases[c].n, k = cases[c].k, slots = cases[c].slots;
        const uint32_t capacity = cases[c].capacity, rows = cases[c].rows,
                       places = slots * capacity;
        const size_t x_stride = n + 5, row_bytes = e4m3_row_bytes(n), stride = row_bytes + 12;
        const uint32_t groups = e4m3_row_groups(n), width = groups * 128;
        struct array x = array_make(rows * x_stride * 2), count = array_make(slots * 4),
                     item = array_make(places * 4), packed = array_make(places * stride),
                     item_row = array_make(places * 4), wide = array_make(places * (width + 16)),
                     scale = array_make((size_t)places * groups * 4);
        fill_bf16(&x, &random_state, -4, 4);
        for (uint32_t i = 0; i < n; i++)
            ((bf16 *)x.host)[i] = 0;
        for (uint32_t s = 0; s < slots; s++) /* the last slot has nothing */
            ((uint32_t *)count.host)[s] =
                s + 1 == slots && slots > 1 ? 0 : random_below(&random_state, capacity + 1);
        for (uint32_t i = 0; i < places; i++) {
            ((uint32_t *)item.host)[i] = random_below(&random_state, rows * k);
            ((uint32_t *)item_row.host)[i] = random_below(&random_state, capacity * k);
        }
        fill_bytes(&packed, 0x44), fill_bytes(&wide, 0x55), fill_bytes(&scale, 0x66);
        uint8_t *expected = malloc(packed.bytes), *expected_wide = malloc(wide.bytes);
        float *expected_scale = malloc(scale.bytes);
        memset(expected, 0x44, packed.bytes);
        memset(expected_wide, 0x55, wide.bytes), memset(expected_scale, 0x66, scale.bytes);
        for (uint32_t at = 0; at < places; at++) {
            if (at % capacity >= ((uint32_t *)count.host)[at / capacity])
                continue;
            const uint32_t row = ((uint32_t *)item.host)[at] / k;
            row_to_e4m3_scalar((bf16 *)x.host + row * x_stride, n, expected + at * stride);
        }
        for (uint32_t at = 0; at < places; at++) { /* the packed rows stand in for a frame's */
            if (at % capacity >= ((uint32_t *)count.host)[at / capacity])
                continue;
            const uint8_t *from = expected + ((uint32_t *)item_row.host)[at] / k * stride;
            memcpy(expected_wide + at * (width + 16), from, width);
            for (uint32_t g = 0; g < groups; g++)
                memcpy(&expected_scale[g * places + at], from + width + 4 * g, 4);
        }
        gpu_schedule(random_next(&random_state));
        array_put(&x), array_put(&count), array_put(&item), array_put(&packed);
        array_put(&item_row), array_put(&wide), array_put(&scale);
        assert_int_equal(pack_e4m3_cuda(NULL, array_device(&x), x_stride, n, k,
                                        array_device(&count), array_device(&item), slots, capacity,
                                        array_device(&packed), stride),
                         0);
        assert_int_equal(unpack_e4m3_cuda(NULL, array_device(&packed), stride, n, k,
                                          array_device(&count), array_device(&item_row), slots,
                                          capacity, array_device(&wide), width + 16,
                                          array_device(&scale), 1, places),
                         0);
        array_get(&packed), array_get(&wide), array_get(&scale);
        assert_same(&packed, expected, "packed E4M3 rows");
        assert_same(&wide, expected_wide, "unpacked E4M3 rows");
        assert_same(&scale, expected_scale, "their scales");
        free(expected), free(expected_wide), free(expected_scale);
        array_free(&x), array_free(&count), array_free(&item), array_free(&packed);
        array_free(&item_row), array_free(&wide), array_free(&scale);
    }
}

static void test_combine(void **state) {
    for (int with = 0; with < 4; with++) {
        enum { ROWS = 7, K = 5, HIDDEN = 77, STRIDE = 80, RESIDUAL = 90 };
        struct array outputs = array_make(ROWS * K * STRIDE * 4);
        struct array shared = array_make(ROWS * STRIDE * 4), weights = array_make(ROWS * K * 4);
        struct array experts = array_make(ROWS * K * 2), place = array_make(ROWS * K * 4);
        struct array residual = array_make(ROWS * RESIDUAL * 4);
        fill_floats(&outputs, &random_state, -1, 1), fill_floats(&shared, &random_state, -1, 1);
        fill_floats(&weights, &random_state, 0, 1), fill_floats(&residual, &random_state, -1, 1);
        for (uint32_t i = 0; i < ROWS * K; i++) {
            ((uint16_t *)experts.host)[i] =
                random_below(&random_state, 4) == 0 ? GATE_UNUSED : (uint16_t)i;
            ((uint32_t *)place.host)[i] = ROWS * K - 1 - i;
        }
        const bool with_shared = with & 1, placed = with & 2;
        float *in_order = malloc(outputs.bytes), *expected = malloc(residual.bytes);
        for (uint32_t i = 0; i < ROWS * K; i++)
            memcpy(in_order + i * STRIDE,
                   (float *)outputs.host + (placed ? ROWS * K - 1 - i : i) * STRIDE, STRIDE * 4);
        memcpy(expected, residual.host, residual.bytes);
        combine_rows(ROWS, K, HIDDEN, in_order, STRIDE, (float *)weights.host,
                     (uint16_t *)experts.host, with_shared ? (float *)shared.host : NULL, expected,
                     RESIDUAL);
        array_put(&outputs), array_put(&shared), array_put(&weights), array_put(&experts);
        array_put(&place), array_put(&residual);
        assert_int_equal(combine_cuda(NULL, ROWS, K, HIDDEN, array_device(&outputs), STRIDE,
                                      placed ? array_device(&place) : NULL, array_device(&weights),
                                      array_device(&experts),
                                      with_shared ? array_device(&shared) : NULL, STRIDE,
                                      array_device(&residual), RESIDUAL),
                         0);
        array_get(&residual);
        assert_same(&residual, expected, "combine");
        free(in_order), free(expected);
        array_free(&outputs), array_free(&shared), array_free(&weights), array_free(&experts);
        array_free(&place), array_free(&residual);
    }
}

static void quantise_case(uint32_t rows, uint32_t n, bool from_bf16) {
    const uint32_t stride = n + 2, groups = (n + 127) / 128, ret_stride = groups * 128;
    struct array x = array_make((rows + 1) * stride * 4);
    struct array narrow = array_make((rows + 1) * stride * 2);
    struct array ret = array_make((rows + 1) * ret_stride),
                 scale = array_make((rows + 1) * groups * 4);
    fill_floats(&x, &random_state, -3, 3);
    for (uint32_t i = 0; i < (rows + 1) * stride; i++) {
        float *value = (float *)x.host + i;
        if (i / stride % 4 == 1)
            *value = 0; /* a row of zeros */
        if (random_below(&random_state, 7) == 0)
            *value *= 0x1p-12f; /* subnormal beside the others */
        ((bf16 *)narrow.host)[i] = bf16_from_float(*value);
        if (from_bf16)
            *value = bf16_to_float(((bf16 *)narrow.host)[i]);
    }
    fill_bytes(&ret, 0x55), fill_bytes(&scale, 0x55);
    uint8_t *expected = malloc(ret.bytes);
    float *expected_scale = malloc(scale.bytes);
    memset(expected, 0x55, ret.bytes), memset(expected_scale, 0x55, scale.bytes);
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t g = 0; g < groups; g++) {
            const float *from = (float *)x.host + r * stride;
            float most = 0x1p-100f;
            for (uint32_t i = g * 128; i < (g + 1) * 128 && i < n; i++)
                most = fabsf(from[i]) > most ? fabsf(from[i]) : most;
            expected_scale[r * groups + g] = most / 448.0f;
            for (uint32_t i = g * 128; i < (g + 1) * 128; i++)
                expected[r * ret_stride + i] =
                    i < n ? e4m3_from_float(from[i] / (most / 448.0f)) : 0;
        }
    array_put(&x), array_put(&narrow), array_put(&ret), array_put(&scale);
    int error =
        from_bf16
            ? quantise_bf16_cuda(NULL, array_device(&narrow), stride, rows, n, array_device(&ret),
                                 ret_stride, array_device(&scale), groups, 1)
            : quantise_f32_cuda(NULL, array_device(&x), stride, rows, n, array_device(&ret),
                                ret_stride, array_device(&scale), groups, 1);
    assert_int_equal(error, 0);
    array_get(&ret), array_get(&scale);
    assert_same(&scale, expected_scale, "scales");
    assert_same(&ret, expected, "quantised");
    free(expected), free(expected_scale);
    array_free(&x), array_free(&narrow), array_free(&ret), array_free(&scale);
}

static void test_quantise(void **state) {
    for (int from_bf16 = 0; from_bf16 < 2; from_bf16++) {
        quantise_case(0, 128, from_bf16);
        quantise_case(6, 128, from_bf16);
        quantise_case(3, 7168, from_bf16);
        quantise_case(5, 200, from_bf16);
        quantise_case(2, 1, from_bf16);
    }
}

int main(void) {
    printf("seed %llu\n", (unsigned long long)random_state);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gate),      cmocka_unit_test(test_dispatch),
        cmocka_unit_test(test_e4m3_rows), cmocka_unit_test(test_combine),
        cmocka_unit_test(test_quantise),
    };
    return cmocka_run_group_tests_name("cuda router", tests, device_name, NULL);
}
