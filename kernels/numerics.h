/* The numerics contract in code (docs: ARCHITECTURE.md, "Bits"). Everything here is defined operation by operation, so that the
 * scalar, AVX-512 and AMX forms, on any machine, give the same bits. Nothing calls libm. Compiled with -ffp-contract=off; a
 * fused multiply-add is always written out.
 *
 * Denormals: results and inputs of FP32 operations below 2^-126 are zero (FTZ and DAZ). Every thread that runs kernels calls
 * numerics_enter() first, which sets the processor's mode; the scalar canonical dot product needs no mode and defines it. */
#ifndef TROUPE_NUMERICS_H
#define TROUPE_NUMERICS_H

#include <stdint.h>

typedef uint16_t bf16;

enum isa { ISA_SCALAR, ISA_AVX512, ISA_AMX, ISA_BEST = -1 };
enum profile { PROFILE_F32, PROFILE_BF16, PROFILE_FP8 };
const char *profile_name(enum profile profile);      /* "f32", "bf16", "fp8" */
enum profile profile_of_name(const char *name);      /* one of these; anything else is bf16 */

/* Sets round-to-nearest, flush-to-zero and denormals-are-zero for the calling thread. Idempotent, cheap. */
void numerics_enter(void);

float bf16_to_float(bf16 value);        /* exact */
bf16 bf16_from_float(float value);      /* round to nearest even; NaN stays NaN (quiet); denormal results are zero */
float e4m3_to_float(uint8_t value);     /* exact; 0x7f and 0xff are NaN; no infinities */
bf16 e4m3_to_bf16(uint8_t value);       /* exact, subnormals included (they become normal BF16 values) */
uint8_t e4m3_from_float(float value);   /* round to nearest even, saturating at +-448; used by synth */

/* One polynomial each, the same FP32 operations in scalar and vector form. Accuracy: a few ulp, stated at the definition. */
float exp_canonical(float x);   /* exp(-inf) = 0, overflow to +inf */
void exp_canonical_row(const float *x, uint32_t n, float *ret); /* ret[i] = exp_canonical(x[i]); ret may be x */
float log_canonical(float x);   /* x > 0 and normal */
float rsqrt_canonical(float x); /* 1/sqrt(x) by hardware sqrt and division, which IEEE 754 defines exactly */
float sigmoid_canonical(float x); /* 1 / (1 + exp(-x)) */

/* Sum of n floats by 16 interleaved partial sums (element i joins partial i % 16, in order) and the fixed tree
 * (p0+p8) .. (p7+p15), then 4, 2, 1 apart. */
float sum_canonical(const float *x, uint32_t n);

/* Double precision, for tables made once at load (RoPE); correctly rounded basic operations only, no libm. */
double sin_table(double x);
double cos_table(double x);
double pow_table(double base, double exponent); /* base > 0 */
double log_table(double x);                     /* x > 0 */

#endif
