/* An opened model, for the files of model/ that share it. */
#ifndef TROUPE_MODEL_MODEL_H
#define TROUPE_MODEL_MODEL_H

#include "model/weights.h"

#define TENSOR_NAME_BYTES_MAX 160 /* of the names that roles ask for */

struct model {
    struct model_config config;
    struct safetensors **shard; /* [shards] */
    uint32_t shards;
    const struct tensor **tensor; /* [tensors], ascending name */
    uint32_t tensors;
    char fingerprint[17], config_fingerprint[17];
};

/* Which dtypes a role may have. */
enum weight_kind {
    WEIGHT_MATRIX, /* BF16, F32, or E4M3 with its scales */
    WEIGHT_PLAIN,  /* a matrix that is never quantised: BF16 or F32 */
    WEIGHT_VECTOR, /* BF16 or F32 */
};

/* A tensor that the config asks for: its name and shape. */
struct weight_spec {
    char name[TENSOR_NAME_BYTES_MAX];
    enum weight_kind kind;
    uint32_t rows, columns; /* vectors: rows x 1 */
};

/* True if a model of this config has the weight in this layer (layer is ignored by W_EMBED,
 * W_LM_HEAD, W_FINAL_NORM); then *ret says under which name and with which shape. A tied head asks
 * for the embeddings' tensor. */
bool weight_specify(const struct model_config *config, enum weight which, uint32_t layer,
                    struct weight_spec *ret);
void weight_specify_expert(const struct model_config *config, uint32_t layer, enum expert_part part,
                           uint32_t expert, struct weight_spec *ret);
/* Rows and columns of the scales of an E4M3 matrix. */
uint32_t weight_scale_rows(const struct model_config *config, const struct weight_spec *spec);
uint32_t weight_scale_columns(const struct model_config *config, const struct weight_spec *spec);

/* Every tensor that the config asks for is there, with a dtype that its role allows and the right
 * shape. */
int model_check_weights(const struct model *self, struct failure *failure);
/* Whether gate and up of every routed expert are E4M3 with scales. */
bool model_experts_are_e4m3(const struct model *self);
/* Fills self->fingerprint from the bytes of config.json and the tensors. */
void model_compute_config_fingerprint(struct model *self, const void *config_json, size_t config_bytes);
void model_compute_fingerprint(struct model *self, const void *config_json, size_t config_bytes);

const char *dtype_name(enum dtype dtype);

#endif
