/* The matrix products: y = x W^T for BF16, and for FP8 with a scale for each row and 128 of K of x
 * and for each 128 x 128 of W. Dense, or grouped by expert: `masked` (each expert has room for
 * `rows` rows, of which count[expert] are there: decode) or `contiguous` (blocks of 128 rows, each
 * of one expert: prefill). Own bits, row-independent: an element's sum runs over K in one fixed
 * order whatever the tile, the batch and the group.
 *
 * Batched: each group is a slice of x's and y's columns (a head). A tile's last columns of x may
 * then belong to the next slice: they meet zeros, for the copy engine gives zeros beyond W's k.
 *
 * A block computes 64 or 128 rows x 128 outputs. Its last warpgroup only copies: one thread brings
 * tiles of 128 bytes of K by tensor map into a ring of stages. The other warpgroups multiply 64
 * rows each. FP8: the tensor cores' sums are kept over 128 of K only, then multiplied by the scales
 * and added in FP32 registers (DeepSeek-V3, 2412.19437, section 3.3.2), because their own
 * accumulator is narrower than FP32.
 *
 *   full[s]: the tiles of stage s have arrived       empty[s]: all warps have read them */
#include "kernels/cuda/tensor_map.cuh"

enum { TILE_N = 128, GROUP_ROWS = 64, GROUP_THREADS = 128, STEPS = 4, STEP_BYTES = 32 };

template <int GROUPS> struct shape {
    enum {
        ROWS = GROUPS * GROUP_ROWS,
        THREADS = (GROUPS + 1) * GROUP_THREADS,
        A_BYTES = ROWS * TILE_ROW_BYTES,
        STAGE_BYTES = A_BYTES + TILE_N * TILE_ROW_BYTES,
        STAGES = GROUPS == 1 ? 8 : 6,
        BARRIERS_AT = STAGES * STAGE_BYTES,
        SHARED = BARRIERS_AT + 2 * STAGES * 8,
    };
};

/* What of the problem a block has. */
struct part {
    uint32_t row, rows; /* first row of x and y, and how many from there on are there */
    uint32_t group;     /* whose weights */
    uint32_t column;    /* first output */
};

template <int GROUPS> static __device__ bool part_of_block(const gemm_args &args, part *ret) {
    ret->column = blockIdx.x * TILE_N;
    const uint32_t row = blockIdx.y * shape<GROUPS>::ROWS;
    ret->group = blockIdx.z;
    ret->row = row;
    ret->rows = args.rows > row ? args.rows - row : 0;
    if (args.count != NULL) {
        const uint32_t count = args.count[blockIdx.z];
        ret->row = blockIdx.z * args.rows + row;
        ret->rows = count > row ? count - row : 0;
    } else if (args.block_group != NULL) {
        const int32_t group = args.block_group[row / 128];
        if (group < 0)
            return false;
        ret->group = (uint32_t)group;
    }
    return ret->rows > 0;
}

template <bool FP8, int GROUPS>
static __device__ void produce(const gemm_args &args, const CUtensorMap *a, const CUtensorMap *b,
                               const part &at, uint8_t *memory, uint64_t *full, uint64_t *empty) {
    typedef shape<GROUPS> S;
    const uint32_t elements = FP8 ? TILE_ROW_BYTES : TILE_ROW_BYTES / 2;
    const uint32_t blocks = (args.k + elements - 1) / elements;
    for (uint32_t kb = 0; kb < blocks; kb++) {
        const uint32_t s = kb % S::STAGES, turn = kb / S::STAGES;
        mbarrier_wait(&empty[s], (turn & 1) ^ 1);
        mbarrier_expect(&full[s], S::STAGE_BYTES);
        uint8_t *stage = memory + s * S::STAGE_BYTES;
        for (int g = 0; g < GROUPS; g++)
            tma_load(stage + g * GROUP_ROWS * TILE_ROW_BYTES, a, &full[s],
                     at.group * args.x_group_step + kb * elements, at.row + g * GROUP_ROWS);
        tma_load(stage + S::A_BYTES, b, &full[s], kb * elements, at.group * args.n + at.column);
    }
}

/* acc += partial * (scale of the row * scale of the block of weights), for the thread's two rows.
 */
static __device__ void promote(float (&acc)[64], const float (&partial)[64], float first,
                               float second) {
#pragma unroll
    for (int j = 0; j < 16; j++) {
        acc[4 * j] = __fmaf_rn(partial[4 * j], first, acc[4 * j]);
        acc[4 * j + 1] = __fmaf_rn(partial[4 * j + 1], first, acc[4 * j + 1]);
        acc[4 * j + 2] = __fmaf_rn(partial[4 * j + 2], second, acc[4 * j + 2]);
        acc[4 * j + 3] = __fmaf_rn(partial[4 * j + 3], second, acc[4 * j + 3]);
    }
}

/* The 4 products of one stage, into d. */
template <bool FP8>
static __device__ void multiply(float (&d)[64], uint32_t a, uint32_t b, bool accumulate) {
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        const uint64_t a_tile = tile_descriptor(a + step * STEP_BYTES, 16, 1024);
        const uint64_t b_tile = tile_descriptor(b + step * STEP_BYTES, 16, 1024);
        if (FP8)
            wgmma_e4m3_n128(d, a_tile, b_tile, accumulate || step > 0);
        else
            wgmma_bf16_n128(d, a_tile, b_tile, accumulate || step > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
}

template <bool FP8, int GROUPS>
static __device__ void consume(const gemm_args &args, const part &at, uint8_t *memory,
                               uint64_t *full, uint64_t *empty) {
    typedef shape<GROUPS> S;
    const uint32_t group = threadIdx.x / GROUP_THREADS, t = threadIdx.x % GROUP_THREADS;
    const uint32_t row = group * GROUP_ROWS + t / WARP * 16 + t % WARP / 4; /* and + 8 */
    const uint32_t elements = FP8 ? TILE_ROW_BYTES : TILE_ROW_BYTES / 2;
    const uint32_t blocks = (args.k + elements - 1) / elements;
    /* Rows that are not there read the scale of the last one that is. */
    const uint32_t last = at.rows - 1;
    const float *first_scale = NULL, *second_scale = NULL, *b_scale = NULL;
    if (FP8) {
        first_scale =
            args.a_scale + (size_t)(at.row + (row < last ? row : last)) * args.a_scale_row_step;
        second_scale = args.a_scale +
                       (size_t)(at.row + (row + 8 < last ? row + 8 : last)) * args.a_scale_row_step;
        b_scale =
            args.b_scale + ((size_t)at.group * ((args.n + 127) / 128) + at.column / 128) * blocks;
    }
    float acc[64];
#pragma unroll
    for (int i = 0; i < 64; i++)
        acc[i] = 0;
    for (uint32_t kb = 0; kb < blocks; kb++) {
        const uint32_t s = kb % S::STAGES, turn = kb / S::STAGES;
        const uint32_t stage = shared_address(memory) + s * S::STAGE_BYTES;
        const uint32_t a = stage + group * GROUP_ROWS * TILE_ROW_BYTES, b = stage + S::A_BYTES;
        if (FP8) {
            const float b_here = b_scale[kb];
            const float first = first_scale[kb * args.a_scale_group_step] * b_here;
            const float second = second_scale[kb * args.a_scale_group_step] * b_here;
            float partial[64];
            mbarrier_wait(&full[s], turn & 1);
            multiply<FP8>(partial, a, b, false);
            if (t % WARP == 0)
                mbarrier_arrive(&empty[s]);
            promote(acc, partial, first, second);
        } else {
            mbarrier_wait(&full[s], turn & 1);
            multiply<FP8>(acc, a, b, true);
            if (t % WARP == 0)
                mbarrier_arrive(&empty[s]);
        }
    }
    const uint32_t column = at.column + t % 4 * 2;
    float *y = args.y + (size_t)(at.row + row) * args.y_stride +
               (size_t)at.group * args.y_group_step + column;
#pragma unroll
    for (int j = 0; j < 16; j++) {
        const bool one = column + 8 * j < args.n, two = column + 8 * j + 1 < args.n;
        if (row < at.rows) {
            if (one)
                y[8 * j] = acc[4 * j];
            if (two)
                y[8 * j + 1] = acc[4 * j + 1];
        }
        if (row + 8 < at.rows) {
            if (one)
                y[8 * args.y_stride + 8 * j] = acc[4 * j + 2];
            if (two)
                y[8 * args.y_stride + 8 * j + 1] = acc[4 * j + 3];
        }
    }
}

template <bool FP8, int GROUPS>
static __global__ void __launch_bounds__(shape<GROUPS>::THREADS, 1)
    gemm_kernel(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,
                const gemm_args args) {
    typedef shape<GROUPS> S;
    DYNAMIC_SHARED(memory);
    uint64_t *full = (uint64_t *)(memory + S::BARRIERS_AT), *empty = full + S::STAGES;
    part at;
    if (!part_of_block<GROUPS>(args, &at)) /* the same for all threads of the block */
        return;
    if (threadIdx.x == 0) {
        for (int s = 0; s < S::STAGES; s++) {
            mbarrier_init(&full[s], 1);
            mbarrier_init(&empty[s], GROUPS * GROUP_THREADS / WARP);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x / GROUP_THREADS == GROUPS) {
        if (GROUPS > 1)
            registers_less<40>();
        if (threadIdx.x % GROUP_THREADS == 0)
            produce<FP8, GROUPS>(args, &a, &b, at, memory, full, empty);
    } else {
        if (GROUPS > 1)
            registers_more<232>();
        consume<FP8, GROUPS>(args, at, memory, full, empty);
    }
}

static bool is_batched(const struct gemm_args *args) {
    return args->y_group_step != 0;
}

int gemm_plan_cuda(struct gemm_cuda *ret, bool fp8, const void *x, size_t x_stride_bytes,
                   const void *w, size_t w_stride_bytes, const struct gemm_args *args) {
    const uint32_t element = fp8 ? 1 : 2, groups = args->groups > 0 ? args->groups : 1;
    const uint64_t rows = args->count != NULL ? (uint64_t)args->rows * groups : args->rows;
    ret->fp8 = fp8;
    ret->args = *args;
    ret->args.groups = groups;
    if (rows == 0 || args->n == 0)
        return 0; /* nothing to run */
    if (is_batched(args) && fp8)
        return CUDA_UNSUPPORTED;
    const uint64_t columns = (uint64_t)(groups - 1) * args->x_group_step + args->k;
    int error = tensor_map_make(&ret->x, x, rows, columns, element, x_stride_bytes, GROUP_ROWS);
    if (error == 0)
        error = tensor_map_make(&ret->w, w, (uint64_t)groups * args->n, args->k, element,
                                w_stride_bytes, TILE_N);
    return error;
}

template <bool FP8, int GROUPS> static int run(void *stream, const struct gemm_cuda *plan) {
    typedef shape<GROUPS> S;
    const gemm_args args = plan->args;
    auto *kernel = gemm_kernel<FP8, GROUPS>;
    const int error = shared_allow(kernel, S::SHARED);
    if (error != 0)
        return error;
    const dim3 grid((args.n + TILE_N - 1) / TILE_N, (args.rows + S::ROWS - 1) / S::ROWS,
                    args.count != NULL || is_batched(&args) ? args.groups : 1);
    const CUtensorMap x = tensor_map(plan->x), w = tensor_map(plan->w);
    LAUNCH(kernel, grid, S::THREADS, S::SHARED, stream, x, w, args);
    return launch_result();
}

int gemm_run_cuda(void *stream, const struct gemm_cuda *plan) {
    if (plan->args.rows == 0 || plan->args.n == 0)
        return 0;
    /* One warpgroup where few rows are expected: more blocks share the weights' columns then. */
    const bool small = plan->args.rows <= GROUP_ROWS;
    if (plan->fp8)
        return small ? run<true, 1>(stream, plan) : run<true, 2>(stream, plan);
    return small ? run<false, 1>(stream, plan) : run<false, 2>(stream, plan);
}
