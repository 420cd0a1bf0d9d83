/* What the files of kernels/ share and nobody else sees: the packed form of a matrix, the canonical
 * dot product, and the forms of each operation that kernels_select() puts into its tables. */
#ifndef TROUPE_KERNELS_INTERNAL_H
#define TROUPE_KERNELS_INTERNAL_H

#include "kernels/ops.h"

/* ---- The canonical dot product (reference/dot_bf16.c) ---- */

/* fma(a, b, c) and a + b with denormal inputs and results taken as zero of the same sign. A result
 * is tiny if its value, rounded to 24 bits with unbounded exponent, lies below 2^-126 (tininess
 * after rounding, as SSE, AVX-512 and AMX detect it). Right whatever the processor's mode, so these
 * define what the vector forms compute under numerics_enter(). */
float fma_canonical(float a, float b, float c);
float add_canonical(float a, float b);

/* even + odd of one block of 32: x is contiguous, element 2i of w is w[i * pair_step], element 2i +
 * 1 is w[i * pair_step + odd_step]. Contiguous w: (2, 1). One output of a packed tile: (32, 1). A
 * column of rows `stride` apart: (2 * stride, stride). */
float dot_bf16_block(const bf16 *w, size_t pair_step, size_t odd_step, const bf16 *x);

/* acc = 0; for each of `blocks` blocks of 32: acc = acc + dot_bf16_block(...). Both contiguous. */
float dot_bf16(const bf16 *w, const bf16 *x, uint32_t blocks);

/* ---- Packed matrices (matrix.c) ----
 *
 * BF16 and E4M3: data is tiles [panel][block], panel p holding outputs 16p .. 16p+15, block b the
 * 32 inputs of segment_k[s] + 32 (b - segment_block[s]) ..; zeros where n or the segment ends. BF16
 * tile, 1 KiB: [16 pairs of k][16 outputs][2], the layout of the second operand of TDPBF16PS. E4M3
 * tile, 512 B: as stored, in the order [8 double pairs][4 quarters of the outputs][2 pairs][4
 * outputs][2], so that unpacking the low and the high halves of the 128-bit lanes of 64 bytes
 * yields two rows of the BF16 tile. F32: [panel][k][16 outputs]. */
enum { PANEL_OUTPUTS = 16, BLOCK_INPUTS = 32, TILE_ELEMENTS = PANEL_OUTPUTS * BLOCK_INPUTS };

static inline uint32_t matrix_panels(const struct matrix *w) {
    return w->n / PANEL_OUTPUTS + (w->n % PANEL_OUTPUTS != 0);
}
static inline uint32_t matrix_blocks(const struct matrix *w) {
    return w->segment_block[w->segments];
}
/* The scales of a panel's outputs in one segment. */
static inline const float *panel_scales(const struct matrix *w, size_t panel, size_t segment) {
    return w->scales + (panel * w->segments + segment) * PANEL_OUTPUTS;
}
/* Where output o (0..15) and input i (0..31) of a tile lie. */
static inline uint32_t tile_index_bf16(uint32_t o, uint32_t i) {
    return i / 2 * 32 + o * 2 + i % 2;
}
static inline uint32_t tile_index_e4m3(uint32_t o, uint32_t i) {
    return i / 4 * 64 + o / 4 * 16 + i / 2 % 2 * 8 + o % 4 * 2 + i % 2;
}

/* Coded BF16 (coded.c): tiles of 768 B in the same order: 512 bytes of signs and fractions, in an order such that unpacking
 * bytes as for E4M3 yields the BF16 tile, then 512 codes of exponents of 4 bits. */
enum { CODED_TILE_BYTES = TILE_ELEMENTS * 3 / 2 };
struct exception {
    uint32_t place; /* tile, element of the BF16 tile */
    bf16 value;
    uint16_t reserved;
};
void matrix_code_bf16(const struct matrix *w, struct matrix_coding *ret);
/* Codes one tile, code_of [256] being the code of each exponent or 0xff; returns its exceptions, of which up to `room` are written. */
typedef size_t code_tile_function(const bf16 tile[TILE_ELEMENTS], size_t index,
                                  const uint8_t *code_of, uint8_t ret[CODED_TILE_BYTES],
                                  struct exception *exception, size_t room);
code_tile_function code_tile_scalar;
#if defined(__x86_64__)
code_tile_function code_tile_vbmi;
#endif
void tile_decode(const struct matrix *w, size_t index, bf16 ret[TILE_ELEMENTS]);
/* The first exception of this or a later tile. */
size_t exception_find(const struct matrix_codes *codes, size_t tile);
/* Puts right what expanding could not: the exceptions of a tile, of which `next` is the first or one of a later tile. Returns
 * the one after them: where the next tile begins. */
static inline size_t exceptions_put(const struct matrix_codes *codes, size_t next, size_t tile,
                                    bf16 ret[TILE_ELEMENTS]) {
    for (; next < codes->exceptions; next++) {
        const uint32_t place = codes->exception[next].place;
        if (__builtin_expect(place / TILE_ELEMENTS != tile, 1))
            break;
        ret[place % TILE_ELEMENTS] = codes->exception[next].value;
    }
    return next;
}

/* One weight, scaled. */
float weight_element(const struct weight_view *view, uint32_t n, uint32_t k);

size_t matrix_bytes_bf16(const struct weight_view *view);
void matrix_adopt_bf16(struct matrix *ret, const struct weight_view *view, void *memory);
void matrix_pack_bf16(struct matrix *ret, const struct weight_view *view, void *memory);
size_t matrix_bytes_f32(const struct weight_view *view);
void matrix_adopt_f32(struct matrix *ret, const struct weight_view *view, void *memory);
void matrix_pack_f32(struct matrix *ret, const struct weight_view *view, void *memory);

/* ---- Products: kernels->matmul ---- */

typedef void matmul_function(const struct matrix *w, const void *x, size_t x_stride, uint32_t rows,
                             float *y, size_t y_stride, const struct parallel *parallel);
matmul_function matmul_f32, matmul_bf16_scalar, matmul_fp8_scalar;
#if defined(__x86_64__)
matmul_function matmul_bf16_avx512, matmul_bf16_amx, matmul_fp8_avx512, matmul_fp8_amx;

/* E4M3 tiles to BF16 tiles, exactly. */
typedef void expand_function(const uint8_t *packed, bf16 *ret, uint32_t tiles);
expand_function expand_tiles_avx512, expand_tiles_vbmi;
/* The fastest that this processor has. */
expand_function *expand_tiles_best(void);
#endif

/* Takes the outputs of a product as they are made, while they lie in the first-level cache, instead
 * of y: `sums` are [rows][16] FP32 of rows [row, row + rows), at most 16, and outputs [output,
 * output + outputs), at most 16, output a multiple of 16. Called from any thread of the product,
 * once for each. `ask`, if there is one, says that the same will come in a moment. */
struct matmul_sink {
    void (*take)(void *argument, uint32_t row, uint32_t rows, uint32_t output, uint32_t outputs,
                 const float *sums);
    void (*ask)(void *argument, uint32_t row, uint32_t rows, uint32_t output);
    void *argument;
};

/* One product and the part of it that a thread does: outputs of panels [panel_begin, panel_end),
 * rows [row_begin, row_end). */
struct matmul_job {
    const struct matrix *w;
    const void *x; /* [rows, x_stride] activations */
    size_t x_stride;
    uint32_t rows;
    float *y; /* [rows, y_stride] */
    size_t y_stride;
    const float
        *x_scale; /* fp8 profile: [rows, segments], multiplies the weights' scales; else NULL */
    /* matmul_*_amx only, where not NULL: */
    const struct matmul_sink *sink; /* instead of y */
    const void *const *x_pages;     /* PAGE_TOKENS rows each, x_stride apart, instead of x */
};
typedef void matmul_job_function(const struct matmul_job *job, const struct parallel *parallel);
matmul_job_function matmul_job_scalar;
#if defined(__x86_64__)
matmul_job_function matmul_job_avx512, matmul_job_amx, matmul_job_fp8_amx;
#endif

/* Activations to E4M3, held as BF16, for each row and segment of w:
 *   scale = max(largest |x|, QUANTISE_LEAST) / 448; ret = e4m3(x / scale), to nearest even.
 * ret_scale: [rows, segments]. Padding of ret rows is not written. */
#define QUANTISE_LEAST 0x1p-100f /* the scale of zeros: not zero, not denormal */
typedef void quantise_function(const struct matrix *w, const bf16 *x, size_t x_stride,
                               uint32_t rows, bf16 *ret, size_t ret_stride, float *ret_scale);
quantise_function quantise_scalar;
#if defined(__x86_64__)
quantise_function quantise_avx512;
#endif
/* kernels->row_to_e4m3, and the way back: values as BF16, which holds them exactly. */
typedef void row_to_e4m3_function(const void *x, uint32_t n, uint8_t *ret);
typedef void e4m3_widen_function(const uint8_t *x, uint32_t n, bf16 *ret);
row_to_e4m3_function row_to_e4m3_scalar;
e4m3_widen_function e4m3_widen_scalar;
#if defined(__x86_64__)
row_to_e4m3_function row_to_e4m3_avx512;
e4m3_widen_function e4m3_widen_avx512;
#endif
row_to_e4m3_function *row_to_e4m3_best(void);
bool takes_e4m3(const struct matrix *w);
typedef void matmul_e4m3_function(const struct matrix *w, const uint8_t *x, size_t x_stride,
                                  uint32_t rows, float *y, size_t y_stride,
                                  const struct parallel *parallel);
matmul_e4m3_function matmul_e4m3_scalar;
#if defined(__x86_64__)
matmul_e4m3_function matmul_e4m3_avx512, matmul_e4m3_amx;
#endif

struct matmul_part {
    uint32_t panel_begin, panel_end;
    uint32_t row_begin, row_end;
};
typedef void matmul_part_function(const struct matmul_job *job, const struct matmul_part *part);
#if defined(__x86_64__)
/* row_begin: a multiple of 32 where inputs lie in pages. */
matmul_part_function matmul_part_amx;
#endif

/* Below part_min of work per part another thread costs more (microseconds to tens of them to wake)
 * than it saves. Work: n * k, once for bringing the weights here, once more for every rows_per_load
 * rows. */
struct matmul_cost {
    uint32_t rows_per_load, part_min;
};

/* Cuts a product into at most parallel->width parts, by panels (in multiples of panel_step) and,
 * when panels are few, by rows too (in multiples of row_step); small products stay in the calling
 * thread. */
void matmul_run(const struct matmul_job *job, matmul_part_function *function, uint32_t panel_step,
                uint32_t row_step, const struct matmul_cost *cost, const struct parallel *parallel);

#if defined(__x86_64__)
/* Asks Linux to let this process use the tile registers; true if it may. */
bool amx_request_permission(void);
#endif

#endif
