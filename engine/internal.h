/* What the files of engine/ share: the engine object, its memory, packed weights and work cut by
 * rows. Not for other folders. */
#ifndef TROUPE_ENGINE_INTERNAL_H
#define TROUPE_ENGINE_INTERNAL_H

#include "engine/engine.h"

struct attention; /* engine/attention.h */
struct experts;   /* engine/expert_engine.c */
struct sampler;   /* engine/sampler_engine.c */

struct engine {
    enum engine_role role;
    const struct model *model;
    const struct model_config *config;
    const struct kernels *kernels;
    struct parallel parallel;
    uint32_t batch_rows;
    uint32_t hidden;
    size_t hidden_stride;        /* of activation rows */
    uint64_t memory_bytes;       /* held, address space of untouched cache pages included */
    struct attention *attention; /* of these three the one of the role, the others NULL */
    struct experts *experts;
    struct sampler *sampler;
};

/* --- memory (engine/memory.c) --- */

/* count x size bytes, zero, 64-byte aligned; large ones cost no memory before they are touched.
 * NULL with ERR_NO_MEMORY naming the bytes and `what`. Adds to *total. */
void *memory_take(size_t count, size_t size, const char *what, uint64_t *total,
                  struct failure *failure);
/* A block that grows: makes sure that *block holds count x size bytes, keeping nothing of what was
 * in it. */
int memory_grow(void **block, size_t *capacity_bytes, size_t count, size_t size, const char *what,
                uint64_t *total, struct failure *failure);
void memory_free(void *block);

/* Changes nothing but how fast the memory is. */
void memory_ask_huge_pages(void *memory, size_t bytes);

/* Memory of packed weights (engine/weight_memory.c): 64-byte aligned, not cleared, in huge pages
 * where the system has them. Any thread. Freed with the bytes that were asked for. */
void *weight_memory_take(size_t bytes, const char *what, uint64_t *total, struct failure *failure);
void weight_memory_free(void *memory, size_t bytes);

/* Places arrays one after the other in a block, 64-byte aligned. With base NULL it only counts, so
 * that one function both sizes a block and lays it out. */
struct layout {
    uint8_t *base;
    size_t used;
};
void *layout_take(struct layout *layout, size_t count, size_t size);

/* --- packed weights (engine/packed.c) --- */

struct packed {
    struct matrix matrix;
    void *memory;
    size_t bytes; /* of memory */
};
int packed_open(struct packed *ret, const struct kernels *kernels, const struct weight_view *view,
                const char *what, uint64_t *total, struct failure *failure);
/* packed_open, then packed_code. */
int packed_open_coded(struct packed *ret, const struct kernels *kernels,
                      const struct weight_view *view, size_t count, const char *what,
                      uint64_t *total, struct failure *failure);
/* Stores it more tightly where the kernels read that; same values. For products of few rows, whose
 * weights come from memory: `count` like it are read in turn. */
int packed_code(struct packed *self, const struct kernels *kernels, size_t count, const char *what,
                uint64_t *total, struct failure *failure);
void packed_close(struct packed *self);

/* A norm weight or bias as floats [n]. */
int floats_open(float **ret, const struct weight_view *view, uint32_t n, const char *what,
                uint64_t *total, struct failure *failure);

/* down(silu(gate(x)) * up(x)): a dense layer, the shared expert or one routed expert. */
struct mlp {
    struct packed gate, up, down;
};
int mlp_open(struct mlp *ret, const struct kernels *kernels, const struct weight_view view[3],
             const char *what, uint64_t *total, struct failure *failure);
int mlp_code(struct mlp *self, const struct kernels *kernels, size_t count, const char *what,
             uint64_t *total, struct failure *failure);
void mlp_close(struct mlp *self);

struct mlp_work {
    float *gate, *up; /* [rows, sums_stride(width)] */
    void *inner;      /* [rows, row_stride(width)] activations */
};
void mlp_work_layout(struct mlp_work *ret, struct layout *layout, const struct kernels *kernels,
                     uint32_t rows, uint32_t width);
/* x: [rows, x_stride] activations, y: [rows, y_stride] float. */
void mlp_run(const struct mlp *self, const struct kernels *kernels, const void *x, size_t x_stride,
             uint32_t rows, const struct mlp_work *work, float *y, size_t y_stride,
             const struct parallel *parallel);

/* The same from rows of kernels/e4m3_row.h, x_stride bytes apart, where gate and up take them. */
void mlp_run_e4m3(const struct mlp *self, const struct kernels *kernels, const void *x,
                  size_t x_stride, uint32_t rows, const struct mlp_work *work, float *y,
                  size_t y_stride, const struct parallel *parallel);

/* --- rows (engine/rows.c) --- */

/* Cuts rows into at most parallel->width runs and calls task(argument, first, end, part) for each,
 * part < width. Rows must not depend on each other. row_work is about how many vector operations a
 * row takes: small jobs stay in the calling thread, because waking another costs more. */
void rows_run(const struct parallel *parallel, uint32_t rows, size_t row_work,
              void (*task)(void *argument, uint32_t first, uint32_t end, int part), void *argument);

/* rms_norm and add of kernels/ops.h over all threads. */
void rows_norm(const struct engine *self, const float *x, size_t x_stride, const float *weight,
               uint32_t rows, uint32_t n, void *ret, size_t ret_stride);
void rows_add(const struct engine *self, float *x, size_t x_stride, const float *y, size_t y_stride,
              uint32_t rows, uint32_t n);

/* Address of element `index` of an array of activations. */
static inline void *activation_at(const struct kernels *kernels, const void *base, size_t index) {
    return (uint8_t *)base + index * kernels->activation_bytes;
}

/* --- one row of logits (engine/sample.c) --- */

/* A thread's own work space, [vocabulary] each. */
struct sample_work {
    float *logits;    /* modified logits, then weights of the draw */
    float *sum;       /* exponentials of the raw logits, maxima of runs */
    uint32_t *heap;   /* tokens */
    uint8_t *touched; /* zero between rows */
};
/* logits: the row's raw logits [vocabulary], NaN replaced; words: those of the frame; ret_words:
 * where ret->first_word points to, room for 2 x top + vocabulary words. */
void sample_row(const struct sample_spec *spec, const uint32_t *words, const float *logits,
                uint32_t vocabulary, const struct sample_work *work, struct sample_result *ret,
                uint32_t *ret_words);

/* NaN and infinities of a row of logits become numbers, or -infinity. */
void sample_clean(float *logits, uint32_t count);

/* --- roles --- */

int attention_open(struct engine *self, const struct engine_options *options,
                   struct failure *failure);
void attention_close(struct engine *self);
void attention_run(struct engine *self, const struct program *program, struct program_result *ret);
size_t attention_cache_ahead(struct engine *self, size_t ahead_bytes, void **ret);
size_t attention_cache_wanted(const struct engine *self, size_t ahead_bytes); /* bytes, all pieces */
bool attention_keeps(const struct engine *self);
void attention_take_in(struct engine *self);
const void *attention_region(const struct engine *self, enum region region, uint32_t slot,
                             uint32_t *ret_rows);

struct expert_weights {
    struct mlp mlp;
    uint64_t bytes;
    uint32_t layer, expert;
    struct weight_view shape[3]; /* gate, up, down, without data */
    uint64_t image_part[3];      /* bytes of each in the image */
    uint32_t crc;                /* of the image (expert_image.c) */
    bool summed;                 /* it is known */
    bool movable;                /* may be read as one */
};
int expert_fits(const struct kernels *kernels, const struct weight_view view[3], struct failure *failure);
int experts_open(struct engine *self, struct failure *failure);
struct expert_weights *experts_held(const struct engine *self, uint32_t layer, uint32_t expert); /* NULL: not held */
void *experts_chunk(struct engine *self, size_t bytes, struct failure *failure); /* memory to read into */
void expert_image_prepare(struct expert_weights *weights, const struct kernels *kernels,
                          const struct weight_view view[3]);
void experts_read(struct engine *self, const struct program *program, struct program_result *ret);
void experts_close(struct engine *self);
void experts_run(struct engine *self, const struct program *program, struct program_result *ret);
const float *experts_output(const struct engine *self, uint32_t *ret_items);

int sampler_open(struct engine *self, struct failure *failure);
void sampler_close(struct engine *self);
void sampler_run(struct engine *self, const struct program *program, struct program_result *ret);

#endif
