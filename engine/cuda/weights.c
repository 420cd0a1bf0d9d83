/* Packs a model for the resident step with the device table's own packing, so that both forms
 * multiply by the same bytes. */
#include "engine/cuda/weights.h"

#include <stdlib.h>
#include <string.h>

#include "engine/attention.h"
#include "kernels/cuda/table.h"

enum { MATRICES_MAX = 8, VECTORS_MAX = 7 }; /* of a layer */

struct step_matrix step_matrix_of(const struct matrix *matrix) {
    const struct device_matrix *on_device = kernels_cuda_matrix(matrix);
    return (struct step_matrix){on_device->weights, on_device->scales, matrix->n, matrix->k,
                                on_device->stride};
}

static int out_of_memory(size_t bytes, const char *what, struct failure *failure) {
    return fail(failure, ERR_NO_MEMORY, "%s: the GPU could not give %zu bytes", what, bytes);
}

/* Device memory of `bytes`, filled from the host if `from` is given. */
static int take(struct step_weights *self, void **ret, const void *from, size_t bytes,
                const char *what, struct failure *failure) {
    if (device_take_cuda(bytes, ret) != 0)
        return out_of_memory(bytes, what, failure);
    self->memory[self->memory_count++] = *ret;
    if (from != NULL && device_put_cuda(*ret, from, bytes) != 0)
        return fail(failure, ERR_UNSUPPORTED, "%s: the GPU does not take %zu bytes", what, bytes);
    return 0;
}

static int vector(struct step_weights *self, const float **ret, const struct weight_view *view,
                  uint32_t n, struct failure *failure) {
    float *values = calloc(n, sizeof *values);
    if (values == NULL)
        return fail(failure, ERR_NO_MEMORY, "norm weights: no memory for %u numbers", n);
    weight_to_float(view, values);
    void *memory = NULL;
    const int error = take(self, &memory, values, n * sizeof *values, "norm weights", failure);
    free(values);
    *ret = memory;
    return error;
}

static int matrix(struct step_weights *self, const struct kernels *kernels, struct step_matrix *ret,
                  struct weight_view view, const char *what, struct failure *failure) {
    struct packed *packed = &self->packed[self->packed_count];
    const int error = packed_open(packed, kernels, &view, what, &self->bytes, failure);
    if (error != 0)
        return error;
    self->packed_count++;
    *ret = step_matrix_of(&packed->matrix);
    return 0;
}

/* Copies on the device through the host: rare, and small. */
static int copy(void *to, const void *from, size_t bytes) {
    void *room = malloc(bytes > 0 ? bytes : 1);
    if (room == NULL)
        return ERR_NO_MEMORY;
    int error = device_get_cuda(room, from, bytes);
    if (error == 0)
        error = device_put_cuda(to, room, bytes);
    free(room);
    return error;
}

/* W_UK and W_UV of all heads, one after the other: what a batched product takes. */
static int latent_stacks(struct step_weights *self, const struct model *model,
                         const struct kernels *kernels, uint32_t l, struct failure *failure) {
    const struct model_config *c = model_config(model);
    struct step_layer *layer = &self->model.layer[l];
    const struct weight_view kv_b = attention_kv_b(model, l);
    const size_t key_stride = activation_stride(c->nope), latent = activation_stride(c->kv_lora);
    const size_t key_bytes = c->kv_lora * key_stride * sizeof(bf16),
                 value_bytes = c->v * latent * sizeof(bf16);
    uint8_t *keys = NULL, *values = NULL;
    int error = take(self, (void **)&keys, NULL, c->heads * key_bytes, "key weights", failure);
    if (error == 0)
        error =
            take(self, (void **)&values, NULL, c->heads * value_bytes, "value weights", failure);
    for (uint32_t h = 0; h < c->heads && error == 0; h++) {
        struct packed key = {0}, value = {0};
        struct weight_view key_view = attention_key_view(c, kv_b, h), value_view = kv_b;
        value_view.n = c->v;
        value_view.row0 += h * (c->nope + c->v) + c->nope;
        error = packed_open(&key, kernels, &key_view, "key weights", &self->bytes, failure);
        if (error == 0)
            error =
                packed_open(&value, kernels, &value_view, "value weights", &self->bytes, failure);
        if (error == 0)
            error =
                copy(keys + h * key_bytes, kernels_cuda_matrix(&key.matrix)->weights, key_bytes);
        if (error == 0)
            error = copy(values + h * value_bytes, kernels_cuda_matrix(&value.matrix)->weights,
                         value_bytes);
        packed_close(&key);
        packed_close(&value);
    }
    layer->w_uk = (struct step_matrix){keys, NULL, c->kv_lora, c->nope, (uint32_t)key_stride};
    layer->w_uv = (struct step_matrix){values, NULL, c->v, c->kv_lora, (uint32_t)latent};
    return error;
}

static int open_layer(struct step_weights *self, const struct model *model,
                      const struct kernels *kernels, uint32_t l, struct failure *failure) {
    const struct model_config *c = model_config(model);
    struct step_layer *to = &self->model.layer[l];
    to->moe = model_layer_is_moe(c, l);
    const bool mlp = !to->moe || c->shared_experts != 0;
    const struct {
        struct step_matrix *ret;
        enum weight which;
        bool there;
    } matrices[MATRICES_MAX] = {
        {&to->q_a, W_Q_A, c->q_lora != 0},
        {&to->q_b, c->q_lora != 0 ? W_Q_B : W_Q, true},
        {&to->kv_a, W_KV_A, true},
        {&to->o, W_O, true},
        {&to->mlp_gate, to->moe ? W_SHARED_GATE : W_DENSE_GATE, mlp},
        {&to->mlp_up, to->moe ? W_SHARED_UP : W_DENSE_UP, mlp},
        {&to->mlp_down, to->moe ? W_SHARED_DOWN : W_DENSE_DOWN, mlp},
        {&to->gate, W_GATE, to->moe},
    };
    int error =
        matrix(self, kernels, &to->kv_b, attention_kv_b(model, l), "layer weights", failure);
    const struct {
        const float **ret;
        enum weight which;
        uint32_t n;
        bool there;
    } vectors[VECTORS_MAX] = {
        {&to->input_norm, W_INPUT_NORM, c->hidden, true},
        {&to->post_norm, W_POST_NORM, c->hidden, true},
        {&to->kv_a_norm, W_KV_A_NORM, c->kv_lora, true},
        {&to->q_a_norm, W_Q_A_NORM, c->q_lora, c->q_lora != 0},
        {&to->gate_bias, W_GATE_BIAS, c->experts, to->moe},
    };
    for (int i = 0; i < MATRICES_MAX && error == 0; i++)
        if (matrices[i].there)
            error = matrix(self, kernels, matrices[i].ret,
                           model_weight(model, matrices[i].which, l), "layer weights", failure);
    for (int i = 0; i < VECTORS_MAX && error == 0; i++) {
        if (!vectors[i].there)
            continue;
        const struct weight_view view = model_weight(model, vectors[i].which, l);
        if (view.data != NULL)
            error = vector(self, vectors[i].ret, &view, vectors[i].n, failure);
    }
    return error == 0 ? latent_stacks(self, model, kernels, l, failure) : error;
}

static int open_embedding(struct step_weights *self, const struct model *model,
                          const struct kernels *kernels, struct failure *failure) {
    const struct weight_view view = model_weight(model, W_EMBED, 0);
    if (view.dtype != DTYPE_BF16)
        return fail(failure, ERR_UNSUPPORTED, "embedding on the GPU: expected BF16");
    struct step_matrix table = {0};
    const int error = matrix(self, kernels, &table, view, "embedding", failure);
    self->model.embedding = table.data;
    self->model.embedding_stride = table.stride;
    return error;
}

static int open_rotations(struct step_weights *self, const struct model_config *c,
                          struct failure *failure) {
    const size_t bytes = (size_t)c->context * c->rope * sizeof(float);
    float *table = malloc(bytes);
    if (table == NULL)
        return fail(failure, ERR_NO_MEMORY, "table of rotations: no memory for %zu bytes", bytes);
    rope_table(&c->rope_parameters, c->rope, 0, c->context, table);
    void *memory = NULL;
    const int error = take(self, &memory, table, bytes, "table of rotations", failure);
    self->model.cos_sin = memory;
    free(table);
    return error;
}

/* Whether routed experts stay E4M3 is a property of how they are stored. */
static bool experts_are_fp8(const struct model *model, const struct kernels *kernels) {
    const struct model_config *c = model_config(model);
    for (uint32_t l = 0; l < c->layers; l++)
        if (model_layer_is_moe(c, l)) {
            struct packed packed = {0};
            struct failure unused;
            uint64_t bytes = 0;
            const struct weight_view view = model_expert_weight(model, l, 0, EXPERT_GATE);
            if (packed_open(&packed, kernels, &view, "expert", &bytes, &unused) != 0)
                return false;
            const bool ret = kernels_cuda_matrix(&packed.matrix)->scales != NULL;
            packed_close(&packed);
            return ret;
        }
    return false;
}

static void set_shape(struct step_model *to, const struct model_config *c) {
    const uint32_t shared = c->shared_experts * c->expert_width;
    to->layers = c->layers;
    to->hidden = c->hidden;
    to->heads = c->heads;
    to->nope = c->nope;
    to->rope = c->rope;
    to->v = c->v;
    to->kv_lora = c->kv_lora;
    to->vocabulary = c->vocabulary;
    to->context = c->context;
    to->expert_width = c->expert_width;
    to->mlp_width = c->dense_width > shared ? c->dense_width : shared;
    to->norm_eps = c->norm_eps;
    to->softmax_scale = attention_softmax_scale(c);
    to->gate = (struct gate_cuda){.softmax = c->gate.scoring == GATE_SOFTMAX,
                                  .group_max = c->gate.group_score == GATE_GROUP_MAX,
                                  .normalise = c->gate.normalise,
                                  .experts = c->experts,
                                  .groups = c->gate.groups,
                                  .groups_chosen = c->gate.groups_chosen,
                                  .k = c->gate.k,
                                  .scaling = c->gate.scaling,
                                  .top_p = c->gate.top_p};
}

int step_weights_open(struct step_weights *ret, const struct model *model,
                      const struct kernels *kernels, struct failure *failure) {
    const struct model_config *c = model_config(model);
    struct step_weights self = {0};
    self.packed = calloc((size_t)c->layers * (MATRICES_MAX + 1) + 2, sizeof *self.packed);
    self.memory = calloc((size_t)c->layers * (VECTORS_MAX + 2) + 2, sizeof *self.memory);
    self.model.layer = calloc(c->layers, sizeof *self.model.layer);
    int error = 0;
    if (self.packed == NULL || self.memory == NULL || self.model.layer == NULL)
        error = fail(failure, ERR_NO_MEMORY, "no memory for %u layers", c->layers);
    if (error == 0) {
        set_shape(&self.model, c);
        error = open_embedding(&self, model, kernels, failure);
    }
    if (error == 0)
        error = open_rotations(&self, c, failure);
    for (uint32_t l = 0; l < c->layers && error == 0; l++)
        error = open_layer(&self, model, kernels, l, failure);
    if (error == 0) {
        const struct weight_view norm = model_weight(model, W_FINAL_NORM, 0);
        error = vector(&self, &self.model.final_norm, &norm, c->hidden, failure);
    }
    if (error == 0)
        error = matrix(&self, kernels, &self.model.head, model_weight(model, W_LM_HEAD, 0),
                       "LM head weights", failure);
    if (error == 0)
        self.model.expert_fp8 = experts_are_fp8(model, kernels);
    *ret = self;
    if (error != 0)
        step_weights_close(ret);
    return error;
}

void step_weights_close(struct step_weights *self) {
    for (uint32_t i = 0; i < self->packed_count; i++)
        packed_close(&self->packed[i]);
    for (uint32_t i = 0; i < self->memory_count; i++)
        device_give_cuda(self->memory[i]);
    free(self->packed);
    free(self->memory);
    free(self->model.layer);
    *self = (struct step_weights){0};
}
