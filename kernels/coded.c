/* BF16 weights in 12 bits, without loss: sign and fraction as they are, and the exponent as one of
 * the 16 that are most frequent in the matrix. Trained weights spread over few powers of two, so
 * hardly one in ten thousand has another exponent; those are listed and put right after a tile was
 * expanded.
 *
 * A product of few rows waits for memory: a quarter fewer bytes are worth more than the dozen
 * instructions for 128 weights that expanding costs. */
#include <stdlib.h>
#include <string.h>

#include "kernels/internal.h"

enum { EXPONENTS = 256, NO_CODE = 0xff };

/* Positions of a tile in the order of the coded bytes: unpacking the low and the high halves of the
 * 128-bit lanes of bytes 64i .. yields elements 64i .. 64i + 63 of the BF16 tile. */
static uint32_t byte_of(uint32_t element) {
    const uint32_t in = element % 32, lane = in / 8, high = element / 32 % 2;
    return element / 64 * 64 + lane * 16 + high * 8 + in % 8;
}

/* Codes of bytes 128i .. 128i + 63 are the low halves of 64 bytes, those of the 64 after them the
 * high ones. */
static uint8_t code_at(const uint8_t *tile, uint32_t byte) {
    const uint8_t both = tile[TILE_ELEMENTS + byte / 128 * 64 + byte % 64];
    return byte / 64 % 2 == 0 ? both & 15 : both >> 4;
}

void tile_decode(const struct matrix *w, size_t index, bf16 ret[TILE_ELEMENTS]) {
    const struct matrix_codes *codes = w->codes;
    const uint8_t *tile = (const uint8_t *)w->data + index * CODED_TILE_BYTES;
    for (uint32_t e = 0; e < TILE_ELEMENTS; e++) {
        const uint32_t byte = byte_of(e), code = code_at(tile, byte);
        const uint32_t low = codes->low[code] | (tile[byte] & 0x7fu);
        const uint32_t high = codes->high[code] | (tile[byte] & 0x80u);
        ret[e] = (bf16)(high << 8 | low);
    }
    exceptions_put(codes, exception_find(codes, index), index, ret);
}

size_t exception_find(const struct matrix_codes *codes, size_t tile) {
    size_t begin = 0, end = codes->exceptions;
    while (begin < end) {
        const size_t middle = begin + (end - begin) / 2;
        if (codes->exception[middle].place / TILE_ELEMENTS < tile)
            begin = middle + 1;
        else
            end = middle;
    }
    return begin;
}

/* ---- Coding ---- */

struct layout {
    size_t codes, exceptions, tables, bytes; /* offsets; tiles are at 0 */
};

static struct layout coded_layout(size_t tiles, size_t exceptions) {
    struct layout layout = {.codes = tiles * CODED_TILE_BYTES};
    layout.exceptions = layout.codes + sizeof(struct matrix_codes);
    layout.tables = layout.exceptions + exceptions * sizeof(struct exception);
    layout.bytes = (layout.tables + 4 * sizeof(uint32_t) + 63) & ~(size_t)63;
    return layout;
}

static uint32_t exponent_of(bf16 value) {
    return value >> 7 & 0xff;
}

/* The most frequent exponents of some of the weights, evenly spread, get codes 0 .. 15. */
static void choose_codes(const bf16 *weights, size_t count, uint8_t code_of[EXPONENTS],
                         struct matrix_codes *ret) {
    uint32_t seen[EXPONENTS] = {0};
    const size_t step = count / 16384 + 1;
    for (size_t i = 0; i < count; i += step)
        seen[exponent_of(weights[i])]++;
    memset(code_of, NO_CODE, EXPONENTS);
    for (uint32_t code = 0; code < 16; code++) {
        uint32_t most = 0;
        for (uint32_t e = 1; e < EXPONENTS; e++)
            if (code_of[e] == NO_CODE && (code_of[most] != NO_CODE || seen[e] > seen[most]))
                most = e;
        code_of[most] = (uint8_t)code;
        ret->high[code] = (uint8_t)(most >> 1);
        ret->low[code] = (uint8_t)(most << 7);
    }
}

size_t code_tile_scalar(const bf16 tile[TILE_ELEMENTS], size_t index, const uint8_t *code_of,
                        uint8_t ret[CODED_TILE_BYTES], struct exception *exception, size_t room) {
    uint8_t code[TILE_ELEMENTS];
    size_t exceptions = 0;
    for (uint32_t e = 0; e < TILE_ELEMENTS; e++) {
        const uint32_t byte = byte_of(e);
        const uint8_t found = code_of[exponent_of(tile[e])];
        ret[byte] = (uint8_t)(tile[e] >> 8 & 0x80) | (uint8_t)(tile[e] & 0x7f);
        code[byte] = found & 15;
        if (found == NO_CODE && exceptions++ < room)
            exception[exceptions - 1] =
                (struct exception){(uint32_t)(index * TILE_ELEMENTS + e), tile[e], 0};
    }
    for (uint32_t i = 0; i < TILE_ELEMENTS / 2; i++)
        ret[TILE_ELEMENTS + i] =
            (uint8_t)(code[i / 64 * 128 + i % 64] | code[i / 64 * 128 + 64 + i % 64] << 4);
    return exceptions;
}

void matrix_code_bf16(const struct matrix *w, struct matrix_coding *ret) {
    const size_t tiles = (size_t)matrix_panels(w) * matrix_blocks(w);
    const size_t most = tiles / 4; /* beyond it they cost more than coding saves */
    *ret = (struct matrix_coding){0};
    if (w->dtype != DTYPE_BF16 || w->codes != NULL || w->segments != 1 ||
        tiles > UINT32_MAX / TILE_ELEMENTS)
        return;
    uint8_t code_of[EXPONENTS];
    code_tile_function *code_tile = code_tile_scalar;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512vbmi"))
        code_tile = code_tile_vbmi;
#endif
    ret->exception = malloc((most + 1) * sizeof *ret->exception);
    ret->tiles = malloc(tiles * CODED_TILE_BYTES);
    size_t exceptions = ret->tiles == NULL || ret->exception == NULL ? most + 1 : 0;
    if (exceptions == 0)
        choose_codes(w->data, tiles * TILE_ELEMENTS, code_of, &ret->codes);
    for (size_t t = 0; t < tiles && exceptions <= most; t++)
        exceptions += code_tile((const bf16 *)w->data + t * TILE_ELEMENTS, t, code_of,
                                ret->tiles + t * CODED_TILE_BYTES, ret->exception + exceptions,
                                most - exceptions);
    if (exceptions > most) {
        matrix_coding_free(ret);
        return;
    }
    ret->codes.exceptions = (uint32_t)exceptions;
    ret->bytes = coded_layout(tiles, exceptions).bytes;
}

void matrix_place_coded(struct matrix *ret, const struct matrix *w,
                        const struct matrix_coding *coding, void *memory) {
    const size_t tiles = (size_t)matrix_panels(w) * matrix_blocks(w);
    const struct layout layout = coded_layout(tiles, coding->codes.exceptions);
    uint8_t *base = memory;
    struct matrix_codes *codes = (struct matrix_codes *)(void *)(base + layout.codes);
    struct exception *exception = (struct exception *)(void *)(base + layout.exceptions);
    uint32_t *tables = (uint32_t *)(void *)(base + layout.tables);
    memcpy(base, coding->tiles, tiles * CODED_TILE_BYTES);
    *codes = coding->codes;
    memcpy(exception, coding->exception, codes->exceptions * sizeof *exception);
    codes->exception = exception;
    const uint32_t table[4] = {0, w->k, 0, matrix_blocks(w)};
    memcpy(tables, table, sizeof table);
    *ret = *w;
    ret->data = memory;
    ret->codes = codes;
    ret->segment_k = tables;
    ret->segment_block = tables + 2;
    ret->bytes = layout.bytes;
}

void matrix_coding_free(struct matrix_coding *self) {
    free(self->tiles);
    free(self->exception);
    *self = (struct matrix_coding){0};
}

/* ---- As if it had not been coded ---- */

void matrix_read_packed(const struct matrix *w, size_t offset, size_t bytes, void *ret) {
    const size_t tile_bytes = TILE_ELEMENTS * sizeof(bf16);
    const size_t tiles_end = (size_t)matrix_panels(w) * matrix_blocks(w) * tile_bytes;
    const uint32_t tables[16] = {0, w->k, 0, matrix_blocks(w)}; /* and the zeros after them */
    uint8_t *to = ret;
    for (size_t take; bytes > 0; offset += take, bytes -= take, to += take) {
        bf16 tile[TILE_ELEMENTS];
        const void *piece = tables;
        size_t in = offset - tiles_end, size = sizeof tables;
        if (offset < tiles_end) {
            tile_decode(w, offset / tile_bytes, tile);
            piece = tile;
            in = offset % tile_bytes;
            size = tile_bytes;
        }
        ASSERT(in < size);
        take = size - in < bytes ? size - in : bytes;
        memcpy(to, (const uint8_t *)piece + in, take);
    }
}
