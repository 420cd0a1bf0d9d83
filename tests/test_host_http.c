/* The gateway's HTTP over real sockets: whole requests in, streamed and whole responses out,
 * hang-ups, slow clients, limits. */
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "actors/host/clock.h"
#include "actors/host/http.h"

/* last: cmocka has a macro fail() */
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <cmocka.h>

static struct bell bell;
static struct http *http;
static uint16_t port;

static int setup(void **state) {
    struct failure failure;
    int listening;
    assert_int_equal(bell_create(&bell, NULL, 1, &failure), 0);
    assert_int_equal(http_listen(&listening, "127.0.0.1", 0, &failure), 0);
    port = http_socket_port(listening);
    assert_int_equal(http_open(&http, listening, &bell, &failure), 0);
    return 0;
}

static int teardown(void **state) {
    http_close(&http, 100);
    bell_close(&bell);
    return 0;
}

static int dial(void) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int file = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(connect(file, (struct sockaddr *)&address, sizeof address), 0);
    return file;
}

static void say(int file, const char *text) {
    assert_int_equal(send(file, text, strlen(text), MSG_NOSIGNAL), strlen(text));
}

/* The next event, within five seconds. */
static struct http_event *next_event(void) {
    uint64_t until = clock_now_ns() + 5000000000u;
    while (clock_now_ns() < until) {
        uint32_t seen = bell_seen(&bell);
        struct http_event *event = http_receive(http);
        if (event != NULL)
            return event;
        bell_wait(&bell, seen, 1, 100000000, 0);
    }
    fail_msg("no event has come");
    return NULL;
}

/* Reads until `needle` has come (or the connection ends, for NULL), at most five seconds. */
static char *hear(int file, const char *needle) {
    static char text[1 << 20];
    size_t used = 0;
    text[0] = 0;
    while (needle == NULL || strstr(text, needle) == NULL) {
        struct pollfd wait = {.fd = file, .events = POLLIN};
        if (poll(&wait, 1, 5000) != 1)
            fail_msg("expected '%s', heard '%s'", needle, text);
        ssize_t got = recv(file, text + used, sizeof text - 1 - used, 0);
        if (got <= 0) {
            if (needle != NULL)
                fail_msg("expected '%s', the connection ended after '%s'", needle, text);
            break;
        }
        used += (size_t)got;
        text[used] = 0;
    }
    return text;
}

static void stream(uint64_t client, unsigned status, const char *text, bool last) {
    struct effect effect = {.kind = EFFECT_STREAM};
    effect.stream.client = client;
    effect.stream.status = (uint16_t)status;
    effect.stream.content_type = status != 0 ? "text/event-stream" : NULL;
    effect.stream.extra_header = status == 429 ? "Retry-After: 3" : NULL;
    effect.stream.bytes = (const uint8_t *)text;
    effect.stream.size = strlen(text);
    effect.stream.last = last;
    http_stream(http, &effect);
}

static void test_whole_request_and_answer(void **state) {
    int file = dial();
    say(file,
        "POST /v1/x?a=b%20c HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer k\r\nX-Request-Id: r1\r\n"
        "Content-Length: 7\r\n\r\n{\"a\":");
    usleep(20000);
    say(file, "1}");
    struct http_event *event = next_event();
    assert_false(event->gone);
    assert_string_equal(event->request.method, "POST");
    assert_string_equal(event->request.path, "/v1/x");
    assert_string_equal(event->request.query, "a=b%20c");
    assert_string_equal(event->request.authorization, "Bearer k");
    assert_string_equal(event->request.request_id, "r1");
    assert_int_equal(event->request.body_bytes, 7);
    assert_memory_equal(event->request.body, "{\"a\":1}", 7);
    stream(event->request.client, 429, "{\"slow\":1}", true);
    char *text = hear(file, "{\"slow\":1}");
    assert_non_null(strstr(text, "HTTP/1.1 429"));
    assert_non_null(strstr(text, "Content-Length: 10"));
    assert_non_null(strstr(text, "Retry-After: 3"));
    http_event_free(&event);
    close(file);
}

/* Each STREAM effect reaches the client before the next one is made, on a connection that is used
 * again and again. */
static void test_chunks_are_flushed(void **state) {
    int file = dial();
    for (int round = 0; round < 3; round++) {
        say(file, "GET /stream HTTP/1.1\r\nHost: h\r\n\r\n");
        struct http_event *event = next_event();
        assert_false(event->gone);
        assert_int_equal(event->request.body_bytes, 0);
        assert_null(event->request.authorization);
        stream(event->request.client, 200, "data: one\n\n", false);
        char *text = hear(file, "data: one\n\n\r\n");
        assert_non_null(strstr(text, "Transfer-Encoding: chunked"));
        stream(event->request.client, 0, "data: two\n\n", false);
        hear(file, "data: two\n\n\r\n");
        stream(event->request.client, 0, "data: [DONE]\n\n", true);
        hear(file, "\r\n0\r\n\r\n");
        http_event_free(&event);
    }
    close(file);
}

/* A client that hangs up is noticed while it waits for its answer, and while a stream is silent. */
static void test_hang_up(void **state) {
    for (int streaming = 0; streaming < 2; streaming++) {
        int file = dial();
        say(file, "POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n");
        struct http_event *event = next_event();
        if (streaming) {
            stream(event->request.client, 200, "data: one\n\n", false);
            hear(file, "data: one\n\n");
        }
        uint64_t start = clock_now_ns();
        close(file);
        struct http_event *gone = next_event();
        assert_true(gone->gone);
        assert_int_equal(gone->request.client, event->request.client);
        assert_true(clock_now_ns() - start < 1000000000u);
        stream(event->request.client, 0, "to nobody", true); /* too late: ignored */
        http_event_free(&event);
        http_event_free(&gone);
    }
    usleep(50000);
    assert_null(http_receive(http)); /* once each */
}

/* A finished answer is no hang-up. */
static void test_close_after_answer(void **state) {
    int file = dial();
    say(file, "GET /x HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n");
    struct http_event *event = next_event();
    stream(event->request.client, 200, "done", true);
    char *text = hear(file, NULL);
    assert_non_null(strstr(text, "\r\n\r\ndone"));
    close(file);
    usleep(50000);
    assert_null(http_receive(http));
    http_event_free(&event);
}

/* A client that does not read is dropped when 4 MiB wait for it; the actor hears of it. */
static void test_slow_client(void **state) {
    int file = dial();
    say(file, "GET /x HTTP/1.1\r\nHost: h\r\n\r\n");
    struct http_event *event = next_event();
    char *block = malloc(100001);
    memset(block, 'x', 100000);
    block[100000] = 0;
    stream(event->request.client, 200, block, false);
    struct http_event *gone = NULL;
    for (int i = 0; i < 400 && gone == NULL; i++) {
        stream(event->request.client, 0, block, false);
        usleep(1000);
        gone = http_receive(http);
    }
    assert_non_null(gone);
    assert_true(gone->gone);
    http_event_free(&gone);
    http_event_free(&event);
    free(block);
    close(file);
}

/* A long answer given as one piece is not held against the client. */
static void test_large_answer(void **state) {
    int file = dial();
    say(file, "GET /x HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n");
    struct http_event *event = next_event();
    size_t size = 6u << 20, heard = 0;
    char *block = malloc(size + 1), buffer[65536];
    memset(block, 'y', size);
    block[size] = 0;
    stream(event->request.client, 200, block, true);
    for (ssize_t got; (got = recv(file, buffer, sizeof buffer, 0)) > 0;)
        heard += (size_t)got;
    assert_true(heard > size);
    http_event_free(&event);
    free(block);
    close(file);
}

static void test_body_over_the_limit(void **state) {
    char head[256];
    int file = dial();
    size_t size = HTTP_BODY_MAX + 1;
    snprintf(head, sizeof head, "POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: %zu\r\n\r\n", size);
    say(file, head);
    char *body = calloc(1, size);
    size_t sent = 0;
    while (sent < size) {
        ssize_t got = send(file, body + sent, size - sent, MSG_NOSIGNAL);
        assert_true(got > 0);
        sent += (size_t)got;
    }
    char *text = hear(file, "413}}");
    assert_non_null(strstr(text, "HTTP/1.1 413"));
    free(body);
    close(file);
    assert_null(http_receive(http));
}

/* Rubbish closes its own connection only; a client that goes away in the middle of a request is
 * nobody's event. */
static void test_rubbish(void **state) {
    int file = dial(), half = dial();
    say(file, "\x16\x03\x01 not http at all\r\n\r\n");
    hear(file, NULL);
    close(file);
    say(half, "POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\nhalf");
    usleep(20000);
    close(half);
    usleep(50000);
    assert_null(http_receive(http));
    test_whole_request_and_answer(state);
}

static unsigned open_files(void) {
    DIR *folder = opendir("/proc/self/fd");
    assert_non_null(folder);
    unsigned count = 0;
    while (readdir(folder) != NULL)
        count++;
    closedir(folder);
    return count;
}

/* Clients that go away in the same moment as the last bytes of an unfinished request are noticed
 * then, not when the connection has been idle for minutes: they would fill the table of
 * connections. */
static void test_unfinished_requests(void **state) {
    static const char *const texts[] = {
        "", "GET /li", "GET /live HTTP/1.1\r\nHost:", "\x01\x02",
        "POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\nhalf"};
    unsigned before = open_files();
    for (int i = 0; i < 100; i++) {
        int file = dial();
        if (texts[i % 5][0] != 0)
            say(file, texts[i % 5]);
        close(file);
    }
    unsigned after = 0;
    for (int i = 0; i < 200 && (i == 0 || after > before); i++) {
        usleep(10000);
        after = open_files();
    }
    assert_true(after <= before); /* fewer: an earlier test's connections were just closing */
    assert_null(http_receive(http));
    test_whole_request_and_answer(state);
}

static void test_port_in_use(void **state) {
    struct failure failure;
    int file;
    assert_int_equal(http_listen(&file, "127.0.0.1", port, &failure), ERR_EXISTS);
    char number[8];
    snprintf(number, sizeof number, "%u", port);
    assert_non_null(strstr(failure.text, number));
    assert_int_equal(http_listen(&file, "no such host", port, &failure), ERR_INVALID);
}

/* Closing cuts off whoever still waits. */
static void test_close_with_waiting_clients(void **state) {
    int files[8];
    for (int i = 0; i < 8; i++) {
        files[i] = dial();
        say(files[i], "GET /x HTTP/1.1\r\nHost: h\r\n\r\n");
        struct http_event *event = next_event();
        if (i % 2 == 0)
            stream(event->request.client, 200, "data: one\n\n", false);
        http_event_free(&event);
    }
    teardown(state);
    for (int i = 0; i < 8; i++) {
        hear(files[i], NULL);
        close(files[i]);
    }
    setup(state);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_whole_request_and_answer),
        cmocka_unit_test(test_chunks_are_flushed),
        cmocka_unit_test(test_hang_up),
        cmocka_unit_test(test_close_after_answer),
        cmocka_unit_test(test_slow_client),
        cmocka_unit_test(test_large_answer),
        cmocka_unit_test(test_body_over_the_limit),
        cmocka_unit_test(test_rubbish),
        cmocka_unit_test(test_unfinished_requests),
        cmocka_unit_test(test_port_in_use),
        cmocka_unit_test(test_close_with_waiting_clients),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
