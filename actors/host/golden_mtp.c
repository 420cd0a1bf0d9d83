/* See golden_mtp.h. The engines by hand, one after the other, without actors: guesses are never
 * told to anybody, so no actor would give their logits away. */
#include "actors/host/golden_mtp.h"

#include <stdlib.h>
#include <string.h>

#include "engine/engine.h"

struct run {
    const struct model_config *config;
    struct engine *attention, *expert;
    uint32_t positions, k;
    struct batch_row *row;     /* [positions] */
    uint32_t *page;            /* [pages] 0, 1, ... */
    void *rows;                /* [positions, hidden] activations */
    struct frame_group *group; /* [experts] */
    uint32_t *item_row;        /* [positions * k] */
    uint16_t *item_slot;
};

static void run_program(struct engine *engine, const struct program *program,
                        struct program_result *ret) {
    engine_run(engine, program, ret);
    ASSERT(ret->error == 0);
}

/* Rows to their experts, grouped by expert, and back. */
static void run_experts(struct run *self, uint32_t layer, const uint16_t *choice) {
    struct program expert = {.kind = PROGRAM_EXPERT,
                             .layer = layer,
                             .rows = self->positions,
                             .group = self->group,
                             .item_row = self->item_row,
                             .payload = self->rows};
    for (uint32_t e = 0; e < self->config->experts; e++) {
        uint32_t first = expert.items;
        for (uint32_t i = 0; i < self->positions * self->k; i++)
            if (choice[i] == e) {
                self->item_row[expert.items] = i / self->k;
                self->item_slot[expert.items++] = (uint16_t)(i % self->k);
            }
        if (expert.items > first)
            self->group[expert.groups++] = (struct frame_group){e, expert.items - first};
    }
    struct program_result result;
    engine_gather(self->attention, REGION_NORMED, 0, NULL, self->positions, self->rows);
    run_program(self->expert, &expert, &result);
    struct program scatter = {.kind = PROGRAM_SCATTER,
                              .payload = result.output,
                              .items = expert.items,
                              .item_row = self->item_row,
                              .item_slot = self->item_slot};
    run_program(self->attention, &scatter, &result);
}

static void run_main_layers(struct run *self, const int32_t *token) {
    struct program_result result;
    struct program program = {.kind = PROGRAM_CLEAR_PAGES,
                              .select = self->page,
                              .items = (self->positions + PAGE_TOKENS - 1) / PAGE_TOKENS};
    run_program(self->attention, &program, &result);
    for (uint32_t p = 0; p < self->positions; p++)
        self->row[p] = (struct batch_row){
            .token = (uint32_t)token[p], .position = p, .form = MLA_EXPANDED, .pages = self->page};
    program = (struct program){.kind = PROGRAM_EMBED, .rows = self->positions, .row = self->row};
    run_program(self->attention, &program, &result);
    for (uint32_t layer = 0; layer < self->config->layers; layer++) {
        program = (struct program){.kind = PROGRAM_LAYER, .layer = layer};
        run_program(self->attention, &program, &result);
        if (result.choice == NULL)
            continue;
        self->k = result.k;
        run_experts(self, layer, result.choice);
        program.kind = PROGRAM_SHARED;
        run_program(self->attention, &program, &result);
        program.kind = PROGRAM_COMBINE;
        run_program(self->attention, &program, &result);
    }
}

static int open_engines(struct run *self, const struct model *model, const struct kernels *kernels,
                        bool latent_fp8, struct failure *failure) {
    struct engine_options options = {
        .role = ENGINE_ATTENTION,
        .kernels = kernels,
        .parallel = PARALLEL_SERIAL,
        .batch_rows = self->positions,
        .batch_slots = 1,
        .pages = (self->positions + PAGE_TOKENS - 1) / PAGE_TOKENS,
        .latent_fp8 = latent_fp8,
        .mtp_steps = 1,
    };
    int error = engine_open(&self->attention, model, &options, failure);
    options.role = ENGINE_EXPERT;
    if (error == 0)
        error = engine_open(&self->expert, model, &options, failure);
    for (uint32_t l = 0; l < self->config->layers && error == 0; l++)
        for (uint32_t e = 0;
             model_layer_is_moe(self->config, l) && e < self->config->experts && error == 0; e++) {
            struct expert_weights *weights = NULL;
            error = engine_expert_pack(model, kernels, l, e, &weights, failure);
            if (error == 0)
                engine_expert_publish(self->expert, l, e, &weights);
        }
    return error;
}

static bool take_memory(struct run *self) {
    size_t positions = self->positions, items = positions * EXPERTS_PER_TOKEN_MAX;
    self->row = calloc(positions, sizeof *self->row);
    self->page = calloc(positions / PAGE_TOKENS + 1, sizeof *self->page);
    self->rows = calloc(positions, self->config->hidden * sizeof(float));
    self->group = calloc(self->config->experts + 1, sizeof *self->group);
    self->item_row = calloc(items, sizeof *self->item_row);
    self->item_slot = calloc(items, sizeof *self->item_slot);
    for (uint32_t i = 0; self->page != NULL && i <= positions / PAGE_TOKENS; i++)
        self->page[i] = i;
    return self->row != NULL && self->page != NULL && self->rows != NULL && self->group != NULL &&
           self->item_row != NULL && self->item_slot != NULL;
}

static void run_free(struct run *self) {
    engine_close(&self->attention);
    engine_close(&self->expert);
    free(self->row);
    free(self->page);
    free(self->rows);
    free(self->group);
    free(self->item_row);
    free(self->item_slot);
}

int golden_mtp(const struct model *model, const struct kernels *kernels, bool latent_fp8,
               const int32_t *input, uint32_t sequences, uint32_t positions, golden_mtp_visit *visit, void *context,
               struct failure *failure) {
    struct run self = {.config = model_config(model), .positions = positions};
    const struct sample_spec greedy = {.top_p = 1, .repetition_penalty = 1};
    int error = positions > BATCH_ROWS_MAX
                    ? fail(failure, ERR_TOO_LARGE, "mtp_logits: at most %d positions, found %u",
                           BATCH_ROWS_MAX, positions)
                    : open_engines(&self, model, kernels, latent_fp8, failure);
    if (error == 0 && !take_memory(&self))
        error = fail(failure, ERR_NO_MEMORY, "no memory for the MTP module's check");
    for (uint32_t b = 0; b < sequences && error == 0; b++) {
        const int32_t *token = input + (size_t)b * positions;
        run_main_layers(&self, token);
        for (uint32_t p = 0; p + 1 < positions; p++) {
            struct program_result result;
            struct draft_row row = {p, (uint32_t)token[p + 1], 1};
            struct program program = {
                .kind = PROGRAM_DRAFT, .draft = &row, .items = 1, .spec = &greedy};
            run_program(self.attention, &program, &result);
            visit(context, b, p, result.output);
        }
    }
    run_free(&self);
    return error;
}
