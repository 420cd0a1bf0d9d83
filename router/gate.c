/* The gate of an MoE layer: attention runs it on the logits of each row after the layer's second
 * norm; its ordered list becomes the row's dispatch, and that order is the order of combine.
 *
 * Where Hugging Face masks the experts of groups that were not chosen with a score of 0, an expert
 * outside the chosen groups can win when a correction bias makes the scores inside negative. The
 * papers and DeepSeek's own inference code never leave the chosen groups; so do we: masked experts
 * do not take part. The two agree wherever Hugging Face itself stays inside the groups. */
#include "router/gate.h"

#include <float.h>
#include <math.h>

#include "actors/errors.h"
#include "actors/limits.h"
#include "kernels/numerics.h"

/* NaN never compares, so it would make the choice depend on the order of comparisons: it becomes
 * -infinity. +infinity becomes the largest number, so that max - max is 0. */
static float logit_clean(float logit) {
    if (isnan(logit))
        return -INFINITY;
    return logit > FLT_MAX ? FLT_MAX : logit;
}

static void score_softmax(uint32_t experts, const float *logits, float *ret) {
    float max = -INFINITY;
    for (uint32_t e = 0; e < experts; e++) {
        ret[e] = logit_clean(logits[e]);
        max = ret[e] > max ? ret[e] : max;
    }
    if (max == -INFINITY) { /* nothing but -infinity: no expert has a probability */
        for (uint32_t e = 0; e < experts; e++)
            ret[e] = 0.0f;
        return;
    }
    for (uint32_t e = 0; e < experts; e++)
        ret[e] = ret[e] - max;
    exp_canonical_row(ret, experts, ret);
    float sum = sum_canonical(ret, experts);
    for (uint32_t e = 0; e < experts; e++)
        ret[e] = ret[e] / sum;
}

/* sigmoid_canonical, a row at a time. */
static void score_sigmoid(uint32_t experts, const float *logits, float *ret) {
    for (uint32_t e = 0; e < experts; e++)
        ret[e] = -logit_clean(logits[e]);
    exp_canonical_row(ret, experts, ret);
    for (uint32_t e = 0; e < experts; e++)
        ret[e] = 1.0f / (1.0f + ret[e]);
}

static float group_score(enum gate_group_score kind, const float *scores, uint32_t count) {
    float best = -INFINITY, second = -INFINITY;
    for (uint32_t e = 0; e < count; e++) {
        if (scores[e] > best) {
            second = best;
            best = scores[e];
        } else if (scores[e] > second) {
            second = scores[e];
        }
    }
    return kind == GATE_GROUP_MAX || count < 2 ? best : best + second;
}

/* Marks the `groups_chosen` best groups, ties to the lower group. */
static void groups_choose(const struct gate_parameters *p, const float *scores,
                          bool ret_chosen[EXPERT_GROUPS_MAX]) {
    float group_scores[EXPERT_GROUPS_MAX];
    uint32_t per_group = p->experts / p->groups;
    for (uint32_t g = 0; g < p->groups; g++) {
        group_scores[g] = group_score(p->group_score, scores + g * per_group, per_group);
        ret_chosen[g] = false;
    }
    for (uint32_t n = 0; n < p->groups_chosen; n++) {
        uint32_t best = UINT32_MAX;
        for (uint32_t g = 0; g < p->groups; g++)
            if (!ret_chosen[g] && (best == UINT32_MAX || group_scores[g] > group_scores[best]))
                best = g;
        ret_chosen[best] = true;
    }
}

/* Offers experts first..first+count-1 to the list of the best, which is kept sorted: descending
 * score, ties to the lower expert. Experts come in ascending order, so a later one must be strictly
 * better to go ahead. Returns the length of the list. */
static uint32_t list_offer(const float *scores, uint32_t first, uint32_t count, uint32_t k,
                           uint16_t *list, uint32_t length) {
    for (uint32_t e = first; e < first + count; e++) {
        float score = scores[e];
        if (length == k && !(score > scores[list[k - 1]]))
            continue;
        uint32_t place = length < k ? length++ : k - 1;
        for (; place > 0 && score > scores[list[place - 1]]; place--)
            list[place] = list[place - 1];
        list[place] = (uint16_t)e;
    }
    return length;
}

/* How many of the k chosen are kept: in order until their share of the mass of all experts reaches
 * top_p. */
static uint32_t top_p_keep(const struct gate_parameters *p, const float *scores,
                           const uint16_t *chosen) {
    if (!(p->top_p > 0.0f && p->top_p < 1.0f))
        return p->k;
    float wanted = p->top_p * sum_canonical(scores, p->experts);
    float mass = 0.0f;
    for (uint32_t slot = 0; slot < p->k; slot++) {
        mass += scores[chosen[slot]];
        if (mass >= wanted)
            return slot + 1;
    }
    return p->k;
}

void gate_choose(const struct gate_parameters *parameters, const float *logits, const float *bias,
                 uint16_t *ret_expert, float *ret_weight) {
    const struct gate_parameters *p = parameters;
    ASSERT(p->experts >= 1 && p->experts <= EXPERTS_MAX);
    ASSERT(p->k >= 1 && p->k <= EXPERTS_PER_TOKEN_MAX);
    ASSERT(p->groups >= 1 && p->groups <= EXPERT_GROUPS_MAX && p->experts % p->groups == 0);
    bool limited = p->groups > 1;
    uint32_t per_group = p->experts / p->groups;
    ASSERT(!limited || (p->groups_chosen >= 1 && p->groups_chosen <= p->groups));
    ASSERT(p->k <= (limited ? p->groups_chosen * per_group : p->experts));

    float scores[EXPERTS_MAX] = {0}, biased_scores[EXPERTS_MAX];
    if (p->scoring == GATE_SOFTMAX)
        score_softmax(p->experts, logits, scores);
    else
        score_sigmoid(p->experts, logits, scores);
    const float *biased = scores;
    if (bias != NULL) {
        for (uint32_t e = 0; e < p->experts; e++) {
            float score = scores[e] + bias[e];
            biased_scores[e] = isnan(score) ? -INFINITY : score;
        }
        biased = biased_scores;
    }

    uint32_t length = 0;
    if (limited) {
        bool chosen[EXPERT_GROUPS_MAX];
        groups_choose(p, biased, chosen);
        for (uint32_t g = 0; g < p->groups; g++)
            if (chosen[g])
                length = list_offer(biased, g * per_group, per_group, p->k, ret_expert, length);
    } else {
        length = list_offer(biased, 0, p->experts, p->k, ret_expert, length);
    }
    ASSERT(length == p->k);

    uint32_t kept = top_p_keep(p, scores, ret_expert);
    float sum = 0.0f;
    for (uint32_t slot = 0; slot < kept; slot++)
        sum += scores[ret_expert[slot]];
    for (uint32_t slot = 0; slot < kept; slot++) {
        float weight = scores[ret_expert[slot]];
        if (p->normalise)
            weight = weight / (sum + 1e-20f);
        ret_weight[slot] = weight * p->scaling;
    }
    for (uint32_t slot = kept; slot < p->k; slot++) {
        ret_expert[slot] = GATE_UNUSED;
        ret_weight[slot] = 0.0f;
    }
}
