/* The run directory of a local troupe: sockets, pid files, logs. One supervisor at a time owns it.
 */
#ifndef TROUPE_HOST_RUN_DIR_H
#define TROUPE_HOST_RUN_DIR_H

#include <stdbool.h>
#include <sys/types.h>

#include "actors/errors.h"

#define RUN_DIR_BYTES 256

struct run_dir {
    char path[RUN_DIR_BYTES];
    bool created; /* by us: removed at the end; otherwise only what is ours in it */
    int lock;
};

/* path NULL: a new directory under XDG_RUNTIME_DIR or /tmp. ERR_EXISTS: another supervisor is
 * running in it. */
int run_dir_open(struct run_dir *ret, const char *path, struct failure *failure);
/* Removes everything that a troupe puts there, and the directory if run_dir_open has made it. */
void run_dir_close(struct run_dir *self);

/* Writes a small file, readable by the user only. */
int run_dir_write(const struct run_dir *self, const char *name, const char *text,
                  struct failure *failure);
void run_dir_remove(const struct run_dir *self, const char *name);
/* What a dead process has left: its sockets. */
void run_dir_sweep(const struct run_dir *self, pid_t pid);

#endif
