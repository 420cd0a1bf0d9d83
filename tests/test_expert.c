/* The expert actor by hand: orders of the coordinator in any order, and rows of attention actors.
 */
#include "tests/support/random.h"
#include "tests/support/step.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#define ATTENTION 50

static void open_stage(struct stage *stage) {
    stage_init(stage, ROLE_EXPERT);
    stage->actor = expert_create(&stage->identity, &stage->settings, &stage->config, 0);
    assert_non_null(stage->actor);
    stage_join(stage, 30);
    stage_commit(stage, (actor_id[]){20, 40, 50, 51}, 4, NULL, 0);
    stage_clear(stage);
}

static const char *described(struct stage *stage) {
    return stage->actor->class->describe(stage->actor);
}

static void assert_described(struct stage *stage, const char *text) {
    if (strstr(described(stage), text) == NULL)
        fail_msg("\"%s\" is not in \"%s\"", text, described(stage));
}

/* ---- orders ---- */

/* Pairs as layer * 10 + expert. */
static void split(const uint32_t *pair, uint32_t count, uint32_t *layer, uint32_t *expert) {
    for (uint32_t i = 0; i < count; i++) {
        layer[i] = pair[i] / 10;
        expert[i] = pair[i] % 10;
    }
}

static void assign(struct stage *stage, uint64_t operation, const uint32_t *pair, uint32_t count) {
    uint32_t layer[32], expert[32];
    split(pair, count, layer, expert);
    Troupe__Assign assign = TROUPE__ASSIGN__INIT;
    assign.operation = operation;
    assign.n_layer = assign.n_expert = count;
    assign.layer = layer;
    assign.expert = expert;
    message envelope = stage_envelope(ACTOR_COORDINATOR);
    envelope.body_case = TROUPE__ENVELOPE__BODY_ASSIGN;
    envelope.assign = &assign;
    stage_message(stage, &envelope);
}

static void release(struct stage *stage, uint64_t operation, const uint32_t *pair, uint32_t count) {
    uint32_t layer[32], expert[32];
    split(pair, count, layer, expert);
    Troupe__Release release = TROUPE__RELEASE__INIT;
    release.operation = operation;
    release.n_layer = release.n_expert = count;
    release.layer = layer;
    release.expert = expert;
    message envelope = stage_envelope(ACTOR_COORDINATOR);
    envelope.body_case = TROUPE__ENVELOPE__BODY_RELEASE;
    envelope.release = &release;
    stage_message(stage, &envelope);
}

static void loaded(struct stage *stage, const struct effect *load, int error) {
    struct event event = {.kind = EVENT_LOADED};
    event.loaded.layer = load->load.layer;
    event.loaded.expert = load->load.expert;
    event.loaded.operation = load->load.operation;
    event.loaded.error = error;
    event.loaded.text = error < 0 ? "no memory for an expert" : NULL;
    event.loaded.bytes = 2048;
    stage_step(stage, &event);
}

static struct effect next_load(struct stage *stage) {
    const struct effect *effect = stage_take(stage, EFFECT_LOAD);
    assert_non_null(effect);
    return *effect;
}

/* Loads everything that is asked for. */
static void load_all(struct stage *stage) {
    const struct effect *effect;
    while ((effect = stage_take(stage, EFFECT_LOAD)) != NULL) {
        struct effect load = *effect;
        loaded(stage, &load, 0);
    }
}

static void assert_ready(struct stage *stage, uint64_t operation, bool ok) {
    const message *envelope = stage_sent(stage, TROUPE__ENVELOPE__BODY_READY);
    assert_non_null(envelope);
    assert_true(envelope->ready->operation == operation);
    assert_int_equal(envelope->ready->ok, ok);
}

static void test_assigned_experts_are_loaded_few_at_a_time(void **state) {
    struct stage stage;
    open_stage(&stage);
    assign(&stage, 1, (uint32_t[]){10, 11, 12, 13, 20, 21}, 6);
    assert_int_equal(stage_count(&stage, EFFECT_LOAD), 4);
    struct effect load = next_load(&stage);
    assert_int_equal(load.load.layer, 1);
    assert_int_equal(load.load.expert, 0);
    loaded(&stage, &load, 0);
    assert_int_equal(stage_count(&stage, EFFECT_LOAD), 5);
    assert_null(stage_sent(&stage, TROUPE__ENVELOPE__BODY_READY));
    load_all(&stage);
    assert_ready(&stage, 1, true);
    assert_described(&stage, "held=6 loading=0 wanted=0");
    assign(&stage, 1, (uint32_t[]){10, 11, 12, 13, 20, 21}, 6); /* said again: READY again */
    assert_ready(&stage, 1, true);
    assert_int_equal(stage_count(&stage, EFFECT_LOAD), 6);
    assign(&stage, 2, (uint32_t[]){10, 22}, 2); /* only what is missing; nothing is dropped */
    load_all(&stage);
    assert_ready(&stage, 2, true);
    assert_described(&stage, "held=7");
    assert_int_equal(stage_count(&stage, EFFECT_UNLOAD), 0);
    assign(&stage, 3, NULL, 0);
    assert_ready(&stage, 3, true);
    stage_free(&stage);
}

static void test_a_failed_load_fails_for_that_expert_only(void **state) {
    struct stage stage;
    open_stage(&stage);
    assign(&stage, 1, (uint32_t[]){10, 11, 12, 13, 20, 21}, 6);
    struct effect load = next_load(&stage);
    loaded(&stage, &load, ERR_NO_MEMORY);
    assert_null(stage_sent(&stage, TROUPE__ENVELOPE__BODY_READY)); /* the others are still to come */
    load_all(&stage);
    const message *envelope = stage_sent(&stage, TROUPE__ENVELOPE__BODY_READY);
    assert_false(envelope->ready->ok);
    assert_string_equal(envelope->ready->error, "no memory for an expert");
    assert_int_equal(envelope->ready->n_layer, 1);
    assert_int_equal(envelope->ready->layer[0], 1);
    assert_int_equal(envelope->ready->expert[0], 0);
    assert_described(&stage, "held=5 loading=0 wanted=0");
    assign(&stage, 1, (uint32_t[]){10, 11, 12, 13, 20, 21}, 6);
    assert_ready(&stage, 1, false);
    assign(&stage, 2, (uint32_t[]){10}, 1); /* a new operation may succeed */
    load_all(&stage);
    assert_ready(&stage, 2, true);
    assign(&stage, 3, (uint32_t[]){10, 5}, 2); /* layer 0 is dense */
    assert_ready(&stage, 3, false);
    assign(&stage, 4, (uint32_t[]){14}, 1);
    assert_ready(&stage, 4, false);
    stage_free(&stage);
}

static void test_released_experts_are_dropped(void **state) {
    struct stage stage;
    open_stage(&stage);
    assign(&stage, 1, (uint32_t[]){10, 11}, 2);
    load_all(&stage);
    release(&stage, 2, (uint32_t[]){10, 13}, 2);
    assert_int_equal(stage_count(&stage, EFFECT_UNLOAD), 1);
    const struct effect *unload = stage_take(&stage, EFFECT_UNLOAD);
    assert_int_equal(unload->load.layer, 1);
    assert_int_equal(unload->load.expert, 0);
    assert_described(&stage, "held=1 ");
    assert_ready(&stage, 1, true);
    assert_ready(&stage, 2, true);
    assign(&stage, 1, (uint32_t[]){10, 11}, 2); /* late: ignored */
    assert_int_equal(stage_count(&stage, EFFECT_LOAD), 2);
    assert_null(stage_sent(&stage, TROUPE__ENVELOPE__BODY_READY));
    release(&stage, 2, (uint32_t[]){10, 13}, 2);
    assert_ready(&stage, 2, true);
    stage_free(&stage);
}

static void test_a_release_overtakes_a_load(void **state) {
    struct stage stage;
    open_stage(&stage);
    assign(&stage, 1, (uint32_t[]){10, 11}, 2);
    struct effect first = next_load(&stage), second = next_load(&stage);
    release(&stage, 2, (uint32_t[]){10}, 1);
    assert_null(stage_sent(&stage, TROUPE__ENVELOPE__BODY_READY)); /* 11 is still to come */
    loaded(&stage, &first, 0);
    assert_int_equal(stage_count(&stage, EFFECT_UNLOAD), 1);
    loaded(&stage, &second, 0);
    assert_ready(&stage, 2, true);
    assert_described(&stage, "held=1 loading=0");

    assign(&stage, 3, (uint32_t[]){20}, 1); /* wanted, not wanted, wanted again */
    struct effect third = next_load(&stage);
    release(&stage, 4, (uint32_t[]){20}, 1);
    assign(&stage, 5, (uint32_t[]){20}, 1);
    loaded(&stage, &third, 0);
    assert_described(&stage, "held=2 loading=0");
    assert_int_equal(stage_count(&stage, EFFECT_UNLOAD), 1);
    stage_free(&stage);
}

static void test_only_the_coordinator_gives_orders(void **state) {
    struct stage stage;
    open_stage(&stage);
    Troupe__Assign body = TROUPE__ASSIGN__INIT;
    body.operation = 1;
    message envelope = stage_envelope(ATTENTION);
    envelope.body_case = TROUPE__ENVELOPE__BODY_ASSIGN;
    envelope.assign = &body;
    stage_message(&stage, &envelope);
    assert_null(stage_sent(&stage, TROUPE__ENVELOPE__BODY_READY));
    assert_true(stage_traced(&stage, "ignored"));
    stage_free(&stage);
}

/* ---- rows ---- */

struct dispatch {
    struct frame_header header;
    struct frame_group group[4];
    uint32_t item_row[8];
};

/* Two rows; the first to expert `a` and `b`, the second to `b`. */
static struct dispatch make_dispatch(uint32_t layer, uint32_t a, uint32_t b) {
    return (struct dispatch){
        .header = {.kind = FRAME_DISPATCH,
                   .from = ATTENTION,
                   .to = 30,
                   .from_incarnation = life_of(ATTENTION),
                   .to_incarnation = OWN_LIFE,
                   .epoch = 1,
                   .batch = 17,
                   .layer = layer,
                   .attempt = 2,
                   .part = 3,
                   .rows = 2,
                   .items = 3,
                   .groups = 2,
                   .row_bytes = 32},
        .group = {{a, 1}, {b, 2}},
        .item_row = {0, 0, 1},
    };
}

static void send_dispatch(struct stage *stage, const struct dispatch *dispatch) {
    const struct frame_header *header = &dispatch->header;
    size_t rows = frame_rows_offset(FRAME_DISPATCH, header->rows, header->items, header->groups) -
                  sizeof *header;
    size_t size = rows + (size_t)header->rows * header->row_bytes;
    uint8_t *payload = calloc(1, size);
    assert_non_null(payload);
    size_t groups = header->groups * sizeof(struct frame_group);
    memcpy(payload, dispatch->group, groups);
    memcpy(payload + groups, dispatch->item_row, header->items * sizeof(uint32_t));
    stage_frame(stage, header, payload, size);
    free(payload);
}

static void hold_layer_1(struct stage *stage) {
    assign(stage, 1, (uint32_t[]){10, 11}, 2);
    load_all(stage);
    stage_clear(stage);
}

static void test_rows_are_computed_and_answered(void **state) {
    struct stage stage;
    open_stage(&stage);
    hold_layer_1(&stage);
    struct dispatch dispatch = make_dispatch(1, 0, 1);
    send_dispatch(&stage, &dispatch);
    const struct effect *compute = stage_take(&stage, EFFECT_COMPUTE);
    assert_int_equal(compute->compute.kind, PROGRAM_EXPERT);
    assert_int_equal(compute->compute.layer, 1);
    assert_int_equal(compute->compute.items, 3);
    assert_int_equal(compute->compute.groups, 2);
    const struct effect *transfer = stage_take(&stage, EFFECT_TRANSFER);
    const struct frame_header *header = &transfer->transfer.header;
    assert_int_equal(header->kind, FRAME_COMBINE);
    assert_int_equal(header->from, 30);
    assert_int_equal(header->to, ATTENTION);
    assert_true(header->to_incarnation == life_of(ATTENTION));
    assert_true(header->batch == 17);
    assert_int_equal(header->layer, 1);
    assert_int_equal(header->attempt, 2);
    assert_int_equal(header->part, 3);
    assert_int_equal(header->items, 3);
    assert_int_equal(transfer->transfer.region, REGION_EXPERT_OUTPUT);
    assert_int_equal(transfer->transfer.count, 3);
    assert_described(&stage, "running=0 frames=1 rows=3");
    stage_free(&stage);
}

static void test_rows_of_experts_held_elsewhere_are_moved(void **state) {
    struct stage stage;
    open_stage(&stage);
    hold_layer_1(&stage);
    const uint32_t absent[][3] = {{1, 0, 2}, {2, 0, 1}, {0, 0, 1}, {1, 0, 900}, {200, 0, 1}};
    for (size_t i = 0; i < sizeof absent / sizeof *absent; i++) {
        struct dispatch dispatch = make_dispatch(absent[i][0], absent[i][1], absent[i][2]);
        stage_clear(&stage);
        send_dispatch(&stage, &dispatch);
        assert_int_equal(stage_count(&stage, EFFECT_COMPUTE), 0);
        const struct frame_header *header = &stage_take(&stage, EFFECT_TRANSFER)->transfer.header;
        assert_int_equal(header->kind, FRAME_MOVED);
        assert_int_equal(header->detail, i == 0 || i == 3 ? absent[i][2] : absent[i][1]);
        assert_int_equal(header->part, 3);
        assert_int_equal(header->attempt, 2);
    }
    stage_free(&stage);
}

static void assert_dropped(struct stage *stage, const struct dispatch *dispatch, const char *why) {
    stage_clear(stage);
    send_dispatch(stage, dispatch);
    assert_int_equal(stage_count(stage, EFFECT_COMPUTE), 0);
    assert_int_equal(stage_count(stage, EFFECT_TRANSFER), 0);
    assert_true(stage_traced(stage, why));
}

static void test_frames_that_do_not_fit_are_dropped(void **state) {
    struct stage stage;
    open_stage(&stage);
    hold_layer_1(&stage);
    struct dispatch dispatch = make_dispatch(1, 0, 1);
    dispatch.header.from_incarnation++;
    assert_dropped(&stage, &dispatch, "unknown");
    dispatch = make_dispatch(1, 0, 1);
    dispatch.header.to_incarnation++;
    assert_dropped(&stage, &dispatch, "unknown");
    dispatch = make_dispatch(1, 0, 1);
    dispatch.header.to = 31;
    assert_dropped(&stage, &dispatch, "unknown");
    dispatch = make_dispatch(1, 0, 1);
    dispatch.header.from = 40; /* a sampler */
    dispatch.header.from_incarnation = life_of(40);
    assert_dropped(&stage, &dispatch, "unknown");
    dispatch = make_dispatch(1, 0, 1);
    dispatch.header.row_bytes = 16;
    assert_dropped(&stage, &dispatch, "another size");
    stage_free(&stage);
}

/* E4M3 rows are for the fp8 profile and models that are stored so. */
static void test_rows_in_e4m3(void **state) {
    for (int i = 0; i < 4; i++) {
        struct stage stage;
        stage_init(&stage, ROLE_EXPERT);
        stage.identity.numerics = i & 1 ? "fp8-sm90" : "bf16";
        stage.config.fp8 = (i & 2) != 0;
        stage.actor = expert_create(&stage.identity, &stage.settings, &stage.config, 0);
        stage_join(&stage, 30);
        stage_commit(&stage, (actor_id[]){20, 40, 50}, 3, NULL, 0);
        hold_layer_1(&stage);
        struct dispatch dispatch = make_dispatch(1, 0, 1);
        dispatch.header.row_bytes = 16;
        stage_clear(&stage);
        send_dispatch(&stage, &dispatch);
        assert_false(stage_take(&stage, EFFECT_COMPUTE)->compute.e4m3);
        dispatch.header.format = FRAME_ROWS_E4M3;
        dispatch.header.row_bytes = 132;
        if (i < 3) {
            assert_dropped(&stage, &dispatch, "E4M3, which this profile or model does not take");
        } else {
            stage_clear(&stage);
            send_dispatch(&stage, &dispatch);
            assert_true(stage_take(&stage, EFFECT_COMPUTE)->compute.e4m3);
            dispatch.header.row_bytes = 264;
            assert_dropped(&stage, &dispatch, "another size");
        }
        stage_free(&stage);
    }
}

/* frame_rows bounds answers: whole experts as long as they fit, then parts of one. */
static void test_long_frames_are_answered_in_pieces(void **state) {
    static const struct {
        uint32_t frame_rows, pieces, items[3];
    } CASES[] = {{3, 1, {3}}, {2, 2, {1, 2}}, {1, 3, {1, 1, 1}}};
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        struct stage stage;
        stage_init(&stage, ROLE_EXPERT);
        stage.settings.frame_rows = CASES[i].frame_rows;
        stage.actor = expert_create(&stage.identity, &stage.settings, &stage.config, 0);
        stage_join(&stage, 30);
        stage_commit(&stage, (actor_id[]){20, 40, 50}, 3, NULL, 0);
        hold_layer_1(&stage);
        struct dispatch dispatch = make_dispatch(1, 0, 1);
        send_dispatch(&stage, &dispatch);
        for (uint32_t piece = 0, first = 0; piece < CASES[i].pieces; piece++) {
            const uint32_t items = CASES[i].items[piece];
            const struct program program = stage_take(&stage, EFFECT_COMPUTE)->compute;
            assert_int_equal(program.items, items);
            assert_int_equal(program.groups, items == 3 ? 2 : 1);
            assert_int_equal(program.rows, 2);
            assert_int_equal(program.answer_to, ATTENTION);
            const struct effect *transfer = stage_take(&stage, EFFECT_TRANSFER);
            assert_int_equal(transfer->transfer.header.kind, FRAME_COMBINE);
            assert_int_equal(transfer->transfer.header.part, 3);
            assert_int_equal(transfer->transfer.header.detail, first);
            assert_int_equal(transfer->transfer.header.items, items);
            assert_int_equal(transfer->transfer.count, items);
            assert_int_equal(transfer->transfer.more, piece + 1 < CASES[i].pieces);
            first += items;
        }
        assert_null(stage_take(&stage, EFFECT_COMPUTE));
        assert_null(stage_take(&stage, EFFECT_TRANSFER));
        assert_described(&stage, "running=0 frames=1 rows=3");
        stage_free(&stage);
    }
}

static void test_frames_that_arrive_while_others_compute(void **state) {
    struct stage stage;
    open_stage(&stage);
    hold_layer_1(&stage);
    stage.hold_programs = true;
    for (uint32_t i = 0; i < 65; i++) {
        struct dispatch dispatch = make_dispatch(1, 0, 1);
        dispatch.header.part = i;
        send_dispatch(&stage, &dispatch);
    }
    assert_described(&stage, "running=64"); /* the last one was one too many */
    stage_compute(&stage);
    for (uint32_t i = 0; i < 64; i++)
        assert_int_equal(stage_take(&stage, EFFECT_TRANSFER)->transfer.header.part, i);
    assert_null(stage_take(&stage, EFFECT_TRANSFER));
    stage_free(&stage);
}

/* ---- any order of orders ---- */

/* The coordinator's newest order decides, whatever came twice, late or not at all. */
static void test_orders_in_any_order(void **state) {
    for (uint64_t seed = 1; seed <= 50; seed++) {
        struct stage stage;
        open_stage(&stage);
        uint64_t random = seed;
        struct effect pending[64];
        uint32_t pendings = 0;
        for (uint64_t i = 0; i < 60; i++) {
            uint32_t pair[8], count = 0;
            for (uint32_t p = 0; p < 8; p++)
                if (random_below(&random, 2) == 0)
                    pair[count++] = (1 + p / 4) * 10 + p % 4;
            uint64_t operation = i + random_below(&random, 6); /* some late, some twice */
            uint32_t what = random_below(&random, 4);
            if (what == 0)
                assign(&stage, operation, pair, count);
            else if (what == 1)
                release(&stage, operation, pair, count);
            else if (pendings > 0) {
                uint32_t place = random_below(&random, pendings);
                loaded(&stage, &pending[place], random_below(&random, 8) == 0 ? ERR_IO : 0);
                pending[place] = pending[--pendings];
            }
            const struct effect *effect;
            while ((effect = stage_take(&stage, EFFECT_LOAD)) != NULL)
                pending[pendings++] = *effect;
            assert_true(pendings <= 4);
        }
        release(&stage, 1000, (uint32_t[]){10, 11, 12, 13, 20, 21, 22, 23}, 8);
        while (pendings > 0)
            loaded(&stage, &pending[--pendings], 0);
        if (strstr(described(&stage), "held=0 loading=0 wanted=0") == NULL)
            fail_msg("seed %llu: %s", (unsigned long long)seed, described(&stage));
        assign(&stage, 1001, (uint32_t[]){10, 23}, 2);
        load_all(&stage);
        assert_described(&stage, "held=2 loading=0 wanted=0");
        stage_free(&stage);
    }
    print_message("seeds 1 to 50\n");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_assigned_experts_are_loaded_few_at_a_time),
        cmocka_unit_test(test_a_failed_load_fails_for_that_expert_only),
        cmocka_unit_test(test_released_experts_are_dropped),
        cmocka_unit_test(test_a_release_overtakes_a_load),
        cmocka_unit_test(test_only_the_coordinator_gives_orders),
        cmocka_unit_test(test_rows_are_computed_and_answered),
        cmocka_unit_test(test_rows_of_experts_held_elsewhere_are_moved),
        cmocka_unit_test(test_frames_that_do_not_fit_are_dropped),
        cmocka_unit_test(test_rows_in_e4m3),
        cmocka_unit_test(test_long_frames_are_answered_in_pieces),
        cmocka_unit_test(test_frames_that_arrive_while_others_compute),
        cmocka_unit_test(test_orders_in_any_order),
    };
    return cmocka_run_group_tests_name("expert", tests, NULL, NULL);
}
