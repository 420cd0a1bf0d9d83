/* Chat formats of the DeepSeek family. A template is recognised by the few expressions in which the
 * published ones differ; each format is a row of traits, and one renderer reads them. Text between
 * two special tokens is encoded in one go, as it is when a template's output is. */
#include "model/chat.h"

#include <stdlib.h>
#include <string.h>

#define USER      "<｜User｜>"
#define ASSISTANT "<｜Assistant｜>"
#define END       "<｜end▁of▁sentence｜>"

enum trait {
    ROLES_IN_WORDS = 1,      /* "User: " and "Assistant: ", blank lines between */
    SYSTEM_FIRST = 2,        /* system messages are joined and put before all others */
    LAST_SYSTEM_ONLY = 4,    /* instead of joined */
    MARK_AFTER_USER = 8,     /* the assistant's marker belongs to the user message */
    DROP_TO_LAST_CLOSE = 16, /* of earlier answers only what follows the last </think> */
    OPEN_THINK = 32,         /* the prompt ends inside <think> */
    THINKING_BY_OPTION =
        64, /* (no) thinking is marked; answers are dropped to the first </think> */
};

static const struct {
    const char *name;
    unsigned traits;
} formats[] = {
    [CHAT_NONE] = {"none", 0},
    [CHAT_DEMO] = {"demo", 0},
    [CHAT_V2] = {"deepseek-v2", ROLES_IN_WORDS},
    [CHAT_V25] = {"deepseek-v2.5", SYSTEM_FIRST | LAST_SYSTEM_ONLY},
    [CHAT_V3] = {"deepseek-v3", SYSTEM_FIRST},
    [CHAT_R1] = {"deepseek-r1", SYSTEM_FIRST | DROP_TO_LAST_CLOSE | OPEN_THINK},
    [CHAT_V31] = {"deepseek-v3.1", SYSTEM_FIRST | THINKING_BY_OPTION},
    [CHAT_V3_0324] = {"deepseek-v3-0324", SYSTEM_FIRST | MARK_AFTER_USER},
    [CHAT_R1_0528] = {"deepseek-r1-0528", SYSTEM_FIRST | MARK_AFTER_USER | DROP_TO_LAST_CLOSE},
};

const char *chat_format_name(enum chat_format format) {
    ASSERT((unsigned)format < sizeof formats / sizeof formats[0]);
    return formats[format].name;
}

static enum chat_format recognise_text(const char *text) {
#define HAS(expression) (strstr(text, expression) != NULL)
    if (!HAS("'" USER "' + message['content']"))
        return HAS("'User: ' + message['content'] + '\\n\\n'") &&
                       HAS("'Assistant: ' + message['content'] + eos_token") && HAS("'Assistant:'")
                   ? CHAT_V2
                   : CHAT_NONE;
    bool marker = HAS("'" ASSISTANT "'"), drops_to_last = HAS(".split('</think>')[-1]");
    bool system_first = HAS("ns.system_prompt"),
         after_user = HAS("message['content'] + '" ASSISTANT "'");
    bool opens = HAS("'" ASSISTANT "<think>\\n'") || HAS("'" ASSISTANT "<think>\n'");
    if (!system_first)
        return HAS("'" ASSISTANT "' + message['content'] + '" END "'") && !HAS("think") ? CHAT_DEMO
                                                                                        : CHAT_NONE;
    if (opens)
        return drops_to_last && !after_user ? CHAT_R1 : CHAT_NONE;
    if (HAS("thinking"))
        return marker && HAS("if not thinking %}") && HAS("'</think>'") && HAS("'<think>'") &&
                       HAS(".split('</think>', 1)[1]") && HAS("ns.is_last_user")
                   ? CHAT_V31
                   : CHAT_NONE;
    if (after_user && HAS("not ns.is_last_user"))
        return drops_to_last ? CHAT_R1_0528 : HAS("think") ? CHAT_NONE : CHAT_V3_0324;
    if (!marker || after_user || HAS("think"))
        return CHAT_NONE;
    return HAS("ns.is_first_sp") ? CHAT_V3 : CHAT_V25;
#undef HAS
}

enum chat_format chat_recognise(const struct tokenizer *tokenizer, struct failure *failure) {
    const char *text = tokenizer_chat_template(tokenizer);
    if (text == NULL) {
        fail(failure, ERR_NOT_FOUND, "the model has no chat_template in tokenizer_config.json");
        return CHAT_NONE;
    }
    enum chat_format format = recognise_text(text);
    if (format == CHAT_NONE) {
        size_t shown = strlen(text) < 80 ? strlen(text) : 80;
        while (((unsigned char)text[shown] & 0xc0) == 0x80)
            shown--;
        fail(failure, ERR_UNSUPPORTED,
             "the model's chat_template is none of the known ones (V2, V2.5, V3, R1, V3.1); it "
             "begins with "
             "\"%.*s\"",
             (int)shown, text);
        return CHAT_NONE;
    }
    const char *missing = tokenizer_bos(tokenizer) < 0   ? "bos_token"
                          : tokenizer_eos(tokenizer) < 0 ? "eos_token"
                                                         : NULL;
    if (missing == NULL && !(formats[format].traits & ROLES_IN_WORDS))
        missing = tokenizer_find(tokenizer, USER) < 0        ? USER
                  : tokenizer_find(tokenizer, ASSISTANT) < 0 ? ASSISTANT
                                                             : NULL;
    if (missing != NULL) {
        fail(failure, ERR_NOT_FOUND, "the chat_template needs %s, which the tokenizer lacks",
             missing);
        return CHAT_NONE;
    }
    return format;
}

/* A prompt in the making: tokens, then the text since the last special token. */
struct prompt {
    const struct tokenizer *tokenizer;
    struct token_list *out;
    char *text;
    size_t bytes, capacity;
    int code; /* the first error; everything after it is skipped */
    struct failure *failure;
};

static void put_bytes(struct prompt *self, const char *text, size_t bytes) {
    if (self->code < 0)
        return;
    size_t needed;
    if (__builtin_add_overflow(self->bytes, bytes, &needed) || needed > SIZE_MAX / 2) {
        self->code = fail(self->failure, ERR_TOO_LARGE, "the messages are too long");
        return;
    }
    if (needed > self->capacity) {
        size_t capacity = needed * 2;
        char *grown = realloc(self->text, capacity);
        if (grown == NULL) {
            self->code =
                fail(self->failure, ERR_NO_MEMORY, "no memory for %zu bytes of chat", capacity);
            return;
        }
        self->text = grown;
        self->capacity = capacity;
    }
    if (bytes > 0)
        memcpy(self->text + self->bytes, text, bytes);
    self->bytes = needed;
}

static void put_text(struct prompt *self, const char *text) {
    put_bytes(self, text, strlen(text));
}

static void flush(struct prompt *self) {
    if (self->code == 0 && self->bytes > 0)
        self->code = tokenizer_encode(self->tokenizer, self->text, self->bytes, false, false,
                                      self->out, self->failure);
    self->bytes = 0;
}

static void put_token(struct prompt *self, int64_t token) {
    flush(self);
    if (self->code < 0)
        return;
    ASSERT(token >= 0);
    self->code = token_list_append(self->out, (uint32_t)token, self->failure);
}

/* Of text that a template writes itself: the added token of that name, or the text in vocabularies
 * without one. */
static void put_marker(struct prompt *self, const char *marker) {
    int64_t token = tokenizer_find(self->tokenizer, marker);
    if (token >= 0)
        put_token(self, token);
    else
        put_text(self, marker);
}

static const char *visible_answer(unsigned traits, const char *content) {
    static const char close[] = "</think>";
    const char *found = strstr(content, close);
    if (found == NULL || !(traits & (DROP_TO_LAST_CLOSE | THINKING_BY_OPTION)))
        return content;
    content = found + strlen(close);
    while ((traits & DROP_TO_LAST_CLOSE) && (found = strstr(content, close)) != NULL)
        content = found + strlen(close);
    return content;
}

static void put_user(struct prompt *self, unsigned traits, const char *content) {
    if (traits & ROLES_IN_WORDS) {
        put_text(self, "User: ");
        put_text(self, content);
        put_text(self, "\n\n");
        return;
    }
    put_marker(self, USER);
    put_text(self, content);
    if (traits & MARK_AFTER_USER)
        put_marker(self, ASSISTANT);
}

static void put_assistant(struct prompt *self, unsigned traits, const char *content,
                          bool after_user) {
    if (traits & ROLES_IN_WORDS)
        put_text(self, "Assistant: ");
    else if (traits & THINKING_BY_OPTION) {
        if (after_user) {
            put_marker(self, ASSISTANT);
            put_marker(self, "</think>");
        }
    } else if (!(traits & MARK_AFTER_USER))
        put_marker(self, ASSISTANT);
    put_text(self, visible_answer(traits, content));
    put_token(self, tokenizer_eos(self->tokenizer));
}

static void put_generation_prompt(struct prompt *self, unsigned traits, bool thinking,
                                  bool after_user) {
    if (traits & ROLES_IN_WORDS) {
        put_text(self, "Assistant:");
        return;
    }
    if ((traits & MARK_AFTER_USER && after_user) || (traits & THINKING_BY_OPTION && !after_user))
        return;
    put_marker(self, ASSISTANT);
    if (traits & THINKING_BY_OPTION)
        put_marker(self, thinking ? "<think>" : "</think>");
    if (traits & OPEN_THINK) {
        put_marker(self, "<think>");
        put_text(self, "\n");
    }
}

enum role { ROLE_UNKNOWN, ROLE_SYSTEM, ROLE_USER, ROLE_ASSISTANT };

static enum role role_of(const char *name) {
    return strcmp(name, "system") == 0      ? ROLE_SYSTEM
           : strcmp(name, "user") == 0      ? ROLE_USER
           : strcmp(name, "assistant") == 0 ? ROLE_ASSISTANT
                                            : ROLE_UNKNOWN;
}

static int check_messages(const struct chat_message *messages, uint32_t count,
                          struct failure *failure) {
    if (count == 0)
        return fail(failure, ERR_INVALID, "expected at least one message");
    for (uint32_t i = 0; i < count; i++) {
        const char *role = messages[i].role != NULL ? messages[i].role : "";
        if (role_of(role) == ROLE_UNKNOWN)
            return fail(failure, ERR_INVALID,
                        "message %u: expected the role system, user or assistant, found \"%s\"", i,
                        strlen(role) <= 32 ? role : "(a long text)");
        if (messages[i].content == NULL)
            return fail(failure, ERR_INVALID, "message %u: expected a content", i);
    }
    return 0;
}

static void put_system_messages(struct prompt *self, const struct chat_message *messages,
                                uint32_t count, unsigned traits) {
    const char *last = NULL;
    for (uint32_t i = 0; i < count; i++) {
        if (role_of(messages[i].role) != ROLE_SYSTEM)
            continue;
        if (!(traits & LAST_SYSTEM_ONLY)) {
            put_text(self, last != NULL ? "\n\n" : "");
            put_text(self, messages[i].content);
        }
        last = messages[i].content;
    }
    if (traits & LAST_SYSTEM_ONLY && last != NULL)
        put_text(self, last);
}

int chat_encode(enum chat_format format, const struct tokenizer *tokenizer,
                const struct chat_message *messages, uint32_t count,
                const struct chat_options *options, struct token_list *out,
                struct failure *failure) {
    ASSERT((unsigned)format < sizeof formats / sizeof formats[0]);
    if (format == CHAT_NONE)
        return fail(failure, ERR_UNSUPPORTED, "the model has no chat format that is known");
    int code = check_messages(messages, count, failure);
    if (code < 0)
        return code;
    unsigned traits = formats[format].traits;
    struct prompt prompt = {.tokenizer = tokenizer, .out = out, .failure = failure};
    uint32_t before = out->count;
    bool after_user = false; /* system messages do not count */
    put_token(&prompt, tokenizer_bos(tokenizer));
    if (traits & SYSTEM_FIRST)
        put_system_messages(&prompt, messages, count, traits);
    for (uint32_t i = 0; i < count; i++) {
        const char *content = messages[i].content;
        switch (role_of(messages[i].role)) {
        case ROLE_SYSTEM:
            if (!(traits & SYSTEM_FIRST))
                put_text(&prompt, content);
            if (traits & ROLES_IN_WORDS)
                put_text(&prompt, "\n\n");
            break;
        case ROLE_USER:
            put_user(&prompt, traits, content);
            after_user = true;
            break;
        case ROLE_ASSISTANT:
            put_assistant(&prompt, traits, content, after_user);
            after_user = false;
            break;
        case ROLE_UNKNOWN:
            ASSERT(!"checked above");
        }
    }
    if (options->add_generation_prompt)
        put_generation_prompt(&prompt, traits, options->thinking, after_user);
    flush(&prompt);
    free(prompt.text);
    if (prompt.code < 0)
        out->count = before;
    return prompt.code;
}

bool chat_starts_in_reasoning(enum chat_format format, const struct chat_options *options) {
    ASSERT((unsigned)format < sizeof formats / sizeof formats[0]);
    unsigned traits = formats[format].traits;
    return (traits & OPEN_THINK) || ((traits & THINKING_BY_OPTION) && options->thinking);
}
