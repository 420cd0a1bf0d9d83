/* The attention engine's parts: weights of each layer, the latent cache, the regions of each batch
 * slot and the work space. */
#ifndef TROUPE_ENGINE_ATTENTION_H
#define TROUPE_ENGINE_ATTENTION_H

#include "engine/internal.h"

struct attention_layer {
    float *input_norm, *post_norm, *q_a_norm, *kv_a_norm;
    struct packed q_a,
        q_b; /* q_b: from the latent query, or from the hidden row where q_lora is 0 */
    struct packed kv_a, kv_b, o;
    /* Absorbed form, per head: w_uk takes a query's nope part into the latent space (transpose of
     * kv_b's key rows), w_uv takes latents to the head's values. (DeepSeek-V2, 2405.04434,
     * section 2.1.2.) */
    struct packed *w_uk, *w_uv; /* [heads] */
    bool moe, has_mlp;
    struct mlp mlp; /* dense layer: the MLP; MoE layer: the shared expert, if has_mlp */
    struct packed gate;
    float *gate_bias; /* NULL: none */
};

/* One micro-batch. Strides: residual, shared and outputs `hidden` floats, normed and final
 * hidden_stride activations. */
struct attention_slot {
    uint32_t rows, final_rows;
    struct batch_row *row;
    float *residual;   /* [batch_rows, hidden] */
    void *normed;      /* [batch_rows, hidden_stride] */
    void *final;       /* [batch_rows, hidden_stride] */
    float *shared;     /* [batch_rows, hidden] */
    float *outputs;    /* [batch_rows, k, hidden] where those are put that do not stay where they arrived */
    const float **output; /* [batch_rows, k]: where it lies; NULL: it has not arrived */
    bool keeps;           /* some lie where they arrived */
    uint16_t *choice;  /* [batch_rows, k] */
    float *weights;    /* [batch_rows, k] */
    bool shared_ready; /* SHARED has run for the current layer */
};

/* Rows of the absorbed form are taken in blocks, which bounds the work space: a row is heads x
 * kv_lora wide there. */
#define ABSORBED_BLOCK 64

/* Work space of MLA; n: rows of the batch, b: rows of a block. */
struct mla_work {
    float *q_low;                    /* [n, sums_stride(q_lora)] */
    void *q_low_norm;                /* [n, row_stride(q_lora)] */
    float *q;                        /* [n, heads * (nope + rope)] */
    float *kv;                       /* [n, kv_lora + rope] */
    void *q_expanded;                /* [n, heads, expanded_stride] */
    void *attended;                  /* [n, attended_stride] */
    float *projected;                /* [n, hidden] */
    float *part_row;                 /* [threads, heads * the wider of both q strides] */
    void *q_nope;                    /* [b, heads, activation_stride(nope)] */
    float *q_wide;                   /* [b, heads, absorbed_stride] */
    void *q_absorbed;                /* [b, heads, absorbed_stride] */
    void *latent;                    /* [b, heads, activation_stride(kv_lora)] */
    float *values;                   /* [b, heads * v] */
    uint32_t *absorbed_row;          /* [n]: batch rows of the absorbed form */
    uint32_t *position;              /* [n] */
    const float **cos_sin;           /* [n]: of rows of the expanded form; others NULL */
    const void *const **pages;       /* [n] */
    uint32_t *block_position;        /* [b] */
    const void *const **block_pages; /* [b] */
};

/* One head's parts of a layer's kv_b for the absorbed form. */
void attention_absorbed_views(const struct model *model, uint32_t layer, uint32_t head,
                              struct weight_view *ret_key, struct weight_view *ret_value);

struct draft; /* engine/draft.c */

struct attention {
    struct attention_layer *layer; /* [layers], and the MTP module's */
    struct weight_view embedding;
    float *final_norm;
    struct mla_shape shape;
    struct gate_parameters gate;
    size_t expanded_stride; /* per head: nope, then rope, each padded */
    size_t absorbed_stride; /* per head: latent, then rope, each padded; also a position in the
                               cache */
    size_t attended_stride; /* heads * v padded */
    uint32_t slots;
    struct attention_slot slot[BATCH_SLOTS_MAX];

    const struct resident_operations *resident_operations;
    void *resident; /* a device of whole steps: it has weights and cache, `layer` and `cache` are NULL then */

    uint32_t pages;
    struct draft *draft;   /* the MTP module; NULL: left out */
    uint32_t cache_layers; /* layers, and one of the MTP module */
    uint8_t *cache;     /* [pages][cache_layers][PAGE_TOKENS][absorbed_stride] activations */
    uint8_t *page_used; /* [pages]: written since it was cleared */
    /* Actors hand out low pages first. Read by whoever makes memory ready ahead of the rows. */
    _Atomic uint32_t pages_reached; /* no page from here on was ever written */
    _Atomic size_t cache_given;     /* bytes, from the beginning */
    float *cos_sin; /* [context][rope / 2][2], filled in blocks of PAGE_TOKENS positions when first
                       needed */
    uint8_t *cos_sin_ready; /* [context / PAGE_TOKENS rounded up] */

    void
        *page_table; /* const void *: pages of every sequence of the batch, for the layer at hand */
    size_t page_table_bytes;

    uint8_t *work; /* one block, laid out anew by each program */
};

/* Both size the work space (base NULL) and lay it out. */
size_t mla_work_layout(const struct engine *self, struct mla_work *ret, uint8_t *base);
struct layer_mlp_work {
    struct mlp_work mlp;
    float *out;    /* [batch_rows, hidden] */
    float *logits; /* [batch_rows, experts] */
};
size_t layer_mlp_work_layout(const struct engine *self, struct layer_mlp_work *ret, uint8_t *base);

float attention_softmax_scale(const struct model_config *c);
/* kv_b, and a head's key part of it as w_uk is packed; file rows are heads x [nope | v]. */
struct weight_view attention_kv_b(const struct model *model, uint32_t layer);
struct weight_view attention_key_view(const struct model_config *c, struct weight_view kv_b,
                                      uint32_t head);

/* Residual += MLA(normed rows), the latent cache written first. engine/attention_mla.c */
void attention_mla(struct engine *self, struct attention_slot *slot, uint32_t layer);

/* The latent cache only: entries of the slot's normed rows. */
void attention_store(struct engine *self, struct attention_slot *slot, uint32_t layer);
/* Checks rows against the rules of struct batch_row, makes room for their page tables and the rotations of their positions. */
int attention_prepare_rows(struct engine *self, const struct batch_row *row, uint32_t rows);
/* The check alone; returns the entries of page tables that they need. */
size_t attention_check_rows(struct engine *self, const struct batch_row *row, uint32_t rows);
/* The token's embedding, [hidden]. */
void attention_embedding(const struct engine *self, uint32_t token, float *ret);

/* engine/attention_resident.c */
int attention_resident_open(struct engine *self, const struct engine_options *options,
                            struct failure *failure);
void attention_resident_close(struct engine *self);
void attention_resident_run(struct engine *self, const struct program *program,
                            struct program_result *ret);

/* engine/draft.c */
int draft_open(struct engine *self, uint32_t steps, struct failure *failure);
void draft_close(struct engine *self);
void draft_run(struct engine *self, const struct program *program, struct program_result *ret);

uint8_t *cache_at(const struct engine *self, uint32_t page, uint32_t layer);

#endif
