/* The resident step inside the engine and the actors: an attention engine whose device takes whole
 * steps gives the logits of one that computes layer by layer by the device's table, byte for byte,
 * and a troupe with such an attention actor the same tokens. */
#include "engine/cuda/resident.h"
#include "kernels/cuda/table.h"
#include "simulator/world.h"
#include "tests/support/gpu.h"
#include "tests/support/one_process.h"

#include <stdio.h>
#include <string.h>

/* last: cmocka has a macro fail() */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>

enum { ROWS = 8, POSITIONS = 128, VOCABULARY = 264 };

static const char SHAPE[] =
    "{\"model_type\": \"deepseek_v3\", \"dtype\": \"fp8\", \"vocab_size\": 264, \"hidden_size\": "
    "128,"
    " \"intermediate_size\": 256, \"moe_intermediate_size\": 128, \"num_hidden_layers\": 2,"
    " \"first_k_dense_replace\": 1, \"num_attention_heads\": 2, \"n_shared_experts\": 1,"
    " \"n_routed_experts\": 8, \"num_experts_per_tok\": 2, \"n_group\": 4, \"topk_group\": 2,"
    " \"q_lora_rank\": 64, \"kv_lora_rank\": 128, \"qk_nope_head_dim\": 32,"
    " \"qk_rope_head_dim\": 32, \"v_head_dim\": 32, \"max_position_embeddings\": 2048}";

static struct one_process layers, whole;

/* The device, counted: what is compared must not be twice the same form. */
static struct resident_operations counted;
static uint32_t steps;

static void counted_step(void *self, const struct batch_row *row, uint32_t rows) {
    steps++;
    RESIDENT_CUDA.step(self, row, rows);
}

static void open_both(bool fp8, bool latent_fp8) {
    struct failure failure;
    one_process_use_latent_fp8(latent_fp8);
    const struct kernels *kernels = kernels_cuda("sm90", fp8, &failure);
    one_process_use_resident(NULL);
    assert_true(
        one_process_open_shape(&layers, SHAPE, 3, kernels, &PARALLEL_SERIAL, ROWS, POSITIONS));
    one_process_use_resident(&counted);
    assert_true(
        one_process_open_shape(&whole, SHAPE, 3, kernels, &PARALLEL_SERIAL, ROWS, POSITIONS));
    one_process_use_resident(NULL);
    one_process_use_latent_fp8(false);
}
static void close_both(void) {
    one_process_close(&layers);
    one_process_close(&whole);
}

struct piece {
    uint32_t sequence, first, rows;
    enum mla_form form;
};

/* The pieces as one batch, through one of the two. */
static void batch(struct one_process *model, const struct piece *piece, uint32_t pieces,
                  float *ret_logits) {
    struct batch_row row[ROWS];
    uint32_t select[ROWS], rows = 0;
    for (uint32_t i = 0; i < pieces; i++)
        for (uint32_t r = 0; r < piece[i].rows; r++, rows++) {
            const uint32_t position = piece[i].first + r;
            row[rows] = one_process_row(model, piece[i].sequence, position,
                                        (piece[i].sequence * 31 + position * 7) % VOCABULARY,
                                        piece[i].form);
            select[rows] = rows;
        }
    one_process_step(model, row, rows, select, rows, ret_logits);
}

/* Prompts in pieces beside generated rows, over the end of a page, and a replay: prompt and
 * generated rows of one sequence in one batch. */
static void test_same_logits(void **state) {
    (void)state;
    const struct {
        uint32_t pieces;
        struct piece piece[3];
    } batches[] = {
        {1, {{0, 0, 3, MLA_EXPANDED}}},
        {3, {{0, 3, 1, MLA_ABSORBED}, {1, 62, 3, MLA_EXPANDED}, {2, 0, 1, MLA_EXPANDED}}},
        {3, {{0, 4, 1, MLA_ABSORBED}, {1, 65, 2, MLA_EXPANDED}, {2, 1, 1, MLA_ABSORBED}}},
        {2, {{3, 0, 3, MLA_EXPANDED}, {3, 3, 2, MLA_ABSORBED}}},
    };
    static float expected[ROWS * VOCABULARY], got[ROWS * VOCABULARY];
    for (int turn = 0; turn < 3; turn++) { /* BF16, FP8, and with an FP8 cache */
        open_both(turn > 0, turn == 2);
        for (size_t i = 0; i < sizeof batches / sizeof *batches; i++) {
            uint32_t rows = 0;
            for (uint32_t p = 0; p < batches[i].pieces; p++)
                rows += batches[i].piece[p].rows;
            gpu_schedule(i + 1);
            batch(&layers, batches[i].piece, batches[i].pieces, expected);
            steps = 0;
            batch(&whole, batches[i].piece, batches[i].pieces, got);
            assert_int_equal(steps, 1);
            for (uint32_t r = 0; r < rows; r++)
                if (memcmp(expected + r * VOCABULARY, got + r * VOCABULARY,
                           VOCABULARY * sizeof(float)) != 0)
                    fail_msg("batch %zu, row %u: other bits in whole steps", i, r);
        }
        close_both();
    }
}

/* Versions of the routing bias come and go by pointer. */
static void test_biases(void **state) {
    (void)state;
    const struct piece piece[2] = {{0, 0, 1, MLA_ABSORBED}, {1, 0, 1, MLA_EXPANDED}};
    static float expected[ROWS * VOCABULARY], got[ROWS * VOCABULARY], plain[ROWS * VOCABULARY];
    float delta[2 * 8];
    open_both(false, false);
    batch(&layers, piece, 2, plain);
    for (uint32_t turn = 0; turn < 2; turn++) {
        for (uint32_t i = 0; i < 16; i++) /* another version at the same place */
            delta[i] = (i + turn) % 3 == 0 ? 0.5f : -0.25f;
        layers.bias[turn] = whole.bias[turn] = delta;
        batch(&layers, piece, 2, expected);
        batch(&whole, piece, 2, got);
        assert_memory_equal(expected, got, 2 * VOCABULARY * sizeof(float));
        assert_memory_not_equal(expected, plain, 2 * VOCABULARY * sizeof(float));
    }
    close_both();
}

/* ---- A troupe ---- */

enum { REQUESTS = 2, TOKENS = 3 };

static void run_world(const struct kernels *kernels, bool resident,
                      const struct probe_request *requests, uint32_t ret_token[REQUESTS][TOKENS]) {
    struct failure failure = {0};
    struct world *world;
    struct world_options options = {.seed = 1,
                                    .model = layers.model,
                                    .kernels = kernels,
                                    .resident = &counted,
                                    .parallel = PARALLEL_SERIAL,
                                    .attention = 1,
                                    .experts = 1,
                                    .samplers = 1,
                                    .probes = requests,
                                    .probe_count = REQUESTS,
                                    .delay_min_ns = 100000,
                                    .delay_max_ns = 100000,
                                    .frame_delay_min_ns = 20000,
                                    .frame_delay_max_ns = 20000,
                                    .compute_ns = 500000};
    settings_default(&options.settings);
    options.settings.kv_cache_tokens = 512;
    options.settings.batch_tokens = ROWS;
    options.settings.prefill_chunk = 3;
    options.settings.join_wait_ms = 100;
    options.settings.mtp_steps = 0;
    options.settings.resident = resident;
    if (world_open(&world, &options, &failure) != 0)
        fail_msg("world: %s", failure.text);
    for (uint32_t step = 0; !probe_done(world_actor(world, ROLE_GATEWAY, 0)); step++)
        assert_true(step < 100000 && world_step(world));
    for (uint32_t r = 0; r < REQUESTS; r++) {
        const struct probe_answer *answer = probe_answer(world_actor(world, ROLE_GATEWAY, 0), r);
        assert_int_equal(answer->error, 0);
        assert_int_equal(answer->tokens, TOKENS);
        memcpy(ret_token[r], answer->token, sizeof ret_token[r]);
    }
    world_close(&world);
}

static void test_same_tokens_in_a_troupe(void **state) {
    (void)state;
    static const uint32_t prompt[5] = {9, 77, 130, 4, 250};
    const struct probe_request requests[REQUESTS] = {
        {.token = prompt,
         .tokens = 5,
         .max_tokens = TOKENS,
         .temperature = 0.9f,
         .top_p = 1,
         .seed = 4},
        {.token = prompt + 2, .tokens = 2, .max_tokens = TOKENS, .temperature = 0, .top_p = 1}};
    uint32_t expected[REQUESTS][TOKENS], got[REQUESTS][TOKENS];
    struct failure failure;
    const struct kernels *kernels = kernels_cuda("sm90", true, &failure);
    open_both(true, false);
    steps = 0;
    run_world(kernels, false, requests, expected);
    assert_int_equal(steps, 0);
    run_world(kernels, true, requests, got);
    assert_true(steps >= TOKENS);
    assert_memory_equal(expected, got, sizeof expected);
    close_both();
}

static void test_says_what_it_has_not(void **state) {
    (void)state;
    struct failure failure = {0};
    struct engine *engine = NULL;
    struct one_process with_mtp;
    char shape[sizeof SHAPE + 64];
    snprintf(shape, sizeof shape, "%.*s, \"num_nextn_predict_layers\": 1}", (int)sizeof SHAPE - 2,
             SHAPE);
    const struct kernels *kernels = kernels_cuda("sm90", false, &failure);
    assert_true(one_process_open_shape(&with_mtp, shape, 3, kernels, &PARALLEL_SERIAL, 2, 64));
    const struct engine_options options = {.role = ENGINE_ATTENTION,
                                           .kernels = kernels,
                                           .parallel = PARALLEL_SERIAL,
                                           .batch_rows = 2,
                                           .batch_slots = 1,
                                           .pages = 2,
                                           .mtp_steps = 1,
                                           .resident = &RESIDENT_CUDA};
    assert_int_equal(engine_open(&engine, with_mtp.model, &options, &failure), ERR_UNSUPPORTED);
    assert_non_null(strstr(failure.text, "--mtp-steps 0"));
    assert_null(engine);
    one_process_close(&with_mtp);
}

static int open_device(void **state) {
    char name[256];
    (void)state;
    numerics_enter();
    counted = RESIDENT_CUDA;
    counted.step = counted_step;
    if (!gpu_open(name, sizeof name)) {
        print_message("SKIP: a Hopper card is needed, found %s\n", name);
        return -1;
    }
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_same_logits),
        cmocka_unit_test(test_biases),
        cmocka_unit_test(test_same_tokens_in_a_troupe),
        cmocka_unit_test(test_says_what_it_has_not),
    };
    return cmocka_run_group_tests_name("cuda resident", tests, open_device, NULL);
}
