/* The AVX-512 kernels, as a template: included by one file for processors with AVX-512 F, BW, VL
 * and DQ and by one that may use VBMI as well.
 *
 * A row of a tile holds a pair of weights for each of 16 outputs. Shifted and masked it is two FP32
 * vectors, which join the even and the odd chain together with the broadcast pair of inputs. The
 * two chains of each (row, panel) are independent; eight or more of them hide the latency of FMA.
 * Loops over rows and panels have constant bounds and unroll, so the chains live in registers. */
#include <string.h>

#include "kernels/x86/kernel_bf16.h"

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

/* ---- E4M3 to BF16 ---- */

/* The two 64-byte rows of a BF16 tile that 64 bytes of an E4M3 tile hold. */
struct two_rows {
    __m512i first, second;
};

/* By arithmetic on the magnitudes (0..127) in 16-bit lanes: 8..126 are normal (exponent bias 7
 * becomes 127), 0..7 are multiples of 2^-9, which BF16 holds as normal values, 127 is NaN. */
INLINE __m512i expand_magnitudes(__m512i magnitude) {
    const __m512i subnormal = _mm512_castsi128_si512(
        _mm_setr_epi16(0x0000, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
    const __mmask32 is_subnormal = _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8));
    const __mmask32 is_nan = _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7f));
    __m512i value = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(0x3c00));
    value = _mm512_mask_permutexvar_epi16(value, is_subnormal, magnitude, subnormal);
    return _mm512_mask_mov_epi16(value, is_nan, _mm512_set1_epi16(0x7fc0));
}

#define OR_AND 0xf8 /* ternary logic: a | (b & c) */

#if defined(__AVX512VBMI__)
/* Or by looking up both bytes of the BF16 value, two instructions for 64 weights. */
struct expander {
    __m512i low[2], high[2]; /* by magnitude */
};

INLINE struct expander expander_make(void) {
    struct expander expander;
    UNROLL for (int i = 0; i < 2; i++) {
        __m256i low[2], high[2];
        UNROLL for (int j = 0; j < 2; j++) {
            __m256i magnitudes =
                _mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18,
                                 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31);
            magnitudes = _mm256_add_epi8(magnitudes, _mm256_set1_epi8((char)(64 * i + 32 * j)));
            const __m512i values = expand_magnitudes(_mm512_cvtepu8_epi16(magnitudes));
            low[j] = _mm512_cvtepi16_epi8(values);
            high[j] = _mm512_cvtepi16_epi8(_mm512_srli_epi16(values, 8));
        }
        expander.low[i] = _mm512_inserti64x4(_mm512_castsi256_si512(low[0]), low[1], 1);
        expander.high[i] = _mm512_inserti64x4(_mm512_castsi256_si512(high[0]), high[1], 1);
    }
    return expander;
}

INLINE struct two_rows expand(const struct expander *expander, const uint8_t *packed) {
    const __m512i bytes = _mm512_loadu_si512(packed);
    const __m512i low = _mm512_permutex2var_epi8(expander->low[0], bytes, expander->low[1]);
    __m512i high = _mm512_permutex2var_epi8(expander->high[0], bytes, expander->high[1]);
    high = _mm512_ternarylogic_epi32(high, bytes, _mm512_set1_epi8((char)0x80), OR_AND);
    return (struct two_rows){_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
}
#else
struct expander {
    char none;
};

INLINE struct expander expander_make(void) {
    return (struct expander){0};
}

INLINE __m512i expand_lanes(__m512i bytes) {
    const __m512i value = expand_magnitudes(_mm512_and_si512(bytes, _mm512_set1_epi16(0x7f)));
    return _mm512_ternarylogic_epi32(value, _mm512_slli_epi16(bytes, 8),
                                     _mm512_set1_epi16((short)0x8000), OR_AND);
}

INLINE struct two_rows expand(const struct expander *expander, const uint8_t *packed) {
    (void)expander;
    const __m512i bytes = _mm512_loadu_si512(packed);
    const __m512i zero = _mm512_setzero_si512();
    return (struct two_rows){expand_lanes(_mm512_unpacklo_epi8(bytes, zero)),
                             expand_lanes(_mm512_unpackhi_epi8(bytes, zero))};
}
#endif

INLINE void expand_tiles(const uint8_t *packed, bf16 *ret, uint32_t tiles) {
    const struct expander expander = expander_make();
    for (size_t i = 0; i < (size_t)tiles * TILE_ELEMENTS; i += 64) {
        const struct two_rows two = expand(&expander, packed + i);
        _mm512_storeu_si512(ret + i, two.first);
        _mm512_storeu_si512(ret + i + 32, two.second);
    }
}

/* ---- Products ---- */

struct sums {
    __m512 at[KERNEL_ROWS_MAX][KERNEL_PANELS_MAX];
};

INLINE __m512 even_part(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
}
INLINE __m512 odd_part(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000)));
}

/* Adds one pair of inputs to the even and odd chains. */
INLINE void add_pair(int rows, int panels, const __m512i *weights, const bf16 *x, size_t x_stride,
                     struct sums *even, struct sums *odd) {
    __m512 weights_even[KERNEL_PANELS_MAX], weights_odd[KERNEL_PANELS_MAX];
    UNROLL for (int p = 0; p < panels; p++) {
        weights_even[p] = even_part(weights[p]);
        weights_odd[p] = odd_part(weights[p]);
    }
    UNROLL for (int r = 0; r < rows; r++) {
        int pair;
        memcpy(&pair, x + (size_t)r * x_stride, sizeof pair);
        const __m512i inputs = _mm512_set1_epi32(pair);
        const __m512 inputs_even = even_part(inputs), inputs_odd = odd_part(inputs);
        UNROLL for (int p = 0; p < panels; p++) {
            even->at[r][p] = _mm512_fmadd_ps(weights_even[p], inputs_even, even->at[r][p]);
            odd->at[r][p] = _mm512_fmadd_ps(weights_odd[p], inputs_odd, odd->at[r][p]);
        }
    }
}

/* sums += even + odd of one block of 32 inputs. */
INLINE void add_block(bool e4m3, int rows, int panels, const struct expander *expander,
                      const uint8_t *tiles, size_t panel_bytes, const bf16 *x, size_t x_stride,
                      struct sums *sums) {
    struct sums even, odd;
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int p = 0; p < panels; p++) {
            even.at[r][p] = odd.at[r][p] = _mm512_setzero_ps();
        }
    }
    const size_t step = e4m3 ? 64 : 128; /* bytes of two pairs */
    _Pragma("GCC unroll 1") for (size_t i = 0; i < BLOCK_INPUTS / 4; i++) {
        __m512i first[KERNEL_PANELS_MAX], second[KERNEL_PANELS_MAX];
        UNROLL for (int p = 0; p < panels; p++) {
            const uint8_t *tile = tiles + (size_t)p * panel_bytes + i * step;
            if (e4m3) {
                const struct two_rows two = expand(expander, tile);
                first[p] = two.first;
                second[p] = two.second;
            } else {
                first[p] = _mm512_loadu_si512(tile);
                second[p] = _mm512_loadu_si512(tile + 64);
            }
        }
        add_pair(rows, panels, first, x + 4 * i, x_stride, &even, &odd);
        add_pair(rows, panels, second, x + 4 * i + 2, x_stride, &even, &odd);
    }
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int p = 0; p < panels; p++) {
            sums->at[r][p] =
                _mm512_add_ps(sums->at[r][p], _mm512_add_ps(even.at[r][p], odd.at[r][p]));
        }
    }
}

/* sums += the blocks of one segment, `width` inputs from x on; returns the tiles after it. */
INLINE const uint8_t *add_segment(bool e4m3, int rows, int panels, const struct expander *expander,
                                  const uint8_t *tiles, size_t panel_bytes, const bf16 *x,
                                  size_t x_stride, uint32_t width, struct sums *sums) {
    const size_t tile_bytes = TILE_ELEMENTS * (e4m3 ? 1 : sizeof(bf16));
    for (; width >= BLOCK_INPUTS; width -= BLOCK_INPUTS) {
        add_block(e4m3, rows, panels, expander, tiles, panel_bytes, x, x_stride, sums);
        tiles += tile_bytes;
        x += BLOCK_INPUTS;
    }
    if (width > 0) {
        /* What follows in x belongs to the next segment, or to nobody. */
        bf16 rest[KERNEL_ROWS_MAX][BLOCK_INPUTS] = {{0}};
        for (int r = 0; r < rows; r++)
            memcpy(rest[r], x + (size_t)r * x_stride, width * sizeof *x);
        add_block(e4m3, rows, panels, expander, tiles, panel_bytes, rest[0], BLOCK_INPUTS, sums);
        tiles += tile_bytes;
    }
    return tiles;
}

INLINE void kernel(bool e4m3, int rows, int panels, const struct kernel_job *job) {
    const struct expander expander = expander_make();
    struct sums sums;
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int p = 0; p < panels; p++) {
            const __mmask16 outputs = p == panels - 1 ? job->last_outputs : 0xffff;
            sums.at[r][p] = _mm512_maskz_loadu_ps(job->continues ? outputs : 0,
                                                  job->y + (size_t)r * job->y_stride + 16 * p);
        }
    }
    const uint8_t *tiles = job->tiles;
    for (uint32_t s = 0; s < job->segments; s++) {
        const uint32_t k = job->segment_k[s], width = job->segment_k[s + 1] - k;
        if (job->scales == NULL) {
            tiles = add_segment(e4m3, rows, panels, &expander, tiles, job->panel_bytes, job->x + k,
                                job->x_stride, width, &sums);
            continue;
        }
        struct sums partial;
        UNROLL for (int r = 0; r < rows; r++) {
            UNROLL for (int p = 0; p < panels; p++) {
                partial.at[r][p] = _mm512_setzero_ps();
            }
        }
        tiles = add_segment(e4m3, rows, panels, &expander, tiles, job->panel_bytes, job->x + k,
                            job->x_stride, width, &partial);
        UNROLL for (int p = 0; p < panels; p++) {
            const __m512 scale = _mm512_loadu_ps(job->scales + p * job->scale_stride + 16 * s);
            UNROLL for (int r = 0; r < rows; r++) {
                __m512 by = scale;
                if (job->x_scale != NULL)
                    by = _mm512_mul_ps(
                        scale, _mm512_set1_ps(job->x_scale[(size_t)r * job->x_scale_stride + s]));
                sums.at[r][p] = _mm512_fmadd_ps(partial.at[r][p], by, sums.at[r][p]);
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int p = 0; p < panels; p++) {
            const __mmask16 outputs = p == panels - 1 ? job->last_outputs : 0xffff;
            _mm512_mask_storeu_ps(job->y + (size_t)r * job->y_stride + 16 * p, outputs,
                                  sums.at[r][p]);
        }
    }
}

#define KERNEL(format, e4m3, rows, panels)                                                         \
    static void kernel_##format##_##rows##x##panels(const struct kernel_job *job) {                \
        kernel(e4m3, rows, panels, job);                                                           \
    }
/* Few rows take many panels, so that there are chains enough; many rows take few, so that registers
 * suffice. */
#define KERNELS(format, e4m3)                                                                      \
    KERNEL(format, e4m3, 1, 1)                                                                     \
    KERNEL(format, e4m3, 1, 2)                                                                     \
    KERNEL(format, e4m3, 1, 4)                                                                     \
    KERNEL(format, e4m3, 2, 1)                                                                     \
    KERNEL(format, e4m3, 2, 2)                                                                     \
    KERNEL(format, e4m3, 2, 4)                                                                     \
    KERNEL(format, e4m3, 3, 1)                                                                     \
    KERNEL(format, e4m3, 3, 2)                                                                     \
    KERNEL(format, e4m3, 4, 1)                                                                     \
    KERNEL(format, e4m3, 4, 2)
#define KERNEL_TABLE(format)                                                                       \
    {                                                                                              \
        {kernel_##format##_1x1, kernel_##format##_1x2, kernel_##format##_1x4},                     \
            {kernel_##format##_2x1, kernel_##format##_2x2, kernel_##format##_2x4},                 \
            {kernel_##format##_3x1, kernel_##format##_3x2},                                        \
            {kernel_##format##_4x1, kernel_##format##_4x2},                                        \
    }
