/* What the files of the resident step share. */
#ifndef TROUPE_ENGINE_CUDA_STEP_INTERNAL_H
#define TROUPE_ENGINE_CUDA_STEP_INTERNAL_H

#include "engine/cuda/edge.h"
#include "engine/cuda/step.h"
#include "kernels/cuda/streams.h"

/* Routed experts of one layer in one group: slots one after the other. gate_up: gate's n rows, then
 * up's. */
struct step_stack {
    struct step_matrix gate_up, down; /* n and k of one slot */
};

/* Stream of attention: one micro-batch at a time, so its work space is shared. Rows: R. */
struct step_attention {
    bf16 *normed;     /* [R, hidden_stride] */
    float *q_low;     /* [R, q_lora] */
    bf16 *q_low_norm; /* [R, q_lora padded] */
    float *q;         /* [R, heads, nope + rope] */
    float *kv;        /* [R, kv_lora + rope] */
    bf16 *q_nope;     /* [R, heads, nope padded] */
    float *q_latent;  /* [R, heads, kv_lora] */
    bf16 *query;      /* [R, heads, cache_stride] */
    float *mla_work;
    bf16 *latent;             /* [R, heads, kv_lora padded] */
    float *values;            /* [R, heads, v] */
    bf16 *attended;           /* [R, heads * v padded] */
    float *projected;         /* [R, hidden] */
    float *gate_logits;       /* [R, experts] */
    float *mlp_gate, *mlp_up; /* [R, mlp_width] */
    bf16 *mlp_inner;          /* [R, mlp_width padded] */
    uint8_t *quantised;       /* [R, widest k padded to 128] */
    float *scales;            /* [R, of 128] */
    bf16 *expanded;           /* prompts: [R, heads, nope padded | rope padded] */
    bf16 *seen;               /* [P, cache_stride]: the latents of all positions, in order */
    float *seen_kv;           /* [P, heads, nope | v] */
    bf16 *key, *value;        /* mla_expand_cuda() */
    const void *quantised_of; /* while enqueuing: what `quantised` holds */
};

/* An edge and, between processes, a stream for each direction with the events that tie them to the
 * stream that computes. */
struct step_link {
    struct edge edge;
    void *sends, *receives;              /* streams; NULL: local */
    void *ready, *sent, *free, *arrived; /* events */
};

/* A micro-batch. */
struct step_micro {
    float *residual;    /* [R, hidden] */
    float *shared;      /* [R, hidden] */
    uint16_t *choice;   /* [moe layers, R, k] */
    uint16_t *answered; /* [R, k] */
    float *weights;     /* [R, k] */
    uint32_t *place;    /* [R, k] */
    uint32_t *sent;     /* [groups] rows, [groups, R] which */
    uint8_t *notes;     /* [groups, note] */
    uint8_t *rows;      /* [groups, R, step_row_bytes()] */
    uint32_t *status;   /* [groups, items] */
    float *output;      /* [groups, items, hidden] */
    struct step_link link[STEP_GROUPS_MAX];
};

/* A group of experts: its stream's work space, one micro-batch at a time. C: slots * R rows. */
struct step_group {
    void *stream;
    struct step_stack *stack; /* [layers] */
    uint32_t *count;          /* [slots] */
    uint32_t *item;           /* [slots, R] */
    uint32_t *place;          /* [R, k] */
    uint8_t *x;               /* [C, hidden] BF16 or E4M3 */
    float *x_scale;           /* [C, of 128] */
    uint8_t *x_row;           /* rows that came as BF16: [R, hidden] E4M3, before packing */
    float *x_row_scale;
    float *gate_up; /* [C, 2 * width] */
    bf16 *inner;    /* [C, width padded] */
    uint8_t *inner_fp8;
    float *inner_scale;
    float *y;         /* [C, hidden] */
    int32_t *slot_of; /* device: [layers, experts] */
};

/* A capacity that steps have been made for; products and attention are planned once. */
struct step_recording {
    uint32_t rows, micro, splits;
    struct gemm_cuda *product;
    struct mla_absorbed_cuda *mla;
    uint32_t products, mlas; /* planned so far */
    uint32_t products_room;
    void *graph;
    const uint32_t *prompt_pages; /* a prompt's, on the host; NULL: generated tokens */
    uint32_t positions;           /* that the prompt's last row sees */
};
#define STEP_RECORDINGS_MAX 64

/* The block of tables of a step, in words: [ticket, live of each micro-batch], then for each
 * micro-batch token, position, delta_of [rows] and pages [rows, pages_stride]. */
struct step_tables {
    uint32_t *host, *device;
    size_t words_max;
};

struct step {
    const struct step_model *model;
    struct step_options options;
    uint32_t moe_layers, pages_max; /* of a sequence */
    uint32_t ticket;
    size_t hidden_stride;
    size_t cache_stride; /* of queries, and of latents as BF16 */
    size_t page_bytes, layer_bytes;
    uint8_t *latents; /* [layers][pages + 1][64] rows of the cache's format; the last page is that
                         of rows that do not count */
    struct step_attention work;
    struct step_micro micro[STEP_MICRO_MAX];
    struct step_group group[STEP_GROUPS_MAX];
    struct step_tables tables;
    int32_t *placement; /* pinned: [layers, experts] group, then [groups, layers, experts] slot */
    int32_t *group_of;  /* device: [layers, experts] */
    bool placement_changed;
    float *deltas;                   /* device: [biases, layers, experts] */
    uint32_t *lost, *lost_host;      /* [micro, R] */
    uint16_t *choice_host, *choices; /* pinned [micro, moe layers, R, k]; [moe layers, rows, k] */
    uint32_t *at;  /* [rows]: where a row of the step lies: micro-batch * R + row of it */
    bf16 *final;   /* [micro * R, hidden_stride] */
    float *logits; /* [micro * R, vocabulary] */
    void *stream;
    struct step_recording recording[STEP_RECORDINGS_MAX];
    uint32_t recordings;
    struct step_recording prompt; /* made anew each time */
    /* While enqueuing: */
    struct step_recording *now;
    uint32_t next_product, next_mla;
    int error;             /* the first one */
    uint32_t rows_running; /* 0: no step is under way */
    void **memory;
    uint32_t memory_count, memory_room;
    uint64_t memory_bytes;
};

/* Keeps the first error of what enqueues. */
static inline void did(struct step *self, int error) {
    if (self->error == 0)
        self->error = error;
}
static inline uint32_t up_to(uint32_t n, uint32_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

/* Where the tables of a micro-batch lie on the device. */
struct micro_tables {
    const uint32_t *live, *token, *position, *delta_of, *pages;
    uint32_t pages_stride;
};
struct micro_tables step_micro_tables(const struct step *self, uint32_t micro);

/* step_memory.c */
int step_memory_open(struct step *self, struct failure *failure);
void step_memory_close(struct step *self);

/* step_products.c: y = x W^T as the table computes it. Planned at the first enqueuing of a
 * recording. */
void step_product(struct step *self, const struct step_matrix *w, const bf16 *x, size_t x_stride,
                  uint32_t rows, float *y, size_t y_stride);
void step_product_heads(struct step *self, const struct step_matrix *w, const bf16 *x,
                        uint32_t x_step, uint32_t rows, float *y, uint32_t y_step);
void step_product_masked(struct step *self, const struct step_matrix *w, const void *x,
                         size_t x_stride, const float *x_scale, uint32_t slots, uint32_t rows,
                         const uint32_t *count, void *stream, float *y);
/* down(silu(gate(x)) * up(x)) of a dense layer or shared expert. */
void step_mlp(struct step *self, const struct step_layer *layer, uint32_t rows, float *y);

/* step_links.c: what the edges of a micro-batch and group do, tied to the stream that computes. */
int step_link_open(struct step_link *self, const struct edge *edge);
void step_link_close(struct step_link *self);
typedef int edge_operation(void *edge, const struct edge_frame *frame, void *stream);
void step_link_send(struct step *self, struct step_link *link, edge_operation *operation,
                    const struct edge_frame *frame, void *stream);
void step_link_receive(struct step *self, struct step_link *link, edge_operation *operation,
                       const struct edge_frame *frame, void *stream);
/* At the end of a step: `stream` has everything behind it. */
void step_link_settle(struct step *self, struct step_link *link, void *stream);

/* step_attention.c, step_experts.c: one layer of one micro-batch, enqueued. */
void step_embed(struct step *self, uint32_t micro);
void step_attend(struct step *self, uint32_t layer, uint32_t micro);
void step_hear(struct step *self, uint32_t layer, uint32_t micro);
void step_finish(struct step *self, uint32_t micro);
void step_experts(struct step *self, uint32_t group, uint32_t layer, uint32_t micro);
uint32_t step_moe_index(const struct step *self, uint32_t layer);
size_t step_row_bytes(const struct step *self); /* of a row that travels to experts */
struct edge_frame step_frame(const struct step *self, uint32_t micro, uint32_t group);

#endif
