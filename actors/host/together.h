/* serve --in-process: all actors of a troupe in one process, on one thread that takes turns, with one pool of compute threads. The same
 * actors and engines as in processes of their own; what a process boundary costs is the difference. Nothing is restarted, and scaling,
 * which takes a supervisor, is refused. */
#ifndef TROUPE_HOST_TOGETHER_H
#define TROUPE_HOST_TOGETHER_H

#include "actors/host/process.h"

/* Until SIGINT or SIGTERM, or until an actor fails. `listening`: borrowed; run_dir: of the admin socket. `ready` is called once, when
 * /ready answers 200. Returns the exit code. */
int together_run(const struct options *options, int listening, const char *run_dir, void (*ready)(void *context),
                 void *context);

#endif
