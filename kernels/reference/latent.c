/* The E4M3 form of a latent (kernels/latent.h): the definition that kernels/cuda/latent.cu meets
 * bit for bit. Scales are powers of two, so every value read back is exact in BF16 and attention
 * over such a cache has the bits of attention over the values read back. */
#include "kernels/rows.h"

float latent_scale(float most) {
    const uint32_t bits = float_bits(most);
    if (bits < LATENT_MOST_LEAST)
        return LATENT_SCALE_LEAST;
    /* 448 = 1.75 * 2^8: one more where the mantissa is over 1.75 */
    const uint32_t exponent = (bits >> 23) - 8 + ((bits & 0x7fffff) > 0x600000);
    return float_from_bits((exponent < LATENT_EXPONENT_MAX ? exponent : LATENT_EXPONENT_MAX) << 23);
}

void latent_quantise(const bf16 *latent, uint32_t n, uint8_t *ret, float *ret_scale) {
    for (uint32_t first = 0; first < n; first += LATENT_GROUP) {
        const uint32_t end = n - first < LATENT_GROUP ? n : first + LATENT_GROUP;
        const float scale = latent_scale(largest_magnitude(latent + first, end - first));
        for (uint32_t i = first; i < end; i++)
            ret[i] = e4m3_from_float(widen_bf16(latent[i]) / scale);
        for (uint32_t i = end; i < first + LATENT_GROUP; i++)
            ret[i] = 0;
        ret_scale[first / LATENT_GROUP] = scale;
    }
}

void latent_widen(const uint8_t *latent, const float *scale, uint32_t n, bf16 *ret) {
    for (uint32_t i = 0; i < n; i++)
        ret[i] = round_bf16(e4m3_to_float(latent[i]) * scale[i / LATENT_GROUP]);
}

void latent_round(bf16 *latent, uint32_t n) {
    for (uint32_t first = 0; first < n; first += LATENT_GROUP) {
        const uint32_t count = n - first < LATENT_GROUP ? n - first : LATENT_GROUP;
        uint8_t quantised[LATENT_GROUP];
        float scale;
        latent_quantise(latent + first, count, quantised, &scale);
        latent_widen(quantised, &scale, count, latent + first);
    }
}
