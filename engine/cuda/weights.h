/* A model's weights on the device, as the resident step takes them: addresses only, so that a bench
 * can make them up. Weights of experts are the step's (step.h). */
#ifndef TROUPE_ENGINE_CUDA_WEIGHTS_H
#define TROUPE_ENGINE_CUDA_WEIGHTS_H

#include "engine/internal.h"
#include "kernels/cuda/cuda_ops.h"

/* [n, k], rows `stride` elements apart; BF16, or E4M3 where there are scales ([n / 128 rounded up,
 * k / 128 rounded up]). n 0: there is none. */
struct step_matrix {
    const void *data;
    const float *scales;
    uint32_t n, k, stride;
};

struct step_layer {
    const float *input_norm, *post_norm, *q_a_norm, *kv_a_norm;
    struct step_matrix q_a, q_b; /* q_a.n 0: q_b takes the hidden row */
    struct step_matrix kv_a, o;
    struct step_matrix kv_b;       /* the expanded form; BF16; n 0: no prompts */
    struct step_matrix w_uk, w_uv; /* heads one after the other; n is one head's; BF16 */
    bool moe;
    struct step_matrix mlp_gate, mlp_up, mlp_down; /* the dense layer's, or the shared expert's */
    struct step_matrix gate;
    const float *gate_bias; /* NULL: none */
};

struct step_model {
    uint32_t layers, hidden, heads, nope, rope, v, kv_lora, vocabulary, context;
    uint32_t expert_width, mlp_width; /* of a routed expert; the widest dense or shared MLP */
    bool expert_fp8;
    float norm_eps, softmax_scale;
    struct gate_cuda gate;    /* experts 0: a dense model */
    struct step_layer *layer; /* [layers] */
    const bf16 *embedding;
    size_t embedding_stride;
    const float *final_norm;
    const float *cos_sin;    /* [context, rope / 2, 2] */
    struct step_matrix head; /* LM head; n 0: the final rows are all that is wanted */
};

/* The weights of a model that was packed by `kernels` (kernels_cuda()), and what holds them. */
struct step_weights {
    struct step_model model;
    struct packed *packed;
    void **memory;
    uint32_t packed_count, memory_count;
    uint64_t bytes; /* on the host; those on the device are the table's */
};
int step_weights_open(struct step_weights *ret, const struct model *model,
                      const struct kernels *kernels, struct failure *failure);
void step_weights_close(struct step_weights *self);

struct step_matrix step_matrix_of(const struct matrix *matrix);

#endif
