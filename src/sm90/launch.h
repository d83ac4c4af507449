#pragma once

#include "flash_mla/tensor.h"
#include "sm90/dense_decode/params.h"

struct CUstream_st;

namespace flash_mla::sm90 {

/// Launches the decode kernel that fits the tiles on `stream` of the current device.
void launch_dense_decode(const DenseDecodeParams& params, DType dtype, CUstream_st* stream);

/// How many clusters of 2, 4 or 8 CTAs (DenseDecodeParams::cluster_size) run at once on the current device.
int max_active_clusters(int cluster_size);

// By dtype, one file each. The narrow kernels take tiles of up to kMaxNarrowRows query rows.
void launch_dense_decode_bf16(const DenseDecodeParams& params, CUstream_st* stream);
void launch_dense_decode_fp16(const DenseDecodeParams& params, CUstream_st* stream);
void launch_dense_decode_narrow_bf16(const DenseDecodeParams& params, CUstream_st* stream);
void launch_dense_decode_narrow_fp16(const DenseDecodeParams& params, CUstream_st* stream);

}  // namespace flash_mla::sm90
