/* Requests of the OpenAI API, as vLLM understands them. One table declares every scalar field with
 * its type and range; what is not a scalar (prompt, messages, stop, ...) has a function. null means
 * absent, unknown fields are ignored, everything else that does not fit is refused with the field's
 * name, what was expected and what was found. */
#include "actors/gateway/openai_request.h"

#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum field_type { FIELD_BOOL, FIELD_INTEGER, FIELD_NUMBER, FIELD_STRING };

#define GENERATE   (ENDPOINT_COMPLETIONS | ENDPOINT_CHAT)
#define AT(member) offsetof(struct generation_request, member)
#define IGNORED    SIZE_MAX
#define COUNT_MAX  2147483647.0
#define SEED_MAX   9223372036854775807.0

/* Ranges are closed; `open_low` leaves the lower end out. */
static const struct field {
    const char *name;
    enum field_type type;
    unsigned endpoints;
    size_t offset;
    double low, high;
    bool open_low;
} FIELDS[] = {
    {"stream", FIELD_BOOL, GENERATE, AT(stream), 0, 0, false},
    {"echo", FIELD_BOOL, ENDPOINT_COMPLETIONS, AT(echo), 0, 0, false},
    {"ignore_eos", FIELD_BOOL, GENERATE, AT(ignore_eos), 0, 0, false},
    {"return_token_ids", FIELD_BOOL, GENERATE, AT(return_token_ids), 0, 0, false},
    {"return_tokens_as_token_ids", FIELD_BOOL, GENERATE, AT(tokens_as_ids), 0, 0, false},
    {"skip_special_tokens", FIELD_BOOL, GENERATE, AT(skip_special_tokens), 0, 0, false},
    {"include_stop_str_in_output", FIELD_BOOL, GENERATE, AT(include_stop), 0, 0, false},
    {"add_special_tokens", FIELD_BOOL, ENDPOINT_COMPLETIONS | ENDPOINT_TOKENIZE,
     AT(add_special_tokens), 0, 0, false},
    {"add_generation_prompt", FIELD_BOOL, ENDPOINT_CHAT | ENDPOINT_TOKENIZE,
     AT(add_generation_prompt), 0, 0, false},
    {"return_token_strs", FIELD_BOOL, ENDPOINT_TOKENIZE, AT(return_token_strs), 0, 0, false},
    {"n", FIELD_INTEGER, GENERATE, AT(n), 1, CHOICES_MAX, false},
    {"max_tokens", FIELD_INTEGER, GENERATE, AT(max_tokens), 0, COUNT_MAX, false},
    {"max_completion_tokens", FIELD_INTEGER, GENERATE, AT(max_completion_tokens), 0, COUNT_MAX,
     false},
    {"min_tokens", FIELD_INTEGER, GENERATE, AT(min_tokens), 0, COUNT_MAX, false},
    {"top_k", FIELD_INTEGER, GENERATE, AT(top_k), -1, COUNT_MAX, false},
    {"seed", FIELD_INTEGER, GENERATE, AT(seed), -SEED_MAX, SEED_MAX, false},
    {"logprobs", FIELD_INTEGER, ENDPOINT_COMPLETIONS, AT(logprobs), 0, TOP_LOGPROBS_MAX, false},
    {"logprobs", FIELD_BOOL, ENDPOINT_CHAT, AT(chat_logprobs), 0, 0, false},
    {"top_logprobs", FIELD_INTEGER, ENDPOINT_CHAT, AT(top_logprobs), 0, TOP_LOGPROBS_MAX, false},
    {"temperature", FIELD_NUMBER, GENERATE, AT(temperature), 0, 100, false},
    {"top_p", FIELD_NUMBER, GENERATE, AT(top_p), 0, 1, true},
    {"min_p", FIELD_NUMBER, GENERATE, AT(min_p), 0, 1, false},
    {"repetition_penalty", FIELD_NUMBER, GENERATE, AT(repetition_penalty), 0, 100, true},
    {"presence_penalty", FIELD_NUMBER, GENERATE, AT(presence_penalty), -2, 2, false},
    {"frequency_penalty", FIELD_NUMBER, GENERATE, AT(frequency_penalty), -2, 2, false},
    {"priority", FIELD_INTEGER, GENERATE, AT(priority), INT32_MIN, INT32_MAX, false},
    {"user", FIELD_STRING, GENERATE, IGNORED, 0, 0, false},
};

static const char *kind_of(const json_t *value) {
    switch (json_typeof(value)) {
    case JSON_OBJECT:
        return "an object";
    case JSON_ARRAY:
        return "a list";
    case JSON_STRING:
        return "a string";
    case JSON_INTEGER:
        return "an integer";
    case JSON_REAL:
        return "a number with a fraction";
    case JSON_TRUE:
    case JSON_FALSE:
        return "a boolean";
    case JSON_NULL:
        return "null";
    }
    return "something unknown";
}

/* The field's value; NULL if it is absent or null. */
static json_t *get(const json_t *root, const char *name) {
    json_t *value = json_object_get(root, name);
    return value == NULL || json_is_null(value) ? NULL : value;
}

/* The JSON text's nesting and size are looked at before a parser touches it: jansson recurses, and
 * every value costs memory. */
static int check_shape(const char *body, size_t size, struct http_error *error) {
    uint32_t depth = 0, values = 0, containers = 0;
    bool quoted = false;
    for (size_t i = 0; i < size; i++) {
        char c = body[i];
        if (quoted) {
            if (c == '\\')
                i++;
            else if (c == '"')
                quoted = false;
        } else if (c == '"') {
            quoted = true;
        } else if (c == '[' || c == '{') {
            containers++;
            if (++depth > JSON_DEPTH_MAX)
                return http_fail(
                    error, 400, NULL,
                    "JSON nested at most %d deep was expected, found deeper nesting at byte %zu",
                    JSON_DEPTH_MAX, i);
        } else if ((c == ']' || c == '}') && depth > 0) {
            depth--;
        } else if (c == ',') {
            values++;
        }
    }
    if (values > JSON_VALUES_MAX || containers > JSON_CONTAINERS_MAX)
        return http_fail(error, 400, NULL,
                         "JSON with at most %u values and %u lists was expected, found %u and %u",
                         JSON_VALUES_MAX, JSON_CONTAINERS_MAX, values, containers);
    return 0;
}

int request_parse_json(json_t **ret, const char *body, size_t body_bytes,
                       struct http_error *error) {
    if (body_bytes > HTTP_BODY_MAX)
        return http_fail(error, 413, NULL, "a body of at most %u bytes was expected, found %zu",
                         HTTP_BODY_MAX, body_bytes);
    int code = check_shape(body, body_bytes, error);
    if (code < 0)
        return code;
    json_error_t problem;
    json_t *root = json_loadb(body, body_bytes, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &problem);
    if (root == NULL)
        return http_fail(error, 400, NULL,
                         "a JSON object was expected, found invalid JSON: %s (line %d, byte %d)",
                         problem.text, problem.line, problem.position);
    if (!json_is_object(root)) {
        http_fail(error, 400, NULL, "a JSON object was expected, found %s", kind_of(root));
        json_decref(root);
        return ERR_INVALID;
    }
    *ret = root;
    return 0;
}

static int out_of_range(struct http_error *error, const struct field *field, double value) {
    return http_fail(error, 400, field->name, "%s must be %s %.17g and at most %.17g, found %.17g",
                     field->name, field->open_low ? "more than" : "at least", field->low,
                     field->high, value);
}

static int parse_integer(void *place, const struct field *field, const json_t *value,
                         struct http_error *error) {
    double real = json_number_value(value);
    if (json_is_real(value) && (real != floor(real) || fabs(real) > 9007199254740992.0))
        return http_fail(error, 400, field->name, "%s must be an integer, found %.17g", field->name,
                         real);
    if (!json_is_number(value))
        return http_fail(error, 400, field->name, "%s must be an integer, found %s", field->name,
                         kind_of(value));
    if (real < field->low || real > field->high)
        return out_of_range(error, field, real);
    int64_t integer = json_is_integer(value) ? json_integer_value(value) : (int64_t)real;
    if (integer == ABSENT)
        return out_of_range(error, field, real); /* -2^63 is the mark of an absent integer */
    memcpy(place, &integer, sizeof integer);
    return 0;
}

static int parse_field(struct generation_request *ret, const struct field *field,
                       const json_t *value, struct http_error *error) {
    void *place = field->offset == IGNORED ? NULL : (char *)ret + field->offset;
    switch (field->type) {
    case FIELD_BOOL:
        if (!json_is_boolean(value))
            return http_fail(error, 400, field->name, "%s must be true or false, found %s",
                             field->name, kind_of(value));
        *(bool *)place = json_is_true(value);
        return 0;
    case FIELD_INTEGER:
        return parse_integer(place, field, value, error);
    case FIELD_NUMBER: {
        if (!json_is_number(value))
            return http_fail(error, 400, field->name, "%s must be a number, found %s", field->name,
                             kind_of(value));
        double real = json_number_value(value);
        if (!(real >= field->low && real <= field->high) || (field->open_low && real == field->low))
            return out_of_range(error, field, real);
        *(double *)place = real;
        return 0;
    }
    case FIELD_STRING:
        if (!json_is_string(value))
            return http_fail(error, 400, field->name, "%s must be a string, found %s", field->name,
                             kind_of(value));
        return 0;
    }
    return 0;
}

static int parse_model(const json_t *root, const struct request_limits *limits,
                       struct http_error *error) {
    const json_t *value = get(root, "model");
    if (value == NULL)
        return 0; /* there is only one */
    if (!json_is_string(value))
        return http_fail(error, 400, "model", "model must be a string, found %s", kind_of(value));
    if (json_string_length(value) != strlen(limits->served_model) ||
        memcmp(json_string_value(value), limits->served_model, json_string_length(value)) != 0)
        return http_fail(error, 404, "model",
                         "The model `%.200s` does not exist; `%.200s` is served here",
                         json_string_value(value), limits->served_model);
    return 0;
}

static int parse_token(uint32_t *ret, const json_t *value, const char *param,
                       const struct request_limits *limits, struct http_error *error) {
    if (!json_is_integer(value))
        return http_fail(error, 400, param, "%s must hold token ids (integers), found %s", param,
                         kind_of(value));
    json_int_t token = json_integer_value(value);
    if (token < 0 || token >= (json_int_t)limits->vocabulary)
        return http_fail(error, 400, param,
                         "Token id %lld of %s is out of vocabulary: expected 0 to %u",
                         (long long)token, param, limits->vocabulary - 1);
    *ret = (uint32_t)token;
    return 0;
}

static int parse_token_list(struct prompt_input *ret, const json_t *list, const char *param,
                            const struct request_limits *limits, struct http_error *error) {
    size_t count = json_array_size(list);
    if (count == 0)
        return http_fail(error, 400, param, "%s must hold at least one token, found an empty list",
                         param);
    ret->token = malloc(count * sizeof *ret->token);
    ASSERT(ret->token != NULL && "memory for a prompt");
    for (size_t i = 0; i < count; i++) {
        int code = parse_token(&ret->token[i], json_array_get(list, i), param, limits, error);
        if (code < 0)
            return code;
    }
    ret->tokens = (uint32_t)count;
    return 0;
}

static void prompt_text(struct prompt_input *ret, const json_t *value) {
    ret->text = json_string_value(value);
    ret->text_bytes = json_string_length(value);
}

/* "text", ["text", ...], [1, 2, ...] or [[1, 2], ...]. */
static int parse_prompt(struct generation_request *ret, const json_t *root,
                        const struct request_limits *limits, struct http_error *error) {
    const json_t *value = get(root, "prompt");
    if (value == NULL)
        return http_fail(error, 400, "prompt",
                         "prompt must be a string, a list of strings, a list of tokens or a list "
                         "of token lists, "
                         "found nothing");
    bool list = json_is_array(value) && json_array_size(value) > 0 &&
                !json_is_integer(json_array_get(value, 0));
    size_t count = list ? json_array_size(value) : 1;
    if (count > PROMPTS_MAX)
        return http_fail(error, 400, "prompt", "prompt must hold at most %d prompts, found %zu",
                         PROMPTS_MAX, count);
    ret->prompt = calloc(count, sizeof *ret->prompt);
    ASSERT(ret->prompt != NULL && "memory for prompts");
    ret->prompts = (uint32_t)count;
    for (size_t i = 0; i < count; i++) {
        const json_t *one = list ? json_array_get(value, i) : value;
        if (list && json_typeof(one) != json_typeof(json_array_get(value, 0)))
            return http_fail(error, 400, "prompt",
                             "prompt must hold prompts of one kind, found %s beside %s",
                             kind_of(one), kind_of(json_array_get(value, 0)));
        if (json_is_string(one)) {
            prompt_text(&ret->prompt[i], one);
        } else if (json_is_array(one)) {
            int code = parse_token_list(&ret->prompt[i], one, "prompt", limits, error);
            if (code < 0)
                return code;
        } else {
            return http_fail(
                error, 400, "prompt",
                "prompt must be a string, a list of strings, a list of tokens or a list of token "
                "lists, found %s",
                kind_of(one));
        }
    }
    return 0;
}

/* A message's content as one string: a string, null (an assistant turn without text), or a list of
 * {"type": "text", "text"}. */
static int parse_content(const char **ret, const json_t *message, size_t index,
                         struct http_error *error) {
    json_t *content = json_object_get(message, "content");
    if (content == NULL || json_is_null(content)) {
        *ret = "";
        return 0;
    }
    if (json_is_array(content)) {
        struct text joined = {0};
        for (size_t i = 0; i < json_array_size(content); i++) {
            const json_t *part = json_array_get(content, i);
            const json_t *type = json_object_get(part, "type");
            const json_t *text = json_object_get(part, "text");
            if (!json_is_string(type) || strcmp(json_string_value(type), "text") != 0 ||
                !json_is_string(text)) {
                text_free(&joined);
                return http_fail(
                    error, 400, "messages",
                    "messages[%zu].content[%zu] must be {\"type\": \"text\", \"text\": string}, "
                    "found type %.64s",
                    index, i, json_is_string(type) ? json_string_value(type) : "missing");
            }
            text_append(&joined, json_string_value(text), json_string_length(text));
        }
        json_t *whole = json_stringn(joined.bytes == NULL ? "" : joined.bytes, joined.size);
        text_free(&joined);
        ASSERT(whole != NULL && "memory for a message");
        json_object_set_new((json_t *)message, "content",
                            whole); /* owned by the request's JSON from here */
        content = whole;
    }
    if (!json_is_string(content))
        return http_fail(error, 400, "messages",
                         "messages[%zu].content must be a string or a list of text parts, found %s",
                         index, kind_of(content));
    if (strlen(json_string_value(content)) != json_string_length(content))
        return http_fail(error, 400, "messages",
                         "messages[%zu].content must not contain the character U+0000", index);
    *ret = json_string_value(content);
    return 0;
}

static int parse_messages(struct generation_request *ret, const json_t *root,
                          struct http_error *error) {
    const json_t *list = get(root, "messages");
    if (!json_is_array(list))
        return http_fail(error, 400, "messages", "messages must be a list of messages, found %s",
                         list == NULL ? "nothing" : kind_of(list));
    size_t count = json_array_size(list);
    if (count == 0 || count > CHAT_MESSAGES_MAX)
        return http_fail(error, 400, "messages", "messages must hold 1 to %d messages, found %zu",
                         CHAT_MESSAGES_MAX, count);
    ret->message = calloc(count, sizeof *ret->message);
    ASSERT(ret->message != NULL && "memory for messages");
    ret->messages = (uint32_t)count;
    for (size_t i = 0; i < count; i++) {
        const json_t *message = json_array_get(list, i);
        const json_t *role = json_object_get(message, "role");
        if (!json_is_object(message) || !json_is_string(role))
            return http_fail(error, 400, "messages",
                             "messages[%zu] must be an object with a string \"role\", found %s", i,
                             json_is_object(message) ? "no such role" : kind_of(message));
        const char *name = json_string_value(role);
        if (strcmp(name, "developer") == 0)
            name = "system"; /* OpenAI's newer name for it */
        ret->message[i].role = name;
        int code = parse_content(&ret->message[i].content, message, i, error);
        if (code < 0)
            return code;
    }
    return 0;
}

static int parse_chat_options(struct generation_request *ret, const json_t *root,
                              struct http_error *error) {
    const json_t *options = get(root, "chat_template_kwargs");
    if (options == NULL)
        return 0;
    if (!json_is_object(options))
        return http_fail(error, 400, "chat_template_kwargs",
                         "chat_template_kwargs must be an object, found %s", kind_of(options));
    const json_t *thinking = get(options, "thinking");
    if (thinking != NULL && !json_is_boolean(thinking))
        return http_fail(error, 400, "chat_template_kwargs",
                         "chat_template_kwargs.thinking must be true or false, found %s",
                         kind_of(thinking));
    ret->thinking = json_is_true(thinking);
    return 0;
}

static int add_stop(struct generation_request *ret, const json_t *value, struct http_error *error) {
    if (!json_is_string(value))
        return http_fail(error, 400, "stop", "stop must be a string or a list of strings, found %s",
                         kind_of(value));
    size_t size = json_string_length(value);
    if (size == 0 || size > STOP_STRING_BYTES_MAX)
        return http_fail(error, 400, "stop", "stop strings must have 1 to %d bytes, found %zu",
                         STOP_STRING_BYTES_MAX, size);
    stop_strings_add(&ret->stop, json_string_value(value), size);
    return 0;
}

static int parse_stop(struct generation_request *ret, const json_t *root,
                      const struct request_limits *limits, struct http_error *error) {
    const json_t *stop = get(root, "stop");
    if (json_is_array(stop)) {
        if (json_array_size(stop) > STOP_STRINGS_MAX)
            return http_fail(error, 400, "stop", "stop must hold at most %d strings, found %zu",
                             STOP_STRINGS_MAX, json_array_size(stop));
        for (size_t i = 0; i < json_array_size(stop); i++) {
            int code = add_stop(ret, json_array_get(stop, i), error);
            if (code < 0)
                return code;
        }
    } else if (stop != NULL) {
        int code = add_stop(ret, stop, error);
        if (code < 0)
            return code;
    }
    const json_t *tokens = get(root, "stop_token_ids");
    if (tokens == NULL)
        return 0;
    if (!json_is_array(tokens) || json_array_size(tokens) > STOP_TOKENS_MAX)
        return http_fail(
            error, 400, "stop_token_ids",
            "stop_token_ids must be a list of at most %d token ids, found %s of size %zu",
            STOP_TOKENS_MAX, kind_of(tokens), json_array_size(tokens));
    for (size_t i = 0; i < json_array_size(tokens); i++) {
        int code = parse_token(&ret->stop_token[i], json_array_get(tokens, i), "stop_token_ids",
                               limits, error);
        if (code < 0)
            return code;
        ret->stop_tokens++;
    }
    return 0;
}

/* {"token id": bias}; biases beyond +-100 are clamped as in vLLM. */
static int parse_bias(struct generation_request *ret, json_t *root,
                      const struct request_limits *limits, struct http_error *error) {
    json_t *biases = get(root, "logit_bias");
    if (biases == NULL)
        return 0;
    if (!json_is_object(biases) || json_object_size(biases) > LOGIT_BIAS_MAX)
        return http_fail(
            error, 400, "logit_bias",
            "logit_bias must be an object of at most %d token ids, found %s of size %zu",
            LOGIT_BIAS_MAX, kind_of(biases), json_object_size(biases));
    size_t count = json_object_size(biases);
    if (count == 0)
        return 0;
    ret->bias_token = calloc(count, sizeof *ret->bias_token);
    ret->bias_value = calloc(count, sizeof *ret->bias_value);
    ASSERT(ret->bias_token != NULL && ret->bias_value != NULL && "memory for logit_bias");
    const char *key;
    json_t *value;
    json_object_foreach(biases, key, value) {
        char *end;
        long token = strtol(key, &end, 10);
        if (key[0] < '0' || key[0] > '9' || *end != '\0' || token >= (long)limits->vocabulary)
            return http_fail(error, 400, "logit_bias",
                             "logit_bias must be keyed by token ids from 0 to %u, found \"%.64s\"",
                             limits->vocabulary - 1, key);
        if (!json_is_number(value))
            return http_fail(error, 400, "logit_bias",
                             "logit_bias[\"%ld\"] must be a number, found %s", token,
                             kind_of(value));
        for (uint32_t i = 0; i < ret->biases; i++)
            if (ret->bias_token[i] == (uint32_t)token) /* "1" and "01" */
                return http_fail(error, 400, "logit_bias", "logit_bias names token %ld twice",
                                 token);
        ret->bias_token[ret->biases] = (uint32_t)token;
        ret->bias_value[ret->biases++] = (float)fmin(100.0, fmax(-100.0, json_number_value(value)));
    }
    return 0;
}

static int parse_stream_options(struct generation_request *ret, const json_t *root,
                                struct http_error *error) {
    const json_t *options = get(root, "stream_options");
    if (options == NULL)
        return 0;
    if (!json_is_object(options))
        return http_fail(error, 400, "stream_options", "stream_options must be an object, found %s",
                         kind_of(options));
    if (!ret->stream)
        return http_fail(
            error, 400, "stream_options",
            "stream_options can only be given together with stream: true, found stream: false");
    const struct {
        const char *name;
        bool *place;
    } flags[] = {{"include_usage", &ret->include_usage},
                 {"continuous_usage_stats", &ret->continuous_usage_stats}};
    for (size_t i = 0; i < 2; i++) {
        const json_t *value = get(options, flags[i].name);
        if (value != NULL && !json_is_boolean(value))
            return http_fail(error, 400, "stream_options",
                             "stream_options.%s must be true or false, found %s", flags[i].name,
                             kind_of(value));
        *flags[i].place = json_is_true(value);
    }
    return 0;
}

/* Asked for, but not to be had: saying so beats an answer that quietly is something else. */
static int refuse_unsupported(const json_t *root, const struct generation_request *request,
                              struct http_error *error) {
    const json_t *suffix = get(root, "suffix");
    if (request->endpoint == ENDPOINT_COMPLETIONS && suffix != NULL &&
        !(json_is_string(suffix) && json_string_length(suffix) == 0))
        return http_fail(error, 400, "suffix", "suffix is not supported; expected none");
    const json_t *best_of = get(root, "best_of");
    if (best_of != NULL && !(json_is_integer(best_of) && json_integer_value(best_of) == request->n))
        return http_fail(error, 400, "best_of",
                         "best_of is not supported unless it equals n (%lld)",
                         (long long)request->n);
    if (json_is_true(get(root, "continue_final_message")))
        return http_fail(
            error, 400, "continue_final_message",
            "continue_final_message is not supported; use /v1/completions with the rendered text");
    return 0;
}

/* Rules between fields. */
static int check_together(struct generation_request *ret, const struct request_limits *limits,
                          struct http_error *error) {
    const char *max_name = "max_tokens";
    if (ret->max_completion_tokens != ABSENT) {
        max_name = "max_completion_tokens"; /* the newer name wins, as in vLLM */
        ret->max_tokens = ret->max_completion_tokens;
    }
    if (ret->max_tokens == 0 && !ret->echo)
        return http_fail(error, 400, max_name,
                         "%s must be at least 1, found 0 (0 is for echo only)", max_name);
    if (ret->max_tokens != ABSENT && ret->min_tokens > ret->max_tokens)
        return http_fail(error, 400, "min_tokens",
                         "min_tokens must be at most %s = %lld, found %lld", max_name,
                         (long long)ret->max_tokens, (long long)ret->min_tokens);
    if (ret->n > (int64_t)limits->max_choices)
        return http_fail(error, 400, "n", "n must be at least 1 and at most %u, found %lld",
                         limits->max_choices, (long long)ret->n);
    if (ret->prompts > 1 && ret->n * ret->prompts > (int64_t)limits->max_sequences)
        return http_fail(error, 400, "n", "prompts times n must be at most %u, found %u times %lld",
                         limits->max_sequences, ret->prompts, (long long)ret->n);
    if (ret->endpoint == ENDPOINT_CHAT) {
        if (ret->top_logprobs != ABSENT && ret->top_logprobs > 0 && !ret->chat_logprobs)
            return http_fail(error, 400, "top_logprobs",
                             "top_logprobs needs logprobs: true, found logprobs absent or false");
        if (ret->chat_logprobs)
            ret->logprobs = ret->top_logprobs == ABSENT ? 0 : ret->top_logprobs;
    }
    if (ret->logprobs > (int64_t)limits->max_logprobs)
        return http_fail(error, 400, ret->endpoint == ENDPOINT_CHAT ? "top_logprobs" : "logprobs",
                         "at most %u logprobs per token can be asked for, found %lld",
                         limits->max_logprobs, (long long)ret->logprobs);
    return 0;
}

static void set_defaults(struct generation_request *ret, enum endpoint endpoint,
                         const struct request_limits *limits) {
    memset(ret, 0, sizeof *ret);
    ret->endpoint = endpoint;
    ret->n = 1;
    ret->max_tokens = ret->max_completion_tokens = ret->seed = ret->logprobs = ret->top_logprobs =
        ABSENT;
    ret->temperature = limits->default_temperature;
    ret->top_p = limits->default_top_p;
    ret->top_k = limits->default_top_k;
    ret->repetition_penalty = 1;
    ret->skip_special_tokens = ret->add_special_tokens = ret->add_generation_prompt = true;
}

static int parse_generation(struct generation_request *ret, json_t *root,
                            const struct request_limits *limits, struct http_error *error) {
    int code = parse_stop(ret, root, limits, error);
    if (code == 0)
        code = parse_bias(ret, root, limits, error);
    if (code == 0)
        code = parse_stream_options(ret, root, error);
    if (code == 0)
        code = refuse_unsupported(root, ret, error);
    if (code == 0)
        code = check_together(ret, limits, error);
    return code;
}

/* What to encode or decode: by endpoint, and for /tokenize by what is there. */
static int parse_input(struct generation_request *ret, json_t *root,
                       const struct request_limits *limits, struct http_error *error) {
    bool chat = ret->endpoint == ENDPOINT_CHAT ||
                (ret->endpoint == ENDPOINT_TOKENIZE && get(root, "messages") != NULL);
    if (chat) {
        int code = parse_messages(ret, root, error);
        return code < 0 ? code : parse_chat_options(ret, root, error);
    }
    if (ret->endpoint == ENDPOINT_COMPLETIONS)
        return parse_prompt(ret, root, limits, error);
    ret->prompt = calloc(1, sizeof *ret->prompt);
    ASSERT(ret->prompt != NULL && "memory for a prompt");
    ret->prompts = 1;
    if (ret->endpoint == ENDPOINT_TOKENIZE) {
        const json_t *prompt = get(root, "prompt");
        if (!json_is_string(prompt))
            return http_fail(error, 400, "prompt", "prompt must be a string, found %s",
                             prompt == NULL ? "nothing" : kind_of(prompt));
        prompt_text(&ret->prompt[0], prompt);
        return 0;
    }
    const json_t *tokens = get(root, "tokens");
    if (!json_is_array(tokens))
        return http_fail(error, 400, "tokens", "tokens must be a list of token ids, found %s",
                         tokens == NULL ? "nothing" : kind_of(tokens));
    if (json_array_size(tokens) == 0)
        return 0;
    return parse_token_list(&ret->prompt[0], tokens, "tokens", limits, error);
}

int request_parse(struct generation_request *ret, enum endpoint endpoint, const char *body,
                  size_t body_bytes, const struct request_limits *limits,
                  struct http_error *error) {
    json_t *root;
    int code = request_parse_json(&root, body, body_bytes, error);
    if (code < 0)
        return code;
    struct generation_request request;
    set_defaults(&request, endpoint, limits);
    request.root = root;
    code = parse_model(root, limits, error);
    for (size_t i = 0; code == 0 && i < sizeof FIELDS / sizeof FIELDS[0]; i++) {
        const json_t *value = get(root, FIELDS[i].name);
        if ((FIELDS[i].endpoints & endpoint) != 0 && value != NULL)
            code = parse_field(&request, &FIELDS[i], value, error);
    }
    if (code == 0)
        code = parse_input(&request, root, limits, error);
    if (code == 0 && (endpoint & GENERATE) != 0)
        code = parse_generation(&request, root, limits, error);
    if (code < 0) {
        request_free(&request);
        return code;
    }
    *ret = request;
    return 0;
}

void request_free(struct generation_request *self) {
    for (uint32_t i = 0; i < self->prompts; i++)
        free(self->prompt[i].token);
    free(self->prompt);
    free(self->message);
    stop_strings_free(&self->stop);
    free(self->bias_token);
    free(self->bias_value);
    json_decref(self->root);
    memset(self, 0, sizeof *self);
}
