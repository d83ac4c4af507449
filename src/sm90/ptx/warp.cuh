#pragma once

#include <cstdint>

namespace flash_mla::ptx {

/// True for one of the warp's lanes, always the same. By all of them. PTX ISA, "elect.sync": what only this lane does
/// is known to be done by one, so that ptxas makes no loop over lanes of it.
__device__ __forceinline__ bool elect_one() {
  std::uint32_t is_elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(is_elected));
  return is_elected != 0;
}

/// Ends the calling thread. PTX ISA, "exit".
__device__ __forceinline__ void exit_thread() { asm volatile("exit;"); }

}  // namespace flash_mla::ptx
