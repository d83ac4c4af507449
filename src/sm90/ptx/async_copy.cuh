#pragma once

#include <cstdint>

// Copies from global to shared memory by ordinary threads: PTX ISA, "cp.async".

namespace flash_mla::ptx {

/// Copies 16 bytes through L2.
__device__ __forceinline__ void async_copy_16(std::uint32_t destination, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(destination), "l"(source) : "memory");
}

/// Ends a group: this thread's copies since the last one.
__device__ __forceinline__ void async_copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Waits for all but the last kGroups groups of this thread.
template <int kGroups>
__device__ __forceinline__ void async_copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

}  // namespace flash_mla::ptx
