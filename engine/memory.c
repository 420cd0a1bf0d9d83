/* Memory of engines: zeroed, aligned for vectors and tiles, counted. Large blocks (the latent
 * cache, work spaces) ask for huge pages: rows of many sequences lie far apart, and small pages end
 * the processor's reading ahead every few of them. */
#include <stdlib.h>
#include <string.h>

#include "engine/internal.h"

#define ALIGN      64
#define SMALL_PAGE ((uintptr_t)4096)
#define HUGE_WORTH                                                                                 \
    ((size_t)4 << 20) /* two huge pages: at least one of them lies whole in any such block */

static void (*ask_for_huge_pages)(void *memory, size_t bytes);

void engine_set_huge_pages(void (*ask)(void *memory, size_t bytes)) {
    ask_for_huge_pages = ask;
}

void memory_ask_huge_pages(void *memory, size_t bytes) {
    const uintptr_t begin = ((uintptr_t)memory + SMALL_PAGE - 1) & ~(SMALL_PAGE - 1);
    const uintptr_t end = ((uintptr_t)memory + bytes) & ~(SMALL_PAGE - 1);
    if (ask_for_huge_pages != NULL && begin < end)
        ask_for_huge_pages((uint8_t *)memory + (begin - (uintptr_t)memory), end - begin);
}

void *memory_take(size_t count, size_t size, const char *what, uint64_t *total,
                  struct failure *failure) {
    size_t bytes, room;
    if (__builtin_mul_overflow(count, size, &bytes) ||
        __builtin_add_overflow(bytes, ALIGN, &room)) {
        fail(failure, ERR_TOO_LARGE, "%s: %zu times %zu bytes exceed the address space", what,
             count, size);
        return NULL;
    }
    uint8_t *raw = calloc(1, room);
    if (raw == NULL) {
        fail(failure, ERR_NO_MEMORY, "%s: the system could not give %zu bytes", what, bytes);
        return NULL;
    }
    /* calloc aligns to at least 16 bytes, so the pointer to the whole block fits before the aligned
     * one. */
    uint8_t *block = (uint8_t *)(((uintptr_t)raw + ALIGN) & ~(uintptr_t)(ALIGN - 1));
    memcpy(block - sizeof raw, &raw, sizeof raw);
    if (bytes >= HUGE_WORTH)
        memory_ask_huge_pages(block, bytes);
    *total += bytes;
    return block;
}

int memory_grow(void **block, size_t *capacity_bytes, size_t count, size_t size, const char *what,
                uint64_t *total, struct failure *failure) {
    size_t bytes;
    if (__builtin_mul_overflow(count, size, &bytes))
        return fail(failure, ERR_TOO_LARGE, "%s: %zu times %zu bytes exceed the address space",
                    what, count, size);
    if (bytes <= *capacity_bytes)
        return 0;
    uint64_t grown = 0;
    size_t wanted = bytes + bytes / 2 > bytes ? bytes + bytes / 2 : bytes;
    void *larger = memory_take(wanted, 1, what, &grown, failure);
    if (larger == NULL)
        return ERR_NO_MEMORY;
    *total += grown - *capacity_bytes;
    memory_free(*block);
    *block = larger;
    *capacity_bytes = wanted;
    return 0;
}

void memory_free(void *block) {
    if (block == NULL)
        return;
    void *raw;
    memcpy(&raw, (uint8_t *)block - sizeof raw, sizeof raw);
    free(raw);
}

void *layout_take(struct layout *layout, size_t count, size_t size) {
    size_t bytes, end;
    /* Counts are bounded by limits.h and the checked shapes of the model. */
    ASSERT(!__builtin_mul_overflow(count, size, &bytes));
    ASSERT(!__builtin_add_overflow(layout->used, bytes + ALIGN - 1, &end));
    void *place = layout->base == NULL ? NULL : layout->base + layout->used;
    layout->used = end & ~(size_t)(ALIGN - 1);
    return place;
}
