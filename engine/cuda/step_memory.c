/* Device memory of the resident step: taken once, sized by its capacities. */
#include <stdlib.h>
#include <string.h>

#include "engine/cuda/step_internal.h"

enum { BLOCK = 128 };

static int take(struct step *self, void *ret, size_t count, size_t size, const char *what,
                struct failure *failure) {
    size_t bytes = 0;
    void *memory = NULL;
    if (self->memory_count == self->memory_room) {
        self->memory_room = self->memory_room * 2 + 64;
        void **more = realloc(self->memory, self->memory_room * sizeof *more);
        ASSERT(more != NULL);
        self->memory = more;
    }
    if (__builtin_mul_overflow(count, size, &bytes) || device_take_cuda(bytes, &memory) != 0)
        return fail(failure, ERR_NO_MEMORY, "%s: the GPU could not give %zu x %zu bytes", what,
                    count, size);
    self->memory[self->memory_count++] = memory;
    self->memory_bytes += bytes;
    memcpy(ret, &memory, sizeof memory);
    return 0;
}

struct need {
    void *ret; /* pointer to the pointer */
    size_t count, size;
};

static int take_all(struct step *self, const struct need *need, size_t count, const char *what,
                    struct failure *failure) {
    int error = 0;
    for (size_t i = 0; i < count && error == 0; i++)
        error = take(self, need[i].ret, need[i].count, need[i].size, what, failure);
    return error;
}
#define TAKE(self, needs, what, failure)                                                           \
    take_all(self, needs, sizeof(needs) / sizeof *(needs), what, failure)

static size_t widest(const struct step_model *m) {
    size_t ret = m->hidden > m->mlp_width ? m->hidden : m->mlp_width;
    for (uint32_t l = 0; l < m->layers; l++)
        ret = m->layer[l].q_a.n > ret ? m->layer[l].q_a.n : ret;
    const size_t attended = (size_t)m->heads * m->v;
    return up_to((uint32_t)(attended > ret ? attended : ret), BLOCK);
}

static int take_attention(struct step *self, struct failure *failure) {
    const struct step_model *m = self->model;
    struct step_attention *work = &self->work;
    const size_t rows = self->options.rows, heads = m->heads, wide = widest(m);
    const uint32_t splits = up_to(self->pages_max, MLA_SPLIT_CUDA) / MLA_SPLIT_CUDA;
    size_t low = 0;
    for (uint32_t l = 0; l < m->layers; l++)
        low = m->layer[l].q_a.n > low ? m->layer[l].q_a.n : low;
    const struct need needs[] = {
        {&work->normed, rows * self->hidden_stride, sizeof(bf16)},
        {&work->q_low, rows * low, sizeof(float)},
        {&work->q_low_norm, rows * activation_stride(low), sizeof(bf16)},
        {&work->q, rows * heads * (m->nope + m->rope), sizeof(float)},
        {&work->kv, rows * (m->kv_lora + m->rope), sizeof(float)},
        {&work->q_nope, rows * heads * activation_stride(m->nope), sizeof(bf16)},
        {&work->q_latent, rows * heads * m->kv_lora, sizeof(float)},
        {&work->query, rows * heads * self->cache_stride, sizeof(bf16)},
        {&work->mla_work,
         mla_absorbed_work_bytes_cuda(m->kv_lora, m->heads, self->options.rows, splits), 1},
        {&work->latent, rows * heads * activation_stride(m->kv_lora), sizeof(bf16)},
        {&work->values, rows * heads * m->v, sizeof(float)},
        {&work->attended, rows * activation_stride(heads * m->v), sizeof(bf16)},
        {&work->projected, rows * m->hidden, sizeof(float)},
        {&work->gate_logits, rows * m->gate.experts, sizeof(float)},
        {&work->mlp_gate, rows * m->mlp_width, sizeof(float)},
        {&work->mlp_up, rows * m->mlp_width, sizeof(float)},
        {&work->mlp_inner, rows * activation_stride(m->mlp_width), sizeof(bf16)},
        {&work->quantised, rows * wide, 1},
        {&work->scales, rows * wide / BLOCK, sizeof(float)},
        {&self->latents, m->layers * self->layer_bytes, 1},
        {&self->group_of, (size_t)m->layers * m->gate.experts, sizeof(int32_t)},
        {&self->deltas, (size_t)self->options.biases * m->layers * m->gate.experts, sizeof(float)},
        {&self->lost, self->options.micro * rows, sizeof(uint32_t)},
        {&self->final, self->options.micro * rows * self->hidden_stride, sizeof(bf16)},
        {&self->logits, self->options.micro * rows * m->head.n, sizeof(float)},
        {&self->tables.device, self->tables.words_max, sizeof(uint32_t)},
    };
    return TAKE(self, needs, "attention", failure);
}

/* What the expanded form needs: keys and values of the longest sequence. */
static int take_prompts(struct step *self, struct failure *failure) {
    const struct step_model *m = self->model;
    struct step_attention *work = &self->work;
    const size_t rows = self->options.rows, heads = m->heads, seen = self->pages_max * PAGE_TOKENS;
    const struct mla_expanded_args shape = {
        .heads = m->heads, .nope = m->nope, .rope = m->rope, .v = m->v};
    const struct need needs[] = {
        {&work->expanded, rows * heads * (activation_stride(m->nope) + activation_stride(m->rope)),
         sizeof(bf16)},
        {&work->seen, seen * self->cache_stride, sizeof(bf16)},
        {&work->seen_kv, seen * heads * (m->nope + m->v), sizeof(float)},
        {&work->key, mla_expanded_key_bytes_cuda(&shape, (uint32_t)seen), 1},
        {&work->value, mla_expanded_value_bytes_cuda(&shape, (uint32_t)seen), 1},
    };
    return self->options.prompts ? TAKE(self, needs, "prompts", failure) : 0;
}

static int take_micro(struct step *self, struct step_micro *to, struct failure *failure) {
    const struct step_model *m = self->model;
    const size_t rows = self->options.rows, k = m->gate.k, groups = self->options.groups;
    const size_t hidden = m->hidden;
    const struct need needs[] = {
        {&to->residual, rows * hidden, sizeof(float)},
        {&to->shared, rows * hidden, sizeof(float)},
        {&to->choice, self->moe_layers * rows * k, sizeof(uint16_t)},
        {&to->answered, rows * k, sizeof(uint16_t)},
        {&to->weights, rows * k, sizeof(float)},
        {&to->place, rows * k, sizeof(uint32_t)},
        {&to->sent, groups * (1 + rows), sizeof(uint32_t)},
        {&to->notes, groups * exchange_note_bytes((uint32_t)rows, (uint32_t)k), 1},
        {&to->rows, groups * rows * step_row_bytes(self), 1},
        {&to->status, groups * rows * k, sizeof(uint32_t)},
        {&to->output, groups * rows * k * hidden, sizeof(float)},
    };
    return TAKE(self, needs, "rows of a micro-batch", failure);
}

/* The experts' weights of a layer, all slots. */
static int take_stack(struct step *self, struct step_stack *to, struct failure *failure) {
    const struct step_model *m = self->model;
    const size_t slots = self->options.slots, width = m->expert_width;
    const uint32_t element = m->expert_fp8 ? 1 : sizeof(bf16);
    const uint32_t in = m->expert_fp8 ? up_to(m->hidden, BLOCK) : (uint32_t)self->hidden_stride;
    const uint32_t inner =
        m->expert_fp8 ? up_to(m->expert_width, BLOCK) : (uint32_t)activation_stride(width);
    to->gate_up = (struct step_matrix){.n = 2 * m->expert_width, .k = m->hidden, .stride = in};
    to->down = (struct step_matrix){.n = m->hidden, .k = m->expert_width, .stride = inner};
    const struct need weights[] = {
        {&to->gate_up.data, slots * 2 * width * in, element},
        {&to->down.data, slots * m->hidden * inner, element},
    };
    int error = TAKE(self, weights, "weights of experts", failure);
    if (error != 0 || !m->expert_fp8)
        return error;
    const struct need scales[] = {
        {&to->gate_up.scales, slots * (2 * width / BLOCK) * (in / BLOCK), sizeof(float)},
        {&to->down.scales, slots * (up_to(m->hidden, BLOCK) / BLOCK) * (inner / BLOCK),
         sizeof(float)},
    };
    return TAKE(self, scales, "scales of experts", failure);
}

static int take_group(struct step *self, struct step_group *to, struct failure *failure) {
    const struct step_model *m = self->model;
    const size_t rows = self->options.rows, slots = self->options.slots, all = slots * rows;
    const size_t width = m->expert_width, blocks = up_to(m->hidden, BLOCK) / BLOCK;
    const size_t inner_blocks = up_to(m->expert_width, BLOCK) / BLOCK;
    const size_t row_bytes = self->hidden_stride * sizeof(bf16);
    const size_t to_quantise =
        m->expert_fp8 && self->options.dispatch == DISPATCH_BF16 ? rows * blocks : 0;
    to->stack = calloc(m->layers, sizeof *to->stack);
    if (to->stack == NULL)
        return fail(failure, ERR_NO_MEMORY, "experts: no memory for %u layers", m->layers);
    const struct need needs[] = {
        {&to->count, slots, sizeof(uint32_t)},
        {&to->item, all, sizeof(uint32_t)},
        {&to->place, rows * m->gate.k, sizeof(uint32_t)},
        {&to->x, all * (row_bytes > blocks * BLOCK ? row_bytes : blocks * BLOCK), 1},
        {&to->x_row, to_quantise * BLOCK, 1},
        {&to->x_row_scale, to_quantise, sizeof(float)},
        {&to->x_scale, all * blocks, sizeof(float)},
        {&to->gate_up, all * 2 * width, sizeof(float)},
        {&to->inner, all * activation_stride(width), sizeof(bf16)},
        {&to->inner_fp8, m->expert_fp8 ? all * inner_blocks * BLOCK : 0, 1},
        {&to->inner_scale, all * inner_blocks, sizeof(float)},
        {&to->y, all * m->hidden, sizeof(float)},
        {&to->slot_of, (size_t)m->layers * m->gate.experts, sizeof(int32_t)},
    };
    int error = TAKE(self, needs, "rows of experts", failure);
    for (uint32_t l = 0; l < m->layers && error == 0; l++)
        if (m->layer[l].moe)
            error = take_stack(self, &to->stack[l], failure);
    return error;
}

static int take_pinned(struct step *self, void *ret, size_t bytes, struct failure *failure) {
    void *memory = NULL;
    if (pinned_take_cuda(bytes, &memory) != 0)
        return fail(failure, ERR_NO_MEMORY, "page-locked memory: no %zu bytes", bytes);
    memset(memory, 0, bytes);
    memcpy(ret, &memory, sizeof memory);
    (void)self;
    return 0;
}

int step_memory_open(struct step *self, struct failure *failure) {
    const struct step_model *m = self->model;
    const size_t rows = self->options.rows, micro = self->options.micro;
    const size_t entries = (size_t)m->layers * m->gate.experts;
    const enum step_role role = self->options.role;
    int error = role != STEP_EXPERTS ? take_attention(self, failure) : 0;
    if (error == 0 && role != STEP_EXPERTS)
        error = take_prompts(self, failure);
    for (uint32_t i = 0; i < micro && error == 0; i++)
        error = take_micro(self, &self->micro[i], failure);
    for (uint32_t g = 0; role != STEP_ATTENTION && g < self->options.groups && error == 0; g++)
        error = take_group(self, &self->group[g], failure);
    if (error == 0)
        error = take_pinned(self, &self->tables.host, self->tables.words_max * sizeof(uint32_t),
                            failure);
    if (error == 0)
        error = take_pinned(self, &self->placement,
                            (1 + self->options.groups) * entries * sizeof(int32_t), failure);
    if (error == 0)
        error = take_pinned(self, &self->lost_host, micro * rows * sizeof(uint32_t), failure);
    if (error == 0)
        error =
            take_pinned(self, &self->choice_host,
                        micro * self->moe_layers * rows * m->gate.k * sizeof(uint16_t), failure);
    self->choices = calloc(micro * self->moe_layers * rows * m->gate.k + 1, sizeof *self->choices);
    self->at = calloc(micro * rows, sizeof *self->at);
    if (error == 0 && (self->choices == NULL || self->at == NULL))
        error = fail(failure, ERR_NO_MEMORY, "no memory for results of %zu rows", micro * rows);
    return error;
}

void step_memory_close(struct step *self) {
    for (uint32_t i = 0; i < self->memory_count; i++)
        device_give_cuda(self->memory[i]);
    for (uint32_t g = 0; g < STEP_GROUPS_MAX; g++)
        free(self->group[g].stack);
    void *const pinned[] = {self->tables.host, self->placement, self->lost_host, self->choice_host};
    for (size_t i = 0; i < sizeof pinned / sizeof *pinned; i++)
        if (pinned[i] != NULL)
            pinned_give_cuda(pinned[i]);
    free(self->choices);
    free(self->at);
    free(self->memory);
}
