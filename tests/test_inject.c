/* Faults inside of a process (actors/host/inject.h): each kind does what it says, only when and where it is to, and ends. */
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "actors/host/clock.h"
#include "actors/host/inject.h"

#include <cmocka.h>

#define TRIES 5000

static struct bell bell;
static struct inject *inject;
static char directory[64];

static int open_all(void **state) {
    (void)state;
    struct failure failure;
    snprintf(directory, sizeof directory, "/tmp/troupe-test-inject-XXXXXX");
    return mkdtemp(directory) == NULL || bell_create(&bell, NULL, 1, &failure) < 0 ||
           inject_open(&inject, directory, "expert-0", &bell, &failure) < 0;
}

static int close_all(void **state) {
    (void)state;
    inject_close(&inject);
    bell_close(&bell);
    return rmdir(directory); /* the socket is gone as well */
}

static bool nothing(void);

/* All rules are gone. */
static void anew(void) {
    void *none = NULL;
    close_all(&none);
    assert_int_equal(open_all(&none), 0);
    assert_true(nothing());
}

static void tell(const char *rule) {
    assert_true(inject_tell(directory, "expert-0", rule));
}

static enum injected send_frame(struct outgoing *frame) {
    frame->flip_before = frame->flip_after = 0;
    return inject_frame(inject, frame);
}

static struct outgoing rows(void) {
    struct outgoing frame = {.bytes = 1024, .rows_offset = 128};
    frame.header.kind = FRAME_COMBINE;
    frame.header.items = 4;
    frame.header.row_bytes = 200;
    return frame;
}

/* Rules are taken by another thread. */
static void until(bool (*true_now)(void)) {
    bool is = false;
    for (int i = 0; i < TRIES && !(is = true_now()); i++)
        usleep(1000);
    assert_true(is);
}

static bool message_dropped(void) {
    return inject_message(inject) == INJECT_DROP;
}
static bool message_twice(void) {
    return inject_message(inject) == INJECT_TWICE;
}
static bool message_later(void) {
    return inject_message(inject) == INJECT_LATER;
}
static bool load_fails(void) {
    return inject_load(inject) == ERR_IO;
}
static bool memory_fails(void) {
    return inject_load(inject) == ERR_NO_MEMORY;
}
static bool message_goes(void) {
    return inject_message(inject) == INJECT_NOTHING;
}
static bool damages(void) {
    struct outgoing frame = rows();
    send_frame(&frame);
    return frame.flip_after > 0;
}
static bool lies(void) {
    struct outgoing frame = rows();
    send_frame(&frame);
    return frame.flip_before > 0;
}
static bool nothing(void) {
    struct outgoing frame = rows();
    return inject_message(inject) == INJECT_NOTHING && send_frame(&frame) == INJECT_NOTHING && frame.flip_before == 0 &&
           frame.flip_after == 0 && inject_load(inject) == 0 && !inject_deaf(inject);
}

static void test_nothing_strikes_without_a_rule(void **state) {
    (void)state;
    assert_true(nothing());
    tell("drop share 2 for 100 by 0 layer 0 seed 1"); /* none of these is a rule */
    tell("hurt share 1 for 100 by 0 layer 0 seed 1");
    tell("drop");
    usleep(20000);
    assert_true(nothing());
    assert_false(inject_tell(directory, "expert-1", "drop share 1 for 100 by 0 layer 0 seed 1")); /* nobody is there */
}

static void test_messages_and_frames(void **state) {
    (void)state;
    struct outgoing frame = rows();
    tell("drop share 1 for 0 by 0 layer 0 seed 1");
    until(message_dropped);
    assert_int_equal(send_frame(&frame), INJECT_DROP);
    assert_false(inject_deaf(inject));
    anew();
    tell("duplicate share 1 for 0 by 0 layer 0 seed 1");
    until(message_twice);
    assert_int_equal(send_frame(&frame), INJECT_TWICE);
    anew();
    tell("partition share 1 for 0 by 0 layer 0 seed 1");
    until(message_dropped);
    assert_true(inject_deaf(inject)); /* both ways */
}

static void test_what_is_late_comes_once_and_whole(void **state) {
    (void)state;
    uint64_t due_ns;
    tell("delay share 1 for 0 by 30 layer 0 seed 1");
    until(message_later);
    inject_hold_message(inject, 7, strdup("late"), 5);
    assert_null(inject_due(inject, clock_now_ns() - 1000000000u, &due_ns));
    assert_true(due_ns != NEVER && due_ns <= clock_now_ns() + 30000000u);
    struct held *held = inject_due(inject, due_ns, &due_ns);
    assert_non_null(held);
    assert_int_equal(held->to, 7);
    assert_false(held->is_frame);
    assert_string_equal(held->bytes, "late");
    held_free(&held);
    assert_null(inject_due(inject, NEVER - 1, &due_ns));
    assert_true(due_ns == NEVER);
}

static void test_damage(void **state) {
    (void)state;
    tell("corrupt share 1 for 0 by 0 layer 0 seed 1");
    until(damages);
    struct outgoing frame = rows();
    send_frame(&frame);
    assert_in_range(frame.flip_after, 1, 8 * frame.bytes);
    assert_int_equal(frame.flip_before, 0);
    anew();
    tell("lie share 1 for 0 by 0 layer 0 seed 1");
    until(lies);
    send_frame(&frame);
    assert_in_range(frame.flip_before, 1 + 8 * frame.rows_offset, 8 * (frame.rows_offset + 4 * 200)); /* a bit of a row */
    assert_int_equal(frame.flip_after, 0);
    frame.header.kind = FRAME_DISPATCH; /* what it did not compute */
    send_frame(&frame);
    assert_int_equal(frame.flip_before, 0);
}

static void test_a_share_is_a_share(void **state) {
    (void)state;
    tell("corrupt share 0.1 for 0 by 0 layer 0 seed 5");
    until(damages);
    uint32_t hit = 0;
    for (int i = 0; i < 4000; i++) {
        struct outgoing frame = rows();
        send_frame(&frame);
        hit += frame.flip_after > 0;
    }
    assert_in_range(hit, 300, 500);
}

static void test_rules_end(void **state) {
    (void)state;
    tell("drop share 1 for 40 by 0 layer 0 seed 1");
    tell("disk-error share 1 for 0 by 0 layer 0 seed 1");
    until(load_fails); /* so the first rule has been taken as well */
    until(message_goes);
    assert_int_equal(inject_load(inject), ERR_IO);
}

static void test_loads(void **state) {
    (void)state;
    tell("disk-error share 1 for 0 by 0 layer 0 seed 1");
    until(load_fails);
    anew();
    tell("oom share 1 for 0 by 0 layer 0 seed 1");
    until(memory_fails);
}

static bool slow_now(void) {
    uint64_t before_ns = clock_now_ns();
    inject_compute(inject, &(struct program){.kind = PROGRAM_EXPERT, .layer = 1});
    return clock_now_ns() - before_ns >= 30000000u;
}

static void test_computing_takes_longer(void **state) {
    (void)state;
    tell("slow share 1 for 0 by 30 layer 0 seed 1");
    until(slow_now);
}

/* In layer 3, and not before. The rule must have been taken: another one that came after it shows. */
static void compute_until_hit(const char *rule, int reached) {
    tell(rule);
    tell("drop share 1 for 0 by 0 layer 0 seed 1");
    for (int i = 0; i < TRIES && !message_dropped(); i++)
        usleep(1000);
    for (uint32_t layer = 0; layer < 3; layer++)
        inject_compute(inject, &(struct program){.kind = PROGRAM_EXPERT, .layer = layer});
    if (write(reached, "3", 1) != 1)
        _exit(103);
    inject_compute(inject, &(struct program){.kind = PROGRAM_EXPERT, .layer = 3});
    _exit(101); /* it was not hit */
}

static int in_child(const char *rule) {
    int status = 0, reached[2];
    char layer = 0;
    assert_int_equal(pipe(reached), 0);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        struct failure failure;
        inject = NULL; /* the parent's has no thread here */
        snprintf(directory + strlen(directory), sizeof directory - strlen(directory), "-child");
        if (mkdir(directory, 0700) != 0 || inject_open(&inject, directory, "expert-0", &bell, &failure) < 0)
            _exit(102);
        compute_until_hit(rule, reached[1]);
    }
    close(reached[1]);
    assert_int_equal(waitpid(child, &status, WUNTRACED), child);
    assert_int_equal(read(reached[0], &layer, 1), 1); /* it came to layer 3 */
    close(reached[0]);
    char path[128];
    snprintf(path, sizeof path, "%s-child/expert-0.faults", directory);
    unlink(path);
    snprintf(path, sizeof path, "%s-child", directory);
    rmdir(path);
    if (WIFSTOPPED(status)) {
        kill(child, SIGKILL);
        waitpid(child, NULL, 0);
    }
    return status;
}

static void test_ends_and_stops_in_a_layer(void **state) {
    (void)state;
    int status = in_child("kill share 1 for 0 by 0 layer 3 seed 1");
    assert_true(WIFSIGNALED(status));
    assert_int_equal(WTERMSIG(status), SIGKILL);
    status = in_child("stop share 1 for 0 by 0 layer 3 seed 1");
    assert_true(WIFSTOPPED(status));
    assert_int_equal(WSTOPSIG(status), SIGSTOP);
    status = in_child("kill share 1 for 0 by 0 layer 9 seed 1");
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 101);
}

#define TEST(function) cmocka_unit_test_setup_teardown(function, open_all, close_all)

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(test_nothing_strikes_without_a_rule),
        TEST(test_messages_and_frames),
        TEST(test_what_is_late_comes_once_and_whole),
        TEST(test_damage),
        TEST(test_a_share_is_a_share),
        TEST(test_rules_end),
        TEST(test_loads),
        TEST(test_computing_takes_longer),
        TEST(test_ends_and_stops_in_a_layer),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
