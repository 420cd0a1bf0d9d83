/* Where packed weights lie: in regions of many matrices, for which the host asks for huge pages. A product
 * of one row is bound by how fast weights come from memory, and small pages cost a third of that.
 * Pages of 2 MiB for each matrix would waste the better part of many; in a region only the end of
 * the last one is wasted. What is given back serves the next matrix of the same size (experts of a
 * model are all alike), and a region in which nothing is left goes back to the system.
 *
 * One heap for the process: loader threads pack experts beside the engine. They may run when nobody
 * else wants a processor (background_nice), so nothing long happens under the lock: an engine that
 * gives an expert back would wait for a loader that is put aside in the middle of it. */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "engine/internal.h"

#define HUGE_PAGE    ((size_t)2 << 20)
#define REGION_BYTES ((size_t)32 << 20)
#define ALIGN        1024 /* whole tiles: those that begin within a pair of cache lines are read up to a fifth more slowly */

/* A piece that was given back; lies in itself. */
struct piece {
    size_t bytes;
    struct piece *next;
};

struct weight_region {
    uint8_t *memory;
    size_t bytes, used; /* from the start */
    size_t live;        /* of these, not given back */
    struct piece *pieces;
    struct weight_region *next;
};

static struct weight_region *regions;
static atomic_flag locked = ATOMIC_FLAG_INIT;

static void lock(void) {
    while (atomic_flag_test_and_set_explicit(&locked, memory_order_acquire))
        ;
}
static void unlock(void) {
    atomic_flag_clear_explicit(&locked, memory_order_release);
}

/* Not among the regions yet. */
static struct weight_region *region_open(size_t bytes) {
    bytes = bytes < REGION_BYTES ? REGION_BYTES : (bytes + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1);
    struct weight_region *region = calloc(1, sizeof *region);
    if (region == NULL)
        return NULL;
    region->memory = aligned_alloc(HUGE_PAGE, bytes);
    if (region->memory == NULL) {
        free(region);
        return NULL;
    }
    region->bytes = bytes;
    memory_ask_huge_pages(region->memory, bytes);
    return region;
}

static void region_unlink(struct weight_region *region) {
    struct weight_region **link = &regions;
    while (*link != region)
        link = &(*link)->next;
    *link = region->next;
}

/* One that was given back. */
static void *take_piece(struct weight_region *region, size_t bytes) {
    for (struct piece **link = &region->pieces; *link != NULL; link = &(*link)->next)
        if ((*link)->bytes == bytes) {
            void *found = *link;
            *link = (*link)->next;
            region->live += bytes;
            return found;
        }
    return NULL;
}

static void *take_fresh(struct weight_region *region, size_t bytes) {
    if (region->bytes - region->used < bytes)
        return NULL;
    void *fresh = region->memory + region->used;
    region->used += bytes;
    region->live += bytes;
    return fresh;
}

static size_t rounded(size_t bytes) {
    return bytes == 0 ? ALIGN : (bytes + ALIGN - 1) & ~(size_t)(ALIGN - 1);
}

void *weight_memory_take(size_t bytes, const char *what, uint64_t *total, struct failure *failure) {
    void *taken = NULL;
    if (bytes > SIZE_MAX / 2) {
        fail(failure, ERR_TOO_LARGE, "%s: %zu bytes exceed the address space", what, bytes);
        return NULL;
    }
    lock();
    for (struct weight_region *region = regions; region != NULL && taken == NULL;
         region = region->next)
        taken = take_piece(region, rounded(bytes));
    for (struct weight_region *region = regions; region != NULL && taken == NULL;
         region = region->next)
        taken = take_fresh(region, rounded(bytes));
    unlock();
    struct weight_region *opened = taken == NULL ? region_open(rounded(bytes)) : NULL;
    if (opened != NULL) {
        lock();
        opened->next = regions;
        regions = opened;
        taken = take_fresh(opened, rounded(bytes));
        unlock();
    }
    if (taken == NULL) {
        fail(failure, ERR_NO_MEMORY, "%s: the system could not give %zu bytes", what, bytes);
        return NULL;
    }
    *total += bytes;
    return taken;
}

void weight_memory_free(void *memory, size_t bytes) {
    if (memory == NULL)
        return;
    const uintptr_t at = (uintptr_t)memory;
    lock();
    struct weight_region *region = regions;
    while (region != NULL &&
           (at < (uintptr_t)region->memory || at - (uintptr_t)region->memory >= region->bytes))
        region = region->next;
    ASSERT(region != NULL && region->live >= rounded(bytes));
    struct piece *piece = memory;
    *piece = (struct piece){rounded(bytes), region->pieces};
    region->pieces = piece;
    region->live -= rounded(bytes);
    const bool empty = region->live == 0;
    if (empty)
        region_unlink(region);
    unlock();
    if (empty) {
        free(region->memory);
        free(region);
    }
}
