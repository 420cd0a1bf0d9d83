/* Encoding: added tokens are cut out first, what is left is split into pieces, and each piece goes
 * through byte pair encoding. A tokenizer is immutable once open, so any number of threads may
 * share it. */
#include "model/tokenizer_parts.h"

#include <stdlib.h>
#include <string.h>

int tokenizer_open(struct tokenizer **ret, const char *tokenizer_json, size_t json_bytes,
                   const char *config_json, size_t config_bytes, struct failure *failure) {
    struct tokenizer *self = calloc(1, sizeof *self);
    if (self == NULL)
        return fail(failure, ERR_NO_MEMORY, "no memory for a tokenizer");
    self->bos = self->eos = -1;
    int code = tokenizer_read_json(self, tokenizer_json, json_bytes, failure);
    if (code == 0 && config_json != NULL)
        code = tokenizer_read_config(self, config_json, config_bytes, failure);
    if (code < 0) {
        tokenizer_close(&self);
        return code;
    }
    *ret = self;
    return 0;
}

void tokenizer_close(struct tokenizer **self) {
    if (*self == NULL)
        return;
    vocabulary_destroy(&(*self)->vocabulary);
    bpe_destroy(&(*self)->bpe);
    splitter_destroy(&(*self)->splitter);
    for (int pass = 0; pass < ADDED_PASSES; pass++)
        free((*self)->added[pass].token);
    free((*self)->text);
    free((*self)->chat_template);
    free(*self);
    *self = NULL;
}

void token_list_free(struct token_list *self) {
    free(self->token);
    *self = (struct token_list){0};
}

int token_list_append(struct token_list *self, uint32_t token, struct failure *failure) {
    if (self->count == self->capacity) {
        uint32_t capacity;
        size_t bytes;
        if (__builtin_mul_overflow(self->capacity, 2u, &capacity) ||
            __builtin_mul_overflow((size_t)capacity, sizeof *self->token, &bytes))
            return fail(failure, ERR_TOO_LARGE, "more than %u tokens", self->count);
        if (capacity == 0) {
            capacity = 64;
            bytes = capacity * sizeof *self->token;
        }
        uint32_t *grown = realloc(self->token, bytes);
        if (grown == NULL)
            return fail(failure, ERR_NO_MEMORY, "no memory for %u tokens", capacity);
        self->token = grown;
        self->capacity = capacity;
    }
    self->token[self->count++] = token;
    return 0;
}

int clip(const char *text, size_t length, size_t most) {
    if (length <= most)
        return (int)length;
    while (most > 0 && ((unsigned char)text[most] & 0xc0) == 0x80)
        most--;
    return (int)most;
}

/* Bytes of the longest added token that `text` begins with, 0 if none. The sorted table is narrowed
 * byte by byte. */
static uint32_t match_added(const struct added_table *table, const char *text, size_t length,
                            uint32_t *ret_token) {
    uint32_t low = 0, high = table->count, found = 0;
    for (uint32_t depth = 0; low < high && depth < length; depth++) {
        unsigned char byte = (unsigned char)text[depth];
        uint32_t bounds[2];
        for (int i = 0; i < 2; i++) { /* first with a byte >= `byte`, first with one > `byte` */
            uint32_t from = low, to = high;
            while (from < to) {
                uint32_t middle = from + (to - from) / 2;
                const struct added_token *token = &table->token[middle];
                int here = token->length > depth ? (unsigned char)token->content[depth] : -1;
                if (here < byte + i)
                    from = middle + 1;
                else
                    to = middle;
            }
            bounds[i] = from;
        }
        low = bounds[0];
        high = bounds[1];
        if (low < high && table->token[low].length == depth + 1) { /* the shortest is first */
            found = depth + 1;
            *ret_token = table->token[low].id;
        }
    }
    return found;
}

uint32_t added_find(const struct tokenizer *self, const char *content, size_t length) {
    for (int pass = 0; pass < ADDED_PASSES; pass++) {
        uint32_t token;
        if (length > 0 && match_added(&self->added[pass], content, length, &token) == length)
            return token;
    }
    return TOKEN_NONE;
}

/* The offset of the first byte that is not part of valid UTF-8; `length` if all is well. */
static size_t find_invalid(const char *text, size_t length) {
    const unsigned char *byte = (const unsigned char *)text;
    size_t at = 0;
    while (at < length) {
        if (byte[at] < 0x80) {
            at++;
            continue;
        }
        size_t more = byte[at] >= 0xf0 ? 3 : byte[at] >= 0xe0 ? 2 : 1;
        if (byte[at] < 0xc2 || byte[at] > 0xf4 || length - at <= more)
            return at;
        unsigned char low = byte[at] == 0xe0 ? 0xa0 : byte[at] == 0xf0 ? 0x90 : 0x80;
        unsigned char high = byte[at] == 0xed ? 0x9f : byte[at] == 0xf4 ? 0x8f : 0xbf;
        if (byte[at + 1] < low || byte[at + 1] > high)
            return at;
        for (size_t i = 2; i <= more; i++)
            if ((byte[at + i] & 0xc0) != 0x80)
                return at;
        at += 1 + more;
    }
    return at;
}

struct encoding {
    const struct tokenizer *tokenizer;
    struct token_list *out;
    struct bpe_scratch scratch;
};

static int encode_piece(void *context, const char *piece, uint32_t length,
                        struct failure *failure) {
    struct encoding *encoding = context;
    const struct tokenizer *self = encoding->tokenizer;
    return bpe_encode(&self->bpe, &self->vocabulary, piece, length, &encoding->scratch,
                      encoding->out, failure);
}

/* Text in which the added tokens of the passes before `pass` have been cut out. */
static int encode_text(struct encoding *encoding, int pass, const char *text, uint32_t length,
                       struct failure *failure) {
    const struct tokenizer *self = encoding->tokenizer;
    if (length == 0)
        return 0;
    if (pass == ADDED_PASSES)
        return splitter_run(&self->splitter, text, length, encode_piece, encoding, failure);
    const struct added_table *table = &self->added[pass];
    uint32_t done = 0, at = 0;
    while (at < length) {
        uint32_t token = TOKEN_NONE, matched = 0;
        if (table->begins[(unsigned char)text[at]])
            matched = match_added(table, text + at, length - at, &token);
        if (matched == 0) {
            at++;
            continue;
        }
        int code = encode_text(encoding, pass + 1, text + done, at - done, failure);
        if (code == 0)
            code = token_list_append(encoding->out, token, failure);
        if (code < 0)
            return code;
        at += matched;
        done = at;
    }
    return encode_text(encoding, pass + 1, text + done, length - done, failure);
}

static bool begins_with(const char *text, size_t length, const struct token_entry *token) {
    return length >= token->length && memcmp(text, token->bytes, token->length) == 0;
}

int tokenizer_encode(const struct tokenizer *self, const char *text, size_t bytes, bool add_bos,
                     bool allow_special, struct token_list *out, struct failure *failure) {
    if (bytes > ENCODE_BYTES_MAX)
        return fail(failure, ERR_TOO_LARGE, "expected at most %u bytes of text, found %zu",
                    ENCODE_BYTES_MAX, bytes);
    size_t invalid = find_invalid(text, bytes);
    if (invalid < bytes)
        return fail(failure, ERR_INVALID, "the text is not valid UTF-8: byte 0x%02x at offset %zu",
                    (unsigned char)text[invalid], invalid);
    struct encoding encoding = {self, out, {NULL, 0}};
    uint32_t before = out->count;
    int code = 0;
    if (add_bos && self->add_bos &&
        !(allow_special && begins_with(text, bytes, &self->vocabulary.entry[self->bos])))
        code = token_list_append(out, (uint32_t)self->bos, failure);
    if (code == 0)
        code = encode_text(&encoding, allow_special ? 0 : ADDED_PASSES, text, (uint32_t)bytes,
                           failure);
    free(encoding.scratch.memory);
    if (code < 0)
        out->count = before;
    return code;
}

const char *tokenizer_bytes(const struct tokenizer *self, uint32_t token, size_t *ret_bytes) {
    if (token >= self->vocabulary.entries || !(self->vocabulary.entry[token].flags & TOKEN_KNOWN))
        return NULL;
    *ret_bytes = self->vocabulary.entry[token].length;
    return self->vocabulary.entry[token].bytes;
}

bool tokenizer_is_special(const struct tokenizer *self, uint32_t token) {
    return token < self->vocabulary.entries &&
           (self->vocabulary.entry[token].flags & TOKEN_SPECIAL);
}

uint32_t tokenizer_vocabulary(const struct tokenizer *self) {
    return self->vocabulary.entries;
}

int64_t tokenizer_find(const struct tokenizer *self, const char *content) {
    size_t length = strlen(content);
    uint32_t token = added_find(self, content, length);
    if (token == TOKEN_NONE)
        token = vocabulary_find(&self->vocabulary, content, length, true);
    if (token == TOKEN_NONE)
        token = vocabulary_find(&self->vocabulary, content, length, false);
    return token == TOKEN_NONE ? -1 : (int64_t)token;
}

int32_t tokenizer_bos(const struct tokenizer *self) {
    return self->bos;
}

int32_t tokenizer_eos(const struct tokenizer *self) {
    return self->eos;
}

bool tokenizer_adds_bos(const struct tokenizer *self) {
    return self->add_bos;
}

const char *tokenizer_chat_template(const struct tokenizer *self) {
    return self->chat_template;
}
