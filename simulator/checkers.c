/* See checkers.h. */
#include "simulator/checkers.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/wire.h"

/* What is known of one process, in its present life. */
struct life {
    struct place place;
    actor_id id;
    uint64_t incarnation;
    uint64_t told_epoch;     /* newest in its heartbeats as sent */
    uint64_t heard_epoch;    /* newest that the coordinator has received from it */
    uint64_t batch, epoch;   /* of its last first sending */
    uint32_t layer;
    bool lied;
};

/* An epoch as published. */
struct published {
    uint64_t incarnation, epoch; /* of the coordinator; 0: free */
    actor_id *holder;            /* [pairs * HOLDERS_MAX], 0: none */
    uint64_t member[CHECKED_PLACES_MAX]; /* incarnations */
    uint32_t members;
};
#define HOLDERS_MAX 8u

struct checkers {
    struct world_watch watch;
    struct world *world;
    uint64_t unnoticed_ns, last_loss_ns;
    uint32_t layers, experts, pairs;
    struct life life[CHECKED_PLACES_MAX];
    uint32_t lives;
    struct published published[CHECKED_EPOCHS_MAX];
    uint32_t next_published;
    struct published *newest;
    void (*ended)(void *context, struct place who);
    void (*bias)(void *context, const Troupe__Bias *bias);
    void *context;
    struct failure violation;
    /* A release that was too early, unless the same step goes on to publish an epoch without the member. */
    struct failure suspicion;
    uint64_t suspect; /* incarnation */
};

static struct life *life_of(struct checkers *self, struct place place) {
    for (uint32_t i = 0; i < self->lives; i++)
        if (place_matches(self->life[i].place, place))
            return &self->life[i];
    ASSERT(self->lives < CHECKED_PLACES_MAX);
    struct life *life = &self->life[self->lives++];
    *life = (struct life){.place = place};
    return life;
}

static struct life *life_of_id(struct checkers *self, actor_id id) {
    for (uint32_t i = 0; i < self->lives; i++)
        if (self->life[i].id == id)
            return &self->life[i];
    return NULL;
}

__attribute__((format(printf, 2, 3))) static void violate(struct checkers *self, const char *format, ...) {
    va_list arguments;
    if (self->violation.code != 0)
        return;
    self->violation.code = ERR_STATE;
    va_start(arguments, format);
    vsnprintf(self->violation.text, sizeof self->violation.text, format, arguments);
    va_end(arguments);
}

/* ---- what is said ---- */

static bool in_model(const struct checkers *self, uint32_t layer, uint32_t expert) {
    return layer < self->layers && expert < self->experts;
}

static void take_commit(struct checkers *self, uint64_t incarnation, const Troupe__Commit *commit) {
    for (uint32_t i = 0; i < CHECKED_EPOCHS_MAX; i++)
        if (self->published[i].incarnation == incarnation && self->published[i].epoch == commit->epoch)
            return;
    struct published *published = &self->published[self->next_published++ % CHECKED_EPOCHS_MAX];
    published->incarnation = incarnation;
    published->epoch = commit->epoch;
    memset(published->holder, 0, (size_t)self->pairs * HOLDERS_MAX * sizeof *published->holder);
    for (size_t i = 0; i < commit->n_layer; i++) {
        if (!in_model(self, commit->layer[i], commit->expert[i]))
            continue;
        actor_id *holder =
            published->holder + (commit->layer[i] * self->experts + commit->expert[i]) * HOLDERS_MAX;
        uint32_t at = 0;
        while (at < HOLDERS_MAX - 1 && holder[at] != 0)
            at++;
        holder[at] = commit->holder[i];
    }
    self->newest = published;
    published->members = 0;
    for (size_t i = 0; i < commit->n_member && i < CHECKED_PLACES_MAX; i++)
        published->member[published->members++] = commit->member[i]->incarnation;
}

static const struct published *find_published(const struct checkers *self, uint64_t incarnation,
                                              uint64_t epoch) {
    for (uint32_t i = 0; i < CHECKED_EPOCHS_MAX; i++)
        if (self->published[i].incarnation == incarnation && self->published[i].epoch == epoch)
            return &self->published[i];
    return NULL;
}

static bool lists(const struct published *published, uint32_t pair, actor_id id) {
    for (uint32_t i = 0; i < HOLDERS_MAX; i++)
        if (published->holder[(size_t)pair * HOLDERS_MAX + i] == id)
            return true;
    return false;
}

static bool is_member(const struct published *published, uint64_t incarnation) {
    for (uint32_t i = 0; published != NULL && i < published->members; i++)
        if (published->member[i] == incarnation)
            return true;
    return false;
}

/* Drain: whoever still uses an epoch that lists the copy may send rows to it. */
static void check_release(struct checkers *self, uint64_t incarnation, actor_id to,
                          const Troupe__Release *release) {
    for (uint32_t i = 0; i < self->lives; i++) {
        const struct life *life = &self->life[i];
        if (life->place.role != ROLE_ATTENTION || life->heard_epoch == 0 ||
            !is_member(self->newest, life->incarnation))
            continue;
        const struct published *used = find_published(self, incarnation, life->heard_epoch);
        for (size_t p = 0; used != NULL && p < release->n_layer; p++)
            if (in_model(self, release->layer[p], release->expert[p]) &&
                lists(used, release->layer[p] * self->experts + release->expert[p], to)) {
                self->suspect = life->incarnation;
                fail(&self->suspicion, ERR_STATE,
                     "drain: layer %u expert %u is released at actor %u while attention-%u has acknowledged "
                     "only epoch %llu, which lists it there",
                     release->layer[p], release->expert[p], to, life->place.index,
                     (unsigned long long)life->heard_epoch);
                return;
            }
    }
}

static void decide(struct checkers *self) {
    if (self->suspicion.code != 0 && self->violation.code == 0 && is_member(self->newest, self->suspect))
        self->violation = self->suspicion;
    self->suspicion.code = 0;
}

/* If two insist on different rows, one of them may be right. */
static void check_accusations(struct checkers *self, struct place who, const Troupe__Heartbeat *heartbeat) {
    for (size_t i = 0; i < heartbeat->n_accusation; i++) {
        const Troupe__Accusation *accusation = heartbeat->accusation[i];
        const struct life *accused = life_of_id(self, accusation->actor);
        if (accused != NULL && accused->incarnation == accusation->incarnation && !accused->lied &&
            !accusation->undecided)
            violate(self, "innocence: attention-%u says that expert-%u gave wrong rows of layer %u expert %u", who.index,
                    accused->place.index, accusation->layer, accusation->expert);
    }
}

/* What an actor says of its own books: pages of the latent cache, at the beginning of each batch; copies of experts, with each epoch. */
static void check_books(struct checkers *self, struct place who, const char *what) {
    struct actor *actor = world_actor(self->world, who.role, who.index);
    const char *broken = strstr(actor->class->describe(actor), "broken: ");
    if (broken != NULL)
        violate(self, "%s of %s-%u: %s", what, role_name(who.role), who.index, broken);
}

static void on_sent(struct checkers *self, struct place who, const struct effect *effect) {
    Troupe__Envelope *envelope;
    struct failure failure;
    if (wire_unpack(&envelope, effect->send.bytes, effect->send.size, &failure) < 0) {
        violate(self, "%s-%u sends what nobody can read: %.200s", role_name(who.role), who.index,
                failure.text);
        return;
    }
    if (envelope->body_case == TROUPE__ENVELOPE__BODY_COMMIT) {
        take_commit(self, envelope->from_incarnation, envelope->commit);
        check_books(self, who, "copies");
    } else if (envelope->body_case == TROUPE__ENVELOPE__BODY_BIAS && who.role == ROLE_COORDINATOR &&
             self->bias != NULL)
        self->bias(self->context, envelope->bias);
    else if (envelope->body_case == TROUPE__ENVELOPE__BODY_RELEASE)
        check_release(self, envelope->from_incarnation, effect->send.to, envelope->release);
    else if (envelope->body_case == TROUPE__ENVELOPE__BODY_HEARTBEAT) {
        struct life *life = life_of(self, who);
        life->id = envelope->from;
        life->incarnation = envelope->from_incarnation;
        if (envelope->heartbeat->epoch < life->told_epoch)
            violate(self, "epochs: %s-%u had adopted %llu and now says %llu", role_name(who.role), who.index,
                    (unsigned long long)life->told_epoch, (unsigned long long)envelope->heartbeat->epoch);
        life->told_epoch = envelope->heartbeat->epoch;
        check_accusations(self, who, envelope->heartbeat);
    }
    wire_free(&envelope);
}

static void on_message(void *context, struct place to, const message *envelope) {
    struct checkers *self = context;
    decide(self);
    if (to.role != ROLE_COORDINATOR || envelope->body_case != TROUPE__ENVELOPE__BODY_HEARTBEAT)
        return;
    struct life *life = life_of_id(self, envelope->from);
    if (life != NULL && life->incarnation == envelope->from_incarnation &&
        envelope->heartbeat->epoch > life->heard_epoch)
        life->heard_epoch = envelope->heartbeat->epoch;
}

/* ---- what is done ---- */

static void check_first_sending(struct checkers *self, struct place who, const struct frame_header *header) {
    struct life *life = life_of(self, who);
    if (header->kind != FRAME_DISPATCH || header->attempt != 0)
        return;
    if (life->batch == header->batch && life->layer == header->layer && life->epoch != header->epoch)
        violate(self, "one epoch: attention-%u sends rows of batch %llu layer %u under epochs %llu and %llu",
                who.index, (unsigned long long)header->batch, header->layer,
                (unsigned long long)life->epoch, (unsigned long long)header->epoch);
    life->batch = header->batch;
    life->layer = header->layer;
    life->epoch = header->epoch;
}

static void check_unload(struct checkers *self, struct place who, uint32_t layer, uint32_t expert) {
    uint64_t now_ns = world_now_ns(self->world);
    const actor_id *listed = self->newest == NULL
                                 ? NULL
                                 : self->newest->holder + (layer * self->experts + expert) * HOLDERS_MAX;
    if (listed == NULL || listed[0] == 0) /* nobody was told that anybody serves it */
        return;
    if (self->last_loss_ns != 0 && now_ns < self->last_loss_ns + self->unnoticed_ns)
        return;
    for (uint32_t i = 0; world_has(self->world, (struct place){ROLE_EXPERT, i}); i++)
        if (i != who.index && world_holds(self->world, i, layer, expert))
            return;
    violate(self, "coverage: expert-%u drops the last copy of layer %u expert %u", who.index, layer, expert);
}

static void on_effect(void *context, struct place who, const struct effect *effect) {
    struct checkers *self = context;
    if (who.role != ROLE_COORDINATOR)
        decide(self);
    if (effect->kind == EFFECT_SEND)
        on_sent(self, who, effect);
    else if (effect->kind == EFFECT_TRANSFER)
        check_first_sending(self, who, &effect->transfer.header);
    else if (effect->kind == EFFECT_COMPUTE && effect->compute.kind == PROGRAM_EMBED)
        check_books(self, who, "pages");
    else if (effect->kind == EFFECT_UNLOAD)
        check_unload(self, who, effect->load.layer, effect->load.expert);
}

static void on_end(void *context, struct place who) {
    struct checkers *self = context;
    *life_of(self, who) = (struct life){.place = who};
    if (who.role == ROLE_EXPERT)
        self->last_loss_ns = world_now_ns(self->world);
    if (who.role == ROLE_COORDINATOR) /* the next one has heard nothing yet */
        for (uint32_t i = 0; i < self->lives; i++)
            self->life[i].heard_epoch = 0;
    if (self->ended != NULL)
        self->ended(self->context, who);
}

static void on_lie(void *context, struct place who) {
    life_of(context, who)->lied = true;
}

static void on_spin(void *context, struct place who) {
    violate(context, "waiting: %s-%u asks again and again to be woken at a time that is over", role_name(who.role),
            who.index);
}

/* ---- the end ---- */

static int check_counts(const struct checkers *self, enum role role, const char *const *counts,
                        struct failure *failure) {
    for (uint32_t i = 0; world_has(self->world, (struct place){role, i}); i++) {
        struct actor *actor = world_actor(self->world, role, i);
        if (world_lost_for_good(self->world, (struct place){role, i}))
            continue;
        if (actor == NULL)
            return fail(failure, ERR_STATE, "%s-%u is not alive", role_name(role), i);
        const char *text = actor->class->describe(actor);
        for (const char *const *count = counts; *count != NULL; count++)
            if (strstr(text, *count) == NULL)
                return fail(failure, ERR_STATE, "leaks: %s-%u: expected \"%s\" in: %s", role_name(role), i,
                            *count, text);
    }
    return 0;
}

static int check_copies(const struct checkers *self, struct failure *failure) {
    for (uint32_t i = 0; world_has(self->world, (struct place){ROLE_EXPERT, i}); i++) {
        const struct life *life = NULL;
        if (world_lost_for_good(self->world, (struct place){ROLE_EXPERT, i}))
            continue;
        for (uint32_t l = 0; l < self->lives; l++)
            if (place_matches(self->life[l].place, (struct place){ROLE_EXPERT, i}))
                life = &self->life[l];
        for (uint32_t pair = 0; life != NULL && self->newest != NULL && pair < self->pairs; pair++) {
            if (life->id == 0 || !is_member(self->newest, life->incarnation))
                return fail(failure, ERR_STATE, "expert-%u is no member", i);
            bool held = world_holds(self->world, i, pair / self->experts, pair % self->experts);
            if (held != lists(self->newest, pair, life->id))
                return fail(failure, ERR_STATE, "leaks: expert-%u (actor %u) %s layer %u expert %u, epoch %llu %s", i,
                            life->id, held ? "holds" : "does not hold", pair / self->experts,
                            pair % self->experts, (unsigned long long)self->newest->epoch,
                            held ? "does not say so" : "says that it does");
        }
    }
    return 0;
}

int checkers_leaks(const struct checkers *self, struct failure *failure) {
    static const char *const GATEWAY[] = {"requests=0 ", "bias_users=0 ", "sequences=0 ", "closing=0 ", "prompt_tokens=0 ",
                                          "outstanding=0", NULL};
    static const char *const ATTENTION[] = {"sequences=0 ", "pages=0/", "phase=0", "bias_users=0", NULL};
    static const char *const EXPERT[] = {"loading=0 ", "wanted=0 ", "running=0 ", NULL};
    static const char *const SAMPLER[] = {"running=0 ", NULL};
    static const char *const COORDINATOR[] = {"orders=0 ", "serving=1", "bias_left=0", NULL};
    int result = check_counts(self, ROLE_GATEWAY, GATEWAY, failure);
    if (result == 0)
        result = check_counts(self, ROLE_ATTENTION, ATTENTION, failure);
    if (result == 0)
        result = check_counts(self, ROLE_EXPERT, EXPERT, failure);
    if (result == 0)
        result = check_counts(self, ROLE_SAMPLER, SAMPLER, failure);
    if (result == 0)
        result = check_counts(self, ROLE_COORDINATOR, COORDINATOR, failure);
    return result == 0 ? check_copies(self, failure) : result;
}

/* ---- life ---- */

int checkers_open(struct checkers **ret, const struct model_config *config, struct failure *failure) {
    struct checkers *self = calloc(1, sizeof *self);
    if (self == NULL)
        return fail(failure, ERR_NO_MEMORY, "no memory for checkers");
    self->layers = config->layers;
    self->experts = config->experts;
    self->pairs = config->layers * config->experts;
    self->watch = (struct world_watch){self, on_effect, on_message, on_end, on_lie, on_spin};
    bool enough = true;
    for (uint32_t i = 0; i < CHECKED_EPOCHS_MAX; i++) {
        self->published[i].holder =
            calloc((size_t)self->pairs * HOLDERS_MAX + 1, sizeof *self->published[i].holder);
        enough = enough && self->published[i].holder != NULL;
    }
    if (!enough) {
        checkers_free(&self);
        return fail(failure, ERR_NO_MEMORY, "no memory for checkers");
    }
    *ret = self;
    return 0;
}

void checkers_free(struct checkers **self) {
    if (*self == NULL)
        return;
    for (uint32_t i = 0; i < CHECKED_EPOCHS_MAX; i++)
        free((*self)->published[i].holder);
    free(*self);
    *self = NULL;
}

const struct world_watch *checkers_watch(struct checkers *self) {
    return &self->watch;
}

void checkers_begin(struct checkers *self, struct world *world, uint64_t unnoticed_ns,
                    void (*ended)(void *context, struct place who), void *context) {
    self->world = world;
    self->unnoticed_ns = unnoticed_ns;
    self->ended = ended;
    self->context = context;
}

void checkers_tell_bias(struct checkers *self, void (*bias)(void *context, const Troupe__Bias *bias)) {
    self->bias = bias;
}

const struct failure *checkers_violation(const struct checkers *self) {
    return &self->violation;
}
