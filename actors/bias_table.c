/* The versions of the routing bias that a gateway or an attention actor holds (see bias_table.h).
 *
 * The coordinator hands every version to both roles before any request is pinned to it, and tells
 * them to drop it when heartbeats show that nobody uses it any more. A version with users stays
 * whatever anybody says: the gateway's copy is what its requests can be computed from again. */
#include "actors/bias_table.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- names ---- */

uint64_t bias_id(uint32_t number, const float *delta, uint32_t entries) {
    uint64_t hash = 0xcbf29ce484222325u; /* FNV-1a over the floats' bits, by words */
    for (uint32_t i = 0; i < entries; i++) {
        uint32_t bits;
        memcpy(&bits, &delta[i], sizeof bits);
        hash = (hash ^ bits) * 0x100000001b3u;
    }
    return (uint64_t)number << 32 | (uint32_t)(hash ^ hash >> 32);
}

void bias_name(char ret[BIAS_NAME_BYTES], uint64_t id) {
    if (id == 0)
        snprintf(ret, BIAS_NAME_BYTES, "0");
    else
        snprintf(ret, BIAS_NAME_BYTES, "%" PRIu32 ".%08" PRIx32, bias_number(id), (uint32_t)id);
}

const char *bias_name_read(const char *text, char stop, uint64_t *ret) {
    char again[BIAS_NAME_BYTES];
    char *end;
    if (*text < '0' || *text > '9')
        return NULL;
    unsigned long long number = strtoull(text, &end, 10), digest = 0;
    if (*end == '.')
        digest = strtoull(end + 1, &end, 16);
    if (number > UINT32_MAX || digest > UINT32_MAX || (*end != 0 && *end != stop))
        return NULL;
    uint64_t id = (uint64_t)number << 32 | digest;
    bias_name(again, id); /* there is one spelling */
    if (strlen(again) != (size_t)(end - text) || strncmp(again, text, strlen(again)) != 0)
        return NULL;
    *ret = id;
    return end;
}

/* ---- the table ---- */

void bias_table_init(struct bias_table *self, uint32_t entries) {
    memset(self, 0, sizeof *self);
    self->entries = entries;
}

void bias_table_free(struct bias_table *self) {
    for (uint32_t i = 0; i < BIAS_VERSIONS_HELD_MAX; i++)
        free(self->version[i].delta);
    memset(self, 0, sizeof *self);
}

static const struct bias_version *find(const struct bias_table *self, uint64_t id) {
    for (uint32_t i = 0; i < BIAS_VERSIONS_HELD_MAX && id != 0; i++)
        if (self->version[i].id == id)
            return &self->version[i];
    return NULL;
}

struct bias_version *bias_table_find(struct bias_table *self, uint64_t id) {
    return (struct bias_version *)find(self, id);
}

bool bias_table_holds(const struct bias_table *self, uint64_t id) {
    return id == 0 || find(self, id) != NULL;
}

static void drop(struct bias_table *self, struct bias_version *version) {
    ASSERT(version->users == 0);
    free(version->delta);
    *version = (struct bias_version){0};
    self->count--;
}

bool bias_table_has_room(const struct bias_table *self) {
    for (uint32_t i = 0; i < BIAS_VERSIONS_HELD_MAX; i++)
        if (self->version[i].users == 0)
            return true;
    return false;
}

/* A free place, or that of the oldest version without users. */
static struct bias_version *find_room(struct bias_table *self) {
    struct bias_version *oldest = NULL;
    for (uint32_t i = 0; i < BIAS_VERSIONS_HELD_MAX; i++) {
        struct bias_version *version = &self->version[i];
        if (version->id == 0)
            return version;
        if (version->users == 0 && (oldest == NULL || version->id < oldest->id))
            oldest = version;
    }
    if (oldest != NULL)
        drop(self, oldest);
    return oldest;
}

int bias_table_take(struct bias_table *self, const Troupe__Bias *bias, struct failure *failure) {
    if (bias_table_holds(self, bias->version))
        return 0;
    if (bias->n_delta != self->entries)
        return fail(failure, ERR_CORRUPT, "bias version %u: %u deltas expected, found %zu",
                    bias_number(bias->version), self->entries, bias->n_delta);
    if (bias_id(bias_number(bias->version), bias->delta, self->entries) != bias->version)
        return fail(failure, ERR_CORRUPT, "bias version %u: its deltas are not those of its name",
                    bias_number(bias->version));
    struct bias_version *version = find_room(self);
    if (version == NULL)
        return fail(failure, ERR_BUSY, "bias version %u: %d versions are in use already",
                    bias_number(bias->version), BIAS_VERSIONS_HELD_MAX);
    float *delta = malloc((size_t)self->entries * sizeof *delta + 1);
    if (delta == NULL)
        return fail(failure, ERR_NO_MEMORY, "bias version %u: no memory for %u deltas",
                    bias_number(bias->version), self->entries);
    memcpy(delta, bias->delta, (size_t)self->entries * sizeof *delta);
    *version = (struct bias_version){bias->version, delta, 0};
    self->count++;
    return 0;
}

bool bias_table_release(struct bias_table *self, uint64_t id) {
    struct bias_version *version = bias_table_find(self, id);
    if (version == NULL || version->users > 0)
        return false;
    drop(self, version);
    return true;
}

uint32_t bias_table_users(const struct bias_table *self) {
    uint32_t users = 0;
    for (uint32_t i = 0; i < BIAS_VERSIONS_HELD_MAX; i++)
        users += self->version[i].users;
    return users;
}

/* ---- messages ---- */

void bias_table_beat(const struct bias_table *self, Troupe__Heartbeat *heartbeat,
                     struct effects *out) {
    if (self->count == 0)
        return;
    uint32_t count = 0;
    heartbeat->bias_version = effects_alloc(out, self->count * sizeof *heartbeat->bias_version);
    heartbeat->bias_users = effects_alloc(out, self->count * sizeof *heartbeat->bias_users);
    for (uint32_t i = 0; i < BIAS_VERSIONS_HELD_MAX; i++)
        if (self->version[i].id != 0) {
            heartbeat->bias_version[count] = self->version[i].id;
            heartbeat->bias_users[count++] = self->version[i].users;
        }
    ASSERT(count == self->count);
    heartbeat->n_bias_version = heartbeat->n_bias_users = count;
}

void bias_fill(Troupe__Bias *ret, const struct bias_version *version, uint32_t entries) {
    troupe__bias__init(ret);
    ret->version = version->id;
    ret->n_delta = entries;
    ret->delta = version->delta;
}

void bias_table_hello(const struct bias_table *self, Troupe__Hello *hello, struct effects *out) {
    hello->bias = effects_alloc(out, (self->count + 1) * sizeof *hello->bias);
    for (uint32_t i = 0; i < BIAS_VERSIONS_HELD_MAX; i++)
        if (self->version[i].id != 0) {
            Troupe__Bias *bias = effects_alloc(out, sizeof *bias);
            bias_fill(bias, &self->version[i], self->entries);
            hello->bias[hello->n_bias++] = bias;
        }
}

bool bias_table_on_message(struct bias_table *self, const message *envelope, struct effects *out) {
    struct failure failure;
    if (envelope->body_case == TROUPE__ENVELOPE__BODY_BIAS_RELEASE)
        return bias_table_release(self, envelope->bias_release->version);
    if (bias_table_holds(self, envelope->bias->version))
        return false;
    if (bias_table_take(self, envelope->bias, &failure) == 0)
        return true;
    effects_trace(out, TRACE_WARNING, "%s", failure.text);
    return false;
}
