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
                        *logits = safetensors_find(file, "logits");
    ids = input->data;
    oracle = logits->data;
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
    };
    return cmocka_run_group_tests_name("cuda model", tests, open_oracle, NULL);
}
