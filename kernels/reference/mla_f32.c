/* Multi-head latent attention (DeepSeek-V2, 2405.04434, section 2.1) in the f32 profile: the
 * documentation of what the other forms compute. The cache holds one latent and one rotated key per
 * position, shared by all heads. Expanded: keys and values of each head are made from the latents.
 * Absorbed: the query was multiplied by the key half of kv_b beforehand and meets the latents
 * themselves; the value half follows outside. Equal in exact arithmetic, different in bits. */
#include "actors/errors.h"
#include "kernels/internal.h"
#include "kernels/rows.h"

/* ---- Absorbed ---- */

struct absorbed {
    const struct mla_shape *shape;
    const struct mla_rows *rows;
    const float *q; /* [rows, heads, q_stride] */
    size_t q_stride;
    float *ret; /* [rows, heads, ret_stride] */
    size_t ret_stride;
};

static float dot(const float *a, const float *b, uint32_t n, float acc) {
    for (uint32_t i = 0; i < n; i++)
        acc += a[i] * b[i];
    return acc;
}

static void absorbed_head(const struct absorbed *job, uint32_t r, uint32_t head) {
    const struct mla_shape *shape = job->shape;
    size_t stride = cache_stride(shape->kv_lora, shape->rope);
    size_t rope_at = activation_stride(shape->kv_lora);
    const float *q = job->q + ((size_t)r * shape->heads + head) * job->q_stride;
    float *ret = job->ret + ((size_t)r * shape->heads + head) * job->ret_stride;
    uint32_t position = job->rows->position[r];
    struct softmax softmax = softmax_start();
    memset(ret, 0, activation_stride(shape->kv_lora) * sizeof(float));

    for (uint32_t b = 0; b <= position / PAGE_TOKENS; b++) {
        const float *page = job->rows->pages[r][b];
        uint32_t visible = mla_visible(position, b);
        float score[PAGE_TOKENS], p[PAGE_TOKENS];
        for (uint32_t j = 0; j < visible; j++) {
            const float *row = page + j * stride;
            score[j] = shape->scale *
                       dot(q + rope_at, row + rope_at, shape->rope, dot(q, row, shape->kv_lora, 0));
        }
        float factor = softmax_block(&softmax, score, visible, p);
        for (uint32_t d = 0; d < shape->kv_lora; d++) {
            float sum = 0;
            for (uint32_t j = 0; j < visible; j++)
                sum += p[j] * page[j * stride + d];
            ret[d] = __builtin_fmaf(ret[d], factor, sum);
        }
    }
    for (uint32_t d = 0; d < shape->kv_lora; d++)
        ret[d] = ret[d] / softmax.sum;
}

static void absorbed_task(void *argument, int part, int parts) {
    numerics_enter();
    const struct absorbed *job = argument;
    uint32_t heads = job->shape->heads;
    size_t items = (size_t)job->rows->rows * heads;
    for (size_t i = part_begin(items, part, parts); i < part_begin(items, part + 1, parts); i++)
        absorbed_head(job, (uint32_t)(i / heads), (uint32_t)(i % heads));
}

void mla_absorbed_f32(const struct mla_shape *shape, const struct mla_rows *rows, const void *q,
                      size_t q_stride, void *ret, size_t ret_stride,
                      const struct parallel *parallel) {
    struct absorbed job = {shape, rows, q, q_stride, ret, ret_stride};
    run_parts(parallel, absorbed_task, &job, (size_t)rows->rows * shape->heads);
}

/* ---- Expanded ---- */

struct expanded {
    const struct mla_shape *shape;
    const struct mla_rows *rows;
    const float *q; /* [rows, heads, q_stride] */
    size_t q_stride;
    float *ret; /* [rows, ret_stride] */
    size_t ret_stride;
    uint32_t row_begin, row_end; /* the rows walked together */
    uint32_t block;
    const float *page;       /* the block's latents and rotated keys */
    const float *key_value;  /* [64, heads, nope | v] of the block */
    struct softmax *softmax; /* [rows, heads] */
};

/* One head, the rows of the group that see the block: accumulates into ret. */
static void expanded_head(const struct expanded *job, uint32_t head) {
    const struct mla_shape *shape = job->shape;
    size_t stride = cache_stride(shape->kv_lora, shape->rope);
    size_t width = (size_t)shape->heads * (shape->nope + shape->v);
    const float *key = job->key_value + (size_t)head * (shape->nope + shape->v);
    const float *value = key + shape->nope;
    const float *rotated_key = job->page + activation_stride(shape->kv_lora);

    for (uint32_t r = job->row_begin; r < job->row_end; r++) {
        uint32_t position = job->rows->position[r];
        if (position / PAGE_TOKENS < job->block)
            continue;
        uint32_t visible = mla_visible(position, job->block);
        const float *q = job->q + ((size_t)r * shape->heads + head) * job->q_stride;
        const float *q_rotated = q + activation_stride(shape->nope);
        float score[PAGE_TOKENS], p[PAGE_TOKENS];
        for (uint32_t j = 0; j < visible; j++)
            score[j] = shape->scale * dot(q_rotated, rotated_key + j * stride, shape->rope,
                                          dot(q, key + j * width, shape->nope, 0));
        struct softmax *softmax = &job->softmax[(size_t)(r - job->row_begin) * shape->heads + head];
        float factor = softmax_block(softmax, score, visible, p);
        float *ret = job->ret + r * job->ret_stride + (size_t)head * shape->v;
        for (uint32_t d = 0; d < shape->v; d++) {
            float sum = 0;
            for (uint32_t j = 0; j < visible; j++)
                sum += p[j] * value[j * width + d];
            ret[d] = __builtin_fmaf(ret[d], factor, sum);
        }
    }
}

static void expanded_task(void *argument, int part, int parts) {
    numerics_enter();
    const struct expanded *job = argument;
    size_t heads = job->shape->heads;
    for (size_t h = part_begin(heads, part, parts); h < part_begin(heads, part + 1, parts); h++)
        expanded_head(job, (uint32_t)h);
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
    for (size_t i = 0; i < states; i++)
        job->softmax[i] = softmax_start();
    for (uint32_t r = job->row_begin; r < job->row_end; r++)
        memset(job->ret + r * job->ret_stride, 0,
               activation_stride(heads * shape->v) * sizeof(float));

    for (job->block = 0; job->block <= last / PAGE_TOKENS; job->block++) {
        job->page = job->rows->pages[job->row_end - 1][job->block];
        matmul_f32(kv_b, job->page, stride, mla_visible(last, job->block), key_value, kv_b->n,
                   parallel);
        run_parts(parallel, expanded_task, job, heads);
    }
    for (uint32_t r = job->row_begin; r < job->row_end; r++)
        for (size_t i = 0; i < heads * shape->v; i++)
            job->ret[r * job->ret_stride + i] /=
                job->softmax[(r - job->row_begin) * heads + i / shape->v].sum;
    scratch_release(mark);
}

void mla_expanded_f32(const struct mla_shape *shape, const struct mla_rows *rows,
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
