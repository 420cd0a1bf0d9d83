/* config.json: the published configs of every family, and one refusal for each thing that can be
 * wrong. */
#include "model/config.h"
#include "actors/limits.h"
#include "tests/support/model_files.h"

#include <jansson.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static int parse(struct model_config *config, const char *text, const char *generation,
                 struct failure *failure) {
    return model_config_parse(config, text, strlen(text), generation,
                              generation != NULL ? strlen(generation) : 0, failure);
}

/* As published (huggingface.co/deepseek-ai and moonshotai), less the fields that say nothing about
 * the computation. */
static const char V3[] =
    "{\"architectures\":[\"DeepseekV3ForCausalLM\"],\"attention_bias\":false,\"bos_token_id\":0,"
    "\"eos_token_id\":1,\"ep_size\":1,\"first_k_dense_replace\":3,\"hidden_act\":\"silu\",\"hidden_"
    "size\":7168,"
    "\"intermediate_size\":18432,\"kv_lora_rank\":512,\"max_position_embeddings\":163840,"
    "\"model_type\":\"deepseek_v3\",\"moe_intermediate_size\":2048,\"moe_layer_freq\":1,\"n_"
    "group\":8,"
    "\"n_routed_experts\":256,\"n_shared_experts\":1,\"norm_topk_prob\":true,\"num_attention_"
    "heads\":128,"
    "\"num_experts_per_tok\":8,\"num_hidden_layers\":61,\"num_key_value_heads\":128,"
    "\"num_nextn_predict_layers\":1,\"q_lora_rank\":1536,\"qk_nope_head_dim\":128,\"qk_rope_head_"
    "dim\":64,"
    "\"quantization_config\":{\"activation_scheme\":\"dynamic\",\"fmt\":\"e4m3\",\"quant_method\":"
    "\"fp8\","
    "\"weight_block_size\":[128,128]},\"rms_norm_eps\":1e-06,\"rope_scaling\":{\"beta_fast\":32,"
    "\"beta_slow\":1,"
    "\"factor\":40,\"mscale\":1.0,\"mscale_all_dim\":1.0,\"original_max_position_embeddings\":4096,"
    "\"type\":\"yarn\"},\"rope_theta\":10000,\"routed_scaling_factor\":2.5,\"scoring_func\":"
    "\"sigmoid\","
    "\"tie_word_embeddings\":false,\"topk_group\":4,\"topk_method\":\"noaux_tc\",\"torch_dtype\":"
    "\"bfloat16\","
    "\"v_head_dim\":128,\"vocab_size\":129280}";
static const char KIMI_K2[] =
    "{\"model_type\":\"kimi_k2\",\"first_k_dense_replace\":1,\"hidden_act\":\"silu\",\"hidden_"
    "size\":7168,"
    "\"intermediate_size\":18432,\"kv_lora_rank\":512,\"max_position_embeddings\":131072,"
    "\"moe_intermediate_size\":2048,\"n_group\":1,\"n_routed_experts\":384,\"n_shared_experts\":1,"
    "\"norm_topk_prob\":true,\"num_attention_heads\":64,\"num_experts_per_tok\":8,\"num_hidden_"
    "layers\":61,"
    "\"num_key_value_heads\":64,\"num_nextn_predict_layers\":0,\"q_lora_rank\":1536,\"qk_nope_head_"
    "dim\":128,"
    "\"qk_rope_head_dim\":64,\"quantization_config\":{\"quant_method\":\"fp8\",\"fmt\":\"e4m3\","
    "\"weight_block_size\":[128,128]},\"rms_norm_eps\":1e-06,\"rope_scaling\":{\"beta_fast\":1.0,"
    "\"beta_slow\":1.0,"
    "\"factor\":32.0,\"mscale\":1.0,\"mscale_all_dim\":1.0,\"original_max_position_embeddings\":"
    "4096,"
    "\"type\":\"yarn\"},\"rope_theta\":50000.0,\"routed_scaling_factor\":2.827,\"scoring_func\":"
    "\"sigmoid\","
    "\"topk_group\":1,\"topk_method\":\"noaux_tc\",\"v_head_dim\":128,\"vocab_size\":163840,"
    "\"bos_token_id\":163584,\"eos_token_id\":163585,\"pad_token_id\":163839}";
static const char MOONLIGHT[] =
    "{\"model_type\":\"deepseek_v3\",\"first_k_dense_replace\":1,\"hidden_act\":\"silu\",\"hidden_"
    "size\":2048,"
    "\"intermediate_size\":11264,\"kv_lora_rank\":512,\"max_position_embeddings\":8192,"
    "\"moe_intermediate_size\":1408,\"moe_layer_freq\":1,\"n_group\":1,\"n_routed_experts\":64,"
    "\"n_shared_experts\":2,\"norm_topk_prob\":true,\"num_attention_heads\":16,\"num_experts_per_"
    "tok\":6,"
    "\"num_hidden_layers\":27,\"num_key_value_heads\":16,\"num_nextn_predict_layers\":0,\"q_lora_"
    "rank\":null,"
    "\"qk_nope_head_dim\":128,\"qk_rope_head_dim\":64,\"rms_norm_eps\":1e-05,\"rope_scaling\":null,"
    "\"rope_theta\":50000.0,\"routed_scaling_factor\":2.446,\"scoring_func\":\"sigmoid\",\"topk_"
    "group\":1,"
    "\"topk_method\":\"noaux_tc\",\"v_head_dim\":128,\"vocab_size\":163840,\"bos_token_id\":163584,"
    "\"eos_token_id\":163585,\"pad_token_id\":163839}";
static const char V2[] =
    "{\"model_type\":\"deepseek_v2\",\"attention_bias\":false,\"first_k_dense_replace\":1,\"hidden_"
    "act\":\"silu\","
    "\"hidden_size\":5120,\"intermediate_size\":12288,\"kv_lora_rank\":512,\"max_position_"
    "embeddings\":163840,"
    "\"moe_intermediate_size\":1536,\"moe_layer_freq\":1,\"n_group\":8,\"n_routed_experts\":160,"
    "\"n_shared_experts\":2,\"norm_topk_prob\":false,\"num_attention_heads\":128,\"num_experts_per_"
    "tok\":6,"
    "\"num_hidden_layers\":60,\"num_key_value_heads\":128,\"q_lora_rank\":1536,\"qk_nope_head_"
    "dim\":128,"
    "\"qk_rope_head_dim\":64,\"rms_norm_eps\":1e-06,\"rope_scaling\":{\"beta_fast\":32,\"beta_"
    "slow\":1,"
    "\"factor\":40,\"mscale\":0.707,\"mscale_all_dim\":0.707,\"original_max_position_embeddings\":"
    "4096,"
    "\"type\":\"yarn\"},\"rope_theta\":10000,\"routed_scaling_factor\":16.0,\"scoring_func\":"
    "\"softmax\","
    "\"topk_group\":3,\"topk_method\":\"group_limited_greedy\",\"v_head_dim\":128,\"vocab_size\":"
    "102400,"
    "\"bos_token_id\":100000,\"eos_token_id\":100001}";
static const char V2_LITE[] =
    "{\"model_type\":\"deepseek_v2\",\"first_k_dense_replace\":1,\"hidden_act\":\"silu\",\"hidden_"
    "size\":2048,"
    "\"intermediate_size\":10944,\"kv_lora_rank\":512,\"max_position_embeddings\":163840,"
    "\"moe_intermediate_size\":1408,\"moe_layer_freq\":1,\"n_group\":1,\"n_routed_experts\":64,"
    "\"n_shared_experts\":2,\"norm_topk_prob\":false,\"num_attention_heads\":16,\"num_experts_per_"
    "tok\":6,"
    "\"num_hidden_layers\":27,\"num_key_value_heads\":16,\"q_lora_rank\":null,\"qk_nope_head_dim\":"
    "128,"
    "\"qk_rope_head_dim\":64,\"rms_norm_eps\":1e-06,\"rope_scaling\":{\"beta_fast\":32,\"beta_"
    "slow\":1,"
    "\"factor\":40,\"mscale\":0.707,\"mscale_all_dim\":0.707,\"original_max_position_embeddings\":"
    "4096,"
    "\"type\":\"yarn\"},\"rope_theta\":10000,\"routed_scaling_factor\":1.0,\"scoring_func\":"
    "\"softmax\","
    "\"topk_group\":1,\"topk_method\":\"greedy\",\"v_head_dim\":128,\"vocab_size\":102400,"
    "\"bos_token_id\":100000,\"eos_token_id\":100001}";

static void test_v3(void **state) {
    struct model_config config;
    struct failure failure;
    assert_int_equal(
        parse(&config, V3,
              "{\"eos_token_id\":1,\"temperature\":0.6,\"top_p\":0.95,\"do_sample\":true}",
              &failure),
        0);
    assert_int_equal(config.family, FAMILY_DEEPSEEK_V3);
    assert_string_equal(config.model_type, "deepseek_v3");
    assert_int_equal(config.vocabulary, 129280);
    assert_int_equal(config.hidden, 7168);
    assert_int_equal(config.layers, 61);
    assert_int_equal(config.mtp_layers, 1);
    assert_int_equal(config.dense_layers, 3);
    assert_int_equal(config.dense_width, 18432);
    assert_int_equal(config.expert_width, 2048);
    assert_int_equal(config.shared_experts, 1);
    assert_int_equal(config.experts, 256);
    assert_int_equal(config.heads, 128);
    assert_int_equal(config.q_lora, 1536);
    assert_int_equal(config.kv_lora, 512);
    assert_int_equal(config.nope, 128);
    assert_int_equal(config.rope, 64);
    assert_int_equal(config.v, 128);
    assert_true(config.norm_eps == 1e-6f);
    assert_true(config.rope_interleave);
    assert_int_equal(config.context, 163840);
    assert_true(config.fp8);
    assert_int_equal(config.fp8_block_rows, 128);
    assert_int_equal(config.fp8_block_cols, 128);
    const struct gate_parameters *gate = &config.gate;
    assert_int_equal(gate->scoring, GATE_SIGMOID);
    assert_int_equal(gate->group_score, GATE_GROUP_TOP2_SUM);
    assert_int_equal(gate->experts, 256);
    assert_int_equal(gate->groups, 8);
    assert_int_equal(gate->groups_chosen, 4);
    assert_int_equal(gate->k, 8);
    assert_true(gate->normalise);
    assert_true(gate->scaling == 2.5f && gate->top_p == 0);
    const struct rope_parameters *rope = &config.rope_parameters;
    assert_true(rope->theta == 10000 && rope->yarn_factor == 40 &&
                rope->original_positions == 4096);
    assert_true(rope->beta_fast == 32 && rope->beta_slow == 1);
    assert_true(rope->mscale == 1 && rope->mscale_all_dim == 1);
    assert_int_equal(config.bos, 0);
    assert_int_equal(config.pad, -1);
    assert_int_equal(config.eos_count, 1);
    assert_int_equal(config.eos[0], 1);
    assert_true(config.default_temperature == 0.6f && config.default_top_p == 0.95f);
    assert_int_equal(config.default_top_k, 0);
    assert_false(model_layer_is_moe(&config, 2));
    assert_true(model_layer_is_moe(&config, 3));
    assert_true(model_layer_is_moe(&config, 61)); /* the MTP layer */
}

static void test_other_families(void **state) {
    struct model_config config;
    struct failure failure;
    assert_int_equal(parse(&config, KIMI_K2, NULL, &failure), 0);
    assert_int_equal(config.family, FAMILY_DEEPSEEK_V3);
    assert_int_equal(config.gate.groups, 1);
    assert_true(config.default_temperature == 1 && config.default_top_p == 1);
    assert_int_equal(config.pad, 163839);

    assert_int_equal(parse(&config, MOONLIGHT, "{\"eos_token_id\":[163585,163586]}", &failure), 0);
    assert_int_equal(config.q_lora, 0);
    assert_false(config.fp8);
    assert_int_equal(config.eos_count, 2);
    assert_true(config.rope_parameters.theta == 50000 && config.rope_parameters.yarn_factor <= 1);
    assert_true(config.gate.scaling == 2.446f);

    assert_int_equal(parse(&config, V2, NULL, &failure), 0);
    assert_int_equal(config.family, FAMILY_DEEPSEEK_V2);
    assert_int_equal(config.gate.scoring, GATE_SOFTMAX);
    assert_int_equal(config.gate.group_score, GATE_GROUP_MAX);
    assert_int_equal(config.gate.groups, 8);
    assert_int_equal(config.gate.groups_chosen, 3);
    assert_false(config.gate.normalise);
    assert_true(config.gate.scaling == 16);
    assert_true(config.rope_parameters.mscale == 0.707);
    assert_int_equal(config.mtp_layers, 0);

    assert_int_equal(parse(&config, V2_LITE, NULL, &failure), 0);
    assert_int_equal(config.q_lora, 0);
    assert_int_equal(config.gate.groups, 1);
    assert_int_equal(config.gate.groups_chosen, 1);
}

/* A config with the fields of `changes` put in; a value of "-" takes the field out. Caller frees.
 */
static char *changed(const char *base, const char *key, const char *value) {
    json_t *root = json_loads(base, 0, NULL);
    assert_non_null(root);
    if (strcmp(value, "-") == 0)
        json_object_del(root, key);
    else
        json_object_set_new(root, key, json_loads(value, JSON_DECODE_ANY, NULL));
    char *text = json_dumps(root, 0);
    json_decref(root);
    return text;
}

static void test_accepted_changes(void **state) {
    static const struct {
        const char *key, *value;
    } CASES[] = {
        {"rope_scaling", "null"},
        {"rope_scaling", "{\"rope_type\":\"default\"}"},
        {"rope_parameters", "{\"rope_type\":\"yarn\",\"rope_theta\":20000.0,\"factor\":8,"
                            "\"original_max_position_embeddings\":4096}"},
        {"num_key_value_heads", "-"},
        {"num_nextn_predict_layers", "null"},
        {"n_shared_experts", "null"},
        {"quantization_config", "null"},
        {"eos_token_id", "[1,2,3]"},
        {"eos_token_id", "null"},
        {"attention_bias", "null"},
        {"an_unknown_field", "{\"deep\":[1,2]}"},
        {"hidden_size", "251"},
    };
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        struct model_config config;
        struct failure failure = {0};
        char *text = changed(V3, CASES[i].key, CASES[i].value);
        if (parse(&config, text, NULL, &failure) != 0)
            fail_msg("%s: %s: %s", CASES[i].key, CASES[i].value, failure.text);
        if (strcmp(CASES[i].key, "rope_parameters") == 0)
            assert_true(
                config.rope_parameters.theta == 20000 && config.rope_parameters.yarn_factor == 8 &&
                config.rope_parameters.mscale == 1 && config.rope_parameters.mscale_all_dim == 0);
        free(text);
    }
    struct model_config config;
    char *dense = changed(V3, "n_routed_experts", "-");
    assert_int_equal(parse(&config, dense, NULL, NULL), 0);
    assert_int_equal(config.experts, 0);
    assert_int_equal(config.dense_layers, 61);
    assert_false(model_layer_is_moe(&config, 60));
    free(dense);
}

static void test_refusals(void **state) {
    static const struct {
        const char *base, *key, *value;
        int code;
        const char *says;
    } CASES[] = {
        {V3, "model_type", "\"llama\"", ERR_UNSUPPORTED, "found \"llama\""},
        {V3, "model_type", "\"deepseek_v32\"", ERR_UNSUPPORTED, "deepseek_v32"},
        {V3, "model_type", "-", ERR_UNSUPPORTED, "model_type"},
        {V3, "model_type", "3", ERR_INVALID, "model_type: expected a string, found 3"},
        {V3, "hidden_act", "\"gelu\"", ERR_UNSUPPORTED, "hidden_act"},
        {V3, "attention_bias", "true", ERR_UNSUPPORTED, "attention_bias"},
        {V3, "attention_bias", "1", ERR_INVALID, "attention_bias: expected true or false"},
        {V3, "hidden_size", "-", ERR_INVALID, "hidden_size: missing"},
        {V3, "hidden_size", "null", ERR_INVALID, "hidden_size: missing"},
        {V3, "hidden_size", "0", ERR_INVALID, "found 0"},
        {V3, "hidden_size", "-7168", ERR_INVALID, "found -7168"},
        {V3, "hidden_size", "\"7168\"", ERR_INVALID, "found \"7168\""},
        {V3, "hidden_size", "7168.5", ERR_INVALID,
         "hidden_size: expected an integer from 1 to 65536"},
        {V3, "hidden_size", "4294974464", ERR_INVALID, "hidden_size"},
        {V3, "hidden_size", "9223372036854775807", ERR_INVALID, "hidden_size"},
        {V3, "hidden_size", "true", ERR_INVALID, "hidden_size"},
        {V3, "vocab_size", "0", ERR_INVALID, "vocab_size"},
        {V3, "vocab_size", "2000000", ERR_INVALID, "vocab_size"},
        {V3, "num_hidden_layers", "0", ERR_INVALID, "num_hidden_layers"},
        {V3, "num_hidden_layers", "257", ERR_INVALID, "num_hidden_layers"},
        {V3, "num_hidden_layers", "256", ERR_TOO_LARGE, "found 257"},
        {V3, "num_nextn_predict_layers", "-1", ERR_INVALID, "num_nextn_predict_layers"},
        {V3, "num_attention_heads", "100000", ERR_INVALID, "num_attention_heads"},
        {V3, "num_key_value_heads", "8", ERR_INVALID,
         "expected 128 as num_attention_heads, found 8"},
        {V3, "q_lora_rank", "-", ERR_INVALID, "null means none"},
        {V3, "q_lora_rank", "0", ERR_INVALID, "q_lora_rank"},
        {V3, "kv_lora_rank", "null", ERR_INVALID, "kv_lora_rank: missing"},
        {V3, "qk_rope_head_dim", "63", ERR_INVALID, "even"},
        {V3, "qk_nope_head_dim", "0", ERR_INVALID, "qk_nope_head_dim"},
        {V3, "v_head_dim", "-1", ERR_INVALID, "v_head_dim"},
        {V3, "intermediate_size", "-", ERR_INVALID, "intermediate_size: missing"},
        {V3, "moe_intermediate_size", "-", ERR_INVALID, "moe_intermediate_size: missing"},
        {V3, "first_k_dense_replace", "62", ERR_INVALID, "from 0 to 61"},
        {V3, "moe_layer_freq", "0", ERR_INVALID, "moe_layer_freq"},
        {V3, "n_routed_experts", "100000", ERR_INVALID, "n_routed_experts"},
        {V3, "n_routed_experts", "255", ERR_INVALID,
         "expected a divisor of n_routed_experts (255), found 8"},
        {V3, "n_routed_experts", "8", ERR_INVALID, "num_experts_per_tok: expected at most 4"},
        {V3, "n_group", "0", ERR_INVALID, "n_group"},
        {V3, "n_group", "-", ERR_INVALID, "n_group: missing"},
        {V3, "topk_group", "9", ERR_INVALID, "expected at most n_group (8), found 9"},
        {V3, "num_experts_per_tok", "0", ERR_INVALID, "num_experts_per_tok"},
        {V3, "num_experts_per_tok", "33", ERR_INVALID, "num_experts_per_tok"},
        {MOONLIGHT, "n_routed_experts", "4", ERR_INVALID,
         "num_experts_per_tok: expected at most 4"},
        {V3, "n_shared_experts", "-1", ERR_INVALID, "n_shared_experts"},
        {V3, "scoring_func", "\"softmax\"", ERR_UNSUPPORTED, "scoring_func"},
        {V3, "topk_method", "\"greedy\"", ERR_UNSUPPORTED, "topk_method"},
        {V2, "scoring_func", "\"sigmoid\"", ERR_UNSUPPORTED, "scoring_func"},
        {V2, "topk_method", "\"noaux_tc\"", ERR_UNSUPPORTED, "topk_method"},
        {V2, "norm_topk_prob", "true", ERR_UNSUPPORTED, "norm_topk_prob"},
        {V3, "routed_scaling_factor", "0", ERR_INVALID, "routed_scaling_factor"},
        {V3, "routed_scaling_factor", "\"2\"", ERR_INVALID, "routed_scaling_factor"},
        {V3, "max_position_embeddings", "0", ERR_INVALID, "max_position_embeddings"},
        {V3, "max_position_embeddings", "100000000", ERR_INVALID, "max_position_embeddings"},
        {V3, "rms_norm_eps", "0", ERR_INVALID, "rms_norm_eps"},
        {V3, "rms_norm_eps", "-1e-6", ERR_INVALID, "rms_norm_eps"},
        {V3, "rope_theta", "0", ERR_INVALID, "rope_theta"},
        {V3, "rope_interleave", "false", ERR_UNSUPPORTED, "rope_interleave"},
        {V3, "rope_scaling", "3", ERR_INVALID, "rope_scaling: expected an object"},
        {V3, "rope_scaling", "{\"type\":\"linear\",\"factor\":2}", ERR_UNSUPPORTED,
         "found \"linear\""},
        {V3, "rope_scaling", "{\"type\":\"yarn\"}", ERR_INVALID, "factor: missing"},
        {V3, "rope_scaling", "{\"type\":\"yarn\",\"factor\":40}", ERR_INVALID,
         "original_max_position_embeddings: missing"},
        {V3, "rope_scaling",
         "{\"type\":\"yarn\",\"factor\":0.5,\"original_max_position_embeddings\":4096}",
         ERR_INVALID, "factor"},
        {V3, "rope_scaling",
         "{\"type\":\"yarn\",\"factor\":40,\"original_max_position_embeddings\":4096,\"attention_"
         "factor\":1.5}",
         ERR_UNSUPPORTED, "attention_factor"},
        {V3, "rope_scaling",
         "{\"type\":\"yarn\",\"factor\":4,\"original_max_position_embeddings\":4096,\"beta_fast\":"
         "1,\"beta_slow\":2}",
         ERR_INVALID, "beta_fast"},
        {V3, "quantization_config", "{\"quant_method\":\"gptq\"}", ERR_UNSUPPORTED,
         "found \"gptq\""},
        {V3, "quantization_config", "{}", ERR_INVALID, "quant_method: missing"},
        {V3, "quantization_config", "{\"quant_method\":\"fp8\"}", ERR_UNSUPPORTED,
         "weight_block_size"},
        {V3, "quantization_config", "{\"quant_method\":\"fp8\",\"weight_block_size\":[64,128]}",
         ERR_UNSUPPORTED, "found [64,128]"},
        {V3, "quantization_config",
         "{\"quant_method\":\"fp8\",\"fmt\":\"e5m2\",\"weight_block_size\":[128,128]}",
         ERR_UNSUPPORTED, "e5m2"},
        {V3, "quantization_config", "[]", ERR_INVALID, "quantization_config"},
        {V3, "eos_token_id", "129280", ERR_INVALID, "eos_token_id"},
        {V3, "eos_token_id", "-1", ERR_INVALID, "eos_token_id"},
        {V3, "eos_token_id", "\"</s>\"", ERR_INVALID, "eos_token_id"},
        {V3, "eos_token_id", "[1,2,3,4,5,6,7,8,9]", ERR_TOO_LARGE, "at most 8"},
        {V3, "bos_token_id", "129280", ERR_INVALID, "bos_token_id"},
        {V3, "tie_word_embeddings", "\"no\"", ERR_INVALID, "tie_word_embeddings"},
    };
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        struct model_config config, untouched;
        memset(&config, 0x5a, sizeof config);
        untouched = config;
        struct failure failure = {0};
        char *text = changed(CASES[i].base, CASES[i].key, CASES[i].value);
        int code = parse(&config, text, NULL, &failure);
        if (code != CASES[i].code || strstr(failure.text, CASES[i].says) == NULL)
            fail_msg("%s = %s: expected %d \"%s\", found %d \"%s\"", CASES[i].key, CASES[i].value,
                     CASES[i].code, CASES[i].says, code, failure.text);
        assert_non_null(strstr(failure.text, "config.json"));
        assert_memory_equal(&config, &untouched, sizeof config);
        assert_int_equal(parse(&config, text, NULL, NULL), code);
        free(text);
    }
}

static void test_broken_json(void **state) {
    static const struct {
        const char *text;
        int code;
        const char *says;
    } CASES[] = {
        {"", ERR_CORRUPT, "invalid JSON"},
        {"{", ERR_CORRUPT, "invalid JSON"},
        {"[]", ERR_CORRUPT, "expected a JSON object"},
        {"{\"hidden_size\":NaN}", ERR_CORRUPT, "invalid JSON"},
        {"{\"hidden_size\":1e999}", ERR_CORRUPT, "invalid JSON"},
        {"{\"hidden_size\":99999999999999999999}", ERR_CORRUPT, "invalid JSON"},
        {"{\"hidden_size\":1,\"hidden_size\":2}", ERR_CORRUPT, "duplicate"},
        {"{} x", ERR_CORRUPT, "invalid JSON"},
        {"{\"model_type\":\"\xff\"}", ERR_CORRUPT, "invalid JSON"},
    };
    struct model_config config;
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        struct failure failure = {0};
        int code = parse(&config, CASES[i].text, NULL, &failure);
        if (code != CASES[i].code || strstr(failure.text, CASES[i].says) == NULL)
            fail_msg("%s: found %d \"%s\"", CASES[i].text, code, failure.text);
    }
    /* Nested far too deep, and over the size limit. */
    char *deep = malloc(200001);
    memset(deep, '[', 200000);
    deep[200000] = '\0';
    struct failure failure = {0};
    assert_int_equal(parse(&config, deep, NULL, &failure), ERR_CORRUPT);
    free(deep);
    assert_int_equal(model_config_parse(&config, "{", (size_t)JSON_FILE_MAX + 1, NULL, 0, &failure),
                     ERR_TOO_LARGE);
    static const char *const GENERATIONS[] = {"{", "{\"temperature\":-1}", "{\"top_p\":1.5}",
                                              "{\"top_k\":-2}", "{\"eos_token_id\":999999}"};
    for (size_t i = 0; i < sizeof GENERATIONS / sizeof *GENERATIONS; i++) {
        assert_true(parse(&config, V3, GENERATIONS[i], &failure) < 0);
        assert_non_null(strstr(failure.text, "generation_config.json"));
    }
}

static void test_stored_configs(void **state) {
    static const char *const DIRECTORIES[] = {"models/demo",
                                              "../shared/golden/v2",
                                              "../shared/golden/v2-lite",
                                              "../shared/golden/v3-fp8",
                                              "../shared/golden/v3-onegroup",
                                              "../shared/golden/v3-yarn"};
    for (size_t i = 0; i < sizeof DIRECTORIES / sizeof *DIRECTORIES; i++) {
        char path[256];
        snprintf(path, sizeof path, "%s/config.json", DIRECTORIES[i]);
        size_t size;
        char *text = read_whole_file(path, &size);
        if (text == NULL) {
            assert_true(i > 0); /* the demo model is always there */
            continue;
        }
        struct model_config config;
        struct failure failure = {0};
        if (model_config_parse(&config, text, size, NULL, 0, &failure) != 0)
            fail_msg("%s: %s", path, failure.text);
        free(text);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_v3),
        cmocka_unit_test(test_other_families),
        cmocka_unit_test(test_accepted_changes),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_broken_json),
        cmocka_unit_test(test_stored_configs),
    };
    return cmocka_run_group_tests_name("config", tests, NULL, NULL);
}
