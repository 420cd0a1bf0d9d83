/* Recorded routing loads, and what they let one expect. Pure. */
#ifndef TROUPE_TRACE_H
#define TROUPE_TRACE_H

#include <stddef.h>
#include <stdint.h>

#include "actors/errors.h"

#define TRACE_WINDOWS_MAX 1048576u
/* Half the sum of |change of share| over a layer's experts that makes the layer forget its past: another kind of
 * text. On the demo model, rounds of one domain differ by 0.01 to 0.03, domains by 0.4 to 0.5. */
#define FORECAST_JUMP     0.25

struct load_trace {
    uint32_t windows, layers, experts;
    double *load; /* [windows][layers][experts] rows routed */
};

/* Reads tensor `expert_load` ([window, layer, expert]; I32, I64 or F32) of a safetensors file.
 * Refuses other shapes, no windows, loads that are negative or no number. `file` names it in
 * messages. */
int trace_read(struct load_trace *ret, const void *bytes, size_t size, const char *file,
               struct failure *failure);
void trace_free(struct load_trace *self);
const double *trace_window(const struct load_trace *self, uint32_t window); /* [layers][experts] */

/* Takes one more window into a forecast of the next one, per layer: the shares of the experts are
 * an exponentially weighted mean, scaled to the newest total. A layer whose shares jump (another
 * kind of text) forgets the past. forecast: [layers * experts], all zero before the first window;
 * window: the same shape. */
void forecast_observe(double *forecast, const double *window, uint32_t layers, uint32_t experts);

#endif
