/* A coordinator by hand, its members played by the test. */
#ifndef TROUPE_TESTS_PLAYERS_H
#define TROUPE_TESTS_PLAYERS_H

#include "tests/support/step.h"

#define MS      1000000u
#define PLAYERS 16

struct player {
    enum role role;
    uint64_t incarnation;
    char name[16];
    actor_id id;
};

/* The last order in the log that was sent to this member. */
struct order {
    uint64_t operation;
    bool release;
    uint32_t count, pair[12]; /* layer * 4 + expert */
};

void open_stage(struct stage *stage);
void create(struct stage *stage);
const char *described(struct stage *stage);
void assert_described(struct stage *stage, const char *text);
message envelope_of(const struct player *player);
void say_hello(struct stage *stage, const struct player *player, const char *fingerprint,
                      const char *numerics, uint64_t capacity_bytes);
/* HELLO, and the id out of WELCOME. */
struct player join(struct stage *stage, enum role role, const char *name,
                          uint64_t incarnation);
void heartbeat(struct stage *stage, const struct player *player, uint64_t epoch);
uint64_t epoch_of(struct stage *stage);
/* All adopt the newest epoch, until nothing new comes of it. */
void settle(struct stage *stage, const struct player *players, uint32_t count);
void ready(struct stage *stage, const struct player *player, uint64_t operation, bool ok);
struct order last_order(struct stage *stage, const struct player *player);
/* The newest epoch in the log; valid until the next stage_sent. */
const Troupe__Commit *last_commit(struct stage *stage);
const Troupe__Member *listed(const Troupe__Commit *commit, actor_id id);
uint32_t placed_at(const Troupe__Commit *commit, actor_id id);
/* gateway, attention, expert-0, expert-1, sampler; all ready, experts loaded. */
void open_troupe(struct stage *stage, struct player *player);
void fill_troupe(struct stage *stage, struct player *player); /* after open_stage and changes to its settings */

/* The admin interface. The answer's body is valid until the next request. */
const char *request(struct stage *stage, const char *method, const char *path, const char *body,
                    uint16_t wanted_status);
void post(struct stage *stage, const char *path, const char *body); /* 202 wanted */
void assert_says(const char *text, const char *wanted);
void assert_phase(struct stage *stage, uint32_t id, const char *phase);
/* READY for the last order. */
void answer_order(struct stage *stage, const struct player *player, bool ok);
/* Experts carry out their orders and all adopt what comes of it, a few times over. */
void go_on(struct stage *stage, const struct player *player, uint32_t count);
/* An attention actor's heartbeat: so many rows went to the expert since it began. */
void route(struct stage *stage, const struct player *player, uint32_t layer, uint32_t expert, uint64_t rows);
/* An expert's heartbeat: rows computed since it began, and how long they took. */
void work(struct stage *stage, const struct player *player, uint64_t rows, uint64_t busy_ns);

#endif
