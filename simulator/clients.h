/* The clients of a simulated cluster: they send the scenario's requests over HTTP, read what comes (streamed or whole), try again when
 * they are refused or the gateway's process ends (some streams go on with Last-Event-ID then), and hang up when a fault says so. All that they receive is put together per choice,
 * so that it can be compared with the fault-free answer after every piece, however it was cut. */
#ifndef TROUPE_SIMULATOR_CLIENTS_H
#define TROUPE_SIMULATOR_CLIENTS_H

#include "actors/bias_table.h"
#include "simulator/scenario.h"
#include "simulator/world.h"

#define CHOICES_DRAWN_MAX 2u

struct grown_text {
    char *bytes; /* NUL-terminated, NULL: empty */
    size_t size, capacity;
};

/* What one choice has said so far. */
struct answer {
    struct grown_text text, tokens, logprobs;
    char finish[16];
};

enum client_state { CLIENT_WAITING, CLIENT_OPEN, CLIENT_DONE, CLIENT_GONE };

struct client {
    enum client_state state;
    uint64_t id;    /* of the connection */
    uint64_t at_ns; /* WAITING: when it sends */
    uint16_t status;
    struct grown_text buffer; /* of the body: what has not been looked at yet */
    struct answer answer[CHOICES_DRAWN_MAX];
    bool finished; /* [DONE], or the whole body */
    bool versioned; /* it has been said which version of the routing bias this answer is made with */
    uint64_t version;
    char last_id[64]; /* of the last event; empty: none, or it does not go on */
    uint32_t attempts, went_on;
};

struct clients {
    const struct scenario *scenario;
    struct world *world;
    /* What the fault-free run answers to this request, with this version of the routing bias; NULL: there is no such version. No
     * function: nothing to compare with yet. */
    const struct client *(*expected)(void *context, uint32_t request, uint64_t version);
    void *context;
    struct client client[REQUESTS_DRAWN_MAX];
    uint64_t last_id, refused;
    struct failure violation; /* code 0: none */
};

void clients_open(struct clients *self, const struct scenario *scenario);
void clients_free(struct clients *self);
uint64_t clients_due_ns(const struct clients *self); /* NEVER: nobody wants to send */
void clients_act(struct clients *self);              /* those whose time has come send */
void clients_hang_up(struct clients *self, uint32_t index);
void clients_on_stream(struct clients *self, const struct effect *effect);
void clients_on_gateway_end(struct clients *self);
/* All have their answers, or have hung up. */
bool clients_done(const struct clients *self);
/* After clients_done: everybody's whole answer is the expected one. */
void clients_compare_all(struct clients *self);

#endif
