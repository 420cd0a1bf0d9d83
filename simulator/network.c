/* What becomes of messages and frames on their way: the network's own delays and losses, drawn from the world's chance, and the faults
 * that are active on the link, each drawing from its own. */
#include <stdlib.h>
#include <string.h>

#include "simulator/internal.h"

struct journey {
    uint64_t arrival_ns;
    uint32_t copies;
    struct fault *corrupts; /* NULL: nobody */
};

static bool share_hit(struct fault *fault) {
    return random_between(&fault->random, 0, 999) < fault->share_permille;
}

static void suffer(struct fault *fault, struct journey *journey) {
    switch (fault->kind) {
    case FAULT_DELAY:
        journey->arrival_ns += random_between(&fault->random, 0, fault->amount);
        break;
    case FAULT_DROP:
        journey->copies = share_hit(fault) ? 0 : journey->copies;
        break;
    case FAULT_DUPLICATE:
        journey->copies += journey->copies > 0 && share_hit(fault);
        break;
    case FAULT_CORRUPT:
        journey->corrupts = share_hit(fault) ? fault : journey->corrupts;
        break;
    case FAULT_PARTITION:
        journey->copies = 0;
        break;
    case FAULT_CLOG:
        if (journey->arrival_ns < fault->at_ns + fault->for_ns)
            journey->arrival_ns = fault->at_ns + fault->for_ns;
        break;
    default:
        break;
    }
}

static struct journey travel(struct world *self, const struct node *from, uint32_t to, bool data,
                             uint64_t arrival_ns, uint32_t copies) {
    struct journey journey = {.arrival_ns = arrival_ns, .copies = copies};
    struct faults *faults = self->options.faults;
    for (uint32_t i = 0; faults != NULL && i < faults->count; i++) {
        struct fault *fault = &faults->list[i];
        if (fault_is_active(fault, self->now_ns) &&
            fault_is_on_link(fault, node_place(from), node_place(&self->node[to]), data))
            suffer(fault, &journey);
    }
    return journey;
}

static void corrupt(struct fault *fault, uint8_t *bytes, size_t size) {
    uint64_t times = random_between(&fault->random, 1, 4);
    for (uint64_t i = 0; i < times; i++)
        bytes[random_between(&fault->random, 0, size - 1)] ^= (uint8_t)random_between(&fault->random, 1, 255);
}

static struct delivery *arrive(struct world *self, enum delivery_kind kind, uint32_t to,
                               const struct journey *journey, const uint8_t *bytes, size_t size) {
    struct delivery *delivery = delivery_new(kind, to, journey->arrival_ns);
    delivery->bytes = world_bytes(size);
    memcpy(delivery->bytes, bytes, size);
    delivery->size = size;
    if (journey->corrupts != NULL)
        corrupt(journey->corrupts, delivery->bytes, size);
    queue_push(&self->queue, delivery);
    return delivery;
}

void network_send_message(struct world *self, const struct node *from, uint32_t to, const uint8_t *bytes,
                          size_t size, uint64_t time_ns) {
    uint32_t doubles = 1 + random_chance(&self->random, self->options.duplicate);
    for (uint32_t i = 0; i < doubles; i++) {
        uint64_t delay_ns =
            random_between(&self->random, self->options.delay_min_ns, self->options.delay_max_ns);
        bool lost = random_chance(&self->random, self->options.loss);
        struct journey journey = travel(self, from, to, false, time_ns + delay_ns, !lost);
        for (uint32_t copy = 0; copy < journey.copies; copy++)
            arrive(self, DELIVER_MESSAGE, to, &journey, bytes, size);
    }
}

void network_send_frame(struct world *self, const struct node *from, uint32_t to, uint64_t incarnation,
                        uint8_t *bytes, size_t size, uint64_t time_ns) {
    uint64_t delay_ns = random_between(&self->random, self->options.frame_delay_min_ns,
                                       self->options.frame_delay_max_ns);
    bool lost = random_chance(&self->random, self->options.frame_loss);
    struct journey journey = travel(self, from, to, true, time_ns + delay_ns, !lost);
    for (uint32_t copy = 0; copy < journey.copies; copy++) {
        struct delivery *frame = arrive(self, DELIVER_FRAME, to, &journey, bytes, size);
        frame->incarnation = self->options.frames_find_any_life ? 0 : incarnation;
    }
    free(bytes);
}

uint64_t network_slowness(const struct world *self, const struct node *node) {
    uint64_t times = 1;
    const struct faults *faults = self->options.faults;
    for (uint32_t i = 0; faults != NULL && i < faults->count; i++)
        if (faults->list[i].kind == FAULT_SLOW && fault_is_active(&faults->list[i], self->now_ns) &&
            place_matches(faults->list[i].from, node_place(node)) && faults->list[i].amount > times)
            times = faults->list[i].amount;
    return times;
}
