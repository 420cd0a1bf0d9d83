/* The E4M3 form of a position in the latent cache, for CPU and GPU alike (the bytes are those of
 * FlashMLA's FP8 cache). For kv_lora 512 and rope 64:
 *
 *   [512 E4M3: the latent | 4 float: a scale for each 128 of it | 64 BF16: rotated key]
 *
 * 656 bytes instead of 1152. In general the latent is padded with zeros to whole groups of 128, the
 * scales to 16 bytes, the key to 32 elements. With m the largest magnitude in a group of the
 * latent, which is BF16 (a NaN counts for nothing):
 *
 *   scale = the smallest power of two with m / scale <= 448, at least 2^-108 and at most 2^119
 *   q = e4m3(x / scale), to nearest even, saturating at 448
 *   read back: q * scale
 *
 * A power of two, because what is read back is then exact in BF16: attention over such a cache has
 * the bits of attention over the values read back, and quantising those again gives the same
 * values. Keys stay BF16: RoPE leaves their channels far more unequal than those of the normed
 * latent. */
#ifndef TROUPE_LATENT_H
#define TROUPE_LATENT_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/numerics.h"

#define LATENT_GROUP        128u
#define LATENT_MOST_LEAST   0x0d800000u /* bits of 2^-100: what is smaller has the least scale */
#define LATENT_SCALE_LEAST  0x1p-108f
#define LATENT_EXPONENT_MAX 246u /* biased, of the largest scale */

/* Bytes from the beginning of a row to its scales and to its key, and of a whole row (a multiple of
 * 16). */
static inline uint32_t latent_scale_at(uint32_t kv_lora) {
    return (kv_lora + LATENT_GROUP - 1) / LATENT_GROUP * LATENT_GROUP;
}
static inline uint32_t latent_rope_at(uint32_t kv_lora) {
    const uint32_t scales = latent_scale_at(kv_lora) / LATENT_GROUP * (uint32_t)sizeof(float);
    return latent_scale_at(kv_lora) + (scales + 15) / 16 * 16;
}
static inline uint32_t latent_row_bytes(uint32_t kv_lora, uint32_t rope) {
    return latent_rope_at(kv_lora) + (rope + 31) / 32 * 32 * (uint32_t)sizeof(bf16);
}

/* ---- kernels/reference/latent.c ---- */

float latent_scale(float most);
/* latent: [n]; ret: [n padded to whole groups], ret_scale: [groups]. */
void latent_quantise(const bf16 *latent, uint32_t n, uint8_t *ret, float *ret_scale);
void latent_widen(const uint8_t *latent, const float *scale, uint32_t n, bf16 *ret);
/* Both, in place: the values that an E4M3 cache would give back. */
void latent_round(bf16 *latent, uint32_t n);

#endif
