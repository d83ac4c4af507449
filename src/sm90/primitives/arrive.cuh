#pragma once

#include <cstdint>

#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/shared.cuh"

namespace flash_mla::sm90 {

/// One arrival at an mbarrier for the warp.
__device__ __forceinline__ void arrive_of_warp(std::uint64_t& barrier) {
  if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(ptx::shared_address(&barrier));
}

}  // namespace flash_mla::sm90
