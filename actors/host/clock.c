/* The host's clocks and names. Actors see time only as the argument of actor_step. */
#include "actors/host/clock.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "actors/errors.h"

static uint64_t read_clock(clockid_t clock) {
    struct timespec time;
    clock_gettime(clock, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

uint64_t clock_now_ns(void) {
    return read_clock(CLOCK_MONOTONIC);
}

int64_t clock_unix_offset_ns(void) {
    return (int64_t)read_clock(CLOCK_REALTIME) - (int64_t)read_clock(CLOCK_MONOTONIC);
}

uint64_t clock_random(void) {
    uint64_t value = 0;
    while (value == 0) {
        ssize_t got = getrandom(&value, sizeof value, 0);
        ASSERT(got == (ssize_t)sizeof value);
    }
    return value;
}

void clock_host_name(char ret[static ADDRESS_BYTES_MAX]) {
    char boot[37] = "";
    int file = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
    if (file >= 0) {
        ssize_t got = read(file, boot, sizeof boot - 1);
        boot[got > 0 ? got : 0] = 0;
        close(file);
    }
    if (boot[0] == 0)
        gethostname(boot, sizeof boot - 1);
    struct stat memory = {0};
    stat("/dev/shm", &memory);
    snprintf(ret, ADDRESS_BYTES_MAX, "%s/%llx/%u", boot, (unsigned long long)memory.st_dev,
             (unsigned)getuid());
}
