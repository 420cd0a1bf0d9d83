/* Multi-head latent attention in the bf16 profile, scalar form: mla_f32.c with every dot product
 * the canonical one over BF16 inputs, the probabilities rounded to BF16 where they meet the values.
 * Defines the bits of the vector forms. */
#include "actors/errors.h"
#include "kernels/internal.h"
#include "kernels/rows.h"

enum { HALVES = PAGE_TOKENS / BLOCK_INPUTS };

/* acc[d] = acc[d] * factor + sum over the block's positions of p[j] * value[j][d], d < n. */
static void accumulate(float *acc, float factor, const float p[PAGE_TOKENS], const bf16 *value,
                       size_t value_stride, uint32_t n) {
    bf16 rounded[PAGE_TOKENS];
    for (uint32_t j = 0; j < PAGE_TOKENS; j++)
        rounded[j] = round_bf16(p[j]);
    for (uint32_t d = 0; d < n; d++) {
        float sum = 0;
        for (uint32_t half = 0; half < HALVES; half++) {
            uint32_t first = half * BLOCK_INPUTS;
            sum =
                add_canonical(sum, dot_bf16_block(value + first * value_stride + d,
                                                  2 * value_stride, value_stride, rounded + first));
        }
        acc[d] = fma_canonical(acc[d], factor, sum);
    }
}

/* ret[d] = BF16(acc[d] / sum). */
static void finish(bf16 *ret, const float *acc, uint32_t n, float sum) {
    for (uint32_t d = 0; d < n; d++)
        ret[d] = round_bf16(acc[d] / sum);
}

/* ---- Absorbed ---- */

struct absorbed {
    const struct mla_shape *shape;
    const struct mla_rows *rows;
    const bf16 *q; /* [rows, heads, q_stride] */
    size_t q_stride;
    bf16 *ret; /* [rows, heads, ret_stride] */
    size_t ret_stride;
};

static void absorbed_head(const struct absorbed *job, uint32_t r, uint32_t head, float *acc) {
    const struct mla_shape *shape = job->shape;
    size_t stride = cache_stride(shape->kv_lora, shape->rope);
    const bf16 *q = job->q + ((size_t)r * shape->heads + head) * job->q_stride;
    bf16 *ret = job->ret + ((size_t)r * shape->heads + head) * job->ret_stride;
    uint32_t position = job->rows->position[r];
    struct softmax softmax = softmax_start();
    memset(acc, 0, shape->kv_lora * sizeof(float));

    for (uint32_t b = 0; b <= position / PAGE_TOKENS; b++) {
        const bf16 *page = job->rows->pages[r][b];
        uint32_t visible = mla_visible(position, b);
        float score[PAGE_TOKENS], p[PAGE_TOKENS];
        for (uint32_t j = 0; j < visible; j++)
            score[j] =
                shape->scale * dot_bf16(page + j * stride, q, (uint32_t)(stride / BLOCK_INPUTS));
        float factor = softmax_block(&softmax, score, visible, p);
        accumulate(acc, factor, p, page, stride, shape->kv_lora);
    }
    memset(ret, 0, activation_stride(shape->kv_lora) * sizeof(bf16));
    finish(ret, acc, shape->kv_lora, softmax.sum);
}

static void absorbed_task(void *argument, int part, int parts) {
    numerics_enter();
    const struct absorbed *job = argument;
    uint32_t heads = job->shape->heads;
    size_t items = (size_t)job->rows->rows * heads;
    struct scratch_mark mark = scratch_mark();
    float *acc = scratch_take(job->shape->kv_lora, sizeof(float));
    for (size_t i = part_begin(items, part, parts); i < part_begin(items, part + 1, parts); i++)
        absorbed_head(job, (uint32_t)(i / heads), (uint32_t)(i % heads), acc);
    scratch_release(mark);
}

void mla_absorbed_bf16_scalar(const struct mla_shape *shape, const struct mla_rows *rows,
                              const void *q, size_t q_stride, void *ret, size_t ret_stride,
                              const struct parallel *parallel) {
    struct absorbed job = {shape, rows, q, q_stride, ret, ret_stride};
    run_parts(parallel, absorbed_task, &job, (size_t)rows->rows * shape->heads);
}

/* ---- Expanded ---- */

struct expanded {
    const struct mla_shape *shape;
    const struct mla_rows *rows;
    const bf16 *q; /* [rows, heads, q_stride] */
    size_t q_stride;
    bf16 *ret; /* [rows, ret_stride] */
    size_t ret_stride;
    uint32_t row_begin, row_end; /* the rows walked together */
    uint32_t block, positions;   /* of the block that the last row sees */
    const bf16 *page;            /* the block's latents and rotated keys */
    const float *key_value;      /* [positions, heads, nope | v] of the block */
    struct softmax *softmax;     /* [rows, heads] */
    float *acc;                  /* [rows, heads, v] */
};

/* Keys of one head, [64][nope padded | rope padded], and its values, [64][v]; zeros where nothing
 * is seen. */
static void expanded_pack(const struct expanded *job, uint32_t head, bf16 *key, bf16 *value) {
    const struct mla_shape *shape = job->shape;
    size_t stride = cache_stride(shape->kv_lora, shape->rope);
    size_t key_stride = cache_stride(shape->nope, shape->rope);
    size_t width = (size_t)shape->heads * (shape->nope + shape->v);
    memset(key, 0, PAGE_TOKENS * key_stride * sizeof(bf16));
    memset(value, 0, (size_t)PAGE_TOKENS * shape->v * sizeof(bf16));
    for (uint32_t j = 0; j < job->positions; j++) {
        const float *from = job->key_value + j * width + (size_t)head * (shape->nope + shape->v);
        for (uint32_t i = 0; i < shape->nope; i++)
            key[j * key_stride + i] = round_bf16(from[i]);
        for (uint32_t i = 0; i < shape->v; i++)
            value[(size_t)j * shape->v + i] = round_bf16(from[shape->nope + i]);
        memcpy(key + j * key_stride + activation_stride(shape->nope),
               job->page + j * stride + activation_stride(shape->kv_lora),
               shape->rope * sizeof(bf16));
    }
}

static void expanded_head(const struct expanded *job, uint32_t head, const bf16 *key,
                          const bf16 *value) {
    const struct mla_shape *shape = job->shape;
    size_t key_stride = cache_stride(shape->nope, shape->rope);
    for (uint32_t r = job->row_begin; r < job->row_end; r++) {
        uint32_t position = job->rows->position[r];
        if (position / PAGE_TOKENS < job->block)
            continue;
        uint32_t visible = mla_visible(position, job->block);
        const bf16 *q = job->q + ((size_t)r * shape->heads + head) * job->q_stride;
        size_t state = (size_t)(r - job->row_begin) * shape->heads + head;
        float score[PAGE_TOKENS], p[PAGE_TOKENS];
        for (uint32_t j = 0; j < visible; j++)
            score[j] = shape->scale *
                       dot_bf16(key + j * key_stride, q, (uint32_t)(key_stride / BLOCK_INPUTS));
        float factor = softmax_block(&job->softmax[state], score, visible, p);
        accumulate(job->acc + state * shape->v, factor, p, value, shape->v, shape->v);
    }
}

static void expanded_task(void *argument, int part, int parts) {
    numerics_enter();
    const struct expanded *job = argument;
    const struct mla_shape *shape = job->shape;
    size_t heads = shape->heads;
    struct scratch_mark mark = scratch_mark();
    bf16 *key = scratch_take(PAGE_TOKENS * cache_stride(shape->nope, shape->rope), sizeof(bf16));
    bf16 *value = scratch_take((size_t)PAGE_TOKENS * shape->v, sizeof(bf16));
    for (size_t h = part_begin(heads, part, parts); h < part_begin(heads, part + 1, parts); h++) {
        expanded_pack(job, (uint32_t)h, key, value);
        expanded_head(job, (uint32_t)h, key, value);
    }
    scratch_release(mark);
}

static void expanded_group(struct expanded *job, const struct matrix *kv_b,
                           const struct parallel *parallel) {
    const struct mla_shape *shape = job->shape;
    size_t stride = cache_stride(shape->kv_lora, shape->rope), heads = shape->heads;
    size_t states = (size_t)(job->row_end - job->row_begin) * heads;
    uint32_t last = job->rows->position[job->row_end - 1];
    struct scratch_mark mark = scratch_mark();
    float *key_value = scratch_take((size_t)PAGE_TOKENS * kv_b->n, sizeof(float));
    job->key_value = key_value;
    job->softmax = scratch_take(states, sizeof(struct softmax));
    job->acc = scratch_take(states * shape->v, sizeof(float));
    for (size_t i = 0; i < states; i++)
        job->softmax[i] = softmax_start();
    memset(job->acc, 0, states * shape->v * sizeof(float));

    for (job->block = 0; job->block <= last / PAGE_TOKENS; job->block++) {
        job->page = job->rows->pages[job->row_end - 1][job->block];
        job->positions = mla_visible(last, job->block);
        matmul_bf16_scalar(kv_b, job->page, stride, job->positions, key_value, kv_b->n, parallel);
        run_parts(parallel, expanded_task, job, heads);
    }
    for (uint32_t r = job->row_begin; r < job->row_end; r++) {
        bf16 *ret = job->ret + r * job->ret_stride;
        memset(ret, 0, activation_stride(heads * shape->v) * sizeof(bf16));
        for (size_t h = 0; h < heads; h++) {
            size_t state = (r - job->row_begin) * heads + h;
            finish(ret + h * shape->v, job->acc + state * shape->v, shape->v,
                   job->softmax[state].sum);
        }
    }
    scratch_release(mark);
}

void mla_expanded_bf16_scalar(const struct mla_shape *shape, const struct mla_rows *rows,
                              const struct matrix *kv_b, const void *q, size_t q_stride, void *ret,
                              size_t ret_stride, const struct parallel *parallel) {
    ASSERT(kv_b->n == (size_t)shape->heads * (shape->nope + shape->v));
    struct expanded job = {shape, rows, q, q_stride, ret, ret_stride, .row_begin = 0};
    uint32_t group = mla_expanded_group((size_t)shape->heads * (shape->v + 2));
    for (; job.row_begin < rows->rows; job.row_begin = job.row_end) {
        uint32_t left = rows->rows - job.row_begin;
        job.row_end = job.row_begin + (left < group ? left : group);
        expanded_group(&job, kv_b, parallel);
    }
}
