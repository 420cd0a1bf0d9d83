/* sin, cos, log and pow in double precision, for tables made once at load. Only additions,
 * multiplications and divisions in a fixed order, which IEEE 754 rounds alike everywhere, so every
 * machine gets the same table. Errors: a few units in the last place of a double, far below what is
 * left after rounding to float. */
#include <string.h>

#include "actors/errors.h"
#include "kernels/numerics.h"

/* pi/2 and ln 2 cut so that their leading parts times an integer of 20 bits are exact. */
static const double HALF_PI_1 = 0x1.921fb544p+0, HALF_PI_2 = 0x1.0b4611a6p-34,
                    HALF_PI_3 = 0x1.3198a2e037073p-69;
static const double LN2_HIGH = 0x1.62e42feep-1, LN2_LOW = 0x1.a39ef35793c76p-33;

/* Nearest integer, for |x| < 2^51. */
static double round_nearest(double x) {
    const double magic = 0x1.8p52;
    return (x + magic) - magic;
}

/* Taylor series; |x| <= pi/4. */
static double sin_near(double x) {
    double z = x * x, term = x, sum = 0;
    for (int n = 1; n <= 19; n += 2) {
        sum += term;
        term = -term * z / (double)((n + 1) * (n + 2));
    }
    return sum;
}

static double cos_near(double x) {
    double z = x * x, term = 1, sum = 0;
    for (int n = 0; n <= 18; n += 2) {
        sum += term;
        term = -term * z / (double)((n + 1) * (n + 2));
    }
    return sum;
}

/* sin(x + quarters * pi/2). */
static double sin_shifted(double x, long quarters) {
    ASSERT(x > -0x1p20 && x < 0x1p20);
    double n = round_nearest(x * 0x1.45f306dc9c883p-1);
    double r = ((x - n * HALF_PI_1) - n * HALF_PI_2) - n * HALF_PI_3;
    switch (((long)n + quarters) & 3) {
    case 0:
        return sin_near(r);
    case 1:
        return cos_near(r);
    case 2:
        return -sin_near(r);
    default:
        return -cos_near(r);
    }
}

double sin_table(double x) {
    return sin_shifted(x, 0);
}

double cos_table(double x) {
    return sin_shifted(x, 1);
}

double log_table(double x) {
    ASSERT(x >= 0x1p-1022 && x <= 0x1.fffffffffffffp1023);
    uint64_t bits;
    memcpy(&bits, &x, sizeof(bits));
    long k = (long)(bits >> 52) - 1023;
    bits = (bits & 0xfffffffffffffull) | 0x3ff0000000000000ull;
    double m;
    memcpy(&m, &bits, sizeof(m));
    if (m > 1.4142135623730951) {
        m *= 0.5;
        k++;
    }
    /* log m = 2 atanh(s), s = (m - 1) / (m + 1), |s| <= 0.172. */
    double s = (m - 1) / (m + 1), z = s * s, sum = 0;
    for (int n = 25; n >= 3; n -= 2)
        sum = (sum + 1.0 / n) * z;
    return (double)k * LN2_HIGH + (2 * s + (2 * s * sum + (double)k * LN2_LOW));
}

static double exp_table(double x) {
    ASSERT(x > -700 && x < 700);
    double k = round_nearest(x * 0x1.71547652b82fep+0);
    double r = (x - k * LN2_HIGH) - k * LN2_LOW, sum = 1;
    for (int n = 16; n >= 1; n--)
        sum = 1 + sum * r / n;
    uint64_t bits = (uint64_t)(1023 + (long)k) << 52;
    double power;
    memcpy(&power, &bits, sizeof(power));
    return sum * power;
}

double pow_table(double base, double exponent) {
    return exp_table(exponent * log_table(base));
}
