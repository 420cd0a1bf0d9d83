/* The expert engine: routed experts as pure functions of their weights. It holds no request state;
 * a frame's rows go in, one output per item comes out, each depending on its own row and expert
 * only. */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "engine/internal.h"

/* Items of one expert that are computed together: bounds the work space; large enough to make the
 * weights' way from memory cheap. */
#define CHUNK    256
#define WORK_MAX 64 /* threads that take groups: bits of experts.taken */
/* From so many rows of an expert on threads work inside its products together: both read the same
 * megabyte faster than two of them, and none is left over at the end. */
#define ROWS_TOGETHER 16

/* A work space: of whoever works on a group, one at a time. */
struct expert_work {
    void *x; /* [CHUNK, hidden_stride] activations, or rows of e4m3_row_bytes(hidden) */
    struct mlp_work mlp;
};

struct experts {
    struct expert_weights **held; /* [layers and MTP layers, experts] */
    uint32_t layers;
    uint8_t *memory;          /* work spaces */
    struct expert_work *work; /* [threads] */
    _Atomic uint64_t taken;   /* of these, a bit each */
    void *own;                /* [items, hidden] float */
    size_t own_bytes;
    float *output;  /* of the last program: its own or the host's memory */
    uint32_t items; /* of the last program */
    void *chunk;    /* what is read of packed weights */
    size_t chunk_bytes;
    void *group; /* struct group [groups] */
    size_t group_bytes;
};

struct group {
    uint32_t first; /* item */
    uint32_t crc;   /* of its outputs, if the host wants that */
};

static size_t work_layout(const struct engine *self, struct expert_work *ret,
                          struct layout *layout) {
    const size_t plain = self->hidden_stride * self->kernels->activation_bytes;
    const size_t e4m3 = e4m3_row_bytes(self->hidden);
    ret->x = layout_take(layout, CHUNK, plain > e4m3 ? plain : e4m3);
    mlp_work_layout(&ret->mlp, layout, self->kernels, CHUNK, self->config->expert_width);
    return layout->used;
}

/* Room for a frame's items and groups: the usual sizes at open, more for a frame that needs it. */
static int grow(struct engine *self, uint32_t items, uint32_t groups, struct failure *failure) {
    struct experts *x = self->experts;
    int error = memory_grow(&x->own, &x->own_bytes, items, self->hidden * sizeof(float),
                            "expert outputs", &self->memory_bytes, failure);
    return error != 0 ? error
                      : memory_grow(&x->group, &x->group_bytes, groups, sizeof(struct group),
                                    "groups of a frame", &self->memory_bytes, failure);
}

int experts_open(struct engine *self, struct failure *failure) {
    const struct model_config *c = self->config;
    const size_t threads = (size_t)self->parallel.width;
    struct experts *x = calloc(1, sizeof *x);
    if (x == NULL)
        return fail(failure, ERR_NO_MEMORY, "expert engine: no memory");
    self->experts = x;
    x->layers = c->layers + c->mtp_layers;
    struct expert_work unused;
    struct layout measure = {NULL, 0};
    size_t bytes = work_layout(self, &unused, &measure);
    const struct {
        void **ret;
        size_t count, size;
    } parts[] = {
        {(void **)&x->held, (size_t)x->layers * c->experts, sizeof *x->held},
        {(void **)&x->memory, threads, bytes},
        {(void **)&x->work, threads, sizeof *x->work},
    };
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        *parts[i].ret = memory_take(parts[i].count, parts[i].size, "work space of experts",
                                    &self->memory_bytes, failure);
        if (*parts[i].ret == NULL)
            return ERR_NO_MEMORY;
    }
    struct layout layout = {x->memory, 0};
    for (size_t t = 0; t < threads; t++)
        work_layout(self, &x->work[t], &layout);
    return grow(self, self->batch_rows, c->experts, failure);
}

void experts_close(struct engine *self) {
    struct experts *x = self->experts;
    if (x == NULL)
        return;
    for (size_t i = 0; x->held != NULL && i < (size_t)x->layers * self->config->experts; i++)
        engine_expert_free(&x->held[i]);
    void *const parts[] = {x->held, x->memory, x->work, x->own, x->group, x->chunk};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        memory_free(parts[i]);
    free(x);
    self->experts = NULL;
}

/* A load that does not fit fails as an event; what is held stays. */
int expert_fits(const struct kernels *kernels, const struct weight_view view[3],
                struct failure *failure) {
    uint64_t bytes = 0;
    if (kernels->device_fits == NULL)
        return 0;
    for (int i = 0; i < 3; i++)
        bytes += kernels->matrix_image_bytes(&view[i]);
    return kernels->device_fits(bytes, "weights of an expert", failure);
}

int engine_expert_pack(const struct model *model, const struct kernels *kernels, uint32_t layer,
                       uint32_t expert, struct expert_weights **ret, struct failure *failure) {
    const struct model_config *c = model_config(model);
    if (layer >= c->layers + c->mtp_layers || expert >= c->experts ||
        (layer < c->layers && !model_layer_is_moe(c, layer)))
        return fail(failure, ERR_NOT_FOUND, "expert %u of layer %u: the model has no such expert",
                    expert, layer);
    const struct weight_view view[3] = {
        model_expert_weight(model, layer, expert, EXPERT_GATE),
        model_expert_weight(model, layer, expert, EXPERT_UP),
        model_expert_weight(model, layer, expert, EXPERT_DOWN),
    };
    if (expert_fits(kernels, view, failure) < 0)
        return failure->code;
    struct expert_weights *weights = calloc(1, sizeof *weights);
    if (weights == NULL)
        return fail(failure, ERR_NO_MEMORY, "expert %u of layer %u: no memory", expert, layer);
    numerics_enter();
    int error = mlp_open(&weights->mlp, kernels, view, "expert weights", &weights->bytes, failure);
    if (error != 0) {
        free(weights);
        return error;
    }
    weights->layer = layer;
    weights->expert = expert;
    expert_image_prepare(weights, kernels, view);
    error = mlp_code(&weights->mlp, kernels, c->experts, "expert weights", &weights->bytes, failure);
    if (error != 0) {
        engine_expert_free(&weights);
        return error;
    }
    *ret = weights;
    return 0;
}

void engine_expert_free(struct expert_weights **weights) {
    if (*weights == NULL)
        return;
    mlp_close(&(*weights)->mlp);
    free(*weights);
    *weights = NULL;
}

static struct expert_weights **held_at(const struct engine *self, uint32_t layer, uint32_t expert) {
    ASSERT(self->role == ENGINE_EXPERT);
    ASSERT(layer < self->experts->layers && expert < self->config->experts);
    return &self->experts->held[(size_t)layer * self->config->experts + expert];
}

void engine_expert_publish(struct engine *self, uint32_t layer, uint32_t expert,
                           struct expert_weights **weights) {
    engine_expert_drop(self, layer, expert);
    *held_at(self, layer, expert) = *weights;
    self->memory_bytes += (*weights)->bytes;
    *weights = NULL;
}

void engine_expert_drop(struct engine *self, uint32_t layer, uint32_t expert) {
    struct expert_weights **held = held_at(self, layer, expert);
    if (*held != NULL)
        self->memory_bytes -= (*held)->bytes;
    engine_expert_free(held);
}

bool engine_expert_held(const struct engine *self, uint32_t layer, uint32_t expert) {
    ASSERT(self->role == ENGINE_EXPERT);
    return layer < self->experts->layers && expert < self->config->experts &&
           *held_at(self, layer, expert) != NULL;
}

struct expert_weights *experts_held(const struct engine *self, uint32_t layer, uint32_t expert) {
    return engine_expert_held(self, layer, expert) ? *held_at(self, layer, expert) : NULL;
}

void *experts_chunk(struct engine *self, size_t bytes, struct failure *failure) {
    struct experts *x = self->experts;
    int error = memory_grow(&x->chunk, &x->chunk_bytes, bytes, 1, "a piece of weights",
                            &self->memory_bytes, failure);
    return error == 0 ? x->chunk : NULL;
}

struct gather_job {
    const struct program *program;
    const uint32_t *item_row;
    void *x;
    size_t row_bytes, stride;
};

static void gather_rows(void *argument, uint32_t first, uint32_t end, int part) {
    const struct gather_job *job = argument;
    const uint8_t *rows = job->program->payload;
    (void)part;
    for (uint32_t i = first; i < end; i++) {
        uint8_t *to = (uint8_t *)job->x + i * job->stride;
        memcpy(to, rows + job->item_row[i] * job->row_bytes, job->row_bytes);
        memset(to + job->row_bytes, 0, job->stride - job->row_bytes);
    }
}

/* One group, a chunk of items at a time. Outputs are summed up while they are in the cache. */
static void run_group(const struct engine *self, const struct program *program, uint32_t group,
                      const struct expert_work *work, const struct parallel *parallel) {
    const struct experts *x = self->experts;
    const struct kernels *kernels = self->kernels;
    const size_t row_bytes = program->e4m3 ? e4m3_row_bytes(self->hidden)
                                           : self->hidden * kernels->activation_bytes;
    const size_t stride = program->e4m3 ? row_bytes : self->hidden_stride * kernels->activation_bytes;
    struct group *at = (struct group *)x->group + group;
    const struct expert_weights *weights =
        *held_at(self, program->layer, program->group[group].expert);
    for (uint32_t done = 0; done < program->group[group].count; done += CHUNK) {
        uint32_t first = at->first + done, rows = program->group[group].count - done;
        rows = rows < CHUNK ? rows : CHUNK;
        struct gather_job gather = {program, program->item_row + first, work->x, row_bytes, stride};
        rows_run(parallel, rows, row_bytes / 4, gather_rows, &gather);
        float *y = x->output + (size_t)first * self->hidden;
        if (program->e4m3)
            mlp_run_e4m3(&weights->mlp, kernels, work->x, stride, rows, &work->mlp, y, self->hidden,
                         parallel);
        else
            mlp_run(&weights->mlp, kernels, work->x, self->hidden_stride, rows, &work->mlp, y,
                    self->hidden, parallel);
        if (program->sum)
            at->crc =
                crc32c_parallel(parallel, at->crc, y, (size_t)rows * self->hidden * sizeof *y);
    }
}

struct expert_job {
    const struct engine *engine;
    const struct program *program;
};

/* A work space that nobody has: there is one for each thread that may run. */
static uint32_t take_work(struct experts *x) {
    uint64_t taken = atomic_load(&x->taken), bit;
    do {
        bit = ~taken & (taken + 1);
        ASSERT(bit != 0);
    } while (!atomic_compare_exchange_weak(&x->taken, &taken, taken | bit));
    return (uint32_t)__builtin_ctzll(bit);
}
static void give_work(struct experts *x, uint32_t index) {
    atomic_fetch_and(&x->taken, ~((uint64_t)1 << index));
}

static void run_part(void *argument, int part, int parts) {
    const struct expert_job *job = argument;
    struct experts *x = job->engine->experts;
    (void)parts;
    const uint32_t work = take_work(x);
    run_group(job->engine, job->program, (uint32_t)part, &x->work[work], &PARALLEL_SERIAL);
    give_work(x, work);
}

/* Checks the groups, notes where each begins; returns the largest one's items. */
static uint32_t measure_groups(const struct engine *self, const struct program *program) {
    struct group *group = self->experts->group;
    uint32_t items = 0, largest = 0;
    for (uint32_t g = 0; g < program->groups; g++) {
        uint32_t count = program->group[g].count;
        ASSERT(engine_expert_held(self, program->layer, program->group[g].expert));
        ASSERT(count <= program->items - items);
        group[g] = (struct group){.first = items};
        items += count;
        largest = count > largest ? count : largest;
    }
    ASSERT(items == program->items);
    ASSERT(!program->e4m3 || self->kernels->matmul_e4m3 != NULL);
    for (uint32_t i = 0; i < items; i++)
        ASSERT(program->item_row[i] < program->rows);
    return largest;
}

/* Senders know from the files that every expert does; one that does not know better is not believed. */
static bool take_rows(const struct engine *self, const struct program *program) {
    for (uint32_t g = 0; program->e4m3 && g < program->groups; g++) {
        const struct mlp *mlp = &(*held_at(self, program->layer, program->group[g].expert))->mlp;
        if (!self->kernels->takes_e4m3(&mlp->gate.matrix) ||
            !self->kernels->takes_e4m3(&mlp->up.matrix))
            return false;
    }
    return true;
}

/* CRC32C of all outputs, from those of the groups. */
static uint32_t sum_groups(const struct engine *self, const struct program *program) {
    const struct group *group = self->experts->group;
    uint32_t crc = 0;
    for (uint32_t g = 0; g < program->groups; g++)
        crc = crc32c_join(crc, group[g].crc,
                          program->group[g].count * self->hidden * sizeof(float));
    return crc;
}

/* Threads take whole groups, whoever is free the next one, where groups are small and none is more
 * than a thread's share, else they work inside each product together. Either way a row's bits are the
 * same. */
void experts_run(struct engine *self, const struct program *program, struct program_result *ret) {
    struct experts *x = self->experts;
    uint32_t threads = (uint32_t)self->parallel.width;
    struct failure failure;
    x->items = 0;
    ret->error =
        grow(self, program->output == NULL ? program->items : 0, program->groups, &failure);
    if (ret->error != 0)
        return;
    uint32_t largest = measure_groups(self, program);
    if (!take_rows(self, program)) {
        ret->error = ERR_UNSUPPORTED;
        return;
    }
    x->items = program->items;
    x->output = program->output != NULL ? program->output : x->own;
    ret->output = x->output;
    if (threads > 1 && threads <= WORK_MAX && (uint64_t)largest * threads <= program->items &&
        program->items < (uint64_t)program->groups * ROWS_TOGETHER) {
        struct expert_job job = {self, program};
        self->parallel.run(self->parallel.pool, run_part, &job, (int)program->groups);
    } else {
        for (uint32_t g = 0; g < program->groups; g++)
            run_group(self, program, g, &x->work[0], &self->parallel);
    }
    if (program->sum)
        ret->output_crc = sum_groups(self, program);
}

const float *experts_output(const struct engine *self, uint32_t *ret_items) {
    *ret_items = self->experts->items;
    return self->experts->output;
}
