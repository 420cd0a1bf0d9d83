/* An engine from outside: opens the role, runs its programs, moves its rows. */
#include "engine/engine.h"

#include <stdlib.h>
#include <string.h>

#include "engine/internal.h"

int engine_open(struct engine **ret, const struct model *model,
                const struct engine_options *options, struct failure *failure) {
    if (options->batch_rows < 1 || options->batch_rows > BATCH_ROWS_MAX)
        return fail(failure, ERR_INVALID, "rows of a batch: expected 1 to %d, found %u",
                    BATCH_ROWS_MAX, options->batch_rows);
    if (options->parallel.width < 1)
        return fail(failure, ERR_INVALID, "threads: expected at least 1, found %d",
                    options->parallel.width);
    struct engine *self = calloc(1, sizeof *self);
    if (self == NULL)
        return fail(failure, ERR_NO_MEMORY, "engine: the system could not give %zu bytes",
                    sizeof *self);
    self->role = options->role;
    self->model = model;
    self->config = model_config(model);
    self->kernels = options->kernels;
    self->parallel = options->parallel;
    self->batch_rows = options->batch_rows;
    self->hidden = self->config->hidden;
    self->hidden_stride = row_stride(self->hidden);
    numerics_enter();
    int error = 0;
    switch (self->role) {
    case ENGINE_ATTENTION:
        error = attention_open(self, options, failure);
        break;
    case ENGINE_EXPERT:
        error = experts_open(self, failure);
        break;
    case ENGINE_SAMPLER:
        error = sampler_open(self, failure);
        break;
    }
    if (error != 0) {
        engine_close(&self);
        return error;
    }
    *ret = self;
    return 0;
}

void engine_close(struct engine **self) {
    if (*self == NULL)
        return;
    attention_close(*self);
    experts_close(*self);
    sampler_close(*self);
    free(*self);
    *self = NULL;
}

void engine_run(struct engine *self, const struct program *program, struct program_result *ret) {
    numerics_enter();
    *ret = (struct program_result){
        .kind = program->kind,
        .slot = program->slot,
        .layer = program->layer,
        .rows = program->rows,
        .items = program->items,
        .tag = program->tag,
    };
    switch (self->role) {
    case ENGINE_ATTENTION:
        attention_run(self, program, ret);
        break;
    case ENGINE_EXPERT:
        if (program->kind == PROGRAM_READ) {
            experts_read(self, program, ret);
            break;
        }
        ASSERT(program->kind == PROGRAM_EXPERT);
        experts_run(self, program, ret);
        break;
    case ENGINE_SAMPLER:
        ASSERT(program->kind == PROGRAM_SAMPLE);
        sampler_run(self, program, ret);
        break;
    }
}

uint32_t engine_row_bytes(const struct engine *self, enum region region) {
    if (region == REGION_NORMED_E4M3)
        return e4m3_row_bytes(self->hidden);
    return self->hidden * (region == REGION_EXPERT_OUTPUT ? (uint32_t)sizeof(float)
                                                          : self->kernels->activation_bytes);
}

void engine_gather(const struct engine *self, enum region region, uint32_t slot,
                   const uint32_t *index, uint32_t count, void *ret) {
    const size_t bytes = engine_row_bytes(self, region);
    const uint8_t *from;
    size_t stride = bytes;
    uint32_t rows;
    if (region == REGION_EXPERT_OUTPUT) {
        ASSERT(self->role == ENGINE_EXPERT);
        from = (const uint8_t *)experts_output(self, &rows);
    } else {
        ASSERT(self->role == ENGINE_ATTENTION);
        ASSERT(region == REGION_NORMED || region == REGION_FINAL || region == REGION_NORMED_E4M3);
        from = attention_region(self, region, slot, &rows);
        stride = self->hidden_stride * self->kernels->activation_bytes;
    }
    for (uint32_t i = 0; i < count; i++) {
        uint32_t row = index == NULL ? i : index[i];
        ASSERT(row < rows);
        if (region == REGION_NORMED_E4M3)
            self->kernels->row_to_e4m3(from + row * stride, self->hidden, (uint8_t *)ret + i * bytes);
        else
            memcpy((uint8_t *)ret + i * bytes, from + row * stride, bytes);
    }
}

size_t engine_cache_ahead(struct engine *self, size_t ahead_bytes, void **ret) {
    return self->role == ENGINE_ATTENTION ? attention_cache_ahead(self, ahead_bytes, ret) : 0;
}

bool engine_cache_wants(const struct engine *self, size_t ahead_bytes) {
    return self->role == ENGINE_ATTENTION && attention_cache_wanted(self, ahead_bytes) > 0;
}

bool engine_keeps(const struct engine *self) {
    return self->role == ENGINE_ATTENTION && attention_keeps(self);
}

void engine_take_in(struct engine *self) {
    ASSERT(self->role == ENGINE_ATTENTION);
    attention_take_in(self);
}

uint64_t engine_memory_bytes(const struct engine *self) {
    return self->memory_bytes;
}
