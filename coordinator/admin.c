/* The admin interface: JSON over HTTP, on an address of its own. Everything that `troupe ctl` does goes
 * through here; some paths are those of vLLM and SGLang, so that their tools work too.
 *
 *   GET  /status /actors /placement[?layer=L] /operations
 *   GET or POST /bias     POST: {"action": "on" | "off" | "reset", "gamma", "clamp", "interval_ms"}
 *   POST /scale /drain /move /replicate /rebalance /cancel        answer: the operation, 202
 *   POST /scale_elastic_ep, GET or POST /is_scaling_elastic_ep
 *   POST /fault, GET / and what a gateway shows: admin_view.c
 *   GET or POST /start_expert_distribution_record /stop_... /dump_... */
#include "coordinator/coordinator.h"

#include <inttypes.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BODY_BYTES_MAX 65536u
#define WINDOW_MS      1000u /* of a recording, unless told */

/* A request on its way through. */
struct admin {
    struct coordinator *self;
    const struct http_request *request;
    json_t *body; /* an object, empty if none was sent */
    uint64_t now_ns;
    struct effects *out;
};

/* ---- answers ---- */

static void answer_bytes(const struct admin *admin, uint16_t status, const char *type,
                         const uint8_t *bytes, size_t size) {
    struct effect *effect = effects_add(admin->out, EFFECT_STREAM);
    effect->stream.client = admin->request->client;
    effect->stream.status = status;
    effect->stream.content_type = type;
    effect->stream.bytes = bytes;
    effect->stream.size = size;
    effect->stream.last = true;
}

static void answer(const struct admin *admin, uint16_t status, json_t *json) {
    char *text = json_dumps(json, JSON_COMPACT);
    ASSERT(text != NULL && "memory for an answer");
    size_t size = strlen(text);
    uint8_t *bytes = effects_copy(admin->out, text, size + 1);
    bytes[size] = '\n';
    answer_bytes(admin, status, "application/json", bytes, size + 1);
    free(text);
    json_decref(json);
}

static uint16_t status_of(int code) {
    switch (code) {
    case ERR_NOT_FOUND:
        return 404;
    case ERR_BUSY:
    case ERR_EXISTS:
    case ERR_STATE:
    case ERR_TOO_LARGE:
        return 409;
    case ERR_NO_MEMORY:
        return 503;
    default:
        return 400;
    }
}

static void answer_failure(const struct admin *admin, uint16_t status, const struct failure *why) {
    answer(admin, status != 0 ? status : status_of(why->code),
           json_pack("{s:{s:s, s:s}}", "error", "message", why->text, "type", error_name(why->code)));
}

/* ---- what there is ---- */

static const char *seat_state(const struct seat *seat) {
    return seat->quarantined ? "quarantined" : seat->draining ? "draining" : seat->ready ? "ready" : "joining";
}

static json_t *describe_actor(const struct coordinator *self, const struct seat *seat,
                              uint64_t now_ns) {
    const Troupe__Heartbeat *beat = &seat->heartbeat;
    uint64_t age_ns = now_ns > seat->heard_ns ? now_ns - seat->heard_ns : 0;
    json_t *json = json_pack(
        "{s:i, s:s, s:s, s:s, s:s, s:i, s:s, s:f, s:I, s:I}", "id", (int)seat->id, "name",
        seat->name, "role", role_name(seat->role), "state", seat_state(seat), "host", seat->host,
        "pid", (int)seat->pid, "address", seat->control_address, "heartbeat_age_ms",
        (double)age_ns / 1e6, "epoch", (json_int_t)seat->acknowledged_epoch, "memory_bytes",
        (json_int_t)(seat->has_heartbeat ? beat->memory_bytes : 0));
    if (seat->role == ROLE_EXPERT) {
        json_object_set_new(json, "copies", json_integer(seat->targets));
        json_object_set_new(json, "copies_held", json_integer(beat->copies_held));
        json_object_set_new(json, "copies_loading", json_integer(beat->copies_loading));
        json_object_set_new(json, "capacity", json_integer(seat->capacity));
        json_object_set_new(json, "fetched_bytes", json_integer((json_int_t)beat->fetched_bytes));
        json_object_set_new(json, "given_bytes", json_integer((json_int_t)beat->given_bytes));
        struct answers answers = statistics_answers(self, seat->id);
        json_object_set_new(json, "queue", json_integer(answers.queue));
        json_object_set_new(json, "answer_p50_us", json_integer(answers.p50_us));
        json_object_set_new(json, "answer_p99_us", json_integer(answers.p99_us));
    } else if (seat->role == ROLE_ATTENTION) {
        json_object_set_new(json, "sequences_running", json_integer(beat->sequences_running));
        json_object_set_new(json, "sequences_waiting", json_integer(beat->sequences_waiting));
        json_object_set_new(json, "pages_used", json_integer(beat->pages_used));
        json_object_set_new(json, "pages_total", json_integer(beat->pages_total));
    }
    return json;
}

static json_t *list_actors(const struct admin *admin) {
    const struct coordinator *self = admin->self;
    json_t *list = json_array();
    for (uint32_t i = 0; i < self->seats; i++)
        if (self->seat[i].role != ROLE_CONTROL)
            json_array_append_new(list, describe_actor(self, &self->seat[i], admin->now_ns));
    return list;
}

static const char *name_of(const struct coordinator *self, actor_id id) {
    const struct seat *seat = seat_find(self, id);
    return seat != NULL ? seat->name : "";
}

static json_t *describe_operation(const struct coordinator *self, const struct operation *operation,
                                  uint64_t now_ns) {
    uint64_t end_ns = operation_ended(operation) ? operation->ended_ns : now_ns;
    json_t *json = json_pack("{s:I, s:s, s:s, s:f}", "id", (json_int_t)operation->id, "kind",
                             operation_kind_name(operation->kind), "phase",
                             operation_phase_name(operation->phase), "seconds",
                             (double)(end_ns - operation->began_ns) / 1e9);
    if (operation->kind == OPERATION_SCALE) {
        json_object_set_new(json, "role", json_string(role_name(operation->role)));
        json_object_set_new(json, "count", json_integer(operation->count));
    }
    if (operation->changes == 1) {
        const struct change *change = operation->change;
        json_object_set_new(json, "layer", json_integer(change->pair / self->config.experts));
        json_object_set_new(json, "expert", json_integer(change->pair % self->config.experts));
        if (change->from != 0)
            json_object_set_new(json, "from", json_string(name_of(self, change->from)));
        json_object_set_new(json, "to", json_string(name_of(self, change->to)));
    } else if (operation->changes > 1) {
        json_object_set_new(json, "copies", json_integer(operation->changes));
    }
    uint64_t bytes_done = 0, bytes = operation_bytes(self, operation, &bytes_done);
    if (bytes > 0) {
        json_object_set_new(json, "bytes", json_integer((json_int_t)bytes));
        json_object_set_new(json, "bytes_done", json_integer((json_int_t)bytes_done));
    }
    if (operation->automatic)
        json_object_set_new(json, "automatic", json_true());
    json_t *processes = json_array();
    for (uint32_t i = 0; i < operation->parties; i++)
        json_array_append_new(processes, json_string(operation->party[i].name));
    json_object_set_new(json, "processes", processes);
    if (operation->phase == PHASE_ABORTED) {
        json_object_set_new(json, "reason", json_string(operation->reason));
        json_object_set_new(json, "aborted_in",
                            json_string(operation_phase_name(operation->reached)));
    }
    return json;
}

static json_t *list_operations(const struct admin *admin, bool all) {
    const struct coordinator *self = admin->self;
    uint64_t last = self->last_operation_id;
    json_t *list = json_array();
    for (uint64_t id = last > 4 * OPERATIONS_MAX ? last - 4 * OPERATIONS_MAX : 1; id <= last; id++)
        for (uint32_t i = 0; i < OPERATIONS_MAX; i++) {
            const struct operation *operation = &self->operation[i];
            if (operation->id == id && (all || !operation_ended(operation)))
                json_array_append_new(list, describe_operation(self, operation, admin->now_ns));
        }
    return list;
}

static json_t *list_quarantines(const struct coordinator *self) {
    json_t *list = json_array();
    for (uint32_t i = 0; i < self->lies; i++) {
        const struct lie *lie = &self->lie[i];
        json_array_append_new(
            list, json_pack("{s:s, s:i, s:i, s:i, s:s, s:b, s:b}", "name", lie->name, "times",
                            (int)lie->times, "layer", (int)lie->layer, "expert", (int)lie->expert,
                            "accuser", lie->accuser, "undecided", lie->undecided, "stays", lie->stays));
    }
    return list;
}

static void on_status(const struct admin *admin) {
    const struct coordinator *self = admin->self;
    uint64_t copies = 0;
    for (uint32_t pair = 0; pair < self->pairs; pair++)
        copies += self->actives[pair];
    answer(admin, 200,
           json_pack("{s:I, s:b, s:I, s:i, s:o, s:o, s:o}", "epoch", (json_int_t)self->epoch, "serving",
                     self->serving, "copies", (json_int_t)copies, "experts", (int)self->moe_pairs,
                     "actors", list_actors(admin), "operations", list_operations(admin, false),
                     "quarantines", list_quarantines(self)));
}

static void on_actors(const struct admin *admin) {
    answer(admin, 200, json_pack("{s:o}", "actors", list_actors(admin)));
}

static void on_operations(const struct admin *admin) {
    answer(admin, 200, json_pack("{s:o}", "operations", list_operations(admin, true)));
}

static json_t *describe_pair(const struct coordinator *self, uint32_t pair) {
    json_t *holders = json_array(), *coming = json_array();
    for (uint32_t i = 0; i < self->seats; i++) {
        const struct seat *seat = &self->seat[i];
        if (seat->copy == NULL)
            continue;
        if ((seat->copy[pair] & COPY_ACTIVE) != 0)
            json_array_append_new(holders, json_string(seat->name));
        else if (seat->copy[pair] == COPY_TARGET)
            json_array_append_new(coming, json_string(seat->name));
    }
    return json_pack("{s:i, s:o, s:o}", "expert", (int)(pair % self->config.experts), "holders",
                     holders, "coming", coming);
}

static void on_placement(const struct admin *admin) {
    const struct coordinator *self = admin->self;
    const char *wanted = strstr(admin->request->query, "layer=");
    char *end = NULL;
    unsigned long only = wanted != NULL ? strtoul(wanted + 6, &end, 10) : self->config.layers;
    bool known = wanted == NULL || (end != wanted + 6 && only < self->config.layers && self->is_moe[only]);
    if (!known) {
        struct failure failure = {0};
        fail(&failure, ERR_NOT_FOUND, "layer '%.32s' has no routed experts", wanted + 6);
        answer_failure(admin, 0, &failure);
        return;
    }
    json_t *layers = json_array();
    for (uint32_t layer = 0; layer < self->config.layers; layer++) {
        if (!self->is_moe[layer] || (wanted != NULL && layer != only))
            continue;
        json_t *experts = json_array();
        for (uint32_t expert = 0; expert < self->config.experts; expert++)
            json_array_append_new(experts,
                                  describe_pair(self, layer * self->config.experts + expert));
        json_array_append_new(layers,
                              json_pack("{s:i, s:o}", "layer", (int)layer, "experts", experts));
    }
    answer(admin, 200, json_pack("{s:I, s:o}", "epoch", (json_int_t)self->epoch, "layers", layers));
}

/* ---- what is asked for ---- */

static int take_number(const struct admin *admin, const char *name, uint32_t *ret,
                       struct failure *failure) {
    const json_t *value = json_object_get(admin->body, name);
    if (!json_is_integer(value) || json_integer_value(value) < 0 ||
        json_integer_value(value) > INT32_MAX)
        return fail(failure, ERR_INVALID, "%s: a whole number expected, found %s", name,
                    value == NULL ? "nothing" : "something else");
    *ret = (uint32_t)json_integer_value(value);
    return 0;
}

/* By name or by number. */
static int take_actor(const struct admin *admin, const char *name, actor_id *ret,
                      struct failure *failure) {
    const struct coordinator *self = admin->self;
    const json_t *value = json_object_get(admin->body, name);
    const char *text = json_string_value(value);
    char *end = NULL;
    unsigned long long number = text != NULL ? strtoull(text, &end, 10) : 0;
    if (json_is_integer(value))
        number = (unsigned long long)json_integer_value(value);
    else if (text != NULL && (end == text || *end != '\0'))
        number = 0;
    else if (text == NULL)
        return fail(failure, ERR_INVALID, "%s: an actor's name or number expected", name);
    for (uint32_t i = 0; i < self->seats; i++)
        if ((number != 0 && self->seat[i].id == number) ||
            (text != NULL && strcmp(self->seat[i].name, text) == 0)) {
            *ret = self->seat[i].id;
            return 0;
        }
    return fail(failure, ERR_NOT_FOUND, "%s: there is no actor %.64s", name,
                text != NULL ? text : "of that number");
}

static void answer_operation(const struct admin *admin, int error, uint64_t id,
                             const struct failure *failure) {
    if (error < 0) {
        answer_failure(admin, 0, failure);
        return;
    }
    for (uint32_t i = 0; i < OPERATIONS_MAX; i++)
        if (admin->self->operation[i].id == id)
            answer(admin, 202,
                   json_pack("{s:o}", "operation",
                             describe_operation(admin->self, &admin->self->operation[i],
                                                admin->now_ns)));
}

static void on_scale(const struct admin *admin) {
    static const struct {
        const char *name;
        enum role role;
    } names[] = {{"experts", ROLE_EXPERT},      {"expert", ROLE_EXPERT},  {"attention", ROLE_ATTENTION},
                 {"samplers", ROLE_SAMPLER}, {"sampler", ROLE_SAMPLER}};
    struct failure failure = {0};
    uint32_t count = 0;
    uint64_t id = 0;
    enum role role = ROLE_NONE;
    const char *text = json_string_value(json_object_get(admin->body, "role"));
    for (size_t i = 0; text != NULL && i < sizeof names / sizeof *names; i++)
        if (strcmp(names[i].name, text) == 0)
            role = names[i].role;
    int error = role == ROLE_NONE ? fail(&failure, ERR_INVALID,
                                         "role: experts, attention or samplers expected, found %.64s",
                                         text != NULL ? text : "nothing")
                                  : take_number(admin, "count", &count, &failure);
    if (error == 0)
        error = operation_scale(admin->self, role, count, admin->now_ns, admin->out, &id, &failure);
    answer_operation(admin, error, id, &failure);
}

static void on_drain(const struct admin *admin) {
    struct failure failure = {0};
    actor_id actor = 0;
    uint64_t id = 0;
    int error = take_actor(admin, "actor", &actor, &failure);
    if (error == 0)
        error = operation_drain(admin->self, actor, admin->now_ns, admin->out, &id, &failure);
    answer_operation(admin, error, id, &failure);
}

static int take_pair(const struct admin *admin, uint32_t *ret_layer, uint32_t *ret_expert,
                     struct failure *failure) {
    int error = take_number(admin, "layer", ret_layer, failure);
    return error < 0 ? error : take_number(admin, "expert", ret_expert, failure);
}

static void on_move(const struct admin *admin) {
    struct failure failure = {0};
    uint32_t layer = 0, expert = 0;
    actor_id from = 0, to = 0;
    uint64_t id = 0;
    int error = take_pair(admin, &layer, &expert, &failure);
    if (error == 0)
        error = take_actor(admin, "from", &from, &failure);
    if (error == 0)
        error = take_actor(admin, "to", &to, &failure);
    if (error == 0)
        error = operation_move(admin->self, layer, expert, from, to, admin->now_ns, &id, &failure);
    answer_operation(admin, error, id, &failure);
}

static void on_replicate(const struct admin *admin) {
    struct failure failure = {0};
    uint32_t layer = 0, expert = 0;
    actor_id to = 0;
    uint64_t id = 0;
    int error = take_pair(admin, &layer, &expert, &failure);
    if (error == 0 && json_object_get(admin->body, "to") != NULL)
        error = take_actor(admin, "to", &to, &failure);
    if (error == 0)
        error = operation_replicate(admin->self, layer, expert, to, admin->now_ns, &id, &failure);
    answer_operation(admin, error, id, &failure);
}

static void on_rebalance(const struct admin *admin) {
    struct failure failure = {0};
    struct rebalance plan = {0};
    struct rebalance_wish wish = {.spare = admin->self->settings.rebalance_spare,
                                  .dry_run = json_is_true(json_object_get(admin->body, "dry_run"))};
    int error = 0;
    if (json_object_get(admin->body, "spare") != NULL)
        error = take_number(admin, "spare", &wish.spare, &failure);
    if (error == 0)
        error = rebalance(admin->self, &wish, admin->now_ns, &plan, &failure);
    if (error < 0) {
        answer_failure(admin, 0, &failure);
        return;
    }
    json_t *json = json_pack("{s:i, s:f, s:f, s:b}", "moves", (int)plan.moves, "balancedness_before",
                             plan.before, "balancedness_after", plan.after, "proposed", plan.proposed);
    if (!plan.proposed)
        json_object_set_new(json, "note", json_string("what could be gained does not pay for the moves"));
    for (uint32_t i = 0; i < OPERATIONS_MAX && plan.id != 0; i++)
        if (admin->self->operation[i].id == plan.id)
            json_object_set_new(json, "operation",
                                describe_operation(admin->self, &admin->self->operation[i], admin->now_ns));
    answer(admin, plan.id != 0 ? 202 : 200, json);
}

static void on_cancel(const struct admin *admin) {
    struct failure failure = {0};
    uint32_t id = 0;
    int error = take_number(admin, "operation", &id, &failure);
    if (error == 0)
        error = operation_cancel(admin->self, id, admin->now_ns, admin->out, &failure);
    answer_operation(admin, error, id, &failure);
}

/* vLLM says new_data_parallel_size (and a drain_timeout, which nothing needs here: no request waits for the
 * end of another), SGLang new_ep_size. Both mean processes that hold experts. */
static void on_scale_elastic_ep(const struct admin *admin) {
    struct failure failure = {0};
    bool sglang = json_object_get(admin->body, "new_ep_size") != NULL;
    uint32_t count = 0;
    uint64_t id = 0;
    int error = take_number(admin, sglang ? "new_ep_size" : "new_data_parallel_size", &count,
                            &failure);
    if (error == 0)
        error = operation_scale(admin->self, ROLE_EXPERT, count, admin->now_ns, admin->out, &id,
                                &failure);
    if (error < 0) {
        answer_failure(admin, 0, &failure);
        return;
    }
    char text[96];
    snprintf(text, sizeof text, "Scaling to %u expert processes", count);
    answer(admin, 200, json_pack("{s:s, s:I, s:b}", "message", text, "operation", (json_int_t)id,
                                 "success", 1));
}

static void on_is_scaling(const struct admin *admin) {
    const struct coordinator *self = admin->self;
    bool scaling = false;
    uint32_t experts = 0;
    for (uint32_t i = 0; i < OPERATIONS_MAX; i++)
        scaling = scaling || (self->operation[i].kind == OPERATION_SCALE &&
                              self->operation[i].role == ROLE_EXPERT &&
                              !operation_ended(&self->operation[i]));
    for (uint32_t i = 0; i < self->seats; i++)
        experts += self->seat[i].role == ROLE_EXPERT && !self->seat[i].draining;
    answer(admin, 200, json_pack("{s:b, s:i}", "is_scaling_elastic_ep", scaling, "ep_size",
                                 (int)experts));
}

static void on_start_record(const struct admin *admin) {
    struct failure failure = {0};
    uint32_t window_ms = WINDOW_MS;
    int error = 0;
    if (json_object_get(admin->body, "window_ms") != NULL)
        error = take_number(admin, "window_ms", &window_ms, &failure);
    if (error == 0)
        error = recording_start(admin->self, window_ms, admin->now_ns, &failure);
    if (error < 0)
        answer_failure(admin, 0, &failure);
    else
        answer(admin, 200, json_pack("{s:b, s:i}", "recording", 1, "window_ms", (int)window_ms));
}

static void on_stop_record(const struct admin *admin) {
    recording_stop(admin->self);
    answer(admin, 200, json_pack("{s:b, s:i}", "recording", 0, "windows",
                                 (int)admin->self->recording.windows));
}

static void on_dump_record(const struct admin *admin) {
    if (admin->self->recording.windows == 0) {
        struct failure failure = {0};
        fail(&failure, ERR_STATE, "nothing has been recorded: start_expert_distribution_record "
                                  "begins, the first window follows after its window_ms");
        answer_failure(admin, 0, &failure);
        return;
    }
    size_t size = 0;
    const uint8_t *file = recording_file(admin->self, &size, admin->out);
    answer_bytes(admin, 200, "application/octet-stream", file, size);
}

/* ---- the routing bias ---- */

static const char *bias_state(const struct bias_versions *bias, const struct bias_live *version,
                              uint32_t users) {
    if (version->id == bias->current)
        return "current";
    if (version->id == bias->coming)
        return "coming";
    return users > 0 ? "in use" : "idle";
}

static json_t *describe_bias(const struct coordinator *self, const struct bias_live *version) {
    uint32_t requests = 0, sequences = 0, holders = 0;
    double largest = 0;
    char name[BIAS_NAME_BYTES];
    bias_name(name, version->id);
    for (uint32_t pair = 0; pair < self->pairs; pair++)
        largest = fmax(largest, fabs((double)version->delta[pair]));
    for (uint32_t i = 0; i < self->seats; i++) {
        const struct seat *seat = &self->seat[i];
        for (uint32_t held = 0; held < seat->bias.count; held++) {
            if (seat->bias.id[held] != version->id)
                continue;
            holders++;
            *(seat->role == ROLE_GATEWAY ? &requests : &sequences) += seat->bias.users[held];
        }
    }
    return json_pack("{s:I, s:s, s:s, s:i, s:i, s:i, s:f}", "version",
                     (json_int_t)bias_number(version->id), "name", name, "state",
                     bias_state(&self->bias, version, requests + sequences), "holders", (int)holders,
                     "requests", (int)requests, "sequences", (int)sequences, "largest", largest);
}

static void answer_bias(const struct admin *admin) {
    const struct coordinator *self = admin->self;
    const struct bias_versions *bias = &self->bias;
    char name[BIAS_NAME_BYTES];
    bias_name(name, bias->current);
    json_t *versions = json_array();
    for (uint32_t i = 0; i < BIAS_VERSIONS_MAX; i++)
        if (bias->version[i].id != 0)
            json_array_append_new(versions, describe_bias(self, &bias->version[i]));
    json_t *json = json_pack(
        "{s:b, s:I, s:s, s:f, s:f, s:I, s:o}", "on", bias->on, "version",
        (json_int_t)bias_number(bias->current), "name", name, "gamma", bias->rule.gamma, "clamp",
        bias->rule.clamp, "interval_ms", (json_int_t)(bias->interval_ns / 1000000u), "versions", versions);
    if (bias->mean >= 0) /* of the last interval that moved them */
        json_object_set_new(json, "imbalance",
                            json_pack("{s:f, s:f}", "mean", bias->mean, "worst", bias->worst));
    answer(admin, 200, json);
}

static int take_real(const struct admin *admin, const char *name, double *ret,
                     struct failure *failure) {
    const json_t *value = json_object_get(admin->body, name);
    if (value == NULL)
        return 0;
    if (!json_is_number(value))
        return fail(failure, ERR_INVALID, "%s: a number expected", name);
    *ret = json_number_value(value);
    return 0;
}

static void on_bias(const struct admin *admin) {
    struct coordinator *self = admin->self;
    struct failure failure = {0};
    const char *action = json_string_value(json_object_get(admin->body, "action"));
    struct bias_rule rule = self->bias.rule;
    uint32_t interval_ms = (uint32_t)(self->bias.interval_ns / 1000000u);
    int error = 0;
    if (strcmp(admin->request->method, "GET") == 0) {
        answer_bias(admin);
        return;
    }
    bool on = action != NULL && strcmp(action, "on") == 0;
    bool off = action != NULL && strcmp(action, "off") == 0;
    bool reset = action != NULL && strcmp(action, "reset") == 0;
    if (!on && !off && !reset)
        error = fail(&failure, ERR_INVALID, "action: on, off or reset expected, found %.64s",
                     action != NULL ? action : "nothing");
    if (error == 0)
        error = take_real(admin, "gamma", &rule.gamma, &failure);
    if (error == 0)
        error = take_real(admin, "clamp", &rule.clamp, &failure);
    if (error == 0 && json_object_get(admin->body, "interval_ms") != NULL)
        error = take_number(admin, "interval_ms", &interval_ms, &failure);
    if (error == 0 && (on || off))
        error = bias_switch(self, on, &rule, interval_ms, admin->now_ns, &failure);
    if (error == 0 && reset)
        bias_reset(self, admin->now_ns, admin->out);
    if (error < 0)
        answer_failure(admin, 0, &failure);
    else
        answer_bias(admin);
}

/* ---- ways in ---- */

static const struct route {
    const char *path;
    bool get, post;
    void (*handle)(const struct admin *admin);
} ROUTES[] = {
    {"/status", true, false, on_status},
    {"/actors", true, false, on_actors},
    {"/placement", true, false, on_placement},
    {"/operations", true, false, on_operations},
    {"/bias", true, true, on_bias},
    {"/scale", false, true, on_scale},
    {"/drain", false, true, on_drain},
    {"/move", false, true, on_move},
    {"/replicate", false, true, on_replicate},
    {"/rebalance", false, true, on_rebalance},
    {"/cancel", false, true, on_cancel},
    {"/scale_elastic_ep", false, true, on_scale_elastic_ep},
    {"/is_scaling_elastic_ep", true, true, on_is_scaling},
    {"/start_expert_distribution_record", true, true, on_start_record},
    {"/stop_expert_distribution_record", true, true, on_stop_record},
    {"/dump_expert_distribution_record", true, true, on_dump_record},
};

/* Takes the same time wherever the difference is. */
static bool same_secret(const char *given, const char *wanted) {
    size_t length = strlen(wanted);
    unsigned difference = strlen(given) != length;
    for (size_t i = 0; i < length && difference < 2; i++)
        difference |= (unsigned)(given[i < strlen(given) ? i : 0] != wanted[i]);
    return difference == 0;
}

static bool allowed(const struct admin *admin) {
    const char *wanted = admin->self->admin_token, *given = admin->request->authorization;
    if (wanted == NULL)
        return true;
    return given != NULL && strncmp(given, "Bearer ", 7) == 0 && same_secret(given + 7, wanted);
}

static const struct route *find_route(const char *path) {
    for (size_t i = 0; i < sizeof ROUTES / sizeof *ROUTES; i++)
        if (strcmp(ROUTES[i].path, path) == 0)
            return &ROUTES[i];
    return NULL;
}

void admin_on_request(struct coordinator *self, const struct http_request *request,
                      uint64_t now_ns, struct effects *out) {
    struct admin admin = {self, request, NULL, now_ns, out};
    struct failure failure = {0};
    const struct route *route = find_route(request->path);
    bool get = strcmp(request->method, "GET") == 0, post = strcmp(request->method, "POST") == 0;
    uint16_t status = 0;
    json_error_t where;
    if (admin_view(self, request, allowed(&admin), out))
        return;
    if (!allowed(&admin))
        status = (uint16_t)(fail(&failure, ERR_INVALID, "the admin token is missing or wrong"), 401);
    else if (route == NULL)
        status = (uint16_t)(fail(&failure, ERR_NOT_FOUND, "there is no %.128s here", request->path), 404);
    else if (!(get && route->get) && !(post && route->post))
        status = (uint16_t)(fail(&failure, ERR_INVALID, "%s does not take %.16s", route->path,
                                 request->method), 405);
    else if (request->body_bytes > BODY_BYTES_MAX)
        status = (uint16_t)(fail(&failure, ERR_TOO_LARGE, "a body of at most %u bytes expected, found %zu",
                                 BODY_BYTES_MAX, request->body_bytes), 413);
    else if (request->body_bytes == 0)
        admin.body = json_object();
    else if ((admin.body = json_loadb(request->body, request->body_bytes, 0, &where)) == NULL ||
             !json_is_object(admin.body))
        status = (uint16_t)(fail(&failure, ERR_INVALID, "a JSON object expected in the body"), 400);
    if (status != 0)
        answer_failure(&admin, status, &failure);
    else
        route->handle(&admin);
    json_decref(admin.body);
}
