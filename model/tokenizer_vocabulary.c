/* The vocabulary: ids to bytes, bytes to ids, and GPT-2's byte-level alphabet, in which
 * tokenizer.json writes bytes as characters. */
#include "model/tokenizer_parts.h"

#include <stdlib.h>
#include <string.h>

int vocabulary_create(struct vocabulary *self, uint32_t entries, uint32_t names,
                      struct failure *failure) {
    ASSERT(entries <= VOCABULARY_MAX && names <= VOCABULARY_MAX);
    uint32_t slots = 16;
    while (slots < 2 * names)
        slots *= 2;
    self->entry = calloc(entries > 0 ? entries : 1, sizeof *self->entry);
    self->slot = calloc(slots, sizeof *self->slot);
    self->entries = entries;
    self->slot_mask = slots - 1;
    if (self->entry == NULL || self->slot == NULL)
        return fail(failure, ERR_NO_MEMORY, "no memory for a vocabulary of %u tokens", entries);
    return 0;
}

void vocabulary_destroy(struct vocabulary *self) {
    free(self->entry);
    free(self->slot);
    *self = (struct vocabulary){0};
}

static uint32_t hash_bytes(const char *bytes, size_t length) {
    uint64_t hash = 0xcbf29ce484222325u;
    for (size_t i = 0; i < length; i++)
        hash = (hash ^ (unsigned char)bytes[i]) * 0x100000001b3u;
    return (uint32_t)(hash ^ (hash >> 32));
}

/* The slot that holds the token, or the free one where it would go. */
static uint32_t *find_slot(const struct vocabulary *self, const char *bytes, size_t length,
                           bool literal) {
    for (uint32_t at = hash_bytes(bytes, length);; at++) {
        uint32_t *slot = &self->slot[at & self->slot_mask];
        if (*slot == 0)
            return slot;
        const struct token_entry *entry = &self->entry[*slot - 1];
        if (entry->length == length && ((entry->flags & TOKEN_LITERAL) != 0) == literal &&
            memcmp(entry->bytes, bytes, length) == 0)
            return slot;
    }
}

bool vocabulary_index(struct vocabulary *self, uint32_t id) {
    const struct token_entry *entry = &self->entry[id];
    uint32_t *slot =
        find_slot(self, entry->bytes, entry->length, (entry->flags & TOKEN_LITERAL) != 0);
    if (*slot != 0)
        return false;
    *slot = id + 1;
    return true;
}

uint32_t vocabulary_find(const struct vocabulary *self, const char *bytes, size_t length,
                         bool literal) {
    return *find_slot(self, bytes, length, literal) - 1; /* free: 0 - 1 is TOKEN_NONE */
}

/* Printable Latin-1 stands for itself; the other 68 bytes, in order, are U+0100 to U+0143. */
static int byte_of(uint32_t character) {
    if ((character >= 0x21 && character <= 0x7e) || (character >= 0xa1 && character <= 0xac) ||
        (character >= 0xae && character <= 0xff))
        return (int)character;
    if (character < 0x100 || character > 0x143)
        return -1;
    uint32_t index = character - 0x100;
    if (index <= 0x20)
        return (int)index;
    if (index <= 0x42)
        return (int)(0x7f + (index - 0x21));
    return 0xad;
}

int64_t byte_level_decode(const char *text, size_t length, char *ret) {
    int64_t count = 0;
    for (size_t at = 0; at < length; at++) {
        uint32_t character = (unsigned char)text[at];
        if (character >= 0x80) { /* the alphabet ends before U+0800, where three bytes begin */
            if (character >= 0xe0 || at + 1 == length)
                return -1;
            character = (character & 0x1f) << 6 | ((unsigned char)text[++at] & 0x3f);
        }
        int byte = byte_of(character);
        if (byte < 0)
            return -1;
        ret[count++] = (char)byte;
    }
    return count;
}
