/* --gpu: what is judged before anything is loaded, and the refusal where there is no card. */
#include <stdio.h>
#include <string.h>

#include "actors/host/gpu_device.h"
#include "actors/host/nccl_api.h"

/* last: cmocka has a macro fail() */
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <cmocka.h>

static const struct gpu_device H200 = {.index = 3,
                                       .name = "H200",
                                       .major = 9,
                                       .minor = 0,
                                       .total_bytes = 140ull << 30,
                                       .free_bytes = 100ull << 30};

static void memory_is_judged_before_it_is_taken(void **state) {
    struct failure failure = {0};
    const uint64_t room = (100ull << 30) - GPU_RESERVE_BYTES;
    assert_int_equal(gpu_device_fits(&H200, 0, "weights", &failure), 0);
    assert_int_equal(gpu_device_fits(&H200, room, "weights", &failure), 0);
    assert_int_equal(gpu_device_fits(&H200, room + 1, "weights", &failure), ERR_NO_MEMORY);
    assert_non_null(strstr(failure.text, "weights need"));
    assert_non_null(strstr(failure.text, "GPU 3"));
    struct gpu_device full = H200;
    full.free_bytes = GPU_RESERVE_BYTES / 2; /* less than the reserve: no wrapping around */
    assert_int_equal(gpu_device_fits(&full, 1, "weights", &failure), ERR_NO_MEMORY);
}

static void other_architectures_are_refused(void **state) {
    struct failure failure = {0};
    assert_int_equal(gpu_device_check(&H200, &failure), 0);
    struct gpu_device ampere = H200, blackwell = H200;
    ampere.major = 8, blackwell.major = 10;
    assert_int_equal(gpu_device_check(&ampere, &failure), ERR_UNSUPPORTED);
    assert_int_equal(gpu_device_check(&blackwell, &failure), ERR_UNSUPPORTED);
    assert_non_null(strstr(failure.text, "10.0"));
}

/* A device that the topology does not know binds nothing and is no error. */
static void an_unknown_place_binds_nothing(void **state) {
    struct failure failure = {0};
    struct gpu_device nowhere = H200;
    nowhere.pci_domain = 0xfffe;
    assert_int_equal(gpu_device_pin(&nowhere, &failure), 0);
}

static void without_a_card_the_reason_is_told(void **state) {
    struct failure failure = {0};
    struct gpu_device device;
    int error = gpu_device_open(&device, 0, &failure);
    if (error == 0)
        skip(); /* there is one */
    assert_true(error == ERR_UNSUPPORTED);
    assert_non_null(strstr(failure.text, "leave out --gpu"));
    const struct nccl_api *api;
    assert_int_equal(nccl_api_open(&api, 0, &failure), ERR_UNSUPPORTED);
}

/* The profile of the GPU is for attention that it has kernels for. */
static void a_model_is_judged_before_it_is_loaded(void **state) {
    struct failure failure = {0};
    const struct mla_shape deepseek = {.nope = 128, .rope = 64, .v = 128};
    const struct mla_shape odd = {.nope = 256, .rope = 64, .v = 128};
    assert_int_equal(gpu_device_offers(&odd, &failure), ERR_UNSUPPORTED);
    if (strstr(failure.text, "without CUDA") == NULL)
        assert_int_equal(gpu_device_offers(&deepseek, &failure), 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(memory_is_judged_before_it_is_taken),
        cmocka_unit_test(other_architectures_are_refused),
        cmocka_unit_test(an_unknown_place_binds_nothing),
        cmocka_unit_test(a_model_is_judged_before_it_is_loaded),
        cmocka_unit_test(without_a_card_the_reason_is_told),
    };
    return cmocka_run_group_tests_name("gpu device", tests, NULL, NULL);
}
