/* Actors of one process: what is sent arrives in order, checked, at whoever has the address now, and nowhere else. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "actors/host/neighbours.h" /* before cmocka, which takes the name fail for a macro */
#include "proto/wire.h"

#include <cmocka.h>

struct street {
    struct neighbours *all;
    struct neighbour *a, *b;
};

static int setup(void **state) {
    struct street *street = calloc(1, sizeof *street);
    street->all = neighbours_open();
    street->a = neighbour_join(street->all, "a", 11);
    street->b = neighbour_join(street->all, "b", 22);
    neighbour_connect(street->a, 7, "b");
    *state = street;
    return 0;
}

static int teardown(void **state) {
    struct street *street = *state;
    neighbour_leave(&street->a);
    neighbour_leave(&street->b);
    neighbours_close(&street->all);
    free(street);
    return 0;
}

static int send_poll(struct neighbour *from, actor_id to, uint64_t sequence) {
    message envelope = TROUPE__ENVELOPE__INIT;
    Troupe__Poll poll = TROUPE__POLL__INIT;
    envelope.protocol_version = WIRE_PROTOCOL_VERSION;
    envelope.from = 3;
    envelope.from_incarnation = 11;
    envelope.body_case = TROUPE__ENVELOPE__BODY_POLL;
    envelope.poll = &poll;
    poll.sequence = sequence;
    size_t size = wire_packed_bytes(&envelope);
    uint8_t *bytes = malloc(size);
    wire_pack(&envelope, bytes);
    return neighbour_send(from, to, bytes, size);
}

static void expect_poll(struct neighbour *at, uint64_t sequence) {
    message *envelope = neighbour_receive(at);
    assert_non_null(envelope);
    assert_int_equal(envelope->body_case, TROUPE__ENVELOPE__BODY_POLL);
    assert_int_equal(envelope->poll->sequence, sequence);
    wire_free(&envelope);
}

static void messages_arrive_in_order(void **state) {
    struct street *street = *state;
    assert_int_equal(send_poll(street->a, 7, 1), 0);
    assert_int_equal(send_poll(street->a, 7, 2), 0);
    assert_null(neighbour_receive(street->a));
    expect_poll(street->b, 1);
    expect_poll(street->b, 2);
    assert_null(neighbour_receive(street->b));
}

static void what_is_no_message_is_refused(void **state) {
    struct street *street = *state;
    char *rubbish = strdup("no message");
    assert_true(neighbour_send(street->a, 7, rubbish, strlen(rubbish)) < 0);
    assert_null(neighbour_receive(street->b));
}

static void nobody_hears_what_is_sent_to_the_unknown_and_the_gone(void **state) {
    struct street *street = *state;
    assert_int_equal(send_poll(street->a, 8, 1), ERR_NOT_FOUND);
    neighbour_leave(&street->b);
    assert_int_equal(send_poll(street->a, 7, 1), ERR_NOT_FOUND);
    street->b = neighbour_join(street->all, "b", 23);
    assert_int_equal(send_poll(street->a, 7, 2), ERR_NOT_FOUND); /* until it connects again */
    neighbour_connect(street->a, 7, "b");
    assert_int_equal(send_poll(street->a, 7, 3), 0);
    expect_poll(street->b, 3);
    neighbour_disconnect(street->a, 7);
    assert_int_equal(send_poll(street->a, 7, 4), ERR_NOT_FOUND);
}

static void an_address_is_taken_once(void **state) {
    struct street *street = *state;
    char address[ADDRESS_BYTES_MAX + 1];
    assert_null(neighbour_join(street->all, "b", 24));
    memset(address, 'x', sizeof address);
    address[sizeof address - 1] = 0;
    assert_null(neighbour_join(street->all, address, 25));
}

static void write_rows(void *context, void *ret_rows) {
    memcpy(ret_rows, context, 16);
}

static int post(struct transport *transport, actor_id to, uint64_t incarnation, void *rows) {
    struct outgoing frame = {.header = {.magic = FRAME_MAGIC,
                                        .version = FRAME_VERSION,
                                        .kind = FRAME_COMBINE,
                                        .to = to,
                                        .to_incarnation = incarnation,
                                        .rows = 1,
                                        .items = 1,
                                        .row_bytes = 16},
                             .gather = write_rows,
                             .context = rows,
                             .seal = true};
    frame.bytes = frame_bytes(FRAME_COMBINE, 1, 1, 0, 16);
    frame.rows_offset = frame_rows_offset(FRAME_COMBINE, 1, 1, 0);
    frame.header.payload_bytes = (uint32_t)(frame.bytes - sizeof frame.header);
    return transport->class->post_send(transport, to, &frame);
}

static void frames_reach_the_incarnation_that_they_are_for(void **state) {
    struct street *street = *state;
    struct transport *from, *to;
    struct incoming incoming;
    struct failure failure;
    float rows[4] = {1, 2, 3, 4};
    assert_int_equal(transport_local_open(&from, street->a, &failure), 0);
    assert_int_equal(transport_local_open(&to, street->b, &failure), 0);
    assert_int_equal(from->class->connect(from, 7, 21, "b", &failure), ERR_NOT_FOUND); /* an older life of b */
    assert_int_equal(from->class->connect(from, 9, 1, "c", &failure), ERR_NOT_FOUND);
    assert_int_equal(from->class->connect(from, 7, 22, "b", &failure), 0);
    assert_true(from->class->connected(from, 7));
    assert_int_equal(post(from, 7, 22, rows), 0);
    assert_int_equal(post(from, 7, 21, rows), 0); /* for an older life: refused on arrival */
    assert_int_equal(post(from, 9, 22, rows), ERR_NOT_FOUND);
    assert_true(to->class->receive(to, &incoming));
    size_t offset = frame_rows_offset(FRAME_COMBINE, 1, 1, 0) - sizeof *incoming.frame.header;
    assert_memory_equal(incoming.frame.payload + offset, rows, sizeof rows);
    to->class->release(to, &incoming);
    assert_false(to->class->receive(to, &incoming));
    assert_int_equal(to->counters.refused, 1);
    assert_int_equal(from->counters.dropped, 1);
    from->class->disconnect(from, 7);
    assert_false(from->class->connected(from, 7));
    from->class->close(&from);
    to->class->close(&to);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(messages_arrive_in_order, setup, teardown),
        cmocka_unit_test_setup_teardown(what_is_no_message_is_refused, setup, teardown),
        cmocka_unit_test_setup_teardown(nobody_hears_what_is_sent_to_the_unknown_and_the_gone, setup, teardown),
        cmocka_unit_test_setup_teardown(an_address_is_taken_once, setup, teardown),
        cmocka_unit_test_setup_teardown(frames_reach_the_incarnation_that_they_are_for, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
