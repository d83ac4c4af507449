#pragma once

#include <cstdint>

#include "cuda/device.h"
#include "flash_mla/dense_decode.h"
#include "scheduler/split_plan.h"

namespace flash_mla {

/// Whether a KV block takes memory longer than a tile of 64 query rows takes the tensor cores, where all SMs work. The
/// `num_tiles` tiles that read the same KV do it at about the same time, so memory gives it once. One tile always
/// waits; two do where memory is slow beside the SMs (H100 and H800 SXM: 3.35 TB/s), and not on an H200 (4.8 TB/s).
inline bool waits_for_memory(const cuda::DeviceProperties& device, int num_tiles) {
  constexpr double kClocksPerBlock = 2350;  // about what was measured: docs/kernels/dense_decode.md
  constexpr double kBytesPerBlock = scheduler::kBlockN * kHeadDimQk * sizeof(std::uint16_t);
  if (num_tiles == 1) return true;
  if (device.memory_bandwidth <= 0 || device.sm_clock <= 0) return false;
  const double streams = static_cast<double>(device.num_sms) / num_tiles;
  return streams * kBytesPerBlock / device.memory_bandwidth > kClocksPerBlock / device.sm_clock;
}

}  // namespace flash_mla
