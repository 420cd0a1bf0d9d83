/* Between attention and experts, on the device: which rows go to whom and where their outputs come
 * back (route), the answer (reply), and what of it counts (check). Everything that says who holds
 * what is a table in device memory, read when it runs; every number that the other side sent is
 * checked before it is an address. Rows and items are numbered in ascending order of (row, place in
 * its list), whatever the blocks do. */
#include "kernels/cuda/elementwise.cuh"

#define NOWHERE 0xffffffffu
#define UNUSED  0xffffu

static size_t list_bytes(uint32_t rows_max, uint32_t k) {
    return (size_t)rows_max * k * sizeof(uint16_t);
}
size_t exchange_note_bytes(uint32_t rows_max, uint32_t k) {
    return (EXCHANGE_HEAD * sizeof(uint32_t) + 2 * list_bytes(rows_max, k) + 15) / 16 * 16;
}
const uint16_t *exchange_list(const void *note) {
    return (const uint16_t *)((const uint32_t *)note + EXCHANGE_HEAD);
}

/* Sum of the lanes below, and of all. */
static __device__ uint32_t lanes_below(uint32_t value, uint32_t *ret_all) {
    const uint32_t lane = threadIdx.x % WARP;
    uint32_t sum = value;
    for (uint32_t by = 1; by < WARP; by *= 2) {
        const uint32_t other = __shfl_up_sync(0xffffffff, sum, by);
        sum += lane >= by ? other : 0;
    }
    *ret_all = __shfl_sync(0xffffffff, sum, WARP - 1);
    return sum - value;
}

/* One warp for each destination, a lane for each row, 32 rows at a time. */
static __global__ void route_kernel(const exchange_cuda x, const uint16_t *expert,
                                    const int32_t *destination_of, uint32_t experts, uint8_t *notes,
                                    size_t note_bytes, uint32_t *ret_count, uint32_t *ret_row,
                                    uint32_t *ret_place) {
    const uint32_t d = blockIdx.x, lane = threadIdx.x;
    uint32_t *head = (uint32_t *)(notes + d * note_bytes);
    uint16_t *list = (uint16_t *)(head + EXCHANGE_HEAD), *number = list + (size_t)x.rows_max * x.k;
    uint32_t rows = 0, items = 0;
    for (uint32_t first = 0; first < x.rows; first += WARP) {
        const uint32_t r = first + lane;
        uint32_t mine = 0;
        for (uint32_t s = 0; r < x.rows && s < x.k; s++) {
            const uint32_t e = expert[(size_t)r * x.k + s];
            const int32_t to = e < experts ? destination_of[e] : -1;
            mine += to == (int32_t)d;
            if (d == 0 && (to < 0 || to >= (int32_t)x.destinations))
                ret_place[(size_t)r * x.k + s] = NOWHERE;
        }
        uint32_t rows_here, items_here;
        const uint32_t row = rows + lanes_below(mine > 0, &rows_here);
        uint32_t item = items + lanes_below(mine, &items_here);
        /* Items beyond the capacity leave their row without any: all that come later are beyond it
         * too. */
        const bool fits = row < x.rows_max && item + mine <= x.items_max;
        for (uint32_t s = 0; mine > 0 && s < x.k; s++) {
            const uint32_t e = expert[(size_t)r * x.k + s];
            const bool here = e < experts && destination_of[e] == (int32_t)d;
            if (here)
                ret_place[(size_t)r * x.k + s] = fits ? d * x.items_max + item : NOWHERE;
            if (row < x.rows_max) {
                list[(size_t)row * x.k + s] = here && fits ? (uint16_t)e : (uint16_t)UNUSED;
                number[(size_t)row * x.k + s] = (uint16_t)item;
            }
            item += here;
        }
        if (mine > 0 && row < x.rows_max)
            ret_row[(size_t)d * x.rows_max + row] = r;
        rows += rows_here;
        items += items_here;
    }
    rows = rows < x.rows_max ? rows : x.rows_max;
    for (uint32_t i = rows * x.k + lane; i < x.rows_max * x.k; i += WARP)
        list[i] = UNUSED;
    if (lane == 0) {
        head[0] = *x.ticket + x.layer;
        head[1] = rows;
        head[2] = items < x.items_max ? items : x.items_max;
        head[3] = 0;
        ret_count[d] = rows;
    }
}

int exchange_route_cuda(void *stream, const struct exchange_cuda *exchange, const uint16_t *expert,
                        const int32_t *destination_of, uint32_t experts, void *ret_note,
                        uint32_t *ret_count, uint32_t *ret_row, uint32_t *ret_place) {
    const exchange_cuda x = *exchange;
    const size_t note_bytes = exchange_note_bytes(x.rows_max, x.k);
    LAUNCH(route_kernel, x.destinations, WARP, 0, stream, x, expert, destination_of, experts,
           (uint8_t *)ret_note, note_bytes, ret_count, ret_row, ret_place);
    return launch_result();
}

/* Along y the entries of the list. */
static __global__ void reply_kernel(const uint32_t *head, uint32_t entries, uint32_t items_max,
                                    const uint32_t *place, const float *y, size_t y_stride,
                                    uint32_t hidden, uint32_t *ret_status, float *ret_output) {
    const uint32_t i = element_index();
    const uint16_t *list = (const uint16_t *)(head + EXCHANGE_HEAD), *number = list + entries;
    ROW_LOOP(entry, entries) {
        const uint32_t item = number[entry], at = place[entry];
        if (list[entry] == UNUSED || item >= items_max)
            continue;
        if (i == 0)
            ret_status[item] = at != NOWHERE ? head[0] : 0;
        if (i < hidden && at != NOWHERE)
            ret_output[(size_t)item * hidden + i] = y[at * y_stride + i];
    }
}

int exchange_reply_cuda(void *stream, const void *note, uint32_t rows_max, uint32_t k,
                        uint32_t items_max, const uint32_t *place, const float *y, size_t y_stride,
                        uint32_t hidden, uint32_t *ret_status, float *ret_output) {
    const uint32_t entries = rows_max * k;
    if (entries == 0)
        return 0;
    LAUNCH(reply_kernel, element_grid(entries, hidden), ELEMENT_THREADS, 0, stream,
           (const uint32_t *)note, entries, items_max, place, y, y_stride, hidden, ret_status,
           ret_output);
    return launch_result();
}

static __global__ void check_kernel(const exchange_cuda x, const uint16_t *expert,
                                    const uint32_t *place, const uint32_t *status,
                                    uint16_t *ret_expert, uint32_t *ret_void) {
    const uint32_t r = element_index();
    if (r >= x.rows)
        return;
    const uint32_t ticket = *x.ticket + x.layer;
    bool lacks = false;
    for (uint32_t s = 0; s < x.k; s++) {
        const size_t entry = (size_t)r * x.k + s;
        uint16_t e = expert[entry];
        const uint32_t at = place[entry];
        if (e != UNUSED && (at >= x.destinations * x.items_max || status[at] != ticket)) {
            e = (uint16_t)UNUSED;
            lacks = true;
        }
        ret_expert[entry] = e;
    }
    if (lacks && ret_void[r] == 0)
        ret_void[r] = x.layer + 1;
}

int exchange_check_cuda(void *stream, const struct exchange_cuda *exchange, const uint16_t *expert,
                        const uint32_t *place, const uint32_t *status, uint16_t *ret_expert,
                        uint32_t *ret_void) {
    const exchange_cuda x = *exchange;
    if (x.rows == 0)
        return 0;
    LAUNCH(check_kernel, element_grid(1, x.rows), ELEMENT_THREADS, 0, stream, x, expert, place,
           status, ret_expert, ret_void);
    return launch_result();
}
