/* Matrix products: the three bf16 forms against a plain reading of the definition in ops.h,
 * computed in integers (soft_fma), and against each other, bit for bit. AMX runs on the processor
 * if it has it, else through the emulator. */
#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/internal.h"
#include "tests/support/amx_emulator.h"
#include "tests/support/random.h"

#include <cmocka.h>

#define SEED 20250611u

static uint64_t random_state;

static uint32_t random_bits(void) {
    return (uint32_t)(random_next(&random_state) >> 32);
}
static uint32_t below(uint32_t bound) {
    return random_below(&random_state, bound);
}

static uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
static float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* ---- Forms ---- */

struct form {
    const char *name;
    matmul_function *matmul;
    bool emulated;
};
static struct form forms[3];
static int form_count;

static void find_forms(void) {
    forms[form_count++] = (struct form){"scalar", matmul_bf16_scalar, false};
#if defined(__x86_64__)
    if (!isa_available(ISA_AVX512))
        return;
    forms[form_count++] = (struct form){"avx512", matmul_bf16_avx512, false};
    if (isa_available(ISA_AMX))
        forms[form_count++] = (struct form){"amx", matmul_bf16_amx, false};
    else if (__builtin_cpu_supports("gfni") && amx_emulator_install())
        forms[form_count++] = (struct form){"amx (emulated)", matmul_bf16_amx, true};
#endif
}

/* Real threads, so that a race would show under the thread sanitizer. */
struct thread_part {
    void (*task)(void *argument, int part, int parts);
    void *argument;
    int part, parts;
};
static void *thread_main(void *argument) {
    const struct thread_part *it = argument;
    it->task(it->argument, it->part, it->parts);
    return NULL;
}
static void run_in_threads(void *pool, void (*task)(void *argument, int part, int parts),
                           void *argument, int parts) {
    pthread_t threads[8];
    struct thread_part todo[8];
    assert_true(parts <= *(int *)pool);
    for (int i = 0; i < parts; i++) {
        todo[i] = (struct thread_part){task, argument, i, parts};
        assert_int_equal(pthread_create(&threads[i], NULL, thread_main, &todo[i]), 0);
    }
    for (int i = 0; i < parts; i++)
        pthread_join(threads[i], NULL);
}

/* ---- Cases ---- */

enum values { ORDINARY, TINY, WIDE, SPECIAL };

static bf16 random_bf16(enum values values) {
    const bf16 random = (bf16)random_bits();
    switch (values) {
    case ORDINARY: /* 2^-4 .. 2 */
        return (bf16)((random & 0x807f) | (123 + below(5)) << 7);
    case TINY: /* denormals, zeros, and products about 2^-126 */
        return (bf16)((random & 0x807f) | (below(4) == 0 ? below(3) : 60 + below(8)) << 7);
    case WIDE: /* everything finite whose products stay finite */
        return (bf16)((random & 0x807f) | below(186) << 7);
    default: /* now and then an infinity or NaN */
        return below(40) == 0 ? (bf16)((random & 0x8001) | 0x7f80)
                              : (bf16)((random & 0xbfff) | 0x3000);
    }
}

static uint8_t random_e4m3(enum values values) {
    const uint8_t random = (uint8_t)random_bits();
    if (values == TINY)
        return random & 0x87;
    return (random & 0x7f) == 0x7f && values != SPECIAL ? 0x80 : random;
}

struct test_case {
    struct weight_view view;
    void *data;
    float *scale;
    bf16 *x;
    size_t x_stride;
    uint32_t rows;
};

struct shape {
    uint32_t n, k, rows;
    enum dtype dtype;
    bool scaled, transposed;
    uint32_t row0, col0, block;
    enum values values;
};

static struct test_case case_make(const struct shape *shape) {
    struct test_case it = {.rows = shape->rows, .x_stride = activation_stride(shape->k) + 32};
    const uint32_t file_rows = shape->row0 + (shape->transposed ? shape->k : shape->n) + 3;
    const uint32_t file_columns = shape->col0 + (shape->transposed ? shape->n : shape->k) + 5;
    const size_t elements = (size_t)file_rows * file_columns;
    const size_t bytes[] = {[DTYPE_F32] = 4, [DTYPE_BF16] = 2, [DTYPE_E4M3] = 1};
    it.data = malloc(elements * bytes[shape->dtype]);
    for (size_t i = 0; i < elements; i++) {
        if (shape->dtype == DTYPE_BF16)
            ((bf16 *)it.data)[i] = random_bf16(shape->values);
        else if (shape->dtype == DTYPE_F32)
            ((float *)it.data)[i] =
                float_of((uint32_t)random_bf16(shape->values) << 16 | (random_bits() & 0xffff));
        else
            ((uint8_t *)it.data)[i] = random_e4m3(shape->values);
    }
    const uint32_t block = shape->block == 0 ? 128 : shape->block;
    const uint32_t scale_columns = file_columns / block + 1, scale_rows = file_rows / block + 1;
    it.scale = malloc((size_t)scale_rows * scale_columns * sizeof(float));
    for (uint32_t i = 0; i < scale_rows * scale_columns; i++)
        it.scale[i] = shape->values == TINY ? float_of(random_bits() % 0x3000000)
                                            : float_of(0x38000000 + random_bits() % 0x4000000);
    it.view = (struct weight_view){.dtype = shape->dtype,
                                   .data = it.data,
                                   .n = shape->n,
                                   .k = shape->k,
                                   .stride = file_columns,
                                   .row0 = shape->row0,
                                   .col0 = shape->col0,
                                   .transposed = shape->transposed,
                                   .scale = shape->scaled ? it.scale : NULL,
                                   .scale_stride = scale_columns,
                                   .block = block};
    /* Neither what pads a row nor what lies between rows may matter. */
    const size_t x_elements = (size_t)shape->rows * it.x_stride;
    it.x = malloc((x_elements + 1) * sizeof *it.x);
    for (size_t i = 0; i < x_elements; i++) {
        it.x[i] = i % it.x_stride < shape->k ? random_bf16(shape->values) : 0x7fc0;
    }
    return it;
}

static void case_free(struct test_case *it) {
    free(it->data);
    free(it->scale);
    free(it->x);
}

static struct matrix packed(const struct weight_view *view,
                            size_t (*bytes)(const struct weight_view *),
                            void (*pack)(struct matrix *, const struct weight_view *, void *)) {
    const size_t size = bytes(view);
    void *memory = aligned_alloc(64, (size + 63) / 64 * 64 + 64);
    memset((uint8_t *)memory + size, 0xa5, 64);
    struct matrix matrix;
    pack(&matrix, view, memory);
    for (int i = 0; i < 64; i++)
        assert_int_equal(((uint8_t *)memory)[size + (size_t)i], 0xa5);
    assert_int_equal(matrix.bytes, size);
    assert_ptr_equal(matrix.data, memory);
    return matrix;
}

/* ---- The definition, read from ops.h ---- */

#define ONE 0x3f800000u

/* Bits of the BF16 value, as float, that stands for element (n, k). */
static uint32_t element_bits(const struct weight_view *view, uint32_t n, uint32_t k) {
    const size_t row = view->row0 + (view->transposed ? k : n),
                 column = view->col0 + (view->transposed ? n : k);
    const size_t index = row * view->stride + column;
    if (view->dtype == DTYPE_BF16)
        return (uint32_t)((const bf16 *)view->data)[index] << 16;
    if (view->dtype == DTYPE_F32)
        return (uint32_t)bf16_from_float(((const float *)view->data)[index]) << 16;
    const uint8_t byte = ((const uint8_t *)view->data)[index];
    const int exponent = byte >> 3 & 15, mantissa = byte & 7;
    float value =
        exponent == 0 ? ldexpf((float)mantissa, -9) : ldexpf((float)(8 + mantissa), exponent - 10);
    if ((byte & 0x7f) == 0x7f)
        value = NAN;
    return bits_of(byte & 0x80 ? -value : value);
}

static float element_scale(const struct weight_view *view, uint32_t n, uint32_t k) {
    const uint32_t row = view->row0 + (view->transposed ? k : n),
                   column = view->col0 + (view->transposed ? n : k);
    return view->scale[row / view->block * view->scale_stride + column / view->block];
}

static uint32_t defined_product(const struct weight_view *view, const bf16 *x, uint32_t n) {
    const uint32_t first = view->transposed ? view->row0 : view->col0;
    uint32_t acc = 0;
    for (uint32_t k = 0; k < view->k;) {
        const uint32_t begin = k;
        uint32_t end = view->k, sum = 0;
        if (view->scale != NULL &&
            (first + k) / view->block * view->block + view->block - first < end)
            end = (first + k) / view->block * view->block + view->block - first;
        for (; k < end; k += 32) {
            uint32_t chain[2] = {0, 0};
            for (uint32_t i = 0; i < 32; i++) {
                const bool inside = k + i < end;
                chain[i % 2] = soft_fma(inside ? element_bits(view, n, k + i) : 0,
                                        inside ? (uint32_t)x[k + i] << 16 : 0, chain[i % 2]);
            }
            sum = soft_fma(soft_fma(chain[0], ONE, chain[1]), ONE, sum);
        }
        k = end;
        acc =
            view->scale == NULL ? sum : soft_fma(sum, bits_of(element_scale(view, n, begin)), acc);
    }
    return acc;
}

static bool same_bits(uint32_t a, uint32_t b) {
    const bool a_nan = (a & 0x7fffffff) > 0x7f800000, b_nan = (b & 0x7fffffff) > 0x7f800000;
    return a == b || (a_nan && b_nan);
}

#define GUARD 12345.0f

/* Runs a form and checks that it writes n floats of each row and nothing else. */
static void product(const struct form *form, const struct matrix *w, const bf16 *x, size_t x_stride,
                    uint32_t rows, float *y, const struct parallel *parallel) {
    const size_t y_stride = (size_t)w->n + 3;
    float *padded = malloc(((size_t)rows * y_stride + 1) * sizeof *padded);
    for (size_t i = 0; i <= rows * y_stride; i++)
        padded[i] = GUARD;
    if (form->emulated) /* cmocka puts its own handler there before every test */
        assert_true(amx_emulator_install());
    form->matmul(w, x, x_stride, rows, padded, y_stride, parallel);
    for (uint32_t r = 0; r < rows; r++) {
        memcpy(y + (size_t)r * w->n, padded + r * y_stride, w->n * sizeof *y);
        for (uint32_t i = 0; i < 3; i++)
            assert_float_equal(padded[r * y_stride + w->n + i], GUARD, 0);
    }
    assert_float_equal(padded[rows * y_stride], GUARD, 0);
    free(padded);
}

static void check_equal(const char *what, const struct shape *shape, const uint32_t *expected,
                        const float *found, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (!same_bits(expected[i], bits_of(found[i])))
            fail_msg("%s: n %u k %u rows %u dtype %d scaled %d transposed %d row0 %u col0 %u "
                     "values %d: output "
                     "%zu is %08x, expected %08x",
                     what, shape->n, shape->k, shape->rows, shape->dtype, shape->scaled,
                     shape->transposed, shape->row0, shape->col0, shape->values, i,
                     bits_of(found[i]), expected[i]);
}

/* Every form against the definition. */
static void check_shape(const struct shape *shape) {
    struct test_case it = case_make(shape);
    struct matrix w = packed(&it.view, matrix_bytes_bf16, matrix_pack_bf16);
    const size_t count = (size_t)shape->n * shape->rows;
    uint32_t *expected = malloc((count + 1) * sizeof *expected);
    float *found = malloc((count + 1) * sizeof *found);
    for (size_t i = 0; i < count; i++)
        expected[i] =
            defined_product(&it.view, it.x + i / shape->n * it.x_stride, (uint32_t)(i % shape->n));
    for (int f = 0; f < form_count; f++) {
        product(&forms[f], &w, it.x, it.x_stride, shape->rows, found, &PARALLEL_SERIAL);
        check_equal(forms[f].name, shape, expected, found, count);
    }
    free(expected);
    free(found);
    free(w.data);
    case_free(&it);
}

static const uint32_t WIDTHS[] = {1, 15, 16, 17, 31, 32, 33, 48, 129, 257};
static const uint32_t ROWS[] = {0, 1, 2, 3, 4, 5, 7, 9, 16, 17, 33};
enum { WIDTH_COUNT = sizeof WIDTHS / sizeof *WIDTHS, ROW_COUNT = sizeof ROWS / sizeof *ROWS };

static void forms_give_the_defined_bits_on_odd_shapes(void **unused) {
    int turn = 0;
    for (int n = 0; n < WIDTH_COUNT; n++)
        for (int k = 0; k < WIDTH_COUNT; k++, turn++) {
            struct shape shape = {WIDTHS[n], WIDTHS[k], ROWS[turn % ROW_COUNT],
                                  .dtype = DTYPE_BF16};
            check_shape(&shape);
            shape.rows = ROWS[(turn + 4) % ROW_COUNT];
            shape.dtype = DTYPE_E4M3;
            shape.scaled = true;
            check_shape(&shape);
        }
}

/* Weights as training leaves them: few powers of two. One in `others` is anything. */
static bf16 *usual_weights(uint32_t count, uint32_t others) {
    bf16 *weights = malloc(count * sizeof *weights);
    for (uint32_t i = 0; i < count; i++) {
        const uint32_t bits = random_bits();
        const uint32_t exponent = 120 - (uint32_t)__builtin_ctz(bits | 0x400);
        weights[i] = (bf16)((bits >> 16 & 0x807f) | exponent << 7);
        if (below(others) == 0)
            weights[i] = (bf16)random_bits();
    }
    return weights;
}

static void check_read_back(const struct matrix *plain, const struct matrix *coded) {
    uint8_t *back = malloc(plain->bytes);
    for (size_t at = 0, bytes; at < plain->bytes; at += bytes) {
        bytes = 1 + below(3000);
        bytes = bytes < plain->bytes - at ? bytes : plain->bytes - at;
        matrix_read_packed(coded, at, bytes, back + at);
    }
    assert_memory_equal(back, plain->data, plain->bytes);
    free(back);
}

static void check_coded_product(const struct matrix *plain, const struct matrix *coded,
                                uint32_t rows) {
    const size_t x_stride = row_stride(plain->k), count = (size_t)rows * plain->n;
    bf16 *x = calloc(rows * x_stride, sizeof *x);
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t i = 0; i < plain->k; i++)
            x[r * x_stride + i] = bf16_from_float((float)below(2001) - 1000);
    float *expected = malloc(count * sizeof(float)), *found = malloc(count * sizeof(float));
    matmul_bf16_scalar(plain, x, x_stride, rows, expected, plain->n, &PARALLEL_SERIAL);
    for (int f = 0; f < form_count; f++) {
        if (strncmp(forms[f].name, "amx", 3) != 0)
            continue;
        product(&forms[f], coded, x, x_stride, rows, found, &PARALLEL_SERIAL);
        for (size_t i = 0; i < count; i++)
            if (!same_bits(bits_of(expected[i]), bits_of(found[i])))
                fail_msg("%s: %u x %u, %u rows: output %zu is %a, expected %a", forms[f].name,
                         plain->n, plain->k, rows, i, (double)found[i], (double)expected[i]);
    }
    free(expected);
    free(found);
    free(x);
}

/* The same bits as without, whatever the number of rows; and it can be read back. */
static void coded_weights_give_the_same_bits(void **unused) {
    static const uint32_t shapes[][2] = {{40, 96}, {129, 257}, {64, 1024}, {520, 200}};
    static const uint32_t rows[] = {1, 3, 16, 17, 32, 33, 48, 50, 64, 65, 100};
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        const uint32_t n = shapes[s][0], k = shapes[s][1];
        bf16 *weights = usual_weights(n * k, 5000);
        weights[1] = 0x7f80;    /* infinity */
        weights[n * k - 1] = 1; /* a denormal */
        const struct weight_view view = {
            .dtype = DTYPE_BF16, .data = weights, .n = n, .k = k, .stride = k};
        struct matrix plain = packed(&view, matrix_bytes_bf16, matrix_pack_bf16), coded;
        struct matrix_coding coding;
        matrix_code_bf16(&plain, &coding);
        assert_true(coding.bytes > 0 && coding.bytes < plain.bytes * 8 / 10 + 256);
        assert_true(s == 0 || coding.codes.exceptions > 0);
        void *memory = aligned_alloc(64, coding.bytes);
        matrix_place_coded(&coded, &plain, &coding, memory);
        check_read_back(&plain, &coded);
        for (size_t r = 0; r < sizeof rows / sizeof *rows; r++)
            check_coded_product(&plain, &coded, rows[r]);
        matrix_coding_free(&coding);
        free(memory);
        free(plain.data);
        free(weights);
    }
}

/* Both ways to code a tile do the same. */
static void tiles_are_coded_alike(void **unused) {
#if defined(__x86_64__)
    if (!__builtin_cpu_supports("avx512vbmi"))
        skip();
    uint8_t code_of[256];
    memset(code_of, 0xff, sizeof code_of);
    for (uint32_t code = 0; code < 16; code++)
        code_of[code == 0 ? 0 : code == 1 ? 200 : 105 + code] = (uint8_t)code;
    for (uint32_t i = 0; i < 200; i++) {
        bf16 *tile = usual_weights(TILE_ELEMENTS, 1 + i);
        uint8_t expected[CODED_TILE_BYTES], found[CODED_TILE_BYTES];
        struct exception expected_list[TILE_ELEMENTS] = {0}, found_list[TILE_ELEMENTS] = {0};
        const size_t room = below(TILE_ELEMENTS + 1);
        assert_int_equal(code_tile_scalar(tile, i, code_of, expected, expected_list, room),
                         code_tile_vbmi(tile, i, code_of, found, found_list, room));
        assert_memory_equal(expected, found, sizeof expected);
        assert_memory_equal(expected_list, found_list, sizeof expected_list);
        free(tile);
    }
#endif
}

/* Where coding saves nothing: weights of any exponents at all, or E4M3. */
static void weights_of_many_exponents_are_not_coded(void **unused) {
    bf16 *weights = usual_weights(64 * 256, 2);
    struct weight_view view = {
        .dtype = DTYPE_BF16, .data = weights, .n = 64, .k = 256, .stride = 256};
    for (int i = 0; i < 2; i++, view.dtype = DTYPE_E4M3) {
        struct matrix plain = packed(&view, matrix_bytes_bf16, matrix_pack_bf16);
        struct matrix_coding coding;
        matrix_code_bf16(&plain, &coding);
        assert_int_equal(coding.bytes, 0);
        assert_null(coding.tiles);
        free(plain.data);
    }
    free(weights);
}

/* Where forms change their way: more rows than are packed together, more panels than a strip, more
 * K than is expanded at once. */
static void forms_agree_on_large_shapes(void **unused) {
    const struct shape shapes[] = {{150, 96, 300, .dtype = DTYPE_BF16},
                                   {150, 160, 290, .dtype = DTYPE_E4M3, .scaled = true},
                                   {140, 2200, 75, .dtype = DTYPE_E4M3, .scaled = true},
                                   {60, 2200, 67, .dtype = DTYPE_E4M3},
                                   {90, 700, 50, .dtype = DTYPE_BF16},
                                   {60, 700, 81, .dtype = DTYPE_BF16},
                                   {300, 2200, 5, .dtype = DTYPE_E4M3, .scaled = true}};
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        struct test_case it = case_make(&shapes[s]);
        struct matrix w = packed(&it.view, matrix_bytes_bf16, matrix_pack_bf16);
        const size_t count = (size_t)shapes[s].rows * shapes[s].n;
        float *expected = malloc(count * sizeof(float)), *found = malloc(count * sizeof(float));
        forms[0].matmul(&w, it.x, it.x_stride, it.rows, expected, w.n, &PARALLEL_SERIAL);
        for (int f = 1; f < form_count; f++) {
            memset(found, 0x7f, count * sizeof(float));
            forms[f].matmul(&w, it.x, it.x_stride, it.rows, found, w.n, &PARALLEL_SERIAL);
            for (size_t i = 0; i < count; i++)
                if (bits_of(expected[i]) != bits_of(found[i]))
                    fail_msg("shape %zu: row %zu, output %zu: %a, %s found %a", s, i / w.n, i % w.n,
                             (double)expected[i], forms[f].name, (double)found[i]);
        }
        free(expected);
        free(found);
        free(w.data);
        case_free(&it);
    }
    (void)unused;
}

/* Rows quantised before they came: what the forms make of them is the definition's, and products of
 * them have the bits of products that quantise; NaN, infinities and zeros included. */
static void e4m3_rows_multiply_as_what_they_were(void **unused) {
    (void)unused;
    row_to_e4m3_function *const makes[] = {
        row_to_e4m3_scalar,
#if defined(__x86_64__)
        isa_available(ISA_AVX512) ? row_to_e4m3_avx512 : NULL,
#endif
    };
    struct {
        matmul_function *whole;
        matmul_e4m3_function *second;
    } const products[] = {
        {matmul_fp8_scalar, matmul_e4m3_scalar},
#if defined(__x86_64__)
        {isa_available(ISA_AVX512) ? matmul_fp8_avx512 : NULL, matmul_e4m3_avx512},
        {isa_available(ISA_AMX) ? matmul_fp8_amx : NULL, matmul_e4m3_amx},
#endif
    };
    const uint32_t rows[] = {0, 1, 2, 5, 17, 33};
    for (size_t turn = 0; turn < 5 * sizeof rows / sizeof *rows; turn++) {
        const struct shape shape = {.n = 1 + below(90),
                                    .k = turn % 5 == 0 ? 128 : 1 + below(500),
                                    .rows = rows[turn / 5],
                                    .dtype = DTYPE_E4M3,
                                    .scaled = true,
                                    .values = turn % 4 == 3 ? WIDE : ORDINARY};
        struct test_case it = case_make(&shape);
        struct matrix w = packed(&it.view, matrix_bytes_bf16, matrix_pack_bf16);
        const size_t count = (size_t)shape.rows * shape.n, bytes = e4m3_row_bytes(shape.k);
        float *expected = malloc(count * 4 + 4), *found = malloc(count * 4 + 4);
        uint8_t *made = malloc(shape.rows * bytes + 4), *other = malloc(bytes);
        for (uint32_t k = 0; shape.rows > 1 && k < shape.k; k++)
            it.x[k] = turn % 5 == 1 ? 0 : it.x[k];
        if (shape.rows > 0 && turn % 5 == 2)
            it.x[shape.k / 2] = turn % 2 ? 0x7fc0 : 0xff80;
        numerics_enter();
        assert_true(takes_e4m3(&w));
        for (uint32_t r = 0; r < shape.rows; r++) {
            const bf16 *x = it.x + r * it.x_stride;
            makes[0](x, shape.k, made + r * bytes);
            for (size_t f = 1; f < sizeof makes / sizeof *makes; f++) {
                if (makes[f] == NULL)
                    continue;
                memset(other, 0x55, bytes);
                makes[f](x, shape.k, other);
                assert_memory_equal(other, made + r * bytes, bytes);
            }
        }
        for (size_t f = 0; f < sizeof products / sizeof *products; f++) {
            if (products[f].whole == NULL)
                continue;
            memset(found, 0x7f, count * 4);
            products[f].whole(&w, it.x, it.x_stride, it.rows, expected, w.n, &PARALLEL_SERIAL);
            products[f].second(&w, made, bytes, it.rows, found, w.n, &PARALLEL_SERIAL);
            assert_memory_equal(expected, found, count * 4);
        }
        free(expected), free(found), free(made), free(other);
        free(w.data);
        case_free(&it);
    }
    uint8_t codes[256];
    bf16 values[256], vector[256];
    for (int i = 0; i < 256; i++)
        codes[i] = (uint8_t)i;
    e4m3_widen_scalar(codes, 256, values);
#if defined(__x86_64__)
    if (isa_available(ISA_AVX512)) {
        memset(vector, 0x11, sizeof vector);
        e4m3_widen_avx512(codes, 251, vector);
        assert_memory_equal(vector, values, 251 * sizeof *vector);
        assert_int_equal(vector[251], 0x1111);
    }
#endif
    /* Cut elsewhere than the rows are: not taken. */
    const struct shape shifted = {
        .n = 8, .k = 200, .rows = 1, .dtype = DTYPE_E4M3, .scaled = true, .col0 = 5};
    struct test_case it = case_make(&shifted);
    struct matrix w = packed(&it.view, matrix_bytes_bf16, matrix_pack_bf16);
    assert_false(takes_e4m3(&w));
    free(w.data);
    case_free(&it);
}

/* The fp8 profile: activations that are quantised by the definition, multiplied by the definition
 * of the bf16 profile segment by segment. */
static void fp8_quantises_rows_by_segments(void **unused) {
    (void)unused;
    matmul_function *const products[] = {
        matmul_fp8_scalar,
#if defined(__x86_64__)
        isa_available(ISA_AVX512) ? matmul_fp8_avx512 : NULL,
        isa_available(ISA_AMX) ? matmul_fp8_amx : NULL,
#endif
    };
    const uint32_t rows[] = {0, 1, 2, 5, 9, 17, 33, 70, 81};
    for (size_t turn = 0; turn < 4 * sizeof rows / sizeof *rows; turn++) {
        const struct shape shape = {.n = 1 + below(90),
                                    .k = 1 + below(500),
                                    .rows = rows[turn / 4],
                                    .dtype = DTYPE_E4M3,
                                    .scaled = true,
                                    .col0 = turn % 2 ? below(200) : 0,
                                    .values = turn % 4 == 3 ? WIDE : ORDINARY};
        struct test_case it = case_make(&shape);
        for (uint32_t k = 0; shape.rows > 1 && k < shape.k; k++)
            it.x[k] = 0; /* a row of zeros has a scale as well */
        struct matrix w = packed(&it.view, matrix_bytes_bf16, matrix_pack_bf16);
        const size_t count = (size_t)shape.rows * shape.n;
        float *expected = calloc(count + 1, sizeof *expected), *found = malloc(count * 4 + 4);
        numerics_enter();
        for (uint32_t r = 0; r < shape.rows; r++)
            for (uint32_t s = 0; s < w.segments; s++) {
                const uint32_t begin = w.segment_k[s], width = w.segment_k[s + 1] - begin;
                const bf16 *x = it.x + r * it.x_stride + begin;
                float most = 0x1p-100f;
                for (uint32_t i = 0; i < width; i++)
                    most = fmaxf(most, fabsf(bf16_to_float(x[i])));
                bf16 values[128] = {0};
                for (uint32_t i = 0; i < width; i++)
                    values[i] =
                        e4m3_to_bf16(e4m3_from_float(bf16_to_float(x[i]) / (most / 448.0f)));
                struct weight_view part = it.view;
                part.col0 += begin;
                part.k = width;
                part.scale = NULL;
                struct matrix one = packed(&part, matrix_bytes_bf16, matrix_pack_bf16);
                float sums[128];
                matmul_bf16_scalar(&one, values, 128, 1, sums, 128, &PARALLEL_SERIAL);
                for (uint32_t n = 0; n < shape.n; n++) {
                    float *y = &expected[(size_t)r * shape.n + n];
                    const float scale =
                        panel_scales(&w, n / 16, s)[n % 16] * (most / 448.0f);
                    *y = fma_canonical(sums[n], scale, *y);
                }
                free(one.data);
            }
        for (size_t f = 0; f < sizeof products / sizeof *products; f++) {
            if (products[f] == NULL)
                continue;
            memset(found, 0x7f, count * 4);
            products[f](&w, it.x, it.x_stride, it.rows, found, w.n, &PARALLEL_SERIAL);
            for (size_t i = 0; i < count; i++)
                if (bits_of(expected[i]) != bits_of(found[i]))
                    fail_msg("turn %zu, form %zu, output %zu: %a, found %a", turn, f, i,
                             (double)expected[i], (double)found[i]);
        }
        free(expected);
        free(found);
        free(w.data);
        case_free(&it);
    }
}

static void parts_of_a_file_matrix_keep_their_scales(void **unused) {
    const uint32_t offsets[][2] = {{0, 0}, {128, 64}, {32, 128}, {100, 7}, {1, 127}, {64, 160}};
    for (int o = 0; o < 6; o++)
        for (int transposed = 0; transposed < 2; transposed++)
            for (int dtype = 0; dtype < 4; dtype++) {
                struct shape shape = {
                    .n = 70 + below(90), .k = 100 + below(200), .rows = 1 + below(8)};
                shape.dtype = dtype == 0 ? DTYPE_F32 : dtype == 1 ? DTYPE_BF16 : DTYPE_E4M3;
                shape.scaled = dtype == 3;
                shape.transposed = transposed;
                shape.row0 = offsets[o][0];
                shape.col0 = offsets[o][1];
                check_shape(&shape);
                shape.rows = 40;
                shape.n = 33;
                check_shape(&shape);
                shape.block = 256;
                check_shape(&shape);
                shape.block = 48;
                check_shape(&shape);
            }
}

static void extreme_values_give_the_same_bits(void **unused) {
    for (int values = TINY; values <= SPECIAL; values++)
        for (int dtype = 0; dtype < 3; dtype++)
            for (int turn = 0; turn < 4; turn++) {
                const uint32_t rows[] = {1, 3, 9, 34};
                struct shape shape = {40,
                                      300,
                                      rows[turn],
                                      .dtype = dtype == 0 ? DTYPE_BF16 : DTYPE_E4M3,
                                      .scaled = dtype == 2,
                                      .values = (enum values)values};
                check_shape(&shape);
                /* Segments that end anywhere: what follows belongs to the next. */
                shape.row0 = 9;
                shape.col0 = 101;
                check_shape(&shape);
            }
}

static void a_row_does_not_depend_on_its_batch_nor_on_threads(void **unused) {
    int width = 1;
    const struct parallel threads[] = {{run_in_threads, &width, 1},
                                       {run_in_threads, &width, 2},
                                       {run_in_threads, &width, 3},
                                       {run_in_threads, &width, 8}};
    const struct shape shapes[] = {{300, 700, 33, .dtype = DTYPE_BF16},
                                   {300, 700, 33, .dtype = DTYPE_E4M3, .scaled = true},
                                   {17, 2600, 70, .dtype = DTYPE_E4M3, .scaled = true},
                                   {1000, 1100, 1, .dtype = DTYPE_BF16}};
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        const struct shape *shape = &shapes[s];
        struct test_case it = case_make(shape);
        struct matrix w = packed(&it.view, matrix_bytes_bf16, matrix_pack_bf16);
        const size_t count = (size_t)shape->n * shape->rows;
        uint32_t *alone = malloc(count * sizeof *alone);
        float *found = malloc(count * sizeof *found);
        for (int f = 1; f < form_count; f++) {
            for (uint32_t r = 0; r < shape->rows; r++)
                product(&forms[f], &w, it.x + r * it.x_stride, it.x_stride, 1,
                        (float *)(void *)(alone + (size_t)r * shape->n), &PARALLEL_SERIAL);
            for (size_t p = 0; p < sizeof threads / sizeof *threads; p++) {
                width = threads[p].width;
                product(&forms[f], &w, it.x, it.x_stride, shape->rows, found, &threads[p]);
                check_equal(forms[f].name, shape, alone, found, count);
            }
        }
        free(alone);
        free(found);
        free(w.data);
        case_free(&it);
    }
}

static void sums_are_close_to_double_precision(void **unused) {
    for (int scaled = 0; scaled < 2; scaled++) {
        const struct shape shape = {50, 2000, 3, .dtype = scaled ? DTYPE_E4M3 : DTYPE_BF16,
                                    .scaled = scaled};
        struct test_case it = case_make(&shape);
        struct matrix w = packed(&it.view, matrix_bytes_bf16, matrix_pack_bf16);
        struct matrix plain = packed(&it.view, matrix_bytes_f32, matrix_pack_f32);
        float y[3 * 50], y_f32[3 * 50];
        float *x = malloc((size_t)shape.rows * it.x_stride * sizeof *x);
        for (size_t i = 0; i < shape.rows * it.x_stride; i++)
            x[i] = bf16_to_float(it.x[i]);
        matmul_bf16_scalar(&w, it.x, it.x_stride, shape.rows, y, shape.n, &PARALLEL_SERIAL);
        matmul_f32(&plain, x, it.x_stride, shape.rows, y_f32, shape.n, &PARALLEL_SERIAL);
        for (uint32_t r = 0; r < shape.rows; r++)
            for (uint32_t n = 0; n < shape.n; n++) {
                double sum = 0, magnitude = 0;
                for (uint32_t k = 0; k < shape.k; k++) {
                    const double scale = scaled ? (double)element_scale(&it.view, n, k) : 1;
                    const double term = scale * (double)float_of(element_bits(&it.view, n, k)) *
                                        (double)x[r * it.x_stride + k];
                    sum += term;
                    magnitude += fabs(term);
                }
                assert_true(fabs((double)y[r * shape.n + n] - sum) < 1e-6 * magnitude);
                assert_true(fabs((double)y_f32[r * shape.n + n] - sum) < 1e-5 * magnitude);
            }
        free(x);
        free(w.data);
        free(plain.data);
        case_free(&it);
    }
}

/* The f32 profile: ascending k, no fused operation, whatever the view. */
static void f32_product_adds_in_ascending_order(void **unused) {
    const struct shape shapes[] = {{35, 77, 5, .dtype = DTYPE_F32, .row0 = 2, .col0 = 9},
                                   {16, 33, 1, .dtype = DTYPE_BF16, .transposed = true},
                                   {140, 200, 3, .dtype = DTYPE_E4M3, .scaled = true,
                                    .transposed = true, .row0 = 100, .col0 = 30}};
    for (int s = 0; s < 3; s++) {
        struct test_case it = case_make(&shapes[s]);
        struct matrix w = packed(&it.view, matrix_bytes_f32, matrix_pack_f32);
        const size_t x_elements = shapes[s].rows * it.x_stride;
        float *x = malloc(x_elements * sizeof *x);
        for (size_t i = 0; i < x_elements; i++)
            x[i] = bf16_to_float(random_bf16(ORDINARY));
        float y[5 * 140];
        matmul_f32(&w, x, it.x_stride, shapes[s].rows, y, shapes[s].n, &PARALLEL_SERIAL);
        for (uint32_t r = 0; r < shapes[s].rows; r++)
            for (uint32_t n = 0; n < shapes[s].n; n++) {
                float acc = 0;
                for (uint32_t k = 0; k < shapes[s].k; k++) {
                    const size_t row = shapes[s].row0 + (shapes[s].transposed ? k : n);
                    const size_t column = shapes[s].col0 + (shapes[s].transposed ? n : k);
                    const size_t index = row * it.view.stride + column;
                    float weight = shapes[s].dtype == DTYPE_F32
                                       ? ((float *)it.data)[index]
                                       : float_of(element_bits(&it.view, n, k));
                    if (shapes[s].scaled)
                        weight *= element_scale(&it.view, n, k);
                    acc += weight * x[r * it.x_stride + k];
                }
                assert_int_equal(bits_of(acc), bits_of(y[r * shapes[s].n + n]));
            }
        free(x);
        free(w.data);
        case_free(&it);
    }
}

/* ---- Single operations ---- */

static uint32_t random_operand(void) {
    const uint32_t random = random_bits();
    const uint32_t sign_fraction = random & 0x807fffff;
    switch (below(6)) {
    case 0:
        return sign_fraction | (60 + below(8)) << 23;
    case 1:
        return (random & 0x80000000) | (1 + below(2)) << 23 | below(2) << 22 | below(3);
    case 2:
        return (sign_fraction & 0x80ffffff) | below(3) << 23;
    case 3:
        return random;
    case 4:
        return sign_fraction | (125 + below(4)) << 23;
    default:
        return (random & 0x80000000) | 63u << 23 | (0x7fffffu << below(24) & 0x7fffff);
    }
}

#if defined(__x86_64__)
__attribute__((target("fma"))) static float hardware_fma(float a, float b, float c) {
    float result = c;
    __asm__ volatile("vfmadd231ss %2, %1, %0" : "+x"(result) : "x"(a), "x"(b));
    return result;
}
#endif

/* The processor's mode: flushing, as kernels run, or plain IEEE 754. */
static void set_flushing(bool flushing) {
#if defined(__x86_64__)
    __builtin_ia32_ldmxcsr(flushing ? 0x9fc0 : 0x1f80);
#endif
}

static void check_fma(uint32_t a, uint32_t b, uint32_t c) {
    const uint32_t expected = soft_fma(a, b, c), expected_sum = soft_fma(a, ONE, b);
    for (int flushing = 0; flushing < 2; flushing++) {
        set_flushing(flushing);
        const uint32_t found = bits_of(fma_canonical(float_of(a), float_of(b), float_of(c)));
        if (!same_bits(expected, found))
            fail_msg("fma(%08x, %08x, %08x): scalar %08x, integers %08x", a, b, c, found, expected);
        const uint32_t sum = bits_of(add_canonical(float_of(a), float_of(b)));
        if (!same_bits(expected_sum, sum))
            fail_msg("%08x + %08x: scalar %08x, integers %08x", a, b, sum, expected_sum);
    }
#if defined(__x86_64__)
    if (__builtin_cpu_supports("fma")) {
        const uint32_t hardware = bits_of(hardware_fma(float_of(a), float_of(b), float_of(c)));
        if (!same_bits(expected, hardware))
            fail_msg("fma(%08x, %08x, %08x): hardware %08x, integers %08x", a, b, c, hardware,
                     expected);
    }
#endif
}

static void one_fma_agrees_with_integers_and_hardware(void **unused) {
    /* Results just below 2^-126: where 24 bits with unbounded exponent round up to it, it stays;
     * the rest is zero. Distance from 2^-126 in units of 2^-151 beside each. */
    const struct {
        uint32_t a, b, c;
        bool stays;
    } edges[] = {
        {0x3f7fffff, 0x00800000, 0, false},          /* 2 */
        {0x19c00000, 0x9a000000, 0x00800000, false}, /* 1.5 */
        {0x99800800, 0x19fff001, 0x00800000, false}, /* 1 + 2^-36, which is 1 in double precision */
        {0x19800000, 0x9a000000, 0x00800000, true},  /* 1: the tie */
        {0x19800001, 0x99fffffe, 0x00800000, true},  /* 1 - 2^-46 */
        {0x19800000, 0x99800000, 0x00800000, true},  /* 0.5 */
        {0x00800000, 0x3f800000, 0, true},           /* 0 */
        {0x80000001, 0x3f800000, 0x00800001, true},  /* denormal operands count as zero */
    };
    for (size_t i = 0; i < sizeof edges / sizeof *edges; i++)
        for (uint32_t sign = 0; sign < 2; sign++) {
            const uint32_t a = edges[i].a ^ sign << 31, c = edges[i].c ^ sign << 31;
            const uint32_t found = soft_fma(a, edges[i].b, c);
            assert_int_equal((found & 0x7fffffff) >= 0x00800000, edges[i].stays);
            check_fma(a, edges[i].b, c);
        }
    for (int i = 0; i < 1000000; i++)
        check_fma(random_operand(), random_operand(), random_operand());
}

static void scalar_form_needs_no_processor_mode(void **unused) {
    const struct shape shape = {20, 200, 4, .dtype = DTYPE_BF16, .values = TINY};
    struct test_case it = case_make(&shape);
    struct matrix w = packed(&it.view, matrix_bytes_bf16, matrix_pack_bf16);
    float without[80], with[80];
    set_flushing(false);
    matmul_bf16_scalar(&w, it.x, it.x_stride, 4, without, 20, &PARALLEL_SERIAL);
    set_flushing(true);
    matmul_bf16_scalar(&w, it.x, it.x_stride, 4, with, 20, &PARALLEL_SERIAL);
    assert_memory_equal(without, with, sizeof with);
    free(w.data);
    case_free(&it);
}

static void e4m3_expands_exactly(void **unused) {
#if defined(__x86_64__)
    if (!isa_available(ISA_AVX512))
        skip();
    /* Every byte in every place of two tiles. */
    for (uint32_t shift = 0; shift < 256; shift++) {
        uint8_t stored[2 * TILE_ELEMENTS];
        bf16 found[2 * TILE_ELEMENTS];
        for (uint32_t i = 0; i < sizeof stored; i++)
            stored[i] = (uint8_t)(i + shift);
        for (int which = 0; which < 2; which++) {
            if (which == 1 && !__builtin_cpu_supports("avx512vbmi"))
                continue;
            (which == 0 ? expand_tiles_avx512 : expand_tiles_vbmi)(stored, found, 2);
            for (uint32_t tile = 0; tile < 2; tile++)
                for (uint32_t o = 0; o < PANEL_OUTPUTS; o++)
                    for (uint32_t i = 0; i < BLOCK_INPUTS; i++)
                        assert_int_equal(
                            found[tile * TILE_ELEMENTS + tile_index_bf16(o, i)],
                            e4m3_to_bf16(stored[tile * TILE_ELEMENTS + tile_index_e4m3(o, i)]));
        }
    }
#endif
}

/* Either the emulator ran, or the real instructions did and agree with it. */
static void amx_instructions_ran(void **unused) {
    if (form_count < 3)
        skip();
    if (!isa_available(ISA_AMX))
        assert_true(amx_emulator_count() > 1000);
    else
        assert_int_equal(amx_emulator_count(), 0);
    printf("forms compared: %s, %s, %s\n", forms[0].name, forms[1].name, forms[2].name);
}

static void names_of_instruction_sets(void **unused) {
    assert_string_equal(isa_name(ISA_SCALAR), "scalar");
    assert_string_equal(isa_name(ISA_AVX512), "avx512");
    assert_string_equal(isa_name(ISA_AMX), "amx");
    assert_true(isa_available(ISA_SCALAR));
}

int main(void) {
    random_state = SEED;
    printf("seed %u\n", SEED);
    find_forms();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(names_of_instruction_sets),
        cmocka_unit_test(one_fma_agrees_with_integers_and_hardware),
        cmocka_unit_test(scalar_form_needs_no_processor_mode),
        cmocka_unit_test(e4m3_expands_exactly),
        cmocka_unit_test(forms_give_the_defined_bits_on_odd_shapes),
        cmocka_unit_test(forms_agree_on_large_shapes),
        cmocka_unit_test(fp8_quantises_rows_by_segments),
        cmocka_unit_test(e4m3_rows_multiply_as_what_they_were),
        cmocka_unit_test(coded_weights_give_the_same_bits),
        cmocka_unit_test(tiles_are_coded_alike),
        cmocka_unit_test(weights_of_many_exponents_are_not_coded),
        cmocka_unit_test(parts_of_a_file_matrix_keep_their_scales),
        cmocka_unit_test(extreme_values_give_the_same_bits),
        cmocka_unit_test(a_row_does_not_depend_on_its_batch_nor_on_threads),
        cmocka_unit_test(sums_are_close_to_double_precision),
        cmocka_unit_test(f32_product_adds_in_ascending_order),
        cmocka_unit_test(amx_instructions_ran),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
