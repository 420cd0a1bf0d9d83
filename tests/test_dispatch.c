/* The dispatch plan: one plan written out in full, and the properties that every plan has on random
 * batches, placements and failures. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "actors/limits.h"
#include "router/dispatch.h"
#include "tests/support/random.h"

#include <cmocka.h> /* last: its macro fail() hides the function of actors/errors.h */

/* Experts 0 and 1 on destination 0, expert 1 also on 1, expert 2 on 1, expert 3 on 2. */
static const uint32_t FIRST[] = {0, 1, 3, 4, 5}, HOLDER[] = {0, 0, 1, 1, 2};
static const struct placement SMALL = {1, 4, FIRST, HOLDER};

static void a_replica_is_the_least_loaded_live_holder(void **state) {
    (void)state;
    uint8_t alive[3] = {1, 1, 1};
    uint32_t load[3] = {5, 5, 0};
    assert_int_equal(replica_choose(&SMALL, 0, 1, alive, load, NULL), 0); /* tie: the lower */
    load[0] = 6;
    assert_int_equal(replica_choose(&SMALL, 0, 1, alive, load, NULL), 1);
    alive[1] = 0;
    assert_int_equal(replica_choose(&SMALL, 0, 1, alive, load, NULL), 0);
    assert_int_equal(replica_choose(&SMALL, 0, 2, alive, load, NULL), UINT32_MAX);
}

/* Items of expert 1, at destinations 0 and 1: shares follow the costs, a queue counts as water that
 * is there already, and nobody ends an item later than the others would have begun it. Few items
 * stay together: a second replica costs as much as 8 of them. */
static void replicas_are_filled_like_water(void **state) {
    (void)state;
    static const struct {
        uint32_t level[2], cost[2], items, share[2];
    } cases[] = {
        {{0, 0}, {16, 16}, 9, {9, 0}},
        {{0, 0}, {16, 16}, 10, {9, 1}},
        {{0, 0}, {16, 16}, 100, {54, 46}},
        {{0, 0},
         {16, 48},
         160,
         {126, 34}}, /* three times as slow, 8 of its items are 24 of the other's */
        {{0, 0}, {64, 16}, 97, {13, 84}},
        {{80, 0}, {16, 16}, 13, {0, 13}}, /* five items wait already */
        {{80, 0}, {16, 16}, 53, {20, 33}},
        {{0, 0}, {256, 16}, 3, {0, 3}},
    };
    const uint8_t alive[3] = {1, 1, 1};
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        uint32_t level[3] = {cases[c].level[0], cases[c].level[1], 0};
        const uint32_t cost[3] = {cases[c].cost[0], cases[c].cost[1], 16};
        struct dispatch_item items[160];
        struct dispatch_plan plan;
        uint32_t share[3] = {0};
        for (uint32_t i = 0; i < cases[c].items; i++)
            items[i] = (struct dispatch_item){.row = i, .expert = 1};
        assert_int_equal(dispatch_plan_init(&plan, 160, 3), 0);
        dispatch_plan_build(&plan, &SMALL, 0, items, cases[c].items, alive, level, cost, 3, 160);
        for (uint32_t i = 0; i < plan.parts; i++)
            share[plan.part[i].destination] += plan.part[i].items;
        assert_int_equal(share[0], cases[c].share[0]);
        assert_int_equal(share[1], cases[c].share[1]);
        bool both = share[0] > 0 && share[1] > 0,
             first_is_0 = cases[c].level[0] + cost[0] <= cases[c].level[1] + cost[1];
        assert_int_equal(level[0],
                         cases[c].level[0] +
                             (share[0] + (both && !first_is_0 ? REPLICA_OPEN : 0)) * cost[0]);
        assert_int_equal(level[1],
                         cases[c].level[1] +
                             (share[1] + (both && first_is_0 ? REPLICA_OPEN : 0)) * cost[1]);
        dispatch_plan_free(&plan);
    }
}

static void a_plan_written_out(void **state) {
    (void)state;
    const struct dispatch_item items[] = {
        {.row = 7, .slot = 0, .expert = 1}, {.row = 7, .slot = 1, .expert = 0},
        {.row = 2, .slot = 0, .expert = 3}, {.row = 2, .slot = 1, .expert = 1},
        {.row = 5, .slot = 0, .expert = 0}, {.row = 5, .slot = 1, .expert = 2},
    };
    uint8_t alive[3] = {1, 1, 0};
    uint32_t load[3] = {0, 0, 0};
    struct dispatch_plan plan;
    assert_int_equal(dispatch_plan_init(&plan, 6, 3), 0);
    dispatch_plan_build(&plan, &SMALL, 0, items, 6, alive, load, NULL, 3, 100);
    assert_int_equal(plan.items, 6);
    assert_int_equal(plan.waiting, 1);
    assert_int_equal(plan.parts, 2);
    /* destination 0: row 7's experts 1 (a tie) and 0, row 2's expert 1 (where row 7's is) and row
     * 5's 0; destination 1: row 5's 2 */
    static const uint32_t rows[] = {5, 7, 2, 7, 5, 2}, experts[] = {0, 0, 1, 1, 2, 3},
                          item_row[] = {1, 2, 0, 2, 0};
    for (int i = 0; i < 6; i++) {
        assert_int_equal(plan.item[i].row, rows[i]);
        assert_int_equal(plan.item[i].expert, experts[i]);
        if (i < 5)
            assert_int_equal(plan.item_row[i], item_row[i]);
    }
    assert_int_equal(plan.item[5].destination, UINT32_MAX);
    assert_int_equal(plan.part[0].destination, 0);
    assert_int_equal(plan.part[0].items, 4);
    assert_int_equal(plan.part[0].groups, 2);
    assert_int_equal(plan.part[0].rows, 3);
    assert_int_equal(plan.part[1].destination, 1);
    assert_int_equal(plan.part[1].first_item, 4);
    assert_int_equal(plan.part[1].rows, 1);
    assert_int_equal(plan.group[0].expert, 0);
    assert_int_equal(plan.group[0].count, 2);
    assert_int_equal(load[0], 4 * REPLICA_COST);
    assert_int_equal(load[1], 1 * REPLICA_COST);
    dispatch_plan_free(&plan);
}

struct random_cluster {
    uint32_t layers, experts, destinations;
    uint32_t first[3 * 64 + 1], holder[3 * 64 * 8];
    uint8_t alive[16];
};

static struct placement random_placement(struct random_cluster *c, uint64_t *random) {
    c->layers = 1 + random_below(random, 3);
    c->experts = 1 + random_below(random, 64);
    c->destinations = 1 + random_below(random, 8);
    uint32_t used = 0;
    for (uint32_t entry = 0; entry < c->layers * c->experts; entry++) {
        c->first[entry] = used;
        for (uint32_t d = 0; d < c->destinations; d++)
            if (random_below(random, c->destinations) < 2) /* about two holders, sometimes none */
                c->holder[used++] = d;
    }
    c->first[c->layers * c->experts] = used;
    for (uint32_t d = 0; d < c->destinations; d++)
        c->alive[d] = random_below(random, 8) != 0;
    return (struct placement){c->layers, c->experts, c->first, c->holder};
}

static int holds(const struct placement *p, uint32_t layer, uint32_t expert, uint32_t destination) {
    size_t entry = (size_t)layer * p->experts + expert;
    for (uint32_t i = p->first[entry]; i < p->first[entry + 1]; i++)
        if (p->holder[i] == destination)
            return 1;
    return 0;
}

#define ROWS_MAX 300
#define K_MAX    6

/* Rows (ascending or shuffled), each with distinct experts. Returns the number of items. */
static uint32_t random_items(uint32_t experts, struct dispatch_item *items, uint64_t *random) {
    uint32_t rows = random_below(random, ROWS_MAX), count = 0;
    uint32_t k = 1 + random_below(random, experts < K_MAX ? experts : K_MAX);
    for (uint32_t r = 0; r < rows; r++) {
        uint32_t offset = random_below(random, experts);
        for (uint32_t slot = 0; slot < k; slot++)
            if (random_below(random, 5) != 0) /* holes: a plan for what is left after a failure */
                items[count++] =
                    (struct dispatch_item){.row = r * 27,
                                           .slot = (uint16_t)slot,
                                           .expert = (uint16_t)((offset + slot) % experts)};
    }
    if (random_below(random, 2) == 0)
        for (uint32_t i = count; i > 1; i--) {
            uint32_t j = random_below(random, i);
            struct dispatch_item swap = items[i - 1];
            items[i - 1] = items[j];
            items[j] = swap;
        }
    return count;
}

static void check_part(const struct dispatch_plan *plan, const struct dispatch_part *part) {
    uint32_t item = part->first_item, counted = 0;
    for (uint32_t g = part->first_group; g < part->first_group + part->groups; g++) {
        assert_true(plan->group[g].count >= 1);
        assert_true(g == part->first_group || plan->group[g].expert > plan->group[g - 1].expert);
        for (uint32_t i = 0; i < plan->group[g].count; i++, item++) {
            assert_int_equal(plan->item[item].expert, plan->group[g].expert);
            assert_int_equal(plan->item[item].destination, part->destination);
            assert_true(i == 0 || plan->item[item].row > plan->item[item - 1].row);
            assert_true(plan->item_row[item] < part->rows);
            assert_int_equal(plan->row[part->first_row + plan->item_row[item]],
                             plan->item[item].row);
        }
        counted += plan->group[g].count;
    }
    assert_int_equal(counted, part->items);
    assert_true(part->rows >= 1 && part->rows <= part->items);
    for (uint32_t r = 1; r < part->rows; r++)
        assert_true(plan->row[part->first_row + r] > plan->row[part->first_row + r - 1]);
}

/* The next part of the same destination begins with an expert that had no room in this one. */
static bool ended_well(const struct dispatch_plan *plan, uint32_t p, uint32_t part_max) {
    const struct dispatch_part *part = &plan->part[p], *next = part + 1;
    const uint32_t last = part->first_item + part->items - 1, expert = plan->item[last + 1].expert;
    uint32_t run = 0;
    while (run < next->items && plan->item[next->first_item + run].expert == expert)
        run++;
    return part->items >= part_max / 2 && plan->item[last].expert != expert &&
           part->items + run > part_max;
}

static void check_plan(const struct dispatch_plan *plan, const struct placement *placement,
                       uint32_t layer, const struct random_cluster *c,
                       const struct dispatch_item *items, uint32_t count, uint32_t part_max) {
    static uint8_t seen[ROWS_MAX][K_MAX], given[ROWS_MAX][K_MAX];
    memset(seen, 0, sizeof seen);
    memset(given, 0, sizeof given);
    for (uint32_t i = 0; i < count; i++)
        given[items[i].row / 27][items[i].slot] = (uint8_t)(items[i].expert + 1);
    assert_int_equal(plan->items, count);
    for (uint32_t i = 0; i < count; i++) {
        const struct dispatch_item *item = &plan->item[i];
        assert_int_equal(given[item->row / 27][item->slot], item->expert + 1);
        assert_int_equal(seen[item->row / 27][item->slot]++, 0);
        int waits = i >= count - plan->waiting;
        assert_int_equal(waits, item->destination == UINT32_MAX);
        if (!waits) {
            assert_true(holds(placement, layer, item->expert, item->destination));
            assert_true(c->alive[item->destination]);
        } else {
            for (uint32_t d = 0; d < c->destinations; d++)
                assert_false(c->alive[d] && holds(placement, layer, item->expert, d));
        }
    }
    uint32_t item = 0, group = 0, row = 0;
    for (uint32_t p = 0; p < plan->parts; p++) {
        const struct dispatch_part *part = &plan->part[p];
        assert_int_equal(part->first_item, item);
        assert_int_equal(part->first_group, group);
        assert_int_equal(part->first_row, row);
        assert_true(part->items >= 1 && part->items <= part_max);
        assert_true(p == 0 || part->destination >= plan->part[p - 1].destination);
        assert_true(p == 0 || part->destination > plan->part[p - 1].destination ||
                    plan->part[p - 1].items == part_max || ended_well(plan, p - 1, part_max));
        check_part(plan, part);
        item += part->items;
        group += part->groups;
        row += part->rows;
    }
    assert_int_equal(item, count - plan->waiting);
}

static void every_plan_keeps_its_invariants(void **state) {
    (void)state;
    static struct dispatch_item items[ROWS_MAX * K_MAX];
    struct dispatch_plan plan;
    assert_int_equal(dispatch_plan_init(&plan, ROWS_MAX * K_MAX, 8), 0);
    for (uint64_t seed = 1; seed <= 400; seed++) {
        uint64_t random = seed;
        struct random_cluster c;
        struct placement placement = random_placement(&c, &random);
        uint32_t layer = random_below(&random, c.layers);
        uint32_t count = random_items(c.experts, items, &random);
        uint32_t part_max = 1 + random_below(&random, 200);
        uint32_t load[16], before[16];
        for (uint32_t d = 0; d < c.destinations; d++)
            before[d] = load[d] = random_below(&random, 10);
        if (seed % 100 == 0)
            printf("seed %u: %u items\n", (unsigned)seed, count);
        dispatch_plan_build(&plan, &placement, layer, items, count, c.alive, load, NULL,
                            c.destinations, part_max);
        check_plan(&plan, &placement, layer, &c, items, count, part_max);
        /* what was added: items, and second replicas of experts */
        uint32_t added = 0, wanted = 0, replicas[64] = {0}, last[64];
        memset(last, 0xff, sizeof last);
        for (uint32_t i = 0; i < count - plan.waiting; i++) { /* by destination, then expert */
            uint32_t expert = plan.item[i].expert;
            replicas[expert] += last[expert] != plan.item[i].destination;
            last[expert] = plan.item[i].destination;
        }
        for (uint32_t e = 0; e < c.experts; e++)
            wanted += replicas[e] > 1 ? (replicas[e] - 1) * REPLICA_OPEN * REPLICA_COST : 0;
        wanted += (count - plan.waiting) * REPLICA_COST;
        for (uint32_t d = 0; d < c.destinations; d++)
            added += load[d] - before[d];
        assert_int_equal(added, wanted);
    }
    dispatch_plan_free(&plan);
}

/* Two replicas of everything: neither is given more than a second replica costs. */
static void replicas_share_the_load(void **state) {
    (void)state;
    uint32_t first[9], holder[16];
    for (uint32_t e = 0; e <= 8; e++)
        first[e] = 2 * e;
    for (uint32_t i = 0; i < 16; i++)
        holder[i] = i % 2;
    struct placement placement = {1, 8, first, holder};
    struct dispatch_item items[101];
    for (uint32_t i = 0; i < 101; i++)
        items[i] = (struct dispatch_item){.row = i, .expert = (uint16_t)(i % 3)};
    uint8_t alive[2] = {1, 1};
    uint32_t load[2] = {0, 0};
    struct dispatch_plan plan;
    assert_int_equal(dispatch_plan_init(&plan, 101, 2), 0);
    dispatch_plan_build(&plan, &placement, 0, items, 101, alive, load, NULL, 2, FRAME_ITEMS_MAX);
    uint32_t items_at[2] = {0, 0}, groups = 0;
    for (uint32_t i = 0; i < plan.parts; i++) {
        items_at[plan.part[i].destination] += plan.part[i].items;
        groups += plan.part[i].groups;
    }
    assert_in_range(items_at[0], 50 - REPLICA_OPEN, 51 + REPLICA_OPEN);
    assert_int_equal(groups, 4); /* of 3 experts, one is at both */
    assert_in_range(load[0] + load[1], 101 * REPLICA_COST, (101 + REPLICA_OPEN) * REPLICA_COST);
    dispatch_plan_free(&plan);
}

/* 64 rows of each of 8 experts at one destination, parts of up to 150: the weights of no expert are
 * read twice. */
static void an_expert_is_not_cut_where_there_is_room(void **state) {
    (void)state;
    static const uint32_t first[] = {0, 1, 2, 3, 4, 5, 6, 7, 8}, holder[8];
    const struct placement placement = {1, 8, first, holder};
    const uint8_t alive[1] = {1};
    uint32_t level[1] = {0}, count = 0;
    static struct dispatch_item items[512];
    for (uint32_t row = 0; row < 512; row++)
        items[count++] = (struct dispatch_item){.row = row, .expert = row % 8};
    struct dispatch_plan plan;
    assert_int_equal(dispatch_plan_init(&plan, 512, 1), 0);
    dispatch_plan_build(&plan, &placement, 0, items, count, alive, level, NULL, 1, 150);
    assert_int_equal(plan.parts, 4);
    for (uint32_t p = 0; p < plan.parts; p++) {
        assert_int_equal(plan.part[p].items, 128);
        assert_int_equal(plan.part[p].groups, 2);
    }
    /* one that is larger than a part must be */
    dispatch_plan_build(&plan, &placement, 0, items, count, alive, level, NULL, 1, 40);
    assert_true(plan.parts >= 13);
    dispatch_plan_free(&plan);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(an_expert_is_not_cut_where_there_is_room),
        cmocka_unit_test(a_replica_is_the_least_loaded_live_holder),
        cmocka_unit_test(replicas_are_filled_like_water),
        cmocka_unit_test(a_plan_written_out),
        cmocka_unit_test(every_plan_keeps_its_invariants),
        cmocka_unit_test(replicas_share_the_load),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
