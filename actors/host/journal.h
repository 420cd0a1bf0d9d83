/* The journal of `troupe chaos`: one SQLite file with everything that was seen, from which the reports are written.
 *   run(id, plan, seed, commit_id, begun, streams, tokens, steady_gap_ms, tokens_per_s)
 *   fault(run, number, at_ms, text, detect_ms, repair_ms, gap_ms, before, during, after)
 *   stream(run, number, answers, different, duplicated, lost, refused, resumed)
 *   piece(run, stream, at_ms, gap_ms): those that came later than usual */
#ifndef TROUPE_HOST_JOURNAL_H
#define TROUPE_HOST_JOURNAL_H

#include <stdint.h>

#include "actors/errors.h"

struct journal;

int journal_open(struct journal **ret, const char *path, struct failure *failure);
void journal_close(struct journal **self);
/* A new run; its id is used by what follows. */
int journal_run(struct journal *self, const char *plan, uint64_t seed, uint32_t streams, uint32_t tokens,
                double steady_gap_ms, double tokens_per_s, struct failure *failure);
struct journal_fault {
    uint32_t number;
    const char *text;
    double at_ms, detect_ms, repair_ms, gap_ms; /* detect, repair: negative: not seen */
    double before, during, after;               /* tokens/s */
};
int journal_fault(struct journal *self, const struct journal_fault *fault, struct failure *failure);
struct journal_stream {
    uint32_t number, answers, different, duplicated, lost, refused, resumed;
};
int journal_stream(struct journal *self, const struct journal_stream *stream, struct failure *failure);
int journal_piece(struct journal *self, uint32_t stream, double at_ms, double gap_ms, struct failure *failure);
/* Everything of the last run, as the rows are asked for. */
int journal_faults(struct journal *self, void (*each)(void *context, const struct journal_fault *fault),
                   void *context, struct failure *failure);
int journal_begin(struct journal *self, struct failure *failure); /* one transaction around many rows */
int journal_commit(struct journal *self, struct failure *failure);

#endif
