/* Mapping of model directories. */
#include "actors/host/files.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define SHARD_BYTES_MAX ((size_t)1 << 46)

int mapped_open(struct mapped *ret, const char *directory, const char *name, size_t limit,
                struct failure *failure) {
    struct mapped mapped = {.bytes = ""};
    char path[4096];
    if (snprintf(mapped.name, sizeof mapped.name, "%s", name) >= (int)sizeof mapped.name ||
        snprintf(path, sizeof path, "%s/%s", directory, name) >= (int)sizeof path)
        return fail(failure, ERR_TOO_LARGE, "the file name %.100s... is too long", name);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return fail(failure, errno == ENOENT ? ERR_NOT_FOUND : ERR_IO, "cannot open %s: %s", path,
                    strerror(errno));
    struct stat status;
    int error = 0;
    if (fstat(file, &status) != 0 || !S_ISREG(status.st_mode))
        error = fail(failure, ERR_IO, "%s is not a regular file", path);
    else if ((uint64_t)status.st_size > limit)
        error = fail(failure, ERR_TOO_LARGE, "%s has %lld bytes, expected at most %zu", path,
                     (long long)status.st_size, limit);
    else if (status.st_size > 0) {
        mapped.size = (size_t)status.st_size;
        mapped.bytes = mmap(NULL, mapped.size, PROT_READ, MAP_PRIVATE, file, 0);
        if (mapped.bytes == MAP_FAILED)
            error = fail(failure, ERR_NO_MEMORY, "cannot map %s: %s", path, strerror(errno));
    }
    close(file);
    if (error == 0)
        *ret = mapped;
    return error;
}

int mapped_open_path(struct mapped *ret, const char *path, size_t limit, struct failure *failure) {
    const char *slash = strrchr(path, '/');
    char directory[4096];
    /* of "/file" it is empty: the slash comes between */
    snprintf(directory, sizeof directory, "%.*s", slash != NULL ? (int)(slash - path) : 1,
             slash != NULL ? path : ".");
    return mapped_open(ret, directory, slash != NULL ? slash + 1 : path, limit, failure);
}

void mapped_close(struct mapped *self) {
    if (self->size > 0)
        munmap((void *)self->bytes, self->size);
    *self = (struct mapped){.bytes = ""};
}

/* Maps one more file; one that may be absent and is, is no error. */
static int add_file(struct model_directory *self, const char *path, const char *name, size_t limit,
                    bool required, struct failure *failure) {
    struct failure own;
    int error = mapped_open(&self->file[self->files], path, name, limit, &own);
    if (error == 0)
        self->files++;
    else if (error == ERR_NOT_FOUND && !required)
        return 0;
    else
        fail(failure, error, "%s", own.text);
    return error;
}

static int add_shards(struct model_directory *self, const char *path, struct failure *failure) {
    const struct mapped *index = NULL;
    for (uint32_t i = 0; i < self->files; i++) {
        if (strcmp(self->file[i].name, "model.safetensors.index.json") == 0)
            index = &self->file[i];
    }
    char **names = NULL;
    uint32_t count = 0;
    int error = model_shards(&names, &count, index != NULL ? index->bytes : NULL,
                             index != NULL ? index->size : 0, failure);
    if (error < 0)
        return error;
    struct mapped *larger = realloc(self->file, (self->files + count) * sizeof *larger);
    if (larger == NULL)
        error = fail(failure, ERR_NO_MEMORY, "no memory for %u shards", count);
    else
        self->file = larger;
    for (uint32_t i = 0; i < count; i++) {
        if (error == 0)
            error = add_file(self, path, names[i], SHARD_BYTES_MAX, true, failure);
        free(names[i]);
    }
    free(names);
    return error;
}

static int map_all(struct model_directory *self, const char *path, struct failure *failure) {
    struct stat status;
    if (stat(path, &status) != 0 || !S_ISDIR(status.st_mode))
        return fail(failure, ERR_NOT_FOUND,
                    "expected a model directory (config.json, *.safetensors), found %s: %s", path,
                    errno != 0 ? strerror(errno) : "not a directory");
    self->file = calloc(3, sizeof *self->file);
    if (self->file == NULL)
        return fail(failure, ERR_NO_MEMORY, "no memory for a model");
    int error = add_file(self, path, "config.json", JSON_FILE_MAX, true, failure);
    if (error == 0)
        error = add_file(self, path, "generation_config.json", JSON_FILE_MAX, false, failure);
    if (error == 0)
        error = add_file(self, path, "model.safetensors.index.json", JSON_FILE_MAX, false, failure);
    return error == 0 ? add_shards(self, path, failure) : error;
}

int model_directory_open(struct model_directory *ret, const char *path, struct failure *failure) {
    struct model_directory self = {0};
    errno = 0;
    int error = map_all(&self, path, failure);
    struct model_file *files = calloc(self.files + 1, sizeof *files);
    if (error == 0 && files == NULL)
        error = fail(failure, ERR_NO_MEMORY, "no memory for a model");
    for (uint32_t i = 0; error == 0 && i < self.files; i++)
        files[i] = (struct model_file){self.file[i].name, self.file[i].bytes, self.file[i].size};
    if (error == 0)
        error = model_open(&self.model, files, self.files, failure);
    free(files);
    if (error < 0) {
        model_directory_close(&self);
        return error;
    }
    *ret = self;
    return 0;
}

int model_directory_open_config(struct model_directory *ret, const char *path, struct failure *failure) {
    struct model_directory self = {.only_config = true};
    self.file = calloc(2, sizeof *self.file);
    if (self.file == NULL)
        return fail(failure, ERR_NO_MEMORY, "no memory for a model");
    int error = add_file(&self, path, "config.json", JSON_FILE_MAX, true, failure);
    if (error == 0)
        error = add_file(&self, path, "generation_config.json", JSON_FILE_MAX, false, failure);
    struct model_file files[2];
    for (uint32_t i = 0; error == 0 && i < self.files; i++)
        files[i] = (struct model_file){self.file[i].name, self.file[i].bytes, self.file[i].size};
    if (error == 0)
        error = model_open_config(&self.model, files, self.files, failure);
    if (error < 0) {
        model_directory_close(&self);
        return error;
    }
    *ret = self;
    return 0;
}

void model_directory_close(struct model_directory *self) {
    if (self->model != NULL)
        model_close(&self->model);
    for (uint32_t i = 0; i < self->files; i++)
        mapped_close(&self->file[i]);
    free(self->file);
    *self = (struct model_directory){0};
}

void model_directory_forget(const struct model_directory *self) {
    for (uint32_t i = 0; i < self->files; i++) {
        if (self->file[i].size > 0)
            madvise((void *)self->file[i].bytes, self->file[i].size, MADV_DONTNEED);
    }
}

static void forget_range(const void *bytes, size_t size) {
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), from = (uintptr_t)bytes & ~(page - 1);
    madvise((void *)from, (uintptr_t)bytes + size - from, MADV_DONTNEED);
}

void model_directory_forget_expert(const struct model_directory *self, uint32_t layer,
                                   uint32_t expert) {
    for (int part = EXPERT_GATE; part <= EXPERT_DOWN; part++) {
        struct weight_view view =
            model_expert_weight(self->model, layer, expert, (enum expert_part)part);
        size_t rows = view.row0 + (view.transposed ? view.k : view.n);
        forget_range(view.data, rows * view.stride * dtype_bytes(view.dtype));
    }
}

int tokenizer_directory_open(struct tokenizer **ret, const char *path, struct failure *failure) {
    struct mapped tokenizer, config = {.bytes = NULL};
    int error = mapped_open(&tokenizer, path, "tokenizer.json", JSON_FILE_MAX, failure);
    if (error < 0)
        return error;
    bool has_config = mapped_open(&config, path, "tokenizer_config.json", JSON_FILE_MAX, NULL) == 0;
    error = tokenizer_open(ret, tokenizer.bytes, tokenizer.size, has_config ? config.bytes : NULL,
                           config.size, failure);
    mapped_close(&tokenizer);
    if (has_config)
        mapped_close(&config);
    return error;
}
