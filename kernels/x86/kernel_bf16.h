/* What the files of the AVX-512 and AMX products share: the job of a kernel, and which kernels
 * there are. */
#ifndef TROUPE_KERNELS_X86_KERNEL_BF16_H
#define TROUPE_KERNELS_X86_KERNEL_BF16_H

#include <immintrin.h>

#include "kernels/internal.h"

/* A kernel computes a fixed number of rows (1..4) x panels (1, 2 or 4) over consecutive segments of
 * k. */
enum { KERNEL_ROWS_MAX = 4, KERNEL_PANELS_MAX = 4, KERNEL_SIZES = 3 };

struct kernel_job {
    const uint8_t *tiles; /* first panel, first block of the first segment */
    size_t panel_bytes;   /* from one panel to the next */
    const bf16 *x;        /* first row, input 0 of the matrix */
    size_t x_stride;
    float *y; /* first row, first output */
    size_t y_stride;
    const float *scales; /* of the first segment and panel; NULL: unscaled */
    size_t scale_stride; /* from one panel to the next */
    const float *x_scale;      /* of the first row and segment; NULL: activations unscaled */
    size_t x_scale_stride;     /* from row to row */
    const uint32_t *segment_k; /* of the first segment */
    uint32_t segments;
    bool continues;         /* y holds the sums of the segments before; otherwise they start at 0 */
    __mmask16 last_outputs; /* outputs of the last panel that exist */
};
typedef void kernel_function(const struct kernel_job *job);

/* [rows - 1][log2(panels)]; NULL where there is no kernel of that size. */
typedef kernel_function *kernel_table[KERNEL_ROWS_MAX][KERNEL_SIZES];
extern kernel_function *const kernels_bf16[KERNEL_ROWS_MAX][KERNEL_SIZES];
extern kernel_function *const kernels_e4m3[KERNEL_ROWS_MAX][KERNEL_SIZES];
extern kernel_function *const kernels_e4m3_vbmi[KERNEL_ROWS_MAX][KERNEL_SIZES];

#endif
