/* The dispatch plan of one layer's batch: every (row, expert) is given a replica, then three stable
 * counting sorts (by row where needed, by expert, by destination) put the items in the order of the
 * frames, which are cut where a frame is full. Linear in the number of items; nothing is allocated
 * after init.
 *
 * Invariants: every item given appears exactly once; a part is not empty and has one destination;
 * its groups cover its items in ascending order of experts; its rows are the distinct rows of its
 * items, ascending; items nobody can take come last and belong to no part. */
#include "router/dispatch.h"

#include <stdlib.h>
#include <string.h>

#include "actors/limits.h"

#define ROW_WORDS (BATCH_ROWS_MAX / 64)

struct scratch {
    uint64_t row_bits[ROW_WORDS];   /* rows of the part being built */
    uint32_t row_before[ROW_WORDS]; /* rows of the part in the words before */
    struct dispatch_item *item;     /* [items_max]: the other side of each sort */
    uint32_t *count;                /* [keys_max + 1] */
    struct replica_use use;
    uint32_t keys_max, destinations_max;
};

_Static_assert(BATCH_ROWS_MAX % 64 == 0, "rows are counted in words of 64");

static uint32_t max_u32(uint32_t a, uint32_t b) {
    return a > b ? a : b;
}

int dispatch_plan_init(struct dispatch_plan *self, uint32_t items_max, uint32_t destinations_max) {
    memset(self, 0, sizeof *self);
    ASSERT(items_max <= FRAME_ITEMS_MAX && destinations_max <= ACTORS_MAX);
    struct scratch *scratch = calloc(1, sizeof *scratch);
    if (scratch == NULL)
        return ERR_NO_MEMORY;
    self->scratch = scratch;
    self->items_max = items_max;
    self->parts_max = items_max; /* a part has at least one item */
    scratch->destinations_max = destinations_max;
    /* One destination more than there are: the items that wait. */
    scratch->keys_max = max_u32(max_u32(BATCH_ROWS_MAX, EXPERTS_MAX), destinations_max + 1);
    size_t n = max_u32(items_max, 1);
    scratch->item = calloc(n, sizeof *scratch->item);
    scratch->count = calloc((size_t)scratch->keys_max + 1, sizeof *scratch->count);
    scratch->use.slot =
        calloc(REPLICA_SLOTS_MAX, sizeof *scratch->use.slot); /* few pages are touched */
    scratch->use.expert = calloc(EXPERTS_MAX, sizeof *scratch->use.expert);
    self->item = calloc(n, sizeof *self->item);
    self->part = calloc(n, sizeof *self->part);
    self->group = calloc(n, sizeof *self->group);
    self->row = calloc(n, sizeof *self->row);
    self->item_row = calloc(n, sizeof *self->item_row);
    if (scratch->item == NULL || scratch->count == NULL || scratch->use.slot == NULL ||
        scratch->use.expert == NULL || self->item == NULL || self->part == NULL ||
        self->group == NULL || self->row == NULL || self->item_row == NULL) {
        dispatch_plan_free(self);
        return ERR_NO_MEMORY;
    }
    return 0;
}

void dispatch_plan_free(struct dispatch_plan *self) {
    struct scratch *scratch = self->scratch;
    if (scratch != NULL) {
        free(scratch->item);
        free(scratch->count);
        free(scratch->use.slot);
        free(scratch->use.expert);
        free(scratch);
    }
    free(self->item);
    free(self->part);
    free(self->group);
    free(self->row);
    free(self->item_row);
    memset(self, 0, sizeof *self);
}

enum sort_key { BY_ROW, BY_EXPERT, BY_DESTINATION };

static uint32_t key_of(const struct dispatch_item *item, enum sort_key key, uint32_t destinations) {
    switch (key) {
    case BY_ROW:
        return item->row;
    case BY_EXPERT:
        return item->expert;
    case BY_DESTINATION:
        break;
    }
    return item->destination == UINT32_MAX ? destinations : item->destination;
}

/* Stable counting sort of items by a key below `keys`. */
static void sort_items(struct scratch *scratch, const struct dispatch_item *from,
                       struct dispatch_item *to, uint32_t count, enum sort_key key, uint32_t keys,
                       uint32_t destinations) {
    ASSERT(keys <= scratch->keys_max);
    uint32_t *place = scratch->count;
    memset(place, 0, ((size_t)keys + 1) * sizeof *place);
    for (uint32_t i = 0; i < count; i++)
        place[key_of(&from[i], key, destinations) + 1]++;
    for (uint32_t k = 0; k < keys; k++)
        place[k + 1] += place[k];
    for (uint32_t i = 0; i < count; i++)
        to[place[key_of(&from[i], key, destinations)]++] = from[i];
}

/* Numbers the distinct rows of a part in ascending order: one bit per row, then a row's number is
 * the count of bits below it. */
static void part_number_rows(struct dispatch_plan *self, struct dispatch_part *part) {
    struct scratch *scratch = self->scratch;
    const struct dispatch_item *item = self->item + part->first_item;
    uint32_t low = ROW_WORDS, high = 0; /* words in use */
    for (uint32_t i = 0; i < part->items; i++) {
        uint32_t word = item[i].row / 64;
        scratch->row_bits[word] |= UINT64_C(1) << (item[i].row % 64);
        low = word < low ? word : low;
        high = max_u32(high, word + 1);
    }
    uint32_t rows = 0;
    for (uint32_t word = low; word < high; word++) {
        scratch->row_before[word] = rows;
        for (uint64_t bits = scratch->row_bits[word]; bits != 0; bits &= bits - 1)
            self->row[part->first_row + rows++] = word * 64 + (uint32_t)__builtin_ctzll(bits);
    }
    part->rows = rows;
    for (uint32_t i = 0; i < part->items; i++) {
        uint32_t word = item[i].row / 64;
        uint64_t below = scratch->row_bits[word] & ((UINT64_C(1) << (item[i].row % 64)) - 1);
        self->item_row[part->first_item + i] =
            scratch->row_before[word] + (uint32_t)__builtin_popcountll(below);
    }
    if (low < high)
        memset(scratch->row_bits + low, 0, (high - low) * sizeof *scratch->row_bits);
}

/* Items of the expert at `first` for one destination. */
static uint32_t run_of_expert(const struct dispatch_plan *self, uint32_t first, uint32_t end) {
    const struct dispatch_item *item = self->item;
    uint32_t i = first + 1;
    while (i < end && item[i].expert == item[first].expert &&
           item[i].destination == item[first].destination)
        i++;
    return i - first;
}

/* Cuts the sorted items that have a destination into parts, and each part's items into groups of
 * one expert. An expert that would be cut goes whole into the next part if this one is half full:
 * its weights are read once for each part that has items of it. */
static void cut_parts(struct dispatch_plan *self, uint32_t part_items_max) {
    uint32_t end = self->items - self->waiting, groups = 0, rows = 0;
    for (uint32_t first = 0; first < end;) {
        struct dispatch_part *part = &self->part[self->parts++];
        *part = (struct dispatch_part){
            .destination = self->item[first].destination,
            .first_item = first,
            .first_group = groups,
            .first_row = rows,
        };
        uint32_t i = first;
        for (; i < end && i - first < part_items_max &&
               self->item[i].destination == part->destination;
             i++) {
            if (i == first || self->item[i].expert != self->item[i - 1].expert) {
                const uint32_t taken = i - first;
                if (taken > 0 && taken >= part_items_max / 2 &&
                    run_of_expert(self, i, end) > part_items_max - taken)
                    break;
                self->group[groups++] = (struct frame_group){.expert = self->item[i].expert};
            }
            self->group[groups - 1].count++;
        }
        part->items = i - first;
        part->groups = groups - part->first_group;
        part_number_rows(self, part);
        rows += part->rows;
        first = i;
    }
}

/* All stamps of before count no more. */
static void begin_use(struct replica_use *use) {
    if (++use->now != 0)
        return;
    memset(use->slot, 0, REPLICA_SLOTS_MAX * sizeof *use->slot);
    memset(use->expert, 0, EXPERTS_MAX * sizeof *use->expert);
    use->now = 1;
}

void dispatch_plan_build(struct dispatch_plan *self, const struct placement *placement,
                         uint32_t layer, const struct dispatch_item *items, uint32_t count,
                         const uint8_t *alive, uint32_t *level, const uint32_t *cost,
                         uint32_t destinations, uint32_t part_items_max) {
    struct scratch *scratch = self->scratch;
    ASSERT(count <= self->items_max && destinations <= scratch->destinations_max);
    ASSERT(part_items_max >= 1 && placement->experts <= EXPERTS_MAX);
    self->items = count;
    self->parts = 0;
    self->waiting = 0;
    uint32_t row_max = 0;
    bool ascending = true;
    for (uint32_t i = 0; i < count; i++) {
        ASSERT(items[i].row < BATCH_ROWS_MAX);
        ascending = ascending && items[i].row >= row_max;
        row_max = max_u32(row_max, items[i].row);
    }
    begin_use(&scratch->use);
    struct dispatch_item *start = ascending ? self->item : scratch->item;
    for (uint32_t i = 0; i < count; i++) {
        start[i] = items[i];
        uint32_t destination =
            replica_take(placement, layer, items[i].expert, alive, level, cost, &scratch->use);
        start[i].destination = destination;
        self->waiting += destination == UINT32_MAX;
        ASSERT(destination == UINT32_MAX || destination < destinations);
    }
    if (!ascending)
        sort_items(scratch, scratch->item, self->item, count, BY_ROW, row_max + 1, destinations);
    sort_items(scratch, self->item, scratch->item, count, BY_EXPERT, placement->experts,
               destinations);
    sort_items(scratch, scratch->item, self->item, count, BY_DESTINATION, destinations + 1,
               destinations);
    cut_parts(self, part_items_max);
}
