/* Dispatch on the device: which rows go to which of the experts that are held here (or to which
 * destination), always in ascending order of (row, slot), so that the place of a row never depends
 * on how the blocks ran. The tables are data in device memory: a captured graph stays right when a
 * new placement is written into them. */
#include "kernels/cuda/elementwise.cuh"
#include "kernels/cuda/quantise.cuh"

enum { THREADS = 256, WARPS = THREADS / 32 };

/* One block for each slot: walks all items in order and counts those of its expert. */
static __global__ void dispatch_kernel(const uint16_t *expert, uint32_t items,
                                       const int32_t *slot_of, uint32_t experts, uint32_t capacity,
                                       uint32_t *ret_count, uint32_t *ret_item,
                                       uint32_t *ret_place) {
    DYNAMIC_SHARED(memory);
    uint32_t *in_warp = (uint32_t *)memory; /* [WARPS] */
    const uint32_t slot = blockIdx.x, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    uint32_t count = 0;
    for (uint32_t first = 0; first < items; first += THREADS) {
        const uint32_t i = first + threadIdx.x;
        bool mine = false;
        if (i < items && expert[i] < experts)
            mine = slot_of[expert[i]] == (int32_t)slot;
        const uint32_t votes = __ballot_sync(0xffffffff, mine);
        if (lane == 0)
            in_warp[warp] = (uint32_t)__popc(votes);
        __syncthreads();
        uint32_t at = count + (uint32_t)__popc(votes & ((1u << lane) - 1));
        for (uint32_t w = 0; w < WARPS; w++) {
            at += w < warp ? in_warp[w] : 0;
            count += in_warp[w];
        }
        if (mine && at < capacity) {
            ret_item[(size_t)slot * capacity + at] = i;
            ret_place[i] = slot * capacity + at;
        }
        __syncthreads();
    }
    if (threadIdx.x == 0)
        ret_count[slot] = count < capacity ? count : capacity;
}

static __global__ void place_clear_kernel(uint32_t *place, uint32_t items) {
    const uint32_t i = element_index();
    if (i < items)
        place[i] = 0xffffffff;
}

int dispatch_cuda(void *stream, const uint16_t *expert, uint32_t items, const int32_t *slot_of,
                  uint32_t experts, uint32_t slots, uint32_t capacity, uint32_t *ret_count,
                  uint32_t *ret_item, uint32_t *ret_place) {
    if (slots == 0)
        return 0;
    if (items > 0)
        LAUNCH(place_clear_kernel, element_grid(1, items), ELEMENT_THREADS, 0, stream, ret_place,
               items);
    LAUNCH(dispatch_kernel, slots, THREADS, WARPS * sizeof(uint32_t), stream, expert, items,
           slot_of, experts, capacity, ret_count, ret_item, ret_place);
    return launch_result();
}

/* The rows of every slot, packed: bytes of a row are copied four at a time. */
static __global__ void pack_kernel(const uint32_t *x, size_t x_stride, uint32_t words, uint32_t k,
                                   const uint32_t *count, const uint32_t *item, uint32_t capacity,
                                   uint32_t *ret, size_t ret_stride) {
    const uint32_t i = element_index(), slot = blockIdx.z;
    if (i >= words)
        return;
    const uint32_t rows = count[slot];
    ROW_LOOP(r, rows) {
        const size_t place = (size_t)slot * capacity + r;
        ret[place * ret_stride + i] = x[(size_t)(item[place] / k) * x_stride + i];
    }
}

int pack_cuda(void *stream, const void *x, size_t x_stride_bytes, uint32_t row_bytes, uint32_t k,
              const uint32_t *count, const uint32_t *item, uint32_t slots, uint32_t capacity,
              void *ret, size_t ret_stride_bytes) {
    const uint32_t words = row_bytes / 4;
    if (slots == 0 || capacity == 0 || words == 0)
        return 0;
    dim3 grid = element_grid(capacity, words);
    grid.z = slots;
    LAUNCH(pack_kernel, grid, ELEMENT_THREADS, 0, stream, (const uint32_t *)x, x_stride_bytes / 4,
           words, k, count, item, capacity, (uint32_t *)ret, ret_stride_bytes / 4);
    return launch_result();
}

/* ---- Rows that travel in E4M3 (kernels/e4m3_row.h) ---- */

/* The rows of every slot, packed and quantised: one warp for each row and 128 channels. */
static __global__ void pack_e4m3_kernel(const bf16 *x, size_t x_stride, uint32_t n, uint32_t k,
                                        const uint32_t *count, const uint32_t *item,
                                        uint32_t capacity, uint8_t *ret, size_t ret_stride) {
    const uint32_t lane = threadIdx.x % WARP, slot = blockIdx.z;
    const uint32_t group = blockIdx.x * WARPS + threadIdx.x / WARP,
                   groups = (n + E4M3_ROW_GROUP - 1) / E4M3_ROW_GROUP;
    if (group >= groups)
        return;
    const uint32_t rows = count[slot];
    ROW_LOOP(r, rows) {
        const size_t place = (size_t)slot * capacity + r;
        const bf16 *from = x + (size_t)(item[place] / k) * x_stride;
        uint8_t *to = ret + place * ret_stride;
        float value[4], scale;
        for (int j = 0; j < 4; j++) {
            const uint32_t i = group * E4M3_ROW_GROUP + lane * 4 + j;
            value[j] = i < n ? widen_bf16(from[i]) : 0.0f;
        }
        const uint32_t packed = quantise_group(value, scale);
        *(uint32_t *)(to + group * E4M3_ROW_GROUP + lane * 4) = packed;
        if (lane == 0)
            *(float *)(to + groups * E4M3_ROW_GROUP + group * sizeof(float)) = scale;
    }
}

int pack_e4m3_cuda(void *stream, const bf16 *x, size_t x_stride, uint32_t n, uint32_t k,
                   const uint32_t *count, const uint32_t *item, uint32_t slots, uint32_t capacity,
                   uint8_t *ret, size_t ret_stride_bytes) {
    if (slots == 0 || capacity == 0 || n == 0)
        return 0;
    const uint32_t rows = capacity < GRID_ROWS_MAX ? capacity : GRID_ROWS_MAX;
    LAUNCH(pack_e4m3_kernel, dim3((e4m3_row_groups(n) + WARPS - 1) / WARPS, rows, slots), THREADS,
           0, stream, x, x_stride, n, k, count, item, capacity, ret, ret_stride_bytes);
    return launch_result();
}

/* A frame's rows to the operand of a product, each as often as its items want it. */
static __global__ void unpack_e4m3_kernel(const uint8_t *rows, size_t row_stride, uint32_t groups,
                                          uint32_t k, const uint32_t *count, const uint32_t *item,
                                          uint32_t capacity, uint8_t *ret, size_t ret_stride,
                                          float *ret_scale, size_t scale_row_step,
                                          size_t scale_group_step) {
    const uint32_t i = element_index(), slot = blockIdx.z; /* four channels */
    if (i >= groups * (E4M3_ROW_GROUP / 4))
        return;
    const uint32_t items = count[slot], group = i / (E4M3_ROW_GROUP / 4);
    ROW_LOOP(r, items) {
        const size_t place = (size_t)slot * capacity + r;
        const uint8_t *from = rows + (size_t)(item[place] / k) * row_stride;
        *(uint32_t *)(ret + place * ret_stride + 4 * i) = *(const uint32_t *)(from + 4 * i);
        if (i % (E4M3_ROW_GROUP / 4) == 0)
            ret_scale[place * scale_row_step + group * scale_group_step] =
                *(const float *)(from + groups * E4M3_ROW_GROUP + group * sizeof(float));
    }
}

int unpack_e4m3_cuda(void *stream, const uint8_t *rows, size_t row_stride_bytes, uint32_t n,
                     uint32_t k, const uint32_t *count, const uint32_t *item, uint32_t slots,
                     uint32_t capacity, uint8_t *ret, size_t ret_stride, float *ret_scale,
                     size_t scale_row_step, size_t scale_group_step) {
    const uint32_t groups = e4m3_row_groups(n);
    if (slots == 0 || capacity == 0 || n == 0)
        return 0;
    dim3 grid = element_grid(capacity, groups * (E4M3_ROW_GROUP / 4));
    grid.z = slots;
    LAUNCH(unpack_e4m3_kernel, grid, ELEMENT_THREADS, 0, stream, rows, row_stride_bytes, groups, k,
           count, item, capacity, ret, ret_stride, ret_scale, scale_row_step, scale_group_step);
    return launch_result();
}
