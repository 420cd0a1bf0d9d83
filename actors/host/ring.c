/* See ring.h. Invariants: tail <= head <= tail + capacity; head and tail are multiples of 64;
 * between them lie whole records. */
#include "actors/host/ring.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define RING_MAGIC   0x474e4952u
#define RING_VERSION 1
#define RECORD_BYTES 64 /* before each record's content, so that the content is aligned */
#define RECORD_WRAP  UINT64_MAX

struct record {
    uint64_t size; /* of the content, or RECORD_WRAP */
};

uint64_t ring_record_bytes(size_t bytes) {
    return RECORD_BYTES + (((uint64_t)bytes + 63) & ~(uint64_t)63);
}

static int map_ring(struct ring *self, int file, uint64_t bytes, struct failure *failure) {
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (memory == MAP_FAILED)
        return fail(failure, ERR_NO_MEMORY, "cannot map the ring %s: %s", self->name,
                    strerror(errno));
    self->page = memory;
    return 0;
}

static int set_name(struct ring *self, const char *name, struct failure *failure) {
    if (snprintf(self->name, sizeof self->name, "/%s", name) >= (int)sizeof self->name)
        return fail(failure, ERR_TOO_LARGE, "ring name %s is over %d bytes", name,
                    RING_NAME_BYTES - 2);
    return 0;
}

int ring_create(struct ring *ret, const char *name, uint64_t capacity, struct failure *failure) {
    ASSERT(capacity >= 1024 && capacity % 64 == 0);
    struct ring ring = {.capacity = capacity, .producer = true};
    if (capacity > RING_CAPACITY_MAX)
        return fail(failure, ERR_TOO_LARGE, "a ring of %llu bytes is over the limit of %llu",
                    (unsigned long long)capacity, (unsigned long long)RING_CAPACITY_MAX);
    int error = set_name(&ring, name, failure);
    if (error < 0)
        return error;
    shm_unlink(ring.name);
    int file = shm_open(ring.name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (file < 0)
        return fail(failure, ERR_IO, "cannot make the ring %s in /dev/shm: %s", ring.name,
                    strerror(errno));
    /* Reserved now: a write to a full tmpfs later would be a SIGBUS. */
    uint64_t bytes = sizeof *ring.page + capacity;
    int allocated = posix_fallocate(file, 0, (off_t)bytes);
    if (allocated != 0)
        error = fail(failure, ERR_NO_MEMORY, "no room for %llu bytes in /dev/shm: %s",
                     (unsigned long long)bytes, strerror(allocated));
    else
        error = map_ring(&ring, file, bytes, failure);
    close(file);
    if (error < 0) {
        shm_unlink(ring.name);
        return error;
    }
    ring.page->capacity = capacity;
    ring.page->version = RING_VERSION;
    atomic_thread_fence(memory_order_release);
    ring.page->magic = RING_MAGIC;
    *ret = ring;
    return 0;
}

int ring_open(struct ring *ret, const char *name, struct failure *failure) {
    struct ring ring = {0};
    int error = set_name(&ring, name, failure);
    if (error < 0)
        return error;
    int file = shm_open(ring.name, O_RDWR | O_CLOEXEC, 0);
    if (file < 0)
        return fail(failure, ERR_NOT_FOUND, "no ring %s: %s", ring.name, strerror(errno));
    struct stat status;
    if (fstat(file, &status) != 0 || status.st_size < (off_t)sizeof *ring.page) {
        close(file);
        return fail(failure, ERR_NOT_FOUND, "the ring %s is not complete yet", ring.name);
    }
    uint64_t bytes = (uint64_t)status.st_size;
    error = map_ring(&ring, file, bytes, failure);
    close(file);
    if (error < 0)
        return error;
    bool made = *(volatile uint32_t *)&ring.page->magic == RING_MAGIC;
    atomic_thread_fence(memory_order_acquire);
    ring.capacity = ring.page->capacity;
    if (!made || ring.page->version != RING_VERSION || ring.capacity % 64 != 0 ||
        ring.capacity < 1024 || ring.capacity > RING_CAPACITY_MAX ||
        ring.capacity != bytes - sizeof *ring.page) {
        munmap(ring.page, bytes);
        return made ? fail(failure, ERR_CORRUPT,
                           "the ring %s has a header that does not fit its %llu bytes", ring.name,
                           (unsigned long long)bytes)
                    : fail(failure, ERR_NOT_FOUND, "the ring %s is not complete yet", ring.name);
    }
    shm_unlink(ring.name);
    atomic_store(&ring.page->consumer_opened, 1);
    *ret = ring;
    return 0;
}

void ring_close(struct ring *self) {
    if (self->page == NULL)
        return;
    /* The consumer removes the name when it opens the ring; by now it may be another ring's. */
    bool named = self->producer && !ring_peer_opened(self);
    atomic_store(self->producer ? &self->page->producer_closed : &self->page->consumer_closed, 1);
    munmap(self->page, sizeof *self->page + self->capacity);
    if (named)
        shm_unlink(self->name);
    self->page = NULL;
}

bool ring_peer_closed(const struct ring *self) {
    return atomic_load(self->producer ? &self->page->consumer_closed
                                      : &self->page->producer_closed) != 0;
}

bool ring_peer_opened(const struct ring *self) {
    return atomic_load(&self->page->consumer_opened) != 0;
}

/* Size of the record at an offset: read once, it may change under our hands. */
static uint64_t record_size(const struct ring *self, uint64_t offset) {
    return ((const volatile struct record *)(self->page->data + offset))->size;
}

uint64_t ring_room(const struct ring *self) {
    uint64_t tail = atomic_load(&self->page->tail);
    if (tail > self->position || self->position - tail > self->capacity || tail % 64 != 0)
        return UINT64_MAX;
    return self->capacity - (self->position - tail);
}

int ring_reserve(struct ring *self, size_t bytes, void **ret_bytes) {
    if (bytes > self->capacity / 2 || ring_record_bytes(bytes) > self->capacity / 2)
        return ERR_TOO_LARGE;
    uint64_t need = ring_record_bytes(bytes), offset = self->position % self->capacity;
    uint64_t skip = self->capacity - offset < need ? self->capacity - offset : 0;
    uint64_t free_bytes = ring_room(self);
    if (free_bytes == UINT64_MAX)
        return ERR_CORRUPT;
    if (free_bytes < need + skip) {
        atomic_store(&self->page->producer_waits, 1);
        free_bytes = ring_room(self); /* it may have been released before it could see the flag */
        if (free_bytes == UINT64_MAX)
            return ERR_CORRUPT;
        if (free_bytes < need + skip)
            return ERR_BUSY;
        atomic_store(&self->page->producer_waits, 0);
    }
    if (skip > 0) {
        ((struct record *)(self->page->data + offset))->size = RECORD_WRAP;
        offset = 0;
    }
    ((struct record *)(self->page->data + offset))->size = bytes;
    self->reserved = self->position + skip + need;
    *ret_bytes = self->page->data + offset + RECORD_BYTES;
    return 0;
}

void ring_commit(struct ring *self) {
    self->position = self->reserved;
    atomic_store(&self->page->head, self->position);
}

int ring_peek(struct ring *self, const void **ret_bytes, size_t *ret_size) {
    uint64_t head = atomic_load(&self->page->head), at = self->position;
    if (head == at)
        return 0;
    if (head < at || head - at > self->capacity || head % 64 != 0)
        return ERR_CORRUPT;
    uint64_t offset = at % self->capacity;
    uint64_t size = record_size(self, offset);
    if (size == RECORD_WRAP) {
        at += self->capacity - offset;
        offset = 0;
        if (at >= head)
            return ERR_CORRUPT; /* a wrap is published together with the record behind it */
        size = record_size(self, 0);
    }
    if (size > self->capacity || ring_record_bytes(size) > head - at ||
        ring_record_bytes(size) > self->capacity - offset)
        return ERR_CORRUPT;
    self->reserved = at + ring_record_bytes(size);
    *ret_bytes = self->page->data + offset + RECORD_BYTES;
    *ret_size = size;
    return 1;
}

void ring_pass(struct ring *self) {
    self->position = self->reserved;
}

bool ring_wanted(const struct ring *self) {
    return atomic_load(&self->page->producer_waits) != 0;
}

uint64_t ring_kept(const struct ring *self) {
    return self->reserved - self->released;
}

bool ring_release_passed(struct ring *self) {
    self->released = self->position;
    atomic_store(&self->page->tail, self->position);
    return atomic_load(&self->page->producer_waits) != 0 &&
           atomic_exchange(&self->page->producer_waits, 0) != 0;
}

bool ring_release(struct ring *self) {
    ring_pass(self);
    return ring_release_passed(self);
}
