/* Pre-tokenization: each stage cuts the pieces of the one before at the matches of its pattern;
 * matches and what lies between them become pieces of their own ("Isolated"). As in Hugging Face
 * `tokenizers`, a pattern sees one piece and nothing around it. */
#include "model/tokenizer_parts.h"

#include <stdlib.h>

/* Backtracking of one match, for the quadratic cases that some patterns have (a long run of
 * spaces): about half a second. */
#define MATCH_STEPS_MAX 50000000u
#define MATCH_HEAP_KIB  65536u

int splitter_add(struct splitter *self, const char *pattern, size_t length,
                 struct failure *failure) {
    if (self->stages == SPLITS_MAX)
        return fail(failure, ERR_TOO_LARGE, "expected at most %d splits", SPLITS_MAX);
    if (length > PATTERN_BYTES_MAX)
        return fail(failure, ERR_TOO_LARGE, "regex: expected at most %d bytes, found %zu",
                    PATTERN_BYTES_MAX, length);
    if (self->context == NULL) {
        self->context = pcre2_match_context_create(NULL);
        if (self->context == NULL)
            return fail(failure, ERR_NO_MEMORY, "no memory for a regex");
        pcre2_set_match_limit(self->context, MATCH_STEPS_MAX);
        pcre2_set_heap_limit(self->context, MATCH_HEAP_KIB);
    }
    char *translated;
    size_t translated_length;
    int code = pattern_translate(pattern, length, &translated, &translated_length, failure);
    if (code < 0)
        return code;
    pcre2_compile_context *context = pcre2_compile_context_create(NULL);
    if (context == NULL) {
        free(translated);
        return fail(failure, ERR_NO_MEMORY, "no memory for a regex");
    }
    pcre2_set_newline(context, PCRE2_NEWLINE_LF);
    int error;
    size_t offset;
    pcre2_code *compiled =
        pcre2_compile((PCRE2_SPTR)translated, translated_length,
                      PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C, &error,
                      &offset, context);
    if (compiled != NULL) {
        pcre2_jit_compile(compiled, PCRE2_JIT_COMPLETE); /* without it, slower */
        self->stage[self->stages++] = compiled;
    } else {
        unsigned char text[128];
        pcre2_get_error_message(error, text, sizeof text);
        code = fail(failure, ERR_INVALID, "regex: %s: \"%.*s\"", text, clip(pattern, length, 200),
                    pattern);
    }
    free(translated);
    pcre2_compile_context_free(context);
    return code;
}

void splitter_destroy(struct splitter *self) {
    for (uint32_t i = 0; i < self->stages; i++)
        pcre2_code_free(self->stage[i]);
    pcre2_match_context_free(self->context);
    *self = (struct splitter){0};
}

struct run {
    const struct splitter *splitter;
    pcre2_match_data *match;
    piece_function emit;
    void *context;
    struct failure *failure;
};

/* The next match at or after `from`: 1, 0 if there is none. */
static int find_match(const struct run *run, uint32_t stage, const char *text, uint32_t length,
                      uint32_t from, uint32_t *ret_start, uint32_t *ret_end) {
    const pcre2_code *code = run->splitter->stage[stage];
    int found = pcre2_match(code, (PCRE2_SPTR)text, length, from, PCRE2_NO_UTF_CHECK, run->match,
                            run->splitter->context);
    if (found == PCRE2_ERROR_JIT_STACKLIMIT) /* the interpreter keeps its stack on the heap */
        found = pcre2_match(code, (PCRE2_SPTR)text, length, from, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT,
                            run->match, run->splitter->context);
    if (found == PCRE2_ERROR_NOMATCH)
        return 0;
    if (found == PCRE2_ERROR_MATCHLIMIT || found == PCRE2_ERROR_HEAPLIMIT ||
        found == PCRE2_ERROR_DEPTHLIMIT)
        return fail(run->failure, ERR_TOO_LARGE,
                    "a run of %u bytes takes too many steps to split into words", length - from);
    if (found < 0)
        return fail(run->failure, ERR_NO_MEMORY, "splitting the text into words failed (PCRE2: %d)",
                    found);
    const size_t *span = pcre2_get_ovector_pointer(run->match);
    *ret_start = (uint32_t)span[0];
    *ret_end = (uint32_t)span[1];
    return 1;
}

static int split(const struct run *run, uint32_t stage, const char *text, uint32_t length) {
    if (length == 0)
        return 0;
    if (stage == run->splitter->stages)
        return run->emit(run->context, text, length, run->failure);
    uint32_t at = 0, done = 0, last_end = TOKEN_NONE;
    while (at <= length) {
        uint32_t start = 0, end = 0;
        int code = find_match(run, stage, text, length, at, &start, &end);
        if (code < 0)
            return code;
        if (code == 0)
            break;
        if (start == end &&
            end == last_end) { /* an empty match right after a match does not count */
            do
                at++;
            while (at < length && ((unsigned char)text[at] & 0xc0) == 0x80);
            continue;
        }
        at = last_end = end;
        code = split(run, stage + 1, text + done, start - done);
        if (code == 0)
            code = split(run, stage + 1, text + start, end - start);
        if (code < 0)
            return code;
        done = end;
    }
    return split(run, stage + 1, text + done, length - done);
}

int splitter_run(const struct splitter *self, const char *text, uint32_t length,
                 piece_function emit, void *context, struct failure *failure) {
    struct run run = {self, pcre2_match_data_create(1, NULL), emit, context, failure};
    if (run.match == NULL)
        return fail(failure, ERR_NO_MEMORY, "no memory to split a text");
    int code = split(&run, 0, text, length);
    pcre2_match_data_free(run.match);
    return code;
}
