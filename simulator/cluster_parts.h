/* What the files of the simulated cluster share:
 *   cluster.c          time, what happens next, the coordinator and its effects
 *   cluster_process.c  expert, attention and sampler processes as the coordinator sees them
 *   cluster_measure.c  loads over time, figures
 *   cluster_feed.c     the live view's feed of it
 *   cluster_file.c     the file that describes it
 *   cost.c             what things take */
#ifndef TROUPE_SIMULATOR_CLUSTER_PARTS_H
#define TROUPE_SIMULATOR_CLUSTER_PARTS_H

#include "actors/actors.h"
#include "simulator/cluster.h"
#include "simulator/cost.h"
#include "simulator/random.h"

#define PROCESS_NAME_BYTES 32

/* A control message of the coordinator, read once for all who get the same bytes. */
struct parcel {
    uint32_t refs;
    Troupe__Envelope *message;
    struct placement *placement; /* of a COMMIT, when somebody has adopted it */
};
struct placement {
    uint32_t refs;
    struct cost_placement copies;
};

enum happening_kind {
    HAPPENS_START,     /* a process starts and says HELLO, until it is welcome */
    HAPPENS_BEAT,      /* its next heartbeat arrives at the coordinator */
    HAPPENS_ACK,       /* one out of turn */
    HAPPENS_READY,     /* READY for operation `value` arrives there */
    HAPPENS_LOADED,    /* copy `value` has been loaded */
    HAPPENS_PARCEL,    /* a message of the coordinator arrives at the process */
    HAPPENS_ADOPT,     /* an attention actor comes to a layer boundary */
    HAPPENS_GONE,      /* the end of incarnation `value` is noticed at the coordinator */
    HAPPENS_CHANGE,    /* change number `value` of the file begins */
    HAPPENS_UNCHANGE,  /* and ends */
    HAPPENS_WINDOW,    /* window `value` of the trace begins */
    HAPPENS_FEED,      /* the live view's feed tells what is new */
    HAPPENS_END,
};

struct happening {
    uint64_t time_ns, number;
    enum happening_kind kind;
    uint32_t process;
    uint64_t incarnation; /* of the process that it is for; 0: any */
    uint64_t value;
    struct parcel *parcel; /* a reference */
};

struct process {
    enum role role;
    char name[PROCESS_NAME_BYTES], host[PROCESS_NAME_BYTES], address[PROCESS_NAME_BYTES];
    const struct cluster_group *group; /* experts */
    actor_id id;                       /* 0: not welcome yet */
    uint64_t incarnation;
    bool alive;
    uint64_t epoch;
    struct placement *placement; /* attention: adopted; a reference */
    /* experts */
    uint64_t operation;  /* newest ASSIGN; 0: none */
    bool *held, *wanted; /* [pairs] */
    uint32_t lacking, next_pair; /* wanted and not held; where to look for the next */
    bool loading;
    double rows; /* computed until the present loads began */
};

struct cluster_sim {
    const struct cluster_task *task;
    struct model_config config;
    struct actor *coordinator;
    struct effects effects;
    uint64_t coordinator_at_ns, estimate_bytes;
    struct random random;
    struct happening *heap; /* owned */
    uint32_t count, capacity;
    uint64_t now_ns, begin_ns, last_number, last_incarnation; /* begin_ns: the day begins; NEVER: not yet */
    bool ended;
    struct process *process; /* [processes]: experts, attention, one sampler; with a feed: a gateway */
    uint32_t processes, experts, pairs;
    uint32_t seat[ACTORS_MAX]; /* process by actor id, modulo the table */
    struct failure refused;
    struct cluster_feed *feed; /* NULL: none is wanted */

    /* measure */
    struct cost_model cost;
    struct cost_process *state; /* [experts] */
    double *rate, *routed;      /* [pairs] rows per second; rows until `since_ns` */
    uint32_t *layer_of, *expert_of; /* [pairs] */
    uint64_t placed;            /* copies in the newest epoch */
    uint64_t serving_epoch;     /* the first that serves; 0: none yet */
    uint64_t since_ns, last_ns; /* the present loads hold since; figures are complete until */
    bool dirty;
    struct cost_balance balance;
    uint32_t window;
    uint64_t window_ns;
    struct cluster_report report;
};

/* cluster.c */
void happen(struct cluster_sim *self, struct happening what); /* time_ns: from now */
void cluster_hash(struct cluster_sim *self, uint64_t word);
void cluster_tell(struct cluster_sim *self, const struct process *from, message *envelope);
void parcel_drop(struct parcel **parcel);
void placement_drop(struct placement **placement);
uint64_t cluster_delay(struct cluster_sim *self);

/* cluster_process.c */
bool processes_open(struct cluster_sim *self);
void processes_close(struct cluster_sim *self);
void process_start(struct cluster_sim *self, uint32_t index);
void process_stop(struct cluster_sim *self, uint32_t index);
/* loads: attention actors report what they have routed. */
void process_beat(struct cluster_sim *self, uint32_t index, bool loads);
void process_ready(struct cluster_sim *self, uint32_t index, uint64_t operation);
void process_loaded(struct cluster_sim *self, uint32_t index, uint32_t pair);
void process_take(struct cluster_sim *self, uint32_t index, struct parcel *parcel);
void process_adopt(struct cluster_sim *self, uint32_t index, struct parcel *parcel);

/* cluster_feed.c: nothing happens without a feed */
bool feed_open(struct cluster_sim *self);
void feed_close(struct cluster_sim *self);
void feed_commit(struct cluster_sim *self, const Troupe__Commit *commit);
void feed_stats(struct cluster_sim *self, const Troupe__Stats *stats);
void feed_tick(struct cluster_sim *self);

/* cluster_measure.c */
bool measure_open(struct cluster_sim *self);
void measure_close(struct cluster_sim *self);
void measure_begin(struct cluster_sim *self);
void measure_window(struct cluster_sim *self, uint32_t window);
/* Figures up to now; to be called before anything that loads or placements depend on changes. */
void measure_change(struct cluster_sim *self);
/* The same when only who is loading changes. */
void measure_advance(struct cluster_sim *self);
void measure_loading(struct cluster_sim *self);
struct cluster_figures *measure_figures(struct cluster_sim *self); /* of the present window; NULL: the day has not begun */
/* A share of the rows routed so far: [pairs]. */
void measure_routed(const struct cluster_sim *self, double share, uint64_t *ret);
double measure_rows(const struct cluster_sim *self, uint32_t process);
void measure_end(struct cluster_sim *self);

#endif
