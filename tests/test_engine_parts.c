/* The engines one by one: what they refuse to open, experts that come and go, frames of any shape,
 * options of the gate. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/attention.h"
#include "engine/internal.h"
#include "tests/support/one_process.h"
#include "tests/support/random.h"

#include <cmocka.h> /* last: its macro fail() hides the function of actors/errors.h */

#define MODEL "tests/golden/v3-fp8"
#define LAYER 1 /* the first MoE layer */

static struct one_process serial,
    cut; /* the same model with PARALLEL_SERIAL and PARALLEL_REVERSED */

static int open_both(void **state) {
    (void)state;
    struct failure failure;
    const struct kernels *kernels = kernels_select(PROFILE_BF16, ISA_BEST, &failure);
    bool opened = one_process_open(&serial, MODEL, kernels, &PARALLEL_SERIAL, 160, 64) &&
                  one_process_open(&cut, MODEL, kernels, &PARALLEL_REVERSED, 160, 64);
    return opened ? 0 : -1;
}

static int close_both(void **state) {
    (void)state;
    one_process_close(&serial);
    one_process_close(&cut);
    return 0;
}

static struct engine_options options_for(enum engine_role role) {
    struct failure failure;
    return (struct engine_options){
        .role = role,
        .kernels = kernels_select(PROFILE_BF16, ISA_BEST, &failure),
        .parallel = PARALLEL_SERIAL,
        .batch_rows = 8,
        .batch_slots = 1,
        .pages = 4,
    };
}

/* Read in pieces from one engine, unpacked into another: rows come out with the same bits. Whatever is changed of it is
 * refused, or is weights of the same shape. */
static void weights_travel_as_bytes(void **state) {
    (void)state;
    struct failure failure;
    struct engine *engine = NULL;
    struct expert_weights *weights = NULL;
    const struct kernels *kernels = kernels_select(PROFILE_BF16, ISA_BEST, &failure);
    const struct model_config *config = model_config(serial.model);
    uint8_t *image = malloc(engine_expert_image_limit(config));
    uint64_t total = 1;
    uint32_t crc = 0;
    for (uint64_t at = 0; at < total;) {
        struct program_result result;
        struct program read = {.kind = PROGRAM_READ, .layer = LAYER, .items = 2, .offset = at, .bytes = 1000};
        engine_run(serial.expert, &read, &result);
        total = result.total;
        crc = result.crc;
        assert_true(total > 0 && total <= engine_expert_image_limit(config) && result.piece_bytes > 0);
        memcpy(image + at, result.piece, result.piece_bytes);
        at += result.piece_bytes;
    }
    assert_int_equal(crc32c(0, image, total), crc);
    struct engine_options options = options_for(ENGINE_EXPERT);
    assert_int_equal(engine_open(&engine, serial.model, &options, &failure), 0);
    assert_int_equal(engine_expert_unpack(config, kernels, LAYER, 2, image, total, &weights, &failure), 0);
    engine_expert_publish(engine, LAYER, 2, &weights);
    uint32_t hidden = config->hidden, item_row[2] = {0, 1};
    uint16_t *rows = calloc((size_t)2 * hidden, sizeof *rows);
    for (uint32_t i = 0; i < 2 * hidden; i++)
        rows[i] = bf16_from_float((float)(i * 37 % 201) / 100 - 1);
    struct frame_group group = {.expert = 2, .count = 2};
    struct program program = {.kind = PROGRAM_EXPERT, .layer = LAYER, .rows = 2, .items = 2, .groups = 1,
                              .group = &group, .item_row = item_row, .payload = rows};
    struct program_result first, second;
    engine_run(serial.expert, &program, &first);
    engine_run(engine, &program, &second);
    assert_memory_equal(first.output, second.output, (size_t)2 * hidden * sizeof(float));
    assert_int_equal(engine_expert_unpack(config, kernels, LAYER, 3, image, total, &weights, &failure), ERR_CORRUPT);
    assert_int_equal(engine_expert_unpack(config, kernels, LAYER, 2, image, total - 64, &weights, &failure), ERR_CORRUPT);
    assert_int_equal(engine_expert_unpack(config, kernels, LAYER, 2, image, 10, &weights, &failure), ERR_CORRUPT);
    for (uint32_t bit = 0; bit < 64 * 8; bit++) { /* the header */
        image[bit / 8] ^= (uint8_t)(1u << (bit % 8));
        if (engine_expert_unpack(config, kernels, LAYER, 2, image, total, &weights, &failure) == 0)
            engine_expert_free(&weights);
        image[bit / 8] ^= (uint8_t)(1u << (bit % 8));
    }
    struct program_result result;
    struct program read = {.kind = PROGRAM_READ, .layer = LAYER, .items = 2, .offset = total, .bytes = 10};
    engine_run(serial.expert, &read, &result);
    assert_int_equal(result.total, 0);
    read = (struct program){.kind = PROGRAM_READ, .layer = 9999, .items = 2, .bytes = 10};
    engine_run(serial.expert, &read, &result);
    assert_int_equal(result.total, 0);
    free(rows);
    free(image);
    engine_close(&engine);
}

static uint64_t read_image(struct one_process *process, uint32_t expert, uint8_t *ret, uint32_t *ret_crc) {
    uint64_t total = 1;
    for (uint64_t at = 0; at < total;) {
        struct program_result result;
        struct program read = {.kind = PROGRAM_READ, .layer = LAYER, .items = expert, .offset = at, .bytes = 7001};
        engine_run(process->expert, &read, &result);
        assert_true(result.piece_bytes > 0);
        memcpy(ret + at, result.piece, result.piece_bytes);
        at += result.piece_bytes;
        total = result.total;
        *ret_crc = result.crc;
    }
    return total;
}

/* Experts large enough to be kept in 12 bits a weight, where the instruction set reads that: less memory, the same rows,
 * and given away as what the others give away. */
static void coded_experts_are_the_same_experts(void **state) {
    (void)state;
    static const char SHAPE[] =
        "{\"model_type\": \"deepseek_v3\", \"vocab_size\": 320, \"hidden_size\": 512, \"intermediate_size\": 64,"
        "\"moe_intermediate_size\": 256, \"num_hidden_layers\": 2, \"first_k_dense_replace\": 1, \"num_attention_heads\": 2,"
        "\"n_shared_experts\": 1, \"n_routed_experts\": 8, \"num_experts_per_tok\": 2, \"n_group\": 1, \"topk_group\": 1,"
        "\"q_lora_rank\": 32, \"kv_lora_rank\": 32, \"qk_nope_head_dim\": 16, \"qk_rope_head_dim\": 16, \"v_head_dim\": 16,"
        "\"max_position_embeddings\": 64}";
    enum { ROWS = 70, HIDDEN = 512 };
    struct failure failure;
    const struct kernels *best = kernels_select(PROFILE_BF16, ISA_BEST, &failure);
    if (best->matrix_code == NULL)
        skip();
    struct one_process coded, plain;
    assert_true(one_process_open_shape(&coded, SHAPE, 5, best, &PARALLEL_SERIAL, 8, 64));
    assert_true(one_process_open_shape(&plain, SHAPE, 5, kernels_select(PROFILE_BF16, ISA_AVX512, &failure),
                                       &PARALLEL_SERIAL, 8, 64));
    const struct matrix *gate = &experts_held(coded.expert, LAYER, 1)->mlp.gate.matrix;
    assert_non_null(gate->codes);
    assert_true(gate->bytes * 10 < experts_held(plain.expert, LAYER, 1)->mlp.gate.matrix.bytes * 8);
    assert_true(coded.expert->memory_bytes < plain.expert->memory_bytes);

    bf16 *rows = calloc((size_t)ROWS * HIDDEN, sizeof *rows);
    uint32_t item_row[ROWS];
    for (uint32_t i = 0; i < ROWS * HIDDEN; i++)
        rows[i] = bf16_from_float((float)(i * 37 % 201) / 100 - 1);
    for (uint32_t i = 0; i < ROWS; i++)
        item_row[i] = i;
    for (uint32_t count = 1; count <= ROWS; count += 23) {
        struct frame_group group = {.expert = 1, .count = count};
        struct program program = {.kind = PROGRAM_EXPERT, .layer = LAYER, .rows = count, .items = count, .groups = 1,
                                  .group = &group, .item_row = item_row, .payload = rows};
        struct program_result first, second;
        engine_run(coded.expert, &program, &first);
        engine_run(plain.expert, &program, &second);
        assert_memory_equal(first.output, second.output, (size_t)count * HIDDEN * sizeof(float));
    }

    const struct model_config *config = model_config(coded.model);
    uint8_t *image[2];
    uint64_t total[2];
    uint32_t crc[2];
    for (int i = 0; i < 2; i++) {
        image[i] = malloc(engine_expert_image_limit(config));
        total[i] = read_image(i == 0 ? &coded : &plain, 1, image[i], &crc[i]);
        assert_int_equal(crc32c(0, image[i], total[i]), crc[i]);
    }
    assert_int_equal(total[0], total[1]);
    assert_memory_equal(image[0], image[1], total[0]);
    struct expert_weights *weights = NULL; /* and is coded again where it arrives */
    assert_int_equal(engine_expert_unpack(config, best, LAYER, 1, image[1], total[1], &weights, &failure), 0);
    assert_non_null(weights->mlp.down.matrix.codes);
    assert_memory_equal(weights->mlp.gate.matrix.data, gate->data, (size_t)HIDDEN * 256 * 3 / 2);
    engine_expert_free(&weights);
    free(image[0]);
    free(image[1]);
    free(rows);
    one_process_close(&coded);
    one_process_close(&plain);
}

static void impossible_options_are_refused(void **state) {
    (void)state;
    struct engine_options bad[8];
    for (int i = 0; i < 8; i++)
        bad[i] = options_for(ENGINE_ATTENTION);
    bad[0].batch_rows = 0;
    bad[1].batch_rows = BATCH_ROWS_MAX + 1;
    bad[2].batch_slots = 0;
    bad[3].batch_slots = BATCH_SLOTS_MAX + 1;
    bad[4].pages = 0;
    bad[5].experts_per_token_override = 9; /* two groups of four can be chosen */
    bad[6].gate_top_p = 1.5f;
    bad[7].latent_fp8 = true;
    bad[7].kernels = kernels_select(PROFILE_F32, ISA_BEST, &(struct failure){0});
    for (int i = 0; i < 8; i++) {
        struct engine *engine = NULL;
        struct failure failure = {0};
        assert_int_equal(engine_open(&engine, serial.model, &bad[i], &failure), ERR_INVALID);
        assert_non_null(strstr(failure.text, i == 7 ? "BF16, found f32" : "expected"));
        assert_null(engine);
    }
#ifndef __SANITIZE_ADDRESS__ /* which ends the process where malloc would return NULL */
    struct engine_options huge = options_for(ENGINE_ATTENTION);
    huge.pages = UINT32_MAX;
    struct engine *engine = NULL;
    struct failure failure = {0};
    assert_int_equal(engine_open(&engine, serial.model, &huge, &failure), ERR_NO_MEMORY);
    assert_non_null(strstr(failure.text, "latent cache"));
#endif
}

static size_t asked_bytes;

static void count_asked(void *memory, size_t bytes) {
    assert_int_equal((uintptr_t)memory % ((size_t)2 << 20), 0);
    assert_int_equal(bytes % ((size_t)2 << 20), 0);
    asked_bytes += bytes;
}

/* What was given back serves the next of its size; everything is aligned and nothing overlaps. The host is asked
 * for huge pages. */
static void weights_share_regions(void **state) {
    (void)state;
    enum { PIECES = 40 };
    struct failure failure;
    uint64_t total = 0;
    const size_t bytes[] = {1, 64, 100000, (size_t)3 << 20, (size_t)40 << 20};
    uint8_t *piece[PIECES];
    engine_set_huge_pages(count_asked);
    for (size_t i = 0; i < PIECES; i++) {
        const size_t size = bytes[i % 5];
        piece[i] = weight_memory_take(size, "test", &total, &failure);
        assert_non_null(piece[i]);
        assert_int_equal((uintptr_t)piece[i] % 64, 0);
        piece[i][0] = piece[i][size - 1] = (uint8_t)i;
    }
    engine_set_huge_pages(NULL);
    assert_true(asked_bytes >= (PIECES / 5) * ((size_t)40 << 20)); /* at least the large ones */
    for (size_t i = 0; i < PIECES; i++)
        assert_int_equal(piece[i][0], i);
    for (size_t i = 0; i < PIECES; i++)
        assert_int_equal(piece[i][bytes[i % 5] - 1], i);
    uint8_t *again = piece[2];
    weight_memory_free(again, bytes[2]);
    assert_ptr_equal(weight_memory_take(bytes[2], "test", &total, &failure), again);
    for (size_t i = 0; i < PIECES; i++)
        weight_memory_free(piece[i], bytes[i % 5]);
    weight_memory_free(NULL, 5);
    assert_null(weight_memory_take(SIZE_MAX - 5, "test", &total, &failure));
    assert_int_equal(failure.code, ERR_TOO_LARGE);
}

/* Packed in one process, used in another with lesser instructions. */
static void weights_travel_in_every_profile(void **state) {
    (void)state;
    static const enum profile PROFILES[] = {PROFILE_F32, PROFILE_BF16, PROFILE_FP8};
    const struct model_config *config = model_config(serial.model);
    uint8_t *image = malloc(engine_expert_image_limit(config));
    float *rows = calloc((size_t)2 * config->hidden, sizeof *rows);
    for (size_t p = 0; p < sizeof PROFILES / sizeof *PROFILES; p++) {
        struct failure failure;
        struct engine *engine[2] = {NULL, NULL};
        struct expert_weights *weights = NULL;
        struct engine_options options[2] = {options_for(ENGINE_EXPERT), options_for(ENGINE_EXPERT)};
        options[0].kernels = kernels_select(PROFILES[p], ISA_BEST, &failure);
        options[1].kernels = kernels_select(PROFILES[p], ISA_SCALAR, &failure);
        for (int i = 0; i < 2; i++)
            assert_int_equal(engine_open(&engine[i], serial.model, &options[i], &failure), 0);
        assert_int_equal(engine_expert_pack(serial.model, options[0].kernels, LAYER, 2, &weights, &failure), 0);
        engine_expert_publish(engine[0], LAYER, 2, &weights);
        uint64_t total = 1;
        for (uint64_t at = 0; at < total;) {
            struct program_result result;
            struct program read = {.kind = PROGRAM_READ, .layer = LAYER, .items = 2, .offset = at, .bytes = 4096};
            engine_run(engine[0], &read, &result);
            total = result.total;
            assert_true(result.piece_bytes > 0);
            memcpy(image + at, result.piece, result.piece_bytes);
            at += result.piece_bytes;
        }
        assert_int_equal(
            engine_expert_unpack(config, options[1].kernels, LAYER, 2, image, total, &weights, &failure), 0);
        engine_expert_publish(engine[1], LAYER, 2, &weights);
        for (uint32_t i = 0; i < 2 * config->hidden; i++) {
            const float value = (float)(i * 37 % 201) / 100 - 1;
            if (PROFILES[p] == PROFILE_F32)
                rows[i] = value;
            else
                ((bf16 *)(void *)rows)[i] = bf16_from_float(value);
        }
        const uint32_t item_row[2] = {0, 1};
        const struct frame_group group = {.expert = 2, .count = 2};
        const struct program program = {.kind = PROGRAM_EXPERT, .layer = LAYER, .rows = 2, .items = 2, .groups = 1,
                                        .group = &group, .item_row = item_row, .payload = rows};
        struct program_result result[2];
        for (int i = 0; i < 2; i++)
            engine_run(engine[i], &program, &result[i]);
        assert_memory_equal(result[0].output, result[1].output, (size_t)2 * config->hidden * sizeof(float));
        for (int i = 0; i < 2; i++)
            engine_close(&engine[i]);
    }
    free(rows);
    free(image);
}

static void experts_come_and_go(void **state) {
    (void)state;
    const struct engine_options options = options_for(ENGINE_EXPERT);
    struct engine *engine = NULL;
    struct failure failure;
    assert_int_equal(engine_open(&engine, serial.model, &options, &failure), 0);
    const uint64_t empty = engine_memory_bytes(engine);
    assert_false(engine_expert_held(engine, LAYER, 3));
    struct expert_weights *weights = NULL;
    assert_int_equal(
        engine_expert_pack(serial.model, options.kernels, LAYER, 3, &weights, &failure), 0);
    engine_expert_publish(engine, LAYER, 3, &weights);
    assert_null(weights);
    assert_true(engine_expert_held(engine, LAYER, 3));
    assert_false(engine_expert_held(engine, LAYER + 1, 3));
    const uint64_t one = engine_memory_bytes(engine);
    /* E4M3 stays one byte a weight */
    assert_true(one > empty && one - empty < 2 * 3 * 128 * 64);
    assert_int_equal(
        engine_expert_pack(serial.model, options.kernels, LAYER, 3, &weights, &failure), 0);
    engine_expert_publish(engine, LAYER, 3, &weights); /* takes the place of the first */
    assert_int_equal(engine_memory_bytes(engine), one);
    engine_expert_drop(engine, LAYER, 3);
    engine_expert_drop(engine, LAYER, 3);
    assert_false(engine_expert_held(engine, LAYER, 3));
    assert_int_equal(engine_memory_bytes(engine), empty);
    /* numbers from a frame */
    assert_false(engine_expert_held(engine, UINT32_MAX, 0));
    assert_false(engine_expert_held(engine, LAYER, UINT32_MAX));
    engine_close(&engine);
    static const uint32_t NONE[][2] = {{0, 0}, {LAYER, 16}, {3, 0}, {UINT32_MAX, UINT32_MAX}};
    for (int i = 0; i < 4; i++) {
        weights = NULL;
        assert_int_equal(engine_expert_pack(serial.model, options.kernels, NONE[i][0], NONE[i][1],
                                            &weights, &failure),
                         ERR_NOT_FOUND);
        assert_null(weights);
    }
}

/* Groups of one item, of more than a chunk, empty ones, an expert named twice, rows used often:
 * each output equals the one of its item alone. */
static void an_output_depends_on_its_item_only(void **state) {
    (void)state;
    static const struct frame_group GROUPS[][6] = {
        {{3, 130}, {5, 2}, {7, 1}},                            /* inside products */
        {{0, 20}, {1, 20}, {2, 13}, {4, 0}, {9, 20}, {3, 11}}, /* whole groups */
        {{6, 1}, {6, 1}, {6, 1}},
    };
    enum { ROWS = 40 };
    const uint32_t hidden = serial.config->hidden;
    uint64_t random = 31;
    bf16 *rows = malloc(ROWS * hidden * sizeof *rows);
    for (uint32_t i = 0; i < ROWS * hidden; i++)
        rows[i] = bf16_from_float(random_float(&random, -1, 1));
    for (size_t g = 0; g < sizeof GROUPS / sizeof *GROUPS; g++) {
        uint32_t groups = g == 1 ? 6 : 3, items = 0, item_row[160];
        for (uint32_t i = 0; i < groups; i++)
            items += GROUPS[g][i].count;
        for (uint32_t i = 0; i < items; i++)
            item_row[i] = random_below(&random, ROWS);
        struct program program = {.kind = PROGRAM_EXPERT,
                                  .layer = LAYER,
                                  .group = GROUPS[g],
                                  .groups = groups,
                                  .item_row = item_row,
                                  .items = items,
                                  .rows = ROWS,
                                  .payload = rows};
        struct program_result whole, parts, alone;
        engine_run(serial.expert, &program, &whole);
        engine_run(cut.expert, &program, &parts);
        size_t bytes = hidden * sizeof(float);
        assert_int_equal(whole.error, 0);
        assert_memory_equal(whole.output, parts.output, items * bytes);
        float *gathered = malloc(items * bytes);
        engine_gather(cut.expert, REGION_EXPERT_OUTPUT, 0, NULL, items, gathered);
        assert_memory_equal(gathered, whole.output, items * bytes);
        float *place = aligned_alloc(64, items * bytes + 64); /* the host's memory */
        memset(place, 0xff, items * bytes + 64);
        program.output = place, program.sum = true;
        engine_run(cut.expert, &program, &parts);
        assert_ptr_equal(parts.output, place);
        assert_memory_equal(place, gathered, items * bytes);
        assert_int_equal(*(uint8_t *)(place + (size_t)items * hidden), 0xff);
        assert_int_equal(parts.output_crc, crc32c(0, gathered, items * bytes));
        engine_gather(cut.expert, REGION_EXPERT_OUTPUT, 0, NULL, items, gathered);
        assert_memory_equal(place, gathered, items * bytes);
        free(place);
        program.output = NULL, program.sum = false;
        for (uint32_t i = 0, item = 0; i < groups; i++)
            for (uint32_t j = 0; j < GROUPS[g][i].count; j++, item++) {
                const struct frame_group one = {GROUPS[g][i].expert, 1};
                program.group = &one, program.groups = program.items = 1;
                program.item_row = &item_row[item];
                engine_run(serial.expert, &program, &alone);
                assert_memory_equal(alone.output, gathered + (size_t)item * hidden, bytes);
            }
        free(gathered);
    }
    free(rows);
}

/* The experts of a prediction layer are behind the main layers. */
static void experts_of_prediction_layers_can_be_packed(void **state) {
    (void)state;
    struct model_files files;
    struct model *model;
    struct failure failure;
    assert_true(model_files_read(&files, "models/demo"));
    assert_int_equal(model_open(&model, files.file, files.count, &failure), 0);
    struct expert_weights *weights = NULL;
    const struct kernels *kernels = kernels_select(PROFILE_F32, ISA_BEST, &failure);
    assert_int_equal(
        engine_expert_pack(model, kernels, model_config(model)->layers, 31, &weights, &failure), 0);
    engine_expert_free(&weights);
    assert_null(weights);
    model_close(&model);
    model_files_free(&files);
}

/* Runs EMBED and LAYER 0 and LAYER 1 of a new attention engine over eight rows. */
static const uint16_t *choose(struct engine *engine, uint32_t *ret_k) {
    struct batch_row row[8];
    struct program_result result;
    for (uint32_t p = 0; p < 8; p++)
        row[p] = one_process_row(&serial, 0, p, 3 + 5 * p, MLA_EXPANDED);
    struct program program = {.kind = PROGRAM_EMBED, .row = row, .rows = 8};
    engine_run(engine, &program, &result);
    assert_int_equal(result.error, 0);
    for (uint32_t l = 0; l <= LAYER; l++) {
        program = (struct program){.kind = PROGRAM_LAYER, .layer = l};
        engine_run(engine, &program, &result);
        assert_int_equal(result.rows, 8);
        assert_true((result.choice != NULL) == (l == LAYER));
    }
    *ret_k = result.k;
    return result.choice;
}

static void the_gate_takes_its_options(void **state) {
    (void)state;
    struct engine_options options = options_for(ENGINE_ATTENTION);
    options.pages = 16;
    struct engine *all = NULL, *fewer = NULL, *mass = NULL;
    struct failure failure;
    assert_int_equal(engine_open(&all, serial.model, &options, &failure), 0);
    options.experts_per_token_override = 2;
    assert_int_equal(engine_open(&fewer, serial.model, &options, &failure), 0);
    options.experts_per_token_override = 0;
    options.gate_top_p = 0.15f;
    assert_int_equal(engine_open(&mass, serial.model, &options, &failure), 0);
    uint32_t k, k_fewer, k_mass, unused = 0;
    const uint16_t *chosen = choose(all, &k), *two = choose(fewer, &k_fewer);
    const uint16_t *some = choose(mass, &k_mass);
    assert_int_equal(k, 4);
    assert_int_equal(k_fewer, 2);
    assert_int_equal(k_mass, 4);
    for (uint32_t r = 0; r < 8; r++) {
        assert_memory_equal(two + 2 * r, chosen + 4 * r, 2 * sizeof *two);
        for (uint32_t slot = 0; slot < 4; slot++) {
            unused += some[4 * r + slot] == GATE_UNUSED;
            assert_true(some[4 * r + slot] == chosen[4 * r + slot] ||
                        (slot > 0 && some[4 * r + slot] == GATE_UNUSED));
        }
    }
    printf("top-p 0.15 leaves %u of 32 slots unused\n", unused);
    assert_true(unused > 0 && unused < 32);
    /* slots left unused are not waited for */
    struct program program = {.kind = PROGRAM_SHARED, .layer = LAYER};
    struct program_result result;
    engine_run(mass, &program, &result);
    float *zeros = calloc(serial.config->hidden, sizeof *zeros);
    for (uint32_t i = 0; i < 32; i++)
        if (some[i] != GATE_UNUSED) {
            const uint32_t item_row = i / 4;
            const uint16_t item_slot = (uint16_t)(i % 4);
            program = (struct program){.kind = PROGRAM_SCATTER,
                                       .items = 1,
                                       .item_row = &item_row,
                                       .item_slot = &item_slot,
                                       .payload = zeros};
            engine_run(mass, &program, &result);
        }
    program = (struct program){.kind = PROGRAM_COMBINE, .layer = LAYER};
    engine_run(mass, &program, &result);
    free(zeros);
    engine_close(&all);
    engine_close(&fewer);
    engine_close(&mass);
}

/* Pieces cover the cache from its beginning without a gap, go no further than asked ahead of what rows
 * have reached, and end with it. */
static void memory_is_wanted_ahead_of_rows(void **state) {
    (void)state;
    struct failure failure;
    struct engine *engine = NULL;
    struct engine_options options = options_for(ENGINE_ATTENTION);
    options.pages = 40;
    assert_int_equal(engine_open(&engine, serial.model, &options, &failure), 0);
    const struct attention *a = engine->attention;
    const size_t page_bytes = (size_t)(cache_at(engine, 1, 0) - cache_at(engine, 0, 0));
    const uint32_t pages[] = {0, 20, 39}; /* that rows come to */
    size_t given = 0;
    assert_false(engine_cache_wants(serial.expert, 100));
    for (size_t i = 0; i < sizeof pages / sizeof *pages; i++) {
        const size_t used = i == 0 ? 0 : (pages[i] + 1) * page_bytes;
        const size_t all = 40 * page_bytes, ahead = 3 * page_bytes + 100;
        const size_t end = all - used < ahead ? all : used + ahead;
        if (i > 0) {
            const struct batch_row row = {.token = 1, .pages = &pages[i], .form = MLA_EXPANDED};
            assert_int_equal(attention_prepare_rows(engine, &row, 1), 0);
        }
        assert_true(engine_cache_wants(engine, ahead));
        void *memory;
        for (size_t bytes; (bytes = engine_cache_ahead(engine, ahead, &memory)) > 0; given += bytes) {
            assert_ptr_equal(memory, a->cache + given);
            assert_true(bytes <= (size_t)2 << 20);
        }
        assert_int_equal(given, end);
        assert_false(engine_cache_wants(engine, ahead));
    }
    engine_close(&engine);
}

/* Outputs are copied, or stay where they arrived until COMBINE, or are taken in before they go: the same rows. */
static void outputs_may_stay_where_they_arrived(void **state) {
    (void)state;
    enum { COPIED, STAYS, TAKEN_IN, HALF, WAYS };
    const uint32_t hidden = serial.config->hidden, ROWS = 8;
    struct engine_options options = options_for(ENGINE_ATTENTION);
    options.pages = 16;
    const size_t bytes = ROWS * hidden * sizeof(bf16);
    uint8_t *final[WAYS];
    for (int way = COPIED; way < WAYS; way++) {
        struct engine *engine = NULL;
        struct failure failure;
        struct program_result result;
        assert_int_equal(engine_open(&engine, serial.model, &options, &failure), 0);
        uint32_t k;
        choose(engine, &k);
        uint64_t random = 5;
        float *arrived = malloc(ROWS * k * hidden * sizeof *arrived);
        uint32_t item_row[8 * 8], items = ROWS * k;
        uint16_t item_slot[8 * 8];
        for (uint32_t i = 0; i < items; i++) {
            item_row[i] = i % ROWS;
            item_slot[i] = (uint16_t)(i / ROWS);
        }
        for (uint32_t i = 0; i < items * hidden; i++)
            arrived[i] = random_float(&random, -1, 1);
        struct program program = {.kind = PROGRAM_SHARED, .layer = LAYER};
        engine_run(engine, &program, &result);
        assert_false(engine_keeps(engine));
        for (uint32_t half = 0; half < 2; half++) {
            uint32_t first = half * items / 2;
            program = (struct program){.kind = PROGRAM_SCATTER,
                                       .items = items / 2,
                                       .item_row = item_row + first,
                                       .item_slot = item_slot + first,
                                       .payload = arrived + (size_t)first * hidden,
                                       .stays = way == STAYS || way == TAKEN_IN ||
                                                (way == HALF && half == 0)};
            engine_run(engine, &program, &result);
            assert_int_equal(engine_keeps(engine), way != COPIED);
        }
        if (way != STAYS) {
            engine_take_in(engine);
            assert_false(engine_keeps(engine));
            memset(arrived, 0xff, items * hidden * sizeof *arrived); /* gone */
        }
        program = (struct program){.kind = PROGRAM_COMBINE, .layer = LAYER};
        engine_run(engine, &program, &result);
        assert_false(engine_keeps(engine));
        memset(arrived, 0xff, items * hidden * sizeof *arrived);
        const uint32_t select[] = {0, 1, 2, 3, 4, 5, 6, 7};
        program = (struct program){.kind = PROGRAM_FINISH, .select = select, .items = ROWS};
        engine_run(engine, &program, &result);
        final[way] = malloc(bytes);
        engine_gather(engine, REGION_FINAL, 0, NULL, ROWS, final[way]);
        assert_memory_equal(final[way], final[COPIED], bytes);
        /* what is begun anew needs nothing of it any more */
        program = (struct program){.kind = PROGRAM_SCATTER,
                                   .items = items,
                                   .item_row = item_row,
                                   .item_slot = item_slot,
                                   .payload = arrived,
                                   .stays = true};
        engine_run(engine, &program, &result);
        assert_true(engine_keeps(engine));
        program = (struct program){.kind = PROGRAM_LAYER, .layer = LAYER};
        engine_run(engine, &program, &result);
        assert_false(engine_keeps(engine));
        free(arrived);
        engine_close(&engine);
    }
    for (int way = COPIED; way < WAYS; way++)
        free(final[way]);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(coded_experts_are_the_same_experts),
        cmocka_unit_test(impossible_options_are_refused),
        cmocka_unit_test(weights_share_regions),
        cmocka_unit_test(weights_travel_as_bytes),
        cmocka_unit_test(weights_travel_in_every_profile),
        cmocka_unit_test(experts_come_and_go),
        cmocka_unit_test(an_output_depends_on_its_item_only),
        cmocka_unit_test(experts_of_prediction_layers_can_be_packed),
        cmocka_unit_test(the_gate_takes_its_options),
        cmocka_unit_test(memory_is_wanted_ahead_of_rows),
        cmocka_unit_test(outputs_may_stay_where_they_arrived),
    };
    return cmocka_run_group_tests(tests, open_both, close_both);
}
