/* Opens an attention engine: packs every weight of its role, makes the cache, the batch slots and
 * the work space. */
#include <stdlib.h>
#include <string.h>

#include "engine/attention.h"

float attention_softmax_scale(const struct model_config *c) {
    return (float)(pow_table((double)(c->nope + c->rope), -0.5) *
                   rope_softmax_factor(&c->rope_parameters));
}

struct weight_view attention_kv_b(const struct model *model, uint32_t layer) {
    struct weight_view ret = model_weight(model, W_KV_B, layer);
    ret.latent = true;
    return ret;
}

struct weight_view attention_key_view(const struct model_config *c, struct weight_view kv_b,
                                      uint32_t head) {
    kv_b.transposed = true;
    kv_b.n = c->kv_lora;
    kv_b.k = c->nope;
    kv_b.row0 += head * (c->nope + c->v);
    return kv_b;
}

static struct weight_view value_view(const struct model_config *c, struct weight_view kv_b,
                                     uint32_t head) {
    kv_b.n = c->v;
    kv_b.row0 += head * (c->nope + c->v) + c->nope;
    return kv_b;
}

void attention_absorbed_views(const struct model *model, uint32_t layer, uint32_t head,
                              struct weight_view *ret_key, struct weight_view *ret_value) {
    const struct weight_view kv_b = attention_kv_b(model, layer);
    *ret_key = attention_key_view(model_config(model), kv_b, head);
    *ret_value = value_view(model_config(model), kv_b, head);
}

static int open_matrix(struct engine *self, struct packed *ret, enum weight which, uint32_t layer,
                       const char *what, struct failure *failure) {
    struct weight_view view = which == W_KV_B ? attention_kv_b(self->model, layer)
                                              : model_weight(self->model, which, layer);
    return packed_open(ret, self->kernels, &view, what, &self->memory_bytes, failure);
}

static int open_norm(struct engine *self, float **ret, enum weight which, uint32_t layer,
                     uint32_t n, struct failure *failure) {
    struct weight_view view = model_weight(self->model, which, layer);
    return floats_open(ret, &view, n, "norm weights", &self->memory_bytes, failure);
}

static int open_absorbed(struct engine *self, struct attention_layer *layer, uint32_t l,
                         struct failure *failure) {
    const struct model_config *c = self->config;
    layer->w_uk = calloc(c->heads, sizeof *layer->w_uk);
    layer->w_uv = calloc(c->heads, sizeof *layer->w_uv);
    if (layer->w_uk == NULL || layer->w_uv == NULL)
        return fail(failure, ERR_NO_MEMORY, "absorbed weights of layer %u: no memory for %u heads",
                    l, c->heads);
    const size_t count = (size_t)2 * c->heads * c->layers; /* read for every token */
    for (uint32_t h = 0; h < c->heads; h++) {
        struct weight_view key, value;
        attention_absorbed_views(self->model, l, h, &key, &value);
        int error = packed_open_coded(&layer->w_uk[h], self->kernels, &key, count,
                                      "absorbed key weights", &self->memory_bytes, failure);
        if (error == 0)
            error = packed_open_coded(&layer->w_uv[h], self->kernels, &value, count,
                                      "absorbed value weights", &self->memory_bytes, failure);
        if (error != 0)
            return error;
    }
    return 0;
}

static int open_mla(struct engine *self, struct attention_layer *layer, uint32_t l,
                    struct failure *failure) {
    const struct model_config *c = self->config;
    int error = open_norm(self, &layer->input_norm, W_INPUT_NORM, l, c->hidden, failure);
    if (error == 0)
        error = open_norm(self, &layer->post_norm, W_POST_NORM, l, c->hidden, failure);
    if (error == 0)
        error = open_norm(self, &layer->kv_a_norm, W_KV_A_NORM, l, c->kv_lora, failure);
    if (error == 0 && c->q_lora != 0)
        error = open_norm(self, &layer->q_a_norm, W_Q_A_NORM, l, c->q_lora, failure);
    if (error == 0 && c->q_lora != 0)
        error = open_matrix(self, &layer->q_a, W_Q_A, l, "query weights", failure);
    if (error == 0)
        error = open_matrix(self, &layer->q_b, c->q_lora != 0 ? W_Q_B : W_Q, l, "query weights",
                            failure);
    if (error == 0)
        error = open_matrix(self, &layer->kv_a, W_KV_A, l, "latent weights", failure);
    if (error == 0)
        error = open_matrix(self, &layer->kv_b, W_KV_B, l, "key and value weights", failure);
    if (error == 0)
        error = open_matrix(self, &layer->o, W_O, l, "attention output weights", failure);
    return error != 0 ? error : open_absorbed(self, layer, l, failure);
}

static int open_ffn(struct engine *self, struct attention_layer *layer, uint32_t l,
                    struct failure *failure) {
    const struct model_config *c = self->config;
    layer->moe = model_layer_is_moe(c, l);
    layer->has_mlp = !layer->moe || c->shared_experts != 0;
    int error = 0;
    if (layer->has_mlp) {
        const struct weight_view view[3] = {
            model_weight(self->model, layer->moe ? W_SHARED_GATE : W_DENSE_GATE, l),
            model_weight(self->model, layer->moe ? W_SHARED_UP : W_DENSE_UP, l),
            model_weight(self->model, layer->moe ? W_SHARED_DOWN : W_DENSE_DOWN, l),
        };
        error = mlp_open(&layer->mlp, self->kernels, view,
                         layer->moe ? "shared expert weights" : "dense layer weights",
                         &self->memory_bytes, failure);
    }
    if (!layer->moe || error != 0)
        return error;
    error = open_matrix(self, &layer->gate, W_GATE, l, "gate weights", failure);
    struct weight_view bias = model_weight(self->model, W_GATE_BIAS, l);
    if (error == 0 && bias.data != NULL)
        error = floats_open(&layer->gate_bias, &bias, c->experts, "gate bias", &self->memory_bytes,
                            failure);
    return error;
}

static int open_slot(struct engine *self, struct attention_slot *slot, struct failure *failure) {
    const size_t rows = self->batch_rows, k = self->attention->gate.k, hidden = self->hidden;
    const size_t activation = self->kernels->activation_bytes;
    const struct {
        void **ret;
        size_t count, size;
    } parts[] = {
        {(void **)&slot->row, rows, sizeof *slot->row},
        {(void **)&slot->residual, rows * hidden, sizeof(float)},
        {&slot->normed, rows * self->hidden_stride, activation},
        {&slot->final, rows * self->hidden_stride, activation},
        {(void **)&slot->shared, rows * hidden, sizeof(float)},
        {(void **)&slot->outputs, rows * k * hidden, sizeof(float)},
        {(void **)&slot->output, rows * k, sizeof *slot->output},
        {(void **)&slot->choice, rows * k, sizeof *slot->choice},
        {(void **)&slot->weights, rows * k, sizeof(float)},
    };
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        *parts[i].ret = memory_take(parts[i].count, parts[i].size, "rows of a batch",
                                    &self->memory_bytes, failure);
        if (*parts[i].ret == NULL)
            return ERR_NO_MEMORY;
    }
    return 0;
}

static int open_memory(struct engine *self, struct failure *failure) {
    struct attention *a = self->attention;
    const struct model_config *c = self->config;
    struct mla_work mla;
    struct layer_mlp_work mlp;
    size_t work = mla_work_layout(self, &mla, NULL),
           other = layer_mlp_work_layout(self, &mlp, NULL);
    work = work > other ? work : other;
    a->work = memory_take(work, 1, "work space of attention", &self->memory_bytes, failure);
    if (a->work == NULL)
        return ERR_NO_MEMORY;
    /* pages < 2^32, layers <= LAYERS_MAX, and a position's bytes < 2^21: the product can only
     * overflow in the last factor. */
    size_t page_bytes =
        (size_t)a->cache_layers * PAGE_TOKENS * a->absorbed_stride * self->kernels->activation_bytes;
    a->cache = memory_take(a->pages, page_bytes, "latent cache", &self->memory_bytes, failure);
    if (a->cache == NULL)
        return ERR_NO_MEMORY;
    a->page_used = memory_take(a->pages, 1, "latent cache", &self->memory_bytes, failure);
    if (a->page_used == NULL)
        return ERR_NO_MEMORY;
    size_t blocks = (c->context + PAGE_TOKENS - 1) / PAGE_TOKENS;
    a->cos_sin = memory_take(blocks * PAGE_TOKENS * c->rope, sizeof(float), "table of rotations",
                             &self->memory_bytes, failure);
    if (a->cos_sin == NULL)
        return ERR_NO_MEMORY;
    a->cos_sin_ready = memory_take(blocks, 1, "table of rotations", &self->memory_bytes, failure);
    return a->cos_sin_ready == NULL ? ERR_NO_MEMORY : 0;
}

static int set_gate(struct engine *self, const struct engine_options *options,
                    struct failure *failure) {
    struct gate_parameters *gate = &self->attention->gate;
    *gate = self->config->gate;
    if (self->config->experts == 0) { /* a dense model: one slot, never used */
        gate->k = 1;
        return 0;
    }
    if (options->experts_per_token_override != 0)
        gate->k = options->experts_per_token_override;
    if (options->gate_top_p != 0)
        gate->top_p = options->gate_top_p;
    uint32_t eligible =
        gate->groups > 1 ? gate->experts / gate->groups * gate->groups_chosen : gate->experts;
    uint32_t most = eligible < EXPERTS_PER_TOKEN_MAX ? eligible : EXPERTS_PER_TOKEN_MAX;
    if (gate->k > most)
        return fail(failure, ERR_INVALID, "experts per token: expected 1 to %u, found %u", most,
                    gate->k);
    if (!(gate->top_p >= 0 && gate->top_p <= 1))
        return fail(failure, ERR_INVALID, "gate top-p: expected 0 to 1, found %g",
                    (double)gate->top_p);
    return 0;
}

int attention_open(struct engine *self, const struct engine_options *options,
                   struct failure *failure) {
    const struct model_config *c = self->config;
    struct attention *a = calloc(1, sizeof *a);
    if (a == NULL)
        return fail(failure, ERR_NO_MEMORY, "attention engine: no memory");
    self->attention = a;
    if (options->batch_slots < 1 || options->batch_slots > BATCH_SLOTS_MAX)
        return fail(failure, ERR_INVALID, "batch slots: expected 1 to %d, found %u",
                    BATCH_SLOTS_MAX, options->batch_slots);
    if (options->pages == 0)
        return fail(failure, ERR_INVALID,
                    "pages of the latent cache: expected at least 1, found 0");
    a->slots = options->batch_slots;
    a->pages = options->pages;
    if (options->latent_fp8 && self->kernels->activation_bytes != sizeof(bf16))
        return fail(failure, ERR_INVALID,
                    "latents in FP8 (latent_fp8) need a profile whose activations are BF16, found %s",
                    self->kernels->name);
    a->shape = (struct mla_shape){.heads = c->heads,
                                  .nope = c->nope,
                                  .rope = c->rope,
                                  .v = c->v,
                                  .kv_lora = c->kv_lora,
                                  .latent_e4m3 = options->latent_fp8};
    a->shape.scale = attention_softmax_scale(c);
    a->expanded_stride = activation_stride(c->nope) + activation_stride(c->rope);
    a->absorbed_stride = cache_stride(c->kv_lora, c->rope);
    a->attended_stride = row_stride((size_t)c->heads * c->v);
    a->embedding = model_weight(self->model, W_EMBED, 0);
    int error = set_gate(self, options, failure);
    for (uint32_t s = 0; options->resident != NULL && error == 0 && s < a->slots; s++)
        error = open_slot(self, &a->slot[s], failure);
    if (options->resident != NULL)
        return error != 0 ? error : attention_resident_open(self, options, failure);
    if (error == 0)
        error = open_norm(self, &a->final_norm, W_FINAL_NORM, 0, c->hidden, failure);
    if (error != 0)
        return error;
    bool drafts = options->mtp_steps > 0 && c->mtp_layers > 0;
    a->cache_layers = c->layers + drafts;
    a->layer = calloc(a->cache_layers, sizeof *a->layer);
    if (a->layer == NULL)
        return fail(failure, ERR_NO_MEMORY, "attention engine: no memory for %u layers", c->layers);
    for (uint32_t l = 0; l < a->cache_layers; l++) {
        error = open_mla(self, &a->layer[l], l, failure);
        if (error == 0)
            error = open_ffn(self, &a->layer[l], l, failure);
        if (error != 0)
            return error;
    }
    for (uint32_t s = 0; s < a->slots; s++)
        if ((error = open_slot(self, &a->slot[s], failure)) != 0)
            return error;
    if (drafts && (error = draft_open(self, options->mtp_steps, failure)) != 0)
        return error;
    return open_memory(self, failure);
}

static void close_layer(struct attention_layer *layer, uint32_t heads) {
    memory_free(layer->input_norm);
    memory_free(layer->post_norm);
    memory_free(layer->q_a_norm);
    memory_free(layer->kv_a_norm);
    memory_free(layer->gate_bias);
    struct packed *const single[] = {&layer->q_a,  &layer->q_b, &layer->kv_a,
                                     &layer->kv_b, &layer->o,   &layer->gate};
    for (size_t i = 0; i < sizeof single / sizeof *single; i++)
        packed_close(single[i]);
    for (uint32_t h = 0; h < heads; h++) {
        if (layer->w_uk != NULL)
            packed_close(&layer->w_uk[h]);
        if (layer->w_uv != NULL)
            packed_close(&layer->w_uv[h]);
    }
    free(layer->w_uk);
    free(layer->w_uv);
    mlp_close(&layer->mlp);
}

void attention_close(struct engine *self) {
    struct attention *a = self->attention;
    if (a == NULL)
        return;
    attention_resident_close(self);
    draft_close(self);
    for (uint32_t l = 0; a->layer != NULL && l < a->cache_layers; l++)
        close_layer(&a->layer[l], self->config->heads);
    free(a->layer);
    for (uint32_t s = 0; s < BATCH_SLOTS_MAX; s++) {
        struct attention_slot *slot = &a->slot[s];
        void *const parts[] = {slot->row,    slot->residual, slot->normed,
                               slot->final,  slot->shared,   slot->outputs,
                               slot->output, slot->choice,   slot->weights};
        for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
            memory_free(parts[i]);
    }
    memory_free(a->final_norm);
    memory_free(a->cache);
    memory_free(a->page_used);
    memory_free(a->cos_sin);
    memory_free(a->cos_sin_ready);
    memory_free(a->page_table);
    memory_free(a->work);
    free(a);
    self->attention = NULL;
}
