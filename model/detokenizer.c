/* Streaming decode: tokens cut characters anywhere, clients want whole ones. What cannot become a
 * character any more is replaced, one U+FFFD for each maximal part of an invalid sequence, as
 * Python's errors="replace" does. */
#include "model/tokenizer.h"

#include <string.h>

/* Bytes of the character that begins with `lead`; 0 if none does. */
static unsigned character_bytes(uint8_t lead) {
    if (lead < 0x80)
        return 1;
    if (lead < 0xc2 || lead > 0xf4)
        return 0;
    return lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
}

/* May `byte` follow the pending ones? Second bytes are narrower where they would give a surrogate,
 * a number beyond U+10FFFF or a longer form than needed. */
static bool may_follow(const uint8_t *pending, unsigned pending_bytes, uint8_t byte) {
    uint8_t low = 0x80, high = 0xbf;
    if (pending_bytes == 1) {
        low = pending[0] == 0xe0 ? 0xa0 : pending[0] == 0xf0 ? 0x90 : 0x80;
        high = pending[0] == 0xed ? 0x9f : pending[0] == 0xf4 ? 0x8f : 0xbf;
    }
    return byte >= low && byte <= high;
}

static size_t put_replacement(char *ret) {
    memcpy(ret, "\xef\xbf\xbd", 3);
    return 3;
}

/* One byte in; the bytes that became certain by it out: at most a replacement and one more
 * character. */
static size_t push_byte(struct detokenizer *self, uint8_t byte, char *ret) {
    size_t written = 0;
    if (self->pending_bytes > 0) {
        if (may_follow(self->pending, self->pending_bytes, byte)) {
            self->pending[self->pending_bytes++] = byte;
            if (self->pending_bytes < character_bytes(self->pending[0]))
                return 0;
            written = self->pending_bytes;
            memcpy(ret, self->pending, written);
            self->pending_bytes = 0;
            return written;
        }
        written = put_replacement(ret);
        self->pending_bytes = 0;
    }
    switch (character_bytes(byte)) {
    case 0:
        return written + put_replacement(ret + written);
    case 1:
        ret[written] = (char)byte;
        return written + 1;
    default:
        self->pending[self->pending_bytes++] = byte;
        return written;
    }
}

void detokenizer_init(struct detokenizer *self, bool skip_special) {
    *self = (struct detokenizer){.skip_special = skip_special};
}

size_t detokenizer_room(const struct tokenizer *tokenizer, uint32_t token) {
    size_t bytes = 0;
    if (token != UINT32_MAX)
        tokenizer_bytes(tokenizer, token, &bytes);
    return 3 * (bytes + sizeof((struct detokenizer *)NULL)->pending);
}

size_t detokenizer_push(struct detokenizer *self, const struct tokenizer *tokenizer, uint32_t token,
                        char *ret_text, size_t capacity) {
    ASSERT(capacity >= detokenizer_room(tokenizer, token));
    if (token == UINT32_MAX) {
        size_t written = self->pending_bytes > 0 ? put_replacement(ret_text) : 0;
        self->pending_bytes = 0;
        return written;
    }
    size_t bytes = 0, written = 0;
    const char *text = tokenizer_bytes(tokenizer, token, &bytes);
    if (text == NULL || (self->skip_special && tokenizer_is_special(tokenizer, token)))
        return 0;
    for (size_t i = 0; i < bytes; i++)
        written += push_byte(self, (uint8_t)text[i], ret_text + written);
    return written;
}
