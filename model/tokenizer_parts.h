/* The parts that a tokenizer is made of, private to model/tokenizer*.c: vocabulary, merges,
 * splitting, added tokens. */
#ifndef TROUPE_TOKENIZER_PARTS_H
#define TROUPE_TOKENIZER_PARTS_H

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "actors/limits.h"
#include "model/tokenizer.h"

#define TOKEN_NONE        UINT32_MAX
#define SPLITS_MAX        16 /* pre-tokenizer stages */
#define ADDED_TOKENS_MAX  16384
#define ADDED_BYTES_MAX   1024 /* longest added token */
#define PATTERN_BYTES_MAX 16384
#define ENCODE_BYTES_MAX  (1u << 30)

enum token_flags {
    TOKEN_KNOWN = 1,
    TOKEN_LITERAL =
        2, /* its text is outside the byte-level alphabet: no bytes of a text ever become it */
    TOKEN_SPECIAL = 4,
};

struct token_entry {
    const char *bytes; /* what the token stands for in a text */
    uint32_t length;
    uint32_t flags;
};

/* Ids to bytes and, by an open-addressed hash table, bytes to ids. */
struct vocabulary {
    struct token_entry *entry;
    uint32_t entries; /* 1 + largest id */
    uint32_t *slot;   /* 1 + id; 0 is free */
    uint32_t slot_mask;
};

struct merge {
    uint64_t pair; /* left << 32 | right */
    uint32_t rank; /* TOKEN_NONE: the slot is free */
    uint32_t result;
};

struct bpe {
    uint32_t byte_token[256];
    struct merge *slot;
    uint32_t slot_mask;
    bool ignore_merges; /* a piece that is a token as a whole is not taken apart */
};

struct splitter {
    pcre2_code *stage[SPLITS_MAX];
    uint32_t stages;
    pcre2_match_context *context;
};

struct added_token {
    const char *content;
    uint32_t length, id;
};

/* Added tokens of one pass, sorted by content. Hugging Face looks for those that are matched before
 * normalization first and for the others in what is left. */
struct added_table {
    struct added_token *token;
    uint32_t count;
    bool begins[256]; /* bytes that one of them begins with */
};

enum { ADDED_RAW, ADDED_NORMALIZED, ADDED_PASSES };

struct tokenizer {
    struct vocabulary vocabulary;
    struct bpe bpe;
    struct splitter splitter;
    struct added_table added[ADDED_PASSES];
    char *text; /* every token's bytes and every added token's content */
    size_t text_bytes, text_capacity;
    int32_t bos, eos;
    bool add_bos;
    char *chat_template;
};

/* tokenizer_vocabulary.c */

/* Room for `entries` ids and `names` lookups. */
int vocabulary_create(struct vocabulary *self, uint32_t entries, uint32_t names,
                      struct failure *failure);
void vocabulary_destroy(struct vocabulary *self);
/* Makes entry `id`, which must be set, findable by its bytes; false if those bytes are there
 * already. */
bool vocabulary_index(struct vocabulary *self, uint32_t id);
/* `literal` tells which of the two kinds of tokens is meant. TOKEN_NONE if there is none. */
uint32_t vocabulary_find(const struct vocabulary *self, const char *bytes, size_t length,
                         bool literal);
/* The bytes that a text in the byte-level alphabet stands for, at most `length` of them; -1 if a
 * character is outside of the alphabet. */
int64_t byte_level_decode(const char *text, size_t length, char *ret);

/* tokenizer_bpe.c */

int bpe_create(struct bpe *self, uint32_t merges, struct failure *failure);
void bpe_destroy(struct bpe *self);
/* False if the pair has a merge already. */
bool bpe_add_merge(struct bpe *self, uint32_t left, uint32_t right, uint32_t rank, uint32_t result);

/* Working memory of one call of tokenizer_encode. */
struct bpe_scratch {
    void *memory;
    size_t bytes;
};
int bpe_encode(const struct bpe *self, const struct vocabulary *vocabulary, const char *piece,
               uint32_t length, struct bpe_scratch *scratch, struct token_list *out,
               struct failure *failure);

/* tokenizer_pattern.c */

/* An Oniguruma pattern in PCRE2's terms (malloc'd); ERR_UNSUPPORTED names what has no equal. */
int pattern_translate(const char *pattern, size_t length, char **ret, size_t *ret_length,
                      struct failure *failure);

/* tokenizer_split.c */

int splitter_add(struct splitter *self, const char *pattern, size_t length,
                 struct failure *failure);
void splitter_destroy(struct splitter *self);

typedef int (*piece_function)(void *context, const char *piece, uint32_t length,
                              struct failure *failure);
/* Calls `emit` for each piece of `text` (valid UTF-8) in order. */
int splitter_run(const struct splitter *self, const char *text, uint32_t length,
                 piece_function emit, void *context, struct failure *failure);

/* tokenizer_json.c */

/* Fills an empty tokenizer; on failure the caller destroys what is there. */
int tokenizer_read_json(struct tokenizer *self, const char *json, size_t bytes,
                        struct failure *failure);
int tokenizer_read_config(struct tokenizer *self, const char *json, size_t bytes,
                          struct failure *failure);

/* tokenizer.c */

/* At most `most` bytes of a text, no character cut in two: for "%.*s" in messages. */
int clip(const char *text, size_t length, size_t most);
/* The added token that is `content`; TOKEN_NONE if there is none. */
uint32_t added_find(const struct tokenizer *self, const char *content, size_t length);

#endif
