/* Whole clusters on virtual time with real kernels on a tiny model: whatever the network does to control messages, and whoever dies, the
 * sequences end and their tokens are those of the quiet run. Every run is named by its seed. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "simulator/random.h"
#include "simulator/world.h"
#include "tests/support/model_files.h"

#include <cmocka.h>

#define MODEL     "tests/golden/v3-fp8"
#define SEQUENCES 6
#define STEPS_MAX 2000000
#define MS        UINT64_C(1000000)
#define QUIET_RUN_NS (140 * MS)

static struct model_files files;
static struct model *model;
static const struct kernels *kernels;
static uint32_t prompts[SEQUENCES][200];
static struct probe_request requests[SEQUENCES];
static uint32_t quiet[SEQUENCES][64];

/* Prompts of mixed lengths (over a page, in chunks), greedy and drawn. */
static void make_requests(void) {
    struct random random = {4217};
    uint32_t vocabulary = model_config(model)->vocabulary;
    for (uint32_t s = 0; s < SEQUENCES; s++) {
        uint32_t tokens = s == 0 ? 1 : s == 1 ? 130 : (uint32_t)random_between(&random, 2, 90);
        for (uint32_t i = 0; i < tokens; i++)
            prompts[s][i] = (uint32_t)random_between(&random, 3, vocabulary - 1);
        requests[s] = (struct probe_request){.token = prompts[s],
                                             .tokens = tokens,
                                             .max_tokens = 4 + 3 * s,
                                             .logprobs = true,
                                             .temperature = s % 2 == 0 ? 0.0f : 0.9f,
                                             .top_p = 0.95f,
                                             .seed = 100 + s};
    }
}

static struct world_options calm(uint64_t seed) {
    struct world_options options = {.seed = seed,
                                    .model = model,
                                    .kernels = kernels,
                                    .parallel = PARALLEL_SERIAL,
                                    .attention = 1,
                                    .experts = 3,
                                    .samplers = 1,
                                    .probes = requests,
                                    .probe_count = SEQUENCES,
                                    .delay_min_ns = 100000,
                                    .delay_max_ns = 100000,
                                    .frame_delay_min_ns = 20000,
                                    .frame_delay_max_ns = 20000,
                                    .compute_ns = 500000};
    settings_default(&options.settings);
    options.settings.kv_cache_tokens = 2048;
    options.settings.batch_tokens = 64;
    options.settings.prefill_chunk = 32;
    options.settings.join_wait_ms = 500;
    options.settings.row_deadline_ms = 300;
    options.settings.poll_ms = 200;
    options.settings.heartbeat_ms = 50;
    options.settings.heartbeat_misses = 6;
    return options;
}

struct kill {
    enum role role;
    uint32_t index;
    uint64_t kill_ns, restart_ns; /* 0: none */
};

/* Runs until all sequences are answered; false if that does not happen in 120 s of virtual time. */
static bool run(struct world *world, struct kill fault) {
    for (uint32_t step = 0; step < STEPS_MAX; step++) {
        if (fault.kill_ns != 0 && world_now_ns(world) >= fault.kill_ns) {
            world_kill(world, fault.role, fault.index);
            fault.kill_ns = 0;
        }
        if (fault.kill_ns == 0 && fault.restart_ns != 0 && world_now_ns(world) >= fault.restart_ns) {
            world_restart(world, fault.role, fault.index);
            fault.restart_ns = 0;
        }
        if (probe_done(world_actor(world, ROLE_GATEWAY, 0)))
            return true;
        if (!world_step(world) || world_now_ns(world) > 120000 * MS)
            break;
    }
    fprintf(stderr, "not finished at %.3f s\n", (double)world_now_ns(world) / 1e9);
    for (uint32_t role = ROLE_COORDINATOR; role <= ROLE_SAMPLER; role++)
        for (uint32_t i = 0; i < 8; i++) {
            struct actor *actor = world_actor(world, role, i);
            if (actor != NULL)
                fprintf(stderr, "  %s-%u: %s\n", role_name(role), i, actor->class->describe(actor));
        }
    return false;
}

static bool same_tokens(struct world *world) {
    for (uint32_t s = 0; s < SEQUENCES; s++) {
        const struct probe_answer *answer = probe_answer(world_actor(world, ROLE_GATEWAY, 0), s);
        if (answer->error != 0 || answer->tokens != requests[s].max_tokens ||
            memcmp(answer->token, quiet[s], answer->tokens * sizeof *answer->token) != 0) {
            fprintf(stderr, "sequence %u: error %d, %u tokens, or other tokens than in the quiet run\n",
                    s, answer->error, answer->tokens);
            return false;
        }
    }
    return true;
}

static void expect_quiet_tokens(const char *what, const struct world_options *options,
                                struct kill fault) {
    struct world *world;
    struct failure failure;
    assert_int_equal(world_open(&world, options, &failure), 0);
    bool finished = run(world, fault);
    if (fault.kill_ns != 0)
        assert_true(world_now_ns(world) > fault.kill_ns);
    bool same = finished && same_tokens(world);
    world_close(&world);
    if (!same)
        fail_msg("%s: seed %llu", what, (unsigned long long)options->seed);
}

static void test_quiet(void **state) {
    (void)state;
    struct world_options options = calm(1);
    struct world *world;
    struct failure failure;
    assert_int_equal(world_open(&world, &options, &failure), 0);
    assert_true(run(world, (struct kill){0}));
    assert_true(world_now_ns(world) > QUIET_RUN_NS); /* so that faults come while it runs */
    for (uint32_t s = 0; s < SEQUENCES; s++) {
        const struct probe_answer *answer = probe_answer(world_actor(world, ROLE_GATEWAY, 0), s);
        assert_int_equal(answer->error, 0);
        assert_int_equal(answer->tokens, requests[s].max_tokens);
        memcpy(quiet[s], answer->token, answer->tokens * sizeof *answer->token);
    }
    world_close(&world);
}

/* In the fp8 profile rows travel in E4M3: the tokens are those of rows that travel in BF16, whoever
 * dies. */
static void test_rows_in_e4m3(void **state) {
    (void)state;
    uint32_t plain[SEQUENCES][64];
    struct failure failure;
    for (uint32_t turn = 0; turn < 3; turn++) {
        struct world_options options = calm(3);
        options.kernels = kernels_select(PROFILE_FP8, ISA_BEST, &failure);
        options.settings.dispatch_fp8 = turn > 0;
        struct world *world;
        assert_int_equal(world_open(&world, &options, &failure), 0);
        const struct kill kill = {ROLE_EXPERT, 1, 60 * MS, 200 * MS};
        assert_true(run(world, turn == 2 ? kill : (struct kill){0}));
        for (uint32_t s = 0; s < SEQUENCES; s++) {
            const struct probe_answer *answer = probe_answer(world_actor(world, ROLE_GATEWAY, 0), s);
            assert_int_equal(answer->error, 0);
            if (turn == 0)
                memcpy(plain[s], answer->token, answer->tokens * sizeof *answer->token);
            assert_memory_equal(plain[s], answer->token, answer->tokens * sizeof *answer->token);
        }
        world_close(&world);
    }
}

static void test_seed_replays(void **state) {
    (void)state;
    uint64_t hash[3];
    for (uint32_t i = 0; i < 3; i++) {
        struct world_options options = calm(i < 2 ? 5 : 6);
        options.delay_max_ns = 5 * MS;
        options.loss = 0.05;
        struct world *world;
        struct failure failure;
        assert_int_equal(world_open(&world, &options, &failure), 0);
        assert_true(run(world, (struct kill){0}));
        hash[i] = world_trace_hash(world);
        world_close(&world);
    }
    assert_true(hash[0] == hash[1]);
    assert_true(hash[0] != hash[2]);
}

static void test_lossy_network(void **state) {
    (void)state;
    for (uint64_t seed = 1; seed <= 12; seed++) {
        struct world_options options = calm(seed);
        options.delay_min_ns = 0;
        options.delay_max_ns = 30 * MS;
        options.loss = 0.2;
        options.duplicate = 0.1;
        options.frame_delay_max_ns = 2 * MS;
        options.settings.heartbeat_misses = 40;
        expect_quiet_tokens("loss, delay and reordering of control messages", &options,
                            (struct kill){0});
    }
}

static void test_shapes_of_the_cluster(void **state) {
    (void)state;
    for (uint32_t experts = 1; experts <= 8; experts += experts < 2 ? 1 : 3) {
        struct world_options options = calm(experts);
        options.experts = experts;
        options.attention = 1 + experts % 2;
        options.samplers = 1 + experts / 2 % 2;
        options.settings.prefill_chunk = 1 + 6 * (experts - 1);
        options.settings.frame_rows = experts;
        expect_quiet_tokens("processes and chunks", &options, (struct kill){0});
    }
}

static void test_frame_loss(void **state) {
    (void)state;
    for (uint64_t seed = 1; seed <= 4; seed++) {
        struct world_options options = calm(seed);
        options.frame_loss = 0.02;
        options.settings.row_deadline_ms = 20;
        expect_quiet_tokens("loss of frames", &options, (struct kill){0});
    }
}

static void test_crashes(void **state) {
    (void)state;
    static const enum role roles[] = {ROLE_EXPERT, ROLE_ATTENTION, ROLE_SAMPLER};
    for (uint64_t seed = 1; seed <= 15; seed++) {
        struct random random = {seed};
        struct world_options options = calm(seed);
        options.attention = 2;
        options.samplers = 2;
        struct kill fault = {.role = roles[seed % 3], .index = (uint32_t)(seed / 3 % 2)};
        fault.kill_ns = random_between(&random, 10 * MS, QUIET_RUN_NS / 2);
        fault.restart_ns = fault.kill_ns + random_between(&random, 1 * MS, 200 * MS);
        expect_quiet_tokens(role_name(fault.role), &options, fault);
    }
}

/* The coordinator is killed and started again; then, with only the new one there, an expert. */
static bool run_without_coordinator(struct world *world, uint64_t kill_ns, uint64_t restart_ns,
                                    bool kill_expert) {
    if (kill_ns > 0) {
        while (world_now_ns(world) < kill_ns && world_step(world))
            ;
        world_kill(world, ROLE_COORDINATOR, 0);
        while (world_now_ns(world) < restart_ns && world_step(world))
            ;
        world_restart(world, ROLE_COORDINATOR, 0);
    }
    uint64_t until = world_now_ns(world) + 40 * MS;
    while (kill_expert && world_now_ns(world) < until && world_step(world))
        ;
    struct kill fault = {.role = ROLE_EXPERT, .index = 1};
    fault.kill_ns = kill_expert ? until : 0;
    return run(world, fault);
}

static void test_coordinator_restart(void **state) {
    (void)state;
    for (uint64_t seed = 1; seed <= 24; seed++) {
        struct random random = {seed};
        struct world_options options = calm(seed);
        options.attention = 1 + seed % 2;
        options.samplers = 2;
        options.settings.heartbeat_ms = 10;
        options.settings.heartbeat_misses = 8;
        options.settings.hello_retry_ms = 10;
        if (seed > 12)
            options.loss = 0.1;
        struct world *world;
        struct failure failure;
        assert_int_equal(world_open(&world, &options, &failure), 0);
        uint64_t kill_ns = random_between(&random, 1 * MS, QUIET_RUN_NS / 2);
        uint64_t restart_ns = kill_ns + random_between(&random, 1 * MS, 60 * MS);
        bool finished = run_without_coordinator(world, kill_ns, restart_ns, seed % 4 != 0);
        bool same = finished && same_tokens(world);
        world_close(&world);
        if (!same)
            fail_msg("coordinator restart: seed %llu", (unsigned long long)seed);
    }
}

static int open_model(void **state) {
    (void)state;
    struct failure failure = {0};
    if (!model_files_read(&files, MODEL) ||
        model_open(&model, files.file, files.count, &failure) < 0) {
        fprintf(stderr, "%s: %s\n", MODEL, failure.text);
        return -1;
    }
    numerics_enter();
    kernels = kernels_select(PROFILE_BF16, ISA_BEST, &failure);
    make_requests();
    return kernels != NULL ? 0 : -1;
}

static int close_model(void **state) {
    (void)state;
    model_close(&model);
    model_files_free(&files);
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_quiet),
        cmocka_unit_test(test_rows_in_e4m3),
        cmocka_unit_test(test_seed_replays),
        cmocka_unit_test(test_lossy_network),
        cmocka_unit_test(test_shapes_of_the_cluster),
        cmocka_unit_test(test_frame_loss),
        cmocka_unit_test(test_crashes),
        cmocka_unit_test(test_coordinator_restart),
    };
    return cmocka_run_group_tests(tests, open_model, close_model);
}
