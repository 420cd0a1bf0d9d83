/* Doorbells in shared memory.
 *
 * No wake-up is lost: the ringer writes `rung`, then reads `sleeping`; the sleeper writes
 * `sleeping`, then the kernel compares `rung` with what the sleeper had seen. All four are
 * sequentially consistent, so at least one of them sees the other. */
#include "actors/host/bell.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "actors/host/clock.h"
#include "actors/host/futex.h"

#define BELL_MAGIC 0x4c4c4542u
#define BELL_BYTES 4096

int bell_create(struct bell *ret, const char *name, uint64_t incarnation, struct failure *failure) {
    struct bell bell = {.owner = true};
    int file = -1;
    if (name != NULL) {
        if (snprintf(bell.name, sizeof bell.name, "/%s", name) >= (int)sizeof bell.name)
            return fail(failure, ERR_TOO_LARGE, "doorbell name %s is over %d bytes", name,
                        BELL_NAME_BYTES - 2);
        file = shm_open(bell.name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
        if (file < 0)
            return fail(failure, ERR_IO, "cannot make the doorbell %s in /dev/shm: %s", bell.name,
                        strerror(errno));
        int error = posix_fallocate(file, 0, BELL_BYTES);
        if (error != 0) {
            close(file);
            shm_unlink(bell.name);
            return fail(failure, ERR_NO_MEMORY, "no room in /dev/shm for a doorbell: %s",
                        strerror(error));
        }
    }
    void *memory = mmap(NULL, BELL_BYTES, PROT_READ | PROT_WRITE,
                        file >= 0 ? MAP_SHARED : MAP_SHARED | MAP_ANONYMOUS, file, 0);
    if (file >= 0)
        close(file);
    if (memory == MAP_FAILED) {
        if (file >= 0)
            shm_unlink(bell.name);
        return fail(failure, ERR_NO_MEMORY, "cannot map a doorbell: %s", strerror(errno));
    }
    bell.page = memory;
    bell.page->magic = BELL_MAGIC;
    bell.page->incarnation = incarnation;
    *ret = bell;
    return 0;
}

int bell_open(struct bell *ret, const char *name, uint64_t incarnation, struct failure *failure) {
    struct bell bell = {0};
    if (snprintf(bell.name, sizeof bell.name, "/%s", name) >= (int)sizeof bell.name)
        return fail(failure, ERR_TOO_LARGE, "doorbell name %s is over %d bytes", name,
                    BELL_NAME_BYTES - 2);
    int file = shm_open(bell.name, O_RDWR | O_CLOEXEC, 0);
    if (file < 0)
        return fail(failure, ERR_NOT_FOUND, "no doorbell %s: %s", bell.name, strerror(errno));
    struct stat status;
    if (fstat(file, &status) != 0 || status.st_size < BELL_BYTES) {
        close(file);
        return fail(failure, ERR_CORRUPT, "doorbell %s is smaller than %d bytes", bell.name,
                    BELL_BYTES);
    }
    void *memory = mmap(NULL, BELL_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (memory == MAP_FAILED)
        return fail(failure, ERR_NO_MEMORY, "cannot map a doorbell: %s", strerror(errno));
    bell.page = memory;
    if (bell.page->magic != BELL_MAGIC || bell.page->incarnation != incarnation) {
        munmap(memory, BELL_BYTES);
        return fail(failure, ERR_NOT_FOUND, "doorbell %s belongs to another incarnation",
                    bell.name);
    }
    *ret = bell;
    return 0;
}

void bell_close(struct bell *self) {
    if (self->page == NULL)
        return;
    if (self->owner)
        atomic_store(&self->page->gone, 1);
    munmap(self->page, BELL_BYTES);
    if (self->owner && self->name[0] != 0)
        shm_unlink(self->name);
    self->page = NULL;
}

static bool wake(struct bell *self) {
    if (atomic_load(&self->page->sleeping) == 0 || atomic_exchange(&self->page->sleeping, 0) == 0)
        return false;
    futex_wake(&self->page->rung, 1, 1);
    return true;
}

bool bell_ring(struct bell *self) {
    atomic_fetch_add(&self->page->rung, 1);
    return wake(self);
}

bool bell_ring_gently(struct bell *self) {
    uint32_t rung = atomic_fetch_add(&self->page->rung, 1) + 1;
    if (atomic_load(&self->page->sleeping) == 0)
        return false;
    return (int32_t)(rung - atomic_load(&self->page->wake_at)) >= 0 && wake(self);
}

uint32_t bell_seen(const struct bell *self) {
    return atomic_load(&self->page->rung);
}

void bell_wait(struct bell *self, uint32_t seen, uint32_t rings, uint64_t timeout_ns,
               uint64_t spin_ns) {
    if (spin_ns > 0) {
        uint64_t until = clock_now_ns() + (spin_ns < timeout_ns ? spin_ns : timeout_ns);
        do {
            for (int i = 0; i < 64; i++) {
                if (atomic_load(&self->page->rung) != seen)
                    return;
            }
        } while (clock_now_ns() < until);
        timeout_ns = timeout_ns > spin_ns ? timeout_ns - spin_ns : 0;
    }
    atomic_store(&self->page->wake_at, seen + (rings > 0 ? rings : 1));
    atomic_store(&self->page->sleeping, 1);
    futex_wait(&self->page->rung, seen, timeout_ns, 1);
    atomic_store(&self->page->sleeping, 0);
}
