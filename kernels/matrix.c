/* Packs the weights of a product once, when an actor loads them, into the order that the kernels
 * read (internal.h). */
#include "kernels/internal.h"

#include <string.h>

/* ---- Elements of a view ---- */

static size_t view_index(const struct weight_view *view, uint32_t n, uint32_t k) {
    return view->transposed ? ((size_t)view->row0 + k) * view->stride + view->col0 + n
                            : ((size_t)view->row0 + n) * view->stride + view->col0 + k;
}

static float view_scale(const struct weight_view *view, uint32_t n, uint32_t k) {
    const size_t row = (size_t)view->row0 + (view->transposed ? k : n);
    const size_t column = (size_t)view->col0 + (view->transposed ? n : k);
    return view->scale[row / view->block * view->scale_stride + column / view->block];
}

static bool view_scaled(const struct weight_view *view) {
    return view->dtype == DTYPE_E4M3 && view->scale != NULL;
}

static bf16 view_bf16(const struct weight_view *view, uint32_t n, uint32_t k) {
    const size_t index = view_index(view, n, k);
    return view->dtype == DTYPE_BF16 ? ((const bf16 *)view->data)[index]
                                     : bf16_from_float(((const float *)view->data)[index]);
}

static float view_float(const struct weight_view *view, uint32_t n, uint32_t k) {
    const size_t index = view_index(view, n, k);
    switch (view->dtype) {
    case DTYPE_F32:
        return ((const float *)view->data)[index];
    case DTYPE_BF16:
        return bf16_to_float(((const bf16 *)view->data)[index]);
    default: {
        const float value = e4m3_to_float(((const uint8_t *)view->data)[index]);
        return view_scaled(view) ? value * view_scale(view, n, k) : value;
    }
    }
}

float weight_element(const struct weight_view *view, uint32_t n, uint32_t k) {
    return view_float(view, n, k);
}

/* ---- Where things lie in the memory of a packed matrix ---- */

/* Views come from a checked model, so sizes that overflow are a bug of the caller. */
static size_t product(size_t a, size_t b) {
    size_t result;
    ASSERT(!__builtin_mul_overflow(a, b, &result));
    return result;
}
static size_t sum(size_t a, size_t b) {
    size_t result;
    ASSERT(!__builtin_add_overflow(a, b, &result));
    return result;
}
static size_t rounded_64(size_t bytes) {
    return sum(bytes, 63) & ~(size_t)63;
}
static uint32_t divided_up(uint32_t value, uint32_t by) {
    return value / by + (value % by != 0);
}

/* Inputs of the segment that starts at input k: up to the next border between scale blocks, or all
 * of them. */
static uint32_t segment_width(const struct weight_view *view, uint32_t k) {
    const uint32_t left = view->k - k;
    if (!view_scaled(view))
        return left;
    const uint64_t first = (uint64_t)(view->transposed ? view->row0 : view->col0) + k;
    const uint32_t to_border = view->block - (uint32_t)(first % view->block);
    return to_border < left ? to_border : left;
}

struct layout {
    uint32_t segments, blocks, panels;
    size_t scales, segment_k, segment_block, plain, bytes; /* offsets; data is at 0 */
};

static struct layout layout_bf16(const struct weight_view *view) {
    ASSERT(view->dtype == DTYPE_F32 || view->dtype == DTYPE_BF16 || view->dtype == DTYPE_E4M3);
    ASSERT(!view_scaled(view) || view->block > 0);
    struct layout layout = {.panels = divided_up(view->n, PANEL_OUTPUTS)};
    for (uint32_t k = 0; k < view->k;) {
        const uint32_t width = segment_width(view, k);
        layout.segments++;
        layout.blocks += divided_up(width, BLOCK_INPUTS);
        k += width;
    }
    const size_t element = view->dtype == DTYPE_E4M3 ? 1 : sizeof(bf16);
    const size_t tiles = product(layout.panels, layout.blocks);
    layout.scales = product(tiles, TILE_ELEMENTS * element);
    layout.segment_k = layout.scales;
    if (view_scaled(view))
        layout.segment_k = sum(layout.scales, product(product(layout.panels, layout.segments),
                                                      PANEL_OUTPUTS * sizeof(float)));
    const size_t borders = product((size_t)layout.segments + 1, sizeof(uint32_t));
    layout.segment_block = sum(layout.segment_k, borders);
    layout.plain = sum(layout.segment_block, borders);
    const size_t words = view->dtype == DTYPE_E4M3 ? tiles / 32 + (tiles % 32 != 0) : 0;
    layout.bytes = rounded_64(sum(layout.plain, product(words, sizeof(uint32_t))));
    return layout;
}

size_t matrix_bytes_bf16(const struct weight_view *view) {
    return layout_bf16(view).bytes;
}

/* ---- Packing ---- */

struct tile_place {
    uint32_t n, outputs; /* first output, and how many there are (16 but at the end) */
    uint32_t k, inputs;  /* first input, and how many (32 but at the end of a segment) */
};

static bool tile_is_plain(const struct weight_view *view, const struct tile_place *place) {
    return !view->transposed && place->outputs == PANEL_OUTPUTS && place->inputs == BLOCK_INPUTS;
}

static void pack_tile_bf16(bf16 *tile, const struct weight_view *view,
                           const struct tile_place *place) {
    if (view->dtype == DTYPE_BF16 && tile_is_plain(view, place)) {
        for (uint32_t o = 0; o < PANEL_OUTPUTS; o++) {
            const bf16 *row = (const bf16 *)view->data + view_index(view, place->n + o, place->k);
            for (uint32_t i = 0; i < BLOCK_INPUTS; i += 2)
                memcpy(tile + tile_index_bf16(o, i), row + i, 2 * sizeof *tile);
        }
        return;
    }
    memset(tile, 0, TILE_ELEMENTS * sizeof *tile);
    for (uint32_t o = 0; o < place->outputs; o++)
        for (uint32_t i = 0; i < place->inputs; i++)
            tile[tile_index_bf16(o, i)] = view_bf16(view, place->n + o, place->k + i);
}

static void pack_tile_e4m3(uint8_t *tile, const struct weight_view *view,
                           const struct tile_place *place) {
    const uint8_t *data = view->data;
    if (tile_is_plain(view, place)) {
        for (uint32_t o = 0; o < PANEL_OUTPUTS; o++) {
            const uint8_t *row = data + view_index(view, place->n + o, place->k);
            uint8_t *pairs = tile + tile_index_e4m3(o, 0);
            for (uint32_t i = 0; i < BLOCK_INPUTS; i += 4, pairs += 64) {
                memcpy(pairs, row + i, 2);
                memcpy(pairs + 8, row + i + 2, 2);
            }
        }
        return;
    }
    memset(tile, 0, TILE_ELEMENTS);
    for (uint32_t o = 0; o < place->outputs; o++)
        for (uint32_t i = 0; i < place->inputs; i++)
            tile[tile_index_e4m3(o, i)] = data[view_index(view, place->n + o, place->k + i)];
}

/* Whether every weight has an exponent that is neither 0 (zeros, subnormals) nor that of a NaN. */
static bool tile_is_normal(const uint8_t tile[TILE_ELEMENTS]) {
    uint32_t others = 0;
    for (uint32_t i = 0; i < TILE_ELEMENTS; i++)
        others += (tile[i] & 0x78) == 0 || (tile[i] & 0x7f) == 0x7f;
    return others == 0;
}

static void pack_segments(const struct weight_view *view, const struct layout *layout,
                          uint32_t *segment_k, uint32_t *segment_block) {
    uint32_t k = 0, block = 0;
    for (uint32_t s = 0; s < layout->segments; s++) {
        segment_k[s] = k;
        segment_block[s] = block;
        const uint32_t width = segment_width(view, k);
        k += width;
        block += divided_up(width, BLOCK_INPUTS);
    }
    segment_k[layout->segments] = k;
    segment_block[layout->segments] = block;
}

static void pack_scales(const struct weight_view *view, const struct layout *layout,
                        const uint32_t *segment_k, float *scales) {
    for (uint32_t first = 0; first < layout->panels * PANEL_OUTPUTS; first += PANEL_OUTPUTS)
        for (uint32_t s = 0; s < layout->segments; s++)
            for (uint32_t n = first; n < first + PANEL_OUTPUTS; n++)
                *scales++ = n < view->n ? view_scale(view, n, segment_k[s]) : 0;
}

void matrix_adopt_bf16(struct matrix *ret, const struct weight_view *view, void *memory) {
    ASSERT((uintptr_t)memory % 64 == 0);
    const struct layout layout = layout_bf16(view);
    uint8_t *base = memory;
    uint32_t *segment_k = (uint32_t *)(void *)(base + layout.segment_k);
    uint32_t *segment_block = (uint32_t *)(void *)(base + layout.segment_block);
    pack_segments(view, &layout, segment_k, segment_block);
    *ret = (struct matrix){
        .n = view->n,
        .k = view->k,
        .dtype = view->dtype == DTYPE_E4M3 ? DTYPE_E4M3 : DTYPE_BF16,
        .segments = layout.segments,
        .data = memory,
        .scales = view_scaled(view) ? (float *)(void *)(base + layout.scales) : NULL,
        .segment_k = segment_k,
        .segment_block = segment_block,
        .plain = view->dtype == DTYPE_E4M3 ? (uint32_t *)(void *)(base + layout.plain) : NULL,
        .bytes = layout.bytes,
    };
}

void matrix_pack_bf16(struct matrix *ret, const struct weight_view *view, void *memory) {
    matrix_adopt_bf16(ret, view, memory);
    const struct layout layout = layout_bf16(view);
    const uint32_t *segment_k = ret->segment_k;
    if (view_scaled(view))
        pack_scales(view, &layout, segment_k,
                    (float *)(void *)((uint8_t *)memory + layout.scales));
    uint8_t *tile = memory;
    uint32_t *plain = (uint32_t *)(void *)((uint8_t *)memory + layout.plain);
    memset(plain, 0, layout.bytes - layout.plain);
    size_t index = 0;
    for (uint32_t n = 0; n < view->n; n += PANEL_OUTPUTS) {
        const uint32_t outputs = view->n - n < PANEL_OUTPUTS ? view->n - n : PANEL_OUTPUTS;
        for (uint32_t s = 0; s < layout.segments; s++)
            for (uint32_t k = segment_k[s]; k < segment_k[s + 1]; k += BLOCK_INPUTS) {
                const uint32_t left = segment_k[s + 1] - k;
                const struct tile_place place = {n, outputs, k,
                                                 left < BLOCK_INPUTS ? left : BLOCK_INPUTS};
                if (view->dtype == DTYPE_E4M3) {
                    pack_tile_e4m3(tile, view, &place);
                    plain[index / 32] |= (uint32_t)tile_is_normal(tile) << index % 32;
                    index++;
                    tile += TILE_ELEMENTS;
                } else {
                    pack_tile_bf16((bf16 *)(void *)tile, view, &place);
                    tile += TILE_ELEMENTS * sizeof(bf16);
                }
            }
    }
}

/* ---- The f32 profile ---- */

size_t matrix_bytes_f32(const struct weight_view *view) {
    return product(product(divided_up(view->n, PANEL_OUTPUTS), view->k),
                   PANEL_OUTPUTS * sizeof(float));
}

void matrix_adopt_f32(struct matrix *ret, const struct weight_view *view, void *memory) {
    ASSERT((uintptr_t)memory % 64 == 0);
    *ret = (struct matrix){
        .n = view->n,
        .k = view->k,
        .dtype = DTYPE_F32,
        .segments = 1,
        .data = memory,
        .bytes = matrix_bytes_f32(view),
    };
}

void matrix_pack_f32(struct matrix *ret, const struct weight_view *view, void *memory) {
    ASSERT(view->dtype == DTYPE_F32 || view->dtype == DTYPE_BF16 || view->dtype == DTYPE_E4M3);
    float *packed = memory; /* [panel][k][16] */
    for (uint32_t n = 0; n < view->n; n += PANEL_OUTPUTS)
        for (uint32_t k = 0; k < view->k; k++)
            for (uint32_t o = 0; o < PANEL_OUTPUTS; o++)
                *packed++ = n + o < view->n ? view_float(view, n + o, k) : 0;
    matrix_adopt_f32(ret, view, memory);
}
