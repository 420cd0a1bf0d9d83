/* Which address of this machine a peer is told. */
#ifndef TROUPE_HOST_ENDPOINT_H
#define TROUPE_HOST_ENDPOINT_H

#include "actors/limits.h"

/* `bound` as ZeroMQ gives it. "tcp://0.0.0.0:1234" means nothing to peers: it becomes the address of the interface that leads to
 * `towards` (tcp://host:port; NULL or another kind: this machine itself). Everything else is copied. Never a host name, which peers
 * might not be able to resolve. */
void endpoint_advertised(const char *bound, const char *towards, char ret[static ADDRESS_BYTES_MAX]);

#endif
