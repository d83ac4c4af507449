#pragma once

// The grid: PTX ISA, "griddepcontrol" (programmatic dependent launch) and "%ctaid".

namespace flash_mla::ptx {

/// The next kernel of the stream, if launched to overlap, may start. It sees this grid's writes only after its own
/// wait_for_previous_grids().
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

/// Waits until the grids before this one have ended and their writes are visible.
__device__ __forceinline__ void wait_for_previous_grids() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

/// blockIdx.z, read anew each time: not kept in a register.
__device__ __forceinline__ int cta_z() {
  int z;
  asm volatile("mov.u32 %0, %%ctaid.z;" : "=r"(z));
  return z;
}

}  // namespace flash_mla::ptx
