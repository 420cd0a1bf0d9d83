/* What operations.c, scaling.c and restart.c share. */
#ifndef TROUPE_OPERATIONS_H
#define TROUPE_OPERATIONS_H

#include "coordinator/coordinator.h"

/* operations.c */
struct operation *operation_find(struct coordinator *self, uint64_t id);
/* In place of the oldest that has ended, under a new number. NULL: all are under way. */
struct operation *operation_add(struct coordinator *self, enum operation_kind kind, uint64_t now_ns,
                                struct failure *failure);
void *operation_allocate(size_t count, size_t size); /* one more than asked for, zero */
void operation_enter(struct operation *operation, enum operation_phase phase, uint64_t now_ns,
                     struct effects *out);
/* Wants what the changes say, and makes their pairs the operation's own. */
void operation_apply(struct coordinator *self, const struct operation *operation);
/* Wants what was wanted before. */
void operation_abort(struct coordinator *self, struct operation *operation, uint64_t now_ns,
                     struct effects *out);

/* scaling.c */
struct seat *seat_supervisor(const struct coordinator *self); /* NULL: none is here */
bool epoch_adopted(const struct coordinator *self, uint64_t epoch, enum role role);
/* Processes that were to leave and have not been told to end stay after all. */
void operation_stay(struct coordinator *self, struct operation *operation, uint64_t now_ns,
                    struct effects *out);
/* Processes that it has started leave again, those too that have not joined yet. */
void operation_send_away(struct coordinator *self, struct operation *operation, uint64_t now_ns,
                         struct effects *out);
void operation_tell_supervisor(struct coordinator *self, struct operation *operation,
                               uint64_t now_ns, struct effects *out);
void operation_step_parties(struct coordinator *self, struct operation *operation, uint64_t now_ns,
                            struct effects *out);
void operation_step_starting(struct coordinator *self, struct operation *operation, uint64_t now_ns,
                             struct effects *out);
void operation_step_leaving(struct coordinator *self, struct seat *seat, uint64_t now_ns,
                            struct effects *out);

/* restart.c */
Troupe__Operations *operations_message(const struct coordinator *self, struct effects *out);

#endif
