/* The emulated streams, events and graphs: what events order is in order under every seed, what
 * they do not order shows under some, and misuse is refused as the CUDA runtime refuses it. */
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kernels/cuda/streams.h"
#include "tests/gpu/compare.h"
#include "tests/support/cuda_emulator_streams.h"

enum { SEEDS = 40, N = 8, TURNS = 3 };

struct chain {
    void *left, *right, *there, *back;
    float *x, *y; /* [N], on the device */
};

static void chain_open(struct chain *self) {
    assert_int_equal(stream_make_cuda(&self->left), 0);
    assert_int_equal(stream_make_cuda(&self->right), 0);
    assert_int_equal(event_make_cuda(&self->there), 0);
    assert_int_equal(event_make_cuda(&self->back), 0);
    self->x = gpu_take(N * sizeof(float));
    self->y = gpu_take(N * sizeof(float));
    for (uint32_t i = 0; i < N; i++) {
        self->x[i] = 1;
        self->y[i] = 2;
    }
}
static void chain_close(struct chain *self) {
    stream_free_cuda(self->left);
    stream_free_cuda(self->right);
    event_free_cuda(self->there);
    event_free_cuda(self->back);
    gpu_give(self->x);
    gpu_give(self->y);
}
/* x += y on the left, y += x on the right, in turns. */
static void chain_enqueue(struct chain *self) {
    for (uint32_t turn = 0; turn < TURNS; turn++) {
        assert_int_equal(add_cuda(self->left, self->x, N, self->y, N, 1, N), 0);
        event_record_cuda(self->there, self->left);
        event_await_cuda(self->right, self->there);
        assert_int_equal(add_cuda(self->right, self->y, N, self->x, N, 1, N), 0);
        event_record_cuda(self->back, self->right);
        event_await_cuda(self->left, self->back);
    }
}
/* 1, 2 -> 3, 5 -> 8, 13 -> 21, 34 */
static bool chain_right(const struct chain *self, uint32_t runs) {
    float x = 1, y = 2;
    for (uint32_t i = 0; i < runs * TURNS; i++) {
        x += y;
        y += x;
    }
    for (uint32_t i = 0; i < N; i++)
        if (self->x[i] != x || self->y[i] != y)
            return false;
    return true;
}

/* Right in every order; without one of its events, wrong in some. */
static void check_noticed(uint32_t forgotten, uint32_t wrong) {
    if (forgotten == 0)
        assert_int_equal(wrong, 0);
    else
        assert_true(wrong > 0);
}

static void test_events_order_streams(void **state) {
    (void)state;
    for (uint32_t forgotten = 0; forgotten < 2 * TURNS; forgotten++) {
        uint32_t wrong = 0;
        for (uint64_t seed = 1; seed <= SEEDS; seed++) {
            struct chain chain;
            chain_open(&chain);
            gpu_schedule(seed);
            emulated_forget_await(forgotten);
            chain_enqueue(&chain);
            stream_wait_cuda(chain.left);
            stream_wait_cuda(chain.right);
            wrong += !chain_right(&chain, 1);
            chain_close(&chain);
        }
        check_noticed(forgotten, wrong);
    }
    emulated_forget_await(0);
}

static void test_graphs_keep_the_order(void **state) {
    (void)state;
    for (uint32_t forgotten = 0; forgotten < 3; forgotten++) {
        uint32_t wrong = 0;
        for (uint64_t seed = 1; seed <= SEEDS; seed++) {
            struct chain chain;
            void *graph = NULL;
            chain_open(&chain);
            gpu_schedule(seed);
            assert_int_equal(graph_begin_cuda(chain.left), 0);
            /* the first one forgotten would leave the right stream outside: the third waits again
             */
            emulated_forget_await(forgotten == 0 ? 0 : forgotten + 1);
            chain_enqueue(&chain);
            assert_int_equal(graph_end_cuda(chain.left, &graph), 0);
            assert_int_equal(graph_nodes_cuda(graph), 2 * TURNS);
            assert_true(chain.x[0] == 1 && chain.y[0] == 2); /* nothing has run */
            for (uint32_t i = 0; i < 2; i++)
                assert_int_equal(graph_run_cuda(graph, chain.left), 0);
            stream_wait_cuda(chain.left);
            wrong += !chain_right(&chain, 2);
            graph_free_cuda(graph);
            chain_close(&chain);
        }
        check_noticed(forgotten, wrong);
    }
    emulated_forget_await(0);
}

static void test_a_graph_must_be_joined(void **state) {
    (void)state;
    struct chain chain;
    void *graph = NULL;
    chain_open(&chain);
    assert_int_equal(graph_begin_cuda(chain.left), 0);
    add_cuda(chain.left, chain.x, N, chain.y, N, 1, N);
    event_record_cuda(chain.there, chain.left);
    event_await_cuda(chain.right, chain.there);
    add_cuda(chain.right, chain.y, N, chain.x, N, 1, N);
    assert_int_equal(graph_end_cuda(chain.left, &graph), 904);
    assert_null(graph);
    /* an event from outside a capture cannot be waited for inside */
    event_record_cuda(chain.back, chain.right);
    assert_int_equal(graph_begin_cuda(chain.left), 0);
    assert_int_equal(event_await_cuda(chain.left, chain.back), 905);
    assert_int_equal(graph_end_cuda(chain.left, &graph), 0);
    graph_free_cuda(graph);
    chain_close(&chain);
}

static void test_nothing_blocks_in_a_capture(void **state) {
    (void)state;
    int status = 0;
    pid_t child = fork();
    if (child == 0) {
        signal(SIGABRT, SIG_DFL);
        close(2);
        struct chain chain;
        chain_open(&chain);
        graph_begin_cuda(chain.left);
        stream_wait_cuda(chain.right);
        _exit(0);
    }
    waitpid(child, &status, 0);
    assert_true(WIFSIGNALED(status));
}

/* Host memory that is changed before the copy is done. */
static void test_copies_read_when_they_run(void **state) {
    (void)state;
    uint32_t late = 0;
    for (uint64_t seed = 1; seed <= SEEDS; seed++) {
        struct chain chain;
        float *host = NULL;
        chain_open(&chain);
        assert_int_equal(pinned_take_cuda(sizeof *host, (void **)&host), 0);
        gpu_schedule(seed);
        *host = 7;
        stream_put_cuda(chain.left, chain.x, host, sizeof *host);
        *host = 8;
        stream_wait_cuda(chain.left);
        late += chain.x[0] == 8;
        pinned_give_cuda(host);
        chain_close(&chain);
    }
    assert_true(late > SEEDS / 2);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_events_order_streams),
        cmocka_unit_test(test_graphs_keep_the_order),
        cmocka_unit_test(test_a_graph_must_be_joined),
        cmocka_unit_test(test_nothing_blocks_in_a_capture),
        cmocka_unit_test(test_copies_read_when_they_run),
    };
    return cmocka_run_group_tests_name("emulated streams", tests, device_name, NULL);
}
