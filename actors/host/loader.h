/* Packs experts: LOAD effects in, LOADED events out. What is urgent is packed at the process's own priority, everything else in the
 * background. */
#ifndef TROUPE_HOST_LOADER_H
#define TROUPE_HOST_LOADER_H

#include "actors/host/bell.h"
#include "actors/host/files.h"
#include "engine/engine.h"

struct loaded {
    struct loaded *next;
    uint32_t layer, expert;
    uint64_t operation, bytes;
    struct expert_weights *weights; /* NULL if it failed */
    uint8_t *image;                 /* NULL: from the file */
    uint64_t image_bytes;
    struct failure failure;
};

struct loader;
int loader_open(struct loader **ret, const struct model_directory *directory,
                const struct kernels *kernels, struct bell *bell, uint32_t nice,
                struct failure *failure);
/* Finishes what is being packed and forgets the rest. */
void loader_close(struct loader **self);
/* `error` != 0: it fails with that, as if the disk or the memory had (a fault on purpose). */
void loader_add(struct loader *self, uint32_t layer, uint32_t expert, uint64_t operation, bool urgent,
                int error);
/* From what another process has packed; the image is freed. */
void loader_add_image(struct loader *self, uint32_t layer, uint32_t expert, uint64_t operation,
                      uint8_t *image, uint64_t bytes);
/* The next finished one; NULL: none. loaded_free when done with it. */
struct loaded *loader_take(struct loader *self);
void loaded_free(struct loaded **self); /* weights not taken out are freed */

#endif
