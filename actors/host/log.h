/* The process's log: lines "time role-name level text", to a file in the run directory and, from a
 * level on, to stderr. */
#ifndef TROUPE_HOST_LOG_H
#define TROUPE_HOST_LOG_H

#include <stdint.h>

#include "actors/actor.h"

struct log_options {
    const char *name;              /* "expert-2" */
    const char *file;              /* NULL: none */
    enum trace_level file_level;   /* least level that goes into the file */
    enum trace_level stderr_level; /* and to stderr */
};

/* Before it, warnings and errors go to stderr. A file that cannot be opened is a warning, not an
 * error. */
void log_open(const struct log_options *options);
void log_line(enum trace_level level, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* For what an outsider can cause at will: at most one line a second of each kind, with the number
 * of those left out. */
struct log_limit {
    uint64_t next_ns, left_out;
};
void log_limited(struct log_limit *limit, enum trace_level level, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

#endif
