/* Random-weight model directories of any DeepSeek shape, for tests and benchmarks. Pure: bytes leave through a callback. */
#ifndef TROUPE_MODEL_SYNTH_H
#define TROUPE_MODEL_SYNTH_H

#include <stddef.h>
#include <stdint.h>

#include "actors/errors.h"

/* Member of config.json that marks a model of random weights. */
#define SYNTH_MARK "troupe_synth"

/* Writes config.json, generation_config.json, tokenizer.json, tokenizer_config.json and model.safetensors (above about 4 GB: several
 * shards and model.safetensors.index.json) of the model that `shape_json` describes: the fields of a Hugging Face config.json, and
 * "dtype": "bf16" (default) | "fp8" (blocks of 128 x 128) | "f32".
 *
 * write() appends `size` bytes to `file` (a plain name; files come one after the other, a file begins with its first write) and
 * returns 0 or a negative code, which ends the work and is returned. Memory is bounded by the largest tensor.
 * Weights are drawn from a generator keyed by (seed, tensor name, element), so they depend on nothing else. Everything is checked by
 * the same code that opens models; a shape that could not be opened is refused with its text. */
int synth_model(const char *shape_json, size_t bytes, uint64_t seed,
                int (*write)(void *context, const char *file, const void *bytes, size_t size),
                void *context, struct failure *failure);

/* The same with shards of at most about `shard_bytes` of tensors each (a shard holds at least one tensor). */
int synth_model_sharded(const char *shape_json, size_t bytes, uint64_t seed, uint64_t shard_bytes,
                        int (*write)(void *context, const char *file, const void *bytes, size_t size),
                        void *context, struct failure *failure);

#endif
