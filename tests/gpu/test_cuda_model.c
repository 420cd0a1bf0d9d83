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
        cmocka_unit_test_setup_teardown(test_identity, open_fp8, close_model),
        cmocka_unit_test_setup_teardown(test_identity, open_latent_fp8, close_model),
    };
    return cmocka_run_group_tests_name("cuda model", tests, open_oracle, NULL);
}
