/* What `troupe chaos` has seen, as a table for people, as JSON and as one HTML page; all from the journal. */
#ifndef TROUPE_HOST_CHAOS_REPORT_H
#define TROUPE_HOST_CHAOS_REPORT_H

#include "actors/host/chaos_client.h"
#include "actors/host/journal.h"

struct chaos_totals {
    const char *plan;
    uint64_t seed;
    uint32_t streams, answers, different, duplicated, lost, refused, resumed;
    double steady_gap_ms, tokens_per_s, calm_gap_ms, seconds;
    double resident_before_mib, resident_after_mib;
    uint32_t files_before, files_after;
    uint64_t frames_damaged, frames_false, frames_refused; /* by processes that ended in order */
};

void chaos_print(struct journal *journal, const struct chaos_totals *totals);
int chaos_write_json(struct journal *journal, const struct chaos_totals *totals, const char *path,
                     struct failure *failure);
int chaos_write_html(struct journal *journal, const struct chaos_totals *totals, const char *path,
                     struct failure *failure);

#endif
