/* The process host: runs one actor in this process, on real sockets, shared memory, threads and
 * clocks. */
#ifndef TROUPE_HOST_PROCESS_H
#define TROUPE_HOST_PROCESS_H

#include "actors/actor.h"
#include "actors/host/options.h"

/* Exit codes that a supervisor understands. */
#define EXIT_FAILED        1  /* worth a restart */
#define EXIT_CONFIGURATION 78 /* will fail again: wrong model, option or address */

/* Until the actor EXITs or SIGTERM/SIGINT has ended it. Returns the exit code; reasons are logged.
 */
int process_run(enum role role, const struct options *options);

/* Kernels as --numerics and --isa say. */
/* The numerics profile is a GPU's: engines then have one compute thread. */
bool options_on_gpu(const struct options *options);
/* Whether the chosen numerics profile has kernels for the model. */
int options_check_model(const struct options *options, const struct model_config *config,
                        struct failure *failure);
const struct kernels *options_kernels(const struct options *options, struct failure *failure);

/* Names of a troupe's things. `run`: 16 hex digits that follow from the coordinator's address and
 * the user, so that all processes of one host find each other and several troupes do not meet. */
void process_run_id(const char *coordinator_address, char ret[static 17]);
/* "ipc://<run dir>/coordinator.control"; ERR_TOO_LARGE if a socket's path could not hold it. */
int coordinator_address_in(const char *run_dir, char *ret, size_t room, struct failure *failure);

#endif
