/* Bytes and operations of a step by counting weights. */
#include "bench/cost.h"

#include <math.h>

static void add(const struct weight_view *view, double *bytes, double *flops) {
    double elements = (double)view->n * view->k;
    *bytes += elements * (double)dtype_bytes(view->dtype);
    *flops += 2 * elements;
}

static void add_weight(const struct model *model, enum weight which, uint32_t layer, double *bytes,
                       double *flops) {
    struct weight_view view = model_weight(model, which, layer);
    add(&view, bytes, flops);
}

void cost_of_model(struct model_cost *ret, const struct model *model) {
    const struct model_config *config = model_config(model);
    double fixed = 0, flops = 0, expert = 0, expert_flops = 0, head = 0;
    for (uint32_t l = 0; l < config->layers; l++) {
        bool moe = model_layer_is_moe(config, l);
        if (config->q_lora > 0) {
            add_weight(model, W_Q_A, l, &fixed, &flops);
            add_weight(model, W_Q_B, l, &fixed, &flops);
        } else {
            add_weight(model, W_Q, l, &fixed, &flops);
        }
        add_weight(model, W_KV_A, l, &fixed, &flops);
        add_weight(model, W_KV_B, l, &fixed, &flops);
        add_weight(model, W_O, l, &fixed, &flops);
        if (!moe || config->shared_experts > 0) {
            add_weight(model, moe ? W_SHARED_GATE : W_DENSE_GATE, l, &fixed, &flops);
            add_weight(model, moe ? W_SHARED_UP : W_DENSE_UP, l, &fixed, &flops);
            add_weight(model, moe ? W_SHARED_DOWN : W_DENSE_DOWN, l, &fixed, &flops);
        }
        if (!moe)
            continue;
        add_weight(model, W_GATE, l, &fixed, &flops);
        for (uint32_t e = 0; e < config->experts; e++) {
            for (int part = EXPERT_GATE; part <= EXPERT_DOWN; part++) {
                struct weight_view view = model_expert_weight(model, l, e, (enum expert_part)part);
                add(&view, &expert, &expert_flops);
            }
        }
    }
    add_weight(model, W_LM_HEAD, 0, &fixed, &head);
    double chosen = config->experts > 0 ? (double)config->gate.k / config->experts : 0;
    *ret = (struct model_cost){
        .fixed_bytes = fixed,
        .expert_bytes = expert,
        .chosen = chosen,
        .token_flops = flops + expert_flops * chosen,
        .head_flops = head,
    };
}

double cost_step_bytes(const struct model_cost *self, double rows) {
    return self->fixed_bytes + self->expert_bytes * (1 - pow(1 - self->chosen, rows));
}
