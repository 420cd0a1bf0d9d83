/* Random-weight models: every shape that is shipped opens, weights depend on seed and name only,
 * FP8 is BF16 rounded, and the text for people says what is there. */
#include "kernels/numerics.h"
#include "model/synth.h"
#include "model/tokenizer.h"
#include "tests/support/model_files.h"

#include <jansson.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

/* ---- files in memory ---- */

struct made {
    struct model_file file[64];
    uint32_t count;
    uint32_t writes, fail_after; /* 0: never */
    size_t largest_write;
};

static int collect(void *context, const char *name, const void *bytes, size_t size) {
    struct made *made = context;
    if (++made->writes == made->fail_after)
        return ERR_IO;
    made->largest_write = size > made->largest_write ? size : made->largest_write;
    struct model_file *file = made->count > 0 ? &made->file[made->count - 1] : NULL;
    if (file == NULL || strcmp(file->name, name) != 0) {
        for (uint32_t i = 0; i < made->count; i++)
            assert_string_not_equal(made->file[i].name, name); /* files do not interleave */
        assert_true(made->count < 64);
        file = &made->file[made->count++];
        *file = (struct model_file){.name = strdup(name)};
    }
    file->bytes = realloc((void *)file->bytes, file->size + size);
    memcpy((uint8_t *)file->bytes + file->size, bytes, size);
    file->size += size;
    return 0;
}

static void made_free(struct made *made) {
    for (uint32_t i = 0; i < made->count; i++) {
        free((char *)made->file[i].name);
        free((void *)made->file[i].bytes);
    }
    memset(made, 0, sizeof *made);
}

static const struct model_file *made_find(const struct made *made, const char *name) {
    for (uint32_t i = 0; i < made->count; i++)
        if (strcmp(made->file[i].name, name) == 0)
            return &made->file[i];
    return NULL;
}

static struct model *make(struct made *made, const char *shape, uint64_t seed,
                          uint64_t shard_bytes) {
    memset(made, 0, sizeof *made);
    struct failure failure = {0};
    int code = shard_bytes == 0 ? synth_model(shape, strlen(shape), seed, collect, made, &failure)
                                : synth_model_sharded(shape, strlen(shape), seed, shard_bytes,
                                                      collect, made, &failure);
    if (code != 0)
        fail_msg("synth: %s", failure.text);
    struct model *model = NULL;
    if (model_open(&model, made->file, made->count, &failure) != 0)
        fail_msg("open: %s", failure.text);
    return model;
}

static char *shape_of(const char *name) {
    char path[128];
    snprintf(path, sizeof path, "config/shapes/%s.json", name);
    size_t size;
    char *bytes = read_whole_file(path, &size);
    assert_non_null(bytes);
    char *text = malloc(size + 1);
    memcpy(text, bytes, size);
    text[size] = '\0';
    free(bytes);
    return text;
}

/* ---- tests ---- */

static void test_tiny_shapes(void **state) {
    static const char *const NAMES[] = {"tiny-v3", "tiny-v2-lite"};
    for (size_t i = 0; i < 2; i++) {
        char *shape = shape_of(NAMES[i]);
        struct made made;
        struct model *model = make(&made, shape, 1, 0);
        const struct model_config *config = model_config(model);
        bool v3 = i == 0;
        assert_int_equal(config->family, v3 ? FAMILY_DEEPSEEK_V3 : FAMILY_DEEPSEEK_V2);
        assert_int_equal(config->fp8, v3);
        assert_int_equal(config->mtp_layers, v3 ? 1 : 0);
        assert_int_equal(model_expert_weight(model, 1, 3, EXPERT_UP).dtype,
                         v3 ? DTYPE_E4M3 : DTYPE_BF16);
        assert_int_equal(model_weight(model, W_LM_HEAD, 0).dtype, DTYPE_BF16);
        assert_int_equal(config->bos, 0);
        assert_int_equal(config->eos[0], 1);
        /* A strip of rows at a time, whatever the size of the model. */
        assert_true(made.largest_write <= 65536);
        assert_string_equal(made.file[made.count - 1].name, "config.json");
        model_close(&model);
        made_free(&made);
        free(shape);
    }
}

/* The large shapes are checked as far as their sizes: the first write of weights is refused. */
static void test_large_shapes(void **state) {
    static const char *const NAMES[] = {"bench-1b", "bench-1b-fp8", "moonlight-16b",
                                        "deepseek-v3-1layer"};
    for (size_t i = 0; i < sizeof NAMES / sizeof *NAMES; i++) {
        char *shape = shape_of(NAMES[i]);
        struct made made = {.fail_after = 1};
        struct failure failure = {0};
        assert_int_equal(synth_model(shape, strlen(shape), 1, collect, &made, &failure), ERR_IO);
        assert_non_null(strstr(failure.text, ".safetensors: could not be written"));
        free(shape);
    }
}

static uint64_t hash_of(const struct made *made) {
    uint64_t hash = 0xcbf29ce484222325u;
    for (uint32_t i = 0; i < made->count; i++)
        for (size_t b = 0; b < made->file[i].size; b++)
            hash = (hash ^ ((const uint8_t *)made->file[i].bytes)[b]) * 0x100000001b3u;
    return hash;
}

static void test_seeds(void **state) {
    char *shape = shape_of("tiny-v3");
    struct made first, again, other;
    struct model *model = make(&first, shape, 7, 0);
    char fingerprint[17];
    strcpy(fingerprint, model_fingerprint(model));
    model_close(&model);
    model = make(&again, shape, 7, 0);
    assert_int_equal(hash_of(&first), hash_of(&again));
    assert_string_equal(model_fingerprint(model), fingerprint);
    model_close(&model);
    model = make(&other, shape, 8, 0);
    assert_int_not_equal(hash_of(&first), hash_of(&other));
    assert_string_not_equal(model_fingerprint(model), fingerprint);
    model_close(&model);
    made_free(&first);
    made_free(&again);
    made_free(&other);
    free(shape);
}

static void test_shards_hold_the_same(void **state) {
    char *shape = shape_of("tiny-v3");
    struct made one, many;
    struct model *whole = make(&one, shape, 3, 0);
    struct model *parts = make(&many, shape, 3, 200000);
    assert_non_null(made_find(&one, "model.safetensors"));
    assert_null(made_find(&one, "model.safetensors.index.json"));
    assert_null(made_find(&many, "model.safetensors"));
    assert_non_null(made_find(&many, "model.safetensors.index.json"));
    uint32_t shards = 0;
    for (uint32_t i = 0; i < many.count; i++)
        if (strncmp(many.file[i].name, "model-", 6) == 0) {
            shards++;
            assert_true(many.file[i].size < 200000 + 40000); /* and its header */
        }
    assert_true(shards > 4);
    assert_int_equal(model_tensor_count(whole), model_tensor_count(parts));
    for (uint32_t i = 0; i < model_tensor_count(whole); i++) {
        const struct tensor *a = model_tensor_at(whole, i), *b = model_tensor_at(parts, i);
        assert_string_equal(a->name, b->name);
        assert_int_equal(a->bytes, b->bytes);
        assert_memory_equal(a->data, b->data, a->bytes);
    }
    assert_string_equal(model_fingerprint(whole), model_fingerprint(parts));
    model_close(&whole);
    model_close(&parts);
    made_free(&one);
    made_free(&many);
    free(shape);
}

static float stored_value(const struct weight_view *view, uint32_t n, uint32_t k) {
    size_t at = (size_t)n * view->stride + k;
    switch (view->dtype) {
    case DTYPE_F32:
        return ((const float *)view->data)[at];
    case DTYPE_BF16:
        return bf16_to_float(((const bf16 *)view->data)[at]);
    default:
        return e4m3_to_float(((const uint8_t *)view->data)[at]) *
               view->scale[n / view->block * view->scale_stride + k / view->block];
    }
}

/* Odd widths: partial strips and blocks, and FP8 matrices with an odd number of bytes. */
#define ODD                                                                                        \
    "\"vocab_size\":301,\"hidden_size\":131,\"intermediate_size\":259,\"moe_intermediate_size\":"  \
    "65,"                                                                                          \
    "\"num_hidden_layers\":2,\"num_attention_heads\":3,\"n_routed_experts\":5,\"num_experts_per_"  \
    "tok\":2,"                                                                                     \
    "\"kv_lora_rank\":33,\"q_lora_rank\":129,\"qk_nope_head_dim\":5,\"qk_rope_head_dim\":6,\"v_"   \
    "head_dim\":7"

static void test_dtypes_agree(void **state) {
    struct made made[3];
    struct model *f32 = make(&made[0], "{\"dtype\":\"f32\"," ODD "}", 5, 0);
    struct model *half = make(&made[1], "{" ODD "}", 5, 0);
    struct model *fp8 = make(&made[2], "{\"dtype\":\"fp8\"," ODD "}", 5, 0);
    static const enum weight WHICH[] = {W_KV_B,  W_DENSE_DOWN, W_Q_A,
                                        W_EMBED, W_INPUT_NORM, W_LM_HEAD};
    for (size_t w = 0; w < sizeof WHICH / sizeof *WHICH; w++) {
        struct weight_view exact = model_weight(f32, WHICH[w], 0);
        struct weight_view rounded = model_weight(half, WHICH[w], 0);
        struct weight_view scaled = model_weight(fp8, WHICH[w], 0);
        assert_int_equal(exact.dtype, DTYPE_F32);
        assert_int_equal(rounded.dtype, DTYPE_BF16);
        double sum = 0, squares = 0;
        for (uint32_t n = 0; n < exact.n; n++)
            for (uint32_t k = 0; k < exact.k; k++) {
                float value = stored_value(&exact, n, k);
                sum += value;
                squares += (double)value * value;
                assert_true(fabsf(stored_value(&rounded, n, k) - value) <= fabsf(value) / 256);
                /* E4M3: half a step of 2^-3 of the value, or of the smallest step, 2^-9 of the
                 * scale. */
                float step = scaled.dtype == DTYPE_E4M3
                                 ? scaled.scale[n / 128 * scaled.scale_stride + k / 128] / 1024
                                 : 0;
                float allowed = fabsf(value) / 16 > step ? fabsf(value) / 16 : step;
                assert_true(fabsf(stored_value(&scaled, n, k) - value) <= allowed * 1.001f);
            }
        double count = (double)exact.n * exact.k, mean = sum / count;
        if (WHICH[w] != W_INPUT_NORM) { /* mean 0, deviation 1 / sqrt(inputs) */
            assert_true(fabs(mean) * sqrt(exact.k) < 4 / sqrt(count));
            assert_true(fabs(squares / count * exact.k - 1) < 0.1);
        } else {
            assert_true(fabs(mean - 1) < 0.05);
        }
    }
    /* The largest magnitude of a block becomes 448. */
    struct weight_view view = model_weight(fp8, W_KV_B, 1);
    uint8_t largest = 0;
    for (uint32_t i = 0; i < view.n * view.k; i++) {
        uint8_t magnitude = ((const uint8_t *)view.data)[i] & 0x7f;
        assert_int_not_equal(magnitude, 0x7f); /* never NaN */
        largest = magnitude > largest ? magnitude : largest;
    }
    assert_int_equal(largest, 0x7e);
    model_close(&f32);
    model_close(&half);
    model_close(&fp8);
    for (int i = 0; i < 3; i++)
        made_free(&made[i]);
}

static void test_initializer_range(void **state) {
    struct made made;
    struct model *model =
        make(&made, "{\"dtype\":\"f32\",\"initializer_range\":0.5," ODD "}", 5, 0);
    struct weight_view view = model_weight(model, W_DENSE_DOWN, 0);
    double squares = 0;
    for (uint32_t i = 0; i < view.n * view.k; i++)
        squares += (double)((const float *)view.data)[i] * ((const float *)view.data)[i];
    assert_true(fabs(sqrt(squares / (view.n * view.k)) - 0.5) < 0.02);
    model_close(&model);
    made_free(&made);
}

static void test_tokenizer(void **state) {
    static const uint32_t VOCABULARIES[] = {261, 301, 4096};
    for (size_t v = 0; v < sizeof VOCABULARIES / sizeof *VOCABULARIES; v++) {
        char shape[128];
        snprintf(shape, sizeof shape, "{\"vocab_size\":%u}", VOCABULARIES[v]);
        struct made made;
        struct model *model = make(&made, shape, 1, 0);
        const struct model_file *json = made_find(&made, "tokenizer.json");
        const struct model_file *config = made_find(&made, "tokenizer_config.json");
        struct tokenizer *tokenizer = NULL;
        struct failure failure = {0};
        if (tokenizer_open(&tokenizer, json->bytes, json->size, config->bytes, config->size,
                           &failure) != 0)
            fail_msg("%s", failure.text);
        assert_int_equal(tokenizer_vocabulary(tokenizer), VOCABULARIES[v]);
        assert_int_equal(tokenizer_bos(tokenizer), 0);
        assert_int_equal(tokenizer_eos(tokenizer), 1);
        for (uint32_t id = 0; id < VOCABULARIES[v]; id++) {
            size_t bytes = 0;
            assert_non_null(tokenizer_bytes(tokenizer, id, &bytes));
            assert_true(bytes > 0);
        }
        const char *text =
            "The quick brown fox, 12345 \xc3\xa9\xe4\xbd\xa0\xf0\x9f\x98\x80 \"\\\t\n";
        struct token_list tokens = {0};
        assert_int_equal(
            tokenizer_encode(tokenizer, text, strlen(text), true, false, &tokens, &failure), 0);
        assert_int_equal(tokens.token[0], 0);
        char back[256];
        size_t used = 0;
        for (uint32_t i = 1; i < tokens.count; i++) {
            size_t bytes;
            const char *piece = tokenizer_bytes(tokenizer, tokens.token[i], &bytes);
            memcpy(back + used, piece, bytes);
            used += bytes;
        }
        assert_int_equal(used, strlen(text));
        assert_memory_equal(back, text, used);
        token_list_free(&tokens);
        tokenizer_close(&tokenizer);
        model_close(&model);
        made_free(&made);
    }
}

/* The splitting rules and the chat format are the demo model's. */
static void test_tokenizer_like_demo(void **state) {
    struct made made;
    struct model *model = make(&made, "{}", 1, 0);
    static const char *const KEYS[] = {"pre_tokenizer", "decoder", "post_processor", "normalizer"};
    size_t size;
    void *bytes = read_whole_file("models/demo/tokenizer.json", &size);
    const struct model_file *file = made_find(&made, "tokenizer.json");
    json_t *demo = json_loadb(bytes, size, 0, NULL),
           *synth = json_loadb(file->bytes, file->size, 0, NULL);
    assert_non_null(demo);
    assert_non_null(synth);
    for (size_t i = 0; i < sizeof KEYS / sizeof *KEYS; i++)
        assert_true(json_equal(json_object_get(demo, KEYS[i]), json_object_get(synth, KEYS[i])));
    json_decref(demo);
    json_decref(synth);
    free(bytes);
    bytes = read_whole_file("models/demo/tokenizer_config.json", &size);
    file = made_find(&made, "tokenizer_config.json");
    demo = json_loadb(bytes, size, 0, NULL), synth = json_loadb(file->bytes, file->size, 0, NULL);
    assert_string_equal(json_string_value(json_object_get(demo, "chat_template")),
                        json_string_value(json_object_get(synth, "chat_template")));
    json_decref(demo);
    json_decref(synth);
    free(bytes);
    model_close(&model);
    made_free(&made);
}

static void test_refusals(void **state) {
    static const struct {
        const char *shape;
        int code;
        const char *says;
    } CASES[] = {
        {"", ERR_CORRUPT, "shape: invalid JSON"},
        {"[]", ERR_CORRUPT, "shape: expected a JSON object"},
        {"{\"dtype\":\"int4\"}", ERR_INVALID, "dtype: expected bf16, fp8 or f32, found \"int4\""},
        {"{\"dtype\":8}", ERR_INVALID, "dtype"},
        {"{\"vocab_size\":260}", ERR_INVALID, "vocab_size: expected at least 261"},
        {"{\"model_type\":\"llama\"}", ERR_UNSUPPORTED, "model_type"},
        {"{\"model_type\":3}", ERR_INVALID, "model_type"},
        {"{\"hidden_size\":-1}", ERR_INVALID, "hidden_size"},
        {"{\"n_group\":7}", ERR_INVALID, "n_group"},
        {"{\"initializer_range\":-1}", ERR_INVALID, "initializer_range"},
        {"{\"num_hidden_layers\":256,\"n_routed_experts\":1024,\"hidden_size\":65536,"
         "\"moe_intermediate_size\":65536}",
         ERR_TOO_LARGE, "shards"},
    };
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        struct made made = {0};
        struct failure failure = {0};
        int code = synth_model(CASES[i].shape, strlen(CASES[i].shape), 1, collect, &made, &failure);
        if (code != CASES[i].code || strstr(failure.text, CASES[i].says) == NULL)
            fail_msg("%s: found %d \"%s\"", CASES[i].shape, code, failure.text);
        assert_int_equal(made.writes, 0);
    }
    /* A failing write ends the work wherever it comes. */
    for (uint32_t n = 1; n < 40; n++) {
        struct made made = {.fail_after = n};
        const char *shape = "{\"vocab_size\":4096}";
        assert_int_equal(synth_model(shape, strlen(shape), 1, collect, &made, NULL), ERR_IO);
        assert_int_equal(made.writes, n);
        made_free(&made);
    }
}

static void test_real_config_as_shape(void **state) {
    /* A Hugging Face config.json is a shape: its quantization_config asks for FP8. */
    struct made made;
    struct model *model =
        make(&made,
             "{\"torch_dtype\":\"bfloat16\",\"dtype\":\"bfloat16\",\"num_key_value_heads\":8,"
             "\"quantization_config\":{\"quant_method\":\"fp8\"},\"bos_token_id\":100000}",
             1, 0);
    assert_true(model_config(model)->fp8);
    assert_int_equal(model_config(model)->bos, 0);
    model_close(&model);
    made_free(&made);
}

static void test_describe(void **state) {
    char *shape = shape_of("tiny-v3");
    struct made made;
    struct model *model = make(&made, shape, 1, 0);
    char *text = model_describe(model);
    assert_non_null(text);
    static const char *const SAYS[] = {
        "deepseek_v3, 3 layers (1 dense, 2 MoE), 1 MTP layer\n",
        "hidden 128, vocabulary 512, context 2048\n",
        "4 heads, q_lora 48, kv_lora 64, nope 32, rope 16, v 24; theta 10000, YaRN x 40 of 64 "
        "positions\n",
        "16 a layer of width 64, 4 a token, 1 shared\n",
        "sigmoid, 2 of 4 groups by the sum of their two best, normalised, scaled by 2.5\n",
        "F8_E4M3",
        "experts ",
        "(24.6 kB each)",
        "sampler",
        "MTP layers",
    };
    for (size_t i = 0; i < sizeof SAYS / sizeof *SAYS; i++)
        if (strstr(text, SAYS[i]) == NULL)
            fail_msg("expected \"%s\" in:\n%s", SAYS[i], text);
    assert_non_null(strstr(text, model_fingerprint(model)));
    free(text);
    model_close(&model);
    made_free(&made);
    free(shape);

    struct model_files files;
    assert_true(model_files_read(&files, "models/demo"));
    assert_int_equal(model_open(&model, files.file, files.count, NULL), 0);
    text = model_describe(model);
    assert_non_null(strstr(text, "in 1312 tensors of 1 file"));
    assert_null(strstr(text, "unused"));
    printf("%s", text);
    free(text);
    model_close(&model);
    model_files_free(&files);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tiny_shapes),  cmocka_unit_test(test_large_shapes),
        cmocka_unit_test(test_seeds),        cmocka_unit_test(test_shards_hold_the_same),
        cmocka_unit_test(test_dtypes_agree), cmocka_unit_test(test_initializer_range),
        cmocka_unit_test(test_tokenizer),    cmocka_unit_test(test_tokenizer_like_demo),
        cmocka_unit_test(test_refusals),     cmocka_unit_test(test_real_config_as_shape),
        cmocka_unit_test(test_describe),
    };
    return cmocka_run_group_tests_name("synth", tests, NULL, NULL);
}
