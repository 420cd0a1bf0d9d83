/* The live view's feed, GET /troupe/events: what COMMIT, STATS and the gateway's own requests tell
 * of the troupe, as server-sent events of versioned JSON (docs/live-view.md says what is in them).
 *
 *   no listeners   only the timeline is kept: a few entries per epoch
 *   listeners      every EVENTS_INTERVAL_MS one set of events is written, and sent to all of them
 *
 * Loads are sent as differences from `sent`, which all listeners have in common: a new one is first
 * told `sent` itself. */
#ifndef TROUPE_EVENTS_H
#define TROUPE_EVENTS_H

#include "actors/gateway/json_text.h"
#include "actors/gateway/metrics.h"

#define EVENTS_VERSION       1
#define EVENTS_INTERVAL_MS   250
#define EVENTS_LISTENERS_MAX 16
#define EVENTS_MOMENTS       128  /* of the timeline, kept and told to new listeners */
#define EVENTS_SAMPLES       1024 /* latencies of one interval; of more, the first */
#define EVENTS_NAME_BYTES    64

/* Something on the timeline. A LOST one changes as the troupe repairs itself. */
enum moment_kind {
    MOMENT_EPOCH,
    MOMENT_JOINED,
    MOMENT_LEFT,
    MOMENT_LOST,
    MOMENT_OPERATION,
    MOMENT_BIAS,
};
struct moment {
    enum moment_kind kind;
    uint64_t number; /* counts all moments, from 1 */
    uint64_t at_ns, epoch;
    uint32_t members; /* EPOCH */
    bool serving;     /* EPOCH */
    bool changed;     /* since it was last sent */
    /* of an actor */
    actor_id actor;
    uint64_t incarnation;
    enum role role;
    char name[EVENTS_NAME_BYTES];
    uint32_t copies;    /* LOST: copies of experts that it held */
    uint64_t silent_ns; /* LOST: time since its last heartbeat; NEVER: unknown */
    uint64_t fenced_ns; /* LOST: from being given up to the epoch without it; NEVER: unknown */
    uint64_t replaced_ns, serving_ns, back_ns; /* LOST: when; NEVER: not yet */
    uint64_t resumed_ns; /* LOST: when the first token after it came */
    bool busy;           /* LOST: sequences were running, so that there was something to resume */
    char why[EVENTS_NAME_BYTES]; /* LOST: as the coordinator says it; OPERATION: reason of its end */
    uint64_t operation, age_ns;  /* OPERATION; name: what it is about */
    uint32_t done, total;
    char what[24], phase[24];
    uint64_t bias_version, bias_before; /* BIAS */
};

struct event_samples {
    float ms[EVENTS_SAMPLES];
    uint32_t count;
    uint64_t seen;
};

/* An actor of the adopted epoch. */
struct event_member {
    actor_id id;
    uint64_t incarnation;
    enum role role;
    Troupe__ActorState state;
    uint32_t copies;
    char name[EVENTS_NAME_BYTES], host[EVENTS_NAME_BYTES];
};

struct event_feed {
    struct metrics *metrics; /* counts losses and recoveries; NULL: nobody does */
    uint64_t listener[EVENTS_LISTENERS_MAX]; /* HTTP clients */
    uint32_t listeners;
    uint64_t next_ns; /* NEVER: nobody listens */
    uint64_t last_ns; /* of the set before */
    bool epoch_changed, even;
    uint64_t unrepaired_ns; /* when the oldest loss that is not made good came; NEVER: none */
    bool busy;          /* sequences are running: told by the gateway before a commit */
    uint64_t unresumed; /* moments LOST that no token has followed yet */

    uint64_t *sent;      /* [layers, experts] rows that listeners know of; NULL: never needed */
    double *holder_rows; /* scratch [members] */
    uint32_t holder_capacity;
    struct event_member *member; /* [members] ascending id, of the adopted epoch */
    uint32_t members;
    uint32_t *holder_of; /* [placed] index in `member` of each entry of the view's placement */
    uint32_t placed, holder_of_capacity;
    uint32_t covered; /* (layer, expert) pairs with a holder, most ever seen in one epoch */
    bool serving;
    uint64_t epoch, bias_version, stats_ns;

    struct moment moment[EVENTS_MOMENTS]; /* ring: number n at n % EVENTS_MOMENTS */
    uint64_t moments;
    struct event_samples ttft, tpot;
    struct metrics before; /* when the last set was written */
    struct text line;
};

/* What the events are about. */
struct event_source {
    const struct cluster_view *cluster;
    const struct metrics *metrics;
    const struct model_config *config;
    const char *model, *version;
    uint64_t incarnation; /* of the gateway */
    int64_t unix_offset_ns;
    uint32_t heartbeat_ms, running, waiting;
    bool admin, faults; /* a new listener: it came over the admin address; may ask for faults */
};

void events_init(struct event_feed *self);
void events_free(struct event_feed *self);

/* False: there are too many listeners already. Else the client has been told everything that there
 * is. */
bool events_join(struct event_feed *self, const struct event_source *source, uint64_t client,
                 uint64_t now_ns, struct effects *out);
bool events_leave(struct event_feed *self, uint64_t client); /* true: it was one */
void events_end(struct event_feed *self, struct effects *out);

/* After the cluster view has taken the commit. */
void events_commit(struct event_feed *self, const struct cluster_view *cluster,
                   const Troupe__Commit *commit, uint64_t now_ns);
void events_stats(struct event_feed *self, const Troupe__Stats *stats, uint64_t now_ns);
void events_token(struct event_feed *self, uint64_t now_ns); /* a token has come */
void events_latency(struct event_feed *self, struct event_samples *samples, double ms);

/* Of a member of the adopted epoch, or of one lost lately; NULL: not known. */
const char *events_name_of(const struct event_feed *self, actor_id id);

/* Writes and sends what is due. */
void events_timer(struct event_feed *self, const struct event_source *source, uint64_t now_ns,
                  struct effects *out);

/* events_write.c: one event each, appended to self->line. */
void events_write_hello(struct event_feed *self, const struct event_source *source,
                        uint64_t now_ns);
void events_write_epoch(struct event_feed *self, const struct event_source *source);
void events_write_actors(struct event_feed *self, const struct event_source *source,
                         uint64_t now_ns);
/* Everything that `sent` says, for a new listener. */
void events_write_totals(struct event_feed *self, const struct event_source *source);
/* What has come since; `sent` moves on. */
void events_write_loads(struct event_feed *self, const struct event_source *source);
void events_write_rates(struct event_feed *self, const struct event_source *source,
                        uint64_t now_ns);
void events_write_moments(struct event_feed *self, const struct event_source *source, bool all);

#endif
