#pragma once

#include <cstdint>

#include "sm90/ptx/barrier.cuh"

namespace flash_mla::sm90 {

/// Waits for the end of an mbarrier's first phase, and makes it as if fresh, for one arrival. By a thread, which calls
/// fence_mbarrier_init() afterwards.
__device__ __forceinline__ void renew_mbarrier(std::uint32_t barrier) {
  ptx::mbarrier_wait(barrier, 0);
  ptx::mbarrier_invalidate(barrier);
  ptx::mbarrier_init(barrier, 1);
}

}  // namespace flash_mla::sm90
