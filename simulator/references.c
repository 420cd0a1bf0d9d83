/* See references.h. */
#include "simulator/references.h"

#include <stdlib.h>
#include <string.h>

static void *grow(void *array, uint32_t count, size_t element) {
    void *grown = realloc(array, (count + 1) * element);
    ASSERT(grown != NULL && "memory for references");
    return grown;
}

void references_note(struct references *self, const Troupe__Bias *bias) {
    if (references_delta(self, bias->version) != NULL)
        return;
    self->version = grow(self->version, self->versions, sizeof *self->version);
    float *delta = malloc(bias->n_delta * sizeof *delta + 1);
    ASSERT(delta != NULL);
    memcpy(delta, bias->delta, bias->n_delta * sizeof *delta);
    self->version[self->versions++] = (struct bias_version){.id = bias->version, .delta = delta};
}

const float *references_delta(const struct references *self, uint64_t version) {
    for (uint32_t i = 0; i < self->versions; i++)
        if (self->version[i].id == version)
            return self->version[i].delta;
    return NULL;
}

const struct client *references_find(const struct references *self, uint32_t request,
                                     uint64_t version) {
    for (uint32_t i = 0; i < self->answers; i++)
        if (self->answered[i].request == request && self->answered[i].version == version)
            return &self->answered[i].clients->client[0];
    return NULL;
}

const struct client *references_add(struct references *self, uint32_t request, uint64_t version,
                                    struct clients *clients) {
    self->answered = grow(self->answered, self->answers, sizeof *self->answered);
    self->answered[self->answers++] = (struct answered){version, request, clients};
    return &clients->client[0];
}

void references_free(struct references *self) {
    for (uint32_t i = 0; i < self->versions; i++)
        free(self->version[i].delta);
    for (uint32_t i = 0; i < self->answers; i++) {
        clients_free(self->answered[i].clients);
        free(self->answered[i].clients);
    }
    free(self->version);
    free(self->answered);
    memset(self, 0, sizeof *self);
}
