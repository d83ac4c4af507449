#pragma once

#include <cstdint>

namespace flash_mla::sm90 {

/// A place in a ring of kSlots slots of shared memory, and the parity of the phase that its barriers are in there.
template <int kSlots>
struct RingPosition {
  int slot = 0;
  std::uint32_t phase = 0;

  /// `count` slots on, fewer than the ring has.
  __device__ __forceinline__ RingPosition operator+(int count) const {
    const bool wraps = slot + count >= kSlots;
    return {slot + count - (wraps ? kSlots : 0), phase ^ (wraps ? 1U : 0U)};
  }
  /// The slot `count` back, no more than the ring has.
  __device__ __forceinline__ int slot_before(int count) const { return slot - count + (slot < count ? kSlots : 0); }
};

}  // namespace flash_mla::sm90
