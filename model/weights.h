/* The tensors of a model directory: checked safetensors shards, and the view of each weight by its role. Pure: files are mapped by
 * the host and handed in as bytes; nothing is copied. */
#ifndef TROUPE_MODEL_WEIGHTS_H
#define TROUPE_MODEL_WEIGHTS_H

#include "model/config.h"

struct tensor {
    const char *name; /* owned by the safetensors object */
    enum dtype dtype;
    uint32_t dims; /* up to 4 */
    uint64_t shape[4];
    const void *data; /* inside the mapped file */
    uint64_t bytes;
};

/* One shard. Refuses: truncated file, header over SAFETENSORS_HEADER_MAX, invalid JSON, duplicate names, offsets out of range,
 * overlapping or with holes, sizes that disagree with dtype x shape. The bytes must outlive it. */
struct safetensors;
int safetensors_open(struct safetensors **ret, const void *bytes, size_t size, const char *file_name,
                     struct failure *failure);
void safetensors_close(struct safetensors **self);
uint32_t safetensors_count(const struct safetensors *self);
const struct tensor *safetensors_at(const struct safetensors *self, uint32_t index);
const struct tensor *safetensors_find(const struct safetensors *self, const char *name);

/* A model directory, as the host read it. */
struct model_file {
    const char *name; /* relative to the directory */
    const void *bytes;
    size_t size;
};

/* All of a model: config and tensors, each tensor's presence, dtype and shape checked against the config. */
struct model;
int model_open(struct model **ret, const struct model_file *files, uint32_t count,
               struct failure *failure);
/* config.json and generation_config.json only: for who gets its weights from others. It has no tensors, and no
 * fingerprint. */
int model_open_config(struct model **ret, const struct model_file *files, uint32_t count,
                      struct failure *failure);
void model_close(struct model **self);
const struct model_config *model_config(const struct model *self);
/* 16 hex digits: hash of config.json, tensor names, dtypes and shapes, and sampled weight bytes. Names the model in HELLO. */
const char *model_fingerprint(const struct model *self);
const char *model_config_fingerprint(const struct model *self); /* 16 hex digits: hash of config.json */
const struct tensor *model_tensor(const struct model *self, const char *name); /* NULL if absent */
uint32_t model_tensor_count(const struct model *self);
const struct tensor *model_tensor_at(const struct model *self, uint32_t index);

/* Which shard files a directory needs, from model.safetensors.index.json (NULL: the single model.safetensors). Names with '/',
 * '..' or leading '.' are refused ("climbs out of the model directory"). ret_names: malloc'd array of malloc'd strings. */
int model_shards(char ***ret_names, uint32_t *ret_count, const char *index_json, size_t index_bytes,
                 struct failure *failure);

/* Views by role; shape already checked at open, so these cannot fail for layers and experts in range. `layer` may be up to
 * layers + mtp_layers - 1 (MTP blocks follow the main layers). */
enum weight {
    W_EMBED, W_LM_HEAD, W_FINAL_NORM,                         /* layer ignored */
    W_INPUT_NORM, W_POST_NORM, W_Q_A, W_Q_A_NORM, W_Q_B, W_Q, /* W_Q: q_lora = 0 */
    W_KV_A, W_KV_A_NORM, W_KV_B, W_O,
    W_DENSE_GATE, W_DENSE_UP, W_DENSE_DOWN,
    W_SHARED_GATE, W_SHARED_UP, W_SHARED_DOWN,
    W_GATE, W_GATE_BIAS,                                      /* W_GATE_BIAS: float [experts]; data NULL for V2 */
    W_MTP_ENORM, W_MTP_HNORM, W_MTP_EH_PROJ, W_MTP_HEAD_NORM, /* MTP layers only */
    WEIGHTS
};
struct weight_view model_weight(const struct model *self, enum weight which, uint32_t layer);
enum expert_part { EXPERT_GATE, EXPERT_UP, EXPERT_DOWN };
struct weight_view model_expert_weight(const struct model *self, uint32_t layer, uint32_t expert,
                                       enum expert_part part);
/* Copies a norm weight or bias to float [n]. */
void weight_to_float(const struct weight_view *view, float *ret);
/* Bytes of the stored tensors of one routed expert (scales included). */
uint64_t model_expert_bytes(const struct model *self, uint32_t layer);

/* Text for `troupe inspect`: family, shapes, experts, dtypes, bytes per role. malloc'd. */
char *model_describe(const struct model *self);

#endif
