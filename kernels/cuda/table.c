/* The device as a table of operations (kernels/ops.h), so that engine/ runs on it unchanged:
 * products and attention on the device, each call to its end, rows in host memory; the row
 * operations, whose bits are the CPU's anyway, on the CPU. This is the form for being right: golden
 * logits, identity, whole troupes. It is not the form for being fast, which keeps everything on the
 * device and never waits inside a layer (docs/gpu.md).
 *
 * Weights lie on the device in BF16, those stored as E4M3 multiplied by their scales and rounded;
 * in the fp8 profile those stored as E4M3 stay so, where their part of the file is cut at the
 * borders of its 128 x 128 blocks, and meet activations quantised for each row and 128 of K. One
 * thread at a time may use it: engines with a device have one compute thread. */
#include "kernels/cuda/table.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/cuda_ops.h"
#include "kernels/internal.h"
#include "kernels/rows.h"
#include "kernels/staging.h"

enum { BLOCK = 128, STAGERS = 3, STAGING_BYTES = 4 << 20 };
#define DEVICE_RESERVE (512u << 20) /* for the runtime's own, NCCL's, and fragments */

/* Device memory that grows to a high-water mark and stays; and the host's side of it. */
struct room {
    void *device;
    uint8_t *host;
    size_t bytes;
};
static struct {
    struct kernels table;
    const struct kernels *cpu;
    bool fp8;
    struct room x, y, quantised, scales, cache, packed, cache_rows, place, pages, position, work,
        key, value, ret;
} device;

/* The device failed: what it holds is lost, and so is this process. */
static void must(int error) {
    ASSERT(error == 0);
}

static void room_grow(struct room *room, size_t bytes) {
    if (bytes <= room->bytes)
        return;
    if (room->device != NULL)
        device_give_cuda(room->device);
    free(room->host);
    room->bytes = bytes + bytes / 2;
    must(device_take_cuda(room->bytes, &room->device));
    room->host = malloc(room->bytes);
    ASSERT(room->host != NULL);
}

/* ---- Matrices ---- */

static size_t matrix_bytes(const struct weight_view *view) {
    (void)view;
    return 64;
}

static void matrix_release(struct matrix *self) {
    struct device_matrix *on_device = self->data;
    device_give_cuda(on_device->weights);
    if (on_device->scales != NULL)
        device_give_cuda(on_device->scales);
    *on_device = (struct device_matrix){0};
}

static uint32_t blocks(uint32_t n) {
    return (n + BLOCK - 1) / BLOCK;
}

static bool stays_e4m3(const struct weight_view *view) {
    return device.fp8 && view->dtype == DTYPE_E4M3 && view->scale != NULL && !view->transposed &&
           !view->latent && view->block == BLOCK && view->row0 % BLOCK == 0 &&
           view->col0 % BLOCK == 0;
}

/* Page-locked buffers, one set for each thread that packs: the background, what is urgent, and the
 * actor's own. Whoever finds none copies plainly. */
static struct stager {
    atomic_flag taken;
    bool open;
    struct staging staging;
} stagers[STAGERS];

static struct stager *stager_take(void) {
    for (int i = 0; i < STAGERS; i++) {
        struct stager *stager = &stagers[i];
        if (atomic_flag_test_and_set(&stager->taken))
            continue;
        struct staging_api api;
        if (!stager->open && staging_api_cuda(&api) == 0) {
            stager->open = staging_open(&stager->staging, &api, STAGING_BYTES) == 0;
            if (!stager->open)
                staging_api_drop_cuda(&api);
        }
        if (stager->open)
            return stager;
        atomic_flag_clear(&stager->taken);
    }
    return NULL;
}

/* What a matrix's rows are made of. */
struct image_rows {
    const uint8_t *bytes;
    size_t row_bytes;
};
struct source {
    const struct weight_view *view;
    uint32_t stride; /* elements */
};

static void fill_e4m3(void *context, uint32_t first, uint32_t rows, void *ret) {
    const struct source *source = context;
    const struct weight_view *view = source->view;
    uint8_t *to = ret;
    for (uint32_t n = first; n < first + rows; n++, to += source->stride) {
        memcpy(to, (const uint8_t *)view->data + ((size_t)view->row0 + n) * view->stride + view->col0,
               view->k);
        memset(to + view->k, 0, source->stride - view->k);
    }
}

static void fill_bf16(void *context, uint32_t first, uint32_t rows, void *ret) {
    const struct source *source = context;
    const struct weight_view *view = source->view;
    bf16 *to = ret;
    for (uint32_t n = first; n < first + rows; n++, to += source->stride) {
        if (view->dtype == DTYPE_BF16 && !view->transposed)
            memcpy(to,
                   (const bf16 *)view->data + ((size_t)view->row0 + n) * view->stride + view->col0,
                   view->k * sizeof *to);
        else
            for (uint32_t k = 0; k < view->k; k++)
                to[k] = bf16_from_float(weight_element(view, n, k));
        memset(to + view->k, 0, (source->stride - view->k) * sizeof *to);
    }
}

static void fill_copy(void *context, uint32_t first, uint32_t rows, void *ret) {
    const struct image_rows *image = context;
    memcpy(ret, image->bytes + first * image->row_bytes, rows * image->row_bytes);
}

/* `rows` rows to new device memory. */
static void *put_rows(size_t row_bytes, uint32_t rows, staging_fill *fill, void *context) {
    void *to;
    must(device_take_cuda(rows * row_bytes, &to));
    struct stager *stager = row_bytes <= STAGING_BYTES ? stager_take() : NULL;
    if (stager != NULL) {
        must(staging_put(&stager->staging, to, row_bytes, rows, fill, context));
        atomic_flag_clear(&stager->taken);
        return to;
    }
    uint8_t *whole = malloc(rows * row_bytes + 1);
    ASSERT(whole != NULL);
    fill(context, 0, rows, whole);
    must(device_put_cuda(to, whole, rows * row_bytes));
    free(whole);
    return to;
}

static void pack_e4m3(struct device_matrix *to, const struct weight_view *view) {
    to->stride = blocks(view->k) * BLOCK;
    const size_t scales = (size_t)blocks(view->n) * blocks(view->k);
    float *scale = calloc(scales, sizeof *scale);
    ASSERT(scale != NULL);
    for (uint32_t n = 0; n < blocks(view->n); n++)
        for (uint32_t k = 0; k < blocks(view->k); k++)
            scale[(size_t)n * blocks(view->k) + k] =
                view->scale[((size_t)view->row0 / BLOCK + n) * view->scale_stride +
                            view->col0 / BLOCK + k];
    struct source source = {view, to->stride};
    to->weights = put_rows(to->stride, view->n, fill_e4m3, &source);
    must(device_take_cuda(scales * sizeof *scale, (void **)&to->scales));
    must(device_put_cuda(to->scales, scale, scales * sizeof *scale));
    free(scale);
}

static void pack_bf16(struct device_matrix *to, const struct weight_view *view) {
    to->scales = NULL;
    to->stride = (uint32_t)activation_stride(view->k);
    struct source source = {view, to->stride};
    to->weights = put_rows(to->stride * sizeof(bf16), view->n, fill_bf16, &source);
}

/* ---- Moving: weights as bytes, rows and then scales, as they lie on the device ---- */

static size_t weight_bytes(const struct matrix *w) {
    const struct device_matrix *on_device = w->data;
    return (size_t)w->n * on_device->stride * (on_device->scales != NULL ? 1 : sizeof(bf16));
}
static size_t scale_bytes(uint32_t n, uint32_t k) {
    return (size_t)blocks(n) * blocks(k) * sizeof(float);
}

static size_t matrix_image_bytes(const struct weight_view *view) {
    return stays_e4m3(view)
               ? (size_t)view->n * blocks(view->k) * BLOCK + scale_bytes(view->n, view->k)
               : (size_t)view->n * activation_stride(view->k) * sizeof(bf16);
}

static int device_fits(uint64_t bytes, const char *what, struct failure *failure) {
    uint64_t free_bytes = 0, total_bytes = 0;
    const int error = device_room_cuda(&free_bytes, &total_bytes);
    if (error != 0)
        return fail(failure, ERR_UNSUPPORTED, "the GPU does not say what is free of it: CUDA error %d",
                    error);
    const uint64_t room = free_bytes > DEVICE_RESERVE ? free_bytes - DEVICE_RESERVE : 0;
    if (bytes <= room)
        return 0;
    return fail(failure, ERR_NO_MEMORY,
                "%s need %llu MiB, the GPU has %llu of %llu MiB free, %u of which are kept back: use "
                "more GPUs, or give this process less to hold",
                what, (unsigned long long)(bytes >> 20), (unsigned long long)(free_bytes >> 20),
                (unsigned long long)(total_bytes >> 20), DEVICE_RESERVE >> 20);
}

static void matrix_read(const struct matrix *w, size_t offset, size_t bytes, void *ret) {
    const struct device_matrix *on_device = w->data;
    const size_t weights = weight_bytes(w);
    uint8_t *to = ret;
    if (offset < weights) {
        const size_t count = weights - offset < bytes ? weights - offset : bytes;
        must(device_get_cuda(to, (const uint8_t *)on_device->weights + offset, count));
        offset += count, bytes -= count, to += count;
    }
    if (bytes > 0)
        must(device_get_cuda(to, (const uint8_t *)on_device->scales + (offset - weights), bytes));
}

static struct matrix matrix_of(const struct weight_view *view, struct device_matrix *to, bool e4m3) {
    return (struct matrix){.n = view->n,
                           .k = view->k,
                           .dtype = e4m3 ? DTYPE_E4M3 : DTYPE_BF16,
                           .data = to,
                           .bytes = sizeof *to,
                           .device_bytes = matrix_image_bytes(view),
                           .release = matrix_release};
}

static void matrix_pack(struct matrix *ret, const struct weight_view *view, void *memory) {
    _Static_assert(sizeof(struct device_matrix) <= 64, "fits what matrix_bytes asks for");
    struct device_matrix *to = memory;
    const bool e4m3 = stays_e4m3(view);
    if (e4m3)
        pack_e4m3(to, view);
    else
        pack_bf16(to, view);
    *ret = matrix_of(view, to, e4m3);
}

static void matrix_take_image(struct matrix *ret, const struct weight_view *view, void *memory,
                              const void *image) {
    struct device_matrix *to = memory;
    const bool e4m3 = stays_e4m3(view);
    to->stride = e4m3 ? blocks(view->k) * BLOCK : (uint32_t)activation_stride(view->k);
    to->scales = NULL;
    struct image_rows rows = {image, e4m3 ? to->stride : to->stride * sizeof(bf16)};
    to->weights = put_rows(rows.row_bytes, view->n, fill_copy, &rows);
    if (e4m3) {
        const size_t bytes = scale_bytes(view->n, view->k);
        must(device_take_cuda(bytes, (void **)&to->scales));
        must(device_put_cuda(to->scales, rows.bytes + view->n * rows.row_bytes, bytes));
    }
    *ret = matrix_of(view, to, e4m3);
}

const struct device_matrix *kernels_cuda_matrix(const struct matrix *matrix) {
    return matrix->data;
}

/* y = x W^T on the device, x as device.quantised and device.scales [groups, rows] hold it. */
static void product_quantised(const struct matrix *w, uint32_t rows, float *y) {
    const struct device_matrix *weights = w->data;
    const size_t width = (size_t)blocks(w->k) * BLOCK;
    const struct gemm_args args = {.rows = rows,
                                   .n = w->n,
                                   .k = w->k,
                                   .groups = 1,
                                   .y = y,
                                   .y_stride = w->n,
                                   .a_scale = device.scales.device,
                                   .b_scale = weights->scales,
                                   .a_scale_row_step = 1,
                                   .a_scale_group_step = rows};
    struct gemm_cuda plan;
    must(gemm_plan_cuda(&plan, true, device.quantised.device, width, weights->weights,
                        weights->stride, &args));
    must(gemm_run_cuda(NULL, &plan));
}

/* y = x W^T on the device; both stay there. x: [rows, x_stride] BF16. */
static void product(const struct matrix *w, const void *x, size_t x_stride, uint32_t rows,
                    float *y) {
    const struct device_matrix *weights = w->data;
    if (weights->scales == NULL) {
        const struct gemm_args args = {
            .rows = rows, .n = w->n, .k = w->k, .groups = 1, .y = y, .y_stride = w->n};
        struct gemm_cuda plan;
        must(gemm_plan_cuda(&plan, false, x, x_stride * sizeof(bf16), weights->weights,
                            weights->stride * sizeof(bf16), &args));
        must(gemm_run_cuda(NULL, &plan));
        return;
    }
    const size_t width = (size_t)blocks(w->k) * BLOCK;
    room_grow(&device.quantised, rows * width);
    room_grow(&device.scales, (size_t)rows * blocks(w->k) * sizeof(float));
    must(quantise_bf16_cuda(NULL, x, x_stride, rows, w->k, device.quantised.device, width,
                            device.scales.device, 1, rows));
    product_quantised(w, rows, y);
}

static bool takes_rows(const struct matrix *w) {
    return ((const struct device_matrix *)w->data)->scales != NULL;
}

/* Rows that were quantised before they came here. */
static void matmul_rows(const struct matrix *w, const uint8_t *x, size_t x_stride, uint32_t rows,
                        float *y, size_t y_stride, const struct parallel *parallel) {
    (void)parallel;
    if (rows == 0 || w->n == 0)
        return;
    const size_t width = (size_t)blocks(w->k) * BLOCK, groups = blocks(w->k),
                 out = (size_t)w->n * sizeof(float);
    room_grow(&device.quantised, rows * width);
    room_grow(&device.scales, rows * groups * sizeof(float));
    room_grow(&device.y, rows * out);
    for (uint32_t r = 0; r < rows; r++) {
        memcpy(device.quantised.host + r * width, x + r * x_stride, width);
        for (size_t g = 0; g < groups; g++)
            memcpy(device.scales.host + (g * rows + r) * sizeof(float),
                   x + r * x_stride + width + g * sizeof(float), sizeof(float));
    }
    must(device_put_cuda(device.quantised.device, device.quantised.host, rows * width));
    must(device_put_cuda(device.scales.device, device.scales.host, rows * groups * sizeof(float)));
    product_quantised(w, rows, device.y.device);
    must(device_get_cuda(device.y.host, device.y.device, rows * out));
    for (uint32_t r = 0; r < rows; r++)
        memcpy(y + r * y_stride, device.y.host + r * out, out);
}

static void matmul(const struct matrix *w, const void *x, size_t x_stride, uint32_t rows, float *y,
                   size_t y_stride, const struct parallel *parallel) {
    (void)parallel;
    if (rows == 0 || w->n == 0)
        return;
    const size_t width = activation_stride(w->k), out = (size_t)w->n * sizeof(float);
    room_grow(&device.x, (size_t)rows * width * sizeof(bf16));
    room_grow(&device.y, rows * out);
    for (uint32_t r = 0; r < rows; r++)
        memcpy(device.x.host + r * width * sizeof(bf16), (const bf16 *)x + r * x_stride,
               width * sizeof(bf16));
    must(device_put_cuda(device.x.device, device.x.host, (size_t)rows * width * sizeof(bf16)));
    product(w, device.x.device, width, rows, device.y.device);
    must(device_get_cuda(device.y.host, device.y.device, rows * out));
    for (uint32_t r = 0; r < rows; r++)
        memcpy(y + r * y_stride, device.y.host + r * out, out);
}

/* ---- Attention ---- */

static uint32_t pages_of(uint32_t position) {
    return position / PAGE_TOKENS + 1;
}

/* Puts the pages of all rows on the device, those of neighbouring rows with the same table once.
 * device.pages: [rows, *ret_stride] their numbers there. Returns how many there are. */
static uint32_t put_pages(const struct mla_rows *rows, size_t page_bytes, uint32_t *ret_stride) {
    uint32_t longest = 0, total = 0;
    for (uint32_t r = 0; r < rows->rows; r++) {
        const uint32_t pages = pages_of(rows->position[r]);
        longest = pages > longest ? pages : longest;
        total += pages;
    }
    room_grow(&device.pages, (size_t)rows->rows * longest * sizeof(uint32_t));
    room_grow(&device.cache, total * page_bytes);
    uint32_t *number = (uint32_t *)device.pages.host, used = 0, there = 0;
    memset(number, 0, (size_t)rows->rows * longest * sizeof *number);
    for (uint32_t r = 0; r < rows->rows; r++) {
        const bool same = r > 0 && rows->pages[r] == rows->pages[r - 1];
        const uint32_t pages = pages_of(rows->position[r]);
        there = same ? there : 0; /* of the table, put so far */
        for (uint32_t b = 0; b < pages; b++) {
            uint32_t *to = &number[(size_t)r * longest + b];
            if (b < there) {
                *to = number[(size_t)(r - 1) * longest + b];
                continue;
            }
            memcpy(device.cache.host + used * page_bytes, rows->pages[r][b], page_bytes);
            *to = used++;
        }
        if (pages < there) /* rows of a table ascend; were they not, its pages come again */
            there = pages;
        else
            there = pages;
    }
    must(device_put_cuda(device.cache.device, device.cache.host, used * page_bytes));
    must(device_put_cuda(device.pages.device, number,
                         (size_t)rows->rows * longest * sizeof *number));
    *ret_stride = longest;
    return used;
}

static void put_positions(const struct mla_rows *rows) {
    room_grow(&device.position, rows->rows * sizeof(uint32_t));
    must(device_put_cuda(device.position.device, rows->position, rows->rows * sizeof(uint32_t)));
}

/* The pages of device.cache once more in their E4M3 form, in device.packed, as a device that keeps
 * its cache that way has them. The values are the same, because the engine has rounded them. */
static void pack_cache(const struct mla_shape *shape, uint32_t pages) {
    const size_t stride = cache_stride(shape->kv_lora, shape->rope);
    const uint32_t rows = pages * PAGE_TOKENS;
    room_grow(&device.packed, (size_t)rows * latent_row_bytes(shape->kv_lora, shape->rope));
    room_grow(&device.cache_rows, (size_t)rows * stride * sizeof(float));
    room_grow(&device.place, 2 * (size_t)rows * sizeof(uint32_t));
    uint32_t *position = (uint32_t *)device.place.host, *page = position + rows;
    for (uint32_t r = 0; r < rows; r++) { /* each row's table has one page: its own */
        position[r] = r % PAGE_TOKENS;
        page[r] = r / PAGE_TOKENS;
    }
    must(device_put_cuda(device.place.device, position, 2 * (size_t)rows * sizeof(uint32_t)));
    const float *wide = device.cache_rows.device;
    must(widen_cuda(NULL, device.cache.device, stride, rows, (uint32_t)stride,
                    device.cache_rows.device, stride));
    const struct latent_append_cuda args = {.rows = rows,
                                            .kv_lora = shape->kv_lora,
                                            .rope = shape->rope,
                                            .latent = wide,
                                            .latent_stride = stride,
                                            .key = wide + activation_stride(shape->kv_lora),
                                            .key_stride = stride,
                                            .position = device.place.device,
                                            .pages = (uint32_t *)device.place.device + rows,
                                            .pages_stride = 1,
                                            .cache = device.packed.device};
    must(latent_append_cuda(NULL, true, &args));
}

static void put_queries(const void *q, size_t bytes) {
    room_grow(&device.x, bytes);
    must(device_put_cuda(device.x.device, q, bytes));
}

static void mla_absorbed(const struct mla_shape *shape, const struct mla_rows *rows, const void *q,
                         size_t q_stride, void *ret, size_t ret_stride,
                         const struct parallel *parallel) {
    const size_t stride = cache_stride(shape->kv_lora, shape->rope);
    const size_t width = activation_stride(shape->kv_lora),
                 states = (size_t)rows->rows * shape->heads;
    if (rows->rows == 0)
        return;
    if (!mla_absorbed_offers_cuda(shape->kv_lora, shape->rope)) {
        device.cpu->mla_absorbed(shape, rows, q, q_stride, ret, ret_stride, parallel);
        return;
    }
    uint32_t table_stride;
    const uint32_t pages = put_pages(rows, PAGE_TOKENS * stride * sizeof(bf16), &table_stride);
    const uint32_t splits = (table_stride + MLA_SPLIT_CUDA - 1) / MLA_SPLIT_CUDA;
    put_positions(rows);
    put_queries(q, states * q_stride * sizeof(bf16));
    room_grow(&device.work,
              mla_absorbed_work_bytes_cuda(shape->kv_lora, shape->heads, rows->rows, splits));
    room_grow(&device.ret, states * width * sizeof(bf16));
    const struct mla_absorbed_args args = {.heads = shape->heads,
                                           .kv_lora = shape->kv_lora,
                                           .rope = shape->rope,
                                           .scale = shape->scale,
                                           .position = device.position.device,
                                           .pages = device.pages.device,
                                           .pages_stride = table_stride,
                                           .splits = splits,
                                           .work = device.work.device};
    struct mla_absorbed_cuda plan;
    if (shape->latent_e4m3) {
        pack_cache(shape, pages);
        must(mla_absorbed_plan_e4m3_cuda(&plan, device.x.device, q_stride, rows->rows,
                                         device.packed.device, pages, &args));
    } else {
        must(mla_absorbed_plan_cuda(&plan, device.x.device, q_stride, rows->rows,
                                    device.cache.device, stride, pages, &args));
    }
    must(mla_absorbed_cuda(NULL, &plan, rows->rows, device.ret.device, width));
    must(device_get_cuda(device.ret.host, device.ret.device, states * width * sizeof(bf16)));
    for (size_t i = 0; i < states; i++)
        memcpy((bf16 *)ret + i * ret_stride, device.ret.host + i * width * sizeof(bf16),
               width * sizeof(bf16));
}

static void mla_expanded(const struct mla_shape *shape, const struct mla_rows *rows,
                         const struct matrix *kv_b, const void *q, size_t q_stride, void *ret,
                         size_t ret_stride, const struct parallel *parallel) {
    (void)parallel;
    if (rows->rows == 0)
        return;
    /* The last row sees what all others see. */
    const struct mla_rows last = {1, rows->position + rows->rows - 1, rows->pages + rows->rows - 1};
    const size_t stride = cache_stride(shape->kv_lora, shape->rope);
    const uint32_t positions = last.position[0] + 1;
    const struct mla_expanded_args args = {.rows = rows->rows,
                                           .heads = shape->heads,
                                           .nope = shape->nope,
                                           .rope = shape->rope,
                                           .v = shape->v,
                                           .q_stride = (uint32_t)q_stride,
                                           .scale = shape->scale,
                                           .position = NULL};
    struct mla_expanded_args with_positions = args;
    uint32_t table_stride;
    const uint32_t pages = put_pages(&last, PAGE_TOKENS * stride * sizeof(bf16), &table_stride);
    size_t key_row = stride, key_at = activation_stride(shape->kv_lora); /* elements */
    const void *key_cache = device.cache.device;
    if (shape->latent_e4m3) { /* latents read back over those that came, keys where they lie */
        pack_cache(shape, pages);
        key_cache = device.packed.device;
        key_row = latent_row_bytes(shape->kv_lora, shape->rope) / sizeof(bf16);
        key_at = latent_rope_at(shape->kv_lora) / sizeof(bf16);
        must(latent_widen_cuda(NULL, key_cache, shape->kv_lora, shape->rope, device.pages.device,
                               positions, device.cache.device, stride));
    }
    put_positions(rows);
    put_queries(q, (size_t)rows->rows * shape->heads * q_stride * sizeof(bf16));
    with_positions.position = device.position.device;
    room_grow(&device.y, (size_t)positions * kv_b->n * sizeof(float));
    room_grow(&device.key, mla_expanded_key_bytes_cuda(&args, positions));
    room_grow(&device.value, mla_expanded_value_bytes_cuda(&args, positions));
    const size_t width = (size_t)shape->heads * shape->v;
    room_grow(&device.ret, rows->rows * width * sizeof(bf16));
    /* The pages lie one after the other there: the latents of all positions are rows. */
    product(kv_b, device.cache.device, stride, positions, device.y.device);
    must(mla_expand_cuda(NULL, &with_positions, device.y.device, kv_b->n, key_cache, key_row,
                         (uint32_t)key_at, device.pages.device, positions, device.key.device,
                         device.value.device));
    must(mla_expanded_cuda(NULL, &with_positions, device.x.device, device.key.device,
                           device.value.device, positions, device.ret.device, width));
    must(device_get_cuda(device.ret.host, device.ret.device, rows->rows * width * sizeof(bf16)));
    for (uint32_t r = 0; r < rows->rows; r++) {
        bf16 *to = (bf16 *)ret + r * ret_stride;
        memset(to, 0, activation_stride(width) * sizeof(bf16));
        memcpy(to, device.ret.host + r * width * sizeof(bf16), width * sizeof(bf16));
    }
}

const struct kernels *kernels_cuda(const char *name, bool fp8, struct failure *failure) {
    device.fp8 = fp8;
    device.cpu = kernels_select(PROFILE_BF16, ISA_BEST, failure);
    if (device.cpu == NULL)
        return NULL;
    device.table = *device.cpu;
    device.table.name = name;
    device.table.matrix_bytes = matrix_bytes;
    device.table.matrix_pack = matrix_pack;
    device.table.matrix_adopt = NULL;
    device.table.matrix_image_bytes = matrix_image_bytes;
    device.table.device_fits = device_fits;
    device.table.matrix_read = matrix_read;
    device.table.matrix_take_image = matrix_take_image;
    device.table.matmul = matmul;
    device.table.matmul_latent = matmul; /* weights are packed for the device */
    /* Quantised on the device as on the CPU: quantise.cu. */
    device.table.row_to_e4m3 = fp8 ? row_to_e4m3_best() : NULL;
    device.table.takes_e4m3 = fp8 ? takes_rows : NULL;
    device.table.matmul_e4m3 = fp8 ? matmul_rows : NULL;
    device.table.matmul_add = NULL;
    device.table.mla_queries = NULL;
    device.table.mla_absorbed = mla_absorbed;
    device.table.mla_expanded = mla_expanded;
    return &device.table;
}

bool kernels_cuda_offer(const struct mla_shape *shape, struct failure *failure) {
    const struct mla_expanded_args args = {.nope = shape->nope, .rope = shape->rope, .v = shape->v};
    if (mla_expanded_offers_cuda(&args))
        return true;
    fail(failure, ERR_UNSUPPORTED,
         "there are no GPU kernels for attention with keys of %u + %u and values of %u",
         shape->nope, shape->rope, shape->v);
    return false;
}
