/* Multi-head latent attention in the bf16 profile with AVX-512: cuts the work of a call into tiles
 * of queries and blocks of 64 positions, packs what several tiles share once, and has
 * mla_tile_avx512.c do them. The bits of reference/mla_bf16.c. */
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

/* ---- Absorbed: the queries of all heads, and of neighbouring rows of the same sequence, meet the
 * same latents ---- */

enum { RUN_TILES = 16 }; /* that share packed latents */

struct absorbed {
    const struct mla_shape *shape;
    const struct mla_rows *rows;
    const bf16 *q; /* [rows, heads, q_stride] */
    size_t q_stride;
    bf16 *ret; /* [rows, heads, ret_stride] */
    size_t ret_stride;
};

/* Queries [begin, end) of rows x heads, all of one page table. */
static void absorbed_run(const struct absorbed *job, size_t begin, size_t end) {
    const struct mla_shape *shape = job->shape;
    const size_t stride = cache_stride(shape->kv_lora, shape->rope);
    const void *const *pages = job->rows->pages[begin / shape->heads];
    const uint32_t chunks = (shape->kv_lora + 15) / 16;
    struct scratch_mark mark = scratch_mark();
    bf16 *keys = scratch_take(packed_keys((uint32_t)(stride / BLOCK_INPUTS)), sizeof(bf16));
    struct tile tiles[RUN_TILES];
    uint32_t count = 0, last = 0;

    for (size_t i = begin; i < end; count++) {
        ASSERT(count < RUN_TILES);
        struct tile *tile = &tiles[count];
        const bf16 *queries[TILE_QUERIES];
        tile_start(tile);
        for (tile->count = 0; i < end && tile->count < TILE_QUERIES; i++) {
            uint32_t position = job->rows->position[i / shape->heads];
            tile->position[tile->count] = position;
            queries[tile->count++] = job->q + i * job->q_stride;
            last = position > last ? position : last;
        }
        float *q = scratch_take(stride * TILE_QUERIES, sizeof(float));
        tile_pack_queries(q, queries, tile->count, (uint32_t)stride);
        tile->q = q;
        tile->acc_stride = chunks * (size_t)16;
        tile->acc = scratch_take(tile->acc_stride * tile->count, sizeof(float));
        memset(tile->acc, 0, tile->acc_stride * tile->count * sizeof(float));
    }
    for (uint32_t b = 0; b <= last / PAGE_TOKENS; b++) {
        const bf16 *page = pages[b];
        const uint32_t key_blocks = (uint32_t)(stride / BLOCK_INPUTS);
        const struct key_block block = {b, key_blocks, keys, page, stride, chunks, shape->scale};
        keys_pack(keys, key_blocks, 0, page, stride, mla_visible(last, b), key_blocks);
        for (uint32_t t = 0; t < count; t++)
            tile_attend(&tiles[t], &block);
    }
    for (size_t i = begin; i < end; i++) {
        bf16 *ret = job->ret + i * job->ret_stride;
        size_t n = shape->kv_lora;
        tile_finish(&tiles[(i - begin) / TILE_QUERIES], (uint32_t)((i - begin) % TILE_QUERIES),
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
        size_t limit = end - i < RUN_TILES * TILE_QUERIES ? end : i + RUN_TILES * TILE_QUERIES;
        for (next = i + 1; next < limit; next++)
            if (job->rows->pages[next / heads] != job->rows->pages[i / heads])
                break;
        absorbed_run(job, i, next);
    }
}

void mla_absorbed_bf16_avx512(const struct mla_shape *shape, const struct mla_rows *rows,
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
    uint32_t row_begin, row_end; /* the rows walked together */
    uint32_t tile_count;         /* of one head */
    struct tile *tiles;          /* [heads, tile_count]; their q is set when they are attended */
    uint32_t block_begin, block_end; /* the blocks expanded together */
    const float *key_value;          /* [positions, heads, nope | v] of those blocks */
};

/* Positions of a block that the last row of the group sees. */
static uint32_t expanded_positions(const struct expanded *job, uint32_t block) {
    return mla_visible(job->rows->position[job->row_end - 1], block);
}

/* Keys and values of one head, for all blocks of the batch. */
static void expanded_pack(const struct expanded *job, uint32_t head, struct key_block *blocks,
                          bf16 *keys, bf16 *values) {
    const struct mla_shape *shape = job->shape;
    const size_t stride = cache_stride(shape->kv_lora, shape->rope);
    const size_t width = (size_t)shape->heads * (shape->nope + shape->v);
    const uint32_t chunks = (shape->v + 15) / 16;
    const uint32_t nope_blocks = (uint32_t)(activation_stride(shape->nope) / BLOCK_INPUTS);
    const uint32_t rope_blocks = (uint32_t)(activation_stride(shape->rope) / BLOCK_INPUTS);
    const uint32_t key_blocks = nope_blocks + rope_blocks;
    for (uint32_t b = job->block_begin; b < job->block_end; b++) {
        const float *from = job->key_value + (size_t)(b - job->block_begin) * PAGE_TOKENS * width +
                            (size_t)head * (shape->nope + shape->v);
        const bf16 *rotated =
            (const bf16 *)job->rows->pages[job->row_end - 1][b] + activation_stride(shape->kv_lora);
        const uint32_t positions = expanded_positions(job, b);
        keys_pack_float(keys, key_blocks, from, width, positions, shape->nope);
        keys_pack(keys, key_blocks, nope_blocks, rotated, stride, positions, rope_blocks);
        values_pack_float(values, chunks, from + shape->nope, width, positions, shape->v);
        blocks[b - job->block_begin] = (struct key_block){
            b, key_blocks, keys, values, chunks * (size_t)16, chunks, shape->scale};
        keys += packed_keys(key_blocks);
        values += (size_t)PAGE_TOKENS * chunks * 16;
    }
}

/* One tile, all blocks of the batch that it sees. */
static void expanded_tile(const struct expanded *job, uint32_t head, uint32_t index,
                          const struct key_block *blocks, float *q) {
    const struct mla_shape *shape = job->shape;
    struct tile *tile = &job->tiles[(size_t)head * job->tile_count + index];
    if (tile->position[tile->count - 1] / PAGE_TOKENS < job->block_begin)
        return;
    const bf16 *queries[TILE_QUERIES];
    for (uint32_t m = 0; m < tile->count; m++) {
        size_t row = job->row_begin + (size_t)index * TILE_QUERIES + m;
        queries[m] = job->q + (row * shape->heads + head) * job->q_stride;
    }
    tile_pack_queries(q, queries, tile->count, (uint32_t)cache_stride(shape->nope, shape->rope));
    tile->q = q;
    for (uint32_t b = job->block_begin; b < job->block_end; b++)
        tile_attend(tile, &blocks[b - job->block_begin]);
}

static void expanded_task(void *argument, int part, int parts) {
    numerics_enter();
    const struct expanded *job = argument;
    const struct mla_shape *shape = job->shape;
    const size_t key_width = cache_stride(shape->nope, shape->rope);
    const size_t value_width = (shape->v + 15) / 16 * (size_t)16;
    const size_t blocks_count = job->block_end - job->block_begin;
    const size_t items = (size_t)shape->heads * job->tile_count;
    const size_t begin = part_begin(items, part, parts), end = part_begin(items, part + 1, parts);
    struct scratch_mark mark = scratch_mark();
    bf16 *keys = scratch_take(blocks_count * PAGE_TOKENS * key_width, sizeof(bf16));
    bf16 *values = scratch_take(blocks_count * PAGE_TOKENS * value_width, sizeof(bf16));
    float *q = scratch_take(key_width * TILE_QUERIES, sizeof(float));
    struct key_block blocks[BATCH_BLOCKS];
    for (size_t i = begin; i < end; i++) {
        uint32_t head = (uint32_t)(i / job->tile_count), tile = (uint32_t)(i % job->tile_count);
        if (i == begin || tile == 0)
            expanded_pack(job, head, blocks, keys, values);
        expanded_tile(job, head, tile, blocks, q);
    }
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
    matmul_bf16_avx512(kv_b, latents, width, positions, key_value, kv_b->n, parallel);
}

/* Tiles of the group's rows, for every head; accumulators lie beside each other by head. */
static void expanded_start(struct expanded *job) {
    const struct mla_shape *shape = job->shape;
    const uint32_t rows = job->row_end - job->row_begin;
    const size_t width = (shape->v + 15) / 16 * (size_t)16, acc_count = shape->heads * width * rows;
    job->tile_count = (rows + TILE_QUERIES - 1) / TILE_QUERIES;
    job->tiles = scratch_take((size_t)shape->heads * job->tile_count, sizeof(struct tile));
    float *acc = scratch_take(acc_count, sizeof(float));
    memset(acc, 0, acc_count * sizeof(float));
    for (uint32_t head = 0; head < shape->heads; head++) {
        for (uint32_t t = 0; t < job->tile_count; t++) {
            struct tile *tile = &job->tiles[(size_t)head * job->tile_count + t];
            const uint32_t first = t * TILE_QUERIES, left = rows - first;
            tile_start(tile);
            tile->count = left < TILE_QUERIES ? left : TILE_QUERIES;
            memcpy(tile->position, job->rows->position + job->row_begin + first,
                   tile->count * sizeof(uint32_t));
            tile->acc = acc + ((size_t)head * rows + first) * width;
            tile->acc_stride = width;
        }
    }
}

static void expanded_finish(const struct expanded *job) {
    const struct mla_shape *shape = job->shape;
    const size_t n = (size_t)shape->heads * shape->v;
    for (uint32_t r = job->row_begin; r < job->row_end; r++) {
        bf16 *ret = job->ret + r * job->ret_stride;
        const uint32_t index = r - job->row_begin;
        for (uint32_t head = 0; head < shape->heads; head++)
            tile_finish(&job->tiles[(size_t)head * job->tile_count + index / TILE_QUERIES],
                        index % TILE_QUERIES, shape->v, ret + (size_t)head * shape->v);
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
    struct scratch_mark mark = scratch_mark();
    float *key_value = scratch_take(batch, block_bytes);
    bf16 *latents = scratch_take(batch * PAGE_TOKENS * activation_stride(shape->kv_lora), 2);
    job->key_value = key_value;
    expanded_start(job);
    for (job->block_begin = 0; job->block_begin < blocks; job->block_begin = job->block_end) {
        const uint32_t left = blocks - job->block_begin;
        job->block_end = job->block_begin + (left < batch ? left : (uint32_t)batch);
        expanded_product(job, kv_b, latents, key_value, parallel);
        run_worthwhile(parallel, expanded_task, job, (size_t)shape->heads * job->tile_count,
                       (double)(job->row_end - job->row_begin) * shape->heads *
                           (job->block_end - job->block_begin) * PAGE_TOKENS *
                           (shape->nope + shape->rope + shape->v));
    }
    expanded_finish(job);
    scratch_release(mark);
}

void mla_expanded_bf16_avx512(const struct mla_shape *shape, const struct mla_rows *rows,
                              const struct matrix *kv_b, const void *q, size_t q_stride, void *ret,
                              size_t ret_stride, const struct parallel *parallel) {
    struct expanded job = {shape, rows, q, q_stride, ret, ret_stride, .row_begin = 0};
    ASSERT(kv_b->n == (size_t)shape->heads * (shape->nope + shape->v));
    const uint32_t group = mla_expanded_group(shape->heads * (shape->v + 15) / 16 * (size_t)16);
    for (; job.row_begin < rows->rows; job.row_begin = job.row_end) {
        uint32_t left = rows->rows - job.row_begin;
        job.row_end = job.row_begin + (left < group ? left : group);
        expanded_group(&job, kv_b, parallel);
    }
}
