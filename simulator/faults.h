/* What goes wrong in a simulated world, and when: a list of faults that can be printed, read back (scenario files) and shrunk.
 *
 *   at 120ms crash expert 1 for 40ms              the process ends; it is started again after 40 ms (`silent`: its supervisor and its
 *                                                 peers are not told, so only missed heartbeats and deadlines show it)
 *   at 120ms crash expert 1 for good              never started again
 *   at 120ms pause attention 0 for 200ms          SIGSTOP, SIGCONT
 *   at 120ms slow sampler 0 for 1s by 20          computes and loads take 20 times as long
 *   at 120ms delay data from expert 0 for 1s by 5ms        up to 5 ms more for each frame, so that frames overtake each other
 *   at 120ms drop control to attention 0 for 1s share 0.3  control | data | (nothing: both)
 *   at 120ms duplicate for 1s share 0.3
 *   at 120ms corrupt data for 1s share 0.1        a few bytes of the frame change
 *   at 120ms partition from expert 0 to attention 1 for 1s one way only
 *   at 120ms clog from expert 0 for 1s            nothing arrives until the fault is over, then everything does
 *   at 120ms disk-error expert 1 for 1s           loads fail; also short-read, no-memory
 *   at 120ms hang-up client 3                     the client closes its connection
 *   at 120ms lie expert 1 for 1s share 0.001      so many of its rows are wrong, in frames that are right; `steady`: always in
 *                                                 the same place, as with damaged weights. Only audit_share 1 stands that
 *
 *   at 120ms drain expert 1                       what people ask the coordinator for: it gives everything away and ends, and is started
 *                                                 again; also rebalance; replicate pair 1 5 (layer, expert) to expert 2; move pair 1 5
 *                                                 from expert 0 to expert 2. What cannot be done is refused, as by the admin interface
 *
 * `from` and `to` name a process (role and number) or, left out, all. */
#ifndef TROUPE_SIMULATOR_FAULTS_H
#define TROUPE_SIMULATOR_FAULTS_H

#include "actors/actor.h"
#include "simulator/random.h"

#define FAULTS_MAX      64u
#define FOR_GOOD        UINT64_MAX
#define FAULT_LINE_BYTES 160u

enum fault_kind {
    FAULT_CRASH,
    FAULT_PAUSE,
    FAULT_SLOW,
    FAULT_DELAY,
    FAULT_DROP,
    FAULT_DUPLICATE,
    FAULT_CORRUPT,
    FAULT_PARTITION,
    FAULT_CLOG,
    FAULT_DISK_ERROR,
    FAULT_SHORT_READ,
    FAULT_NO_MEMORY,
    FAULT_HANG_UP,
    FAULT_LIE, /* this and what follows is drawn apart from the others */
    FAULT_DRAIN,
    FAULT_REBALANCE,
    FAULT_REPLICATE,
    FAULT_MOVE,
    FAULT_KINDS,
};

enum traffic { TRAFFIC_ALL, TRAFFIC_CONTROL, TRAFFIC_DATA };

/* A process of the world; ROLE_NONE: every one. */
struct place {
    enum role role;
    uint32_t index;
};

struct fault {
    enum fault_kind kind;
    uint64_t at_ns, for_ns;
    struct place from, to; /* one process: `from`; `to` is the other end of a link */
    enum traffic traffic;
    uint32_t share_permille; /* drop, duplicate, corrupt, lie */
    uint64_t amount;         /* slow: factor; delay: ns */
    uint32_t client;         /* hang-up */
    uint32_t layer, expert;  /* replicate, move */
    bool silent;             /* crash */
    bool steady;             /* lie */
    struct random random;    /* its own chance, so that taking a fault out leaves the others as they are */
};

struct faults {
    struct fault list[FAULTS_MAX];
    uint32_t count;
};

static inline bool fault_is_active(const struct fault *fault, uint64_t now_ns) {
    return now_ns >= fault->at_ns && now_ns - fault->at_ns < fault->for_ns;
}
/* The fault concerns what `from` sends `to` as control message or data frame. */
bool fault_is_on_link(const struct fault *fault, struct place from, struct place to, bool data);
bool place_matches(struct place wanted, struct place is);

const char *fault_name(enum fault_kind kind);
/* How many faults there are of each kind; returns how many of all but what people ask for (drain and so on). */
uint32_t faults_count(const struct faults *self, uint32_t ret_kind[FAULT_KINDS]);
/* One line, as above, without a newline. */
void fault_print(const struct fault *fault, char ret[FAULT_LINE_BYTES]);
/* Reads such a line. ERR_INVALID names what was expected and found. */
int fault_parse(struct fault *ret, const char *line, struct failure *failure);
/* Gives every fault its own chance and orders the list by time. */
void faults_prepare(struct faults *self, uint64_t seed);

/* The cluster and the time in which faults are to fall. */
struct fault_field {
    uint32_t attention, experts, samplers, clients;
    uint64_t until_ns;
};
/* Draws at least FAULTS_DRAWN_MIN faults of all kinds, some in groups: two or three crashes at once, a crash while others load. Some
 * processes come late (a crash at the start), some never come back, but never the last of their role. */
#define FAULTS_DRAWN_MIN 5u
void faults_draw(struct faults *ret, const struct fault_field *field, struct random *random);

/* Adds operations that people ask for, at random times. */
void faults_draw_operations(struct faults *ret, const struct fault_field *field, struct random *random);
/* The request to the coordinator's admin interface; false: it is none of these faults. */
#define FAULT_BODY_BYTES 128u
bool fault_request(const struct fault *fault, const char **ret_path, char ret_body[FAULT_BODY_BYTES]);
/* Adds a rolling restart: every process of one role, or of all, ends and is started again, one after the other. */
void faults_draw_rolling(struct faults *ret, const struct fault_field *field, struct random *random);
/* Adds lies of one expert process, for clusters that audit everything. */
void faults_draw_lies(struct faults *ret, const struct fault_field *field, struct random *random);

#endif
