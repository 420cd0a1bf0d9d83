/* Streams that go on over another connection: cut at every event, what came before and what comes after are the whole, whichever gateway
 * it is. Clients that ask for nothing of it see nothing of it. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/support/gateway_rig.h"

#include <cmocka.h>

#define CUTS_MAX 256

/* What a client has seen of a stream: the text of each choice, and the state after each event. */
struct seen {
    char text[3][8192];
    uint32_t finishes[3];
    uint32_t events;
    char id[CUTS_MAX][64];
    size_t at[CUTS_MAX][3]; /* bytes of each text after that event */
    uint32_t finished_at[CUTS_MAX][3];
};

static uint64_t ask(struct rig *rig, const char *path, const char *body, const char *name, const char *resume,
                    const char *last) {
    uint64_t client = ++rig->last_client;
    struct rig_answer *answer = &rig->answer[client % RIG_CLIENTS];
    free(answer->text);
    memset(answer, 0, sizeof *answer);
    struct http_request http = {.client = client, .method = "POST", .path = path, .query = "", .body = body,
                                .body_bytes = strlen(body), .request_id = name, .stream_resume = resume,
                                .last_event_id = last};
    rig_deliver(rig, &(struct event){.kind = EVENT_HTTP_REQUEST, .http = &http});
    assert_true(rig_wait(rig, client, 5000));
    return client;
}

static void take_event(struct seen *seen, const char *data, size_t size) {
    json_t *chunk = json_loadb(data, size, 0, NULL);
    assert_non_null(chunk);
    json_t *choice = json_array_get(json_object_get(chunk, "choices"), 0);
    size_t index = (size_t)json_integer_value(json_object_get(choice, "index"));
    const char *text = json_string_value(json_object_get(choice, "text"));
    if (text == NULL)
        text = json_string_value(json_object_get(json_object_get(choice, "delta"), "content"));
    assert_true(index < 3);
    if (text != NULL)
        strcat(seen->text[index], text);
    seen->finishes[index] += json_is_string(json_object_get(choice, "finish_reason"));
    json_decref(chunk);
}

static void read_stream(const char *text, struct seen *ret) {
    memset(ret, 0, sizeof *ret);
    while (strncmp(text, "data: [DONE]", 12) != 0) {
        assert_int_equal(strncmp(text, "id: ", 4), 0);
        const char *end = strchr(text, '\n');
        assert_true(ret->events < CUTS_MAX && end - text < 64);
        snprintf(ret->id[ret->events], 64, "%.*s", (int)(end - text - 4), text + 4);
        text = end + 1;
        assert_int_equal(strncmp(text, "data: ", 6), 0);
        end = strstr(text, "\n\n");
        take_event(ret, text + 6, (size_t)(end - text - 6));
        for (int i = 0; i < 3; i++) {
            ret->at[ret->events][i] = strlen(ret->text[i]);
            ret->finished_at[ret->events][i] = ret->finishes[i];
        }
        ret->events++;
        text = end + 2;
    }
}

static void cut_everywhere(const char *path, const char *body) {
    static struct seen whole, rest;
    struct rig *rig = rig_open(&(struct rig_options){.chat = CHAT_DEMO}, NULL);
    read_stream(rig_answer(rig, ask(rig, path, body, "me", "1", NULL))->text, &whole);
    assert_true(whole.events > 2);
    rig_close(rig);
    for (uint32_t cut = 0; cut < whole.events; cut++) {
        rig = rig_open(&(struct rig_options){.chat = CHAT_DEMO}, NULL); /* another gateway, which knows nothing */
        read_stream(rig_answer(rig, ask(rig, path, body, "me", "1", whole.id[cut]))->text, &rest);
        for (int i = 0; i < 3; i++) {
            char joined[16384];
            snprintf(joined, sizeof joined, "%.*s%s", (int)whole.at[cut][i], whole.text[i], rest.text[i]);
            assert_string_equal(joined, whole.text[i]);
            assert_int_equal(whole.finished_at[cut][i] + rest.finishes[i], whole.finishes[i]);
        }
        assert_true(rig_settles(rig, 5000));
        rig_close(rig);
    }
}

static void completions_go_on(void **state) {
    (void)state;
    cut_everywhere("/v1/completions", "{\"prompt\":\"Once\",\"max_tokens\":20,\"seed\":7,\"ignore_eos\":true,\"stream\":true}");
}

static void several_choices_go_on(void **state) {
    (void)state;
    cut_everywhere("/v1/completions",
                   "{\"prompt\":\"Once\",\"n\":3,\"max_tokens\":9,\"seed\":7,\"ignore_eos\":true,\"stream\":true}");
}

static void chats_go_on_with_a_seed_of_their_name(void **state) {
    (void)state;
    cut_everywhere("/v1/chat/completions",
                   "{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}],\"max_tokens\":20,\"temperature\":1,"
                   "\"ignore_eos\":true,\"stream\":true}");
}

static void others_see_nothing_of_it(void **state) {
    (void)state;
    struct rig *rig = rig_open(&(struct rig_options){.chat = CHAT_DEMO}, NULL);
    const char *body = "{\"prompt\":\"Once\",\"max_tokens\":5,\"stream\":true}";
    assert_null(strstr(rig_answer(rig, ask(rig, "/v1/completions", body, "me", NULL, NULL))->text, "id: "));
    rig_close(rig);
}

static void other_ids_are_refused(void **state) {
    (void)state;
    static const char *const bad[] = {"x", "-1", "6", "1,2", "1f,", "1ff", "99999999999999999999", "1 ", "+1"};
    struct rig *rig = rig_open(&(struct rig_options){.chat = CHAT_DEMO}, NULL);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        uint64_t client = ask(rig, "/v1/completions", "{\"prompt\":\"Once\",\"max_tokens\":5,\"stream\":true}", "me", "1",
                              bad[i]);
        assert_int_equal(rig_answer(rig, client)->status, 400);
    }
    assert_true(rig_settles(rig, 5000));
    rig_close(rig);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(completions_go_on),
        cmocka_unit_test(several_choices_go_on),
        cmocka_unit_test(chats_go_on_with_a_seed_of_their_name),
        cmocka_unit_test(others_see_nothing_of_it),
        cmocka_unit_test(other_ids_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
