#pragma once

// PTX ISA, "setmaxnreg": moves registers between the warpgroups of a CTA. The sum over all must not exceed
// what the launch gave, or the kernel hangs.

namespace flash_mla::ptx {

template <int kRegisters>
__device__ __forceinline__ void increase_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void decrease_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace flash_mla::ptx
