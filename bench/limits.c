/* Measures the two limits that every figure of a benchmark leans on: how fast memory can be read,
 * and how fast the instruction that matrix products are made of can go. */
#include "bench/limits.h"

#include <stdlib.h>
#include <string.h>

#define STREAM_BYTES  ((size_t)1 << 30) /* more than any cache: servers share some 500 MB */
#define STREAM_PASSES 6
#define HUGE_PAGE     ((size_t)2 << 20)
#define AHEAD_WORDS   512 /* 4 KiB */
#define PEAK_LOOPS    400000u
#define PEAK_PASSES   5

struct stream_job {
    const uint64_t *words;
    size_t count;
    uint64_t sums[64];
};

static void stream_part(void *argument, int part, int parts) {
    struct stream_job *job = argument;
    size_t first = job->count / (size_t)parts * (size_t)part, count = job->count / (size_t)parts;
    const uint64_t *word = job->words + first;
    uint64_t sum[8] = {0};
    for (size_t i = 0; i + 8 <= count; i += 8) {
        __builtin_prefetch(word + i + AHEAD_WORDS); /* never faults, not even beyond the end */
        for (int j = 0; j < 8; j++)
            sum[j] += word[i + j];
    }
    for (int j = 1; j < 8; j++)
        sum[0] += sum[j];
    job->sums[part % 64] = sum[0];
}

static double measure_stream(const struct parallel *parallel, uint64_t (*now_ns)(void),
                             void (*ask_huge)(void *memory, size_t bytes)) {
    uint64_t *words = aligned_alloc(HUGE_PAGE, STREAM_BYTES);
    double best = 0;
    if (words == NULL)
        return 0;
    ask_huge(words, STREAM_BYTES); /* as weights have them: small pages read a third slower */
    memset(words, 1, STREAM_BYTES);
    struct stream_job job = {.words = words, .count = STREAM_BYTES / sizeof *words};
    for (int i = 0; i < STREAM_PASSES; i++) {
        uint64_t start = now_ns();
        parallel->run(parallel->pool, stream_part, &job, parallel->width);
        double rate = (double)STREAM_BYTES / ((double)(now_ns() - start) / 1e9);
        best = rate > best ? rate : best;
    }
    free(words);
    return best;
}

struct peak_job {
    float (*run)(uint32_t loops);
    volatile float sink;
};

static void peak_part(void *argument, int part, int parts) {
    struct peak_job *job = argument;
    (void)part;
    (void)parts;
    job->sink = job->run(PEAK_LOOPS);
}

static double measure_peak(float (*run)(uint32_t loops), double flops_per_loop, uint32_t loops,
                           const struct parallel *parallel, uint64_t (*now_ns)(void)) {
    struct peak_job job = {.run = run};
    double best = 0;
    for (int i = 0; i < PEAK_PASSES; i++) {
        uint64_t start = now_ns();
        parallel->run(parallel->pool, peak_part, &job, parallel->width);
        double flops = flops_per_loop * loops * parallel->width;
        double rate = flops / ((double)(now_ns() - start) / 1e9);
        best = rate > best ? rate : best;
    }
    return best;
}

void limits_measure(struct machine_limits *ret, enum isa isa, const struct parallel *parallel,
                    uint64_t (*now_ns)(void), void (*ask_huge)(void *memory, size_t bytes)) {
    *ret = (struct machine_limits){.threads = parallel->width, .peak_name = "none"};
    ret->stream_bytes_per_s = measure_stream(parallel, now_ns, ask_huge);
#if defined(__x86_64__)
    bool best = isa == ISA_BEST;
    if (isa_available(ISA_AMX) && (best || isa == ISA_AMX)) {
        ret->peak_name = "AMX BF16";
        ret->peak_flops = measure_peak(peak_amx, PEAK_AMX_FLOPS, PEAK_LOOPS, parallel, now_ns);
    } else if (isa_available(ISA_AVX512) && (best || isa == ISA_AVX512)) {
        ret->peak_name = "AVX-512 FP32 FMA";
        ret->peak_flops =
            measure_peak(peak_avx512, PEAK_AVX512_FLOPS, PEAK_LOOPS, parallel, now_ns);
    }
#else
    (void)isa;
    (void)measure_peak;
#endif
}
