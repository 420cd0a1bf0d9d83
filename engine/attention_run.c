/* The programs of an attention engine (engine/engine.h says what each does). A slot goes EMBED,
 * then for each layer LAYER, in MoE layers SHARED, SCATTER until every chosen expert has answered,
 * COMBINE, and at the end FINISH and DRAFT. */
#include <stdatomic.h>
#include <string.h>

#include "engine/attention.h"
#include "router/combine.h"

size_t layer_mlp_work_layout(const struct engine *self, struct layer_mlp_work *ret, uint8_t *base) {
    const struct model_config *c = self->config;
    uint32_t shared = c->shared_experts * c->expert_width;
    uint32_t width = c->dense_width > shared ? c->dense_width : shared;
    struct layout layout = {base, 0};
    mlp_work_layout(&ret->mlp, &layout, self->kernels, self->batch_rows, width);
    ret->out = layout_take(&layout, (size_t)self->batch_rows * self->hidden, sizeof(float));
    ret->logits = layout_take(&layout, (size_t)self->batch_rows * c->experts, sizeof(float));
    return layout.used;
}

/* Rotations of all positions of a block of PAGE_TOKENS are made together, once. */
static void prepare_rotation(struct attention *a, const struct model_config *c, uint32_t position) {
    uint32_t block = position / PAGE_TOKENS;
    if (a->cos_sin_ready[block])
        return;
    rope_table(&c->rope_parameters, c->rope, block * PAGE_TOKENS, PAGE_TOKENS,
               a->cos_sin + (size_t)block * PAGE_TOKENS * c->rope);
    a->cos_sin_ready[block] = 1;
}

/* Checks the rows against the rules of struct batch_row and counts the page table entries that they
 * need. */
size_t attention_check_rows(struct engine *self, const struct batch_row *row, uint32_t rows) {
    const struct model_config *c = self->config;
    size_t entries = 0;
    for (uint32_t r = 0; r < rows; r++) {
        ASSERT(row[r].token < c->vocabulary);
        ASSERT(row[r].position < c->context);
        ASSERT(row[r].form == MLA_EXPANDED || row[r].form == MLA_ABSORBED);
        bool last = r + 1 == rows || row[r + 1].sequence != row[r].sequence;
        if (!last) {
            ASSERT(row[r + 1].position > row[r].position);
            ASSERT(row[r + 1].pages == row[r].pages && row[r + 1].bias == row[r].bias);
            ASSERT(row[r].form == MLA_EXPANDED || row[r + 1].form == MLA_ABSORBED);
        } else {
            entries += row[r].position / PAGE_TOKENS + 1;
        }
    }
    return entries;
}

void attention_embedding(const struct engine *self, uint32_t token, float *ret) {
    const struct weight_view *view = &self->attention->embedding;
    size_t at = (view->row0 + (size_t)token) * view->stride + view->col0;
    if (view->dtype == DTYPE_F32) {
        memcpy(ret, (const float *)view->data + at, self->hidden * sizeof *ret);
        return;
    }
    ASSERT(view->dtype == DTYPE_BF16);
    const bf16 *x = (const bf16 *)view->data + at;
    for (uint32_t i = 0; i < self->hidden; i++)
        ret[i] = bf16_to_float(x[i]);
}

struct embed_job {
    const struct engine *engine;
    struct attention_slot *slot;
};

static void embed_rows(void *argument, uint32_t first, uint32_t end, int part) {
    const struct embed_job *job = argument;
    (void)part;
    for (uint32_t r = first; r < end; r++)
        attention_embedding(job->engine, job->slot->row[r].token,
                            job->slot->residual + (size_t)r * job->engine->hidden);
}

int attention_prepare_rows(struct engine *self, const struct batch_row *row, uint32_t rows) {
    struct attention *a = self->attention;
    size_t entries = attention_check_rows(self, row, rows);
    struct failure failure;
    int error = memory_grow(&a->page_table, &a->page_table_bytes, entries, sizeof(void *),
                            "page tables of a batch", &self->memory_bytes, &failure);
    for (uint32_t r = 0; r < rows && error == 0; r++) {
        uint32_t page = row[r].pages[row[r].position / PAGE_TOKENS];
        ASSERT(page < a->pages);
        a->page_used[page] = 1;
        if (page >= atomic_load_explicit(&a->pages_reached, memory_order_relaxed))
            atomic_store_explicit(&a->pages_reached, page + 1, memory_order_relaxed);
        prepare_rotation(a, self->config, row[r].position);
    }
    return error;
}

static void run_embed(struct engine *self, struct attention_slot *slot,
                      const struct program *program, struct program_result *ret) {
    ASSERT(program->rows <= self->batch_rows);
    slot->rows = 0;
    ret->error = attention_prepare_rows(self, program->row, program->rows);
    if (ret->error != 0)
        return;
    slot->rows = program->rows;
    slot->final_rows = 0;
    slot->shared_ready = slot->keeps = false;
    memcpy(slot->row, program->row, program->rows * sizeof *slot->row);
    struct embed_job job = {self, slot};
    rows_run(&self->parallel, slot->rows, self->hidden / 4, embed_rows, &job);
}

struct gate_job {
    const struct engine *engine;
    const struct attention_layer *weights;
    struct attention_slot *slot;
    const float *logits;
    uint32_t layer;
};

/* The biases of a row: the model's own and the deltas of the version that its request is pinned to. Made anew for each row, so
 * that what a row gets never depends on the versions beside it. */
static const float *row_bias(const struct gate_job *job, const struct batch_row *row,
                             float made[EXPERTS_MAX]) {
    const float *own = job->weights->gate_bias;
    uint32_t experts = job->engine->attention->gate.experts;
    if (row->bias == NULL)
        return own;
    const float *delta = row->bias + (size_t)job->layer * experts;
    for (uint32_t e = 0; e < experts; e++)
        made[e] = (own != NULL ? own[e] : 0.0f) + delta[e];
    return made;
}

static void gate_rows(void *argument, uint32_t first, uint32_t end, int part) {
    const struct gate_job *job = argument;
    const struct gate_parameters *gate = &job->engine->attention->gate;
    float made[EXPERTS_MAX];
    (void)part;
    for (uint32_t r = first; r < end; r++)
        gate_choose(gate, job->logits + (size_t)r * gate->experts,
                    row_bias(job, &job->slot->row[r], made),
                    job->slot->choice + (size_t)r * gate->k,
                    job->slot->weights + (size_t)r * gate->k);
}

static void run_layer(struct engine *self, struct attention_slot *slot,
                      const struct program *program, struct program_result *ret) {
    struct attention *a = self->attention;
    const struct kernels *kernels = self->kernels;
    ASSERT(program->layer < self->config->layers);
    const struct attention_layer *weights = &a->layer[program->layer];
    rows_norm(self, slot->residual, self->hidden, weights->input_norm, slot->rows, self->hidden,
              slot->normed, self->hidden_stride);
    attention_mla(self, slot, program->layer);
    rows_norm(self, slot->residual, self->hidden, weights->post_norm, slot->rows, self->hidden,
              slot->normed, self->hidden_stride);
    struct layer_mlp_work work;
    layer_mlp_work_layout(self, &work, a->work);
    if (!weights->moe) {
        mlp_run(&weights->mlp, kernels, slot->normed, self->hidden_stride, slot->rows, &work.mlp,
                work.out, self->hidden, &self->parallel);
        rows_add(self, slot->residual, self->hidden, work.out, self->hidden, slot->rows,
                 self->hidden);
        return;
    }
    kernels->matmul(&weights->gate.matrix, slot->normed, self->hidden_stride, slot->rows,
                    work.logits, self->config->experts, &self->parallel);
    struct gate_job job = {self, weights, slot, work.logits, program->layer};
    rows_run(&self->parallel, slot->rows, 4 * (size_t)self->config->experts, gate_rows, &job);
    memset(slot->output, 0, (size_t)slot->rows * a->gate.k * sizeof *slot->output);
    slot->keeps = false;
    slot->shared_ready = !weights->has_mlp;
    ret->choice = slot->choice;
    ret->k = a->gate.k;
}

static void run_shared(struct engine *self, struct attention_slot *slot,
                       const struct program *program) {
    const struct attention_layer *weights = &self->attention->layer[program->layer];
    ASSERT(program->layer < self->config->layers && weights->moe);
    slot->shared_ready = true;
    if (!weights->has_mlp)
        return;
    struct layer_mlp_work work;
    layer_mlp_work_layout(self, &work, self->attention->work);
    mlp_run(&weights->mlp, self->kernels, slot->normed, self->hidden_stride, slot->rows, &work.mlp,
            slot->shared, self->hidden, &self->parallel);
}

/* Outputs stay where they are if the host says that they may, else they are copied. The same output
 * may come twice (a row that was sent again): the bits are the same. */
static void run_scatter(struct engine *self, struct attention_slot *slot,
                        const struct program *program) {
    const uint32_t k = self->attention->gate.k;
    const size_t hidden = self->hidden;
    const float *rows = program->payload;
    for (uint32_t i = 0; i < program->items; i++) {
        ASSERT(program->item_row[i] < slot->rows && program->item_slot[i] < k);
        size_t entry = (size_t)program->item_row[i] * k + program->item_slot[i];
        slot->output[entry] = rows + i * hidden;
        if (!program->stays)
            slot->output[entry] = memcpy(slot->outputs + entry * hidden, rows + i * hidden,
                                         hidden * sizeof *rows);
    }
    slot->keeps = slot->keeps || program->stays;
}

bool attention_keeps(const struct engine *self) {
    const struct attention *a = self->attention;
    for (uint32_t s = 0; s < a->slots; s++)
        if (a->slot[s].keeps)
            return true;
    return false;
}

void attention_take_in(struct engine *self) {
    const size_t hidden = self->hidden, k = self->attention->gate.k;
    for (uint32_t s = 0; s < self->attention->slots; s++) {
        struct attention_slot *slot = &self->attention->slot[s];
        for (size_t entry = 0; slot->keeps && entry < slot->rows * k; entry++) {
            float *own = slot->outputs + entry * hidden;
            if (slot->output[entry] != NULL && slot->output[entry] != own)
                slot->output[entry] = memcpy(own, slot->output[entry], hidden * sizeof *own);
        }
        slot->keeps = false;
    }
}

struct combine_job {
    const struct engine *engine;
    struct attention_slot *slot;
    bool shared;
};

static void combine_some_rows(void *argument, uint32_t first, uint32_t end, int part) {
    const struct combine_job *job = argument;
    struct attention_slot *slot = job->slot;
    const uint32_t k = job->engine->attention->gate.k, hidden = job->engine->hidden;
    (void)part;
    for (size_t entry = (size_t)first * k; entry < (size_t)end * k; entry++)
        ASSERT(slot->output[entry] != NULL || slot->choice[entry] == GATE_UNUSED);
    combine_rows_from(end - first, k, hidden, slot->output + (size_t)first * k,
                      slot->weights + (size_t)first * k, slot->choice + (size_t)first * k,
                      job->shared ? slot->shared + (size_t)first * hidden : NULL, hidden,
                      slot->residual + (size_t)first * hidden, hidden);
}

static void run_combine(struct engine *self, struct attention_slot *slot,
                        const struct program *program) {
    ASSERT(program->layer < self->config->layers && slot->shared_ready);
    struct combine_job job = {self, slot, self->attention->layer[program->layer].has_mlp};
    rows_run(&self->parallel, slot->rows, (size_t)self->attention->gate.k * self->hidden / 8,
             combine_some_rows, &job);
    slot->shared_ready = slot->keeps = false;
}

static void run_finish(struct engine *self, struct attention_slot *slot,
                       const struct program *program) {
    ASSERT(program->items <= self->batch_rows);
    slot->final_rows = program->items;
    for (uint32_t i = 0; i < program->items; i++) {
        ASSERT(program->select[i] < slot->rows);
        self->kernels->rms_norm(slot->residual + (size_t)program->select[i] * self->hidden,
                                self->hidden, self->attention->final_norm, self->config->norm_eps,
                                1, self->hidden,
                                activation_at(self->kernels, slot->final, i * self->hidden_stride),
                                self->hidden_stride);
    }
}

static size_t cache_page_bytes(const struct engine *self) {
    const struct attention *a = self->attention;
    return (size_t)a->cache_layers * PAGE_TOKENS * a->absorbed_stride *
           self->kernels->activation_bytes;
}

size_t attention_cache_wanted(const struct engine *self, size_t ahead_bytes) {
    const struct attention *a = self->attention;
    const size_t page_bytes = cache_page_bytes(self), all = a->pages * page_bytes;
    const size_t used =
        atomic_load_explicit(&a->pages_reached, memory_order_relaxed) * page_bytes;
    const size_t end = all - used < ahead_bytes ? all : used + ahead_bytes;
    const size_t given = atomic_load_explicit(&a->cache_given, memory_order_relaxed);
    return given < end ? end - given : 0;
}

size_t attention_cache_ahead(struct engine *self, size_t ahead_bytes, void **ret) {
    struct attention *a = self->attention;
    const size_t piece = (size_t)2 << 20, wanted = attention_cache_wanted(self, ahead_bytes);
    const size_t given = atomic_load_explicit(&a->cache_given, memory_order_relaxed);
    *ret = a->cache + given;
    const size_t to_border = piece - (uintptr_t)*ret % piece; /* a huge page at a time */
    const size_t bytes = wanted < to_border ? wanted : to_border;
    atomic_store_explicit(&a->cache_given, given + bytes, memory_order_relaxed);
    return bytes;
}

/* A page that was never written since it was last cleared is zero: it is left alone, so that fresh
 * memory stays untouched. */
static void run_clear_pages(struct engine *self, const struct program *program) {
    struct attention *a = self->attention;
    const size_t page_bytes = cache_page_bytes(self);
    for (uint32_t i = 0; i < program->items; i++) {
        ASSERT(program->select[i] < a->pages);
        if (a->page_used[program->select[i]])
            memset(cache_at(self, program->select[i], 0), 0, page_bytes);
        a->page_used[program->select[i]] = 0;
    }
}

void attention_run(struct engine *self, const struct program *program, struct program_result *ret) {
    if (self->attention->resident != NULL) {
        attention_resident_run(self, program, ret);
        return;
    }
    if (program->kind == PROGRAM_CLEAR_PAGES) {
        run_clear_pages(self, program);
        return;
    }
    ASSERT(program->slot < self->attention->slots);
    struct attention_slot *slot = &self->attention->slot[program->slot];
    switch (program->kind) {
    case PROGRAM_EMBED:
        run_embed(self, slot, program, ret);
        break;
    case PROGRAM_LAYER:
        run_layer(self, slot, program, ret);
        break;
    case PROGRAM_SHARED:
        run_shared(self, slot, program);
        break;
    case PROGRAM_SCATTER:
        run_scatter(self, slot, program);
        break;
    case PROGRAM_COMBINE:
        run_combine(self, slot, program);
        break;
    case PROGRAM_FINISH:
        run_finish(self, slot, program);
        break;
    case PROGRAM_DRAFT:
        draft_run(self, program, ret);
        break;
    default:
        ASSERT(!"a program of another role");
    }
    ret->rows = slot->rows;
}

const void *attention_region(const struct engine *self, enum region region, uint32_t slot,
                             uint32_t *ret_rows) {
    ASSERT(slot < self->attention->slots);
    const struct attention_slot *s = &self->attention->slot[slot];
    *ret_rows = region == REGION_FINAL ? s->final_rows : s->rows;
    return region == REGION_FINAL ? s->final : s->normed;
}
