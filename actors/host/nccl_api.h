/* The calls of NCCL and of the CUDA runtime that the NCCL transport makes, as a table, so that
 * tests/support/fake_nccl.c can stand in for a card. nccl_api_with_cuda.c fills it where CUDA was
 * found at build time, nccl_api_without_cuda.c says that it was not.
 *
 * All of them return 0, NCCL_PENDING, or a negative number that `text` explains. None blocks but
 * those marked so, which the keeper alone calls (nccl_keeper.h). A communicator belongs to one
 * thread at a time: the keeper's while it is made and taken down, the actor's in between. */
#ifndef TROUPE_HOST_NCCL_API_H
#define TROUPE_HOST_NCCL_API_H

#include <stddef.h>
#include <stdint.h>

#include "actors/errors.h"

#define NCCL_PENDING  1 /* under way: ask again */
#define NCCL_ID_BYTES 128

struct nccl_id {
    char bytes[NCCL_ID_BYTES];
};

/* Bounds of one communicator of two ranks. */
struct nccl_comm_options {
    int channels_max; /* thread blocks that its kernels may take */
    const char *name; /* for NCCL's own log */
};

struct nccl_api {
    void *context; /* first argument of everything */

    /* Blocking. Makes the device the calling thread's. */
    int (*use_device)(void *context);
    int (*stream_make)(void *context, void **ret);
    void (*stream_free)(void *context, void *stream);
    /* Blocking. Device memory that NCCL can register, and page-locked host memory. */
    int (*memory_take)(void *context, size_t bytes, void **ret);
    void (*memory_give)(void *context, void *memory);
    int (*pinned_take)(void *context, size_t bytes, void **ret);
    void (*pinned_give)(void *context, void *memory);
    int (*event_make)(void *context, void **ret);
    void (*event_free)(void *context, void *event);

    /* In the order of the stream: copies, the mark `event`, and ringing the actor's bell. */
    int (*copy_in)(void *context, void *device, const void *host, size_t bytes, void *stream);
    int (*copy_out)(void *context, void *host, const void *device, size_t bytes, void *stream);
    int (*event_record)(void *context, void *event, void *stream);
    /* 0: everything before the mark is done. */
    int (*event_query)(void *context, void *event);
    int (*ring)(void *context, void (*function)(void *argument), void *argument, void *stream);

    /* Blocking (it opens a socket). */
    int (*unique_id)(void *context, struct nccl_id *ret);
    /* Starts a communicator of two ranks; comm_state says when it is made. */
    int (*comm_init)(void *context, void **ret, const struct nccl_id *id, int rank,
                     const struct nccl_comm_options *options);
    /* 0: all calls on it have completed and nothing is wrong; NCCL_PENDING; or its error. */
    int (*comm_state)(void *context, void *comm);
    /* Blocking. */
    int (*comm_register)(void *context, void *comm, void *memory, size_t bytes, void **ret);
    void (*comm_deregister)(void *context, void *comm, void *handle);
    /* Sends and receives between them are launched together; group_end may leave the communicator
     * NCCL_PENDING, and nothing else may be called on it until it is not. */
    int (*group_start)(void *context);
    int (*group_end)(void *context);
    int (*send)(void *context, void *comm, const void *memory, size_t bytes, void *stream);
    int (*receive)(void *context, void *comm, void *memory, size_t bytes, void *stream);
    /* Blocking. The end of a communicator both of whose ends are well, and of any other. */
    int (*comm_finish)(void *context, void *comm);
    int (*comm_abort)(void *context, void *comm);

    const char *(*text)(void *context, int error);
};

/* The real ones for device `gpu`. ERR_UNSUPPORTED: this build has no CUDA, or there is no NCCL, or
 * no such device; the text says which and what to do. */
int nccl_api_open(const struct nccl_api **ret, uint32_t gpu, struct failure *failure);

#endif
