/* Asks an HTTP server of this machine for a path and reads the status, without ever waiting: for
 * the supervisor's /ready. */
#ifndef TROUPE_HOST_PROBE_HTTP_H
#define TROUPE_HOST_PROBE_HTTP_H

#include <stdint.h>

struct probe_http {
    int file; /* -1: no question is out */
    char answer[64];
    unsigned bytes;
};

/* Asks; file is -1 afterwards if that was not possible. Closes an older question. */
void probe_http_ask(struct probe_http *self, int listening_socket, const char *path);
/* To be called when `file` is readable. The status, 0: not yet, -1: no answer. Closes when done. */
int probe_http_read(struct probe_http *self);
void probe_http_close(struct probe_http *self);

#endif
