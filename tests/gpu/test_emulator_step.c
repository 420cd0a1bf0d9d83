/* The resident step under every order that its events leave open: the host never waits inside it,
 * and an event that is missing between attention and experts shows. */
#include "tests/gpu/step_rig.h"
#include "tests/support/cuda_emulator_streams.h"

enum { SEEDS = 10 };

static struct step_options OPTIONS = {.rows = 2, .micro = 2, .groups = 2, .graphs = false};

static void test_no_waiting_inside(void **state) {
    (void)state;
    struct rig rig;
    OPTIONS.graphs = true;
    rig_open(&rig, NULL, false, OPTIONS);
    for (uint32_t turn = 0; turn < 3; turn++) { /* direct, captured, replayed */
        const uint64_t before = emulated_host_waits();
        assert_int_equal(rig_begin(&rig, 0, 4, 0, STEP_NO_BIAS), 0);
        assert_int_equal(emulated_host_waits(), before);
        rig_end(&rig);
        assert_int_equal(emulated_host_waits(), before + 1);
    }
    assert_int_equal(step_graphs(rig.step), 1);
    rig_close(&rig);
}

/* Awaits of a step of 2 layers, 2 micro-batches and 2 groups: accept and hear of each. The nth is
 * forgotten; 0: none. Returns for how many seeds something differs. */
static uint32_t wrong_without(struct rig *rig, const float *expected, uint32_t nth,
                              bool *ret_early) {
    uint32_t wrong = 0;
    const uint64_t before = emulated_overtakings();
    for (uint64_t seed = 1; seed <= SEEDS; seed++) {
        gpu_schedule(seed * 1000 + nth);
        emulated_forget_await(nth);
        assert_int_equal(rig_begin(rig, 0, 4, 0, STEP_NO_BIAS), 0);
        struct step_result result = rig_end(rig);
        /* what runs on after the end of the step would be the next one's trouble */
        stream_wait_cuda(step_stream(rig->step));
        bool same = true;
        for (uint32_t r = 0; r < 4; r++)
            same = same && result.lost[r] == 0 &&
                   rig_same(rig, r, expected + (size_t)r * rig->vocabulary);
        wrong += !same;
        if (!same && nth > 0)
            break;
    }
    *ret_early = emulated_overtakings() > before;
    return wrong;
}

static void test_a_missing_event_shows(void **state) {
    (void)state;
    struct rig rig;
    bool overtaken;
    OPTIONS.graphs = false;
    rig_open(&rig, NULL, false, OPTIONS);
    float *expected = calloc((size_t)RIG_SEQUENCES * rig.vocabulary, sizeof *expected);
    rig_plain(&rig, 0, 4, 0, expected);
    assert_int_equal(wrong_without(&rig, expected, 0, &overtaken), 0);
    assert_true(overtaken);                     /* experts did run beside attention */
    for (uint32_t nth = 1; nth <= 16; nth += 5) /* accept, hear; accept, hear of the second layer */
        if (wrong_without(&rig, expected, nth, &overtaken) == 0)
            fail_msg("await %u may be forgotten, says the emulator", nth);
    emulated_forget_await(0);
    free(expected);
    rig_close(&rig);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_no_waiting_inside),
        cmocka_unit_test(test_a_missing_event_shows),
    };
    return cmocka_run_group_tests_name("emulated step", tests, device_name, NULL);
}
