/* Who runs: waiting sequences are admitted, running ones get pages as they grow, and where pages
 * run out somebody is put back (preemption by recompute).
 *
 * Sequences are ranked by priority (the smaller number first), then by arrival. Who runs holds the
 * pages of its known tokens from the start, and one more each time it has filled them. If there is
 * none, the running sequence of the lowest rank is put back among those that wait: it gives its
 * pages away and computes all its tokens again once it is admitted, prompt tokens in the expanded
 * form, generated ones in the absorbed form, as the first time, so the same tokens follow; what is
 * still in the prefix cache then need not be computed. Whoever waits with a better priority takes
 * the place of those with a worse one.
 *
 * Invariants: 1. the list of those that wait is in order of rank; 2. the running sequence of the
 * highest rank is never put back: the cache holds the largest sequence (checked at SUBMIT), so it
 * comes to its end, and then the next one; 3. nobody is put back while rows of it are in a batch.
 */
#include "actors/attention.h"

/* Pages left over when somebody is admitted beside others, so that these can grow for a while. */
#define MARGIN_SHARE 32u

static bool ranks_before(const struct sequence *a, const struct sequence *b) {
    return a->priority != b->priority ? a->priority < b->priority : a->arrival < b->arrival;
}

void attention_wait(struct attention *self, struct sequence *sequence) {
    struct sequence_list *list = &self->waiting;
    struct sequence *before = list->last;
    while (before != NULL && ranks_before(sequence, before))
        before = before->previous;
    sequence->state = SEQUENCE_WAITING;
    sequence->previous = before;
    sequence->next = before != NULL ? before->next : list->first;
    if (sequence->next != NULL)
        sequence->next->previous = sequence;
    else
        list->last = sequence;
    if (before != NULL)
        before->next = sequence;
    else
        list->first = sequence;
    list->count++;
}

/* ---- leaving ---- */

static void put_back(struct attention *self, struct sequence *sequence) {
    attention_leave(self, sequence);
    sequence->computed = 0;
    sequence->drafts = 0;
    self->preemptions++;
    attention_wait(self, sequence);
}

/* The running sequence of the lowest rank. */
static struct sequence *last_running(const struct attention *self) {
    struct sequence *last = NULL;
    for (uint32_t i = 0; i < self->settings.max_sequences; i++)
        if (self->running[i] != NULL && (last == NULL || ranks_before(last, self->running[i])))
            last = self->running[i];
    return last;
}

/* ---- growing ---- */

static bool lacks_page(const struct sequence *sequence) {
    return sequence->held * PAGE_TOKENS <= sequence->computed;
}

/* The one of the highest rank. */
static struct sequence *first_lacking(const struct attention *self) {
    struct sequence *first = NULL;
    for (uint32_t i = 0; i < self->settings.max_sequences; i++)
        if (self->running[i] != NULL && lacks_page(self->running[i]) &&
            (first == NULL || ranks_before(self->running[i], first)))
            first = self->running[i];
    return first;
}

void attention_grow(struct attention *self) {
    bool lacking = false;
    for (uint32_t i = 0; i < self->settings.max_sequences; i++) {
        struct sequence *sequence = self->running[i];
        if (sequence == NULL || !lacks_page(sequence))
            continue;
        if (pages_available(&self->pages) > 0)
            pages_take(self, sequence, 1);
        else
            lacking = true;
    }
    struct sequence *sequence;
    while (lacking && (sequence = first_lacking(self)) != NULL) {
        while (pages_available(&self->pages) == 0 && sequence->state == SEQUENCE_RUNNING)
            put_back(self, last_running(self)); /* it may be itself */
        if (sequence->state == SEQUENCE_RUNNING)
            pages_take(self, sequence, 1);
    }
}

/* ---- admission ---- */

static void start(struct attention *self, struct sequence *sequence, uint32_t found,
                  uint32_t more) {
    uint32_t number = 0;
    while (self->running[number] != NULL)
        number++;
    attention_stop_waiting(self, sequence);
    self->running[number] = sequence;
    self->runnings++;
    sequence->number = number;
    sequence->state = SEQUENCE_RUNNING;
    draft_begin(sequence);
    pages_share(self, sequence, found);
    pages_take(self, sequence, more);
    if (!sequence->begun)
        sequence->cached_tokens = sequence->computed;
    sequence->begun = true;
}

static bool try_start(struct attention *self, struct sequence *sequence) {
    if (self->runnings == self->settings.max_sequences)
        return false;
    uint32_t idle, found = pages_find(self, sequence, &idle);
    uint32_t more = (sequence->tokens + PAGE_TOKENS - 1) / PAGE_TOKENS - found;
    uint32_t margin = 1 + self->pages.total / MARGIN_SHARE;
    if (margin > self->runnings)
        margin = self->runnings;
    if (more + margin > pages_available(&self->pages) - idle)
        return false;
    start(self, sequence, found, more);
    return true;
}

/* Would there be room for it if all of a worse priority were put back? Shared pages count too
 * often: then some are put back for nothing. */
static bool worth_putting_back(const struct attention *self, const struct sequence *sequence) {
    uint32_t worse = 0, pages = pages_available(&self->pages);
    for (uint32_t i = 0; i < self->settings.max_sequences; i++)
        if (self->running[i] != NULL && self->running[i]->priority > sequence->priority) {
            worse++;
            pages += self->running[i]->held;
        }
    return worse > 0 && pages >= (sequence->tokens + PAGE_TOKENS - 1) / PAGE_TOKENS;
}

void attention_admit(struct attention *self) {
    while (self->waiting.first != NULL) {
        struct sequence *sequence = self->waiting.first;
        while (!try_start(self, sequence)) {
            if (!worth_putting_back(self, sequence))
                return;
            put_back(self, last_running(self)); /* of a worse priority, since there is one */
        }
    }
}
