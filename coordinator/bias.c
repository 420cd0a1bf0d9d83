/* The rule of the routing bias (see bias.h). Loads are compared as whole numbers, so that the same
 * rows give the same deltas everywhere. */
#include "coordinator/bias.h"

#include <stddef.h>

static uint64_t sum_of(const uint64_t *rows, uint32_t experts) {
    uint64_t sum = 0;
    for (uint32_t e = 0; e < experts; e++)
        sum += rows[e];
    return sum;
}

static float clamped(double value, double clamp) {
    float ret = (float)(value > clamp ? clamp : value < -clamp ? -clamp : value);
    return ret == 0 ? 0 : ret; /* one zero, so that equal deltas have equal bits */
}

uint32_t bias_step(float *delta, const uint64_t *rows, uint32_t experts,
                   const struct bias_rule *rule) {
    uint64_t sum = sum_of(rows, experts);
    uint32_t changed = 0;
    for (uint32_t e = 0; e < experts; e++) {
        uint64_t load = rows[e] * experts; /* against the sum: mean times as much */
        double step = load < sum ? rule->gamma : load > sum ? -rule->gamma : 0;
        float next = clamped((double)delta[e] + step, rule->clamp);
        changed += next != delta[e];
        delta[e] = next;
    }
    return changed;
}

double bias_imbalance(const uint64_t *rows, uint32_t experts) {
    uint64_t sum = sum_of(rows, experts), most = 0;
    for (uint32_t e = 0; e < experts; e++)
        most = rows[e] > most ? rows[e] : most;
    return sum == 0 ? 0 : (double)most * experts / (double)sum - 1;
}
