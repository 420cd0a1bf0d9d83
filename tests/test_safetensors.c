/* safetensors files: what whole ones give, and one test for each way in which a file can be broken.
 */
#include "actors/limits.h"
#include "tests/support/model_files.h"
#include "tests/support/random.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#define A_F32_2x3 "\"a\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,24]}"
#define B_BF16_4  "\"b\":{\"dtype\":\"BF16\",\"shape\":[4],\"data_offsets\":[24,32]}"

static int open_header(const char *header, size_t data_bytes, struct failure *failure) {
    size_t size;
    void *bytes = build_safetensors(header, NULL, data_bytes, &size);
    struct safetensors *file = NULL;
    int code = safetensors_open(&file, bytes, size, "x.safetensors", failure);
    assert_true(code < 0 ? file == NULL : file != NULL);
    safetensors_close(&file);
    free(bytes);
    return code;
}

static void test_whole_file(void **state) {
    float data[8] = {1, 2, 3, 4, 5, 6, 0, 0};
    size_t size;
    void *bytes =
        build_safetensors("{\"__metadata__\":{\"format\":\"pt\"}," B_BF16_4 "," A_F32_2x3 "}", data,
                          sizeof data, &size);
    struct safetensors *file;
    struct failure failure;
    assert_int_equal(safetensors_open(&file, bytes, size, "x.safetensors", &failure), 0);
    assert_int_equal(safetensors_count(file), 2);
    const struct tensor *a = safetensors_find(file, "a");
    assert_non_null(a);
    assert_string_equal(a->name, "a");
    assert_int_equal(a->dtype, DTYPE_F32);
    assert_int_equal(a->dims, 2);
    assert_int_equal(a->shape[0], 2);
    assert_int_equal(a->shape[1], 3);
    assert_int_equal(a->bytes, 24);
    assert_memory_equal(a->data, data, 24);
    assert_ptr_equal(safetensors_at(file, 0), a); /* in the order of the file */
    assert_ptr_equal(safetensors_at(file, 1), safetensors_find(file, "b"));
    assert_null(safetensors_find(file, "c"));
    assert_null(safetensors_find(file, "__metadata__"));
    safetensors_close(&file);
    assert_null(file);
    free(bytes);
}

static void test_odd_but_right(void **state) {
    struct failure failure;
    /* No tensors, an empty tensor, a scalar. */
    assert_int_equal(open_header("{}", 0, &failure), 0);
    assert_int_equal(
        open_header("{\"e\":{\"dtype\":\"F32\",\"shape\":[0,4],\"data_offsets\":[0,0]},"
                    "\"s\":{\"dtype\":\"I64\",\"shape\":[],\"data_offsets\":[0,8]}}",
                    8, &failure),
        0);
}

#define TENSOR(name, dtype, shape, offsets)                                                        \
    "\"" name "\":{\"dtype\":" dtype ",\"shape\":" shape ",\"data_offsets\":" offsets "}"

static void test_broken_headers(void **state) {
    static const struct {
        const char *header;
        size_t data_bytes;
        int code;
        const char *says;
    } CASES[] = {
        {"{\"a\":", 0, ERR_CORRUPT, "header"},
        {"[1]", 0, ERR_CORRUPT, "expected a JSON object"},
        {"nonsense", 0, ERR_CORRUPT, "header"},
        {"{" A_F32_2x3 "," A_F32_2x3 "}", 24, ERR_CORRUPT, "duplicate"},
        {"{" A_F32_2x3 "}", 23, ERR_CORRUPT, "within the 23 bytes"},
        {"{" A_F32_2x3 "}", 25, ERR_CORRUPT, "expected 24 bytes of tensors, found 25"},
        {"{" A_F32_2x3 "," TENSOR("b", "\"F32\"", "[2]", "[20,28]") "}", 28, ERR_CORRUPT,
         "overlap"},
        {"{" A_F32_2x3 "," TENSOR("b", "\"F32\"", "[2,3]", "[0,24]") "}", 24, ERR_CORRUPT,
         "overlap"},
        {"{" A_F32_2x3 "," TENSOR("b", "\"F32\"", "[1]", "[28,32]") "}", 32, ERR_CORRUPT, "hole"},
        {"{" TENSOR("a", "\"F32\"", "[1]", "[4,8]") "}", 8, ERR_CORRUPT, "hole"},
        {"{" TENSOR("a", "\"F32\"", "[2]", "[8,0]") "}", 8, ERR_CORRUPT, "data_offsets"},
        {"{" TENSOR("a", "\"F32\"", "[2]", "[-8,0]") "}", 8, ERR_CORRUPT, "data_offsets"},
        {"{" TENSOR("a", "\"F32\"", "[2]", "[0,9223372036854775807]") "}", 8, ERR_CORRUPT,
         "is the file whole?"},
        {"{" TENSOR("a", "\"F32\"", "[2]", "[0]") "}", 8, ERR_CORRUPT, "data_offsets"},
        {"{" TENSOR("a", "\"F32\"", "[2]", "[0,8.0]") "}", 8, ERR_CORRUPT, "data_offsets"},
        {"{" TENSOR("a", "\"F32\"", "[2]", "{}") "}", 8, ERR_CORRUPT, "data_offsets"},
        {"{" TENSOR("a", "\"F32\"", "[3]", "[0,8]") "}", 8, ERR_CORRUPT, "expected 12 bytes"},
        {"{" TENSOR("a", "\"F32\"", "[-2]", "[0,8]") "}", 8, ERR_CORRUPT, "shape"},
        {"{" TENSOR("a", "\"F32\"", "[\"2\"]", "[0,8]") "}", 8, ERR_CORRUPT, "shape"},
        {"{" TENSOR("a", "\"F32\"", "2", "[0,8]") "}", 8, ERR_CORRUPT, "shape"},
        {"{" TENSOR("a", "\"F32\"", "[1,1,1,1,2]", "[0,8]") "}", 8, ERR_CORRUPT, "at most 4"},
        /* 2^62 x 2 elements of 4 bytes wrap to 0. */
        {"{" TENSOR("a", "\"F32\"", "[4611686018427387904,2]", "[0,0]") "}", 0, ERR_CORRUPT,
         "shape"},
        {"{" TENSOR("a", "\"F64\"", "[1]", "[0,8]") "}", 8, ERR_UNSUPPORTED, "F64"},
        {"{" TENSOR("a", "\"Q4\"", "[1]", "[0,8]") "}", 8, ERR_UNSUPPORTED, "Q4"},
        {"{" TENSOR("a", "7", "[1]", "[0,8]") "}", 8, ERR_UNSUPPORTED, "dtype"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2]}}", 8, ERR_CORRUPT, "data_offsets"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8],\"x\":1}}", 8, ERR_CORRUPT,
         "an object of"},
        {"{\"a\":3}", 8, ERR_CORRUPT, "an object of"},
        {"{" TENSOR("", "\"F32\"", "[2]", "[0,8]") "}", 8, ERR_CORRUPT, "names"},
        {"{" TENSOR("a\\u0000b", "\"F32\"", "[2]", "[0,8]") "}", 8, ERR_CORRUPT, "header"},
        {"{" TENSOR("a", "\"U8\"", "[1]", "[0,1]") "," TENSOR("b", "\"F32\"", "[1]", "[1,5]") "}",
         5, ERR_UNSUPPORTED, "aligned to 4"},
    };
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        struct failure failure = {0};
        int code = open_header(CASES[i].header, CASES[i].data_bytes, &failure);
        if (code != CASES[i].code || strstr(failure.text, CASES[i].says) == NULL)
            fail_msg("%s: expected %d \"%s\", found %d \"%s\"", CASES[i].header, CASES[i].code,
                     CASES[i].says, code, failure.text);
        assert_non_null(strstr(failure.text, "x.safetensors"));
    }
}

static void test_long_name(void **state) {
    char header[4096], name[2000];
    memset(name, 'n', sizeof name - 1);
    name[sizeof name - 1] = '\0';
    snprintf(header, sizeof header,
             "{\"%s\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", name);
    struct failure failure;
    assert_int_equal(open_header(header, 8, &failure), ERR_CORRUPT);
}

static void test_broken_prefix(void **state) {
    size_t size;
    uint8_t *bytes = build_safetensors("{" A_F32_2x3 "}", NULL, 24, &size);
    struct safetensors *file = NULL;
    struct failure failure;
    for (size_t cut = 0; cut < size; cut++) { /* truncated anywhere: refused, nothing leaks */
        /* A copy of exactly that size, so that a sanitizer sees a read past its end. */
        uint8_t *part = malloc(cut > 0 ? cut : 1);
        memcpy(part, bytes, cut);
        assert_true(safetensors_open(&file, part, cut, "x", &failure) < 0);
        free(part);
    }
    bytes[3] = 0xff; /* a header of 4 GB */
    assert_int_equal(safetensors_open(&file, bytes, size, "x", &failure), ERR_TOO_LARGE);
    bytes[3] = 0;
    bytes[2] = 0x10; /* a header of 1 MB in a file of less */
    assert_int_equal(safetensors_open(&file, bytes, size, "x", &failure), ERR_CORRUPT);
    memset(bytes, 0xff, 8); /* the largest length */
    assert_int_equal(safetensors_open(&file, bytes, size, "x", &failure), ERR_TOO_LARGE);
    free(bytes);
}

/* Bytes of a valid file changed at random: whatever opens keeps the promises of the header. */
static void test_random_damage(void **state) {
    const uint64_t seed = 20240607;
    printf("seed %llu\n", (unsigned long long)seed);
    uint64_t random = seed;
    size_t size;
    uint8_t *whole = build_safetensors("{" A_F32_2x3 "," B_BF16_4 "}", NULL, 32, &size);
    uint8_t *bytes = aligned_alloc(64, (size / 64 + 1) * 64);
    uint32_t opened = 0;
    for (int round = 0; round < 20000; round++) {
        memcpy(bytes, whole, size);
        for (uint32_t i = 0, changes = 1 + random_below(&random, 3); i < changes; i++)
            bytes[random_below(&random, (uint32_t)size - 32)] = (uint8_t)random_next(&random);
        struct safetensors *file = NULL;
        struct failure failure;
        if (safetensors_open(&file, bytes, size, "x", &failure) < 0)
            continue;
        opened++;
        for (uint32_t i = 0; i < safetensors_count(file); i++) {
            const struct tensor *tensor = safetensors_at(file, i);
            const uint8_t *data = tensor->data;
            assert_true(data >= bytes + 8 && data + tensor->bytes <= bytes + size);
            assert_ptr_equal(safetensors_find(file, tensor->name), tensor);
        }
        safetensors_close(&file);
    }
    printf("%u of 20000 damaged files still opened\n", opened);
    assert_true(opened > 0); /* changes within names leave a valid file */
    free(whole);
    free(bytes);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_whole_file),     cmocka_unit_test(test_odd_but_right),
        cmocka_unit_test(test_broken_headers), cmocka_unit_test(test_long_name),
        cmocka_unit_test(test_broken_prefix),  cmocka_unit_test(test_random_damage),
    };
    return cmocka_run_group_tests_name("safetensors", tests, NULL, NULL);
}
