#include "tests/support/model_files.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void *read_whole_file(const char *path, size_t *ret_bytes) {
    FILE *file = fopen(path, "rb");
    if (file == NULL)
        return NULL;
    fseek(file, 0, SEEK_END);
    long size = ftell(file);
    rewind(file);
    void *bytes = size < 0 ? NULL : aligned_alloc(64, ((size_t)size / 64 + 1) * 64);
    if (bytes != NULL && fread(bytes, 1, (size_t)size, file) != (size_t)size) {
        free(bytes);
        bytes = NULL;
    }
    fclose(file);
    *ret_bytes = (size_t)size;
    return bytes;
}

static bool add_file(struct model_files *self, const char *directory, const char *name) {
    char path[1024];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    size_t size;
    void *bytes = read_whole_file(path, &size);
    if (bytes == NULL || self->count == sizeof self->file / sizeof *self->file) {
        free(bytes);
        return false;
    }
    self->file[self->count++] = (struct model_file){strdup(name), bytes, size};
    return true;
}

bool model_files_read(struct model_files *ret, const char *directory) {
    *ret = (struct model_files){0};
    if (!add_file(ret, directory, "config.json"))
        return false;
    add_file(ret, directory, "generation_config.json");
    const char *index_json = NULL;
    size_t index_bytes = 0;
    if (add_file(ret, directory, "model.safetensors.index.json")) {
        index_json = ret->file[ret->count - 1].bytes;
        index_bytes = ret->file[ret->count - 1].size;
    }
    char **names;
    uint32_t count;
    if (model_shards(&names, &count, index_json, index_bytes, NULL) < 0)
        return false;
    bool whole = true;
    for (uint32_t i = 0; i < count; i++) {
        whole = add_file(ret, directory, names[i]) && whole;
        free(names[i]);
    }
    free(names);
    return whole;
}

void model_files_free(struct model_files *self) {
    for (uint32_t i = 0; i < self->count; i++) {
        free((char *)self->file[i].name);
        free((void *)self->file[i].bytes);
    }
    self->count = 0;
}

void *build_safetensors(const char *header, const void *data, size_t data_bytes,
                        size_t *ret_bytes) {
    size_t text = strlen(header), padded = (text + 7) / 8 * 8;
    size_t size = 8 + padded + data_bytes;
    uint8_t *bytes = aligned_alloc(64, (size / 64 + 1) * 64);
    for (int i = 0; i < 8; i++)
        bytes[i] = (uint8_t)((uint64_t)padded >> (8 * i));
    memcpy(bytes + 8, header, text);
    memset(bytes + 8 + text, ' ', padded - text);
    if (data != NULL)
        memcpy(bytes + 8 + padded, data, data_bytes);
    else
        memset(bytes + 8 + padded, 0, data_bytes);
    *ret_bytes = size;
    return bytes;
}
