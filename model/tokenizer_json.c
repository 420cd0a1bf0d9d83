/* Reads tokenizer.json and tokenizer_config.json. Every component is either one we know to the
 * letter or refused by name: a tokenizer that is almost right gives plausible nonsense. */
#include "model/tokenizer_parts.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>

/* GPT-2's own split, which ByteLevel applies when use_regex is true. */
static const char gpt2_pattern[] =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

/* jansson's parser recurses; what is deeper than we allow never reaches it. */
static bool too_deep(const char *json, size_t bytes) {
    size_t depth = 0;
    bool in_string = false;
    for (size_t i = 0; i < bytes; i++) {
        char c = json[i];
        if (in_string) {
            if (c == '\\')
                i++;
            else if (c == '"')
                in_string = false;
        } else if (c == '"')
            in_string = true;
        else if (c == '[' || c == '{') {
            if (++depth > JSON_DEPTH_MAX)
                return true;
        } else if ((c == ']' || c == '}') && depth > 0)
            depth--;
    }
    return false;
}

static int load(const char *name, const char *json, size_t bytes, json_t **ret,
                struct failure *failure) {
    if (bytes > JSON_FILE_MAX)
        return fail(failure, ERR_TOO_LARGE, "%s: expected at most %u bytes, found %zu", name,
                    JSON_FILE_MAX, bytes);
    if (too_deep(json, bytes))
        return fail(failure, ERR_TOO_LARGE, "%s: nested deeper than %d", name, JSON_DEPTH_MAX);
    json_error_t error;
    *ret = json_loadb(json, bytes, JSON_REJECT_DUPLICATES, &error);
    if (*ret == NULL)
        return fail(failure, ERR_INVALID, "%s: not JSON: %s (line %d)", name, error.text,
                    error.line);
    if (json_is_object(*ret))
        return 0;
    json_decref(*ret);
    *ret = NULL;
    return fail(failure, ERR_INVALID, "%s: expected a JSON object", name);
}

/* The "type" of a component: "" if the component is null or absent, NULL (and a failure) if it is
 * none. */
static const char *type_of(const json_t *component, const char *name, struct failure *failure) {
    if (component == NULL || json_is_null(component))
        return "";
    const char *type = json_string_value(json_object_get(component, "type"));
    if (type == NULL)
        fail(failure, ERR_INVALID, "tokenizer.json: %s: expected an object with a \"type\"", name);
    return type;
}

static int unknown(const char *name, const char *type, const char *known, struct failure *failure) {
    return fail(failure, ERR_UNSUPPORTED, "tokenizer.json: %s: expected %s, found \"%.*s\"", name,
                known, clip(type, strlen(type), 64), type);
}

/* null, "", 0 and false all say that a feature is off. */
static bool is_off(const json_t *value) {
    return value == NULL || json_is_null(value) || json_is_false(value) ||
           (json_is_string(value) && json_string_length(value) == 0) ||
           (json_is_number(value) && json_number_value(value) == 0);
}

/* Refuses an object in which one of `names` is switched on. */
static int expect_off(const json_t *object, const char *where, const char *const *names,
                      struct failure *failure) {
    for (; *names != NULL; names++)
        if (!is_off(json_object_get(object, *names)))
            return fail(failure, ERR_UNSUPPORTED,
                        "tokenizer.json: %s: \"%s\" is not supported; expected it off", where,
                        *names);
    return 0;
}

static int read_normalizer(const json_t *component, struct failure *failure) {
    const char *type = type_of(component, "normalizer", failure);
    if (type == NULL)
        return ERR_INVALID;
    if (*type == 0)
        return 0;
    if (strcmp(type, "Sequence") != 0)
        return unknown("normalizer", type, "none", failure);
    size_t i;
    const json_t *part;
    json_array_foreach(json_object_get(component, "normalizers"), i, part) {
        int code = read_normalizer(part, failure);
        if (code < 0)
            return code;
    }
    return 0;
}

static int read_split(struct tokenizer *self, const json_t *component, struct failure *failure) {
    static const char *const off[] = {"invert", NULL};
    int code = expect_off(component, "Split", off, failure);
    if (code < 0)
        return code;
    const char *behavior = json_string_value(json_object_get(component, "behavior"));
    if (behavior == NULL || strcmp(behavior, "Isolated") != 0)
        return unknown("Split behavior", behavior != NULL ? behavior : "", "\"Isolated\"", failure);
    const json_t *pattern = json_object_get(json_object_get(component, "pattern"), "Regex");
    if (!json_is_string(pattern))
        return fail(failure, ERR_UNSUPPORTED,
                    "tokenizer.json: Split: expected a pattern \"Regex\"");
    return splitter_add(&self->splitter, json_string_value(pattern), json_string_length(pattern),
                        failure);
}

static int read_pre_tokenizer(struct tokenizer *self, const json_t *component, bool *byte_level,
                              struct failure *failure) {
    const char *type = type_of(component, "pre_tokenizer", failure);
    if (type == NULL)
        return ERR_INVALID;
    if (*byte_level)
        return unknown("pre_tokenizer", type, "nothing after ByteLevel", failure);
    if (strcmp(type, "Sequence") == 0) {
        size_t i;
        const json_t *part;
        json_array_foreach(json_object_get(component, "pretokenizers"), i, part) {
            int code = read_pre_tokenizer(self, part, byte_level, failure);
            if (code < 0)
                return code;
        }
        return 0;
    }
    if (strcmp(type, "Split") == 0)
        return read_split(self, component, failure);
    if (strcmp(type, "Digits") == 0) {
        const char *pattern =
            json_is_true(json_object_get(component, "individual_digits")) ? "\\p{N}" : "\\p{N}+";
        return splitter_add(&self->splitter, pattern, strlen(pattern), failure);
    }
    if (strcmp(type, "ByteLevel") == 0) {
        static const char *const off[] = {"add_prefix_space", NULL};
        *byte_level = true;
        const json_t *use_regex = json_object_get(component, "use_regex"); /* absent: true */
        if (use_regex == NULL || json_is_true(use_regex)) {
            int code = splitter_add(&self->splitter, gpt2_pattern, strlen(gpt2_pattern), failure);
            if (code < 0)
                return code;
        }
        return expect_off(component, "ByteLevel", off, failure);
    }
    return unknown("pre_tokenizer", type, "Sequence, Split, Digits or ByteLevel", failure);
}

/* What it adds (bos) is said by tokenizer_config.json; here it must only be of a kind that adds
 * nothing else. */
static int read_post_processor(const json_t *component, struct failure *failure) {
    const char *type = type_of(component, "post_processor", failure);
    if (type == NULL)
        return ERR_INVALID;
    if (strcmp(type, "Sequence") == 0) {
        size_t i;
        const json_t *part;
        json_array_foreach(json_object_get(component, "processors"), i, part) {
            int code = read_post_processor(part, failure);
            if (code < 0)
                return code;
        }
        return 0;
    }
    if (*type == 0 || strcmp(type, "ByteLevel") == 0 || strcmp(type, "TemplateProcessing") == 0)
        return 0;
    return unknown("post_processor", type, "ByteLevel or TemplateProcessing", failure);
}

static int read_decoder(const json_t *component, struct failure *failure) {
    const char *type = type_of(component, "decoder", failure);
    if (type == NULL)
        return ERR_INVALID;
    if (strcmp(type, "ByteLevel") == 0)
        return 0;
    const json_t *parts = json_object_get(component, "decoders");
    if (strcmp(type, "Sequence") == 0 && json_array_size(parts) == 1)
        return read_decoder(json_array_get(parts, 0), failure);
    return unknown("decoder", type, "\"ByteLevel\"", failure);
}

/* An id, or -1 and a failure. */
static int64_t read_id(const json_t *value, const char *name, struct failure *failure) {
    if (!json_is_integer(value) || json_integer_value(value) < 0 ||
        json_integer_value(value) >= VOCABULARY_MAX) {
        fail(failure, ERR_INVALID,
             "tokenizer.json: \"%.*s\": expected an id from 0 to %d, found %lld",
             clip(name, strlen(name), 64), name, VOCABULARY_MAX - 1,
             json_is_integer(value) ? (long long)json_integer_value(value) : -1LL);
        return -1;
    }
    return json_integer_value(value);
}

/* Largest id and bytes of text of the vocabulary and the added tokens, so that one allocation holds
 * each. */
static int measure(const json_t *vocab, const json_t *added, uint32_t *ret_entries,
                   size_t *ret_bytes, struct failure *failure) {
    int64_t largest = -1;
    size_t bytes = 0;
    const char *name;
    json_t *value;
    json_object_foreach((json_t *)vocab, name, value) {
        int64_t id = read_id(value, name, failure);
        if (id < 0)
            return ERR_INVALID;
        largest = id > largest ? id : largest;
        bytes += strlen(name);
    }
    size_t i;
    json_array_foreach(added, i, value) {
        const char *content = json_string_value(json_object_get(value, "content"));
        if (content == NULL || *content == 0 || strlen(content) > ADDED_BYTES_MAX)
            return fail(failure, ERR_INVALID,
                        "tokenizer.json: added token %zu: expected a \"content\" of 1 to %d bytes",
                        i, ADDED_BYTES_MAX);
        int64_t id = read_id(json_object_get(value, "id"), content, failure);
        if (id < 0)
            return ERR_INVALID;
        largest = id > largest ? id : largest;
        bytes += 2 * strlen(content); /* as it is matched and as it is decoded */
    }
    if (largest < 0)
        return fail(failure, ERR_INVALID, "tokenizer.json: the vocabulary is empty");
    *ret_entries = (uint32_t)largest + 1;
    *ret_bytes = bytes;
    return 0;
}

static char *reserve_text(struct tokenizer *self, size_t bytes) {
    ASSERT(bytes <= self->text_capacity - self->text_bytes); /* as measured */
    char *text = self->text + self->text_bytes;
    self->text_bytes += bytes;
    return text;
}

/* Sets entry `id` to what `name`, in the byte-level alphabet, stands for; a name outside of it
 * stands for itself. */
static void set_entry(struct tokenizer *self, uint32_t id, const char *name, size_t length) {
    char *bytes = self->text + self->text_bytes;
    int64_t decoded = byte_level_decode(name, length, bytes);
    uint32_t flags = TOKEN_KNOWN;
    if (decoded < 0) {
        memcpy(bytes, name, length);
        decoded = (int64_t)length;
        flags |= TOKEN_LITERAL;
    }
    reserve_text(self, (size_t)decoded);
    self->vocabulary.entry[id] = (struct token_entry){bytes, (uint32_t)decoded, flags};
}

static int read_vocabulary(struct tokenizer *self, const json_t *vocab, struct failure *failure) {
    const char *name;
    json_t *value;
    json_object_foreach((json_t *)vocab, name, value) {
        uint32_t id = (uint32_t)json_integer_value(value);
        size_t length = strlen(name);
        const struct token_entry *entry = &self->vocabulary.entry[id];
        if (entry->flags & TOKEN_KNOWN)
            return fail(failure, ERR_CORRUPT,
                        "tokenizer.json: id %u is given twice, to \"%.*s\" too", id,
                        clip(name, length, 64), name);
        set_entry(self, id, name, length);
        if (length == 0 || !vocabulary_index(&self->vocabulary, id))
            return fail(failure, ERR_CORRUPT,
                        "tokenizer.json: token %u stands for nothing of its own", id);
    }
    for (int byte = 0; byte < 256; byte++) {
        char text = (char)byte;
        self->bpe.byte_token[byte] = vocabulary_find(&self->vocabulary, &text, 1, false);
        if (self->bpe.byte_token[byte] == TOKEN_NONE)
            return fail(
                failure, ERR_INVALID,
                "tokenizer.json: expected a byte-level vocabulary, found no token for byte 0x%02x",
                byte);
    }
    return 0;
}

/* The token of one side of a merge. */
static uint32_t find_side(const struct tokenizer *self, const char *side, size_t length,
                          char *buffer, size_t capacity, int64_t *ret_bytes) {
    if (length == 0 || length > capacity)
        return TOKEN_NONE;
    *ret_bytes = byte_level_decode(side, length, buffer);
    if (*ret_bytes < 0)
        return TOKEN_NONE;
    return vocabulary_find(&self->vocabulary, buffer, (size_t)*ret_bytes, false);
}

/* One merge: "a b" or ["a", "b"]. */
static int read_merge(struct tokenizer *self, const json_t *merge, uint32_t rank,
                      struct failure *failure) {
    const char *left = json_string_value(merge), *right = NULL;
    size_t left_length = 0;
    if (left != NULL) {
        const char *space = strchr(left, ' ');
        if (space != NULL) {
            left_length = (size_t)(space - left);
            right = space + 1;
        }
    } else if (json_array_size(merge) == 2) {
        left = json_string_value(json_array_get(merge, 0));
        right = json_string_value(json_array_get(merge, 1));
        left_length = left != NULL ? strlen(left) : 0;
    }
    if (left == NULL || right == NULL)
        return fail(failure, ERR_INVALID,
                    "tokenizer.json: merge %u: expected \"a b\" or [\"a\", \"b\"]", rank);
    char both[4096]; /* merges in the field are of a few dozen bytes */
    int64_t left_bytes = 0, right_bytes = 0;
    uint32_t a = find_side(self, left, left_length, both, sizeof both / 2, &left_bytes), b, ab;
    if (a == TOKEN_NONE)
        return fail(failure, ERR_CORRUPT,
                    "tokenizer.json: merge %u: \"%.*s\" is not in the vocabulary", rank,
                    clip(left, left_length, 64), left);
    b = find_side(self, right, strlen(right), both + left_bytes, sizeof both / 2, &right_bytes);
    if (b == TOKEN_NONE)
        return fail(failure, ERR_CORRUPT,
                    "tokenizer.json: merge %u: \"%.*s\" is not in the vocabulary", rank,
                    clip(right, strlen(right), 64), right);
    ab = vocabulary_find(&self->vocabulary, both, (size_t)(left_bytes + right_bytes), false);
    if (ab == TOKEN_NONE)
        return fail(
            failure, ERR_CORRUPT,
            "tokenizer.json: merge %u: its result \"%.*s\" + \"%.*s\" is not in the vocabulary",
            rank, clip(left, left_length, 64), left, clip(right, strlen(right), 64), right);
    if (!bpe_add_merge(&self->bpe, a, b, rank, ab))
        return fail(failure, ERR_CORRUPT,
                    "tokenizer.json: merge %u: \"%.*s\" + \"%.*s\" is given twice", rank,
                    clip(left, left_length, 64), left, clip(right, strlen(right), 64), right);
    return 0;
}

static int read_merges(struct tokenizer *self, const json_t *merges, struct failure *failure) {
    if (json_array_size(merges) > VOCABULARY_MAX)
        return fail(failure, ERR_TOO_LARGE, "tokenizer.json: expected at most %d merges, found %zu",
                    VOCABULARY_MAX, json_array_size(merges));
    int code = bpe_create(&self->bpe, (uint32_t)json_array_size(merges), failure);
    size_t i;
    const json_t *merge;
    json_array_foreach(merges, i, merge) {
        if (code < 0)
            break;
        code = read_merge(self, merge, (uint32_t)i, failure);
    }
    return code;
}

static int read_added(struct tokenizer *self, const json_t *token, struct failure *failure) {
    static const char *const off[] = {"single_word", "lstrip", "rstrip", NULL};
    const char *content = json_string_value(json_object_get(token, "content"));
    uint32_t id = (uint32_t)json_integer_value(json_object_get(token, "id"));
    size_t length = strlen(content);
    int code = expect_off(token, content, off, failure);
    if (code < 0)
        return code;
    struct token_entry *entry = &self->vocabulary.entry[id];
    if (added_find(self, content, length) != TOKEN_NONE)
        return fail(failure, ERR_CORRUPT, "tokenizer.json: added token \"%.*s\" is given twice",
                    clip(content, length, 64), content);
    char *decoded = self->text + self->text_bytes; /* measured for it, not taken */
    int64_t bytes = byte_level_decode(content, length, decoded);
    uint32_t known = bytes < 0 ? vocabulary_find(&self->vocabulary, content, length, true)
                               : vocabulary_find(&self->vocabulary, decoded, (size_t)bytes, false);
    if (known != TOKEN_NONE && known != id)
        return fail(failure, ERR_CORRUPT,
                    "tokenizer.json: added token \"%.*s\" has id %u, but %u in the vocabulary",
                    clip(content, length, 64), content, id, known);
    if (known == TOKEN_NONE) {
        if (entry->flags & TOKEN_KNOWN)
            return fail(failure, ERR_CORRUPT,
                        "tokenizer.json: id %u is given twice, to \"%.*s\" too", id,
                        clip(content, length, 64), content);
        set_entry(self, id, content, length);
    }
    if (json_is_true(json_object_get(token, "special")))
        entry->flags |= TOKEN_SPECIAL;
    bool normalized = json_is_true(json_object_get(token, "normalized"));
    struct added_table *table = &self->added[normalized ? ADDED_NORMALIZED : ADDED_RAW];
    char *copy = reserve_text(self, length);
    memcpy(copy, content, length);
    uint32_t at = table->count++;
    for (; at > 0; at--) { /* files list them in order, or nearly */
        const struct added_token *before = &table->token[at - 1];
        size_t common = before->length < length ? before->length : length;
        int order = memcmp(before->content, content, common);
        if (order < 0 || (order == 0 && before->length <= length))
            break;
        table->token[at] = *before;
    }
    table->token[at] = (struct added_token){copy, (uint32_t)length, id};
    table->begins[(unsigned char)content[0]] = true;
    return 0;
}

static int read_added_tokens(struct tokenizer *self, const json_t *added, struct failure *failure) {
    size_t count = json_array_size(added);
    if (count > ADDED_TOKENS_MAX)
        return fail(failure, ERR_TOO_LARGE,
                    "tokenizer.json: expected at most %d added tokens, found %zu", ADDED_TOKENS_MAX,
                    count);
    for (int pass = 0; pass < ADDED_PASSES; pass++) {
        self->added[pass].token = calloc(count > 0 ? count : 1, sizeof(struct added_token));
        if (self->added[pass].token == NULL)
            return fail(failure, ERR_NO_MEMORY, "no memory for %zu added tokens", count);
    }
    size_t i;
    const json_t *token;
    json_array_foreach(added, i, token) {
        int code = read_added(self, token, failure);
        if (code < 0)
            return code;
    }
    return 0;
}

static int read_model(struct tokenizer *self, const json_t *root, struct failure *failure) {
    static const char *const off[] = {
        "dropout", "unk_token", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix",
        NULL};
    const json_t *model = json_object_get(root, "model");
    const char *type = type_of(model, "model", failure);
    if (type == NULL)
        return ERR_INVALID;
    if (strcmp(type, "BPE") != 0)
        return unknown("model", type, "\"BPE\"", failure);
    int code = expect_off(model, "model", off, failure);
    if (code < 0)
        return code;
    const json_t *vocab = json_object_get(model, "vocab");
    const json_t *merges = json_object_get(model, "merges");
    const json_t *added = json_object_get(root, "added_tokens");
    if (!json_is_object(vocab) || !json_is_array(merges) ||
        !(is_off(added) || json_is_array(added)))
        return fail(failure, ERR_INVALID,
                    "tokenizer.json: expected an object \"vocab\" and arrays \"merges\" and "
                    "\"added_tokens\"");
    uint32_t entries = 0;
    if (json_object_size(vocab) > VOCABULARY_MAX)
        return fail(failure, ERR_TOO_LARGE, "tokenizer.json: expected at most %d tokens, found %zu",
                    VOCABULARY_MAX, json_object_size(vocab));
    code = measure(vocab, added, &entries, &self->text_capacity, failure);
    if (code < 0)
        return code;
    self->text = malloc(self->text_capacity);
    if (self->text == NULL)
        return fail(failure, ERR_NO_MEMORY, "no memory for a vocabulary of %u tokens", entries);
    self->bpe.ignore_merges = json_is_true(json_object_get(model, "ignore_merges"));
    code =
        vocabulary_create(&self->vocabulary, entries, (uint32_t)json_object_size(vocab), failure);
    if (code == 0)
        code = read_vocabulary(self, vocab, failure);
    if (code == 0)
        code = read_merges(self, merges, failure);
    if (code == 0)
        code = read_added_tokens(self, added, failure);
    return code;
}

int tokenizer_read_json(struct tokenizer *self, const char *json, size_t bytes,
                        struct failure *failure) {
    json_t *root;
    int code = load("tokenizer.json", json, bytes, &root, failure);
    if (code < 0)
        return code;
    bool byte_level = false;
    code = read_normalizer(json_object_get(root, "normalizer"), failure);
    if (code == 0)
        code =
            read_pre_tokenizer(self, json_object_get(root, "pre_tokenizer"), &byte_level, failure);
    if (code == 0 && !byte_level)
        code =
            fail(failure, ERR_UNSUPPORTED, "tokenizer.json: pre_tokenizer: expected a ByteLevel");
    if (code == 0)
        code = read_post_processor(json_object_get(root, "post_processor"), failure);
    if (code == 0)
        code = read_decoder(json_object_get(root, "decoder"), failure);
    if (code == 0)
        code = read_model(self, root, failure);
    json_decref(root);
    return code;
}

/* "bos_token": null, a string or an added token. */
static int read_named(const struct tokenizer *self, const json_t *config, const char *name,
                      int32_t *ret, struct failure *failure) {
    const json_t *value = json_object_get(config, name);
    *ret = -1;
    if (value == NULL || json_is_null(value))
        return 0;
    const char *content =
        json_string_value(json_is_object(value) ? json_object_get(value, "content") : value);
    if (content == NULL)
        return fail(failure, ERR_INVALID, "tokenizer_config.json: %s: expected a token", name);
    int64_t id = tokenizer_find(self, content);
    if (id < 0)
        return fail(failure, ERR_INVALID,
                    "tokenizer_config.json: %s: \"%.*s\" is not in tokenizer.json", name,
                    clip(content, strlen(content), 64), content);
    *ret = (int32_t)id;
    return 0;
}

/* A template, or a list of named ones, of which "default" is taken. */
static const char *find_template(const json_t *value) {
    if (!json_is_array(value))
        return json_string_value(value);
    size_t i;
    const json_t *item;
    json_array_foreach(value, i, item) {
        const char *name = json_string_value(json_object_get(item, "name"));
        if (name != NULL && strcmp(name, "default") == 0)
            return json_string_value(json_object_get(item, "template"));
    }
    return NULL;
}

int tokenizer_read_config(struct tokenizer *self, const char *json, size_t bytes,
                          struct failure *failure) {
    json_t *root;
    int code = load("tokenizer_config.json", json, bytes, &root, failure);
    if (code < 0)
        return code;
    code = read_named(self, root, "bos_token", &self->bos, failure);
    if (code == 0)
        code = read_named(self, root, "eos_token", &self->eos, failure);
    self->add_bos = json_is_true(json_object_get(root, "add_bos_token"));
    if (code == 0 && self->add_bos && self->bos < 0)
        code = fail(failure, ERR_INVALID,
                    "tokenizer_config.json: add_bos_token is true but there is no bos_token");
    const char *template = find_template(json_object_get(root, "chat_template"));
    if (code == 0 && template != NULL) {
        self->chat_template = strdup(template);
        if (self->chat_template == NULL)
            code = fail(failure, ERR_NO_MEMORY, "no memory for a chat template");
    }
    json_decref(root);
    return code;
}
