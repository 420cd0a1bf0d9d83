/* One process does what a troupe does (see whole.h): the programs of engine.h in their order, the
 * chosen experts' rows taken to them in one program per layer. */
#include "engine/whole.h"

#include <stdlib.h>
#include <string.h>

#include "router/gate.h"

struct whole {
    const struct model_config *config;
    struct engine *attention, *expert, *sampler;
    uint32_t texts, positions, pages_each;
    struct batch_row *row; /* [texts * positions] */
    uint32_t *page;        /* [texts * pages_each] */
    uint32_t *select,
        *target; /* [texts * positions] rows whose next token is known, and that token */
    struct frame_group *group; /* [experts] */
    uint32_t *item_row;        /* [rows * k] */
    uint16_t *item_slot;
    uint32_t *first;          /* [experts + 1] */
    uint8_t *payload;         /* [rows] of either region */
    struct sample_spec *spec; /* [rows] */
};

/* ---- life ---- */

static int pack_experts(struct whole *self, const struct model *model,
                        const struct kernels *kernels, struct failure *failure) {
    for (uint32_t layer = 0; layer < self->config->layers; layer++)
        for (uint32_t e = 0; model_layer_is_moe(self->config, layer) && e < self->config->experts;
             e++) {
            struct expert_weights *weights = NULL;
            int error = engine_expert_pack(model, kernels, layer, e, &weights, failure);
            if (error < 0)
                return error;
            engine_expert_publish(self->expert, layer, e, &weights);
        }
    return 0;
}

static int open_engines(struct whole *self, const struct model *model,
                        const struct whole_options *options, struct failure *failure) {
    struct engine_options engine = {
        .role = ENGINE_ATTENTION,
        .kernels = options->kernels,
        .parallel = options->parallel,
        .batch_rows = self->texts * self->positions,
        .batch_slots = 1,
        .pages = self->texts * self->pages_each,
        .gate_top_p = options->gate_top_p,
        .latent_fp8 = options->latent_fp8,
    };
    int error = engine_open(&self->attention, model, &engine, failure);
    engine.role = ENGINE_EXPERT;
    if (error == 0)
        error = engine_open(&self->expert, model, &engine, failure);
    engine.role = ENGINE_SAMPLER;
    if (error == 0)
        error = engine_open(&self->sampler, model, &engine, failure);
    return error < 0 ? error : pack_experts(self, model, options->kernels, failure);
}

static bool allocate(struct whole *self) {
    size_t rows = (size_t)self->texts * self->positions, k = self->config->gate.k;
    self->row = calloc(rows, sizeof *self->row);
    self->page = calloc((size_t)self->texts * self->pages_each, sizeof *self->page);
    self->select = calloc(rows, sizeof *self->select);
    self->target = calloc(rows, sizeof *self->target);
    self->group = calloc((size_t)self->config->experts + 1, sizeof *self->group);
    self->first = calloc((size_t)self->config->experts + 1, sizeof *self->first);
    self->item_row = calloc(rows * k + 1, sizeof *self->item_row);
    self->item_slot = calloc(rows * k + 1, sizeof *self->item_slot);
    self->payload = calloc(rows * self->config->hidden, sizeof(float));
    self->spec = calloc(rows, sizeof *self->spec);
    return self->row != NULL && self->page != NULL && self->select != NULL &&
           self->target != NULL && self->group != NULL && self->first != NULL &&
           self->item_row != NULL && self->item_slot != NULL && self->payload != NULL &&
           self->spec != NULL;
}

int whole_open(struct whole **ret, const struct model *model, const struct whole_options *options,
               struct failure *failure) {
    struct whole *self = calloc(1, sizeof *self);
    if (self == NULL)
        return fail(failure, ERR_NO_MEMORY, "no memory for a model in one process");
    ASSERT(options->texts > 0 && options->positions > 0);
    self->config = model_config(model);
    self->texts = options->texts;
    self->positions = options->positions;
    self->pages_each = (options->positions + PAGE_TOKENS - 1) / PAGE_TOKENS;
    int error = allocate(self) ? open_engines(self, model, options, failure)
                               : fail(failure, ERR_NO_MEMORY, "no memory for batches of %u rows",
                                      options->texts * options->positions);
    if (error < 0) {
        whole_close(&self);
        return error;
    }
    for (uint32_t i = 0; i < self->texts * self->pages_each; i++)
        self->page[i] = i;
    *ret = self;
    return 0;
}

void whole_close(struct whole **whole) {
    struct whole *self = *whole;
    if (self == NULL)
        return;
    engine_close(&self->attention);
    engine_close(&self->expert);
    engine_close(&self->sampler);
    void *const parts[] = {self->row,      self->page,     self->select,  self->target,
                           self->group,    self->first,    self->payload, self->spec,
                           self->item_row, self->item_slot};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        free(parts[i]);
    free(self);
    *whole = NULL;
}

/* ---- a step ---- */

/* Items by expert, then by row, as an EXPERT program takes them. Returns how many. */
static uint32_t sort_items(struct whole *self, const uint16_t *choice, uint32_t rows,
                           uint32_t *ret_groups) {
    uint32_t experts = self->config->experts, k = self->config->gate.k, items = rows * k;
    memset(self->first, 0, ((size_t)experts + 1) * sizeof *self->first);
    for (uint32_t i = 0; i < items; i++)
        if (choice[i] != GATE_UNUSED)
            self->first[choice[i] + 1]++;
    *ret_groups = 0;
    for (uint32_t e = 0; e < experts; e++) {
        if (self->first[e + 1] > 0)
            self->group[(*ret_groups)++] = (struct frame_group){e, self->first[e + 1]};
        self->first[e + 1] += self->first[e];
    }
    uint32_t count = self->first[experts];
    for (uint32_t i = 0; i < items; i++) {
        if (choice[i] == GATE_UNUSED)
            continue;
        uint32_t at = self->first[choice[i]]++; /* becomes the end of its own range */
        self->item_row[at] = i / k;
        self->item_slot[at] = (uint16_t)(i % k);
    }
    return count;
}

static int run_experts(struct whole *self, uint32_t layer, uint32_t rows, const uint16_t *choice,
                       uint64_t *loads) {
    uint32_t groups, items = sort_items(self, choice, rows, &groups);
    for (uint32_t g = 0; g < groups; g++)
        loads[(size_t)layer * self->config->experts + self->group[g].expert] +=
            self->group[g].count;
    engine_gather(self->attention, REGION_NORMED, 0, NULL, rows, self->payload);
    struct program_result result;
    struct program program = {.kind = PROGRAM_SHARED, .layer = layer};
    engine_run(self->attention, &program, &result);
    program = (struct program){.kind = PROGRAM_EXPERT,
                               .layer = layer,
                               .group = self->group,
                               .groups = groups,
                               .item_row = self->item_row,
                               .items = items,
                               .rows = rows,
                               .payload = self->payload};
    engine_run(self->expert, &program, &result);
    if (result.error < 0)
        return result.error;
    program = (struct program){.kind = PROGRAM_SCATTER,
                               .payload = result.output,
                               .items = items,
                               .item_row = self->item_row,
                               .item_slot = self->item_slot};
    engine_run(self->attention, &program, &result);
    program = (struct program){.kind = PROGRAM_COMBINE, .layer = layer};
    engine_run(self->attention, &program, &result);
    return 0;
}

static int score(struct whole *self, uint32_t count, double *ret_logprob) {
    struct program_result result;
    struct program program = {.kind = PROGRAM_FINISH, .select = self->select, .items = count};
    engine_run(self->attention, &program, &result);
    engine_gather(self->attention, REGION_FINAL, 0, NULL, count, self->payload);
    for (uint32_t i = 0; i < count; i++)
        self->spec[i] = (struct sample_spec){
            .flags = SAMPLE_SCORE, .target = self->target[i], .top_p = 1, .repetition_penalty = 1};
    program = (struct program){
        .kind = PROGRAM_SAMPLE, .spec = self->spec, .rows = count, .payload = self->payload};
    engine_run(self->sampler, &program, &result);
    for (uint32_t i = 0; result.error == 0 && i < count; i++)
        *ret_logprob += (double)result.sampled[i].logprob;
    return result.error;
}

/* Rows of all texts, and the pages that they need, cleared. Returns the rows; *ret_count: those
 * with a known next token. */
static uint32_t begin(struct whole *self, const struct whole_text *text, uint32_t texts,
                      const float *bias, uint32_t *ret_count) {
    uint32_t rows = 0;
    *ret_count = 0;
    for (uint32_t t = 0; t < texts; t++) {
        ASSERT(text[t].tokens <= self->positions);
        for (uint32_t p = 0; p < text[t].tokens; p++) {
            if (p + 1 < text[t].tokens) {
                self->select[*ret_count] = rows;
                self->target[(*ret_count)++] = text[t].token[p + 1];
            }
            self->row[rows++] =
                (struct batch_row){.token = text[t].token[p],
                                   .position = p,
                                   .sequence = t,
                                   .form = MLA_EXPANDED,
                                   .pages = self->page + (size_t)t * self->pages_each,
                                   .bias = bias};
        }
    }
    struct program program = {
        .kind = PROGRAM_CLEAR_PAGES, .select = self->page, .items = texts * self->pages_each};
    struct program_result result;
    engine_run(self->attention, &program, &result);
    return rows;
}

int whole_read(struct whole *self, const struct whole_text *text, uint32_t texts, const float *bias,
               uint64_t *rows, double *ret_logprob) {
    ASSERT(texts <= self->texts);
    uint32_t scored, count = begin(self, text, texts, bias, &scored);
    struct program_result result;
    struct program program = {.kind = PROGRAM_EMBED, .rows = count, .row = self->row};
    engine_run(self->attention, &program, &result);
    int error = result.error;
    for (uint32_t layer = 0; error == 0 && layer < self->config->layers; layer++) {
        program = (struct program){.kind = PROGRAM_LAYER, .layer = layer};
        engine_run(self->attention, &program, &result);
        if (result.choice != NULL)
            error = run_experts(self, layer, count, result.choice, rows);
    }
    if (ret_logprob != NULL)
        *ret_logprob = 0;
    if (error == 0 && ret_logprob != NULL && scored > 0)
        error = score(self, scored, ret_logprob);
    return error;
}
