/* make bench-gpu, second part: a decode step that stays on the card (engine/cuda/step.h), for
 * Moonlight-16B's shape and for one layer of DeepSeek-V3's, with random weights. For each number of
 * rows: time and tokens per second, kernels launched one by one and as a graph; what the launches
 * cost; and in two micro-batches.
 *
 *   direct   from the first launch to the end, launched one by one
 *   host     the host's time for these launches: where it is the longer, the card waits for it
 *   held     the same with all launches enqueued before the first may run: no gap is the host's
 *   graph    one launch of the captured step
 *   gap      (direct - held) / launches, and (graph - held) / launches
 *
 * It has not run on a card yet (docs/gpu.md). */
#include <cuda_runtime_api.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "engine/cuda/step_internal.h"

enum { REPEATS = 15, WARM = 3, CONTEXT = 4096, PAGES_EACH = CONTEXT / PAGE_TOKENS };
#define BLOCK_BYTES  (64u << 20)
#define LAUNCHES_MAX 1000u /* more than a stream takes before it must begin */

static void check(int error, const char *what) {
    if (error == 0)
        return;
    fprintf(stderr, "%s: %s\n", what, cudaGetErrorString((cudaError_t)error));
    exit(1);
}

/* ---- Random weights ---- */

static uint64_t random_state = 1;
static uint32_t draw(void) { /* SplitMix64 */
    uint64_t z = (random_state += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return (uint32_t)(z >> 32);
}

/* Patterns on the card that matrices are filled from, each from another place. */
static void *bf16_block, *e4m3_block;

static void make_blocks(void) {
    bf16 *narrow = malloc(BLOCK_BYTES);
    uint8_t *bytes = malloc(BLOCK_BYTES);
    ASSERT(narrow != NULL && bytes != NULL);
    for (size_t i = 0; i < BLOCK_BYTES / 2; i++)
        narrow[i] = bf16_from_float(((float)(draw() >> 8) / 8388608.0f - 1.0f) * 0.03f);
    for (size_t i = 0; i < BLOCK_BYTES; i++)
        bytes[i] = (uint8_t)(draw() & 0xbf); /* up to 1.875 */
    check(cudaMalloc(&bf16_block, BLOCK_BYTES), "memory");
    check(cudaMalloc(&e4m3_block, BLOCK_BYTES), "memory");
    check(cudaMemcpy(bf16_block, narrow, BLOCK_BYTES, cudaMemcpyHostToDevice), "fill");
    check(cudaMemcpy(e4m3_block, bytes, BLOCK_BYTES, cudaMemcpyHostToDevice), "fill");
    free(narrow);
    free(bytes);
}

static void fill(const void *memory, size_t bytes, const void *block) {
    for (size_t done = 0; done < bytes;) {
        const size_t from = draw() % (BLOCK_BYTES / 4096) * 4096, room = BLOCK_BYTES - from;
        const size_t part = bytes - done < room ? bytes - done : room;
        check(cudaMemcpy((uint8_t *)memory + done, (const uint8_t *)block + from, part,
                         cudaMemcpyDeviceToDevice),
              "fill");
        done += part;
    }
}

static void fill_floats(const void *memory, size_t count, float value) {
    float *values = malloc(count * sizeof *values);
    ASSERT(values != NULL);
    for (size_t i = 0; i < count; i++)
        values[i] = value;
    check(cudaMemcpy((void *)memory, values, count * sizeof *values, cudaMemcpyHostToDevice),
          "fill");
    free(values);
}

static void *device_taken[4096];
static uint32_t device_takes;
static void *take(size_t bytes) {
    void *memory = NULL;
    check(cudaMalloc(&memory, bytes > 0 ? bytes : 1), "memory");
    ASSERT(device_takes < sizeof device_taken / sizeof *device_taken);
    device_taken[device_takes++] = memory;
    return memory;
}
static float *ones(size_t count) {
    float *ret = take(count * sizeof(float));
    fill_floats(ret, count, 1);
    return ret;
}

static struct step_matrix matrix(uint32_t groups, uint32_t n, uint32_t k, bool fp8) {
    struct step_matrix ret = {.n = n, .k = k, .stride = up_to(k, fp8 ? 128 : 32)};
    const size_t bytes = (size_t)groups * n * ret.stride * (fp8 ? 1 : 2);
    void *data = take(bytes);
    fill(data, bytes, fp8 ? e4m3_block : bf16_block);
    ret.data = data;
    if (fp8) {
        const size_t scales = (size_t)groups * (up_to(n, 128) / 128) * (ret.stride / 128);
        ret.scales = take(scales * sizeof(float));
        fill_floats(ret.scales, scales, 0.02f);
    }
    return ret;
}

struct shape {
    const char *name;
    uint32_t layers, dense, hidden, heads, q_lora, dense_width, width, shared, experts, k, groups,
        groups_chosen, vocabulary;
    bool fp8;
};
static const struct shape SHAPES[] = {
    /* config/shapes/moonlight-16b.json, deepseek-v3-1layer.json */
    {"Moonlight-16B, bf16", 27, 1, 2048, 16, 0, 11264, 1408, 2, 64, 6, 1, 1, 163840, false},
    {"DeepSeek-V3, one layer, fp8", 1, 0, 7168, 128, 1536, 18432, 2048, 1, 256, 8, 8, 4, 129280,
     true},
};

static void make_model(struct step_model *m, const struct shape *s) {
    *m = (struct step_model){.layers = s->layers,
                             .hidden = s->hidden,
                             .heads = s->heads,
                             .nope = 128,
                             .rope = 64,
                             .v = 128,
                             .kv_lora = 512,
                             .vocabulary = s->vocabulary,
                             .context = CONTEXT,
                             .expert_width = s->width,
                             .mlp_width = s->dense > 0 ? s->dense_width : s->shared * s->width,
                             .expert_fp8 = s->fp8,
                             .norm_eps = 1e-6f,
                             .softmax_scale = 0.0722f};
    m->gate = (struct gate_cuda){.normalise = true,
                                 .experts = s->experts,
                                 .groups = s->groups,
                                 .groups_chosen = s->groups_chosen,
                                 .k = s->k,
                                 .scaling = 2.5f};
    m->layer = calloc(s->layers, sizeof *m->layer);
    for (uint32_t l = 0; l < s->layers; l++) {
        struct step_layer *to = &m->layer[l];
        const uint32_t q = s->heads * 192, in = s->q_lora != 0 ? s->q_lora : s->hidden;
        to->moe = l >= s->dense;
        const uint32_t mlp = to->moe ? s->shared * s->width : s->dense_width;
        to->input_norm = ones(s->hidden);
        to->post_norm = ones(s->hidden);
        to->kv_a_norm = ones(512);
        if (s->q_lora != 0) {
            to->q_a = matrix(1, s->q_lora, s->hidden, s->fp8);
            to->q_a_norm = ones(s->q_lora);
        }
        to->q_b = matrix(1, q, in, s->fp8);
        to->kv_a = matrix(1, 576, s->hidden, s->fp8);
        to->o = matrix(1, s->hidden, s->heads * 128, s->fp8);
        to->w_uk = matrix(s->heads, 512, 128, false);
        to->w_uv = matrix(s->heads, 128, 512, false);
        to->mlp_gate = matrix(1, mlp, s->hidden, s->fp8);
        to->mlp_up = matrix(1, mlp, s->hidden, s->fp8);
        to->mlp_down = matrix(1, s->hidden, mlp, s->fp8);
        if (to->moe)
            to->gate = matrix(1, s->experts, s->hidden, false);
    }
    const struct step_matrix embedding = matrix(1, s->vocabulary, s->hidden, false);
    m->embedding = embedding.data;
    m->embedding_stride = embedding.stride;
    m->final_norm = ones(s->hidden);
    m->cos_sin = ones((size_t)CONTEXT * 64);
    m->head = matrix(1, s->vocabulary, s->hidden, false);
}

static void fill_experts(struct step *step) {
    const struct step_model *m = step->model;
    for (uint32_t l = 0; l < m->layers; l++) {
        const struct step_stack *stack = &step->group[0].stack[l];
        const struct step_matrix *const parts[2] = {&stack->gate_up, &stack->down};
        for (int i = 0; m->layer[l].moe && i < 2; i++) {
            const struct step_matrix *part = parts[i];
            fill(part->data,
                 (size_t)m->gate.experts * part->n * part->stride * (m->expert_fp8 ? 1 : 2),
                 m->expert_fp8 ? e4m3_block : bf16_block);
            if (m->expert_fp8)
                fill_floats(part->scales,
                            (size_t)m->gate.experts * (up_to(part->n, 128) / 128) *
                                (part->stride / 128),
                            0.02f);
        }
        for (uint32_t e = 0; m->layer[l].moe && e < m->gate.experts; e++)
            step_place(step, l, e, 0, e);
    }
}

/* ---- Timing ---- */

static double now_us(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e6 + (double)now.tv_nsec * 1e-3;
}

static int by_value(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}
static double median(double *values) {
    qsort(values, REPEATS, sizeof *values, by_value);
    return values[REPEATS / 2];
}

static atomic_bool released;
static void hold(void *argument) {
    (void)argument;
    while (!atomic_load(&released))
        continue;
}

struct timing {
    double step_us, host_us;
};

/* held: nothing runs before everything is enqueued. */
static struct timing time_step(struct step *step, const struct step_row *row, uint32_t rows,
                               bool held) {
    double step_us[REPEATS], host_us[REPEATS];
    cudaEvent_t begin, end;
    cudaStream_t stream = step_stream(step);
    check(cudaEventCreate(&begin), "event");
    check(cudaEventCreate(&end), "event");
    for (int i = -WARM; i < REPEATS; i++) {
        struct step_result result;
        float ms = 0;
        atomic_store(&released, !held);
        if (held)
            check(cudaLaunchHostFunc(stream, hold, NULL), "hold");
        check(cudaEventRecord(begin, stream), "event");
        const double before = now_us();
        check(step_begin(step, row, rows), "step");
        const double after = now_us();
        check(cudaEventRecord(end, stream), "event");
        atomic_store(&released, true);
        check(step_end(step, &result), "step");
        check(cudaEventElapsedTime(&ms, begin, end), "time");
        for (uint32_t r = 0; r < rows; r++)
            ASSERT(result.lost[r] == 0);
        if (i >= 0) {
            step_us[i] = 1000.0 * (double)ms;
            host_us[i] = after - before;
        }
    }
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    return (struct timing){median(step_us), median(host_us)};
}

static void measure(struct step *step, uint32_t rows, uint32_t micro) {
    static struct step_row row[256];
    static uint32_t pages[256][PAGES_EACH];
    for (uint32_t r = 0; r < rows; r++) {
        for (uint32_t p = 0; p < PAGES_EACH; p++)
            pages[r][p] = r * PAGES_EACH + p;
        row[r] = (struct step_row){draw() % step->model->vocabulary, CONTEXT - 1, pages[r],
                                   STEP_NO_BIAS};
    }
    step->options.micro = micro;
    step->options.graphs = true;
    const struct timing graph = time_step(step, row, rows, false);
    const uint32_t launches = step_graph_nodes(step);
    step->options.graphs = false;
    const struct timing direct = time_step(step, row, rows, false);
    char held_text[64] = "       -        -        -";
    if (launches < LAUNCHES_MAX) {
        const double held = time_step(step, row, rows, true).step_us;
        snprintf(held_text, sizeof held_text, "%8.1f %8.2f %8.2f", held,
                 (direct.step_us - held) / launches, (graph.step_us - held) / launches);
    }
    printf("%5u %6u %9u %9.1f %9.1f %9.1f %9.0f %s\n", rows, micro, launches, direct.step_us,
           direct.host_us, graph.step_us, rows / graph.step_us * 1e6, held_text);
}

int main(void) {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        fprintf(stderr, "there is no CUDA device\n");
        return 1;
    }
    struct cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, 0), "device");
    printf("%s; decode steps, %u positions each, LM head included, random weights; times in us\n",
           properties.name, CONTEXT);
    make_blocks();
    for (size_t i = 0; i < sizeof SHAPES / sizeof *SHAPES; i++) {
        struct step_model model;
        struct step *step;
        struct failure failure;
        make_model(&model, &SHAPES[i]);
        const struct step_options options = {.dispatch =
                                                 SHAPES[i].fp8 ? DISPATCH_E4M3 : DISPATCH_BF16,
                                             .rows = 128,
                                             .micro = 2,
                                             .groups = 1,
                                             .slots = SHAPES[i].experts,
                                             .pages = 128 * PAGES_EACH,
                                             .positions = CONTEXT,
                                             .graphs = true};
        if (step_open(&step, &model, &options, &failure) != 0) {
            fprintf(stderr, "%s: %s\n", SHAPES[i].name, failure.text);
            return 1;
        }
        fill_experts(step);
        printf("\n%s\n%5s %6s %9s %9s %9s %9s %9s %8s %8s %8s\n", SHAPES[i].name, "rows", "micro",
               "launches", "direct", "host", "graph", "tokens/s", "held", "gap", "gap graph");
        for (uint32_t rows = 1; rows <= 128; rows *= rows < 8 ? 8 : 2) {
            measure(step, rows, 1);
            if (rows >= 8)
                measure(step, rows, 2);
        }
        step_close(&step);
        for (uint32_t n = 0; n < device_takes; n++)
            cudaFree(device_taken[n]);
        device_takes = 0;
        free(model.layer);
    }
    return 0;
}
