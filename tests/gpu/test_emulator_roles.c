/* Attention and experts as two steps with memory and graphs of their own, over an edge whose
 * transfers wait for each other as NCCL's do: the bits of one step, and what becomes of a step
 * whose experts die in its middle. */
#include "tests/gpu/step_rig.h"
#include "tests/support/cuda_emulator_streams.h"

enum { MICRO = 2 };

/* One side of an edge. */
struct side {
    void *requests, *replies; /* channels, the test's */
};

static size_t asked_bytes; /* of rows, by the last frame */

static int ask(void *edge, const struct edge_frame *frame, void *stream) {
    struct side *self = edge;
    asked_bytes = frame->rows_bytes;
    emulated_channel_send(self->requests, stream, frame->rows, frame->rows_bytes);
    return emulated_channel_send(self->requests, stream, frame->note, frame->note_bytes);
}
static int accept_request(void *edge, const struct edge_frame *frame, void *stream) {
    struct side *self = edge;
    emulated_channel_receive(self->requests, stream, frame->rows, frame->rows_bytes);
    return emulated_channel_receive(self->requests, stream, frame->note, frame->note_bytes);
}
static int answer(void *edge, const struct edge_frame *frame, void *stream) {
    struct side *self = edge;
    emulated_channel_send(self->replies, stream, frame->output, frame->output_bytes);
    return emulated_channel_send(self->replies, stream, frame->status, frame->status_bytes);
}
static int hear(void *edge, const struct edge_frame *frame, void *stream) {
    struct side *self = edge;
    emulated_channel_receive(self->replies, stream, frame->output, frame->output_bytes);
    return emulated_channel_receive(self->replies, stream, frame->status, frame->status_bytes);
}
static const struct edge_operations CHANNELS = {ask, hear, accept_request, answer, free};

struct roles {
    struct rig rig; /* its step is a whole one: what is right */
    struct step *attention, *experts;
    void *requests[MICRO], *replies[MICRO];
};

static struct edge edge_of(const struct roles *self, uint32_t micro) {
    struct side *side = malloc(sizeof *side);
    *side = (struct side){self->requests[micro], self->replies[micro]};
    return (struct edge){&CHANNELS, side};
}

static void roles_open(struct roles *self, enum dispatch_format dispatch) {
    struct failure failure = {0};
    rig_open(&self->rig, NULL, dispatch == DISPATCH_E4M3,
             (struct step_options){.rows = 3, .micro = MICRO, .groups = 1, .graphs = true});
    struct step_options options = self->rig.options;
    struct edge edges[MICRO];
    for (uint32_t i = 0; i < MICRO; i++) {
        self->requests[i] = emulated_channel_make();
        self->replies[i] = emulated_channel_make();
    }
    options.dispatch = dispatch; /* the whole step's rows are BF16 */
    options.edges = edges;
    options.role = STEP_ATTENTION;
    for (uint32_t i = 0; i < MICRO; i++)
        edges[i] = edge_of(self, i);
    assert_int_equal(step_open(&self->attention, &self->rig.weights.model, &options, &failure), 0);
    options.role = STEP_EXPERTS;
    for (uint32_t i = 0; i < MICRO; i++)
        edges[i] = edge_of(self, i);
    assert_int_equal(step_open(&self->experts, &self->rig.weights.model, &options, &failure), 0);
    const struct model_config *c = self->rig.plain.config;
    for (uint32_t l = 0; l < c->layers; l++)
        for (uint32_t e = 0; e < c->experts; e++) {
            struct expert_weights *weights = NULL;
            assert_int_equal(engine_expert_pack(self->rig.plain.model, self->rig.kernels, l, e,
                                                &weights, &failure),
                             0);
            assert_int_equal(step_expert_put(self->experts, 0, l, e, weights), 0);
            engine_expert_free(&weights);
            step_hold(self->experts, l, e, 0, e);
            step_place(self->attention, l, e, 0, e);
        }
}
static void roles_close(struct roles *self) {
    step_close(&self->attention);
    step_close(&self->experts);
    rig_close(&self->rig);
    for (uint32_t i = 0; i < MICRO; i++) {
        emulated_channel_free(self->requests[i]);
        emulated_channel_free(self->replies[i]);
    }
}

static void begin(struct roles *self, struct step *step, uint32_t position) {
    static struct step_row row[RIG_SEQUENCES];
    for (uint32_t i = 0; i < RIG_SEQUENCES; i++)
        row[i] = (struct step_row){rig_token(&self->rig, i, position), position, self->rig.pages[i],
                                   STEP_NO_BIAS};
    assert_int_equal(step_begin(step, row, RIG_SEQUENCES), 0);
}
static void serve(struct roles *self) {
    uint32_t rows, micro;
    step_announce(self->attention, &rows, &micro);
    assert_int_equal(step_serve(self->experts, rows, micro), 0);
}
/* What the whole step has for a position: rig.logits. */
static void right(struct roles *self, uint32_t position) {
    begin(self, self->rig.step, position);
    rig_end(&self->rig);
}

/* Logits of the attention's step against those; returns how many rows are lost. */
static uint32_t compare(struct roles *self) {
    struct step_result result;
    float *got = malloc(self->rig.vocabulary * sizeof *got);
    uint32_t lost = 0;
    assert_int_equal(step_end(self->attention, &result), 0);
    for (uint32_t r = 0; r < RIG_SEQUENCES; r++) {
        gpu_get(got, result.logits + (size_t)result.at[r] * self->rig.vocabulary,
                self->rig.vocabulary * sizeof *got);
        lost += result.lost[r] != 0;
        assert_true(result.lost[r] != 0 || rig_same(&self->rig, r, got));
    }
    free(got);
    assert_int_equal(step_end(self->experts, NULL), 0);
    return lost;
}

static void two_sides(enum dispatch_format dispatch, size_t row_bytes) {
    struct roles roles;
    roles_open(&roles, dispatch);
    for (uint32_t p = 0; p < 3; p++) { /* direct, captured, replayed */
        gpu_schedule(p + 1);
        begin(&roles, roles.attention, p);
        serve(&roles);
        right(&roles, p);
        assert_int_equal(compare(&roles), 0);
    }
    assert_int_equal(step_graphs(roles.attention), 1);
    assert_int_equal(step_graphs(roles.experts), 1);
    assert_int_equal(asked_bytes, 3 * row_bytes);
    roles_close(&roles);
}
static void test_two_sides_are_one_step(void **state) {
    (void)state;
    two_sides(DISPATCH_BF16, 2 * 128);
    two_sides(DISPATCH_E4M3, 128 + 4);
}

/* One micro-batch's edge is aborted after so many transfers of a captured step, this way or that
 * way first: the step ends, and exactly its rows are lost unless all was answered. Computed again
 * over a new edge they are what they always are. */
static void test_experts_die_in_the_middle(void **state) {
    (void)state;
    enum { ALL = 4 }; /* two layers, two things each */
    struct roles roles;
    roles_open(&roles, DISPATCH_BF16);
    for (uint32_t p = 0; p < 2; p++) {
        begin(&roles, roles.attention, p);
        serve(&roles);
        right(&roles, p);
        assert_int_equal(compare(&roles), 0);
    }
    right(&roles, 2);
    for (uint32_t i = 0; i <= 2 * ALL; i++) {
        const uint32_t requests = i < ALL ? i : ALL, replies = i < ALL ? ALL : i - ALL;
        gpu_schedule(i + 1);
        emulated_channel_abort_after(roles.requests[0], requests);
        emulated_channel_abort_after(roles.replies[0], replies);
        begin(&roles, roles.attention, 2);
        serve(&roles);
        assert_int_equal(compare(&roles), requests == ALL && replies == ALL ? 0 : 3);
        emulated_channel_abort_after(roles.requests[0], UINT64_MAX); /* a new edge */
        emulated_channel_abort_after(roles.replies[0], UINT64_MAX);
        begin(&roles, roles.attention, 2);
        serve(&roles);
        assert_int_equal(compare(&roles), 0);
    }
    roles_close(&roles);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_two_sides_are_one_step),
        cmocka_unit_test(test_experts_die_in_the_middle),
    };
    return cmocka_run_group_tests_name("emulated roles", tests, device_name, NULL);
}
