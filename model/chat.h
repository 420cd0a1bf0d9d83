/* Chat formats of the DeepSeek family, recognised from the chat_template of tokenizer_config.json, rendered by our own code (a Jinja
 * interpreter is not needed for a handful of formats). Pure. */
#ifndef TROUPE_CHAT_H
#define TROUPE_CHAT_H

#include "model/tokenizer.h"

enum chat_format {
    CHAT_NONE,
    CHAT_DEMO,
    CHAT_V2,
    CHAT_V25, /* of several system messages only the last counts */
    CHAT_V3,
    CHAT_R1,
    CHAT_V31,     /* V3.1, V3.2 */
    CHAT_V3_0324, /* the assistant's marker follows each user message */
    CHAT_R1_0528, /* likewise; the model opens <think> by itself */
};

/* CHAT_NONE with a text in `failure` (naming the first characters of the template) when the template is unknown or absent. */
enum chat_format chat_recognise(const struct tokenizer *tokenizer, struct failure *failure);
const char *chat_format_name(enum chat_format format);

struct chat_message {
    const char *role;    /* system | user | assistant */
    const char *content; /* UTF-8 */
};

struct chat_options {
    bool add_generation_prompt;
    bool thinking; /* V3.1: chat_template_kwargs.thinking */
};

/* The prompt's tokens, special tokens placed as tokens; content that contains the text of special tokens is encoded as plain text. Unknown
 * role or empty list: ERR_INVALID. R1 drops earlier <think> blocks from assistant turns, as its template does. */
int chat_encode(enum chat_format format, const struct tokenizer *tokenizer,
                const struct chat_message *messages, uint32_t count,
                const struct chat_options *options, struct token_list *out,
                struct failure *failure);

/* Formats whose answers begin inside <think> (R1's prompt ends with "<think>\n"; V3.1 with thinking). */
bool chat_starts_in_reasoning(enum chat_format format, const struct chat_options *options);

#endif
