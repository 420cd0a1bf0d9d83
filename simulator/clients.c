/* See clients.h. */
#include "simulator/clients.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MS UINT64_C(1000000)
#define RETRY_NS (60 * MS)
#define ATTEMPTS_MAX 20000u

/* ---- text ---- */

static void grow(struct grown_text *self, const char *bytes, size_t size) {
    if (self->size + size + 1 > self->capacity) {
        self->capacity = 2 * (self->size + size) + 64;
        self->bytes = realloc(self->bytes, self->capacity);
        ASSERT(self->bytes != NULL);
    }
    memcpy(self->bytes + self->size, bytes, size);
    self->size += size;
    self->bytes[self->size] = '\0';
}

static void clear(struct grown_text *self) {
    self->size = 0;
    if (self->bytes != NULL)
        self->bytes[0] = '\0';
}

static const char *text_of(const struct grown_text *self) {
    return self->bytes != NULL ? self->bytes : "";
}

static void violate(struct clients *self, uint32_t index, const char *what, const char *expected,
                    const char *found) {
    if (self->violation.code == 0)
        fail(&self->violation, ERR_CORRUPT, "request %u: %s: expected %.150s, found %.150s", index, what,
             expected, found);
}

/* ---- answers ---- */

static void forget_answer(struct client *client) {
    clear(&client->buffer);
    client->status = 0;
    client->finished = client->versioned = false;
    client->last_id[0] = '\0';
    for (uint32_t i = 0; i < CHOICES_DRAWN_MAX; i++) {
        struct answer *answer = &client->answer[i];
        clear(&answer->text);
        clear(&answer->tokens);
        clear(&answer->logprobs);
        answer->finish[0] = '\0';
    }
}

static void check_prefix(struct clients *self, uint32_t index, const char *what,
                         const struct grown_text *expected, const struct grown_text *found) {
    if (found->size > expected->size || memcmp(text_of(expected), text_of(found), found->size) != 0)
        violate(self, index, what, text_of(expected), text_of(found));
}

/* Which version of the routing bias the answer is made with; the same from its first piece to its last. */
static void take_version(struct clients *self, uint32_t index, const json_t *root) {
    struct client *client = &self->client[index];
    const char *fingerprint = json_string_value(json_object_get(root, "system_fingerprint"));
    const char *name = fingerprint != NULL ? strrchr(fingerprint, '-') : NULL;
    uint64_t version = 0;
    if (name == NULL || name[1] != 'b' || bias_name_read(name + 2, 0, &version) == NULL)
        violate(self, index, "system_fingerprint", "a version of the routing bias", fingerprint != NULL ? fingerprint : "none");
    else if (client->versioned && client->version != version)
        violate(self, index, "version of the routing bias", "the one that it was pinned to", fingerprint);
    client->version = version;
    client->versioned = true;
}

/* Invariants: each token once and in order; the stream is the fault-free one of the version that it was pinned to. */
static void check_answer(struct clients *self, uint32_t index, uint32_t choice) {
    if (self->expected == NULL)
        return;
    const struct client *reference = self->expected(self->context, index, self->client[index].version);
    if (reference == NULL) {
        violate(self, index, "version of the routing bias", "one that the coordinator has made", "another one");
        return;
    }
    const struct answer *expected = &reference->answer[choice];
    const struct answer *found = &self->client[index].answer[choice];
    check_prefix(self, index, "tokens", &expected->tokens, &found->tokens);
    check_prefix(self, index, "text", &expected->text, &found->text);
    check_prefix(self, index, "logprobs", &expected->logprobs, &found->logprobs);
    if (found->finish[0] != '\0' && strcmp(found->finish, expected->finish) != 0)
        violate(self, index, "finish_reason", expected->finish, found->finish);
}

static void take_dumped(struct grown_text *out, const json_t *value) {
    char *dumped = json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT | JSON_REAL_PRECISION(12));
    ASSERT(dumped != NULL);
    grow(out, dumped, strlen(dumped));
    grow(out, " ", 1);
    free(dumped);
}

static void take_logprobs(struct answer *answer, const json_t *logprobs) {
    static const char *const LISTS[] = {"tokens", "token_logprobs", "top_logprobs", "text_offset"};
    size_t entries = json_array_size(json_object_get(logprobs, LISTS[0]));
    for (size_t i = 0; i < entries; i++)
        for (size_t list = 0; list < sizeof LISTS / sizeof *LISTS; list++) {
            const json_t *value = json_array_get(json_object_get(logprobs, LISTS[list]), i);
            if (value != NULL)
                take_dumped(&answer->logprobs, value);
        }
}

static void take_choice(struct clients *self, uint32_t index, const json_t *choice) {
    uint64_t number = (uint64_t)json_integer_value(json_object_get(choice, "index"));
    if (number >= self->scenario->request[index].choices) {
        violate(self, index, "index of a choice", "a smaller one", "one that was not asked for");
        return;
    }
    struct answer *answer = &self->client[index].answer[number];
    const json_t *text = json_object_get(choice, "text");
    if (text != NULL)
        grow(&answer->text, json_string_value(text), json_string_length(text));
    const json_t *token;
    size_t i;
    json_array_foreach(json_object_get(choice, "token_ids"), i, token) {
        take_dumped(&answer->tokens, token);
    }
    take_logprobs(answer, json_object_get(choice, "logprobs"));
    const char *finish = json_string_value(json_object_get(choice, "finish_reason"));
    if (finish != NULL && answer->finish[0] != '\0')
        violate(self, index, "finish_reason", "one", "another one");
    else if (finish != NULL)
        strncpy(answer->finish, finish, sizeof answer->finish - 1);
    check_answer(self, index, (uint32_t)number);
}

/* jansson refuses NUL in keys, and a token may be one: read it as U+0001. */
static void spell_nul(char *bytes, size_t size) {
    for (size_t i = 0; i + 6 <= size; i++)
        if (memcmp(bytes + i, "\\u0000", 6) == 0)
            bytes[i + 5] = '1';
}

static void take_json(struct clients *self, uint32_t index, char *bytes, size_t size) {
    spell_nul(bytes, size);
    json_error_t error = {.text = "no choices"};
    json_t *root = json_loadb(bytes, size, JSON_ALLOW_NUL, &error);
    const json_t *choice;
    size_t i;
    if (root == NULL || json_object_get(root, "choices") == NULL) {
        char found[151];
        size_t from = error.position > 40 && (size_t)error.position <= size ? (size_t)error.position - 40 : 0;
        int shown = (int)(size - from < 80 ? size - from : 80);
        snprintf(found, sizeof found, "%.60s near %.*s", error.text, shown, bytes + from);
        violate(self, index, "body of an admitted request", "JSON with choices", found);
    }
    take_version(self, index, root);
    json_array_foreach(json_object_get(root, "choices"), i, choice) {
        take_choice(self, index, choice);
    }
    json_decref(root);
}

/* Whole events at the buffer's start; the rest stays. */
static void take_events(struct clients *self, uint32_t index) {
    struct client *client = &self->client[index];
    static const char PREFIX[] = "data: ";
    size_t at = 0;
    for (const char *end; (end = strstr(text_of(&client->buffer) + at, "\n\n")) != NULL;) {
        char *event = client->buffer.bytes + at;
        size_t size = (size_t)(end - event);
        at += size + 2;
        if (strncmp(event, "id: ", 4) == 0) {
            size_t length = strcspn(event, "\n");
            snprintf(client->last_id, sizeof client->last_id, "%.*s", (int)length - 4, event + 4);
            event += length + 1;
            size -= length + 1;
        }
        if (strncmp(event, PREFIX, sizeof PREFIX - 1) != 0)
            violate(self, index, "an event", "data: ...", event);
        else if (strncmp(event, "data: [DONE]", 12) == 0)
            client->finished = true;
        else
            take_json(self, index, event + sizeof PREFIX - 1, size - (sizeof PREFIX - 1));
    }
    client->buffer.size -= at;
    if (at > 0)
        memmove(client->buffer.bytes, client->buffer.bytes + at, client->buffer.size + 1);
}

/* ---- connections ---- */

static void wait_until(struct client *client, uint64_t at_ns) {
    client->state = CLIENT_WAITING;
    client->at_ns = at_ns;
}

/* Half of the streams. */
static bool goes_on(const struct clients *self, uint32_t index) {
    return self->scenario->request[index].stream && (self->scenario->seed + index) % 2 == 0;
}

static void end_response(struct clients *self, uint32_t index) {
    struct client *client = &self->client[index];
    const struct scenario_request *request = &self->scenario->request[index];
    if (client->status == 410) { /* the bias version that it began with is gone: from the start */
        forget_answer(client);
        wait_until(client, world_now_ns(self->world) + RETRY_NS);
        return;
    }
    if (client->status == 429 || client->status == 503) { /* refused at the door */
        self->refused++;
        wait_until(client, world_now_ns(self->world) + RETRY_NS);
        return;
    }
    client->state = CLIENT_DONE;
    if (client->status != 200) {
        violate(self, index, "status", "200, 429 or 503", text_of(&client->buffer));
        return;
    }
    if (!request->stream) {
        grow(&client->buffer, "", 0);
        take_json(self, index, client->buffer.bytes, client->buffer.size);
        client->finished = true;
    }
    if (!client->finished)
        violate(self, index, "the end of a stream", "[DONE]", text_of(&client->buffer));
    for (uint32_t choice = 0; choice < request->choices; choice++)
        if (client->answer[choice].finish[0] == '\0')
            violate(self, index, "the end of a choice", "a finish_reason", "none");
}

void clients_on_stream(struct clients *self, const struct effect *effect) {
    for (uint32_t index = 0; index < self->scenario->requests; index++) {
        struct client *client = &self->client[index];
        if (client->state != CLIENT_OPEN || client->id != effect->stream.client)
            continue;
        if (effect->stream.status != 0)
            client->status = effect->stream.status;
        grow(&client->buffer, (const char *)effect->stream.bytes, effect->stream.size);
        if (self->scenario->request[index].stream && client->status == 200)
            take_events(self, index);
        if (effect->stream.last)
            end_response(self, index);
    }
}

static void send_request(struct clients *self, uint32_t index) {
    struct client *client = &self->client[index];
    if (world_actor(self->world, ROLE_GATEWAY, 0) == NULL) { /* connection refused */
        wait_until(client, world_now_ns(self->world) + RETRY_NS);
        return;
    }
    const char *body = self->scenario->request[index].body;
    struct http_request request = {.client = ++self->last_id,
                                   .method = "POST",
                                   .path = "/v1/completions",
                                   .query = "",
                                   .body = body,
                                   .body_bytes = strlen(body)};
    char name[32];
    snprintf(name, sizeof name, "r%u", index);
    if (goes_on(self, index)) {
        request.request_id = name;
        request.stream_resume = "1";
        request.last_event_id = client->last_id[0] != '\0' ? client->last_id : NULL;
    }
    if (request.last_event_id == NULL)
        forget_answer(client);
    clear(&client->buffer); /* half an event is nothing */
    client->status = 0;
    client->went_on += request.last_event_id != NULL;
    client->id = request.client;
    client->state = CLIENT_OPEN;
    if (++client->attempts == ATTEMPTS_MAX)
        violate(self, index, "attempts", "fewer", "endless refusals");
    world_http(self->world, &request);
}

uint64_t clients_due_ns(const struct clients *self) {
    uint64_t due_ns = NEVER;
    for (uint32_t i = 0; i < self->scenario->requests; i++)
        if (self->client[i].state == CLIENT_WAITING && self->client[i].at_ns < due_ns)
            due_ns = self->client[i].at_ns;
    return due_ns;
}

void clients_act(struct clients *self) {
    for (uint32_t i = 0; i < self->scenario->requests; i++)
        if (self->client[i].state == CLIENT_WAITING &&
            self->client[i].at_ns <= world_now_ns(self->world))
            send_request(self, i);
}

void clients_hang_up(struct clients *self, uint32_t index) {
    if (index >= self->scenario->requests)
        return;
    struct client *client = &self->client[index];
    if (client->state == CLIENT_OPEN)
        world_client_gone(self->world, client->id);
    if (client->state != CLIENT_DONE)
        client->state = CLIENT_GONE;
}

void clients_on_gateway_end(struct clients *self) {
    for (uint32_t i = 0; i < self->scenario->requests; i++)
        if (self->client[i].state == CLIENT_OPEN)
            wait_until(&self->client[i], world_now_ns(self->world) + RETRY_NS);
}

bool clients_done(const struct clients *self) {
    for (uint32_t i = 0; i < self->scenario->requests; i++)
        if (self->client[i].state == CLIENT_WAITING || self->client[i].state == CLIENT_OPEN)
            return false;
    return true;
}

static bool same(const struct grown_text *a, const struct grown_text *b) {
    return a->size == b->size && memcmp(text_of(a), text_of(b), a->size) == 0;
}

void clients_compare_all(struct clients *self) {
    for (uint32_t i = 0; i < self->scenario->requests; i++) {
        if (self->client[i].state != CLIENT_DONE)
            continue;
        const struct client *reference = self->expected(self->context, i, self->client[i].version);
        for (uint32_t c = 0; reference != NULL && c < self->scenario->request[i].choices; c++) {
            const struct answer *expected = &reference->answer[c];
            const struct answer *found = &self->client[i].answer[c];
            if (!same(&expected->tokens, &found->tokens))
                violate(self, i, "all tokens", text_of(&expected->tokens), text_of(&found->tokens));
            if (!same(&expected->text, &found->text))
                violate(self, i, "all text", text_of(&expected->text), text_of(&found->text));
            if (!same(&expected->logprobs, &found->logprobs))
                violate(self, i, "all logprobs", text_of(&expected->logprobs), text_of(&found->logprobs));
        }
    }
}

/* ---- life ---- */

void clients_open(struct clients *self, const struct scenario *scenario) {
    memset(self, 0, sizeof *self);
    self->scenario = scenario;
    for (uint32_t i = 0; i < scenario->requests; i++)
        wait_until(&self->client[i], scenario->request[i].arrives_ns);
}

void clients_free(struct clients *self) {
    for (uint32_t i = 0; i < REQUESTS_DRAWN_MAX; i++) {
        struct client *client = &self->client[i];
        free(client->buffer.bytes);
        for (uint32_t c = 0; c < CHOICES_DRAWN_MAX; c++) {
            free(client->answer[c].text.bytes);
            free(client->answer[c].tokens.bytes);
            free(client->answer[c].logprobs.bytes);
        }
    }
    memset(self, 0, sizeof *self);
}
