/* The vector forms of exp_canonical, for test_numerics.c to compare. */
#include "tests/support/exp_avx512.h"

#if defined(__x86_64__)
#include "kernels/x86/vector_avx512.h"

void exp_vector_avx512(const float x[16], float ret[16]) {
    _mm512_storeu_ps(ret, exp_avx512(_mm512_loadu_ps(x)));
}

void exp_nonpositive_vector_avx512(const float x[16], float ret[16]) {
    _mm512_storeu_ps(ret, exp_nonpositive_avx512(_mm512_loadu_ps(x)));
}
#endif
