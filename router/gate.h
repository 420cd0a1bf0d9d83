/* The gate: from the logits of one token over the routed experts to its ordered list of experts and weights. Pure.
 * Sources: DeepSeek-V2 (2405.04434) eq. 20-22 softmax and group-limited greedy; DeepSeek-V3 (2412.19437) eq. 12-16 sigmoid,
 * correction bias used for the choice only, groups by the sum of their two best; Hugging Face's implementation where the papers
 * are silent. top-p: the review's reading, experts in order of probability until their normalised mass reaches p, at most k. */
#ifndef TROUPE_GATE_H
#define TROUPE_GATE_H

#include <stdbool.h>
#include <stdint.h>

enum gate_scoring { GATE_SOFTMAX, GATE_SIGMOID };
enum gate_group_score { GATE_GROUP_MAX, GATE_GROUP_TOP2_SUM };

struct gate_parameters {
    enum gate_scoring scoring;
    uint32_t experts;
    uint32_t groups;        /* 1: no group limit */
    uint32_t groups_chosen; /* topk_group */
    enum gate_group_score group_score;
    uint32_t k;             /* num_experts_per_tok */
    bool normalise;         /* norm_topk_prob */
    float scaling;          /* routed_scaling_factor */
    float top_p;            /* 0 or >= 1: off */
};

#define GATE_UNUSED 0xffffu /* expert id of a slot that top-p left empty; its weight is 0 */

/* logits: [experts]; bias: [experts] or NULL; ret_expert, ret_weight: [k], ordered as chosen: by descending biased score, ties
 * to the lower expert number. Weights come from the unbiased scores. Never reads a clock, never allocates.
 * NaN logits count as -infinity: a broken row still gives k distinct experts. */
void gate_choose(const struct gate_parameters *parameters, const float *logits, const float *bias,
                 uint16_t *ret_expert, float *ret_weight);

#endif
