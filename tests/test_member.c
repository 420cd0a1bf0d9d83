/* Joining, heartbeats and epochs as every actor but the coordinator lives them, shown on a sampler,
 * which has nothing else to do. */
#include "tests/support/step.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
#include <cmocka.h>

#define MS 1000000u

static void open_sampler(struct stage *stage) {
    stage_init(stage, ROLE_SAMPLER);
    stage->actor = sampler_create(&stage->identity, &stage->settings, &stage->config);
    assert_non_null(stage->actor);
}

static void test_hello_is_repeated_until_welcome(void **state) {
    struct stage stage;
    open_sampler(&stage);
    stage_step(&stage, &(struct event){.kind = EVENT_START});
    const struct effect *connect = stage_take(&stage, EFFECT_CONNECT);
    assert_int_equal(connect->connect.id, ACTOR_COORDINATOR);
    assert_string_equal(connect->connect.control_address, "test://coordinator");
    const message *hello = stage_sent(&stage, TROUPE__ENVELOPE__BODY_HELLO);
    assert_string_equal(hello->hello->name, "under-test");
    assert_string_equal(hello->hello->numerics, "f32");
    assert_int_equal(hello->from, 0);
    assert_true(hello->from_incarnation == OWN_LIFE);
    uint64_t retry = stage.now_ns + (uint64_t)stage.settings.hello_retry_ms * MS;
    assert_true(actor_deadline(stage.actor) == retry);
    stage_timer(&stage, retry);
    assert_non_null(stage_sent(&stage, TROUPE__ENVELOPE__BODY_HELLO));

    stage_clear(&stage);
    stage_join(&stage, 40); /* START again, as after a second start: HELLO; then WELCOME */
    const message *heartbeat = stage_sent(&stage, TROUPE__ENVELOPE__BODY_HEARTBEAT);
    assert_int_equal(heartbeat->from, 40);
    assert_true(heartbeat->heartbeat->epoch == 0);
    assert_int_equal(heartbeat->heartbeat->memory_bytes, 5000); /* of the identity */
    uint64_t interval = (uint64_t)stage.settings.heartbeat_ms * MS;
    assert_true(actor_deadline(stage.actor) == stage.now_ns + interval);
    stage_timer(&stage, stage.now_ns + interval);
    assert_non_null(stage_sent(&stage, TROUPE__ENVELOPE__BODY_HEARTBEAT));
    assert_null(stage_sent(&stage, TROUPE__ENVELOPE__BODY_HELLO));
    stage_free(&stage);
}

static void refuse(struct stage *stage, uint64_t incarnation) {
    Troupe__Refused refused = TROUPE__REFUSED__INIT;
    refused.reason = "another model is served here";
    refused.incarnation = incarnation;
    message envelope = stage_envelope(ACTOR_COORDINATOR);
    envelope.body_case = TROUPE__ENVELOPE__BODY_REFUSED;
    envelope.refused = &refused;
    stage_message(stage, &envelope);
}

static void test_a_refusal_ends_the_actor(void **state) {
    struct stage stage;
    open_sampler(&stage);
    stage_step(&stage, &(struct event){.kind = EVENT_START});
    refuse(&stage, OWN_LIFE + 1); /* meant for the process that was here before */
    assert_int_equal(stage_count(&stage, EFFECT_EXIT), 0);
    refuse(&stage, OWN_LIFE);
    const struct effect *exit = stage_take(&stage, EFFECT_EXIT);
    assert_int_equal(exit->exit.code, 1);
    assert_string_equal(exit->exit.reason, "another model is served here");
    assert_true(stage_traced(&stage, "another model"));
    assert_true(actor_deadline(stage.actor) == NEVER);
    stage_free(&stage);
}

static void test_only_larger_epochs_are_adopted(void **state) {
    struct stage stage;
    open_sampler(&stage);
    stage_join(&stage, 40);
    stage_clear(&stage);
    stage_commit(&stage, (actor_id[]){20, 30, 50, 51}, 4, NULL, 0);
    assert_int_equal(stage_count(&stage, EFFECT_CONNECT), 2); /* to the attention actors */
    const struct effect *connect = stage_take(&stage, EFFECT_CONNECT);
    assert_int_equal(connect->connect.id, 50);
    assert_true(connect->connect.incarnation == life_of(50));
    assert_true(connect->connect.data);
    const message *heartbeat = stage_sent(&stage, TROUPE__ENVELOPE__BODY_HEARTBEAT);
    assert_true(heartbeat->heartbeat->epoch == 1); /* the acknowledgement comes at once */

    stage_clear(&stage);
    stage.epoch = 0; /* the same number, another content: late and ignored */
    stage_commit(&stage, (actor_id[]){20, 30}, 2, NULL, 0);
    assert_int_equal(stage_count(&stage, EFFECT_DISCONNECT), 0);

    stage_commit(&stage, (actor_id[]){20, 51, 52}, 3, NULL, 0);
    assert_int_equal(stage_take(&stage, EFFECT_DISCONNECT)->connect.id, 50);
    assert_int_equal(stage_take(&stage, EFFECT_CONNECT)->connect.id, 52);
    assert_int_equal(stage_count(&stage, EFFECT_CONNECT), 1);
    stage_free(&stage);
}

/* Two ids may be one process, before and after a restarted coordinator took it for a new one: what is closed
 * for the old id must not be what has just been opened for the new one. */
static void test_who_leaves_is_let_go_first(void **state) {
    struct stage stage;
    open_sampler(&stage);
    stage_join(&stage, 40);
    stage_commit(&stage, (actor_id[]){20, 51, 53}, 3, NULL, 0);
    stage_clear(&stage);
    stage_commit(&stage, (actor_id[]){20, 50, 52}, 3, NULL, 0);
    bool connected = false;
    for (uint32_t i = 0; i < stage.log.count; i++) {
        connected = connected || stage.log.list[i].kind == EFFECT_CONNECT;
        assert_false(connected && stage.log.list[i].kind == EFFECT_DISCONNECT);
    }
    assert_int_equal(stage_count(&stage, EFFECT_CONNECT), 2);
    assert_int_equal(stage_count(&stage, EFFECT_DISCONNECT), 2);
    stage_free(&stage);
}

static void test_an_epoch_without_the_actor_is_not_adopted(void **state) {
    struct stage stage;
    open_sampler(&stage);
    stage_join(&stage, 40);
    stage_clear(&stage);
    stage.id = 41; /* the epoch lists somebody else */
    stage_commit(&stage, (actor_id[]){50}, 1, NULL, 0);
    assert_int_equal(stage_count(&stage, EFFECT_CONNECT), 0);
    assert_true(stage_traced(&stage, "does not list"));
    stage_free(&stage);
}

static void test_strangers_are_ignored(void **state) {
    struct stage stage;
    open_sampler(&stage);
    stage_join(&stage, 40);
    stage_commit(&stage, (actor_id[]){50}, 1, NULL, 0);
    stage_clear(&stage);
    Troupe__Cancel cancel = TROUPE__CANCEL__INIT;
    message envelope = stage_envelope(51);
    envelope.body_case = TROUPE__ENVELOPE__BODY_CANCEL;
    envelope.cancel = &cancel;
    stage_message(&stage, &envelope);
    assert_true(stage_traced(&stage, "unknown actor 51"));
    stage_clear(&stage);
    envelope = stage_envelope(50);
    envelope.from_incarnation++;
    envelope.body_case = TROUPE__ENVELOPE__BODY_CANCEL;
    envelope.cancel = &cancel;
    stage_message(&stage, &envelope);
    assert_true(stage_traced(&stage, "unknown actor 50"));
    stage_clear(&stage);
    envelope =
        stage_envelope(ACTOR_COORDINATOR); /* another coordinator than the one that welcomed */
    envelope.from_incarnation++;
    Troupe__Shutdown shutdown = TROUPE__SHUTDOWN__INIT;
    envelope.body_case = TROUPE__ENVELOPE__BODY_SHUTDOWN;
    envelope.shutdown = &shutdown;
    stage_message(&stage, &envelope);
    assert_int_equal(stage_count(&stage, EFFECT_EXIT), 0);
    stage_free(&stage);
}

static void test_shutdown_ends_the_actor(void **state) {
    struct stage stage;
    open_sampler(&stage);
    stage_join(&stage, 40);
    Troupe__Shutdown shutdown = TROUPE__SHUTDOWN__INIT;
    shutdown.reason = "enough";
    message envelope = stage_envelope(ACTOR_COORDINATOR);
    envelope.body_case = TROUPE__ENVELOPE__BODY_SHUTDOWN;
    envelope.shutdown = &shutdown;
    stage_message(&stage, &envelope);
    assert_int_equal(stage_take(&stage, EFFECT_EXIT)->exit.code, 0);
    stage_clear(&stage);
    stage_commit(&stage, (actor_id[]){50}, 1, NULL, 0); /* nothing more happens */
    assert_int_equal(stage.log.count, 0);
    stage_free(&stage);

    open_sampler(&stage);
    stage_step(&stage, &(struct event){.kind = EVENT_SHUTDOWN});
    assert_int_equal(stage_take(&stage, EFFECT_EXIT)->exit.code, 0);
    stage_free(&stage);
}

/* ---- the memory of effects ---- */

static void test_effects_keep_their_memory(void **state) {
    struct effects effects;
    effects_init(&effects);
    uint8_t *first[2][50];
    for (int round = 0; round < 2; round++) {
        for (int i = 0; i < 50; i++) {
            size_t size = (size_t)1 << (i % 20);
            first[round][i] = effects_alloc(&effects, size);
            assert_int_equal((uintptr_t)first[round][i] % 64, 0);
            memset(first[round][i], i, size);
        }
        for (int i = 0; i < 50; i++) { /* nothing overlaps, nothing has moved */
            size_t size = (size_t)1 << (i % 20);
            assert_int_equal(first[round][i][0], i);
            assert_int_equal(first[round][i][size - 1], i);
        }
        effects_trace(&effects, TRACE_INFO, "%0*d", 3000, 7); /* cut to fit, not beyond */
        assert_int_equal(strlen(effects.list[effects.count - 1].trace.text), 1023);
        effects_reset(&effects);
        assert_int_equal(effects.count, 0);
    }
    /* the second round needed no new block: what fits in old blocks is taken from them */
    effects_reset(&effects);
    struct arena_block *before = effects.arena;
    for (int i = 0; i < 50; i++)
        effects_alloc(&effects, (size_t)1 << (i % 20));
    assert_ptr_equal(effects.arena, before);
    effects_free(&effects);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_hello_is_repeated_until_welcome),
        cmocka_unit_test(test_a_refusal_ends_the_actor),
        cmocka_unit_test(test_only_larger_epochs_are_adopted),
        cmocka_unit_test(test_who_leaves_is_let_go_first),
        cmocka_unit_test(test_an_epoch_without_the_actor_is_not_adopted),
        cmocka_unit_test(test_strangers_are_ignored),
        cmocka_unit_test(test_shutdown_ends_the_actor),
        cmocka_unit_test(test_effects_keep_their_memory),
    };
    return cmocka_run_group_tests_name("member", tests, NULL, NULL);
}
