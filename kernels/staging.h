/* Weights on their way to a device through two page-locked buffers: while the copy engine empties
 * one, the other is filled, out of mapped files or by converting, so the slower of the two decides.
 *
 *   buffer: FREE --fill--> FILLED --copy, record--> UNDER WAY --wait--> FREE
 *
 * Invariants: 1. a buffer is filled only when its last copy has happened; 2. when staging_put()
 * returns, whatever it returns, nothing of it is under way; 3. pieces are whole rows, in order. */
#ifndef TROUPE_STAGING_H
#define TROUPE_STAGING_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define STAGING_BUFFERS 2u

/* What it takes of a device; 0 or a CUDA error number. Copies happen in the order in which they
 * were begun, on a stream of their own. */
struct staging_api {
    int (*take)(void *context, size_t bytes, void **ret); /* page-locked memory */
    void (*give)(void *context, void *memory);
    int (*copy)(void *context, void *to, const void *from, size_t bytes); /* begins */
    int (*record)(void *context, uint32_t buffer); /* the copies begun so far are this buffer's */
    int (*wait)(void *context, uint32_t buffer);   /* until they have happened */
    int (*settle)(void *context);                  /* until all have; after an error */
    void *context;
};

struct staging {
    struct staging_api api;
    size_t buffer_bytes;
    void *buffer[STAGING_BUFFERS];
};

/* Nothing is held where it fails. */
int staging_open(struct staging *ret, const struct staging_api *api, size_t buffer_bytes);
void staging_close(struct staging *self);

/* Rows first .. first + rows - 1 of what is to be on the device, to memory that holds anything. */
typedef void staging_fill(void *context, uint32_t first, uint32_t rows, void *ret);
/* Fills device memory with `rows` rows of row_bytes, at most buffer_bytes, each. Blocks until they
 * are there. After an error (the first one is returned) the memory holds anything. */
int staging_put(struct staging *self, void *to, size_t row_bytes, uint32_t rows, staging_fill *fill,
                void *context);

/* ---- kernels/cuda/memory.cu ---- */

/* Of the device of device_use_cuda(); 0 or a CUDA error. */
int staging_api_cuda(struct staging_api *ret);
void staging_api_drop_cuda(struct staging_api *api);

#ifdef __cplusplus
}
#endif

#endif
