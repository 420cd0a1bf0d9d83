/* See tiny_model.h. */
#include "simulator/tiny_model.h"

#include <stdlib.h>
#include <string.h>

#include "model/synth.h"

#define SHAPE_HEAD                                                                                 \
    "\"vocab_size\":320,\"hidden_size\":64,\"intermediate_size\":96,\"moe_intermediate_size\":32," \
    "\"num_hidden_layers\":3,\"num_nextn_predict_layers\":1,\"first_k_dense_replace\":1,"          \
    "\"num_attention_heads\":2,\"n_shared_experts\":1,\"kv_lora_rank\":32,"                        \
    "\"qk_nope_head_dim\":16,\"qk_rope_head_dim\":8,\"v_head_dim\":16,"                            \
    "\"max_position_embeddings\":512,\"embedding_range\":1"

static const char *const SHAPES[TINY_MODELS] = {
    "{\"model_type\":\"deepseek_v3\",\"dtype\":\"fp8\"," SHAPE_HEAD
    ",\"q_lora_rank\":24,\"n_routed_experts\":8,\"num_experts_per_tok\":3,\"n_group\":2,"
    "\"topk_group\":1}",
    "{\"model_type\":\"deepseek_v2\",\"dtype\":\"bf16\"," SHAPE_HEAD
    ",\"q_lora_rank\":null,\"n_routed_experts\":6,\"num_experts_per_tok\":2,"
    "\"topk_method\":\"greedy\",\"scoring_func\":\"softmax\",\"n_group\":1,\"topk_group\":1}",
};

struct growing {
    char *name;
    uint8_t *bytes;
    size_t size, capacity;
};

struct files {
    struct growing file[TINY_FILES_MAX];
    uint32_t count;
};

static struct growing *file_of(struct files *self, const char *name) {
    for (uint32_t i = 0; i < self->count; i++)
        if (strcmp(self->file[i].name, name) == 0)
            return &self->file[i];
    if (self->count == TINY_FILES_MAX)
        return NULL;
    struct growing *file = &self->file[self->count];
    file->name = strdup(name);
    self->count += file->name != NULL;
    return file->name != NULL ? file : NULL;
}

static int append(void *context, const char *name, const void *bytes, size_t size) {
    struct growing *file = file_of(context, name);
    if (file == NULL)
        return ERR_NO_MEMORY;
    if (size > file->capacity - file->size) {
        size_t capacity = 2 * (file->size + size) + 64;
        uint8_t *grown = aligned_alloc(64, (capacity + 63) / 64 * 64);
        if (grown == NULL)
            return ERR_NO_MEMORY;
        if (file->size > 0)
            memcpy(grown, file->bytes, file->size);
        free(file->bytes);
        file->bytes = grown;
        file->capacity = capacity;
    }
    memcpy(file->bytes + file->size, bytes, size);
    file->size += size;
    return 0;
}

static const struct model_file *find(const struct tiny_model *self, const char *name) {
    for (uint32_t i = 0; i < self->files; i++)
        if (strcmp(self->file[i].name, name) == 0)
            return &self->file[i];
    return NULL;
}

static int open_tokenizer(struct tiny_model *self, struct failure *failure) {
    const struct model_file *json = find(self, "tokenizer.json");
    const struct model_file *config = find(self, "tokenizer_config.json");
    if (json == NULL || config == NULL)
        return fail(failure, ERR_NOT_FOUND, "the made model has no tokenizer");
    return tokenizer_open(&self->tokenizer, json->bytes, json->size, config->bytes, config->size,
                          failure);
}

int tiny_model_open(struct tiny_model *ret, uint32_t which, struct failure *failure) {
    ASSERT(which < TINY_MODELS);
    struct files files = {0};
    struct tiny_model self = {0};
    int result = synth_model(SHAPES[which], strlen(SHAPES[which]), 20 + which, append, &files, failure);
    for (uint32_t i = 0; i < files.count; i++)
        self.file[self.files++] =
            (struct model_file){files.file[i].name, files.file[i].bytes, files.file[i].size};
    if (result == 0)
        result = model_open(&self.model, self.file, self.files, failure);
    if (result == 0)
        result = open_tokenizer(&self, failure);
    if (result < 0) {
        tiny_model_close(&self);
        return result;
    }
    *ret = self;
    return 0;
}

void tiny_model_close(struct tiny_model *self) {
    if (self->tokenizer != NULL)
        tokenizer_close(&self->tokenizer);
    if (self->model != NULL)
        model_close(&self->model);
    for (uint32_t i = 0; i < self->files; i++) {
        free((void *)self->file[i].name);
        free((void *)self->file[i].bytes);
    }
    memset(self, 0, sizeof *self);
}
