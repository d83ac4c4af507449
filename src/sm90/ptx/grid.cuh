#pragma once

// Programmatic dependent launch: PTX ISA, "griddepcontrol".

namespace flash_mla::ptx {

/// The next kernel of the stream, if launched to overlap, may start. It sees this grid's writes only after its own
/// wait_for_previous_grids().
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

/// Waits until the grids before this one have ended and their writes are visible.
__device__ __forceinline__ void wait_for_previous_grids() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

}  // namespace flash_mla::ptx
