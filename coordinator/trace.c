/* Traces of routing loads and the forecast, see trace.h. */
#include "coordinator/trace.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "actors/limits.h"
#include "model/weights.h"

#define NEWEST_WEIGHT 0.7  /* of the newest window; measured in docs/planner.md */

static int check_shape(const struct tensor *tensor, const char *file, struct failure *failure) {
    if (tensor == NULL)
        return fail(failure, ERR_NOT_FOUND, "%s: expected a tensor expert_load", file);
    if (tensor->dims != 3 || tensor->shape[0] < 1 || tensor->shape[0] > TRACE_WINDOWS_MAX ||
        tensor->shape[1] < 1 || tensor->shape[1] > LAYERS_MAX || tensor->shape[2] < 1 ||
        tensor->shape[2] > EXPERTS_MAX)
        return fail(failure, ERR_INVALID,
                    "%s: expert_load: expected shape [window, layer, expert] with 1 to %u, %d and "
                    "%d of them, found %u dimensions, [%llu, %llu, %llu]",
                    file, TRACE_WINDOWS_MAX, LAYERS_MAX, EXPERTS_MAX, tensor->dims,
                    (unsigned long long)(tensor->dims > 0 ? tensor->shape[0] : 0),
                    (unsigned long long)(tensor->dims > 1 ? tensor->shape[1] : 0),
                    (unsigned long long)(tensor->dims > 2 ? tensor->shape[2] : 0));
    if (tensor->dtype != DTYPE_I32 && tensor->dtype != DTYPE_I64 && tensor->dtype != DTYPE_F32)
        return fail(failure, ERR_UNSUPPORTED, "%s: expert_load: expected dtype I32, I64 or F32",
                    file);
    return 0;
}

static double element(const struct tensor *tensor, size_t i) {
    if (tensor->dtype == DTYPE_I32)
        return ((const int32_t *)tensor->data)[i];
    if (tensor->dtype == DTYPE_I64)
        return (double)((const int64_t *)tensor->data)[i];
    return ((const float *)tensor->data)[i];
}

static int read_tensor(struct load_trace *ret, const struct tensor *tensor, const char *file,
                       struct failure *failure) {
    struct load_trace self = {(uint32_t)tensor->shape[0], (uint32_t)tensor->shape[1],
                              (uint32_t)tensor->shape[2], NULL};
    size_t pairs = (size_t)self.layers * self.experts, count = self.windows * pairs;
    self.load = malloc(count * sizeof *self.load);
    if (self.load == NULL)
        return fail(failure, ERR_NO_MEMORY, "%s: no memory for %zu loads", file, count);
    for (size_t i = 0; i < count; i++) {
        self.load[i] = element(tensor, i);
        if (!isfinite(self.load[i]) || self.load[i] < 0) {
            int code =
                fail(failure, ERR_INVALID,
                     "%s: expert_load: window %zu layer %zu expert %zu: expected a number "
                     "of rows, 0 or more, found %g",
                     file, i / pairs, i % pairs / self.experts, i % self.experts, self.load[i]);
            trace_free(&self);
            return code;
        }
    }
    *ret = self;
    return 0;
}

int trace_read(struct load_trace *ret, const void *bytes, size_t size, const char *file,
               struct failure *failure) {
    struct safetensors *tensors;
    int code = safetensors_open(&tensors, bytes, size, file, failure);
    if (code < 0)
        return code;
    const struct tensor *tensor = safetensors_find(tensors, "expert_load");
    code = check_shape(tensor, file, failure);
    if (code == 0)
        code = read_tensor(ret, tensor, file, failure);
    safetensors_close(&tensors);
    return code;
}

void trace_free(struct load_trace *self) {
    free(self->load);
    memset(self, 0, sizeof *self);
}

const double *trace_window(const struct load_trace *self, uint32_t window) {
    ASSERT(window < self->windows);
    return self->load + (size_t)window * self->layers * self->experts;
}

static double sum(const double *value, uint32_t count) {
    double total = 0;
    for (uint32_t i = 0; i < count; i++)
        total += value[i];
    return total;
}

static void observe_layer(double *forecast, const double *window, uint32_t experts) {
    double old = sum(forecast, experts), total = sum(window, experts), change = 0;
    if (total <= 0)
        return; /* nothing was routed: nothing was learnt */
    double scale = old > 0 ? total / old : 0;
    for (uint32_t e = 0; e < experts; e++)
        change += fabs(window[e] - forecast[e] * scale) / total / 2;
    double weight = change > FORECAST_JUMP ? 1 : NEWEST_WEIGHT;
    for (uint32_t e = 0; e < experts; e++)
        forecast[e] = weight * window[e] + (1 - weight) * scale * forecast[e];
}

void forecast_observe(double *forecast, const double *window, uint32_t layers, uint32_t experts) {
    for (size_t l = 0; l < layers; l++)
        observe_layer(forecast + l * experts, window + l * experts, experts);
}
