/* make bench-kernels: one operation of kernels/ at a time, as GB/s and GFLOP/s and as shares of
 * what this machine can do. Weights come from memory: products walk over many copies of their
 * matrix, more than caches hold. usage: kernels [--isa NAME] [--threads N] [--filter TEXT]
 * [--copies-mib N] */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "actors/host/clock.h"
#include "actors/host/huge_pages.h"
#include "actors/host/pool.h"
#include "bench/limits.h"
#include "kernels/ops.h"
#include "tests/support/random.h"

#define SEED      17
#define REPEAT    5
#define HUGE_PAGE ((size_t)2 << 20)

static struct {
    const struct kernels *kernels;
    struct parallel parallel;
    struct machine_limits limits;
    const char *filter;
    size_t copies_bytes;
    uint64_t random;
} bench = {.parallel = {NULL, NULL, 1}, .copies_bytes = (size_t)1 << 30, .random = SEED};

/* With one thread the processor time of this thread: what others do meanwhile costs it only caches.
 */
static uint64_t now_ns(void) {
    struct timespec now;
    if (bench.parallel.width > 1)
        return clock_now_ns();
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void *filled(size_t bytes, enum dtype dtype) {
    bytes = (bytes + 63) / 64 * 64;
    uint8_t *memory = aligned_alloc(64, bytes);
    if (memory == NULL) {
        fprintf(stderr, "no memory for %zu bytes\n", bytes);
        exit(1);
    }
    for (size_t i = 0; i < bytes / 2; i++) {
        if (dtype == DTYPE_BF16) {
            ((bf16 *)(void *)memory)[i] = bf16_from_float(random_float(&bench.random, -1.0f, 1.0f));
            continue;
        }
        memory[2 * i] = e4m3_from_float(random_float(&bench.random, -400.0f, 400.0f));
        memory[2 * i + 1] = e4m3_from_float(random_float(&bench.random, -400.0f, 400.0f));
    }
    return memory;
}

static void report(const char *name, double bytes, double flops, double seconds) {
    printf("%-44s %10.1f us", name, seconds * 1e6);
    if (bytes > 0)
        printf(" %7.1f GB/s %4.0f %%", bytes / seconds / 1e9,
               100 * bytes / seconds / bench.limits.stream_bytes_per_s);
    if (flops > 0)
        printf(" %8.1f GFLOP/s %4.0f %%", flops / seconds / 1e9,
               100 * flops / seconds / bench.limits.peak_flops);
    printf("\n");
    fflush(stdout);
}

/* The median run of REPEAT; each at least 20 ms. */
static double measure(void (*once)(void *argument), void *argument) {
    double seconds[REPEAT];
    once(argument);
    for (int i = 0; i < REPEAT; i++) {
        uint64_t start = now_ns(), now;
        uint32_t times = 0;
        do {
            once(argument);
            times++;
        } while ((now = now_ns()) - start < 20000000);
        seconds[i] = (double)(now - start) / 1e9 / times;
    }
    for (int i = 0; i < REPEAT; i++)
        for (int j = i + 1; j < REPEAT; j++)
            if (seconds[j] < seconds[i]) {
                double swap = seconds[i];
                seconds[i] = seconds[j];
                seconds[j] = swap;
            }
    return seconds[REPEAT / 2];
}

/* ---- Products ---- */

struct product {
    struct matrix *matrix; /* [copies] */
    uint32_t copies, at, rows;
    const bf16 *x;
    float *y;
};

static void product_once(void *argument) {
    struct product *it = argument;
    const struct matrix *w = &it->matrix[it->at++ % it->copies];
    bench.kernels->matmul(w, it->x, row_stride(w->k), it->rows, it->y, sums_stride(w->n),
                          &bench.parallel);
}

/* coded: BF16 in 12 bits, where the kernels read that. */
static void bench_product(enum dtype dtype, uint32_t n, uint32_t k, bool coded) {
    static const uint32_t rows[] = {1, 2, 4, 8, 16, 32, 64, 128, 512, 2048};
    const uint32_t most = rows[sizeof rows / sizeof rows[0] - 1];
    char name[96];
    snprintf(name, sizeof name, "product %s %ux%u rows",
             coded                 ? "coded"
             : dtype == DTYPE_BF16 ? "bf16"
                                   : "fp8",
             n, k);
    const bool can = !coded || bench.kernels->matrix_code != NULL;
    if (!can || (bench.filter != NULL && strstr(name, bench.filter) == NULL))
        return;
    uint8_t *data = filled((size_t)n * k * dtype_bytes(dtype), dtype);
    const uint32_t scales = (n / 128 + 1) * (k / 128 + 1);
    float *scale = malloc(scales * sizeof *scale);
    for (uint32_t i = 0; i < scales; i++)
        scale[i] = random_float(&bench.random, 0.001f, 0.01f);
    const struct weight_view view = {.dtype = dtype,
                                     .data = data,
                                     .n = n,
                                     .k = k,
                                     .stride = k,
                                     .scale = dtype == DTYPE_E4M3 ? scale : NULL,
                                     .scale_stride = k / 128 + 1,
                                     .block = 128};
    size_t bytes =
        (bench.kernels->matrix_bytes(&view) + 1023) & ~(size_t)1023; /* as engine/weight_memory.c */
    struct product it = {.copies = (uint32_t)(bench.copies_bytes / bytes) + 1};
    it.matrix = malloc(it.copies * sizeof *it.matrix);
    const size_t room = (bytes * it.copies + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    uint8_t *memory = aligned_alloc(HUGE_PAGE, room);
    ask_for_huge_pages(memory, room); /* as the engine does */
    bench.kernels->matrix_pack(&it.matrix[0], &view, memory);
    if (coded) {
        struct matrix_coding coding;
        bench.kernels->matrix_code(&it.matrix[0], &coding);
        matrix_place_coded(&it.matrix[0], &it.matrix[0], &coding, memory);
        matrix_coding_free(&coding);
        bytes = (it.matrix[0].bytes + 1023) & ~(size_t)1023;
    }
    for (uint32_t i = 1; i < it.copies; i++) {
        memcpy(memory + i * bytes, memory, bytes);
        it.matrix[i] = it.matrix[0];
        it.matrix[i].data = memory + i * bytes;
    }
    it.x = filled(row_stride(k) * most * sizeof(bf16), DTYPE_BF16);
    it.y = malloc(sums_stride(n) * most * sizeof(float));
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        it.rows = rows[i];
        const double seconds = measure(product_once, &it);
        char line[128];
        snprintf(line, sizeof line, "%s %u", name, it.rows);
        report(line, (double)n * k * (coded ? 1.5 : (double)dtype_bytes(dtype)),
               2.0 * n * k * it.rows, seconds);
    }
    free((void *)(uintptr_t)it.x);
    free(it.y);
    free(memory);
    free(it.matrix);
    free(scale);
    free(data);
}

/* ---- Attention ---- */

struct attention {
    struct mla_shape shape;
    struct mla_rows rows;
    struct matrix kv_b;
    const bf16 *q;
    bf16 *ret;
    bool absorbed;
};

static void attention_once(void *argument) {
    struct attention *it = argument;
    const struct mla_shape *s = &it->shape;
    if (it->absorbed)
        bench.kernels->mla_absorbed(s, &it->rows, it->q, cache_stride(s->kv_lora, s->rope), it->ret,
                                    activation_stride(s->kv_lora), &bench.parallel);
    else
        bench.kernels->mla_expanded(s, &it->rows, &it->kv_b, it->q, cache_stride(s->nope, s->rope),
                                    it->ret, activation_stride((size_t)s->heads * s->v),
                                    &bench.parallel);
}

/* `rows` queries: absorbed, each the last position of a sequence of its own; expanded, the last
 * rows of one sequence. */
static void bench_attention(const char *model, struct mla_shape shape, bool absorbed, uint32_t rows,
                            uint32_t context) {
    char name[96];
    snprintf(name, sizeof name, "attention %s %s context %u rows %u", model,
             absorbed ? "absorbed" : "expanded", context, rows);
    if (bench.filter != NULL && strstr(name, bench.filter) == NULL)
        return;
    const uint32_t pages = (context + PAGE_TOKENS - 1) / PAGE_TOKENS;
    const size_t stride = cache_stride(shape.kv_lora, shape.rope);
    const uint32_t sequences = absorbed ? rows : 1;
    bf16 *cache = filled((size_t)sequences * pages * PAGE_TOKENS * stride * 2, DTYPE_BF16);
    const void **table = malloc((size_t)sequences * pages * sizeof *table);
    for (size_t i = 0; i < (size_t)sequences * pages; i++)
        table[i] = cache + i * PAGE_TOKENS * stride;
    uint32_t *position = malloc(rows * sizeof *position);
    const void *const **tables = malloc(rows * sizeof *tables);
    double seen = 0;
    for (uint32_t r = 0; r < rows; r++) {
        position[r] = absorbed ? context - 1 : context - rows + r;
        tables[r] = table + (absorbed ? (size_t)r * pages : 0);
        seen += position[r] + 1;
    }
    struct attention it = {.shape = shape, .rows = {rows, position, tables}, .absorbed = absorbed};
    const uint32_t n = shape.heads * (shape.nope + shape.v);
    bf16 *w = filled((size_t)n * shape.kv_lora * 2, DTYPE_BF16);
    const struct weight_view view = {
        .dtype = DTYPE_BF16, .data = w, .n = n, .k = shape.kv_lora, .stride = shape.kv_lora};
    void *memory = aligned_alloc(64, bench.kernels->matrix_bytes(&view));
    bench.kernels->matrix_pack(&it.kv_b, &view, memory);
    const size_t q_stride = absorbed ? stride : cache_stride(shape.nope, shape.rope);
    it.q = filled((size_t)rows * shape.heads * q_stride * 2, DTYPE_BF16);
    it.ret = malloc((size_t)rows * shape.heads * activation_stride(shape.kv_lora + shape.v) * 2);
    double flops =
        2 * seen * shape.heads *
        (absorbed ? 2.0 * shape.kv_lora + shape.rope : (double)shape.nope + shape.rope + shape.v);
    if (!absorbed)
        flops += 2.0 * context * n * shape.kv_lora;
    report(name, absorbed ? seen * (double)stride * 2 : 0, flops, measure(attention_once, &it));
    free(cache);
    free(table);
    free(position);
    free(tables);
    free(w);
    free(memory);
    free((void *)(uintptr_t)it.q);
    free(it.ret);
}

/* ---- Rows ---- */

struct rows_of {
    float *x, *y, *weight;
    bf16 *ret;
    uint32_t rows, n;
};
static void silu_once(void *argument) {
    struct rows_of *it = argument;
    bench.kernels->silu_mul(it->x, it->y, it->n, it->rows, it->n, it->ret, it->n);
}
static void norm_once(void *argument) {
    struct rows_of *it = argument;
    bench.kernels->rms_norm(it->x, it->n, it->weight, 1e-6f, it->rows, it->n, it->ret, it->n);
}

static void bench_rows(void) {
    struct rows_of it = {.rows = 64, .n = 1024};
    const size_t count = (size_t)it.rows * it.n;
    it.x = malloc(count * sizeof(float));
    it.y = malloc(count * sizeof(float));
    it.weight = malloc(it.n * sizeof(float));
    it.ret = malloc(count * sizeof(bf16));
    for (size_t i = 0; i < count; i++)
        it.x[i] = it.y[i] = random_float(&bench.random, -2, 2);
    for (uint32_t i = 0; i < it.n; i++)
        it.weight[i] = 1;
    static const struct {
        const char *name;
        void (*once)(void *);
        double bytes;
    } ops[] = {{"silu_mul 64 rows of 1024", silu_once, 10},
               {"rms_norm 64 rows of 1024", norm_once, 6}};
    for (size_t i = 0; i < sizeof ops / sizeof ops[0]; i++)
        if (bench.filter == NULL || strstr(ops[i].name, bench.filter) != NULL)
            report(ops[i].name, ops[i].bytes * (double)count, 0, measure(ops[i].once, &it));
    free(it.x);
    free(it.y);
    free(it.weight);
    free(it.ret);
}

static enum isa isa_of(const char *name) {
    for (int isa = ISA_SCALAR; isa <= ISA_AMX; isa++)
        if (strcmp(name, isa_name((enum isa)isa)) == 0)
            return (enum isa)isa;
    return ISA_BEST;
}

int main(int argc, char **argv) {
    enum isa isa = ISA_BEST;
    int threads = 1;
    for (int i = 1; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "--isa") == 0)
            isa = isa_of(argv[i + 1]);
        else if (strcmp(argv[i], "--threads") == 0)
            threads = atoi(argv[i + 1]);
        else if (strcmp(argv[i], "--filter") == 0)
            bench.filter = argv[i + 1];
        else if (strcmp(argv[i], "--copies-mib") == 0)
            bench.copies_bytes = (size_t)atoi(argv[i + 1]) << 20;
    }
    struct failure failure = {0};
    struct pool *pool = NULL;
    bench.kernels = kernels_select(PROFILE_BF16, isa, &failure);
    if (bench.kernels == NULL || pool_open(&pool, threads < 1 ? 1 : threads, &failure) != 0) {
        fprintf(stderr, "%s\n", failure.text);
        return 1;
    }
    bench.parallel = pool_parallel(pool);
    numerics_enter();
    limits_measure(&bench.limits, isa, &bench.parallel, now_ns, ask_for_huge_pages);
    printf("%s, %d threads: memory %.1f GB/s, %s %.0f GFLOP/s\n", bench.kernels->name,
           bench.parallel.width, bench.limits.stream_bytes_per_s / 1e9, bench.limits.peak_name,
           bench.limits.peak_flops / 1e9);
    for (int fp8 = 0; fp8 < 2; fp8++) {
        const enum dtype dtype = fp8 ? DTYPE_E4M3 : DTYPE_BF16;
        bench_product(dtype, 512, 1024, false); /* bench-1b: gate and up of an expert */
        if (!fp8)
            bench_product(dtype, 512, 1024, true);
        bench_product(dtype, 1024, 512, false);  /* and its down */
        bench_product(dtype, 1024, 2048, false); /* output of attention */
        bench_product(dtype, 128, 256, false);   /* demo: gate and up of an expert */
    }
    static const struct mla_shape big = {16, 128, 64, 128, 512, 0.07f, false},
                                  demo = {8, 32, 32, 32, 128, 0.125f, false};
    static const uint32_t absorbed[][2] = {{1, 160}, {8, 160}, {32, 160}, {1, 1024}};
    static const uint32_t expanded[][2] = {{512, 512}, {128, 2048}};
    for (int i = 0; i < 2; i++) {
        const struct mla_shape shape = i == 0 ? big : demo;
        const char *model = i == 0 ? "bench-1b" : "demo";
        for (size_t a = 0; a < sizeof absorbed / sizeof absorbed[0]; a++)
            bench_attention(model, shape, true, absorbed[a][0], absorbed[a][1]);
        for (size_t a = 0; a < sizeof expanded / sizeof expanded[0]; a++)
            bench_attention(model, shape, false, expanded[a][0], expanded[a][1]);
    }
    bench_rows();
    pool_close(&pool);
    return 0;
}
