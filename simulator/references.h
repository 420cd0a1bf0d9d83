/* What fault-free runs answer, for each request and each version of the routing bias that it may be pinned to: the deltas are noted
 * when the coordinator hands them out, the answer is computed when the first piece of it is to be compared. */
#ifndef TROUPE_SIMULATOR_REFERENCES_H
#define TROUPE_SIMULATOR_REFERENCES_H

#include "simulator/clients.h"

struct references {
    struct bias_version *version; /* [versions] users: not used */
    uint32_t versions;
    struct answered {
        uint64_t version;
        uint32_t request;
        struct clients *clients; /* its client 0 is the answer */
    } * answered;
    uint32_t answers;
};

void references_note(struct references *self, const Troupe__Bias *bias);
const float *references_delta(const struct references *self, uint64_t version); /* NULL: nobody handed it out */
const struct client *references_find(const struct references *self, uint32_t request, uint64_t version);
/* Takes `clients`, which malloc made. */
const struct client *references_add(struct references *self, uint32_t request, uint64_t version, struct clients *clients);
void references_free(struct references *self);

#endif
