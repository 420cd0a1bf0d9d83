/* See gateway_rig.h. */
#include "tests/support/gateway_rig.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "actors/bias_table.h"
#include "model/tokenizer.h"
#include "proto/wire.h"
#include "tests/support/random.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#define COORDINATOR_INCARNATION 77
#define GATEWAY_ID              9

static char *read_file(const char *name, size_t *ret_size) {
    char path[256];
    snprintf(path, sizeof path, "%s/%s", RIG_MODEL, name);
    FILE *file = fopen(path, "rb");
    if (file == NULL)
        fail_msg("%s is missing; tests run from the root of the repository", path);
    fseek(file, 0, SEEK_END);
    *ret_size = (size_t)ftell(file);
    rewind(file);
    char *bytes = malloc(*ret_size + 1);
    assert_int_equal(fread(bytes, 1, *ret_size, file), *ret_size);
    bytes[*ret_size] = '\0';
    fclose(file);
    return bytes;
}

static void load_model(struct rig *rig) {
    struct failure failure;
    size_t config_bytes, generation_bytes, tokenizer_bytes_, template_bytes;
    char *config = read_file("config.json", &config_bytes);
    char *generation = read_file("generation_config.json", &generation_bytes);
    char *tokenizer = read_file("tokenizer.json", &tokenizer_bytes_);
    char *template = read_file("tokenizer_config.json", &template_bytes);
    if (model_config_parse(&rig->config, config, config_bytes, generation, generation_bytes,
                           &failure) < 0 ||
        tokenizer_open(&rig->tokenizer, tokenizer, tokenizer_bytes_, template, template_bytes,
                       &failure) < 0)
        fail_msg("%s", failure.text);
    free(config);
    free(generation);
    free(tokenizer);
    free(template);
}

/* ---- the network ---- */

static void post_bytes(struct rig *rig, actor_id to, const uint8_t *bytes, size_t size) {
    if (rig->messages == rig->capacity) {
        rig->capacity = rig->capacity == 0 ? 64 : rig->capacity * 2;
        rig->message = realloc(rig->message, rig->capacity * sizeof *rig->message);
    }
    uint8_t *copy = malloc(size + 1);
    memcpy(copy, bytes, size);
    rig->message[rig->messages++] = (struct rig_message){to, copy, size};
}

static void send_lossy(struct rig *rig, actor_id to, const uint8_t *bytes, size_t size) {
    if (random_float(&rig->seed, 0, 1) < (float)rig->loss)
        return;
    post_bytes(rig, to, bytes, size);
    if (random_float(&rig->seed, 0, 1) < (float)rig->duplicate)
        post_bytes(rig, to, bytes, size);
}

void rig_message(struct rig *rig, actor_id from, uint64_t incarnation, message *envelope) {
    envelope->protocol_version = WIRE_PROTOCOL_VERSION;
    envelope->from = from;
    envelope->from_incarnation = incarnation;
    struct event event = {.kind = EVENT_MESSAGE, .message = envelope};
    rig_deliver(rig, &event);
}

static void reply(struct rig *rig, const struct rig_attention *attention, message *envelope) {
    envelope->protocol_version = WIRE_PROTOCOL_VERSION;
    envelope->from = attention->id;
    envelope->from_incarnation = attention->incarnation;
    size_t size = wire_packed_bytes(envelope);
    uint8_t *bytes = malloc(size);
    wire_pack(envelope, bytes);
    send_lossy(rig, 0, bytes, size);
    free(bytes);
}

/* ---- the attention actors ---- */

uint32_t rig_next(const struct rig *rig, const struct rig_sequence *sequence) {
    uint32_t generated = sequence->tokens - sequence->prompt_tokens;
    if (rig->script != NULL)
        return generated < rig->script_tokens ? rig->script[generated]
                                              : (uint32_t)rig->config.eos[0];
    uint64_t state = (sequence->temperature == 0 ? 0 : sequence->seed) * 31 +
                     sequence->tokens * 1009u + sequence->token[sequence->tokens - 1] +
                     bias_number(sequence->bias_version) * 7919u;
    return 3 + random_below(&state, 4000);
}

float rig_logprob(uint32_t token, uint32_t position) {
    uint64_t state = token * 65599u + position;
    return -random_float(&state, 0.01f, 20);
}

static struct rig_sequence *find(struct rig_attention *attention, uint64_t id) {
    for (uint32_t i = 0; i < attention->sequences; i++)
        if (attention->sequence[i].id == id)
            return &attention->sequence[i];
    return NULL;
}

static void forget(struct rig_attention *attention, struct rig_sequence *sequence) {
    free(sequence->token);
    *sequence = attention->sequence[--attention->sequences];
}

static void make_token(Troupe__Token *token, Troupe__TopLogprob *top, Troupe__TopLogprob **list,
                       uint32_t id, uint32_t position, uint32_t alternatives) {
    troupe__token__init(token);
    token->id = id;
    token->logprob = rig_logprob(id, position);
    token->n_top = alternatives;
    token->top = list;
    for (uint32_t i = 0; i < alternatives; i++) {
        troupe__top_logprob__init(&top[i]);
        top[i].token = 100 + (id + i) % 3000;
        top[i].logprob = -0.5f * (float)(i + 1);
        list[i] = &top[i];
    }
}

#define BURST 2048
static void tell(struct rig *rig, struct rig_attention *attention, struct rig_sequence *sequence,
                 uint32_t first, uint32_t first_prompt, uint32_t most_prompt) {
    static Troupe__Token token[BURST], prompt[BURST];
    static Troupe__Token *token_list[BURST], *prompt_list[BURST];
    static Troupe__TopLogprob top[2][BURST][20], *top_list[2][BURST][20];
    Troupe__Tokens tokens = TROUPE__TOKENS__INIT;
    tokens.sequence = sequence->id;
    tokens.first = first;
    tokens.token = token_list;
    tokens.prompt_first = first_prompt;
    tokens.prompt = prompt_list;
    uint32_t generated = sequence->tokens - sequence->prompt_tokens;
    uint32_t alternatives = sequence->logprobs ? sequence->top : 0;
    for (uint32_t i = first; i < generated && tokens.n_token < BURST; i++) {
        uint32_t at = (uint32_t)tokens.n_token++;
        make_token(&token[at], top[0][at], top_list[0][at],
                   sequence->token[sequence->prompt_tokens + i], sequence->prompt_tokens + i,
                   alternatives);
        token_list[at] = &token[at];
    }
    for (uint32_t i = first_prompt; sequence->prompt_logprobs && i + 1 < sequence->prompt_tokens &&
                                    tokens.n_prompt < most_prompt;
         i++) {
        uint32_t at = (uint32_t)tokens.n_prompt++;
        make_token(&prompt[at], top[1][at], top_list[1][at], sequence->token[i + 1], i + 1,
                   sequence->top);
        prompt_list[at] = &prompt[at];
    }
    if (sequence->done)
        tokens.finish = generated >= sequence->max_tokens ? TROUPE__FINISH_REASON__FINISH_LENGTH
                                                          : TROUPE__FINISH_REASON__FINISH_STOP;
    Troupe__Tokens *list[] = {&tokens};
    Troupe__TokensBatch batch = TROUPE__TOKENS_BATCH__INIT;
    batch.n_tokens = 1;
    batch.tokens = list;
    message envelope = TROUPE__ENVELOPE__INIT;
    envelope.body_case = TROUPE__ENVELOPE__BODY_TOKENS;
    envelope.tokens = &batch;
    reply(rig, attention, &envelope);
}

static void reject(struct rig *rig, struct rig_attention *attention, uint64_t sequence, int code,
                   bool unknown) {
    Troupe__Rejected rejected = TROUPE__REJECTED__INIT;
    rejected.sequence = sequence;
    rejected.code = code;
    rejected.unknown = unknown;
    rejected.reason = unknown ? "unknown" : "the fake refuses";
    message envelope = TROUPE__ENVELOPE__INIT;
    envelope.body_case = TROUPE__ENVELOPE__BODY_REJECTED;
    envelope.rejected = &rejected;
    reply(rig, attention, &envelope);
}

static bool holds_bias(const struct rig_attention *attention, uint64_t version) {
    for (uint32_t i = 0; i < attention->biases; i++)
        if (attention->bias[i] == version)
            return true;
    return version == 0;
}

static void want_bias(struct rig *rig, struct rig_attention *attention,
                      const Troupe__Submit *submit) {
    Troupe__Rejected rejected = TROUPE__REJECTED__INIT;
    rejected.sequence = submit->sequence;
    rejected.code = ERR_NOT_FOUND;
    rejected.bias_wanted = submit->bias_version;
    rejected.reason = "not here";
    message envelope = TROUPE__ENVELOPE__INIT;
    envelope.body_case = TROUPE__ENVELOPE__BODY_REJECTED;
    envelope.rejected = &rejected;
    attention->bias_asked++;
    reply(rig, attention, &envelope);
}

static void on_submit(struct rig *rig, struct rig_attention *attention,
                      const Troupe__Submit *submit) {
    attention->submits++;
    if (find(attention, submit->sequence) != NULL)
        return;
    if (attention->refuse != 0) {
        reject(rig, attention, submit->sequence, attention->refuse, false);
        return;
    }
    if (attention->lacks_bias && !holds_bias(attention, submit->bias_version)) {
        want_bias(rig, attention, submit);
        return;
    }
    assert_true(attention->sequences < 512);
    struct rig_sequence *sequence = &attention->sequence[attention->sequences++];
    memset(sequence, 0, sizeof *sequence);
    sequence->id = submit->sequence;
    sequence->bias_version = submit->bias_version;
    sequence->seed = submit->sampling->seed;
    sequence->temperature = submit->sampling->temperature;
    sequence->tokens = sequence->given = (uint32_t)submit->n_token;
    sequence->prompt_tokens = submit->prompt_tokens;
    sequence->max_tokens = submit->max_tokens;
    sequence->min_tokens = submit->min_tokens;
    sequence->ignore_eos = submit->ignore_eos;
    sequence->prompt_logprobs = submit->prompt_logprobs;
    sequence->logprobs = submit->sampling->logprobs;
    sequence->top = submit->sampling->top_logprobs;
    sequence->stop_tokens = (uint32_t)submit->n_stop_token;
    for (size_t i = 0; i < submit->n_stop_token; i++)
        sequence->stop_token[i] = submit->stop_token[i];
    sequence->token =
        calloc(submit->prompt_tokens + submit->max_tokens + submit->n_token, sizeof(uint32_t));
    memcpy(sequence->token, submit->token, submit->n_token * sizeof(uint32_t));
}

static void on_attention(struct rig *rig, struct rig_attention *attention,
                         const message *envelope) {
    struct rig_sequence *sequence;
    switch (envelope->body_case) {
    case TROUPE__ENVELOPE__BODY_SUBMIT:
        on_submit(rig, attention, envelope->submit);
        break;
    case TROUPE__ENVELOPE__BODY_POLL:
        sequence = find(attention, envelope->poll->sequence);
        if (sequence == NULL)
            reject(rig, attention, envelope->poll->sequence, ERR_NOT_FOUND, true);
        else
            tell(rig, attention, sequence, envelope->poll->have, envelope->poll->have_prompt,
                 BURST);
        break;
    case TROUPE__ENVELOPE__BODY_BIAS:
        assert_true(bias_id(bias_number(envelope->bias->version), envelope->bias->delta,
                            (uint32_t)envelope->bias->n_delta) == envelope->bias->version);
        if (!holds_bias(attention, envelope->bias->version))
            attention->bias[attention->biases++] = envelope->bias->version;
        break;
    case TROUPE__ENVELOPE__BODY_CANCEL:
        attention->cancels++;
        sequence = find(attention, envelope->cancel->sequence);
        if (sequence != NULL)
            forget(attention, sequence);
        break;
    default:
        fail_msg("unexpected %s to an attention actor", wire_name(envelope));
    }
}

static bool ends(const struct rig *rig, const struct rig_sequence *sequence, uint32_t token) {
    if (sequence->tokens - sequence->prompt_tokens <= sequence->min_tokens)
        return false;
    bool stop = !sequence->ignore_eos && (int32_t)token == rig->config.eos[0];
    for (uint32_t i = 0; i < sequence->stop_tokens; i++)
        stop = stop || sequence->stop_token[i] == token;
    return stop;
}

static void generate(struct rig *rig, struct rig_attention *attention) {
    for (uint32_t i = 0; i < attention->sequences; i++) {
        struct rig_sequence *sequence = &attention->sequence[i];
        if (sequence->done)
            continue;
        uint32_t first = sequence->tokens - sequence->prompt_tokens;
        for (uint32_t n = 0; n < rig->tokens_per_message && !sequence->done; n++) {
            uint32_t token = rig_next(rig, sequence);
            sequence->token[sequence->tokens++] = token;
            attention->largest_index++;
            sequence->done = sequence->tokens - sequence->prompt_tokens >= sequence->max_tokens ||
                             ends(rig, sequence, token);
        }
        tell(rig, attention, sequence, first, sequence->told_prompt, 2);
        sequence->told_prompt += 2;
    }
}

/* ---- the coordinator ---- */

static void welcome(struct rig *rig) {
    Troupe__Welcome body = TROUPE__WELCOME__INIT;
    body.id = GATEWAY_ID;
    body.incarnation = 5;
    body.heartbeat_interval_ns = 200 * 1000000ull;
    message envelope = TROUPE__ENVELOPE__INIT;
    envelope.body_case = TROUPE__ENVELOPE__BODY_WELCOME;
    envelope.welcome = &body;
    rig_message(rig, ACTOR_COORDINATOR, COORDINATOR_INCARNATION, &envelope);
}

static void fill_member(Troupe__Member *member, actor_id id, uint64_t incarnation, enum role role,
                        char *name) {
    troupe__member__init(member);
    member->id = id;
    member->incarnation = incarnation;
    member->role = (Troupe__Role)role;
    member->name = name;
    member->control_address = member->data_address = member->host = "here";
    member->state = TROUPE__ACTOR_STATE__STATE_READY;
}

static float *rig_delta(const struct rig *rig, uint32_t number) {
    float *delta = calloc(rig->config.layers * rig->config.experts, sizeof *delta);
    delta[0] = (float)number / 1024;
    return delta;
}

uint64_t rig_bias_id(const struct rig *rig, uint32_t number) {
    float *delta = rig_delta(rig, number);
    uint64_t id = number == 0 ? 0 : bias_id(number, delta, rig->config.layers * rig->config.experts);
    free(delta);
    return id;
}

void rig_bias(struct rig *rig, uint32_t number) {
    Troupe__Bias body = TROUPE__BIAS__INIT;
    body.version = rig_bias_id(rig, number);
    body.delta = rig_delta(rig, number);
    body.n_delta = rig->config.layers * rig->config.experts;
    message envelope = TROUPE__ENVELOPE__INIT;
    envelope.body_case = TROUPE__ENVELOPE__BODY_BIAS;
    envelope.bias = &body;
    rig_message(rig, ACTOR_COORDINATOR, COORDINATOR_INCARNATION, &envelope);
    free(body.delta);
}

void rig_bias_release(struct rig *rig, uint32_t number) {
    Troupe__BiasRelease body = TROUPE__BIAS_RELEASE__INIT;
    body.version = rig_bias_id(rig, number);
    message envelope = TROUPE__ENVELOPE__INIT;
    envelope.body_case = TROUPE__ENVELOPE__BODY_BIAS_RELEASE;
    envelope.bias_release = &body;
    rig_message(rig, ACTOR_COORDINATOR, COORDINATOR_INCARNATION, &envelope);
}

void rig_commit(struct rig *rig) {
    Troupe__Member member[RIG_ATTENTIONS + 2], *list[RIG_ATTENTIONS + 2];
    char name[RIG_ATTENTIONS][16];
    size_t count = 0;
    fill_member(&member[count++], GATEWAY_ID, 5, ROLE_GATEWAY, "gateway-0");
    fill_member(&member[count++], 50, 500, ROLE_EXPERT, "expert-0");
    for (uint32_t i = 0; i < RIG_ATTENTIONS; i++) {
        snprintf(name[i], sizeof name[i], "attention-%u", i);
        if (rig->attention[i].alive)
            fill_member(&member[count++], rig->attention[i].id, rig->attention[i].incarnation,
                        ROLE_ATTENTION, name[i]);
    }
    for (size_t i = 0; i < count; i++)
        list[i] = &member[i];
    uint32_t layer[] = {1, 1}, expert[] = {0, 1}, holder[] = {50, 50};
    Troupe__Commit body = TROUPE__COMMIT__INIT;
    body.epoch = ++rig->epoch;
    body.n_member = count;
    body.member = list;
    body.n_layer = body.n_expert = body.n_holder = 2;
    body.layer = layer;
    body.expert = expert;
    body.holder = holder;
    body.serving = rig->serving;
    body.bias_version = rig_bias_id(rig, rig->bias_number);
    message envelope = TROUPE__ENVELOPE__INIT;
    envelope.body_case = TROUPE__ENVELOPE__BODY_COMMIT;
    envelope.commit = &body;
    rig_message(rig, ACTOR_COORDINATOR, COORDINATOR_INCARNATION, &envelope);
}

void rig_join(struct rig *rig) {
    welcome(rig);
    if (rig->bias_number != 0)
        rig_bias(rig, rig->bias_number);
    rig_commit(rig);
}

void rig_kill(struct rig *rig, uint32_t attention) {
    struct rig_attention *gone = &rig->attention[attention];
    gone->alive = false;
    while (gone->sequences > 0)
        forget(gone, &gone->sequence[0]);
}

/* ---- the clients ---- */

static void on_stream(struct rig *rig, const struct effect *effect) {
    struct rig_answer *answer = &rig->answer[effect->stream.client % RIG_CLIENTS];
    assert_false(answer->last); /* nothing follows the end */
    if (answer->pieces++ == 0) {
        assert_true(effect->stream.status >= 200);
        answer->status = effect->stream.status;
        snprintf(answer->content_type, sizeof answer->content_type, "%s",
                 effect->stream.content_type);
        if (effect->stream.extra_header != NULL)
            snprintf(answer->header, sizeof answer->header, "%s", effect->stream.extra_header);
    } else {
        assert_int_equal(effect->stream.status, 0);
    }
    answer->text = realloc(answer->text, answer->size + effect->stream.size + 1);
    memcpy(answer->text + answer->size, effect->stream.bytes, effect->stream.size);
    answer->size += effect->stream.size;
    answer->text[answer->size] = '\0';
    answer->last = effect->stream.last;
}

void rig_deliver(struct rig *rig, const struct event *event) {
    effects_reset(&rig->effects);
    actor_step(rig->gateway, event, rig->now_ns, &rig->effects);
    for (uint32_t i = 0; i < rig->effects.count; i++) {
        const struct effect *effect = &rig->effects.list[i];
        if (effect->kind == EFFECT_SEND && effect->send.to != ACTOR_COORDINATOR)
            send_lossy(rig, effect->send.to, effect->send.bytes, effect->send.size);
        else if (effect->kind == EFFECT_STREAM)
            on_stream(rig, effect);
        else if (effect->kind == EFFECT_EXIT)
            rig->exit_code = effect->exit.code;
    }
}

uint64_t rig_http(struct rig *rig, const char *method, const char *path, const char *authorization,
                  const char *body) {
    uint64_t client = ++rig->last_client;
    struct rig_answer *answer = &rig->answer[client % RIG_CLIENTS];
    free(answer->text);
    memset(answer, 0, sizeof *answer);
    struct http_request http = {
        .client = client,
        .method = method,
        .path = path,
        .query = "",
        .authorization = authorization,
        .body = body == NULL ? "" : body,
        .body_bytes = body == NULL ? 0 : strlen(body),
    };
    struct event event = {.kind = EVENT_HTTP_REQUEST, .http = &http};
    rig_deliver(rig, &event);
    return client;
}

static void deliver_message(struct rig *rig, struct rig_message *posted) {
    struct failure failure;
    Troupe__Envelope *envelope;
    if (wire_unpack(&envelope, posted->bytes, posted->size, &failure) < 0)
        fail_msg("%s", failure.text);
    if (posted->to == 0) {
        struct event event = {.kind = EVENT_MESSAGE, .message = envelope};
        rig_deliver(rig, &event);
    } else {
        for (uint32_t i = 0; i < RIG_ATTENTIONS; i++)
            if (rig->attention[i].id == posted->to && rig->attention[i].alive)
                on_attention(rig, &rig->attention[i], envelope);
    }
    wire_free(&envelope);
    free(posted->bytes);
}

void rig_tick(struct rig *rig) {
    uint32_t now = rig->messages; /* what is posted meanwhile arrives with the next tick */
    while (now > 0) {
        uint32_t pick = rig->reorder ? random_below(&rig->seed, now) : 0;
        struct rig_message posted = rig->message[pick];
        rig->messages--;
        memmove(&rig->message[pick], &rig->message[pick + 1],
                (rig->messages - pick) * sizeof posted);
        now--;
        deliver_message(rig, &posted);
    }
    for (uint32_t i = 0; i < RIG_ATTENTIONS; i++)
        if (rig->attention[i].alive)
            generate(rig, &rig->attention[i]);
    rig->now_ns += 1000000;
    if (actor_deadline(rig->gateway) <= rig->now_ns) {
        struct event event = {.kind = EVENT_TIMER};
        rig_deliver(rig, &event);
        assert_true(actor_deadline(rig->gateway) > rig->now_ns);
    }
}

bool rig_wait(struct rig *rig, uint64_t client, uint32_t ticks) {
    for (uint32_t i = 0; i < ticks && !rig_answer(rig, client)->last; i++)
        rig_tick(rig);
    return rig_answer(rig, client)->last;
}

const struct rig_answer *rig_answer(const struct rig *rig, uint64_t client) {
    return &rig->answer[client % RIG_CLIENTS];
}

bool rig_settles(struct rig *rig, uint32_t ticks) {
    for (uint32_t i = 0; i < ticks; i++) {
        uint32_t held = 0;
        for (uint32_t a = 0; a < RIG_ATTENTIONS; a++)
            held += rig->attention[a].sequences;
        if (held == 0 &&
            strstr(rig->gateway->class->describe(rig->gateway),
                   "requests=0 sequences=0 closing=0 prompt_tokens=0 outstanding=0 bias_users=0 ") !=
                NULL)
            return true;
        rig_tick(rig);
    }
    print_message("still held: %s\n", rig->gateway->class->describe(rig->gateway));
    return false;
}

/* ---- JSON ---- */

static json_t *finish(struct rig *rig, uint64_t client, unsigned status) {
    if (!rig_wait(rig, client, 100000))
        fail_msg("no answer; %s", rig->gateway->class->describe(rig->gateway));
    const struct rig_answer *answer = rig_answer(rig, client);
    if (answer->status != status)
        fail_msg("status %u instead of %u: %s", answer->status, status, answer->text);
    assert_string_equal(answer->content_type, "application/json");
    json_error_t problem;
    json_t *json =
        json_loadb(answer->text, answer->size, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &problem);
    if (json == NULL)
        fail_msg("%s: %s", problem.text, answer->text);
    return json;
}

json_t *rig_post(struct rig *rig, const char *path, const char *body, unsigned status) {
    return finish(rig, rig_http(rig, "POST", path, NULL, body), status);
}

json_t *rig_get(struct rig *rig, const char *path, unsigned status) {
    return finish(rig, rig_http(rig, "GET", path, NULL, NULL), status);
}

json_t *rig_events(const struct rig_answer *answer) {
    assert_int_equal(answer->status, 200);
    assert_string_equal(answer->content_type, "text/event-stream");
    json_t *events = json_array();
    bool done = false;
    for (const char *at = answer->text; *at != '\0';) {
        assert_false(done);
        assert_memory_equal(at, "data: ", 6);
        const char *end = strstr(at, "\n\n");
        assert_non_null(end);
        at += 6;
        if (strncmp(at, "[DONE]", 6) == 0) {
            done = true;
        } else {
            json_error_t problem;
            json_t *event = json_loadb(at, (size_t)(end - at),
                                       JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &problem);
            if (event == NULL)
                fail_msg("%s in %.200s", problem.text, at);
            json_array_append_new(events, event);
        }
        at = end + 2;
    }
    assert_true(done);
    return events;
}

char *rig_stream_text(const json_t *events, uint32_t choice, const char *delta_key) {
    char *text = calloc(1, 1);
    size_t size = 0, i, c;
    json_t *event, *one;
    json_array_foreach((json_t *)events, i, event) {
        json_array_foreach(json_object_get(event, "choices"), c, one) {
            if (json_integer_value(json_object_get(one, "index")) != choice)
                continue;
            const json_t *piece = delta_key == NULL
                                      ? json_object_get(one, "text")
                                      : json_object_get(json_object_get(one, "delta"), delta_key);
            if (piece == NULL)
                continue;
            assert_true(json_is_string(piece));
            text = realloc(text, size + json_string_length(piece) + 1);
            memcpy(text + size, json_string_value(piece), json_string_length(piece) + 1);
            size += json_string_length(piece);
        }
    }
    return text;
}

/* ---- life ---- */

struct rig *rig_open(const struct rig_options *options, const struct settings *settings) {
    struct rig *rig = calloc(1, sizeof *rig);
    load_model(rig);
    effects_init(&rig->effects);
    if (settings != NULL)
        rig->settings = *settings;
    else
        settings_default(&rig->settings);
    rig->now_ns = 1000000000;
    rig->seed = 1;
    rig->serving = true;
    rig->tokens_per_message = 1;
    rig->bias_number = 4;
    rig->exit_code = -1;
    struct gateway_options gateway = {
        .served_model = "demo",
        .api_key = options->api_key,
        .version = "1.2.3",
        .tokenizer = rig->tokenizer,
        .chat = options->chat,
        .chat_error = "no chat_template",
        .unix_offset_ns = 1700000000ll * 1000000000,
        .view = options->view,
    };
    struct actor_identity identity = {
        .role = ROLE_GATEWAY,
        .incarnation = 5,
        .name = "gateway-0",
        .control_address = "a",
        .data_address = "b",
        .host = "c",
        .coordinator_address = "d",
        .model_fingerprint = "0123456789abcdef",
        .numerics = "bf16",
    };
    rig->gateway = gateway_create(&identity, &rig->settings, &rig->config, &gateway);
    for (uint32_t i = 0; i < RIG_ATTENTIONS; i++) {
        rig->attention[i].id = 20 + i;
        rig->attention[i].incarnation = 200 + i;
        rig->attention[i].alive = i < (options->attentions == 0 ? 1 : options->attentions);
    }
    struct event start = {.kind = EVENT_START};
    rig_deliver(rig, &start);
    if (!options->apart)
        rig_join(rig);
    return rig;
}

void rig_close(struct rig *rig) {
    actor_destroy(&rig->gateway);
    for (uint32_t i = 0; i < RIG_ATTENTIONS; i++)
        rig_kill(rig, i);
    for (uint32_t i = 0; i < RIG_CLIENTS; i++)
        free(rig->answer[i].text);
    for (uint32_t i = 0; i < rig->messages; i++)
        free(rig->message[i].bytes);
    free(rig->message);
    effects_free(&rig->effects);
    tokenizer_close(&rig->tokenizer);
    free(rig);
}
