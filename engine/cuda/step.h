/* A decode step that stays on the device (docs/gpu.md): generated tokens of many sequences through
 * all layers, attention and experts, without waiting on the host in between; captured as a graph
 * once for each capacity and replayed. What differs between steps is data in device memory: rows,
 * page tables, placement, biases. A row's bits are those of the device's table
 * (kernels/cuda/table.h).
 *
 * One thread uses a step. It owns the streams, the latent cache and the experts' weights; `model`
 * is borrowed. */
#ifndef TROUPE_ENGINE_CUDA_STEP_H
#define TROUPE_ENGINE_CUDA_STEP_H

#include "engine/cuda/edge.h"
#include "engine/cuda/weights.h"

#define STEP_MICRO_MAX  2
#define STEP_GROUPS_MAX 8
#define STEP_NO_BIAS    0xffffffffu

/* Which side of the edges a step is: both in one process, or one of them. */
enum step_role { STEP_WHOLE, STEP_ATTENTION, STEP_EXPERTS };

/* How the cache keeps latents (kernels/latent.h): other bits, those of a table whose profile has
 * the same form. */
enum cache_format { CACHE_BF16, CACHE_E4M3 };

/* How rows travel to experts: as BF16, or as kernels/e4m3_row.h has them, for experts in E4M3 (same
 * bits, half the bytes). The same on both sides of an edge. */
enum dispatch_format { DISPATCH_BF16, DISPATCH_E4M3 };

struct step_options {
    enum step_role role;
    enum dispatch_format dispatch;
    enum cache_format cache;
    const struct edge *edges; /* [micro, groups], taken over; NULL: local ones, of a whole step */
    uint32_t rows;            /* most rows of a micro-batch */
    uint32_t micro;           /* micro-batches: 1 or 2 */
    uint32_t groups;          /* of experts, each with a stream of its own */
    uint32_t slots;           /* experts of a layer that a group has room for */
    uint32_t pages;           /* of the latent cache */
    uint32_t positions;       /* longest sequence */
    uint32_t biases; /* versions of the routing bias that may be in use together; may be 0 */
    bool prompts;    /* step_prompt() will be called */
    bool graphs;     /* false: kernels are launched one by one */
};

struct step_row {
    uint32_t token, position;
    const uint32_t *pages; /* page numbers of the sequence */
    uint32_t bias;         /* STEP_NO_BIAS, or one that step_bias() has put */
};

/* Valid until the next step begins. */
struct step_result {
    uint32_t rows;
    const uint32_t *lost; /* [rows]: 0, or 1 + the layer at which an expert's answer was missing:
                             the row counts as not computed */
    const float *
        logits; /* [.., vocabulary], device memory, where the model has a head: row r's are at[r] */
    const bf16 *final;      /* [.., final_stride] activations, device memory, likewise */
    const uint32_t *at;     /* [rows] */
    const uint16_t *choice; /* [moe layers, rows, k]: experts as chosen, for statistics */
    size_t final_stride;
};

struct step;
/* ERR_NO_MEMORY names what for; ERR_UNSUPPORTED: widths without kernels. */
int step_open(struct step **ret, const struct step_model *model, const struct step_options *options,
              struct failure *failure);
void step_close(struct step **self);

/* Between steps. Weights of an expert of the model into a slot: as packed by the device's table. */
int step_expert_put(struct step *self, uint32_t group, uint32_t layer, uint32_t slot,
                    const struct expert_weights *weights);
/* From the next step on the expert is asked for at this group and lies in this slot; group
 * STEP_NOWHERE: nobody has it. A table, not a graph, changes. */
#define STEP_NOWHERE 0xffffffffu
void step_place(struct step *self, uint32_t layer, uint32_t expert, uint32_t group, uint32_t slot);
/* As step_place, for one side alone: what the group itself believes to hold. What attention asks
 * for and is not held makes rows lost. Slot STEP_NOWHERE: not held. */
void step_hold(struct step *self, uint32_t layer, uint32_t expert, uint32_t group, uint32_t slot);
/* delta: [layers, experts], added to the model's own biases; number below options->biases. */
int step_bias(struct step *self, uint32_t number, const float *delta);
/* Pages that are handed to a sequence. */
int step_clear_pages(struct step *self, const uint32_t *pages, uint32_t count);

/* Enqueues a step; rows at most options->rows * micro, no two of one page and position. 0, or an
 * error of CUDA (the device is lost) or ERR_INVALID. */
int step_begin(struct step *self, const struct step_row *row, uint32_t rows);
/* The same for prompt tokens (the expanded form): at most options->rows rows of one sequence,
 * ascending. Their number is what it is, so nothing is captured. */
int step_prompt(struct step *self, const struct step_row *row, uint32_t rows);
/* What the experts' side must be told of a step that has begun, before or after: its capacity. */
void step_announce(const struct step *self, uint32_t *ret_rows, uint32_t *ret_micro);
/* The experts' side of such a step, enqueued: all layers, all micro-batches; then step_end() with
 * ret NULL. */
int step_serve(struct step *self, uint32_t rows, uint32_t micro);
/* The one place that waits. */
int step_end(struct step *self, struct step_result *ret);
bool step_done(struct step *self); /* step_end() would not wait */

/* What graphs there are, for tests and benches. */
uint32_t step_graphs(const struct step *self);
uint32_t step_graph_nodes(const struct step *self); /* of the one used last */
uint64_t
step_memory_bytes(const struct step *self); /* device memory held, weights of experts included */
void *step_stream(const struct step *self); /* attention's */

#endif
