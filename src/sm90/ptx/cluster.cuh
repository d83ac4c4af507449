#pragma once

#include <cstdint>

// Clusters of CTAs: PTX ISA, "barrier.cluster", "mapa", "cp.async.bulk" between shared memories, "%cluster_ctarank".

namespace flash_mla::ptx {

/// Arrives at the cluster's barrier, for which all its threads are counted that have not ended. Orders nothing.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }

__device__ __forceinline__ int cta_rank_in_cluster() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

/// The address, in the cluster's window, of what lies at `address` of this CTA's shared memory in that of another.
__device__ __forceinline__ std::uint32_t map_to_cta(std::uint32_t address, int rank) {
  std::uint32_t mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

/// Copies `bytes` of this CTA's shared memory into that of another, and reports them to a barrier there.
__device__ __forceinline__ void bulk_copy_to_cta(std::uint32_t destination, std::uint32_t source, std::uint32_t bytes,
                                                 std::uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(destination),
      "r"(source), "r"(bytes), "r"(barrier)
      : "memory");
}

/// Stores two floats into the shared memory of another CTA, and reports their bytes to a barrier there. PTX ISA,
/// "st.async".
__device__ __forceinline__ void store_to_cta(std::uint32_t destination, float2 value, std::uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(destination),
      "f"(value.x), "f"(value.y), "r"(barrier)
      : "memory");
}

}  // namespace flash_mla::ptx
