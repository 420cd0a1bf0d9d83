/* CRC32C in its three forms, for frame.c and the tests that compare them. Callers use crc32c() of
 * proto/frame.h. */
#ifndef TROUPE_CRC32C_H
#define TROUPE_CRC32C_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

uint32_t crc32c_portable(uint32_t crc, const void *bytes, size_t size);
#if defined(__x86_64__)
uint32_t crc32c_sse42(uint32_t crc, const void *bytes, size_t size);
uint32_t crc32c_avx512(uint32_t crc, const void *bytes, size_t size); /* only where it runs */
bool crc32c_avx512_runs(void);
#endif

/* The register after `size` zero bytes, given the register before: a linear map over GF(2). Joins
 * CRCs of neighbouring pieces: register(A B) = crc32c_shift(register(A), bytes of B) ^ register of
 * B started from 0. */
uint32_t crc32c_shift(uint32_t reg, size_t size);

#endif
