/* The operations of a DeepSeek model on a GPU of compute capability 9.0 (Hopper), launched from C.
 * Names and meaning are those of kernels/ops.h, router/ and engine/; rows are independent of each
 * other in the same way.
 *
 * All pointers are device memory (in the emulated tests: host memory). `stream` is a cudaStream_t.
 * Every function only enqueues; it returns 0 or a CUDA error number (cuda_error_text() of the
 * host). Rows and items may be 0: nothing is launched then. Activations are BF16: rows lie `stride`
 * elements apart and producers write zeros up to activation_stride(n), as on the CPU.
 *
 * Bits: "same bits" below means the bits of the CPU's scalar form of the bf16 profile. "Own bits":
 * the sums are the tensor cores' or another fixed order; equal for equal rows whatever the batch,
 * not equal to the CPU's. */
#ifndef TROUPE_CUDA_OPS_H
#define TROUPE_CUDA_OPS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/numerics.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Rows: same bits ---- */

/* ret[r] = BF16(x[r] * rsqrt(mean(x[r]^2) + eps) * weight). x: [rows, x_stride], ret: [rows,
 * ret_stride]. n at most CUDA_ROW_MAX. */
int rms_norm_cuda(void *stream, const float *x, size_t x_stride, const float *weight, float eps,
                  uint32_t rows, uint32_t n, bf16 *ret, size_t ret_stride);
/* x[r] += y[r], then the norm of the sum as above: the two steps between attention and gate in one
 * pass. */
int add_rms_norm_cuda(void *stream, float *x, size_t x_stride, const float *y, size_t y_stride,
                      const float *weight, float eps, uint32_t rows, uint32_t n, bf16 *ret,
                      size_t ret_stride);
int convert_cuda(void *stream, const float *x, size_t x_stride, uint32_t rows, uint32_t n,
                 bf16 *ret, size_t ret_stride);
int silu_mul_cuda(void *stream, const float *gate, const float *up, size_t stride, uint32_t rows,
                  uint32_t n, bf16 *ret, size_t ret_stride);
int add_cuda(void *stream, float *x, size_t x_stride, const float *y, size_t y_stride,
             uint32_t rows, uint32_t n);
int widen_cuda(void *stream, const bf16 *x, size_t x_stride, uint32_t rows, uint32_t n, float *ret,
               size_t ret_stride);
/* ret[r] = float(table[token[r]]): embedding. table: [vocabulary, table_stride]. A token that is
 * not below `vocabulary` gives zeros. */
int embed_cuda(void *stream, const bf16 *table, size_t table_stride, uint32_t vocabulary,
               const uint32_t *token, uint32_t rows, uint32_t n, float *ret, size_t ret_stride);
/* Rotates pairs (2i, 2i+1) of `heads` vectors of each row, `head_stride` floats apart, by the
 * angles of the row's position. cos_sin: [positions, rope/2, 2] from rope_table() (YaRN included).
 * x: [rows, x_stride]. */
int rope_cuda(void *stream, float *x, size_t x_stride, size_t head_stride, uint32_t heads,
              uint32_t rope, const uint32_t *position, const float *cos_sin, uint32_t rows);
/* ---- Memory (memory.cu): blocking; 0 or a CUDA error ---- */

/* The device of all that follows, in every thread; 0 at the start. */
void device_use_cuda(int index);
/* Makes it the calling thread's, for launches and streams; what follows here does so by itself. */
int device_enter_cuda(void);
int device_take_cuda(size_t bytes, void **ret);
void device_give_cuda(void *memory);
/* What is free of it now, and what it has; emulated: device_pretend_cuda() says. */
int device_room_cuda(uint64_t *ret_free, uint64_t *ret_total);
void device_pretend_cuda(uint64_t free_bytes);
int device_put_cuda(void *memory, const void *from, size_t bytes);
int device_get_cuda(void *to, const void *memory, size_t bytes);

#define CUDA_ROW_MAX 16384 /* floats of one row that lie in shared memory */

/* ---- Gate, dispatch, combine (router/): same bits ---- */

struct gate_cuda {  /* struct gate_parameters of router/gate.h */
    bool softmax;   /* else sigmoid */
    bool group_max; /* a group's score is its best, else the sum of its two best */
    bool normalise;
    uint32_t experts, groups, groups_chosen, k;
    float scaling, top_p;
};
/* logits: [rows, logits_stride], bias: [experts] or NULL; ret_expert, ret_weight: [rows, k] as
 * gate_choose() gives them. */
int gate_cuda(void *stream, const struct gate_cuda *parameters, const float *logits,
              size_t logits_stride, const float *bias, uint32_t rows, uint16_t *ret_expert,
              float *ret_weight);

/* What differs from row to row of a batch: rows from *live on choose nothing (NULL: all are live);
 * row r adds to the model's own biases those at delta + delta_of[r] * delta_stride, 0xffffffff:
 * none. All device memory. */
struct gate_rows_cuda {
    const uint32_t *live;
    const float *delta;
    size_t delta_stride;
    const uint32_t *delta_of; /* [rows], NULL: none has any */
};
int gate_rows_cuda(void *stream, const struct gate_cuda *parameters,
                   const struct gate_rows_cuda *per_row, const float *logits, size_t logits_stride,
                   const float *bias, uint32_t rows, uint16_t *ret_expert, float *ret_weight);

/* Places the items (row, slot of its list) of `slots` experts: slot_of [experts] says which slot
 * holds an expert, -1: none. ret_count [slots]: items of each, at most `capacity`; ret_item [slots,
 * capacity]: their numbers row * k + slot, ascending; ret_place [items]: where each item lies (slot
 * * capacity + n), 0xffffffff: nowhere (not held here, unused, or over capacity). */
int dispatch_cuda(void *stream, const uint16_t *expert, uint32_t items, const int32_t *slot_of,
                  uint32_t experts, uint32_t slots, uint32_t capacity, uint32_t *ret_count,
                  uint32_t *ret_item, uint32_t *ret_place);
/* ret[slot * capacity + n] = x[ret_item / k], row_bytes (a multiple of 4) of each; rows beyond the
 * count are left as they are. */
int pack_cuda(void *stream, const void *x, size_t x_stride_bytes, uint32_t row_bytes, uint32_t k,
              const uint32_t *count, const uint32_t *item, uint32_t slots, uint32_t capacity,
              void *ret, size_t ret_stride_bytes);
/* The same, each row quantised into the form in which it travels (kernels/e4m3_row.h, same bits as
 * the CPU's): x: [rows, x_stride] BF16, n wide; ret rows are e4m3_row_bytes(n), ret_stride_bytes (a
 * multiple of 4) apart. */
int pack_e4m3_cuda(void *stream, const bf16 *x, size_t x_stride, uint32_t n, uint32_t k,
                   const uint32_t *count, const uint32_t *item, uint32_t slots, uint32_t capacity,
                   uint8_t *ret, size_t ret_stride_bytes);
/* Rows that came so to the operand of gemm_plan_cuda: E4M3 of item i of a slot at ret + (slot *
 * capacity + i) * ret_stride, whole groups of 128, and its scales by the two steps. item [slots,
 * capacity]: the frame's row is item / k. */
int unpack_e4m3_cuda(void *stream, const uint8_t *rows, size_t row_stride_bytes, uint32_t n,
                     uint32_t k, const uint32_t *count, const uint32_t *item, uint32_t slots,
                     uint32_t capacity, uint8_t *ret, size_t ret_stride, float *ret_scale,
                     size_t scale_row_step, size_t scale_group_step);
/* combine_rows() of router/combine.h; item (row, slot) has its output at outputs[place[row * k +
 * slot]], place NULL: in order. */
int combine_cuda(void *stream, uint32_t rows, uint32_t k, uint32_t hidden, const float *outputs,
                 size_t stride, const uint32_t *place, const float *weights,
                 const uint16_t *experts, const float *shared, size_t shared_stride,
                 float *residual, size_t residual_stride);

/* ---- Rows of experts (grouped): [groups * capacity] rows, of each group the first count[group]
 * ---- Device counts; the other rows are left alone. Bits of the plain forms. */

int silu_mul_grouped_cuda(void *stream, const float *gate, const float *up, size_t stride,
                          const uint32_t *count, uint32_t groups, uint32_t capacity, uint32_t n,
                          bf16 *ret, size_t ret_stride);
int quantise_grouped_cuda(void *stream, const bf16 *x, size_t x_stride, const uint32_t *count,
                          uint32_t groups, uint32_t capacity, uint32_t n, uint8_t *ret,
                          size_t ret_stride, float *ret_scale, size_t scale_row_step,
                          size_t scale_group_step);

/* ---- Between attention and experts (exchange.cu) ----
 * Attention sends each of `destinations` a note and rows, of fixed capacity, and gets a status word
 * and an output for each item (row, expert of its list). A ticket names step and layer: *ticket +
 * layer, never the same for two that could be mistaken for each other. An item is answered where
 * its status is the ticket. */
struct exchange_cuda {
    uint32_t rows, k;             /* of the batch */
    uint32_t destinations;        /* at least 1 */
    uint32_t rows_max, items_max; /* for each destination; items at most 65535 */
    const uint32_t *ticket;       /* device memory */
    uint32_t layer;
};
/* A note: head of EXCHANGE_HEAD words (ticket, rows, items, 0), then for each entry (row sent,
 * place in its list) the expert, 0xffff: not of this destination; then for each entry its item's
 * number. */
#define EXCHANGE_HEAD 4u
size_t exchange_note_bytes(uint32_t rows_max, uint32_t k); /* a multiple of 16 */

/* expert: [rows, k] as gate_cuda() gives them; destination_of: [experts], -1: nobody holds it. Rows
 * and their items are numbered in ascending order; what is over a capacity has no place. ret_note:
 * [destinations], ret_count [destinations]: rows sent, ret_row [destinations, rows_max]: which,
 * ret_place [rows, k]: destination * items_max + item, 0xffffffff: nowhere. */
int exchange_route_cuda(void *stream, const struct exchange_cuda *exchange, const uint16_t *expert,
                        const int32_t *destination_of, uint32_t experts, void *ret_note,
                        uint32_t *ret_count, uint32_t *ret_row, uint32_t *ret_place);
/* The experts' side, one note: output of each item from y[place of its entry], as dispatch_cuda()
 * placed the entries of the note's list; status 0 where an entry has no place. */
int exchange_reply_cuda(void *stream, const void *note, uint32_t rows_max, uint32_t k,
                        uint32_t items_max, const uint32_t *place, const float *y, size_t y_stride,
                        uint32_t hidden, uint32_t *ret_status, float *ret_output);
/* Where a note's list begins: [rows_max, k]. */
const uint16_t *exchange_list(const void *note);
/* Before combine: ret_expert is `expert` without what was not answered; a row that lacks something
 * becomes void: ret_void[row] = layer + 1, if it is 0 so far. */
int exchange_check_cuda(void *stream, const struct exchange_cuda *exchange, const uint16_t *expert,
                        const uint32_t *place, const uint32_t *status, uint16_t *ret_expert,
                        uint32_t *ret_void);

/* ---- FP8 ---- */

/* E4M3 with a scale for each row and 128 channels: scale = max(largest |x|, 2^-100) / 448, q =
 * e4m3(x / scale). ret: [rows, ret_stride] whole groups of 128, zeros beyond n; scale of (row,
 * group) at ret_scale[row * scale_row_step + group * scale_group_step]. */
int quantise_f32_cuda(void *stream, const float *x, size_t x_stride, uint32_t rows, uint32_t n,
                      uint8_t *ret, size_t ret_stride, float *ret_scale, size_t scale_row_step,
                      size_t scale_group_step);
int quantise_bf16_cuda(void *stream, const bf16 *x, size_t x_stride, uint32_t rows, uint32_t n,
                       uint8_t *ret, size_t ret_stride, float *ret_scale, size_t scale_row_step,
                       size_t scale_group_step);

/* ---- Sampling (engine/sample.h): same bits, draws included ---- */

struct sample_spec;
struct sample_result;
size_t sample_work_bytes_cuda(uint32_t vocabulary); /* of one row */
/* specs: [rows], words: those of the frame, both as sample_check() passed them. logits: [rows,
 * logits_stride]; NaN and +infinity in them are replaced. work: rows x sample_work_bytes_cuda().
 * ret: [rows] without word offsets; ret_top: [rows, 40]: (token, float bits of the log-probability)
 * of the `top` best. SAMPLE_FULL_LOGITS is the caller's. */
int sample_cuda(void *stream, const struct sample_spec *specs, const uint32_t *words, float *logits,
                size_t logits_stride, uint32_t vocabulary, uint32_t rows, void *work,
                struct sample_result *ret, uint32_t *ret_top);

/* ---- Matrix products (gemm.cu): own bits, row-independent ---- */

/* A copy engine's description of a matrix; opaque. */
struct tensor_map_cuda {
#ifdef __cplusplus
    alignas(64) uint8_t bytes[128];
#else
    _Alignas(64) uint8_t bytes[128];
#endif
};

/* y = x W^T. x: [rows, k], W: [groups * n, k], y: [rows, n] float, y_stride apart. Dense: groups 0
 * or 1. Masked: x and y are [groups * rows, ...], of each group's rows the first count[group] are
 * computed, the others left alone. Contiguous: rows r of block r / 128 belong to group
 * block_group[r / 128], -1: to none. Batched (BF16 only): group g has x's columns from g *
 * x_group_step on and y's from g * y_group_step on, of all rows. FP8 only: a_scale of (row, 128 of
 * k), b_scale [groups, n / 128 rounded up, k / 128 rounded up]. count and block_group are device
 * memory, read when it runs. */
struct gemm_args {
    uint32_t rows, n, k, groups;
    float *y;
    size_t y_stride;
    const uint32_t *count;               /* [groups], NULL: not masked */
    const int32_t *block_group;          /* [rows / 128 rounded up], NULL: not contiguous */
    uint32_t x_group_step, y_group_step; /* elements; 0: not batched */
    const float *a_scale, *b_scale;
    size_t a_scale_row_step, a_scale_group_step;
};
struct gemm_cuda {
    struct tensor_map_cuda x, w;
    struct gemm_args args;
    bool fp8;
};
/* Once for each pair of buffers. Rows of x and W lie x_stride_bytes and w_stride_bytes apart, both
 * multiples of 16. */
int gemm_plan_cuda(struct gemm_cuda *ret, bool fp8, const void *x, size_t x_stride_bytes,
                   const void *w, size_t w_stride_bytes, const struct gemm_args *args);
int gemm_run_cuda(void *stream, const struct gemm_cuda *plan);

/* ---- Multi-head latent attention (kernels/ops.h says what it computes): own bits, row-independent
 * ---- */

#define CUDA_UNSUPPORTED 801 /* cudaErrorNotSupported: no kernel for these widths */
#define MLA_SPLIT_CUDA   16u /* pages of 64 positions that one block walks */

/* The latent cache has pages of 64 positions in one of two forms: BF16, rows of
 * cache_stride(kv_lora, rope) elements, or E4M3, rows of latent_row_bytes(kv_lora, rope) bytes
 * (kernels/latent.h). Both lie in `cache`, [pages, 64, row], 16-byte aligned. Rows with position[r]
 * go to the page that the row's table names; same bits as the CPU's. */
struct latent_append_cuda {
    uint32_t rows, kv_lora, rope;
    const float *latent; /* [rows, latent_stride] */
    size_t latent_stride;
    const float *norm; /* [kv_lora]: RMSNorm comes first, with this weight; NULL: normed */
    float eps;
    const float *key; /* [rows, key_stride] */
    size_t key_stride;
    const float *cos_sin;     /* rope_cuda(): keys are rotated first; NULL: they are */
    const uint32_t *position; /* [rows] */
    const uint32_t *pages;    /* [rows, pages_stride] */
    size_t pages_stride;
    void *cache;
};
int latent_append_cuda(void *stream, bool e4m3, const struct latent_append_cuda *args);
/* The latents of positions 0 .. positions - 1 out of an E4M3 cache, as kv_b of the expanded form
 * multiplies them: ret [positions, ret_stride], zeros from kv_lora to the next multiple of 32. */
int latent_widen_cuda(void *stream, const void *cache, uint32_t kv_lora, uint32_t rope,
                      const uint32_t *pages, uint32_t positions, bf16 *ret, size_t ret_stride);

/* Absorbed form. q: [rows, heads, q_stride] and the cache [pages, 64, cache_stride] as
 * kernels->mla_absorbed has them; strides are multiples of 8. kv_lora 512 or 128, rope at most 64.
 * position, pages and work are device memory, read when it runs. */
struct mla_absorbed_args {
    uint32_t heads, kv_lora, rope;
    float scale;
    const uint32_t *position; /* [rows] */
    const uint32_t *pages;    /* [rows, pages_stride]: page number of each 64 positions */
    size_t pages_stride;
    uint32_t splits; /* of the longest sequence: its pages / MLA_SPLIT_CUDA, rounded up */
    float *work;     /* mla_absorbed_work_bytes_cuda() */
};
struct mla_absorbed_cuda {
    struct tensor_map_cuda q, cache;
    struct mla_absorbed_args args;
    const void *e4m3; /* the cache, in that form; NULL: BF16 */
};
bool mla_absorbed_offers_cuda(uint32_t kv_lora, uint32_t rope);
size_t mla_absorbed_work_bytes_cuda(uint32_t kv_lora, uint32_t heads, uint32_t rows,
                                    uint32_t splits);
int mla_absorbed_plan_cuda(struct mla_absorbed_cuda *ret, const bf16 *q, size_t q_stride,
                           uint32_t rows, const bf16 *cache, size_t cache_stride,
                           uint32_t cache_pages, const struct mla_absorbed_args *args);
/* The same over an E4M3 cache: the bits are those of the BF16 kernel over the values read back. */
int mla_absorbed_plan_e4m3_cuda(struct mla_absorbed_cuda *ret, const bf16 *q, size_t q_stride,
                                uint32_t rows, const void *cache, uint32_t cache_pages,
                                const struct mla_absorbed_args *args);
/* ret: [rows, heads, ret_stride]. */
int mla_absorbed_cuda(void *stream, const struct mla_absorbed_cuda *plan, uint32_t rows, bf16 *ret,
                      size_t ret_stride);

/* Queries before either form (mla_rows.cu): same bits as engine/attention_mla.c. */
struct mla_rows_cuda {
    uint32_t heads, nope, rope;
    const float *cos_sin;     /* rope_cuda() */
    const uint32_t *position; /* [rows], device memory */
};
/* q: [rows, heads, nope | rope]. Of each head the first part and the rotated one, each padded to
 * 32, nope_stride and rope_stride elements from head to head: apart from each other for the
 * absorbed form (w_uk takes the first), side by side for the expanded one. */
int mla_query_cuda(void *stream, const struct mla_rows_cuda *args, const float *q, size_t q_stride,
                   uint32_t rows, bf16 *ret_nope, size_t nope_stride, bf16 *ret_rope,
                   size_t rope_stride);

/* Expanded form, of one sequence: rows with ascending positions. q: [rows, heads, q_stride] as
 * kernels->mla_expanded has it. nope and rope, each padded to 32, in 3 chunks of 64 with v at most
 * 128 and over 64, or in one with v at most 64. */
struct mla_expanded_args {
    uint32_t rows, heads, nope, rope, v, q_stride;
    float scale;
    const uint32_t *position; /* [rows], device memory */
};
bool mla_expanded_offers_cuda(const struct mla_expanded_args *args);
size_t mla_expanded_key_bytes_cuda(const struct mla_expanded_args *args, uint32_t positions);
size_t mla_expanded_value_bytes_cuda(const struct mla_expanded_args *args, uint32_t positions);
/* Keys and values of positions 0 .. positions - 1 from the output of kv_b, [positions, kv_stride]
 * float, and the cache's rotated keys, which begin at element rope_at of a position (an E4M3 cache:
 * latent_rope_at() / 2, rows latent_row_bytes() / 2 apart). pages: of the sequence, device memory.
 */
int mla_expand_cuda(void *stream, const struct mla_expanded_args *args, const float *kv,
                    size_t kv_stride, const bf16 *cache, size_t cache_stride, uint32_t rope_at,
                    const uint32_t *pages, uint32_t positions, bf16 *ret_key, bf16 *ret_value);
/* ret: [rows, heads * v], ret_stride apart. */
int mla_expanded_cuda(void *stream, const struct mla_expanded_args *args, const bf16 *q,
                      const bf16 *key, const bf16 *value, uint32_t positions, bf16 *ret,
                      size_t ret_stride);

#ifdef __cplusplus
}
#endif

#endif
