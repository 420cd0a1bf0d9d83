/* Writes whole lines with one write() each, so that lines of several threads and processes never
 * mix. */
#include "actors/host/log.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "actors/host/clock.h"

#define LOG_LINE_BYTES 2048
#define LOG_FILE_BYTES (16u << 20) /* a longer file is begun anew: a log must not fill the disk */

static struct {
    char name[64];
    int file;
    enum trace_level file_level, stderr_level;
    _Atomic uint64_t written;
} logger = {"troupe", -1, TRACE_INFO, TRACE_WARNING, 0};

void log_open(const struct log_options *options) {
    snprintf(logger.name, sizeof logger.name, "%s", options->name);
    logger.file_level = options->file_level;
    logger.stderr_level = options->stderr_level;
    if (options->file != NULL) {
        logger.file = open(options->file, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
        if (logger.file < 0)
            log_line(TRACE_WARNING, "cannot write the log %s: %s", options->file, strerror(errno));
    }
}

static void write_line(enum trace_level level, const char *text) {
    static const char *const names[] = {"debug", "info", "warning", "error"};
    char line[LOG_LINE_BYTES];
    struct timespec now;
    struct tm parts;
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &parts);
    size_t used = strftime(line, sizeof line, "%Y-%m-%dT%H:%M:%S", &parts);
    int rest = snprintf(line + used, sizeof line - used, ".%03ldZ %s %s %s", now.tv_nsec / 1000000,
                        logger.name, names[level], text);
    used += (size_t)rest < sizeof line - used ? (size_t)rest : sizeof line - used - 1;
    for (size_t i = 0; i < used; i++) { /* text from outside must not forge lines */
        if ((unsigned char)line[i] < 32)
            line[i] = ' ';
    }
    if (used == sizeof line - 1)
        used--;
    line[used++] = '\n';
    if (logger.file >= 0 && level >= logger.file_level) {
        if (atomic_fetch_add(&logger.written, used) > LOG_FILE_BYTES &&
            ftruncate(logger.file, 0) == 0)
            atomic_store(&logger.written, used);
        if (write(logger.file, line, used) < 0 && errno == EBADF)
            logger.file = -1;
    }
    if (level >= logger.stderr_level && write(STDERR_FILENO, line, used) < 0)
        return; /* nowhere left to say so */
}

void log_line(enum trace_level level, const char *format, ...) {
    if (level < logger.stderr_level && (logger.file < 0 || level < logger.file_level))
        return;
    char text[LOG_LINE_BYTES];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    write_line(level, text);
}

void log_limited(struct log_limit *limit, enum trace_level level, const char *format, ...) {
    uint64_t now = clock_now_ns();
    if (now < limit->next_ns) {
        limit->left_out++;
        return;
    }
    char text[LOG_LINE_BYTES];
    va_list arguments;
    va_start(arguments, format);
    int used = vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (limit->left_out > 0 && used >= 0 && (size_t)used < sizeof text)
        snprintf(text + used, sizeof text - (size_t)used, " (and %llu more like it)",
                 (unsigned long long)limit->left_out);
    limit->left_out = 0;
    limit->next_ns = now + 1000000000u;
    log_line(level, "%s", text);
}
