/* See staging.h. Pure: the device is behind struct staging_api, so tests hold copies back as long
 * as they like and fail any of them (tests/test_staging.c). */
#include "kernels/staging.h"

#include <stdbool.h>
#include <string.h>

#include "actors/errors.h"

int staging_open(struct staging *ret, const struct staging_api *api, size_t buffer_bytes) {
    *ret = (struct staging){.api = *api, .buffer_bytes = buffer_bytes};
    for (uint32_t b = 0; b < STAGING_BUFFERS; b++) {
        const int error = api->take(api->context, buffer_bytes, &ret->buffer[b]);
        if (error != 0) {
            ret->buffer[b] = NULL;
            staging_close(ret);
            return error;
        }
    }
    return 0;
}

void staging_close(struct staging *self) {
    for (uint32_t b = 0; b < STAGING_BUFFERS; b++)
        if (self->buffer[b] != NULL)
            self->api.give(self->api.context, self->buffer[b]);
    memset(self->buffer, 0, sizeof self->buffer);
}

int staging_put(struct staging *self, void *to, size_t row_bytes, uint32_t rows, staging_fill *fill,
                void *context) {
    const struct staging_api *api = &self->api;
    ASSERT(row_bytes <= self->buffer_bytes);
    const size_t most = row_bytes > 0 ? self->buffer_bytes / row_bytes : rows;
    bool under_way[STAGING_BUFFERS] = {false};
    int error = 0;
    uint32_t b = 0;
    for (uint32_t first = 0; first < rows && row_bytes > 0 && error == 0; b = (b + 1) % 2) {
        const uint32_t count = rows - first < most ? rows - first : (uint32_t)most;
        if (under_way[b])
            error = api->wait(api->context, b);
        if (error != 0)
            break;
        under_way[b] = false;
        fill(context, first, count, self->buffer[b]);
        error = api->copy(api->context, (uint8_t *)to + (size_t)first * row_bytes, self->buffer[b],
                          (size_t)count * row_bytes);
        if (error == 0)
            error = api->record(api->context, b);
        under_way[b] = error == 0;
        first += count;
    }
    for (uint32_t i = 0; i < STAGING_BUFFERS && error == 0; i++) { /* the older one first */
        const uint32_t last = (b + i) % STAGING_BUFFERS;
        error = under_way[last] ? api->wait(api->context, last) : 0;
    }
    if (error != 0)
        api->settle(api->context); /* a device that cannot even do that is lost with all it held */
    return error;
}
