/* The resident step from outside: opening, tables, recordings, and the order in which attention and
 * experts of the micro-batches are enqueued.
 *
 *   attention  a(0,0) a(0,1) | h(0,0) a(1,0) | h(0,1) a(1,1) | ...      a(layer, micro-batch)
 *   experts          e(0,0)    e(0,1)          e(1,0)    ...            h: what they answered
 *
 * A capacity is enqueued directly the first time that it is used (kernels are loaded then) and
 * captured the second time; from then on it is one launch. */
#include "engine/cuda/step.h"

#include <stdlib.h>
#include <string.h>

#include "engine/cuda/step_internal.h"
#include "kernels/cuda/table.h"
#include "kernels/latent.h"

#define TICKETS_PER_STEP 4096u /* layers are fewer */
#define NOBODY           (-1)

uint32_t step_moe_index(const struct step *self, uint32_t layer) {
    uint32_t ret = 0;
    for (uint32_t l = 0; l < layer; l++)
        ret += self->model->layer[l].moe;
    return ret;
}

/* ---- life ---- */

static int check(const struct step_model *m, const struct step_options *o,
                 struct failure *failure) {
    if (o->rows < 1 || o->rows > BATCH_ROWS_MAX || o->micro < 1 || o->micro > STEP_MICRO_MAX ||
        o->groups < 1 || o->groups > STEP_GROUPS_MAX || o->pages < 1 || o->positions < 1 ||
        o->positions > m->context)
        return fail(
            failure, ERR_INVALID,
            "step on the GPU: expected 1 to %d rows, 1 or %d micro-batches, 1 to %d groups, "
            "pages, and 1 to %u positions",
            BATCH_ROWS_MAX, STEP_MICRO_MAX, STEP_GROUPS_MAX, m->context);
    if ((o->role != STEP_WHOLE && o->edges == NULL) || (o->role == STEP_EXPERTS && o->groups != 1))
        return fail(failure, ERR_INVALID,
                    "step on the GPU: one side of it needs edges, and experts are one group");
    if (!mla_absorbed_offers_cuda(m->kv_lora, m->rope))
        return fail(failure, ERR_UNSUPPORTED,
                    "there are no GPU kernels for latents of %u and rotated keys of %u", m->kv_lora,
                    m->rope);
    const struct mla_expanded_args shape = {.nope = m->nope, .rope = m->rope, .v = m->v};
    if (o->prompts && (!mla_expanded_offers_cuda(&shape) || m->layer[0].kv_b.n == 0))
        return fail(failure, ERR_UNSUPPORTED,
                    "there are no GPU kernels for prompts with keys of %u + %u and values of %u",
                    m->nope, m->rope, m->v);
    if (m->expert_fp8 && m->expert_width % 128 != 0)
        return fail(failure, ERR_UNSUPPORTED,
                    "E4M3 experts on the GPU: expected a width that is a multiple of 128, found %u",
                    m->expert_width);
    if (o->dispatch == DISPATCH_E4M3 && !m->expert_fp8)
        return fail(failure, ERR_UNSUPPORTED,
                    "rows to experts in E4M3: expected experts whose weights are E4M3");
    /* items are numbered in 16 bits */
    if ((uint64_t)o->rows * m->gate.k > UINT16_MAX || m->layers >= TICKETS_PER_STEP)
        return fail(failure, ERR_INVALID, "step on the GPU: %u rows of %u experts are too many",
                    o->rows, m->gate.k);
    return 0;
}

static int open_streams(struct step *self) {
    int error = stream_make_cuda(&self->stream);
    for (uint32_t g = 0; g < self->options.groups && error == 0; g++) {
        if (self->options.role == STEP_EXPERTS)
            self->group[g].stream = self->stream; /* nothing else is done on it */
        else if (self->options.role == STEP_WHOLE)
            error = stream_make_cuda(&self->group[g].stream);
        for (uint32_t i = 0; i < self->options.micro && error == 0; i++)
            error = step_link_open(&self->micro[i].link[g],
                                   self->options.edges != NULL
                                       ? &self->options.edges[i * self->options.groups + g]
                                       : NULL);
    }
    return error;
}

/* Everything that may be read before it is written is zero: a status is then no ticket, and the
 * cache holds no NaN. */
static int clear_memory(struct step *self) {
    const struct step_model *m = self->model;
    const struct step_options *o = &self->options;
    const size_t items = (size_t)o->groups * o->rows * m->gate.k;
    int error = 0;
    if (o->role != STEP_EXPERTS)
        error = stream_clear_cuda(self->stream, self->latents, self->layer_bytes, self->layer_bytes,
                                  m->layers);
    for (uint32_t i = 0; i < o->micro && error == 0; i++)
        error = stream_clear_cuda(self->stream, self->micro[i].status, items * sizeof(uint32_t),
                                  items * sizeof(uint32_t), items > 0);
    return error != 0 ? error : stream_wait_cuda(self->stream);
}

int step_open(struct step **ret, const struct step_model *model, const struct step_options *options,
              struct failure *failure) {
    int error = check(model, options, failure);
    if (error != 0)
        return error;
    struct step *self = calloc(1, sizeof *self);
    if (self == NULL)
        return fail(failure, ERR_NO_MEMORY, "step on the GPU: no memory");
    self->model = model;
    self->options = *options;
    for (uint32_t l = 0; l < model->layers; l++)
        self->moe_layers += model->layer[l].moe;
    self->pages_max = up_to(options->positions, PAGE_TOKENS) / PAGE_TOKENS;
    self->hidden_stride = activation_stride(model->hidden);
    self->cache_stride = cache_stride(model->kv_lora, model->rope);
    self->page_bytes =
        PAGE_TOKENS * (options->cache == CACHE_E4M3 ? latent_row_bytes(model->kv_lora, model->rope)
                                                    : self->cache_stride * sizeof(bf16));
    self->layer_bytes = ((size_t)options->pages + 1) * self->page_bytes;
    self->tables.words_max = 1 + STEP_MICRO_MAX +
                             (size_t)options->micro * options->rows *
                                 (3 + 2 * (size_t)up_to(self->pages_max, MLA_SPLIT_CUDA));
    error = step_memory_open(self, failure);
    if (error == 0 && (open_streams(self) != 0 || clear_memory(self) != 0))
        error = fail(failure, ERR_UNSUPPORTED, "the GPU gives no streams and events");
    if (error != 0) {
        step_close(&self);
        return error;
    }
    const size_t entries = (size_t)model->layers * model->gate.experts;
    for (size_t i = 0; i < (1 + options->groups) * entries; i++)
        self->placement[i] = NOBODY;
    self->placement_changed = true;
    *ret = self;
    return 0;
}

void step_close(struct step **step) {
    struct step *self = *step;
    if (self == NULL)
        return;
    if (self->stream != NULL)
        stream_wait_cuda(self->stream);
    for (uint32_t i = 0; i < self->recordings; i++) {
        if (self->recording[i].graph != NULL)
            graph_free_cuda(self->recording[i].graph);
        free(self->recording[i].product);
        free(self->recording[i].mla);
    }
    free(self->prompt.product);
    for (uint32_t g = 0; g < self->options.groups; g++) {
        for (uint32_t i = 0; i < self->options.micro; i++)
            step_link_close(&self->micro[i].link[g]);
        if (self->group[g].stream != NULL && self->group[g].stream != self->stream)
            stream_free_cuda(self->group[g].stream);
    }
    if (self->stream != NULL)
        stream_free_cuda(self->stream);
    step_memory_close(self);
    free(self);
    *step = NULL;
}

/* ---- between steps ---- */

static int put_part(struct step *self, const struct step_matrix *stack, uint32_t first_row,
                    const struct step_matrix *part) {
    const size_t element = stack->scales != NULL ? 1 : sizeof(bf16);
    ASSERT(part->k == stack->k && part->stride == stack->stride &&
           (part->scales != NULL) == (stack->scales != NULL));
    int error = stream_copy_cuda(
        self->stream, (uint8_t *)stack->data + (size_t)first_row * stack->stride * element,
        part->data, (size_t)part->n * stack->stride * element);
    if (error != 0 || stack->scales == NULL)
        return error;
    const size_t blocks = up_to(stack->k, 128) / 128;
    return stream_copy_cuda(self->stream, (float *)stack->scales + first_row / 128 * blocks,
                            part->scales, up_to(part->n, 128) / 128 * blocks * sizeof(float));
}

int step_expert_put(struct step *self, uint32_t group, uint32_t layer, uint32_t slot,
                    const struct expert_weights *weights) {
    const struct step_model *m = self->model;
    ASSERT(self->rows_running == 0 && group < self->options.groups && layer < m->layers &&
           m->layer[layer].moe && slot < self->options.slots);
    const struct step_stack *stack = &self->group[group].stack[layer];
    const struct step_matrix gate = step_matrix_of(&weights->mlp.gate.matrix),
                             up = step_matrix_of(&weights->mlp.up.matrix),
                             down = step_matrix_of(&weights->mlp.down.matrix);
    /* blocks of scales are whole in each slot of `down` */
    const uint32_t down_rows = m->hidden, width = m->expert_width;
    int error = put_part(self, &stack->gate_up, slot * 2 * width, &gate);
    if (error == 0)
        error = put_part(self, &stack->gate_up, slot * 2 * width + width, &up);
    if (error == 0 && stack->down.scales == NULL)
        error = put_part(self, &stack->down, slot * down_rows, &down);
    if (error == 0 && stack->down.scales != NULL) {
        const size_t in = stack->down.stride / 128, blocks = up_to(down_rows, 128) / 128;
        error = stream_copy_cuda(self->stream,
                                 (uint8_t *)stack->down.data +
                                     (size_t)slot * down_rows * stack->down.stride,
                                 down.data, (size_t)down_rows * stack->down.stride);
        if (error == 0)
            error = stream_copy_cuda(self->stream, (float *)stack->down.scales + slot * blocks * in,
                                     down.scales, blocks * in * sizeof(float));
    }
    return error != 0 ? error : stream_wait_cuda(self->stream);
}

static int32_t *slot_entry(struct step *self, uint32_t group, uint32_t layer, uint32_t expert) {
    const struct step_model *m = self->model;
    ASSERT(self->rows_running == 0 && layer < m->layers && expert < m->gate.experts &&
           group < self->options.groups);
    return self->placement + ((size_t)(1 + group) * m->layers + layer) * m->gate.experts + expert;
}

void step_hold(struct step *self, uint32_t layer, uint32_t expert, uint32_t group, uint32_t slot) {
    ASSERT(slot < self->options.slots || slot == STEP_NOWHERE);
    *slot_entry(self, group, layer, expert) = slot == STEP_NOWHERE ? NOBODY : (int32_t)slot;
    self->placement_changed = true;
}

void step_place(struct step *self, uint32_t layer, uint32_t expert, uint32_t group, uint32_t slot) {
    const struct step_model *m = self->model;
    ASSERT(layer < m->layers && expert < m->gate.experts && self->rows_running == 0);
    self->placement[(size_t)layer * m->gate.experts + expert] =
        group == STEP_NOWHERE ? NOBODY : (int32_t)group;
    self->placement_changed = true;
    if (group != STEP_NOWHERE && self->options.role == STEP_WHOLE)
        step_hold(self, layer, expert, group, slot);
}

int step_bias(struct step *self, uint32_t number, const float *delta) {
    const size_t entries = (size_t)self->model->layers * self->model->gate.experts;
    ASSERT(self->rows_running == 0 && number < self->options.biases);
    return device_put_cuda(self->deltas + number * entries, delta, entries * sizeof(float));
}

int step_clear_pages(struct step *self, const uint32_t *pages, uint32_t count) {
    int error = device_enter_cuda();
    for (uint32_t i = 0; i < count && error == 0; i++) {
        ASSERT(pages[i] < self->options.pages);
        error = stream_clear_cuda(self->stream, self->latents + pages[i] * self->page_bytes,
                                  self->layer_bytes, self->page_bytes, self->model->layers);
    }
    return error;
}

/* ---- a step ---- */

static uint32_t power_of_two(uint32_t n) {
    uint32_t ret = 1;
    while (ret < n)
        ret *= 2;
    return ret;
}

static struct step_recording *recording_of(struct step *self, uint32_t capacity, uint32_t micro,
                                           uint32_t splits) {
    for (uint32_t i = 0; i < self->recordings; i++) {
        struct step_recording *at = &self->recording[i];
        if (at->rows == capacity && at->micro == micro && at->splits == splits)
            return at;
    }
    ASSERT(self->recordings < STEP_RECORDINGS_MAX); /* rows up to 4096, positions up to 2^20 */
    struct step_recording *ret = &self->recording[self->recordings++];
    *ret = (struct step_recording){.rows = capacity, .micro = micro, .splits = splits};
    ret->mla = aligned_alloc(64, (size_t)micro * self->model->layers * sizeof *ret->mla);
    ASSERT(ret->mla != NULL);
    return ret;
}

/* The smallest capacity that these rows fit. */
static struct step_recording *recording_for(struct step *self, const struct step_row *row,
                                            uint32_t rows) {
    const uint32_t micro = rows < self->options.micro ? 1 : self->options.micro;
    const uint32_t splits_max = up_to(self->pages_max, MLA_SPLIT_CUDA) / MLA_SPLIT_CUDA;
    uint32_t capacity = power_of_two((rows + micro - 1) / micro), splits = 1;
    for (uint32_t r = 0; r < rows; r++) {
        const uint32_t needs = row[r].position / PAGE_TOKENS / MLA_SPLIT_CUDA + 1;
        splits = needs > splits ? needs : splits;
    }
    splits = power_of_two(splits);
    splits = splits < splits_max ? splits : splits_max;
    capacity = capacity < self->options.rows ? capacity : self->options.rows;
    return recording_of(self, capacity, micro, splits);
}

static size_t fill_tables(struct step *self, const struct step_row *row, uint32_t rows) {
    const struct step_recording *now = self->now;
    const uint32_t capacity = now->rows, stride = now->splits * MLA_SPLIT_CUDA;
    const uint32_t each = (rows + now->micro - 1) / now->micro;
    const size_t micro_words = (size_t)capacity * (3 + stride);
    uint32_t *words = self->tables.host;
    self->ticket += TICKETS_PER_STEP;
    words[0] = self->ticket;
    for (uint32_t i = 0; i < now->micro; i++) {
        const uint32_t first = i * each, live = rows - first < each ? rows - first : each;
        uint32_t *own = words + 1 + STEP_MICRO_MAX + i * micro_words;
        words[1 + i] = live;
        for (uint32_t r = 0; r < capacity; r++) {
            const struct step_row *from = r < live ? &row[first + r] : NULL;
            uint32_t *pages = own + 3 * capacity + (size_t)r * stride;
            own[r] = from != NULL ? from->token : 0;
            own[capacity + r] = from != NULL ? from->position : 0;
            own[2 * capacity + r] = from != NULL ? from->bias : STEP_NO_BIAS;
            const uint32_t count = from != NULL ? from->position / PAGE_TOKENS + 1 : 0;
            for (uint32_t p = 0; p < stride; p++)
                pages[p] = p < count ? from->pages[p] : self->options.pages;
            if (from != NULL)
                self->at[first + r] = i * capacity + r;
        }
    }
    return (1 + STEP_MICRO_MAX + now->micro * micro_words) * sizeof(uint32_t);
}

static void results(struct step *self) {
    const struct step_recording *now = self->now;
    const size_t choices = (size_t)self->moe_layers * now->rows * self->model->gate.k;
    did(self, stream_get_cuda(self->stream, self->lost_host, self->lost,
                              (size_t)now->micro * now->rows * sizeof(uint32_t)));
    for (uint32_t i = 0; i < now->micro && choices > 0; i++)
        did(self, stream_get_cuda(self->stream, self->choice_host + i * choices,
                                  self->micro[i].choice, choices * sizeof(uint16_t)));
}

static void enqueue(struct step *self, size_t table_bytes) {
    const struct step_model *m = self->model;
    const struct step_recording *now = self->now;
    const size_t lost_bytes = (size_t)now->micro * now->rows * sizeof(uint32_t);
    self->next_product = self->next_mla = 0;
    self->work.quantised_of = NULL;
    if (self->options.role == STEP_EXPERTS) {
        for (uint32_t l = 0; l < m->layers; l++)
            for (uint32_t i = 0; m->layer[l].moe && i < now->micro; i++)
                step_experts(self, 0, l, i);
        for (uint32_t i = 0; i < now->micro; i++)
            step_link_settle(self, &self->micro[i].link[0], self->stream);
        return;
    }
    did(self, stream_put_cuda(self->stream, self->tables.device, self->tables.host, table_bytes));
    did(self, stream_clear_cuda(self->stream, self->lost, lost_bytes, lost_bytes, 1));
    for (uint32_t i = 0; i < now->micro; i++)
        step_embed(self, i);
    for (uint32_t l = 0; l < m->layers; l++)
        for (uint32_t i = 0; i < now->micro; i++) {
            if (l > 0 && m->layer[l - 1].moe)
                step_hear(self, l - 1, i);
            step_attend(self, l, i);
            for (uint32_t g = 0; m->layer[l].moe && g < self->options.groups; g++)
                if (self->options.role == STEP_WHOLE)
                    step_experts(self, g, l, i);
        }
    for (uint32_t i = 0; i < now->micro; i++) {
        if (m->layer[m->layers - 1].moe)
            step_hear(self, m->layers - 1, i);
        step_finish(self, i);
        for (uint32_t g = 0; g < self->options.groups; g++)
            step_link_settle(self, &self->micro[i].link[g], self->stream);
    }
    results(self);
}

static void put_placement(struct step *self) {
    const size_t entries = (size_t)self->model->layers * self->model->gate.experts;
    const size_t bytes = entries * sizeof(int32_t);
    if (!self->placement_changed || entries == 0)
        return;
    if (self->options.role != STEP_EXPERTS)
        did(self, stream_put_cuda(self->stream, self->group_of, self->placement, bytes));
    for (uint32_t g = 0; self->options.role != STEP_ATTENTION && g < self->options.groups; g++)
        did(self, stream_put_cuda(self->stream, self->group[g].slot_of,
                                  self->placement + (1 + g) * entries, bytes));
    self->placement_changed = false;
}

static bool rows_valid(const struct step *self, const struct step_row *row, uint32_t rows) {
    if (rows == 0 || rows > self->options.rows * self->options.micro)
        return false;
    for (uint32_t r = 0; r < rows; r++) {
        if (row[r].token >= self->model->vocabulary || row[r].position >= self->options.positions ||
            (row[r].bias != STEP_NO_BIAS && row[r].bias >= self->options.biases))
            return false;
        for (uint32_t p = 0; p <= row[r].position / PAGE_TOKENS; p++)
            if (row[r].pages[p] >= self->options.pages)
                return false;
    }
    return true;
}

/* Directly, or by the graph of the capacity at hand. */
static int launch(struct step *self, bool planned, size_t bytes) {
    put_placement(self);
    if (!self->options.graphs || !planned) {
        enqueue(self, bytes);
    } else {
        if (self->now->graph == NULL) {
            did(self, graph_begin_cuda(self->stream));
            enqueue(self, bytes);
            did(self, graph_end_cuda(self->stream, &self->now->graph));
        }
        if (self->error == 0)
            did(self, graph_run_cuda(self->now->graph, self->stream));
    }
    return self->error;
}

int step_begin(struct step *self, const struct step_row *row, uint32_t rows) {
    ASSERT(self->rows_running == 0 && self->options.role != STEP_EXPERTS);
    if (!rows_valid(self, row, rows))
        return ERR_INVALID;
    did(self, device_enter_cuda());
    self->now = recording_for(self, row, rows);
    const bool planned = self->now->products > 0;
    const size_t bytes = fill_tables(self, row, rows);
    self->rows_running = rows;
    return launch(self, planned, bytes);
}

void step_announce(const struct step *self, uint32_t *ret_rows, uint32_t *ret_micro) {
    *ret_rows = self->now->rows;
    *ret_micro = self->now->micro;
}

int step_serve(struct step *self, uint32_t rows, uint32_t micro) {
    ASSERT(self->rows_running == 0 && self->options.role == STEP_EXPERTS);
    if (rows < 1 || rows > self->options.rows || micro < 1 || micro > self->options.micro)
        return ERR_INVALID;
    did(self, device_enter_cuda());
    self->now = recording_of(self, rows, micro, 0);
    self->rows_running = rows;
    return launch(self, self->now->products > 0, 0);
}

int step_prompt(struct step *self, const struct step_row *row, uint32_t rows) {
    ASSERT(self->rows_running == 0);
    if (!self->options.prompts || rows > self->options.rows || !rows_valid(self, row, rows))
        return ERR_INVALID;
    for (uint32_t r = 1; r < rows; r++)
        if (row[r].position <= row[r - 1].position || row[r].pages != row[0].pages)
            return ERR_INVALID;
    const uint32_t last = row[rows - 1].position;
    struct step_recording *now = &self->prompt;
    now->rows = rows;
    now->micro = 1;
    now->splits = last / PAGE_TOKENS / MLA_SPLIT_CUDA + 1;
    now->products = 0; /* planned for these rows */
    now->prompt_pages = row[0].pages;
    now->positions = last + 1;
    self->now = now;
    did(self, device_enter_cuda());
    const size_t bytes = fill_tables(self, row, rows);
    put_placement(self);
    enqueue(self, bytes);
    now->prompt_pages = NULL; /* borrowed for the call */
    self->rows_running = rows;
    return self->error;
}

bool step_done(struct step *self) {
    return stream_done_cuda(self->stream) != CUDA_NOT_READY;
}

int step_end(struct step *self, struct step_result *ret) {
    const struct step_recording *now = self->now;
    const uint32_t rows = self->rows_running, k = self->model->gate.k;
    ASSERT(rows > 0);
    did(self, stream_wait_cuda(self->stream));
    self->rows_running = 0;
    if (self->options.role == STEP_EXPERTS)
        return self->error;
    for (uint32_t r = 0; r < rows; r++) { /* both ascend: at[r] is never below r */
        self->lost_host[r] = self->lost_host[self->at[r]];
        const uint32_t micro = self->at[r] / now->rows, own = self->at[r] % now->rows;
        for (uint32_t l = 0; l < self->moe_layers; l++)
            memcpy(self->choices + ((size_t)l * rows + r) * k,
                   self->choice_host +
                       (((size_t)micro * self->moe_layers + l) * now->rows + own) * k,
                   k * sizeof *self->choices);
    }
    *ret = (struct step_result){.rows = rows,
                                .lost = self->lost_host,
                                .logits = self->model->head.n != 0 ? self->logits : NULL,
                                .final = self->final,
                                .at = self->at,
                                .choice = self->choices,
                                .final_stride = self->hidden_stride};
    return self->error;
}

uint32_t step_graphs(const struct step *self) {
    uint32_t ret = 0;
    for (uint32_t i = 0; i < self->recordings; i++)
        ret += self->recording[i].graph != NULL;
    return ret;
}
uint32_t step_graph_nodes(const struct step *self) {
    return self->now != NULL && self->now->graph != NULL ? graph_nodes_cuda(self->now->graph) : 0;
}
uint64_t step_memory_bytes(const struct step *self) {
    return self->memory_bytes;
}
void *step_stream(const struct step *self) {
    return self->stream;
}
