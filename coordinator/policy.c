/* What the troupe does by itself, as far as its configuration allows: experts are rebalanced at an interval
 * while their loads are uneven, and nobody may scale beyond the limits.
 *
 * Rebalancing waits while another rebalance, a drain or a scaling is under way: their loads say little about what
 * will be. It is an operation like one that was asked for, shown and cancelled like it. */
#include "coordinator/coordinator.h"

static bool busy(const struct coordinator *self) {
    for (uint32_t i = 0; i < OPERATIONS_MAX; i++) {
        const struct operation *operation = &self->operation[i];
        if (!operation_ended(operation) &&
            (operation->kind == OPERATION_REBALANCE || operation->kind == OPERATION_DRAIN ||
             operation->kind == OPERATION_SCALE))
            return true;
    }
    return false;
}

void policy_timer(struct coordinator *self, uint64_t now_ns, struct effects *out) {
    uint64_t interval_ns = (uint64_t)self->settings.rebalance_interval_ms * 1000000u;
    if (interval_ns == 0 || self->moe_pairs == 0)
        return;
    if (self->rebalance_at_ns == 0 || !self->serving || busy(self)) {
        if (self->rebalance_at_ns == 0 || now_ns >= self->rebalance_at_ns)
            self->rebalance_at_ns = now_ns + interval_ns;
        return;
    }
    if (now_ns < self->rebalance_at_ns)
        return;
    self->rebalance_at_ns = now_ns + interval_ns;
    struct rebalance plan = {0};
    struct failure failure = {0};
    struct rebalance_wish wish = {.spare = self->settings.rebalance_spare,
                                  .threshold = self->settings.rebalance_threshold,
                                  .automatic = true};
    if (rebalance(self, &wish, now_ns, &plan, &failure) < 0)
        effects_trace(out, TRACE_INFO, "no automatic rebalance: %s", failure.text);
    else if (plan.id != 0)
        effects_trace(out, TRACE_INFO,
                      "automatic rebalance, operation %llu: balancedness %.3f, planned %.3f, %u copies to load",
                      (unsigned long long)plan.id, plan.before, plan.after, plan.moves);
}

uint64_t policy_deadline(const struct coordinator *self) {
    bool on = self->settings.rebalance_interval_ms > 0 && self->moe_pairs > 0;
    return on && self->rebalance_at_ns != 0 ? self->rebalance_at_ns : NEVER;
}

struct policy_limits policy_limits(const struct coordinator *self, enum role role) {
    const struct settings *settings = &self->settings;
    struct policy_limits limits = {1, ACTORS_MAX / 2, "", ""};
    switch (role) {
    case ROLE_EXPERT:
        limits = (struct policy_limits){settings->min_experts, settings->max_experts, "min_experts",
                                        "max_experts"};
        break;
    case ROLE_ATTENTION:
        limits = (struct policy_limits){settings->min_attention, settings->max_attention,
                                        "min_attention", "max_attention"};
        break;
    case ROLE_SAMPLER:
        limits = (struct policy_limits){settings->min_samplers, settings->max_samplers,
                                        "min_samplers", "max_samplers"};
        break;
    default:
        break;
    }
    return limits;
}

int policy_check_scale(const struct coordinator *self, enum role role, uint32_t here, uint32_t count,
                       struct failure *failure) {
    struct policy_limits limits = policy_limits(self, role);
    if (count >= limits.least && count <= limits.most)
        return 0;
    return fail(failure, ERR_INVALID,
                "%s: %u to %u processes expected, found %u (%s %u, %s %u; %u are here)",
                role_name(role), limits.least, limits.most, count, limits.least_name, limits.least,
                limits.most_name, limits.most, here);
}

int policy_check_leaving(const struct coordinator *self, enum role role, uint32_t here,
                         uint32_t going, struct failure *failure) {
    struct policy_limits limits = policy_limits(self, role);
    if (here >= going && here - going >= limits.least)
        return 0;
    return fail(failure, ERR_STATE,
                "%u - %u = %u %s processes would be left, at least %u expected (%s %u)", here, going,
                here - going, role_name(role), limits.least, limits.least_name, limits.least);
}
