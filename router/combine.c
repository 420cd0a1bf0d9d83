/* Combine, the last step of an MoE layer on the attention side: a row's expert outputs, in the
 * order of its own top-k list, then the shared expert, join the residual stream. Each element is
 * its own chain of operations, so vector width cannot change a bit. */
#include "router/combine.h"

#include "actors/errors.h"
#include "actors/limits.h"
#include "router/gate.h"

/* One form per instruction set, chosen by the loader: a fused multiply-add is an instruction where
 * there is one and a correctly rounded function elsewhere, the same bits. */
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("avx512f", "fma", "default")))
#else
#define CLONES
#endif

#define CHUNK                                                                                      \
    64 /* elements that stay in registers over the slots; a constant, so that the compiler         \
          vectorises at -O2 */

/* residual[i] += (w0*y0[i] + w1*y1[i] + ...) + shared[i] for the `used` outputs. */
CLONES static void combine_row(uint32_t used, uint32_t hidden, const float *const *outputs,
                               const float *weights, const float *restrict shared,
                               float *restrict residual) {
    uint32_t i = 0;
    for (; i + CHUNK <= hidden; i += CHUNK) {
        float sum[CHUNK] = {0};
        for (uint32_t slot = 0; slot < used; slot++) {
            const float *restrict y = outputs[slot] + i;
            float weight = weights[slot];
            for (int j = 0; j < CHUNK; j++)
                sum[j] = __builtin_fmaf(weight, y[j], sum[j]);
        }
        if (shared != NULL)
            for (int j = 0; j < CHUNK; j++)
                sum[j] = sum[j] + shared[i + (uint32_t)j];
        for (int j = 0; j < CHUNK; j++)
            residual[i + (uint32_t)j] = residual[i + (uint32_t)j] + sum[j];
    }
    for (; i < hidden; i++) {
        float sum = 0.0f;
        for (uint32_t slot = 0; slot < used; slot++)
            sum = __builtin_fmaf(weights[slot], outputs[slot][i], sum);
        if (shared != NULL)
            sum = sum + shared[i];
        residual[i] = residual[i] + sum;
    }
}

void combine_rows_from(uint32_t rows, uint32_t k, uint32_t hidden, const float *const *output,
                       const float *weights, const uint16_t *experts, const float *shared,
                       size_t stride, float *residual, size_t residual_stride) {
    ASSERT(k <= EXPERTS_PER_TOKEN_MAX);
    for (uint32_t r = 0; r < rows; r++) {
        const float *used_outputs[EXPERTS_PER_TOKEN_MAX];
        float used_weights[EXPERTS_PER_TOKEN_MAX];
        uint32_t used = 0;
        for (uint32_t slot = 0; slot < k; slot++) {
            size_t entry = (size_t)r * k + slot;
            if (experts[entry] == GATE_UNUSED)
                continue;
            used_outputs[used] = output[entry];
            used_weights[used++] = weights[entry];
        }
        combine_row(used, hidden, used_outputs, used_weights,
                    shared == NULL ? NULL : shared + (size_t)r * stride,
                    residual + (size_t)r * residual_stride);
    }
}

void combine_rows(uint32_t rows, uint32_t k, uint32_t hidden, const float *outputs, size_t stride,
                  const float *weights, const uint16_t *experts, const float *shared,
                  float *residual, size_t residual_stride) {
    ASSERT(k <= EXPERTS_PER_TOKEN_MAX);
    for (uint32_t r = 0; r < rows; r++) {
        const float *output[EXPERTS_PER_TOKEN_MAX];
        for (uint32_t slot = 0; slot < k; slot++)
            output[slot] = outputs + ((size_t)r * k + slot) * stride;
        combine_rows_from(1, k, hidden, output, weights + (size_t)r * k, experts + (size_t)r * k,
                          shared == NULL ? NULL : shared + (size_t)r * stride, stride,
                          residual + (size_t)r * residual_stride, residual_stride);
    }
}
