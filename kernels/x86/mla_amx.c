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
 * few blocks at once, straight from the sums of kv_b's product into the form that tiles load ----
 *
 * A head's keys, values and sums stay in a second-level cache, so a thread that has heads of its
 * own goes through them one after the other and meets nobody. Where heads are few for the threads,
 * all heads' keys and values are made first, block by block, and then met, 16 rows by 16. */

enum { BATCH_BLOCKS = 8 };

struct expanded {
    const struct mla_shape *shape;
    const struct mla_rows *rows;
    const struct matrix *kv_b;
    const bf16 *q; /* [rows, heads, q_stride] */
    size_t q_stride;
    bf16 *ret; /* [rows, ret_stride] */
    size_t ret_stride;
    uint32_t row_begin, row_end;     /* the rows walked together */
    uint32_t set_count;              /* of one head */
    uint32_t blocks;                 /* that they see */
    uint32_t block_begin, block_end; /* the ones that are met now */
    struct head *heads;              /* [heads]; NULL: each part has one of its own */
};

/* Where the head at hand has its keys and values (of a few blocks) and its sums. */
struct head {
    bf16 *keys, *values;
    struct amx_queries *sets; /* [set_count] */
};

static size_t head_keys(const struct expanded *job) { /* elements of a block */
    return PAGE_TOKENS * activation_stride(job->shape->nope);
}
static uint32_t head_chunks(const struct expanded *job) {
    return (job->shape->v + 15) / 16;
}

static struct head head_take(const struct expanded *job) {
    const size_t blocks = job->blocks < BATCH_BLOCKS ? job->blocks : BATCH_BLOCKS;
    const size_t keys = blocks * head_keys(job), values = blocks * amx_values(head_chunks(job));
    const size_t acc_count = (size_t)head_chunks(job) * QUERIES * 16;
    struct head ret = {scratch_take(keys, sizeof(bf16)), scratch_take(values, sizeof(bf16)),
                       scratch_take(job->set_count, sizeof *ret.sets)};
    float *acc = scratch_take(acc_count * job->set_count, sizeof(float));
    for (uint32_t i = 0; i < job->set_count; i++)
        ret.sets[i].acc = acc + i * acc_count;
    /* What no output of the product fills must be finite, and stays. */
    memset(ret.keys, 0, keys * sizeof(bf16));
    memset(ret.values, 0, values * sizeof(bf16));
    return ret;
}

/* Positions of a block that the last row of the group sees. */
static uint32_t expanded_positions(const struct expanded *job, uint32_t block) {
    return mla_visible(job->rows->position[job->row_end - 1], block);
}

/* Takes the outputs of one head in. */
struct key_value_sink {
    const struct expanded *job;
    const struct head *place;
    uint32_t head;
};

static void key_value_take(void *argument, uint32_t row, uint32_t rows, uint32_t output,
                           uint32_t outputs, const float *sums) {
    const struct key_value_sink *sink = argument;
    const struct expanded *job = sink->job;
    const uint32_t nope = job->shape->nope, width = nope + job->shape->v;
    const uint32_t chunks = head_chunks(job), block = row / PAGE_TOKENS, first = row % PAGE_TOKENS;
    const size_t stride = activation_stride(nope);
    bf16 *keys = sink->place->keys + block * head_keys(job);
    bf16 *values = sink->place->values + block * amx_values(chunks);
    if (nope % 16 == 0 && width % 16 == 0) {
        const uint32_t at = output - sink->head * width;
        if (at < nope)
            amx_keys_take(keys, stride, first, at, sums, rows);
        else
            amx_values_take(values, chunks, first, (at - nope) / 16, sums, rows);
        return;
    }
    for (uint32_t o = 0; o < outputs; o++) {
        const uint32_t at = output + o - sink->head * width;
        for (uint32_t r = 0; r < rows && at < width; r++)
            if (at < nope)
                keys[(first + r) * stride + at] = round_bf16(sums[r * 16 + o]);
            else
                amx_value_set(values, chunks, first + r, at - nope, sums[r * 16 + o]);
    }
}

/* Keys and values of one head, for blocks [begin, end) of those met now. The rotated part of a key
 * stays in the cache. */
static void head_make(const struct expanded *job, uint32_t head, const struct head *place,
                      uint32_t begin, uint32_t end) {
    const struct mla_shape *shape = job->shape;
    const uint32_t width = shape->nope + shape->v;
    struct key_value_sink of_head = {job, place, head};
    const struct matmul_sink sink = {key_value_take, NULL, &of_head};
    const void *const *pages = job->rows->pages[job->row_end - 1] + job->block_begin;
    const uint32_t last = end - 1;
    const struct matmul_job product = {
        .w = job->kv_b,
        .x_stride = cache_stride(shape->kv_lora, shape->rope),
        .x_pages = pages,
        .rows = last * PAGE_TOKENS + expanded_positions(job, job->block_begin + last),
        .sink = &sink,
    };
    const struct matmul_part part = {head * width / PANEL_OUTPUTS,
                                     (head * width + width + PANEL_OUTPUTS - 1) / PANEL_OUTPUTS,
                                     begin * PAGE_TOKENS, product.rows};
    matmul_part_amx(&product, &part);
}

/* Sets [begin, end) of one head meet the blocks that there are now. */
static void head_attend(const struct expanded *job, uint32_t head, const struct head *place,
                        uint32_t begin, uint32_t end) {
    const struct mla_shape *shape = job->shape;
    const size_t stride = cache_stride(shape->kv_lora, shape->rope);
    const uint32_t chunks = head_chunks(job);
    const uint32_t nope_blocks = (uint32_t)(activation_stride(shape->nope) / BLOCK_INPUTS);
    const uint32_t rope_blocks = (uint32_t)(activation_stride(shape->rope) / BLOCK_INPUTS);
    const uint32_t key_blocks = nope_blocks + rope_blocks;
    const struct scratch_mark mark = scratch_mark();
    bf16 *q = scratch_take(query_elements(cache_stride(shape->nope, shape->rope)), sizeof(bf16));
    amx_attend_enter();
    for (uint32_t s = begin; s < end; s++) {
        struct amx_queries *set = &place->sets[s];
        const uint32_t row = job->row_begin + s * QUERIES, left = job->row_end - row;
        const uint32_t count = left < QUERIES ? left : QUERIES;
        if (job->block_begin == 0) {
            amx_queries_start(set, count, chunks);
            memcpy(set->position, job->rows->position + row, count * sizeof(uint32_t));
        }
        const uint32_t own = set->position[count - 1] / PAGE_TOKENS + 1;
        const uint32_t block_end = own < job->block_end ? own : job->block_end;
        if (job->block_begin < block_end)
            keys_pack(q, key_blocks, 0,
                      job->q + ((size_t)row * shape->heads + head) * job->q_stride,
                      shape->heads * job->q_stride, count, key_blocks);
        set->q = q;
        for (uint32_t b = job->block_begin; b < block_end; b++) {
            const uint32_t at = b - job->block_begin;
            const bf16 *page = job->rows->pages[job->row_end - 1][b];
            const struct amx_block block = {
                .index = b,
                .key = {place->keys + at * head_keys(job),
                        page + activation_stride(shape->kv_lora)},
                .key_stride = {activation_stride(shape->nope), stride},
                .key_blocks = {nope_blocks, rope_blocks},
                .values = place->values + at * amx_values(chunks),
                .value_chunks = chunks,
                .scale = shape->scale,
            };
            amx_attend(set, &block);
        }
        for (uint32_t m = 0; job->block_end == job->blocks && m < count; m++)
            amx_queries_finish(set, m, shape->v,
                               job->ret + (row + m) * job->ret_stride + (size_t)head * shape->v);
    }
    amx_attend_leave();
    scratch_release(mark);
}

static bool expanded_next(struct expanded *job) {
    const uint32_t left = job->blocks - job->block_end;
    job->block_begin = job->block_end;
    job->block_end += left < BATCH_BLOCKS ? left : BATCH_BLOCKS;
    return left > 0;
}

/* Heads of its own. */
static void heads_task(void *argument, int part, int parts) {
    numerics_enter();
    struct expanded job = *(const struct expanded *)argument;
    const size_t heads = job.shape->heads, end = part_begin(heads, part + 1, parts);
    const struct scratch_mark mark = scratch_mark();
    const struct head place = head_take(&job);
    for (uint32_t head = (uint32_t)part_begin(heads, part, parts); head < end; head++)
        for (job.block_end = 0; expanded_next(&job);) {
            head_make(&job, head, &place, 0, job.block_end - job.block_begin);
            head_attend(&job, head, &place, 0, job.set_count);
        }
    scratch_release(mark);
}

/* Items [begin, end) of heads x count, a run of each head at a time. */
static void each_head(const struct expanded *job, uint32_t count, int part, int parts,
                      void (*run)(const struct expanded *job, uint32_t head,
                                  const struct head *place, uint32_t begin, uint32_t end)) {
    const size_t items = (size_t)job->shape->heads * count;
    const size_t end = part_begin(items, part + 1, parts);
    for (size_t i = part_begin(items, part, parts), next; i < end; i = next) {
        const size_t head = i / count;
        next = (head + 1) * count < end ? (head + 1) * count : end;
        run(job, (uint32_t)head, &job->heads[head], (uint32_t)(i - head * count),
            (uint32_t)(next - head * count));
    }
}

static void make_task(void *argument, int part, int parts) {
    numerics_enter();
    const struct expanded *job = argument;
    each_head(job, job->block_end - job->block_begin, part, parts, head_make);
}

static void attend_task(void *argument, int part, int parts) {
    numerics_enter();
    const struct expanded *job = argument;
    each_head(job, job->set_count, part, parts, head_attend);
}

static void expanded_group(struct expanded *job, const struct parallel *parallel) {
    const struct mla_shape *shape = job->shape;
    const uint32_t rows = job->row_end - job->row_begin, heads = shape->heads;
    job->blocks = job->rows->position[job->row_end - 1] / PAGE_TOKENS + 1;
    job->set_count = (rows + QUERIES - 1) / QUERIES;
    const double positions = (double)job->blocks * PAGE_TOKENS;
    const double product = positions * job->kv_b->n * job->kv_b->k;
    const double attention = positions * rows * heads * (shape->nope + shape->rope + shape->v);
    const uint32_t width = (uint32_t)parallel->width;
    if (heads % width == 0 || heads >= 4 * width) {
        run_worthwhile(parallel, heads_task, job, heads, product + attention);
    } else {
        const struct scratch_mark mark = scratch_mark();
        job->heads = scratch_take(heads, sizeof *job->heads);
        for (uint32_t h = 0; h < heads; h++)
            job->heads[h] = head_take(job);
        for (job->block_end = 0; expanded_next(job);) {
            const uint32_t count = job->block_end - job->block_begin;
            const double share = (double)count / job->blocks;
            run_worthwhile(parallel, make_task, job, (size_t)heads * count, product * share);
            run_worthwhile(parallel, attend_task, job, (size_t)heads * job->set_count,
                           attention * share);
        }
        scratch_release(mark);
    }
    const size_t n = (size_t)heads * shape->v;
    for (uint32_t r = job->row_begin; r < job->row_end; r++)
        memset(job->ret + r * job->ret_stride + n, 0, (activation_stride(n) - n) * sizeof(bf16));
}

void mla_expanded_bf16_amx(const struct mla_shape *shape, const struct mla_rows *rows,
                           const struct matrix *kv_b, const void *q, size_t q_stride, void *ret,
                           size_t ret_stride, const struct parallel *parallel) {
    struct expanded job = {shape, rows, kv_b, q, q_stride, ret, ret_stride, .row_begin = 0};
    ASSERT(kv_b->n == (size_t)shape->heads * (shape->nope + shape->v));
    const size_t chunks = ((size_t)shape->v + 15) / 16;
    const uint32_t group = mla_expanded_group(shape->heads * chunks * 16);
    for (; job.row_begin < rows->rows; job.row_begin = job.row_end) {
        const uint32_t left = rows->rows - job.row_begin;
        job.row_end = job.row_begin + (left < group ? left : group);
        expanded_group(&job, parallel);
    }
}
