/* Working memory of the kernels: per thread, a stack of chunks. A kernel marks, takes, and releases
 * to its mark; a thread that helps another inside its own call simply takes on top. When the stack
 * is empty again and it had to grow, its chunks are replaced by one as large as all of them, so in
 * steady state nothing is allocated. */
#include <stdlib.h>

#include "actors/errors.h"
#include "kernels/rows.h"

enum { CHUNKS_MAX = 32, CHUNK_BYTES_MIN = 1 << 16, ALIGNMENT = 64 };

struct chunk {
    char *memory;
    size_t size, used;
};

static _Thread_local struct chunk chunks[CHUNKS_MAX];
static _Thread_local uint32_t chunk_count,
    chunk_current; /* chunk_current < chunk_count, or both 0 */

static void add_chunk(size_t size) {
    ASSERT(chunk_count < CHUNKS_MAX);
    struct chunk *chunk = &chunks[chunk_count++];
    chunk->memory = aligned_alloc(ALIGNMENT, size);
    ASSERT(chunk->memory != NULL);
    chunk->size = size;
    chunk->used = 0;
}

struct scratch_mark scratch_mark(void) {
    struct scratch_mark mark = {chunk_current, chunk_count ? chunks[chunk_current].used : 0};
    return mark;
}

void *scratch_take(size_t count, size_t size) {
    size_t bytes;
    ASSERT(!__builtin_mul_overflow(count, size, &bytes) && bytes <= SIZE_MAX / 4);
    bytes = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    while (chunk_current < chunk_count &&
           chunks[chunk_current].size - chunks[chunk_current].used < bytes &&
           chunk_current + 1 < chunk_count)
        chunk_current++;
    if (chunk_count == 0 || chunks[chunk_current].size - chunks[chunk_current].used < bytes) {
        size_t grown = chunk_count ? 2 * chunks[chunk_count - 1].size : CHUNK_BYTES_MIN;
        add_chunk(bytes > grown ? bytes : grown);
        chunk_current = chunk_count - 1;
    }
    struct chunk *chunk = &chunks[chunk_current];
    void *taken = chunk->memory + chunk->used;
    chunk->used += bytes;
    return taken;
}

void scratch_release(struct scratch_mark mark) {
    for (uint32_t i = mark.chunk + 1; i < chunk_count; i++)
        chunks[i].used = 0;
    chunk_current = mark.chunk;
    if (chunk_count)
        chunks[mark.chunk].used = mark.used;
    if (chunk_count > 1 && mark.chunk == 0 && mark.used == 0) {
        size_t total = 0;
        for (uint32_t i = 0; i < chunk_count; i++)
            total += chunks[i].size;
        scratch_free();
        add_chunk(total);
    }
}

void scratch_free(void) {
    for (uint32_t i = 0; i < chunk_count; i++) {
        free(chunks[i].memory);
        chunks[i] = (struct chunk){0};
    }
    chunk_count = chunk_current = 0;
}
