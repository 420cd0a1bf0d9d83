/* troupe bias-study: what routing biases that follow the load (coordinator/bias.c) do to balance
 * and to quality, for a range of clamps.
 *
 * Each text is cut into windows; its first half is held in, its second half held out. For each
 * clamp the biases start at nothing, follow the load of the held-in windows step by step as they
 * would online, then stand still while both halves are measured: imbalance of the rows per layer,
 * and perplexity. Then the same with all texts together, which take turns. */
#include <inttypes.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "actors/host/commands.h"
#include "actors/host/files.h"
#include "actors/host/pool.h"
#include "actors/host/process.h"
#include "coordinator/bias.h"
#include "engine/whole.h"

#define CLAMPS        "0,0.01,0.02,0.05,0.1"
#define CLAMPS_MAX    16
#define TEXTS_MAX     (POSITIONAL_MAX + 1)
#define TEXT_BYTES    (64u << 20)
#define GAMMA         0.002
#define STEPS         100
#define WINDOW_TOKENS 512
#define ROWS_AT_ONCE  2048 /* of a measurement */

/* Windows of a text, or of all: those of the first half, then the others. */
struct half {
    struct whole_text *window; /* owned */
    uint32_t windows;
};
struct subject {
    char name[256];
    struct half half[2]; /* held in, held out */
};

/* What one half shows under one clamp. */
struct figures {
    double mean, worst; /* imbalance over the layers */
    double perplexity;
    uint64_t tokens; /* that the perplexity is of */
};

struct study {
    const struct options *options;
    struct model_directory directory;
    const struct model_config *config;
    struct tokenizer *tokenizer;
    struct pool *pool;
    struct whole *whole;
    uint32_t at_once; /* windows of a measurement that are read together */
    struct token_list token[TEXTS_MAX];
    struct subject subject[TEXTS_MAX + 1];
    uint32_t subjects;
    double clamp[CLAMPS_MAX];
    uint32_t clamps;
    double gamma;
    uint32_t steps, window_tokens, pairs;
    float *delta;   /* [pairs] */
    uint64_t *rows; /* [pairs] */
    json_t *json;
};

/* ---- what is asked ---- */

static int read_clamps(struct study *self, struct failure *failure) {
    const char *text = self->options->clamps != NULL ? self->options->clamps : CLAMPS;
    for (const char *at = text;;) {
        char *end;
        double clamp = strtod(at, &end);
        if (end == at || (*end != ',' && *end != 0) || !(clamp >= 0 && clamp <= BIAS_DELTA_MAX) ||
            self->clamps == CLAMPS_MAX)
            return fail(failure, ERR_INVALID,
                        "--clamps: expected at most %d numbers from 0 to %d with commas between, "
                        "found '%s'",
                        CLAMPS_MAX, BIAS_DELTA_MAX, at);
        self->clamp[self->clamps++] = clamp;
        if (*end == 0)
            return 0;
        at = end + 1;
    }
}

static const char *base_name(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash != NULL ? slash + 1 : path;
}

static int add_window(struct half *half, const uint32_t *token, uint32_t tokens) {
    struct whole_text *grown = realloc(half->window, (half->windows + 1) * sizeof *grown);
    if (grown == NULL)
        return ERR_NO_MEMORY;
    half->window = grown;
    half->window[half->windows++] = (struct whole_text){token, tokens};
    return 0;
}

/* What is left over at the end of a text is left out: windows are equal. */
static int read_text(struct study *self, const char *path, struct failure *failure) {
    struct mapped file;
    struct subject *subject = &self->subject[self->subjects];
    struct token_list *list = &self->token[self->subjects];
    int error = mapped_open_path(&file, path, TEXT_BYTES, failure);
    if (error < 0)
        return error;
    error = tokenizer_encode(self->tokenizer, file.bytes, file.size, false, true, list, failure);
    mapped_close(&file);
    uint32_t windows = list->count / self->window_tokens;
    if (error == 0 && windows < 2)
        error = fail(failure, ERR_INVALID,
                     "%s: expected at least two windows of %u tokens, found %u tokens", path,
                     self->window_tokens, list->count);
    snprintf(subject->name, sizeof subject->name, "%s", base_name(path));
    for (uint32_t w = 0; error == 0 && w < windows; w++)
        if (add_window(&subject->half[w >= windows / 2],
                       list->token + (size_t)w * self->window_tokens, self->window_tokens) < 0)
            error = fail(failure, ERR_NO_MEMORY, "%s: no memory for its windows", path);
    self->subjects++;
    return error;
}

/* All texts take turns, window by window. */
static int add_all(struct study *self, struct failure *failure) {
    struct subject *all = &self->subject[self->subjects];
    uint32_t texts = self->subjects, left = 1;
    snprintf(all->name, sizeof all->name, "all together");
    for (uint32_t w = 0; left > 0; w++) {
        left = 0;
        for (uint32_t i = 0; i < 2 * texts; i++) {
            const struct half *half = &self->subject[i / 2].half[i % 2];
            left += w < half->windows;
            if (w < half->windows &&
                add_window(&all->half[i % 2], half->window[w].token, half->window[w].tokens) < 0)
                return fail(failure, ERR_NO_MEMORY, "no memory for windows");
        }
    }
    self->subjects++;
    return 0;
}

static int read_texts(struct study *self, struct failure *failure) {
    int error = read_text(self, self->options->text, failure);
    for (int i = 0; error == 0 && i < self->options->positionals; i++)
        error = read_text(self, self->options->positional[i], failure);
    return error == 0 && self->subjects > 1 ? add_all(self, failure) : error;
}

static int open_study(struct study *self, struct failure *failure) {
    const struct options *options = self->options;
    self->gamma = options->gamma > 0 ? options->gamma : GAMMA;
    self->steps = options->steps > 0 ? (uint32_t)options->steps : STEPS;
    self->window_tokens =
        options->window_tokens > 0 ? (uint32_t)options->window_tokens : WINDOW_TOKENS;
    numerics_enter();
    int error = read_clamps(self, failure);
    if (error == 0)
        error = model_directory_open(&self->directory, options->model, failure);
    if (error < 0)
        return error;
    self->config = model_config(self->directory.model);
    self->pairs = self->config->layers * self->config->experts;
    if (self->config->experts == 0)
        return fail(failure, ERR_UNSUPPORTED, "%s: the model has no routed experts",
                    options->model);
    if (self->window_tokens > self->config->context)
        return fail(failure, ERR_TOO_LARGE, "--window-tokens: the model's context is %u",
                    self->config->context);
    error = tokenizer_directory_open(&self->tokenizer, options->model, failure);
    if (error == 0)
        error = read_texts(self, failure);
    if (error == 0)
        error = pool_open(&self->pool,
                          options->settings.threads > 0 ? (int)options->settings.threads
                                                        : pool_processors(),
                          failure);
    if (error < 0)
        return error;
    self->at_once = self->window_tokens < ROWS_AT_ONCE ? ROWS_AT_ONCE / self->window_tokens : 1;
    struct whole_options whole = {.kernels = options_kernels(options, failure),
                                  .parallel = pool_parallel(self->pool),
                                  .texts = self->at_once,
                                  .positions = self->window_tokens,
                                  .gate_top_p = (float)options->settings.gate_top_p,
                                  .latent_fp8 = options->settings.latent_fp8 != 0};
    if (whole.kernels == NULL)
        return failure->code;
    self->delta = calloc(self->pairs, sizeof *self->delta);
    self->rows = calloc(self->pairs, sizeof *self->rows);
    if (self->delta == NULL || self->rows == NULL)
        return fail(failure, ERR_NO_MEMORY, "no memory for biases of %u experts", self->pairs);
    return whole_open(&self->whole, self->directory.model, &whole, failure);
}

static void close_study(struct study *self) {
    whole_close(&self->whole);
    pool_close(&self->pool);
    if (self->tokenizer != NULL)
        tokenizer_close(&self->tokenizer);
    model_directory_close(&self->directory);
    for (uint32_t i = 0; i < TEXTS_MAX; i++)
        token_list_free(&self->token[i]);
    for (uint32_t i = 0; i <= TEXTS_MAX; i++)
        for (int h = 0; h < 2; h++)
            free(self->subject[i].half[h].window);
    free(self->delta);
    free(self->rows);
    json_decref(self->json);
}

/* ---- running ---- */

/* As online: each step's rows are routed by the biases of the step before. */
static int follow(struct study *self, const struct half *half, double clamp,
                  struct failure *failure) {
    const struct bias_rule rule = {self->gamma, clamp};
    uint32_t experts = self->config->experts;
    memset(self->delta, 0, self->pairs * sizeof *self->delta);
    for (uint32_t step = 0; clamp > 0 && step < self->steps; step++) {
        memset(self->rows, 0, self->pairs * sizeof *self->rows);
        if (whole_read(self->whole, &half->window[step % half->windows], 1, self->delta, self->rows,
                       NULL) < 0)
            return fail(failure, ERR_NO_MEMORY, "no memory for a window of %u tokens",
                        self->window_tokens);
        for (uint32_t layer = 0; layer < self->config->layers; layer++)
            if (model_layer_is_moe(self->config, layer))
                bias_step(self->delta + (size_t)layer * experts,
                          self->rows + (size_t)layer * experts, experts, &rule);
    }
    return 0;
}

static int measure(struct study *self, const struct half *half, struct figures *ret,
                   struct failure *failure) {
    double logprob = 0;
    uint32_t layers = 0;
    *ret = (struct figures){0};
    memset(self->rows, 0, self->pairs * sizeof *self->rows);
    for (uint32_t w = 0; w < half->windows; w += self->at_once) {
        uint32_t count = half->windows - w < self->at_once ? half->windows - w : self->at_once;
        double sum;
        if (whole_read(self->whole, &half->window[w], count, self->delta, self->rows, &sum) < 0)
            return fail(failure, ERR_NO_MEMORY, "no memory for windows of %u tokens",
                        self->window_tokens);
        logprob += sum;
        ret->tokens += (uint64_t)count * (self->window_tokens - 1);
    }
    for (uint32_t layer = 0; layer < self->config->layers; layer++) {
        if (!model_layer_is_moe(self->config, layer))
            continue;
        double imbalance = bias_imbalance(self->rows + (size_t)layer * self->config->experts,
                                          self->config->experts);
        ret->mean += imbalance;
        ret->worst = imbalance > ret->worst ? imbalance : ret->worst;
        layers++;
    }
    ret->mean /= layers;
    ret->perplexity = exp(-logprob / (double)ret->tokens);
    return 0;
}

/* ---- what is said ---- */

static json_t *figures_json(const struct figures *figures) {
    return json_pack("{s:{s:f, s:f}, s:f, s:I}", "imbalance", "mean", figures->mean, "worst",
                     figures->worst, "perplexity", figures->perplexity, "tokens",
                     (json_int_t)figures->tokens);
}

static void print_head(const struct subject *subject) {
    printf("\n%s: %u windows held in, %u held out\n", subject->name, subject->half[0].windows,
           subject->half[1].windows);
    printf("%8s | %-33s | %s\n", "", "held in: imbalance, perplexity",
           "held out: imbalance, perplexity");
    printf("%8s | %7s %7s %9s %7s | %7s %7s %9s %7s\n", "clamp", "mean", "worst", "perpl.",
           "change", "mean", "worst", "perpl.", "change");
}

static void print_row(double clamp, const struct figures figures[2],
                      const struct figures first[2]) {
    printf("%8g", clamp);
    for (int h = 0; h < 2; h++)
        printf(" | %7.3f %7.3f %9.4f %+6.2f%%", figures[h].mean, figures[h].worst,
               figures[h].perplexity, 100 * (figures[h].perplexity / first[h].perplexity - 1));
    printf("\n");
    fflush(stdout);
}

static int study_subject(struct study *self, const struct subject *subject,
                         struct failure *failure) {
    struct figures figures[2], first[2] = {0};
    json_t *rows = json_array();
    int error = 0;
    if (!self->options->as_json)
        print_head(subject);
    for (uint32_t c = 0; error == 0 && c < self->clamps; c++) {
        error = follow(self, &subject->half[0], self->clamp[c], failure);
        for (int h = 0; error == 0 && h < 2; h++)
            error = measure(self, &subject->half[h], &figures[h], failure);
        if (error < 0)
            break;
        if (c == 0)
            memcpy(first, figures, sizeof first);
        json_array_append_new(rows, json_pack("{s:f, s:o, s:o}", "clamp", self->clamp[c], "held_in",
                                              figures_json(&figures[0]), "held_out",
                                              figures_json(&figures[1])));
        if (!self->options->as_json)
            print_row(self->clamp[c], figures, first);
    }
    json_array_append_new(self->json,
                          json_pack("{s:s, s:o}", "text", subject->name, "clamps", rows));
    return error;
}

static int run(struct study *self, struct failure *failure) {
    int error = open_study(self, failure);
    self->json = json_array();
    if (error == 0 && !self->options->as_json)
        printf("biases move by %g, %u steps of %u tokens; imbalance: (max - mean) / mean of a "
               "layer's rows\n",
               self->gamma, self->steps, self->window_tokens);
    for (uint32_t i = 0; error == 0 && i < self->subjects; i++)
        error = study_subject(self, &self->subject[i], failure);
    if (error == 0 && self->options->as_json) {
        json_t *all = json_pack("{s:f, s:I, s:I, s:O}", "gamma", self->gamma, "steps",
                                (json_int_t)self->steps, "window_tokens",
                                (json_int_t)self->window_tokens, "texts", self->json);
        json_dumpf(all, stdout, JSON_INDENT(1) | JSON_REAL_PRECISION(9));
        printf("\n");
        json_decref(all);
    }
    return error;
}

int command_bias_study(const struct options *options) {
    struct failure failure = {0};
    if (options->text == NULL) {
        fprintf(
            stderr,
            "troupe bias-study: expected --text FILE [FILE ...]; see troupe bias-study --help\n");
        return 2;
    }
    static struct study study;
    study = (struct study){.options = options};
    int error = run(&study, &failure);
    close_study(&study);
    if (error < 0) {
        fprintf(stderr, "troupe bias-study: %s\n", failure.text);
        return 1;
    }
    return 0;
}
