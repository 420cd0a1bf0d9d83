/* Multi-head latent attention in the absorbed form (generated tokens), over the paged latent cache.
 *
 * One block takes 64 heads of one row and a run of MLA_SPLIT pages of its sequence: a fixed size,
 * counted from the sequence's beginning, so what is added to what depends on the row's position
 * only and not on the batch. A second kernel joins the runs in ascending order, also where there is
 * one.
 *
 * Two warpgroups multiply, each for half of the latents (they compute the scores twice rather than
 * wait for each other twice a page); one thread of a third brings the queries and then the pages by
 * tensor map into two stages.
 *
 * An E4M3 cache: its bytes land in the upper half of the stage's place for latents, the rotated
 * keys in theirs, and the whole third warpgroup reads the latents back to BF16 in place, 128
 * channels after 128, while the others multiply the page before. From there on everything is the
 * same. */
#include "kernels/cuda/mla.cuh"

#include "kernels/cuda/elementwise.cuh"
#include "kernels/latent.h"

enum { STAGES = 2, MATH_GROUPS = 2, THREADS = 384 };

template <int KC> struct absorbed_shape {
    enum {
        TILE = KC * CHUNK_BYTES, /* 64 rows of queries or positions */
        LATENT_CHUNKS = KC - 1,
        RAW_CHUNKS = LATENT_CHUNKS / 2, /* of 128 E4M3 */
        BARRIERS_AT = (1 + STAGES) * TILE,
        SHARED = BARRIERS_AT + (1 + 3 * STAGES) * 8,
    };
};

struct block_barriers {
    uint64_t *q;     /* queries are here */
    uint64_t *full;  /* [STAGES] a page can be multiplied */
    uint64_t *empty; /* [STAGES] it has been */
    uint64_t *raw;   /* [STAGES] E4M3: its bytes are here */
};

/* An E4M3 cache, as the third warpgroup needs it. */
struct e4m3_cache {
    const uint8_t *base; /* NULL: the cache is BF16 */
    uint32_t scale_at, rope_at, row_bytes;
};

struct block_work {
    uint32_t row, head, split;
    uint32_t first, pages; /* of the split */
    uint32_t position;
};

template <int KC>
static __device__ void produce_queries(const CUtensorMap *q, const mla_absorbed_args &args,
                                       const block_work &at, uint8_t *memory,
                                       const block_barriers &barriers) {
    mbarrier_expect(barriers.q, absorbed_shape<KC>::TILE);
    for (int c = 0; c < KC; c++)
        tma_load(memory + c * CHUNK_BYTES, q, barriers.q, c * CHUNK, at.row * args.heads + at.head);
}

/* One thread. */
template <int KC>
static __device__ void produce(const CUtensorMap *cache, const uint32_t *table,
                               const block_work &at, uint8_t *memory,
                               const block_barriers &barriers) {
    typedef absorbed_shape<KC> S;
    for (uint32_t i = 0; i < at.pages; i++) {
        const uint32_t s = i % STAGES, turn = i / STAGES;
        const uint32_t page = table[at.first + i];
        mbarrier_wait(&barriers.empty[s], (turn & 1) ^ 1);
        mbarrier_expect(&barriers.full[s], S::TILE);
        for (int c = 0; c < KC; c++)
            tma_load(memory + (1 + s) * S::TILE + c * CHUNK_BYTES, cache, &barriers.full[s],
                     c * CHUNK, page * MLA_BLOCK);
    }
}

/* The bytes of page i, once its stage is free. One thread. */
template <int KC>
static __device__ void produce_raw(const CUtensorMap *map, const e4m3_cache &cache,
                                   const uint32_t *table, const block_work &at, uint32_t i,
                                   uint8_t *memory, const block_barriers &barriers) {
    typedef absorbed_shape<KC> S;
    if (i >= at.pages)
        return;
    const uint32_t s = i % STAGES, turn = i / STAGES, row = table[at.first + i] * MLA_BLOCK;
    uint8_t *stage = memory + (1 + s) * S::TILE;
    mbarrier_wait(&barriers.empty[s], (turn & 1) ^ 1);
    mbarrier_expect(&barriers.raw[s], (S::RAW_CHUNKS + 1) * CHUNK_BYTES);
    for (int c = 0; c < S::RAW_CHUNKS; c++)
        tma_load(stage + (S::RAW_CHUNKS + c) * CHUNK_BYTES, map, &barriers.raw[s], c * LATENT_GROUP,
                 row);
    tma_load(stage + S::LATENT_CHUNKS * CHUNK_BYTES, map, &barriers.raw[s], cache.rope_at, row);
}

/* The 16 bytes `unit` of row r of a tile, where the swizzle puts them. */
DEVICE uint4 *tile_unit(uint8_t *tile, uint32_t r, uint32_t unit) {
    return (uint4 *)(tile + r * TILE_ROW_BYTES + ((unit ^ r % 8) << 4));
}

/* 16 latents, in the two units of BF16 that they become. Half of the lanes write the second unit
 * first, so that a row's eight lanes meet in no bank. */
DEVICE void expand_unit(uint8_t *stage, uint32_t chunk, uint32_t r, uint32_t unit,
                        const uint4 &packed, float scale) {
    const uint32_t word[4] = {packed.x, packed.y, packed.z, packed.w};
    uint32_t wide[8];
#pragma unroll
    for (int w = 0; w < 4; w++) {
        wide[2 * w] = widen_e4m3_pair((uint16_t)word[w], scale);
        wide[2 * w + 1] = widen_e4m3_pair((uint16_t)(word[w] >> 16), scale);
    }
    uint8_t *tile = stage + (2 * chunk + unit / 4) * CHUNK_BYTES;
    const uint4 low = make_uint4(wide[0], wide[1], wide[2], wide[3]);
    const uint4 high = make_uint4(wide[4], wide[5], wide[6], wide[7]);
    const bool later = unit >= 4;
    *tile_unit(tile, r, unit % 4 * 2 + later) = later ? high : low;
    *tile_unit(tile, r, unit % 4 * 2 + !later) = later ? low : high;
}

/* The whole warpgroup. */
template <int KC>
static __device__ void expand(const CUtensorMap *map, const e4m3_cache &cache,
                              const uint32_t *table, const block_work &at, uint8_t *memory,
                              const block_barriers &barriers) {
    typedef absorbed_shape<KC> S;
    enum { ROWS = 4, ROW_STEP = 16 }; /* of a thread */
    const uint32_t t = threadIdx.x % GROUP_THREADS, unit = t % 8, first = t / 8;
    if (t == 0)
        produce_raw<KC>(map, cache, table, at, 0, memory, barriers);
    for (uint32_t i = 0; i < at.pages; i++) {
        const uint32_t s = i % STAGES, turn = i / STAGES;
        uint8_t *stage = memory + (1 + s) * S::TILE;
        const uint8_t *page =
            cache.base + (size_t)table[at.first + i] * MLA_BLOCK * cache.row_bytes + cache.scale_at;
        float scale[ROWS][S::RAW_CHUNKS];
#pragma unroll
        for (int k = 0; k < ROWS; k++)
#pragma unroll
            for (int c = 0; c < S::RAW_CHUNKS; c++)
                scale[k][c] = *(const float *)(page + (first + k * ROW_STEP) * cache.row_bytes +
                                               c * sizeof(float));
        mbarrier_wait(&barriers.raw[s], turn & 1);
#pragma unroll
        for (int c = 0; c < S::RAW_CHUNKS; c++) {
            uint4 packed[ROWS];
#pragma unroll
            for (int k = 0; k < ROWS; k++)
                packed[k] = *tile_unit(stage + (S::RAW_CHUNKS + c) * CHUNK_BYTES,
                                       first + k * ROW_STEP, unit);
            if (2 * c + 1 >= S::RAW_CHUNKS) /* what is written over has been read by all */
                named_barrier(1, GROUP_THREADS);
#pragma unroll
            for (int k = 0; k < ROWS; k++)
                expand_unit(stage, c, first + k * ROW_STEP, unit, packed[k], scale[k][c]);
        }
        async_fence();
        mbarrier_arrive(&barriers.full[s]);
        if (t == 0)
            produce_raw<KC>(map, cache, table, at, i + 1, memory, barriers);
    }
}

template <int KC, int VC, bool E4M3>
static __device__ void consume(const mla_absorbed_args &args, const block_work &at, uint8_t *memory,
                               const block_barriers &barriers) {
    typedef absorbed_shape<KC> S;
    const uint32_t group = threadIdx.x / GROUP_THREADS, t = threadIdx.x % GROUP_THREADS;
    float acc[values<VC>::REGISTERS];
#pragma unroll
    for (int i = 0; i < values<VC>::REGISTERS; i++)
        acc[i] = 0;
    softmax_rows softmax;
    softmax_begin(softmax);
    mbarrier_wait(barriers.q, 0);
    for (uint32_t i = 0; i < at.pages; i++) {
        const uint32_t s = i % STAGES, turn = i / STAGES;
        const uint32_t q = shared_address(memory), page = q + (1 + s) * S::TILE;
        const uint32_t seen = at.position + 1 - (at.first + i) * MLA_BLOCK;
        const uint32_t visible[2] = {seen, seen};
        float score[32], factor[2];
        uint32_t p[16];
        mbarrier_wait(&barriers.full[s], turn & 1);
        if (E4M3) /* long done; the keys came by it */
            mbarrier_wait(&barriers.raw[s], turn & 1);
        mla_scores<KC>(score, q, page);
        softmax_block(softmax, score, args.scale, visible, p, factor);
        mla_accumulate<VC>(acc, factor, p, page + group * VC * CHUNK_BYTES);
        if (t % WARP == 0)
            mbarrier_arrive(&barriers.empty[s]);
    }
    /* What the run gave: [row][split][head]: maximum, sum, then the values. */
    const uint32_t width = MATH_GROUPS * VC * CHUNK;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint32_t head = at.head + t / WARP * 16 + t % WARP / 4 + 8 * half;
        if (head >= args.heads)
            continue;
        float *to = args.work +
                    (((size_t)at.row * args.splits + at.split) * args.heads + head) * (width + 2);
        if (group == 0 && t % 4 == 0) {
            to[0] = softmax.maximum[half];
            to[1] = softmax.sum[half];
        }
        to += 2 + group * VC * CHUNK + t % 4 * 2;
#pragma unroll
        for (int j = 0; j < values<VC>::REGISTERS / 4; j++) {
            to[8 * j] = acc[4 * j + 2 * half];
            to[8 * j + 1] = acc[4 * j + 2 * half + 1];
        }
    }
}

template <int KC, int VC, bool E4M3>
static __global__ void __launch_bounds__(THREADS, 1)
    mla_absorbed_kernel(const __grid_constant__ CUtensorMap q,
                        const __grid_constant__ CUtensorMap map, const mla_absorbed_args args,
                        const e4m3_cache cache) {
    typedef absorbed_shape<KC> S;
    DYNAMIC_SHARED(memory);
    block_barriers barriers;
    barriers.q = (uint64_t *)(memory + S::BARRIERS_AT);
    barriers.full = barriers.q + 1;
    barriers.empty = barriers.full + STAGES;
    barriers.raw = barriers.empty + STAGES;
    block_work at;
    at.split = blockIdx.x;
    at.head = blockIdx.y * MLA_ROWS;
    at.row = blockIdx.z;
    at.position = args.position[at.row];
    at.first = at.split * MLA_SPLIT_CUDA;
    const uint32_t pages = at.position / MLA_BLOCK + 1;
    if (at.first >= pages)
        return;
    at.pages = pages - at.first < MLA_SPLIT_CUDA ? pages - at.first : MLA_SPLIT_CUDA;
    if (threadIdx.x == 0) {
        mbarrier_init(barriers.q, 1);
        for (int s = 0; s < STAGES; s++) {
            mbarrier_init(&barriers.full[s], E4M3 ? GROUP_THREADS : 1);
            mbarrier_init(&barriers.empty[s], MATH_GROUPS * GROUP_THREADS / WARP);
            mbarrier_init(&barriers.raw[s], 1);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x / GROUP_THREADS == MATH_GROUPS) {
        registers_less<E4M3 ? 72 : 40>();
        const uint32_t *table = args.pages + (size_t)at.row * args.pages_stride;
        if (threadIdx.x % GROUP_THREADS == 0)
            produce_queries<KC>(&q, args, at, memory, barriers);
        if (E4M3)
            expand<KC>(&map, cache, table, at, memory, barriers);
        else if (threadIdx.x % GROUP_THREADS == 0)
            produce<KC>(&map, table, at, memory, barriers);
    } else {
        registers_more<E4M3 ? 216 : 232>();
        consume<KC, VC, E4M3>(args, at, memory, barriers);
    }
}

/* Joins the runs of each row and head, in ascending order. One thread for each latent. */
static __global__ void mla_join_kernel(const mla_absorbed_args args, uint32_t width,
                                       uint32_t padded, bf16 *ret, size_t ret_stride) {
    const uint32_t i = element_index(), head = blockIdx.y;
    const size_t row = blockIdx.z;
    if (i >= padded)
        return;
    const uint32_t splits = args.position[row] / MLA_BLOCK / MLA_SPLIT_CUDA + 1;
    float maximum = -INFINITY, sum = 0, value = 0;
    for (uint32_t s = 0; s < splits && i < args.kv_lora; s++) {
        const float *from = args.work + ((row * args.splits + s) * args.heads + head) * (width + 2);
        const float next = from[0] > maximum ? from[0] : maximum;
        const float before = device_exp(maximum - next), here = device_exp(from[0] - next);
        sum = __fmaf_rn(sum, before, from[1] * here);
        value = __fmaf_rn(value, before, from[2 + i] * here);
        maximum = next;
    }
    ret[(row * args.heads + head) * ret_stride + i] =
        i < args.kv_lora ? round_bf16(value / sum) : (bf16)0;
}

template <int KC, int VC, bool E4M3>
static int run(void *stream, const struct mla_absorbed_cuda *plan, uint32_t rows, bf16 *ret,
               size_t ret_stride) {
    typedef absorbed_shape<KC> S;
    const mla_absorbed_args args = plan->args;
    const e4m3_cache from = {(const uint8_t *)plan->e4m3, latent_scale_at(args.kv_lora),
                             latent_rope_at(args.kv_lora),
                             latent_row_bytes(args.kv_lora, args.rope)};
    auto *kernel = mla_absorbed_kernel<KC, VC, E4M3>;
    const int error = shared_allow(kernel, S::SHARED);
    if (error != 0)
        return error;
    const CUtensorMap q = tensor_map(plan->q), cache = tensor_map(plan->cache);
    LAUNCH(kernel, dim3(args.splits, (args.heads + MLA_ROWS - 1) / MLA_ROWS, rows), THREADS,
           S::SHARED, stream, q, cache, args, from);
    const uint32_t width = MATH_GROUPS * VC * CHUNK, padded = (args.kv_lora + 31) / 32 * 32;
    dim3 grid = element_grid(args.heads, padded);
    grid.z = rows;
    LAUNCH(mla_join_kernel, grid, ELEMENT_THREADS, 0, stream, args, width, padded, ret, ret_stride);
    return launch_result();
}

/* Widths that there are kernels for: chunks of a key, and of the values of each warpgroup. */
static bool is_wide(const mla_absorbed_args *args) { /* DeepSeek-V2, V3, Kimi K2, Moonlight */
    return args->kv_lora == 512 && args->rope <= 64;
}

bool mla_absorbed_offers_cuda(uint32_t kv_lora, uint32_t rope) {
    return (kv_lora == 512 || kv_lora == 128) && rope <= 64;
}

size_t mla_absorbed_work_bytes_cuda(uint32_t kv_lora, uint32_t heads, uint32_t rows,
                                    uint32_t splits) {
    return (size_t)rows * splits * heads * (kv_lora + 2) * sizeof(float);
}

static int plan_queries(struct mla_absorbed_cuda *ret, const bf16 *q, size_t q_stride,
                        uint32_t rows, const struct mla_absorbed_args *args) {
    ret->args = *args;
    ret->e4m3 = NULL;
    if (!mla_absorbed_offers_cuda(args->kv_lora, args->rope))
        return CUDA_UNSUPPORTED;
    return tensor_map_make(&ret->q, q, (uint64_t)rows * args->heads, q_stride, 2, q_stride * 2,
                           MLA_ROWS);
}

int mla_absorbed_plan_cuda(struct mla_absorbed_cuda *ret, const bf16 *q, size_t q_stride,
                           uint32_t rows, const bf16 *cache, size_t cache_stride,
                           uint32_t cache_pages, const struct mla_absorbed_args *args) {
    const int error = plan_queries(ret, q, q_stride, rows, args);
    return error != 0 ? error
                      : tensor_map_make(&ret->cache, cache, (uint64_t)cache_pages * MLA_BLOCK,
                                        cache_stride, 2, cache_stride * 2, MLA_BLOCK);
}

int mla_absorbed_plan_e4m3_cuda(struct mla_absorbed_cuda *ret, const bf16 *q, size_t q_stride,
                                uint32_t rows, const void *cache, uint32_t cache_pages,
                                const struct mla_absorbed_args *args) {
    const int error = plan_queries(ret, q, q_stride, rows, args);
    const uint32_t bytes = latent_row_bytes(args->kv_lora, args->rope);
    ret->e4m3 = cache;
    return error != 0 ? error
                      : tensor_map_make(&ret->cache, cache, (uint64_t)cache_pages * MLA_BLOCK,
                                        bytes, 1, bytes, MLA_BLOCK);
}

template <int KC, int VC>
static int run_form(void *stream, const struct mla_absorbed_cuda *plan, uint32_t rows, bf16 *ret,
                    size_t ret_stride) {
    return plan->e4m3 != NULL ? run<KC, VC, true>(stream, plan, rows, ret, ret_stride)
                              : run<KC, VC, false>(stream, plan, rows, ret, ret_stride);
}

int mla_absorbed_cuda(void *stream, const struct mla_absorbed_cuda *plan, uint32_t rows, bf16 *ret,
                      size_t ret_stride) {
    if (rows == 0)
        return 0;
    return is_wide(&plan->args) ? run_form<9, 4>(stream, plan, rows, ret, ret_stride)
                                : run_form<3, 1>(stream, plan, rows, ret, ret_stride);
}
