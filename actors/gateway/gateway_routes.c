/* Paths of the HTTP front. One table says what there is, by which methods, and what needs the API
 * key. Everything but completions is answered at once. */
#include <inttypes.h>
#include <string.h>

#include "actors/gateway/gateway.h"
#include "actors/gateway/page.h"

static const char JSON[] = "application/json";

void gateway_answer(struct gateway *self, uint64_t client, uint16_t status,
                    const char *content_type, const char *extra_header, const struct text *body,
                    struct effects *out) {
    struct effect *effect = effects_add(out, EFFECT_STREAM);
    effect->stream.client = client;
    effect->stream.status = status;
    effect->stream.content_type = content_type;
    effect->stream.extra_header = extra_header;
    effect->stream.bytes = effects_copy(out, body->bytes, body->size);
    effect->stream.size = body->size;
    effect->stream.last = true;
    metrics_answered(&self->metrics, status);
}

void gateway_answer_error(struct gateway *self, uint64_t client, const struct http_error *error,
                          struct effects *out) {
    struct text body = {0};
    http_error_write(&body, error);
    const char *header = error->allow;
    if (error->retry_after_s > 0) {
        struct text line = {0};
        text_format(&line, "Retry-After: %u", error->retry_after_s);
        text_append(&line, "", 1);
        header = effects_copy(out, line.bytes, line.size);
        text_free(&line);
    }
    gateway_answer(self, client, error->status, JSON, header, &body, out);
    text_free(&body);
}

void gateway_count(const struct gateway *self, uint32_t *ret_running, uint32_t *ret_waiting) {
    *ret_running = *ret_waiting = 0;
    for (uint32_t i = 0; i < self->requests; i++)
        for (uint32_t c = 0; c < self->request[i]->choices; c++) {
            const struct choice *choice = self->request[i]->choice[c];
            if (choice->state == CHOICE_FINISHED)
                continue;
            bool running =
                choice->tokens > 0 || (choice->scorer && choice->prompt->score.count > 0);
            *(running ? ret_running : ret_waiting) += 1;
        }
}

/* ---- what is asked ---- */

static void live(struct gateway *self, const struct http_request *http, uint64_t now_ns,
                 struct effects *out) {
    text_puts(&self->line, "{\"status\":\"alive\"}");
    gateway_answer(self, http->client, 200, JSON, NULL, &self->line, out);
}

/* Would a request be served now? The epoch must say so, and somebody must be there to take it. */
static void ready(struct gateway *self, const struct http_request *http, uint64_t now_ns,
                  struct effects *out) {
    bool somebody = false;
    for (uint32_t i = 0; i < self->member.peers; i++) {
        const struct peer *peer = &self->member.peer[i];
        somebody = somebody || (peer->role == ROLE_ATTENTION && !peer->lost &&
                                peer->state == TROUPE__ACTOR_STATE__STATE_READY);
    }
    if (self->member.serving && somebody) {
        text_format(&self->line, "{\"status\":\"ready\",\"epoch\":%" PRIu64 "}",
                    self->member.epoch);
        gateway_answer(self, http->client, 200, JSON, NULL, &self->line, out);
        return;
    }
    struct http_error error;
    http_fail(&error, 503, NULL, "not ready: epoch %" PRIu64 ", %s", self->member.epoch,
              self->member.id == 0 ? "the coordinator has not answered yet"
              : !self->member.serving
                  ? "some expert has no live holder, or attention or samplers are missing"
                  : "no attention actor is ready");
    error.retry_after_s = 1;
    gateway_answer_error(self, http->client, &error, out);
}

static void version(struct gateway *self, const struct http_request *http, uint64_t now_ns,
                    struct effects *out) {
    text_puts(&self->line, "{\"version\":");
    text_json_string(&self->line, self->version);
    text_puts(&self->line, "}");
    gateway_answer(self, http->client, 200, JSON, NULL, &self->line, out);
}

static void metrics(struct gateway *self, const struct http_request *http, uint64_t now_ns,
                    struct effects *out) {
    struct metrics_now now = {
        .model = self->served_model,
        .requests = self->requests,
        .epoch = self->member.epoch,
        .bias_version = bias_number(self->member.bias_version),
        .bias = &self->bias,
        .serving = self->member.serving,
        .replicas = self->settings.replicas,
        .unrepaired_ns =
            self->feed.unrepaired_ns == NEVER ? 0 : now_ns - self->feed.unrepaired_ns,
    };
    gateway_count(self, &now.running, &now.waiting);
    metrics_write(&self->line, &self->metrics, &now, &self->cluster);
    gateway_answer(self, http->client, 200, "text/plain; version=0.0.4; charset=utf-8", NULL,
                   &self->line, out);
}

static void write_model(struct gateway *self, struct text *line, uint64_t now_ns) {
    text_puts(line, "{\"id\":");
    text_json_string(line, self->served_model);
    text_format(line,
                ",\"object\":\"model\",\"created\":%" PRId64 ",\"owned_by\":\"troupe\",\"root\":",
                self->unix_offset_ns / 1000000000);
    text_json_string(line, self->served_model);
    text_format(line, ",\"parent\":null,\"max_model_len\":%u}", self->context);
}

static void models(struct gateway *self, const struct http_request *http, uint64_t now_ns,
                   struct effects *out) {
    text_puts(&self->line, "{\"object\":\"list\",\"data\":[");
    write_model(self, &self->line, now_ns);
    text_puts(&self->line, "]}");
    gateway_answer(self, http->client, 200, JSON, NULL, &self->line, out);
}

static void model(struct gateway *self, const struct http_request *http, uint64_t now_ns,
                  struct effects *out) {
    const char *name = http->path + strlen("/v1/models/");
    if (strcmp(name, self->served_model) != 0) {
        struct http_error error;
        http_fail(&error, 404, "model",
                  "The model `%.200s` does not exist; `%.200s` is served here", name,
                  self->served_model);
        gateway_answer_error(self, http->client, &error, out);
        return;
    }
    write_model(self, &self->line, now_ns);
    gateway_answer(self, http->client, 200, JSON, NULL, &self->line, out);
}

static void completions(struct gateway *self, const struct http_request *http, uint64_t now_ns,
                        struct effects *out) {
    request_begin(self, ENDPOINT_COMPLETIONS, http, now_ns, out);
}

static void chat_completions(struct gateway *self, const struct http_request *http, uint64_t now_ns,
                             struct effects *out) {
    request_begin(self, ENDPOINT_CHAT, http, now_ns, out);
}

/* ---- tokens ---- */

static void write_tokenized(struct gateway *self, const struct generation_request *input,
                            const struct token_list *list) {
    struct text *line = &self->line;
    text_format(line, "{\"count\":%u,\"max_model_len\":%u,\"tokens\":", list->count, self->context);
    answer_write_tokens(line, list->token, list->count);
    text_puts(line, ",\"token_strs\":");
    if (!input->return_token_strs) {
        text_puts(line, "null}");
        return;
    }
    for (uint32_t i = 0; i < list->count; i++) {
        size_t size = 0;
        const char *bytes = tokenizer_bytes(self->tokenizer, list->token[i], &size);
        text_puts(line, i == 0 ? "[" : ",");
        text_json(line, bytes, size);
    }
    text_puts(line, list->count == 0 ? "[]}" : "]}");
}

static void tokenize(struct gateway *self, const struct http_request *http, uint64_t now_ns,
                     struct effects *out) {
    struct generation_request input;
    struct http_error error;
    if (request_parse(&input, ENDPOINT_TOKENIZE, http->body, http->body_bytes, &self->limits,
                      &error) < 0) {
        gateway_answer_error(self, http->client, &error, out);
        return;
    }
    struct token_list list = {0};
    if (request_tokenize(self, &input, 0, &list, &error) < 0) {
        gateway_answer_error(self, http->client, &error, out);
    } else {
        write_tokenized(self, &input, &list);
        gateway_answer(self, http->client, 200, JSON, NULL, &self->line, out);
    }
    token_list_free(&list);
    request_free(&input);
}

static void detokenize(struct gateway *self, const struct http_request *http, uint64_t now_ns,
                       struct effects *out) {
    struct generation_request input;
    struct http_error error;
    if (request_parse(&input, ENDPOINT_DETOKENIZE, http->body, http->body_bytes, &self->limits,
                      &error) < 0) {
        gateway_answer_error(self, http->client, &error, out);
        return;
    }
    struct text raw = {0};
    for (uint32_t i = 0; i < input.prompt[0].tokens; i++) {
        size_t size = 0;
        const char *bytes = tokenizer_bytes(self->tokenizer, input.prompt[0].token[i], &size);
        text_append(&raw, bytes, size);
    }
    text_puts(&self->line, "{\"prompt\":");
    text_json(&self->line, raw.bytes, raw.size);
    text_puts(&self->line, "}");
    text_free(&raw);
    gateway_answer(self, http->client, 200, JSON, NULL, &self->line, out);
    request_free(&input);
}

static void write_special(struct gateway *self, const char *name, int32_t token) {
    size_t size = 0;
    const char *bytes = token < 0 ? NULL : tokenizer_bytes(self->tokenizer, (uint32_t)token, &size);
    text_format(&self->line, ",\"%s\":", name);
    if (bytes == NULL)
        text_puts(&self->line, "null");
    else
        text_json(&self->line, bytes, size);
}

static void tokenizer_info(struct gateway *self, const struct http_request *http, uint64_t now_ns,
                           struct effects *out) {
    text_format(&self->line,
                "{\"tokenizer_class\":\"PreTrainedTokenizerFast\",\"vocab_size\":%u,"
                "\"model_max_length\":%u,\"add_bos_token\":%s",
                tokenizer_vocabulary(self->tokenizer), self->context,
                tokenizer_adds_bos(self->tokenizer) ? "true" : "false");
    write_special(self, "bos_token", tokenizer_bos(self->tokenizer));
    write_special(self, "eos_token", tokenizer_eos(self->tokenizer));
    write_special(self, "pad_token", self->config.pad);
    const char *chat_template = tokenizer_chat_template(self->tokenizer);
    text_puts(&self->line, ",\"chat_template\":");
    if (chat_template == NULL)
        text_puts(&self->line, "null");
    else
        text_json_string(&self->line, chat_template);
    text_puts(&self->line, "}");
    gateway_answer(self, http->client, 200, JSON, NULL, &self->line, out);
}

/* ---- the live view ---- */

struct event_source gateway_event_source(const struct gateway *self) {
    struct event_source source = {
        .cluster = &self->cluster,
        .metrics = &self->metrics,
        .config = &self->config,
        .model = self->served_model,
        .version = self->version,
        .incarnation = self->member.identity.incarnation,
        .unix_offset_ns = self->unix_offset_ns,
        .heartbeat_ms = self->settings.heartbeat_ms,
    };
    gateway_count(self, &source.running, &source.waiting);
    return source;
}

static void page(struct gateway *self, const struct http_request *http, uint64_t now_ns,
                 struct effects *out) {
    text_append(&self->line, page_html, page_html_bytes);
    gateway_answer(self, http->client, 200, "text/html; charset=utf-8",
                   PAGE_SECURITY, &self->line, out);
}

static void events(struct gateway *self, const struct http_request *http, uint64_t now_ns,
                   struct effects *out) {
    if (strcmp(http->method, "HEAD") == 0) {
        gateway_answer(self, http->client, 200, "text/event-stream", NULL, &self->line, out);
        return;
    }
    struct event_source source = gateway_event_source(self);
    source.admin = http->admin;
    source.faults = http->admin && self->allow_faults;
    if (events_join(&self->feed, &source, http->client, now_ns, out)) {
        metrics_answered(&self->metrics, 200);
        return;
    }
    struct http_error error;
    http_fail(&error, 503, NULL, "%d clients listen to the events already, which is the limit",
              EVENTS_LISTENERS_MAX);
    error.retry_after_s = 1;
    gateway_answer_error(self, http->client, &error, out);
}

static void requests(struct gateway *self, const struct http_request *http, uint64_t now_ns,
                     struct effects *out) {
    trace_write_list(&self->line, self);
    gateway_answer(self, http->client, 200, JSON, NULL, &self->line, out);
}

static void request_way(struct gateway *self, const struct http_request *http, uint64_t now_ns,
                        struct effects *out) {
    const char *id = http->path + strlen("/troupe/requests/");
    if (trace_write(&self->line, self, id)) {
        gateway_answer(self, http->client, 200, JSON, NULL, &self->line, out);
        return;
    }
    struct http_error error;
    http_fail(&error, 404, NULL, "no request %.100s is known: the last %u are", id, REQUEST_TRACES);
    gateway_answer_error(self, http->client, &error, out);
}

/* {"file": PATH} begins a recording of the feed, {"stop": true} ends it. The host answers. */
static void journal(struct gateway *self, const struct http_request *http, uint64_t now_ns,
                    struct effects *out) {
    struct http_error error;
    json_t *body = NULL;
    int code = request_parse_json(&body, http->body, http->body_bytes, &error);
    const char *file = json_string_value(json_object_get(body, "file"));
    bool stop = json_is_true(json_object_get(body, "stop"));
    if (code == 0 && (file == NULL) != stop)
        code = http_fail(&error, 400, "file", "expected {\"file\": PATH} or {\"stop\": true}");
    if (code < 0) {
        gateway_answer_error(self, http->client, &error, out);
    } else {
        struct effect *effect = effects_add(out, EFFECT_JOURNAL);
        effect->admin.client = http->client;
        effect->admin.text = file == NULL ? NULL : effects_copy(out, file, strlen(file) + 1);
    }
    json_decref(body);
}

/* ---- the table ---- */

static const struct route {
    const char *path;
    bool prefix; /* `path` and something after it */
    bool post;   /* else GET and HEAD */
    bool open;   /* asks for no key */
    bool view;   /* there only with the live view */
    void (*handle)(struct gateway *self, const struct http_request *http, uint64_t now_ns,
                   struct effects *out);
    bool admin; /* at the admin socket only */
} ROUTES[] = {
    {"/v1/completions", false, true, false, false, completions, false},
    {"/v1/chat/completions", false, true, false, false, chat_completions, false},
    {"/v1/models", false, false, false, false, models, false},
    {"/v1/models/", true, false, false, false, model, false},
    {"/tokenize", false, true, false, false, tokenize, false},
    {"/detokenize", false, true, false, false, detokenize, false},
    {"/tokenizer_info", false, false, false, false, tokenizer_info, false},
    {"/live", false, false, true, false, live, false},
    {"/ready", false, false, true, false, ready, false},
    {"/health", false, false, true, false, ready, false},
    {"/version", false, false, true, false, version, false},
    {"/metrics", false, false, true, false, metrics, false},
    {"/", false, false, true, true, page, false},
    {"/troupe/events", false, false, false, true, events, false},
    {"/troupe/requests", false, false, false, true, requests, false},
    {"/troupe/requests/", true, false, false, true, request_way, false},
    {"/troupe/journal", false, true, false, true, journal, true},
};

static const struct route *find_route(const char *path, bool view, bool admin) {
    for (size_t i = 0; i < sizeof ROUTES / sizeof ROUTES[0]; i++) {
        size_t length = strlen(ROUTES[i].path);
        if ((ROUTES[i].view && !view && !admin) || (ROUTES[i].admin && !admin))
            continue;
        if (ROUTES[i].prefix ? strncmp(path, ROUTES[i].path, length) == 0 && path[length] != '\0'
                             : strcmp(path, ROUTES[i].path) == 0)
            return &ROUTES[i];
    }
    return NULL;
}

/* Compares in a time that does not tell how much of the key was right. */
static bool has_key(const struct gateway *self, const struct http_request *http) {
    static const char SCHEME[] = "Bearer ";
    if (self->api_key == NULL)
        return true;
    if (http->authorization == NULL ||
        strncasecmp(http->authorization, SCHEME, sizeof SCHEME - 1) != 0) /* schemes know no case */
        return false;
    const char *given = http->authorization + sizeof SCHEME - 1;
    size_t given_bytes = strlen(given), key_bytes = strlen(self->api_key);
    unsigned difference = given_bytes != key_bytes;
    for (size_t i = 0; i < given_bytes; i++)
        difference |= (unsigned)(given[i] ^ self->api_key[key_bytes == 0 ? 0 : i % key_bytes]);
    return difference == 0;
}

static bool method_fits(const struct route *route, const char *method) {
    if (route->post)
        return strcmp(method, "POST") == 0;
    return strcmp(method, "GET") == 0 || strcmp(method, "HEAD") == 0;
}

void gateway_route(struct gateway *self, const struct http_request *http, uint64_t now_ns,
                   struct effects *out) {
    const struct route *route = find_route(http->path, self->view, http->admin);
    struct http_error error;
    text_clear(&self->line);
    if (route == NULL) {
        http_fail(&error, 404, NULL, "there is nothing at %.200s", http->path);
    } else if (!method_fits(route, http->method)) {
        http_fail(&error, 405, NULL, "%.100s takes %s, found %.32s", route->path,
                  route->post ? "POST" : "GET", http->method);
        error.allow = route->post ? "Allow: POST" : "Allow: GET, HEAD";
    } else if (!route->open && !http->admin && !has_key(self, http)) {
        http_fail(&error, 401, NULL,
                  "a valid API key was expected in \"Authorization: Bearer KEY\", found %s",
                  http->authorization == NULL ? "none" : "another one");
    } else {
        route->handle(self, http, now_ns, out);
        return;
    }
    gateway_answer_error(self, http->client, &error, out);
}
