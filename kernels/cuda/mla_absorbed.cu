/* Multi-head latent attention in the absorbed form (generated tokens), over the paged latent cache.
 *
 * One block takes 64 heads of one row and a run of MLA_SPLIT pages of its sequence: a fixed size,
 * counted from the sequence's beginning, so what is added to what depends on the row's position
 * only and not on the batch. A second kernel joins the runs in ascending order, also where there is
 * one.
 *
 * Two warpgroups multiply, each for half of the latents (they compute the scores twice rather than
 * wait for each other twice a page); one thread of a third brings the queries and then the pages by
 * tensor map into two stages. */
#include "kernels/cuda/mla.cuh"

#include "kernels/cuda/elementwise.cuh"

enum { STAGES = 2, MATH_GROUPS = 2, THREADS = 384 };

template <int KC> struct absorbed_shape {
    enum {
        TILE = KC * CHUNK_BYTES, /* 64 rows of queries or positions */
        BARRIERS_AT = (1 + STAGES) * TILE,
        SHARED = BARRIERS_AT + (1 + 2 * STAGES) * 8,
    };
};

struct block_work {
    uint32_t row, head, split;
    uint32_t first, pages; /* of the split */
    uint32_t position;
};

template <int KC>
static __device__ void produce(const CUtensorMap *q, const CUtensorMap *cache,
                               const mla_absorbed_args &args, const block_work &at, uint8_t *memory,
                               uint64_t *q_full, uint64_t *full, uint64_t *empty) {
    typedef absorbed_shape<KC> S;
    mbarrier_expect(q_full, S::TILE);
    for (int c = 0; c < KC; c++)
        tma_load(memory + c * CHUNK_BYTES, q, q_full, c * CHUNK, at.row * args.heads + at.head);
    const uint32_t *table = args.pages + (size_t)at.row * args.pages_stride;
    for (uint32_t i = 0; i < at.pages; i++) {
        const uint32_t s = i % STAGES, turn = i / STAGES;
        const uint32_t page = table[at.first + i];
        mbarrier_wait(&empty[s], (turn & 1) ^ 1);
        mbarrier_expect(&full[s], S::TILE);
        for (int c = 0; c < KC; c++)
            tma_load(memory + (1 + s) * S::TILE + c * CHUNK_BYTES, cache, &full[s], c * CHUNK,
                     page * MLA_BLOCK);
    }
}

template <int KC, int VC>
static __device__ void consume(const mla_absorbed_args &args, const block_work &at, uint8_t *memory,
                               uint64_t *q_full, uint64_t *full, uint64_t *empty) {
    typedef absorbed_shape<KC> S;
    const uint32_t group = threadIdx.x / GROUP_THREADS, t = threadIdx.x % GROUP_THREADS;
    float acc[values<VC>::REGISTERS];
#pragma unroll
    for (int i = 0; i < values<VC>::REGISTERS; i++)
        acc[i] = 0;
    softmax_rows softmax;
    softmax_begin(softmax);
    mbarrier_wait(q_full, 0);
    for (uint32_t i = 0; i < at.pages; i++) {
        const uint32_t s = i % STAGES, turn = i / STAGES;
        const uint32_t q = shared_address(memory), page = q + (1 + s) * S::TILE;
        const uint32_t seen = at.position + 1 - (at.first + i) * MLA_BLOCK;
        const uint32_t visible[2] = {seen, seen};
        float score[32], factor[2];
        uint32_t p[16];
        mbarrier_wait(&full[s], turn & 1);
        mla_scores<KC>(score, q, page);
        softmax_block(softmax, score, args.scale, visible, p, factor);
        mla_accumulate<VC>(acc, factor, p, page + group * VC * CHUNK_BYTES);
        if (t % WARP == 0)
            mbarrier_arrive(&empty[s]);
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

template <int KC, int VC>
static __global__ void __launch_bounds__(THREADS, 1)
    mla_absorbed_kernel(const __grid_constant__ CUtensorMap q,
                        const __grid_constant__ CUtensorMap cache, const mla_absorbed_args args) {
    typedef absorbed_shape<KC> S;
    DYNAMIC_SHARED(memory);
    uint64_t *q_full = (uint64_t *)(memory + S::BARRIERS_AT), *full = q_full + 1,
             *empty = full + STAGES;
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
        mbarrier_init(q_full, 1);
        for (int s = 0; s < STAGES; s++) {
            mbarrier_init(&full[s], 1);
            mbarrier_init(&empty[s], MATH_GROUPS * GROUP_THREADS / WARP);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x / GROUP_THREADS == MATH_GROUPS) {
        registers_less<40>();
        if (threadIdx.x % GROUP_THREADS == 0)
            produce<KC>(&q, &cache, args, at, memory, q_full, full, empty);
    } else {
        registers_more<232>();
        consume<KC, VC>(args, at, memory, q_full, full, empty);
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

template <int KC, int VC>
static int run(void *stream, const struct mla_absorbed_cuda *plan, uint32_t rows, bf16 *ret,
               size_t ret_stride) {
    typedef absorbed_shape<KC> S;
    const mla_absorbed_args args = plan->args;
    auto *kernel = mla_absorbed_kernel<KC, VC>;
    const int error = shared_allow(kernel, S::SHARED);
    if (error != 0)
        return error;
    const CUtensorMap q = tensor_map(plan->q), cache = tensor_map(plan->cache);
    LAUNCH(kernel, dim3(args.splits, (args.heads + MLA_ROWS - 1) / MLA_ROWS, rows), THREADS,
           S::SHARED, stream, q, cache, args);
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

int mla_absorbed_plan_cuda(struct mla_absorbed_cuda *ret, const bf16 *q, size_t q_stride,
                           uint32_t rows, const bf16 *cache, size_t cache_stride,
                           uint32_t cache_pages, const struct mla_absorbed_args *args) {
    ret->args = *args;
    if (!mla_absorbed_offers_cuda(args->kv_lora, args->rope))
        return CUDA_UNSUPPORTED;
    int error = tensor_map_make(&ret->q, q, (uint64_t)rows * args->heads, q_stride, 2, q_stride * 2,
                                MLA_ROWS);
    if (error == 0)
        error = tensor_map_make(&ret->cache, cache, (uint64_t)cache_pages * MLA_BLOCK, cache_stride,
                                2, cache_stride * 2, MLA_BLOCK);
    return error;
}

int mla_absorbed_cuda(void *stream, const struct mla_absorbed_cuda *plan, uint32_t rows, bf16 *ret,
                      size_t ret_stride) {
    if (rows == 0)
        return 0;
    return is_wide(&plan->args) ? run<9, 4>(stream, plan, rows, ret, ret_stride)
                                : run<3, 1>(stream, plan, rows, ret, ret_stride);
}
