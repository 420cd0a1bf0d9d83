/* An engine is an actor's device: it holds the weights of one role, repacked, and its working memory, and runs programs that the
 * actor asks for with COMPUTE effects. Actors see only what the results say; rows stay in the engine and are moved by gather (into a
 * frame) and scatter (out of one). Pure computation: weights come as views into mapped files, threads as struct parallel.
 *
 * One layer on an attention engine, with the regions of batch slot s:
 *   EMBED        tokens -> residual                                                   (start of a step)
 *   LAYER l      residual -> norm -> MLA (writes the latent cache) -> residual -> norm -> normed;
 *                dense layer: MLP -> residual, done; MoE layer: gate -> choice (result), weights kept
 *   SHARED l     normed -> shared expert                                               (while experts work)
 *   SCATTER      rows of a COMBINE frame -> expert outputs [row, slot]
 *   COMBINE l    expert outputs, shared -> residual, in fixed order (router/combine.h)
 *   FINISH       chosen rows: residual -> final norm -> final rows
 *   DRAFT        rows whose next token is known: entries of the MTP module's cache, guesses of what follows (engine/draft.c) */
#ifndef TROUPE_ENGINE_H
#define TROUPE_ENGINE_H

#include "engine/sample.h"
#include "kernels/ops.h"
#include "model/weights.h"
#include "proto/frame.h"

enum engine_role { ENGINE_ATTENTION, ENGINE_EXPERT, ENGINE_SAMPLER };

/* Which MLA form a row takes: a property of its token (prompt or generated), never of the schedule. */
enum mla_form { MLA_EXPANDED, MLA_ABSORBED };

struct batch_row {
    uint32_t token;
    uint32_t position;
    uint32_t sequence;    /* small number, equal for rows of one sequence; rows of one sequence are neighbours, ascending position */
    uint8_t form;         /* enum mla_form; within a sequence all EXPANDED rows come before all ABSORBED rows */
    const uint32_t *pages; /* page numbers of the sequence: page of position p is pages[p / PAGE_TOKENS]; owned by the actor */
    const float *bias;     /* [layers, experts] added to the model's own correction biases, which choose this row's experts (version of
                              the routing bias that its request is pinned to); NULL: nothing. Owned by the actor until the step ends */
};

#define BATCH_SLOTS_MAX 2 /* micro-batches in flight */

enum program_kind {
    PROGRAM_EMBED,   /* slot, rows, row[] */
    PROGRAM_LAYER,   /* slot, layer (rows from EMBED) */
    PROGRAM_SHARED,  /* slot, layer */
    PROGRAM_SCATTER, /* slot, payload [items, hidden] float, item_row[], item_slot[], items; stays */
    PROGRAM_COMBINE, /* slot, layer */
    PROGRAM_FINISH,  /* slot, select[] batch rows, items = how many: final row i is batch row select[i] */
    PROGRAM_CLEAR_PAGES, /* select[] page numbers, items: zeroes them (a page is cleared when it is handed to a sequence) */
    PROGRAM_EXPERT,  /* layer, group[], groups, item_row[], items, payload = rows of activations or, e4m3, of kernels/e4m3_row.h, rows */
    PROGRAM_DRAFT,   /* slot, draft[], items; spec[] and words[] of those that want guesses, in order (rows from EMBED, layers all done) */
    PROGRAM_READ,    /* expert engine: layer, items = expert, offset, bytes: of its packed weights */
    PROGRAM_SAMPLE,  /* spec[], rows, words[], words_count, payload = hidden rows */
};

/* A row of the batch whose next token is known by now. Those with no steps come first. */
struct draft_row {
    uint32_t row;   /* of the batch */
    uint32_t next;  /* token at its position + 1 */
    uint32_t steps; /* guesses wanted: at the positions + 2 and on; its pages hold the positions up to + steps - 1 */
};

/* Pointers are borrowed until the program has completed (its COMPUTED event has been delivered). */
struct program {
    enum program_kind kind;
    uint32_t slot, layer;
    uint32_t rows, items, groups;
    const struct batch_row *row;
    const uint32_t *select;
    const struct frame_group *group;
    const uint32_t *item_row;
    const uint16_t *item_slot;
    const struct sample_spec *spec; /* DRAFT: counters are those of the first guesses */
    const struct draft_row *draft;
    const uint32_t *words;
    uint32_t words_count;
    const void *payload;
    bool e4m3;
    uint64_t offset;
    uint32_t bytes;
    uint32_t answer_to; /* EXPERT: the actor that the output will go to, 0: not known. For hosts that want it written in its place */
    void *output;       /* EXPERT: filled in by such hosts: [items, hidden] float, 64-byte aligned; NULL: the engine's own memory */
    bool sum;           /* EXPERT: the host wants output_crc */
    bool stays;         /* SCATTER: the payload stays in its place as long as engine_keeps() says that it is needed, or until the host
                           has called engine_take_in(); else it is copied */
    uint64_t tag;       /* copied into the result */
};
#define WEIGHTS_CHUNK_MAX WEIGHTS_BYTES_MAX /* bytes of one PROGRAM_READ */

struct program_result {
    enum program_kind kind;
    uint32_t slot, layer, rows, items;
    uint64_t tag;
    int error; /* 0 or negative */
    uint64_t began_ns, ended_ns; /* by the clock of a host that knows; 0: it does not */
    /* LAYER of an MoE layer: [rows, k] experts as chosen, valid until the slot's next LAYER; NULL for dense layers. */
    const uint16_t *choice;
    uint32_t k;
    /* SAMPLE: [rows] results and their words; EXPERT: [items, hidden] float at `output`. Valid until the engine's next program. */
    const struct sample_result *sampled;
    /* DRAFT: `words` are the guesses, [rows that want some, mtp_steps], of which `steps` count; `output` the raw logits of the last
     * guesses (tests look at them). */
    const uint32_t *words;
    uint32_t words_count;
    const float *output;
    uint32_t output_crc; /* EXPERT, if asked for: CRC32C of the output */
    /* READ: piece_bytes of `total`, and the CRC32C of all; total 0: there is nothing to read. */
    const void *piece;
    uint32_t piece_bytes, crc;
    uint64_t total;
};

/* Regions that TRANSFER gathers rows from. */
enum region {
    REGION_NONE,
    REGION_NORMED, /* attention, slot: [rows] activations for DISPATCH */
    REGION_NORMED_E4M3, /* the same rows as kernels->row_to_e4m3 makes them (profile fp8) */
    REGION_FINAL,  /* attention, slot: [selected] activations for SAMPLE */
    REGION_EXPERT_OUTPUT, /* expert: [items, hidden] float of the last EXPERT program */
};

struct engine;
struct resident_operations; /* engine/resident.h */

/* Packed weights lie in large regions, aligned to pages of 2 MiB. A host that can ask its system for such
 * pages says how, before it opens the first engine; it changes nothing but speed. Unset: nobody asks. */
void engine_set_huge_pages(void (*ask)(void *memory, size_t bytes));

struct engine_options {
    enum engine_role role;
    const struct kernels *kernels;
    struct parallel parallel;
    uint32_t batch_rows; /* largest batch, or largest frame rows (expert, sampler) */
    uint32_t batch_slots; /* attention: 1 or 2 */
    uint32_t pages;      /* attention: pages of the latent cache */
    uint32_t experts_per_token_override; /* 0: the model's */
    float gate_top_p;    /* 0: off */
    bool latent_fp8;     /* attention: latents in the cache have the values of their E4M3 form (kernels/ops.h); not in the f32 profile */
    const struct resident_operations *resident; /* attention: a device of whole steps; NULL: none */
    uint32_t mtp_steps;  /* attention: most guesses of a row; 0: the MTP module is left out */
};

/* Takes views into `model`, which must outlive the engine; all weights of ATTENTION and SAMPLER are packed here; EXPERT starts empty.
 * ERR_NO_MEMORY names how many bytes for what. */
int engine_open(struct engine **ret, const struct model *model, const struct engine_options *options,
                struct failure *failure);
void engine_close(struct engine **self);

/* Runs one program to its end. Never fails for programs that keep the rules above; breaking them is a bug (assertion), so actors check
 * what came from outside first. */
void engine_run(struct engine *self, const struct program *program, struct program_result *ret);

/* Bytes of one row of a region as it goes into a frame (without padding: hidden * element size). */
uint32_t engine_row_bytes(const struct engine *self, enum region region);
/* Copies rows index[0..count) of a region to ret, one after the other, engine_row_bytes apart; index NULL: rows 0..count-1. */
void engine_gather(const struct engine *self, enum region region, uint32_t slot,
                   const uint32_t *index, uint32_t count, void *ret);

/* ATTENTION: whether outputs that SCATTER left in their place are still needed: until their COMBINE, or until their slot begins
 * something else. */
bool engine_keeps(const struct engine *self);
/* Copies them, so that they need stay no longer. */
void engine_take_in(struct engine *self);

/* EXPERT: packing of one (layer, expert). engine_expert_pack may run in any thread, beside engine_run; publishing and dropping happen
 * in the actor's thread between programs. */
struct expert_weights;
int engine_expert_pack(const struct model *model, const struct kernels *kernels, uint32_t layer,
                       uint32_t expert, struct expert_weights **ret, struct failure *failure);
/* The same from what PROGRAM_READ has given elsewhere, in any thread; the CRC was checked by the caller. */
int engine_expert_unpack(const struct model_config *config, const struct kernels *kernels,
                         uint32_t layer, uint32_t expert, const void *image, size_t bytes,
                         struct expert_weights **ret, struct failure *failure);
/* No image of an expert of this model is larger. */
uint64_t engine_expert_image_limit(const struct model_config *config);
void engine_expert_free(struct expert_weights **weights);
void engine_expert_publish(struct engine *self, uint32_t layer, uint32_t expert,
                           struct expert_weights **weights); /* takes it */
void engine_expert_drop(struct engine *self, uint32_t layer, uint32_t expert); /* absent: nothing */
/* False for numbers that the model does not have, so it may be asked about what a frame names. */
bool engine_expert_held(const struct engine *self, uint32_t layer, uint32_t expert);

uint64_t engine_memory_bytes(const struct engine *self);

/* ATTENTION: the next piece of the latent cache, from its beginning on, that the system should give memory for
 * before rows are written there: what it costs to clear fresh memory is then paid by nobody who waits. Returns its
 * bytes, at most 2 MiB; 0: nothing is wanted as long as `ahead_bytes` beyond what rows have used are given. One
 * thread at a time, beside engine_run; it may change nothing there (adding 0 to a byte is right), for rows may come
 * at any moment. */
size_t engine_cache_ahead(struct engine *self, size_t ahead_bytes, void **ret);
/* Whether that would give something; any thread. */
bool engine_cache_wants(const struct engine *self, size_t ahead_bytes);
/* Bytes that an engine with these options takes on the device of its kernels as soon as it opens: weights, and the rows
 * of its largest batch on their way through a product. 0 where the kernels have no device. (The expanded form's keys and values grow with
 * the prompt and are not in it, nor is what an EXPERT engine is given to hold: engine_expert_pack looks for itself.) */
uint64_t engine_device_bytes(const struct model *model, const struct engine_options *options);

#endif
