/* What weights take on a device, told before any of them is loaded. The matrices are those that
 * attention_open.c, draft.c and sampler_engine.c open. */
#include "engine/attention.h"

struct count {
    const struct kernels *kernels;
    uint64_t bytes;
    uint64_t widest; /* a matrix's inputs and outputs together, padded */
};

static void add(struct count *self, const struct weight_view *view) {
    if (view->data == NULL)
        return;
    self->bytes += self->kernels->matrix_image_bytes(view);
    const uint64_t width = activation_stride(view->n) + activation_stride(view->k);
    self->widest = width > self->widest ? width : self->widest;
}

static void add_weight(struct count *self, const struct model *model, enum weight which,
                       uint32_t layer) {
    const struct weight_view view = model_weight(model, which, layer);
    add(self, &view);
}

static void add_layer(struct count *self, const struct model *model, uint32_t l) {
    const struct model_config *c = model_config(model);
    const bool moe = model_layer_is_moe(c, l);
    if (c->q_lora != 0)
        add_weight(self, model, W_Q_A, l);
    add_weight(self, model, c->q_lora != 0 ? W_Q_B : W_Q, l);
    add_weight(self, model, W_KV_A, l);
    const struct weight_view kv_b = attention_kv_b(model, l);
    add(self, &kv_b);
    add_weight(self, model, W_O, l);
    for (uint32_t h = 0; h < c->heads; h++) {
        struct weight_view key, value;
        attention_absorbed_views(model, l, h, &key, &value);
        add(self, &key);
        add(self, &value);
    }
    if (!moe || c->shared_experts != 0) {
        add_weight(self, model, moe ? W_SHARED_GATE : W_DENSE_GATE, l);
        add_weight(self, model, moe ? W_SHARED_UP : W_DENSE_UP, l);
        add_weight(self, model, moe ? W_SHARED_DOWN : W_DENSE_DOWN, l);
    }
    if (moe)
        add_weight(self, model, W_GATE, l);
}

uint64_t engine_device_bytes(const struct model *model, const struct engine_options *options) {
    const struct model_config *c = model_config(model);
    struct count count = {.kernels = options->kernels};
    if (options->kernels->matrix_image_bytes == NULL)
        return 0;
    if (options->role == ENGINE_ATTENTION) {
        const bool drafts = options->mtp_steps > 0 && c->mtp_layers > 0;
        for (uint32_t l = 0; l < c->layers + drafts; l++)
            add_layer(&count, model, l);
        if (drafts) {
            add_weight(&count, model, W_MTP_EH_PROJ, c->layers);
            add_weight(&count, model, W_LM_HEAD, 0);
        }
    } else if (options->role == ENGINE_SAMPLER) {
        add_weight(&count, model, W_LM_HEAD, 0);
    } else {
        count.widest = activation_stride(c->hidden) + activation_stride(c->expert_width);
    }
    /* rows in and out, FP32 at most, with the half more that rooms grow by */
    return count.bytes + count.widest * options->batch_rows * sizeof(float) * 3 / 2;
}
