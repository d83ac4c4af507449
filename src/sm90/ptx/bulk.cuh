#pragma once

#include <cstdint>

// Bulk copies of contiguous bytes: PTX ISA, "cp.async.bulk".

namespace flash_mla::ptx {

/// Copies `bytes` of global memory into shared memory and reports them to `barrier`. Addresses and `bytes` are
/// multiples of 16.
__device__ __forceinline__ void bulk_load(std::uint32_t destination, const void* source, std::uint32_t bytes,
                                          std::uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(destination),
      "l"(source), "r"(bytes), "r"(barrier)
      : "memory");
}

}  // namespace flash_mla::ptx
