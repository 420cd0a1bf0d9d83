/* Models of a few hundred kilobytes with random weights, made in memory: small enough that thousands of simulated clusters can run them. */
#ifndef TROUPE_SIMULATOR_TINY_MODEL_H
#define TROUPE_SIMULATOR_TINY_MODEL_H

#include "model/tokenizer.h"
#include "model/weights.h"

#define TINY_MODELS 2u /* 0: in the manner of V3 (FP8, sigmoid, groups); 1: of V2-Lite (BF16, softmax, no q_lora) */

#define TINY_FILES_MAX 8u
struct tiny_model {
    struct model *model;
    struct tokenizer *tokenizer;
    struct model_file file[TINY_FILES_MAX]; /* owned */
    uint32_t files;
};

int tiny_model_open(struct tiny_model *ret, uint32_t which, struct failure *failure);
void tiny_model_close(struct tiny_model *self);

#endif
