/* /metrics: valid exposition format, vLLM's names and buckets, the cluster's numbers from STATS and
 * COMMIT. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/support/gateway_rig.h"

#include <ctype.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

/* ---- a strict reader of the text format ---- */

#define FAMILIES_MAX 128
struct metric_family {
    char name[96], type[16];
    bool helped, typed, closed;
};

static size_t name_length(const char *at) {
    size_t n = 0;
    while (isalnum((unsigned char)at[n]) || at[n] == '_' || at[n] == ':')
        n++;
    assert_true(n > 0 && !isdigit((unsigned char)at[0]));
    return n;
}

/* Labels with their braces, escapes obeyed; the number of bytes. */
static size_t labels_length(const char *at) {
    if (*at != '{')
        return 0;
    size_t n = 1;
    while (at[n] != '}') {
        n += name_length(at + n);
        assert_memory_equal(at + n, "=\"", 2);
        for (n += 2; at[n] != '"'; n++) {
            assert_true(at[n] != '\n' && at[n] != '\0');
            if (at[n] == '\\') {
                n++;
                assert_true(at[n] == '\\' || at[n] == '"' || at[n] == 'n');
            }
        }
        n++;
        if (at[n] == ',')
            n++;
    }
    return n + 1;
}

static struct metric_family *family_of(struct metric_family *list, uint32_t *count,
                                       const char *name, size_t length) {
    for (uint32_t i = 0; i < *count; i++)
        if (strlen(list[i].name) == length && memcmp(list[i].name, name, length) == 0)
            return &list[i];
    assert_true(*count < FAMILIES_MAX && length < sizeof list[0].name);
    struct metric_family *added = &list[(*count)++];
    memset(added, 0, sizeof *added);
    memcpy(added->name, name, length);
    return added;
}

static void check_sample(const char *line, struct metric_family *current) {
    size_t n = name_length(line), base = strlen(current->name);
    bool histogram = strcmp(current->type, "histogram") == 0;
    assert_memory_equal(line, current->name, base);
    if (n != base) {
        assert_true(histogram);
        const char *suffix = line + base;
        assert_true(strncmp(suffix, "_bucket", n - base) == 0 ||
                    strncmp(suffix, "_sum", n - base) == 0 ||
                    strncmp(suffix, "_count", n - base) == 0);
    }
    if (strcmp(current->type, "counter") == 0)
        assert_memory_equal(current->name + base - 6, "_total", 6);
    n += labels_length(line + n);
    assert_int_equal(line[n], ' ');
    char *end;
    strtod(line + n + 1, &end);
    assert_int_equal(*end, '\0');
}

/* HELP and TYPE once for each family, before its samples, which stand together. */
static void check_format(const char *text) {
    static struct metric_family family[FAMILIES_MAX];
    uint32_t families = 0;
    struct metric_family *current = NULL;
    char *copy = strdup(text), *rest = copy, *line;
    assert_int_equal(text[strlen(text) - 1], '\n');
    while ((line = strsep(&rest, "\n")) != NULL && (*line != '\0' || rest != NULL)) {
        bool help = strncmp(line, "# HELP ", 7) == 0, type = strncmp(line, "# TYPE ", 7) == 0;
        if (!help && !type) {
            assert_non_null(current);
            assert_true(current->helped && current->typed);
            check_sample(line, current);
            continue;
        }
        size_t length = name_length(line + 7);
        struct metric_family *named = family_of(family, &families, line + 7, length);
        if (help) {
            assert_false(named->helped);
            named->helped = true;
            current = named;
        } else {
            assert_ptr_equal(named, current);
            assert_false(named->typed);
            named->typed = true;
            snprintf(named->type, sizeof named->type, "%s", line + 8 + length);
            assert_true(strcmp(named->type, "counter") == 0 || strcmp(named->type, "gauge") == 0 ||
                        strcmp(named->type, "histogram") == 0);
        }
    }
    free(copy);
}

static double value_of(const char *text, const char *sample) {
    const char *at = strstr(text, sample);
    if (at == NULL)
        fail_msg("%s is missing", sample);
    return strtod(at + strlen(sample), NULL);
}

/* ---- tests ---- */

static const char *scrape(struct rig *rig) {
    uint64_t client = rig_http(rig, "GET", "/metrics", NULL, NULL);
    const struct rig_answer *answer = rig_answer(rig, client);
    assert_int_equal(answer->status, 200);
    assert_string_equal(answer->content_type, "text/plain; version=0.0.4; charset=utf-8");
    check_format(answer->text);
    return answer->text;
}

static void requests_are_counted_under_vllms_names(void **state) {
    (void)state;
    struct rig *rig = rig_open(&(struct rig_options){.chat = CHAT_DEMO}, NULL);
    json_decref(
        rig_post(rig, "/v1/completions", "{\"prompt\":[5,6,7],\"n\":2,\"max_tokens\":10}", 200));
    json_decref(rig_post(rig, "/v1/completions", "{\"prompt\":[5,6,7,8],\"max_tokens\":1}", 200));
    json_decref(rig_post(rig, "/v1/completions", "{\"prompt\":[5,6,7,8],\"max_tokens\":0}", 400));
    uint64_t gone =
        rig_http(rig, "POST", "/v1/completions", NULL, "{\"prompt\":[5],\"max_tokens\":99}");
    for (int i = 0; i < 9; i++)
        rig_tick(rig);
    const char *text = scrape(rig);
    assert_true(value_of(text, "vllm:num_requests_running{model_name=\"demo\"} ") == 1);
    assert_true(value_of(text, "vllm:num_requests_waiting{model_name=\"demo\"} ") == 0);
    struct event event = {.kind = EVENT_CLIENT_GONE, .client = gone};
    rig_deliver(rig, &event);
    text = scrape(rig);
    assert_true(value_of(text, "vllm:num_requests_running{model_name=\"demo\"} ") == 0);
    assert_true(value_of(text, "vllm:prompt_tokens_total{model_name=\"demo\"} ") == 11);
    assert_true(
        value_of(text,
                 "vllm:request_success_total{finished_reason=\"length\",model_name=\"demo\"} ") ==
        3);
    assert_true(
        value_of(text,
                 "vllm:request_success_total{finished_reason=\"stop\",model_name=\"demo\"} ") == 0);
    assert_true(
        value_of(text,
                 "vllm:request_success_total{finished_reason=\"abort\",model_name=\"demo\"} ") ==
        1);
    assert_true(value_of(text, "vllm:time_to_first_token_seconds_count{model_name=\"demo\"} ") ==
                4);
    assert_true(
        value_of(text,
                 "vllm:time_to_first_token_seconds_bucket{le=\"0.01\",model_name=\"demo\"} ") == 4);
    assert_true(
        value_of(text,
                 "vllm:time_to_first_token_seconds_bucket{le=\"2560.0\",model_name=\"demo\"} ") ==
        4);
    assert_true(
        value_of(text,
                 "vllm:time_to_first_token_seconds_bucket{le=\"+Inf\",model_name=\"demo\"} ") == 4);
    assert_true(value_of(text, "vllm:e2e_request_latency_seconds_count{model_name=\"demo\"} ") ==
                3);
    assert_true(value_of(text, "vllm:request_prompt_tokens_sum{model_name=\"demo\"} ") == 10);
    assert_true(
        value_of(text, "vllm:request_generation_tokens_bucket{le=\"1.0\",model_name=\"demo\"} ") ==
        1);
    assert_true(
        value_of(text, "vllm:request_generation_tokens_bucket{le=\"10.0\",model_name=\"demo\"} ") ==
        3);
    double generated = value_of(text, "vllm:generation_tokens_total{model_name=\"demo\"} ");
    assert_true(generated > 21 && generated < 40);
    assert_true(value_of(text, "vllm:inter_token_latency_seconds_count{model_name=\"demo\"} ") ==
                generated - 4);
    assert_true(value_of(text, "troupe_http_responses_total{code=\"400\"} ") == 1);
    assert_true(value_of(text, "\ntroupe_epoch ") == 1);
    rig_close(rig);
}

static void fill_actor(Troupe__ActorStats *stats, Troupe__Member *member,
                       Troupe__Heartbeat *heartbeat, actor_id id, enum role role, char *name) {
    troupe__actor_stats__init(stats);
    troupe__member__init(member);
    troupe__heartbeat__init(heartbeat);
    member->id = id;
    member->incarnation = 1;
    member->role = (Troupe__Role)role;
    member->name = name;
    member->control_address = member->data_address = member->host = "";
    member->state = TROUPE__ACTOR_STATE__STATE_READY;
    stats->member = member;
    stats->heartbeat = heartbeat;
    stats->heartbeat_age_ns = 250000000;
}

static void the_cluster_is_shown(void **state) {
    (void)state;
    struct rig *rig = rig_open(&(struct rig_options){.chat = CHAT_DEMO}, NULL);
    Troupe__ActorStats actor[2], *list[2] = {&actor[0], &actor[1]};
    Troupe__Member member[2];
    Troupe__Heartbeat heartbeat[2];
    fill_actor(&actor[0], &member[0], &heartbeat[0], 20, ROLE_ATTENTION, "attention \"0\"\\\n");
    fill_actor(&actor[1], &member[1], &heartbeat[1], 50, ROLE_EXPERT, "expert-0");
    heartbeat[0].pages_used = 3;
    heartbeat[0].pages_total = 12;
    heartbeat[0].sequences_running = 7;
    heartbeat[1].rows = 1234567890123;
    heartbeat[1].busy_ns = 1500000000;
    uint32_t layer[] = {1, 1, 200, 1}, expert[] = {0, 1, 0, 99999};
    uint64_t rows[] = {30, 10, 5, 5}; /* the last two are outside the model: ignored */
    Troupe__Stats body = TROUPE__STATS__INIT;
    body.epoch = 1;
    body.n_actor = 2;
    body.actor = list;
    body.n_load_layer = body.n_load_expert = body.n_load_rows = 4;
    body.load_layer = layer;
    body.load_expert = expert;
    body.load_rows = rows;
    message envelope = TROUPE__ENVELOPE__INIT;
    envelope.body_case = TROUPE__ENVELOPE__BODY_STATS;
    envelope.stats = &body;
    for (int i = 0; i < 2; i++) /* the second replaces the first */
        rig_message(rig, ACTOR_COORDINATOR, 77, &envelope);
    const char *text = scrape(rig);
    assert_true(value_of(text, "vllm:kv_cache_usage_perc{model_name=\"demo\"} ") == 0.25);
    assert_true(
        value_of(text, "troupe_actor_state{actor=\"expert-0\",role=\"expert\",state=\"ready\"} ") ==
        1);
    assert_true(
        value_of(
            text,
            "troupe_sequences_running{actor=\"attention \\\"0\\\"\\\\\\n\",role=\"attention\"} ") ==
        7);
    assert_true(value_of(text, "troupe_rows_total{actor=\"expert-0\",role=\"expert\"} ") ==
                1234567890123);
    assert_true(value_of(text, "troupe_busy_seconds_total{actor=\"expert-0\",role=\"expert\"} ") ==
                1.5);
    assert_true(
        value_of(text, "troupe_heartbeat_age_seconds{actor=\"expert-0\",role=\"expert\"} ") ==
        0.25);
    assert_true(value_of(text, "troupe_expert_tokens_total{layer=\"1\",expert=\"0\"} ") == 30);
    assert_true(value_of(text, "troupe_layer_balancedness{layer=\"1\"} ") == 1); /* one holder */
    assert_null(strstr(text, "layer=\"2\""));
    rig_close(rig);
}

static void balancedness_is_mean_over_max_of_the_holders(void **state) {
    (void)state;
    struct rig *rig = rig_open(&(struct rig_options){.chat = CHAT_DEMO}, NULL);
    /* Layer 2: expert 0 on actors 50 and 51, expert 1 on 51, expert 2 on 52; 40, 20 and 0 rows: 20,
     * 40 and 0 per holder. */
    uint32_t layer[] = {2, 2, 2, 2, 1}, expert[] = {0, 0, 1, 2, 0}, holder[] = {50, 51, 51, 52, 50};
    Troupe__Member member[1], *list[1] = {&member[0]};
    troupe__member__init(&member[0]);
    member[0].id = 9;
    member[0].incarnation = 5;
    member[0].role = TROUPE__ROLE__ROLE_GATEWAY;
    member[0].state = TROUPE__ACTOR_STATE__STATE_READY;
    Troupe__Commit commit = TROUPE__COMMIT__INIT;
    commit.epoch = ++rig->epoch;
    commit.n_member = 1;
    commit.member = list;
    commit.n_layer = commit.n_expert = commit.n_holder = 5;
    commit.layer = layer;
    commit.expert = expert;
    commit.holder = holder;
    message envelope = TROUPE__ENVELOPE__INIT;
    envelope.body_case = TROUPE__ENVELOPE__BODY_COMMIT;
    envelope.commit = &commit;
    rig_message(rig, ACTOR_COORDINATOR, 77, &envelope);
    uint32_t load_layer[] = {2, 2}, load_expert[] = {0, 1};
    uint64_t rows[] = {40, 20};
    Troupe__Stats stats = TROUPE__STATS__INIT;
    stats.n_load_layer = stats.n_load_expert = stats.n_load_rows = 2;
    stats.load_layer = load_layer;
    stats.load_expert = load_expert;
    stats.load_rows = rows;
    message second = TROUPE__ENVELOPE__INIT;
    second.body_case = TROUPE__ENVELOPE__BODY_STATS;
    second.stats = &stats;
    rig_message(rig, ACTOR_COORDINATOR, 77, &second);
    const char *text = scrape(rig);
    assert_true(value_of(text, "troupe_layer_balancedness{layer=\"2\"} ") == 0.5);
    assert_null(strstr(text, "troupe_layer_balancedness{layer=\"1\"}")); /* nothing routed */
    rig_close(rig);
}

/* ---- what reads it ---- */

static char *read_text(const char *path) {
    FILE *file = fopen(path, "r");
    assert_non_null(file);
    char *text = calloc(1, 1 << 20);
    size_t size = fread(text, 1, (1 << 20) - 1, file);
    assert_true(size > 0 && size < (1 << 20) - 1);
    fclose(file);
    return text;
}

/* Every name that the dashboard and the alerts use is that of a family, or of a part of a histogram. */
static void check_names(const char *path, const char *metrics) {
    static const char *const SUFFIXES[] = {"", "_bucket", "_sum", "_count"};
    char *text = read_text(path);
    uint32_t names = 0;
    for (const char *at = text; *at != '\0';) {
        bool starts = (strncmp(at, "vllm:", 5) == 0 || strncmp(at, "troupe_", 7) == 0) &&
                      (at == text || strchr("( \"", at[-1]) != NULL);
        size_t length = starts ? name_length(at) : 0;
        if (length == 0) {
            at++;
            continue;
        }
        bool known = false;
        for (size_t i = 0; i < 4 && !known; i++) {
            char type[160];
            size_t suffix = strlen(SUFFIXES[i]);
            if (length <= suffix || strncmp(at + length - suffix, SUFFIXES[i], suffix) != 0)
                continue;
            snprintf(type, sizeof type, "# TYPE %.*s %s", (int)(length - suffix), at,
                     suffix > 0 ? "histogram\n" : "");
            known = strstr(metrics, type) != NULL;
        }
        if (!known)
            fail_msg("%s uses %.*s, which /metrics does not have", path, (int)length, at);
        names++;
        at += length;
    }
    assert_true(names > 5);
    free(text);
}

/* Statistics of one actor of each role, so that every family is there. */
static void fill_cluster(struct rig *rig) {
    Troupe__ActorStats actor[3], *list[3] = {&actor[0], &actor[1], &actor[2]};
    Troupe__Member member[3];
    Troupe__Heartbeat heartbeat[3];
    fill_actor(&actor[0], &member[0], &heartbeat[0], 20, ROLE_ATTENTION, "attention-0");
    fill_actor(&actor[1], &member[1], &heartbeat[1], 50, ROLE_EXPERT, "expert-0");
    fill_actor(&actor[2], &member[2], &heartbeat[2], 60, ROLE_SAMPLER, "sampler-0");
    Troupe__Stats body = TROUPE__STATS__INIT;
    body.n_actor = 3;
    body.actor = list;
    message envelope = TROUPE__ENVELOPE__INIT;
    envelope.body_case = TROUPE__ENVELOPE__BODY_STATS;
    envelope.stats = &body;
    rig_message(rig, ACTOR_COORDINATOR, 77, &envelope);
    json_decref(rig_post(rig, "/v1/completions", "{\"prompt\":[5,6],\"max_tokens\":3}", 200));
}

static void dashboard_and_alerts_name_what_there_is(void **state) {
    (void)state;
    struct rig *rig = rig_open(&(struct rig_options){.chat = CHAT_DEMO}, NULL);
    fill_cluster(rig);
    const char *text = scrape(rig);
    check_names("config/grafana/troupe.json", text);
    check_names("config/grafana/alerts.yaml", text);
    json_t *dashboard = json_load_file("config/grafana/troupe.json", 0, NULL);
    assert_true(json_array_size(json_object_get(dashboard, "panels")) > 10);
    json_decref(dashboard);
    rig_close(rig);
}

static bool runs(const char *command) {
    return system(command) == 0;
}

/* Prometheus' own opinion, where it is installed. */
static void promtool_finds_nothing_to_complain_of(void **state) {
    (void)state;
    if (!runs("command -v promtool >/dev/null"))
        skip();
    struct rig *rig = rig_open(&(struct rig_options){.chat = CHAT_DEMO}, NULL);
    fill_cluster(rig);
    const char *text = scrape(rig);
    /* vLLM's names have colons in them, which promtool does not like; there must be nothing else */
    FILE *promtool = popen("! promtool check metrics 2>&1 | grep -v \"should not contain ':'\"", "w");
    assert_non_null(promtool);
    assert_true(fwrite(text, 1, strlen(text), promtool) == strlen(text));
    assert_int_equal(pclose(promtool), 0);
    assert_true(runs("promtool check rules config/grafana/alerts.yaml >/dev/null"));
    rig_close(rig);
}

static void phases_add_up(void **state) {
    (void)state;
    struct rig *rig = rig_open(&(struct rig_options){.chat = CHAT_DEMO}, NULL);
    json_decref(rig_post(rig, "/v1/completions",
                         "{\"prompt\":[5,6,7],\"n\":2,\"max_tokens\":5}", 200));
    const char *text = scrape(rig);
    static const char *const PHASES[] = {"queue", "prefill", "decode", "inference"};
    double sum[4];
    for (int i = 0; i < 4; i++) {
        char sample[96];
        snprintf(sample, sizeof sample,
                 "vllm:request_%s_time_seconds_count{model_name=\"demo\"} ", PHASES[i]);
        assert_true(value_of(text, sample) == 2);
        snprintf(sample, sizeof sample, "vllm:request_%s_time_seconds_sum{model_name=\"demo\"} ",
                 PHASES[i]);
        sum[i] = value_of(text, sample);
    }
    assert_true(sum[2] > 0.0079 && sum[2] < 0.0081); /* four more tokens each, a millisecond apart */
    assert_true(sum[3] > sum[1] + sum[2] - 1e-9 && sum[3] < sum[1] + sum[2] + 1e-9);
    assert_true(
        value_of(text, "vllm:request_max_num_generation_tokens_sum{model_name=\"demo\"} ") == 5);
    rig_close(rig);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(requests_are_counted_under_vllms_names),
        cmocka_unit_test(the_cluster_is_shown),
        cmocka_unit_test(balancedness_is_mean_over_max_of_the_holders),
        cmocka_unit_test(dashboard_and_alerts_name_what_there_is),
        cmocka_unit_test(promtool_finds_nothing_to_complain_of),
        cmocka_unit_test(phases_add_up),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
