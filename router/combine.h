/* Combine: adds the outputs of a token's experts in the fixed order of its own top-k list, then the shared expert. FP32. */
#ifndef TROUPE_COMBINE_H
#define TROUPE_COMBINE_H

#include <stddef.h>
#include <stdint.h>

/* residual[r][i] = residual[r][i] + ( (...((0 + w0*y0) + w1*y1)...) + shared ), each w*y + sum as one fma, slots ascending, unused
 * slots (weight of GATE_UNUSED) skipped; shared NULL: left out.
 * outputs: [rows, k, stride], weights: [rows, k], experts: [rows, k], shared: [rows, stride], residual: [rows, residual_stride]. */
void combine_rows(uint32_t rows, uint32_t k, uint32_t hidden, const float *outputs, size_t stride,
                  const float *weights, const uint16_t *experts, const float *shared,
                  float *residual, size_t residual_stride);

/* The same with outputs that lie anywhere: output [rows, k], each [hidden]. */
void combine_rows_from(uint32_t rows, uint32_t k, uint32_t hidden, const float *const *output,
                       const float *weights, const uint16_t *experts, const float *shared,
                       size_t stride, float *residual, size_t residual_stride);

#endif
