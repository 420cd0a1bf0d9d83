/* A model twice: through engine/ with the device's table (the readable form), and as the resident
 * step; what the tests of the step compare. */
#ifndef TROUPE_TESTS_GPU_STEP_RIG_H
#define TROUPE_TESTS_GPU_STEP_RIG_H

#include "engine/cuda/step.h"
#include "kernels/cuda/streams.h"
#include "kernels/cuda/table.h"
#include "tests/gpu/compare.h"
#include "tests/support/one_process.h"

enum { RIG_SEQUENCES = 5, RIG_POSITIONS = 128, RIG_PAGES = 2 * RIG_SEQUENCES + 2 };

/* Two MoE layers after a dense one, groups of experts, a shared expert; the demo model's attention.
 */
static const char RIG_SHAPE[] =
    "{\"model_type\": \"deepseek_v3\", \"dtype\": \"%s\", \"vocab_size\": 264, \"hidden_size\": "
    "128,"
    " \"intermediate_size\": 256, \"moe_intermediate_size\": 128, \"num_hidden_layers\": 2,"
    " \"first_k_dense_replace\": 0, \"num_attention_heads\": 2, \"n_shared_experts\": 1,"
    " \"n_routed_experts\": 8, \"num_experts_per_tok\": 2, \"n_group\": 4, \"topk_group\": 2,"
    " \"q_lora_rank\": 64, \"kv_lora_rank\": 128, \"qk_nope_head_dim\": 32,"
    " \"qk_rope_head_dim\": 32, \"v_head_dim\": 32, \"max_position_embeddings\": 4096}";

struct rig {
    struct one_process plain;
    struct step_weights weights;
    struct step *step;
    const struct kernels *kernels;
    struct step_options options;
    uint32_t vocabulary;
    uint32_t pages[RIG_SEQUENCES][2]; /* of the step */
    float *logits;                    /* [rows, vocabulary], the step's */
};

/* Expert e of each layer: group e % groups, slot (e / groups). */
static inline void rig_place(struct rig *rig) {
    const struct model_config *c = rig->plain.config;
    for (uint32_t l = 0; l < c->layers; l++)
        for (uint32_t e = 0; model_layer_is_moe(c, l) && e < c->experts; e++) {
            struct expert_weights *weights = NULL;
            struct failure failure;
            const uint32_t group = e % rig->options.groups, slot = e / rig->options.groups;
            assert_int_equal(
                engine_expert_pack(rig->plain.model, rig->kernels, l, e, &weights, &failure), 0);
            assert_int_equal(step_expert_put(rig->step, group, l, slot, weights), 0);
            engine_expert_free(&weights);
            step_place(rig->step, l, e, group, slot);
        }
}

static inline void rig_open_step(struct rig *rig) {
    struct failure failure = {0};
    if (step_open(&rig->step, &rig->weights.model, &rig->options, &failure) != 0)
        fail_msg("step: %s", failure.text);
    rig_place(rig);
}

/* directory NULL: random weights of RIG_SHAPE. slots 0: as many as are needed. */
static inline void rig_open(struct rig *rig, const char *directory, bool fp8,
                            struct step_options options) {
    struct failure failure = {0};
    memset(rig, 0, sizeof *rig);
    rig->kernels = kernels_cuda("sm90", fp8, &failure);
    assert_non_null(rig->kernels);
    one_process_use_latent_fp8(options.cache == CACHE_E4M3);
    char shape[1024];
    snprintf(shape, sizeof shape, RIG_SHAPE, fp8 ? "fp8" : "bf16");
    assert_true(directory != NULL ? one_process_open(&rig->plain, directory, rig->kernels,
                                                     &PARALLEL_SERIAL, 16, RIG_POSITIONS)
                                  : one_process_open_shape(&rig->plain, shape, 7, rig->kernels,
                                                           &PARALLEL_SERIAL, 16, RIG_POSITIONS));
    one_process_use_latent_fp8(false);
    if (step_weights_open(&rig->weights, rig->plain.model, rig->kernels, &failure) != 0)
        fail_msg("weights: %s", failure.text);
    options.positions = RIG_POSITIONS;
    options.pages = RIG_PAGES;
    if (options.slots == 0)
        options.slots = (rig->plain.config->experts + options.groups - 1) / options.groups;
    rig->options = options;
    rig->vocabulary = rig->plain.config->vocabulary;
    rig->logits = calloc((size_t)RIG_SEQUENCES * rig->vocabulary, sizeof *rig->logits);
    for (uint32_t s = 0; s < RIG_SEQUENCES; s++) {
        rig->pages[s][0] = RIG_PAGES - 1 - 2 * s; /* in no order that the plain form has */
        rig->pages[s][1] = 2 * s;
    }
    rig_open_step(rig);
}

static inline void rig_close(struct rig *rig) {
    step_close(&rig->step);
    step_weights_close(&rig->weights);
    one_process_close(&rig->plain);
    free(rig->logits);
}

static inline uint32_t rig_token(const struct rig *rig, uint32_t sequence, uint32_t position) {
    return (sequence * 31 + position * 17 + 5) % rig->vocabulary;
}

/* Sequences first..first + count - 1 at one position, each in the absorbed form. */
static inline void rig_plain(struct rig *rig, uint32_t first, uint32_t count, uint32_t position,
                             float *ret_logits) {
    struct batch_row row[RIG_SEQUENCES];
    uint32_t select[RIG_SEQUENCES];
    for (uint32_t i = 0; i < count; i++) {
        row[i] = one_process_row(&rig->plain, first + i, position,
                                 rig_token(rig, first + i, position), MLA_ABSORBED);
        select[i] = i;
    }
    one_process_step(&rig->plain, row, count, select, count, ret_logits);
}

/* The same as a step; logits of row i at rig->logits + i * vocabulary. */
static inline int rig_begin(struct rig *rig, uint32_t first, uint32_t count, uint32_t position,
                            uint32_t bias) {
    static struct step_row row[RIG_SEQUENCES]; /* borrowed for the call only */
    for (uint32_t i = 0; i < count; i++)
        row[i] = (struct step_row){.token = rig_token(rig, first + i, position),
                                   .position = position,
                                   .pages = rig->pages[first + i],
                                   .bias = bias};
    return step_begin(rig->step, row, count);
}
static inline struct step_result rig_end(struct rig *rig) {
    struct step_result result;
    assert_int_equal(step_end(rig->step, &result), 0);
    for (uint32_t r = 0; r < result.rows; r++)
        gpu_get(rig->logits + (size_t)r * rig->vocabulary,
                result.logits + (size_t)result.at[r] * rig->vocabulary,
                rig->vocabulary * sizeof(float));
    return result;
}
static inline struct step_result rig_step(struct rig *rig, uint32_t first, uint32_t count,
                                          uint32_t position) {
    assert_int_equal(rig_begin(rig, first, count, position, STEP_NO_BIAS), 0);
    return rig_end(rig);
}

static inline bool rig_same(const struct rig *rig, uint32_t row, const float *expected) {
    return memcmp(rig->logits + (size_t)row * rig->vocabulary, expected,
                  rig->vocabulary * sizeof(float)) == 0;
}

#endif
