/* Model directories for tests: read from disk, or built in memory and damaged on purpose. */
#ifndef TROUPE_TESTS_MODEL_FILES_H
#define TROUPE_TESTS_MODEL_FILES_H

#include <stdbool.h>

#include "model/weights.h"

/* The bytes of a file, 64-byte aligned, malloc'd; NULL if it cannot be read. */
void *read_whole_file(const char *path, size_t *ret_bytes);

/* config.json, generation_config.json, the index and the shards of a directory, as far as they
 * exist. */
struct model_files {
    struct model_file file[64];
    uint32_t count;
};
bool model_files_read(struct model_files *ret, const char *directory);
void model_files_free(struct model_files *self);

/* A safetensors file: 8 bytes of length, `header`, `data_bytes` of data (copied from `data`, NULL:
 * zeros). malloc'd, the data section aligned to 8 as writers do by padding the header with spaces.
 */
void *build_safetensors(const char *header, const void *data, size_t data_bytes, size_t *ret_bytes);

#endif
