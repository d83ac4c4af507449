#pragma once

#include "sm90/dense_decode/params.h"

struct CUstream_st;

namespace flash_mla::sm90 {

/// Launches the decode kernel on `stream` of the current device.
void launch_dense_decode_bf16(const DenseDecodeParams& params, CUstream_st* stream);
void launch_dense_decode_fp16(const DenseDecodeParams& params, CUstream_st* stream);

}  // namespace flash_mla::sm90
