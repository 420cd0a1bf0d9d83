/* A whole model in one process, without actors: the three engines and the loop that actors make of them, for what needs a model's numbers
 * and no troupe (troupe bias-study). Pure. */
#ifndef TROUPE_WHOLE_H
#define TROUPE_WHOLE_H

#include "engine/engine.h"

struct whole_text {
    const uint32_t *token;
    uint32_t tokens; /* at most whole_options.positions */
};

struct whole_options {
    const struct kernels *kernels;
    struct parallel parallel;
    uint32_t texts;     /* most of them at a time */
    uint32_t positions; /* longest text */
    float gate_top_p;   /* 0: off */
    bool latent_fp8;
};

struct whole;
/* Holds everything: the weights of all roles. `model` must outlive it. */
int whole_open(struct whole **ret, const struct model *model, const struct whole_options *options,
               struct failure *failure);
void whole_close(struct whole **self);

/* Takes the texts through the model, each by itself from position 0. bias: [layers, experts] as in struct batch_row, or NULL. rows:
 * [layers, experts], rows routed to each are added. ret_logprob, if not NULL: the sum of the log-probabilities of all tokens but each
 * text's first. 0 or ERR_NO_MEMORY. */
int whole_read(struct whole *self, const struct whole_text *text, uint32_t texts, const float *bias,
               uint64_t *rows, double *ret_logprob);

#endif
