/* HTTP for the gateway: libmicrohttpd in a thread of its own. Whole requests become events, STREAM
 * effects become responses, and a client that hangs up is noticed at once, whether or not anything
 * is being sent to it. */
#ifndef TROUPE_HOST_HTTP_H
#define TROUPE_HOST_HTTP_H

#include "actors/actor.h"
#include "actors/host/bell.h"

struct http_event {
    bool gone;                   /* the client `request.client` has hung up; else a request */
    struct http_request request; /* strings belong to the event */
    void *memory, *body;
};
void http_event_free(struct http_event **self);

/* A listening TCP socket. host: name or address; port 0: any free one. ERR_EXISTS: the port is in
 * use. */
int http_listen(int *ret_socket, const char *host, uint16_t port, struct failure *failure);
uint16_t http_socket_port(int socket);
/* A listening UNIX socket that only this user may connect to; an old one at `path` is replaced. */
int http_listen_unix(int *ret_socket, const char *path, struct failure *failure);

struct http;
/* Takes the socket. Clients are numbered from `first_client` on, so that several of these can have different ones. */
int http_open_from(struct http **ret, int socket, uint64_t first_client, struct bell *bell,
                   struct failure *failure);
/* Takes the socket. */
int http_open(struct http **ret, int socket, struct bell *bell, struct failure *failure);
/* Sends what is complete (for at most `drain_ms`) and closes all connections. */
void http_close(struct http **self, uint32_t drain_ms);
struct http_event *http_receive(struct http *self); /* NULL: nothing has arrived */
void http_stream(struct http *self,
                 const struct effect *effect); /* copies; unknown clients: ignored */

#endif
