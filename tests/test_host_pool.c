/* The thread pool, the doorbell and the queue between threads. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "actors/host/bell.h"
#include "actors/host/clock.h"
#include "actors/host/pool.h"
#include "actors/host/queue.h"

/* last: cmocka has a macro fail() */
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <cmocka.h>

struct job {
    _Atomic int done[1000];
    int parts;
};

static void mark(void *argument, int part, int parts) {
    struct job *job = argument;
    assert_int_equal(parts, job->parts);
    atomic_fetch_add(&job->done[part], 1);
}

/* Every part of every job runs exactly once, whatever the number of threads, jobs following each
 * other at once, inside of pool_begin and pool_end and outside. */
static void test_every_part_once(void **state) {
    for (int width = 1; width <= 5; width += 2) {
        struct pool *pool;
        assert_int_equal(pool_open(&pool, width, NULL), 0);
        struct parallel parallel = pool_parallel(pool);
        assert_int_equal(parallel.width, width);
        for (int round = 0; round < 2000; round++) {
            static struct job job;
            job.parts = round % 7 == 0 ? 0 : round % 11 == 0 ? 1000 : 1 + round % 9;
            memset((void *)job.done, 0, sizeof job.done);
            if (round % 5 == 0)
                pool_begin(pool);
            parallel.run(parallel.pool, mark, &job, job.parts);
            for (int part = 0; part < job.parts; part++)
                assert_int_equal(job.done[part], 1);
            if (round % 5 == 3)
                pool_end(pool);
        }
        pool_close(&pool);
        assert_null(pool);
    }
}

static void *ring_later(void *argument) {
    usleep(30000);
    bell_ring(argument);
    return NULL;
}

/* A ring that came before the wait is not lost; one that comes during it ends it; without one the
 * timeout does. */
static void test_bell(void **state) {
    struct bell bell;
    assert_int_equal(bell_create(&bell, NULL, 7, NULL), 0);
    uint32_t seen = bell_seen(&bell);
    assert_false(bell_ring(&bell)); /* nobody sleeps */
    uint64_t start = clock_now_ns();
    bell_wait(&bell, seen, 1, 5000000000u, 0);
    assert_true(clock_now_ns() - start < 1000000000u);

    pthread_t thread;
    pthread_create(&thread, NULL, ring_later, &bell);
    seen = bell_seen(&bell);
    start = clock_now_ns();
    bell_wait(&bell, seen, 1, 5000000000u, 0);
    assert_true(clock_now_ns() - start < 4000000000u);
    pthread_join(thread, NULL);

    seen = bell_seen(&bell);
    start = clock_now_ns();
    bell_wait(&bell, seen, 1, 20000000, 5000000);
    assert_true(clock_now_ns() - start >= 15000000);
    bell_close(&bell);
}

static void *ring_gently_later(void *argument) {
    static bool woke[3];
    struct bell *bell = argument;
    while (atomic_load(&bell->page->sleeping) == 0)
        usleep(1000);
    usleep(20000); /* it really sleeps now, or the first ring ends its wait */
    for (int i = 0; i < 3; i++)
        woke[i] = bell_ring_gently(bell);
    return woke;
}

/* Who waits for three rings sleeps through two gentle ones, but not through an ordinary one. */
static void test_gentle_rings(void **state) {
    struct bell bell;
    pthread_t thread;
    void *result;
    assert_int_equal(bell_create(&bell, NULL, 7, NULL), 0);
    pthread_create(&thread, NULL, ring_gently_later, &bell);
    uint64_t start = clock_now_ns();
    bell_wait(&bell, bell_seen(&bell), 3, 5000000000u, 0);
    assert_true(clock_now_ns() - start < 4000000000u);
    pthread_join(thread, &result);
    const bool *woke = result;
    assert_false(woke[0]);
    assert_false(woke[1]);
    assert_true(woke[2]);

    pthread_create(&thread, NULL, ring_later, &bell);
    start = clock_now_ns();
    bell_wait(&bell, bell_seen(&bell), 3, 5000000000u, 0);
    assert_true(clock_now_ns() - start < 4000000000u);
    pthread_join(thread, NULL);
    bell_close(&bell);
}

/* A peer finds a bell by name and incarnation only, and rings it through its own mapping. */
static void test_bell_by_name(void **state) {
    char name[64];
    snprintf(name, sizeof name, "troupe-test-%d.bell", getpid());
    struct bell own, peer, none;
    struct failure failure;
    assert_int_equal(bell_open(&none, name, 7, &failure), ERR_NOT_FOUND);
    assert_int_equal(bell_create(&own, name, 7, &failure), 0);
    assert_int_equal(bell_create(&none, name, 8, &failure), ERR_IO);
    assert_int_equal(bell_open(&none, name, 8, &failure), ERR_NOT_FOUND);
    assert_int_equal(bell_open(&peer, name, 7, &failure), 0);
    uint32_t seen = bell_seen(&own);
    bell_ring(&peer);
    assert_int_equal(bell_seen(&own), seen + 1);
    bell_close(&own);
    assert_int_equal(atomic_load(&peer.page->gone), 1);
    assert_int_equal(bell_open(&none, name, 7, &failure), ERR_NOT_FOUND);
    bell_close(&peer);
}

static void *push_all(void *argument) {
    for (uintptr_t i = 1; i <= 100000;) {
        if (queue_push(argument, (void *)i))
            i++;
    }
    return NULL;
}

static void test_queue(void **state) {
    struct queue queue;
    assert_true(queue_init(&queue, 64));
    assert_null(queue_pop(&queue));
    for (uintptr_t i = 1; i <= 64; i++)
        assert_true(queue_push(&queue, (void *)i));
    assert_false(queue_push(&queue, (void *)1));
    for (uintptr_t i = 1; i <= 64; i++)
        assert_ptr_equal(queue_pop(&queue), (void *)i);
    pthread_t thread;
    pthread_create(&thread, NULL, push_all, &queue);
    for (uintptr_t i = 1; i <= 100000;) {
        void *item = queue_pop(&queue);
        if (item == NULL)
            continue;
        assert_ptr_equal(item, (void *)i);
        i++;
    }
    pthread_join(thread, NULL);
    queue_free(&queue);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_part_once),
        cmocka_unit_test(test_bell),
        cmocka_unit_test(test_gentle_rings),
        cmocka_unit_test(test_bell_by_name),
        cmocka_unit_test(test_queue),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
