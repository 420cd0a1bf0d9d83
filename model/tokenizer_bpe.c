/* Byte pair encoding of one piece: the pair of lowest rank, leftmost first, is merged until no pair
 * has a merge. A heap of pairs over a linked list of symbols makes that O(n log n), so a piece of a
 * megabyte is no trap. */
#include "model/tokenizer_parts.h"

#include <stdlib.h>
#include <string.h>

int bpe_create(struct bpe *self, uint32_t merges, struct failure *failure) {
    ASSERT(merges <= VOCABULARY_MAX);
    uint32_t slots = 16;
    while (slots < 2 * merges)
        slots *= 2;
    self->slot = malloc(slots * sizeof *self->slot);
    self->slot_mask = slots - 1;
    if (self->slot == NULL)
        return fail(failure, ERR_NO_MEMORY, "no memory for %u merges", merges);
    for (uint32_t i = 0; i < slots; i++)
        self->slot[i] = (struct merge){.rank = TOKEN_NONE};
    return 0;
}

void bpe_destroy(struct bpe *self) {
    free(self->slot);
    *self = (struct bpe){0};
}

static struct merge *find_slot(const struct bpe *self, uint32_t left, uint32_t right) {
    uint64_t pair = (uint64_t)left << 32 | right;
    uint64_t hash = pair * 0x9e3779b97f4a7c15u;
    for (uint32_t at = (uint32_t)(hash >> 32);; at++) {
        struct merge *slot = &self->slot[at & self->slot_mask];
        if (slot->rank == TOKEN_NONE || slot->pair == pair)
            return slot;
    }
}

bool bpe_add_merge(struct bpe *self, uint32_t left, uint32_t right, uint32_t rank,
                   uint32_t result) {
    struct merge *slot = find_slot(self, left, right);
    if (slot->rank != TOKEN_NONE)
        return false;
    *slot = (struct merge){(uint64_t)left << 32 | right, rank, result};
    return true;
}

/* A symbol of the piece: a token that covers one or more bytes. */
struct symbol {
    uint32_t token;
    uint32_t previous, next; /* TOKEN_NONE at the ends */
    uint32_t rank, result;   /* of the merge with `next`; TOKEN_NONE if there is none */
};

/* A binary heap of rank << 32 | symbol. Entries go stale when a symbol changes; they are told by
 * their rank. */
struct heap {
    uint64_t *entry;
    size_t count;
};

static void heap_push(struct heap *self, uint64_t entry) {
    size_t at = self->count++;
    while (at > 0 && self->entry[(at - 1) / 2] > entry) {
        self->entry[at] = self->entry[(at - 1) / 2];
        at = (at - 1) / 2;
    }
    self->entry[at] = entry;
}

static uint64_t heap_pop(struct heap *self) {
    uint64_t top = self->entry[0], last = self->entry[--self->count];
    size_t at = 0;
    for (size_t child; (child = 2 * at + 1) < self->count; at = child) {
        if (child + 1 < self->count && self->entry[child + 1] < self->entry[child])
            child++;
        if (self->entry[child] >= last)
            break;
        self->entry[at] = self->entry[child];
    }
    self->entry[at] = last;
    return top;
}

static void find_merge(const struct bpe *self, struct symbol *symbols, uint32_t at,
                       struct heap *heap) {
    struct symbol *symbol = &symbols[at];
    symbol->rank = TOKEN_NONE;
    if (symbol->next == TOKEN_NONE)
        return;
    const struct merge *merge = find_slot(self, symbol->token, symbols[symbol->next].token);
    if (merge->rank == TOKEN_NONE)
        return;
    symbol->rank = merge->rank;
    symbol->result = merge->result;
    heap_push(heap, (uint64_t)merge->rank << 32 | at);
}

/* A piece of n bytes has at most n symbols, n - 1 pairs at first and two new pairs after each of at
 * most n - 1 merges. */
static int reserve(struct bpe_scratch *scratch, uint32_t length, struct symbol **ret_symbols,
                   struct heap *ret_heap, struct failure *failure) {
    size_t bytes = length * (sizeof(struct symbol) + 3 * sizeof(uint64_t));
    if (bytes > scratch->bytes) {
        bytes = bytes < 16384 ? 16384 : bytes;
        free(scratch->memory);
        scratch->bytes = 0;
        scratch->memory = malloc(bytes);
        if (scratch->memory == NULL)
            return fail(failure, ERR_NO_MEMORY, "no memory to encode a word of %u bytes", length);
        scratch->bytes = bytes;
    }
    ret_heap->entry = scratch->memory;
    ret_heap->count = 0;
    *ret_symbols = (struct symbol *)(ret_heap->entry + 3 * (size_t)length);
    return 0;
}

int bpe_encode(const struct bpe *self, const struct vocabulary *vocabulary, const char *piece,
               uint32_t length, struct bpe_scratch *scratch, struct token_list *out,
               struct failure *failure) {
    ASSERT(length > 0 && length <= ENCODE_BYTES_MAX);
    if (self->ignore_merges) {
        uint32_t whole = vocabulary_find(vocabulary, piece, length, false);
        if (whole != TOKEN_NONE)
            return token_list_append(out, whole, failure);
    }
    struct symbol *symbols = NULL;
    struct heap heap = {0};
    int code = reserve(scratch, length, &symbols, &heap, failure);
    if (code < 0)
        return code;
    for (uint32_t i = 0; i < length; i++)
        symbols[i] = (struct symbol){.token = self->byte_token[(unsigned char)piece[i]],
                                     .previous = i > 0 ? i - 1 : TOKEN_NONE,
                                     .next = i + 1 < length ? i + 1 : TOKEN_NONE};
    for (uint32_t i = 0; i < length; i++)
        find_merge(self, symbols, i, &heap);
    while (heap.count > 0) {
        uint64_t top = heap_pop(&heap);
        uint32_t at = (uint32_t)top;
        struct symbol *left = &symbols[at];
        if (left->rank != (uint32_t)(top >> 32))
            continue;
        struct symbol *right = &symbols[left->next];
        left->token = left->result;
        left->next = right->next;
        right->rank = TOKEN_NONE;
        if (left->next != TOKEN_NONE)
            symbols[left->next].previous = at;
        find_merge(self, symbols, at, &heap);
        if (left->previous != TOKEN_NONE)
            find_merge(self, symbols, left->previous, &heap);
    }
    for (uint32_t at = 0; at != TOKEN_NONE; at = symbols[at].next) {
        code = token_list_append(out, symbols[at].token, failure);
        if (code < 0)
            return code;
    }
    return 0;
}
