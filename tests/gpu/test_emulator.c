/* The emulator itself: what it must notice of wrong kernels, and that right ones give the same
 * under every order of threads. */
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/gpu/compare.h"
#include "tests/support/cuda_emulator_faults.h"

enum { SEEDS = 40 };

static void test_a_missing_barrier_shows(void **state) {
    unsigned wrong[2] = {0, 0};
    for (int with = 0; with < 2; with++)
        for (uint64_t seed = 1; seed <= SEEDS; seed++) {
            uint32_t got[128];
            gpu_schedule(seed);
            faulty_pass(with, got);
            for (uint32_t i = 0; i < 128; i++)
                if (got[i] != (i + 1) % 128) {
                    wrong[with]++;
                    break;
                }
        }
    assert_int_equal(wrong[1], 0);
    assert_true(wrong[0] > SEEDS / 2);
}

static void test_asynchronous_work_needs_its_waits(void **state) {
    static bf16 matrix[128 * 128] __attribute__((aligned(64)));
    static float good[128 * 64], got[128 * 64];
    uint64_t random = 7;
    for (int i = 0; i < 128 * 128; i++)
        matrix[i] = bf16_from_float((float)random_below(&random, 5) - 2);
    gpu_schedule(1);
    faulty_tiles(0, matrix, good);
    /* d[0] of thread 0 is row 0 by row 0 of the whole matrix. */
    float first = 0;
    for (int k = 0; k < 128; k++)
        first += bf16_to_float(matrix[k]) * bf16_to_float(matrix[k]);
    assert_true(good[0] == first);
    for (int fault = 0; fault < 4; fault++) {
        unsigned wrong = 0;
        for (uint64_t seed = 1; seed <= SEEDS; seed++) {
            int status = 0;
            pid_t child = fork(); /* some faults end in a message of the emulator's own */
            if (child == 0) {
                signal(SIGABRT, SIG_DFL);
                close(2);
                gpu_schedule(seed);
                faulty_tiles(fault, matrix, got);
                _exit(memcmp(got, good, sizeof got) != 0);
            }
            waitpid(child, &status, 0);
            wrong += status != 0;
        }
        print_message("fault %d: %u of %d seeds show it\n", fault, wrong, SEEDS);
        if (fault == 0)
            assert_int_equal(wrong, 0);
        else
            assert_true(wrong > 0);
    }
}

static void test_a_deadlock_is_told(void **state) {
    int ends[2], status = 0;
    char text[512] = "";
    assert_int_equal(pipe(ends), 0);
    pid_t child = fork();
    if (child == 0) {
        uint32_t got[128];
        dup2(ends[1], 2);
        signal(SIGABRT, SIG_DFL);
        faulty_barrier(got);
        _exit(0);
    }
    close(ends[1]);
    waitpid(child, &status, 0);
    assert_true(WIFSIGNALED(status));
    assert_true(read(ends[0], text, sizeof text - 1) > 0);
    close(ends[0]);
    assert_non_null(strstr(text, "no thread of stuck_kernel can go on"));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_missing_barrier_shows),
        cmocka_unit_test(test_asynchronous_work_needs_its_waits),
        cmocka_unit_test(test_a_deadlock_is_told),
    };
    return cmocka_run_group_tests_name("emulator", tests, device_name, NULL);
}
