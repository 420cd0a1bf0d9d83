/* Attention's part of the resident step, enqueued on its stream: one layer of one micro-batch from
 * the residual row to what is asked of the experts, and from their answers to the residual row. The
 * order of operations, and so every bit, is that of engine/attention_mla.c and
 * engine/attention_run.c. */
#include "engine/cuda/step_internal.h"
#include "kernels/e4m3_row.h"
#include "kernels/latent.h"

struct micro_tables step_micro_tables(const struct step *self, uint32_t micro) {
    const uint32_t rows = self->now->rows, stride = self->now->splits * MLA_SPLIT_CUDA;
    const uint32_t *own =
        self->tables.device + 1 + STEP_MICRO_MAX + (size_t)micro * rows * (3 + stride);
    return (struct micro_tables){.live = self->tables.device + 1 + micro,
                                 .token = own,
                                 .position = own + rows,
                                 .delta_of = own + 2 * rows,
                                 .pages = own + 3 * rows,
                                 .pages_stride = stride};
}

void step_embed(struct step *self, uint32_t micro) {
    const struct step_model *m = self->model;
    const struct micro_tables tables = step_micro_tables(self, micro);
    did(self,
        embed_cuda(self->stream, m->embedding, m->embedding_stride, m->vocabulary, tables.token,
                   self->now->rows, m->hidden, self->micro[micro].residual, m->hidden));
}

static void queries(struct step *self, const struct step_layer *layer) {
    struct step_attention *work = &self->work;
    const struct step_model *m = self->model;
    const uint32_t rows = self->now->rows;
    const size_t width = (size_t)m->heads * (m->nope + m->rope);
    if (layer->q_a.n == 0) {
        step_product(self, &layer->q_b, work->normed, self->hidden_stride, rows, work->q, width);
        step_product(self, &layer->kv_a, work->normed, self->hidden_stride, rows, work->kv,
                     m->kv_lora + m->rope);
        return;
    }
    const uint32_t low = layer->q_a.n;
    step_product(self, &layer->q_a, work->normed, self->hidden_stride, rows, work->q_low, low);
    step_product(self, &layer->kv_a, work->normed, self->hidden_stride, rows, work->kv,
                 m->kv_lora + m->rope);
    did(self, rms_norm_cuda(self->stream, work->q_low, low, layer->q_a_norm, m->norm_eps, rows, low,
                            work->q_low_norm, activation_stride(low)));
    work->quantised_of = NULL;
    step_product(self, &layer->q_b, work->q_low_norm, activation_stride(low), rows, work->q, width);
}

/* The kernel's description of queries and cache of one layer: made once for each recording. */
static struct mla_absorbed_cuda *mla_plan(struct step *self, const void *cache,
                                          const struct micro_tables *tables) {
    const struct step_model *m = self->model;
    struct step_recording *now = self->now;
    struct mla_absorbed_cuda *plan = &now->mla[self->next_mla];
    if (self->next_mla++ < now->mlas)
        return plan;
    const struct mla_absorbed_args args = {.heads = m->heads,
                                           .kv_lora = m->kv_lora,
                                           .rope = m->rope,
                                           .scale = m->softmax_scale,
                                           .position = tables->position,
                                           .pages = tables->pages,
                                           .pages_stride = tables->pages_stride,
                                           .splits = now->splits,
                                           .work = self->work.mla_work};
    if (self->options.cache == CACHE_E4M3)
        did(self, mla_absorbed_plan_e4m3_cuda(plan, self->work.query, self->cache_stride, now->rows,
                                              cache, self->options.pages + 1, &args));
    else
        did(self,
            mla_absorbed_plan_cuda(plan, self->work.query, self->cache_stride, now->rows, cache,
                                   self->cache_stride, self->options.pages + 1, &args));
    now->mlas++;
    return plan;
}

/* Generated tokens: queries go to the latents (DeepSeek-V2, 2405.04434, section 2.1.2). */
static void absorbed(struct step *self, const struct step_layer *layer, const void *cache,
                     const struct micro_tables *tables, const struct mla_rows_cuda *args) {
    struct step_attention *work = &self->work;
    const struct step_model *m = self->model;
    const uint32_t rows = self->now->rows, nope = (uint32_t)activation_stride(m->nope);
    const uint32_t latent = (uint32_t)activation_stride(m->kv_lora), width = m->heads * m->v;
    did(self, mla_query_cuda(self->stream, args, work->q, (size_t)m->heads * (m->nope + m->rope),
                             rows, work->q_nope, nope, work->query + latent, self->cache_stride));
    step_product_heads(self, &layer->w_uk, work->q_nope, nope, rows, work->q_latent, m->kv_lora);
    did(self, convert_cuda(self->stream, work->q_latent, m->kv_lora, rows * m->heads, m->kv_lora,
                           work->query, self->cache_stride));
    did(self,
        mla_absorbed_cuda(self->stream, mla_plan(self, cache, tables), rows, work->latent, latent));
    step_product_heads(self, &layer->w_uv, work->latent, latent, rows, work->values, m->v);
    did(self, convert_cuda(self->stream, work->values, width, rows, width, work->attended,
                           activation_stride(width)));
}

/* The latents of all positions that a prompt's last row sees, one after the other, as BF16. */
static void gather(struct step *self, const uint8_t *cache, const uint32_t *pages) {
    const struct step_model *m = self->model;
    const struct step_recording *now = self->now;
    uint8_t *to = (uint8_t *)self->work.seen;
    if (self->options.cache == CACHE_E4M3) {
        did(self, latent_widen_cuda(self->stream, cache, m->kv_lora, m->rope, pages, now->positions,
                                    self->work.seen, self->cache_stride));
        return;
    }
    for (uint32_t p = 0; p * PAGE_TOKENS < now->positions; p++)
        did(self,
            stream_copy_cuda(self->stream, to + p * self->page_bytes,
                             cache + now->prompt_pages[p] * self->page_bytes, self->page_bytes));
}

/* Prompt tokens: keys and values of all positions come to the queries. */
static void expanded(struct step *self, const struct step_layer *layer, const uint8_t *cache,
                     const struct micro_tables *tables, const struct mla_rows_cuda *args) {
    struct step_attention *work = &self->work;
    const struct step_model *m = self->model;
    const struct step_recording *now = self->now;
    const size_t nope = activation_stride(m->nope), stride = nope + activation_stride(m->rope);
    const uint32_t *pages = tables->pages + (now->rows - 1) * (size_t)tables->pages_stride;
    const size_t key_at = self->options.cache == CACHE_E4M3
                              ? latent_rope_at(m->kv_lora) / sizeof(bf16)
                              : activation_stride(m->kv_lora);
    const struct mla_expanded_args own = {.rows = now->rows,
                                          .heads = m->heads,
                                          .nope = m->nope,
                                          .rope = m->rope,
                                          .v = m->v,
                                          .q_stride = (uint32_t)stride,
                                          .scale = m->softmax_scale,
                                          .position = tables->position};
    did(self, mla_query_cuda(self->stream, args, work->q, (size_t)m->heads * (m->nope + m->rope),
                             now->rows, work->expanded, stride, work->expanded + nope, stride));
    gather(self, cache, pages);
    step_product(self, &layer->kv_b, work->seen, self->cache_stride, now->positions, work->seen_kv,
                 layer->kv_b.n);
    did(self, mla_expand_cuda(self->stream, &own, work->seen_kv, layer->kv_b.n, (const bf16 *)cache,
                              self->page_bytes / PAGE_TOKENS / sizeof(bf16), (uint32_t)key_at,
                              pages, now->positions, work->key, work->value));
    did(self, mla_expanded_cuda(self->stream, &own, work->expanded, work->key, work->value,
                                now->positions, work->attended,
                                activation_stride((size_t)m->heads * m->v)));
}

/* Latents and rotated keys of all rows into the cache. */
static void append(struct step *self, const struct step_layer *layer, uint8_t *cache,
                   const struct micro_tables *tables) {
    const struct step_model *m = self->model;
    const size_t width = m->kv_lora + m->rope;
    const struct latent_append_cuda args = {.rows = self->now->rows,
                                            .kv_lora = m->kv_lora,
                                            .rope = m->rope,
                                            .latent = self->work.kv,
                                            .latent_stride = width,
                                            .norm = layer->kv_a_norm,
                                            .eps = m->norm_eps,
                                            .key = self->work.kv + m->kv_lora,
                                            .key_stride = width,
                                            .cos_sin = m->cos_sin,
                                            .position = tables->position,
                                            .pages = tables->pages,
                                            .pages_stride = tables->pages_stride,
                                            .cache = cache};
    did(self, latent_append_cuda(self->stream, self->options.cache == CACHE_E4M3, &args));
}

/* Latents into the cache, then everything that attends to them. */
static void attend(struct step *self, uint32_t l, uint32_t micro) {
    struct step_attention *work = &self->work;
    const struct step_model *m = self->model;
    const struct step_layer *layer = &m->layer[l];
    const struct micro_tables tables = step_micro_tables(self, micro);
    const uint32_t rows = self->now->rows;
    uint8_t *cache = self->latents + l * self->layer_bytes;
    const struct mla_rows_cuda args = {.heads = m->heads,
                                       .nope = m->nope,
                                       .rope = m->rope,
                                       .cos_sin = m->cos_sin,
                                       .position = tables.position};
    queries(self, layer);
    append(self, layer, cache, &tables);
    if (self->now->prompt_pages != NULL)
        expanded(self, layer, cache, &tables, &args);
    else
        absorbed(self, layer, cache, &tables, &args);
    const uint32_t width = m->heads * m->v;
    work->quantised_of = NULL;
    step_product(self, &layer->o, work->attended, activation_stride(width), rows, work->projected,
                 m->hidden);
}

static struct exchange_cuda exchange(const struct step *self, uint32_t l) {
    const uint32_t rows = self->now->rows, k = self->model->gate.k;
    return (struct exchange_cuda){.rows = rows,
                                  .k = k,
                                  .destinations = self->options.groups,
                                  .rows_max = rows,
                                  .items_max = rows * k,
                                  .ticket = self->tables.device,
                                  .layer = l};
}

size_t step_row_bytes(const struct step *self) {
    return self->options.dispatch == DISPATCH_E4M3 ? e4m3_row_bytes(self->model->hidden)
                                                   : self->hidden_stride * sizeof(bf16);
}

struct edge_frame step_frame(const struct step *self, uint32_t micro, uint32_t group) {
    const struct step_micro *own = &self->micro[micro];
    const uint32_t rows = self->now->rows, items = rows * self->model->gate.k;
    const size_t note = exchange_note_bytes(rows, self->model->gate.k);
    const size_t row_bytes = step_row_bytes(self);
    return (struct edge_frame){.note = own->notes + group * note,
                               .rows = own->rows + (size_t)group * rows * row_bytes,
                               .status = own->status + (size_t)group * items,
                               .output = own->output + (size_t)group * items * self->model->hidden,
                               .note_bytes = note,
                               .rows_bytes = rows * row_bytes,
                               .status_bytes = items * sizeof(uint32_t),
                               .output_bytes = (size_t)items * self->model->hidden * sizeof(float)};
}

static uint16_t *choice_of(struct step *self, uint32_t l, uint32_t micro) {
    return self->micro[micro].choice +
           (size_t)step_moe_index(self, l) * self->now->rows * self->model->gate.k;
}

/* The rows of each group's frame, in the form in which they travel. */
static void pack(struct step *self, struct step_micro *own, uint32_t rows) {
    const uint32_t groups = self->options.groups, row_bytes = (uint32_t)step_row_bytes(self);
    const bf16 *normed = self->work.normed;
    if (self->options.dispatch == DISPATCH_E4M3)
        did(self,
            pack_e4m3_cuda(self->stream, normed, self->hidden_stride, self->model->hidden, 1,
                           own->sent, own->sent + groups, groups, rows, own->rows, row_bytes));
    else
        did(self, pack_cuda(self->stream, normed, row_bytes, row_bytes, 1, own->sent,
                            own->sent + groups, groups, rows, own->rows, row_bytes));
}

/* The gate's choice, and what is asked of each group. */
static void ask(struct step *self, uint32_t l, uint32_t micro) {
    struct step_micro *own = &self->micro[micro];
    struct step_attention *work = &self->work;
    const struct step_model *m = self->model;
    const struct step_layer *layer = &m->layer[l];
    const struct micro_tables tables = step_micro_tables(self, micro);
    const uint32_t rows = self->now->rows, experts = m->gate.experts;
    const struct gate_rows_cuda per_row = {.live = tables.live,
                                           .delta = self->deltas + (size_t)l * experts,
                                           .delta_stride = (size_t)m->layers * experts,
                                           .delta_of = tables.delta_of};
    const struct exchange_cuda x = exchange(self, l);
    uint16_t *choice = choice_of(self, l, micro);
    step_product(self, &layer->gate, work->normed, self->hidden_stride, rows, work->gate_logits,
                 experts);
    did(self, gate_rows_cuda(self->stream, &m->gate, &per_row, work->gate_logits, experts,
                             layer->gate_bias, rows, choice, own->weights));
    did(self,
        exchange_route_cuda(self->stream, &x, choice, self->group_of + (size_t)l * experts, experts,
                            own->notes, own->sent, own->sent + self->options.groups, own->place));
    pack(self, own, rows);
    for (uint32_t g = 0; g < self->options.groups; g++) {
        const struct edge_frame frame = step_frame(self, micro, g);
        step_link_send(self, &own->link[g], own->link[g].edge.operations->ask, &frame,
                       self->stream);
    }
}

void step_attend(struct step *self, uint32_t l, uint32_t micro) {
    struct step_micro *own = &self->micro[micro];
    struct step_attention *work = &self->work;
    const struct step_model *m = self->model;
    const struct step_layer *layer = &m->layer[l];
    const uint32_t rows = self->now->rows;
    did(self, rms_norm_cuda(self->stream, own->residual, m->hidden, layer->input_norm, m->norm_eps,
                            rows, m->hidden, work->normed, self->hidden_stride));
    work->quantised_of = NULL;
    attend(self, l, micro);
    did(self, add_rms_norm_cuda(self->stream, own->residual, m->hidden, work->projected, m->hidden,
                                layer->post_norm, m->norm_eps, rows, m->hidden, work->normed,
                                self->hidden_stride));
    work->quantised_of = NULL;
    if (!layer->moe) {
        step_mlp(self, layer, rows, work->projected);
        did(self, add_cuda(self->stream, own->residual, m->hidden, work->projected, m->hidden, rows,
                           m->hidden));
        return;
    }
    ask(self, l, micro);
    if (layer->mlp_gate.n != 0) /* the shared expert, while the others work */
        step_mlp(self, layer, rows, own->shared);
}

/* What the experts answered joins the residual row; rows that lack something are lost. */
void step_hear(struct step *self, uint32_t l, uint32_t micro) {
    struct step_micro *own = &self->micro[micro];
    const struct step_model *m = self->model;
    const struct step_layer *layer = &m->layer[l];
    const uint32_t rows = self->now->rows;
    const struct exchange_cuda x = exchange(self, l);
    for (uint32_t g = 0; g < self->options.groups; g++) {
        const struct edge_frame frame = step_frame(self, micro, g);
        step_link_receive(self, &own->link[g], own->link[g].edge.operations->hear, &frame,
                          self->stream);
    }
    did(self, exchange_check_cuda(self->stream, &x, choice_of(self, l, micro), own->place,
                                  own->status, own->answered, self->lost + micro * rows));
    did(self,
        combine_cuda(self->stream, rows, m->gate.k, m->hidden, own->output, m->hidden, own->place,
                     own->weights, own->answered, layer->mlp_gate.n != 0 ? own->shared : NULL,
                     m->hidden, own->residual, m->hidden));
}

void step_finish(struct step *self, uint32_t micro) {
    const struct step_model *m = self->model;
    const uint32_t rows = self->now->rows;
    bf16 *final = self->final + (size_t)micro * rows * self->hidden_stride;
    did(self, rms_norm_cuda(self->stream, self->micro[micro].residual, m->hidden, m->final_norm,
                            m->norm_eps, rows, m->hidden, final, self->hidden_stride));
    self->work.quantised_of = NULL;
    if (m->head.n != 0)
        step_product(self, &m->head, final, self->hidden_stride, rows,
                     self->logits + (size_t)micro * rows * m->vocabulary, m->vocabulary);
}
