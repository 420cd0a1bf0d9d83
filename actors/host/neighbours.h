/* Actors that share one process and one thread (serve --in-process): control messages and data frames go from queue to queue, without
 * sockets, rings, checksums or wake-ups. What is checked on arrival elsewhere is checked here too. Not for several threads. */
#ifndef TROUPE_HOST_NEIGHBOURS_H
#define TROUPE_HOST_NEIGHBOURS_H

#include "actors/host/transport.h"

struct neighbours; /* all of them */
struct neighbour;  /* one: its inbox, and whom it knows by which id */

struct neighbours *neighbours_open(void); /* NULL: no memory */
void neighbours_close(struct neighbours **self); /* after all have left */

/* `address`: unique in this process, shorter than ADDRESS_BYTES_MAX; copied. NULL: no memory, or taken. */
struct neighbour *neighbour_join(struct neighbours *self, const char *address, uint64_t incarnation);
/* What others send to it from now on is dropped, as to a process that has ended. */
void neighbour_leave(struct neighbour **self);

/* Whom `id` means from now on. Nobody of that address: what is sent to it is dropped. */
void neighbour_connect(struct neighbour *self, actor_id id, const char *address);
void neighbour_disconnect(struct neighbour *self, actor_id id);

/* Takes `bytes` (malloc), a packed message. ERR_NOT_FOUND: nobody is there; ERR_CORRUPT and the like: refused by
 * wire_unpack. Either way it is gone. */
int neighbour_send(struct neighbour *self, actor_id to, void *bytes, size_t size);
/* The next message, NULL: none. The caller's from now on. */
message *neighbour_receive(struct neighbour *self);

/* Its data plane; borrows the neighbour, must be closed before it leaves. */
int transport_local_open(struct transport **ret, struct neighbour *neighbour, struct failure *failure);

#endif
