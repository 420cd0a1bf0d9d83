/* Dispatch: which rows go to which destination. Combine order is fixed by the slots (router/combine.h), so nothing decided here can
 * change a result. Pure. */
#ifndef TROUPE_DISPATCH_H
#define TROUPE_DISPATCH_H

#include "actors/limits.h"
#include "proto/frame.h"
#include "router/gate.h"

/* Who holds what: for (layer, expert) the list of replica indices into a table of destinations. Built by the actor from the
 * epoch. Immutable once built. */
struct placement {
    uint32_t layers, experts;
    const uint32_t *first;  /* [layers * experts + 1]: range in `holder` */
    const uint32_t *holder; /* destination index of each replica, ascending */
};

/* Chooses a replica among the live ones (router/replica.c). `level` [destinations]: costs of the items given to each so far in this
 * dispatch plus its queue; `cost` [destinations] of one item there, REPLICA_COST where nothing is known (NULL: everywhere), at most
 * REPLICA_COST_MAX; `alive` [destinations]. Deterministic. Returns the destination index, or UINT32_MAX if none is alive. */
#define REPLICA_COST     16u
#define REPLICA_COST_MAX (16u * REPLICA_COST)
uint32_t replica_choose(const struct placement *placement, uint32_t layer, uint32_t expert,
                        const uint8_t *alive, const uint32_t *level, const uint32_t *cost);

/* A second replica reads the expert's weights once more, which takes about as long as so many rows of it: with fewer
 * rows than that a batch keeps to one replica. */
#define REPLICA_OPEN 8u

/* Which replicas the experts of one batch have been given to so far: stamps of entries of placement->holder, from the layer's first
 * one on, and of experts. A stamp counts if it is `now`. */
struct replica_use {
    uint32_t now;
    uint32_t *slot;   /* [REPLICA_SLOTS_MAX] */
    uint32_t *expert; /* [EXPERTS_MAX] */
};
#define REPLICA_SLOTS_MAX (EXPERTS_MAX * REPLICAS_MAX)
/* The same for an item of a batch, which it notes in `use` and adds to the level. */
uint32_t replica_take(const struct placement *placement, uint32_t layer, uint32_t expert,
                      const uint8_t *alive, uint32_t *level, const uint32_t *cost,
                      struct replica_use *use);

/* One row of one expert that must be computed: `slot` is its place in the row's top-k list. */
struct dispatch_item {
    uint32_t row;
    uint16_t slot;
    uint16_t expert;
    uint32_t destination; /* index; UINT32_MAX: nobody alive holds it, the item waits */
};

/* One frame to send: items of one destination, at most part_items_max of them, grouped by expert. */
struct dispatch_part {
    uint32_t destination;
    uint32_t first_item, items; /* range in plan->item (sorted so that each part is contiguous) */
    uint32_t first_group, groups;
    uint32_t first_row, rows;   /* range in plan->row: distinct batch rows of this part, ascending */
};

struct dispatch_plan {
    uint32_t items, parts;
    struct dispatch_item *item;  /* in part order, inside a part by expert then row */
    struct dispatch_part *part;
    struct frame_group *group;
    uint32_t *row;               /* batch row of each row of each part */
    uint32_t *item_row;          /* per item: index of its row within its part */
    uint32_t waiting;            /* items without a live destination, at the end of `item` */
    /* capacities and scratch, set by dispatch_plan_init */
    uint32_t items_max, parts_max;
    void *scratch;
};

/* Sized once for rows_max x k items; the only place that allocates. 0 or ERR_NO_MEMORY. */
int dispatch_plan_init(struct dispatch_plan *self, uint32_t items_max, uint32_t destinations_max);
void dispatch_plan_free(struct dispatch_plan *self);

/* Plans the given items (row, slot, expert filled in; duplicates of (row, slot) are a bug). part_items_max bounds the items of
 * one frame. Expert ids GATE_UNUSED must not be passed; rows are below BATCH_ROWS_MAX. `level` [destinations] grows by the cost of what each is
 * given. */
void dispatch_plan_build(struct dispatch_plan *self, const struct placement *placement,
                         uint32_t layer, const struct dispatch_item *items, uint32_t count,
                         const uint8_t *alive, uint32_t *level, const uint32_t *cost,
                         uint32_t destinations, uint32_t part_items_max);

#endif
