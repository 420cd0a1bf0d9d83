/* The gate (router/gate.c): scores, groups, the ordered list of experts and their weights, one
 * block for each row. Same bits: sums are sum_canonical's or one after the other, as on the CPU. */
#include "kernels/cuda/numerics.cuh"

enum { THREADS = 128 };

struct gate_shared {
    float *score, *biased; /* [experts] */
    float *value;          /* [groups] then what one thread tells all */
    uint8_t *open;         /* [experts]: may be chosen */
};

static __device__ float logit_clean(float logit) {
    if (logit != logit)
        return -INFINITY;
    return logit > 3.402823466e+38f ? 3.402823466e+38f : logit;
}

/* The largest of the block's values; every thread gets it. scratch: [THREADS / WARP]. */
static __device__ float block_max(float value, float *scratch) {
    for (int bit = 16; bit > 0; bit /= 2) {
        const float other = __shfl_xor_sync(0xffffffff, value, bit);
        value = other > value ? other : value;
    }
    if (threadIdx.x % WARP == 0)
        scratch[threadIdx.x / WARP] = value;
    __syncthreads();
    for (uint32_t w = 0; w < THREADS / WARP; w++)
        value = scratch[w] > value ? scratch[w] : value;
    __syncthreads();
    return value;
}

static __device__ void score_softmax(uint32_t experts, const float *logits,
                                     const struct gate_shared *at) {
    float max = -INFINITY;
    for (uint32_t e = threadIdx.x; e < experts; e += THREADS) {
        const float logit = logit_clean(logits[e]);
        at->score[e] = logit;
        max = logit > max ? logit : max;
    }
    max = block_max(max, at->value);
    for (uint32_t e = threadIdx.x; e < experts; e += THREADS)
        at->score[e] = max == -INFINITY ? 0.0f : device_exp(at->score[e] - max);
    __syncthreads();
    if (max == -INFINITY)
        return;
    if (threadIdx.x < WARP) {
        const float sum = device_sum(at->score, experts);
        if (threadIdx.x == 0)
            at->value[0] = sum;
    }
    __syncthreads();
    const float sum = at->value[0];
    for (uint32_t e = threadIdx.x; e < experts; e += THREADS)
        at->score[e] = at->score[e] / sum;
    __syncthreads();
}

/* Opens the experts of the best groups; a thread for each group, ties to the lower one. */
static __device__ void groups_choose(const struct gate_cuda *p, const struct gate_shared *at) {
    const uint32_t per_group = p->experts / p->groups;
    for (uint32_t g = threadIdx.x; g < p->groups; g += THREADS) {
        float best = -INFINITY, second = -INFINITY;
        for (uint32_t e = g * per_group; e < (g + 1) * per_group; e++) {
            const float score = at->biased[e];
            if (score > best) {
                second = best;
                best = score;
            } else if (score > second) {
                second = score;
            }
        }
        at->value[g] = p->group_max || per_group < 2 ? best : best + second;
    }
    __syncthreads();
    for (uint32_t g = threadIdx.x; g < p->groups; g += THREADS) {
        uint32_t before = 0; /* groups that are chosen before it */
        for (uint32_t o = 0; o < p->groups; o++)
            before += at->value[o] > at->value[g] || (at->value[o] == at->value[g] && o < g);
        for (uint32_t e = g * per_group; e < (g + 1) * per_group; e++)
            at->open[e] = before < p->groups_chosen;
    }
    __syncthreads();
}

/* The first warp: the open expert with the largest biased score, the lower of equals. */
static __device__ uint32_t best_open(uint32_t experts, const struct gate_shared *at) {
    const uint32_t none = 0xffffffff;
    uint32_t best = none;
    for (uint32_t e = threadIdx.x; e < experts; e += WARP)
        if (at->open[e] && (best == none || at->biased[e] > at->biased[best]))
            best = e;
    for (int bit = 16; bit > 0; bit /= 2) {
        const uint32_t other = __shfl_xor_sync(0xffffffff, best, bit);
        if (other == none)
            continue;
        if (best == none || at->biased[other] > at->biased[best] ||
            (at->biased[other] == at->biased[best] && other < best))
            best = other;
    }
    return best;
}

/* One thread: how many of the chosen top-p keeps, and the weights. */
static __device__ void weigh(const struct gate_cuda *p, const float *score, float sum_of_all,
                             uint16_t *expert, float *weight) {
    uint32_t kept = p->k;
    if (p->top_p > 0.0f && p->top_p < 1.0f) {
        const float wanted = p->top_p * sum_of_all;
        float mass = 0.0f;
        for (uint32_t slot = 0; slot < p->k && kept == p->k; slot++) {
            mass = mass + score[expert[slot]];
            if (mass >= wanted)
                kept = slot + 1;
        }
    }
    float sum = 0.0f;
    for (uint32_t slot = 0; slot < kept; slot++)
        sum = sum + score[expert[slot]];
    for (uint32_t slot = 0; slot < p->k; slot++) {
        if (slot >= kept) {
            expert[slot] = 0xffff; /* GATE_UNUSED */
            weight[slot] = 0.0f;
            continue;
        }
        float value = score[expert[slot]];
        if (p->normalise)
            value = value / (sum + 1e-20f);
        weight[slot] = value * p->scaling;
    }
}

/* Score to choose by: the model's own bias and the row's are added first, as on the CPU. */
static __device__ float biased_score(float score, const float *bias, const float *delta,
                                     uint32_t e) {
    if (delta != NULL)
        score = score + ((bias != NULL ? bias[e] : 0.0f) + delta[e]);
    else if (bias != NULL)
        score = score + bias[e];
    return score != score ? -INFINITY : score;
}

static __global__ void gate_kernel(struct gate_cuda p, struct gate_rows_cuda per_row,
                                   const float *logits, size_t logits_stride, const float *bias,
                                   uint16_t *ret_expert, float *ret_weight) {
    DYNAMIC_SHARED(memory);
    struct gate_shared at;
    at.score = (float *)memory;
    at.biased = at.score + p.experts;
    at.value = at.biased + p.experts;
    at.open = (uint8_t *)(at.value + 64);
    const size_t r = blockIdx.x;
    const float *row = logits + r * logits_stride;
    if (per_row.live != NULL && r >= *per_row.live) {
        for (uint32_t slot = threadIdx.x; slot < p.k; slot += THREADS) {
            ret_expert[r * p.k + slot] = 0xffff; /* GATE_UNUSED */
            ret_weight[r * p.k + slot] = 0.0f;
        }
        return;
    }
    const float *delta = NULL;
    if (per_row.delta_of != NULL && per_row.delta_of[r] != 0xffffffff)
        delta = per_row.delta + per_row.delta_of[r] * per_row.delta_stride;
    if (p.softmax) {
        score_softmax(p.experts, row, &at);
    } else {
        for (uint32_t e = threadIdx.x; e < p.experts; e += THREADS)
            at.score[e] = 1.0f / (1.0f + device_exp(-logit_clean(row[e])));
        __syncthreads();
    }
    for (uint32_t e = threadIdx.x; e < p.experts; e += THREADS) {
        at.biased[e] = biased_score(at.score[e], bias, delta, e);
        at.open[e] = 1;
    }
    __syncthreads();
    if (p.groups > 1)
        groups_choose(&p, &at);
    if (threadIdx.x >= WARP)
        return;
    const float sum = device_sum(at.score, p.experts);
    uint16_t *expert = ret_expert + r * p.k;
    for (uint32_t slot = 0; slot < p.k; slot++) {
        const uint32_t best = best_open(p.experts, &at);
        __syncwarp();
        if (threadIdx.x == 0) {
            at.open[best] = 0;
            expert[slot] = (uint16_t)best;
        }
        __syncwarp();
    }
    if (threadIdx.x == 0)
        weigh(&p, at.score, sum, expert, ret_weight + r * p.k);
}

int gate_rows_cuda(void *stream, const struct gate_cuda *parameters,
                   const struct gate_rows_cuda *per_row, const float *logits, size_t logits_stride,
                   const float *bias, uint32_t rows, uint16_t *ret_expert, float *ret_weight) {
    if (rows == 0)
        return 0;
    const size_t shared =
        (2 * (size_t)parameters->experts + 64) * sizeof(float) + parameters->experts;
    const struct gate_cuda p = *parameters;
    const struct gate_rows_cuda own = *per_row;
    LAUNCH(gate_kernel, rows, THREADS, shared, stream, p, own, logits, logits_stride, bias,
           ret_expert, ret_weight);
    return launch_result();
}

int gate_cuda(void *stream, const struct gate_cuda *parameters, const float *logits,
              size_t logits_stride, const float *bias, uint32_t rows, uint16_t *ret_expert,
              float *ret_weight) {
    const struct gate_rows_cuda none = {NULL, NULL, 0, NULL};
    return gate_rows_cuda(stream, parameters, &none, logits, logits_stride, bias, rows, ret_expert,
                          ret_weight);
}
