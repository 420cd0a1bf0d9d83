/* Multi-head latent attention of one layer over a batch: latent queries and keys, the cache, then
 * both forms (DeepSeek-V2, 2405.04434, section 2.1). The rows of a batch are cut by form and, in
 * the expanded form, by sequence; what comes out for a row depends on its own token, position and
 * cache only, so no cut can change it.
 *
 * Vectors are put together in float with their padding in place, then rounded as a whole: an
 * operation of kernels/ may write zeros up to its stride and must not do so over a neighbour. */
#include <string.h>

#include "engine/attention.h"

static uint32_t min_u32(uint32_t a, uint32_t b) {
    return a < b ? a : b;
}

size_t mla_work_layout(const struct engine *self, struct mla_work *ret, uint8_t *base) {
    const struct model_config *c = self->config;
    const struct attention *a = self->attention;
    const size_t n = self->batch_rows, b = min_u32(self->batch_rows, ABSORBED_BLOCK);
    const size_t heads = c->heads, activation = self->kernels->activation_bytes;
    struct layout layout = {base, 0};
    ret->q_low = layout_take(&layout, n * sums_stride(c->q_lora), sizeof(float));
    ret->q_low_norm = layout_take(&layout, n * row_stride(c->q_lora), activation);
    ret->q = layout_take(&layout, n * heads * (c->nope + c->rope), sizeof(float));
    ret->kv = layout_take(&layout, n * (c->kv_lora + c->rope), sizeof(float));
    ret->q_expanded = layout_take(&layout, n * heads * a->expanded_stride, activation);
    ret->attended = layout_take(&layout, n * a->attended_stride, activation);
    ret->projected = layout_take(&layout, n * self->hidden, sizeof(float));
    ret->part_row = layout_take(&layout, (size_t)self->parallel.width * a->expanded_stride * heads,
                                sizeof(float));
    ret->q_nope = layout_take(&layout, b * heads * activation_stride(c->nope), activation);
    ret->q_wide = layout_take(&layout, b * heads * a->absorbed_stride, sizeof(float));
    ret->q_absorbed = layout_take(&layout, b * heads * a->absorbed_stride, activation);
    ret->latent = layout_take(&layout, b * heads * activation_stride(c->kv_lora), activation);
    ret->values = layout_take(&layout, b * heads * c->v, sizeof(float));
    ret->absorbed_row = layout_take(&layout, n, sizeof *ret->absorbed_row);
    ret->position = layout_take(&layout, n, sizeof *ret->position);
    ret->cos_sin = layout_take(&layout, n, sizeof *ret->cos_sin);
    ret->pages = layout_take(&layout, n, sizeof *ret->pages);
    ret->block_position = layout_take(&layout, b, sizeof *ret->block_position);
    ret->block_pages = layout_take(&layout, b, sizeof *ret->block_pages);
    return layout.used;
}

/* What the tasks over rows and heads share. */
struct mla_job {
    struct engine *engine;
    const struct attention_slot *slot;
    const struct attention_layer *weights;
    struct mla_work *work;
    uint32_t layer;
    uint32_t block_first, block_rows; /* absorbed form: rows of work->absorbed_row */
    bool queries_made;                /* q_expanded came with the product */
};

/* A thread's own row of queries: [heads, expanded_stride] floats. */
static float *part_row(const struct mla_job *job, int part) {
    const struct engine *self = job->engine;
    return job->work->part_row +
           (size_t)part * self->config->heads * self->attention->expanded_stride;
}

uint8_t *cache_at(const struct engine *self, uint32_t page, uint32_t layer) {
    const struct attention *a = self->attention;
    ASSERT(page < a->pages);
    size_t layer_bytes = PAGE_TOKENS * a->absorbed_stride * self->kernels->activation_bytes;
    return a->cache + ((size_t)page * a->cache_layers + layer) * layer_bytes;
}

/* One position's rotation of `count` vectors, `from_stride` apart as the projection left them. */
static void rotate(const struct engine *self, const float *from, size_t from_stride, float *to,
                   size_t to_stride, uint32_t count, uint32_t position) {
    const uint32_t rope = self->config->rope;
    for (uint32_t v = 0; v < count; v++)
        memcpy(to + v * to_stride, from + v * from_stride, rope * sizeof *to);
    self->kernels->rope(to, to_stride, count, rope,
                        self->attention->cos_sin + (size_t)position * rope);
}

/* Page tables of the batch for one layer: consecutive rows of a sequence share one. */
static void fill_page_tables(struct mla_job *job) {
    const struct attention_slot *slot = job->slot;
    const void **table = job->engine->attention->page_table;
    for (uint32_t first = 0; first < slot->rows;) {
        const uint32_t *numbers = slot->row[first].pages;
        uint32_t end = first;
        for (; end < slot->rows && slot->row[end].sequence == slot->row[first].sequence; end++) {
            job->work->pages[end] = table;
            job->work->position[end] = slot->row[end].position;
        }
        uint32_t pages = slot->row[end - 1].position / PAGE_TOKENS + 1;
        for (uint32_t p = 0; p < pages; p++)
            *table++ = cache_at(job->engine, numbers[p], job->layer);
        first = end;
    }
}

/* Latent (normed) and rotated key of each row into the cache, before anything attends to them. */
static void store_rows(void *argument, uint32_t first, uint32_t end, int part) {
    const struct mla_job *job = argument;
    const struct engine *self = job->engine;
    const struct model_config *c = self->config;
    const struct kernels *kernels = self->kernels;
    const size_t latent_stride = activation_stride(c->kv_lora),
                 key_stride = activation_stride(c->rope);
    float *key = part_row(job, part);
    memset(key, 0, key_stride * sizeof *key);
    for (uint32_t r = first; r < end; r++) {
        const struct batch_row *row = &job->slot->row[r];
        const float *kv = job->work->kv + (size_t)r * (c->kv_lora + c->rope);
        uint8_t *page = cache_at(self, row->pages[row->position / PAGE_TOKENS], job->layer);
        void *latent = activation_at(
            kernels, page, row->position % PAGE_TOKENS * self->attention->absorbed_stride);
        kernels->rms_norm(kv, c->kv_lora, job->weights->kv_a_norm, c->norm_eps, 1, c->kv_lora,
                          latent, latent_stride);
        if (self->attention->shape.latent_e4m3)
            latent_round(latent, c->kv_lora);
        rotate(self, kv + c->kv_lora, c->rope, key, key_stride, 1, row->position);
        kernels->convert(key, key_stride, 1, (uint32_t)key_stride,
                         activation_at(kernels, latent, latent_stride), key_stride);
    }
}

/* Queries of the expanded form: [heads, nope | rope], rounded, for all prompt rows of first..end-1.
 */
static void expanded_query_rows(void *argument, uint32_t first, uint32_t end, int part) {
    const struct mla_job *job = argument;
    const struct engine *self = job->engine;
    const struct model_config *c = self->config;
    const size_t stride = self->attention->expanded_stride, row_width = c->heads * stride;
    const uint32_t head_width = c->nope + c->rope;
    float *query = part_row(job, part);
    memset(query, 0, row_width * sizeof *query);
    for (uint32_t r = first; r < end; r++) {
        const struct batch_row *row = &job->slot->row[r];
        if (row->form != MLA_EXPANDED)
            continue;
        const float *q = job->work->q + (size_t)r * c->heads * head_width;
        for (uint32_t h = 0; h < c->heads; h++)
            memcpy(query + h * stride, q + h * head_width, c->nope * sizeof *query);
        rotate(self, q + c->nope, head_width, query + activation_stride(c->nope), stride, c->heads,
               row->position);
        self->kernels->convert(query, row_width, 1, (uint32_t)row_width,
                               activation_at(self->kernels, job->work->q_expanded, r * row_width),
                               row_width);
    }
}

/* One call per run of prompt rows of one sequence. */
static void run_expanded(struct mla_job *job) {
    struct engine *self = job->engine;
    const struct attention *a = self->attention;
    const struct attention_slot *slot = job->slot;
    struct mla_work *work = job->work;
    if (!job->queries_made)
        rows_run(&self->parallel, slot->rows, self->config->heads * a->expanded_stride / 4,
                 expanded_query_rows, job);
    for (uint32_t first = 0; first < slot->rows;) {
        uint32_t end = first + 1;
        if (slot->row[first].form != MLA_EXPANDED) {
            first = end;
            continue;
        }
        while (end < slot->rows && slot->row[end].form == MLA_EXPANDED &&
               slot->row[end].sequence == slot->row[first].sequence)
            end++;
        const struct mla_rows rows = {end - first, work->position + first, work->pages + first};
        self->kernels->mla_expanded(
            &a->shape, &rows, &job->weights->kv_b.matrix,
            activation_at(self->kernels, work->q_expanded,
                          (size_t)first * self->config->heads * a->expanded_stride),
            a->expanded_stride,
            activation_at(self->kernels, work->attended, first * a->attended_stride),
            a->attended_stride, &self->parallel);
        first = end;
    }
}

/* Absorbed form, rows of a block: the nope part rounded for W_UK, the rope part rotated into its
 * place behind the latent query. */
static void absorbed_query_rows(void *argument, uint32_t first, uint32_t end, int part) {
    const struct mla_job *job = argument;
    const struct engine *self = job->engine;
    const struct model_config *c = self->config;
    const size_t nope_stride = activation_stride(c->nope),
                 stride = self->attention->absorbed_stride;
    const size_t latent_stride = activation_stride(c->kv_lora), nope_width = c->heads * nope_stride;
    const uint32_t head_width = c->nope + c->rope;
    float *nope = part_row(job, part);
    memset(nope, 0, nope_width * sizeof *nope);
    for (uint32_t i = first; i < end; i++) {
        uint32_t r = job->work->absorbed_row[job->block_first + i];
        const float *q = job->work->q + (size_t)r * c->heads * head_width;
        float *wide = job->work->q_wide + (size_t)i * c->heads * stride;
        for (uint32_t h = 0; h < c->heads; h++)
            memcpy(nope + h * nope_stride, q + h * head_width, c->nope * sizeof *nope);
        self->kernels->convert(nope, nope_width, 1, (uint32_t)nope_width,
                               activation_at(self->kernels, job->work->q_nope, i * nope_width),
                               nope_width);
        memset(wide, 0, c->heads * stride * sizeof *wide);
        rotate(self, q + c->nope, head_width, wide + latent_stride, stride, c->heads,
               job->slot->row[r].position);
    }
}

/* Heads are the parallel direction of the many small products; inside one, threads would only wait
 * for each other. */
static void absorb_key_heads(void *argument, uint32_t first, uint32_t end, int part) {
    const struct mla_job *job = argument;
    const struct engine *self = job->engine;
    const size_t heads = self->config->heads, stride = self->attention->absorbed_stride;
    const size_t nope_stride = activation_stride(self->config->nope);
    (void)part;
    for (uint32_t h = first; h < end; h++)
        self->kernels->matmul_latent(
            &job->weights->w_uk[h].matrix,
            activation_at(self->kernels, job->work->q_nope, h * nope_stride), heads * nope_stride,
            job->block_rows, job->work->q_wide + h * stride, heads * stride, &PARALLEL_SERIAL);
}

static void absorb_value_heads(void *argument, uint32_t first, uint32_t end, int part) {
    const struct mla_job *job = argument;
    const struct engine *self = job->engine;
    const size_t heads = self->config->heads, v = self->config->v;
    const size_t latent_stride = activation_stride(self->config->kv_lora);
    (void)part;
    for (uint32_t h = first; h < end; h++)
        self->kernels->matmul_latent(
            &job->weights->w_uv[h].matrix,
            activation_at(self->kernels, job->work->latent, h * latent_stride),
            heads * latent_stride, job->block_rows, job->work->values + h * v, heads * v,
            &PARALLEL_SERIAL);
}

/* q_wide, whole with its padding, to activations. */
static void convert_query_rows(void *argument, uint32_t first, uint32_t end, int part) {
    const struct mla_job *job = argument;
    const struct engine *self = job->engine;
    const size_t width = self->config->heads * self->attention->absorbed_stride;
    (void)part;
    self->kernels->convert(job->work->q_wide + first * width, width, end - first, (uint32_t)width,
                           activation_at(self->kernels, job->work->q_absorbed, first * width),
                           width);
}

static void run_absorbed_block(struct mla_job *job) {
    struct engine *self = job->engine;
    const struct model_config *c = self->config;
    const struct attention *a = self->attention;
    struct mla_work *work = job->work;
    const struct parallel *parallel = &self->parallel;
    const size_t row_work = c->heads * a->absorbed_stride / 8;
    const size_t key_work = (size_t)job->block_rows * c->kv_lora * c->nope / 16;
    const size_t value_work = (size_t)job->block_rows * c->kv_lora * c->v / 16;
    for (uint32_t i = 0; i < job->block_rows; i++) {
        uint32_t r = work->absorbed_row[job->block_first + i];
        work->block_position[i] = work->position[r];
        work->block_pages[i] = work->pages[r];
    }
    rows_run(parallel, job->block_rows, row_work, absorbed_query_rows, job);
    rows_run(parallel, c->heads, key_work, absorb_key_heads, job);
    rows_run(parallel, job->block_rows, row_work, convert_query_rows, job);
    const struct mla_rows rows = {job->block_rows, work->block_position, work->block_pages};
    const size_t latent_stride = activation_stride(c->kv_lora);
    self->kernels->mla_absorbed(&a->shape, &rows, work->q_absorbed, a->absorbed_stride,
                                work->latent, latent_stride, parallel);
    rows_run(parallel, c->heads, value_work, absorb_value_heads, job);
    const uint32_t width = c->heads * c->v;
    for (uint32_t i = 0; i < job->block_rows; i++) {
        uint32_t r = work->absorbed_row[job->block_first + i];
        self->kernels->convert(work->values + (size_t)i * width, width, 1, width,
                               activation_at(self->kernels, work->attended, r * a->attended_stride),
                               a->attended_stride);
    }
}

/* Rows of all sequences together, a block at a time. */
static void run_absorbed(struct mla_job *job) {
    uint32_t count = 0;
    for (uint32_t r = 0; r < job->slot->rows; r++)
        if (job->slot->row[r].form == MLA_ABSORBED)
            job->work->absorbed_row[count++] = r;
    for (uint32_t first = 0; first < count; first += ABSORBED_BLOCK) {
        job->block_first = first;
        job->block_rows = min_u32(count - first, ABSORBED_BLOCK);
        run_absorbed_block(job);
    }
}

/* W_Q x, or W_QB x: queries of the expanded form as attention wants them where the kernels make
 * them so. */
static void make_queries(struct mla_job *job, const void *x, size_t x_stride) {
    const struct engine *self = job->engine;
    const struct model_config *c = self->config;
    const struct attention *a = self->attention;
    const struct attention_slot *slot = job->slot;
    struct mla_work *work = job->work;
    const struct matrix *w = &job->weights->q_b.matrix;
    const size_t q_width = (size_t)c->heads * (c->nope + c->rope);
    bool any = false;
    for (uint32_t r = 0; r < slot->rows; r++) {
        const bool expanded = slot->row[r].form == MLA_EXPANDED;
        work->cos_sin[r] = expanded ? a->cos_sin + (size_t)slot->row[r].position * c->rope : NULL;
        any = any || expanded;
    }
    job->queries_made = any && self->kernels->mla_queries != NULL && slot->rows >= MANY_ROWS &&
                        c->nope % 32 == 0 && c->rope % 32 == 0;
    if (job->queries_made)
        self->kernels->mla_queries(&a->shape, w, x, x_stride, slot->rows, work->cos_sin, work->q,
                                   q_width, work->q_expanded, a->expanded_stride, &self->parallel);
    else
        self->kernels->matmul(w, x, x_stride, slot->rows, work->q, q_width, &self->parallel);
}

static void project_queries(struct mla_job *job) {
    const struct engine *self = job->engine;
    const struct attention_layer *weights = job->weights;
    const struct attention_slot *slot = job->slot;
    struct mla_work *work = job->work;
    const struct model_config *c = self->config;
    const struct kernels *kernels = self->kernels;
    if (c->q_lora == 0) {
        make_queries(job, slot->normed, self->hidden_stride);
        return;
    }
    const size_t low_stride = sums_stride(c->q_lora), norm_stride = row_stride(c->q_lora);
    kernels->matmul(&weights->q_a.matrix, slot->normed, self->hidden_stride, slot->rows,
                    work->q_low, low_stride, &self->parallel);
    rows_norm(self, work->q_low, low_stride, weights->q_a_norm, slot->rows, c->q_lora,
              work->q_low_norm, norm_stride);
    make_queries(job, work->q_low_norm, norm_stride);
}

/* residual += W_O attended. */
static void project_output(const struct mla_job *job) {
    const struct engine *self = job->engine;
    const struct matrix *w = &job->weights->o.matrix;
    const struct attention_slot *slot = job->slot;
    const struct mla_work *work = job->work;
    const size_t stride = self->attention->attended_stride;
    if (self->kernels->matmul_add != NULL && slot->rows >= MANY_ROWS) {
        self->kernels->matmul_add(w, work->attended, stride, slot->rows, slot->residual,
                                  self->hidden, &self->parallel);
        return;
    }
    self->kernels->matmul(w, work->attended, stride, slot->rows, work->projected, self->hidden,
                          &self->parallel);
    rows_add(self, slot->residual, self->hidden, work->projected, self->hidden, slot->rows,
             self->hidden);
}

void attention_store(struct engine *self, struct attention_slot *slot, uint32_t layer) {
    const struct model_config *c = self->config;
    const struct attention_layer *weights = &self->attention->layer[layer];
    struct mla_work work;
    mla_work_layout(self, &work, self->attention->work);
    struct mla_job job = {self, slot, weights, &work, layer, 0, 0, false};
    self->kernels->matmul(&weights->kv_a.matrix, slot->normed, self->hidden_stride, slot->rows,
                          work.kv, c->kv_lora + c->rope, &self->parallel);
    rows_run(&self->parallel, slot->rows, (c->kv_lora + c->rope) / 2, store_rows, &job);
}

void attention_mla(struct engine *self, struct attention_slot *slot, uint32_t layer) {
    const struct model_config *c = self->config;
    const struct kernels *kernels = self->kernels;
    struct attention *a = self->attention;
    const struct attention_layer *weights = &a->layer[layer];
    struct mla_work work;
    mla_work_layout(self, &work, a->work);
    struct mla_job job = {self, slot, weights, &work, layer, 0, 0, false};
    fill_page_tables(&job);
    project_queries(&job);
    kernels->matmul(&weights->kv_a.matrix, slot->normed, self->hidden_stride, slot->rows, work.kv,
                    c->kv_lora + c->rope, &self->parallel);
    rows_run(&self->parallel, slot->rows, (c->kv_lora + c->rope) / 2, store_rows, &job);
    run_expanded(&job);
    run_absorbed(&job);
    project_output(&job);
}
