/* From a role ("the key-value down-projection of layer 3") to a tensor: one table says which name
 * in a Hugging Face checkpoint, which shape in terms of the config, and in which layers. The same
 * table checks a model when it is opened, serves views to the engines, describes a model to people
 * and writes synthetic ones. */
#include "model/model.h"

#include <stdio.h>
#include <string.h>

#include "actors/limits.h"

/* Sizes in terms of the config. */
enum extent {
    ONE,
    VOCABULARY,
    HIDDEN,
    TWO_HIDDEN,
    Q_LORA,
    Q_OUT, /* heads x (nope + rope) */
    KV_A,  /* kv_lora + rope */
    KV_LORA,
    KV_B,    /* heads x (nope + v) */
    HEADS_V, /* heads x v */
    DENSE,
    SHARED,
    EXPERT,
    EXPERTS,
};

/* Where a weight exists. */
enum place {
    MODEL,         /* once */
    LAYER,         /* every layer, MTP included */
    LAYER_Q_LORA,  /* if queries are compressed */
    LAYER_Q_PLAIN, /* if not */
    LAYER_DENSE,
    LAYER_MOE,
    LAYER_SHARED, /* MoE layers of models with shared experts */
    LAYER_BIAS,   /* MoE layers of deepseek_v3 */
    LAYER_MTP,
};

static const struct {
    const char *name; /* of layers: what follows "model.layers.N." */
    enum place place;
    enum weight_kind kind;
    enum extent rows, columns;
} ROLES[WEIGHTS] = {
    [W_EMBED] = {"model.embed_tokens.weight", MODEL, WEIGHT_PLAIN, VOCABULARY, HIDDEN},
    [W_LM_HEAD] = {"lm_head.weight", MODEL, WEIGHT_MATRIX, VOCABULARY, HIDDEN},
    [W_FINAL_NORM] = {"model.norm.weight", MODEL, WEIGHT_VECTOR, HIDDEN, ONE},
    [W_INPUT_NORM] = {"input_layernorm.weight", LAYER, WEIGHT_VECTOR, HIDDEN, ONE},
    [W_POST_NORM] = {"post_attention_layernorm.weight", LAYER, WEIGHT_VECTOR, HIDDEN, ONE},
    [W_Q_A] = {"self_attn.q_a_proj.weight", LAYER_Q_LORA, WEIGHT_MATRIX, Q_LORA, HIDDEN},
    [W_Q_A_NORM] = {"self_attn.q_a_layernorm.weight", LAYER_Q_LORA, WEIGHT_VECTOR, Q_LORA, ONE},
    [W_Q_B] = {"self_attn.q_b_proj.weight", LAYER_Q_LORA, WEIGHT_MATRIX, Q_OUT, Q_LORA},
    [W_Q] = {"self_attn.q_proj.weight", LAYER_Q_PLAIN, WEIGHT_MATRIX, Q_OUT, HIDDEN},
    [W_KV_A] = {"self_attn.kv_a_proj_with_mqa.weight", LAYER, WEIGHT_MATRIX, KV_A, HIDDEN},
    [W_KV_A_NORM] = {"self_attn.kv_a_layernorm.weight", LAYER, WEIGHT_VECTOR, KV_LORA, ONE},
    [W_KV_B] = {"self_attn.kv_b_proj.weight", LAYER, WEIGHT_MATRIX, KV_B, KV_LORA},
    [W_O] = {"self_attn.o_proj.weight", LAYER, WEIGHT_MATRIX, HIDDEN, HEADS_V},
    [W_DENSE_GATE] = {"mlp.gate_proj.weight", LAYER_DENSE, WEIGHT_MATRIX, DENSE, HIDDEN},
    [W_DENSE_UP] = {"mlp.up_proj.weight", LAYER_DENSE, WEIGHT_MATRIX, DENSE, HIDDEN},
    [W_DENSE_DOWN] = {"mlp.down_proj.weight", LAYER_DENSE, WEIGHT_MATRIX, HIDDEN, DENSE},
    [W_SHARED_GATE] = {"mlp.shared_experts.gate_proj.weight", LAYER_SHARED, WEIGHT_MATRIX, SHARED,
                       HIDDEN},
    [W_SHARED_UP] = {"mlp.shared_experts.up_proj.weight", LAYER_SHARED, WEIGHT_MATRIX, SHARED,
                     HIDDEN},
    [W_SHARED_DOWN] = {"mlp.shared_experts.down_proj.weight", LAYER_SHARED, WEIGHT_MATRIX, HIDDEN,
                       SHARED},
    [W_GATE] = {"mlp.gate.weight", LAYER_MOE, WEIGHT_PLAIN, EXPERTS, HIDDEN},
    [W_GATE_BIAS] = {"mlp.gate.e_score_correction_bias", LAYER_BIAS, WEIGHT_VECTOR, EXPERTS, ONE},
    [W_MTP_ENORM] = {"enorm.weight", LAYER_MTP, WEIGHT_VECTOR, HIDDEN, ONE},
    [W_MTP_HNORM] = {"hnorm.weight", LAYER_MTP, WEIGHT_VECTOR, HIDDEN, ONE},
    [W_MTP_EH_PROJ] = {"eh_proj.weight", LAYER_MTP, WEIGHT_MATRIX, HIDDEN, TWO_HIDDEN},
    [W_MTP_HEAD_NORM] = {"shared_head.norm.weight", LAYER_MTP, WEIGHT_VECTOR, HIDDEN, ONE},
};

static const struct {
    const char *name;
    enum extent rows, columns;
} EXPERT_ROLES[] = {
    [EXPERT_GATE] = {"gate_proj", EXPERT, HIDDEN},
    [EXPERT_UP] = {"up_proj", EXPERT, HIDDEN},
    [EXPERT_DOWN] = {"down_proj", HIDDEN, EXPERT},
};

/* No product overflows: model_config_parse() bounds every factor. */
static uint32_t extent_of(const struct model_config *config, enum extent extent) {
    switch (extent) {
    case ONE:
        return 1;
    case VOCABULARY:
        return config->vocabulary;
    case HIDDEN:
        return config->hidden;
    case TWO_HIDDEN:
        return 2 * config->hidden;
    case Q_LORA:
        return config->q_lora;
    case Q_OUT:
        return config->heads * (config->nope + config->rope);
    case KV_A:
        return config->kv_lora + config->rope;
    case KV_LORA:
        return config->kv_lora;
    case KV_B:
        return config->heads * (config->nope + config->v);
    case HEADS_V:
        return config->heads * config->v;
    case DENSE:
        return config->dense_width;
    case SHARED:
        return config->shared_experts * config->expert_width;
    case EXPERT:
        return config->expert_width;
    case EXPERTS:
        return config->experts;
    }
    ASSERT(!"an extent without a size");
    return 0;
}

static bool exists(const struct model_config *config, enum place place, uint32_t layer) {
    if (place == MODEL)
        return true;
    if (layer >= config->layers + config->mtp_layers)
        return false;
    bool moe = model_layer_is_moe(config, layer);
    switch (place) {
    case MODEL:
    case LAYER:
        return true;
    case LAYER_Q_LORA:
        return config->q_lora > 0;
    case LAYER_Q_PLAIN:
        return config->q_lora == 0;
    case LAYER_DENSE:
        return !moe;
    case LAYER_MOE:
        return moe;
    case LAYER_SHARED:
        return moe && config->shared_experts > 0;
    case LAYER_BIAS:
        return moe && config->family == FAMILY_DEEPSEEK_V3;
    case LAYER_MTP:
        return layer >= config->layers;
    }
    return false;
}

bool weight_specify(const struct model_config *config, enum weight which, uint32_t layer,
                    struct weight_spec *ret) {
    ASSERT(which < WEIGHTS);
    if (which == W_LM_HEAD && config->tie_embeddings)
        which = W_EMBED;
    if (!exists(config, ROLES[which].place, layer))
        return false;
    if (ROLES[which].place == MODEL)
        snprintf(ret->name, sizeof ret->name, "%s", ROLES[which].name);
    else
        snprintf(ret->name, sizeof ret->name, "model.layers.%u.%s", layer, ROLES[which].name);
    ret->kind = ROLES[which].kind;
    ret->rows = extent_of(config, ROLES[which].rows);
    ret->columns = extent_of(config, ROLES[which].columns);
    return true;
}

void weight_specify_expert(const struct model_config *config, uint32_t layer, enum expert_part part,
                           uint32_t expert, struct weight_spec *ret) {
    ASSERT(layer < config->layers + config->mtp_layers && model_layer_is_moe(config, layer));
    ASSERT(expert < config->experts && part <= EXPERT_DOWN);
    snprintf(ret->name, sizeof ret->name, "model.layers.%u.mlp.experts.%u.%s.weight", layer, expert,
             EXPERT_ROLES[part].name);
    ret->kind = WEIGHT_MATRIX;
    ret->rows = extent_of(config, EXPERT_ROLES[part].rows);
    ret->columns = extent_of(config, EXPERT_ROLES[part].columns);
}

uint32_t weight_scale_rows(const struct model_config *config, const struct weight_spec *spec) {
    return (spec->rows + config->fp8_block_rows - 1) / config->fp8_block_rows;
}

uint32_t weight_scale_columns(const struct model_config *config, const struct weight_spec *spec) {
    return (spec->columns + config->fp8_block_cols - 1) / config->fp8_block_cols;
}

/* "X.weight" -> "X.weight_scale_inv". */
static const struct tensor *find_scale(const struct model *self, const char *name) {
    char scale_name[TENSOR_NAME_BYTES_MAX + 16];
    snprintf(scale_name, sizeof scale_name, "%s_scale_inv", name);
    return model_tensor(self, scale_name);
}

static int check_shape(const struct tensor *tensor, uint32_t dims, uint32_t rows, uint32_t columns,
                       struct failure *failure) {
    if (tensor->dims == dims && tensor->shape[0] == rows &&
        (dims == 1 || tensor->shape[1] == columns))
        return 0;
    char expected[32], found[96] = "[";
    if (dims == 1)
        snprintf(expected, sizeof expected, "[%u]", rows);
    else
        snprintf(expected, sizeof expected, "[%u, %u]", rows, columns);
    size_t used = 1;
    for (uint32_t i = 0; i < tensor->dims; i++)
        used += (size_t)snprintf(found + used, sizeof found - used, "%s%llu", i > 0 ? ", " : "",
                                 (unsigned long long)tensor->shape[i]);
    snprintf(found + used, sizeof found - used, "]");
    return fail(failure, ERR_CORRUPT, "tensor %s: expected %s as config.json says, found %s",
                tensor->name, expected, found);
}

static int check_scale(const struct model *self, const struct weight_spec *spec,
                       struct failure *failure) {
    if (!self->config.fp8)
        return fail(failure, ERR_CORRUPT,
                    "tensor %s: found F8_E4M3, but config.json has no quantization_config",
                    spec->name);
    const struct tensor *scale = find_scale(self, spec->name);
    if (scale == NULL)
        return fail(failure, ERR_NOT_FOUND,
                    "tensor %s_scale_inv: missing (the scales of an F8_E4M3 tensor)", spec->name);
    if (scale->dtype != DTYPE_F32)
        return fail(failure, ERR_UNSUPPORTED, "tensor %s: expected F32, found %s", scale->name,
                    dtype_name(scale->dtype));
    return check_shape(scale, 2, weight_scale_rows(&self->config, spec),
                       weight_scale_columns(&self->config, spec), failure);
}

static int check_weight(const struct model *self, const struct weight_spec *spec,
                        struct failure *failure) {
    const struct tensor *tensor = model_tensor(self, spec->name);
    if (tensor == NULL)
        return fail(failure, ERR_NOT_FOUND, "tensor %s: missing (config.json asks for it)",
                    spec->name);
    bool plain = tensor->dtype == DTYPE_BF16 || tensor->dtype == DTYPE_F32;
    if (!plain && !(spec->kind == WEIGHT_MATRIX && tensor->dtype == DTYPE_E4M3))
        return fail(failure, ERR_UNSUPPORTED, "tensor %s: expected %s, found %s%s", spec->name,
                    spec->kind == WEIGHT_MATRIX ? "BF16, F32 or F8_E4M3" : "BF16 or F32",
                    dtype_name(tensor->dtype),
                    tensor->dtype == DTYPE_F16 ? " (convert the model to BF16)" : "");
    int code = check_shape(tensor, spec->kind == WEIGHT_VECTOR ? 1 : 2, spec->rows, spec->columns,
                           failure);
    if (code == 0 && tensor->dtype == DTYPE_E4M3)
        code = check_scale(self, spec, failure);
    return code;
}

static int check_experts(const struct model *self, uint32_t layer, struct failure *failure) {
    struct weight_spec spec;
    for (uint32_t expert = 0; expert < self->config.experts; expert++) {
        for (enum expert_part part = EXPERT_GATE; part <= EXPERT_DOWN; part++) {
            weight_specify_expert(&self->config, layer, part, expert, &spec);
            int code = check_weight(self, &spec, failure);
            if (code < 0)
                return code;
        }
    }
    return 0;
}

int model_check_weights(const struct model *self, struct failure *failure) {
    const struct model_config *config = &self->config;
    struct weight_spec spec;
    for (uint32_t layer = 0; layer < config->layers + config->mtp_layers; layer++) {
        for (enum weight which = 0; which < WEIGHTS; which++) {
            bool once = ROLES[which].place == MODEL;
            if ((once && layer > 0) || !weight_specify(config, which, layer, &spec))
                continue;
            int code = check_weight(self, &spec, failure);
            if (code < 0)
                return code;
        }
        int code = model_layer_is_moe(config, layer) ? check_experts(self, layer, failure) : 0;
        if (code < 0)
            return code;
    }
    return 0;
}

bool model_experts_are_e4m3(const struct model *self) {
    const struct model_config *config = &self->config;
    struct weight_spec spec;
    for (uint32_t layer = 0; layer < config->layers + config->mtp_layers; layer++)
        for (uint32_t expert = 0; model_layer_is_moe(config, layer) && expert < config->experts;
             expert++)
            for (enum expert_part part = EXPERT_GATE; part <= EXPERT_UP; part++) {
                weight_specify_expert(config, layer, part, expert, &spec);
                const struct tensor *tensor = model_tensor(self, spec.name);
                if (tensor == NULL || tensor->dtype != DTYPE_E4M3)
                    return false;
            }
    return config->fp8 && config->experts > 0;
}

static struct weight_view view_of(const struct model *self, const struct weight_spec *spec) {
    const struct tensor *tensor = model_tensor(self, spec->name);
    ASSERT(tensor != NULL);
    struct weight_view view = {.dtype = tensor->dtype,
                               .data = tensor->data,
                               .n = spec->rows,
                               .k = spec->columns,
                               .stride = spec->columns};
    if (tensor->dtype == DTYPE_E4M3) {
        view.scale = find_scale(self, spec->name)->data;
        view.scale_stride = weight_scale_columns(&self->config, spec);
        view.block = self->config.fp8_block_rows;
    }
    return view;
}

struct weight_view model_weight(const struct model *self, enum weight which, uint32_t layer) {
    struct weight_spec spec;
    if (!weight_specify(&self->config, which, layer, &spec)) {
        ASSERT(layer < self->config.layers + self->config.mtp_layers);
        return (struct weight_view){0}; /* this layer or family has none */
    }
    return view_of(self, &spec);
}

struct weight_view model_expert_weight(const struct model *self, uint32_t layer, uint32_t expert,
                                       enum expert_part part) {
    struct weight_spec spec;
    weight_specify_expert(&self->config, layer, part, expert, &spec);
    return view_of(self, &spec);
}

uint64_t model_expert_bytes(const struct model *self, uint32_t layer) {
    uint64_t bytes = 0;
    struct weight_spec spec;
    for (enum expert_part part = EXPERT_GATE; part <= EXPERT_DOWN; part++) {
        weight_specify_expert(&self->config, layer, part, 0, &spec);
        const struct tensor *tensor = model_tensor(self, spec.name);
        bytes += tensor->bytes;
        if (tensor->dtype == DTYPE_E4M3)
            bytes += find_scale(self, spec.name)->bytes;
    }
    return bytes;
}

void weight_to_float(const struct weight_view *view, float *ret) {
    ASSERT(view->dtype == DTYPE_F32 || view->dtype == DTYPE_BF16);
    if (view->dtype == DTYPE_F32) {
        memcpy(ret, view->data, view->n * sizeof *ret);
        return;
    }
    const bf16 *data = view->data;
    for (uint32_t i = 0; i < view->n; i++) {
        uint32_t bits = (uint32_t)data[i] << 16; /* BF16 is the upper half of an FP32 */
        memcpy(&ret[i], &bits, sizeof bits);
    }
}
