/* Multi-token prediction (DeepSeek-V3, 2412.19437, section 2.2): guesses of the tokens after the
 * next one, made from what the main layers have left in a batch slot.
 *
 *   h: final norm of a row's residual;  x = eh_proj([enorm(embedding of the next token) |
 * hnorm(h)]) one block: MLA over the module's own latent cache (layer `layers` of each page) and
 * its MLP shared_head.norm -> LM head -> a guess, drawn as the sampler will draw the token
 *
 * and again from the guess, with the block's normed output in place of h. A row whose next token is
 * only to be remembered needs no more than its latent entry, for which x is enough.
 *
 * Guesses never change a token: whoever made them has them verified by the main layers. So nothing
 * here is sent anywhere: the module's experts and a copy of the LM head live beside the attention
 * weights, where a guess costs no message. (A fan-out to expert processes and a question to a
 * sampler would cost more than the module computes; docs/performance.md has the figures.) */
#include <stdlib.h>
#include <string.h>

#include "engine/attention.h"
#include "router/combine.h"

#define DRAFT_BLOCK 8 /* rows of logits that are made together */

struct draft {
    uint32_t layer; /* of the cache and of attention.layer */
    uint32_t steps; /* most guesses of a row */
    float *enorm, *hnorm, *head_norm;
    struct packed eh_proj, head;
    struct mlp *expert; /* [experts]; NULL: its MLP is dense */
    size_t joined_stride;
    void *memory;               /* of all below */
    void *half;                 /* [batch_rows, hidden_stride] activations */
    void *joined;               /* [batch_rows, joined_stride] activations: embedding, hidden */
    float *wide;                /* [batch_rows, hidden] */
    struct attention_slot slot; /* rows [batch_rows], normed; the rest [DRAFT_ROWS_MAX] */
    void *gathered;             /* [DRAFT_ROWS_MAX, hidden_stride] activations of one expert */
    float *expert_out;          /* [DRAFT_ROWS_MAX, hidden] */
    struct mlp_work expert_work;
    float *logits; /* [DRAFT_BLOCK, vocabulary] */
    struct sample_work work;
    uint32_t *token;  /* [DRAFT_ROWS_MAX, steps]: guesses */
    uint32_t *next;   /* [batch_rows] the token that follows each row */
    uint32_t *origin; /* [DRAFT_ROWS_MAX] which of the rows that draft a row of the slot is */
};

/* ---- opening ---- */

static void lay_out(const struct engine *self, struct draft *d, struct layout *layout) {
    const struct model_config *c = self->config;
    const size_t rows = self->batch_rows, drafts = DRAFT_ROWS_MAX, k = self->attention->gate.k;
    const size_t activation = self->kernels->activation_bytes;
    struct attention_slot *slot = &d->slot;
    d->half = layout_take(layout, rows * self->hidden_stride, activation);
    d->joined = layout_take(layout, rows * d->joined_stride, activation);
    d->wide = layout_take(layout, rows * self->hidden, sizeof(float));
    d->next = layout_take(layout, rows, sizeof *d->next);
    slot->row = layout_take(layout, rows, sizeof *slot->row);
    slot->residual = layout_take(layout, rows * self->hidden, sizeof(float));
    slot->normed = layout_take(layout, rows * self->hidden_stride, activation);
    slot->final = layout_take(layout, drafts * self->hidden_stride, activation);
    slot->shared = layout_take(layout, drafts * self->hidden, sizeof(float));
    slot->outputs = layout_take(layout, drafts * k * self->hidden, sizeof(float));
    slot->choice = layout_take(layout, drafts * k, sizeof *slot->choice);
    slot->weights = layout_take(layout, drafts * k, sizeof(float));
    d->gathered = layout_take(layout, drafts * self->hidden_stride, activation);
    d->expert_out = layout_take(layout, drafts * self->hidden, sizeof(float));
    mlp_work_layout(&d->expert_work, layout, self->kernels, DRAFT_ROWS_MAX, c->expert_width);
    d->logits = layout_take(layout, (size_t)DRAFT_BLOCK * c->vocabulary, sizeof(float));
    d->work.logits = layout_take(layout, c->vocabulary, sizeof(float));
    d->work.sum = layout_take(layout, c->vocabulary, sizeof(float));
    d->work.heap = layout_take(layout, c->vocabulary, sizeof(uint32_t));
    d->work.touched = layout_take(layout, c->vocabulary, 1);
    d->token = layout_take(layout, drafts * d->steps, sizeof *d->token);
    d->origin = layout_take(layout, drafts, sizeof *d->origin);
}

static int open_experts(struct engine *self, struct draft *d, struct failure *failure) {
    const struct model_config *c = self->config;
    if (!model_layer_is_moe(c, d->layer))
        return 0;
    d->expert = calloc(c->experts, sizeof *d->expert);
    if (d->expert == NULL)
        return fail(failure, ERR_NO_MEMORY, "experts of the MTP module: no memory for %u",
                    c->experts);
    for (uint32_t e = 0; e < c->experts; e++) {
        const struct weight_view view[3] = {
            model_expert_weight(self->model, d->layer, e, EXPERT_GATE),
            model_expert_weight(self->model, d->layer, e, EXPERT_UP),
            model_expert_weight(self->model, d->layer, e, EXPERT_DOWN),
        };
        int error = mlp_open(&d->expert[e], self->kernels, view, "experts of the MTP module",
                             &self->memory_bytes, failure);
        if (error != 0)
            return error;
    }
    return 0;
}

static int open_weights(struct engine *self, struct draft *d, struct failure *failure) {
    const struct {
        float **ret;
        enum weight which;
    } norms[] = {
        {&d->enorm, W_MTP_ENORM}, {&d->hnorm, W_MTP_HNORM}, {&d->head_norm, W_MTP_HEAD_NORM}};
    int error = 0;
    for (size_t i = 0; i < sizeof norms / sizeof *norms && error == 0; i++) {
        struct weight_view view = model_weight(self->model, norms[i].which, d->layer);
        error = floats_open(norms[i].ret, &view, self->hidden, "norms of the MTP module",
                            &self->memory_bytes, failure);
    }
    struct weight_view eh_proj = model_weight(self->model, W_MTP_EH_PROJ, d->layer);
    struct weight_view head = model_weight(self->model, W_LM_HEAD, 0);
    if (error == 0)
        error = packed_open(&d->eh_proj, self->kernels, &eh_proj, "projection of the MTP module",
                            &self->memory_bytes, failure);
    if (error == 0)
        error = packed_open(&d->head, self->kernels, &head, "LM head of the MTP module",
                            &self->memory_bytes, failure);
    return error == 0 ? open_experts(self, d, failure) : error;
}

int draft_open(struct engine *self, uint32_t steps, struct failure *failure) {
    struct draft *d = calloc(1, sizeof *d);
    if (d == NULL)
        return fail(failure, ERR_NO_MEMORY, "MTP module: no memory");
    self->attention->draft = d;
    d->layer = self->config->layers;
    d->steps = steps;
    d->joined_stride = row_stride(2 * (size_t)self->hidden);
    struct layout layout = {NULL, 0};
    lay_out(self, d, &layout);
    d->memory =
        memory_take(layout.used, 1, "work space of the MTP module", &self->memory_bytes, failure);
    if (d->memory == NULL)
        return ERR_NO_MEMORY;
    layout = (struct layout){d->memory, 0};
    lay_out(self, d, &layout);
    return open_weights(self, d, failure);
}

void draft_close(struct engine *self) {
    struct draft *d = self->attention->draft;
    if (d == NULL)
        return;
    for (uint32_t e = 0; d->expert != NULL && e < self->config->experts; e++)
        mlp_close(&d->expert[e]);
    free(d->expert);
    packed_close(&d->eh_proj);
    packed_close(&d->head);
    memory_free(d->enorm);
    memory_free(d->hnorm);
    memory_free(d->head_norm);
    memory_free(d->memory);
    free(d);
    self->attention->draft = NULL;
}

/* ---- into the module ---- */

/* One half of each row of `joined`: activation(norm(x) * weight), at element `at`. */
static void join_half(struct engine *self, const float *x, const float *weight, uint32_t rows,
                      size_t at) {
    struct draft *d = self->attention->draft;
    const struct kernels *kernels = self->kernels;
    rows_norm(self, x, self->hidden, weight, rows, self->hidden, d->half, self->hidden_stride);
    for (uint32_t r = 0; r < rows; r++)
        memcpy(activation_at(kernels, d->joined, r * d->joined_stride + at),
               activation_at(kernels, d->half, r * self->hidden_stride),
               self->hidden * kernels->activation_bytes);
}

/* The slot's residual rows from hidden rows (activations, hidden_stride apart) and the tokens that
 * follow them. */
static void join(struct engine *self, const void *hidden, uint32_t rows) {
    struct draft *d = self->attention->draft;
    for (uint32_t r = 0; r < rows; r++)
        attention_embedding(self, d->next[r], d->wide + (size_t)r * self->hidden);
    join_half(self, d->wide, d->enorm, rows, 0);
    self->kernels->widen(hidden, self->hidden_stride, rows, self->hidden, d->wide, self->hidden);
    join_half(self, d->wide, d->hnorm, rows, self->hidden);
    self->kernels->matmul(&d->eh_proj.matrix, d->joined, d->joined_stride, rows, d->slot.residual,
                          self->hidden, &self->parallel);
}

/* ---- the block ---- */

static void run_one_expert(struct engine *self, uint32_t expert, uint32_t rows) {
    struct draft *d = self->attention->draft;
    struct attention_slot *slot = &d->slot;
    const uint32_t k = self->attention->gate.k;
    const size_t row_bytes = self->hidden_stride * self->kernels->activation_bytes;
    uint32_t entry[DRAFT_ROWS_MAX], count = 0;
    for (uint32_t i = 0; i < rows * k; i++)
        if (slot->choice[i] == expert) { /* once in a row at most */
            memcpy((uint8_t *)d->gathered + count * row_bytes,
                   (const uint8_t *)slot->normed + i / k * row_bytes, row_bytes);
            entry[count++] = i;
        }
    mlp_run(&d->expert[expert], self->kernels, d->gathered, self->hidden_stride, count,
            &d->expert_work, d->expert_out, self->hidden, &self->parallel);
    for (uint32_t i = 0; i < count; i++)
        memcpy(slot->outputs + (size_t)entry[i] * self->hidden,
               d->expert_out + (size_t)i * self->hidden, self->hidden * sizeof(float));
}

static void run_experts(struct engine *self, uint32_t rows) {
    struct draft *d = self->attention->draft;
    const uint32_t k = self->attention->gate.k;
    uint8_t chosen[EXPERTS_MAX] = {0};
    for (uint32_t i = 0; i < rows * k; i++)
        if (d->slot.choice[i] != GATE_UNUSED)
            chosen[d->slot.choice[i]] = 1;
    for (uint32_t e = 0; e < self->config->experts; e++)
        if (chosen[e])
            run_one_expert(self, e, rows);
}

static void run_mlp(struct engine *self, uint32_t rows) {
    struct attention *a = self->attention;
    struct attention_slot *slot = &a->draft->slot;
    const struct attention_layer *weights = &a->layer[a->draft->layer];
    struct layer_mlp_work work;
    layer_mlp_work_layout(self, &work, a->work);
    if (weights->has_mlp)
        mlp_run(&weights->mlp, self->kernels, slot->normed, self->hidden_stride, rows, &work.mlp,
                slot->shared, self->hidden, &self->parallel);
    if (!weights->moe) {
        rows_add(self, slot->residual, self->hidden, slot->shared, self->hidden, rows,
                 self->hidden);
        return;
    }
    self->kernels->matmul(&weights->gate.matrix, slot->normed, self->hidden_stride, rows,
                          work.logits, self->config->experts, &self->parallel);
    for (uint32_t r = 0; r < rows; r++)
        gate_choose(&a->gate, work.logits + (size_t)r * a->gate.experts, weights->gate_bias,
                    slot->choice + (size_t)r * a->gate.k, slot->weights + (size_t)r * a->gate.k);
    run_experts(self, rows);
    combine_rows(rows, a->gate.k, self->hidden, slot->outputs, self->hidden, slot->weights,
                 slot->choice, weights->has_mlp ? slot->shared : NULL, slot->residual,
                 self->hidden);
}

/* residual -> block -> shared_head.norm -> slot.final */
static int run_block(struct engine *self, uint32_t rows) {
    struct attention *a = self->attention;
    struct attention_slot *slot = &a->draft->slot;
    const struct attention_layer *weights = &a->layer[a->draft->layer];
    slot->rows = rows;
    int error = attention_prepare_rows(self, slot->row, rows);
    if (error != 0)
        return error;
    rows_norm(self, slot->residual, self->hidden, weights->input_norm, rows, self->hidden,
              slot->normed, self->hidden_stride);
    attention_mla(self, slot, a->draft->layer);
    rows_norm(self, slot->residual, self->hidden, weights->post_norm, rows, self->hidden,
              slot->normed, self->hidden_stride);
    run_mlp(self, rows);
    rows_norm(self, slot->residual, self->hidden, a->draft->head_norm, rows, self->hidden,
              slot->final, self->hidden_stride);
    return 0;
}

/* ---- guesses ---- */

/* Guess number `step` of every row of the slot: drawn like the token it stands for. */
static void guess(struct engine *self, const struct program *program, uint32_t step) {
    struct draft *d = self->attention->draft;
    const uint32_t vocabulary = self->config->vocabulary;
    for (uint32_t first = 0; first < d->slot.rows; first += DRAFT_BLOCK) {
        uint32_t rows = d->slot.rows - first < DRAFT_BLOCK ? d->slot.rows - first : DRAFT_BLOCK;
        self->kernels->matmul(
            &d->head.matrix,
            activation_at(self->kernels, d->slot.final, first * self->hidden_stride),
            self->hidden_stride, rows, d->logits, vocabulary, &self->parallel);
        for (uint32_t i = 0; i < rows; i++) {
            uint32_t origin = d->origin[first + i];
            struct sample_spec spec = program->spec[origin];
            struct sample_result result = {0};
            spec.flags = SAMPLE_DRAW;
            spec.counter += step;
            float *logits = d->logits + (size_t)i * vocabulary;
            sample_clean(logits, vocabulary);
            sample_row(&spec, program->words, logits, vocabulary, &d->work, &result, NULL);
            d->token[(size_t)origin * d->steps + step] = result.token;
            d->next[first + i] = result.token;
        }
    }
}

/* Rows that want another guess move together to the front, one position on, with their last output
 * as hidden row in `half`. */
static uint32_t go_on(struct engine *self, const struct draft_row *row, uint32_t step) {
    struct draft *d = self->attention->draft;
    const size_t row_bytes = self->hidden_stride * self->kernels->activation_bytes;
    uint32_t count = 0;
    for (uint32_t r = 0; r < d->slot.rows; r++) {
        uint32_t origin = d->origin[r];
        if (row[origin].steps <= step)
            continue;
        memmove((uint8_t *)d->slot.final + count * row_bytes,
                (const uint8_t *)d->slot.final + r * row_bytes, row_bytes);
        d->slot.row[count] = d->slot.row[r];
        d->slot.row[count].position++;
        d->next[count] = d->next[r];
        d->origin[count++] = origin;
    }
    return count;
}

static int run_drafts(struct engine *self, const struct program *program, uint32_t first) {
    struct draft *d = self->attention->draft;
    const struct draft_row *row = program->draft + first;
    uint32_t rows = program->items - first;
    ASSERT(rows <= DRAFT_ROWS_MAX);
    memmove(d->slot.residual, d->slot.residual + (size_t)first * self->hidden,
            (size_t)rows * self->hidden * sizeof(float));
    memmove(d->slot.row, d->slot.row + first, rows * sizeof *d->slot.row);
    for (uint32_t r = 0; r < rows; r++)
        d->origin[r] = r;
    for (uint32_t step = 0; rows > 0; step++) {
        int error = run_block(self, rows);
        if (error != 0)
            return error;
        guess(self, program, step);
        rows = go_on(self, row, step + 1);
        if (rows > 0)
            join(self, d->slot.final, rows);
    }
    return 0;
}

/* Latent entries of the rows that only remember. */
static void remember(struct engine *self, uint32_t rows) {
    struct attention *a = self->attention;
    struct attention_slot *slot = &a->draft->slot;
    if (rows == 0)
        return;
    slot->rows = rows;
    rows_norm(self, slot->residual, self->hidden, a->layer[a->draft->layer].input_norm, rows,
              self->hidden, slot->normed, self->hidden_stride);
    attention_store(self, slot, a->draft->layer);
}

void draft_run(struct engine *self, const struct program *program, struct program_result *ret) {
    struct draft *d = self->attention->draft;
    const struct attention_slot *from = &self->attention->slot[program->slot];
    const uint32_t hidden = self->hidden;
    ASSERT(d != NULL && program->items <= self->batch_rows);
    uint32_t remembered = 0;
    for (uint32_t i = 0; i < program->items; i++) {
        const struct draft_row *row = &program->draft[i];
        ASSERT(row->row < from->rows && row->next < self->config->vocabulary);
        ASSERT(row->steps <= d->steps && (i == 0 || row[-1].steps == 0 || row->steps > 0));
        remembered += row->steps == 0;
        d->next[i] = row->next;
        d->slot.row[i] = from->row[row->row];
        d->slot.row[i].form = MLA_ABSORBED;
        memcpy(d->wide + (size_t)i * hidden, from->residual + (size_t)row->row * hidden,
               hidden * sizeof(float));
    }
    rows_norm(self, d->wide, hidden, self->attention->final_norm, program->items, hidden,
              d->slot.normed, self->hidden_stride);
    join(self, d->slot.normed, program->items);
    remember(self, remembered);
    ret->error = run_drafts(self, program, remembered);
    ret->words = d->token;
    ret->words_count = (program->items - remembered) * d->steps;
    ret->output = d->logits;
}
