/* Files as pure code wants them: bytes. A model directory is mapped read-only; nothing is copied.
 */
#ifndef TROUPE_HOST_FILES_H
#define TROUPE_HOST_FILES_H

#include <stdbool.h>
#include <stddef.h>

#include "model/tokenizer.h"
#include "model/weights.h"

/* A mapped file. Empty files have bytes == "" and size 0. */
struct mapped {
    char name[256]; /* relative to its directory */
    const void *bytes;
    size_t size;
};
/* ERR_NOT_FOUND, ERR_TOO_LARGE (over `limit` bytes), ERR_IO. */
int mapped_open(struct mapped *ret, const char *directory, const char *name, size_t limit,
                struct failure *failure);
/* The same for any path. */
int mapped_open_path(struct mapped *ret, const char *path, size_t limit, struct failure *failure);
void mapped_close(struct mapped *self);

struct model_directory {
    struct mapped *file;
    uint32_t files;
    struct model *model;
    bool only_config; /* there are no weights here */
};
/* Maps config.json, generation_config.json, the index and all shards, and opens the model over
 * them. */
int model_directory_open(struct model_directory *ret, const char *path, struct failure *failure);
/* config.json and generation_config.json only. */
int model_directory_open_config(struct model_directory *ret, const char *path, struct failure *failure);
void model_directory_close(struct model_directory *self);
/* Lets the kernel take back the pages of all mapped weights: packed copies exist, the file can be
 * read again. */
void model_directory_forget(const struct model_directory *self);
/* The same for the tensors of one expert. */
void model_directory_forget_expert(const struct model_directory *self, uint32_t layer,
                                   uint32_t expert);

/* tokenizer.json and tokenizer_config.json; the files are only needed while it opens. */
int tokenizer_directory_open(struct tokenizer **ret, const char *path, struct failure *failure);

#endif
