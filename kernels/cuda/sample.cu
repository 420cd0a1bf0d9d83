/* Sampling (engine/sample.h, engine/sample.c): one block for each row of logits. Same bits as on
 * the CPU, draws included: the counter-based generator is the same, and the sums that a draw
 * depends on are added in double precision one term after the other, in the same order. That order
 * is what makes a token the same wherever it is drawn; it costs one chain of additions over the
 * vocabulary for each sum, which only one thread walks while the others fetch ahead. */
#include "kernels/cuda/numerics.cuh"

#include "engine/sample.h"

#ifndef INFINITY
#include <math.h>
#endif

enum { THREADS = 512, TOP_MAX = 20 };
#define TILE            2048u
#define TEMPERATURE_MIN 1e-5f

/* Bytes that one row needs in global memory: logits changed by the request, keys for sorting (the
 * vocabulary rounded up to a power of two), marks. */
static __host__ __device__ uint32_t sort_size(uint32_t vocabulary) {
    uint32_t size = TILE;
    while (size < vocabulary)
        size *= 2;
    return size;
}
size_t sample_work_bytes_cuda(uint32_t vocabulary) {
    const size_t bytes =
        (size_t)sort_size(vocabulary) * 8 + (size_t)vocabulary * 4 + (size_t)vocabulary;
    return (bytes + 255) & ~(size_t)255;
}

struct row_work {
    uint64_t *key;    /* [sort_size] */
    float *weight;    /* [vocabulary] */
    uint8_t *touched; /* [vocabulary] */
};

struct shared {
    float tile[TILE];
    float value[THREADS / WARP];
    uint32_t index[THREADS / WARP];
    double sum;
    uint32_t token;
    uint32_t flag;
};

/* ---- Over the whole row ---- */

/* The largest value's lowest index, among those that `skip` does not exclude: every thread gets it.
 * Values equal to -infinity count; vocabulary at least 1. */
static __device__ uint32_t block_largest(const float *x, uint32_t n, float below, uint32_t after,
                                         struct shared *s) {
    /* (below, after): only elements that come later than (value below, index after) in descending
     * order, ties to the lower index. */
    uint32_t best = 0xffffffff;
    float value = -INFINITY;
    for (uint32_t i = threadIdx.x; i < n; i += THREADS) {
        const float v = x[i];
        const bool later = v < below || (v == below && i > after);
        if (later && (best == 0xffffffff || v > value)) {
            best = i;
            value = v;
        }
    }
    for (int bit = 16; bit > 0; bit /= 2) {
        const uint32_t other = __shfl_xor_sync(0xffffffff, best, bit);
        const float v = __shfl_xor_sync(0xffffffff, value, bit);
        if (other != 0xffffffff &&
            (best == 0xffffffff || v > value || (v == value && other < best))) {
            best = other;
            value = v;
        }
    }
    if (threadIdx.x % WARP == 0) {
        s->index[threadIdx.x / WARP] = best;
        s->value[threadIdx.x / WARP] = value;
    }
    __syncthreads();
    best = 0xffffffff;
    value = -INFINITY;
    for (uint32_t w = 0; w < THREADS / WARP; w++) {
        const uint32_t other = s->index[w];
        const float v = s->value[w];
        if (other != 0xffffffff &&
            (best == 0xffffffff || v > value || (v == value && other < best))) {
            best = other;
            value = v;
        }
    }
    __syncthreads();
    return best;
}

static __device__ uint32_t largest(const float *x, uint32_t n, struct shared *s) {
    return block_largest(x, n, INFINITY, 0xffffffff, s); /* +infinity does not occur */
}

/* sum_canonical over a row in global memory: 16 lanes, as device_sum. */
static __device__ float canonical_sum(const float *x, uint32_t n, struct shared *s) {
    if (threadIdx.x < WARP) {
        const float sum = device_sum(x, n);
        if (threadIdx.x == 0)
            s->value[0] = sum;
    }
    __syncthreads();
    const float sum = s->value[0];
    __syncthreads();
    return sum;
}

/* The sum of a row in double precision, one term after the other. */
static __device__ double sum_in_order(const float *x, uint32_t n, struct shared *s) {
    double sum = 0;
    for (uint32_t first = 0; first < n; first += TILE) {
        const uint32_t count = n - first < TILE ? n - first : TILE;
        for (uint32_t i = threadIdx.x; i < count; i += THREADS)
            s->tile[i] = x[first + i];
        __syncthreads();
        if (threadIdx.x == 0)
            for (uint32_t i = 0; i < count; i++)
                sum += (double)s->tile[i];
        __syncthreads();
    }
    if (threadIdx.x == 0)
        s->sum = sum;
    __syncthreads();
    sum = s->sum;
    __syncthreads();
    return sum;
}

/* ---- What the request changes (modify in sample.c) ---- */

static __device__ void penalise(float *logit, float penalty) {
    *logit = *logit > 0 ? *logit / penalty : *logit * penalty;
}

static __device__ void modify(const struct sample_spec *spec, const uint32_t *words,
                              const struct row_work *work) {
    const uint32_t *bias = words + spec->first_word;
    const uint32_t *prompt = bias + 2 * (size_t)spec->bias_count;
    const uint32_t *output = prompt + spec->prompt_count;
    if (threadIdx.x == 0) /* a token may have several */
        for (uint32_t i = 0; i < spec->bias_count; i++)
            work->weight[bias[2 * i]] =
                work->weight[bias[2 * i]] + float_from_bits(bias[2 * i + 1]);
    __syncthreads();
    if (spec->repetition_penalty != 1.0f) { /* once for each token, whatever the lists hold */
        if (threadIdx.x == 0) {
            for (uint32_t i = 0; i < spec->prompt_count; i++)
                if (!work->touched[prompt[i]]) {
                    work->touched[prompt[i]] = 1;
                    penalise(&work->weight[prompt[i]], spec->repetition_penalty);
                }
            for (uint32_t i = 0; i < spec->output_count; i++)
                if (!work->touched[output[2 * i]]) {
                    work->touched[output[2 * i]] = 1;
                    penalise(&work->weight[output[2 * i]], spec->repetition_penalty);
                }
        }
        __syncthreads();
    }
    if (threadIdx.x == 0)
        for (uint32_t i = 0; i < spec->output_count; i++) {
            float *logit = &work->weight[output[2 * i]];
            *logit = *logit - spec->frequency_penalty * (float)output[2 * i + 1];
            *logit = *logit - spec->presence_penalty;
        }
    __syncthreads();
}

/* ---- The draw ---- */

/* Keys in ascending order: descending weight, then ascending token. Weights are not negative. */
static __device__ uint64_t key_of(float weight, uint32_t token) {
    return (uint64_t)(0xffffffffu - float_bits(weight)) << 32 | token;
}
static __device__ float weight_of(uint64_t key) {
    return float_from_bits(0xffffffffu - (uint32_t)(key >> 32));
}

/* Bitonic sort of a power of two of keys in global memory. */
static __device__ void sort_keys(uint64_t *key, uint32_t size) {
    for (uint32_t run = 2; run <= size; run *= 2)
        for (uint32_t step = run / 2; step > 0; step /= 2) {
            for (uint32_t i = threadIdx.x; i < size / 2; i += THREADS) {
                const uint32_t low = (i / step) * 2 * step + i % step, high = low + step;
                const bool ascending = (low & run) == 0 || run == size;
                const uint64_t a = key[low], b = key[high];
                if ((a > b) == ascending) {
                    key[low] = b;
                    key[high] = a;
                }
            }
            __syncthreads();
        }
}

/* The last token that top_k and top_p keep; last_kept in sample.c. */
static __device__ uint32_t last_kept(const struct sample_spec *spec, uint32_t vocabulary,
                                     double sum, const struct row_work *work, struct shared *s) {
    const uint32_t size = sort_size(vocabulary);
    for (uint32_t i = threadIdx.x; i < size; i += THREADS)
        work->key[i] = i < vocabulary && work->weight[i] > 0 ? key_of(work->weight[i], i)
                                                             : 0xffffffffffffffffull;
    __syncthreads();
    sort_keys(work->key, size);
    if (threadIdx.x == 0) {
        const bool limited = spec->top_k > 0 && (uint32_t)spec->top_k < vocabulary;
        const uint32_t most = limited ? (uint32_t)spec->top_k : vocabulary;
        uint32_t count = 0;
        if (limited) { /* top_p takes its share of what top_k leaves */
            sum = 0;
            for (; count < most && work->key[count] != 0xffffffffffffffffull; count++)
                sum += (double)weight_of(work->key[count]);
        } else {
            count = vocabulary;
        }
        const double wanted = (double)spec->top_p * sum;
        double mass = 0;
        uint32_t token = 0;
        for (uint32_t i = 0; i < count && work->key[i] != 0xffffffffffffffffull; i++) {
            token = (uint32_t)work->key[i];
            mass += (double)weight_of(work->key[i]);
            if (spec->top_p < 1.0f && mass >= wanted)
                break;
        }
        s->token = token;
    }
    __syncthreads();
    const uint32_t token = s->token;
    __syncthreads();
    return token;
}

/* Philox-4x32-10, first word: sample_random in sample.c. */
static __device__ float random_of(uint64_t seed, uint64_t counter) {
    uint32_t c0 = (uint32_t)counter, c1 = (uint32_t)(counter >> 32), c2 = 0, c3 = 0;
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        const uint64_t p0 = 0xd2511f53ull * c0, p1 = 0xcd9e8d57ull * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)p0;
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    return (float)(c0 >> 8) * 0x1p-24f;
}

/* The first kept token, in ascending order, at which the running sum exceeds `wanted`. */
static __device__ uint32_t walk(const float *weight, uint32_t vocabulary, double wanted,
                                struct shared *s) {
    double mass = 0;
    if (threadIdx.x == 0) {
        s->token = 0;
        s->flag = 0;
    }
    __syncthreads();
    for (uint32_t first = 0; first < vocabulary; first += TILE) {
        const uint32_t count = vocabulary - first < TILE ? vocabulary - first : TILE;
        for (uint32_t i = threadIdx.x; i < count; i += THREADS)
            s->tile[i] = weight[first + i];
        __syncthreads();
        if (threadIdx.x == 0)
            for (uint32_t i = 0; i < count && !s->flag; i++)
                if (s->tile[i] != 0) {
                    s->token = first + i;
                    mass += (double)s->tile[i];
                    s->flag = mass > wanted;
                }
        __syncthreads();
        if (s->flag)
            break;
    }
    const uint32_t token = s->token;
    __syncthreads();
    return token;
}

static __device__ uint32_t draw(const struct sample_spec *spec, uint32_t vocabulary,
                                const struct row_work *work, struct shared *s) {
    float *weight = work->weight;
    const float max = weight[largest(weight, vocabulary, s)];
    if (max == -INFINITY)
        return 0;
    __syncthreads();
    for (uint32_t t = threadIdx.x; t < vocabulary; t += THREADS) {
        const float w = device_exp((weight[t] - max) / spec->temperature);
        weight[t] = w < spec->min_p ? 0 : w;
    }
    __syncthreads();
    const bool limited = spec->top_k > 0 && (uint32_t)spec->top_k < vocabulary;
    double sum = limited && spec->top_p >= 1.0f ? 0 : sum_in_order(weight, vocabulary, s);
    if (limited || spec->top_p < 1.0f) {
        const uint32_t last = last_kept(spec, vocabulary, sum, work, s);
        const float least = weight[last];
        __syncthreads();
        for (uint32_t t = threadIdx.x; t < vocabulary; t += THREADS)
            if (weight[t] < least || (weight[t] == least && t > last))
                weight[t] = 0;
        __syncthreads();
        sum = sum_in_order(weight, vocabulary, s);
    }
    return walk(weight, vocabulary, (double)random_of(spec->seed, spec->counter) * sum, s);
}

static __device__ uint32_t choose(const struct sample_spec *spec, const uint32_t *words,
                                  const float *logits, uint32_t vocabulary,
                                  const struct row_work *work, struct shared *s) {
    const bool modified =
        spec->bias_count != 0 || spec->prompt_count != 0 || spec->output_count != 0;
    const bool greedy = spec->temperature < TEMPERATURE_MIN;
    if (greedy && !modified)
        return largest(logits, vocabulary, s);
    for (uint32_t t = threadIdx.x; t < vocabulary; t += THREADS) {
        work->weight[t] = logits[t];
        work->touched[t] = 0;
    }
    __syncthreads();
    if (modified)
        modify(spec, words, work);
    return greedy ? largest(work->weight, vocabulary, s) : draw(spec, vocabulary, work, s);
}

/* ---- Log-probabilities ---- */

static __device__ uint32_t count_larger(const float *logits, uint32_t vocabulary, float logit,
                                        struct shared *s) {
    uint32_t larger = 0;
    for (uint32_t t = threadIdx.x; t < vocabulary; t += THREADS)
        larger += logits[t] > logit;
    for (int bit = 16; bit > 0; bit /= 2)
        larger += __shfl_xor_sync(0xffffffff, larger, bit);
    if (threadIdx.x % WARP == 0)
        s->index[threadIdx.x / WARP] = larger;
    __syncthreads();
    larger = 0;
    for (uint32_t w = 0; w < THREADS / WARP; w++)
        larger += s->index[w];
    __syncthreads();
    return larger;
}

static __device__ void logprobs(const struct sample_spec *spec, const float *logits,
                                uint32_t vocabulary, const struct row_work *work, struct shared *s,
                                struct sample_result *ret, uint32_t *ret_top) {
    uint32_t at = largest(logits, vocabulary, s);
    const float max = logits[at];
    float log_sum = 0;
    if (max != -INFINITY) {
        for (uint32_t t = threadIdx.x; t < vocabulary; t += THREADS)
            work->weight[t] = device_exp(logits[t] - max);
        __syncthreads();
        log_sum = device_log(canonical_sum(work->weight, vocabulary, s));
    }
    if (spec->flags & (SAMPLE_DRAW | SAMPLE_SCORE)) {
        const float logit = logits[ret->token];
        const uint32_t larger = count_larger(logits, vocabulary, logit, s);
        if (threadIdx.x == 0) {
            ret->logprob = logit == -INFINITY ? -INFINITY : (logit - max) - log_sum;
            ret->rank = 1 + larger;
        }
    }
    if (!(spec->flags & SAMPLE_LOGPROBS))
        return;
    const uint32_t top = spec->top < vocabulary ? spec->top : vocabulary;
    for (uint32_t i = 0; i < top; i++) {
        if (threadIdx.x == 0) {
            const float logit = logits[at];
            ret_top[2 * i] = at;
            ret_top[2 * i + 1] =
                float_bits(logit == -INFINITY ? -INFINITY : (logit - max) - log_sum);
        }
        if (i + 1 < top)
            at = block_largest(logits, vocabulary, logits[at], at, s);
    }
    if (threadIdx.x == 0)
        ret->top = top;
}

static __global__ void sample_kernel(const struct sample_spec *specs, const uint32_t *words,
                                     const float *logits, size_t logits_stride, uint32_t vocabulary,
                                     uint8_t *work_memory, size_t work_stride,
                                     struct sample_result *ret, uint32_t *ret_top) {
    DYNAMIC_SHARED(memory);
    struct shared *s = (struct shared *)memory;
    const size_t r = blockIdx.x;
    const struct sample_spec *spec = &specs[r];
    const float *row = logits + r * logits_stride;
    struct row_work work;
    work.key = (uint64_t *)(work_memory + r * work_stride);
    work.weight = (float *)(work.key + sort_size(vocabulary));
    work.touched = (uint8_t *)(work.weight + vocabulary);
    uint32_t token = spec->flags & SAMPLE_SCORE ? spec->target : 0;
    if (spec->flags & SAMPLE_DRAW)
        token = choose(spec, words, row, vocabulary, &work, s);
    if (threadIdx.x == 0) {
        ret[r].token = token;
        ret[r].logprob = 0;
        ret[r].rank = ret[r].top = ret[r].first_word = ret[r].logits = 0;
    }
    __syncthreads();
    if (spec->flags & (SAMPLE_LOGPROBS | SAMPLE_SCORE))
        logprobs(spec, row, vocabulary, &work, s, &ret[r], ret_top + r * 2 * TOP_MAX);
}

/* NaN logits become -infinity and +infinity the largest number, as in sampler_engine.c. */
static __global__ void clean_kernel(float *logits, size_t stride, uint32_t rows, uint32_t n) {
    const uint32_t i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= n)
        return;
    for (size_t r = blockIdx.y; r < rows; r += gridDim.y) {
        float *at = &logits[r * stride + i];
        if (*at != *at)
            *at = -INFINITY;
        else if (*at > 3.402823466e+38f)
            *at = 3.402823466e+38f;
    }
}

int sample_cuda(void *stream, const struct sample_spec *specs, const uint32_t *words, float *logits,
                size_t logits_stride, uint32_t vocabulary, uint32_t rows, void *work,
                struct sample_result *ret, uint32_t *ret_top) {
    if (rows == 0)
        return 0;
    LAUNCH(clean_kernel, dim3((vocabulary + THREADS - 1) / THREADS, rows < 65535 ? rows : 65535),
           THREADS, 0, stream, logits, logits_stride, rows, vocabulary);
    LAUNCH(sample_kernel, rows, THREADS, sizeof(struct shared), stream, specs, words, logits,
           logits_stride, vocabulary, (uint8_t *)work, sample_work_bytes_cuda(vocabulary), ret,
           ret_top);
    return launch_result();
}
