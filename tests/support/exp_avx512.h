#ifndef TROUPE_TESTS_EXP_AVX512_H
#define TROUPE_TESTS_EXP_AVX512_H

#if defined(__x86_64__)
void exp_vector_avx512(const float x[16], float ret[16]);
void exp_nonpositive_vector_avx512(const float x[16], float ret[16]);
#endif

#endif
