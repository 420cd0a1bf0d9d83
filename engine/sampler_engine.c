/* The sampler engine: final hidden rows to logits by the LM head, a block of rows at a time, then
 * one answer per row. */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/internal.h"

/* Bytes of logits that are made at once: rows enough to make the LM head's way from memory cheap,
 * few enough to bound memory. */
#define LOGITS_BYTES (16u << 20)

struct sampler {
    struct packed head;
    uint32_t vocabulary;
    uint32_t block_rows;
    void *x;                  /* [block_rows, hidden_stride] activations, padding zero */
    float *logits;            /* [block_rows, vocabulary] */
    struct sample_work *work; /* [threads] */
    uint8_t *work_memory;
    struct sample_result *result; /* [batch_rows] */
    void *words;
    size_t words_bytes;
};

static void work_layout(struct sample_work *ret, struct layout *layout, uint32_t vocabulary) {
    ret->logits = layout_take(layout, vocabulary, sizeof *ret->logits);
    ret->sum = layout_take(layout, vocabulary, sizeof *ret->sum);
    ret->heap = layout_take(layout, vocabulary, sizeof *ret->heap);
    ret->touched = layout_take(layout, vocabulary, sizeof *ret->touched);
}

int sampler_open(struct engine *self, struct failure *failure) {
    const struct model_config *c = self->config;
    const size_t threads = (size_t)self->parallel.width;
    struct sampler *s = calloc(1, sizeof *s);
    if (s == NULL)
        return fail(failure, ERR_NO_MEMORY, "sampler engine: no memory");
    self->sampler = s;
    s->vocabulary = c->vocabulary;
    uint32_t rows = LOGITS_BYTES / (c->vocabulary * (uint32_t)sizeof(float));
    s->block_rows = rows < 1 ? 1 : rows < self->batch_rows ? rows : self->batch_rows;
    struct sample_work unused;
    struct layout measure = {NULL, 0};
    work_layout(&unused, &measure, c->vocabulary);
    const struct {
        void **ret;
        size_t count, size;
    } parts[] = {
        {&s->x, s->block_rows * self->hidden_stride, self->kernels->activation_bytes},
        {(void **)&s->logits, (size_t)s->block_rows * c->vocabulary, sizeof *s->logits},
        {(void **)&s->work, threads, sizeof *s->work},
        {(void **)&s->work_memory, threads, measure.used},
        {(void **)&s->result, self->batch_rows, sizeof *s->result},
    };
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        *parts[i].ret = memory_take(parts[i].count, parts[i].size, "work space of a sampler",
                                    &self->memory_bytes, failure);
        if (*parts[i].ret == NULL)
            return ERR_NO_MEMORY;
    }
    struct layout layout = {s->work_memory, 0};
    for (size_t t = 0; t < threads; t++)
        work_layout(&s->work[t], &layout, c->vocabulary);
    int error = memory_grow(&s->words, &s->words_bytes, self->batch_rows,
                            2 * TOP_LOGPROBS_MAX * sizeof(uint32_t), "best tokens",
                            &self->memory_bytes, failure);
    if (error != 0)
        return error;
    struct weight_view view = model_weight(self->model, W_LM_HEAD, 0);
    return packed_open_coded(&s->head, self->kernels, &view, 1, "LM head weights",
                             &self->memory_bytes, failure);
}

void sampler_close(struct engine *self) {
    struct sampler *s = self->sampler;
    if (s == NULL)
        return;
    packed_close(&s->head);
    void *const parts[] = {s->x, s->logits, s->work, s->work_memory, s->result, s->words};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        memory_free(parts[i]);
    free(s);
    self->sampler = NULL;
}

/* Where each row's words go; returns how many there are in all. */
static uint64_t place_words(const struct sampler *s, const struct program *program) {
    uint64_t words = 0;
    for (uint32_t r = 0; r < program->rows; r++) {
        const struct sample_spec *spec = &program->spec[r];
        s->result[r] = (struct sample_result){.first_word = (uint32_t)words};
        if (spec->flags & SAMPLE_LOGPROBS)
            words += 2 * (spec->top < s->vocabulary ? spec->top : s->vocabulary);
        if (spec->flags & SAMPLE_FULL_LOGITS)
            words += s->vocabulary;
    }
    return words;
}

struct sample_job {
    const struct engine *engine;
    const struct program *program;
    uint32_t first; /* row of the program that logits row 0 belongs to */
};

/* A broken row must not break comparisons: NaN becomes -infinity, and +infinity the largest number.
 */
void sample_clean(float *logits, uint32_t count) {
    for (uint32_t t = 0; t < count; t++) {
        if (isnan(logits[t]))
            logits[t] = -INFINITY;
        else if (logits[t] > FLT_MAX)
            logits[t] = FLT_MAX;
    }
}

static void sample_rows(void *argument, uint32_t first, uint32_t end, int part) {
    const struct sample_job *job = argument;
    const struct sampler *s = job->engine->sampler;
    for (uint32_t i = first; i < end; i++) {
        uint32_t r = job->first + i;
        float *logits = s->logits + (size_t)i * s->vocabulary;
        sample_clean(logits, s->vocabulary);
        sample_row(&job->program->spec[r], job->program->words, logits, s->vocabulary,
                   &s->work[part], &s->result[r], (uint32_t *)s->words + s->result[r].first_word);
    }
}

void sampler_run(struct engine *self, const struct program *program, struct program_result *ret) {
    struct sampler *s = self->sampler;
    const struct kernels *kernels = self->kernels;
    const size_t row_bytes = self->hidden * kernels->activation_bytes;
    ASSERT(program->rows <= self->batch_rows);
    uint64_t words = place_words(s, program);
    struct failure failure;
    ret->error = words > UINT32_MAX
                     ? ERR_TOO_LARGE
                     : memory_grow(&s->words, &s->words_bytes, words, sizeof(uint32_t),
                                   "answers of a sampler", &self->memory_bytes, &failure);
    if (ret->error != 0)
        return;
    for (uint32_t first = 0; first < program->rows; first += s->block_rows) {
        uint32_t rows = program->rows - first;
        rows = rows < s->block_rows ? rows : s->block_rows;
        for (uint32_t i = 0; i < rows; i++)
            memcpy(activation_at(kernels, s->x, i * self->hidden_stride),
                   (const uint8_t *)program->payload + (first + i) * row_bytes, row_bytes);
        kernels->matmul(&s->head.matrix, s->x, self->hidden_stride, rows, s->logits, s->vocabulary,
                        &self->parallel);
        struct sample_job job = {self, program, first};
        rows_run(&self->parallel, rows, 4 * (size_t)s->vocabulary, sample_rows, &job);
    }
    ret->sampled = s->result;
    ret->words = s->words;
    ret->words_count = (uint32_t)words;
}
