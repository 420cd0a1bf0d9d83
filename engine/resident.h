/* A device that takes a step whole: it holds the weights of all layers, routed experts included,
 * and the latent cache, and computes a batch from tokens to final rows. An attention engine that is
 * given one asks nobody: LAYER does nothing and reports no choice. Filled by engine/cuda/resident.c
 * where CUDA is. */
#ifndef TROUPE_ENGINE_RESIDENT_H
#define TROUPE_ENGINE_RESIDENT_H

#include "engine/engine.h"

struct resident_operations {
    /* ERR_NO_MEMORY names what for, ERR_UNSUPPORTED what it has no kernels for. Adds to *bytes. */
    int (*open)(void **ret, const struct model *model, const struct engine_options *options,
                uint64_t *bytes, struct failure *failure);
    void (*close)(void *self);
    /* All layers, to their end. Rows keep the rules of struct batch_row. */
    void (*step)(void *self, const struct batch_row *row, uint32_t rows);
    /* Final row of a row of the last step: [hidden] activations. */
    const void *(*final)(void *self, uint32_t row);
    void (*clear)(void *self, const uint32_t *pages, uint32_t count);
};

#endif
