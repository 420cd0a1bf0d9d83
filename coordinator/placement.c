/* Even placement of experts, see placement.h. */
#include "coordinator/placement.h"

#include <stdbool.h>
#include <stddef.h>
#include <string.h>

struct plan {
    uint32_t experts, holders, target_total;
    const uint32_t *capacity;
    const uint8_t *has_file;
    uint32_t *given; /* [holders] pairs in the layers placed so far */
    uint32_t *used;  /* [holders] those and what it holds in the layers to come */
    uint32_t *held;  /* [holders] of this layer, before */
    uint32_t *quota; /* [holders] of this layer, still to be given */
};

static uint32_t room(const struct plan *plan, uint32_t holder) {
    return plan->capacity[holder] > plan->used[holder] ? plan->capacity[holder] - plan->used[holder]
                                                       : 0;
}

/* Who is next in line for one more than the even share: prefers what needs no move, then the
 * emptiest, then the first. */
static uint32_t choose_extra(const struct plan *plan, uint32_t base) {
    uint32_t best = NOBODY;
    bool best_keeps = false;
    for (uint32_t h = 0; h < plan->holders; h++) {
        if (plan->quota[h] > base || room(plan, h) <= base)
            continue;
        bool keeps = plan->held[h] > base && plan->given[h] + base < plan->target_total;
        if (best == NOBODY || (keeps && !best_keeps) ||
            (keeps == best_keeps && plan->given[h] < plan->given[best])) {
            best = h;
            best_keeps = keeps;
        }
    }
    return best;
}

/* Takes the layer out of `used` and sets the quotas. */
static void share_out(struct plan *plan, const uint32_t *current) {
    uint32_t base = plan->experts / plan->holders, extras = plan->experts % plan->holders;
    memset(plan->held, 0, plan->holders * sizeof *plan->held);
    for (uint32_t e = 0; e < plan->experts; e++)
        if (current[e] < plan->holders)
            plan->held[current[e]]++;
    for (uint32_t h = 0; h < plan->holders; h++) {
        plan->used[h] -= plan->held[h];
        plan->quota[h] = base < room(plan, h) ? base : room(plan, h);
    }
    for (uint32_t i = 0; i < extras; i++) {
        uint32_t holder = choose_extra(plan, base);
        if (holder == NOBODY)
            break;
        plan->quota[holder]++;
    }
}

static uint32_t emptiest_with_room(const struct plan *plan) {
    uint32_t best = NOBODY;
    for (uint32_t h = 0; h < plan->holders; h++)
        if (room(plan, h) > 0 && (best == NOBODY || plan->given[h] < plan->given[best]))
            best = h;
    return best;
}

static void give(struct plan *plan, uint32_t *ret, uint32_t holder) {
    *ret = holder;
    plan->given[holder]++;
    plan->used[holder]++;
    if (plan->quota[holder] > 0)
        plan->quota[holder]--;
}

/* Of those with a file: whose share has room, else who has room at all; the emptiest. */
static uint32_t emptiest_with_file(const struct plan *plan) {
    uint32_t best = NOBODY;
    for (uint32_t h = 0; h < plan->holders; h++)
        if (plan->has_file[h] && room(plan, h) > 0 &&
            (best == NOBODY || (plan->quota[h] > 0 && plan->quota[best] == 0) ||
             ((plan->quota[h] > 0) == (plan->quota[best] > 0) && plan->given[h] < plan->given[best])))
            best = h;
    return best;
}

/* What not everybody can take. */
static void place_bound(struct plan *plan, const uint8_t *source, const uint32_t *current,
                        uint32_t *ret) {
    for (uint32_t e = 0; e < plan->experts; e++) {
        const bool here = current[e] < plan->holders && room(plan, current[e]) > 0;
        uint32_t taker = NOBODY;
        if (source[e] == SOURCE_STAYS && here)
            taker = current[e];
        else if (source[e] != SOURCE_ANY)
            taker = here && plan->has_file[current[e]] && plan->quota[current[e]] > 0
                        ? current[e]
                        : emptiest_with_file(plan);
        if (taker != NOBODY)
            give(plan, &ret[e], taker);
    }
}

/* source: of this layer; NULL: everybody can take anything. */
static uint32_t place_layer(struct plan *plan, const uint8_t *source, const uint32_t *current,
                            uint32_t *ret) {
    share_out(plan, current);
    for (uint32_t e = 0; e < plan->experts; e++)
        ret[e] = NOBODY;
    if (source != NULL)
        place_bound(plan, source, current, ret);
    for (uint32_t e = 0; e < plan->experts; e++)
        if (ret[e] == NOBODY && (source == NULL || source[e] == SOURCE_ANY) &&
            current[e] < plan->holders && plan->quota[current[e]] > 0)
            give(plan, &ret[e], current[e]);
    uint32_t homeless = 0, holder = 0;
    for (uint32_t e = 0; e < plan->experts; e++) {
        if (ret[e] != NOBODY)
            continue;
        if (source != NULL && source[e] != SOURCE_ANY) {
            homeless++;
            continue;
        }
        while (holder < plan->holders && plan->quota[holder] == 0)
            holder++;
        uint32_t taker = holder;
        if (taker == plan->holders) /* some have no room for their share: others take more */
            taker = current[e] < plan->holders && room(plan, current[e]) > 0
                        ? current[e]
                        : emptiest_with_room(plan);
        if (taker == NOBODY)
            homeless++;
        else
            give(plan, &ret[e], taker);
    }
    return homeless;
}

uint32_t placement_even(uint32_t layers, const uint8_t *is_moe, uint32_t experts, uint32_t holders,
                        const uint32_t *capacity, const uint8_t *has_file, const uint8_t *source,
                        const uint32_t *current, uint32_t *ret, uint32_t *scratch) {
    uint32_t moe_layers = 0, homeless = 0;
    for (uint32_t l = 0; l < layers; l++)
        moe_layers += is_moe[l] != 0;
    for (uint32_t i = 0; i < layers * experts; i++)
        ret[i] = NOBODY;
    if (holders == 0)
        return moe_layers * experts;
    struct plan plan = {
        .experts = experts,
        .holders = holders,
        .target_total = (moe_layers * experts + holders - 1) / holders,
        .capacity = capacity,
        .has_file = has_file,
        .given = scratch,
        .used = scratch + holders,
        .held = scratch + 2 * (size_t)holders,
        .quota = scratch + 3 * (size_t)holders,
    };
    memset(scratch, 0, 4 * (size_t)holders * sizeof *scratch);
    for (uint32_t i = 0; i < layers * experts; i++)
        if (is_moe[i / experts] && current[i] < holders)
            plan.used[current[i]]++;
    for (uint32_t l = 0; l < layers; l++)
        if (is_moe[l])
            homeless += place_layer(&plan, source != NULL ? source + (size_t)l * experts : NULL,
                                    current + (size_t)l * experts, ret + (size_t)l * experts);
    return homeless;
}
