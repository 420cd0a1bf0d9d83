/* The device's edge over NCCL against the fake one: frames of fixed size in order in both
 * directions, enqueued ahead of the other side, and a dead peer as an error. */
#include "actors/host/step_edge_nccl.h"

#include <stdlib.h>
#include <string.h>

#include "tests/support/fake_nccl.h"

#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>

enum { NOTE = 96, ROWS = 640, STATUS = 64, OUTPUT = 1024, ROUNDS = 4, SEEDS = 30 };

/* One process's end. */
struct side {
    struct fake_process *process;
    const struct nccl_api *api;
    void *stream, *requests, *replies, *registered[2];
    uint8_t *asked, *answered; /* [ROUNDS] frames of each direction */
    struct edge edge;
};

static struct edge_frame frame_of(const struct side *self, int round) {
    uint8_t *asked = self->asked + round * (NOTE + ROWS),
            *answered = self->answered + round * (STATUS + OUTPUT);
    return (struct edge_frame){.note = asked,
                               .rows = asked + NOTE,
                               .status = (uint32_t *)answered,
                               .output = (float *)(answered + STATUS),
                               .note_bytes = NOTE,
                               .rows_bytes = ROWS,
                               .status_bytes = STATUS,
                               .output_bytes = OUTPUT};
}

static void side_open(struct side *self, struct fake_nccl *world, const struct nccl_id id[2],
                      bool attention) {
    const struct nccl_comm_options options = {.channels_max = 1, .name = "test"};
    self->process = fake_process_make(world);
    self->api = fake_process_api(self->process);
    void *context = self->api->context;
    assert_int_equal(self->api->stream_make(context, &self->stream), 0);
    self->api->comm_init(context, &self->requests, &id[0], attention ? 0 : 1, &options);
    self->api->comm_init(context, &self->replies, &id[1], attention ? 1 : 0, &options);
    assert_int_equal(self->api->memory_take(context, ROUNDS * (NOTE + ROWS), (void **)&self->asked),
                     0);
    assert_int_equal(
        self->api->memory_take(context, ROUNDS * (STATUS + OUTPUT), (void **)&self->answered), 0);
}

static void side_register(struct side *self) {
    void *context = self->api->context;
    assert_int_equal(self->api->comm_register(context, self->requests, self->asked,
                                              ROUNDS * (NOTE + ROWS), &self->registered[0]),
                     0);
    assert_int_equal(self->api->comm_register(context, self->replies, self->answered,
                                              ROUNDS * (STATUS + OUTPUT), &self->registered[1]),
                     0);
    assert_int_equal(step_edge_nccl_open(&self->edge, self->api, self->requests, self->replies), 0);
}

static void open_both(struct fake_nccl *world, struct side *attention, struct side *experts) {
    struct nccl_id id[2];
    memset(attention, 0, sizeof *attention);
    memset(experts, 0, sizeof *experts);
    memset(id, 0, sizeof id);
    id[0].bytes[0] = 101;
    id[1].bytes[0] = 102;
    side_open(attention, world, id, true);
    side_open(experts, world, id, false);
    for (int turn = 0; turn < 100; turn++)
        fake_nccl_turn(world);
    side_register(attention);
    side_register(experts);
}

static void fill(uint8_t *to, size_t bytes, int salt) {
    for (size_t i = 0; i < bytes; i++)
        to[i] = (uint8_t)(i * 7 + (size_t)salt * 31);
}

static void test_frames_arrive_in_order(void **state) {
    (void)state;
    for (uint64_t seed = 1; seed <= SEEDS; seed++) {
        struct fake_nccl *world = fake_nccl_make(seed);
        struct side attention, experts;
        open_both(world, &attention, &experts);
        for (int round = 0; round < ROUNDS; round++)
            fill(attention.asked + round * (NOTE + ROWS), NOTE + ROWS, round);
        /* all of it is enqueued before anything runs, on one stream of each process */
        for (int round = 0; round < ROUNDS; round++) {
            const struct edge_frame a = frame_of(&attention, round), e = frame_of(&experts, round);
            const struct edge *at = &attention.edge, *there = &experts.edge;
            fill(experts.answered + round * (STATUS + OUTPUT), STATUS + OUTPUT, round + 9);
            assert_int_equal(at->operations->ask(at->state, &a, attention.stream), 0);
            assert_int_equal(at->operations->hear(at->state, &a, attention.stream), 0);
            assert_int_equal(there->operations->accept(there->state, &e, experts.stream), 0);
            assert_int_equal(there->operations->answer(there->state, &e, experts.stream), 0);
        }
        assert_int_equal(fake_nccl_moved(world), 0);
        for (int turn = 0; turn < 1000; turn++)
            fake_nccl_turn(world);
        assert_int_equal(fake_nccl_moved(world), 4 * ROUNDS);
        assert_memory_equal(experts.asked, attention.asked, ROUNDS * (NOTE + ROWS));
        assert_memory_equal(experts.answered, attention.answered, ROUNDS * (STATUS + OUTPUT));
        edge_close(&attention.edge);
        edge_close(&experts.edge);
        fake_nccl_free(world);
    }
}

/* A peer that NCCL tells to be dead, and communicators that never were: an error, never a wait. */
static void test_a_dead_peer_is_an_error(void **state) {
    (void)state;
    struct fake_nccl *world = fake_nccl_make(3);
    struct side attention, experts;
    open_both(world, &attention, &experts);
    const struct edge_frame frame = frame_of(&attention, 0);
    const struct edge *edge = &attention.edge;
    assert_int_equal(edge->operations->ask(edge->state, &frame, attention.stream), 0);
    fake_process_kill(experts.process, true);
    assert_true(edge->operations->hear(edge->state, &frame, attention.stream) < 0);
    assert_true(edge->operations->ask(edge->state, &frame, attention.stream) < 0);
    /* what was enqueued leaves the stream with the communicator, and nothing came */
    attention.api->comm_abort(attention.api->context, attention.requests);
    attention.api->comm_abort(attention.api->context, attention.replies);
    for (int turn = 0; turn < 100; turn++)
        fake_nccl_turn(world);
    assert_int_equal(fake_nccl_moved(world), 0);
    attention.api->stream_free(attention.api->context, attention.stream);
    edge_close(&attention.edge);
    edge_close(&experts.edge);
    fake_nccl_free(world);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_frames_arrive_in_order),
        cmocka_unit_test(test_a_dead_peer_is_an_error),
    };
    return cmocka_run_group_tests_name("step edge over nccl", tests, NULL, NULL);
}
