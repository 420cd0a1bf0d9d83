/* A request's life: parsed, tokenised, one choice per prompt and i of n, submitted, answered at
 * once when all is there or in events as it comes, ended by completion, an error, or its client
 * going away. However it ends, its attention actors are told to forget its sequences, and nothing
 * of it stays.
 *
 * Invariants: 1. the first STREAM of a client carries status and content type, exactly one carries
 * `last`; 2. the status is sent no earlier than the first words, so that whatever fails before can
 * still be said by it. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "actors/gateway/gateway.h"

static void stream(struct gateway *self, struct request *request, const struct text *bytes,
                   bool last, struct effects *out) {
    struct effect *effect = effects_add(out, EFFECT_STREAM);
    effect->stream.client = request->client;
    if (!request->begun) {
        effect->stream.status = 200;
        effect->stream.content_type =
            request->input.stream ? "text/event-stream" : "application/json";
        effect->stream.extra_header = trace_header(request, out);
        metrics_answered(&self->metrics, 200);
        request->begun = true;
    }
    effect->stream.bytes = effects_copy(out, bytes->bytes, bytes->size);
    effect->stream.size = bytes->size;
    effect->stream.last = last;
}

static void free_prompt(struct prompt *prompt) {
    free(prompt->token);
    free(prompt->offset);
    text_free(&prompt->echo);
    scored_list_free(&prompt->score);
}

static void free_request(struct gateway *self, struct request *request) {
    upstream_unpin(self, request);
    for (uint32_t i = 0; i < request->choices; i++)
        choice_free(self, &request->choice[i]);
    for (uint32_t i = 0; i < request->prompts; i++)
        free_prompt(&request->prompt[i]);
    free(request->choice);
    free(request->prompt);
    request_free(&request->input);
    free(request);
}

/* Takes a request out of the gateway; its attention actors are told. */
static void end(struct gateway *self, struct request *request, enum metric_finish unfinished,
                uint64_t now_ns, struct effects *out) {
    for (uint32_t i = 0; i < request->choices; i++) {
        struct choice *choice = request->choice[i];
        if (!choice->ended)
            self->metrics.finished[unfinished]++;
        if (choice->state == CHOICE_PLACED)
            upstream_leave(self, choice, true, now_ns, out);
        choice->state = CHOICE_FINISHED;
    }
    trace_ended(request, unfinished, now_ns);
    self->prompt_tokens -= request->tokens;
    struct request *moved = self->request[--self->requests];
    self->request[request->place] = moved;
    moved->place = request->place;
    free_request(self, request);
}

void request_fail(struct gateway *self, struct request *request, const struct http_error *error,
                  uint64_t now_ns, struct effects *out) {
    if (!request->begun) {
        gateway_answer_error(self, request->client, error, out);
    } else {
        text_clear(&self->line);
        text_puts(&self->line, "data: ");
        http_error_write(&self->line, error);
        text_puts(&self->line, "\n\ndata: [DONE]\n\n");
        stream(self, request, &self->line, true, out);
    }
    end(self, request, METRIC_ERROR, now_ns, out);
}

void request_abort(struct gateway *self, struct request *request, uint64_t now_ns,
                   struct effects *out) {
    end(self, request, METRIC_ABORT, now_ns, out);
}

/* The client's own id if it can stand in a header and a log line, else one of ours. */
static void name_request(struct gateway *self, struct request *request, const char *wanted) {
    static const char ALLOWED[] =
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.";
    const char *kind = request->input.endpoint == ENDPOINT_CHAT ? "chatcmpl" : "cmpl";
    size_t length = wanted == NULL ? 0 : strlen(wanted);
    if (length > 0 && length <= 64 && strspn(wanted, ALLOWED) == length) {
        snprintf(request->id, sizeof request->id, "%s-%s", kind, wanted);
        request->named = true;
        return;
    }
    self->counter++;
    snprintf(request->id, sizeof request->id, "%s-%016" PRIx64 "%08" PRIx64, kind,
             gateway_mix(self->sequence_key, self->counter), self->counter & 0xffffffff);
}

static int check_room(const struct gateway *self, struct http_error *error) {
    uint32_t busy = 0;
    for (uint32_t i = 0; i < self->requests; i++)
        busy += self->request[i]->choices;
    if (self->requests < self->settings.max_requests && busy < (1u << CHOICE_SLOT_BITS) / 2)
        return 0;
    http_fail(error, 503, NULL, "this gateway has %u requests in hand, at most %u; try again later",
              self->requests, self->settings.max_requests);
    error->retry_after_s = 1;
    return ERR_BUSY;
}

static void create_choices(struct gateway *self, struct request *request) {
    uint32_t n = (uint32_t)request->input.n;
    request->choices = request->prompts * n;
    request->choice = calloc(request->choices, sizeof(struct choice *));
    ASSERT(request->choice != NULL && "memory for choices");
    struct chat_options options = {.add_generation_prompt = request->input.add_generation_prompt,
                                   .thinking = request->input.thinking};
    request->starts_in_reasoning =
        request->input.endpoint == ENDPOINT_CHAT && chat_starts_in_reasoning(self->chat, &options);
    for (uint32_t i = 0; i < request->choices; i++) {
        request->choice[i] = choice_create(self, request, &request->prompt[i / n], i);
        metrics_observe(&self->metrics, METRIC_PARAMS_MAX_TOKENS,
                        request->prompt[i / n].max_tokens);
    }
    metrics_observe(&self->metrics, METRIC_PARAMS_N, n);
}

void request_begin(struct gateway *self, enum endpoint endpoint, const struct http_request *http,
                   uint64_t now_ns, struct effects *out) {
    struct http_error error;
    struct request *request = calloc(1, sizeof *request);
    ASSERT(request != NULL && "memory for a request");
    request->client = http->client;
    request->arrived_ns = now_ns;
    request->created_s = ((int64_t)now_ns + self->unix_offset_ns) / 1000000000;
    int code = check_room(self, &error);
    if (code == 0)
        code = request_parse(&request->input, endpoint, http->body, http->body_bytes, &self->limits,
                             &error);
    if (code == 0)
        code = request_take_prompts(self, request, &error);
    if (code < 0) {
        gateway_answer_error(self, http->client, &error, out);
        free_request(self, request);
        return;
    }
    name_request(self, request, http->request_id);
    request->resumable = request->input.stream &&
                         (http->stream_resume != NULL || http->last_event_id != NULL);
    self->request = gateway_grow(self->request, &self->requests_capacity, self->requests + 1,
                                 sizeof(struct request *));
    request->place = self->requests;
    self->request[self->requests++] = request;
    self->prompt_tokens += request->tokens;
    create_choices(self, request);
    trace_request(self, request, http, now_ns);
    if (request->resumable && resume_take_id(request, http->last_event_id, &error) < 0) {
        request_fail(self, request, &error, now_ns, out);
        return;
    }
    for (uint32_t i = 0; i < request->choices; i++)
        request->choice[i]->waiting_since_ns = now_ns;
    uint32_t choices = request->choices;
    for (uint32_t i = 0; i < choices; i++)
        if (!upstream_place(self, request->choice[i], now_ns, out))
            return; /* refused; the request is gone */
}

/* Is there anything that the client does not have yet? */
static bool has_news(const struct choice *choice) {
    const struct generation_request *input = &choice->request->input;
    bool tokens = choice->tokens > choice->sent_tokens &&
                  (input->logprobs != ABSENT || input->return_token_ids);
    return choice->answer.size > 0 || choice->thought.size > 0 || tokens ||
           choice->finish != FINISH_NOT;
}

static void send_chunk(struct gateway *self, struct choice *choice, struct effects *out) {
    struct request *request = choice->request;
    struct text *line = &self->line;
    text_clear(line);
    choice->sent = true;
    if (request->resumable)
        resume_write_id(line, request);
    text_puts(line, "data: ");
    if (request->input.endpoint == ENDPOINT_CHAT)
        chat_write_chunk(line, self, choice);
    else
        completion_write_chunk(line, self, choice);
    text_puts(line, "\n\n");
    stream(self, request, line, false, out);
    choice->begun = true;
    choice->sent_tokens = choice->tokens;
    scored_list_clear(&choice->score);
    text_clear(&choice->thought);
    text_clear(&choice->answer);
}

/* vLLM's phases: until it is scheduled, until its first token, until its last one. */
static void count_phases(struct metrics *metrics, const struct choice *choice) {
    if (choice->first_token_ns == 0)
        return;
    uint64_t begun_ns = choice->request->arrived_ns + choice->queue_ns;
    double prefill = begun_ns < choice->first_token_ns
                         ? (double)(choice->first_token_ns - begun_ns) * 1e-9
                         : 0;
    double decode = (double)(choice->last_token_ns - choice->first_token_ns) * 1e-9;
    metrics_observe(metrics, METRIC_QUEUE_TIME, (double)choice->queue_ns * 1e-9);
    metrics_observe(metrics, METRIC_PREFILL_TIME, prefill);
    metrics_observe(metrics, METRIC_DECODE_TIME, decode);
    metrics_observe(metrics, METRIC_INFERENCE_TIME, prefill + decode);
}

static void count_choice(struct gateway *self, const struct choice *choice, uint64_t now_ns) {
    struct metrics *metrics = &self->metrics;
    metrics->finished[choice->finish == FINISH_AT_STOP ? METRIC_STOP : METRIC_LENGTH]++;
    metrics_observe(metrics, METRIC_E2E_LATENCY,
                    (double)(now_ns - choice->request->arrived_ns) * 1e-9);
    metrics_observe(metrics, METRIC_PROMPT_TOKENS, choice->prompt->tokens);
    metrics_observe(metrics, METRIC_GENERATION_TOKENS, choice->tokens);
    count_phases(metrics, choice);
    if (choice->tokens > 1)
        metrics_observe(metrics, METRIC_REQUEST_TIME_PER_TOKEN,
                        (double)(choice->last_token_ns - choice->first_token_ns) * 1e-9 /
                            (choice->tokens - 1));
}

static void complete(struct gateway *self, struct request *request, uint64_t now_ns,
                     struct effects *out) {
    struct text *line = &self->line;
    text_clear(line);
    if (request->input.stream) {
        if (request->input.include_usage) {
            text_puts(line, "data: ");
            answer_write_usage_chunk(line, self, request);
            text_puts(line, "\n\n");
        }
        text_puts(line, "data: [DONE]\n\n");
    } else if (request->input.endpoint == ENDPOINT_CHAT) {
        chat_write(line, self, request);
    } else {
        completion_write(line, self, request);
    }
    stream(self, request, line, true, out);
    uint32_t longest = 0;
    bool stopped = true;
    for (uint32_t i = 0; i < request->choices; i++) {
        const struct choice *choice = request->choice[i];
        longest = choice->tokens > longest ? choice->tokens : longest;
        stopped = stopped && choice->finish == FINISH_AT_STOP;
    }
    metrics_observe(&self->metrics, METRIC_MAX_GENERATION_TOKENS, longest);
    trace_ended(request, stopped ? METRIC_STOP : METRIC_LENGTH, now_ns);
    end(self, request, METRIC_ABORT, now_ns, out);
}

bool request_emit(struct gateway *self, struct choice *choice, uint64_t now_ns,
                  struct effects *out) {
    struct request *request = choice->request;
    if (choice->ended || !prompt_complete(choice->prompt))
        return false;
    if (request->input.stream && has_news(choice) && !choice->told_end)
        send_chunk(self, choice, out);
    if (choice->finish == FINISH_NOT)
        return false;
    choice->ended = true;
    count_choice(self, choice, now_ns);
    if (++request->ended < request->choices)
        return false;
    complete(self, request, now_ns, out);
    return true;
}
