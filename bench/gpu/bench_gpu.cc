/* make bench-gpu: our kernels on a card beside cuBLASLt where it has the same operation, as times,
 * as ratios and as shares of what the card was measured to do. Each figure is the median of REPEATS
 * single launches with the L2 cache flushed before each, so weights come from memory as in serving.
 * Then one decode layer's kernels one by one against the same in a CUDA graph.
 *
 * It has not run on a card yet (docs/gpu.md). */
#include <cublasLt.h>
#include <cuda_runtime.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "kernels/cuda/cuda_ops.h"
#include "kernels/latent.h"

namespace {

enum { REPEATS = 21, WARM = 3 };
constexpr size_t FLUSH_BYTES = 256u << 20, WORKSPACE_BYTES = 64u << 20;

void check(int error, const char *what) {
    if (error == 0)
        return;
    fprintf(stderr, "%s: %s\n", what, cudaGetErrorString((cudaError_t)error));
    exit(1);
}

/* Filled with a pattern that is finite in FP32, BF16 and E4M3. */
void *device(size_t bytes) {
    void *memory = NULL;
    check(cudaMalloc(&memory, bytes), "memory");
    check(cudaMemset(memory, 0x31, bytes), "fill");
    return memory;
}

struct card {
    cudaStream_t stream;
    cudaEvent_t begin, end;
    void *flush;
    double bytes_per_s, bf16_flops; /* measured */
    cublasLtHandle_t cublas;
    void *workspace;
};

double median_us(card &c, const std::function<int()> &work) {
    std::vector<float> ms;
    for (int i = 0; i < REPEATS + WARM; i++) {
        float once = 0;
        check(cudaMemsetAsync(c.flush, i, FLUSH_BYTES, c.stream), "flush");
        check(cudaEventRecord(c.begin, c.stream), "event");
        check(work(), "launch");
        check(cudaEventRecord(c.end, c.stream), "event");
        check(cudaEventSynchronize(c.end), "run");
        check(cudaEventElapsedTime(&once, c.begin, c.end), "time");
        if (i >= WARM)
            ms.push_back(once);
    }
    std::sort(ms.begin(), ms.end());
    return 1000.0 * (double)ms[ms.size() / 2];
}

/* ---- cuBLASLt ---- */

/* y [rows, n] = x [rows, k] w [n, k]^T; FP8 with 1 x 128 and 128 x 128 scales, or BF16. A negative
 * time: it offers nothing for the shape. */
double cublas_us(card &c, bool fp8, uint32_t rows, uint32_t n, uint32_t k, const void *x,
                 const void *w, void *y, const float *x_scale, const float *w_scale) {
    cublasLtMatmulDesc_t operation;
    cublasLtMatrixLayout_t a, b, d;
    cublasLtMatmulPreference_t preference;
    const cudaDataType type = fp8 ? CUDA_R_8F_E4M3 : CUDA_R_16BF;
    const cublasOperation_t transposed = CUBLAS_OP_T;
    const size_t workspace = WORKSPACE_BYTES;
    cublasLtMatmulDescCreate(&operation, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    cublasLtMatmulDescSetAttribute(operation, CUBLASLT_MATMUL_DESC_TRANSA, &transposed,
                                   sizeof transposed);
    if (fp8) {
        const int32_t w_mode = CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F,
                      x_mode = CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F;
        cublasLtMatmulDescSetAttribute(operation, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &w_mode,
                                       sizeof w_mode);
        cublasLtMatmulDescSetAttribute(operation, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &x_mode,
                                       sizeof x_mode);
        cublasLtMatmulDescSetAttribute(operation, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &w_scale,
                                       sizeof w_scale);
        cublasLtMatmulDescSetAttribute(operation, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &x_scale,
                                       sizeof x_scale);
    }
    cublasLtMatrixLayoutCreate(&a, type, k, n, k);
    cublasLtMatrixLayoutCreate(&b, type, k, rows, k);
    cublasLtMatrixLayoutCreate(&d, CUDA_R_32F, n, rows, n);
    cublasLtMatmulPreferenceCreate(&preference);
    cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                         &workspace, sizeof workspace);
    cublasLtMatmulHeuristicResult_t found[1];
    int count = 0;
    const cublasStatus_t asked = cublasLtMatmulAlgoGetHeuristic(c.cublas, operation, a, b, d, d,
                                                                preference, 1, found, &count);
    double ret = -1;
    if (asked == CUBLAS_STATUS_SUCCESS && count > 0) {
        const float one = 1, zero = 0;
        ret = median_us(c, [&] {
            return cublasLtMatmul(c.cublas, operation, &one, w, a, x, b, &zero, y, d, y, d,
                                  &found[0].algo, c.workspace, WORKSPACE_BYTES,
                                  c.stream) == CUBLAS_STATUS_SUCCESS
                       ? 0
                       : (int)cudaErrorUnknown;
        });
    }
    cublasLtMatmulPreferenceDestroy(preference);
    cublasLtMatrixLayoutDestroy(a);
    cublasLtMatrixLayoutDestroy(b);
    cublasLtMatrixLayoutDestroy(d);
    cublasLtMatmulDescDestroy(operation);
    return ret;
}

/* ---- What the card can do ---- */

void measure_limits(card &c) {
    const size_t bytes = 2ull << 30;
    void *from = device(bytes), *to = device(bytes);
    const double copy_us = median_us(c, [&] {
        return (int)cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, c.stream);
    });
    c.bytes_per_s = 2.0 * (double)bytes / (copy_us * 1e-6);
    const uint32_t size = 8192;
    const double gemm_us =
        cublas_us(c, false, size, size, size, from, to, device(4ull * size * size), NULL, NULL);
    c.bf16_flops = 2.0 * size * size * (double)size / (gemm_us * 1e-6);
    printf(
        "measured limits: %.0f GB/s (copy of 2 GiB), %.0f TFLOPS (BF16 %u^3 by cuBLASLt); FP8 is "
        "counted against twice that\n\n",
        c.bytes_per_s * 1e-9, c.bf16_flops * 1e-12, size);
    cudaFree(from);
    cudaFree(to);
}

void print_row(const card &c, const char *name, double us, double peer_us, double flops,
               double bytes, bool fp8) {
    const double limit = c.bf16_flops * (fp8 ? 2 : 1);
    char peer[64] = "       -        -";
    if (peer_us > 0)
        snprintf(peer, sizeof peer, "%8.1f %8.2f", peer_us, peer_us / us);
    printf("%-44s %8.1f %s %8.0f %5.0f %% %8.0f %5.0f %%\n", name, us, peer, flops / us * 1e-6,
           100 * flops / (us * 1e-6) / limit, bytes / us * 1e-3,
           100 * bytes / (us * 1e-6) / c.bytes_per_s);
}

void print_head(const char *title) {
    printf("%s\n%-44s %8s %8s %8s %8s %7s %8s %7s\n", title, "", "us", "cublas", "ratio", "TFLOPS",
           "", "GB/s", "");
}

/* ---- Products ---- */

struct matrices {
    void *x, *w;
    float *y, *x_scale, *w_scale;
};

matrices make(uint64_t rows, uint64_t n, uint64_t k, uint64_t groups, bool fp8) {
    const uint64_t element = fp8 ? 1 : 2, blocks = (k + 127) / 128 + 4;
    return {device(rows * k * element), device(groups * n * k * element),
            (float *)device(rows * n * 4), (float *)device(rows * blocks * 4),
            (float *)device(groups * (n / 128 + 4) * blocks * 4)};
}
void drop(const matrices &m) {
    cudaFree(m.x);
    cudaFree(m.w);
    cudaFree(m.y);
    cudaFree(m.x_scale);
    cudaFree(m.w_scale);
}

void dense(card &c, bool fp8, uint32_t rows, uint32_t n, uint32_t k) {
    const matrices m = make(rows, n, k, 1, fp8);
    struct gemm_args args = {};
    args.rows = rows, args.n = n, args.k = k, args.groups = 1;
    args.y = m.y, args.y_stride = n;
    args.a_scale = m.x_scale, args.b_scale = m.w_scale;
    args.a_scale_row_step = 1, args.a_scale_group_step = rows;
    struct gemm_cuda plan;
    const size_t element = fp8 ? 1 : 2;
    check(gemm_plan_cuda(&plan, fp8, m.x, k * element, m.w, k * element, &args), "plan");
    const double us = median_us(c, [&] { return gemm_run_cuda(c.stream, &plan); });
    const double peer = cublas_us(c, fp8, rows, n, k, m.x, m.w, m.y, m.x_scale, m.w_scale);
    char name[96];
    snprintf(name, sizeof name, "%s dense  M %5u N %5u K %5u", fp8 ? "fp8 " : "bf16", rows, n, k);
    print_row(c, name, us, peer, 2.0 * rows * n * (double)k,
              (double)element * ((double)rows * k + (double)n * k) + 4.0 * rows * n, fp8);
    drop(m);
}

/* Decode: each of `groups` experts has `rows` rows of the room for `capacity`. */
void masked(card &c, bool fp8, uint32_t groups, uint32_t capacity, uint32_t rows, uint32_t n,
            uint32_t k) {
    const matrices m = make((uint64_t)groups * capacity, n, k, groups, fp8);
    std::vector<uint32_t> counts(groups, rows);
    uint32_t *count = (uint32_t *)device(groups * 4);
    check(cudaMemcpy(count, counts.data(), groups * 4, cudaMemcpyHostToDevice), "counts");
    struct gemm_args args = {};
    args.rows = capacity, args.n = n, args.k = k, args.groups = groups;
    args.y = m.y, args.y_stride = n, args.count = count;
    args.a_scale = m.x_scale, args.b_scale = m.w_scale;
    args.a_scale_row_step = 1, args.a_scale_group_step = groups * capacity;
    struct gemm_cuda plan;
    const size_t element = fp8 ? 1 : 2;
    check(gemm_plan_cuda(&plan, fp8, m.x, k * element, m.w, k * element, &args), "plan");
    const double us = median_us(c, [&] { return gemm_run_cuda(c.stream, &plan); });
    char name[96];
    snprintf(name, sizeof name, "%s masked %u x %u rows N %5u K %5u", fp8 ? "fp8 " : "bf16", groups,
             rows, n, k);
    print_row(c, name, us, -1, 2.0 * groups * rows * n * (double)k,
              (double)groups *
                  ((double)element * ((double)rows * k + (double)n * k) + 4.0 * rows * n),
              fp8);
    cudaFree(count);
    drop(m);
}

/* ---- Attention ---- */

void absorbed(card &c, uint32_t rows, uint32_t heads, uint32_t positions, bool e4m3) {
    const uint32_t pages = (positions + 63) / 64, width = 576;
    struct mla_absorbed_args args = {};
    args.heads = heads, args.kv_lora = 512, args.rope = 64, args.scale = 0.07f;
    args.pages_stride = pages;
    args.splits = (pages + MLA_SPLIT_CUDA - 1) / MLA_SPLIT_CUDA;
    std::vector<uint32_t> position(rows, positions - 1), table((size_t)rows * pages);
    for (size_t i = 0; i < table.size(); i++)
        table[i] = (uint32_t)i;
    uint32_t *device_position = (uint32_t *)device(rows * 4);
    uint32_t *device_table = (uint32_t *)device(table.size() * 4);
    check(cudaMemcpy(device_position, position.data(), rows * 4, cudaMemcpyHostToDevice), "copy");
    check(cudaMemcpy(device_table, table.data(), table.size() * 4, cudaMemcpyHostToDevice), "copy");
    args.position = device_position, args.pages = device_table;
    args.work = (float *)device(mla_absorbed_work_bytes_cuda(512, heads, rows, args.splits));
    bf16 *q = (bf16 *)device((size_t)rows * heads * width * 2);
    const uint32_t row_bytes = e4m3 ? latent_row_bytes(512, 64) : width * 2;
    bf16 *cache = (bf16 *)device((size_t)rows * pages * 64 * row_bytes);
    bf16 *ret = (bf16 *)device((size_t)rows * heads * 512 * 2);
    struct mla_absorbed_cuda plan;
    check(e4m3 ? mla_absorbed_plan_e4m3_cuda(&plan, q, width, rows, cache, rows * pages, &args)
               : mla_absorbed_plan_cuda(&plan, q, width, rows, cache, width, rows * pages, &args),
          "plan");
    const double us =
        median_us(c, [&] { return mla_absorbed_cuda(c.stream, &plan, rows, ret, 512); });
    char name[96];
    snprintf(name, sizeof name, "mla absorbed%s rows %u heads %u positions %u",
             e4m3 ? " e4m3" : "", rows, heads, positions);
    print_row(c, name, us, -1, 2.0 * rows * heads * (double)positions * (576 + 512),
              rows * ((double)positions * row_bytes + 2.0 * heads * (width + 512)), false);
    cudaFree(device_position), cudaFree(device_table), cudaFree(args.work);
    cudaFree(q), cudaFree(cache), cudaFree(ret);
}

void expanded(card &c, uint32_t rows, uint32_t heads) {
    std::vector<uint32_t> position(rows);
    for (uint32_t r = 0; r < rows; r++)
        position[r] = r;
    uint32_t *device_position = (uint32_t *)device(rows * 4);
    check(cudaMemcpy(device_position, position.data(), rows * 4, cudaMemcpyHostToDevice), "copy");
    struct mla_expanded_args args = {};
    args.rows = rows, args.heads = heads, args.nope = 128, args.rope = 64, args.v = 128;
    args.q_stride = 192, args.scale = 0.07f, args.position = device_position;
    bf16 *q = (bf16 *)device((size_t)rows * heads * 192 * 2);
    bf16 *key = (bf16 *)device(mla_expanded_key_bytes_cuda(&args, rows));
    bf16 *value = (bf16 *)device(mla_expanded_value_bytes_cuda(&args, rows));
    bf16 *ret = (bf16 *)device((size_t)rows * heads * 128 * 2);
    const double us = median_us(c, [&] {
        return mla_expanded_cuda(c.stream, &args, q, key, value, rows, ret, heads * 128);
    });
    char name[96];
    snprintf(name, sizeof name, "mla expanded rows %u heads %u", rows, heads);
    print_row(c, name, us, -1, (double)rows * rows * heads * (192 + 128),
              2.0 * rows * heads * (double)(192 * 2 + 128 * 2), false);
    cudaFree(device_position), cudaFree(q), cudaFree(key), cudaFree(value), cudaFree(ret);
}

/* ---- Rows, and what launches cost ---- */

void rows_and_graph(card &c, uint32_t rows) {
    enum { HIDDEN = 7168, EXPERTS = 256, K = 8, VOCABULARY = 129280, OPS = 6 };
    float *x = (float *)device((size_t)rows * HIDDEN * 4),
          *y = (float *)device((size_t)rows * HIDDEN * 4);
    float *weight = (float *)device(HIDDEN * 4),
          *logits = (float *)device((size_t)rows * VOCABULARY * 4);
    bf16 *narrow = (bf16 *)device((size_t)rows * HIDDEN * 2);
    uint8_t *quantised = (uint8_t *)device((size_t)rows * HIDDEN);
    float *scale = (float *)device((size_t)rows * 64 * 4),
          *gate_weight = (float *)device(rows * K * 4);
    uint16_t *expert = (uint16_t *)device(rows * K * 2);
    struct gate_cuda gate = {};
    gate.experts = EXPERTS, gate.groups = 8, gate.groups_chosen = 4, gate.k = K;
    gate.normalise = true, gate.scaling = 2.5f;
    const std::function<int()> op[OPS] = {
        [&] {
            return rms_norm_cuda(c.stream, x, HIDDEN, weight, 1e-6f, rows, HIDDEN, narrow, HIDDEN);
        },
        [&] {
            return add_rms_norm_cuda(c.stream, x, HIDDEN, y, HIDDEN, weight, 1e-6f, rows, HIDDEN,
                                     narrow, HIDDEN);
        },
        [&] { return silu_mul_cuda(c.stream, x, y, HIDDEN, rows, HIDDEN, narrow, HIDDEN); },
        [&] {
            return quantise_bf16_cuda(c.stream, narrow, HIDDEN, rows, HIDDEN, quantised, HIDDEN,
                                      scale, 1, rows);
        },
        [&] {
            return gate_cuda(c.stream, &gate, logits, EXPERTS, NULL, rows, expert, gate_weight);
        },
        [&] { return add_cuda(c.stream, x, HIDDEN, y, HIDDEN, rows, HIDDEN); },
    };
    const char *const name[OPS] = {"rms_norm", "add_rms_norm", "silu_mul",
                                   "quantise", "gate",         "add"};
    const double bytes[OPS] = {6, 14, 10, 3, 0, 12}; /* for each element of a row */
    for (int i = 0; i < OPS; i++) {
        char title[96];
        snprintf(title, sizeof title, "%s rows %u", name[i], rows);
        print_row(c, title, median_us(c, op[i]), -1, 0, bytes[i] * rows * HIDDEN, false);
    }
    const auto all = [&] {
        int error = 0;
        for (int i = 0; i < OPS && error == 0; i++)
            error = op[i]();
        return error;
    };
    const double plain = median_us(c, all);
    cudaGraph_t graph;
    cudaGraphExec_t ready;
    check(cudaStreamBeginCapture(c.stream, cudaStreamCaptureModeThreadLocal), "capture");
    check(all(), "captured launches");
    check(cudaStreamEndCapture(c.stream, &graph), "capture");
    check(cudaGraphInstantiate(&ready, graph, 0), "graph");
    const double captured = median_us(c, [&] { return (int)cudaGraphLaunch(ready, c.stream); });
    printf("the six of them: %.1f us launched one by one, %.1f us as a graph\n\n", plain, captured);
    cudaGraphExecDestroy(ready);
    cudaGraphDestroy(graph);
    cudaFree(x), cudaFree(y), cudaFree(weight), cudaFree(logits), cudaFree(narrow);
    cudaFree(quantised), cudaFree(scale), cudaFree(gate_weight), cudaFree(expert);
}

} // namespace

int main(void) {
    card c = {};
    cudaDeviceProp properties;
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        fprintf(stderr, "bench-gpu: there is no CUDA device here\n");
        return 1;
    }
    check(cudaGetDeviceProperties(&properties, 0), "device");
    if (properties.major != 9) {
        fprintf(stderr, "bench-gpu: %s: a Hopper card is needed\n", properties.name);
        return 1;
    }
    check(cudaStreamCreateWithFlags(&c.stream, cudaStreamNonBlocking), "stream");
    check(cudaEventCreate(&c.begin), "event");
    check(cudaEventCreate(&c.end), "event");
    c.flush = device(FLUSH_BYTES);
    c.workspace = device(WORKSPACE_BYTES);
    if (cublasLtCreate(&c.cublas) != CUBLAS_STATUS_SUCCESS) {
        fprintf(stderr, "bench-gpu: cuBLASLt does not start\n");
        return 1;
    }
    printf("%s, %d multiprocessors\n", properties.name, properties.multiProcessorCount);
    measure_limits(c);
    /* DeepGEMM's published shapes of DeepSeek-V3's dense products. */
    static const uint32_t shapes[][2] = {{2112, 7168},  {24576, 1536}, {32768, 512},
                                         {7168, 16384}, {4096, 7168},  {7168, 2048}};
    print_head("matrix products (ratio: cuBLASLt's time / ours, over 1 is better)");
    for (const auto &shape : shapes)
        for (uint32_t rows : {1u, 16u, 64u, 128u, 4096u})
            dense(c, true, rows, shape[0], shape[1]);
    for (uint32_t rows : {1u, 64u, 4096u})
        dense(c, false, rows, 4096, 7168);
    for (uint32_t rows : {1u, 8u, 64u, 128u}) {
        masked(c, true, 32, 128, rows, 4096, 7168);
        masked(c, true, 32, 128, rows, 7168, 2048);
        masked(c, false, 64, 64, std::min(rows, 64u), 2816, 2048); /* Moonlight */
    }
    printf("\n");
    print_head("attention");
    for (uint32_t rows : {1u, 16u, 64u, 128u})
        for (uint32_t positions : {1024u, 4096u, 8192u})
            for (bool e4m3 : {false, true})
                absorbed(c, rows, 128, positions, e4m3);
    absorbed(c, 64, 16, 4096, false);
    absorbed(c, 64, 16, 4096, true);
    for (uint32_t rows : {256u, 1024u, 4096u})
        expanded(c, rows, 128);
    printf("\n");
    print_head("rows of 7168");
    for (uint32_t rows : {1u, 64u, 256u})
        rows_and_graph(c, rows);
    return 0;
}
