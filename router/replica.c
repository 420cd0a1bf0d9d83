/* Choice of the replica that computes one item: the live holder with the least load. It decides
 * where a row is computed, never what comes out. */
#include "router/dispatch.h"

uint32_t replica_choose(const struct placement *placement, uint32_t layer, uint32_t expert,
                        const uint8_t *alive, const uint32_t *load) {
    ASSERT(layer < placement->layers && expert < placement->experts);
    size_t entry = (size_t)layer * placement->experts + expert;
    uint32_t best = UINT32_MAX;
    for (uint32_t i = placement->first[entry]; i < placement->first[entry + 1]; i++) {
        uint32_t destination = placement->holder[i];
        if (alive[destination] && (best == UINT32_MAX || load[destination] < load[best]))
            best = destination; /* ties: the lower destination, as holders ascend */
    }
    return best;
}
