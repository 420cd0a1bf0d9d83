/* The planner and EPLB: every plan keeps the rules, balance is at least the baseline's on loads
 * that no plan has seen, moves are few, and what cannot be is refused with the reason. */
#include "coordinator/eplb.h"
#include "coordinator/planner.h"
#include "coordinator/trace.h"
#include "tests/support/model_files.h"
#include "tests/support/random.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#define LAYERS  3u
#define EXPERTS 64u
#define WINDOWS 10u
#define PAIRS   (LAYERS * EXPERTS)
#define SEED    20261124u

/* A few hot experts per layer, loads that wander by some percent from window to window. */
static void make_trace(double load[WINDOWS][PAIRS]) {
    uint64_t random = SEED;
    printf("seed %u\n", SEED);
    for (uint32_t i = 0; i < PAIRS; i++)
        load[0][i] = floor(1000 * exp(random_float(&random, -1.5f, 1.8f)));
    for (uint32_t w = 1; w < WINDOWS; w++)
        for (uint32_t i = 0; i < PAIRS; i++)
            load[w][i] = floor(load[w - 1][i] * random_float(&random, 0.92f, 1.08f)) + 1;
}

static struct planner_task make_task(const double *load, uint32_t processes, uint32_t hosts,
                                     uint32_t spare) {
    return (struct planner_task){.layers = LAYERS,
                                 .experts = EXPERTS,
                                 .groups = 8,
                                 .load = load,
                                 .processes = processes,
                                 .hosts = hosts,
                                 .spare = spare};
}

/* One copy costs one row; a plan lasts so many windows. */
static struct planner_price price_for(double horizon) {
    return (struct planner_price){1, 1, 1, 1e9, horizon};
}

static uint32_t host_of(const struct planner_task *task, uint32_t process) {
    return task->host != NULL ? task->host[process] : process * task->hosts / task->processes;
}

/* Every pair is held, nobody twice by one process, nobody has more than its room, copies lie in
 * different failure domains. */
static void check_plan(const struct expert_plan *plan, const struct planner_task *task) {
    uint32_t *total = calloc(plan->processes, sizeof *total);
    for (uint32_t l = 0; l < plan->layers; l++) {
        const uint32_t *first = plan->first + l * plan->experts;
        assert_true(first[plan->experts] - first[0] <= plan->experts + task->spare);
        for (uint32_t e = 0; e < plan->experts; e++) {
            uint32_t copies = first[e + 1] - first[e], on_host[64] = {0};
            assert_true(copies >= 1 && copies <= REPLICAS_MAX);
            for (uint32_t i = first[e]; i < first[e + 1]; i++) {
                assert_true(plan->holder[i] < plan->processes);
                assert_true(i == first[e] || plan->holder[i] > plan->holder[i - 1]);
                total[plan->holder[i]]++;
                on_host[host_of(task, plan->holder[i])]++;
            }
            for (uint32_t h = 0; task->hosts > 1 && h < task->hosts; h++)
                assert_true(on_host[h] <= (copies + 1) / 2);
        }
    }
    uint32_t most = LAYERS * ((EXPERTS + task->spare + task->processes - 1) / task->processes);
    for (uint32_t p = 0; p < plan->processes; p++)
        assert_true(total[p] <= (task->capacity != NULL ? task->capacity[p] : most));
    free(total);
}

static void plan_well(struct expert_plan *ret, struct planner_figures *figures,
                      const struct planner_task *task) {
    struct failure failure = {0};
    if (planner_plan(ret, figures, task, &failure) < 0)
        fail_msg("%s", failure.text);
    check_plan(ret, task);
    assert_int_equal(figures->copies, plan_copies(ret));
    if (task->previous == NULL || task->previous->processes <= task->processes)
        assert_int_equal(figures->moved, plan_moved(task->previous, ret));
}

static double mean_balance(const struct expert_plan *plan, const double *load,
                           const double *speed) {
    double scratch[1024], mean = 0;
    for (uint32_t l = 0; l < plan->layers; l++)
        mean += plan_balancedness(plan, l, load + l * plan->experts, speed, scratch) / plan->layers;
    return mean;
}

static void test_from_nothing(void **state) {
    static double load[WINDOWS][PAIRS];
    static const struct {
        uint32_t processes, hosts, spare;
    } shapes[] = {{1, 1, 0},   {3, 2, 5},     {7, 3, 0},  {8, 4, 8},
                  {16, 4, 16}, {100, 10, 40}, {64, 8, 0}, {2, 2, 300}};
    make_trace(load);
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        struct planner_task task =
            make_task(load[0], shapes[i].processes, shapes[i].hosts, shapes[i].spare);
        struct expert_plan plan, again;
        struct planner_figures figures;
        plan_well(&plan, &figures, &task);
        assert_true(figures.proposed);
        assert_int_equal(figures.moved, figures.copies);
        assert_true(fabs(figures.after.mean - mean_balance(&plan, load[0], NULL)) < 1e-9);
        plan_well(&again, &figures, &task); /* the same again */
        assert_int_equal(plan_moved(&plan, &again), 0);
        plan_free(&plan);
        plan_free(&again);
    }
}

static void run_windows(double load[WINDOWS][PAIRS], uint32_t processes, uint32_t spare, bool eplb,
                        double *ret_balance, uint32_t *ret_moved) {
    struct expert_plan previous = {0};
    double forecast[PAIRS] = {0};
    *ret_balance = 0;
    *ret_moved = 0;
    for (uint32_t w = 0; w + 1 < WINDOWS; w++) {
        struct expert_plan plan;
        struct planner_figures figures;
        forecast_observe(forecast, load[w], LAYERS, EXPERTS);
        struct planner_task task = make_task(forecast, processes, 4, spare);
        task.previous = w > 0 ? &previous : NULL;
        task.price = price_for(spare > 0 ? 0.4 : 0.12);
        struct eplb_task baseline = {LAYERS, EXPERTS, 8, processes, 1, EXPERTS + spare, load[w]};
        if (eplb)
            assert_int_equal(eplb_plan(&plan, &baseline, NULL), 0);
        else
            plan_well(&plan, &figures, &task);
        *ret_moved += w > 0 ? plan_moved(&previous, &plan) : 0;
        *ret_balance += mean_balance(&plan, load[w + 1], NULL) / (WINDOWS - 1);
        plan_free(&previous);
        previous = plan;
    }
    plan_free(&previous);
}

static void test_against_eplb_on_the_next_window(void **state) {
    static double load[WINDOWS][PAIRS];
    make_trace(load);
    for (uint32_t spare = 0; spare <= 16; spare += 16) {
        double ours, theirs;
        uint32_t our_moves, their_moves;
        run_windows(load, 16, spare, false, &ours, &our_moves);
        run_windows(load, 16, spare, true, &theirs, &their_moves);
        printf("spare %u: %.4f and %u moves, EPLB %.4f and %u moves\n", spare, ours, our_moves,
               theirs, their_moves);
        assert_true(ours >= theirs);
        assert_true(our_moves * 4 <= their_moves);
    }
}

/* A few windows of the large trace, where it is at hand. */
static void test_recorded_trace(void **state) {
    size_t bytes;
    void *file = read_whole_file("../shared/traces/v3-scale.safetensors", &bytes);
    if (file == NULL)
        skip();
    struct load_trace trace;
    assert_int_equal(trace_read(&trace, file, bytes, "v3-scale", NULL), 0);
    free(file);
    double *forecast = calloc((size_t)trace.layers * trace.experts, sizeof *forecast);
    struct expert_plan previous = {0}, eplb_previous = {0};
    double ours = 0, theirs = 0;
    uint32_t our_moves = 0, their_moves = 0;
    for (uint32_t w = 0; w < 4; w++) {
        struct expert_plan plan, eplb;
        struct planner_figures figures;
        forecast_observe(forecast, trace_window(&trace, w), trace.layers, trace.experts);
        struct planner_task task = {.layers = trace.layers,
                                    .experts = trace.experts,
                                    .load = forecast,
                                    .processes = 32,
                                    .hosts = 4,
                                    .spare = 32,
                                    .previous = w > 0 ? &previous : NULL,
                                    .price = price_for(0.2)};
        struct eplb_task baseline = {trace.layers, trace.experts,          8, 32, 1,
                                     288,          trace_window(&trace, w)};
        assert_int_equal(planner_plan(&plan, &figures, &task, NULL), 0);
        assert_int_equal(eplb_plan(&eplb, &baseline, NULL), 0);
        ours += mean_balance(&plan, trace_window(&trace, w + 1), NULL) / 4;
        theirs += mean_balance(&eplb, trace_window(&trace, w + 1), NULL) / 4;
        our_moves += w > 0 ? plan_moved(&previous, &plan) : 0;
        their_moves += w > 0 ? plan_moved(&eplb_previous, &eplb) : 0;
        plan_free(&previous);
        plan_free(&eplb_previous);
        previous = plan;
        eplb_previous = eplb;
    }
    printf("%.4f and %u moves, EPLB %.4f and %u moves\n", ours, our_moves, theirs, their_moves);
    assert_true(ours >= theirs);
    assert_true(our_moves * 4 <= their_moves);
    plan_free(&previous);
    plan_free(&eplb_previous);
    trace_free(&trace);
    free(forecast);
}

static void test_nothing_is_proposed_when_nothing_pays(void **state) {
    static double load[WINDOWS][PAIRS];
    make_trace(load);
    struct planner_task task = make_task(load[0], 16, 4, 16);
    struct expert_plan first, second;
    struct planner_figures figures;
    plan_well(&first, &figures, &task);
    task.previous = &first;
    task.load = load[5];
    task.price = price_for(0); /* a plan that lasts for no time pays for nothing */
    plan_well(&second, &figures, &task);
    assert_false(figures.proposed);
    assert_int_equal(figures.moved, 0);
    assert_int_equal(figures.bytes, 0);
    plan_free(&second);
    task.price = price_for(1000); /* the same loads, a plan that lasts */
    plan_well(&second, &figures, &task);
    assert_true(figures.proposed);
    assert_true(figures.after.mean > figures.before.mean);
    assert_true(figures.gain_ns > figures.stall_ns);
    assert_int_equal(figures.bytes, figures.moved);
    plan_free(&second);
    plan_free(&first);
}

static void test_processes_join_and_leave(void **state) {
    static double load[WINDOWS][PAIRS];
    static const uint32_t processes[] = {4, 8, 2, 5, 4, 1, 16};
    make_trace(load);
    struct expert_plan previous = {0};
    for (size_t i = 0; i < sizeof processes / sizeof processes[0]; i++) {
        struct planner_task task = make_task(load[i], processes[i], processes[i] > 1 ? 2 : 1, 6);
        task.previous = i > 0 ? &previous : NULL;
        task.price = price_for(1);
        struct expert_plan plan;
        struct planner_figures figures;
        plan_well(&plan, &figures, &task);
        plan_free(&previous);
        previous = plan;
    }
    plan_free(&previous);
}

static void test_capacities_and_speeds_differ(void **state) {
    static double load[WINDOWS][PAIRS];
    make_trace(load);
    const uint32_t capacity[5] = {0, 17, 100, 31,
                                  60}; /* 208 for 192 pairs; the first takes nothing */
    struct planner_task task = make_task(load[0], 5, 2, 4);
    struct expert_plan plan;
    struct planner_figures figures;
    task.capacity = capacity;
    plan_well(&plan, &figures, &task);
    plan_free(&plan);
    const double speed[4] = {1, 1, 2, 4}; /* room for all: load must follow speed */
    const uint32_t roomy[4] = {192, 192, 192, 192};
    task = make_task(load[0], 4, 1, 8);
    task.capacity = roomy;
    task.speed = speed;
    plan_well(&plan, &figures, &task);
    assert_true(figures.after.worst > 0.95);
    assert_true(fabs(figures.after.mean - mean_balance(&plan, load[0], speed)) < 1e-9);
    assert_true(mean_balance(&plan, load[0], NULL) < 0.6); /* as if all were equal: far from even */
    plan_free(&plan);
}

static void test_hierarchical(void **state) {
    static double load[WINDOWS][PAIRS];
    make_trace(load);
    for (int from_plan = 0; from_plan < 2; from_plan++) {
        struct planner_task task = make_task(load[0], 16, 4, 16);
        struct expert_plan flat = {0}, plan;
        struct planner_figures figures;
        if (from_plan)
            plan_well(&flat, &figures, &task);
        task.previous = from_plan ? &flat : NULL;
        task.hierarchical = true;
        plan_well(&plan, &figures, &task);
        assert_true(figures.home_share > 0.5);
        for (uint32_t group = 0; group < LAYERS * 8; group++) {
            uint32_t homes = 0; /* hosts with a copy of every expert of the group */
            for (uint32_t h = 0; h < 4; h++) {
                bool all = true;
                for (uint32_t pair = group * 8; pair < group * 8 + 8; pair++) {
                    bool here = false;
                    for (uint32_t i = plan.first[pair]; i < plan.first[pair + 1]; i++)
                        here |= plan.holder[i] / 4 == h;
                    all &= here;
                }
                homes += all;
            }
            assert_true(homes >= 1);
        }
        plan_free(&plan);
        plan_free(&flat);
    }
}

/* An expert that may not be split makes its process the slowest, whatever is done. What lies beside
 * the second heaviest becomes lighter all the same, as that may be the hottest next time, but for a
 * lower price. */
static void test_below_a_bound_process(void **state) {
    const double load[8] = {100, 1, 30, 20, 3, 2, 4, 5};
    uint32_t first[9] = {0, 1, 2, 3, 4, 5, 6, 7, 8}, holder[8] = {0, 0, 1, 1, 2, 2, 3, 3};
    const struct expert_plan previous = {1, 8, 4, first, holder};
    struct planner_task task = {.layers = 1, .experts = 8, .load = load, .processes = 4,
                                .hosts = 1,  .previous = &previous};
    struct expert_plan plan;
    struct planner_figures figures;
    task.price = price_for(1); /* 20 for 2 wins 18 rows of the second level, which count for 4.5 */
    assert_int_equal(planner_plan(&plan, &figures, &task, NULL), 0);
    assert_int_not_equal(plan.holder[2], plan.holder[3]);
    assert_int_equal(plan.holder[0], plan.holder[1]); /* the hottest has the lightest already */
    assert_int_equal(figures.moved, 2);
    plan_free(&plan);
    task.price = price_for(0.4); /* two copies cost 5 rows */
    assert_int_equal(planner_plan(&plan, &figures, &task, NULL), 0);
    assert_false(figures.proposed);
    plan_free(&plan);
}

/* Hosts of unequal size, rooms and speeds at once, from nothing and from a plan, flat and hierarchical:
 * check_plan's rules hold, and no copies of one expert share a host if there are two. */
static void test_unequal_hosts(void **state) {
    static double load[WINDOWS][PAIRS];
    const uint32_t host[6] = {0, 0, 0, 1, 1, 2}, capacity[6] = {30, 60, 40, 50, 20, 90};
    const double speed[6] = {1, 2, 1, 1.5, 0.5, 3};
    make_trace(load);
    struct expert_plan previous = {0};
    for (uint32_t i = 0; i < 4; i++) {
        struct planner_task task = make_task(load[i], 6, 3, 20);
        struct planner_figures figures;
        struct expert_plan plan;
        task.host = host;
        task.capacity = capacity;
        task.speed = speed;
        task.hierarchical = i % 2 == 1;
        task.previous = i > 0 ? &previous : NULL;
        task.price = price_for(1);
        plan_well(&plan, &figures, &task);
        for (uint32_t pair = 0; pair < PAIRS; pair++)
            if (plan.first[pair + 1] - plan.first[pair] == 2)
                assert_int_not_equal(host[plan.holder[plan.first[pair]]],
                                     host[plan.holder[plan.first[pair] + 1]]);
        printf("balance %.4f at home %.4f\n", figures.after.mean, figures.home_share);
        assert_true(figures.after.mean > 0.8);
        plan_free(&previous);
        previous = plan;
    }
    plan_free(&previous);
}

static void test_odd_loads(void **state) {
    static double load[PAIRS];
    struct planner_task task = make_task(load, 8, 2, 8);
    struct expert_plan plan, next;
    struct planner_figures figures;
    plan_well(&plan, &figures, &task); /* no load at all */
    assert_true(figures.after.worst == 1);
    task.previous = &plan;
    load[7] = 1e6; /* one expert has all of layer 0; the others have none */
    plan_well(&next, &figures, &task);
    assert_int_equal(next.first[8] - next.first[7], 8);
    assert_true(figures.after.worst > 0.999);
    plan_free(&next);
    task.previous = NULL;
    plan_well(&next, &figures, &task);
    assert_true(figures.after.worst > 0.999);
    plan_free(&next);
    plan_free(&plan);
}

static void refuse(const struct planner_task *task, int code, const char *text) {
    struct expert_plan plan;
    struct planner_figures figures;
    struct failure failure = {0};
    assert_int_equal(planner_plan(&plan, &figures, task, &failure), code);
    if (strstr(failure.text, text) == NULL)
        fail_msg("expected '%s' in '%s'", text, failure.text);
}

static void test_what_cannot_be_is_refused(void **state) {
    static double load[WINDOWS][PAIRS];
    make_trace(load);
    const struct planner_task good = make_task(load[0], 8, 2, 8);
    struct planner_task task = good;
    task.processes = 0;
    refuse(&task, ERR_INVALID, "expected 1 to 1024 processes, found 0");
    task = good;
    task.hosts = 9;
    refuse(&task, ERR_INVALID, "expected 1 to 8 hosts");
    task.hosts = 0;
    refuse(&task, ERR_INVALID, "expected 1 to 8 hosts");
    task = good;
    const uint32_t capacity[8] = {24, 24, 24, 24, 24, 24, 24, 23};
    task.capacity = capacity;
    refuse(&task, ERR_INVALID,
           "not enough slots: 3 layers x 64 experts = 192 copies at least, 8 processes have room "
           "for 191 (1 short)");
    task = good;
    const double speed[8] = {1, 1, 0, 1, 1, 1, 1, 1};
    task.speed = speed;
    refuse(&task, ERR_INVALID, "speed of process 2");
    task = good;
    task.hierarchical = true;
    task.groups = 7;
    refuse(&task, ERR_INVALID, "groups that divide 64 experts");
    task = good;
    task.price = price_for(NAN);
    refuse(&task, ERR_INVALID, "price");
    task = good;
    struct expert_plan other = {.layers = LAYERS, .experts = 32, .processes = 8};
    task.previous = &other;
    refuse(&task, ERR_INVALID, "previous plan: expected 3 layers x 64 experts, found 3 x 32");
    load[0][70] = NAN;
    refuse(&good, ERR_INVALID, "load of layer 1 expert 6");
    load[0][70] = -1;
    refuse(&good, ERR_INVALID, "found -1");
}

/* Small enough to do by hand: 90 gets both spare slots (45, then 30 each, 40 stays whole). Packed:
 * 40 + 30
 * + 5 = 75 and 30 + 30 + 10 = 70. */
static void test_eplb_by_hand(void **state) {
    const double load[4] = {90, 40, 10, 5};
    struct eplb_task task = {1, 4, 1, 2, 1, 6, load};
    struct expert_plan plan;
    assert_int_equal(eplb_plan(&plan, &task, NULL), 0);
    assert_int_equal(plan.first[1] - plan.first[0], 3);
    assert_int_equal(plan.first[2] - plan.first[1], 1);
    double scratch[2];
    assert_true(fabs(plan_balancedness(&plan, 0, load, NULL, scratch) - 72.5 / 75) < 1e-9);
    plan_free(&plan);
    task.slots = 3;
    struct failure failure;
    assert_int_equal(eplb_plan(&plan, &task, &failure), ERR_INVALID);
    assert_non_null(
        strstr(failure.text, "4 experts need 4 slots in each layer, found 3 (1 short)"));
    task.slots = 7;
    assert_int_equal(eplb_plan(&plan, &task, &failure), ERR_INVALID);
    assert_non_null(strstr(failure.text, "7 slots / 2 processes = 3, remainder 1"));
}

static void test_eplb_hierarchical_keeps_groups_in_hosts(void **state) {
    static double load[WINDOWS][PAIRS];
    make_trace(load);
    struct eplb_task task = {LAYERS, EXPERTS, 8, 16, 4, 80, load[0]};
    struct expert_plan plan;
    assert_int_equal(eplb_plan(&plan, &task, NULL), 0);
    assert_int_equal(plan_copies(&plan), LAYERS * 80);
    for (uint32_t pair = 0; pair < PAIRS; pair++)
        for (uint32_t i = plan.first[pair / 8 * 8]; i < plan.first[pair + 1]; i++)
            assert_int_equal(plan.holder[i] / 4, plan.holder[plan.first[pair / 8 * 8]] / 4);
    plan_free(&plan);
}

static void test_json(void **state) {
    static double load[WINDOWS][PAIRS];
    make_trace(load);
    struct planner_task task = make_task(load[0], 8, 2, 8);
    struct expert_plan plan, read;
    struct planner_figures figures;
    struct failure failure = {0};
    plan_well(&plan, &figures, &task);
    char *text = plan_to_json(&plan, "{\"moved\": 3}");
    assert_int_equal(plan_from_json(&read, text, strlen(text), "p.json", &failure), 0);
    assert_int_equal(read.processes, 8);
    assert_int_equal(plan_copies(&read), plan_copies(&plan));
    assert_memory_equal(read.holder, plan.holder, plan_copies(&plan) * sizeof *plan.holder);
    plan_free(&read);
    plan_free(&plan);
    free(text);
    static const char *const wrong[][2] = {
        {"{", "line"},
        {"[]", "layers"},
        {"{\"layers\":1,\"experts\":1,\"processes\":0,\"placement\":[[[0]]]}", "processes"},
        {"{\"layers\":1,\"experts\":1,\"processes\":2}", "expected 1 layers"},
        {"{\"layers\":1,\"experts\":2,\"processes\":2,\"placement\":[[[0]]]}",
         "expected 2 experts"},
        {"{\"layers\":1,\"experts\":1,\"processes\":2,\"placement\":[[[]]]}", "1 to 64 processes"},
        {"{\"layers\":1,\"experts\":1,\"processes\":2,\"placement\":[[[2]]]}",
         "processes from 0 to 1"},
        {"{\"layers\":1,\"experts\":1,\"processes\":2,\"placement\":[[[-1]]]}", "processes from 0"},
        {"{\"layers\":1,\"experts\":1,\"processes\":2,\"placement\":[[[\"a\"]]]}",
         "processes from 0"},
        {"{\"layers\":1,\"experts\":1,\"processes\":2,\"placement\":[[7]]}", "1 to 64 processes"},
    };
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        assert_true(plan_from_json(&read, wrong[i][0], strlen(wrong[i][0]), "p.json", &failure) <
                    0);
        if (strstr(failure.text, wrong[i][1]) == NULL)
            fail_msg("expected '%s' in '%s'", wrong[i][1], failure.text);
    }
}

static int read_trace(const char *header, const void *data, size_t bytes, const char *text) {
    size_t size;
    void *file = build_safetensors(header, data, bytes, &size);
    struct load_trace trace = {0};
    struct failure failure = {0};
    int code = trace_read(&trace, file, size, "t.safetensors", &failure);
    if (code < 0 && strstr(failure.text, text) == NULL)
        fail_msg("expected '%s' in '%s'", text, failure.text);
    trace_free(&trace);
    free(file);
    return code;
}

static void test_traces(void **state) {
    const float floats[4] = {1, 2, 0, 4}, nan[4] = {1, 2, NAN, 4}, endless[4] = {INFINITY, 2, 3, 4};
    const int32_t whole[4] = {1, 2, 3, 4}, negative[4] = {1, 2, 3, -4};
#define HEADER(dtype, shape, bytes)                                                                \
    "{\"expert_load\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":[0," bytes "]" \
    "}"                                                                                            \
    "}"
    assert_int_equal(read_trace(HEADER("F32", "[2,1,2]", "16"), floats, 16, ""), 0);
    assert_int_equal(read_trace(HEADER("I32", "[1,2,2]", "16"), whole, 16, ""), 0);
    assert_true(read_trace(HEADER("F32", "[2,1,2]", "16"), nan, 16, "window 1 layer 0 expert 0") <
                0);
    assert_true(read_trace(HEADER("F32", "[2,1,2]", "16"), endless, 16, "found inf") < 0);
    assert_true(read_trace(HEADER("I32", "[1,2,2]", "16"), negative, 16,
                           "layer 1 expert 1: expected a number of rows, 0 or more, found -4") < 0);
    assert_true(read_trace(HEADER("I32", "[2,2]", "16"), whole, 16,
                           "expected shape [window, layer, expert]") < 0);
    assert_true(read_trace(HEADER("I32", "[1,1,2,2]", "16"), whole, 16, "found 4 dimensions") < 0);
    assert_true(
        read_trace(HEADER("I32", "[0,2,2]", "0"), whole, 0, "found 3 dimensions, [0, 2, 2]") < 0);
    assert_true(read_trace(HEADER("I32", "[1,1,4096]", "16384"), NULL, 16384, "1024") < 0);
    assert_true(read_trace(HEADER("BF16", "[1,2,2]", "8"), whole, 8, "dtype") < 0);
    assert_true(read_trace("{}", NULL, 0, "expected a tensor expert_load") < 0);
}

static void test_forecast(void **state) {
    double forecast[4] = {0};
    const double steady[4] = {100, 100, 100, 100}, near[4] = {110, 90, 100, 100},
                 far[4] = {0, 0, 0, 800}, none[4] = {0};
    forecast_observe(forecast, steady, 1, 4);
    assert_memory_equal(forecast, steady, sizeof steady);
    forecast_observe(forecast, near, 1, 4);
    assert_true(forecast[0] > 100 && forecast[0] < 110 && forecast[1] < 100 && forecast[1] > 90);
    double before[4];
    memcpy(before, forecast, sizeof before);
    forecast_observe(forecast, none, 1, 4); /* nothing was routed: nothing was learnt */
    assert_memory_equal(forecast, before, sizeof before);
    forecast_observe(forecast, far, 1, 4); /* other text: the past says nothing */
    assert_memory_equal(forecast, far, sizeof far);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_from_nothing),
        cmocka_unit_test(test_against_eplb_on_the_next_window),
        cmocka_unit_test(test_recorded_trace),
        cmocka_unit_test(test_nothing_is_proposed_when_nothing_pays),
        cmocka_unit_test(test_processes_join_and_leave),
        cmocka_unit_test(test_capacities_and_speeds_differ),
        cmocka_unit_test(test_hierarchical),
        cmocka_unit_test(test_below_a_bound_process),
        cmocka_unit_test(test_unequal_hosts),
        cmocka_unit_test(test_odd_loads),
        cmocka_unit_test(test_what_cannot_be_is_refused),
        cmocka_unit_test(test_eplb_by_hand),
        cmocka_unit_test(test_eplb_hierarchical_keeps_groups_in_hosts),
        cmocka_unit_test(test_json),
        cmocka_unit_test(test_traces),
        cmocka_unit_test(test_forecast),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
