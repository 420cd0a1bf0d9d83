/* The live view's feed: what COMMIT and STATS become, that differences add up to totals, the
 * timeline of a fault with its milliseconds, and that nothing is done for nobody. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/support/gateway_rig.h"
#include "tests/support/model_files.h"
#include "tests/support/random.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#define COORDINATOR_INCARNATION 77
#define CELLS_MAX               (16 * 256)

/* ---- an epoch and statistics, made by hand ---- */

struct cluster {
    struct rig *rig;
    struct {
        actor_id id;
        uint64_t incarnation;
        enum role role;
        const char *name;
        Troupe__ActorState state;
    } member[8];
    uint32_t members;
    uint32_t layer[16], expert[16], holder[16], copies;
    bool serving;
    uint64_t bias_version;
    Troupe__Loss *loss;                 /* NULL: none is told of */
    Troupe__OperationStats *operation; /* likewise */
};

static void add(struct cluster *self, actor_id id, uint64_t incarnation, enum role role,
                const char *name) {
    uint32_t at = self->members++;
    self->member[at].id = id;
    self->member[at].incarnation = incarnation;
    self->member[at].role = role;
    self->member[at].name = name;
    self->member[at].state = TROUPE__ACTOR_STATE__STATE_READY;
}

static void hold(struct cluster *self, uint32_t layer, uint32_t expert, uint32_t holder) {
    self->layer[self->copies] = layer;
    self->expert[self->copies] = expert;
    self->holder[self->copies++] = holder;
}

static void fill_member(const struct cluster *self, uint32_t i, Troupe__Member *member) {
    troupe__member__init(member);
    member->id = self->member[i].id;
    member->incarnation = self->member[i].incarnation;
    member->role = (Troupe__Role)self->member[i].role;
    member->name = (char *)self->member[i].name;
    member->control_address = member->data_address = member->host = "host \"1\"";
    member->state = self->member[i].state;
}

static void commit(struct cluster *self) {
    Troupe__Member member[8], *list[8];
    for (uint32_t i = 0; i < self->members; i++) {
        fill_member(self, i, &member[i]);
        list[i] = &member[i];
    }
    Troupe__Commit body = TROUPE__COMMIT__INIT;
    body.epoch = ++self->rig->epoch;
    body.n_member = self->members;
    body.member = list;
    body.n_layer = body.n_expert = body.n_holder = self->copies;
    body.layer = self->layer;
    body.expert = self->expert;
    body.holder = self->holder;
    body.serving = self->serving;
    body.bias_version = self->bias_version;
    body.n_lost = self->loss != NULL;
    body.lost = &self->loss;
    message envelope = TROUPE__ENVELOPE__INIT;
    envelope.body_case = TROUPE__ENVELOPE__BODY_COMMIT;
    envelope.commit = &body;
    rig_message(self->rig, ACTOR_COORDINATOR, COORDINATOR_INCARNATION, &envelope);
}

static void stats(struct cluster *self, const uint64_t *rows, uint64_t age_ms) {
    Troupe__ActorStats actor[8], *list[8];
    Troupe__Member member[8];
    Troupe__Heartbeat heartbeat[8];
    uint32_t layer[CELLS_MAX], expert[CELLS_MAX], experts = self->rig->config.experts;
    uint64_t load[CELLS_MAX];
    for (uint32_t i = 0; i < self->members; i++) {
        fill_member(self, i, &member[i]);
        troupe__heartbeat__init(&heartbeat[i]);
        heartbeat[i].memory_bytes = 1000 + self->member[i].id;
        if (self->member[i].role == ROLE_ATTENTION) {
            heartbeat[i].spec_draft_tokens = 40;
            heartbeat[i].spec_accepted_tokens = 30;
            heartbeat[i].rows_audited = UINT64_C(5000000000);
        }
        troupe__actor_stats__init(&actor[i]);
        actor[i].member = &member[i];
        actor[i].heartbeat = i == 0 ? NULL : &heartbeat[i]; /* not yet heard of */
        actor[i].heartbeat_age_ns = age_ms * 1000000;
        list[i] = &actor[i];
    }
    Troupe__Stats body = TROUPE__STATS__INIT;
    body.n_actor = self->members;
    body.actor = list;
    uint32_t count = self->rig->config.layers * experts;
    assert_true(count <= CELLS_MAX);
    for (uint32_t cell = 0; cell < count; cell++) {
        layer[cell] = cell / experts;
        expert[cell] = cell % experts;
        load[cell] = rows[cell];
    }
    body.n_load_layer = body.n_load_expert = body.n_load_rows = count;
    body.load_layer = layer;
    body.load_expert = expert;
    body.load_rows = load;
    body.n_operation = self->operation != NULL;
    body.operation = &self->operation;
    message envelope = TROUPE__ENVELOPE__INIT;
    envelope.body_case = TROUPE__ENVELOPE__BODY_STATS;
    envelope.stats = &body;
    rig_message(self->rig, ACTOR_COORDINATOR, COORDINATOR_INCARNATION, &envelope);
}

static void open_cluster(struct cluster *ret) {
    memset(ret, 0, sizeof *ret);
    ret->rig = rig_open(&(struct rig_options){.chat = CHAT_DEMO, .view = true}, NULL);
    add(ret, 9, 5, ROLE_GATEWAY, "gateway-0");
    add(ret, 20, 200, ROLE_ATTENTION, "attention-0");
    add(ret, 50, 500, ROLE_EXPERT, "expert-0");
    add(ret, 51, 510, ROLE_EXPERT, "expert \"1\"");
    hold(ret, 1, 0, 50);
    hold(ret, 1, 1, 51);
    hold(ret, 1, 0, 51);
    ret->serving = true;
    commit(ret);
}

static void ticks(struct cluster *self, uint32_t count) {
    for (uint32_t i = 0; i < count; i++)
        rig_tick(self->rig);
}

/* ---- reading a feed ---- */

/* All events of a name; each must be an object of the version. `name` NULL: all. */
static json_t *read_events(const struct rig *rig, uint64_t client, const char *name) {
    json_t *list = json_array();
    char *copy = strdup(rig_answer(rig, client)->text), *rest = copy, *at;
    while ((at = strstr(rest, "\n\n")) != NULL) {
        char kind[32];
        int prefix = 0;
        *at = '\0';
        if (sscanf(rest, "event: %31s\ndata: %n", kind, &prefix) != 1 || prefix == 0)
            fail_msg("not an event: %s", rest);
        json_error_t error;
        json_t *event = json_loads(rest + prefix, 0, &error);
        if (event == NULL)
            fail_msg("%s: %s", error.text, rest);
        assert_int_equal(json_integer_value(json_object_get(event, "v")), 1);
        if (name == NULL || strcmp(kind, name) == 0)
            json_array_append(list, event);
        json_decref(event);
        rest = at + 2;
    }
    assert_string_equal(rest, ""); /* whole events only */
    free(copy);
    return list;
}

static json_int_t number(const json_t *event, const char *key) {
    if (!json_is_integer(json_object_get(event, key)))
        fail_msg("%s is no whole number", key);
    return json_integer_value(json_object_get(event, key));
}

/* The newest event of the moment that is about this actor and of this kind. */
static json_t *find_moment(const struct rig *rig, uint64_t client, const char *kind,
                           const char *name) {
    json_t *list = read_events(rig, client, "moment"), *found = NULL;
    for (size_t i = json_array_size(list); i-- > 0 && found == NULL;) {
        json_t *event = json_array_get(list, i);
        const char *whose = json_string_value(json_object_get(event, "name"));
        if (strcmp(json_string_value(json_object_get(event, "kind")), kind) == 0 &&
            (name == NULL || (whose != NULL && strcmp(whose, name) == 0)))
            found = json_incref(event);
    }
    json_decref(list);
    return found;
}

static void sum_loads(const struct rig *rig, uint64_t client, uint64_t *ret_rows) {
    json_t *list = read_events(rig, client, "load"), *event;
    size_t i, cells = (size_t)rig->config.layers * rig->config.experts;
    memset(ret_rows, 0, cells * sizeof *ret_rows);
    json_array_foreach(list, i, event) {
        assert_int_equal(json_is_true(json_object_get(event, "base")), i == 0);
        json_t *pairs = json_object_get(event, "cells");
        size_t cell = 0;
        for (size_t n = 0; n < json_array_size(pairs); n += 2) {
            cell += (size_t)json_integer_value(json_array_get(pairs, n));
            assert_true(cell < cells);
            ret_rows[cell++] += (uint64_t)json_integer_value(json_array_get(pairs, n + 1));
        }
    }
    json_decref(list);
}

/* ---- tests ---- */

static void without_the_option_there_is_no_view(void **state) {
    (void)state;
    struct rig *rig = rig_open(&(struct rig_options){.chat = CHAT_DEMO}, NULL);
    json_decref(rig_get(rig, "/troupe/events", 404));
    json_decref(rig_get(rig, "/", 404));
    rig_close(rig);
}

static void the_key_is_asked_for_and_listeners_are_limited(void **state) {
    (void)state;
    struct rig *rig =
        rig_open(&(struct rig_options){.chat = CHAT_DEMO, .view = true, .api_key = "k"}, NULL);
    json_decref(rig_get(rig, "/troupe/events", 401));
    /* The page itself holds nothing secret: it asks for the key. */
    uint64_t page = rig_http(rig, "GET", "/", NULL, NULL);
    assert_int_equal(rig_answer(rig, page)->status, 200);
    assert_string_equal(rig_answer(rig, page)->content_type, "text/html; charset=utf-8");
    assert_memory_equal(rig_answer(rig, page)->header, "Content-Security-Policy: default-src", 36);
    assert_memory_equal(rig_answer(rig, page)->text, "<!doctype html>\n", 16);
    assert_non_null(strstr(rig_answer(rig, page)->text, "\"\\n\\n\"")); /* escapes survive */
    assert_non_null(strstr(rig_answer(rig, page)->text, "</html>\n"));
    uint64_t first = 0;
    for (int i = 0; i < 16; i++) {
        uint64_t client = rig_http(rig, "GET", "/troupe/events", "Bearer k", NULL);
        assert_int_equal(rig_answer(rig, client)->status, 200);
        assert_string_equal(rig_answer(rig, client)->content_type, "text/event-stream");
        first = first == 0 ? client : first;
    }
    uint64_t late = rig_http(rig, "GET", "/troupe/events", "Bearer k", NULL);
    assert_int_equal(rig_answer(rig, late)->status, 503);
    rig_deliver(rig, &(struct event){.kind = EVENT_CLIENT_GONE, .client = first});
    late = rig_http(rig, "GET", "/troupe/events", "Bearer k", NULL);
    assert_int_equal(rig_answer(rig, late)->status, 200);
    uint64_t head = rig_http(rig, "HEAD", "/troupe/events", "Bearer k", NULL);
    assert_true(rig_answer(rig, head)->last);
    rig_deliver(rig, &(struct event){.kind = EVENT_SHUTDOWN});
    assert_true(rig_answer(rig, late)->last); /* nobody is waited for at the end */
    rig_close(rig);
}

static void a_listener_is_told_everything_at_once(void **state) {
    (void)state;
    struct cluster cluster;
    open_cluster(&cluster);
    uint64_t rows[CELLS_MAX] = {0};
    rows[cluster.rig->config.experts + 1] = 7;
    stats(&cluster, rows, 30);
    uint64_t client = rig_http(cluster.rig, "GET", "/troupe/events", NULL, NULL);
    json_t *hello = read_events(cluster.rig, client, "hello");
    assert_int_equal(json_array_size(hello), 1);
    assert_int_equal(number(json_array_get(hello, 0), "layers"), cluster.rig->config.layers);
    assert_true(json_is_false(json_object_get(json_array_get(hello, 0), "faults")));
    json_t *epochs = read_events(cluster.rig, client, "epoch");
    char *text = json_dumps(json_object_get(json_array_get(epochs, 0), "members"), JSON_COMPACT);
    assert_non_null(strstr(text, "[51,\"expert\",\"expert \\\"1\\\"\",\"ready\","
                                 "\"00000000000001fe\",2,\"host \\\"1\\\"\"]"));
    free(text);
    text = json_dumps(json_object_get(json_array_get(epochs, 0), "placement"), JSON_COMPACT);
    assert_memory_equal(text, "[[1,[[50,51],51,0,", 18);
    free(text);
    json_t *actors = read_events(cluster.rig, client, "actors");
    text = json_dumps(json_object_get(json_array_get(actors, 0), "actors"), JSON_COMPACT);
    assert_memory_equal(text, "[[9,30,2,0,0,0,0,0,0,0,0,0,0],[20,30,2,1020,", 44);
    free(text);
    text = json_dumps(json_object_get(json_array_get(actors, 0), "sums"), JSON_COMPACT);
    assert_string_equal(text, "{\"cache_queries\":0,\"cache_hits\":0,\"guessed\":40,\"accepted\":30,"
                              "\"put_back\":0,\"sent_again\":0,\"audited\":5000000000,\"differed\":0,"
                              "\"unaudited\":0,\"quarantines\":0}");
    free(text);
    uint64_t sums[CELLS_MAX];
    sum_loads(cluster.rig, client, sums);
    assert_memory_equal(sums, rows, sizeof rows[0] * cluster.rig->config.experts * 2);
    json_decref(hello);
    json_decref(epochs);
    json_decref(actors);
    rig_close(cluster.rig);
}

static void differences_add_up_to_totals(void **state) {
    (void)state;
    struct cluster cluster;
    open_cluster(&cluster);
    uint64_t rows[CELLS_MAX] = {0}, sums[CELLS_MAX], seed = 8, listener[3];
    uint32_t cells = cluster.rig->config.layers * cluster.rig->config.experts;
    for (uint32_t turn = 0; turn < 3; turn++) {
        listener[turn] = rig_http(cluster.rig, "GET", "/troupe/events", NULL, NULL);
        for (int i = 0; i < 20; i++) {
            for (int n = 0; n < 40; n++)
                rows[random_below(&seed, cells)] += 1 + random_below(&seed, 1000000);
            stats(&cluster, rows, 10);
            ticks(&cluster, random_below(&seed, 200));
        }
    }
    ticks(&cluster, 600);
    for (uint32_t i = 0; i < 3; i++) {
        sum_loads(cluster.rig, listener[i], sums);
        for (uint32_t cell = 0; cell < cells; cell++)
            if (sums[cell] != rows[cell])
                fail_msg("seed 8, listener %u, cell %u: expected %llu rows, found %llu", i, cell,
                         (unsigned long long)rows[cell], (unsigned long long)sums[cell]);
    }
    /* A coordinator that counts anew does not make anything negative, or huge. */
    memset(rows, 0, sizeof rows);
    rows[3] = 5;
    stats(&cluster, rows, 10);
    ticks(&cluster, 600);
    rows[3] = 9;
    stats(&cluster, rows, 10);
    ticks(&cluster, 600);
    uint64_t after[CELLS_MAX];
    sum_loads(cluster.rig, listener[0], after);
    assert_int_equal(after[3], sums[3] + 4 + (sums[3] < 5 ? 5 - sums[3] : 0));
    rig_close(cluster.rig);
}

static void balancedness_is_of_the_last_interval(void **state) {
    (void)state;
    struct cluster cluster;
    open_cluster(&cluster);
    uint64_t rows[CELLS_MAX] = {0};
    uint32_t experts = cluster.rig->config.experts;
    rows[experts] = 1000000;
    stats(&cluster, rows, 10);
    uint64_t client = rig_http(cluster.rig, "GET", "/troupe/events", NULL, NULL);
    rows[experts] += 40; /* 20 on each of two copies */
    rows[experts + 1] += 20;
    stats(&cluster, rows, 10);
    ticks(&cluster, 600);
    json_t *loads = read_events(cluster.rig, client, "load");
    assert_int_equal(json_array_size(loads), 2); /* none where nothing has changed */
    json_t *list = json_object_get(json_array_get(loads, 1), "balancedness");
    assert_int_equal(json_array_size(list), 2);
    assert_int_equal(json_integer_value(json_array_get(list, 0)), 1);
    assert_true(json_number_value(json_array_get(list, 1)) == 0.75); /* (20 + 40) / 2 / 40 */
    json_decref(loads);
    rig_close(cluster.rig);
}

static void a_fault_is_followed_until_all_is_well(void **state) {
    (void)state;
    struct cluster cluster;
    open_cluster(&cluster);
    uint64_t rows[CELLS_MAX] = {0};
    uint64_t client = rig_http(cluster.rig, "GET", "/troupe/events", NULL, NULL);
    stats(&cluster, rows, 100);
    ticks(&cluster, 50);
    cluster.members = 3; /* expert 1 is gone, and with it the only copy of (1, 1) */
    cluster.serving = false;
    cluster.copies = 1;
    commit(&cluster);
    ticks(&cluster, 5);
    json_t *lost = find_moment(cluster.rig, client, "lost", "expert \"1\"");
    assert_null(lost); /* the interval is not over */
    ticks(&cluster, 2);
    hold(&cluster, 1, 1, 50);
    commit(&cluster);
    ticks(&cluster, 4);
    cluster.serving = true;
    commit(&cluster);
    ticks(&cluster, 400);
    lost = find_moment(cluster.rig, client, "lost", "expert \"1\"");
    assert_int_equal(number(lost, "copies"), 2);
    assert_true(json_number_value(json_object_get(lost, "silent_ms")) == 150);
    assert_true(json_number_value(json_object_get(lost, "replaced_ms")) == 7);
    assert_true(json_number_value(json_object_get(lost, "serving_ms")) == 11);
    assert_true(json_is_null(json_object_get(lost, "back_ms")));
    json_decref(lost);
    add(&cluster, 52, 520, ROLE_EXPERT, "expert \"1\"");
    cluster.member[3].state = TROUPE__ACTOR_STATE__STATE_LOADING;
    commit(&cluster);
    ticks(&cluster, 300);
    lost = find_moment(cluster.rig, client, "lost", "expert \"1\"");
    assert_true(json_is_null(json_object_get(lost, "back_ms"))); /* not before it is READY */
    json_decref(lost);
    cluster.member[3].state = TROUPE__ACTOR_STATE__STATE_READY;
    commit(&cluster);
    ticks(&cluster, 300);
    lost = find_moment(cluster.rig, client, "lost", "expert \"1\"");
    assert_true(json_number_value(json_object_get(lost, "back_ms")) == 711);
    json_decref(lost);
    /* Who drains and leaves is not lost; a new listener is told the whole story. */
    cluster.member[3].state = TROUPE__ACTOR_STATE__STATE_DRAINING;
    commit(&cluster);
    cluster.members = 3;
    commit(&cluster);
    client = rig_http(cluster.rig, "GET", "/troupe/events", NULL, NULL);
    json_t *left = find_moment(cluster.rig, client, "left", "expert \"1\"");
    lost = find_moment(cluster.rig, client, "lost", "expert \"1\"");
    assert_int_equal(number(left, "actor"), 52);
    assert_int_equal(number(lost, "actor"), 51);
    json_decref(left);
    json_decref(lost);
    rig_close(cluster.rig);
}

static void nothing_is_done_for_nobody_and_little_for_somebody(void **state) {
    (void)state;
    struct cluster cluster;
    open_cluster(&cluster);
    uint64_t rows[CELLS_MAX] = {0};
    uint64_t client = rig_http(cluster.rig, "GET", "/troupe/events", NULL, NULL);
    for (int i = 0; i < 2000; i++) { /* an epoch and statistics each millisecond, for 2 s */
        rows[40]++;
        stats(&cluster, rows, 1);
        commit(&cluster);
        ticks(&cluster, 1);
    }
    assert_in_range(rig_answer(cluster.rig, client)->pieces, 7, 9);
    json_t *epochs = read_events(cluster.rig, client, "epoch");
    assert_in_range(json_array_size(epochs), 7, 9);
    json_decref(epochs);
    uint32_t pieces = rig_answer(cluster.rig, client)->pieces;
    rig_deliver(cluster.rig, &(struct event){.kind = EVENT_CLIENT_GONE, .client = client});
    uint64_t before_ns = actor_deadline(cluster.rig->gateway);
    assert_true(before_ns > cluster.rig->now_ns);
    for (int i = 0; i < 100; i++) {
        rows[40]++;
        stats(&cluster, rows, 1);
        ticks(&cluster, 10);
    }
    assert_int_equal(rig_answer(cluster.rig, client)->pieces, pieces);
    rig_close(cluster.rig);
}

static void rates_and_latencies_are_of_the_interval(void **state) {
    (void)state;
    struct cluster cluster;
    open_cluster(&cluster);
    struct rig *rig = cluster.rig;
    uint64_t client = rig_http(rig, "GET", "/troupe/events", NULL, NULL);
    json_decref(rig_post(rig, "/v1/completions", "{\"prompt\":[5,6,7],\"max_tokens\":100}", 200));
    ticks(&cluster, 600);
    json_t *rates = read_events(rig, client, "rates"), *event;
    assert_in_range(json_array_size(rates), 2, 3);
    size_t i;
    double tokens = 0, finished = 0;
    json_array_foreach(rates, i, event) {
        tokens += json_number_value(json_object_get(event, "tokens_per_s")) *
                  json_number_value(json_object_get(event, "window_ms")) / 1000;
        finished += (double)number(event, "finished");
    }
    assert_true(tokens > 99.9 && tokens < 100.1);
    assert_true(finished == 1);
    event = json_array_get(rates, 0);
    json_t *tpot = json_object_get(event, "tpot_ms");
    assert_int_equal(number(tpot, "count"), 99);
    assert_true(json_number_value(json_object_get(tpot, "mean")) == 1);
    assert_int_equal(number(json_object_get(event, "ttft_ms"), "count"), 1);
    assert_true(json_is_null(json_object_get(json_array_get(rates, 1), "tpot_ms")));
    json_decref(rates);
    rig_close(rig);
}

static double number_of(const json_t *event, const char *key) {
    if (!json_is_number(json_object_get(event, key)))
        fail_msg("%s is no number", key);
    return json_number_value(json_object_get(event, key));
}

static void a_loss_says_why_and_when_tokens_came_again(void **state) {
    (void)state;
    struct cluster cluster;
    open_cluster(&cluster);
    uint64_t client = rig_http(cluster.rig, "GET", "/troupe/events", NULL, NULL);
    uint64_t asked = rig_http(cluster.rig, "POST", "/v1/completions", NULL,
                              "{\"prompt\":[5,6],\"max_tokens\":40,\"ignore_eos\":true}");
    Troupe__Loss loss = TROUPE__LOSS__INIT;
    loss.incarnation = 510; /* expert "1" */
    loss.reason = "its process has ended";
    loss.silent_ns = 42000000;
    loss.fenced_ns = 3000000;
    cluster.loss = &loss;
    cluster.members--;
    cluster.copies = 1;
    ticks(&cluster, 5); /* tokens come */
    commit(&cluster);
    ticks(&cluster, 300);
    assert_true(rig_answer(cluster.rig, asked)->last);
    json_t *lost = find_moment(cluster.rig, client, "lost", "expert \"1\"");
    assert_string_equal(json_string_value(json_object_get(lost, "why")), "its process has ended");
    assert_true(number_of(lost, "silent_ms") == 42);
    assert_true(number_of(lost, "fenced_ms") == 3);
    assert_true(number_of(lost, "resumed_ms") <= 3); /* one of the next ticks' tokens */
    json_decref(lost);
    /* Nothing runs: there is nothing that could come again. */
    cluster.loss = NULL;
    cluster.members--;
    cluster.copies = 0;
    commit(&cluster);
    ticks(&cluster, 300);
    lost = find_moment(cluster.rig, client, "lost", "expert-0");
    assert_null(json_object_get(lost, "resumed_ms"));
    json_decref(lost);
    rig_close(cluster.rig);
}

static void operations_are_followed_to_their_end(void **state) {
    (void)state;
    struct cluster cluster;
    open_cluster(&cluster);
    uint64_t client = rig_http(cluster.rig, "GET", "/troupe/events", NULL, NULL);
    uint64_t rows[CELLS_MAX] = {0};
    Troupe__OperationStats operation = TROUPE__OPERATION_STATS__INIT;
    operation.id = 4;
    operation.kind = "scale";
    operation.phase = "prepare";
    operation.about = "experts to 8";
    operation.total = 3;
    cluster.operation = &operation;
    stats(&cluster, rows, 0);
    operation.done = 2;
    stats(&cluster, rows, 0);
    ticks(&cluster, 300);
    json_t *told = find_moment(cluster.rig, client, "operation", NULL);
    json_int_t place = number(told, "number");
    assert_string_equal(json_string_value(json_object_get(told, "about")), "experts to 8");
    assert_true(number(told, "done") == 2 && number(told, "total") == 3);
    json_decref(told);
    operation.phase = "done";
    operation.done = 3;
    operation.age_ns = 1500000000;
    stats(&cluster, rows, 0);
    ticks(&cluster, 300);
    told = find_moment(cluster.rig, client, "operation", NULL);
    assert_int_equal(number(told, "number"), place); /* replaces what was said */
    assert_string_equal(json_string_value(json_object_get(told, "phase")), "done");
    assert_true(number_of(told, "ms") == 1500);
    json_decref(told);
    cluster.operation = NULL; /* told long enough */
    stats(&cluster, rows, 0);
    ticks(&cluster, 300);
    told = find_moment(cluster.rig, client, "operation", NULL);
    assert_string_equal(json_string_value(json_object_get(told, "phase")), "done");
    json_decref(told);
    operation.id = 5;
    operation.phase = "prepare";
    cluster.operation = &operation;
    stats(&cluster, rows, 0);
    cluster.operation = NULL; /* its coordinator is another one now */
    stats(&cluster, rows, 0);
    ticks(&cluster, 300);
    told = find_moment(cluster.rig, client, "operation", NULL);
    assert_true(number(told, "number") > place);
    assert_string_equal(json_string_value(json_object_get(told, "phase")), "unknown");
    json_decref(told);
    rig_close(cluster.rig);
}

static void a_new_bias_version_is_on_the_timeline(void **state) {
    (void)state;
    struct cluster cluster;
    open_cluster(&cluster);
    uint64_t client = rig_http(cluster.rig, "GET", "/troupe/events", NULL, NULL);
    ticks(&cluster, 300);
    cluster.bias_version = rig_bias_id(cluster.rig, 3);
    commit(&cluster);
    ticks(&cluster, 300);
    json_t *bias = find_moment(cluster.rig, client, "bias", NULL);
    assert_true(number(bias, "before") == 0 && number(bias, "bias_version") == 3);
    json_decref(bias);
    rig_close(cluster.rig);
}

static void recoveries_are_counted(void **state) {
    (void)state;
    struct cluster cluster;
    open_cluster(&cluster);
    cluster.members--; /* expert "1" is gone, and with it the only copy of (1, 1) */
    cluster.copies = 1;
    cluster.serving = false;
    commit(&cluster);
    ticks(&cluster, 40);
    uint64_t client = rig_http(cluster.rig, "GET", "/metrics", NULL, NULL);
    const char *text = rig_answer(cluster.rig, client)->text;
    assert_non_null(strstr(text, "troupe_actors_lost_total{model_name=\"demo\"} 1\n"));
    assert_non_null(strstr(text, "\ntroupe_unrepaired_seconds 0.04\n"));
    assert_non_null(strstr(text, "troupe_recovery_seconds_count{model_name=\"demo\"} 0\n"));
    hold(&cluster, 1, 1, 50);
    cluster.serving = true;
    commit(&cluster);
    client = rig_http(cluster.rig, "GET", "/metrics", NULL, NULL);
    text = rig_answer(cluster.rig, client)->text;
    assert_non_null(strstr(text, "\ntroupe_unrepaired_seconds 0\n"));
    assert_non_null(strstr(text, "troupe_recovery_seconds_sum{model_name=\"demo\"} 0.04\n"));
    assert_non_null(strstr(text, "troupe_recovery_seconds_count{model_name=\"demo\"} 1\n"));
    rig_close(cluster.rig);
}

/* Keys of an event, and of objects in it, that docs/live-view.md does not name as `key`. */
static void find_undocumented(const json_t *event, const char *docs, const char *kind) {
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)event, key, value) {
        char name[64];
        snprintf(name, sizeof name, "`%s`", key);
        bool listed = strstr(docs, name) != NULL;
        for (const char *at = docs; !listed && (at = strstr(at, key)) != NULL; at += strlen(key)) {
            /* as in `{count, mean}` or `"v":1` */
            const char *before = at;
            while (before > docs && *before != '`' && *before != '\n')
                before--;
            listed = *before == '`' && (at[-1] == '{' || at[-1] == ' ' || at[-1] == '"');
        }
        if (!listed)
            fail_msg("docs/live-view.md says nothing of '%s' of the event '%s'", key, kind);
        if (json_is_object(value))
            find_undocumented(value, docs, kind);
    }
}

static void every_key_is_documented(void **state) {
    (void)state;
    static const char *const NAMES[] = {"hello", "epoch", "load", "actors", "rates", "moment"};
    struct cluster cluster;
    open_cluster(&cluster);
    size_t size;
    char *docs = read_whole_file("docs/live-view.md", &size);
    assert_non_null(docs);
    uint64_t rows[CELLS_MAX] = {0};
    uint64_t client = rig_http(cluster.rig, "GET", "/troupe/events", NULL, NULL);
    rows[cluster.rig->config.experts + 1] = 7;
    stats(&cluster, rows, 30);
    Troupe__OperationStats operation = TROUPE__OPERATION_STATS__INIT;
    operation.id = 3;
    operation.kind = operation.phase = operation.about = operation.reason = "x";
    cluster.operation = &operation;
    stats(&cluster, rows, 30);
    cluster.members--;
    cluster.copies = 1;
    commit(&cluster); /* a loss */
    cluster.bias_version = rig_bias_id(cluster.rig, 3);
    commit(&cluster);
    ticks(&cluster, 1000);
    for (size_t n = 0; n < sizeof NAMES / sizeof NAMES[0]; n++) {
        json_t *list = read_events(cluster.rig, client, NAMES[n]), *event;
        size_t i;
        assert_true(json_array_size(list) > 0);
        json_array_foreach(list, i, event)
            find_undocumented(event, docs, NAMES[n]);
        json_decref(list);
    }
    free(docs);
    rig_close(cluster.rig);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(without_the_option_there_is_no_view),
        cmocka_unit_test(the_key_is_asked_for_and_listeners_are_limited),
        cmocka_unit_test(a_listener_is_told_everything_at_once),
        cmocka_unit_test(differences_add_up_to_totals),
        cmocka_unit_test(balancedness_is_of_the_last_interval),
        cmocka_unit_test(a_fault_is_followed_until_all_is_well),
        cmocka_unit_test(nothing_is_done_for_nobody_and_little_for_somebody),
        cmocka_unit_test(rates_and_latencies_are_of_the_interval),
        cmocka_unit_test(a_loss_says_why_and_when_tokens_came_again),
        cmocka_unit_test(every_key_is_documented),
        cmocka_unit_test(operations_are_followed_to_their_end),
        cmocka_unit_test(a_new_bias_version_is_on_the_timeline),
        cmocka_unit_test(recoveries_are_counted),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
