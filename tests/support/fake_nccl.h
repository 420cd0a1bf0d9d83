/* NCCL and CUDA without a card, behind the table of nccl_api.h: streams, events, communicators of
 * two ranks that meet by their unique id, sends that wait for receives. Everything happens in
 * fake_nccl_turn(), in an order drawn from a seed. Several processes live in one fake, each with a
 * table of its own.
 *
 * What a real NCCL would answer with a hang or a crash ends the test with a message: calls on a
 * communicator that is not ready for them, memory that is not registered, a send and a receive of
 * different size, memory given back while work is under way on it. */
#ifndef TROUPE_TESTS_FAKE_NCCL_H
#define TROUPE_TESTS_FAKE_NCCL_H

#include <stdbool.h>
#include <stdint.h>

#include "actors/host/nccl_api.h"

struct fake_nccl;
struct fake_nccl *fake_nccl_make(uint64_t seed);
void fake_nccl_free(struct fake_nccl *self);

/* A process; its api is valid until fake_nccl_free. */
struct fake_process;
struct fake_process *fake_process_make(struct fake_nccl *self);
const struct nccl_api *fake_process_api(struct fake_process *self);
/* Dies: its work stops, its peers' communicators hang, or report an error when `told`. */
void fake_process_kill(struct fake_process *self, bool told);
/* Its device does nothing until woken: a hang. */
void fake_process_hang(struct fake_process *self, bool hangs);

/* One step of everything that can make one, by the seed. */
void fake_nccl_turn(struct fake_nccl *self);

/* Faults, each in `per_mille` of the calls. */
struct fake_faults {
    uint32_t id_fails, memory_fails, init_fails, init_hangs, register_fails, group_fails,
        launch_pends, async_error;
};
void fake_nccl_faults(struct fake_nccl *self, const struct fake_faults *faults);

/* What is there now, over all processes; dead ones leave theirs to nobody. */
struct fake_counts {
    uint32_t comms, streams, events, registrations, memory, pinned;
};
struct fake_counts fake_nccl_counts(const struct fake_nccl *self);
uint64_t fake_nccl_moved(const struct fake_nccl *self); /* sends that met their receive */

#endif
