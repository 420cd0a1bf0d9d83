/* A whole model in one process, without actors: the three engines and the loop that actors make of
 * them. What serving must reproduce. */
#ifndef TROUPE_TESTS_ONE_PROCESS_H
#define TROUPE_TESTS_ONE_PROCESS_H

#include <stdbool.h>

#include "engine/engine.h"
#include "router/dispatch.h"
#include "tests/support/model_files.h"

#define ONE_PROCESS_SEQUENCES 8

struct resident_operations;
/* From the next one_process_open() on the attention engine has this device of whole steps; NULL: none. */
void one_process_use_resident(const struct resident_operations *resident);

struct one_process {
    struct model_files files;
    struct model *model;
    const struct model_config *config;
    struct engine *attention, *expert, *sampler;
    uint32_t batch_rows;
    uint32_t *pages; /* [ONE_PROCESS_SEQUENCES][pages_per_sequence] */
    uint32_t pages_per_sequence;
    const float *bias[ONE_PROCESS_SEQUENCES]; /* version of the routing bias of each; NULL: the model's own */
    uint32_t part_items_max; /* largest EXPERT program */
    struct dispatch_plan plan;
    struct placement placement;
    uint32_t *first, *holder;
    struct dispatch_item *items;
    uint32_t *item_row;
    uint16_t *item_slot;
    void *rows; /* gathered activations */
    struct sample_spec *spec;
};

/* Room for sequences of `positions` and batches of `batch_rows`. Prints what is wrong and returns
 * false if it cannot be opened. */
bool one_process_open(struct one_process *self, const char *directory,
                      const struct kernels *kernels, const struct parallel *parallel,
                      uint32_t batch_rows, uint32_t positions);
/* The same with random weights of a shape (model/synth.h). */
bool one_process_open_shape(struct one_process *self, const char *shape_json, uint64_t seed,
                            const struct kernels *kernels, const struct parallel *parallel,
                            uint32_t batch_rows, uint32_t positions);
void one_process_close(struct one_process *self);
/* Of those that are opened from now on: latents in the cache are E4M3. */
void one_process_use_latent_fp8(bool on);
/* Rows go to experts as kernels/e4m3_row.h has them (fp8 profile). */
void one_process_use_e4m3_rows(bool on);

/* A row of one of the sequences 0..ONE_PROCESS_SEQUENCES-1. */
struct batch_row one_process_row(const struct one_process *self, uint32_t sequence,
                                 uint32_t position, uint32_t token, enum mla_form form);
/* One step. ret_logits: [selected, vocabulary] raw logits of batch rows select[]; NULL: they are
 * not made. */
void one_process_step(struct one_process *self, const struct batch_row *row, uint32_t rows,
                      const uint32_t *select, uint32_t selected, float *ret_logits);
/* Forgets a sequence: its pages are cleared. */
void one_process_forget(struct one_process *self, uint32_t sequence);

/* Three parts, run in descending order: what depends on the order of parts or on how work is cut
 * gives other bits than PARALLEL_SERIAL. */
extern const struct parallel PARALLEL_REVERSED;

#endif
