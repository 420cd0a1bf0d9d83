/* Addresses told to peers must be reachable without a name service: numbers, never this machine's name. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "actors/host/endpoint.h"

#include <cmocka.h>

static void expect(const char *bound, const char *towards, const char *expected) {
    char address[ADDRESS_BYTES_MAX];
    endpoint_advertised(bound, towards, address);
    assert_string_equal(address, expected);
}

static void test_advertised(void **state) {
    (void)state;
    expect("ipc:///tmp/x/expert-0.control", NULL, "ipc:///tmp/x/expert-0.control");
    expect("tcp://10.1.2.3:99", "tcp://127.0.0.1:5", "tcp://10.1.2.3:99");
    expect("tcp://0.0.0.0:4711", NULL, "tcp://127.0.0.1:4711");
    expect("tcp://0.0.0.0:4711", "", "tcp://127.0.0.1:4711");
    expect("tcp://0.0.0.0:4711", "ipc:///tmp/x", "tcp://127.0.0.1:4711");
    expect("tcp://0.0.0.0:4711", "tcp://127.0.0.1:5000", "tcp://127.0.0.1:4711");
    expect("tcp://0.0.0.0:4711", "tcp://no-such-host.invalid:5000", "tcp://127.0.0.1:4711");
    expect("tcp://0.0.0.0:4711", "tcp://nonsense", "tcp://127.0.0.1:4711");
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_advertised)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
