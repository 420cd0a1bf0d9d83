/* Expert processes that gave wrong rows, as audits of attention actors have found them
 * (actors/attention_audit.c; every heartbeat repeats what has been found until it is seen to).
 *
 * Its copies leave the epoch at once, as if it had died, and others take over. Then
 *   it ends, and its supervisor starts it again with weights read anew     so many times as
 * quarantine_restarts says it stays, QUARANTINED: a member that serves nothing after that, for
 * somebody to look at If two processes insist on different rows and there is no third, both end and
 * are started again, because nobody can tell which is right.
 *
 * Names are kept, so that a process that lies again after it has been started again is known. A
 * coordinator that is started again learns who is quarantined from their HELLOs, but not how often
 * they have lied. */
#include "coordinator/coordinator.h"

#include <stdio.h>
#include <string.h>

/* The first accuser of the latest time is kept. */
static struct lie *note(struct coordinator *self, const struct seat *liar,
                        const struct seat *accuser, const Troupe__Accusation *accusation) {
    struct lie *lie = NULL;
    for (uint32_t i = 0; i < self->lies; i++)
        if (strcmp(self->lie[i].name, liar->name) == 0)
            lie = &self->lie[i];
    if (lie == NULL && self->lies == LIES_MAX) {
        memmove(self->lie, self->lie + 1, (LIES_MAX - 1) * sizeof *self->lie);
        self->lies--;
    }
    if (lie == NULL) {
        lie = &self->lie[self->lies++];
        *lie = (struct lie){0};
        snprintf(lie->name, sizeof lie->name, "%s", liar->name);
    }
    snprintf(lie->accuser, sizeof lie->accuser, "%s", accuser->name);
    lie->times++;
    lie->layer = accusation->layer;
    lie->expert = accusation->expert;
    lie->undecided = accusation->undecided;
    lie->stays = !accusation->undecided && lie->times > self->settings.quarantine_restarts;
    return lie;
}

static void tell_to_end(const struct coordinator *self, const struct seat *seat,
                        struct effects *out) {
    Troupe__Shutdown shutdown = TROUPE__SHUTDOWN__INIT;
    shutdown.reason = "it gave wrong rows";
    message envelope = coordinator_envelope(self);
    envelope.body_case = TROUPE__ENVELOPE__BODY_SHUTDOWN;
    envelope.shutdown = &shutdown;
    effects_send(out, seat->id, &envelope);
}

static void quarantine(struct coordinator *self, struct seat *seat, const struct lie *lie,
                       uint64_t now_ns, struct effects *out) {
    effects_trace(out, TRACE_ERROR,
                  "quarantined %s (actor %u), time %u: %s layer %u expert %u, says %s; %s",
                  seat->name, seat->id, lie->times,
                  lie->undecided ? "it and another insist on different rows of" : "wrong rows of",
                  lie->layer, lie->expert, lie->accuser,
                  lie->stays ? "it stays, without experts" : "it ends, to be started again");
    if (!lie->stays) {
        tell_to_end(self, seat, out);
        membership_remove(self, seat, "it gave wrong rows", now_ns, out);
        return;
    }
    actor_id id = seat->id;
    seat->quarantined = self->changed = true;
    copies_forget(self, seat);
    operations_lost(self, id, now_ns, out);
    copies_plan(self, now_ns, out);
}

void quarantine_take(struct coordinator *self, const struct seat *accuser,
                     const Troupe__Heartbeat *heartbeat, uint64_t now_ns, struct effects *out) {
    if (accuser->role != ROLE_ATTENTION || self->learn_until_ns != NEVER)
        return;
    actor_id by = accuser->id;
    for (size_t i = 0; i < heartbeat->n_accusation; i++) {
        const Troupe__Accusation *accusation = heartbeat->accusation[i];
        struct seat *seat = seat_find(self, accusation->actor);
        accuser = seat_find(self, by); /* seats move */
        if (accuser == NULL || seat == NULL || seat->role != ROLE_EXPERT || seat->quarantined ||
            seat->incarnation != accusation->incarnation)
            continue;
        quarantine(self, seat, note(self, seat, accuser, accusation), now_ns, out);
    }
}

void quarantine_fill(const struct coordinator *self, Troupe__Stats *stats, struct effects *out) {
    stats->quarantine = effects_alloc(out, (self->lies + 1) * sizeof *stats->quarantine);
    for (uint32_t i = 0; i < self->lies; i++) {
        const struct lie *lie = &self->lie[i];
        Troupe__Quarantine *quarantine = effects_alloc(out, sizeof *quarantine);
        troupe__quarantine__init(quarantine);
        quarantine->name = (char *)lie->name;
        quarantine->accuser = (char *)lie->accuser;
        quarantine->times = lie->times;
        quarantine->layer = lie->layer;
        quarantine->expert = lie->expert;
        quarantine->undecided = lie->undecided;
        quarantine->stays = lie->stays;
        stats->quarantine[stats->n_quarantine++] = quarantine;
    }
}

/* An audit needs somebody to compare with. */
uint32_t copies_wanted(const struct coordinator *self) {
    return self->settings.audit_share > 0 && self->settings.replicas < 2 ? 2
                                                                         : self->settings.replicas;
}

uint32_t copies_needed(const struct coordinator *self) {
    return self->settings.audit_share >= 1 ? 2 : 1;
}
