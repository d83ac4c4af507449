#pragma once

// PTX ISA, "setmaxnreg": moves registers between the warpgroups of a CTA. The sum over all must not exceed
// what the launch gave, or the kernel hangs.

namespace flash_mla::ptx {

/// Brings the warpgroup, which has kBefore, to kRegisters a thread.
template <int kBefore, int kRegisters>
__device__ __forceinline__ void set_registers() {
  if constexpr (kRegisters > kBefore) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
  if constexpr (kRegisters < kBefore) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace flash_mla::ptx
