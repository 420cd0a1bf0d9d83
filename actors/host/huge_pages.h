/* Asks the system for huge pages: what engines and benchmarks, which touch nothing themselves, are
 * handed. */
#ifndef TROUPE_HOST_HUGE_PAGES_H
#define TROUPE_HOST_HUGE_PAGES_H

#include <stddef.h>
#include <sys/mman.h>

static inline void ask_for_huge_pages(void *memory, size_t bytes) {
    madvise(memory, bytes, MADV_HUGEPAGE); /* may be refused */
}

#endif
