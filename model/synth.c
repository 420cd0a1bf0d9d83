/* Writes a model directory with random weights. The list of tensors comes from the table that
 * model_open() checks against (model/weights.c), so what is written is what can be opened.
 *
 * A weight is a sum of four 16-bit uniforms (near enough to normal, never beyond 3.5 deviations)
 * drawn from SplitMix64 at the counter key(seed, tensor) + element: any element can be drawn on its
 * own, in any order. Files are written a strip of 128 rows at a time; for FP8 the strip is drawn
 * twice, once for its scales and once for its values. */
#include "model/synth.h"

#include <jansson.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "actors/limits.h"
#include "kernels/numerics.h"
#include "model/fields.h"
#include "model/synth_parts.h"

#define SHARD_BYTES  4000000000u
#define STRIP_ROWS   128 /* also the height of an FP8 block */
#define BLOCK        128
#define E4M3_LARGEST 448.0f
#define SHAPE_FILE   "shape"
#define CONFIG_FILE  "config.json"
#define INDEX_FILE   "model.safetensors.index.json"

/* ---- output ---- */

void synth_flush(struct synth_output *self) {
    if (self->code == 0 && self->used > 0) {
        int code = self->write(self->context, self->file, self->buffer, self->used);
        if (code < 0)
            self->code = fail(self->failure, code, "%s: could not be written", self->file);
    }
    self->used = 0;
}

void synth_put(struct synth_output *self, const void *bytes, size_t size) {
    while (size > 0) {
        size_t room = SYNTH_BUFFER_BYTES - self->used;
        size_t part = size < room ? size : room;
        memcpy(self->buffer + self->used, bytes, part);
        self->used += part;
        bytes = (const uint8_t *)bytes + part;
        size -= part;
        if (self->used == SYNTH_BUFFER_BYTES)
            synth_flush(self);
    }
}

void synth_print(struct synth_output *self, const char *format, ...) {
    char text[2048];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    ASSERT(length >= 0 && (size_t)length < sizeof text);
    synth_put(self, text, (size_t)length);
}

void synth_begin(struct synth_output *self, const char *file) {
    synth_flush(self);
    snprintf(self->file, sizeof self->file, "%s", file);
}

/* ---- config ---- */

/* A small V3 with everything that a shape may leave out. */
static const char DEFAULTS[] =
    "{\"model_type\":\"deepseek_v3\",\"vocab_size\":4096,\"hidden_size\":256,\"intermediate_size\":"
    "768,"
    "\"moe_intermediate_size\":128,\"num_hidden_layers\":2,\"num_nextn_predict_layers\":0,"
    "\"num_attention_heads\":8,\"n_shared_experts\":1,\"n_routed_experts\":32,\"num_experts_per_"
    "tok\":4,"
    "\"n_group\":1,\"topk_group\":1,\"first_k_dense_replace\":1,\"moe_layer_freq\":1,\"kv_lora_"
    "rank\":128,"
    "\"qk_nope_head_dim\":32,\"qk_rope_head_dim\":32,\"v_head_dim\":32,\"rope_theta\":10000.0,"
    "\"rms_norm_eps\":1e-06,\"hidden_act\":\"silu\",\"max_position_embeddings\":4096,\"rope_"
    "scaling\":null,"
    "\"q_lora_rank\":null,\"attention_bias\":false,\"tie_word_embeddings\":false,\"use_cache\":"
    "true}";
static const char DEFAULTS_V2[] = "{\"architectures\":[\"DeepseekV2ForCausalLM\"],\"scoring_func\":"
                                  "\"softmax\",\"topk_method\":\"greedy\","
                                  "\"norm_topk_prob\":false,\"routed_scaling_factor\":1.0}";
static const char DEFAULTS_V3[] = "{\"architectures\":[\"DeepseekV3ForCausalLM\"],\"scoring_func\":"
                                  "\"sigmoid\",\"topk_method\":\"noaux_tc\","
                                  "\"norm_topk_prob\":true,\"routed_scaling_factor\":2.5}";
static const char QUANTIZATION[] = "{\"activation_scheme\":\"dynamic\",\"fmt\":\"e4m3\","
                                   "\"quant_method\":\"fp8\",\"weight_block_size\":[128,128]}";

static void add_missing(json_t *root, const char *defaults) {
    json_t *object = json_loads(defaults, 0, NULL);
    json_object_update_missing(root, object);
    json_decref(object);
}

/* "dtype" of the shape; without it a quantization_config asks for FP8, as in a real config.json. */
static int choose_dtype(json_t *root, enum dtype *ret, struct failure *failure) {
    static const struct {
        const char *name;
        enum dtype dtype;
    } DTYPES[] = {{"bf16", DTYPE_BF16},          {"bfloat16", DTYPE_BF16}, {"fp8", DTYPE_E4M3},
                  {"float8_e4m3fn", DTYPE_E4M3}, {"f32", DTYPE_F32},       {"float32", DTYPE_F32}};
    struct fields fields = {.object = root, .file = SHAPE_FILE, .failure = failure};
    bool quantized = fields_get(&fields, "quantization_config") != NULL;
    const char *name = fields_string_or(&fields, "dtype", quantized ? "fp8" : "bf16");
    for (size_t i = 0; i < sizeof DTYPES / sizeof *DTYPES && fields.code == 0; i++) {
        if (strcmp(name, DTYPES[i].name) != 0)
            continue;
        /* Hugging Face's "dtype" of a quantised model is that of its other tensors. */
        *ret = quantized && DTYPES[i].dtype == DTYPE_BF16 ? DTYPE_E4M3 : DTYPES[i].dtype;
        return 0;
    }
    fields_fail(&fields, ERR_INVALID, "dtype: expected bf16, fp8 or f32, found \"%.64s\"", name);
    return fields.code;
}

/* The shape with defaults and what follows from them, as text; *ret_config is what model_open()
 * will make of it. */
static int make_config(const char *shape_json, size_t bytes, enum dtype *ret_dtype,
                       double *ret_deviation, double *ret_embedding, char **ret_text,
                       struct model_config *ret_config, struct failure *failure) {
    json_t *root = fields_parse(shape_json, bytes, SHAPE_FILE, failure);
    if (root == NULL)
        return failure->code;
    int code = choose_dtype(root, ret_dtype, failure);
    struct fields fields = {.object = root, .file = SHAPE_FILE, .failure = failure, .code = code};
    *ret_deviation = fields_number_or(&fields, "initializer_range", 1e-6, 10, 0);
    *ret_embedding = fields_number_or(&fields, "embedding_range", 1e-6, 10, 0);
    code = fields.code;
    if (code == 0) {
        add_missing(root, DEFAULTS);
        const char *type = json_string_value(json_object_get(root, "model_type"));
        add_missing(root,
                    type != NULL && strcmp(type, "deepseek_v2") == 0 ? DEFAULTS_V2 : DEFAULTS_V3);
        json_object_set(root, "num_key_value_heads", json_object_get(root, "num_attention_heads"));
        json_object_set_new(root, SYNTH_MARK, json_true());
        json_object_set_new(root, "bos_token_id", json_integer(SYNTH_BOS));
        json_object_set_new(root, "eos_token_id", json_integer(SYNTH_EOS));
        json_object_set_new(root, "pad_token_id", json_integer(SYNTH_PAD));
        json_object_del(root, "dtype");
        json_object_set_new(root, "torch_dtype",
                            json_string(*ret_dtype == DTYPE_F32 ? "float32" : "bfloat16"));
        json_object_del(root, "quantization_config");
        if (*ret_dtype == DTYPE_E4M3)
            json_object_set_new(root, "quantization_config", json_loads(QUANTIZATION, 0, NULL));
        *ret_text = json_dumps(root, JSON_INDENT(2));
        code = *ret_text == NULL
                   ? fail(failure, ERR_NO_MEMORY, "no memory for a config")
                   : model_config_parse(ret_config, *ret_text, strlen(*ret_text), NULL, 0, failure);
    }
    json_decref(root);
    if (code == 0 && ret_config->vocabulary < SYNTH_VOCABULARY_MIN)
        code = fail(failure, ERR_INVALID,
                    SHAPE_FILE
                    ": vocab_size: expected at least %d (bytes and special tokens), found %u",
                    SYNTH_VOCABULARY_MIN, ret_config->vocabulary);
    return code;
}

/* ---- the list of tensors ---- */

enum contents { DRAWN, NORM, BIAS, SCALE };

struct entry {
    struct weight_spec spec; /* SCALE: of the matrix that is scaled */
    enum contents contents;
    enum dtype dtype;
    uint32_t rows, columns; /* as stored */
    uint32_t shard;
    uint32_t number; /* order of making, so that sorting is stable */
    bool guesses;    /* eh_proj */
    uint64_t bytes;
};

struct plan {
    const struct model_config *config;
    enum dtype dtype;
    double deviation;           /* 0: 1 / sqrt(inputs) */
    double embedding_deviation; /* of the embedding; 0: as the others */
    uint64_t seed;
    struct entry *entry;
    size_t count, capacity;
    uint32_t shards;
    float *strip; /* [STRIP_ROWS * widest] */
    uint8_t *stored;
};

static uint32_t element_bytes(enum dtype dtype) {
    return dtype == DTYPE_F32 ? 4 : dtype == DTYPE_BF16 ? 2 : 1;
}

static void entry_name(const struct entry *entry, char ret[static TENSOR_NAME_BYTES_MAX + 16]) {
    snprintf(ret, TENSOR_NAME_BYTES_MAX + 16, "%s%s", entry->spec.name,
             entry->contents == SCALE ? "_scale_inv" : "");
}

static int add_entry(struct plan *plan, const struct weight_spec *spec, enum contents contents,
                     enum dtype dtype, uint32_t rows, uint32_t columns) {
    if (plan->count == plan->capacity) {
        size_t capacity = plan->capacity > 0 ? 2 * plan->capacity : 256;
        struct entry *entry = realloc(plan->entry, capacity * sizeof *entry);
        if (entry == NULL)
            return ERR_NO_MEMORY;
        plan->entry = entry;
        plan->capacity = capacity;
    }
    plan->entry[plan->count] =
        (struct entry){.spec = *spec,
                       .contents = contents,
                       .dtype = dtype,
                       .rows = rows,
                       .columns = columns,
                       .number = (uint32_t)plan->count,
                       .bytes = (uint64_t)rows * columns * element_bytes(dtype)};
    plan->count++;
    return 0;
}

static int add_matrix(struct plan *plan, const struct weight_spec *spec, bool quantize) {
    enum dtype dtype = plan->dtype;
    if (dtype == DTYPE_E4M3 && !quantize)
        dtype = DTYPE_BF16;
    int code = add_entry(plan, spec, DRAWN, dtype, spec->rows, spec->columns);
    if (code == 0 && dtype == DTYPE_E4M3)
        code = add_entry(plan, spec, SCALE, DTYPE_F32, weight_scale_rows(plan->config, spec),
                         weight_scale_columns(plan->config, spec));
    return code;
}

/* Like the published checkpoints: the head stays in BF16, the correction bias in FP32. */
static int add_weight(struct plan *plan, enum weight which, const struct weight_spec *spec) {
    if (spec->kind != WEIGHT_VECTOR) {
        size_t first = plan->count;
        int code = add_matrix(plan, spec, spec->kind == WEIGHT_MATRIX && which != W_LM_HEAD);
        for (size_t i = first; i < plan->count; i++) /* the matrix, and its scales */
            plan->entry[i].guesses = which == W_MTP_EH_PROJ;
        return code;
    }
    if (which == W_GATE_BIAS)
        return add_entry(plan, spec, BIAS, DTYPE_F32, spec->rows, 1);
    return add_entry(plan, spec, NORM, plan->dtype == DTYPE_F32 ? DTYPE_F32 : DTYPE_BF16,
                     spec->rows, 1);
}

static int add_experts(struct plan *plan, uint32_t layer) {
    struct weight_spec spec;
    int code = 0;
    for (uint32_t expert = 0; expert < plan->config->experts && code == 0; expert++)
        for (enum expert_part part = EXPERT_GATE; part <= EXPERT_DOWN && code == 0; part++) {
            weight_specify_expert(plan->config, layer, part, expert, &spec);
            code = add_matrix(plan, &spec, true);
        }
    return code;
}

static int list_tensors(struct plan *plan) {
    const struct model_config *config = plan->config;
    struct weight_spec spec;
    int code = 0;
    for (enum weight which = W_EMBED; which <= W_FINAL_NORM && code == 0; which++)
        if (!(which == W_LM_HEAD && config->tie_embeddings) &&
            weight_specify(config, which, 0, &spec))
            code = add_weight(plan, which, &spec);
    for (uint32_t layer = 0; layer < config->layers + config->mtp_layers && code == 0; layer++) {
        for (enum weight which = W_FINAL_NORM + 1; which < WEIGHTS && code == 0; which++)
            if (weight_specify(config, which, layer, &spec))
                code = add_weight(plan, which, &spec);
        if (code == 0 && model_layer_is_moe(config, layer))
            code = add_experts(plan, layer);
    }
    return code;
}

/* Within a shard wide elements come first, so that every tensor is aligned; otherwise layer by
 * layer. */
static int compare_entries(const void *left, const void *right) {
    const struct entry *a = left, *b = right;
    if (a->shard != b->shard)
        return a->shard < b->shard ? -1 : 1;
    uint32_t wide_a = element_bytes(a->dtype), wide_b = element_bytes(b->dtype);
    if (wide_a != wide_b)
        return wide_a > wide_b ? -1 : 1;
    return a->number < b->number ? -1 : 1;
}

static int cut_shards(struct plan *plan, uint64_t shard_bytes, struct failure *failure) {
    uint64_t used = 0;
    plan->shards = 1;
    for (size_t i = 0; i < plan->count; i++) {
        if (used > 0 && used + plan->entry[i].bytes > shard_bytes) {
            plan->shards++;
            used = 0;
        }
        used += plan->entry[i].bytes;
        plan->entry[i].shard = plan->shards - 1;
    }
    if (plan->shards > SHARDS_MAX)
        return fail(failure, ERR_TOO_LARGE,
                    SHAPE_FILE ": expected at most %d shards of %llu bytes, found %u", SHARDS_MAX,
                    (unsigned long long)shard_bytes, plan->shards);
    qsort(plan->entry, plan->count, sizeof *plan->entry, compare_entries);
    return 0;
}

/* ---- values ---- */

static uint64_t mix(uint64_t z) {
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static uint64_t tensor_key(uint64_t seed, const char *name) {
    uint64_t hash = 0xcbf29ce484222325u;
    for (; *name != '\0'; name++)
        hash = (hash ^ (uint8_t)*name) * 0x100000001b3u;
    return mix(hash ^ mix(seed + 0x9e3779b97f4a7c15u));
}

/* Elements first .. first + count - 1 of a tensor: mean + deviation x (nearly) normal. */
static void draw(uint64_t key, uint64_t first, size_t count, float mean, float deviation,
                 float *ret) {
    /* The sum of four uniforms on 0..65535 has mean 2 x 65535 and variance (65536^2 - 1) / 3. */
    const float factor = deviation * (1.7320508f / 65536.0f);
    for (size_t i = 0; i < count; i++) {
        uint64_t bits = mix(key + (first + i) * 0x9e3779b97f4a7c15u);
        int32_t sum = (int32_t)(bits & 0xffff) + (int32_t)(bits >> 16 & 0xffff) +
                      (int32_t)(bits >> 32 & 0xffff) + (int32_t)(bits >> 48);
        ret[i] = mean + factor * (float)(sum - 131070);
    }
}

/* eh_proj of an MTP module: the embedding goes through nearly as it is, as it does in the residual
 * stream of the main layers, so that a random model's guesses come true now and then. */
static void pass_embedding(const struct plan *plan, const struct weight_spec *spec, uint32_t row,
                           uint32_t rows) {
    for (size_t i = 0; i < (size_t)rows * spec->columns; i++)
        plan->strip[i] *= 0.1f;
    for (uint32_t r = 0; r < rows; r++)
        plan->strip[(size_t)r * spec->columns + row + r] += 1;
}

/* Rows row .. row + rows - 1 of the matrix (or vector) behind an entry. */
static void draw_strip(const struct plan *plan, const struct entry *entry, uint32_t row,
                       uint32_t rows) {
    const struct weight_spec *spec = &entry->spec;
    float deviation = (float)(plan->deviation > 0 ? plan->deviation : 1 / sqrt(spec->columns));
    float mean = 0;
    if (entry->contents == NORM)
        mean = 1, deviation = 0.1f;
    else if (entry->contents == BIAS)
        deviation = 0.01f;
    if (plan->embedding_deviation > 0 && strcmp(spec->name, "model.embed_tokens.weight") == 0)
        deviation = (float)plan->embedding_deviation;
    draw(tensor_key(plan->seed, spec->name), (uint64_t)row * spec->columns,
         (size_t)rows * spec->columns, mean, deviation, plan->strip);
    if (entry->guesses)
        pass_embedding(plan, spec, row, rows);
}

/* The scale of each block of a strip: its largest magnitude becomes the largest E4M3 value. */
static void strip_scales(const struct plan *plan, const struct entry *entry, uint32_t rows,
                         float *ret_scale) {
    uint32_t columns = entry->spec.columns;
    for (uint32_t block = 0; block * BLOCK < columns; block++) {
        uint32_t end = (block + 1) * BLOCK < columns ? (block + 1) * BLOCK : columns;
        float largest = 0;
        for (uint32_t r = 0; r < rows; r++)
            for (uint32_t c = block * BLOCK; c < end; c++) {
                float magnitude = fabsf(plan->strip[(size_t)r * columns + c]);
                largest = magnitude > largest ? magnitude : largest;
            }
        ret_scale[block] = largest > 0 ? largest / E4M3_LARGEST : 1;
    }
}

/* Turns the strip into the bytes of the entry's dtype. Returns how many. */
static size_t store_strip(const struct plan *plan, const struct entry *entry, uint32_t rows) {
    size_t count = (size_t)rows * entry->columns;
    uint32_t columns = entry->columns;
    if (entry->dtype == DTYPE_F32) {
        memcpy(plan->stored, plan->strip, count * sizeof(float));
        return count * sizeof(float);
    }
    if (entry->dtype == DTYPE_BF16) {
        bf16 *stored = (bf16 *)plan->stored;
        for (size_t i = 0; i < count; i++)
            stored[i] = bf16_from_float(plan->strip[i]);
        return count * sizeof *stored;
    }
    float *scale = plan->strip + (size_t)STRIP_ROWS * columns; /* room left behind the strip */
    strip_scales(plan, entry, rows, scale);
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t c = 0; c < columns; c++) {
            size_t i = (size_t)r * columns + c;
            plan->stored[i] = e4m3_from_float(plan->strip[i] / scale[c / BLOCK]);
        }
    return count;
}

static void put_entry(struct synth_output *out, const struct plan *plan,
                      const struct entry *entry) {
    uint32_t rows = entry->spec.rows;
    for (uint32_t row = 0; row < rows && out->code == 0; row += STRIP_ROWS) {
        uint32_t part = rows - row < STRIP_ROWS ? rows - row : STRIP_ROWS;
        draw_strip(plan, entry, row, part);
        if (entry->contents == SCALE) {
            strip_scales(plan, entry, part, (float *)plan->stored);
            synth_put(out, plan->stored, entry->columns * sizeof(float));
        } else {
            synth_put(out, plan->stored, store_strip(plan, entry, part));
        }
    }
}

/* ---- files ---- */

static void shard_name(const struct plan *plan, uint32_t shard, char ret[static 64]) {
    if (plan->shards == 1)
        snprintf(ret, 64, "model.safetensors");
    else
        snprintf(ret, 64, "model-%05u-of-%05u.safetensors", shard + 1, plan->shards);
}

/* One entry of a safetensors header; NULL `out` only measures. Returns its bytes. */
static size_t put_header_entry(struct synth_output *out, const struct entry *entry, bool first,
                               uint64_t offset) {
    char name[TENSOR_NAME_BYTES_MAX + 16], shape[32], text[320];
    entry_name(entry, name);
    if (entry->spec.kind == WEIGHT_VECTOR)
        snprintf(shape, sizeof shape, "[%u]", entry->rows);
    else
        snprintf(shape, sizeof shape, "[%u,%u]", entry->rows, entry->columns);
    int length = snprintf(text, sizeof text,
                          "%s\"%s\":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%llu,%llu]}",
                          first ? "" : ",", name, dtype_name(entry->dtype), shape,
                          (unsigned long long)offset, (unsigned long long)(offset + entry->bytes));
    ASSERT(length > 0 && (size_t)length < sizeof text);
    if (out != NULL)
        synth_put(out, text, (size_t)length);
    return (size_t)length;
}

static void put_shard(struct synth_output *out, const struct plan *plan, const struct entry *entry,
                      size_t count) {
    static const char START[] = "{\"__metadata__\":{\"format\":\"pt\"},";
    char name[64];
    shard_name(plan, entry->shard, name);
    synth_begin(out, name);
    size_t header = sizeof START - 1 + 1;
    uint64_t offset = 0;
    for (size_t i = 0; i < count; i++, offset += entry[i - 1].bytes)
        header += put_header_entry(NULL, &entry[i], i == 0, offset);
    size_t padded = (header + 7) / 8 * 8;
    uint8_t prefix[8];
    for (int i = 0; i < 8; i++)
        prefix[i] = (uint8_t)((uint64_t)padded >> (8 * i));
    synth_put(out, prefix, sizeof prefix);
    synth_put(out, START, sizeof START - 1);
    offset = 0;
    for (size_t i = 0; i < count; i++, offset += entry[i - 1].bytes)
        put_header_entry(out, &entry[i], i == 0, offset);
    synth_print(out, "}%*s", (int)(padded - header), "");
    for (size_t i = 0; i < count && out->code == 0; i++)
        put_entry(out, plan, &entry[i]);
}

static void put_index(struct synth_output *out, const struct plan *plan) {
    uint64_t total = 0;
    for (size_t i = 0; i < plan->count; i++)
        total += plan->entry[i].bytes;
    synth_begin(out, INDEX_FILE);
    synth_print(out, "{\"metadata\":{\"total_size\":%llu},\"weight_map\":{",
                (unsigned long long)total);
    for (size_t i = 0; i < plan->count; i++) {
        char name[TENSOR_NAME_BYTES_MAX + 16], file[64];
        entry_name(&plan->entry[i], name);
        shard_name(plan, plan->entry[i].shard, file);
        synth_print(out, "%s\"%s\":\"%s\"", i > 0 ? "," : "", name, file);
    }
    synth_print(out, "}}\n");
}

/* config.json comes last: a directory whose writing was cut off is not taken for a model. */
static void put_files(struct synth_output *out, const struct plan *plan, const char *config_text) {
    for (size_t first = 0, end; first < plan->count && out->code == 0; first = end) {
        for (end = first; end < plan->count && plan->entry[end].shard == plan->entry[first].shard;)
            end++;
        put_shard(out, plan, &plan->entry[first], end - first);
    }
    if (plan->shards > 1)
        put_index(out, plan);
    synth_tokenizer(out, plan->config->vocabulary, plan->config->context);
    synth_begin(out, "generation_config.json");
    synth_print(out,
                "{\"bos_token_id\":%d,\"eos_token_id\":%d,\"do_sample\":true,\"temperature\":1.0,"
                "\"top_p\":1.0}\n",
                SYNTH_BOS, SYNTH_EOS);
    synth_begin(out, CONFIG_FILE);
    synth_put(out, config_text, strlen(config_text));
    synth_print(out, "\n");
    synth_flush(out);
}

/* Room for a strip of the widest tensor, its scales, and its stored form. */
static int allocate_strip(struct plan *plan) {
    uint32_t widest = 1;
    for (size_t i = 0; i < plan->count; i++)
        widest = plan->entry[i].spec.columns > widest ? plan->entry[i].spec.columns : widest;
    size_t floats = (size_t)STRIP_ROWS * widest + widest / BLOCK + 1;
    plan->strip = malloc(floats * sizeof(float));
    plan->stored = malloc(floats * sizeof(float));
    return plan->strip != NULL && plan->stored != NULL ? 0 : ERR_NO_MEMORY;
}

int synth_model_sharded(const char *shape_json, size_t bytes, uint64_t seed, uint64_t shard_bytes,
                        int (*write)(void *context, const char *file, const void *bytes,
                                     size_t size),
                        void *context, struct failure *failure) {
    struct failure local;
    failure = failure != NULL ? failure : &local;
    struct model_config config;
    struct plan plan = {.config = &config, .seed = seed};
    struct synth_output out = {.write = write, .context = context, .failure = failure};
    char *text = NULL;
    int code = make_config(shape_json, bytes, &plan.dtype, &plan.deviation,
                           &plan.embedding_deviation, &text, &config, failure);
    if (code == 0) {
        out.buffer = malloc(SYNTH_BUFFER_BYTES);
        code = out.buffer != NULL ? list_tensors(&plan) : ERR_NO_MEMORY;
        code = code == 0 ? allocate_strip(&plan) : code;
        if (code < 0)
            fail(failure, code, SHAPE_FILE ": no memory to write such a model");
    }
    if (code == 0)
        code = cut_shards(&plan, shard_bytes, failure);
    if (code == 0) {
        put_files(&out, &plan, text);
        code = out.code;
    }
    free(out.buffer);
    free(plan.entry);
    free(plan.strip);
    free(plan.stored);
    free(text);
    return code;
}

int synth_model(const char *shape_json, size_t bytes, uint64_t seed,
                int (*write)(void *context, const char *file, const void *bytes, size_t size),
                void *context, struct failure *failure) {
    return synth_model_sharded(shape_json, bytes, seed, SHARD_BYTES, write, context, failure);
}
