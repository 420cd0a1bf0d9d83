/* What `troupe top` knows of a troupe from the live view's feed (docs/live-view.md), and how it looks as lines of text. */
#ifndef TROUPE_HOST_TOP_VIEW_H
#define TROUPE_HOST_TOP_VIEW_H

#include <jansson.h>

#include "actors/errors.h"
#include "actors/gateway/json_text.h"
#include "actors/limits.h"

#define TOP_NAME_BYTES 64
#define TOP_MOMENTS    16
#define TOP_GONE       32 /* lost processes that are shown until they are back; of more, the first */

enum top_order { TOP_BY_NAME, TOP_BY_STATE, TOP_BY_AGE, TOP_BY_WEIGHTS, TOP_BY_ROWS, TOP_BY_BUSY, TOP_ORDERS };
/* What the user has chosen: the order of the processes, and how many of them are passed over. */
struct top_look {
    enum top_order order;
    bool reversed;
    uint32_t first;
};

struct top_actor {
    uint32_t id, copies;
    bool heard; /* the statistics know it */
    char name[TOP_NAME_BYTES], role[16], state[16];
    uint64_t age_ms, memory, sequences, pages, all_pages, rows, busy_ms;
};

struct top_view {
    uint32_t layers, experts;
    char model[128], version[32];
    uint64_t heartbeat_ms;
    bool *routed;        /* [layers] */
    double *rows;        /* [layers, experts], older ones count less and less */
    bool *held;          /* [layers, experts] */
    double *balance;     /* [layers] of the last interval; negative: none */
    struct top_actor actor[ACTORS_MAX];
    uint32_t actors;
    struct top_actor gone[TOP_GONE];
    uint32_t gones;
    struct {
        bool told; /* older troupes do not */
        uint64_t cache_queries, cache_hits, guessed, accepted, put_back, sent_again, audited, differed, quarantines;
    } sums; /* of what attention actors have done since they began */
    uint64_t epoch, bias_version, stats_age_ms;
    bool serving;
    double tokens_per_s, prompt_tokens_per_s, cache;
    double ttft_ms, ttft_p95_ms, tpot_ms, tpot_p95_ms; /* negative: none */
    uint64_t running, waiting, rates; /* rates: how many have come */
    struct {
        uint64_t number;
        char text[200];
    } moment[TOP_MOMENTS]; /* newest last */
    uint32_t moments;
};
void top_view_free(struct top_view *self);

/* One event of the feed. ERR_INVALID: not what the feed's version says. */
int top_view_take(struct top_view *self, const char *name, const char *json, size_t size,
                  struct failure *failure);

/* Lines that end in '\n', at most `columns` wide and, if `lines` is not 0, at most so many. */
void top_view_write(struct top_view *self, struct text *out, uint32_t columns, uint32_t lines, const struct top_look *look);

#endif
