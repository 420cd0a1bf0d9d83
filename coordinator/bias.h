/* The rule by which routing biases follow the load: auxiliary-loss-free balancing (Wang et al. 2408.15664; DeepSeek-V3, 2412.19437, section
 * 2.1.2), b_e <- b_e + gamma * sign(mean - load_e), here on deltas to the model's own biases and within a clamp. Pure arithmetic; the
 * coordinator (bias_versions.c) and troupe bias-study use it. */
#ifndef TROUPE_BIAS_H
#define TROUPE_BIAS_H

#include <stdint.h>

struct bias_rule {
    double gamma; /* step */
    double clamp; /* no delta grows beyond it */
};

/* One step for one layer. delta, rows: [experts]; rows routed to each since the last step. Without rows only the clamp is seen to.
 * Returns how many deltas have changed. */
uint32_t bias_step(float *delta, const uint64_t *rows, uint32_t experts, const struct bias_rule *rule);

/* (max - mean) / mean of one layer's rows: 0 is perfect. 0 without rows. */
double bias_imbalance(const uint64_t *rows, uint32_t experts);

#endif
