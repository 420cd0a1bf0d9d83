/* Which process should hold which (layer, expert). Pure. */
#ifndef TROUPE_PLACEMENT_H
#define TROUPE_PLACEMENT_H

#include <stdint.h>

#define NOBODY UINT32_MAX

/* Even placement with few moves, one copy of each pair.
 *   current, ret: [layers * experts] holder index or NOBODY; capacity: [holders] most pairs that
 * each may hold. is_moe: [layers] 0: the layer has no routed experts and stays NOBODY. Per layer
 * every holder gets experts/holders of them, rounded up for some: for those that hold more already,
 * then for those with the fewest in all, so that totals are even too, also when a layer has fewer
 * experts than there are holders. What a holder has and may keep stays; the rest goes out in
 * contiguous runs, ascending. What nobody has room for stays NOBODY; returns how many pairs that
 * is. scratch: [4 * holders].
 *
 * source: [layers * experts] enum pair_source, has_file: [holders]; both NULL: everybody has a file of
 * all weights. Pairs that can only come from a file go to holders that have one, beyond their even
 * share if need be, before anything else is given out; the others then fill up the rest. */
enum pair_source {
    SOURCE_ANY,   /* somebody serves it: whoever is given it can take it from there */
    SOURCE_FILE,  /* nobody does */
    SOURCE_STAYS, /* nobody does yet, but `current` has it */
};
uint32_t placement_even(uint32_t layers, const uint8_t *is_moe, uint32_t experts, uint32_t holders,
                        const uint32_t *capacity, const uint8_t *has_file, const uint8_t *source,
                        const uint32_t *current, uint32_t *ret, uint32_t *scratch);

#endif
