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

#endif
