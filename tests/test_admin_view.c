/* What the admin address has for people: the page for everybody, all else for who has the token; faults only where they are allowed;
 * what a gateway knows is passed on. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "actors/gateway/page.h"
#include "tests/support/players.h"

/* last: cmocka has a macro fail() */
#include <cmocka.h>

#define TOKEN "0123456789abcdef"

static void ask(struct stage *stage, const char *method, const char *path, const char *token, const char *body) {
    struct http_request http = {.client = 7,
                                .method = method,
                                .path = path,
                                .query = "",
                                .authorization = token,
                                .body = body != NULL ? body : "",
                                .body_bytes = body != NULL ? strlen(body) : 0};
    stage_clear(stage);
    stage_step(stage, &(struct event){.kind = EVENT_HTTP_REQUEST, .http = &http});
}

static void assert_status(struct stage *stage, unsigned status) {
    const struct effect *effect = stage_take(stage, EFFECT_STREAM);
    assert_non_null(effect);
    assert_int_equal(effect->stream.status, status);
    assert_true(effect->stream.last);
    assert_null(stage_take(stage, EFFECT_FAULT));
    assert_null(stage_take(stage, EFFECT_RELAY));
}

static void open_with_token(struct stage *stage) {
    open_stage(stage);
    create(stage);
    coordinator_set_admin_token(stage->actor, TOKEN);
}

static void the_page_is_for_everybody(void **state) {
    (void)state;
    struct stage stage;
    open_with_token(&stage);
    ask(&stage, "GET", "/", NULL, NULL);
    const struct effect *effect = stage_take(&stage, EFFECT_STREAM);
    assert_int_equal(effect->stream.status, 200);
    assert_int_equal(effect->stream.size, page_html_bytes);
    assert_non_null(strstr(effect->stream.extra_header, "default-src 'none'"));
    stage_free(&stage);
}

static void nothing_else_is_without_the_token(void **state) {
    (void)state;
    static const char *const PATHS[] = {"/troupe/events", "/troupe/requests/x", "/v1/chat/completions", "/fault", "/scale"};
    struct stage stage;
    open_with_token(&stage);
    coordinator_allow_faults(stage.actor);
    for (size_t i = 0; i < sizeof PATHS / sizeof PATHS[0]; i++) {
        ask(&stage, "POST", PATHS[i], NULL, "{\"fault\":\"kill expert 1\"}");
        assert_status(&stage, 401);
        ask(&stage, "POST", PATHS[i], "Bearer 0123456789abcdee", "{\"fault\":\"kill expert 1\"}");
        assert_status(&stage, 401);
    }
    stage_free(&stage);
}

static void what_a_gateway_knows_is_passed_on(void **state) {
    (void)state;
    struct stage stage;
    open_with_token(&stage);
    ask(&stage, "GET", "/troupe/events", "Bearer " TOKEN, NULL);
    const struct effect *effect = stage_take(&stage, EFFECT_RELAY);
    assert_non_null(effect);
    assert_true(effect->admin.client == 7);
    assert_null(stage_take(&stage, EFFECT_STREAM)); /* the host answers */
    ask(&stage, "POST", "/v1/completions", "Bearer " TOKEN, "{}");
    assert_non_null(stage_take(&stage, EFFECT_RELAY));
    ask(&stage, "GET", "/metrics", "Bearer " TOKEN, NULL);
    assert_status(&stage, 404);
    stage_free(&stage);
}

static void faults_must_be_allowed(void **state) {
    (void)state;
    struct stage stage;
    open_with_token(&stage);
    ask(&stage, "POST", "/fault", "Bearer " TOKEN, "{\"fault\":\"kill expert 1\"}");
    assert_status(&stage, 403);
    coordinator_allow_faults(stage.actor);
    ask(&stage, "POST", "/fault", "Bearer " TOKEN, "{\"fault\":\"kill expert 1\"}");
    const struct effect *effect = stage_take(&stage, EFFECT_FAULT);
    assert_non_null(effect);
    assert_string_equal(effect->admin.text, "kill expert 1");
    ask(&stage, "POST", "/fault", "Bearer " TOKEN, "{\"fault\":7}");
    assert_status(&stage, 400);
    ask(&stage, "POST", "/fault", "Bearer " TOKEN, "kill expert 1");
    assert_status(&stage, 400);
    ask(&stage, "GET", "/fault", "Bearer " TOKEN, NULL);
    assert_status(&stage, 404);
    stage_free(&stage);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_page_is_for_everybody),
        cmocka_unit_test(nothing_else_is_without_the_token),
        cmocka_unit_test(what_a_gateway_knows_is_passed_on),
        cmocka_unit_test(faults_must_be_allowed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
