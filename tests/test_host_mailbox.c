/* Mailboxes over ZeroMQ: order, rubbish, messages too large, peers that are not there or do not
 * listen; and the data plane on top. */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
#include <zmq.h>

#include "actors/host/clock.h"
#include "actors/host/mailbox.h"
#include "actors/host/transport.h"

/* last: cmocka has a macro fail() */
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <cmocka.h>

static void *context;

/* Accepts texts that begin with "ok". */
static void *accept_text(const void *bytes, size_t size, struct failure *failure) {
    if (size < 2 || memcmp(bytes, "ok", 2) != 0) {
        (fail)(failure, ERR_CORRUPT, "expected ok, found %zu bytes", size);
        return NULL;
    }
    char *text = malloc(size + 1);
    memcpy(text, bytes, size);
    text[size] = 0;
    return text;
}

struct box {
    struct bell bell;
    struct mailbox *mailbox;
};

static void box_open(struct box *box, const char *bind, size_t waiting_bytes_max) {
    struct failure failure;
    assert_int_equal(bell_create(&box->bell, NULL, 1, &failure), 0);
    struct mailbox_options options = {
        .name = "test",
        .context = context,
        .bind = bind,
        .bell = &box->bell,
        .message_max = 1000,
        .waiting_bytes_max = waiting_bytes_max,
        .accept = accept_text,
        .discard = free,
    };
    assert_int_equal(mailbox_open(&box->mailbox, &options, &failure), 0);
}

static void box_close(struct box *box) {
    mailbox_close(&box->mailbox, 100);
    bell_close(&box->bell);
}

static void *take(struct box *box, unsigned timeout_ms) {
    uint64_t until = clock_now_ns() + timeout_ms * (uint64_t)1000000;
    for (;;) {
        uint32_t seen = bell_seen(&box->bell);
        void *item = mailbox_receive(box->mailbox);
        uint64_t now = clock_now_ns();
        if (item != NULL || now >= until)
            return item;
        bell_wait(&box->bell, seen, 1, until - now, 0);
    }
}

static void post(struct box *box, actor_id to, const char *text) {
    assert_int_equal(mailbox_send(box->mailbox, to, strdup(text), strlen(text)), 0);
}

/* Messages arrive in order, also those that were sent before the peer existed; those to unknown
 * peers are dropped. */
static void test_order(void **state) {
    struct box a, b;
    char path[64], bind[80];
    snprintf(path, sizeof path, "/tmp/troupe-test-%d.control", (int)getpid());
    snprintf(bind, sizeof bind, "ipc://%s", path);
    box_open(&a, "tcp://127.0.0.1:*", 1 << 20);
    assert_int_equal(strncmp(mailbox_address(a.mailbox), "tcp://127.0.0.1:", 16), 0);
    mailbox_connect(a.mailbox, 7, bind);
    post(&a, 99, "ok to nobody");
    for (int i = 0; i < 3000; i++) { /* more than the high-water mark */
        char text[32];
        snprintf(text, sizeof text, "ok %d", i);
        post(&a, 7, text);
    }
    box_open(&b, bind, 1 << 20);
    for (int i = 0; i < 3000; i++) {
        char text[32], *got = take(&b, 5000);
        snprintf(text, sizeof text, "ok %d", i);
        assert_non_null(got);
        assert_string_equal(got, text);
        free(got);
    }
    assert_int_equal(mailbox_counters(a.mailbox)->dropped, 1);
    mailbox_disconnect(a.mailbox, 7);
    post(&a, 7, "ok gone");
    assert_null(take(&b, 50));
    box_close(&a);
    box_close(&b);
    for (int i = 0; i < 100 && access(path, F_OK) == 0; i++)
        usleep(10000); /* ZeroMQ closes in the background */
    assert_int_not_equal(access(path, F_OK), 0);
}

/* A refusal is sent to a peer that is connected for this one message and disconnected at once. */
static void test_disconnect_still_sends(void **state) {
    struct box a, b;
    box_open(&a, "tcp://127.0.0.1:*", 10000);
    box_open(&b, "tcp://127.0.0.1:*", 10000);
    for (int i = 0; i < 20; i++) {
        mailbox_connect(a.mailbox, 7, mailbox_address(b.mailbox));
        post(&a, 7, "ok refused");
        mailbox_disconnect(a.mailbox, 7);
        char *got = take(&b, 2000);
        assert_non_null(got);
        free(got);
    }
    box_close(&a);
    box_close(&b);
}

/* What is malformed, too large or in several parts is counted and dropped; the rest still arrives.
 */
static void test_rubbish_is_refused(void **state) {
    struct box box;
    box_open(&box, "tcp://127.0.0.1:*", 1 << 20);
    void *push = zmq_socket(context, ZMQ_PUSH);
    int zero = 0;
    zmq_setsockopt(push, ZMQ_LINGER, &zero, sizeof zero);
    assert_int_equal(zmq_connect(push, mailbox_address(box.mailbox)), 0);
    char large[5000];
    memset(large, 'x', sizeof large);
    memcpy(large, "ok", 2);
    zmq_send(push, "rubbish", 7, 0);
    zmq_send(push, "", 0, 0);
    zmq_send(push, large, sizeof large, 0);
    zmq_send(push, "ok", 2, ZMQ_SNDMORE);
    zmq_send(push, "ok", 2, ZMQ_SNDMORE);
    zmq_send(push, "ok", 2, 0);
    zmq_send(push, "ok last", 7, 0);
    char *got = take(&box, 5000);
    assert_non_null(got);
    assert_string_equal(got, "ok last");
    free(got);
    assert_int_equal(mailbox_counters(box.mailbox)->refused, 4);

    /* far too large: ZeroMQ ends that connection; bytes that are no ZeroMQ at all: the same */
    char *huge = calloc(1, 200000);
    zmq_send(push, huge, 200000, 0);
    free(huge);
    struct sockaddr_in address = {.sin_family = AF_INET};
    address.sin_port = htons((uint16_t)atoi(mailbox_address(box.mailbox) + 16));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int file = socket(AF_INET, SOCK_STREAM, 0);
    assert_int_equal(connect(file, (struct sockaddr *)&address, sizeof address), 0);
    assert_int_equal(send(file, large, sizeof large, MSG_NOSIGNAL), sizeof large);
    void *other = zmq_socket(context, ZMQ_PUSH);
    zmq_setsockopt(other, ZMQ_LINGER, &zero, sizeof zero);
    zmq_connect(other, mailbox_address(box.mailbox));
    zmq_send(other, "ok still", 8, 0);
    got = take(&box, 5000);
    assert_non_null(got);
    assert_string_equal(got, "ok still");
    free(got);
    close(file);
    zmq_close(push);
    zmq_close(other);
    box_close(&box);
}

/* A peer that never comes costs a bounded amount of memory: what is over it is dropped. */
static void test_absent_peer_is_bounded(void **state) {
    struct box box;
    box_open(&box, "tcp://127.0.0.1:*", 10000);
    mailbox_connect(box.mailbox, 7, "ipc:///tmp/troupe-test-nobody");
    char text[901];
    memset(text, 'x', 900);
    text[900] = 0;
    for (int i = 0; i < 1500; i++)
        post(&box, 7, text);
    uint64_t until = clock_now_ns() + 5000000000u;
    while (mailbox_counters(box.mailbox)->dropped < 400 && clock_now_ns() < until)
        usleep(10000);
    assert_in_range(mailbox_counters(box.mailbox)->dropped, 400, 500);
    box_close(&box);
}

static void test_address_in_use(void **state) {
    struct box box;
    struct mailbox *second;
    struct failure failure;
    box_open(&box, "tcp://127.0.0.1:*", 10000);
    struct mailbox_options options = {.name = "test",
                                      .context = context,
                                      .bell = &box.bell,
                                      .bind = mailbox_address(box.mailbox),
                                      .message_max = 10,
                                      .accept = accept_text,
                                      .discard = free};
    assert_int_equal(mailbox_open(&second, &options, &failure), ERR_EXISTS);
    assert_non_null(strstr(failure.text, mailbox_address(box.mailbox)));
    options.bind = "nonsense";
    assert_int_equal(mailbox_open(&second, &options, &failure), ERR_INVALID);
    box_close(&box);
}

/* ---- frames ---- */

static void end_open(struct transport **ret, struct bell *bell, uint64_t incarnation) {
    struct failure failure;
    assert_int_equal(bell_create(bell, NULL, incarnation, &failure), 0);
    struct transport_options options = {.name = "test",
                                        .incarnation = incarnation,
                                        .bell = bell,
                                        .bind = "tcp://127.0.0.1:*",
                                        .zmq_context = context,
                                        .check_crc = true,
                                        .waiting_bytes_max = 1 << 24};
    assert_int_equal(transport_zmq_open(ret, &options, &failure), 0);
}

static struct outgoing make_frame(uint64_t to_incarnation, uint64_t batch, bool seal) {
    static float row[300];
    struct outgoing frame = {.seal = seal, .prefix = row, .prefix_bytes = 0};
    frame.header = (struct frame_header){.magic = FRAME_MAGIC,
                                         .version = FRAME_VERSION,
                                         .kind = FRAME_COMBINE,
                                         .from = 2,
                                         .to = 3,
                                         .from_incarnation = 0xaa,
                                         .to_incarnation = to_incarnation,
                                         .batch = batch,
                                         .rows = 5,
                                         .items = 5,
                                         .row_bytes = 240};
    frame.bytes = frame_bytes(FRAME_COMBINE, 5, 5, 0, 240);
    frame.rows_offset = frame_rows_offset(FRAME_COMBINE, 5, 5, 0);
    frame.header.payload_bytes = (uint32_t)(frame.bytes - sizeof frame.header);
    return frame;
}

/* Frames arrive in order and aligned; those for another incarnation and damaged ones do not arrive.
 */
static void test_frames(void **state) {
    struct transport *a, *b;
    struct bell bell_a, bell_b;
    struct failure failure;
    end_open(&a, &bell_a, 0xaa);
    end_open(&b, &bell_b, 0xbb);
    assert_int_equal(a->class->connect(a, 3, 0xbb, b->address, &failure), 0);
    assert_int_equal(a->class->connect(a, 3, 0xbb, b->address, &failure), 0);
    assert_true(a->class->connected(a, 3));
    struct outgoing unsealed = make_frame(0xbb, 1000, false), fenced = make_frame(0xcc, 1001, true);
    assert_int_equal(a->class->post_send(a, 3, &unsealed), 0);
    assert_int_equal(a->class->post_send(a, 3, &fenced), 0);
    for (uint64_t batch = 1; batch <= 500; batch++) {
        struct outgoing frame = make_frame(0xbb, batch, true);
        assert_int_equal(a->class->post_send(a, 3, &frame), 0);
    }
    uint64_t until = clock_now_ns() + 5000000000u, expected = 1;
    while (expected <= 500 && clock_now_ns() < until) {
        uint32_t seen = bell_seen(&bell_b);
        struct incoming incoming;
        if (!b->class->receive(b, &incoming)) {
            bell_wait(&bell_b, seen, 1, 100000000, 0);
            continue;
        }
        assert_int_equal(incoming.frame.header->batch, expected++);
        assert_int_equal((uintptr_t)incoming.frame.header % FRAME_ALIGN, 0);
        b->class->release(b, &incoming);
    }
    assert_int_equal(expected, 501);
    assert_int_equal(b->counters.refused, 1);
    a->class->disconnect(a, 3);
    assert_false(a->class->connected(a, 3));
    struct outgoing late = make_frame(0xbb, 1, true);
    assert_int_equal(a->class->post_send(a, 3, &late), ERR_NOT_FOUND);
    a->class->close(&a);
    b->class->close(&b);
    bell_close(&bell_a);
    bell_close(&bell_b);
}

static int setup(void **state) {
    context = zmq_ctx_new();
    return 0;
}

static int teardown(void **state) {
    zmq_ctx_term(context);
    return 0;
}

int main(void) {
    alarm(120); /* a failed test leaves sockets open, and ZeroMQ would wait for them */
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_order),
        cmocka_unit_test(test_disconnect_still_sends),
        cmocka_unit_test(test_rubbish_is_refused),
        cmocka_unit_test(test_absent_peer_is_bounded),
        cmocka_unit_test(test_address_in_use),
        cmocka_unit_test(test_frames),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
