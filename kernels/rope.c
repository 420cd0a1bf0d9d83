/* Tables of rotary position embeddings, plain and with YaRN (Peng et al., 2309.00071), as Hugging
 * Face transformers computes them for DeepSeek-V2 and V3 (modeling_rope_utils.py:
 * _compute_yarn_parameters), in double precision. */
#include "actors/errors.h"
#include "kernels/rows.h"

static const double TWO_PI = 6.283185307179586;

static bool yarn_is_on(const struct rope_parameters *parameters) {
    return parameters->yarn_factor > 1;
}

/* YaRN's attention temperature (equation 22): 0.1 weight ln(factor) + 1. */
static double yarn_mscale(double factor, double weight) {
    return 0.1 * weight * log_table(factor) + 1;
}

/* The factor on cos and sin. Where mscale and mscale_all_dim are not both given, that of the paper.
 */
static double yarn_attention_factor(const struct rope_parameters *parameters) {
    double factor = parameters->yarn_factor;
    if (parameters->mscale != 0 && parameters->mscale_all_dim != 0)
        return yarn_mscale(factor, parameters->mscale) /
               yarn_mscale(factor, parameters->mscale_all_dim);
    return yarn_mscale(factor, 1);
}

/* The dimension that turns `rotations` times over the original context. */
static double yarn_correction_dimension(const struct rope_parameters *parameters, uint32_t rope,
                                        double rotations) {
    return rope * log_table(parameters->original_positions / (rotations * TWO_PI)) /
           (2 * log_table(parameters->theta));
}

static double round_down(double x) {
    double truncated = (double)(long)x;
    return truncated > x ? truncated - 1 : truncated;
}

/* Angle per position of pair i. */
static double frequency(const struct rope_parameters *parameters, uint32_t rope, uint32_t pair) {
    double plain = 1 / pow_table(parameters->theta, (2.0 * pair) / rope);
    if (!yarn_is_on(parameters))
        return plain;
    double fast = parameters->beta_fast > 0 ? parameters->beta_fast : 32;
    double slow = parameters->beta_slow > 0 ? parameters->beta_slow : 1;
    double low = round_down(yarn_correction_dimension(parameters, rope, fast));
    double high = -round_down(-yarn_correction_dimension(parameters, rope, slow));
    if (low < 0)
        low = 0;
    if (high > rope - 1.0)
        high = rope - 1.0;
    if (low == high)
        high += 0.001;
    /* 0: turns often, kept as it is; 1: turns less than once, stretched over the longer context. */
    double ramp = (pair - low) / (high - low);
    ramp = ramp < 0 ? 0 : ramp > 1 ? 1 : ramp;
    return plain / parameters->yarn_factor * ramp + plain * (1 - ramp);
}

void rope_table(const struct rope_parameters *parameters, uint32_t rope, uint32_t first_position,
                uint32_t positions, float *ret) {
    ASSERT(rope % 2 == 0 && first_position <= CONTEXT_MAX && positions <= CONTEXT_MAX);
    double factor = yarn_is_on(parameters) ? yarn_attention_factor(parameters) : 1;
    for (uint32_t pair = 0; pair < rope / 2; pair++) {
        double step = frequency(parameters, rope, pair);
        for (uint32_t i = 0; i < positions; i++) {
            double angle = ((double)first_position + i) * step;
            float *entry = ret + ((size_t)i * (rope / 2) + pair) * 2;
            entry[0] = (float)(cos_table(angle) * factor);
            entry[1] = (float)(sin_table(angle) * factor);
        }
    }
}

double rope_softmax_factor(const struct rope_parameters *parameters) {
    if (!yarn_is_on(parameters) || parameters->mscale_all_dim == 0)
        return 1;
    double mscale = yarn_mscale(parameters->yarn_factor, parameters->mscale_all_dim);
    return mscale * mscale;
}
