/* Products of more than 16 rows with AMX: a chunk of two panels' weights stays in the first-level
 * cache while all rows pass over it, 32 at a time, so that a tile is used twice for each time it is
 * loaded. Meanwhile the next chunk is asked for, or expanded where weights are E4M3. Sums of a
 * scaled segment leave the tiles to be multiplied by its scales in FP32; others wait in FP32
 * between chunks, where nobody can tell that they did. */
#include "kernels/x86/matmul_amx.h"

enum {
    GROUP_ROWS = 2 * TILE_ROWS,
    PAIR_PANELS = 2,
    TILE_LINES = TILE_ELEMENTS * sizeof(bf16) / 64,
    /* Weights of a chunk, both panels', stay in the first-level cache: 32 KiB of 48 where inputs
     * pass it by; 16 where the next ones are expanded beside them, or where few groups pass and
     * the chunk is hardly there before it is over. */
    CHUNK_BLOCKS_MAX = 16,
    CHUNK_BLOCKS_FEW = 8,
    CHUNK_BLOCKS_EXPANDED = 8,
    GROUPS_MANY = 8,
};

/* A chunk of K: blocks [begin, end) of one segment. */
struct chunk {
    uint32_t segment, begin, end;
};

/* 16 rows of one block begin at low, 16 further ones at high (NULL: there are none); `step` bytes
 * on lies the next block. */
struct inputs {
    const uint8_t *low, *high;
    size_t stride_bytes, step;
};

/* Sums of 32 rows and two panels: four tiles, [2 x 16 rows][2 panels][16 rows][16 outputs]. */
enum { GROUP_SUMS = GROUP_ROWS * PAIR_PANELS * PANEL_OUTPUTS };
typedef float group_sums[GROUP_SUMS];

/* What is done for the chunk after this one, a little at every step of this one: its weights are
 * asked for, or expanded. Nothing, where tiles and lines are 0. */
struct ahead {
    struct chunk chunk;
    uint32_t panel, panels;
    uint32_t at, tiles;   /* E4M3: of [block][panel], done and all */
    uint32_t lines, done; /* BF16: lines of the cache of each panel, all and asked for */
    uint32_t per_step;    /* tiles, or lines of each panel */
    bf16 *expanded;       /* E4M3: where the tiles go, [panel][CHUNK_BLOCKS_EXPANDED] */
};

struct many {
    const struct walk *walk;
    uint32_t panel, panels; /* 1 or 2 */
    uint32_t groups;
    uint32_t chunk_blocks; /* of a chunk, at most */
    group_sums *sums;      /* [groups] of the segment, between chunks */
    group_sums *acc; /* [groups] scaled sums of the segments before; NULL: weights have no scales */
    group_sums *partial; /* [2] of a segment, still to be scaled or to be taken by the sink */
    bf16 *expanded;      /* E4M3: [2][panel][CHUNK_BLOCKS_EXPANDED] tiles */
    uint32_t turn;       /* which half of `expanded` this chunk has */
    struct ahead ahead;
    struct {
        bool any;
        uint32_t group, segment, half;
    } waiting; /* the group that is still to be scaled */
};

static uint32_t group_rows(const struct many *many, uint32_t group) {
    const struct walk *walk = many->walk;
    const uint32_t left = walk->row_end - walk->row_begin - group * GROUP_ROWS;
    return left < GROUP_ROWS ? left : GROUP_ROWS;
}

static float *group_y(const struct many *many, uint32_t group) {
    const struct walk *walk = many->walk;
    return walk->job->y + (walk->row_begin + (size_t)group * GROUP_ROWS) * walk->job->y_stride +
           (size_t)many->panel * PANEL_OUTPUTS;
}

static inline void group_zero(void) {
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
}
static inline void group_load(const float *sums) {
    const size_t row_bytes = 64;
    TILE_LOAD(0, sums, row_bytes);
    TILE_LOAD(1, sums + TILE_ROWS * PANEL_OUTPUTS, row_bytes);
    TILE_LOAD(2, sums + 2 * TILE_ROWS * PANEL_OUTPUTS, row_bytes);
    TILE_LOAD(3, sums + 3 * TILE_ROWS * PANEL_OUTPUTS, row_bytes);
}
static inline void group_store(float *sums) {
    const size_t row_bytes = 64;
    TILE_STORE(0, sums, row_bytes);
    TILE_STORE(1, sums + TILE_ROWS * PANEL_OUTPUTS, row_bytes);
    TILE_STORE(2, sums + 2 * TILE_ROWS * PANEL_OUTPUTS, row_bytes);
    TILE_STORE(3, sums + 3 * TILE_ROWS * PANEL_OUTPUTS, row_bytes);
}

/* ---- What is done ahead ---- */

static inline void ahead_expand(const struct walk *walk, struct ahead *ahead) {
    const uint32_t p = ahead->panels == 2 ? ahead->at & 1 : 0, b = ahead->at / ahead->panels;
    bf16 *to = ahead->expanded + ((size_t)p * CHUNK_BLOCKS_EXPANDED + b) * TILE_ELEMENTS;
    tile_weights(walk, ahead->panel + p, ahead->chunk.begin + b, to);
    ahead->at++;
}

/* Ends a chunk that begins at block `begin`: what is left of its segment, in equal shares. */
static void chunk_end(const struct many *many, struct chunk *chunk) {
    const uint32_t left = many->walk->w->segment_block[chunk->segment + 1] - chunk->begin;
    const uint32_t times = (left + many->chunk_blocks - 1) / many->chunk_blocks;
    chunk->end = chunk->begin + (times > 0 ? (left + times - 1) / times : 0);
}

/* The chunk after `chunk`; false: there is none. */
static bool chunk_next(const struct many *many, struct chunk *chunk) {
    const struct matrix *w = many->walk->w;
    if (chunk->end == w->segment_block[chunk->segment + 1]) {
        if (++chunk->segment == w->segments)
            return false;
        chunk->begin = chunk->end = w->segment_block[chunk->segment];
    }
    chunk->begin = chunk->end;
    chunk_end(many, chunk);
    return true;
}
static struct chunk chunk_first(const struct many *many) {
    struct chunk chunk = {0, 0, 0};
    chunk_end(many, &chunk);
    return chunk;
}

/* Up to two groups read weights as fast as memory gives them, and what is asked for two tiles
 * before it is used arrives in time. The steps of more groups share the lines of the next chunk. */
static bool asks_close(const struct many *many) {
    return !many->walk->e4m3 && many->groups <= 2;
}

/* What comes after `chunk`: the next one of these panels, or the first of the next ones. */
static void ahead_begin(struct many *many, const struct chunk *chunk, uint32_t panel_end) {
    const struct walk *walk = many->walk;
    struct ahead *ahead = &many->ahead;
    *ahead = (struct ahead){.chunk = *chunk, .panel = many->panel, .panels = many->panels};
    ahead->expanded = many->expanded + (size_t)(many->turn ^ 1) * PAIR_PANELS *
                                           CHUNK_BLOCKS_EXPANDED * TILE_ELEMENTS;
    if (!chunk_next(many, &ahead->chunk)) {
        ahead->panel += many->panels;
        if (ahead->panel >= panel_end)
            return;
        ahead->panels = panel_end - ahead->panel < PAIR_PANELS ? 1 : PAIR_PANELS;
        ahead->chunk = chunk_first(many);
    }
    if (asks_close(many))
        return;
    const uint32_t blocks = ahead->chunk.end - ahead->chunk.begin;
    const uint32_t steps = many->groups * (chunk->end - chunk->begin);
    ahead->tiles = ahead->panels * blocks;
    ahead->lines = blocks * TILE_LINES;
    const uint32_t work = walk->e4m3 ? ahead->tiles : ahead->lines;
    ahead->per_step = (work + steps - 1) / steps;
}

/* What the steps have left over. */
static void ahead_end(struct many *many) {
    struct ahead *ahead = &many->ahead;
    while (many->walk->e4m3 && ahead->at < ahead->tiles)
        ahead_expand(many->walk, ahead);
    many->turn ^= 1;
}

/* ---- Products ---- */

static struct inputs group_inputs(const struct many *many, uint32_t group,
                                  const struct chunk *chunk) {
    const struct walk *walk = many->walk;
    const struct matrix *w = walk->w;
    const bool both = group_rows(many, group) > TILE_ROWS;
    struct inputs ret;
    if (group >= walk->packed_from) {
        const size_t tile = TILE_ELEMENTS * sizeof(bf16);
        ret.low =
            (const uint8_t *)walk->packed +
            ((size_t)(group - walk->packed_from) * matrix_blocks(w) + chunk->begin) * 2 * tile;
        ret.high = both ? ret.low + tile : NULL;
        ret.stride_bytes = BLOCK_INPUTS * sizeof(bf16);
        ret.step = 2 * tile;
    } else {
        const size_t row = walk->row_begin + (size_t)group * GROUP_ROWS;
        const uint32_t k = w->segment_k[chunk->segment] +
                           (chunk->begin - w->segment_block[chunk->segment]) * BLOCK_INPUTS;
        ret.stride_bytes = walk->job->x_stride * sizeof(bf16);
        ret.low = (const uint8_t *)(job_row(walk->job, row) + k);
        ret.high = both ? ret.low + TILE_ROWS * ret.stride_bytes : NULL;
        ret.step = BLOCK_INPUTS * sizeof(bf16);
    }
    return ret;
}

/* Adds a chunk's products to the sums in tiles 0..3; tiles 4, 5: inputs; 6, 7: weights. Inputs
 * come from the second-level cache and are not wanted again before they have left the first, so
 * they are loaded past it. */
static inline __attribute__((always_inline)) void
products(struct many *many, struct inputs in, const bf16 *w0, const bf16 *w1, uint32_t blocks,
         const uint8_t *ask0, const uint8_t *ask1, const uint32_t lines, const size_t ask_step,
         const bool near, const bool both_panels, const bool both_rows, const bool e4m3) {
    const size_t row_bytes = 64;
    for (uint32_t b = 0; b < blocks; b++) {
        TILE_LOAD(6, w0, row_bytes);
        if (both_panels)
            TILE_LOAD(7, w1, row_bytes);
        TILE_LOAD_ONCE(4, in.low, in.stride_bytes);
        if (both_rows)
            TILE_LOAD_ONCE(5, in.high, in.stride_bytes);
        TILE_PRODUCT(0, 4, 6);
        if (both_panels)
            TILE_PRODUCT(1, 4, 7);
        if (both_rows) {
            TILE_PRODUCT(2, 5, 6);
            if (both_panels)
                TILE_PRODUCT(3, 5, 7);
        }
        if (e4m3) {
            struct ahead *ahead = &many->ahead;
            for (uint32_t i = 0; i < ahead->per_step && ahead->at < ahead->tiles; i++)
                ahead_expand(many->walk, ahead);
        }
        for (uint32_t i = 0; !e4m3 && i < lines; i++) {
            if (near) {
                _mm_prefetch(ask0 + (size_t)64 * i, _MM_HINT_T0);
                if (both_panels)
                    _mm_prefetch(ask1 + (size_t)64 * i, _MM_HINT_T0);
            } else {
                _mm_prefetch(ask0 + (size_t)64 * i, _MM_HINT_T1);
                if (both_panels)
                    _mm_prefetch(ask1 + (size_t)64 * i, _MM_HINT_T1);
            }
        }
        ask0 += ask_step;
        ask1 += ask_step;
        in.low += in.step;
        in.high += in.step;
        w0 += TILE_ELEMENTS;
        w1 += TILE_ELEMENTS;
    }
}

static void group_products(struct many *many, const struct inputs *in, const bf16 *w0,
                           const bf16 *w1, uint32_t blocks, uint32_t group) {
    const struct walk *walk = many->walk;
    struct ahead *ahead = &many->ahead;
    const bool both_panels = w1 != NULL, both_rows = in->high != NULL;
    if (!both_panels)
        w1 = w0;
    struct inputs from = *in;
    if (!both_rows)
        from.high = from.low;
    if (walk->e4m3) {
        if (both_panels && both_rows)
            products(many, from, w0, w1, blocks, NULL, NULL, 0, 0, false, true, true, true);
        else
            products(many, from, w0, w1, blocks, NULL, NULL, 0, 0, false, both_panels, both_rows,
                     true);
        return;
    }
    uint32_t lines;
    size_t step = 64;
    const uint8_t *ask0, *ask1;
    if (asks_close(many)) {
        lines = TILE_LINES / many->groups;
        step = TILE_ELEMENTS * sizeof(bf16);
        ask0 = (const uint8_t *)(w0 + 2 * TILE_ELEMENTS) + (size_t)group * lines * 64;
        ask1 = (const uint8_t *)(w1 + 2 * TILE_ELEMENTS) + (size_t)group * lines * 64;
    } else {
        lines = ahead->done < ahead->lines ? ahead->per_step : 0;
        const size_t at = ahead->chunk.begin * walk->tile_bytes + (size_t)ahead->done * 64;
        ask0 = panel_at(walk, ahead->panel) + at;
        ask1 = ask0 + (ahead->panels > 1 ? walk->panel_bytes : 0);
        step = (size_t)lines * 64;
        ahead->done += lines * blocks;
    }
    const bool near = asks_close(many);
    if (!both_panels || !both_rows)
        products(many, from, w0, w1, blocks, ask0, ask1, lines, step, near, both_panels, both_rows,
                 false);
    else if (near)
        products(many, from, w0, w1, blocks, ask0, ask1, lines, step, true, true, true, false);
    else if (lines == 1)
        products(many, from, w0, w1, blocks, ask0, ask1, 1, step, false, true, true, false);
    else
        products(many, from, w0, w1, blocks, ask0, ask1, lines, step, false, true, true, false);
}

/* A quarter of a group: what one tile holds. */
struct quarter {
    uint32_t panel, row, rows; /* row: of the job */
    __mmask16 outputs;
    float *y;
    size_t sums; /* where it begins in group_sums */
};

static struct quarter group_quarter(const struct many *many, uint32_t group, uint32_t index) {
    const struct walk *walk = many->walk;
    const uint32_t high = index / PAIR_PANELS * TILE_ROWS, rows = group_rows(many, group);
    struct quarter ret = {.panel = many->panel + index % PAIR_PANELS};
    ret.row = walk->row_begin + group * GROUP_ROWS + high;
    if (index % PAIR_PANELS < many->panels && rows > high)
        ret.rows = rows - high < TILE_ROWS ? rows - high : TILE_ROWS;
    ret.outputs = ret.rows > 0 ? panel_outputs(walk->w, ret.panel) : 0;
    ret.y = walk->job->y + ret.row * walk->job->y_stride + (size_t)ret.panel * PANEL_OUTPUTS;
    ret.sums = (size_t)index * TILE_ROWS * PANEL_OUTPUTS;
    return ret;
}

/* Outputs of a quarter, to whoever takes them instead of y. */
static void quarter_take(const struct many *many, const struct quarter *q, const float *sums) {
    const struct matmul_sink *sink = many->walk->job->sink;
    const uint32_t first = q->panel * PANEL_OUTPUTS, left = many->walk->w->n - first;
    if (q->rows > 0)
        sink->take(sink->argument, q->row, q->rows, first,
                   left < PANEL_OUTPUTS ? left : PANEL_OUTPUTS, sums);
}

/* The sums of the last segment, to y. */
static void group_finish(const struct many *many, uint32_t group, const float *sums) {
    const size_t y_stride = many->walk->job->y_stride;
    for (uint32_t i = 0; i < 4; i++) {
        const struct quarter q = group_quarter(many, group, i);
        for (uint32_t r = 0; r < q.rows; r++)
            _mm512_mask_storeu_ps(q.y + r * y_stride, q.outputs,
                                  _mm512_load_ps(sums + q.sums + r * PANEL_OUTPUTS));
    }
}

/* What is not in the first-level cache when it is stored holds up the stores behind it. */
static void ask_y(const struct many *many, uint32_t group) {
    const size_t y_stride = many->walk->job->y_stride;
    const struct matmul_sink *sink = many->walk->job->sink;
    for (uint32_t i = 0; i < 4; i++) {
        const struct quarter q = group_quarter(many, group, i);
        if (sink != NULL) {
            if (sink->ask != NULL && q.rows > 0)
                sink->ask(sink->argument, q.row, q.rows, q.panel * PANEL_OUTPUTS);
            continue;
        }
        for (uint32_t r = 0; r < q.rows; r++)
            __builtin_prefetch(q.y + r * y_stride, 1);
    }
}

/* The same from the tiles, where there is nothing to leave out. */
static bool group_finish_tiles(const struct many *many, uint32_t group) {
    const struct walk *walk = many->walk;
    if (group_rows(many, group) < GROUP_ROWS || many->panels < PAIR_PANELS ||
        panel_outputs(walk->w, many->panel + 1) != 0xffff)
        return false;
    float *y = group_y(many, group);
    const size_t stride_bytes = walk->job->y_stride * sizeof *y;
    float *high = y + TILE_ROWS * walk->job->y_stride;
    TILE_STORE(0, y, stride_bytes);
    TILE_STORE(1, y + PANEL_OUTPUTS, stride_bytes);
    TILE_STORE(2, high, stride_bytes);
    TILE_STORE(3, high + PANEL_OUTPUTS, stride_bytes);
    return true;
}

/* acc + partial * scale, to acc or, the last one, to y (to the sink through acc); acc counts as 0
 * before the first segment. */
static inline __attribute__((always_inline)) void scale_quarter(const struct many *many,
                                                                const struct quarter *q,
                                                                const float *partial, float *acc,
                                                                const bool first, const bool last) {
    const struct walk *walk = many->walk;
    const struct matrix *w = walk->w;
    const uint32_t segment = many->waiting.segment;
    const __m512 scale = _mm512_loadu_ps(panel_scales(w, q->panel, segment));
    const bool sinks = walk->job->sink != NULL;
    float *y = q->y;
    for (uint32_t r = 0; r < q->rows; r++, y += walk->job->y_stride) {
        const __m512 before = first ? _mm512_setzero_ps() : _mm512_load_ps(acc + r * PANEL_OUTPUTS);
        const __m512 by = both_scales(walk, scale, q->row + r, segment);
        const __m512 after =
            _mm512_fmadd_ps(_mm512_load_ps(partial + r * PANEL_OUTPUTS), by, before);
        if (last && !sinks)
            _mm512_mask_storeu_ps(y, q->outputs, after);
        else
            _mm512_store_ps(acc + r * PANEL_OUTPUTS, after);
    }
    if (last && sinks)
        quarter_take(many, q, acc);
}

/* The group that waits: a segment of it is scaled, or its outputs are taken. */
static void finish_waiting(struct many *many) {
    if (!many->waiting.any)
        return;
    many->waiting.any = false;
    const uint32_t group = many->waiting.group;
    const bool first = many->waiting.segment == 0,
               last = many->waiting.segment + 1 == many->walk->w->segments;
    for (uint32_t i = 0; i < 4; i++) {
        const struct quarter q = group_quarter(many, group, i);
        const float *partial = many->partial[many->waiting.half] + q.sums;
        if (many->acc == NULL) {
            quarter_take(many, &q, partial);
            continue;
        }
        float *acc = many->acc[group] + q.sums;
        if (!first && !last)
            scale_quarter(many, &q, partial, acc, false, false);
        else
            scale_quarter(many, &q, partial, acc, first, last);
    }
}

/* One chunk of one group. */
static void group_chunk(struct many *many, uint32_t group, const struct chunk *chunk,
                        const bf16 *w0, const bf16 *w1) {
    const struct matrix *w = many->walk->w;
    const bool last = chunk->end == w->segment_block[chunk->segment + 1];
    if (chunk->begin == w->segment_block[chunk->segment])
        group_zero();
    else
        group_load(many->sums[group]);
    if (last && chunk->segment + 1 == w->segments)
        ask_y(many, group);
    const struct inputs in = group_inputs(many, group, chunk);
    group_products(many, &in, w0, w1, chunk->end - chunk->begin, group);
    if (!last) {
        group_store(many->sums[group]);
    } else if (w->scales == NULL && many->walk->job->sink == NULL) {
        if (group_finish_tiles(many, group))
            return;
        group_store(many->sums[group]);
        group_finish(many, group, many->sums[group]);
    } else {
        /* Scaled, or taken, while the tiles work on the next group. */
        const uint32_t half = many->waiting.half ^ 1;
        group_store(many->partial[half]);
        finish_waiting(many);
        many->waiting.any = true;
        many->waiting.group = group;
        many->waiting.segment = chunk->segment;
        many->waiting.half = half;
    }
}

static const bf16 *chunk_weights(const struct many *many, uint32_t p, const struct chunk *chunk) {
    const struct walk *walk = many->walk;
    if (walk->e4m3)
        return many->expanded +
               ((size_t)many->turn * PAIR_PANELS + p) * CHUNK_BLOCKS_EXPANDED * TILE_ELEMENTS;
    return (const bf16 *)(const void *)(panel_at(walk, many->panel + p) +
                                        chunk->begin * walk->tile_bytes);
}

static void pair_run(struct many *many, uint32_t panel_end) {
    struct chunk chunk = chunk_first(many);
    do {
        const bf16 *w0 = chunk_weights(many, 0, &chunk);
        const bf16 *w1 = many->panels > 1 ? chunk_weights(many, 1, &chunk) : NULL;
        ahead_begin(many, &chunk, panel_end);
        for (uint32_t g = 0; g < many->groups; g++)
            group_chunk(many, g, &chunk, w0, w1);
        ahead_end(many);
    } while (chunk_next(many, &chunk));
    finish_waiting(many);
}

/* Inputs of groups from `first` on as tiles, zeros where a segment or the rows end inside one. */
static void pack_inputs(struct walk *walk, uint32_t first, bf16 *to) {
    const struct matmul_job *job = walk->job;
    const struct matrix *w = walk->w;
    const uint32_t rows = walk->row_end - walk->row_begin;
    const size_t blocks = matrix_blocks(w), group_elements = blocks * 2 * TILE_ELEMENTS;
    walk->packed = to;
    walk->packed_from = first;
    for (uint32_t r = first * GROUP_ROWS; r < (rows + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS; r++) {
        const bf16 *row = r < rows ? job_row(job, walk->row_begin + (size_t)r) : NULL;
        bf16 *tiles = to + (r / GROUP_ROWS - first) * group_elements +
                      (size_t)(r / TILE_ROWS % 2) * TILE_ELEMENTS +
                      (size_t)(r % TILE_ROWS) * BLOCK_INPUTS;
        for (uint32_t s = 0; s < w->segments; s++)
            for (uint32_t b = w->segment_block[s]; b < w->segment_block[s + 1]; b++) {
                const uint32_t k = w->segment_k[s] + (b - w->segment_block[s]) * BLOCK_INPUTS;
                const uint32_t left = r < rows ? w->segment_k[s + 1] - k : 0;
                const __mmask32 lanes = left < BLOCK_INPUTS ? (1u << left) - 1 : 0xffffffff;
                _mm512_store_si512(tiles + (size_t)b * 2 * TILE_ELEMENTS,
                                   lanes == 0 ? _mm512_setzero_si512()
                                              : _mm512_maskz_loadu_epi16(lanes, row + k));
            }
    }
}

/* Rows an odd number of cache lines apart meet everywhere in the cache; others, of which many would
 * fight for few places, and segments that end inside a block are copied into tiles first. So is a
 * last group that is not whole. */
static uint32_t groups_in_place(const struct walk *walk) {
    const struct matrix *w = walk->w;
    const uint32_t groups = (walk->row_end - walk->row_begin) / GROUP_ROWS;
    if (walk->job->x_stride * sizeof(bf16) % 128 != 64)
        return 0;
    for (uint32_t s = 0; s < w->segments; s++)
        if ((w->segment_k[s + 1] - w->segment_k[s]) % BLOCK_INPUTS != 0)
            return 0;
    return groups;
}

static void zero_rows(const struct walk *walk, uint32_t panel_begin, uint32_t panel_end) {
    ASSERT(walk->job->sink == NULL);
    for (uint32_t r = walk->row_begin; r < walk->row_end; r++)
        for (uint32_t p = panel_begin; p < panel_end; p++)
            _mm512_mask_storeu_ps(walk->job->y + r * walk->job->y_stride +
                                      (size_t)p * PANEL_OUTPUTS,
                                  panel_outputs(walk->w, p), _mm512_setzero_ps());
}

void matmul_amx_many(struct walk *walk, uint32_t panel_begin, uint32_t panel_end) {
    const struct matrix *w = walk->w;
    const uint32_t rows = walk->row_end - walk->row_begin, blocks = matrix_blocks(w);
    const uint32_t groups = (rows + GROUP_ROWS - 1) / GROUP_ROWS;
    if (blocks == 0) {
        zero_rows(walk, panel_begin, panel_end);
        return;
    }
    const uint8_t rows_of[8] = {16, 16, 16, 16, 16, 16, 16, 16};
    tiles_configure(rows_of);
    const struct scratch_mark mark = scratch_mark();
    struct many many = {.walk = walk, .groups = groups};
    many.chunk_blocks = walk->e4m3             ? CHUNK_BLOCKS_EXPANDED
                        : groups < GROUPS_MANY ? CHUNK_BLOCKS_FEW
                                               : CHUNK_BLOCKS_MAX;
    many.sums = scratch_take(groups, sizeof(group_sums));
    if (w->scales != NULL)
        many.acc = scratch_take(groups, sizeof(group_sums));
    if (w->scales != NULL || walk->job->sink != NULL)
        many.partial = scratch_take(2, sizeof(group_sums));
    const uint32_t in_place = groups_in_place(walk);
    walk->packed_from = groups;
    if (in_place < groups)
        pack_inputs(
            walk, in_place,
            scratch_take((size_t)(groups - in_place) * blocks * 2 * TILE_ELEMENTS, sizeof(bf16)));
    if (walk->e4m3) {
        many.expanded = scratch_take(
            (size_t)2 * PAIR_PANELS * CHUNK_BLOCKS_EXPANDED * TILE_ELEMENTS, sizeof(bf16));
        const struct chunk chunk = chunk_first(&many);
        const uint32_t panels = panel_end - panel_begin < PAIR_PANELS ? 1 : PAIR_PANELS;
        many.ahead = (struct ahead){.chunk = chunk,
                                    .panel = panel_begin,
                                    .panels = panels,
                                    .tiles = panels * chunk.end,
                                    .expanded = many.expanded};
        many.turn = 1;
        ahead_end(&many);
    }
    for (many.panel = panel_begin; many.panel < panel_end; many.panel += many.panels) {
        many.panels = panel_end - many.panel < PAIR_PANELS ? 1 : PAIR_PANELS;
        pair_run(&many, panel_end);
    }
    scratch_release(mark);
}
