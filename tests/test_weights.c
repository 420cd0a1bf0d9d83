/* Model directories: the demo model's views against its file, golden directories where they are,
 * and a tiny model that is damaged in every way that model_open must notice. */
#include "model/weights.h"
#include "actors/limits.h"
#include "tests/support/model_files.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

/* ---- a tiny model in memory ---- */

struct stored {
    const char *name, *dtype;
    uint32_t rows, columns; /* columns 0: a vector */
};

/* hidden 6, 2 layers (1 dense), 2 experts, 2 heads of nope 3 + rope 2, v 3, q_lora 4, kv_lora 5, 1
 * MTP layer that is dense. */
static const char TINY_CONFIG[] =
    "{\"model_type\":\"deepseek_v3\",\"vocab_size\":10,\"hidden_size\":6,\"intermediate_size\":7,"
    "\"moe_intermediate_size\":130,\"num_hidden_layers\":2,\"num_nextn_predict_layers\":0,"
    "\"num_attention_heads\":2,\"n_shared_experts\":1,\"n_routed_experts\":2,\"num_experts_per_"
    "tok\":1,"
    "\"n_group\":1,\"topk_group\":1,\"first_k_dense_replace\":1,\"q_lora_rank\":4,\"kv_lora_rank\":"
    "5,"
    "\"qk_nope_head_dim\":3,\"qk_rope_head_dim\":2,\"v_head_dim\":3,\"max_position_embeddings\":64,"
    "\"quantization_config\":{\"quant_method\":\"fp8\",\"weight_block_size\":[128,128]}}";

#define ATTENTION(layer)                                                                           \
    {"model.layers." layer ".input_layernorm.weight", "F32", 6, 0},                                \
        {"model.layers." layer ".post_attention_layernorm.weight", "F32", 6, 0},                   \
        {"model.layers." layer ".self_attn.q_a_proj.weight", "F32", 4, 6},                         \
        {"model.layers." layer ".self_attn.q_a_layernorm.weight", "F32", 4, 0},                    \
        {"model.layers." layer ".self_attn.q_b_proj.weight", "F32", 10, 4},                        \
        {"model.layers." layer ".self_attn.kv_a_proj_with_mqa.weight", "F32", 7, 6},               \
        {"model.layers." layer ".self_attn.kv_a_layernorm.weight", "F32", 5, 0},                   \
        {"model.layers." layer ".self_attn.kv_b_proj.weight", "F32", 12, 5}, {                     \
        "model.layers." layer ".self_attn.o_proj.weight", "F32", 6, 6                              \
    }

static const struct stored TINY[] = {
    {"model.embed_tokens.weight", "F32", 10, 6},
    {"lm_head.weight", "F32", 10, 6},
    {"model.norm.weight", "F32", 6, 0},
    ATTENTION("0"),
    {"model.layers.0.mlp.gate_proj.weight", "F32", 7, 6},
    {"model.layers.0.mlp.up_proj.weight", "F32", 7, 6},
    {"model.layers.0.mlp.down_proj.weight", "F32", 6, 7},
    ATTENTION("1"),
    {"model.layers.1.mlp.gate.weight", "F32", 2, 6},
    {"model.layers.1.mlp.gate.e_score_correction_bias", "F32", 2, 0},
    {"model.layers.1.mlp.shared_experts.gate_proj.weight", "BF16", 130, 6},
    {"model.layers.1.mlp.shared_experts.up_proj.weight", "BF16", 130, 6},
    {"model.layers.1.mlp.shared_experts.down_proj.weight", "BF16", 6, 130},
    /* Expert 0 in BF16, expert 1 in FP8 with partial blocks. */
    {"model.layers.1.mlp.experts.0.gate_proj.weight", "BF16", 130, 6},
    {"model.layers.1.mlp.experts.0.up_proj.weight", "BF16", 130, 6},
    {"model.layers.1.mlp.experts.0.down_proj.weight", "BF16", 6, 130},
    {"model.layers.1.mlp.experts.1.gate_proj.weight_scale_inv", "F32", 2, 1},
    {"model.layers.1.mlp.experts.1.up_proj.weight_scale_inv", "F32", 2, 1},
    {"model.layers.1.mlp.experts.1.down_proj.weight_scale_inv", "F32", 1, 2},
    {"model.layers.1.mlp.experts.1.gate_proj.weight", "F8_E4M3", 130, 6},
    {"model.layers.1.mlp.experts.1.up_proj.weight", "F8_E4M3", 130, 6},
    {"model.layers.1.mlp.experts.1.down_proj.weight", "F8_E4M3", 6, 130},
};
#define TINY_COUNT (sizeof TINY / sizeof *TINY)

static uint32_t dtype_size(const char *dtype) {
    return strstr(dtype, "32") != NULL ? 4 : strcmp(dtype, "F8_E4M3") == 0 ? 1 : 2;
}

/* A file of the given tensors; names that are NULL are left out. Tensor i holds bytes of value i.
 */
static void *build_file(const struct stored *stored, size_t count, size_t *ret_size) {
    char *header = malloc(count * 256 + 16);
    uint8_t *data = malloc(1 << 20);
    size_t used = 0, end = 0;
    used += (size_t)sprintf(header, "{");
    for (size_t i = 0; i < count; i++) {
        const struct stored *it = &stored[i];
        if (it->name == NULL)
            continue;
        size_t bytes =
            (size_t)it->rows * (it->columns > 0 ? it->columns : 1) * dtype_size(it->dtype);
        char shape[64];
        if (it->columns > 0)
            snprintf(shape, sizeof shape, "[%u,%u]", it->rows, it->columns);
        else
            snprintf(shape, sizeof shape, "[%u]", it->rows);
        used += (size_t)sprintf(
            header + used, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%zu,%zu]}",
            used > 1 ? "," : "", it->name, it->dtype, shape, end, end + bytes);
        memset(data + end, (int)i, bytes);
        end += bytes;
    }
    sprintf(header + used, "}");
    void *file = build_safetensors(header, data, end, ret_size);
    free(header);
    free(data);
    return file;
}

static int open_stored(struct model **ret, void **ret_file, const char *config,
                       const struct stored *stored, size_t count, struct failure *failure) {
    size_t size;
    *ret_file = build_file(stored, count, &size);
    struct model_file files[] = {{"config.json", config, strlen(config)},
                                 {"model.safetensors", *ret_file, size}};
    *ret = NULL;
    int code = model_open(ret, files, 2, failure);
    assert_true(code == 0 ? *ret != NULL : *ret == NULL);
    return code;
}

static void check_view(const struct weight_view *view, const void *data, enum dtype dtype,
                       uint32_t n, uint32_t k) {
    assert_ptr_equal(view->data, data);
    assert_int_equal(view->dtype, dtype);
    assert_int_equal(view->n, n);
    assert_int_equal(view->k, k);
    assert_int_equal(view->stride, k);
    assert_int_equal(view->row0, 0);
    assert_int_equal(view->col0, 0);
    assert_false(view->transposed);
}

static void test_tiny_views(void **state) {
    struct model *model;
    void *file;
    struct failure failure = {0};
    if (open_stored(&model, &file, TINY_CONFIG, TINY, TINY_COUNT, &failure) != 0)
        fail_msg("%s", failure.text);
    assert_int_equal(model_tensor_count(model), TINY_COUNT);
    for (uint32_t i = 1; i < model_tensor_count(model); i++)
        assert_true(strcmp(model_tensor_at(model, i - 1)->name, model_tensor_at(model, i)->name) <
                    0);

    struct weight_view view = model_weight(model, W_KV_B, 1);
    check_view(&view, model_tensor(model, "model.layers.1.self_attn.kv_b_proj.weight")->data,
               DTYPE_F32, 12, 5);
    assert_null(view.scale);
    view = model_weight(model, W_LM_HEAD, 77); /* layer is ignored */
    check_view(&view, model_tensor(model, "lm_head.weight")->data, DTYPE_F32, 10, 6);
    view = model_weight(model, W_SHARED_DOWN, 1);
    check_view(&view,
               model_tensor(model, "model.layers.1.mlp.shared_experts.down_proj.weight")->data,
               DTYPE_BF16, 6, 130);
    view = model_expert_weight(model, 1, 0, EXPERT_UP);
    check_view(&view, model_tensor(model, "model.layers.1.mlp.experts.0.up_proj.weight")->data,
               DTYPE_BF16, 130, 6);
    view = model_expert_weight(model, 1, 1, EXPERT_DOWN);
    check_view(&view, model_tensor(model, "model.layers.1.mlp.experts.1.down_proj.weight")->data,
               DTYPE_E4M3, 6, 130);
    assert_ptr_equal(
        view.scale,
        model_tensor(model, "model.layers.1.mlp.experts.1.down_proj.weight_scale_inv")->data);
    assert_int_equal(view.scale_stride, 2);
    assert_int_equal(view.block, 128);
    assert_int_equal(model_expert_bytes(model, 1), 3 * 130 * 6 * 2);

    /* What a layer does not have. */
    assert_null(model_weight(model, W_GATE, 0).data);
    assert_null(model_weight(model, W_DENSE_UP, 1).data);
    assert_null(model_weight(model, W_Q, 0).data);
    assert_null(model_weight(model, W_MTP_EH_PROJ, 1).data);
    assert_null(model_tensor(model, "model.layers.2.enorm.weight"));
    model_close(&model);
    free(file);
}

static void test_damage(void **state) {
    static const struct {
        const char *victim; /* tensor to change */
        struct stored with; /* name NULL: taken out */
        int code;
        const char *says;
    } CASES[] = {
        {"model.norm.weight", {NULL}, ERR_NOT_FOUND, "tensor model.norm.weight: missing"},
        {"lm_head.weight", {NULL}, ERR_NOT_FOUND, "lm_head.weight: missing"},
        {"model.layers.1.mlp.experts.1.up_proj.weight",
         {NULL},
         ERR_NOT_FOUND,
         "experts.1.up_proj.weight: missing"},
        {"model.layers.1.mlp.gate.e_score_correction_bias",
         {NULL},
         ERR_NOT_FOUND,
         "e_score_correction_bias: missing"},
        {"model.layers.1.mlp.experts.1.up_proj.weight_scale_inv",
         {NULL},
         ERR_NOT_FOUND,
         "weight_scale_inv: missing"},
        {"model.norm.weight",
         {"model.norm.weight", "F32", 7, 0},
         ERR_CORRUPT,
         "tensor model.norm.weight: expected [6] as config.json says, found [7]"},
        {"model.norm.weight",
         {"model.norm.weight", "F32", 1, 6},
         ERR_CORRUPT,
         "expected [6] as config.json says, found [1, 6]"},
        {"lm_head.weight",
         {"lm_head.weight", "F32", 6, 10},
         ERR_CORRUPT,
         "tensor lm_head.weight: expected [10, 6] as config.json says, found [6, 10]"},
        {"lm_head.weight",
         {"lm_head.weight", "F32", 60, 0},
         ERR_CORRUPT,
         "expected [10, 6] as config.json says, found [60]"},
        {"lm_head.weight", {"lm_head.weight", "F16", 10, 6}, ERR_UNSUPPORTED, "found F16 (convert"},
        {"model.layers.0.self_attn.o_proj.weight",
         {"model.layers.0.self_attn.o_proj.weight", "I32", 6, 6},
         ERR_UNSUPPORTED,
         "expected BF16, F32 or F8_E4M3, found I32"},
        {"model.layers.1.mlp.gate.weight",
         {"model.layers.1.mlp.gate.weight", "F16", 2, 6},
         ERR_UNSUPPORTED,
         "expected BF16 or F32, found F16"},
        {"model.layers.1.mlp.experts.1.up_proj.weight_scale_inv",
         {"model.layers.1.mlp.experts.1.up_proj.weight_scale_inv", "F32", 1, 1},
         ERR_CORRUPT,
         "weight_scale_inv: expected [2, 1] as config.json says, found [1, 1]"},
        {"model.layers.1.mlp.experts.1.up_proj.weight_scale_inv",
         {"model.layers.1.mlp.experts.1.up_proj.weight_scale_inv", "BF16", 2, 2},
         ERR_UNSUPPORTED,
         "expected F32, found BF16"},
        {"model.layers.1.mlp.experts.0.up_proj.weight",
         {"model.layers.1.mlp.experts.00.up_proj.weight", "BF16", 130, 6},
         ERR_NOT_FOUND,
         "experts.0.up_proj.weight: missing"},
    };
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        struct stored stored[TINY_COUNT];
        memcpy(stored, TINY, sizeof TINY);
        bool found = false;
        for (size_t t = 0; t < TINY_COUNT; t++)
            if (strcmp(TINY[t].name, CASES[i].victim) == 0) {
                stored[t] = CASES[i].with;
                found = true;
            }
        assert_true(found);
        struct model *model;
        void *file;
        struct failure failure = {0};
        int code = open_stored(&model, &file, TINY_CONFIG, stored, TINY_COUNT, &failure);
        if (code != CASES[i].code || strstr(failure.text, CASES[i].says) == NULL)
            fail_msg("case %zu, %s: expected %d \"%s\", found %d \"%s\"", i, CASES[i].victim,
                     CASES[i].code, CASES[i].says, code, failure.text);
        free(file);
    }
}

static char *replaced(const char *text, const char *from, const char *to) {
    const char *at = strstr(text, from);
    assert_non_null(at);
    char *result = malloc(strlen(text) + strlen(to) + 1);
    sprintf(result, "%.*s%s%s", (int)(at - text), text, to, at + strlen(from));
    return result;
}

static void test_config_and_tensors_disagree(void **state) {
    static const struct {
        const char *from, *to;
        const char *says;
    } CASES[] = {
        {"\"hidden_size\":6", "\"hidden_size\":8",
         "expected [10, 8] as config.json says, found [10, 6]"},
        {"\"num_hidden_layers\":2", "\"num_hidden_layers\":3",
         "model.layers.2.input_layernorm.weight: missing"},
        {"\"n_routed_experts\":2", "\"n_routed_experts\":3", "expected [3, 6]"},
        {"\"q_lora_rank\":4", "\"q_lora_rank\":null", "self_attn.q_proj.weight: missing"},
        {"\"v_head_dim\":3", "\"v_head_dim\":4", "kv_b_proj.weight: expected [14, 5]"},
        {"\"n_shared_experts\":1", "\"n_shared_experts\":2",
         "shared_experts.gate_proj.weight: expected [260, 6]"},
        {"\"quantization_config\"", "\"quantization\"",
         "found F8_E4M3, but config.json has no quantization_config"},
        {"\"first_k_dense_replace\":1", "\"first_k_dense_replace\":0",
         "model.layers.0.mlp.shared_experts.gate_proj.weight: missing"},
    };
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        char *config = replaced(TINY_CONFIG, CASES[i].from, CASES[i].to);
        struct model *model;
        void *file;
        struct failure failure = {0};
        int code = open_stored(&model, &file, config, TINY, TINY_COUNT, &failure);
        if (code >= 0 || strstr(failure.text, CASES[i].says) == NULL)
            fail_msg("%s: expected \"%s\", found %d \"%s\"", CASES[i].to, CASES[i].says, code,
                     failure.text);
        free(file);
        free(config);
    }
}

static void test_mtp_presence(void **state) {
    /* Promised by the config, absent from the file: served without. */
    char *config =
        replaced(TINY_CONFIG, "\"num_nextn_predict_layers\":0", "\"num_nextn_predict_layers\":1");
    struct model *model;
    void *file;
    struct failure failure = {0};
    assert_int_equal(open_stored(&model, &file, config, TINY, TINY_COUNT, &failure), 0);
    assert_int_equal(model_config(model)->mtp_layers, 0);
    model_close(&model);
    free(file);
    /* Half there: refused. */
    struct stored stored[TINY_COUNT + 1];
    memcpy(stored, TINY, sizeof TINY);
    stored[TINY_COUNT] = (struct stored){"model.layers.2.enorm.weight", "BF16", 6, 0};
    assert_int_equal(open_stored(&model, &file, config, stored, TINY_COUNT + 1, &failure),
                     ERR_NOT_FOUND);
    assert_non_null(strstr(failure.text, "model.layers.2."));
    free(file);
    free(config);
}

static void test_tied_embeddings(void **state) {
    char *config =
        replaced(TINY_CONFIG, "\"vocab_size\"", "\"tie_word_embeddings\":true,\"vocab_size\"");
    struct stored stored[TINY_COUNT];
    memcpy(stored, TINY, sizeof TINY);
    stored[1].name = NULL; /* lm_head.weight */
    struct model *model;
    void *file;
    struct failure failure = {0};
    assert_int_equal(open_stored(&model, &file, config, stored, TINY_COUNT, &failure), 0);
    assert_ptr_equal(model_weight(model, W_LM_HEAD, 0).data, model_weight(model, W_EMBED, 0).data);
    model_close(&model);
    free(file);
    free(config);
}

static void test_fingerprint(void **state) {
    struct model *model;
    void *file;
    char first[17], second[17];
    assert_int_equal(open_stored(&model, &file, TINY_CONFIG, TINY, TINY_COUNT, NULL), 0);
    strcpy(first, model_fingerprint(model));
    assert_int_equal(strlen(first), 16);
    model_close(&model);
    free(file);
    /* The same again; then with other weights, then with another config. */
    assert_int_equal(open_stored(&model, &file, TINY_CONFIG, TINY, TINY_COUNT, NULL), 0);
    assert_string_equal(model_fingerprint(model), first);
    model_close(&model);
    free(file);
    struct stored stored[TINY_COUNT];
    memcpy(stored, TINY, sizeof TINY);
    struct stored swap = stored[0];
    stored[0] = stored[1]; /* the same names and shapes, other bytes: build_file() fills by place */
    stored[1] = swap;
    assert_int_equal(open_stored(&model, &file, TINY_CONFIG, stored, TINY_COUNT, NULL), 0);
    strcpy(second, model_fingerprint(model));
    assert_string_not_equal(first, second);
    model_close(&model);
    free(file);
    char *config =
        replaced(TINY_CONFIG, "\"max_position_embeddings\":64", "\"max_position_embeddings\":65");
    assert_int_equal(open_stored(&model, &file, config, TINY, TINY_COUNT, NULL), 0);
    assert_string_not_equal(model_fingerprint(model), first);
    model_close(&model);
    free(file);
    free(config);
}

/* ---- shards ---- */

static int shards(const char *index, struct failure *failure) {
    char **names = NULL;
    uint32_t count = 0;
    int code = model_shards(&names, &count, index, strlen(index), failure);
    for (uint32_t i = 0; i < count; i++)
        free(names[i]);
    free(names);
    return code;
}

static void test_shard_names(void **state) {
    char **names;
    uint32_t count;
    assert_int_equal(model_shards(&names, &count, NULL, 0, NULL), 0);
    assert_int_equal(count, 1);
    assert_string_equal(names[0], "model.safetensors");
    free(names[0]);
    free(names);
    const char *index =
        "{\"metadata\":{},\"weight_map\":{\"a\":\"m-2.safetensors\",\"b\":\"m-1.safetensors\","
        "\"c\":\"m-2.safetensors\"}}";
    assert_int_equal(model_shards(&names, &count, index, strlen(index), NULL), 0);
    assert_int_equal(count, 2);
    assert_string_equal(names[0], "m-1.safetensors");
    assert_string_equal(names[1], "m-2.safetensors");
    free(names[0]);
    free(names[1]);
    free(names);

    static const struct {
        const char *index;
        int code;
        const char *says;
    } CASES[] = {
        {"{\"weight_map\":{\"a\":\"../x.safetensors\"}}", ERR_INVALID,
         "climbs out of the model directory"},
        {"{\"weight_map\":{\"a\":\"/etc/x.safetensors\"}}", ERR_INVALID, "climbs out"},
        {"{\"weight_map\":{\"a\":\"sub/x.safetensors\"}}", ERR_INVALID, "climbs out"},
        {"{\"weight_map\":{\"a\":\"..\\\\x.safetensors\"}}", ERR_INVALID, "climbs out"},
        {"{\"weight_map\":{\"a\":\"x..safetensors\"}}", ERR_INVALID, "climbs out"},
        {"{\"weight_map\":{\"a\":\".hidden.safetensors\"}}", ERR_INVALID, "climbs out"},
        {"{\"weight_map\":{\"a\":\"..\"}}", ERR_INVALID, "climbs out"},
        {"{\"weight_map\":{\"a\":\"\"}}", ERR_CORRUPT, "ends in"},
        {"{\"weight_map\":{\"a\":\"passwd\"}}", ERR_CORRUPT, "ends in"},
        {"{\"weight_map\":{\"a\":\"x.safetensors\\u0000\"}}", ERR_CORRUPT, "invalid JSON"},
        {"{\"weight_map\":{\"a\":3}}", ERR_CORRUPT, "expected a file name, found 3"},
        {"{\"weight_map\":{\"a\":\"x.safetensors\",\"a\":\"y.safetensors\"}}", ERR_CORRUPT,
         "duplicate"},
        {"{\"weight_map\":{}}", ERR_CORRUPT, "at least one"},
        {"{\"weight_map\":[]}", ERR_CORRUPT, "weight_map"},
        {"{}", ERR_CORRUPT, "weight_map"},
        {"[]", ERR_CORRUPT, "JSON object"},
        {"{\"weight_map\":", ERR_CORRUPT, "invalid JSON"},
    };
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        struct failure failure = {0};
        int code = shards(CASES[i].index, &failure);
        if (code != CASES[i].code || strstr(failure.text, CASES[i].says) == NULL)
            fail_msg("%s: found %d \"%s\"", CASES[i].index, code, failure.text);
        assert_int_equal(shards(CASES[i].index, NULL), code);
    }
    char *many = malloc((SHARDS_MAX + 1) * 64 + 64);
    size_t used = (size_t)sprintf(many, "{\"weight_map\":{");
    for (int i = 0; i <= SHARDS_MAX; i++)
        used +=
            (size_t)sprintf(many + used, "%s\"t%d\":\"%d.safetensors\"", i > 0 ? "," : "", i, i);
    sprintf(many + used, "}}");
    assert_int_equal(shards(many, NULL), ERR_TOO_LARGE);
    free(many);
}

static void test_sharded_model(void **state) {
    /* The first half of the tensors in one shard, the rest in another. */
    const size_t half = TINY_COUNT / 2;
    size_t size[2];
    void *file[2] = {build_file(TINY, half, &size[0]),
                     build_file(TINY + half, TINY_COUNT - half, &size[1])};
    char *index = malloc(TINY_COUNT * 256);
    size_t used = (size_t)sprintf(index, "{\"weight_map\":{");
    for (size_t i = 0; i < TINY_COUNT; i++)
        used += (size_t)sprintf(index + used, "%s\"%s\":\"part-%d.safetensors\"", i > 0 ? "," : "",
                                TINY[i].name, i < half ? 1 : 2);
    sprintf(index + used, "}}");
    struct model_file files[] = {{"config.json", TINY_CONFIG, strlen(TINY_CONFIG)},
                                 {"model.safetensors.index.json", index, strlen(index)},
                                 {"part-1.safetensors", file[0], size[0]},
                                 {"part-2.safetensors", file[1], size[1]}};
    struct model *model = NULL;
    struct failure failure = {0};
    if (model_open(&model, files, 4, &failure) != 0)
        fail_msg("%s", failure.text);
    assert_int_equal(model_tensor_count(model), TINY_COUNT);
    const uint8_t *norm = model_weight(model, W_FINAL_NORM, 0).data;
    assert_true(norm > (uint8_t *)file[0] && norm < (uint8_t *)file[0] + size[0]);
    model_close(&model);

    /* A shard that is not there; one that lacks what the index says. */
    assert_int_equal(model_open(&model, files, 3, &failure), ERR_NOT_FOUND);
    assert_non_null(strstr(failure.text, "part-2.safetensors: missing"));
    files[3].bytes = file[0];
    files[3].size = size[0];
    assert_int_equal(model_open(&model, files, 4, &failure), ERR_CORRUPT);
    assert_non_null(strstr(failure.text, "which does not hold it"));
    assert_int_equal(model_open(&model, files + 1, 3, &failure), ERR_NOT_FOUND);
    assert_non_null(strstr(failure.text, "config.json: missing"));
    assert_int_equal(model_open(&model, files, 1, &failure), ERR_NOT_FOUND);
    assert_non_null(strstr(failure.text, "model.safetensors: missing"));
    free(index);
    free(file[0]);
    free(file[1]);
}

/* ---- real directories ---- */

static void test_demo(void **state) {
    struct model_files files;
    assert_true(model_files_read(&files, "models/demo"));
    struct model *model = NULL;
    struct failure failure = {0};
    if (model_open(&model, files.file, files.count, &failure) != 0)
        fail_msg("%s", failure.text);
    const struct model_config *config = model_config(model);
    assert_int_equal(config->layers, 6);
    assert_int_equal(config->mtp_layers, 1);
    assert_true(config->default_temperature == 0.6f);
    assert_int_equal(model_tensor_count(model), 1312);
    struct weight_view view = model_weight(model, W_MTP_EH_PROJ, 6);
    assert_int_equal(view.n, 256);
    assert_int_equal(view.k, 512);
    assert_int_equal(view.dtype, DTYPE_E4M3);
    assert_int_equal(view.scale_stride, 4);
    view = model_weight(model, W_EMBED, 0);
    assert_int_equal(view.dtype, DTYPE_BF16);
    view = model_weight(model, W_GATE_BIAS, 3);
    assert_int_equal(view.n, 32);
    float bias[32], norm[256];
    weight_to_float(&view, bias);
    assert_memory_equal(bias, view.data, sizeof bias);
    view = model_weight(model, W_FINAL_NORM, 0);
    assert_int_equal(view.dtype, DTYPE_BF16);
    weight_to_float(&view, norm);
    for (int i = 0; i < 256; i++)
        assert_true(norm[i] > -100 && norm[i] < 100);
    assert_int_equal(model_expert_bytes(model, 2), 3 * 256 * 128 + 4 * (2 + 2 + 2));
    for (uint32_t layer = 1; layer <= 6; layer++)
        for (uint32_t expert = 0; expert < config->experts; expert++)
            assert_non_null(model_expert_weight(model, layer, expert, EXPERT_DOWN).data);
    model_close(&model);
    model_files_free(&files);
}

static void test_golden_directories(void **state) {
    static const char *const NAMES[] = {"v2", "v2-lite", "v3-fp8", "v3-onegroup", "v3-yarn"};
    for (size_t i = 0; i < sizeof NAMES / sizeof *NAMES; i++) {
        char path[128];
        snprintf(path, sizeof path, "../shared/golden/%s", NAMES[i]);
        struct model_files files;
        if (!model_files_read(&files, path)) {
            model_files_free(&files);
            continue; /* not on this machine */
        }
        struct model *model = NULL;
        struct failure failure = {0};
        if (model_open(&model, files.file, files.count, &failure) != 0)
            fail_msg("%s: %s", path, failure.text);
        bool v2 = model_config(model)->family == FAMILY_DEEPSEEK_V2;
        assert_int_equal(model_weight(model, W_GATE_BIAS, 1).data == NULL, v2);
        model_close(&model);
        model_files_free(&files);
        snprintf(path, sizeof path, "../shared/golden/%s/golden.safetensors", NAMES[i]);
        size_t size;
        void *bytes = read_whole_file(path, &size);
        struct safetensors *golden = NULL;
        assert_int_equal(safetensors_open(&golden, bytes, size, path, &failure), 0);
        assert_int_equal(safetensors_find(golden, "input_ids")->dtype, DTYPE_I32);
        safetensors_close(&golden);
        free(bytes);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tiny_views),
        cmocka_unit_test(test_damage),
        cmocka_unit_test(test_config_and_tensors_disagree),
        cmocka_unit_test(test_mtp_presence),
        cmocka_unit_test(test_tied_embeddings),
        cmocka_unit_test(test_fingerprint),
        cmocka_unit_test(test_shard_names),
        cmocka_unit_test(test_sharded_model),
        cmocka_unit_test(test_demo),
        cmocka_unit_test(test_golden_directories),
    };
    return cmocka_run_group_tests_name("weights", tests, NULL, NULL);
}
