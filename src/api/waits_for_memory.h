#pragma once

#include <cstdint>

#include "cuda/device.h"
#include "flash_mla/dense_decode.h"
#include "scheduler/split_plan.h"

namespace flash_mla {

/// Whether a KV block takes memory longer than a tile of 64 query rows takes the tensor cores, where all SMs work. The
/// `num_tiles` tiles that read the same KV do it at about the same time, so memory gives it once. With one tile it is
/// so on every Hopper GPU, with two on those whose memory is the slower kind (H100, H800: 3.35 TB/s; not H200: 4.8).
inline bool waits_for_memory(const cuda::DeviceProperties& device, int num_tiles) {
  constexpr double kClocksPerBlock = 2350;  // measured: docs/kernels/dense_decode.md
  constexpr double kBytesPerBlock = scheduler::kBlockN * kHeadDimQk * sizeof(std::uint16_t);
  if (device.memory_bandwidth <= 0) return num_tiles == 1;
  const double streams = static_cast<double>(device.num_sms) / num_tiles;
  return streams * kBytesPerBlock / device.memory_bandwidth > kClocksPerBlock / device.sm_clock;
}

}  // namespace flash_mla
