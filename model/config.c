/* config.json of the DeepSeek families, read into one checked struct. Everything that later code
 * multiplies, divides by or indexes with gets its range here; what this program cannot compute
 * (another family, another rotation, biases) is refused by name, so that a model is never served
 * with numbers that are nearly right. */
#include "model/config.h"

#include <stdio.h>
#include <string.h>

#include "actors/limits.h"
#include "model/fields.h"

#define WIDTH_MAX    262144 /* of an MLP */
#define HEAD_DIM_MAX 4096
#define LORA_MAX     65536
#define SHARED_MAX   64
#define MTP_MAX      8
#define FP8_BLOCK    128

bool model_layer_is_moe(const struct model_config *config, uint32_t layer) {
    return config->experts > 0 && layer >= config->dense_layers &&
           layer % config->moe_layer_freq == 0;
}

static void parse_family(struct fields *fields, struct model_config *config) {
    static const struct {
        const char *model_type;
        enum family family;
    } FAMILIES[] = {
        {"deepseek_v3", FAMILY_DEEPSEEK_V3},
        {"kimi_k2", FAMILY_DEEPSEEK_V3}, /* DeepseekV3ForCausalLM under another name */
        {"deepseek_v2", FAMILY_DEEPSEEK_V2},
    };
    const char *type = fields_string_or(fields, "model_type", "");
    for (size_t i = 0; i < sizeof FAMILIES / sizeof *FAMILIES; i++) {
        if (strcmp(type, FAMILIES[i].model_type) == 0) {
            config->family = FAMILIES[i].family;
            snprintf(config->model_type, sizeof config->model_type, "%s", type);
            return;
        }
    }
    fields_fail(fields, ERR_UNSUPPORTED,
                "model_type: expected deepseek_v3, kimi_k2 or deepseek_v2, found \"%.64s\"", type);
}

static void parse_shape(struct fields *fields, struct model_config *config) {
    config->vocabulary = fields_u32(fields, "vocab_size", 1, VOCABULARY_MAX);
    config->hidden = fields_u32(fields, "hidden_size", 1, HIDDEN_MAX);
    config->layers = fields_u32(fields, "num_hidden_layers", 1, LAYERS_MAX);
    config->mtp_layers = fields_u32_or(fields, "num_nextn_predict_layers", 0, MTP_MAX, 0);
    if (config->layers + config->mtp_layers > LAYERS_MAX)
        fields_fail(fields, ERR_TOO_LARGE,
                    "num_hidden_layers + num_nextn_predict_layers: expected at most %d, found %u",
                    LAYERS_MAX, config->layers + config->mtp_layers);
    config->context = fields_u32(fields, "max_position_embeddings", 1, CONTEXT_MAX);
    config->norm_eps = (float)fields_number_or(fields, "rms_norm_eps", 1e-12, 0.1, 1e-6);
    config->tie_embeddings = fields_bool_or(fields, "tie_word_embeddings", false);

    config->heads = fields_u32(fields, "num_attention_heads", 1, HEADS_MAX);
    uint32_t kv_heads = fields_u32_or(fields, "num_key_value_heads", 1, HEADS_MAX, config->heads);
    if (kv_heads != config->heads)
        fields_fail(fields, ERR_INVALID,
                    "num_key_value_heads: expected %u as num_attention_heads, found %u (latent "
                    "attention has one key per head)",
                    config->heads, kv_heads);
    if (json_object_get(fields->object, "q_lora_rank") == NULL)
        fields_fail(fields, ERR_INVALID, "q_lora_rank: missing (null means none)");
    config->q_lora = fields_u32_or(fields, "q_lora_rank", 1, LORA_MAX, 0);
    config->kv_lora = fields_u32(fields, "kv_lora_rank", 1, LORA_MAX);
    config->nope = fields_u32(fields, "qk_nope_head_dim", 1, HEAD_DIM_MAX);
    config->rope = fields_u32(fields, "qk_rope_head_dim", 2, HEAD_DIM_MAX);
    config->v = fields_u32(fields, "v_head_dim", 1, HEAD_DIM_MAX);
    if (config->rope % 2 != 0)
        fields_fail(fields, ERR_INVALID,
                    "qk_rope_head_dim: expected an even number (pairs are rotated), found %u",
                    config->rope);

    const char *act = fields_string_or(fields, "hidden_act", "silu");
    if (strcmp(act, "silu") != 0)
        fields_fail(fields, ERR_UNSUPPORTED, "hidden_act: expected \"silu\", found \"%.64s\"", act);
    if (fields_bool_or(fields, "attention_bias", false))
        fields_fail(fields, ERR_UNSUPPORTED, "attention_bias: expected false, found true");
    if (fields_bool_or(fields, "mlp_bias", false))
        fields_fail(fields, ERR_UNSUPPORTED, "mlp_bias: expected false, found true");
}

static void expect_string(struct fields *fields, const char *key, const char *expected) {
    const char *found = fields_string_or(fields, key, expected);
    if (strcmp(found, expected) != 0)
        fields_fail(fields, ERR_UNSUPPORTED, "%s: expected \"%s\" for this family, found \"%.64s\"",
                    key, expected, found);
}

/* DeepSeek-V2: softmax scores, groups ranked by their best expert, weights not normalised but
 * scaled (2405.04434, section 2.2; the published checkpoints all say norm_topk_prob false, and
 * implementations disagree about true, so true is refused). */
static void parse_gate_v2(struct fields *fields, struct gate_parameters *gate) {
    expect_string(fields, "scoring_func", "softmax");
    gate->scoring = GATE_SOFTMAX;
    gate->group_score = GATE_GROUP_MAX;
    gate->groups = gate->groups_chosen = 1;
    const char *method = fields_string_or(fields, "topk_method", "greedy");
    if (strcmp(method, "group_limited_greedy") == 0) {
        gate->groups = fields_u32(fields, "n_group", 1, EXPERT_GROUPS_MAX);
        gate->groups_chosen = fields_u32(fields, "topk_group", 1, EXPERT_GROUPS_MAX);
    } else if (strcmp(method, "greedy") != 0) {
        fields_fail(fields, ERR_UNSUPPORTED,
                    "topk_method: expected \"greedy\" or \"group_limited_greedy\" for this family, "
                    "found \"%.64s\"",
                    method);
    }
    if (fields_bool_or(fields, "norm_topk_prob", false))
        fields_fail(fields, ERR_UNSUPPORTED,
                    "norm_topk_prob: expected false for deepseek_v2, found true");
    gate->normalise = false;
    gate->scaling = (float)fields_number_or(fields, "routed_scaling_factor", 1e-6, 1e6, 1.0);
}

/* DeepSeek-V3: sigmoid scores, correction bias for the choice, groups ranked by the sum of their
 * two best (2412.19437, section 2.1.2). */
static void parse_gate_v3(struct fields *fields, struct gate_parameters *gate) {
    expect_string(fields, "scoring_func", "sigmoid");
    expect_string(fields, "topk_method", "noaux_tc");
    gate->scoring = GATE_SIGMOID;
    gate->group_score = GATE_GROUP_TOP2_SUM;
    gate->groups = fields_u32(fields, "n_group", 1, EXPERT_GROUPS_MAX);
    gate->groups_chosen = fields_u32(fields, "topk_group", 1, EXPERT_GROUPS_MAX);
    gate->normalise = fields_bool_or(fields, "norm_topk_prob", true);
    gate->scaling = (float)fields_number_or(fields, "routed_scaling_factor", 1e-6, 1e6, 2.5);
}

static void check_gate(struct fields *fields, const struct gate_parameters *gate) {
    if (fields->code < 0)
        return;
    if (gate->experts % gate->groups != 0) {
        fields_fail(fields, ERR_INVALID,
                    "n_group: expected a divisor of n_routed_experts (%u), found %u", gate->experts,
                    gate->groups);
        return;
    }
    if (gate->groups_chosen > gate->groups)
        fields_fail(fields, ERR_INVALID, "topk_group: expected at most n_group (%u), found %u",
                    gate->groups, gate->groups_chosen);
    uint32_t eligible = gate->experts / gate->groups * gate->groups_chosen;
    if (gate->k > eligible)
        fields_fail(fields, ERR_INVALID,
                    "num_experts_per_tok: expected at most %u (the experts in %u of %u groups), "
                    "found %u",
                    eligible, gate->groups_chosen, gate->groups, gate->k);
    if (gate->group_score == GATE_GROUP_TOP2_SUM && gate->groups > 1 &&
        gate->experts / gate->groups < 2)
        fields_fail(fields, ERR_INVALID,
                    "n_group: expected at least 2 experts in a group (groups are ranked by their "
                    "two best), found %u experts in %u groups",
                    gate->experts, gate->groups);
}

static void parse_experts(struct fields *fields, struct model_config *config) {
    config->moe_layer_freq = fields_u32_or(fields, "moe_layer_freq", 1, LAYERS_MAX, 1);
    config->experts = fields_u32_or(fields, "n_routed_experts", 0, EXPERTS_MAX, 0);
    config->dense_layers = config->layers;
    if (config->experts > 0) {
        config->dense_layers = fields_u32(fields, "first_k_dense_replace", 0, config->layers);
        config->expert_width = fields_u32(fields, "moe_intermediate_size", 1, WIDTH_MAX);
        config->shared_experts = fields_u32_or(fields, "n_shared_experts", 0, SHARED_MAX, 0);
        if ((uint64_t)config->shared_experts * config->expert_width > WIDTH_MAX)
            fields_fail(
                fields, ERR_TOO_LARGE,
                "n_shared_experts x moe_intermediate_size: expected at most %d, found %u x %u",
                WIDTH_MAX, config->shared_experts, config->expert_width);
        struct gate_parameters *gate = &config->gate;
        gate->experts = config->experts;
        gate->k = fields_u32(fields, "num_experts_per_tok", 1, EXPERTS_PER_TOKEN_MAX);
        if (config->family == FAMILY_DEEPSEEK_V2)
            parse_gate_v2(fields, gate);
        else
            parse_gate_v3(fields, gate);
        check_gate(fields, gate);
    }
    bool all_moe = fields->code == 0;
    for (uint32_t layer = 0; all_moe && layer < config->layers; layer++)
        all_moe = model_layer_is_moe(config, layer);
    config->dense_width = all_moe ? fields_u32_or(fields, "intermediate_size", 1, WIDTH_MAX, 1)
                                  : fields_u32(fields, "intermediate_size", 1, WIDTH_MAX);
}

static void parse_yarn(struct fields *rope, struct rope_parameters *parameters) {
    static const char *const REFUSED[] = {"attention_factor", "long_factor", "short_factor"};
    for (size_t i = 0; i < sizeof REFUSED / sizeof *REFUSED; i++)
        if (fields_get(rope, REFUSED[i]) != NULL)
            fields_fail(rope, ERR_UNSUPPORTED, "%s: expected nothing, found a value", REFUSED[i]);
    if (!fields_bool_or(rope, "truncate", true))
        fields_fail(rope, ERR_UNSUPPORTED, "truncate: expected true, found false");
    parameters->yarn_factor = fields_number(rope, "factor", 1, 1e6);
    parameters->original_positions =
        fields_u32(rope, "original_max_position_embeddings", 1, CONTEXT_MAX);
    parameters->beta_fast = fields_number_or(rope, "beta_fast", 1e-3, 1e6, 32);
    parameters->beta_slow = fields_number_or(rope, "beta_slow", 1e-3, 1e6, 1);
    /* Defaults of DeepSeek's own code: mscale 1, mscale_all_dim 0. */
    parameters->mscale = fields_number_or(rope, "mscale", 0, 100, 1);
    parameters->mscale_all_dim = fields_number_or(rope, "mscale_all_dim", 0, 100, 0);
    if (parameters->beta_fast < parameters->beta_slow)
        fields_fail(rope, ERR_INVALID, "beta_fast: expected at least beta_slow (%g), found %g",
                    parameters->beta_slow, parameters->beta_fast);
}

static void parse_rope(struct fields *fields, struct model_config *config) {
    struct rope_parameters *parameters = &config->rope_parameters;
    /* Newer transformers write everything about rotation, theta included, into "rope_parameters".
     */
    const char *where = "rope_parameters";
    const json_t *object = fields_get(fields, where);
    if (object == NULL) {
        where = "rope_scaling";
        object = fields_get(fields, where);
    }
    parameters->theta = fields_number_or(fields, "rope_theta", 1, 1e12, 10000);
    config->rope_interleave = fields_bool_or(fields, "rope_interleave", true);
    if (!config->rope_interleave)
        fields_fail(fields, ERR_UNSUPPORTED,
                    "rope_interleave: expected true (pairs are rotated, as in every DeepSeek "
                    "checkpoint), found false");
    if (object == NULL || fields->code < 0)
        return;
    char file[64];
    snprintf(file, sizeof file, "%s: %s", fields->file, where);
    struct fields rope = {.object = object, .file = file, .failure = fields->failure};
    if (!json_is_object(object)) {
        char shown[64];
        fields_fail(&rope, ERR_INVALID, "expected an object or null, found %s",
                    fields_show(object, shown, sizeof shown));
    } else {
        parameters->theta = fields_number_or(&rope, "rope_theta", 1, 1e12, parameters->theta);
        const char *type =
            fields_string_or(&rope, "rope_type", fields_string_or(&rope, "type", "default"));
        if (strcmp(type, "yarn") == 0)
            parse_yarn(&rope, parameters);
        else if (strcmp(type, "default") != 0)
            fields_fail(&rope, ERR_UNSUPPORTED,
                        "type: expected \"yarn\" or \"default\", found \"%.64s\"", type);
    }
    fields->code = rope.code;
}

static void parse_quantization(struct fields *fields, struct model_config *config) {
    const json_t *object = fields_get(fields, "quantization_config");
    if (object == NULL || fields->code < 0)
        return;
    char file[64];
    snprintf(file, sizeof file, "%s: quantization_config", fields->file);
    struct fields quantization = {.object = object, .file = file, .failure = fields->failure};
    if (!json_is_object(object)) {
        fields_fail(&quantization, ERR_INVALID, "expected an object or null");
    } else {
        expect_string(&quantization, "quant_method", "fp8");
        if (fields_get(&quantization, "quant_method") == NULL)
            fields_fail(&quantization, ERR_INVALID, "quant_method: missing");
        expect_string(&quantization, "fmt", "e4m3");
        const json_t *block = fields_get(&quantization, "weight_block_size");
        if (!json_is_array(block) || json_array_size(block) != 2 ||
            json_integer_value(json_array_get(block, 0)) != FP8_BLOCK ||
            json_integer_value(json_array_get(block, 1)) != FP8_BLOCK) {
            char shown[64];
            fields_fail(&quantization, ERR_UNSUPPORTED,
                        "weight_block_size: expected [%d, %d], found %s", FP8_BLOCK, FP8_BLOCK,
                        fields_show(block, shown, sizeof shown));
        }
        config->fp8 = true;
        config->fp8_block_rows = config->fp8_block_cols = FP8_BLOCK;
    }
    fields->code = quantization.code;
}

static void add_eos(struct fields *fields, struct model_config *config, const json_t *value) {
    const uint32_t room = sizeof config->eos / sizeof *config->eos;
    json_int_t token = json_integer_value(value);
    if (!json_is_integer(value) || token < 0 || token >= config->vocabulary) {
        char shown[64];
        fields_fail(fields, ERR_INVALID,
                    "eos_token_id: expected a token below vocab_size (%u), found %s",
                    config->vocabulary, fields_show(value, shown, sizeof shown));
        return;
    }
    for (uint32_t i = 0; i < config->eos_count; i++)
        if (config->eos[i] == (int32_t)token)
            return;
    if (config->eos_count == room) {
        fields_fail(fields, ERR_TOO_LARGE, "eos_token_id: expected at most %u tokens", room);
        return;
    }
    config->eos[config->eos_count++] = (int32_t)token;
}

/* A token, a list of tokens, or nothing. */
static void parse_eos(struct fields *fields, struct model_config *config) {
    const json_t *value = fields_get(fields, "eos_token_id");
    if (value == NULL || fields->code < 0)
        return;
    if (!json_is_array(value)) {
        add_eos(fields, config, value);
        return;
    }
    for (size_t i = 0; i < json_array_size(value) && fields->code == 0; i++)
        add_eos(fields, config, json_array_get(value, i));
}

static int parse_generation(struct model_config *config, const char *text, size_t size,
                            struct failure *failure) {
    config->default_temperature = 1;
    config->default_top_p = 1;
    config->default_top_k = 0;
    if (text == NULL)
        return 0;
    const char *file = "generation_config.json";
    json_t *root = fields_parse(text, size, file, failure);
    if (root == NULL)
        return failure->code;
    struct fields fields = {.object = root, .file = file, .failure = failure};
    parse_eos(&fields, config);
    config->default_temperature = (float)fields_number_or(&fields, "temperature", 0, 100, 1);
    config->default_top_p = (float)fields_number_or(&fields, "top_p", 1e-6, 1, 1);
    config->default_top_k = fields_i32_or(&fields, "top_k", -1, VOCABULARY_MAX, 0);
    json_decref(root);
    return fields.code;
}

int model_config_parse(struct model_config *ret, const char *config_json, size_t config_bytes,
                       const char *generation_json, size_t generation_bytes,
                       struct failure *failure) {
    struct failure local;
    struct failure *text = failure != NULL ? failure : &local;
    json_t *root = fields_parse(config_json, config_bytes, "config.json", text);
    if (root == NULL)
        return text->code;
    struct model_config config = {0};
    struct fields fields = {.object = root, .file = "config.json", .failure = text};
    parse_family(&fields, &config);
    parse_shape(&fields, &config);
    if (fields.code == 0)
        parse_experts(&fields, &config);
    parse_rope(&fields, &config);
    parse_quantization(&fields, &config);
    if (fields.code == 0) {
        config.bos = fields_i32_or(&fields, "bos_token_id", -1, (int32_t)config.vocabulary - 1, -1);
        config.pad = fields_i32_or(&fields, "pad_token_id", -1, (int32_t)config.vocabulary - 1, -1);
    }
    parse_eos(&fields, &config);
    json_decref(root);
    if (fields.code < 0)
        return fields.code;
    int code = parse_generation(&config, generation_json, generation_bytes, text);
    if (code < 0)
        return code;
    *ret = config;
    return 0;
}
