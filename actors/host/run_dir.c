/* Making, locking and clearing of run directories. */
#include "actors/host/run_dir.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

static int choose_path(struct run_dir *self, const char *path, struct failure *failure) {
    const char *runtime = getenv("XDG_RUNTIME_DIR");
    struct stat status;
    int size;
    if (path != NULL)
        size = snprintf(self->path, sizeof self->path, "%s", path);
    else if (runtime != NULL && runtime[0] == '/' && stat(runtime, &status) == 0)
        size = snprintf(self->path, sizeof self->path, "%s/troupe-%d", runtime, (int)getpid());
    else
        size = snprintf(self->path, sizeof self->path, "/tmp/troupe-%u-%d", (unsigned)getuid(),
                        (int)getpid());
    if (size >= (int)sizeof self->path)
        return fail(failure, ERR_TOO_LARGE, "the path of the run directory is over %d bytes",
                    RUN_DIR_BYTES - 1);
    return 0;
}

static int file_in(const struct run_dir *self, const char *name, int flags) {
    char path[RUN_DIR_BYTES + 256];
    snprintf(path, sizeof path, "%s/%s", self->path, name);
    return open(path, flags | O_CLOEXEC | O_NOFOLLOW, 0600);
}

int run_dir_open(struct run_dir *ret, const char *path, struct failure *failure) {
    struct run_dir self = {.lock = -1};
    int error = choose_path(&self, path, failure);
    if (error < 0)
        return error;
    self.created = mkdir(self.path, 0700) == 0;
    if (!self.created && errno != EEXIST)
        return fail(failure, ERR_IO, "cannot make the run directory %s: %s", self.path,
                    strerror(errno));
    struct stat status;
    if (lstat(self.path, &status) != 0 || !S_ISDIR(status.st_mode) || status.st_uid != getuid())
        return fail(failure, ERR_INVALID, "the run directory %s is not a directory of this user",
                    self.path);
    if ((status.st_mode & 0022) != 0)
        return fail(failure, ERR_INVALID,
                    "the run directory %s can be written by others: expected mode 0700, found %04o",
                    self.path, (unsigned)status.st_mode & 07777);
    self.lock = file_in(&self, "lock", O_RDWR | O_CREAT);
    if (self.lock < 0 || flock(self.lock, LOCK_EX | LOCK_NB) != 0) {
        error = fail(failure, self.lock < 0 ? ERR_IO : ERR_EXISTS, "%s %s", self.path,
                     self.lock < 0 ? strerror(errno) : "is the run directory of a running troupe");
        if (self.lock >= 0)
            close(self.lock);
        return error;
    }
    *ret = self;
    return 0;
}

static bool ends_with(const char *name, const char *ending) {
    size_t length = strlen(name), tail = strlen(ending);
    return length >= tail && strcmp(name + length - tail, ending) == 0;
}

static bool is_ours(const char *name) {
    static const char *const endings[] = {".control", ".sock", ".data", ".pid", ".log", "api-key", "admin-token", "lock"};
    for (size_t i = 0; i < sizeof endings / sizeof endings[0]; i++) {
        if (ends_with(name, endings[i]))
            return true;
    }
    return false;
}

void run_dir_remove(const struct run_dir *self, const char *name) {
    char path[RUN_DIR_BYTES + 256];
    snprintf(path, sizeof path, "%s/%s", self->path, name);
    unlink(path);
}

void run_dir_close(struct run_dir *self) {
    DIR *directory = opendir(self->path);
    for (struct dirent *entry; directory != NULL && (entry = readdir(directory)) != NULL;) {
        if (is_ours(entry->d_name))
            run_dir_remove(self, entry->d_name);
    }
    if (directory != NULL)
        closedir(directory);
    if (self->created)
        rmdir(self->path);
    close(self->lock);
    self->lock = -1;
}

int run_dir_write(const struct run_dir *self, const char *name, const char *text,
                  struct failure *failure) {
    int file = file_in(self, name, O_WRONLY | O_CREAT | O_TRUNC);
    size_t size = strlen(text);
    bool written = file >= 0 && write(file, text, size) == (ssize_t)size;
    int code = errno;
    if (file >= 0)
        close(file);
    return written ? 0
                   : fail(failure, ERR_IO, "cannot write %s in %s: %s", name, self->path,
                          strerror(code));
}

void run_dir_sweep(const struct run_dir *self, pid_t pid) {
    char name[64];
    snprintf(name, sizeof name, "%d.control", (int)pid);
    run_dir_remove(self, name);
    snprintf(name, sizeof name, "%d.data", (int)pid);
    run_dir_remove(self, name);
}
