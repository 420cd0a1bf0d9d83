/* Weights through page-locked buffers, on a device that is played: copies read their buffer when
 * they happen, at the latest when they are waited for, so a buffer that is filled too early shows
 * as wrong bytes. Every call fails once. */
#include "kernels/staging.h"
#include "tests/support/random.h"

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <setjmp.h>
#include <cmocka.h>

enum { COPIES_MAX = 64, BUFFER = 100 };

static struct device {
    uint64_t random;
    struct {
        uint8_t *to;
        const uint8_t *from;
        size_t bytes;
    } copy[COPIES_MAX];
    uint32_t begun, done;
    uint32_t recorded[STAGING_BUFFERS]; /* copies begun when it was */
    bool fresh[STAGING_BUFFERS];        /* recorded since it was waited for */
    uint32_t held;                      /* page-locked blocks */
    uint32_t calls, fail_at;            /* 0: none */
    uint32_t waits_with_work;
} device;

static bool fails(void) {
    return ++device.calls == device.fail_at;
}
static void happen(uint32_t until) {
    for (; device.done < until; device.done++)
        memcpy(device.copy[device.done].to, device.copy[device.done].from,
               device.copy[device.done].bytes);
}
static int take(void *context, size_t bytes, void **ret) {
    (void)context;
    if (fails())
        return 2;
    device.held++;
    *ret = malloc(bytes);
    return 0;
}
static void give(void *context, void *memory) {
    (void)context;
    assert_int_equal(device.done, device.begun); /* nothing reads it any more */
    device.held--;
    free(memory);
}
static int copy(void *context, void *to, const void *from, size_t bytes) {
    (void)context;
    if (fails())
        return 700;
    assert_true(device.begun < COPIES_MAX);
    device.copy[device.begun].to = to;
    device.copy[device.begun].from = from;
    device.copy[device.begun++].bytes = bytes;
    if (random_below(&device.random, 3) == 0) /* the copy engine is as quick as it likes */
        happen(device.done + random_below(&device.random, device.begun - device.done + 1));
    return 0;
}
static int record(void *context, uint32_t buffer) {
    (void)context;
    if (fails())
        return 701;
    device.recorded[buffer] = device.begun;
    device.fresh[buffer] = true;
    return 0;
}
static int wait_for(void *context, uint32_t buffer) {
    (void)context;
    assert_true(device.fresh[buffer]);
    device.fresh[buffer] = false;
    device.waits_with_work += device.done < device.begun;
    if (fails())
        return 702;
    happen(device.recorded[buffer]);
    return 0;
}
static int settle(void *context) {
    (void)context;
    happen(device.begun);
    return 0;
}
static const struct staging_api API = {take, give, copy, record, wait_for, settle, NULL};

static uint32_t next_row;
static void fill(void *context, uint32_t first, uint32_t rows, void *ret) {
    const size_t row_bytes = *(const size_t *)context;
    assert_int_equal(first, next_row); /* in order, each row once */
    next_row = first + rows;
    for (size_t i = 0; i < rows * row_bytes; i++)
        ((uint8_t *)ret)[i] =
            (uint8_t)((first * row_bytes + i) * 7 + (first * row_bytes + i) / 251);
}

/* One put; what it returned. */
static int put(uint64_t seed, size_t row_bytes, uint32_t rows, uint32_t fail_at) {
    uint8_t to[2048];
    struct staging staging;
    memset(&device, 0, sizeof device);
    device.random = seed;
    device.fail_at = fail_at;
    next_row = 0;
    memset(to, 0xee, sizeof to);
    int error = staging_open(&staging, &API, BUFFER);
    if (error == 0) {
        error = staging_put(&staging, to, row_bytes, rows, fill, &row_bytes);
        if (fail_at == 0 || device.calls < fail_at)
            for (size_t i = 0; i < sizeof to; i++)
                assert_int_equal(to[i], i < rows * row_bytes ? (uint8_t)(i * 7 + i / 251) : 0xee);
        assert_int_equal(device.done, device.begun);
        staging_close(&staging);
    }
    assert_int_equal(device.held, 0);
    return error;
}

static const struct {
    size_t row_bytes;
    uint32_t rows;
} SHAPES[] = {{10, 1},  {10, 10}, {10, 11}, {10, 20}, {10, 21},
              {7, 100}, {100, 9}, {64, 20}, {33, 31}};

static void rows_arrive_in_order(void **state) {
    (void)state;
    uint32_t overlapped = 0;
    for (uint64_t seed = 1; seed <= 200; seed++)
        for (size_t s = 0; s < sizeof SHAPES / sizeof *SHAPES; s++) {
            assert_int_equal(put(seed, SHAPES[s].row_bytes, SHAPES[s].rows, 0), 0);
            overlapped += device.waits_with_work;
        }
    assert_true(overlapped > 1000); /* copies were under way while buffers were filled */
    assert_int_equal(put(1, 10, 0, 0), 0);
    assert_int_equal(put(1, 0, 10, 0), 0);
}

static void any_call_may_fail(void **state) {
    (void)state;
    for (size_t s = 0; s < sizeof SHAPES / sizeof *SHAPES; s++) {
        assert_int_equal(put(3, SHAPES[s].row_bytes, SHAPES[s].rows, 0), 0);
        const uint32_t calls = device.calls;
        for (uint32_t at = 1; at <= calls; at++) {
            const int error = put(3 + at, SHAPES[s].row_bytes, SHAPES[s].rows, at);
            assert_true(error == 2 || (error >= 700 && error <= 702));
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rows_arrive_in_order),
        cmocka_unit_test(any_call_may_fail),
    };
    return cmocka_run_group_tests_name("staging", tests, NULL, NULL);
}
