/* Byte-level BPE as tokenizer.json declares it, token for token what Hugging Face `tokenizers` gives. Pure. */
#ifndef TROUPE_TOKENIZER_H
#define TROUPE_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "actors/errors.h"

struct tokenizer;

/* tokenizer_config may be NULL. Components that are not known (normalizers, pre-tokenizers, models, decoders) are refused by name. */
int tokenizer_open(struct tokenizer **ret, const char *tokenizer_json, size_t tokenizer_bytes,
                   const char *config_json, size_t config_bytes, struct failure *failure);
void tokenizer_close(struct tokenizer **self);

struct token_list {
    uint32_t *token;
    uint32_t count, capacity;
};
int token_list_append(struct token_list *self, uint32_t token, struct failure *failure);
void token_list_free(struct token_list *self);

/* Appends the tokens of `text` (valid UTF-8, else ERR_INVALID naming the byte offset). add_bos: begin with the bos token if
 * tokenizer_config.json asks for it (add_bos_token) and the text does not begin with it already. Added tokens in the text are recognised
 * (allow_special) or treated as plain text. */
int tokenizer_encode(const struct tokenizer *self, const char *text, size_t bytes, bool add_bos,
                     bool allow_special, struct token_list *out, struct failure *failure);

/* The raw bytes of a token (not necessarily whole UTF-8 characters); NULL if the id is unknown. */
const char *tokenizer_bytes(const struct tokenizer *self, uint32_t token, size_t *ret_bytes);
bool tokenizer_is_special(const struct tokenizer *self, uint32_t token);
uint32_t tokenizer_vocabulary(const struct tokenizer *self); /* 1 + largest id */
int64_t tokenizer_find(const struct tokenizer *self, const char *content); /* added or plain token; -1 */
int32_t tokenizer_bos(const struct tokenizer *self);
int32_t tokenizer_eos(const struct tokenizer *self);
bool tokenizer_adds_bos(const struct tokenizer *self);
const char *tokenizer_chat_template(const struct tokenizer *self); /* NULL if none */

/* Streaming decode: bytes come out only as whole UTF-8 characters; invalid sequences become U+FFFD as in Python's errors="replace"
 * once it is certain that they are invalid. */
struct detokenizer {
    uint8_t pending[4];
    uint8_t pending_bytes;
    bool skip_special;
};
void detokenizer_init(struct detokenizer *self, bool skip_special);
/* Writes at most *capacity* bytes (needs 3 * (token bytes + 4)); returns bytes written. token UINT32_MAX: flush at the end. */
size_t detokenizer_push(struct detokenizer *self, const struct tokenizer *tokenizer, uint32_t token,
                        char *ret_text, size_t capacity);
size_t detokenizer_room(const struct tokenizer *tokenizer, uint32_t token);

#endif
