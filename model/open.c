/* Opens a model directory whose files the host has mapped: config, shards, the table of all
 * tensors, then every check before the first use. model.safetensors.index.json, where there is one,
 * decides which shard a tensor is taken from. */
#include "model/model.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "actors/limits.h"
#include "model/fields.h"

#define INDEX_FILE    "model.safetensors.index.json"
#define SINGLE_FILE   "model.safetensors"
#define FILE_NAME_MAX 255
#define EXTENSION     ".safetensors"

static int compare_strings(const void *left, const void *right) {
    return strcmp(*(char *const *)left, *(char *const *)right);
}

/* A plain file name inside the directory. */
static int check_shard_name(const char *tensor, const json_t *value, struct failure *failure) {
    char shown[96];
    fields_show(value, shown, sizeof shown);
    const char *name = json_string_value(value);
    if (name == NULL)
        return fail(failure, ERR_CORRUPT,
                    INDEX_FILE ": weight_map: %.128s: expected a file name, found %s", tensor,
                    shown);
    if (name[0] == '.' || strchr(name, '/') != NULL || strchr(name, '\\') != NULL ||
        strstr(name, "..") != NULL)
        return fail(failure, ERR_INVALID,
                    INDEX_FILE
                    ": weight_map: %.128s: expected a file of the same directory, found %s, "
                    "which climbs out of the model directory",
                    tensor, shown);
    size_t length = strlen(name), extension = strlen(EXTENSION);
    if (length <= extension || length > FILE_NAME_MAX ||
        strcmp(name + length - extension, EXTENSION) != 0)
        return fail(failure, ERR_CORRUPT,
                    INDEX_FILE
                    ": weight_map: %.128s: expected a name of at most %d bytes that ends in "
                    "\"" EXTENSION "\", found %s",
                    tensor, FILE_NAME_MAX, shown);
    return 0;
}

/* The checked weight_map of an index; *ret_root owns it. */
static int parse_index(const char *text, size_t size, json_t **ret_root, json_t **ret_map,
                       struct failure *failure) {
    json_t *root = fields_parse(text, size, INDEX_FILE, failure);
    if (root == NULL)
        return failure->code;
    json_t *map = json_object_get(root, "weight_map");
    int code = 0;
    if (!json_is_object(map) || json_object_size(map) == 0)
        code = fail(failure, ERR_CORRUPT,
                    INDEX_FILE ": weight_map: expected an object with at least one tensor");
    const char *tensor;
    json_t *value;
    if (code == 0)
        json_object_foreach(map, tensor, value) {
            code = check_shard_name(tensor, value, failure);
            if (code < 0)
                break;
        }
    if (code < 0) {
        json_decref(root);
        return code;
    }
    *ret_root = root;
    *ret_map = map;
    return 0;
}

static void free_names(char **names, uint32_t count) {
    for (uint32_t i = 0; i < count; i++)
        free(names[i]);
    free(names);
}

/* Distinct file names of the map, ascending. */
static int collect_names(json_t *map, char ***ret_names, uint32_t *ret_count,
                         struct failure *failure) {
    size_t entries = json_object_size(map), used = 0;
    const char **all = malloc(entries * sizeof *all);
    char **names = calloc(SHARDS_MAX, sizeof *names);
    uint32_t count = 0;
    int code = 0;
    if (all == NULL || names == NULL)
        code = fail(failure, ERR_NO_MEMORY, INDEX_FILE ": no memory for %zu names", entries);
    const char *tensor;
    json_t *value;
    if (code == 0) {
        json_object_foreach(map, tensor, value) {
            all[used++] = json_string_value(value);
        }
        qsort(all, used, sizeof *all, compare_strings);
    }
    for (size_t i = 0; i < used && code == 0; i++) {
        if (i > 0 && strcmp(all[i], all[i - 1]) == 0)
            continue;
        if (count == SHARDS_MAX)
            code =
                fail(failure, ERR_TOO_LARGE, INDEX_FILE ": expected at most %d shards", SHARDS_MAX);
        else if ((names[count] = strdup(all[i])) == NULL)
            code = fail(failure, ERR_NO_MEMORY, INDEX_FILE ": no memory for names");
        else
            count++;
    }
    free(all);
    if (code < 0) {
        free_names(names, count);
        return code;
    }
    *ret_names = names;
    *ret_count = count;
    return 0;
}

int model_shards(char ***ret_names, uint32_t *ret_count, const char *index_json, size_t index_bytes,
                 struct failure *failure) {
    struct failure local;
    failure = failure != NULL ? failure : &local;
    if (index_json == NULL) {
        char **names = malloc(sizeof *names);
        char *name = strdup(SINGLE_FILE);
        if (names == NULL || name == NULL) {
            free(names);
            free(name);
            return fail(failure, ERR_NO_MEMORY, "no memory for a file name");
        }
        names[0] = name;
        *ret_names = names;
        *ret_count = 1;
        return 0;
    }
    json_t *root, *map;
    int code = parse_index(index_json, index_bytes, &root, &map, failure);
    if (code < 0)
        return code;
    code = collect_names(map, ret_names, ret_count, failure);
    json_decref(root);
    return code;
}

static const struct model_file *find_file(const struct model_file *files, uint32_t count,
                                          const char *name) {
    for (uint32_t i = 0; i < count; i++)
        if (strcmp(files[i].name, name) == 0)
            return &files[i];
    return NULL;
}

static int open_shards(struct model *self, const struct model_file *files, uint32_t count,
                       char *const *names, uint32_t shards, struct failure *failure) {
    self->shard = calloc(shards, sizeof *self->shard);
    if (self->shard == NULL)
        return fail(failure, ERR_NO_MEMORY, "no memory for %u shards", shards);
    for (uint32_t i = 0; i < shards; i++) {
        const struct model_file *file = find_file(files, count, names[i]);
        if (file == NULL)
            return fail(failure, ERR_NOT_FOUND, "%s: missing from the model directory", names[i]);
        int code = safetensors_open(&self->shard[self->shards], file->bytes, file->size, names[i],
                                    failure);
        if (code < 0)
            return code;
        self->shards++;
    }
    return 0;
}

static int compare_tensors(const void *left, const void *right) {
    return strcmp((*(const struct tensor *const *)left)->name,
                  (*(const struct tensor *const *)right)->name);
}

static int allocate_tensors(struct model *self, size_t count, struct failure *failure) {
    self->tensor = calloc(count + 1, sizeof *self->tensor);
    return self->tensor != NULL
               ? 0
               : fail(failure, ERR_NO_MEMORY, "no memory for a table of %zu tensors", count);
}

static int take_all(struct model *self, struct failure *failure) {
    uint32_t count = safetensors_count(self->shard[0]);
    int code = allocate_tensors(self, count, failure);
    for (uint32_t i = 0; code == 0 && i < count; i++)
        self->tensor[self->tensors++] = safetensors_at(self->shard[0], i);
    return code;
}

/* Each tensor from the shard that the index names; what a shard holds besides is left alone. */
static int take_indexed(struct model *self, json_t *map, char *const *names,
                        struct failure *failure) {
    int code = allocate_tensors(self, json_object_size(map), failure);
    const char *name;
    json_t *value;
    if (code == 0)
        json_object_foreach(map, name, value) {
            const char *file = json_string_value(value);
            char *const *at = bsearch(&file, names, self->shards, sizeof *names, compare_strings);
            ASSERT(at != NULL);
            const struct tensor *tensor = safetensors_find(self->shard[at - names], name);
            if (tensor == NULL)
                return fail(failure, ERR_CORRUPT,
                            INDEX_FILE ": expected tensor %.128s in %.96s, which does not hold it",
                            name, file);
            self->tensor[self->tensors++] = tensor;
        }
    return code;
}

static int open_tensors(struct model *self, const struct model_file *files, uint32_t count,
                        struct failure *failure) {
    const struct model_file *index = find_file(files, count, INDEX_FILE);
    json_t *root = NULL, *map = NULL;
    char **names = NULL;
    uint32_t shards = 0;
    int code = 0;
    if (index != NULL)
        code = parse_index(index->bytes, index->size, &root, &map, failure);
    if (code == 0)
        code = map != NULL ? collect_names(map, &names, &shards, failure)
                           : model_shards(&names, &shards, NULL, 0, failure);
    if (code == 0)
        code = open_shards(self, files, count, names, shards, failure);
    if (code == 0)
        code = map != NULL ? take_indexed(self, map, names, failure) : take_all(self, failure);
    if (code == 0)
        qsort(self->tensor, self->tensors, sizeof *self->tensor, compare_tensors);
    json_decref(root);
    free_names(names, shards);
    return code;
}

/* Checkpoints written by transformers keep num_nextn_predict_layers but leave the MTP layers'
 * tensors out. Without a single one of them the model is taken as one without MTP; some of them
 * missing is an error, found by the checks. */
static void drop_absent_mtp(struct model *self) {
    struct model_config *config = &self->config;
    for (uint32_t layer = config->layers; layer < config->layers + config->mtp_layers; layer++) {
        char prefix[32];
        size_t length = (size_t)snprintf(prefix, sizeof prefix, "model.layers.%u.", layer);
        uint32_t low = 0, high = self->tensors; /* first name that is not below the prefix */
        while (low < high) {
            uint32_t middle = low + (high - low) / 2;
            if (strcmp(self->tensor[middle]->name, prefix) < 0)
                low = middle + 1;
            else
                high = middle;
        }
        if (low < self->tensors && strncmp(self->tensor[low]->name, prefix, length) == 0)
            return;
    }
    config->mtp_layers = 0;
}

static int open_config(struct model *self, const struct model_file *files, uint32_t count,
                       struct failure *failure) {
    const struct model_file *config = find_file(files, count, "config.json");
    const struct model_file *generation = find_file(files, count, "generation_config.json");
    if (config == NULL)
        return fail(failure, ERR_NOT_FOUND, "config.json: missing from the model directory");
    int code = model_config_parse(&self->config, config->bytes, config->size,
                                  generation != NULL ? generation->bytes : NULL,
                                  generation != NULL ? generation->size : 0, failure);
    if (code == 0)
        model_compute_config_fingerprint(self, config->bytes, config->size);
    return code;
}

static int open_model(struct model *self, const struct model_file *files, uint32_t count,
                      struct failure *failure) {
    const struct model_file *config = find_file(files, count, "config.json");
    int code = open_config(self, files, count, failure);
    if (code == 0)
        code = open_tensors(self, files, count, failure);
    if (code < 0)
        return code;
    drop_absent_mtp(self);
    code = model_check_weights(self, failure);
    if (code == 0) {
        self->config.experts_e4m3 = model_experts_are_e4m3(self);
        model_compute_fingerprint(self, config->bytes, config->size);
    }
    return code;
}

static int open_with(struct model **ret, const struct model_file *files, uint32_t count,
                     int (*open)(struct model *self, const struct model_file *files, uint32_t count,
                                 struct failure *failure),
                     struct failure *failure) {
    struct failure local;
    failure = failure != NULL ? failure : &local;
    struct model *self = calloc(1, sizeof *self);
    if (self == NULL)
        return fail(failure, ERR_NO_MEMORY, "no memory for a model");
    int code = open(self, files, count, failure);
    if (code < 0) {
        model_close(&self);
        return code;
    }
    *ret = self;
    return 0;
}

int model_open(struct model **ret, const struct model_file *files, uint32_t count,
               struct failure *failure) {
    return open_with(ret, files, count, open_model, failure);
}

int model_open_config(struct model **ret, const struct model_file *files, uint32_t count,
                      struct failure *failure) {
    return open_with(ret, files, count, open_config, failure);
}

void model_close(struct model **self) {
    if (*self == NULL)
        return;
    for (uint32_t i = 0; i < (*self)->shards; i++)
        safetensors_close(&(*self)->shard[i]);
    free((*self)->shard);
    free((*self)->tensor);
    free(*self);
    *self = NULL;
}

const struct model_config *model_config(const struct model *self) {
    return &self->config;
}

const char *model_fingerprint(const struct model *self) {
    return self->fingerprint;
}

const char *model_config_fingerprint(const struct model *self) {
    return self->config_fingerprint;
}

uint32_t model_tensor_count(const struct model *self) {
    return self->tensors;
}

const struct tensor *model_tensor_at(const struct model *self, uint32_t index) {
    ASSERT(index < self->tensors);
    return self->tensor[index];
}

const struct tensor *model_tensor(const struct model *self, const char *name) {
    struct tensor key = {.name = name};
    const struct tensor *wanted = &key;
    const struct tensor **found =
        bsearch(&wanted, self->tensor, self->tensors, sizeof *self->tensor, compare_tensors);
    return found != NULL ? *found : NULL;
}
