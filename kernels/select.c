/* The tables of operations, one per numerics profile and instruction set, and the choice among them
 * at start. */
#include <string.h>

#include "actors/errors.h"
#include "kernels/internal.h"
#include "kernels/rows.h"

static const struct kernels F32 = {
    .name = "f32 scalar",
    .profile = PROFILE_F32,
    .isa = ISA_SCALAR,
    .activation_bytes = sizeof(float),
    .matrix_bytes = matrix_bytes_f32,
    .matrix_pack = matrix_pack_f32,
    .matrix_adopt = matrix_adopt_f32,
    .matmul = matmul_f32,
    .matmul_latent = matmul_f32,
    .rms_norm = rms_norm_f32,
    .convert = convert_f32,
    .silu_mul = silu_mul_f32,
    .add = add_scalar,
    .widen = widen_f32,
    .rope = rope_scalar,
    .mla_absorbed = mla_absorbed_f32,
    .mla_expanded = mla_expanded_f32,
};

/* What the forms of both profiles share: matrices, products and attention of an instruction set,
 * operations on rows of one. The fp8 profile quantises what its products read; all else, the inside
 * of attention included, is that of the bf16 profile. */
#define MATRICES                                                                                   \
    .activation_bytes = sizeof(bf16), .matrix_bytes = matrix_bytes_bf16,                           \
    .matrix_pack = matrix_pack_bf16, .matrix_adopt = matrix_adopt_bf16
#define PRODUCTS(profile, isa)                                                                     \
    .matmul = matmul_##profile##_##isa, .matmul_latent = matmul_bf16_##isa,                        \
    .mla_absorbed = mla_absorbed_bf16_##isa, .mla_expanded = mla_expanded_bf16_##isa
#define ROWS(isa)                                                                                  \
    .rms_norm = rms_norm_bf16_##isa, .convert = convert_bf16_##isa,                                \
    .silu_mul = silu_mul_bf16_##isa, .add = add_##isa, .widen = widen_bf16_##isa,                  \
    .rope = rope_##isa

#define TRAVELLING(isa, rows)                                                                      \
    .row_to_e4m3 = row_to_e4m3_##rows, .takes_e4m3 = takes_e4m3,                                   \
    .matmul_e4m3 = matmul_e4m3_##isa

static const struct kernels BF16_SCALAR = {
    .name = "bf16 scalar",
    .profile = PROFILE_BF16,
    .isa = ISA_SCALAR,
    MATRICES,
    PRODUCTS(bf16, scalar),
    ROWS(scalar),
};
static const struct kernels FP8_SCALAR = {
    .name = "fp8 scalar",
    .profile = PROFILE_FP8,
    .isa = ISA_SCALAR,
    MATRICES,
    PRODUCTS(fp8, scalar),
    TRAVELLING(scalar, scalar),
    ROWS(scalar),
};
#if defined(__x86_64__)
static const struct kernels BF16_AVX512 = {
    .name = "bf16 avx512",
    .profile = PROFILE_BF16,
    .isa = ISA_AVX512,
    MATRICES,
    PRODUCTS(bf16, avx512),
    ROWS(avx512),
};
static const struct kernels FP8_AVX512 = {
    .name = "fp8 avx512",
    .profile = PROFILE_FP8,
    .isa = ISA_AVX512,
    MATRICES,
    PRODUCTS(fp8, avx512),
    TRAVELLING(avx512, avx512),
    ROWS(avx512),
};
/* Processors with AMX have AVX-512, which does all but products and attention. */
static const struct kernels BF16_AMX = {
    .name = "bf16 amx",
    .profile = PROFILE_BF16,
    .isa = ISA_AMX,
    MATRICES,
    .matrix_code = matrix_code_bf16,
    PRODUCTS(bf16, amx),
    .matmul_add = matmul_add_bf16_amx,
    .mla_queries = mla_queries_bf16_amx,
    ROWS(avx512),
};
static const struct kernels FP8_AMX = {
    .name = "fp8 amx",
    .profile = PROFILE_FP8,
    .isa = ISA_AMX,
    MATRICES,
    .matrix_code = matrix_code_bf16,
    PRODUCTS(fp8, amx),
    .matmul_add = matmul_add_fp8_amx,
    .mla_queries = mla_queries_fp8_amx,
    TRAVELLING(amx, avx512),
    ROWS(avx512),
};
#endif

/* Of each profile fastest first. */
static const struct kernels *const FORMS[] = {
#if defined(__x86_64__)
    &BF16_AMX,    &BF16_AVX512,
#endif
    &BF16_SCALAR,
#if defined(__x86_64__)
    &FP8_AMX,     &FP8_AVX512,
#endif
    &FP8_SCALAR,
};

const char *profile_name(enum profile profile) {
    return profile == PROFILE_F32 ? "f32" : profile == PROFILE_FP8 ? "fp8" : "bf16";
}

enum profile profile_of_name(const char *name) {
    if (strcmp(name, "f32") == 0)
        return PROFILE_F32;
    return strcmp(name, "fp8") == 0 ? PROFILE_FP8 : PROFILE_BF16;
}

const struct kernels *kernels_select(enum profile profile, enum isa isa, struct failure *failure) {
    if (isa != ISA_BEST && !isa_available(isa)) {
        fail(failure, ERR_UNSUPPORTED,
             "instruction set %s was asked for, but this processor or operating system does not "
             "offer "
             "it; choose a lesser one or let the best be chosen",
             isa_name(isa));
        return NULL;
    }
    if (profile == PROFILE_F32)
        return &F32;
    for (size_t i = 0; i < sizeof(FORMS) / sizeof(FORMS[0]); i++)
        if (FORMS[i]->profile == profile &&
            (isa == ISA_BEST ? isa_available(FORMS[i]->isa) : FORMS[i]->isa == isa))
            return FORMS[i];
    fail(failure, ERR_UNSUPPORTED, "this build has no such kernels for instruction set %s",
         isa_name(isa));
    return NULL;
}

size_t dtype_bytes(enum dtype dtype) {
    switch (dtype) {
    case DTYPE_E4M3:
    case DTYPE_U8:
        return 1;
    case DTYPE_BF16:
    case DTYPE_F16:
        return 2;
    case DTYPE_F32:
    case DTYPE_I32:
        return 4;
    case DTYPE_I64:
        return 8;
    }
    return 0;
}

size_t activation_stride(size_t width) {
    return (width + 31) / 32 * 32;
}
size_t row_stride(size_t width) {
    const size_t lines = activation_stride(width) / 32; /* of BF16 */
    return (lines | 1) * 32;
}
size_t sums_stride(size_t width) {
    return activation_stride(width) + 16;
}

size_t cache_stride(uint32_t kv_lora, uint32_t rope) {
    return activation_stride(kv_lora) + activation_stride(rope);
}
