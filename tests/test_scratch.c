/* The kernels' working memory: a stack per thread that settles on one chunk and then takes nothing
 * from the heap. */
#include <malloc.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "kernels/rows.h"

#include <cmocka.h> /* after errors.h: it defines a macro named fail */

enum { PIECES = 40, PIECE = 100000 };

/* Takes pieces in two levels, fills each with its number and checks that nothing moved or
 * overlapped. */
static void use(void *first_of[1]) {
    unsigned char *piece[PIECES];
    struct scratch_mark outer = scratch_mark();
    for (int i = 0; i < PIECES; i++) {
        piece[i] = scratch_take(PIECE + (size_t)i, 1);
        assert_int_equal((uintptr_t)piece[i] % 64, 0);
        memset(piece[i], i, PIECE + (size_t)i);
        struct scratch_mark inner = scratch_mark();
        memset(scratch_take(PIECE, 3), 0xff, 3 * PIECE);
        scratch_release(inner);
    }
    for (int i = 0; i < PIECES; i++)
        for (int k = 0; k < PIECE + i; k += 99)
            assert_int_equal(piece[i][k], i);
    first_of[0] = piece[0];
    scratch_release(outer);
}

static void test_grows_once_and_settles(void **state) {
    void *second, *third, *ignored;
    use(&ignored);
    struct mallinfo2 before = mallinfo2();
    use(&second);
    use(&third);
    struct mallinfo2 after = mallinfo2();
    assert_ptr_equal(second, third);
    assert_int_equal(before.uordblks + before.hblkhd, after.uordblks + after.hblkhd);
    scratch_free();
    scratch_free();
    assert_non_null(scratch_take(1, 1)); /* usable again */
    scratch_free();
}

static void test_nothing_taken(void **state) {
    struct scratch_mark mark = scratch_mark();
    assert_non_null(scratch_take(0, 8));
    scratch_release(mark);
    scratch_free();
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_grows_once_and_settles),
        cmocka_unit_test(test_nothing_taken),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
