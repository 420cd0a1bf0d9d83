/* See request_trace.h. Times are this gateway's clock; durations told by attention actors are theirs, so
 * clocks need not agree. */
#include "actors/gateway/request_trace.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "actors/gateway/gateway.h"

/* ---- who served ---- */

static void add_server(struct server_list *self, actor_id id, uint64_t rows) {
    for (uint32_t i = 0; i < self->servers; i++)
        if (self->server[i].id == id) {
            self->server[i].rows += rows;
            return;
        }
    if (self->servers == TRACE_SERVERS_MAX)
        return;
    self->server =
        gateway_grow(self->server, &self->capacity, self->servers + 1, sizeof *self->server);
    self->server[self->servers++] = (struct server){id, rows};
}

void server_list_add(struct server_list *self, const Troupe__Trace *trace) {
    for (size_t i = 0; i < trace->n_actor; i++)
        add_server(self, trace->actor[i], trace->rows[i]);
    if (trace->sampler != 0)
        self->sampler = trace->sampler;
}

void server_list_free(struct server_list *self) {
    free(self->server);
    memset(self, 0, sizeof *self);
}

/* ---- the ring ---- */

static void clear(struct request_trace *trace) {
    if (trace->request != NULL)
        trace->request->trace = NULL;
    for (uint32_t i = 0; i < TRACE_LEGS_MAX; i++)
        free(trace->leg[i].layer_ns);
    server_list_free(&trace->served);
    memset(trace, 0, sizeof *trace);
}

void request_traces_free(struct request_traces *self) {
    for (uint32_t i = 0; self->ring != NULL && i < REQUEST_TRACES; i++)
        clear(&self->ring[i]);
    free(self->ring);
    memset(self, 0, sizeof *self);
}

static bool take_hex(const char *from, size_t length, char *ret) {
    bool zero = true;
    for (size_t i = 0; i < length; i++) {
        if (strchr("0123456789abcdef", from[i]) == NULL || from[i] == '\0')
            return false;
        zero = zero && from[i] == '0';
    }
    if (zero)
        return false;
    memcpy(ret, from, length);
    ret[length] = '\0';
    return true;
}

/* "00-<32 hex: trace>-<16 hex: parent>-<2 hex: flags>"; a version that is not known may be longer. What
 * does not fit is ignored, as W3C Trace Context wants it. Returns whether the caller samples it. */
static bool take_traceparent(struct request_trace *trace, const char *header) {
    char version[3], flags[3];
    size_t length = header == NULL ? 0 : strlen(header);
    bool fits = length >= 55 && header[2] == '-' && header[35] == '-' && header[52] == '-' &&
                (length == 55 || (header[55] == '-' && strncmp(header, "00", 2) != 0));
    if (!fits || (!take_hex(header, 2, version) && strncmp(header, "00", 2) != 0) ||
        strncmp(header, "ff", 2) == 0)
        return false;
    bool flagged = take_hex(header + 53, 2, flags);
    if ((!flagged && strncmp(header + 53, "00", 2) != 0) || !take_hex(header + 3, 32, trace->trace))
        return false;
    if (!take_hex(header + 36, 16, trace->parent)) {
        trace->trace[0] = '\0';
        return false;
    }
    return flagged && (strtoul(flags, NULL, 16) & 1) != 0;
}

void trace_request(struct gateway *self, struct request *request, const struct http_request *http,
                   uint64_t now_ns) {
    struct request_traces *traces = &self->traces;
    if (traces->ring == NULL)
        traces->ring = calloc(REQUEST_TRACES, sizeof *traces->ring);
    ASSERT(traces->ring != NULL && "memory for traces");
    uint64_t number = traces->count++;
    struct request_trace *trace = &traces->ring[number % REQUEST_TRACES];
    clear(trace);
    trace->request = request;
    request->trace = trace;
    snprintf(trace->id, sizeof trace->id, "%s", request->id);
    bool sampled = take_traceparent(trace, http->traceparent);
    uint64_t random = gateway_mix(self->sequence_key, ~number);
    if (trace->trace[0] == '\0')
        snprintf(trace->trace, sizeof trace->trace, "%016" PRIx64 "%016" PRIx64,
                 gateway_mix(random, 1), gateway_mix(random, 2) | 1);
    snprintf(trace->span, sizeof trace->span, "%016" PRIx64, gateway_mix(random, 3) | 1);
    trace->show = http->trace != NULL && strcmp(http->trace, "0") != 0;
    /* a caller that says that it does not sample is believed */
    trace->detailed = trace->show || sampled || (request->named && trace->parent[0] == '\0');
    trace->arrived_ns = now_ns;
    trace->first_ns = trace->last_ns = trace->ended_ns = trace->queue_ns = NEVER;
    trace->prompt_tokens = request->tokens;
    trace->choices = request->choices;
}

/* ---- what happens ---- */

void trace_placed(struct choice *choice, uint64_t now_ns) {
    struct request_trace *trace = choice->request->trace;
    if (choice->placed_ns == 0)
        choice->placed_ns = now_ns;
    if (trace == NULL)
        return;
    uint32_t place = trace->legs < TRACE_LEGS_MAX ? trace->legs : TRACE_LEGS_MAX - 1;
    struct trace_leg *leg = &trace->leg[place];
    trace->legs++;
    free(leg->layer_ns);
    *leg = (struct trace_leg){.choice = choice->index,
                              .actor = choice->actor,
                              .placed_ns = now_ns,
                              .queue_ns = NEVER,
                              .first_ns = NEVER,
                              .last_ns = NEVER};
}

/* The newest run of the choice. */
static struct trace_leg *leg_of(struct request_trace *trace, const struct choice *choice) {
    uint32_t legs = trace->legs < TRACE_LEGS_MAX ? trace->legs : TRACE_LEGS_MAX;
    while (legs-- > 0)
        if (trace->leg[legs].choice == choice->index && trace->leg[legs].actor == choice->actor)
            return &trace->leg[legs];
    return NULL;
}

static void take_detail(const struct gateway *self, struct request_trace *trace,
                        struct trace_leg *leg, const Troupe__Trace *told) {
    size_t stages = (size_t)self->config.layers * TRACE_STAGES;
    server_list_add(&trace->served, told);
    if (leg == NULL || told->n_layer_ns != stages || told->steps < leg->steps)
        return; /* overtaken by a newer message: these are totals */
    leg->steps = told->steps;
    leg->step_ns = told->step_ns;
    leg->prefill_ns = told->prefill_ns;
    leg->sample_ns = told->sample_ns;
    leg->resent = told->resent;
    leg->hedged = told->hedged;
    if (leg->layer_ns == NULL)
        leg->layer_ns = calloc(stages + 1, sizeof *leg->layer_ns);
    ASSERT(leg->layer_ns != NULL && "memory for traces");
    memcpy(leg->layer_ns, told->layer_ns, stages * sizeof *leg->layer_ns);
}

void trace_tokens(struct gateway *self, struct choice *choice, const Troupe__Tokens *tokens,
                  uint32_t taken, uint64_t now_ns) {
    struct request_trace *trace = choice->request->trace;
    if (taken > 0 && choice->tokens == taken)
        choice->queue_ns = choice->placed_ns - choice->request->arrived_ns + tokens->queue_ns;
    if (trace == NULL)
        return;
    struct trace_leg *leg = leg_of(trace, choice);
    if (tokens->trace != NULL && trace->detailed) {
        take_detail(self, trace, leg, tokens->trace);
        if (trace->show)
            server_list_add(&choice->served, tokens->trace);
    }
    if (taken == 0)
        return;
    trace->tokens += taken;
    if (trace->first_ns == NEVER) {
        trace->first_ns = now_ns;
        trace->queue_ns = choice->queue_ns;
    }
    trace->last_ns = now_ns;
    if (leg == NULL)
        return;
    if (leg->first_ns == NEVER) {
        leg->first_ns = now_ns;
        leg->queue_ns = tokens->queue_ns;
    }
    leg->last_ns = now_ns;
    leg->tokens += taken;
}

void trace_ended(struct request *request, enum metric_finish finish, uint64_t now_ns) {
    struct request_trace *trace = request->trace;
    if (trace == NULL)
        return;
    trace->ended_ns = now_ns;
    trace->finish = finish;
    trace->request = NULL;
    request->trace = NULL;
}

const char *trace_header(const struct request *request, struct effects *out) {
    static const char NAME[] = "X-Request-Id: ";
    char line[sizeof NAME + sizeof request->id];
    const char *dash = strchr(request->id, '-'); /* the client's own id, as it gave it */
    int size = snprintf(line, sizeof line, "%s%s", NAME,
                        request->named && dash != NULL ? dash + 1 : request->id);
    return effects_copy(out, line, (size_t)size + 1);
}

/* ---- JSON ---- */

static void put_name(struct text *out, const struct gateway *self, actor_id id) {
    const char *name = events_name_of(&self->feed, id);
    char number[32];
    snprintf(number, sizeof number, "actor %u", id);
    text_json_string(out, name != NULL ? name : number);
}

static void put_ms(struct text *out, const char *name, uint64_t ns) {
    if (ns == NEVER)
        text_format(out, ",\"%s\":null", name);
    else
        text_format(out, ",\"%s\":%.3f", name, (double)ns * 1e-6);
}

static uint64_t between(uint64_t from_ns, uint64_t to_ns) {
    return from_ns == NEVER || to_ns == NEVER || to_ns < from_ns ? NEVER : to_ns - from_ns;
}

static void put_servers(struct text *out, const struct gateway *self,
                        const struct server_list *list) {
    text_puts(out, "[");
    for (uint32_t i = 0; i < list->servers; i++) {
        text_puts(out, i == 0 ? "[" : ",[");
        put_name(out, self, list->server[i].id);
        text_format(out, ",%" PRIu64 "]", list->server[i].rows);
    }
    text_puts(out, "]");
}

void trace_write_served(struct text *out, const struct gateway *self, struct choice *choice) {
    text_puts(out, ",\"troupe\":{\"attention\":");
    put_name(out, self, choice->actor);
    text_puts(out, ",\"experts\":");
    put_servers(out, self, &choice->served);
    if (choice->served.sampler != 0) {
        text_puts(out, ",\"sampler\":");
        put_name(out, self, choice->served.sampler);
    }
    text_puts(out, "}");
    choice->served.servers = 0;
    choice->served.sampler = 0;
}

static void put_head(struct text *out, const struct gateway *self,
                     const struct request_trace *trace) {
    static const char *const ENDS[] = {"stop", "length", "abort", "error"};
    uint64_t unix_ms = (uint64_t)((int64_t)trace->arrived_ns + self->unix_offset_ns) / NS_PER_MS;
    text_puts(out, "\"id\":");
    text_json_string(out, trace->id);
    text_format(out,
                ",\"t\":%" PRIu64 ",\"state\":\"%s\",\"prompt_tokens\":%u,\"tokens\":%u"
                ",\"traced\":%s",
                unix_ms, trace->ended_ns == NEVER ? "running" : ENDS[trace->finish],
                trace->prompt_tokens, trace->tokens, trace->detailed ? "true" : "false");
    put_ms(out, "total_ms", between(trace->arrived_ns, trace->ended_ns));
}

static void put_leg(struct text *out, const struct gateway *self, const struct request_trace *trace,
                    const struct trace_leg *leg) {
    text_format(out, "{\"choice\":%u,\"attention\":", leg->choice);
    put_name(out, self, leg->actor);
    put_ms(out, "placed_ms", leg->placed_ns - trace->arrived_ns);
    put_ms(out, "queue_ms", leg->queue_ns);
    put_ms(out, "first_ms", between(trace->arrived_ns, leg->first_ns));
    put_ms(out, "last_ms", between(trace->arrived_ns, leg->last_ns));
    text_format(out, ",\"tokens\":%u", leg->tokens);
    if (leg->layer_ns != NULL) {
        text_format(out, ",\"steps\":%" PRIu64 ",\"resent\":%" PRIu64 ",\"hedged\":%" PRIu64,
                    leg->steps, leg->resent, leg->hedged);
        put_ms(out, "steps_ms", leg->step_ns);
        put_ms(out, "prefill_steps_ms", leg->prefill_ns);
        put_ms(out, "sampling_ms", leg->sample_ns);
    }
    text_puts(out, "}");
}

static uint32_t kept_legs(const struct request_trace *trace) {
    return trace->legs < TRACE_LEGS_MAX ? trace->legs : TRACE_LEGS_MAX;
}

static void put_layers(struct text *out, const struct gateway *self,
                       const struct request_trace *trace) {
    text_puts(out, ",\"layers\":[");
    for (uint32_t l = 0; l < self->config.layers; l++) {
        uint64_t sum[TRACE_STAGES] = {0};
        for (uint32_t i = 0; i < kept_legs(trace); i++)
            for (uint32_t s = 0; trace->leg[i].layer_ns != NULL && s < TRACE_STAGES; s++)
                sum[s] += trace->leg[i].layer_ns[(size_t)l * TRACE_STAGES + s];
        text_format(out, "%s{\"layer\":%u", l == 0 ? "" : ",", l);
        put_ms(out, "attention_ms", sum[0]);
        put_ms(out, "dispatch_ms", sum[1]);
        put_ms(out, "experts_ms", sum[2]);
        put_ms(out, "combine_ms", sum[3]);
        text_puts(out, "}");
    }
    text_puts(out, "]");
}

static void put_all(struct text *out, const struct gateway *self,
                    const struct request_trace *trace) {
    text_puts(out, "{\"v\":1,");
    put_head(out, self, trace);
    text_format(out, ",\"trace_id\":\"%s\",\"span_id\":\"%s\",\"parent_span_id\":", trace->trace,
                trace->span);
    text_format(out, trace->parent[0] != '\0' ? "\"%s\"" : "null%s", trace->parent);
    put_ms(out, "queue_ms", trace->queue_ns);
    uint64_t begun_ns =
        trace->queue_ns == NEVER ? NEVER : trace->arrived_ns + trace->queue_ns;
    put_ms(out, "prefill_ms", between(begun_ns, trace->first_ns));
    put_ms(out, "decode_ms", between(trace->first_ns, trace->last_ns));
    text_format(out, ",\"runs\":%u,\"run\":[", trace->legs);
    for (uint32_t i = 0; i < kept_legs(trace); i++) {
        text_puts(out, i == 0 ? "" : ",");
        put_leg(out, self, trace, &trace->leg[i]);
    }
    text_puts(out, "]");
    if (trace->detailed) {
        put_layers(out, self, trace);
        text_puts(out, ",\"experts\":");
        put_servers(out, self, &trace->served);
    }
    text_puts(out, "}");
}

static const struct request_trace *nth_newest(const struct gateway *self, uint64_t n) {
    const struct request_traces *traces = &self->traces;
    if (n >= traces->count || n >= REQUEST_TRACES)
        return NULL;
    return &traces->ring[(traces->count - 1 - n) % REQUEST_TRACES];
}

void trace_write_list(struct text *out, const struct gateway *self) {
    text_puts(out, "{\"v\":1,\"requests\":[");
    const struct request_trace *trace;
    for (uint64_t n = 0; (trace = nth_newest(self, n)) != NULL; n++) {
        text_puts(out, n == 0 ? "{" : ",{");
        put_head(out, self, trace);
        text_puts(out, "}");
    }
    text_puts(out, "]}");
}

bool trace_write(struct text *out, const struct gateway *self, const char *id) {
    const struct request_trace *trace;
    for (uint64_t n = 0; (trace = nth_newest(self, n)) != NULL; n++) {
        const char *dash = strchr(trace->id, '-');
        if (strcmp(trace->id, id) == 0 || (dash != NULL && strcmp(dash + 1, id) == 0)) {
            put_all(out, self, trace);
            return true;
        }
    }
    return false;
}
