/* The model's short name in HELLO: 64 bits of FNV-1a over config.json, the tensor table and samples
 * of the weights. It tells apart models that were confused by mistake; it is not a defence against
 * anyone (FNV is easily forged), and a change to weights that misses the samples goes unseen.
 * Sampling reads at most SAMPLED_TENSORS places, so that opening a model of 700 GB stays fast. */
#include "model/model.h"

#include <stdio.h>
#include <string.h>

#define SAMPLED_TENSORS 1024
#define SAMPLED_BYTES   64

static uint64_t hash_bytes(uint64_t hash, const void *bytes, size_t size) {
    const uint8_t *byte = bytes;
    for (size_t i = 0; i < size; i++)
        hash = (hash ^ byte[i]) * 0x100000001b3u;
    return hash;
}

/* Numbers are hashed as little-endian bytes, the same on every machine. */
static uint64_t hash_number(uint64_t hash, uint64_t number) {
    uint8_t bytes[8];
    for (int i = 0; i < 8; i++)
        bytes[i] = (uint8_t)(number >> (8 * i));
    return hash_bytes(hash, bytes, sizeof bytes);
}

void model_compute_config_fingerprint(struct model *self, const void *config_json, size_t config_bytes) {
    uint64_t hash = hash_bytes(0xcbf29ce484222325u, config_json, config_bytes);
    snprintf(self->config_fingerprint, sizeof self->config_fingerprint, "%016llx", (unsigned long long)hash);
}

void model_compute_fingerprint(struct model *self, const void *config_json, size_t config_bytes) {
    uint64_t hash = 0xcbf29ce484222325u;
    hash = hash_number(hash, config_bytes);
    hash = hash_bytes(hash, config_json, config_bytes);
    uint32_t step = self->tensors / SAMPLED_TENSORS + 1;
    for (uint32_t i = 0; i < self->tensors; i++) {
        const struct tensor *tensor = self->tensor[i];
        hash = hash_bytes(hash, tensor->name, strlen(tensor->name) + 1);
        hash = hash_number(hash, tensor->dtype);
        hash = hash_number(hash, tensor->dims);
        for (uint32_t dim = 0; dim < tensor->dims; dim++)
            hash = hash_number(hash, tensor->shape[dim]);
        if (i % step == 0) {
            size_t bytes = tensor->bytes < SAMPLED_BYTES ? tensor->bytes : SAMPLED_BYTES;
            const uint8_t *data = tensor->data;
            hash = hash_bytes(hash, data + (tensor->bytes - bytes) / 2, bytes);
        }
    }
    snprintf(self->fingerprint, sizeof self->fingerprint, "%016llx", (unsigned long long)hash);
}
