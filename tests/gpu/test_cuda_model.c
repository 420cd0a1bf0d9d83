/* The demo model through engine/ with products and attention on the device: logits against the
 * oracle and the same bits however the sequence is cut. Emulated it goes through a short piece; on
 * a card through all of it. */
#include <math.h>

#include "kernels/cuda/table.h"
#include "tests/gpu/compare.h"
#include "tests/support/one_process.h"

#define DIRECTORY "models/demo"
enum { ROWS = 64, POSITIONS = 128 };

static struct one_process model;
static bool opened_fp8; /* its kernels */
static const int32_t *ids;  /* [sequences, length] */
static const float *oracle; /* [sequences, length, vocabulary] */
static const float *mtp_oracle; /* [sequences, length - 1, vocabulary] */
static uint32_t sequences, length;

static void run(uint32_t sequence, uint32_t first, uint32_t end, enum mla_form form,
                float *ret_logits) {
    static struct batch_row row[ROWS];
    static uint32_t select[ROWS];
    for (uint32_t p = first; p < end; p++) {
        row[p - first] =
            one_process_row(&model, sequence, p, (uint32_t)ids[sequence * length + p], form);
        select[p - first] = p - first;
    }
    one_process_step(&model, row, end - first, select, end - first, ret_logits);
}

static double divergence(const float *expected, const float *got, uint32_t n) {
    double max_e = -1e300, max_g = -1e300, sum_e = 0, sum_g = 0, ret = 0;
    for (uint32_t i = 0; i < n; i++) {
        max_e = fmax(max_e, (double)expected[i]);
        max_g = fmax(max_g, (double)got[i]);
    }
    for (uint32_t i = 0; i < n; i++) {
        sum_e += exp((double)expected[i] - max_e);
        sum_g += exp((double)got[i] - max_g);
    }
    for (uint32_t i = 0; i < n; i++) {
        const double le = (double)expected[i] - max_e - log(sum_e);
        ret += exp(le) * (le - ((double)got[i] - max_g - log(sum_g)));
    }
    return ret;
}

/* Prompt expanded, the rest absorbed; mean divergence from the oracle. */
static void golden(const char *profile, double most_divergence) {
    const uint32_t vocabulary = model.config->vocabulary;
    const uint32_t most = gpu_is_emulated() ? 1 : sequences;
    const uint32_t prompt = gpu_is_emulated() ? 7 : 40, end = gpu_is_emulated() ? 8 : 60;
    float *logits = malloc((size_t)ROWS * vocabulary * sizeof *logits);
    double sum = 0;
    uint32_t rows = 0;
    for (uint32_t s = 0; s < most; s++) {
        run(s, 0, prompt, MLA_EXPANDED, logits);
        run(s, prompt, end, MLA_ABSORBED, logits + (size_t)prompt * vocabulary);
        for (uint32_t p = 0; p < end; p++, rows++)
            sum += divergence(oracle + ((size_t)s * length + p) * vocabulary,
                              logits + (size_t)p * vocabulary, vocabulary);
        one_process_forget(&model, s);
    }
    print_message("golden: %s %s%s: mean divergence %.2g over %u positions\n", DIRECTORY, profile,
                  gpu_is_emulated() ? " (emulated)" : "", sum / rows, rows);
    assert_true(sum / rows <= most_divergence);
    free(logits);
}

static void test_golden_bf16(void **state) {
    golden("bf16-sm90", 1.4e-3);
}
static void test_golden_fp8(void **state) {
    golden("fp8-sm90", 2e-2); /* activations of 4 bits of mantissa; the CPU's own measure is open */
}

static void test_golden_latent_fp8(void **state) {
    golden("fp8-sm90, latents in FP8", 2e-2);
}

/* The same tokens in other chunks, beside another sequence, and replayed. */
static void test_identity(void **state) {
    const uint32_t vocabulary = model.config->vocabulary;
    const uint32_t prompt = gpu_is_emulated() ? 3 : 40, end = gpu_is_emulated() ? 5 : 60;
    float *whole = malloc((size_t)ROWS * vocabulary * sizeof *whole);
    float *parts = malloc((size_t)ROWS * vocabulary * sizeof *parts);
    run(1, 0, prompt, MLA_EXPANDED, whole);
    for (uint32_t p = prompt; p < end; p++)
        run(1, p, p + 1, MLA_ABSORBED, whole + (size_t)p * vocabulary);
    one_process_forget(&model, 1);
    const uint32_t chunk = gpu_is_emulated() ? 2 : 7;
    for (uint32_t p = 0; p < prompt; p += chunk)
        run(1, p, p + chunk < prompt ? p + chunk : prompt, MLA_EXPANDED,
            parts + (size_t)p * vocabulary);
    run(1, prompt, end, MLA_ABSORBED, parts + (size_t)prompt * vocabulary); /* a replay */
    one_process_forget(&model, 1);
    for (uint32_t p = 0; p < end; p++)
        if (memcmp(whole + (size_t)p * vocabulary, parts + (size_t)p * vocabulary,
                   vocabulary * sizeof *whole) != 0)
            fail_msg("position %u has other bits in other chunks", p);
    print_message("identity: %u positions, whole, in chunks of %u and replayed: the same bits\n",
                  end, chunk);
    free(whole), free(parts);
}

/* ---- The MTP module (engine/draft.c) with the device's products and attention ---- */

enum { GUESSES = 8, STEPS = 2 }; /* rows whose logits are kept; one_process's guesses of a row */

/* Rows of sequences 1 and on from first to end - 1 through the main layers; their first is row 0 of
 * the slot. */
static void through_layers(struct one_process *m, uint32_t beside, uint32_t first, uint32_t end) {
    struct batch_row row[ROWS];
    uint32_t rows = 0;
    for (uint32_t s = 1; s <= 1 + beside; s++)
        for (uint32_t p = first; p < end; p++)
            row[rows++] =
                one_process_row(m, s, p, (uint32_t)ids[(s - 1) * length + p], MLA_EXPANDED);
    one_process_step(m, row, rows, NULL, 0, NULL);
}

static struct program_result draft(struct one_process *m, const struct draft_row *row,
                                   uint32_t rows) {
    struct sample_spec spec[GUESSES];
    for (uint32_t i = 0; i < GUESSES; i++)
        spec[i] = (struct sample_spec){.top_p = 1, .repetition_penalty = 1}; /* greedy */
    struct program program = {.kind = PROGRAM_DRAFT, .draft = row, .items = rows, .spec = spec};
    struct program_result result;
    engine_run(m->attention, &program, &result);
    assert_int_equal(result.error, 0);
    return result;
}

/* A guess after each position: near the oracle, and the CPU's of the same profile unless that has
 * the device's guess within `margin` of its own best. */
static void mtp_golden(const char *profile, enum profile cpu_profile, double most_divergence,
                       float margin) {
    struct one_process cpu;
    struct failure failure;
    const uint32_t n = model.config->vocabulary, end = gpu_is_emulated() ? 8 : length - 1;
    assert_true(one_process_open(&cpu, DIRECTORY, kernels_select(cpu_profile, ISA_BEST, &failure),
                                 &PARALLEL_SERIAL, ROWS, POSITIONS));
    through_layers(&model, 0, 0, end);
    through_layers(&cpu, 0, 0, end);
    double sum = 0;
    uint32_t same = 0;
    for (uint32_t first = 0; first < end; first += GUESSES) {
        struct draft_row row[GUESSES];
        const uint32_t rows = end - first < GUESSES ? end - first : GUESSES;
        for (uint32_t i = 0; i < rows; i++)
            row[i] = (struct draft_row){first + i, (uint32_t)ids[first + i + 1], 1};
        const struct program_result ours = draft(&model, row, rows), its = draft(&cpu, row, rows);
        for (uint32_t i = 0; i < rows; i++) {
            const float *own = ours.output + (size_t)i * n, *other = its.output + (size_t)i * n;
            const uint32_t guess = ours.words[i * STEPS], its_guess = its.words[i * STEPS];
            sum += divergence(mtp_oracle + (size_t)(first + i) * n, own, n);
            same += guess == its_guess;
            assert_true(other[its_guess] - other[guess] <= margin);
            for (uint32_t v = 0; v < n; v++) /* drawn from the device's own logits */
                assert_true(own[v] <= own[guess]);
        }
    }
    print_message("MTP: %s: mean divergence %.2g, %u of %u guesses are the CPU's\n", profile,
                  sum / end, same, end);
    assert_true(sum / end <= most_divergence);
    one_process_forget(&model, 1);
    one_process_close(&cpu);
}

static void test_mtp_bf16(void **state) {
    mtp_golden("bf16-sm90", PROFILE_BF16, 2e-3, 0.05f);
}
static void test_mtp_fp8(void **state) {
    mtp_golden("fp8-sm90", PROFILE_FP8, 3e-2, 0.5f);
}

/* Two guesses in a row: whatever the chunks, whoever is beside, whether rows were remembered
 * together or one by one; and the main layers go on as if nobody had guessed. */
static void test_mtp_identity(void **state) {
    enum { END = 3, CUT = 2 };
    const uint32_t n = model.config->vocabulary;
    float *logits = malloc(n * sizeof *logits), *after[3];
    uint32_t guess[2] = {0, 0};
    for (uint32_t turn = 0; turn < 3; turn++) { /* whole; in two, another beside; no guesses */
        const uint32_t beside = turn == 1, cut = turn == 1 ? CUT : 0;
        struct draft_row known[ROWS];
        uint32_t count = 0;
        gpu_schedule(turn + 1);
        for (uint32_t first = 0; first < END; first = first < cut ? cut : END) {
            const uint32_t end = first < cut ? cut : END, rows = end - first;
            through_layers(&model, beside, first, end);
            count = 0;
            for (uint32_t s = 0; s <= beside; s++)
                for (uint32_t p = first; p < end; p++)
                    if (p + 1 < END)
                        known[count++] = (struct draft_row){s * rows + p - first,
                                                            (uint32_t)ids[s * length + p + 1], 0};
            for (uint32_t s = 0; end == END && s <= beside; s++)
                known[count++] =
                    (struct draft_row){s * rows + rows - 1, (uint32_t)ids[s * length + END], 2};
            if (turn == 2)
                continue;
            const struct program_result result = draft(&model, known, count);
            if (end < END)
                continue;
            if (turn == 0) {
                memcpy(guess, result.words, sizeof guess);
                memcpy(logits, result.output, n * sizeof *logits);
            }
            assert_memory_equal(guess, result.words, sizeof guess);
            assert_memory_equal(logits, result.output, n * sizeof *logits);
        }
        after[turn] = malloc(n * sizeof *after[turn]);
        const struct batch_row next =
            one_process_row(&model, 1, END, (uint32_t)ids[END], MLA_ABSORBED);
        one_process_step(&model, &next, 1, (uint32_t[]){0}, 1, after[turn]);
        assert_memory_equal(after[0], after[turn], n * sizeof *after[turn]);
        one_process_forget(&model, 1);
        one_process_forget(&model, 2);
    }
    for (uint32_t turn = 0; turn < 3; turn++)
        free(after[turn]);
    free(logits);
}

/* Rows that are quantised before they go to experts: the same logits. */
static void test_rows_in_e4m3(void **state) {
    const uint32_t vocabulary = model.config->vocabulary, end = gpu_is_emulated() ? 3 : 40;
    float *plain = malloc((size_t)ROWS * vocabulary * sizeof *plain);
    float *e4m3 = malloc((size_t)ROWS * vocabulary * sizeof *e4m3);
    run(1, 0, end, MLA_EXPANDED, plain);
    one_process_forget(&model, 1);
    one_process_use_e4m3_rows(true);
    run(1, 0, end, MLA_EXPANDED, e4m3);
    one_process_use_e4m3_rows(false);
    one_process_forget(&model, 1);
    assert_memory_equal(plain, e4m3, (size_t)end * vocabulary * sizeof *plain);
    free(plain), free(e4m3);
}

/* Weights of one device, read in pieces and put on another: the image's sum is right, rows come out with
 * the same bits, what is cut short is refused, and a device without room says so. */
static void test_weights_move(void **state) {
    const struct model_config *c = model.config;
    const uint32_t layer = c->layers - 1, hidden = c->hidden;
    struct failure failure;
    uint8_t *image = malloc(engine_expert_image_limit(c));
    uint64_t total = 1;
    uint32_t crc = 0;
    for (uint64_t at = 0; at < total;) {
        struct program_result result;
        struct program read = {
            .kind = PROGRAM_READ, .layer = layer, .items = 2, .offset = at, .bytes = 7777};
        engine_run(model.expert, &read, &result);
        total = result.total;
        crc = result.crc;
        assert_true(result.piece_bytes > 0 && total <= engine_expert_image_limit(c));
        memcpy(image + at, result.piece, result.piece_bytes);
        at += result.piece_bytes;
    }
    assert_int_equal(crc32c(0, image, total), crc);
    const struct kernels *kernels = kernels_cuda("sm90", opened_fp8, &failure);
    struct engine_options options = {.role = ENGINE_EXPERT,
                                     .kernels = kernels,
                                     .parallel = PARALLEL_SERIAL,
                                     .batch_rows = 8};
    struct engine *engine = NULL;
    struct expert_weights *weights = NULL;
    assert_int_equal(engine_open(&engine, model.model, &options, &failure), 0);
    assert_true(engine_expert_unpack(c, kernels, layer, 2, image, total - 4, &weights, &failure) < 0);
    assert_int_equal(engine_expert_unpack(c, kernels, layer, 2, image, total, &weights, &failure), 0);
    const uint64_t before = engine_memory_bytes(engine);
    engine_expert_publish(engine, layer, 2, &weights);
    assert_true(engine_memory_bytes(engine) - before >= total - 64); /* what lies on the device counts */
    bf16 *rows = malloc(2 * hidden * sizeof *rows);
    for (uint32_t i = 0; i < 2 * hidden; i++)
        rows[i] = bf16_from_float((float)(i * 37 % 201) / 100 - 1);
    const struct frame_group group = {.expert = 2, .count = 2};
    const struct program program = {.kind = PROGRAM_EXPERT, .layer = layer, .rows = 2, .items = 2,
                                    .groups = 1, .group = &group, .item_row = (uint32_t[]){0, 1},
                                    .payload = rows};
    struct program_result first, second;
    engine_run(model.expert, &program, &first);
    engine_run(engine, &program, &second);
    assert_memory_equal(first.output, second.output, 2 * hidden * sizeof(float));
    if (gpu_is_emulated()) {
        device_pretend_cuda(512ull << 20);
        assert_int_equal(
            engine_expert_unpack(c, kernels, layer, 2, image, total, &weights, &failure),
            ERR_NO_MEMORY);
        assert_non_null(strstr(failure.text, "weights of an expert need"));
        assert_non_null(strstr(failure.text, "512 of"));
        assert_int_equal(engine_expert_pack(model.model, kernels, layer, 2, &weights, &failure),
                         ERR_NO_MEMORY);
        device_pretend_cuda(1ull << 40);
    }
    engine_close(&engine);
    free(rows), free(image);
}

/* What a role needs is known before it is loaded: no less than what it then holds there. */
static void test_memory_is_told_before(void **state) {
    struct failure failure;
    struct engine_options options = {.role = ENGINE_ATTENTION,
                                     .kernels = kernels_cuda("sm90", false, &failure),
                                     .parallel = PARALLEL_SERIAL,
                                     .batch_rows = 4,
                                     .batch_slots = 1,
                                     .pages = 2,
                                     .mtp_steps = 2};
    for (int role = ENGINE_ATTENTION; role <= ENGINE_SAMPLER; role++) {
        options.role = (enum engine_role)role;
        const uint64_t told = engine_device_bytes(model.model, &options);
        struct engine *engine = NULL;
        assert_int_equal(engine_open(&engine, model.model, &options, &failure), 0);
        const uint64_t holds = engine_memory_bytes(engine);
        engine_close(&engine);
        options.kernels = kernels_select(PROFILE_BF16, ISA_BEST, &failure);
        assert_int_equal(engine_device_bytes(model.model, &options), 0); /* no device */
        options.kernels = kernels_cuda("sm90", false, &failure);
        assert_true(told > 0);
        if (role != ENGINE_EXPERT)
            assert_true(holds > told - (1 << 20)); /* the report has the weights of the device in it */
    }
}

static int open_oracle(void **state) {
    if (device_name(state) != 0)
        return -1;
    struct failure failure;
    size_t size;
    void *bytes = read_whole_file(DIRECTORY "/golden.safetensors", &size);
    struct safetensors *file;
    if (bytes == NULL || safetensors_open(&file, bytes, size, "golden", &failure) != 0)
        return -1;
    const struct tensor *input = safetensors_find(file, "input_ids"),
                        *logits = safetensors_find(file, "logits"),
                        *mtp_logits = safetensors_find(file, "mtp_logits");
    ids = input->data;
    oracle = logits->data;
    mtp_oracle = mtp_logits->data;
    sequences = (uint32_t)input->shape[0];
    length = (uint32_t)input->shape[1];
    return 0;
}

static int open_model(bool fp8) {
    struct failure failure;
    opened_fp8 = fp8;
    const struct kernels *kernels = kernels_cuda("sm90", fp8, &failure);
    return kernels != NULL &&
                   one_process_open(&model, DIRECTORY, kernels, &PARALLEL_SERIAL, ROWS, POSITIONS)
               ? 0
               : -1;
}
static int open_bf16(void **state) {
    return open_model(false);
}
static int open_fp8(void **state) {
    return open_model(true);
}
static int open_latent_fp8(void **state) {
    one_process_use_latent_fp8(true);
    const int error = open_model(true);
    one_process_use_latent_fp8(false);
    return error;
}
static int close_model(void **state) {
    one_process_close(&model);
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_golden_bf16, open_bf16, close_model),
        cmocka_unit_test_setup_teardown(test_golden_fp8, open_fp8, close_model),
        cmocka_unit_test_setup_teardown(test_golden_latent_fp8, open_latent_fp8, close_model),
        cmocka_unit_test_setup_teardown(test_rows_in_e4m3, open_fp8, close_model),
        cmocka_unit_test_setup_teardown(test_weights_move, open_fp8, close_model),
        cmocka_unit_test_setup_teardown(test_weights_move, open_bf16, close_model),
        cmocka_unit_test_setup_teardown(test_memory_is_told_before, open_bf16, close_model),
        cmocka_unit_test_setup_teardown(test_identity, open_fp8, close_model),
        cmocka_unit_test_setup_teardown(test_identity, open_latent_fp8, close_model),
        cmocka_unit_test_setup_teardown(test_mtp_bf16, open_bf16, close_model),
        cmocka_unit_test_setup_teardown(test_mtp_fp8, open_fp8, close_model),
        cmocka_unit_test_setup_teardown(test_mtp_identity, open_latent_fp8, close_model),
    };
    return cmocka_run_group_tests_name("cuda model", tests, open_oracle, NULL);
}
