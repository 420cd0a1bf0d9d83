/* Requests and versions of the routing bias: each is pinned to the one that was current when it
 * could first be run, keeps it through retries, losses and another connection, and hands it to
 * whoever is to run it. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "actors/bias_table.h"
#include "tests/support/gateway_rig.h"

#include <cmocka.h>

#define BODY                                                                                       \
    "{\"prompt\":\"Once\",\"max_tokens\":40,\"seed\":7,\"ignore_eos\":true,\"stream\":true}"

static struct rig *open_rig(uint32_t attentions) {
    return rig_open(&(struct rig_options){.chat = CHAT_DEMO, .attentions = attentions}, NULL);
}

static void become_current(struct rig *rig, uint32_t number) {
    rig_bias(rig, number);
    rig->bias_number = number;
    rig_commit(rig);
}

static uint64_t begin(struct rig *rig, const char *last) {
    uint64_t client = ++rig->last_client;
    struct rig_answer *answer = &rig->answer[client % RIG_CLIENTS];
    free(answer->text);
    memset(answer, 0, sizeof *answer);
    struct http_request http = {.client = client,
                                .method = "POST",
                                .path = "/v1/completions",
                                .query = "",
                                .body = BODY,
                                .body_bytes = strlen(BODY),
                                .request_id = "me",
                                .stream_resume = "1",
                                .last_event_id = last};
    rig_deliver(rig, &(struct event){.kind = EVENT_HTTP_REQUEST, .http = &http});
    return client;
}

static void ticks(struct rig *rig, uint32_t count) {
    for (uint32_t i = 0; i < count; i++)
        rig_tick(rig);
}

/* The whole answer of a gateway at which nothing happens and `number` is current. */
static char *undisturbed(uint32_t number) {
    struct rig *rig = open_rig(1);
    become_current(rig, number);
    uint64_t client = begin(rig, NULL);
    assert_true(rig_wait(rig, client, 5000));
    char *text = strdup(rig_answer(rig, client)->text);
    rig_close(rig);
    return text;
}

/* All that is the same in two answers: everything but "created". */
static void assert_same_stream(const char *found, const char *expected) {
    char *one = strdup(found), *two = strdup(expected);
    char *both[] = {one, two};
    for (int i = 0; i < 2; i++)
        for (char *at = both[i]; (at = strstr(at, "\"created\":")) != NULL;)
            for (at += 10; *at >= '0' && *at <= '9'; at++)
                *at = '#';
    assert_string_equal(one, two);
    free(one);
    free(two);
}

/* The text alone: which tokens come in one event depends on how messages were lost. */
static char *text_of(const char *stream) {
    static const char KEY[] = "\"text\":\"";
    char *ret = calloc(1, strlen(stream) + 1);
    for (const char *at = stream; (at = strstr(at, KEY)) != NULL;) {
        at += sizeof KEY - 1;
        strncat(ret, at, (size_t)(strstr(at, "\",\"logprobs\"") - at));
    }
    assert_true(ret[0] != 0);
    return ret;
}

static void assert_described(const struct rig *rig, const char *text) {
    const char *found = rig->gateway->class->describe(rig->gateway);
    if (strstr(found, text) == NULL)
        fail_msg("\"%s\" is not in %s", text, found);
}

static void a_request_keeps_its_version_wherever_it_runs(void **state) {
    (void)state;
    char *expected = undisturbed(4), *other = undisturbed(5);
    struct rig *rig = open_rig(2);
    uint64_t first = begin(rig, NULL);
    ticks(rig, 10);
    become_current(rig, 5);
    assert_described(rig, "bias_users=1 bias=2");
    uint64_t second = begin(rig, NULL);
    ticks(rig, 5);
    uint32_t runs = rig->attention[0].sequences > 0 &&
                            rig->attention[0].sequence[0].bias_version == rig_bias_id(rig, 4)
                        ? 0
                        : 1;
    rig_kill(rig, runs);
    rig_commit(rig); /* without it: the history goes to the other one */
    assert_true(rig_wait(rig, first, 5000) && rig_wait(rig, second, 5000));
    assert_same_stream(rig_answer(rig, first)->text, expected);
    assert_same_stream(rig_answer(rig, second)->text, other);
    assert_true(strcmp(expected, other) != 0);
    assert_true(rig_settles(rig, 5000));
    assert_described(rig, "bias_users=0");
    rig_close(rig);
    free(expected);
    free(other);
}

static void who_lacks_the_version_is_handed_it(void **state) {
    (void)state;
    char *whole = undisturbed(4), *expected = text_of(whole);
    for (uint64_t seed = 1; seed <= 20; seed++) {
        struct rig *rig = open_rig(1);
        rig->seed = seed;
        rig->reorder = seed % 2 == 0;
        rig->loss = seed % 3 == 0 ? 0.2 : 0;
        rig->attention[0].lacks_bias = true;
        uint64_t client = begin(rig, NULL);
        assert_true(rig_wait(rig, client, 60000));
        char *found = text_of(rig_answer(rig, client)->text);
        assert_string_equal(found, expected);
        free(found);
        assert_true(rig->attention[0].bias_asked >= 1);
        assert_int_equal(rig->attention[0].biases, 1);
        rig_close(rig);
    }
    free(whole);
    free(expected);
}

static void a_version_that_is_not_here_yet_is_waited_for(void **state) {
    (void)state;
    char *expected = undisturbed(6);
    struct rig *rig = open_rig(1);
    rig->bias_number = 6;
    rig_commit(rig); /* names it, but it has not come */
    uint64_t client = begin(rig, NULL);
    ticks(rig, 50);
    assert_int_equal(rig->attention[0].submits, 0);
    rig_bias(rig, 6);
    assert_true(rig_wait(rig, client, 5000));
    assert_same_stream(rig_answer(rig, client)->text, expected);
    rig_close(rig);
    free(expected);
}

static void a_version_in_use_is_not_released(void **state) {
    (void)state;
    char *expected = undisturbed(4);
    struct rig *rig = open_rig(1);
    rig->attention[0].lacks_bias = true;
    uint64_t client = begin(rig, NULL);
    become_current(rig, 5);
    rig_bias_release(rig, 4); /* said before the coordinator could know */
    assert_described(rig, "bias_users=1 bias=2");
    assert_true(rig_wait(rig, client, 5000));
    assert_same_stream(rig_answer(rig, client)->text, expected);
    rig_bias_release(rig, 4);
    assert_described(rig, "bias_users=0 bias=1");
    rig_close(rig);
    free(expected);
}

/* ---- another connection ---- */

static const char *nth_id(const char *stream, int n, char ret[96]) {
    const char *at = stream;
    for (int i = 0; i <= n; i++) {
        at = strstr(i == 0 ? at : at + 1, "id: ");
        assert_non_null(at);
    }
    snprintf(ret, 96, "%.*s", (int)strcspn(at + 4, "\n"), at + 4);
    return strstr(at, "\n\n") + 2; /* what follows it */
}

static void a_stream_goes_on_with_the_version_that_it_began_with(void **state) {
    (void)state;
    char id[96], name[BIAS_NAME_BYTES], *whole = undisturbed(4);
    const char *rest = nth_id(whole, 20, id);
    struct rig *rig = open_rig(1); /* another gateway; the current version is another one by now */
    bias_name(name, rig_bias_id(rig, 4));
    assert_true(strncmp(id, name, strlen(name)) == 0 && id[strlen(name)] == ':');
    become_current(rig, 5);
    uint64_t client = begin(rig, id);
    assert_true(rig_wait(rig, client, 5000));
    assert_same_stream(rig_answer(rig, client)->text, rest);
    rig_close(rig);
    free(whole);
}

static void a_stream_of_the_models_own_biases_goes_on_with_them(void **state) {
    (void)state;
    char id[96], *whole = undisturbed(0);
    const char *rest = nth_id(whole, 20, id);
    assert_null(strchr(id, ':'));
    struct rig *rig = open_rig(1);
    become_current(rig, 5);
    uint64_t client = begin(rig, id);
    assert_true(rig_wait(rig, client, 5000));
    assert_same_stream(rig_answer(rig, client)->text, rest);
    rig_close(rig);
    free(whole);
}

static void a_version_that_is_gone_is_said_to_be(void **state) {
    (void)state;
    char id[96], *whole = undisturbed(3);
    nth_id(whole, 20, id);
    struct rig *rig = open_rig(1);
    uint64_t client = begin(rig, id);
    assert_true(rig_wait(rig, client, 5000));
    assert_int_equal(rig_answer(rig, client)->status, 410);
    assert_non_null(strstr(rig_answer(rig, client)->text, "does not exist any more"));
    assert_int_equal(rig->attention[0].submits, 0); /* no token with another one */
    assert_true(rig_settles(rig, 5000));
    rig_close(rig);
    free(whole);
}

static void nonsense_is_no_version(void **state) {
    (void)state;
    static const char *const bad[] = {
        "4:1",         "0:1",         "4.0000000:1",    ":1",
        "4.00000001",  "4.00000001:", "4.0000000100:1", "4.00000001:x",
        "0.00000000:1"};
    struct rig *rig = open_rig(1);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        uint64_t client = begin(rig, bad[i]);
        assert_true(rig_wait(rig, client, 5000));
        assert_int_equal(rig_answer(rig, client)->status, 400);
    }
    rig_close(rig);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_request_keeps_its_version_wherever_it_runs),
        cmocka_unit_test(who_lacks_the_version_is_handed_it),
        cmocka_unit_test(a_version_that_is_not_here_yet_is_waited_for),
        cmocka_unit_test(a_version_in_use_is_not_released),
        cmocka_unit_test(a_stream_goes_on_with_the_version_that_it_began_with),
        cmocka_unit_test(a_stream_of_the_models_own_biases_goes_on_with_them),
        cmocka_unit_test(a_version_that_is_gone_is_said_to_be),
        cmocka_unit_test(nonsense_is_no_version),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
