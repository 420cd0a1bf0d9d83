/* One safetensors file: 8 bytes of header length, a JSON header, then the tensors' bytes. The
 * header is read once into a table sorted by place in the file, which makes overlaps and holes
 * visible, and an index sorted by name. Tensors stay where they lie.
 *
 * Invariants after safetensors_open: names are distinct; the tensors cover the data section
 * exactly, in order, without overlap; bytes = product of shape x size of dtype; data is aligned for
 * its dtype. */
#include "model/model.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "actors/limits.h"
#include "model/fields.h"

#define DIMS_MAX         4
#define PREFIX_BYTES     8
#define NAME_BYTES_MAX   256
#define FILE_BYTES_SHOWN 128

struct safetensors {
    char *file_name;
    struct tensor *tensor;   /* [count], ascending offset */
    struct tensor **by_name; /* [count], ascending name */
    char *names;             /* every name, each with its NUL */
    uint32_t count;
};

/* What a parse in progress needs besides the result. */
struct reader {
    struct safetensors *self;
    const uint8_t *data; /* data section */
    uint64_t data_bytes;
    struct failure *failure;
};

static const struct {
    const char *name;
    enum dtype dtype;
    uint32_t bytes;
} DTYPES[] = {
    {"F32", DTYPE_F32, 4}, {"BF16", DTYPE_BF16, 2}, {"F8_E4M3", DTYPE_E4M3, 1},
    {"F16", DTYPE_F16, 2}, {"I32", DTYPE_I32, 4},   {"I64", DTYPE_I64, 8},
    {"U8", DTYPE_U8, 1},
};

const char *dtype_name(enum dtype dtype) {
    for (size_t i = 0; i < sizeof DTYPES / sizeof *DTYPES; i++)
        if (DTYPES[i].dtype == dtype)
            return DTYPES[i].name;
    return "?";
}

static int read_dtype(struct reader *reader, const json_t *value, struct tensor *tensor,
                      uint32_t *ret_bytes) {
    const char *name = json_string_value(value);
    for (size_t i = 0; name != NULL && i < sizeof DTYPES / sizeof *DTYPES; i++) {
        if (strcmp(name, DTYPES[i].name) == 0) {
            tensor->dtype = DTYPES[i].dtype;
            *ret_bytes = DTYPES[i].bytes;
            return 0;
        }
    }
    char shown[64];
    return fail(reader->failure, ERR_UNSUPPORTED,
                "%s: tensor %s: dtype: expected F32, BF16, F8_E4M3, F16, I32, I64 or U8, found %s",
                reader->self->file_name, tensor->name, fields_show(value, shown, sizeof shown));
}

/* Shape, and the bytes that it asks for. */
static int read_shape(struct reader *reader, const json_t *value, uint32_t element_bytes,
                      struct tensor *tensor, uint64_t *ret_bytes) {
    const char *file = reader->self->file_name;
    char shown[64];
    if (!json_is_array(value) || json_array_size(value) > DIMS_MAX)
        return fail(reader->failure, ERR_CORRUPT,
                    "%s: tensor %s: shape: expected a list of at most %d numbers, found %s", file,
                    tensor->name, DIMS_MAX, fields_show(value, shown, sizeof shown));
    uint64_t bytes = element_bytes;
    tensor->dims = (uint32_t)json_array_size(value);
    for (uint32_t i = 0; i < tensor->dims; i++) {
        const json_t *dim = json_array_get(value, i);
        if (!json_is_integer(dim) || json_integer_value(dim) < 0 ||
            __builtin_mul_overflow(bytes, (uint64_t)json_integer_value(dim), &bytes))
            return fail(reader->failure, ERR_CORRUPT,
                        "%s: tensor %s: shape: expected numbers of 0 and more whose product fits "
                        "the file, found %s",
                        file, tensor->name, fields_show(value, shown, sizeof shown));
        tensor->shape[i] = (uint64_t)json_integer_value(dim);
    }
    *ret_bytes = bytes;
    return 0;
}

static int read_offsets(struct reader *reader, const json_t *value, uint64_t expected_bytes,
                        struct tensor *tensor) {
    const char *file = reader->self->file_name;
    const json_t *first = json_array_get(value, 0), *last = json_array_get(value, 1);
    char shown[64];
    if (json_array_size(value) != 2 || !json_is_integer(first) || !json_is_integer(last) ||
        json_integer_value(first) < 0 || json_integer_value(last) < json_integer_value(first) ||
        (uint64_t)json_integer_value(last) > reader->data_bytes)
        return fail(reader->failure, ERR_CORRUPT,
                    "%s: tensor %s: data_offsets: expected [begin, end] within the %llu bytes of "
                    "data, found %s (is the file whole?)",
                    file, tensor->name, (unsigned long long)reader->data_bytes,
                    fields_show(value, shown, sizeof shown));
    uint64_t begin = (uint64_t)json_integer_value(first);
    tensor->bytes = (uint64_t)json_integer_value(last) - begin;
    tensor->data = reader->data + begin;
    if (tensor->bytes != expected_bytes)
        return fail(reader->failure, ERR_CORRUPT,
                    "%s: tensor %s: expected %llu bytes as dtype and shape say, found %llu", file,
                    tensor->name, (unsigned long long)expected_bytes,
                    (unsigned long long)tensor->bytes);
    return 0;
}

static int read_tensor(struct reader *reader, const json_t *value, struct tensor *tensor) {
    const char *file = reader->self->file_name;
    if (!json_is_object(value) || json_object_size(value) != 3)
        return fail(reader->failure, ERR_CORRUPT,
                    "%s: tensor %s: expected an object of dtype, shape and data_offsets", file,
                    tensor->name);
    uint32_t element_bytes = 0;
    uint64_t bytes = 0;
    int code = read_dtype(reader, json_object_get(value, "dtype"), tensor, &element_bytes);
    if (code == 0)
        code = read_shape(reader, json_object_get(value, "shape"), element_bytes, tensor, &bytes);
    if (code == 0)
        code = read_offsets(reader, json_object_get(value, "data_offsets"), bytes, tensor);
    if (code == 0 && tensor->bytes > 0 && (uintptr_t)tensor->data % element_bytes != 0)
        code = fail(reader->failure, ERR_UNSUPPORTED,
                    "%s: tensor %s: expected data aligned to %u bytes, found it at offset %llu of "
                    "the data (files of current writers are aligned)",
                    file, tensor->name, element_bytes,
                    (unsigned long long)((const uint8_t *)tensor->data - reader->data));
    return code;
}

static int compare_place(const void *left, const void *right) {
    const struct tensor *a = left, *b = right;
    if (a->data != b->data)
        return (uintptr_t)a->data < (uintptr_t)b->data ? -1 : 1;
    /* Empty tensors lie before the one that begins at the same place. */
    if (a->bytes != b->bytes)
        return a->bytes < b->bytes ? -1 : 1;
    return strcmp(a->name, b->name);
}

static int compare_name(const void *left, const void *right) {
    return strcmp((*(struct tensor *const *)left)->name, (*(struct tensor *const *)right)->name);
}

static int check_cover(const struct reader *reader) {
    const struct safetensors *self = reader->self;
    const uint8_t *end = reader->data;
    for (uint32_t i = 0; i < self->count; i++) {
        const struct tensor *tensor = &self->tensor[i];
        const uint8_t *begin = tensor->data;
        if (begin != end)
            return fail(
                reader->failure, ERR_CORRUPT,
                "%s: tensor %s: expected to begin at byte %llu of the data, found %llu (%s)",
                self->file_name, tensor->name, (unsigned long long)(end - reader->data),
                (unsigned long long)(begin - reader->data),
                begin < end ? "tensors overlap" : "a hole between tensors");
        end = begin + tensor->bytes;
    }
    uint64_t covered = (uint64_t)(end - reader->data);
    if (covered != reader->data_bytes)
        return fail(reader->failure, ERR_CORRUPT,
                    "%s: expected %llu bytes of tensors, found %llu bytes of data", self->file_name,
                    (unsigned long long)covered, (unsigned long long)reader->data_bytes);
    return 0;
}

/* Room for every tensor, every pointer and every name. */
static int allocate(struct reader *reader, const json_t *header, struct failure *failure) {
    struct safetensors *self = reader->self;
    size_t names = 0, count = 0;
    const char *name;
    const json_t *value;
    json_object_foreach((json_t *)header, name, value) {
        if (strcmp(name, "__metadata__") == 0)
            continue;
        size_t length = strlen(name);
        if (length == 0 || length > NAME_BYTES_MAX)
            return fail(failure, ERR_CORRUPT, "%s: expected names of 1 to %d bytes, found %zu",
                        self->file_name, NAME_BYTES_MAX, length);
        names += length + 1;
        count++;
    }
    self->tensor = calloc(count + 1, sizeof *self->tensor);
    self->by_name = calloc(count + 1, sizeof *self->by_name);
    self->names = malloc(names + 1);
    if (self->tensor == NULL || self->by_name == NULL || self->names == NULL)
        return fail(failure, ERR_NO_MEMORY, "%s: no memory for a table of %zu tensors",
                    self->file_name, count);
    return 0;
}

static int read_header(struct reader *reader, const json_t *header) {
    struct safetensors *self = reader->self;
    int code = allocate(reader, header, reader->failure);
    if (code < 0)
        return code;
    char *names = self->names;
    const char *name;
    const json_t *value;
    json_object_foreach((json_t *)header, name, value) {
        if (strcmp(name, "__metadata__") == 0)
            continue;
        struct tensor *tensor = &self->tensor[self->count];
        size_t bytes = strlen(name) + 1;
        tensor->name = memcpy(names, name, bytes);
        names += bytes;
        code = read_tensor(reader, value, tensor);
        if (code < 0)
            return code;
        self->count++;
    }
    qsort(self->tensor, self->count, sizeof *self->tensor, compare_place);
    for (uint32_t i = 0; i < self->count; i++)
        self->by_name[i] = &self->tensor[i];
    qsort(self->by_name, self->count, sizeof *self->by_name, compare_name);
    return check_cover(reader);
}

/* Splits the file into header text and data section. */
static int check_prefix(const void *bytes, size_t size, const char *file, size_t *ret_header_bytes,
                        struct failure *failure) {
    if (size < PREFIX_BYTES)
        return fail(failure, ERR_CORRUPT, "%s: expected at least %d bytes, found %zu", file,
                    PREFIX_BYTES, size);
    uint64_t header_bytes = 0;
    for (int i = PREFIX_BYTES - 1; i >= 0; i--)
        header_bytes = header_bytes << 8 | ((const uint8_t *)bytes)[i];
    if (header_bytes > SAFETENSORS_HEADER_MAX)
        return fail(failure, ERR_TOO_LARGE, "%s: header: expected at most %u bytes, found %llu",
                    file, SAFETENSORS_HEADER_MAX, (unsigned long long)header_bytes);
    if (header_bytes > size - PREFIX_BYTES)
        return fail(failure, ERR_CORRUPT,
                    "%s: expected a header of %llu bytes, found a file of %zu bytes (truncated?)",
                    file, (unsigned long long)header_bytes, size);
    *ret_header_bytes = (size_t)header_bytes;
    return 0;
}

int safetensors_open(struct safetensors **ret, const void *bytes, size_t size,
                     const char *file_name, struct failure *failure) {
    char file[FILE_BYTES_SHOWN];
    snprintf(file, sizeof file, "%s", file_name);
    size_t header_bytes = 0;
    int code = check_prefix(bytes, size, file, &header_bytes, failure);
    if (code < 0)
        return code;
    json_error_t error;
    const char *text = (const char *)bytes + PREFIX_BYTES;
    json_t *header = json_loadb(text, header_bytes, JSON_REJECT_DUPLICATES, &error);
    if (!json_is_object(header)) {
        json_decref(header);
        return fail(failure, ERR_CORRUPT, "%s: header: expected a JSON object, found %s (byte %d)",
                    file, header == NULL ? error.text : "another value",
                    header == NULL ? error.position : 0);
    }
    struct safetensors *self = calloc(1, sizeof *self);
    struct reader reader = {.self = self,
                            .data = (const uint8_t *)text + header_bytes,
                            .data_bytes = size - PREFIX_BYTES - header_bytes,
                            .failure = failure};
    if (self == NULL || (self->file_name = strdup(file)) == NULL)
        code = fail(failure, ERR_NO_MEMORY, "%s: no memory", file);
    else
        code = read_header(&reader, header);
    json_decref(header);
    if (code < 0) {
        safetensors_close(&self);
        return code;
    }
    *ret = self;
    return 0;
}

void safetensors_close(struct safetensors **self) {
    if (*self == NULL)
        return;
    free((*self)->file_name);
    free((*self)->tensor);
    free((*self)->by_name);
    free((*self)->names);
    free(*self);
    *self = NULL;
}

uint32_t safetensors_count(const struct safetensors *self) {
    return self->count;
}

const struct tensor *safetensors_at(const struct safetensors *self, uint32_t index) {
    ASSERT(index < self->count);
    return &self->tensor[index];
}

const struct tensor *safetensors_find(const struct safetensors *self, const char *name) {
    struct tensor key = {.name = name};
    struct tensor *wanted = &key;
    struct tensor **found =
        bsearch(&wanted, self->by_name, self->count, sizeof *self->by_name, compare_name);
    return found != NULL ? *found : NULL;
}
