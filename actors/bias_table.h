/* Versions of the routing bias, as actors keep them. Version 0 is the model's own correction bias and needs no entry; every later one is
 * an immutable list of deltas [layers, experts] that are added to the model's own.
 *
 * A version is named everywhere (COMMIT, SUBMIT, heartbeats, answers) by one number, its id: a running number in the upper half and a
 * digest of its deltas in the lower one. So two coordinators that count alike but adapt differently never give one name to two versions,
 * and a name that a client brings back means the very deltas that its stream began with, or nothing. 0: version 0. */
#ifndef TROUPE_BIAS_TABLE_H
#define TROUPE_BIAS_TABLE_H

#include "actors/actor.h"

#define BIAS_NAME_BYTES 32

struct bias_version {
    uint64_t id;    /* 0: this place is free */
    float *delta;   /* [entries] */
    uint32_t users; /* requests or sequences that are pinned to it: it stays while there are any */
};

/* Versions never move, so pointers to them stay good while they have users. */
struct bias_table {
    uint32_t entries; /* layers * experts */
    uint32_t count;
    struct bias_version version[BIAS_VERSIONS_HELD_MAX];
};

uint64_t bias_id(uint32_t number, const float *delta, uint32_t entries);
static inline uint32_t bias_number(uint64_t id) {
    return (uint32_t)(id >> 32);
}
/* "0", "7.9f86d081": as system_fingerprint and the ids of events carry it. */
void bias_name(char ret[BIAS_NAME_BYTES], uint64_t id);
/* Reads such a name up to its end or `stop`; returns where it ended, NULL: it is none. */
const char *bias_name_read(const char *text, char stop, uint64_t *ret);

void bias_table_init(struct bias_table *self, uint32_t entries);
void bias_table_free(struct bias_table *self);
struct bias_version *bias_table_find(struct bias_table *self, uint64_t id);
/* Version 0 is always held. */
bool bias_table_holds(const struct bias_table *self, uint64_t id);
/* Another version could be taken. */
bool bias_table_has_room(const struct bias_table *self);
/* Takes a copy of a version; one that is known is left as it is. In a full table it takes the place of one without users.
 * ERR_CORRUPT: its deltas are not those that its name says. ERR_BUSY: every version of a full table has users. */
int bias_table_take(struct bias_table *self, const Troupe__Bias *bias, struct failure *failure);
/* Drops a version without users; false: it is not held, or in use. */
bool bias_table_release(struct bias_table *self, uint64_t id);
uint32_t bias_table_users(const struct bias_table *self); /* of all versions together */

/* What a heartbeat and a HELLO say of them, in the effects' arena. */
void bias_table_beat(const struct bias_table *self, Troupe__Heartbeat *heartbeat, struct effects *out);
void bias_table_hello(const struct bias_table *self, Troupe__Hello *hello, struct effects *out);
/* The message that hands one over. */
void bias_fill(Troupe__Bias *ret, const struct bias_version *version, uint32_t entries);

/* BIAS and BIAS_RELEASE of the coordinator, or BIAS of a gateway, as both keepers take them: true if what is held has changed. */
bool bias_table_on_message(struct bias_table *self, const message *envelope, struct effects *out);

#endif
