/* The operations of a DeepSeek model on CPU. One table of functions per (numerics profile, instruction set), chosen once at start;
 * engine/ is written against the table and never asks which one it has.
 *
 * "Activation" is the input type of a matrix product: float in the f32 profile, bf16 in the bf16 profile. Rows of activations lie
 * `stride` elements apart, stride is a multiple of 32 elements (activation_stride()) and the elements between the width and the
 * stride are zero: producers write those zeros. Everything else (residual stream, logits, outputs of products) is FP32.
 *
 * Row independence: the result for a row never depends on the other rows of the call, nor on `parallel`. */
#ifndef TROUPE_OPS_H
#define TROUPE_OPS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "actors/errors.h"
#include "actors/limits.h"
#include "kernels/e4m3_row.h"
#include "kernels/latent.h"
#include "kernels/numerics.h"
#include "kernels/parallel.h"

enum dtype { DTYPE_F32, DTYPE_BF16, DTYPE_E4M3, DTYPE_F16, DTYPE_I32, DTYPE_I64, DTYPE_U8 };
size_t dtype_bytes(enum dtype dtype);

/* A matrix as it lies in a file, or a part of one. Logical element (n, k), n < rows out, k < width in, is
 *   transposed ? data[(row0 + k) * stride + col0 + n] : data[(row0 + n) * stride + col0 + k]
 * and, for DTYPE_E4M3, is multiplied by scale[(r / block) * scale_stride + c / block] where r, c are the row and column in
 * the file's matrix (row0 and col0 included, so parts that start inside a block are right). */
struct weight_view {
    enum dtype dtype; /* F32, BF16 or E4M3 */
    const void *data;
    uint32_t n; /* outputs */
    uint32_t k; /* inputs */
    size_t stride; /* elements from one file row to the next */
    uint32_t row0, col0;
    bool transposed;
    const float *scale; /* E4M3 only */
    uint32_t scale_stride;
    uint32_t block; /* 128 */
    bool latent; /* meets activations that no profile quantises (matmul_latent, kv_b) */
};

/* In the fp8 profile activations are quantised row by row and segment by segment before a product with
 * scaled E4M3 weights (kernels/internal.h), and scale[s][n] is multiplied by the row's scale first. */

/* The weights of one product y = W x, repacked for the kernels. Opaque outside kernels/. Packed by 16 outputs and 32 inputs in the
 * order of the AMX tile (pairs of k), BF16 or E4M3 as stored. K is cut into segments: the runs of k that share one scale row
 * (128 wide in the plain case; cut at block borders of the file where a part starts inside one); a segment is padded with
 * zeros to a multiple of 32. Definition of the product, for every (row, n), in this order:
 *   acc = 0
 *   for each segment s: for each 32 inputs b of s:
 *     even = 0; odd = 0; for i in 0..15: even = fma(w[32b+2i], x[32b+2i], even); odd = fma(w[32b+2i+1], x[32b+2i+1], odd)
 *     scaled weights:   partial = partial + (even + odd)          (partial = 0 at the start of the segment)
 *     unscaled weights: acc = acc + (even + odd)
 *   scaled weights: acc = fma(partial, scale[s][n], acc) at the end of the segment
 * In the f32 profile: weights expanded to FP32 (E4M3 x scale), acc = acc + w*x in ascending k, plain C. */
struct matrix {
    uint32_t n, k;
    enum dtype dtype; /* as packed */
    uint32_t segments;
    void *data;             /* owned by `memory` of the packer */
    const float *scales;    /* [n / 16 rounded up][segments][16], NULL if unscaled: as weights are read */
    const uint32_t *segment_k; /* [segments + 1]: first k of each */
    const uint32_t *segment_block; /* [segments + 1]: first 32-wide block of each */
    const struct matrix_codes *codes; /* BF16 in 12 bits a weight (kernels/coded.c); else NULL */
    const uint32_t *plain; /* E4M3: a bit per tile, set where all its weights are normal numbers; else NULL */
    size_t bytes;           /* of memory used */
    size_t device_bytes;    /* of these on a device */
    void (*release)(struct matrix *self); /* gives back what lies elsewhere; NULL: nothing does */
};

/* The result of matrix_code. */
struct matrix_codes {
    uint8_t low[16], high[16]; /* by code: the exponent's part of both bytes of a BF16 value */
    const struct exception *exception; /* ascending places */
    uint32_t exceptions;
    uint32_t reserved[5];
};
struct matrix_coding {
    struct matrix_codes codes;
    uint8_t *tiles;
    struct exception *exception;
    size_t bytes;
};
void matrix_place_coded(struct matrix *ret, const struct matrix *w,
                        const struct matrix_coding *coding, void *memory);
void matrix_coding_free(struct matrix_coding *self);
/* Bytes of what `w` was before it was coded, as matrix_pack wrote it. */
void matrix_read_packed(const struct matrix *w, size_t offset, size_t bytes, void *ret);

/* Shape of multi-head latent attention. */
struct mla_shape {
    uint32_t heads;
    uint32_t nope, rope, v; /* per head */
    uint32_t kv_lora;
    float scale; /* softmax scale: (nope + rope)^-0.5, times mscale^2 under YaRN */
    bool latent_e4m3; /* the cache's latents have the values of their E4M3 form (kernels/latent.h), in which a device may keep them */
};

/* Latent cache: a page holds PAGE_TOKENS rows of cache_stride(kv_lora + rope) activations: [latent after kv_a norm | rotated key].
 * Everything a query may not see (positions above its own, and rows never written) counts as probability 0; memory of pages is
 * zero before its first use, so it is never NaN. Attention walks blocks of PAGE_TOKENS positions in ascending order with the online softmax:
 *   block maximum over visible scores, m' = max(m, block maximum), p = exp(s - m') (0 where not visible),
 *   sum = fma(sum, exp(m - m'), sum_canonical(p)), acc = fma(acc, exp(m - m'), P V)  (P rounded to the activation type, canonical
 *   dot product over the 64 positions; `sum` takes p unrounded), out = acc / sum,
 * with s = scale * dot, one FP32 multiplication. So the bits of a row depend on its own position and the cache only. */
struct mla_rows {
    uint32_t rows;
    const uint32_t *position;        /* [rows] */
    const void *const *const *pages; /* [rows]: pointer to the row's page table (page p holds positions 64p..64p+63) */
};

#define MANY_ROWS 33

struct kernels {
    const char *name; /* "f32 scalar", "bf16 amx", ... */
    enum profile profile;
    enum isa isa;
    uint32_t activation_bytes; /* 4 or 2 */

    /* Packing. `matrix_bytes` says how much memory (64-byte aligned) `matrix_pack` needs. */
    size_t (*matrix_bytes)(const struct weight_view *view);
    void (*matrix_pack)(struct matrix *ret, const struct weight_view *view, void *memory);
    /* As matrix_pack, where `memory` holds what another process of the same profile has packed: of the view only its
     * shape, dtype and blocks are looked at (scale: NULL or not). NULL: weights cannot be moved between processes. */
    void (*matrix_adopt)(struct matrix *ret, const struct weight_view *view, void *memory);

    /* Where weights lie on a device (NULL elsewhere): their bytes as another device of the same profile takes them, a piece at
     * a time, and all of them put there. Of the view only its shape is looked at, as in matrix_adopt. matrix_image_bytes is also what a
     * matrix takes on the device, before it is there. */
    size_t (*matrix_image_bytes)(const struct weight_view *view);
    void (*matrix_read)(const struct matrix *w, size_t offset, size_t bytes, void *ret);
    /* Whether so much more of `what` fits there now, a reserve kept back; else ERR_NO_MEMORY with what was needed and found. */
    int (*device_fits)(uint64_t bytes, const char *what, struct failure *failure);
    void (*matrix_take_image)(struct matrix *ret, const struct weight_view *view, void *memory, const void *image);

    /* Weights that are read by products of few rows above all, more tightly: what is in *ret serves matrix_place_coded with
     * ret->bytes of memory (64-byte aligned), which makes another matrix of the same values. ret->bytes is 0 where it does
     * not pay. NULL: this form does not read coded weights. */
    void (*matrix_code)(const struct matrix *w, struct matrix_coding *ret);

    /* y[r][0..n) = W x[r]. x: [rows, x_stride] activations, y: [rows, y_stride] float. rows may be 0. */
    void (*matmul)(const struct matrix *w, const void *x, size_t x_stride, uint32_t rows, float *y,
                   size_t y_stride, const struct parallel *parallel);

    /* The same inside attention (W_UK, W_UV of the absorbed form), where the fp8 profile quantises no
     * activations, as in kv_b of the expanded form. */
    void (*matmul_latent)(const struct matrix *w, const void *x, size_t x_stride, uint32_t rows,
                          float *y, size_t y_stride, const struct parallel *parallel);

    /* The fp8 profile in two steps, for rows that travel between them (kernels/e4m3_row.h); NULL in other profiles.
     * row_to_e4m3: one row of n activations. takes_e4m3: whether a product may begin with such rows; then matmul_e4m3 of
     * them (x_stride bytes apart, a multiple of 4) has the bits of matmul of what they were made from. */
    void (*row_to_e4m3)(const void *x, uint32_t n, uint8_t *ret);
    bool (*takes_e4m3)(const struct matrix *w);
    void (*matmul_e4m3)(const struct matrix *w, const uint8_t *x, size_t x_stride, uint32_t rows,
                        float *y, size_t y_stride, const struct parallel *parallel);

    /* ret[r] = activation(x[r] * rsqrt(mean(x[r]^2) + eps) * weight). x: [rows, x_stride] float, ret: [rows, ret_stride].
     * mean by sum_canonical of squares. */
    void (*rms_norm)(const float *x, size_t x_stride, const float *weight, float eps, uint32_t rows,
                     uint32_t n, void *ret, size_t ret_stride);
    /* ret[r] = activation(x[r]). Like all producers it writes activation_stride(n) elements of each row and nothing beyond, so parts of
     * a row can be written by separate calls. */
    void (*convert)(const float *x, size_t x_stride, uint32_t rows, uint32_t n, void *ret,
                    size_t ret_stride);
    /* ret[r] = activation(silu(gate[r]) * up[r]), silu(g) = g * sigmoid(g). */
    void (*silu_mul)(const float *gate, const float *up, size_t stride, uint32_t rows, uint32_t n,
                     void *ret, size_t ret_stride);
    /* x[r] += y[r], FP32. */
    void (*add)(float *x, size_t x_stride, const float *y, size_t y_stride, uint32_t rows, uint32_t n);
    /* Activations to float (embedding rows, hidden rows); exact. */
    void (*widen)(const void *x, size_t x_stride, uint32_t rows, uint32_t n, float *ret, size_t ret_stride);
    /* Rotates pairs (2i, 2i+1) of `count` vectors of width `rope`, `stride` floats apart, by the angles of one position:
     * cos_sin [rope/2][2] floats. */
    void (*rope)(float *x, size_t stride, uint32_t count, uint32_t rope, const float *cos_sin);

    /* Products of many rows whose outputs never go to memory as they are. NULL: there is no such form, and rows go
     * through matmul and the operations above, with the same bits. For fewer than MANY_ROWS rows that is faster anyway. */
    /* y += W x, as matmul and add. */
    void (*matmul_add)(const struct matrix *w, const void *x, size_t x_stride, uint32_t rows, float *y,
                       size_t y_stride, const struct parallel *parallel);
    /* W x of each row, heads x [nope | rope], both multiples of 32: where cos_sin[r] is not NULL the rope part rotated by these
     * angles, all rounded, to ret [rows, heads, ret_stride] activations, as mla_expanded wants it; else to y as matmul. */
    void (*mla_queries)(const struct mla_shape *shape, const struct matrix *w, const void *x, size_t x_stride,
                        uint32_t rows, const float *const *cos_sin, float *y, size_t y_stride, void *ret,
                        size_t ret_stride, const struct parallel *parallel);

    /* Absorbed form (generated tokens). q: [rows, heads, q_stride] activations laid out as a row of the cache: [q_nope W_UK (kv_lora
     * wide), padded to activation_stride(kv_lora) | rotated q (rope), padded]; q_stride at least cache_stride(kv_lora, rope).
     * ret: [rows, heads, ret_stride] activations: probabilities x latents, kv_lora wide (W_UV follows outside).
     * The dot product of a score runs over kv_lora padded to 32, then rope padded to 32, as one canonical accumulation. */
    void (*mla_absorbed)(const struct mla_shape *shape, const struct mla_rows *rows, const void *q,
                         size_t q_stride, void *ret, size_t ret_stride, const struct parallel *parallel);
    /* Expanded form (prompt tokens): keys and values of every visible position are expanded from the latent by kv_b
     * (outputs: heads x [nope | v], activations after rounding), a block at a time. q: [rows, heads, q_stride] activations [nope,
     * padded to activation_stride(nope) | rotated rope, padded]; q_stride at least cache_stride(nope, rope). (Two calls of `convert`,
     * one per part, write exactly this: each pads its own part.)
     * ret: [rows, heads * v] activations, row stride ret_stride. All rows of a call belong to one sequence, ascending positions.
     * Score: canonical dot over nope padded to 32, then rope padded to 32. */
    void (*mla_expanded)(const struct mla_shape *shape, const struct mla_rows *rows,
                         const struct matrix *kv_b, const void *q, size_t q_stride, void *ret,
                         size_t ret_stride, const struct parallel *parallel);
    /* Scratch that mla_* need is taken from a per-thread arena of kernels/ that grows once (never in steady state). */
};

/* Gives the calling thread's scratch arena back; for threads that end. */
void scratch_free(void);

/* Elements from one activation row to the next: width rounded up to 32. */
size_t activation_stride(size_t width);
/* The same for rows that products read many of, and floats from one row of sums to the next: at least activation_stride(width), and an
 * odd number of cache lines, because rows a power of two apart would fight for a few places of the first-level cache. */
size_t row_stride(size_t width);
size_t sums_stride(size_t width);
/* Elements of one position in the latent cache: kv_lora rounded up to 32 plus rope rounded up to 32 (rope starts at the first). */
size_t cache_stride(uint32_t kv_lora, uint32_t rope);

/* The best instruction set that this processor (and operating system: AMX needs permission) offers, or the one asked for;
 * NULL with ERR_UNSUPPORTED naming what is missing. PROFILE_F32 has one form, whatever the isa. */
const struct kernels *kernels_select(enum profile profile, enum isa isa, struct failure *failure);
bool isa_available(enum isa isa);
const char *isa_name(enum isa isa);

/* Rotary embeddings with the parameters of config.json (rope_theta; rope_scaling: factor, original_max_position_embeddings, beta_fast,
 * beta_slow, mscale, mscale_all_dim). Absent ones are 0; absent betas then count as 32 and 1. */
struct rope_parameters {
    double theta;
    double yarn_factor; /* 0 or 1: plain RoPE */
    double original_positions, beta_fast, beta_slow;
    double mscale, mscale_all_dim;
};
/* cos and sin of positions first_position ..: ret [positions][rope/2][2] float, YaRN's attention factor included: where mscale and
 * mscale_all_dim are both set, the quotient of 0.1 m ln(factor) + 1 of the two, else 0.1 ln(factor) + 1. */
void rope_table(const struct rope_parameters *parameters, uint32_t rope, uint32_t first_position,
                uint32_t positions, float *ret);
/* YaRN's factor on the softmax scale: (0.1 mscale_all_dim ln(factor) + 1)^2 where mscale_all_dim is set, else 1. Applies to V2 and V3
 * alike (transformers: yarn_apply_mscale in modeling_deepseek_v2.py and _v3.py). */
double rope_softmax_factor(const struct rope_parameters *parameters);

#endif
