/* Multi-head latent attention in the expanded form (prompt tokens): keys and values of every
 * visible position are expanded from the latents by kv_b (gemm.cu), laid out by mla_expand_cuda,
 * and walked in blocks of 64 positions in ascending order. One block of threads takes 128 rows of
 * one sequence and one head: two warpgroups of 64 rows, and one thread that brings the tiles. A row
 * beyond which a block of positions lies is not changed by it, so a row's bits do not depend on its
 * chunk. */
#include "kernels/cuda/mla.cuh"

#include "kernels/cuda/elementwise.cuh"

enum { STAGES = 3, MATH_GROUPS = 2, THREADS = 384 };

template <int KC, int VC> struct expanded_shape {
    enum {
        Q_BYTES = MATH_GROUPS * KC * CHUNK_BYTES,
        STAGE_BYTES = (KC + VC) * CHUNK_BYTES,
        BARRIERS_AT = Q_BYTES + STAGES * STAGE_BYTES,
        SHARED = BARRIERS_AT + (1 + 2 * STAGES) * 8,
    };
};

template <int KC, int VC>
static __device__ void produce(const CUtensorMap *q, const CUtensorMap *key,
                               const CUtensorMap *value, const mla_expanded_args &args,
                               uint32_t row, uint32_t blocks, uint8_t *memory, uint64_t *q_full,
                               uint64_t *full, uint64_t *empty) {
    typedef expanded_shape<KC, VC> S;
    const uint32_t head = blockIdx.y;
    mbarrier_expect(q_full, S::Q_BYTES);
    for (uint32_t g = 0; g < MATH_GROUPS; g++)
        for (int c = 0; c < KC; c++)
            tma_load(memory + (g * KC + c) * CHUNK_BYTES, q, q_full,
                     head * args.q_stride + c * CHUNK, row + g * MLA_ROWS);
    for (uint32_t b = 0; b < blocks; b++) {
        const uint32_t s = b % STAGES, turn = b / STAGES;
        uint8_t *stage = memory + S::Q_BYTES + s * S::STAGE_BYTES;
        mbarrier_wait(&empty[s], (turn & 1) ^ 1);
        mbarrier_expect(&full[s], S::STAGE_BYTES);
        for (int c = 0; c < KC; c++)
            tma_load(stage + c * CHUNK_BYTES, key, &full[s], (head * KC + c) * CHUNK,
                     b * MLA_BLOCK);
        for (int c = 0; c < VC; c++)
            tma_load(stage + (KC + c) * CHUNK_BYTES, value, &full[s], (head * VC + c) * CHUNK,
                     b * MLA_BLOCK);
    }
}

template <int KC, int VC>
static __device__ void consume(const mla_expanded_args &args, uint32_t row, uint32_t blocks,
                               uint8_t *memory, uint64_t *q_full, uint64_t *full, uint64_t *empty,
                               bf16 *ret, size_t ret_stride) {
    typedef expanded_shape<KC, VC> S;
    const uint32_t group = threadIdx.x / GROUP_THREADS, t = threadIdx.x % GROUP_THREADS;
    const uint32_t first = row + group * MLA_ROWS + t / WARP * 16 + t % WARP / 4;
    uint32_t end[2]; /* positions that a row sees */
    for (int half = 0; half < 2; half++)
        end[half] = first + 8 * half < args.rows ? args.position[first + 8 * half] + 1 : 1;
    float acc[values<VC>::REGISTERS];
#pragma unroll
    for (int i = 0; i < values<VC>::REGISTERS; i++)
        acc[i] = 0;
    softmax_rows softmax;
    softmax_begin(softmax);
    mbarrier_wait(q_full, 0);
    for (uint32_t b = 0; b < blocks; b++) {
        const uint32_t s = b % STAGES, turn = b / STAGES, begin = b * MLA_BLOCK;
        const uint32_t q = shared_address(memory) + group * KC * CHUNK_BYTES;
        const uint32_t stage = shared_address(memory) + S::Q_BYTES + s * S::STAGE_BYTES;
        const uint32_t visible[2] = {end[0] > begin ? end[0] - begin : 0,
                                     end[1] > begin ? end[1] - begin : 0};
        float score[32], factor[2];
        uint32_t p[16];
        mbarrier_wait(&full[s], turn & 1);
        mla_scores<KC>(score, q, stage);
        softmax_block(softmax, score, args.scale, visible, p, factor);
        mla_accumulate<VC>(acc, factor, p, stage + KC * CHUNK_BYTES);
        if (t % WARP == 0)
            mbarrier_arrive(&empty[s]);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint32_t r = first + 8 * half;
        if (r >= args.rows)
            continue;
        bf16 *to = ret + (size_t)r * ret_stride + blockIdx.y * args.v;
#pragma unroll
        for (int j = 0; j < values<VC>::REGISTERS / 4; j++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const uint32_t column = 8 * j + t % 4 * 2 + c;
                if (column < args.v)
                    to[column] = round_bf16(acc[4 * j + 2 * half + c] / softmax.sum[half]);
            }
    }
}

template <int KC, int VC>
static __global__ void __launch_bounds__(THREADS, 1)
    mla_expanded_kernel(const __grid_constant__ CUtensorMap q,
                        const __grid_constant__ CUtensorMap key,
                        const __grid_constant__ CUtensorMap value, const mla_expanded_args args,
                        bf16 *ret, size_t ret_stride) {
    typedef expanded_shape<KC, VC> S;
    DYNAMIC_SHARED(memory);
    uint64_t *q_full = (uint64_t *)(memory + S::BARRIERS_AT), *full = q_full + 1,
             *empty = full + STAGES;
    const uint32_t row = blockIdx.x * MATH_GROUPS * MLA_ROWS;
    const uint32_t last =
        row + MATH_GROUPS * MLA_ROWS < args.rows ? row + MATH_GROUPS * MLA_ROWS - 1 : args.rows - 1;
    const uint32_t blocks = args.position[last] / MLA_BLOCK + 1; /* positions ascend */
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
            produce<KC, VC>(&q, &key, &value, args, row, blocks, memory, q_full, full, empty);
    } else {
        registers_more<232>();
        consume<KC, VC>(args, row, blocks, memory, q_full, full, empty, ret, ret_stride);
    }
}

/* ---- Laying out keys and values ---- */

/* Output of kv_b [positions, heads, nope | v] and the pages' rotated keys, to keys [positions,
 * heads, nope padded | rope padded, padded to whole chunks] and values [positions, heads, v
 * padded]. */
static __global__ void mla_expand_kernel(const mla_expanded_args args, const float *kv,
                                         size_t kv_stride, const bf16 *cache, size_t cache_stride,
                                         uint32_t rope_at, const uint32_t *pages,
                                         uint32_t positions, uint32_t key_width,
                                         uint32_t value_width, bf16 *key, bf16 *value) {
    const uint32_t i = element_index(), head = blockIdx.z, nope_wide = (args.nope + 31) / 32 * 32;
    if (i >= key_width + value_width)
        return;
    ROW_LOOP(r, positions) {
        const float *from = kv + r * kv_stride + (size_t)head * (args.nope + args.v);
        if (i >= key_width) {
            const uint32_t at = i - key_width;
            value[(r * args.heads + head) * value_width + at] =
                at < args.v ? round_bf16(from[args.nope + at]) : (bf16)0;
            continue;
        }
        bf16 element = 0;
        if (i < args.nope)
            element = round_bf16(from[i]);
        else if (i >= nope_wide && i - nope_wide < args.rope)
            element =
                cache[((size_t)pages[r / MLA_BLOCK] * MLA_BLOCK + r % MLA_BLOCK) * cache_stride +
                      rope_at + i - nope_wide];
        key[(r * args.heads + head) * key_width + i] = element;
    }
}

static uint32_t chunks(uint32_t width) {
    return (width + CHUNK - 1) / CHUNK;
}
static uint32_t key_chunks(const mla_expanded_args *args) {
    return chunks((args->nope + 31) / 32 * 32 + (args->rope + 31) / 32 * 32);
}

size_t mla_expanded_key_bytes_cuda(const struct mla_expanded_args *args, uint32_t positions) {
    return (size_t)positions * args->heads * key_chunks(args) * CHUNK * sizeof(bf16);
}
size_t mla_expanded_value_bytes_cuda(const struct mla_expanded_args *args, uint32_t positions) {
    return (size_t)positions * args->heads * chunks(args->v) * CHUNK * sizeof(bf16);
}

int mla_expand_cuda(void *stream, const struct mla_expanded_args *parameters, const float *kv,
                    size_t kv_stride, const bf16 *cache, size_t cache_stride, uint32_t rope_at,
                    const uint32_t *pages, uint32_t positions, bf16 *ret_key, bf16 *ret_value) {
    const mla_expanded_args args = *parameters;
    const uint32_t key_width = key_chunks(&args) * CHUNK, value_width = chunks(args.v) * CHUNK;
    if (positions == 0)
        return 0;
    dim3 grid = element_grid(positions, key_width + value_width);
    grid.z = args.heads;
    LAUNCH(mla_expand_kernel, grid, ELEMENT_THREADS, 0, stream, args, kv, kv_stride, cache,
           cache_stride, rope_at, pages, positions, key_width, value_width, ret_key, ret_value);
    return launch_result();
}

template <int KC, int VC>
static int run(void *stream, const mla_expanded_args &args, const bf16 *q, const bf16 *key,
               const bf16 *value, uint32_t positions, bf16 *ret, size_t ret_stride) {
    typedef expanded_shape<KC, VC> S;
    struct tensor_map_cuda q_room, key_room, value_room;
    const uint64_t q_width = (uint64_t)args.heads * args.q_stride;
    const uint64_t key_width = (uint64_t)args.heads * KC * CHUNK;
    const uint64_t value_width = (uint64_t)args.heads * VC * CHUNK;
    int error = tensor_map_make(&q_room, q, args.rows, q_width, 2, q_width * 2, MLA_ROWS);
    if (error == 0)
        error = tensor_map_make(&key_room, key, positions, key_width, 2, key_width * 2, MLA_BLOCK);
    if (error == 0)
        error = tensor_map_make(&value_room, value, positions, value_width, 2, value_width * 2,
                                MLA_BLOCK);
    auto *kernel = mla_expanded_kernel<KC, VC>;
    if (error == 0)
        error = shared_allow(kernel, S::SHARED);
    if (error != 0)
        return error;
    const CUtensorMap q_map = tensor_map(q_room), key_map = tensor_map(key_room),
                      value_map = tensor_map(value_room);
    const uint32_t rows = MATH_GROUPS * MLA_ROWS;
    LAUNCH(kernel, dim3((args.rows + rows - 1) / rows, args.heads), THREADS, S::SHARED, stream,
           q_map, key_map, value_map, args, ret, ret_stride);
    return launch_result();
}

/* DeepSeek-V2, V3, Kimi K2: 128 + 64, 128; the demo model: 32 + 32, 32. */
bool mla_expanded_offers_cuda(const struct mla_expanded_args *args) {
    return (key_chunks(args) == 3 && chunks(args->v) == 2) ||
           (key_chunks(args) == 1 && chunks(args->v) == 1);
}

int mla_expanded_cuda(void *stream, const struct mla_expanded_args *args, const bf16 *q,
                      const bf16 *key, const bf16 *value, uint32_t positions, bf16 *ret,
                      size_t ret_stride) {
    if (args->rows == 0)
        return 0;
    if (!mla_expanded_offers_cuda(args))
        return CUDA_UNSUPPORTED;
    if (key_chunks(args) == 3) /* 128 + 64, 128 */
        return run<3, 2>(stream, *args, q, key, value, positions, ret, ret_stride);
    return run<1, 1>(stream, *args, q, key, value, positions, ret, ret_stride);
}
