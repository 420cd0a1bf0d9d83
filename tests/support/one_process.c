#include "tests/support/one_process.h"

#include "model/synth.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void run_reversed(void *pool, void (*task)(void *argument, int part, int parts),
                         void *argument, int parts) {
    (void)pool;
    for (int part = parts; part-- > 0;)
        task(argument, part, parts);
}

const struct parallel PARALLEL_REVERSED = {run_reversed, NULL, 3};

static void *take(size_t count, size_t size) {
    void *memory = calloc(count + 1, size);
    ASSERT(memory != NULL);
    return memory;
}

static bool latent_fp8;

void one_process_use_latent_fp8(bool on) {
    latent_fp8 = on;
}

static bool e4m3_rows;

void one_process_use_e4m3_rows(bool on) {
    e4m3_rows = on;
}

static const struct resident_operations *resident;

void one_process_use_resident(const struct resident_operations *operations) {
    resident = operations;
}

static bool open_engines(struct one_process *self, const struct kernels *kernels,
                         const struct parallel *parallel, struct failure *failure) {
    struct engine_options options = {
        .role = ENGINE_ATTENTION,
        .kernels = kernels,
        .parallel = *parallel,
        .batch_rows = self->batch_rows,
        .batch_slots = 1,
        .pages = self->pages_per_sequence * ONE_PROCESS_SEQUENCES,
        .latent_fp8 = latent_fp8,
        .resident = resident,
        .mtp_steps = resident != NULL ? 0 : 2,
    };
    if (engine_open(&self->attention, self->model, &options, failure) != 0)
        return false;
    options.role = ENGINE_EXPERT;
    if (engine_open(&self->expert, self->model, &options, failure) != 0)
        return false;
    options.role = ENGINE_SAMPLER;
    if (engine_open(&self->sampler, self->model, &options, failure) != 0)
        return false;
    for (uint32_t l = 0; l < self->config->layers; l++)
        for (uint32_t e = 0; model_layer_is_moe(self->config, l) && e < self->config->experts;
             e++) {
            struct expert_weights *weights = NULL;
            if (engine_expert_pack(self->model, kernels, l, e, &weights, failure) != 0)
                return false;
            engine_expert_publish(self->expert, l, e, &weights);
        }
    return true;
}

static void take_memory(struct one_process *self) {
    const struct model_config *c = self->config;
    uint32_t items = self->batch_rows * (c->gate.k > 0 ? c->gate.k : 1);
    uint32_t entries = c->layers * c->experts;
    self->part_items_max = items;
    self->pages =
        take((size_t)self->pages_per_sequence * ONE_PROCESS_SEQUENCES, sizeof *self->pages);
    /* pages of a sequence lie apart and out of order */
    for (uint32_t s = 0; s < ONE_PROCESS_SEQUENCES; s++)
        for (uint32_t p = 0; p < self->pages_per_sequence; p++)
            self->pages[s * self->pages_per_sequence + p] =
                (self->pages_per_sequence - 1 - p) * ONE_PROCESS_SEQUENCES + s;
    self->first = take(entries + 1, sizeof *self->first);
    self->holder = take(entries, sizeof *self->holder);
    for (uint32_t i = 0; i <= entries; i++)
        self->first[i] = i;
    self->placement = (struct placement){c->layers, c->experts, self->first, self->holder};
    self->items = take(items, sizeof *self->items);
    self->item_row = take(items, sizeof *self->item_row);
    self->item_slot = take(items, sizeof *self->item_slot);
    self->rows = take((size_t)self->batch_rows * c->hidden, sizeof(float));
    self->spec = take(self->batch_rows, sizeof *self->spec);
    ASSERT(dispatch_plan_init(&self->plan, items, 1) == 0);
}

static bool open_model(struct one_process *self, const char *name, const struct kernels *kernels,
                       const struct parallel *parallel, uint32_t batch_rows, uint32_t positions) {
    struct failure failure = {0};
    self->batch_rows = batch_rows;
    self->pages_per_sequence = (positions + PAGE_TOKENS - 1) / PAGE_TOKENS;
    if (model_open(&self->model, self->files.file, self->files.count, &failure) == 0) {
        self->config = model_config(self->model);
        if (open_engines(self, kernels, parallel, &failure)) {
            take_memory(self);
            return true;
        }
    }
    printf("%s: %s\n", name, failure.text);
    one_process_close(self);
    return false;
}

bool one_process_open(struct one_process *self, const char *directory,
                      const struct kernels *kernels, const struct parallel *parallel,
                      uint32_t batch_rows, uint32_t positions) {
    memset(self, 0, sizeof *self);
    if (!model_files_read(&self->files, directory)) {
        printf("%s: cannot be read\n", directory);
        return false;
    }
    return open_model(self, directory, kernels, parallel, batch_rows, positions);
}

/* Files come one after the other, each in pieces. */
static int collect(void *context, const char *name, const void *bytes, size_t size) {
    struct model_files *files = context;
    struct model_file *file = files->count > 0 ? &files->file[files->count - 1] : NULL;
    if (file == NULL || strcmp(file->name, name) != 0) {
        file = &files->file[files->count++];
        *file = (struct model_file){.name = strdup(name)};
    }
    file->bytes = realloc((void *)file->bytes, file->size + size);
    ASSERT(file->bytes != NULL);
    memcpy((uint8_t *)file->bytes + file->size, bytes, size);
    file->size += size;
    return 0;
}

bool one_process_open_shape(struct one_process *self, const char *shape_json, uint64_t seed,
                            const struct kernels *kernels, const struct parallel *parallel,
                            uint32_t batch_rows, uint32_t positions) {
    struct failure failure;
    memset(self, 0, sizeof *self);
    if (synth_model(shape_json, strlen(shape_json), seed, collect, &self->files, &failure) != 0) {
        printf("%s\n", failure.text);
        model_files_free(&self->files);
        return false;
    }
    return open_model(self, "random weights", kernels, parallel, batch_rows, positions);
}

void one_process_close(struct one_process *self) {
    engine_close(&self->attention);
    engine_close(&self->expert);
    engine_close(&self->sampler);
    if (self->model != NULL)
        model_close(&self->model);
    model_files_free(&self->files);
    if (self->plan.scratch != NULL)
        dispatch_plan_free(&self->plan);
    void *const parts[] = {self->pages,    self->first,     self->holder, self->items,
                           self->item_row, self->item_slot, self->rows,   self->spec};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        free(parts[i]);
    memset(self, 0, sizeof *self);
}

struct batch_row one_process_row(const struct one_process *self, uint32_t sequence,
                                 uint32_t position, uint32_t token, enum mla_form form) {
    ASSERT(sequence < ONE_PROCESS_SEQUENCES);
    ASSERT(position / PAGE_TOKENS < self->pages_per_sequence);
    return (struct batch_row){token, position, sequence, (uint8_t)form,
                              self->pages + (size_t)sequence * self->pages_per_sequence,
                              self->bias[sequence]};
}

void one_process_forget(struct one_process *self, uint32_t sequence) {
    struct program program = {
        .kind = PROGRAM_CLEAR_PAGES,
        .select = self->pages + (size_t)sequence * self->pages_per_sequence,
        .items = self->pages_per_sequence,
    };
    struct program_result result;
    engine_run(self->attention, &program, &result);
}

/* One part of the plan: its rows to the experts, their outputs back. */
static void run_part(struct one_process *self, uint32_t layer, const struct dispatch_part *part) {
    struct program_result result;
    engine_gather(self->attention, e4m3_rows ? REGION_NORMED_E4M3 : REGION_NORMED, 0,
                  self->plan.row + part->first_row, part->rows, self->rows);
    struct program expert = {
        .kind = PROGRAM_EXPERT,
        .layer = layer,
        .group = self->plan.group + part->first_group,
        .groups = part->groups,
        .item_row = self->plan.item_row + part->first_item,
        .items = part->items,
        .rows = part->rows,
        .payload = self->rows,
        .e4m3 = e4m3_rows,
    };
    engine_run(self->expert, &expert, &result);
    ASSERT(result.error == 0);
    for (uint32_t i = 0; i < part->items; i++) {
        self->item_row[i] = self->plan.item[part->first_item + i].row;
        self->item_slot[i] = self->plan.item[part->first_item + i].slot;
    }
    struct program scatter = {
        .kind = PROGRAM_SCATTER,
        .payload = result.output,
        .items = part->items,
        .item_row = self->item_row,
        .item_slot = self->item_slot,
    };
    engine_run(self->attention, &scatter, &result);
}

static void run_experts(struct one_process *self, uint32_t layer, uint32_t rows,
                        const struct program_result *chosen) {
    uint32_t count = 0, load = 0;
    const uint8_t alive = 1;
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t slot = 0; slot < chosen->k; slot++)
            if (chosen->choice[r * chosen->k + slot] != GATE_UNUSED)
                self->items[count++] =
                    (struct dispatch_item){.row = r,
                                           .slot = (uint16_t)slot,
                                           .expert = chosen->choice[r * chosen->k + slot]};
    struct program program = {.kind = PROGRAM_SHARED, .layer = layer};
    struct program_result result;
    engine_run(self->attention, &program, &result);
    dispatch_plan_build(&self->plan, &self->placement, layer, self->items, count, &alive, &load, NULL, 1,
                        self->part_items_max);
    for (uint32_t p = 0; p < self->plan.parts; p++)
        run_part(self, layer, &self->plan.part[p]);
    program.kind = PROGRAM_COMBINE;
    engine_run(self->attention, &program, &result);
}

void one_process_step(struct one_process *self, const struct batch_row *row, uint32_t rows,
                      const uint32_t *select, uint32_t selected, float *ret_logits) {
    struct program program = {.kind = PROGRAM_EMBED, .rows = rows, .row = row};
    struct program_result result;
    engine_run(self->attention, &program, &result);
    ASSERT(result.error == 0);
    for (uint32_t l = 0; l < self->config->layers; l++) {
        program = (struct program){.kind = PROGRAM_LAYER, .layer = l};
        engine_run(self->attention, &program, &result);
        if (result.choice != NULL)
            run_experts(self, l, rows, &result);
    }
    if (ret_logits == NULL)
        return;
    program = (struct program){.kind = PROGRAM_FINISH, .select = select, .items = selected};
    engine_run(self->attention, &program, &result);
    engine_gather(self->attention, REGION_FINAL, 0, NULL, selected, self->rows);
    for (uint32_t i = 0; i < selected; i++)
        self->spec[i] = (struct sample_spec){.flags = SAMPLE_FULL_LOGITS, .repetition_penalty = 1};
    program = (struct program){
        .kind = PROGRAM_SAMPLE, .spec = self->spec, .rows = selected, .payload = self->rows};
    engine_run(self->sampler, &program, &result);
    ASSERT(result.error == 0);
    const size_t vocabulary = self->config->vocabulary;
    for (uint32_t i = 0; i < selected; i++)
        memcpy(ret_logits + i * vocabulary, result.words + result.sampled[i].first_word,
               vocabulary * sizeof *ret_logits);
}
