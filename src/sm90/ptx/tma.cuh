#pragma once

#include <cuda.h>

#include <cstdint>

// Bulk tensor copies: PTX ISA, "cp.async.bulk.tensor", "cp.async.bulk.prefetch.tensor" and "prefetch.tensormap".

namespace flash_mla::ptx {

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/// Whether L2 should keep what is read.
enum class Keep : std::uint64_t {
  kNormally = 0x1000000000000000,  // as createpolicy.fractional.L2 encodes evict_normal and evict_first
  kNotForLong = 0x12F0000000000000,
};

/// Copies the box at (c0, c1, c2, c3) of a 4-dimensional tensor into shared memory and reports its bytes to `barrier`.
/// What lies outside the tensor arrives as zeros.
__device__ __forceinline__ void tma_load_4d(std::uint32_t destination, const CUtensorMap* map, std::uint32_t barrier,
                                            int c0, int c1, int c2, int c3, Keep keep = Keep::kNormally) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, "
      "%4, %5, %6}], "
      "[%2], %7;" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(keep)
      : "memory");
}

/// Asks for the same box to come into L2: a hint, so the box may lie outside the tensor, or be written meanwhile.
__device__ __forceinline__ void tma_prefetch_4d(const CUtensorMap* map, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%0, {%1, %2, %3, %4}];" ::"l"(map), "r"(c0), "r"(c1),
               "r"(c2), "r"(c3)
               : "memory");
}

}  // namespace flash_mla::ptx
