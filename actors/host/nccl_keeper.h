/* The slow calls of the NCCL transport (unique ids, making and taking down communicators, memory)
 * in a thread of their own, so that none of them is on a token's way.
 *
 * A port is what one lane of an edge has on the device. It belongs to the keeper from a question
 * (nccl_keeper_ask) to its answer, and to the actor's thread otherwise; KEEPER_UNMAKE may be asked
 * while another question is open, which then gets no answer of its own. Buffers are kept for the
 * next port instead of being freed: freeing device memory waits for everything that runs there, a
 * hung peer's kernels included. */
#ifndef TROUPE_HOST_NCCL_KEEPER_H
#define TROUPE_HOST_NCCL_KEEPER_H

#include "actors/host/bell.h"
#include "actors/host/nccl_edge.h"

enum nccl_question { KEEPER_NOTHING, KEEPER_NAME, KEEPER_MAKE, KEEPER_UNMAKE };

struct nccl_buffer {
    struct nccl_buffer *next;
    size_t bytes; /* of each */
    void *device, *pinned;
};

struct nccl_port {
    /* Set by who asks. */
    void *owner;
    enum nccl_direction lane;
    struct nccl_id id; /* KEEPER_NAME: answer; KEEPER_MAKE: question */
    uint32_t slots, slot_bytes;
    bool orderly; /* KEEPER_UNMAKE */
    /* Made by KEEPER_MAKE, gone after KEEPER_UNMAKE. */
    void *comm, *stream, *handle;
    void *event[NCCL_SLOTS_MAX];
    struct nccl_buffer *buffer; /* slots * slot_bytes on either side */
    /* The keeper's own. */
    enum nccl_question asked, answered;
    bool unmake;
    int error;
    struct nccl_port *next;
};

struct nccl_keeper;
/* bell NULL: no thread; nccl_keeper_turn does the work (tests). */
int nccl_keeper_open(struct nccl_keeper **ret, const struct nccl_api *api, int channels_max,
                     struct bell *bell, struct failure *failure);
/* Finishes what was asked, then frees the memory. All ports must have been unmade or be asked to.
 */
void nccl_keeper_close(struct nccl_keeper **self);
void nccl_keeper_ask(struct nccl_keeper *self, struct nccl_port *port, enum nccl_question question);
/* The next answered port, NULL: none. Its question is in `answered`, how it went in `error`. */
struct nccl_port *nccl_keeper_answer(struct nccl_keeper *self);
/* Looks once at everything that is asked. True if there is more to do. */
bool nccl_keeper_turn(struct nccl_keeper *self);

#endif
