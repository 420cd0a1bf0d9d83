/* The expert actor's rooms share this header; nobody else includes it.
 *   expert.c        orders of the coordinator, rows
 *   expert_fetch.c  weights from other expert processes: asking and giving */
#ifndef TROUPE_EXPERT_H
#define TROUPE_EXPERT_H

#include "actors/actors.h"
#include "actors/member.h"

#define LOADS_MAX   4u
#define RUNNING_MAX 64u /* frames whose programs have not completed */
#define READING_MAX 16u /* pieces of weights that others have asked for */

enum pair_state { PAIR_ABSENT, PAIR_WANTED, PAIR_LOADING, PAIR_DOOMED, PAIR_FAILED, PAIR_HELD };
enum operation_state { OPERATION_NONE, OPERATION_WORKING, OPERATION_DONE, OPERATION_FAILED };

/* A frame in work. What it points to lies in the frame. */
struct running {
    struct frame_header header;
    const struct frame_group *group;
    const uint32_t *item_row;
    const void *rows;
    uint32_t piece_first, piece_items; /* being computed */
    uint32_t next_group, next_taken;   /* where the piece after it begins: items of that group are taken already */
    uint64_t tag, since_ns;
};

/* A piece of weights on its way to somebody else. */
struct reading {
    actor_id to;
    uint64_t transfer, offset, tag;
    uint32_t layer, expert;
};

/* Weights on their way here: asked for piece by piece, each from where the last one ended, whoever gives it. */
struct fetch {
    bool used;
    uint32_t place;    /* pair */
    uint64_t transfer; /* names it in messages */
    actor_id from;     /* who is asked; 0: to be chosen */
    uint64_t from_incarnation;
    uint8_t *image; /* [total], malloc'd; NULL: nothing has come */
    uint64_t total, got;
    uint32_t crc;     /* of all */
    uint32_t turn;    /* which holder is next */
    uint32_t tries;   /* sources given up since the last piece */
    uint32_t repeats; /* of the question to this one */
    uint64_t ask_at_ns, wait_ns;
};

struct expert {
    struct actor actor;
    struct member member;
    struct model_config config;
    enum weights_from weights;
    uint32_t piece_items_max, row_bytes;
    uint32_t e4m3_bytes; /* of a row in that format; 0: it is not taken */
    uint8_t *pair;            /* [layers * experts] enum pair_state */
    uint32_t *pair_bytes_kib; /* [layers * experts] of held pairs, rounded up */
    uint8_t *placed;          /* [layers * experts] 1: here, says the adopted epoch */
    uint32_t pairs, loading, held;
    uint32_t wanted;      /* pairs in PAIR_WANTED */
    uint32_t failed;      /* pairs in PAIR_FAILED */
    uint32_t next_wanted; /* where the search for the next load starts */
    uint64_t operation;
    enum operation_state state;
    char error[256];
    uint64_t memory_kib;
    uint64_t pair_bytes;       /* estimate, for the limit and for progress */
    uint64_t bytes_per_second; /* 0: no limit */
    uint64_t load_at_ns;       /* nothing more is asked of disk or network before; 0: at once */
    uint32_t to_load;          /* pairs of the newest operation that had to be loaded */
    struct fetch fetch[LOADS_MAX];
    uint64_t last_transfer, fetched_bytes, given_bytes;
    uint32_t *holder_place; /* [holders] the adopted epoch's placement at others */
    actor_id *holder_id;    /* [holders] */
    uint32_t holders, holders_capacity;
    struct running running[RUNNING_MAX];
    uint32_t first_running, runnings;
    struct reading reading[READING_MAX];
    uint32_t first_reading, readings;
    uint64_t last_tag, frames, rows, busy_ns;
    char description[192];
};

/* expert.c */
void expert_take_loaded(struct expert *self, uint32_t place, int error, const char *text,
                        uint64_t bytes, uint64_t now_ns, struct effects *out);
/* The limit lets so many bytes through from now on later than this. */
void expert_spend(struct expert *self, uint64_t bytes, uint64_t now_ns);

/* expert_fetch.c */
/* Where the pair's weights should come from; true: from another process. */
bool fetch_held_elsewhere(const struct expert *self, uint32_t place);
bool fetch_is_nearer(const struct expert *self, uint32_t place);
void fetch_begin(struct expert *self, uint32_t place, uint64_t now_ns, struct effects *out);
void fetch_take_placement(struct expert *self, const Troupe__Commit *commit);
void fetch_timer(struct expert *self, uint64_t now_ns, struct effects *out);
uint64_t fetch_deadline(const struct expert *self);
void fetch_on_weights(struct expert *self, const message *envelope, uint64_t now_ns,
                      struct effects *out);
void fetch_on_fetch(struct expert *self, const message *envelope, struct effects *out);
void fetch_on_read(struct expert *self, const struct program_result *result, struct effects *out);
uint64_t fetch_bytes_done(const struct expert *self); /* of all that are under way, scaled to pair_bytes */
void fetch_free(struct expert *self);

#endif
