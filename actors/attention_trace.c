/* Where a traced sequence's steps spend their time, and who works on them: what SUBMIT's `trace` asks
 * for and GET /troupe/requests/ID shows. A step is shared by all sequences of its batch; each of them is
 * told the whole of it.
 *
 *   LAYER ended -> SHARED began    dispatch: replicas chosen, rows sent
 *               -> last answer     experts: theirs, with the shared expert meanwhile
 *               -> COMBINE ended   combine
 *               -> LAYER ended     attention of the next layer, up to its gate
 *
 * A model without shared experts has no mark at the end of dispatch: it counts as experts. Nothing but
 * the queueing time is kept while nobody in the batch is traced. */
#include "actors/attention.h"

#include <stdlib.h>
#include <string.h>

enum stage { STAGE_ATTENTION, STAGE_DISPATCH, STAGE_EXPERTS, STAGE_COMBINE, STAGES };

bool step_trace_init(struct attention *self) {
    self->trace.layer_ns = calloc((size_t)self->config.layers * STAGES + 1, sizeof(uint64_t));
    return self->trace.layer_ns != NULL;
}

void step_trace_free(struct attention *self) {
    free(self->trace.layer_ns);
}

bool sequence_trace_create(const struct attention *self, struct sequence *sequence) {
    struct sequence_trace *trace = calloc(1, sizeof *trace);
    sequence->trace = trace;
    if (trace == NULL)
        return false;
    trace->layer_ns = calloc((size_t)self->config.layers * STAGES + 1, sizeof(uint64_t));
    trace->worker = calloc(TRACE_WORKERS_MAX, sizeof *trace->worker);
    return trace->layer_ns != NULL && trace->worker != NULL;
}

void sequence_trace_free(struct sequence *sequence) {
    if (sequence->trace == NULL)
        return;
    free(sequence->trace->layer_ns);
    free(sequence->trace->worker);
    free(sequence->trace);
    sequence->trace = NULL;
}

/* ---- a step ---- */

void step_trace_begin(struct attention *self) {
    struct batch *batch = &self->batch;
    struct step_trace *trace = &self->trace;
    trace->sequences = 0;
    for (uint32_t i = 0; i < batch->sequences; i++) {
        struct sequence *sequence = batch->sequence[i];
        if (!sequence->stepped) {
            sequence->stepped = true;
            sequence->begun_ns = self->now_ns;
        }
        trace->sequences += sequence->trace != NULL;
    }
    if (trace->sequences == 0)
        return;
    trace->begin_ns = trace->mark_ns = self->now_ns;
    trace->resent = self->frames_resent;
    trace->hedged = self->frames_hedged;
    memset(trace->layer_ns, 0, (size_t)self->config.layers * STAGES * sizeof(uint64_t));
}

static void mark(struct attention *self, uint32_t layer, enum stage stage, uint64_t at_ns) {
    struct step_trace *trace = &self->trace;
    if (at_ns <= trace->mark_ns || layer >= self->config.layers) /* layers of guesses come after them */
        return;
    trace->layer_ns[(size_t)layer * STAGES + stage] += at_ns - trace->mark_ns;
    trace->mark_ns = at_ns;
}

void step_trace_computed(struct attention *self, const struct program_result *result) {
    uint64_t ended_ns = result->ended_ns != 0 ? result->ended_ns : self->now_ns;
    if (self->trace.sequences == 0)
        return;
    switch (result->kind) {
    case PROGRAM_LAYER:
        mark(self, result->layer, STAGE_ATTENTION, ended_ns);
        break;
    case PROGRAM_SHARED:
        mark(self, result->layer, STAGE_DISPATCH,
             result->began_ns != 0 ? result->began_ns : ended_ns);
        break;
    case PROGRAM_COMBINE:
        mark(self, result->layer, STAGE_COMBINE, ended_ns);
        break;
    case PROGRAM_EMBED:
    case PROGRAM_CLEAR_PAGES:
    case PROGRAM_FINISH: /* of no layer */
        self->trace.mark_ns = ended_ns > self->trace.mark_ns ? ended_ns : self->trace.mark_ns;
        break;
    default:
        break;
    }
}

void step_trace_answered(struct attention *self) {
    if (self->trace.sequences > 0)
        mark(self, self->batch.layer, STAGE_EXPERTS, self->now_ns);
}

static void count_worker(struct sequence_trace *trace, actor_id id) {
    uint32_t place = 0;
    while (place < trace->workers && trace->worker[place].id != id)
        place++;
    if (place == TRACE_WORKERS_MAX)
        return;
    if (place == trace->workers)
        trace->worker[trace->workers++] = (struct trace_worker){.id = id};
    trace->worker[place].rows++;
}

void step_trace_scatter(struct attention *self, actor_id from, const uint32_t *item_row,
                   uint32_t count) {
    const struct batch *batch = &self->batch;
    for (uint32_t i = 0; self->trace.sequences > 0 && i < count; i++) {
        struct sequence *sequence = self->running[batch->row[item_row[i]].sequence];
        if (sequence != NULL && sequence->trace != NULL)
            count_worker(sequence->trace, from);
    }
}

void step_trace_sampled(struct attention *self, actor_id from, const struct sequence *sequence) {
    if (sequence->trace != NULL)
        sequence->trace->sampler = from;
}

void step_trace_sampling(struct attention *self) {
    self->trace.mark_ns = self->now_ns;
}

void step_trace_end(struct attention *self) {
    struct batch *batch = &self->batch;
    const struct step_trace *step = &self->trace;
    uint64_t step_ns = self->now_ns - step->begin_ns;
    for (uint32_t i = 0; step->sequences > 0 && i < batch->sequences; i++) {
        struct sequence *sequence = batch->sequence[i];
        struct sequence_trace *trace = sequence->trace;
        if (trace == NULL)
            continue;
        trace->steps++;
        trace->step_ns += step_ns;
        if (sequence->computed < sequence->given_tokens)
            trace->prefill_ns += step_ns;
        if (batch->questions > 0)
            trace->sample_ns += self->now_ns - step->mark_ns;
        trace->resent += self->frames_resent - step->resent;
        trace->hedged += self->frames_hedged - step->hedged;
        for (size_t n = 0; n < (size_t)self->config.layers * STAGES; n++)
            trace->layer_ns[n] += step->layer_ns[n];
    }
    self->trace.sequences = 0;
}

/* ---- what gateways are told ---- */

Troupe__Trace *step_trace_tell(const struct attention *self, struct sequence *sequence,
                          struct effects *out) {
    struct sequence_trace *trace = sequence->trace;
    size_t stages = (size_t)self->config.layers * STAGES;
    Troupe__Trace *told = effects_alloc(out, sizeof *told);
    troupe__trace__init(told);
    told->steps = trace->steps;
    told->step_ns = trace->step_ns;
    told->prefill_ns = trace->prefill_ns;
    told->sample_ns = trace->sample_ns;
    told->resent = trace->resent;
    told->hedged = trace->hedged;
    told->sampler = trace->sampler;
    told->n_layer_ns = stages;
    told->layer_ns = effects_copy(out, trace->layer_ns, stages * sizeof(uint64_t));
    told->n_actor = told->n_rows = trace->workers;
    told->actor = effects_alloc(out, (trace->workers + 1) * sizeof(uint32_t));
    told->rows = effects_alloc(out, (trace->workers + 1) * sizeof(uint32_t));
    for (uint32_t i = 0; i < trace->workers; i++) {
        told->actor[i] = trace->worker[i].id;
        told->rows[i] = trace->worker[i].rows;
    }
    trace->workers = 0;
    return told;
}
