/* Splits the answer of a reasoning model at </think>. */
#ifndef TROUPE_REASONING_H
#define TROUPE_REASONING_H

#include "actors/gateway/stop.h"

struct reasoning {
    enum { REASONING_OFF, REASONING_BEGIN, REASONING_INSIDE, REASONING_DONE } state;
    uint32_t opened; /* BEGIN: bytes of "<think>" seen */
    struct stop_filter filter;
};
/* `inside`: the prompt ended inside <think>. */
void reasoning_init(struct reasoning *self, bool inside);
void reasoning_free(struct reasoning *self);
/* Appends to `thought` what belongs to the reasoning and to `answer` what comes after it; the tags
 * themselves are dropped. */
void reasoning_push(struct reasoning *self, const char *bytes, size_t size, struct text *thought,
                    struct text *answer);
void reasoning_flush(struct reasoning *self, struct text *thought);

#endif
