/* Tensor maps: what a bulk copy needs to know of a matrix in device memory. Made on the host, once
 * for each buffer. */
#ifndef TROUPE_CUDA_TENSOR_MAP_CUH
#define TROUPE_CUDA_TENSOR_MAP_CUH

#include "kernels/cuda/ptx.cuh"

static_assert(sizeof(CUtensorMap) <= sizeof(struct tensor_map_cuda), "a map fits its room");

static inline const CUtensorMap &tensor_map(const struct tensor_map_cuda &map) {
    return *(const CUtensorMap *)(const void *)&map;
}

/* Boxes of `box_rows` rows of 128 bytes, swizzled, of a matrix of [rows, columns] elements of 1 or
 * 2 bytes, rows `row_bytes` (a multiple of 16) apart; zeros outside. 0 or a CUDA error. */
static inline int tensor_map_make(struct tensor_map_cuda *ret, const void *base, uint64_t rows,
                                  uint64_t columns, uint32_t element_bytes, uint64_t row_bytes,
                                  uint32_t box_rows) {
    CUtensorMap *map = (CUtensorMap *)(void *)ret;
#if defined(TROUPE_EMULATED)
    if (row_bytes % 16 != 0 || (uintptr_t)base % 16 != 0 || box_rows > 256 || rows == 0 ||
        columns == 0)
        return 1; /* cudaErrorInvalidValue */
    *map = {
        (const uint8_t *)base, columns * element_bytes, rows, row_bytes, TILE_ROW_BYTES, box_rows,
        element_bytes};
    return 0;
#else
    typedef CUresult encode_function(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                                     const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                                     const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                                     CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    static encode_function *encode = NULL;
    if (encode == NULL) {
        void *found = NULL;
        cudaDriverEntryPointQueryResult result;
        const cudaError_t error = cudaGetDriverEntryPointByVersion(
            "cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
        if (error != cudaSuccess || found == NULL)
            return error != cudaSuccess ? (int)error : (int)cudaErrorNotSupported;
        encode = (encode_function *)found;
    }
    const cuuint64_t size[2] = {columns, rows}, stride[1] = {row_bytes};
    const cuuint32_t box[2] = {TILE_ROW_BYTES / element_bytes, box_rows}, step[2] = {1, 1};
    const CUresult result = encode(
        map, element_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        2, (void *)base, size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? 0 : (int)cudaErrorInvalidValue;
#endif
}

#endif
