/* Versions of the routing bias: made by the rule (bias.c), handed out, made current, freed.
 *
 *   made -> COMING (BIAS goes to every gateway and attention actor) -> CURRENT (all that are ready
 *   hold it; the next epoch names it) -> RETIRED (another is) -> freed (nobody uses it, and has not
 *   for bias_linger_ms, so that a client which was cut off can still go on with it)
 *
 * Everything follows from what heartbeats say is held and used: what is missing is sent, what is
 * too much is released, each time, so a lost message costs one round. A member becomes READY only
 * when it holds every version that exists.
 *
 * Invariants: 1. a version never changes; 2. an epoch names a version only when every ready gateway
 * and attention actor holds it; 3. a version that a request may still be pinned to is not freed;
 * 4. at most bias_versions exist: until one is freed, the biases stay as they are.
 *
 * A coordinator that is started again takes versions from the HELLOs of those who hold them, and
 * the current one from the newest epoch that any of them knows. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/coordinator.h"

/* ---- the versions ---- */

static struct bias_live *find(struct coordinator *self, uint64_t id) {
    for (uint32_t i = 0; i < BIAS_VERSIONS_MAX && id != 0; i++)
        if (self->bias.version[i].id == id)
            return &self->bias.version[i];
    return NULL;
}

static uint32_t count(const struct coordinator *self) {
    uint32_t versions = 0;
    for (uint32_t i = 0; i < BIAS_VERSIONS_MAX; i++)
        versions += self->bias.version[i].id != 0;
    return versions;
}

/* Takes `delta`, which malloc made. NULL: there is no room. */
static struct bias_live *add(struct coordinator *self, uint64_t id, float **delta) {
    for (uint32_t i = 0; i < BIAS_VERSIONS_MAX; i++) {
        struct bias_live *version = &self->bias.version[i];
        if (version->id != 0)
            continue;
        *version = (struct bias_live){.id = id, .delta = *delta, .idle_since_ns = NEVER};
        *delta = NULL;
        if (bias_number(id) > self->bias.last_number)
            self->bias.last_number = bias_number(id);
        return version;
    }
    return NULL;
}

static void drop(struct bias_live *version) {
    free(version->delta);
    *version = (struct bias_live){.idle_since_ns = NEVER};
}

static float *copy(const struct coordinator *self, const float *delta) {
    float *ret = calloc((size_t)self->pairs + 1, sizeof *ret);
    if (ret != NULL && delta != NULL)
        memcpy(ret, delta, (size_t)self->pairs * sizeof *ret);
    return ret;
}

/* ---- who holds what ---- */

static bool keeps(const struct seat *seat) {
    return seat->role == ROLE_GATEWAY || seat->role == ROLE_ATTENTION;
}

static bool holds(const struct seat *seat, uint64_t id) {
    for (uint32_t i = 0; i < seat->bias.count; i++)
        if (seat->bias.id[i] == id)
            return true;
    return false;
}

bool bias_is_held(const struct coordinator *self, const struct seat *seat) {
    for (uint32_t i = 0; i < BIAS_VERSIONS_MAX && keeps(seat); i++)
        if (self->bias.version[i].id != 0 && !holds(seat, self->bias.version[i].id))
            return false;
    return true;
}

static void send_version(const struct coordinator *self, const struct seat *seat,
                         const struct bias_live *version, struct effects *out) {
    Troupe__Bias bias = TROUPE__BIAS__INIT;
    bias.version = version->id;
    bias.n_delta = self->pairs;
    bias.delta = version->delta;
    message envelope = coordinator_envelope(self);
    envelope.body_case = TROUPE__ENVELOPE__BODY_BIAS;
    envelope.bias = &bias;
    effects_send(out, seat->id, &envelope);
}

static void send_release(const struct coordinator *self, const struct seat *seat, uint64_t id,
                         struct effects *out) {
    Troupe__BiasRelease release = TROUPE__BIAS_RELEASE__INIT;
    release.version = id;
    message envelope = coordinator_envelope(self);
    envelope.body_case = TROUPE__ENVELOPE__BODY_BIAS_RELEASE;
    envelope.bias_release = &release;
    effects_send(out, seat->id, &envelope);
}

/* What it lacks, and what nobody uses any more. */
static void tell(struct coordinator *self, struct seat *seat, uint64_t now_ns,
                 struct effects *out) {
    bool told = false;
    for (uint32_t i = 0; i < BIAS_VERSIONS_MAX; i++) {
        const struct bias_live *version = &self->bias.version[i];
        if (version->id == 0 || holds(seat, version->id))
            continue;
        send_version(self, seat, version, out);
        told = true;
    }
    for (uint32_t i = 0; i < seat->bias.count && self->learn_until_ns == NEVER; i++) {
        if (seat->bias.users[i] > 0 || find(self, seat->bias.id[i]) != NULL)
            continue;
        send_release(self, seat, seat->bias.id[i], out);
        told = true;
    }
    if (told)
        seat->bias.sent_ns = now_ns;
}

void bias_joined(struct coordinator *self, struct seat *seat, uint64_t now_ns,
                 struct effects *out) {
    if (keeps(seat))
        tell(self, seat, now_ns, out);
}

void bias_on_heartbeat(struct coordinator *self, struct seat *seat,
                       const Troupe__Heartbeat *heartbeat, uint64_t now_ns, struct effects *out) {
    if (!keeps(seat))
        return;
    seat->bias.count = (uint32_t)heartbeat->n_bias_version;
    for (uint32_t i = 0; i < seat->bias.count; i++) {
        seat->bias.id[i] = heartbeat->bias_version[i];
        seat->bias.users[i] = heartbeat->bias_users[i];
    }
    if (now_ns - seat->bias.sent_ns >= self->retry_ns)
        tell(self, seat, now_ns, out);
}

/* ---- the rule ---- */

static void begin_interval(struct coordinator *self, uint64_t now_ns) {
    struct bias_versions *bias = &self->bias;
    for (uint32_t pair = 0; pair < self->pairs; pair++)
        bias->before[pair] = statistics_load(self, pair);
    bias->next_ns = bias->on ? now_ns + bias->interval_ns : NEVER;
}

/* Rows of the interval into bias.rows; false: too few to tell anything. */
static bool take_rows(struct coordinator *self) {
    struct bias_versions *bias = &self->bias;
    uint32_t experts = self->config.experts, layers = self->moe_pairs / experts;
    uint64_t sum = 0;
    for (uint32_t pair = 0; pair < self->pairs; pair++) {
        uint64_t total = statistics_load(self, pair);
        bias->rows[pair] = total > bias->before[pair] ? total - bias->before[pair] : 0;
        sum += bias->rows[pair];
    }
    if (sum / layers < self->settings.bias_rows)
        return false;
    bias->mean = bias->worst = 0;
    for (uint32_t layer = 0; layer < self->config.layers; layer++) {
        if (!self->is_moe[layer])
            continue;
        double imbalance = bias_imbalance(bias->rows + (size_t)layer * experts, experts);
        bias->mean += imbalance / layers;
        bias->worst = imbalance > bias->worst ? imbalance : bias->worst;
    }
    return true;
}

/* The new version is COMING. */
static void propose(struct coordinator *self, float **delta, uint64_t now_ns, struct effects *out) {
    uint64_t id = bias_id(self->bias.last_number + 1, *delta, self->pairs);
    struct bias_live *version = add(self, id, delta);
    ASSERT(version != NULL);
    self->bias.coming = id;
    for (uint32_t i = 0; i < self->seats; i++)
        if (keeps(&self->seat[i])) {
            send_version(self, &self->seat[i], version, out);
            self->seat[i].bias.sent_ns = now_ns;
        }
}

static void adapt(struct coordinator *self, uint64_t now_ns, struct effects *out) {
    struct bias_versions *bias = &self->bias;
    if (bias->next_ns == 0) {
        begin_interval(self, now_ns);
        return;
    }
    bias->next_ns = now_ns + bias->interval_ns;
    if (bias->coming != 0 || self->learn_until_ns != NEVER || !take_rows(self))
        return; /* it goes on counting */
    if (count(self) >= self->settings.bias_versions) {
        effects_trace(out, TRACE_DEBUG, "bias: %u versions are in use, no further one is made",
                      count(self));
        return;
    }
    const struct bias_live *current = find(self, bias->current);
    float *delta = copy(self, current != NULL ? current->delta : NULL);
    uint32_t changed = 0, experts = self->config.experts;
    for (uint32_t layer = 0; delta != NULL && layer < self->config.layers; layer++)
        if (self->is_moe[layer])
            changed += bias_step(delta + (size_t)layer * experts,
                                 bias->rows + (size_t)layer * experts, experts, &bias->rule);
    begin_interval(self, now_ns);
    if (changed > 0)
        propose(self, &delta, now_ns, out);
    free(delta);
}

/* ---- current, retired, freed ---- */

/* From the next epoch on. */
static void make_current(struct coordinator *self, uint64_t id, struct effects *out) {
    struct bias_live *old = find(self, self->bias.current);
    if (old != NULL)
        old->retired_epoch = self->epoch + 1;
    self->bias.current = id;
    self->bias.coming = 0;
    self->changed = true;
    effects_trace(out, TRACE_INFO, "bias version %u", bias_number(id));
}

static bool ready_ones_hold(const struct coordinator *self, uint64_t id) {
    for (uint32_t i = 0; i < self->seats; i++) {
        const struct seat *seat = &self->seat[i];
        if (keeps(seat) && seat->ready && !seat->draining && !holds(seat, id))
            return false;
    }
    return true;
}

/* A gateway pins what its epoch names; a request or sequence that is pinned counts as a user. */
static bool in_use(const struct coordinator *self, const struct bias_live *version) {
    if (version->id == self->bias.current || version->id == self->bias.coming)
        return true;
    for (uint32_t i = 0; i < self->seats; i++) {
        const struct seat *seat = &self->seat[i];
        if (seat->role == ROLE_GATEWAY && seat->acknowledged_epoch < version->retired_epoch)
            return true;
        for (uint32_t held = 0; held < seat->bias.count; held++)
            if (seat->bias.id[held] == version->id && seat->bias.users[held] > 0)
                return true;
    }
    return false;
}

static uint64_t linger_ns(const struct coordinator *self) {
    return (uint64_t)self->settings.bias_linger_ms * 1000000u;
}

void bias_review(struct coordinator *self, uint64_t now_ns, struct effects *out) {
    struct bias_versions *bias = &self->bias;
    if (bias->on && now_ns >= bias->next_ns)
        adapt(self, now_ns, out);
    if (self->learn_until_ns != NEVER)
        return;
    if (bias->coming != 0 && ready_ones_hold(self, bias->coming))
        make_current(self, bias->coming, out);
    for (uint32_t i = 0; i < BIAS_VERSIONS_MAX; i++) {
        struct bias_live *version = &bias->version[i];
        if (version->id == 0)
            continue;
        if (in_use(self, version))
            version->idle_since_ns = NEVER;
        else if (version->idle_since_ns == NEVER)
            version->idle_since_ns = now_ns;
        if (version->idle_since_ns != NEVER && now_ns - version->idle_since_ns >= linger_ns(self))
            drop(version);
    }
}

uint64_t bias_deadline(const struct coordinator *self) {
    uint64_t deadline = self->bias.on ? self->bias.next_ns : NEVER;
    for (uint32_t i = 0; i < BIAS_VERSIONS_MAX; i++) {
        uint64_t since = self->bias.version[i].idle_since_ns;
        if (since != NEVER && since + linger_ns(self) < deadline)
            deadline = since + linger_ns(self);
    }
    return deadline;
}

uint32_t bias_left(const struct coordinator *self) {
    uint32_t left = count(self);
    left -= (self->bias.current != 0) + (self->bias.coming != 0);
    for (uint32_t i = 0; i < self->seats; i++)
        for (uint32_t held = 0; held < self->seat[i].bias.count; held++)
            left += find((struct coordinator *)self, self->seat[i].bias.id[held]) == NULL;
    return left;
}

/* ---- after a restart ---- */

void bias_learn(struct coordinator *self, struct seat *seat, const Troupe__Hello *hello,
                struct effects *out) {
    if (hello->epoch > self->bias.learnt_epoch && self->learn_until_ns != NEVER) {
        self->bias.learnt_epoch = hello->epoch;
        self->bias.current = hello->bias_version;
        self->bias.on = hello->bias_on;
    }
    seat->bias.count = 0;
    for (size_t i = 0; i < hello->n_bias; i++) {
        const Troupe__Bias *bias = hello->bias[i];
        if (bias->n_delta != self->pairs ||
            bias_id(bias_number(bias->version), bias->delta, self->pairs) != bias->version) {
            effects_trace(out, TRACE_WARNING,
                          "ignored bias version %u of %s: its deltas are not those of its name",
                          bias_number(bias->version), seat->name);
            continue;
        }
        seat->bias.id[seat->bias.count] = bias->version;
        seat->bias.users[seat->bias.count++] = 1; /* until a heartbeat says it */
        if (find(self, bias->version) != NULL)
            continue;
        float *delta = copy(self, bias->delta);
        if (delta != NULL)
            add(self, bias->version, &delta);
        free(delta);
    }
}

void bias_learnt(struct coordinator *self, uint64_t now_ns, struct effects *out) {
    if (self->bias.current != 0 && find(self, self->bias.current) == NULL) {
        effects_trace(out, TRACE_WARNING,
                      "nobody holds bias version %u any more; the model's own is current",
                      bias_number(self->bias.current));
        self->bias.current = 0;
    }
    for (uint32_t i = 0; i < BIAS_VERSIONS_MAX; i++)
        self->bias.version[i].retired_epoch = self->epoch + 1;
    begin_interval(self, now_ns);
}

/* ---- what people ask for ---- */

int bias_switch(struct coordinator *self, bool on, const struct bias_rule *rule,
                uint64_t interval_ms, uint64_t now_ns, struct failure *failure) {
    if (self->moe_pairs == 0)
        return fail(failure, ERR_UNSUPPORTED, "the model has no routed experts");
    if (!(rule->gamma > 0 && rule->gamma <= BIAS_DELTA_MAX))
        return fail(failure, ERR_INVALID, "gamma: above 0 and at most %d expected, found %g",
                    BIAS_DELTA_MAX, rule->gamma);
    if (!(rule->clamp >= 0 && rule->clamp <= BIAS_DELTA_MAX))
        return fail(failure, ERR_INVALID, "clamp: 0 to %d expected, found %g", BIAS_DELTA_MAX,
                    rule->clamp);
    if (interval_ms < 10 || interval_ms > 86400000)
        return fail(failure, ERR_INVALID, "interval_ms: 10 to 86400000 expected, found %llu",
                    (unsigned long long)interval_ms);
    struct bias_versions *bias = &self->bias;
    bias->rule = *rule;
    bias->interval_ns = interval_ms * 1000000u;
    bias->coming = on ? bias->coming : 0; /* no further change */
    if (bias->on != on)
        self->changed = true; /* members remember it for a coordinator that is started again */
    bias->on = on;
    begin_interval(self, now_ns);
    return 0;
}

void bias_reset(struct coordinator *self, uint64_t now_ns, struct effects *out) {
    self->bias.coming = 0;
    if (self->bias.current != 0)
        make_current(self, 0, out);
    begin_interval(self, now_ns);
}

/* ---- life ---- */

bool bias_open(struct coordinator *self) {
    struct bias_versions *bias = &self->bias;
    for (uint32_t i = 0; i < BIAS_VERSIONS_MAX; i++)
        bias->version[i].idle_since_ns = NEVER;
    bias->before = calloc((size_t)self->pairs + 1, sizeof *bias->before);
    bias->rows = calloc((size_t)self->pairs + 1, sizeof *bias->rows);
    bias->rule = (struct bias_rule){self->settings.bias_gamma, self->settings.bias_clamp};
    bias->interval_ns = (uint64_t)self->settings.bias_interval_ms * 1000000u;
    bias->on = self->settings.bias_control != 0 && self->moe_pairs > 0;
    bias->next_ns = bias->on ? 0 : NEVER; /* the first interval begins with the first event */
    bias->mean = bias->worst = -1;
    return bias->before != NULL && bias->rows != NULL;
}

void bias_close(struct coordinator *self) {
    for (uint32_t i = 0; i < BIAS_VERSIONS_MAX; i++)
        free(self->bias.version[i].delta);
    free(self->bias.before);
    free(self->bias.rows);
}

void coordinator_set_bias(struct actor *actor, const float *delta) {
    struct coordinator *self = (struct coordinator *)actor;
    float *own = copy(self, delta);
    ASSERT(own != NULL && count(self) == 0 && self->seats == 0);
    uint64_t id = bias_id(1, delta, self->pairs);
    add(self, id, &own);
    self->bias.current = id;
}
