/* Bodies and chunks of /v1/chat/completions. A delta never holds a null; the role comes with the
 * first words, never alone before them. */
#include <string.h>

#include "actors/gateway/gateway.h"

static void write_token(struct text *out, const struct gateway *self, const struct request *request,
                        uint32_t token, float logprob) {
    size_t size = 0;
    const char *bytes = tokenizer_bytes(self->tokenizer, token, &size);
    text_puts(out, "{\"token\":");
    if (request->input.tokens_as_ids || bytes == NULL)
        text_format(out, "\"token_id:%u\"", token);
    else
        text_json(out, bytes,
                  size); /* part of a character becomes U+FFFD; `bytes` has it exactly */
    text_puts(out, ",\"logprob\":");
    text_float(out, logprob);
    text_puts(out, ",\"bytes\":[");
    for (size_t i = 0; i < size; i++)
        text_format(out, i == 0 ? "%u" : ",%u", (uint8_t)bytes[i]);
    text_puts(out, "]");
}

static void write_logprobs(struct text *out, const struct gateway *self,
                           const struct choice *choice) {
    const struct request *request = choice->request;
    if (request->input.logprobs == ABSENT) {
        text_puts(out, ",\"logprobs\":null");
        return;
    }
    text_puts(out, ",\"logprobs\":{\"content\":[");
    for (uint32_t i = 0; i < choice->score.count; i++) {
        const struct scored *score = &choice->score.entry[i];
        if (i > 0)
            text_puts(out, ",");
        write_token(out, self, request, score->token, score->logprob);
        text_puts(out, ",\"top_logprobs\":[");
        for (uint32_t a = 0; a < score->alternatives; a++) {
            const struct alternative *alternative = &choice->score.alternative[score->first + a];
            if (a > 0)
                text_puts(out, ",");
            write_token(out, self, request, alternative->token, alternative->logprob);
            text_puts(out, "}");
        }
        text_puts(out, "]}");
    }
    text_puts(out, "]}");
}

/* Both names: `reasoning` is vLLM's newer one, `reasoning_content` DeepSeek's own. */
static void write_reasoning(struct text *out, const struct text *thought) {
    text_puts(out, ",\"reasoning\":");
    text_json(out, thought->bytes, thought->size);
    text_puts(out, ",\"reasoning_content\":");
    text_json(out, thought->bytes, thought->size);
}

static void write_tail(struct text *out, const struct gateway *self, const struct choice *choice) {
    write_logprobs(out, self, choice);
    answer_write_finish(out, choice);
    if (choice->request->input.return_token_ids) {
        text_puts(out, ",\"token_ids\":");
        answer_write_tokens(out, choice->token + choice->sent_tokens,
                            choice->tokens - choice->sent_tokens);
    }
    text_puts(out, "}");
}

static void write_choice(struct text *out, const struct gateway *self,
                         const struct choice *choice) {
    text_format(out,
                "{\"index\":%u,\"message\":{\"role\":\"assistant\",\"content\":", choice->index);
    if (choice->answer.size > 0 || choice->thought.size == 0)
        text_json(out, choice->answer.bytes, choice->answer.size);
    else
        text_puts(out, "null"); /* nothing but reasoning, as vLLM says it */
    if (choice->request->starts_in_reasoning)
        write_reasoning(out, &choice->thought);
    text_puts(out, "}");
    write_tail(out, self, choice);
}

static void write_prompt_ids(struct text *out, const struct request *request) {
    text_puts(out, ",\"prompt_token_ids\":");
    answer_write_tokens(out, request->prompt[0].token, request->prompt[0].tokens);
}

void chat_write(struct text *out, const struct gateway *self, const struct request *request) {
    answer_write_head(out, self, request, answer_object(request, false));
    text_puts(out, ",\"choices\":[");
    for (uint32_t i = 0; i < request->choices; i++) {
        if (i > 0)
            text_puts(out, ",");
        write_choice(out, self, request->choice[i]);
    }
    text_puts(out, "]");
    if (request->input.return_token_ids)
        write_prompt_ids(out, request);
    answer_write_usage(out, request);
    text_puts(out, "}");
}

static void write_delta(struct text *out, const struct choice *choice) {
    text_puts(out, ",\"delta\":{");
    size_t start = out->size;
    if (!choice->begun)
        text_puts(out, ",\"role\":\"assistant\"");
    if (choice->thought.size > 0)
        write_reasoning(out, &choice->thought);
    bool whole_answer_empty = !choice->begun && choice->thought.size == 0;
    if (choice->answer.size > 0 || whole_answer_empty) {
        text_puts(out, ",\"content\":");
        text_json(out, choice->answer.bytes, choice->answer.size);
    }
    if (out->size > start) { /* the comma before the first key */
        memmove(out->bytes + start, out->bytes + start + 1, out->size - start - 1);
        out->size--;
    }
    text_puts(out, "}");
}

void chat_write_chunk(struct text *out, const struct gateway *self, struct choice *choice) {
    const struct request *request = choice->request;
    answer_write_head(out, self, request, answer_object(request, true));
    if (request->input.return_token_ids && !choice->begun)
        write_prompt_ids(out, request);
    text_format(out, ",\"choices\":[{\"index\":%u", choice->index);
    write_delta(out, choice);
    write_tail(out, self, choice);
    text_puts(out, "]");
    if (request->input.continuous_usage_stats)
        answer_write_usage(out, request);
    if (request->trace != NULL && request->trace->show)
        trace_write_served(out, self, choice);
    text_puts(out, "}");
}
