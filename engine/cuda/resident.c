/* Whole steps for an attention engine (engine/resident.h): weights of all roles but the sampler's
 * on one device; a batch becomes runs of prompt rows, sequence by sequence, and then its generated
 * rows, as many at a time as the step has room for. How it is cut changes no bit. */
#include "engine/cuda/resident.h"

#include <stdlib.h>
#include <string.h>

#include "engine/cuda/step.h"

enum { ROWS_MAX = 128, BIASES = BIAS_VERSIONS_HELD_MAX };

struct resident {
    struct step_weights weights;
    struct step *step;
    uint32_t rows_max, hidden;
    const float *bias[BIASES]; /* of the batch at hand, by number */
    uint32_t biases;
    struct step_row *row; /* [rows_max] */
    uint32_t *from;       /* [rows_max]: which rows of the batch they are */
    uint8_t *final;       /* [batch_rows, hidden] activations */
    uint8_t *fetched;     /* [rows_max, hidden padded] */
};

/* The device failed: what it holds is lost, and so is this process. */
static void must(int error) {
    ASSERT(error == 0);
}

static int put_experts(struct resident *self, const struct model *model,
                       const struct kernels *kernels, struct failure *failure) {
    const struct model_config *c = model_config(model);
    for (uint32_t l = 0; l < c->layers; l++)
        for (uint32_t e = 0; model_layer_is_moe(c, l) && e < c->experts; e++) {
            struct expert_weights *weights = NULL;
            const int error = engine_expert_pack(model, kernels, l, e, &weights, failure);
            if (error != 0)
                return error;
            must(step_expert_put(self->step, 0, l, e, weights));
            engine_expert_free(&weights);
            step_place(self->step, l, e, 0, e);
        }
    return 0;
}

static void close_resident(void *resident) {
    struct resident *self = resident;
    step_close(&self->step);
    step_weights_close(&self->weights);
    free(self->row);
    free(self->from);
    free(self->final);
    free(self->fetched);
    free(self);
}

static int open_step(struct resident *self, const struct model *model,
                     const struct engine_options *options, struct failure *failure) {
    const struct model_config *c = model_config(model);
    const uint64_t positions = (uint64_t)options->pages * PAGE_TOKENS;
    int error = step_weights_open(&self->weights, model, options->kernels, failure);
    if (error != 0)
        return error;
    struct step_model *m = &self->weights.model;
    m->head = (struct step_matrix){0}; /* a sampler's */
    if (options->experts_per_token_override != 0)
        m->gate.k = options->experts_per_token_override;
    if (options->gate_top_p != 0)
        m->gate.top_p = options->gate_top_p;
    const struct step_options step = {.cache = options->latent_fp8 ? CACHE_E4M3 : CACHE_BF16,
                                      .dispatch = m->expert_fp8 ? DISPATCH_E4M3 : DISPATCH_BF16,
                                      .rows = self->rows_max,
                                      .micro = 1,
                                      .groups = 1,
                                      .slots = c->experts > 0 ? c->experts : 1,
                                      .pages = options->pages,
                                      .positions =
                                          positions < c->context ? (uint32_t)positions : c->context,
                                      .biases = BIASES,
                                      .prompts = true,
                                      .graphs = true};
    error = step_open(&self->step, m, &step, failure);
    return error != 0 ? error : put_experts(self, model, options->kernels, failure);
}

static int open_resident(void **ret, const struct model *model,
                         const struct engine_options *options, uint64_t *bytes,
                         struct failure *failure) {
    struct resident *self = calloc(1, sizeof *self);
    if (self == NULL)
        return fail(failure, ERR_NO_MEMORY, "whole steps: no memory");
    self->rows_max = options->batch_rows < ROWS_MAX ? options->batch_rows : ROWS_MAX;
    self->hidden = model_config(model)->hidden;
    const size_t padded = activation_stride(self->hidden) * sizeof(bf16);
    self->row = calloc(self->rows_max, sizeof *self->row);
    self->from = calloc(self->rows_max, sizeof *self->from);
    self->final = calloc(options->batch_rows, self->hidden * sizeof(bf16));
    self->fetched = calloc(self->rows_max, padded);
    int error = 0;
    if (self->row == NULL || self->from == NULL || self->final == NULL || self->fetched == NULL)
        error = fail(failure, ERR_NO_MEMORY, "whole steps: no memory for batches");
    if (error == 0)
        error = open_step(self, model, options, failure);
    if (error != 0) {
        close_resident(self);
        return error;
    }
    *bytes += self->weights.bytes + step_memory_bytes(self->step);
    *ret = self;
    return 0;
}

/* Versions of the batch are put anew: they are small, and a pointer may mean another one tomorrow.
 */
static uint32_t bias_number(struct resident *self, const float *bias) {
    if (bias == NULL)
        return STEP_NO_BIAS;
    for (uint32_t i = 0; i < self->biases; i++)
        if (self->bias[i] == bias)
            return i;
    ASSERT(self->biases < BIASES); /* no actor holds more */
    must(step_bias(self->step, self->biases, bias));
    self->bias[self->biases] = bias;
    return self->biases++;
}

static void add_row(struct resident *self, uint32_t count, const struct batch_row *row,
                    uint32_t from) {
    self->row[count] =
        (struct step_row){row->token, row->position, row->pages, bias_number(self, row->bias)};
    self->from[count] = from;
}

/* The rows that were added, to their end; their final rows come to the host together. */
static void run(struct resident *self, uint32_t count, bool prompt) {
    const size_t row_bytes = self->hidden * sizeof(bf16);
    struct step_result result;
    if (count == 0)
        return;
    must(prompt ? step_prompt(self->step, self->row, count)
                : step_begin(self->step, self->row, count));
    must(step_end(self->step, &result));
    const size_t padded = result.final_stride * sizeof(bf16);
    must(device_get_cuda(self->fetched, result.final, count * padded));
    for (uint32_t r = 0; r < count; r++) {
        ASSERT(result.lost[r] == 0 && result.at[r] == r); /* everything is held, one micro-batch */
        memcpy(self->final + self->from[r] * row_bytes, self->fetched + r * padded, row_bytes);
    }
}

static void step(void *resident, const struct batch_row *row, uint32_t rows) {
    struct resident *self = resident;
    uint32_t count = 0;
    self->biases = 0;
    for (uint32_t r = 0; r < rows; r++) {
        if (row[r].form != MLA_EXPANDED)
            continue;
        add_row(self, count++, &row[r], r);
        const bool last = r + 1 == rows || row[r + 1].sequence != row[r].sequence ||
                          row[r + 1].form != MLA_EXPANDED;
        if (last || count == self->rows_max) {
            run(self, count, true);
            count = 0;
        }
    }
    for (uint32_t r = 0; r < rows; r++) {
        if (row[r].form == MLA_EXPANDED)
            continue;
        add_row(self, count++, &row[r], r);
        if (count == self->rows_max) {
            run(self, count, false);
            count = 0;
        }
    }
    run(self, count, false);
}

static const void * final(void *resident, uint32_t row) {
    const struct resident *self = resident;
    return self->final + (size_t)row * self->hidden * sizeof(bf16);
}

static void clear(void *resident, const uint32_t *pages, uint32_t count) {
    must(step_clear_pages(((struct resident *)resident)->step, pages, count));
}

const struct resident_operations RESIDENT_CUDA = {open_resident, close_resident, step, final,
                                                  clear};
