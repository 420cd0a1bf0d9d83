/* A world with zero delays and one probe. */
#include "actors/host/local_world.h"

#include "actors/host/gpu_device.h"

#include "actors/host/process.h"

int local_world_open(struct local_world *ret, const char *model, const struct options *options,
                     struct failure *failure) {
    struct local_world self = {0};
    numerics_enter();
    int error = model_directory_open(&self.directory, model, failure);
    if (error == 0 && (self.kernels = options_kernels(options, failure)) == NULL)
        error = failure->code;
    if (error == 0)
        error = options_check_model(options, model_config(self.directory.model), failure);
    if (error == 0)
        error = pool_open(&self.pool, options_on_gpu(options)        ? 1
                                      : options->settings.threads > 0 ? (int)options->settings.threads
                                                                      : pool_processors(), failure);
    if (error < 0) {
        local_world_close(&self);
        return error;
    }
    *ret = self;
    return 0;
}

int local_world_start(struct local_world *self, const struct options *options,
                      const struct probe_request *requests, uint32_t count,
                      struct failure *failure) {
    struct world_options world = {
        .seed = 1,
        .settings = options->settings,
        .model = self->directory.model,
        .kernels = self->kernels,
        .resident = gpu_device_resident(),
        .parallel = pool_parallel(self->pool),
        .attention = (uint32_t)options->attention,
        .experts = (uint32_t)options->experts,
        .samplers = (uint32_t)options->samplers,
        .probes = requests,
        .probe_count = count,
    };
    int error = world_open(&self->world, &world, failure);
    model_directory_forget(&self->directory);
    return error;
}

void local_world_close(struct local_world *self) {
    world_close(&self->world);
    pool_close(&self->pool);
    model_directory_close(&self->directory);
}
