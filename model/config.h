/* What config.json says, checked, for the families deepseek_v3 (R1, Moonlight, Kimi-K2) and deepseek_v2 (V2, V2-Lite). Pure: the bytes of
 * files are handed in. */
#ifndef TROUPE_MODEL_CONFIG_H
#define TROUPE_MODEL_CONFIG_H

#include <stdbool.h>
#include <stdint.h>

#include "actors/errors.h"
#include "kernels/ops.h"
#include "router/gate.h"

enum family { FAMILY_DEEPSEEK_V2, FAMILY_DEEPSEEK_V3 };

struct model_config {
    enum family family;
    uint32_t vocabulary, hidden, layers;
    uint32_t mtp_layers;         /* model_open() sets it to 0 where the files hold no tensor of them */
    uint32_t dense_layers;       /* first_k_dense_replace */
    uint32_t moe_layer_freq;     /* layer l >= dense_layers is MoE if l % moe_layer_freq == 0 */
    uint32_t dense_width;        /* intermediate_size */
    uint32_t expert_width;       /* moe_intermediate_size */
    uint32_t shared_experts;     /* n_shared_experts: one MLP of shared_experts * expert_width; 0 = none */
    uint32_t experts;            /* n_routed_experts; 0 = dense model */
    uint32_t heads, q_lora;      /* q_lora 0: q_proj directly (V2-Lite) */
    uint32_t kv_lora, nope, rope, v;
    float norm_eps;
    struct rope_parameters rope_parameters;
    bool rope_interleave;        /* pairs (2i, 2i+1) are rotated; always true: false is refused, no known checkpoint has it */
    struct gate_parameters gate; /* scoring, groups, top-k, scaling */
    uint32_t context;            /* max_position_embeddings */
    bool tie_embeddings;
    bool fp8;                    /* quantization_config fp8 */
    uint32_t fp8_block_rows, fp8_block_cols;
    bool experts_e4m3;           /* the files' own word: what routed experts multiply rows by is E4M3, in every layer */
    int32_t bos, pad;
    int32_t eos[8];              /* config.json and generation_config.json together */
    uint32_t eos_count;
    char model_type[32];
    /* generation_config.json, or the defaults of vLLM (temperature 1, top_p 1) where absent */
    float default_temperature, default_top_p;
    int32_t default_top_k;
};

bool model_layer_is_moe(const struct model_config *config, uint32_t layer);

/* Parses and checks config.json (and generation_config.json, NULL if there is none). Every number has a range; what contradicts
 * itself (experts not divisible into groups, top-k over experts, ...) is refused with what was expected and found. */
int model_config_parse(struct model_config *ret, const char *config_json, size_t config_bytes,
                       const char *generation_json, size_t generation_bytes,
                       struct failure *failure);

#endif
