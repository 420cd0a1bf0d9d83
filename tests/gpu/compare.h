/* What the kernel tests share: arrays that live on the device and on the host, with guards around
 * the device's, random contents and comparison bit by bit. Each kernel runs under several orders of
 * threads. */
#ifndef TROUPE_TESTS_GPU_COMPARE_H
#define TROUPE_TESTS_GPU_COMPARE_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/cuda_ops.h"
#include "kernels/ops.h"
#include "kernels/rows.h"
#include "tests/support/gpu.h"
#include "tests/support/random.h"

/* last: cmocka has a macro fail() */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>

#define GUARD     64 /* bytes before and after, which no kernel may touch */
#define SCHEDULES 3

struct array {
    uint8_t *host;   /* bytes, what was put or got */
    uint8_t *device; /* with guards */
    size_t bytes;
};

static inline struct array array_make(size_t bytes) {
    struct array ret = {calloc(1, bytes + 1), gpu_take(bytes + 2 * GUARD), bytes};
    assert_non_null(ret.host);
    return ret;
}
static inline void *array_device(const struct array *self) {
    return self->device + GUARD;
}
/* To the device; everything that is not given holds 0xc5 there. */
static inline void array_put(const struct array *self) {
    uint8_t *whole = malloc(self->bytes + 2 * GUARD);
    memset(whole, 0xc5, self->bytes + 2 * GUARD);
    memcpy(whole + GUARD, self->host, self->bytes);
    gpu_put(self->device, whole, self->bytes + 2 * GUARD);
    free(whole);
}
static inline void array_get(const struct array *self) {
    assert_int_equal(gpu_wait(), 0);
    uint8_t *whole = malloc(self->bytes + 2 * GUARD);
    gpu_get(whole, self->device, self->bytes + 2 * GUARD);
    for (size_t i = 0; i < GUARD; i++)
        if (whole[i] != 0xc5 || whole[GUARD + self->bytes + i] != 0xc5)
            fail_msg("the kernel wrote outside an array of %zu bytes", self->bytes);
    memcpy(self->host, whole + GUARD, self->bytes);
    free(whole);
}
static inline void array_free(struct array *self) {
    free(self->host);
    gpu_give(self->device);
}

static inline void fill_floats(struct array *self, uint64_t *random, float low, float high) {
    float *to = (float *)self->host;
    for (size_t i = 0; i < self->bytes / 4; i++)
        to[i] = random_float(random, low, high);
}
static inline void fill_bf16(struct array *self, uint64_t *random, float low, float high) {
    bf16 *to = (bf16 *)self->host;
    for (size_t i = 0; i < self->bytes / 2; i++)
        to[i] = bf16_from_float(random_float(random, low, high));
}
static inline void fill_bytes(struct array *self, uint8_t value) {
    memset(self->host, value, self->bytes);
}

static inline void assert_same(const struct array *got, const void *expected, const char *what) {
    if (memcmp(got->host, expected, got->bytes) == 0)
        return;
    for (size_t i = 0; i < got->bytes; i++)
        if (got->host[i] != ((const uint8_t *)expected)[i])
            fail_msg("%s: byte %zu of %zu: expected %02x, found %02x", what, i, got->bytes,
                     ((const uint8_t *)expected)[i], got->host[i]);
}

static inline int device_name(void **state) {
    (void)state;
    char name[256];
    numerics_enter();
    bool usable = gpu_open(name, sizeof name);
    print_message("device: %s\n", name);
    if (!usable)
        print_message("SKIP: a Hopper card is needed\n");
    return usable ? 0 : -1;
}

#endif
