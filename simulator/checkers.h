/* Invariants of a whole cluster, checked while it runs by looking on (struct world_watch); none of them changes anything.
 *
 *   epochs      what an actor says it has adopted never grows smaller in its life
 *   one epoch   all first sendings of a (batch, layer) carry one epoch
 *   drain       a copy is released only when every attention actor has acknowledged an epoch without it
 *   coverage    no copy is dropped that is the last one, unless expert processes have just ended
 *   waiting     nobody asks to be woken at a time that is over already, again and again
 *   books       pages of latent caches and copies of experts are what the counts of their actor say
 *   innocence   nobody is accused of wrong rows who has given none
 *   leaks       in the end every count is back to zero, and the experts held are those of the last epoch */
#ifndef TROUPE_SIMULATOR_CHECKERS_H
#define TROUPE_SIMULATOR_CHECKERS_H

#include "simulator/world.h"

#define CHECKED_PLACES_MAX 128u
#define CHECKED_EPOCHS_MAX 64u

struct checkers;
int checkers_open(struct checkers **ret, const struct model_config *config, struct failure *failure);
void checkers_free(struct checkers **self);
/* What to hand to the world; then tell which world it is and how long a loss may go unnoticed in it. */
const struct world_watch *checkers_watch(struct checkers *self);
void checkers_begin(struct checkers *self, struct world *world, uint64_t unnoticed_ns,
                    void (*ended)(void *context, struct place who), void *context);
/* Told of every version of the routing bias that the coordinator hands out. */
void checkers_tell_bias(struct checkers *self, void (*bias)(void *context, const Troupe__Bias *bias));
/* The first invariant that was violated; code 0: none. */
const struct failure *checkers_violation(const struct checkers *self);
/* All requests are over and the cluster is calm: is anything left? 0 or ERR_STATE with what is. */
int checkers_leaks(const struct checkers *self, struct failure *failure);

#endif
