#pragma once

#include <cstdint>

#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/shared.cuh"

namespace flash_mla::sm90 {

/// How often a warp arrives at an mbarrier that counts warps: once. But racecheck of compute-sanitizer takes an arrival
/// for the lane's alone, and reports races with what other lanes did before; in a build for it each lane arrives.
#ifdef FLASH_MLA_RACECHECK
inline constexpr int kArrivalsOfWarp = 32;
#else
inline constexpr int kArrivalsOfWarp = 1;
#endif

/// The warp's arrival at an mbarrier that is initialised for kArrivalsOfWarp of each warp.
__device__ __forceinline__ void arrive_of_warp(std::uint64_t& barrier) {
  if (threadIdx.x % (32 / kArrivalsOfWarp) == 0) ptx::mbarrier_arrive(ptx::shared_address(&barrier));
}

}  // namespace flash_mla::sm90
