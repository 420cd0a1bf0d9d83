/* The programs of an attention engine whose device takes whole steps (engine/resident.h):
 * everything happens in EMBED, final rows are fetched in FINISH. */
#include <string.h>

#include "engine/attention.h"
#include "engine/resident.h"

int attention_resident_open(struct engine *self, const struct engine_options *options,
                            struct failure *failure) {
    struct attention *a = self->attention;
    if (options->mtp_steps > 0 && self->config->mtp_layers > 0)
        return fail(failure, ERR_UNSUPPORTED,
                    "whole steps on the GPU (resident) have no MTP module yet: --mtp-steps 0");
    a->resident_operations = options->resident;
    return a->resident_operations->open(&a->resident, self->model, options, &self->memory_bytes,
                                        failure);
}

void attention_resident_close(struct engine *self) {
    struct attention *a = self->attention;
    if (a->resident != NULL)
        a->resident_operations->close(a->resident);
    a->resident = NULL;
}

static void finish(struct engine *self, struct attention_slot *slot,
                   const struct program *program) {
    const struct attention *a = self->attention;
    const size_t bytes = self->hidden * self->kernels->activation_bytes;
    ASSERT(program->items <= self->batch_rows);
    slot->final_rows = program->items;
    for (uint32_t i = 0; i < program->items; i++) {
        ASSERT(program->select[i] < slot->rows);
        memcpy(activation_at(self->kernels, slot->final, i * self->hidden_stride),
               a->resident_operations->final(a->resident, program->select[i]), bytes);
    }
}

void attention_resident_run(struct engine *self, const struct program *program,
                            struct program_result *ret) {
    struct attention *a = self->attention;
    struct attention_slot *slot = &a->slot[program->slot];
    switch (program->kind) {
    case PROGRAM_CLEAR_PAGES:
        a->resident_operations->clear(a->resident, program->select, program->items);
        return;
    case PROGRAM_EMBED:
        ASSERT(program->rows <= self->batch_rows);
        attention_check_rows(self, program->row, program->rows);
        slot->rows = program->rows;
        slot->final_rows = 0;
        a->resident_operations->step(a->resident, program->row, program->rows);
        break;
    case PROGRAM_LAYER:
        break;
    case PROGRAM_FINISH:
        finish(self, slot, program);
        break;
    default:
        ASSERT(!"a program that a device of whole steps is not asked for");
    }
    ret->rows = slot->rows;
}
