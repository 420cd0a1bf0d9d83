/* Bodies and chunks of /v1/completions. With echo the prompt comes first: its text, and with
 * logprobs an entry for each of its tokens, of which the first has none to show (nothing predicts
 * it). */
#include <inttypes.h>
#include <string.h>

#include "actors/gateway/gateway.h"

/* One entry of the logprobs lists, from the prompt or from what was generated. */
struct entry {
    uint32_t token;
    uint64_t offset;
    const struct scored *score; /* NULL: first token of the prompt */
    const struct scored_list *list;
};

static uint32_t entries_of(const struct choice *choice, bool echo) {
    return (echo ? choice->prompt->tokens : 0) + choice->score.count;
}

static struct entry entry_at(const struct choice *choice, bool echo, uint32_t index) {
    const struct prompt *prompt = choice->prompt;
    if (echo && index < prompt->tokens) {
        const struct scored *score = index == 0 ? NULL : &prompt->score.entry[index - 1];
        return (struct entry){prompt->token[index], prompt->offset[index], score, &prompt->score};
    }
    const struct scored *score = &choice->score.entry[index - (echo ? prompt->tokens : 0)];
    return (struct entry){score->token, score->offset, score, &choice->score};
}

static bool same_name(const struct gateway *self, uint32_t a, uint32_t b) {
    size_t a_bytes = 0, b_bytes = 0;
    const char *a_text = tokenizer_bytes(self->tokenizer, a, &a_bytes);
    const char *b_text = tokenizer_bytes(self->tokenizer, b, &b_bytes);
    return a == b || (a_text != NULL && b_text != NULL && a_bytes == b_bytes &&
                      memcmp(a_text, b_text, a_bytes) == 0);
}

/* An object from names to log-probabilities: the best tokens, and the chosen one if it is not among
 * them. A name can stand only once, for its most probable token. */
static void write_alternatives(struct text *out, const struct gateway *self,
                               const struct request *request, const struct entry *entry) {
    const struct alternative *alternative = &entry->list->alternative[entry->score->first];
    uint32_t count = entry->score->alternatives;
    bool chosen_written = false;
    const char *separator = "";
    text_puts(out, "{");
    for (uint32_t i = 0; i < count; i++) {
        uint32_t before = 0;
        while (before < i && !same_name(self, alternative[before].token, alternative[i].token))
            before++;
        if (before < i && !request->input.tokens_as_ids)
            continue;
        text_puts(out, separator);
        separator = ",";
        answer_write_token_name(out, self, request, alternative[i].token);
        text_puts(out, ":");
        text_float(out, alternative[i].logprob);
        chosen_written = chosen_written || same_name(self, alternative[i].token, entry->token);
    }
    if (!chosen_written) {
        text_puts(out, separator);
        answer_write_token_name(out, self, request, entry->token);
        text_puts(out, ":");
        text_float(out, entry->score->logprob);
    }
    text_puts(out, "}");
}

static void write_logprobs(struct text *out, const struct gateway *self,
                           const struct choice *choice, bool echo) {
    const struct request *request = choice->request;
    if (request->input.logprobs == ABSENT) {
        text_puts(out, ",\"logprobs\":null");
        return;
    }
    static const char *const LISTS[] = {"{\"text_offset\":[", "],\"token_logprobs\":[",
                                        "],\"tokens\":[", "],\"top_logprobs\":["};
    uint32_t entries = entries_of(choice, echo);
    text_puts(out, ",\"logprobs\":");
    for (int list = 0; list < 4; list++) {
        text_puts(out, LISTS[list]);
        for (uint32_t i = 0; i < entries; i++) {
            struct entry entry = entry_at(choice, echo, i);
            if (i > 0)
                text_puts(out, ",");
            if (list == 0)
                text_format(out, "%" PRIu64, entry.offset);
            else if (list == 2)
                answer_write_token_name(out, self, request, entry.token);
            else if (entry.score == NULL)
                text_puts(out, "null");
            else if (list == 1)
                text_float(out, entry.score->logprob);
            else
                write_alternatives(out, self, request, &entry);
        }
    }
    text_puts(out, "]}");
}

/* The text, with the prompt before it, as one JSON string. */
static void write_text(struct text *out, const struct choice *choice, bool echo) {
    text_puts(out, ",\"text\":");
    if (!echo) {
        text_json(out, choice->answer.bytes, choice->answer.size);
        return;
    }
    text_json(out, choice->prompt->echo.bytes, choice->prompt->echo.size);
    out->size--; /* the closing quote: the two strings become one */
    size_t joint = out->size;
    text_json(out, choice->answer.bytes, choice->answer.size);
    memmove(out->bytes + joint, out->bytes + joint + 1,
            out->size - joint - 1); /* the opening one */
    out->size--;
}

static void write_choice(struct text *out, const struct gateway *self, const struct choice *choice,
                         bool first) {
    const struct generation_request *input = &choice->request->input;
    bool echo = input->echo && first;
    text_format(out, "{\"index\":%u", choice->index);
    write_text(out, choice, echo);
    write_logprobs(out, self, choice, echo);
    answer_write_finish(out, choice);
    if (input->return_token_ids && first) {
        text_puts(out, ",\"prompt_token_ids\":");
        answer_write_tokens(out, choice->prompt->token, choice->prompt->tokens);
    }
    if (input->return_token_ids) {
        text_puts(out, ",\"token_ids\":");
        answer_write_tokens(out, choice->token + choice->sent_tokens,
                            choice->tokens - choice->sent_tokens);
    }
    text_puts(out, "}");
}

void completion_write(struct text *out, const struct gateway *self, const struct request *request) {
    answer_write_head(out, self, request, answer_object(request, false));
    text_puts(out, ",\"choices\":[");
    for (uint32_t i = 0; i < request->choices; i++) {
        if (i > 0)
            text_puts(out, ",");
        write_choice(out, self, request->choice[i], true);
    }
    text_puts(out, "]");
    answer_write_usage(out, request);
    text_puts(out, "}");
}

void completion_write_chunk(struct text *out, const struct gateway *self, struct choice *choice) {
    answer_write_head(out, self, choice->request, answer_object(choice->request, true));
    text_puts(out, ",\"choices\":[");
    write_choice(out, self, choice, !choice->begun);
    text_puts(out, "]");
    if (choice->request->input.continuous_usage_stats)
        answer_write_usage(out, choice->request);
    if (choice->request->trace != NULL && choice->request->trace->show)
        trace_write_served(out, self, choice);
    text_puts(out, "}");
}
