/* The logits of a model's MTP module on given sequences, for `troupe check --golden`. */
#ifndef TROUPE_HOST_GOLDEN_MTP_H
#define TROUPE_HOST_GOLDEN_MTP_H

#include "kernels/ops.h"
#include "model/weights.h"

/* logits: [vocabulary], of the token at position + 2, given those up to position + 1. */
typedef void golden_mtp_visit(void *context, uint32_t sequence, uint32_t position,
                              const float *logits);

/* input: [sequences, positions], tokens of the model. Visits positions 0 .. positions - 2 of each. */
int golden_mtp(const struct model *model, const struct kernels *kernels, bool latent_fp8,
               const int32_t *input, uint32_t sequences, uint32_t positions, golden_mtp_visit *visit, void *context,
               struct failure *failure);

#endif
