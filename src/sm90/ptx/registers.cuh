#pragma once

// Registers. PTX ISA, "setmaxnreg": moves registers between the warpgroups of a CTA. The sum over all must not exceed
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

/// blockIdx.z, read anew each time: not kept in a register.
__device__ __forceinline__ int cta_z() {
  int z;
  asm volatile("mov.u32 %0, %%ctaid.z;" : "=r"(z));
  return z;
}

}  // namespace flash_mla::ptx
