/* troupe synth: writes a model directory with random weights. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "actors/host/commands.h"
#include "actors/host/files.h"
#include "model/synth.h"

struct output {
    const char *directory;
    char name[256];
    FILE *file;
    uint64_t bytes;
};

static int close_file(struct output *self) {
    int result = self->file != NULL && fclose(self->file) != 0 ? ERR_IO : 0;
    self->file = NULL;
    return result;
}

static int write_bytes(void *context, const char *name, const void *bytes, size_t size) {
    struct output *self = context;
    if (self->file == NULL || strcmp(self->name, name) != 0) {
        char path[4096];
        if (close_file(self) < 0 || strchr(name, '/') != NULL ||
            snprintf(self->name, sizeof self->name, "%s", name) >= (int)sizeof self->name ||
            snprintf(path, sizeof path, "%s/%s", self->directory, name) >= (int)sizeof path)
            return ERR_IO;
        self->file = fopen(path, "wbxe"); /* x: never over a model that is there */
        if (self->file == NULL)
            return errno == EEXIST ? ERR_EXISTS : ERR_IO;
    }
    self->bytes += size;
    return size == 0 || fwrite(bytes, size, 1, self->file) == 1 ? 0 : ERR_IO;
}

int command_synth(const struct options *options) {
    struct mapped shape;
    struct failure failure = {0};
    if (options->shape == NULL || options->positionals != 1) {
        fprintf(stderr, "troupe synth: expected --shape FILE and the directory to write; see "
                        "troupe synth --help\n");
        return 2;
    }
    int error = mapped_open_path(&shape, options->shape, JSON_FILE_MAX, &failure);
    if (error < 0) {
        fprintf(stderr, "troupe synth: %s\n", failure.text);
        return 1;
    }
    struct output output = {.directory = options->positional[0]};
    if (mkdir(output.directory, 0777) != 0 && errno != EEXIST)
        error = fail(&failure, ERR_IO, "cannot make %s: %s", output.directory, strerror(errno));
    if (error == 0)
        error = synth_model(shape.bytes, shape.size, options->seed, write_bytes, &output, &failure);
    int saved = errno;
    if (close_file(&output) < 0 && error == 0)
        error = ERR_IO;
    mapped_close(&shape);
    if (error == ERR_IO || error == ERR_EXISTS)
        fprintf(stderr, "troupe synth: writing %s/%s: %s\n", output.directory, output.name,
                error == ERR_EXISTS ? "the file exists already" : strerror(saved));
    else if (error < 0)
        fprintf(stderr, "troupe synth: %s\n", failure.text);
    else
        printf("%s: %.1f MB\n", output.directory, (double)output.bytes / 1e6);
    return error == 0 ? 0 : 1;
}
