/* The admin address shows what a gateway shows: the coordinator's process passes requests for the live
 * view, its feed and completions on to the gateway of its run directory, and the answers back. One thread
 * for each of them, at most RELAYS_MAX. */
#ifndef TROUPE_HOST_RELAY_H
#define TROUPE_HOST_RELAY_H

#include "actors/host/http.h"

#define RELAYS_MAX 64u

struct relays;
void relays_open(struct relays **ret, struct http *http, const char *gateway_socket);
/* Ends all that run; before the http is closed. */
void relays_close(struct relays **self);
/* The answer goes to request->client, an error as well. */
void relays_pass(struct relays *self, const struct http_request *request);
void relays_gone(struct relays *self, uint64_t client);

#endif
