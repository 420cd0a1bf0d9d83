/* What the answers of both endpoints share: head, usage, reasons for finishing, names of tokens. */
#include <inttypes.h>
#include <string.h>

#include "actors/gateway/gateway.h"

const char *answer_object(const struct request *request, bool chunk) {
    if (request->input.endpoint == ENDPOINT_COMPLETIONS)
        return "text_completion";
    return chunk ? "chat.completion.chunk" : "chat.completion";
}

void answer_write_head(struct text *out, const struct gateway *self, const struct request *request,
                       const char *object) {
    text_puts(out, "{\"id\":");
    text_json_string(out, request->id);
    text_format(out, ",\"object\":\"%s\",\"created\":%" PRId64 ",\"model\":", object,
                request->created_s);
    text_json_string(out, self->served_model);
    char version[BIAS_NAME_BYTES];
    bias_name(version, request->bias_version);
    text_format(out, ",\"system_fingerprint\":\"troupe-%s-%s-b%s\"",
                self->member.identity.model_fingerprint, self->member.identity.numerics, version);
}

void answer_write_usage(struct text *out, const struct request *request) {
    uint64_t generated = 0, cached = 0, accepted = 0, rejected = 0;
    for (uint32_t i = 0; i < request->choices; i++) {
        const struct choice *choice = request->choice[i];
        generated += choice->tokens;
        accepted += choice->accepted_drafts + choice->accepted_now;
        rejected += choice->rejected_drafts + choice->rejected_now;
        if (i == 0 || choice->prompt != request->choice[i - 1]->prompt) /* a prompt counts once */
            cached += choice->cached_tokens;
    }
    text_format(out,
                ",\"usage\":{\"prompt_tokens\":%u,\"completion_tokens\":%" PRIu64
                ",\"total_tokens\":%" PRIu64
                ",\"prompt_tokens_details\":{\"cached_tokens\":%" PRIu64
                "},\"completion_tokens_details\":{\"accepted_prediction_tokens\":%" PRIu64
                ",\"rejected_prediction_tokens\":%" PRIu64 "}}",
                request->tokens, generated, request->tokens + generated, cached, accepted, rejected);
}

void answer_write_usage_chunk(struct text *out, const struct gateway *self,
                              const struct request *request) {
    answer_write_head(out, self, request, answer_object(request, true));
    text_puts(out, ",\"choices\":[]");
    answer_write_usage(out, request);
    text_puts(out, "}");
}

void answer_write_finish(struct text *out, const struct choice *choice) {
    const struct generation_request *input = &choice->request->input;
    static const char *const REASONS[] = {
        [FINISH_NOT] = "null", [FINISH_AT_STOP] = "\"stop\"", [FINISH_AT_LENGTH] = "\"length\""};
    text_format(out, ",\"finish_reason\":%s,\"stop_reason\":", REASONS[choice->finish]);
    if (choice->stop.found >= 0) {
        const struct stop_string *string = &input->stop.string[choice->stop.found];
        text_json(out, string->bytes, string->size);
    } else if (choice->stop_token >= 0) {
        text_format(out, "%" PRId64, choice->stop_token);
    } else {
        text_puts(out, "null");
    }
}

void answer_write_tokens(struct text *out, const uint32_t *token, uint32_t count) {
    text_puts(out, "[");
    for (uint32_t i = 0; i < count; i++)
        text_format(out, i == 0 ? "%u" : ",%u", token[i]);
    text_puts(out, "]");
}

static bool is_utf8(const char *bytes, size_t size) {
    while (size > 0) {
        size_t length = utf8_character(bytes, size);
        if (length == 0)
            return false;
        bytes += length;
        size -= length;
    }
    return true;
}

void answer_write_token_name(struct text *out, const struct gateway *self,
                             const struct request *request, uint32_t token) {
    size_t size = 0;
    const char *bytes = tokenizer_bytes(self->tokenizer, token, &size);
    if (request->input.tokens_as_ids || bytes == NULL) {
        text_format(out, "\"token_id:%u\"", token);
    } else if (is_utf8(bytes, size)) {
        text_json(out, bytes, size);
    } else {
        text_puts(out, "\"bytes:");
        for (size_t i = 0; i < size; i++)
            text_format(out, "\\\\x%02x", (uint8_t)bytes[i]);
        text_puts(out, "\"");
    }
}
