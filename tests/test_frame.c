/* Data frames: layout, checks against damage and lies, checksum in all its forms. */
#include "actors/limits.h"
#include "engine/sample.h"
#include "kernels/parallel.h"
#include "proto/crc32c.h"
#include "proto/frame.h"
#include "tests/support/random.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#define BUFFER_BYTES 8192

struct buffer {
    _Alignas(FRAME_ALIGN) uint8_t bytes[BUFFER_BYTES];
    size_t size;
};

static struct frame_header *header_of(struct buffer *buffer) {
    return (struct frame_header *)buffer->bytes;
}

/* A sealed, valid frame of the kind; payload bytes count up. */
static void build(struct buffer *ret, enum frame_kind kind) {
    memset(ret, 0, sizeof *ret);
    struct frame_header *header = header_of(ret);
    *header = (struct frame_header){.magic = FRAME_MAGIC,
                                    .version = FRAME_VERSION,
                                    .kind = (uint16_t)kind,
                                    .from = 7,
                                    .to = 9,
                                    .from_incarnation = 0x1122334455667788,
                                    .to_incarnation = 0x99aabbccddeeff00,
                                    .epoch = 3,
                                    .batch = 12345,
                                    .layer = 4,
                                    .attempt = 1,
                                    .part = 2};
    switch (kind) {
    case FRAME_DISPATCH:
        header->rows = 3, header->items = 5, header->groups = 2, header->row_bytes = 100;
        break;
    case FRAME_COMBINE:
        header->rows = 3, header->items = 5, header->row_bytes = 200;
        break;
    case FRAME_MOVED:
        header->detail = 17;
        break;
    case FRAME_SAMPLE:
        header->rows = 2, header->items = 7, header->row_bytes = 100;
        break;
    case FRAME_SAMPLED:
        header->rows = 2, header->items = 7;
        break;
    case FRAME_MESSAGE:
        header->items = 7, header->detail = 26;
        break;
    }
    ret->size = frame_bytes(kind, header->rows, header->items, header->groups, header->row_bytes);
    assert_true(ret->size >= sizeof *header && ret->size <= BUFFER_BYTES);
    header->payload_bytes = (uint32_t)(ret->size - sizeof *header);
    for (size_t i = sizeof *header; i < ret->size; i++)
        ret->bytes[i] = (uint8_t)i;
    if (kind == FRAME_DISPATCH) {
        const struct frame_group groups[] = {{11, 2}, {30, 3}};
        const uint32_t rows[] = {0, 2, 0, 1, 2};
        memcpy(ret->bytes + sizeof *header, groups, sizeof groups);
        memcpy(ret->bytes + sizeof *header + sizeof groups, rows, sizeof rows);
    }
    frame_seal(header);
}

static const enum frame_kind KINDS[] = {FRAME_DISPATCH, FRAME_COMBINE, FRAME_MOVED, FRAME_SAMPLE,
                                        FRAME_SAMPLED};

static void test_layout(void **state) {
    /* Rows start at a multiple of 64; sizes by hand from the table in frame.h. */
    assert_int_equal(frame_rows_offset(FRAME_DISPATCH, 3, 5, 2), 192); /* 96 + 16 + 20 */
    assert_int_equal(frame_bytes(FRAME_DISPATCH, 3, 5, 2, 100), 192 + 300);
    assert_int_equal(frame_rows_offset(FRAME_COMBINE, 3, 5, 0), 128);
    assert_int_equal(frame_bytes(FRAME_COMBINE, 3, 5, 0, 200), 128 + 1000);
    assert_int_equal(frame_bytes(FRAME_MOVED, 0, 0, 0, 0), 96);
    size_t spec = sizeof(struct sample_spec), result = sizeof(struct sample_result);
    assert_int_equal(frame_rows_offset(FRAME_SAMPLE, 2, 7, 0), (96 + 2 * spec + 28 + 63) / 64 * 64);
    assert_int_equal(frame_bytes(FRAME_SAMPLED, 2, 7, 0, 0), 96 + 2 * result + 28);
    /* Exactly filled up to a border: no padding. */
    assert_int_equal(frame_rows_offset(FRAME_DISPATCH, 1, 6, 1), 128);
    assert_int_equal(frame_rows_offset(FRAME_DISPATCH, 1, 7, 1), 192);
}

static void test_sizes_over_limits(void **state) {
    assert_int_equal(frame_bytes(FRAME_DISPATCH, FRAME_ROWS_MAX + 1, 1, 1, 2), 0);
    assert_int_equal(frame_bytes(FRAME_DISPATCH, 1, FRAME_ITEMS_MAX + 1, 1, 2), 0);
    assert_int_equal(frame_bytes(FRAME_DISPATCH, 1, 1, EXPERTS_MAX + 1, 2), 0);
    assert_int_equal(frame_bytes(FRAME_COMBINE, 1, FRAME_ITEMS_MAX, 0, UINT32_MAX), 0);
    assert_int_equal(frame_bytes(FRAME_SAMPLED, 1, UINT32_MAX, 0, 0), 0);
    assert_int_equal(frame_bytes(FRAME_SAMPLED, 1, 1, 0, 4), 0);
    assert_int_equal(frame_bytes(FRAME_MOVED, 0, 0, 0, 4), 0);
    assert_int_equal(frame_bytes((enum frame_kind)0, 1, 1, 0, 4), 0);
    assert_int_equal(frame_bytes((enum frame_kind)6, 1, 1, 0, 4), 0);
    assert_int_equal(frame_rows_offset(FRAME_DISPATCH, UINT32_MAX, UINT32_MAX, UINT32_MAX), 0);
    assert_int_equal(frame_rows_offset((enum frame_kind)99, 1, 1, 1), 0);
    /* The largest payload is allowed, one byte more is not. */
    assert_int_equal(frame_bytes(FRAME_COMBINE, 1, 1, 0, FRAME_PAYLOAD_MAX - 32),
                     96 + (size_t)FRAME_PAYLOAD_MAX);
    assert_int_equal(frame_bytes(FRAME_COMBINE, 1, 1, 0, FRAME_PAYLOAD_MAX - 28), 0);
    /* All logits of a 129,280-word vocabulary for many rows. */
    assert_true(frame_bytes(FRAME_SAMPLED, 32, 32 * 129280, 0, 0) > 0);
}

static void test_whole_frames(void **state) {
    for (size_t k = 0; k < sizeof KINDS / sizeof *KINDS; k++) {
        struct buffer buffer;
        build(&buffer, KINDS[k]);
        struct failure failure = {0};
        if (frame_check(buffer.bytes, buffer.size, 1, &failure) != 0)
            fail_msg("kind %d: %s", KINDS[k], failure.text);
        /* Bytes behind the frame (the rest of a ring) do not matter. */
        assert_int_equal(frame_check(buffer.bytes, buffer.size + 100, 1, &failure), 0);
        header_of(&buffer)->crc ^= 1;
        assert_int_equal(frame_check(buffer.bytes, buffer.size, 0, &failure), 0);
        assert_int_equal(frame_check(buffer.bytes, buffer.size, 1, NULL), ERR_CORRUPT);
    }
}

static void test_parts(void **state) {
    struct buffer buffer;
    build(&buffer, FRAME_DISPATCH);
    struct frame frame = {header_of(&buffer), buffer.bytes + sizeof(struct frame_header)};
    assert_int_equal(frame_groups(&frame)[1].expert, 30);
    assert_int_equal(frame_item_rows(&frame)[1], 2);
    assert_ptr_equal(frame_rows(&frame), buffer.bytes + 192);
    build(&buffer, FRAME_COMBINE);
    assert_null(frame_groups(&frame));
    assert_null(frame_item_rows(&frame));
    assert_ptr_equal(frame_rows(&frame), buffer.bytes + 128);
    build(&buffer, FRAME_SAMPLE);
    assert_ptr_equal(frame_rows(&frame), buffer.bytes + frame_rows_offset(FRAME_SAMPLE, 2, 7, 0));
    build(&buffer, FRAME_SAMPLED);
    assert_null(frame_rows(&frame));
    build(&buffer, FRAME_MOVED);
    assert_null(frame_rows(&frame));
}

/* Any single bit of any frame, header or payload: refused. */
static int check_summed(const struct buffer *buffer, struct failure *failure) {
    const size_t header = sizeof(struct frame_header);
    return frame_check_summed(buffer->bytes, buffer->size,
                              crc32c(0, buffer->bytes + header, buffer->size - header), failure);
}

static void test_every_bit(void **state) {
    for (size_t k = 0; k < sizeof KINDS / sizeof *KINDS; k++) {
        struct buffer buffer;
        build(&buffer, KINDS[k]);
        for (size_t bit = 0; bit < buffer.size * 8; bit++) {
            buffer.bytes[bit / 8] ^= (uint8_t)(1 << bit % 8);
            struct failure failure = {0};
            if (frame_check(buffer.bytes, buffer.size, 1, &failure) >= 0)
                fail_msg("kind %d: bit %zu changed and accepted", KINDS[k], bit);
            assert_true(strncmp(failure.text, "frame", 5) == 0);
            if (check_summed(&buffer, &failure) >= 0)
                fail_msg("kind %d: bit %zu changed and accepted with its sum", KINDS[k], bit);
            buffer.bytes[bit / 8] ^= (uint8_t)(1 << bit % 8);
        }
        assert_int_equal(check_summed(&buffer, NULL), 0);
        assert_int_equal(frame_check(buffer.bytes, buffer.size, 1, NULL), 0);
    }
}

static void test_truncated(void **state) {
    for (size_t k = 0; k < sizeof KINDS / sizeof *KINDS; k++) {
        struct buffer buffer;
        build(&buffer, KINDS[k]);
        for (size_t size = 0; size < buffer.size; size++) {
            uint8_t *part =
                malloc(size > 0 ? size : 1); /* exact, so that a sanitizer sees overreads */
            memcpy(part, buffer.bytes, size);
            struct failure failure = {0};
            assert_int_equal(frame_check(part, size, 1, &failure), ERR_CORRUPT);
            assert_non_null(strstr(failure.text, "expected"));
            free(part);
        }
    }
}

/* A sender that seals lies: the checksum is right, the contents are not. */
static void test_sealed_lies(void **state) {
#define FIELD(field) offsetof(struct frame_header, field), sizeof((struct frame_header){0}.field)
    static const struct {
        enum frame_kind kind;
        size_t offset, size;
        uint64_t value;
        int code;
        const char *says;
    } CASES[] = {
        {FRAME_DISPATCH, FIELD(magic), 0x12345678, ERR_CORRUPT, "magic"},
        {FRAME_DISPATCH, FIELD(version), 2, ERR_VERSION, "version: expected 1, found 2"},
        {FRAME_DISPATCH, FIELD(kind), 0, ERR_CORRUPT, "kind"},
        {FRAME_DISPATCH, FIELD(kind), 7, ERR_CORRUPT, "kind"},
        {FRAME_DISPATCH, FIELD(kind), 0xffff, ERR_CORRUPT, "kind"},
        {FRAME_DISPATCH, FIELD(kind), FRAME_COMBINE, ERR_CORRUPT, "payload"},
        {FRAME_DISPATCH, FIELD(rows), 0, ERR_CORRUPT, "rows: expected 1 to"},
        {FRAME_DISPATCH, FIELD(rows), 2, ERR_CORRUPT, "payload: expected"},
        {FRAME_DISPATCH, FIELD(rows), FRAME_ROWS_MAX + 1, ERR_TOO_LARGE, "rows"},
        {FRAME_DISPATCH, FIELD(rows), UINT32_MAX, ERR_TOO_LARGE, "rows"},
        {FRAME_DISPATCH, FIELD(items), 0, ERR_CORRUPT, "items"},
        {FRAME_DISPATCH, FIELD(items), UINT32_MAX, ERR_TOO_LARGE, "items"},
        /* One item more fits the same padding: found by the groups' sum. */
        {FRAME_DISPATCH, FIELD(items), 6, ERR_CORRUPT, "groups: expected 6 items in all, found 5"},
        {FRAME_DISPATCH, FIELD(groups), 0, ERR_CORRUPT, "groups"},
        {FRAME_DISPATCH, FIELD(groups), EXPERTS_MAX + 1, ERR_TOO_LARGE, "groups"},
        {FRAME_DISPATCH, FIELD(groups), 1, ERR_CORRUPT, "payload"},
        {FRAME_DISPATCH, FIELD(row_bytes), 0, ERR_CORRUPT, "row bytes"},
        {FRAME_DISPATCH, FIELD(row_bytes), 99, ERR_CORRUPT, "multiple of 2"},
        {FRAME_DISPATCH, FIELD(row_bytes), 102, ERR_CORRUPT, "payload"},
        {FRAME_DISPATCH, FIELD(row_bytes), UINT32_MAX - 1, ERR_TOO_LARGE, "row bytes"},
        {FRAME_DISPATCH, FIELD(layer), UINT32_MAX, ERR_TOO_LARGE, "layer"},
        {FRAME_DISPATCH, FIELD(detail), 1, ERR_TOO_LARGE, "detail"},
        {FRAME_DISPATCH, FIELD(reserved), 1, ERR_TOO_LARGE, "reserved"},
        {FRAME_DISPATCH, FIELD(format), 1, ERR_CORRUPT, "multiple of 132"},
        {FRAME_MESSAGE, FIELD(detail), 24, ERR_CORRUPT, "detail"},
        {FRAME_MESSAGE, FIELD(detail), 29, ERR_TOO_LARGE, "detail"},
        {FRAME_MESSAGE, FIELD(rows), 1, ERR_TOO_LARGE, "rows"},
        {FRAME_MESSAGE, FIELD(items), 100000, ERR_TOO_LARGE, "items"},
        {FRAME_DISPATCH, FIELD(format), 2, ERR_TOO_LARGE, "format"},
        {FRAME_COMBINE, FIELD(format), 1, ERR_TOO_LARGE, "format"},
        {FRAME_SAMPLE, FIELD(format), 1, ERR_TOO_LARGE, "format"},
        {FRAME_COMBINE, FIELD(items), 0, ERR_CORRUPT, "items"},
        {FRAME_COMBINE, FIELD(items), 4, ERR_CORRUPT, "payload"},
        {FRAME_COMBINE, FIELD(row_bytes), 198, ERR_CORRUPT, "multiple of 4"},
        {FRAME_MOVED, FIELD(detail), EXPERTS_MAX, ERR_TOO_LARGE, "detail"},
        {FRAME_MOVED, FIELD(row_bytes), 4, ERR_TOO_LARGE, "row bytes"},
        {FRAME_SAMPLE, FIELD(rows), 0, ERR_CORRUPT, "rows"},
        {FRAME_SAMPLE, FIELD(items), 1000, ERR_CORRUPT, "payload"},
        {FRAME_SAMPLE, FIELD(groups), 1, ERR_TOO_LARGE, "groups"},
        {FRAME_SAMPLED, FIELD(items), 6, ERR_CORRUPT, "payload"},
        {FRAME_SAMPLED, FIELD(items), UINT32_MAX, ERR_TOO_LARGE, "items"},
        {FRAME_SAMPLED, FIELD(row_bytes), 4, ERR_TOO_LARGE, "row bytes"},
    };
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        struct buffer buffer;
        build(&buffer, CASES[i].kind);
        memcpy(buffer.bytes + CASES[i].offset, &CASES[i].value, CASES[i].size);
        frame_seal(header_of(&buffer));
        struct failure failure = {0};
        int code = frame_check(buffer.bytes, buffer.size, 1, &failure);
        if (code != CASES[i].code || strstr(failure.text, CASES[i].says) == NULL)
            fail_msg("case %zu: expected %d \"%s\", found %d \"%s\"", i, CASES[i].code,
                     CASES[i].says, code, failure.text);
    }
    /* payload_bytes is checked before the checksum reads that far. */
    struct buffer buffer;
    struct failure failure = {0};
    build(&buffer, FRAME_COMBINE);
    header_of(&buffer)->payload_bytes = FRAME_PAYLOAD_MAX + 1;
    assert_int_equal(frame_check(buffer.bytes, buffer.size, 1, &failure), ERR_TOO_LARGE);
    header_of(&buffer)->payload_bytes = FRAME_PAYLOAD_MAX;
    assert_int_equal(frame_check(buffer.bytes, buffer.size, 1, &failure), ERR_CORRUPT);
    header_of(&buffer)->payload_bytes = 0;
    frame_seal(header_of(&buffer));
    assert_int_equal(frame_check(buffer.bytes, buffer.size, 1, &failure), ERR_CORRUPT);
}

static void test_dispatch_lies(void **state) {
    static const struct {
        size_t word; /* of the payload: 4 of groups, then item rows */
        uint32_t value;
        const char *says;
    } CASES[] = {
        {0, EXPERTS_MAX, "expected an expert below"},
        {1, 0, "at least 1 item"},
        {1, 3, "expected 5 items in all, found 6"},
        {1, UINT32_MAX, "items in all"},
        {4, 3, "item 0: expected a row below 3, found 3"},
        {8, UINT32_MAX, "item 4: expected a row below 3"},
    };
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        struct buffer buffer;
        build(&buffer, FRAME_DISPATCH);
        memcpy(buffer.bytes + sizeof(struct frame_header) + 4 * CASES[i].word, &CASES[i].value, 4);
        frame_seal(header_of(&buffer));
        struct failure failure = {0};
        assert_int_equal(frame_check(buffer.bytes, buffer.size, 1, &failure), ERR_CORRUPT);
        if (strstr(failure.text, CASES[i].says) == NULL)
            fail_msg("case %zu: found \"%s\"", i, failure.text);
        assert_int_equal(frame_check(buffer.bytes, buffer.size, 0, NULL), ERR_CORRUPT);
    }
}

/* Random headers, sealed or unchecked: never a read out of bounds, and what passes keeps every
 * promise. */
static void test_random_headers(void **state) {
    const uint64_t seed = 77;
    printf("seed %llu\n", (unsigned long long)seed);
    uint64_t random = seed;
    uint32_t passed = 0;
    for (int round = 0; round < 50000; round++) {
        struct buffer buffer;
        build(&buffer, KINDS[random_below(&random, 5)]);
        uint32_t *words = (uint32_t *)buffer.bytes;
        for (uint32_t n = 1 + random_below(&random, 3); n > 0; n--) {
            uint32_t value = random_below(&random, 2) ? random_below(&random, 8)
                                                      : (uint32_t)random_next(&random);
            words[3 + random_below(&random, (uint32_t)(buffer.size / 4) - 3)] = value;
        }
        if (header_of(&buffer)->payload_bytes <= BUFFER_BYTES - sizeof(struct frame_header))
            frame_seal(header_of(&buffer));
        if (frame_check(buffer.bytes, buffer.size, 1, NULL) < 0)
            continue;
        passed++;
        struct frame frame = {header_of(&buffer), buffer.bytes + sizeof(struct frame_header)};
        const uint8_t *rows = frame_rows(&frame);
        uint64_t count =
            frame.header->kind == FRAME_COMBINE ? frame.header->items : frame.header->rows;
        if (rows != NULL)
            assert_true(rows + count * frame.header->row_bytes <= buffer.bytes + buffer.size);
    }
    printf("%u of 50000 changed frames are still valid\n", passed);
    assert_true(passed > 1000);
}

/* ---- checksum ---- */

static uint32_t crc_bitwise(uint32_t crc, const uint8_t *bytes, size_t size) {
    crc = ~crc;
    for (size_t i = 0; i < size; i++) {
        crc ^= bytes[i];
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0);
    }
    return ~crc;
}

static void test_crc_vectors(void **state) {
    uint8_t bytes[32];
    assert_int_equal(crc32c(0, "123456789", 9), 0xe3069283); /* the usual check value */
    assert_int_equal(crc32c(0, "", 0), 0);
    /* RFC 3720, appendix B.4. */
    memset(bytes, 0, 32);
    assert_int_equal(crc32c(0, bytes, 32), 0x8a9136aa);
    memset(bytes, 0xff, 32);
    assert_int_equal(crc32c(0, bytes, 32), 0x62a8ab43);
    for (int i = 0; i < 32; i++)
        bytes[i] = (uint8_t)i;
    assert_int_equal(crc32c(0, bytes, 32), 0x46dd794e);
    for (int i = 0; i < 32; i++)
        bytes[i] = (uint8_t)(31 - i);
    assert_int_equal(crc32c(0, bytes, 32), 0x113fdb5c);
}

/* All forms, odd starts and lengths around every border of the sums in parts, in one piece and in
 * two. */
static void test_crc_forms(void **state) {
    const uint64_t seed = 5;
    uint64_t random = seed;
    const size_t room = 40000;
    uint8_t *bytes = malloc(room + 16);
    for (size_t i = 0; i < room + 16; i++)
        bytes[i] = (uint8_t)random_next(&random);
    static const size_t SIZES[] = {0,   1,   7,   8,    9,     63,    64,    767,   768,   769, 775,
                                   776, 127, 128, 129,  191,   192,   255,   256,   319,   320, 511,
                                   512, 513, 575, 576,  1023,  1024,  1025,  1087,  1088,  1152, 1344,
                                   1536, 4095, 4096,    12287, 12288, 12289, 13056, 40000};
    for (size_t i = 0; i < sizeof SIZES / sizeof *SIZES; i++) {
        for (size_t start = 0; start < 9; start += 3) {
            uint32_t crc = (uint32_t)random_next(&random);
            uint32_t expected = crc_bitwise(crc, bytes + start, SIZES[i]);
            assert_int_equal(crc32c(crc, bytes + start, SIZES[i]), expected);
            assert_int_equal(crc32c_portable(crc, bytes + start, SIZES[i]), expected);
#if defined(__x86_64__)
            if (__builtin_cpu_supports("sse4.2"))
                assert_int_equal(crc32c_sse42(crc, bytes + start, SIZES[i]), expected);
            if (crc32c_avx512_runs())
                assert_int_equal(crc32c_avx512(crc, bytes + start, SIZES[i]), expected);
#endif
            size_t cut = SIZES[i] > 0 ? random_below(&random, (uint32_t)SIZES[i]) : 0;
            assert_int_equal(
                crc32c(crc32c(crc, bytes + start, cut), bytes + start + cut, SIZES[i] - cut),
                expected);
        }
    }
    /* Shifting a register = feeding zero bytes. */
    uint8_t *zeros = calloc(1, 1000);
    for (size_t size = 0; size < 1000; size += 37) {
        uint32_t reg = (uint32_t)random_next(&random);
        assert_int_equal(crc32c_shift(reg, size), ~crc_bitwise(~reg, zeros, size));
    }
    free(zeros);
    for (int i = 0; i < 50; i++) { /* two pieces, each summed by itself */
        size_t size = random_below(&random, 1000), cut = random_below(&random, (uint32_t)size + 1);
        uint32_t first = crc32c(0, bytes, cut), second = crc32c(0, bytes + cut, size - cut);
        assert_int_equal(crc32c_join(first, second, size - cut), crc32c(0, bytes, size));
    }
    free(bytes);
}

/* Whatever the number of threads, from any sum before. */
static void test_sum_by_many_threads(void **state) {
    enum { MOST = 3 << 20 };
    uint64_t random = 11;
    uint8_t *bytes = malloc(MOST);
    for (size_t i = 0; i < MOST; i++)
        bytes[i] = (uint8_t)random_next(&random);
    for (int width = 1; width <= 20; width++) {
        struct parallel parallel = PARALLEL_SERIAL;
        parallel.width = width;
        const size_t size = random_below(&random, MOST + 1);
        const uint32_t crc = (uint32_t)random_next(&random);
        assert_int_equal(crc32c_parallel(&parallel, crc, bytes, size), crc32c(crc, bytes, size));
        assert_int_equal(crc32c_parallel(&parallel, crc, bytes, 0), crc);
    }
    free(bytes);
}

static void test_rows_summed_before(void **state) {
    for (size_t i = 0; i < sizeof KINDS / sizeof *KINDS; i++) {
        struct buffer buffer;
        build(&buffer, KINDS[i]);
        struct frame_header *header = header_of(&buffer);
        uint32_t whole = header->crc;
        for (size_t offset = sizeof *header; offset <= buffer.size; offset += 7) {
            header->crc = 0x12345678;
            frame_seal_rows(header, offset,
                            crc32c(0, buffer.bytes + offset, buffer.size - offset));
            assert_int_equal(header->crc, whole);
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_layout),         cmocka_unit_test(test_sizes_over_limits),
        cmocka_unit_test(test_whole_frames),   cmocka_unit_test(test_parts),
        cmocka_unit_test(test_every_bit),      cmocka_unit_test(test_truncated),
        cmocka_unit_test(test_sealed_lies),    cmocka_unit_test(test_dispatch_lies),
        cmocka_unit_test(test_random_headers), cmocka_unit_test(test_crc_vectors),
        cmocka_unit_test(test_crc_forms),      cmocka_unit_test(test_sum_by_many_threads), cmocka_unit_test(test_rows_summed_before),
    };
    return cmocka_run_group_tests_name("frame", tests, NULL, NULL);
}
