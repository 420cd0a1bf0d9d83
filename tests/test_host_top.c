/* troupe top: the feed's events become lines; a server that sends nonsense does no harm. */
#include "actors/host/top_view.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <cmocka.h>

static struct top_view view;
static struct text screen;
static struct failure failure;
static struct top_look look = {.order = TOP_BY_ROWS};

static int take(const char *name, const char *json) {
    return top_view_take(&view, name, json, strlen(json), &failure);
}

static void draw(uint32_t columns, uint32_t lines) {
    top_view_write(&view, &screen, columns, lines, &look);
    text_append(&screen, "", 1);
    screen.size--;
}

static void begin(void) {
    top_view_free(&view);
    assert_int_equal(take("hello", "{\"v\":1,\"model\":\"m\\u001b[2J\",\"version\":\"7\",\"layers\":3,\"experts\":8,"
                                   "\"heartbeat_ms\":200,\"routed\":[1,2]}"),
                     0);
    assert_int_equal(take("epoch", "{\"v\":1,\"epoch\":4,\"serving\":true,\"members\":[[2,\"expert\",\"expert-0\","
                                   "\"ready\",\"1\",8,\"h\"],[3,\"expert\",\"expert-1\",\"loading\",\"2\",7,\"h\"]],"
                                   "\"placement\":[[1,[2,3,2,3,2,3,2,[2,3]]],[2,[2,3,2,3,2,3,2,0]]]}"),
                     0);
}

static void test_lines(void **state) {
    begin();
    take("load", "{\"v\":1,\"base\":true,\"cells\":[8,100,0,50,0,20,0,4,0,26]}");
    take("load", "{\"v\":1,\"cells\":[],\"balancedness\":[1,0.5]}");
    take("actors", "{\"v\":1,\"stats_age_ms\":5,\"actors\":[[2,30,2,5000000,4,0,0,0,0,10,1500],[3,40,1,1,4,1,2,0,0,77,0]]}");
    take("rates", "{\"v\":1,\"tokens_per_s\":123.4,\"prompt_tokens_per_s\":0,\"cache\":0.25,\"running\":2,\"waiting\":1,"
                  "\"ttft_ms\":null,\"tpot_ms\":{\"count\":9,\"mean\":1.5,\"p95\":2.5}}");
    take("moment", "{\"v\":1,\"number\":1,\"kind\":\"lost\",\"t\":3661000,\"name\":\"expert-9\",\"copies\":6,"
                   "\"replaced_ms\":1.5,\"serving_ms\":2,\"back_ms\":null}");
    draw(140, 0);
    assert_non_null(strstr(screen.bytes, "m?[2J   serving   epoch 4   3 processes\n"));
    assert_non_null(strstr(screen.bytes, "123 tokens/s   0 prompt tokens/s   TTFT -   TPOT 1.5 ms (p95 2.5)\n"));
    /* 4x, 2x, 0.8x, 0.16x, 1.04x of a fair share, then nothing */
    assert_non_null(strstr(screen.bytes, "layer   1  0.50  #*- -   \n"));
    assert_non_null(strstr(screen.bytes, "layer   2     -  -------X\n"));
    const char *first = strstr(screen.bytes, "expert-1  "), *second = strstr(screen.bytes, "expert-0  ");
    assert_true(first != NULL && second != NULL && first < second); /* by rows */
    assert_non_null(strstr(screen.bytes, "01:01:01 UTC  expert-9 lost with 6 copies, re-placed after 1.5 ms, serving "
                                         "after 2.0 ms, not yet back\n"));
    take("moment", "{\"v\":1,\"number\":2,\"kind\":\"operation\",\"t\":3662000,\"what\":\"scale\",\"about\":\"experts to 8\","
                   "\"phase\":\"prepare\",\"done\":1,\"total\":4}");
    take("moment", "{\"v\":1,\"number\":3,\"kind\":\"bias\",\"t\":3663000,\"before\":1,\"bias_version\":2}");
    draw(140, 0);
    assert_non_null(strstr(screen.bytes, "01:01:02 UTC  scale experts to 8: prepare, 1 of 4\n"));
    assert_non_null(strstr(screen.bytes, "01:01:03 UTC  routing bias: version 2\n"));
    assert_null(strstr(screen.bytes, "coordinator is away"));
    take("actors", "{\"v\":1,\"stats_age_ms\":5000,\"actors\":[]}");
    draw(200, 0);
    assert_non_null(strstr(screen.bytes, "coordinator is away"));
}

static void order_is(enum top_order order, bool reversed, const char *first, const char *second) {
    look = (struct top_look){.order = order, .reversed = reversed};
    draw(140, 0);
    const char *a = strstr(screen.bytes, first), *b = strstr(screen.bytes, second);
    if (a == NULL || b == NULL || a > b)
        fail_msg("order %d: expected %s before %s:\n%s", (int)order, first, second, screen.bytes);
    look = (struct top_look){.order = TOP_BY_ROWS};
}

static void test_orders(void **state) {
    begin();
    take("actors", "{\"v\":1,\"stats_age_ms\":5,\"actors\":[[2,30,2,5000000,4,0,0,0,0,10,1500],[3,40,1,1,4,1,2,0,0,77,0]]}");
    order_is(TOP_BY_NAME, false, "expert-0  ", "expert-1  ");
    order_is(TOP_BY_NAME, true, "expert-1  ", "expert-0  ");
    order_is(TOP_BY_STATE, false, " loading ", " ready ");
    order_is(TOP_BY_AGE, false, "expert-1  ", "expert-0  ");
    order_is(TOP_BY_WEIGHTS, false, "expert-0  ", "expert-1  ");
    order_is(TOP_BY_ROWS, false, "expert-1  ", "expert-0  ");
    order_is(TOP_BY_BUSY, false, "expert-0  ", "expert-1  ");
    draw(140, 0);
    assert_non_null(strstr(screen.bytes, " rows* ")); /* what they are ordered by */
}

static void test_a_lost_process_is_gone_until_it_is_back(void **state) {
    begin();
    take("moment", "{\"v\":1,\"number\":1,\"kind\":\"lost\",\"t\":1,\"actor\":7,\"role\":\"expert\",\"name\":\"expert-9\","
                   "\"replaced_ms\":null,\"serving_ms\":null,\"back_ms\":null}");
    draw(140, 0);
    assert_non_null(strstr(screen.bytes, "expert-9           expert      gone "));
    take("moment", "{\"v\":1,\"number\":1,\"kind\":\"lost\",\"t\":1,\"actor\":7,\"role\":\"expert\",\"name\":\"expert-9\","
                   "\"replaced_ms\":1,\"serving_ms\":1,\"back_ms\":20}");
    draw(140, 0);
    assert_null(strstr(screen.bytes, " gone "));
    for (int i = 0; i < 3 * TOP_GONE; i++) { /* more than there is room for */
        char json[200];
        snprintf(json, sizeof json, "{\"v\":1,\"number\":%d,\"kind\":\"lost\",\"t\":1,\"name\":\"expert-%d\",\"back_ms\":null}", i + 2, i + 10);
        take("moment", json);
    }
    draw(140, 0);
    assert_int_equal(view.gones, TOP_GONE);
    take("epoch", "{\"v\":1,\"epoch\":5,\"members\":[[2,\"expert\",\"expert-10\",\"ready\",\"1\",8,\"h\"]],\"placement\":[]}");
    assert_int_equal(view.gones, TOP_GONE - 1); /* an epoch that has it again says so as well */
}

static void test_sums_and_scrolling(void **state) {
    begin();
    draw(160, 0);
    assert_null(strstr(screen.bytes, "put back")); /* not told */
    take("actors", "{\"v\":1,\"actors\":[],\"sums\":{\"guessed\":200,\"accepted\":150,\"cache_queries\":0,\"put_back\":3,\"sent_again\":4,"
                   "\"audited\":70,\"differed\":1,\"quarantines\":2}}");
    draw(160, 0);
    assert_non_null(strstr(screen.bytes, "guesses true 75 %   prefix cache -   put back 3   sent again 4   audited 70, differed 1   "
                                         "quarantines 2   bias version 0\n"));
    char json[4096];
    size_t size = (size_t)snprintf(json, sizeof json, "{\"v\":1,\"members\":[");
    for (int i = 0; i < 40; i++)
        size += (size_t)snprintf(json + size, sizeof json - size, "%s[%d,\"expert\",\"expert-%d\",\"ready\",\"1\",8,\"h\"]", i == 0 ? "" : ",", i + 2, i);
    snprintf(json + size, sizeof json - size, "],\"placement\":[]}");
    take("epoch", json);
    look = (struct top_look){.order = TOP_BY_NAME, .first = 7};
    draw(140, 30);
    assert_null(strstr(screen.bytes, "expert-6  "));
    assert_non_null(strstr(screen.bytes, "expert-7  "));
    assert_non_null(strstr(screen.bytes, "8 to "));
    look.first = 400; /* the last stay in sight */
    draw(140, 30);
    assert_non_null(strstr(screen.bytes, "expert-39  "));
    assert_non_null(strstr(screen.bytes, " to 40 of 40\n"));
    look = (struct top_look){.order = TOP_BY_ROWS};
}

static void test_any_size_is_kept_to(void **state) {
    begin();
    for (uint32_t columns = 1; columns < 150; columns += 7)
        for (uint32_t lines = 1; lines < 40; lines += 3) {
            draw(columns, lines);
            uint32_t count = 0;
            for (const char *at = screen.bytes, *end; (end = strchr(at, '\n')) != NULL; at = end + 1) {
                assert_true((size_t)(end - at) <= columns);
                count++;
            }
            assert_true(count <= lines || lines < 16); /* the least that is shown has some lines */
        }
}

static void test_nonsense_is_refused_or_ignored(void **state) {
    static const struct {
        const char *name, *json;
        int code;
    } cases[] = {
        {"rates", "{\"v\":1}", 0},
        {"rates", "not json", ERR_INVALID},
        {"rates", "{\"v\":2}", ERR_INVALID},
        {"rates", "[]", ERR_INVALID},
        {"hello", "{\"v\":1,\"layers\":257,\"experts\":1}", ERR_INVALID},
        {"hello", "{\"v\":1,\"layers\":0,\"experts\":1}", ERR_INVALID},
        {"hello", "{\"v\":1,\"layers\":1,\"experts\":100000}", ERR_INVALID},
        {"load", "{\"v\":1,\"cells\":[9223372036854775807,1,9223372036854775807,1]}", 0},
        {"load", "{\"v\":1,\"cells\":[23,1,0,1,0,1]}", 0},
        {"load", "{\"v\":1,\"cells\":[-1,1,3],\"balancedness\":[3,0.5,-1,2,\"x\",1]}", 0},
        {"epoch", "{\"v\":1,\"members\":[[],3,null],\"placement\":[[9,[1]],[1,[1,2,3,4,5,6,7,8,9]],4]}", 0},
        {"actors", "{\"v\":1,\"actors\":[[2],7,[]]}", 0},
        {"moment", "{\"v\":1,\"number\":-4}", 0},
        {"news", "{\"v\":1}", 0}, /* of a newer server */
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        begin();
        if (take(cases[i].name, cases[i].json) != cases[i].code)
            fail_msg("%s %s: expected %d", cases[i].name, cases[i].json, cases[i].code);
        if (view.layers > 0)
            draw(80, 24);
    }
    top_view_free(&view);
    assert_int_equal(take("rates", "{\"v\":1}"), ERR_INVALID); /* before hello */
    begin();
    for (int i = 0; i < 40; i++) {
        char json[128];
        snprintf(json, sizeof json, "{\"v\":1,\"number\":%d,\"kind\":\"joined\",\"name\":\"expert-%d\"}", i + 1, i);
        assert_int_equal(take("moment", json), 0);
    }
    draw(80, 0);
    assert_non_null(strstr(screen.bytes, "expert-39 joined\n"));
    assert_null(strstr(screen.bytes, "expert-34 joined\n"));
}

static int tear_down(void **state) {
    top_view_free(&view);
    text_free(&screen);
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_lines),
        cmocka_unit_test(test_orders),
        cmocka_unit_test(test_a_lost_process_is_gone_until_it_is_back),
        cmocka_unit_test(test_sums_and_scrolling),
        cmocka_unit_test(test_any_size_is_kept_to),
        cmocka_unit_test(test_nonsense_is_refused_or_ignored),
    };
    return cmocka_run_group_tests(tests, NULL, tear_down);
}
