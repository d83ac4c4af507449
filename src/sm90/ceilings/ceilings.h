#pragma once

#include <cstdint>

#include "flash_mla/tensor.h"

// What a GPU gives to kernels that do a single thing of what decoding does: yardsticks for benchmarks, not part of the
// public headers. Both are queued on `stream` and throw InvalidArgument, InvalidType, Unsupported or CudaError.

namespace flash_mla::sm90 {

/// Reads `buffer`, bfloat16 or float16 of one dimension, once, except what is left over of 16 KB pieces.
/// @return bytes read
FLASH_MLA_API std::int64_t launch_hbm_read(const Tensor& buffer, CUstream_st* stream);

/// Runs the MMAs that decoding takes for 64 query rows and 128 tokens, `iterations` times on each SM.
/// @param operands  bfloat16, one dimension, at least 110592 values: Q and KV
/// @param sink  float32, one dimension, a value for each SM; written
/// @return floating-point operations done
FLASH_MLA_API double launch_mma_mix(const Tensor& operands, const Tensor& sink, std::int64_t iterations,
                                    CUstream_st* stream);

}  // namespace flash_mla::sm90
