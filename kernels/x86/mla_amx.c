/* Multi-head latent attention in the bf16 profile with AMX: cuts the work of a call into sets of 16
 * queries and blocks of 64 positions, prepares what several sets share once, and has mla_tile_amx.c
 * do them. The bits of reference/mla_bf16.c. */
#include "kernels/x86/mla_amx.h"

#include "actors/errors.h"
#include "kernels/x86/mla_avx512.h"

/* Multiplications that are worth waking another thread for. */
enum { PART_WORK_MIN = 2 << 20 };

static void run_worthwhile(const struct parallel *parallel,
                           void (*task)(void *argument, int part, int parts), void *argument,
                           size_t items, double work) {
    struct parallel narrow = *parallel;
    if (narrow.width > 1 && work < (double)PART_WORK_MIN * narrow.width)
        narrow.width = work < 2.0 * PART_WORK_MIN ? 1 : (int)(work / PART_WORK_MIN);
    run_parts(&narrow, task, argument, items);
}

/* Elements of packed queries, keys `blocks` blocks of 32 wide. */
static size_t query_elements(size_t width) {
    return width * QUERIES;
}

/* ---- Absorbed: the queries of all heads, and of neighbouring rows of the same sequence, meet the
 * same latents, which are the keys, and the values, as they lie in the cache ---- */

enum { RUN_SETS = 16 }; /* that share packed values */

struct absorbed {
    const struct mla_shape *shape;
    const struct mla_rows *rows;
    const bf16 *q; /* [rows, heads, q_stride] */
    size_t q_stride;
    bf16 *ret; /* [rows, heads, ret_stride] */
    size_t ret_stride;
};

/* Queries [begin, end) of rows x heads, all of one page table; `after`: the first page of whoever
 * comes next, or NULL. */
static void absorbed_run(const struct absorbed *job, size_t begin, size_t end, const bf16 *after) {
    const struct mla_shape *shape = job->shape;
    const size_t stride = cache_stride(shape->kv_lora, shape->rope);
    const uint32_t blocks = (uint32_t)(stride / BLOCK_INPUTS);
    const void *const *pages = job->rows->pages[begin / shape->heads];
    const uint32_t chunks = (shape->kv_lora + 15) / 16;
    const struct scratch_mark mark = scratch_mark();
    bf16 *values = scratch_take(amx_values(chunks), sizeof(bf16));
    struct amx_queries *sets = scratch_take(RUN_SETS, sizeof *sets);
    uint32_t count = 0, last = 0;
    for (size_t i = begin; i < end; count++) {
        ASSERT(count < RUN_SETS);
        struct amx_queries *set = &sets[count];
        const uint32_t queries = end - i < QUERIES ? (uint32_t)(end - i) : QUERIES;
        bf16 *q = scratch_take(query_elements(stride), sizeof(bf16));
        set->acc = scratch_take((size_t)chunks * QUERIES * 16, sizeof(float));
        set->q = q;
        amx_queries_start(set, queries, chunks);
        keys_pack(q, blocks, 0, job->q + i * job->q_stride, job->q_stride, queries, blocks);
        for (uint32_t m = 0; m < queries; m++, i++) {
            set->position[m] = job->rows->position[i / shape->heads];
            last = set->position[m] > last ? set->position[m] : last;
        }
    }
    amx_attend_enter();
    for (uint32_t b = 0; b <= last / PAGE_TOKENS; b++) {
        const bf16 *page = pages[b];
        const struct amx_block block = {b,      {page, NULL}, {stride, 0}, {blocks, 0},
                                        values, chunks,       shape->scale};
        const bf16 *next = b < last / PAGE_TOKENS ? pages[b + 1] : after;
        amx_values_pack(values, chunks, page, stride, mla_visible(last, b), shape->kv_lora, next);
        for (uint32_t s = 0; s < count; s++)
            amx_attend(&sets[s], &block);
    }
    amx_attend_leave();
    for (size_t i = begin; i < end; i++) {
        bf16 *ret = job->ret + i * job->ret_stride;
        const size_t n = shape->kv_lora;
        amx_queries_finish(&sets[(i - begin) / QUERIES], (uint32_t)((i - begin) % QUERIES),
                           shape->kv_lora, ret);
        memset(ret + n, 0, (activation_stride(n) - n) * sizeof(bf16));
    }
    scratch_release(mark);
}

static void absorbed_task(void *argument, int part, int parts) {
    numerics_enter();
    const struct absorbed *job = argument;
    const size_t heads = job->shape->heads, items = job->rows->rows * heads;
    const size_t end = part_begin(items, part + 1, parts);
    for (size_t i = part_begin(items, part, parts), next; i < end; i = next) {
        const size_t limit = end - i < RUN_SETS * QUERIES ? end : i + RUN_SETS * QUERIES;
        for (next = i + 1; next < limit; next++)
            if (job->rows->pages[next / heads] != job->rows->pages[i / heads])
                break;
        absorbed_run(job, i, next, next < end ? job->rows->pages[next / heads][0] : NULL);
    }
}

void mla_absorbed_bf16_amx(const struct mla_shape *shape, const struct mla_rows *rows,
                           const void *q, size_t q_stride, void *ret, size_t ret_stride,
                           const struct parallel *parallel) {
    struct absorbed job = {shape, rows, q, q_stride, ret, ret_stride};
    double positions = 0;
    for (uint32_t r = 0; r < rows->rows; r++)
        positions += rows->position[r] + 1.0;
    run_worthwhile(parallel, absorbed_task, &job, (size_t)rows->rows * shape->heads,
                   positions * shape->heads * (2.0 * shape->kv_lora + shape->rope));
}

/* ---- Expanded: the rows of a call, one head at a time, meet keys and values that are made for a
 * few blocks at once ---- */

enum { BATCH_BLOCKS = 8, BATCH_BYTES = 8 << 20 };

struct expanded {
    const struct mla_shape *shape;
    const struct mla_rows *rows;
    const bf16 *q; /* [rows, heads, q_stride] */
    size_t q_stride;
    bf16 *ret; /* [rows, ret_stride] */
    size_t ret_stride;
    uint32_t row_begin, row_end;     /* the rows walked together */
    uint32_t set_count;              /* of one head */
    struct amx_queries *sets;        /* [heads, set_count] */
    uint32_t block_begin, block_end; /* the blocks expanded together */
    const float *key_value;          /* [positions, heads, nope | v] of those blocks */
};

/* Positions of a block that the last row of the group sees. */
static uint32_t expanded_positions(const struct expanded *job, uint32_t block) {
    return mla_visible(job->rows->position[job->row_end - 1], block);
}

/* Keys and values of one head, for all blocks of the batch. The rotated part of a key stays in the
 * cache. */
static void expanded_pack(const struct expanded *job, uint32_t head, struct amx_block *blocks,
                          bf16 *keys, bf16 *values) {
    const struct mla_shape *shape = job->shape;
    const size_t stride = cache_stride(shape->kv_lora, shape->rope);
    const size_t width = (size_t)shape->heads * (shape->nope + shape->v);
    const size_t nope = activation_stride(shape->nope);
    const uint32_t chunks = (shape->v + 15) / 16;
    for (uint32_t b = job->block_begin; b < job->block_end; b++) {
        const float *from = job->key_value + (size_t)(b - job->block_begin) * PAGE_TOKENS * width +
                            (size_t)head * (shape->nope + shape->v);
        const bf16 *page = job->rows->pages[job->row_end - 1][b];
        const uint32_t positions = expanded_positions(job, b);
        amx_keys_round(keys, from, width, positions, shape->nope);
        amx_values_pack_float(values, chunks, from + shape->nope, width, positions, shape->v);
        blocks[b - job->block_begin] = (struct amx_block){
            .index = b,
            .key = {keys, page + activation_stride(shape->kv_lora)},
            .key_stride = {nope, stride},
            .key_blocks = {(uint32_t)(nope / BLOCK_INPUTS),
                           (uint32_t)(activation_stride(shape->rope) / BLOCK_INPUTS)},
            .values = values,
            .value_chunks = chunks,
            .scale = shape->scale,
        };
        keys += nope * PAGE_TOKENS;
        values += amx_values(chunks);
    }
}

/* One set, all blocks of the batch that it sees. */
static void expanded_set(const struct expanded *job, uint32_t head, uint32_t index,
                         const struct amx_block *blocks, bf16 *q) {
    const struct mla_shape *shape = job->shape;
    struct amx_queries *set = &job->sets[(size_t)head * job->set_count + index];
    if (set->position[set->count - 1] / PAGE_TOKENS < job->block_begin)
        return;
    const uint32_t key_blocks = (uint32_t)(cache_stride(shape->nope, shape->rope) / BLOCK_INPUTS);
    const size_t row = job->row_begin + (size_t)index * QUERIES;
    keys_pack(q, key_blocks, 0, job->q + (row * shape->heads + head) * job->q_stride,
              shape->heads * job->q_stride, set->count, key_blocks);
    set->q = q;
    for (uint32_t b = job->block_begin; b < job->block_end; b++)
        amx_attend(set, &blocks[b - job->block_begin]);
}

static void expanded_task(void *argument, int part, int parts) {
    numerics_enter();
    const struct expanded *job = argument;
    const struct mla_shape *shape = job->shape;
    const size_t blocks_count = job->block_end - job->block_begin;
    const size_t items = (size_t)shape->heads * job->set_count;
    const size_t begin = part_begin(items, part, parts), end = part_begin(items, part + 1, parts);
    const struct scratch_mark mark = scratch_mark();
    bf16 *keys =
        scratch_take(blocks_count * PAGE_TOKENS * activation_stride(shape->nope), sizeof(bf16));
    bf16 *values = scratch_take(blocks_count * amx_values((shape->v + 15) / 16), sizeof(bf16));
    bf16 *q = scratch_take(query_elements(cache_stride(shape->nope, shape->rope)), sizeof(bf16));
    struct amx_block blocks[BATCH_BLOCKS];
    amx_attend_enter();
    for (size_t i = begin; i < end; i++) {
        const uint32_t head = (uint32_t)(i / job->set_count), set = (uint32_t)(i % job->set_count);
        if (i == begin || set == 0)
            expanded_pack(job, head, blocks, keys, values);
        expanded_set(job, head, set, blocks, q);
    }
    amx_attend_leave();
    scratch_release(mark);
}

/* kv_b times the latents of the batch's blocks. */
static void expanded_product(const struct expanded *job, const struct matrix *kv_b, bf16 *latents,
                             float *key_value, const struct parallel *parallel) {
    const size_t stride = cache_stride(job->shape->kv_lora, job->shape->rope);
    const size_t width = activation_stride(job->shape->kv_lora);
    uint32_t positions = 0;
    for (uint32_t b = job->block_begin; b < job->block_end; b++) {
        const bf16 *page = job->rows->pages[job->row_end - 1][b];
        for (uint32_t j = 0; j < expanded_positions(job, b); j++)
            memcpy(latents + positions++ * width, page + j * stride, width * sizeof(bf16));
    }
    matmul_bf16_amx(kv_b, latents, width, positions, key_value, kv_b->n, parallel);
}

/* Sets of the group's rows, for every head. */
static void expanded_start(struct expanded *job) {
    const struct mla_shape *shape = job->shape;
    const uint32_t rows = job->row_end - job->row_begin, chunks = (shape->v + 15) / 16;
    const size_t acc_count = (size_t)chunks * QUERIES * 16;
    job->set_count = (rows + QUERIES - 1) / QUERIES;
    const size_t sets = (size_t)shape->heads * job->set_count;
    job->sets = scratch_take(sets, sizeof *job->sets);
    float *acc = scratch_take(acc_count * sets, sizeof(float));
    for (size_t i = 0; i < sets; i++, acc += acc_count) {
        const uint32_t first = (uint32_t)(i % job->set_count) * QUERIES, left = rows - first;
        struct amx_queries *set = &job->sets[i];
        set->acc = acc;
        amx_queries_start(set, left < QUERIES ? left : QUERIES, chunks);
        memcpy(set->position, job->rows->position + job->row_begin + first,
               set->count * sizeof(uint32_t));
    }
}

static void expanded_finish(const struct expanded *job) {
    const struct mla_shape *shape = job->shape;
    const size_t n = (size_t)shape->heads * shape->v;
    for (uint32_t r = job->row_begin; r < job->row_end; r++) {
        bf16 *ret = job->ret + r * job->ret_stride;
        const uint32_t index = r - job->row_begin;
        for (uint32_t head = 0; head < shape->heads; head++)
            amx_queries_finish(&job->sets[(size_t)head * job->set_count + index / QUERIES],
                               index % QUERIES, shape->v, ret + (size_t)head * shape->v);
        memset(ret + n, 0, (activation_stride(n) - n) * sizeof(bf16));
    }
}

static void expanded_group(struct expanded *job, const struct matrix *kv_b,
                           const struct parallel *parallel) {
    const struct mla_shape *shape = job->shape;
    const uint32_t blocks = job->rows->position[job->row_end - 1] / PAGE_TOKENS + 1;
    const size_t block_bytes = (size_t)PAGE_TOKENS * kv_b->n * sizeof(float);
    size_t batch = BATCH_BYTES / block_bytes;
    batch = batch < 1 ? 1 : batch > BATCH_BLOCKS ? BATCH_BLOCKS : batch;
    batch = batch < blocks ? batch : blocks;
    const struct scratch_mark mark = scratch_mark();
    float *key_value = scratch_take(batch, block_bytes);
    bf16 *latents = scratch_take(batch * PAGE_TOKENS * activation_stride(shape->kv_lora), 2);
    job->key_value = key_value;
    expanded_start(job);
    for (job->block_begin = 0; job->block_begin < blocks; job->block_begin = job->block_end) {
        const uint32_t left = blocks - job->block_begin;
        job->block_end = job->block_begin + (left < batch ? left : (uint32_t)batch);
        expanded_product(job, kv_b, latents, key_value, parallel);
        run_worthwhile(parallel, expanded_task, job, (size_t)shape->heads * job->set_count,
                       (double)(job->row_end - job->row_begin) * shape->heads *
                           (job->block_end - job->block_begin) * PAGE_TOKENS *
                           (shape->nope + shape->rope + shape->v));
    }
    expanded_finish(job);
    scratch_release(mark);
}

void mla_expanded_bf16_amx(const struct mla_shape *shape, const struct mla_rows *rows,
                           const struct matrix *kv_b, const void *q, size_t q_stride, void *ret,
                           size_t ret_stride, const struct parallel *parallel) {
    struct expanded job = {shape, rows, q, q_stride, ret, ret_stride, .row_begin = 0};
    ASSERT(kv_b->n == (size_t)shape->heads * (shape->nope + shape->v));
    const size_t chunks = ((size_t)shape->v + 15) / 16;
    const uint32_t group = mla_expanded_group(shape->heads * chunks * 16);
    for (; job.row_begin < rows->rows; job.row_begin = job.row_end) {
        const uint32_t left = rows->rows - job.row_begin;
        job.row_end = job.row_begin + (left < group ? left : group);
        expanded_group(&job, kv_b, parallel);
    }
}
