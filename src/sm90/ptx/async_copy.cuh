#pragma once

#include <cstdint>

// Copies from global to shared memory by ordinary threads: PTX ISA, "cp.async".

namespace flash_mla::ptx {

/// Copies 16 bytes through L2.
__device__ __forceinline__ void async_copy_16(std::uint32_t destination, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(destination), "l"(source) : "memory");
}

/// Waits for all copies of this thread.
__device__ __forceinline__ void async_copy_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace flash_mla::ptx
