/* Pages of the latent cache: who holds them, and which of them others may use as well (prefix
 * cache).
 *
 *   FREE -> HELD (one sequence writes it) -> KNOWN, held by sequences -> KNOWN, idle -> FREE
 *
 * A page whose 64 positions are all computed becomes known: it is found again by what it was made
 * of, that is its tokens, the MLA form of each (prompt or generated: the forms have different
 * bits), and everything before them, which the serial number of the page before it stands for.
 * Serial numbers are never used again and the comparison is exact: no hash decides what is equal.
 * The chain begins with the bias version. A sequence that begins with known pages need not compute
 * their positions; the bits in them are those that it would compute, so sharing shows in nothing
 * but time. What nobody holds stays known until its page is wanted: the one used least recently
 * goes first, the end of a chain before its beginning.
 *
 * Invariants (pages_broken): 1. a page is free, idle, or held, and held as often as running
 * sequences name it; 2. a page that is not known is held by one sequence at most; 3. the known
 * pages of a sequence are its first ones, and the chain is theirs; 4. nobody writes into a known
 * page. */
#include "actors/attention.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FORM_BIT 0x80000000u /* beside a token: it was generated */

_Static_assert(VOCABULARY_MAX <= FORM_BIT, "a token leaves room for its form");

/* ---- memory ---- */

bool pages_init(struct attention *self) {
    struct pages *pages = &self->pages;
    pages->total = self->settings.kv_cache_tokens / PAGE_TOKENS;
    pages->buckets = 1;
    while (pages->buckets < pages->total)
        pages->buckets *= 2;
    pages->page = calloc(pages->total, sizeof *pages->page);
    pages->token = calloc((size_t)pages->total * PAGE_TOKENS, sizeof *pages->token);
    pages->free_page = calloc(pages->total, sizeof *pages->free_page);
    pages->bucket = calloc(pages->buckets, sizeof *pages->bucket);
    if (pages->page == NULL || pages->token == NULL || pages->free_page == NULL ||
        pages->bucket == NULL)
        return false;
    for (uint32_t i = 0; i < pages->buckets; i++)
        pages->bucket[i] = NO_PAGE;
    for (uint32_t i = 0; i < pages->total; i++)
        pages->free_page[pages->free_pages++] = pages->total - 1 - i;
    pages->oldest = pages->newest = NO_PAGE;
    return true;
}

void pages_free(struct attention *self) {
    free(self->pages.page);
    free(self->pages.token);
    free(self->pages.free_page);
    free(self->pages.bucket);
}

uint32_t pages_available(const struct pages *self) {
    return self->free_pages + self->idle;
}

/* ---- idle pages, by last use ---- */

static void idle_add(struct pages *self, uint32_t number) {
    struct page *page = &self->page[number];
    page->previous = self->newest;
    page->next = NO_PAGE;
    if (self->newest != NO_PAGE)
        self->page[self->newest].next = number;
    else
        self->oldest = number;
    self->newest = number;
    self->idle++;
}

static void idle_remove(struct pages *self, uint32_t number) {
    struct page *page = &self->page[number];
    if (page->previous != NO_PAGE)
        self->page[page->previous].next = page->next;
    else
        self->oldest = page->next;
    if (page->next != NO_PAGE)
        self->page[page->next].previous = page->previous;
    else
        self->newest = page->previous;
    self->idle--;
}

/* ---- known pages ---- */

static uint32_t token_of(const struct sequence *sequence, uint32_t position) {
    return sequence->token[position] | (position < sequence->prompt_tokens ? 0 : FORM_BIT);
}

static uint32_t bucket_of(const struct pages *self, uint64_t parent, const uint32_t *token) {
    uint64_t hash = parent;
    for (uint32_t i = 0; i < PAGE_TOKENS; i++) {
        hash = (hash ^ token[i]) * 0x9e3779b97f4a7c15u;
        hash ^= hash >> 29;
    }
    return (uint32_t)(hash >> 32) & (self->buckets - 1);
}

static void list_tokens(const struct sequence *sequence, uint32_t index, uint32_t *ret) {
    for (uint32_t i = 0; i < PAGE_TOKENS; i++)
        ret[i] = token_of(sequence, index * PAGE_TOKENS + i);
}

static uint32_t find_known(const struct pages *self, uint64_t parent, const uint32_t *token,
                           uint32_t bucket) {
    uint32_t number = self->bucket[bucket];
    while (number != NO_PAGE && (self->page[number].parent != parent ||
                                 memcmp(self->token + (size_t)number * PAGE_TOKENS, token,
                                        PAGE_TOKENS * sizeof *token) != 0))
        number = self->page[number].chain;
    return number;
}

static void make_known(struct pages *self, uint32_t number, uint64_t parent, const uint32_t *token,
                       uint32_t bucket) {
    struct page *page = &self->page[number];
    page->serial = ++self->last_serial;
    page->parent = parent;
    memcpy(self->token + (size_t)number * PAGE_TOKENS, token, PAGE_TOKENS * sizeof *token);
    page->chain = self->bucket[bucket];
    self->bucket[bucket] = number;
}

static void forget(struct pages *self, uint32_t number) {
    struct page *page = &self->page[number];
    uint32_t *place =
        &self->bucket[bucket_of(self, page->parent, self->token + (size_t)number * PAGE_TOKENS)];
    while (*place != number)
        place = &self->page[*place].chain;
    *place = page->chain;
    page->serial = 0;
}

/* ---- holding ---- */

static void hold(struct pages *self, uint32_t number) {
    if (self->page[number].references++ == 0)
        idle_remove(self, number);
}

static void let_go(struct pages *self, uint32_t number) {
    struct page *page = &self->page[number];
    ASSERT(page->references > 0);
    if (--page->references > 0)
        return;
    if (page->serial != 0)
        idle_add(self, number);
    else
        self->free_page[self->free_pages++] = number;
}

static uint32_t take_any(struct pages *self) {
    uint32_t number;
    if (self->free_pages > 0) {
        number = self->free_page[--self->free_pages];
    } else {
        ASSERT(self->idle > 0);
        number = self->oldest;
        idle_remove(self, number);
        forget(self, number);
    }
    self->page[number].references = 1;
    return number;
}

/* ---- sequences ---- */

/* What a chain begins with: no serial number is as large. */
static uint64_t chain_begin(const struct sequence *sequence) {
    return ~sequence->bias_version;
}

uint32_t pages_find(struct attention *self, struct sequence *sequence, uint32_t *ret_idle) {
    struct pages *pages = &self->pages;
    uint64_t parent = chain_begin(sequence);
    uint32_t found = 0;
    *ret_idle = 0;
    if (self->settings.prefix_cache == 0 || sequence->score_prompt)
        return 0; /* every prompt position is asked for */
    /* the last known token is computed in any case: what follows is drawn from its row */
    while ((found + 1) * PAGE_TOKENS < sequence->tokens) {
        uint32_t token[PAGE_TOKENS];
        list_tokens(sequence, found, token);
        uint32_t number = find_known(pages, parent, token, bucket_of(pages, parent, token));
        if (number == NO_PAGE)
            break;
        parent = pages->page[number].serial;
        *ret_idle += pages->page[number].references == 0;
        sequence->page[found++] = number;
    }
    return found;
}

void pages_share(struct attention *self, struct sequence *sequence, uint32_t count) {
    struct pages *pages = &self->pages;
    ASSERT(sequence->held == 0);
    for (uint32_t i = 0; i < count; i++)
        hold(pages, sequence->page[i]);
    sequence->held = sequence->known = count;
    sequence->chain =
        count > 0 ? pages->page[sequence->page[count - 1]].serial : chain_begin(sequence);
    sequence->computed = count * PAGE_TOKENS;
    if (self->settings.prefix_cache != 0) {
        self->prefix_queries += sequence->tokens;
        self->prefix_hits += sequence->computed;
    }
}

void pages_take(struct attention *self, struct sequence *sequence, uint32_t count) {
    struct batch *batch = &self->batch;
    ASSERT(sequence->held + count <= sequence->pages);
    for (uint32_t i = 0; i < count; i++) {
        uint32_t number = take_any(&self->pages);
        struct page *page = &self->pages.page[number];
        sequence->page[sequence->held++] = number;
        if (page->cleared == self->last_batch + 1)
            continue; /* taken, given back and taken again before the batch begins */
        page->cleared = self->last_batch + 1;
        batch->clear[batch->clears++] = number;
    }
}

void pages_learn(struct attention *self, struct sequence *sequence) {
    struct pages *pages = &self->pages;
    if (self->settings.prefix_cache == 0)
        return;
    while ((sequence->known + 1) * PAGE_TOKENS <= sequence->computed) {
        uint32_t token[PAGE_TOKENS], *own = &sequence->page[sequence->known];
        list_tokens(sequence, sequence->known, token);
        uint32_t bucket = bucket_of(pages, sequence->chain, token);
        uint32_t same = find_known(pages, sequence->chain, token, bucket);
        if (same == NO_PAGE) {
            make_known(pages, *own, sequence->chain, token, bucket);
        } else { /* somebody else was first: one copy is enough */
            hold(pages, same);
            let_go(pages, *own);
            *own = same;
        }
        sequence->chain = pages->page[*own].serial;
        sequence->known++;
    }
}

void pages_drop(struct attention *self, struct sequence *sequence) {
    while (sequence->held > 0)
        let_go(&self->pages, sequence->page[--sequence->held]);
    sequence->known = 0;
}

/* ---- invariants ---- */

static const char *broken_chain(const struct pages *self, const struct sequence *sequence) {
    uint64_t parent = chain_begin(sequence);
    for (uint32_t i = 0; i < sequence->held; i++) {
        const struct page *page = &self->page[sequence->page[i]];
        if (i >= sequence->known) {
            if (page->serial != 0 || page->references != 1)
                return "a page that is written is shared";
            continue;
        }
        uint32_t token[PAGE_TOKENS];
        list_tokens(sequence, i, token);
        if (page->serial == 0 || page->parent != parent ||
            memcmp(self->token + (size_t)sequence->page[i] * PAGE_TOKENS, token, sizeof token) != 0)
            return "a known page is not what its sequence says";
        parent = page->serial;
    }
    return sequence->chain == parent ? NULL : "a chain ends elsewhere";
}

const char *pages_broken(const struct attention *self) {
    const struct pages *pages = &self->pages;
    uint64_t references = 0, named = 0;
    uint32_t idle = 0, held = 0;
    for (uint32_t i = 0; i < pages->total; i++) {
        references += pages->page[i].references;
        held += pages->page[i].references > 0;
        idle += pages->page[i].references == 0 && pages->page[i].serial != 0;
    }
    for (uint32_t i = 0; i < self->settings.max_sequences; i++) {
        const struct sequence *sequence = self->running[i];
        if (sequence == NULL)
            continue;
        named += sequence->held;
        const char *why = broken_chain(pages, sequence);
        if (why != NULL)
            return why;
    }
    if (named != references)
        return "pages are held that no sequence names";
    if (idle != pages->idle || held + idle + pages->free_pages != pages->total)
        return "pages are lost";
    return NULL;
}
