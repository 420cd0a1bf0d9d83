/* Choice of the replica that computes one item: where it would be done first. Every destination has a level, the
 * time until it has done what it was given so far (its queue and this batch's share of it), and a cost, the time that an item
 * takes there; the item goes where level plus cost is least, which raises that level. Item by item this fills the replicas like
 * water of one surface, so that all end together (shares follow speeds, a queue counts as water that is there already). Before a batch's rows of one
 * expert go to a second replica, that one must be so much emptier that reading the weights there pays (REPLICA_OPEN). It decides
 * where a row is computed, never what comes out. */
#include "router/dispatch.h"

uint32_t replica_choose(const struct placement *placement, uint32_t layer, uint32_t expert,
                        const uint8_t *alive, const uint32_t *level, const uint32_t *cost) {
    ASSERT(layer < placement->layers && expert < placement->experts);
    size_t entry = (size_t)layer * placement->experts + expert;
    uint32_t best = UINT32_MAX, best_end = UINT32_MAX;
    for (uint32_t i = placement->first[entry]; i < placement->first[entry + 1]; i++) {
        uint32_t destination = placement->holder[i];
        uint32_t end = level[destination] + (cost != NULL ? cost[destination] : REPLICA_COST);
        if (alive[destination] && (best == UINT32_MAX || end < best_end)) {
            best = destination; /* ties: the lower destination, as holders ascend */
            best_end = end;
        }
    }
    return best;
}

static uint32_t cost_at(const uint32_t *cost, uint32_t destination) {
    return cost != NULL ? cost[destination] : REPLICA_COST;
}

uint32_t replica_take(const struct placement *placement, uint32_t layer, uint32_t expert,
                      const uint8_t *alive, uint32_t *level, const uint32_t *cost,
                      struct replica_use *use) {
    ASSERT(layer < placement->layers && expert < placement->experts && expert < EXPERTS_MAX);
    const size_t entry = (size_t)layer * placement->experts + expert;
    const uint32_t begin = placement->first[(size_t)layer * placement->experts];
    const bool open = use->expert[expert] == use->now;
    uint32_t best = UINT32_MAX, best_end = UINT32_MAX, best_slot = 0, best_price = 0;
    for (uint32_t i = placement->first[entry]; i < placement->first[entry + 1]; i++) {
        const uint32_t destination = placement->holder[i], slot = i - begin;
        const bool has = slot >= REPLICA_SLOTS_MAX || use->slot[slot] == use->now;
        const uint32_t one = cost_at(cost, destination), price = one + (open && !has ? REPLICA_OPEN * one : 0);
        if (!alive[destination] || (best != UINT32_MAX && level[destination] + price >= best_end))
            continue; /* ties: the lower destination, as holders ascend */
        best = destination;
        best_end = level[destination] + price;
        best_slot = slot;
        best_price = price;
    }
    if (best == UINT32_MAX)
        return best;
    level[best] += best_price;
    use->expert[expert] = use->now;
    if (best_slot < REPLICA_SLOTS_MAX)
        use->slot[best_slot] = use->now;
    return best;
}
