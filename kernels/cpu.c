/* What this processor, and the operating system on it, can run. */
#include "kernels/internal.h"

#if defined(__x86_64__)
#include <cpuid.h>

static bool has_avx512(void) {
    /* GCC's answers include whether the operating system saves the registers. The list is what
     * *_avx512.c is compiled for. */
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
}

static bool has_amx(void) {
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx))
        return false;
    const unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
    if ((edx & amx_bf16) == 0 || (edx & amx_tile) == 0)
        return false;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || (ecx & bit_OSXSAVE) == 0)
        return false;
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const unsigned tile_state = 3u << 17; /* XCR0: TILECFG and TILEDATA */
    return (low & tile_state) == tile_state && has_avx512() && __builtin_cpu_supports("gfni") &&
           amx_request_permission();
}
#endif

bool isa_available(enum isa isa) {
    switch (isa) {
    case ISA_SCALAR:
    case ISA_BEST:
        return true;
#if defined(__x86_64__)
    case ISA_AVX512:
        return has_avx512();
    case ISA_AMX:
        return has_amx();
#endif
    default:
        return false;
    }
}

const char *isa_name(enum isa isa) {
    switch (isa) {
    case ISA_SCALAR:
        return "scalar";
    case ISA_AVX512:
        return "avx512";
    case ISA_AMX:
        return "amx";
    case ISA_BEST:
        return "best";
    }
    return "unknown";
}
