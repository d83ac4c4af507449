#pragma once

#include <cstdint>

struct CUstream_st;

namespace flash_mla::sm90 {

/// What one CTA of hbm_read_kernel copies at a time; buffers are multiples of it.
constexpr std::int64_t kHbmPieceBytes = 16384;

/// Reads `num_bytes` (a multiple of kHbmPieceBytes) at `buffer` once, with all `num_sms` SMs of the current device.
void launch_hbm_read_kernel(const void* buffer, std::int64_t num_bytes, int num_sms, CUstream_st* stream);

/// Bytes of operands that a CTA of mma_mix_kernel takes: a query tile and two KV tiles, 64 x 576 each.
constexpr std::int64_t kMmaMixOperandBytes = 3 * 64 * 576 * 2;

/// Floating-point operations of one iteration of a CTA: QK (576) and PV (512) of 64 query rows and 128 tokens.
constexpr double kMmaMixFlops = 2.0 * 64 * 128 * (576 + 512);

/// Runs `iterations` of MLA's instruction mix on every SM of the current device. `operands`: kMmaMixOperandBytes of
/// bfloat16, 16-byte aligned. `sink`: num_sms floats, written.
void launch_mma_mix_kernel(const void* operands, float* sink, int iterations, int num_sms, CUstream_st* stream);

}  // namespace flash_mla::sm90
